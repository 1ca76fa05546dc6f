"""The gates of pixel.py and the contexts of context.py on channels-first maps whose rows are short and many: all channels of a few positions would be
parts of sectors.

A group of programs holds one image in registers, each of them all positions of BLOCK_R x ROWS channels, so that x is read once, in whole rows. What a
position needs of all channels goes through memory: each program leaves its share of the sum in a slot, the last one to do so adds the slots in order
and publishes the sum, the others wait for it. The programs of a group must therefore run at once: the grid is a whole number of groups, and launched
cooperatively, which runs all of it or refuses.

What was stored before an arrival is visible after the wait: `arrive` puts every thread's stores before one thread's release, the waiting thread
acquires at the same address, the barrier behind a scalar atomic hands that on to the other threads of its program, and loads with .cg find nothing
older in a cache of their own. The slots of a group serve one image after another: none of its programs passes the wait before they have been read.
"""

import triton
import triton.language as tl

from .context import finite_shift
from .excite import arrive, wait
from .gate import combine_gates, gated, output_cotangent, store_logits_grad
from .pointwise import activation, chain, gate_function, gate_grad, image_offset, load_tile


@triton.jit
def group_tile(block, C_V, HW: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr):
    """A program's tile [BLOCK_R, ROWS x BLOCK_P] of an image seen as [C / ROWS, ROWS x HW]: first channel of each row, positions, offsets, mask.

    ROWS rows that by themselves are not aligned for vector loads make one that is.
    """
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    f = tl.arange(0, ROWS * BLOCK_P)[None, :]
    return r * ROWS, f % HW if ROWS > 1 else f, r[:, None] * (HW * ROWS) + f, (r[:, None] < C_V) & (f < HW * ROWS)


@triton.jit
def load_channels(
    ptr, c, C, FUNCTION: tl.constexpr, HW: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr
):
    """f(what each channel has), broadcastable to the tile. Selected row by row: a load for each position would take its registers for addresses."""
    if ROWS == 1:
        value = gate_function(tl.load(ptr + c, mask=c < C, other=0.0).to(ACC), FUNCTION)[:, None]
    else:
        k_of = tl.arange(0, ROWS * BLOCK_P)[None, :] // HW
        value = tl.zeros([BLOCK_R, ROWS * BLOCK_P], ACC)
        for k in range(ROWS):
            found = gate_function(tl.load(ptr + c + k, mask=c + k < C, other=0.0).to(ACC), FUNCTION)
            value = tl.where(k_of == k, found[:, None], value)
    return value


@triton.jit
def row_sum(value, k, HW: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sums over positions [BLOCK_R] of the k-th of each ROWS channels."""
    if ROWS > 1:
        value = tl.where(tl.arange(0, ROWS * BLOCK_P)[None, :] // HW == k, value, 0.0)
    return tl.sum(value, 1)


@triton.jit
def fold_rows(value, HW: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sums [BLOCK_P] over the channels of value [ROWS x BLOCK_P], in which they follow each other every HW elements."""
    if ROWS > 1:
        i = tl.arange(0, ROWS * BLOCK_P)
        value = tl.sum(tl.reshape(tl.gather(value, i // BLOCK_P * HW + i % BLOCK_P, 0), [ROWS, BLOCK_P]), 0)
    return value


@triton.jit
def own_group(part_ptr, C_V, HW: tl.constexpr, BLOCK_R: tl.constexpr):
    """A program's group and how many there are, its number in the group and how many programs that has, and the group's slots."""
    blocks = tl.cdiv(C_V, BLOCK_R)
    group = tl.program_id(0) // blocks
    return group, tl.num_programs(0) // blocks, tl.program_id(0) % blocks, blocks, part_ptr + group.to(tl.int64) * blocks * HW


@triton.jit
def add_slots(part_ptr, slots, HW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr):
    """Sums [BLOCK_P] over the rows of part [slots, HW], in the same order every time."""
    p = tl.arange(0, BLOCK_P)[None, :]
    total = tl.zeros([BLOCK_P], ACC)
    for s0 in range(0, slots, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)[:, None]
        total += tl.sum(tl.load(part_ptr + s * HW + p, mask=(s < slots) & (p < HW), other=0.0, cache_modifier=".cg"), 0)
    return total


@triton.jit
def pixel_gate_group_fwd_kernel(
    x_ptr, w_ptr, b_ptr, logits_ptr, residual_ptr, y_ptr, q_ptr, part_ptr, counter_ptr, N, C_V, HW: tl.constexpr, ROWS: tl.constexpr,
    GATE: tl.constexpr, SPATIAL: tl.constexpr, HAS_CHANNEL: tl.constexpr, COMBINE: tl.constexpr, HAS_B: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """q_np = sum over c of w_c x_ncp + b; y_ncp = a(x_ncp combine(f(logits_nc), h(q_np)) + residual_ncp).

    q [N, HW]; part [groups, blocks, HW]; counter [2, N]. A program owns all positions of BLOCK_R x ROWS channels of every `groups`-th image.
    """
    C = C_V * ROWS
    group, groups, block, blocks, part_ptr = own_group(part_ptr, C_V, HW, BLOCK_R)
    c, p, offsets, mask = group_tile(block, C_V, HW, ROWS, BLOCK_R, BLOCK_P)
    i = tl.arange(0, BLOCK_P)
    for step in range(0, tl.cdiv(N - group, groups)):
        n = group + step * groups
        image = image_offset(n, C, HW)
        x = tl.load(x_ptr + image + offsets, mask=mask, other=0.0)  # kept in its own dtype
        w = load_channels(w_ptr, c, C, "none", HW, ROWS, BLOCK_R, BLOCK_P, ACC)
        found = fold_rows(tl.sum(x.to(ACC) * w, 0), HW, ROWS, BLOCK_P)
        tl.store(part_ptr + block * HW + i, found, mask=i < HW)
        if arrive(counter_ptr + n, blocks):
            q = add_slots(part_ptr, blocks, HW, BLOCK_P, BLOCK_S, ACC)
            if HAS_B:
                q += tl.load(b_ptr).to(ACC)
            tl.store(q_ptr + n.to(tl.int64) * HW + i, q, mask=i < HW)
        else:
            wait(counter_ptr + N + n)
        arrive(counter_ptr + N + n, blocks)  # with q stored; the others, to leave the counter at zero
        h = gate_function(tl.load(q_ptr + n.to(tl.int64) * HW + p, mask=p < HW, other=0.0, cache_modifier=".cg"), SPATIAL)
        s = tl.full([BLOCK_R, 1], 1.0, ACC)
        if HAS_CHANNEL:
            s = load_channels(logits_ptr + n.to(tl.int64) * C, c, C, GATE, HW, ROWS, BLOCK_R, BLOCK_P, ACC)
        y = gated(x.to(ACC), s, h, COMBINE)
        if HAS_RESIDUAL:
            y += load_tile(residual_ptr + image, offsets, mask, ACC)
        tl.store(y_ptr + image + offsets, activation(y, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pixel_gate_group_bwd_kernel(
    g_ptr, x_ptr, w_ptr, logits_ptr, q_ptr, residual_ptr, da_ptr, dx_ptr, dq_ptr, dw_part_ptr, dlogits_ptr, part_ptr, counter_ptr,
    N, C_V, HW: tl.constexpr, ROWS: tl.constexpr, GATE: tl.constexpr, SPATIAL: tl.constexpr, HAS_CHANNEL: tl.constexpr, COMBINE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STORE_DA: tl.constexpr, STORE_DX: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq_np = h'(q_np) sum over c of da_ncp x_ncp (share of q); dw_part_nc = sum over p of x_ncp dq_np.
    HAS_CHANNEL: dlogits_nc = f'(logits_nc) sum over p of da_ncp x_ncp (share of s).
    STORE_DX (no channel gate): dx_ncp = da_ncp h(q_np) + w_c dq_np.

    dq [N, HW]; dw_part [N, C]; part [groups, blocks, HW]; counter [2, N]. A program owns all positions of BLOCK_R x ROWS channels of every
    `groups`-th image.
    """
    C = C_V * ROWS
    group, groups, block, blocks, part_ptr = own_group(part_ptr, C_V, HW, BLOCK_R)
    c, p, offsets, mask = group_tile(block, C_V, HW, ROWS, BLOCK_R, BLOCK_P)
    i = tl.arange(0, BLOCK_P)
    for step in range(0, tl.cdiv(N - group, groups)):
        n = group + step * groups
        image = image_offset(n, C, HW)
        h = gate_function(tl.load(q_ptr + n.to(tl.int64) * HW + p, mask=p < HW, other=0.0), SPATIAL)
        s = tl.full([BLOCK_R, 1], 1.0, ACC)
        if HAS_CHANNEL:
            s = load_channels(logits_ptr + n.to(tl.int64) * C, c, C, GATE, HW, ROWS, BLOCK_R, BLOCK_P, ACC)
        x = load_tile(x_ptr + image, offsets, mask, ACC)
        factor, _, share = combine_gates(x, s, h, COMBINE, "")
        da = output_cotangent(g_ptr, residual_ptr, da_ptr, image, offsets, mask, x, factor, HAS_RESIDUAL, ACTIVATION, STORE_DA, ACC)
        product = tl.where(mask, da * x, 0.0)
        found = fold_rows(tl.sum(product * (1 - share) if COMBINE == "max" else product, 0), HW, ROWS, BLOCK_P)
        tl.store(part_ptr + block * HW + i, found, mask=i < HW)
        if HAS_CHANNEL:
            for k in range(ROWS):
                share_of_s = row_sum(product * share, k, HW, ROWS, BLOCK_P)
                store_logits_grad(dlogits_ptr, logits_ptr, logits_ptr, n, c + k, share_of_s, C, GATE, False, ACC)
        if arrive(counter_ptr + n, blocks):
            q = tl.load(q_ptr + n.to(tl.int64) * HW + i, mask=i < HW, other=0.0)
            dq = chain(add_slots(part_ptr, blocks, HW, BLOCK_P, BLOCK_S, ACC), gate_grad(q, SPATIAL), SPATIAL)
            tl.store(dq_ptr + n.to(tl.int64) * HW + i, dq, mask=i < HW)
        else:
            wait(counter_ptr + N + n)
        arrive(counter_ptr + N + n, blocks)  # with dq stored; the others, to leave the counter at zero
        dq = tl.load(dq_ptr + n.to(tl.int64) * HW + p, mask=p < HW, other=0.0, cache_modifier=".cg")
        product = tl.where(mask, x * dq, 0.0)
        for k in range(ROWS):
            tl.store(dw_part_ptr + n.to(tl.int64) * C + c + k, row_sum(product, k, HW, ROWS, BLOCK_P), mask=c + k < C)
        if STORE_DX:
            w = load_channels(w_ptr, c, C, "none", HW, ROWS, BLOCK_R, BLOCK_P, ACC)
            tl.store(dx_ptr + image + offsets, (da * h + w * dq).to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def context_group_fwd_kernel(
    x_ptr, w_ptr, b_ptr, logits_ptr, softmax_ptr, context_ptr, part_ptr, counter_ptr, N, C_V, HW: tl.constexpr, ROWS: tl.constexpr,
    HAS_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """context_nc = sum over p of a_np x_ncp, a_np = exp(logits_np - top_n) / total_n, logits_np = sum over c of w_c x_ncp + b,
    top_n the maximum of logits_np over p, total_n = sum over p of exp(logits_np - top_n).

    logits [N, HW], softmax [N, 2] = (top, total), context [N, C]; part, counter and programs as in pixel_gate_group_fwd_kernel.
    """
    C = C_V * ROWS
    group, groups, block, blocks, part_ptr = own_group(part_ptr, C_V, HW, BLOCK_R)
    c, p, offsets, mask = group_tile(block, C_V, HW, ROWS, BLOCK_R, BLOCK_P)
    i = tl.arange(0, BLOCK_P)
    for step in range(0, tl.cdiv(N - group, groups)):
        n = group + step * groups
        x = tl.load(x_ptr + image_offset(n, C, HW) + offsets, mask=mask, other=0.0)  # kept in its own dtype
        w = load_channels(w_ptr, c, C, "none", HW, ROWS, BLOCK_R, BLOCK_P, ACC)
        tl.store(part_ptr + block * HW + i, fold_rows(tl.sum(x.to(ACC) * w, 0), HW, ROWS, BLOCK_P), mask=i < HW)
        if arrive(counter_ptr + n, blocks):
            logits = add_slots(part_ptr, blocks, HW, BLOCK_P, BLOCK_S, ACC)
            if HAS_B:
                logits += tl.load(b_ptr).to(ACC)
            logits = tl.where(i < HW, logits, float("-inf"))
            tl.store(logits_ptr + n.to(tl.int64) * HW + i, logits, mask=i < HW)
            top = tl.max(logits, 0)  # may drop a NaN, which the sums keep
            tl.store(softmax_ptr + n * 2, top)
            tl.store(softmax_ptr + n * 2 + 1, tl.sum(tl.exp(logits - finite_shift(top)), 0))
        else:
            wait(counter_ptr + N + n)
        arrive(counter_ptr + N + n, blocks)  # with these stored; the others, to leave the counter at zero
        top = tl.load(softmax_ptr + n * 2, cache_modifier=".cg")
        total = tl.load(softmax_ptr + n * 2 + 1, cache_modifier=".cg")
        logits = tl.load(logits_ptr + n.to(tl.int64) * HW + p, mask=p < HW, other=float("-inf"), cache_modifier=".cg")
        weighted = x.to(ACC) * tl.exp(logits - finite_shift(top))
        for k in range(ROWS):
            tl.store(context_ptr + n.to(tl.int64) * C + c + k, row_sum(weighted, k, HW, ROWS, BLOCK_P) / total, mask=c + k < C)


@triton.jit
def context_group_bwd_kernel(
    da_ptr, x_ptr, w_ptr, logits_ptr, softmax_ptr, context_ptr, dcontext_ptr, scale_ptr, dx_ptr, dw_part_ptr, dlogits_ptr, part_ptr, counter_ptr,
    N, C_V, HW: tl.constexpr, ROWS: tl.constexpr, GATE: tl.constexpr, HAS_DA: tl.constexpr, HAS_SCALE: tl.constexpr, STORE_DX: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dlogits_np = a_np sum over c of dcontext_nc (x_ncp - context_nc), a_np = exp(logits_np - top_n) / total_n;
    dx_ncp = da_ncp f(scale_nc) + a_np dcontext_nc + w_c dlogits_np; dw_part_nc = sum over p of (x_ncp - context_nc) dlogits_np.

    As context_bwd_kernel; dlogits [N, HW], dw_part [N, C]; part, counter and programs as in pixel_gate_group_fwd_kernel.
    """
    C = C_V * ROWS
    group, groups, block, blocks, part_ptr = own_group(part_ptr, C_V, HW, BLOCK_R)
    c, p, offsets, mask = group_tile(block, C_V, HW, ROWS, BLOCK_R, BLOCK_P)
    i = tl.arange(0, BLOCK_P)
    for step in range(0, tl.cdiv(N - group, groups)):
        n = group + step * groups
        image = image_offset(n, C, HW)
        row = n.to(tl.int64) * C
        dlogits_row = dlogits_ptr + n.to(tl.int64) * HW
        top = tl.load(softmax_ptr + n * 2)
        total = tl.load(softmax_ptr + n * 2 + 1)
        x = load_tile(x_ptr + image, offsets, mask, ACC) - load_channels(context_ptr + row, c, C, "none", HW, ROWS, BLOCK_R, BLOCK_P, ACC)
        dcontext = load_channels(dcontext_ptr + row, c, C, "none", HW, ROWS, BLOCK_R, BLOCK_P, ACC)
        found = fold_rows(tl.sum(tl.where(mask, x * dcontext, 0.0), 0), HW, ROWS, BLOCK_P)
        tl.store(part_ptr + block * HW + i, found, mask=i < HW)
        if arrive(counter_ptr + n, blocks):
            a = tl.exp(tl.load(logits_ptr + n.to(tl.int64) * HW + i, mask=i < HW, other=float("-inf")) - top) / total
            tl.store(dlogits_row + i, a * add_slots(part_ptr, blocks, HW, BLOCK_P, BLOCK_S, ACC), mask=i < HW)
        else:
            wait(counter_ptr + N + n)
        arrive(counter_ptr + N + n, blocks)  # with dlogits stored; the others, to leave the counter at zero
        dlogits = tl.load(dlogits_row + p, mask=p < HW, other=0.0, cache_modifier=".cg")
        product = tl.where(mask, x * dlogits, 0.0)
        for k in range(ROWS):
            tl.store(dw_part_ptr + row + c + k, row_sum(product, k, HW, ROWS, BLOCK_P), mask=c + k < C)
        if STORE_DX:
            a = tl.exp(tl.load(logits_ptr + n.to(tl.int64) * HW + p, mask=p < HW, other=float("-inf")) - top) / total
            dx = a * dcontext + load_channels(w_ptr, c, C, "none", HW, ROWS, BLOCK_R, BLOCK_P, ACC) * dlogits
            if HAS_DA:
                s = tl.full([BLOCK_R, 1], 1.0, ACC)
                if HAS_SCALE:
                    s = load_channels(scale_ptr + row, c, C, GATE, HW, ROWS, BLOCK_R, BLOCK_P, ACC)
                dx += load_tile(da_ptr + image, offsets, mask, ACC) * s
            tl.store(dx_ptr + image + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
