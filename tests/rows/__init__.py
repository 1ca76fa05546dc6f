"""The ops under test, one row each: the parameters, the call, and the code that people run instead, written out in plain torch.

A new block joins every test that walks this table by adding its rows.
"""

from . import axis, channel, context, covariance, fusion, gate, joint, local, pixel, plane, select, spatial
from .op import Op, Params, Shape

__all__ = ["BY_NAME", "MAIN", "OPS", "Op", "Params", "Shape"]

FAMILIES = (channel, pixel, spatial, context, covariance, select, gate, plane, axis, local, joint, fusion)
OPS = [op for family in FAMILIES for op in family.OPS]
MAIN = [op for op in OPS if op.main]
BY_NAME = {op.name: op for op in OPS}
