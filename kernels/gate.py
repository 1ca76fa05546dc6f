"""The gate: weights broadcast over the feature map, with residual and activation, and what flows back through it.

y_ncp = a(u_ncp f(logits_nc) h(spatial_np) + shift_nc + residual_ncp), or with a joint gate u_ncp (1 + f(logits_nc spatial_np)); u is x, or where
a channel gate alone has something before it, b(norm(x)). Backward takes the
map in two passes, because the gradient of the squeeze must be known before dx: `gate_bwd_channel_kernel` or `gate_bwd_column_kernel` reduce,
`gate_bwd_input_kernel` writes dx once. Where a residual and an activation are present the first pass stores g a' in `da`, which is the residual's
gradient and all that the second pass needs.
"""

import triton
import triton.language as tl

from .excite import arrive
from .pointwise import (
    activation,
    activation_grad,
    chain,
    gate_function,
    gate_grad,
    image_offset,
    load_tile,
    normalised,
    own_range,
    own_tile,
    shared_grad,
    tile_offsets,
)


@triton.jit
def load_gates(
    logits_ptr, spatial_ptr, n, c, p, C, HW, GATE: tl.constexpr, SPATIAL: tl.constexpr, HAS_CHANNEL: tl.constexpr, HAS_SPATIAL: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """f(logits_nc) [BLOCK_C] and h(spatial_np) [BLOCK_P]; ones where absent."""
    s = tl.full(c.shape, 1.0, ACC)
    q = tl.full(p.shape, 1.0, ACC)
    if HAS_CHANNEL:
        s = gate_function(tl.load(logits_ptr + n.to(tl.int64) * C + c, mask=c < C, other=0.0).to(ACC), GATE)
    if HAS_SPATIAL:
        q = gate_function(tl.load(spatial_ptr + n.to(tl.int64) * HW + p, mask=p < HW, other=0.0).to(ACC), SPATIAL)
    return s, q


@triton.jit
def combine_gates(x, s, q, COMBINE: tl.constexpr, JOINT: tl.constexpr):
    """Both gates on the tile x as one factor, its derivative d(x factor)/dx, and the share of s in its gradient; s and q broadcast to x.

    product: s q; sum: s + q; max: the factor of max(x s, x q), ties shared as torch.maximum does. With JOINT s and q are logits and the factor is
    1 + f(s q) or 1 + f(s + q).
    """
    if COMBINE == "max":
        a = x * s
        b = x * q
        share = tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))
        # NaN in either product must reach the output
        factor = tl.where((a > b) | (a != a), s, q)
        slope = share * s + (1 - share) * q
    else:
        share = tl.full(x.shape, 1.0, x.dtype)
        factor = s + q if COMBINE == "sum" else s * q
        if JOINT != "":
            factor = 1.0 + gate_function(factor, JOINT)
        slope = factor
    return factor, slope, share


@triton.jit
def gated(x, s, q, COMBINE: tl.constexpr):
    """What combine_gates' factor makes of x; of a sum x s + x q, which is NaN where x is infinite and one of the two is zero."""
    if COMBINE == "sum":
        y = x * s + x * q
    else:
        factor, _, _ = combine_gates(x, s, q, COMBINE, "")
        y = x * factor
    return y


@triton.jit
def gate_shares(product, s, q, COMBINE: tl.constexpr, JOINT: tl.constexpr):
    """From product = da x [BLOCK_C, BLOCK_P] the gradients of s and of q on the tile, before their sums; COMBINE product or sum."""
    if JOINT != "":
        product = chain(product, gate_grad(s + q if COMBINE == "sum" else s * q, JOINT), JOINT)
    if COMBINE == "sum":
        to_s = product
        to_q = product
    else:
        to_s = product * q
        to_q = product * s
    return to_s, to_q


@triton.jit
def gate_fwd_kernel(
    x_ptr, logits_ptr, spatial_ptr, shift_ptr, residual_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, y_ptr, C_V, HW_V, eps,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, BEFORE: tl.constexpr,
    GATE: tl.constexpr, SPATIAL: tl.constexpr, COMBINE: tl.constexpr, JOINT: tl.constexpr, HAS_CHANNEL: tl.constexpr, HAS_SPATIAL: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y_ncp = a(u_ncp (gates)_ncp + shift_nc + residual_ncp), u = b(norm(x)), b of BEFORE, gates as in combine_gates.

    A program owns one tile of one image.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    n, c, p, mask, image, offsets = own_tile(C, HW, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P)
    x = load_tile(x_ptr + image, offsets, mask, ACC)
    u = activation(normalised(x, (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps), c, c < C, ACC)[0], BEFORE)
    s, q = load_gates(logits_ptr, spatial_ptr, n, c, p, C, HW, GATE, SPATIAL, HAS_CHANNEL, HAS_SPATIAL, ACC)
    factor, _, _ = combine_gates(u, s[:, None], q[None, :], COMBINE, JOINT)
    y = u * factor
    if HAS_SHIFT:
        y += tl.load(shift_ptr + n.to(tl.int64) * C + c, mask=c < C, other=0.0).to(ACC)[:, None]
    if HAS_RESIDUAL:
        y += load_tile(residual_ptr + image, offsets, mask, ACC)
    y = activation(y, ACTIVATION)
    tl.store(y_ptr + image + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def output_cotangent(
    g_ptr, residual_ptr, da_ptr, image, offsets, mask, x, factor,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STORE_DA: tl.constexpr, ACC: tl.constexpr, shift=None, LAST: tl.constexpr = None,
):  # fmt: skip
    """da = g a'(x factor + shift + residual): the gradient of what the activation received. LAST: nobody reads g and residual again."""
    da = load_tile(g_ptr + image, offsets, mask, ACC, LAST)
    if ACTIVATION != "none":
        t = x * factor
        if shift is not None:
            t += shift
        if HAS_RESIDUAL:
            t += load_tile(residual_ptr + image, offsets, mask, ACC, LAST)
        da = chain(da, activation_grad(t, ACTIVATION), ACTIVATION)
        if STORE_DA:
            tl.store(da_ptr + image + offsets, da.to(da_ptr.dtype.element_ty), mask=mask)
    return da


@triton.jit
def statistics_cotangent(
    stats_ptr, dstats_ptr, aux_ptr, n, c, p, x, s, C, HW, EVEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """du_cp = dmean_p / C + dmax_p [c attains the maximum of u_.p], u = x s; ties share with EVEN."""
    inside = p < HW
    dmean = tl.load(dstats_ptr + n.to(tl.int64) * 2 * HW + p, mask=inside, other=0.0)
    dmax = tl.load(dstats_ptr + n.to(tl.int64) * 2 * HW + HW + p, mask=inside, other=0.0)
    aux = tl.load(aux_ptr + n.to(tl.int64) * HW + p, mask=inside, other=1)
    if EVEN:
        top = tl.load(stats_ptr + n.to(tl.int64) * 2 * HW + HW + p, mask=inside, other=0.0)
        through = shared_grad(x * s[:, None], top[None, :], dmax[None, :], aux[None, :])
    else:
        through = tl.where(c[:, None] == aux[None, :], dmax[None, :], 0.0)
    return (dmean / C)[None, :] + through


@triton.jit
def store_logits_grad(dlogits_ptr, logits_ptr, extra_ptr, n, c, found, C, GATE: tl.constexpr, HAS_EXTRA: tl.constexpr, ACC: tl.constexpr):
    """dlogits_nc = f'(logits_nc) found_c + extra_nc."""
    row = n.to(tl.int64) * C + c
    found = chain(found, gate_grad(tl.load(logits_ptr + row, mask=c < C, other=0.0).to(ACC), GATE), GATE)
    if HAS_EXTRA:
        found += tl.load(extra_ptr + row, mask=c < C, other=0.0)
    tl.store(dlogits_ptr + row, found.to(dlogits_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def combine_logits_grad(dlogits_ptr, logits_ptr, part_ptr, n, slots, C, GATE: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """dlogits_nc = f'(logits_nc) sum over i of part_nic, added in order; part [N, slots, C]."""
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        found = tl.zeros([BLOCK_C], ACC)
        for i in range(slots):
            found += tl.load(part_ptr + (n.to(tl.int64) * slots + i) * C + c, mask=c < C, other=0.0, cache_modifier=".cg")
        store_logits_grad(dlogits_ptr, logits_ptr, logits_ptr, n, c, found, C, GATE, False, ACC)


@triton.jit
def gate_bwd_channel_kernel(
    g_ptr, x_ptr, logits_ptr, residual_ptr, stats_ptr, dstats_ptr, saux_ptr, extra_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr,
    part_ptr, counter_ptr, da_ptr, dx_ptr, dlogits_ptr, C_V, HW_V, eps,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr, BEFORE: tl.constexpr,
    GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STORE_DA: tl.constexpr, STORE_DX: tl.constexpr,
    HAS_STATS: tl.constexpr, EVEN: tl.constexpr, HAS_EXTRA: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dlogits_nc = f'(logits_nc) sum over p of u_ncp dv_ncp + extra_nc, u = b(norm(x)), b of BEFORE; dv = da, or with HAS_STATS the gradient that
    comes back from the spatial statistics of v = u f(logits).

    A program owns BLOCK_C channels and one of SPLITS ranges of positions; the last one to arrive for a block of channels adds the splits in order.
    With STORE_DA it also writes da, with STORE_DX dx = da f(logits) (a gate whose weights do not depend on x).
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    norm = (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps)
    n, c, split, start, stop = own_range(tl.program_id(0), C, HW, SPLITS, BLOCK_C, BLOCK_P)
    image = image_offset(n, C, HW)
    total = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for p0 in range(start, stop, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (c[:, None] < C) & (p[None, :] < HW)
        offsets = tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
        x = load_tile(x_ptr + image, offsets, mask, ACC)
        u = activation(normalised(x, norm, c, c < C, ACC)[0], BEFORE)
        s, _ = load_gates(logits_ptr, logits_ptr, n, c, p, C, HW, GATE, GATE, True, False, ACC)
        if HAS_STATS:
            dv = statistics_cotangent(stats_ptr, dstats_ptr, saux_ptr, n, c, p, u, s, C, HW, EVEN, ACC)
        else:
            factor = s[:, None]
            da = output_cotangent(g_ptr, residual_ptr, da_ptr, image, offsets, mask, u, factor, HAS_RESIDUAL, ACTIVATION, STORE_DA, ACC)
            dv = da
            if STORE_DX:
                tl.store(dx_ptr + image + offsets, (da * factor).to(dx_ptr.dtype.element_ty), mask=mask)
        total += tl.where(mask, u * dv, 0.0)
    found = tl.sum(total, 1)
    if SPLITS > 1:
        part_ptr += n.to(tl.int64) * SPLITS * C + c
        tl.store(part_ptr + split * C, found, mask=c < C)
        last = arrive(counter_ptr + tl.program_id(0) // SPLITS, SPLITS)
    else:
        last = True
    if last:
        if SPLITS > 1:
            found = tl.zeros([BLOCK_C], ACC)
            for i in range(SPLITS):
                found += tl.load(part_ptr + i * C, mask=c < C, other=0.0, cache_modifier=".cg")
        store_logits_grad(dlogits_ptr, logits_ptr, extra_ptr, n, c, found, C, GATE, HAS_EXTRA, ACC)


@triton.jit
def gate_bwd_column_kernel(
    g_ptr, x_ptr, logits_ptr, spatial_ptr, residual_ptr, da_ptr, dx_ptr, dspatial_ptr, part_ptr, counter_ptr, dlogits_ptr,
    C_V, HW_V, VEC_C: tl.constexpr, VEC_P: tl.constexpr, GATE: tl.constexpr, SPATIAL: tl.constexpr, COMBINE: tl.constexpr, JOINT: tl.constexpr,
    HAS_CHANNEL: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STORE_DA: tl.constexpr, STORE_DX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dspatial_np = h'(spatial_np) sum over c of da_ncp x_ncp f(logits_nc); with HAS_CHANNEL
    dlogits_nc = f'(logits_nc) sum over p of da_ncp x_ncp h(spatial_np); other combinations as in gate_shares.

    A program owns BLOCK_P positions of one image and all their channels; it leaves its share of dlogits in part [N, blocks of positions, C], which
    the last program of an image adds in order.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    blocks_p = tl.cdiv(HW, BLOCK_P)
    n = tl.program_id(0) // blocks_p
    p = tl.program_id(0) % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    image = image_offset(n, C, HW)
    total = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c[:, None] < C) & (p[None, :] < HW)
        offsets = tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
        x = load_tile(x_ptr + image, offsets, mask, ACC)
        s, q = load_gates(logits_ptr, spatial_ptr, n, c, p, C, HW, GATE, SPATIAL, HAS_CHANNEL, True, ACC)
        factor, _, _ = combine_gates(x, s[:, None], q[None, :], COMBINE, JOINT)
        da = output_cotangent(g_ptr, residual_ptr, da_ptr, image, offsets, mask, x, factor, HAS_RESIDUAL, ACTIVATION, STORE_DA, ACC)
        if STORE_DX:
            tl.store(dx_ptr + image + offsets, (da * factor).to(dx_ptr.dtype.element_ty), mask=mask)
        to_s, to_q = gate_shares(da * x, s[:, None], q[None, :], COMBINE, JOINT)
        total += tl.where(mask, to_q, 0.0)
        if HAS_CHANNEL:
            found = tl.sum(tl.where(mask, to_s, 0.0), 1)
            tl.store(part_ptr + tl.program_id(0).to(tl.int64) * C + c, found, mask=c < C)
    t = tl.load(spatial_ptr + n.to(tl.int64) * HW + p, mask=p < HW, other=0.0).to(ACC)
    found = chain(tl.sum(total, 0), gate_grad(t, SPATIAL), SPATIAL)
    tl.store(dspatial_ptr + n.to(tl.int64) * HW + p, found.to(dspatial_ptr.dtype.element_ty), mask=p < HW)
    if HAS_CHANNEL:
        if arrive(counter_ptr + n, blocks_p):
            combine_logits_grad(dlogits_ptr, logits_ptr, part_ptr, n, blocks_p, C, GATE, BLOCK_C, ACC)


@triton.jit
def pools_cotangent(
    z_ptr, dz_ptr, aux_ptr, n, c, p, x, C, HW, K: tl.constexpr, ROWS: tl.constexpr,
    AVG_AT: tl.constexpr, MAX_AT: tl.constexpr, MIX_AT: tl.constexpr, LP_AT: tl.constexpr, LSE_AT: tl.constexpr, EVEN: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """sum over k of dz_nkc dpool_k/dx_ncp for the tile x; *_AT as in store_statistics. dz [N, K, C], z [N, ROWS, C], aux [N, C]."""
    dx = tl.zeros(x.shape, ACC)
    row = n.to(tl.int64) * K * C + c
    z_row = n.to(tl.int64) * ROWS * C + c
    if AVG_AT >= 0:
        dx += (tl.load(dz_ptr + row + AVG_AT * C, mask=c < C, other=0.0) / HW)[:, None]
    if MIX_AT >= 0:
        dx += (0.5 * tl.load(dz_ptr + row + MIX_AT * C, mask=c < C, other=0.0) / HW)[:, None]
    if MAX_AT >= 0 or MIX_AT >= 0:
        dmax = tl.zeros(c.shape, ACC)
        if MAX_AT >= 0:
            dmax += tl.load(dz_ptr + row + MAX_AT * C, mask=c < C, other=0.0)
        if MIX_AT >= 0:
            dmax += 0.5 * tl.load(dz_ptr + row + MIX_AT * C, mask=c < C, other=0.0)
        aux = tl.load(aux_ptr + n.to(tl.int64) * C + c, mask=c < C, other=1)
        if EVEN:
            top = tl.load(z_ptr + z_row + (MAX_AT if MAX_AT >= 0 else 1) * C, mask=c < C, other=0.0)
            dx += shared_grad(x, top[:, None], dmax[:, None], aux[:, None])
        else:
            dx += tl.where(p[None, :] == aux[:, None], dmax[:, None], 0.0)
    if LP_AT >= 0:
        norm = tl.load(z_ptr + z_row + LP_AT * C, mask=c < C, other=1.0)
        slope = tl.load(dz_ptr + row + LP_AT * C, mask=c < C, other=0.0) / norm
        dx += x * tl.where(norm == 0, 0.0, slope)[:, None]  # torch's choice for a channel of zeros
    if LSE_AT >= 0:
        lse = tl.load(z_ptr + z_row + LSE_AT * C, mask=c < C, other=0.0)
        dx += tl.exp(x - lse[:, None]) * tl.load(dz_ptr + row + LSE_AT * C, mask=c < C, other=0.0)[:, None]
    return dx


@triton.jit
def gate_bwd_input_kernel(
    g_ptr, x_ptr, logits_ptr, spatial_ptr, residual_ptr, stats_ptr, dstats_ptr, saux_ptr, z_ptr, dz_ptr, aux_ptr, w_ptr, dpixel_ptr, through_ptr,
    bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, dx_ptr, C_V, HW_V, eps,
    K: tl.constexpr, ROWS: tl.constexpr, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    GATE: tl.constexpr, SPATIAL: tl.constexpr, COMBINE: tl.constexpr, JOINT: tl.constexpr, HAS_CHANNEL: tl.constexpr, HAS_SPATIAL: tl.constexpr,
    HAS_G: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, NEED_X: tl.constexpr, HAS_STATS: tl.constexpr,
    SPATIAL_EVEN: tl.constexpr, AVG_AT: tl.constexpr, MAX_AT: tl.constexpr, MIX_AT: tl.constexpr, LP_AT: tl.constexpr, LSE_AT: tl.constexpr,
    EVEN: tl.constexpr, HAS_PIXEL: tl.constexpr, THROUGH: tl.constexpr, BEFORE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """du_ncp = da_ncp (gates)_ncp                              HAS_G: what comes through the gate
             + f(logits_nc) dv_ncp                              HAS_STATS: through the spatial statistics of v = u f(logits)
             + sum over k of dz_nkc dpool_k/du_ncp              *_AT >= 0: through the channel statistics
             + w_c dpixel_np                                    HAS_PIXEL: through the 1x1 convolution to one channel
    dx_ncp = norm'_c b'(norm(x_ncp)) du_ncp                     u = b(norm(x)), b of BEFORE
             + through_ncp t'(x_ncp)                            through somebody else's layers on t(x), t of THROUGH; "" for no such layers

    Written once. A program owns one tile of one image; x is read only with NEED_X.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    n, c, p, mask, image, offsets = own_tile(C, HW, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P)
    x = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    if NEED_X:
        x = load_tile(x_ptr + image, offsets, mask, ACC)
    t, scale = normalised(x, (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps), c, c < C, ACC)
    u = activation(t, BEFORE)
    s, q = load_gates(logits_ptr, spatial_ptr, n, c, p, C, HW, GATE, SPATIAL, HAS_CHANNEL, HAS_SPATIAL, ACC)
    du = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    if HAS_G:
        factor, slope, _ = combine_gates(u, s[:, None], q[None, :], COMBINE, JOINT)
        da = output_cotangent(g_ptr, residual_ptr, g_ptr, image, offsets, mask, u, factor, HAS_RESIDUAL, ACTIVATION, False, ACC)
        du += da * slope
    if HAS_STATS:
        du += s[:, None] * statistics_cotangent(stats_ptr, dstats_ptr, saux_ptr, n, c, p, u, s, C, HW, SPATIAL_EVEN, ACC)
    du += pools_cotangent(z_ptr, dz_ptr, aux_ptr, n, c, p, u, C, HW, K, ROWS, AVG_AT, MAX_AT, MIX_AT, LP_AT, LSE_AT, EVEN, ACC)
    if HAS_PIXEL:
        w = tl.load(w_ptr + c, mask=c < C, other=0.0).to(ACC)
        du += w[:, None] * tl.load(dpixel_ptr + n.to(tl.int64) * HW + p, mask=p < HW, other=0.0)[None, :]
    dx = chain(du, activation_grad(t, BEFORE), BEFORE) * scale
    if THROUGH != "":
        dx += chain(load_tile(through_ptr + image, offsets, mask, ACC), activation_grad(x, THROUGH), THROUGH)
    tl.store(dx_ptr + image + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_broadcast(
    weights_ptr, image, offsets, n, c, p, mask, W, w_n, w_c, w_h, w_w, DENSE: tl.constexpr, LARGE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Weights of x's shape and layout (DENSE: then loads are as wide as x's), or broadcast to [N, C, H, W] by strides, 0 where they are broadcast."""
    if DENSE:
        weights_ptr += image
    else:
        h = p // W
        w = p % W
        if LARGE:
            c = c.to(tl.int64)
            h = h.to(tl.int64)
            w = w.to(tl.int64)
        weights_ptr += n.to(tl.int64) * w_n
        offsets = c * w_c + h * w_h + w * w_w
    return load_tile(weights_ptr, offsets, mask, ACC)


@triton.jit
def broadcast_gate_fwd_kernel(
    x_ptr, weights_ptr, residual_ptr, y_ptr, C_V, HW_V, W, w_n, w_c, w_h, w_w, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    DENSE: tl.constexpr, GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y_nchw = a(x_nchw f(weights_nchw) + residual_nchw), weights of any shape broadcastable to x. A program owns one tile of one image."""
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    n, c, p, mask, image, offsets = own_tile(C, HW, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P)
    c = c[:, None]
    p = p[None, :]
    y = load_tile(x_ptr + image, offsets, mask, ACC)
    t = load_broadcast(weights_ptr, image, offsets, n, c, p, mask, W, w_n, w_c, w_h, w_w, DENSE, LARGE, ACC)
    y *= gate_function(t, GATE)
    if HAS_RESIDUAL:
        y += load_tile(residual_ptr + image, offsets, mask, ACC)
    tl.store(y_ptr + image + offsets, activation(y, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def broadcast_gate_bwd_kernel(
    g_ptr, x_ptr, weights_ptr, residual_ptr, da_ptr, dx_ptr, dweights_ptr, C_V, HW_V, W, w_n, w_c, w_h, w_w,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, DENSE: tl.constexpr, GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    STORE_DA: tl.constexpr, STORE_DX: tl.constexpr, STORE_DW: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_nchw = da_nchw f(weights_nchw); dweights_nchw = da_nchw x_nchw f'(weights_nchw), not yet summed over the broadcast dimensions."""
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    n, c, p, mask, image, offsets = own_tile(C, HW, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P)
    c = c[:, None]
    p = p[None, :]
    x = load_tile(x_ptr + image, offsets, mask, ACC)
    t = load_broadcast(weights_ptr, image, offsets, n, c, p, mask, W, w_n, w_c, w_h, w_w, DENSE, LARGE, ACC)
    factor = gate_function(t, GATE)
    da = output_cotangent(g_ptr, residual_ptr, da_ptr, image, offsets, mask, x, factor, HAS_RESIDUAL, ACTIVATION, STORE_DA, ACC)
    if STORE_DX:
        tl.store(dx_ptr + image + offsets, (da * factor).to(dx_ptr.dtype.element_ty), mask=mask)
    if STORE_DW:
        dw = chain(da * x, gate_grad(t, GATE), GATE)
        tl.store(dweights_ptr + image + offsets, dw.to(dweights_ptr.dtype.element_ty), mask=mask)
