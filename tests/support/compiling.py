"""What tests of `torch.compile(backend="fxrep")` share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxrep.registry import graphs
from fxrep.torch_compile.backend import compile_graph
from fxrep.torch_compile.compiled import Folded
from support.check import FLOAT64, distance, randomize


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    graphs.clear()
    yield
    torch._dynamo.reset()


class Recorder:
    """An inner compiler that runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.inputs: list[tuple[Any, ...]] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(gm)
        self.inputs.append(tuple(inputs))
        return gm.forward

    def kinds(self) -> Counter[str]:
        """The calls in all graphs."""
        return Counter(
            str(getattr(node.target, "__name__", node.target))
            for gm in self.graphs
            for node in gm.graph.nodes
            if node.op.startswith("call")
        )

    @property
    def convs(self) -> int:
        return sum(n for name, n in self.kinds().items() if name.startswith("conv"))

    @property
    def batchnorms(self) -> int:
        return self.kinds()["batch_norm"]


def through(
    model: Any, inner: Any = "eager", *, compile: Mapping[str, Any] = {}, **options: Any
) -> Any:
    """The model compiled by the backend, with what is left in the hands of `inner`."""

    def backend(gm: torch.fx.GraphModule, inputs: Any, **given: Any) -> Callable[..., Any]:
        return compile_graph(gm, inputs, options={"inner": inner, **options}, **given)

    return torch.compile(model, backend=backend, **compile)


class Block(nn.Module):
    """Two branches and an identity, each with its BatchNorm, as in RepVGG."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.wide_bn = nn.BatchNorm2d(channels)
        self.narrow = nn.Conv2d(channels, channels, 1, bias=False)
        self.narrow_bn = nn.BatchNorm2d(channels)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        branches = self.wide_bn(self.wide(x)) + self.narrow_bn(self.narrow(x)) + self.bn(x)
        return F.relu(branches)


def block(dtype: torch.dtype = torch.float64) -> Block:
    return randomize(Block().eval()).to(dtype)


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape or (2, 4, 6, 6), dtype=dtype)


def same(compiled: Any, model: nn.Module, *inputs: Tensor, tolerance: float = FLOAT64) -> None:
    with torch.no_grad():
        got, expected = compiled(*inputs), model(*inputs)
    assert distance(got, expected) <= tolerance


def folded() -> list[Folded]:
    return [graph for graph in graphs if isinstance(graph, Folded)]


class OwnNorm(nn.Module):
    """BatchNorms that are no `nn.BatchNorm2d`: by name, by views, by hand."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.conv = nn.Conv2d(4, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x, bn = self.conv(x), self.bn
        mean, var = bn.running_mean, bn.running_var
        assert isinstance(mean, Tensor) and isinstance(var, Tensor)
        if self.spelling == "names":
            return F.batch_norm(
                x, running_mean=mean, running_var=var, training=self.training, momentum=0.5
            )
        if self.spelling == "views" or self.training:
            return F.batch_norm(x, mean.view(4), var.view(-1), training=self.training, momentum=0.5)
        return (x - mean[:, None, None]) * torch.rsqrt(var + 1e-5)[:, None, None]
