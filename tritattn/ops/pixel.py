"""Gates of single positions: sSE, and scSE, which adds a channel gate to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference, tuning
from .._library import Family
from .._spec import Spec
from . import _checks, _excite
from ._group import Groups
from ._launch import Cotangent, Map, counters, gate_backward_input, kernels, matrix
from .channel import mlp_kind


def _pixel_forward(m: Map, w, b, logits: Tensor | None, residual: Tensor | None, spec: Spec) -> tuple[Tensor, Tensor]:
    """(y, q [N, HW]); q before its gate."""
    y = m.empty()
    q = m.small(m.n, m.hw)
    args = (m.x, matrix(w), b, logits, m.same(residual), y, q)
    flags = dict(
        GATE=spec.gate, SPATIAL=spec.spatial_gate, HAS_CHANNEL=logits is not None, COMBINE=spec.combine, HAS_B=b is not None,
        HAS_RESIDUAL=residual is not None, ACTIVATION=spec.activation,
    )  # fmt: skip
    config = m.config("pixel")
    if config.group and not m.channels_last:
        if not Groups(m, config).launched(kernels().pixel_gate_group_fwd_kernel, *args, **flags):
            return _pixel_forward(m, w, b, logits, residual, spec)
    else:
        programs = m.n * -(-m.hw // config.block_p)
        kernels().pixel_gate_fwd_kernel[(programs,)](*args, **m.args, **flags, RESIDENT=config.block_c >= m.c, **config.args)
    return m.output(y), q


def _pixel_backward(
    m: Map, w: Tensor, logits: Tensor | None, q: Tensor, spec: Spec, cotangent: Cotangent, dx: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dq [N, HW], dw [C], gradient of the channel logits [N, C]); stores da into the cotangent, and dx where it is given."""
    dq = m.small(m.n, m.hw)
    channel = logits is not None
    dlogits = m.small(m.n, m.c) if channel else None
    args = dict(x_ptr=m.x, w_ptr=matrix(w), logits_ptr=logits, q_ptr=q, da_ptr=cotangent.da, dx_ptr=dx, dq_ptr=dq, dlogits_ptr=dlogits)
    flags = dict(
        GATE=spec.gate, SPATIAL=spec.spatial_gate, HAS_CHANNEL=channel, COMBINE=spec.combine, STORE_DA=cotangent.da is not None,
        STORE_DX=dx is not None,
    )  # fmt: skip
    config = m.config("pixel", maps=2)
    if config.group and not m.channels_last:
        dw = m.small(m.n, m.c)
        if not Groups(m, config).launched(kernels().pixel_gate_group_bwd_kernel, **args, dw_part_ptr=dw, **cotangent.args(), **flags):
            return _pixel_backward(m, w, logits, q, spec, cotangent, dx)
    else:
        resident = config.block_c >= m.c
        groups = config.splits if resident else -(-m.hw // config.block_p)
        dw = m.small(m.n * groups, m.c)
        kernels().pixel_gate_bwd_kernel[(m.n * groups,)](
            **args, dw_part_ptr=dw, ds_part_ptr=m.small(m.n, groups, m.c) if channel else None, counter_ptr=counters(m.x, m.n) if channel else None,
            groups=groups, **m.args, **cotangent.args(), **flags, RESIDENT=resident, **config.args,
        )  # fmt: skip
    return dq, dw.sum(0), dlogits


def _like(t: Tensor, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else t.to(parameter.dtype).view(parameter.shape)


# -- sSE -------------------------------------------------------------------------------------------------------------------------------------


def _sse_fake(x, w, b, residual, spec: Spec) -> tuple[Tensor, ...]:
    return torch.empty_like(x), x.new_empty((x.shape[0], x.shape[2] * x.shape[3]), dtype=reference.accumulator(x.dtype))


def _sse_backward(grads, inputs, saved, spec: Spec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    (g,) = grads
    x, w, b, residual = inputs
    m = Map(x)
    cotangent = Cotangent(m, g, residual, spec)
    found: list[Tensor | None] = [None] * 4
    if any(needs[:3]) or cotangent.da is not None:
        dx = m.empty() if needs[0] else None
        dq, dw, _ = _pixel_backward(m, w, None, saved[0], spec, cotangent, dx)
        found[0] = None if dx is None else m.output(dx)
        found[1] = _like(dw, w) if needs[1] else None
        found[2] = _like(dq.sum(), b) if needs[2] else None
        cotangent.stored()
    if needs[3]:
        found[3] = cotangent.residual_grad(m, g, residual)
    return found


def _sse_reference(x, w, b, residual, spec: Spec) -> tuple[Tensor, ...]:
    return (reference.gate(x, reference.pixel_logits(x, w, b), gate=spec.spatial_gate, residual=residual, activation=spec.activation),)


pixel_gate = Family(
    "pixel_gate",
    inputs=("x", "w", "b?", "residual?"),
    outputs=("y", "q"),
    differentiable=1,
    saved=("q",),
    batched=("x", "residual"),
    fake=_sse_fake,
    launch=lambda x, w, b, residual, spec: _pixel_forward(Map(x), w, b, None, residual, spec),
    backward=_sse_backward,
    reference=_sse_reference,
)

# -- scSE ------------------------------------------------------------------------------------------------------------------------------------


def _scse_fake(x, w1, b1, w2, b2, w, b, residual, spec: Spec) -> tuple[Tensor, ...]:
    return (*_sse_fake(x, w, b, residual, spec), *_excite.fake(x, w1, spec))


def _scse_launch(x, w1, b1, w2, b2, w, b, residual, spec: Spec) -> tuple[Tensor, ...]:
    m = Map(x)
    params = [matrix(t) for t in (w1, b1, w2, b2)]
    config, pixel = m.config("ticket"), m.config("pixel")
    # in one launch with the squeeze, whose registers are limited
    block_p = pixel.block_p // 2 if x.element_size() > 2 else pixel.block_p
    wide = m.channels_last or block_p * x.element_size() >= tuning.SECTOR
    ticket = _excite.ticketed(m, params[0], params[2], -(-m.hw // block_p)) if pixel.block_c >= m.c and not pixel.group and wide else None
    if ticket is None:
        excited = _excite.forward(m, w1, b1, w2, b2, spec)
        return (*_pixel_forward(m, w, b, excited.logits, residual, spec), *excited)
    grid, args = ticket
    excited, y, q = _excite.fake(m.x, w1, spec), m.empty(), m.small(m.n, m.hw)
    kernels().concurrent_gate_ticket_fwd_kernel[grid](
        **_excite.arguments(m, excited, params, spec, config, True), **args, w_ptr=matrix(w), b_ptr=b, residual_ptr=m.same(residual), y_ptr=y,
        q_ptr=q, GATE=spec.gate, SPATIAL=spec.spatial_gate, COMBINE=spec.combine, HAS_B=b is not None, HAS_RESIDUAL=residual is not None,
        ACTIVATION=spec.activation, OTHER_C=pixel.block_c, OTHER_P=block_p,
    )  # fmt: skip
    return m.output(y), q, *excited


def _scse_backward(grads, inputs, saved, spec: Spec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    (g,) = grads
    x, w1, b1, w2, b2, w, b, residual = inputs
    q, *rest = saved
    m = Map(x)
    excited = _excite.Excited(*rest)
    cotangent = Cotangent(m, g, residual, spec)
    found: list[Tensor | None] = [None] * 8
    if any(needs[:7]) or cotangent.da is not None:
        dq, dw, dlogits = _pixel_backward(m, w, excited.logits, q, spec, cotangent, None)
        assert dlogits is not None
        found[5] = _like(dw, w) if needs[5] else None
        found[6] = _like(dq.sum(), b) if needs[6] else None
        cotangent.stored()
        if any(needs[:5]):
            dz, found[1:5] = _excite.backward(m, dlogits, (w1, b1, w2, b2), excited, spec, needs[1:5], needs[0])
            if needs[0]:
                assert dz is not None
                found[0] = gate_backward_input(
                    m, spec, cotangent=cotangent, logits=excited.logits, spatial=q, pooled=(excited.z, dz, excited.aux),
                    pixel=(matrix(w), dq),
                )  # fmt: skip
    if needs[7]:
        found[7] = cotangent.residual_grad(m, g, residual)
    return found


def _scse_reference(x, w1, b1, w2, b2, w, b, residual, spec: Spec) -> tuple[Tensor, ...]:
    logits = reference.broadcast_channels(_excite.plain(x, w1, b1, w2, b2, spec), x)
    s, q = reference.GATES[spec.gate](logits), reference.GATES[spec.spatial_gate](reference.pixel_logits(x, w, b))
    return (reference.finish(reference.concurrent(x, s, q, spec.combine), x, residual, spec.activation),)


concurrent_gate = Family(
    "concurrent_gate",
    inputs=("x", *_excite.NAMES, "w", "b?", "residual?"),
    outputs=("y", "q", *_excite.RESULTS),
    differentiable=1,
    saved=("q", *_excite.RESULTS),
    batched=("x", "residual"),
    fake=_scse_fake,
    launch=_scse_launch,
    backward=_scse_backward,
    reference=_scse_reference,
)


def _check(x: Tensor, w: Tensor, b: Tensor | None, gate: str, residual: Tensor | None, activation: str) -> None:
    _checks.feature_map(x)
    _checks.residual(residual, x)
    _checks.choice("activation", activation, reference.ACTIVATIONS)
    _checks.choice("gate", gate, reference.GATES)
    _checks.required("w", w)
    c = x.shape[1]
    _checks.parameter("w", w, x, (1, c, 1, 1), (1, c))
    _checks.parameter("b", b, x, (1,))


def sse(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, gate: str = "sigmoid", residual: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """Spatial squeeze and excitation (Roy et al., 2018, arXiv:1803.02579): y = a(x * f(q) + residual), q[n, h, w] = sum_c w_c x[n, c, h, w] + b.

    One launch; the map is read once up to 2048 channels. Args: x: [N, C, H, W]; w: [1, C, 1, 1] or [1, C]; b: [1] or None; gate: f, one of sigmoid,
    hard_sigmoid, relu, none; residual: of x's shape and dtype; activation: a, one of none, relu, silu, hardswish, gelu.
    Returns y, x's dtype, with the strides of torch.empty_like(x). Raises TypeError and ValueError naming the argument.
    """
    _check(x, w, b, gate, residual, activation)
    return pixel_gate(x, w, b, residual, spec=Spec(spatial_gate=gate, activation=activation))


def scse(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, w: Tensor, b: Tensor | None = None, *, hidden: str = "relu",
    gate: str = "sigmoid", combine: str = "sum", residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Concurrent spatial and channel squeeze and excitation: y = a(combine(x * s, x * f(q)) + residual), s the gate of `cse`, q the logits of `sse`.

    combine: "sum" (Roy et al., 2018, arXiv:1803.02579) or "max", element-wise (the 2019 follow-up, arXiv:1808.08127, and the authors' code; a tie's
    gradient is shared, as in torch.maximum). w1, b1, w2, b2, hidden as in `se`; w, b as in `sse`; gate: f, for both. Result and errors as in `sse`.
    """
    _check(x, w, b, gate, residual, activation)
    _checks.choice("combine", combine, ("sum", "max"))
    _checks.required("w1", w1)
    kind = mlp_kind(x, w1, b1, w2, b2, hidden)
    spec = Spec("avg", kind, hidden, gate, gate, combine=combine, activation=activation)
    return concurrent_gate(x, w1, b1, w2, b2, w, b, residual, spec=spec)
