"""Triton's interpreter, adjusted for tests: rounding as on a GPU, speed, launches recorded, programs in another order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter


def faithful() -> None:
    """Make the interpreter convert to bfloat16 as GPUs do and run 2.5 times as fast.

    It keeps bfloat16 as uint16, truncates float32 -> bfloat16 where a GPU rounds to nearest, and converts float64 <-> bfloat16 as if they were
    integers. It patches triton.language at every call of a device function, where once per launch is enough, and checks every integer sum for
    overflow, of which maps of a few elements are far.
    """
    builder = interpreter.InterpreterBuilder
    original = builder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        floats = (tl.float16, tl.float32, tl.float64)
        if target.scalar == tl.bfloat16 and source.dtype.scalar in floats:
            rounded = torch.from_numpy(source.data).to(torch.bfloat16).view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, tl.bfloat16)
        return original(self, source, target)

    patch_lang = interpreter._patch_lang
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    builder.cast_impl = cast
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
