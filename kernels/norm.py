"""A BatchNorm that trains, as part of the passes of the channel gate that follows it: u = weight xhat + bias, xhat = (x - mean) rstd, with mean and
variance of a channel over the batch.

The pass that would squeeze u takes the moments of every image's channels, from which follow the batch's, and the squeeze too, as u is linear in x.
Backward the sums that the gate's gradient takes are those that the norm's does:

    s0 = sum over p of da,  s1 = sum over p of da (x - mean);  d logits = f'(logits) (weight rstd s1 + bias s0)
    k0 = sum over n of (f s0 + dz),  k1 = sum over n of (f s1 + dz (mean over p of x - mean)) rstd;  d bias = k0, d weight = k1
    dx = weight rstd (da f + dz / HW - k0 / (N HW) - xhat k1 / (N HW))

with dz the gradient of the squeeze's mean.
"""

import triton
import triton.language as tl

from .gate import output_cotangent
from .pointwise import chain, gate_function, gate_grad, image_offset, load_tile, normalised, own_range, own_tile, tile_offsets


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
    part_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, rest_ptr, apart_ptr, z_ptr, N, C, HW, per_split, eps,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """mean_c and var_c of x over images and positions, rest_c by which the first was rounded; apart_nc, how far the mean over positions lies from it;
    z_nc = weight_c apart_nc rstd_c + bias_c.

    part as channel_moments_kernel leaves it, apart and z [N, C], all others [C]; var is the biased one. A program owns BLOCK_C channels.
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
    tl.store(mean_ptr + c, mean, mask=c < C)
    tl.store(rest_ptr + c, off - (mean - near), mask=c < C)
    total = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)[:, None]
        inside = (n < N) & (c < C)
        means, squares = image_moments(part_ptr, near, n, c, inside, C, HW, per_split, SPLITS, ACC)
        tl.store(apart_ptr + n * C + c, means - off, mask=inside)
        total += squares + tl.where(inside, HW * (means - off) * (means - off), 0.0)
    var = tl.sum(total, 0)[None, :] / HW / N
    tl.store(var_ptr + c, var, mask=c < C)
    slope = 1.0 / tl.sqrt(var + eps)
    start = tl.zeros([1, BLOCK_C], ACC)
    if weight_ptr is not None:
        slope *= tl.load(weight_ptr + c, mask=c < C, other=0.0).to(ACC)
    if bias_ptr is not None:
        start += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(ACC)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)[:, None]
        inside = (n < N) & (c < C)
        means, _ = image_moments(part_ptr, near, n, c, inside, C, HW, per_split, SPLITS, ACC)
        tl.store(z_ptr + n * C + c, (means - off) * slope + start, mask=inside)


@triton.jit
def norm_gate_bwd_reduce_kernel(
    g_ptr, x_ptr, logits_ptr, residual_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, part_ptr, da_ptr, C_V, HW_V, eps,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr, GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    STORE_DA: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """part_ni0c = sum over p of da_ncp, part_ni1c = sum over p of da_ncp (x_ncp - mean_c), p in range i of SPLITS;
    da_ncp = g_ncp a'(u_ncp f(logits_nc) + residual_ncp), stored with STORE_DA.

    part [N, SPLITS, 2, C]. Programs as in channel_moments_kernel.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    n, c, split, start, stop = own_range(tl.program_id(0), C, HW, SPLITS, BLOCK_C, BLOCK_P)
    image = image_offset(n, C, HW)
    s = gate_function(tl.load(logits_ptr + n.to(tl.int64) * C + c, mask=c < C, other=0.0), GATE)[:, None]
    mean = tl.load(bn_mean_ptr + c, mask=c < C, other=0.0)[:, None]
    total = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    product = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for p0 in range(start, stop, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (c[:, None] < C) & (p[None, :] < HW)
        offsets = tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
        x = load_tile(x_ptr + image, offsets, mask, ACC)
        u, _ = normalised(x, (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps), c, c < C, ACC)
        da = output_cotangent(g_ptr, residual_ptr, da_ptr, image, offsets, mask, u, s, HAS_RESIDUAL, ACTIVATION, STORE_DA, ACC)
        total += tl.where(mask, da, 0.0)
        product += tl.where(mask, da * (x - mean), 0.0)
    slot = part_ptr + (n.to(tl.int64) * SPLITS + split) * 2 * C + c
    tl.store(slot, tl.sum(total, 1), mask=c < C)
    tl.store(slot + C, tl.sum(product, 1), mask=c < C)


@triton.jit
def norm_gate_bwd_logits_kernel(
    part_ptr, logits_ptr, bn_weight_ptr, bn_bias_ptr, bn_var_ptr, rest_ptr, sums_ptr, dlogits_ptr, N, C, eps,
    SPLITS: tl.constexpr, GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sums_n0c = sum over i of part_ni0c, sums_n1c = sum over i of part_ni1c - rest_c sums_n0c;
    dlogits_nc = f'(logits_nc) (weight_c rstd_c sums_n1c + bias_c sums_n0c).

    sums [N, 2, C]. A program owns BLOCK_N images and BLOCK_C channels.
    """
    blocks_c = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // blocks_c * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    c = (tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (n < N) & (c < C)
    slot = part_ptr + n.to(tl.int64) * SPLITS * 2 * C + c
    total = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    product = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    for i in range(SPLITS):
        total += tl.load(slot + i * 2 * C, mask=inside, other=0.0)
        product += tl.load(slot + (i * 2 + 1) * C, mask=inside, other=0.0)
    product -= total * tl.load(rest_ptr + c, mask=c < C, other=0.0)
    tl.store(sums_ptr + n * 2 * C + c, total, mask=inside)
    tl.store(sums_ptr + n * 2 * C + C + c, product, mask=inside)
    found = product / tl.sqrt(tl.load(bn_var_ptr + c, mask=c < C, other=1.0) + eps)
    if bn_weight_ptr is not None:
        found *= tl.load(bn_weight_ptr + c, mask=c < C, other=0.0).to(ACC)
    if bn_bias_ptr is not None:
        found += total * tl.load(bn_bias_ptr + c, mask=c < C, other=0.0).to(ACC)
    t = tl.load(logits_ptr + n * C + c, mask=inside, other=0.0)
    tl.store(dlogits_ptr + n * C + c, chain(found, gate_grad(t, GATE), GATE), mask=inside)


@triton.jit
def norm_gate_bwd_statistics_kernel(
    sums_ptr, logits_ptr, dz_ptr, apart_ptr, bn_weight_ptr, bn_var_ptr, dmean_ptr, dvar_ptr, dweight_ptr, dbias_ptr, shift_ptr,
    slope_ptr, N, C, HW, eps, GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dbias_c = k0, dweight_c = k1, and what dx takes from the whole batch: shift_nc = weight_c rstd_c (dz_nc / HW - k0 / (N HW)) + dmean_c / (N HW),
    slope_c = (weight_c rstd_c^2 k1 - 2 dvar_c) / (N HW).

    dz, apart, shift [N, C], dmean and dvar, the gradients of the statistics as results, and all others [C]. A program owns BLOCK_C channels.
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
        total += s * tl.load(sums_ptr + n * 2 * C + c, mask=inside, other=0.0) + dz
        apart = tl.load(apart_ptr + n * C + c, mask=inside, other=0.0)
        product += s * tl.load(sums_ptr + n * 2 * C + C + c, mask=inside, other=0.0) + dz * apart
    k0 = tl.sum(total, 0)[None, :]
    k1 = tl.sum(product, 0)[None, :] * rstd
    scale = rstd
    if bn_weight_ptr is not None:
        scale *= tl.load(bn_weight_ptr + c, mask=c < C, other=0.0).to(ACC)
        tl.store(dweight_ptr + c, k1.to(dweight_ptr.dtype.element_ty), mask=c < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, k0.to(dbias_ptr.dtype.element_ty), mask=c < C)
    constant = -scale * k0
    slope = scale * rstd * k1
    if dmean_ptr is not None:
        constant += tl.load(dmean_ptr + c, mask=c < C, other=0.0)
    if dvar_ptr is not None:
        slope -= 2.0 * tl.load(dvar_ptr + c, mask=c < C, other=0.0)
    tl.store(slope_ptr + c, slope / HW / N, mask=c < C)
    constant = constant / HW / N
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)[:, None]
        inside = (n < N) & (c < C)
        dz = tl.load(dz_ptr + n * C + c, mask=inside, other=0.0)
        tl.store(shift_ptr + n * C + c, scale * dz / HW + constant, mask=inside)


@triton.jit
def norm_gate_bwd_input_kernel(
    g_ptr, x_ptr, logits_ptr, residual_ptr, shift_ptr, slope_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, dx_ptr, C_V, HW_V, eps,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_ncp = da_ncp f(logits_nc) weight_c rstd_c + shift_nc - (x_ncp - mean_c) slope_c, da as in norm_gate_bwd_reduce_kernel.

    A program owns one tile of one image.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    n, c, p, mask, image, offsets = own_tile(C, HW, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P)
    inside = c < C
    row = n.to(tl.int64) * C + c
    x = load_tile(x_ptr + image, offsets, mask, ACC)
    u, scale = normalised(x, (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps), c, inside, ACC)
    s = gate_function(tl.load(logits_ptr + row, mask=inside, other=0.0), GATE)[:, None]
    da = output_cotangent(g_ptr, residual_ptr, g_ptr, image, offsets, mask, u, s, HAS_RESIDUAL, ACTIVATION, False, ACC)
    apart = x - tl.load(bn_mean_ptr + c, mask=inside, other=0.0)[:, None]
    dx = da * (s * scale) + tl.load(shift_ptr + row, mask=inside, other=0.0)[:, None]
    dx -= apart * tl.load(slope_ptr + c, mask=inside, other=0.0)[:, None]
    tl.store(dx_ptr + image + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
