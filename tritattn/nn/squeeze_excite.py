"""Squeeze-and-excitation and its one-layer form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .. import ops, reference
from ._base import ChannelGate, bottleneck, bottleneck_options, one_of, pointwise, positive, reduced, weights


class SqueezeExcite(ChannelGate):
    """Squeeze-and-excitation: a gate per channel from the channel means, through a bottleneck.

        y = x * f(W2 h(norm(W1 z + b1)) + b2),    z_c = mean of x_c over all positions

    Shapes: x [N, C, *spatial] with one to three spatial dimensions, y as x; fc1.weight [R, C, 1, 1], fc2.weight [C, R, 1, 1].

    Args:
        channels: C.
        rd_ratio, rd_channels, rd_divisor: R is `rd_channels`, or channels * rd_ratio rounded to a multiple of `rd_divisor`; with
            `rd_divisor=None` rounded down, as in the authors' networks (C // 16).
        pool: "avg", or "avg_max" for the half sum of mean and maximum.
        bias: of both layers.
        norm: whether a BatchNorm2d(R) follows the first layer, as timm's norm_layer; usually there is none.
        act: h, between the layers: none, relu, relu6, leaky_relu, silu, hardswish, gelu.
        gate: f: sigmoid, hard_sigmoid, relu, none.
        max_grad: gradient of the maximum: "first" (to one index, as max pooling) or "even" (shared among ties, as amax).
        residual, activation: see `Block`; what may come before: see `ChannelGate`.

    Hu et al., Squeeze-and-Excitation Networks, https://arxiv.org/abs/1709.01507
    """

    layers = ("fc1", "fc2", "bn")
    bn: nn.BatchNorm2d | None

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int | None = 8,
        pool: str = "avg",
        bias: bool = True,
        norm: bool = False,
        act: str = "relu",
        gate: str = "sigmoid",
        max_grad: str = "first",
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        like = {"device": device, "dtype": dtype}
        width = reduced(positive("channels", channels), rd_ratio, rd_channels, rd_divisor)
        self.pool = one_of("pool", pool, ("avg", "avg_max"))
        self.act = one_of("act", act, reference.HIDDEN)
        self.gate = one_of("gate", gate, reference.GATES)
        self.max_grad = one_of("max_grad", max_grad, ("first", "even"))
        self.fc1 = pointwise(channels, width, bias, like)
        self.fc2 = pointwise(width, channels, bias, like)
        self.bn = nn.BatchNorm2d(width, device=device, dtype=dtype) if norm else None

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        return {**bottleneck_options(layers["fc1"], layers["fc2"]), "norm": layers.get("bn") is not None}

    def settings(self) -> dict[str, Any]:
        return {
            "pool": self.pool,
            "hidden": self.act,
            "gate": self.gate,
            "max_grad": self.max_grad,
            "activation": self.activation,
        }

    @staticmethod
    def fused(x: Tensor, fc1: Any, fc2: Any, bn: Any, **settings: Any) -> Tensor:
        return ops.se(x, *weights(fc1), *weights(fc2), norm=bn, **settings)

    def gate_weights(self, x: Tensor) -> Tensor:
        z = ops.channel_statistics(x, (self.pool,), max_grad=self.max_grad)
        return reference.GATES[self.gate](bottleneck(z, x, self.fc1, self.fc2, self.act, self.bn))


class EffectiveSqueezeExcite(ChannelGate):
    """Effective squeeze-and-excitation: one layer of full width instead of the bottleneck.

        y = x * f(W z + b),    z_c = mean of x_c over all positions

    Shapes: x [N, C, *spatial] with one to three spatial dimensions, y as x; fc.weight [C, C, 1, 1].

    Args:
        channels: C.
        bias: of the layer.
        gate: f: hard_sigmoid (default), sigmoid, relu, none.
        residual, activation: see `Block`; what may come before: see `ChannelGate`.

    Lee & Park, CenterMask, https://arxiv.org/abs/1911.06667
    """

    layers = ("fc",)

    def __init__(
        self,
        channels: int,
        bias: bool = True,
        gate: str = "hard_sigmoid",
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        self.gate = one_of("gate", gate, reference.GATES)
        self.fc = pointwise(positive("channels", channels), channels, bias, {"device": device, "dtype": dtype})

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        fc = layers["fc"]
        return {"channels": fc.weight.shape[0], "bias": fc.bias is not None}

    def settings(self) -> dict[str, Any]:
        return {"gate": self.gate, "activation": self.activation}

    @staticmethod
    def fused(x: Tensor, fc: Any, **settings: Any) -> Tensor:
        return ops.ese(x, *weights(fc), **settings)

    def gate_weights(self, x: Tensor) -> Tensor:
        return reference.GATES[self.gate](bottleneck(ops.channel_statistics(x, ("avg",)), x, None, self.fc, "none"))
