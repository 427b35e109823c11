"""Compile every configuration of every kernel for every architecture, and write down what it takes. Needs no GPU.

    .venv/bin/python benchmarks/kernel_resources.py [--out benchmarks/results]

Registers and spills are those that ptxas assigned, read from the machine code; so are the instructions a weight: those of the loop
over K that a lane executes, over the weights that it unpacks or multiplies there. Results: <out>/kernels.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import triton

from graphq import ops, ops_gemm
from graphq.kernels import CATALOG
from graphq.kernels._compile import SHARED_LIMIT, Compiled, compile_launch
from graphq.kernels._launch import ARCHS, Launch
from graphq.kernels.sulq_softmax.kernel import attention_launch, softmax_launch

N = K = 4096
GROUP = 128
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COLUMNS = ("arch", "rows up to", "configuration", "registers", "spilled bytes", "shared KB", "limit KB", "PTX KB", "tensor cores",
           "instructions / weight")  # fmt: skip
SOFTMAX: Mapping[str, Launch] = {
    **{f"softmax, rows of {n}": softmax_launch(12 * n, n, "float16", packed=False) for n in (197, 1024, 32768)},
    **{f"codes, rows of {n}": softmax_launch(12 * n, n, "float16", packed=True) for n in (197, 1024, 32768)},
    **{f"times values, {n} x {n} by {d}": attention_launch(12, n, n, d, "float16") for n, d in ((197, 64), (1024, 128))},
}


def loop_length(cubin: bytes) -> int:
    """Instructions of the longest loop: from the target of a backward branch to the branch."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True).stdout
    code = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", listing)]
    jumps = ((address, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for address, text in code)
    loops = [(int(found[1], 16), address) for address, found in jumps if found and int(found[1], 16) < address]
    return max(sum(start <= address <= end for address, _ in code) for start, end in loops)


def weights_a_lane(launch: Launch) -> float:
    """Weights of one step of a program, over its lanes."""
    step = launch.constants["BLOCK_N"] * launch.constants["BLOCK_K"] * launch.constants.get("SPLIT", 1)
    return float(step / (launch.warps * 32))


def instruction(ptx: str) -> str:
    found = re.search(r"(wgmma|mma)\S*?\.(m\d+n\d+k\d+)\S*?\.(bf16|f16|s8)\b", ptx)
    return " ".join(found.groups()) if found else "none"


def taken(found: Compiled, arch: int) -> tuple[object, ...]:
    shared = f"{found.shared_bytes / 1024:.0f}", SHARED_LIMIT[arch] // 1024
    return found.registers, found.spill_bytes, *shared, f"{len(found.ptx) / 1024:.0f}", instruction(found.ptx)


def product_rows(name: str) -> Iterator[tuple[object, ...]]:
    kernel = importlib.import_module(CATALOG[name].partition(":")[0])
    for arch in ARCHS:
        for limit, config in kernel.TABLE[arch]:
            sizes = ops_gemm.Sizes(int(min(limit, 4096)), K, N, K if name == "W8A8Gemm" else GROUP)
            launch = kernel.launch(sizes, "float16", arch)
            found = compile_launch(launch, arch)
            share = loop_length(found.cubin) / weights_a_lane(launch)
            yield f"sm_{arch}", "any" if limit > 4096 else int(limit), config, *taken(found, arch), f"{share:.2f}"


def softmax_rows() -> Iterator[tuple[object, ...]]:
    for arch in ARCHS:
        for what, launch in SOFTMAX.items():
            yield f"sm_{arch}", what, f"w{launch.warps} s{launch.stages}", *taken(compile_launch(launch, arch), arch)


def version(tool: str) -> str:
    return subprocess.run([TOOLS / tool, "--version"], capture_output=True, text=True, check=True).stdout.split(", V")[1].split()[0]


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    yield from (f"| {' | '.join(map(str, row))} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    out = parser.parse_args().out
    tools = f"triton {triton.__version__}, ptxas {version('ptxas')} below sm_90, {version('ptxas-blackwell')} from there"
    text = [
        "# What the kernels take",
        "",
        f"`python benchmarks/kernel_resources.py`, {datetime.date.today()}, {platform.machine()}; {tools}.",
        "Compiled, not run: there are no times here.",
        "",
        "Chosen configurations as `rows x channels x K`, warps `w`, stages `s`, `split` over warps;",
        f"K = N = {K}, groups of {GROUP}, float16. With 8 warps, up to 80 registers leave room for three programs a multiprocessor,",
        "up to 128 for two, more for one, where shared memory does not say less.",
    ]
    for name in [name for name in ops.OPERATORS if name.endswith("Gemm")]:
        text += ["", f"## {name}", "", *table(COLUMNS, product_rows(name))]
    text += ["", "## sulq_softmax", "", *table(("arch", "launch", *COLUMNS[2:-1]), softmax_rows())]
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print(f"wrote {out / 'kernels.md'}")


if __name__ == "__main__":
    main()
