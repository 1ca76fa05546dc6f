"""Selection among branches: V_ncp = sum over k of w_nkc U_nkcp, with weights w from the mean of the branches' sum.

The K branches are K maps (selective kernels: up to four pointers), or with SLICED the K slices of the channels of one map (split attention). They
are U = b(norm(x)): a BatchNorm with its running statistics and the activation BEFORE, applied to every tile as it is loaded.
Neither their stack nor their sum is ever stored.
"""

import triton
import triton.language as tl

from .excite import arrive
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
    tile_offsets,
)


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
    total = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for p0 in range(start, stop, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (c[:, None] < C) & (p[None, :] < HW)
        offsets = tile_offsets(c[:, None], p[None, :], C * K if SLICED else C, HW, CHANNELS_LAST, LARGE)
        for k in tl.static_range(K):
            x = load_tile(branch_image(x_ptr, x1_ptr, x2_ptr, x3_ptr, n, C, HW, k, K, SLICED, CHANNELS_LAST), offsets, mask, ACC)
            u = activation(normalised(x, norm, k * C + c, c < C, ACC)[0], BEFORE)
            total += tl.where(mask, u, 0.0)
    found = tl.sum(total, 1)
    last = True
    if SPLITS > 1:
        part_ptr += n.to(tl.int64) * SPLITS * C + c
        tl.store(part_ptr + split * C, found, mask=c < C)
        last = arrive(counter_ptr + tl.program_id(0) // SPLITS, SPLITS)
    if last:
        if SPLITS > 1:
            found = tl.zeros([BLOCK_C], ACC)
            for i in range(SPLITS):
                found += tl.load(part_ptr + i * C, mask=c < C, other=0.0, cache_modifier=".cg")
        tl.store(z_ptr + n.to(tl.int64) * C + c, found / HW, mask=c < C)


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
    offsets = tile_offsets(c[:, None], p[None, :], C * K if SLICED else C, HW, CHANNELS_LAST, LARGE)
    weights = branch_weights(logits_ptr, n, c, C, GROUP, K, GATE, ACC)
    y = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for k in tl.static_range(K):
        x = load_tile(branch_image(x_ptr, x1_ptr, x2_ptr, x3_ptr, n, C, HW, k, K, SLICED, CHANNELS_LAST), offsets, mask, ACC)
        u = activation(normalised(x, norm, k * C + c, c < C, ACC)[0], BEFORE)
        y += u * weights[k][:, None]
    if HAS_RESIDUAL:
        y += load_tile(residual_ptr + image, at, mask, ACC)
    tl.store(y_ptr + image + at, activation(y, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)


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
            x = load_tile(branch_image(x_ptr, x1_ptr, x2_ptr, x3_ptr, n, C, HW, k, K, SLICED, CHANNELS_LAST), offsets, mask, ACC)
            branches += (activation(normalised(x, norm, k * C + c, c < C, ACC)[0], BEFORE),)
            y += branches[k] * weights[k][:, None]
        at = tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
        da = output_cotangent(g_ptr, residual_ptr, da_ptr, image, at, mask, y, 1.0, HAS_RESIDUAL, ACTIVATION, STORE_DA, ACC)
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
    if arrive(counter_ptr + tl.program_id(0) // SPLITS, SPLITS):
        store_logits_grads(dlogits_ptr, logits_ptr, part_ptr, n, c, C, GROUP, K, SPLITS, GATE, ACC)


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
    offsets = tile_offsets(c[:, None], p[None, :], C * K if SLICED else C, HW, CHANNELS_LAST, LARGE)
    da = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    if HAS_G:
        da = load_tile(g_ptr + image, at, mask, ACC)
        weights = branch_weights(logits_ptr, n, c, C, GROUP, K, GATE, ACC)
    share = tl.zeros([BLOCK_C], ACC)
    if HAS_Z:
        share = tl.load(dz_ptr + n.to(tl.int64) * C + c, mask=c < C, other=0.0) / HW
    for k in tl.static_range(K):
        if (STORE >> k) & 1:
            dx = tl.zeros([BLOCK_C, BLOCK_P], ACC)
            if HAS_G:
                dx += da * weights[k][:, None]
            if HAS_Z:
                dx += share[:, None]
            x = tl.zeros([BLOCK_C, BLOCK_P], ACC)
            if BEFORE != "none":
                x = load_tile(branch_image(x_ptr, x1_ptr, x2_ptr, x3_ptr, n, C, HW, k, K, SLICED, CHANNELS_LAST), offsets, mask, ACC)
            x, scale = normalised(x, norm, k * C + c, c < C, ACC)
            dx = chain(dx, activation_grad(x, BEFORE), BEFORE) * scale
            to = branch_image(dx_ptr, dx1_ptr, dx2_ptr, dx3_ptr, n, C, HW, k, K, SLICED, CHANNELS_LAST)
            tl.store(to + offsets, dx.to(to.dtype.element_ty), mask=mask)
