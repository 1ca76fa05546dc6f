"""From tensors to launches: the layout of a map, its workspaces, and the launchers of the passes that several families share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib import import_module
from pkgutil import iter_modules
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _replay, tuning
from .._spec import Spec
from ..reference import accumulator


def kernels() -> Any:
    """Triton's language and the kernels; watched ones while a launcher's plan is made."""
    recording = _replay.current()
    return _kernels() if recording is None else recording.watched(_kernels())


@lru_cache(maxsize=1)
def _kernels() -> Any:
    """Imported at the first launch."""
    import triton.language as tl

    package = import_module("..kernels", __package__)
    modules = [import_module(f"{package.__name__}.{module.name}") for module in iter_modules(package.__path__)]
    return SimpleNamespace(tl=tl, **{k: v for module in modules for k, v in vars(module).items() if k.endswith("_kernel")})


def vector(size: int) -> int:
    """The largest power of two up to 16 that divides size: the vector width that reaches the kernel as a constexpr."""
    return math.gcd(size, 16)


def _channels_last(x: Tensor) -> bool | None:
    """Whether x is dense with channels last (True), dense with channels first (False), or neither (None)."""
    if x.is_contiguous():
        return False
    return True if x.movedim(1, -1).is_contiguous() else None


NORM = ("bn_weight", "bn_bias", "bn_mean", "bn_var")
Norm = Sequence[Tensor | None]  # these four
NO_NORM = (None,) * len(NORM)
NO_PROLOGUE: dict[str, Any] = dict(dict.fromkeys(f"{name}_ptr" for name in NORM), eps=0.0, BEFORE="none")


class Map:
    """A feature map as the kernels see it: [n, c, hw], dense, channels first or last. With `slices`, c is the channels of one of so many slices of
    them, and `empty`, `same` and `output` are about maps of that size.

    prologue: what kernels that compute with u = b(norm(x)) take, b = `before` and norm a BatchNorm with its running statistics."""

    def __init__(self, x: Tensor, slices: int = 1, norm: Norm = NO_NORM, before: str = "none", eps: str = ""):
        layout = _channels_last(x)
        self.original = x
        if layout is None:
            x = torch.empty_like(x).copy_(x)  # dense, dimensions in x's order
            layout = _channels_last(x)
            if layout is None:
                x, layout = x.contiguous(), False
        self.x, self.channels_last = x, layout
        self.slices, self.before = slices, before
        self.n, self.c = x.shape[0], x.shape[1] // slices
        self.hw = math.prod(x.shape[2:])
        self.acc = accumulator(x.dtype)
        vec_c, vec_p = (vector(self.c), 1) if layout else (1, vector(self.hw))
        tl = kernels().tl
        self.acc_tl = tl.float64 if self.acc == torch.float64 else tl.float32
        self.args = dict(
            C_V=self.c // vec_c,
            HW_V=self.hw // vec_p,
            VEC_C=vec_c,
            VEC_P=vec_p,
            CHANNELS_LAST=layout,
            LARGE=x.shape[1] * self.hw >= 2**31,
            ACC=self.acc_tl,
        )
        self.prologue = NO_PROLOGUE
        if before != "none" or norm[2] is not None:
            pointers = (matrix(t) for t in norm)
            self.prologue = dict(zip(NO_PROLOGUE, (*pointers, float(eps or 0), before), strict=True))

    def config(self, role: str, maps: int = 1, row: int = 0) -> tuning.Config:
        config = tuning.choose(role, self.n, self.c, self.hw, self.x.element_size(), self.channels_last, self.x.device, maps, row)
        return config if self.prologue is NO_PROLOGUE else config.preceded

    def same(self, t: Tensor | None) -> Tensor | None:
        """t in this map's layout; a copy only where it has another one."""
        if t is None or (t.movedim(1, -1) if self.channels_last else t).is_contiguous() or (self.slices == 1 and t.stride() == self.x.stride()):
            return t
        return torch.empty_like(self._slice(self.x), dtype=t.dtype).copy_(t)

    def _slice(self, x: Tensor) -> Tensor:
        return x if self.slices == 1 else x.narrow(1, 0, self.c)

    def empty(self) -> Tensor:
        return torch.empty_like(self._slice(self.x))

    def output(self, t: Tensor) -> Tensor:
        """t with the strides of empty_like(original), which every fake promises."""
        if self.original is self.x:
            return t
        expected = torch.empty_like(self.original if t.shape == self.original.shape else self._slice(self.original), dtype=t.dtype)
        return t if t.stride() == expected.stride() else expected.copy_(t)

    def small(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype or self.acc)


_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(x: Tensor, count: int) -> Tensor:
    """At least `count` zeros that the kernels leave zero again.

    One buffer per device and stream, because launches of one stream follow each other. A captured graph gets zeros of its own: it may be replayed
    beside another that was captured on the same stream.
    """
    recording = _replay.current()
    if recording is not None:
        with _replay.unwatched():
            found = _zeros(x, count)
        recording.found(found, lambda x: _zeros(x, count))
        return found
    return _zeros(x, count)


def _zeros(x: Tensor, count: int) -> Tensor:
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=x.device)
    key = (x.device, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0)
    found = _counters.get(key)
    if found is None or found.numel() < count:
        found = _counters[key] = _lasting_zeros(max(4096, tuning.power_of_two(count)), x.device)
    return found


def _lasting_zeros(count: int, device: torch.device) -> Tensor:
    """Zeros that outlive the memory pool in use: the warm-up of a CUDA graph sends this thread's allocations to the graph's own pool, so on a GPU
    another thread makes them."""

    def make() -> Tensor:
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # the caller's stream does not wait for that thread's
        return zeros

    if device.type != "cuda":
        return make()
    with ThreadPoolExecutor(max_workers=1) as other:
        return other.submit(make).result()


Parameter = TypeVar("Parameter", Tensor, Tensor | None)


def matrix(w: Parameter) -> Parameter:
    """A weight whose memory is row-major."""
    return w if w is None or w.is_contiguous() else w.contiguous()


def pool_rows(pools: str) -> dict[str, int]:
    """Rows of the pooled values, as the kernels' *_AT arguments."""
    names = pools.split("+")
    keys = dict(AVG_AT="avg", MAX_AT="max", MIX_AT="avg_max", LP_AT="lp", LSE_AT="lse")
    return {key: names.index(name) if name in names else -1 for key, name in keys.items()}


def reads_map(activation: str, spec: Spec) -> bool:
    """Whether the gradient of a map that is pooled and passes the activation needs the map itself."""
    pools = spec.pools.split("+")
    return activation != "none" or "lp" in pools or "lse" in pools or (spec.max_grad == "even" and ("max" in pools or "avg_max" in pools))


NO_POOLS = dict(AVG_AT=-1, MAX_AT=-1, MIX_AT=-1, LP_AT=-1, LSE_AT=-1)


def gates(spec: Spec) -> dict[str, str]:
    """The functions of the gates and how they combine, as the kernels' arguments."""
    return dict(GATE=spec.gate, SPATIAL=spec.spatial_gate, COMBINE=spec.combine, JOINT=spec.joint)


def gate_forward(
    m: Map, logits: Tensor | None, spatial: Tensor | None, residual: Tensor | None, spec: Spec, shift: Tensor | None = None
) -> Tensor:
    """y = a(u gates + shift + residual), u the map after its prologue, gates of the logits and the spatial logits."""
    y = m.empty()
    config = m.config("tile")
    programs = m.n * -(-m.c // config.block_c) * -(-m.hw // config.block_p)
    kernels().gate_fwd_kernel[(programs,)](
        x_ptr=m.x, logits_ptr=logits, spatial_ptr=spatial, shift_ptr=shift, residual_ptr=m.same(residual), y_ptr=y, **m.args, **m.prologue,
        **gates(spec), HAS_CHANNEL=logits is not None, HAS_SPATIAL=spatial is not None, HAS_SHIFT=shift is not None,
        HAS_RESIDUAL=residual is not None, ACTIVATION=spec.activation, **config.args,
    )  # fmt: skip
    return m.output(y)


class Cotangent:
    """What flows into the backward passes of a gate: g with the activation still to be undone, or da after the first pass stored it."""

    def __init__(self, m: Map, g: Tensor, residual: Tensor | None, spec: Any):
        self.g = m.same(g)
        self.activation = spec.activation
        # without an activation neither the residual nor its gradient is needed
        self.residual = m.same(residual) if spec.activation != "none" else None
        self.da = m.empty() if self.residual is not None else None

    def args(self) -> dict[str, Any]:
        return dict(
            g_ptr=self.g,
            residual_ptr=self.residual,
            HAS_RESIDUAL=self.residual is not None,
            ACTIVATION=self.activation,
        )

    def stored(self) -> Cotangent:
        """After a pass that stored da."""
        if self.da is not None:
            self.g, self.da, self.residual, self.activation = self.da, None, None, "none"
        return self

    def residual_grad(self, m: Map, g: Tensor, residual: Tensor | None) -> Tensor | None:
        """The residual's gradient: da, which is g itself where there is no activation."""
        if residual is None:
            return None
        assert self.g is not None
        return g if g.dtype == residual.dtype and self.g is m.same(g) else self.g


def gate_backward_channel(
    m: Map, logits: Tensor, spec: Spec, *, cotangent: Cotangent | None = None, dx: Tensor | None = None,
    spatial: tuple[Tensor, Tensor, Tensor] | None = None, extra: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of the channel logits [N, C]; stores da into the cotangent, and dx where it is given."""
    config = m.config("channel")
    blocks_c = -(-m.c // config.block_c)
    splits = config.splits
    dlogits = m.small(m.n, m.c, dtype=dtype)
    part = m.small(m.n, splits, m.c) if splits > 1 else None
    stats, dstats, saux = spatial or (None, None, None)
    args = cotangent.args() if cotangent else dict(g_ptr=None, residual_ptr=None, HAS_RESIDUAL=False, ACTIVATION="none")
    da = cotangent.da if cotangent else None
    kernels().gate_bwd_channel_kernel[(m.n * blocks_c * splits,)](
        x_ptr=m.x, logits_ptr=logits, stats_ptr=stats, dstats_ptr=dstats, saux_ptr=saux, extra_ptr=extra, part_ptr=part,
        counter_ptr=counters(m.x, m.n * blocks_c) if splits > 1 else None, da_ptr=da, dx_ptr=dx, dlogits_ptr=dlogits, **m.args,
        **m.prologue, **args, SPLITS=splits, GATE=spec.gate, STORE_DA=da is not None, STORE_DX=dx is not None, HAS_STATS=spatial is not None,
        EVEN=spec.max_grad == "even", HAS_EXTRA=extra is not None, **config.args,
    )  # fmt: skip
    return dlogits


def gate_backward_column(
    m: Map, logits: Tensor | None, spatial: Tensor, spec: Spec, cotangent: Cotangent, dx: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the spatial logits and, where there are any, of the channel logits; stores da and dx as above."""
    config = m.config("column")
    blocks_p = -(-m.hw // config.block_p)
    dspatial = torch.empty_like(spatial)
    dlogits = m.small(m.n, m.c, dtype=dtype) if logits is not None else None
    kernels().gate_bwd_column_kernel[(m.n * blocks_p,)](
        x_ptr=m.x, logits_ptr=logits, spatial_ptr=spatial, da_ptr=cotangent.da, dx_ptr=dx, dspatial_ptr=dspatial,
        part_ptr=m.small(m.n, blocks_p, m.c) if logits is not None else None,
        counter_ptr=counters(m.x, m.n) if logits is not None else None, dlogits_ptr=dlogits, **m.args, **cotangent.args(),
        **gates(spec), HAS_CHANNEL=logits is not None, STORE_DA=cotangent.da is not None, STORE_DX=dx is not None,
        **config.args,
    )  # fmt: skip
    return dspatial, dlogits


def gate_backward_input(
    m: Map, spec: Spec, *, cotangent: Cotangent | None = None, logits: Tensor | None = None, spatial: Tensor | None = None,
    statistics: tuple[Tensor, Tensor, Tensor] | None = None, pooled: tuple[Tensor, Tensor, Tensor | None] | None = None,
    pixel: tuple[Tensor, Tensor] | None = None, through: Tensor | None = None, of: str = "none",
) -> Tensor:  # fmt: skip
    """dx, written once, from the gate (cotangent), the spatial statistics (stats, dstats, aux), the channel statistics (z, dz, aux), a 1x1
    convolution to one channel (w, dq) and what comes through other layers on the map, or on what the activation `of` makes of it."""
    dx = m.empty()
    config = m.config("tile")
    programs = m.n * -(-m.c // config.block_c) * -(-m.hw // config.block_p)
    args = cotangent.args() if cotangent else dict(g_ptr=None, residual_ptr=None, HAS_RESIDUAL=False, ACTIVATION="none")
    stats, dstats, saux = statistics or (None, None, None)
    z, dz, aux = pooled or (None, None, None)
    w, dq = pixel or (None, None)
    even = spec.max_grad == "even"
    rows = pool_rows(spec.pools) if pooled else NO_POOLS
    need_x = spec.combine == "max" or (even and statistics is not None) or reads_map(str(args["ACTIVATION"]), spec if pooled else Spec())
    need_x |= m.before != "none" or (through is not None and of != "none")
    kernels().gate_bwd_input_kernel[(programs,)](
        x_ptr=m.x, logits_ptr=logits, spatial_ptr=spatial, stats_ptr=stats, dstats_ptr=dstats, saux_ptr=saux, z_ptr=z, dz_ptr=dz, aux_ptr=aux,
        w_ptr=w, dpixel_ptr=dq, through_ptr=m.same(through), dx_ptr=dx, **m.args, **m.prologue, **args, **rows,
        K=dz.shape[1] if dz is not None else 1, ROWS=z.shape[1] if z is not None else 1, **gates(spec), HAS_CHANNEL=logits is not None,
        HAS_SPATIAL=spatial is not None, THROUGH="" if through is None else of, HAS_G=cotangent is not None,
        NEED_X=need_x, HAS_STATS=statistics is not None, SPATIAL_EVEN=even, EVEN=even, HAS_PIXEL=pixel is not None,
        **config.args,
    )  # fmt: skip
    return m.output(dx)
