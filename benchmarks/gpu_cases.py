"""Operands of the cases of `gpu.py`, who takes part, and what each must compute. Imports torch and the kernels when asked for.

Operands are random and never zeros. The reference is float64 on the same device. Competitors get the same weights, dequantized where they
need it, in the layout that they like best; what one computes less than the kernel is in its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import roofline
from gpu_shapes import Case
from roofline import CUBLAS, FORM, INT_MM, OURS, Work

from graphq.kernels import CATALOG
from graphq.ops_gemm import OFFSET, RUN, packed_width

GROUP = 128
NORM = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5}
"""What the error may be, as a share of the reference's norm: weights and results are each rounded to 11 or 8 bits."""
WORST = {"float16": 2.0**-8, "bfloat16": 2.0**-5, "float32": 2.0**-14}
"""Of a single entry, as a share of the largest."""
LIBRARY = 4
"""How many times as large the error of a library may be, which may add up in 16 bits."""
OTHER_CODES = 1e-3
"""Share of codes that may be the next one, because sums are made in another order."""

Judge = Callable[[Any], tuple[float, bool]]


@dataclass
class Contestant:
    """A call that computes the case, or part of it. It gets its tensors again, and copies of them; `out` is the last of ours."""

    call: Callable[..., Any]
    tensors: tuple[Any, ...]
    judge: Judge | None = None


@dataclass
class Prepared:
    """A case with its operands."""

    work: Work
    contestants: dict[str, Contestant]
    refused: dict[str, str]
    config: str = ""
    """That of the table, for matrix products."""
    candidates: Callable[[], dict[str, Callable[..., Any]]] = dict
    """The kernel with each configuration that is worth timing, by name."""


def prepare(case: Case, device: str, seed: int = 0) -> Prepared:
    """Operands on `device`, the reference, and all contestants that torch has.

    Raises:
        AssertionError: the bytes that the roofline counts are not those of the operands.
    """
    import torch

    make = {"W4A16Gemm": _w4a16, "W8A8Gemm": _w8a8, "W4A8Gemm": _w4a8, "SULQSoftmax": _softmax, "SULQSoftmaxCodes": _softmax,
            "SULQAttentionValue": _value}[case.operator]  # fmt: skip
    prepared = make(case, _Random(torch.Generator(device).manual_seed(seed), device))
    held = sum(tensor.numel() * tensor.element_size() for tensor in prepared.contestants[OURS].tensors)
    assert held == prepared.work.bytes, f"{case}: the operands have {held} bytes, counted were {prepared.work.bytes}"
    return prepared


@dataclass
class _Random:
    """Random tensors on a device."""

    generator: Any
    device: str

    def integers(self, low: int, high: int, shape: tuple[int, ...], dtype: Any) -> Any:
        import torch

        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=dtype)

    def normal(self, *shape: int) -> Any:
        import torch

        return torch.randn(shape, generator=self.generator, device=self.device)

    def near_one(self, *shape: int) -> Any:
        import torch

        return torch.rand(shape, generator=self.generator, device=self.device) + 0.5


def writing(case: Case, **options: Any) -> Callable[..., Any]:
    """The kernel as a function that returns its last operand, the result."""
    module, _, name = CATALOG[case.operator].partition(":")
    kernel = getattr(import_module(module), name)

    def run(*operands: Any) -> Any:
        kernel(*operands, **options)
        return operands[-1]

    return run


# ---- matrix products ------------------------------------------------------------------------------------------------


def unpacked(packed: Any, k: int) -> Any:
    """Codes [N, K], int8, of `int4-halves-v1` bytes: `graphq.ops_gemm.unpack_int4` for a tensor, not transposed."""
    import torch

    runs = packed.view(len(packed), -1, 1, RUN)
    return torch.cat([runs & 15, runs >> 4], dim=2).view(len(packed), -1)[:, :k].to(torch.int8) - OFFSET


def close_to(reference: Any, dtype: str, slack: float = 1) -> Judge:
    """Whether a result is `reference`, float64, but for `slack` times the rounding of `dtype`; NaN never is."""

    def judge(found: Any) -> tuple[float, bool]:
        apart = (found.double() - reference).abs_()
        error = float(apart.norm() / reference.norm())
        return error, error <= slack * NORM[dtype] and float(apart.max()) <= slack * WORST[dtype] * float(reference.abs().max())

    return judge


def exactly(reference: Any) -> Judge:
    """Whether integers are those of `reference`."""

    def judge(found: Any) -> tuple[float, bool]:
        error = float((found.double() - reference).abs().max())
        return error, error == 0

    return judge


def _dimensions(case: Case) -> tuple[int, int, int, int, Any]:
    import torch

    m, k, n = (case.sizes[key] for key in "mkn")
    return m, k, n, GROUP if k % GROUP == 0 else k, getattr(torch, case.dtype)


def _product(case: Case, work: Work, others: dict[str, Contestant], refused: dict[str, str], tensors: tuple[Any, ...],
             judge: Judge) -> Prepared:  # fmt: skip
    """The kernel on `tensors`, whose last is its poisoned result, beside the others."""
    from graphq.kernels._launch import arch_of, pick

    module, m = import_module(CATALOG[case.operator].partition(":")[0]), case.sizes["m"]
    config = pick(module.TABLE, arch_of(tensors[0]), m)
    ours = Contestant(writing(case), tensors, judge)
    return Prepared(work, {OURS: ours, **others}, refused, str(config),
                    lambda: {str(one): writing(case, config=one) for one in module.configs(m)})  # fmt: skip


def _poisoned(make: _Random, *shape: int, dtype: Any) -> Any:
    import torch

    return torch.full(shape, math.nan if dtype.is_floating_point else 85, dtype=dtype, device=make.device)


def _int4(make: _Random, k: int, n: int, g: int, dtype: Any) -> tuple[Any, Any, Any, Any]:
    """A packed weight, its scales of type `dtype`, its codes [N, K], and the weight itself [N, K], float64."""
    import torch

    packed = make.integers(0, 256, (n, packed_width(k)), torch.uint8)
    scale = (make.near_one(k // g, n) / (8 * math.sqrt(k))).to(dtype)
    codes = unpacked(packed, k)
    return packed, scale, codes, codes.double() * scale.double().T.repeat_interleave(g, dim=1)


def _w4a16(case: Case, make: _Random) -> Prepared:
    import torch

    m, k, n, g, dtype = _dimensions(case)
    x, bias = make.normal(m, k).to(dtype), make.normal(n).to(dtype)
    packed, scale, codes, weight = _int4(make, k, n, g, dtype)
    product = x.double() @ weight.T
    reference = product + bias.double()
    floats = (x, weight.to(dtype), bias)
    others = {CUBLAS: Contestant(torch.nn.functional.linear, floats, close_to(reference, case.dtype, LIBRARY))}
    refused = {}
    if dtype == torch.bfloat16:
        name = "torch._weight_int4pack_mm, no bias"
        try:  # takes bfloat16 only, and packs for CUDA only
            pairs = (codes[:, ::2] + OFFSET << 4 | codes[:, 1::2] + OFFSET).view(torch.uint8).contiguous()
            tiles = torch._convert_weight_to_int4pack(pairs, 8)
            both = torch.stack([scale, torch.zeros_like(scale)], dim=-1)
            others[name] = Contestant(lambda *t: torch._weight_int4pack_mm(t[0], t[1], g, t[2]), (x, tiles, both),
                                      close_to(product, case.dtype, LIBRARY))  # fmt: skip
        except (RuntimeError, NotImplementedError) as error:
            refused[name] = str(error).splitlines()[0][:200]
    tensors = (x, packed, scale, bias, _poisoned(make, m, n, dtype=dtype))
    return _product(case, roofline.w4a16(m, k, n, g, case.dtype), others, refused, tensors, close_to(reference, case.dtype))


def _w8a8(case: Case, make: _Random) -> Prepared:
    import torch

    m, k, n, g, dtype = _dimensions(case)
    x, weight = make.integers(-128, 128, (m, k), torch.int8), make.integers(-128, 128, (n, k), torch.int8)
    x_scale, w_scale = torch.tensor(1 / 64, device=make.device), make.near_one(n) / (64 * math.sqrt(k))
    bias = make.normal(n).to(dtype)
    sums = x.double() @ weight.double().T
    reference = sums * (x_scale.double() * w_scale.double()) + bias.double()
    judge, loose = close_to(reference, case.dtype), close_to(reference, case.dtype, LIBRARY)
    floats = ((x * x_scale).to(dtype), (weight * w_scale[:, None]).to(dtype), bias)
    others = {CUBLAS: Contestant(torch.nn.functional.linear, floats, loose)}
    refused: dict[str, str] = {}

    def rescaled(x: Any, weight: Any, x_scale: Any, w_scale: Any, bias: Any) -> Any:
        return (torch._int_mm(x, weight.t()).float() * (x_scale * w_scale) + bias).to(bias.dtype)

    if m > 16:
        others[f"{INT_MM}, sums only"] = Contestant(lambda x, weight: torch._int_mm(x, weight.t()), (x, weight), exactly(sums))
        others[f"{INT_MM}, rescaled"] = Contestant(rescaled, (x, weight, x_scale, w_scale, bias), judge)
    else:
        refused[INT_MM] = "takes more than 16 rows"
    tensors = (x, weight, x_scale, w_scale, bias, _poisoned(make, m, n, dtype=dtype))
    return _product(case, roofline.w8a8(m, k, n, case.dtype), others, refused, tensors, judge)


def _w4a8(case: Case, make: _Random) -> Prepared:
    import torch

    m, k, n, g, dtype = _dimensions(case)
    x, bias = make.integers(-128, 128, (m, k), torch.int8), make.normal(n).to(dtype)
    x_scale = make.near_one(m, 1) / 64
    packed, w_scale, codes, weight = _int4(make, k, n, g, torch.float32)
    reference = (x.double() @ weight.T) * x_scale.double() + bias.double()
    floats = ((x * x_scale).to(dtype), weight.to(dtype), bias)
    others = {CUBLAS: Contestant(torch.nn.functional.linear, floats, close_to(reference, case.dtype, LIBRARY))}
    refused: dict[str, str] = {}
    if m > 16:
        sums = x.double() @ codes.double().T
        others[f"{INT_MM}, sums only, no groups"] = Contestant(lambda x, codes: torch._int_mm(x, codes.t()), (x, codes), exactly(sums))
    else:
        refused[INT_MM] = "takes more than 16 rows"
    tensors = (x, packed, x_scale, w_scale, bias, _poisoned(make, m, n, dtype=dtype))
    return _product(case, roofline.w4a8(m, k, n, g, case.dtype), others, refused, tensors, close_to(reference, case.dtype))


# ---- attention ------------------------------------------------------------------------------------------------------


def _quantizer() -> tuple[Any, Any]:
    """A 4-bit quantizer for softmax weights, and its parameters."""
    from graphq.log_quantizers import LogUniform

    quantizer = LogUniform(4)
    return quantizer, quantizer.fit(np.geomspace(1e-4, 1, 1000, dtype=np.float32))


def _softmax(case: Case, make: _Random) -> Prepared:
    """Levels or packed codes, against the body of the operator in torch, each of its nodes a kernel."""
    import torch

    from graphq.ops_softmax import softmax_params

    batch, rows, columns, _ = case.sizes.values()
    packed, dtype = case.operator == "SULQSoftmaxCodes", getattr(torch, case.dtype)
    x = (3 * make.normal(batch, rows, columns)).to(dtype)
    params = torch.from_numpy(softmax_params(*_quantizer())).to(make.device)
    shift, center, scale, low, high = params.tolist()

    def code(weight: Any) -> Any:
        return (((weight + shift).log().clamp(low, high) - center) / scale).round()

    def body(x: Any) -> Any:
        codes = code(torch.softmax(x, -1, dtype=torch.float32))
        if not packed:
            return ((codes * scale + center).exp() - shift).to(x.dtype)
        nibbles = torch.nn.functional.pad(codes, (0, columns % 2), value=-8.0).to(torch.int8)
        return nibbles[..., ::2] & 15 | nibbles[..., 1::2] << 4

    expected = code(torch.softmax(x.double(), -1))

    def judge(found: Any) -> tuple[float, bool]:
        if packed:
            codes, exact = torch.stack([found << 4 >> 4, found >> 4], -1).flatten(-2)[..., :columns].double(), True
        else:
            shifted = found.double() + shift
            codes = ((shifted.log() - center) / scale).round()
            level = (codes * scale + center).exp()
            exact = bool(((shifted - level).abs() <= WORST[case.dtype] / 2 * level + 2.0**-24).all())
        apart = (codes - expected).abs()
        error = float(apart.mean())
        return error, exact and error <= OTHER_CODES and float(apart.max()) <= 1

    work = (roofline.softmax_codes if packed else roofline.softmax)(batch * rows, columns, case.dtype)
    out = _poisoned(make, batch, rows, -(-columns // 2) if packed else columns, dtype=torch.int8 if packed else dtype)
    contestants = {OURS: Contestant(writing(case), (x, params, out), judge), FORM: Contestant(body, (x,), judge),
                   "torch softmax alone": Contestant(lambda x: torch.softmax(x, -1), (x,))}  # fmt: skip
    if make.device == "cuda":
        contestants["torch.compile of both"] = Contestant(_compiled(body), (x,), judge)
    return Prepared(work, contestants, {})


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by torch.compile, at its first call, so that an error there is one of this contestant only."""
    made: list[Callable[..., Any]] = []

    def call(x: Any) -> Any:
        import torch

        if not made:
            torch.compiler.reset()  # it compiles one function for a few shapes only, and goes on without saying so
            made.append(torch.compile(function, dynamic=False))
        return made[0](x)

    return call


def _value(case: Case, make: _Random) -> Prepared:
    """Codes times values, against cuBLAS on weights that are there in full."""
    import torch

    from graphq.ops_softmax import code_levels

    batch, rows, columns, depth = case.sizes.values()
    dtype = getattr(torch, case.dtype)
    packed = make.integers(-128, 128, (batch, rows, -(-columns // 2)), torch.int8)
    levels = torch.from_numpy(code_levels(*_quantizer())).to(make.device)
    v = make.normal(batch, columns, depth).to(dtype)
    codes = torch.stack([packed << 4 >> 4, packed >> 4], -1).flatten(-2)[..., :columns]
    weight = levels[codes.int() + 8].to(dtype)
    reference = weight.double() @ v.double()
    out = _poisoned(make, batch, rows, depth, dtype=dtype)
    contestants = {
        OURS: Contestant(writing(case), (packed, levels, v, out), close_to(reference, case.dtype)),
        f"{CUBLAS}, weights not packed": Contestant(torch.matmul, (weight, v), close_to(reference, case.dtype, LIBRARY)),
    }
    return Prepared(roofline.attention_value(batch, rows, columns, depth, case.dtype), contestants, {})
