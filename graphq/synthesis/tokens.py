"""Token sequences for language models: what the model itself writes (self-generated data of LLM-QAT, arXiv 2305.17888).

A model that predicts the next token has learnt what texts look like: the first token is any, the next few are the most likely ones, the
others are drawn from its predictions. Encoders predict no token, and nothing in them tells which follow each other: they get random tokens
in sequences of random lengths, which is all that can be had from them. Models run in ONNX Runtime; torch is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
from pydantic import Field

from graphq import ir
from graphq.arrays import is_float
from graphq.calibration import fixed_batch
from graphq.errors import ModelError
from graphq.executor import Executor, Fetch
from graphq.preprocess import format_shape
from graphq.spec import ModelInput
from graphq.synthesis.strategy import Arrays, Batch, Maker, Positive, Strategy, Task, strategy_options

PROBE = 6
"""Tokens on which a model shows whether it looks ahead."""


@strategy_options
class Tokens(Strategy):
    """Sequences that the model writes; a step is a token, so that `steps` is their length (unless the model fixes it).

    Attributes:
        greedy: Tokens after the first that are the most likely ones. More of them repeat what training texts begin with.
        temperature: Divides the logits that tokens are drawn from: lower ones keep to what is likely.
    """

    name = "tokens"
    steps = 64

    greedy: Annotated[int, Field(ge=0)] = 3
    temperature: Positive = 1.0

    def evidence(self, model: ir.Model) -> str:
        found = _text(model)
        if found.writes:
            return f"output {found.logits!r} predicts the next of {found.vocabulary} tokens: sequences are the model's own"
        return f"an encoder predicts no token: sequences are RANDOM ones of its {found.vocabulary}, of random lengths"

    def steps_for(self, model: ir.Model) -> int:
        fixed = _text(model).length
        return self.steps if fixed is None else fixed

    def prepare(self, task: Task) -> Maker:
        found = _text(task.model)
        if found.length not in (None, task.steps):
            raise ModelError("The model takes sequences of one length.", where=f"{found.length} tokens, {task.steps} steps were asked for",
                             expected=f"{found.length} steps, a token each")  # fmt: skip
        return partial(self._write, found, Executor(task.model, [Fetch(found.logits)]), task.steps) if found.writes else partial(
            _random, found, task.steps)  # fmt: skip

    def _write(self, text: Text, executor: Executor, steps: int, batch: Batch) -> Arrays:
        kept = batch.state() if batch.state is not None else {}
        tokens = kept.get("tokens", np.zeros((len(batch.samples), steps), text.tokens.dtype)).copy()
        chance = kept.get("chance", np.zeros(len(batch.samples)))
        for step in range(batch.step, steps):
            shown = text.length or step
            logits = executor.run(text.feeds(tokens[:, :shown]))[0][:, step - 1].astype(np.float64) if step else np.zeros((
                len(batch.samples), text.vocabulary))  # fmt: skip
            shares = _softmax(logits / self.temperature)
            tokens = tokens.copy()
            for row, sample in enumerate(batch.samples):
                likely = 0 < step <= self.greedy
                tokens[row, step] = shares[row].argmax() if likely else batch.generator(sample, step).choice(text.vocabulary, p=shares[row])
            chance = chance - np.log(shares[np.arange(len(tokens)), tokens[:, step]])
            batch.finish_step({"nats a token": float(chance.mean() / (step + 1))}, partial(dict, tokens=tokens, chance=chance))
        return text.feeds(tokens)


@dataclass(frozen=True)
class Text:
    """What a language model takes and gives.

    Attributes:
        tokens: The input of token ids `[batch, sequence]`.
        length: Of sequences, if the model takes one only.
        logits: Output `[batch, sequence, vocabulary]`; empty if there is none.
        writes: Whether that predicts the next token.
    """

    inputs: tuple[ModelInput, ...]
    tokens: ModelInput
    length: int | None
    logits: str = ""
    writes: bool = False

    @property
    def vocabulary(self) -> int:
        return self.tokens.limit or 0

    def feeds(self, tokens: np.ndarray, lengths: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """All inputs for `tokens` `[B, T]`; behind `lengths` `[B]` nothing counts."""
        return {one.name: tokens if one is self.tokens else _companion(one, tokens, lengths) for one in self.inputs}


def _text(model: ir.Model) -> Text:
    """Raises ModelError if the model does not take tokens."""
    inputs = ir.inputs(model)
    found = [one for one in inputs if one.dtype.kind in "iu" and one.shape and len(one.shape) == 2 and one.limit
             and not any(word in one.name.lower() for word in ("type", "segment", "mask", "position"))]  # fmt: skip
    if len(found) != 1:
        raise ModelError("The model does not take tokens.", where=f"{len(found)} inputs of integers that are looked up in a table")
    length = found[0].shape[1]  # type: ignore[index]
    text = Text(inputs, found[0], length if isinstance(length, int) else None)
    text.feeds(np.zeros((1, text.length or PROBE), found[0].dtype))
    for output in model.graph.outputs:
        shape = ir.shape_of(output)
        if shape is not None and len(shape) == 3 and shape[2] == text.vocabulary:
            logits = output.name or ""
            return Text(text.inputs, text.tokens, text.length, logits, _never_looks_ahead(model, text, logits))
    return text


def _never_looks_ahead(model: ir.Model, text: Text, logits: str) -> bool:
    """Whether predictions stay as they are when later tokens change: those of masked language models do not."""
    executor, length = Executor(model, [Fetch(logits)], prepack=False), text.length or PROBE
    tokens = np.arange(length)[None].repeat(fixed_batch(text.inputs) or 1, axis=0) % text.vocabulary
    other = tokens.copy()
    other[:, length // 2 :] = (other[:, length // 2 :] + 1) % text.vocabulary
    one, two = (executor.run(text.feeds(each.astype(text.tokens.dtype)))[0][0, : length // 2] for each in (tokens, other))
    return bool(np.allclose(one, two, rtol=1e-3, atol=1e-3))


def _companion(one: ModelInput, tokens: np.ndarray, lengths: np.ndarray | None) -> np.ndarray:
    """An input beside the tokens: a mask, types of tokens, positions, or what is kept of earlier ones, which is nothing."""
    name, (count, length) = one.name.lower(), tokens.shape
    ends = np.full(count, length) if lengths is None else lengths
    if one.shape is not None and len(one.shape) == 2 and not is_float(one.dtype):
        if "mask" in name or one.dtype == np.bool_:
            return (np.arange(length) < ends[:, None]).astype(one.dtype)
        if "type" in name or "segment" in name:
            return np.zeros((count, length), one.dtype)
        if "position" in name:
            return np.tile(np.arange(length, dtype=one.dtype), (count, 1))
    if one.shape is not None and len(one.shape) == 4 and is_float(one.dtype) and not isinstance(one.shape[2], int):
        return np.zeros((count, one.shape[1], 0, one.shape[3]), one.dtype)  # type: ignore[arg-type]
    where = f"input {one.name!r}: {one.dtype}{format_shape(one.shape)}"
    raise ModelError("It is not known what the model wants beside tokens.", where=where, expected="masks, types, positions, or a cache")


def _random(text: Text, steps: int, batch: Batch) -> Arrays:
    """Random tokens; where a mask can say so, the first half and more of a sequence counts."""
    rows = [batch.generator(sample).integers(0, text.vocabulary, steps) for sample in batch.samples]
    lengths = np.array([batch.generator(sample, 1).integers((steps + 1) // 2, steps, endpoint=True) for sample in batch.samples])
    masked = any("mask" in one.name.lower() for one in text.inputs)
    tokens = np.stack(rows) * ((np.arange(steps) < lengths[:, None]) if masked else 1)
    return text.feeds(tokens.astype(text.tokens.dtype), lengths if masked else None)


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))
