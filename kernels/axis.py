"""Lines of the map: statistics along each of its axes, and gates that are constant along one.

A line is a row (n, h, c), reduced over w; a column (n, w, c), reduced over h; or a pixel (n, h, w), reduced over c. Statistics and gates of rows are
[N, H, C], of columns [N, W, C], of pixels [N, H, W]. A program owns BLOCK_C channels, BLOCK_W columns and one of SPLITS ranges of rows of one image
and walks down its rows, so it holds whole rows where BLOCK_W >= W, whole columns where SPLITS is 1 and whole pixels where BLOCK_C >= C. What is not
whole it leaves in slots [N, parts, ...], which the last program to arrive for a line folds in order.
"""

import triton
import triton.language as tl

from .excite import arrive
from .gate import output_cotangent
from .pointwise import (
    activation,
    chain,
    gate_function,
    gate_grad,
    image_offset,
    load_tile,
    merge_max,
    reduce_max,
    running_max,
    shared_grad,
    tile_offsets,
)


@triton.jit
def own_lines(C, H, W, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """What this program owns: image, block of channels, block of columns, range of rows, its first row, and the row after its last."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks_w = tl.cdiv(W, BLOCK_W)
    split = tl.program_id(0) % SPLITS
    block = tl.program_id(0) // SPLITS % (blocks_c * blocks_w)
    n = tl.program_id(0) // SPLITS // (blocks_c * blocks_w)
    per_split = tl.cdiv(tl.cdiv(H, BLOCK_H), SPLITS) * BLOCK_H
    start = split * per_split
    return n, block // blocks_w, block % blocks_w, split, start, tl.minimum(start + per_split, H)


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
def fold_lines(
    ptr, aux_ptr, logits_ptr, part_ptr, part_aux_ptr, n, parts, lines, at, mask, size,
    HAS_MAX: tl.constexpr, EVEN: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The slots of the lines `at` folded in order and stored whole."""
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
    rows_ptr, columns_ptr, pixels_ptr, row_aux_ptr, column_aux_ptr, pixel_aux_ptr, row_ptr, column_ptr, pixel_ptr,
    row_part_ptr, column_part_ptr, pixel_part_ptr, row_part_aux_ptr, column_part_aux_ptr, pixel_part_aux_ptr, counter_ptr,
    C, H, W, row_size, column_size, pixel_size, SPLITS: tl.constexpr, HAS_PIXEL: tl.constexpr, HAS_MAX: tl.constexpr, EVEN: tl.constexpr,
    GATE: tl.constexpr, SPLIT_C: tl.constexpr, SPLIT_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """After its last store a program arrives for each of its kinds of lines that others share; the last to arrive folds their slots."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks_w = tl.cdiv(W, BLOCK_W)
    n, block_c, block_w, split, start, stop = own_lines(C, H, W, SPLITS, BLOCK_C, BLOCK_H, BLOCK_W)
    images = tl.num_programs(0) // (blocks_c * blocks_w * SPLITS)
    c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    w = block_w * BLOCK_W + tl.arange(0, BLOCK_W)
    if SPLITS > 1:
        if arrive(counter_ptr + (n * blocks_c + block_c) * blocks_w + block_w, SPLITS):
            at = w[None, :] * C + c[:, None]
            fold_lines(
                columns_ptr, column_aux_ptr, column_ptr, column_part_ptr, column_part_aux_ptr, n, SPLITS, W * C, at,
                (c[:, None] < C) & (w[None, :] < W), column_size, HAS_MAX, EVEN, GATE, ACC,
            )  # fmt: skip
    counter = images * blocks_c * blocks_w
    if SPLIT_W:
        if arrive(counter_ptr + counter + (n * blocks_c + block_c) * SPLITS + split, blocks_w):
            for h0 in range(start, stop, BLOCK_H):
                h = h0 + tl.arange(0, BLOCK_H)
                at = h[None, :] * C + c[:, None]
                fold_lines(
                    rows_ptr, row_aux_ptr, row_ptr, row_part_ptr, row_part_aux_ptr, n, blocks_w, H * C, at,
                    (c[:, None] < C) & (h[None, :] < stop), row_size, HAS_MAX, EVEN, GATE, ACC,
                )  # fmt: skip
    counter += images * blocks_c * SPLITS
    if HAS_PIXEL and SPLIT_C:
        if arrive(counter_ptr + counter + (n * blocks_w + block_w) * SPLITS + split, blocks_c):
            for h0 in range(start, stop, BLOCK_H):
                h = h0 + tl.arange(0, BLOCK_H)
                at = h[:, None] * W + w[None, :]
                fold_lines(
                    pixels_ptr, pixel_aux_ptr, pixel_ptr, pixel_part_ptr, pixel_part_aux_ptr, n, blocks_c, H * W, at,
                    (h[:, None] < stop) & (w[None, :] < W), pixel_size, HAS_MAX, EVEN, GATE, ACC,
                )  # fmt: skip


@triton.jit
def axis_squeeze_fwd_kernel(
    x_ptr, rows_ptr, columns_ptr, pixels_ptr, row_aux_ptr, column_aux_ptr, pixel_aux_ptr,
    row_part_ptr, column_part_ptr, pixel_part_ptr, row_part_aux_ptr, column_part_aux_ptr, pixel_part_aux_ptr, counter_ptr,
    C_V, H, W_V, VEC_C: tl.constexpr, VEC_W: tl.constexpr, SPLITS: tl.constexpr, HAS_PIXEL: tl.constexpr, HAS_MAX: tl.constexpr,
    EVEN: tl.constexpr, SPLIT_C: tl.constexpr, SPLIT_W: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """rows_nkhc = stat_k over w of x_nchw; columns_nkwc = stat_k over h; HAS_PIXEL: pixels_nkhw = stat_k over c; stat = (mean), or with HAS_MAX
    (mean, maximum), and aux the first position of the maximum, or with EVEN how many attain it."""
    C = C_V * VEC_C
    W = W_V * VEC_W
    n, block_c, block_w, split, start, stop = own_lines(C, H, W, SPLITS, BLOCK_C, BLOCK_H, BLOCK_W)
    c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    w = block_w * BLOCK_W + tl.arange(0, BLOCK_W)
    c3 = c[:, None, None]
    w3 = w[None, None, :]
    x_ptr += image_offset(n, C, H * W)
    total = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], ACC)
    top = tl.full([BLOCK_C, BLOCK_H, BLOCK_W], float("-inf"), ACC)
    aux = tl.full([BLOCK_C, BLOCK_H, BLOCK_W], 0 if EVEN else 2147483647, tl.int32)
    for h0 in range(start, stop, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        h3 = h[None, :, None]
        mask = (c3 < C) & (h3 < stop) & (w3 < W)
        x = load_tile(x_ptr, tile_offsets(c3, h3 * W + w3, C, H * W, CHANNELS_LAST, LARGE), mask, ACC)
        total += x
        line_top = tl.zeros([BLOCK_C, BLOCK_H], ACC)
        line_aux = tl.zeros([BLOCK_C, BLOCK_H], tl.int32)
        if HAS_MAX:
            top, aux = running_max(x, h3, mask, top, aux, EVEN)
            inside = tl.where(mask, x, float("-inf"))
            line_top, line_aux = reduce_max(inside, tl.where(mask, 1 if EVEN else w3, 0 if EVEN else 2147483647), 2, EVEN)
        store_lines(
            row_part_ptr, row_part_aux_ptr, row_part_ptr, n, block_w, tl.cdiv(W, BLOCK_W), H * C, h[None, :] * C + c[:, None],
            (c[:, None] < C) & (h[None, :] < stop), tl.sum(x, 2), line_top, line_aux, W, not SPLIT_W, HAS_MAX, "none", ACC,
        )  # fmt: skip
        if HAS_PIXEL:
            pixel_top = tl.zeros([BLOCK_H, BLOCK_W], ACC)
            pixel_aux = tl.zeros([BLOCK_H, BLOCK_W], tl.int32)
            if HAS_MAX:
                pixel_top, pixel_aux = reduce_max(inside, tl.where(mask, 1 if EVEN else c3, 0 if EVEN else 2147483647), 0, EVEN)
            store_lines(
                pixel_part_ptr, pixel_part_aux_ptr, pixel_part_ptr, n, block_c, tl.cdiv(C, BLOCK_C), H * W, h[:, None] * W + w[None, :],
                (h[:, None] < stop) & (w[None, :] < W), tl.sum(x, 0), pixel_top, pixel_aux, C, not SPLIT_C, HAS_MAX, "none", ACC,
            )  # fmt: skip
    column_top = tl.zeros([BLOCK_C, BLOCK_W], ACC)
    column_aux = tl.zeros([BLOCK_C, BLOCK_W], tl.int32)
    if HAS_MAX:
        column_top, column_aux = reduce_max(top, aux, 1, EVEN)
    store_lines(
        column_part_ptr, column_part_aux_ptr, column_part_ptr, n, split, SPLITS, W * C, w[None, :] * C + c[:, None],
        (c[:, None] < C) & (w[None, :] < W), tl.sum(total, 1), column_top, column_aux, H, SPLITS == 1, HAS_MAX, "none", ACC,
    )  # fmt: skip
    fold_axes(
        rows_ptr, columns_ptr, pixels_ptr, row_aux_ptr, column_aux_ptr, pixel_aux_ptr, rows_ptr, columns_ptr, pixels_ptr,
        row_part_ptr, column_part_ptr, pixel_part_ptr, row_part_aux_ptr, column_part_aux_ptr, pixel_part_aux_ptr, counter_ptr,
        C, H, W, W, H, C, SPLITS, HAS_PIXEL, HAS_MAX, EVEN, "none", SPLIT_C, SPLIT_W, BLOCK_C, BLOCK_H, BLOCK_W, ACC,
    )  # fmt: skip


@triton.jit
def load_lines(ptr, n, lines, at, mask, GATE: tl.constexpr, COMBINE: tl.constexpr, ACC: tl.constexpr):
    """Gates of the lines `at`: f(logits); the logits themselves where their sum is what f takes."""
    t = tl.load(ptr + n.to(tl.int64) * lines + at, mask=mask, other=0.0)
    if COMBINE != "logits":
        t = gate_function(t, GATE)
    return t


@triton.jit
def apply_lines(x, r, q, p, GATE: tl.constexpr, COMBINE: tl.constexpr, HAS_PIXEL: tl.constexpr):
    """x [BLOCK_C, BLOCK_H, BLOCK_W] times the gates of its row r, its column q and, with HAS_PIXEL, its pixel p.

    product: r q; logits: f(r + q); mean: of two or three gates, as a sum of gated maps, since x may be Inf where one of its gates is zero.
    """
    if COMBINE == "product":
        y = x * q * r
    elif COMBINE == "logits":
        y = x * gate_function(r + q, GATE)
    else:
        tl.static_assert(COMBINE == "mean")
        if HAS_PIXEL:
            y = (x * r + x * q + x * p) / 3
        else:
            y = (x * r + x * q) / 2
    return y


@triton.jit
def axis_gate_fwd_kernel(
    x_ptr, row_ptr, column_ptr, pixel_ptr, residual_ptr, y_ptr, C_V, H, W_V, VEC_C: tl.constexpr, VEC_W: tl.constexpr,
    SPLITS: tl.constexpr, GATE: tl.constexpr, COMBINE: tl.constexpr, HAS_PIXEL: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y_nchw = a(x_nchw combine(f(row_nhc), f(column_nwc), f(pixel_nhw)) + residual_nchw)."""
    C = C_V * VEC_C
    W = W_V * VEC_W
    n, block_c, block_w, _, start, stop = own_lines(C, H, W, SPLITS, BLOCK_C, BLOCK_H, BLOCK_W)
    c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    w = block_w * BLOCK_W + tl.arange(0, BLOCK_W)
    c3 = c[:, None, None]
    w3 = w[None, None, :]
    image = image_offset(n, C, H * W)
    q = load_lines(column_ptr, n, W * C, w3 * C + c3, (c3 < C) & (w3 < W), GATE, COMBINE, ACC)
    for h0 in range(start, stop, BLOCK_H):
        h3 = (h0 + tl.arange(0, BLOCK_H))[None, :, None]
        mask = (c3 < C) & (h3 < stop) & (w3 < W)
        offsets = tile_offsets(c3, h3 * W + w3, C, H * W, CHANNELS_LAST, LARGE)
        r = load_lines(row_ptr, n, H * C, h3 * C + c3, (c3 < C) & (h3 < stop), GATE, COMBINE, ACC)
        p = r
        if HAS_PIXEL:
            p = load_lines(pixel_ptr, n, H * W, h3 * W + w3, (h3 < stop) & (w3 < W), GATE, COMBINE, ACC)
        y = apply_lines(load_tile(x_ptr + image, offsets, mask, ACC), r, q, p, GATE, COMBINE, HAS_PIXEL)
        if HAS_RESIDUAL:
            y += load_tile(residual_ptr + image, offsets, mask, ACC)
        tl.store(y_ptr + image + offsets, activation(y, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def axis_gate_bwd_kernel(
    g_ptr, x_ptr, row_ptr, column_ptr, pixel_ptr, residual_ptr, da_ptr, drow_ptr, dcolumn_ptr, dpixel_ptr,
    row_part_ptr, column_part_ptr, pixel_part_ptr, counter_ptr, C_V, H, W_V, VEC_C: tl.constexpr, VEC_W: tl.constexpr, SPLITS: tl.constexpr,
    GATE: tl.constexpr, COMBINE: tl.constexpr, HAS_PIXEL: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    STORE_DA: tl.constexpr, SPLIT_C: tl.constexpr, SPLIT_W: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """drow_nhc = sum over w of da_nchw x_nchw dfactor_nchw/drow_nhc; dcolumn_nwc the same over h, HAS_PIXEL: dpixel_nhw over c.

    With STORE_DA it also writes da.
    """
    C = C_V * VEC_C
    W = W_V * VEC_W
    SLOPE: tl.constexpr = "none" if COMBINE == "logits" else GATE
    COUNT: tl.constexpr = 1 if COMBINE != "mean" else 3 if HAS_PIXEL else 2
    n, block_c, block_w, split, start, stop = own_lines(C, H, W, SPLITS, BLOCK_C, BLOCK_H, BLOCK_W)
    c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    w = block_w * BLOCK_W + tl.arange(0, BLOCK_W)
    c3 = c[:, None, None]
    w3 = w[None, None, :]
    image = image_offset(n, C, H * W)
    q = load_lines(column_ptr, n, W * C, w3 * C + c3, (c3 < C) & (w3 < W), GATE, COMBINE, ACC)
    total = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], ACC)
    for h0 in range(start, stop, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        h3 = h[None, :, None]
        mask = (c3 < C) & (h3 < stop) & (w3 < W)
        offsets = tile_offsets(c3, h3 * W + w3, C, H * W, CHANNELS_LAST, LARGE)
        x = load_tile(x_ptr + image, offsets, mask, ACC)
        r = load_lines(row_ptr, n, H * C, h3 * C + c3, (c3 < C) & (h3 < stop), GATE, COMBINE, ACC)
        p = r
        if HAS_PIXEL:
            p = load_lines(pixel_ptr, n, H * W, h3 * W + w3, (h3 < stop) & (w3 < W), GATE, COMBINE, ACC)
        t = apply_lines(x, r, q, p, GATE, COMBINE, HAS_PIXEL)
        da = output_cotangent(g_ptr, residual_ptr, da_ptr, image, offsets, mask, t, 1.0, HAS_RESIDUAL, ACTIVATION, STORE_DA, ACC)
        found = tl.where(mask, da * x, 0.0)
        if COMBINE == "logits":
            found = chain(found, gate_grad(r + q, GATE), GATE)
        of_row = found
        of_column = found
        if COMBINE == "product":
            of_row = found * q
            of_column = found * r
        total += of_column
        store_lines(
            row_part_ptr, row_ptr, row_ptr, n, block_w, tl.cdiv(W, BLOCK_W), H * C, h[None, :] * C + c[:, None],
            (c[:, None] < C) & (h[None, :] < stop), tl.sum(of_row, 2), 0.0, 0, COUNT, not SPLIT_W, False, SLOPE, ACC,
        )  # fmt: skip
        if HAS_PIXEL:
            store_lines(
                pixel_part_ptr, pixel_ptr, pixel_ptr, n, block_c, tl.cdiv(C, BLOCK_C), H * W, h[:, None] * W + w[None, :],
                (h[:, None] < stop) & (w[None, :] < W), tl.sum(found, 0), 0.0, 0, COUNT, not SPLIT_C, False, SLOPE, ACC,
            )  # fmt: skip
    store_lines(
        column_part_ptr, column_ptr, column_ptr, n, split, SPLITS, W * C, w[None, :] * C + c[:, None],
        (c[:, None] < C) & (w[None, :] < W), tl.sum(total, 1), 0.0, 0, COUNT, SPLITS == 1, False, SLOPE, ACC,
    )  # fmt: skip
    fold_axes(
        drow_ptr, dcolumn_ptr, dpixel_ptr, row_ptr, column_ptr, pixel_ptr, row_ptr, column_ptr, pixel_ptr,
        row_part_ptr, column_part_ptr, pixel_part_ptr, row_part_ptr, column_part_ptr, pixel_part_ptr, counter_ptr,
        C, H, W, COUNT, COUNT, COUNT, SPLITS, HAS_PIXEL, False, False, SLOPE, SPLIT_C, SPLIT_W, BLOCK_C, BLOCK_H, BLOCK_W, ACC,
    )  # fmt: skip


@triton.jit
def load_cotangent(
    stats_ptr, dstats_ptr, aux_ptr, n, lines, at, mask, size, HAS_MAX: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of the lines `at`: the mean's gradient for each element, the maximum's, the maximum with EVEN, and aux."""
    base = n.to(tl.int64) * (1 + HAS_MAX) * lines
    dmean = tl.load(dstats_ptr + base + at, mask=mask, other=0.0) / size
    dmax = dmean
    top = dmean
    aux = at
    if HAS_MAX:
        dmax = tl.load(dstats_ptr + base + lines + at, mask=mask, other=0.0)
        aux = tl.load(aux_ptr + n.to(tl.int64) * lines + at, mask=mask, other=1)
        if EVEN:
            top = tl.load(stats_ptr + base + lines + at, mask=mask, other=0.0)
    return dmean, dmax, top, aux


@triton.jit
def spread(x, position, dmean, dmax, top, aux, HAS_MAX: tl.constexpr, EVEN: tl.constexpr):
    """dmean, and dmax where `position` is the maximum's, or with EVEN shared where x attains it."""
    found = dmean
    if HAS_MAX:
        if EVEN:
            found = found + shared_grad(x, top, dmax, aux)
        else:
            found = found + tl.where(position == aux, dmax, 0.0)
    return found


@triton.jit
def axis_gate_bwd_input_kernel(
    g_ptr, x_ptr, row_ptr, column_ptr, pixel_ptr, rows_ptr, columns_ptr, pixels_ptr, drows_ptr, dcolumns_ptr, dpixels_ptr,
    row_aux_ptr, column_aux_ptr, pixel_aux_ptr, dx_ptr, C_V, H, W_V, VEC_C: tl.constexpr, VEC_W: tl.constexpr, SPLITS: tl.constexpr,
    GATE: tl.constexpr, COMBINE: tl.constexpr, HAS_G: tl.constexpr, HAS_PIXEL: tl.constexpr, HAS_MAX: tl.constexpr, EVEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_nchw = da_nchw combine(gates)_nchw (HAS_G) + what comes back through the statistics of its row, its column and its pixel.

    Written once; x is read only with EVEN.
    """
    C = C_V * VEC_C
    W = W_V * VEC_W
    n, block_c, block_w, _, start, stop = own_lines(C, H, W, SPLITS, BLOCK_C, BLOCK_H, BLOCK_W)
    c3 = (block_c * BLOCK_C + tl.arange(0, BLOCK_C))[:, None, None]
    w3 = (block_w * BLOCK_W + tl.arange(0, BLOCK_W))[None, None, :]
    image = image_offset(n, C, H * W)
    inside = (c3 < C) & (w3 < W)
    dmean, dmax, top, aux = load_cotangent(columns_ptr, dcolumns_ptr, column_aux_ptr, n, W * C, w3 * C + c3, inside, H, HAS_MAX, EVEN, ACC)
    q = dmean
    if HAS_G:
        q = load_lines(column_ptr, n, W * C, w3 * C + c3, inside, GATE, COMBINE, ACC)
    for h0 in range(start, stop, BLOCK_H):
        h3 = (h0 + tl.arange(0, BLOCK_H))[None, :, None]
        mask = inside & (h3 < stop)
        offsets = tile_offsets(c3, h3 * W + w3, C, H * W, CHANNELS_LAST, LARGE)
        x = dmean
        if EVEN:
            x = load_tile(x_ptr + image, offsets, mask, ACC)
        in_row = (c3 < C) & (h3 < stop)
        in_pixel = (h3 < stop) & (w3 < W)
        dx = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], ACC)
        if HAS_G:
            r = load_lines(row_ptr, n, H * C, h3 * C + c3, in_row, GATE, COMBINE, ACC)
            p = r
            if HAS_PIXEL:
                p = load_lines(pixel_ptr, n, H * W, h3 * W + w3, in_pixel, GATE, COMBINE, ACC)
            dx += apply_lines(load_tile(g_ptr + image, offsets, mask, ACC), r, q, p, GATE, COMBINE, HAS_PIXEL)
        dx += spread(x, h3, dmean, dmax, top, aux, HAS_MAX, EVEN)
        row = load_cotangent(rows_ptr, drows_ptr, row_aux_ptr, n, H * C, h3 * C + c3, in_row, W, HAS_MAX, EVEN, ACC)
        dx += spread(x, w3, row[0], row[1], row[2], row[3], HAS_MAX, EVEN)
        if HAS_PIXEL:
            pixel = load_cotangent(pixels_ptr, dpixels_ptr, pixel_aux_ptr, n, H * W, h3 * W + w3, in_pixel, C, HAS_MAX, EVEN, ACC)
            dx += spread(x, c3, pixel[0], pixel[1], pixel[2], pixel[3], HAS_MAX, EVEN)
        tl.store(dx_ptr + image + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
