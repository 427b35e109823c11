"""The command `graphq sensitivity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphq import console
from graphq.cli_options import Calib, Debug, Json, Model, Preprocess, Seed, TargetName, Widths, print_json
from graphq.errors import UsageError


def sensitivity(
    model: Model,
    calib: Calib = None,
    preprocess: Preprocess = None,
    target: TargetName = "onnxruntime",
    bits: Widths = "8,6,4",
    samples: Annotated[int, typer.Option(min=1, help="Measure on at most so many samples.")] = 16,
    write_recipe: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="Write int8 with the worst layers left float.")] = None,
    keep_float: Annotated[int | None, typer.Option(min=0, help="How many layers the recipe leaves float.")] = None,
    min_sqnr: Annotated[float | None, typer.Option(help="Or: leave those float that alone take the outputs below so many dB.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what quantizing each layer of MODEL would cost."""
    from graphq.backends import files
    from graphq.sensitivity import keeping_float
    from graphq.sensitivity import sensitivity as measure

    _check_recipe_options(write_recipe, keep_float, min_sqnr)
    if write_recipe is not None:
        files.check_output(write_recipe, [model, *(Path(one) for one in (calib, preprocess) if one is not None)])
    with console.progress_bar() as progress:
        found = measure(model, calib=calib, preprocess=preprocess, target=target, bits=bits, samples=samples, seed=seed, progress=progress)
    if as_json:
        print_json(found)
    else:
        console.sensitivities(found)
    if write_recipe is not None:
        worst = found.layers[:keep_float] if min_sqnr is None else [layer for layer in found.layers if layer.output_db < min_sqnr]
        if len(worst) == len(found.layers):
            raise UsageError(
                "Nothing would be quantized: every layer stays float.", where=str(write_recipe), expected="fewer layers to keep"
            )
        names = list(dict.fromkeys(layer.given_name for layer in worst))  # several may be parts of one layer
        with files.pending(write_recipe) as part:
            part.write_text(keeping_float(names, target).to_yaml(), encoding="utf-8")
        console.say(f"{write_recipe}: the recipe int8 with {len(names)} layers left float", stderr=as_json)


def _check_recipe_options(path: Path | None, keep_float: int | None, min_sqnr: float | None) -> None:
    """Refuse before anything is measured what could not be written."""
    given = [name for name, value in (("--keep-float", keep_float), ("--min-sqnr", min_sqnr)) if value is not None]
    if len(given) != (path is not None):
        raise UsageError("It is not clear which layers the recipe leaves float.", where=" ".join(given) or "--write-recipe",
                         expected="--write-recipe with either --keep-float or --min-sqnr")  # fmt: skip
    if path is not None and (path.suffix.lower() not in (".yaml", ".yml") or not path.absolute().parent.is_dir()):
        raise UsageError("The recipe cannot be written there.", where=str(path), expected="a .yaml file in a folder that exists")
