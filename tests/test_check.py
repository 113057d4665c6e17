"""The shared check itself: it fails on planted wrong rewrites, and validation catches them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxrep
from fxrep.algebra import composition, weights
from fxrep.planning import steps
from fxrep.rewriting import layers, session
from support.blocks import RepVGG
from support.check import check
from support.models import conv_bn

Patch = Callable[[pytest.MonkeyPatch], None]


class Sum(nn.Module):
    """The sum of what its branches make of one input."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches)


def conv(*args: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(*args, **kwargs)


def wrap(owner: Any, name: str, change: Callable[..., Any]) -> Patch:
    """Replace ``owner.name`` by ``change(its original, *args)``."""
    original = getattr(owner, name)

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(owner, name, lambda *a, **k: change(original, *a, **k))

    return patch


def _no_bias(build: Any, plan: Any, *rest: Any) -> Any:
    pieces = tuple(dataclasses.replace(piece, bias=None) for piece in plan.pieces)
    return build(dataclasses.replace(plan, pieces=pieces), *rest)


def _spoilt(build: Any, *args: Any) -> Any:
    """The new layer's own weight is wrong, its recipe is right."""
    layers = build(*args)
    for layer in layers:
        layer.module.weight.data[0] += 0.1
    return layers


def _half_stride(add_axes: Any, axes: Any, *rest: Any) -> Any:
    same = [dataclasses.replace(a, stride=axes[0].stride) for a in axes]
    return add_axes(same, *rest)


def _any_size(add_axes: Any, axes: Any, *rest: Any) -> Any:
    """Sizes that differ are made to agree on the high side."""
    first = axes[0]
    return add_axes(
        [dataclasses.replace(a, high=first.excess - a.low + a.reach) for a in axes], *rest
    )


def _unpadded(add_maps: Any, maps: Any, *rest: Any) -> Any:
    return add_maps([dataclasses.replace(m, padding_mode="zeros") for m in maps], *rest)


SIZES = ((2, 8, 9, 9), (1, 8, 8, 7))
WRONG = {
    "shift without its sign": (
        wrap(weights, "batchnorm_shift", lambda f, *a: -f(*a)),
        conv_bn(8, 8, 3), SIZES,
    ),
    "scale without eps": (
        wrap(weights, "batchnorm_scale", lambda f, v, eps, w: f(v, 0.0, w)),
        conv_bn(8, 8, 3), SIZES,
    ),
    "bias lost": (wrap(session, "build", _no_bias), conv_bn(8, 8, 3, bias=True), SIZES),
    "layer spoilt after its recipe": (wrap(session, "build", _spoilt), conv_bn(8, 8, 3), SIZES),
    "bias of a padded chain ignored": (
        wrap(composition, "_chain_is_exact", lambda f, *a: True),
        Sum(nn.Sequential(conv(8, 32, 1), conv(32, 8, 3, padding=1)), nn.Identity()), SIZES,
    ),
    "padding over a padded convolution": (
        wrap(composition, "_chain_is_exact", lambda f, *a: True),
        Sum(
            nn.Sequential(conv(8, 64, 3, padding=1, bias=False), conv(64, 8, 3, padding=1)),
            nn.Identity(),
        ), SIZES,
    ),
    "shift before a padded convolution": (
        wrap(composition, "compose", lambda f, a, b, biased: f(a, b, biased=False)),
        nn.Sequential(nn.BatchNorm2d(8), conv(8, 8, 3, padding=1)), SIZES,
    ),
    "a branch that broadcasts": (
        wrap(composition, "_add_axes", _any_size),
        Sum(conv(8, 32, 3, padding=1), conv(8, 32, 3)), ((2, 8, 3, 3), (3, 8, 3, 3)),
    ),
    "sizes equal for even inputs only": (
        wrap(composition, "_add_axes", _any_size),
        Sum(conv(8, 32, 2, stride=2), conv(8, 32, 1, stride=2)),
        ((2, 8, 8, 8), (2, 8, 3, 3)),
    ),
    "kernels off by one": (
        wrap(weights, "add", lambda f, *a: f(*a).roll(1, -1)),
        Sum(conv(8, 8, 3, padding=1), conv(8, 8, 1)), SIZES,
    ),
    "kernels mirrored": (
        wrap(weights, "add", lambda f, *a: f(*a).transpose(-1, -2)),
        Sum(conv(8, 8, 3, padding=1), conv(8, 8, (1, 3), padding=(0, 1))), SIZES,
    ),
    "groups mixed up": (
        wrap(weights, "to_convolution", lambda f, *a: f(*a).flip(0)),
        Sum(conv(8, 8, 3, padding=1, groups=4), conv(8, 8, 1, groups=8)), SIZES,
    ),
    "padding modes mixed up": (
        wrap(composition, "_add_maps", _unpadded),
        Sum(conv(8, 8, 3, padding=1), conv(8, 8, 3, padding=1, padding_mode="reflect")), SIZES,
    ),
    "a vector along the width": (
        wrap(composition, "_mismatch", lambda f, diagonal, channels, axis: None),
        nn.Sequential(conv(8, 8, 1), RepVGG(8, 8)), SIZES,
    ),
}  # fmt: skip


class ScaledWidth(nn.Module):
    """A (C,) vector meets the last axis, which has C positions too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.scale


WRONG["a vector along the width"] = (
    WRONG["a vector along the width"][0], ScaledWidth(), ((2, 8, 9, 10), (1, 8, 5, 10)),
)  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rewrite_fails_the_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, model, shapes = WRONG[name]
    patch(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check(model.eval(), shapes, batchnorms=None, validate=False)


@pytest.mark.parametrize("name", WRONG)
def test_validation_drops_a_wrong_rewrite(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, model, shapes = WRONG[name]
    patch(monkeypatch)
    check(model.eval(), shapes, batchnorms=None, reasons=["validation failed"])


@pytest.mark.parametrize("name", WRONG)
def test_without_the_fault_the_same_models_pass(name: str) -> None:
    _, model, shapes = WRONG[name]
    check(model.eval(), shapes, batchnorms=None)


# --- faults around the rewrite -------------------------------------------------------------------

OPTIMIZE = fxrep.optimize


def _changes(change: Callable[[nn.Module], Any]) -> Callable[..., nn.Module]:
    def optimize(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        result = OPTIMIZE(model, *args, **kwargs)
        change(model)
        return result

    return optimize


def _shares(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    result = OPTIMIZE(model, *args, **kwargs)
    result.register_parameter("kept", model[0].weight)
    return result


def _dangling(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    result = OPTIMIZE(model, *args, **kwargs)
    with result.graph.inserting_before():
        result.graph.get_attr("nowhere")
    return result


def _leaves_work(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    if not isinstance(model, torch.fx.GraphModule):
        kwargs["passes"] = ["constants"]
    return OPTIMIZE(model, *args, **kwargs)


def _adds_work(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    result = OPTIMIZE(model, *args, **kwargs)
    output = result.graph.output_node()
    with result.graph.inserting_before(output):
        doubled = result.graph.call_function(torch.mul, (output.args[0], 4.0))
        halves = [result.graph.call_function(torch.div, (doubled, 4.0)) for _ in range(3)]
    output.args = (halves[-1],)
    result.recompile()
    return result


def _densifies(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    result = OPTIMIZE(model, *args, **kwargs)
    path, old = next((n, m) for n, m in result.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(8, 8, 5, padding=1, dtype=old.weight.dtype)
    new.weight.data.zero_()[:, :, 1:4, 1:4] = old.weight.data
    new.bias.data = old.bias.data
    result.set_submodule(path, new)
    return result


FAULTS: dict[str, tuple[Any, str]] = {
    "weight written": (_changes(lambda m: m[0].weight.data.add_(1)), "weight changed"),
    "statistics written": (_changes(lambda m: m[1].running_mean.add_(1)), "running_mean changed"),
    "flag flipped": (_changes(lambda m: m[0].weight.requires_grad_(False)), "weight changed"),
    "training": (_changes(lambda m: m[1].train()), "training changed"),
    "in-place flag": (_changes(lambda m: setattr(m[2], "inplace", False)), "inplace changed"),
    "hook": (_changes(lambda m: m[0].register_forward_hook(lambda *a: None)), "hooks changed"),
    "attribute": (_changes(lambda m: setattr(m, "seen", 1)), "vanished"),
    "child replaced": (_changes(lambda m: m.set_submodule("1", nn.Identity())), "vanished|changed"),
    "buffer": (_changes(lambda m: m.register_buffer("b", torch.ones(1))), "vanished"),
    "layout": (
        _changes(lambda m: setattr(m[0].weight, "data", m[0].weight.data.clone())),
        "weight changed",
    ),
    "tensor shared": (_shares, "shares tensors"),
    "dangling read": (_dangling, "nowhere"),
    "work left": (_leaves_work, "second run"),
    "work added": (_adds_work, "MACs|->"),
    "kernel grown": (_densifies, "MACs"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_around_the_rewrite_fails_the_check(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimize, message = FAULTS[name]
    monkeypatch.setattr(fxrep, "optimize", optimize)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    with pytest.raises((AssertionError, AttributeError, RuntimeError), match=message):
        check(model.eval(), SIZES, batchnorms=None)


@pytest.mark.parametrize(
    "expected, message",
    [
        ({"layers": 2}, "layers"),
        ({"batchnorms": 1}, "batchnorms"),
        ({"operations": 5}, "total"),
        ({"rewrites": 0}, "rewritten"),
        ({"reasons": ["because"]}, "because"),
    ],
)
def test_an_unmet_expectation_fails_the_check(expected: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(conv_bn(8, 8, 3).eval(), SIZES, **expected)


def test_one_size_is_refused() -> None:
    with pytest.raises(AssertionError, match="one size"):
        check(conv_bn(8, 8, 3).eval(), SIZES[:1])


def test_the_walk_and_the_editor_are_what_the_faults_patch() -> None:
    """The planted faults reach the library through these names; a rename must show here."""
    assert vars(steps)["composition"] is composition
    assert vars(session)["build"] is layers.build
