"""Tuning: for each pass and shape, and each product of an excite, tiles around those of the rule are timed beside them, and what is faster by more
than the noise becomes a table.

A pass or product is timed inside the ops that use it, since it is a part of them: the forward, the backward, or both where it occurs in both. Tiles
must be right and must not spill more than the rule's; of several ops that share one at a shape, none may become slower.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
from rich.console import Console
from torch import distributed

from tritattn import _linear, _tables, tuning
from tritattn._linear import Tile
from tritattn.tuning import Config, power_of_two

from . import timing
from .cases import Case
from .choices import Answer, Asked, Product, Question, answered, recorded
from .environment import environment, now
from .runner import DeviceFailed, Row, Unit, clean, measure, status_of
from .schema import PLACE, TUNE, cell, complete_rows, gather, here, identity, read
from .summary import geomean, print_tune
from .sweep import Bench

GAIN = 0.03  # less than that is not worth an entry
FINISHED = "finished"  # stands for the configuration in the last row of a case
_DOUBLED, _HALVED = 2.0, 0.5
# What is changed of the rule's tiles: one thing, or two that make up for each other.
CHANGES: tuple[dict[str, float], ...] = (
    *({name: factor} for name in ("block_c", "block_p", "splits", "num_warps", "lag") for factor in (_DOUBLED, _HALVED)),
    *({"block_c": factor, "block_p": 1 / factor} for factor in (_DOUBLED, _HALVED)),
    *({block: factor, "num_warps": factor} for block in ("block_c", "block_p") for factor in (_DOUBLED, _HALVED)),
    {"lag": 0},
    {"maxnreg": 0},
)
# and of them with a lag, where the rule has none
LAGGING: tuple[dict[str, float], ...] = ({}, {"lag": _DOUBLED}, {"lag": _HALVED}, {"block_c": _DOUBLED}, {"block_p": _DOUBLED})
LIKELY, OTHERS = 8, 4  # tiles of a product, the fastest by the model of all, and of those that multiply where the rule's does not
WARP_OPERANDS = 1536  # elements of a step that a warp of matrix units can split into parts without spilling


def candidates(rule: Answer, question: Asked) -> list[Answer]:
    """The configurations to try, the rule's first."""
    return _passes(rule, question) if isinstance(rule, Config) else _products(rule, question)  # type: ignore[arg-type]


def _products(rule: Tile, question: Product) -> list[Answer]:
    likely, sizes = _linear.likely(*question), dict(block_m=question.m, block_j=question.j, block_k=question.k)
    tried = likely[:LIKELY] + [tile for tile in likely if tile.units != rule.units][:OTHERS]
    for name in (*sizes, "splits"):
        for factor in (_DOUBLED, _HALVED):
            changed: dict[str, Any] = {name: int(getattr(rule, name) * factor)}
            tile = replace(rule, **changed)
            fits = all(getattr(tile, block) <= power_of_two(size) for block, size in sizes.items())
            if fits and _tables.problem(question.entry[0], "1", fields_of(tile.key)) is None:
                tried.append(tile)
    # a warp for every 16 rows, so that none of them splits up another's into parts, as long as it has the registers
    fewer = [replace(tile, num_warps=tile.block_m // 16) for tile in tried if tile.units and tile.block_m < 64]
    tried += [tile for tile in fewer if (tile.block_m + tile.block_j) * tile.block_k <= WARP_OPERANDS * tile.num_warps]
    return list({tile.key: tile for tile in (rule, *(replace(tile, source="tuned") for tile in tried if tile.key != rule.key))}.values())


def _passes(rule: Config, question: Question) -> list[Answer]:
    """None beside the rule's where programs wait for each other in groups, which have to fit on the device."""
    found = {rule.key: rule}
    changed = [] if rule.group else [(rule, change) for change in CHANGES]
    if question.role == "ticket" and not rule.lag:
        programs = -(-question.c // rule.block_c) * rule.splits
        lagging = replace(rule, lag=tuning.images_between(question.n, programs, tuning.processors(torch.device("cuda"))))
        changed += [(lagging, change) for change in LAGGING]
    for start, change in changed:
        values: dict[str, Any] = {name: int(getattr(start, name) * factor) for name, factor in change.items()}
        config = replace(start, source="tuned", **values)
        fits = config.block_c <= power_of_two(question.c) and config.block_p <= power_of_two(question.hw)
        fits = fits and _tables.problem(question.entry[0], str(question.n), fields_of(config.key)) is None
        if fits and config.splits <= max(rule.splits, -(-question.hw // config.block_p)):
            found.setdefault(config.key, config)
    return list(found.values())


KEYS = {
    r"c(\d+)p(\d+)s(\d+)w(\d+)(?:l(\d+))?(?:r(\d+))?": _tables.FIELDS,
    r"m(\d+)j(\d+)k(\d+)s(\d+)w(\d+)(u?)": _tables.PRODUCT_FIELDS,
}


def fields_of(key: str) -> dict[str, int]:
    """The fields that a configuration's key tells, all of them, so that an entry leaves none to the rule."""
    for pattern, names in KEYS.items():
        if match := re.fullmatch(pattern, key):
            return {name: int((value or "0").replace("u", "1")) for name, value in zip(names, match.groups(), strict=True)}
    raise ValueError(f"not the key of a configuration: {key}")


@contextmanager
def compiled() -> Iterator[list[Any]]:
    """Collects the compiled kernels launched inside the block."""
    from triton.runtime.jit import JITFunction

    found: list[Any] = []
    run = JITFunction.run

    def watched(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(run(kernel, *args, **kwargs))
        return found[-1]

    with mock.patch.object(JITFunction, "run", watched):
        yield found


def asked(bench: Bench) -> dict[Asked, tuple[Answer, str]]:
    """Question -> the rule's answer, and the mode in which it is put."""
    found: dict[Asked, tuple[Answer, str]] = {}
    for mode in ("fwd", "bwd"):
        call = bench.call("tritattn", mode)
        with recorded() as questions:
            call(0)
        for question, config in questions.items():
            found[question] = (config, mode if question not in found else "fwd_bwd")
    return found


def compare(bench: Bench, question: Asked, rule: Answer, mode: str, samples: int, sample_ms: float) -> list[dict[str, Any]]:
    """The columns of every candidate: checked, and timed beside the rule."""
    call = bench.call("tritattn", mode)
    key, batch = question.entry
    rows: dict[str, dict[str, Any]] = {}
    lanes: dict[str, timing.Lane] = {}
    for config in candidates(rule, question):
        row: dict[str, Any] = {"mode": mode, "key": key, "batch": batch, "config": config.key, "status": "ok"}
        rows[config.key] = row

        def changed(i: int, config: Answer = config) -> Any:
            with answered(question, config):
                return call(i)

        try:
            with compiled() as kernels:
                result = changed(0)
            row["max_err"], right = bench.error(mode, result)
            del result
            row["spill_bytes"] = 4 * sum(getattr(kernel, "n_spills", 0) or 0 for kernel in kernels)
            if not right:
                row["status"] = "wrong"
            elif row["spill_bytes"] > rows[rule.key].get("spill_bytes", 0):
                row["status"] = "spills"
            else:
                lanes[config.key] = timing.lane(changed, bench.sets, bench.device)
        except Exception as error:
            row["status"] = status_of(error)
            clean(bench.device, {"tritattn": row})
    if rule.key not in lanes:
        return list(rows.values())
    times = timing.measure(lanes, bench.device, samples=samples, sample_ms=sample_ms)
    base = times[rule.key]
    for name, taken in times.items():
        spreads = [(t.ms_p80 - t.ms_p20) / t.ms_p50 for t in (base, taken)]
        rows[name].update(asdict(taken), ratio=taken.ms_p50 / base.ms_p50, noise=math.hypot(*spreads))
    return list(rows.values())


def _measure(case: Case, device: str, samples: int, sample_ms: float, missing: Sequence[Row]) -> Iterator[Row]:
    (finished,) = missing
    status = "ok"
    try:
        bench = Bench(case, device)
        for question, (rule, mode) in asked(bench).items():
            for row in compare(bench, question, rule, mode, samples, sample_ms):
                yield {**case.row(), **row}
            clean(device, {})
    except DeviceFailed as failed:
        for row in failed.rows.values():
            yield {**case.row(), **row}
        raise
    except Exception as error:
        status = status_of(error)
        clean(device, {})
    yield {**finished, "status": status}


def winners(table: pd.DataFrame) -> dict[str, dict[str, dict[str, int]]]:
    """The entries of a table of tiles: of each pass or product the configuration with the best mean over the ops that use it, where that beats the
    rule by more than `GAIN` and the noise, and makes none of them slower by more than the noise."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for (key, batch), group in table[table.key != ""].groupby(["key", "batch"], sort=True):
        uses = len(group[["op", "mode", "dtype", "layout", "n", "c", "h", "w", "params"]].drop_duplicates())
        best: tuple[float, str] = (1.0, "")
        for config, rows in group.groupby("config"):
            good = len(rows) == uses and (rows.status == "ok").all() and (rows.ratio <= 1 + rows.noise).all()
            mean = geomean(rows.ratio)
            if good and 1 - mean > max(GAIN, rows.noise.max()):
                best = min(best, (mean, str(config)))
        if best[1]:
            found.setdefault(str(key), {})[f"{batch:.0f}"] = fields_of(best[1])
    return found


def kept_tiles(path: Path, processors: int) -> _tables.Table:
    """The entries at `path`. Raises ValueError for a table that cannot be added to, of another device under the same name, or of another Triton."""
    kept, problems = _tables.read(path, processors)
    if problems and not kept:
        raise ValueError(f"{path}: {problems[0]}; move it away or choose another file")
    return kept


def write_table(path: Path, table: pd.DataFrame, device: str, processors: int) -> int:
    """Bring the table of tiles at `path` up to what was measured: entries of what was measured are replaced, others stay. Returns their number."""
    kept = kept_tiles(path, processors)
    tiles = {key: {str(n): entry for n, entry in batches.items()} for key, batches in kept.items()}
    for key, batch in table[table.key != ""][["key", "batch"]].drop_duplicates().itertuples(index=False):
        tiles.get(key, {}).pop(f"{batch:.0f}", None)
    for key, batches in winners(table).items():
        tiles.setdefault(key, {}).update(batches)
    tiles = {key: dict(sorted(batches.items(), key=lambda entry: int(entry[0]))) for key, batches in sorted(tiles.items()) if batches}
    header = {"schema": _tables.SCHEMA, "device": device, "processors": processors, "triton": _tables.triton_version()}
    text = json.dumps({**header, "torch": torch.__version__, "tuned": now(), "tiles": tiles}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_suffix(".tmp")
    partial_file.write_text(text + "\n", encoding="utf-8")
    os.replace(partial_file, path)
    return sum(map(len, tiles.values()))


def tune(
    cases: Sequence[Case],
    path: str | os.PathLike[str],
    device: str,
    console: Console,
    *,
    out: str | os.PathLike[str] | None = None,
    samples: int = 15,
    sample_ms: float = 2.0,
    budget: float | None = None,
    resume: bool = True,
) -> Path:
    """Time the candidates of every pass and product of the cases, and write the table of tiles: `out`, or the one that the package brings for this
    device.

    Under torchrun every process takes a share of the cases that are left on a GPU of its own, with a CSV of its own beside `path`. The first one
    gathers these at the end, or when the command is given again after an interruption, and writes the table.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    path = Path(path)
    if world > 1:
        distributed.init_process_group("gloo", timeout=timedelta(days=7))  # for which the first to be ready waits
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.backends.cudnn.allow_tf32 = False
    place = environment(device)
    processors = tuning.processors(torch.device(device))
    table_path = Path(out) if out else _tables.BUNDLED / f"{_tables.slug(place['device'])}.json"
    kept_tiles(table_path, processors)
    if rank == 0:
        _gather(path, resume)
    _wait(world)
    done = {identity(row, TUNE) for row in complete_rows(path, TUNE) if here(row, place)} if path.exists() else set()
    _wait(world)  # before the first one writes to the file that all of them read
    units = []
    for case in cases:
        finished = {**case.row(), "mode": "", "key": "", "batch": None, "config": FINISHED}
        name = f"{case.op_name} {case.dtype} {case.layout} {'x'.join(map(str, case.shape))}"
        if identity(finished, TUNE) not in done:
            units.append(Unit(name, [finished], partial(_measure, case, device, samples, sample_ms)))
    own = path.with_suffix(f".{rank}{path.suffix}") if rank else path
    with no_tables():
        measure(
            units[rank::world], own, TUNE, title="tune", device=device, console=console, summary=print_tune, budget=budget, resume=True
        )  # fmt: skip
    _wait(world)
    if rank == 0:
        _gather(path, True)
        rows = read(path, TUNE)
        # what the file keeps of other devices and versions says nothing about this one
        rows = rows[(rows[list(PLACE)] == [cell(place[name]) for name in PLACE]).all(axis=1)]
        count = write_table(table_path, rows, place["device"], processors)
        console.print(f"{count} entries in {table_path}", soft_wrap=True)
    if world > 1:
        distributed.destroy_process_group()
    return table_path


def _wait(world: int) -> None:
    if world > 1:
        distributed.barrier()


def _gather(path: Path, resume: bool) -> None:
    """The rows of all processes in one file; without `resume` none of them stay."""
    own = re.compile(rf"{re.escape(path.stem)}\.\d+{re.escape(path.suffix)}")
    parts = sorted(part for part in path.parent.glob("*") if own.fullmatch(part.name))
    if resume and parts:
        gather(path, parts, TUNE)
    for file in () if resume else (path, *parts):
        file.unlink(missing_ok=True)


@contextmanager
def no_tables() -> Iterator[None]:
    """The rule alone: what is compared with."""
    with mock.patch.object(_tables, "tables", lambda device: ()):
        tuning.choose.cache_clear()
        try:
            yield
        finally:
            tuning.choose.cache_clear()
