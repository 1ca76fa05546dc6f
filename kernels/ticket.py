"""Two passes over the map in one launch, a channel squeeze and what its excite leads to, so that the second finds the map in the cache that the first
one read it into.

Programs draw tickets. These are dealt in waves, one for each image: the squeeze of image n, then the second pass over image n - lag. A program of
the second pass waits until its image's logits are there. It waits only for programs with smaller tickets, which have all started, so the launch
completes however few of its programs run at once, in whatever order the device starts them. What lies between the two reads of an image is lag
images.

What was stored before an arrival is visible after the wait, as in group.py.
"""

import triton
import triton.language as tl

from .excite import arrive, excite_image_bwd, wait
from .gate import combine_logits_grad, load_gates, output_cotangent, pools_cotangent
from .pixel import gate_pixels
from .pointwise import activation, activation_grad, chain, image_offset, load_tile, normalised, own_range, store_tile, tile_offsets
from .squeeze import squeeze_channels, squeeze_positions


@triton.jit
def draw_ticket(counter_ptr, lag, squeezes, others):
    """(n, block, whether it is of the first pass); there is no such image where n is too large in the first pass, or negative in the second.
    squeezes, others: programs of an image in either pass."""
    ticket = tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")
    if ticket == tl.num_programs(0) - 1:  # the last to be drawn
        tl.store(counter_ptr, 0)
    block = ticket % (squeezes + others)
    first = block < squeezes
    return ticket // (squeezes + others) - tl.where(first, 0, lag), tl.where(first, block, block - squeezes), first


@triton.jit
def squeeze_turn(
    n, block, blocks, others, N, x_ptr, z_ptr, aux_ptr, part_ptr, part_aux_ptr, counter_ptr, hidden_ptr, logits_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr,
    norm, C_V, HW_V, R, K: tl.constexpr, ROWS: tl.constexpr, VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr, BEFORE: tl.constexpr,
    AVG_AT: tl.constexpr, MAX_AT: tl.constexpr, MIX_AT: tl.constexpr, LP_AT: tl.constexpr, LSE_AT: tl.constexpr, EVEN: tl.constexpr,
    KIND: tl.constexpr, HIDDEN: tl.constexpr, TAPS: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    EXCITE_C: tl.constexpr, EXCITE_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The first pass of a forward launch: one of `blocks` programs of image n, the last of which tells the `others` of the second pass."""
    if n < N:
        last = squeeze_channels(
            n * blocks + block, x_ptr, x_ptr, x_ptr, z_ptr, aux_ptr, part_ptr, part_aux_ptr, counter_ptr, hidden_ptr, logits_ptr, w1_ptr, b1_ptr,
            w2_ptr, b2_ptr, norm, C_V, HW_V, R, K, ROWS, VEC_C, VEC_P, SPLITS, False, BEFORE, AVG_AT, MAX_AT, MIX_AT, LP_AT, LSE_AT, EVEN, KIND,
            HIDDEN, TAPS, HAS_B1, HAS_B2, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, EXCITE_C, EXCITE_R, ACC,
        )  # fmt: skip
        if last:
            arrive(counter_ptr + N + n, others + 1)  # with the logits stored


@triton.jit
def gate_range(
    n, block, x_ptr, logits_ptr, residual_ptr, y_ptr, norm, C, HW, SPLITS: tl.constexpr, BEFORE: tl.constexpr, GATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The second pass forward: y in one range of positions of image n; nobody reads x there again."""
    zero, c, split, start, stop = own_range(block, C, HW, SPLITS, BLOCK_C, BLOCK_P)
    s, _ = load_gates(logits_ptr, logits_ptr, n, c, c, C, HW, GATE, GATE, True, False, ACC)
    image = image_offset(n, C, HW)
    for p0 in range(start, stop, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)[None, :]
        mask = (c[:, None] < C) & (p < HW)
        offsets = tile_offsets(c[:, None], p, C, HW, CHANNELS_LAST, LARGE)
        x = load_tile(x_ptr + image, offsets, mask, ACC, True)
        y = activation(normalised(x, norm, c, c < C, ACC)[0], BEFORE) * s[:, None]
        if HAS_RESIDUAL:
            y += load_tile(residual_ptr + image, offsets, mask, ACC, True)
        store_tile(y_ptr + image, activation(y, ACTIVATION), offsets, mask, True)


@triton.jit
def logits_grad_range(
    n, block, g_ptr, x_ptr, residual_ptr, da_ptr, logits_ptr, dlogits_ptr, part_ptr, counter_ptr, norm, C, HW, SPLITS: tl.constexpr,
    BEFORE: tl.constexpr, GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STORE_DA: tl.constexpr, NEED_X: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, COMBINE_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The first pass backward: da and the sums of u da in one range of positions of image n. True in the last program of the image, which has added
    the ranges to the gradient of the logits."""
    zero, c, split, start, stop = own_range(block, C, HW, SPLITS, BLOCK_C, BLOCK_P)
    image = image_offset(n, C, HW)
    s, _ = load_gates(logits_ptr, logits_ptr, n, c, c, C, HW, GATE, GATE, True, False, ACC)
    total = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for p0 in range(start, stop, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)[None, :]
        mask = (c[:, None] < C) & (p < HW)
        offsets = tile_offsets(c[:, None], p, C, HW, CHANNELS_LAST, LARGE)
        x = load_tile(x_ptr + image, offsets, mask, ACC, not NEED_X)
        u = activation(normalised(x, norm, c, c < C, ACC)[0], BEFORE)
        da = output_cotangent(
            g_ptr, residual_ptr, da_ptr, image, offsets, mask, u, s[:, None], HAS_RESIDUAL, ACTIVATION, STORE_DA, ACC, None, STORE_DA
        )  # fmt: skip
        total += tl.where(mask, u * da, 0.0)
    tl.store(part_ptr + (n.to(tl.int64) * SPLITS + split) * C + c, tl.sum(total, 1), mask=c < C)
    last = arrive(counter_ptr, tl.cdiv(C, BLOCK_C) * SPLITS)
    if last:
        combine_logits_grad(dlogits_ptr, logits_ptr, part_ptr, n, SPLITS, C, GATE, COMBINE_C, ACC)
    return last


@triton.jit
def input_grad_range(
    n, block, g_ptr, x_ptr, residual_ptr, da_ptr, dx_ptr, logits_ptr, z_ptr, dz_ptr, aux_ptr, norm, C, HW, K: tl.constexpr, ROWS: tl.constexpr,
    SPLITS: tl.constexpr, BEFORE: tl.constexpr,
    AVG_AT: tl.constexpr, MAX_AT: tl.constexpr, MIX_AT: tl.constexpr, LP_AT: tl.constexpr, LSE_AT: tl.constexpr, EVEN: tl.constexpr,
    GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    STORE_DA: tl.constexpr, NEED_X: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The second pass backward: dx in one range of positions of image n; nobody reads there again."""
    zero, c, split, start, stop = own_range(block, C, HW, SPLITS, BLOCK_C, BLOCK_P)
    image = image_offset(n, C, HW)
    s, _ = load_gates(logits_ptr, logits_ptr, n, c, c, C, HW, GATE, GATE, True, False, ACC)
    for p0 in range(start, stop, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (c[:, None] < C) & (p[None, :] < HW)
        offsets = tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
        x = tl.zeros([BLOCK_C, BLOCK_P], ACC)
        if NEED_X:
            x = load_tile(x_ptr + image, offsets, mask, ACC, True)
        x, scale = normalised(x, norm, c, c < C, ACC)
        u = activation(x, BEFORE)
        if STORE_DA:
            da = load_tile(da_ptr + image, offsets, mask, ACC, True)
        else:
            da = output_cotangent(
                g_ptr, residual_ptr, g_ptr, image, offsets, mask, u, s[:, None], HAS_RESIDUAL, ACTIVATION, False, ACC, None, True
            )  # fmt: skip
        dx = da * s[:, None]
        dx += pools_cotangent(z_ptr, dz_ptr, aux_ptr, n, c, p, u, C, HW, K, ROWS, AVG_AT, MAX_AT, MIX_AT, LP_AT, LSE_AT, EVEN, ACC)
        dx = chain(dx, activation_grad(x, BEFORE), BEFORE) * scale
        store_tile(dx_ptr + image, dx, offsets, mask, True)


@triton.jit
def channel_gate_ticket_fwd_kernel(
    x_ptr, z_ptr, aux_ptr, part_ptr, part_aux_ptr, counter_ptr, hidden_ptr, logits_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, bn_weight_ptr,
    bn_bias_ptr, bn_mean_ptr, bn_var_ptr, residual_ptr, y_ptr, N, lag, C_V, HW_V, R, eps, K: tl.constexpr, ROWS: tl.constexpr,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr, BEFORE: tl.constexpr,
    AVG_AT: tl.constexpr, MAX_AT: tl.constexpr, MIX_AT: tl.constexpr, LP_AT: tl.constexpr, LSE_AT: tl.constexpr, EVEN: tl.constexpr,
    KIND: tl.constexpr, HIDDEN: tl.constexpr, TAPS: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr,
    GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    EXCITE_C: tl.constexpr, EXCITE_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """logits_nc = excite(z_n), z_nkc = pool_k over p of u_ncp; y_ncp = a(u_ncp f(logits_nc) + residual_ncp), u = b(norm(x)), b of BEFORE.

    Tensors as in channel_squeeze_fwd_kernel and gate_fwd_kernel; counter [2 N + 1]: arrivals of the squeeze, of the gate, and tickets. In either pass
    a program owns BLOCK_C channels and one of SPLITS ranges of positions of one image.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    blocks = tl.cdiv(C, BLOCK_C) * SPLITS
    n, block, first = draw_ticket(counter_ptr + 2 * N, lag, blocks, blocks)
    if first:
        squeeze_turn(
            n, block, blocks, blocks, N, x_ptr, z_ptr, aux_ptr, part_ptr, part_aux_ptr, counter_ptr, hidden_ptr, logits_ptr, w1_ptr, b1_ptr, w2_ptr,
            b2_ptr, (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps), C_V, HW_V, R, K, ROWS, VEC_C, VEC_P, SPLITS, BEFORE, AVG_AT, MAX_AT,
            MIX_AT, LP_AT, LSE_AT, EVEN, KIND, HIDDEN, TAPS, HAS_B1, HAS_B2, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, EXCITE_C, EXCITE_R, ACC,
        )  # fmt: skip
    elif n >= 0:
        wait(counter_ptr + N + n)
        arrive(counter_ptr + N + n, blocks + 1)  # to leave the counter at zero
        gate_range(
            n, block, x_ptr, logits_ptr, residual_ptr, y_ptr, (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps), C, HW, SPLITS, BEFORE, GATE,
            HAS_RESIDUAL, ACTIVATION, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC,
        )  # fmt: skip


@triton.jit
def channel_gate_ticket_bwd_kernel(
    g_ptr, x_ptr, residual_ptr, da_ptr, dx_ptr, logits_ptr, z_ptr, aux_ptr, hidden_ptr, w1_ptr, w2_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr,
    bn_var_ptr, part_ptr, counter_ptr, dlogits_ptr, dhidden_ptr, dz_ptr, N, lag, C_V, HW_V, R, eps, K: tl.constexpr, ROWS: tl.constexpr,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr, BEFORE: tl.constexpr,
    AVG_AT: tl.constexpr, MAX_AT: tl.constexpr, MIX_AT: tl.constexpr, LP_AT: tl.constexpr, LSE_AT: tl.constexpr, EVEN: tl.constexpr,
    KIND: tl.constexpr, HIDDEN: tl.constexpr, TAPS: tl.constexpr, GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    STORE_DA: tl.constexpr, NEED_X: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    EXCITE_C: tl.constexpr, EXCITE_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dlogits_nc = f'(logits_nc) sum over p of u_ncp da_ncp, u = b(norm(x)), from which dz through the excite; dx_ncp = norm'_c b'(norm(x_ncp))
    (da_ncp f(logits_nc) + sum over k of dz_nkc dpool_k/du_ncp), da_ncp = g_ncp a'(u_ncp f(logits_nc) + residual_ncp), stored with STORE_DA and then
    read instead of g.

    part [N, SPLITS, C]; dhidden [N, K, R]; dz [N, K, C]; counter and programs as forward. The second pass reads x with NEED_X alone.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    norm = (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps)
    blocks = tl.cdiv(C, BLOCK_C) * SPLITS
    n, block, first = draw_ticket(counter_ptr + 2 * N, lag, blocks, blocks)
    if first:
        if n < N:
            last = logits_grad_range(
                n, block, g_ptr, x_ptr, residual_ptr, da_ptr, logits_ptr, dlogits_ptr, part_ptr, counter_ptr + n, norm, C, HW, SPLITS, BEFORE, GATE,
                HAS_RESIDUAL, ACTIVATION, STORE_DA, NEED_X, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, EXCITE_C, ACC,
            )  # fmt: skip
            if last:
                tl.debug_barrier()  # threads read what other threads of this program stored
                hidden = n.to(tl.int64) * K * R
                excite_image_bwd(
                    dlogits_ptr + n.to(tl.int64) * C, hidden_ptr + hidden, dhidden_ptr + hidden, dz_ptr + n.to(tl.int64) * K * C, w1_ptr, w2_ptr,
                    C, R, C, K, TAPS, KIND, HIDDEN, EXCITE_C, EXCITE_R, ACC,
                )  # fmt: skip
                arrive(counter_ptr + N + n, blocks + 1)  # with dz stored
    elif n >= 0:
        wait(counter_ptr + N + n)
        arrive(counter_ptr + N + n, blocks + 1)  # to leave the counter at zero
        input_grad_range(
            n, block, g_ptr, x_ptr, residual_ptr, da_ptr, dx_ptr, logits_ptr, z_ptr, dz_ptr, aux_ptr, norm, C, HW, K, ROWS, SPLITS, BEFORE, AVG_AT,
            MAX_AT, MIX_AT, LP_AT, LSE_AT, EVEN, GATE, HAS_RESIDUAL, ACTIVATION, STORE_DA, NEED_X, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC,
        )  # fmt: skip


@triton.jit
def concurrent_gate_ticket_fwd_kernel(
    x_ptr, z_ptr, aux_ptr, part_ptr, part_aux_ptr, counter_ptr, hidden_ptr, logits_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, bn_weight_ptr,
    bn_bias_ptr, bn_mean_ptr, bn_var_ptr, w_ptr, b_ptr, residual_ptr, y_ptr, q_ptr, N, lag, C_V, HW_V, R, eps, K: tl.constexpr, ROWS: tl.constexpr,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr, BEFORE: tl.constexpr,
    AVG_AT: tl.constexpr, MAX_AT: tl.constexpr, MIX_AT: tl.constexpr, LP_AT: tl.constexpr, LSE_AT: tl.constexpr, EVEN: tl.constexpr,
    KIND: tl.constexpr, HIDDEN: tl.constexpr, TAPS: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr,
    GATE: tl.constexpr, SPATIAL: tl.constexpr, COMBINE: tl.constexpr, HAS_B: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, OTHER_C: tl.constexpr, OTHER_P: tl.constexpr,
    EXCITE_C: tl.constexpr, EXCITE_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """logits_nc = excite(z_n), z_nc = mean over p of x_ncp; q_np = sum over c of w_c x_ncp + b;
    y_ncp = a(x_ncp combine(f(logits_nc), h(q_np)) + residual_ncp).

    Tensors as in channel_squeeze_fwd_kernel and pixel_gate_fwd_kernel; counter and the first pass as in channel_gate_ticket_fwd_kernel. In the second
    a program owns OTHER_P positions of one image and all their channels, OTHER_C >= C. Nothing stands before the map.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    blocks = tl.cdiv(C, BLOCK_C) * SPLITS
    others = tl.cdiv(HW, OTHER_P)
    n, block, first = draw_ticket(counter_ptr + 2 * N, lag, blocks, others)
    if first:
        squeeze_turn(
            n, block, blocks, others, N, x_ptr, z_ptr, aux_ptr, part_ptr, part_aux_ptr, counter_ptr, hidden_ptr, logits_ptr, w1_ptr, b1_ptr, w2_ptr,
            b2_ptr, (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps), C_V, HW_V, R, K, ROWS, VEC_C, VEC_P, SPLITS, BEFORE, AVG_AT, MAX_AT,
            MIX_AT, LP_AT, LSE_AT, EVEN, KIND, HIDDEN, TAPS, HAS_B1, HAS_B2, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, EXCITE_C, EXCITE_R, ACC,
        )  # fmt: skip
    elif n >= 0:
        wait(counter_ptr + N + n)
        arrive(counter_ptr + N + n, others + 1)  # to leave the counter at zero
        gate_pixels(
            n, block, x_ptr, w_ptr, b_ptr, logits_ptr, residual_ptr, y_ptr, q_ptr, C, HW, GATE, SPATIAL, True, COMBINE, HAS_B, HAS_RESIDUAL,
            ACTIVATION, True, CHANNELS_LAST, LARGE, OTHER_C, OTHER_P, ACC, True,
        )  # fmt: skip


@triton.jit
def both_squeezes_ticket_fwd_kernel(
    x_ptr, z_ptr, aux_ptr, part_ptr, part_aux_ptr, counter_ptr, hidden_ptr, logits_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, bn_weight_ptr,
    bn_bias_ptr, bn_mean_ptr, bn_var_ptr, stats_ptr, saux_ptr, N, lag, C_V, HW_V, R, eps, K: tl.constexpr, ROWS: tl.constexpr,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr, BEFORE: tl.constexpr,
    AVG_AT: tl.constexpr, MAX_AT: tl.constexpr, MIX_AT: tl.constexpr, LP_AT: tl.constexpr, LSE_AT: tl.constexpr, EVEN: tl.constexpr,
    KIND: tl.constexpr, HIDDEN: tl.constexpr, TAPS: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr,
    GATE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, OTHER_C: tl.constexpr, OTHER_P: tl.constexpr,
    EXCITE_C: tl.constexpr, EXCITE_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """logits_nc = excite(z_n), z_nkc = pool_k over p of x_ncp; stats_n0p, stats_n1p = mean and maximum over c of x_ncp f(logits_nc).

    Tensors as in channel_squeeze_fwd_kernel and spatial_squeeze_fwd_kernel; counter and the first pass as in channel_gate_ticket_fwd_kernel. In the
    second a program owns OTHER_P positions of one image and all their channels, OTHER_C at a time. Nothing stands before the map.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    blocks = tl.cdiv(C, BLOCK_C) * SPLITS
    others = tl.cdiv(HW, OTHER_P)
    n, block, first = draw_ticket(counter_ptr + 2 * N, lag, blocks, others)
    if first:
        squeeze_turn(
            n, block, blocks, others, N, x_ptr, z_ptr, aux_ptr, part_ptr, part_aux_ptr, counter_ptr, hidden_ptr, logits_ptr, w1_ptr, b1_ptr, w2_ptr,
            b2_ptr, (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps), C_V, HW_V, R, K, ROWS, VEC_C, VEC_P, SPLITS, BEFORE, AVG_AT, MAX_AT,
            MIX_AT, LP_AT, LSE_AT, EVEN, KIND, HIDDEN, TAPS, HAS_B1, HAS_B2, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, EXCITE_C, EXCITE_R, ACC,
        )  # fmt: skip
    elif n >= 0:
        wait(counter_ptr + N + n)
        arrive(counter_ptr + N + n, others + 1)  # to leave the counter at zero
        squeeze_positions(
            n, block, x_ptr, logits_ptr, stats_ptr, saux_ptr, C, HW, GATE, True, EVEN, CHANNELS_LAST, LARGE, OTHER_C, OTHER_P, ACC
        )  # fmt: skip
