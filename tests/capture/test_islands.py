"""Models whose whole forward does not trace: their parts are rewritten and stay in place."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxrep
from support.check import assert_equal, settled
from support.models import IMAGE, conv_bn


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return x + self.bn(self.conv(x))


class Items(nn.Module):
    """Runs the items of a Sequential one by one, and decides on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Residual(), nn.BatchNorm2d(4), Residual())

    def forward(self, x):
        if x.sum() > 0:
            x = x + 1
        for block in self.blocks:
            x = block(x)
        return x


class Whole(Items):
    def forward(self, x):
        if x.sum() > 0:
            x = x + 1
        return self.blocks(x)


class Indexed(Items):
    def forward(self, x):
        if x.sum() > 0:
            x = x + 1
        return self.blocks[2](self.blocks[0](x)) + len(self.blocks)


class Forwarded(Items):
    def forward(self, *args, **kwargs):
        return self.blocks(*args, **kwargs)


class Handed(Items):
    """Hands the Sequential to code that calls it."""

    def forward(self, x):
        if x.sum() > 0:
            x = x + 1
        return checkpoint(self.blocks, x, use_reentrant=True)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x, mask=None):
        y = self.bn(self.conv(x))
        return y if mask is None else y * mask


class CallsMasked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Masked()

    def forward(self, x):
        if x.sum() > 0:
            return self.inner(x, torch.tensor(2.0, dtype=x.dtype))
        return self.inner(x)


@pytest.mark.parametrize("kind", [Items, Whole, Indexed, CallsMasked, Forwarded, Handed])
def test_parts_are_rewritten_and_every_way_to_call_them_stays_right(kind):
    model = settled(kind())
    optimized = fxrep.optimize(model)
    assert type(optimized) is kind
    assert fxrep.report(optimized).rewrites
    x = torch.rand(2, 4, 5, 6, dtype=torch.float64)
    for copied in (optimized, copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        for value in (x, -x):
            torch.testing.assert_close(copied(value), model(value), rtol=1e-10, atol=1e-10)


def test_a_sequential_that_code_iterates_keeps_its_items():
    optimized = fxrep.optimize(settled(Items()))
    assert len(list(optimized.get_submodule("blocks").children())) == 3


class Raw(nn.Module):
    """A forward of more arguments than a graph has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x, **options):
        y = self.conv(x)
        return y if options.get("raw") else self.bn(y)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Raw()

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.block(x, raw=True) + self.block(x)


def test_an_island_called_with_more_arguments_than_its_graph_has() -> None:
    model = settled(Both())
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert torch.allclose(fxrep.optimize(model)(x), model(x))


class Coded(nn.Module):
    """Keeps its class, for a GraphModule has an attribute of the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.code = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), "abc"

    def forward(self, x, raw=False):
        y = self.conv(x)
        return y if raw else self.bn(y)


def test_a_root_that_keeps_its_class_runs_with_other_arguments() -> None:
    model = settled(Coded())
    fast = fxrep.optimize(model)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for raw in (False, True, False):
        assert torch.allclose(fast(x, raw=raw), model(x, raw=raw))


class Describing(nn.Module):
    """Prints what its island lost."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))

    def extra_repr(self) -> str:
        return f"features={self.body[1].num_features}"

    def forward(self, x):
        return self.body(x) if x.sum() < 1e9 else x


def test_code_above_an_island_prints_what_it_prints() -> None:
    model = settled(Describing())
    fast = fxrep.optimize(model)
    assert "features=3" in repr(fast) and "features=3" in repr(copy.deepcopy(fast))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert torch.allclose(fast(x), model(x))


class WalksModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(4, 4, 3, padding=1), conv_bn(4, 4, 3, padding=1))

    def forward(self, x):
        if x.sum() > 1e9:
            x = x * 2
        for layer in self.body.modules():
            if isinstance(layer, nn.Conv2d):
                x = layer(x)
        return x


class ReadsOneItem(WalksModules):
    def forward(self, x):
        if x.sum() > 1e9:
            x = x * 2
        return self.body(x) * self.body[0][0].out_channels


def test_code_that_walks_all_modules_finds_the_layers_that_it_had():
    assert assert_equal(WalksModules(), IMAGE).rewrites


def test_reading_an_item_does_not_hinder_folding():
    assert assert_equal(ReadsOneItem(), IMAGE).rewrites


class Head(nn.Module):
    """Takes a list, and asks for a size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, levels):
        y = levels[0] if levels[0].shape[-1] > 4 else levels[1]
        return self.bn(self.conv(sum(levels, y)))


class Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.other = Head(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    def forward(self, x):
        y = self.other(x)
        return self.head([y, y + 1]) if x.sum() < 1e9 else y


def test_a_hook_elsewhere_does_not_hide_what_a_part_is_given():
    """Libraries leave hooks in a model that has run, to hand out what its layers give."""
    model = settled(Levels())
    seen: list[None] = []
    model.other.register_forward_hook(lambda *call: seen.append(None) if seen else None)
    x = torch.rand(2, 4, 5, 6, dtype=torch.float64)
    optimized = fxrep.optimize(model, x)
    assert [each.where for each in fxrep.report(optimized).rewrites] == ["head.conv"]
    for size in (5, 3):
        x = torch.rand(2, 4, size, size, dtype=torch.float64)
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-10, atol=1e-10)
    assert not seen


def test_a_normalization_that_python_code_calls_has_a_reason() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.norms = nn.ModuleList([nn.BatchNorm2d(4)])
            self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norms[0](self.norm(self.conv(x)))
            return self.block(y) if y.sum() < 1e9 else y

    report = fxrep.report(fxrep.optimize(nn.Sequential(Direct()).eval()))
    stay = [s.where for s in report.skipped if s.reason.startswith("stays: the forward that calls")]
    assert stay == ["0.norm", "0.norms.0"]
    assert [rewrite.where for rewrite in report.rewrites] == ["0.block.0"]
