"""Covariances of channels, and the channel gate of GSoP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tritattn import ops

from .op import Op, Params, Shape, statistics


def _covariance(x: Tensor) -> Tensor:
    """By the authors' centring matrix, where that loses no digits."""
    flat = x.flatten(2)
    centred = flat - flat.mean(-1, keepdim=True)
    return torch.einsum("nip,njp->nij", centred, centred) / flat.shape[-1]


def _gsop(name: str, convolution: str, stride: int, main: bool = False) -> Op:
    def shapes(s: Shape) -> dict[str, Any]:
        d = s[1] // 2 + 1
        rows = nn.Conv2d(d, 2 * d, (d, 1), groups=d), nn.Conv2d(2 * d, s[1], 1)
        return {"reduce": lambda: nn.Conv2d(s[1], d, 1, stride, bias=stride == 1), "excite": lambda: nn.Sequential(*rows)}

    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        own = convolution == "fused" and x.dtype == p["reduce"].weight.dtype
        return ops.gsop(x, p["reduce"], p["excite"], convolution="fused" if own else "torch", **epilogue)

    def eager(x: Tensor, p: Params) -> Tensor:
        return x * torch.sigmoid(p["excite"](_covariance(p["reduce"](x.relu()).relu())[..., None]))

    squeeze = "pointwise_convolution" if convolution == "fused" else "rectify"
    return Op(name, shapes, call, eager, (), (squeeze, "covariance", "channel_relay_gate"), main=main)


OPS = [
    _gsop("gsop", "torch", 1),
    _gsop("gsop-fused", "fused", 1, main=True),
    _gsop("gsop-stride", "fused", 2),
    statistics("covariance", ops.covariance, _covariance, "covariance", (3, 4, 5), main=True),
    statistics("covariance-relu", lambda x: ops.covariance(x, before="relu"), lambda x: _covariance(x.relu()), "covariance", (3, 4, 5)),
]
