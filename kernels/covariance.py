"""Covariance of a map's channels over its positions, on matrix units, and the gradient of a map that is gated and rectified."""

import triton
import triton.language as tl

from .gate import load_gates
from .pointwise import activation_grad, chain, image_offset, load_tile, tile_offsets


@triton.jit
def row_mean(
    x_ptr, offset, c, C, HW, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """mean over p of x_cp - offset_c for the channels c [BLOCK_C] of one image."""
    total = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    zero = tl.zeros([BLOCK_C], ACC)
    for p0 in range(0, HW, BLOCK_P):
        total += load_centred(x_ptr, offset, zero, c, p0 + tl.arange(0, BLOCK_P), C, HW, CHANNELS_LAST, LARGE, ACC)
    return tl.sum(total, 1) / HW


@triton.jit
def load_centred(x_ptr, mean, rest, c, p, C, HW, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, ACC: tl.constexpr):
    """x_cp - mean_c - rest_c [BLOCK_C, BLOCK_P], 0 outside."""
    mask = (c[:, None] < C) & (p[None, :] < HW)
    x = load_tile(x_ptr, tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE), mask, ACC)
    return tl.where(mask, x - mean[:, None] - rest[:, None], 0.0)


@triton.jit
def covariance_fwd_kernel(
    x_ptr, covariance_ptr, mean_ptr, C_V, HW_V, VEC_C: tl.constexpr, VEC_P: tl.constexpr, PRECISION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """covariance_nij = sum over p of (x_nip - m_ni) (x_njp - m_nj) / HW, m_ni = sum over p of x_nip / HW.

    x [N, C, HW], covariance [N, C, C]; mean [N, 2, C]: m, and what its rounding left of it. The means come first, so that large ones cost no digits.
    A program owns BLOCK_C x BLOCK_C elements of one image's covariance.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    blocks_c = tl.cdiv(C, BLOCK_C)
    n = tl.program_id(0) // (blocks_c * blocks_c)
    block = tl.program_id(0) % (blocks_c * blocks_c)
    i = block // blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    j = block % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += image_offset(n, C, HW)
    zero = tl.zeros([BLOCK_C], ACC)
    mean_i = row_mean(x_ptr, zero, i, C, HW, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC)
    rest_i = row_mean(x_ptr, mean_i, i, C, HW, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC)
    mean_j = row_mean(x_ptr, zero, j, C, HW, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC)
    rest_j = row_mean(x_ptr, mean_j, j, C, HW, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC)
    total = tl.zeros([BLOCK_C, BLOCK_C], ACC)
    for p0 in range(0, HW, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        left = load_centred(x_ptr, mean_i, rest_i, i, p, C, HW, CHANNELS_LAST, LARGE, ACC)
        right = load_centred(x_ptr, mean_j, rest_j, j, p, C, HW, CHANNELS_LAST, LARGE, ACC)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION, out_dtype=ACC)
    row = n.to(tl.int64) * C
    first = (i < C) & (block % blocks_c == 0)
    tl.store(mean_ptr + 2 * row + i, mean_i, mask=first)
    tl.store(mean_ptr + 2 * row + C + i, rest_i, mask=first)
    tl.store(covariance_ptr + (row + i[:, None]) * C + j[None, :], total / HW, mask=(i[:, None] < C) & (j[None, :] < C))


@triton.jit
def covariance_bwd_kernel(
    g_ptr, x_ptr, mean_ptr, dx_ptr, C_V, HW_V, VEC_C: tl.constexpr, VEC_P: tl.constexpr, PRECISION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_nip = sum over j of (g_nij + g_nji) (x_njp - m_nj) / HW. g [N, C, C]. A program owns BLOCK_C channels x BLOCK_P positions of one image."""
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
    for j0 in range(0, C, BLOCK_C):
        j = j0 + tl.arange(0, BLOCK_C)
        both = (i[:, None] < C) & (j[None, :] < C)
        g = tl.load(g_ptr + (row + i[:, None]) * C + j[None, :], mask=both, other=0.0)
        g += tl.load(g_ptr + (row + j[None, :]) * C + i[:, None], mask=both, other=0.0)
        mean = tl.load(mean_ptr + 2 * row + j, mask=j < C, other=0.0)
        rest = tl.load(mean_ptr + 2 * row + C + j, mask=j < C, other=0.0)
        x = load_centred(x_ptr + image, mean, rest, j, p, C, HW, CHANNELS_LAST, LARGE, ACC)
        total = tl.dot(g, x, total, input_precision=PRECISION, out_dtype=ACC)
    mask = (i[:, None] < C) & (p[None, :] < HW)
    offsets = tile_offsets(i[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
    tl.store(dx_ptr + image + offsets, (total / HW).to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rectified_bwd_kernel(
    da_ptr, x_ptr, drectified_ptr, logits_ptr, dx_ptr, C_V, HW_V, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    GATE: tl.constexpr, HAS_CHANNEL: tl.constexpr, HAS_DA: tl.constexpr, HAS_RECTIFIED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_ncp = da_ncp f(logits_nc) + drectified_ncp [x_ncp > 0]: what comes through a channel gate and through max(x, 0), written once.

    A program owns one tile of one image.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks_p = tl.cdiv(HW, BLOCK_P)
    n = tl.program_id(0) // (blocks_c * blocks_p)
    block = tl.program_id(0) % (blocks_c * blocks_p)
    c = block // blocks_p * BLOCK_C + tl.arange(0, BLOCK_C)
    p = block % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (c[:, None] < C) & (p[None, :] < HW)
    image = image_offset(n, C, HW)
    offsets = tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
    dx = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    if HAS_DA:
        s, _ = load_gates(logits_ptr, logits_ptr, n, c, p, C, HW, GATE, GATE, HAS_CHANNEL, False, ACC)
        dx += load_tile(da_ptr + image, offsets, mask, ACC) * s[:, None]
    if HAS_RECTIFIED:
        x = load_tile(x_ptr + image, offsets, mask, ACC)
        dx += chain(load_tile(drectified_ptr + image, offsets, mask, ACC), activation_grad(x, "relu"), "relu")
    tl.store(dx_ptr + image + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
