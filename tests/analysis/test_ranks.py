"""Ranks of values: what is proven, what is assumed, and what stays unknown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxrep.analysis.ranks import Ranks
from fxrep.capture.islands import capture
from fxrep.ops.calls import Calls

_Forward = Callable[[Any, Any], Any]


class Net(nn.Module):
    def __init__(self, forward: _Forward) -> None:
        super().__init__()
        self.written = forward
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.conv1 = nn.Conv1d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.bn1 = nn.BatchNorm1d(4)
        self.bn3 = nn.BatchNorm3d(4)
        self.fc = nn.Linear(4, 4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.table = nn.Embedding(3, 4)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.full = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.register_buffer("index", torch.zeros(2, 2, dtype=torch.long))

    def forward(self, x: Any) -> Any:
        return self.written(self, x)


def known(forward: _Forward) -> tuple[Ranks, fx.Node, fx.Node]:
    """Ranks, the input, and the value returned."""
    program = capture(Net(forward).eval()).programs[0]
    nodes = list(program.graph.nodes)
    result = nodes[-1].args[0]
    assert isinstance(result, fx.Node)
    return Ranks(program.graph, Calls(program.module)), nodes[0], result


def levit_linear_norm(s: Any, x: Any) -> Any:
    x = s.conv(x).flatten(2).transpose(1, 2)
    y = s.fc(x)
    y = s.bn1(y.flatten(0, 1)).reshape_as(y)
    return x + y


def attention(s: Any, x: Any) -> Any:
    x = s.conv(x).flatten(2).transpose(1, 2)
    b, n, c = x.shape
    q, k, v = s.fc(x).view(b, n, 2, -1).split([2, 2, 2], dim=3)
    q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
    y = (q @ k * 0.5).softmax(dim=-1) @ v
    return y.transpose(1, 2).reshape(b, n, c) + s.fc(x)


def asserted(s: Any, x: Any) -> Any:
    torch._assert(x.ndim == 4, "batched")
    return s.conv(x)


def added_constant(s: Any, x: Any) -> Any:
    return s.conv(x) + s.scale


def in_place(s: Any, x: Any) -> Any:
    y = s.bn(x)
    y += s.full
    return y


# forward, proven rank of the result, proven rank of the input, assumed rank of the result
TABLE: list[tuple[str, _Forward, int | None, int | None, int | None]] = [
    ("batchnorm2d", lambda s, x: s.bn(x), 4, 4, 4),
    ("batchnorm3d", lambda s, x: s.bn3(x), 5, 5, 5),
    ("batchnorm1d is 2 or 3", lambda s, x: s.bn1(x), None, None, None),
    ("conv", lambda s, x: s.conv(x), None, None, 4),
    ("conv1d", lambda s, x: s.conv1(x), None, None, 3),
    ("two convs disagree", lambda s, x: (s.conv(x), s.conv1(x))[0], None, None, None),
    ("functional conv", lambda s, x: F.conv2d(x, s.conv.weight), None, None, 4),
    ("functional batch norm proves nothing",
     lambda s, x: F.batch_norm(x, s.bn.running_mean, s.bn.running_var), None, None, None),
    ("backwards through a chain", lambda s, x: s.bn(F.relu(s.conv(x)).contiguous()), 4, 4, 4),
    ("assertion", asserted, 4, 4, 4),
    ("bilinear", lambda s, x: F.interpolate(x, scale_factor=2, mode="bilinear"), 4, 4, 4),
    ("nearest", lambda s, x: F.interpolate(x, scale_factor=2), None, None, None),
    ("flatten(1)", lambda s, x: s.conv(x).flatten(1), 2, None, 2),
    ("flatten(2)", lambda s, x: x.flatten(2), 3, None, 3),
    ("flatten()", lambda s, x: s.conv(x).flatten(), 1, None, 1),
    ("flatten(0, 1)", lambda s, x: s.bn(x).flatten(0, 1), 3, 4, 3),
    ("flatten(-2)", lambda s, x: torch.flatten(s.bn(x), -2), 3, 4, 3),
    ("flatten(start, -2)", lambda s, x: s.bn(x).flatten(1, -2), 3, 4, 3),
    ("flatten backwards", lambda s, x: s.bn(x.flatten(0, 1)), 4, 5, 4),
    ("view", lambda s, x: x.view(2, -1, 4), 3, None, 3),
    ("view of a tuple", lambda s, x: x.reshape((2, -1)), 2, None, 2),
    ("view of one size", lambda s, x: x.view(x.size(0)), 1, None, 1),
    ("view as another", lambda s, x: x.mean(1).view(s.bn(x).shape), 4, 4, 4),
    ("permute", lambda s, x: x.permute(0, 2, 3, 1), 4, 4, 4),
    ("unpacked shapes prove nothing", lambda s, x: (x * x.shape[3]), None, None, None),
    ("unsqueeze", lambda s, x: s.bn(x).unsqueeze(1), 5, 4, 5),
    ("unsqueeze backwards", lambda s, x: s.bn(x.unsqueeze(0)), 4, 3, 4),
    ("squeeze is not certain", lambda s, x: s.bn(x).squeeze(1), None, 4, None),
    ("mean", lambda s, x: s.bn(x).mean((2, 3)), 2, 4, 2),
    ("mean of one", lambda s, x: torch.mean(s.bn(x), dim=-1), 3, 4, 3),
    ("mean kept", lambda s, x: s.bn(x).mean((2, 3), keepdim=True), 4, 4, 4),
    ("mean kept by position", lambda s, x: s.bn(x).mean([2, 3], True), 4, 4, 4),
    ("mean of all", lambda s, x: s.bn(x).mean(), 0, 4, 0),
    ("dtype of a mean", lambda s, x: s.bn(x).mean(dtype=torch.float64), 0, 4, 0),
    ("pool", lambda s, x: s.pool(s.bn(x)), 4, 4, 4),
    ("pad", lambda s, x: F.pad(s.bn(x), (1, 1)), 4, 4, 4),
    ("cat", lambda s, x: torch.cat([s.bn(x), x], 1), 4, 4, 4),
    ("stack", lambda s, x: torch.stack([s.bn(x), x], 1), 5, 4, 5),
    ("chunk", lambda s, x: s.bn(x).chunk(2, 1)[1], 4, 4, 4),
    ("unbind", lambda s, x: s.bn(x).unbind(1)[0], 3, 4, 3),
    ("slice", lambda s, x: s.bn(x)[:, 1:, ::2], 4, 4, 4),
    ("index", lambda s, x: s.bn(x)[:, 0], 3, 4, 3),
    ("new axis", lambda s, x: s.bn(x)[:, None], 5, 4, 5),
    ("index tensor", lambda s, x: s.bn(x)[:, s.index], 5, 4, 5),
    ("item of an unknown container", lambda s, x: x[0], None, None, None),
    ("scalar", lambda s, x: 1 - s.bn(x) * 2, 4, 4, 4),
    ("scalar backwards", lambda s, x: s.bn(x * 2 + 1), 4, 4, 4),
    ("a size is a scalar", lambda s, x: s.bn(x) * x.shape[0], 4, 4, 4),
    ("small constant", added_constant, None, None, 4),
    ("small constant backwards", lambda s, x: s.bn(s.conv(x) + s.scale), 4, 4, 4),
    ("a constant may be the larger", lambda s, x: s.bn(x + s.full), 4, None, 4),
    ("a large constant", lambda s, x: s.conv(x) + s.full, None, None, 4),
    ("larger of two", lambda s, x: s.bn(x) + s.fc(x.mean((2, 3))), 4, 4, 4),
    ("two of one class", lambda s, x: s.conv(s.conv(x) + x), None, None, 4),
    ("two unknown", lambda s, x: x + x.squeeze(), None, None, None),
    ("in place", in_place, 4, 4, 4),
    ("linear", lambda s, x: s.fc(x.flatten(2)), 3, None, 3),
    ("embedding", lambda s, x: s.table(x.flatten(1)), 3, None, 3),
    ("einsum", lambda s, x: torch.einsum("nchw,oc->nohw", x, s.fc.weight), 4, 4, 4),
    ("einsum with dots", lambda s, x: torch.einsum("...c,oc->...o", x, s.fc.weight),
     None, None, None),
    ("bmm", lambda s, x: torch.bmm(x, x), 3, 3, 3),
    ("matmul of two", lambda s, x: s.bn(x) @ x.flatten(2).transpose(1, 2), 4, 4, 4),
    ("matmul of a vector", lambda s, x: x.flatten() @ s.fc.weight, None, None, None),
    ("levit", levit_linear_norm, 3, None, 3),
    ("attention", attention, 3, None, 3),
    ("contradiction", lambda s, x: s.bn3(s.bn(x)), None, None, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("forward", "result", "source", "assumed"),
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
def test_ranks(
    forward: _Forward, result: int | None, source: int | None, assumed: int | None
) -> None:
    ranks, first, last = known(forward)
    assert (ranks.rank(last), ranks.rank(first), ranks.assumed(last)) == (result, source, assumed)


def test_a_guard_names_the_earliest_value_of_each_class() -> None:
    ranks, first, last = known(lambda s, x: F.relu(s.conv(x)).unsqueeze(1))
    assert ranks.guards() == []
    ranks.use_assumption(last)
    assert ranks.assumed(last) == 5
    assert ranks.guards() == [(first, 4)]


def test_what_is_proven_needs_no_guard() -> None:
    ranks, _, last = known(lambda s, x: s.bn(s.conv(x)))
    ranks.use_assumption(last)
    assert ranks.guards() == []


def test_a_broadcast_relies_on_all_its_operands() -> None:
    ranks, first, last = known(lambda s, x: s.conv(x) + s.conv(x.squeeze()))
    assert (ranks.rank(last), ranks.assumed(last)) == (None, 4)
    ranks.use_assumption(last)
    assert [rank for _, rank in ranks.guards()] == [4, 4]
    assert ranks.guards()[0][0] is first


def test_an_example_comes_before_the_assumption() -> None:
    program = capture(Net(lambda s, x: s.conv(x)).eval()).programs[0]
    x, conv = list(program.graph.nodes)[:2]
    ranks = Ranks(program.graph, Calls(program.module), {x: 3})
    assert (ranks.rank(conv), ranks.assumed(conv)) == (None, 3)
    ranks.use_assumption(conv)
    assert ranks.guards() == [(x, 3)]


def test_new_nodes_join_the_class_of_what_they_replace() -> None:
    program = capture(Net(lambda s, x: s.conv(x).unsqueeze(1)).eval()).programs[0]
    graph = program.graph
    x, _, wider = list(graph.nodes)[:3]
    ranks = Ranks(graph, Calls(program.module))
    with graph.inserting_before(wider):
        new, other = graph.call_module("conv", (x,)), graph.call_module("conv", (x,))
    ranks.replacing(new, wider)
    assert ranks.assumed(new) == 5
    assert ranks.assumed(other) is None
    ranks.use_assumption(new)
    graph.erase_node(other)
    assert ranks.guards() == [(x, 4)]


# --- the property: a proven rank is the rank, an assumed one is it for batches ---------------

_STEPS: dict[str, _Forward] = {
    "bn": lambda s, x: s.bn(x),
    "conv": lambda s, x: s.conv(x),
    "fc": lambda s, x: s.fc(x),
    "relu": lambda s, x: F.relu(x),
    "add": lambda s, x: x + 1,
    "scale": lambda s, x: x * s.scale,
    "full": lambda s, x: s.full + x,
    "self": lambda s, x: x + s.pool(x),
    "flatten": lambda s, x: x.flatten(1),
    "flatten all": lambda s, x: x.flatten(),
    "flatten two": lambda s, x: x.flatten(0, 1),
    "flatten last": lambda s, x: x.flatten(-2),
    "flatten middle": lambda s, x: x.flatten(1, -2),
    "mean": lambda s, x: x.mean(-1),
    "mean kept": lambda s, x: x.mean((0, 1), keepdim=True),
    "sum": lambda s, x: torch.sum(x, (0, 1)),
    "unsqueeze": lambda s, x: x.unsqueeze(0),
    "squeeze": lambda s, x: x.squeeze(),
    "transpose": lambda s, x: x.transpose(-1, -2),
    "permute": lambda s, x: x.permute(0, 2, 3, 1),
    "index": lambda s, x: (x * 1)[0],
    "slice": lambda s, x: (x * 1)[:1],
    "table": lambda s, x: (x * 1)[:, s.index],
    "none": lambda s, x: x[None, ..., 0],
    "chunk": lambda s, x: x.chunk(2, 0)[0],
    "stack": lambda s, x: torch.stack([x, x]),
    "cat": lambda s, x: torch.cat([x, x * 2], 0),
    "matmul": lambda s, x: x @ s.fc.weight,
    "matmul self": lambda s, x: x @ x.mT,
    "reshape": lambda s, x: x.reshape(4, -1),
    "reshape as": lambda s, x: x.flatten(0, 1).reshape_as(x),
    "max": lambda s, x: x.amax(1),
    "pad": lambda s, x: F.pad(x, (1, 1)),
    "broadcast": lambda s, x: x.mean(0) + x,
    "pool": lambda s, x: F.max_pool2d(x, 1),
    "size": lambda s, x: x * x.shape[0] + x.size(-1),
}


class Observed(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.ranks: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.ranks[n] = value.dim()
        return value


@given(st.lists(st.sampled_from(sorted(_STEPS)), min_size=1, max_size=6), st.integers(2, 5))
def test_a_rank_is_what_the_value_has_when_it_runs(steps: list[str], rank: int) -> None:
    def forward(s: Any, x: Any) -> Any:
        for step in steps:
            x = _STEPS[step](s, x)
        return x

    program = capture(Net(forward).eval()).programs[0]
    ranks = Ranks(program.graph, Calls(program.module))
    nodes = list(program.graph.nodes)
    ranks.use_assumption(nodes[-1].args[0])
    run = Observed(program.module, program.graph)
    try:
        run.run(torch.ones((4,) * rank))
    except (RuntimeError, ValueError, IndexError):
        return  # no value, no rank
    for node, found in run.ranks.items():
        proven = ranks.rank(node)
        assert proven is None or proven == found, (node, program.graph)
    if all(run.ranks[node] == expected for node, expected in ranks.guards()):
        last = nodes[-1].args[0]
        assert isinstance(last, fx.Node)
        assert ranks.assumed(last) in (None, run.ranks[last]), program.graph
