"""The bottleneck attention module and its two branches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from .. import ops, reference
from ._base import Block, one_of, over_channels, pointwise, positive, reduced

NORMS = ("hidden", "last")


def _perceptron(channels: int, width: int, num_layers: int, norm: str, like: Mapping[str, Any]) -> nn.Sequential:
    """[N, C] -> [N, C] through `num_layers` hidden layers."""
    layers: list[nn.Module] = []
    for inputs in (channels, *(width,) * (num_layers - 1)):
        layers.append(nn.Linear(inputs, width, **like))
        if norm == "hidden":
            layers.append(nn.BatchNorm1d(width, **like))
        layers.append(nn.ReLU())
    layers.append(nn.Linear(width, channels, **like))
    return nn.Sequential(*layers, *([nn.BatchNorm1d(channels, **like)] if norm == "last" else []))


def _convolutions(
    channels: int, width: int, dilated_convs: int, dilation: int, padding: int, norm: str, like: Mapping[str, Any]
) -> nn.Sequential:
    """[N, C, H, W] -> [N, 1, H, W]."""
    layers: list[nn.Module] = []
    dilated = (nn.Conv2d(width, width, 3, padding=padding, dilation=dilation, **like) for _ in range(dilated_convs))
    for layer in (pointwise(channels, width, True, like), *dilated):
        layers.append(layer)
        if norm == "hidden":
            layers.append(nn.BatchNorm2d(width, **like))
        layers.append(nn.ReLU())
    layers.append(pointwise(width, 1, True, like))
    return nn.Sequential(*layers, *([nn.BatchNorm2d(1, **like)] if norm == "last" else []))


def _initialise(layers: nn.Sequential) -> None:
    """He's normal weights for the convolutions, and biases of zero."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def _found(layers: nn.Module, kind: Any) -> list[Any]:
    return [layer for layer in layers.modules() if isinstance(layer, kind)]


def _norm_of(layers: nn.Module) -> str:
    norms = _found(layers, nn.modules.batchnorm._BatchNorm)
    return "last" if len(norms) == 1 and list(layers.modules())[-1] is norms[0] else "hidden"


def _refuse(residual: Tensor | None) -> None:
    if residual is not None:
        raise ValueError("residual: got a tensor, expected None: these are logits, not a gated map")


class BAMChannelGate(Block):
    """The channel branch of BAM: logits per channel from the means.

        c = mlp(z),    z_c = mean of x_c over all positions

    Shapes: x [N, C, H, W], c [N, C, H, W], a view of [N, C]; mlp.0.weight [R, C], the last layer's [C, R].

    Args:
        channels: C.
        rd_ratio, rd_channels, rd_divisor: R is `rd_channels`, or channels * rd_ratio rounded to a multiple of `rd_divisor`; with
            `rd_divisor=None` rounded down.
        num_layers: hidden layers.
        norm: where a BatchNorm follows: "hidden", each hidden layer (the authors' code), or "last", the last one alone (their paper).

    Means are over all positions; the authors' code pools H x H windows. See `BAM`.
    """

    layers = ("mlp",)
    called = frozenset(layers)
    apply_gate = False

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int | None = None,
        num_layers: int = 1,
        norm: str = "hidden",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        width = reduced(positive("channels", channels), rd_ratio, rd_channels, rd_divisor)
        like = {"device": device, "dtype": dtype}
        self.mlp = _perceptron(channels, width, positive("num_layers", num_layers), one_of("norm", norm, NORMS), like)

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        mlp = layers["mlp"]
        first, *hidden = _found(mlp, nn.Linear)
        return {"channels": first.in_features, "rd_channels": first.out_features, "num_layers": len(hidden), "norm": _norm_of(mlp)}

    def initialise(self) -> None:
        _initialise(self.mlp)

    @staticmethod
    def fused(x: Tensor, mlp: Any, *, residual: Tensor | None = None, activation: str = "none") -> Tensor:
        _refuse(residual)
        z = ops.channel_statistics(x, ("avg",))[:, 0]
        return over_channels(mlp(z.to(next(mlp.parameters()).dtype)).to(x.dtype), x).expand_as(x)


class BAMSpatialGate(Block):
    """The spatial branch of BAM: logits per position from dilated convolutions, which are torch's.

        s = convs(x)

    Shapes: x [N, C, H, W], s [N, C, H, W], a view of [N, 1, H, W]; convs.0.weight [R, C, 1, 1], then 3x3 ones [R, R, 3, 3], the last [1, R, 1, 1].

    Args:
        channels, rd_ratio, rd_channels, rd_divisor, norm: as in `BAMChannelGate`.
        dilated_convs: how many 3x3 convolutions.
        dilation, padding: of these; by default a padding that keeps the map's size.

    See `BAM`.
    """

    layers = ("convs",)
    called = frozenset(layers)
    apply_gate = False

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int | None = None,
        dilated_convs: int = 2,
        dilation: int = 4,
        padding: int | None = None,
        norm: str = "hidden",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        width = reduced(positive("channels", channels), rd_ratio, rd_channels, rd_divisor)
        side = positive("dilation", dilation) if padding is None else padding
        like = {"device": device, "dtype": dtype}
        self.convs = _convolutions(
            channels, width, positive("dilated_convs", dilated_convs), dilation, side, one_of("norm", norm, NORMS), like
        )

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        convs = layers["convs"]
        first, *dilated, _ = _found(convs, nn.Conv2d)
        options = {"channels": first.in_channels, "rd_channels": first.out_channels, "dilated_convs": len(dilated), "norm": _norm_of(convs)}
        return {**options, "dilation": dilated[0].dilation[0], "padding": dilated[0].padding[0]}

    def initialise(self) -> None:
        _initialise(self.convs)

    @staticmethod
    def fused(x: Tensor, convs: Any, *, residual: Tensor | None = None, activation: str = "none") -> Tensor:
        _refuse(residual)
        return convs(x).expand_as(x)


class BAM(Block):
    """Bottleneck attention module: a channel branch and a spatial branch side by side, and one gate of both.

        y = x * (1 + f(c * s))   or   y = x * (1 + f(c + s)),    c the logits of `BAMChannelGate`, s those of `BAMSpatialGate`

    Shapes: x [N, C, H, W], y as x; the layers are those of the two branches, in `channel` and `spatial`.

    Args:
        channels: C.
        rd_ratio, rd_channels, rd_divisor, num_layers, norm: see `BAMChannelGate`; the width and the norm are those of both branches.
        dilated_convs, dilation, padding: see `BAMSpatialGate`.
        combine: "product" (the authors' code) or "sum" (their paper, and External-Attention-pytorch).
        gate: f: sigmoid, hard_sigmoid, relu, none.
        residual, activation: see `Block`.

    Right for maps of any size, where the authors' code raises for H > W and averages a part of the map for W > H. External-Attention-pytorch's
    block has three hidden layers, three convolutions of dilation 2 and padding 1, which shrink the map, so that it takes 7x7 maps alone.

    Park et al., BAM, https://arxiv.org/abs/1807.06514
    """

    layers = ("channel.mlp", "spatial.convs")
    called = frozenset(layers)
    halves: ClassVar[Mapping[str, type[Block]]] = {"channel": BAMChannelGate, "spatial": BAMSpatialGate}

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int | None = None,
        num_layers: int = 1,
        dilated_convs: int = 2,
        dilation: int = 4,
        padding: int | None = None,
        norm: str = "hidden",
        combine: str = "product",
        gate: str = "sigmoid",
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        like: dict[str, Any] = {"norm": norm, "device": device, "dtype": dtype}
        self.combine = one_of("combine", combine, ("product", "sum"))
        self.gate = one_of("gate", gate, reference.GATES)
        self.channel = BAMChannelGate(channels, rd_ratio, rd_channels, rd_divisor, num_layers, **like)
        self.spatial = BAMSpatialGate(channels, rd_ratio, rd_channels, rd_divisor, dilated_convs, dilation, padding, **like)

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **BAMSpatialGate.options_of({"convs": layers["spatial.convs"]}),
            **BAMChannelGate.options_of({"mlp": layers["channel.mlp"]}),
        }

    def initialise(self) -> None:
        self.channel.initialise()
        self.spatial.initialise()

    def settings(self) -> dict[str, Any]:
        return {"combine": self.combine, "gate": self.gate, "activation": self.activation}

    @staticmethod
    def fused(x: Tensor, mlp: Any, convs: Any, **settings: Any) -> Tensor:
        return ops.bam(x, mlp, convs, **settings)

    def gate_weights(self, x: Tensor) -> Tensor:
        return reference.joint_factor(self.channel(x), self.spatial(x), self.combine, self.gate)
