"""BAM."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Block, Params, Weights


def _channel(c: int, rd: int) -> nn.Module:
    return nn.Sequential(nn.Linear(c, rd), nn.ReLU(), nn.Linear(rd, c))


def _spatial(c: int, rd: int) -> nn.Module:
    dilated = [layer for _ in range(2) for layer in (nn.Conv2d(rd, rd, 3, padding=4, dilation=4), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(c, rd, 1), nn.ReLU(), *dilated, nn.Conv2d(rd, 1, 1))


def _bam(x: Tensor, w: Weights, p: Params) -> Tensor:
    """As its authors write it, with a mean over the whole map."""
    c = w["channel"](F.adaptive_avg_pool2d(x, 1).flatten(1))[:, :, None, None].expand_as(x)
    return (1 + torch.sigmoid(c * w["spatial"](x).expand_as(x))) * x


def _shapes(c: int, p: Params) -> dict[str, Any]:
    return {"channel": partial(_channel, c, p["rd"]), "spatial": partial(_spatial, c, p["rd"])}


def _fused(x: Tensor, w: Weights, p: Params, **epilogue: Any) -> Tensor:
    from tritattn import ops

    return ops.bam(x, **w, **epilogue)


# The spatial branch's first convolution reads the map, and backward reads it and writes a gradient: 1 of the 4 and 2 of the 7. Without the
# BatchNorms of both branches, whose gradients cancel beyond what a tolerance can hold.
BLOCKS = {"bam": Block(_shapes, _bam, _fused, {"rd": 0}, (4, 7), floor=(3, 6))}
