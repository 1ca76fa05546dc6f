"""A BatchNorm that trains, as part of the passes of the channel gate that follows it: u = b(v), v = weight xhat + bias, xhat = (x - mean) rstd, with
mean and variance of a channel over the batch, and an activation b or none.

One pass takes the moments of every image's channels, from which follow the batch's, and without b the squeeze too, as u is then linear in x. With b
the squeeze and the gate are those of a norm in evaluation. Backward the pass that the gate's gradient takes adds what the norm's needs:

    s0 = sum over p of da b'(v),   s1 = sum over p of da b'(v) (x - mean)
    m0 = mean over p of b'(v),     m1 = mean over p of b'(v) (x - mean)
    d logits = f'(logits) sum over p of da u,  without b f'(logits) (weight rstd s1 + bias s0)
    k0 = sum over n of (f s0 + dz m0),  k1 = sum over n of (f s1 + dz m1) rstd;  d bias = k0, d weight = k1
    dx = weight rstd (b'(v) (da f + dz / HW) - k0 / (N HW) - xhat k1 / (N HW))

with dz the gradient of the squeeze's mean. m0 and m1 do not depend on da, but a forward pass that left them would do so for calls without gradients
too, and backward x is there in any case.
"""

import triton
import triton.language as tl

from .gate import output_cotangent
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
    tile_offsets,
)


@triton.jit
def channel_moments_kernel(
    x_ptr, part_ptr, C_V, HW_V, VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """part_ni0c + part_ni1c = mean over p of x_ncp, part_ni2c = sum over p of (x_ncp - that mean)^2, p in range i of SPLITS; part [N, SPLITS, 3, C].

    part_ni0c is the first tile's mean, and the sums are of distances from it, so that little of them cancels. A program owns BLOCK_C channels and one
    of SPLITS ranges of positions of one image.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    n, c, split, start, stop = own_range(tl.program_id(0), C, HW, SPLITS, BLOCK_C, BLOCK_P)
    image = image_offset(n, C, HW)
    p = start + tl.arange(0, BLOCK_P)
    mask = (c[:, None] < C) & (p[None, :] < HW)
    x = load_tile(x_ptr + image, tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE), mask, ACC)
    near = tl.sum(x, 1) / tl.maximum(tl.minimum(stop - start, BLOCK_P), 1)
    near = tl.where(near - near == 0, near, 0.0)  # from an infinite one every distance is infinite or NaN
    apart = tl.where(mask, x - near[:, None], 0.0)
    total = apart
    squares = apart * apart
    for p0 in range(start + BLOCK_P, stop, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (c[:, None] < C) & (p[None, :] < HW)
        x = load_tile(x_ptr + image, tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE), mask, ACC)
        apart = tl.where(mask, x - near[:, None], 0.0)
        total += apart
        squares += apart * apart
    mean = tl.sum(total, 1) / tl.maximum(stop - start, 1)
    slot = part_ptr + (n.to(tl.int64) * SPLITS + split) * 3 * C + c
    tl.store(slot, near, mask=c < C)
    tl.store(slot + C, mean, mask=c < C)
    tl.store(slot + 2 * C, tl.sum(squares, 1) - tl.maximum(stop - start, 0) * mean * mean, mask=c < C)


@triton.jit
def image_moments(part_ptr, near, n, c, inside, C, HW, per_split, SPLITS: tl.constexpr, ACC: tl.constexpr):
    """How far the mean over the positions of an image lies from `near` [1, BLOCK_C], and the sum of squared distances from that mean, of the images n
    [BLOCK_N, 1] and channels c [1, BLOCK_C]."""
    slot = part_ptr + n.to(tl.int64) * SPLITS * 3 * C + c
    mean = tl.zeros(inside.shape, ACC)
    squares = tl.zeros(inside.shape, ACC)
    for i in range(SPLITS):
        count = tl.maximum(tl.minimum(HW - i * per_split, per_split), 0)
        own = tl.load(slot + i * 3 * C, mask=inside, other=0.0) - near + tl.load(slot + (i * 3 + 1) * C, mask=inside, other=0.0)
        mean += tl.where(count > 0, count * own, 0.0)
    mean = tl.where(inside, mean / HW, 0.0)
    for i in range(SPLITS):
        count = tl.maximum(tl.minimum(HW - i * per_split, per_split), 0)
        own = tl.load(slot + i * 3 * C, mask=inside, other=0.0) - near + tl.load(slot + (i * 3 + 1) * C, mask=inside, other=0.0)
        found = tl.load(slot + (i * 3 + 2) * C, mask=inside, other=0.0) + count * (own - mean) * (own - mean)
        squares += tl.where(inside & (count > 0), found, 0.0)
    return mean, squares


@triton.jit
def norm_statistics_kernel(
    part_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, rest_ptr, start_ptr, apart_ptr, z_ptr, N, C, HW, per_split, eps,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """mean_c and var_c of x over images and positions, rest_c by which the first was rounded, start_c = bias_c - weight_c rest_c rstd_c, the bias
    that goes with the rounded mean; apart_nc, how far the mean over positions lies from the exact one, z_nc = weight_c apart_nc rstd_c + bias_c.

    part as channel_moments_kernel leaves it, apart and z [N, C], both or neither, all others [C]; var is the biased one. A program owns BLOCK_C
    channels.
    """
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    near = tl.load(part_ptr + c, mask=c < C, other=0.0)
    total = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)[:, None]
        means, _ = image_moments(part_ptr, near, n, c, (n < N) & (c < C), C, HW, per_split, SPLITS, ACC)
        total += means
    off = tl.sum(total, 0)[None, :] / N
    mean = near + off
    rest = off - (mean - near)
    tl.store(mean_ptr + c, mean, mask=c < C)
    tl.store(rest_ptr + c, rest, mask=c < C)
    total = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)[:, None]
        inside = (n < N) & (c < C)
        means, squares = image_moments(part_ptr, near, n, c, inside, C, HW, per_split, SPLITS, ACC)
        if apart_ptr is not None:
            tl.store(apart_ptr + n * C + c, means - off, mask=inside)
        total += squares + tl.where(inside, HW * (means - off) * (means - off), 0.0)
    var = tl.sum(total, 0)[None, :] / HW / N
    tl.store(var_ptr + c, var, mask=c < C)
    slope = 1.0 / tl.sqrt(var + eps)
    bias = tl.zeros([1, BLOCK_C], ACC)
    if weight_ptr is not None:
        slope *= tl.load(weight_ptr + c, mask=c < C, other=0.0).to(ACC)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(ACC)
    tl.store(start_ptr + c, bias - rest * slope, mask=c < C)
    if z_ptr is not None:
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[:, None]
            inside = (n < N) & (c < C)
            means, _ = image_moments(part_ptr, near, n, c, inside, C, HW, per_split, SPLITS, ACC)
            tl.store(z_ptr + n * C + c, (means - off) * slope + bias, mask=inside)


@triton.jit
def norm_gate_bwd_reduce_kernel(
    g_ptr, x_ptr, logits_ptr, residual_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, part_ptr, da_ptr, C_V, HW_V, eps,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr, SUMS: tl.constexpr, BEFORE: tl.constexpr, GATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STORE_DA: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """part_ni0c = sum over p of dv_ncp, part_ni1c = sum over p of dv_ncp (x_ncp - mean_c), dv = da b'(v), p in range i of SPLITS, and with an
    activation BEFORE the sums over p of u_ncp da_ncp, b'(v_ncp) and b'(v_ncp) (x_ncp - mean_c);
    da_ncp = g_ncp a'(u_ncp f(logits_nc) + residual_ncp), stored with STORE_DA.

    part [N, SPLITS, SUMS, C]. Programs as in channel_moments_kernel.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    n, c, split, start, stop = own_range(tl.program_id(0), C, HW, SPLITS, BLOCK_C, BLOCK_P)
    image = image_offset(n, C, HW)
    s = gate_function(tl.load(logits_ptr + n.to(tl.int64) * C + c, mask=c < C, other=0.0), GATE)[:, None]
    mean = tl.load(bn_mean_ptr + c, mask=c < C, other=0.0)[:, None]
    total = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    product = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    gated = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    slopes = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    slopes_product = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for p0 in range(start, stop, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (c[:, None] < C) & (p[None, :] < HW)
        offsets = tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
        x = load_tile(x_ptr + image, offsets, mask, ACC)
        v, _ = normalised(x, (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps), c, c < C, ACC)
        u = activation(v, BEFORE)
        da = output_cotangent(g_ptr, residual_ptr, da_ptr, image, offsets, mask, u, s, HAS_RESIDUAL, ACTIVATION, STORE_DA, ACC)
        slope = activation_grad(v, BEFORE)
        dv = chain(da, slope, BEFORE)
        total += tl.where(mask, dv, 0.0)
        product += tl.where(mask, dv * (x - mean), 0.0)
        if BEFORE != "none":
            gated += tl.where(mask, u * da, 0.0)
            slopes += tl.where(mask, slope, 0.0)
            slopes_product += tl.where(mask, slope * (x - mean), 0.0)
    slot = part_ptr + (n.to(tl.int64) * SPLITS + split) * SUMS * C + c
    tl.store(slot, tl.sum(total, 1), mask=c < C)
    tl.store(slot + C, tl.sum(product, 1), mask=c < C)
    if BEFORE != "none":
        tl.store(slot + 2 * C, tl.sum(gated, 1), mask=c < C)
        tl.store(slot + 3 * C, tl.sum(slopes, 1), mask=c < C)
        tl.store(slot + 4 * C, tl.sum(slopes_product, 1), mask=c < C)


@triton.jit
def add_splits(part_ptr, n, c, inside, C, at: tl.constexpr, SPLITS: tl.constexpr, SUMS: tl.constexpr, ACC: tl.constexpr):
    """The sums `at` of part [N, SPLITS, SUMS, C], over the splits in order, of the images n [BLOCK_N, 1] and channels c [1, BLOCK_C]."""
    slot = part_ptr + (n.to(tl.int64) * SPLITS * SUMS + at) * C + c
    found = tl.zeros(inside.shape, ACC)
    for i in range(SPLITS):
        found += tl.load(slot + i * SUMS * C, mask=inside, other=0.0)
    return found


@triton.jit
def norm_gate_bwd_logits_kernel(
    part_ptr, logits_ptr, bn_weight_ptr, start_ptr, bn_var_ptr, rest_ptr, apart_ptr, sums_ptr, dlogits_ptr, N, C, HW, eps,
    SPLITS: tl.constexpr, SUMS: tl.constexpr, BEFORE: tl.constexpr, GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """sums_n0c to sums_n3c: s0, s1, m0 and m1 from part, those with x - mean_c less rest_c times those without, and without an activation BEFORE
    m0 = 1 and m1 = apart_nc; dlogits_nc = f'(logits_nc) sum over p of u_ncp da_ncp.

    sums [N, 4, C]. A program owns BLOCK_N images and BLOCK_C channels.
    """
    blocks_c = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // blocks_c * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    c = (tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (n < N) & (c < C)
    rest = tl.load(rest_ptr + c, mask=c < C, other=0.0)
    total = add_splits(part_ptr, n, c, inside, C, 0, SPLITS, SUMS, ACC)
    product = add_splits(part_ptr, n, c, inside, C, 1, SPLITS, SUMS, ACC)
    if BEFORE == "none":
        slopes = tl.full([BLOCK_N, BLOCK_C], 1.0, ACC)
        slopes_product = tl.load(apart_ptr + n * C + c, mask=inside, other=0.0)
        found = product / tl.sqrt(tl.load(bn_var_ptr + c, mask=c < C, other=1.0) + eps)
        if bn_weight_ptr is not None:
            found *= tl.load(bn_weight_ptr + c, mask=c < C, other=0.0).to(ACC)
        found += total * tl.load(start_ptr + c, mask=c < C, other=0.0)
    else:
        found = add_splits(part_ptr, n, c, inside, C, 2, SPLITS, SUMS, ACC)
        slopes = add_splits(part_ptr, n, c, inside, C, 3, SPLITS, SUMS, ACC) / HW
        slopes_product = add_splits(part_ptr, n, c, inside, C, 4, SPLITS, SUMS, ACC) / HW - slopes * rest
    slot = sums_ptr + n * 4 * C + c
    tl.store(slot, total, mask=inside)
    tl.store(slot + C, product - total * rest, mask=inside)
    tl.store(slot + 2 * C, slopes, mask=inside)
    tl.store(slot + 3 * C, slopes_product, mask=inside)
    t = tl.load(logits_ptr + n * C + c, mask=inside, other=0.0)
    tl.store(dlogits_ptr + n * C + c, chain(found, gate_grad(t, GATE), GATE), mask=inside)


@triton.jit
def norm_gate_bwd_statistics_kernel(
    sums_ptr, logits_ptr, dz_ptr, bn_weight_ptr, bn_var_ptr, dmean_ptr, dvar_ptr, dweight_ptr, dbias_ptr, shift_ptr, slope_ptr, N, C, HW, eps,
    GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dbias_c = k0, dweight_c = k1, and what dx takes from the whole batch: shift_c = (dmean_c - weight_c rstd_c k0) / (N HW),
    slope_c = (weight_c rstd_c^2 k1 - 2 dvar_c) / (N HW).

    sums as norm_gate_bwd_logits_kernel leaves it, dz [N, C], dmean and dvar, the gradients of the statistics as results, and all others [C]. A
    program owns BLOCK_C channels.
    """
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    rstd = 1.0 / tl.sqrt(tl.load(bn_var_ptr + c, mask=c < C, other=1.0) + eps)
    total = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    product = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)[:, None]
        inside = (n < N) & (c < C)
        s = gate_function(tl.load(logits_ptr + n * C + c, mask=inside, other=0.0), GATE)
        dz = tl.load(dz_ptr + n * C + c, mask=inside, other=0.0)
        slot = sums_ptr + n * 4 * C + c
        total += s * tl.load(slot, mask=inside, other=0.0) + dz * tl.load(slot + 2 * C, mask=inside, other=0.0)
        product += s * tl.load(slot + C, mask=inside, other=0.0) + dz * tl.load(slot + 3 * C, mask=inside, other=0.0)
    k0 = tl.sum(total, 0)[None, :]
    k1 = tl.sum(product, 0)[None, :] * rstd
    scale = rstd
    if bn_weight_ptr is not None:
        scale *= tl.load(bn_weight_ptr + c, mask=c < C, other=0.0).to(ACC)
        tl.store(dweight_ptr + c, k1.to(dweight_ptr.dtype.element_ty), mask=c < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, k0.to(dbias_ptr.dtype.element_ty), mask=c < C)
    shift = -scale * k0
    slope = scale * rstd * k1
    if dmean_ptr is not None:
        shift += tl.load(dmean_ptr + c, mask=c < C, other=0.0)
    if dvar_ptr is not None:
        slope -= 2.0 * tl.load(dvar_ptr + c, mask=c < C, other=0.0)
    tl.store(shift_ptr + c, shift / HW / N, mask=c < C)
    tl.store(slope_ptr + c, slope / HW / N, mask=c < C)


@triton.jit
def norm_gate_bwd_input_kernel(
    g_ptr, x_ptr, logits_ptr, residual_ptr, dz_ptr, shift_ptr, slope_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, dx_ptr, C_V, HW_V, eps,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, BEFORE: tl.constexpr, GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_ncp = weight_c rstd_c b'(v_ncp) (da_ncp f(logits_nc) + dz_nc / HW) + shift_c - (x_ncp - mean_c) slope_c, da as in
    norm_gate_bwd_reduce_kernel.

    A program owns one tile of one image.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    n, c, p, mask, image, offsets = own_tile(C, HW, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P)
    inside = c < C
    row = n.to(tl.int64) * C + c
    x = load_tile(x_ptr + image, offsets, mask, ACC)
    v, scale = normalised(x, (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps), c, inside, ACC)
    s = gate_function(tl.load(logits_ptr + row, mask=inside, other=0.0), GATE)[:, None]
    u = activation(v, BEFORE)
    da = output_cotangent(g_ptr, residual_ptr, g_ptr, image, offsets, mask, u, s, HAS_RESIDUAL, ACTIVATION, False, ACC)
    du = da * s + (tl.load(dz_ptr + row, mask=inside, other=0.0) / HW)[:, None]
    apart = x - tl.load(bn_mean_ptr + c, mask=inside, other=0.0)[:, None]
    dx = chain(du, activation_grad(v, BEFORE), BEFORE) * scale + tl.load(shift_ptr + c, mask=inside, other=0.0)[:, None]
    dx -= apart * tl.load(slope_ptr + c, mask=inside, other=0.0)[:, None]
    tl.store(dx_ptr + image + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
