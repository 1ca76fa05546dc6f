"""The benchmarked ops: each block's parameters, the plain torch code that people run today, the call into tritattn, and what the op may cost.

An op's name is its block's with what follows it in a network: `se+residual+relu`. Costs are in U, one read or one write of the map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Params = dict[str, Any]
Weights = dict[str, Any]  # name -> tensor, or None; "norm" -> module
HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "none": lambda t: t}
TAILS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda t: t, "relu": F.relu, "silu": F.silu, "hardswish": F.hardswish, "gelu": F.gelu}
GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hard_sigmoid": F.hardsigmoid}
LAYERS = {"relu": nn.ReLU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid, "hard_sigmoid": nn.Hardsigmoid}


@dataclass(frozen=True)
class Peer:
    """A block of another package: make(package, c, params) -> module whose parameters come in the order of Block.shapes, then its BatchNorm's.

    only: the params that it needs to have, where it knows one variant.
    """

    make: Callable[[Any, int, Params], nn.Module]
    only: Params = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """shapes(c, rd, params): parameter name -> shape. eager(x, weights, params): the block alone, in plain torch.

    fused(x, weights, params, **epilogue): the same through tritattn. peers: provider -> its block of the same computation.
    bar: U forward and backward with one read of the map for each global dependency.
    """

    shapes: Callable[[int, Params], dict[str, tuple[int, ...]]]
    eager: Callable[[Tensor, Weights, Params], Tensor]
    fused: Callable[..., Tensor]
    defaults: Params
    bar: tuple[int, int]
    peers: dict[str, Peer] = field(default_factory=dict)


def _mlp_shapes(c: int, p: Params) -> dict[str, tuple[int, ...]]:
    return {"w1": (p["rd"], c, 1, 1), "b1": (p["rd"],), "w2": (c, p["rd"], 1, 1), "b2": (c,)}


def _mlp(z: Tensor, w: Weights, p: Params) -> Tensor:
    return F.conv2d(HIDDEN[p["hidden"]](F.conv2d(z, w["w1"], w["b1"])), w["w2"], w["b2"])


def _se(x: Tensor, w: Weights, p: Params) -> Tensor:
    return x * GATES[p["gate"]](_mlp(x.mean((2, 3), keepdim=True), w, p))


def _ese(x: Tensor, w: Weights, p: Params) -> Tensor:
    return x * GATES[p["gate"]](F.conv2d(x.mean((2, 3), keepdim=True), w["w"], w["b"]))


def _eca(x: Tensor, w: Weights, p: Params) -> Tensor:
    z = F.conv1d(x.mean((2, 3)).unsqueeze(1), w["w"], padding=p["k"] // 2)
    return x * torch.sigmoid(z).view(x.shape[0], -1, 1, 1).expand_as(x)


def _cse(x: Tensor, w: Weights, p: Params) -> Tensor:
    return x * torch.sigmoid(_mlp(F.adaptive_avg_pool2d(x, 1), w, p)).expand_as(x)


def _sse(x: Tensor, w: Weights, p: Params) -> Tensor:
    return x * torch.sigmoid(F.conv2d(x, w["w"], w["b"]))


def _scse(x: Tensor, w: Weights, p: Params) -> Tensor:
    if p["combine"] == "max":
        return torch.maximum(_cse(x, w, p), _sse(x, w, p))
    return _cse(x, w, p) + _sse(x, w, p)


def _channel_attention(x: Tensor, w: Weights, p: Params) -> Tensor:
    return x * torch.sigmoid(_mlp(F.adaptive_avg_pool2d(x, 1), w, p) + _mlp(F.adaptive_max_pool2d(x, 1), w, p))


def _spatial_attention(x: Tensor, w: Weights, p: Params) -> Tensor:
    stats = torch.cat([torch.mean(x, dim=1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]], dim=1)
    logits = F.conv2d(stats, w["weight"], padding=p["k"] // 2)
    if w["norm"] is not None:
        logits = w["norm"](logits)
    return x * torch.sigmoid(logits)


def _cbam(x: Tensor, w: Weights, p: Params) -> Tensor:
    return _spatial_attention(_channel_attention(x, w, p), w, p)


def _pixel_shapes(c: int, p: Params) -> dict[str, tuple[int, ...]]:
    return {"w": (1, c, 1, 1), "b": (1,)}


def _spatial_shapes(c: int, p: Params) -> dict[str, tuple[int, ...]]:
    return {"weight": (1, 2, p["k"], p["k"])}


def _fused(name: str, *options: str) -> Callable[..., Tensor]:
    """tritattn's op of that name; `options` are the params that it takes."""

    def call(x: Tensor, w: Weights, p: Params, **epilogue: Any) -> Tensor:
        from tritattn import ops

        return getattr(ops, name)(x, **w, **{option: p[option] for option in options}, **epilogue)

    return call


def _timm_se(timm: Any, c: int, p: Params) -> nn.Module:
    return timm.layers.SEModule(c, rd_channels=p["rd"], act_layer=LAYERS[p["hidden"]], gate_layer=p["gate"])


def _torchvision_se(torchvision: Any, c: int, p: Params) -> nn.Module:
    block = torchvision.ops.SqueezeExcitation
    return block(c, p["rd"], activation=LAYERS[p["hidden"]], scale_activation=LAYERS[p["gate"]])


def _timm_ese(timm: Any, c: int, p: Params) -> nn.Module:
    return timm.layers.EffectiveSEModule(c)


def _timm_eca(timm: Any, c: int, p: Params) -> nn.Module:
    return timm.layers.EcaModule(kernel_size=p["k"])


def _timm_cbam(timm: Any, c: int, p: Params) -> nn.Module:
    block = timm.layers.get_attn("cbam")(c, rd_channels=p["rd"], mlp_bias=True)
    block.spatial.conv.bn.eps, block.spatial.conv.bn.momentum = NORM
    return block


NORM = (1e-5, 0.01)  # eps and momentum of the BatchNorm in the authors' CBAM
_PEERS = {"timm": Peer(_timm_se), "torchvision": Peer(_torchvision_se)}
BLOCKS = {
    "se": Block(_mlp_shapes, _se, _fused("se", "hidden", "gate"), {"rd": 0, "hidden": "relu", "gate": "sigmoid"}, (3, 4), _PEERS),
    "ese": Block(
        lambda c, p: {"w": (c, c, 1, 1), "b": (c,)}, _ese, _fused("ese", "gate"), {"gate": "hard_sigmoid"}, (3, 4), {"timm": Peer(_timm_ese)}
    ),
    "eca": Block(lambda c, p: {"w": (1, 1, p["k"])}, _eca, _fused("eca"), {"k": 0}, (3, 4), {"timm": Peer(_timm_eca)}),
    "cse": Block(_mlp_shapes, _cse, _fused("cse", "hidden"), {"rd": 0, "hidden": "relu"}, (3, 4)),
    "sse": Block(_pixel_shapes, _sse, _fused("sse"), {}, (2, 3)),
    "scse": Block(
        lambda c, p: {**_mlp_shapes(c, p), **_pixel_shapes(c, p)},
        _scse,
        _fused("scse", "hidden", "combine"),
        {"rd": 0, "hidden": "relu", "combine": "sum"},
        (3, 4),
    ),
    "channel_attention": Block(_mlp_shapes, _channel_attention, _fused("channel_attention", "hidden"), {"rd": 0, "hidden": "relu"}, (3, 4)),
    "spatial_attention": Block(_spatial_shapes, _spatial_attention, _fused("spatial_attention"), {"k": 7, "norm": "none"}, (3, 4)),
    "cbam": Block(
        lambda c, p: {**_mlp_shapes(c, p), **_spatial_shapes(c, p)},
        _cbam,
        _fused("cbam", "hidden"),
        {"rd": 0, "hidden": "relu", "k": 7, "norm": "none"},
        (4, 5),
        {"timm": Peer(_timm_cbam, {"norm": "batch"})},
    ),
}
BLOCKS["scse_max"] = replace(BLOCKS["scse"], defaults={**BLOCKS["scse"].defaults, "combine": "max"}, bar=(3, 5))

# What a run without --ops measures, the most important first.
OPS = (
    *("se+residual+relu", "cbam+residual+relu", "se", "cbam", "scse", "eca", "sse", "scse_max", "scse+residual+relu", "ese", "cse"),
    *("se+relu", "se+residual", "eca+residual+relu", "sse+residual+relu", "channel_attention", "spatial_attention"),
)


@dataclass(frozen=True)
class Op:
    name: str
    block: Block
    block_name: str
    residual: bool
    activation: str

    @property
    def bar_u(self) -> tuple[int, int]:
        """One read of the map for each global dependency: with a ReLU, its mask needs the map or its sum with the residual once more."""
        forward, backward = self.block.bar
        if self.activation != "none":
            backward += 2 if self.residual else (0 if self.block_name in ("sse", "scse_max") else 1)
        return forward + self.residual, backward

    @property
    def floor_u(self) -> tuple[int, int]:
        """The map kept on chip between reduction and gate: x and y; then g, x and dx, and with residual and activation its mask and gradient."""
        return 2 + self.residual, 3 + 2 * (self.residual and self.activation != "none")

    def tail(self, gated: Tensor, residual: Tensor | None) -> Tensor:
        """What follows the block, as networks write it: in place."""
        if residual is not None:
            gated += residual
        if self.activation == "relu":
            return F.relu(gated, inplace=True)
        return TAILS[self.activation](gated)


def op(name: str) -> Op:
    """The op of that name: a block, then "+residual" and "+<activation>" in this order, each or none."""
    block, *epilogue = name.split("+")
    residual = epilogue[:1] == ["residual"]
    activation = epilogue[residual:] or ["none"]
    if block not in BLOCKS or len(activation) > 1 or activation[0] not in TAILS:
        raise ValueError(f"no op {name!r}; blocks: {', '.join(BLOCKS)}; after one: [+residual][+relu|+silu|+hardswish|+gelu]")
    return Op(name, BLOCKS[block], block, residual, activation[0])
