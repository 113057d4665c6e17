"""Cost models: what they object to decides, not how they are called."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fxrep
from fxrep.planning.cost import AlwaysCost
from support.blocks import BLOCKS, Block
from support.blocks_chains import CHAIN_BLOCKS
from support.blocks_concat import CONCAT_BLOCKS
from support.check import randomize

CHOSEN = (*BLOCKS[::9], *CHAIN_BLOCKS[::3], *CONCAT_BLOCKS[::9])


class Convolves:
    """Only what a cost model must have, and a name that fxrep has never heard."""

    name = "for an accelerator that convolves"

    def objection(self, before: fxrep.Work, after: fxrep.Work) -> str | None:
        return AlwaysCost().objection(before, after)


@dataclass(frozen=True)
class SaysAlways:
    """The name of a cost model that takes nearly everything, and takes nothing."""

    name: str = "always"

    def objection(self, before: fxrep.Work, after: fxrep.Work) -> str | None:
        return "nothing is worth it"


def report(model: nn.Module, cost: str | fxrep.CostModel) -> fxrep.Report:
    return fxrep.report(fxrep.optimize(copy.deepcopy(model), cost=cost))


@pytest.mark.parametrize("block", CHOSEN, ids=lambda block: block.name)
def test_a_cost_model_decides_whatever_its_name(block: Block) -> None:
    torch.manual_seed(0)
    model = randomize(block.make().eval())
    assert report(model, Convolves()).to_dict() == report(model, "always").to_dict()


@pytest.mark.parametrize("kernel, stride", [(2, 2), (3, 1), (3, 2)])
def test_a_pooling_alone_becomes_a_convolution_if_the_cost_model_takes_that(
    kernel: int, stride: int
) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AvgPool2d(kernel, stride), nn.ReLU()
    ).eval()
    (rewrite,) = report(model, Convolves()).rewrites
    assert (rewrite.before, rewrite.after) == (("avg_pool",), ("conv2d",))
    for cost in ("macs", SaysAlways()):
        assert not report(model, cost).rewrites
        assert not report(model, cost).skipped  # nothing was in sight


def test_an_objection_that_is_no_reason() -> None:
    class Yes:
        name = "yes"

        def objection(self, before: fxrep.Work, after: fxrep.Work) -> bool:
            return after.operations < before.operations

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    with pytest.raises(fxrep.OptionError, match="objection of 'yes' is True"):
        fxrep.optimize(model, cost=Yes())  # type: ignore[arg-type]
