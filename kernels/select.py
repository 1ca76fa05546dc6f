"""Selection among branches: V_ncp = sum over k of w_nkc U_nkcp, with weights w from the mean of the branches' sum.

The K branches are K maps (selective kernels: up to four pointers), or with SLICED the K slices of the channels of one map (split attention). They
are U = b(norm(x)): a BatchNorm with its running statistics and the activation BEFORE, applied to every tile as it is loaded.
Neither their stack nor their sum is ever stored. Two passes each way, in launches of their own, or where the layers between them are two plain ones
of small weights in one launch, dealt out as in ticket.py.
"""

import triton
import triton.language as tl

from .excite import arrive, excite_image, excite_image_bwd, wait
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
    store_tile,
    tile_offsets,
)
from .ticket import draw_ticket


@triton.jit
def branch_image(
    x_ptr, x1_ptr, x2_ptr, x3_ptr, n, C, HW, k: tl.constexpr, K: tl.constexpr, SLICED: tl.constexpr, CHANNELS_LAST: tl.constexpr
):  # fmt: skip
    """Image n of branch k: of the k-th map, or with SLICED of the k-th slice of x's channels."""
    maps = (x_ptr, x1_ptr, x2_ptr, x3_ptr)
    if not SLICED:
        ptr = maps[k] + image_offset(n, C, HW)
    elif CHANNELS_LAST:
        ptr = x_ptr + image_offset(n, K * C, HW) + k * C
    else:
        ptr = x_ptr + image_offset(n * K + k, C, HW)
    return ptr


@triton.jit
def branch_weights(logits_ptr, n, c, C, GROUP, K: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr):
    """The weights w_nkc of one block of channels, K tensors [BLOCK_C]: softmax over k of logits [N, C / GROUP, K, GROUP], or f of each."""
    logits_ptr += n.to(tl.int64) * K * C + c // GROUP * (K * GROUP) + c % GROUP
    logits = ()
    for k in tl.static_range(K):
        logits += (tl.load(logits_ptr + k * GROUP, mask=c < C, other=0.0).to(ACC),)
    weights = ()
    if GATE == "softmax":
        top = logits[0]
        for k in tl.static_range(1, K):
            top = tl.maximum(top, logits[k])  # which may drop a NaN; the sum keeps it
        total = tl.zeros(c.shape, ACC)
        for k in tl.static_range(K):
            total += tl.exp(logits[k] - top)
        for k in tl.static_range(K):
            weights += (tl.exp(logits[k] - top) / total,)
    else:
        for k in tl.static_range(K):
            weights += (gate_function(logits[k], GATE),)
    return weights


@triton.jit
def load_branch(
    maps, norm, n, c, offsets, mask, C, HW, k: tl.constexpr, K: tl.constexpr, SLICED: tl.constexpr, BEFORE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr, LAST: tl.constexpr = None,
):  # fmt: skip
    """U_nk of a tile; offsets inside an image of the maps. LAST as in load_tile."""
    x = load_tile(branch_image(maps[0], maps[1], maps[2], maps[3], n, C, HW, k, K, SLICED, CHANNELS_LAST), offsets, mask, ACC, LAST)
    return activation(normalised(x, norm, k * C + c, c < C, ACC)[0], BEFORE)


@triton.jit
def squeeze_branches(
    n, c, start, stop, maps, norm, C, HW, K: tl.constexpr, SLICED: tl.constexpr, BEFORE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sum over p in [start, stop) and k of U_nkcp [BLOCK_C]."""
    total = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for p0 in range(start, stop, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (c[:, None] < C) & (p[None, :] < HW)
        offsets = tile_offsets(c[:, None], p[None, :], C * K if SLICED else C, HW, CHANNELS_LAST, LARGE)
        for k in tl.static_range(K):
            total += tl.where(mask, load_branch(maps, norm, n, c, offsets, mask, C, HW, k, K, SLICED, BEFORE, CHANNELS_LAST, ACC), 0.0)
    return tl.sum(total, 1)


@triton.jit
def add_sums(z_ptr, part_ptr, n, c, C, HW, SPLITS: tl.constexpr, ACC: tl.constexpr):
    """z_nc from the sums of the splits, added in order; part [N, SPLITS, C]."""
    total = tl.zeros(c.shape, ACC)
    for i in range(SPLITS):
        total += tl.load(part_ptr + (n.to(tl.int64) * SPLITS + i) * C + c, mask=c < C, other=0.0, cache_modifier=".cg")
    tl.store(z_ptr + n.to(tl.int64) * C + c, total / HW, mask=c < C)


@triton.jit
def select_squeeze_fwd_kernel(
    x_ptr, x1_ptr, x2_ptr, x3_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, part_ptr, counter_ptr, z_ptr, C_V, HW_V, eps,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr, K: tl.constexpr, SLICED: tl.constexpr, BEFORE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """z_nc = mean over p of sum over k of U_nkcp.

    x, x1, x2, x3 [N, C, HW] or x [N, K C, HW], or channels last; z [N, C]. A program owns BLOCK_C channels and one of SPLITS ranges of positions of
    one image; the last one to arrive for a block of channels adds the splits in order.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    norm = (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps)
    n, c, split, start, stop = own_range(tl.program_id(0), C, HW, SPLITS, BLOCK_C, BLOCK_P)
    maps = (x_ptr, x1_ptr, x2_ptr, x3_ptr)
    found = squeeze_branches(n, c, start, stop, maps, norm, C, HW, K, SLICED, BEFORE, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC)
    if SPLITS == 1:
        tl.store(z_ptr + n.to(tl.int64) * C + c, found / HW, mask=c < C)
    else:
        tl.store(part_ptr + (n.to(tl.int64) * SPLITS + split) * C + c, found, mask=c < C)
        if arrive(counter_ptr + tl.program_id(0) // SPLITS, SPLITS):
            add_sums(z_ptr, part_ptr, n, c, C, HW, SPLITS, ACC)


@triton.jit
def select_tile(
    n, c, p, weights, maps, norm, residual_ptr, y_ptr, C, HW, K: tl.constexpr, SLICED: tl.constexpr, BEFORE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, ACC: tl.constexpr,
    LAST: tl.constexpr = None,
):  # fmt: skip
    """y of the tile c [BLOCK_C] x p [BLOCK_P] of image n."""
    mask = (c[:, None] < C) & (p[None, :] < HW)
    offsets = tile_offsets(c[:, None], p[None, :], C * K if SLICED else C, HW, CHANNELS_LAST, LARGE)
    y = tl.zeros([c.shape[0], p.shape[0]], ACC)
    for k in tl.static_range(K):
        y += load_branch(maps, norm, n, c, offsets, mask, C, HW, k, K, SLICED, BEFORE, CHANNELS_LAST, ACC, LAST) * weights[k][:, None]
    at = image_offset(n, C, HW) + tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
    if HAS_RESIDUAL:
        y += load_tile(residual_ptr, at, mask, ACC, LAST)
    store_tile(y_ptr, activation(y, ACTIVATION), at, mask, LAST)


@triton.jit
def select_gate_fwd_kernel(
    x_ptr, x1_ptr, x2_ptr, x3_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, logits_ptr, residual_ptr, y_ptr, C_V, HW_V, GROUP, eps,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, K: tl.constexpr, SLICED: tl.constexpr, BEFORE: tl.constexpr,
    GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y_ncp = a(sum over k of w_nkc U_nkcp + residual_ncp), w from the logits as in `branch_weights`. A program owns one tile of one image."""
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    norm = (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps)
    n, c, p, mask, image, at = own_tile(C, HW, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P)
    weights = branch_weights(logits_ptr, n, c, C, GROUP, K, GATE, ACC)
    select_tile(
        n, c, p, weights, (x_ptr, x1_ptr, x2_ptr, x3_ptr), norm, residual_ptr, y_ptr, C, HW, K, SLICED, BEFORE, HAS_RESIDUAL, ACTIVATION,
        CHANNELS_LAST, LARGE, ACC,
    )  # fmt: skip


@triton.jit
def select_ticket_fwd_kernel(
    x_ptr, x1_ptr, x2_ptr, x3_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, residual_ptr, y_ptr, part_ptr,
    counter_ptr, z_ptr, hidden_ptr, logits_ptr, N, lag, C_V, HW_V, R, eps, VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr,
    K: tl.constexpr, SLICED: tl.constexpr, BEFORE: tl.constexpr, HIDDEN: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr,
    GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, EXCITE_C: tl.constexpr, EXCITE_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """logits_nk = (w2 a(w1 z_n + b1) + b2)_k, z_nc = mean over p of sum over k of U_nkcp; y as in select_gate_fwd_kernel.

    part [N, SPLITS, C]; z [N, C]; hidden [N, R]; logits [N, K, C]; w1 [R, C]; w2 [K C, R]; counter [2 N + 1] and programs as in
    channel_gate_ticket_fwd_kernel.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    norm = (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps)
    maps = (x_ptr, x1_ptr, x2_ptr, x3_ptr)
    blocks = tl.cdiv(C, BLOCK_C) * SPLITS
    n, block, first = draw_ticket(counter_ptr + 2 * N, lag, blocks, blocks)
    zero, c, split, start, stop = own_range(block, C, HW, SPLITS, BLOCK_C, BLOCK_P)
    if first:
        if n < N:
            found = squeeze_branches(n, c, start, stop, maps, norm, C, HW, K, SLICED, BEFORE, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC)
            tl.store(part_ptr + (n.to(tl.int64) * SPLITS + split) * C + c, found, mask=c < C)
            if arrive(counter_ptr + n, blocks):
                for c0 in range(0, C, EXCITE_C):
                    add_sums(z_ptr, part_ptr, n, c0 + tl.arange(0, EXCITE_C), C, HW, SPLITS, ACC)
                tl.debug_barrier()  # threads read what other threads of this program stored
                excite_image(
                    z_ptr + n.to(tl.int64) * C, hidden_ptr + n.to(tl.int64) * R, logits_ptr + n.to(tl.int64) * K * C, w1_ptr, b1_ptr, w2_ptr, b2_ptr,
                    C, R, K * C, 1, 0, "mlp", HIDDEN, HAS_B1, HAS_B2, EXCITE_C, EXCITE_R, ACC,
                )  # fmt: skip
                arrive(counter_ptr + N + n, blocks + 1)  # with the logits stored
    elif n >= 0:
        wait(counter_ptr + N + n)
        arrive(counter_ptr + N + n, blocks + 1)  # to leave the counter at zero
        weights = branch_weights(logits_ptr, n, c, C, C, K, GATE, ACC)
        for p0 in range(start, stop, BLOCK_P):
            select_tile(
                n, c, p0 + tl.arange(0, BLOCK_P), weights, maps, norm, residual_ptr, y_ptr, C, HW, K, SLICED, BEFORE, HAS_RESIDUAL, ACTIVATION,
                CHANNELS_LAST, LARGE, ACC, True,
            )  # fmt: skip


@triton.jit
def store_logits_grads(
    dlogits_ptr, logits_ptr, part_ptr, n, c, C, GROUP, K: tl.constexpr, SPLITS: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """dlogits of one block of channels: f' sum over i of part_nikc, added in order; for softmax part [N, SPLITS, K, C] is complete."""
    at = n.to(tl.int64) * K * C + c // GROUP * (K * GROUP) + c % GROUP
    for k in tl.static_range(K):
        found = tl.zeros(c.shape, ACC)
        for i in range(SPLITS):
            row = ((n.to(tl.int64) * SPLITS + i) * K + k) * C
            found += tl.load(part_ptr + row + c, mask=c < C, other=0.0, cache_modifier=".cg")
        if GATE != "softmax":
            slope = gate_grad(tl.load(logits_ptr + at + k * GROUP, mask=c < C, other=0.0).to(ACC), GATE)
            found = chain(found, slope, GATE)
        tl.store(dlogits_ptr + at + k * GROUP, found.to(dlogits_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def weights_range(
    n, c, split, start, stop, maps, norm, g_ptr, residual_ptr, da_ptr, logits_ptr, part_ptr, C, HW, GROUP, SPLITS: tl.constexpr, K: tl.constexpr,
    SLICED: tl.constexpr, BEFORE: tl.constexpr, GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STORE_DA: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr, LAST: tl.constexpr = None,
    G_LAST: tl.constexpr = None,
):  # fmt: skip
    """part_nikc, the i-th split's share of the weights' gradients, and da; see select_bwd_weights_kernel. LAST: nobody reads the maps again, G_LAST:
    nor g."""
    image = image_offset(n, C, HW)
    weights = branch_weights(logits_ptr, n, c, C, GROUP, K, GATE, ACC)
    totals = ()
    for _k in tl.static_range(K):
        totals += (tl.zeros([BLOCK_C, BLOCK_P], ACC),)
    for p0 in range(start, stop, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (c[:, None] < C) & (p[None, :] < HW)
        offsets = tile_offsets(c[:, None], p[None, :], C * K if SLICED else C, HW, CHANNELS_LAST, LARGE)
        branches = ()
        y = tl.zeros([BLOCK_C, BLOCK_P], ACC)
        for k in tl.static_range(K):
            branches += (load_branch(maps, norm, n, c, offsets, mask, C, HW, k, K, SLICED, BEFORE, CHANNELS_LAST, ACC, LAST),)
            y += branches[k] * weights[k][:, None]
        at = tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
        da = output_cotangent(g_ptr, residual_ptr, da_ptr, image, at, mask, y, 1.0, HAS_RESIDUAL, ACTIVATION, STORE_DA, ACC, None, G_LAST)
        added = ()
        for k in tl.static_range(K):
            u = branches[k]
            if GATE == "softmax":
                u = tl.zeros([BLOCK_C, BLOCK_P], ACC)
                for j in tl.static_range(K):  # differences of branches, because those of their sums would cancel; the same bits for k, j and j, k
                    if j != k:
                        u += (weights[k] * weights[j])[:, None] * (branches[k] - branches[j])
            added += (totals[k] + tl.where(mask, da * u, 0.0),)
        totals = added
    for k in tl.static_range(K):
        row = ((n.to(tl.int64) * SPLITS + split) * K + k) * C
        tl.store(part_ptr + row + c, tl.sum(totals[k], 1), mask=c < C)


@triton.jit
def select_bwd_weights_kernel(
    g_ptr, x_ptr, x1_ptr, x2_ptr, x3_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, logits_ptr, residual_ptr, part_ptr, counter_ptr,
    da_ptr, dlogits_ptr, C_V, HW_V, GROUP, eps, VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr, K: tl.constexpr,
    SLICED: tl.constexpr, BEFORE: tl.constexpr, GATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STORE_DA: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dlogits_nkc = sum over p of da_ncp sum over j of w_nkc w_njc (U_nkcp - U_njcp) for softmax; f'(logits_nkc) sum over p of da_ncp U_nkcp for
    another gate f.

    A program owns BLOCK_C channels and one of SPLITS ranges of positions; the last one to arrive for a block of channels adds the splits in order.
    With STORE_DA it also writes da = g a'(y).
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    norm = (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps)
    n, c, split, start, stop = own_range(tl.program_id(0), C, HW, SPLITS, BLOCK_C, BLOCK_P)
    weights_range(
        n, c, split, start, stop, (x_ptr, x1_ptr, x2_ptr, x3_ptr), norm, g_ptr, residual_ptr, da_ptr, logits_ptr, part_ptr, C, HW, GROUP, SPLITS, K,
        SLICED, BEFORE, GATE, HAS_RESIDUAL, ACTIVATION, STORE_DA, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC,
    )  # fmt: skip
    if arrive(counter_ptr + tl.program_id(0) // SPLITS, SPLITS):
        store_logits_grads(dlogits_ptr, logits_ptr, part_ptr, n, c, C, GROUP, K, SPLITS, GATE, ACC)


@triton.jit
def input_tile(
    n, c, p, weights, maps, gradients, norm, g_ptr, dz_ptr, C, HW, K: tl.constexpr, SLICED: tl.constexpr, BEFORE: tl.constexpr, HAS_G: tl.constexpr,
    HAS_Z: tl.constexpr, STORE: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, ACC: tl.constexpr, LAST: tl.constexpr = None,
):  # fmt: skip
    """dx of every branch in the tile c [BLOCK_C] x p [BLOCK_P] of image n; see select_bwd_input_kernel."""
    mask = (c[:, None] < C) & (p[None, :] < HW)
    offsets = tile_offsets(c[:, None], p[None, :], C * K if SLICED else C, HW, CHANNELS_LAST, LARGE)
    shape: tl.constexpr = [c.shape[0], p.shape[0]]
    da = tl.zeros(shape, ACC)
    if HAS_G:
        da = load_tile(g_ptr + image_offset(n, C, HW), tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE), mask, ACC, LAST)
    share = tl.zeros(c.shape, ACC)
    if HAS_Z:
        share = tl.load(dz_ptr + n.to(tl.int64) * C + c, mask=c < C, other=0.0) / HW
    for k in tl.static_range(K):
        if (STORE >> k) & 1:
            dx = tl.zeros(shape, ACC)
            if HAS_G:
                dx += da * weights[k][:, None]
            if HAS_Z:
                dx += share[:, None]
            x = tl.zeros(shape, ACC)
            if BEFORE != "none":
                x = load_tile(branch_image(maps[0], maps[1], maps[2], maps[3], n, C, HW, k, K, SLICED, CHANNELS_LAST), offsets, mask, ACC, LAST)
            x, scale = normalised(x, norm, k * C + c, c < C, ACC)
            dx = chain(dx, activation_grad(x, BEFORE), BEFORE) * scale
            to = branch_image(gradients[0], gradients[1], gradients[2], gradients[3], n, C, HW, k, K, SLICED, CHANNELS_LAST)
            store_tile(to, dx, offsets, mask, LAST)


@triton.jit
def select_bwd_input_kernel(
    g_ptr, x_ptr, x1_ptr, x2_ptr, x3_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, logits_ptr, dz_ptr, dx_ptr, dx1_ptr, dx2_ptr, dx3_ptr,
    C_V, HW_V, GROUP, eps, VEC_C: tl.constexpr, VEC_P: tl.constexpr, K: tl.constexpr, SLICED: tl.constexpr, BEFORE: tl.constexpr,
    GATE: tl.constexpr, HAS_G: tl.constexpr, HAS_Z: tl.constexpr, STORE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_nkcp = norm'_kc b'(norm(x_nkcp)) (da_ncp w_nkc + dz_nc / HW), da in g: HAS_G is the gate's share, HAS_Z the squeeze's.

    Bit k of STORE: whether branch k's is asked for. A program owns one tile of one image, of all branches; x is read only for b'.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    norm = (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps)
    n, c, p, mask, image, at = own_tile(C, HW, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P)
    weights = ()
    if HAS_G:
        weights = branch_weights(logits_ptr, n, c, C, GROUP, K, GATE, ACC)
    input_tile(
        n, c, p, weights, (x_ptr, x1_ptr, x2_ptr, x3_ptr), (dx_ptr, dx1_ptr, dx2_ptr, dx3_ptr), norm, g_ptr, dz_ptr, C, HW, K, SLICED, BEFORE, HAS_G,
        HAS_Z, STORE, CHANNELS_LAST, LARGE, ACC,
    )  # fmt: skip


@triton.jit
def select_ticket_bwd_kernel(
    g_ptr, x_ptr, x1_ptr, x2_ptr, x3_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, w1_ptr, w2_ptr, residual_ptr, da_ptr, dx_ptr, dx1_ptr,
    dx2_ptr, dx3_ptr, part_ptr, counter_ptr, hidden_ptr, logits_ptr, dlogits_ptr, dhidden_ptr, dz_ptr, N, lag, C_V, HW_V, R, eps,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr, K: tl.constexpr, SLICED: tl.constexpr, BEFORE: tl.constexpr, HIDDEN: tl.constexpr,
    GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STORE: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, EXCITE_C: tl.constexpr, EXCITE_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dlogits as in select_bwd_weights_kernel, from which dz through the layers, and dx as in select_bwd_input_kernel.

    part [N, SPLITS, K, C]; dhidden [N, R]; dz [N, C]; da, where there is an activation; counter and programs as forward.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    norm = (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps)
    maps = (x_ptr, x1_ptr, x2_ptr, x3_ptr)
    blocks = tl.cdiv(C, BLOCK_C) * SPLITS
    n, block, first = draw_ticket(counter_ptr + 2 * N, lag, blocks, blocks)
    zero, c, split, start, stop = own_range(block, C, HW, SPLITS, BLOCK_C, BLOCK_P)
    if first:
        if n < N:
            weights_range(
                n, c, split, start, stop, maps, norm, g_ptr, residual_ptr, da_ptr, logits_ptr, part_ptr, C, HW, C, SPLITS, K, SLICED, BEFORE, GATE,
                HAS_RESIDUAL, ACTIVATION, ACTIVATION != "none", CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC, BEFORE == "none", ACTIVATION != "none",
            )  # fmt: skip
            if arrive(counter_ptr + n, blocks):
                for c0 in range(0, C, EXCITE_C):
                    store_logits_grads(dlogits_ptr, logits_ptr, part_ptr, n, c0 + tl.arange(0, EXCITE_C), C, C, K, SPLITS, GATE, ACC)
                tl.debug_barrier()  # threads read what other threads of this program stored
                excite_image_bwd(
                    dlogits_ptr + n.to(tl.int64) * K * C, hidden_ptr + n.to(tl.int64) * R, dhidden_ptr + n.to(tl.int64) * R,
                    dz_ptr + n.to(tl.int64) * C, w1_ptr, w2_ptr, C, R, K * C, 1, 0, "mlp", HIDDEN, EXCITE_C, EXCITE_R, ACC,
                )  # fmt: skip
                arrive(counter_ptr + N + n, blocks + 1)  # with dz stored
    elif n >= 0:
        wait(counter_ptr + N + n)
        arrive(counter_ptr + N + n, blocks + 1)  # to leave the counter at zero
        weights = branch_weights(logits_ptr, n, c, C, C, K, GATE, ACC)
        for p0 in range(start, stop, BLOCK_P):
            input_tile(
                n, c, p0 + tl.arange(0, BLOCK_P), weights, maps, (dx_ptr, dx1_ptr, dx2_ptr, dx3_ptr), norm,
                da_ptr if ACTIVATION != "none" else g_ptr, dz_ptr, C, HW, K, SLICED, BEFORE, True, True, STORE, CHANNELS_LAST, LARGE, ACC, True,
            )  # fmt: skip
