"""The commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from . import cases, providers, shapes
from . import models as real
from . import sweep as sweeps
from .environment import ROOT
from .networks import NETWORKS, parse
from .ops import OPS, op

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()
if not console.is_terminal:
    console = Console(width=150)
QUICK_SECONDS = 60.0
QUICK_TRAFFIC_SECONDS = 100.0
QUICK_TRAFFIC = ("se", "cbam", "sse", "scse", "se+residual+relu", "cbam+residual+relu", "eca")


def _several(
    text: str | None, default: tuple[str, ...], known: tuple[str, ...] | None = None, check: Callable[[str], object] = op
) -> tuple[str, ...]:
    """A comma list from the command line; check raises ValueError for a name that is none, where there is no list of those known."""
    names = tuple(part.strip() for part in text.split(",") if part.strip()) if text else default
    for name in names:
        if known is None:
            try:
                check(name)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
        elif name not in known:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}")
    return names


def _batches(text: str | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """A comma list of batch sizes."""
    if not text:
        return default
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise typer.BadParameter(f"{text!r} is not a comma list of batch sizes")
    return sizes


def _device(asked: str | None) -> str:
    device = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter("device is cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this torch sees no GPU")
    return device


@app.command()
def sweep(
    csv: Annotated[Path, typer.Option(help="where the rows go; an interrupted run of the same command goes on in it")],
    ops: Annotated[str | None, typer.Option(help=f"comma list of ops: {', '.join(OPS)}, or any block with +residual and an activation")] = None,
    sets: Annotated[str | None, typer.Option(help=f"comma list of shape sets: {', '.join(shapes.SETS)}")] = None,
    dtypes: Annotated[str | None, typer.Option(help=f"comma list of {', '.join(cases.DTYPES)}")] = None,
    layouts: Annotated[str | None, typer.Option(help=f"comma list of {', '.join(cases.LAYOUTS)}")] = None,
    modes: Annotated[str | None, typer.Option(help=f"comma list of {', '.join(sweeps.MODES)}")] = None,
    batches: Annotated[str | None, typer.Option(help="comma list of batch sizes, instead of the shape set's own")] = None,
    with_providers: Annotated[str | None, typer.Option("--providers", help=f"comma list of {', '.join(providers.PROVIDERS)}")] = None,
    budget: Annotated[float | None, typer.Option(help="seconds; the most important rows come first")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; a GPU where there is one")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a budget of a minute, and on a CPU next to no compiling")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="overwrite the CSV instead of going on in it")] = False,
) -> None:
    """Check every implementation against fp64 and time it: ops x shapes x dtype x layout x mode x provider."""
    chosen = _device(device)
    plan = sweeps.Plan(
        cases.all_cases(
            _several(ops, OPS),
            _several(sets, tuple(shapes.SETS), tuple(shapes.SETS)),
            # a CPU emulates reduced precision, which says nothing about either
            _several(dtypes, ("bf16", "fp32", "fp16") if chosen == "cuda" else ("fp32",), tuple(cases.DTYPES)),
            _several(layouts, tuple(cases.LAYOUTS), tuple(cases.LAYOUTS)),
            _batches(batches, () if chosen == "cuda" else (2,)),
        ),
        _several(with_providers, providers.PROVIDERS, providers.PROVIDERS),
        _several(modes, ("fwd_bwd", "inference") if quick and chosen == "cpu" else sweeps.MODES, sweeps.MODES),
        budget=budget if budget is not None or not quick else QUICK_SECONDS,
        compile_cases=1 if quick and chosen == "cpu" else None,
    )
    sweeps.sweep(plan, csv, chosen, console, resume=not fresh)
    console.print(f"rows in {csv}")


@app.command()
def host(
    csv: Annotated[Path, typer.Option(help="where the rows go; an interrupted run of the same command goes on in it")],
    ops: Annotated[str | None, typer.Option(help="comma list of ops, as for sweep")] = None,
    dtypes: Annotated[str | None, typer.Option(help=f"comma list of {', '.join(cases.DTYPES)}")] = None,
    layouts: Annotated[str | None, typer.Option(help=f"comma list of {', '.join(cases.LAYOUTS)}")] = None,
    budget: Annotated[float | None, typer.Option(help="seconds; the most important rows come first")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="overwrite the CSV instead of going on in it")] = False,
) -> None:
    """Time plain eager calls on maps of one image, the host's share beside the whole; without a GPU what tritattn's calls cost the host."""
    from . import host as calls

    names, kinds = _several(ops, calls.OPS), _several(dtypes, ("bf16",), tuple(cases.DTYPES))
    sized = calls.all_cases(names, kinds, _several(layouts, ("channels_last",), tuple(cases.LAYOUTS)))
    calls.host(csv, _device(None), console, cases=sized, budget=budget, resume=not fresh)
    console.print(f"rows in {csv}")


@app.command()
def models(
    csv: Annotated[Path, typer.Option(help="where the rows go; an interrupted run of the same command goes on in it")],
    networks: Annotated[str | None, typer.Option(help=f"comma list of timm/NAME[+BLOCK] and torchvision/NAME[+BLOCK]; {', '.join(NETWORKS)}")] = None,
    executions: Annotated[str | None, typer.Option(help=f"comma list of {', '.join(real.EXECUTIONS)}")] = None,
    modes: Annotated[str | None, typer.Option(help=f"comma list of {', '.join(real.MODES)}")] = None,
    dtypes: Annotated[str | None, typer.Option(help="comma list of bf16, fp32")] = None,
    layouts: Annotated[str | None, typer.Option(help=f"comma list of {', '.join(cases.LAYOUTS)}")] = None,
    batches: Annotated[str | None, typer.Option(help="comma list of batch sizes, instead of each mode's own")] = None,
    size: Annotated[int | None, typer.Option(help="of the images")] = None,
    budget: Annotated[float | None, typer.Option(help="seconds; the most important rows come first")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; a GPU where there is one")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a budget of a minute, and on a CPU no compiling")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="overwrite the CSV instead of going on in it")] = False,
) -> None:
    """Time real networks without attention, with it in plain torch and with tritattn's: what attention costs, in % and us per image."""
    chosen = _device(device)
    on_gpu = chosen == "cuda"
    plan = real.all_cases(
        _several(networks, NETWORKS, check=parse),
        _several(executions, real.EXECUTIONS if on_gpu or not quick else ("eager",), real.EXECUTIONS),
        _several(modes, real.MODES, real.MODES),
        _several(dtypes, ("bf16", "fp32") if on_gpu else ("fp32",), ("bf16", "fp32")),
        _several(layouts, ("channels_last", "contiguous"), tuple(cases.LAYOUTS)),
        _batches(batches, () if on_gpu else (2,)),
        size or (224 if on_gpu else 64),
    )
    real.models(plan, csv, chosen, console, budget=budget if budget is not None or not quick else QUICK_SECONDS, resume=not fresh)
    console.print(f"rows in {csv}")


@app.command()
def tune(
    csv: Annotated[Path, typer.Option(help="where all timings go; an interrupted run of the same command goes on in it")],
    ops: Annotated[str | None, typer.Option(help="comma list of ops, as for sweep")] = None,
    sets: Annotated[str | None, typer.Option(help=f"comma list of shape sets: {', '.join(shapes.SETS)}")] = None,
    dtypes: Annotated[str | None, typer.Option(help=f"comma list of {', '.join(cases.DTYPES)}")] = None,
    layouts: Annotated[str | None, typer.Option(help=f"comma list of {', '.join(cases.LAYOUTS)}")] = None,
    batches: Annotated[str | None, typer.Option(help="comma list of batch sizes, instead of the shape set's own")] = None,
    out: Annotated[Path | None, typer.Option(help="the table; by default the package's own for this device, tritattn/tuned/DEVICE.json")] = None,
    budget: Annotated[float | None, typer.Option(help="seconds; the most important cases come first")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="overwrite the CSV instead of going on in it")] = False,
) -> None:
    """Time tiles around the rule's for every pass, product and shape, and write those that are faster to a table. On several GPUs under torchrun."""
    from . import tune as tuner

    plan = cases.all_cases(
        _several(ops, OPS),
        _several(sets, tuple(shapes.SETS), tuple(shapes.SETS)),
        _several(dtypes, ("bf16", "fp32"), tuple(cases.DTYPES)),
        _several(layouts, tuple(cases.LAYOUTS), tuple(cases.LAYOUTS)),
        _batches(batches, ()),
    )
    tuner.tune(plan, csv, _device("cuda"), console, out=out, budget=budget, resume=not fresh)
    console.print(f"rows in {csv}")


@app.command()
def traffic(
    csv: Annotated[Path, typer.Option(help="where the rows go; an interrupted run of the same command goes on in it")],
    ops: Annotated[str | None, typer.Option(help="comma list of ops, as for sweep")] = None,
    layouts: Annotated[str | None, typer.Option(help=f"comma list of {', '.join(cases.LAYOUTS)}")] = None,
    dtype: Annotated[str, typer.Option(help=f"one of {', '.join(cases.DTYPES)}")] = "bf16",
    with_providers: Annotated[str | None, typer.Option("--providers", help="comma list of tritattn, eager and compile")] = None,
    budget: Annotated[float | None, typer.Option(help="seconds")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a few ops at the smallest stage, within a budget")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="overwrite the CSV instead of going on in it")] = False,
) -> None:
    """Count what every op moves and launches, at the stages of SE-ResNet-50: no GPU needed."""
    from . import traffic as counting

    counting.traffic(
        csv,
        console,
        op_names=_several(ops, QUICK_TRAFFIC if quick else OPS),
        sites=shapes.STAGES[2:3] if quick else shapes.STAGES,
        layouts=_several(layouts, tuple(cases.LAYOUTS), tuple(cases.LAYOUTS)),
        dtype=_several(dtype, ("bf16",), tuple(cases.DTYPES))[0],
        providers=_several(with_providers, counting.PROVIDERS, counting.PROVIDERS),
        budget=budget if budget is not None or not quick else QUICK_TRAFFIC_SECONDS,
        resume=not fresh,
    )
    console.print(f"rows in {csv}")


@app.command()
def codegen(
    csv: Annotated[Path, typer.Option(help="where the rows go; an interrupted run of the same command goes on in it")],
    ops: Annotated[str | None, typer.Option(help="comma list of ops, as for sweep")] = None,
    dtypes: Annotated[str | None, typer.Option(help=f"comma list of {', '.join(cases.DTYPES)}")] = None,
    targets: Annotated[str | None, typer.Option(help="comma list of sm_80, sm_90, sm_100 and gfx942")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="one configuration per kernel and layout, in bf16")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="overwrite the CSV instead of going on in it")] = False,
) -> None:
    """Compile the kernels for sm_80, sm_90, sm_100 and gfx942: registers, spills, shared memory, width of map accesses. No GPU needed."""
    from . import codegen as compiling

    compiling.codegen(
        csv,
        console,
        quick=quick,
        op_names=_several(ops, OPS),
        dtypes=_several(dtypes, ("bf16",) if quick else tuple(cases.DTYPES), tuple(cases.DTYPES)),
        targets=_several(targets, tuple(compiling.TARGETS), tuple(compiling.TARGETS)),
        resume=not fresh,
    )
    console.print(f"rows in {csv}")


@app.command()
def features(
    csv: Annotated[Path, typer.Option(help="where the rows go; an interrupted run of the same command goes on in it")],
    readme: Annotated[Path | None, typer.Option(help="a Markdown file whose table, between <!-- features --> markers, is replaced")] = None,
    blocks: Annotated[str | None, typer.Option(help="comma list of blocks; all of them")] = None,
) -> None:
    """Run every block in every way that it is promised to work, in the interpreter: the table of the README. No GPU needed."""
    from . import features as table

    table.features(csv, console, readme=readme, only=_several(blocks, (), tuple(table.names())))
    console.print(f"rows in {csv}")


@app.command()
def digits(
    csv: Annotated[Path, typer.Option(help="where the rows go, and beside it the figure; an interrupted run of the same command goes on in it")],
    epochs: Annotated[int, typer.Option(min=1)] = 8,
    seeds: Annotated[int, typer.Option(min=1, help="networks per block")] = 3,
    blocks: Annotated[str | None, typer.Option(help="comma list of blocks, or none for the plain network; all of them")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; a GPU where there is one")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="overwrite the CSV instead of going on in it")] = False,
) -> None:
    """Train a small network with every block on scikit-learn's digits: seconds per block on a CPU."""
    from . import digits as example
    from . import features as table

    chosen = _several(blocks, (), (example.PLAIN, *table.names()))
    example.digits(csv, console, epochs=epochs, seeds=seeds, blocks=chosen, device=_device(device), resume=not fresh)
    console.print(f"rows in {csv}")


@app.command()
def compare(a: Annotated[Path, typer.Argument(help="the sweep before")], b: Annotated[Path, typer.Argument(help="the sweep after")]) -> None:
    """Compare two sweeps of one device: exit 1 where B is slower beyond max(5 %, noise) or no longer right, 2 where they cannot be compared."""
    from . import compare as comparing

    try:
        found = comparing.compare(a, b)
    except (ValueError, OSError) as error:
        console.print(f"cannot compare: {error}")
        raise typer.Exit(2) from None
    comparing.print_comparison(found, console)
    raise typer.Exit(found.exit_code)


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="the page to write")],
    sweep: Annotated[Path | None, typer.Option(help="CSV of a sweep")] = None,
    models: Annotated[Path | None, typer.Option(help="CSV of models")] = None,
    traffic: Annotated[Path | None, typer.Option(help="CSV of traffic")] = None,
    codegen: Annotated[Path | None, typer.Option(help="CSV of codegen")] = None,
    digits: Annotated[Path | None, typer.Option(help="CSV of digits")] = None,
) -> None:
    """One HTML page with the figures and the environment of any of the CSVs, which opens without a network."""
    from . import report as reporting

    files = {"sweep": sweep, "models": models, "traffic": traffic, "codegen": codegen, "digits": digits}
    paths = {kind: path for kind, path in files.items() if path}
    if not paths:
        raise typer.BadParameter("give at least one of --sweep, --models, --traffic, --codegen and --digits")
    console.print(f"report in {reporting.report(out, paths)}")


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="folder for what the steps leave; those that measure go on in it")],
    steps: Annotated[str, typer.Option(help="comma list of tests, host, sweep, tune and models")] = "tests,host,sweep",
    budget: Annotated[float, typer.Option(help="seconds for all of them")] = 540.0,
) -> None:
    """Test and measure on this machine's GPU, with this Python and within a budget."""
    from . import gpu as asking

    raise typer.Exit(asking.gpu(out, _several(steps, (), tuple(asking.STEPS)), budget, console))


@app.command()
def targets(
    traffic: Annotated[Path, typer.Option(help="CSV of traffic, for the predictions")],
    sweep: Annotated[Path | None, typer.Option(help="CSV of a sweep on a GPU")] = None,
    models: Annotated[Path | None, typer.Option(help="CSV of models on a GPU")] = None,
    host: Annotated[Path | None, typer.Option(help="CSV of host on a GPU")] = None,
    codegen: Annotated[Path | None, typer.Option(help="CSV of codegen; the kernels of these rows that it lacks are compiled")] = None,
    readme: Annotated[Path | None, typer.Option(help="a Markdown file whose table, between <!-- targets --> markers, is replaced")] = None,
) -> None:
    """What the package aims at, what its traffic predicts, and what was measured: the second table of the README."""
    from . import targets as aims

    table = aims.targets(console, traffic=traffic, sweep=sweep, models=models, host=host, codegen=codegen, readme=readme)
    console.print(table, soft_wrap=True, highlight=False)


@app.command("all")
def everything(out: Annotated[Path, typer.Option(help="folder for the CSVs and the report")] = ROOT / "perf" / "results" / "local") -> None:
    """A quick sweep, traffic, codegen and example for the machine it runs on, and the report: within five minutes on two CPU cores."""
    files = {kind: out / f"{kind}.csv" for kind in ("sweep", "traffic", "codegen", "digits")}
    sweep(files["sweep"], quick=True, fresh=True)
    traffic(files["traffic"], quick=True, fresh=True)
    codegen(files["codegen"], quick=True, fresh=True)
    digits(files["digits"], epochs=2, seeds=1, fresh=True)
    report(out / "report.html", **files)
    for path in (*files.values(), out / "report.html"):
        console.print(str(path), soft_wrap=True)
