"""Checks of arguments, made before any launch: each error names the argument, what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .._library import KERNEL_DTYPES


def floating(name: str, t: Tensor) -> None:
    """A dense real floating-point tensor."""
    if t.dtype not in KERNEL_DTYPES:
        raise TypeError(f"{name}: got a tensor of {t.dtype}, expected float32, float16, bfloat16 or float64")
    if t.layout is not torch.strided:
        raise TypeError(f"{name}: got a {t.layout} tensor, expected a dense one")


def feature_map(x: Tensor, *, ranks: Collection[int] = (4,), name: str = "x") -> None:
    required(name, x)
    floating(name, x)
    if x.dim() not in ranks:
        expected = {3: "[N, C, L]", 4: "[N, C, H, W]", 5: "[N, C, D, H, W]"}
        raise ValueError(f"{name}: got shape {list(x.shape)}, expected {' or '.join(expected[r] for r in sorted(ranks))}")
    for size in x.shape[1:]:
        if size == 0:
            raise ValueError(f"{name}: got shape {list(x.shape)}, expected at least one channel and one position (an empty batch is fine)")


def parameter(name: str, t: Tensor | None, x: Tensor, *shapes: tuple[int, ...]) -> None:
    """A parameter of one of the accepted shapes, on x's device; its dtype may differ from x's."""
    if t is None:
        return
    required(name, t)
    floating(name, t)
    # then size by size: under dynamic shapes dynamo's `in` does not see that a symbol equals the number it was specialised to
    if t.shape not in shapes and not any(len(s) == t.dim() and all(a == b for a, b in zip(t.shape, s, strict=True)) for s in shapes):
        raise ValueError(f"{name}: got shape {list(t.shape)}, expected {' or '.join(str(list(s)) for s in shapes)} for x of shape {list(x.shape)}")
    if t.device != x.device:
        raise ValueError(f"{name}: got a tensor on {t.device}, expected {x.device}, the device of x")


def required(name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, expected a tensor")


def residual(t: Tensor | None, x: Tensor, *, of: str = "x") -> None:
    """Of x's shape, dtype and device: the gated map is x's dtype, and nothing is cast silently."""
    if t is not None:
        alike("residual", t, x, of)


def alike(name: str, t: Tensor, x: Tensor, of: str = "x") -> None:
    """Of x's shape, dtype and device; `of` is what x is called."""
    required(name, t)
    floating(name, t)
    if t.shape != x.shape:
        raise ValueError(f"{name}: got shape {list(t.shape)}, expected {list(x.shape)}, the shape of {of}")
    if t.dtype != x.dtype:
        raise TypeError(f"{name}: got {t.dtype}, expected {x.dtype}, the dtype of {of}")
    if t.device != x.device:
        raise ValueError(f"{name}: got a tensor on {t.device}, expected {x.device}, the device of {of}")


def choice(name: str, value: str, accepted: Collection[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, accepted))}")


def layer(name: str, w: Tensor | None, x: Tensor, rows: int | None, columns: int) -> int:
    """A linear layer's weight [rows, columns] or 1x1 convolution's [rows, columns, 1, ...]; returns its rows."""
    required(name, w)
    assert w is not None
    found = w.shape[0] if w.dim() >= 2 else 0
    expected = found if rows is None and found > 0 else rows or 1
    parameter(name, w, x, *((expected, columns) + (1,) * extra for extra in range(4)))
    return expected
