"""What a kernel must move and compute, how long that takes at least, which targets that meets, and a picture of it. Numbers only: no GPU.

The floor of a time is the larger of bytes over copy bandwidth and operations over matrix rate, both measured on the same GPU in the same
run (Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009). Every operand counts once: what is read again comes on top of the floor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphq.ops_gemm import packed_width

Row = dict[str, Any]
ITEM = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Bytes of an element."""
COLOURS = {
    "w4a16_gemm": "#17c", "w8a8_gemm": "#182", "w4a8_gemm": "#93a", "sulq_softmax": "#c60", "sulq_softmax_codes": "#a33",
    "sulq_attention_value": "#555",
}  # fmt: skip
BODY = {"levels": 16, "codes": 12}
"""Operators of the softmax bodies of `graphq.ops_softmax` that every element goes through, packing left out."""
OURS = "graphq"
"""Name of the kernel among those that are timed for a case; the others are `CUBLAS`, `INT_MM` and so on."""
CUBLAS, INT_MM, FORM = "cuBLAS", "torch._int_mm", "torch softmax, then the body"


@dataclass(frozen=True)
class Work:
    """What one call does.

    Attributes:
        bytes: All operands and the result, once.
        weight_bytes: Of these the packed weight and its scales.
        operations: A multiply-add is two.
        unit: Whose matrix rate is a limit: `float16`, `bfloat16`, `int8`; empty if the operations are not those of matrix units.
    """

    bytes: int
    weight_bytes: int = 0
    operations: int = 0
    unit: str = ""


def w4a16(m: int, k: int, n: int, g: int, dtype: str) -> Work:
    """x [M, K], weight [N, ..], w_scale [K / G, N], bias [N], result [M, N]."""
    weight = n * packed_width(k) + k // g * n * ITEM[dtype]
    return Work(weight + ITEM[dtype] * (m * k + n + m * n), weight, 2 * m * k * n, dtype)


def w8a8(m: int, k: int, n: int, dtype: str) -> Work:
    """x int8 [M, K], weight int8 [N, K], x_scale [], w_scale [N], bias [N], result [M, N]."""
    weight = n * k + 4 * n
    return Work(weight + m * k + 4 + ITEM[dtype] * (n + m * n), weight, 2 * m * k * n, "int8")


def w4a8(m: int, k: int, n: int, g: int, dtype: str) -> Work:
    """x int8 [M, K], weight [N, ..], x_scale [M, 1], w_scale float32 [K / G, N], bias [N], result [M, N]."""
    weight = n * packed_width(k) + k // g * n * 4
    return Work(weight + m * k + 4 * m + ITEM[dtype] * (n + m * n), weight, 2 * m * k * n, "int8")


def softmax(rows: int, columns: int, dtype: str) -> Work:
    """Scores in, levels out, five parameters."""
    return Work(2 * rows * columns * ITEM[dtype] + 20, 0, BODY["levels"] * rows * columns)


def softmax_codes(rows: int, columns: int, dtype: str) -> Work:
    """Scores in, two codes a byte out."""
    return Work(rows * columns * ITEM[dtype] + rows * -(-columns // 2) + 20, 0, BODY["codes"] * rows * columns)


def attention_value(batch: int, rows: int, columns: int, depth: int, dtype: str) -> Work:
    """Codes [B, M, ceil(N / 2)], 16 levels, values [B, N, D], result [B, M, D]."""
    moved = batch * (rows * -(-columns // 2) + ITEM[dtype] * depth * (columns + rows))
    return Work(moved + 64, 0, 2 * batch * rows * columns * depth, dtype)


# ---- against the roofs ----------------------------------------------------------------------------------------------


def floor_s(work: Work, ceilings: Mapping[str, Any]) -> float:
    """Seconds that `work` takes at least. `ceilings` has `copy`, bytes a second, and `matrix`, operations a second by unit."""
    rate = ceilings["matrix"].get(work.unit)
    return max(work.bytes / ceilings["copy"], work.operations / rate if rate else 0.0)


def ridge(unit: str, ceilings: Mapping[str, Any]) -> float:
    """Operations a byte from which the matrix rate of `unit` is the limit."""
    return float(ceilings["matrix"][unit] / ceilings["copy"])


def median_s(row: Row, name: str = OURS) -> float | None:
    """Of the contestant whose name begins so, the fastest if there are several; None where none was timed."""
    found = [times["median_s"] for key, times in row["times"].items() if key.startswith(name)]
    return min(found, default=None)


def ratio(row: Row, name: str) -> float | None:
    """How many times as long as the kernel the contestant takes."""
    ours, theirs = median_s(row), median_s(row, name)
    return theirs / ours if ours and theirs else None


def bandwidth_share(row: Row, moved: int, ceilings: Mapping[str, Any]) -> float | None:
    """`moved` bytes over the time of the kernel, as a share of copy bandwidth."""
    ours = median_s(row)
    return moved / ours / ceilings["copy"] if ours and ceilings else None


# ---- targets --------------------------------------------------------------------------------------------------------


def targets(rows: Sequence[Row], ceilings: Mapping[str, Any]) -> list[Row]:
    """Each target with the value of every case that it speaks of.

    It is missed if a case misses it or its kernel failed, met if every case has a value that meets it; else `met` is None.
    """
    decode = [row for row in rows if row["kernel"] == "w4a16_gemm" and row["sizes"].get("m") == 1 and row["family"] == "llm"]
    half = [row for row in decode if row["dtype"] == "float16"]
    many = [row for row in rows if row["kernel"] == "w8a8_gemm" and row["sizes"].get("m") == 4096]
    levels = [row for row in rows if row["kernel"] == "sulq_softmax"]
    share = "share of copy bandwidth"
    stated = [
        ("w4a16_gemm, M = 1: packed weights and scales a second", share, 0.8, decode,
         lambda row: bandwidth_share(row, row["weight_bytes"], ceilings)),
        ("w4a16_gemm, M = 1: against cuBLAS float16", "times as fast", 3.0, half, lambda row: ratio(row, CUBLAS)),
        ("w8a8_gemm, M = 4096: against the best int8 matmul of torch", "times as fast", 0.85, many, lambda row: ratio(row, INT_MM)),
        ("sulq_softmax: bytes a second", share, 0.85, levels, lambda row: bandwidth_share(row, row["bytes"], ceilings)),
        ("sulq_softmax: against torch softmax followed by the function body", "times as fast", 4.0, levels, lambda row: ratio(row, FORM)),
    ]  # fmt: skip
    out = []
    for what, unit, bar, found, value in stated:
        got = {title(row): value(row) for row in found}
        missed = [title(row) for row in found if failed(row) or (got[title(row)] or math.inf) < bar]
        met = False if missed else True if got and None not in got.values() else None
        out.append({"target": what, "unit": unit, "bar": bar, "values": got, "missed_on": missed, "met": met})
    return out


def failed(row: Row) -> bool:
    """Whether the kernel did not compute what it should."""
    return OURS in row["wrong"] or OURS in row["refused"]


def title(row: Row) -> str:
    """One case in words."""
    sizes = row["sizes"]
    return f"{row['shape']}, {'M = ' + str(sizes['m']) + ', ' if 'm' in sizes else ''}{row['dtype']}"


# ---- the picture ----------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 460, 70, 190, 30, 55


@dataclass(frozen=True)
class _Axes:
    """Decades of the picture; x in operations a byte, y in operations a second."""

    x: tuple[int, int]
    y: tuple[int, int]

    def at(self, intensity: float, rate: float) -> tuple[float, float]:
        across = (math.log10(intensity) - self.x[0]) / (self.x[1] - self.x[0])
        up = (math.log10(rate) - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + (WIDTH - LEFT - RIGHT) * across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up


def points(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """Kernel, operations a byte, operations a second of each case that was timed."""
    return [
        (row["kernel"], row["operations"] / row["bytes"], row["operations"] / seconds)
        for row in rows if (seconds := median_s(row))
    ]  # fmt: skip


def picture(rows: Sequence[Row], ceilings: Mapping[str, Any], caption: str) -> str:
    """The roofline as SVG, both axes logarithmic: roofs as measured, one point a case."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
    parts = [head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', _text(LEFT, 18, caption, anchor="start")]
    found = points(rows)
    if not ceilings.get("matrix") or not found:
        return "\n".join([*parts, _text(WIDTH / 2, HEIGHT / 2, "nothing was timed"), "</svg>", ""])
    highest = max(ceilings["matrix"].values())
    xs, ys = [x for _, x, _ in found] + [ridge(unit, ceilings) for unit in ceilings["matrix"]], [y for *_, y in found]
    axes = _Axes((math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs)))),
                 (math.floor(math.log10(min(ys))), math.ceil(math.log10(highest))))  # fmt: skip
    parts += [*_grid(axes), *_roofs(axes, ceilings)]
    for kernel, x, y in found:
        px, py = axes.at(x, y)
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{COLOURS[kernel]}" fill-opacity="0.7"/>')
    for index, kernel in enumerate(dict.fromkeys(name for name, *_ in found)):
        y = HEIGHT - BOTTOM - 14 - 18 * index
        parts.append(f'<circle cx="{WIDTH - RIGHT + 24}" cy="{y - 4}" r="3.5" fill="{COLOURS[kernel]}"/>')
        parts.append(_text(WIDTH - RIGHT + 34, y, kernel, anchor="start", colour=COLOURS[kernel]))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, words: str, anchor: str = "middle", colour: str = "black", turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    escaped = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{turn}>{escaped}</text>'


def _line(start: tuple[float, float], end: tuple[float, float], style: str) -> str:
    return f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" {style}/>'


def _grid(axes: _Axes) -> Iterator[str]:
    (left, right), (low, high) = axes.x, axes.y
    for decade in range(left, right + 1):
        bottom = axes.at(10.0**decade, 10.0**low)
        yield _line(bottom, axes.at(10.0**decade, 10.0**high), 'stroke="#ddd"')
        yield _text(bottom[0], bottom[1] + 18, f"{10.0**decade:g}")
    for decade in range(low, high + 1):
        start = axes.at(10.0**left, 10.0**decade)
        yield _line(start, axes.at(10.0**right, 10.0**decade), 'stroke="#ddd"')
        yield _text(start[0] - 8, start[1] + 4, f"{10.0 ** (decade - 12):g}", anchor="end")
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 15, "operations a byte")
    yield _text(20, (TOP + HEIGHT - BOTTOM) / 2, "10^12 operations a second", turned=True)


def _roofs(axes: _Axes, ceilings: Mapping[str, Any]) -> Iterator[str]:
    """One line up to the highest matrix rate, and a level one for each unit; labels keep apart where rates are alike."""
    copy, matrix = ceilings["copy"], ceilings["matrix"]
    left, right = 10.0 ** axes.x[0], 10.0 ** axes.x[1]
    first = max(left, 10.0 ** axes.y[0] / copy)
    top = max(matrix.values())
    yield _line(axes.at(first, first * copy), axes.at(min(right, top / copy), min(right * copy, top)), 'stroke="#c00" stroke-width="1.5"')
    middle = axes.at(math.sqrt(first * min(right, top / copy)), math.sqrt(first * min(right, top / copy)) * copy)
    yield _text(middle[0] - 8, middle[1] - 8, f"copy {copy / 1e12:.2f} TB/s", anchor="end", colour="#c00")
    above = -math.inf
    for unit, rate in sorted(matrix.items(), key=lambda item: -item[1]):
        start, end = axes.at(rate / copy, rate), axes.at(right, rate)
        above = max(end[1], above + 15)
        yield _line(start, end, 'stroke="#c00" stroke-width="1.5"')
        yield _text(end[0] + 8, above + 4, f"{unit} {rate / 1e12:.0f}e12/s", anchor="start", colour="#c00")
