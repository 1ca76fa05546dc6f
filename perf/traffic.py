"""What every op moves and launches: tritattn's kernels in the interpreter, eager code by its operators, torch.compile by the code it generates."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .cases import Case, Inputs, make_case
from .counting import Counter, Moved, map_order
from .environment import ROOT, environment
from .l2 import Trace
from .ops import OPS
from .providers import build
from .schema import TRAFFIC, Writer
from .shapes import STAGES, Site
from .summary import print_traffic

BATCH = 2  # of the maps that are counted
TILES_FOR = 256  # of the maps whose tiles, generated code or DRAM traffic it is
PROVIDERS = ("tritattn", "eager", "compile")
Answers = dict[str, Any]


def eager(case: Case, dram: bool = False) -> dict[str, Moved]:
    """Mode -> what plain torch moves, from the operators that it dispatches, and what a large batch would move to and from DRAM."""
    inputs = Inputs(case, "meta")
    call = build("eager", case, inputs.weights, "meta")
    call.train(True)
    of_map = map_order(case)
    steps = {mode: Counter(of_map, Trace() if dram else None) for mode in ("fwd", "bwd")}
    with steps["fwd"]:
        y = call.run(inputs.x[0], inputs.residual[0])
    with steps["bwd"]:
        torch.autograd.grad(y, inputs.wanted(0, call.parameters), inputs.g[0])
    return {mode: step.result(TILES_FOR, of_map.map_numel * case.itemsize) for mode, step in steps.items()}


class Worker:
    """A process that answers questions in JSON lines. Once it has died, every answer is {"unavailable": why}."""

    def __init__(self, module: str, **variables: str):
        self.module = module
        variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **variables}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen([sys.executable, "-m", module], cwd=ROOT, env={**os.environ, **variables}, text=True, **pipes)

    def ask(self, question: dict[str, Any]) -> Answers:
        assert self.process.stdin and self.process.stdout
        line = ""
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        last = next(reversed(self.errors.read().split("\n")[:-1]), "")
        return {"unavailable": f"{self.module} ended with exit status {self.process.returncode}: {last}"[:300]}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            assert pipe
            with suppress(BrokenPipeError):
                pipe.close()


def ask(module: str, questions: Iterable[dict[str, Any]], **variables: str) -> Iterator[Answers]:
    """Answers of a worker process, in order."""
    worker = Worker(module, **variables)
    try:
        for question in questions:
            yield worker.ask(question)
    finally:
        worker.close()


def plan(op_names: Sequence[str], sites: Sequence[Site], layouts: Sequence[str], dtype: str) -> list[Case]:
    """Ops are the inner loop: a run cut short has all of them at the first site and layout."""
    return [make_case(name, dtype, layout, BATCH, site) for site in sites for layout in layouts for name in op_names]


def rows(case: Case, provider: str, answer: Answers) -> list[dict[str, Any]]:
    """The rows of one case: `answer` holds Moved (or its fields) by mode, or why there is none."""
    found = []
    for index, mode in enumerate(("fwd", "bwd")):
        row: dict[str, Any] = {name: value for name, value in case.row().items() if name != "params"}
        row.update(provider=provider, mode=mode, bar_u=case.op.bar_u[index], floor_u=case.op.floor_u[index], status="ok")
        if mode in answer:
            moved = answer[mode] if isinstance(answer[mode], Moved) else Moved(**answer[mode])
            row.update(moved.in_u(map_order(case).map_numel * case.itemsize), launches=moved.launches, dram_u=moved.dram_u)
        else:
            row["status"] = next((f"{why}: {text}" for why, text in answer.items()), "error: no answer")
        found.append(row)
    return found


def traffic(
    path: str | os.PathLike[str],
    console: Console,
    *,
    op_names: Sequence[str] = OPS,
    sites: Sequence[Site] = STAGES,
    layouts: Sequence[str] = ("contiguous", "channels_last"),
    dtype: str = "bf16",
    providers: Sequence[str] = PROVIDERS,
    budget: float | None = None,
    resume: bool = True,
) -> Path:
    started = time.monotonic()
    cases = plan(op_names, sites, layouts, dtype)
    large = [dataclasses.replace(case, n=TILES_FOR) for case in cases]
    columns = (TextColumn("traffic {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Writer(path, TRAFFIC, environment("cpu"), resume=resume) as writer, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=2 * len(providers) * len(cases))

        def missing(cases: Sequence[Case], provider: str) -> list[Case]:
            if provider not in providers:
                return []
            found = [case for case in cases if not all(writer.has(row) for row in rows(case, provider, {}))]
            progress.advance(task, 2 * (len(cases) - len(found)))
            return found

        # Both workers take seconds per case; each has a thread here that feeds it, and this one alone writes.
        answers: queue.Queue[tuple[Case, str, Answers] | None] = queue.Queue()

        def feed(provider: str, module: str, cases: list[Case], interpret: str) -> None:
            asked: list[Case] = []

            def questions() -> Iterator[dict[str, Any]]:
                for case in cases:
                    if budget is not None and time.monotonic() - started >= budget:
                        return
                    asked.append(case)
                    yield {"case": dataclasses.asdict(case), "batch": TILES_FOR}

            try:
                for answer in ask(module, questions(), TRITON_INTERPRET=interpret):
                    answers.put((asked[-1], provider, answer))
            finally:
                answers.put(None)

        for case in missing(cases, "eager"):
            for row in rows(case, "eager", eager(case, dram=True)):
                writer.write(row)
            progress.advance(task, 2)
        work = [("tritattn", "perf.interpret", missing(cases, "tritattn"), "1"), ("compile", "perf.inductor", missing(large, "compile"), "0")]
        for arguments in work:
            threading.Thread(target=feed, args=arguments, daemon=True).start()
        running = len(work)
        while running:
            item = answers.get()
            if item is None:
                running -= 1
                continue
            case, provider, answer = item
            progress.update(task, description=f"{case.op_name} {case.layout}")
            for row in rows(case, provider, answer):
                writer.write(row)
            progress.advance(task, 2)
        left = 2 * len(providers) * len(cases) - int(progress.tasks[task].completed)
        if left:
            console.print(f"budget of {budget:g} s spent: {left} rows not counted")
        print_traffic(writer.rows, console)
    return Path(path)
