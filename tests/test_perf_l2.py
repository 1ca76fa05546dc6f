"""The model of L2, on traces whose DRAM traffic is known by hand."""

import numpy as np
import pytest
import torch

from perf.counting import Counter, MapOrder
from perf.l2 import CHUNK, SECTOR, Access, Cache, Launch, Trace, Unpredictable, dram_bytes, per_image, repeated, sampled

IMAGE = 64  # sectors


def traced(*launches: dict[int, list[tuple[int, bool, range]]], resident: int = 4, buffers: int = 2, early: bool = False) -> Trace:
    """A trace of launches, each program -> (buffer, write, sectors)."""
    trace = Trace()
    trace.sizes = [2 * IMAGE] * buffers
    for programs in launches:
        found = {i: [Access(buffer, write, early and write, np.array(sectors)) for buffer, write, sectors in p] for i, p in programs.items()}
        trace.launches.append(Launch("kernel", resident, found))
    return trace


def walk(*accesses: tuple[int, bool], tiles: int = 4) -> dict[int, list[tuple[int, bool, range]]]:
    """Programs that walk the map in order, a tile each, and make each of these (buffer, write) to it."""
    tile = IMAGE // tiles
    return {i: [(b, w, range(i * tile, (i + 1) * tile)) for b, w in accesses] for i in range(2 * tiles)}


READ, WRITE = (0, False), (1, True)


def in_maps(trace: Trace, n: int, cache_in_maps: float) -> float:
    return dram_bytes(trace, n, int(n * IMAGE * SECTOR * cache_in_maps)) / (n * IMAGE * SECTOR)


@pytest.mark.parametrize(
    ("launches", "cache", "expected"),
    [
        ([walk(READ, WRITE)], 0.25, 2),  # streams
        ([walk(READ), walk(READ)], 1.0, 1),  # a second pass over what fits
        ([walk(READ), walk(READ)], 0.9, 2),  # over what nearly does, a list of the least recently used has nothing
        ([walk(READ, READ, WRITE)], 0.25, 2),  # a second read soon after the first
        ([walk(READ), walk(READ, WRITE)], 2.0, 2),
        ([walk(READ), walk(READ, WRITE)], 1.25, 2.75),  # what the second pass writes displaces what it has not read
        ([walk(WRITE), walk(WRITE)], 1.0, 1),  # overwritten before it went out
        ([walk(WRITE), walk(WRITE)], 0.5, 2),
        ([walk(WRITE), walk((1, False))], 1.0, 1),  # read where it was written
        ([walk(WRITE), walk((1, False))], 0.5, 2),
    ],
)
def test_known_traffic(launches, cache, expected):
    assert in_maps(traced(*launches, resident=1), 32, cache) == pytest.approx(expected, abs=0.01)
    # with many programs at once, a few tiles more are in the way
    assert in_maps(traced(*launches, resident=3), 32, cache) == pytest.approx(expected, abs=0.1)


def test_what_is_evicted_first_is_in_nobodys_way():
    launches = [walk(READ), walk(READ, WRITE)]
    assert in_maps(traced(*launches, resident=1, early=True), 32, 1.1) == pytest.approx(2, abs=0.01)
    cache = Cache(2)
    cache.access([1], False)
    cache.access([2], True, early=True)
    cache.access([3], False)  # in the place of 2, younger than 1
    cache.access([1], False)
    assert (cache.read, cache.written) == (2, 1)


@pytest.mark.parametrize("lag, expected", [(4, 2), (28, 3)])
def test_two_passes_in_one_launch(lag, expected):
    """Waves: the first pass over image n, then the second over image n - lag; the cache holds 16 images."""
    programs = {}
    for image in range(2):
        for i in range(4):
            tile = range(image * IMAGE + 16 * i, image * IMAGE + 16 * i + 16)
            programs[8 * image + i] = [(0, False, tile)]
            programs[8 * (image + lag) + 4 + i] = [(0, False, tile), (1, True, tile)]
    trace = traced(programs)
    assert per_image(trace.launches[0], trace.sizes)[0] == 8
    assert in_maps(trace, 64, 16 / 64) == pytest.approx(expected, abs=0.05)


def test_programs_take_turns():
    order = []

    class Watched(Cache):
        def access(self, sectors, write, early=False):
            order.extend(sectors)

    programs = [[(False, False, [10 * i + j]) for j in range(steps)] for i, steps in enumerate((1, 3, 2, 1))]
    Watched(1).replay(programs, resident=2)
    assert order == [0, 10, 20, 11, 21, 12, 30]


def test_a_trace_is_repeated_for_a_batch():
    (first, *_), *rest = [list(repeated(traced(walk(READ, WRITE)).launches[0], [128, 128], n, 1)) for n in (1, 3)]
    assert first == [(False, False, list(range(16))), (True, False, [(1 << 40) + i for i in range(16)])]
    assert len(rest[0]) == 12 and rest[0][4][0][2] == list(range(64, 80)) and rest[0][11][0][2] == list(range(176, 192))


def test_only_launches_that_treat_images_alike_are_repeated():
    def refused(programs, words):
        with pytest.raises(Unpredictable, match=words):
            dram_bytes(traced(programs), 8)

    tile = range(16)
    refused({0: [(0, False, range(128))]}, "more than one image")
    refused({0: [(0, False, tile), (1, True, range(64, 80))], 1: []}, "more than one image")
    refused({0: [(0, False, tile)]}, "other programs")
    refused({0: [(0, False, tile)], 1: [(0, False, range(16, 32))], 2: [(0, False, range(64, 80))], 5: [(0, False, range(80, 96))]}, "other programs")
    refused({0: [(0, False, tile)], 1: [(0, False, range(65, 81))]}, "other ways")
    refused({0: [(0, False, tile)], 1: [(0, True, range(64, 80))]}, "other ways")
    assert dram_bytes(traced({0: [], 1: []}), 8) == 0


def test_a_sample_of_sectors_stands_for_all():
    x = torch.empty(2, 64, 64, 64)
    trace = Trace()
    trace.operator("mul", [x], [torch.empty_like(x)])
    trace.operator("sum", [x], [])
    picked = sampled(np.arange(1 << 16), 16)
    assert picked.size == pytest.approx(1 << 12, rel=0.01) and np.diff(picked).max() < 64
    n, size = 256, x.numel() * 4 // 2 * 256
    assert dram_bytes(trace, n) / size == pytest.approx(3, rel=0.01)
    assert dram_bytes(trace, n, 3 * size) / size == pytest.approx(2, rel=0.01)


def test_operators_of_torch_stream_their_maps():
    x, w = torch.zeros(2, 8, 40, 40), torch.zeros(2, 8, 1, 1)
    trace = Trace()
    with Counter(MapOrder(x.numel()), trace) as counter:
        y = x * w
        y[:, :4].add_(x[:, :4])
    assert counter.result(64, 4 * x.numel()).dram_u == pytest.approx(2, rel=0.01)  # all of it fits, and y goes out once
    first, second = trace.launches
    steps = -(-x.numel() // 2 * 4 // CHUNK)
    assert sorted(first.programs) == list(range(2 * steps)) and [a.write for a in first.programs[0]] == [False, True]
    assert sum(a.sectors.size for p in first.programs.values() for a in p) * SECTOR == pytest.approx(2 * x.numel() * 4, rel=0.02)
    half = {s for p in second.programs.values() for a in p for s in a.sectors.tolist()}
    assert half == {*range(800), *range(1600, 2400)}  # the first four channels of either image
