"""Gates: what a result has to reach before it is written where it was asked for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as options

from graphq.errors import VerifyError

if TYPE_CHECKING:
    from graphq.report import Accuracy, Latency, OutputComparison


@options(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Gates:
    """Limits; a result that misses one is kept aside. None means: not asked for.

    Attributes:
        min_sqnr_db: Signal to quantization noise of each output against the original model, in dB.
        max_accuracy_drop: Points of top-1 accuracy that may be lost on the evaluation set.
        max_perplexity_ratio: Perplexity of the result over that of the original, on an evaluation set with labels of tokens.
        min_speedup: Latency of the original over latency of the result for one sample, measured on the target.
        min_cosine: Cosine similarity of each output with that of the original model.
        max_size_ratio: Size of the result, without the report in it, over that of the original file; what is larger is refused unless
            this says more.
    """

    min_sqnr_db: float | None = None
    max_accuracy_drop: Annotated[float, Field(ge=0)] | None = None
    max_perplexity_ratio: Annotated[float, Field(gt=0)] | None = None
    min_speedup: Annotated[float, Field(gt=0)] | None = None
    min_cosine: Annotated[float, Field(ge=-1, le=1)] | None = None
    max_size_ratio: Annotated[float, Field(gt=0)] | None = 1.0


@dataclass(frozen=True)
class GateResult:
    """One limit of the recipe and what was measured."""

    name: str
    limit: float
    value: float
    passed: bool


def check(gates: Gates, comparison: Sequence[OutputComparison], latency: Latency | None, accuracy: Accuracy | None,
          size_ratio: float | None = None) -> tuple[GateResult, ...]:  # fmt: skip
    """Every limit against what was measured; one that nothing measured is left out."""
    lost = 100 * (accuracy.reference - accuracy.result) if accuracy is not None else None
    rows: list[tuple[str, float | None, float | None, int]] = [
        ("min_sqnr_db", gates.min_sqnr_db, min((entry.sqnr_db for entry in comparison), default=float("inf")), 1),
        ("min_cosine", gates.min_cosine, min((entry.cosine for entry in comparison), default=1.0), 1),
        ("min_speedup", gates.min_speedup, latency.speedup if latency is not None else None, 1),
        ("max_accuracy_drop", gates.max_accuracy_drop, lost, -1),
        ("max_perplexity_ratio", gates.max_perplexity_ratio, accuracy.perplexity_ratio if accuracy is not None else None, -1),
        ("max_size_ratio", gates.max_size_ratio, size_ratio, -1),
    ]
    return tuple(
        GateResult(name, limit, value, (value - limit) * sign >= 0)
        for name, limit, value, sign in rows
        if limit is not None and value is not None
    )


_HINTS = {
    "min_speedup": "`graphq inspect --kernels` on the refused result shows what stays float; --gate min_speedup=off accepts it",
    "max_size_ratio": "too little of this model is made smaller by this recipe; --gate max_size_ratio=off accepts it",
}


def require_passed(found: Sequence[GateResult], asked: Collection[str] = ()) -> None:
    """Raises VerifyError naming the gates that were missed; `asked` are those that the user gave instead of the recipe."""
    missed = [gate for gate in found if not gate.passed]
    if missed:
        rows = "; ".join(f"{gate.name} is {gate.limit:g}, measured {gate.value:.4g}" for gate in missed)
        other = f"use more calibration data or another recipe, or give --gate {missed[0].name}=VALUE"
        owner = "that was asked for" if {gate.name for gate in missed} <= set(asked) else "of the recipe"
        raise VerifyError(f"The result misses a gate {owner}.", where=rows, hint=_HINTS.get(missed[0].name, other))
