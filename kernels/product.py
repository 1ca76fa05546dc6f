"""Products of matrices on matrix units, as exact as their elements' type."""

import triton
import triton.language as tl


@triton.jit
def bf16_parts(t):
    """fp32 t = a + b + c in bf16, and a again but 0 where it is infinite or NaN, as b and c then are."""
    whole = t.to(tl.bfloat16).to(tl.float32)
    # the largest of fp32 are rounded to infinity
    largest = tl.where(t < 0, -3.3895313892515355e38, 3.3895313892515355e38)
    whole = tl.where((tl.abs(whole) == float("inf")) & (tl.abs(t) < float("inf")), largest, whole)
    a = whole.to(tl.bfloat16)
    rest = t - whole
    finite = rest == rest
    rest = tl.where(finite, rest, 0.0)
    b = rest.to(tl.bfloat16)
    c = (rest - b.to(tl.float32)).to(tl.bfloat16)
    return a, b, c, tl.where(finite, a, 0.0)


@triton.jit
def side_by_side(joined, COUNT: tl.constexpr):
    """[R, COUNT K] of bf16 tensors [R, K] that are joined to [R, K, ...]."""
    # as integers, or Triton 3.7 for sm_100 moves the change of shape into shared memory, where not every shape can be had
    flat = tl.reshape(joined.to(tl.int16, bitcast=True), [joined.shape[0], COUNT * joined.shape[1]])
    return flat.to(tl.bfloat16, bitcast=True)


@triton.jit
def four(a, b, c, d):
    """[R, K, 2, 2] of four [R, K]."""
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def add_product(total, left, right, INTERPRETED: tl.constexpr, ACC: tl.constexpr):
    """total_ij + sum over k of left_ik right_jk; left and right of one type, or left of fp32 and right of bf16.

    Of the nine products of bf16 numbers that hold two fp32 ones eight are added, of the three where right is bf16 all, in one longer sum because some
    matrix units have no room for more than one. Infinite and NaN elements take part in the first alone: infinity times a part that is zero would be
    NaN. INTERPRETED: by Triton's interpreter, which multiplies bf16 numbers as if they were integers.
    """
    if INTERPRETED:
        total = tl.dot(left.to(ACC), tl.trans(right.to(ACC)), total, input_precision="ieee", out_dtype=ACC)
    elif left.dtype == tl.float32:
        a, b, c, a_finite = bf16_parts(left)
        if right.dtype == tl.bfloat16:
            finite = tl.where(tl.abs(right.to(tl.float32)) < float("inf"), right, 0.0)
            left = side_by_side(four(a, b, c, tl.zeros_like(a)), 4)
            right = side_by_side(four(right, finite, finite, finite), 4)
        else:
            d, e, f, d_finite = bf16_parts(right)
            left = side_by_side(tl.join(four(a, a_finite, b, a_finite), four(c, b, b, c)), 8)
            right = side_by_side(tl.join(four(d, e, d_finite, f), four(d_finite, e, f, e)), 8)
        total = tl.dot(left, tl.trans(right), total)
    else:
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee", out_dtype=ACC)
    return total
