"""Triton's interpreter, adjusted for tests: rounding as on a GPU, speed, launches recorded, programs in another order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

from perf.counting import read_indices

FLOATS = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32, tl.float64: torch.float64}


def faithful() -> None:
    """Make the interpreter convert to bfloat16 and drop NaN as GPUs do, and run 2.5 times as fast.

    It keeps bfloat16 as uint16, truncates float32 -> bfloat16 where a GPU rounds to nearest, loses small numbers on the way back, and converts
    float64 -> bfloat16, and multiplies matrices of bfloat16, as if they were integers. Its tl.maximum and tl.minimum pass NaN on, where a GPU's,
    unless told otherwise, return the other number. It patches triton.language at every call of a device function, where once per launch is enough,
    and checks every integer sum for overflow, of which small maps are far.
    """
    builder = interpreter.InterpreterBuilder
    original = builder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if tl.bfloat16 not in kinds or not FLOATS.keys() >= set(kinds):
            return original(self, source, target)
        stored = torch.tensor(source.data)
        converted = (stored.view(torch.bfloat16) if kinds[0] == tl.bfloat16 else stored).to(FLOATS[kinds[1]])
        return interpreter.TensorHandle((converted.view(torch.uint16) if kinds[1] == tl.bfloat16 else converted).numpy(), kinds[1])

    multiply = builder.create_dot

    def dot(self: Any, left: Any, right: Any, *args: Any) -> Any:
        return multiply(self, *(cast(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (left, right)), *args)

    read_indices()
    patch_lang = interpreter._patch_lang
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    builder.cast_impl = cast
    builder.create_dot = dot
    builder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    builder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
    interpreter._patch_lang = lambda kernel: patch_lang(everything)
    interpreter.InterpretedFunction.__call__ = call
    shared = interpreter.interpreter_builder
    shared.options = dataclasses.replace(shared.options, sanitize_overflow=False)


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The names of the kernels launched inside the block, in order."""
    names: list[str] = []
    run: Callable = interpreter.InterpretedFunction.run

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(kernel.fn.__name__)
        return run(kernel, *args, **kwargs)

    with mock.patch.object(interpreter.InterpretedFunction, "run", launch):
        yield names


@contextmanager
def reversed_programs() -> Iterator[None]:
    """The programs of every grid run in the reverse order inside the block."""
    set_grid_idx = interpreter.InterpreterBuilder.set_grid_idx

    def reverse(self: Any, x: int, y: int, z: int) -> None:
        set_grid_idx(self, self.grid_dim[0] - 1 - x, y, z)

    with mock.patch.object(interpreter.InterpreterBuilder, "set_grid_idx", reverse):
        yield
