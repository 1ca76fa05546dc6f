"""The families of the selection among branches.

Two plain layers between the squeeze of the branches' sum and their weighted sum are part of one op, `select`. Others (with a BatchNorm that trains,
in groups, or with hooks) are torch's, between two ops, a relay: `select_squeeze` and `select_gate`. Neither the branches' stack nor their sum is
stored, and every branch's gradient is written once, in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._library import Family
from .._relay import RelayGate, RelaySqueeze
from .._spec import Spec
from . import _excite
from ._launch import NORM, Map, counters, kernels, matrix

POINTERS = 4  # maps that one launch takes; more are selected among in groups
MAPS = ("x", *(f"x{k}" for k in range(1, POINTERS)))
INPUTS = ("x", *(f"{name}?" for name in (*MAPS[1:], *NORM)))


class SelectSpec(NamedTuple):
    """The options of all three ops."""

    branches: int  # K
    sliced: bool = False  # slices of one map's channels
    groups: int = 1  # of the logits: [N, groups, K, C / groups]
    gate: str = "softmax"
    before: str = "none"  # activation of the branches
    activation: str = "none"
    eps: str = ""  # of the BatchNorm that is part of the passes
    hidden: str = "none"  # activation between the layers of `select`


# -- plain torch -----------------------------------------------------------------------------------------------------------------------------


def _branches(inputs: Sequence[Tensor | None], spec: SelectSpec) -> list[Tensor]:
    """U_k, in the accumulator's dtype."""
    maps = [t.to(reference.accumulator(t.dtype)) for t in inputs[:POINTERS] if t is not None]
    norm = inputs[POINTERS : POINTERS + len(NORM)]
    maps = [reference.prologue(t, norm, spec.before, spec.eps) for t in maps]
    return list(maps[0].chunk(spec.branches, 1)) if spec.sliced else maps


def selection_weights(logits: Tensor, spec: SelectSpec) -> Tensor:
    """w [N, K, C] from the logits [N, groups, K, C / groups]."""
    n, width, k = logits.shape[0], logits.shape[1] // spec.branches, spec.branches
    ordered = logits.view(n, spec.groups, k, width // spec.groups).transpose(1, 2).reshape(n, k, width)
    return ordered.softmax(1) if spec.gate == "softmax" else reference.GATES[spec.gate](ordered)


def _squeeze_reference(*args: Any) -> tuple[Tensor, ...]:
    *inputs, spec = args
    means = [u.flatten(2).mean(2) for u in _branches(inputs, spec)]
    return (sum(means[1:], means[0]),)


def gate_reference(*args: Any) -> tuple[Tensor, ...]:
    *inputs, logits, residual, _, _, spec = args
    branches = _branches(inputs, spec)
    weights = selection_weights(logits.to(branches[0].dtype), spec).unbind(1)
    total = branches[0] * reference.broadcast_channels(weights[0], branches[0])
    for u, w in zip(branches[1:], weights[1:], strict=True):
        total = torch.addcmul(total, u, reference.broadcast_channels(w, u))
    return (reference.finish(total, inputs[0], residual, spec.activation),)


def _share(da: Tensor, inputs: Sequence[Tensor | None], logits: Tensor, spec: SelectSpec) -> list[Tensor | None]:
    """The gate's share of each map's gradient."""
    maps = [t for t in inputs[:POINTERS] if t is not None]
    rest = inputs[POINTERS:]
    absent = (None,) * (POINTERS - len(maps))

    def gated(*maps: Tensor) -> Tensor:
        return gate_reference(*maps, *absent, *rest, logits, None, None, None, spec._replace(activation="none"))[0]

    return [*torch.func.vjp(gated, *maps)[1](da), *absent]


# -- launches --------------------------------------------------------------------------------------------------------------------------------


def _map(inputs: Sequence[Any], spec: SelectSpec) -> Map:
    return Map(inputs[0], spec.branches if spec.sliced else 1, inputs[POINTERS : POINTERS + len(NORM)], spec.before, spec.eps)


def _arguments(m: Map, inputs: Sequence[Tensor | None], spec: SelectSpec) -> dict[str, Any]:
    """What every kernel takes: the maps in m's layout, and what comes before the selection."""
    pointers = dict(zip((f"{name}_ptr" for name in MAPS), (m.x, *(m.same(t) for t in inputs[1:POINTERS])), strict=True))
    return dict(**pointers, **m.args, **m.prologue, K=spec.branches, SLICED=spec.sliced)


def _squeeze_fake(*args: Any) -> tuple[Tensor, ...]:
    x, spec = args[0], args[-1]
    c = x.shape[1] // spec.branches if spec.sliced else x.shape[1]
    acc = reference.accumulator(x.dtype)
    z, logits = x.new_empty((x.shape[0], c), dtype=acc), x.new_empty((x.shape[0], c * spec.branches), dtype=acc)
    return z, RelaySqueeze.slot(x.narrow(1, 0, c)), RelaySqueeze.slot(logits)


def _squeeze_launch(*args: Any) -> tuple[Tensor, ...]:
    *inputs, spec = args
    m = _map(inputs, spec)
    z, *slots = _squeeze_fake(*args)
    _squeeze_into(m, z, inputs, spec)
    return z, *slots


def _squeeze_into(m: Map, z: Tensor, inputs: Sequence[Tensor | None], spec: SelectSpec) -> None:
    config = m.config("channel", spec.branches)
    splits, programs = config.splits, m.n * -(-m.c // config.block_c)
    kernels().select_squeeze_fwd_kernel[(programs * splits,)](
        part_ptr=m.small(m.n, splits, m.c) if splits > 1 else None, counter_ptr=counters(m.x, programs) if splits > 1 else None, z_ptr=z,
        SPLITS=splits, **_arguments(m, inputs, spec), **config.args,
    )  # fmt: skip


def _squeeze_backward(grads: Any, inputs: Any, saved: Any, spec: SelectSpec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """dx of every branch: dz, with da (what flows through the gate) and the gate's logits also the gate's share."""
    dz, da, logits = grads
    dx = _input_grads(_map(inputs, spec), inputs, dz, da, logits, spec, needs)
    return [*dx, *(None,) * len(NORM)]


def _gradients(m: Map, spec: SelectSpec, needs: Sequence[bool]) -> tuple[list[Tensor | None], int]:
    """Memory for the gradients of the maps, and STORE."""
    found = [torch.empty_like(m.x) if need else None for need in needs[:POINTERS]]
    return found, (1 << spec.branches) - 1 if spec.sliced else sum(need << k for k, need in enumerate(needs[:POINTERS]))


def _outputs(found: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """With the strides of each map."""
    originals = [inputs[0] if t is None else t for t in inputs[:POINTERS]]
    return [None if t is None else _like(t, original) for t, original in zip(found, originals, strict=True) if original is not None]


def _input_grads(
    m: Map, inputs: Sequence[Tensor | None], dz: Tensor | None, da: Tensor | None, logits: Tensor | None, spec: SelectSpec, needs: Sequence[bool]
) -> list[Tensor | None]:
    found, store = _gradients(m, spec, needs)
    pointers = dict(zip((f"d{name}_ptr" for name in MAPS), found, strict=True))
    config = m.config("tile", spec.branches)
    programs = m.n * -(-m.c // config.block_c) * -(-m.hw // config.block_p)
    kernels().select_bwd_input_kernel[(programs,)](
        g_ptr=m.same(da), logits_ptr=None if logits is None else logits.contiguous(), dz_ptr=None if dz is None else dz.contiguous(), **pointers,
        GROUP=m.c // spec.groups, GATE=spec.gate, HAS_G=da is not None, HAS_Z=dz is not None, STORE=store, **_arguments(m, inputs, spec),
        **config.args,
    )  # fmt: skip
    return _outputs(found, inputs)


def _like(t: Tensor, original: Tensor) -> Tensor:
    expected = torch.empty_like(original)
    return t if t.stride() == expected.stride() else expected.copy_(t)


def _gate_fake(*args: Any) -> tuple[Tensor, ...]:
    x, spec = args[0], args[-1]
    return (torch.empty_like(x.narrow(1, 0, x.shape[1] // spec.branches) if spec.sliced else x),)


def _gate_launch(*args: Any) -> tuple[Tensor, ...]:
    *inputs, logits, residual, _, _, spec = args
    m = _map(inputs, spec)
    y = m.empty()
    config = m.config("tile", spec.branches)
    programs = m.n * -(-m.c // config.block_c) * -(-m.hw // config.block_p)
    kernels().select_gate_fwd_kernel[(programs,)](
        logits_ptr=logits.contiguous(), residual_ptr=m.same(residual), y_ptr=y, GROUP=m.c // spec.groups, GATE=spec.gate,
        HAS_RESIDUAL=residual is not None, ACTIVATION=spec.activation, **_arguments(m, inputs, spec), **config.args,
    )  # fmt: skip
    return (m.output(y),)


def _gate_backward(grads: Any, inputs: Any, saved: Any, spec: SelectSpec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """da, where there is an activation, and the gradient of the logits."""
    (g,) = grads
    *maps, logits, residual, _, _ = inputs
    m = _map(inputs, spec)
    da = m.empty() if needs[0] else None
    dlogits = _logits_grad(m, maps, g, logits, residual, da, spec)
    return [None if da is None else m.output(da), *(None,) * (len(maps) - 1), dlogits, None, None, None]


def _logits_grad(
    m: Map, maps: Sequence[Tensor | None], g: Tensor, logits: Tensor, residual: Tensor | None, da: Tensor | None, spec: SelectSpec
) -> Tensor:
    """The gradient of the logits; stores da where it is given."""
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    config = m.config("channel", spec.branches)
    splits, programs = config.splits, m.n * -(-m.c // config.block_c)
    kernels().select_bwd_weights_kernel[(programs * splits,)](
        g_ptr=m.same(g), logits_ptr=logits.contiguous(), residual_ptr=m.same(residual), part_ptr=m.small(m.n, splits, spec.branches, m.c),
        counter_ptr=counters(m.x, programs), da_ptr=da, dlogits_ptr=dlogits, GROUP=m.c // spec.groups, SPLITS=splits,
        GATE=spec.gate, HAS_RESIDUAL=residual is not None, ACTIVATION=spec.activation,
        STORE_DA=da is not None, **_arguments(m, maps, spec), **config.args,
    )  # fmt: skip
    return dlogits


select_squeeze = RelaySqueeze(
    "select_squeeze",
    inputs=INPUTS,
    outputs=("z", "map_slot", "logits_slot"),
    differentiable=3,
    saved=(),
    batched=MAPS,
    fake=_squeeze_fake,
    launch=_squeeze_launch,
    backward=_squeeze_backward,
    reference=_squeeze_reference,
    share=_share,
    maps=POINTERS,
    spec=SelectSpec,
)

select_gate = RelayGate(
    "select_gate",
    inputs=(*INPUTS, "logits", "residual?", "map_slot?", "logits_slot?"),
    outputs=("y",),
    differentiable=1,
    saved=(),
    batched=(*MAPS, "logits", "residual", "map_slot", "logits_slot"),
    fake=_gate_fake,
    launch=_gate_launch,
    backward=_gate_backward,
    reference=gate_reference,
    maps=POINTERS,
    spec=SelectSpec,
)

# -- with two plain layers -------------------------------------------------------------------------------------------------------------------

LAYERS = ("w1", "b1", "w2", "b2")
Layers = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def _split(args: Sequence[Any]) -> tuple[list[Any], list[Any], Any, SelectSpec]:
    """(maps and norm, matrices and biases of the layers, residual, spec)"""
    count = len(INPUTS)
    return list(args[:count]), [matrix(t) for t in args[count : count + len(LAYERS)]], args[-2], args[-1]


def _select_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, (w1, *_), _, spec = _split(args)
    (y,) = _gate_fake(*inputs, spec)
    n, c = y.shape[:2]
    acc = reference.accumulator(y.dtype)
    return y, *(y.new_empty(shape, dtype=acc) for shape in ((n, c), (n, w1.shape[0]), (n, spec.branches * c)))


def _ticket(m: Map, w1: Tensor, w2: Tensor, spec: SelectSpec) -> tuple[tuple[int], dict[str, Any]] | None:
    """(grid, arguments) of both passes in one launch, where that is better than a launch for each; see kernels/ticket.py."""
    ticket = _excite.ticketed(m, w1, w2, maps=spec.branches)
    if ticket is None:
        return None
    config = m.config("ticket", spec.branches)
    inside = _excite.image_excite(m, w1, w2, Spec("avg", "mlp", spec.hidden))
    return ticket[0], ticket[1] | config.args | dict(
        w1_ptr=w1, w2_ptr=w2, R=w1.shape[0], HIDDEN=spec.hidden, GATE=spec.gate, SPLITS=config.splits, EXCITE_C=inside["EXCITE_C"],
        EXCITE_R=inside["EXCITE_R"],
    )  # fmt: skip


def _select_launch(*args: Any) -> tuple[Tensor, ...]:
    inputs, layers, residual, spec = _split(args)
    m = _map(inputs, spec)
    w1, b1, w2, b2 = layers
    _, z, hidden, logits = _select_fake(*args)
    if ticket := _ticket(m, w1, w2, spec):
        grid, found = ticket
        y = m.empty()
        kernels().select_ticket_fwd_kernel[grid](
            **_arguments(m, inputs, spec), **found, b1_ptr=b1, b2_ptr=b2, HAS_B1=b1 is not None, HAS_B2=b2 is not None, residual_ptr=m.same(residual),
            y_ptr=y, part_ptr=m.small(m.n, found["SPLITS"], m.c), z_ptr=z, hidden_ptr=hidden, logits_ptr=logits, HAS_RESIDUAL=residual is not None,
            ACTIVATION=spec.activation,
        )  # fmt: skip
        return m.output(y), z, hidden, logits
    _squeeze_into(m, z, inputs, spec)
    r, k = w1.shape[0], spec.branches
    _excite.linear(m, z, w1, hidden, (m.n, r, m.c), a=(m.c, 1, 0), b=(m.c, 1), to=(r, 1), bias=b1)
    _excite.linear(m, hidden, w2, logits, (m.n, k * m.c, r), a=(r, 1, 0), b=(r, 1), to=(k * m.c, 1), activation=spec.hidden, bias=b2)
    return *_gate_launch(*inputs, logits, residual, None, None, spec), z, hidden, logits


def _select_backward(grads: Any, inputs: Any, saved: Any, spec: SelectSpec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    (g,) = grads
    maps, layers, residual, _ = _split((*inputs, spec))
    z, hidden, logits = saved
    m = _map(maps, spec)
    w1, b1, w2, b2 = layers
    r, k = w1.shape[0], spec.branches
    count = len(INPUTS)
    need_maps, (need_w1, need_b1, need_w2, need_b2) = any(needs[:POINTERS]), needs[count : count + len(LAYERS)]
    da = m.empty() if spec.activation != "none" and (need_maps or needs[-1]) else None
    found: list[Tensor | None] = [None] * len(needs)
    dhidden = m.small(m.n, r)
    ticket = _ticket(m, w1, w2, spec) if need_maps else None
    if ticket:
        grid, arguments = ticket
        dlogits, dz = torch.empty_like(logits), torch.empty_like(z)
        gradients, store = _gradients(m, spec, needs)
        kernels().select_ticket_bwd_kernel[grid](
            **_arguments(m, maps, spec), **arguments, g_ptr=m.same(g), residual_ptr=m.same(residual), da_ptr=da, hidden_ptr=hidden, logits_ptr=logits,
            dlogits_ptr=dlogits, dhidden_ptr=dhidden, dz_ptr=dz, part_ptr=m.small(m.n, arguments["SPLITS"], k, m.c),
            HAS_RESIDUAL=residual is not None, ACTIVATION=spec.activation, STORE=store,
            **dict(zip((f"d{name}_ptr" for name in MAPS), gradients, strict=True)),
        )  # fmt: skip
        found[:POINTERS] = _outputs(gradients, maps)
    else:
        dlogits = _logits_grad(m, maps, g, logits, residual, da, spec)
        if need_maps or need_w1 or need_b1:
            _excite.linear(m, dlogits, w2, dhidden, (m.n, r, k * m.c), a=(k * m.c, 1, 0), b=(1, r), to=(r, 1), h=hidden, grad=spec.hidden)
        if need_maps:
            dz = torch.empty_like(z)
            _excite.linear(m, dhidden, w1, dz, (m.n, m.c, r), a=(r, 1, 0), b=(1, m.c), to=(m.c, 1))
            found[:POINTERS] = _input_grads(m, maps, dz, g if da is None else da, logits, spec, needs)
    if need_w1 or need_b1:
        found[count : count + 2] = _excite.weight_grads(m, z, dhidden, w1, b1, (m.c, r, m.n), a=(1, m.c, 0), q=1, scale=1, activation="none")
    if need_w2 or need_b2:
        sizes = (r, k * m.c, m.n)
        found[count + 2 : count + 4] = _excite.weight_grads(
            m, hidden, dlogits, w2, b2, sizes, a=(1, r, 0), q=1, scale=1, activation=spec.hidden
        )  # fmt: skip
    if needs[-1]:
        found[-1] = g if da is None else m.output(da)
    return found


def _select_reference(*args: Any) -> tuple[Tensor, ...]:
    *inputs, w1, b1, w2, b2, residual, spec = args
    (z,) = _squeeze_reference(*inputs, spec)
    logits = reference.excite(z.unsqueeze(1), w1, b1, w2, b2, kind="mlp", hidden=spec.hidden)
    return gate_reference(*inputs, logits, residual, None, None, spec)


select = Family(
    "select",
    inputs=(*INPUTS, "w1", "b1?", "w2", "b2?", "residual?"),
    outputs=("y", "z", "hidden", "logits"),
    differentiable=1,
    saved=("z", "hidden", "logits"),
    batched=(*MAPS, "residual"),
    fake=_select_fake,
    launch=_select_launch,
    backward=_select_backward,
    reference=_select_reference,
    spec=SelectSpec,
)
