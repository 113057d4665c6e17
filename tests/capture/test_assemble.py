"""Assembled modules live on like the originals: copied, saved, exported, compiled, traced again."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxrep
from fxrep.capture.assemble import assemble, attached, seal
from fxrep.capture.islands import capture
from fxrep.errors import SpecializationError
from fxrep.report import Report
from support.check import assert_equal, settled
from support.models import IMAGE, conv_bn
from support.saving import saved


class Whole(nn.Module):
    """Traces as a whole, with an argument that is baked in and in-place operations."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 10
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.unused = nn.Linear(1, 1)
        self.register_buffer("shift", torch.rand(4, 1, 1))

    def forward(self, x: torch.Tensor, *, scale: float = 2.0, flag: bool = False) -> torch.Tensor:
        y = z = self.stem(x)
        y += self.shift
        z[:, 0] = 1.0
        return -y if flag else y * scale

    def features(self) -> int:
        """A method that parents call."""
        return self.num_classes


class Islands(nn.Module):
    """Decides on a size, so only its children trace; one is called with another argument."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Whole()
        self.layers = nn.ModuleList([Whole(), Whole()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.child(x, flag=True) if x.shape[0] == 1 else x
        for layer in self.layers:
            y = y + layer(x) * layer.features()
        return y


def image() -> torch.Tensor:
    return torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)


def exported(module: nn.Module) -> torch.Tensor:
    module = copy.deepcopy(module)
    program = torch.export.export(module, (image(),), strict=False)
    result: torch.Tensor = program.module()(image())
    return result


def reloaded(module: nn.Module) -> nn.Module:
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for tensor in module.state_dict().values():
        tensor.zero_()
    module.load_state_dict(state)
    return module


def optimized_again(module: nn.Module) -> nn.Module:
    return assemble(capture(module))


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "save": saved,
    "twice": lambda module: copy.deepcopy(saved(copy.deepcopy(module))),
    "state_dict": reloaded,
    "again": optimized_again,
    "double": lambda module: module.double().float(),
}


@pytest.mark.parametrize("kind", [Whole, Islands])
@pytest.mark.parametrize("way", list(WAYS))
def test_lives_on(kind: Any, way: str) -> None:
    model = kind().eval()
    expected = model(image())
    module = assemble(capture(model))
    result = WAYS[way](module)
    del module
    assert torch.equal(result(image()), expected)
    assert torch.equal(result(image()), expected)  # also the second time
    assert type(result).__name__ == kind.__name__
    assert not any(each.training for each in result.modules())
    assert inspect.signature(result.forward) == inspect.signature(model.forward)
    assert list(result.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("kind", [Whole, Islands])
def test_runs_elsewhere(kind: Any) -> None:
    model = kind().eval()
    with torch.no_grad():
        expected = model(image())
        result = assemble(capture(model))
        torch.testing.assert_close(torch.jit.trace(result, image())(image()), expected)
        torch.testing.assert_close(exported(result), exported(model))
        compiled = torch.compile(result, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(image()), expected)
        called = torch.func.functional_call(result, result.state_dict(), (image(),))
        torch.testing.assert_close(called, expected)


def test_keeps_attributes_and_guards() -> None:
    result = assemble(capture(Whole().eval()))
    for module in (result, copy.deepcopy(result), saved(result)):
        assert isinstance(module, torch.fx.GraphModule)
        assert module.num_classes == 10
        assert isinstance(module.unused, nn.Linear)
        module.graph.lint()
        with pytest.raises(SpecializationError, match="'flag'"):
            module(image(), flag=True)


def test_edited_graph_compiles_again() -> None:
    result = assemble(capture(Whole().eval()))
    for node in result.graph.nodes:
        if node.op == "get_attr":
            with result.graph.inserting_after(node):
                zero = result.graph.call_method("mul", (node, 0))
            node.replace_all_uses_with(
                zero, delete_user_cb=lambda user, zero=zero: user is not zero
            )
    expected = result(image())
    result.recompile()
    assert not torch.equal(result(image()), expected)
    assert torch.equal(saved(result)(image()), result(image()))


def test_islands_belong_to_their_copy() -> None:
    model = Islands().eval()
    result = assemble(capture(model))
    other = copy.deepcopy(result)
    other.child.shift.add_(1)
    other.layers[0].shift.add_(1)
    assert torch.equal(result(image()), model(image()))
    assert not torch.equal(other(image()), model(image()))
    assert type(result.child) is Whole


@pytest.mark.parametrize("kind", [Whole, Islands])
def test_report_travels(kind: Any) -> None:
    result = assemble(capture(kind().eval()))
    assert attached(result) is None
    seal(result, Report((), ()))
    for module in (result, copy.deepcopy(result), saved(result), copy.copy(result)):
        assert attached(module) == Report((), ())


def test_copies_each_tensor_once() -> None:
    model = Islands().eval()
    captured = capture(model)
    made = nn.Parameter(torch.rand(4))
    view = nn.Parameter(model.child.stem[0].weight.detach().view(-1))
    child: Any = captured.tree.child
    child.made, child.view = made, view
    result = assemble(captured)
    assert result.child.made is made  # what a rewrite made is not copied again
    mine = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert not mine & {t.untyped_storage().data_ptr() for t in result.state_dict().values()}


class Head(nn.Module):
    """Says what it is by a child that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Identity()

    def forward(self, x):
        return self.flatten(self.pool(x))

    def __repr__(self) -> str:
        return f"Head(pool={self.pool}, flatten={self.flatten})"


def test_a_class_that_prints_its_children_still_prints():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Head()).eval()
    optimized = fxrep.optimize(model)
    assert fxrep.report(optimized).rewrites
    # its Identity computes nothing and is gone: the class's own way to print would miss it
    assert "(pool): AdaptiveAvgPool2d" in repr(optimized)
    assert not hasattr(optimized.get_submodule("2"), "flatten")


def test_a_hook_that_runs_children_finds_them_as_they_were():
    def again(module, args, output):
        for child in module.children():
            output = child(output)
        return output

    model = nn.Sequential(conv_bn(4, 4, 3, padding=1), conv_bn(4, 4, 3, padding=1))
    model[0].register_forward_hook(again)
    assert assert_equal(model, IMAGE).rewrites


def test_a_root_hook_is_given_the_class_it_was_made_for():
    model = conv_bn(4, 4, 3, padding=1)
    model.register_forward_hook(lambda module, args, output: module[1](output))
    assert assert_equal(model, IMAGE).rewrites


def test_export_keeps_root_hooks():
    model = nn.Sequential(conv_bn(4, 4, 3, padding=1), conv_bn(4, 4, 3, padding=1))
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model = settled(model)
    exported = torch.export.export(fxrep.optimize(model), (IMAGE,)).module()
    torch.testing.assert_close(exported(IMAGE), model(IMAGE), rtol=1e-10, atol=1e-10)


class TiedDecoder(nn.Module):
    """The weight of a folded layer is read once more, below the path of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x):
        return F.relu(self.code[0](x) * 2.0) @ self.code[0].weight


def test_a_weight_that_is_read_elsewhere_keeps_its_path():
    assert assert_equal(TiedDecoder(), torch.randn(3, 4, dtype=torch.float64)).rewrites
