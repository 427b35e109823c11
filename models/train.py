"""Train a model of the zoo, export it, and check the ONNX file against torch: `python -m graphq.models.train NAME`.

The seed is fixed, so one machine repeats itself; another CPU rounds differently and may end a few images away.
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch.nn import functional

from . import digits

OPSET = 20
IR_VERSION = 10
MAX_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class Recipe:
    """How one model is trained and exported.

    `target` is "module:class" inside this package. `keep_norms` leaves out the exporter's rewrites, which would fold
    each BatchNorm into its convolution, and only folds constants.
    """

    target: str
    epochs: int
    learning_rate: float
    keep_norms: bool = False
    weight_decay: float = 0.05
    batch: int = 64
    seed: int = 0

    def build(self) -> nn.Module:
        module, name = self.target.split(":")
        return getattr(importlib.import_module(f".{module}", __package__), name)()


RECIPES = {
    "digits_vit": Recipe("digits_vit:DigitsVit", epochs=40, learning_rate=1e-3, batch=32),
    "digits_cnn": Recipe("digits_cnn:DigitsCnn", epochs=15, learning_rate=3e-3, keep_norms=True),
}


def train(recipe: Recipe) -> nn.Module:
    """A model trained on the train split by AdamW under a one-cycle learning rate, in eval mode."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(2)  # the order of sums, hence the result, depends on it
    model = recipe.build().train()
    inputs, labels = (torch.from_numpy(array) for array in digits.images("train"))
    steps = -(-len(labels) // recipe.batch)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, epochs=recipe.epochs, steps_per_epoch=steps, pct_start=0.2
    )
    for epoch in range(recipe.epochs):
        total = 0.0
        for rows in torch.randperm(len(labels)).split(recipe.batch):
            loss = functional.cross_entropy(model(augment(inputs[rows])), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch + 1}/{recipe.epochs}: loss {total / len(labels):.4f}", flush=True)
    return model.eval()


def augment(inputs: Tensor) -> Tensor:
    """Randomly shift (3 pixels), turn (10 degrees) and scale (10 %) each image; (N, 1, 32, 32) to the same."""
    count = len(inputs)
    angle = (torch.rand(count) * 2 - 1) * np.deg2rad(10)
    scale = 1 + (torch.rand(count) * 2 - 1) * 0.1
    shift = (torch.rand(count, 2) * 2 - 1) * 3 / (digits.IMAGE_SIZE / 2)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(inputs.shape), align_corners=False)
    # Border padding continues the paper (-1); zero padding would draw a grey frame.
    return functional.grid_sample(inputs, grid, padding_mode="border", align_corners=False)


def export(model: nn.Module, path: Path, keep_norms: bool = False, *, name: str = digits.INPUT_NAME, example: Tensor | None = None,
           output: str = "logits") -> None:  # fmt: skip
    """Write a model of one input, images unless there is an `example`, as one self-contained ONNX file.

    Its batch is dynamic, and it has no trace of this machine.
    """
    if example is None:
        example = torch.zeros(2, 1, digits.IMAGE_SIZE, digits.IMAGE_SIZE)
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=[name],
        output_names=[output],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        optimize=not keep_norms,
        verbose=False,
    )
    assert program is not None
    if keep_norms:
        fold_constants(program.model)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(program.model)
        RemoveUnusedNodesPass()(program.model)
    proto = program.model_proto
    proto.ir_version = IR_VERSION
    strip(proto)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def strip(proto: onnx.ModelProto) -> None:
    """Remove doc strings and metadata, where the exporter leaves stack traces and paths of the build machine."""
    graph = proto.graph
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for item in (proto, graph, *graph.node, *values):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")


def check(model: nn.Module, path: Path, inputs: np.ndarray) -> onnxruntime.InferenceSession:
    """The session of an exported model, which has one input and output; prints size and difference from torch, and refuses a large one."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = model(torch.from_numpy(inputs)).numpy()
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs})
    difference = float(np.abs(np.asarray(found) - expected).max())
    if difference > MAX_DIFFERENCE:
        raise RuntimeError(f"{path.name}: ONNX Runtime differs from torch by {difference:.2e}, over {MAX_DIFFERENCE}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{path.name}: {parameters} parameters, {path.stat().st_size} bytes, max |ort - torch| {difference:.1e}")
    return session


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module; see its docstring."""
    parser = argparse.ArgumentParser(prog="python -m graphq.models.train", description="Train and export a model.")
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for NAME.onnx")
    options = parser.parse_args(arguments)
    path = options.out / f"{options.name}.onnx"
    recipe = RECIPES[options.name]
    model = train(recipe)
    export(model, path, recipe.keep_norms)
    session = check(model, path, digits.images("test")[0])
    print(f"{path.name}: {digits.accuracy(session):.2f} % on the test split")


if __name__ == "__main__":
    main()
