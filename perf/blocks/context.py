"""Global context."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Block, Params, Peer, Weights


def _network(c: int, rd: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, rd, 1), nn.LayerNorm([rd, 1, 1], eps=1e-6), nn.ReLU(), nn.Conv2d(rd, c, 1))


def _gc(x: Tensor, w: Weights, p: Params) -> Tensor:
    n, c = x.shape[:2]
    a = F.softmax(F.conv2d(x, w["w"], w["b"]).reshape(n, 1, -1), dim=-1).unsqueeze(3)
    context = (x.reshape(n, 1, c, -1) @ a).view(n, c, 1, 1)
    return x + w["add"](context) if "add" in w else x * torch.sigmoid(w["scale"](context))


def _shapes(branch: str) -> Any:
    return lambda c, p: {"w": (1, c, 1, 1), "b": (1,), branch: partial(_network, c, p["rd"])}


def _fused(x: Tensor, w: Weights, p: Params, **epilogue: Any) -> Tensor:
    from tritattn import ops

    return ops.gc(x, **w, **epilogue)


def _timm(name: str) -> Peer:
    return Peer(lambda timm, c, p: timm.layers.get_attn(name)(c, rd_channels=p["rd"]))


BLOCKS = {"gc": Block(_shapes("add"), _gc, _fused, {"rd": 0}, (3, 4), {"timm": _timm("gca")})}
BLOCKS["gc_scale"] = replace(BLOCKS["gc"], shapes=_shapes("scale"), bar=(3, 5), peers={"timm": _timm("gc")}, rereads=True)
