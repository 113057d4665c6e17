"""Decisions rest on what an operation is, never on the words that the report has for it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import fx, nn

import fxrep
from fxrep.reading.view import Affine, Operation, Reading, Unread, View
from support.blocks import BLOCKS, Block
from support.blocks_chains import CHAIN_BLOCKS
from support.blocks_concat import CHEAPER, CONCAT_BLOCKS
from support.blocks_linear import LINEAR_BLOCKS
from support.check import randomize

ALL = (*BLOCKS, *LINEAR_BLOCKS, *CHAIN_BLOCKS, *CONCAT_BLOCKS, *(block for block, _ in CHEAPER))


def left(model: nn.Module, cost: str) -> list[str]:
    """The code of what is left, of the whole model or of its islands, and how many rewrites."""
    optimized = fxrep.optimize(copy.deepcopy(model), cost=cost, validate=False)
    graphs = [m.graph for m in optimized.modules() if isinstance(m, fx.GraphModule)]
    return [str(graph) for graph in graphs] + [str(len(fxrep.report(optimized).rewrites))]


@pytest.mark.parametrize("cost", ["macs", "always"])
@pytest.mark.parametrize("block", ALL[::4], ids=lambda block: block.name)
def test_other_words_change_no_decision(
    block: Block, cost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = randomize(block.make().eval())
    expected = left(model, cost)
    read = View._read

    def renamed(view: View, node: fx.Node) -> Reading:
        reading = read(view, node)
        return replace(reading, kind="operation") if isinstance(reading, Affine) else reading

    monkeypatch.setattr(View, "_read", renamed)
    assert left(model, cost) == expected


def test_an_unread_operation_says_which_it_is() -> None:
    """The pass about that operation reports the reason, and no other."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.Conv2d(4, 4, 1)
    ).eval()
    reasons = {skip.pass_name: skip.reason for skip in fxrep.report(fxrep.optimize(model)).skipped}
    assert "ceil mode" in reasons["chains"]
    assert not any("ceil mode" in reasons[name] for name in reasons if name != "chains")
    unread = Unread("so", Operation.POOLING)
    assert isinstance(unread, fxrep.Refusal) and unread.reason == "so"
