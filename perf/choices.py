"""Watching and steering the choice of tiles, from outside the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from tritattn import tuning


@contextmanager
def recorded() -> Iterator[dict[str, Any]]:
    """Collects the configurations chosen inside the block: role -> Config."""
    found: dict[str, Any] = {}
    choose = tuning.choose

    def watched(role: str, *args: Any, **kwargs: Any) -> Any:
        config = choose(role, *args, **kwargs)
        found[role] = config
        return config

    with mock.patch.object(tuning, "choose", watched):
        yield found


@contextmanager
def for_batch(n: int) -> Iterator[None]:
    """Tiles as they would be chosen for a batch of n, whatever the batch."""
    choose = tuning.choose
    with mock.patch.object(tuning, "choose", lambda role, _, *args, **kwargs: choose(role, n, *args, **kwargs)):
        yield


def describe(found: dict[str, Any]) -> tuple[str, str]:
    """The columns config and config_source."""
    config = " ".join(f"{role}={chosen.key}" for role, chosen in sorted(found.items()))
    return config, "+".join(sorted({chosen.source for chosen in found.values()}))
