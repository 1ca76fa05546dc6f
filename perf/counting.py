"""Counting what a computation moves and launches: torch's operators as they are dispatched, Triton's kernels as the interpreter runs them.

A buffer is of map order when it grows with the map: at least an eighth of its elements, which no statistic of a channel or a pixel reaches, and
not of the size of a parameter. Its traffic is reported in U; all other traffic beside it, as "other".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .cases import Case
from .l2 import IMAGES, SECTOR, Trace, Unpredictable, dram_bytes

ALLOCATIONS = frozenset("empty empty_like empty_strided new_empty new_empty_strided _local_scalar_dense lift_fresh".split())
OVERWRITES = frozenset("copy_ fill_ zero_".split())  # their first argument is not read


@dataclass(frozen=True)
class MapOrder:
    """Tells buffers of map order from the rest, by their number of elements."""

    map_numel: int
    parameter_numels: frozenset[int] = frozenset()

    def __call__(self, numel: int) -> bool:
        return 8 * numel >= self.map_numel and numel not in self.parameter_numels


def map_order(case: Case) -> MapOrder:
    return MapOrder(math.prod(case.shape), frozenset(case.parameter_numels))


@dataclass
class Moved:
    """Bytes by direction and kind, and the number of launches."""

    launches: int = 0
    map_read: float = 0
    map_write: float = 0
    other: float = 0
    names: list[str] = field(default_factory=list)
    dram_u: float | None = None  # predicted, see l2.py

    def add(self, direction: str, of_map: bool, count: float) -> None:
        if not of_map:
            self.other += count
        elif direction == "read":
            self.map_read += count
        else:
            self.map_write += count

    def in_u(self, map_bytes: int) -> dict[str, float]:
        read, write = self.map_read / map_bytes, self.map_write / map_bytes
        return {"read_u": read, "write_u": write, "total_u": read + write, "other_u": self.other / map_bytes}


def distinct_numel(t: Tensor) -> int:
    """Elements of memory behind t: an expanded dimension holds one."""
    count = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= 1 if stride == 0 and size > 1 else size
    return count


def _is_view(schema: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


class Counter(TorchDispatchMode):
    """Counts every operator that reads or writes memory, at the sizes of its arguments and results, as one launch; `trace` gets its accesses."""

    def __init__(self, of_map: MapOrder, trace: Trace | None = None):
        super().__init__()
        self.of_map = of_map
        self.trace = trace
        self.moved = Moved()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if self.paused or name in ALLOCATIONS or _is_view(func._schema):
            return result
        read = tree_leaves((args, kwargs or {}))[name in OVERWRITES :]
        written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if not written or name == "_unsafe_view":
            return result
        self.moved.launches += 1
        self.moved.names.append(name)
        maps: dict[str, list[Tensor]] = {"read": [], "write": []}
        for direction, tensors in (("read", read), ("write", written)):
            for t in tensors:
                if isinstance(t, Tensor):
                    numel = distinct_numel(t)
                    self.moved.add(direction, self.of_map(numel), numel * t.element_size())
                    if self.of_map(numel):
                        maps[direction].append(t)
        if self.trace is not None:
            self.trace.operator(name, maps["read"], maps["write"])
        return result


    def result(self, batch: int, map_bytes: int) -> Moved:
        """What was moved; where it was traced, with what a batch of `batch` would move to and from DRAM. map_bytes: of the batch that was counted."""
        if self.trace is not None:
            with suppress(Unpredictable):
                self.moved.dram_u = dram_bytes(self.trace, batch) / (map_bytes // IMAGES * batch)
        return self.moved


def count_launches(call: Callable[[int], Any], device: str, provider: str) -> int | None:
    """Launches of call(0): a GPU's kernels, copies and fills; on a CPU, operators of eager code. None where they cannot be seen."""
    if device == "cpu":
        if provider == "compile":
            return None
        with Counter(MapOrder(1)) as counter:
            call(0)
        return counter.moved.launches
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            call(0)
            torch.cuda.synchronize()
        events = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
        return sum(not getattr(event, "is_user_annotation", False) for event in events)
    except Exception:  # no profiler for this device, or another one holds it: not a reason to lose the row
        return None


def peak_mb(call: Callable[[int], Any], device: str) -> float | None:
    """Memory that call(0) allocates at its peak, on a GPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call(0)
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 1e6


# -- Triton's interpreter ------------------------------------------------------------------------------------------------------------------

# Method of the interpreter's builder -> (directions, position of the mask among the arguments after the pointers). Unmasked ones call these.
_ACCESSES: dict[str, tuple[tuple[str, ...], int | None]] = {
    "create_masked_load": (("read",), 0),
    "create_masked_store": (("write",), 1),
    "create_atomic_cas": (("read", "write"), None),
}
EVICTION_AT = 3  # position of the eviction policy of both masked ones


def read_indices() -> None:
    """Triton 3.6 makes an array of one element into an index in a way that numpy 2.4 refuses and earlier versions warn of."""
    import triton.runtime.interpreter as interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


@contextmanager
def interpreted(counter: Counter) -> Iterator[Counter]:
    """Inside the block, kernels that the interpreter runs count into `counter`: each access by the distinct sectors that its unmasked lanes touch.

    tritattn is kept from seeing the counter, which it would take for a reason to go through the dispatcher: what counts is the eager path.
    """
    import triton.runtime.interpreter as interpreter

    from tritattn.ops import _launch

    spans: list[tuple[int, int, Tensor, bool]] = []
    patched: set[frozenset[str]] = set()

    def record(builder: Any, address: np.ndarray, directions: Collection[str], early: bool = False) -> None:
        if not address.size:
            return
        first = int(address.flat[0])
        tensor, of_map = next(((t, of_map) for start, end, t, of_map in spans if start <= first < end), (None, False))
        sectors = np.unique(address // SECTOR).astype(np.int64)
        for direction in directions:
            counter.moved.add(direction, of_map, sectors.size * SECTOR)
            if tensor is not None and of_map and counter.trace is not None:
                base = tensor.untyped_storage().data_ptr() // SECTOR
                counter.trace.access(builder.grid_idx[0], counter.trace.buffer(tensor), direction == "write", early, sectors - base)

    def watched(original: Callable[..., Any], directions: Collection[str], mask_at: int | None) -> Callable[..., Any]:
        def access(builder: Any, pointers: Any, *args: Any) -> Any:
            address = pointers.data
            early = mask_at is not None and "EVICT_FIRST" in str(args[EVICTION_AT])
            record(builder, address if mask_at is None else address[args[mask_at].data.astype(bool)], directions, early)
            return original(builder, pointers, *args)

        return access

    def atomic(original: Callable[..., Any]) -> Callable[..., Any]:
        def access(builder: Any, operation: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
            record(builder, pointers.data[mask.data.astype(bool)], ("read", "write"))
            return original(builder, operation, pointers, value, mask, *args)

        return access

    run = interpreter.InterpretedFunction.run

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        arrivals = {t.data_ptr() for t in _launch._counters.values()}  # larger than a small map, and a few of them in use
        spans[:] = [
            (t.data_ptr(), t.data_ptr() + t.untyped_storage().nbytes(), t, counter.of_map(t.numel()) and t.data_ptr() not in arrivals)
            for t in tensors
        ]
        if counter.trace is not None:
            cooperative = bool(kwargs.get("launch_cooperative_grid"))
            counter.trace.launch(kernel.fn.__name__, math.prod(kwargs["grid"]), kwargs.get("num_warps", 4), cooperative)
        counter.moved.launches += 1
        counter.moved.names.append(kernel.fn.__name__)
        patched.clear()
        counter.paused = True  # the interpreter's own tensors
        try:
            return run(kernel, *args, **kwargs)
        finally:
            counter.paused = False

    def call_device_function(function: Any, *args: Any, **kwargs: Any) -> Any:
        modules = frozenset(name for name in ("tl", "core", "language") if name in function.fn.__globals__)
        if modules not in patched:
            interpreter._patch_lang(function.fn)
            patched.add(modules)
        return function.rewrite()(*args, **kwargs)

    builder = interpreter.InterpreterBuilder
    patches = [mock.patch.object(builder, name, watched(getattr(builder, name), *how)) for name, how in _ACCESSES.items()]
    patches.append(mock.patch.object(builder, "create_atomic_rmw", atomic(builder.create_atomic_rmw)))
    patches.append(mock.patch.object(interpreter.InterpretedFunction, "run", launch))
    # the original patches triton.language anew for every call of a device function, which takes half of the time
    patches.append(mock.patch.object(interpreter.InterpretedFunction, "__call__", call_device_function))
    patches.append(mock.patch.object(torch._C, "_len_torch_dispatch_stack", lambda: 0))
    for patch in patches:
        patch.start()
    try:
        yield counter
    finally:
        for patch in patches:
            patch.stop()
