"""Tables for the terminal: what a sweep and a comparison found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from .schema import IDENTITY, SWEEP, TRAFFIC, frame


def geomean(values: Iterable[float]) -> float:
    found = np.asarray(list(values), dtype=float)
    found = found[np.isfinite(found) & (found > 0)]
    return float(np.exp(np.log(found).mean())) if found.size else float("nan")


def speedups(table: pd.DataFrame, baseline: str, provider: str = "tritattn") -> pd.DataFrame:
    """The provider's timed rows with `speedup`: the baseline's time over its own, where both were measured."""
    keys = [name for name in IDENTITY[SWEEP] if name != "provider"]
    timed = table[(table.status == "ok") & table.ms_p50.notna()]
    ours = timed[timed.provider == provider]
    theirs = timed[timed.provider == baseline][[*keys, "ms_p50", "timer"]]
    merged = ours.merge(theirs, on=keys, suffixes=("", "_base"))
    merged = merged[merged.timer == merged.timer_base]
    return merged.assign(speedup=merged.ms_p50_base / merged.ms_p50)


def _number(value: float, form: str) -> str:
    return format(value, form) if np.isfinite(value) else "-"


def print_summary(rows: Iterable[Mapping[str, str]], console: Console) -> None:
    """One line per op and mode: speed-up of tritattn over each baseline and share of the copy's bandwidth, as geometric means."""
    table = frame(rows, SWEEP)
    if table.empty:
        console.print("no rows")
        return
    baselines = [p for p in ("eager", "compile", "timm", "torchvision") if (table.provider == p).any()]
    ratios = {baseline: speedups(table, baseline) for baseline in baselines}
    path = "CPU path: plain torch, no kernels" if (table.timer == "cpu").any() else "tritattn"
    out = Table(title=f"{path}, speed-up over", title_justify="left")
    for name in ("op", "mode", *baselines, "% of copy"):
        out.add_column(name, justify="left" if name in ("op", "mode") else "right", no_wrap=True)
    ours = table[(table.provider == "tritattn") & (table.status == "ok")]
    for (op, mode), group in ours.groupby(["op", "mode"], sort=False):
        cells = [geomean(r[(r.op == op) & (r["mode"] == mode)].speedup) for r in ratios.values()]
        out.add_row(str(op), str(mode), *(_number(value, ".2f") for value in cells), _number(geomean(group.pct_copy), ".0f"))
    console.print(out)
    counts = table.status.str.split(":").str[0].value_counts()
    console.print("rows: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    for _, row in table[~table.status.str.startswith(("ok", "unavailable"))].head(10).iterrows():
        console.print(f"  {row.op} {row.provider} {row['mode']} {row['dtype']} {row.layout} {row.n:g}x{row.c:g}x{row.h:g}x{row.w:g}: {row.status}", soft_wrap=True)


def print_traffic(rows: Iterable[Mapping[str, str]], console: Console) -> None:
    """One line per op and layout: U of every provider, forward / backward, the worst over the shapes."""
    table = frame(rows, TRAFFIC)
    if table.empty:
        console.print("no rows")
        return
    providers = [p for p in ("tritattn", "compile", "eager") if (table.provider == p).any()]
    out = Table(title="map traffic in U, forward / backward, and launches (the most over all shapes)", title_justify="left")
    for name in ("op", "layout", "floor", "bar", *providers, *(f"{p} launches" for p in providers)):
        out.add_column(name, justify="left" if name in ("op", "layout") else "right", no_wrap=True)
    for (op, layout), group in table.groupby(["op", "layout"], sort=False):

        def pair(column: str, form: str, group: pd.DataFrame = group, provider: str | None = None) -> str:
            chosen = group if provider is None else group[group.provider == provider]
            return " / ".join(_number(chosen[chosen["mode"] == mode][column].max(), form) for mode in ("fwd", "bwd"))

        bounds = [pair("floor_u", "g"), pair("bar_u", "g")]
        moved = [pair("total_u", ".2f", provider=p) for p in providers]
        launched = [pair("launches", "g", provider=p) for p in providers]
        out.add_row(str(op), str(layout), *bounds, *moved, *launched)
    console.print(out)
    failed = table[table.status != "ok"]
    for (provider, status), group in failed.groupby(["provider", "status"]):
        console.print(f"{len(group)} rows of {provider}: {status}", soft_wrap=True)
