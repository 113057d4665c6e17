"""Islands on the way to production: compiled, traced, exported, with their fused layers."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxrep
from capture.test_guards import Above, image, norms
from support.check import settled


class Sized(Above):
    """Stays Python for symbolic tracing; torch.export and torch.compile take it whole."""

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.block(x if x.shape[2] < 100 else -x))


def names(graph: fx.Graph) -> str:
    return " ".join(str(node.target) for node in graph.nodes)


def exported(model: nn.Module) -> Tensor:
    program = torch.export.export(model, (image(),), strict=False)
    assert "batch_norm" not in names(program.graph)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    result: Tensor = torch.export.load(file).module()(image())
    return result


def traced(model: nn.Module) -> Tensor:
    result: Any = torch.jit.trace(model, image())
    assert "batch_norm" not in str(result.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(result, file)
    file.seek(0)
    return torch.jit.load(file)(image())


def compiled(model: nn.Module) -> Tensor:
    seen: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        seen.append(gm)
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        result: Tensor = torch.compile(model, backend=backend, fullgraph=True)(image())
    (gm,) = seen
    assert "batch_norm" not in names(gm.graph)
    return result


def onnx(model: nn.Module) -> Tensor:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(model, (image(),), dynamo=True, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    return torch.tensor(session.run(None, {session.get_inputs()[0].name: image().numpy()})[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [exported, traced, compiled, onnx])
def test_the_fused_layers_are_deployed(way: Callable[[nn.Module], Tensor]) -> None:
    model = settled(Sized()).float()
    fast = fxrep.optimize(model)
    assert type(fast) is Sized
    torch.testing.assert_close(way(fast), model(image()), rtol=1e-4, atol=1e-5)
    assert not norms(fast, image())


@pytest.mark.filterwarnings("ignore")
def test_changed_layers_are_deployed_as_they_are() -> None:
    model = settled(Sized()).float()
    fast = fxrep.optimize(model)
    for each in (model, fast):
        each.get_submodule("block.bn").eps = 0.5  # type: ignore[assignment]
    expected = model(image())
    for strict in (False, True):
        program = torch.export.export(fast, (image(),), strict=strict)
        torch.testing.assert_close(program.module()(image()), expected)
    torch.testing.assert_close(torch.jit.trace(fast, image())(image()), expected)


@pytest.mark.filterwarnings("ignore")
def test_a_strict_export_has_the_original_layers() -> None:
    model = settled(Sized()).float()
    program = torch.export.export(fxrep.optimize(model), (image(),), strict=True)
    torch.testing.assert_close(program.module()(image()), model(image()))


def test_compiled_for_training() -> None:
    model = settled(Sized()).float()
    fast = fxrep.optimize(model)
    torch.compiler.reset()
    for each in (model, torch.compile(fast, backend="eager", fullgraph=True)):
        each(image()).sum().backward()
    for mine, theirs in zip(fast.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
