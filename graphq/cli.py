"""The command line. Whatever is slow to import is imported by the command that needs it: `graphq --help` loads none of it."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from graphq import __version__, console
from graphq.backends import files
from graphq.cli_bench import bench
from graphq.cli_options import (
    ARRAYS,
    Calib,
    Debug,
    EmitKind,
    EngineTexts,
    Evaluate,
    Json,
    Limits,
    MemoryBudget,
    Model,
    Preprocess,
    Quiet,
    Seed,
    Shapes,
    TargetName,
    print_json,
)
from graphq.cli_sensitivity import sensitivity
from graphq.cli_synthesize import synthesize
from graphq.errors import GraphqError, UsageError, VerifyError

if TYPE_CHECKING:
    from graphq.report import Report

app = typer.Typer(
    name="graphq", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Makes ONNX models smaller and faster, and shows that they still work.",
)  # fmt: skip
recipes = typer.Typer(rich_markup_mode=None, help="List or show the built-in recipes.")
passes = typer.Typer(rich_markup_mode=None, help="List the passes, or show the options of one.")
app.add_typer(recipes, name="recipes", invoke_without_command=True)
app.add_typer(passes, name="passes", invoke_without_command=True)

def _show_version(wanted: bool) -> None:
    if wanted:
        console.say(f"graphq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    pass


# ---- commands -------------------------------------------------------------------------------------------------------


@app.command()
def convert(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the result goes.")],
    recipe: Annotated[str, typer.Option(help="A built-in recipe (see `graphq recipes`) or a YAML file.")] = "int8",
    calib: Calib = None,
    preprocess: Preprocess = None,
    target: TargetName = "onnxruntime",
    emit: EmitKind = "onnx",
    engine: EngineTexts = None,
    shape: Shapes = None,
    gate: Limits = None,
    evaluate: Evaluate = None,
    report: Annotated[Path | None, typer.Option(help="Folder for report.json.")] = None,
    seed: Seed = 0,
    memory_budget: MemoryBudget = 2 << 30,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make MODEL smaller and faster by a recipe."""
    from graphq.convert import convert as run
    from graphq.data import SYNTH
    from graphq.engines import parse_options
    from graphq.report import check_folder

    if report is not None:
        check_folder(report)
    if str(calib) == SYNTH and not quiet:
        console.say("Synthesizing calibration data; `graphq synthesize` does it apart, with --count and --steps.", stderr=True)
    kind, settings = cast(Literal["onnx", "engine"], emit), parse_options(engine or (), shape or ())
    try:
        with console.progress_bar(enabled=not quiet) as progress:
            result = run(
                model, out, recipe=recipe, calib=calib, preprocess=preprocess, target=target, emit=kind, limits=dict(gate or ()),
                evaluate=evaluate, engine=settings, report_dir=report, seed=seed, memory_budget=memory_budget,
                command=shlex.join(["graphq", *context.obj]), progress=progress,
            )  # fmt: skip
    except VerifyError as error:
        if error.report is not None:
            _show_report(error.report, report, as_json=as_json, quiet=quiet)
        raise
    _show_report(result, report, as_json=as_json, quiet=quiet)


def _show_report(result: Report, folder: Path | None, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        sys.stdout.write(result.to_json() + "\n")
    elif not quiet:
        console.summary(result, None if folder is None else folder / "report.json")
    if as_json and not quiet:
        for note in result.notes:
            console.say(f"Note: {note}", style="bold yellow", stderr=True)


@app.command()
def inspect(
    model: Model,
    kernels: Annotated[bool, typer.Option("--kernels", help="Ask ONNX Runtime which nodes it computes on integers.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="List the operators with weights by name.")] = False,
    sparsity: Annotated[bool, typer.Option("--sparsity", help="Show the zeros of the weights: how many, in which pattern, where.")] = False,
    target: TargetName = "onnxruntime",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what is in MODEL and what fits it."""
    from graphq.inspect import inspect as look

    found, more = look(model, target), dict[str, Any]()
    if kernels:
        from graphq.kernels_used import kernels as kernels_of

        more["kernels"] = kernels_of(model)
    if sparsity:
        from graphq.sparsity import find_zeros

        more["sparsity"] = find_zeros(model)
    if as_json:
        print_json({"model": found, **more})
        return
    console.inspection(found, more.get("kernels"), layers=layers)
    if sparsity:
        from graphq.console_sparsity import show

        show(more["sparsity"])


@app.command()
def compare(
    model_a: Annotated[Path, typer.Argument(metavar="A", help="The original ONNX file.")],
    model_b: Annotated[Path, typer.Argument(metavar="B", help="The ONNX file to compare with it.")],
    data: Annotated[Path | None, typer.Option(help=f"Inputs: {ARRAYS}. Random without it.")] = None,
    preprocess: Preprocess = None,
    samples: Annotated[int, typer.Option(min=1, help="Use at most so many samples.")] = 64,
    layers: Annotated[bool, typer.Option("--layers", help="Compare every value that both models have; worst first.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show how far the outputs of B are from those of A."""
    from graphq.inspect import compare_files

    found, described = compare_files(model_a, model_b, data, preprocess=preprocess, samples=samples, layers=layers, seed=seed)
    if as_json:
        print_json({"a": str(model_a), "b": str(model_b), "data": described, "comparison": found})
        return
    console.say(f"{model_b} against {model_a}, {described}", style="bold")
    console.comparisons(found)
    if data is None:
        console.say("Note: these are RANDOM inputs; give --data for numbers that mean something.", style="bold yellow")


app.command()(bench)


app.command()(sensitivity)


app.command()(synthesize)


@app.command()
def planes(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A result of the recipe nested-8-6-4-2, or of the pass digit-planes.")],
    bits: Annotated[int, typer.Option(min=1, max=8, help="How many bits of each weight to keep.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the result goes.")],
    debug: Debug = False,
) -> None:
    """Keep the leading bits of weights that are stored in planes: a smaller file of the same model."""
    from graphq import disk, ir
    from graphq.planes import select
    from graphq.report import file_facts

    found = ir.load(model)
    before = file_facts(model, found).bytes
    files.check_output(out, [model, *ir.data_files(found)])
    select(found, bits)
    with disk.room(out.parent, ir.weight_bytes(found)), files.pending(out) as part:
        ir.save(found, part)
        after = files.written_bytes(part)
    console.say(f"{model} -> {out}: {bits} bits a weight, {console.size(before)} -> {console.size(after)}", style="bold")


@app.command()
def report(model: Annotated[Path, typer.Argument(metavar="MODEL", help="A converted ONNX file, a report.json, or the folder of one.")],
           as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Show how a converted model was made."""
    found = _read_report(model)
    if as_json:
        sys.stdout.write(found.to_json() + "\n")
        return
    console.provenance(found)


def _read_report(path: Path) -> Report:
    from graphq.report import Report, file_facts, read_embedded

    path = path / "report.json" if path.is_dir() else path
    if path.suffix.lower() != ".json":
        from graphq import ir

        model = ir.load(path)
        return replace(read_embedded(model, str(path)), output=file_facts(path, model))
    try:
        return Report.from_json(path.read_text(encoding="utf-8"), where=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("The report cannot be read.", where=f"{path}: {error}", expected="a report.json, or a converted model") from error


@recipes.callback()
def list_recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        from graphq.recipe import builtin_recipes

        console.table(("recipe", ""), builtin_recipes().items())


@recipes.command("show")
def show_recipe(name: Annotated[str, typer.Argument(metavar="NAME")], debug: Debug = False) -> None:
    """Print a built-in recipe as YAML, to copy and edit."""
    from graphq.recipe import recipe_text

    sys.stdout.write(recipe_text(name))


@recipes.command("schema")
def recipe_schema(debug: Debug = False) -> None:
    """Print the JSON schema of recipe files, with which editors complete and check them."""
    from graphq.recipe import recipe_schema as schema

    print_json(schema())


@passes.callback()
def list_passes(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        from graphq.inspect import pass_summaries

        console.table(("pass", ""), pass_summaries().items())


@passes.command("show")
def show_pass(name: Annotated[str, typer.Argument(metavar="NAME")], debug: Debug = False) -> None:
    """Show what a pass does, and its options with types and defaults."""
    from graphq.inspect import pass_options

    about, options = pass_options(name)
    console.say(f"{name}: {about}\n")
    console.table(("option", "type", "default", ""), [(one.name, one.type, one.default, one.about) for one in options])


# ---- running --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the model, data or recipe is at fault, 2 usage, 3 verification failed, 130, 143 stopped."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    files.exit_when_terminated()
    try:
        app(args=arguments, prog_name="graphq", obj=arguments)
    except SystemExit as stop:
        if stop.code == 130:
            console.say("Interrupted.", stderr=True)
        raise
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        console.say(_message(error), stderr=True)
        sys.exit(error.exit_code if isinstance(error, GraphqError) else 1)


def _message(error: Exception) -> str:
    if isinstance(error, GraphqError):
        return "\n".join([f"Error: {error}", *getattr(error, "__notes__", [])])
    if isinstance(error, MemoryError):
        return f"Error: out of memory. {error}\n  try: a smaller --memory-budget, or fewer calibration samples"
    if isinstance(error, OSError) and error.strerror:
        return f"Error: {error.strerror}.\n  where: {error.filename or 'a temporary file'}"
    return f"Error: this is a bug in graphq: {type(error).__name__}: {error}\n  try: run it again with --debug and report what that prints"
