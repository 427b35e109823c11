"""What one conversion did, as data: the records behind report.json, the summary table, and the copy inside the model.

JSON has no infinities: they and NaN are written as the strings `"inf"`, `"-inf"` and `"nan"`, and read back as numbers.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from graphq import ir
from graphq.engines import EngineFacts
from graphq.errors import GraphqError, ModelError, UsageError
from graphq.gates import GateResult
from graphq.pipeline import PassRecord
from graphq.synthesis import SynthesisFacts

SCHEMA = 1
"""Version of the layout. A field that older readers may ignore does not raise it; anything else does."""

METADATA_KEY = "graphq.report"
EMBED_LIMIT = 64 << 10
"""Bytes of JSON that a model carries at most, as long as leaving out what is said per node makes it fit."""

WEIGHT_ONLY = frozenset({"GatherBlockQuantized", "MatMulBnb4", "MatMulNBits"})
"""Kernels that read integer weights and compute on floats."""

_DISTRIBUTIONS = ("numpy", "onnx", "onnx-ir", "onnxruntime")


@dataclass(frozen=True)
class FileFacts:
    """A model file: `bytes` with its external data, `parameters` the elements of all its constants.

    `sha256` (of the .onnx file) is empty in the copy inside the model, which cannot state its own hash.
    """

    path: str
    sha256: str
    bytes: int
    opset: int
    parameters: int


@dataclass(frozen=True)
class CalibrationFacts:
    """Where the samples came from: a kind of `graphq.calibration`, one line, how many, and their hash.

    `used` says whether a pass read them; otherwise they served for verification alone. `synthesis` tells how they were made, if they
    were made from the model.
    """

    kind: str
    description: str
    samples: int
    digest: str
    used: bool = True
    synthesis: SynthesisFacts | None = None


@dataclass(frozen=True)
class OutputComparison:
    """One output of the result against the same output of the original, over all held-out samples.

    Attributes:
        sqnr_db: Power of the original over power of the difference, in decibel; infinite if there is no difference.
        cosine: Of the flattened outputs, mean over samples.
        max_abs: Largest difference of one element.
        top1_agreement: Share of samples with the same largest element, of tokens for logits [samples, tokens, vocabulary]; None if the
            output does not look like classes.
    """

    name: str
    sqnr_db: float
    cosine: float
    max_abs: float
    top1_agreement: float | None = None


@dataclass(frozen=True)
class Latency:
    """The fastest of several runs side by side in one process; `speedup` is `reference_ms / result_ms`."""

    batch: int
    reference_ms: float
    result_ms: float
    speedup: float
    runtime: str
    threads: int


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers, 0 to 1, over the samples of the evaluation set.

    Attributes:
        tokens: How many tokens were judged, if each has its label; perplexity is measured then.
        reference_perplexity, result_perplexity: exp of the mean negative log-likelihood of the labels.
    """

    metric: str
    reference: float
    result: float
    samples: int
    tokens: int | None = None
    reference_perplexity: float | None = None
    result_perplexity: float | None = None

    @property
    def perplexity_ratio(self) -> float | None:
        """By how much perplexity grew; None if it was not measured."""
        before, after = self.reference_perplexity, self.result_perplexity
        return None if before is None or after is None else after / before


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything there is to say about one conversion.

    Attributes:
        graphq: Version that wrote it.
        created: ISO 8601 with time zone.
        command: The command line, if there was one.
        recipe: The full recipe as YAML; `recipe_name` is its built-in name or file name.
        comparison: On `held_out` samples; none of them was seen by a statistic, unless a note says so.
        quantized: Nodes that became quantized, by operator type; the reasons of the others are in `passes`.
        weight_bytes_before, weight_bytes_after: Of the weights that were quantized, scales included.
        integer_kernels: Nodes that the runtime executes on integers, by kernel (see `graphq.kernels_used`).
        engine: What the builder of the engine made of the model, if one was built.
        versions: Of Python and the packages that did the work.
        seconds: Time by stage.
        notes: What the user must not overlook, such as calibration without real data.
    """

    schema: int = SCHEMA
    graphq: str
    created: str
    seed: int
    command: str | None
    model: FileFacts
    output: FileFacts
    recipe: str
    recipe_name: str
    target: str
    calibration: CalibrationFacts
    passes: tuple[PassRecord, ...]
    comparison: tuple[OutputComparison, ...]
    latency: Latency | None = None
    accuracy: Accuracy | None = None
    quantized: Mapping[str, int] = field(default_factory=dict)
    weight_bytes_before: int = 0
    weight_bytes_after: int = 0
    integer_kernels: Mapping[str, int] = field(default_factory=dict)
    engine: EngineFacts | None = None
    gates: tuple[GateResult, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    held_out: int = 0

    @property
    def kernels(self) -> Mapping[str, Mapping[str, int]]:
        """`integer_kernels` by whether activations are integers too."""
        kinds = {"integer": False, "weight-only": True}
        found = {kind: {name: count for name, count in self.integer_kernels.items() if (name in WEIGHT_ONLY) == only}
                 for kind, only in kinds.items()}  # fmt: skip
        return {kind: counts for kind, counts in found.items() if counts}

    def to_json(self, *, indent: int | None = 2) -> str:
        separators = (",", ":") if indent is None else None
        return json.dumps(plain(self), indent=indent, separators=separators, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, *, where: str = "") -> Report:
        """Read what `to_json` wrote; `where` names its source in errors. Fields that are not known here are ignored."""
        from pydantic import TypeAdapter, ValidationError

        try:
            data = json.loads(text)
        except ValueError as error:
            raise _unreadable(f"it is not JSON ({error})", where) from error
        if not isinstance(data, dict) or "schema" not in data:
            raise _unreadable("it states no schema", where)
        if data["schema"] != SCHEMA:
            raise GraphqError(
                f"The report has schema {data['schema']!r}, this graphq reads schema {SCHEMA}.", where=where,
                hint=f"use the graphq that wrote it ({data.get('graphq', 'unknown version')}), or convert the model again",
            )  # fmt: skip
        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            first = error.errors()[0]
            raise _unreadable(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", where) from error


def _unreadable(why: str, where: str) -> GraphqError:
    return GraphqError(f"This is not a graphq report: {why}.", where=where, expected="JSON as graphq convert --report writes it",
                       hint="convert the model again")  # fmt: skip


def plain(value: Any) -> Any:
    """Records and option values in the types that JSON has. Option values that it does not know become their text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(entry) for entry in value)
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return str(value)


# ---- facts to fill a report with -----------------------------------------------------------------------------------


def file_facts(path: str | os.PathLike[str], model: ir.Model, size: int | None = None) -> FileFacts:
    """Facts about the file that `model` was read from, or was written to with `size` bytes in all."""
    path = Path(path)
    size = path.stat().st_size + sum(file.stat().st_size for file in ir.data_files(model)) if size is None else size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return FileFacts(str(path), digest.hexdigest(), size, ir.opset(model), parameters(model))


def parameters(model: ir.Model) -> int:
    """Elements of all constants: initializers and Constant nodes."""
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    lifted = [ir.constant(node.outputs[0]) for node in ir.all_nodes(model) if node.op_type == "Constant"]
    return sum(tensor.size for tensor in [*tensors, *lifted] if tensor is not None)


def tool_versions() -> dict[str, str]:
    """Versions of Python and of the packages whose behaviour a result depends on."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# ---- where a report is kept ----------------------------------------------------------------------------------------


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse a report folder that could not be written, before any work is done; nothing is created."""
    folder = Path(folder).absolute()
    nearest = next(path for path in [folder, *folder.parents] if path.exists())
    if not nearest.is_dir():
        raise _unwritable(folder, f"{nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _unwritable(folder, f"{nearest} cannot be written to")


def _unwritable(folder: Path, why: str) -> UsageError:
    return UsageError(f"The report cannot be written: {why}.", where=str(folder), expected="a folder that can be written to",
                      hint="give another folder as --report")  # fmt: skip


def write(report: Report, folder: str | os.PathLike[str]) -> Path:
    """Write report.json into `folder`, which is made if need be; the file appears complete or not at all."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(folder / "report.json", report.to_json() + "\n")
    except OSError as error:
        raise _unwritable(folder, str(error.strerror)) from error
    return folder / "report.json"


def _write_atomically(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def embed(model: ir.Model, report: Report) -> None:
    """Put the report into the model's metadata, without what tells about the machine that made it.

    Folders, the command line and times are left out, so that the same model, data, recipe and seed give the same bytes.
    """
    made = report.calibration.synthesis
    report = replace(
        report,
        created="",
        command=None,
        latency=None,
        gates=tuple(gate for gate in report.gates if gate.name not in ("min_speedup", "max_size_ratio")),
        seconds={},
        passes=tuple(replace(record, seconds=0.0) for record in report.passes),
        model=replace(report.model, path=Path(report.model.path).name),
        output=replace(report.output, path=Path(report.output.path).name, sha256=""),
        calibration=replace(report.calibration, description=f"{report.calibration.samples} samples, {report.calibration.kind}",
                            synthesis=made and replace(made, seconds=0.0, sheet=None)),
    )
    text = report.to_json(indent=None)
    for bulky in ("measurements", "notes", "skipped"):
        if len(text.encode()) > EMBED_LIMIT:
            report = replace(report, passes=tuple(replace(record, **{bulky: ()}) for record in report.passes))  # type: ignore[arg-type]
            text = report.to_json(indent=None)
    model.metadata_props[METADATA_KEY] = text


def embedded_bytes(model: ir.Model) -> int:
    """Bytes of the report that `embed` left in a model."""
    return len(model.metadata_props.get(METADATA_KEY, "").encode())


def read_embedded(model: ir.Model, where: str = "") -> Report:
    """The report that `embed` left in a model."""
    text = model.metadata_props.get(METADATA_KEY)
    if text is None:
        raise ModelError("The model carries no graphq report.", where=where, expected="a model that graphq convert wrote",
                         hint="give the converted model, not the original")  # fmt: skip
    return Report.from_json(text, where=where)
