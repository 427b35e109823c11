"""Calibration data that is refused: each wrong name, shape, type and file, and what the message says about it."""

from __future__ import annotations

import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphq import arrays
from graphq.calibration import CalibrationSet, open_calibration
from graphq.errors import DataError
from graphq.spec import ModelInput

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
IMAGE = (ModelInput("x", F32, ("n", 3, 8, 6)),)
TEXT = (ModelInput("input_ids", I64, ("n", "s")), ModelInput("attention_mask", I64, ("n", "s")))
Save = Callable[..., None]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def read(data: CalibrationSet) -> dict[str, np.ndarray]:
    batches = list(data.batches(4))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def refuse(source: Any, inputs: tuple[ModelInput, ...], message: str, preprocess: str | None = None) -> None:
    with pytest.raises(DataError) as error:
        list(open_calibration(source, inputs, preprocess=preprocess).batches(2))
    assert re.search(message, str(error.value), re.DOTALL), str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(3).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)
    for name, values in zip(("b.png", "a.PNG", "c.bmp"), pixels, strict=True):
        image.fromarray(values).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    np.save(tmp_path / "expected.npy", pixels[[1, 0, 2]])
    return tmp_path


def test_wrong_names() -> None:
    ids = np.zeros((2, 4), np.int64)
    refuse({"input_id": ids, "attention_mask": ids}, TEXT, "no array for input 'input_ids'.*did you mean 'input_id'")
    refuse({"input_ids": ids}, TEXT, "no array for input 'attention_mask'.*input_ids int64.*attention_mask int64.*samples, ")
    refuse({"x": noise(1, 3, 8, 6), "labels": ids}, IMAGE, "array 'labels' is no input")
    refuse([(ids, ids, ids)], TEXT, r"3 array\(s\) for 2 inputs.*batch 0.*input_ids, attention_mask")
    refuse(ids, TEXT, r"1 array\(s\) for 2 inputs")


def test_wrong_shapes() -> None:
    refuse(noise(2, 3, 8, 7), IMAGE, r"'x' is float32 \[2, 3, 8, 7\].*shape \[samples, 3, 8, 6\]")
    refuse(noise(3, 8, 6), IMAGE, r"first axis must be the samples")
    refuse([noise(2, 3, 8, 6), noise(3, 8, 6)], IMAGE, r"batch 1.*first axis must be the samples")
    refuse([1.0, 2.0], (ModelInput("x", F32, None),), r"\[\]")
    refuse({"x": np.float32(1)}, (ModelInput("x", F32, None),), "shape unknown")
    refuse({"t": noise(2)}, (ModelInput("t", F32, ()),), "make it a constant")
    refuse([noise(1, 2), noise(1, 3)], (ModelInput("x", F32, ("n", "s")),), "differ in shape.*pad the batches")


@pytest.mark.parametrize(
    ("have", "want"), [("i8", "f4"), ("f4", "i8"), ("i8", "i4"), ("U3", "f4"), ("c8", "f4"), ("i8", "?"), ("i8", "u8")]
)
def test_wrong_dtype(have: str, want: str) -> None:
    array = np.ones((3, 2)).astype(have)
    refuse(array, (ModelInput("x", np.dtype(want), ("n", 2)),), f"expected: {np.dtype(want)}.*astype")


def test_pixels_need_preprocessing() -> None:
    pixels = np.zeros((2, 3, 8, 6), np.uint8)
    refuse(pixels, IMAGE, "uint8.*--preprocess: imagenet, inception, unit, none")
    refuse(pixels, IMAGE, r"uint8 \[2, 3, 8, 6\].*\[samples, 8, 6, 3\] of uint8 pixels", "unit")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_not_finite(bad: float) -> None:
    array = noise(10, 3, 8, 6).astype(np.float64)
    array[7, 1, 2, 3] = array[9, 0, 0, 0] = bad
    refuse(array, IMAGE, "NaN or Inf in the data for input 'x', first in sample 7")
    assert len(read(open_calibration(array, IMAGE).take(7))["x"]) == 7


def test_sample_counts() -> None:
    ids = np.zeros((2, 4), np.int64)
    refuse({"input_ids": ids, "attention_mask": ids[:1]}, TEXT, "different numbers.*input_ids: 2, attention_mask: 1")
    refuse(noise(0, 3, 8, 6), IMAGE, "no samples")
    refuse([], IMAGE, "no samples")
    refuse((part for part in [noise(0, 3, 8, 6)]), IMAGE, "no samples")
    fixed = (ModelInput("a", F32, (1, 2)), ModelInput("b", F32, (4, 2)))
    refuse({"a": noise(4, 2), "b": noise(4, 2)}, fixed, "different fixed batches.*a: 1, b: 4")


def test_not_calibration_data(tmp_path: Path) -> None:
    refuse(3, IMAGE, "int is no calibration data")
    refuse([[[1.0], [2.0, 3.0]]], IMAGE, "array")
    (tmp_path / "data.npz").touch()
    refuse(tmp_path / "dat.npz", IMAGE, r"does not exist.*did you mean 'data\.npz'")
    refuse(tmp_path / "no" / "x.npz", IMAGE, "does not exist.*check the path")
    (tmp_path / "data.csv").touch()
    refuse(tmp_path / "data.csv", IMAGE, "unknown kind")


def test_one_array_for_several_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", noise(2, 4))
    refuse(tmp_path / "a.npy", TEXT, "a npy feeds one input.*input_ids, attention_mask")
    refuse(tmp_path, TEXT, "a folder feeds one input", "unit")


def zip_of_a_future_version(path: Path) -> bytes:
    np.savez(path, x=noise(1, 3, 8, 6))
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 6] = 99
    return bytes(content)


def test_not_an_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for content, message in (
        (b"", "something else"),
        (b"hello", "something else"),
        (pickle.dumps({"x": 1}), "a pickle"),
        (b"\x93NUMPY\x01\x00", "an .npy file"),
        (b"PK\x03\x04", "truncated or damaged"),
        (zip_of_a_future_version(tmp_path / "b.npz"), "truncated or damaged.*version"),
    ):
        path.write_bytes(content)
        refuse(path, IMAGE, message)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_pickled_objects_are_never_loaded(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.npz", x=np.array([{}, {}], dtype=object))
    refuse(tmp_path / "a.npz", IMAGE, "Python objects")
    np.save(tmp_path / "a.npy", np.array([{}, {}], dtype=object))
    refuse(tmp_path / "a.npy", IMAGE, "Python objects")


def header(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize(
    "content", [b"", b"junk" * 99, header("(1000000000000, 3, 8, 6)"), header("(-1, 3, 8, 6)"), header("(2, 3, 8, 6)"), header("'x'")]
)
def test_arrays_that_lie_about_their_size(tmp_path: Path, compression: int, content: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr("x.npy", content)
    refuse(tmp_path / "a.npz", IMAGE, r"cannot use a\.npz")
    (tmp_path / "a.npy").write_bytes(content)
    refuse(tmp_path / "a.npy", IMAGE, r"cannot use a\.npy")


def test_samples_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "MAX_LOAD_BYTES", 1000)
    np.savez_compressed(tmp_path / "a.npz", x=noise(4, 3, 8, 6))
    assert len(read(open_calibration(tmp_path / "a.npz", IMAGE))["x"]) == 4
    np.savez_compressed(tmp_path / "a.npz", x=np.asfortranarray(noise(4, 3, 8, 6)))
    refuse(tmp_path / "a.npz", IMAGE, "in Fortran order, the limit is 1000")
    np.savez_compressed(tmp_path / "a.npz", x=noise(4, 3, 8, 60))
    refuse(tmp_path / "a.npz", IMAGE, "per sample, the limit is 1000")


def damaged(path: Path) -> Iterator[bytes]:
    content = path.read_bytes()
    yield content[: len(content) // 2]
    yield content[:-10]
    middle = len(content) // 2
    yield content[:middle] + bytes(255 - byte for byte in content[middle : middle + 200]) + content[middle + 200 :]


def test_truncated_and_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=noise(40, 3, 8, 6))
    for content in list(damaged(path)):
        path.write_bytes(content)
        refuse(path, IMAGE, r"cannot use a\.npz")
    np.savez(path, x=noise(40, 3, 8, 6))
    path.write_bytes(path.read_bytes()[:9000])
    refuse(path, IMAGE, "truncated or damaged")
    np.save(tmp_path / "a.npy", noise(40, 3, 8, 6))
    data = open_calibration(tmp_path / "a.npy", IMAGE)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
    refuse(tmp_path / "a.npy", IMAGE, "are there")
    with pytest.raises(DataError, match="changed while it was read"):
        list(data.batches(2))


def test_folders_that_do_not_fit(folder: Path) -> None:
    refuse(folder, IMAGE, "needs declared preprocessing.*imagenet, inception, unit, none")
    refuse(folder, IMAGE, "unknown preprocessing.*did you mean 'imagenet'", "imagenett")
    refuse(folder, (ModelInput("x", F32, ("n", 10)),), "does not take images", "unit")
    refuse(folder, (ModelInput("x", I64, ("n", 3, 8, 8)),), "do not fit the type", "unit")
    refuse(folder, (ModelInput("x", F32, ("n", 3, "h", "w")),), "leaves the size of images open.*crop", "unit")
    refuse(folder, (ModelInput("x", F32, ("n", 1, 8, 8)),), "mean has 3 values", "imagenet")
    (folder / "own.yaml").write_text("crop: 7")
    refuse(folder, IMAGE, "crop: 7 differs.*8 x 6", str(folder / "own.yaml"))
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:60])
    refuse(folder, IMAGE, r"cannot read image b\.png", "unit")
    (folder / "b.png").write_text("no image")
    refuse(folder, IMAGE, r"cannot read image b\.png", "unit")


def test_folders_without_images(tmp_path: Path) -> None:
    refuse(tmp_path, IMAGE, r"no images.*\.png, \.jpg", "unit")
    (tmp_path / "class").mkdir()
    refuse(tmp_path, IMAGE, "no images", "unit")


def test_images_of_classes(folder: Path) -> None:
    before = len(open_calibration(folder, IMAGE, preprocess="unit"))
    (folder / "cats").mkdir()
    (folder / "cats" / "a.png").write_bytes((folder / "b.png").read_bytes())
    assert len(open_calibration(folder, IMAGE, preprocess="unit")) == before + 1


def test_hints_that_help(tmp_path: Path) -> None:
    """Images with channels last are not to be reshaped, tokens have no pixels, and an index has to be one of the table's."""
    refuse({"x": np.zeros((2, 8, 6, 3), np.uint8)}, IMAGE, "--preprocess")
    refuse({"x": noise(2, 8, 6, 3)}, IMAGE, r"transpose\(0, 3, 1, 2\)")
    arrays = {"input_ids": np.full((2, 4), 10), "attention_mask": np.ones((2, 4), np.int64), "labels": np.zeros(2)}
    np.savez(tmp_path / "a.npz", **arrays)
    refuse(tmp_path / "a.npz", TEXT, "no images to preprocess", "imagenet")
    assert list(read(open_calibration(tmp_path / "a.npz", TEXT))) == ["input_ids", "attention_mask"]
    limited = (replace(TEXT[0], limit=10), TEXT[1])
    refuse(tmp_path / "a.npz", limited, "(?s)out of range: 10 to 10.*0 to 9")


def test_missing_pillow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    refuse(folder, IMAGE, "needs Pillow.*pip install pillow", "unit")
