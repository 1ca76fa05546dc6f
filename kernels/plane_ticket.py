"""Gates of single planes that do not fit on chip: two passes in one launch, the second of which finds the planes in the cache that the first one read
them into.

Programs draw tickets, as in ticket.py, dealt in waves for groups of BLOCK_C planes of an image: the first pass over one group, then the second over
the group `lag` before, each by SPLITS programs. Without TICKETS a group has one program, which makes both passes. The gates are those of plane.py.
"""

import triton
import triton.language as tl

from .excite import arrive, wait
from .plane import gate_planes, load_source, plane_coefficients, plane_slopes, plane_terms, source_channels, store_source
from .pointwise import image_offset, own_range
from .ticket import draw_ticket


@triton.jit
def draw_planes(counter_ptr, groups, lag, SPLITS: tl.constexpr, others, TICKETS: tl.constexpr):
    """(group of planes, range of their positions, whether to make the first pass over it, and the second); others: programs of the second pass."""
    group = tl.program_id(0)
    split = group * 0
    first = group < groups
    second = first
    if TICKETS:
        group, split, first = draw_ticket(counter_ptr + 2 * groups, lag, SPLITS, others)
        second = (first == 0) & (group >= 0)
        first = first & (group < groups)
    return group, split, first, second


@triton.jit
def await_sums(counter_ptr, group, groups, SPLITS: tl.constexpr, TICKETS: tl.constexpr):
    """Returns once what the first pass over a group of planes left is visible."""
    if TICKETS:
        wait(counter_ptr + groups + group)
        arrive(counter_ptr + groups + group, SPLITS + 1)  # to leave the counter at zero
    else:
        tl.debug_barrier()  # threads read what other threads of this program stored


@triton.jit
def range_moments(
    x_ptr, o0, start, stop, C_V, HW, VEC_C: tl.constexpr, SHUFFLE: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of the positions start <= p < stop their sum and the sum of their squared distances from their mean, [BLOCK_C]: by Welford's recurrence in each
    of BLOCK_P lanes, combined by Chan's formula. The mean is that of a plain sum, because the recurrence makes NaN of a plane with Inf."""
    lanes = tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    centre = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    squares = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for p0 in range(start, stop, BLOCK_P):
        p = p0 + lanes
        x = load_source(x_ptr, o0, p, C_V, HW, VEC_C, SHUFFLE, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC)
        total += x
        before = x - centre
        after = centre + before / ((p0 - start) // BLOCK_P + 1)
        inside = p[None, :] < HW
        squares += tl.where(inside, before * (x - after), 0.0)
        centre = tl.where(inside, after, centre)
    sums = tl.sum(total, 1)
    count = ((stop - start - lanes + BLOCK_P - 1) // BLOCK_P)[None, :]  # positions of each lane, none or fewer beyond the range's end
    apart = centre - (sums / tl.maximum(stop - start, 1))[:, None]
    return sums, tl.sum(squares + tl.where(count > 0, count * apart * apart, 0.0), 1)


@triton.jit
def combine_moments(part_ptr, n, c, inside, C, HW, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr):
    """mean_c, m2_c of the ranges' moments in order, by Chan's formula; part [N, SPLITS, 2, C]."""
    first = part_ptr + n.to(tl.int64) * SPLITS * 2 * C + c
    mean = tl.zeros([BLOCK_C], ACC)
    for split in range(SPLITS):
        mean += tl.load(first + split * 2 * C, mask=inside, other=0.0, cache_modifier=".cg")
    mean /= HW
    m2 = tl.zeros([BLOCK_C], ACC)
    per_split = tl.cdiv(tl.cdiv(HW, BLOCK_P), SPLITS) * BLOCK_P
    for split in range(SPLITS):
        count = tl.minimum(HW - split * per_split, per_split)
        if count > 0:
            apart = tl.load(first + split * 2 * C, mask=inside, other=0.0, cache_modifier=".cg") / count - mean
            m2 += tl.load(first + (split * 2 + 1) * C, mask=inside, other=0.0, cache_modifier=".cg") + count * apart * apart
    return mean, m2


@triton.jit
def plane_ticket_fwd_kernel(
    x_ptr, cweight_ptr, cbias_ptr, sweight_ptr, sbias_ptr, norm_weight_ptr, norm_bias_ptr, residual_ptr, y_ptr, moments_ptr, part_ptr, counter_ptr,
    groups, lag, C_V, HW_V, per_group, VEC_C: tl.constexpr, VEC_P: tl.constexpr, SHUFFLE: tl.constexpr, HAS_AFFINE: tl.constexpr,
    EPS: tl.constexpr, GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, SPLITS: tl.constexpr, TICKETS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """As plane_gate_fwd_kernel.

    part [N, SPLITS, 2, C]; counter [2 groups + 1]: arrivals of the first pass, of the second, and tickets. In either pass a program owns one of
    SPLITS ranges of positions of BLOCK_C planes of one image; without TICKETS, all positions in both.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    group, split, first, second = draw_planes(counter_ptr, groups, lag, SPLITS, SPLITS, TICKETS)
    n, o, split, start, stop = own_range(group * SPLITS + split, C, HW, SPLITS, BLOCK_C, BLOCK_P)
    o0 = group % tl.cdiv(C, BLOCK_C) * BLOCK_C
    c = source_channels(o, C, SHUFFLE)
    image = image_offset(n, C, HW)
    row = moments_ptr + n.to(tl.int64) * 2 * C + c
    if first:
        total, m2 = range_moments(x_ptr + image, o0, start, stop, C_V, HW, VEC_C, SHUFFLE, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC)
        mean = total / HW
        last = first
        if SPLITS > 1:
            slot = part_ptr + (n.to(tl.int64) * SPLITS + split) * 2 * C + c
            tl.store(slot, total, mask=o < C)
            tl.store(slot + C, m2, mask=o < C)
            last = arrive(counter_ptr + group, SPLITS)
            if last:
                mean, m2 = combine_moments(part_ptr, n, c, o < C, C, HW, SPLITS, BLOCK_C, BLOCK_P, ACC)
        if last:
            tl.store(row, mean, mask=o < C)
            tl.store(row + C, m2, mask=o < C)
            if TICKETS:
                arrive(counter_ptr + groups + group, SPLITS + 1)  # with the moments stored
    if second:
        await_sums(counter_ptr, group, groups, SPLITS, TICKETS)
        mean = tl.load(row, mask=o < C, other=0.0)
        m2 = tl.load(row + C, mask=o < C, other=0.0)
        normed, a, b, _ = plane_coefficients(
            cweight_ptr, cbias_ptr, sweight_ptr, sbias_ptr, norm_weight_ptr, norm_bias_ptr, c, mean, m2, C, HW, per_group, SHUFFLE, HAS_AFFINE, EPS,
            ACC,
        )  # fmt: skip
        for p0 in range(start, stop, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            x = load_source(x_ptr + image, o0, p, C_V, HW, VEC_C, SHUFFLE, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC, True)
            gate_planes(
                x, residual_ptr, y_ptr, image, o, p, mean, normed, a, b, C, HW, SHUFFLE, GATE, HAS_RESIDUAL, ACTIVATION, CHANNELS_LAST, LARGE, ACC,
                True,
            )  # fmt: skip


@triton.jit
def plane_ticket_bwd_kernel(
    g_ptr, x_ptr, cweight_ptr, cbias_ptr, sweight_ptr, sbias_ptr, norm_weight_ptr, norm_bias_ptr, moments_ptr, residual_ptr, da_ptr, dx_ptr, part_ptr,
    slots_ptr, counter_ptr, groups, lag, C_V, HW_V, per_group, VEC_C: tl.constexpr, VEC_P: tl.constexpr, SHUFFLE: tl.constexpr,
    HAS_AFFINE: tl.constexpr, EPS: tl.constexpr, GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STORE_DA: tl.constexpr,
    STORE_DX: tl.constexpr, SPLITS: tl.constexpr, TICKETS: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """As plane_gate_bwd_kernel; with STORE_DA the second pass reads da instead of g.

    slots [N, SPLITS, 2, C]: s0 and s1 of each range; counter and programs as forward.
    """
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    group, split, first, second = draw_planes(counter_ptr, groups, lag, SPLITS, SPLITS if STORE_DX else 0, TICKETS)
    n, o, split, start, stop = own_range(group * SPLITS + split, C, HW, SPLITS, BLOCK_C, BLOCK_P)
    o0 = group % tl.cdiv(C, BLOCK_C) * BLOCK_C
    c = source_channels(o, C, SHUFFLE)
    image = image_offset(n, C, HW)
    row = n.to(tl.int64) * 2 * C + c
    inside = (o < C) & (first | second)
    mean = tl.load(moments_ptr + row, mask=inside, other=0.0)
    m2 = tl.load(moments_ptr + row + C, mask=inside, other=0.0)
    normed, a, b, r = plane_coefficients(
        cweight_ptr, cbias_ptr, sweight_ptr, sbias_ptr, norm_weight_ptr, norm_bias_ptr, c, mean, m2, C, HW, per_group, SHUFFLE, HAS_AFFINE, EPS, ACC
    )  # fmt: skip
    if first:
        s0 = tl.zeros([BLOCK_C, BLOCK_P], ACC)
        s1 = tl.zeros([BLOCK_C, BLOCK_P], ACC)
        for p0 in range(start, stop, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            x = load_source(x_ptr + image, o0, p, C_V, HW, VEC_C, SHUFFLE, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC)
            u, w, direct = plane_terms(
                g_ptr, residual_ptr, da_ptr, image, o, p, x, mean, normed, a, b, C, HW, SHUFFLE, GATE, HAS_RESIDUAL, ACTIVATION, STORE_DA,
                CHANNELS_LAST, LARGE, ACC, STORE_DA,
            )  # fmt: skip
            s0 += w
            s1 += w * u
        sum0 = tl.sum(s0, 1)
        sum1 = tl.sum(s1, 1)
        last = first
        if SPLITS > 1:
            slot = slots_ptr + n.to(tl.int64) * SPLITS * 2 * C + c
            tl.store(slot + split * 2 * C, sum0, mask=o < C)
            tl.store(slot + (split * 2 + 1) * C, sum1, mask=o < C)
            last = arrive(counter_ptr + group, SPLITS)
            if last:
                sum0, sum1 = tl.zeros([BLOCK_C], ACC), tl.zeros([BLOCK_C], ACC)
                for i in range(SPLITS):
                    sum0 += tl.load(slot + i * 2 * C, mask=o < C, other=0.0, cache_modifier=".cg")
                    sum1 += tl.load(slot + (i * 2 + 1) * C, mask=o < C, other=0.0, cache_modifier=".cg")
        if last:
            tl.store(part_ptr + row, sum0, mask=o < C)
            tl.store(part_ptr + row + C, tl.where(normed, r * sum1, mean * sum0), mask=o < C)
            if STORE_DX and TICKETS:
                arrive(counter_ptr + groups + group, SPLITS + 1)  # with the sums stored
    if STORE_DX:
        if second:
            await_sums(counter_ptr, group, groups, SPLITS, TICKETS)  # after which da is visible, too
            sum0 = tl.load(part_ptr + row, mask=o < C, other=0.0)
            sum1 = tl.load(part_ptr + row + C, mask=o < C, other=0.0)
            constant, linear = plane_slopes(sum0, sum1, normed, b, r, HW, SHUFFLE)
            for p0 in range(start, stop, BLOCK_P):
                p = p0 + tl.arange(0, BLOCK_P)
                x = load_source(x_ptr + image, o0, p, C_V, HW, VEC_C, SHUFFLE, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC, True)
                u, w, direct = plane_terms(
                    da_ptr if STORE_DA else g_ptr, residual_ptr, da_ptr, image, o, p, x, mean, normed, a, b, C, HW, SHUFFLE, GATE,
                    HAS_RESIDUAL and not STORE_DA, "none" if STORE_DA else ACTIVATION, False, CHANNELS_LAST, LARGE, ACC, True,
                )  # fmt: skip
                dx = direct + constant[:, None] + tl.where(normed[:, None], linear[:, None] * u, 0.0)
                store_source(dx_ptr + image, dx, o0, p, C_V, HW, VEC_C, SHUFFLE, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, True)
