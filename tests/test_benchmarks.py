"""The benchmarks' own arithmetic, what they refuse, and a run of `latency.py` on a small model."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _measure
import _modes
import _paper
import _profiling
import _timing
import latency
import pytest
import torch
from _blocks import BLOCKS
from _counting import Counts, count
from _measure import Row, finished, measure
from _roofline import Rates, limit, percent
from _subject import Setting, example
from _timing import Effort, Spread, interleaved, spread
from torch import nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]

import fxrep

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EFFORT = Effort(rounds=2, seconds=0.001)
QUICK = ("--rounds", "1", "--quick")

FACTORY = """
import torch
from torch import nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.a(x) + self.b(x)).relu()

class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("it cannot")

class Writes(nn.Module):
    def forward(self, x):
        return x.relu_()

class Nothing(nn.Module):
    def forward(self, x):
        return {"shape": "no tensor"}

def own_inputs():
    return nn.Conv1d(2, 4, 3), (torch.randn(5, 2, 9),)
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "small_models.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("latency.measure_rates", lambda *_: Rates(1e9, 1e9))
    return "small_models"


# --- times --------------------------------------------------------------------------------------


def test_quartiles() -> None:
    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(2.0, 3.0, 4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no quartiles"):
        spread([])


def test_turns_go_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def samples(call: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
        order.append(call())
        return [float(len(order))]

    monkeypatch.setattr(_timing, "samples", samples)
    calls = {name: lambda name=name: name for name in "abc"}
    found = interleaved(calls, CPU, Effort(rounds=2, seconds=0.1))
    assert order == list("abccba")
    assert {name: times.median for name, times in found.items()} == dict.fromkeys("abc", 3.5)


def test_samples_on_a_cpu_are_seconds_of_one_run() -> None:
    runs = []
    seconds = _timing.samples(lambda: runs.append(1), CPU, 0.001)
    assert runs and all(0 < x < 0.1 for x in seconds)


def test_samples_on_cuda_are_those_of_do_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    def do_bench(call: Any, *, warmup: int, rep: int, return_mode: str) -> list[float]:
        call()
        assert (warmup, rep, return_mode) == (25, 300, "all")
        return [2.0, 4.0]  # milliseconds

    testing = types.ModuleType("triton.testing")
    testing.do_bench = do_bench  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.testing", testing)
    assert _timing.samples(lambda: None, CUDA, 0.3) == [0.002, 0.004]


# --- what ran -----------------------------------------------------------------------------------


def test_the_profile_agrees_with_what_is_dispatched() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten()
    ).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        seen = _profiling.profiled(lambda: model(x), CPU)
        assert seen.convs == count(lambda: model(x)).convs == 2
    assert seen.kernels == 4  # flatten is a view
    largest = 8 * 6 * 6 * 4  # bytes of what the layers inside hand on
    assert largest <= seen.working < 10 * largest


def test_kernels_on_cuda_are_neither_copies_nor_annotations() -> None:
    cuda, cpu = DeviceType.CUDA, DeviceType.CPU

    def event(name: str, device: Any, annotation: bool = False) -> Any:
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation)

    events = [
        event("void cutlass::Kernel<...>(...)", cuda),
        event("triton_poi_fused_relu_0", cuda),
        event("Memcpy DtoD (Device -> Device)", cuda),
        event("Memset (Device)", cuda),
        event("Torch-Compiled Region: 0/0", cuda, annotation=True),
        event("aten::relu", cpu),
    ]
    assert [_profiling._is_kernel(e) for e in events] == [True, True, *[False] * 4]


def test_work_counts_each_operand_and_result_once() -> None:
    layer, x = nn.Conv2d(3, 8, 3, bias=False), torch.randn(2, 3, 10, 10)
    counts = count(lambda: layer(x))
    assert counts.macs == 2 * 8 * 8 * 8 * 27
    assert counts.traffic == 4 * (2 * 3 * 100 + 8 * 27 + 2 * 8 * 64)


# --- ratios -------------------------------------------------------------------------------------


def test_the_roofline_is_the_larger_of_two_times() -> None:
    rates = Rates(macs=100.0, copied=10.0)
    assert limit(200, 10, rates) == 2.0
    assert limit(200, 50, rates) == 5.0
    assert percent(200, 50, rates, seconds=20.0) == 25.0


def row(mode: str, median: float | None, ours: bool = False, reason: str | None = None) -> Row:
    time = None if median is None else Spread(median, median, median)
    counts = Counts(convs=1, batch_norms=0, directly_after_conv=0, ops=1, macs=2000, traffic=1)
    return Row("m", 4, "4x3x8x8", mode, ours, reason, time=time, counts=counts, equal=not reason)


def test_ratios_are_over_eager_and_over_the_fastest_peer() -> None:
    rows = [
        row("eager", 0.4),
        row("peer", 0.2),
        row("fxrep", 0.1, True),
        row("x", None, False, "?"),
    ]
    _, peer, ours, failed = finished(rows, Rates(1e5, 1e5))
    assert (ours["over_eager"], ours["over_best_peer"]) == pytest.approx((4, 2))
    assert (peer["over_eager"], peer["over_best_peer"]) == pytest.approx((2, 1))
    assert ours["ms"] == pytest.approx(100) and ours["images_per_s"] == pytest.approx(40)
    assert ours["roofline_percent"] == pytest.approx(20)
    assert "ms" not in failed and failed["reason"] == "?"


def test_a_long_reason_is_cut_in_the_table_and_whole_below() -> None:
    why = "RuntimeError: it has a great deal to say, and says it"
    failed = [row("a", None, reason=why), row("b", None, reason="short")]
    rows = finished([row("eager", 0.4), *failed], Rates(1, 1))
    text = latency.table(rows)
    assert "RuntimeError: it has" in text and "short" in text and text.endswith(f"a: {why}")
    assert max(map(len, text.splitlines())) < 180
    assert json.loads(
        json.dumps(finished([replace(row("a", 1.0), error=float("nan"))], Rates(1, 1)))
    )


def test_the_summary_names_the_fastest() -> None:
    times = {"eager": 0.4, "author": 0.2, "fxrep": 0.1, "fxrep+inductor": 0.05}
    rows = [row(mode, time, ours="fxrep" in mode) for mode, time in times.items()]
    (line,) = latency.summary(finished([*rows, row("x", None, reason="?")], Rates(1, 1)))
    assert (line["fxrep / eager"], line["fxrep / author"]) == pytest.approx((0.25, 0.5))
    assert (line["fastest"], line["fastest peer"]) == ("fxrep+inductor", "author")
    assert line["fastest / peer"] == pytest.approx(0.25)
    (empty,) = latency.summary(finished([row("eager", None, reason="?")], Rates(1, 1)))
    assert empty["fastest"] is None and empty["fxrep / eager"] is None


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (row("fxrep", 0.1, ours=True), False),
        (row("fxrep+inductor", None, ours=True, reason="not equal"), True),
        (replace(row("fxrep", None, ours=True, reason="raises"), equal=None), True),
        (replace(row("fxrep+tensorrt", None, ours=True, reason="no TensorRT"), equal=None), False),
        (row("fx-fuse", None, reason="not equal"), False),
    ],
)
def test_only_fxrep_breaks_a_run(found: Row, status: bool) -> None:
    assert latency.broken(asdict(found)) is status


def test_the_papers_ratios() -> None:
    speeds = {("ResNet-18", "eager"): 90.0, ("ResNet-18", "fxrep"): 100.0}
    speeds |= {("RepVGG-B0", "eager"): 50.0, ("RepVGG-B0", "fxrep"): 80.0}
    rows = [{"network": n, "mode": m, "images_per_s": s} for (n, m), s in speeds.items()]
    _, line = _paper.compared(rows)
    assert line["merged / trained"] == pytest.approx(1.6) and line["in the paper"] == 1.71
    assert line["speed / ResNet-18"] == pytest.approx(0.8)
    assert line["in the paper "] == pytest.approx(1817 / 2442)


@pytest.mark.real
def test_the_network_timm_lacks_has_the_papers_size() -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = _paper.repvgg_b1g2()
    dense = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    merged = sum(m.weight.numel() + m.out_channels for m in dense)
    merged += sum(
        p.numel() for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()
    )
    assert merged / 1e6 == pytest.approx(41.36, abs=0.005)


# --- modes --------------------------------------------------------------------------------------


def test_modes_name_what_exists() -> None:
    names = [mode.name for mode in _modes.MODES]
    assert len(set(names)) == len(names)
    for mode in _modes.MODES:
        assert mode.conversion in _modes.CONVERSIONS and mode.execution in _modes.EXECUTIONS
        assert mode.ours == ("fxrep" in mode.name)


def test_modes_for_another_device_or_package_are_left_out() -> None:
    everywhere = {mode.name for mode in _modes.chosen(None, CPU)}
    assert {"eager", "author", "fxrep", "backend-fxrep"} <= everywhere
    assert "inductor-cudagraphs" not in everywhere
    absent = _modes.Mode("x", "none", "eager", needs=("no_such_package",))
    assert absent.missing(CPU) == "no_such_package not installed"


def test_eager_is_always_among_the_modes() -> None:
    assert [mode.name for mode in _modes.chosen(["fxrep"], CPU)] == ["eager", "fxrep"]


def test_a_mode_must_compile_something() -> None:
    model, x = nn.Conv2d(3, 4, 1), (torch.randn(1, 3, 4, 4),)
    with torch.no_grad():
        call = _modes._backend(inner="eager")(model, x)
        torch.testing.assert_close(call(), model(*x))
        with pytest.raises(RuntimeError, match="compiled nothing"):
            _modes._compiled(x, lambda: model)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_become_one_convolution(name: str) -> None:
    given = example(f"block:{name}", size=16, batch=2)
    optimized = fxrep.optimize(given.model)
    with torch.no_grad():
        assert count(lambda: optimized(*given.inputs)).convs == 1


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_engines(name: str) -> None:
    (_, mode) = _modes.chosen([name], CPU)
    for package in mode.needs:
        pytest.importorskip(package)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()).eval()
    inputs = (torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),)
    with torch.no_grad():
        (out,) = _modes.EXECUTIONS[mode.execution](model, inputs)()
        torch.testing.assert_close(out, model(*inputs))


# --- runs ---------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    status = latency.main([*arguments, *QUICK, "--device", "cpu", "--json"])
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["rows"]
    return status, rows


def test_a_run(capsys: pytest.CaptureFixture[str], factory: str, tmp_path: Path) -> None:
    output = tmp_path / "results" / "a.json"
    status, rows = run(
        capsys, "--models", f"{factory}:Branches", "--modes", "fxrep", "author", "fx-fuse",
        "--size", "16", "--batch", "1", "2", "--output", str(output),
    )  # fmt: skip
    assert status == 0
    assert [(r["batch"], r["mode"]) for r in rows] == [
        (batch, mode) for batch in (1, 2) for mode in ("eager", "fx-fuse", "author", "fxrep")
    ]
    eager, _, author, ours = rows[:4]
    assert author["reason"] == "no converter" and "ms" not in author
    assert (eager["convs"], ours["convs"], ours["kernels"]) == (2, 1, 2)
    assert ours["counts"]["macs"] == 3 * 4 * 9 * 256 < eager["counts"]["macs"]
    assert ours["parameters"] == 3 * 4 * 9 + 4
    assert ours["peak"] >= 4 * (ours["parameters"] + 4 * 256)
    assert ours["error"] < 1e-6 and ours["ms_low"] <= ours["ms"] <= ours["ms_high"]
    assert rows[4]["input"] == "2x3x16x16"
    written = json.loads(output.read_text())
    assert written["rows"] == rows and written["setting"]["torch"] == torch.__version__


def test_a_table(capsys: pytest.CaptureFixture[str], factory: str) -> None:
    arguments = ["--models", f"{factory}:Branches", "--modes", "fxrep", "--size", "8", *QUICK]
    assert latency.main([*arguments, "--device", "cpu", "--dtype", "bf16", "--channels-last"]) == 0
    text = capsys.readouterr().out
    assert f"{factory}:Branches, input 1x3x8x8, bf16, channels last, cpu" in text
    assert all(header in text for header in latency.HEADERS)
    assert "matrix rate" in text


def test_a_factory_with_inputs_has_one_batch(
    capsys: pytest.CaptureFixture[str], factory: str
) -> None:
    name = f"{factory}:own_inputs"
    _, rows = run(capsys, "--models", name, "--modes", "fxrep", "--batch", "1", "32")
    assert [(r["batch"], r["input"]) for r in rows] == [(5, "5x2x9")] * 2


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("Broken", "eager: RuntimeError: it cannot"),
        ("Writes", "eager: ValueError: it writes to its inputs"),
        ("Nothing", "eager: ValueError: its result, dict, holds no tensor"),
    ],
)
def test_a_model_that_fails_is_rows_with_the_reason(
    capsys: pytest.CaptureFixture[str], factory: str, model: str, reason: str
) -> None:
    status, rows = run(capsys, "--models", f"{factory}:{model}", "--modes", "fxrep")
    assert len(rows) == 2 and all(r["reason"].startswith(reason) for r in rows)
    assert status == 1


def test_what_is_not_equal_is_not_timed(
    capsys: pytest.CaptureFixture[str], factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module, _: object) -> nn.Module:
        converted: nn.Module = nn.Sequential(model, nn.Hardtanh(0.0, 0.01))
        return converted

    monkeypatch.setitem(_modes.CONVERSIONS, "fxrep", wrong)
    status, rows = run(capsys, "--models", f"{factory}:Branches", "--modes", "fxrep")
    assert status == 1
    assert rows[1]["equal"] is False and rows[1]["reason"].startswith("not equal: error")
    assert "ms" in rows[0] and "ms" not in rows[1]


def test_a_conversion_that_raises_is_a_row(factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(model: nn.Module, _: object) -> nn.Module:
        raise NotImplementedError("not this one")

    monkeypatch.setitem(_modes.CONVERSIONS, "fx-fuse", raises)
    modes = _modes.chosen(["fx-fuse", "fxrep"], CPU)
    reported: list[int] = []
    _, peer, ours = measure(
        f"{factory}:Branches", Setting(CPU, size=8), modes, EFFORT, lambda _, n: reported.append(n)
    )
    assert peer.reason == "fx-fuse: NotImplementedError: not this one" and peer.time is None
    assert ours.reason is None and ours.time is not None
    assert sum(reported) == _measure.steps(modes, EFFORT)


def test_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import _plot

    rows = finished([row("eager", 2.0), row("fxrep", 1.0, True), row("x", None)], Rates(1, 1))
    setting = {"device": "CPU", "torch": "2", "date": "today"}
    _plot.speedups(rows, tmp_path / "a.png", setting)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--models", "resnet50"), "timm:NAME, torchvision:NAME or package.module:factory"),
        (("--models", "block:nope"), "there are repvgg, "),
        (("--modes", "fast"), "--modes fast: there is no such mode; there are eager, "),
        (("--dtype", "tf32"), "--dtype tf32: a format of NVIDIA's cards"),
        (("--paper", "repvgg", "--modes", "eager"), "--modes: not with --paper"),
        (("--paper", "repvgg", "--batch", "1", "2"), "--paper takes one batch"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: Any, words: str) -> None:
    assert latency.main([*arguments, "--device", "cpu", "--quick"]) == 2
    assert words in capsys.readouterr().err


def test_cuda_without_a_card(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert latency.main(["--device", "cuda"]) == 2
    assert "sees no CUDA device; --device cpu runs here" in capsys.readouterr().err


def test_a_plot_without_matplotlib(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("_plot.importlib.util.find_spec", lambda _: None)
    assert latency.main(["--plot", "a.png", "--device", "cpu"]) == 2
    assert "python -m pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--batch", "--size", "--rounds", "--threads", "--dtype", "--device"]
)
def test_impossible_values(option: str) -> None:
    with pytest.raises(SystemExit):
        latency.main([option, "0"])
