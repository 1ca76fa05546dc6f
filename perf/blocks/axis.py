"""Coordinate, strip and triplet attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import NORM, Block, Params, Peer, Weights, fused


def _coord(x: Tensor, w: Weights, p: Params) -> Tensor:
    rows, columns = F.adaptive_avg_pool2d(x, (None, 1)), F.adaptive_avg_pool2d(x, (1, None))
    z = F.conv2d(torch.cat([rows, columns.permute(0, 1, 3, 2)], 2), w["w1"])
    rows, columns = torch.split(F.hardswish(w["norm"](z)), [x.shape[2], x.shape[3]], 2)
    return x * torch.sigmoid(F.conv2d(columns.permute(0, 1, 3, 2), w["w_w"])) * torch.sigmoid(F.conv2d(rows, w["w_h"]))


def _strip(x: Tensor, w: Weights, p: Params) -> Tensor:
    c, k = x.shape[1], p["k"]
    rows = F.conv2d(x.mean(3, keepdim=True), w["w_h"], padding=(k // 2, 0), groups=c)
    columns = F.conv2d(x.mean(2, keepdim=True), w["w_w"], padding=(0, k // 2), groups=c)
    return x * torch.sigmoid(rows + columns)


def _triplet(x: Tensor, w: Weights, p: Params) -> Tensor:
    def branch(x: Tensor, plane: str) -> Tensor:
        z = torch.cat([torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)], 1)
        return x * torch.sigmoid(w[f"{plane}_norm"](F.conv2d(z, w[f"{plane}_weight"], padding=p["k"] // 2)))

    cw = branch(x.permute(0, 2, 1, 3).contiguous(), "cw").permute(0, 2, 1, 3).contiguous()
    hc = branch(x.permute(0, 3, 2, 1).contiguous(), "hc").permute(0, 3, 2, 1).contiguous()
    return 1 / 3 * (branch(x, "hw") + cw + hc)


def _coord_shapes(c: int, p: Params) -> dict[str, Any]:
    """Without biases, as timm's."""
    wide = {"w_h": (c, p["rd"], 1, 1), "b_h": None, "w_w": (c, p["rd"], 1, 1), "b_w": None}
    return {"w1": (p["rd"], c, 1, 1), "b1": None, "norm": partial(nn.BatchNorm2d, p["rd"]), **wide}


def _strip_shapes(c: int, p: Params) -> dict[str, Any]:
    return {"w_h": (c, 1, p["k"], 1), "w_w": (c, 1, 1, p["k"])}


def _triplet_shapes(c: int, p: Params) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for plane in ("cw", "hc", "hw"):
        found |= {f"{plane}_weight": (1, 2, p["k"], p["k"]), f"{plane}_norm": partial(nn.BatchNorm2d, 1, *NORM)}
    return found


def _timm_coord(timm: Any, c: int, p: Params) -> nn.Module:
    return timm.layers.get_attn("coord")(c, rd_channels=p["rd"])


def _timm_strip(timm: Any, c: int, p: Params) -> nn.Module:
    return timm.layers.get_attn("strip")(c, kernel_size=p["k"])


BLOCKS = {
    "coord": Block(_coord_shapes, _coord, fused("coord"), {"rd": 0}, (3, 4), {"timm": Peer(_timm_coord)}),
    "strip": Block(_strip_shapes, _strip, fused("strip"), {"k": 3}, (3, 4), {"timm": Peer(_timm_strip)}),
    "triplet": Block(_triplet_shapes, _triplet, fused("triplet"), {"k": 7}, (3, 4)),
}
