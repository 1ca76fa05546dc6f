"""The CSV files: their columns, what identifies a row, and how rows are written and read. Nothing else names a column list."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd

ENVIRONMENT = ("device", "os", "python", "torch", "triton", "cuda", "driver", "tritattn", "commit", "timestamp")

SWEEP = (
    *("op", "provider", "mode", "dtype", "layout", "n", "c", "h", "w", "params", "status", "max_err", "timer", "l2"),
    *("ms_p50", "ms_p20", "ms_p80", "launches", "bytes_min", "gbps", "pct_copy", "copy_u", "peak_mb", "config", "config_source"),
    *ENVIRONMENT,
    *("copy_gbps", "samples"),
)
TRAFFIC = (
    *("op", "provider", "mode", "layout", "dtype", "n", "c", "h", "w", "read_u", "write_u", "total_u", "other_u", "dram_u"),
    *("launches", "bar_u", "floor_u", "status"),
    *ENVIRONMENT,
)
CODEGEN = (
    *("kernel", "config", "layout", "dtype", "target", "registers", "spill_bytes", "shared_bytes"),
    *("map_load_bits", "map_store_bits", "status"),
    *ENVIRONMENT,
)
FEATURES = (
    *("op", "module", "forward", "backward", "contiguous", "channels_last", "bf16", "fp32", "fp16", "fp64", "compile", "export", "cpu"),
    *("u_fwd", "u_bwd", "bar_fwd", "bar_bwd", "floor_fwd", "floor_bwd", "launches_fwd", "launches_bwd"),
    *("eager_launches_fwd", "eager_launches_bwd", "compile_launches_fwd", "compile_launches_bwd", "checkpoints"),
    *ENVIRONMENT,
)
MODELS = (
    *("network", "provider", "execution", "mode", "dtype", "layout", "n", "size", "blocks", "status", "max_err", "timer"),
    *("ms_p50", "ms_p20", "ms_p80", "images_s", "cost_us", "cost_pct", "launches", "peak_mb"),
    *ENVIRONMENT,
    "samples",
)
TUNE = (
    *("op", "mode", "dtype", "layout", "n", "c", "h", "w", "params", "key", "batch", "config", "status", "max_err", "spill_bytes", "timer"),
    *("ms_p50", "ms_p20", "ms_p80", "ratio", "noise"),
    *ENVIRONMENT,
    "samples",
)
HOST = (
    *("op", "provider", "mode", "dtype", "layout", "n", "c", "h", "w", "params", "status", "timer"),
    *("host_us", "host_us_p20", "host_us_p80", "us", "us_p20", "us_p80"),
    *ENVIRONMENT,
    "samples",
)
DIGITS = ("block", "seed", "epochs", "status", "accuracy", "loss", "parameters", "seconds", *ENVIRONMENT)
# What names a measurement, as opposed to what it found: one row per value of these.
IDENTITY = {
    SWEEP: ("op", "provider", "mode", "dtype", "layout", "n", "c", "h", "w", "params"),
    TRAFFIC: ("op", "provider", "mode", "layout", "dtype", "n", "c", "h", "w"),
    CODEGEN: ("kernel", "config", "layout", "dtype", "target"),
    FEATURES: ("op",),
    MODELS: ("network", "provider", "execution", "mode", "dtype", "layout", "n", "size"),
    TUNE: ("op", "mode", "dtype", "layout", "n", "c", "h", "w", "params", "key", "batch", "config"),
    HOST: ("op", "provider", "mode", "dtype", "layout", "n", "c", "h", "w", "params"),
    DIGITS: ("block", "seed", "epochs"),
}
# Rows of another machine, package or commit do not stand in for a measurement of this one.
PLACE = ("device", "torch", "triton", "tritattn", "commit")
# Everything else is text. Empty cells stay empty, never "nan".
NUMBERS = frozenset(
    "n c h w batch max_err ratio noise ms_p50 ms_p20 ms_p80 launches bytes_min gbps pct_copy copy_u peak_mb copy_gbps samples "
    "read_u write_u total_u other_u dram_u bar_u floor_u registers spill_bytes shared_bytes map_load_bits map_store_bits "
    "host_us host_us_p20 host_us_p80 us us_p20 us_p80 "
    "size blocks images_s cost_us cost_pct seed epochs accuracy loss parameters seconds "
    "u_fwd u_bwd bar_fwd bar_bwd floor_fwd floor_bwd launches_fwd launches_bwd "
    "eager_launches_fwd eager_launches_bwd compile_launches_fwd compile_launches_bwd".split()
)


def cell(value: Any) -> str:
    """A value as it stands in a file: floats in six significant digits, None as nothing."""
    if value is None:
        return ""
    if isinstance(value, float):
        return format(value, ".6g") if math.isfinite(value) else str(value)
    return str(value)


def complete_rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a file that may end in the middle of one. Raises ValueError for other columns."""
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines()
    reader = csv.DictReader(lines)
    if lines and tuple(reader.fieldnames or ()) != columns:
        raise ValueError(f"{path}: its columns are not the ones of this version; move it away or choose another path")
    return [row for row in reader if None not in row and None not in row.values()]


def identity(row: Mapping[str, Any], columns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(cell(row[name]) for name in IDENTITY[columns])


def here(row: Mapping[str, str], environment: Mapping[str, Any]) -> bool:
    """Whether a row was measured at this place."""
    return all(row[name] == cell(environment[name]) for name in PLACE)


def gather(path: Path, parts: Iterable[Path], columns: tuple[str, ...]) -> None:
    """Move the rows of the parts to the end of the file at `path`."""
    parts = list(parts)
    rows = [row for file in (path, *parts) if file.exists() for row in complete_rows(file, columns)]
    new = path.with_suffix(".tmp")
    with new.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    os.replace(new, path)
    for part in parts:
        part.unlink()


class Writer:
    """Appends rows to a CSV, each on disk when `write` returns, so that an interrupted run loses nothing.

    With `resume` the rows already in the file that were measured at the same place (`PLACE`) count as done; otherwise the file starts afresh.
    """

    def __init__(self, path: str | os.PathLike[str], columns: tuple[str, ...], environment: Mapping[str, Any], *, resume: bool = False):
        self.path = Path(path)
        self.columns = columns
        self.environment = environment
        self.done: set[tuple[str, ...]] = set()
        self.rows: list[dict[str, str]] = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[dict[str, str]] = []
        if resume and self.path.exists():
            kept = complete_rows(self.path, columns)
        # Rewriting what was complete also drops a line that the interruption cut short.
        self.file = self.path.open("w", newline="", encoding="utf-8")
        self.csv = csv.DictWriter(self.file, columns, restval="", lineterminator="\n")
        self.csv.writeheader()
        for row in kept:
            self.csv.writerow(row)
            if here(row, environment):
                self.done.add(self.identity(row))
                self.rows.append(row)
        self.file.flush()

    def identity(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return identity(row, self.columns)

    def has(self, row: Mapping[str, Any]) -> bool:
        return self.identity(row) in self.done

    def write(self, row: Mapping[str, Any]) -> None:
        from .environment import now

        full = {**self.environment, "timestamp": now(), **row}
        texts = {name: cell(full.get(name)) for name in self.columns}
        unknown = full.keys() - set(self.columns)
        if unknown:
            raise ValueError(f"no such column: {', '.join(sorted(unknown))}")
        self.csv.writerow(texts)
        self.file.flush()
        self.done.add(self.identity(row))
        self.rows.append(texts)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()


def frame(rows: Iterable[Mapping[str, str]], columns: tuple[str, ...]) -> pd.DataFrame:
    """Rows of text as a table: numbers as floats (NaN where empty), the rest as text ("" where empty)."""
    table = pd.DataFrame([{name: row.get(name, "") for name in columns} for row in rows], columns=list(columns), dtype=object)
    for name in NUMBERS.intersection(columns):
        table[name] = pd.to_numeric(table[name].mask(table[name] == ""))
    return table


def read(path: str | os.PathLike[str], columns: tuple[str, ...]) -> pd.DataFrame:
    """A CSV of ours; where a measurement was repeated, the latest row of it. Other columns than `columns` are refused."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; is this the right kind of CSV?")
    rows = table[list(columns)].to_dict("records")
    return frame(rows, columns).drop_duplicates(list(IDENTITY[columns]), keep="last").reset_index(drop=True)
