"""What a machine with a GPU is asked for, in steps that end within their share of a budget and go on from their files when run again."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .environment import ROOT

GRACE = 30  # seconds that a step may take beyond its share: a measurement is not broken off


@dataclass(frozen=True)
class Step:
    """command: its arguments to Python, with {file}, {out} and {share}, the seconds it has. share: its part of a budget, relative to the others'."""

    file: str
    command: tuple[str, ...]
    share: float = 1
    grace: int = GRACE


def _workers() -> tuple[str, ...]:
    # compiling kernels is most of the tests' time
    return ("-n", "8") if importlib.util.find_spec("xdist") else ()


def _perf(name: str, *options: str, share: float = 1) -> Step:
    return Step(f"{name}.csv", ("-m", "perf", name, "--csv", "{file}", "--budget", "{share}", *options), share)


STEPS = {
    "tests": Step("tests.xml", ("-m", "pytest", "tests/gpu", "-q", "-m", "gpu", *_workers(), "--junitxml", "{file}"), 2, 0),
    "host": _perf("host", share=0.5),
    "sweep": _perf("sweep"),
    "tune": _perf("tune", "--out", "{out}/tuned.json"),
    "models": _perf("models"),
}


def _run(command: Sequence[str], seconds: float) -> int:
    """The exit status; interrupted after so many seconds, so that what it has is written, and killed ten later."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # the workers of the tests end sooner where they hear of it themselves
        try:
            return process.wait(10)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def gpu(out: Path, names: Sequence[str], budget: float, console: Console) -> int:
    """Run the steps of these names, one after another, within the budget in seconds. Returns 0 where all ended well."""
    out.mkdir(parents=True, exist_ok=True)
    ends, statuses = time.monotonic() + budget, {}
    for index, name in enumerate(names):
        step = STEPS[name]
        left = ends - time.monotonic()
        share = left * step.share / sum(STEPS[later].share for later in names[index:])
        arguments = [part.format(file=out.resolve() / step.file, out=out.resolve(), share=int(max(share, 0))) for part in step.command]
        statuses[name] = _run([sys.executable, *arguments], share + step.grace)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("step", "exit", "file"):
        table.add_column(title, no_wrap=True)
    for name, status in statuses.items():
        table.add_row(name, str(status), str(out / STEPS[name].file))
    console.print(table)
    return int(any(statuses.values()))
