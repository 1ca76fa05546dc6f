"""Selective kernels and split attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from eager_blocks import GATES, HIDDEN, over
from torch import Tensor, nn

from tritattn import ops

from .op import Op, Params, Shape


def _cardinality(c: int) -> int:
    """The smallest divisor above one."""
    return next((d for d in range(2, c + 1) if c % d == 0), 1)


def _layers(c: int, k: int, groups: int, bias: bool, norm: str | None) -> dict[str, Any]:
    r = groups * (c // groups // 2 + 1)
    # a small eps would make signs of the two values that a batch of two normalises, and noise of their gradients
    module = None if norm is None else lambda: nn.BatchNorm2d(r, 1.0, 0.3).train(norm == "train")
    return {
        "w1": (r, c // groups, 1, 1), "b1": (r,) if bias else None, "norm": module, "w2": (k * c, r // groups), "b2": (k * c,) if bias else None
    }  # fmt: skip


def _weights(z: Tensor, p: Params, k: int, groups: int, hidden: str, gate: str) -> Tensor:
    """[N, K, C]"""
    conv = nn.functional.conv2d
    h = conv(z[:, :, None, None], p["w1"], p["b1"], groups=groups)
    h = HIDDEN[hidden](h if p["norm"] is None else p["norm"](h))
    logits = conv(h, p["w2"][:, :, None, None], p["b2"], groups=groups)
    logits = logits.view(len(z), groups, k, -1 if len(z) else z.shape[1] // groups).transpose(1, 2).flatten(2)
    return logits.softmax(1) if gate == "softmax" else GATES[gate](logits)


def _selected(branches: Sequence[Tensor], p: Params, groups: int = 1, hidden: str = "relu", gate: str = "softmax") -> Tensor:
    stacked = torch.stack(list(branches), 1)
    weights = _weights(stacked.sum(1).flatten(2).mean(2), p, len(branches), groups, hidden, gate)
    return (stacked * over(weights, branches[0])).sum(1)


def _refused(norm: str | None) -> Callable[[Shape], bool]:
    return lambda s: norm == "train" and s[0] <= 1


def _sk(name: str, k: int, bias: bool = False, norm: str | None = None, main: bool = False, before: str = "none", **options: Any) -> Op:
    others = [f"x{i}" for i in range(1, k)]

    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        tensors = [p[n] for n in ("w1", "b1", "w2", "b2")]
        return ops.sk([x, *(p[n] for n in others)], *tensors, norm=p["norm"], before=before, **options, **epilogue)

    return Op(
        name,
        lambda s: {**dict.fromkeys(others, s), **_layers(s[1], k, 1, bias, norm)},
        call,
        lambda x, p: _selected([HIDDEN[before](t) for t in (x, *(p[n] for n in others))], p, **options),
        ("w1",),
        ("select_squeeze", "select_gate") if norm == "train" or k > 4 else ("select",),
        (3, 4, 5),
        main=main,
        refused=_refused(norm),
        unfit=("constant",) if norm == "train" else (),
    )


def _splat(
    name: str, radix: int, grouped: bool = False, bias: bool = True, norm: str | None = None, before_norm: bool = False, before: str = "relu",
    hidden: str = "relu", main: bool = False,
) -> Op:  # fmt: skip
    """before_norm: a BatchNorm in evaluation without parameters, whose gradients would keep it from being folded."""

    def shapes(s: Shape) -> dict[str, Any]:
        first = (lambda: nn.BatchNorm2d(radix * s[1], affine=False).eval()) if before_norm else None
        return {**_layers(s[1], radix, _cardinality(s[1]) if grouped else 1, bias, norm), "before_norm": first}

    def groups(x: Tensor, p: Params) -> int:
        channels = x.shape[1] if p["before_norm"] is None else p["before_norm"].num_features  # a number even where shapes are symbols
        return _cardinality(channels // radix) if grouped else 1

    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        tensors = [p[n] for n in ("w1", "b1", "w2", "b2")]
        norms = {"norm": p["norm"], "before_norm": p["before_norm"]}
        return ops.splat(x, *tensors, radix=radix, cardinality=groups(x, p), before=before, hidden=hidden, **norms, **epilogue)

    def eager(x: Tensor, p: Params) -> Tensor:
        u = HIDDEN[before](x if p["before_norm"] is None else p["before_norm"](x))
        return _selected(u.chunk(radix, 1), p, groups(x, p), hidden, "softmax" if radix > 1 else "sigmoid")

    families = ("select_squeeze", "select_gate") if norm or grouped else ("select",)
    return Op(
        name, shapes, call, eager, ("w1",), families, (3, 4, 5) if not before_norm else (4,), main=main,
        refused=_refused(norm), wide=radix,
    )  # fmt: skip


OPS = [
    _sk("sk", 2, main=True),
    _sk("sk-train", 2, norm="train", hidden="silu", before="relu"),
    _sk("sk-external", 4, True, hidden="none"),
    _sk("sk-many", 5, norm="eval", gate="sigmoid"),
    _splat("splat", 2, main=True),
    _splat("splat-one", 1, True, False, norm="train", hidden="silu"),
    _splat("splat-groups", 3, True, False, before_norm=True, before="silu"),
]
