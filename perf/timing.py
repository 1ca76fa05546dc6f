"""Timing of several implementations of one computation, side by side.

On a GPU each implementation is captured in a CUDA graph that runs it once on every set of buffers: no launch gaps, and, where the sets together
are at least three times the L2 cache, no data left there by the previous call. What cannot be captured is launched call by call. On a CPU the
wall clock is read. Samples of all implementations are taken in turn, in an order that rotates, so that drift hits all alike.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

WARM_SECONDS = 0.1  # a GPU lowers its clocks whenever the host compiles for a while
Calls = Callable[[int], Any]  # call(i) runs once on set i; what it returns is kept alive until the round is over


@dataclass(frozen=True)
class Timing:
    ms_p50: float
    ms_p20: float
    ms_p80: float
    timer: str
    samples: int


class Lane:
    """One implementation: `run()` queues or makes `sets` calls."""

    timer = ""

    def __init__(self, call: Calls, sets: int):
        self.call, self.sets, self.repeats = call, sets, 1
        self.times: list[float] = []

    def run(self) -> None:
        kept = [self.call(i) for i in range(self.sets)]
        del kept


class CpuLane(Lane):
    timer = "cpu"


class EventLane(Lane):
    timer = "events"


class LatencyLane(Lane):
    """On a GPU, each call waited for before the next."""

    timer = "latency"

    def run(self) -> None:
        super().run()
        torch.cuda.synchronize()


class GraphLane(Lane):
    timer = "graph"

    def __init__(self, call: Calls, sets: int):
        super().__init__(call, sets)
        self.graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        try:
            with no_gc(), torch.cuda.graph(self.graph, pool=pool, stream=torch.cuda.current_stream()):
                # every set's results are alive until the end, so that each set writes to memory of its own
                kept = [call(i) for i in range(sets)]
            del kept
        except BaseException:
            # Until torch 2.12 the allocator goes on believing in a capture that could not be ended, and never gives memory back again
            # (pytorch#180395). Where it does know better, this raises.
            with suppress(Exception):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise

    def run(self) -> None:
        self.graph.replay()


@contextmanager
def no_gc() -> Iterator[None]:
    """A collection in the middle of a capture or a sample could free CUDA objects, which a capture forbids, and takes time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def sets_for(device: str, bytes_per_set: int, limit: int = 256) -> tuple[int, str]:
    """How many sets of buffers to rotate, and the state of the cache that results: "cold", or "warm" where `limit` is in the way."""
    if device == "cpu":
        return 1, "warm"
    wanted = 3 * torch.cuda.get_device_properties().L2_cache_size
    sets = max(1, -(-wanted // max(bytes_per_set, 1)))
    return min(sets, limit), "cold" if sets <= limit else "warm"


@contextmanager
def own_stream(device: str) -> Iterator[None]:
    """Run everything inside on one stream that is not the default one, which cannot be captured.

    Autograd runs a backward on its forward's stream, so that both have to be on the stream of the capture.
    """
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def lane(call: Calls, sets: int, device: str) -> Lane:
    """The lane for a call; on a GPU, inside `own_stream`."""
    if device == "cpu":
        return CpuLane(call, sets)
    for i in range(min(sets, 3)):  # whatever compiles, loads or allocates once, before the capture
        call(i)
    torch.cuda.synchronize()
    try:
        return GraphLane(call, sets)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception:
        torch.cuda.synchronize()  # raises where the failure was not the capture's but the device's
        return EventLane(call, sets)


def _gpu_sample(lanes: list[Lane]) -> None:
    """One sample of each lane, queued without a pause: the GPU never waits for the host between start and end."""
    lanes[0].run()
    pairs = []
    for current in lanes:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(current.repeats):
            current.run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    for current, (start, end) in zip(lanes, pairs, strict=True):
        current.times.append(start.elapsed_time(end) / (current.repeats * current.sets))


def _cpu_sample(lanes: list[Lane]) -> None:
    for current in lanes:
        start = time.perf_counter()
        for _ in range(current.repeats):
            current.run()
        current.times.append((time.perf_counter() - start) * 1e3 / (current.repeats * current.sets))


def measure(lanes: Mapping[str, Lane], device: str, *, samples: int, sample_ms: float) -> dict[str, Timing]:
    """Time every lane; a sample repeats it for about `sample_ms`. What comes first raises the clocks, sets the repeats and is not counted."""
    take = _cpu_sample if device == "cpu" else _gpu_sample
    order = list(lanes.values())
    if not order:
        return {}
    with no_gc():
        started = time.perf_counter()
        take(order)
        take(order)
        while device != "cpu" and time.perf_counter() - started < WARM_SECONDS:
            take(order)
        for current in order:
            current.repeats = max(1, min(1000, round(sample_ms / max(current.times[-1] * current.sets, 1e-6))))
            current.times.clear()
        for _ in range(samples):
            take(order)
            order = order[1:] + order[:1]
    return {name: summary(current) for name, current in lanes.items()}


def summary(current: Lane) -> Timing:
    times = sorted(current.times)
    if len(times) == 1:
        return Timing(times[0], times[0], times[0], current.timer, 1)
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(tenths[4], tenths[1], tenths[7], current.timer, len(times))
