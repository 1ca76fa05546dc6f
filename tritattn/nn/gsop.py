"""Global second-order pooling: the attention block and the head of the network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops, reference
from ._base import Block, one_of, pointwise, positive

MODES = ("channel", "position", "average", "max", "concat")
SIDE = 8  # of the grid of positions whose covariances the position branch takes

CHANNEL = ("conv", "bn", "row_bn", "row_conv", "fc")
POSITION = tuple(f"position_{name}" for name in CHANNEL)
CONCAT = ("concat_channel", "concat_position", "concat_bn")


def position_gate(x: Tensor, rectified: Tensor, conv: Any, bn: Any, row_bn: Any, row_conv: Any, fc: Any) -> Tensor:
    """[N, 1, H, W]: the gate of an 8 x 8 grid, resized by averaging."""
    z = F.adaptive_avg_pool2d(bn(conv(rectified)), SIDE).flatten(2)  # [N, D, 64]
    total = z.sum(1)
    m = SIDE * SIDE
    # as in the authors' code, which divides by the number of positions where a covariance over channels would by that of channels
    covariance = z.transpose(1, 2) @ z / m - total[:, :, None] * total[:, None, :] / m**2
    logits = fc(F.relu(row_conv(row_bn(covariance[..., None]))))
    return F.adaptive_avg_pool2d(logits.sigmoid().view(-1, 1, SIDE, SIDE), (x.shape[2], x.shape[3]))


class GSoP(Block):
    """Global second-order pooling: a gate per channel from the covariances of the channels, a gate per position from those of the positions.

        channel:  y = x * s,  s = sigmoid(fc(row_conv(row_bn(cov(relu(bn(conv(relu(x)))))))))
        position: y = relu(x * m),  m the same of the covariances of an 8 x 8 grid of positions, resized to the map
        average:  y = x * s + relu(x * m);  max: their element-wise maximum
        concat:   y = concat_bn(concat_channel(x * s) + concat_position(relu(x * m)))

    Shapes: x [N, C, H, W], y as x; conv.weight [D, C, 1, 1], row_conv.weight [4 D, 1, D, 1], fc.weight [C, 4 D, 1, 1]; position_conv.weight
    [D, C, 1, 1], position_row_conv.weight [256, 1, 64, 1], position_fc.weight [64, 256, 1, 1]; of the grouped convolutions [C, 64, k, 1].

    Args:
        channels: C.
        dim: D.
        mode: channel (default), position, or how both are joined: average, max, concat (for C a multiple of 64).
        stride: of the channel branch's convolution; None for the authors' rule: 2 up to 256 channels, else 1.
        residual, activation: see `Block`.

    In the mode "channel" the map is read and written 3 times forward and 5 times backward in half precisions, and otherwise, with the convolution by
    torch, 5 and 8 times; more often in the other modes. The authors' code multiplies each map by a matrix of positions x positions to centre it, and
    its position branch divides by the number of positions where its covariances are sums over channels; the latter is kept, since weights are trained
    with it.

    Gao et al., Global Second-order Pooling Convolutional Networks, https://arxiv.org/abs/1811.12006
    """

    layers = (*CHANNEL, *POSITION, *CONCAT)
    called = frozenset(layers)

    def __init__(
        self,
        channels: int,
        dim: int = 128,
        mode: str = "channel",
        stride: int | None = None,
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        c, d, m = positive("channels", channels), positive("dim", dim), SIDE * SIDE
        self.mode = one_of("mode", mode, MODES)
        stride = (2 if c <= 256 else 1) if stride is None else positive("stride", stride)
        for name in self.layers:
            setattr(self, name, None)
        if mode != "position":
            self.conv = nn.Conv2d(c, d, 1, stride, **like)
            self.bn = nn.BatchNorm2d(d, **like)
            self.row_bn = nn.BatchNorm2d(d, **like)
            self.row_conv = nn.Conv2d(d, 4 * d, (d, 1), groups=d, **like)
            self.fc = pointwise(4 * d, c, True, like)
        if mode != "channel":
            self.position_conv = pointwise(c, d, True, like)
            self.position_bn = nn.BatchNorm2d(d, **like)
            self.position_row_bn = nn.BatchNorm2d(m, **like)
            self.position_row_conv = nn.Conv2d(m, 4 * m, (m, 1), groups=m, **like)
            self.position_fc = pointwise(4 * m, m, True, like)
        if mode == "concat":
            if c % 64:
                raise ValueError(f"channels: got {c}, expected a multiple of 64 for mode='concat'")
            groups = c // 64
            factor = int(math.log2(32 / groups))
            for name in CONCAT[:2]:
                setattr(self, name, nn.Conv2d(c, c, (2 * factor + 5, 1), padding=(factor + 2, 0), groups=groups, **like))
            self.concat_bn = nn.BatchNorm2d(c, **like)

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        first = layers.get("conv", layers.get("position_conv"))
        return {"channels": first.weight.shape[1], "dim": first.weight.shape[0], "stride": first.stride[0]}

    def initialise(self) -> None:
        """He's normal weights for the convolutions, by their outputs."""
        for layer in self.children():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def settings(self) -> dict[str, Any]:
        return {"mode": self.mode, "activation": self.activation}

    @staticmethod
    def fused(x: Tensor, *layers: Any, mode: str, residual: Tensor | None, activation: str) -> Tensor:
        channel, position = layers[: len(CHANNEL)], layers[len(CHANNEL) : -len(CONCAT)]
        conv, bn, row_bn, row_conv, fc = channel
        if mode == "channel":
            return ops.gsop(x, (conv, bn), (row_bn, row_conv, fc), residual=residual, activation=activation)
        rectified = F.relu(x)
        by_position = ops.gate(x, position_gate(x, rectified, *position), activation="relu")
        if mode == "position":
            gated = by_position
        else:
            covariance = ops.covariance(bn(conv(rectified)), before="relu").unsqueeze(-1)
            logits = fc(row_conv(row_bn(covariance.to(row_conv.weight.dtype))))
            if mode == "average" and residual is None:
                return ops.gate(x, logits, gate="sigmoid", residual=by_position, activation=activation)
            by_channel = ops.gate(x, logits, gate="sigmoid")
            if mode == "average":
                gated = by_channel + by_position
            elif mode == "max":
                gated = torch.maximum(by_channel, by_position)
            else:
                concat_channel, concat_position, concat_bn = layers[-len(CONCAT) :]
                gated = concat_bn(concat_channel(by_channel) + concat_position(by_position))
        return reference.ACTIVATIONS[activation](gated if residual is None else gated + residual)


class ISqrtCovPooling(nn.Module):
    """Covariance pooling with a fast matrix square root, the head of GSoP-Net2 and of iSQRT-COV networks.

        y = tril(S),  S about cov(u)^(1/2) after `iterations` steps of Newton and Schulz,  u = relu(bn(conv(x)))

    Shapes: x [N, C, H, W], y [N, D (D + 1) / 2]: the lower triangle row by row, as the authors' classifiers take it; layer_reduce.weight
    [D, C, 1, 1] and layer_reduce_bn are called as in the authors' networks.

    Args:
        channels: C.
        dim: D, or None to take the covariances of x itself, without convolution.
        iterations: at least one.

    The covariance is divided by its trace before the iteration, and the root multiplied by the trace's root after it. The gradient is that of the
    iteration, by autograd, as in the authors' hand-written formula; their code returns another matrix for a single iteration.

    Li et al., Towards Faster Training of Global Covariance Pooling Networks by Iterative Matrix Square Root Normalization,
    https://arxiv.org/abs/1712.01034
    """

    def __init__(self, channels: int, dim: int | None = 256, iterations: int = 3, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        positive("channels", channels)
        self.iterations = positive("iterations", iterations)
        self.layer_reduce = None if dim is None else pointwise(channels, positive("dim", dim), False, like)
        self.layer_reduce_bn = None if dim is None else nn.BatchNorm2d(dim, **like)

    def forward(self, x: Tensor) -> Tensor:
        if self.layer_reduce is not None and self.layer_reduce_bn is not None:
            covariance = ops.covariance(self.layer_reduce_bn(self.layer_reduce(x)), before="relu")
        else:
            covariance = ops.covariance(x)
        d = covariance.shape[-1]
        with torch.autocast(x.device.type, enabled=False):  # half precisions are too short for the iteration
            root = square_root(covariance, self.iterations)
        rows, columns = torch.tril_indices(d, d, device=x.device)
        return root[:, rows, columns].to(x.dtype)

    def extra_repr(self) -> str:
        return f"iterations={self.iterations}"


def square_root(a: Tensor, iterations: int) -> Tensor:
    """About a^(1/2) for positive semi-definite a [N, D, D]: Y <- Y (3 - Z Y) / 2, Z <- (3 - Z Y) Z / 2 from Y = a / trace(a), Z = 1."""
    trace = a.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
    three = 3 * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    y = a / trace
    step = 0.5 * (three - y)
    y, z = y @ step, step
    for _ in range(iterations - 1):
        step = 0.5 * (three - z @ y)
        y, z = y @ step, step @ z
    return y * trace.sqrt()
