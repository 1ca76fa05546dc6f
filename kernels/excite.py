"""The small network between squeeze and gate, and its gradients.

Small weights: `excite_image`, run inside the squeeze's launch by the last program of an image to arrive. Large weights, and every gradient:
`linear_kernel`, batched over images, so that weights are read once per block of images.
"""

import triton
import triton.language as tl

from .pointwise import activation, activation_grad, chain
from .product import add_product


@triton.jit
def arrive(counter_ptr, total):
    """True in the program that is the last of `total` to arrive. What the others stored before is then visible; the counter is zero again."""
    tl.debug_barrier()  # every thread's stores come before the one thread's atomic
    ticket = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    last = ticket == total - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def wait(counter_ptr):
    """Returns once another program has arrived at the counter; what that one stored before is then visible."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") == 0:
        pass


@triton.jit
def excite_image(
    z_ptr, hidden_ptr, logits_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, C, R, J,
    K: tl.constexpr, TAPS: tl.constexpr, KIND: tl.constexpr, HIDDEN: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """logits_c = sum_k (w2 a(w1 z_k + b1) + b2)_c for one image; fc: sum_k (w2 z_k + b2)_c; conv: sum_j w2_j z_(c + j - TAPS // 2) + b2.

    z [K, C], hidden [K, R] (before the activation), logits [J], w1 [R, C], w2 [J, R], [C, C] or [TAPS]; J is C but for mlp. One program does all of
    it; two tiles of a weight are on their way while one is multiplied.
    """
    if KIND == "mlp":
        for r0 in range(0, R, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            for k in tl.static_range(K):
                h = tl.zeros([BLOCK_R], ACC)
                for c0 in tl.range(0, C, BLOCK_C, num_stages=3):
                    c = c0 + tl.arange(0, BLOCK_C)
                    z = tl.load(z_ptr + k * C + c, mask=c < C, other=0.0, cache_modifier=".cg")
                    both = (r[:, None] < R) & (c[None, :] < C)
                    w = tl.load(w1_ptr + r[:, None] * C + c[None, :], mask=both, other=0.0).to(ACC)
                    h += tl.sum(w * z[None, :], 1)
                if HAS_B1:
                    h += tl.load(b1_ptr + r, mask=r < R, other=0.0).to(ACC)
                tl.store(hidden_ptr + k * R + r, h, mask=r < R)
        tl.debug_barrier()  # threads read what other threads of this program stored
    for c0 in range(0, J, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        t = tl.zeros([BLOCK_C], ACC)
        if KIND == "mlp":
            for r0 in tl.range(0, R, BLOCK_R, num_stages=3):
                r = r0 + tl.arange(0, BLOCK_R)
                h = tl.zeros([BLOCK_R], ACC)
                for k in tl.static_range(K):
                    h += activation(tl.load(hidden_ptr + k * R + r, mask=r < R, other=0.0, cache_modifier=".cg"), HIDDEN)
                both = (c[:, None] < J) & (r[None, :] < R)
                w = tl.load(w2_ptr + c[:, None] * R + r[None, :], mask=both, other=0.0).to(ACC)
                t += tl.sum(w * h[None, :], 1)
        elif KIND == "fc":
            for i0 in tl.range(0, C, BLOCK_R, num_stages=3):
                i = i0 + tl.arange(0, BLOCK_R)
                z = tl.zeros([BLOCK_R], ACC)
                for k in tl.static_range(K):
                    z += tl.load(z_ptr + k * C + i, mask=i < C, other=0.0, cache_modifier=".cg")
                both = (c[:, None] < J) & (i[None, :] < C)
                w = tl.load(w2_ptr + c[:, None] * C + i[None, :], mask=both, other=0.0).to(ACC)
                t += tl.sum(w * z[None, :], 1)
        else:
            for j in range(TAPS):
                i = c + j - TAPS // 2
                if KIND == "circular":
                    i = (i + TAPS * C) % C
                w = tl.load(w2_ptr + j).to(ACC)
                t += w * tl.load(z_ptr + i, mask=(i >= 0) & (i < C), other=0.0, cache_modifier=".cg")
        if HAS_B2:
            t += K * tl.load(b2_ptr + c * (KIND == "mlp" or KIND == "fc"), mask=c < J, other=0.0).to(ACC)
        tl.store(logits_ptr + c, t, mask=c < J)


@triton.jit
def excite_image_bwd(
    dlogits_ptr, hidden_ptr, dhidden_ptr, dz_ptr, w1_ptr, w2_ptr, C, R, J,
    K: tl.constexpr, TAPS: tl.constexpr, KIND: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dhidden_kr = a'(hidden_kr) sum over c of w2_cr dlogits_c, dz_kc = sum over r of w1_rc dhidden_kr for one image; fc: dz_kc = sum over j of
    w2_jc dlogits_j; conv: dz_c = sum over j of w2_j dlogits_(c - j + TAPS // 2).

    Tensors as in excite_image. One program does all of it.
    """
    if KIND == "mlp":
        for r0 in range(0, R, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            back = tl.zeros([BLOCK_R], ACC)
            for c0 in tl.range(0, J, BLOCK_C, num_stages=3):
                c = c0 + tl.arange(0, BLOCK_C)
                dt = tl.load(dlogits_ptr + c, mask=c < J, other=0.0, cache_modifier=".cg")
                both = (c[:, None] < J) & (r[None, :] < R)
                w = tl.load(w2_ptr + c[:, None] * R + r[None, :], mask=both, other=0.0).to(ACC)
                back += tl.sum(w * dt[:, None], 0)
            for k in tl.static_range(K):
                h = tl.load(hidden_ptr + k * R + r, mask=r < R, other=0.0)
                tl.store(dhidden_ptr + k * R + r, chain(back, activation_grad(h, HIDDEN), HIDDEN), mask=r < R)
        tl.debug_barrier()  # threads read what other threads of this program stored
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        if KIND == "mlp":
            for k in tl.static_range(K):
                dz = tl.zeros([BLOCK_C], ACC)
                for r0 in tl.range(0, R, BLOCK_R, num_stages=3):
                    r = r0 + tl.arange(0, BLOCK_R)
                    dh = tl.load(dhidden_ptr + k * R + r, mask=r < R, other=0.0, cache_modifier=".cg")
                    both = (r[:, None] < R) & (c[None, :] < C)
                    w = tl.load(w1_ptr + r[:, None] * C + c[None, :], mask=both, other=0.0).to(ACC)
                    dz += tl.sum(w * dh[:, None], 0)
                tl.store(dz_ptr + k * C + c, dz, mask=c < C)
        else:
            dz = tl.zeros([BLOCK_C], ACC)
            if KIND == "fc":
                for j0 in tl.range(0, C, BLOCK_R, num_stages=3):
                    j = j0 + tl.arange(0, BLOCK_R)
                    dt = tl.load(dlogits_ptr + j, mask=j < C, other=0.0, cache_modifier=".cg")
                    both = (j[:, None] < C) & (c[None, :] < C)
                    w = tl.load(w2_ptr + j[:, None] * C + c[None, :], mask=both, other=0.0).to(ACC)
                    dz += tl.sum(w * dt[:, None], 0)
            else:
                for j in range(TAPS):
                    i = c - j + TAPS // 2
                    if KIND == "circular":
                        i = (i + TAPS * C) % C
                    w = tl.load(w2_ptr + j).to(ACC)
                    dz += w * tl.load(dlogits_ptr + i, mask=(i >= 0) & (i < C), other=0.0, cache_modifier=".cg")
            for k in tl.static_range(K):
                tl.store(dz_ptr + k * C + c, dz, mask=c < C)


@triton.jit
def linear_tile(
    program, a_ptr, b_ptr, bias_ptr, h_ptr, out_ptr, sum_ptr, part_ptr, counter_ptr, M, J, K, a_m, a_k, a_q, b_j, b_k, out_m, out_j, bias_scale,
    Q: tl.constexpr, A_DIV: tl.constexpr, A_ACTIVATION: tl.constexpr, OUT_GRAD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SUM: tl.constexpr,
    UNITS: tl.constexpr, INTERPRETED: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What linear_kernel's program of that number does."""
    blocks_j = tl.cdiv(J, BLOCK_J)
    tile = program // SPLITS
    m = tile // blocks_j * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile % blocks_j * BLOCK_J + tl.arange(0, BLOCK_J)
    acc = tl.zeros([BLOCK_M, BLOCK_J], ACC)
    total = tl.zeros([BLOCK_J], ACC)
    per_split = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    start = program % SPLITS * per_split
    # the loads of two more steps are on their way while one is multiplied
    for k0 in tl.range(start, tl.minimum(start + per_split, K), BLOCK_K, num_stages=3):
        k = k0 + tl.arange(0, BLOCK_K)
        inside_a = (m[:, None] < M) & (k[None, :] < K)
        offsets = (m[:, None] // A_DIV).to(tl.int64) * a_m + k[None, :].to(tl.int64) * a_k
        a = tl.zeros([BLOCK_M, BLOCK_K], ACC)
        for q in tl.static_range(Q):
            a += activation(tl.load(a_ptr + offsets + q * a_q, mask=inside_a, other=0.0).to(ACC), A_ACTIVATION)
        inside_b = (j[:, None] < J) & (k[None, :] < K)
        b = tl.load(b_ptr + j[:, None].to(tl.int64) * b_j + k[None, :].to(tl.int64) * b_k, mask=inside_b, other=0.0)
        if HAS_SUM:
            total += tl.sum(b.to(ACC), 1)
        if UNITS:
            acc = add_product(acc, a, b if b.dtype == tl.bfloat16 else b.to(ACC), INTERPRETED, ACC)
        else:
            acc += tl.sum(a[:, None, :] * b.to(ACC)[None, :, :], 2)
    last = True
    if SPLITS > 1:
        # part [tiles, SPLITS, BLOCK_M + 1, BLOCK_J]: the product, and the sum
        rows = tl.arange(0, BLOCK_M)[:, None] * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
        sums = BLOCK_M * BLOCK_J + tl.arange(0, BLOCK_J)
        slot = part_ptr + program.to(tl.int64) * ((BLOCK_M + 1) * BLOCK_J)
        tl.store(slot + rows, acc)
        if HAS_SUM:
            tl.store(slot + sums, total)
        last = arrive(counter_ptr + tile, SPLITS)
        if last:
            acc = tl.zeros([BLOCK_M, BLOCK_J], ACC)
            total = tl.zeros([BLOCK_J], ACC)
            for split in range(SPLITS):
                slot = part_ptr + (tile.to(tl.int64) * SPLITS + split) * ((BLOCK_M + 1) * BLOCK_J)
                acc += tl.load(slot + rows, cache_modifier=".cg")
                if HAS_SUM:
                    total += tl.load(slot + sums, cache_modifier=".cg")
    if last:
        if HAS_BIAS:
            acc += bias_scale * tl.load(bias_ptr + j, mask=j < J, other=0.0).to(ACC)[None, :]
        inside = (m[:, None] < M) & (j[None, :] < J)
        if OUT_GRAD != "none":
            h = tl.load(h_ptr + m[:, None] * J + j[None, :], mask=inside, other=0.0)
            acc = chain(acc, activation_grad(h, OUT_GRAD), OUT_GRAD)
        offsets = m[:, None].to(tl.int64) * out_m + j[None, :] * out_j
        tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=inside)
        if HAS_SUM:
            if tile < blocks_j:
                tl.store(sum_ptr + j, (bias_scale * total).to(sum_ptr.dtype.element_ty), mask=j < J)


@triton.jit
def linear_kernel(
    a_ptr, b_ptr, bias_ptr, h_ptr, out_ptr, sum_ptr, part_ptr, counter_ptr, M, J, K, a_m, a_k, a_q, b_j, b_k, out_m, out_j, bias_scale,
    Q: tl.constexpr, A_DIV: tl.constexpr, A_ACTIVATION: tl.constexpr, OUT_GRAD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SUM: tl.constexpr,
    UNITS: tl.constexpr, INTERPRETED: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[m, j] = a'(h[m, j]) * (sum_k (sum_q act(a[m // A_DIV, k, q])) b[j, k] + bias_scale bias[j]); sum[j] = bias_scale sum_k b[j, k].

    Both layers of the excite and all their gradients are this product with other strides, on matrix units with UNITS. A program owns
    out[BLOCK_M, BLOCK_J] and one of SPLITS ranges of k; the last one of its tile to arrive adds the ranges in order, so the result has the same bits
    in every run.
    """
    linear_tile(
        tl.program_id(0), a_ptr, b_ptr, bias_ptr, h_ptr, out_ptr, sum_ptr, part_ptr, counter_ptr, M, J, K, a_m, a_k, a_q, b_j, b_k, out_m, out_j,
        bias_scale, Q, A_DIV, A_ACTIVATION, OUT_GRAD, HAS_BIAS, HAS_SUM, UNITS, INTERPRETED, SPLITS, BLOCK_M, BLOCK_J, BLOCK_K, ACC,
    )  # fmt: skip


@triton.jit
def mlp_weights_bwd_kernel(
    z_ptr, hidden_ptr, dhidden_ptr, dlogits_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, part_ptr, counter_ptr, N, C, R, z_k,
    K: tl.constexpr, HIDDEN: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr, UNITS: tl.constexpr, INTERPRETED: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dw2_cr = sum over n of dlogits_nc sum over k of a(hidden_nkr), db2_c = K sum over n of dlogits_nc; dw1_rc = sum over n, k of dhidden_nkr z_nkc,
    db1_r = sum over n, k of dhidden_nkr.

    z_k: elements between the rows (n, k) of z. Programs as linear_kernel's: of dw2 [BLOCK_J, BLOCK_M], and then as many of dw1 [BLOCK_M, BLOCK_J].
    """
    tiles = tl.cdiv(R, BLOCK_M) * tl.cdiv(C, BLOCK_J)
    program = tl.program_id(0)
    if program < tiles * SPLITS:
        linear_tile(
            program, hidden_ptr, dlogits_ptr, None, None, dw2_ptr, db2_ptr, part_ptr, counter_ptr, R, C, N, 1, K * R, R, 1, C, 1, R, K,
            K, 1, HIDDEN, "none", False, HAS_B2, UNITS, INTERPRETED, SPLITS, BLOCK_M, BLOCK_J, BLOCK_K, ACC,
        )  # fmt: skip
    else:
        if SPLITS > 1:
            part_ptr += tiles.to(tl.int64) * (SPLITS * (BLOCK_M + 1) * BLOCK_J)
            counter_ptr += tiles
        linear_tile(
            program - tiles * SPLITS, z_ptr, dhidden_ptr, None, None, dw1_ptr, db1_ptr, part_ptr, counter_ptr, C, R, N * K, 1, z_k, 0, 1, R,
            1, C, 1, 1, 1, "none", "none", False, HAS_B1, UNITS, INTERPRETED, SPLITS, BLOCK_J, BLOCK_M, BLOCK_K, ACC,
        )  # fmt: skip


@triton.jit
def channel_convolution_bwd_kernel(
    dlogits_ptr, z_ptr, w_ptr, dz_ptr, dw_ptr, db_ptr, part_ptr, counter_ptr, N, C, TAPS: tl.constexpr, CIRCULAR: tl.constexpr,
    HAS_DW: tl.constexpr, HAS_DB: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz_nc = sum over j of w_j dlogits_n(c - j + TAPS // 2); dw_j = sum over n, c of dlogits_nc z_n(c + j - TAPS // 2), db = sum over n, c of
    dlogits_nc.

    dlogits, z, dz [N, C]; part [programs, TAPS + 1]. A program owns BLOCK_N images x BLOCK_C channels; the last one to arrive adds what all of them
    know of dw and db, in order.
    """
    blocks_c = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // blocks_c * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    c = (tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (n < N) & (c < C)
    row = n.to(tl.int64) * C
    dt = tl.load(dlogits_ptr + row + c, mask=inside, other=0.0)
    dz = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    for j in range(TAPS):
        back = c - j + TAPS // 2
        ahead = c + j - TAPS // 2
        if CIRCULAR:
            back = (back + TAPS * C) % C
            ahead = (ahead + TAPS * C) % C
        shifted = tl.load(dlogits_ptr + row + back, mask=inside & (back >= 0) & (back < C), other=0.0)
        dz += tl.load(w_ptr + j).to(ACC) * shifted
        if HAS_DW:
            z = tl.load(z_ptr + row + ahead, mask=inside & (ahead >= 0) & (ahead < C), other=0.0)
            tl.store(part_ptr + tl.program_id(0).to(tl.int64) * (TAPS + 1) + j, tl.sum(dt * z))
    tl.store(dz_ptr + row + c, dz, mask=inside)
    if HAS_DW:
        tl.store(part_ptr + tl.program_id(0).to(tl.int64) * (TAPS + 1) + TAPS, tl.sum(dt))
        if arrive(counter_ptr, tl.num_programs(0)):
            add_taps(part_ptr, dw_ptr, db_ptr, tl.num_programs(0), TAPS, HAS_DB, BLOCK_T, ACC)


@triton.jit
def add_taps(part_ptr, dw_ptr, db_ptr, COUNT, TAPS: tl.constexpr, HAS_DB: tl.constexpr, BLOCK_T: tl.constexpr, ACC: tl.constexpr):
    """dw_j = sum over i of part_ij, db = sum over i of part_i(TAPS); part [COUNT, TAPS + 1], BLOCK_T > TAPS."""
    j = tl.arange(0, BLOCK_T)[None, :]
    total = tl.zeros([128, BLOCK_T], ACC)
    for i0 in range(0, COUNT, 128):
        i = i0 + tl.arange(0, 128)[:, None]
        total += tl.load(part_ptr + i.to(tl.int64) * (TAPS + 1) + j, mask=(i < COUNT) & (j <= TAPS), other=0.0, cache_modifier=".cg")
    found = tl.sum(total, 0, keep_dims=True)
    tl.store(dw_ptr + j, found.to(dw_ptr.dtype.element_ty), mask=j < TAPS)
    if HAS_DB:
        tl.store(db_ptr + j * 0, found.to(db_ptr.dtype.element_ty), mask=j == TAPS)
