"""Blocks of other packages, installed or restated, beside the module of ours that computes the same.

PAIRS: name -> (the other block, ours with the options that match). BLOCKS: every block that is converted, the pairs' and more of their options.
RANKS: of the map where it is not 4. SQUARE: blocks that take square maps alone. RETURN_GATE: blocks that return a gate instead of a gated map.
PROMOTES: blocks whose parameters in fp32 make a map in half precision one in fp32, which ours do not. TWO_MAPS: blocks that take two.
"""

from . import axis, context, foundation, fusion, gsop, joint, local, plane, select

FAMILIES = (foundation, context, gsop, plane, select, axis, local, joint, fusion)
PAIRS = {name: pair for family in FAMILIES for name, pair in family.PAIRS.items()}
BLOCKS = {name: block for family in FAMILIES for name, block in family.BLOCKS.items()}
RANKS = foundation.RANKS
SQUARE = joint.SQUARE
RETURN_GATE = foundation.RETURN_GATE + joint.RETURN_GATE
PROMOTES = plane.PROMOTES
TWO_MAPS = fusion.TWO_MAPS
