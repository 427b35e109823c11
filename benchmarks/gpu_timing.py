"""Times of calls on a GPU, and the roofs of the GPU: copy bandwidth and matrix rates. Imports torch when asked for.

A call is timed within a captured CUDA graph of very many, so that neither Python nor the driver is in the time; what stays is the gap
between two launches of one stream, about a microsecond. Successive calls take operands from different copies, together four times what the
L2 cache holds if one copy is less, so that each call finds its operands in memory. Contestants take turns, ABC CBA ABC ..., graph by graph;
times are CUDA events around a graph, over its launches. Median and 95th percentile are those of graphs, not of single launches.
"""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

GRAPH_S = 2e-3
"""Time of a graph, at least: against some microseconds until its first kernel starts."""
MOST_LAUNCHES = 2048
MOST_COPIES = 1024
ROUNDS = (9, 100)
WARM_UP_S = 0.1
COPY_BYTES = (2 << 30, 256 << 20, 64 << 20, 16 << 20, 4 << 20)
"""Read and written; the first is what counts as copy bandwidth, smaller ones show what so short a launch can have."""
MATRIX = 8192
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu", "power.draw", "power.limit", "pstate")

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds of one launch, and how they came about.

    Attributes:
        launches: In a graph.
        copies: Of the operands, in turn.
        rounds: Graphs that were timed.
    """

    median_s: float
    p95_s: float
    launches: int
    copies: int
    rounds: int


def rotated(call: Callable[..., object], tensors: Sequence[Any]) -> list[Call]:
    """`call` with `tensors`, and with as many copies of them as it takes to leave the L2 cache, or a quarter of free memory."""
    import torch

    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
    room = torch.cuda.mem_get_info()[0] // 4 // size
    copies = max(1, min(math.ceil(4 * l2 / size), MOST_COPIES, room))
    return [partial(call, *tensors), *(partial(call, *(tensor.clone() for tensor in tensors)) for _ in range(copies - 1))]


def together(contestants: Mapping[str, Sequence[Call]], floor_s: float, seconds: float) -> tuple[dict[str, Times], dict[str, str]]:
    """Times of contestants that take turns, and why others could not be timed.

    Args:
        contestants: The same call for each copy of its operands.
        floor_s: Time of one call at least, from which the length of a graph follows.
        seconds: How long all may take together, about.
    """
    import torch

    graphs, launches, failed = {}, {}, {}
    wanted = min(MOST_LAUNCHES, math.ceil(GRAPH_S / max(floor_s, 1e-6)))
    stream = torch.cuda.Stream()
    for name, calls in contestants.items():
        launches[name] = math.ceil(wanted / len(calls)) * len(calls)
        try:
            graphs[name] = _captured(calls, launches[name], stream)
        except Exception as error:  # whatever a library raises: others are timed without it
            failed[name] = reason(error)
    with torch.cuda.stream(stream):
        taken = _round_s(graphs)
        rounds = max(ROUNDS[0], min(ROUNDS[1], int(seconds / max(taken, 1e-6)))) if graphs else 0
        events: dict[str, list[Any]] = {name: [] for name in graphs}
        for index in range(rounds):  # all are queued at once: the GPU must never wait for Python between an event and its graph
            for name in list(graphs)[:: -1 if index % 2 else 1]:
                pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                pair[0].record()
                graphs[name].replay()
                pair[1].record()
                events[name].append(pair)
        torch.cuda.synchronize()
    times = {}
    for name, pairs in events.items():
        each = [start.elapsed_time(end) / 1e3 / launches[name] for start, end in pairs]
        times[name] = Times(float(np.median(each)), float(np.percentile(each, 95)), launches[name], len(contestants[name]), rounds)
    return times, failed


def _captured(calls: Sequence[Call], launches: int, stream: Any) -> Any:
    """A graph of so many calls, in turn. The first calls are made before: they compile, load and allocate, which a graph cannot."""
    import torch

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for index in range(launches):
            calls[index % len(calls)]()
    return graph


def _round_s(graphs: Mapping[str, Any]) -> float:
    """Seconds of all graphs once, when the GPU is warm."""
    import torch

    taken, begun = 0.0, time.perf_counter()
    while graphs and time.perf_counter() - begun < WARM_UP_S:
        started = time.perf_counter()
        for graph in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
        taken = time.perf_counter() - started
    return taken


def reason(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"


# ---- roofs ----------------------------------------------------------------------------------------------------------


def ceilings(expired: Callable[[], bool]) -> dict[str, Any]:
    """Bytes a second of a copy, the better of cudaMemcpy and an elementwise kernel, and operations a second of torch's matrix products.

    Returns:
        `copy`; `copies`, by number of bytes; `matrix`, by element type; `refused`, why a product is missing.
    """
    import torch

    copies: dict[str, float] = {}
    for moved in COPY_BYTES:
        if not copies or not expired():
            moved = min(moved, torch.cuda.mem_get_info()[0] // 4 // 8 * 8)
            copies[str(moved)] = copy_rate(moved)
    matrix: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name in ("float16", "bfloat16", "int8"):
        rate, why = _matrix_rate(name)
        matrix |= {name: rate} if rate else {}
        refused |= why
    return {"copy": next(iter(copies.values())), "copies": copies, "matrix": matrix, "refused": refused}


def copy_rate(moved: int) -> float:
    """Bytes a second of copies of so many bytes, those that are read and those that are written."""
    import torch

    source = torch.randint(-(2**31), 2**31 - 1, (moved // 8,), dtype=torch.int32, device="cuda")
    pair = (source, torch.empty_like(source))
    ways = {"cudaMemcpy": rotated(lambda a, b: b.copy_(a), pair), "kernel": rotated(lambda a, b: torch.bitwise_not(a, out=b), pair)}
    times, _ = together(ways, moved / 4e12, 0.3)
    return moved / min(one.median_s for one in times.values())


def _matrix_rate(name: str) -> tuple[float, dict[str, str]]:
    import torch

    shape, operations = (MATRIX, MATRIX), 2 * MATRIX**3
    if name == "int8":
        a, b = (torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda") for _ in range(2))
        calls: list[Call] = [lambda: torch._int_mm(a, b.t())]
    else:
        a, b = (torch.randn(shape, dtype=getattr(torch, name), device="cuda") for _ in range(2))
        calls = [lambda: torch.mm(a, b.t())]
    times, failed = together({name: calls}, operations / 1e15, 0.3)
    return (operations / times[name].median_s if name in times else 0.0), failed


# ---- the machine ----------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """GPU, driver and versions; what there is of them."""
    import platform

    import torch
    import triton

    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
                             "cuda": torch.version.cuda, "gpu": None, "driver": smi("driver_version").get("driver_version")}  # fmt: skip
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        facts |= {"gpu": found.name, "capability": f"{found.major}.{found.minor}", "multiprocessors": found.multi_processor_count,
                  "memory_bytes": found.total_memory, "l2_bytes": getattr(found, "L2_cache_size", None)}  # fmt: skip
    return facts


def smi(*keys: str) -> dict[str, str]:
    """What nvidia-smi says of the first GPU; nothing where it is missing. Settings are only read."""
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(keys, (value.strip() for value in done.stdout.split(",")), strict=False))


def as_rows(times: Mapping[str, Times]) -> dict[str, dict[str, Any]]:
    return {name: asdict(one) for name, one in times.items()}
