"""The image input of a model: its axes, its size, and the values that images may have there. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphq.errors import DataError, ModelError
from graphq.preprocess import Layout, Preprocess, format_shape, image_shape
from graphq.spec import ModelInput

WIDEST = 2.5
"""Values lie within plus and minus this where no preprocessing is declared: those of 99 % of standard normal numbers."""

SIDE = 224
"""Height and width where the model leaves them open."""


@dataclass(frozen=True)
class ImageInput:
    """The image input of a model.

    Attributes:
        size: Channels, height, width.
        low, high: Least and largest value of each channel, float32 `[channels, 1, 1]`.
    """

    name: str
    dtype: np.dtype
    layout: Layout
    size: tuple[int, int, int]
    low: np.ndarray
    high: np.ndarray

    @property
    def span(self) -> float:
        """From the least to the greatest value, mean over channels."""
        return float((self.high - self.low).mean())

    def arrays(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Images `[B, C, H, W]` as calibration data, of the model's own type and order of axes."""
        ordered = images if self.layout == "NCHW" else images.transpose(0, 2, 3, 1)
        return {self.name: np.ascontiguousarray(ordered.astype(self.dtype))}


def image_input(inputs: Sequence[ModelInput], preprocess: Preprocess | None = None) -> ImageInput:
    """The image input among the `inputs` of a model, if there is no other. Raises ModelError if it is not such a model."""
    if len(inputs) != 1 or inputs[0].dtype.kind != "f":
        found = ", ".join(f"{one.name} {one.dtype}{format_shape(one.shape)}" for one in inputs)
        raise ModelError("The model does not take float images alone.", where=f"inputs {found}", expected="one float input of rank 4")
    try:
        shape = image_shape(inputs[0], preprocess or Preprocess())
    except DataError as error:
        raise ModelError("The model does not take images.", where=error.where, expected=error.expected) from error
    bounds = [np.full((shape.channels, 1, 1), bound, np.float32) for bound in (-WIDEST, WIDEST)]
    if preprocess is not None:
        black_white = np.zeros((2, 1, 1, shape.channels), np.uint8)
        black_white[1] = 255
        bounds = list(preprocess.apply(black_white).reshape(2, shape.channels, 1, 1))
    size = (shape.channels, shape.height or SIDE, shape.width or SIDE)
    return ImageInput(inputs[0].name, inputs[0].dtype, shape.layout, size, bounds[0], bounds[1])
