"""Which arguments are inputs: a model that cannot run is never returned."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxrep
from fxrep.errors import SpecializationError
from support.check import randomize


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def run(self, x: Any) -> Any:
        return self.norm(self.conv(x))


class Layer(Body):
    def forward(self, image=None, labels=None):
        y = self.run(image)
        return y if labels is None else (y, labels)


class ByKeyword(Body):
    def forward(self, *, image=None):
        return self.run(image)


class Late(Body):
    def forward(self, labels=None, mask=None, image=None, names=None):
        return self.run(image)


class Operator(Body):
    def forward(self, image=None):
        return self.run(image * 2)


class Reflected(Body):
    def forward(self, image=None):
        return self.run(self.norm.weight[:3, None, None] + image)


class Method(Body):
    def forward(self, image=None):
        return self.run(image.clamp(min=0))


class Function(Body):
    def forward(self, image=None):
        return self.run(nn.functional.pad(image, (1, 1)))


class Attribute(Body):
    def forward(self, image=None):
        n, c, h, w = image.shape
        return self.run(image.reshape(n, c, h, w))


class Required(Body):
    def forward(self, image=None):
        if image is None:
            raise ValueError("You have to specify an image")
        return self.run(image)


class Below(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Layer()

    def forward(self, image=None, labels=None, flag=None):
        return self.body(image, labels=labels)


class Python(Body):
    """Its block stays Python, and gets None where the image should be."""

    class Block(Body):
        def forward(self, x):
            return self.run(x) if float(x.sum()) < 1e9 else x

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block()

    def forward(self, image=None):
        return self.block(image)


def keyword_setting(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["names"] = None
        return forward(self, *args, **kwargs)

    wrapped.__wrapped__ = forward  # type: ignore[attr-defined]
    return wrapped


class Decorated(Body):
    @keyword_setting
    def forward(self, image=None, labels=None, names=None):
        return self.run(image)


class TensorDefault(Body):
    def forward(self, image=torch.zeros(1, 3, 4, 4)):  # noqa: B008
        return self.run(image)


MODELS = [
    Layer, ByKeyword, Late, Operator, Reflected, Method, Function, Attribute, Required, Below,
    Python, Decorated, TensorDefault,
]  # fmt: skip


def images(size: int = 8) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64)


def batchnorms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("given", [False, True], ids=["without examples", "with examples"])
def test_the_input_is_found(kind: Callable[[], nn.Module], given: bool) -> None:
    model = randomize(kind()).double().eval()
    fast = fxrep.optimize(model, {"image": images()} if given else None)
    for size in (8, 11):
        x = images(size)
        assert torch.allclose(fast(image=x), model(image=x))
    if kind not in (ByKeyword, Late):  # who would take it for something else
        assert torch.allclose(fast(x), model(x))
    if kind is not Python:
        assert batchnorms(fast) == 0, fxrep.report(fast)


class Two(Body):
    def forward(self, x=None, y=None, z=None):
        return self.run(x) + self.run(y)


class Skip(Body):
    def forward(self, x, skip=None):
        return self.run(torch.cat([x, skip], 2))


class Optional(Body):
    """None is an answer: nothing is missing."""

    def forward(self, x, skip=None):
        y = self.run(x)
        return y if skip is None else y + self.run(skip)


class Generator(Body):
    """Runs without any argument."""

    def __init__(self) -> None:
        super().__init__()
        self.seed = nn.Parameter(torch.randn(1, 3, 8, 8))

    def forward(self, x=None):
        return self.run(self.seed if x is None else x)


def test_several_inputs_and_none() -> None:
    x, y = images(), images()
    for kind, calls in ((Two, [(x, y)]), (Skip, [(x, y)]), (Optional, [(x,)]), (Generator, [()])):
        model = randomize(kind()).double().eval()
        fast = fxrep.optimize(model)
        for args in calls:
            assert torch.allclose(fast(*args), model(*args)), kind.__name__
    with pytest.raises(SpecializationError, match="argument 'y' is missing"):
        fxrep.optimize(Two().double().eval())(x)


def test_nothing_that_could_be_an_input_stays_python() -> None:
    class Nothing(Body):
        def forward(self, images=()):
            return [self.run(x) for x in images]

    model = randomize(Nothing()).double().eval()
    fast = fxrep.optimize(model)
    x = images()
    assert torch.allclose(fast([x])[0], model([x])[0])


helpers: Any = None


class Scaled(Body):
    def forward(self, x, shift=None):
        return self.run(x + shift)


class Deciding(nn.Module):
    """Calls an island with and without the argument that it was traced with."""

    def __init__(self) -> None:
        super().__init__()
        self.island, self.plain = Optional(), Scaled()

    def forward(self, x):
        y = self.island(x) + self.island(x, skip=x) + self.plain(x, x)
        return y if float(y.sum()) < 1e9 else x


def test_islands_run_their_own_forward_for_other_arguments() -> None:
    model = randomize(Deciding()).double().eval()
    fast = copy.deepcopy(fxrep.optimize(model))
    x = images()
    assert torch.allclose(fast(x), model(x))
    with pytest.raises(TypeError):
        fast.plain(x)  # as the original


class Used(Body):
    """Uses an optional argument before the one that it cannot do without."""

    def forward(self, labels=None, image=None):
        if labels is not None:
            labels = labels.float() + 1
        y = self.run(image)
        return y if labels is None else (y, labels)


class Quiet(Body):
    def forward(self, image=None):
        if image is None:
            return None
        return self.run(image)


class Indexed(Body):
    """None in the key of an index is no missing tensor."""

    def forward(self, image):
        scale = self.norm.weight[(slice(None),) + (None,) * (image.dim() - 2)]
        return self.run(image) * scale


@pytest.mark.parametrize("kind", [Used, Quiet, Indexed])
def test_only_what_is_needed_is_an_input(kind: Callable[[], nn.Module]) -> None:
    model = randomize(kind()).double().eval()
    x = images()
    assert torch.allclose(fxrep.optimize(model)(image=x), model(image=x))


def test_math_of_another_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper's own names have to answer for traced values, wherever it stands."""
    helpers = types.ModuleType("helpers_elsewhere")
    exec(
        "import math\nimport torch\ndef scaled(x):\n"
        "    assert isinstance(x, torch.Tensor)\n    return x / math.sqrt(x.shape[1])\n",
        vars(helpers),
    )
    monkeypatch.setitem(globals(), "helpers", helpers)

    class Helped(Body):
        def forward(self, image):
            return helpers.scaled(self.run(image))

    model = randomize(Helped()).double().eval()
    fast = fxrep.optimize(model)
    x = images()
    assert torch.allclose(fast(x), model(x)) and batchnorms(fast) == 0, fxrep.report(fast)
    assert "isinstance" not in vars(helpers) and vars(helpers)["math"] is sys.modules["math"]
