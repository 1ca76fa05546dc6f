"""Tuned tiles: what `python -m perf tune` found to be faster than the rule on one kind of device, kept in a file named after it.

{"schema": 2, "device": "NVIDIA H200", "processors": 132, "triton": "3.6", "tiles": {
    "tile 2 channels_last c256 hw3136 maps1 row0": {"256": {...}}, "linear 4 bfloat16 j128 k2048": {"256": {...}}}}

By pass and shape, or product and sizes, then by batch: an entry stands for batches of up to twice and down to half its own, the nearest one in
question. A file of another schema, number of multiprocessors or Triton is left out as a whole, because its times say nothing there. Schema 1 had no
products, and its readers would have taken them for mistakes.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

SCHEMA = 2
BUNDLED = Path(__file__).parent / "tuned"
VARIABLE = "TRITATTN_CONFIG_DIR"  # a folder of tables that come before the bundled ones
FIELDS = ("block_c", "block_p", "splits", "num_warps", "lag", "maxnreg")  # of tuning.Config
PRODUCT_FIELDS = ("block_m", "block_j", "block_k", "splits", "num_warps", "units")  # of _linear.Tile
_KEY = re.compile(r"([a-z_]+) ([1248]) (contiguous|channels_last) c(\d+) hw(\d+) maps(\d+) row(\d+)")
_TYPES = r"[48] (bfloat16|float16|float32|float64)"
_PRODUCT_KEY = re.compile(rf"linear {_TYPES} j\d+ k\d+|(both_)?weights {_TYPES} m\d+ j\d+")
# what a name says beside the device: vendors, form factors, memory
_WORDS = re.compile(r"nvidia|amd|geforce|instinct|tesla|sxm\d*|pcie|hbm\d*e?|\d+gb")

Tiles = dict[str, int]
Table = dict[str, dict[int, Tiles]]


def slug(device: str) -> str:
    """The file's name for a device's: "NVIDIA H100 80GB HBM3" -> "h100"."""
    return "_".join(word for word in re.findall(r"[a-z0-9]+", device.lower()) if not _WORDS.fullmatch(word))


def key(role: str, c: int, hw: int, itemsize: int, channels_last: bool, maps: int = 1, row: int = 0) -> str:
    return f"{role} {itemsize} {'channels_last' if channels_last else 'contiguous'} c{c} hw{hw} maps{maps} row{row}"


def product_key(role: str, m: int, j: int, k: int, itemsize: int, right: torch.dtype) -> tuple[str, int]:
    """And the batch: the terms of a gradient of weights, the rows of another product."""
    sizes, batch = (f"j{j} k{k}", m) if role == "linear" else (f"m{m} j{j}", k)
    return f"{role} {itemsize} {str(right).removeprefix('torch.')} {sizes}", batch


def _power_of_two(value: int) -> bool:
    return value > 0 and not value & (value - 1)


def problem(text: str, n: str, tiles: Any) -> str | None:
    """Why an entry cannot be used, if it cannot. Whatever passes gives right results; a compiler may still refuse it."""
    product = _PRODUCT_KEY.fullmatch(text)
    if not (product or _KEY.fullmatch(text)) or not n.isdecimal():
        return "is not a pass and shape, or product and sizes, and batch"
    fields = PRODUCT_FIELDS if product else FIELDS
    if not isinstance(tiles, dict) or not tiles.keys() <= set(fields) or any(type(value) is not int for value in tiles.values()):
        return f"is not integers named {', '.join(fields)}"
    return _product_problem(tiles, int(text.split()[1])) if product else _pass_problem(tiles)


def _product_problem(tiles: Tiles, itemsize: int) -> str | None:
    if tiles.keys() != set(PRODUCT_FIELDS):
        return "is not a whole tile"  # what it lacks the rule would choose for another
    blocks = [tiles[name] for name in ("block_m", "block_j", "block_k")]
    if not all(map(_power_of_two, (*blocks, tiles["num_warps"]))) or math.prod(blocks) > 1 << 18 or tiles["num_warps"] > 32:
        return "has blocks or warps that are no powers of two, or too large"
    if not 1 <= tiles["splits"] <= 1 << 10 or tiles["units"] not in (0, 1):
        return "is out of range"
    if tiles["units"] and (itemsize > 4 or min(blocks) < 16):
        return "is not for matrix units"
    return None


def _pass_problem(tiles: Tiles) -> str | None:
    blocks = [tiles.get(name, 1) for name in ("block_c", "block_p", "num_warps")]
    if not all(map(_power_of_two, blocks)) or blocks[0] * blocks[1] > 1 << 16 or blocks[2] > 32:
        return "has blocks or warps that are no powers of two, or too large"
    if not 1 <= tiles.get("splits", 1) <= 1 << 10 or not 0 <= tiles.get("lag", 0) <= 1 << 16 or not 0 <= tiles.get("maxnreg", 0) <= 255:
        return "is out of range"
    return None


def read(path: Path, processors: int) -> tuple[Table, list[str]]:
    """A file's entries, and what is wrong with it. Nothing is wrong with a file that is not there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        header = {name: found[name] for name in ("schema", "processors", "triton")}
        entries = [(text, n, tiles) for text, batches in found["tiles"].items() for n, tiles in batches.items()]
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        return {}, [f"cannot be read ({type(error).__name__}: {error})"]
    here = {"schema": SCHEMA, "processors": processors, "triton": triton_version()}
    differing = [f"{name} {header[name]}, not {here[name]}" for name in here if header[name] != here[name]]
    if differing:
        return {}, [f"is for {'; '.join(differing)}"]
    table: Table = {}
    problems = []
    for text, n, tiles in entries:
        wrong = problem(text, n, tiles)
        if wrong is None:
            table.setdefault(text, {})[int(n)] = tiles
        else:
            problems.append(f"{text!r} {n}: {wrong}")
    return table, problems


def triton_version() -> str:
    """Major and minor; empty where there is no Triton that works, and no use for tiles either."""
    try:
        import triton
    except Exception:
        return ""
    return ".".join(triton.__version__.split(".")[:2])


def _read_all(device: torch.device) -> list[tuple[Path, Table, list[str]]]:
    """The files for a GPU, the first to be asked first."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return []
    properties = torch.cuda.get_device_properties(device)
    folders = [Path(os.environ[VARIABLE])] if os.environ.get(VARIABLE) else []
    paths = [folder / f"{slug(properties.name)}.json" for folder in (*folders, BUNDLED)]
    return [(path, *read(path, properties.multi_processor_count)) for path in paths]


def describe(device: torch.device) -> str:
    """Where the tiles for a device come from."""
    parts = []
    for path, table, problems in _read_all(device):
        wrong = f" ({problems[0]})" if problems else ""
        parts.append(f"{sum(map(len, table.values()))} entries of {path}{wrong}")
    return ", then ".join([*parts, "the rule"])


@lru_cache(maxsize=16)
def tables(device: torch.device) -> tuple[Table, ...]:
    """The tables for a GPU. Every file is read once, and what is wrong with one of the user's own is said once."""
    found = []
    for path, table, problems in _read_all(device):
        if problems and path.parent != BUNDLED:
            more = f", and {len(problems) - 1} more" if problems[1:] else ""
            warnings.warn(f"{path}: {problems[0]}{more}; tiles come from elsewhere there", RuntimeWarning, stacklevel=2)
        if table:
            found.append(table)
    return tuple(found)


def nearest(batches: Mapping[int, Tiles], n: int) -> Tiles | None:
    """The tiles of the batch that is nearest to n by ratio, the smaller one of two; None where none is within a factor of two."""
    distances = sorted((abs(math.log2(batch / n)), batch) for batch in batches if batch > 0 and n > 0)
    return batches[distances[0][1]] if distances and distances[0][0] <= 1 else None


def lookup(device: torch.device, text: str, n: int) -> Tiles | None:
    """Tuned tiles for a key and a batch; a pure function of these and of the files."""
    for table in tables(device):
        found = nearest(table.get(text, {}), n)
        if found is not None:
            return found
    return None
