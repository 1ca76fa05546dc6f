"""Tiles of the excite's products: (sizes, types, device) -> Tile, a pure function.

As for the passes over a map (tuning.py) what is forced comes first, then the tables, then a rule.

Products this small wait more than they compute, so the tiles are those that take the least time in a model of it: of each program the first access to
memory and a wait per step, of each multiprocessor what all of its programs load and multiply, and of the ranges of k that follow each other their
sum. Its constants are an H100's, in microseconds; between devices the order of the tiles matters and not the time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from . import _tables, tuning
from .tuning import options, power_of_two

FIRST, STEP, ARRIVAL = 1.0, 0.25, 1.5  # a first access, a step whose loads are under way, an atomic and what is read after it
LOADED = 40_000  # bytes that a multiprocessor loads from L2
MULTIPLIED = {True: 300_000, False: 60_000}  # products that it adds, on matrix units of eight in bf16 each, or without
OF_BF16 = 2  # times as many on matrix units where one operand is of bf16, and four do
TOGETHER = 4  # programs on it at once
PRODUCTS = 8192  # that a program without matrix units has in registers at once


@dataclass(frozen=True)
class Tile:
    """out[block_m, block_j] of one program per range of k, of which there are `splits`, in steps of block_k; on matrix units, or in registers."""

    block_m: int
    block_j: int
    block_k: int
    splits: int = 1
    units: bool = False
    num_warps: int = 4
    source: str = "rule"

    @property
    def key(self) -> str:
        return f"m{self.block_m}j{self.block_j}k{self.block_k}s{self.splits}w{self.num_warps}" + "u" * self.units

    @property
    def cut(self) -> tuple[int, int, int, int, bool]:
        """The tile as kernels/stages.py takes it."""
        return self.block_m, self.block_j, self.block_k, self.splits, self.units

    @cached_property
    def args(self) -> dict[str, int | bool]:
        """The tile as kernels take it, and beside it a limit of registers that leaves three programs on a multiprocessor, or two of the largest."""
        held = self.block_m * self.block_j + ((self.block_m + self.block_j) * self.block_k if self.units else 0)
        tile = dict(BLOCK_M=self.block_m, BLOCK_J=self.block_j, BLOCK_K=self.block_k, SPLITS=self.splits, UNITS=self.units)
        return {**tile, **options(self.num_warps, 248 if held >= 1024 * self.num_warps else 168)}

    @property
    def slot(self) -> int:
        """Elements that a program leaves of its range of k: of the product, and of the sum."""
        return (self.block_m + 1) * self.block_j

    def programs(self, m: int, j: int) -> int:
        return -(-m // self.block_m) * -(-j // self.block_j) * self.splits

    def time(self, m: int, j: int, k: int, itemsize: int, processors: int, right: torch.dtype | None = None) -> float:
        """What the model says, in microseconds. right: the right operand's type, where it is not the sums'."""
        programs = self.programs(m, j)
        shared = -(-programs // processors)
        steps = -(-k // (self.block_k * self.splits))
        step = (self.block_m * itemsize + self.block_j * (right.itemsize if right else itemsize)) * self.block_k / LOADED
        step += self.block_m * self.block_j * self.block_k / MULTIPLIED[self.units] / (OF_BF16 if self.units and right == torch.bfloat16 else 1)
        found = -(-shared // TOGETHER) * (FIRST + steps * STEP) + shared * steps * step
        if self.splits > 1:
            found += ARRIVAL + self.splits * self.block_m * self.block_j * itemsize / LOADED
        return found


def choose(
    m: int, j: int, k: int, itemsize: int, processors: int, device: torch.device | None = None, role: str = "linear", right: torch.dtype | None = None
) -> Tile:  # fmt: skip
    """The tile of a product [m, k] x [k, j] whose sums take `itemsize` bytes.

    role: "linear" is of a batch's rows, "weights" a gradient of weights, whose terms are the batch's, and "both_weights" is two of these in one
    launch, the second [j, m]. device: whose tables count; none for a product that is a part of another launch. right: the right operand's type, by
    default the sums'.
    """
    if tuning.forced_tile is not None:
        return tuning.forced_tile
    right = right or (torch.float64 if itemsize == 8 else torch.float32)
    tuned = None if device is None else _tables.lookup(device, *_tables.product_key(role, m, j, k, itemsize, right))
    if tuned is None:
        return _rule(m, j, k, itemsize, processors, role, right)
    return Tile(**{**tuned, "units": bool(tuned["units"])}, source="tuned")  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def _rule(*question: Any) -> Tile:
    return likely(*question)[0]


def likely(m: int, j: int, k: int, itemsize: int, processors: int, role: str, right: torch.dtype) -> list[Tile]:
    """The tiles that the rule chooses from, those first that take the least time in the model."""
    m_block, j_block, k_block = (power_of_two(size) for size in (m, j, k))
    sizes = (16, 32, 64)
    tiles = []
    for block_m, block_j in ((min(m_block, rows), min(j_block, columns)) for rows in sizes for columns in sizes):
        if (block_k := min(k_block, PRODUCTS // (block_m * block_j), 512)) >= min(k_block, 32):
            tiles.append(Tile(block_m, block_j, block_k))
        if itemsize == 4 and min(m, j, k) >= 16:
            # what two fp32 operands are split into takes registers; of the longest steps of two products some spill whatever the limit of them
            most = {32: 4096, 64: 3072 if role == "both_weights" else 4096}
            # and of the largest tile a step spills in 4 warps
            warps = 8 if block_m * block_j == 4096 and right == torch.float32 else 4
            fitting = [block_k for block_k in most if (block_m + block_j) * block_k <= most[block_k]]
            tiles += [Tile(block_m, block_j, block_k, units=True, num_warps=warps) for block_k in fitting]
    cut = {replace(t, splits=1 << s): None for t in tiles for s in range(6) if t.block_k << s < t.block_k + k}
    share = processors // 2 if role == "both_weights" else processors
    return sorted(cut, key=lambda tile: tile.time(m, j, k, itemsize, share, right))


@lru_cache(maxsize=4096)
def blocks(n: int, size: int, weights: int, lag: int, steps: int, maps: int, cache: int) -> tuple[int, int]:
    """(images in a block, blocks that begin between one stage and the next) of a launch of kernels/stages.py, for n images of `size` bytes of which
    `lag` lie between the passes of a launch without stages; (0, 0) where the cache has no room for them. steps: stages after the first; maps: that a
    pass reads.

    The weights, which every block reads, are under a quarter of its bytes, as they are of an image's where one program reads them.
    """
    images = power_of_two(-(-4 * weights // max(size, 1)))
    room = cache // 2 // max(maps * min(images, n) * size, 1) - 1  # for blocks beside the one that is squeezed
    if images >= n:
        return (images, 0) if room >= 0 else (0, 0)
    lag = min(max(1, lag // (steps * images)), room // steps)
    return (images, lag) if lag > 0 else (0, 0)
