"""What `gpu.py` runs: cases, their operands, who takes part, and what each must compute. Imports torch and the kernels when asked for.

Operands are random and never zeros. The reference is float64 on the same device. Competitors get the same weights, dequantized where they
need it, in the layout that they like best; what one computes less than the kernel is in its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import roofline
from roofline import CUBLAS, FORM, INT_MM, OURS, Work

from graphq.kernels import CATALOG
from graphq.ops import OFFSET, RUN, packed_width

GROUP = 128
ROWS = (1, 16, 256, 4096)
LLM = {"8B attention": (4096, 4096), "8B up": (4096, 14336), "8B down": (14336, 4096), "70B up": (8192, 28672)}
VIT = {"ViT-B qkv": (768, 2304), "ViT-B fc1": (768, 3072), "ViT-L fc2": (4096, 1024)}
"""K and N of one linear layer."""
ATTENTION = {"ViT-B, 64 images": (768, 197, 197, 64), "ViT-L at 384, 8 images": (128, 577, 577, 64), "8B prefill, 2048": (32, 2048, 2048, 128),
             "8B decode, 64 x 8192": (2048, 1, 8192, 128)}  # fmt: skip
"""Heads of all samples, queries, keys, width of a value."""
NORM = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5}
"""What the error may be, as a share of the reference's norm: weights and results are each rounded to 11 or 8 bits."""
WORST = {"float16": 2.0**-8, "bfloat16": 2.0**-5, "float32": 2.0**-14}
"""Of a single entry, as a share of the largest."""
OTHER_CODES = 1e-3
"""Share of codes that may be the next one, because sums are made in another order."""

Judge = Callable[[Any], tuple[float, bool]]


@dataclass(frozen=True)
class Case:
    """One kernel on one shape.

    Attributes:
        operator: Of `graphq.kernels.CATALOG`.
        family: `llm` or `vit`.
        sizes: m, k, n, or batch, rows, columns, depth.
    """

    operator: str
    family: str
    shape: str
    dtype: str
    sizes: dict[str, int]

    @property
    def kernel(self) -> str:
        return CATALOG[self.operator].rpartition(":")[2]

    @property
    def target(self) -> bool:
        """Whether a target speaks of it."""
        m = self.sizes.get("m")
        return self.kernel == "sulq_softmax" or (self.kernel, m, self.family) == ("w4a16_gemm", 1, "llm") or (self.kernel, m) == (
            "w8a8_gemm", 4096)  # fmt: skip


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
    candidates: Callable[[], Iterator[tuple[str, Callable[..., Any]]]] | None = None


def cases() -> list[Case]:
    """All, those with a target first, few rows before many."""
    out = []
    for family, layers in (("llm", LLM), ("vit", VIT)):
        for shape, (k, n) in layers.items():
            for m in ROWS:
                sizes = {"m": m, "k": k, "n": n}
                out += [Case(operator, family, shape, "float16", sizes) for operator in ("W4A16Gemm", "W8A8Gemm", "W4A8Gemm")]
                out += [Case("W4A16Gemm", family, shape, "bfloat16", sizes)]
    for shape, (batch, rows, columns, depth) in ATTENTION.items():
        sizes = {"batch": batch, "rows": rows, "columns": columns, "depth": depth}
        family = "vit" if shape.startswith("ViT") else "llm"
        out += [Case("SULQSoftmax", family, shape, dtype, sizes) for dtype in ("float16", "float32")]
        out += [Case(operator, family, shape, "float16", sizes) for operator in ("SULQSoftmaxCodes", "SULQAttentionValue")]
    return sorted(out, key=lambda case: (not case.target, case.sizes.get("m", 2)))


def tiny_cases() -> list[Case]:
    """Every path of `cases` in sizes for Triton's interpreter."""
    products = [Case(operator, "llm", "tiny", dtype, {"m": m, "k": 256, "n": 64}) for operator, dtype in
                (("W4A16Gemm", "float16"), ("W4A16Gemm", "bfloat16"), ("W8A8Gemm", "float16"), ("W4A8Gemm", "float16")) for m in (1, 24)]  # fmt: skip
    sizes = {"batch": 2, "rows": 5, "columns": 37, "depth": 16}
    attention = [("SULQSoftmax", "float16"), ("SULQSoftmax", "float32"), ("SULQSoftmaxCodes", "float16"), ("SULQAttentionValue", "float16")]
    return products + [Case(operator, "vit", "tiny", dtype, sizes) for operator, dtype in attention]


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


# ---- matrix products ------------------------------------------------------------------------------------------------


def unpacked(packed: Any, k: int) -> Any:
    """Codes [N, K], int8, of `int4-halves-v1` bytes: `graphq.ops.unpack_int4` for a tensor, not transposed."""
    import torch

    runs = packed.view(len(packed), -1, 1, RUN)
    return torch.cat([runs & 15, runs >> 4], dim=2).view(len(packed), -1)[:, :k].to(torch.int8) - OFFSET


def close_to(reference: Any, dtype: str) -> Judge:
    """Whether a result is `reference`, float64, but for rounding; NaN never is."""

    def judge(found: Any) -> tuple[float, bool]:
        apart = (found.double() - reference).abs_()
        error = float(apart.norm() / reference.norm())
        return error, error <= NORM[dtype] and float(apart.max()) <= WORST[dtype] * float(reference.abs().max())

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
    module = import_module(CATALOG[case.operator].partition(":")[0])
    kernel, m = getattr(module, case.kernel), case.sizes["m"]
    from graphq.kernels._launch import arch_of, pick

    def call(config: Any) -> Callable[..., Any]:
        def run(*operands: Any) -> Any:
            kernel(*operands, config=config)
            return operands[-1]

        return run

    def candidates() -> Iterator[tuple[str, Callable[..., Any]]]:
        for config in module.configs(m):
            yield str(config), call(config)

    config = pick(module.TABLE, arch_of(tensors[0]), m)
    return Prepared(work, {OURS: Contestant(call(None), tensors, judge), **others}, refused, str(config), candidates)


def _poisoned(make: _Random, *shape: int, dtype: Any) -> Any:
    import torch

    return torch.full(shape, math.nan if dtype.is_floating_point else 85, dtype=dtype, device=make.device)


def _w4a16(case: Case, make: _Random) -> Prepared:
    import torch

    m, k, n, g, dtype = _dimensions(case)
    x, bias = make.normal(m, k).to(dtype), make.normal(n).to(dtype)
    packed = make.integers(0, 256, (n, packed_width(k)), torch.uint8)
    scale = (make.near_one(k // g, n) / (8 * math.sqrt(k))).to(dtype)
    codes = unpacked(packed, k)
    weight = codes.double() * scale.double().T.repeat_interleave(g, dim=1)
    product = x.double() @ weight.T
    judge = close_to(product + bias.double(), case.dtype)
    others = {f"{CUBLAS} {case.dtype}": Contestant(torch.nn.functional.linear, (x, weight.to(dtype), bias), judge)}
    del weight
    refused = {}
    if dtype == torch.bfloat16:
        name = "torch._weight_int4pack_mm, no bias"
        try:  # takes bfloat16 only, and packs for CUDA only
            pairs = (codes[:, ::2] + OFFSET << 4 | codes[:, 1::2] + OFFSET).view(torch.uint8).contiguous()
            tiles = torch._convert_weight_to_int4pack(pairs, 8)
            both = torch.stack([scale, torch.zeros_like(scale)], dim=-1)
            others[name] = Contestant(lambda *t: torch._weight_int4pack_mm(t[0], t[1], g, t[2]), (x, tiles, both),
                                      close_to(product, case.dtype))  # fmt: skip
        except (RuntimeError, NotImplementedError) as error:
            refused[name] = str(error).splitlines()[0][:200]
    tensors = (x, packed, scale, bias, _poisoned(make, m, n, dtype=dtype))
    return _product(case, roofline.w4a16(m, k, n, g, case.dtype), others, refused, tensors, judge)


def _w8a8(case: Case, make: _Random) -> Prepared:
    import torch

    m, k, n, g, dtype = _dimensions(case)
    x, weight = make.integers(-128, 128, (m, k), torch.int8), make.integers(-128, 128, (n, k), torch.int8)
    x_scale, w_scale = torch.tensor(1 / 64, device=make.device), make.near_one(n) / (64 * math.sqrt(k))
    bias = make.normal(n).to(dtype)
    sums = x.double() @ weight.double().T
    judge = close_to(sums * (x_scale.double() * w_scale.double()) + bias.double(), case.dtype)
    floats = ((x * x_scale).to(dtype), (weight * w_scale[:, None]).to(dtype), bias)
    others = {f"{CUBLAS} {case.dtype}": Contestant(torch.nn.functional.linear, floats, judge)}
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
    packed = make.integers(0, 256, (n, packed_width(k)), torch.uint8)
    x_scale, w_scale = make.near_one(m, 1) / 64, make.near_one(k // g, n) / (8 * math.sqrt(k))
    codes = unpacked(packed, k)
    weight = codes.double() * w_scale.double().T.repeat_interleave(g, dim=1)
    judge = close_to((x.double() @ weight.T) * x_scale.double() + bias.double(), case.dtype)
    others = {f"{CUBLAS} {case.dtype}": Contestant(torch.nn.functional.linear, ((x * x_scale).to(dtype), weight.to(dtype), bias), judge)}
    del weight
    refused: dict[str, str] = {}
    if m > 16:
        sums = x.double() @ codes.double().T
        others[f"{INT_MM}, sums only, no groups"] = Contestant(lambda x, codes: torch._int_mm(x, codes.t()), (x, codes), exactly(sums))
    else:
        refused[INT_MM] = "takes more than 16 rows"
    tensors = (x, packed, x_scale, w_scale, bias, _poisoned(make, m, n, dtype=dtype))
    return _product(case, roofline.w4a8(m, k, n, g, case.dtype), others, refused, tensors, judge)


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
    contestants = {OURS: Contestant(_writing(case), (x, params, out), judge), FORM: Contestant(body, (x,), judge),
                   "torch softmax alone": Contestant(lambda x: torch.softmax(x, -1), (x,))}  # fmt: skip
    if make.device == "cuda":
        contestants["torch.compile of both"] = Contestant(torch.compile(body, dynamic=False), (x,), judge)
    return Prepared(work, contestants, {})


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
    judge = close_to(weight.double() @ v.double(), case.dtype)
    out = _poisoned(make, batch, rows, depth, dtype=dtype)
    contestants = {OURS: Contestant(_writing(case), (packed, levels, v, out), judge),
                   f"{CUBLAS} {case.dtype}, weights not packed": Contestant(torch.matmul, (weight, v), judge)}  # fmt: skip
    return Prepared(roofline.attention_value(batch, rows, columns, depth, case.dtype), contestants, {})


def _writing(case: Case) -> Callable[..., Any]:
    """The kernel as a function that returns its last operand, the result."""
    kernel = getattr(import_module(CATALOG[case.operator].partition(":")[0]), case.kernel)

    def run(*operands: Any) -> Any:
        kernel(*operands)
        return operands[-1]

    return run
