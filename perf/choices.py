"""Watching and steering the choice of tiles, from outside the package. Launchers choose, so they run every time inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

from tritattn import _linear, _replay, tuning
from tritattn.tuning import Config


class Question(NamedTuple):
    """What tiles are asked for, but for the device."""

    role: str
    n: int
    c: int
    hw: int
    itemsize: int
    channels_last: bool
    maps: int = 1
    row: int = 0


@contextmanager
def recorded() -> Iterator[dict[Question, Config]]:
    """Collects the configurations chosen inside the block."""
    found: dict[Question, Config] = {}
    choose = tuning.choose

    def watched(*args: Any) -> Config:
        config = choose(*args)
        found[_question(*args)] = config
        return config

    with _replay.off(), mock.patch.object(tuning, "choose", watched):
        yield found


@contextmanager
def answered(question: Question, config: Config) -> Iterator[None]:
    """That configuration for one question, the usual ones for all others."""
    choose = tuning.choose
    with _replay.off(), mock.patch.object(tuning, "choose", lambda *args: config if _question(*args) == question else choose(*args)):
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


def describe(found: Mapping[Question, Config]) -> tuple[str, str]:
    """The columns config and config_source."""
    keys = {question.role: config.key for question, config in found.items()}
    return " ".join(f"{role}={key}" for role, key in sorted(keys.items())), "+".join(sorted({config.source for config in found.values()}))
