"""Every block of the literature becomes as few layers as the algebra allows, exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

import fxrep
from support.blocks import BLOCKS, Block
from support.blocks_chains import CHAIN_BLOCKS, INVERTED
from support.blocks_concat import CHEAPER, CONCAT_BLOCKS, Focus, FocusLoop
from support.blocks_linear import LINEAR_BLOCKS, SIZES
from support.check import check, count, inputs_of

WIDER = (*LINEAR_BLOCKS, *CHAIN_BLOCKS, *CONCAT_BLOCKS)
ALL = (*BLOCKS, *WIDER)


def named(block: Block) -> str:
    return block.name


@pytest.mark.parametrize("block", ALL, ids=named)
def test_block_becomes_one_layer(block: Block) -> None:
    torch.manual_seed(0)
    check(
        block.make().eval(), block.shapes, layers=block.layers, batchnorms=block.batchnorms,
        operations=block.operations, example_inputs=block.example_inputs,
    )  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS[::5], ids=named)
def test_block_with_example_inputs_and_without_cost(block: Block) -> None:
    torch.manual_seed(0)
    check(
        block.make().eval(), block.shapes, layers=block.layers, example_inputs=True, cost="always"
    )


@pytest.mark.parametrize("block", WIDER[::5], ids=named)
def test_block_stays_exact_without_cost(block: Block) -> None:
    """More merges are more chances to be wrong; how many are right depends on what is legal."""
    torch.manual_seed(0)
    check(
        block.make().eval(), block.shapes, batchnorms=None, example_inputs=True, cost="always",
        more_work=True,
    )  # fmt: skip


@pytest.mark.parametrize("block, share", CHEAPER, ids=lambda value: getattr(value, "name", ""))
def test_block_costs_its_share(block: Block, share: float) -> None:
    model = block.make().eval()
    optimized = check(model, block.shapes, layers=block.layers, batchnorms=block.batchnorms)
    for shape in block.shapes:
        inputs = inputs_of(shape, torch.float32)
        before, after = convolved(model, inputs), convolved(optimized, inputs)
        assert after <= share * before, f"{before} -> {after} MACs at {shape}"


def convolved(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """Multiply-accumulates of the convolutions alone: a BatchNorm has one for each element."""
    ops = count(model, inputs)
    return ops.macs - sum(inputs[0].numel() for _ in range(ops.batchnorms))


@pytest.mark.parametrize("kind", [Focus, FocusLoop])
def test_focus_is_one_conv_of_kernel_6_and_stride_2(kind: type[Focus]) -> None:
    optimized = fxrep.optimize(kind(3, 8).eval())
    (layer,) = [m for m in optimized.modules() if isinstance(m, nn.Conv2d)]
    assert (layer.kernel_size, layer.stride, layer.padding) == ((6, 6), (2, 2), (2, 2))


@pytest.mark.parametrize("name, make, layers", INVERTED, ids=[name for name, _, _ in INVERTED])
def test_inverted_bottleneck_is_exact(
    name: str, make: Callable[[], nn.Module], layers: Sequence[int]
) -> None:
    optimized = check(make().eval(), SIZES)
    left = count(optimized, inputs_of(SIZES[0], torch.float32)).layers
    assert left in layers, f"{name}: {left} layers"
