"""The front door: arguments, errors, names, the report, and a model that stays as it is."""

from __future__ import annotations

import copy
import pickle
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxrep
from fxrep.planning.cost import Work
from fxrep.planning.plan import Plan
from fxrep.planning.rule import Pass
from support.blocks import MobileOne, RepVGG
from support.check import check, distance, randomize, run, settled, untouched
from support.models import IMAGE, conv_bn

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Backbone(nn.Module):
    """A stem, two stages of blocks, a head; one part does not trace when asked."""

    def __init__(self, *, traces: bool = True) -> None:
        super().__init__()
        self.traces, self.num_classes = traces, 5
        self.stem = conv_bn(3, 8, 3, stride=2, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(RepVGG(8, 8), MobileOne(8, 8, 3, groups=8)) for _ in range(2)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, self.num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        y = self.features(x)
        if not self.traces and y.sum() > 1e9:
            y = -y
        return {"map": y, "scores": self.head(self.pool(y).flatten(1)) * scale}


@pytest.fixture
def model() -> Backbone:
    torch.manual_seed(0)
    return randomize(Backbone().eval())


@pytest.mark.parametrize(
    "traces",
    [
        True,
        pytest.param(
            False,
            marks=pytest.mark.xfail(reason="islands keep the old layers too", strict=True),
        ),
    ],
)
def test_names_of_fused_layers_are_those_of_their_blocks(traces: bool) -> None:
    model = randomize(Backbone(traces=traces)).eval()
    optimized = untouched(model, lambda: fxrep.optimize(model))
    layers = [n for n, m in optimized.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sorted(layers) == [
        "head", "stages.0.0.conv", "stages.0.1.conv",
        "stages.1.0.conv", "stages.1.1.conv", "stem.0",
    ]  # fmt: skip
    assert isinstance(optimized, fx.GraphModule) == traces
    assert type(optimized).__name__ == "Backbone"
    assert optimized.num_classes == 5
    assert torch.equal(optimized.state_dict()["head.weight"], model.head.weight)
    assert distance(run(optimized, (X,)), run(model, (X,))) < 1e-5
    assert not any(isinstance(m, nn.BatchNorm2d) for m in optimized.modules())
    if not traces:
        assert distance(optimized.features(X), model.features(X)) < 1e-5


def test_signature_and_keywords_survive(model: Backbone) -> None:
    optimized = fxrep.optimize(model)
    assert distance(run(optimized, (X,)), run(model, (X,))) < 1e-5
    with torch.no_grad():
        assert set(optimized(x=X)) == {"map", "scores"}


def test_untouched_parts_keep_their_state_dict_keys(model: Backbone) -> None:
    model.unused = nn.Sequential(nn.GroupNorm(1, 4), nn.Embedding(3, 4))
    keys = {k for k in model.state_dict() if k.startswith("head")}
    optimized = fxrep.optimize(model)
    assert keys and keys <= set(optimized.state_dict())
    assert not hasattr(optimized, "unused")  # nobody calls it


@pytest.mark.parametrize("inputs", [X, (X,), {"x": X}], ids=["tensor", "tuple", "dict"])
def test_example_inputs_are_compared(model: Backbone, inputs: Any) -> None:
    optimized = untouched(model, lambda: fxrep.optimize(model, inputs))
    report = fxrep.report(optimized)
    assert report.error is not None and report.error < 1e-5
    assert report.baseline_error is not None


def test_without_inputs_nothing_is_said_of_the_whole(model: Backbone) -> None:
    assert fxrep.report(fxrep.optimize(model)).error is None


@pytest.mark.parametrize("passes", [["batchnorm"], ("constants", "batchnorm"), []])
def test_passes_by_name(model: Backbone, passes: Any) -> None:
    report = fxrep.report(fxrep.optimize(model, passes=passes))
    assert {r.pass_name for r in report.rewrites} <= set(passes)
    assert bool(report.rewrites) == bool(passes)


def test_one_pass_left_out(model: Backbone) -> None:
    rest = [p for p in fxrep.default_passes if p.name != "branches"]
    optimized = fxrep.optimize(model, passes=rest)
    assert not any(r.pass_name == "branches" for r in fxrep.report(optimized).rewrites)
    assert distance(run(optimized, (X,)), run(model, (X,))) < 1e-5


def test_a_pass_of_ones_own(model: Backbone) -> None:
    seen = []
    watcher = Pass("watcher", lambda view, node, cost: seen.append(node))
    report = fxrep.report(fxrep.optimize(model, passes=[watcher]))
    assert seen and not report.rewrites


class Never:
    """A cost model of one's own."""

    name = "never"

    def objection(self, before: Work, after: Work) -> str | None:
        return "nothing is worth it"


def test_a_cost_model_of_ones_own(model: Backbone) -> None:
    report = fxrep.report(fxrep.optimize(model, cost=Never()))
    assert not any(r.pass_name != "constants" for r in report.rewrites)
    assert any("nothing is worth it" in skip.reason for skip in report.skipped)


# --- errors --------------------------------------------------------------------------------------


def _scripted() -> Any:
    return torch.jit.trace(nn.Conv2d(3, 4, 3).eval(), X)


@pytest.mark.parametrize(
    "broken, message",
    [
        pytest.param(lambda: nn.Conv2d(3, 4, 3), r"eval\(\)", id="training"),
        pytest.param(lambda: torch.relu, "Module", id="function"),
        pytest.param(lambda: nn.LazyConv2d(4, 3).eval(), "(?i)lazy", id="lazy"),
        pytest.param(lambda: nn.Conv2d(3, 4, 3, device="meta").eval(), "meta", id="meta"),
        pytest.param(_scripted, "(?i)script", id="script"),
    ],
)
def test_models_it_cannot_take(broken: Any, message: str) -> None:
    with pytest.raises(fxrep.ModelError, match=message):
        fxrep.optimize(broken())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"passes": "batchnorm"}, "sequence"),
        ({"passes": ["fusion"]}, "fusion"),
        ({"passes": [len]}, "no pass"),
        ({"cost": "free"}, "free"),
        ({"cost": Never}, "cost"),
    ],
)
def test_options_it_does_not_know(model: Backbone, options: Any, message: str) -> None:
    with pytest.raises(fxrep.OptionError, match=message):
        fxrep.optimize(model, **options)


@pytest.mark.parametrize("inputs", [torch.randn(1, 7, 4, 4), {"y": X}, 3, (X, X, X)])
def test_inputs_that_do_not_fit(model: Backbone, inputs: Any) -> None:
    with pytest.raises(fxrep.InputError):
        untouched(model, lambda: fxrep.optimize(model, inputs))


@pytest.mark.parametrize("passes", [None, 3, "branches", fxrep.default_passes[0], ["none"]])
def test_passes_that_are_none(passes):
    with pytest.raises(fxrep.OptionError, match="passes"):
        fxrep.optimize(conv_bn(4, 4, 3, padding=1).eval(), passes=passes)


def test_no_report():
    things: list[Any] = [None, nn.Identity()]
    for thing in things:
        with pytest.raises(fxrep.ReportError):
            fxrep.report(thing)


def test_every_error_is_of_one_family() -> None:
    names = [n for n in dir(fxrep) if n.endswith("Error")]
    assert len(names) >= 6
    assert all(issubclass(getattr(fxrep, n), fxrep.FxrepError) for n in names)


def test_a_report_needs_an_optimized_model(model: Backbone) -> None:
    with pytest.raises(fxrep.ReportError, match="Backbone"):
        fxrep.report(model)


def test_a_wrong_result_on_the_inputs_is_an_error(
    model: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxrep.algebra import weights

    monkeypatch.setattr(weights, "batchnorm_shift", lambda *a: torch.zeros(8).double())
    with pytest.raises(fxrep.EquivalenceError):
        fxrep.optimize(model, X, validate=False)


# --- example inputs ------------------------------------------------------------------------------

LAYERS = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()).eval().double()


@pytest.mark.parametrize("inputs", [(None,), (), {}, torch.randn(1, 3, 5, 5)])
def test_inputs_the_model_does_not_run_on(inputs):
    with pytest.raises(fxrep.InputError, match="example_inputs"):
        fxrep.optimize(conv_bn(4, 4, 3, padding=1).eval(), inputs)


@pytest.mark.parametrize("cost", ["macs", "measure"])
def test_inputs_the_model_does_not_run_on_whatever_the_cost(cost):
    with pytest.raises(fxrep.InputError, match="does not run on them"):
        fxrep.optimize(LAYERS, IMAGE[:, :3], cost=cost)


def test_integer_images_that_the_model_normalises_itself():
    class Normalises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x):
            return self.conv((x - 128) / 64)

    images = torch.randint(0, 255, (1, 4, 6, 7), dtype=torch.uint8)
    model = Normalises().eval()
    torch.testing.assert_close(fxrep.optimize(model, images)(images), model(images))


def test_example_inputs_of_a_model_that_fixes_a_dtype_or_gives_nan():
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = conv_bn(4, 4, 3, padding=1)

        def forward(self, x):
            return torch.log(self.body(x.float()))

    report = fxrep.report(fxrep.optimize(Casts().eval(), torch.randn(1, 4, 5, 5)))
    assert report.error is not None and report.error < 1e-5


class Counts(nn.Module):
    """A forward that updates a buffer, and one that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.other = conv_bn(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        y = torch.sigmoid(self.body(x)) * torch.tanh(self.other(x))
        return F.dropout(y, training=True) * self.calls


@pytest.mark.parametrize("cost", ["macs", "always", "measure"])
def test_example_inputs_leave_no_trace(cost):
    """Neither in the result, whose buffers are those of the model, nor in the generators."""
    model, before = settled(Counts()), torch.get_rng_state()
    optimized = fxrep.optimize(model, IMAGE, cost=cost)
    assert torch.equal(torch.get_rng_state(), before)
    assert optimized.calls == model.calls == 0


@pytest.mark.parametrize("cost", ["macs", "measure"])
@pytest.mark.parametrize(
    "inputs",
    [
        [IMAGE],
        MappingProxyType({"input": IMAGE}),
        IMAGE.clone().requires_grad_() * 2,
        torch.randn(1, 4, 1, 1, dtype=torch.float64).expand(2, 4, 6, 7),
    ],
)
def test_example_inputs_of_every_kind(inputs, cost):
    report = fxrep.report(fxrep.optimize(LAYERS, inputs, cost=cost))
    assert report.error is not None and report.error < 1e-10


# --- the report ----------------------------------------------------------------------------------


def test_the_report_tells_what_was_done(model: Backbone) -> None:
    report = fxrep.report(fxrep.optimize(model))
    assert len(report.rewrites) == 5
    assert [(s.pass_name, s.where) for s in report.skipped] == [("chains", "stages.0.0.conv")]
    block = next(r for r in report.rewrites if r.where == "stages.0.0.conv")
    assert block.pass_name == "branches" and block.after == ("conv2d",)
    assert block.before.count("conv2d") == 2 and block.before.count("batch_norm") == 3
    assert block.macs_after == 8 * 8 * 9 < block.macs_before
    assert block.parameters_after == 8 * 8 * 9 + 8 < block.parameters_before
    assert 0 < block.error < 1e-6
    assert "stages.0.0.conv" in str(report)


def repickled(module: nn.Module) -> nn.Module:
    result: nn.Module = pickle.loads(pickle.dumps(module))
    return result


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, repickled])
@pytest.mark.parametrize("traces", [True, False])
def test_the_report_survives(copied: Any, traces: bool) -> None:
    optimized = fxrep.optimize(Backbone(traces=traces).eval())
    assert fxrep.report(copied(optimized)).to_dict() == fxrep.report(optimized).to_dict()


def test_every_batchnorm_that_stays_has_its_reason(model: Backbone) -> None:
    model.stem[1].train()
    model.stages[0][0].identity.track_running_stats = False  # only the buffers count
    model.stages[1][1].scale[0].register_forward_hook(lambda module, args, out: out)
    model.stages[1][0].dense[1].register_forward_pre_hook(lambda module, args: args)
    optimized = fxrep.optimize(model)
    left = [n for n, m in optimized.named_modules() if isinstance(m, nn.BatchNorm2d)]
    told = {skip.where for skip in fxrep.report(optimized).skipped}
    assert left and set(left) <= told, f"{left}\n{fxrep.report(optimized)}"


def test_validation_can_be_left_out(model: Backbone) -> None:
    report = fxrep.report(fxrep.optimize(model, validate=False))
    assert len(report.rewrites) == 5


def test_hooks_on_the_model_still_run(model: Backbone) -> None:
    calls = []
    model.register_forward_hook(lambda *a: calls.append(1))
    optimized = untouched(model, lambda: fxrep.optimize(model))
    assert not calls
    run(optimized, (X,))
    assert calls == [1]


def test_the_result_trains(model: Backbone) -> None:
    optimized = fxrep.optimize(model)
    optimized(X)["scores"].sum().backward()
    assert all(p.grad is not None for p in optimized.parameters())


def test_a_model_without_anything_to_do() -> None:
    check(nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval(), ((2, 3), (3, 3)), rewrites=0)


def test_a_buffers_only_model() -> None:
    check(nn.BatchNorm2d(3, affine=False).eval(), ((2, 3, 4, 4), (1, 3, 5, 5)), batchnorms=1)


def test_a_plan_is_what_a_pass_proposes() -> None:
    assert {f for f in Plan.__dataclass_fields__} >= {"root", "region", "pieces"}
