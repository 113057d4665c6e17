"""Fused layers stand for an island's layers only while these are what they were.

Whatever is done to the original model is done to the optimized one, and both give the same results.
"""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

import fxrep
from support.check import settled
from support.saving import saved


class Block(nn.Module):
    """Conv, BatchNorm and a Dropout; a flag and a list decide on the result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.flag, self.scales = False, [2.0, 3.0]

    def forward(self, x: Tensor, extra: Tensor | None = None, double: bool = False) -> Tensor:
        y = self.drop(self.bn(self.conv(x))) * self.scales[0]
        y = y if extra is None else y + extra
        return y * 2 if double or self.flag else y


class Above(nn.Module):
    """Its forward decides on a value, so that it stays Python code."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x if x.sum() < 1e9 else -x)
        return self.run(y)

    def run(self, y: Tensor) -> Tensor:
        return self.body(y)

    def features(self, x: Tensor) -> Tensor:
        return self.block.bn(self.block.conv(x))


class Count(TorchDispatchMode):
    """Counts the BatchNorms that run."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.norms += "batch_norm" in str(func)
        return func(*args, **(kwargs or {}))


def norms(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), Count() as count:
        model(x)
    return count.norms


def image(dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    return torch.linspace(-1, 1, batch * 75).reshape(batch, 3, 5, 5).to(dtype)


@functools.cache
def optimized() -> tuple[Any, Any]:
    model = settled(Above()).float()
    fast = fxrep.optimize(model)
    assert type(fast) is type(model) and fxrep.report(fast).rewrites
    assert norms(model, image()) and not norms(fast, image())
    return model, fast


def pair() -> tuple[Any, Any]:
    model, fast = optimized()
    return copy.deepcopy(model), copy.deepcopy(fast)


def same(model: nn.Module, fast: nn.Module) -> None:
    for batch in (2, 2, 3):
        x = image(next(model.parameters()).dtype, batch)
        with torch.no_grad():
            torch.manual_seed(0)
            expected = model(x)
            torch.manual_seed(0)
            torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda m: m,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save": saved,
}

STILL_FUSED: dict[str, Callable[[Any], object]] = {
    "nothing": lambda m: None,
    "eval": lambda m: m.eval(),
    "double": lambda m: m.double(),
    "double and back": lambda m: m.double().float(),
    "a part of it": lambda m: m.block.double() and m.body.double(),
    "memory format": lambda m: m.to(memory_format=torch.channels_last),
    "device": lambda m: m.to("cpu"),
    "share_memory": lambda m: m.share_memory(),
    "requires_grad": lambda m: m.requires_grad_(False),
    "zero_grad": lambda m: m.zero_grad(),
    "state_dict": lambda m: m.state_dict(),
    "a hook on the model": lambda m: m.register_forward_hook(lambda *_: None),
    "the same stride": lambda m: setattr(m.block.conv, "stride", (1, 1)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("action", STILL_FUSED)
def test_what_changes_nothing_keeps_the_fused_layers(action: str, way: str) -> None:
    model, fast = pair()
    if "hook" in action and way in ("pickle", "save"):
        pytest.skip("a function without a name")
    STILL_FUSED[action](fast)
    fast = WAYS[way](fast)
    STILL_FUSED[action](model)
    assert not norms(fast, image(next(model.parameters()).dtype))
    same(model, fast)


def trained(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    torch.manual_seed(0)
    model.train()(image()).pow(2).mean().backward()
    optimizer.step()
    model.eval()


def calibrated(model: Any) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        model.train()(image() * 3)
    model.eval()


def other_weights(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    state = model.state_dict()
    model.load_state_dict({
        name: torch.rand(t.shape, generator=generator).to(t.dtype) for name, t in state.items()
    })  # fmt: skip


def pruned(model: Any) -> None:
    prune.l1_unstructured(model.block.conv, "weight", 0.5)


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.block.conv.weight.mul_(2)


def replaced(model: Any) -> None:
    torch.manual_seed(0)
    model.block.bn = settled(nn.BatchNorm2d(4)).float()


class Shifted(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def another_class(model: Any) -> None:
    model.block.bn.__class__ = Shifted


def set_data(model: Any) -> None:
    model.block.conv.weight.data = model.block.conv.weight.data * 2


def dropping(model: Any) -> None:
    model.block.drop.train()


def reflecting(model: Any) -> None:
    model.block.conv.padding_mode = "reflect"
    model.block.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


def own_forward(model: Any) -> None:
    norm = model.block.bn
    norm.forward = lambda x: nn.BatchNorm2d.forward(norm, x) + 1


def doubled(module: nn.Module, args: Any, result: Tensor) -> Any:
    return 2 * result if isinstance(module, nn.BatchNorm2d) else None


PATCHES: dict[str, tuple[type, str, Any]] = {
    "forward": (nn.BatchNorm2d, "forward", lambda self, x: x * 2),
    "base class": (nn.modules.batchnorm._BatchNorm, "forward", lambda self, x: x * 2),
    "convolution": (nn.Conv2d, "_conv_forward", lambda self, x, w, b: F.conv2d(x, 2 * w, b, 1, 1)),
    "own class": (Block, "forward", lambda self, x: self.conv(x)),
}


@pytest.mark.parametrize("what", ["global hook", *PATCHES])
def test_what_changes_every_module_is_respected(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = pair()
    if what in PATCHES:
        monkeypatch.setattr(*PATCHES[what])
        same(model, fast)
    else:
        hook = nn.modules.module.register_module_forward_hook(doubled)
        try:
            same(model, fast)
        finally:
            hook.remove()
    monkeypatch.undo()
    same(model, fast)
    assert not norms(fast, image())


CHANGES: dict[str, Callable[[Any], object]] = {
    "train": lambda m: m.train(),
    "train a child": lambda m: m.block.bn.train(),
    "train the dropout": dropping,
    "training": trained,
    "calibration": calibrated,
    "load_state_dict": other_weights,
    "in place": in_place,
    "data": set_data,
    "another parameter": lambda m: setattr(m.block.conv, "bias", None),
    "reset": lambda m: m.block.bn.reset_running_stats(),
    "a buffer": lambda m: m.block.bn.running_mean.add_(1),
    "eps": lambda m: setattr(m.block.bn, "eps", 0.5),
    "stride": lambda m: setattr(m.block.conv, "stride", (2, 2)),
    "padding": lambda m: setattr(m.block.conv, "padding", (2, 2)),
    "padding mode": reflecting,
    "a flag": lambda m: setattr(m.block, "flag", True),
    "a list": lambda m: m.block.scales.__setitem__(0, 5.0),
    "another child": replaced,
    "no child": lambda m: setattr(m.block, "bn", nn.Identity()),
    "an item": lambda m: m.body.append(nn.Sigmoid()),
    "fewer items": lambda m: m.body.pop(1),
    "a hook": lambda m: m.block.bn.register_forward_hook(lambda mod, args, y: y + 1),
    "a pre-hook": lambda m: m.block.conv.register_forward_pre_hook(lambda mod, args: args[0] * 2),
    "pruning": pruned,
    "weight_norm": lambda m: nn.utils.weight_norm(m.block.conv),
    "parametrization": lambda m: parametrizations.spectral_norm(m.block.conv),
    "own parametrization": lambda m: parametrize.register_parametrization(
        m.block.conv, "weight", Twice()
    ),
    "class": another_class,
    "forward": own_forward,
    "its own forward": lambda m: setattr(m.block, "forward", lambda x: m.block.conv(x)),
}
NO_PICKLE = ("hook", "parametrization", "forward", "norm")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("action", CHANGES)
def test_changes_are_respected(action: str, way: str) -> None:
    model, fast = pair()
    if way in ("pickle", "save") and any(word in action for word in NO_PICKLE):
        pytest.skip("not for pickles")
    if way == "deepcopy" and action in ("weight_norm", "pruning"):
        pytest.skip("torch does not copy it")
    CHANGES[action](model)
    CHANGES[action](fast)
    same(model, WAYS[way](fast))
    model, fast = pair()
    fast = WAYS[way](fast)
    CHANGES[action](model)
    CHANGES[action](fast)
    same(model, fast)


def test_a_change_that_is_taken_back_fuses_again() -> None:
    model, fast = pair()
    fast.train()
    assert norms(fast, image())
    # Statistics moved: the layers that ran in training are others than before.
    fast = fxrep.optimize(model).train().eval()
    assert not norms(fast, image())
    fast.block.flag = True
    assert norms(fast, image())
    fast.block.flag = False
    assert not norms(fast, image())
    same(model, fast)


def test_gradients_reach_the_layers_that_the_model_had() -> None:
    model, fast = pair()
    for each in (model, fast):
        each(image()).sum().backward()
    for mine, theirs in zip(fast.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    x, y = image().requires_grad_(), image().requires_grad_()
    model.requires_grad_(False)(x).sum().backward()
    with Count() as count:
        fast.requires_grad_(False)(y).sum().backward()
    assert not count.norms  # nothing is trained
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-5)


def test_other_weights_for_one_call() -> None:
    model, fast = pair()
    state = {
        name: t * 1.5 if t.is_floating_point() else t for name, t in model.state_dict().items()
    }
    with torch.no_grad():
        expected = torch.func.functional_call(model, state, (image(),))
        torch.testing.assert_close(torch.func.functional_call(fast, state, (image(),)), expected)
    assert not norms(fast, image())


def test_the_model_shows_what_it_had() -> None:
    model, fast = pair()
    assert repr(fast) == repr(model)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert [*map(type, fast.modules())] == [*map(type, model.modules())]
    torch.testing.assert_close(fast.features(image()), model.features(image()))
    fast.load_state_dict(model.state_dict())
    same(model, fast)


# --- code above that changes or reads what is below ------------------------------------------


def statement(text: str) -> Callable[[], nn.Module]:
    """A model of which `text` is the forward: s is self, x the input."""
    lines = "\n    ".join(line.strip() for line in text.split("; "))
    space: dict[str, Any] = {"torch": torch, "nn": nn}
    exec(f"def forward(s, x):\n    if x.sum() > 1e9: x = -x\n    {lines}\n", space)
    return type("Stated", (Stated,), {"forward": space["forward"]})


class Stated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.hidden = [self.k[0]]
        self.calls = 0
        settled(self)


STATEMENTS = (
    "s.k.train(); y = s.k(x); s.k.eval(); return y",
    "s.k[2].train(); y = s.k(x); s.k[2].eval(); return y",
    "s.k[1].train(); y = s.k(x); s.k[1].eval(); return y",
    "s.k[1].reset_running_stats(); return s.k(x)",
    "s.k[1].eps = 0.5; return s.k(x)",
    "s.k[1].eps = 0.5; y = s.k(x); s.k[1].eps = 1e-5; return y",
    "s.k[0].stride = (2, 2); return s.k(x)",
    "s.k[1].running_mean.add_(1); return s.k(x)",
    "s.k[1].running_mean = s.k[1].running_mean + 1; return s.k(x)",
    "s.k[0].weight.data.mul_(1.5); return s.k(x)",
    "y = s.k(x); s.k[1].running_mean.data.lerp_(y.mean((0, 2, 3)), 0.5); return y",
    "s.k[1].running_mean.numpy()[:] += 1; return s.k(x)",
    "getattr(s.k[0].weight, 'data').mul_(1.5); return s.k(x)",
    "s.k[0].weight.data = s.k[0].weight.data * 1.5; return s.k(x)",
    "s.k[0].bias = None; return s.k(x)",
    "s.k[0], s.k[1] = s.other[0], s.other[1]; return s.k(x)",
    "s.k = s.other; return s.k(x)",
    "s.calls += 1; s.k[0].weight.data = s.k[0].weight.data + s.calls; return s.k(x)",
    "return s.k(x) + s.hidden[0].weight.sum()",
    "return s.k(x) + s.k[0].weight.mean() + s.k[1].running_var.sum()",
    "return s.k(x) + sum(p.sum() for p in s.parameters())",
    "return s.k(x) + len(list(s.modules()))",
    "return s.k(x) + len(s.state_dict())",
    "return s.k(x) + len(list(s.k.named_buffers()))",
    "return s.k(x) + len(str(s))",
    "return s.k(x) + len(vars(s.k)['_modules'])",
    "return s.k(x) + getattr(s, 'k')[0].out_channels + s.k[1].num_features",
    "return s.k[:2](x)",
    "y = x; ms = list(s.k.children()); y = ms[1](ms[0](y)); return y",
    "return nn.Sequential(*s.k[:2], nn.ReLU())(x)",
    "return torch.stack([m(x) for m in (s.k, s.other)])",
    "return s.k.forward(x)",
    "return type(s.k).forward(s.k, x)",
    "return nn.Module.__call__(s.k, x)",
    "return s.k(input=x)",
    "return s.k(*[x])",
    "return nn.functional.conv2d(x, s.k[0].weight, s.k[0].bias) + s.k(x)",
    "[m.register_forward_hook(lambda mod, a, y: y * 1.5) for m in s.k[1:2]]; return s.k(x)",
    "return torch.func.functional_call(s.k, {k: v * 2 for k, v in s.k.state_dict().items()}, x)",
    "import copy; return copy.deepcopy(s.k)(x)",
    "import copy; k = copy.deepcopy(s.k); k[1].eps = 1.0; return k(x)",
    "import pickle; return pickle.loads(pickle.dumps(s.k))(x)",
    "s.k.requires_grad_(False); return s.k(x)",
    "y = s.k.double()(x.double()); s.k.float(); return y.float()",
    "s.train(); y = s.k(x); s.eval(); return y + s.other(x)",
)


@pytest.mark.parametrize("text", STATEMENTS)
def test_code_above_an_island(text: str) -> None:
    torch.manual_seed(0)
    respected(statement(text)().float().eval())


def respected(model: nn.Module) -> None:
    """The optimized model does what the original does, at each of three calls."""
    before = copy.deepcopy(model)
    fast = fxrep.optimize(model)
    for mine, theirs in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    twins = [fast, copy.deepcopy(fast)]
    for x, each in itertools.product((image(), image(batch=3), image()), twins):
        twin = copy.deepcopy(before) if each is twins[1] else model
        torch.manual_seed(3)
        expected = twin(x)
        torch.manual_seed(3)
        torch.testing.assert_close(
            (copy.deepcopy(each) if each is twins[1] else each)(x), expected, rtol=1e-4, atol=1e-5
        )
    names = model.state_dict().keys()
    assert fast.state_dict().keys() == names
    for name in names:
        torch.testing.assert_close(fast.state_dict()[name], model.state_dict()[name])


# --- writes that no version counts, wherever they are ----------------------------------------


def shrink(module: Any) -> None:
    module.k[0].weight.data.mul_(0.5)


def decorated(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    @functools.wraps(forward)
    def around(module: Any, x: Tensor) -> Tensor:
        module.k[0].weight.data.mul_(0.5)
        return forward(module, x)

    return around


def calls(module: Any, x: Tensor) -> Tensor:
    y: Tensor = module.k(x if x.sum() < 1e9 else -x)
    return y


class Shrinks:
    def step(self, module: Any) -> None:
        shrink(module)


def by_default(module: Any, x: Tensor, do: Any = lambda m: m.k[0].weight.data.mul_(0.5)) -> Tensor:
    do(module)
    return calls(module, x)


def by_closure() -> Callable[[Any, Tensor], Tensor]:
    do = functools.partial(lambda m: m.k[0].weight.data.mul_(0.5))
    return lambda module, x: (do(module), calls(module, x))[1]


def own_call(module: Any, *args: Any, **kwargs: Any) -> Any:
    module.k[0].weight.data.mul_(0.5)
    return nn.Module.__call__(module, *args, **kwargs)


UNSEEN: dict[str, dict[str, Any]] = {
    "decorator": {"forward": decorated(calls)},
    "default": {"forward": by_default},
    "closure": {"forward": by_closure()},
    "held object": {"forward": lambda m, x: (m.helper.step(m), calls(m, x))[1]},
    "method by name": {"forward": lambda m, x: (m.shrink(), calls(m, x))[1], "shrink": shrink},
    "property": {"forward": lambda m, x: (m.p, calls(m, x))[1], "p": property(shrink)},
    "own call": {"forward": calls, "__call__": own_call},
}


@pytest.mark.parametrize("where", UNSEEN)
def test_a_write_that_no_version_counts(where: str) -> None:
    torch.manual_seed(0)
    model = type("Stated", (Stated,), UNSEEN[where])().float().eval()
    model.helper = Shrinks()
    respected(model)


@pytest.mark.parametrize("below", ["", "k"])
@pytest.mark.parametrize("kind", ["register_forward_pre_hook", "register_forward_hook"])
def test_a_hook_that_writes_what_no_version_counts(kind: str, below: str) -> None:
    def hook(module: Any, *_: Any) -> None:
        (module.k if below == "" else module)[0].weight.data.mul_(0.5)

    torch.manual_seed(0)
    model = type("Stated", (Stated,), {"forward": calls})().float().eval()
    getattr(model.get_submodule(below), kind)(hook)
    respected(model)
