"""The Markdown of `gpu.py`, from the records that its JSON holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from roofline import OURS, bandwidth_share, median_s, ratio

Row = dict[str, Any]
BENCH = ("median_ms", "p95_ms", "samples_per_s", "gpu_mib", "speedup")
"""What the table says of a row of `graphq bench`."""
DRY = "**Dry run in Triton's interpreter, on the CPU: results were checked, nothing was timed. No figure here is a speed.**"


def markdown(results: Row, picture: str) -> str:
    """The whole report."""
    machine = results["machine"]
    lines = [f"# Kernels on {machine.get('gpu') or 'no GPU'}", "", f"`{results['command']}`, {results['date']}; state: {results['state']}, "
             f"after {results['seconds']:.0f} s.", ""]  # fmt: skip
    lines += [DRY, ""] if results["dry_run"] else []
    lines += [", ".join(f"{key} {value}" for key, value in machine.items() if value is not None) + ".", ""]
    for when, clocks in results["clocks"].items():
        lines += [f"Clocks {when}: {', '.join(f'{key} {value}' for key, value in clocks.items()) or 'unknown'}.", ""]
    lines += [*_roofs(results["ceilings"]), *_targets(results["targets"]), f"![roofline]({picture})", ""]
    for kernel in dict.fromkeys(row["kernel"] for row in results["cases"]):
        lines += _kernel(kernel, [row for row in results["cases"] if row["kernel"] == kernel], results["ceilings"])
    lines += [f"**Stopped**, {name}: {why}\n" for name, why in results["stopped"].items()]
    lines += [*_tuned(results["tune"]), *_plugins(results["plugins"]), *_engines(results["engines"])]
    if results["out_of_time"]:
        lines += ["## Not done, for lack of time or memory", "", *(f"- {name}" for name in results["out_of_time"]), ""]
    return "\n".join(lines)


def table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells]] + [""]


def _roofs(ceilings: Row) -> Iterator[str]:
    if not ceilings:
        return
    yield from ("", "## Roofs, as measured", "")
    copies = [[f"{int(size):,}", f"{rate / 1e12:.3f}"] for size, rate in ceilings["copies"].items()]
    yield from table(["bytes read and written", "TB/s"], copies)
    rates = [[unit, f"{rate / 1e12:.0f}"] for unit, rate in ceilings["matrix"].items()]
    yield from table(["matrix product of", "10^12 operations/s"], rates)
    yield from (f"No product of {unit}: {why}\n" for unit, why in ceilings["refused"].items())


def _targets(targets: Sequence[Row]) -> Iterator[str]:
    yield from ("## Targets", "", "Stated for a card of the class of an H200. One is met if every case meets it.", "")
    verdicts = {True: "**met**", False: "**missed**", None: "not measured in all cases"}
    cells = []
    for row in targets:
        each = "; ".join(f"{name}: {value:.2f}" if value else f"{name}: -" for name, value in row["values"].items())
        cells.append([row["target"], f"at least {row['bar']:g} {row['unit']}", verdicts[row["met"]], each or "-"])
    yield from table(["what", "target", "verdict", "each case"], cells)


def _kernel(kernel: str, rows: Sequence[Row], ceilings: Row) -> Iterator[str]:
    """One line a case. The last columns: how many times as long as the kernel the others take."""
    yield from (f"## {kernel}", "", f"Sizes are {' x '.join(rows[0]['sizes'])}.", "")
    others = list(dict.fromkeys(name for row in rows for name in row["times"] if name != OURS))
    head = ["case", "configuration", "error", *([] if not ceilings else ["us", "p95 us", "floor / time", "bytes / copy bandwidth"])]
    cells = [[f"{row['shape']}, {row['dtype']}: {' x '.join(map(str, row['sizes'].values()))}", row["config"] or "-", _verdict(row),
              *(_timed(row, ceilings) if ceilings else ()), *(_ratio(row, name) for name in others)] for row in rows]  # fmt: skip
    yield from table([*head, *(f"{name}: times as long" for name in others)], cells)
    notes = {f"- {name}: {why}" for row in rows for name, why in row["refused"].items()}
    notes |= {f"- {name} is not timed for {row['shape']}, {row['sizes']}: its error is {row['errors'][name]:.2g}"
              for row in rows for name in row["wrong"]}  # fmt: skip
    yield from (*sorted(notes), "") if notes else ()


def _verdict(row: Row) -> str:
    if OURS in row["refused"]:
        return "**refused**"
    return f"{row['errors'][OURS]:.1e}" + (" **wrong**" if OURS in row["wrong"] else "")


def _timed(row: Row, ceilings: Row) -> list[str]:
    ours, share = median_s(row), bandwidth_share(row, row["bytes"], ceilings)
    if ours is None or share is None:
        return ["-"] * 4
    return [f"{ours * 1e6:.2f}", f"{row['times'][OURS]['p95_s'] * 1e6:.2f}", f"{row['floor_s'] / ours:.2f}", f"{share:.2f}"]


def _ratio(row: Row, name: str) -> str:
    found = ratio(row, name) if name in row["times"] else None
    return f"{found:.2f}" if found else "-"


def _tuned(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    yield from ("## Configurations", "", "The fastest that `configs()` names beside the table's choice, timed in the same loop.", "")
    cells = [[row["kernel"], row["shape"], str(row["m"]), row["table"], f"{row['table_s'] * 1e6:.2f}", row["best"],
              f"{row['best_s'] * 1e6:.2f}", f"{row['table_s'] / row['best_s']:.2f}", str(row["refused"])] for row in rows]  # fmt: skip
    yield from table(["kernel", "shape", "M", "table", "us", "fastest", "us", "gain", "do not fit or compile"], cells)


def _plugins(rows: Sequence[Row]) -> Iterator[str]:
    yield from ("## PTX of the plugins, through CUDA's driver", "")
    cells = []
    for row in rows:
        verdict = "compiled, not launched: no GPU" if not row.get("launched") else "agrees" if row.get("agrees") else "**differs**"
        cells.append([row["operator"], str(row.get("arch", "-")), row.get("error", verdict)])
    yield from table(["operator", "compiled for", "result"], cells)


def _engines(record: Row) -> Iterator[str]:
    yield from ("## TensorRT-RTX", "")
    if "skipped" in record or not record:
        yield from (record.get("skipped", "not tried"), "")
        return
    done = ", ".join(record.get("done", ())) or "nothing"
    yield f"tensorrt-rtx {record.get('package', '?')}, {record.get('model', '?')}: {done}."
    if "difference" in record:
        yield f"Its outputs differ from those of ONNX Runtime by {record['difference']:.2g} of the largest entry."
    yield from (f"Then: {record['error']}",) if "error" in record else ()
    yield ""
    for name, found in record.get("bench", {}).items():
        yield from (f"### {name}", "", f"{found.get('skipped') or found.get('errors') or 'all built'}", "")
        rows = (found.get("result") or {}).get("rows", [])
        cells = [[Path(row["model"]).name, row["runtime"], str(row["batch"]), *(_number(row[key]) for key in BENCH), row["reason"] or "-"]
                 for row in rows]  # fmt: skip
        yield from table(["model", "runtime", "batch", *BENCH, "reason"], cells) if rows else ()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
