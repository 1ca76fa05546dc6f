"""What of the map's traffic would reach DRAM: the accesses that the interpreter saw, replayed in a GPU's order through a cache of the size of its L2.

A trace is of two images, because the interpreter is slow; the cache only matters for hundreds. Scaling the cache down with the batch would keep the
distance between two launches, but not the one between two programs of an image, which does not depend on the batch. So the trace is repeated
instead: where each program works on one image, and the second image's programs do what the first one's did, so many programs later and so many bytes
further (`per_image` refuses any other launch), it is known for every batch. That holds too for launches that deal out two passes over an image to
programs far apart.

The cache is one LRU list of 32-byte sectors. On a miss a read is fetched from DRAM; a write is not, and goes to DRAM when it is evicted, or at
the end. What is accessed with evict_first is evicted first. Programs start in order, as many at once as fit (`WARPS` per multiprocessor); those that
run take turns, an access each. A step (forward, or backward) starts with an empty cache, which stays as it is between its launches. Only sectors
of one pseudo-random sample of each image are followed, in a cache smaller by as much (SHARDS, Waldspurger et al., 2015, samples so).

Left out: buffers that are not of map order, what a real L2 loses to its two halves, its sets and its own policy, and all of time: programs neither
wait nor drift apart. It is a prediction; a sweep's `copy_u` says how many passes over the map a copy makes in the time that was measured.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tritattn import tuning

SECTOR = 32  # bytes; the unit in which GPUs move global memory
L2_BYTES = 50 << 20  # of an H100 or H200
WARPS = 32  # resident on a multiprocessor: with 64 registers a thread
SAMPLE = 1 << 15  # sectors of a map that are followed, about
IMAGES = 2  # in a trace
CHUNK = 8192  # bytes of each tensor that a program of torch's operators is taken to move


class Access(NamedTuple):
    buffer: int
    write: bool
    early: bool  # evicted first
    sectors: np.ndarray  # of the buffer, in order


@dataclass
class Launch:
    """programs: what each does, by its index; resident: how many run at once."""

    name: str
    resident: int
    programs: dict[int, list[Access]] = field(default_factory=dict)


class Unpredictable(ValueError):
    """A launch that is not the same for every image."""


class Trace:
    """The accesses to buffers of map order in the launches of one step."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.sizes: list[int] = []  # of the buffers, in sectors
        self._indices: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no memory is two buffers

    def buffer(self, t: Tensor) -> int:
        storage = t.untyped_storage()
        if storage._cdata not in self._indices:
            self._indices[storage._cdata] = len(self.sizes)
            self.sizes.append(-(-storage.nbytes() // SECTOR))
            self._kept.append(storage)
        return self._indices[storage._cdata]

    def launch(self, name: str, programs: int, num_warps: int, cooperative: bool) -> None:
        resident = tuning.processors(torch.device("cpu")) * max(1, WARPS // num_warps)
        self.launches.append(Launch(name, min(resident, programs) if cooperative else resident))

    def access(self, program: int, buffer: int, write: bool, early: bool, sectors: np.ndarray) -> None:
        self.launches[-1].programs.setdefault(program, []).append(Access(buffer, write, early, sectors))

    def operator(self, name: str, read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        """One of torch's: its tensors from front to back, all at the same pace."""
        self.launch(name, 0, 8, False)
        spans = [(self.buffer(t), write, *_span(t)) for write, tensors in ((False, read), (True, written)) for t in tensors]
        steps = max((-(-size // CHUNK) for *_, size in spans), default=0)
        for image in range(IMAGES):
            for step in range(steps):
                for buffer, write, start, stride, size in spans:
                    begin, end = (start + image * stride + size * i // steps for i in (step, step + 1))
                    self.access(image * steps + step, buffer, write, False, np.arange(begin // SECTOR, -(-end // SECTOR)))


def _span(t: Tensor) -> tuple[int, int, int]:
    """(first byte, bytes between images, bytes of an image) of a tensor that is taken to be dense."""
    size = t.numel() * t.element_size() // IMAGES
    stride = int(t.stride(0)) * t.element_size() if t.dim() and t.shape[0] == IMAGES else size
    return int(t.storage_offset()) * t.element_size(), stride, size


def per_image(launch: Launch, sizes: Sequence[int]) -> tuple[int, list[tuple[int, list[Access]]]]:
    """The first image's programs in order, and how many programs further the same ones of the next image are."""
    images: list[list[tuple[int, list[Access]]]] = [[] for _ in range(IMAGES)]
    for program in sorted(launch.programs):
        accesses = [access for access in launch.programs[program] if access.sectors.size]
        found = {int(i) for a in accesses for i in (a.sectors[[0, -1]] * IMAGES) // sizes[a.buffer]}
        if len(found) > 1 or any(sizes[a.buffer] % IMAGES for a in accesses):
            raise Unpredictable(f"{launch.name}: a program of more than one image")
        if found:
            images[found.pop()].append((program, accesses))
    first, second = images
    strides = {b - a for (a, _), (b, _) in zip(first, second, strict=False)}
    if len(first) != len(second) or len(strides) > 1:
        raise Unpredictable(f"{launch.name}: images have other programs")
    for (_, mine), (_, others) in zip(first, second, strict=True):
        same = len(mine) == len(others) and all(
            a[:3] == b[:3] and np.array_equal(a.sectors + sizes[a.buffer] // IMAGES, b.sectors) for a, b in zip(mine, others, strict=True)
        )
        if not same:
            raise Unpredictable(f"{launch.name}: images are accessed in other ways")
    return strides.pop() if strides else 1, first


Step = tuple[bool, bool, list[int]]  # write, early, sectors of all buffers


def sampled(sectors: np.ndarray, rate: int) -> np.ndarray:
    """About one in `rate` of an image's sectors, the same ones of every image."""
    return sectors[(sectors * 2654435761 % (1 << 32)) * rate < (1 << 32)]


def repeated(launch: Launch, sizes: Sequence[int], n: int, rate: int) -> Iterator[list[Step]]:
    """The launch's programs for a batch of n, in order, with the sampled sectors."""
    stride, programs = per_image(launch, sizes)
    steps = [[(a, sampled(a.sectors, rate)) for a in accesses] for _, accesses in programs]
    starts = np.array([program for program, _ in programs])
    order = np.argsort(starts + stride * np.arange(n)[:, None], axis=None, kind="stable")
    for image, index in zip(*np.divmod(order, max(len(programs), 1)), strict=True):
        # a buffer's sectors at its own multiple of 2^40
        yield [(a.write, a.early, (s + ((a.buffer << 40) + int(image) * (sizes[a.buffer] // IMAGES))).tolist()) for a, s in steps[index]]


class Cache:
    """LRU of `capacity` sectors; `read` and `written` count those that came from and went to DRAM."""

    def __init__(self, capacity: int):
        self.capacity, self.read, self.written = capacity, 0, 0
        # sector -> whether it is dirty; the first to be evicted come first
        self.early: OrderedDict[int, bool] = OrderedDict()
        self.usual: OrderedDict[int, bool] = OrderedDict()

    def access(self, sectors: Iterable[int], write: bool, early: bool = False) -> None:
        queue = self.early if early else self.usual
        for sector in sectors:
            dirty = self.usual.pop(sector, None)
            if dirty is None:
                dirty = self.early.pop(sector, None)
            if dirty is None:
                dirty = False
                self.read += not write
                if len(self.usual) + len(self.early) >= self.capacity:
                    self.written += (self.early or self.usual).popitem(last=False)[1]
            queue[sector] = dirty or write

    def flush(self) -> None:
        for queue in (self.early, self.usual):
            self.written += sum(queue.values())
            queue.clear()

    def replay(self, programs: Iterable[list[Step]], resident: int) -> None:
        """Programs that start in order, at most `resident` of them at once, and take turns."""
        waiting = (program[::-1] for program in programs if program)
        running: deque[list[Step]] = deque(itertools.islice(waiting, resident))
        while running:
            program = running.popleft()
            write, early, sectors = program.pop()
            self.access(sectors, write, early)
            if program or (program := next(waiting, [])):
                running.append(program)


def dram_bytes(trace: Trace, n: int, l2_bytes: int = L2_BYTES) -> float:
    """Bytes that the traced step reads from and writes to DRAM for a batch of n. Raises Unpredictable."""
    image = max(trace.sizes, default=0) // IMAGES
    rate = tuning.power_of_two(image * n // SAMPLE)
    followed = sampled(np.arange(image), rate).size / max(image, 1)
    cache = Cache(int(l2_bytes // SECTOR * followed))
    for launch in trace.launches:
        cache.replay(repeated(launch, trace.sizes, n, rate), launch.resident)
    cache.flush()
    return (cache.read + cache.written) * SECTOR / max(followed, 1e-9)
