"""The report's figures, as SVG text."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .summary import geomean, speedups

COLOURS = {"tritattn": "#c0392b", "compile": "#2c6fbb", "eager": "#9aa3ad", "timm": "#b58900", "torchvision": "#5f8a3a"}


def svg(figure: Figure) -> str:
    """The figure as an element to put into a page: text stays text, and nothing refers outside."""
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", bbox_inches="tight")
    element = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    return element[element.index("<svg") :]


def shape_of(table: pd.DataFrame) -> pd.Series:
    return table.c.astype(int).astype(str) + "×" + table.h.astype(int).astype(str) + "×" + table.w.astype(int).astype(str)


def _shapes(table: pd.DataFrame) -> list[str]:
    """The shapes, from many pixels to many channels."""
    order = table.assign(shape=shape_of(table)).sort_values(["h", "c"], ascending=[False, True])
    return list(dict.fromkeys(order["shape"]))


def _by_shape(axes: Any, series: dict[str, pd.DataFrame], shapes: Sequence[str], value: str, colours: dict[str, Any]) -> None:
    """A line per series over the shapes: geometric means, and every single row as a faint dot."""
    positions = {shape: i for i, shape in enumerate(shapes)}
    for name, rows in series.items():
        if rows.empty:
            continue
        labels = shape_of(rows)
        means = rows.groupby(labels)[value].apply(geomean)
        means = means.reindex([s for s in shapes if s in means.index])
        axes.plot([positions[s] for s in means.index], means.to_numpy(), marker="o", markersize=4, label=name, color=colours[name])
        axes.plot([positions[s] for s in labels], rows[value], ".", markersize=2, alpha=0.3, color=colours[name])
    axes.set_xticks(range(len(shapes)), shapes, rotation=45, ha="right", fontsize=7)
    axes.grid(alpha=0.3)


def _panels(count: int, height: float) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(11, height * count), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(count, 1, sharex=True)))


def speedup_figure(table: pd.DataFrame, mode: str) -> str | None:
    """Speed-up of tritattn over each baseline by shape, a line per op."""
    chosen = table[table["mode"] == mode]
    found = {baseline: speedups(chosen, baseline) for baseline in ("eager", "compile", "timm", "torchvision")}
    found = {baseline: rows for baseline, rows in found.items() if not rows.empty}
    if not found:
        return None
    ops = list(dict.fromkeys(name for rows in found.values() for name in rows.op))
    palette = mpl.colormaps["tab20"]
    colours = {name: palette(i % 20) for i, name in enumerate(ops)}
    shapes = _shapes(pd.concat(found.values()))
    figure, panels = _panels(len(found), 2.6)
    for axes, (baseline, rows) in zip(panels, found.items(), strict=True):
        _by_shape(axes, {name: rows[rows.op == name] for name in ops}, shapes, "speedup", colours)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylabel(f"over {baseline}")
    panels[0].set_title(f"{mode}: speed-up of tritattn by shape C×H×W", fontsize=10)
    panels[0].legend(fontsize=7, ncols=1, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return svg(figure)


def ceiling_figure(table: pd.DataFrame, mode: str) -> str | None:
    """Share of the copy's bandwidth by shape, a panel per op and a line per provider."""
    chosen = table[(table["mode"] == mode) & (table.status == "ok") & table.pct_copy.notna()]
    ops = list(dict.fromkeys(chosen.op))
    if not ops:
        return None
    shapes = _shapes(chosen)
    figure, panels = _panels(len(ops), 1.7)
    for axes, name in zip(panels, ops, strict=True):
        rows = chosen[chosen.op == name]
        _by_shape(axes, {p: rows[rows.provider == p] for p in COLOURS}, shapes, "pct_copy", COLOURS)
        axes.axhline(100, color="black", linewidth=0.8)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(name, fontsize=7)
    panels[0].set_title(f"{mode}: % of the bandwidth of a copy, at the least bytes that the op can move", fontsize=10)
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    panels[0].legend(handles.values(), handles.keys(), fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return svg(figure)


def traffic_figure(table: pd.DataFrame) -> str | None:
    """U of every provider for every op, forward and backward, against bar and floor; the worst over shapes and layouts."""
    counted = table[table.status == "ok"]
    ops = list(dict.fromkeys(counted.op))
    if not ops:
        return None
    providers = [p for p in ("tritattn", "compile", "eager") if (counted.provider == p).any()]
    figure, panels = _panels(2, 2.8)
    width = 0.8 / len(providers)
    for axes, (mode, title) in zip(panels, (("fwd", "forward"), ("bwd", "backward")), strict=True):
        rows = counted[counted["mode"] == mode]
        for i, provider in enumerate(providers):
            most = rows[rows.provider == provider].groupby("op").total_u.max().reindex(ops)
            centres = np.arange(len(ops)) + (i - (len(providers) - 1) / 2) * width
            bars = axes.bar(centres, most.to_numpy(), width, label=provider, color=COLOURS[provider])
            axes.bar_label(bars, [f"{v:.3g}" if np.isfinite(v) else "" for v in most], fontsize=6)
        for column, style in (("bar_u", "-"), ("floor_u", ":")):
            bounds = rows.groupby("op")[column].max().reindex(ops)
            edges = np.arange(len(ops))
            axes.hlines(bounds, edges - 0.45, edges + 0.45, colors="black", linestyles=style, linewidth=1.2, label=column.replace("_u", ""))
        axes.set_ylabel(f"{title}, U")
        axes.set_xticks(range(len(ops)), ops, rotation=30, ha="right", fontsize=8)
    panels[0].set_title("map traffic: reads and writes of the map, in units of one read or write of N·C·H·W elements", fontsize=10)
    panels[0].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return svg(figure)


def accuracy_figure(table: pd.DataFrame) -> str | None:
    """Accuracy of the digits' networks by block: a dot per seed, a bar at their mean."""
    good = table[table.status == "ok"]
    if good.empty:
        return None
    means = good.groupby("block", sort=False).accuracy.mean().sort_values()
    positions = {name: i for i, name in enumerate(means.index)}
    figure = Figure(figsize=(7, 0.6 + 0.22 * len(means)), layout="constrained")
    axes = figure.subplots()
    axes.plot(100 * good.accuracy, good.block.map(positions), ".", color=COLOURS["eager"], label="a seed")
    axes.plot(100 * means, range(len(means)), "|", markersize=10, markeredgewidth=2, color=COLOURS["tritattn"], label="mean")
    axes.set_yticks(range(len(means)), list(means.index), fontsize=8)
    axes.set_xlabel("% right of the digits held out")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return svg(figure)
