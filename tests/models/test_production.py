"""What a deployer does with a result: print it, script it, export it, run the export, save it."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxrep
from fxrep.rewriting.pruning import Container
from support.check import randomize

timm = pytest.importorskip("timm")

MODELS = (
    "repvgg_a0", "mobileone_s0", "fastvit_t8", "resnet18",
    pytest.param("repghostnet_050", marks=pytest.mark.slow),
    pytest.param("densenet121", marks=pytest.mark.slow),
)  # fmt: skip
SIZE = 64

pytestmark = pytest.mark.real


@pytest.fixture(scope="module", params=MODELS)
def pair(request: Any) -> tuple[nn.Module, nn.Module]:
    """A model and its optimized form."""
    torch.manual_seed(0)
    model = randomize(timm.create_model(request.param)).eval()
    return model, fxrep.optimize(model)


def images(batch: int, size: int = SIZE) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def close(got: Any, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        wanted = model(x)
    error = (torch.as_tensor(got) - wanted).norm() / wanted.norm()
    assert error < 1e-4, f"{type(model).__name__} at {tuple(x.shape)}: {error:.1e}"


def test_the_tree_holds_what_is_called(pair: tuple[nn.Module, nn.Module]) -> None:
    _, fast = pair
    called: set[nn.Module] = set()
    hooks = [
        m.register_forward_hook(lambda m, *_: called.add(m))
        for m in fast.modules()
        if not isinstance(m, Container) and m is not fast
    ]
    fast(images(1))
    read = {str(node.target) for node in fast.graph.find_nodes(op="get_attr")}
    for hook in hooks:
        hook.remove()
    for path, module in fast.named_modules():
        if path and module not in called:
            assert isinstance(module, Container), f"nobody calls {path}"
            own = [f"{path}.{n}" for n, _ in module.named_parameters(recurse=False)]
            assert len(module) or own, f"nothing is left of {path}"
            assert read.issuperset(own), f"nobody reads {own}"
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules() if m not in called)


def test_prints(pair: tuple[nn.Module, nn.Module]) -> None:
    model, fast = pair
    text = repr(fast)
    assert text.startswith(type(model).__name__) and "Conv2d(" in text
    assert len(text.splitlines()) < len(repr(model).splitlines())


def test_scripts(pair: tuple[nn.Module, nn.Module]) -> None:
    model, fast = pair
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(fast), buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer)
    for batch, size in ((1, SIZE), (3, SIZE + 32)):
        close(scripted(images(batch, size)), model, images(batch, size))


def test_exports(pair: tuple[nn.Module, nn.Module], tmp_path: Any) -> None:
    model, fast = pair
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(fast, (images(2),), dynamic_shapes=(batch,), strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for n in (1, 3):
        close(loaded(images(n)), model, images(n))


def test_onnx_runs(pair: tuple[nn.Module, nn.Module], tmp_path: Any) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, fast = pair
    torch.onnx.export(
        fast,
        (images(2),),
        tmp_path / "model.onnx",
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        verbose=False,
    )
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (name,) = (each.name for each in session.get_inputs())
    for n in (1, 3):
        (got,) = session.run(None, {name: images(n).numpy()})
        close(got, model, images(n))


def test_copies_run_and_have_gradients(pair: tuple[nn.Module, nn.Module]) -> None:
    model, fast = pair
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert repr(twin) == repr(fast)
        for n in (1, 2):
            close(twin(images(n)).detach(), model, images(n))
        twin(images(2)).sum().backward()
        assert all(p.grad is not None for p in twin.parameters())
