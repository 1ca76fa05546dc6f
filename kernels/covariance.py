"""Covariance of a map's channels over its positions, on matrix units."""

import triton
import triton.language as tl

from .pointwise import activation, activation_grad, chain, image_offset, load_tile, tile_offsets
from .product import add_product


@triton.jit
def load_channels(
    x_ptr, c, p, C, HW, BEFORE: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """b(x_cp) [BLOCK_C, BLOCK_P], 0 outside."""
    mask = (c[:, None] < C) & (p[None, :] < HW)
    return activation(load_tile(x_ptr, tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE), mask, ACC), BEFORE)


@triton.jit
def centred(x, mean, c, p, C, HW):
    """x_cp - mean_c [BLOCK_C, BLOCK_P], 0 outside."""
    return tl.where((c[:, None] < C) & (p[None, :] < HW), x - mean[:, None], 0.0)


@triton.jit
def mean_of_rest(total, HW):
    """What is left of the mean after a shift; NaN and not infinite, because an infinite mean leaves nothing to tell apart."""
    rest = tl.sum(total, 1) / HW
    return rest + (rest - rest)


@triton.jit
def covariance_fwd_kernel(
    x_ptr, covariance_ptr, mean_ptr, C_V, HW_V, VEC_C: tl.constexpr, VEC_P: tl.constexpr, BEFORE: tl.constexpr, INTERPRETED: tl.constexpr,
    WHOLE: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """covariance_nij = sum over p of (u_nip - s_ni) (u_njp - s_nj) / HW - r_ni r_nj, u = b(x), s_ni the mean of u_nip over the first BLOCK_P
    positions, r_ni = sum over p of (u_nip - s_ni) / HW.

    x [N, C, HW], covariance [N, C, C]; mean [N, 2, C]: s and r. The shift comes first, so that a large mean costs no digits;
    positions that are all unlike the first ones cost up to HW / BLOCK_P roundings. A program owns BLOCK_C x BLOCK_C elements of one image's
    covariance; WHOLE: all of them, and then reads each element of x once.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    blocks_c = tl.cdiv(C, BLOCK_C)
    n = tl.program_id(0) // (blocks_c * blocks_c)
    block = tl.program_id(0) % (blocks_c * blocks_c)
    i = block // blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    j = block % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    x_ptr += image_offset(n, C, HW)
    left = load_channels(x_ptr, i, p, C, HW, BEFORE, CHANNELS_LAST, LARGE, ACC)
    shift_i = tl.sum(left, 1) / tl.minimum(HW, BLOCK_P)
    sum_i = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    if not WHOLE:
        right = load_channels(x_ptr, j, p, C, HW, BEFORE, CHANNELS_LAST, LARGE, ACC)
        shift_j = tl.sum(right, 1) / tl.minimum(HW, BLOCK_P)
        sum_j = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    total = tl.zeros([BLOCK_C, BLOCK_C], ACC)
    for p0 in range(0, HW, BLOCK_P):
        # the tiles of the next step are on their way while this one's are multiplied
        u_i = centred(left, shift_i, i, p0 + p, C, HW)
        left = load_channels(x_ptr, i, p0 + BLOCK_P + p, C, HW, BEFORE, CHANNELS_LAST, LARGE, ACC)
        sum_i += u_i
        if WHOLE:
            u_j = u_i
        else:
            u_j = centred(right, shift_j, j, p0 + p, C, HW)
            right = load_channels(x_ptr, j, p0 + BLOCK_P + p, C, HW, BEFORE, CHANNELS_LAST, LARGE, ACC)
            sum_j += u_j
        total = add_product(total, u_i, u_j, INTERPRETED, ACC)
    rest_i = mean_of_rest(sum_i, HW)
    rest_j = rest_i
    if not WHOLE:
        rest_j = mean_of_rest(sum_j, HW)
    row = n.to(tl.int64) * C
    first = (i < C) & (block % blocks_c == 0)
    tl.store(mean_ptr + 2 * row + i, shift_i, mask=first)
    tl.store(mean_ptr + 2 * row + C + i, rest_i, mask=first)
    found = total / HW - rest_i[:, None] * rest_j[None, :]
    tl.store(covariance_ptr + (row + i[:, None]) * C + j[None, :], found, mask=(i[:, None] < C) & (j[None, :] < C))


@triton.jit
def covariance_bwd_kernel(
    g_ptr, x_ptr, mean_ptr, dx_ptr, C_V, HW_V, VEC_C: tl.constexpr, VEC_P: tl.constexpr, BEFORE: tl.constexpr, INTERPRETED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_nip = b'(x_nip) sum over j of (g_nij + g_nji) (b(x_njp) - s_nj - r_nj) / HW.

    g [N, C, C]; mean [N, 2, C]: s and r. A program owns BLOCK_C channels x BLOCK_P positions of one image.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks_p = tl.cdiv(HW, BLOCK_P)
    n = tl.program_id(0) // (blocks_c * blocks_p)
    block = tl.program_id(0) % (blocks_c * blocks_p)
    i = block // blocks_p * BLOCK_C + tl.arange(0, BLOCK_C)
    p = block % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    image = image_offset(n, C, HW)
    row = n.to(tl.int64) * C
    total = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for j0 in range(0, C, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        both = (i[:, None] < C) & (j[None, :] < C)
        g = tl.load(g_ptr + (row + i[:, None]) * C + j[None, :], mask=both, other=0.0)
        g += tl.load(g_ptr + (row + j[None, :]) * C + i[:, None], mask=both, other=0.0)
        shift = tl.load(mean_ptr + 2 * row + j, mask=j < C, other=0.0)
        rest = tl.load(mean_ptr + 2 * row + C + j, mask=j < C, other=0.0)
        u = centred(load_channels(x_ptr + image, j, p, C, HW, BEFORE, CHANNELS_LAST, LARGE, ACC), shift, j, p, C, HW)
        total = add_product(total, g, tl.trans(centred(u, rest, j, p, C, HW)), INTERPRETED, ACC)
    mask = (i[:, None] < C) & (p[None, :] < HW)
    offsets = tile_offsets(i[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
    total /= HW
    if BEFORE != "none":
        total = chain(total, activation_grad(load_tile(x_ptr + image, offsets, mask, ACC), BEFORE), BEFORE)
    tl.store(dx_ptr + image + offsets, total.to(dx_ptr.dtype.element_ty), mask=mask)
