"""Efficient channel attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops, reference
from ._base import ChannelGate, given, odd, one_of, over_channels, positive, weights


def kernel_size_for(channels: int, gamma: float = 2, beta: float = 1, rule: str = "authors") -> int:
    """Kernel size that grows with the channels: |log2(C) / gamma + beta / gamma|, made odd by rounding up.

    The rule "timm" is that of the authors with a minimum of 3 instead of 1; they differ below 8 channels.
    """
    one_of("rule", rule, ("authors", "timm"))
    t = int(abs(math.log2(channels) + beta) / gamma)
    return max(t if t % 2 else t + 1, 3 if rule == "timm" else 1)


class ECA(ChannelGate):
    """Efficient channel attention: a gate per channel from the means of k neighbouring channels.

        y_c = x_c * f(sum_j w_j z_{c + j - (k - 1) / 2} + b),    z_c = mean of x_c over all positions

    Shapes: x [N, C, *spatial] with one to three spatial dimensions, y as x; conv.weight [1, 1, k]. With `hidden_channels` R, timm's use_mlp, the
    means pass h(w1 z + b1) first: expand.weight [R, 1, 1], conv.weight [1, R, k], both with biases.

    Args:
        channels: C, from which k follows; may be None when `kernel_size` is given.
        kernel_size: k, odd. The authors' published networks set it per stage.
        rule, gamma, beta: of `kernel_size_for`, when k is not given.
        padding: "zeros", or "circular" where the first and the last channel are neighbours.
        bias: whether the convolution has one.
        hidden_channels: R, or None for the paper's single convolution.
        act: h: relu (default), none, relu6, leaky_relu, silu, hardswish, gelu.
        gate: f: sigmoid, hard_sigmoid, relu, none.
        residual, activation: see `Block`; what may come before: see `ChannelGate`.

    Wang et al., ECA-Net, https://arxiv.org/abs/1910.03151
    """

    layers = ("conv", "expand")
    expand: nn.Conv1d | None

    def __init__(
        self,
        channels: int | None = None,
        kernel_size: int | None = None,
        rule: str = "authors",
        gamma: float = 2,
        beta: float = 1,
        padding: str = "zeros",
        bias: bool = False,
        hidden_channels: int | None = None,
        act: str = "relu",
        gate: str = "sigmoid",
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        if kernel_size is None:
            kernel_size = kernel_size_for(positive("channels", given("channels", channels)), gamma, beta, rule)
        self.padding = one_of("padding", padding, ("zeros", "circular"))
        self.gate = one_of("gate", gate, reference.GATES)
        # A circular convolution is padded where it is called: torch's own refuses a pad wider than the input.
        side = odd("kernel_size", kernel_size) // 2 if padding == "zeros" else 0
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.act = one_of("act", act, reference.HIDDEN)
        rows = 1 if hidden_channels is None else positive("hidden_channels", hidden_channels)
        self.expand = None if hidden_channels is None else nn.Conv1d(1, rows, 1, **like)
        self.conv = nn.Conv1d(rows, 1, kernel_size, padding=side, bias=bias or hidden_channels is not None, **like)

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        conv, expand = layers["conv"], layers.get("expand")
        options = {"kernel_size": conv.weight.shape[-1], "bias": conv.bias is not None}
        return options if expand is None else {**options, "hidden_channels": expand.weight.shape[0]}

    def settings(self) -> dict[str, Any]:
        return {"padding": self.padding, "hidden": self.act, "gate": self.gate, "activation": self.activation}

    @staticmethod
    def fused(x: Tensor, conv: Any, expand: Any, **settings: Any) -> Tensor:
        w1, b1 = weights(expand)
        return ops.eca(x, *weights(conv), w1=w1, b1=b1, **settings)

    def gate_weights(self, x: Tensor) -> Tensor:
        z = ops.channel_statistics(x, ("avg",)).to(x.dtype)  # [N, 1, C]
        if self.padding == "circular":
            side = self.conv.kernel_size[0] // 2
            z = F.pad(z, (side, side), mode="circular")
        if self.expand is not None:
            z = reference.HIDDEN[self.act](self.expand(z))
        return reference.GATES[self.gate](over_channels(self.conv(z).transpose(1, 2), x))
