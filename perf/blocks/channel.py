"""SE, also after a BatchNorm and an activation, ESE, ECA and cSE."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import GATES, HIDDEN, LAYERS, Block, Params, Peer, Weights, fused, mlp, mlp_shapes


def _se(x: Tensor, w: Weights, p: Params) -> Tensor:
    return x * GATES[p["gate"]](mlp(x.mean((2, 3), keepdim=True), w, p))


def _ese(x: Tensor, w: Weights, p: Params) -> Tensor:
    return x * GATES[p["gate"]](F.conv2d(x.mean((2, 3), keepdim=True), w["w"], w["b"]))


def _eca(x: Tensor, w: Weights, p: Params) -> Tensor:
    z = F.conv1d(x.mean((2, 3)).unsqueeze(1), w["w"], padding=p["k"] // 2)
    return x * torch.sigmoid(z).view(x.shape[0], -1, 1, 1).expand_as(x)


def _norm_se(x: Tensor, w: Weights, p: Params) -> Tensor:
    return _se(HIDDEN[p["before"]](w["before_norm"](x)), w, p)


def _norm_shapes(c: int, p: Params) -> dict[str, Any]:
    return {**mlp_shapes(c, p), "before_norm": partial(nn.BatchNorm2d, c)}


def _norm_defaults(hidden: str, before: str) -> Params:
    return {"rd": 0, "hidden": hidden, "gate": "sigmoid", "before": before}


_NORMED = fused("se", "hidden", "gate", "before")


def cse(x: Tensor, w: Weights, p: Params) -> Tensor:
    return x * torch.sigmoid(mlp(F.adaptive_avg_pool2d(x, 1), w, p)).expand_as(x)


def _timm_se(timm: Any, c: int, p: Params) -> nn.Module:
    return timm.layers.SEModule(c, rd_channels=p["rd"], act_layer=LAYERS[p["hidden"]], gate_layer=p["gate"])


def _torchvision_se(torchvision: Any, c: int, p: Params) -> nn.Module:
    block = torchvision.ops.SqueezeExcitation
    return block(c, p["rd"], activation=LAYERS[p["hidden"]], scale_activation=LAYERS[p["gate"]])


def _timm_ese(timm: Any, c: int, p: Params) -> nn.Module:
    return timm.layers.EffectiveSEModule(c)


def _timm_eca(timm: Any, c: int, p: Params) -> nn.Module:
    return timm.layers.EcaModule(kernel_size=p["k"])


_PEERS = {"timm": Peer(_timm_se), "torchvision": Peer(_torchvision_se)}
BLOCKS = {
    "se": Block(mlp_shapes, _se, fused("se", "hidden", "gate"), {"rd": 0, "hidden": "relu", "gate": "sigmoid"}, (3, 4), _PEERS),
    # after the BatchNorm, in training, which ends a residual block's branch; its statistics are of all images, so that nothing stays on chip
    "norm_se": Block(_norm_shapes, _norm_se, _NORMED, _norm_defaults("relu", "none"), (3, 5), floor=(3, 5), rereads=True),
    # in the middle of an inverted residual, where an activation follows the norm: the squeeze is another pass, from which the gate's reads L2
    "norm_silu_se": Block(_norm_shapes, _norm_se, _NORMED, _norm_defaults("silu", "silu"), (4, 5), floor=(3, 5), rereads=True),
    "ese": Block(
        lambda c, p: {"w": (c, c, 1, 1), "b": (c,)}, _ese, fused("ese", "gate"), {"gate": "hard_sigmoid"}, (3, 4), {"timm": Peer(_timm_ese)}
    ),
    "eca": Block(lambda c, p: {"w": (1, 1, p["k"])}, _eca, fused("eca"), {"k": 0}, (3, 4), {"timm": Peer(_timm_eca)}),
    "cse": Block(mlp_shapes, cse, fused("cse", "hidden"), {"rd": 0, "hidden": "relu"}, (3, 4)),
}
