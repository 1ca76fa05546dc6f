"""Shuffle attention and SimAM of other packages."""

import peer_blocks.external
import peer_blocks.sanet

from tritattn import nn as tn

# the authors' SimAM is External-Attention-pytorch's under another name
simam_module = type("simam_module", (peer_blocks.external.SimAM,), {})

PAIRS = {
    "authors-sa_layer": (lambda: peer_blocks.sanet.sa_layer(16, 4), lambda: tn.ShuffleAttention(16, 4)),
    "external-ShuffleAttention": (lambda: peer_blocks.external.ShuffleAttention(16), lambda: tn.ShuffleAttention(16, 8)),
    "external-SimAM": (lambda: peer_blocks.external.SimAM(), lambda: tn.SimAM()),
}
PROMOTES = ("authors-sa_layer", "external-ShuffleAttention")
BLOCKS = {name: theirs for name, (theirs, _) in PAIRS.items()} | {"authors-simam_module": lambda: simam_module(e_lambda=0.1)}
