"""Selection among branches: selective kernels, whose branches are maps, and split attention, whose branches are slices of one map's channels.

The excite between the squeeze of the branches' sum and their weighted sum is torch's (linear layers and a BatchNorm), so these are two ops, a relay:
`select_squeeze` and `select_gate`. Neither the branches' stack nor their sum is stored, and every branch's gradient is written once, in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._library import _without_autocast
from .._relay import RelayGate, RelaySqueeze
from . import _checks, _excite
from ._launch import NO_NORM, NORM, Map, Norm, counters, kernels
from ._prologue import prepared
from .channel import RANKS

POINTERS = 4  # maps that one launch takes; more are selected among in groups
MAPS = ("x", *(f"x{k}" for k in range(1, POINTERS)))
INPUTS = ("x", *(f"{name}?" for name in (*MAPS[1:], *NORM)))
GATES = ("softmax", *reference.GATES)


class SelectSpec(NamedTuple):
    """The options of both ops."""

    branches: int  # K
    sliced: bool = False  # slices of one map's channels
    groups: int = 1  # of the logits: [N, groups, K, C / groups]
    gate: str = "softmax"
    before: str = "none"  # activation of the branches
    activation: str = "none"
    eps: str = ""  # of the BatchNorm that is part of the passes


# -- plain torch -----------------------------------------------------------------------------------------------------------------------------


def _branches(inputs: Sequence[Tensor | None], spec: SelectSpec) -> list[Tensor]:
    """U_k, in the accumulator's dtype."""
    maps = [t.to(reference.accumulator(t.dtype)) for t in inputs[:POINTERS] if t is not None]
    norm = inputs[POINTERS : POINTERS + len(NORM)]
    maps = [reference.prologue(t, norm, spec.before, spec.eps) for t in maps]
    return list(maps[0].chunk(spec.branches, 1)) if spec.sliced else maps


def _weights(logits: Tensor, spec: SelectSpec) -> Tensor:
    """w [N, K, C] from the logits [N, groups, K, C / groups]."""
    n, width, k = logits.shape[0], logits.shape[1] // spec.branches, spec.branches
    ordered = logits.view(n, spec.groups, k, width // spec.groups).transpose(1, 2).reshape(n, k, width)
    return ordered.softmax(1) if spec.gate == "softmax" else reference.GATES[spec.gate](ordered)


def _squeeze_reference(*args: Any) -> tuple[Tensor, ...]:
    *inputs, spec = args
    means = [u.flatten(2).mean(2) for u in _branches(inputs, spec)]
    return (sum(means[1:], means[0]),)


def _gate_reference(*args: Any) -> tuple[Tensor, ...]:
    *inputs, logits, residual, _, _, spec = args
    branches = _branches(inputs, spec)
    weights = _weights(logits.to(branches[0].dtype), spec).unbind(1)
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
        return _gate_reference(*maps, *absent, *rest, logits, None, None, None, spec._replace(activation="none"))[0]

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
    config = m.config("channel", spec.branches)
    splits, programs = config.splits, m.n * -(-m.c // config.block_c)
    kernels().select_squeeze_fwd_kernel[(programs * splits,)](
        part_ptr=m.small(m.n, splits, m.c) if splits > 1 else None, counter_ptr=counters(m.x, programs) if splits > 1 else None, z_ptr=z,
        SPLITS=splits, **_arguments(m, inputs, spec), **config.args,
    )  # fmt: skip
    return z, *slots


def _squeeze_backward(grads: Any, inputs: Any, saved: Any, spec: SelectSpec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """dx of every branch: dz, with da (what flows through the gate) and the gate's logits also the gate's share."""
    dz, da, logits = grads
    m = _map(inputs, spec)
    found: list[Tensor | None] = [torch.empty_like(m.x) if need else None for need in needs[:POINTERS]]
    pointers = dict(zip((f"d{name}_ptr" for name in MAPS), found, strict=True))
    store = (1 << spec.branches) - 1 if spec.sliced else sum(need << k for k, need in enumerate(needs[:POINTERS]))
    config = m.config("tile", spec.branches)
    programs = m.n * -(-m.c // config.block_c) * -(-m.hw // config.block_p)
    kernels().select_bwd_input_kernel[(programs,)](
        g_ptr=m.same(da), logits_ptr=None if logits is None else logits.contiguous(), dz_ptr=None if dz is None else dz.contiguous(), **pointers,
        GROUP=m.c // spec.groups, GATE=spec.gate, HAS_G=da is not None, HAS_Z=dz is not None, STORE=store, **_arguments(m, inputs, spec),
        **config.args,
    )  # fmt: skip
    originals = [inputs[0] if t is None else t for t in inputs[:POINTERS]]
    dx = [None if t is None else _like(t, original) for t, original in zip(found, originals, strict=True)]
    return [*dx, *(None,) * len(NORM)]


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
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    config = m.config("channel", spec.branches)
    splits, programs = config.splits, m.n * -(-m.c // config.block_c)
    kernels().select_bwd_weights_kernel[(programs * splits,)](
        g_ptr=m.same(g), logits_ptr=logits.contiguous(), residual_ptr=m.same(residual), part_ptr=m.small(m.n, splits, spec.branches, m.c),
        counter_ptr=counters(m.x, programs), da_ptr=da, dlogits_ptr=dlogits, GROUP=m.c // spec.groups, SPLITS=splits,
        GATE=spec.gate, HAS_RESIDUAL=residual is not None, ACTIVATION=spec.activation,
        STORE_DA=da is not None, **_arguments(m, maps, spec), **config.args,
    )  # fmt: skip
    return [None if da is None else m.output(da), *(None,) * (len(maps) - 1), dlogits, None, None, None]


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
    reference=_gate_reference,
    maps=POINTERS,
    spec=SelectSpec,
)

# -- public functions ------------------------------------------------------------------------------------------------------------------------

Excite = Callable[[Tensor], Tensor]  # the mean of the branches' sum [N, C] -> logits [N, K C], in the order of the spec's groups


def attend(
    maps: Sequence[Tensor], excite: Excite, spec: SelectSpec, residual: Tensor | None, norm: Norm = NO_NORM
) -> Tensor:
    """a(sum over k of w_k U_k + residual), w from excite(mean of the sum of U_k)."""
    if len(maps) > POINTERS:
        return _attend_in_groups(maps, excite, spec, residual)
    inputs = (*maps, *(None,) * (POINTERS - len(maps)), *norm)
    z, slots = _squeeze(inputs, spec)
    return _gate(inputs, excite(z).to(z.dtype), residual, slots, spec)


def _squeeze(inputs: Sequence[Tensor | None], spec: SelectSpec) -> tuple[Tensor, list[Tensor]]:
    results = select_squeeze(*inputs, spec=spec)
    if isinstance(results, Tensor):
        return results, []
    z, *slots = results
    return z, slots


def _gate(inputs: Sequence[Tensor | None], logits: Tensor, residual: Tensor | None, slots: Sequence[Tensor], spec: SelectSpec) -> Tensor:
    if not slots:  # the squeeze took the reference
        return _gate_reference(*inputs, logits, residual, None, None, spec)[0]
    return select_gate(*inputs, logits, residual, *slots, spec=spec)


def _attend_in_groups(maps: Sequence[Tensor], excite: Excite, spec: SelectSpec, residual: Tensor | None) -> Tensor:
    """With more maps than a launch takes: the sums of groups, each added to the ones before, and rounded, as its residual."""
    groups = [maps[i : i + POINTERS] for i in range(0, len(maps), POINTERS)]
    inputs = [(*group, *(None,) * (POINTERS - len(group) + len(NORM))) for group in groups]
    specs = [spec._replace(branches=len(group), gate="none", activation="none") for group in groups]
    squeezed = [_squeeze(*pair) for pair in zip(inputs, specs, strict=True)]
    z = sum((z for z, _ in squeezed[1:]), squeezed[0][0])
    weights = _weights(excite(z).to(z.dtype), spec).split([len(group) for group in groups], 1)
    specs[-1] = specs[-1]._replace(activation=spec.activation)
    for group, own, w, (_, slots) in zip(inputs, specs, weights, squeezed, strict=True):
        residual = _gate(group, w.flatten(1), residual, slots, own)
    assert residual is not None
    return residual


def _layers(
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, norm: torch.nn.Module | None, hidden: str, x: Tensor, k: int, groups: int = 1
) -> Excite:
    """The two layers between squeeze and gate of k branches, checked; x is one of the branches."""
    c = x.shape[1]
    r = _checks.layer("w1", w1, x, None, c // groups)
    if r % groups:
        raise ValueError(f"w1: got shape {list(w1.shape)}, expected a multiple of {groups} rows, the cardinality")
    _checks.parameter("b1", b1, x, (r,))
    _checks.layer("w2", w2, x, k * c, r // groups)
    _checks.parameter("b2", b2, x, (k * c,))
    _checks.choice("hidden", hidden, reference.HIDDEN)
    if norm is not None and not isinstance(norm, torch.nn.Module):
        raise TypeError(f"norm: got {type(norm).__name__}, expected None or a module")

    def excite(z: Tensor) -> Tensor:
        with _without_autocast(z.device.type):
            first, between = (w1, b1), norm
            if _excite.plain_norm(norm):
                first, between = _excite.folded(w1, b1, norm, z.dtype), None
            return reference.excite(z.unsqueeze(1), *first, w2, b2, kind="mlp", hidden=hidden, norm=between, groups=groups)

    return excite


def check_maps(x: Any) -> None:
    """A sequence of two or more maps, alike."""
    if isinstance(x, Tensor) or not isinstance(x, Sequence) or len(x) < 2:
        given = f"{len(x)} maps" if isinstance(x, Sequence) else type(x).__name__
        raise TypeError(f"x: got {given}, expected a sequence of two or more")
    for k, t in enumerate(x):
        _checks.feature_map(t, ranks=RANKS, name=f"x[{k}]")
        _checks.alike(f"x[{k}]", t, x[0], "x[0]")


def check_slices(x: Tensor, radix: int, cardinality: int) -> None:
    """A map of `radix` slices, each in `cardinality` groups."""
    _checks.feature_map(x, ranks=RANKS)
    for name, value in (("radix", radix), ("cardinality", cardinality)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a positive integer")
    if x.shape[1] % (radix * cardinality):
        raise ValueError(f"x: got shape {list(x.shape)}, expected a multiple of radix * cardinality = {radix * cardinality} channels")


def select_maps(x: Sequence[Tensor], excite: Excite, residual: Tensor | None, gate: str, before: str, activation: str) -> Tensor:
    """`sk` of checked maps, with any excite."""
    spec = SelectSpec(len(x), gate=gate, before=before, activation=activation)
    _check_options(x[0], spec, residual)
    return attend(x, excite, spec, residual)


def select_slices(
    x: Tensor, excite: Excite, residual: Tensor | None, radix: int, cardinality: int, gate: str | None, before: str, norm: Any, activation: str
) -> Tensor:
    """`splat` of a checked map, with any excite."""
    (radix,), (cardinality,) = {radix}, {cardinality}  # through sets: dynamo writes no number into a string that it takes for dynamic
    spec = SelectSpec(radix, True, cardinality, gate or ("softmax" if radix > 1 else "sigmoid"), before, activation)
    _check_options(x.narrow(1, 0, x.shape[1] // radix), spec, residual)
    x, first, spec = prepared(x, norm, spec)
    return attend((x,), excite, spec, residual, first)


def _check_options(y: Tensor, spec: SelectSpec, residual: Tensor | None) -> None:
    _checks.choice("gate", spec.gate, GATES)
    _checks.choice("before", spec.before, reference.HIDDEN)
    _checks.choice("activation", spec.activation, reference.ACTIVATIONS)
    _checks.residual(residual, y, of="y")


def sk(
    x: Sequence[Tensor], w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, norm: torch.nn.Module | None = None,
    hidden: str = "relu", gate: str = "softmax", before: str = "none", residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Selection of Selective Kernel Networks (Li et al., 2019, arXiv:1903.06586): y = a(sum over k of w_k b(x_k) + residual),
    w = softmax over k of w2 h(norm(w1 z + b1)) + b2, z the mean over positions of sum over k of b(x_k).

    The maps are read for the sum and for y, without being stacked or summed in memory; for more than four, each further four read and write y once
    more. Equal to timm's SelectiveKernel after its convolutions, and to the authors'; External-Attention-pytorch's has neither norm nor h.

    Args:
        x: K >= 2 maps [N, C, *spatial] with one to three spatial dimensions; float32, float16, bfloat16 or float64.
        w1: [R, C] or the 1x1 convolution's [R, C, 1, ...]; b1: [R] or None; w2: [K C, R] likewise, branch after branch; b2: [K C] or None.
        norm: a module on [N, R, 1, 1], such as a BatchNorm2d(R).
        hidden: h, one of none, relu, relu6, leaky_relu (slope 0.01), silu, hardswish, gelu.
        gate: softmax, or of each logit sigmoid, hard_sigmoid, relu, none. before: b, the branches' activation, one of those of `hidden`.
        residual: of a map's shape and dtype. activation: a, one of none, relu, silu, hardswish, gelu (erf).

    Returns: y, the maps' dtype, with the strides of torch.empty_like(x[0]).
    Raises: TypeError for a wrong dtype or layout, ValueError for a wrong shape, device or option; both name the argument.
    """
    check_maps(x)
    return select_maps(x, _layers(w1, b1, w2, b2, norm, hidden, x[0], len(x)), residual, gate, before, activation)


def splat(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, radix: int = 2, cardinality: int = 1,
    norm: torch.nn.Module | None = None, hidden: str = "relu", gate: str | None = None, before: str = "relu",
    before_norm: torch.nn.Module | None = None, residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Split attention of ResNeSt (Zhang et al., 2020, arXiv:2004.08955): y = a(sum over r of w_r u_r + residual), u_r the `radix` slices of the
    channels of b(before_norm(x)), w = softmax over r of fc2 h(norm(fc1 z)), or with radix 1 its sigmoid, z the mean over positions of the sum of u_r.

    Numbers and order of channels are those of the authors' code and of timm; unlike theirs, the result of a channels_last map is channels_last.

    Args:
        x: [N, radix C, *spatial] with one to three spatial dimensions, radix-major; float32, float16, bfloat16 or float64.
        w1: fc1, in `cardinality` groups: [R, C / cardinality] or a 1x1 convolution's; b1: [R] or None; w2: fc2, [radix C, R / cardinality]; b2.
        norm, hidden: as in `sk`.
        gate: of the logits; None for softmax, with radix 1 sigmoid.
        before: b, one of those of `hidden`. before_norm: a module on x before it; a BatchNorm2d(radix C) in eval is part of the passes, as long as
            its parameters need no gradient, every other is called.
        residual: of y's shape [N, C, *spatial]. activation: a, as in `sk`.

    Returns: y [N, C, *spatial], x's dtype, with the strides of torch.empty_like(x[:, :C]).
    Raises: as `sk`.
    """
    check_slices(x, radix, cardinality)
    excite = _layers(w1, b1, w2, b2, norm, hidden, x.narrow(1, 0, x.shape[1] // radix), radix, cardinality)
    return select_slices(x, excite, residual, radix, cardinality, gate, before, before_norm, activation)
