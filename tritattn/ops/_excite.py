"""Squeeze and excite: the channel statistics, the small network on them, and the gradients of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _linear, reference, tuning
from .._library import INTERPRET
from .._spec import Spec
from ._launch import Cotangent, Map, counters, gate_backward_channel, gate_backward_input, gate_forward, kernels, matrix, pool_rows, reads_map
from ._networks import hooked

NAMES = ("w1?", "b1?", "w2?", "b2?")
RESULTS = ("logits", "z", "hidden", "aux")


class Excited(NamedTuple):
    """logits [N, C] (empty without an excite), z [N, rows, C], hidden [N, K, R] before its activation, aux [N, C] of the maximum."""

    logits: Tensor
    z: Tensor
    hidden: Tensor
    aux: Tensor


def _sizes(w1: Tensor | None, spec: Spec) -> tuple[int, int, int]:
    """(K pools, rows of z, R hidden units)."""
    k = spec.pools.count("+") + 1
    return k, 2 if spec.pools == "avg_max" else k, w1.shape[0] if w1 is not None else 0


def fake(x: Tensor, w1: Tensor | None, spec: Spec) -> Excited:
    n, c = x.shape[:2]
    k, rows, r = _sizes(w1, spec)
    acc = reference.accumulator(x.dtype)
    logits = x.new_empty((n, c) if spec.kind != "none" else (0,), dtype=acc)
    return Excited(logits, x.new_empty((n, rows, c), dtype=acc), x.new_empty((n, k, r), dtype=acc), x.new_empty((n, c), dtype=torch.int32))


def plain(x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None, spec: Spec) -> Tensor:
    """The reference's logits [N, C]; without an excite its statistics [N, K, C]."""
    z = reference.channel_statistics(x, spec.pools.split("+"), max_grad=spec.max_grad)
    return z if spec.kind == "none" else reference.excite(z, w1, b1, w2, b2, kind=spec.kind, hidden=spec.hidden)


def _bytes(*weights: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in weights if t is not None)


def _small(m: Map, w1: Tensor | None, w2: Tensor | None, maps: int = 1) -> bool:
    """Whether the weights are under a quarter of an image's bytes, or of those of so many maps, so that one program per image may read them."""
    # by a model: it takes 0.7 us for a first tile of 8 KB and 0.2 for each that follows at once, so 4 us for SE of 512 channels at 28x28, while the
    # images of a ticket's lag move for 10; 11 for SE of 1024 at 14x14, after the last image, where two launches take as long, and 15 for ESE of 512
    return 4 * _bytes(w1, w2) < maps * m.c * m.hw * m.x.element_size()


def _squeeze(m: Map, w1: Tensor | None, w2: Tensor | None, spec: Spec) -> dict[str, Any]:
    """The pools and the layers, as kernels take them."""
    k, rows, r = _sizes(w1, spec)
    return dict(w1_ptr=w1, w2_ptr=w2, R=r, K=k, ROWS=rows, **pool_rows(spec.pools), EVEN=spec.max_grad == "even", HIDDEN=spec.hidden)


def image_excite(m: Map, w1: Tensor | None, w2: Tensor | None, spec: Spec) -> dict[str, Any]:
    """The excite that one program does, as kernels take it."""
    convolution = spec.kind in ("conv", "circular")
    # as much of a weight as 8 warps load in two vectors each; of a convolution's input, which they load once for every tap, four elements a thread
    block_r = min(tuning.power_of_two(_sizes(w1, spec)[2]), 32) if spec.kind == "mlp" else 32
    rows = 8192 // (block_r * w2.element_size()) if w2 is not None else 1
    return dict(
        KIND=spec.kind, TAPS=w2.numel() if w2 is not None and convolution else 0, EXCITE_R=block_r,
        EXCITE_C=min(tuning.power_of_two(m.c), 1024 if convolution else rows),
    )  # fmt: skip


def _pass(m: Map, out: Excited, params: Sequence[Tensor | None], spec: Spec, config: tuning.Config) -> dict[str, Any]:
    """What every kernel that squeezes takes, but for the excite; the parameters are matrices."""
    w1, b1, w2, b2 = params
    splits = config.splits
    return dict(
        x_ptr=m.x, z_ptr=out.z, aux_ptr=out.aux, part_ptr=m.small(m.n, splits, 4, m.c) if splits > 1 else None,
        part_aux_ptr=m.small(m.n, splits, m.c, dtype=torch.int32) if splits > 1 else None, hidden_ptr=out.hidden, logits_ptr=out.logits,
        b1_ptr=b1, b2_ptr=b2, HAS_B1=b1 is not None, HAS_B2=b2 is not None, SPLITS=splits, **m.args, **m.prologue, **config.args,
        **_squeeze(m, w1, w2, spec),
    )  # fmt: skip


def arguments(m: Map, out: Excited, params: Sequence[Tensor | None], spec: Spec, config: tuning.Config, inside: bool) -> dict[str, Any]:
    """What the kernels take that squeeze; inside: and whose last program of an image does the excite."""
    return _pass(m, out, params, spec, config) | image_excite(m, params[0], params[2], spec if inside else spec._replace(kind="none"))


def ticketed(m: Map, w1: Tensor | None, w2: Tensor | None, others: int = 0, maps: int = 1) -> tuple[tuple[int], dict[str, Any]] | None:
    """(grid, arguments) of a launch of kernels/ticket.py; None where the weights are too large for it, or a launch for each pass is better.

    others: programs of an image in the second pass, where they are not those of the first. maps: that are read at once."""
    config = m.config("ticket", maps)
    if not config.lag or not _small(m, w1, w2, maps):
        return None
    squeezes = -(-m.c // config.block_c) * config.splits
    others = others or squeezes
    lag = -(-2 * squeezes * config.lag // (squeezes + others))  # as many programs apart
    return ((m.n + lag) * (squeezes + others),), dict(counter_ptr=counters(m.x, 2 * m.n + 1), N=m.n, lag=lag)


def staged(m: Map, w1: Tensor | None, w2: Tensor | None, spec: Spec, backward: bool) -> tuple[tuple[int], dict[str, Any]] | None:
    """(grid, arguments) of a launch of kernels/stages.py; None where a launch for each pass is better."""
    config = m.config("ticket")
    if not config.lag or spec.kind not in ("mlp", "fc"):
        return None
    k, _, r = _sizes(w1, spec)
    steps = 3 if w1 is not None else 2
    images, lag = _linear.blocks(
        m.n, m.c * m.hw * m.x.element_size(), _bytes(w1, w2), config.lag, steps, 2 if backward else 1, tuning.cache(m.x.device)
    )
    if not images:
        return None
    if images >= m.n:
        images, lag = m.n, 0
    processors = tuning.processors(m.x.device) // (1 if images == m.n else steps + 1)  # blocks are at work beside each other
    layers = [(images * k, r, m.c)] if w1 is not None else []
    layers.append((images * k if backward else images, m.c, r if w1 is not None else m.c))
    right = None if w2 is None else w2.dtype
    tiles = [_linear.choose(*sizes, m.acc.itemsize, processors, right=right) for sizes in layers]
    programs = [tile.programs(rows, columns) for tile, (rows, columns, _) in zip(tiles, layers, strict=True)]
    first, second = programs if w1 is not None else (0, *programs)
    count, passes = -(-m.n // images), images * -(-m.c // config.block_c) * config.splits
    slots = max(number * tile.slot for number, tile in zip(programs, tiles, strict=True))
    return ((count + steps * lag) * (2 * passes + first + second),), dict(
        counter_ptr=counters(m.x, m.n + count * (6 + first + second) + 1), N=m.n, images=images, lag=lag, first=first, second=second, slots=slots,
        product_ptr=m.small(count, slots) if any(tile.splits > 1 for tile in tiles) else None, MLP=w1 is not None, FIRST=tiles[0].cut,
        SECOND=tiles[-1].cut, INTERPRETED=INTERPRET, num_warps=max(4, config.num_warps),
        **({"COMBINE_C": min(tuning.power_of_two(m.c), 1024)} if backward else {}),
    )  # fmt: skip


def one_launch(m: Map, w1: Tensor | None, w2: Tensor | None, spec: Spec, backward: bool) -> tuple[str, tuple[int], dict[str, Any]] | None:
    """(strategy, grid, arguments) of both passes in one launch."""
    if ticket := ticketed(m, w1, w2):
        return "ticket", ticket[0], ticket[1] | image_excite(m, w1, w2, spec)
    stages = staged(m, w1, w2, spec, backward)
    return None if stages is None else ("stages", *stages)


def gated(m: Map, params: Sequence[Tensor | None], residual: Tensor | None, spec: Spec) -> tuple[Tensor, Excited]:
    """(y, what led to its gate): one launch where its images follow each other closely, see kernels/ticket.py and kernels/stages.py."""
    w1, b1, w2, b2 = params = [matrix(t) for t in params]
    launch = one_launch(m, w1, w2, spec, False)
    if launch is None:
        excited = forward(m, w1, b1, w2, b2, spec)
        return gate_forward(m, excited.logits, None, residual, spec), excited
    strategy, grid, args = launch
    out, y = fake(m.x, w1, spec), m.empty()
    kernel = kernels().channel_gate_ticket_fwd_kernel if strategy == "ticket" else kernels().channel_gate_stages_fwd_kernel
    kernel[grid](
        **_pass(m, out, params, spec, m.config("ticket")) | args, residual_ptr=m.same(residual), y_ptr=y, GATE=spec.gate,
        HAS_RESIDUAL=residual is not None, ACTIVATION=spec.activation,
    )  # fmt: skip
    return m.output(y), out


def gated_backward(
    m: Map, cotangent: Cotangent, params: Sequence[Tensor | None], saved: Excited, spec: Spec, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the map, w1, b1, w2, b2, each only if it is needed; stores da into the cotangent."""
    w1, w2 = matrix(params[0]), matrix(params[2])
    launch = one_launch(m, w1, w2, spec, True) if needs[0] else None
    if launch is None:
        dlogits = gate_backward_channel(m, saved.logits, spec, cotangent=cotangent)
        dz, grads = backward(m, dlogits, params, saved, spec, needs[1:], needs[0])
        cotangent.stored()
        if not needs[0]:
            return [None, *grads]
        assert dz is not None
        return [gate_backward_input(m, spec, cotangent=cotangent, logits=saved.logits, pooled=(saved.z, dz, saved.aux)), *grads]
    strategy, grid, args = launch
    config = m.config("ticket")
    k, rows, r = _sizes(w1, spec)
    dx, dlogits, dz, dhidden = m.empty(), m.small(m.n, m.c), m.small(m.n, k, m.c), torch.empty_like(saved.hidden)
    kernel = kernels().channel_gate_ticket_bwd_kernel if strategy == "ticket" else kernels().channel_gate_stages_bwd_kernel
    tiles = config.args | _squeeze(m, w1, w2, spec) | args
    kernel[grid](
        **tiles, **cotangent.args(), x_ptr=m.x, da_ptr=cotangent.da, dx_ptr=dx, logits_ptr=saved.logits, z_ptr=saved.z, aux_ptr=saved.aux,
        hidden_ptr=saved.hidden, part_ptr=m.small(m.n, config.splits, m.c), dlogits_ptr=dlogits, dhidden_ptr=dhidden, dz_ptr=dz, GATE=spec.gate,
        STORE_DA=cotangent.da is not None, NEED_X=m.before != "none" or reads_map(cotangent.activation if cotangent.da is None else "none", spec),
        **m.args, **m.prologue, SPLITS=config.splits,
    )  # fmt: skip
    cotangent.stored()
    return [m.output(dx), *backward(m, dlogits, params, saved, spec, needs[1:], False, dhidden)[1]]


def forward(
    m: Map, w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None, spec: Spec, *, one_launch: bool = False,
    other: Tensor | None = None, total: Tensor | None = None,
) -> Excited:  # fmt: skip
    """Of the map; with `other`, which is like it, of the sum of the two, which is stored in `total`.

    One launch while the excite's weights are small; then the last program of an image does the excite. Otherwise the excite follows, batched over
    images, so that weights are not read once per image; not with `one_launch`."""
    w1, b1, w2, b2 = (matrix(t) for t in (w1, b1, w2, b2))
    out = fake(m.x, w1, spec)
    inside = spec.kind != "none" and (one_launch or _small(m, w1, w2))
    config = m.config("excited" if inside and spec.kind == "mlp" else "means" if spec.pools == "avg" else "pools")
    programs = m.n * -(-m.c // config.block_c) * config.splits
    kernels().channel_squeeze_fwd_kernel[(programs,)](
        **arguments(m, out, (w1, b1, w2, b2), spec, config, inside), other_ptr=other, sum_ptr=total, HAS_OTHER=other is not None,
        counter_ptr=counters(m.x, m.n) if config.splits > 1 or inside else None,
    )  # fmt: skip
    if spec.kind != "none" and not inside:
        excite(m, out, (w1, b1, w2, b2), spec)
    return out


def excite(m: Map, out: Excited, params: Sequence[Tensor | None], spec: Spec) -> None:
    """hidden and logits from z, batched over images; the parameters are matrices."""
    w1, b1, w2, b2 = params
    k, rows, r = _sizes(w1, spec)
    assert w2 is not None
    image = rows * m.c
    if spec.kind == "mlp":
        assert w1 is not None
        step = m.c if rows == k else image
        linear(m, out.z, w1, out.hidden, (m.n * k, r, m.c), a=(step, 1, 0), b=(m.c, 1), to=(r, 1), bias=b1)
        linear(
            m, out.hidden, w2, out.logits, (m.n, m.c, r), a=(k * r, 1, r), b=(r, 1), to=(m.c, 1), q=k, activation=spec.hidden, bias=b2, scale=k
        )  # fmt: skip
    elif spec.kind == "fc":
        linear(m, out.z, w2, out.logits, (m.n, m.c, m.c), a=(image, 1, m.c), b=(m.c, 1), to=(m.c, 1), q=k, bias=b2, scale=k)
    else:
        out.logits.copy_(reference.excite(out.z, None, None, w2, b2, kind=spec.kind, hidden="none"))


def backward(
    m: Map, dlogits: Tensor, params: Sequence[Tensor | None], saved: Excited, spec: Spec, needs: Sequence[bool], need_z: bool,
    dhidden: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """(dz [N, K, C], gradients of w1, b1, w2, b2), each only if it is needed; dhidden [N, K, R] where it is known."""
    w1, b1, w2, b2 = params
    w1, w2 = matrix(w1), matrix(w2)
    assert w2 is not None
    k, rows, r = _sizes(w1, spec)
    n, c = m.n, m.c
    need_w1, need_w2 = needs[0] or needs[1], needs[2] or needs[3]
    dz: Tensor | None = None
    grads: list[Tensor | None] = [None] * 4
    if not (need_w1 or need_w2 or need_z):
        return dz, grads
    if spec.kind in ("conv", "circular"):
        return _convolution_backward(m, dlogits, w2, b2, saved.z, spec.kind, needs)
    image = rows * c
    if spec.kind == "fc":
        if need_z:
            dz = m.small(n, k, c)
            linear(m, dlogits, w2, dz, (n * k, c, c), a=(c, 1, 0), b=(1, c), to=(c, 1), a_div=k)
        if need_w2:
            grads[2], grads[3] = weight_grads(m, saved.z, dlogits, w2, b2, (c, c, n), a=(1, image, c), q=k, scale=k, activation="none")
        return dz, grads
    assert w1 is not None
    dh = dhidden
    if dh is None and (need_w1 or need_z):
        dh = m.small(n * k, r)
        linear(m, dlogits, w2, dh, (n * k, r, c), a=(c, 1, 0), b=(1, r), to=(r, 1), a_div=k, h=saved.hidden, grad=spec.hidden)
    if need_z:
        assert dh is not None
        dz = m.small(n, k, c)
        linear(m, dh, w1, dz, (n * k, c, r), a=(r, 1, 0), b=(1, c), to=(c, 1))
    step = c if rows == k else image
    if need_w1 and need_w2:
        grads = [None if t is None else t.new_empty(t.shape) for t in (w1, b1, w2, b2)]
        programs, args = _tiles(m, (r, c, n), "both_weights", dlogits)
        kernels().mlp_weights_bwd_kernel[(programs,)](
            saved.z, saved.hidden, dh, dlogits, *grads, N=n, C=c, R=r, z_k=step, K=k, HIDDEN=spec.hidden, HAS_B1=b1 is not None,
            HAS_B2=b2 is not None, **args,
        )  # fmt: skip
    elif need_w2:
        grads[2], grads[3] = weight_grads(m, saved.hidden, dlogits, w2, b2, (r, c, n), a=(1, k * r, r), q=k, scale=k, activation=spec.hidden)
    elif need_w1:
        assert dh is not None
        grads[0], grads[1] = weight_grads(m, saved.z, dh, w1, b1, (c, r, n * k), a=(1, step, 0), q=1, scale=1, activation="none")
    return dz, grads


def weight_grads(
    m: Map, left: Tensor, right: Tensor, w: Tensor, bias: Tensor | None, sizes: tuple[int, int, int], **options: Any
) -> tuple[Tensor, Tensor | None]:
    """dw[j, i] = sum over k of left[i, k] right[k, j], dbias[j] = scale * sum over k of right[k, j]."""
    rows, columns, _ = sizes
    dw = w.new_empty(w.shape)
    dbias = bias.new_empty(bias.shape) if bias is not None else None
    linear(m, left, right, dw, sizes, b=(1, columns), to=(1, rows), total=dbias, role="weights", **options)
    return dw, dbias


def linear(
    m: Map, left: Tensor, right: Tensor, out: Tensor, sizes: tuple[int, int, int], *, a: tuple[int, int, int], b: tuple[int, int],
    to: tuple[int, int],
    q: int = 1, a_div: int = 1, activation: str = "none", bias: Tensor | None = None, scale: int = 1, h: Tensor | None = None, grad: str = "none",
    total: Tensor | None = None, role: str = "linear",
) -> None:  # fmt: skip
    """kernels.excite.linear_kernel: sizes (M, J, K), strides a of left (m, k, q), b of right (j, k), to of out (m, j)."""
    programs, args = _tiles(m, sizes, role, right)
    kernels().linear_kernel[(programs,)](
        left, right, bias, h, out, total, M=sizes[0], J=sizes[1], K=sizes[2], a_m=a[0], a_k=a[1], a_q=a[2], b_j=b[0], b_k=b[1], out_m=to[0],
        out_j=to[1], bias_scale=scale, Q=q, A_DIV=a_div, A_ACTIVATION=activation, OUT_GRAD=grad, HAS_BIAS=bias is not None,
        HAS_SUM=total is not None, **args,
    )  # fmt: skip


def _tiles(m: Map, sizes: tuple[int, int, int], role: str, right: Tensor) -> tuple[int, dict[str, Any]]:
    """(programs, arguments) of a launch of a product (M, J, K), or of two; see _linear.choose."""
    tile = _linear.choose(*sizes, m.acc.itemsize, tuning.processors(m.x.device), m.x.device, role, right.dtype)
    programs = (2 if role == "both_weights" else 1) * tile.programs(*sizes[:2])
    part, counter = None, None
    if tile.splits > 1:
        part = m.small(programs, max((tile.block_m + 1) * tile.block_j, (tile.block_j + 1) * tile.block_m))
        counter = counters(m.x, programs // tile.splits)
    return programs, dict(part_ptr=part, counter_ptr=counter, INTERPRETED=INTERPRET, ACC=m.acc_tl, **tile.args)


def _convolution_backward(
    m: Map, dlogits: Tensor, w: Tensor, b: Tensor | None, z: Tensor, kind: str, needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """(dz [N, 1, C], gradients of w1, b1, w2, b2) of the 1-D convolution along channels."""
    taps = w.numel()
    block_n, block_c = min(tuning.power_of_two(m.n), 8), min(tuning.power_of_two(m.c), 256)
    programs = -(-m.n // block_n) * -(-m.c // block_c)
    dz = m.small(m.n, 1, m.c)
    grads: list[Tensor | None] = [None] * 4
    wanted = needs[2] or needs[3]
    if wanted:
        grads[2], grads[3] = w.new_empty(w.shape), None if b is None else b.new_empty(b.shape)
    kernels().channel_convolution_bwd_kernel[(programs,)](
        dlogits, z, w, dz, grads[2], grads[3], m.small(programs, taps + 1) if wanted else None, counters(m.x, 1) if wanted else None, m.n, m.c,
        TAPS=taps, CIRCULAR=kind == "circular", HAS_DW=wanted, HAS_DB=grads[3] is not None, BLOCK_N=block_n, BLOCK_C=block_c,
        BLOCK_T=tuning.power_of_two(taps + 1), ACC=m.acc_tl,
    )  # fmt: skip
    return dz, grads


Norm = torch.nn.modules.batchnorm._BatchNorm


def plain_norm(norm: Any) -> bool:
    """Whether norm is a BatchNorm that applies running statistics and does nothing else when called, so that it can be part of what comes before."""
    return (
        isinstance(norm, Norm)
        and not norm.training
        and norm.running_mean is not None
        and type(norm).forward in (Norm.forward, torch.nn.SyncBatchNorm.forward)
        and not hooked(norm)
    )


def folded(w: Tensor, b: Tensor | None, norm: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A layer [R, ...] and the BatchNorm that follows it, as one layer in that dtype."""
    w, mean, var = (t.to(dtype) for t in (w, norm.running_mean, norm.running_var))
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    shift = scale * ((0 if b is None else b.to(dtype)) - mean)
    if norm.bias is not None:
        shift = shift + norm.bias.to(dtype)
    return w * scale.view(-1, *(1,) * (w.dim() - 1)), shift
