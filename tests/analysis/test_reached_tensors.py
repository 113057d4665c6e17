"""Code writes what a layer reads, through whatever it reaches the memory."""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

import fxrep
from support.check import randomize

GLOBALS: dict[int, Tensor] = {}


def closure(mean: Tensor) -> Any:
    return lambda: mean.mul_(1.5)


def helped(mean: Tensor) -> Any:
    helper = closure(mean)
    return lambda: helper()


def with_default(mean: Tensor) -> Any:
    return lambda mean=mean: mean.mul_(1.5)


def with_keyword(mean: Tensor) -> Any:
    return lambda *, mean=mean: mean.mul_(1.5)


def of_a_class(mean: Tensor) -> Any:
    class Kept:
        shared = mean

        def __call__(self) -> None:
            self.shared.mul_(1.5)

    return Kept()


def of_a_static_method(mean: Tensor) -> Any:
    class Kept:
        @staticmethod
        def update() -> None:
            mean.mul_(1.5)

        def __call__(self) -> None:
            self.update()

    return Kept()


def of_a_property(mean: Tensor) -> Any:
    class Kept:
        @property
        def shared(self) -> Tensor:
            return mean

        def __call__(self) -> None:
            self.shared.mul_(1.5)

    return Kept()


def of_slots(mean: Tensor) -> Any:
    class Kept:
        __slots__ = ("shared",)

        def __call__(self) -> None:
            self.shared.mul_(1.5)  # type: ignore[attr-defined]

    kept = Kept()
    kept.shared = mean  # type: ignore[attr-defined]
    return kept


def of_globals(mean: Tensor) -> Any:
    key = len(GLOBALS)
    GLOBALS[key] = mean
    return lambda: GLOBALS[key].mul_(1.5)


def array_writer(array: Any) -> None:
    np.multiply(array, 1.5, out=array)


# What an object keeps, made from a running mean; and what writes through it.
HOLDERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any]]] = {
    "deque": (lambda t: collections.deque([t]), lambda q: q[0].mul_(1.5)),
    "namedtuple": (lambda t: torch.return_types.max((t, t)), lambda q: q[0].mul_(1.5)),
    "set": (lambda t: {t}, lambda q: next(iter(q)).mul_(1.5)),
    "key": (lambda t: {t: 1}, lambda q: next(iter(q)).mul_(1.5)),
    "cycle": (lambda t: itertools.cycle([t]), lambda q: next(q).mul_(1.5)),
    "repeat": (lambda t: itertools.repeat(t), lambda q: next(q).mul_(1.5)),
    "namespace": (lambda t: types.SimpleNamespace(t=t), lambda q: q.t.mul_(1.5)),
    "UserDict": (lambda t: collections.UserDict(t=t), lambda q: q["t"].mul_(1.5)),
    "deep": (lambda t: [[[[[[t]]]]]], lambda q: q[0][0][0][0][0][0].mul_(1.5)),
    "slots": (of_slots, lambda q: q()),
    "method of torch": (lambda t: t.mul_, lambda q: q(1.5)),
    "partial": (lambda t: functools.partial(Tensor.mul_, t, 1.5), lambda q: q()),
    "closure": (closure, lambda q: q()),
    "closure of a closure": (helped, lambda q: q()),
    "default": (with_default, lambda q: q()),
    "keyword default": (with_keyword, lambda q: q()),
    "class attribute": (of_a_class, lambda q: q()),
    "static method": (of_a_static_method, lambda q: q()),
    "property": (of_a_property, lambda q: q()),
    "global variable": (of_globals, lambda q: q()),
    "weak reference": (weakref.ref, lambda q: q().mul_(1.5)),
    "weak values": (lambda t: weakref.WeakValueDictionary(t=t), lambda q: q["t"].mul_(1.5)),
    "array": (lambda t: t.numpy(), array_writer),
    "part of an array": (lambda t: t.numpy()[1:3], array_writer),
    "list of arrays": (lambda t: [t.numpy()], lambda q: array_writer(q[0])),
    "storage": (lambda t: t.untyped_storage(), lambda q: q.fill_(0)),
    "typed storage": (lambda t: t.storage(), lambda q: q.fill_(2.0)),
    "wrapped array": (lambda t: torch.from_numpy(t.numpy()), lambda q: q.mul_(1.5)),
    "part of a wrapped array": (lambda t: torch.from_numpy(t.numpy()[1:]), lambda q: q.mul_(1.5)),
    "dlpack": (lambda t: torch.utils.dlpack.from_dlpack(t), lambda q: q.mul_(1.5)),
    "frombuffer": (
        lambda t: torch.frombuffer(t.numpy(), dtype=torch.float32),
        lambda q: q.mul_(1.5),
    ),
    "other dtype": (lambda t: t.view(torch.int32), lambda q: q.zero_()),
    "optimizer": (
        lambda t: torch.optim.SGD([nn.Parameter(t)], lr=0.1),
        lambda q: q.param_groups[0]["params"][0].mul_(1.5),
    ),
}  # fmt: skip


class Opaque(nn.Module):
    """Stays Python code, and writes through what it keeps."""

    def __init__(self, kept: Any, write: Callable[[Any], Any]) -> None:
        super().__init__()
        if isinstance(kept, Tensor):
            self.register_buffer("kept", kept)
        else:
            self.kept = kept
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > -1e9:
            self.write(self.kept)
        return x * 2


class Model(nn.Module):
    """Layers, and code that writes before or after them; or above them, around an island."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.place = place
        self.kept: Any
        self.writes: Callable[[Any], Any]

    @property
    def mean(self) -> Tensor:
        found = self.layers[1].running_mean
        assert isinstance(found, Tensor)
        return found

    def forward(self, x: Tensor) -> Any:
        if self.place == "above" and float(x.sum()) > -1e9:
            self.writes(self.kept)
        if self.place == "before":
            x = self.code(x)
        x = self.layers(x)
        return self.code(x) if self.place == "after" else x


def made(place: str, hold: Callable[[Tensor], Any], write: Callable[[Any], Any]) -> nn.Module:
    torch.manual_seed(0)
    model = randomize(Model(place))
    kept = hold(model.mean)
    if place == "above":
        model.kept, model.writes = kept, write
    else:
        model.code = Opaque(kept, write)
    return model.eval()


def image(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(seed))


def equal_and_untouched(make: Callable[[], nn.Module], examples: Tensor | None) -> fxrep.Report:
    with torch.no_grad():
        model, reference = make(), make()
        optimized = fxrep.optimize(model, examples)
        for name, value in reference.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), f"{name} was written"
        for seed in range(3):
            expected = reference(image(seed))
            torch.testing.assert_close(optimized(image(seed)), expected, rtol=1e-4, atol=1e-5)
    return fxrep.report(optimized)


EXAMPLES = pytest.mark.parametrize("examples", [None, image()], ids=["", "examples"])


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@EXAMPLES
@pytest.mark.parametrize("place", ["before", "after", "above"])
@pytest.mark.parametrize("name", HOLDERS)
def test_code_reaches_a_running_mean(name: str, place: str, examples: Tensor | None) -> None:
    report = equal_and_untouched(lambda: made(place, *HOLDERS[name]), examples)
    assert any("may write" in skip.reason for skip in report.skipped), str(report)


# --- hooks ----------------------------------------------------------------------------------------

HOOKS = ("closure", "closure of a closure", "default", "global variable", "class attribute",
         "partial", "array", "weak reference")  # fmt: skip


@EXAMPLES
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("where", ["beside", "root", "convolution", "before the root"])
@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_reaches_a_running_mean(
    name: str, where: str, place: str, examples: Tensor | None
) -> None:
    hold, write = HOLDERS[name]

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = randomize(Model(place))
        model.code = nn.Conv2d(3, 3, 1) if place == "before" else nn.ReLU()
        kept = hold(model.mean)

        def hook(*_: Any) -> None:
            write(kept)

        if where == "before the root":
            model.register_forward_pre_hook(hook)
        else:
            parts = {"beside": model.code, "root": model, "convolution": model.layers[0]}
            parts[where].register_forward_hook(hook)
        return model.eval()

    equal_and_untouched(make, examples)


# --- scripts and parametrizations -----------------------------------------------------------------


class Scripted(nn.Module):
    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, x: Tensor) -> Tensor:
        self.kept.mul_(1.5)
        return x * 2


@EXAMPLES
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_script_reaches_a_running_mean(place: str, examples: Tensor | None) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = randomize(Model(place))
        model.code = torch.jit.script(Scripted(model.mean))
        return model.eval()

    report = equal_and_untouched(make, examples)
    assert any("may write" in skip.reason for skip in report.skipped), str(report)


class WritesThrough(nn.Module):
    """A parametrization that writes what it keeps."""

    def __init__(self, kept: Any, write: Callable[[Any], Any]) -> None:
        super().__init__()
        self.kept, self.write = kept, write

    def forward(self, w: Tensor) -> Tensor:
        self.write(self.kept)
        return w * 1


@EXAMPLES
@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_parametrization_reaches_a_running_mean(name: str, examples: Tensor | None) -> None:
    hold, write = HOLDERS[name]

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = randomize(Model("above"))
        model.place = "none"
        kind = WritesThrough(hold(model.mean), write)
        parametrize.register_parametrization(model.layers[0], "weight", kind, unsafe=True)
        return model.eval()

    report = equal_and_untouched(make, examples)
    assert any("no constant" in skip.reason for skip in report.skipped), str(report)


def test_a_parametrization_reaches_what_other_layers_read() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        first = nn.Conv2d(3, 3, 1)
        model = randomize(nn.Sequential(first, nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
        kind = WritesThrough([model[3].running_mean], lambda q: q[0].mul_(1.5))
        parametrize.register_parametrization(first, "weight", kind, unsafe=True)
        return model.eval()

    report = equal_and_untouched(make, None)
    assert any("which the module '0' may write" in skip.reason for skip in report.skipped)


# --- what only looks like it ----------------------------------------------------------------------


def test_recurrent_layers_are_copied() -> None:
    lstm = nn.Sequential(nn.LSTM(3, 4), nn.Identity()).eval()
    optimized = fxrep.optimize(lstm)
    mine = {value.data_ptr() for value in lstm.state_dict().values()}
    assert not mine & {value.data_ptr() for value in optimized.state_dict().values()}


def test_what_other_code_reaches_is_no_obstacle() -> None:
    def make() -> nn.Module:
        return made("before", lambda t: [t.clone().numpy(), closure(t.clone())], lambda q: q[1]())

    report = equal_and_untouched(make, None)
    assert len(report.rewrites) == 1


def test_an_array_of_its_own_is_copied() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.n = nn.Conv2d(3, 4, 3), np.zeros(1)

        def forward(self, x: Tensor) -> Any:
            self.n += 1
            return self.c(x) * float(self.n[0])

    model = Counts().eval()
    optimized = fxrep.optimize(model, image())
    optimized(image())
    assert model.n[0] == 0


def test_a_kept_parameter_keeps_its_dtype() -> None:
    """The result shares what a closure reaches, but converting the result converts no model."""

    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(3, 4, 3)
            weight = self.c.weight
            self.norm = lambda: float(weight.detach().sum())

        def forward(self, x: Tensor) -> Any:
            return self.c(x) * self.norm()

    model = Closed().eval()
    fxrep.optimize(model).double()
    assert model.c.weight.dtype is torch.float32
    fxrep.optimize(copy.deepcopy(model), image())
    assert model.c.weight.dtype is torch.float32
