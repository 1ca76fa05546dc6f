"""Gates of neighbourhoods: gather-excite, whose logits are a small map [N, C, HS, WS] spread over the map by the nearest of its positions.

Small maps have x's layout. The nearest of HS positions to h of H is floor(h scale_h) in fp32, scale_h = HS / H, as torch interpolates.
"""

import triton
import triton.language as tl

from .gate import output_cotangent
from .pointwise import activation, chain, gate_function, gate_grad, image_offset, load_tile, own_tile, tile_offsets


@triton.jit
def nearest(t, scale, size):
    return tl.minimum((t * scale).to(tl.int32), size - 1)


@triton.jit
def load_nearest(
    ptr, n, c, p, mask, C, W, HS, WS, scale_h, scale_w, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The small map at the nearest to positions p of the map: c [BLOCK_C, 1] x p [1, BLOCK_P]."""
    q = nearest(p // W, scale_h, HS) * WS + nearest(p % W, scale_w, WS)
    return load_tile(ptr + image_offset(n, C, HS * WS), tile_offsets(c, q, C, HS * WS, CHANNELS_LAST, LARGE), mask, ACC)


@triton.jit
def window(i, size, EXTENT: tl.constexpr):
    """How many of the positions |h - EXTENT i| < EXTENT are among the first `size`."""
    return tl.minimum(i * EXTENT + EXTENT, size) - tl.maximum(i * EXTENT - EXTENT + 1, 0)


@triton.jit
def first_row(i, H, HS, scale):
    """The first row of the map whose nearest is i or a later one; H for i = HS."""
    h = tl.maximum((i * H + HS - 1) // HS - 1, 0)  # one before the exact quotient, because the nearest is rounded
    for _ in tl.static_range(2):
        h += (h < H) & ((i == HS) | (nearest(h, scale, HS) < i))
    return h


@triton.jit
def own_rows(C, HS, rows, BLOCK_C: tl.constexpr):
    """What this program owns: image, channels, its first row of the small map, and the one after its last."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    splits = tl.cdiv(HS, rows)
    n = tl.program_id(0) // (blocks_c * splits)
    block = tl.program_id(0) % (blocks_c * splits)
    c = block // splits * BLOCK_C + tl.arange(0, BLOCK_C)
    start = block % splits * rows
    return n, c, start, tl.minimum(start + rows, HS)


@triton.jit
def local_mean_fwd_kernel(
    x_ptr, z_ptr, C_V, H, W_V, HS, WS, rows, VEC_C: tl.constexpr, VEC_W: tl.constexpr, EXTENT: tl.constexpr, PLANES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_J: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """z_ncij = mean of x_nchw over |h - EXTENT i| < EXTENT and |w - EXTENT j| < EXTENT inside the map.

    A program owns BLOCK_C channels and `rows` rows of z. It reads whole rows of x, BLOCK_W >= W, each once: with PLANES, BLOCK_H >= H, all at once,
    else from centre to centre, and those between its first row and the one above are another program's too.
    """
    C = C_V * VEC_C
    W = W_V * VEC_W
    n, c, start, stop = own_rows(C, HS, rows, BLOCK_C)
    c3 = c[:, None, None]
    k = tl.arange(0, BLOCK_H)[None, :, None]
    w = tl.arange(0, BLOCK_W)
    w3 = w[None, None, :]
    x_ptr += image_offset(n, C, H * W)
    inside = (c3 < C) & (w3 < W)
    first = tl.maximum((start - 1) * EXTENT + 1, 0)
    x = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], ACC)
    if PLANES:
        x = load_tile(x_ptr, tile_offsets(c3, k * W + w3, C, H * W, CHANNELS_LAST, LARGE), inside & (k < H), ACC)
    total = tl.zeros([BLOCK_C, BLOCK_W], ACC)
    for i in range(start if PLANES else start - 1, stop):
        below = tl.zeros([BLOCK_C, BLOCK_W], ACC)  # the rows after this centre, in the window of the next one too
        if PLANES:
            total = tl.sum(tl.where((k - EXTENT * i < EXTENT) & (k - EXTENT * i > -EXTENT), x, 0.0), 1)
        else:
            for h0 in range(i * EXTENT, i * EXTENT + EXTENT, BLOCK_H):
                h = h0 + k
                mask = inside & (h >= first) & (h < H)
                x = load_tile(x_ptr, tile_offsets(c3, h * W + w3, C, H * W, CHANNELS_LAST, LARGE), mask, ACC)
                total += tl.sum(x, 1)
                below += tl.sum(tl.where(h > i * EXTENT, x, 0.0), 1)
        if i >= start:
            for j0 in range(0, WS, BLOCK_J):
                j = j0 + tl.arange(0, BLOCK_J)
                apart = w[:, None] - EXTENT * j[None, :]
                near = (apart < EXTENT) & (apart > -EXTENT)
                found = tl.sum(tl.where(near[None, :, :], total[:, :, None], 0.0), 1)
                z = found / (window(i, H, EXTENT) * window(j, W, EXTENT))[None, :].to(ACC)
                offsets = tile_offsets(c[:, None], i * WS + j[None, :], C, HS * WS, CHANNELS_LAST, LARGE)
                tl.store(z_ptr + image_offset(n, C, HS * WS) + offsets, z, mask=(c[:, None] < C) & (j[None, :] < WS))
        total = below


@triton.jit
def local_gate_fwd_kernel(
    x_ptr, logits_ptr, residual_ptr, y_ptr, C_V, HW_V, W, HS, WS, scale_h, scale_w, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y_ncp = a(x_ncp f(logits_ncq) + residual_ncp), q the nearest to p. A program owns one tile of one image."""
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    n, c, p, mask, image, offsets = own_tile(C, HW, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P)
    c = c[:, None]
    p = p[None, :]
    y = load_tile(x_ptr + image, offsets, mask, ACC)
    y *= gate_function(load_nearest(logits_ptr, n, c, p, mask, C, W, HS, WS, scale_h, scale_w, CHANNELS_LAST, LARGE, ACC), GATE)
    if HAS_RESIDUAL:
        y += load_tile(residual_ptr + image, offsets, mask, ACC)
    tl.store(y_ptr + image + offsets, activation(y, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def local_gate_bwd_kernel(
    g_ptr, x_ptr, logits_ptr, residual_ptr, da_ptr, dlogits_ptr, C_V, H, W_V, HS, WS, rows, scale_h, scale_w,
    VEC_C: tl.constexpr, VEC_W: tl.constexpr, PLANES: tl.constexpr, GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    STORE_DA: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_J: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dlogits_ncij = f'(logits_ncij) sum of da_nchw x_nchw over the positions (h, w) to which (i, j) is the nearest; with STORE_DA also da.

    A program owns BLOCK_C channels and `rows` rows of the small map, and reads whole rows of x and g, BLOCK_W >= W: those of one row of the small map
    after another, or with PLANES, BLOCK_H >= H, all at once.
    """
    C = C_V * VEC_C
    W = W_V * VEC_W
    n, c, start, stop = own_rows(C, HS, rows, BLOCK_C)
    c3 = c[:, None, None]
    k = tl.arange(0, BLOCK_H)[None, :, None]
    w = tl.arange(0, BLOCK_W)
    w3 = w[None, None, :]
    column = nearest(w, scale_w, WS)
    image = image_offset(n, C, H * W)
    for i0 in range(start, stop, HS if PLANES else 1):
        products = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], ACC)
        last = first_row(HS if PLANES else i0 + 1, H, HS, scale_h)
        for h0 in range(first_row(i0, H, HS, scale_h), last, BLOCK_H):
            h = h0 + k
            mask = (c3 < C) & (w3 < W) & (h < last)
            offsets = tile_offsets(c3, h * W + w3, C, H * W, CHANNELS_LAST, LARGE)
            x = load_tile(x_ptr + image, offsets, mask, ACC)
            factor = x
            if ACTIVATION != "none":
                t = load_nearest(logits_ptr, n, c3, h * W + w3, mask, C, W, HS, WS, scale_h, scale_w, CHANNELS_LAST, LARGE, ACC)
                factor = gate_function(t, GATE)
            da = output_cotangent(g_ptr, residual_ptr, da_ptr, image, offsets, mask, x, factor, HAS_RESIDUAL, ACTIVATION, STORE_DA, ACC)
            products += tl.where(mask, da * x, 0.0)
        for i in range(i0, stop if PLANES else i0 + 1):
            if PLANES:
                total = tl.sum(tl.where(nearest(k, scale_h, HS) == i, products, 0.0), 1)
            else:
                total = tl.sum(products, 1)
            for j0 in range(0, WS, BLOCK_J):
                j = j0 + tl.arange(0, BLOCK_J)
                found = tl.sum(tl.where((column[:, None] == j[None, :])[None, :, :], total[:, :, None], 0.0), 1)
                mask = (c[:, None] < C) & (j[None, :] < WS)
                small = image_offset(n, C, HS * WS) + tile_offsets(c[:, None], i * WS + j[None, :], C, HS * WS, CHANNELS_LAST, LARGE)
                found = chain(found, gate_grad(tl.load(logits_ptr + small, mask=mask, other=0.0).to(ACC), GATE), GATE)
                tl.store(dlogits_ptr + small, found.to(dlogits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def local_bwd_input_kernel(
    g_ptr, logits_ptr, dz_ptr, through_ptr, dx_ptr, C_V, HW_V, H, W, HS, WS, scale_h, scale_w, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    EXTENT: tl.constexpr, GATE: tl.constexpr, HAS_G: tl.constexpr, HAS_POOL: tl.constexpr, HAS_THROUGH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_ncp = da_ncp f(logits_ncq)                          HAS_G: what comes through the gate, q the nearest to p
             + sum of dz_ncij / count_ij                     HAS_POOL: through the local means whose window holds p
             + through_ncp                                   HAS_THROUGH: through modules on x itself

    Written once. A program owns one tile of one image.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    n, c, p, mask, image, offsets = own_tile(C, HW, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P)
    c = c[:, None]
    p = p[None, :]
    dx = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    if HAS_G:
        t = load_nearest(logits_ptr, n, c, p, mask, C, W, HS, WS, scale_h, scale_w, CHANNELS_LAST, LARGE, ACC)
        dx += load_tile(g_ptr + image, offsets, mask, ACC) * gate_function(t, GATE)
    if HAS_POOL:
        h = p // W
        w = p % W
        for down in tl.static_range(2):
            for right in tl.static_range(2):
                i = h // EXTENT + down
                j = w // EXTENT + right
                # a row at a centre is in that window alone, one between two centres in both
                holds = (i < HS) & (j < WS) & (h - i * EXTENT > -EXTENT) & (w - j * EXTENT > -EXTENT)
                count = window(i, H, EXTENT) * window(j, W, EXTENT)
                share = tl.where(holds, 1.0 / tl.maximum(count, 1).to(ACC), 0.0)
                small = tile_offsets(c, i * WS + j, C, HS * WS, CHANNELS_LAST, LARGE)
                dx += share * load_tile(dz_ptr + image_offset(n, C, HS * WS), small, mask & holds, ACC)
    if HAS_THROUGH:
        dx += load_tile(through_ptr + image, offsets, mask, ACC)
    tl.store(dx_ptr + image + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
