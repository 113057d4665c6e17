"""Hooks that change results: of one module, of all modules, of another type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_torch

import fxrep
from support.check import randomize
from support.models import Body

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


LEAVES: dict[str, Callable[[], nn.Module]] = {
    "pooling": lambda: nn.MaxPool2d(2),
    "activation": nn.ReLU,
    "in place": lambda: nn.ReLU(inplace=True),
    "identity": nn.Identity,
    "dropout": nn.Dropout,
    "convolution": lambda: nn.Conv2d(3, 3, 1),
    "BatchNorm": lambda: nn.BatchNorm2d(3),
    "upsampling": lambda: nn.Upsample(scale_factor=2),
    "flatten": lambda: nn.Flatten(2, 3),
    "a container": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
}
CHANGES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "a tuple": lambda module, args, out: (out, out + 1),
    "a list": lambda module, args, out: [out * 2],
    "a dict": lambda module, args, out: {"a": out - 1},
}


@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("leaf", LEAVES)
def test_a_hook_that_returns_another_type(leaf: str, change: str, examples: bool) -> None:
    part = randomize(LEAVES[leaf]())
    part.register_forward_hook(CHANGES[change])
    key: Any = "a" if change == "a dict" else 0

    def forward(m: Any, x: Tensor) -> Any:
        y = m.part(m.before(x.clone()))[key]
        return m.bn(m.after(y if y.dim() == 4 else y.unsqueeze(-1)))

    def plain(m: Any, x: Tensor) -> Any:
        return m.bn(m.after(m.part(m.before(x.clone()))[key].reshape(2, 3, -1, 1)))

    for body in (forward, plain):
        bn = randomize(nn.BatchNorm2d(4))
        model = Body(body, before=nn.Conv2d(3, 3, 1), part=part, after=nn.Conv2d(3, 4, 1), bn=bn)
        model = model.eval()
        optimized = fxrep.optimize(model, X if examples else None)
        torch.testing.assert_close(optimized(X), model(X), rtol=1e-4, atol=1e-4)


def only_batchnorms(change: Callable[[Any], Any]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, *out: Any) -> Any:
        return change(out[0] if out else args) if isinstance(module, nn.BatchNorm2d) else None

    return hook


def in_a_tuple(module: nn.Module, args: Any, out: Any) -> Any:
    return (out,) if isinstance(module, nn.Identity) else None


def halved(module: nn.Module, given: Any, *received: Any) -> Any:
    return tuple(None if each is None else each / 2 for each in given)


GLOBAL: dict[str, Callable[[], Any]] = {
    "forward": lambda: of_torch.register_module_forward_hook(only_batchnorms(lambda y: y * 2)),
    "forward, a tuple": lambda: of_torch.register_module_forward_hook(in_a_tuple),
    "forward pre": lambda: of_torch.register_module_forward_pre_hook(
        only_batchnorms(lambda args: (args[0] * 2,))
    ),
    "always called": lambda: of_torch.register_module_forward_hook(
        only_batchnorms(lambda y: y + 1), always_call=True
    ),
    "full backward": lambda: of_torch.register_module_full_backward_hook(halved),
    "full backward pre": lambda: of_torch.register_module_full_backward_pre_hook(halved),
}


@pytest.fixture(params=GLOBAL)
def hooked(request: pytest.FixtureRequest) -> Iterator[str]:
    """A hook for all modules, for one test."""
    handle = GLOBAL[request.param]()
    yield request.param
    handle.remove()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
def test_hooks_of_all_modules(hooked: str, examples: bool) -> None:
    model = randomize(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1)),
            nn.BatchNorm2d(4),
        ).eval()
    )  # fmt: skip
    optimized = fxrep.optimize(model, X if examples else None)
    gradients = []
    for each in (model, optimized):
        given = X.clone().requires_grad_()
        each(given).sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(optimized(X), model(X), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


# --- hooks that write --------------------------------------------------------------------------

STEPS = SimpleNamespace(n=1.0)
ITEMS = {"n": 1.0}
NUMBER = 1.0
SEEN: list[int] = []


@pytest.fixture(autouse=True)
def _state() -> Iterator[None]:
    restart()
    yield
    restart()


def restart() -> None:
    global NUMBER
    STEPS.n = ITEMS["n"] = NUMBER = 1.0
    SEEN.clear()


class Part(nn.Module):
    """A block that reads a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x))) * self.scale


class Hooked(nn.Module):
    """Two blocks, and a hook that does something to what they read."""

    def __init__(self, where: str, does: str, pre: bool) -> None:
        super().__init__()
        self.a, self.b, self.does = Part(), Part(), WRITES[does]
        self.factor, self.box, self.kept = 1.0, SimpleNamespace(n=1.0), torch.zeros(())
        target = self.get_submodule(where)
        if pre:
            target.register_forward_pre_hook(self.hook)
        else:
            target.register_forward_hook(self.hook)

    def hook(self, module: Any, args: Any, *out: Any) -> None:
        self.does(self, module, args)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x)) * self.factor * self.box.n
        return y * STEPS.n * ITEMS["n"] * NUMBER + self.kept.mean()


def number(model: Any, module: Any, args: Any) -> None:
    global NUMBER
    NUMBER += 1


WRITES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "its module": lambda m, module, args: setattr(module, "scale", getattr(module, "scale", 1) + 1),
    "another module": lambda m, module, args: setattr(m.b, "scale", m.b.scale + 1),
    "the module above": lambda m, module, args: setattr(m, "factor", m.factor + 1),
    "a tensor that is kept": lambda m, module, args: setattr(m, "kept", args[0].clone()),
    "an object": lambda m, module, args: setattr(m.box, "n", m.box.n + 1),
    "an object outside": lambda m, module, args: setattr(STEPS, "n", STEPS.n + 1),
    "a dict outside": lambda m, module, args: ITEMS.update(n=ITEMS["n"] + 1),
    "a global name": number,
    "weights": lambda m, module, args: m.b.norm.weight.data.mul_(1.5),
    "a constant of a layer": lambda m, module, args: setattr(m.b.norm, "eps", m.b.norm.eps + 0.1),
    "a layer": lambda m, module, args: setattr(m.b, "act", nn.Sigmoid()),
    "a block": lambda m, module, args: setattr(m, "b", m.a),
    "the mode": lambda m, module, args: m.b.norm.train(),
    "nothing that is read": lambda m, module, args: SEEN.append(1),
}


@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
@pytest.mark.parametrize("pre", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("where", ["a", "a.act", "a.conv", "b", "b.norm", ""])
@pytest.mark.parametrize("does", WRITES)
def test_a_hook_that_writes_what_forwards_read(
    does: str, where: str, pre: bool, examples: bool
) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(randomize(Hooked(where, does, pre).eval()))
    optimized = fxrep.optimize(models[1], X if examples else None)
    assert not SEEN
    results: list[list[Tensor]] = []
    for each in (models[0], optimized):
        restart()
        with torch.no_grad():
            results.append([each(X) for _ in range(3)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    if does == "nothing that is read":
        assert fxrep.report(optimized).rewrites


@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
def test_what_a_hook_writes_is_as_it_was(examples: bool) -> None:
    """Copies of a model run with its hooks."""
    own: dict[str, Any] = {"seen": [], "calls": 0}

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        own["seen"].append(out)
        own["calls"] += 1

    class Counting:
        calls = 0

        def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
            self.calls += 1

    counting = Counting()
    model = randomize(nn.Sequential(Part(), Part()).eval())
    model[0].act.register_forward_hook(hook)
    model[1].register_forward_hook(counting)
    optimized = fxrep.optimize(model, X if examples else None)
    assert own == {"seen": [], "calls": 0} and counting.calls == 0
    assert fxrep.report(optimized).rewrites
    optimized(X)
    assert own["calls"] == 1


@pytest.mark.parametrize("examples", [False, True], ids=["", "example inputs"])
def test_a_hook_whose_effects_cannot_be_undone_does_not_run(tmp_path: Path, examples: bool) -> None:
    with open(tmp_path / "log", "w") as log:
        model = randomize(nn.Sequential(Part(), Part()).eval())
        model[0].register_forward_hook(lambda *_: print("called", file=log))
        optimized = fxrep.optimize(model, X if examples else None)
        log.flush()
        assert not (tmp_path / "log").read_text()
        torch.testing.assert_close(optimized(X), model(X), rtol=1e-4, atol=1e-4)
    reasons = [skip.reason for skip in fxrep.report(optimized).skipped]
    assert any("a hook below it may write what it reads" in reason for reason in reasons)
    assert {r.pass_name for r in fxrep.report(optimized).rewrites} == {"no-ops", "batchnorm"}
