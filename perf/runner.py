"""Running measurements in order until a budget is spent: what a CSV holds already is not repeated, and failures are rows."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import timing
from .environment import environment
from .schema import Writer

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Unit:
    """What is measured in one go, its rows side by side.

    rows: the identity columns of each. measure(missing) yields those that are missing, with all their columns. kind: units of one kind take about as
    long as each other.
    """

    name: str
    rows: Sequence[Row]
    measure: Callable[[Sequence[Row]], Iterable[Row]]
    kind: str = ""


class DeviceFailed(Exception):
    """The GPU takes no more calls; `rows` (provider -> columns) were running."""

    def __init__(self, rows: dict[str, dict[str, Any]]):
        super().__init__("the device failed")
        self.rows = rows


def status_of(error: BaseException) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower():
        return "oom"
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"error: {type(error).__name__}: {first}"[:300]


def clean(device: str, blamed: dict[str, dict[str, Any]]) -> None:
    """Give back memory. A device that does not answer any more cannot go on, and the rows `blamed` were the last to run."""
    if device == "cuda":
        gc.collect()
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise DeviceFailed(blamed) from error
        torch.cuda.empty_cache()


def run(units: Sequence[Unit], writer: Writer, title: str, device: str, console: Console, budget: float | None) -> None:
    """Measure the rows that `writer` does not hold yet, until the budget, in seconds, would not do for another unit."""
    started = time.monotonic()
    durations: dict[str, list[float]] = defaultdict(list)
    total = sum(len(unit.rows) for unit in units)
    columns = (TextColumn(f"{title} {{task.description}}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, timing.own_stream(device):
        task = progress.add_task("", total=total)
        for unit in units:
            missing = [row for row in unit.rows if not writer.has(row)]
            progress.advance(task, len(unit.rows) - len(missing))
            if not missing:
                continue
            if budget is not None:
                known = durations[unit.kind][-5:]
                if time.monotonic() - started + (statistics.median(known) if known else 0.0) > budget:
                    left = total - progress.tasks[task].completed
                    console.print(f"budget of {budget:g} s spent: {left:g} of {total} rows not measured")
                    break
            progress.update(task, description=unit.name)
            begun = time.monotonic()
            for row in unit.measure(missing):
                writer.write(row)
                progress.advance(task, 1)
            durations[unit.kind].append(time.monotonic() - begun)


def measure(
    units: Sequence[Unit],
    path: str | os.PathLike[str],
    columns: tuple[str, ...],
    *,
    title: str,
    device: str,
    console: Console,
    summary: Callable[[Sequence[Mapping[str, str]], Console], None],
    budget: float | None = None,
    resume: bool = True,
) -> Path:
    """`run` into the CSV at `path`, and print the summary of what it holds then. Exits with a status where something ended it early."""
    exit_status = 0
    with Writer(path, columns, environment(device), resume=resume) as writer:
        try:
            run(units, writer, title, device, console, budget)
        except KeyboardInterrupt:
            console.print("interrupted; the same command goes on from here")
            exit_status = 130
        except DeviceFailed as failed:
            console.print(f"the device failed ({', '.join(failed.rows)}); the same command goes on after it")
            exit_status = 1
        summary(writer.rows, console)
    if exit_status:
        raise SystemExit(exit_status)
    return Path(path)
