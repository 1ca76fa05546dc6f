"""Channel gates and channel statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from eager_blocks import HIDDEN, channel_gate, conv_gate, over, pooled
from torch import Tensor, nn

from tritattn import ops

from .op import EVEN, Op, Params, fc, join, mlp, statistics


def _channel(name: str, function: str, shapes: Callable, options: Params, peer: Params, scaled: str = "w1", **more: Any) -> Op:
    """A channel gate: tritattn.ops.<function> with `options`, and channel_gate above with `peer`."""

    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        names = ("w", "b") if function == "ese" else ("w1", "b1", "w2", "b2")
        tensors = [p["w2"], p["b2"]] if function == "ese" else [p[n] for n in names]
        return getattr(ops, function)(x, *tensors, **options, **epilogue)

    return Op(name, shapes, call, lambda x, p: x * channel_gate(x, p, **peer), (scaled,), ("channel_gate",), (3, 4, 5), **more)


def _eca(name: str, k: int, bias: bool, main: bool = False, **options: Any) -> Op:
    return Op(
        name,
        lambda s: {"w": (1, 1, k), "b": (1,) if bias else None},
        lambda x, p, **epilogue: ops.eca(x, p["w"], p["b"], **options, **epilogue),
        lambda x, p: x * conv_gate(x, p, **options),
        ("w",),
        ("channel_gate",),
        (3, 4, 5),
        main=main,
    )


def _se_norm(name: str) -> Op:
    """With a BatchNorm between the layers, in eval, where it is part of the first: in training it divides the difference of two images by itself."""
    shapes = join(mlp(), lambda s: {"norm": lambda: nn.BatchNorm2d(s[1] // 2 + 1).eval()})

    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        return ops.se(x, *(p[n] for n in ("w1", "b1", "w2", "b2")), norm=p["norm"], **epilogue)

    def eager(x: Tensor, p: Params) -> Tensor:
        h = F.relu(p["norm"](F.linear(pooled(x, "avg"), p["w1"], p["b1"])[..., None, None]))[..., 0, 0]
        return x * over(torch.sigmoid(F.linear(h, p["w2"], p["b2"])), x)

    return Op(name, shapes, call, eager, ("w1",), ("channel_gate",), (3, 4, 5))


def _ecam(name: str) -> Op:
    def eager(x: Tensor, p: Params) -> Tensor:
        h = F.silu(F.conv1d(pooled(x, "avg")[:, None], p["w1"], p["b1"]))
        return x * over(torch.sigmoid(F.conv1d(h, p["w"], p["b"], padding=1)[:, 0]), x)

    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        return ops.eca(x, p["w"], p["b"], w1=p["w1"], b1=p["b1"], hidden="silu", **epilogue)

    shapes = lambda s: {"w1": (4, 1, 1), "b1": (4,), "w": (1, 4, 3), "b": (1,)}  # noqa: E731
    return Op(name, shapes, call, eager, ("w1",), ("channel_relay", "channel_relay_gate"), (3, 4, 5), main=True)


def _preceded(op: Op, before: str, norm: bool = True) -> Op:
    """The row on b(norm(x)); norm: a BatchNorm in evaluation without parameters, whose gradients would keep it out of the passes."""

    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        return op.call(x, p, before=before, before_norm=p.get("before_norm"), **epilogue)

    def eager(x: Tensor, p: Params) -> Tensor:
        return op.eager(HIDDEN[before](p["before_norm"](x) if norm else x), p)

    shapes = join(op.shapes, lambda s: {"before_norm": lambda: nn.BatchNorm2d(s[1], affine=False).eval()} if norm else {})
    ranks = (4,) if norm else op.ranks
    return replace(op, name=f"{op.name}-before", shapes=shapes, call=call, eager=eager, ranks=ranks, main=False)


def _normed(op: Op, affine: bool, before: str = "none", **more: Any) -> Op:
    """The row on b(norm(x)) with a BatchNorm that trains."""

    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        return op.call(x, p, before=before, before_norm=p["before_norm"], **epilogue)

    name = f"{op.name}-trained" if before == "none" else f"{op.name}-trained-before"
    return replace(
        op, name=name, shapes=join(op.shapes, lambda s: {"before_norm": lambda: nn.BatchNorm2d(s[1], momentum=0.3, affine=affine)}),
        call=call, eager=lambda x, p: op.eager(HIDDEN[before](p["before_norm"](x)), p), ranks=(4,), families=("norm_gate",),
        refused=lambda s: s[0] * s[2] * s[3] == 1, **more,
    )  # fmt: skip


POOLS = ("avg", "max", "lp", "lse")
OPS = [
    _channel("se", "se", mlp(), {}, {}, main=True),
    _channel(
        "se-silu", "se", mlp(False, True), {"hidden": "silu", "gate": "hard_sigmoid", "pool": "avg_max"},
        {"hidden": "silu", "gate": "hard_sigmoid", "pools": ["avg_max"]},
    ),
    _channel("se-gelu", "se", mlp(), {"hidden": "gelu", "gate": "relu"}, {"hidden": "gelu", "gate": "relu"}),
    _channel(
        "se-even", "se", mlp(), {"hidden": "leaky_relu", "gate": "none", "pool": "avg_max", **EVEN},
        {"hidden": "leaky_relu", "gate": "none", "pools": ["avg_max"], **EVEN},
    ),
    _channel("se-relu6", "se", mlp(), {"hidden": "relu6"}, {"hidden": "relu6"}),
    _channel("se-hardswish", "se", mlp(), {"hidden": "hardswish"}, {"hidden": "hardswish"}),
    _se_norm("se-norm"),
    _channel("cse", "cse", mlp(conv=True), {"hidden": "none"}, {"hidden": "none"}, main=True),
    _channel("ese", "ese", fc(), {}, {"gate": "hard_sigmoid"}, "w2", main=True),
    _channel("ese-sigmoid", "ese", fc(False), {"gate": "sigmoid"}, {}, "w2"),
    _eca("eca", 3, False, main=True),
    _eca("eca-circular", 9, True, padding="circular"),
    _ecam("eca-mlp"),
    _eca("eca-wide", 9, True, gate="hard_sigmoid"),
    _channel("channel_attention", "channel_attention", mlp(), {}, {"pools": ["avg", "max"]}, main=True),
    _channel("channel_attention-even", "channel_attention", mlp(False), {"pools": ["max"], **EVEN}, {"pools": ["max"], **EVEN}),
    _channel("channel_attention-pools", "channel_attention", mlp(), {"pools": POOLS}, {"pools": POOLS}),
    _channel("channel_attention-fc", "channel_attention", fc(), {"pools": ["lse", "avg"]}, {"pools": ["lse", "avg"]}, "w2"),
    replace(
        _channel("channel_attention-gate", "channel_attention", mlp(), {"apply": False}, {"pools": ["avg", "max"]}),
        eager=lambda x, p: channel_gate(x, p, ("avg", "max")), families=("channel_squeeze",), epilogue=False,
    ),
    statistics("channel_statistics", lambda x: ops.channel_statistics(x, POOLS), lambda x: torch.stack([pooled(x, p) for p in POOLS], 1),
                "channel_squeeze", (3, 4, 5), main=True),
    statistics("channel_statistics-even", lambda x: ops.channel_statistics(x, ["avg_max"], max_grad="even"),
                lambda x: pooled(x, "avg_max", "even")[:, None], "channel_squeeze", (3, 4, 5)),
]  # fmt: skip
_ROWS = {op.name: op for op in OPS}
OPS += [
    _preceded(_channel("se", "se", mlp(False), {"hidden": "silu"}, {"hidden": "silu"}), "silu"),
    _preceded(_ROWS["eca-mlp"], "gelu"),
    _preceded(_ROWS["channel_attention-pools"], "relu", norm=False),
    _preceded(_ROWS["channel_attention-gate"], "hardswish"),
    _normed(_ROWS["se"], True),
    _normed(_ROWS["eca"], False, main=False),
    _normed(_ROWS["se"], True, "silu"),
    _normed(_ROWS["ese-sigmoid"], False, "hardswish"),
]
