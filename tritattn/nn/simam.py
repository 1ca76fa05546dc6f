"""SimAM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import ops, reference
from ._base import Block, one_of


class SimAM(Block):
    """SimAM, a gate per element from how far it is from the mean of its plane; no parameters.

        y = x * f(d / (4 (v + e_lambda)) + 1/2),    d = (x - mean)^2,  v = sum d / (M - 1)

    with mean and sum over the M positions of each plane.

    Shapes: x [N, C, *spatial] with one to three spatial dimensions, y as x. A plane of a single position gives NaN, as in the authors' code.

    Args:
        channels: C; unused, first in every block's arguments so that all are built alike.
        e_lambda: what keeps the quotient finite; the authors'.
        gate: f: sigmoid, hard_sigmoid, relu, none.
        residual, activation: see `Block`.
        device, dtype: unused, for there is nothing to place.

    Yang et al., SimAM, ICML 2021, https://proceedings.mlr.press/v139/yang21o.html
    """

    layers = ()

    def __init__(
        self,
        channels: int | None = None,
        e_lambda: float = 1e-4,
        gate: str = "sigmoid",
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        if not e_lambda > 0:
            raise ValueError(f"e_lambda: got {e_lambda}, expected a positive number")
        self.e_lambda = e_lambda
        self.gate = one_of("gate", gate, reference.GATES)

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def settings(self) -> dict[str, Any]:
        return {"e_lambda": self.e_lambda, "gate": self.gate, "activation": self.activation}

    @staticmethod
    def fused(x: Tensor, **settings: Any) -> Tensor:
        return ops.simam(x, **settings)
