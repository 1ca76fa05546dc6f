"""Two ops with torch modules between them, x -> squeeze -> norm -> gate -> y, whose backward still writes the map's gradient once.

Both ops take x, so each would give x a gradient of its own, and the two would be added in passes over the map. Instead the squeeze returns slots,
tensors without values that only tie the gate's node to the squeeze's. The gate gives x no gradient: it hands da, the gradient of what the activation
received, to the slot of the map's shape, and each of its weights that the squeeze's backward needs to a slot of its shape; the squeeze's backward
then writes dx, its own share and the gate's, in one pass. A convolution between them, or an op after them, that reads the map itself reads
`through(x, slot)`, and its gradient arrives at that slot. All still compute with x itself, so gradients of gradients find their way through the
references' honest formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._library import Family


class RelaySqueeze(Family):
    """The last of its differentiable outputs are slots, named so: "map_slot", one for each weight that comes back, perhaps a
    "through_slot" for the first map, or for each. The backward launcher gets what arrived in them as the last grads.

    Its first `maps` inputs are the maps. share(da, inputs, *weights, spec) -> the gate's share of each map's gradient, in plain torch, None for
    a map that is not there.
    """

    def __init__(self, name: str, *, share: Callable[..., Sequence[Tensor | None]], maps: int = 1, **parts: Any):
        results = parts["outputs"][: parts["differentiable"]]
        self.slots = sum(result.endswith("_slot") for result in results)
        self.passing = sum(result.endswith("through_slot") for result in results)
        self.share, self.maps = share, maps
        super().__init__(name, **parts)

    @staticmethod
    def slot(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Of that shape, on one element."""
        return like.new_empty((), dtype=dtype).expand(like.shape)

    def _reference_backward(
        self, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], spec: Any, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        own, (da, *rest) = grads[: -self.slots], grads[-self.slots :]
        weights, passed = rest[: len(rest) - self.passing], rest[len(rest) - self.passing :]
        passed += [None] * (self.maps - self.passing)
        found = super()._reference_backward(own, inputs, spec, needs)
        shares: Sequence[Tensor | None] = [None] * self.maps
        if da is not None and any(needs[: self.maps]):
            shares = self.share(da, inputs, *weights, spec)
        for i, (share, through) in enumerate(zip(shares, passed, strict=True)):
            parts = [part for part in (found[i], share, through) if part is not None]
            found[i] = sum(parts[1:], parts[0]) if needs[i] and parts else None
        return found


class RelayGate(Family):
    """Inputs: `maps` maps, the weights, residual?, map_slot?, and <weight>_slot? for each weight that the squeeze's backward needs. The backward
    launcher returns da, where it is asked for it, in the first map's place."""

    def __init__(self, name: str, *, maps: int = 1, **parts: Any):
        super().__init__(name, **parts)
        self.maps = maps
        self.map_slot = self.inputs.index("map_slot")
        self.relayed = [self.inputs.index(slot.removesuffix("_slot")) for slot in self.inputs[self.map_slot + 1 :]]

    def gradient_like(self, index: int, inputs: Sequence[Any], spec: Any) -> Tensor:
        return self.fake(*inputs, spec)[0] if index == 0 else super().gradient_like(index, inputs, spec)

    def kept(self, inputs: Sequence[Tensor | None], spec: Any) -> list[Tensor | None]:
        return [None if i >= self.map_slot else t for i, t in enumerate(super().kept(inputs, spec))]

    def gradients(
        self, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], saved: Sequence[Tensor], spec: Any, needs: list[bool],
        launch: Callable[..., Sequence[Tensor | None]],
    ) -> list[Tensor | None]:  # fmt: skip
        assert self.residual is not None
        computed = spec.activation != "none" and (needs[self.residual] or needs[self.map_slot])
        asked = [need and self.maps <= i < self.residual for i, need in enumerate(needs)]
        asked[0] = computed
        found = self._only(asked, launch(grads, inputs, saved, asked) if any(asked) else asked)
        da = found[0] if computed else grads[0]
        found[: self.maps] = [None] * self.maps
        found[self.residual] = found[self.map_slot] = da
        found[self.map_slot + 1 :] = [inputs[i] for i in self.relayed]
        return self._only(needs, found)

    def _reference_backward(
        self, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], spec: Any, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        # da is the gradient of a residual, real or zero
        full, asked = list(inputs), list(needs)
        assert self.residual is not None and grads[0] is not None
        if full[self.residual] is None:
            full[self.residual] = torch.zeros_like(grads[0])
        asked[self.residual], asked[0] = asked[0], False
        found = super()._reference_backward(grads, full, spec, asked)
        found[0], found[self.residual] = found[self.residual], None
        return found


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return None, g


def through(x: Tensor, slot: Tensor | None) -> Tensor:
    """x, for what reads it between squeeze and gate or after them; its gradient goes to the squeeze's "through_slot" instead of x. x itself without a
    slot, or where nobody asks for its gradient."""
    return x if slot is None or not x.requires_grad else _Through.apply(x, slot)
