"""The sweep: every provider of every case is checked against fp64, then timed; a row per measurement, failures included."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from . import timing
from .cases import Answer, Case, Inputs, relative_error
from .choices import describe, recorded
from .counting import count_launches
from .environment import environment
from .providers import Call, build, offers
from .schema import SWEEP, Writer

MODES = ("fwd_bwd", "inference", "bwd", "fwd")


@dataclass(frozen=True)
class Plan:
    """What to measure. `samples` of about `sample_ms` each; `budget` in seconds for all."""

    cases: Sequence[Case]
    providers: Sequence[str]
    modes: Sequence[str] = MODES
    samples: int = 15
    sample_ms: float = 2.0
    budget: float | None = None
    # cases from this one on leave `compile` out: its compiler takes seconds per case
    compile_cases: int | None = None

    def rows(self, index: int) -> list[tuple[str, str]]:
        """(provider, mode) of the case at `index`, where the provider has such a block."""
        left_out = self.compile_cases is not None and index >= self.compile_cases
        case = self.cases[index]
        return [(p, m) for m in self.modes for p in self.providers if offers(p, case) and not (p == "compile" and left_out)]


def status_of(error: BaseException) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower():
        return "oom"
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"error: {type(error).__name__}: {first}"[:300]


class DeviceFailed(Exception):
    """The GPU takes no more calls; `rows` (provider -> columns) were running."""

    def __init__(self, rows: dict[str, dict[str, Any]]):
        super().__init__("the device failed")
        self.rows = rows


class Bench:
    """One case on one device: inputs, answer and providers, and each mode as a call that can be checked and timed."""

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        self.sets, self.l2 = timing.sets_for(device, 2 * case.itemsize * case.n * case.c * case.h * case.w)
        self.inputs = Inputs(case, device, self.sets)
        self.answer = Answer(self.inputs)
        self.calls: dict[str, Call] = {}

    def provider(self, name: str) -> Call:
        if name not in self.calls:
            self.calls[name] = build(name, self.case, self.inputs.weights, self.device)
        return self.calls[name]

    def call(self, provider: str, mode: str) -> Callable[[int], Any]:
        """A function of the set's index that runs the mode once; what it needs is prepared here."""
        run, inputs = self.provider(provider), self.inputs
        run.train(mode != "inference")
        if mode == "inference":
            for norm in (m for module in run.modules for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
                norm.reset_running_stats()  # the answer's are fresh

            def inference(i: int) -> Tensor:
                with torch.no_grad():
                    return run.run(inputs.x[i], inputs.residual[i])

            return inference
        if mode == "fwd":
            return lambda i: run.run(inputs.x[i], inputs.residual[i])

        if mode == "fwd_bwd":

            def both(i: int) -> tuple[Tensor, tuple[Tensor, ...]]:
                y = run.run(inputs.x[i], inputs.residual[i])
                return y, torch.autograd.grad(y, inputs.wanted(i, run.parameters), inputs.g[i])

            return both
        outputs = [run.run(inputs.x[i], inputs.residual[i]) for i in range(self.sets)]
        return lambda i: torch.autograd.grad(outputs[i], inputs.wanted(i, run.parameters), inputs.g[i], retain_graph=True)

    def error(self, mode: str, result: Any) -> tuple[float, bool]:
        """(largest relative error, whether each is within its tolerance) of what `call(...)(0)` returned."""
        answer = self.answer
        checks: list[tuple[float, float]] = []  # (error, tolerance)
        if mode in ("inference", "fwd", "fwd_bwd"):
            y = result[0] if mode == "fwd_bwd" else result
            checks.append((relative_error(y, answer.inference if mode == "inference" else answer.y), answer.tolerance()))
        if mode in ("bwd", "fwd_bwd"):
            grads = result[1] if mode == "fwd_bwd" else result
            for index, (got, expected) in enumerate(zip(grads, answer.grads, strict=True)):
                error = relative_error(got.reshape(expected.shape), expected, answer.scale(index))
                checks.append((error, answer.tolerance(index)))
        return max(error for error, _ in checks), all(error <= tolerance for error, tolerance in checks)

    def peak_mb(self, call: Callable[[int], Any]) -> float | None:
        """Memory that the call allocates at its peak, on a GPU."""
        if self.device == "cpu":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call(0)
        torch.cuda.synchronize()
        del result
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def measure(self, mode: str, providers: Sequence[str], samples: int, sample_ms: float) -> dict[str, dict[str, Any]]:
        """Check and time the providers in one mode: provider -> the columns that this found."""
        rows: dict[str, dict[str, Any]] = {}
        lanes: dict[str, timing.Lane] = {}
        for name in providers:
            row: dict[str, Any] = {"status": "ok", "l2": self.l2, "bytes_min": self.case.bytes_min(mode)}
            rows[name] = row
            try:
                call = self.call(name, mode)
                with recorded() as found:
                    result = call(0)
                row["max_err"], right = self.error(mode, result)
                del result
                if name == "tritattn":
                    row["config"], row["config_source"] = describe(found) if found else ("", "reference")
                if not right:
                    row["status"] = "wrong"
                    continue
                row["peak_mb"] = self.peak_mb(call)
                row["launches"] = count_launches(call, self.device, name)
                lanes[name] = timing.lane(call, self.sets, self.device)
            except Exception as error:
                row["status"] = status_of(error)
            if row["status"] != "ok":
                _clean(self.device, {name: row})
        if not lanes:
            return rows
        try:
            times = timing.measure({**lanes, "copy": self.copy_lane()}, self.device, samples=samples, sample_ms=sample_ms)
        except Exception as error:
            for name in lanes:
                rows[name]["status"] = status_of(error)
            return rows
        copy_gbps = self.copied_bytes / times["copy"].ms_p50 / 1e6
        for name in lanes:
            taken = times[name]
            gbps = self.case.bytes_min(mode) / taken.ms_p50 / 1e6
            rows[name].update(ms_p50=taken.ms_p50, ms_p20=taken.ms_p20, ms_p80=taken.ms_p80, timer=taken.timer, samples=taken.samples)
            rows[name].update(gbps=gbps, copy_gbps=copy_gbps, pct_copy=100 * gbps / copy_gbps)
        return rows

    @property
    def copied_bytes(self) -> int:
        return 2 * self.inputs.g[0].numel() * self.inputs.g[0].element_size()

    def copy_lane(self) -> timing.Lane:
        """The ceiling: a copy of the map, timed beside the providers."""
        targets = [torch.empty_like(g) for g in self.inputs.g]
        return timing.lane(lambda i: targets[i].copy_(self.inputs.g[i]), self.sets, self.device)


def run(plan: Plan, writer: Writer, device: str, console: Console) -> None:
    """Measure the plan's rows that `writer` does not hold yet, in order, until the budget is spent."""
    started = time.monotonic()
    durations: list[float] = []
    rows = [plan.rows(i) for i in range(len(plan.cases))]
    total = sum(map(len, rows))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, timing.own_stream(device):
        task = progress.add_task("sweep", total=total)
        for index, case in enumerate(plan.cases):
            todo = [(p, m) for p, m in rows[index] if not writer.has({**case.row(), "provider": p, "mode": m})]
            progress.advance(task, len(rows[index]) - len(todo))
            if not todo:
                continue
            if plan.budget is not None:
                typical = statistics.median(durations[-5:]) if len(durations) >= 5 else 0.0
                if time.monotonic() - started + typical > plan.budget:
                    missing = total - progress.tasks[task].completed
                    console.print(f"budget of {plan.budget:g} s spent: {missing:g} of {total} rows not measured")
                    break
            progress.update(task, description=f"{case.op_name} {case.dtype} {case.layout} {'x'.join(map(str, case.shape))}")
            begun = time.monotonic()
            _run_case(plan, case, todo, writer, device, lambda done: progress.advance(task, done))
            durations.append(time.monotonic() - begun)


def _run_case(plan: Plan, case: Case, todo: Sequence[tuple[str, str]], writer: Writer, device: str, advance: Callable[[int], Any]) -> None:
    def write(mode: str, provider: str, found: dict[str, Any]) -> None:
        writer.write({**case.row(), "provider": provider, "mode": mode, **found})
        advance(1)

    failure: dict[str, Any] | None = None
    try:
        bench = Bench(case, device)
    except Exception as error:
        failure = {"status": status_of(error)}
    if failure is not None:
        for provider, mode in todo:
            write(mode, provider, {**failure, "bytes_min": case.bytes_min(mode)})
        _clean(device, {})
        return
    for mode in plan.modes:
        providers = [p for p, m in todo if m == mode]
        if not providers:
            continue
        try:
            rows = bench.measure(mode, providers, plan.samples, plan.sample_ms)
        except DeviceFailed as failed:
            for provider, found in failed.rows.items():
                write(mode, provider, found)
            raise
        for provider, found in rows.items():
            write(mode, provider, found)
        _clean(device, {})


def _clean(device: str, blamed: dict[str, dict[str, Any]]) -> None:
    """Give back memory. A device that does not answer any more cannot go on, and the rows `blamed` were the last to run."""
    if device == "cuda":
        gc.collect()
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise DeviceFailed(blamed) from error
        torch.cuda.empty_cache()


def sweep(plan: Plan, path: str | os.PathLike[str], device: str, console: Console, *, resume: bool = True) -> Path:
    from .summary import print_summary

    torch.backends.cudnn.allow_tf32 = False  # or a convolution in fp32 would be one in TF32
    exit_status = 0
    with Writer(path, SWEEP, environment(device), resume=resume) as writer:
        try:
            run(plan, writer, device, console)
        except KeyboardInterrupt:
            console.print("interrupted; the same command goes on from here")
            exit_status = 130
        except DeviceFailed as failed:
            console.print(f"the device failed ({', '.join(failed.rows)}); the same command goes on after it")
            exit_status = 1
        print_summary(writer.rows, console)
    if exit_status:
        raise SystemExit(exit_status)
    return Path(path)
