"""Programs that wait for each other, in Triton's interpreter, which by itself runs one after another and would wait for ever.

Inside `interleaved` the programs of a cooperative launch, or of every launch, start in an order drawn from a seed and run a stretch at a time, from
atomic to atomic; at most `resident` of them have started and not ended, as on a GPU that holds that many. tritattn's routing, which keeps kernels
from an interpreter that cannot run them, is told that this one can.

Programs of other launches run one after another, so one that waits for a later one is an error.

It explores every order of whole stretches and no weaker memory: what one program stored, the next one sees.
"""

from __future__ import annotations

import inspect
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from tritattn import tuning


class Programs:
    """Stands for a kernel's function in one launch: the call for its first program runs all of them, the other calls nothing.

    A program waits by repeating an atomic that leaves memory as it is, until another program's atomic has changed something. So after two of these it
    need not run until then, and when that holds for all programs none ever will.
    """

    def __init__(self, function: Callable[..., None], draw: random.Random, resident: int | None):
        self.function, self.draw, self.resident = function, draw, resident
        # which the interpreter looks at
        self.__name__, self.__globals__, self.__signature__ = function.__name__, function.__globals__, inspect.signature(function)
        self.turns: dict[tuple[int, ...], threading.Semaphore] = {}  # of the programs that have started and not ended
        self.looked: set[tuple[int, ...]] = set()  # at memory that has not changed since
        self.waiting: set[tuple[int, ...]] = set()  # looked twice
        self.pending: list[tuple[int, ...]] | None = None
        self.finished = threading.Event()
        self.error: BaseException | None = None

    def __call__(self, **arguments: Any) -> None:
        if self.pending is not None:
            return
        self.builder = _interpreter().interpreter_builder
        self.pending = list(itertools.product(*map(range, self.builder.grid_dim)))
        self.arguments = arguments
        self._start()
        self._next()
        self.finished.wait()
        if self.error is not None:
            raise self.error

    def _start(self) -> None:
        assert self.pending is not None
        while self.pending and (self.resident is None or len(self.turns) < self.resident):
            index = self.pending.pop(self.draw.randrange(len(self.pending)))
            self.turns[index] = threading.Semaphore(0)
            threading.Thread(target=self._run, args=(index,), daemon=True).start()

    def _next(self) -> None:
        """Hand the turn to a program that can go on; after an error to any, so that it ends."""
        able = [index for index in self.turns if self.error is not None or index not in self.waiting]
        if self.turns and not able:
            self.error = RuntimeError(f"no progress: {len(self.turns)} programs wait for each other, {len(self.pending or ())} have not started")
            able = list(self.turns)
        if able:
            self.turns[self.draw.choice(able)].release()
        else:
            self.finished.set()

    def _take_turn(self, index: tuple[int, ...]) -> None:
        self.turns[index].acquire()
        if self.error is not None:
            raise self.error
        self.builder.set_grid_idx(*index)
        self.current = index

    def _run(self, index: tuple[int, ...]) -> None:
        try:
            self._take_turn(index)
            self.function(**self.arguments)
        except BaseException as error:
            self.error = self.error or error
        del self.turns[index]
        self._changed()
        if self.error is None:
            self._start()
        self._next()

    def _changed(self) -> None:
        self.looked.clear()
        self.waiting.clear()

    def switch(self, changed: bool) -> None:
        """After an atomic of the running program: let another one go on."""
        index = self.current
        if changed:
            self._changed()
        elif index in self.looked:
            self.waiting.add(index)
        else:
            self.looked.add(index)
        self._next()
        self._take_turn(index)


_running: list[Programs] = []  # of all `interleaved` that are inside each other


def _interpreter() -> Any:
    import triton.runtime.interpreter as interpreter

    return interpreter


@contextmanager
def interleaved(seed: int = 0, resident: int | None = None, every: bool = False) -> Iterator[None]:
    """resident: how many programs have started and not ended at once; by default all, which is what a cooperative launch guarantees. every: launches
    that are not cooperative too."""
    interpreter = _interpreter()
    draw = random.Random(seed)
    running: list[Programs] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    launch, change = executor.__call__, builder.create_atomic_rmw

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        if not (every or kwargs.get("launch_cooperative_grid")) or isinstance(self.fn, Programs):
            return launch(self, *args, **kwargs)
        self.fn = Programs(self.fn, draw, resident)
        running.append(self.fn)
        _running.append(self.fn)
        try:
            return launch(self, *args, **kwargs)
        finally:
            running.pop()
            _running.pop()

    def changed(self: Any, operation: Any, pointers: Any, value: Any, *rest: Any) -> Any:
        before = change(self, operation, pointers, value, *rest)
        if running:
            running[-1].switch(bool(value.data.any()))  # all of them add
        elif not _running and not value.data.any() and not before.data.any():
            raise RuntimeError("no progress: a program waits for another, and all of those before it have ended")
        return before

    patches: list[Any] = [mock.patch.object(executor, "__call__", launched), mock.patch.object(builder, "create_atomic_rmw", changed)]
    patches.append(mock.patch.object(tuning, "cooperative", lambda device: True))
    for patch in patches:
        patch.start()
    tuning.choose.cache_clear()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
        tuning.choose.cache_clear()
