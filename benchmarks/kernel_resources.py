"""Compile every configuration of every matrix kernel for every architecture, and write down what it takes. Needs no GPU.

    .venv/bin/python benchmarks/kernel_resources.py [--out benchmarks/results]

Registers and spills are those that ptxas assigns, read from the machine code; so are the instructions a weight, counted in the
loop over K: what a lane of a warp executes, over the weights that it unpacks or multiplies. Results: <out>/kernels.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton

from graphq import ops
from graphq.kernels import CATALOG
from graphq.kernels._compile import SHARED_LIMIT, Compiled, compile_launch
from graphq.kernels._launch import ARCHS, Launch

N = K = 4096
GROUP = 128
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COLUMNS = (
    "arch", "rows up to", "configuration", "registers", "spilled bytes", "shared KB", "of", "instructions / weight", "PTX KB", "tensor cores",
)  # fmt: skip


def loop_length(cubin: bytes) -> int:
    """Instructions of the longest loop: from the target of a backward branch to the branch."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True).stdout
    tools = f"triton {triton.__version__}, ptxas {version('ptxas')} below sm_90, {version('ptxas-blackwell')} from there"
    lines = [
        "# What the kernels take",
        "",
        f"`python benchmarks/kernel_resources.py`, {datetime.date.today()}, {platform.machine()}; {tools}.",
        "Compiled, not run: there are no times here.",
        "",
        "Chosen configurations as `rows x channels x K`, warps `w`, stages `s`, `split` over warps;",
        f"K = N = {K}, groups of {GROUP}, float16. With 8 warps, up to 80 registers leave room for three programs a multiprocessor,",
        "up to 128 for two, more for one, where shared memory does not say less.",
    ]
    for name in CATALOG:
        lines += ["", f"## {name}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(map(str, row))} |" for row in rows(name)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {out / 'kernels.md'}")


if __name__ == "__main__":
    main()
