"""What the command line prints: the summary of a conversion, tables, progress bars. Only the standard library and rich.

Names come from models and recipes of unknown origin: nothing in them is taken for markup or reaches the terminal as a control
character.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from graphq.bench_result import BenchResult, Row
    from graphq.engines import EngineFacts
    from graphq.inspect import Inspection
    from graphq.kernels_used import KernelsUsed
    from graphq.report import OutputComparison, Report
    from graphq.sensitivity import Sensitivity

SHOWN = 5
"""Lines about single nodes, at most."""

PLAIN_WIDTH = 140
"""Columns where there is no terminal."""

Column = str | tuple[str, Literal["left", "right"]]


def safe(text: object) -> str:
    """`text` without control characters, except line breaks."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in str(text))


def say(text: object = "", *, style: str = "", stderr: bool = False) -> None:
    console = _console(stderr)
    console.print(Text(safe(text), style=style), soft_wrap=True)


def _console(stderr: bool = False) -> Console:
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=None if terminal else PLAIN_WIDTH)


def table(columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under a line of headings; a column is a heading, or (heading, alignment)."""
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        heading, align = (column, "left") if isinstance(column, str) else column
        grid.add_column(heading, justify=align, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        grid.add_row(*(Text(safe(cell)) for cell in row))
    _console().print(grid)


@contextmanager
def progress_bar(enabled: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A `graphq.pipeline.Progress` that shows the current stage with its estimate on stderr, if that is a terminal."""
    if not enabled or not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), *times)
    with Progress(*columns, console=_console(stderr=True), transient=True) as bar:
        task = bar.add_task("start", total=None)
        current = ""

        def show(what: str, done: int, total: int) -> None:
            nonlocal current
            stage = what.partition(":")[0]  # behind it stands how it goes, such as a loss
            if stage != current:
                bar.reset(task)
                current = stage
            bar.update(task, description=safe(what), completed=done, total=total)

        yield show


# ---- formats --------------------------------------------------------------------------------------------------------


def size(count: float) -> str:
    """Bytes with a decimal unit, as file managers show them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def three_digits(value: float | None) -> str:
    """A positive number with three digits, or with all those before the point."""
    if value is None:
        return "-"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{three_digits(value)} ms"


def factor(value: float | None) -> str:
    return f"{value:.2f}" if value is not None and value >= 0.1 else three_digits(value)


def mebibytes(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} MiB"


def decibel(value: float) -> str:
    return "identical" if value == float("inf") else f"{value:.1f} dB"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def shape(dims: Sequence[Any] | None) -> str:
    return "unknown rank" if dims is None else "[" + ", ".join("?" if dim is None else str(dim) for dim in dims) + "]"


def counts(found: Any) -> str:
    return ", ".join(f"{count} {name}" for name, count in found.items())


# ---- summaries ------------------------------------------------------------------------------------------------------


def summary(report: Report, folder: object = None) -> None:
    """The table that ends a conversion."""
    say(f"{report.model.path} -> {report.output.path}  ({report.recipe_name} for {report.target})", style="bold")
    table(("", ("before", "right"), ("after", "right"), ""), _before_after(report))
    comparisons(report.comparison, report.held_out)
    if report.quantized:
        say(f"quantized: {counts(report.quantized)}; their weights {size(report.weight_bytes_before)} -> {size(report.weight_bytes_after)}")
    for kind, kernels in report.kernels.items():
        say(f"{kind} kernels: {counts(kernels)}")
    if report.engine is not None:
        _engine(report.engine)
    _left_alone(report)
    for gate in report.gates:
        verdict, style = ("passed", "") if gate.passed else ("MISSED", "red")
        say(f"gate {gate.name} {gate.limit:.4g}: {gate.value:.4g}, {verdict}", style=style)
    say(f"{'calibrated' if report.calibration.used else 'verified'} on {report.calibration.description}")
    for note in report.notes:
        say(f"Note: {note}", style="bold yellow")
    if folder is not None:
        say(f"report: {folder}")


def provenance(report: Report) -> None:
    """What `graphq report` prints."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    when = f" on {report.created}" if report.created else ""
    say(f"made by graphq {report.graphq}{when}, seed {report.seed}; {versions}")
    summary(report)
    rows = []
    for one in report.passes:
        options = ", ".join(f"{key}: {value}" for key, value in one.options.items())
        rows.append((one.name, options, counts(one.edits), f"{one.seconds:.2f} s" if one.seconds else ""))
    table(("pass", "options", "edits", ("time", "right")), rows)
    say(f"recipe:\n{report.recipe.rstrip()}")


def _before_after(report: Report) -> Iterator[tuple[str, str, str, str]]:
    old, new = report.model.bytes, report.output.bytes
    yield "size", size(old), size(new), _times(old / new, "smaller", "LARGER") if new else ""
    if report.output.opset != report.model.opset:
        yield "opset", str(report.model.opset), str(report.output.opset), ""
    if (accuracy := report.accuracy) is not None:
        change = 100 * (accuracy.result - accuracy.reference)
        judged = f"{accuracy.samples} samples" if accuracy.tokens is None else f"{accuracy.tokens} tokens"
        yield f"{accuracy.metric} on {judged}", share(accuracy.reference), share(accuracy.result), f"{change:+.2f} points"
        if (ratio := accuracy.perplexity_ratio) is not None:
            before, after = accuracy.reference_perplexity, accuracy.result_perplexity
            yield "perplexity", f"{before:.3f}", f"{after:.3f}", f"{ratio:.4f} times"
    if (latency := report.latency) is not None:
        what = f"latency, batch {latency.batch}" + (f", {latency.threads} threads" if latency.threads else "")
        yield what, f"{latency.reference_ms:.2f} ms", f"{latency.result_ms:.2f} ms", _times(latency.speedup, "faster", "SLOWER")


def _times(ratio: float, better: str, worse: str) -> str:
    if 0.99 < ratio < 1.01:
        return "the same"
    return f"{ratio:.2f} times {better}" if ratio > 1 else f"{1 / ratio:.2f} times {worse}"


def comparisons(found: Sequence[OutputComparison], samples: int = 0) -> None:
    rows = [(one.name, decibel(one.sqnr_db), f"{one.cosine:.6f}", f"{one.max_abs:.4g}", share(one.top1_agreement)) for one in found]
    if rows:
        right: tuple[Column, ...] = tuple((name, "right") for name in ("SQNR", "cosine", "largest error", "same top-1"))
        table((f"on {samples} samples" if samples else "compared with the original", *right), rows)


def _engine(found: EngineFacts) -> None:
    """What the builder made of the linear nodes, and which sizes it built for."""
    from graphq.engines import shape_text

    say(f"engine: {found.layers} layers; linear nodes by operand types: {counts(found.counts) or 'unknown'}")
    for name, axes in found.shapes.items():
        say(f"  takes {name}={shape_text(axes)}  (fewest:best:most)")
    lost = [node for node in found.nodes if node.is_lost]
    for node in lost[:SHOWN]:
        say(f"  {node.node} asked for {node.asked} and got {node.got}, in {node.layer}", style="yellow")
    if len(lost) > SHOWN:
        say(f"  and {len(lost) - SHOWN} more; the report names them", style="yellow")
    for name, value in found.sqnr_db.items():
        say(f"  run here: output {name} is {decibel(value)} from the model it was built from")
    if found.options.sparse:
        picked = "not known here, they are picked where the engine is loaded" if found.sparse_kernels is None else found.sparse_kernels
        say(f"  kernels for 2:4 sparse weights: {picked}")


def _left_alone(report: Report, limit: int = 3) -> None:
    """The most frequent reasons of passes for not touching a node, with the nodes that have them; once for passes that say the same."""
    told: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for record in report.passes:
        told.setdefault(tuple(dict.fromkeys(map(tuple, record.skipped))), []).append(record.name)  # type: ignore[arg-type]
    for skipped, names in told.items():
        if not skipped:
            continue
        reasons = Counter(reason for _, reason in skipped).most_common()
        say(f"{', '.join(dict.fromkeys(names))} left {len(skipped)} alone:")
        for reason, count in reasons[:limit]:
            nodes = [node for node, why in skipped if why == reason]
            say(f"  {count} x {reason}: {'; '.join(nodes[:2])}{'; ...' if count > 2 else ''}")
        if len(reasons) > limit:
            say(f"  {sum(count for _, count in reasons[limit:])} x other reasons, see the report")


def inspection(found: Inspection, used: KernelsUsed | None = None, *, layers: bool = False) -> None:
    """What `graphq inspect` prints."""
    file = found.file
    produced = f", made by {found.producer}" if found.producer else ""
    facts = f"{size(file.bytes)}, {file.parameters:,} parameters, opset {file.opset}, IR version {found.ir_version}"
    say(f"{file.path}: {facts}{produced}", style="bold")
    if found.domains:
        say(f"other operator sets: {', '.join(f'{name} {version}' for name, version in found.domains.items())}")
    table(("", "name", "type", "shape"), [
        *(("input", entry.name, entry.dtype, shape(entry.shape)) for entry in found.inputs),
        *(("output", entry.name, entry.dtype, shape(entry.shape)) for entry in found.outputs),
    ])  # fmt: skip
    say(f"dynamic axes: {', '.join(found.dynamic_axes) or 'none'}")
    say(f"operators: {counts(found.ops)}")
    say(f"weights: {', '.join(f'{size(count)} {name}' for name, count in found.weight_bytes.items()) or 'none'}")
    good = Counter(node.op_type for node in found.linear if node.refusal is None)
    say(f"can be quantized: {counts(good) or 'nothing'} ({share(found.quantizable_share)} of the parameters)")
    for (op, refusal), count in Counter((node.op_type, node.refusal) for node in found.linear if node.refusal).most_common():
        names = [node.name for node in found.linear if (node.op_type, node.refusal) == (op, refusal)]
        say(f"  not: {count} {op}: {refusal} ({', '.join(names[:3])}{', ...' if count > 3 else ''})")
    if layers:
        answers = [f"no: {node.refusal}" if node.refusal else "yes" for node in found.linear]
        shapes = [shape(node.weight_shape) if node.weight_shape else "-" for node in found.linear]
        rows = [(node.name, node.op_type, *cells) for node, *cells in zip(found.linear, shapes, answers, strict=True)]
        table(("layer", "operator", "weight", "can be quantized"), rows)
    if found.already_quantized:
        say("Note: this model is quantized already.", style="yellow")
    table(("fits", "", ""), [
        *(("target", fit.name, fit.reason or "yes") for fit in found.targets),
        *(("recipe", fit.name, fit.reason or "yes") for fit in found.recipes),
    ])  # fmt: skip
    if used is not None:
        _kernels(used)


def _kernels(used: KernelsUsed) -> None:
    say(f"integer kernels on this CPU: {counts(used.counts) or 'none'}")
    rows = [("float", one.op_type, one.original or one.name, "") for one in used.floating]
    rows += [("conversion", one.op_type, one.original or one.name, one.note) for one in used.conversions]
    if rows:
        table(("not on integers", "operator", "node", ""), rows)


def sensitivities(found: Sensitivity) -> None:
    """What `graphq sensitivity` prints."""
    first = found.bits[0]
    say(f"{found.model} for {found.target}, measured on {found.data}", style="bold")
    headings = ("outputs", *(f"{width} bits" for width in found.bits), "weight", "activation", "inherited", "total", "work", "weights")
    right: tuple[Column, ...] = tuple((name, "right") for name in headings)
    table(("layer", "operator", *right), [
        (layer.name, layer.op_type, *(decibel(value) for value in (
            layer.output_db, *(layer.both_db[width] for width in found.bits), layer.weight_db[first], layer.activation_db[first],
            layer.inherited_db, layer.total_db,
        )), share(layer.work), share(layer.size))
        for layer in found.layers
    ])  # fmt: skip
    say(f"SQNR of the model's outputs with this layer alone in {first} bits, worst first; then of the layer's own output: alone, in "
        f"{', '.join(map(str, found.bits))} bits, and one side of it in {first}; inherited, with all layers but this one in {first} bits; "
        "total, with this one too.", style="dim")  # fmt: skip
    if found.random:
        say("Note: these are RANDOM inputs; give --calib for numbers that mean something.", style="bold yellow")


def benchmarks(found: BenchResult) -> None:
    """What `graphq bench` prints: a table for each run, as a speed-up holds within its run only."""
    say(str(found.machine), style="bold")
    names = {row.model: os.path.basename(row.model) for row in found.rows}
    if len(set(names.values())) < len(names):
        names = {path: path for path in names}
    runs: dict[str, list[Row]] = {}
    for row in found.rows:
        runs.setdefault(row.run, []).append(row)
    for when, rows in runs.items():
        if len(runs) > 1:
            say(f"\nMeasured {when[:19].replace('T', ' ')} UTC; speed-up over {names[rows[0].model]}", style="bold")
        _benchmarks_of_a_run(rows, names)
    for note in found.notes:
        say(f"Note: {note}", style="dim")


def _benchmarks_of_a_run(rows: Sequence[Row], names: Mapping[str, str]) -> None:
    measured = [row for row in rows if row.reason is None]
    on_gpu = any(row.gpu_mib is not None for row in measured)
    right = ("batch", "median", "95 %", "samples/s", "memory", *(["GPU memory"] if on_gpu else []), "size", "speed-up")
    columns: list[Column] = ["model", "runtime", *((name, "right") for name in right)]  # type: ignore[list-item]
    if measured:
        table(columns, [
            (names[row.model], f"{row.runtime} {row.version}", row.batch, milliseconds(row.median_ms), milliseconds(row.p95_ms),
             three_digits(row.samples_per_s), mebibytes(row.peak_mib), *([mebibytes(row.gpu_mib)] if on_gpu else []), size(row.bytes),
             factor(row.speedup) + ("*" if row.noisy else ""))
            for row in measured
        ])  # fmt: skip
    for row in measured:
        if row.noisy and row.speedup_range:
            low, high = map(factor, row.speedup_range)
            where = f"{names[row.model]} on {row.runtime}, batch {row.batch}"
            spread = f"speed-up between {low} and {high} in most of {row.rounds} rounds, {factor(row.speedup_of_means)} by samples/s"
            say(f"* noisy: {where}: {spread}; measure for longer (--seconds), on an idle machine", style="yellow")
    sizes: dict[str, dict[str, None]] = {}
    for row in measured:
        if row.open_inputs:
            sizes.setdefault(row.open_inputs, {})[names[row.model]] = None
    for inputs, models in sizes.items():
        say(f"Timed with {inputs}: {', '.join(models)}")
    for row in rows:
        if row.reason is not None:
            say(f"Not measured: {names[row.model]} on {row.runtime}, batch {row.batch}: {row.reason}", style="yellow")
