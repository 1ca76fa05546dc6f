"""Launches as data: what a launcher did for one kind of inputs, done again for others of that kind without the launcher.

A launcher computes in Python what it allocates, how it cuts the map and what it tells each kernel, which takes the host longer than a small map takes
a GPU. All of that follows from dtypes, shapes, strides and options. So the second call of a kind is watched: its allocations, its kernels with their
arguments, and whatever operators of torch's it uses become a plan, and every later call of that kind takes new memory and passes its pointers to the
compiled kernels. A call that differs in the alignment of its pointers, for which the kernels were specialised, takes the launcher.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import tuning

Values = list[Any]
Step = Callable[[Values, list[int]], None]
MOST = 4096  # plans of a launcher, after which it begins anew
ALIGNMENT = 16  # bytes, of which pointers are told to be multiples or not
SPACING = 256  # bytes between what shares one allocation

enabled = os.environ.get("TRITON_INTERPRET", "0") != "1"  # the interpreter is for tests, which change what launchers do
_local = threading.local()


@contextmanager
def off() -> Iterator[None]:
    """Launchers run inside the block, of the whole process; for who watches what they do."""
    global enabled
    saved, enabled = enabled, False
    try:
        yield
    finally:
        enabled = saved


def current() -> Recording | None:
    """The recording that watches this thread's launcher."""
    return getattr(_local, "recording", None)


@contextmanager
def unwatched() -> Iterator[None]:
    """What operators do inside the block is none of the plan's steps."""
    before, _local.aside = getattr(_local, "aside", False), True
    try:
        yield
    finally:
        _local.aside = before


def operator(func: Callable[..., Any], *args: Any) -> Any:
    """func(*args) as one step of a plan: a function of tensors that sets more than the operators in it say, such as flags of cuDNN."""
    recording = current()
    if recording is None:
        return func(*args)
    with unwatched():
        result = func(*args)
    recording.attempt(recording.operator, func, args, {}, result)
    return result


class Unrepeatable(Exception):
    """Something that a plan cannot hold."""


class Recording(TorchDispatchMode):
    """Watches one run of a launcher; the values of the plan are the inputs first, then whatever is made, in order."""

    def __init__(self, inputs: Sequence[Tensor | None]):
        super().__init__()
        self.steps: list[tuple[str, tuple[Any, ...]]] = []
        self.kept: list[Tensor] = []  # alive, so that no two tensors have one id
        self.known: dict[int, tuple[int, int]] = {}  # id -> (value whose memory it is in, bytes from that one's begin)
        self.bases: list[Tensor | None] = []
        self.problem: str | None = None
        self.watching: Any = None
        for t in inputs:
            self._value(t)

    def __enter__(self) -> Recording:
        _local.recording = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _local.recording = None
        super().__exit__(*error)

    def _value(self, t: Tensor | None) -> int:
        self.bases.append(t)
        if t is not None:
            self.kept.append(t)
            self.known[id(t)] = len(self.bases) - 1, 0
        return len(self.bases) - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not getattr(_local, "aside", False):
            self.attempt(self._dispatched, func, args, kwargs or {}, result)
        return result

    def attempt(self, note: Callable[..., None], *what: Any) -> None:
        if self.problem is None:
            try:
                note(*what)
            except Unrepeatable as problem:
                self.problem = str(problem)

    def _dispatched(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func.is_view:
            if id(args[0]) not in self.known:
                raise Unrepeatable(f"{func} of a tensor from elsewhere")
            index, offset = self.known[id(args[0])]
            for t in result if isinstance(result, (tuple, list)) else (result,):
                self.kept.append(t)
                self.known[id(t)] = index, offset + t.storage_offset() * t.element_size() - args[0].storage_offset() * args[0].element_size()
        elif "empty" in func._schema.name:
            self.steps.append(("allocation", (self._value(result), tuple(result.shape), result.stride(), result.dtype, result.device)))
        else:
            self.operator(func, args, kwargs, result)

    def operator(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        results = result if isinstance(result, (tuple, list)) else (result,)
        if not all(t is None or isinstance(t, Tensor) for t in results):
            raise Unrepeatable(f"{func} returns what is no tensor")
        found = self._tensors(args, kwargs)
        made = [None if t is None or id(t) in self.known else self._value(t) for t in results]  # known is what is changed in place
        self.steps.append(("operator", (made, func, *found)))

    def _tensors(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments of an operator, tensors as the indices of values."""
        if any(isinstance(a, (list, tuple)) and any(isinstance(t, Tensor) for t in a) for a in (*args, *kwargs.values())):
            raise Unrepeatable("an operator on a list of tensors")
        return (
            tuple(_Index(self.whole(a)) if isinstance(a, Tensor) else a for a in args),
            {name: _Index(self.whole(a)) if isinstance(a, Tensor) else a for name, a in kwargs.items()},
        )

    def whole(self, t: Tensor) -> int:
        """The value that is that tensor, a view where it is a part of one."""
        if id(t) not in self.known:
            raise Unrepeatable("a tensor from elsewhere")
        index, offset = self.known[id(t)]
        base = self.bases[index]
        assert base is not None
        if t.shape == base.shape and t.stride() == base.stride() and t.dtype == base.dtype and not offset:
            return index
        if t.dtype != base.dtype:
            raise Unrepeatable("a view of another dtype")
        view = self._value(t)
        self.steps.append(("view", (view, index, tuple(t.shape), t.stride(), offset // t.element_size())))
        return view

    def watched(self, namespace: Any) -> Any:
        """The same with kernels whose launches are noted."""
        if self.watching is None:
            members = vars(namespace).items()
            self.watching = SimpleNamespace(**{name: _Watched(self, t) if name.endswith("_kernel") else t for name, t in members})
        return self.watching

    def found(self, t: Tensor, again: Callable[[Tensor], Tensor]) -> None:
        """Note that t comes from elsewhere; `again` finds what is to be in its place, for an input of the call."""
        self.steps.append(("found", (self._value(t), again)))

    def launch(self, kernel: Any, grid: tuple[int, ...], args: Any, kwargs: Any, compiled: Any) -> None:
        signature = inspect.signature(kernel.fn)
        bound = signature.bind(*args, **{name: value for name, value in kwargs.items() if name in signature.parameters})
        bound.apply_defaults()
        values = list(bound.arguments.values())
        places = []
        for position, value in enumerate(values):
            if isinstance(value, Tensor):
                if id(value) not in self.known:
                    raise Unrepeatable(f"{kernel.fn.__name__}: a tensor from elsewhere")
                index, offset = self.known[id(value)]
                places.append((position, self.whole(value) if offset else index))
        for position, _ in places:
            values[position] = None  # not the tensors of the recording
        self.steps.append(("launch", (kernel, compiled, (*grid, 1, 1)[:3], values, places)))


class _Index(int):
    """The index of a value."""


class _Watched:
    """A kernel whose launches the recording notes."""

    def __init__(self, recording: Recording, kernel: Any):
        self.recording, self.kernel = recording, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            with unwatched():
                compiled = self.kernel[grid](*args, **kwargs)
            self.recording.attempt(self.recording.launch, self.kernel, grid, args, kwargs, compiled)
            return compiled

        return launch


class Plan:
    """The steps of a recording, for calls that want `results`."""

    def __init__(self, recording: Recording, inputs: Sequence[Tensor | None], results: Sequence[Any]):
        self.results = [None if t is None else recording.whole(t) for t in results]
        self.alignments = [0 if t is None else t.data_ptr() % ALIGNMENT for t in inputs]
        self.count = len(recording.bases) - len(inputs)
        needed = {index for index in self.results if index is not None}
        for kind, parts in recording.steps:
            if kind == "view":
                needed.add(parts[1])
            elif kind == "operator":
                needed |= {a for a in (*parts[2], *parts[3].values()) if isinstance(a, _Index)}
        device = next(t.device for t in inputs if t is not None)
        interpreted = any(kind == "launch" and parts[1] is None for kind, parts in recording.steps)  # such kernels want tensors, not addresses
        self.steps: list[Step] = []
        scratch: list[tuple[int, int]] = []  # (value, bytes) of what nothing but kernels accesses
        for kind, parts in recording.steps:
            if kind == "allocation" and parts[0] not in needed and not interpreted:
                base = recording.bases[parts[0]]
                assert base is not None
                scratch.append((parts[0], base.untyped_storage().nbytes()))
            else:
                self.steps.append(_STEPS[kind](*parts))
        if scratch:
            self.steps.insert(0, _scratch(scratch, device))

    def __call__(self, inputs: Sequence[Tensor | None]) -> list[Any] | None:
        """The results; None for inputs of another alignment."""
        pointers = [0 if t is None else t.data_ptr() for t in inputs]
        for pointer, alignment in zip(pointers, self.alignments, strict=True):
            if pointer % ALIGNMENT != alignment:
                return None
        values = [*inputs, *[None] * self.count]
        pointers += [0] * self.count
        for step in self.steps:
            step(values, pointers)
        return [None if index is None else values[index] for index in self.results]


def _allocation(index: int, shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> Step:
    def step(values: Values, pointers: list[int]) -> None:
        values[index] = t = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        pointers[index] = t.data_ptr()

    return step


def _scratch(parts: list[tuple[int, int]], device: torch.device) -> Step:
    offsets, size = [], 0
    for index, nbytes in parts:
        offsets.append((index, size))
        size += -(-nbytes // SPACING) * SPACING

    def step(values: Values, pointers: list[int]) -> None:
        values.append(memory := torch.empty(size, dtype=torch.uint8, device=device))  # until the last launch
        begin = memory.data_ptr()
        for index, offset in offsets:
            pointers[index] = begin + offset

    return step


def _view(index: int, base: int, shape: Any, stride: Any, offset: int) -> Step:
    def step(values: Values, pointers: list[int]) -> None:
        t = values[base]
        values[index] = t.as_strided(shape, stride, t.storage_offset() + offset)
        pointers[index] = values[index].data_ptr()

    return step


def _operator(made: list[int | None], func: Any, args: Any, kwargs: Any) -> Step:
    def step(values: Values, pointers: list[int]) -> None:
        result = func(
            *(values[a] if isinstance(a, _Index) else a for a in args),
            **{name: values[a] if isinstance(a, _Index) else a for name, a in kwargs.items()},
        )
        for index, t in zip(made, result if isinstance(result, (tuple, list)) else (result,), strict=True):
            if index is not None:
                values[index] = t
                pointers[index] = t.data_ptr()

    return step


def _found(index: int, again: Callable[[Tensor], Tensor]) -> Step:
    def step(values: Values, pointers: list[int]) -> None:
        values[index] = again(next(t for t in values if t is not None))
        pointers[index] = values[index].data_ptr()

    return step


def _launch(kernel: Any, compiled: Any, grid: tuple[int, int, int], arguments: Values, places: list[tuple[int, int]]) -> Step:
    runner = (kernel if compiled is None else compiled)[grid]

    def step(values: Values, pointers: list[int]) -> None:
        filled = arguments.copy()
        for position, index in places:
            filled[position] = pointers[index]
        runner(*filled)

    def interpreted(values: Values, pointers: list[int]) -> None:
        filled = arguments.copy()
        for position, index in places:
            filled[position] = values[index]
        runner(*filled)

    return interpreted if compiled is None else step


_STEPS: dict[str, Callable[..., Step]] = {"allocation": _allocation, "view": _view, "operator": _operator, "found": _found, "launch": _launch}


def repeated(
    plans: dict[Hashable, Any], options: Hashable, inputs: Sequence[Tensor | None], call: Callable[..., Sequence[Tensor | None]],
    wanted: int | None = None,
) -> Sequence[Tensor | None]:  # fmt: skip
    """call(inputs), by its plan where there is one; of its results the first `wanted`. options: what else decides what it does."""
    x = next(t for t in inputs if t is not None)
    if not enabled or tuning.is_forced() or x.is_meta:
        return call(inputs)
    key = options, wanted, tuning.epoch, x.device, *[None if t is None else (t.dtype, t.shape, t.stride()) for t in inputs]
    plan = plans.get(key)
    if plan is None:
        results = call(inputs)  # and compile
        if len(plans) >= MOST:
            plans.clear()
        plans[key] = False
        return results
    if plan is False:
        return _record(plans, key, inputs, call, wanted)
    if isinstance(plan, Plan):
        found = plan(inputs)
        if found is not None:
            return found
    return call(inputs)


def _record(
    plans: dict[Hashable, Any], key: Hashable, inputs: Sequence[Tensor | None], call: Callable[..., Sequence[Tensor | None]], wanted: int | None
) -> Sequence[Tensor | None]:
    seen: set[int] = set()
    apart = []  # one tensor in two places is two in a plan
    for t in inputs:
        apart.append(t.detach() if t is not None and id(t) in seen else t)
        seen.add(id(t))
    recording = Recording(apart)
    with recording:
        results = call(apart)
    plan: Any = recording.problem
    if plan is None:
        try:
            plan = Plan(recording, inputs, results[:wanted])
        except Unrepeatable as problem:
            plan = str(problem)
    plans[key] = plan
    return [next((own for own, other in zip(inputs, apart, strict=True) if t is other), t) if t is not None else None for t in results]
