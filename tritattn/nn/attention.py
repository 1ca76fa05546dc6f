"""The general form of all blocks: weights from any module, applied to the map in one pass."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn

from .. import ops, reference
from ._base import not_scriptable, one_of


class Attention(nn.Module):
    """Weights that any module computes from the map, applied to it in one fused pass.

        y = activation(x * f(layer(x)) + residual)

    Shapes: x [N, C, *spatial], layer(x) broadcastable to x, y as x.

    Args:
        layer: the module that computes the weights.
        gate: f: none (default: the layer ends in its own gate), sigmoid, hard_sigmoid, relu.
        residual: True to add x itself where `forward` gets no residual.
        activation: applied last: none, relu, silu, hardswish, gelu.
    """

    def __init__(self, layer: nn.Module, gate: str = "none", residual: bool = False, activation: str = "none") -> None:
        super().__init__()
        if not isinstance(layer, nn.Module):
            raise ValueError(f"layer: got {type(layer).__name__}, expected a module")
        self.layer = layer
        self.gate = one_of("gate", gate, reference.GATES)
        self.residual = residual
        self.activation = one_of("activation", activation, reference.ACTIVATIONS)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None and self.residual:
            residual = x
        return ops.gate(x, self.layer(x), gate=self.gate, residual=residual, activation=self.activation)

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {"gate": self.gate, "residual": self.residual, "activation": self.activation}
        return ", ".join(f"{name}={value}" for name, value in shown.items() if value not in ("none", False))

    def __prepare_scriptable__(self) -> NoReturn:
        not_scriptable(self)
