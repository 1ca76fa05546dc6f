"""The cases of tests/cases.py on a device, and sizes for it.

Most of a run's time goes into compiling kernels, each for its own dtype, layout and options: tests share these where they can.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from cases import MAIN, Inputs, Op, Params, make
from torch import Tensor, nn

SMALL = (3, 24, 9, 7)
REAL = (4, 256, 28, 28)  # several programs per image, vector loads; few enough positions that rounding decides no maximum
TINY = (2, 4, 3, 5)
LAYOUTS = ("contiguous", "channels_last")
# of the main rows at REAL size, in bfloat16 with residual and ReLU; at SMALL size they are contiguous, in fp32
REAL_LAYOUT = {op.name: LAYOUTS[1 - i % 2] for i, op in enumerate(MAIN)}


def size(shape: tuple[int, ...], device: torch.device) -> tuple[int, ...]:
    return shape if device.type == "cuda" else TINY


def moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(device)
    return value.detach().to(device).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def real(op: Op, device: torch.device, seed: int = 0) -> tuple[Inputs, str]:
    """The inputs and the activation of a main row at REAL size."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    case = inputs(op, REAL, device, dtype=dtype, layout=REAL_LAYOUT[op.name], residual=op.epilogue, seed=seed)
    return case, "relu" if op.epilogue else "none"


def inputs(op: Op, shape: tuple[int, ...], device: torch.device, **options: Any) -> Inputs:
    """cases.make on the device; the layout survives the move."""
    made = make(op, size(shape, device), **options)
    params: Params = {name: moved(value, device) for name, value in made.params.items()}
    found = replace(made, x=moved(made.x, device), params=params, residual=moved(made.residual, device))
    assert found.x.stride() == made.x.stride()
    return found
