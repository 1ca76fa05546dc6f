"""Gates of single positions: the 1x1 convolution to one channel (sSE), alone or beside a channel gate (scSE).

A position's gate needs all its channels and nothing else, so a program that owns BLOCK_P positions with all their channels reads x once: RESIDENT,
BLOCK_C >= C. Above that many channels it walks them twice, the second time from L2, unless group.py can hold the image.
"""

import triton
import triton.language as tl

from .excite import arrive
from .gate import combine_gates, combine_logits_grad, gated, load_gates, output_cotangent
from .pointwise import activation, chain, gate_function, gate_grad, image_offset, load_tile, tile_offsets


@triton.jit
def gate_pixels(
    n, block, x_ptr, w_ptr, b_ptr, logits_ptr, residual_ptr, y_ptr, q_ptr, C, HW, GATE: tl.constexpr, SPATIAL: tl.constexpr,
    HAS_CHANNEL: tl.constexpr, COMBINE: tl.constexpr, HAS_B: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    RESIDENT: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """What pixel_gate_fwd_kernel's program of that image and block of positions does. LAST: nobody reads its tiles of the maps again."""
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    image = image_offset(n, C, HW)
    q = tl.zeros([BLOCK_P], ACC)
    x = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c[:, None] < C) & (p[None, :] < HW)
        x = load_tile(x_ptr + image, tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE), mask, ACC, LAST and RESIDENT)
        w = tl.load(w_ptr + c, mask=c < C, other=0.0).to(ACC)
        q += tl.sum(x * w[:, None], 0)
    if HAS_B:
        q += tl.load(b_ptr).to(ACC)
    tl.store(q_ptr + n.to(tl.int64) * HW + p, q, mask=p < HW)
    h = gate_function(q, SPATIAL)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c[:, None] < C) & (p[None, :] < HW)
        offsets = tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
        if not RESIDENT:
            x = load_tile(x_ptr + image, offsets, mask, ACC, LAST)
        s, _ = load_gates(logits_ptr, q_ptr, n, c, p, C, HW, GATE, SPATIAL, HAS_CHANNEL, False, ACC)
        y = gated(x, s[:, None], h[None, :], COMBINE)
        if HAS_RESIDUAL:
            y += load_tile(residual_ptr + image, offsets, mask, ACC, LAST)
        y = activation(y, ACTIVATION).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + image + offsets, y, mask=mask, eviction_policy="evict_first" if LAST else "")


@triton.jit
def pixel_gate_fwd_kernel(
    x_ptr, w_ptr, b_ptr, logits_ptr, residual_ptr, y_ptr, q_ptr, C_V, HW_V, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    GATE: tl.constexpr, SPATIAL: tl.constexpr, HAS_CHANNEL: tl.constexpr, COMBINE: tl.constexpr, HAS_B: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDENT: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """q_np = sum over c of w_c x_ncp + b; y_ncp = a(x_ncp combine(f(logits_nc), h(q_np)) + residual_ncp).

    q [N, HW]. A program owns BLOCK_P positions of one image and all their channels.
    """
    HW = HW_V * VEC_P
    blocks_p = tl.cdiv(HW, BLOCK_P)
    gate_pixels(
        tl.program_id(0) // blocks_p, tl.program_id(0) % blocks_p, x_ptr, w_ptr, b_ptr, logits_ptr, residual_ptr, y_ptr, q_ptr, C_V * VEC_C, HW,
        GATE, SPATIAL, HAS_CHANNEL, COMBINE, HAS_B, HAS_RESIDUAL, ACTIVATION, RESIDENT, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC, False,
    )  # fmt: skip


@triton.jit
def pixel_gate_bwd_kernel(
    g_ptr, x_ptr, w_ptr, logits_ptr, q_ptr, residual_ptr, da_ptr, dx_ptr, dq_ptr, dw_part_ptr, ds_part_ptr, counter_ptr, dlogits_ptr,
    C_V, HW_V, groups, VEC_C: tl.constexpr, VEC_P: tl.constexpr, GATE: tl.constexpr, SPATIAL: tl.constexpr, HAS_CHANNEL: tl.constexpr,
    COMBINE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STORE_DA: tl.constexpr, STORE_DX: tl.constexpr,
    RESIDENT: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq_np = h'(q_np) sum over c of da_ncp x_ncp (share of q); dw_part = sum over p of x_ncp dq_np.
    HAS_CHANNEL: dlogits_nc = f'(logits_nc) sum over p of da_ncp x_ncp (share of s), through ds_part as in gate_bwd_column_kernel.
    STORE_DX (no channel gate): dx_ncp = da_ncp h(q_np) + w_c dq_np.

    dq [N, HW]; dw_part, ds_part [N, groups, C]. A program owns one of `groups` ranges of positions of one image and all their channels; without
    RESIDENT a group is one block of positions.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    n = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    per_group = tl.cdiv(tl.cdiv(HW, BLOCK_P), groups) * BLOCK_P
    image = image_offset(n, C, HW)
    dw = tl.zeros([BLOCK_C], ACC)
    ds = tl.zeros([BLOCK_C], ACC)
    x = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    da = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for p0 in range(group * per_group, tl.minimum(group * per_group + per_group, HW), BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        q = tl.load(q_ptr + n.to(tl.int64) * HW + p, mask=p < HW, other=0.0)
        h = gate_function(q, SPATIAL)
        dq = tl.zeros([BLOCK_P], ACC)
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mask = (c[:, None] < C) & (p[None, :] < HW)
            offsets = tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
            x = load_tile(x_ptr + image, offsets, mask, ACC)
            s, _ = load_gates(logits_ptr, q_ptr, n, c, p, C, HW, GATE, SPATIAL, HAS_CHANNEL, False, ACC)
            factor, _, share = combine_gates(x, s[:, None], h[None, :], COMBINE, "")
            da = output_cotangent(g_ptr, residual_ptr, da_ptr, image, offsets, mask, x, factor, HAS_RESIDUAL, ACTIVATION, STORE_DA, ACC)
            product = tl.where(mask, da * x, 0.0)
            if COMBINE == "max":
                dq += tl.sum(product * (1 - share), 0)
            else:
                dq += tl.sum(product, 0)
            if HAS_CHANNEL:
                found = tl.sum(product * share, 1)
                if RESIDENT:
                    ds += found
                else:
                    tl.store(ds_part_ptr + tl.program_id(0).to(tl.int64) * C + c, found, mask=c < C)
        dq = chain(dq, gate_grad(q, SPATIAL), SPATIAL)
        tl.store(dq_ptr + n.to(tl.int64) * HW + p, dq, mask=p < HW)
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mask = (c[:, None] < C) & (p[None, :] < HW)
            offsets = tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
            if not RESIDENT:
                x = load_tile(x_ptr + image, offsets, mask, ACC)
                if STORE_DX:
                    da = output_cotangent(
                        g_ptr, residual_ptr, da_ptr, image, offsets, mask, x, h[None, :], HAS_RESIDUAL, ACTIVATION, False, ACC
                    )  # fmt: skip
            found = tl.sum(tl.where(mask, x * dq[None, :], 0.0), 1)
            if RESIDENT:
                dw += found
            else:
                tl.store(dw_part_ptr + tl.program_id(0).to(tl.int64) * C + c, found, mask=c < C)
            if STORE_DX:
                w = tl.load(w_ptr + c, mask=c < C, other=0.0).to(ACC)
                dx = da * h[None, :] + w[:, None] * dq[None, :]
                tl.store(dx_ptr + image + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if RESIDENT:
        c = tl.arange(0, BLOCK_C)
        tl.store(dw_part_ptr + tl.program_id(0).to(tl.int64) * C + c, dw, mask=c < C)
        if HAS_CHANNEL:
            tl.store(ds_part_ptr + tl.program_id(0).to(tl.int64) * C + c, ds, mask=c < C)
    if HAS_CHANNEL:
        if arrive(counter_ptr + n, groups):
            combine_logits_grad(dlogits_ptr, logits_ptr, ds_part_ptr, n, groups, C, GATE, BLOCK_C, ACC)
