"""A block of the harness: its parameters, the plain torch code that people run today, the call into tritattn, and what it may cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Params = dict[str, Any]
Weights = dict[str, Any]  # name -> tensor, module, or None
HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "none": lambda t: t}
TAILS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda t: t, "relu": F.relu, "silu": F.silu, "hardswish": F.hardswish, "gelu": F.gelu}
GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hard_sigmoid": F.hardsigmoid}
LAYERS = {"relu": nn.ReLU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid, "hard_sigmoid": nn.Hardsigmoid}


@dataclass(frozen=True)
class Peer:
    """A block of another package: make(package, c, params) -> module whose parameters come in the order of Block.shapes, modules' in their places.

    only: the params that it needs to have, where it knows one variant.
    """

    make: Callable[[Any, int, Params], nn.Module]
    only: Params = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """shapes(c, params): parameter name -> its shape, or a function that makes a module. eager(x, weights, params): the block alone, in plain torch.

    fused(x, weights, params, **epilogue): the same through tritattn. peers: provider -> its block of the same computation.
    maps: how many maps it takes; x is then a tuple of them. wide: their channels over y's. U is one read or write of one map of y's shape.
    bar: U forward and backward with one read of the map for each global dependency. floor: with the map kept on chip between reduction and gate.
    rereads: whether the last pass of its backward reads x in any case, so that an activation costs it nothing.
    """

    shapes: Callable[[int, Params], dict[str, Any]]
    eager: Callable[[Any, Weights, Params], Tensor]
    fused: Callable[..., Tensor]
    defaults: Params
    bar: tuple[int, int]
    peers: dict[str, Peer] = field(default_factory=dict)
    floor: tuple[int, int] = (2, 3)
    maps: int = 1
    wide: int = 1
    rereads: bool = False


def mlp_shapes(c: int, p: Params) -> dict[str, Any]:
    return {"w1": (p["rd"], c, 1, 1), "b1": (p["rd"],), "w2": (c, p["rd"], 1, 1), "b2": (c,)}


def mlp(z: Tensor, w: Weights, p: Params) -> Tensor:
    return F.conv2d(HIDDEN[p["hidden"]](F.conv2d(z, w["w1"], w["b1"])), w["w2"], w["b2"])


def fused(name: str, *options: str) -> Callable[..., Tensor]:
    """tritattn's op of that name; `options` are the params that it takes."""

    def call(x: Tensor, w: Weights, p: Params, **epilogue: Any) -> Tensor:
        from tritattn import ops

        return getattr(ops, name)(x, **w, **{option: p[option] for option in options}, **epilogue)

    return call


NORM = (1e-5, 0.01)  # eps and momentum of the BatchNorm in the authors' CBAM
