"""Runs kernels for the tests in a process of its own: in Triton's interpreter if TRITON_INTERPRET=1, which it reads when imported.

Talks pickle: reads (operator, operands, how x lies in memory, configuration or None) from stdin, writes the result or the exception.
"""

from __future__ import annotations

import importlib
import math
import os
import pickle
import sys
from typing import Any

import ml_dtypes
import numpy as np
import torch

from graphq import ops
from graphq.kernels import CATALOG

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(DEVICE)
    return torch.from_numpy(np.array(array)).to(DEVICE)


def array(values: torch.Tensor) -> np.ndarray:
    values = values.cpu()
    return values.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if values.dtype == torch.bfloat16 else values.numpy()


def laid_out(x: torch.Tensor, how: str) -> torch.Tensor:
    """`x` with the same values and other strides."""
    if how == "columns":  # the reduction axis is the outer one
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "padded":  # rows do not follow each other
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), 7, dtype=x.dtype, device=x.device)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if how == "every other":
        return torch.stack([x, torch.full_like(x, 7)], dim=-1)[..., 0]
    return x


def compute(operator: str, operands: dict[str, np.ndarray], how: str, options: dict[str, Any] | None) -> np.ndarray:
    """The kernel's result; the memory it writes to holds NaN (or 85) before, and more of it behind the result, which must stay."""
    module, _, function = CATALOG[operator].partition(":")
    kernel = importlib.import_module(module)
    tensors = {key: tensor(value) for key, value in operands.items()}
    first = next(iter(tensors))
    tensors[first] = laid_out(tensors[first], how)
    shape, name = ops.check(operator, tensors)
    dtype = getattr(torch, name)
    unused = float("nan") if dtype.is_floating_point else 85
    memory = torch.full((math.prod(shape) + 64,), unused, dtype=dtype, device=DEVICE)
    out, guard = memory[:-64].view(shape), memory[-64:]
    getattr(kernel, function)(**tensors, out=out, **({"config": kernel.Config(**options)} if options else {}))
    assert (guard.isnan() if dtype.is_floating_point else guard == unused).all(), "the kernel wrote behind its result"
    return array(out)


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not get between the answers
    while True:
        try:
            answer: Any = compute(*pickle.load(sys.stdin.buffer))
        except EOFError:
            return
        except Exception as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
