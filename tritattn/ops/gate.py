"""The gate alone: weights that somebody else computed, applied to the map in one pass with residual and activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._library import Family
from .._spec import Spec
from . import _checks
from ._launch import Cotangent, Map, gate_backward_channel, gate_backward_column, gate_forward, kernels

# Weights reach the kernels in one of three forms: channel logits [N, C], spatial logits [N, 1, H, W] (both may be given), or weights [...] broadcast
# to x by strides.


def _broadcast(m: Map, weights: Tensor) -> dict[str, Any]:
    """The kernels' arguments for weights broadcast to the map: those of its shape in its layout, others by their strides, with the last spatial
    dimension apart from the others; a copy only where the others do not merge."""
    dense = weights.shape == m.x.shape
    last = m.x.shape[-1]
    wide = m.same(weights) if dense else weights.expand(m.x.shape)
    assert wide is not None
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if not dense:
        try:
            wide = wide.view(m.n, m.c, -1, last)
        except RuntimeError:
            wide = wide.reshape(m.n, m.c, -1, last)
        strides = wide.stride()
    return dict(zip(("w_n", "w_c", "w_h", "w_w"), strides, strict=True), W=last, DENSE=dense, weights_ptr=wide)


def _launch(x, logits, spatial, weights, residual, spec: Spec) -> tuple[Tensor, ...]:
    m = Map(x)
    if weights is None:
        return (gate_forward(m, _dense(logits), _dense(spatial), residual, spec),)
    y = m.empty()
    config = m.config("tile")
    programs = m.n * -(-m.c // config.block_c) * -(-m.hw // config.block_p)
    kernels().broadcast_gate_fwd_kernel[(programs,)](
        x_ptr=m.x, residual_ptr=m.same(residual), y_ptr=y, **m.args, **_broadcast(m, weights), GATE=spec.gate,
        HAS_RESIDUAL=residual is not None, ACTIVATION=spec.activation, **config.args,
    )  # fmt: skip
    return (m.output(y),)


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _backward(grads, inputs, saved, spec: Spec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    (g,) = grads
    x, logits, spatial, weights, residual = inputs
    m = Map(x)
    cotangent = Cotangent(m, g, residual, spec)
    found: list[Tensor | None] = [None] * 5
    dx = m.empty() if needs[0] else None
    if any(needs[:4]) or cotangent.da is not None:
        if weights is not None:
            found[3] = _broadcast_backward(m, weights, spec, cotangent, dx, needs[3])
        elif spatial is not None:
            dtype = logits.dtype if logits is not None else None
            found[2], found[1] = gate_backward_column(m, _dense(logits), spatial.contiguous(), spec, cotangent, dx, dtype)
        else:
            found[1] = gate_backward_channel(m, logits.contiguous(), spec, cotangent=cotangent, dx=dx, dtype=logits.dtype)
        cotangent.stored()
    found[0] = None if dx is None else m.output(dx)
    if needs[4]:
        found[4] = cotangent.residual_grad(m, g, residual)
    return found


def _broadcast_backward(m: Map, weights: Tensor, spec: Spec, cotangent: Cotangent, dx: Tensor | None, need: bool) -> Tensor | None:
    # summed over the broadcast dimensions by torch, so kept in the accumulator's dtype where there is something to sum
    whole = weights.shape == m.x.shape
    dw = torch.empty_like(m.x, dtype=weights.dtype if whole else m.acc) if need else None
    config = m.config("tile")
    programs = m.n * -(-m.c // config.block_c) * -(-m.hw // config.block_p)
    kernels().broadcast_gate_bwd_kernel[(programs,)](
        x_ptr=m.x, da_ptr=cotangent.da, dx_ptr=dx, dweights_ptr=dw, **m.args, **_broadcast(m, weights), **cotangent.args(), GATE=spec.gate,
        STORE_DA=cotangent.da is not None, STORE_DX=dx is not None, STORE_DW=need, **config.args,
    )  # fmt: skip
    return None if dw is None else dw.sum_to_size(weights.shape).to(weights.dtype)


def _reference(x, logits, spatial, weights, residual, spec: Spec) -> tuple[Tensor, ...]:
    if weights is not None:
        return (reference.gate(x, weights, gate=spec.gate, residual=residual, activation=spec.activation),)
    acc = reference.accumulator(x.dtype)
    if spec.joint:
        factor = reference.joint_factor(reference.broadcast_channels(logits.to(acc), x), spatial.to(acc), spec.combine, spec.joint)
        return (reference.apply_factor(x, factor, residual, spec.activation),)
    factors = []
    if logits is not None:
        factors.append(reference.GATES[spec.gate](reference.broadcast_channels(logits.to(acc), x)))
    if spatial is not None:
        factors.append(reference.GATES[spec.spatial_gate](spatial.to(acc)))
    factor = factors[0] if len(factors) == 1 else factors[0] * factors[1]
    return (reference.apply_factor(x, factor, residual, spec.activation),)


gate_family = Family(
    "gate",
    inputs=("x", "logits?", "spatial?", "weights?", "residual?"),
    outputs=("y",),
    differentiable=1,
    saved=(),
    batched=("x", "logits", "spatial", "weights", "residual"),
    fake=lambda x, logits, spatial, weights, residual, spec: (torch.empty_like(x),),
    launch=_launch,
    backward=_backward,
    reference=_reference,
)


def gate(x: Tensor, weights: Tensor, *, gate: str = "none", residual: Tensor | None = None, activation: str = "none") -> Tensor:
    """y = a(x * f(weights) + residual) in one pass over the map, for weights that any module computed.

    Args:
        x: [N, C, *spatial] with one to three spatial dimensions; float32, float16, bfloat16 or float64.
        weights: broadcastable to x; floating, its dtype may differ from x's. [N, C, 1, ...] and [N, 1, H, W] take the fewest passes in backward.
        gate: f, one of sigmoid, hard_sigmoid, relu, none. residual: of x's shape and dtype. activation: a, one of none, relu, silu, hardswish, gelu.

    Returns: y, x's dtype, with the strides of torch.empty_like(x).
    Raises: TypeError for a wrong dtype or layout, ValueError for a wrong shape, device or option; both name the argument.
    """
    _checks.feature_map(x, ranks=(3, 4, 5))
    _checks.residual(residual, x)
    _checks.choice("gate", gate, reference.GATES)
    _checks.choice("activation", activation, reference.ACTIVATIONS)
    _checks.required("weights", weights)
    _checks.floating("weights", weights)
    if weights.device != x.device:
        raise ValueError(f"weights: got a tensor on {weights.device}, expected {x.device}, the device of x")
    # no `in` here, see _checks.parameter
    fits = weights.dim() <= x.dim() and all(w == 1 or w == s for w, s in zip(reversed(weights.shape), reversed(x.shape), strict=False))
    if not fits:
        raise ValueError(f"weights: got shape {list(weights.shape)}, expected one broadcastable to {list(x.shape)}, the shape of x")
    channels = (x.shape[0], x.shape[1]) + (1,) * (x.dim() - 2)
    if weights.shape == channels:
        return gate_family(x, weights.flatten(1), None, None, residual, spec=Spec(gate=gate, activation=activation))
    if x.dim() == 4 and weights.shape == (x.shape[0], 1, *x.shape[2:]):
        return gate_family(x, None, weights, None, residual, spec=Spec(spatial_gate=gate, activation=activation))
    return gate_family(x, None, None, weights, residual, spec=Spec(gate=gate, activation=activation))
