"""Graphs that were not traced by fxrep: other people's, exported programs, ATen operators."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

import fxrep
from fxrep.capture.aten import respelled
from support.check import FLOAT64, count, distance, randomize, snapshot, untouched

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Net(nn.Module):
    """A bit of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.wide_bn = nn.BatchNorm2d(4)
        self.narrow = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.up_bn = nn.BatchNorm2d(6)
        self.drop = nn.Dropout()
        self.head = nn.Linear(6, 8)
        self.head_bn = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1))
        x = F.relu(self.wide_bn(self.wide(x)) + self.narrow(x) + self.bn(x))
        x = F.max_pool2d(F.relu(self.up_bn(self.up(x)), inplace=True), 2)
        x = torch.cat([x[:, :3], x[:, 3:]], 1)
        x = self.drop(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return self.head_bn(self.head(x))


SHAPES = ({0: Dim("n", min=1), 2: Dim("h", min=4), 3: Dim("w", min=4)},)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("shapes", [None, SHAPES])
def test_an_exported_program(shapes: Any, decomposed: bool) -> None:
    model, x = randomize(Net().eval()).double(), torch.randn(2, 4, 6, 6).double()
    program = export(model, (x,), dynamic_shapes=shapes)
    module = (program.run_decompositions() if decomposed else program).module()
    fast = fxrep.optimize(module)
    assert distance(fast(x), model(x)) <= FLOAT64
    ops = count(fast, (x,))
    assert (ops.layers, ops.batchnorms) == (3, 0), ops.kinds
    other = torch.randn(3, 4, 9, 8).double()
    if shapes is None:
        with pytest.raises(AssertionError, match=r"Guard failed: x.size\(\)\[0\] == 2"):
            fast(other)
    else:
        assert distance(fast(other), model(other)) <= FLOAT64


HEIGHT = Dim("height", min=2, max=16)


class Summed(nn.Module):
    """Two inputs, whose sizes an export relates to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + y


GUARDS: dict[str, Any] = {
    "fixed": (None, None),
    "a range": ({0: Dim("n", min=2, max=8)}, {0: Dim("n", min=2, max=8)}),
    "equal sizes": ({2: HEIGHT, 3: HEIGHT}, {2: HEIGHT, 3: HEIGHT}),
    "derived": ({2: 2 * HEIGHT}, {2: 2 * HEIGHT}),
    "found": ({0: Dim.AUTO, 2: Dim.AUTO}, {0: Dim.AUTO, 2: Dim.AUTO}),
}


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("name", GUARDS)
def test_an_exported_program_refuses_the_sizes_that_it_refused(name: str, decomposed: bool) -> None:
    model = randomize(Summed().eval())
    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    program = export(model, (x, y), dynamic_shapes=GUARDS[name])
    module = (program.run_decompositions() if decomposed else program).module()
    fast = fxrep.optimize(module)
    assert len(fxrep.report(fast).rewrites) == 1
    ran = 0
    for n, h, w in [(2, 8, 8), (8, 8, 8), (9, 8, 8), (1, 8, 8), (2, 9, 8), (2, 10, 8), (2, 40, 8),
                    (2, 10, 10), (2, 8, 4)]:  # fmt: skip
        given = torch.randn(n, 3, h, w), torch.randn(n, 4, h, w)
        try:
            expected = module(*given)
        except AssertionError as error:
            with pytest.raises(AssertionError, match="Guard failed"):
                fast(*given)
            assert "Guard failed" in str(error)
        else:
            ran += 1
            torch.testing.assert_close(fast(*given), expected, rtol=1e-4, atol=1e-4)
    assert 0 < ran < 9
    with pytest.raises(AssertionError):
        fast(x, torch.randn(2, 4, 4, 8))


@pytest.mark.parametrize("name", [name for name in GUARDS if name != "derived"])
def test_an_exported_program_whose_hook_checks_the_sizes(name: str) -> None:
    model = randomize(Summed().eval())
    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    module = export(model, (x, y), dynamic_shapes=GUARDS[name]).module(check_guards=False)
    fast = fxrep.optimize(module)
    assert len(fxrep.report(fast).rewrites) == 1
    for n, h, w in [(2, 8, 8), (9, 8, 8), (2, 9, 8), (2, 10, 10), (2, 40, 40)]:
        given = torch.randn(n, 3, h, w), torch.randn(n, 4, h, w)
        try:
            expected = module(*given)
        except RuntimeError:
            with pytest.raises(AssertionError, match="was exported with size"):
                fast(*given)
        else:
            torch.testing.assert_close(fast(*given), expected, rtol=1e-4, atol=1e-4)


def test_example_inputs_compare_an_exported_program() -> None:
    model, x = randomize(Net().eval()), torch.randn(2, 4, 6, 6)
    report = fxrep.report(fxrep.optimize(export(model, (x,)).module(), x))
    assert report.error is not None and report.error < 1e-5


def test_a_graph_of_make_fx() -> None:
    model, x = randomize(Net().eval()).double(), torch.randn(2, 4, 6, 6).double()
    fast = fxrep.optimize(make_fx(model)(x).eval())
    assert distance(fast(x), model(x)) <= FLOAT64
    assert count(fast, (x,)).batchnorms == 0


def test_a_graph_of_symbolic_trace() -> None:
    model, x = randomize(Net().eval()).double(), torch.randn(2, 4, 6, 6).double()
    graph = fx.symbolic_trace(model)
    fast = untouched(graph, lambda: fxrep.optimize(graph))
    assert distance(fast(x), model(x)) <= FLOAT64
    assert count(fast, (x,)).batchnorms == 0


def test_graphs_inside_a_model() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = fx.symbolic_trace(randomize(Net().eval()))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if x.sum() > -1e9 else x

    model, x = Outer().eval().double(), torch.randn(2, 4, 6, 6).double()
    fast = fxrep.optimize(model)
    assert distance(fast(x), model(x)) <= FLOAT64
    assert count(fast, (x,)).batchnorms == 0


def test_the_exported_module_is_not_changed() -> None:
    x = torch.randn(2, 4, 6, 6)
    module = export(randomize(Net().eval()), (x,)).module()
    assert isinstance(module, fx.GraphModule)
    code, before = module.code, {k: v for k, v in snapshot(module).items() if "identity" in k}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fxrep.optimize(module)
    assert module.code == code
    assert {k: v for k, v in snapshot(module).items() if "identity" in k} == before


def test_batchnorm_that_trains_stays() -> None:
    model, x = randomize(Net().train()), torch.randn(2, 4, 6, 6)
    module = export(model, (x,)).module()
    reasons = {skip.reason for skip in fxrep.report(fxrep.optimize(module)).skipped}
    assert "BatchNorm is in training mode" in reasons


@pytest.mark.parametrize(
    ("function", "kinds"),
    [
        (lambda x: x[:, 1:3, ::2], {"getitem"}),
        (lambda x: torch.split(x, 2, 1)[1], {"split", "getitem"}),
        (lambda x: F.avg_pool2d(x, 2), {"avg_pool2d"}),
        (lambda x: F.silu(x) * 2 - 1, {"silu", "mul", "sub"}),
    ],
)
def test_operators_get_torchs_names(function: Any, kinds: set[str]) -> None:
    x = torch.randn(1, 4, 6, 6)
    traced = make_fx(function, pre_dispatch=True)(x)
    graph = respelled(traced)
    assert isinstance(graph, fx.GraphModule)
    calls = [node for node in graph.graph.nodes if node.op.startswith("call")]
    names = {str(getattr(node.target, "__name__", node.target)) for node in calls}
    assert {name for name in names if "." not in name} == kinds
    assert torch.equal(graph(x), function(x))


def test_other_modules_are_left_as_they_are() -> None:
    for model in (Net(), fx.symbolic_trace(Net())):
        assert respelled(model) is model
