"""One HTML page of what a run found, with everything in it: figures as SVG, style inline, no script."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from . import plots
from .l2 import L2_BYTES
from .schema import CODEGEN, DIGITS, ENVIRONMENT, MODELS, SWEEP, TRAFFIC, read
from .summary import geomean, speedups
from .traffic import TILES_FOR

KINDS = {"sweep": SWEEP, "models": MODELS, "traffic": TRAFFIC, "codegen": CODEGEN, "digits": DIGITS}


def _environment(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What the rows say about where they come from: a column per file, several values where rows differ."""
    names = [name for name in ENVIRONMENT if name != "timestamp"]
    columns = {kind: [", ".join(sorted(set(table[name]) - {""})) for name in names] for kind, table in tables.items()}
    found = pd.DataFrame(columns, index=pd.Index(names))
    found.loc["measured"] = [f"{table.timestamp.min()} to {table.timestamp.max()}" for table in tables.values()]
    found.loc["rows"] = [str(len(table)) for table in tables.values()]
    return found


def _speedup_table(table: pd.DataFrame) -> pd.DataFrame:
    timed = table[(table.provider == "tritattn") & (table.status == "ok")]
    ratios = {b: speedups(table, b) for b in ("eager", "compile", "timm", "torchvision")}
    rows = []
    for (op, mode), group in timed.groupby(["op", "mode"], sort=False):
        row: dict[str, Any] = {"op": op, "mode": mode, "rows": len(group)}
        for baseline, found in ratios.items():
            row[f"over {baseline}"] = geomean(found[(found.op == op) & (found["mode"] == mode)].speedup)
        row["% of copy"] = geomean(group.pct_copy)
        rows.append(row)
    return pd.DataFrame(rows)


def _models_table(table: pd.DataFrame) -> pd.DataFrame:
    """Attention's cost in %, a row per case."""
    case = ["network", "mode", "dtype", "layout", "n", "size", "execution"]
    plain = table[table.provider == "plain"].set_index(case).images_s.rename("plain, images/s")
    costs = table[table.provider != "plain"].pivot(index=case, columns="provider", values=["cost_pct", "cost_us"])
    costs.columns = pd.Index([f"{provider}, {'%' if value == 'cost_pct' else 'us/image'}" for value, provider in costs.columns])
    return costs.join(plain).reset_index()


def _dram_table(traffic: pd.DataFrame, sweep: pd.DataFrame | None) -> pd.DataFrame:
    """tritattn's U as counted, as predicted to reach DRAM, and as a copy moves in the time measured on the same maps: the most over all shapes."""
    where = ["op", "mode", "layout", "dtype", "c", "h", "w"]
    rows = traffic[(traffic.provider == "tritattn") & (traffic.status == "ok")][[*where, "total_u", "dram_u"]]
    columns = ["total_u", "dram_u"]
    if sweep is not None:
        timed = sweep[(sweep.provider == "tritattn") & (sweep.status == "ok") & (sweep.n == TILES_FOR) & (sweep.timer != "cpu")]
        rows = rows.merge(timed.groupby(where, as_index=False).copy_u.max(), on=where, how="left")
        columns.append("copy_u")
    names = {"total_u": "counted", "dram_u": "DRAM, predicted", "copy_u": "a copy, in the time measured"}
    return rows.groupby(["op", "mode"], sort=False, as_index=False)[columns].max().rename(columns=names)


def _codegen_table(table: pd.DataFrame) -> pd.DataFrame:
    good = table[table.status == "ok"]
    if good.empty:
        return pd.DataFrame()
    aggregates = {"config": "count", "registers": "max", "spill_bytes": "max", "shared_bytes": "max", "map_load_bits": "min", "map_store_bits": "min"}
    return good.groupby(["kernel", "dtype", "target"], sort=False).agg(aggregates).rename(columns={"config": "configs"}).reset_index()


def _not_ok(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    columns = {"sweep": "op", "models": "network", "traffic": "op", "codegen": "kernel", "digits": "block"}
    found = []
    for kind, table in tables.items():
        bad = table[table.status != "ok"]
        for status, group in bad.groupby("status", sort=False):
            found.append({"file": kind, "rows": len(group), "of": ", ".join(dict.fromkeys(group[columns[kind]])), "status": status})
    return pd.DataFrame(found)


def _html(table: pd.DataFrame, index: bool = False) -> str:
    return "" if table.empty else table.to_html(index=index, border=0, na_rep="", float_format=lambda v: f"{v:.4g}")


def report(out: str | os.PathLike[str], paths: Mapping[str, str | os.PathLike[str]]) -> Path:
    """Write the page from the CSVs in `paths`, a subset of those in KINDS."""
    from jinja2 import Environment, FileSystemLoader

    tables = {kind: read(path, KINDS[kind]) for kind, path in paths.items()}
    sections: list[dict[str, Any]] = []
    if "sweep" in tables:
        sweep = tables["sweep"]
        on_cpu = bool((sweep.timer == "cpu").any())
        modes = [m for m in ("fwd_bwd", "inference", "bwd", "fwd") if (sweep["mode"] == m).any()]
        figures = [figure(sweep, mode) for figure in (plots.speedup_figure, plots.ceiling_figure) for mode in modes]
        note = "On a CPU tritattn runs plain torch and no kernel: this shows that the path works, not what the kernels gain." if on_cpu else ""
        sections.append({"title": "Time", "note": note, "figures": [f for f in figures if f], "tables": [_html(_speedup_table(sweep))]})
    if "models" in tables:
        note = "What attention adds to a network's time, over the same network without it, both eager or both compiled."
        sections.append({"title": "Networks", "note": note, "figures": [], "tables": [_html(_models_table(tables["models"]))]})
    if "traffic" in tables:
        note = "Counted, not timed. Line: one read of the map per global dependency; dots: the map kept on chip between reduction and gate."
        note += f" Table: the most U over all shapes, and what an L2 of {L2_BYTES >> 20} MB would let through to DRAM for a batch of {TILES_FOR}."
        figure = plots.traffic_figure(tables["traffic"])
        table = _html(_dram_table(tables["traffic"], tables.get("sweep")))
        sections.append({"title": "Traffic", "note": note, "figures": [figure] if figure else [], "tables": [table]})
    if "codegen" in tables:
        note = "The most resources and the narrowest map accesses over the configurations compiled for each target."
        sections.append({"title": "Generated code", "note": note, "figures": [], "tables": [_html(_codegen_table(tables["codegen"]))]})
    if "digits" in tables:
        note = "A small residual network trained on scikit-learn's digits with each block: that they learn, not which is best."
        link = os.path.relpath(paths["digits"], Path(out).parent)
        figure = plots.accuracy_figure(tables["digits"])
        sections.append({"title": "An example", "note": note, "link": link, "figures": [figure] if figure else [], "tables": []})
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = templates.get_template("report.html.j2").render(
        sections=sections, environment=_html(_environment(tables), index=True), failures=_html(_not_ok(tables))
    )
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path
