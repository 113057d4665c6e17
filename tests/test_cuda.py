"""On a CUDA device: equal in every precision and layout, and everything stays where it lives."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
from collections.abc import Callable, Iterator
from typing import Any

import latency
import pytest
import torch
from torch import Tensor, nn

import fxrep
from fxrep.cli.demo import RepVGG, randomize_batchnorm
from fxrep.torch_compile.backend import compile_graph
from support import blocks, blocks_linear
from support.check import distance, tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DEVICE = "cuda"

# Name of a precision: dtype, whether TF32 is on, the error that is allowed (or three times eager's
# own: an order of operations is no better than another).
PRECISIONS = {
    "fp32": (torch.float32, False, 1e-5),
    "tf32": (torch.float32, True, 5e-3),
    "fp16": (torch.float16, False, 5e-3),
    "bf16": (torch.bfloat16, False, 4e-2),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "repvgg": lambda: RepVGG((16, 32), (2, 3), classes=10),
    "acnet": lambda: nn.Sequential(nn.Conv2d(3, 16, 1), blocks.ACNet(16, 16)),
    "dbb": lambda: nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), blocks_linear.DBB(16, 16)),
    "repmixer": lambda: nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), blocks.RepMixer(16)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 16, 2, stride=2), nn.BatchNorm2d(16)),
}


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def made(name: str, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> nn.Module:
    model = MODELS[name]().eval()
    randomize_batchnorm(model)
    layout = torch.channels_last if channels_last else torch.preserve_format
    return model.to(DEVICE, dtype).to(memory_format=layout)


def images(dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.randn(2, 3, 32, 32).to(DEVICE, dtype).contiguous(memory_format=layout)


def exact(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = copy.deepcopy(model).double()(x.double())
        return result


def held() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def size(model: nn.Module) -> int:
    """Bytes that a model takes from the allocator, which hands out multiples of 512."""
    return sum(-(-x.untyped_storage().nbytes() // 512) * 512 for x in tensors(model))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_equal(name: str, precision: str, channels_last: bool) -> None:
    dtype, on, allowed = PRECISIONS[precision]
    model, x = made(name, dtype, channels_last), images(dtype, channels_last)
    reference = exact(model, x)
    with tf32(on), torch.no_grad():
        optimized = fxrep.optimize(model, x)
        eager, out = model(x), optimized(x)
    assert fxrep.report(optimized).rewrites
    assert out.dtype is dtype and out.device == x.device and out.stride() == eager.stride()
    error, rounding = distance(out.double(), reference), distance(eager.double(), reference)
    assert error <= max(allowed, 3 * rounding)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_weights_keep_device_dtype_and_layout(channels_last: bool) -> None:
    model = made("repvgg", torch.bfloat16, channels_last)
    optimized = fxrep.optimize(model)
    for weight in tensors(optimized):
        assert weight.device.type == DEVICE and weight.dtype is torch.bfloat16
        if weight.dim() == 4 and channels_last:
            assert weight.is_contiguous(memory_format=torch.channels_last)


def test_double_precision_is_exact() -> None:
    model, x = made("repvgg", torch.float64), images(torch.float64)
    optimized = fxrep.optimize(model, x)
    with torch.no_grad():
        assert distance(optimized(x), model(x)) < 1e-10


class Spread(nn.Module):
    """One half on each of two devices."""

    def __init__(self, first: torch.device, second: torch.device) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), blocks.RepVGG(8, 8)).to(first)
        self.second = nn.Sequential(blocks.ACNet(8, 8), nn.BatchNorm2d(8)).to(second)
        self.devices = (first, second)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x.to(self.devices[0])).to(self.devices[1]))


def _pairs() -> list[tuple[str, str]]:
    pairs = [("cuda:0", "cpu"), ("cpu", "cuda:0")]
    return [*pairs, ("cuda:0", "cuda:1")] if torch.cuda.device_count() > 1 else pairs


@pytest.mark.parametrize(("first", "second"), _pairs())
def test_models_spread_over_devices(first: str, second: str) -> None:
    model = Spread(torch.device(first), torch.device(second)).eval()
    randomize_batchnorm(model)
    x = torch.randn(2, 3, 16, 16)
    with tf32(False), torch.no_grad():
        optimized = fxrep.optimize(model)
        out = optimized(x)
        assert distance(out.cpu(), copy.deepcopy(model).double()(x.double()).cpu()) < 1e-5
    assert out.device == torch.device(second)
    removed = fxrep.report(optimized).to_dict()["totals"]["removed"]
    assert removed["batch_norm"] == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    for path, module in optimized.named_modules():
        if isinstance(module, nn.Conv2d):
            where = first if "first" in path else second
            assert module.weight.device == torch.device(where), path


def test_weights_of_two_devices_are_not_merged() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near = nn.Conv2d(3, 4, 3, padding=1).to(DEVICE)
            self.far = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Any:
            return self.near(x.to(DEVICE)) + self.far(x.cpu()).to(DEVICE)

    model = Sum().eval()
    x = torch.randn(1, 3, 8, 8)
    with tf32(False), torch.no_grad():
        assert distance(fxrep.optimize(model)(x), model(x)) < 1e-5


@pytest.mark.parametrize("examples", [False, True], ids=["alone", "with inputs"])
def test_no_second_copy_stays(examples: bool) -> None:
    fxrep.optimize(made("repvgg"), images())  # libraries take their workspaces
    model = RepVGG().eval().to(DEVICE)
    x = torch.randn(1, 3, 64, 64, device=DEVICE)
    before = held()
    optimized = fxrep.optimize(model, x if examples else None)
    added = held() - before
    # All of it is the result's own, up to what the allocator cannot split.
    assert added <= 1.1 * size(optimized) + 2**20
    assert all(weight.device.type == DEVICE for weight in tensors(optimized))
    del optimized
    assert held() <= before + 2**20


def test_the_original_stays_where_it_is() -> None:
    model = made("repvgg")
    places = {name: (x.data_ptr(), x.device) for name, x in model.state_dict().items()}
    fxrep.optimize(model)
    assert places == {name: (x.data_ptr(), x.device) for name, x in model.state_dict().items()}


@pytest.mark.parametrize(
    "options",
    [{"inner": "eager"}, {}, {"freezing": True}, {"mode": "reduce-overhead"}],
    ids=["eager", "inductor", "freezing", "cudagraphs"],
)
def test_the_backend_follows_new_weights(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model, x = made("repvgg"), images()
    compiled = torch.compile(model, backend=compile_graph, options=options)
    with tf32(False), torch.no_grad():
        for _ in range(3):  # CUDA graphs warm up, record, replay
            assert distance(compiled(x).double(), exact(model, x)) < 1e-5
        other = made("repvgg")
        for weight in other.parameters():
            weight.mul_(0.9)
        model.load_state_dict(other.state_dict())
        for _ in range(3):
            assert distance(compiled(x).double(), exact(other, x)) < 1e-5


@pytest.mark.parametrize("dtype", ["fp32", "tf32", "fp16", "bf16"])
def test_the_benchmark(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    if dtype == "tf32" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no TF32 on this card")
    status = latency.main(
        ["--device", "cuda", "--dtype", dtype, "--quick", "--channels-last", "--json", "--modes",
         "fxrep", "fx-fuse", "--batch", "1", "32"]
    )  # fmt: skip
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert status == 0
    for row in rows:
        assert row["reason"] in (None, "no converter")
        if row["reason"] is None:
            assert row["kernels"] > 0 and row["peak"] > 0 and row["roofline_percent"] > 0
            assert row["ms_low"] <= row["ms"] <= row["ms_high"]
    ours = [row for row in rows if row["mode"] == "fxrep"]
    assert [row["convs"] for row in ours] == [1, 1]
    assert ours[1]["peak"] > ours[0]["peak"]
