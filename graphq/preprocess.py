"""How pixels become a model's input: declared preprocessing as a value, checked, stored and applied in one place.

`y = (x * scale - mean) / std`, per channel, with `x` a uint8 pixel. Pillow is imported on first use only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pydantic
import yaml
from pydantic import ConfigDict, Field

from graphq.errors import DataError
from graphq.names import did_you_mean
from graphq.spec import ModelInput

METADATA_KEY = "graphq.preprocess"
"""Key of a model's metadata under which `Preprocess.to_json` is stored."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

MAX_FILE_BYTES = 1 << 20
"""A preprocessing file larger than this is refused unread."""

MAX_PIXELS = 80_000_000
"""An image that declares more pixels than this is refused before it is decoded."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Side = Annotated[int, Field(gt=0, le=16384)]
Layout = Literal["NCHW", "NHWC"]


class ImageShape(NamedTuple):
    """What an image input looks like; a side that the model leaves open is None."""

    layout: Layout
    height: int | None
    width: int | None
    channels: int


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Preprocess:
    """Declared preprocessing of images.

    Attributes:
        mean: Subtracted after scaling; one value, or one per channel in the order that the model sees.
        std: Divisor after that; one value, or one per channel in the order that the model sees.
        scale: Factor on the pixel, 0 to 255.
        resize: Shorter side after resizing, before the crop. None: as `crop_fraction` says.
        crop: Height and width of the centre crop. None: the model's own height and width.
        crop_fraction: Part of the resized image that the crop keeps if `resize` is None (0.875: 224 of 256).
        layout: Axes of the result. None: those of the model's input where known, else NCHW.
        channels: Order of colours that the model sees; files and uint8 arrays are RGB.
    """

    mean: Annotated[tuple[Number, ...], Field(min_length=1, max_length=3)] = (0.0,)
    std: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=3)] = (1.0,)
    scale: Positive = 1 / 255
    resize: Side | None = None
    crop: Side | None = None
    crop_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    layout: Layout | None = None
    channels: Literal["RGB", "BGR"] = "RGB"

    @property
    def is_identity(self) -> bool:
        """Whether pixels keep their values, 0 to 255."""
        return self.scale == 1.0 and set(self.mean) == {0.0} and set(self.std) == {1.0}

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """RGB or grey pixels, uint8 `[N, H, W, C]`, to float32 `[N, C, H, W]`, or same axes if `layout` is NHWC."""
        if pixels.dtype != np.uint8 or pixels.ndim != 4:
            raise DataError(
                f"preprocessing got {pixels.dtype} pixels of shape {list(pixels.shape)}",
                expected="uint8 of shape [samples, height, width, channels]",
                hint="give float arrays of the model's own type and shape to use them without preprocessing",
            )
        self.check_channels(pixels.shape[-1])
        ordered = pixels[..., ::-1] if self.channels == "BGR" else pixels
        result = ordered.astype(np.float32)
        result *= np.float32(self.scale)
        result -= np.asarray(self.mean, np.float32)
        result /= np.asarray(self.std, np.float32)
        return result if self.layout == "NHWC" else np.ascontiguousarray(result.transpose(0, 3, 1, 2))

    def check_channels(self, count: int) -> None:
        """Refuse images of `count` channels if mean or std are declared for another number of them."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, count):
                raise DataError(
                    f"the preprocessing's {name} has {len(values)} values, the images have {count} channel(s)",
                    where=f"{name}: {list(values)}",
                    expected=f"1 value or {count}",
                    hint="choose another preset or give a YAML file with `mean` and `std` for these channels",
                )

    def load(self, path: Path, height: int, width: int, channels: int) -> np.ndarray:
        """Read an image, resize it (bilinear), crop its centre: uint8 `[height, width, channels]`, RGB or grey."""
        image_module = _pillow()
        try:
            with image_module.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels; the limit is {MAX_PIXELS}")
                colour = image.convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError, SyntaxError, EOFError, image_module.DecompressionBombError) as error:
            raise DataError(
                f"cannot read image {path.name}: {error}",
                where=str(path),
                expected="a complete png, jpg, bmp or webp file",
                hint="remove the file from the folder, or replace it",
            ) from error
        size = self._resized(colour.width, colour.height, height, width)
        if size[0] < width or size[1] < height:
            raise DataError(
                f"resize: {self.resize} makes image {path.name} smaller than the crop",
                where=f"{path}: {size[1]} x {size[0]} after resizing, the crop is {height} x {width}",
                expected=f"resize of at least {max(height, width)}",
                hint="raise `resize`, or leave it out",
            )
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        resized = colour if size == colour.size else colour.resize(size, image_module.Resampling.BILINEAR)
        cropped = resized.crop((left, top, left + width, top + height))
        return np.asarray(cropped, np.uint8).reshape(height, width, channels)

    def _resized(self, old_width: int, old_height: int, height: int, width: int) -> tuple[int, int]:
        """Width and height after resizing: the aspect ratio is kept, no side falls short of the crop by rounding."""
        if self.resize is not None:
            factor = self.resize / min(old_width, old_height)
            return round(old_width * factor), round(old_height * factor)
        factor = max(width / old_width, height / old_height) / self.crop_fraction
        return max(width, round(old_width * factor)), max(height, round(old_height * factor))

    def to_json(self) -> str:
        """JSON text for a model's metadata, key `METADATA_KEY`."""
        return _ADAPTER.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Preprocess:
        """The value that `to_json` wrote; anything else is refused."""
        where = f"metadata {METADATA_KEY}"
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError("the stored preprocessing is not JSON", where=where, hint="give --preprocess") from error
        return _from_fields(fields, where)


_ADAPTER = pydantic.TypeAdapter(Preprocess)

PRESETS: Mapping[str, Preprocess] = {
    "imagenet": Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_fraction=0.875),
    "inception": Preprocess(mean=(0.5,), std=(0.5,), crop_fraction=0.875),
    "unit": Preprocess(),
    "none": Preprocess(scale=1.0),
}


def resolve_preprocess(name_or_path: str | Path | Preprocess) -> Preprocess:
    """The preset of that name, or the content of that YAML file."""
    if isinstance(name_or_path, Preprocess):
        return name_or_path
    path = Path(name_or_path)
    if str(name_or_path) in PRESETS:
        return PRESETS[str(name_or_path)]
    if path.suffix.lower() in (".yaml", ".yml") or path.is_file():
        return _load_yaml(path)
    raise DataError(
        f"unknown preprocessing '{name_or_path}'",
        expected=f"one of {', '.join(PRESETS)}, or a YAML file",
        hint=did_you_mean(str(name_or_path), PRESETS) or "write a file with `mean`, `std`, `scale`, `resize`, `crop`",
    )


def declared_preprocess(stored: Mapping[str, str], given: str | Path | Preprocess | None) -> Preprocess | None:
    """What was `given`, or what is `stored` in a model's metadata, or None."""
    if given is not None:
        return resolve_preprocess(given)
    return Preprocess.from_json(stored[METADATA_KEY]) if METADATA_KEY in stored else None


def describe(preprocess: Preprocess) -> str:
    """The preset's name, or `custom`."""
    return next((name for name, preset in PRESETS.items() if preset == preprocess), "custom")


def image_shape(model_input: ModelInput, preprocess: Preprocess) -> ImageShape:
    """How images must look for this input, or a `DataError` if it does not take images.

    The channel axis is the one of size 1 or 3; if both or neither are, `preprocess.layout` decides, or else NCHW.
    """
    shape, where = model_input.shape, f"input '{model_input.name}' of shape {format_shape(model_input.shape)}"
    if shape is None or len(shape) != 4:
        raise DataError("the model's input does not take images", where=where, expected="4 dimensions", hint="give an npz")
    fitting = [layout for layout, axis in (("NCHW", 1), ("NHWC", 3)) if shape[axis] in (1, 3)]
    if not fitting and not isinstance(shape[1], int):
        fitting = ["NCHW"] if isinstance(shape[3], int) else ["NCHW", "NHWC"]
    layout: Layout = preprocess.layout or ("NCHW" if "NCHW" in fitting or not fitting else "NHWC")
    if layout not in fitting:
        raise DataError(
            f"the model's input does not take images in layout {layout}",
            where=where,
            expected=f"1 or 3 channels on axis {1 if layout == 'NCHW' else 3}",
            hint=f"set `layout: {fitting[0]}` in the preprocessing" if fitting else "give an npz of ready inputs",
        )
    channels, height, width = (shape[axis] for axis in ((1, 2, 3) if layout == "NCHW" else (3, 1, 2)))
    count = channels if isinstance(channels, int) else 3
    preprocess.check_channels(count)
    sides = [side if isinstance(side, int) else None for side in (height, width)]
    return ImageShape(layout, sides[0], sides[1], count)


@dataclass(frozen=True)
class ImageFiles:
    """Image files as an array of pixels, uint8 `[files, height, width, channels]`, decoded when read."""

    paths: tuple[Path, ...]
    preprocess: Preprocess
    size: tuple[int, int, int]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.paths), *self.size)

    def stream(self, bounds: Iterable[tuple[int, int]]) -> Iterator[np.ndarray]:
        for first, last in bounds:
            yield np.stack([self.preprocess.load(path, *self.size) for path in self.paths[first:last]])


def open_images(folder: Path, model_input: ModelInput, preprocess: Preprocess | None) -> ImageFiles:
    """The images of a folder and of those in it (classes, say) by path, for this input; none is read yet."""
    paths = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()))
    if not paths:
        raise DataError("the folder has no images", where=str(folder), expected=f"files {', '.join(IMAGE_SUFFIXES)}",
                        hint="give another folder, or an npz")  # fmt: skip
    if preprocess is None:
        hint = "give the preprocessing that the model was trained with: --preprocess NAME"
        expected = f"one of {', '.join(PRESETS)}, or a YAML file"
        raise DataError("a folder of images needs declared preprocessing", where=str(folder), expected=expected, hint=hint)
    where = f"input '{model_input.name}': {model_input.dtype} {format_shape(model_input.shape)}"
    if not np.issubdtype(model_input.dtype, np.floating) and not (model_input.dtype == np.uint8 and preprocess.is_identity):
        expected = "a float input, or a uint8 input and preprocessing `none`"
        raise DataError("images do not fit the type of the model's input", where=where, expected=expected, hint="give an npz")
    _, height, width, channels = image_shape(model_input, preprocess)
    crop = preprocess.crop
    if any(crop and side and crop != side for side in (height, width)):
        hint = "leave `crop` out to use the model's size"
        raise DataError(f"crop: {crop} differs from the model's input", where=where, expected=f"{height} x {width}", hint=hint)
    height, width = height or crop, width or crop
    if height is None or width is None:
        hint = "write a YAML file with `crop: 224`, or the side that the model was trained with"
        raise DataError("the model leaves the size of images open", where=where, expected="`crop` in the preprocessing", hint=hint)
    _pillow()
    return ImageFiles(paths, preprocess, (height, width, channels))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "reading image files needs Pillow, which is not installed",
            expected="the Python package `pillow`",
            hint="pip install pillow, or convert the images to an npz of arrays",
        ) from error
    return Image


def _load_yaml(path: Path) -> Preprocess:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError("the preprocessing file is too large", where=str(path), expected=f"at most {MAX_FILE_BYTES} bytes")
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"cannot read the preprocessing file: {error.strerror}",
            where=str(path),
            expected=f"a YAML file, or one of {', '.join(PRESETS)}",
            hint=did_you_mean(path.stem, PRESETS) or "check the path",
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"the preprocessing file is not YAML: {error}", where=str(path), hint="check its indentation") from error
    return _from_fields(fields, str(path))


def _from_fields(fields: object, where: str) -> Preprocess:
    known = list(Preprocess.__dataclass_fields__)
    if not isinstance(fields, dict):
        raise DataError("the preprocessing is not a table of options", where=where, expected=f"keys of {', '.join(known)}")
    try:
        return _ADAPTER.validate_python(fields)
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        rows = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems[:5]]
        unknown = [str(key) for key in fields if key not in known]
        hint = next(filter(None, (did_you_mean(key, known) for key in unknown)), "")
        raise DataError(
            f"wrong preprocessing: {'; '.join(rows)}", where=where, expected=f"keys of {', '.join(known)}", hint=hint
        ) from error


def format_shape(shape: tuple[int | str | None, ...] | None) -> str:
    """`[batch, 3, ?, 224]`, or `unknown`."""
    return "unknown" if shape is None else "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"
