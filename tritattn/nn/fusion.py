"""Attentional feature fusion: of two maps, once or twice, and the module that weighs one map by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..ops import _checks
from ._base import Block, given, one_of, pointwise, positive, reduced


class ContextBottleneck(nn.Module):
    """t [N, C, H, W] -> bn2(fc2(relu(bn1(fc1(t)))))"""

    def __init__(self, channels: int, width: int, like: Mapping[str, Any]) -> None:
        super().__init__()
        self.fc1 = pointwise(channels, width, True, like)
        self.bn1 = nn.BatchNorm2d(width, **like)
        self.fc2 = pointwise(width, channels, True, like)
        self.bn2 = nn.BatchNorm2d(channels, **like)

    def forward(self, t: Tensor) -> Tensor:
        return self.bn2(self.fc2(reference.HIDDEN["relu"](self.bn1(self.fc1(t)))))


class _Contexts(Block):
    """The contexts of a map and of its means, which are called as modules: `fused` is all there is."""

    layers: ClassVar[tuple[str, ...]] = ("local", "pooled")
    called: ClassVar[frozenset[str]] = frozenset(layers)

    def __init__(
        self, channels: int, rd_ratio: float, rd_channels: int | None, gate: str, residual: bool, activation: str, device: Any, dtype: Any
    ) -> None:
        super().__init__(residual, activation)
        width = reduced(positive("channels", channels), rd_ratio, rd_channels, None)
        self.gate = one_of("gate", gate, reference.GATES)
        for name in type(self).layers:
            setattr(self, name, ContextBottleneck(channels, width, {"device": device, "dtype": dtype}))

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        rd_channels, channels = layers["local.fc1"].weight.shape[:2]
        return {"channels": channels, "rd_channels": rd_channels}

    def settings(self) -> dict[str, Any]:
        return {"gate": self.gate, "activation": self.activation}


class MSCAM(_Contexts):
    """Multi-scale channel attention module: a weight for every element, from its own context and that of its channel.

        y = x * f(local(x) + pooled(z)),    z_c = mean of x_c over all positions

    Shapes: x [N, C, H, W], y as x; in `local` and `pooled` fc1.weight [R, C, 1, 1], bn1 [R], fc2.weight [C, R, 1, 1], bn2 [C]. In training the
    BatchNorms of `pooled` need more than one image.

    Args:
        channels: C.
        rd_ratio, rd_channels: R is `rd_channels`, or channels * rd_ratio rounded down.
        gate: f: sigmoid, hard_sigmoid, relu, none.
        residual, activation: see `Block`.

    Dai et al., Attentional Feature Fusion, https://arxiv.org/abs/2009.14082
    """

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 4,
        rd_channels: int | None = None,
        gate: str = "sigmoid",
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels, rd_ratio, rd_channels, gate, residual, activation, device, dtype)

    @staticmethod
    def fused(x: Tensor, local: Any, pooled: Any, **settings: Any) -> Tensor:
        return ops.mscam(x, local, pooled, **settings)


def _second(x: Tensor, residual: Any) -> Tensor:
    """The second map, checked under the name that it has in `forward`."""
    given("residual", residual)
    if not isinstance(x, torch.fx.Proxy):
        _checks.feature_map(x)
        _checks.alike("residual", residual, x)
    return residual


class AFF(_Contexts):
    """Attentional feature fusion of two maps: in a residual block in place of the sum of its output and its shortcut.

        y = factor * (x * w + residual * (1 - w)),    w = f(local(x + residual) + pooled(z)),    z_c = mean of (x + residual)_c over all positions

    Shapes: x and residual [N, C, H, W], y as x; parameters as in `MSCAM`.

    Args:
        factor: 2 as in the authors' code, or 1 as in the paper.
        activation: applied last: none, relu, silu, hardswish, gelu.
        channels, rd_ratio, rd_channels, gate: as in `MSCAM`.

    Dai et al., Attentional Feature Fusion, https://arxiv.org/abs/2009.14082
    """

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 4,
        rd_channels: int | None = None,
        factor: int = 2,
        gate: str = "sigmoid",
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels, rd_ratio, rd_channels, gate, False, activation, device, dtype)
        if factor not in (1, 2):
            raise ValueError(f"factor: got {factor!r}, expected 1 or 2")
        self.factor = factor

    def settings(self) -> dict[str, Any]:
        return {"factor": self.factor, **super().settings()}

    @staticmethod
    def fused(x: Tensor, local: Any, pooled: Any, residual: Any, **settings: Any) -> Tensor:
        return ops.aff(x, _second(x, residual), local, pooled, **settings)


class IAFF(_Contexts):
    """Iterative attentional feature fusion: the weights of the two maps come from the result of a first fusion of them.

        u = x * w + residual * (1 - w),      w as in `AFF`
        y = x * w2 + residual * (1 - w2),    w2 = f(local2(u) + pooled2(z)),    z_c = mean of u_c over all positions

    Shapes: x and residual [N, C, H, W], y as x; parameters as in `MSCAM`, those of `local2` and `pooled2` too.

    Args:
        reuse_pooled: True to call `pooled` in both rounds and `pooled2` never, as the authors' PyTorch code does, whose checkpoints were trained so;
            their MXNet code and the paper have a context of its own for each round.
        activation: applied last: none, relu, silu, hardswish, gelu.
        channels, rd_ratio, rd_channels, gate: as in `MSCAM`.

    Dai et al., Attentional Feature Fusion, https://arxiv.org/abs/2009.14082
    """

    layers = ("local", "pooled", "local2", "pooled2")
    called: ClassVar[frozenset[str]] = frozenset(layers)

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 4,
        rd_channels: int | None = None,
        reuse_pooled: bool = False,
        gate: str = "sigmoid",
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels, rd_ratio, rd_channels, gate, False, activation, device, dtype)
        self.reuse_pooled = reuse_pooled

    def settings(self) -> dict[str, Any]:
        return {"reuse_pooled": self.reuse_pooled, **super().settings()}

    @staticmethod
    def fused(x: Tensor, local: Any, pooled: Any, local2: Any, pooled2: Any, residual: Any, reuse_pooled: bool, **settings: Any) -> Tensor:
        return ops.iaff(x, _second(x, residual), local, pooled, local2, pooled if reuse_pooled else pooled2, **settings)
