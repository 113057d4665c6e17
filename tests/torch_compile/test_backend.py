"""torch.compile(model, backend="fxrep")."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxrep
from fxrep.registry import graphs
from fxrep.torch_compile.backend import compile_graph
from fxrep.torch_compile.compiled import MOST_SETS
from support.check import FLOAT64, count, distance, randomize
from support.compiling import Block, OwnNorm, Recorder, block, folded, image, same, through
from support.compiling import fresh as fresh
from support.updates import copy_, recalibrate

# --- what it finds --------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "size", "convs"),
    [
        ("repvgg_a0", 32, 22),
        ("mobileone_s0", 32, 43),
        ("fastvit_t8", 128, 52),
        ("resnet50", 32, 53),
    ],
)
def test_real_models_run_as_few_operations_as_optimized_ones(
    name: str, size: int, convs: int
) -> None:
    timm = pytest.importorskip("timm")
    model = randomize(timm.create_model(name).eval()).double()
    before = copy.deepcopy(model.state_dict())
    inner, x = Recorder(), image(1, 3, size, size)
    compiled = through(model, inner)
    same(compiled, model, x)
    assert (inner.convs, inner.batchnorms) == (convs, 0)
    optimized = count(fxrep.optimize(model), (x,)).kinds
    assert count(inner.graphs[0], inner.inputs[0]).kinds == optimized
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert sum(r.pass_name == "branches" for r in fxrep.report(compiled).rewrites) >= (
        0 if name == "resnet50" else 14
    )


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(("name", "convs"), [("repvgg_a0", 44), ("mobileone_s0", 191)])
def test_inductor_keeps_all_branches(name: str, convs: int) -> None:
    """What Inductor's own freezing leaves; oneDNN's names are kept out of the graph."""
    model, seen = pytest.importorskip("timm").create_model(name).eval(), Counter[str]()

    def count_calls(graph: torch.fx.Graph) -> None:
        seen.update(str(node.target) for node in graph.nodes)

    with (
        torch.no_grad(),
        torch._inductor.config.patch(
            {
                "freezing": True,
                "cpp.weight_prepack": False,
                "post_grad_custom_post_pass": count_calls,
            }
        ),
    ):
        torch.compile(model)(image(1, 3, 32, 32, dtype=torch.float32))
    assert sum(n for target, n in seen.items() if "convolution" in target) == convs
    assert seen["aten.convolution.default"] == convs
    assert not any("batch_norm" in target for target in seen)


def test_a_block_becomes_one_convolution() -> None:
    model, inner = block(), Recorder()
    same(through(model, inner), model, image())
    assert inner.kinds() == {"conv2d": 1, "relu": 1}


@pytest.mark.parametrize(
    ("pad", "channels"),
    [(nn.ZeroPad2d(1), 4), (nn.ReflectionPad2d(1), 4), (nn.ConstantPad2d(1, 0.0), 4)],
)
def test_paddings_in_dynamos_spelling(pad: nn.Module, channels: int) -> None:
    model = nn.Sequential(pad, nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4)).eval().double()
    inner = Recorder()
    same(through(randomize(model), inner), model, image())
    assert (inner.convs, inner.batchnorms) == (1, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.AvgPool2d(2)),
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
                              nn.BatchNorm2d(6)),
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"),
                              nn.BatchNorm2d(8)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5)),
        lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.MaxPool2d(2), nn.BatchNorm2d(8)),
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3)),
                              nn.BatchNorm2d(8)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("freezing", [False, True])
def test_layers_of_every_kind(make: Callable[[], nn.Module], freezing: bool) -> None:
    model, inner = randomize(make().eval()).double(), Recorder()
    compiled = through(model, inner, freezing=freezing)
    same(compiled, model, image())
    assert inner.batchnorms == 0
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.5)
    same(compiled, model, image())


# --- weights that change --------------------------------------------------------------------------


@pytest.mark.parametrize("freezing", [False, True])
@pytest.mark.parametrize("spelling", ["names", "views", "hand"])
def test_statistics_recalibrated_by_ones_own_batchnorm(spelling: str, freezing: bool) -> None:
    model, x, inner = randomize(OwnNorm(spelling).eval()).double(), image(), Recorder()
    compiled = through(model, inner, freezing=freezing)
    same(compiled, model, x)
    before = model(x)
    recalibrate(model)
    assert distance(model(x), before) > 1e-2
    same(compiled, model, x)


def test_statistics_that_are_not_finite_are_compared_too() -> None:
    model, inner = block(), Recorder()
    model.bn.running_mean[0] = torch.nan
    compiled = through(model, inner, freezing=True)
    with torch.no_grad():
        for _ in range(3):
            assert compiled(image()).isnan().any()
        assert len(inner.graphs) == 1
        model.bn.running_mean[0] = 0
    same(compiled, model, image())


def test_content_that_decided_is_compared() -> None:
    """A BatchNorm moves over max pooling while its scales are positive."""
    layers = nn.Conv2d(4, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.ReLU()
    model = randomize(nn.Sequential(*layers, nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4)).eval())
    model, inner = model.double(), Recorder()
    compiled = through(model, inner)
    same(compiled, model, image(2, 4, 8, 8))
    assert inner.batchnorms == 0
    with torch.no_grad():
        model[2].weight[0] = -1
    same(compiled, model, image(2, 4, 8, 8))
    assert inner.batchnorms == 1 and len(inner.graphs) == 2  # that of the second layer is folded
    with torch.no_grad():
        model[2].weight[0] = 0.5
    same(compiled, model, image(2, 4, 8, 8))


def test_weights_that_overflow_are_not_folded() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1)).eval()
    compiled = through(model.half())
    x = torch.ones(1, 1, 2, 2, dtype=torch.float16) * 1e-4
    same(compiled, model, x, tolerance=1e-2)
    with torch.no_grad():
        model[0].weight.fill_(6e4)
        model[1].weight.fill_(100)
    same(compiled, model, x, tolerance=1e-2)


# --- one graph for several modules ----------------------------------------------------------------


class Loop(nn.Module):
    """Blocks in a loop; a graph break in each makes dynamo compile one graph for all."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(count))
        for i, each in enumerate(self.blocks):
            nn.init.normal_(each.wide.weight, std=0.1 * (i + 1))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        for each in self.blocks:
            torch._dynamo.graph_break()
            x = each(x)
        return x


@pytest.mark.parametrize("freezing", [False, True])
def test_equal_blocks_share_a_graph_but_not_weights(freezing: bool) -> None:
    model, x = Loop().double(), image()
    compiled = through(model, freezing=freezing)
    same(compiled, model, x)
    copy_(model.blocks[1])
    same(compiled, model, x)


@pytest.mark.parametrize("freezing", [False, True])
def test_regional_compilation(freezing: bool) -> None:
    model, x, inner = Loop(), image(), Recorder()
    original = copy.deepcopy(model)

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        return compile_graph(gm, inputs, options={"inner": inner, "freezing": freezing})

    for each in model.blocks:
        each.compile(backend=backend)
    same(model, original, x)
    same(model, original, x)
    assert len(folded()) == 1
    assert len(inner.graphs) == (len(model.blocks) if freezing else 1)


def test_few_sets_of_weights_are_kept_and_none_alive() -> None:
    inner, x = Recorder(), image()

    @torch.compile(backend=lambda gm, inputs: compile_graph(gm, inputs, options={"inner": inner}))
    def run(layer: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = layer(x)
        return result

    with torch.no_grad():
        models = [block() for _ in range(3)]
        for model in models * 2:
            assert distance(run(model, x), model(x)) <= FLOAT64
        assert [len(graph.cache) for graph in folded()] == [3]
        del models, model
        assert [len(graph.cache) for graph in folded()] == [0]
    assert len(inner.graphs) == 1 < MOST_SETS


# --- shapes, dtypes, modes ------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("freezing", [False, True])
def test_sizes_change(dynamic: bool | None, inner: str, freezing: bool) -> None:
    model = block()
    compiled = through(model, inner, freezing=freezing, compile={"dynamic": dynamic})
    for shape in ((2, 4, 6, 6), (3, 4, 7, 9), (1, 4, 5, 5), (8, 4, 6, 6)):
        same(compiled, model, image(*shape))
    assert folded()
    copy_(model)
    for shape in ((2, 4, 6, 6), (3, 4, 7, 9)):
        same(compiled, model, image(*shape))


def test_operators_that_only_dynamos_dispatcher_takes_sizes_for() -> None:
    class Scaled(Block):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addcmul(self.scale, super().forward(x), self.scale)

    model = randomize(Scaled().eval()).double()
    compiled = through(model, compile={"dynamic": True})
    for shape in ((2, 4, 6, 6), (3, 4, 7, 9)):
        same(compiled, model, image(*shape))
    assert folded()


@pytest.mark.parametrize("dynamic", [None, True])
def test_an_attribute_that_is_a_number_changes(dynamic: bool | None) -> None:
    model = block()
    compiled = through(model, compile={"dynamic": dynamic})
    same(compiled, model, image())
    model.wide_bn.eps = 0.5
    same(compiled, model, image())
    assert len(folded()) == 2


@pytest.mark.parametrize("freezing", [False, True])
def test_inductor_with_dynamic_shapes(freezing: bool) -> None:
    model = block(torch.float32)
    compiled = through(model, "inductor", freezing=freezing, compile={"dynamic": True})
    for turn in range(2):
        for shape in ((2, 4, 6, 6), (3, 4, 7, 9)):
            same(compiled, model, image(*shape, dtype=torch.float32), tolerance=1e-5)
        if not turn:
            copy_(model)
    assert folded()


def test_channels_last() -> None:
    model = block(torch.float32).to(memory_format=torch.channels_last)
    x = image(dtype=torch.float32).to(memory_format=torch.channels_last)
    inner = Recorder()
    compiled = through(model, inner)
    same(compiled, model, x, tolerance=1e-5)
    copy_(model)
    same(compiled, model, x, tolerance=1e-5)
    assert compiled(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_the_original(dtype: torch.dtype) -> None:
    wide = block()
    model = copy.deepcopy(wide).to(dtype)
    x = image()
    with torch.no_grad():
        expected = wide(x)
        got, own = through(model)(x.to(dtype)), model(x.to(dtype))
    assert got.dtype == dtype
    assert distance(got, expected) <= max(2 * distance(own, expected), 1e-2)


def test_autocast() -> None:
    model, x, inner = block(torch.float32), image(dtype=torch.float32), Recorder()
    layer = nn.Sequential(model.wide, model.wide_bn).eval()
    compiled = through(layer, inner)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got, expected = compiled(x), layer(x)
    assert got.dtype == expected.dtype
    assert distance(got, expected) <= 2e-2
    same(compiled, layer, x, tolerance=1e-5)
    assert inner.batchnorms == 0


def test_inference_mode_then_gradients_of_inputs() -> None:
    model, x, inner = block().requires_grad_(False), image(), Recorder()
    compiled = through(model, inner)
    with torch.inference_mode():
        assert distance(compiled(x), model(x)) <= FLOAT64
    copy_(model)
    with torch.inference_mode():
        assert distance(compiled(x), model(x)) <= FLOAT64
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(a).sum().backward()
    model(b).sum().backward()
    assert a.grad is not None and distance(a.grad, b.grad) <= FLOAT64
    assert inner.batchnorms == 0


def test_models_made_in_inference_mode_stay() -> None:
    with torch.inference_mode():
        model, x, inner = block(), image(), Recorder()
        compiled = through(model, inner)
        assert distance(compiled(x), model(x)) <= FLOAT64
        model.wide.weight.mul_(2)
        assert distance(compiled(x), model(x)) <= FLOAT64
    assert inner.batchnorms == 3


def test_training_passes_through_and_evaluation_folds() -> None:
    model, x = block().train(), image()
    twin, inner = copy.deepcopy(model), Recorder()
    compiled = through(model, inner)
    for _ in range(2):
        for net, each in ((compiled, model), (twin, twin)):
            net(x).square().sum().backward()
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter.sub_(0.01 * parameter.grad)
                    parameter.grad = None
    assert inner.batchnorms == 3 and not folded()
    pairs = zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
    assert all(distance(a, b) <= FLOAT64 for a, b in pairs)
    model.eval()
    twin.eval()
    same(compiled, twin, x)
    assert len(folded()) == 1


def test_batchnorm_that_trains_without_gradients() -> None:
    model, x = block(), image()
    model.wide_bn.train()
    twin, inner = copy.deepcopy(model), Recorder()
    compiled = through(model, inner)
    for _ in range(3):
        same(compiled, twin, x)
    assert distance(model.wide_bn.running_mean, twin.wide_bn.running_mean) <= FLOAT64


# --- what is left alone ---------------------------------------------------------------------------


class Writes(nn.Module):
    """Writes its weight in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.other = Block()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        self.conv.weight.mul_(0.5)
        return self.other(y)


@pytest.mark.parametrize("freezing", [False, True])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_weights_that_the_graph_writes(inner: str, freezing: bool) -> None:
    model = randomize(Writes().eval()).double()
    twin, x = copy.deepcopy(model), image()
    compiled = through(model, inner, freezing=freezing)
    for _ in range(3):
        same(compiled, twin, x)
    assert distance(model.conv.weight, twin.conv.weight) == 0


@pytest.mark.parametrize("freezing", [False, True])
def test_a_buffer_that_counts_calls_is_no_reason_to_fold_again(freezing: bool) -> None:
    class Counts(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return super().forward(x)

    model, inner = randomize(Counts().eval()).double(), Recorder()
    compiled = through(model, inner, freezing=freezing)
    with torch.no_grad():
        compiled(image())
        (kept,) = folded()[0].cache.values()
        compiled(image())
    assert list(folded()[0].cache.values()) == [kept] and len(inner.graphs) == 1
    assert model.calls == 2
    copy_(model)
    same(compiled, model, image())


def test_an_input_that_is_a_weight_is_written() -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return self.bn(self.linear(x))

    model = randomize(Doubles().eval()).double()
    twin = copy.deepcopy(model)
    compiled = through(model)
    with torch.no_grad():
        for get in (lambda m: m.linear.weight.view(4, 4), lambda m: torch.ones(3, 4).double()) * 2:
            assert distance(compiled(get(model)), twin(get(twin))) <= FLOAT64
    assert folded()


@pytest.mark.parametrize(
    "write",
    [
        lambda x: F.relu(x, True),
        lambda x: F.hardtanh(x, 0.0, 0.5, True),
        nn.ReLU6(inplace=True),
        nn.LeakyReLU(0.5, inplace=True),
        nn.Hardswish(inplace=True),
    ],
)
def test_in_place_by_position_is_in_place(write: Callable[[Tensor], Tensor]) -> None:
    class InPlace(Block):
        def forward(self, x: Tensor) -> Tensor:
            write(x)
            y = self.wide(x)
            write(y[:, 1:3])
            return self.wide_bn(y)

    model, x = randomize(InPlace().eval()).double(), image()
    compiled = through(model)
    with torch.no_grad():
        assert distance(compiled(x.clone()), model(x.clone())) <= FLOAT64


@pytest.mark.parametrize("freezing", [False, True])
def test_a_number_that_inductor_wants_fixed(freezing: bool) -> None:
    class Scaled(Block):
        scale = 1.5

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    model, x = randomize(Scaled().eval()), image(dtype=torch.float32)
    compiled = through(model, "inductor", freezing=freezing, compile={"dynamic": True})
    for _ in range(3):
        same(compiled, model, x, tolerance=1e-5)
        model.scale += 0.5
    assert folded() and len(graphs) == len(folded())


class Returns(nn.Module):
    """Gives its caller what is made from weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        scale = self.scale * 2
        return self.conv(x) * scale[:, None, None], scale.view(2, 2), self.conv.bias


@pytest.mark.parametrize("freezing", [False, True])
def test_who_writes_a_result_does_not_write_folded_weights(freezing: bool) -> None:
    model, x = Returns().eval().double(), image()
    compiled = through(model, freezing=freezing)
    for _ in range(3):
        with torch.no_grad():
            y, scale, bias = compiled(x)
            scale.add_(1)
            y.add_(1)
            assert bias.data_ptr() == model.conv.bias.data_ptr()
        same(compiled, model, x)


def test_subclasses_stay() -> None:
    class Own(nn.Parameter):
        pass

    model, inner = block(), Recorder()
    model.wide.weight = Own(model.wide.weight.data)
    same(through(model, inner), model, image())


def test_a_failing_pass_leaves_the_graph_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("broken")

    monkeypatch.setattr("fxrep.torch_compile.compiled.fold", broken)
    model, inner = block(), Recorder()
    with caplog.at_level(logging.INFO, "fxrep"):
        compiled = through(model, inner)
        same(compiled, model, image())
    assert inner.batchnorms == 3 and "ZeroDivisionError" in caplog.text
    (skip,) = fxrep.report(compiled).skipped
    assert "ZeroDivisionError: broken" in skip.reason


def test_a_pass_that_fails_later_runs_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = block(), image()
    compiled = through(model)
    same(compiled, model, x)

    def broken(*_: object) -> None:
        raise ZeroDivisionError("broken")

    monkeypatch.setattr("fxrep.torch_compile.folding.Folding.compute", broken)
    for _ in range(2):
        copy_(model)
        same(compiled, model, x)


def test_an_inner_compiler_that_refuses_folded_graphs() -> None:
    def picky(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        if not any("batch_norm" in str(node.target) for node in gm.graph.nodes):
            raise NotImplementedError
        return gm.forward

    model = block()
    same(through(model, picky), model, image())


def test_the_report_of_a_compiled_module() -> None:
    model = block()
    compiled = through(model)
    with pytest.raises(fxrep.ReportError):
        fxrep.report(compiled)
    same(compiled, model, image())
    report = fxrep.report(compiled)
    assert [rewrite.pass_name for rewrite in report.rewrites] == ["branches"]
    assert report == fxrep.report(model)


def test_the_report_of_a_compiled_function() -> None:
    model, inner = block(), Recorder()
    for compiled in (through(lambda x: model(x), inner), through(model.forward, inner)):
        same(compiled, model, image())
        assert {rewrite.pass_name for rewrite in fxrep.report(compiled).rewrites} == {"branches"}
    compiled = through(lambda layer, x: layer(x), inner)
    with torch.no_grad():
        compiled(model, image())
    with pytest.raises(fxrep.ReportError, match="or a module that has run in torch"):
        fxrep.report(compiled)


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": True}, "no 'freeze'; there are inner, freezing, passes, cost"),
        ({"freezing": 1}, "must be True or False"),
        ({"inner": "nonsense"}, "'nonsense' is none of"),
        ({"inner": "fxrep"}, "would call itself"),
        ({"cost": "money"}, "money"),
        ({"passes": ["nonsense"]}, "nonsense"),
        ({"inner": "eager", "mode": "max-autotune"}, "is for Inductor"),
        ({"mode": "nonsense"}, "nonsense"),
    ],
)
def test_options_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    gm = torch.fx.symbolic_trace(nn.Conv2d(1, 1, 1))
    with pytest.raises(fxrep.OptionError, match=message):
        compile_graph(gm, [], options=options)


def test_options_are_heeded() -> None:
    model, inner = block(), Recorder()
    same(through(model, inner, passes=["batchnorm"], cost="always", validate=False), model, image())
    assert inner.convs == 2


def test_mode_goes_to_inductor() -> None:
    model = block(torch.float32)
    compiled = through(model, "inductor", compile={"mode": "max-autotune-no-cudagraphs"})
    same(compiled, model, image(dtype=torch.float32), tolerance=1e-5)
    assert folded()


def test_transposed_convolution_with_equal_channels_frozen() -> None:
    """Inductor's own folding transposes nothing when Cin == Cout."""
    model = randomize(nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)).eval())
    x = image(dtype=torch.float32)
    same(through(model, "inductor", freezing=True), model, x, tolerance=1e-5)
    torch._dynamo.reset()
    left = through(model, "inductor", freezing=True, passes=["dead"])  # not folded here
    same(left, model, x, tolerance=1e-5)


_BY_NAME = """
import sys, torch
assert "fxrep" in torch._dynamo.list_backends() and "fxrep" not in sys.modules
model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1)).eval()
compiled = torch.compile(model, backend="fxrep", options={"inner": "eager"})
with torch.no_grad():
    compiled(torch.ones(1, 1, 2, 2))
import fxrep
print(len(fxrep.report(compiled).rewrites))
"""


def test_torch_finds_it_by_name(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    (name, target), *others = project["entry-points"]["torch_dynamo_backends"].items()
    assert name == "fxrep" and not others
    metadata = tmp_path / "named-1.dist-info"  # as pip writes it
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: named\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[torch_dynamo_backends]\n{name} = {target}\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    command = [sys.executable, "-c", _BY_NAME]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "1", done.stderr


def test_importing_fxrep_does_not_import_dynamo() -> None:
    code = "import sys, fxrep; print('torch._dynamo' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_graph_without_a_rewrite_keeps_its_reasons() -> None:
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()
    model = nn.Sequential(*layers).eval()
    compiled = torch.compile(model, backend="fxrep", options={"inner": "eager"})
    with torch.no_grad():
        compiled(torch.randn(2, 3, 8, 8))
    reasons = [skip.reason for skip in fxrep.report(model).skipped]
    assert "nothing to fold" in reasons
    assert any("no convolution or linear layer next to it" in reason for reason in reasons)
