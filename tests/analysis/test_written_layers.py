"""A layer whose tensors may be written is not folded, whoever writes them under whatever name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxrep
from fxrep.analysis.memory import Write, WrittenMemory
from support.check import randomize
from support.models import Body

_Forward = Callable[[Any, Tensor], Any]


class Foldable(nn.Module):
    """A convolution and a BatchNorm, for a forward and a module that is built from the two."""

    def __init__(self, forward: _Forward, other: Callable[[Any], nn.Module] | None = None) -> None:
        super().__init__()
        self.body = forward
        self.c = nn.Conv2d(3, 4, 3)
        self.b = nn.BatchNorm2d(4)
        if other is not None:
            self.other = other(self)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def mean(x: Tensor) -> Tensor:
    return x.mean((0, 2, 3))


def built(forward: _Forward, other: Callable[[Any], nn.Module] | None = None) -> nn.Module:
    """The same model at each call: a deepcopy would tear apart a parameter and its views."""
    torch.manual_seed(0)
    return randomize(Foldable(forward, other).eval())


def layers(model: nn.Module) -> int:
    return sum(type(m) is nn.BatchNorm2d for m in model.modules())


def seeded(kind: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Makes models of a class, each equal to the others."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return randomize(kind().eval())

    return make


def equal_for_three_calls(make: Callable[[], nn.Module], **options: Any) -> fxrep.Report:
    """Optimize, assert equal outputs call by call: a write may show in the next call only."""
    model, reference = make(), make()
    optimized = fxrep.optimize(model, **options)
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), f"{name} was written"
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(2, 3, 6, 7, generator=generator)
            torch.testing.assert_close(
                optimized(x.clone()), reference(x), rtol=1e-4, atol=1e-5, equal_nan=True
            )
    return fxrep.report(optimized)


def write(statement: str, *, after: bool = False) -> _Forward:
    """A forward that executes a statement on `s`, before or after the layers, and y or x."""
    code = compile(statement, "statement", "exec")

    def forward(s: Any, x: Tensor) -> Tensor:
        names = {"s": s, "x": x, "torch": torch, "F": F, "mean": mean}
        if not after:
            exec(code, names)
        y: Tensor = s.b(s.c(x))
        if after:
            exec(code, {**names, "y": y})
        return y

    return forward


WRITES = {
    "copy_": "s.b.running_mean.copy_(mean(x[:, [0, 1, 2, 0]]))",
    "operator": "t = s.b.running_var; t *= 1.5",
    "setitem": "s.b.running_mean[1] = 3.0",
    "slice": "s.b.running_mean[1:3].add_(1)",
    "view": "s.b.running_mean.view(2, 2).mul_(2)",
    "view of a view": "s.c.weight.flatten(1).t()[0].zero_()",
    "data": "s.c.weight.data.mul_(0.5)",
    "detach": "s.c.bias.detach().add_(1)",
    "chunk": "s.b.weight.chunk(2)[0].mul_(2)",
    "_buffers": "s.b._buffers['running_mean'].add_(1)",
    "_parameters": "s.c._parameters['weight'].data.mul_(2)",
    "get_buffer": "s.b.get_buffer('running_var').mul_(2)",
    "getattr": "getattr(s.b, 'running_' + 'mean').add_(1)",
    "foreach": "torch._foreach_mul_([s.b.running_var, s.b.running_mean], 2.0)",
    "out": "torch.add(s.b.running_var, 1.0, out=s.b.running_var)",
    "out of a view": "torch.mul(s.b.running_mean[:2], 2.0, out=s.b.running_mean[2:])",
    "batch_norm": "F.batch_norm(s.c(x), s.b.running_mean, s.b.running_var, training=True)",
    "torch.batch_norm": (
        "torch.batch_norm(s.c(x), None, None, s.b.running_mean, s.b.running_var, "
        "True, 0.1, 1e-5, False)"
    ),
    "native_batch_norm": (
        "torch.native_batch_norm(s.c(x), None, None, s.b.running_mean, s.b.running_var, "
        "True, 0.1, 1e-5)"
    ),
    "aten": "torch.ops.aten.add_.Tensor(s.b.running_mean, 1)",
    "aten batch_norm": (
        "torch.ops.aten.native_batch_norm.default(s.c(x), None, None, s.b.running_mean, "
        "s.b.running_var, True, 0.1, 1e-5)"
    ),
    "aten packet": "torch.ops.aten.mul_(s.b.running_var, 2)",
    "observer": (
        "torch.fused_moving_avg_obs_fake_quant(x, torch.ones(1), torch.ones(1), "
        "s.b.running_mean[:1], s.b.running_var[1:2], torch.ones(1), "
        "torch.zeros(1, dtype=torch.int32), "
        "0.01, 0, 255, 0)"
    ),
    "relu_": "F.relu_(s.b.running_mean)",
    "inplace": "F.relu(s.b.running_mean, inplace=True)",
    "clamp_": "s.b.weight.data.clamp_(max=0.9)",
    "index_add_": "s.b.running_mean.index_add_(0, torch.tensor([1]), torch.ones(1))",
    "masked_fill_": "s.b.running_mean.masked_fill_(s.b.running_mean > 0, 0.5)",
    "where the condition is traced": "s.b.running_mean.masked_fill_(mean(x)[0] > 0, 0.5)",
    "eps of the variance": "s.b.running_var.add_(0.1)",
    "method of Tensor": "torch.Tensor.mul_(s.b.running_mean, 2)",
    "lerp_": "s.b.running_mean.lerp_(mean(s.c(x)), 0.5)",
    "addcmul_": "s.c.bias.data.addcmul_(s.b.weight.data, s.b.bias.data)",
    "swapped axes": "s.c.weight.data.transpose(0, 1).mul_(2)",
    "unfold": "s.b.running_mean.unfold(0, 2, 2).mul_(2)",
    "as_strided": "s.b.running_mean.as_strided((2,), (2,)).mul_(2)",
    "split": "torch.split(s.b.running_mean, 2)[1].mul_(2)",
    "set_": "s.b.running_mean.set_(s.b.running_var)",
    "set_ by its class": "torch.Tensor.set_(s.b.running_mean, s.b.running_var)",
    "set_ of aten": "torch.ops.aten.set_.source_Tensor(s.b.running_mean, s.b.running_var)",
    "numpy": "s.b.running_mean.numpy()[:] += 1",
    "array": "s.b.running_mean.__array__()[:] += 1",
    "storage": "s.b.running_mean.untyped_storage().fill_(0)",
    "dlpack": "torch.utils.dlpack.from_dlpack(s.b.running_mean).add_(1)",
    "assigned data": "s.b.running_mean.data = s.b.running_mean * 0.5",
    "assigned": "s.b.running_mean = s.b.running_mean * 0.5",
    "init": "torch.nn.init.constant_(s.c.bias, 0.3)",
    "reset_running_stats": "s.b.reset_running_stats()",
    "load_state_dict": (
        "s.b.load_state_dict({k: v * 1.5 if v.dtype.is_floating_point else v "
        "for k, v in s.b.state_dict().items()})"
    ),
    "swap_tensors": "torch.utils.swap_tensors(s.b.running_mean, s.b.running_var)",
    "embedding_renorm_": (
        "torch.embedding_renorm_(s.c.weight.data.view(4, -1), torch.tensor([0, 1]), 0.1, 2.0)"
    ),
    "embedding": "F.embedding(torch.tensor([0, 1]), s.c.weight.data.view(4, -1), max_norm=0.1)",
    "embedding_bag": (
        "F.embedding_bag(torch.tensor([[0, 1]]), s.c.weight.data.view(4, -1), max_norm=0.1)"
    ),
    "foreach_copy_": "torch._foreach_copy_([s.b.running_mean], [s.b.running_var])",
    "foreach_lerp_": "torch._foreach_lerp_([s.b.running_mean], [s.b.running_var], 0.5)",
    "one of two outs": (
        "torch.max(s.c.weight.view(4, 27), 1, out=(s.b.running_mean, torch.empty(4).long()))"
    ),
    "out of a list": "torch.cat([s.b.running_var], out=s.b.running_mean)",
    "apply_": "s.b.running_mean.apply_(lambda v: v + 1)",
    "map_": "s.b.running_mean.map_(s.b.running_var, lambda a, b: a + b)",
    "put_": "s.b.running_mean.put_(torch.tensor([1]), torch.tensor([3.0]))",
    "instance_norm": (
        "F.instance_norm(s.c(x), s.b.running_mean, s.b.running_var, use_input_stats=True)"
    ),
    "in training": "s.b.train(); s.b(s.c(x)); s.b.eval()",
    "all buffers": "[t.mul_(1.1) for t in s.b.buffers() if t.is_floating_point()]",
    "apply": "s.b.apply(lambda m: m.running_mean.mul_(1.1))",
    "_apply": "s.b._apply(lambda t: t * 1.1 if t.is_floating_point() else t)",
    "checkpoint": (
        "torch.utils.checkpoint.checkpoint(lambda t: s.b.running_mean.mul_(1.5), x, "
        "use_reentrant=False)"
    ),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("statement", WRITES.values(), ids=WRITES)
def test_the_forward_writes(statement: str, after: bool) -> None:
    report = equal_for_three_calls(lambda: built(write(statement, after=after)))
    assert any("may write" in skip.reason or skip.pass_name == "capture" for skip in report.skipped)


@pytest.mark.parametrize("statement", WRITES.values(), ids=WRITES)
def test_the_forward_writes_and_is_compared(statement: str) -> None:
    x = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        equal_for_three_calls(lambda: built(write(statement)), example_inputs=x)


# --- other modules that hold the tensors ----------------------------------------------------------


class Holds(nn.Module):
    """A module that holds a tensor and writes it; by Python code that does not trace, or not."""

    def __init__(self, tensor: Tensor, *, traces: bool, how: str) -> None:
        super().__init__()
        self.traces = traces
        self.held: Tensor
        self.items: Any
        if how == "buffer":
            self.register_buffer("held", tensor)
        elif how == "view":
            self.register_buffer("held", tensor.detach().view(-1)[1:])
        elif how == "parameter":
            self.register_parameter("held", nn.Parameter(tensor.detach(), requires_grad=False))
        elif how == "attribute":
            self.held = tensor.detach()
        elif how == "list":
            self.items = [tensor.detach().view(-1)]
        elif how == "dict":
            self.items = {"a": (tensor,)}
        elif how == "submodule":
            self.inner = Holds(tensor, traces=True, how="buffer")

    def forward(self, x: Tensor) -> Tensor:
        if not self.traces and float(x.sum()) < -1e9:
            return x
        if hasattr(self, "inner"):
            return self.inner(x)
        items = getattr(self, "items", None)
        if isinstance(items, dict):
            items["a"][0].mul_(1.5)
        elif items is not None:
            items[0].mul_(1.5)
        else:
            self.held.mul_(1.5)
        return x * 2


HOLDERS = ("buffer", "view", "parameter", "attribute", "list", "dict", "submodule")
TENSORS = ("b.running_mean", "b.running_var", "c.weight", "c.bias", "b.weight")


def tensor_of(model: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    found: Tensor = getattr(model.get_submodule(owner), name)
    return found.data if isinstance(found, nn.Parameter) else found


@pytest.mark.parametrize("path", TENSORS)
@pytest.mark.parametrize("traces", [True, False], ids=["traced", "opaque"])
@pytest.mark.parametrize("how", HOLDERS)
def test_another_module_writes(how: str, traces: bool, path: str) -> None:
    def other(model: Any) -> nn.Module:
        return Holds(tensor_of(model, path), traces=traces, how=how)

    for forward in (
        lambda s, x: s.b(s.c(s.other(x))),
        lambda s, x: s.other(s.b(s.c(x))),
    ):
        report = equal_for_three_calls(lambda forward=forward: built(forward, other))
        equal_for_three_calls(
            lambda forward=forward: built(forward, other), example_inputs=torch.randn(1, 3, 5, 5)
        )
        named = [skip.reason for skip in report.skipped if f"'{path}'" in skip.reason]
        assert named or any(skip.pass_name == "capture" for skip in report.skipped), str(report)


def test_a_batchnorm_in_training_mode_writes_statistics_that_it_shares() -> None:
    def other(model: Any) -> nn.Module:
        norm = nn.BatchNorm2d(4)
        norm.running_mean = model.b.running_mean
        norm.running_var = model.b.running_var
        return norm

    def make() -> nn.Module:
        model = built(lambda s, x: s.other(s.b(s.c(x))), other)
        model.get_submodule("other").train()
        return model

    report = equal_for_three_calls(make)
    (reason,) = [s.reason for s in report.skipped if s.where == "b"]
    assert reason == "it reads 'b.running_mean', which the module 'other' may write"


class Hooked(nn.Module):
    """A hook at the first layer writes what a BatchNorm before the last one reads."""

    def __init__(self, statement: str) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.last = nn.Conv2d(3, 4, 3)
        self.register_buffer("state", self.norm.running_mean)
        self.code = statement
        self.first.register_forward_hook(getattr(self, f"hook_{statement}"))

    def hook_name(self, *_: Any) -> None:
        self.norm.running_mean.add_(0.5)

    def hook_alias(self, *_: Any) -> None:
        self.state.add_(0.5)

    def hook_all(self, *_: Any) -> None:
        for buffer in self.norm.buffers():
            buffer.add_(1)

    def hook_nothing(self, *_: Any) -> None:
        pass

    def forward(self, x: Tensor) -> Any:
        return self.last(self.norm(self.first(x).relu()))


@pytest.mark.parametrize("statement", ["name", "alias", "all"])
def test_a_hook_writes_what_another_layer_reads(statement: str) -> None:
    report = equal_for_three_calls(seeded(lambda: Hooked(statement)))
    assert any("may write" in skip.reason for skip in report.skipped), str(report)


def test_a_hook_that_writes_nothing_is_no_obstacle_to_other_layers() -> None:
    class Unshared(Hooked):
        def __init__(self) -> None:
            super().__init__("nothing")
            self.state = torch.zeros(3)

    torch.manual_seed(0)
    assert fxrep.report(fxrep.optimize(randomize(Unshared().eval()))).rewrites


def test_python_code_above_an_island_writes_what_the_island_reads() -> None:
    class Above(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
            self.register_buffer("state", self.k[1].running_mean.view(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > -1e9:
                self.state.add_(0.5)
            found: Tensor = self.k(x)
            return found

    report = equal_for_three_calls(seeded(Above))
    assert any("which the forward of the model may write" in s.reason for s in report.skipped)


def test_another_graph_writes_what_an_island_reads() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
            self.other = Holds(tensor_of(self.k, "1.running_var"), traces=True, how="buffer")

        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > -1e9:
                x = self.other(x)
            found: Tensor = self.k(x)
            return found

    report = equal_for_three_calls(seeded(Two))
    assert any("'1.running_var'" in skip.reason for skip in report.skipped), str(report)


def test_an_unread_batchnorm_in_training_mode_is_not_dropped() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.c(x)
        s.other(y)
        found: Tensor = s.b(y)
        return found

    def other(model: Any) -> nn.Module:
        norm = nn.BatchNorm2d(4)
        norm.running_mean = model.b.running_mean
        return norm

    def make() -> nn.Module:
        model = built(forward, other)
        model.get_submodule("other").train()
        return model

    equal_for_three_calls(make)


def test_layers_of_one_value_are_not_joined_across_a_write() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        first = s.c(x)
        s.other.weight.data.mul_(1.5)
        found: Tensor = torch.cat([first.relu(), s.other(x).relu()], 1)
        return found

    equal_for_three_calls(lambda: built(forward, lambda model: nn.Conv2d(3, 4, 3)), cost="always")


def test_a_shift_by_a_buffer_stays_before_the_module_that_writes_it() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.c(x) + s.other.held.view(4, 1, 1)
        z = s.other(y)
        found: Tensor = s.b(y) + z
        return found

    def other(model: Any) -> nn.Module:
        return Holds(torch.ones(4), traces=False, how="buffer")

    equal_for_three_calls(lambda: built(forward, other))


# --- what is not written still folds --------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "s.b.num_batches_tracked.add_(1)",
        "s.b.running_mean.clone().add_(1)",
        "s.b.running_mean.mul(2)",
        "F.batch_norm(s.c(x), s.b.running_mean, s.b.running_var, training=False)",
        "torch.add(s.b.running_var, 1.0, out=torch.empty(4))",
    ],
)
def test_other_writes_are_no_obstacle(statement: str) -> None:
    optimized = fxrep.optimize(built(write(statement)))
    equal_for_three_calls(lambda: built(write(statement)))
    assert not layers(optimized)


def test_a_module_that_writes_its_own_tensors_is_no_obstacle() -> None:
    def other(model: Any) -> nn.Module:
        return Holds(torch.ones(4), traces=False, how="buffer")

    def make() -> nn.Module:
        return built(lambda s, x: s.other(s.b(s.c(x))), other)

    equal_for_three_calls(make)
    assert not layers(fxrep.optimize(make()))


def test_memory_is_compared_by_address() -> None:
    flat = torch.zeros(10)
    array = flat.numpy()
    memory = WrittenMemory([Write(flat[2:4], "it"), Write(torch.zeros(3), "other")])
    assert memory.by(flat[8:]) == "it"  # one storage, which as_strided reaches everywhere
    assert memory.by(torch.from_numpy(array[3:])) == "it"
    assert memory.by(torch.zeros(10)) is None
    assert WrittenMemory().by(flat) is None
    meta = torch.empty(3, device="meta")
    assert WrittenMemory([Write(meta, "it")]).by(torch.empty(3, device="meta")) is None
    assert WrittenMemory([Write(meta, "it")]).by(meta) == "it"


def test_a_copy_keeps_what_shares_memory() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        if float(x.sum()) > -1e9:
            s.other.held.mul_(1.5)
        found: Tensor = s.b(s.c(x))
        return found

    def other(model: Any) -> nn.Module:
        return Holds(model.c.weight, traces=True, how="view")

    equal_for_three_calls(lambda: built(forward, other))
    model = Body(lambda m, x: m.c(x), c=nn.Conv2d(3, 4, 3)).eval()
    assert isinstance(copy.deepcopy(fxrep.optimize(model)), nn.Module)
