"""The global context block: the mean of the map under a softmax over its positions, small networks on it, and the map scaled or shifted by them.

The networks are torch modules, so these are two ops, `context_squeeze` and `context_gate`, joined as a relay: the map's gradient is written once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .._relay import RelayGate, RelaySqueeze
from .._spec import Spec
from ..tuning import Config
from . import _checks, _excite
from ._group import Groups
from ._launch import Cotangent, Map, counters, gate_backward_channel, gate_backward_input, gate_forward, kernels, matrix
from ._networks import Network, called, network

# -- the squeeze -----------------------------------------------------------------------------------------------------------------------------


def _fake(x, w, b, spec: Spec) -> tuple[Tensor, ...]:
    n, c, *size = x.shape
    acc = reference.accumulator(x.dtype)
    context = x.new_empty((n, c), dtype=acc)
    logits = x.new_empty((n, size[0] * size[1]) if w is not None else (0,), dtype=acc)
    softmax = x.new_empty((n, 2) if w is not None else (0,), dtype=acc)
    return context, RelaySqueeze.slot(x), RelaySqueeze.slot(context), logits, softmax


def _groups(m: Map, config: Config) -> tuple[int, dict]:
    """(programs of an image, the kernels' arguments about them)."""
    resident = config.block_c >= m.c
    groups = config.splits if resident else -(-m.hw // config.block_p)
    return groups, dict(m.args, groups=groups, RESIDENT=resident, **config.args)  # fmt: skip


def _launch(x, w, b, spec: Spec) -> tuple[Tensor, ...]:
    m = Map(x)
    context, map_slot, scale_slot, logits, softmax = _fake(m.x, w, b, spec)
    if w is None:
        context = _excite.forward(m, None, None, None, None, Spec()).z[:, 0]
    else:
        config, args = m.config("context"), (m.x, matrix(w), b, logits, softmax, context)
        if config.group and not m.channels_last:
            if not Groups(m, config).launched(kernels().context_group_fwd_kernel, *args, HAS_B=b is not None):
                return _launch(x, w, b, spec)
        else:
            groups, more = _groups(m, config)
            kernels().context_fwd_kernel[(m.n * groups,)](
                *args, m.small(m.n, groups, m.c), m.small(m.n, groups, 2), counters(m.x, m.n), **more, HAS_B=b is not None
            )
    return context, map_slot, scale_slot, logits, softmax


def _backward(grads, inputs, saved, spec: Spec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """With da (what flows through the gate) and the gate's scale, dx also holds the gate's share."""
    dcontext, da, scale = grads
    x, w, b = inputs
    context, logits, softmax = saved
    m = Map(x)
    dcontext = torch.zeros_like(context) if dcontext is None else dcontext.contiguous()
    scale = None if scale is None else scale.contiguous()
    if w is None:
        cotangent = None if da is None else Cotangent(m, da, None, Spec())
        pooled = (context[:, None], dcontext[:, None], None)
        return gate_backward_input(m, Spec(gate=spec.gate), cotangent=cotangent, logits=scale, pooled=pooled), None, None
    dx = m.empty() if needs[0] else None
    args = (m.same(da), m.x, matrix(w), logits, softmax, context, dcontext, scale, dx)
    flags = dict(GATE=spec.gate, HAS_DA=da is not None, HAS_SCALE=scale is not None, STORE_DX=needs[0])
    config = m.config("context_bwd")
    if config.group and not m.channels_last:
        dw, db = m.small(m.n, 1, m.c), m.small(m.n, m.hw)
        if not Groups(m, config).launched(kernels().context_group_bwd_kernel, *args, dw, db, **flags):
            return _backward(grads, inputs, saved, spec, needs)
    else:
        groups, more = _groups(m, config)
        dw, db = m.small(m.n, groups, m.c), m.small(m.n, groups)
        kernels().context_bwd_kernel[(m.n * groups,)](*args, dw, db, **more, **flags)
    return (
        None if dx is None else m.output(dx),
        dw.sum((0, 1)).to(w.dtype).view(w.shape) if needs[1] else None,
        db.sum().to(b.dtype).view(b.shape) if needs[2] else None,
    )


def _share(da: Tensor, inputs: Sequence[Tensor], scale: Tensor | None, spec: Spec) -> tuple[Tensor, ...]:
    """The gate's share of dx: da f(scale)."""
    return _gate_reference(da, scale, None, None, None, None, spec._replace(activation="none"))


context_squeeze = RelaySqueeze(
    "context_squeeze",
    inputs=("x", "w?", "b?"),
    outputs=("context", "map_slot", "scale_slot", "logits", "softmax"),
    differentiable=3,
    saved=("context", "logits", "softmax"),
    batched=("x",),
    fake=_fake,
    launch=_launch,
    backward=_backward,
    reference=lambda x, w, b, spec: (reference.context(x, w, b),),
    share=_share,
)

# -- the gate --------------------------------------------------------------------------------------------------------------------------------


def _gate_launch(x, scale, shift, residual, map_slot, scale_slot, spec: Spec) -> tuple[Tensor, ...]:
    return (gate_forward(Map(x), matrix(scale), None, residual, spec, matrix(shift)),)


def _gate_backward(grads, inputs, saved, spec: Spec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """da and the gradients of scale and shift."""
    (g,) = grads
    x, scale, shift, residual, *_ = inputs
    scale, shift = matrix(scale), matrix(shift)
    m = Map(x)
    cotangent = Cotangent(m, g, residual, spec)
    if needs[0]:
        cotangent.da = m.empty()
    dscale = dshift = None
    if shift is None:
        dscale = gate_backward_channel(m, scale, spec, cotangent=cotangent, dtype=scale.dtype)
    else:
        config = m.config("channel")
        blocks_c = -(-m.c // config.block_c)
        dshift = torch.empty_like(shift)
        dscale = None if scale is None else torch.empty_like(scale)
        kernels().shifted_gate_bwd_kernel[(m.n * blocks_c * config.splits,)](
            x_ptr=m.x, scale_ptr=scale, shift_ptr=shift, part_ptr=m.small(m.n, config.splits, 2, m.c), counter_ptr=counters(m.x, m.n * blocks_c),
            da_ptr=cotangent.da, dscale_ptr=dscale, dshift_ptr=dshift, **m.args, **cotangent.args(), SPLITS=config.splits, GATE=spec.gate,
            HAS_SCALE=scale is not None, STORE_DA=cotangent.da is not None, **config.args,
        )  # fmt: skip
    return None if cotangent.da is None else m.output(cotangent.da), dscale, dshift, None, None, None


def _gate_reference(x, scale, shift, residual, map_slot, scale_slot, spec: Spec) -> tuple[Tensor, ...]:
    gated = x.to(reference.accumulator(x.dtype))
    if scale is not None:
        gated = gated * reference.broadcast_channels(reference.GATES[spec.gate](scale.to(gated.dtype)), x)
    if shift is not None:
        gated = gated + reference.broadcast_channels(shift.to(gated.dtype), x)
    return (reference.finish(gated, x, residual, spec.activation),)


context_gate = RelayGate(
    "context_gate",
    inputs=("x", "scale?", "shift?", "residual?", "map_slot?", "scale_slot?"),
    outputs=("y",),
    differentiable=1,
    saved=(),
    batched=("x", "scale", "shift", "residual", "map_slot", "scale_slot"),
    fake=lambda x, scale, shift, residual, map_slot, scale_slot, spec: (torch.empty_like(x),),
    launch=_gate_launch,
    backward=_gate_backward,
    reference=_gate_reference,
)

# -- the public function ---------------------------------------------------------------------------------------------------------------------

def gc(
    x: Tensor, w: Tensor | None, b: Tensor | None = None, *, add: Network | None = None, scale: Network | None = None, gate: str = "sigmoid",
    residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Global context (Cao et al., 2019, arXiv:1904.11492): y = a(x * f(scale(ctx)) + add(ctx) + residual), with
    ctx[n, c] = sum_p softmax_p(sum_c w_c x[n, c, p] + b) x[n, c, p], from one read of the map up to 2048 channels. An image of a contiguous map
    whose rows are short and many (512 x 14 x 14 and more) is held by programs that wait for each other, on NVIDIA's GPUs; on others it is read twice,
    and backward too.

    Args:
        x: [N, C, H, W]; float32, float16, bfloat16 or float64.
        w: [1, C, 1, 1] or [1, C], or None for the plain mean over positions; b: [1] or None. The softmax makes b's gradient zero, to rounding.
        add, scale: modules or functions from the context [N, C, 1, 1] to [N, C, 1, 1], at least one of them; they get the context in the dtype of
            their parameters, or in fp32 (fp64 for fp64 maps). The paper's block has `add`, timm's "gc" has `scale` and its "gca" has `add`.
        gate: f, one of sigmoid, hard_sigmoid, relu, none.
        residual: of x's shape and dtype. activation: a, one of none, relu, silu, hardswish, gelu.

    Returns y, x's dtype, with the strides of torch.empty_like(x). Raises TypeError and ValueError naming the argument.
    """
    _checks.feature_map(x)
    _checks.residual(residual, x)
    _checks.choice("activation", activation, reference.ACTIVATIONS)
    _checks.choice("gate", gate, reference.GATES)
    c = x.shape[1]
    _checks.parameter("w", w, x, (1, c, 1, 1), (1, c))
    if w is None and b is not None:
        raise ValueError("b: got a bias without w, expected None")
    _checks.parameter("b", b, x, (1,))
    network("add", add, optional=True)
    network("scale", scale, optional=True)
    if add is None and scale is None:
        raise ValueError("add: got None, and None for scale, expected a network for one of them")
    spec = Spec(gate=gate, activation=activation)
    context, *slots = context_squeeze(x, w, b, spec=spec)
    z = context.view(*context.shape, 1, 1)
    factor = None if scale is None else called("scale", scale, z, z.shape).flatten(1)
    shift = None if add is None else called("add", add, z, z.shape).flatten(1)
    if not slots:  # the squeeze took the reference
        return _gate_reference(x, factor, shift, residual, None, None, spec)[0]
    return context_gate(x, factor, shift, residual, *slots, spec=spec)
