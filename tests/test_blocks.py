"""Every block of the literature that sums and scales can express becomes one layer, exactly."""

from __future__ import annotations

import pytest
import torch
from blocks import BLOCKS, Block
from check import check


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_block_becomes_one_layer(block: Block) -> None:
    torch.manual_seed(0)
    tokens = len(block.shapes[0]) == 2  # Linear takes any rank: only an example tells which
    check(block.make().eval(), block.shapes, layers=block.layers, example_inputs=tokens)


@pytest.mark.parametrize("block", BLOCKS[::5], ids=lambda block: block.name)
def test_block_with_example_inputs_and_without_cost(block: Block) -> None:
    torch.manual_seed(0)
    check(
        block.make().eval(), block.shapes, layers=block.layers, example_inputs=True, cost="always"
    )
