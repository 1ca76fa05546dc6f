"""The sweep: every provider of every case is checked against fp64, then timed; a row per measurement, failures included."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from . import timing
from .cases import Answer, Case, Inputs, relative_error
from .choices import describe, recorded
from .counting import count_launches, peak_mb
from .providers import Call, build, offers
from .runner import DeviceFailed, Row, Unit, clean, measure, status_of
from .schema import SWEEP
from .summary import print_summary

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
                row["peak_mb"] = peak_mb(call, self.device)
                row["launches"] = count_launches(call, self.device, name)
                lanes[name] = timing.lane(call, self.sets, self.device)
            except Exception as error:
                row["status"] = status_of(error)
            if row["status"] != "ok":
                clean(self.device, {name: row})
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
            copied = 2 * taken.ms_p50 / times["copy"].ms_p50  # of which a copy makes two
            rows[name].update(asdict(taken), gbps=gbps, copy_gbps=copy_gbps, pct_copy=100 * gbps / copy_gbps, copy_u=copied)
        return rows

    @property
    def copied_bytes(self) -> int:
        return 2 * self.inputs.g[0].numel() * self.inputs.g[0].element_size()

    def copy_lane(self) -> timing.Lane:
        """The ceiling: a copy of the map, timed beside the providers."""
        targets = [torch.empty_like(g) for g in self.inputs.g]
        return timing.lane(lambda i: targets[i].copy_(self.inputs.g[i]), self.sets, self.device)


def _units(plan: Plan, device: str) -> list[Unit]:
    units = []
    for index, case in enumerate(plan.cases):
        rows = [{**case.row(), "provider": provider, "mode": mode} for provider, mode in plan.rows(index)]
        name = f"{case.op_name} {case.dtype} {case.layout} {'x'.join(map(str, case.shape))}"
        kind = "compile" if any(row["provider"] == "compile" for row in rows) else "eager"
        units.append(Unit(name, rows, partial(_run_case, plan, case, device), kind))
    return units


def _run_case(plan: Plan, case: Case, device: str, missing: Sequence[Row]) -> Iterator[Row]:
    failure: dict[str, Any] | None = None
    try:
        bench = Bench(case, device)
    except Exception as error:
        failure = {"status": status_of(error)}
    if failure is not None:
        for row in missing:
            yield {**row, **failure, "bytes_min": case.bytes_min(row["mode"])}
        clean(device, {})
        return
    for mode in plan.modes:
        rows = {row["provider"]: row for row in missing if row["mode"] == mode}
        if not rows:
            continue
        try:
            found = bench.measure(mode, list(rows), plan.samples, plan.sample_ms)
        except DeviceFailed as failed:
            for provider, columns in failed.rows.items():
                yield {**rows[provider], **columns}
            raise
        for provider, columns in found.items():
            yield {**rows[provider], **columns}
        clean(device, {})


def sweep(plan: Plan, path: str | os.PathLike[str], device: str, console: Console, *, resume: bool = True) -> Path:
    torch.backends.cudnn.allow_tf32 = False  # or a convolution in fp32 would be one in TF32
    options: dict[str, Any] = {"summary": print_summary, "budget": plan.budget, "resume": resume}
    return measure(_units(plan, device), path, SWEEP, title="sweep", device=device, console=console, **options)
