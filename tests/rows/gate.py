"""The gate alone."""

from __future__ import annotations

from collections.abc import Callable

from eager_blocks import GATES

from tritattn import ops

from .op import Op, Shape


def _gate(name: str, weights: Callable[[Shape], Shape], gate: str, ranks: tuple[int, ...] = (4,), main: bool = False) -> Op:
    return Op(
        name,
        lambda s: {"weights": weights(s)},
        lambda x, p, **epilogue: ops.gate(x, p["weights"], gate=gate, **epilogue),
        lambda x, p: x * GATES[gate](p["weights"]),
        (),
        ("gate",),
        ranks,
        main=main,
    )


OPS = [
    _gate("gate-channel", lambda s: (*s[:2], *(1,) * (len(s) - 2)), "sigmoid", (3, 4, 5)),
    _gate("gate-spatial", lambda s: (s[0], 1, *s[2:]), "hard_sigmoid"),
    _gate("gate-whole", lambda s: s, "sigmoid", (3, 4, 5), main=True),
    _gate("gate-row", lambda s: (s[1], 1, s[3]), "none"),
    _gate("gate-column", lambda s: (1, 1, s[2], 1), "relu"),
]  # fmt: skip
