"""What a plain eager call on a small map costs, the host's time included: no CUDA graph, no compiler between the user and the launches.

Calls follow each other as in a program. `host_us` ends when the last of them has returned, `us` when the device has done them too: where the two are
alike the device waits for the host. Implementations take turns. Without a GPU there is `host_us` of tritattn alone, on a stand-in that launches
nothing, so that the driver's own part of a launch is not in it.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import timing
from .cases import Case, Inputs, make_case
from .providers import PROVIDERS, build, offers
from .runner import Row, Unit, clean, measure, status_of
from .schema import HOST
from .shapes import STAGES
from .standin import standin
from .summary import print_host

OPS = ("se", "cbam", "scse", "eca", "se+residual+relu", "sse", "ese", "coord", "simam", "shuffle", "sk", "splat")
MODES = ("inference", "fwd_bwd")
SITES = (STAGES[2], STAGES[0])  # of one image
CALLS = 20  # in a row: their launches fit into a GPU's queue
SAMPLES = 25


def all_cases(ops: Sequence[str], dtypes: Sequence[str], layouts: Sequence[str]) -> list[Case]:
    return [make_case(op, dtype, layout, 1, site) for site in SITES for layout in layouts for dtype in dtypes for op in ops]


def _call(case: Case, inputs: Inputs, provider: str, mode: str) -> Callable[[], Any]:
    call = build(provider, case, inputs.weights, inputs.device)
    call.train(mode != "inference")
    x, residual, wanted, g = inputs.x[0], inputs.residual[0], inputs.wanted(0, call.parameters), inputs.g[0]
    if mode == "inference":

        def inference() -> Any:
            with torch.no_grad():
                return call.run(x, residual)

        return inference
    return lambda: torch.autograd.grad(call.run(x, residual), wanted, g)


def _sample(call: Callable[[], Any], device: str) -> tuple[float, float]:
    """Milliseconds per call until the last has returned, and until the device has done it."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(CALLS):
        call()
    returned = time.perf_counter()
    if device == "cuda":
        torch.cuda.synchronize()
    return (returned - started) * 1e3 / CALLS, (time.perf_counter() - started) * 1e3 / CALLS


def _times(calls: dict[str, Callable[[], Any]], device: str, samples: int) -> dict[str, dict[str, Any]]:
    lanes = {name: (timing.Lane(call, 1), timing.Lane(call, 1)) for name, call in calls.items()}  # type: ignore[arg-type]
    order = list(calls)
    with timing.no_gc():
        for _ in range(samples):
            for name in order:
                for lane, ms in zip(lanes[name], _sample(calls[name], device), strict=True):
                    lane.times.append(ms)
            order = order[1:] + order[:1]
    found: dict[str, dict[str, Any]] = {}
    for name, both in lanes.items():
        found[name] = {}
        for column, lane in zip(("host_us", "us"), both, strict=True):
            if column == "us" and device == "cpu":
                continue
            taken = timing.summary(lane)
            found[name] |= {column: 1e3 * taken.ms_p50, f"{column}_p20": 1e3 * taken.ms_p20, f"{column}_p80": 1e3 * taken.ms_p80}
    return found


def _run_case(case: Case, device: str, samples: int, missing: Sequence[Row]) -> Iterator[Row]:
    for mode in MODES:
        rows = {row["provider"]: row for row in missing if row["mode"] == mode}
        if not rows:
            continue
        columns: dict[str, dict[str, Any]] = {name: {"status": "ok", "timer": "wall" if device == "cuda" else "stand-in"} for name in rows}
        calls = {}
        with ExitStack() as stack:
            if device == "cpu":
                stack.enter_context(standin(record=False))
            inputs = Inputs(case, device)
            for name in rows:
                try:
                    call = _call(case, inputs, name, mode)
                    for _ in range(5):  # compiles, and makes whatever is made once
                        call()
                    calls[name] = call
                except Exception as error:
                    columns[name]["status"] = status_of(error)
            try:
                for name, found in _times(calls, device, samples).items():
                    columns[name] |= {**found, "samples": samples}
            except Exception as error:
                for name in calls:
                    columns[name]["status"] = status_of(error)
        clean(device, {})
        gc.collect()
        for name, found in columns.items():
            yield {**rows[name], **found}


def host(
    path: str | os.PathLike[str], device: str, console: Console, *, cases: Sequence[Case], samples: int = SAMPLES, budget: float | None = None,
    resume: bool = True,
) -> Path:  # fmt: skip
    units = []
    for case in cases:
        providers = [p for p in PROVIDERS if offers(p, case)] if device == "cuda" else ["tritattn"]
        rows = [{**case.row(), "provider": provider, "mode": mode} for mode in MODES for provider in providers]
        name = f"{case.op_name} {case.dtype} {case.layout} {'x'.join(map(str, case.shape))}"
        units.append(Unit(name, rows, partial(_run_case, case, device, samples)))
    return measure(units, path, HOST, title="host", device=device, console=console, summary=print_host, budget=budget, resume=resume)
