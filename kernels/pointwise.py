"""Scalar functions and their derivatives, and tile addressing: what every kernel shares.

Comparisons are written so that NaN passes through as it does in torch: `max.f32` and `min.f32` drop it, `where` with the right default does not.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(t):
    return 1.0 / (1.0 + tl.exp(-t))


@triton.jit
def activation(t, NAME: tl.constexpr):
    """a(t) for NAME in none, relu, relu6, leaky_relu (0.01), silu, hardswish, gelu (erf)."""
    if NAME == "relu":
        t = tl.where(t < 0, 0.0, t)
    elif NAME == "relu6":
        t = tl.where(t < 0, 0.0, tl.where(t > 6, 6.0, t))
    elif NAME == "leaky_relu":
        t = tl.where(t < 0, 0.01 * t, t)
    elif NAME == "silu":
        t = t * sigmoid(t)
    elif NAME == "hardswish":
        t = tl.where(t < -3, 0.0 * t, tl.where(t > 3, t, t * (t + 3) / 6))
    elif NAME == "gelu":
        t = 0.5 * t * (1 + tl.erf(t * 0.7071067811865476))
    else:
        tl.static_assert(NAME == "none")
    return t


@triton.jit
def activation_grad(t, NAME: tl.constexpr):
    """a'(t), with torch's choice at the kinks."""
    if NAME == "relu":
        d = tl.where(t <= 0, 0.0, 1.0)
    elif NAME == "relu6":
        d = tl.where((t <= 0) | (t >= 6), 0.0, 1.0)
    elif NAME == "leaky_relu":
        d = tl.where(t > 0, 1.0, tl.full(t.shape, 0.01, t.dtype))  # a bare 0.01 would be fp32
    elif NAME == "silu":
        s = sigmoid(t)
        d = s * (1 + t * (1 - s))
    elif NAME == "hardswish":
        d = tl.where(t <= -3, 0.0, tl.where(t >= 3, 1.0, t / 3 + 0.5))
    elif NAME == "gelu":
        d = 0.5 * (1 + tl.erf(t * 0.7071067811865476)) + t * tl.exp(-0.5 * t * t) * 0.3989422804014327
    else:
        tl.static_assert(NAME == "none")
        d = tl.full(t.shape, 1.0, t.dtype)
    return d


@triton.jit
def gate_function(t, NAME: tl.constexpr):
    """f(t) for NAME in sigmoid, hard_sigmoid, relu, none."""
    if NAME == "sigmoid":
        t = sigmoid(t)
    elif NAME == "hard_sigmoid":
        t = tl.where(t < -3, 0.0, tl.where(t > 3, 1.0, t / 6 + 0.5))
    elif NAME == "relu":
        t = tl.where(t < 0, 0.0, t)
    else:
        tl.static_assert(NAME == "none")
    return t


@triton.jit
def gate_grad(t, NAME: tl.constexpr):
    """f'(t)."""
    if NAME == "sigmoid":
        s = sigmoid(t)
        d = s * (1 - s)
    elif NAME == "hard_sigmoid":
        d = tl.where((t > -3) & (t < 3), 1.0 / 6, 0.0)  # in fp32 for fp64 too, as in torch
    elif NAME == "relu":
        d = tl.where(t <= 0, 0.0, 1.0)
    else:
        tl.static_assert(NAME == "none")
        d = tl.full(t.shape, 1.0, t.dtype)
    return d


@triton.jit
def chain(g, slope, NAME: tl.constexpr):
    """g f'(t), slope = f'(t), as torch multiplies: where a kink cuts the gradient off it is 0 even of g = Inf, which a smooth function makes NaN."""
    found = g * slope
    if NAME != "sigmoid" and NAME != "silu" and NAME != "gelu" and NAME != "none":
        found = tl.where(slope == 0, 0.0, found)
    return found


@triton.jit
def image_offset(n, C, HW):
    """Offset of image n in elements; in int64, because a tensor may pass 2**31 elements."""
    return n.to(tl.int64) * C * HW


@triton.jit
def tile_offsets(c, p, C, HW, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr):
    """Offsets inside one image of the tile c [BLOCK_C, 1] x p [1, BLOCK_P]; LARGE: an image may pass 2**31 elements."""
    if LARGE:
        c = c.to(tl.int64)
        p = p.to(tl.int64)
    if CHANNELS_LAST:
        offsets = p * C + c
    else:
        offsets = c * HW + p
    return offsets


@triton.jit
def own_tile(C, HW, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """The one tile of one image that a program of an elementwise pass owns: n, c [BLOCK_C], p [BLOCK_P], and of the tile the mask, the image's offset
    and the offsets inside it. The last tile comes first: a pass that reduces the map read it last, so that the cache still has it."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks_p = tl.cdiv(HW, BLOCK_P)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    n = program // (blocks_c * blocks_p)
    block = program % (blocks_c * blocks_p)
    c = block // blocks_p * BLOCK_C + tl.arange(0, BLOCK_C)
    p = block % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (c[:, None] < C) & (p[None, :] < HW)
    return n, c, p, mask, image_offset(n, C, HW), tile_offsets(c[:, None], p[None, :], C, HW, CHANNELS_LAST, LARGE)


@triton.jit
def own_range(program, C, HW, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """What a program owns that walks through one of SPLITS ranges of positions of BLOCK_C channels of an image: n, c [BLOCK_C], the range's
    number, its first position, and the one after its last."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    split = program % SPLITS
    c = program // SPLITS % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    per_split = tl.cdiv(tl.cdiv(HW, BLOCK_P), SPLITS) * BLOCK_P
    start = split * per_split
    return program // SPLITS // blocks_c, c, split, start, tl.minimum(start + per_split, HW)


@triton.jit
def load_tile(ptr, offsets, mask, ACC: tl.constexpr, LAST: tl.constexpr = None):
    """LAST: nobody reads the tile again, so that it need not stay in the cache."""
    if LAST:
        tile = tl.load(ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    else:
        tile = tl.load(ptr + offsets, mask=mask, other=0.0)
    return tile.to(ACC)


@triton.jit
def store_tile(ptr, value, offsets, mask, LAST: tl.constexpr = None):
    """LAST: as in load_tile."""
    value = value.to(ptr.dtype.element_ty)
    if LAST:
        tl.store(ptr + offsets, value, mask=mask, eviction_policy="evict_first")
    else:
        tl.store(ptr + offsets, value, mask=mask)


@triton.jit
def normalised(x, norm, c, inside, ACC: tl.constexpr):
    """norm(x) of a tile and its derivative [BLOCK_C, 1], norm = (weight, bias, mean, var, eps) of a BatchNorm with its running statistics; x and ones
    where these are None. c [BLOCK_C]: the tile's channels, as the norm counts them. Elements outside of a map are not zero any more."""
    weight_ptr, bias_ptr, mean_ptr, var_ptr, eps = norm
    scale = tl.full([x.shape[0], 1], 1.0, ACC)
    if mean_ptr is not None:
        scale = (1.0 / tl.sqrt(tl.load(var_ptr + c, mask=inside, other=1.0).to(ACC) + eps))[:, None]
        if weight_ptr is not None:
            scale *= tl.load(weight_ptr + c, mask=inside, other=0.0).to(ACC)[:, None]
        x = (x - tl.load(mean_ptr + c, mask=inside, other=0.0).to(ACC)[:, None]) * scale
        if bias_ptr is not None:
            x += tl.load(bias_ptr + c, mask=inside, other=0.0).to(ACC)[:, None]
    return x, scale


@triton.jit
def nan_max(value, index, axis: tl.constexpr):
    """Maximum of value over `axis`, NaN if there is one, and the smallest index among the elements that attain it."""
    is_nan = value != value
    any_nan = tl.max(is_nan.to(tl.int32), axis) > 0
    top = tl.max(tl.where(is_nan, float("-inf"), value), axis)
    attains = tl.where(tl.expand_dims(any_nan, axis), is_nan, value == tl.expand_dims(top, axis))
    first = tl.min(tl.where(attains, index, 2147483647), axis)
    return tl.where(any_nan, float("nan"), top), first


@triton.jit
def nan_max_count(value, count, axis: tl.constexpr):
    """Maximum of value over `axis`, NaN if there is one, and how many elements attain it (`count` each)."""
    is_nan = value != value
    any_nan = tl.max(is_nan.to(tl.int32), axis) > 0
    top = tl.max(tl.where(is_nan, float("-inf"), value), axis)
    attains = tl.where(tl.expand_dims(any_nan, axis), is_nan, value == tl.expand_dims(top, axis))
    return tl.where(any_nan, float("nan"), top), tl.sum(tl.where(attains, count, 0), axis)


@triton.jit
def running_max(value, index, mask, top, aux, EVEN: tl.constexpr):
    """Fold value (at positions `index`) into the elementwise running maximum.

    aux is the first position of the maximum, or with EVEN the number of positions that attain it; at the start top = -inf and aux = 2147483647,
    or 0 with EVEN.
    """
    if EVEN:
        higher = mask & ((value > top) | (aux == 0) | ((value != value) & (top == top)))
        aux = tl.where(higher, 1, aux + (mask & (value == top)).to(tl.int32))
    else:
        higher = mask & ((value > top) | (aux == 2147483647) | ((value != value) & (top == top)))
        aux = tl.where(higher, index, aux)
    return tl.where(higher, value, top), aux


@triton.jit
def merge_max(value, kept, top, aux, EVEN: tl.constexpr):
    """Fold the maximum of later positions, and its aux, into that of earlier ones, as `running_max` folds elements."""
    higher = (value > top) | ((value != value) & (top == top))
    if EVEN:
        aux = tl.where(higher, kept, aux + tl.where(value == top, kept, 0))
    else:
        aux = tl.where(higher | ((value == top) & (kept < aux)), kept, aux)
    return tl.where(higher, value, top), aux


@triton.jit
def shared_grad(value, top, g, count):
    """The gradient of a maximum whose ties share it: g / count where value attains top; a product, as in torch's amax, so NaN in top or g spreads."""
    share = tl.where(top == top, g / count, float("nan"))
    return share * (value == top).to(share.dtype)


@triton.jit
def reduce_max(top, aux, axis: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        value, kept = nan_max_count(top, aux, axis)
    else:
        value, kept = nan_max(top, aux, axis)
    return value, kept
