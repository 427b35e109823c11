"""What is asked of a conversion, and whether it can be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from graphq import accuracy, targets
from graphq.engines import ENGINE_SUFFIXES, EngineOptions
from graphq.errors import RecipeError, UsageError
from graphq.gates import Gates
from graphq.recipe import Recipe
from graphq.targets import Target

Emit = Literal["onnx", "engine"]


@dataclass(frozen=True)
class Request:
    """What `graphq.convert` was called with, apart from the model and its data."""

    plan: Recipe
    target: Target
    emit: Emit
    out: Path
    engine: EngineOptions | None
    limits: Mapping[str, float | None]

    @property
    def limits_size(self) -> bool:
        """Whether there is a limit on the size: code makes an engine larger than its weights, so that the default is not for it."""
        return self.emit == "onnx" or "max_size_ratio" in self.limits or self.plan.gates.max_size_ratio != Gates().max_size_ratio

    def check(self, evaluate: object) -> None:
        """Refuse what cannot be done before anything is read."""
        if self.limits.get("min_speedup") is not None and not self.target.measures_speed:
            raise UsageError(
                f"The speed of {self.target.name} cannot be measured here.", where="--gate min_speedup", expected="--target onnxruntime",
                hint="leave the gate out, and run `graphq bench` where the result is to run",
            )  # fmt: skip
        if self.emit == "engine" and not self.target.builds_engines:
            engines = " or ".join(name for name, entry in targets.TARGETS.items() if entry.builds_engines)
            raise UsageError(
                f"Target {self.target.name} has no engines.", where="--emit engine", expected=f"--target {engines}", hint="or --emit onnx"
            )
        if self.emit == "engine":
            from graphq.backends import tensorrt

            tensorrt.load_package(self.target)
        is_engine_name = self.out.suffix.lower() in ENGINE_SUFFIXES
        if is_engine_name and self.emit != "engine" or self.out.suffix.lower() == ".onnx" and self.emit == "engine":
            raise UsageError(
                f"The name of the result is that of {'an engine' if is_engine_name else 'an ONNX model'}, and it is to be the other.",
                where=str(self.out), expected=f"--emit engine with {', '.join(ENGINE_SUFFIXES)}, --emit onnx with .onnx",
            )  # fmt: skip
        if self.engine is not None and self.emit != "engine":
            raise UsageError(
                "There is no engine to build.", where="--engine or --shape", expected="--emit engine", hint="or leave the options out"
            )
        lacks = [f"{name}: {why}" for name, why in self.target.engine_lacks.items() if getattr(self.engine, name, None)]
        if lacks:
            raise UsageError(f"{self.target.name} does not have this engine option.", where="; ".join(lacks))
        self.require_labels(evaluate)
        if not self.plan.passes or self.plan.passes[0].name != "normalize":
            raise RecipeError(
                "The first pass of the recipe is not normalize.", where=f"recipe {self.plan.name}",
                expected="- normalize before all others, which rely on the form it gives to a model",
            )  # fmt: skip

    def require_labels(self, evaluation: object) -> None:
        """Refuse a limit on what `evaluation`, a file or what was read from it, cannot measure."""
        of_samples = isinstance(evaluation, accuracy.Labelled) and evaluation.labels.ndim == 1
        for name, lacks in (("max_accuracy_drop", evaluation is None), ("max_perplexity_ratio", evaluation is None or of_samples)):
            if lacks and getattr(self.plan.gates, name) is not None:
                what, labels = ("perplexity", "labels [samples, tokens]") if "perplexity" in name else ("accuracy", "labels")
                given = name in self.limits
                where, out = (f"--gate {name}", "leave the gate out") if given else (f"gate {name} of the recipe", f"--gate {name}=off")
                raise UsageError(
                    f"The loss of {what} is limited, but there is nothing to measure it on.", where=where,
                    expected=f"--eval FILE.npz with inputs and {labels}", hint=f"give --eval, or {out}",
                )  # fmt: skip
