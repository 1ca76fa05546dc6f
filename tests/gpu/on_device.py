"""The cases of tests/cases.py on a device, and sizes for it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from cases import Inputs, Op, Params, make
from torch import Tensor, nn

SMALL = (3, 24, 9, 7)
REAL = (4, 256, 28, 28)  # several programs per image, vector loads; few enough positions that rounding decides no maximum
TINY = (2, 4, 3, 5)


def size(shape: tuple[int, ...], device: torch.device) -> tuple[int, ...]:
    return shape if device.type == "cuda" else TINY


def moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(device)
    return value.detach().to(device).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def inputs(op: Op, shape: tuple[int, ...], device: torch.device, **options: Any) -> Inputs:
    """cases.make on the device; the layout survives the move."""
    made = make(op, size(shape, device), **options)
    params: Params = {name: moved(value, device) for name, value in made.params.items()}
    found = replace(made, x=moved(made.x, device), params=params, residual=moved(made.residual, device))
    assert found.x.stride() == made.x.stride()
    return found
