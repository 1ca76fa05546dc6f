"""Tile choice: (pass, shape, dtype, layout, device) -> Config, a pure function.

What is forced comes first, then a table of the user's ($TRITATTN_CONFIG_DIR), then the one that the package brings for the device, then a rule.
Nothing is tuned on the way, so every rank of a job and every run that sees the same tables gets the same tiles for the same shape, so the same bits.
No kernel needs a table to be correct.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from . import _tables

RESIDENT_CHANNELS = 2048  # a program holds this many channels of a few positions in registers
RESIDENT_ELEMENTS = 8192  # or this many elements of whole planes, in fp32
SECTOR = 32  # bytes, the unit in which GPUs move memory
CONVOLUTION_CHANNELS = 128  # of a convolution's result, all of which a program owns
GROUP_BYTES = 16384  # of an image, that one program of a group holds
GROUPED = ("pixel", "context", "context_bwd")  # the roles of passes that such a group can make
FEW_ELEMENTS = 1 << 20  # of a map, which moves in less time than launches take
TICKET_BYTES = 32768  # of an image, that one program of a ticketed launch reads


@dataclass(frozen=True)
class Config:
    """Tiles of one launch: BLOCK_C channels x BLOCK_P positions per step, positions cut into `splits` programs.

    group (roles of GROUPED alone): BLOCK_C channels x all positions per program; the programs of an image hold it together and wait for each other,
    and `splits` images are held at once.
    lag: of role "ticket", images between the two passes of one launch, or 0 for a launch each; of planes larger than BLOCK_P, blocks of channels
    between them, or 0 for programs that make both.
    maxnreg: registers that a thread may take; 0 leaves it to NVIDIA's assembler, which in some kernels spills a few to fit one program more on a
    multiprocessor, and given a number spills at that number alone.
    """

    block_c: int
    block_p: int
    splits: int = 1
    num_warps: int = 4
    source: str = "rule"
    group: bool = False
    lag: int = 0
    maxnreg: int = 0

    @cached_property
    def preceded(self) -> Config:
        """For a map that a norm and an activation precede, which take registers of their own: a limit is one that leaves two programs of 8 warps to a
        multiprocessor."""
        return replace(self, maxnreg=128) if self.maxnreg else self

    @property
    def key(self) -> str:
        rest = (f"l{self.lag}" if self.lag else "") + (f"r{self.maxnreg}" if self.maxnreg else "") + "g" * self.group
        return f"c{self.block_c}p{self.block_p}s{self.splits}w{self.num_warps}{rest}"

    @cached_property
    def options(self) -> dict[str, int]:
        return options(self.num_warps, self.maxnreg)

    @cached_property
    def args(self) -> dict[str, int]:
        """The tile as kernels take it, and the options."""
        return {"BLOCK_C": self.block_c, "BLOCK_P": self.block_p, **self.options}


def options(num_warps: int, maxnreg: int) -> dict[str, int]:
    """What Triton is told about a launch beside its arguments."""
    return {"num_warps": num_warps, "maxnreg": maxnreg} if maxnreg and torch.version.hip is None else {"num_warps": num_warps}


_forced: dict[str, Any] = {}
forced_tile: Any = None  # of every product
epoch = 0  # how often the same arguments have begun to give other tiles


def is_forced() -> bool:
    return bool(_forced) or forced_tile is not None


@contextmanager
def forced(tile: Any = None, **fields: int) -> Iterator[None]:
    """Override fields of every Config inside the block, and the _linear.Tile of every product; for tests and for tuning."""
    global _forced, forced_tile
    saved = _forced, forced_tile
    _forced, forced_tile = {**_forced, **fields}, tile or forced_tile
    choose.cache_clear()
    try:
        yield
    finally:
        _forced, forced_tile = saved
        choose.cache_clear()


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; an H200's where there is no GPU, so that tiles chosen without one are those that run on one."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132


@lru_cache(maxsize=64)
def cache(device: torch.device) -> int:
    """Bytes of the L2 cache; an H200's where there is no GPU."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 50 << 20


def cooperative(device: torch.device) -> bool:
    """Whether programs of one launch may wait for each other: only where a cooperative launch promises that all of them run at once.

    Every NVIDIA GPU that the kernels run on has it, and on each of its multiprocessors fits a program of 8 warps, whatever registers these take.
    AMD's is not relied on, and Triton's interpreter runs one program after another.
    """
    return torch.version.hip is None and device.type != "cpu" and device not in _refused


def refused(device: torch.device, error: RuntimeError) -> None:
    """After a cooperative launch that failed: where the device refused it, no program waits for another on it from now on; raises any other error.

    A device refuses where a process may use a part of it only, which its properties do not always say.
    """
    if not any(reason in str(error) for reason in _REFUSALS):
        raise error
    warnings.warn(f"tritattn walks maps of short rows twice on {device}, which refused a cooperative launch ({error})", RuntimeWarning, stacklevel=2)
    global epoch
    _refused.add(device)
    epoch += 1
    choose.cache_clear()


_refused: set[torch.device] = set()
# CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE and CUDA_ERROR_NOT_SUPPORTED
_REFUSALS = ("too many blocks in cooperative launch", "operation not supported")


def rows_together(c: int, hw: int, itemsize: int) -> int:
    """How many rows of hw elements make one that is aligned to 16 bytes; 1 where each is aligned to 8, or where c is no multiple of them."""
    vector = max(1, 16 // itemsize)
    common = math.gcd(hw, vector)
    rows = vector // common
    return 1 if common * itemsize >= 8 or c % rows else rows


def fused_convolution(itemsize: int) -> bool:
    """Whether a 1x1 convolution to at most CONVOLUTION_CHANNELS is computed where the map is rectified, instead of by torch on a rectified map.

    That saves a write of the map and two reads forward, and as much backward, as long as a program holds all channels. Two-byte maps then wait for
    memory, or nearly. Products of wider ones take matrix units eight times as long, which torch, free to round to TF32, does not spend.
    """
    return itemsize == 2


@lru_cache(maxsize=8192)
def choose(
    role: str, n: int, c: int, hw: int, itemsize: int, channels_last: bool, device: torch.device, maps: int = 1, row: int = 0
) -> Config:  # fmt: skip
    """The tiles of a pass over an [n, c, hw] map; for "channel", "tile" and a group of programs over as many as `maps` at once.

    role: "channel" reduces positions, and so do "excited", with an MLP after it, "means" and "pools", without, and "ticket" before it gates the map;
    "column", "pixel", "context" and "context_bwd" own all channels of their positions, the latter three at once (RESIDENT); "plane" and
    "shuffled_plane" own all positions of their channels, at once where they fit, "covariance" the covariances of theirs, whose gradients
    "covariance_bwd" takes back to a tile; "lines", "extremes" and "products" walk down rows of `row` positions, which `splits` cuts: block_p
    positions are as much of a row as fits, or several rows; "rows" does so with rows as wide as they are; "convolution" walks down the channels of
    its positions, "convolution_bwd" and, with a stride, "strided_convolution_bwd" positions with a block of them; "tile" is elementwise.
    """
    rule = _RULES[role]
    config = rule(n, c, hw, itemsize, channels_last, processors(device), *((maps,) if maps > 1 else ()), *((row,) if row else ()))
    if role in GROUPED and config.block_c < c and not channels_last and cooperative(device):
        config = _group(n, c, hw, itemsize, processors(device), *((maps,) if maps > 1 else ())) or config
    if _forced:
        return replace(config, source="forced", **_forced)
    # how many programs may wait for each other is no matter of speed
    tuned = None if config.group else _tables.lookup(device, _tables.key(role, c, hw, itemsize, channels_last, maps, row), n)
    return config if tuned is None else replace(config, source="tuned", **tuned)  # type: ignore[arg-type]


def _each(row: int, itemsize: int, maps: int = 1) -> int:
    """Elements of a tile that a thread holds: 32 bytes, two vectors, or 16 where a row cannot be loaded in vectors, because every element then takes
    a register and an address. With twice as many some kernels spill. Of each of more than two maps half of that."""
    each = max(4, (16 if row % 4 else 32) // itemsize)
    return each if maps <= 2 else max(1, each // 2)


def _warps(block_c: int, block_p: int, each: int) -> int:
    return max(1, min(8, block_c * block_p // (32 * each)))


def _channel(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int, maps: int = 1) -> Config:
    tile = _tile(n, c, hw, itemsize, channels_last, sms, maps)
    programs = n * -(-c // tile.block_c)
    steps = -(-hw // tile.block_p)
    return replace(tile, splits=min(steps, power_of_two(-(-4 * sms // max(programs, 1)))))


def _means(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int) -> Config:
    # a limit that leaves four programs to a multiprocessor
    return replace(_channel(n, c, hw, itemsize, channels_last, sms), maxnreg=64 if itemsize < 8 else 0)


def _excited(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int) -> Config:
    # as in "ticket"
    return replace(_channel(n, c, hw, itemsize, channels_last, sms), maxnreg=128 if itemsize < 8 else 0)


def _pools(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int) -> Config:
    # two bytes keep what was loaded in half of the registers, and do without a limit
    return replace(_channel(n, c, hw, itemsize, channels_last, sms), maxnreg=80 if itemsize == 4 else 0)


def images_between(n: int, programs: int, sms: int) -> int:
    """The lag of a launch on n images, each of which so many programs squeeze."""
    return max(1, min(n, 1 + -(-4 * sms // programs)))


def _ticket(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int, maps: int = 1) -> Config:
    """Small shares of an image, so that little lies between its two reads. Between its last squeeze and its first gate twice as many programs start
    as run at once, four on a multiprocessor: the squeezes have ended when half of them have started, and the excite when the others have."""
    tile = _tile(n, c, hw, itemsize, channels_last, sms, maps)
    block_c, block_p = tile.block_c, tile.block_p
    if channels_last and block_c * itemsize > 64:
        narrow = 64 // itemsize
        block_c, block_p = narrow, min(power_of_two(hw), block_p * block_c // narrow)
    blocks_c, steps = -(-c // block_c), -(-hw // block_p)
    shares = max(-(-maps * block_c * hw * itemsize // TICKET_BYTES), 4 * sms // max(n * blocks_c, 1))
    splits = min(steps, 16, power_of_two(shares))
    warps = _warps(block_c, block_p, _each(c if channels_last else hw, itemsize, maps))
    lag = images_between(n, blocks_c * splits, sms)
    if (1 + maps) * block_c * hw * itemsize // splits < TICKET_BYTES and n * blocks_c * splits > 4 * sms and n * c * hw > FEW_ELEMENTS:
        lag = 0  # many programs that each move too little for the time that a ticket and a wait take
    # a limit that leaves two programs to a multiprocessor
    return Config(block_c, block_p, splits, warps, lag=lag, maxnreg=128 if itemsize < 8 else 0)


def _tile(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int, maps: int = 1) -> Config:
    """As many elements as 8 warps hold, long in the contiguous dimension."""
    each = _each(c if channels_last else hw, itemsize, maps)
    elements = 8 * 32 * each
    if channels_last:
        block_c = min(power_of_two(c), 128)
        block_p = max(1, min(power_of_two(hw), elements // block_c))
    else:
        block_p = min(power_of_two(hw), 256)
        block_c = max(1, min(power_of_two(c), elements // block_p))
    return Config(block_c, block_p, num_warps=_warps(block_c, block_p, each))


def _column(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int) -> Config:
    each = _each(c if channels_last else hw, itemsize)
    if channels_last:
        # many positions, because every program leaves a share of each channel's gradient; 64 bytes of a row at least
        block_c, block_p = min(power_of_two(c), 32), min(power_of_two(hw), 64)
    else:
        block_p = min(power_of_two(hw), 256)
        while block_p > 32 and n * -(-hw // block_p) < sms:
            block_p //= 2
        block_c = max(1, min(power_of_two(c), 4 * 32 * each // block_p))
    # a limit that no kernel reaches whose tile is as large as this
    return Config(block_c, block_p, num_warps=_warps(block_c, block_p, each), maxnreg=96)


def _pixel(
    n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int, maps: int = 1, elements: int = 8192, least: int = SECTOR
) -> Config:  # fmt: skip
    """least: bytes of a channels-first row that are worth a tile of their own."""
    block_c = power_of_two(c)
    if maps > 1 and (channels_last or hw % 4):
        elements //= 2  # of two maps all would take too many registers; rows that can be loaded in vectors get by
    block_p = max(1, min(power_of_two(hw), elements // block_c, 256))
    # a resident tile of a few positions would waste most of every 32-byte sector of channels-first rows
    resident = c <= RESIDENT_CHANNELS and (channels_last or block_p >= hw or block_p * itemsize >= least)
    if not resident:
        column = _column(n, c, hw, itemsize, channels_last, sms)
        return replace(column, splits=-(-hw // column.block_p))
    steps = -(-hw // block_p)
    splits = min(steps, max(1, power_of_two(-(-4 * sms // max(n, 1)))))
    # a limit that leaves two programs to a multiprocessor, where no more are needed, or one
    vectors = (c if channels_last else hw) % 4 == 0
    limited = vectors and (itemsize == 2 if maps == 1 else channels_last and itemsize < 8)
    limit = 128 if limited else 248 if maps == 1 and itemsize == 2 else 0
    return Config(block_c, block_p, splits, 8, maxnreg=limit)


def _group(n: int, c: int, hw: int, itemsize: int, sms: int, maps: int = 1) -> Config | None:
    """An image in the registers of a group of programs, one program per multiprocessor; None where an image does not fit."""
    rows = rows_together(c, hw, itemsize)
    block_p = power_of_two(hw)
    # of each of two maps half; and half where the channels of several rows take registers too, or the address of every element
    shares = max(maps, 1 if hw * itemsize % 8 == 0 else 2)
    block_c = min(power_of_two(c), GROUP_BYTES // shares // itemsize // block_p)
    if block_c < rows or -(-c // block_c) > sms:
        return None
    # one program per multiprocessor is all that is counted on: no spills for the sake of a second
    return Config(block_c, block_p, min(n, sms // -(-c // block_c)), 8, group=True, maxnreg=248)


def _context(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int) -> Config:
    # a sector's positions of twice as many channels, which the forward pass has the registers for
    wide = 512 < c <= 1024 and itemsize == 2 and not channels_last and hw % 4 == 0
    return _context_bwd(n, c, hw, itemsize, channels_last, sms, elements=16384 if wide else 8192)


def _context_bwd(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int, elements: int = 8192) -> Config:
    """As "pixel", with more warps, because a tile is kept beside what has been added, and smaller in fp64, whose exp takes registers too, and in rows
    that cannot be loaded in vectors, where every element takes an address."""
    halved = 2 * (itemsize == 8) + ((c if channels_last else hw) % 4 != 0)
    # in a row that begins inside of a sector every tile reads a sector of its neighbour's
    least = SECTOR if hw * itemsize % SECTOR == 0 else 2 * SECTOR
    config = _pixel(n, c, hw, itemsize, channels_last, sms, elements=elements >> halved, least=least)
    # of the most channels some kernels would spill a few registers to get by with half of them
    return replace(config, num_warps=16, maxnreg=128 if c > 1024 and itemsize == 4 else 0) if config.block_c >= c else config


def _convolution(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int) -> Config:
    if itemsize > 2:
        return Config(16, min(power_of_two(hw), 32), num_warps=8)
    return Config(min(power_of_two(c), 64), min(power_of_two(hw), 128), num_warps=8)


def _convolution_bwd(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int) -> Config:
    # as many programs as run at once, because each leaves a share of its channels' gradients of the weight, of all its positions together
    block_c = min(power_of_two(c), 64 if itemsize == 2 else 32)
    # rows that begin inside of a sector read one more of each tile, so fewer tiles; not where every element takes an address
    block_p = 16 if itemsize > 2 else 64 if not channels_last and hw % 16 and hw % 4 == 0 else 32
    return Config(block_c, min(power_of_two(hw), block_p), max(1, 2 * sms // -(-c // block_c)), num_warps=8)


def _strided_convolution_bwd(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int) -> Config:
    config = _convolution_bwd(n, c, hw, itemsize, channels_last, sms)
    # at 32 positions AMD's compiler spills some registers, at 64 none
    return replace(config, block_p=64) if itemsize == 2 and not channels_last and hw % 4 == 0 else config


def _covariance(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int) -> Config:
    # all channels where that makes programs enough: with more blocks of them a map is read twice as many times
    if itemsize == 8:
        return Config(min(power_of_two(c), 32), 32)
    block_c = min(power_of_two(c), 128 if n * (-(-c // 128)) ** 2 >= sms else 64)
    return Config(block_c, 16, num_warps=max(4, block_c // 16), maxnreg=232 if block_c == 64 else 0)


def _covariance_bwd(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int) -> Config:
    # many positions, because every program reads what flows back to its channels' covariances
    if itemsize == 8:
        return Config(min(power_of_two(c), 32), 32)
    return Config(min(power_of_two(c), 128), min(power_of_two(hw), 128), num_warps=8)


def _plane(
    n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int, resident: int = RESIDENT_ELEMENTS, limit: int = 168
) -> Config:  # fmt: skip
    """limit: of the registers of a thread that loads 16 bytes of channels-last rows at once, which leaves three programs of four warps."""
    if itemsize == 8:
        resident //= 2
    block_p = power_of_two(hw)
    if channels_last:
        row = min(power_of_two(c), 64 // itemsize)  # 64 bytes, which a shuffled map reads as two runs of 32
        if row * block_p > resident:
            step = (1024 if itemsize == 8 else 2048) // row
            warps = _warps(row, step, _each(c, itemsize))
            return _ticketed_plane(Config(row, step, num_warps=warps, maxnreg=limit if itemsize == 2 else 0), n, c, hw, itemsize, sms)
        # a whole sector at least; backward has no registers for more elements
        return Config(row // 2 if row * block_p > 4096 else row, block_p, num_warps=8)
    if block_p > resident:
        return _ticketed_plane(Config(1, 2048, num_warps=8), n, c, hw, itemsize, sms)
    block_c = min(power_of_two(c), max(1, 1024 // block_p))
    return Config(block_c, block_p, num_warps=8 if hw % 4 else min(16, max(4, block_c * block_p // 256)))


def _ticketed_plane(tile: Config, n: int, c: int, hw: int, itemsize: int, sms: int) -> Config:
    """As "ticket", but a wave is of one block of channels, so that a plane of any size has enough ranges."""
    groups, size = max(n * -(-c // tile.block_c), 1), tile.block_c * hw * itemsize
    steps = -(-hw // tile.block_p)
    splits = min(steps, 64, power_of_two(max(-(-size // TICKET_BYTES), 4 * sms // groups)))
    splits = -(-steps // -(-steps // splits))  # none without positions
    few = 2 * size // splits < TICKET_BYTES and groups * splits > 4 * sms
    return replace(tile, splits=splits, lag=0 if few else min(groups, 1 + -(-4 * sms // splits)))


def _shuffled_plane(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int) -> Config:
    # a channels-last thread holds twice the channels, and each has parameters of its own
    return _plane(n, c, hw, itemsize, channels_last, sms, RESIDENT_ELEMENTS // 2 if channels_last else RESIDENT_ELEMENTS, 248)


def _lines(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int, w: int) -> Config:
    # many channels, because every block of them leaves a share of the statistics of each pixel, and few splits, because every one leaves a share of
    # those of each column; fewer and more where there would be too few programs
    h = hw // w
    block_w = min(power_of_two(w), 128)
    elements = 8 * 32 * _each(c if channels_last else w, itemsize)
    block_h = 1
    if not channels_last:
        # whole planes, or as many rows as make whole sectors; of 8 channels at least, whose statistics make one
        elements = max(elements, 2048)
        most = max(1, elements // (8 * block_w))
        block_h = power_of_two(h) if power_of_two(h) <= most else min(most, SECTOR // math.gcd(SECTOR, w * itemsize))
    block_c = min(power_of_two(c), 64, elements // (block_w * block_h))
    images = max(n * -(-w // block_w), 1)
    while block_c > 16 and images * -(-c // block_c) < sms:
        block_c //= 2
    block_h = min(power_of_two(h), elements // (block_w * block_c))
    if block_h >= h and block_w >= w:
        return Config(block_c, block_w * block_h, min(-(-c // block_c), power_of_two(-(-8 * sms // max(n, 1)))), 8)
    splits = 1
    while splits < min(8, h // block_h) and images * -(-c // block_c) * splits < sms:
        splits *= 2
    return Config(block_c, block_w * block_h, splits, 8)


def _extremes(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int, w: int) -> Config:
    # a maximum and its position are kept beside each sum
    return replace(_lines(n, c, hw, itemsize, channels_last, sms, w), num_warps=16)


def _products(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int, w: int) -> Config:
    # two maps and the gates are kept beside each sum
    tile = _lines(n, c, hw, itemsize, channels_last, sms, w)
    return replace(tile, num_warps=16 if tile.block_c * tile.block_p > 2048 else 8, maxnreg=128)


def _rows(n: int, c: int, hw: int, itemsize: int, channels_last: bool, sms: int, w: int) -> Config:
    width, height = power_of_two(w), power_of_two(hw // w)
    each = _each(c if channels_last else w, itemsize)
    elements = 8 * 32 * each
    if channels_last:
        block_c = min(power_of_two(c), 64 // itemsize)
    else:
        # whole planes, or eight rows: whole sectors
        block_c = min(power_of_two(c), max(1, elements // (width * (height if width * height <= 1024 else 8))))
    block_p = width * max(1, min(height, elements // (block_c * width)))
    programs = max(n * -(-c // block_c), 1)
    limit = 80 if block_c * block_p <= 2048 else 128  # that no kernel reaches
    return Config(block_c, block_p, power_of_two(-(-sms // programs)), _warps(block_c, block_p, each), maxnreg=limit)


_RULES: dict[str, Callable[..., Config]] = {
    "channel": _channel,
    "excited": _excited,
    "means": _means,
    "pools": _pools,
    "ticket": _ticket,
    "tile": _tile,
    "column": _column,
    "pixel": _pixel,
    "context": _context,
    "context_bwd": _context_bwd,
    "convolution": _convolution,
    "convolution_bwd": _convolution_bwd,
    "strided_convolution_bwd": _strided_convolution_bwd,
    "covariance": _covariance,
    "covariance_bwd": _covariance_bwd,
    "plane": _plane,
    "shuffled_plane": _shuffled_plane,
    "lines": _lines,
    "extremes": _extremes,
    "products": _products,
    "rows": _rows,
}
