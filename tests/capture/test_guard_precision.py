"""The guard of an island sees every change that matters, and passes over what no code reads."""

from __future__ import annotations

import contextvars
import copy
import functools
import pickle
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxrep
from support.check import randomize

from .test_guards import norms

X = torch.randn(2, 4, 5, 5)
LIMIT = 1.0
FUSED = 1  # BatchNorms that run in the graph: that of one channel has no layer next to it


class Block(nn.Module):
    """Conv and BatchNorm, scaled by what it holds."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).made += 1
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.one = nn.BatchNorm2d(1)
        self.register_buffer("gain", torch.ones(1))
        self.scale: Any = 1
        self.options: Any = types.SimpleNamespace(scale=2, unread=1)
        self.table: Any = {"a": 1.0, "b": 2.0}
        self.branches = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1), "b": nn.ReLU()})

    @functools.cached_property
    def size(self) -> int:
        """Not read by the forward."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)) * self.options.scale * LIMIT * self.gain
        for branch in self.branches.values():
            y = branch(y)
        for value in self.table.values():
            y = y * 2 - value
        y = torch.cat([self.one(y[:, :1]), y[:, 1:]], 1)
        return torch.cat([y, torch.full((2, 4, 5, 5), self.scale) / 2 * y], 1)


class Above(nn.Module):
    """Stays Python code."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if x.mean() < 1e3 else x


def pair() -> tuple[Any, Any]:
    model = randomize(Above()).eval()
    fast = fxrep.optimize(model)
    assert norms(fast, X) == FUSED, str(fxrep.report(fast))
    return model, fast


def same(model: nn.Module, fast: nn.Module) -> None:
    with torch.no_grad():
        expected, got = model(X), fast(X)
    assert got.dtype == expected.dtype and torch.allclose(got, expected, atol=1e-5)


# --- what matters -------------------------------------------------------------------------------


def other_type(model: Any) -> None:
    model.block.scale = 1.5


def options_of_other_type(model: Any) -> None:
    model.block.options.scale = 2.5


def reordered_dict(model: Any) -> None:
    model.block.table["a"] = model.block.table.pop("a")


def reordered_modules(model: Any) -> None:
    first = model.block.branches["a"]
    del model.block.branches["a"]
    model.block.branches["a"] = first


def replaced_options(model: Any) -> None:
    model.block.options = types.SimpleNamespace(scale=3, unread=1)


def equal_options(model: Any) -> None:
    """Another object, which is then changed."""
    model.block.options = copy.copy(model.block.options)
    model.block.options.scale = 3


def equal_table(model: Any) -> None:
    """Another dict, which is then changed."""
    model.block.table = dict(model.block.table)
    with torch.no_grad():
        model(X)
    model.block.table["a"] = 5.0


MATTERS = [
    other_type, options_of_other_type, reordered_dict, reordered_modules, replaced_options,
    equal_options, equal_table,
]  # fmt: skip


@pytest.mark.parametrize("change", MATTERS)
def test_what_matters_is_seen(change: Callable[[Any], None]) -> None:
    model, fast = pair()
    for each in (model, fast):
        change(each)
    same(model, fast)
    assert norms(fast, X) > FUSED


@pytest.mark.parametrize(("before", "after"), [(1, 1.0), (1, True), (2.0, 2), (0.0, -0.0)], ids=str)
def test_equal_values_of_two_types_are_two(before: Any, after: Any) -> None:
    model = Above()
    model.block.scale = before
    model = randomize(model).eval()
    fast: Any = fxrep.optimize(model)
    fast.block.scale = model.block.scale = after
    same(model, fast)
    assert norms(fast, X) > FUSED


NUMBER = 1
VARIABLE = contextvars.ContextVar("VARIABLE", default=1)


def default(value: int = 1) -> int:
    return value


class Slotted:
    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 1


class Filled(nn.Module):
    """Its result has the dtype of a number."""

    number = 1

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.normed = nn.utils.weight_norm(nn.Conv2d(4, 4, 1))
        self.normed.number = 1  # type: ignore[assignment]
        self.nested, self.slotted = [[1]], Slotted()

    def read(self) -> Any:
        return {
            "name": lambda: NUMBER, "class": lambda: type(self).number, "default": default,
            "context": VARIABLE.get, "nested": lambda: self.nested[0][0],
            "slot": lambda: self.slotted.number, "weight_norm": lambda: self.normed.number,
        }[self.where]()  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.normed(self.bn(self.conv(x)))
        return torch.full((2,), self.read()).to(y.device) + 0 * y.sum().long()

    def write(self, value: Any) -> None:
        if self.where == "name":
            globals()["NUMBER"] = value
        elif self.where == "class":
            type(self).number = value
        elif self.where == "default":
            default.__defaults__ = (value,)
        elif self.where == "context":
            VARIABLE.set(value)
        elif self.where == "nested":
            self.nested[0][0] = value
        else:
            (self.slotted if self.where == "slot" else self.normed).number = value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "where", ["name", "class", "default", "context", "nested", "slot", "weight_norm"]
)
def test_equal_numbers_of_two_types_are_two_wherever_they_are(where: str) -> None:
    model = Above()
    model.block = Filled(where)  # type: ignore[assignment]
    fast: Any = fxrep.optimize(randomize(model).eval())
    try:
        for value in (1, 1.0, 1):
            for each in (model, fast):
                each.block.write(value)
            with torch.no_grad():
                assert fast(X).dtype == model(X).dtype, value
    finally:
        model.block.write(1)


def test_an_equal_parameter_is_another_one() -> None:
    model, fast = pair()
    for each in (model, fast):
        each.requires_grad_(False)
        each.block.one.weight = nn.Parameter(each.block.one.weight.detach().clone())
        each(X).sum().backward()
    assert torch.allclose(fast.block.one.weight.grad, model.block.one.weight.grad, atol=1e-4)


def test_buffers_that_take_gradients() -> None:
    model, fast = pair()
    for each in (model, fast):
        each.requires_grad_(False)
        each.block.gain.requires_grad_()
    assert fast(X).requires_grad == model(X).requires_grad


def test_a_function_that_changes_weights_is_no_cast() -> None:
    model, fast = pair()
    for each in (model, fast):
        each._apply(lambda tensor: tensor * 2)
    same(model, fast)


class Heads(nn.Module):
    """Two blocks with one convolution, and a module that stays Python code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.heads = nn.ModuleList(
            nn.Sequential(self.conv, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[int(x.mean() > 0)](x) + self.heads[int(x.mean() <= 0)](x)


@pytest.mark.parametrize("way", [lambda m: m.double(), lambda m: m.half().float()], ids=["d", "h"])
def test_shared_layers_are_moved_with_all_islands(way: Callable[[nn.Module], nn.Module]) -> None:
    model = randomize(Heads()).eval()
    fast = fxrep.optimize(model)
    before = norms(fast, X)
    assert before < norms(model, X), str(fxrep.report(fast))
    x = X.to(next(way(fast).parameters()).dtype)
    assert norms(fast, x) == before
    with torch.no_grad():
        assert torch.allclose(fast(x), way(copy.deepcopy(model))(x), atol=1e-2)


def test_a_replica_has_other_weights() -> None:
    model, fast = pair()
    results = []
    for each in (model, fast):
        replica = each.block._replicate_for_data_parallel()
        replica._modules = {n: copy.deepcopy(c) for n, c in each.block._modules.items()}
        with torch.no_grad():
            replica.conv.weight.mul_(2)
            results.append(replica(X))
    assert torch.allclose(*results, atol=1e-5)


# --- what does not matter -----------------------------------------------------------------------


def another_instance(fast: Any) -> None:
    Block()


def unread_attribute(fast: Any) -> None:
    fast.block.note = "read by nobody"


def unread_option(fast: Any) -> None:
    fast.block.options.unread = 2


def cached(fast: Any) -> None:
    assert fast.block.size


def copied_options(fast: Any) -> None:
    """Python notes the names of slots in a class that is copied or pickled."""
    copy.deepcopy(fast.block)
    pickle.dumps(fast.block.options)
    assert Block.__annotations__ is not None


def kept(fast: Any) -> None:
    fast.last = fast.block(X)


def timed(fast: Any) -> None:
    forward = fast.block.forward
    fast.block.forward = lambda x: forward(x)


def equal_list(fast: Any) -> None:
    fast.block.table = dict(fast.block.table)


def other_method(fast: Any) -> None:
    Block.unrelated = lambda self: None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "change",
    [another_instance, unread_attribute, unread_option, cached, copied_options, kept, timed,
     equal_list, other_method],
)  # fmt: skip
def test_what_no_code_reads_keeps_the_fused_layers(change: Callable[[Any], None]) -> None:
    model, fast = pair()
    with torch.no_grad():
        change(fast)
    assert norms(fast, X) == FUSED
    same(model, fast)


# --- inference mode, pickles --------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_optimizing_in_inference_mode(whole: bool) -> None:
    model: Any = randomize(
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)) if whole else Above()
    )
    model.eval()
    with torch.inference_mode():
        fast: Any = fxrep.optimize(model, X.clone())
        assert torch.allclose(fast(X), model(X), atol=1e-5)
    assert not any(tensor.is_inference() for tensor in fast.parameters())
    fast(X).sum().backward()
    if not whole:
        other = {name: value * 2 for name, value in model.state_dict().items()}
        with torch.inference_mode():
            fast.load_state_dict(other)
        model.load_state_dict(other)
        same(model, fast)


class Locked(Block):
    """Holds what cannot be pickled, and leaves it out."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}


def test_a_module_with_its_own_pickle() -> None:
    model: Any = Above()
    model.block = Locked()
    fast = fxrep.optimize(randomize(model).eval())
    same(model, pickle.loads(pickle.dumps(fast)))
    same(model, copy.deepcopy(fast))


@pytest.fixture
def limit() -> Iterator[Callable[[float], None]]:
    def write(value: float) -> None:
        globals()["LIMIT"] = value

    yield write
    write(1.0)


def test_a_pickle_is_loaded_where_a_global_name_is_another(limit: Callable[[float], None]) -> None:
    model, fast = pair()
    saved = pickle.dumps(fast)
    limit(2.0)
    same(model, pickle.loads(saved))
    limit(1.0)
    loaded = pickle.loads(saved)
    assert norms(loaded, X) == FUSED
    same(model, loaded)


def test_a_flag_that_is_set_for_an_export(limit: Callable[[float], None]) -> None:
    model, fast = pair()
    limit(3.0)
    with torch.no_grad():
        exported = torch.export.export(fast.block, (X,)).module()
        assert torch.allclose(exported(X), model.block(X), atol=1e-5)
