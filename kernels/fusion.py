"""Attentional feature fusion: a weight for every element, from a map of logits and one logit per channel, that blends two maps or gates one.

y_ncp = a(FACTOR (x_ncp w_ncp + other_ncp (1 - w_ncp)) + residual_ncp), w_ncp = f(local_ncp + pooled_nc); without a second map y_ncp = a(FACTOR x_ncp
w_ncp + residual_ncp). Backward is one pass, `blend_bwd_kernel`; where what else flows into the maps is not known yet, it leaves their gradients to
`blend_bwd_input_kernel`, which writes them once.
"""

import triton
import triton.language as tl

from .excite import arrive
from .gate import output_cotangent
from .pointwise import activation, chain, gate_function, gate_grad, image_offset, load_tile, own_range, own_tile, tile_offsets


@triton.jit
def load_logits(local_ptr, pooled_ptr, image, offsets, n, c, mask, C, HAS_POOLED: tl.constexpr, ACC: tl.constexpr):
    """local_ncp + pooled_nc"""
    t = load_tile(local_ptr + image, offsets, mask, ACC)
    if HAS_POOLED:
        t += tl.load(pooled_ptr + n.to(tl.int64) * C + c, mask=c < C, other=0.0).to(ACC)[:, None]
    return t


@triton.jit
def blend(x, other, w, FACTOR: tl.constexpr, HAS_OTHER: tl.constexpr):
    y = x * w
    if HAS_OTHER:
        y += other * (1 - w)
    return FACTOR * y


@triton.jit
def blend_fwd_kernel(
    x_ptr, other_ptr, local_ptr, pooled_ptr, residual_ptr, y_ptr, C_V, HW_V, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    GATE: tl.constexpr, FACTOR: tl.constexpr, HAS_OTHER: tl.constexpr, HAS_POOLED: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y_ncp = a(FACTOR (x_ncp w_ncp + other_ncp (1 - w_ncp)) + residual_ncp), w_ncp = f(local_ncp + pooled_nc).

    x, other, local, residual and y [N, C, HW] or [N, HW, C], pooled [N, C]. A program owns one tile of one image.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    n, c, p, mask, image, offsets = own_tile(C, HW, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P)
    x = load_tile(x_ptr + image, offsets, mask, ACC)
    other = x
    if HAS_OTHER:
        other = load_tile(other_ptr + image, offsets, mask, ACC)
    w = gate_function(load_logits(local_ptr, pooled_ptr, image, offsets, n, c, mask, C, HAS_POOLED, ACC), GATE)
    y = blend(x, other, w, FACTOR, HAS_OTHER)
    if HAS_RESIDUAL:
        y += load_tile(residual_ptr + image, offsets, mask, ACC)
    tl.store(y_ptr + image + offsets, activation(y, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def blend_bwd_kernel(
    g_ptr, x_ptr, other_ptr, local_ptr, pooled_ptr, residual_ptr, part_ptr, counter_ptr, da_ptr, dx_ptr, dother_ptr, dlocal_ptr, dpooled_ptr,
    C_V, HW_V, VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr, GATE: tl.constexpr, FACTOR: tl.constexpr,
    HAS_OTHER: tl.constexpr, HAS_POOLED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STORE_DA: tl.constexpr,
    STORE_DX: tl.constexpr, STORE_DOTHER: tl.constexpr, STORE_DLOCAL: tl.constexpr, STORE_DPOOLED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_ncp = FACTOR da_ncp w_ncp, dother_ncp = FACTOR da_ncp (1 - w_ncp), dlocal_ncp = FACTOR da_ncp (x_ncp - other_ncp) f'(local_ncp + pooled_nc),
    dpooled_nc = sum over p of dlocal_ncp, da = g a'(...).

    Each STORE_* writes one of them. A program owns BLOCK_C channels and one of SPLITS ranges of positions and leaves its share of dpooled in
    part [N, SPLITS, C]; the last one to arrive for a block of channels adds them in order.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    n, c, split, start, stop = own_range(tl.program_id(0), C, HW, SPLITS, BLOCK_C, BLOCK_P)
    image = image_offset(n, C, HW)
    total = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for p0 in range(start, stop, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (c[:, None] < C) & (p[None, :] < HW)
        offsets = tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
        x = load_tile(x_ptr + image, offsets, mask, ACC)
        other = x
        if HAS_OTHER:
            other = load_tile(other_ptr + image, offsets, mask, ACC)
        t = load_logits(local_ptr, pooled_ptr, image, offsets, n, c, mask, C, HAS_POOLED, ACC)
        w = gate_function(t, GATE)
        y = blend(x, other, w, FACTOR, HAS_OTHER)
        da = output_cotangent(g_ptr, residual_ptr, da_ptr, image, offsets, mask, y, 1.0, HAS_RESIDUAL, ACTIVATION, STORE_DA, ACC)
        da *= FACTOR
        if STORE_DX:
            tl.store(dx_ptr + image + offsets, (da * w).to(dx_ptr.dtype.element_ty), mask=mask)
        if STORE_DOTHER:
            tl.store(dother_ptr + image + offsets, (da * (1 - w)).to(dother_ptr.dtype.element_ty), mask=mask)
        if HAS_OTHER:
            x -= other
        dt = chain(da * x, gate_grad(t, GATE), GATE)
        if STORE_DLOCAL:
            tl.store(dlocal_ptr + image + offsets, dt.to(dlocal_ptr.dtype.element_ty), mask=mask)
        total += tl.where(mask, dt, 0.0)
    if STORE_DPOOLED:
        part_ptr += n.to(tl.int64) * SPLITS * C + c
        tl.store(part_ptr + split * C, tl.sum(total, 1), mask=c < C)
        if arrive(counter_ptr + tl.program_id(0) // SPLITS, SPLITS):
            found = tl.zeros([BLOCK_C], ACC)
            for i in range(SPLITS):
                found += tl.load(part_ptr + i * C, mask=c < C, other=0.0, cache_modifier=".cg")
            tl.store(dpooled_ptr + n.to(tl.int64) * C + c, found.to(dpooled_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def blend_bwd_input_kernel(
    da_ptr, local_ptr, pooled_ptr, dsum_ptr, dz_ptr, through_ptr, other_through_ptr, dx_ptr, dother_ptr, C_V, HW_V, VEC_C: tl.constexpr,
    VEC_P: tl.constexpr, GATE: tl.constexpr, FACTOR: tl.constexpr, HAS_DA: tl.constexpr, HAS_DSUM: tl.constexpr, HAS_DZ: tl.constexpr,
    STORE_DX: tl.constexpr, STORE_DOTHER: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_ncp = FACTOR da_ncp w_ncp + dsum_ncp + dz_nc / HW, dother_ncp = FACTOR da_ncp (1 - w_ncp) + dsum_ncp + dz_nc / HW.

    HAS_DA: what comes through the blend; HAS_DSUM: through the map x + other; HAS_DZ: through its channel means. To each is added what comes
    through other readers of the map, where there are any. A program owns one tile of an image.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    n, c, p, mask, image, offsets = own_tile(C, HW, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P)
    dsum = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    if HAS_DSUM:
        dsum += load_tile(dsum_ptr + image, offsets, mask, ACC)
    if HAS_DZ:
        dsum += (tl.load(dz_ptr + n.to(tl.int64) * C + c, mask=c < C, other=0.0) / HW)[:, None]
    da = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    w = da
    if HAS_DA:
        da = FACTOR * load_tile(da_ptr + image, offsets, mask, ACC)
        w = gate_function(load_logits(local_ptr, pooled_ptr, image, offsets, n, c, mask, C, True, ACC), GATE)
    if STORE_DX:
        dx = da * w + dsum
        if through_ptr is not None:
            dx += load_tile(through_ptr + image, offsets, mask, ACC)
        tl.store(dx_ptr + image + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if STORE_DOTHER:
        dother = da * (1 - w) + dsum
        if other_through_ptr is not None:
            dother += load_tile(other_through_ptr + image, offsets, mask, ACC)
        tl.store(dother_ptr + image + offsets, dother.to(dother_ptr.dtype.element_ty), mask=mask)
