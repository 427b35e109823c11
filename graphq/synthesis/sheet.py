"""Images side by side in one PNG: what was synthesized, to look at. The standard library writes it."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from graphq.calibration import CalibrationSet
from graphq.errors import ModelError, UsageError
from graphq.synthesis.inputs import ImageInput, image_input

NAME = "calibration.png"
"""Of the sheet beside a report."""

SHOWN = 64
"""Images on a sheet, at most."""

TILE = 112
"""Smaller images are enlarged by whole factors to about so many pixels a side."""

_GAP = 2


def contact_sheet(images: np.ndarray, image: ImageInput) -> bytes:
    """A PNG of the first images, in rows of up to eight.

    Args:
        images: As the model takes them, `[N, C, H, W]` or `[N, H, W, C]`, as `image` says; 1 or 3 channels.
        image: Whose range of values becomes black to white.
    """
    ordered = images[:SHOWN].astype(np.float32)
    ordered = ordered if image.layout == "NCHW" else ordered.transpose(0, 3, 1, 2)
    pixels = np.clip((ordered - image.low) / (image.high - image.low) * 255 + 0.5, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    factor = max(1, TILE // max(pixels.shape[1:3]))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = pixels.shape
    columns = min(count, 8)
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, channels), 255, np.uint8)
    for index, tile in enumerate(pixels):
        top, left = index // columns * (height + _GAP), index % columns * (width + _GAP)
        sheet[top : top + height, left : left + width] = tile
    return png(sheet)


def put_beside(data: CalibrationSet, folder: str | Path) -> CalibrationSet:
    """Write `NAME` into `folder`, which is made if need be, if `data` are synthesized images: `data` that know of it, or as they are.

    Raises UsageError: the folder cannot be written to.
    """
    if data.synthesis is None:
        return data
    try:
        image = image_input(data.inputs, data.preprocess)
    except ModelError:
        return data
    shown = next(data.batches(min(SHOWN, len(data))))[image.name]
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / NAME).write_bytes(contact_sheet(shown, image))
    except OSError as error:
        where = f"{folder}: {error.strerror}"
        raise UsageError("The contact sheet cannot be written.", where=where, hint="give another --report") from error
    return replace(data, synthesis=replace(data.synthesis, sheet=NAME))


def png(pixels: np.ndarray) -> bytes:
    """uint8 `[H, W, 1]` or `[H, W, 3]` as a PNG file (ISO/IEC 15948): every row with filter 0."""
    height, width, channels = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
                                           for kind, data in chunks)  # fmt: skip
