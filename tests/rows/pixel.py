"""sSE and scSE."""

from __future__ import annotations

from typing import Any

import torch
from eager_blocks import channel_gate, pixel_gate
from torch import Tensor

from tritattn import ops

from .op import Op, Params, join, mlp


def _sse(name: str, bias: bool, main: bool = False, **options: Any) -> Op:
    return Op(
        name,
        lambda s: {"w": (1, s[1], 1, 1), "b": (1,) if bias else None},
        lambda x, p, **epilogue: ops.sse(x, p["w"], p["b"], **options, **epilogue),
        lambda x, p: x * pixel_gate(x, p, **options),
        ("w",),
        ("pixel_gate",),
        main=main,
    )


def _scse(name: str, bias: bool, combine: str, hidden: str = "relu", gate: str = "sigmoid", main: bool = True) -> Op:
    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        return ops.scse(x, *(p[n] for n in ("w1", "b1", "w2", "b2", "w", "b")), combine=combine, hidden=hidden, gate=gate, **epilogue)

    def eager(x: Tensor, p: Params) -> Tensor:
        channel, pixel = x * channel_gate(x, p, hidden=hidden, gate=gate), x * pixel_gate(x, p, gate)
        return channel + pixel if combine == "sum" else torch.max(channel, pixel)

    shapes = join(mlp(bias, conv=True), lambda s: {"w": (1, s[1], 1, 1), "b": (1,) if bias else None})
    return Op(name, shapes, call, eager, ("w1", "w"), ("concurrent_gate",), main=main)


OPS = [
    _sse("sse", True, main=True),
    _sse("sse-hard", False, gate="hard_sigmoid"),
    _scse("scse", True, "sum"),
    _scse("scse-max", False, "max", "none"),
    _scse("scse-hard", False, "sum", gate="hard_sigmoid", main=False),
]  # fmt: skip
