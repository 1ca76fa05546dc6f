"""A row of the table of ops under test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Params = dict[str, Any]  # name -> tensor, None, or a module
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """shapes(shape of x) -> what every parameter is: a shape, None (left out), a function that makes a module, or the mode of a BatchNorm2d(1). Those
    whose names begin with x are further maps. call(x, params, **epilogue) goes through tritattn, eager(x, params) is the block alone in plain torch.

    scaled: the parameters that multiply statistics of x. epilogue: whether residual and
    activation exist. raw: whether the result is statistics in fp32 rather than a map. families: the registered ops behind it. main: the row that
    stands for its function where a test cannot afford them all. refused(shape of x): whether a BatchNorm in training has too few values. multiple: of
    which x has a number of channels. wide: x's channels over y's; shapes are then y's.
    """

    name: str
    shapes: Callable[[Shape], dict[str, Any]]
    call: Callable[..., Tensor]
    eager: Callable[[Tensor, Params], Tensor]
    scaled: tuple[str, ...]
    families: tuple[str, ...]
    ranks: tuple[int, ...] = (4,)
    epilogue: bool = True
    raw: bool = False
    main: bool = False
    refused: Callable[[Shape], bool] = lambda shape: False
    multiple: int = 1
    wide: int = 1
    unfit: tuple[str, ...] = ()  # values whose statistics a BatchNorm in training turns into rounding errors

    def __str__(self) -> str:
        return self.name


def mlp(bias: bool = True, conv: bool = False) -> Callable[[Shape], dict[str, Any]]:
    ones = (1, 1) if conv else ()

    def shapes(s: Shape) -> dict[str, Any]:
        c, r = s[1], s[1] // 2 + 1
        return {"w1": (r, c, *ones), "b1": (r,) if bias else None, "w2": (c, r, *ones), "b2": (c,) if bias else None}

    return shapes


def fc(bias: bool = True) -> Callable[[Shape], dict[str, Any]]:
    return lambda s: {"w1": None, "b1": None, "w2": (s[1], s[1]), "b2": (s[1],) if bias else None}


def join(*parts: Callable[[Shape], dict[str, Any]]) -> Callable[[Shape], dict[str, Any]]:
    return lambda s: {name: shape for part in parts for name, shape in part(s).items()}


def statistics(name: str, call: Callable, eager: Callable, family: str, ranks: tuple[int, ...], main: bool = False) -> Op:
    return Op(name, lambda s: {}, lambda x, p: call(x), lambda x, p: eager(x), (), (family,), ranks, epilogue=False, raw=True, main=main)


EVEN = {"max_grad": "even"}
