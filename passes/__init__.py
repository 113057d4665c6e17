"""The passes of fxrep, one file each, and the order they run in."""

from __future__ import annotations

from fxrep.passes.batchnorm import BATCHNORM
from fxrep.passes.branches import BRANCHES
from fxrep.passes.chains import CHAINS
from fxrep.passes.commute import COMMUTE
from fxrep.passes.concat import CONCAT
from fxrep.passes.constants import CONSTANTS
from fxrep.passes.dead import DEAD
from fxrep.passes.noops import NO_OPS
from fxrep.passes.siblings import SIBLINGS
from fxrep.planning.rule import Pass

default_passes: tuple[Pass, ...] = (
    CONSTANTS,  # first: weights that the graph computes become weights the others can read
    DEAD,  # what nobody reads is in the way of what others read
    NO_OPS,  # before the passes that look at who reads a value: not every one looks through these
    COMMUTE,  # before a 1x1 and its pooling become one convolution, which costs as much as before
    BRANCHES,  # before batchnorm: a whole block at once, its BatchNorms inside, rounds once
    CONCAT,  # likewise for what ends in a concatenation
    CHAINS,  # what follows each other without a sum; its BatchNorms go with it
    BATCHNORM,  # what nothing has taken: a layer followed by per-channel scales and shifts
    SIBLINGS,  # last: what is joined and split again is in nobody's way any more
)

__all__ = [
    "BATCHNORM",
    "BRANCHES",
    "CHAINS",
    "COMMUTE",
    "CONCAT",
    "CONSTANTS",
    "DEAD",
    "NO_OPS",
    "SIBLINGS",
    "default_passes",
]
