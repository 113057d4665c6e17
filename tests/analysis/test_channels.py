"""Sizes of channel axes: what is proven, by what, and what stays unknown."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from fxrep.analysis.channels import Channels
from fxrep.analysis.ranks import Ranks
from fxrep.capture.islands import capture
from fxrep.ops.calls import Calls

_Forward = Callable[[Any, Any], Any]


class OwnForward(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input[:, :4])


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input[:, :4], weight, bias)


class Renamed(nn.Conv2d):
    pass


class Net(nn.Module):
    """Layers from 4 to 8 channels, and tensors, for forwards written as lambdas."""

    def __init__(self, forward: _Forward) -> None:
        super().__init__()
        self.written = forward
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.grouped = nn.Conv2d(4, 8, 1, groups=2)
        self.one = nn.Conv2d(4, 1, 1)
        self.conv1 = nn.Conv1d(4, 8, 1)
        self.conv3 = nn.Conv3d(4, 8, 1)
        self.up = nn.ConvTranspose2d(4, 8, 1, groups=2)
        self.fc = nn.Linear(4, 8)
        self.renamed = Renamed(4, 8, 1)
        self.normed = parametrizations.weight_norm(nn.Conv2d(4, 8, 1))
        self.hooked = nn.Conv2d(4, 8, 1)
        self.hooked.register_forward_pre_hook(lambda module, args: (args[0][:, :4],))
        self.bn = nn.BatchNorm2d(4)
        self.bn1 = nn.BatchNorm1d(4)
        self.bn3 = nn.BatchNorm3d(4)
        self.free = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
        self.stats = nn.BatchNorm2d(4, affine=False)
        self.inorm = nn.InstanceNorm2d(4, affine=True)
        self.loose = nn.InstanceNorm2d(4)
        self.gn = nn.GroupNorm(2, 4)
        self.plain = nn.GroupNorm(2, 4, affine=False)
        self.ln = nn.LayerNorm((4, 6))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.resize = nn.Upsample(scale_factor=2, mode="bilinear")
        self.nearest = nn.Upsample(scale_factor=2)
        self.zeros = nn.ZeroPad2d(1)
        self.drop = nn.Dropout2d()
        self.shuffle = nn.PixelShuffle(2)
        self.unshuffle = nn.PixelUnshuffle(2)
        self.weight = nn.Parameter(torch.ones(8, 2, 1, 1))
        self.matrix = nn.Parameter(torch.ones(8, 4))
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.single = nn.Parameter(torch.ones(1))
        self.register_buffer("vector", torch.ones(4))
        self.register_buffer("empty", torch.ones(0))
        self.register_buffer("mask", torch.ones(4, 4, 4, 4))

    def forward(self, x: Any) -> Any:
        return self.written(self, x)


def known(forward: _Forward) -> tuple[Channels, fx.Node, fx.Node]:
    """Channels, the input, and the value returned."""
    program = capture(Net(forward).eval()).programs[0]
    nodes = list(program.graph.nodes)
    result = nodes[-1].args[0]
    assert isinstance(result, fx.Node)
    ranks = Ranks(program.graph, Calls(program.module))
    return Channels(program.graph, Calls(program.module), ranks.rank), nodes[0], result


def in_place(s: Any, x: Any) -> Any:
    y = s.conv(x)
    y += s.one(x)
    return y


def reshaped(s: Any, x: Any) -> Any:
    y = s.conv(x)
    return s.conv(x) + y.transpose_(1, 2)


def beside(s: Any, x: Any, other: Any) -> Any:
    """A second reader of x; the value of the first is returned."""
    return (other, s.conv(x))[0]


# forward, axis, size of the result, size of the input
TABLE: list[tuple[str, _Forward, int, int | None, int | None]] = [
    # what makes a value, and asks for its operand
    ("conv", lambda s, x: s.conv(x), -3, 8, 4),
    ("conv, spatial axis", lambda s, x: s.conv(x), -2, None, None),
    ("grouped conv", lambda s, x: s.grouped(x), -3, 8, 4),
    ("conv1d", lambda s, x: s.conv1(x), -2, 8, 4),
    ("conv3d", lambda s, x: s.conv3(x), -4, 8, 4),
    ("transposed conv", lambda s, x: s.up(x), -3, 8, 4),
    ("linear", lambda s, x: s.fc(x), -1, 8, 4),
    ("linear, another axis", lambda s, x: s.fc(s.conv(x)), -3, 8, 4),
    ("subclass", lambda s, x: s.renamed(x), -3, 8, 4),
    ("parametrized", lambda s, x: s.normed(x), -3, 8, 4),
    ("functional conv", lambda s, x: F.conv2d(x, s.weight, None, 1, 0, 1, 2), -3, 8, 4),
    ("torch's conv", lambda s, x: torch.conv2d(x, weight=s.weight, groups=2), -3, 8, 4),
    ("functional transposed", lambda s, x: F.conv_transpose2d(x, s.weight, groups=2), -3, 4, 8),
    ("functional linear", lambda s, x: F.linear(x, s.matrix), -1, 8, 4),
    ("computed weight", lambda s, x: F.conv2d(x, s.weight * 2, groups=2), -3, None, None),
    ("linear of a vector", lambda s, x: F.linear(x, s.vector), -1, None, None),
    ("batchnorm2d", lambda s, x: s.bn(x), -3, 4, 4),
    ("batchnorm3d", lambda s, x: s.bn3(x), -4, 4, 4),
    ("batchnorm1d of known rank", lambda s, x: s.bn1(x.flatten(2)), -2, 4, None),
    ("batchnorm1d", lambda s, x: s.bn1(x), -1, None, None),
    ("batchnorm without vectors", lambda s, x: s.free(x), -3, None, None),
    ("batchnorm with statistics only", lambda s, x: s.stats(x), -3, 4, 4),
    ("functional batchnorm",
     lambda s, x: F.batch_norm(x.flatten(2), s.vector, s.vector), -2, 4, None),
    ("functional batchnorm of unknown rank",
     lambda s, x: F.batch_norm(x, s.vector, s.vector), -3, None, None),
    ("instancenorm", lambda s, x: s.inorm(x), -3, 4, 4),
    ("instancenorm that only warns", lambda s, x: s.loose(x), -3, None, None),
    ("groupnorm", lambda s, x: s.gn(x.flatten(2)), -2, 4, None),
    ("groupnorm of unknown rank", lambda s, x: s.gn(x), -3, None, None),
    ("groupnorm without vectors", lambda s, x: s.plain(x.flatten(2)), -2, None, None),
    ("functional groupnorm", lambda s, x: F.group_norm(x.flatten(2), 2, s.vector), -2, 4, None),
    ("layernorm", lambda s, x: s.ln(x), -2, 4, 4),
    ("functional layernorm", lambda s, x: F.layer_norm(x, [4]), -1, 4, 4),
    ("constant", lambda s, x: s.mask, -3, 4, None),
    ("constant of fewer axes", lambda s, x: s.matrix, -3, None, None),
    # what keeps the size, both ways
    ("elementwise", lambda s, x: F.relu(s.drop(x.contiguous())), -3, None, None),
    ("elementwise after", lambda s, x: -F.gelu(s.drop(s.conv(x)).float()).clone(), -3, 8, 4),
    ("elementwise before", lambda s, x: s.conv(torch.sigmoid(s.drop(x.relu()))), -3, 8, 4),
    ("in-place method", lambda s, x: s.conv(x.mul(2).relu_()), -3, 8, 4),
    ("arithmetic with numbers", lambda s, x: 1 - s.conv(2 * x.add(1)) ** 2, -3, 8, 4),
    ("a reader of a sibling", lambda s, x: beside(s, x, F.relu(x)), -3, 4, 4),
    ("a reader of another operand", lambda s, x: s.conv(s.mask.type_as(x)), -3, 8, None),
    ("pool", lambda s, x: s.pool(s.conv(F.max_pool2d(x, 2))), -3, 8, 4),
    ("pool over the axis", lambda s, x: F.avg_pool3d(s.conv(x), 1), -3, None, 4),
    ("pad", lambda s, x: s.zeros(s.conv(F.pad(x, (1, 1, 1, 1)))), -3, 8, 4),
    ("pad by name", lambda s, x: s.conv(F.pad(input=x, pad=(1, 1))), -3, 8, 4),
    ("pad the axis", lambda s, x: F.pad(s.conv(x), (0, 0, 0, 0, 1, 2)), -3, 11, 4),
    ("pad before", lambda s, x: s.conv(F.pad(x, (0, 0, 0, 0, 1, 2))), -3, 8, 1),
    ("pad by what is not known", lambda s, x: F.pad(s.conv(x), (0, x.shape[2])), -3, None, 4),
    ("upsample", lambda s, x: s.resize(s.conv(F.interpolate(x, (4, 4)))), -3, 8, 4),
    ("upsample of unknown rank", lambda s, x: s.nearest(s.conv(x)), -3, None, 4),
    ("upsample of known rank", lambda s, x: s.nearest(s.conv(s.bn(x))), -3, 8, 4),
    ("upsample by a list", lambda s, x: F.interpolate(s.conv(x), (8,)), -3, 8, 4),
    ("upsample over the axis", lambda s, x: F.interpolate(s.conv(x), (8, 8, 8)), -3, None, 4),
    ("pixel shuffle", lambda s, x: s.shuffle(s.conv(x)), -3, 2, 4),
    ("pixel unshuffle", lambda s, x: F.pixel_unshuffle(s.conv(x), 2), -3, 32, 4),
    ("pixel unshuffle before", lambda s, x: s.conv(s.unshuffle(x)), -3, 8, 1),
    ("pixel shuffle before", lambda s, x: s.conv(F.relu(F.pixel_shuffle(x, 2))), -3, 8, 16),
    ("odd pixel shuffle", lambda s, x: F.pixel_shuffle(s.conv(x), 3), -3, None, 4),
    # several operands
    ("sum", lambda s, x: s.conv(x) + s.grouped(x), -3, 8, 4),
    ("sum of one channel", lambda s, x: s.conv(x) * s.one(x), -3, 8, 4),
    ("sum with what is not known", lambda s, x: s.conv(x) + x.mean(1, True), -3, None, 4),
    ("sum that raises", lambda s, x: s.conv(x) + x, -3, None, 4),
    ("sum of itself", lambda s, x: s.conv(x + x), -3, 8, 4),
    ("no way back through a sum", lambda s, x: s.conv(x + s.mask), -3, 8, None),
    ("nor through a product", lambda s, x: s.conv(x * x.flatten()), -3, 8, None),
    ("vector constant", lambda s, x: s.conv(x) * s.single, -3, 8, 4),
    ("vector constant that grows", lambda s, x: s.one(x) + s.scale, -3, 8, 4),
    ("vector constant and nothing else", lambda s, x: x + s.scale, -3, None, None),
    ("operand of a lower rank", lambda s, x: s.bn(x) + s.matrix, -3, 4, 4),
    ("operand of a lower rank that is no constant",
     lambda s, x: s.bn(x) * x.mean((1, 2, 3)), -3, 4, 4),
    ("operand of unknown rank", lambda s, x: s.conv(x) * x.squeeze(), -3, None, 4),
    ("where", lambda s, x: torch.where(s.conv(x) > 0, s.grouped(x), 0.0), -3, 8, 4),
    ("in place", in_place, -3, 8, 4),
    ("cat", lambda s, x: torch.cat([s.conv(x), s.one(x)], -3), -3, 9, 4),
    ("cat of known rank", lambda s, x: torch.cat([s.conv(s.bn(x)), s.one(x)], dim=1), -3, 9, 4),
    ("cat of unknown rank", lambda s, x: torch.cat([s.conv(x), s.one(x)], 1), -3, None, 4),
    ("cat with what is not known",
     lambda s, x: torch.cat([s.conv(x), x.mean(1, True)], -3), -3, None, 4),
    ("cat on another axis", lambda s, x: torch.cat([s.conv(x), x.mean(1, True)], -1), -3, 8, 4),
    ("cat with an empty vector", lambda s, x: torch.cat([s.empty, s.fc(x)], -2), -1, 8, 4),
    ("chunk", lambda s, x: s.conv(x).chunk(3, -3)[2], -3, 2, 4),
    ("chunk of known rank", lambda s, x: s.conv(s.bn(x)).chunk(3, 1)[0], -3, 3, 4),
    ("chunk of unknown rank", lambda s, x: s.conv(x).chunk(2, 1)[0], -3, None, 4),
    ("chunk on another axis", lambda s, x: s.conv(x).chunk(2, -1)[0], -3, 8, 4),
    ("split", lambda s, x: torch.split(s.conv(x), [3, 5], dim=-3)[-1], -3, 5, 4),
    ("split evenly", lambda s, x: s.conv(x).split(3, -3)[1], -3, 3, 4),
    ("tensor_split", lambda s, x: s.conv(x).tensor_split(3, -3)[2], -3, 2, 4),
    ("slice", lambda s, x: s.conv(s.bn(x))[:, 1:-2], -3, 5, 4),
    ("slice from the end", lambda s, x: s.conv(x)[..., ::3, :, :], -3, 3, 4),
    ("slice of another axis", lambda s, x: s.conv(x)[..., 1:], -3, 8, 4),
    ("slice of unknown rank", lambda s, x: s.conv(x)[:, 1:], -3, None, 4),
    ("slice by what is not known", lambda s, x: s.conv(x)[..., : x.shape[0], :, :], -3, None, 4),
    ("no way back through a slice", lambda s, x: s.conv(x[..., :4, :, :]), -3, 8, None),
    ("index", lambda s, x: s.conv(s.bn(x))[:, 0], -3, None, 4),
    # orders of axes
    ("permute", lambda s, x: s.conv(x).permute(0, 2, 3, 1), -1, 8, None),
    ("permute from the end", lambda s, x: torch.permute(s.conv(x), (0, -2, -1, -3)), -1, 8, None),
    ("transpose", lambda s, x: s.conv(x).transpose(-1, -3), -1, 8, None),
    ("transpose of known rank", lambda s, x: s.conv(s.bn(x)).transpose(1, 2), -2, 8, None),
    ("transpose of unknown rank", lambda s, x: s.conv(x).transpose(1, 2), -2, None, None),
    ("transpose of other axes", lambda s, x: s.conv(x).transpose(-1, -2), -3, 8, 4),
    ("reshape", lambda s, x: s.conv(x).flatten(1), -1, None, None),
    # what may accept any other size
    ("hooked", lambda s, x: s.hooked(x), -3, None, None),
    ("a shape changed in place", reshaped, -3, None, None),
    ("axes from the first", lambda s, x: s.conv(x), 1, None, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("forward", "axis", "result", "source"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE]
)
def test_sizes(forward: _Forward, axis: int, result: int | None, source: int | None) -> None:
    channels, first, last = known(forward)
    assert (channels.of(last, axis), channels.of(first, axis)) == (result, source)


# --- graphs as no tracer here would make them -----------------------------------------------------


def graph_of(module: nn.Module, path: str = "layer") -> tuple[Channels, fx.Node, fx.Node]:
    """A call of one module as it is, of an argument nothing else is known of."""
    root = nn.Module()
    root.add_module("layer", module)
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_module(path, (x,))
    graph.output(y)
    return Channels(graph, Calls(root), lambda node: None), x, y


@pytest.mark.parametrize("kind", [OwnForward, OwnConvolution])
def test_a_subclass_that_computes_something_else_proves_nothing(kind: type[nn.Conv2d]) -> None:
    channels, x, y = graph_of(kind(4, 8, 1))
    assert (channels.of(x, -3), channels.of(y, -3)) == (None, None)


def test_nor_does_an_instance_with_a_forward_of_its_own_or_no_module_at_all() -> None:
    layer = nn.Conv2d(4, 8, 1)
    layer.forward = lambda input: input  # type: ignore[method-assign]
    channels, x, y = graph_of(layer)
    assert (channels.of(x, -3), channels.of(y, -3)) == (None, None)
    channels, x, y = graph_of(nn.Conv2d(4, 8, 1), "missing")
    assert (channels.of(x, -3), channels.of(y, -3)) == (None, None)


def test_the_weight_counts_not_what_the_layer_was_made_for() -> None:
    layer = nn.Conv2d(4, 8, 1)
    layer.weight = nn.Parameter(torch.ones(6, 3, 1, 1))
    channels, x, y = graph_of(layer)
    assert (channels.of(x, -3), channels.of(y, -3)) == (3, 6)


@pytest.mark.parametrize("tracks", [True, False])
def test_statistics_that_are_not_tracked_are_not_looked_at_in_training(tracks: bool) -> None:
    layer = nn.BatchNorm2d(4, affine=False)
    layer.track_running_stats = tracks
    channels, x, _ = graph_of(layer)
    assert channels.of(x, -3) == (4 if tracks else None)


def chain(length: int) -> tuple[fx.Graph, Channels, list[fx.Node], nn.Module]:
    root = nn.Module()
    root.add_module("conv", nn.Conv2d(4, 4, 1))
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(length):
        nodes.append(graph.call_function(F.relu, (nodes[-1],)))
    graph.output(nodes[-1])
    return graph, Channels(graph, Calls(root), lambda node: None), nodes, root


def test_nodes_may_come_and_go() -> None:
    graph, channels, nodes, _ = chain(3)
    assert channels.of(nodes[0], -3) is None
    with graph.inserting_after(nodes[-1]):
        new = graph.call_module("conv", (nodes[-1],))
    assert channels.of(nodes[0], -3) == 4
    graph.erase_node(new)
    assert channels.of(new, -3) is None
    assert channels.of(nodes[0], -3) == 4


def test_a_number_is_no_tensor_because_a_tensor_was_added_to_it() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Any, n: Any) -> Any:
            y = x * n
            n += x
            return self.conv(n), y

    program = capture(Counts().eval()).programs[0]
    x, n = list(program.graph.nodes)[:2]
    channels = Channels(program.graph, Calls(program.module), lambda node: None)
    assert (channels.of(n, -3), channels.of(x, -3)) == (None, None)


def test_long_graphs_cost_little_per_answer() -> None:
    graph, channels, nodes, _ = chain(4000)
    start = time.process_time()
    assert channels.of(nodes[-1], -3) is None
    assert channels.of(nodes[0], -3) is None
    with graph.inserting_after(nodes[0]):
        graph.call_module("conv", (nodes[0],))
    assert channels.of(nodes[-1], -3) is None  # too far away to be seen
    assert all(channels.of(node, -3) == 4 for node in nodes)  # not from one to the next
    assert time.process_time() - start < 5


def test_many_readers_and_operands_cost_little_per_answer() -> None:
    looked_up = []

    class Root(nn.Module):
        def get_submodule(self, target: str) -> nn.Module:
            looked_up.append(target)
            return super().get_submodule(target)

    root = Root()
    root.add_module("bn", nn.BatchNorm1d(4))
    graph = fx.Graph()
    x = graph.placeholder("x")
    readers = [graph.call_module("bn", (x,)) for _ in range(8000)]
    joined = [graph.call_function(torch.cat, (readers[:n], -3)) for n in (100, 8000)]
    channels = Channels(graph, Calls(root), lambda node: None)
    for node in (x, *readers[:10], *joined):
        looked_up.clear()
        assert channels.of(node, -3) is None
        assert len(looked_up) < 5000


# --- the property: a size that is proven is the size ----------------------------------------------

_STEPS: dict[str, _Forward] = {
    "conv": lambda s, x: s.conv(x),
    "back": lambda s, x: s.back(x),
    "one": lambda s, x: s.one(x),
    "conv1": lambda s, x: s.conv1(x),
    "up": lambda s, x: s.up(x),
    "fc": lambda s, x: s.fc(x),
    "bn": lambda s, x: s.bn(x),
    "bn1": lambda s, x: s.bn1(x),
    "inorm": lambda s, x: s.inorm(x),
    "loose": lambda s, x: s.loose(x),
    "gn": lambda s, x: s.gn(x),
    "ln": lambda s, x: F.layer_norm(x, (4, 4)),
    "relu": lambda s, x: F.relu(x),
    "in place": lambda s, x: (x * 1).add_(s.single),
    "number": lambda s, x: 1 - x / 2,
    "scale": lambda s, x: x * s.scale,
    "matrix": lambda s, x: s.matrix - x,
    "single": lambda s, x: x + s.single,
    "self": lambda s, x: x + s.pool(x) * F.relu(x),
    "sum": lambda s, x: s.back(s.conv(x)) + x,
    "gate": lambda s, x: x * s.one(x),
    "channels gate": lambda s, x: x * x.mean((-1, -2)),
    "pool": lambda s, x: s.pool(x),
    "pool1": lambda s, x: F.max_pool1d(x, 1),
    "pool3": lambda s, x: F.avg_pool3d(x, 2, ceil_mode=True),
    "pad": lambda s, x: F.pad(x, (1, 1)),
    "pad all": lambda s, x: F.pad(x, (0, 0, 1, -1, 2, 2)),
    "crop": lambda s, x: F.pad(x, (0, 0, 0, 0, -2, -2)),
    "nearest": lambda s, x: s.nearest(x),
    "resize": lambda s, x: s.resize(x),
    "resize by a list": lambda s, x: F.interpolate(x, (4, 4)),
    "resize another": lambda s, x: F.interpolate(x, [4]),
    "shuffle": lambda s, x: s.shuffle(x),
    "unshuffle": lambda s, x: s.unshuffle(x),
    "cat": lambda s, x: torch.cat([x, F.relu(x)], 1),
    "cat last": lambda s, x: torch.cat([x, x], -1),
    "cat third": lambda s, x: torch.cat([s.one(x), x], -3),
    "cat constant": lambda s, x: torch.cat([s.mask, x], 0),
    "chunk": lambda s, x: x.chunk(3, 1)[1],
    "split": lambda s, x: x.split(3, -3)[0],
    "split by sizes": lambda s, x: torch.split(x, [3, 1], -1)[1],
    "tensor_split": lambda s, x: x.tensor_split(3, dim=1)[-1],
    "slice": lambda s, x: (x * 1)[:, 1:],
    "slice of one axis": lambda s, x: (x * 1)[:2],
    "slice third": lambda s, x: x[..., -4:, :, :],
    "index": lambda s, x: (x * 1)[0],
    "permute": lambda s, x: x.permute(0, 2, 3, 1),
    "permute three": lambda s, x: torch.permute(x, (-2, 0, 2)),
    "transpose": lambda s, x: x.transpose(1, -1),
    "flatten": lambda s, x: x.flatten(2),
    "flatten one": lambda s, x: x.flatten(1),
    "unsqueeze": lambda s, x: x.unsqueeze(1),
    "squeeze": lambda s, x: x.squeeze(),
    "mean": lambda s, x: x.mean(1, keepdim=True),
}


# Layers make and ask for sizes: without them nothing is proven.
_LAYERS = ("conv", "back", "one", "up", "fc", "bn", "bn1", "inorm", "gn", "sum", "gate", "self")


class Steps(Net):
    """Those of some steps that an input of the given shape can go through."""

    def __init__(self, steps: list[str], shape: list[int]) -> None:
        super().__init__(self.run)
        self.back = nn.Conv2d(8, 4, 1)
        self.eval()
        self.steps: list[str] = []
        x = torch.ones(shape)
        for step in steps:
            try:
                y = _STEPS[step](self, x)
            except (RuntimeError, ValueError, IndexError, NotImplementedError):
                continue
            if 0 < y.numel() < 20_000:
                x = y
                self.steps.append(step)

    def run(self, s: Any, x: Any) -> Any:
        for step in self.steps:
            x = _STEPS[step](s, x)
        return x


class Observed(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
        return value


@pytest.mark.filterwarnings("ignore:input's size at dim")
@given(
    st.lists(st.sampled_from(_LAYERS) | st.sampled_from(sorted(_STEPS)), min_size=1, max_size=12),
    st.lists(st.sampled_from((1, 4, 4, 4, 8)), min_size=1, max_size=5),
    st.booleans(),
)
def test_a_size_is_what_the_value_has_when_it_runs(
    steps: list[str], shape: list[int], backwards: bool
) -> None:
    program = capture(Steps(steps, shape)).programs[0]
    run = Observed(program.module, program.graph)
    run.run(torch.ones(shape))
    ranks = Ranks(program.graph, Calls(program.module))
    channels = Channels(program.graph, Calls(program.module), ranks.rank)
    seen = list(run.shapes.items())
    for node, found in reversed(seen) if backwards else seen:
        for axis in range(-7, 0):
            size = channels.of(node, axis)
            actual = found[axis] if -axis <= len(found) else None
            assert size in (None, actual), (node, axis, found, program.graph)
