"""Calibration data: every source against numpy, memory and determinism; what is refused is in test_calibration_refusals."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphq import arrays, calibration
from graphq.calibration import CalibrationSet, open_calibration, random_calibration
from graphq.errors import DataError
from graphq.preprocess import PRESETS
from graphq.spec import ModelInput

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
IMAGE = (ModelInput("x", F32, ("n", 3, 8, 6)),)
TEXT = (ModelInput("input_ids", I64, ("n", "s")), ModelInput("attention_mask", I64, ("n", "s")))
Save = Callable[..., None]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def gather(data: CalibrationSet, size: int = 4, **rows: Any) -> dict[str, np.ndarray]:
    batches = list(data.batches(size, **rows))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


# Sources


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_npz_gives_the_arrays(tmp_path: Path, save: Save, order: Any, size: int) -> None:
    arrays = {"attention_mask": np.ones((10, 5), np.int64), "input_ids": np.arange(50).reshape(10, 5)}
    save(tmp_path / "a.npz", **{name: np.asarray(array, order=order) for name, array in arrays.items()})
    data = open_calibration(tmp_path / "a.npz", TEXT)
    assert len(data) == 10 and data.kind == "npz" and data.inputs == TEXT
    assert data.description == f"10 samples from {tmp_path / 'a.npz'}"
    batches = list(data.batches(size))
    assert [len(batch["input_ids"]) for batch in batches] == [min(size, 10 - i) for i in range(0, 10, size)]
    assert list(batches[0]) == ["input_ids", "attention_mask"]
    assert all(array.flags.writeable and array.flags.c_contiguous for array in batches[0].values())
    for name, array in gather(data, size).items():
        assert array.dtype == np.int64
        np.testing.assert_array_equal(array, arrays[name])
    np.testing.assert_array_equal(gather(data, 2, starts=[1, 4, 9])["input_ids"], arrays["input_ids"][[1, 2, 4, 5, 9]])
    assert list(data.batches(size, [10])) == []


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_gives_the_array(tmp_path: Path, order: Any) -> None:
    array = noise(5, 3, 8, 6)
    np.save(tmp_path / "a.npy", np.asarray(array, order=order))
    data = open_calibration(str(tmp_path / "a.npy"), IMAGE)
    assert data.kind == "npy"
    np.testing.assert_array_equal(gather(data, 2)["x"], array)


def test_compressed_npz_is_read_from_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_BLOCK_BYTES", 100)
    array = noise(20, 3, 8, 6)
    np.savez_compressed(tmp_path / "a.npz", x=array)
    _, held = open_calibration(tmp_path / "a.npz", IMAGE).split(7)
    np.testing.assert_array_equal(gather(held, 2)["x"], array[13:])


def test_arrays_with_an_empty_axis(tmp_path: Path) -> None:
    inputs = (ModelInput("past", F32, ("n", 2, "past", 4)),)
    np.savez(tmp_path / "a.npz", past=np.zeros((3, 2, 0, 4), np.float32))
    assert gather(open_calibration(tmp_path / "a.npz", inputs), 2)["past"].shape == (3, 2, 0, 4)


@pytest.mark.parametrize("form", ["dict", "array", "dicts", "tuples", "arrays", "generator"])
def test_python_objects(form: str) -> None:
    array = noise(6, 3, 8, 6)
    parts = [array[:2], array[2:3], array[3:]]
    sources: dict[str, Any] = {
        "dict": {"x": array},
        "array": array,
        "dicts": [{"x": part} for part in parts],
        "tuples": [(part,) for part in parts],
        "arrays": parts,
        "generator": (part for part in parts),
    }
    data = open_calibration(sources[form], IMAGE)
    assert data.kind == "iterable" and len(data) == 6
    assert data.description == "6 samples from memory"
    for _ in range(2):
        np.testing.assert_array_equal(gather(data, 4)["x"], array)


def test_batches_do_not_share_memory_with_the_source() -> None:
    array = noise(2, 3, 8, 6)
    before = array.copy()
    next(open_calibration(array, IMAGE).batches(2))["x"][:] = 0
    np.testing.assert_array_equal(array, before)


def test_tuples_follow_the_order_of_the_inputs() -> None:
    ids, mask = np.arange(8).reshape(2, 4), np.ones((2, 4), np.int64)
    batch = next(open_calibration([(ids, mask)], TEXT).batches(2))
    np.testing.assert_array_equal(batch["input_ids"], ids)
    np.testing.assert_array_equal(batch["attention_mask"], mask)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(3).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)
    for name, values in zip(("b.png", "a.PNG", "c.bmp"), pixels, strict=True):
        image.fromarray(values).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    np.save(tmp_path / "expected.npy", pixels[[1, 0, 2]])
    return tmp_path


@pytest.mark.parametrize("shape", [("n", 3, 8, 6), ("n", 8, 6, 3)])
def test_folder_of_images(folder: Path, shape: tuple[int | str, ...]) -> None:
    data = open_calibration(folder, (ModelInput("x", F32, shape),), preprocess="none")
    assert data.kind == "folder" and data.description == f"3 samples from {folder}, preprocessing none"
    pixels = np.load(folder / "expected.npy").astype(np.float32)
    np.testing.assert_array_equal(gather(data, 2)["x"], pixels if shape[-1] == 3 else pixels.transpose(0, 3, 1, 2))


def test_folder_of_images_for_other_models(folder: Path) -> None:
    grey = open_calibration(folder, (ModelInput("x", F32, ("n", 1, 4, 4)),), preprocess="unit")
    assert gather(grey)["x"].shape == (3, 1, 4, 4) and gather(grey)["x"].max() <= 1
    integers = open_calibration(folder, (ModelInput("x", np.dtype(np.uint8), ("n", 3, 8, 6)),), preprocess="none")
    np.testing.assert_array_equal(gather(integers)["x"], np.load(folder / "expected.npy").transpose(0, 3, 1, 2))
    (folder / "own.yaml").write_text("crop: 5")
    opened = open_calibration(folder, (ModelInput("x", F32, ("n", 3, "h", "w")),), preprocess=folder / "own.yaml")
    assert gather(opened)["x"].shape == (3, 3, 5, 5) and "custom" in opened.description


@pytest.mark.parametrize("shape", [("n", 3, 8, 6), ("n", 8, 6, 3), ("n", 3, "h", "w")])
def test_pixels_in_an_npz_are_preprocessed(tmp_path: Path, shape: tuple[int | str, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=pixels)
    result = gather(open_calibration(tmp_path / "a.npz", (ModelInput("x", F32, shape),), preprocess="imagenet"))["x"]
    expected = PRESETS["imagenet"].apply(pixels)
    np.testing.assert_array_equal(result, expected.transpose(0, 2, 3, 1) if shape[-1] == 3 else expected)


def test_arrays_of_the_inputs_type_are_not_preprocessed() -> None:
    array = noise(2, 3, 8, 6)
    np.testing.assert_array_equal(gather(open_calibration(array, IMAGE, preprocess="imagenet"))["x"], array)


@pytest.mark.parametrize(
    ("have", "want"), [("f8", "f4"), ("f4", "f2"), (">f4", "f4"), ("i4", "i8"), ("u1", "i8"), ("?", "i8"), (">i8", "i8")]
)
def test_safe_casts(have: str, want: str) -> None:
    array = np.arange(6).reshape(3, 2).astype(have)
    result = gather(open_calibration(array, (ModelInput("x", np.dtype(want), ("n", 2)),)))["x"]
    assert result.dtype == np.dtype(want)
    np.testing.assert_array_equal(result, array.astype(want))


# Views, fixed batches, digest, random


def test_split_and_take_are_views() -> None:
    array = noise(10, 3, 8, 6)
    data = open_calibration(array, IMAGE)
    first, held = data.split(3)
    assert (len(first), len(held)) == (7, 3)
    assert held.description == "samples 7 to 9 of 10 from memory"
    np.testing.assert_array_equal(gather(first, 2)["x"], array[:7])
    np.testing.assert_array_equal(gather(held, 2, starts=[1])["x"], array[8:])
    np.testing.assert_array_equal(gather(held.take(2))["x"], array[7:9])
    assert len(data.take(99)) == 10
    assert [len(part) for part in data.split(0)] == [9, 1]
    assert [len(part) for part in data.split(99)] == [1, 9]
    assert first.columns is data.columns


def test_split_of_one_sample() -> None:
    data = open_calibration(noise(1, 3, 8, 6), IMAGE)
    first, held = data.split(1)
    assert first is held and len(first) == 1 and "too few to hold any back" in first.description


def test_fixed_batch() -> None:
    inputs = (ModelInput("x", F32, (4, 2)),)
    array = noise(11, 2)
    data = open_calibration(array, inputs)
    assert data.fixed_batch == 4 and open_calibration(noise(1, 3, 8, 6), IMAGE).fixed_batch is None
    assert [len(batch["x"]) for batch in data.batches(32)] == [4, 4]
    np.testing.assert_array_equal(gather(data, 1)["x"], array[:8])
    assert [len(part) for part in data.split(1)] == [4, 4]
    assert len(random_calibration(inputs, 5)) == 8
    with pytest.raises(DataError, match="takes 4 samples at once, there are 3"):
        open_calibration(array[:3], inputs).batches(1)
    first, held = data.take(3).split(2)
    assert first is held and "too few" in held.description


def test_misuse_is_a_programming_error() -> None:
    data = open_calibration(noise(2, 3, 8, 6), IMAGE)
    for call in (lambda: data.batches(0), lambda: data.batches(1, [-1]), lambda: data.take(0)):
        with pytest.raises(ValueError, match="must be at least"):
            call()


def test_digest_follows_content(tmp_path: Path) -> None:
    array = noise(10, 3, 8, 6)
    changed = array.copy()
    changed[9, 2, 7, 5] += 1
    data = open_calibration(array, IMAGE)
    assert re.fullmatch("[0-9a-f]{64}", data.digest)
    assert data.digest == open_calibration([array[:4], array[4:]], IMAGE).digest == data.take(10).digest
    different = [
        open_calibration(changed, IMAGE),
        data.take(9),
        data.split(3)[1],
        open_calibration({"y": array}, (ModelInput("y", F32, None),)),
        open_calibration(array, IMAGE, preprocess="unit"),
    ]
    for name, content in (("a", array), ("b", changed)):
        np.savez(tmp_path / f"{name}.npz", x=content)
        different.append(open_calibration(tmp_path / f"{name}.npz", IMAGE))
    assert len({data.digest, *(one.digest for one in different)}) == 1 + len(different)
    assert different[-1].digest == open_calibration(tmp_path / "b.npz", IMAGE).digest


def test_digest_of_a_folder(folder: Path) -> None:
    before = open_calibration(folder, IMAGE, preprocess="unit").digest
    assert open_calibration(folder, IMAGE, preprocess="unit").digest == before
    assert before != open_calibration(folder, IMAGE, preprocess="none").digest
    (folder / "b.png").rename(folder / "z.png")
    assert before != open_calibration(folder, IMAGE, preprocess="unit").digest


def test_sets_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=noise(4, 3, 8, 6))
    data = open_calibration(tmp_path / "a.npz", IMAGE)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.digest == data.digest
    np.testing.assert_array_equal(gather(copy)["x"], gather(data)["x"])


def test_random_inputs() -> None:
    inputs = (
        ModelInput("pixels", F32, ("n", 3, "h", None)),
        ModelInput("input_ids", I64, ("n", "s")),
        ModelInput("attention_mask", I64, ("n", "s")),
        ModelInput("token_type_ids", I64, ("n", "s")),
        ModelInput("flag", np.dtype(bool), (None, 2)),
        ModelInput("past", np.dtype(np.float16), ("n", 4, "p", 8)),
        ModelInput("nhwc", F32, ("n", None, None, 1)),
        ModelInput("tall", F32, ("n", "h")),
    )
    data = random_calibration(inputs, 3, seed=5)
    batch = next(data.batches(3))
    shapes = [(3, 3, 224, 224), (3, 16), (3, 16), (3, 16), (3, 2), (3, 4, 16, 8), (3, 224, 224, 1), (3, 224)]
    assert [array.shape for array in batch.values()] == shapes
    assert [array.dtype for array in batch.values()] == [i.dtype for i in inputs]
    assert abs(batch["pixels"].mean()) < 0.01 and abs(batch["pixels"].std() - 1) < 0.01
    assert 0 <= batch["input_ids"].min() < batch["input_ids"].max() < 100 and len(np.unique(batch["input_ids"])) > 10
    assert (batch["attention_mask"] == 1).all() and (batch["token_type_ids"] == 0).all() and batch["flag"].all()
    assert not np.array_equal(batch["pixels"][0], batch["pixels"][1])
    assert data.kind == "random" and data.description == "3 samples from random numbers, seed 5"


def test_random_is_deterministic() -> None:
    data = random_calibration(IMAGE, 5, seed=1)
    np.testing.assert_array_equal(gather(data, 1)["x"], gather(random_calibration(IMAGE, 9, seed=1), 4)["x"][:5])
    assert data.digest == random_calibration(IMAGE, 5, seed=1).digest != random_calibration(IMAGE, 5, seed=2).digest
    opened = open_calibration("random", IMAGE, seed=1)
    assert len(opened) == calibration.RANDOM_COUNT and opened.digest == random_calibration(IMAGE, 32, seed=1).digest
    with pytest.raises(DataError, match="cannot make random data for input 'x'"):
        random_calibration((ModelInput("x", F32, None),), 1)


# Memory


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_does_not_grow_with_samples(tmp_path: Path, save: Save) -> None:
    inputs = (ModelInput("x", F32, ("n", 3, 224, 224)),)
    array = np.zeros((128, 3, 224, 224), np.float32)
    array[:, 0, 0, 0] = np.arange(128)
    save(tmp_path / "a.npz", x=array)
    del array
    tracemalloc.start()
    try:
        data = open_calibration(tmp_path / "a.npz", inputs)
        first, held = data.split(28)
        seen = [batch["x"][:, 0, 0, 0].copy() for part in (first, held) for batch in part.batches(8)]
        assert len(data.digest) == 64
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(np.concatenate(seen), np.arange(128))
    assert peak < 20e6


def test_import_needs_neither_pillow_nor_onnx() -> None:
    code = "import sys, graphq.calibration; print(sorted({'PIL', 'onnx', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
