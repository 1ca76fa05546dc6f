"""The families of the channel gates: the gated map, the logits alone, and statistics and gate with torch modules between."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import reference
from .._library import Family
from .._relay import RelayGate, RelaySqueeze
from .._spec import Spec
from . import _excite
from ._launch import NO_NORM, NORM, Cotangent, Map, Norm, gate_backward_channel, gate_backward_input, gate_forward
from .gate import gate_family

# -- the gated map ---------------------------------------------------------------------------------------------------------------------------


# Inputs of every family: the map, the excite's parameters where it is fused, and the norm of the prologue, whose parameters get no gradient.
_NORM = tuple(f"{name}?" for name in NORM)


def _map(x, norm: Norm, spec: Spec) -> Map:
    return Map(x, norm=norm, before=spec.before, eps=spec.eps)


def _fake(x, w1, *rest) -> tuple[Tensor, ...]:
    return (torch.empty_like(x), *_excite.fake(x, w1, rest[-1]))


def _launch(x, w1, b1, w2, b2, *rest) -> tuple[Tensor, ...]:
    *norm, residual, spec = rest
    y, excited = _excite.gated(_map(x, norm, spec), (w1, b1, w2, b2), residual, spec)
    return (y, *excited)


def _backward(grads, inputs, saved, spec: Spec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    (g,) = grads
    x, params, norm, residual = inputs[0], inputs[1:5], inputs[5:9], inputs[9]
    m = _map(x, norm, spec)
    excited = _excite.Excited(*saved)
    cotangent = Cotangent(m, g, residual, spec)
    found: list[Tensor | None] = [None] * 10
    if any(needs[:5]):
        found[:5] = _excite.gated_backward(m, cotangent, params, excited, spec, needs[:5])
    elif needs[9]:
        gate_backward_channel(m, excited.logits, spec, cotangent=cotangent)
        cotangent.stored()
    if needs[9]:
        found[9] = cotangent.residual_grad(m, g, residual)
    return found


def _reference(x, w1, b1, w2, b2, *rest) -> tuple[Tensor, ...]:
    *norm, residual, spec = rest
    u = reference.prologue(x, norm, spec.before, spec.eps)
    logits = reference.broadcast_channels(_excite.plain(u, w1, b1, w2, b2, spec), u)
    return (reference.gate(u, logits, gate=spec.gate, residual=residual, activation=spec.activation).to(x.dtype),)


channel_gate = Family(
    "channel_gate",
    inputs=("x", *_excite.NAMES, *_NORM, "residual?"),
    outputs=("y", *_excite.RESULTS),
    differentiable=1,
    saved=_excite.RESULTS,
    batched=("x", "residual"),
    fake=_fake,
    launch=_launch,
    backward=_backward,
    reference=_reference,
)

# -- the logits alone ------------------------------------------------------------------------------------------------------------------------


def _squeeze_fake(x, w1, *rest) -> tuple[Tensor, ...]:
    spec = rest[-1]
    excited = _excite.fake(x, w1, spec)
    return (_squeeze_result(excited, spec).clone(memory_format=torch.contiguous_format), *excited)


def _squeeze_result(excited: _excite.Excited, spec: Spec) -> Tensor:
    return excited.z[:, : spec.pools.count("+") + 1] if spec.kind == "none" else excited.logits


def _squeeze_launch(x, w1, b1, w2, b2, *rest) -> tuple[Tensor, ...]:
    *norm, spec = rest
    excited = _excite.forward(_map(x, norm, spec), w1, b1, w2, b2, spec)
    # an op may not return one tensor twice
    return (_squeeze_result(excited, spec).clone(memory_format=torch.contiguous_format), *excited)


def _squeeze_backward(grads, inputs, saved, spec: Spec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    (dlogits,) = grads
    params = inputs[1:5]
    m = _map(inputs[0], inputs[5:], spec)
    excited = _excite.Excited(*saved)
    dlogits = dlogits.contiguous()
    found: list[Tensor | None] = [None] * 9
    dz: Tensor | None = dlogits
    if spec.kind != "none":
        dz, found[1:5] = _excite.backward(m, dlogits, params, excited, spec, needs[1:5], needs[0])
    if needs[0]:
        assert dz is not None
        found[0] = gate_backward_input(m, spec, pooled=(excited.z, dz, excited.aux))
    return found


def _squeeze_reference(x, w1, b1, w2, b2, *rest) -> tuple[Tensor, ...]:
    *norm, spec = rest
    return (_excite.plain(reference.prologue(x, norm, spec.before, spec.eps), w1, b1, w2, b2, spec),)


channel_squeeze = Family(
    "channel_squeeze",
    inputs=("x", *_excite.NAMES, *_NORM),
    outputs=("result", *_excite.RESULTS),
    differentiable=1,
    saved=_excite.RESULTS,
    batched=("x",),
    fake=_squeeze_fake,
    launch=_squeeze_launch,
    backward=_squeeze_backward,
    reference=_squeeze_reference,
)

# -- the statistics, and their gate, with torch modules between ------------------------------------------------------------------------------


def _relay_fake(x, *rest) -> tuple[Tensor, ...]:
    spec = rest[-1]
    _, z, _, aux = _excite.fake(x, None, spec)
    result = z.new_empty((z.shape[0], spec.pools.count("+") + 1, z.shape[2]))
    return result, *_relay_slots(x, z), z, aux


def _relay_slots(x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    return RelaySqueeze.slot(x), RelaySqueeze.slot(z.select(1, 0)), RelaySqueeze.slot(x.narrow(1, 0, 1), z.dtype), RelaySqueeze.slot(x)


def _relay_launch(x, *rest) -> tuple[Tensor, ...]:
    *norm, spec = rest
    excited = _excite.forward(_map(x, norm, spec), None, None, None, None, spec)
    return _squeeze_result(excited, spec).clone(), *_relay_slots(x, excited.z), excited.z, excited.aux


def _relay_backward(grads, inputs, saved, spec: Spec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    dz, da, logits, spatial, through = grads
    z, aux = saved
    m = _map(inputs[0], inputs[1:], spec)
    pooled = None if dz is None else (z, dz.contiguous(), aux)
    cotangent = None if da is None else Cotangent(m, da, None, Spec())
    logits, spatial = (None if t is None else t.contiguous() for t in (logits, spatial))
    dx = gate_backward_input(m, spec, cotangent=cotangent, logits=logits, spatial=spatial, pooled=pooled, through=through)
    return [dx, *NO_NORM]


def _relay_share(da: Tensor, inputs: Sequence[Tensor | None], logits: Tensor, spatial: Tensor | None, spec: Spec) -> Sequence[Tensor | None]:
    x, *norm = inputs
    u, vjp = torch.func.vjp(lambda x: reference.prologue(x, norm, spec.before, spec.eps), x)  # type: ignore[misc]
    (du,) = gate_family.reference(da.to(u.dtype), logits, spatial, None, None, spec._replace(activation="none"))
    return vjp(du)


def _relay_gate_launch(x, *rest) -> tuple[Tensor, ...]:
    *norm, logits, residual, _, _, spec = rest
    return (gate_forward(_map(x, norm, spec), logits.contiguous(), None, residual, spec),)


def _relay_gate_backward(grads, inputs, saved, spec: Spec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """da and the gradient of the logits."""
    x, *norm, logits, residual, _, _ = inputs
    m = _map(x, norm, spec)
    cotangent = Cotangent(m, grads[0], residual, spec)
    if needs[0]:
        cotangent.da = m.empty()
    dlogits = gate_backward_channel(m, logits.contiguous(), spec, cotangent=cotangent, dtype=logits.dtype)
    return None if cotangent.da is None else m.output(cotangent.da), *NO_NORM, dlogits, None, None, None


def _relay_gate_reference(x, *rest) -> tuple[Tensor, ...]:
    *norm, logits, residual, _, _, spec = rest
    u = reference.prologue(x, norm, spec.before, spec.eps)
    logits = reference.broadcast_channels(logits, u)
    return (reference.gate(u, logits, gate=spec.gate, residual=residual, activation=spec.activation).to(x.dtype),)


channel_relay = RelaySqueeze(
    "channel_relay",
    inputs=("x", *_NORM),
    outputs=("result", "map_slot", "logits_slot", "spatial_slot", "through_slot", "z", "aux"),
    differentiable=5,
    saved=("z", "aux"),
    batched=("x",),
    fake=_relay_fake,
    launch=_relay_launch,
    backward=_relay_backward,
    reference=lambda x, *rest: _squeeze_reference(x, None, None, None, None, *rest),
    share=_relay_share,
)
channel_relay_gate = RelayGate(
    "channel_relay_gate",
    inputs=("x", *_NORM, "logits", "residual?", "map_slot?", "logits_slot?"),
    outputs=("y",),
    differentiable=1,
    saved=(),
    batched=("x", "logits", "residual", "map_slot", "logits_slot"),
    fake=lambda x, *rest: (torch.empty_like(x),),
    launch=_relay_gate_launch,
    backward=_relay_gate_backward,
    reference=_relay_gate_reference,
)


def attend(x: Tensor, excite: Callable[[Tensor], Tensor], residual: Tensor | None, spec: Spec, norm: Norm = NO_NORM) -> Tensor:
    """y = a(u * f(excite(z)) + residual): torch modules between the statistics z [N, K, C] and the logits [N, C], and dx still written once."""
    z, *slots = channel_relay(x, *norm, spec=spec)
    logits = excite(z)
    if not slots:  # the squeeze took the reference
        return _relay_gate_reference(x, *norm, logits, residual, None, None, spec)[0]
    return channel_relay_gate(x, *norm, logits, residual, *slots[:2], spec=spec)
