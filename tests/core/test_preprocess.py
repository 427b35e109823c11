"""Declared preprocessing: values against numpy, files, and what must be refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from graphq.errors import DataError
from graphq.preprocess import PRESETS, Preprocess, describe, image_shape, resolve_preprocess
from graphq.spec import ModelInput

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)


def test_presets_have_the_published_values() -> None:
    x = PIXELS.astype(np.float64).transpose(0, 3, 1, 2)
    mean = np.array([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    std = np.array([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    expected = {
        "imagenet": (x / 255 - mean) / std,
        "inception": x / 127.5 - 1,
        "unit": x / 255,
        "none": x,
    }
    assert set(expected) == set(PRESETS)
    for name, values in expected.items():
        result = resolve_preprocess(name).apply(PIXELS)
        assert result.dtype == np.float32 and result.shape == (2, 3, 5, 4) and result.flags.c_contiguous
        np.testing.assert_allclose(result, values, rtol=1e-5, atol=2e-6)
        assert describe(PRESETS[name]) == name


def test_layout_and_channel_order() -> None:
    kept = Preprocess(scale=1.0, layout="NHWC").apply(PIXELS)
    np.testing.assert_array_equal(kept, PIXELS.astype(np.float32))
    swapped = Preprocess(scale=1.0, mean=(1.0, 2.0, 3.0), channels="BGR").apply(PIXELS)
    np.testing.assert_array_equal(swapped[:, 0], PIXELS[..., 2].astype(np.float32) - 1)
    np.testing.assert_array_equal(swapped[:, 2], PIXELS[..., 0].astype(np.float32) - 3)


def test_apply_refuses_what_is_not_pixels() -> None:
    with pytest.raises(DataError, match="float32 pixels"):
        PRESETS["unit"].apply(PIXELS.astype(np.float32))
    with pytest.raises(DataError, match="shape"):
        PRESETS["unit"].apply(PIXELS[0])
    with pytest.raises(DataError, match=r"mean has 3 values, the images have 1 channel"):
        PRESETS["imagenet"].apply(PIXELS[..., :1])


def test_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mean: [0.1, 0.2, 0.3]\nstd: [1e-1, 0.5, 1]\nresize: 256\ncrop: 224\nlayout: NHWC\nchannels: BGR\n")
    expected = Preprocess((0.1, 0.2, 0.3), (0.1, 0.5, 1.0), resize=256, crop=224, layout="NHWC", channels="BGR")
    assert resolve_preprocess(path) == resolve_preprocess(str(path)) == expected
    assert describe(expected) == "custom"
    assert resolve_preprocess(expected) is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("meen: [0.5]", r"meen(.|\n)*did you mean 'mean'"),
        ("std: [0]", "std.0"),
        ("mean: [.nan]", "mean.0"),
        ("mean: []", "mean"),
        ("crop: -1", "crop"),
        ("crop: 1000000000", "crop"),
        ("layout: CHWN", "layout"),
        ("1: 2", "1"),
        ("- a\n- b", "not a table"),
        ("", "not a table"),
        ("mean: [1", "not YAML"),
        ("mean: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_wrong_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        resolve_preprocess(path)
    assert str(path) in str(error.value)


def test_yaml_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        resolve_preprocess(tmp_path / "none-such.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match="not YAML"):
        resolve_preprocess(tmp_path / "binary.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(DataError, match="too large"):
        resolve_preprocess(tmp_path / "large.yaml")


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match="imagenet, inception, unit, none") as error:
        resolve_preprocess("imagnet")
    assert "did you mean 'imagenet'" in str(error.value)


@pytest.mark.parametrize("preprocess", [*PRESETS.values(), Preprocess(resize=7, crop=5, layout="NHWC", channels="BGR")])
def test_json_gives_back_the_same_value(preprocess: Preprocess) -> None:
    assert Preprocess.from_json(preprocess.to_json()) == preprocess


@pytest.mark.parametrize("text", ["", "[]", "{", json.dumps({"mean": "x"}), json.dumps({"eval": "1"}), "[" * 100_000])
def test_wrong_json_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"graphq\.preprocess"):
        Preprocess.from_json(text)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (("n", 3, 224, 200), ("NCHW", 224, 200, 3)),
        (("n", 224, 200, 3), ("NHWC", 224, 200, 3)),
        (("n", 1, "h", None), ("NCHW", None, None, 1)),
        ((None, None, None, None), ("NCHW", None, None, 3)),
        (("n", "c", 32, 32), ("NCHW", 32, 32, 3)),
    ],
)
def test_image_shape_follows_the_model(shape: tuple[int | str | None, ...], expected: tuple[object, ...]) -> None:
    assert image_shape(ModelInput("x", np.dtype(np.float32), shape), Preprocess()) == expected


@pytest.mark.parametrize("shape", [None, ("n", 3), ("n", 4, 32, 32), ("n", 4, "h", "w")])
def test_image_shape_refuses_other_inputs(shape: tuple[int | str | None, ...] | None) -> None:
    with pytest.raises(DataError, match="input 'x'"):
        image_shape(ModelInput("x", np.dtype(np.float32), shape), Preprocess())


def test_declared_layout_must_fit_the_model() -> None:
    with pytest.raises(DataError, match=r"layout NHWC(.|\n)*set `layout: NCHW`"):
        image_shape(ModelInput("x", np.dtype(np.float32), ("n", 3, 8, 8)), Preprocess(layout="NHWC"))


def test_image_is_resized_and_cropped_around_its_centre(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = (10, 20, 30)  # the centre square
    image.fromarray(pixels).save(tmp_path / "wide.png")
    same_size = Preprocess().load(tmp_path / "wide.png", 40, 40, 3)
    np.testing.assert_array_equal(same_size, pixels[:, 20:60])
    smaller = Preprocess(crop_fraction=0.5).load(tmp_path / "wide.png", 10, 10, 3)
    assert smaller.shape == (10, 10, 3) and (smaller == (10, 20, 30)).all()
    assert Preprocess(resize=20).load(tmp_path / "wide.png", 16, 30, 1).shape == (16, 30, 1)
    with pytest.raises(DataError, match="smaller than the crop"):
        Preprocess(resize=8).load(tmp_path / "wide.png", 10, 10, 3)
    assert PRESETS["imagenet"]._resized(500, 375, 224, 224) == (341, 256)


def test_image_that_declares_too_many_pixels_is_refused(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("1", (9_000, 9_000)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match=r"bomb\.png(.|\n)*limit"):
        Preprocess().load(tmp_path / "bomb.png", 8, 8, 3)
