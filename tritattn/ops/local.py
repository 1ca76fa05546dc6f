"""Gates of neighbourhoods: gather-excite. A small map of logits, gated on while it is small and spread over the map in the gating pass.

Squeeze and gate are a relay, see _relay: between them stands nothing, an MLP on the small map, or the convolutions that make it from the map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference, tuning
from .._library import _without_autocast
from .._relay import RelayGate, RelaySqueeze, through
from .._spec import Spec
from . import _checks
from ._channel import attend
from ._launch import Cotangent, Map, _channels_last, kernels, vector
from .channel import MAX_GRADS, mlp_kind, se
from .gate import gate as weigh


class LocalSpec(NamedTuple):
    """extent: positions of the map for each of the small one, 0 for all. pooled: whether the small map is the local means of the map."""

    extent: int
    pooled: bool
    gate: str = "sigmoid"
    activation: str = "none"


def _size(x: Tensor, extent: int) -> tuple[int, int]:
    """Of the small map."""
    h, w = x.shape[2:]
    return ((h - 1) // extent + 1, (w - 1) // extent + 1) if extent else (1, 1)  # written as convolutions have it, for symbolic sizes


def _last(x: Tensor) -> bool:
    """Whether the kernels take x with channels last."""
    return bool(_channels_last(torch.empty_like(x)))


def _like(x: Tensor, t: Tensor) -> Tensor:
    """t in the layout in which the kernels take x."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if _last(x) else t.contiguous()


def _rows(m: Map, small: Tensor) -> tuple[int, dict[str, Any]]:
    """(programs, arguments) of the kernels that walk the map by rows."""
    height, width = m.x.shape[2:]
    hs, ws = small.shape[2:]
    config = m.config("rows", row=width)
    block_w = tuning.power_of_two(width)
    block_h = max(1, config.block_p // block_w)
    planes = block_h >= height
    rows = hs if planes else -(-hs // min(hs, config.splits))
    vec = 1 if m.channels_last else vector(width)
    args = {name: value for name, value in m.args.items() if name not in ("HW_V", "VEC_P")}
    return m.n * -(-m.c // config.block_c) * -(-hs // rows), dict(
        **args, H=height, W_V=width // vec, VEC_W=vec, HS=hs, WS=ws, rows=rows, PLANES=planes, BLOCK_C=config.block_c,
        BLOCK_H=block_h if planes else min(block_h, tuning.power_of_two(-(-height // hs))), BLOCK_W=block_w,
        BLOCK_J=min(tuning.power_of_two(ws), 2 * block_h), **config.options,
    )  # fmt: skip


def _tile(m: Map, small: Tensor) -> tuple[int, dict[str, Any]]:
    """(programs, arguments) of the elementwise kernels."""
    config = m.config("tile")
    programs = m.n * -(-m.c // config.block_c) * -(-m.hw // config.block_p)
    args = dict(W=m.x.shape[3], HS=small.shape[2], WS=small.shape[3], **_scales(m, small))
    return programs, dict(**m.args, **args, **config.args)


def _scales(m: Map, small: Tensor) -> dict[str, float]:
    return dict(scale_h=small.shape[2] / m.x.shape[2], scale_w=small.shape[3] / m.x.shape[3])


# -- the squeeze -----------------------------------------------------------------------------------------------------------------------------


def _fake(x, spec: LocalSpec) -> tuple[Tensor, ...]:
    (n, c), size = x.shape[:2], _size(x, spec.extent)
    acc = reference.accumulator(x.dtype)
    small = x.new_empty((n, *size, c), dtype=acc).movedim(-1, 1) if _last(x) else x.new_empty((n, c, *size), dtype=acc)
    return small if spec.pooled else small.new_empty(0), RelaySqueeze.slot(x), RelaySqueeze.slot(small), RelaySqueeze.slot(x)


def _launch(x, spec: LocalSpec) -> tuple[Tensor, ...]:
    found = _fake(x, spec)
    if spec.pooled:
        m = Map(x)
        programs, args = _rows(m, found[0])
        kernels().local_mean_fwd_kernel[(programs,)](m.x, found[0], EXTENT=spec.extent, **args)
    return found


def _backward(grads, inputs, saved, spec: LocalSpec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    dz, da, logits, arrived = grads
    (x,) = inputs
    m = Map(x)
    dx = m.empty()
    small = next(t for t in (dz if spec.pooled else None, logits, x) if t is not None)
    programs, args = _tile(m, small)
    kernels().local_bwd_input_kernel[(programs,)](
        m.same(da), None if logits is None else _like(x, logits), _like(x, dz) if spec.pooled and dz is not None else None, m.same(arrived), dx,
        EXTENT=spec.extent, GATE=spec.gate, HAS_G=da is not None, HAS_POOL=spec.pooled and dz is not None, HAS_THROUGH=arrived is not None,
        H=x.shape[2], **args,
    )  # fmt: skip
    return [m.output(dx)]


def _reference(x, spec: LocalSpec) -> tuple[Tensor, ...]:
    wide = x.to(reference.accumulator(x.dtype))
    return (reference.local_mean(wide, spec.extent) if spec.pooled else wide.flatten()[:0],)


# -- the gate --------------------------------------------------------------------------------------------------------------------------------


def _gate_launch(x, logits, residual, map_slot, logits_slot, spec: LocalSpec) -> tuple[Tensor, ...]:
    m = Map(x)
    y = m.empty()
    programs, args = _tile(m, logits)
    kernels().local_gate_fwd_kernel[(programs,)](
        m.x, _like(x, logits), m.same(residual), y, GATE=spec.gate, HAS_RESIDUAL=residual is not None, ACTIVATION=spec.activation, **args
    )
    return (m.output(y),)


def _gate_backward(grads, inputs, saved, spec: LocalSpec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """da and the gradient of the logits."""
    x, logits, residual, *_ = inputs
    m = Map(x)
    cotangent = Cotangent(m, grads[0], residual, spec)
    if needs[0]:
        cotangent.da = m.empty()
    small = _like(x, logits)
    dlogits = torch.empty_like(small)
    programs, args = _rows(m, small)
    kernels().local_gate_bwd_kernel[(programs,)](
        x_ptr=m.x, logits_ptr=small, da_ptr=cotangent.da, dlogits_ptr=dlogits, GATE=spec.gate, STORE_DA=cotangent.da is not None,
        **args, **_scales(m, small), **cotangent.args(),
    )  # fmt: skip
    return None if cotangent.da is None else m.output(cotangent.da), dlogits, None, None, None


def _gate_reference(x, logits, residual, map_slot, logits_slot, spec: LocalSpec) -> tuple[Tensor, ...]:
    return (reference.gate(x, reference.nearest(logits, x), gate=spec.gate, residual=residual, activation=spec.activation),)


local_squeeze = RelaySqueeze(
    "local_squeeze",
    inputs=("x",),
    outputs=("z", "map_slot", "logits_slot", "through_slot"),
    differentiable=4,
    saved=(),
    batched=("x",),
    fake=_fake,
    launch=_launch,
    backward=_backward,
    reference=_reference,
    share=lambda da, inputs, logits, spec: _gate_reference(da, logits, None, None, None, spec._replace(activation="none")),
    spec=LocalSpec,
)
local_gate = RelayGate(
    "local_gate",
    inputs=("x", "logits", "residual?", "map_slot?", "logits_slot?"),
    outputs=("y",),
    differentiable=1,
    saved=(),
    batched=("x", "logits", "residual", "map_slot", "logits_slot"),
    fake=lambda x, logits, residual, map_slot, logits_slot, spec: (torch.empty_like(x),),
    launch=_gate_launch,
    backward=_gate_backward,
    reference=_gate_reference,
    spec=LocalSpec,
)

# -- public function -------------------------------------------------------------------------------------------------------------------------

Gather = Callable[[Tensor], Tensor]


def ge(
    x: Tensor, w1: Tensor | None = None, b1: Tensor | None = None, w2: Tensor | None = None, b2: Tensor | None = None, *,
    gather: Gather | None = None, extent: int | None = 0, pool: str = "avg", hidden: str = "relu", gate: str = "sigmoid", max_grad: str = "first",
    residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Gather-Excite (Hu et al., 2018, arXiv:1810.12348): y = a(x * f(nearest(MLP(z))) + residual), z = gather(x) [N, C, h, w].

    z holds a value for each `extent` positions in either direction: without `gather` the means over |h - e i| < e, |w - e j| < e inside the map
    (GE-theta-), otherwise what that module or function makes of x (GE-theta: strided depthwise convolutions). Extent 0 is the whole map, z then
    [N, C, 1, 1]. With w1 and w2 MLP(z) = w2 hidden(w1 z + b1) + b2 at every position (GE-theta+, and SE where z are global means), else z itself.
    Two launches beside what stands between them. The nearest position is rounded in fp32, as torch does on GPUs for every dtype.

    Args:
        x: [N, C, H, W]; float32, float16, bfloat16 or float64.
        w1, b1, w2, b2, hidden: as in `se`, or none of them.
        gather: x -> [N, C, ceil(H / extent), ceil(W / extent)], or [N, C, 1, 1] for extent 0.
        extent: 0, or a power of two from 2 on; or None with gather for z of any size up to the map's, which is spread before the gating pass.
        pool: "avg", or for extent 0 without gather "avg_max" (half mean, half maximum, as timm's add_maxpool); max_grad as in `se`.
        gate: f, one of sigmoid, hard_sigmoid, relu, none. residual: of x's shape and dtype. activation: a, one of none, relu, silu, hardswish, gelu.

    Returns y, x's dtype, with the strides of torch.empty_like(x). Raises TypeError and ValueError naming the argument.
    """
    _checks.feature_map(x)
    _checks.choice("gate", gate, reference.GATES)
    _checks.residual(residual, x)
    _checks.choice("activation", activation, reference.ACTIVATIONS)
    _checks.choice("hidden", hidden, reference.HIDDEN)
    _checks.choice("max_grad", max_grad, MAX_GRADS)
    (extent,) = {extent}  # through a set, since dynamo has no text of an integer that it takes for dynamic
    if extent is None and gather is None:
        raise ValueError("extent: got None without gather, expected 0 or a power of two from 2 on")
    if extent and (extent < 2 or extent & (extent - 1)):
        raise ValueError(f"extent: got {extent}, expected 0 or a power of two from 2 on")
    if gather is not None and not callable(gather):
        raise TypeError(f"gather: got {type(gather).__name__}, expected None, a module or a function")
    whole = extent == 0 and gather is None
    _checks.choice("pool", pool, ("avg", "avg_max") if whole else ("avg",))
    if w1 is None:
        for name, t in (("b1", b1), ("w2", w2), ("b2", b2)):
            if t is not None:
                raise ValueError(f"{name}: got a tensor, expected None where w1 is None")
    else:
        _checks.required("w2", w2)
        assert w2 is not None
        mlp_kind(x, w1, b1, w2, b2, hidden)
    if whole and w1 is not None and w2 is not None:
        return se(x, w1, b1, w2, b2, pool=pool, hidden=hidden, gate=gate, max_grad=max_grad, residual=residual, activation=activation)
    if whole:
        return attend(x, lambda z: z[:, 0], residual, Spec(pool, gate=gate, max_grad=max_grad, activation=activation))

    def logits(z: Tensor) -> Tensor:
        return z if w1 is None else _mlp(z, (w1, b1, w2, b2), hidden)

    return _attend(x, logits, gather, residual, LocalSpec(extent or 0, gather is None, gate, activation), extent)


def _mlp(z: Tensor, params: Sequence[Tensor | None], hidden: str) -> Tensor:
    """The MLP at every position of the small map, in the accumulator's arithmetic whatever autocast says."""
    acc = reference.accumulator(z.dtype)
    w1, b1, w2, b2 = (None if t is None else t.to(acc) for t in params)
    assert w1 is not None and w2 is not None
    with _without_autocast(z.device.type):
        columns = reference.HIDDEN[hidden](F.linear(z.to(acc).movedim(1, -1), w1.flatten(1), b1))  # [N, h, w, R]
        return F.linear(columns, w2.flatten(1), b2).movedim(-1, 1)


def _check_gathered(z: Any, x: Tensor, extent: int | None) -> None:
    (n, c), size = x.shape[:2], x.shape[2:] if extent is None else _size(x, extent)
    fits = isinstance(z, Tensor) and z.dim() == 4 and z.shape[0] == n and z.shape[1] == c
    if not fits or any(a > b if extent is None else a != b for a, b in zip(z.shape[2:], size, strict=True)):
        got = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
        most = " at most" if extent is None else ""
        raise ValueError(f"gather: got {got} from it, expected{most} {[n, c, *size]} for extent {extent} and x of shape {list(x.shape)}")


def _attend(
    x: Tensor, excite: Callable[[Tensor], Tensor], gather: Gather | None, residual: Tensor | None, spec: LocalSpec, extent: int | None
) -> Tensor:  # fmt: skip
    found = local_squeeze(x, spec=spec)
    z, slots = (found[0], found[1:]) if isinstance(found, tuple) else (found, ())
    if gather is not None:
        z = gather(through(x, slots[-1] if slots else None))
        _check_gathered(z, x, extent)
    logits = excite(z)
    if any(a != b for a, b in zip(logits.shape[2:], _size(x, spec.extent), strict=True)):  # the relay has no place for any other size
        return weigh(x, reference.nearest(logits, x), gate=spec.gate, residual=residual, activation=spec.activation)
    if not slots:  # the squeeze took the reference
        return _gate_reference(x, logits, residual, None, None, spec)[0]
    return local_gate(x, logits, residual, *slots[:2], spec=spec)
