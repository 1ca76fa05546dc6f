"""A GPU that is not there: Triton compiles for it and launches nothing, so that what a call costs the host can be seen without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tritattn import _library

from .codegen import TARGETS


class _Driver:
    def __init__(self, target: str, launch: Callable[..., None]):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*TARGETS[target])
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20, "multiprocessor_count": 132},
            load_binary=lambda *args: (0, 0, 0, 0, 1024),
            unload_module=lambda *args: None,
        )
        self.launcher_cls = lambda source, metadata: launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


@contextmanager
def standin(target: str = "sm_90", record: bool = True) -> Iterator[list[tuple[Any, ...]]]:
    """Inside the block plain calls on CPU tensors take the kernels; results are whatever the memory holds. Yields what the launches were given, if it
    is recorded."""
    from triton.runtime import driver

    launches: list[tuple[Any, ...]] = []

    def launch(*args: Any) -> None:
        if record:
            launches.append(args)

    active = driver._active
    driver.set_active(_Driver(target, launch))  # type: ignore[arg-type]
    try:
        with mock.patch.object(_library, "_device_problem", lambda device: None):
            yield launches
    finally:
        driver._active = active
