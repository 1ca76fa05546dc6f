"""Gates of single planes: SimAM and shuffle attention, whose gate at a position needs mean and variance of its own plane and nothing else.

Here a program owns BLOCK_C planes of one image with all their positions, BLOCK_P >= HW, and reads them once; for larger planes see plane_ticket.py.
Both gates are polynomials of u = x - mean with coefficients of the plane:

    shuffle, first half of a group:   t = cweight mean + cbias
    shuffle, second half:             t = sweight (norm_weight rstd u + norm_bias) + sbias,    rstd = (m2 / HW + EPS)^(-1/2)
    SimAM:                            t = u^2 / (4 (m2 / (HW - 1) + EPS)) + 1/2

with m2 the sum of u^2 over the plane. Channels are those of the output: channel o of a shuffled map is channel o // 2 + (o % 2) C / 2 of x.
"""

import triton
import triton.language as tl

from .gate import output_cotangent
from .pointwise import activation, chain, gate_function, gate_grad, image_offset, load_tile, store_tile, tile_offsets


@triton.jit
def source_channels(o, C, SHUFFLE: tl.constexpr):
    """The channels of x behind the output channels o."""
    if SHUFFLE:
        o = o // 2 + (o % 2) * (C // 2)
    return o


@triton.jit
def load_source(
    ptr, o0, p, C_V, HW, VEC_C: tl.constexpr, SHUFFLE: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr, LAST: tl.constexpr = None,
):  # fmt: skip
    """x at positions p of the channels behind o0, o0 + 1, ...: [BLOCK_C, BLOCK_P]. Shuffled channels-last rows are two runs of channels, each loaded
    as wide as it is and interleaved on chip."""
    C = C_V * VEC_C
    if SHUFFLE and CHANNELS_LAST:
        half = C_V * (VEC_C // 2)
        c = (o0 // 2 + tl.arange(0, BLOCK_C // 2))[:, None]
        mask = (c < half) & (p[None, :] < HW)
        offsets = tile_offsets(c, p[None, :], C, HW, CHANNELS_LAST, LARGE)
        pair = tl.join(load_tile(ptr, offsets, mask, ACC, LAST), load_tile(ptr + half, offsets, mask, ACC, LAST))
        x = tl.reshape(tl.permute(pair, (0, 2, 1)), (BLOCK_C, BLOCK_P))
    else:
        o = o0 + tl.arange(0, BLOCK_C)
        mask = (o[:, None] < C) & (p[None, :] < HW)
        c = source_channels(o, C, SHUFFLE)[:, None]
        x = load_tile(ptr, tile_offsets(c, p[None, :], C, HW, CHANNELS_LAST, LARGE), mask, ACC, LAST)
    return x


@triton.jit
def store_source(
    ptr, value, o0, p, C_V, HW, VEC_C: tl.constexpr, SHUFFLE: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr = None,
):  # fmt: skip
    """The reverse of load_source."""
    C = C_V * VEC_C
    value = value.to(ptr.dtype.element_ty)
    if SHUFFLE and CHANNELS_LAST:
        half = C_V * (VEC_C // 2)
        c = (o0 // 2 + tl.arange(0, BLOCK_C // 2))[:, None]
        mask = (c < half) & (p[None, :] < HW)
        offsets = tile_offsets(c, p[None, :], C, HW, CHANNELS_LAST, LARGE)
        first, second = tl.split(tl.permute(tl.reshape(value, (BLOCK_C // 2, 2, BLOCK_P)), (0, 2, 1)))
        store_tile(ptr, first, offsets, mask, LAST)
        store_tile(ptr + half, second, offsets, mask, LAST)
    else:
        o = o0 + tl.arange(0, BLOCK_C)
        mask = (o[:, None] < C) & (p[None, :] < HW)
        c = source_channels(o, C, SHUFFLE)[:, None]
        store_tile(ptr, value, tile_offsets(c, p[None, :], C, HW, CHANNELS_LAST, LARGE), mask, LAST)


@triton.jit
def plane_coefficients(
    cweight_ptr, cbias_ptr, sweight_ptr, sbias_ptr, norm_weight_ptr, norm_bias_ptr, c, mean, m2, C, HW, per_group,
    SHUFFLE: tl.constexpr, HAS_AFFINE: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(normed, a, b, r) [BLOCK_C]: t = a + b u with r = rstd for the normalised planes of a shuffled map, t = a with r = cweight for its others;
    SimAM's t = a + b u^2."""
    if SHUFFLE:
        half = per_group // 2
        i = c % per_group
        normed = i >= half
        i = i % half
        first = (c < C) & (i == c % per_group)
        second = (c < C) & normed
        gamma = tl.full(c.shape, 1.0, ACC)
        beta = tl.zeros(c.shape, ACC)
        if HAS_AFFINE:
            gamma = tl.load(norm_weight_ptr + i, mask=second, other=0.0).to(ACC)
            beta = tl.load(norm_bias_ptr + i, mask=second, other=0.0).to(ACC)
        weight = tl.load(sweight_ptr + i, mask=second, other=0.0).to(ACC)
        bias = tl.load(sbias_ptr + i, mask=second, other=0.0).to(ACC)
        slope = tl.load(cweight_ptr + i, mask=first, other=0.0).to(ACC)
        start = tl.load(cbias_ptr + i, mask=first, other=0.0).to(ACC)
        rstd = 1.0 / tl.sqrt(m2 / HW + EPS)
        a = tl.where(normed, weight * beta + bias, slope * mean + start)
        b = weight * gamma * rstd
        r = tl.where(normed, rstd, slope)
    else:
        normed = c >= 0
        a = tl.full(c.shape, 0.5, ACC)
        b = 1.0 / (4.0 * (m2 / (HW - 1) + EPS))
        r = b
    return normed, a, b, r


@triton.jit
def plane_logits(u, normed, a, b, SHUFFLE: tl.constexpr):
    if SHUFFLE:
        t = a[:, None] + tl.where(normed[:, None], b[:, None] * u, 0.0)  # Inf in an unnormalised plane makes NaN of u
    else:
        t = a[:, None] + b[:, None] * u * u
    return t


@triton.jit
def gate_planes(
    x, residual_ptr, y_ptr, image, o, p, mean, normed, a, b, C, HW, SHUFFLE: tl.constexpr, GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, ACC: tl.constexpr, LAST: tl.constexpr = None,
):  # fmt: skip
    """y = a(x f(t) + residual) of a tile."""
    y = x * gate_function(plane_logits(x - mean[:, None], normed, a, b, SHUFFLE), GATE)
    mask = (o[:, None] < C) & (p[None, :] < HW)
    offsets = tile_offsets(o[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
    if HAS_RESIDUAL:
        y += load_tile(residual_ptr + image, offsets, mask, ACC, LAST)
    store_tile(y_ptr + image, activation(y, ACTIVATION), offsets, mask, LAST)


@triton.jit
def plane_gate_fwd_kernel(
    x_ptr, cweight_ptr, cbias_ptr, sweight_ptr, sbias_ptr, norm_weight_ptr, norm_bias_ptr, residual_ptr, y_ptr, moments_ptr,
    C_V, HW_V, per_group, VEC_C: tl.constexpr, VEC_P: tl.constexpr, SHUFFLE: tl.constexpr, HAS_AFFINE: tl.constexpr, EPS: tl.constexpr,
    GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y_nop = a(x_ncp f(t_ncp) + residual_nop), c the channel of x behind o.

    moments [N, 2, C]: mean and m2. A program owns BLOCK_C planes of one image, BLOCK_P >= HW.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    blocks_c = tl.cdiv(C, BLOCK_C)
    n = tl.program_id(0) // blocks_c
    o0 = tl.program_id(0) % blocks_c * BLOCK_C
    o = o0 + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    c = source_channels(o, C, SHUFFLE)
    image = image_offset(n, C, HW)
    x = load_source(x_ptr + image, o0, p, C_V, HW, VEC_C, SHUFFLE, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC)
    mean = tl.sum(x, 1) / HW
    apart = x - mean[:, None]
    m2 = tl.sum(tl.where(p[None, :] < HW, apart * apart, 0.0), 1)
    row = moments_ptr + n.to(tl.int64) * 2 * C + c
    tl.store(row, mean, mask=o < C)
    tl.store(row + C, m2, mask=o < C)
    normed, a, b, _ = plane_coefficients(
        cweight_ptr, cbias_ptr, sweight_ptr, sbias_ptr, norm_weight_ptr, norm_bias_ptr, c, mean, m2, C, HW, per_group, SHUFFLE, HAS_AFFINE, EPS, ACC
    )  # fmt: skip
    gate_planes(
        x, residual_ptr, y_ptr, image, o, p, mean, normed, a, b, C, HW, SHUFFLE, GATE, HAS_RESIDUAL, ACTIVATION, CHANNELS_LAST, LARGE, ACC
    )  # fmt: skip


@triton.jit
def plane_terms(
    g_ptr, residual_ptr, da_ptr, image, o, p, x, mean, normed, a, b, C, HW, SHUFFLE: tl.constexpr, GATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STORE_DA: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, ACC: tl.constexpr,
    LAST: tl.constexpr = None,
):  # fmt: skip
    """(u, w, direct): w = dt for a shuffled map and dt u for SimAM; direct = da f(t) + w dt/du / (w / dt), the part of dx that needs no sum."""
    mask = (o[:, None] < C) & (p[None, :] < HW)
    offsets = tile_offsets(o[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
    u = x - mean[:, None]
    t = plane_logits(u, normed, a, b, SHUFFLE)
    factor = gate_function(t, GATE)
    da = output_cotangent(g_ptr, residual_ptr, da_ptr, image, offsets, mask, x, factor, HAS_RESIDUAL, ACTIVATION, STORE_DA, ACC, None, LAST)
    w = chain(da * x, gate_grad(t, GATE), GATE)  # 0 outside of the map, where da is, or NaN in a plane of NaN
    if SHUFFLE:
        direct = da * factor + tl.where(normed[:, None], b[:, None] * w, 0.0)
    else:
        w *= u
        direct = da * factor + 2.0 * b[:, None] * w
    return u, w, direct


@triton.jit
def plane_slopes(sum0, sum1, normed, b, r, HW, SHUFFLE: tl.constexpr):
    """(constant, linear): constant + linear u is what comes back through mean and m2, of sums as in plane_gate_bwd_kernel's part."""
    if SHUFFLE:
        constant = tl.where(normed, -b * sum0, r * sum0) / HW
        linear = -b * r * sum1 / HW
    else:
        constant = -2.0 * b * sum0 / HW
        linear = -8.0 * b * sum1 / (HW - 1)
    return constant, linear


@triton.jit
def plane_gate_bwd_kernel(
    g_ptr, x_ptr, cweight_ptr, cbias_ptr, sweight_ptr, sbias_ptr, norm_weight_ptr, norm_bias_ptr, moments_ptr, residual_ptr, da_ptr, dx_ptr, part_ptr,
    C_V, HW_V, per_group, VEC_C: tl.constexpr, VEC_P: tl.constexpr, SHUFFLE: tl.constexpr, HAS_AFFINE: tl.constexpr, EPS: tl.constexpr,
    GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STORE_DA: tl.constexpr, STORE_DX: tl.constexpr,
    STORE_PART: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_ncp = da_nop f(t_ncp) + dt_ncp dt/du_ncp + what comes back through the plane's mean and m2, dt_ncp = da_nop x_ncp f'(t_ncp).

    With sums over p, s0 of w and s1 of w u (see plane_terms), the last is
        -b s0 / HW - b rstd^2 s1 u / HW             for a normalised plane of a shuffled map, cweight s0 / HW for another one,
        -2 b s0 / HW - 8 b^2 s1 u / (HW - 1)        for SimAM.
    part [N, 2, C]: s0, and rstd s1 (b s1 for SimAM) or mean s0. A program owns BLOCK_C planes of one image, BLOCK_P >= HW.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    blocks_c = tl.cdiv(C, BLOCK_C)
    n = tl.program_id(0) // blocks_c
    o0 = tl.program_id(0) % blocks_c * BLOCK_C
    o = o0 + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    c = source_channels(o, C, SHUFFLE)
    image = image_offset(n, C, HW)
    row = n.to(tl.int64) * 2 * C + c
    mean = tl.load(moments_ptr + row, mask=o < C, other=0.0)
    m2 = tl.load(moments_ptr + row + C, mask=o < C, other=0.0)
    normed, a, b, r = plane_coefficients(
        cweight_ptr, cbias_ptr, sweight_ptr, sbias_ptr, norm_weight_ptr, norm_bias_ptr, c, mean, m2, C, HW, per_group, SHUFFLE, HAS_AFFINE, EPS, ACC
    )  # fmt: skip
    x = load_source(x_ptr + image, o0, p, C_V, HW, VEC_C, SHUFFLE, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC)
    u, w, direct = plane_terms(
        g_ptr, residual_ptr, da_ptr, image, o, p, x, mean, normed, a, b, C, HW, SHUFFLE, GATE, HAS_RESIDUAL, ACTIVATION, STORE_DA,
        CHANNELS_LAST, LARGE, ACC,
    )  # fmt: skip
    sum0 = tl.sum(w, 1)
    sum1 = tl.where(normed, r * tl.sum(w * u, 1), mean * sum0)
    if STORE_PART:
        tl.store(part_ptr + row, sum0, mask=o < C)
        tl.store(part_ptr + row + C, sum1, mask=o < C)
    if STORE_DX:
        constant, linear = plane_slopes(sum0, sum1, normed, b, r, HW, SHUFFLE)
        dx = direct + constant[:, None] + tl.where(normed[:, None], linear[:, None] * u, 0.0)
        store_source(dx_ptr + image, dx, o0, p, C_V, HW, VEC_C, SHUFFLE, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P)
