"""Two sweeps of one device, row against row."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .schema import IDENTITY, SWEEP, read
from .summary import geomean, where

THRESHOLD = 0.05  # a slowdown below it is never a regression


class Incomparable(ValueError):
    """The two files do not measure the same thing."""


@dataclass
class Comparison:
    """rows: the matched rows, timed in both files, with ratio (B over A: above 1 is slower), noise, and whether it is a regression.

    broken: rows that were timed in A and have another status in B. only_a, only_b: rows without a partner.
    """

    rows: pd.DataFrame
    broken: pd.DataFrame
    only_a: int
    only_b: int

    @property
    def regressions(self) -> pd.DataFrame:
        return self.rows[self.rows.regression]

    @property
    def exit_code(self) -> int:
        return 1 if len(self.regressions) or len(self.broken) else 0


def compare(path_a: str | os.PathLike[str], path_b: str | os.PathLike[str]) -> Comparison:
    a, b = read(path_a, SWEEP), read(path_b, SWEEP)
    devices = sorted({*a.device, *b.device})
    if len(devices) > 1:
        raise Incomparable(f"different devices: {', '.join(devices)}")
    keys = list(IDENTITY[SWEEP])
    both = a.merge(b, on=keys, how="outer", suffixes=("_a", "_b"), indicator=True)
    matched = both[both["_merge"] == "both"]
    timed = matched[(matched.status_a == "ok") & (matched.status_b == "ok")].copy()
    for name in ("timer", "l2"):
        differs = timed[timed[f"{name}_a"] != timed[f"{name}_b"]]
        if len(differs):
            first = differs.iloc[0]
            values = f"{first[f'{name}_a']} and {first[f'{name}_b']}"
            raise Incomparable(f"different {name} in {len(differs)} rows: {values} for {first.op} {first.provider} {first['mode']}")
    timed["ratio"] = timed.ms_p50_b / timed.ms_p50_a
    spread_a = (timed.ms_p80_a - timed.ms_p20_a) / timed.ms_p50_a
    spread_b = (timed.ms_p80_b - timed.ms_p20_b) / timed.ms_p50_b
    timed["noise"] = (spread_a**2 + spread_b**2) ** 0.5
    timed["regression"] = timed.ratio - 1 > timed.noise.clip(lower=THRESHOLD)
    broken = matched[(matched.status_a == "ok") & (matched.status_b != "ok")]
    return Comparison(timed, broken, int((both["_merge"] == "left_only").sum()), int((both["_merge"] == "right_only").sum()))


def print_comparison(found: Comparison, console: Console) -> None:
    table = Table(title="time of B over time of A (above 1: slower)", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("op", "provider", "rows", "geomean", "worst", "regressions"):
        table.add_column(name, justify="left" if name in ("op", "provider") else "right")
    for (op, provider), group in found.rows.groupby(["op", "provider"], sort=False):
        numbers = (str(len(group)), f"{geomean(group.ratio):.3f}", f"{group.ratio.max():.3f}", str(int(group.regression.sum())))
        table.add_row(str(op), str(provider), *numbers)
    console.print(table)
    for _, row in found.regressions.sort_values("ratio", ascending=False).head(20).iterrows():
        change = f"{row.ms_p50_a:.4g} -> {row.ms_p50_b:.4g} ms, {row.ratio - 1:+.1%}"
        console.print(f"slower: {where(row)}: {change} (noise {row.noise:.1%})", soft_wrap=True)
    for _, row in found.broken.head(20).iterrows():
        console.print(f"was ok: {where(row)}: {row.status_b}", soft_wrap=True)
    unmatched = f"; only in A: {found.only_a}, only in B: {found.only_b}" if found.only_a or found.only_b else ""
    console.print(f"{len(found.rows)} rows compared, {len(found.regressions)} slower, {len(found.broken)} no longer ok{unmatched}")
