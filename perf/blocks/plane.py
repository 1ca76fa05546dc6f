"""SimAM and shuffle attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .block import Block, Params, Weights, fused


def _simam(x: Tensor, w: Weights, p: Params) -> Tensor:
    """As its authors write it."""
    n = x.shape[2] * x.shape[3] - 1
    d = (x - x.mean(dim=[2, 3], keepdim=True)).pow(2)
    return x * torch.sigmoid(d / (4 * (d.sum(dim=[2, 3], keepdim=True) / n + 1e-4)) + 0.5)


def _shuffle(x: Tensor, w: Weights, p: Params) -> Tensor:
    """As its authors write it."""
    b, c, height, width = x.shape
    x0, x1 = x.reshape(b * p["groups"], -1, height, width).chunk(2, dim=1)
    x0 = x0 * torch.sigmoid(w["cweight"] * F.adaptive_avg_pool2d(x0, 1) + w["cbias"])
    normed = F.group_norm(x1, x1.shape[1], w["norm_weight"], w["norm_bias"])
    x1 = x1 * torch.sigmoid(w["sweight"] * normed + w["sbias"])
    gated = torch.cat([x0, x1], dim=1).reshape(b, -1, height, width)
    return gated.reshape(b, 2, -1, height, width).permute(0, 2, 1, 3, 4).reshape(b, -1, height, width)


def _shuffle_shapes(c: int, p: Params) -> dict[str, Any]:
    k = c // (2 * p["groups"])
    return {**dict.fromkeys(("cweight", "cbias", "sweight", "sbias"), (1, k, 1, 1)), "norm_weight": (k,), "norm_bias": (k,)}


BLOCKS = {
    # bars of planes that fit on chip; others cost 3 and 5, of which 1 and 2 come from L2
    "shuffle": Block(_shuffle_shapes, _shuffle, fused("shuffle", "groups"), {"groups": 4}, (2, 3), rereads=True),
    "simam": Block(lambda c, p: {}, _simam, fused("simam"), {}, (2, 3), rereads=True),
}
