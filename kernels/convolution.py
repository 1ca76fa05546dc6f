"""A 1x1 convolution to few channels of a rectified map, on matrix units, and what flows back through it and a channel gate on the same map."""

import triton
import triton.language as tl

from .gate import load_gates
from .pointwise import activation, activation_grad, chain, image_offset, load_tile, tile_offsets
from .product import add_product


@triton.jit
def load_weight(w_ptr, d, c, D, C):
    """w_dc [BLOCK_D, BLOCK_C], 0 outside."""
    return tl.load(w_ptr + d[:, None] * C + c[None, :], mask=(d[:, None] < D) & (c[None, :] < C), other=0.0)


@triton.jit
def load_cotangent(g_ptr, n, d, p, on, D, P, OUT_LAST: tl.constexpr, LARGE: tl.constexpr):
    """g_ndp [BLOCK_D, BLOCK_P], 0 outside and where not on."""
    offsets = tile_offsets(d[:, None], p[None, :], D, P, OUT_LAST, LARGE)
    return tl.load(g_ptr + image_offset(n, D, P) + offsets, mask=(d[:, None] < D) & on[None, :], other=0.0)


@triton.jit
def pointwise_convolution_fwd_kernel(
    x_ptr, w_ptr, b_ptr, out_ptr, C_V, HW_V, D, P, W, OUT_W, VEC_C: tl.constexpr, VEC_P: tl.constexpr, BEFORE: tl.constexpr, STRIDE: tl.constexpr,
    HAS_B: tl.constexpr, INTERPRETED: tl.constexpr, OUT_LAST: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out_ndp = sum over c of w_dc a(x_ncq) + b_d, q the position in x of the output's position p.

    x [N, C, HW], w [D, C], b [D], out [N, D, P]; OUT_LAST: with channels last. A program owns all D channels of BLOCK_P positions of one image.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    if STRIDE == 1:
        P = HW
    blocks_p = tl.cdiv(P, BLOCK_P)
    n = tl.program_id(0) // blocks_p
    p = tl.program_id(0) % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    q = p
    if STRIDE > 1:
        q = (p // OUT_W * W + p % OUT_W) * STRIDE
    x_ptr += image_offset(n, C, HW)
    total = tl.zeros([BLOCK_D, BLOCK_P], ACC)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        x = load_tile(x_ptr, tile_offsets(c[:, None], q[None, :], C, HW, CHANNELS_LAST, LARGE), (c[:, None] < C) & (p[None, :] < P), ACC)
        w = load_weight(w_ptr, d, c, D, C)
        total = add_product(total, w, tl.trans(activation(x, BEFORE).to(w.dtype)), INTERPRETED, ACC)
    if HAS_B:
        total += tl.load(b_ptr + d, mask=d < D, other=0.0).to(ACC)[:, None]
    offsets = tile_offsets(d[:, None], p[None, :], D, P, OUT_LAST, LARGE)
    tl.store(out_ptr + image_offset(n, D, P) + offsets, total.to(out_ptr.dtype.element_ty), mask=(d[:, None] < D) & (p[None, :] < P))


@triton.jit
def pointwise_convolution_bwd_kernel(
    da_ptr, x_ptr, w_ptr, g_ptr, logits_ptr, dx_ptr, dw_part_ptr, N, C_V, HW_V, D, P, W, OUT_W, SPLITS, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    BEFORE: tl.constexpr, STRIDE: tl.constexpr, GATE: tl.constexpr, HAS_DA: tl.constexpr, STORE_DX: tl.constexpr, STORE_DW: tl.constexpr,
    INTERPRETED: tl.constexpr, OUT_LAST: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_ncq = da_ncq f(logits_nc) + a'(x_ncq) sum over d of w_dc g_ndp; dw_part_sdc = sum over the split's n, p of g_ndp a(x_ncq).

    g [N, D, P], p the output's position of q where there is one; dw_part [SPLITS, D, C], which the caller adds. A program owns BLOCK_C channels and
    one of SPLITS ranges of all images' positions, BLOCK_P of them at a time, and reads x once for both.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    if STRIDE == 1:
        P = HW
    blocks_p = tl.cdiv(HW, BLOCK_P)
    block = tl.program_id(0) % tl.cdiv(C, BLOCK_C)
    split = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    steps = tl.cdiv(N * blocks_p, SPLITS)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    w = load_weight(w_ptr, k, c, D, C)
    dw = tl.zeros([BLOCK_D, BLOCK_C], ACC)
    for step in range(split * steps, tl.minimum(split * steps + steps, N * blocks_p)):
        n = step // blocks_p
        q = step % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
        p = q
        on = q < HW
        if STRIDE > 1:
            p = q // W // STRIDE * OUT_W + q % W // STRIDE
            on = on & (q // W % STRIDE == 0) & (q % W % STRIDE == 0)
        mask = (c[:, None] < C) & (q[None, :] < HW)
        image = image_offset(n, C, HW)
        offsets = tile_offsets(c[:, None], q[None, :], C, HW, CHANNELS_LAST, LARGE)
        x = load_tile(x_ptr + image, offsets, mask, ACC)
        g = load_cotangent(g_ptr, n, d, p, on, D, P, OUT_LAST, LARGE)
        if STORE_DW:
            u = activation(x, BEFORE)
            if STRIDE > 1:
                u = tl.where(on[None, :], u, 0.0)  # which may be infinite where the convolution does not look
            dw = add_product(dw, g, u.to(g.dtype), INTERPRETED, ACC)
        if STORE_DX:
            dx = tl.zeros([BLOCK_C, BLOCK_P], ACC)
            for k0 in tl.static_range(0, BLOCK_D, BLOCK_K):
                if BLOCK_K < BLOCK_D:
                    w = load_weight(w_ptr, k0 + k, c, D, C)
                    g = load_cotangent(g_ptr, n, k0 + k, p, on, D, P, OUT_LAST, LARGE)
                dx = add_product(dx, tl.trans(w), tl.trans(g), INTERPRETED, ACC)
            if STRIDE > 1:
                dx = tl.where(on[None, :], dx, 0.0)  # nor does an infinite weight reach there
            dx = chain(dx, activation_grad(x, BEFORE), BEFORE)
            if HAS_DA:
                s, _ = load_gates(logits_ptr, logits_ptr, n, c, c, C, HW, GATE, GATE, True, False, ACC)
                dx += load_tile(da_ptr + image, offsets, mask, ACC) * s[:, None]
            tl.store(dx_ptr + image + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if STORE_DW:
        part = split.to(tl.int64) * D * C + d[:, None] * C + c[None, :]
        tl.store(dw_part_ptr + part, dw, mask=(d[:, None] < D) & (c[None, :] < C))
