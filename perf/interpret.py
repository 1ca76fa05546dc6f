"""What tritattn's kernels move, counted in Triton's interpreter: `TRITON_INTERPRET=1 python -m perf.interpret`, a process of its own because Triton
decides at import whether it interprets.

Reads JSON lines {"case": ..., "batch": ...} on standard input, writes a JSON line for each on standard output.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch

import tritattn

from .cases import Case, Inputs, make_case
from .choices import for_batch
from .counting import Counter, Moved, interpreted, map_order, read_indices
from .interleave import interleaved
from .l2 import IMAGES, Trace
from .providers import build
from .shapes import Site


def count(case: Case, batch: int, dram: bool = False) -> dict[str, Moved]:
    """Mode -> what it moves, with the tiles of a batch of `batch`, and what that batch would move to and from DRAM."""
    found, images = _count(case, batch, batch if dram else 0)
    if dram and 1 < images < batch:
        # what repeats itself is a block of images
        large, _ = _count(dataclasses.replace(case, n=IMAGES * images), batch, batch // images)
        for mode, moved in found.items():
            moved.dram_u = large[mode].dram_u
    return found


def _count(case: Case, batch: int, repeats: int) -> tuple[dict[str, Moved], int]:
    """And how many images are taken together. repeats: of each half of the case, in what would reach DRAM; 0 where that is not asked for."""
    inputs = Inputs(case, "cpu")
    call = build("tritattn", case, inputs.weights, "cpu")
    call.train(True)
    of_map = map_order(case)
    steps = {mode: Counter(of_map, Trace() if repeats else None) for mode in ("fwd", "bwd")}
    with interleaved(), for_batch(batch) as blocks, tritattn.backend("triton"):
        with steps["fwd"] as forward, interpreted(forward):
            y = call.run(inputs.x[0], inputs.residual[0])
        with steps["bwd"] as backward, interpreted(backward):
            torch.autograd.grad(y, inputs.wanted(0, call.parameters), inputs.g[0])
    found = {mode: step.result(repeats, map_order(case).map_numel * case.itemsize) for mode, step in steps.items()}
    return found, max(blocks, default=1)


def warm_up() -> None:
    """What a process allocates once is not counted."""
    count(make_case("cbam", "bf16", "contiguous", 1, Site(1, 8, 4, 4, 2)), 1)


def main() -> None:
    read_indices()
    warm_up()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            found = count(Case(**asked["case"]), asked["batch"], dram=True)
            answer: dict[str, Any] = {mode: dataclasses.asdict(moved) for mode, moved in found.items()}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
