"""Watching and steering the choice of tiles, from outside the package. Launchers choose, so they run every time inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from tritattn import _linear, _replay, _tables, tuning
from tritattn._linear import Tile
from tritattn.tuning import Config


class Question(NamedTuple):
    """What tiles of a pass over a map are asked for, but for the device."""

    role: str
    n: int
    c: int
    hw: int
    itemsize: int
    channels_last: bool
    maps: int = 1
    row: int = 0

    @property
    def entry(self) -> tuple[str, int]:
        """What a table names it, and the batch."""
        return _tables.key(self.role, *self[2:]), self.n


class Product(NamedTuple):
    """What the tile of a product is asked for, but for the device."""

    m: int
    j: int
    k: int
    itemsize: int
    processors: int
    role: str
    right: torch.dtype

    @property
    def entry(self) -> tuple[str, int]:
        return _tables.product_key(self.role, self.m, self.j, self.k, self.itemsize, self.right)


Asked = Question | Product
Answer = Config | Tile


@contextmanager
def recorded() -> Iterator[dict[Asked, Answer]]:
    """Collects the configurations chosen inside the block."""
    found: dict[Asked, Answer] = {}

    def noted(question: Asked, usual: Callable[[], Answer]) -> Answer:
        found[question] = usual()
        return found[question]

    with _replay.off(), _choosing(noted):
        yield found


@contextmanager
def answered(question: Asked, config: Answer) -> Iterator[None]:
    """That configuration for one question, the usual ones for all others."""
    with _replay.off(), _choosing(lambda asked, usual: config if asked == question else usual()):
        yield


@contextmanager
def _choosing(answer: Callable[[Asked, Callable[[], Answer]], Answer]) -> Iterator[None]:
    """answer: the question, and a function that gives the usual answer -> an answer."""
    choose, choose_tile = tuning.choose, _linear.choose

    def chosen(*args: Any) -> Answer:
        return answer(_question(*args), lambda: choose(*args))

    def chosen_tile(
        m: int, j: int, k: int, itemsize: int, processors: int, device: Any = None, role: str = "linear", right: Any = None
    ) -> Answer:  # fmt: skip
        def usual() -> Answer:
            return choose_tile(m, j, k, itemsize, processors, device, role, right)

        # without a device it is a matter of the launch that the product is a part of
        return usual() if device is None else answer(Product(m, j, k, itemsize, processors, role, right), usual)

    with mock.patch.object(tuning, "choose", chosen), mock.patch.object(_linear, "choose", chosen_tile):
        yield


def _question(role: str, n: int, c: int, hw: int, itemsize: int, channels_last: bool, device: Any, *rest: int) -> Question:
    return Question(role, n, c, hw, itemsize, channels_last, *rest)


@contextmanager
def for_batch(n: int) -> Iterator[list[int]]:
    """Tiles as they would be chosen for a batch of n, whatever the batch; the sizes of the blocks in which images are then taken, where they are."""
    choose, blocks = tuning.choose, _linear.blocks
    found: list[int] = []

    def of_batch(_: int, *args: int) -> tuple[int, int]:
        images, lag = blocks(n, *args)
        found.append(images)
        return images, lag

    choosing = mock.patch.object(tuning, "choose", lambda role, _, *args, **kwargs: choose(role, n, *args, **kwargs))
    with _replay.off(), choosing, mock.patch.object(_linear, "blocks", of_batch):
        yield found


def describe(found: Mapping[Asked, Answer]) -> tuple[str, str]:
    """The columns config and config_source."""
    keys: dict[str, dict[str, None]] = {}
    for question, config in found.items():
        keys.setdefault(question.role, {})[config.key] = None
    sources = {config.source for config in found.values()}
    return " ".join(f"{role}={'/'.join(several)}" for role, several in sorted(keys.items())), "+".join(sorted(sources))
