"""Tables for the terminal: what a sweep and a comparison found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .schema import CODEGEN, HOST, IDENTITY, MODELS, SWEEP, TRAFFIC, TUNE, frame


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


def where(row: pd.Series) -> str:
    """A sweep's row in words."""
    return f"{row.op} {row.provider} {row['mode']} {row['dtype']} {row.layout} {row.n:g}x{row.c:g}x{row.h:g}x{row.w:g}"


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
    out = Table(title=f"{path}, speed-up over", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("op", "mode", *baselines, "% of copy"):
        out.add_column(name, justify="left" if name in ("op", "mode") else "right", no_wrap=True)
    ours = table[(table.provider == "tritattn") & (table.status == "ok")]
    for (op, mode), group in ours.groupby(["op", "mode"], sort=False):
        cells = [geomean(r[(r.op == op) & (r["mode"] == mode)].speedup) for r in ratios.values()]
        out.add_row(str(op), str(mode), *(_number(value, ".2f") for value in cells), _number(geomean(group.pct_copy), ".0f"))
    console.print(out)
    _print_statuses(table, console, where)


def _print_statuses(table: pd.DataFrame, console: Console, name: Callable[[pd.Series], str]) -> None:
    """How many rows of each status, and the first of those that failed."""
    counts = table.status.str.split(":").str[0].value_counts()
    console.print("rows: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    for _, row in table[~table.status.str.startswith(("ok", "unavailable"))].head(10).iterrows():
        console.print(f"  {name(row)}: {row.status}", soft_wrap=True)


def print_host(rows: Iterable[Mapping[str, str]], console: Console) -> None:
    """One line per op and mode: microseconds of each implementation, the median over its rows."""
    table = frame(rows, HOST)
    if table.empty:
        console.print("no rows")
        return
    column = "us" if table.us.notna().any() else "host_us"
    out = Table(title=f"plain eager calls on small maps, {column}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    providers = list(dict.fromkeys(table.provider))
    for name in ("op", "mode", *providers):
        out.add_column(name, justify="left" if name in ("op", "mode") else "right", no_wrap=True)
    for (op, mode), group in table[table.status == "ok"].groupby(["op", "mode"], sort=False):
        medians = group.groupby("provider")[column].median()
        out.add_row(str(op), str(mode), *(f"{medians[p]:.1f}" if p in medians else "-" for p in providers))
    console.print(out)
    _print_statuses(table, console, where)


def print_traffic(rows: Iterable[Mapping[str, str]], console: Console) -> None:
    """One line per op and layout: U of every provider, forward / backward, the worst over the shapes, and what of tritattn's is to reach DRAM."""
    table = frame(rows, TRAFFIC)
    if table.empty:
        console.print("no rows")
        return
    providers = [p for p in ("tritattn", "compile", "eager") if (table.provider == p).any()]
    title = "map traffic in U, forward/backward, and launches; the most over all shapes"
    out = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("op", "layout", "floor", "bar", *(f"{p}\nU, launches" for p in providers), "tritattn\nDRAM, predicted"):
        out.add_column(name, justify="left" if name in ("op", "layout") else "right", no_wrap=True)
    for (op, layout), group in table.groupby(["op", "layout"], sort=False):

        def pair(column: str, group: pd.DataFrame) -> str:
            return "/".join(_number(group[group["mode"] == mode][column].max(), ".3g") for mode in ("fwd", "bwd"))

        of = [group[group.provider == p] for p in providers]
        found = [f"{pair('total_u', rows)}, {pair('launches', rows):>5}" for rows in of]
        found.append(pair("dram_u", group[group.provider == "tritattn"]))
        out.add_row(str(op), str(layout), pair("floor_u", group), pair("bar_u", group), *found)
    console.print(out)
    failed = table[table.status != "ok"]
    for (provider, status), group in failed.groupby(["provider", "status"]):
        console.print(f"{len(group)} rows of {provider}: {status}", soft_wrap=True)


def print_codegen(rows: Iterable[Mapping[str, str]], console: Console) -> None:
    """One line per kernel and dtype: the most registers and spills and the narrowest accesses over configurations and targets."""
    table = frame(rows, CODEGEN)
    if table.empty:
        console.print("no rows")
        return
    out = Table(title="kernels over all targets and configurations", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("kernel", "dtype", "compiled", "registers", "spill bytes", "shared bytes", "map load bits", "map store bits"):
        out.add_column(name, justify="left" if name in ("kernel", "dtype") else "right", no_wrap=True)
    for (kernel, dtype), group in table[table.status == "ok"].groupby(["kernel", "dtype"], sort=False):
        most = [f"{group[name].max():g}" for name in ("registers", "spill_bytes", "shared_bytes")]
        least = [_number(group[name].min(), "g") for name in ("map_load_bits", "map_store_bits")]
        out.add_row(str(kernel), str(dtype), str(len(group)), *most, *least)
    console.print(out)
    for status, group in table[table.status != "ok"].groupby("status"):
        console.print(f"{len(group)} rows ({', '.join(sorted(set(group.kernel)))}): {status}", soft_wrap=True)


def print_models(rows: Iterable[Mapping[str, str]], console: Console) -> None:
    """One line per case: what the plain network does, and what attention costs it in plain torch and with tritattn."""
    table = frame(rows, MODELS)
    if table.empty:
        console.print("no rows")
        return
    title = "attention's cost: % more time than without it, and us per image"
    if (table.timer == "cpu").any():
        title = f"CPU path, plain torch, no kernels: {title}"
    out = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    words = ("network", "mode", "dtype", "layout", "batch", "execution")
    for name in (*words, "plain\nimages/s", "in torch\n%, us", "tritattn\n%, us"):
        out.add_column(name, justify="left" if name in words else "right", no_wrap=True)
    for case, group in table.groupby(["network", "mode", "dtype", "layout", "n", "size", "execution"], sort=False):
        found = group.drop_duplicates("provider", keep="last").set_index("provider").reindex(["plain", "torch", "tritattn"])
        costs = [f"{_number(row.cost_pct, '+.1f')}, {_number(row.cost_us, '.3g')}" for _, row in found.iloc[1:].iterrows()]
        network, mode, dtype, layout, n, size, execution = map(str, case)
        batch = f"{float(n):g} x {float(size):g}"
        out.add_row(network, mode, dtype, layout, batch, execution, _number(found.images_s.iloc[0], ".0f"), *costs)
    console.print(out)
    _print_statuses(table, console, lambda row: f"{row.network} {row.provider} {row.execution} {row['mode']} {row['dtype']} {row.layout} {row.n:g}")


def print_tune(rows: Iterable[Mapping[str, str]], console: Console) -> None:
    """One line per pass: what was tried, and how much faster than the rule the best was."""
    table = frame(rows, TUNE)
    table = table[table.key != ""]
    if table.empty:
        console.print("no rows")
        return
    out = Table(title="tiles tried, and time over that of the rule's", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("pass", "shapes", "tried", "best, mean", "best of all"):
        out.add_column(name, justify="left" if name == "pass" else "right", no_wrap=True)
    for role, group in table.groupby(table.key.str.split(" ").str[0], sort=False):
        best = group[group.status == "ok"].groupby(["key", "batch"]).ratio.min()
        out.add_row(str(role), str(len(best)), str(len(group)), _number(geomean(best), ".3f"), _number(best.min(), ".3f"))
    console.print(out)
    _print_statuses(table, console, lambda row: f"{row.op} {row['mode']} {row.key} {row.config}")
