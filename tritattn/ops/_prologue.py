"""What stands before a block in a network, a BatchNorm in evaluation and an activation, as part of the block's own passes: u = b(norm(x)) is computed
wherever a tile of x is loaded, and never stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _checks, _excite
from ._launch import NO_NORM, Norm


def prepared(x: Tensor, before_norm: Any, spec: Any) -> tuple[Tensor, Norm, Any]:
    """(map, norm, spec) for an op whose inputs these are: checks spec.before and before_norm, which is called where it cannot be part of the passes.

    They apply running statistics, and give the norm's parameters no gradient.
    """
    _checks.choice("before", spec.before, reference.HIDDEN)
    if before_norm is None:
        return x, NO_NORM, spec
    if not isinstance(before_norm, torch.nn.Module):
        raise TypeError(f"before_norm: got {type(before_norm).__name__}, expected None or a module")
    if isinstance(before_norm, _excite.Norm) and before_norm.num_features != x.shape[1]:
        given = f"a {type(before_norm).__name__} of {before_norm.num_features} channels"
        raise ValueError(f"before_norm: got {given}, expected {x.shape[1]}, those of x")
    if not _excite.plain_norm(before_norm) or (torch.is_grad_enabled() and any(p.requires_grad for p in before_norm.parameters())):
        y = before_norm(x)
        if y.shape != x.shape:
            raise ValueError(f"before_norm: got a module that returns shape {list(y.shape)}, expected {list(x.shape)}, the shape of x")
        return y, NO_NORM, spec
    norm: Any = before_norm.weight, before_norm.bias, before_norm.running_mean, before_norm.running_var
    for t in norm:
        _checks.parameter("before_norm", t, x, (x.shape[1],))
    (eps,) = {before_norm.eps}  # through a set: dynamo writes no number into a string that it takes for dynamic
    return x, norm, spec._replace(eps=repr(eps))
