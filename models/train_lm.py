"""Train `digits_lm`, export it, and check the ONNX file against torch: `python -m graphq.models.train_lm`. See `train.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor
from torch.nn import functional

from . import digits_lm
from .digits_lm_net import DigitsLm
from .train import MAX_DIFFERENCE, strip

OPSET, IR_VERSION = 21, 10
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 1500, 16, 3e-3, 0.1
SEED = 0


def train(steps: int = STEPS) -> DigitsLm:
    """A model trained on random windows of the training blocks by AdamW under a one-cycle learning rate, in eval mode."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the order of sums, hence the result, depends on it
    model = DigitsLm().train()
    text = torch.from_numpy(digits_lm.blocks("train"))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    total = 0.0
    for step in range(steps):
        inputs, labels = sample(text)
        logits = model(inputs, *past(len(inputs)))[0]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 100 == 99:
            print(f"step {step + 1}/{steps}: loss {total / 100:.4f}", flush=True)
            total = 0.0
    return model.eval()


def sample(text: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and labels (16, 128) from random places of random blocks."""
    rows = torch.randint(len(text), (BATCH, 1))
    places = torch.randint(text.shape[1] - digits_lm.CONTEXT, (BATCH, 1)) + torch.arange(digits_lm.CONTEXT + 1)
    found = text[rows, places]
    return found[:, :-1], found[:, 1:]


def past(batch: int, tokens: int = 0) -> list[Tensor]:
    """The cache of `tokens` tokens, zeros."""
    return [torch.zeros(batch, digits_lm.HEADS, tokens, digits_lm.HEAD_SIZE) for _ in digits_lm.PAST_NAMES]


def export(model: DigitsLm, path: Path) -> None:
    """Write the model as one self-contained ONNX file with dynamic batch, tokens and length of the cache."""
    batch, tokens, before = (torch.export.Dim(name) for name in ("batch", "sequence", "past"))
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 5, dtype=torch.int64), *past(2, 3)),
        dynamo=True,
        opset_version=OPSET,
        input_names=[digits_lm.INPUT_NAME, *digits_lm.PAST_NAMES],
        output_names=["logits", *digits_lm.PRESENT_NAMES],
        dynamic_shapes=({0: batch, 1: tokens}, tuple({0: batch, 2: before} for _ in digits_lm.PAST_NAMES)),
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    proto.ir_version = IR_VERSION
    strip(proto)
    for dim in [dim for output in proto.graph.output for dim in output.type.tensor_type.shape.dim]:
        if " + " in dim.dim_param:
            dim.dim_param = "past+sequence"  # in one order, whichever the exporter found
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def check(model: DigitsLm, path: Path) -> None:
    """Compare ONNX Runtime with torch on held-out text, and print size, difference and perplexity."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = digits_lm.windows("test")[0][:16]
    with torch.inference_mode():
        expected = model(torch.from_numpy(inputs), *past(len(inputs)))[0].numpy()
    (logits,) = session.run(["logits"], {digits_lm.INPUT_NAME: inputs, **digits_lm.empty_past(len(inputs))})
    difference = float(np.abs(np.asarray(logits) - expected).max())
    if difference > MAX_DIFFERENCE:
        raise RuntimeError(f"{path.name}: ONNX Runtime differs from torch by {difference:.2e}, over {MAX_DIFFERENCE}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{path.name}: {parameters} parameters, {path.stat().st_size} bytes, max |ort - torch| {difference:.1e}")
    test, trained = (digits_lm.perplexity(session, split) for split in ("test", "train"))
    print(f"{path.name}: perplexity {test:.3f} on the test split, {trained:.3f} on the train split")


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module; see its docstring."""
    parser = argparse.ArgumentParser(prog="python -m graphq.models.train_lm", description="Train and export digits_lm.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for digits_lm.onnx")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(arguments)
    path = options.out / "digits_lm.onnx"
    model = train(options.steps)
    export(model, path)
    check(model, path)


if __name__ == "__main__":
    main()
