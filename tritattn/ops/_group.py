"""The launch of the kernels of kernels/group.py."""

from __future__ import annotations

from typing import Any

from .. import tuning
from ._launch import Map, counters


class Groups:
    """`images` of the map at once, a group of programs on each."""

    def __init__(self, m: Map, config: tuning.Config):
        rows = tuning.rows_together(m.c, m.hw, m.x.element_size())
        block_r, block_p = max(1, config.block_c // rows), tuning.power_of_two(m.hw)
        blocks = -(-m.c // (rows * block_r))
        self.device = m.x.device
        self.images = min(config.splits, m.n)
        self.grid = (self.images * blocks,)
        self.args: dict[str, Any] = dict(
            part_ptr=m.small(self.images, blocks, m.hw), counter_ptr=counters(m.x, 2 * m.n), N=m.n, C_V=m.c // rows, HW=m.hw, ROWS=rows,
            BLOCK_R=block_r, BLOCK_P=block_p, BLOCK_S=min(tuning.power_of_two(blocks), max(1, 4096 // block_p)), ACC=m.acc_tl,
            # every program of a group has to run, or the others wait for ever
            launch_cooperative_grid=True, **config.options,
        )  # fmt: skip

    def launched(self, kernel: Any, *args: Any, **more: Any) -> bool:
        """False where the device refuses to run all of the programs at once, as it is not asked to again."""
        try:
            kernel[self.grid](*args, **self.args, **more)
        except RuntimeError as error:
            tuning.refused(self.device, error)
            return False
        return True
