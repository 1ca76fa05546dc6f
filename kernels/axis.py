"""Coordinate, strip and triplet attention: statistics along the axes of the map, and gates that are constant along one.

Lines, and how a program walks along them, are those of lines.py. Of the pointers, along_* are to columns and across_* to pixels where WALK = 1, the
other way round where it is 0; pixels are there with HAS_PIXEL.
"""

import triton
import triton.language as tl

from .gate import output_cotangent
from .lines import fold_axes, own_lines, place_lines, reduce_lines, tile_lines
from .pointwise import activation, chain, gate_function, gate_grad, image_offset, load_tile, running_max, shared_grad, tile_offsets


@triton.jit
def axis_squeeze_fwd_kernel(
    x_ptr, rows_ptr, along_ptr, across_ptr, row_aux_ptr, along_aux_ptr, across_aux_ptr,
    row_part_ptr, along_part_ptr, across_part_ptr, row_part_aux_ptr, along_part_aux_ptr, across_part_aux_ptr, counter_ptr,
    C_V, H, W_V, VEC_C: tl.constexpr, VEC_W: tl.constexpr, SPLITS: tl.constexpr, WALK: tl.constexpr, HAS_PIXEL: tl.constexpr,
    HAS_MAX: tl.constexpr, EVEN: tl.constexpr, SPLIT_ALONG: tl.constexpr, SPLIT_ACROSS: tl.constexpr, SPLIT_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """rows_nkhc = stat_k over w of x_nchw; columns_nkwc = stat_k over h; HAS_PIXEL: pixels_nkhw = stat_k over c; stat = (mean), or with HAS_MAX
    (mean, maximum), and aux the first position of the maximum, or with EVEN how many attain it."""
    C = C_V * VEC_C
    W = W_V * VEC_W
    NONE: tl.constexpr = 0 if EVEN else 2147483647
    n, block_c, block_w, split, start, stop = own_lines(C, H, W, SPLITS, WALK, BLOCK_C, BLOCK_H, BLOCK_W)
    w = (block_w * BLOCK_W + tl.arange(0, BLOCK_W))[None, None, :]
    x_ptr += image_offset(n, C, H * W)
    total = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], ACC)
    top = tl.full([BLOCK_C, BLOCK_H, BLOCK_W], float("-inf"), ACC)
    aux = tl.full([BLOCK_C, BLOCK_H, BLOCK_W], NONE, tl.int32)
    for step in range(start, stop, BLOCK_H if WALK == 1 else BLOCK_C):
        c, h = tile_lines(step, block_c, WALK, BLOCK_C, BLOCK_H)
        mask = (c < C) & (h < H) & (w < W)
        x = load_tile(x_ptr, tile_offsets(c, h * W + w, C, H * W, CHANNELS_LAST, LARGE), mask, ACC)
        inside = tl.where(mask, x, float("-inf"))
        reduce_lines(
            row_part_ptr, row_part_aux_ptr, row_part_ptr, n, block_w, tl.cdiv(W, BLOCK_W), c, h, w, C, H, W, x, inside,
            tl.where(mask, 1 if EVEN else w, NONE), W, 2, not SPLIT_W, HAS_MAX, EVEN, "none", ACC,
        )  # fmt: skip
        if WALK == 0 or HAS_PIXEL:
            blocks_c = tl.cdiv(C, BLOCK_C) if WALK == 1 else 1
            reduce_lines(
                across_part_ptr, across_part_aux_ptr, across_part_ptr, n, block_c, blocks_c, c, h, w, C, H, W, x, inside,
                tl.where(mask, 1 if EVEN else (c if WALK == 1 else h), NONE), C if WALK == 1 else H, 1 - WALK, not SPLIT_ACROSS, HAS_MAX, EVEN,
                "none", ACC,
            )  # fmt: skip
        if WALK == 1 or HAS_PIXEL:
            total += x
            if HAS_MAX:
                top, aux = running_max(x, h if WALK == 1 else c, mask, top, aux, EVEN)
    if WALK == 1 or HAS_PIXEL:
        c, h = tile_lines(start, block_c, WALK, BLOCK_C, BLOCK_H)
        reduce_lines(
            along_part_ptr, along_part_aux_ptr, along_part_ptr, n, split, SPLITS, c, h, w, C, H, W, total, top, aux, H if WALK == 1 else C, WALK,
            not SPLIT_ALONG, HAS_MAX, EVEN, "none", ACC,
        )  # fmt: skip
    fold_axes(
        rows_ptr, along_ptr, across_ptr, row_aux_ptr, along_aux_ptr, across_aux_ptr, rows_ptr, along_ptr, across_ptr, row_part_ptr, along_part_ptr,
        across_part_ptr, row_part_aux_ptr, along_part_aux_ptr, across_part_aux_ptr, counter_ptr, C, H, W, W, H if WALK == 1 else C,
        C if WALK == 1 else H, SPLITS, WALK, HAS_MAX, EVEN, "none", SPLIT_ALONG, SPLIT_ACROSS, SPLIT_W, BLOCK_C, BLOCK_H, BLOCK_W, ACC,
    )  # fmt: skip


@triton.jit
def load_lines(
    ptr, n, c, h, w, C, H, W, AXIS: tl.constexpr, HAS_PIXEL: tl.constexpr, GATE: tl.constexpr, COMBINE: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Gates of the lines along AXIS that cross a tile: f(logits); the logits themselves where their sum is what f takes; zero of pixels not there."""
    if AXIS == 0 and not HAS_PIXEL:
        t = tl.zeros([1, 1, 1], ACC)
    else:
        lines, at, mask = place_lines(c, h, w, C, H, W, AXIS)
        t = tl.load(ptr + n.to(tl.int64) * lines + at, mask=mask, other=0.0)
        if COMBINE != "logits":
            t = gate_function(t, GATE)
    return t


@triton.jit
def apply_lines(x, row, along, across, WALK: tl.constexpr, GATE: tl.constexpr, COMBINE: tl.constexpr, HAS_PIXEL: tl.constexpr):
    """x [BLOCK_C, BLOCK_H, BLOCK_W] times the gates of its row r, its column q and, with HAS_PIXEL, its pixel p.

    product: r q; logits: f(r + q); mean: of two or three gates, as a sum of gated maps, since x may be Inf where one of its gates is zero.
    """
    q = along if WALK == 1 else across
    if COMBINE == "product":
        y = x * q * row
    elif COMBINE == "logits":
        y = x * gate_function(row + q, GATE)
    else:
        tl.static_assert(COMBINE == "mean")
        if HAS_PIXEL:
            y = (x * row + x * q + x * (across if WALK == 1 else along)) / 3
        else:
            y = (x * row + x * q) / 2
    return y


@triton.jit
def axis_gate_fwd_kernel(
    x_ptr, row_ptr, along_ptr, across_ptr, residual_ptr, y_ptr, C_V, H, W_V, VEC_C: tl.constexpr, VEC_W: tl.constexpr,
    SPLITS: tl.constexpr, WALK: tl.constexpr, GATE: tl.constexpr, COMBINE: tl.constexpr, HAS_PIXEL: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y_nchw = a(x_nchw combine(f(row_nhc), f(column_nwc), f(pixel_nhw)) + residual_nchw)."""
    C = C_V * VEC_C
    W = W_V * VEC_W
    n, block_c, block_w, _, start, stop = own_lines(C, H, W, SPLITS, WALK, BLOCK_C, BLOCK_H, BLOCK_W)
    w = (block_w * BLOCK_W + tl.arange(0, BLOCK_W))[None, None, :]
    image = image_offset(n, C, H * W)
    c, h = tile_lines(start, block_c, WALK, BLOCK_C, BLOCK_H)
    along = load_lines(along_ptr, n, c, h, w, C, H, W, WALK, HAS_PIXEL, GATE, COMBINE, ACC)
    for step in range(start, stop, BLOCK_H if WALK == 1 else BLOCK_C):
        c, h = tile_lines(step, block_c, WALK, BLOCK_C, BLOCK_H)
        mask = (c < C) & (h < H) & (w < W)
        offsets = tile_offsets(c, h * W + w, C, H * W, CHANNELS_LAST, LARGE)
        r = load_lines(row_ptr, n, c, h, w, C, H, W, 2, HAS_PIXEL, GATE, COMBINE, ACC)
        across = load_lines(across_ptr, n, c, h, w, C, H, W, 1 - WALK, HAS_PIXEL, GATE, COMBINE, ACC)
        y = load_tile(x_ptr + image, offsets, mask, ACC)
        y = apply_lines(y, r, along, across, WALK, GATE, COMBINE, HAS_PIXEL)
        if HAS_RESIDUAL:
            y += load_tile(residual_ptr + image, offsets, mask, ACC)
        tl.store(y_ptr + image + offsets, activation(y, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def axis_gate_bwd_kernel(
    g_ptr, x_ptr, row_ptr, along_ptr, across_ptr, residual_ptr, da_ptr, drow_ptr, dalong_ptr, dacross_ptr,
    row_part_ptr, along_part_ptr, across_part_ptr, counter_ptr, C_V, H, W_V, VEC_C: tl.constexpr, VEC_W: tl.constexpr, SPLITS: tl.constexpr,
    WALK: tl.constexpr, GATE: tl.constexpr, COMBINE: tl.constexpr, HAS_PIXEL: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, STORE_DA: tl.constexpr, SPLIT_ALONG: tl.constexpr, SPLIT_ACROSS: tl.constexpr, SPLIT_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """drow_nhc = sum over w of da_nchw x_nchw dfactor_nchw/drow_nhc; dcolumn_nwc the same over h, HAS_PIXEL: dpixel_nhw over c.

    With STORE_DA it also writes da.
    """
    C = C_V * VEC_C
    W = W_V * VEC_W
    SLOPE: tl.constexpr = "none" if COMBINE == "logits" else GATE
    COUNT: tl.constexpr = 1 if COMBINE != "mean" else 3 if HAS_PIXEL else 2
    n, block_c, block_w, split, start, stop = own_lines(C, H, W, SPLITS, WALK, BLOCK_C, BLOCK_H, BLOCK_W)
    w = (block_w * BLOCK_W + tl.arange(0, BLOCK_W))[None, None, :]
    image = image_offset(n, C, H * W)
    c, h = tile_lines(start, block_c, WALK, BLOCK_C, BLOCK_H)
    along = load_lines(along_ptr, n, c, h, w, C, H, W, WALK, HAS_PIXEL, GATE, COMBINE, ACC)
    total = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], ACC)
    for step in range(start, stop, BLOCK_H if WALK == 1 else BLOCK_C):
        c, h = tile_lines(step, block_c, WALK, BLOCK_C, BLOCK_H)
        mask = (c < C) & (h < H) & (w < W)
        offsets = tile_offsets(c, h * W + w, C, H * W, CHANNELS_LAST, LARGE)
        x = load_tile(x_ptr + image, offsets, mask, ACC)
        r = load_lines(row_ptr, n, c, h, w, C, H, W, 2, HAS_PIXEL, GATE, COMBINE, ACC)
        across = load_lines(across_ptr, n, c, h, w, C, H, W, 1 - WALK, HAS_PIXEL, GATE, COMBINE, ACC)
        t = apply_lines(x, r, along, across, WALK, GATE, COMBINE, HAS_PIXEL)
        da = output_cotangent(g_ptr, residual_ptr, da_ptr, image, offsets, mask, t, 1.0, HAS_RESIDUAL, ACTIVATION, STORE_DA, ACC)
        found = tl.where(mask, da * x, 0.0)
        q = along if WALK == 1 else across
        if COMBINE == "logits":
            found = chain(found, gate_grad(r + q, GATE), GATE)
        of_row = found
        of_column = found
        if COMBINE == "product":
            of_row = found * q
            of_column = found * r
        reduce_lines(
            row_part_ptr, row_ptr, row_ptr, n, block_w, tl.cdiv(W, BLOCK_W), c, h, w, C, H, W, of_row, of_row, mask, COUNT, 2,
            not SPLIT_W, False, False, SLOPE, ACC,
        )  # fmt: skip
        if WALK == 0 or HAS_PIXEL:
            blocks_c = tl.cdiv(C, BLOCK_C) if WALK == 1 else 1
            of_across = found if WALK == 1 else of_column
            reduce_lines(
                across_part_ptr, across_ptr, across_ptr, n, block_c, blocks_c, c, h, w, C, H, W, of_across, of_across, mask, COUNT, 1 - WALK,
                not SPLIT_ACROSS, False, False, SLOPE, ACC,
            )  # fmt: skip
        total += of_column if WALK == 1 else found
    if WALK == 1 or HAS_PIXEL:
        c, h = tile_lines(start, block_c, WALK, BLOCK_C, BLOCK_H)
        reduce_lines(
            along_part_ptr, along_ptr, along_ptr, n, split, SPLITS, c, h, w, C, H, W, total, total, total, COUNT, WALK,
            not SPLIT_ALONG, False, False, SLOPE, ACC,
        )  # fmt: skip
    fold_axes(
        drow_ptr, dalong_ptr, dacross_ptr, row_ptr, along_ptr, across_ptr, row_ptr, along_ptr, across_ptr, row_part_ptr, along_part_ptr,
        across_part_ptr, row_part_ptr, along_part_ptr, across_part_ptr, counter_ptr, C, H, W, COUNT, COUNT, COUNT, SPLITS, WALK, False, False,
        SLOPE, SPLIT_ALONG, SPLIT_ACROSS, SPLIT_W, BLOCK_C, BLOCK_H, BLOCK_W, ACC,
    )  # fmt: skip


@triton.jit
def load_cotangent(
    stats_ptr, dstats_ptr, aux_ptr, n, c, h, w, C, H, W, size, AXIS: tl.constexpr, HAS_MAX: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of the lines along AXIS that cross a tile: the mean's gradient for each element, the maximum's, the maximum with EVEN, and aux."""
    lines, at, mask = place_lines(c, h, w, C, H, W, AXIS)
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
    g_ptr, x_ptr, row_ptr, along_ptr, across_ptr, row_stats_ptr, along_stats_ptr, across_stats_ptr, drow_ptr, dalong_ptr, dacross_ptr,
    row_aux_ptr, along_aux_ptr, across_aux_ptr, dx_ptr, C_V, H, W_V, VEC_C: tl.constexpr, VEC_W: tl.constexpr, SPLITS: tl.constexpr,
    WALK: tl.constexpr, GATE: tl.constexpr, COMBINE: tl.constexpr, HAS_G: tl.constexpr, HAS_PIXEL: tl.constexpr, HAS_MAX: tl.constexpr,
    EVEN: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dx_nchw = da_nchw combine(gates)_nchw (HAS_G) + what comes back through the statistics of its row, its column and its pixel.

    Written once; x is read only with EVEN.
    """
    C = C_V * VEC_C
    W = W_V * VEC_W
    n, block_c, block_w, _, start, stop = own_lines(C, H, W, SPLITS, WALK, BLOCK_C, BLOCK_H, BLOCK_W)
    w = (block_w * BLOCK_W + tl.arange(0, BLOCK_W))[None, None, :]
    image = image_offset(n, C, H * W)
    c, h = tile_lines(start, block_c, WALK, BLOCK_C, BLOCK_H)
    if WALK == 1 or HAS_PIXEL:
        size = H if WALK == 1 else C
        kept = load_cotangent(along_stats_ptr, dalong_ptr, along_aux_ptr, n, c, h, w, C, H, W, size, WALK, HAS_MAX, EVEN, ACC)
    if HAS_G:
        along = load_lines(along_ptr, n, c, h, w, C, H, W, WALK, HAS_PIXEL, GATE, COMBINE, ACC)
    for step in range(start, stop, BLOCK_H if WALK == 1 else BLOCK_C):
        c, h = tile_lines(step, block_c, WALK, BLOCK_C, BLOCK_H)
        mask = (c < C) & (h < H) & (w < W)
        offsets = tile_offsets(c, h * W + w, C, H * W, CHANNELS_LAST, LARGE)
        dx = tl.zeros([BLOCK_C, BLOCK_H, BLOCK_W], ACC)
        x = dx
        if EVEN:
            x = load_tile(x_ptr + image, offsets, mask, ACC)
        if HAS_G:
            r = load_lines(row_ptr, n, c, h, w, C, H, W, 2, HAS_PIXEL, GATE, COMBINE, ACC)
            across = load_lines(across_ptr, n, c, h, w, C, H, W, 1 - WALK, HAS_PIXEL, GATE, COMBINE, ACC)
            g = load_tile(g_ptr + image, offsets, mask, ACC)
            dx += apply_lines(g, r, along, across, WALK, GATE, COMBINE, HAS_PIXEL)
        row = load_cotangent(row_stats_ptr, drow_ptr, row_aux_ptr, n, c, h, w, C, H, W, W, 2, HAS_MAX, EVEN, ACC)
        dx += spread(x, w, row[0], row[1], row[2], row[3], HAS_MAX, EVEN)
        if WALK == 0 or HAS_PIXEL:
            size = C if WALK == 1 else H
            now = load_cotangent(across_stats_ptr, dacross_ptr, across_aux_ptr, n, c, h, w, C, H, W, size, 1 - WALK, HAS_MAX, EVEN, ACC)
            dx += spread(x, c if WALK == 1 else h, now[0], now[1], now[2], now[3], HAS_MAX, EVEN)
        if WALK == 1 or HAS_PIXEL:
            dx += spread(x, h if WALK == 1 else c, kept[0], kept[1], kept[2], kept[3], HAS_MAX, EVEN)
        tl.store(dx_ptr + image + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
