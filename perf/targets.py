"""How fast the package means to be, row by row: the target, what traffic predicts, and what a sweep and the networks measured.

A prediction is a ratio of bytes: what the other moves over what ours is to move to and from DRAM, on maps of twice the size of an L2 or more, where
whatever the others read again comes from DRAM. It takes everybody to reach the same share of the bandwidth, and launches to cost nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from .cases import LAYOUTS, make_case
from .codegen import Launch, compile_all, identity, launches
from .environment import environment
from .features import insert
from .schema import CODEGEN, HOST, IDENTITY, MODELS, SWEEP, TRAFFIC, Writer, frame, read
from .shapes import STAGES, Site
from .summary import geomean, speedups
from .traffic import TILES_FOR

LARGE = STAGES[:2]  # whose maps are twice as large as an L2, in two bytes and at the batch of TILES_FOR
TARGET = "sm_90"


@dataclass(frozen=True)
class Target:
    """eager and compile: how many times as fast; ceiling: % of a copy's bandwidth, counting the floor's bytes. None where nothing is aimed at."""

    work: str
    ops: tuple[str, ...]
    mode: str  # of the sweep's
    eager: float | None = None
    compile: float | None = None
    ceiling: float | None = None
    sites: tuple[Site, ...] = LARGE
    layouts: tuple[str, ...] = tuple(LAYOUTS)


_GATES = ("se", "eca", "ese", "cse")
TARGETS = (
    Target("SE, ECA, ESE, cSE forward", _GATES, "fwd", 1.4, 1.35, 80),
    Target("the same at 7×7, contiguous", _GATES, "fwd", ceiling=60, sites=STAGES[3:], layouts=("contiguous",)),
    Target("the same, backward", _GATES, "bwd", 3, 1.3, 85),
    Target("SE + residual + ReLU forward", ("se+residual+relu",), "fwd", 2.4, 1.3, 85),
    Target("SE + residual + ReLU forward + backward", ("se+residual+relu",), "fwd_bwd", 2.3, 1.3, 85),
    Target("CBAM, scSE, BAM, coordinate, forward + backward", ("cbam", "scse", "bam", "coord"), "fwd_bwd", 4, 2, 75),
    Target("shuffle attention, SimAM, forward + backward", ("shuffle", "simam"), "fwd_bwd", 6, 2, 85),
    Target("SK, split attention, forward + backward", ("sk", "splat"), "fwd_bwd", 2.5, 1.5, 75),
)
SMALL = {"inference": "forward", "fwd_bwd": "forward + backward"}  # modes of `host`
SMALL_TARGETS = {"eager": 2.0, "compile": 1.0}
NETWORKS = ("timm/seresnet50", "torchvision/resnet50+cbam")
NETWORK_TARGET = 5.0  # % over the plain network


def _range(values: Iterable[float], form: str = ".2f") -> str:
    found = sorted(v for v in values if np.isfinite(v))
    if not found:
        return "-"
    texts = list(dict.fromkeys(format(v, form) for v in (found[0], found[-1])))
    return " to ".join(texts)


def _measured(values: pd.Series, form: str = ".2f") -> str:
    """The geometric mean, and the worst."""
    return "-" if values.empty else f"{geomean(values):{form}} (lowest {values.min():{form}})"


def _at(table: pd.DataFrame, sites: Sequence[Site]) -> pd.Series:
    return pd.Series(list(zip(table.c, table.h, table.w, strict=True)), index=table.index).isin([(s.c, s.h, s.w) for s in sites])


def predicted(traffic: pd.DataFrame, target: Target) -> pd.DataFrame:
    """Of every op, layout and shape of a target: ours in U to and from DRAM, the others' in U, the floor, and everybody's launches."""
    rows = traffic[traffic.op.isin(target.ops) & traffic.layout.isin(target.layouts) & (traffic.status == "ok") & _at(traffic, target.sites)]
    modes = ("fwd", "bwd") if target.mode == "fwd_bwd" else (target.mode,)
    rows = rows[rows["mode"].isin(modes)]
    where = ["op", "layout", "dtype", "c", "h", "w"]
    summed = rows.groupby([*where, "provider"], sort=False).agg(
        total_u=("total_u", "sum"), dram_u=("dram_u", lambda u: u.sum(skipna=False)), floor_u=("floor_u", "sum"), launches=("launches", "sum"),
        found=("mode", "size"),
    )  # fmt: skip
    wide = summed[summed.found == len(modes)].unstack("provider")
    columns = {"floor": ("floor_u", "tritattn"), "ours": ("dram_u", "tritattn"), "eager": ("total_u", "eager"), "compile": ("total_u", "compile")}
    columns |= {f"{name}_launches": ("launches", name) for name in ("tritattn", "eager", "compile")}
    return pd.DataFrame({name: wide.get(key, np.nan) for name, key in columns.items()}, index=wide.index)


def launched(target: Target) -> list[Launch]:
    """Every kernel of a target's ops as it would be launched."""
    return [
        launch
        for op in target.ops for layout in target.layouts for site in target.sites
        for launch in launches(make_case(op, "bf16", layout, TILES_FOR, site))
    ]  # fmt: skip


def generated(path: str | os.PathLike[str], console: Console) -> list[str]:
    """Of each target's kernels the most spills and the narrowest access to a map; compiled where the CSV has not got them."""
    wanted = [launched(target) for target in TARGETS]
    with Writer(path, CODEGEN, environment("cpu"), resume=True) as writer:
        compile_all([launch for found in wanted for launch in found], (TARGET,), writer, console)
        known = {writer.identity(row): row for row in writer.rows}
    texts = []
    for found in wanted:
        rows = frame([known[writer.identity(identity(launch, TARGET))] for launch in found], CODEGEN)
        bad = rows[rows.status != "ok"]
        narrowest = rows[["map_load_bits", "map_store_bits"]].min().min()
        texts.append(f"{rows.spill_bytes.max():g}, {narrowest:g} bit" if bad.empty else str(bad.status.iloc[0]))
    return texts


def _launches(found: pd.DataFrame) -> str:
    return ", ".join(_range(found[f"{name}_launches"], "g") for name in ("tritattn", "eager", "compile"))


def lines(
    traffic: pd.DataFrame, sweep: pd.DataFrame | None, models: pd.DataFrame | None, code: Sequence[str], host: pd.DataFrame | None = None
) -> list[list[str]]:
    """The cells of the table, a list for each line: for eager code, torch.compile and the ceiling the target, the prediction, the measurement.
    code: what `generated` says of each target."""
    found = []
    if sweep is not None:
        sweep = sweep[sweep.timer != "cpu"]  # the CPU path says nothing about the kernels
    for target, text in zip(TARGETS, code, strict=True):
        model = predicted(traffic, target)
        cells = [target.work]
        timed = None
        if sweep is not None:
            timed = sweep[sweep.op.isin(target.ops) & (sweep["mode"] == target.mode) & sweep.layout.isin(target.layouts) & _at(sweep, target.sites)]
            timed = timed[timed.n == TILES_FOR]
        for baseline in ("eager", "compile"):
            wanted = getattr(target, baseline)
            measured = "-" if timed is None or wanted is None else _measured(speedups(timed, baseline).speedup)
            cells += ["" if wanted is None else f"≥ {wanted:g}", "" if wanted is None else _range(model[baseline] / model.ours), measured]
        ours = None if timed is None else timed[(timed.provider == "tritattn") & (timed.status == "ok")].pct_copy.dropna()
        cells += [f"≥ {target.ceiling:g} %", _range(100 * model.floor / model.ours, ".0f"), "-" if ours is None else _measured(ours, ".0f")]
        found.append([*cells, _launches(model), text])
    for mode, words in SMALL.items():
        cells = [f"plain calls on maps of one image, the host's time included, {words}"]
        for baseline, wanted in SMALL_TARGETS.items():
            cells += [f"≥ {wanted:g}", "", _measured(_faster(host, mode, baseline))]
        found.append([*cells, *[""] * 5])
    found.append(["every row of the sweep: at least as fast as the fastest of the others", *[""] * 8, _slower(sweep), "", ""])
    found.append([f"{' and '.join(NETWORKS)}, channels_last, bf16: attention costs", *[""] * 6, f"≤ {NETWORK_TARGET:g} %", "", _cost(models), "", ""])
    return found


def _faster(host: pd.DataFrame | None, mode: str, baseline: str) -> pd.Series:
    """How many times as long the baseline's calls take as ours."""
    if host is None:
        return pd.Series(dtype=float)
    keys = [name for name in IDENTITY[HOST] if name != "provider"]
    timed = host[(host.status == "ok") & host.us.notna() & (host["mode"] == mode)].set_index(keys)
    taken = {name: timed[timed.provider == name].us for name in ("tritattn", baseline)}
    return (taken[baseline] / taken["tritattn"]).dropna()


def _slower(sweep: pd.DataFrame | None) -> str:
    if sweep is None:
        return "-"
    keys = [name for name in IDENTITY[SWEEP] if name != "provider"]
    timed = sweep[(sweep.status == "ok") & sweep.ms_p50.notna()]
    best = timed[timed.provider != "tritattn"].groupby(keys).ms_p50.min().rename("best")
    ours = timed[timed.provider == "tritattn"].join(best, on=keys, how="inner")
    noise = ((ours.ms_p80 - ours.ms_p20) / ours.ms_p50).clip(lower=0.02)
    return f"{int((ours.ms_p50 <= ours.best * (1 + noise)).sum())} of {len(ours)} rows"


def _cost(models: pd.DataFrame | None) -> str:
    if models is None:
        return "-"
    rows = models[models.network.isin(NETWORKS) & (models.layout == "channels_last") & (models.dtype == "bf16") & (models.timer != "cpu")]
    costs = rows[(rows.provider == "tritattn") & (rows.status == "ok")].cost_pct.dropna()
    return "-" if costs.empty else f"{_range(costs, '.1f')} %"


_AGAINST = ("over eager", "over torch.compile", "of a copy's bandwidth")
TITLES = ("work", *(f"{against}: {what}" for against in _AGAINST for what in ("target", "predicted", "measured")))
TITLES += ("launches (ours, eager, Inductor)", f"spill bytes, narrowest map access ({TARGET})")


def markdown(found: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|"]
    return "\n".join([*rows, *(f"| {' | '.join(cells)} |" for cells in found)])


def targets(
    console: Console, *, traffic: Path, sweep: Path | None = None, models: Path | None = None, host: Path | None = None,
    codegen: Path | None = None, readme: Path | None = None,
) -> str:  # fmt: skip
    """The table as Markdown, from these CSVs; between its markers in the README where one is given."""
    code = ["-"] * len(TARGETS) if codegen is None else generated(codegen, console)
    files = ((sweep, SWEEP), (models, MODELS), (host, HOST))
    timed, networks, calls = (None if path is None else read(path, columns) for path, columns in files)
    table = markdown(lines(read(traffic, TRAFFIC), timed, networks, code, calls))
    if readme is not None:
        insert(readme, "targets", table)
    return table
