"""The command `graphq synthesize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphq import console
from graphq.cli_options import Debug, Json, Model, Preprocess, Quiet, Seed, one_of, print_json
from graphq.errors import UsageError

if TYPE_CHECKING:
    from graphq.synthesis import SynthesisFacts


STRATEGY_NAMES = ("auto", "tokens", "bn-stats", "vit-attention", "clip", "patch-similarity", "logits", "natural")
"""`graphq.synthesis.STRATEGIES`, known without importing it."""


def parse_option(text: str) -> tuple[str, Any]:
    """`NAME=VALUE`, the value as YAML reads it."""
    import yaml

    name, equals, value = text.partition("=")
    try:
        if equals and name.strip():
            return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        pass
    raise typer.BadParameter(f"{text!r} is no option. Write it as NAME=VALUE.")


Options = Annotated[
    list[Any] | None,
    typer.Option("--option", metavar="NAME=VALUE", parser=parse_option, help="Of the strategy, such as soft_labels=false; repeatable."),
]  # fmt: skip


def synthesize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the data goes, an .npz.")],
    strategy: Annotated[str, one_of("strategy", STRATEGY_NAMES, "How; auto takes what fits the model, and says why.")] = "auto",
    option: Options = None,
    count: Annotated[int, typer.Option(min=1, help="Samples to make.")] = 64,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of optimisation a batch; the strategy's own number without it.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples that are optimised together.")] = None,
    preprocess: Preprocess = None,
    sheet: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Write a contact sheet of the images.")] = None,
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="Where torch computes; a GPU without it, if there is one.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make calibration data from MODEL alone.

    A run that was interrupted goes on where it stopped when the same command is given again: what is done lies in a folder
    beside the result, named OUT.part, until the result is there.
    """
    from graphq import ir
    from graphq.backends import files
    from graphq.preprocess import declared_preprocess
    from graphq.synthesis import choose, resume
    from graphq.synthesis import synthesize as run
    from graphq.synthesis.inputs import image_input
    from graphq.synthesis.sheet import contact_sheet

    for path, suffix, name in ((out, ".npz", "--out"), (sheet, ".png", "--sheet")):
        if path is not None and path.suffix.lower() != suffix:
            raise UsageError("The name of the file does not say what it is.", where=f"{name} {path}", expected=f"a name with {suffix}")
    loaded = ir.load(model)
    for path in (out, sheet):
        if path is not None:
            files.check_output(path, [model, *ir.data_files(loaded), *([Path(preprocess)] if preprocess is not None else [])])
    options = dict(option or ())
    chosen, why = choose(loaded, strategy, options)
    image = None if sheet is None else image_input(ir.inputs(loaded), declared_preprocess(loaded.metadata_props, preprocess))
    if not quiet:
        console.say(f"{chosen.name}: {why}", stderr=True)
    kept = out.with_name(f"{out.name}.part")
    with console.progress_bar(enabled=not quiet) as progress:
        made = run(loaded, chosen.name, options=options, count=count, steps=steps, batch=batch, seed=seed, preprocess=preprocess,
                   device=device, resume=kept, progress=progress)  # fmt: skip
    with files.pending(out) as part:
        with part.open("wb") as file:
            resume.write_npz(file, made)
    if sheet is not None and image is not None:
        with files.pending(sheet) as part:
            part.write_bytes(contact_sheet(made[image.name], image))
    resume.clear(kept)
    if as_json:
        print_json(made.facts)
    elif not quiet:
        _show(made.facts, out, sheet)


def _show(facts: SynthesisFacts, out: Path, sheet: Path | None) -> None:
    console.say(f"{out}: {facts.count} samples from {facts.description}, {facts.seconds:.0f} s", style="bold")
    if facts.last:
        rows = [(name, f"{facts.first[name]:.4g}", f"{value:.4g}") for name, value in facts.last.items()]
        console.table(("loss", ("first step", "right"), ("last step", "right")), rows)
    if sheet is not None:
        console.say(f"contact sheet: {sheet}")
