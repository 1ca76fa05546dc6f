"""The global context: the mean of the map under a softmax over its positions, and what flows back through it.

The logits of a position need all its channels, its weight those of all other positions; with an online softmax one read gives both sums. A program
owns a range of positions and all their channels, RESIDENT or walked twice as in pixel.py.
"""

import triton
import triton.language as tl

from .excite import arrive
from .gate import load_gates, output_cotangent, store_logits_grad
from .pointwise import image_offset, load_tile, own_range, tile_offsets


@triton.jit
def finite_shift(top):
    """What to subtract before exp: the maximum, but 0 where all values are -Inf, of which exp is then 0 and not NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def combine_contexts(
    context_ptr, softmax_ptr, part_ptr, part_softmax_ptr, n, groups, C, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """context_nc = sum over i of part_nic exp(top_ni - top_n) / total_n, total_n = sum over i of total_ni exp(top_ni - top_n), both added in order;
    softmax_n = (top_n, total_n)."""
    part_ptr += n.to(tl.int64) * groups * C
    part_softmax_ptr += n.to(tl.int64) * groups * 2
    top = tl.full([1], float("-inf"), ACC)
    total = tl.zeros([1], ACC)
    one = tl.arange(0, 1)
    for i in range(groups):
        higher = tl.maximum(top, tl.load(part_softmax_ptr + i * 2 + one, cache_modifier=".cg"))
        own = tl.load(part_softmax_ptr + i * 2 + one, cache_modifier=".cg")
        share = tl.load(part_softmax_ptr + i * 2 + 1 + one, cache_modifier=".cg")
        total = total * tl.exp(top - finite_shift(higher)) + share * tl.exp(own - finite_shift(higher))
        top = higher
    tl.store(softmax_ptr + n * 2 + one, top)
    tl.store(softmax_ptr + n * 2 + 1 + one, total)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        found = tl.zeros([BLOCK_C], ACC)
        for i in range(groups):
            factor = tl.exp(tl.load(part_softmax_ptr + i * 2 + one, cache_modifier=".cg") - finite_shift(top))
            found += factor * tl.load(part_ptr + i * C + c, mask=c < C, other=0.0, cache_modifier=".cg")
        tl.store(context_ptr + n.to(tl.int64) * C + c, found / total, mask=c < C)


@triton.jit
def context_fwd_kernel(
    x_ptr, w_ptr, b_ptr, logits_ptr, softmax_ptr, context_ptr, part_ptr, part_softmax_ptr, counter_ptr, C_V, HW_V, groups,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, HAS_B: tl.constexpr, RESIDENT: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """context_nc = sum over p of a_np x_ncp, a_np = exp(logits_np - top_n) / total_n, logits_np = sum over c of w_c x_ncp + b,
    top_n the maximum of logits_np over p, total_n = sum over p of exp(logits_np - top_n).

    logits [N, HW], softmax [N, 2] = (top, total), context [N, C]. A program owns one of `groups` ranges of positions of one image; it rescales what
    it has added when it meets a higher logit, and leaves its share in part [N, groups, C] and part_softmax [N, groups, 2], which the last program
    of an image combines in order.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    n = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    per_group = tl.cdiv(tl.cdiv(HW, BLOCK_P), groups) * BLOCK_P
    image = image_offset(n, C, HW)
    part = part_ptr + tl.program_id(0).to(tl.int64) * C
    one = tl.arange(0, 1)
    top = tl.full([1], float("-inf"), ACC)
    total = tl.zeros([1], ACC)
    context = tl.zeros([BLOCK_C], ACC)
    x = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for p0 in range(group * per_group, tl.minimum(group * per_group + per_group, HW), BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        logits = tl.zeros([BLOCK_P], ACC)
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mask = (c[:, None] < C) & (p[None, :] < HW)
            x = load_tile(x_ptr + image, tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE), mask, ACC)
            logits += tl.sum(x * tl.load(w_ptr + c, mask=c < C, other=0.0).to(ACC)[:, None], 0)
        if HAS_B:
            logits += tl.load(b_ptr).to(ACC)
        tl.store(logits_ptr + n.to(tl.int64) * HW + p, logits, mask=p < HW)
        logits = tl.where(p < HW, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 0, keep_dims=True))  # may drop a NaN, which the sums keep
        weights = tl.exp(logits - finite_shift(higher))
        rescale = tl.exp(top - finite_shift(higher))
        total = total * rescale + tl.sum(weights, 0, keep_dims=True)
        top = higher
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            if not RESIDENT:
                mask = (c[:, None] < C) & (p[None, :] < HW)
                x = load_tile(x_ptr + image, tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE), mask, ACC)
            found = tl.sum(x * weights[None, :], 1)
            if RESIDENT:
                context = context * rescale + found
            else:
                tl.store(part + c, found, mask=c < C)
    if RESIDENT:
        c = tl.arange(0, BLOCK_C)
        tl.store(part + c, context, mask=c < C)
    tl.store(part_softmax_ptr + tl.program_id(0) * 2 + one, top)
    tl.store(part_softmax_ptr + tl.program_id(0) * 2 + 1 + one, total)
    if arrive(counter_ptr + n, groups):
        combine_contexts(context_ptr, softmax_ptr, part_ptr, part_softmax_ptr, n, groups, C, BLOCK_C, ACC)


@triton.jit
def context_bwd_kernel(
    da_ptr, x_ptr, w_ptr, logits_ptr, softmax_ptr, context_ptr, dcontext_ptr, scale_ptr, dx_ptr, dw_part_ptr, db_part_ptr, C_V, HW_V, groups,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, GATE: tl.constexpr, HAS_DA: tl.constexpr, HAS_SCALE: tl.constexpr, STORE_DX: tl.constexpr,
    RESIDENT: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dlogits_np = a_np sum over c of dcontext_nc (x_ncp - context_nc), a_np = exp(logits_np - top_n) / total_n;
    dx_ncp = da_ncp f(scale_nc) + a_np dcontext_nc + w_c dlogits_np;
    dw_part_c = sum over p of (x_ncp - context_nc) dlogits_np, db_part = sum over p of dlogits_np.

    Since dlogits sums to 0, taking the context off x changes nothing but the rounding. dw_part [N, groups, C], db_part [N, groups]. A program owns
    one of `groups` ranges of positions of one image; without RESIDENT a group is one block of positions.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    n = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    per_group = tl.cdiv(tl.cdiv(HW, BLOCK_P), groups) * BLOCK_P
    image = image_offset(n, C, HW)
    row = n.to(tl.int64) * C
    top = tl.load(softmax_ptr + n * 2)
    total = tl.load(softmax_ptr + n * 2 + 1)
    dw_part_ptr += tl.program_id(0).to(tl.int64) * C
    dw = tl.zeros([BLOCK_C], ACC)
    db = tl.zeros([BLOCK_P], ACC)
    x = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for p0 in range(group * per_group, tl.minimum(group * per_group + per_group, HW), BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        a = tl.exp(tl.load(logits_ptr + n.to(tl.int64) * HW + p, mask=p < HW, other=float("-inf")) - top) / total
        dlogits = tl.zeros([BLOCK_P], ACC)
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mask = (c[:, None] < C) & (p[None, :] < HW)
            x = load_tile(x_ptr + image, tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE), mask, ACC)
            x -= tl.load(context_ptr + row + c, mask=c < C, other=0.0)[:, None]
            dlogits += tl.sum(x * tl.load(dcontext_ptr + row + c, mask=c < C, other=0.0)[:, None], 0)
        dlogits = tl.where(p < HW, dlogits * a, 0.0)
        db += dlogits
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mask = (c[:, None] < C) & (p[None, :] < HW)
            offsets = tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
            if not RESIDENT:
                x = load_tile(x_ptr + image, offsets, mask, ACC) - tl.load(context_ptr + row + c, mask=c < C, other=0.0)[:, None]
            found = tl.sum(tl.where(mask, x * dlogits[None, :], 0.0), 1)
            if RESIDENT:
                dw += found
            else:
                tl.store(dw_part_ptr + c, found, mask=c < C)
            if STORE_DX:
                dcontext = tl.load(dcontext_ptr + row + c, mask=c < C, other=0.0)
                w = tl.load(w_ptr + c, mask=c < C, other=0.0).to(ACC)
                dx = a[None, :] * dcontext[:, None] + w[:, None] * dlogits[None, :]
                if HAS_DA:
                    s, _ = load_gates(scale_ptr, scale_ptr, n, c, p, C, HW, GATE, GATE, HAS_SCALE, False, ACC)
                    dx += load_tile(da_ptr + image, offsets, mask, ACC) * s[:, None]
                tl.store(dx_ptr + image + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if RESIDENT:
        c = tl.arange(0, BLOCK_C)
        tl.store(dw_part_ptr + c, dw, mask=c < C)
    tl.store(db_part_ptr + tl.program_id(0), tl.sum(db, 0))


@triton.jit
def shifted_gate_bwd_kernel(
    g_ptr, x_ptr, scale_ptr, shift_ptr, residual_ptr, part_ptr, counter_ptr, da_ptr, dscale_ptr, dshift_ptr, C_V, HW_V,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr, GATE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, STORE_DA: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dshift_nc = sum over p of da_ncp, dscale_nc = f'(scale_nc) sum over p of da_ncp x_ncp, da = g a'(x f(scale) + shift + residual).

    A program owns BLOCK_C channels and one of SPLITS ranges of positions and leaves its shares in part [N, SPLITS, 2, C]; the last one to arrive for
    a block of channels adds them in order. x is read only for the scale or the activation; with STORE_DA the program also writes da.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    n, c, split, start, stop = own_range(tl.program_id(0), C, HW, SPLITS, BLOCK_C, BLOCK_P)
    row = n.to(tl.int64) * C + c
    image = image_offset(n, C, HW)
    shift = tl.load(shift_ptr + row, mask=c < C, other=0.0).to(ACC)[:, None]
    s, _ = load_gates(scale_ptr, scale_ptr, n, c, c, C, HW, GATE, GATE, HAS_SCALE, False, ACC)
    x = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    total = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    product = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for p0 in range(start, stop, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (c[:, None] < C) & (p[None, :] < HW)
        offsets = tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
        if HAS_SCALE or ACTIVATION != "none":
            x = load_tile(x_ptr + image, offsets, mask, ACC)
        da = output_cotangent(
            g_ptr, residual_ptr, da_ptr, image, offsets, mask, x, s[:, None], HAS_RESIDUAL, ACTIVATION, STORE_DA, ACC, shift
        )  # fmt: skip
        total += tl.where(mask, da, 0.0)
        if HAS_SCALE:
            product += tl.where(mask, da * x, 0.0)
    part_ptr += n.to(tl.int64) * SPLITS * 2 * C + c
    tl.store(part_ptr + split * 2 * C, tl.sum(total, 1), mask=c < C)
    if HAS_SCALE:
        tl.store(part_ptr + (split * 2 + 1) * C, tl.sum(product, 1), mask=c < C)
    if arrive(counter_ptr + tl.program_id(0) // SPLITS, SPLITS):
        dshift = tl.zeros([BLOCK_C], ACC)
        dscale = tl.zeros([BLOCK_C], ACC)
        for i in range(SPLITS):
            dshift += tl.load(part_ptr + i * 2 * C, mask=c < C, other=0.0, cache_modifier=".cg")
            if HAS_SCALE:
                dscale += tl.load(part_ptr + (i * 2 + 1) * C, mask=c < C, other=0.0, cache_modifier=".cg")
        tl.store(dshift_ptr + row, dshift.to(dshift_ptr.dtype.element_ty), mask=c < C)
        if HAS_SCALE:
            store_logits_grad(dscale_ptr, scale_ptr, scale_ptr, n, c, dscale, C, GATE, False, ACC)
