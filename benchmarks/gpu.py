"""Measure the kernels on the NVIDIA GPU of this machine: against torch's best, against the roofline, against their targets.

    python benchmarks/gpu.py [--only KERNEL ...] [--tune] [--models A.onnx ...] [--sections cases ...] [--budget-s 450]
    python benchmarks/gpu.py --dry-run                 without a GPU: tiny shapes in Triton's interpreter, nothing is timed

Needs `pip install graphq[kernels]`, no network, and nvidia-smi only to write down clocks, which it leaves as they are. In this order:

- roofs: bandwidth of copies, matrix rates of cuBLAS in float16 and bfloat16 and of `torch._int_mm`;
- cases: every kernel on layers of language models and vision transformers at 1, 16, 256 and 4096 rows, and on attention. Each contestant
  is first compared with float64; a kernel that is wrong is not timed, and the exit status is 1. Then all contestants take turns. How
  times are taken, gpu_timing.py says: within CUDA graphs of many launches, operands rotated through memory so that L2 does not hold them;
- `--tune`: all configurations of `configs()`, timed beside the one that the table takes;
- plugins: the PTX that TensorRT would embed, launched through CUDA's driver by the launcher of the tests, compared with the references;
- engines: if `tensorrt_rtx` is installed, how far an engine comes on this GPU, whose outputs are compared with ONNX Runtime; and if it
  runs, `graphq bench` of `--models` as float, FP16, INT8 and INT4.

Results: <out>/<gpu>.json, .md and .svg, written again after each case, so that a run that is killed leaves what it has. Sections share the
budget; what did not fit is listed as such. With a dry run they go to a new temporary folder unless `--out` is given.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_report
import gpu_shapes
import roofline
from roofline import OURS, failed

HERE = Path(__file__).resolve().parent
RECIPES = ("fp16", "int8", "int4-weight-only")
COPY = "copy of as many bytes"
CASE_S = 0.4
"""For all contestants of a case, without captures and checks."""
SHARES = {False: {"cases": 0.75, "tune": 0.75, "plugins": 0.87, "engines": 1.0},
          True: {"cases": 0.35, "tune": 0.78, "plugins": 0.88, "engines": 1.0}}  # fmt: skip
"""When each section must be over, as a share of the budget; without and with `--tune`."""
GRACE_S = 25
"""After the budget the process ends, whatever hangs."""

Row = dict[str, Any]


class Run:
    """One run: its options, its deadlines, and its results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.started = options, time.monotonic()
        self.device = "cpu" if options.dry_run else "cuda"
        self.results: Row = {
            "schema": 1, "state": "running", "dry_run": options.dry_run, "command": shlex.join(["python", *sys.argv]),
            "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC", "machine": {}, "clocks": {}, "ceilings": {},
            "cases": [], "out_of_time": [], "stopped": {}, "tune": [], "plugins": [], "engines": {}, "targets": [],
        }  # fmt: skip

    def left_s(self, section: str) -> float:
        """Seconds until `section` must be over."""
        share = SHARES[self.options.tune][section]
        return self.started + share * self.options.budget_s - time.monotonic()

    def save(self) -> None:
        """Write what there is; each file is there as a whole or not at all."""
        self.results["targets"] = roofline.targets(self.results["cases"], self.results["ceilings"])
        self.results["seconds"] = time.monotonic() - self.started
        name = slug(self.results["machine"].get("gpu") or "interpreter")
        caption = f"{self.results['machine'].get('gpu') or 'dry run'}: kernels against the roofs, as measured"
        files = {"json": json.dumps(finite(self.results), indent=1) + "\n", "md": gpu_report.markdown(self.results, f"{name}.svg"),
                 "svg": roofline.picture(self.results["cases"], self.results["ceilings"], caption)}  # fmt: skip
        self.options.out.mkdir(parents=True, exist_ok=True)
        for suffix, text in files.items():
            part = self.options.out / f".{name}.{suffix}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(self.options.out / f"{name}.{suffix}")

    def say(self, words: str) -> None:
        print(f"{time.monotonic() - self.started:6.1f} s  {words}", file=sys.stderr, flush=True)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as words, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


# ---- the kernels ----------------------------------------------------------------------------------------------------


def measure(case: Any, run: Run) -> Row:
    """Check all contestants of a case; time those that are right if the kernel is, and if there is a GPU."""
    import gpu_cases
    import torch
    from gpu_timing import as_rows, reason, rotated, together

    row: Row = {"kernel": case.kernel, "family": case.family, "shape": case.shape, "dtype": case.dtype, "sizes": case.sizes}
    prepared = gpu_cases.prepare(case, run.device, run.options.seed)
    work = prepared.work
    row |= {"bytes": work.bytes, "weight_bytes": work.weight_bytes, "operations": work.operations, "unit": work.unit,
            "config": prepared.config, "times": {}, "errors": {}, "wrong": [], "refused": prepared.refused}  # fmt: skip
    right = {}
    for name, one in prepared.contestants.items():
        try:
            found = one.call(*one.tensors)
            error, holds = one.judge(found) if one.judge else (None, True)
        except torch.OutOfMemoryError:
            raise
        except Exception as exception:  # whatever a library raises: the others go on
            row["refused"][name] = reason(exception)
            continue
        row["errors"] |= {} if error is None else {name: error}
        if holds:
            right[name] = one
        else:
            row["wrong"].append(name)
    if run.device == "cuda" and OURS in right:
        source = torch.randint(-(2**31), 2**31 - 1, (work.bytes // 8,), dtype=torch.int32, device="cuda")
        calls = {name: rotated(one.call, one.tensors) for name, one in right.items()}
        calls[COPY] = rotated(lambda a, b: torch.bitwise_not(a, out=b), (source, torch.empty_like(source)))
        floor = roofline.floor_s(work, run.results["ceilings"])
        times, dropped = together(calls, floor, CASE_S)
        row["floor_s"], row["times"] = floor, as_rows(times)
        row["refused"] |= dropped
    return row


def all_cases(run: Run) -> None:
    """Measure them one after the other, those with a target first."""
    import torch
    from gpu_timing import reason

    found = gpu_shapes.tiny_cases() if run.options.dry_run else gpu_shapes.cases()
    for case in found:
        if run.options.only and case.kernel not in run.options.only:
            continue
        name = f"{case.kernel} {case.shape} {case.dtype} {case.sizes}"
        if run.left_s("cases") < 0:
            run.results["out_of_time"].append(name)
            continue
        try:
            row = measure(case, run)
        except torch.OutOfMemoryError:
            run.results["out_of_time"].append(f"{name}: out of memory")
            continue
        except Exception as error:  # others may go on; of a GPU that is lost to this process each will say so
            run.results["stopped"][name] = reason(error)
            continue
        run.results["cases"].append(row)
        ours = row["times"].get(OURS)
        words = row["refused"].get(OURS, "wrong") if failed(row) else f"{ours['median_s'] * 1e6:.1f} us" if ours else "right"
        run.say(f"{name}: {words}")
        run.save()
        if run.device == "cuda":
            torch.cuda.empty_cache()


def tune(run: Run) -> None:
    """Time all configurations of the float16 products of language models, first shapes first."""
    cases = [case for case in gpu_shapes.cases() if case.family == "llm" and case.dtype == "float16" and "m" in case.sizes]
    cases = [case for case in cases if not run.options.only or case.kernel in run.options.only]
    order = list(gpu_shapes.LLM)
    for case in sorted(cases, key=lambda case: (order.index(case.shape), case.sizes["m"])):
        if run.left_s("tune") < 0:
            run.results["out_of_time"].append(f"tuning {case.kernel} {case.shape} {case.sizes}")
            continue
        row = tune_one(case, run)
        run.results["tune"] += [row] if row else []
        run.say(f"tuned {case.kernel} {case.shape} M = {case.sizes['m']}: {row['best'] if row else 'could not be timed'}")
        run.save()


def tune_one(case: Any, run: Run) -> Row | None:
    """The fastest configuration that computes the right thing, and the time of the one that the table takes, in the same loop.

    None if that cannot be timed.
    """
    import gpu_cases
    from gpu_timing import rotated, together

    prepared = gpu_cases.prepare(case, run.device, run.options.seed)
    ours, (m, k, n) = prepared.contestants[OURS], (case.sizes[key] for key in "mkn")
    assert ours.judge is not None
    named = prepared.candidates()
    g = k if case.operator == "W8A8Gemm" else gpu_cases.GROUP
    run_job(["warm"], run.left_s("tune"), [(case.operator, m, k, n, g, case.dtype, index) for index in range(len(named))])
    table = rotated(ours.call, ours.tensors)
    calls, refused = {"table": table}, 0
    for name, call in named.items():
        try:
            holds = run.left_s("tune") > 0 and ours.judge(call(*ours.tensors))[1]
        except Exception:  # does not fit this GPU, or does not compile
            holds = False
        refused += not holds
        calls |= {name: [partial(call, *one.args) for one in table]} if holds else {}  # type: ignore[attr-defined]
    times, _ = together(calls, roofline.floor_s(prepared.work, run.results["ceilings"]), 3 * CASE_S)
    if "table" not in times:
        return None
    best = min(times, key=lambda name: times[name].median_s)
    return {"kernel": case.kernel, "shape": case.shape, "m": m, "k": k, "n": n, "table": prepared.config, "refused": refused,
            "table_s": times["table"].median_s, "best": prepared.config if best == "table" else best, "best_s": times[best].median_s,
            "times": {name: one.median_s for name, one in times.items()}}  # fmt: skip


# ---- processes of their own -----------------------------------------------------------------------------------------


def command_output(command: Sequence[str], seconds: float, given: str = "") -> tuple[str, str]:
    """What a command prints, and what went wrong; it and its children end after `seconds`."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
                          start_new_session=True) as process:  # fmt: skip
        try:
            out, said = process.communicate(given, timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return "", f"stopped after {max(seconds, 1):.0f} s"
    return out, "" if process.returncode == 0 else f"status {process.returncode}: {said.strip()[-400:]}"


def run_job(arguments: Sequence[str], seconds: float, given: Any = None) -> Any:
    """The answer of a job of gpu_jobs.py, or a record with its error."""
    out, error = command_output([sys.executable, str(HERE / "gpu_jobs.py"), *arguments], seconds, json.dumps(given))
    return {"error": error} if error else json.loads(out.strip().splitlines()[-1])


def plugins(run: Run) -> None:
    found = run_job(["plugins"], run.left_s("plugins"))
    run.results["plugins"] = found if isinstance(found, list) else [{"operator": "all", **found}]
    run.save()


def engines(run: Run) -> None:
    """Whether TensorRT-RTX works on this GPU, and how fast models are if it does."""
    if find_spec("tensorrt_rtx") is None:
        run.results["engines"] = {"skipped": "tensorrt_rtx is not installed (pip install graphq[tensorrt-rtx])"}
        return
    record = run_job(["engine", str(HERE.parent / "models" / "digits_vit.onnx")], min(120, run.left_s("engines")))
    run.results["engines"] = record
    run.save()
    for model in run.options.models:
        if "difference" not in record:
            record.setdefault("bench", {})[model.name] = {"skipped": "engines do not run here"}
        elif run.left_s("engines") < 0:
            run.results["out_of_time"].append(f"bench of {model.name}")
        else:
            record.setdefault("bench", {})[model.name] = bench(model, "tensorrt-rtx", lambda: run.left_s("engines"))
        run.save()


def bench(model: Path, runtime: str, left_s: Any) -> Row:
    """`graphq bench` of a float model beside its conversions by `RECIPES`, all for the runtime of that name."""
    graphq = [sys.executable, "-m", "graphq"]
    errors: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="graphq-") as folder:
        made = [model]
        for recipe in RECIPES:
            out = Path(folder) / f"{model.stem}.{recipe}.onnx"
            wanted = [*graphq, "convert", str(model), "-o", str(out), "--recipe", recipe, "--target", runtime, "--quiet"]
            _, error = command_output(wanted, left_s())
            errors |= {recipe: error} if error else {}
            made += [] if error else [out]
        said, error = command_output([*graphq, "bench", *map(str, made), "--runtime", runtime, "--json"], left_s())
    errors |= {"bench": error} if error else {}
    return {"errors": errors, "result": json.loads(said) if said.startswith("{") else None}


# ---- one command ----------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results (benchmarks/results; of a dry run a temporary one)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, in Triton's interpreter; nothing is timed")
    parser.add_argument("--only", nargs="+", metavar="KERNEL", default=[], help="such as w4a16_gemm")
    parser.add_argument("--tune", action="store_true", help="time all configurations")
    parser.add_argument("--sections", nargs="+", choices=("cases", "plugins", "engines"), default=["cases", "plugins", "engines"])
    parser.add_argument("--models", nargs="+", type=Path, default=[], help="float ONNX models for `graphq bench`")
    parser.add_argument("--budget-s", type=float, default=450, help="seconds that all may take (450)")
    parser.add_argument("--seed", type=int, default=0, help="of operands")
    options = parser.parse_args()
    if options.tune and not options.dry_run:
        options.sections = [*options.sections[:1], "tune", *options.sections[1:]]
    options.out = options.out or (Path(tempfile.mkdtemp(prefix="graphq-gpu-")) if options.dry_run else HERE / "results")
    return options


def main() -> int:
    options = arguments()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    elif os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("gpu.py: TRITON_INTERPRET is set, and kernels that are interpreted cannot be timed; use --dry-run")
    import gpu_timing
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("gpu.py: there is no NVIDIA GPU; --dry-run checks kernels and files without one")
    if hasattr(signal, "SIGALRM"):
        signal.alarm(math.ceil(options.budget_s + GRACE_S))  # its default action ends the process, even inside a kernel that hangs
    gc.collect()
    gc.freeze()  # torch collects garbage before each capture, and need not look at all modules each time
    run = Run(options)
    results = run.results
    results["machine"] = gpu_timing.machine() | ({"gpu": None} if options.dry_run else {})
    if not options.dry_run:
        results["clocks"]["before"] = gpu_timing.smi(*gpu_timing.CLOCKS)
        results["ceilings"] = gpu_timing.ceilings(lambda: run.left_s("cases") < 0)
        run.say(f"copy {results['ceilings']['copy'] / 1e12:.2f} TB/s")
    run.save()
    sections = {"cases": all_cases, "tune": tune, "plugins": plugins, "engines": engines}
    for name in options.sections:
        try:
            sections[name](run)
        except Exception as error:  # what has a process of its own can go on
            results["stopped"][name] = gpu_timing.reason(error)
    results["clocks"] |= {} if options.dry_run else {"after": gpu_timing.smi(*gpu_timing.CLOCKS)}
    results["state"] = "complete"
    run.save()
    for file in sorted(options.out.glob(f"{slug(results['machine']['gpu'] or 'interpreter')}.*")):
        print(file)
    wrong = [row for row in results["cases"] if failed(row)]
    bad = [row for row in results["plugins"] if "error" in row or row.get("agrees") is False]
    return 1 if wrong or bad or results["stopped"] else 0


if __name__ == "__main__":
    sys.exit(main())
