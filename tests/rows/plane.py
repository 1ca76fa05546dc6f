"""SimAM and shuffle attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from eager_blocks import shuffled_attention, simam
from torch import Tensor

from tritattn import ops

from .op import Op, Params, Shape

NAMES = ("cweight", "cbias", "sweight", "sbias", "norm_weight", "norm_bias")


def _shuffle(name: str, groups: Callable[[int], int], affine: bool = True, main: bool = False, **options: Any) -> Op:
    def shapes(s: Shape) -> dict[str, Any]:
        k = s[1] // (2 * groups(s[1]))
        return dict.fromkeys(NAMES[:4], (1, k, 1, 1)) | dict.fromkeys(NAMES[4:], (k,) if affine else None)

    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        return ops.shuffle(x, *(p[n] for n in NAMES), groups=groups(x.shape[1]), **options, **epilogue)

    def eager(x: Tensor, p: Params) -> Tensor:
        return shuffled_attention(x, p, groups(x.shape[1]), **options)

    def refused(s: Shape) -> bool:
        """What torch's GroupNorm takes for a single value."""
        return s[0] * math.prod(s[2:]) * groups(-(-s[1] // 6) * 6) == 1

    return Op(name, shapes, call, eager, ("cweight",), ("plane_gate",), (3, 4, 5), main=main, refused=refused, multiple=6)


def _simam(name: str, main: bool = False, **options: Any) -> Op:
    return Op(
        name, lambda s: {}, lambda x, p, **epilogue: ops.simam(x, **options, **epilogue), lambda x, p: simam(x, **options), (), ("plane_gate",),
        (3, 4, 5), main=main,
    )  # fmt: skip


OPS = [
    _shuffle("shuffle", lambda c: 1, main=True),
    _shuffle("shuffle-groups", lambda c: c // 2, affine=False, gate="hard_sigmoid", eps=0.1),
    _simam("simam", main=True),
    _simam("simam-lambda", e_lambda=0.5, gate="hard_sigmoid"),
]  # fmt: skip
