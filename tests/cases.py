"""The ops under test, one row each: the parameters, the call, and the code that people run instead, written out in plain torch.

A new block joins every test that walks this table by adding its rows. `check` runs one case both ways and compares the value and every gradient.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from eager_blocks import GATES, TAILS, channel_gate, conv_gate, pixel_gate, pooled, spatial_gate, statistics_of_positions
from tolerance import assert_close, largest
from torch import Tensor, nn

from tritattn import ops

Params = dict[str, Any]  # name -> tensor, None, or a BatchNorm
Shape = tuple[int, ...]

# -- the table --------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """shapes(shape of x) -> shape of every parameter (None: left out; "norm": a BatchNorm's mode). call(x, params, **epilogue) goes through tritattn.

    eager(x, params) is the block alone in plain torch. scaled: the parameters that multiply statistics of x. epilogue: whether residual and
    activation exist. raw: whether the result is statistics in fp32 rather than a map. families: the registered ops behind it. main: the row that
    stands for its function where a test cannot afford them all.
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

    def __str__(self) -> str:
        return self.name


def _mlp(bias: bool = True, conv: bool = False) -> Callable[[Shape], dict[str, Any]]:
    ones = (1, 1) if conv else ()

    def shapes(s: Shape) -> dict[str, Any]:
        c, r = s[1], s[1] // 2 + 1
        return {"w1": (r, c, *ones), "b1": (r,) if bias else None, "w2": (c, r, *ones), "b2": (c,) if bias else None}

    return shapes


def _fc(bias: bool = True) -> Callable[[Shape], dict[str, Any]]:
    return lambda s: {"w1": None, "b1": None, "w2": (s[1], s[1]), "b2": (s[1],) if bias else None}


def _spatial(k: int, channels: int = 2, bias: bool = False, norm: str | None = None) -> Callable[[Shape], dict[str, Any]]:
    return lambda s: {"weight": (1, channels, k, k), "bias": (1,) if bias else None, "norm": norm}


def _join(*parts: Callable[[Shape], dict[str, Any]]) -> Callable[[Shape], dict[str, Any]]:
    return lambda s: {name: shape for part in parts for name, shape in part(s).items()}


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

    shapes = _join(_mlp(bias, conv=True), lambda s: {"w": (1, s[1], 1, 1), "b": (1,) if bias else None})
    return Op(name, shapes, call, eager, ("w1", "w"), ("concurrent_gate",), main=main)


def _spatial_op(name: str, shapes: Callable, apply: bool = True, main: bool = False, **options: Any) -> Op:
    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        return ops.spatial_attention(x, p["weight"], p["bias"], norm=p["norm"], apply=apply, **options, **epilogue)

    def eager(x: Tensor, p: Params) -> Tensor:
        return x * spatial_gate(x, p, **options) if apply else spatial_gate(x, p, **options)

    return Op(name, shapes, call, eager, ("weight",), ("spatial_squeeze", "spatial_gate")[: 1 + apply], epilogue=apply, main=main)


def _cbam(name: str, shapes: Callable, main: bool = False, **options: Any) -> Op:
    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        tensors = [p[n] for n in ("w1", "b1", "w2", "b2", "weight", "bias")]
        return ops.cbam(x, *tensors, norm=p["norm"], **options, **epilogue)

    def eager(x: Tensor, p: Params) -> Tensor:
        shared = {"max_grad": options.get("max_grad", "first")}
        u = x * channel_gate(x, p, options.get("pools", ("avg", "max")), options.get("hidden", "relu"), options.get("gate", "sigmoid"), **shared)
        return u * spatial_gate(u, p, options.get("order", "mean_max"), options.get("spatial_gate", "sigmoid"), **shared)

    return Op(name, shapes, call, eager, ("w1", "weight"), ("spatial_squeeze", "spatial_gate"), main=main)


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


def _statistics(name: str, call: Callable, eager: Callable, family: str, ranks: tuple[int, ...], main: bool = False) -> Op:
    return Op(name, lambda s: {}, lambda x, p: call(x), lambda x, p: eager(x), (), (family,), ranks, epilogue=False, raw=True, main=main)


POOLS = ("avg", "max", "lp", "lse")
EVEN = {"max_grad": "even"}
OPS = [
    _channel("se", "se", _mlp(), {}, {}, main=True),
    _channel(
        "se-silu", "se", _mlp(False, True), {"hidden": "silu", "gate": "hard_sigmoid", "pool": "avg_max"},
        {"hidden": "silu", "gate": "hard_sigmoid", "pools": ["avg_max"]},
    ),
    _channel("se-gelu", "se", _mlp(), {"hidden": "gelu", "gate": "relu"}, {"hidden": "gelu", "gate": "relu"}),
    _channel(
        "se-even", "se", _mlp(), {"hidden": "leaky_relu", "gate": "none", "pool": "avg_max", **EVEN},
        {"hidden": "leaky_relu", "gate": "none", "pools": ["avg_max"], **EVEN},
    ),
    _channel("se-relu6", "se", _mlp(), {"hidden": "relu6"}, {"hidden": "relu6"}),
    _channel("se-hardswish", "se", _mlp(), {"hidden": "hardswish"}, {"hidden": "hardswish"}),
    _channel("cse", "cse", _mlp(conv=True), {"hidden": "none"}, {"hidden": "none"}, main=True),
    _channel("ese", "ese", _fc(), {}, {"gate": "hard_sigmoid"}, "w2", main=True),
    _channel("ese-sigmoid", "ese", _fc(False), {"gate": "sigmoid"}, {}, "w2"),
    _eca("eca", 3, False, main=True),
    _eca("eca-circular", 9, True, padding="circular"),
    _eca("eca-wide", 9, True, gate="hard_sigmoid"),
    _sse("sse", True, main=True),
    _sse("sse-hard", False, gate="hard_sigmoid"),
    _scse("scse", True, "sum"),
    _scse("scse-max", False, "max", "none"),
    _scse("scse-hard", False, "sum", gate="hard_sigmoid", main=False),
    _channel("channel_attention", "channel_attention", _mlp(), {}, {"pools": ["avg", "max"]}, main=True),
    _channel("channel_attention-even", "channel_attention", _mlp(False), {"pools": ["max"], **EVEN}, {"pools": ["max"], **EVEN}),
    _channel("channel_attention-pools", "channel_attention", _mlp(), {"pools": POOLS}, {"pools": POOLS}),
    _channel("channel_attention-fc", "channel_attention", _fc(), {"pools": ["lse", "avg"]}, {"pools": ["lse", "avg"]}, "w2"),
    replace(
        _channel("channel_attention-gate", "channel_attention", _mlp(), {"apply": False}, {"pools": ["avg", "max"]}),
        eager=lambda x, p: channel_gate(x, p, ("avg", "max")), families=("channel_squeeze",), epilogue=False,
    ),
    _spatial_op("spatial_attention", _spatial(3, bias=True), main=True),
    _spatial_op("spatial_attention-train", _spatial(5, norm="train"), order="max_mean"),
    _spatial_op("spatial_attention-eval", _spatial(3, norm="eval"), order="max_mean", gate="hard_sigmoid"),
    _spatial_op("spatial_attention-mix", _spatial(3, 1, bias=True), order="mix", max_grad="even"),
    _spatial_op("spatial_attention-gate", _spatial(3, norm="train"), apply=False),
    _cbam("cbam", _join(_mlp(), _spatial(3)), main=True),
    _cbam("cbam-train", _join(_mlp(), _spatial(3, norm="train")), main=True, order="max_mean"),
    _cbam("cbam-eval", _join(_mlp(False), _spatial(3, bias=True, norm="eval")), hidden="silu"),
    _cbam("cbam-even", _join(_mlp(), _spatial(1, 1)), order="mix", spatial_gate="hard_sigmoid", **EVEN),
    _cbam("cbam-pools", _join(_fc(), _spatial(3)), pools=POOLS, gate="hard_sigmoid"),
    _gate("gate-channel", lambda s: (*s[:2], *(1,) * (len(s) - 2)), "sigmoid", (3, 4, 5)),
    _gate("gate-spatial", lambda s: (s[0], 1, *s[2:]), "hard_sigmoid"),
    _gate("gate-whole", lambda s: s, "sigmoid", (3, 4, 5), main=True),
    _gate("gate-row", lambda s: (s[1], 1, s[3]), "none"),
    _gate("gate-column", lambda s: (1, 1, s[2], 1), "relu"),
    _statistics("channel_statistics", lambda x: ops.channel_statistics(x, POOLS), lambda x: torch.stack([pooled(x, p) for p in POOLS], 1),
                "channel_squeeze", (3, 4, 5), main=True),
    _statistics("channel_statistics-even", lambda x: ops.channel_statistics(x, ["avg_max"], max_grad="even"),
                lambda x: pooled(x, "avg_max", "even")[:, None], "channel_squeeze", (3, 4, 5)),
    _statistics("spatial_statistics", ops.spatial_statistics, lambda x: statistics_of_positions(x, ("mean", "max")),
                "spatial_squeeze", (4,), main=True),
    _statistics("spatial_statistics-even", lambda x: ops.spatial_statistics(x, ["mix", "max"], max_grad="even"),
                lambda x: statistics_of_positions(x, ("mix", "max"), "even"), "spatial_squeeze", (4,)),
]  # fmt: skip
MAIN = [op for op in OPS if op.main]
BY_NAME = {op.name: op for op in OPS}

# -- inputs -----------------------------------------------------------------------------------------------------------------------------------



def _with(value: float) -> Callable[[Tensor], Tensor]:
    """One element in the middle of the first image replaced."""

    def replaced(t: Tensor) -> Tensor:
        t = t.clone()
        t.flatten()[t[:1].numel() // 2] = value
        return t

    return replaced


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
OFFSET = 1000.0
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda t: t,
    "offset": lambda t: t + OFFSET,
    "constant": lambda t: torch.full_like(t, 0.7),
    "zero": torch.zeros_like,
    "ties": lambda t: (1.5 * t).round().relu(),  # what a ReLU leaves: many zeros, and maxima that tie
    "nan": _with(math.nan),
    "inf": _with(math.inf),
    "-inf": _with(-math.inf),
}


def _channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _sliced(t: Tensor) -> Tensor:
    return torch.cat([t, t], -1)[..., : t.shape[-1]]


def _permuted(t: Tensor) -> Tensor:
    """Dense, in none of the two orders."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": _channels_last,
    "sliced": _sliced,
    "permuted": _permuted,
    "expanded": lambda t: t[..., :1].expand_as(t),  # other values than the rest: the first column, repeated
}


@dataclass
class Inputs:
    """x, the parameters, perhaps a residual, and the seed of y's gradient."""

    x: Tensor
    params: Params
    residual: Tensor | None
    seed: int = 0
    g: dict[Shape, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that can have a gradient, by name."""
        found = {"x": self.x}
        for name, value in self.params.items():
            if isinstance(value, nn.Module):
                found |= {f"{name}.{child}": t for child, t in value.named_parameters()}
            elif value is not None:
                found[name] = value
        return found if self.residual is None else {**found, "residual": self.residual}

    def buffers(self) -> dict[str, Tensor]:
        """A BatchNorm's running statistics."""
        norm = self.params.get("norm")
        return {} if norm is None else {f"norm.{name}": t for name, t in norm.named_buffers() if t.is_floating_point()}

    def to(self, dtype: torch.dtype) -> Inputs:
        """A copy with everything in that dtype."""

        def convert(value: Any) -> Any:
            if isinstance(value, nn.Module):
                return copy.deepcopy(value).to(dtype)
            return None if value is None else value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad)

        params = {name: convert(value) for name, value in self.params.items()}
        return Inputs(convert(self.x), params, convert(self.residual), self.seed, {s: g.to(dtype) for s, g in self.g.items()})

    def gradient(self, y: Tensor) -> Tensor:
        """What flows back into y: the same for every run, as x's dtype can hold it."""
        if y.shape not in self.g:
            generator = torch.Generator().manual_seed(self.seed + 1)
            self.g[y.shape] = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        return self.g[y.shape]


def make(
    op: Op, shape: Shape, *, dtype: torch.dtype = torch.float32, parameters: torch.dtype | None = None, layout: str = "contiguous",
    values: str = "random", residual: bool = False, seed: int = 0,
) -> Inputs:  # fmt: skip
    """Inputs of a case, everything requiring gradients. parameters: their dtype, by default x's."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def parameter(name: str, size: Any) -> Any:
        if name == "norm":
            return None if size is None else _norm(size, parameters or dtype)
        if size is None:
            return None
        value = normal(*size)
        if len(size) > 1 and name != "weights":
            value /= math.sqrt(math.prod(size[1:]))
        if values == "offset" and name in op.scaled:
            value /= OFFSET
        return value.to(parameters or dtype).requires_grad_()

    def a_map(values: str) -> Tensor:
        return LAYOUTS[layout](VALUES[values](normal(*shape)).to(dtype)).requires_grad_()

    x = a_map(values)
    params = {name: parameter(name, size) for name, size in op.shapes(shape).items()}
    return Inputs(x, params, a_map("random") if residual else None, seed)


def _norm(mode: str, dtype: torch.dtype) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(1, momentum=0.3)
    with torch.no_grad():
        for name, value in (("weight", 1.3), ("bias", -0.2), ("running_mean", -1.0), ("running_var", 1.7)):
            getattr(norm, name).fill_(value)
    return norm.to(dtype).train(mode == "train")


# -- running a case both ways -----------------------------------------------------------------------------------------------------------------


def eager(op: Op, x: Tensor, params: Params, residual: Tensor | None = None, activation: str = "none") -> Tensor:
    gated = op.eager(x, params)
    return TAILS[activation](gated if residual is None else gated + residual)


def fused(op: Op, x: Tensor, params: Params, residual: Tensor | None = None, activation: str = "none") -> Tensor:
    return op.call(x, params, residual=residual, activation=activation) if op.epilogue else op.call(x, params)


def run(call: Callable, op: Op, inputs: Inputs, activation: str = "none", wanted: Collection[str] | None = None) -> dict[str, Tensor]:
    """y, the gradients that are wanted (by default all of them) and a BatchNorm's buffers, by name."""
    y = call(op, inputs.x, inputs.params, inputs.residual, activation)
    tensors = {name: t for name, t in inputs.tensors().items() if wanted is None or name in wanted}
    grads = torch.autograd.grad(y, list(tensors.values()), inputs.gradient(y))
    buffers = {name: t.clone() for name, t in inputs.buffers().items()}
    return {"y": y.detach(), **dict(zip(tensors, grads, strict=True)), **buffers}


def check(op: Op, inputs: Inputs, activation: str = "none", wanted: Collection[str] | None = None) -> dict[str, Tensor]:
    """The case through tritattn against the same in plain torch: y, every gradient, a BatchNorm's buffers. Returns what tritattn gave."""
    accumulator = torch.float64 if inputs.x.dtype == torch.float64 else torch.float32
    exact, plain = inputs.to(torch.float64), inputs.to(accumulator)
    got = run(fused, op, inputs, activation, wanted)
    for other in (exact, plain):
        other.g = {shape: g.to(other.x.dtype) for shape, g in inputs.g.items()}
    expected = run(eager, op, exact, activation, wanted)
    cast = run(eager, op, plain, activation, wanted)
    n, *rest = inputs.x.shape
    norm = inputs.params.get("norm")
    # a BatchNorm that computes rounds the spatial logits, and their gradient, to its own dtype
    rounded = {accumulator} | ({t.dtype for t in norm.parameters()} if norm is not None and norm.training else set())
    summed = max(rounded, key=lambda dtype: torch.finfo(dtype).eps)
    kinds = {name: t.dtype for name, t in (inputs.tensors() | inputs.buffers()).items()}
    gradients = [t for name, t in expected.items() if name in inputs.tensors() and name not in ("x", "residual")]
    for name, value in got.items():
        dtype = (accumulator if op.raw else inputs.x.dtype) if name == "y" else kinds[name]
        # all of an image, or of the batch, and the steps from the statistics to the gate
        terms = 16 + math.prod(rest) * (1 if name in ("y", "x", "residual") else n)
        # a single number may be a sum that cancels: its error is that of the parameters' gradients
        like = gradients if name in kinds and expected[name].numel() == 1 and gradients else [expected[name]]
        assert_close(name, value, expected[name], cast[name].to(dtype), terms=terms, accumulator=summed, scale=largest(*like))
    return got
