"""Whose code a call runs: what a hook, an instance or a subclass can change is known to nobody."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations

import fxrep
from fxrep.ops.owner import called_class, foreign_hooks, is_leaf, known_class, torch_class
from support.check import randomize
from support.models import IMAGE

# Leaves by what they do to a (N, 6) value; all keep its shape.
LEAVES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu in place": lambda: nn.SiLU(inplace=True),
    "identity": nn.Identity,
    "dropout": nn.Dropout,
    "batchnorm": lambda: nn.BatchNorm1d(6),
    "layernorm": lambda: nn.LayerNorm(6),
    "linear": lambda: nn.Linear(6, 6),
    "flatten": nn.Flatten,
    "softmax": lambda: nn.Softmax(-1),
    "prelu": lambda: nn.PReLU(6),
}


class Around(nn.Module):
    """A convolution's pooled value through a leaf, then a BatchNorm1d and a Linear."""

    def __init__(self, leaf: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.leaf = leaf
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.leaf(self.conv(x).mean((2, 3)).flatten(1))
        if isinstance(y, tuple):
            y = y[0]
        return self.head(self.norm(y))


def widened(y: Tensor) -> Tensor:
    """(N, 6) as (N, 6, 6): the BatchNorm1d then normalises another axis than the Linear reads."""
    return y.unsqueeze(1).expand(-1, 6, -1)


def forward_hook(m: nn.Module) -> None:
    m.register_forward_hook(lambda _, args, out: widened(out))


def forward_hook_with_kwargs(m: nn.Module) -> None:
    m.register_forward_hook(lambda _, args, kwargs, out: widened(out), with_kwargs=True)


def forward_hook_to_a_tuple(m: nn.Module) -> None:
    m.register_forward_hook(lambda _, args, out: (out, 0))


def pre_hook(m: nn.Module) -> None:
    m.register_forward_pre_hook(lambda _, args: (widened(args[0]),))


def pre_hook_with_kwargs(m: nn.Module) -> None:
    m.register_forward_pre_hook(lambda _, a, k: ((widened(a[0]),), k), with_kwargs=True)


def own_forward(m: nn.Module) -> None:
    old = m.forward
    m.forward = lambda y: widened(old(y)) if float(y.sum()) < 1e9 else y


def own_forward_to_a_tuple(m: nn.Module) -> None:
    old = m.forward
    m.forward = lambda y: (old(y), 0)


CHANGES = [
    forward_hook, forward_hook_with_kwargs, forward_hook_to_a_tuple, pre_hook,
    pre_hook_with_kwargs, own_forward, own_forward_to_a_tuple,
]  # fmt: skip


def compare(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    """Optimize and compare; an original that raises must raise afterwards too."""
    model = randomize(model).double().eval()
    before = copy.deepcopy(model.state_dict())
    fast = fxrep.optimize(model, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        try:
            expected = model(x)
        except (RuntimeError, ValueError, TypeError):
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                fast(x)
            return fast
        assert torch.allclose(fast(x), expected, rtol=1e-9, atol=1e-9)
    return fast


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("leaf", LEAVES)
def test_a_changed_leaf_is_not_known(leaf: str, change: Callable[[nn.Module], None]) -> None:
    module = LEAVES[leaf]().eval()
    change(module)
    assert called_class(module) is None
    compare(Around(module), torch.randn(6, 3, 5, 5, dtype=torch.float64))


@contextmanager
def for_all_modules(register: str, hook: Callable[..., Any]) -> Iterator[None]:
    handle = getattr(nn_module, register)(hook)
    try:
        yield
    finally:
        handle.remove()


def test_hooks_for_all_modules_run_at_every_call() -> None:
    """They belong to nobody's instance, and so were lost with every module that was folded."""
    calls: list[str] = []
    model = Around(nn.ReLU())
    x = torch.randn(6, 3, 5, 5, dtype=torch.float64)

    def note(m: nn.Module, args: Any, out: Any) -> Any:
        calls.append(type(m).__name__)
        return out * 2 if isinstance(m, nn.ReLU) else None

    with for_all_modules("register_module_forward_hook", note):
        fast = compare(model, x)
        called: list[list[str]] = []
        for each in (model, fast):
            calls.clear()
            each(x)
            called.append(list(calls))
    assert called[0] == called[1]
    assert fxrep.report(fast).skipped and not fxrep.report(fast).rewrites


def test_a_patched_conv_forward_is_run() -> None:
    conv: Any = nn.Conv2d(3, 3, 3)
    conv._conv_forward = lambda x, w, b: nn.functional.conv2d(x, w * 2, b)
    assert torch_class(conv) is None
    model = nn.Sequential(conv, nn.BatchNorm2d(3))
    compare(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "eps", "groups"])
def test_attributes_changed_after_construction(name: str) -> None:
    conv, norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    if name == "groups":
        conv.groups, conv.weight = 2, nn.Parameter(torch.randn(4, 2, 3, 3))
    elif name == "eps":
        norm.eps = 0.5
    else:
        setattr(conv, name, (2, 2))
    fast = compare(nn.Sequential(conv, norm), torch.randn(2, 4, 8, 8, dtype=torch.float64))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_changed_after_construction(mode: Any) -> None:
    """Other modes than zeros pad by what was computed in `__init__`, not by `padding`."""
    conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
    conv.padding = (2, 2)
    fast = compare(
        nn.Sequential(conv, nn.BatchNorm2d(4)), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    )
    assert any("padding was changed" in skip.reason for skip in fxrep.report(fast).skipped)


class Renamed(nn.Conv2d):
    """Overrides nothing that a call runs."""

    def extra_repr(self) -> str:
        return "renamed"


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Looked(nn.ReLU):
    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name)


def test_classes() -> None:
    assert torch_class(Renamed(3, 3, 1)) is nn.Conv2d and is_leaf(Renamed(3, 3, 1))
    assert torch_class(Doubled(3, 3, 1)) is None and not is_leaf(Doubled(3, 3, 1))
    assert torch_class(Looked()) is None
    assert torch_class(nn.Sequential()) is nn.Sequential and called_class(nn.Sequential()) is None
    assert called_class(nn.ReLU6()) is nn.ReLU6
    assert called_class(parametrizations.weight_norm(nn.Linear(2, 2))) is nn.Linear
    scripted = torch.jit.script(nn.ReLU())
    assert is_leaf(scripted) and called_class(scripted) is None
    assert not foreign_hooks(torch.nn.utils.spectral_norm(nn.Linear(2, 2)))


def test_the_class_that_answers_is_the_one_that_runs() -> None:
    """ReLU6 derives from Hardtanh: it is known as itself, and as the other by its forward."""
    node = fx.Graph().call_module("x")
    assert known_class(node, nn.ReLU6(), {nn.Hardtanh}) is nn.Hardtanh
    other = fx.Graph().call_module("x")
    assert known_class(other, nn.LazyConv2d(3, 1), {nn.Conv2d}) is None


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("inputs", [None, IMAGE])
@pytest.mark.parametrize(
    "hooked",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda conv: nn.utils.prune.l1_unstructured(conv, "weight", 0.3),
    ],
)
def test_a_layer_whose_weight_a_hook_computes_stays(hooked, inputs, ran):
    """Reading its weight ran the hook, which left one that cannot be copied on the layer."""
    model = nn.Sequential(hooked(nn.Conv2d(4, 4, 3)), nn.ReLU()).eval().double()
    if ran:
        model(IMAGE)
    optimized = fxrep.optimize(model, inputs)
    torch.testing.assert_close(optimized(IMAGE), model(IMAGE), rtol=1e-10, atol=1e-10)


# --- what a forward itself changes, and gives back before it ends ---------------------------------


class Toggling(nn.Module):
    """Sets something on what it calls, and restores it."""

    def __init__(self, toggle: Callable[[Any], Any], restore: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Dropout(1.0)
        self.act, self.block = nn.LeakyReLU(), nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.toggle, self.restore = toggle, restore

    def forward(self, x: Tensor) -> Tensor:
        state = self.toggle(self)
        y = self.block(self.act(self.drop(self.norm(self.conv(x)))))
        self.restore(self if state is None else state)
        return y


def set_to(path: str, value: object) -> Callable[[nn.Module], None]:
    owner, _, name = path.rpartition(".")
    return lambda m: setattr(m.get_submodule(owner), name, value)


TOGGLES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "training of a BatchNorm": (set_to("norm.training", True), set_to("norm.training", False)),
    "train and eval": (lambda m: m.drop.train() and None, lambda m: m.drop.eval()),
    "dilation": (set_to("conv.dilation", (2, 2)), set_to("conv.dilation", (1, 1))),
    "slope": (set_to("act.negative_slope", 0.9), set_to("act.negative_slope", 0.01)),
    "by __dict__": (
        lambda m: m.conv.__dict__.update(stride=(2, 2)),
        lambda m: m.conv.__dict__.update(stride=(1, 1)),
    ),
    "forward hook": (
        lambda m: m.conv.register_forward_hook(lambda _, a, o: o * 3),
        lambda handle: handle.remove(),
    ),
    "pre-hook": (
        lambda m: m.act.register_forward_pre_hook(lambda _, a: (a[0] * 2,)), lambda h: h.remove()
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", TOGGLES)
def test_what_is_set_for_one_call_is_noticed(how: str) -> None:
    compare(Toggling(*TOGGLES[how]), torch.randn(2, 3, 9, 9, dtype=torch.float64))


class Installing(nn.Module):
    """Installs a hook at its first call, as transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "installed"):
            self.act.register_forward_hook(lambda m, a, out: out + 1)
            self.installed = True
        return self.act(x)


def test_hooks_installed_at_the_first_call_are_installed_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), Installing()).double().eval()
    fast = fxrep.optimize(model)
    assert not model[2].act._forward_hooks and not fast.get_submodule("2.act")._forward_hooks
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    for _ in range(2):
        assert torch.allclose(fast(x), model(x))


class Hiding(nn.Module):
    """Keeps a module where no module registers it."""

    def __init__(self, hidden: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.hidden = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), [hidden]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](self.norm(self.conv(x)))


@pytest.mark.parametrize("hooked", [False, True])
def test_modules_in_plain_lists(hooked: bool) -> None:
    seen: list[object] = []
    act = nn.ReLU()
    if hooked:
        act.register_forward_hook(lambda m, a, out: seen.append(out))
    model = Hiding(act).double().eval()
    fast = fxrep.optimize(model)
    assert not seen, "a hook was run while tracing"
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    assert torch.allclose(fast(x), model(x)) and len(seen) == 2 * hooked
    assert hooked is isinstance(fast, Hiding)


def test_a_method_set_on_torchs_own_class(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.ReLU.forward
    monkeypatch.setattr(
        nn.ReLU, "forward", lambda self, y: widened(plain(self, y)) if y.dim() == 2 else y
    )
    assert torch_class(nn.ReLU()) is None
    compare(Around(nn.ReLU()), torch.randn(6, 3, 5, 5, dtype=torch.float64))
