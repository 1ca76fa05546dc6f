"""Statistics of the feature map: per channel over positions, and per position over channels."""

import triton
import triton.language as tl

from .excite import arrive, excite_image
from .pointwise import activation, gate_function, image_offset, load_tile, merge_max, normalised, own_range, reduce_max, running_max, tile_offsets


@triton.jit
def store_statistics(
    z_ptr, aux_ptr, c, C, HW, total, square, top, exponential, aux,
    AVG_AT: tl.constexpr, MAX_AT: tl.constexpr, MIX_AT: tl.constexpr, LP_AT: tl.constexpr, LSE_AT: tl.constexpr,
):  # fmt: skip
    """Raw sums of the channels c -> the pooled values z [K, C] of one image; every *_AT is a row of z, or -1.

    MIX_AT = 0, (mean + maximum) / 2, stands alone and keeps the maximum itself in row 1.
    """
    inside = c < C
    if AVG_AT >= 0:
        tl.store(z_ptr + AVG_AT * C + c, total / HW, mask=inside)
    if MAX_AT >= 0:
        tl.store(z_ptr + MAX_AT * C + c, top, mask=inside)
    if MIX_AT >= 0:
        tl.store(z_ptr + c, 0.5 * (total / HW) + 0.5 * top, mask=inside)
        tl.store(z_ptr + C + c, top, mask=inside)
    if LP_AT >= 0:
        tl.store(z_ptr + LP_AT * C + c, tl.sqrt(square), mask=inside)
    if LSE_AT >= 0:
        shift = tl.where((top == float("inf")) | (top == float("-inf")), 0.0, top)
        tl.store(z_ptr + LSE_AT * C + c, shift + tl.log(exponential), mask=inside)
    if MAX_AT >= 0 or MIX_AT >= 0:
        tl.store(aux_ptr + c, aux, mask=inside)


@triton.jit
def squeeze_channels(
    program, x_ptr, other_ptr, sum_ptr, z_ptr, aux_ptr, part_ptr, part_aux_ptr, counter_ptr, hidden_ptr, logits_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr,
    norm, C_V, HW_V, R, K: tl.constexpr, ROWS: tl.constexpr, VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr,
    HAS_OTHER: tl.constexpr, BEFORE: tl.constexpr,
    AVG_AT: tl.constexpr, MAX_AT: tl.constexpr, MIX_AT: tl.constexpr, LP_AT: tl.constexpr, LSE_AT: tl.constexpr, EVEN: tl.constexpr,
    KIND: tl.constexpr, HIDDEN: tl.constexpr, TAPS: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    EXCITE_C: tl.constexpr, EXCITE_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What channel_squeeze_fwd_kernel's program of that number does; true in the last one of an image to arrive, after its excite."""
    C = C_V * VEC_C
    HW = HW_V * VEC_P
    WANT_SUM: tl.constexpr = AVG_AT >= 0 or MIX_AT >= 0
    WANT_MAX: tl.constexpr = MAX_AT >= 0 or MIX_AT >= 0 or LSE_AT >= 0
    n, c, split, start, stop = own_range(program, C, HW, SPLITS, BLOCK_C, BLOCK_P)
    image = image_offset(n, C, HW)

    total = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    square = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    exponential = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    top = tl.full([BLOCK_C, BLOCK_P], float("-inf"), ACC)
    aux = tl.full([BLOCK_C, BLOCK_P], 0 if EVEN else 2147483647, tl.int32)
    for p0 in range(start, stop, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (c[:, None] < C) & (p[None, :] < HW)
        offsets = tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)
        x = load_tile(x_ptr + image, offsets, mask, ACC)
        if HAS_OTHER:
            x += load_tile(other_ptr + image, offsets, mask, ACC)
            tl.store(sum_ptr + image + offsets, x.to(sum_ptr.dtype.element_ty), mask=mask)
        x = activation(normalised(x, norm, c, c < C, ACC)[0], BEFORE)
        if norm[2] is not None:
            x = tl.where(mask, x, 0.0)
        if WANT_SUM:
            total += x
        if LP_AT >= 0:
            square += x * x
        if WANT_MAX:
            before = top
            top, aux = running_max(x, p[None, :], mask, top, aux, EVEN)
            if LSE_AT >= 0:
                shift = tl.where((top == float("inf")) | (top == float("-inf")), 0.0, top)
                exponential = exponential * tl.exp(before - shift) + tl.where(mask, tl.exp(x - shift), 0.0)

    channel_top = tl.zeros([BLOCK_C], ACC)
    channel_aux = tl.zeros([BLOCK_C], tl.int32)
    if WANT_MAX:
        channel_top, channel_aux = reduce_max(top, aux, 1, EVEN)
        if LSE_AT >= 0:
            shift = tl.where((channel_top == float("inf")) | (channel_top == float("-inf")), 0.0, channel_top)
            exponential = tl.where(exponential > 0, exponential * tl.exp(top - shift[:, None]), exponential)
    channel_total = tl.sum(total, 1)
    channel_square = tl.sum(square, 1)
    channel_exponential = tl.sum(exponential, 1)

    z_ptr += n.to(tl.int64) * ROWS * C
    aux_ptr += n.to(tl.int64) * C
    if SPLITS == 1:
        store_statistics(
            z_ptr, aux_ptr, c, C, HW, channel_total, channel_square, channel_top, channel_exponential, channel_aux,
            AVG_AT, MAX_AT, MIX_AT, LP_AT, LSE_AT,
        )  # fmt: skip
    else:
        # part [N, SPLITS, 4, C]: sum, sum of squares, maximum, sum of exponentials
        slot = part_ptr + (n.to(tl.int64) * SPLITS + split) * 4 * C + c
        if WANT_SUM:
            tl.store(slot, channel_total, mask=c < C)
        if LP_AT >= 0:
            tl.store(slot + C, channel_square, mask=c < C)
        if WANT_MAX:
            tl.store(slot + 2 * C, channel_top, mask=c < C)
            tl.store(part_aux_ptr + (n.to(tl.int64) * SPLITS + split) * C + c, channel_aux, mask=c < C)
        if LSE_AT >= 0:
            tl.store(slot + 3 * C, channel_exponential, mask=c < C)

    last = False
    if SPLITS > 1 or KIND != "none":
        last = arrive(counter_ptr + n, tl.cdiv(C, BLOCK_C) * SPLITS)
        if last:
            if SPLITS > 1:
                for c0 in range(0, C, BLOCK_C):
                    combine_splits(
                        z_ptr, aux_ptr, part_ptr + n.to(tl.int64) * SPLITS * 4 * C, part_aux_ptr + n.to(tl.int64) * SPLITS * C,
                        c0 + tl.arange(0, BLOCK_C), C, HW, SPLITS, AVG_AT, MAX_AT, MIX_AT, LP_AT, LSE_AT, EVEN, BLOCK_C, ACC,
                    )  # fmt: skip
                tl.debug_barrier()  # the excite reads what other threads of this program stored
            if KIND != "none":
                excite_image(
                    z_ptr, hidden_ptr + n.to(tl.int64) * K * R, logits_ptr + n.to(tl.int64) * C, w1_ptr, b1_ptr, w2_ptr, b2_ptr, C, R,
                    C, K, TAPS, KIND, HIDDEN, HAS_B1, HAS_B2, EXCITE_C, EXCITE_R, ACC,
                )  # fmt: skip
    return last


@triton.jit
def channel_squeeze_fwd_kernel(
    x_ptr, other_ptr, sum_ptr, z_ptr, aux_ptr, part_ptr, part_aux_ptr, counter_ptr, hidden_ptr, logits_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr,
    bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, C_V, HW_V, R, eps, K: tl.constexpr, ROWS: tl.constexpr,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, SPLITS: tl.constexpr, HAS_OTHER: tl.constexpr, BEFORE: tl.constexpr,
    AVG_AT: tl.constexpr, MAX_AT: tl.constexpr, MIX_AT: tl.constexpr, LP_AT: tl.constexpr, LSE_AT: tl.constexpr, EVEN: tl.constexpr,
    KIND: tl.constexpr, HIDDEN: tl.constexpr, TAPS: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    EXCITE_C: tl.constexpr, EXCITE_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """z_nkc = pool_k over p of u_ncp, u = b(norm(x)); with KIND also logits_nc = excite(z_n). With HAS_OTHER of x_ncp + other_ncp, which is stored
    in sum.

    x, other and sum [N, C, HW] or [N, HW, C]; b of BEFORE; z [N, ROWS, C]; aux [N, C]: first position of the maximum, or with EVEN how many attain
    it. A program owns BLOCK_C channels and one of SPLITS ranges of positions of one image; the last program of an image adds the splits in order
    and runs the excite.
    """
    squeeze_channels(
        tl.program_id(0), x_ptr, other_ptr, sum_ptr, z_ptr, aux_ptr, part_ptr, part_aux_ptr, counter_ptr, hidden_ptr, logits_ptr, w1_ptr, b1_ptr,
        w2_ptr, b2_ptr, (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, eps), C_V, HW_V, R, K, ROWS, VEC_C, VEC_P, SPLITS, HAS_OTHER, BEFORE,
        AVG_AT, MAX_AT, MIX_AT, LP_AT, LSE_AT, EVEN, KIND, HIDDEN, TAPS, HAS_B1, HAS_B2, CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, EXCITE_C, EXCITE_R,
        ACC,
    )  # fmt: skip


@triton.jit
def combine_splits(
    z_ptr, aux_ptr, part_ptr, part_aux_ptr, c, C, HW, SPLITS: tl.constexpr,
    AVG_AT: tl.constexpr, MAX_AT: tl.constexpr, MIX_AT: tl.constexpr, LP_AT: tl.constexpr, LSE_AT: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add the partial statistics of one image's splits in order."""
    inside = c < C
    total = tl.zeros([BLOCK_C], ACC)
    square = tl.zeros([BLOCK_C], ACC)
    exponential = tl.zeros([BLOCK_C], ACC)
    top = tl.full([BLOCK_C], float("-inf"), ACC)
    aux = tl.full([BLOCK_C], 0 if EVEN else 2147483647, tl.int32)
    for split in range(SPLITS):
        slot = part_ptr + split * 4 * C + c
        if AVG_AT >= 0 or MIX_AT >= 0:
            total += tl.load(slot, mask=inside, other=0.0, cache_modifier=".cg")
        if LP_AT >= 0:
            square += tl.load(slot + C, mask=inside, other=0.0, cache_modifier=".cg")
        if MAX_AT >= 0 or MIX_AT >= 0 or LSE_AT >= 0:
            value = tl.load(slot + 2 * C, mask=inside, other=0.0, cache_modifier=".cg")
            kept = tl.load(part_aux_ptr + split * C + c, mask=inside, other=0, cache_modifier=".cg")
            before = top
            top, aux = merge_max(value, kept, top, aux, EVEN)
            if LSE_AT >= 0:
                shift = tl.where((top == float("inf")) | (top == float("-inf")), 0.0, top)
                added = tl.load(slot + 3 * C, mask=inside, other=0.0, cache_modifier=".cg")
                # of a split without positions nothing is added, whatever its maximum is taken to be
                own = tl.where(added == 0, shift, tl.where((value == float("inf")) | (value == float("-inf")), 0.0, value))
                exponential = exponential * tl.exp(before - shift) + added * tl.exp(own - shift)
    store_statistics(z_ptr, aux_ptr, c, C, HW, total, square, top, exponential, aux, AVG_AT, MAX_AT, MIX_AT, LP_AT, LSE_AT)


@triton.jit
def squeeze_positions(
    n, block, x_ptr, logits_ptr, stats_ptr, aux_ptr, C, HW, GATE: tl.constexpr, HAS_CHANNEL: tl.constexpr, EVEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What spatial_squeeze_fwd_kernel's program of that image and block of positions does."""
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    x_ptr += image_offset(n, C, HW)
    total = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    top = tl.full([BLOCK_C, BLOCK_P], float("-inf"), ACC)
    aux = tl.full([BLOCK_C, BLOCK_P], 0 if EVEN else 2147483647, tl.int32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c[:, None] < C) & (p[None, :] < HW)
        u = load_tile(x_ptr, tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE), mask, ACC)
        if HAS_CHANNEL:
            u *= gate_function(tl.load(logits_ptr + n.to(tl.int64) * C + c, mask=c < C, other=0.0), GATE)[:, None]
        total += tl.where(mask, u, 0.0)
        top, aux = running_max(u, c[:, None], mask, top, aux, EVEN)
    value, kept = reduce_max(top, aux, 0, EVEN)
    stats_ptr += n.to(tl.int64) * 2 * HW
    tl.store(stats_ptr + p, tl.sum(total, 0) / C, mask=p < HW)
    tl.store(stats_ptr + HW + p, value, mask=p < HW)
    tl.store(aux_ptr + n.to(tl.int64) * HW + p, kept, mask=p < HW)


@triton.jit
def spatial_squeeze_fwd_kernel(
    x_ptr, logits_ptr, stats_ptr, aux_ptr, C_V, HW_V, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    GATE: tl.constexpr, HAS_CHANNEL: tl.constexpr, EVEN: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """stats_n0p = mean over c of u_ncp, stats_n1p = max over c of u_ncp, u_ncp = x_ncp f(logits_nc), or x_ncp without HAS_CHANNEL.

    stats [N, 2, HW]; aux [N, HW]: first channel of the maximum, or with EVEN how many attain it. A program owns BLOCK_P positions of one image and
    all their channels.
    """
    HW = HW_V * VEC_P
    blocks_p = tl.cdiv(HW, BLOCK_P)
    squeeze_positions(
        tl.program_id(0) // blocks_p, tl.program_id(0) % blocks_p, x_ptr, logits_ptr, stats_ptr, aux_ptr, C_V * VEC_C, HW, GATE, HAS_CHANNEL, EVEN,
        CHANNELS_LAST, LARGE, BLOCK_C, BLOCK_P, ACC,
    )  # fmt: skip


@triton.jit
def spatial_convolution_fwd_kernel(
    stats_ptr, weight_ptr, bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, logits_ptr, H, W, eps,
    MEAN_AT: tl.constexpr, MAX_AT: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BN: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """logits_n(h,w) = BN(sum_(i,j,k) weight_ijk stats_ni(h + j - TAPS // 2, w + k - TAPS // 2) + bias); BN with its running statistics.

    stats [N, 2, H, W] = (mean, max); weight [1, 2, TAPS, TAPS] with MEAN_AT and MAX_AT its input channels, or [1, 1, TAPS, TAPS] on (mean + max) / 2
    when both are 0. A program owns BLOCK_H rows and BLOCK_W columns of one image, and reads a row of statistics for all of its own rows that need it.
    """
    HW = H * W
    blocks_h = tl.cdiv(H, BLOCK_H)
    blocks_w = tl.cdiv(W, BLOCK_W)
    n = tl.program_id(0) // (blocks_h * blocks_w)
    block = tl.program_id(0) % (blocks_h * blocks_w)
    start = block // blocks_w * BLOCK_H
    h = start + tl.arange(0, BLOCK_H)
    w = block % blocks_w * BLOCK_W + tl.arange(0, BLOCK_W)
    stats_ptr += n.to(tl.int64) * 2 * HW
    acc = tl.zeros([BLOCK_H, BLOCK_W], ACC)
    for row in range(tl.maximum(start - TAPS // 2, 0), tl.minimum(start + BLOCK_H + TAPS // 2, H)):
        j = row - h + TAPS // 2
        near = (j >= 0) & (j < TAPS)
        for k in range(TAPS):
            column = w + k - TAPS // 2
            mask = (column >= 0) & (column < W)
            mean = tl.load(stats_ptr + row * W + column, mask=mask, other=0.0)[None, :]
            top = tl.load(stats_ptr + HW + row * W + column, mask=mask, other=0.0)[None, :]
            tap = weight_ptr + j * TAPS + k
            if MEAN_AT == MAX_AT:
                found = (0.5 * mean + 0.5 * top) * tl.load(tap, mask=near, other=0.0).to(ACC)[:, None]
            else:
                found = mean * tl.load(tap + MEAN_AT * TAPS * TAPS, mask=near, other=0.0).to(ACC)[:, None]
                found += top * tl.load(tap + MAX_AT * TAPS * TAPS, mask=near, other=0.0).to(ACC)[:, None]
            acc += tl.where(near[:, None], found, 0.0)  # of a row of Inf nothing reaches rows that do not need it
    if HAS_BIAS:
        acc += tl.load(bias_ptr).to(ACC)
    if HAS_BN:
        scale = 1.0 / tl.sqrt(tl.load(bn_var_ptr).to(ACC) + eps)
        acc = (acc - tl.load(bn_mean_ptr).to(ACC)) * scale
        if bn_weight_ptr is not None:
            acc *= tl.load(bn_weight_ptr).to(ACC)
        if bn_bias_ptr is not None:
            acc += tl.load(bn_bias_ptr).to(ACC)
    inside = (h[:, None] < H) & (w[None, :] < W)
    tl.store(logits_ptr + n.to(tl.int64) * HW + h[:, None] * W + w[None, :], acc.to(logits_ptr.dtype.element_ty), mask=inside)
