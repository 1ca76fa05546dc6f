"""Selective kernels and split attention, after their convolutions; without BatchNorm, which a batch of one does not train."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .block import Block, Params, Weights, fused, mlp


def _shapes(k: int, bias: bool, c: int, p: Params) -> dict[str, Any]:
    biases = ((p["rd"],), (k * c,)) if bias else (None, None)
    return {"w1": (p["rd"], c, 1, 1), "b1": biases[0], "w2": (k * c, p["rd"], 1, 1), "b2": biases[1]}


def _selected(stacked: Tensor, w: Weights, p: Params) -> Tensor:
    """stacked [N, K, C, H, W]"""
    logits = mlp(stacked.sum(1).mean((2, 3), keepdim=True), w, p)
    return (stacked * logits.view(*stacked.shape[:3], 1, 1).softmax(1)).sum(1)


def _sk(x: tuple[Tensor, ...], w: Weights, p: Params) -> Tensor:
    return _selected(torch.stack(x, 1), w, p)


def _splat(x: Tensor, w: Weights, p: Params) -> Tensor:
    return _selected(F.relu(x).unflatten(1, (2, -1)), w, p).contiguous()


_DEFAULTS: Params = {"rd": 0, "hidden": "relu"}
BLOCKS = {
    "sk": Block(partial(_shapes, 2, False), _sk, fused("sk", "hidden"), _DEFAULTS, (5, 6), floor=(3, 5), maps=2),
    "splat": Block(partial(_shapes, 2, True), _splat, fused("splat", "hidden"), _DEFAULTS, (5, 8), floor=(3, 5), wide=2),
}
