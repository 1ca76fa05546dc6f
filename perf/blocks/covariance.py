"""GSoP's channel attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Block, Params, Weights


def _shapes(c: int, p: Params) -> dict[str, Any]:
    d = p["d"]
    return {  # without the authors' bias before the BatchNorm, whose gradient is zero, so that it has no relative error
        "reduce": lambda: nn.Sequential(nn.Conv2d(c, d, 1, bias=False), nn.BatchNorm2d(d)),
        "excite": lambda: nn.Sequential(nn.BatchNorm2d(d), nn.Conv2d(d, 4 * d, (d, 1), groups=d), nn.Conv2d(4 * d, c, 1)),
    }


def _gsop(x: Tensor, w: Weights, p: Params) -> Tensor:
    """As the authors write it, with a matrix that centres each map."""
    u = F.relu(w["reduce"](F.relu(x))).flatten(2)
    n, d, m = u.shape
    centring = (torch.eye(m, device=u.device) / m - 1 / m / m).to(u.dtype).expand(n, m, m)
    covariance = u.bmm(centring).bmm(u.transpose(1, 2))
    return x * torch.sigmoid(w["excite"](covariance.view(n, d, d, 1)))


def _fused(x: Tensor, w: Weights, p: Params, **epilogue: Any) -> Tensor:
    from tritattn import ops

    return ops.gsop(x, tuple(w["reduce"]), w["excite"], **epilogue)


# The convolution takes the ReLU in, and its backward reads the map once for both of its gradients; fp32 maps take torch's convolution, 5 and 8.
BLOCKS = {"gsop": Block(_shapes, _gsop, _fused, {"d": 128}, (3, 5), floor=(3, 5), rereads=True)}
