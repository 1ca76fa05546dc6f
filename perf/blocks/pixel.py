"""sSE and scSE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .block import Block, Params, Weights, fused, mlp_shapes
from .channel import cse


def _sse(x: Tensor, w: Weights, p: Params) -> Tensor:
    return x * torch.sigmoid(F.conv2d(x, w["w"], w["b"]))


def _scse(x: Tensor, w: Weights, p: Params) -> Tensor:
    if p["combine"] == "max":
        return torch.maximum(cse(x, w, p), _sse(x, w, p))
    return cse(x, w, p) + _sse(x, w, p)


def _pixel_shapes(c: int, p: Params) -> dict[str, Any]:
    return {"w": (1, c, 1, 1), "b": (1,)}


BLOCKS = {
    "sse": Block(_pixel_shapes, _sse, fused("sse"), {}, (2, 3), rereads=True),
    "scse": Block(
        lambda c, p: {**mlp_shapes(c, p), **_pixel_shapes(c, p)},
        _scse,
        fused("scse", "hidden", "combine"),
        {"rd": 0, "hidden": "relu", "combine": "sum"},
        (3, 4),
    ),
}
BLOCKS["scse_max"] = replace(BLOCKS["scse"], defaults={**BLOCKS["scse"].defaults, "combine": "max"}, bar=(3, 5), rereads=True)
