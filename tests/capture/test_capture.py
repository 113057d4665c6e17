"""Capturing: a graph does what the forward does, or the forward stays as it is."""

from __future__ import annotations

import collections
import copy
import operator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from fxrep.capture.assemble import assemble
from fxrep.capture.islands import Capture, capture
from fxrep.errors import InputError, ModelError, SpecializationError
from fxrep.ops.owner import foreign_hooks, weight_hooks


def block(channels: int = 4) -> nn.Sequential:
    """A conv with its BatchNorm, statistics away from the identity."""
    norm: Any = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), norm)


def image() -> torch.Tensor:
    return torch.linspace(-1, 1, 4 * 36).reshape(1, 4, 6, 6)


def equal(a: Any, b: Any) -> bool:
    """Same types all the way down, same bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if hasattr(a, "__dataclass_fields__"):
        return all(equal(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    return bool(a == b)


def round_trip(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Capture, nn.Module]:
    """Capture, assemble without a rewrite, and compare two calls bit for bit."""
    model.eval()
    before = snapshot(model)
    captured = capture(model)
    result = assemble(captured)
    assert snapshot(model) == before, "capturing changed the user's model"
    with torch.no_grad():
        try:
            reference = copy.deepcopy(model)
        except RuntimeError:  # old-style weight_norm cannot be copied
            reference = model
        for _ in range(2):  # twice: state kept between calls shows in the second
            mine = copy.deepcopy((args, kwargs))
            theirs = copy.deepcopy((args, kwargs))
            assert equal(result(*mine[0], **mine[1]), reference(*theirs[0], **theirs[1]))
            assert equal(mine, theirs), "inputs are written in the same way"
    return captured, result


def snapshot(model: nn.Module) -> Any:
    """Everything that must not change in the user's model."""
    return [
        (
            name,
            id(module),
            type(module),
            module.training,
            sorted(module.__dict__),
            [
                (n, id(p), p._version, p.requires_grad)
                for n, p in (*module._parameters.items(), *module._buffers.items())
                if p is not None
            ],
            [(n, repr(v)) for n, v in module.__dict__.items() if not isinstance(v, dict)],
            [list(v.values()) for n, v in module.__dict__.items() if "hooks" in n],
        )
        for name, module in model.named_modules()
    ]


def opaque_root(captured: Capture) -> bool:
    return not any(program.is_root for program in captured.programs)


def reasons(captured: Capture) -> str:
    return "\n".join(f"{skip.where}: {skip.reason}" for skip in captured.skipped)


class Net(nn.Module):
    """A block and a forward given as a function."""

    def __init__(self, run: Any, **children: nn.Module) -> None:
        super().__init__()
        self.body = block()
        self.count = 0
        for name, child in children.items():
            setattr(self, name, child)
        self.run = run

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


# --- in-place operations and views ----------------------------------------------------------


def _alias(self: Net, x: torch.Tensor) -> torch.Tensor:
    a = self.body(x)
    b = a
    b += x
    b -= 1
    b *= 2
    b /= 3
    return a


def _statement(self: Net, x: torch.Tensor) -> torch.Tensor:
    y = self.body(x)
    F.relu_(y)
    y.add_(1)
    nn.functional.relu(y, inplace=True)
    return y


def _items(self: Net, x: torch.Tensor) -> torch.Tensor:
    y = self.body(x)
    y[:, 0] = 0.0
    y[:, 1] += 1
    y[..., 2:] *= 2
    return y


def _sizes(self: Net, x: torch.Tensor) -> torch.Tensor:
    height = width = x.shape[2]
    height += 2
    height *= 2
    return F.interpolate(self.body(x), size=(height, width))


def _own_tensor(self: Net, x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(1)
    total += self.body(x).sum()
    rows = torch.zeros(2, 6)
    rows[0] = x[0, 0, 0]
    return total + rows


def _chunks(self: Net, x: torch.Tensor) -> torch.Tensor:
    parts = [part * (index + 1) for index, part in enumerate(self.body(x).chunk(2, dim=1))]
    for part, other in zip(torch.split(x, [1, 3], dim=1), (1, 2), strict=True):
        parts.append(part * other)
    assert len(x.chunk(4, dim=1)) == 4
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(
    "run", [_alias, _statement, _items, _sizes, _own_tensor, _chunks], ids=lambda f: f.__name__
)
def test_traces_in_place(run: Any) -> None:
    captured, _ = round_trip(Net(run), image())
    assert not opaque_root(captured), reasons(captured)


def test_in_place_operators_are_recorded() -> None:
    program = capture(Net(_alias).eval()).programs[0]
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [operator.iadd, operator.isub, operator.imul, operator.itruediv]
    assert all("nn_module_stack" in node.meta for node in program.graph.nodes)


# --- forwards that a trace would not reproduce ----------------------------------------------


def _counter(self: Net, x: torch.Tensor) -> torch.Tensor:
    self.count += 1
    return self.body(x) * self.count


def _autocast(self: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.body(x)


def _no_grad(self: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return self.body(x)


def _branch(self: Net, x: torch.Tensor) -> torch.Tensor:
    return self.body(x) if x.shape[2] > 3 else x


def _swallowed(self: Net, x: torch.Tensor) -> torch.Tensor:
    try:
        return self.body(x) if x.sum() > 3 else self.body(x) * 2
    except Exception:
        return x


def _listed(self: Net, x: torch.Tensor) -> torch.Tensor:
    self.__dict__.setdefault("kept", []).append(x)
    return self.body(x)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (_counter, "sets the attribute 'count'"),
        (_autocast, "torch.autocast"),
        (_no_grad, "torch.no_grad"),
        (_branch, "decides on a traced value"),
        (_swallowed, "expects an exception"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_keeps_the_forward(run: Any, reason: str) -> None:
    captured, result = round_trip(Net(run), image())
    assert opaque_root(captured)
    assert reason in reasons(captured)
    assert [program.path for program in captured.programs] == ["body"]
    assert type(result) is Net


def test_random_numbers_are_drawn_anew() -> None:
    model = Net(lambda self, x: self.body(x) + torch.rand(3, 1, 1, 1))
    state = torch.get_rng_state()
    captured = capture(model.eval())
    assert torch.equal(state, torch.get_rng_state())
    assert "random numbers" in reasons(captured)
    result = assemble(captured)
    assert not torch.equal(result(image()), result(image()))


def test_own_state_is_kept_per_call() -> None:
    model = Net(_counter).eval()
    result = assemble(capture(model))
    first, second = result(image()), result(image())
    assert torch.allclose(second, 2 * first)
    assert model.count == 0 and result.count == 2


class Cached(nn.Module):
    """A cache of what depends on parameters only, as timm's LeViT keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.body = block()
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.cache: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "scale" not in self.cache:
            self.cache["scale"] = self.scale.exp()
        return self.body(x) * self.cache["scale"]


class Remembering(Cached):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        self.cache["features"] = y
        return y


class Appending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = block()
        self.kept: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        self.kept.append(y)
        return y


def test_caches_hold_no_proxies() -> None:
    captured, result = round_trip(nn.Sequential(Cached(), block()), image())
    assert not opaque_root(captured)
    assert captured.tree[0].cache == {} and result.get_submodule("0").cache == {}


@pytest.mark.parametrize("kind", [Remembering, Appending])
def test_state_in_containers_is_kept(kind: Any) -> None:
    captured, result = round_trip(nn.Sequential(kind(), block()), image())
    assert [program.path for program in captured.programs] == ["", "0.body"]
    kept = result.get_submodule("0")
    assert isinstance((getattr(kept, "kept", None) or [kept.cache["features"]])[0], torch.Tensor)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = block()
        self.steps = torch.zeros(1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps.add_(1)
        self.seen.add_(1)
        return self.body(x) * self.steps + self.seen


def test_tensor_attributes_written_for_real() -> None:
    captured, result = round_trip(Counting(), image())
    assert "tensor attribute 'steps'" in reasons(captured)
    assert result.steps.item() == 2


# --- islands --------------------------------------------------------------------------------


class Attention(nn.Module):
    """Opaque where it is called with sizes it decides on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = block()
        self.resolution = 7

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.inner(x)
        if x.shape[-1] > 3:
            y = y * 2
        return y if mask is None else y * mask


def test_innermost_module_is_opaque() -> None:
    model = nn.Sequential(block(), Attention(), block())
    captured, result = round_trip(model, image())
    assert [program.path for program in captured.programs] == ["", "1.inner"]
    assert [skip.where for skip in captured.skipped] == ["1"]
    assert isinstance(result, torch.fx.GraphModule)
    assert type(result.get_submodule("1")) is Attention


class Masked(nn.Module):
    """Opaque at its root; its child is called with and without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.child = MaskedChild()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.child(x)
        if x.shape[0] == 1:
            y = self.child(y, mask=torch.full((1,), 0.5)) + self.child(y, scale=3.0)
        return y + self.child.resolution


class MaskedChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = block()
        self.resolution = 7

    def forward(self, x: Any, mask: Any = None, *, scale: float = 1.0) -> Any:
        y = self.inner(x) * scale
        return y if mask is None else y * mask


def test_islands_fall_back_for_other_arguments() -> None:
    captured, result = round_trip(Masked(), image())
    (program,) = captured.programs
    assert (program.path, dict(program.arguments.specialized)) == ("child", {"mask": None})
    assert type(result.child) is MaskedChild and result.child.resolution == 7


class Reading(nn.Module):
    """Its own code reads a weight below it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 1:
            return x
        return self.body(x) * self.helper()

    def helper(self) -> torch.Tensor:
        return self.body[0].weight.sum()


class ReadingOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = block()
        self.weight = nn.Parameter(torch.rand(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.shape[0] > 1 else self.body(x) * self.weight


def test_weights_read_by_python_code_stay() -> None:
    for kind in (Reading, ReadingOwn):
        captured, _ = round_trip(kind(), image())
        assert [program.path for program in captured.programs] == ["body"]


class Writing(nn.Module):
    """Replaces its own weights when called, as timm's SPAN does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.body = block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.conv.weight.data = self.conv.weight.data * 0.5
        return self.conv(self.body(x))


def test_forward_that_writes_parameters_is_left_alone() -> None:
    captured, _ = round_trip(nn.Sequential(block(), Writing()), image())
    assert [program.path for program in captured.programs] == [""]
    assert "left alone: forward assigns .data of parameter" in reasons(captured)


class Items(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(block(), block())
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 1:
            return x
        for layer in self.layers:
            x = layer(x)
        return x


class Whole(Items):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.shape[0] > 1 else self.layers(x)


class Both(Items):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.shape[0] > 1 else self.layers(x) + self.layers[0](x)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Whole, ["layers"]),
        (Items, ["layers.0", "layers.1"]),
        (Both, ["layers", "layers.0", "layers.1"]),
    ],
)
def test_sequential_as_a_whole_or_by_items(kind: Any, expected: Any) -> None:
    captured, _ = round_trip(kind("x"), image())
    assert [program.path for program in captured.programs] == expected


class TakesList(nn.Module):
    def forward(self, x: torch.Tensor, found: list[torch.Tensor]) -> torch.Tensor:
        found.append(x if x.shape[0] > 1 else x + 1)
        return x


def test_lists_handed_to_opaque_modules() -> None:
    def run(self: Net, x: torch.Tensor) -> torch.Tensor:
        found: list[torch.Tensor] = []
        y = self.take(self.body(x), found)
        return y + found[0]

    captured, _ = round_trip(Net(run, take=TakesList()), image())
    assert opaque_root(captured)


# --- hooks ----------------------------------------------------------------------------------


def test_hooks_run_at_every_call() -> None:
    model = nn.Sequential(block(), block(), block())
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("root"))
    model[1].register_forward_hook(lambda m, args, out: out + 1)
    model[2][0].register_forward_pre_hook(lambda *_: calls.append("conv"))
    captured, result = round_trip(model, image())
    calls.clear()
    result(image())
    assert calls == ["conv", "root"]
    assert [program.path for program in captured.programs] == ["", "1"]
    assert foreign_hooks(captured.tree[2][0]) and not weight_hooks(captured.tree[2][0])


def test_weights_computed_by_torch() -> None:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(5)))
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])
    nn.utils.spectral_norm(model[1])
    parametrizations.weight_norm(model[2])
    prune.random_unstructured(model[3], "weight", 0.5)
    model.eval()
    model(image())  # the old hooks leave a weight with a history
    captured, _ = round_trip(model, image())
    assert not opaque_root(captured)
    assert [len(weight_hooks(child)) for child in captured.tree.children()] == [1, 1, 0, 1, 0]
    assert not any(foreign_hooks(child) for child in captured.tree.children())


# --- arguments and outputs ------------------------------------------------------------------


class Arguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = block()

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        gain: float = 2.0,
        *,
        flag: bool = False,
        kind: Any = collections.OrderedDict,
    ) -> Any:
        y = self.body(x) * gain
        if mask is not None:
            y = y * mask
        return kind(y=-y if flag else y)


def test_baked_arguments_are_guarded() -> None:
    import inspect

    model = Arguments()
    captured, result = round_trip(model, image())
    assert not opaque_root(captured)
    assert inspect.signature(result.forward) == inspect.signature(model.forward)
    assert equal(result(image(), gain=3.0), model(image(), gain=3.0))
    assert equal(result(image(), None, flag=False), model(image()))
    with pytest.raises(SpecializationError, match="'flag' is True"):
        result(image(), flag=True)
    with pytest.raises(SpecializationError, match="example_inputs"):
        result(image(), torch.ones(1))
    with pytest.raises(TypeError):
        result(image(), None, 2.0, False)


def test_example_inputs_choose_the_arguments() -> None:
    model = Arguments().eval()
    mask = torch.full((1,), 0.5)
    result = assemble(capture(model, {"x": image(), "mask": mask, "flag": True}))
    assert equal(result(image(), mask, flag=True), model(image(), mask, flag=True))
    with pytest.raises(SpecializationError, match="'flag' is False"):
        result(image(), mask)
    with pytest.raises(SpecializationError, match="'mask' is missing"):
        result(image(), flag=True)
    with pytest.raises(InputError, match="do not fit"):
        capture(model, (image(), mask, 1.0, 2, 3))
    with pytest.raises(InputError, match="must be a tensor"):
        capture(model, 3)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = block()

    def forward(self, x: dict[str, Any]) -> Any:
        return {"out": [self.body(x["image"]), (x["more"][1],)], 3: None}


def test_nested_inputs_and_outputs() -> None:
    captured, _ = round_trip(Nested(), {"image": image(), "more": [1, torch.ones(2)]})
    assert not opaque_root(captured)


Pair = collections.namedtuple("Pair", "first second")


@dataclass
class Output:
    logits: torch.Tensor
    extra: Any = None


@pytest.mark.parametrize(
    "make",
    [
        lambda y: Pair(y, [y + 1]),
        lambda y: Output(y, {"a": y}),
        lambda y: collections.OrderedDict(out=y, aux=None),
        lambda y: [y, (y, {"k": y})],
    ],
    ids=["namedtuple", "dataclass", "OrderedDict", "nested"],
)
def test_output_types(make: Any) -> None:
    captured, _ = round_trip(Net(lambda self, x: make(self.body(x))), image())
    assert not opaque_root(captured)


def test_type_checks_see_a_tensor() -> None:
    def run(self: Net, x: Any) -> torch.Tensor:
        if isinstance(x, list | tuple):
            x = x[0]
        y = self.body(x)
        return y if isinstance(y, torch.Tensor) and torch.is_tensor(x) else y[0]

    captured, result = round_trip(Net(run), image())
    assert not opaque_root(captured)
    with pytest.raises(SpecializationError, match="is a list"):
        result([image()])


# --- sharing --------------------------------------------------------------------------------


def test_tied_and_shared_stay_so() -> None:
    shared = nn.Sequential(block(), block(), nn.LSTM(6, 3, batch_first=True))
    shared[1][0].weight = shared[0][0].weight
    shared.append(shared[0])
    model = Net(lambda self, x: self.a[3](self.a[1](self.a[0](x))), a=shared)
    model.a[0][0].weight.data = model.a[0][0].weight.data.contiguous(
        memory_format=torch.channels_last
    )
    model.a[0][0].bias.requires_grad_(False)
    captured, result = round_trip(model, image())
    assert not opaque_root(captured)
    weight = result.get_parameter("a.0.0.weight")
    assert weight is result.get_parameter("a.1.0.weight")
    assert result.get_submodule("a.3") is result.get_submodule("a.0")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not result.get_parameter("a.0.0.bias").requires_grad
    lstm = result.get_submodule("a.2")
    assert lstm._flat_weights[0] is lstm.weight_ih_l0
    mine = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in result.state_dict().values()}
    assert list(model.state_dict()) == list(result.state_dict())


# --- refusals -------------------------------------------------------------------------------


def test_refusals() -> None:
    refused: list[tuple[Any, str]] = [
        (3, "must be a torch.nn.Module, not int"),
        (block(), r"training mode.*model\.eval\(\)"),
        (nn.LazyConv2d(3, 1).eval(), "weight is not initialised"),
        (nn.Conv2d(1, 1, 1, device="meta").eval(), "weight is on device meta"),
        (torch.jit.script(nn.Conv2d(1, 1, 1).eval()), "TorchScript"),
    ]
    for model, message in refused:
        with pytest.raises(ModelError, match=message):
            capture(model)
    with torch._subclasses.FakeTensorMode():
        fake = nn.Conv2d(1, 1, 1).eval()
    with pytest.raises(ModelError, match="a fake tensor"):
        capture(fake)
    model = block().eval()
    model.lock = (item for item in "")  # type: ignore[assignment]
    with pytest.raises(ModelError, match="attribute 'lock'"):
        capture(model)


def test_wrappers_come_off() -> None:
    model = block().eval()
    assert capture(nn.DataParallel(model)).model is model
    assert capture(torch.compile(model)).model is model  # type: ignore[arg-type]


def test_traced_values_in_torch_constructors() -> None:
    def run(self: Net, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + torch.zeros((x.shape[2], x.shape[3]))  # once crashed the interpreter

    captured, _ = round_trip(Net(run), image())
    assert not opaque_root(captured)
    assert "isinstance" not in globals()


# --- real models ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "whole"),
    [
        ("mobileone_s0", 64, True),
        ("levit_128s", 224, True),  # caches attention biases
        ("efficientvit_m0", 224, True),  # six opaque window attentions
        ("edgenext_xx_small", 64, True),
        ("crossvit_tiny_240", 240, False),
    ],
)
def test_timm(name: str, size: int, whole: bool) -> None:
    timm = pytest.importorskip("timm")
    captured, _ = round_trip(timm.create_model(name), torch.rand(1, 3, size, size))
    assert opaque_root(captured) is not whole


def test_torchvision() -> None:
    models = pytest.importorskip("torchvision").models
    model = models.get_model("deeplabv3_mobilenet_v3_large", weights_backbone=None)
    captured, _ = round_trip(model, torch.rand(1, 3, 64, 64))  # returns an OrderedDict
    assert not opaque_root(captured)
