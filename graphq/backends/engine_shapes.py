"""Which sizes an engine is built for: the optimization profile, from what was asked, and from the data for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from graphq.engines import AxisRange, shape_text
from graphq.errors import UsageError

Shape = tuple[int, ...]

BATCH: AxisRange = (1, 8, 32)
"""Samples at once, where the batch is open and nothing was asked: fewest, best, most."""

LEAST = 1
"""Smallest size of any other open axis; its best and its largest are the size of the data. Where the builder finds that the model
cannot run at this size (an image smaller than a kernel), the smallest is the size of the data too."""


@dataclass(frozen=True)
class Input:
    """An input of a network; an open axis has the size -1, and maybe a symbol."""

    name: str
    shape: Shape
    symbols: tuple[str | None, ...]

    @property
    def text(self) -> str:
        return f"{self.name}={'x'.join('?' if size == -1 else str(size) for size in self.shape)}"


@dataclass(frozen=True)
class Profile:
    """Ranges of the inputs that have open axes.

    Attributes:
        shapes: Range of each axis by input.
        capped: Open axes other than the batch that nobody asked for, as `input axis 1 (past)`: they end at the size of the data.
    """

    shapes: Mapping[str, tuple[AxisRange, ...]]
    capped: tuple[str, ...]


def profile(inputs: Sequence[Input], seen: Mapping[str, Shape], asked: Mapping[str, Sequence[AxisRange]], least: int | None) -> Profile:
    """Ranges for `inputs`: what is asked for an axis goes for all of its symbol.

    Args:
        seen: Shape of one sample or batch by input.
        asked: Range of each axis by input name.
        least: As `LEAST`; None for the size of the data.

    Raises:
        UsageError: what is asked fits no input, or gives one symbol two ranges.
    """
    known = {entry.name: entry for entry in inputs}
    for name, axes in asked.items():
        if reason := _misfit(known.get(name), axes):
            raise UsageError(
                f"A shape does not fit the model: {reason}.", where=f"{name}={shape_text(axes)}",
                expected=f"{', '.join(entry.text for entry in inputs)}, with fewest:best:most for each ?",
            )  # fmt: skip
    batches = {entry.symbols[0] for entry in inputs if entry.shape[:1] == (-1,)} - {None, ""}
    symbols = dict[str, AxisRange]()
    for entry, axis, symbol in _open_axes(inputs):
        if entry.name in asked:
            wanted = asked[entry.name][axis]
            key = _BATCH if axis == 0 or symbol in batches else symbol
            if key and symbols.setdefault(key, wanted) != wanted:
                raise UsageError(
                    f"Axis {symbol or 'of the batch'!r} is asked for in two ranges.", where=f"input {entry.name!r}: {shape_text([wanted])}",
                    expected=f"{shape_text([symbols[key]])} wherever it stands",
                )  # fmt: skip
    capped = []

    def axis_range(entry: Input, axis: int, symbol: str | None) -> AxisRange:
        if entry.name in asked:
            return asked[entry.name][axis]
        if axis == 0 or symbol in batches:
            return symbols.get(_BATCH, BATCH)
        if symbol and symbol in symbols:
            return symbols[symbol]
        capped.append(f"{entry.name} axis {axis}{f' ({symbol})' if symbol else ''}")
        most = seen[entry.name][axis]
        return (most if least is None else min(least, most)), most, most

    ranges = {entry.name: [(size, size, size) for size in entry.shape] for entry in inputs if -1 in entry.shape}
    for entry, axis, symbol in _open_axes(inputs):
        ranges[entry.name][axis] = axis_range(entry, axis, symbol)
    return Profile({name: tuple(axes) for name, axes in ranges.items()}, tuple(capped))


_BATCH = "\N{NULL}batch"
"""Key of the batch among the symbols, none of which can be this."""


def _open_axes(inputs: Sequence[Input]) -> Iterator[tuple[Input, int, str | None]]:
    for entry in inputs:
        yield from ((entry, axis, entry.symbols[axis]) for axis, size in enumerate(entry.shape) if size == -1)


def _misfit(entry: Input | None, axes: Sequence[AxisRange]) -> str | None:
    """Why `axes` are no range for an input."""
    if entry is None:
        return "there is no such input"
    if len(axes) != len(entry.shape):
        return f"it has {len(entry.shape)} axes, not {len(axes)}"
    for axis, ((low, best, high), size) in enumerate(zip(axes, entry.shape, strict=True)):
        if not 0 <= low <= best <= high or high == 0:
            return f"axis {axis} is not in the order fewest:best:most"
        if size != -1 and not low == high == size:
            return f"axis {axis} is fixed to {size}"
    return None
