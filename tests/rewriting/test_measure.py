"""`cost="measure"`: what is in doubt is timed, and only what is faster is kept."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxrep
from fxrep.rewriting import measure
from fxrep.rewriting.measure import Timing
from support.check import check, settled
from support.steps import Net
from support.strategies import nets

IMAGE = torch.randn(1, 4, 9, 8, dtype=torch.float64)


class Wide(nn.Module):
    """A 1x3 and a 3x1 of one source: three MACs each, nine for the 3x3 they add up to."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Conv2d(4, 4, (1, 3), padding=(0, 1))
        self.column = nn.Conv2d(4, 4, (3, 1), padding=(1, 0))

    def forward(self, x):
        return F.relu(self.row(x) + self.column(x))


class Siblings(nn.Module):
    """Fewer operations and as many MACs; whether it is faster, nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return torch.sigmoid(self.one(x)) * torch.tanh(self.other(x)) + F.silu(self.third(x))


class Pooled(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.ReLU())


class Border(nn.Sequential):
    """A biased 1x1 before a padded 3x3: one layer needs one more channel, of ones."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())


DOUBTFUL = [Wide, Siblings, Pooled, Border]


def timed(monkeypatch: pytest.MonkeyPatch, before: float, after: float) -> list[Any]:
    """Let the clock say what the test wants; returns what it was asked to time."""
    asked: list[Any] = []

    def clock(old: Callable[[], Any], new: Callable[[], Any]) -> Timing:
        asked.append((old(), new()))  # both run
        return Timing(before, after)

    monkeypatch.setattr(measure, "_timings", {})
    monkeypatch.setattr(measure, "_measured", clock)
    return asked


@pytest.mark.parametrize("kind", DOUBTFUL)
def test_faster_is_kept(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed(monkeypatch, 2e-3, 1e-3)
    options: dict[str, Any] = {"cost": "measure", "example_inputs": True, "more_work": True}
    optimized = check(kind().eval(), [(1, 4, 9, 8), (2, 4, 6, 7)], **options)
    report = fxrep.report(optimized)
    assert asked
    times = [(r.seconds_before, r.seconds_after) for r in report.rewrites]
    assert (2e-3, 1e-3) in times
    assert "2 -> 1" in str(report) and "time in ms" in str(report)
    assert report.to_dict()["rewrites"][-1]["seconds_after"] == 1e-3


@pytest.mark.parametrize("kind", DOUBTFUL)
@pytest.mark.parametrize("after", [1e-3, 0.99e-3, 2e-3])
def test_slower_and_not_certainly_faster_is_not(
    kind: type[nn.Module], after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, 1e-3, after)
    report = fxrep.report(fxrep.optimize(kind().eval().double(), IMAGE, cost="measure"))
    assert not report.rewrites
    reason = f"not faster: 1 ms -> {1e3 * after:.3g} ms"
    assert any(reason in skip.reason for skip in report.skipped), str(report)


def test_what_is_beyond_doubt_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed(monkeypatch, 1.0, 1.0)
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    report = fxrep.report(fxrep.optimize(model, IMAGE, cost="measure"))
    assert len(report.rewrites) == 1 and report.rewrites[0].seconds_before is None
    assert not asked
    assert "time in ms" not in str(report)


def test_equal_geometry_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed(monkeypatch, 1.0, 2.0)
    model = nn.Sequential(Wide(), Wide(), Wide()).eval().double()
    fxrep.optimize(model, IMAGE, cost="measure")
    assert len(asked) == 1
    fxrep.optimize(model, IMAGE, cost="measure")
    assert len(asked) == 1
    fxrep.optimize(model, torch.cat([IMAGE, IMAGE]), cost="measure")
    assert len(asked) == 2, "another batch size takes another time"


def test_the_same_layer_at_several_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called at two sizes: replaced at both or at none, by both times together."""

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = Wide()

        def forward(self, x):
            return self.head(x), self.head(F.max_pool2d(x, 2))

    asked = timed(monkeypatch, 2.0, 1.0)
    report = fxrep.report(fxrep.optimize(Pyramid().eval().double(), IMAGE, cost="measure"))
    assert len(asked) == 2
    assert [(r.seconds_before, r.seconds_after) for r in report.rewrites] == [(4.0, 2.0)]


def test_parts_of_a_model_that_does_not_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Wide(), Wide())

        def forward(self, x):
            if x.sum() > 0:
                x = x + 1
            for block in self.blocks:
                x = block(x)
            return x

    asked = timed(monkeypatch, 2.0, 1.0)
    model = settled(Decides())
    optimized = fxrep.optimize(model, IMAGE, cost="measure")
    torch.testing.assert_close(optimized(IMAGE), model(IMAGE), rtol=1e-10, atol=1e-10)
    assert len(fxrep.report(optimized).rewrites) == 2 and len(asked) == 1


class NeverCalled(nn.Module):
    """The branch that traces does not run on the example: nothing is known of its shapes."""

    def __init__(self, doubtful: nn.Module) -> None:
        super().__init__()
        self.part = doubtful

    def forward(self, x):
        return self.part(x) if x.sum() > 1e9 else x


def test_shapes_that_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed(monkeypatch, 2.0, 1.0)
    model = NeverCalled(Wide()).eval().double()
    report = fxrep.report(fxrep.optimize(model, IMAGE, cost="measure"))
    assert not report.rewrites and not asked
    assert any("not known from example_inputs" in skip.reason for skip in report.skipped)
    # What costs no more MACs is done without a clock.
    model = NeverCalled(Siblings()).eval().double()
    assert len(fxrep.report(fxrep.optimize(model, IMAGE, cost="measure")).rewrites) == 1


def test_the_clock() -> None:
    """No figure: only that the larger of two very different works is seen to be larger."""
    small, large = torch.randn(8, 8), torch.randn(512, 512)
    timing = measure._measured(lambda: large @ large, lambda: small @ small)
    assert 0 < timing.after < timing.before
    assert re.fullmatch(r"\S+ ms -> \S+ ms", str(timing))


def test_a_busy_machine_does_not_decide():
    """The faster side is the one that is interrupted, in more than half of its calls."""
    calls = iter(range(10**6))
    timing = measure._measured(
        lambda: time.sleep(2e-3),
        lambda: time.sleep(5e-3 if next(calls) % 5 < 3 else 1e-3),
    )
    assert timing.after < timing.before


@pytest.mark.parametrize("kind", DOUBTFUL)
def test_random_numbers_stay_the_users(kind: type[nn.Module]) -> None:
    model, before = kind().eval().double(), torch.get_rng_state()
    fxrep.optimize(model, IMAGE, cost="measure")
    assert torch.equal(torch.get_rng_state(), before)


def test_it_needs_example_inputs() -> None:
    with pytest.raises(fxrep.FxrepError, match=r"cost='measure' times .* example_inputs"):
        fxrep.optimize(Wide().eval(), cost="measure")


def test_the_backend_has_no_clock() -> None:
    model = torch.compile(Wide().eval(), backend="fxrep", options={"cost": "measure"})
    with pytest.raises(Exception, match="cost='measure'"), torch.no_grad():
        model(IMAGE.float())


@given(net=nets(), faster=st.booleans())
@settings(max_examples=30)
def test_any_model(net: Net, faster: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        timed(patch, 1.0, 0.5 if faster else 2.0)
        check(
            net, net.sizes, batchnorms=None, again=False, example_inputs=True, cost="measure",
            more_work=faster,
        )  # fmt: skip


class Pooling(Siblings):
    """Modules read the parts: they are timed with them."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        parts = (self.one(x), self.other(x), self.third(x))
        return [self.pool(part) for part in parts]


def test_modules_that_read_the_parts_are_timed_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed(monkeypatch, 2.0, 1.0)
    assert fxrep.report(fxrep.optimize(Pooling().eval().double(), IMAGE, cost="measure")).rewrites
    before, after = asked[-1]
    assert [tuple(v.shape[2:]) for v in after].count((4, 4)) == 3
    assert [tuple(v.shape[2:]) for v in before].count((4, 4)) == 3
