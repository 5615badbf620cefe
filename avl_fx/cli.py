"""The command line: ``avl env``, ``avl plan show|check|make``, ``avl explain``, ``avl calibrate``, ``avl eval``."""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from avl_fx import __version__, env_report
from avl_fx._factory import call_calibration_factory, call_evaluation_factory, call_factory
from avl_fx._messages import quote
from avl_fx._table import ascii_table, cell
from avl_fx._targets import Target
from avl_fx._words import count, percent, ranges
from avl_fx.calibrate import calibrated
from avl_fx.calibration_report import CalibrationReport
from avl_fx.errors import AvlError, CalibrationError, OptionError, PlanError
from avl_fx.evaluate import evaluate
from avl_fx.explain import FRONT_DOORS, explain
from avl_fx.plan import Plan

__all__ = ["app"]

FAILED, WRONG = 1, 2
"""Exit codes: the run stopped early; the request is wrong."""

app = typer.Typer(
    help="Attention of vision-language models, rewritten: inspect models, make plans, report bugs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
plan_app = typer.Typer(help="Make, show and check plans.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")

PlanArgument = Annotated[str, typer.Argument(metavar="PLAN", help="A plan file (JSON), or the name of a preset.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"avl_fx {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def env(as_json: AsJson = False) -> None:
    """Versions, processor, accelerator and compiler, to paste into a bug report."""
    report = env_report.collect()
    typer.echo(json.dumps(report, indent=2) if as_json else env_report.render(report))


# ---- plans -------------------------------------------------------------------------------------------------------


@plan_app.command("show")
def plan_show(plan: PlanArgument, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show what a plan says, and whether this version executes it."""
    with _one_line_errors(debug):
        found = Plan.resolve(plan)
        if as_json:
            typer.echo(found.to_json(), nl=False)
        else:
            _show(found)


@plan_app.command("check")
def plan_check(
    plan: PlanArgument,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Decoder layers of the model.")] = None,
    debug: Debug = False,
) -> None:
    """Check that a plan is valid, fits a model of so many layers, and is executed by this version."""
    with _one_line_errors(debug):
        found = Plan.resolve(plan)
        if layers is not None:
            found.check_depth(layers)
        found.check_supported()
    fits = "" if layers is None else f", fits {count(layers, 'decoder layer')}"
    _print(Text("ok", style="bold green"), Text(f": valid{fits}, executed by this version ({found})"))


@plan_app.command("make")
def plan_make(
    lazy: Annotated[
        list[str] | None,
        typer.Option("--lazy", metavar="FIRST-LAST", help="A lazy block, both ends included; may be repeated."),
    ] = None,
    mode: Annotated[str, typer.Option("--mode", help="What lazy layers inherit: gla, vla or vla_scores.")] = "gla",
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Decoder layers of the model.")] = None,
    description: Annotated[str, typer.Option("--description", help="Free text, for people.")] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: print it.")] = None,
    debug: Debug = False,
) -> None:
    """Make a plan of lazy blocks: avl plan make --lazy 4-12 --lazy 20-29 -o plan.json"""
    with _one_line_errors(debug):
        blocks = [_block(text) for text in lazy or []]
        if not blocks:
            raise PlanError("no block was given", field="--lazy", remedy="give at least one, for example --lazy 4-12")
        made = Plan.lazy(blocks, mode, num_layers=layers, description=description)  # type: ignore[arg-type]
        text = made.to_json(output)
    if output is None:
        typer.echo(text, nl=False)
    else:
        _print(Text("wrote", style="bold green"), Text(f" {output}: {made}"))


def _block(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*(\d+)\s*(?:-|\.\.|:)\s*(\d+)\s*", text)
    if found is None:
        raise PlanError(
            f"must be two layers, got {quote(text)}", field="--lazy", remedy="write FIRST-LAST, for example 4-12"
        )
    return int(found[1]), int(found[2])


def _show(plan: Plan) -> None:
    table = ascii_table("section", "setting", "value")
    for name in plan.SECTIONS:
        section = plan.section(name)
        for setting, value in section.model_dump(mode="json").items() if section is not None else ():
            table.add_row(name, setting, cell(_value(value)))
    if not table.rows:
        table.add_row("-", "-", "identity: nothing is left out")
    facts = [
        ("layers", "any" if plan.num_layers is None else str(plan.num_layers)),
        ("lossless", "yes" if plan.is_lossless else "no"),
        ("fingerprint", plan.fingerprint()),
        ("executed", _executed(plan)),
    ]
    if plan.lazy_policy is not None and plan.lazy_policy.blocks:
        anchors, lazy = plan.lazy_policy.anchors, plan.lazy_policy.lazy_layers
        facts.insert(1, ("anchors, lazy", f"{ranges(anchors)}; {ranges(lazy)} ({count(len(lazy), 'layer')})"))
    if plan.description:
        facts.insert(0, ("description", plan.description))
    width = max(len(name) for name, _ in facts)
    _print(table)
    for name, value in facts:
        _print(Text(f" {name:{width}}", style="dim"), cell(f"  {value}"))


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{first}-{last}" for first, last in value) or "none"
    return str(value)


def _executed(plan: Plan) -> str:
    try:
        plan.check_supported()
    except AvlError as error:
        return f"not by this version: {error.message}"
    return "by this version"


# ---- explain -----------------------------------------------------------------------------------------------------


@app.command("explain")
def explain_command(
    factory: Annotated[
        str,
        typer.Option(
            "--factory",
            "-f",
            metavar="MODULE:FUNCTION",
            help="Function without arguments that returns (model, inputs); also FILE.py:FUNCTION.",
        ),
    ],
    plan: Annotated[str | None, typer.Option("--plan", "-p", help="Plan file or preset; default: identity.")] = None,
    front_door: Annotated[
        str, typer.Option("--front-door", help=f"How it is compiled: {' or '.join(FRONT_DOORS)}.")
    ] = "torch.compile",
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens to generate.")] = 3,
    as_json: AsJson = False,
    dump: Annotated[
        Path | None, typer.Option("--dump", help="Folder for the report and every graph, before and after.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Run a model once and tell what became of every attention call.

    The inputs of the factory may hold "run", a loop of your own: run(model, **inputs).

    Exit code 1 when the run stopped early, 2 when the request is wrong.
    """
    with _one_line_errors(debug):
        model, inputs = call_factory(factory)
        settings: dict[str, Any] = {"front_door": front_door, "new_tokens": new_tokens, "keep_graphs": dump is not None}
        twice = sorted(inputs.keys() & {"plan", "compiler", *settings})
        if twice:
            raise OptionError(
                f"the inputs that {quote(factory)} returns hold {twice[0]!r}",
                field="--factory",
                remedy="return what the model takes, and give settings on the command line",
            )
        report = explain(model, plan, **settings, **inputs)
        if dump is not None:
            report.dump(dump)
    if as_json:
        typer.echo(report.to_json())
    else:
        typer.echo(str(report), nl=False)
    if report.stopped:
        raise typer.Exit(FAILED)


# ---- calibrate ---------------------------------------------------------------------------------------------------

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Names of images end like this, in either case."""


@app.command("calibrate")
def calibrate_command(
    factory: Annotated[
        str,
        typer.Option(
            "--factory",
            "-f",
            metavar="MODULE:FUNCTION",
            help="Function that returns (model, batches); without arguments, or of the paths of --images.",
        ),
    ],
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", help="Target: layers that differ from the one before by less (nats).")
    ] = None,
    lazy_share: Annotated[
        float | None, typer.Option("--lazy-share", help="Target: share of the decoder layers that are lazy.")
    ] = None,
    kv_saving: Annotated[
        float | None, typer.Option("--kv-saving", help="Target: share of the KV bytes that is saved.")
    ] = None,
    max_divergence: Annotated[
        float | None,
        typer.Option("--max-divergence", help="Target: most lazy layers within this sum of divergences (nats)."),
    ] = None,
    mode: Annotated[str, typer.Option("--mode", help="What lazy layers inherit: gla, vla or vla_scores.")] = "gla",
    vision: Annotated[bool, typer.Option("--vision", help="Add core and secondary shares of visual keys.")] = False,
    images: Annotated[
        Path | None, typer.Option("--images", metavar="DIR", help="Folder of images, whose paths the factory is given.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Batches to run at most.")] = None,
    compiler: Annotated[str, typer.Option("--compiler", help="eager, aot_eager or inductor.")] = "eager",
    state: Annotated[
        Path | None, typer.Option("--state", help="File to keep what is summed up in; an interrupted run goes on.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for plan.json, report.json, picture and page.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Find the layers that attend alike: avl calibrate -f my_models.py:llava --lazy-share 0.4 -o calibration

    Give exactly one target. Exit code 2 when the request is wrong.
    """
    targets = {
        "epsilon": epsilon,
        "lazy_share": lazy_share,
        "kv_saving": kv_saving,
        "max_divergence": max_divergence,
    }
    with _one_line_errors(debug):
        # Before the model is made, which may take minutes.
        Target.of(targets)
        paths = None if images is None else _images(images)
        model, batches = call_calibration_factory(factory, paths)
        report = calibrated(
            model,
            batches,
            targets,
            mode=mode,  # type: ignore[arg-type]
            vision=vision,
            limit=limit,
            compiler=compiler,
            state=state,
            report=output,
        )
    if as_json:
        typer.echo(report.to_json(), nl=False)
    else:
        _show_calibration(report, output)


def _images(folder: Path) -> list[Path]:
    """The images in ``folder`` itself, sorted by name."""
    if not folder.is_dir():
        missing = not folder.exists()
        raise CalibrationError(
            f"there is no folder {quote(folder)}" if missing else f"{quote(folder)} is no folder",
            field="--images",
            remedy="check its path" if missing else "name the folder that holds the images",
        )
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES and path.is_file())
    if not found:
        raise CalibrationError(
            f"there are no images in {quote(folder)} (looked for {', '.join(IMAGES)}, not in folders inside)",
            field="--images",
            remedy="name the folder that holds the images",
        )
    return found


def _show_calibration(report: CalibrationReport, output: Path | None) -> None:
    # Divergences from the layer before and from the anchor; no wider than 80 columns.
    table = ascii_table("layer", "kind", "role", "anchor", "adjacent", "to anchor", "visual", "core/sec.")
    for layer in report.layers:
        table.add_row(
            str(layer.layer),
            layer.kind or "-",
            layer.role,
            "-" if layer.anchor is None else str(layer.anchor),
            *("-" if n is None else f"{n:.4f}" for n in (layer.divergence_before, layer.divergence_anchor)),
            "-" if layer.visual_mass is None else percent(layer.visual_mass, 1),
            "-" if layer.ratios is None else f"{layer.ratios.core:g}/{layer.ratios.secondary:g}",
        )
    _print(table)
    savings, ratios = report.savings, report.ratios
    facts = [
        ("seen", f"{count(report.samples, 'prompt')} in {count(report.batches, 'batch')}"),
        ("lazy", f"{savings.lazy_layers} of {count(savings.layers, 'layer')}, {report.cost:.4g} nats in all"),
        ("KV bytes", f"{savings.kv_bytes_before} -> {savings.kv_bytes_after} a token"),
        ("linear calls", f"{savings.linears_before} -> {savings.linears_after} a forward"),
        ("visual keys", "none seen" if ratios is None else f"core {ratios.core:g}, secondary {ratios.secondary:g}"),
        ("plan", str(report.plan)),
        *(("warning", warning) for warning in report.warnings),
        *([] if output is None else [("wrote", f"{output / 'plan.json'}, {output / 'report.html'}")]),
    ]
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        _print(Text(f" {name:{width}}", style="dim"), cell(f"  {value}"))


# ---- eval --------------------------------------------------------------------------------------------------------


@app.command("eval")
def eval_command(
    factory: Annotated[
        str,
        typer.Option(
            "--factory",
            "-f",
            metavar="MODULE:FUNCTION",
            help="Function without arguments that returns (model, EvaluationTask); also FILE.py:FUNCTION.",
        ),
    ],
    plans: Annotated[
        list[str] | None,
        typer.Option("--plan", "-p", metavar="[NAME=]PLAN", help="Plan file or preset; may be repeated."),
    ] = None,
    compact: Annotated[bool, typer.Option("--compact", help="Run plans on an AVLCache.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", help="Batches to answer at most.")] = None,
    compiler: Annotated[str, typer.Option("--compiler", help="eager, aot_eager or inductor.")] = "eager",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for answers, table and picture; a second run goes on.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Answer questions dense and under plans, and compare: avl eval -f my_models.py:llava -p plan.json -o evaluation

    Exit code 2 when the request is wrong.
    """
    with _one_line_errors(debug):
        named = _named_plans(plans or [])
        model, task = call_evaluation_factory(factory)
        report = evaluate(model, task, named, compiler=compiler, compact=compact, output=output, limit=limit)
    typer.echo(report.to_json() if as_json else str(report), nl=False)


def _named_plans(given: list[str]) -> dict[str, Plan]:
    """``NAME=PLAN`` or ``PLAN``, whose name is then that of the file."""
    found: dict[str, Plan] = {}
    for text in given:
        name, equals, plan = text.partition("=")
        plan = plan if equals else text
        name = name if equals else Path(text).stem
        if name in found:
            raise OptionError(f"two plans are called {quote(name)}", field="--plan", remedy="name them: NAME=PLAN")
        found[name] = Plan.resolve(plan)
    if not found:
        raise OptionError("no plan was given", field="--plan", remedy="give at least one, for example -p plan.json")
    return found


# ---- output ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    """Errors as one line on stderr and exit code 2; with ``debug`` as they are."""
    try:
        yield
    except Exception as error:
        if debug:
            raise
        if isinstance(error, AvlError):
            message = str(error)
        else:
            lines = str(error).strip().splitlines()
            message = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            message += " (--debug shows the traceback)"
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(Text("error: ", style="bold red").append(Text(" ".join(message.split()), style="red")))
        raise typer.Exit(WRONG) from None


def _print(*parts: Any) -> None:
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    console.print(*parts, sep="")
