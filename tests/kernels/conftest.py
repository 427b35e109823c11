"""Kernels run in the interpreter on the CPU, and on a GPU where there is one; each in a process of its own (worker.py)."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Run = Callable[..., np.ndarray]


def start(**environment: str) -> Iterator[Run]:
    """A function that computes `run(operator, operands, how="contiguous", **config)` in another process."""
    pytest.importorskip("torch", reason="torch is not installed (pip install graphq[kernels])")
    pytest.importorskip("triton", reason="triton is not installed (pip install graphq[kernels])")
    command = [sys.executable, str(Path(__file__).with_name("worker.py"))]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdin is not None and process.stdout is not None
        questions, answers = process.stdin, process.stdout

        def run(operator: str, operands: dict[str, np.ndarray], how: str = "contiguous", **config: Any) -> np.ndarray:
            pickle.dump((operator, operands, how, config or None), questions)
            questions.flush()
            answer = pickle.load(answers)
            if isinstance(answer, Exception):
                raise answer
            return np.asarray(answer)

        yield run
        questions.close()


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Run]:
    yield from start(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.fixture(scope="session")
def gpu() -> Iterator[Run]:
    torch = pytest.importorskip("torch", reason="torch is not installed (pip install graphq[kernels])")
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU")
    yield from start()


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Run:
    """Computes with a kernel: `run(operator, operands, how="contiguous", **config)`."""
    found: Run = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def compiler() -> Any:
    """The module that compiles kernels ahead of time."""
    pytest.importorskip("torch", reason="torch is not installed (pip install graphq[kernels])")
    pytest.importorskip("triton", reason="triton is not installed (pip install graphq[kernels])")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET is set, and kernels that are interpreted cannot be compiled")
    from graphq.kernels import _compile

    return _compile
