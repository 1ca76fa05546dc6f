"""The passes of ticket.py where the excite's weights are large: between the two passes stand the excite's products, of a block of images at once, so
that a weight is read once per block and by many programs.

Tickets are dealt in waves, one for each block: the squeeze of block w, the first layer of block w - lag, the second of block w - 2 lag, the second
pass over block w - 3 lag; without a first layer each of the others is a lag earlier. With a lag of 0, for a batch that is one block, a wave does all
of it. A program waits until the stage before its own is complete for its block, so only for smaller tickets, as in ticket.py.
"""

import triton
import triton.language as tl

from .excite import arrive, linear_tile, wait
from .squeeze import squeeze_channels
from .ticket import gate_range, input_grad_range, logits_grad_range


@triton.jit
def own_stage(counter_ptr, N, images, lag, blocks, first, second, MLP: tl.constexpr):
    """(stage, block of images, number among the programs of both, whether there is such a block, its counters, its first image in int64, how many
    images it has, the program's own image in a pass). Stages 0 and 3 are the passes over the map, of `blocks` programs for each image, 1 and 2 the
    layers, of so many programs; without MLP there is no stage 1."""
    count = tl.cdiv(N, images)
    counters = counter_ptr + N
    passes = images * blocks
    ticket_ptr = counters + count * (6 + first + second)
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")
    if ticket == tl.num_programs(0) - 1:  # the last to be drawn
        tl.store(ticket_ptr, 0)
    turn = ticket % (2 * passes + first + second)
    stage = (turn >= passes).to(tl.int32) + (turn >= passes + first).to(tl.int32) + (turn >= passes + first + second).to(tl.int32)
    begin = tl.where(stage > 0, passes, 0) + tl.where(stage > 1, first, 0) + tl.where(stage > 2, second, 0)
    steps = stage if MLP else tl.maximum(stage - 1, 0)
    block = ticket // (2 * passes + first + second) - steps * lag
    start = block * images
    program = turn - begin
    state = counters + block * (6 + first + second)
    present = tl.minimum(images, N - start)
    return stage, block, program, (block >= 0) & (block < count), state, start.to(tl.int64), present, start + program // blocks


@triton.jit
def hand_on(counter_ptr, producers, consumers):
    """After a program's share of a stage, of which there are `producers`; with the last of them the programs of the next may go on."""
    if arrive(counter_ptr, producers):
        arrive(counter_ptr + 1, consumers + 1)


@triton.jit
def take_up(counter_ptr, consumers):
    """Before a program's share of a stage, of which there are `consumers`: what the stage before stored is visible after it."""
    wait(counter_ptr + 1)
    arrive(counter_ptr + 1, consumers + 1)  # to leave the counter at zero


@triton.jit
def layer(
    program, a_ptr, b_ptr, bias_ptr, h_ptr, out_ptr, part_ptr, counter_ptr, M, J, K, a_m, a_q, b_j, b_k, Q: tl.constexpr, A_DIV: tl.constexpr,
    A_ACTIVATION: tl.constexpr, OUT_GRAD: tl.constexpr, HAS_BIAS: tl.constexpr, TILE: tl.constexpr, INTERPRETED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """linear_tile's out [M, J], a dense in k, of the tile (BLOCK_M, BLOCK_J, BLOCK_K, SPLITS, UNITS)."""
    linear_tile(
        program, a_ptr, b_ptr, bias_ptr, h_ptr, out_ptr, None, part_ptr, counter_ptr, M, J, K, a_m, 1, a_q, b_j, b_k, J, 1, Q, Q, A_DIV, A_ACTIVATION,
        OUT_GRAD, HAS_BIAS, False, TILE[4], INTERPRETED, TILE[3], TILE[0], TILE[1], TILE[2], ACC,
    )  # fmt: skip


@triton.jit
def channel_gate_stages_fwd_kernel(
    x_ptr, z_ptr, aux_ptr, part_ptr, part_aux_ptr, product_ptr, counter_ptr, hidden_ptr, logits_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, bn_weight_ptr,
    bn_bias_ptr, bn_mean_ptr, bn_var_ptr, residual_ptr, y_ptr, N, images, lag, first, second, slots, C_V, HW_V, R, eps, K: tl.constexpr,
    ROWS: tl.constexpr, VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr, BEFORE: tl.constexpr,
    AVG_AT: tl.constexpr, MAX_AT: tl.constexpr, MIX_AT: tl.constexpr, LP_AT: tl.constexpr, LSE_AT: tl.constexpr, EVEN: tl.constexpr,
    MLP: tl.constexpr, HIDDEN: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr,
    GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, INTERPRETED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """As channel_gate_ticket_fwd_kernel; hidden_nk = w1 z_nk + b1 and logits_nc = sum over k of (w2 a(hidden_nk) + b2)_c, or without MLP of
    (w2 z_nk + b2)_c.

    images: in a block. first, second: programs of a block's layers, of tiles FIRST and SECOND as in `layer`; product: their ranges of sums, `slots`
    of each block. counter: N of the squeeze, 6 + first + second of each block, and the tickets'.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    norm = (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps)
    blocks = tl.cdiv(C, BLOCK_C) * SPLITS
    stage, block, program, exists, state, start, present, n = own_stage(counter_ptr, N, images, lag, blocks, first, second, MLP)
    if exists:
        if product_ptr is not None:
            product_ptr += block.to(tl.int64) * slots
        if stage == 0:
            if n < N:
                squeeze_channels(
                    n * blocks + program % blocks, x_ptr, x_ptr, x_ptr, z_ptr, aux_ptr, part_ptr, part_aux_ptr, counter_ptr, hidden_ptr, logits_ptr,
                    w1_ptr, b1_ptr, w2_ptr, b2_ptr, norm, C_V, HW_V, R, K, ROWS, VEC_C, VEC_P, SPLITS, False, BEFORE, AVG_AT, MAX_AT, MIX_AT, LP_AT,
                    LSE_AT, EVEN, "none", HIDDEN, 0, HAS_B1, HAS_B2, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, 1, 1, ACC,
                )  # fmt: skip
                hand_on(state, present * blocks, first if MLP else second)
        elif stage == 1:
            if MLP:
                take_up(state, first)
                layer(
                    program, z_ptr + start * ROWS * C, w1_ptr, b1_ptr, None, hidden_ptr + start * K * R, product_ptr, state + 6, present * K, R, C,
                    C if ROWS == K else ROWS * C, 0, C, 1, 1, 1, "none", "none", HAS_B1, FIRST, INTERPRETED, ACC,
                )  # fmt: skip
                hand_on(state + 2, first, second)
        elif stage == 2:
            take_up(state + 2 * MLP, second)
            if MLP:
                layer(
                    program, hidden_ptr + start * K * R, w2_ptr, b2_ptr, None, logits_ptr + start * C, product_ptr, state + 6 + first, present, C, R,
                    K * R, R, R, 1, K, 1, HIDDEN, "none", HAS_B2, SECOND, INTERPRETED, ACC,
                )  # fmt: skip
            else:
                layer(
                    program, z_ptr + start * ROWS * C, w2_ptr, b2_ptr, None, logits_ptr + start * C, product_ptr, state + 6 + first, present, C, C,
                    ROWS * C, C, C, 1, K, 1, "none", "none", HAS_B2, SECOND, INTERPRETED, ACC,
                )  # fmt: skip
            hand_on(state + 4, second, present * blocks)
        elif n < N:
            take_up(state + 4, present * blocks)
            gate_range(
                n, program % blocks, x_ptr, logits_ptr, residual_ptr, y_ptr, norm, C, HW, SPLITS, BEFORE, GATE, HAS_RESIDUAL, ACTIVATION,
                CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC,
            )  # fmt: skip


@triton.jit
def channel_gate_stages_bwd_kernel(
    g_ptr, x_ptr, residual_ptr, da_ptr, dx_ptr, logits_ptr, z_ptr, aux_ptr, hidden_ptr, w1_ptr, w2_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr,
    bn_var_ptr, part_ptr, product_ptr, counter_ptr, dlogits_ptr, dhidden_ptr, dz_ptr, N, images, lag, first, second, slots, C_V, HW_V, R, eps,
    K: tl.constexpr, ROWS: tl.constexpr, VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr, BEFORE: tl.constexpr,
    AVG_AT: tl.constexpr, MAX_AT: tl.constexpr, MIX_AT: tl.constexpr, LP_AT: tl.constexpr, LSE_AT: tl.constexpr, EVEN: tl.constexpr,
    MLP: tl.constexpr, HIDDEN: tl.constexpr, GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STORE_DA: tl.constexpr,
    NEED_X: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, COMBINE_C: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, INTERPRETED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """As channel_gate_ticket_bwd_kernel; dhidden_nkr = a'(hidden_nkr) sum over c of w2_cr dlogits_nc and dz_nkc = sum over r of w1_rc dhidden_nkr, or
    without MLP dz_nkc = sum over j of w2_jc dlogits_nj. Blocks, layers and counter as forward."""
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    norm = (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps)
    blocks = tl.cdiv(C, BLOCK_C) * SPLITS
    stage, block, program, exists, state, start, present, n = own_stage(counter_ptr, N, images, lag, blocks, first, second, MLP)
    if exists:
        if product_ptr is not None:
            product_ptr += block.to(tl.int64) * slots
        if stage == 0:
            if n < N:
                last = logits_grad_range(
                    n, program % blocks, g_ptr, x_ptr, residual_ptr, da_ptr, logits_ptr, dlogits_ptr, part_ptr, counter_ptr + n, norm, C, HW, SPLITS,
                    BEFORE, GATE, HAS_RESIDUAL, ACTIVATION, STORE_DA, NEED_X, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, COMBINE_C, ACC,
                )  # fmt: skip
                if last:
                    hand_on(state, present, first if MLP else second)
        elif stage == 1:
            if MLP:
                take_up(state, first)
                layer(
                    program, dlogits_ptr + start * C, w2_ptr, None, hidden_ptr + start * K * R, dhidden_ptr + start * K * R, product_ptr, state + 6,
                    present * K, R, C, C, 0, 1, R, 1, K, "none", HIDDEN, False, FIRST, INTERPRETED, ACC,
                )  # fmt: skip
                hand_on(state + 2, first, second)
        elif stage == 2:
            take_up(state + 2 * MLP, second)
            if MLP:
                layer(
                    program, dhidden_ptr + start * K * R, w1_ptr, None, None, dz_ptr + start * K * C, product_ptr, state + 6 + first, present * K, C,
                    R, R, 0, 1, C, 1, 1, "none", "none", False, SECOND, INTERPRETED, ACC,
                )  # fmt: skip
            else:
                layer(
                    program, dlogits_ptr + start * C, w2_ptr, None, None, dz_ptr + start * K * C, product_ptr, state + 6 + first, present * K, C, C,
                    C, 0, 1, C, 1, K, "none", "none", False, SECOND, INTERPRETED, ACC,
                )  # fmt: skip
            hand_on(state + 4, second, present * blocks)
        elif n < N:
            take_up(state + 4, present * blocks)
            input_grad_range(
                n, program % blocks, g_ptr, x_ptr, residual_ptr, da_ptr, dx_ptr, logits_ptr, z_ptr, dz_ptr, aux_ptr, norm, C, HW, K, ROWS, SPLITS,
                BEFORE, AVG_AT, MAX_AT, MIX_AT, LP_AT, LSE_AT, EVEN, GATE, HAS_RESIDUAL, ACTIVATION, STORE_DA, NEED_X, CHANNELS_LAST, LARGE, BLOCK_C,
                BLOCK_P, ACC,
            )  # fmt: skip
