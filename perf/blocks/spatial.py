"""CBAM and its halves."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import NORM, Block, Params, Peer, Weights, fused, mlp, mlp_shapes


def _channel_attention(x: Tensor, w: Weights, p: Params) -> Tensor:
    return x * torch.sigmoid(mlp(F.adaptive_avg_pool2d(x, 1), w, p) + mlp(F.adaptive_max_pool2d(x, 1), w, p))


def _spatial_attention(x: Tensor, w: Weights, p: Params) -> Tensor:
    stats = torch.cat([torch.mean(x, dim=1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]], dim=1)
    logits = F.conv2d(stats, w["weight"], padding=p["k"] // 2)
    if w["norm"] is not None:
        logits = w["norm"](logits)
    return x * torch.sigmoid(logits)


def _cbam(x: Tensor, w: Weights, p: Params) -> Tensor:
    return _spatial_attention(_channel_attention(x, w, p), w, p)


def _spatial_shapes(c: int, p: Params) -> dict[str, Any]:
    return {"weight": (1, 2, p["k"], p["k"]), "norm": partial(nn.BatchNorm2d, 1, *NORM) if p["norm"] == "batch" else None}


def _timm_cbam(timm: Any, c: int, p: Params) -> nn.Module:
    block = timm.layers.get_attn("cbam")(c, rd_channels=p["rd"], mlp_bias=True)
    block.spatial.conv.bn.eps, block.spatial.conv.bn.momentum = NORM
    return block


BLOCKS = {
    "channel_attention": Block(mlp_shapes, _channel_attention, fused("channel_attention", "hidden"), {"rd": 0, "hidden": "relu"}, (3, 4)),
    "spatial_attention": Block(_spatial_shapes, _spatial_attention, fused("spatial_attention"), {"k": 7, "norm": "none"}, (3, 4)),
    "cbam": Block(
        lambda c, p: {**mlp_shapes(c, p), **_spatial_shapes(c, p)},
        _cbam,
        fused("cbam", "hidden"),
        {"rd": 0, "hidden": "relu", "k": 7, "norm": "none"},
        (4, 5),
        {"timm": Peer(_timm_cbam, {"norm": "batch"})},
    ),
}
