"""The cases that `gpu.py` runs: kernels on the layers of language models and vision transformers."""

from __future__ import annotations

from dataclasses import dataclass

from graphq.kernels import CATALOG

ROWS = (1, 16, 256, 4096)
LLM = {"8B attention": (4096, 4096), "8B up": (4096, 14336), "8B down": (14336, 4096), "70B up": (8192, 28672)}
VIT = {"ViT-B qkv": (768, 2304), "ViT-B fc1": (768, 3072), "ViT-L fc2": (4096, 1024)}
"""K and N of one linear layer."""
ATTENTION = {
    "ViT-B, 64 images": (768, 197, 197, 64), "ViT-L at 384, 8 images": (128, 577, 577, 64), "8B prefill, 2048": (32, 2048, 2048, 128),
    "8B decode, 64 x 8192": (2048, 1, 8192, 128),
}  # fmt: skip
"""Heads of all samples, queries, keys, width of a value."""


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


def cases() -> list[Case]:
    """All, those with a target first, few rows before many."""
    out = []
    for family, layers in (("llm", LLM), ("vit", VIT)):
        for shape, (k, n) in layers.items():
            for m in ROWS:
                sizes = {"m": m, "k": k, "n": n}
                out += [Case(operator, family, shape, "float16", sizes) for operator in ("W4A16Gemm", "W8A8Gemm", "W4A8Gemm")]
                out += [Case("W4A16Gemm", family, shape, "bfloat16", sizes)] if family == "llm" else []
    for shape, (batch, rows, columns, depth) in ATTENTION.items():
        sizes = {"batch": batch, "rows": rows, "columns": columns, "depth": depth}
        family = "vit" if shape.startswith("ViT") else "llm"
        out += [Case("SULQSoftmax", family, shape, dtype, sizes) for dtype in ("float16", "float32")]
        out += [Case(operator, family, shape, "float16", sizes) for operator in ("SULQSoftmaxCodes", "SULQAttentionValue")]
    return sorted(out, key=lambda case: (not case.target, case.sizes.get("m", 2)))


def tiny_cases() -> list[Case]:
    """Every path of `cases` in sizes for Triton's interpreter."""
    products = [("W4A16Gemm", "float16"), ("W4A16Gemm", "bfloat16"), ("W8A8Gemm", "float16"), ("W4A8Gemm", "float16")]
    attention = [("SULQSoftmax", "float16"), ("SULQSoftmax", "float32"), ("SULQSoftmaxCodes", "float16"), ("SULQAttentionValue", "float16")]
    out = [Case(operator, "llm", "tiny", dtype, {"m": m, "k": 256, "n": 64}) for operator, dtype in products for m in (1, 24)]
    sizes = {"batch": 2, "rows": 5, "columns": 37, "depth": 16}
    return out + [Case(operator, "vit", "tiny", dtype, sizes) for operator, dtype in attention]
