"""Attentional feature fusion."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .block import Block, Params, Weights


def _context(c: int, rd: int) -> nn.Module:
    first = nn.Conv2d(c, rd, 1)
    with torch.no_grad():
        first.bias[::2], first.bias[1::2] = 4, -4  # type: ignore[index]  # decides each hidden ReLU
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(rd, c, 1))


def _shapes(rounds: int, c: int, p: Params) -> dict[str, Any]:
    return {name: partial(_context, c, p["rd"]) for name in ("local", "pooled", "local2", "pooled2")[: 2 * rounds]}


def _weights(u: Tensor, local: nn.Module, pooled: nn.Module) -> Tensor:
    return torch.sigmoid(local(u) + pooled(u.mean((2, 3), keepdim=True)))


def _mscam(x: Tensor, w: Weights, p: Params) -> Tensor:
    return x * _weights(x, w["local"], w["pooled"])


def _aff(maps: tuple[Tensor, Tensor], w: Weights, p: Params) -> Tensor:
    x, other = maps
    weight = _weights(x + other, w["local"], w["pooled"])
    return 2 * x * weight + 2 * other * (1 - weight)


def _iaff(maps: tuple[Tensor, Tensor], w: Weights, p: Params) -> Tensor:
    x, other = maps
    weight = _weights(x + other, w["local"], w["pooled"])
    weight = _weights(x * weight + other * (1 - weight), w["local2"], w["pooled2"])
    return x * weight + other * (1 - weight)


def _blend(maps: tuple[Tensor, Tensor, Tensor], w: Weights, p: Params) -> Tensor:
    x, other, logits = maps
    weight = torch.sigmoid(logits)
    return x * weight + other * (1 - weight)


def _fused(name: str) -> Any:
    def call(x: Any, w: Weights, p: Params, **epilogue: Any) -> Tensor:
        from tritattn import ops

        maps = x if isinstance(x, tuple) else (x,)
        return getattr(ops, name)(*maps, **w, **epilogue)

    return call


def _block(name: str, eager: Any, u: tuple[int, int], maps: int = 1, rounds: int = 1, **more: Any) -> Block:
    return Block(partial(_shapes, rounds), eager, _fused(name), {"rd": 0} if rounds else {}, u, floor=u, maps=maps, **more)


# A local branch's first convolution reads the map and its last writes one: 2 forward and 3 backward for each round. Without BatchNorms, which would
# make signs of a batch of two, and whose gradients cancel beyond any tolerance; with the local ones and a quarter of the channels between the layers
# it is 5.5 and 8.25.
BLOCKS = {
    "mscam": _block("mscam", _mscam, (6, 11)),
    "aff": _block("aff", _aff, (9, 13), maps=2),
    "iaff": _block("iaff", _iaff, (16, 27), maps=2, rounds=2),
    "blend": _block("blend", _blend, (4, 7), maps=3, rounds=0, rereads=True),
}
