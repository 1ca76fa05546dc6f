"""Two ops with a torch module between them, x -> squeeze -> norm -> gate -> y, whose backward still writes the map's gradient once.

Both ops take x, so each would give x a gradient of its own, and the two would be added in passes over the map. Instead the squeeze returns two
slots, tensors without values that only tie the gate's node to the squeeze's. The gate gives x no gradient: it hands da, the gradient of what the
activation received, to the slot of the map's shape, and its logits to the slot of theirs; the squeeze's backward then writes dx, its own share and
the gate's, in one pass. Both still compute with x itself, so gradients of gradients find their way through the references' honest formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._library import Family
from ._spec import Spec


class RelaySqueeze(Family):
    """Its last two results are slots; the backward launcher gets what arrived in them, da and the gate's logits, as the last two grads.

    share(da, inputs, logits, spec) -> the gate's share of dx, in plain torch.
    """

    slots = 2

    def __init__(self, name: str, *, share: Callable[..., Tensor], **parts: Any):
        super().__init__(name, **parts)
        self.share = share

    @staticmethod
    def slot(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Of that shape, on one element."""
        return like.new_empty((), dtype=dtype).expand(like.shape)

    def _reference_backward(
        self, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], spec: Spec, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        *own, da, logits = grads
        found = super()._reference_backward(own, inputs, spec, needs)
        if needs[0] and da is not None:
            share = self.share(da, inputs, logits, spec)
            found[0] = share if found[0] is None else found[0] + share
        return found


class RelayGate(Family):
    """Inputs x, channel?, logits, residual?, map_slot?, gate_slot?. The backward launcher returns da, where it is asked for it, in x's place."""

    def kept(self, inputs: Sequence[Tensor | None], spec: Spec) -> list[Tensor | None]:
        return [*super().kept(inputs, spec)[:4], None, None]

    def gradients(
        self, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], saved: Sequence[Tensor], spec: Spec, needs: list[bool],
        launch: Callable[..., Sequence[Tensor | None]],
    ) -> list[Tensor | None]:  # fmt: skip
        computed = spec.activation != "none" and (needs[3] or needs[4])
        asked = [computed, needs[1], needs[2], False, False, False]
        found = self._only(asked, launch(grads, inputs, saved, asked) if any(asked) else asked)
        da = found[0] if computed else grads[0]
        return self._only(needs, [None, found[1], found[2], da, da, inputs[2]])

    def _reference_backward(
        self, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], spec: Spec, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        # da is the gradient of a residual, real or zero
        x, residual = inputs[0], inputs[3]
        assert x is not None
        full = [*inputs[:3], torch.zeros_like(x) if residual is None else residual, None, None]
        found = super()._reference_backward(grads, full, spec, [False, needs[1], needs[2], needs[0], False, False])
        found[0], found[3] = found[3], None
        return found
