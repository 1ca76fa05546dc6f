"""How close a result must be to the fp64 reference: the one formula of all numerical tests."""

import math

import torch
from torch import Tensor


def largest(*tensors: Tensor) -> float:
    """The largest finite magnitude."""
    return max(t[t.isfinite()].abs().max().item() if t.isfinite().any() else 0.0 for t in tensors)


def limit(expected: Tensor, eager: Tensor, terms: int, accumulator: torch.dtype, scale: float | None = None) -> float:
    """The largest error allowed: max(2 max(eps, eps_acc sqrt(terms)) max|expected|, 2 x the error of `eager`).

    expected: the fp64 reference. eager: torch's own result in the accumulator's arithmetic on the same input, cast to the result's dtype, whose
    eps is meant. terms: how many rounded steps one element of the result comes from. scale: instead of max|expected|, for a single number. It is
    never more than 2 eps sqrt(terms) max|expected|, and for half precisions much less: these are accumulated in fp32, with eps_acc, and rounded
    once or twice on the way out.
    """
    finite = expected.isfinite() & eager.isfinite()
    if not finite.any():
        return 0.0
    rounding = max(torch.finfo(eager.dtype).eps, torch.finfo(accumulator).eps * math.sqrt(terms))
    error = (eager[finite].double() - expected[finite]).abs().max().item()
    return max(2 * rounding * (largest(expected) if scale is None else scale), 2 * error)


def assert_close(
    name: str, got: Tensor, expected: Tensor, eager: Tensor, *, terms: int, accumulator: torch.dtype, scale: float | None = None
) -> None:  # fmt: skip
    """Same shape and dtype as torch's own result, NaN and Inf in the same places, and within `limit` everywhere else."""
    assert got.shape == eager.shape and got.dtype == eager.dtype, f"{name}: {got.dtype} {list(got.shape)}, not {eager.dtype} {list(eager.shape)}"
    got = got.detach()
    for kind, where in (("NaN", torch.isnan), ("Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        assert torch.equal(where(got), where(eager)), f"{name}: {kind} at {where(got).nonzero().tolist()}, not {where(eager).nonzero().tolist()}"
    finite = got.isfinite() & expected.isfinite()
    if not finite.any():
        return
    error = (got[finite].double() - expected[finite]).abs().max().item()
    allowed = limit(expected, eager, terms, accumulator, scale)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, of values up to {largest(expected):.3g}"
