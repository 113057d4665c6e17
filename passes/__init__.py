"""The passes of fxrep, one file each, and the order they run in."""

from __future__ import annotations

from fxrep.passes.batchnorm import BATCHNORM
from fxrep.passes.branches import BRANCHES
from fxrep.passes.constants import CONSTANTS
from fxrep.rule import Pass

default_passes: tuple[Pass, ...] = (
    CONSTANTS,  # first: weights that the graph computes become weights the others can read
    BRANCHES,  # before batchnorm: a whole block at once, its BatchNorms inside, rounds once
    BATCHNORM,  # what no sum has taken: a layer followed by per-channel scales and shifts
)

__all__ = ["BATCHNORM", "BRANCHES", "CONSTANTS", "default_passes"]
