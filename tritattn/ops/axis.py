"""Coordinate attention, strip attention and triplet attention: statistics along the axes of the map, small networks on them, and gates that are
constant along an axis.

The networks hold norms and convolutions of torch, so these are two ops, `axis_squeeze` and `axis_gate`, a relay that writes the map's gradient once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference, tuning
from .._library import _without_autocast
from .._relay import RelayGate, RelaySqueeze
from .._spec import Spec
from . import _checks, _excite
from ._launch import Cotangent, Map, counters, kernels, vector
from .channel import MAX_GRADS
from .spatial import check_convolution, fold, spatial_convolution


class AxisSpec(NamedTuple):
    gate: str = "sigmoid"
    combine: str = "product"  # of the gates: product, logits (one gate of their sum), mean
    pixel: bool = False  # whether there are statistics and gates of pixels
    maximum: bool = False  # statistics: mean and maximum, or the mean alone
    max_grad: str = "first"
    activation: str = "none"


# -- the squeeze -----------------------------------------------------------------------------------------------------------------------------


class _Walk:
    """How a map is cut into programs: their number, the kernels' arguments, and slots for lines that several programs share."""

    def __init__(self, m: Map, spec: AxisSpec, role: str = "lines"):
        _, c, h, w = m.x.shape
        config = m.config(role, row=w)
        block_w = min(config.block_p, tuning.power_of_two(w))
        block_h = config.block_p // block_w
        self.m, self.planes = m, block_h >= h and block_w >= w
        blocks_c, blocks_w = 1 if self.planes else -(-c // config.block_c), -(-w // block_w)
        self.programs = m.n * blocks_c * blocks_w * config.splits
        self.parts = (blocks_w, config.splits, blocks_c)
        self.groups = m.n * (blocks_c * blocks_w + (blocks_c + blocks_w) * config.splits)
        vec_w = 1 if m.channels_last else vector(w)
        self.args = {name: m.args[name] for name in ("C_V", "VEC_C", "CHANNELS_LAST", "LARGE", "ACC")} | dict(
            H=h, W_V=w // vec_w, VEC_W=vec_w, SPLITS=config.splits, WALK=0 if self.planes else 1, HAS_PIXEL=spec.pixel, BLOCK_C=config.block_c,
            BLOCK_H=block_h, BLOCK_W=block_w, **config.options,
        )  # fmt: skip
        along = config.splits > 1 and (spec.pixel or not self.planes)
        self.cut = dict(SPLIT_ALONG=along, SPLIT_ACROSS=blocks_c > 1 and spec.pixel, SPLIT_W=blocks_w > 1)

    def order(self, three: Sequence[Any]) -> list[Any]:
        """What there is of rows, columns and pixels, as of rows, lines along the walk and lines across it."""
        rows, columns, pixels = three
        return [rows, pixels, columns] if self.planes else [rows, columns, pixels]

    def slots(self, whole: Sequence[Tensor | None]) -> list[Tensor | None]:
        """For each kind of lines, in that order, the slots of its parts, which are the result itself where it has one."""
        return [t if t is None or parts == 1 else t.new_empty((t.shape[0], parts, *t.shape[1:])) for t, parts in zip(whole, self.parts, strict=True)]

    def counter(self) -> Tensor | None:
        return counters(self.m.x, self.groups) if any(self.cut.values()) else None


def _fake(x, spec: AxisSpec) -> tuple[Tensor, ...]:
    n, c, h, w = x.shape
    kinds, acc = (2,) * spec.maximum, reference.accumulator(x.dtype)
    shapes = [(h, c), (w, c), (h, w) if spec.pixel else None]
    stats = [x.new_empty((n, *kinds, *shape) if shape else 0, dtype=acc) for shape in shapes]
    slots = [RelaySqueeze.slot(x), *(RelaySqueeze.slot(t.select(1, 0) if t.dim() == 4 else t) for t in stats)]
    aux = [x.new_empty((n, *shape) if shape and spec.maximum else 0, dtype=torch.int32) for shape in shapes]
    return (*stats, *slots, *aux)


def _launch(x, spec: AxisSpec) -> tuple[Tensor, ...]:
    m = Map(x)
    found = _fake(m.x, spec)
    stats, aux = _present(found[:3], spec.pixel), _present(found[7:], spec.pixel and spec.maximum, spec.maximum)
    walk = _Walk(m, spec, "extremes" if spec.maximum else "lines")
    stats, aux = walk.order(stats), walk.order(aux)
    kernels().axis_squeeze_fwd_kernel[(walk.programs,)](
        m.x, *stats, *aux, *walk.slots(stats), *walk.slots(aux), walk.counter(), **walk.args, **walk.cut, HAS_MAX=spec.maximum,
        EVEN=spec.max_grad == "even",
    )  # fmt: skip
    return found


def _present(three: Sequence[Tensor], pixel: bool, others: bool = True) -> list[Tensor | None]:
    return [t if here else None for t, here in zip(three, (others, others, pixel), strict=True)]


def _backward(grads, inputs, saved, spec: AxisSpec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """With da and the gates, what flows through the gate as well."""
    *dstats, da, row, column, pixel = grads
    m = Map(inputs[0])
    walk = _Walk(m, spec, "extremes" if spec.maximum else "lines")
    stats, aux = _present(saved[:3], spec.pixel), _present(saved[3:], spec.pixel and spec.maximum, spec.maximum)
    dstats = [None if s is None else torch.zeros_like(s) if d is None else d.contiguous() for s, d in zip(stats, dstats, strict=True)]
    dx = m.empty()
    even = spec.maximum and spec.max_grad == "even"
    kernels().axis_gate_bwd_input_kernel[(walk.programs,)](
        m.same(da), m.x, *walk.order(_gates(row, column, pixel)), *walk.order(stats), *walk.order(dstats), *walk.order(aux), dx, **walk.args,
        GATE=spec.gate, COMBINE=spec.combine, HAS_G=da is not None, HAS_MAX=spec.maximum, EVEN=even,
    )  # fmt: skip
    return (m.output(dx),)


def _gates(*logits: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in logits]


def _reference(x, spec: AxisSpec) -> tuple[Tensor, ...]:
    rows, columns = (reference.axis_statistics(x, dim, spec.maximum, spec.max_grad).transpose(-1, -2) for dim in (3, 2))
    if spec.pixel:
        return rows, columns, reference.axis_statistics(x, 1, spec.maximum, spec.max_grad)
    return rows, columns, x.new_empty(0, dtype=reference.accumulator(x.dtype))


def _share(da: Tensor, inputs: Sequence[Any], row: Tensor, column: Tensor, pixel: Tensor | None, spec: AxisSpec) -> tuple[Tensor, ...]:
    return (reference.gate_lines(da, row, column, pixel, spec.gate, spec.combine).to(da.dtype),)


axis_squeeze = RelaySqueeze(
    "axis_squeeze",
    inputs=("x",),
    outputs=("rows", "columns", "pixels", "map_slot", "row_slot", "column_slot", "pixel_slot", "row_aux", "column_aux", "pixel_aux"),
    differentiable=7,
    saved=("rows", "columns", "pixels", "row_aux", "column_aux", "pixel_aux"),
    batched=("x",),
    fake=_fake,
    launch=_launch,
    backward=_backward,
    reference=_reference,
    share=_share,
    spec=AxisSpec,
)

# -- the gate --------------------------------------------------------------------------------------------------------------------------------


def _gate_launch(x, row, column, pixel, residual, map_slot, row_slot, column_slot, pixel_slot, spec: AxisSpec) -> tuple[Tensor, ...]:
    m = Map(x)
    walk = _Walk(m, spec)
    y = m.empty()
    kernels().axis_gate_fwd_kernel[(walk.programs,)](
        m.x, *walk.order(_gates(row, column, pixel)), m.same(residual), y, **walk.args, GATE=spec.gate, COMBINE=spec.combine,
        HAS_RESIDUAL=residual is not None, ACTIVATION=spec.activation,
    )  # fmt: skip
    return (m.output(y),)


def _gate_backward(grads, inputs, saved, spec: AxisSpec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """da and the gradients of the logits."""
    (g,) = grads
    x, row, column, pixel, residual, *_ = inputs
    m = Map(x)
    cotangent = Cotangent(m, g, residual, spec)
    if needs[0]:
        cotangent.da = m.empty()
    walk = _Walk(m, spec, "products")
    logits = walk.order(_gates(row, column, pixel))
    found = [None if t is None else torch.empty_like(t) for t in logits]
    names = ("row", "along", "across")
    kernels().axis_gate_bwd_kernel[(walk.programs,)](
        x_ptr=m.x, da_ptr=cotangent.da, **{f"{name}_ptr": t for name, t in zip(names, logits, strict=True)},
        **{f"d{name}_ptr": t for name, t in zip(names, found, strict=True)},
        **{f"{name}_part_ptr": t for name, t in zip(names, walk.slots(found), strict=True)},
        counter_ptr=walk.counter(), **walk.args, **walk.cut, **cotangent.args(), GATE=spec.gate, COMBINE=spec.combine,
        STORE_DA=cotangent.da is not None,
    )  # fmt: skip
    da = cotangent.da
    return None if da is None else m.output(da), *walk.order(found), None, None, None, None, None


def _gate_reference(
    x, row, column, pixel, residual, map_slot, row_slot, column_slot, pixel_slot, spec: AxisSpec
) -> tuple[Tensor, ...]:  # fmt: skip
    gated = reference.gate_lines(x, row, column, pixel, spec.gate, spec.combine)
    return (reference.finish(gated, x, residual, spec.activation),)


axis_gate = RelayGate(
    "axis_gate",
    inputs=("x", "row", "column", "pixel?", "residual?", "map_slot?", "row_slot?", "column_slot?", "pixel_slot?"),
    outputs=("y",),
    differentiable=1,
    saved=(),
    batched=("x", "row", "column", "pixel", "residual", "map_slot", "row_slot", "column_slot", "pixel_slot"),
    fake=lambda x, *rest: (torch.empty_like(x),),
    launch=_gate_launch,
    backward=_gate_backward,
    reference=_gate_reference,
    spec=AxisSpec,
)


def _dense(t: Tensor) -> Tensor:
    """Once, rather than in every launch that reads t; `contiguous` would ask a driver about a fake tensor's device."""
    return t if t.is_contiguous() else t.clone(memory_format=torch.contiguous_format)


Excite = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]


def attend(x: Tensor, excite: Excite, residual: Tensor | None, spec: AxisSpec) -> Tensor:
    """a(x * combine(gates) + residual), the logits of the gates from excite(statistics of rows [N, H, C], of columns [N, W, C], of pixels [N, H, W],
    or (mean, maximum) [N, 2, ...] of each): [N, H, C], [N, W, C], and [N, H, W] or None."""
    rows, columns, pixels, *slots = axis_squeeze(x, spec=spec)
    row, column, pixel = (None if t is None else _dense(t.to(rows.dtype)) for t in excite(rows, columns, pixels))
    if not slots:  # the squeeze took the reference
        return _gate_reference(x, row, column, pixel, residual, None, None, None, None, spec)[0]
    return axis_gate(x, row, column, pixel, residual, *slots[:3], slots[3] if spec.pixel else None, spec=spec)


# -- public functions ------------------------------------------------------------------------------------------------------------------------

COMBINES = ("product", "logits")


def _common(x: Tensor, gate: str, residual: Tensor | None, activation: str) -> None:
    _checks.feature_map(x)
    _checks.choice("gate", gate, reference.GATES)
    _checks.residual(residual, x)
    _checks.choice("activation", activation, reference.ACTIVATIONS)


def _exact(x: Tensor) -> AbstractContextManager:
    """The arithmetic between squeeze and gate stays in the accumulator's dtype, as that of the ops does."""
    return _without_autocast(x.device.type) if torch._C._is_any_autocast_enabled() else nullcontext()


def _normalised(norm: Any, t: Tensor) -> Tensor:
    """norm(t), t [N, C, L, 1] or [N, C, 1, L], in the norm's dtype."""
    weight = getattr(norm, "weight", None)
    return norm(t if weight is None else t.to(weight.dtype)).to(t.dtype)


def _check_norm(name: str, norm: Any) -> None:
    if norm is not None and not callable(norm):
        raise TypeError(f"{name}: got {type(norm).__name__}, expected None or a module or function of [N, C, L, 1]")


def coord(
    x: Tensor, w1: Tensor, b1: Tensor | None, w_h: Tensor, b_h: Tensor | None, w_w: Tensor, b_w: Tensor | None, *,
    norm: Callable[[Tensor], Tensor] | None = None, hidden: str = "hardswish", gate: str = "sigmoid", combine: str = "product",
    residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Coordinate attention (Hou et al., 2021, arXiv:2103.02907): y[n, c, i, j] = a(x * f(t_h[n, c, i]) * f(t_w[n, c, j]) + residual), with
    [u_h, u_w] = h(norm(w1 [mean over w of x, mean over h of x] + b1)), t_h = w_h u_h + b_h, t_w = w_w u_w + b_w.

    Both means come from one read of the map, and both gates are applied in one pass.

    Args:
        x: [N, C, H, W]; float32, float16, bfloat16 or float64.
        w1: [R, C] or [R, C, 1, 1]; w_h, w_w: [C, R] likewise; b1: [R]; b_h, b_w: [C]; biases or None. Their dtype may differ from x's.
        norm: None, or a module or function of [N, R, H + W, 1]: a BatchNorm2d(R) in the authors' code.
        hidden: h, one of none, relu, relu6, leaky_relu, silu, hardswish (the authors'), gelu. gate: f, one of sigmoid, hard_sigmoid, relu, none.
        combine: "product", or "logits" for f(t_h + t_w), as timm's SimpleCoordAttn.
        residual: of x's shape and dtype, added after the gate. activation: a, one of none, relu, silu, hardswish, gelu.

    Returns y, x's dtype, with the strides of torch.empty_like(x). Raises TypeError and ValueError naming the argument.
    """
    _common(x, gate, residual, activation)
    _checks.choice("hidden", hidden, reference.HIDDEN)
    _checks.choice("combine", combine, COMBINES)
    _check_norm("norm", norm)
    c, height, width = x.shape[1:]
    r = _checks.layer("w1", w1, x, None, c)
    _checks.parameter("b1", b1, x, (r,))
    for name, weight, bias in (("h", w_h, b_h), ("w", w_w, b_w)):
        _checks.layer(f"w_{name}", weight, x, c, r)
        _checks.parameter(f"b_{name}", bias, x, (c,))

    def linear(z: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(z, w.flatten(1).to(z.dtype), None if b is None else b.to(z.dtype))

    def excite(rows: Tensor, columns: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, None]:
        with _exact(x):
            plain = _excite.plain_norm(norm)
            w, b = _excite.folded(w1, b1, norm, rows.dtype) if plain else (w1.to(rows.dtype), b1)
            # put together as R channels rather than C
            u = torch.cat([linear(rows, w, b), linear(columns, w, b)], 1)  # [N, H + W, R]
            if norm is not None and not plain:
                u = _normalised(norm, u.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
            u_h, u_w = reference.HIDDEN[hidden](u).split([height, width], 1)
            return linear(u_h, w_h, b_h), linear(u_w, w_w, b_w), None

    return attend(x, excite, residual, AxisSpec(gate, combine, activation=activation))


def strip(
    x: Tensor, w_h: Tensor | None = None, b_h: Tensor | None = None, w_w: Tensor | None = None, b_w: Tensor | None = None, *,
    norm_h: Callable[[Tensor], Tensor] | None = None, norm_w: Callable[[Tensor], Tensor] | None = None, hidden: str = "none", gate: str = "sigmoid",
    combine: str = "logits", residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Strip attention: y = a(x * f(t_h) * f(t_w) + residual), or with combine="logits" a(x * f(t_h + t_w) + residual), with
    t_h = h(norm_h(conv_h(mean over w of x))), t_w = h(norm_w(conv_w(mean over h of x))), depthwise along what is left.

    With product, silu and a GroupNorm of one group: efficient local attention (Xu & Wan, 2024, arXiv:2403.01123) as timm's EfficientLocalAttn;
    the defaults are timm's StripAttn.

    w_h: [C, 1, k, 1], k odd, w_w: [C, 1, 1, k], or None for no convolution; b_h, b_w: [C] or None; norm_h, norm_w: None, or a module or function of
    [N, C, H, 1] and of [N, C, 1, W]. Other arguments, result and errors as in `coord`.
    """
    _common(x, gate, residual, activation)
    _checks.choice("hidden", hidden, reference.HIDDEN)
    _checks.choice("combine", combine, COMBINES)
    _check_norm("norm_h", norm_h)
    _check_norm("norm_w", norm_w)
    for name, w, b in (("h", w_h, b_h), ("w", w_w, b_w)):
        _check_strip(x, name, w, b)

    def head(z: Tensor, w: Tensor | None, b: Tensor | None, norm: Any, other: int) -> Tensor:
        """z [N, L, C]; other: the dimension of [N, C, H, W] that is gone."""
        t = z.unsqueeze(other - 1).permute(0, 3, 1, 2)  # channels last, to torch as well
        if w is not None:
            padding = [int(k) // 2 for k in w.shape[2:]]
            t = F.conv2d(t, w.to(t.dtype), None if b is None else b.to(t.dtype), padding=padding, groups=int(w.shape[0]))
        return reference.HIDDEN[hidden](t if norm is None else _normalised(norm, t)).squeeze(other).transpose(1, 2)

    def excite(rows: Tensor, columns: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, None]:
        with _exact(x):
            return head(rows, w_h, b_h, norm_h, 3), head(columns, w_w, b_w, norm_w, 2), None

    return attend(x, excite, residual, AxisSpec(gate, combine, activation=activation))


def _check_strip(x: Tensor, name: str, w: Tensor | None, b: Tensor | None) -> None:
    c, shape = x.shape[1], "k, 1" if name == "h" else "1, k"
    if w is None:
        if b is not None:
            raise ValueError(f"b_{name}: got a tensor, expected None where w_{name} is None")
        return
    _checks.required(f"w_{name}", w)
    k = w.shape[2 if name == "h" else 3] if w.dim() == 4 else 0
    if k % 2 == 0:
        raise ValueError(f"w_{name}: got shape {list(w.shape)}, expected [{c}, 1, {shape}] with k odd")
    _checks.parameter(f"w_{name}", w, x, (c, 1, k, 1) if name == "h" else (c, 1, 1, k))
    _checks.parameter(f"b_{name}", b, x, (c,))


def triplet(
    x: Tensor, cw_weight: Tensor, hc_weight: Tensor, hw_weight: Tensor | None = None, *, cw_bias: Tensor | None = None, hc_bias: Tensor | None = None,
    hw_bias: Tensor | None = None, cw_norm: nn.Module | None = None, hc_norm: nn.Module | None = None, hw_norm: nn.Module | None = None,
    order: str = "max_mean", gate: str = "sigmoid", max_grad: str = "first", residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Triplet attention (Misra et al., 2021, arXiv:2010.03045): y = a(x * (s_cw + s_hc + s_hw) / 3 + residual), each s the gate
    f(norm(conv([max, mean]))) of one plane: [C, W] from statistics over h, [H, C] over w, [H, W] over c.

    All statistics come from one read of the map; no rotated copy of it is made.

    Args:
        x: [N, C, H, W]; float32, float16, bfloat16 or float64.
        cw_weight, hc_weight, hw_weight: [1, 2, k, k], k odd, 'same' padding; without hw_weight, the authors' no_spatial, y has the mean of two gates.
        cw_bias, hc_bias, hw_bias: [1] or None. cw_norm, hc_norm, hw_norm: as norm in `spatial_attention`.
        order: channels of the convolutions' inputs: "max_mean" (the authors' code) or "mean_max".
        gate, max_grad, residual, activation: as in `spatial_attention`, max_grad for all three maxima.

    Returns y, x's dtype, with the strides of torch.empty_like(x). Raises TypeError and ValueError naming the argument.
    """
    _common(x, gate, residual, activation)
    _checks.choice("order", order, ("max_mean", "mean_max"))
    _checks.choice("max_grad", max_grad, MAX_GRADS)
    check_convolution(x, cw_weight, cw_bias, cw_norm, 2, "cw_")
    check_convolution(x, hc_weight, hc_bias, hc_norm, 2, "hc_")
    if hw_weight is not None:
        check_convolution(x, hw_weight, hw_bias, hw_norm, 2, "hw_")
    elif hw_bias is not None or hw_norm is not None:
        raise ValueError(f"{'hw_norm' if hw_bias is None else 'hw_bias'}: got a value, expected None where hw_weight is None")

    def branch(stats: Tensor, weight: Tensor, bias: Tensor | None, norm: Any) -> Tensor:
        folded, spec, norm = fold(norm, x, Spec(order=order))
        logits = spatial_convolution(stats, weight, bias, *folded, spec=spec)
        return (logits if norm is None else norm(logits)).squeeze(1)

    def excite(rows: Tensor, columns: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        # columns lie [W, C]: the plane [C, W] turned over, and so is its kernel
        cw = branch(columns, cw_weight.transpose(2, 3), cw_bias, cw_norm)
        hc = branch(rows, hc_weight, hc_bias, hc_norm)
        return hc, cw, None if hw_weight is None else branch(pixels, hw_weight, hw_bias, hw_norm)

    return attend(x, excite, residual, AxisSpec(gate, "mean", hw_weight is not None, True, max_grad, activation))
