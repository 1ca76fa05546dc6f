"""CBAM, its spatial half, and spatial statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from eager_blocks import channel_gate, spatial_gate, statistics_of_positions
from torch import Tensor

from tritattn import ops

from .op import EVEN, Op, Params, Shape, fc, join, mlp, statistics


def _spatial(k: int, channels: int = 2, bias: bool = False, norm: str | None = None) -> Callable[[Shape], dict[str, Any]]:
    return lambda s: {"weight": (1, channels, k, k), "bias": (1,) if bias else None, "norm": norm}


def _refused(shapes: Callable) -> Callable[[Shape], bool]:
    return lambda s: shapes(s)["norm"] == "train" and s[0] * math.prod(s[2:]) <= 1


def _spatial_op(name: str, shapes: Callable, apply: bool = True, main: bool = False, **options: Any) -> Op:
    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        return ops.spatial_attention(x, p["weight"], p["bias"], norm=p["norm"], apply=apply, **options, **epilogue)

    def eager(x: Tensor, p: Params) -> Tensor:
        return x * spatial_gate(x, p, **options) if apply else spatial_gate(x, p, **options)

    families = ("spatial_squeeze", "spatial_gate")[: 1 + apply]
    return Op(name, shapes, call, eager, ("weight",), families, epilogue=apply, main=main, refused=_refused(shapes))


def _cbam(name: str, shapes: Callable, main: bool = False, **options: Any) -> Op:
    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        tensors = [p[n] for n in ("w1", "b1", "w2", "b2", "weight", "bias")]
        return ops.cbam(x, *tensors, norm=p["norm"], **options, **epilogue)

    def eager(x: Tensor, p: Params) -> Tensor:
        shared = {"max_grad": options.get("max_grad", "first")}
        u = x * channel_gate(x, p, options.get("pools", ("avg", "max")), options.get("hidden", "relu"), options.get("gate", "sigmoid"), **shared)
        return u * spatial_gate(u, p, options.get("order", "mean_max"), options.get("spatial_gate", "sigmoid"), **shared)

    return Op(name, shapes, call, eager, ("w1", "weight"), ("spatial_squeeze", "spatial_gate"), main=main, refused=_refused(shapes))


POOLS = ("avg", "max", "lp", "lse")
OPS = [
    _spatial_op("spatial_attention", _spatial(3, bias=True), main=True),
    _spatial_op("spatial_attention-train", _spatial(5, norm="train"), order="max_mean"),
    _spatial_op("spatial_attention-eval", _spatial(3, norm="eval"), order="max_mean", gate="hard_sigmoid"),
    _spatial_op("spatial_attention-mix", _spatial(3, 1, bias=True), order="mix", max_grad="even"),
    _spatial_op("spatial_attention-gate", _spatial(3, norm="train"), apply=False),
    _cbam("cbam", join(mlp(), _spatial(3)), main=True),
    _cbam("cbam-train", join(mlp(), _spatial(3, norm="train")), main=True, order="max_mean"),
    _cbam("cbam-eval", join(mlp(False), _spatial(3, bias=True, norm="eval")), hidden="silu"),
    _cbam("cbam-even", join(mlp(), _spatial(1, 1)), order="mix", spatial_gate="hard_sigmoid", **EVEN),
    _cbam("cbam-pools", join(fc(), _spatial(3)), pools=POOLS, gate="hard_sigmoid"),
    statistics("spatial_statistics", ops.spatial_statistics, lambda x: statistics_of_positions(x, ("mean", "max")),
                "spatial_squeeze", (4,), main=True),
    statistics("spatial_statistics-even", lambda x: ops.spatial_statistics(x, ["mix", "max"], max_grad="even"),
                lambda x: statistics_of_positions(x, ("mix", "max"), "even"), "spatial_squeeze", (4,)),
]  # fmt: skip
