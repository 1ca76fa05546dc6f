"""Coordinate, strip and triplet attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from eager_blocks import coordinate_gate, strip_gate, triplet_branches
from torch import Tensor, nn

from tritattn import ops

from .op import EVEN, Op, Params, Shape

FAMILIES = ("axis_squeeze", "axis_gate")


def _norm(channels: int, mode: str) -> Callable[[], nn.Module]:
    return lambda: nn.BatchNorm2d(channels, momentum=0.3).train(mode == "train")


def _coord(name: str, bias: bool, norm: str | None, main: bool = False, **options: Any) -> Op:
    def shapes(s: Shape) -> dict[str, Any]:
        c, r = s[1], s[1] // 2 + 2
        wide = {"w_h": (c, r, 1, 1), "b_h": (c,) if bias else None, "w_w": (c, r), "b_w": (c,) if bias else None}
        # a BatchNorm in training undoes b1, whose gradient is then nothing but rounding
        return {"w1": (r, c, 1, 1), "b1": (r,) if bias and norm != "train" else None, **wide, "norm": _norm(r, norm) if norm else None}

    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        tensors = [p[n] for n in ("w1", "b1", "w_h", "b_h", "w_w", "b_w")]
        return ops.coord(x, *tensors, norm=p["norm"], **options, **epilogue)

    def eager(x: Tensor, p: Params) -> Tensor:
        return x * coordinate_gate(x, p, **options)

    training = norm == "train"
    unfit = ("offset", "constant") if training else ()
    return Op(name, shapes, call, eager, ("w1",), FAMILIES, main=main, refused=lambda s: training and s[0] == 0, unfit=unfit)


def _strip(name: str, k: int | None, bias: bool, norm: bool, main: bool = False, **options: Any) -> Op:
    def shapes(s: Shape) -> dict[str, Any]:
        c = s[1]
        b = (c,) if bias else None
        norms = {f"norm_{d}": partial(nn.GroupNorm, 1, c) if norm else None for d in "hw"}
        if k is None:
            return {"w_h": None, "b_h": None, "w_w": None, "b_w": None, **norms}
        return {"w_h": (c, 1, k, 1), "b_h": b, "w_w": (c, 1, 1, k), "b_w": b, **norms}

    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        return ops.strip(x, **p, **options, **epilogue)

    def refused(s: Shape) -> bool:
        return norm and s[0] * min(s[2:]) <= 1  # by torch's GroupNorm, in any mode

    return Op(name, shapes, call, lambda x, p: x * strip_gate(x, p, **options), ("w_h", "w_w"), FAMILIES, main=main, refused=refused)


def _triplet(name: str, k: int, bias: bool, norm: str | None, spatial: bool = True, main: bool = False, **options: Any) -> Op:
    planes = ("cw", "hc", "hw")[: 2 + spatial]

    def shapes(s: Shape) -> dict[str, Any]:
        found: dict[str, Any] = {f"{plane}_weight": (1, 2, k, k) for plane in planes}
        return found | {f"{plane}_bias": (1,) if bias else None for plane in planes} | {f"{plane}_norm": norm for plane in planes}

    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        return ops.triplet(x, **p, **options, **epilogue)

    def eager(x: Tensor, p: Params) -> Tensor:
        branches = triplet_branches(x, p, **options)
        return sum(branches[1:], branches[0]) / len(branches)

    def refused(s: Shape) -> bool:
        return norm == "train" and s[0] * min(s[1] * s[3], s[1] * s[2], s[2] * s[3]) <= 1

    scaled = tuple(f"{plane}_weight" for plane in planes)
    return Op(name, shapes, call, eager, scaled, (*FAMILIES, "spatial_convolution"), main=main, refused=refused)


OPS = [
    _coord("coord", True, "eval", main=True),
    _coord("coord-train", False, "train", gate="hard_sigmoid"),
    _coord("coord-logits", True, None, hidden="silu", combine="logits"),
    _strip("strip", 3, False, False, main=True),
    _strip("strip-product", 5, True, True, hidden="silu", combine="product"),
    _strip("strip-plain", None, False, False, gate="hard_sigmoid"),
    _triplet("triplet", 3, False, "train", main=True),
    _triplet("triplet-eval", 3, True, "eval", order="mean_max"),
    _triplet("triplet-even", 3, False, None, spatial=False, **EVEN),
]
