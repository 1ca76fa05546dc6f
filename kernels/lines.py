"""The lines of a tile [BLOCK_C, BLOCK_H, BLOCK_W] of the map: what a program owns, where statistics and gates of lines lie, and sums that it shares.

A line is a row (n, h, c), reduced over w, axis 2; a column (n, w, c), over h, axis 1; or a pixel (n, h, w), over c, axis 0. Statistics and gates of
rows are [N, H, C], of columns [N, W, C], of pixels [N, H, W].

A program walks along an axis. WALK = 1: it owns BLOCK_C channels and BLOCK_W columns of an image and walks down its rows. WALK = 0: a tile holds
whole planes, and it walks through the channels. SPLITS programs share a walk. The lines along the walk it has at its end, columns or pixels; rows,
and the lines across, pixels or columns, at each step. Of a line that is not whole it leaves its share in a slot of [N, parts, ...], and the last
program to arrive for that line folds them in order.
"""

import triton
import triton.language as tl

from .excite import arrive
from .pointwise import chain, gate_grad, merge_max, reduce_max


@triton.jit
def own_lines(
    C, H, W, SPLITS: tl.constexpr, WALK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """What this program owns: image, block of channels, block of columns, range of the walk, its first channel or row, and the one after its last."""
    STEP: tl.constexpr = BLOCK_H if WALK == 1 else BLOCK_C
    blocks_c = tl.cdiv(C, BLOCK_C) if WALK == 1 else 1
    blocks_w = tl.cdiv(W, BLOCK_W)
    size = H if WALK == 1 else C
    split = tl.program_id(0) % SPLITS
    block = tl.program_id(0) // SPLITS % (blocks_c * blocks_w)
    n = tl.program_id(0) // SPLITS // (blocks_c * blocks_w)
    per_split = tl.cdiv(tl.cdiv(size, STEP), SPLITS) * STEP
    start = split * per_split
    return n, block // blocks_w, block % blocks_w, split, start, tl.minimum(start + per_split, size)


@triton.jit
def tile_lines(step, block_c, WALK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr):
    """Channels [BLOCK_C, 1, 1] and rows [1, BLOCK_H, 1] of the tile at a step of the walk."""
    c = tl.arange(0, BLOCK_C)[:, None, None] + (block_c * BLOCK_C if WALK == 1 else step)
    h = tl.arange(0, BLOCK_H)[None, :, None] + (step if WALK == 1 else 0)
    return c, h


@triton.jit
def place_lines(c, h, w, C, H, W, AXIS: tl.constexpr):
    """Of the lines along AXIS that cross a tile: how many an image has, where each lies among them, and whether there is one."""
    if AXIS == 2:
        lines, at, mask = H * C, h * C + c, (h < H) & (c < C)
    elif AXIS == 1:
        lines, at, mask = W * C, w * C + c, (w < W) & (c < C)
    else:
        lines, at, mask = H * W, h * W + w, (h < H) & (w < W)
    return lines, at, mask


@triton.jit
def settled(total, logits_ptr, at, mask, size, GATE: tl.constexpr, ACC: tl.constexpr):
    """The total of a line divided by `size`; with a gate also chained with it, so that a gate's gradient becomes its logit's."""
    total = total / size
    if GATE != "none":
        total = chain(total, gate_grad(tl.load(logits_ptr + at, mask=mask, other=0.0), GATE), GATE)
    return total


@triton.jit
def store_lines(
    ptr, aux_ptr, logits_ptr, n, part, parts, lines, at, mask, total, top, aux, size,
    WHOLE: tl.constexpr, HAS_MAX: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Statistics of the lines `at`, of `lines` in an image: into [N, 1 + HAS_MAX, lines] where they are WHOLE, else raw into slot `part` of
    [N, parts, 1 + HAS_MAX, lines]; aux likewise without the second dimension."""
    slot = n.to(tl.int64) * parts + part
    if WHOLE:
        total = settled(total, logits_ptr, n.to(tl.int64) * lines + at, mask, size, GATE, ACC)
    tl.store(ptr + slot * (1 + HAS_MAX) * lines + at, total, mask=mask)
    if HAS_MAX:
        tl.store(ptr + (slot * 2 + 1) * lines + at, top, mask=mask)
        tl.store(aux_ptr + slot * lines + at, aux, mask=mask)


@triton.jit
def reduce_lines(
    ptr, aux_ptr, logits_ptr, n, part, parts, c, h, w, C, H, W, total, top, aux, size, AXIS: tl.constexpr,
    WHOLE: tl.constexpr, HAS_MAX: tl.constexpr, EVEN: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores what a tile of totals, with HAS_MAX of maxima too, comes to along AXIS."""
    lines, at, mask = place_lines(c, h, w, C, H, W, AXIS)
    line_total = tl.expand_dims(tl.sum(total, AXIS), AXIS)
    line_top = line_total
    line_aux = at
    if HAS_MAX:
        line_top, line_aux = reduce_max(top, aux, AXIS, EVEN)
        line_top = tl.expand_dims(line_top, AXIS)
        line_aux = tl.expand_dims(line_aux, AXIS)
    store_lines(ptr, aux_ptr, logits_ptr, n, part, parts, lines, at, mask, line_total, line_top, line_aux, size, WHOLE, HAS_MAX, GATE, ACC)


@triton.jit
def fold_lines(
    ptr, aux_ptr, logits_ptr, part_ptr, part_aux_ptr, n, parts, c, h, w, C, H, W, size, AXIS: tl.constexpr,
    HAS_MAX: tl.constexpr, EVEN: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The slots of the tile's lines along AXIS folded in order and stored whole."""
    lines, at, mask = place_lines(c, h, w, C, H, W, AXIS)
    total = tl.zeros(at.shape, ACC)
    top = tl.full(at.shape, float("-inf"), ACC)
    aux = tl.full(at.shape, 0 if EVEN else 2147483647, tl.int32)
    for part in range(parts):
        slot = n.to(tl.int64) * parts + part
        total += tl.load(part_ptr + slot * (1 + HAS_MAX) * lines + at, mask=mask, other=0.0, cache_modifier=".cg")
        if HAS_MAX:
            value = tl.load(part_ptr + (slot * 2 + 1) * lines + at, mask=mask, other=0.0, cache_modifier=".cg")
            kept = tl.load(part_aux_ptr + slot * lines + at, mask=mask, other=0, cache_modifier=".cg")
            top, aux = merge_max(value, kept, top, aux, EVEN)
    store_lines(ptr, aux_ptr, logits_ptr, n, 0, 1, lines, at, mask, total, top, aux, size, True, HAS_MAX, GATE, ACC)


@triton.jit
def fold_axes(
    rows_ptr, along_ptr, across_ptr, row_aux_ptr, along_aux_ptr, across_aux_ptr, row_logits_ptr, along_logits_ptr, across_logits_ptr,
    row_part_ptr, along_part_ptr, across_part_ptr, row_part_aux_ptr, along_part_aux_ptr, across_part_aux_ptr, counter_ptr,
    C, H, W, row_size, along_size, across_size, SPLITS: tl.constexpr, WALK: tl.constexpr, HAS_MAX: tl.constexpr, EVEN: tl.constexpr,
    GATE: tl.constexpr, SPLIT_ALONG: tl.constexpr, SPLIT_ACROSS: tl.constexpr, SPLIT_W: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """After its last store a program arrives for each of its kinds of lines that others share; the last to arrive folds their slots."""
    STEP: tl.constexpr = BLOCK_H if WALK == 1 else BLOCK_C
    blocks_c = tl.cdiv(C, BLOCK_C) if WALK == 1 else 1
    blocks_w = tl.cdiv(W, BLOCK_W)
    n, block_c, block_w, split, start, stop = own_lines(C, H, W, SPLITS, WALK, BLOCK_C, BLOCK_H, BLOCK_W)
    images = tl.num_programs(0) // (blocks_c * blocks_w * SPLITS)
    w = (block_w * BLOCK_W + tl.arange(0, BLOCK_W))[None, None, :]
    if SPLIT_ALONG:
        if arrive(counter_ptr + (n * blocks_c + block_c) * blocks_w + block_w, SPLITS):
            c, h = tile_lines(start, block_c, WALK, BLOCK_C, BLOCK_H)
            fold_lines(
                along_ptr, along_aux_ptr, along_logits_ptr, along_part_ptr, along_part_aux_ptr, n, SPLITS, c, h, w, C, H, W, along_size, WALK,
                HAS_MAX, EVEN, GATE, ACC,
            )  # fmt: skip
    counter = images * blocks_c * blocks_w
    if SPLIT_W:
        if arrive(counter_ptr + counter + (n * blocks_c + block_c) * SPLITS + split, blocks_w):
            for step in range(start, stop, STEP):
                c, h = tile_lines(step, block_c, WALK, BLOCK_C, BLOCK_H)
                fold_lines(
                    rows_ptr, row_aux_ptr, row_logits_ptr, row_part_ptr, row_part_aux_ptr, n, blocks_w, c, h, w, C, H, W, row_size, 2,
                    HAS_MAX, EVEN, GATE, ACC,
                )  # fmt: skip
    counter += images * blocks_c * SPLITS
    if SPLIT_ACROSS:
        if arrive(counter_ptr + counter + (n * blocks_w + block_w) * SPLITS + split, blocks_c):
            for step in range(start, stop, STEP):
                c, h = tile_lines(step, block_c, WALK, BLOCK_C, BLOCK_H)
                fold_lines(
                    across_ptr, across_aux_ptr, across_logits_ptr, across_part_ptr, across_part_aux_ptr, n, blocks_c, c, h, w, C, H, W,
                    across_size, 1 - WALK, HAS_MAX, EVEN, GATE, ACC,
                )  # fmt: skip
