"""Blocks of `tritattn.nn.GatherExcite`."""

from __future__ import annotations

from typing import Any

from .entry import NoFit, Peer


def _read(gather: bool, mlp: bool) -> Any:
    def read(block: Any) -> dict[str, Any]:
        if (block.gather is not None) != gather:
            raise NoFit(f"it has extra_params={not gather}")
        if hasattr(block.mlp, "fc1") != mlp:
            raise NoFit(f"it has use_mlp={not mlp}")
        if block.add_maxpool and block.extent and not gather:
            raise NoFit("it has add_maxpool=True with an extent")
        return {"extent": block.extent, "pool": "avg_max" if block.add_maxpool and not gather else "avg"}

    return read


_MLP = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_GATHER = {"gather": "gather"}


def _peer(variant: str, gather: bool, mlp: bool) -> Peer:
    return Peer(
        f"timm{variant}",
        ("GatherExcite",),
        "GatherExcite",
        {**(_GATHER if gather else {}), **(_MLP if mlp else {})},
        {"max_grad": "even"},
        _read(gather, mlp),
        hidden="mlp.act" if mlp else None,
        gates=("gate",),
        inner=("ConvMlp", "Dropout") if mlp else (),
        called=("gather.conv1", "gather") if gather else (),
    )


# built with use_mlp or extra_params timm's raises TypeError; a corrected copy has the same names
PEERS: tuple[Peer, ...] = (
    _peer("", False, False),
    _peer(", use_mlp", False, True),
    _peer(", extra_params", True, False),
    _peer(", extra_params and use_mlp", True, True),
)
