"""Gather-excite without parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Block, Params, Peer, Weights, fused


def _ge(x: Tensor, w: Weights, p: Params) -> Tensor:
    e = p["extent"]
    z = F.avg_pool2d(x, kernel_size=2 * e - 1, stride=e, padding=e - 1, count_include_pad=False)
    return x * torch.sigmoid(F.interpolate(z, size=x.shape[-2:]))


def _timm_ge(timm: Any, c: int, p: Params) -> nn.Module:
    return timm.layers.GatherExcite(c, extent=p["extent"], use_mlp=False)


BLOCKS = {"ge": Block(lambda c, p: {}, _ge, fused("ge", "extent"), {"extent": 8}, (3, 4), {"timm": Peer(_timm_ge)})}
