"""Attentional feature fusion: MS-CAM, AFF, iAFF, and the blend of two maps that they end in.

The contexts are torch modules, so a block is two ops, `fusion_squeeze` and `fusion_gate`, joined as a relay: the maps' gradients are written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._library import Family
from .._relay import RelayGate, RelaySqueeze, through
from .._spec import Spec
from . import _checks, _excite
from ._launch import Cotangent, Map, counters, kernels, matrix
from ._networks import Network, called, dtype_for, network


class BlendSpec(NamedTuple):
    """The options of a blend."""

    gate: str = "sigmoid"
    factor: int = 1
    activation: str = "none"
    sum: str = ""  # dtype of the sum of the maps, where not theirs


# -- the blend -------------------------------------------------------------------------------------------------------------------------------


def _tile(m: Map) -> tuple[int, dict[str, Any]]:
    """(programs, the kernels' arguments about tiles) of an elementwise pass."""
    config = m.config("tile")
    programs = m.n * -(-m.c // config.block_c) * -(-m.hw // config.block_p)
    return programs, dict(m.args, **config.args)


def _blend_forward(
    x: Tensor, other: Tensor | None, local: Tensor, pooled: Tensor | None, residual: Tensor | None, spec: BlendSpec
) -> Tensor:
    m = Map(x)
    y = m.empty()
    programs, args = _tile(m)
    kernels().blend_fwd_kernel[(programs,)](
        m.x, m.same(other), m.same(local), matrix(pooled), m.same(residual), y, **args, GATE=spec.gate, FACTOR=spec.factor,
        HAS_OTHER=other is not None, HAS_POOLED=pooled is not None, HAS_RESIDUAL=residual is not None, ACTIVATION=spec.activation,
    )  # fmt: skip
    return m.output(y)


def _blend_backward(
    m: Map, other: Tensor | None, local: Tensor, pooled: Tensor | None, spec: BlendSpec, cotangent: Cotangent, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of (x, other, local, pooled), each only if it is needed; stores da into the cotangent."""
    config = m.config("channel")
    blocks_c, splits = -(-m.c // config.block_c), config.splits
    dx, dother = (m.empty() if need else None for need in needs[:2])
    dlocal = torch.empty_like(m.x, dtype=local.dtype) if needs[2] else None
    dpooled = m.small(m.n, m.c, dtype=pooled.dtype) if needs[3] and pooled is not None else None
    kernels().blend_bwd_kernel[(m.n * blocks_c * splits,)](
        x_ptr=m.x, other_ptr=m.same(other), local_ptr=m.same(local), pooled_ptr=matrix(pooled),
        part_ptr=None if dpooled is None else m.small(m.n, splits, m.c),
        counter_ptr=None if dpooled is None else counters(m.x, m.n * blocks_c), da_ptr=cotangent.da, dx_ptr=dx, dother_ptr=dother,
        dlocal_ptr=dlocal, dpooled_ptr=dpooled, **m.args, **cotangent.args(), SPLITS=splits, GATE=spec.gate, FACTOR=spec.factor,
        HAS_OTHER=other is not None, HAS_POOLED=pooled is not None, STORE_DA=cotangent.da is not None, STORE_DX=dx is not None,
        STORE_DOTHER=dother is not None, STORE_DLOCAL=dlocal is not None, STORE_DPOOLED=dpooled is not None,
        **config.args,
    )  # fmt: skip
    return [*(None if d is None else m.output(d) for d in (dx, dother, dlocal)), dpooled]


def _backward(grads, inputs, saved, spec: BlendSpec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    (g,) = grads
    x, other, local, pooled, residual = inputs
    m = Map(x)
    cotangent = Cotangent(m, g, residual, spec)
    found = _blend_backward(m, other, local, pooled, spec, cotangent, needs)
    cotangent.stored()
    return *found, cotangent.residual_grad(m, g, residual) if needs[4] else None


def _reference(x, other, local, pooled, residual, spec: BlendSpec) -> tuple[Tensor, ...]:
    return (reference.blend(x, other, local, pooled, gate=spec.gate, factor=spec.factor, residual=residual, activation=spec.activation),)


blend_family = Family(
    "blend",
    inputs=("x", "other", "local", "pooled?", "residual?"),
    outputs=("y",),
    differentiable=1,
    saved=(),
    batched=("x", "other", "local", "pooled", "residual"),
    fake=lambda x, other, local, pooled, residual, spec: (torch.empty_like(x),),
    launch=lambda x, other, local, pooled, residual, spec: (_blend_forward(x, other, local, pooled, residual, spec),),
    backward=_backward,
    reference=_reference,
    spec=BlendSpec,
)

# -- the sum of the maps, and its means ------------------------------------------------------------------------------------------------------


def _sum_dtype(x: Tensor, spec: BlendSpec) -> torch.dtype:
    return getattr(torch, spec.sum) if spec.sum else x.dtype


def _squeeze_fake(x, other, spec: BlendSpec) -> tuple[Tensor, ...]:
    z = x.new_empty(x.shape[:2], dtype=reference.accumulator(x.dtype))
    total = x.new_empty(0) if other is None else torch.empty_like(x, dtype=_sum_dtype(x, spec))
    return total, z, *(RelaySqueeze.slot(t) for t in (x, x, z, x, x))


def _squeeze_launch(x, other, spec: BlendSpec) -> tuple[Tensor, ...]:
    m = Map(x)
    total = None if other is None else torch.empty_like(m.x, dtype=_sum_dtype(x, spec))
    z = _excite.forward(m, None, None, None, None, Spec(), other=m.same(other), total=total).z.view(m.n, m.c)
    stored = x.new_empty(0) if total is None else m.output(total)
    return stored, z, *(RelaySqueeze.slot(t) for t in (x, x, z, x, x))


def _squeeze_backward(grads, inputs, saved, spec: BlendSpec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """What comes through the sum and its means, and with da (what flows through the gate) and the gate's logits also the gate's share."""
    dsum, dz, da, local, pooled, *passed = grads
    m = Map(inputs[0])
    dx, dother = (m.empty() if need else None for need in needs)
    programs, args = _tile(m)
    kernels().blend_bwd_input_kernel[(programs,)](
        m.same(da), m.same(local), matrix(pooled), m.same(dsum), None if dz is None else dz.contiguous(), *map(m.same, passed), dx, dother,
        **args, GATE=spec.gate, FACTOR=spec.factor, HAS_DA=da is not None, HAS_DSUM=dsum is not None,
        HAS_DZ=dz is not None, STORE_DX=needs[0], STORE_DOTHER=needs[1],
    )  # fmt: skip
    return [None if d is None else m.output(d) for d in (dx, dother)]


def _squeeze_reference(x, other, spec: BlendSpec) -> tuple[Tensor, ...]:
    wide = x.to(reference.accumulator(x.dtype))
    if other is not None:
        wide = wide + other.to(wide.dtype)
    return x.new_empty(0) if other is None else wide.to(_sum_dtype(x, spec)), wide.mean((2, 3))


def _share(da: Tensor, inputs: Sequence[Any], local: Tensor, pooled: Tensor, spec: BlendSpec) -> tuple[Tensor | None, ...]:
    """The gate's share of dx, factor da w, and of dother, factor da (1 - w)."""
    spec = spec._replace(activation="none")
    (dx,) = _reference(da, None, local, pooled, None, spec)
    return dx, None if inputs[1] is None else _reference(torch.zeros_like(da), da, local, pooled, None, spec)[0]


fusion_squeeze = RelaySqueeze(
    "fusion_squeeze",
    maps=2,
    inputs=("x", "other?"),
    outputs=("sum", "z", "map_slot", "local_slot", "pooled_slot", "through_slot", "other_through_slot"),
    differentiable=7,
    saved=(),
    batched=("x", "other"),
    fake=_squeeze_fake,
    launch=_squeeze_launch,
    backward=_squeeze_backward,
    reference=_squeeze_reference,
    share=_share,
    spec=BlendSpec,
)

# -- the gate --------------------------------------------------------------------------------------------------------------------------------


def _gate_backward(grads, inputs, saved, spec: BlendSpec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """da and the gradients of local and pooled."""
    x, other, local, pooled, residual, *_ = inputs
    m = Map(x)
    cotangent = Cotangent(m, grads[0], residual, spec)
    if needs[0]:
        cotangent.da = m.empty()
    found = _blend_backward(m, other, local, pooled, spec, cotangent, (False, False, *needs[2:4]))
    return None if cotangent.da is None else m.output(cotangent.da), None, *found[2:], *(None,) * 4


fusion_gate = RelayGate(
    "fusion_gate",
    maps=2,
    inputs=("x", "other?", "local", "pooled", "residual?", "map_slot?", "local_slot?", "pooled_slot?"),
    outputs=("y",),
    differentiable=1,
    saved=(),
    batched=("x", "other", "local", "pooled", "residual", "map_slot", "local_slot", "pooled_slot"),
    fake=lambda x, *rest: (torch.empty_like(x),),
    launch=lambda x, other, local, pooled, residual, a, b, c, spec: (_blend_forward(x, other, local, pooled, residual, spec),),
    backward=_gate_backward,
    reference=lambda x, other, local, pooled, residual, a, b, c, spec: _reference(x, other, local, pooled, residual, spec),
    spec=BlendSpec,
)

# -- public functions ------------------------------------------------------------------------------------------------------------------------

FACTORS = (1, 2)


def _check(x: Tensor, gate: str, residual: Tensor | None, activation: str, factor: int = 1, **contexts: Network) -> BlendSpec:
    _checks.feature_map(x)
    _checks.choice("gate", gate, reference.GATES)
    _checks.residual(residual, x)
    _checks.choice("activation", activation, reference.ACTIVATIONS)
    if factor not in FACTORS:
        raise ValueError(f"factor: got {factor!r}, expected 1 or 2")
    for name, context in contexts.items():
        network(name, context)
    return BlendSpec(gate, 2 if factor == 2 else 1, activation)


def _contexts(
    x: Tensor, other: Tensor | None, contexts: dict[str, Network], spec: BlendSpec
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """What the networks find in the sum of the maps and in its means, and the slots of a relay."""
    (local_name, local), (pooled_name, pooled) = contexts.items()
    wanted = dtype_for(local, x)
    summed = spec if wanted == x.dtype else spec._replace(sum=str(wanted).removeprefix("torch."))
    total, z, *slots = fusion_squeeze(x, other, spec=summed)
    if other is None:
        total = through(x, slots[3] if slots else None)
    return (called(local_name, local, total, x.shape), called(pooled_name, pooled, z.view(*z.shape, 1, 1), (*z.shape, 1, 1)).flatten(1)), slots


def _fuse(
    x: Tensor, other: Tensor | None, logits: tuple[Tensor, Tensor], slots: list[Tensor], residual: Tensor | None, spec: BlendSpec
) -> Tensor:
    """The blend with `other`, or gate, of x."""
    if not slots:  # the squeeze took the reference
        return _reference(x, other, *logits, residual, spec)[0]
    return fusion_gate(x, other, *logits, residual, *slots[:3], spec=spec)


def blend(
    x: Tensor, other: Tensor, local: Tensor, pooled: Tensor | None = None, *, gate: str = "sigmoid", factor: int = 1,
    residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Two maps weighted element by element, in one pass: y = a(factor (x * w + other * (1 - w)) + residual), w = f(local + pooled).

    Args:
        x: [N, C, H, W]; float32, float16, bfloat16 or float64. other: of x's shape and dtype.
        local: logits of x's shape. pooled: logits [N, C, 1, 1], or None. Their dtypes may differ from x's.
        gate: f, one of sigmoid, hard_sigmoid, relu, none. factor: 1, or 2, with which w = 1/2 gives the sum of the maps.
        residual: of x's shape and dtype. activation: a, one of none, relu, silu, hardswish, gelu.

    Returns y, x's dtype, with the strides of torch.empty_like(x). Raises TypeError and ValueError naming the argument.
    """
    spec = _check(x, gate, residual, activation, factor)
    _checks.alike("other", other, x)
    _checks.required("local", local)
    _checks.parameter("local", local, x, tuple(x.shape))
    _checks.parameter("pooled", pooled, x, (x.shape[0], x.shape[1], 1, 1))
    return blend_family(x, other, local, None if pooled is None else pooled.flatten(1), residual, spec=spec)


def mscam(
    x: Tensor, local: Network, pooled: Network, *, gate: str = "sigmoid", residual: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """Multi-scale channel attention module (Dai et al., 2020, arXiv:2009.14082): y = a(x * f(local(x) + pooled(mean_hw x)) + residual).

    Args:
        x: [N, C, H, W]; float32, float16, bfloat16 or float64.
        local: module or function from the map to logits of its shape. pooled: the same for the means [N, C, 1, 1]. In the paper each is a bottleneck
            of 1x1 convolutions with BatchNorms. They get their input in the dtype of their parameters; a map of another one is converted for it.
        gate: f, one of sigmoid, hard_sigmoid, relu, none.
        residual: of x's shape and dtype. activation: a, one of none, relu, silu, hardswish, gelu.

    Returns y, x's dtype, with the strides of torch.empty_like(x). Raises TypeError and ValueError naming the argument. Like the authors' code, raises
    torch's error where a BatchNorm in training gets the means of a single image.
    """
    spec = _check(x, gate, residual, activation, local=local, pooled=pooled)
    return _fuse(x, None, *_contexts(x, None, {"local": local, "pooled": pooled}, spec), residual, spec)


def aff(
    x: Tensor, other: Tensor, local: Network, pooled: Network, *, factor: int = 2, gate: str = "sigmoid", residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:  # fmt: skip
    """Attentional feature fusion (Dai et al., 2020, arXiv:2009.14082): y = a(factor (x * w + other * (1 - w)) + residual),
    w = f(local(x + other) + pooled(mean_hw (x + other))).

    other: the map to fuse x with, of its shape and dtype; in a residual block the shortcut. factor: 2 as in the authors' code, or 1 as in the paper.
    local, pooled and the rest as in `mscam`.
    """
    spec = _check(x, gate, residual, activation, factor, local=local, pooled=pooled)
    _checks.alike("other", other, x)
    return _fuse(x, other, *_contexts(x, other, {"local": local, "pooled": pooled}, spec), residual, spec)


def iaff(
    x: Tensor, other: Tensor, local: Network, pooled: Network, local2: Network, pooled2: Network, *, gate: str = "sigmoid",
    residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Iterative attentional feature fusion (Dai et al., 2020, arXiv:2009.14082): u = x * w + other * (1 - w) with w as in `aff`,
    y = a(x * w2 + other * (1 - w2) + residual), w2 = f(local2(u) + pooled2(mean_hw u)).

    The authors' PyTorch code calls `pooled` in both rounds, and its second one never: pass it twice for the same. Arguments as in `aff`.
    """
    spec = _check(x, gate, residual, activation, local=local, pooled=pooled, local2=local2, pooled2=pooled2)
    _checks.alike("other", other, x)
    first = spec._replace(activation="none")
    logits, slots = _contexts(x, other, {"local": local, "pooled": pooled}, first)
    u = _fuse(x, other, logits, slots, None, first)
    logits, _ = _contexts(u, None, {"local2": local2, "pooled2": pooled2}, first)
    for_x, for_other = slots[3:] or (None, None)
    return blend_family(through(x, for_x), through(other, for_other), *logits, residual, spec=spec)
