"""What attention costs real networks: each timed without it, with it in plain torch, and with tritattn's, side by side.

Training is a forward pass, cross-entropy and a backward pass to all parameters; the optimiser's step, the same for everybody, is left out. bf16 is
what people use: parameters in bf16 for inference, autocast over parameters in fp32 for training. fp32 is torch's default, with TF32 in convolutions.
Calls are made one after another as in a program, without CUDA graphs; for a batch of one each is waited for, which gives its latency.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import tritattn

from . import timing
from .cases import DTYPES, LAYOUTS
from .counting import count_launches, peak_mb
from .networks import NETWORKS, Unavailable, forms
from .runner import DeviceFailed, Row, Unit, clean, measure, status_of
from .schema import MODELS
from .summary import print_models

PROVIDERS = ("plain", "torch", "tritattn")
EXECUTIONS = ("eager", "compile")
MODES = ("inference", "training")
BATCHES = {"inference": (256, 1), "training": (128,)}
REPLACED = "unavailable: attention takes the place of a convolution, and without it the network is another one"


@dataclass(frozen=True)
class Case:
    """What is measured side by side: one network by all providers, eager or compiled."""

    network: str
    execution: str
    mode: str
    dtype: str
    layout: str
    n: int
    size: int


def all_cases(
    networks: Sequence[str] = NETWORKS,
    executions: Sequence[str] = EXECUTIONS,
    modes: Sequence[str] = MODES,
    dtypes: Sequence[str] = ("bf16", "fp32"),
    layouts: Sequence[str] = ("channels_last", "contiguous"),
    batches: Sequence[int] = (),
    size: int = 224,
) -> list[Case]:
    """Every case, the most important first: importance is the sum of the ranks on all axes, whose values are given in that order."""
    ranked: dict[Case, int] = {}
    for mode in modes:
        sizes = batches or BATCHES[mode]
        for network, execution, dtype, layout, n in itertools.product(networks, executions, dtypes, layouts, sizes):
            rank = 2 * networks.index(network) + executions.index(execution) + modes.index(mode)
            rank += 4 * sizes.index(n) + 5 * layouts.index(layout) + 6 * dtypes.index(dtype)
            ranked[Case(network, execution, mode, dtype, layout, n, size)] = rank
    return sorted(ranked, key=lambda case: ranked[case])


Result = tuple[Tensor, tuple[Tensor | None, ...]]  # logits, and the parameters' gradients


class Bench:
    """One case on one device: the network's forms, their input, and the answer that they have to agree with."""

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        self.training = case.mode == "training"
        self.amp = case.dtype != "fp32" and self.training
        dtype = torch.float32 if self.amp else DTYPES[case.dtype]
        self.forms = forms(case.network, device, dtype, LAYOUTS[case.layout])
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(case.n, 3, case.size, case.size, generator=generator)
        self.x = x.to(device, dtype).contiguous(memory_format=LAYOUTS[case.layout])
        self.target = torch.randint(10, (case.n,), generator=generator).to(device)
        theirs = self.forms.models["torch"]
        self.answer = self.run("torch", copy.deepcopy(theirs).double(), self.x.double(), amp=False)
        rounding = self.errors(self.run("torch", copy.deepcopy(theirs), self.x))
        # What rounding does to this network is what it does to eager torch, but for the chance that the sign of a value in front of a ReLU is
        # another one, which turns a gradient a little even in fp32.
        floors = [8 * torch.finfo(DTYPES[case.dtype]).eps, *[4 * torch.finfo(torch.float32).eps ** 0.5] * 2]
        self.limits = [2 * error + floor for error, floor in zip(rounding, floors, strict=True)]

    def run(self, provider: str, model: nn.Module, x: Tensor, amp: bool | None = None) -> Result:
        """One call. The blocks that were attached are ours in every form; for "torch" they run as plain torch."""
        model.train(self.training)
        with tritattn.backend("reference") if provider == "torch" else nullcontext():
            if not self.training:
                with torch.no_grad():
                    return model(x), ()
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp if amp is None else amp):
                logits = model(x)
                loss = F.cross_entropy(logits, self.target)
            return logits.detach(), torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    def call(self, provider: str) -> Callable[[int], Result]:
        model = self.forms.models[provider]
        if self.case.execution == "compile":
            model = torch.compile(model, dynamic=False)  # type: ignore[assignment]
        return lambda _: self.run(provider, model, self.x)

    def errors(self, result: Result) -> list[float]:
        """Of the logits, of the gradients of the attention's parameters and of all others: the norm of the error over that of the answer."""
        names = [name for name, _ in self.forms.models["torch"].named_parameters()]
        errors = [[0.0, 0.0] for _ in range(3)]

        def add(part: int, got: Tensor | None, expected: Tensor | None) -> None:
            if expected is not None:
                difference = expected if got is None else got.double() - expected
                errors[part][0] += difference.square().sum().item()
                errors[part][1] += expected.square().sum().item()

        add(0, result[0], self.answer[0])
        for name, got, expected in zip(names, result[1], self.answer[1], strict=self.training):
            inside = any(name.startswith(f"{path}.") for path in self.forms.paths)
            add(1 if inside else 2, got, expected)
        return [(error / max(size, 1e-300)) ** 0.5 for error, size in errors]

    def lane(self, call: Callable[[int], Result]) -> timing.Lane:
        if self.device == "cpu":
            return timing.CpuLane(call, 1)
        return timing.LatencyLane(call, 1) if self.case.n == 1 else timing.EventLane(call, 1)

    def measure(self, samples: int, sample_ms: float) -> dict[str, dict[str, Any]]:
        """Check and time every form: provider -> the columns that this found."""
        rows: dict[str, dict[str, Any]] = {}
        lanes: dict[str, timing.Lane] = {}
        for name in PROVIDERS:
            row: dict[str, Any] = {"status": "ok", "blocks": len(self.forms.paths)}
            rows[name] = row
            if name not in self.forms.models:
                row["status"] = REPLACED
                continue
            try:
                call = self.call(name)
                result = call(0)
                if name != "plain":
                    errors = self.errors(result)
                    row["max_err"] = max(errors)
                    if not all(error <= limit for error, limit in zip(errors, self.limits, strict=True)):
                        row["status"] = "wrong"
                        continue
                del result
                row["peak_mb"] = peak_mb(call, self.device)
                row["launches"] = count_launches(call, self.device, self.case.execution)
                lanes[name] = self.lane(call)
            except Exception as error:
                row["status"] = status_of(error)
            if row["status"] != "ok":
                clean(self.device, {name: row})
        try:
            times = timing.measure(lanes, self.device, samples=samples, sample_ms=sample_ms)
        except Exception as error:
            for name in lanes:
                rows[name]["status"] = status_of(error)
            return rows
        for name, taken in times.items():
            rows[name].update(asdict(taken), images_s=1e3 * self.case.n / taken.ms_p50)
            if name != "plain" and "plain" in times:
                plain = times["plain"].ms_p50
                rows[name].update(cost_us=1e3 * (taken.ms_p50 - plain) / self.case.n, cost_pct=100 * (taken.ms_p50 / plain - 1))
        return rows


def _measure(case: Case, device: str, samples: int, sample_ms: float, missing: Sequence[Row]) -> Iterator[Row]:
    if case.execution == "compile":
        torch._dynamo.reset()  # what an earlier network left behind would count towards this one's recompilations
    failure: DeviceFailed | None = None
    try:
        found = Bench(case, device).measure(samples, sample_ms)
    except Unavailable as error:
        found = {name: {"status": f"unavailable: {error}"} for name in PROVIDERS}
    except DeviceFailed as error:
        found, failure = error.rows, error
    except Exception as error:
        found = {name: {"status": status_of(error)} for name in PROVIDERS}
    for row in missing:
        if row["provider"] in found:
            yield {**row, **found[row["provider"]]}
    if failure is not None:
        raise failure
    clean(device, {})


def models(
    cases: Sequence[Case],
    path: str | os.PathLike[str],
    device: str,
    console: Console,
    *,
    samples: int = 15,
    sample_ms: float = 20.0,
    budget: float | None = None,
    resume: bool = True,
) -> Path:
    units = []
    for case in cases:
        rows = [{**asdict(case), "provider": provider} for provider in PROVIDERS]
        name = f"{case.network} {case.execution} {case.mode} {case.dtype} {case.layout} {case.n}"
        units.append(Unit(name, rows, partial(_measure, case, device, samples, sample_ms), case.execution))
    return measure(units, path, MODELS, title="models", device=device, console=console, summary=print_models, budget=budget, resume=resume)
