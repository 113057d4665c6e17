"""What is said of ranks and sizes without running a model, against what fake tensors say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, fx, nn

from fxrep.analysis.channels import Channels
from fxrep.analysis.ranks import Ranks
from fxrep.analysis.values import recorded_run
from fxrep.capture.islands import capture
from fxrep.ops.calls import Calls
from support.expressions import EXPRESSIONS, Calling
from support.steps import Net
from support.strategies import nets

FAMILIES = (
    "resnet18", "repvgg_a0", "fastvit_t8", "repghostnet_050", "levit_128s", "convnext_atto",
    "efficientvit_m0", "shvit_s1", "coat_lite_tiny", "visformer_tiny", "mixnet_s", "dla34",
)  # fmt: skip


def contradictions(model: nn.Module, inputs: Any) -> list[str]:
    """Ranks and sizes that are said of values that have others, of all graphs of a model."""
    captured = capture(model)
    examples = recorded_run(captured, inputs)
    found = []
    for program in captured.programs:
        calls, values = Calls(program.module), examples.values(program)
        ranks = Ranks(program.graph, calls, known=program.ranks)
        channels = Channels(program.graph, calls, ranks.assume_for_later)
        for node, value in values.env.items():
            if isinstance(value, Tensor):
                found += wrong(ranks, channels, node, value)
            elif isinstance(node, fx.Node) and ranks.assumed(node) is not None:
                found.append(f"{node.format_node()} is a {type(value).__name__}")
    return found


def wrong(ranks: Ranks, channels: Channels, node: fx.Node, value: Tensor) -> list[str]:
    found = []
    if ranks.assumed(node) not in (None, value.dim()):
        found.append(f"{node.format_node()}: rank {ranks.assumed(node)}, not {value.dim()}")
    for axis in range(-value.dim(), 0):
        size = channels.of(node, axis)
        if size not in (None, value.shape[axis]):
            found.append(f"{node.format_node()}: {size} at {axis} of {tuple(value.shape)}")
    return found


@given(net=nets())
def test_of_any_model(net: Net) -> None:
    for size in net.sizes:
        assert not contradictions(net.eval(), torch.rand(size))


# Their values, or the ranks of these, depend on data; fake tensors do not follow a write of shape.
NOT_FOLLOWED = ("item()", "tensor_split(torch.tensor", "unsqueeze_", "squeeze_", "transpose_")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_of_calls_in_many_spellings(expression: str) -> None:
    model, x = Calling(expression).eval(), torch.randn(2, 3, 8, 8)
    try:
        copy.deepcopy(model)(x)
    except (IndexError, RuntimeError, TypeError):
        pytest.skip("torch does not run it")
    if not any(each in expression for each in NOT_FOLLOWED):
        assert not contradictions(model, x)


@pytest.mark.real
@pytest.mark.parametrize("name", FAMILIES[:4])
def test_of_models_that_people_use(name: str) -> None:
    assert not of_timm(name)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES[4:])
def test_of_more_models(name: str) -> None:
    assert not of_timm(name)


def of_timm(name: str) -> list[str]:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name).eval()
    return contradictions(model, torch.zeros(1, *model.default_cfg["input_size"]))
