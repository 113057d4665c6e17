"""The one check every test of a rewrite goes through.

`check` optimizes a model and holds the result to everything `fxrep.optimize` promises: equal
outputs at several input sizes, the user's model untouched, a valid graph, nothing left for a
second run, and never more work at run time. It uses nothing of the library's own validation.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fxrep

FLOAT64, FLOAT32 = 1e-10, 1e-5

Model = TypeVar("Model", bound=nn.Module)
# One input shape, or a tuple of them for a model with several inputs.
Shape = tuple[int, ...] | tuple[tuple[int, ...], ...]


def check(
    model: nn.Module,
    shapes: Sequence[Shape],
    *,
    layers: int | None = None,
    batchnorms: int | None = 0,
    operations: int | None = None,
    rewrites: int | None = None,
    reasons: Sequence[str] = (),
    example_inputs: bool = False,
    more_work: bool = False,
    again: bool = True,
    **options: Any,
) -> nn.Module:
    """Optimize `model` and assert all that is promised; returns the optimized float32 model.

    Args:
        model: in eval mode; its BatchNorm statistics are randomised.
        shapes: input shapes to compare at, two or more.
        layers: convolution and linear layers run afterwards.
        batchnorms: BatchNorms run afterwards; None for any number.
        operations: operations of torch run afterwards.
        rewrites: rewrites reported.
        reasons: each must be part of the reason of a skip.
        example_inputs: pass inputs of the first shape to `optimize`.
        more_work: the cost model allows more layers and multiply-accumulates (cost="always").
        again: a second run must find nothing.
        options: for `fxrep.optimize`.
    """
    assert len(shapes) > 1, "one size proves nothing: a broadcast or a stride hides in it"
    randomize(model)
    wide = doubled(model)
    given: dict[torch.dtype, Any] = {torch.float32: None, torch.float64: None}
    if example_inputs:
        given = {dtype: inputs_of(shapes[0], dtype) for dtype in given}

    exact = untouched(wide, lambda: fxrep.optimize(wide, given[torch.float64], **options))
    single = untouched(model, lambda: fxrep.optimize(model, given[torch.float32], **options))
    compared = 0
    for shape in shapes:
        inputs = inputs_of(shape, torch.float64)
        try:
            expected = outcome(wide, inputs)
        except RuntimeError:
            continue  # the original refuses this size
        compared += 1
        error = distance(outcome(exact, inputs), expected)
        assert error <= FLOAT64, f"float64 differs by {error:.1e} at {shape}"
        narrow = to_float32(inputs)
        error, own = (distance(outcome(m, narrow), expected) for m in (single, model))
        assert error <= max(FLOAT32, 4 * own), f"float32 differs by {error:.1e} at {shape}"
        before, after = count(wide, inputs), count(exact, inputs)
        if not more_work:
            assert after.layers <= before.layers, f"{before.layers} -> {after.layers} layers"
            assert after.macs <= before.macs, f"{before.macs} -> {after.macs} MACs at {shape}"
            assert after.total <= before.total, f"{before.kinds} -> {after.kinds} at {shape}"
        for what, wanted in (
            ("layers", layers), ("batchnorms", batchnorms), ("total", operations)
        ):  # fmt: skip
            got = getattr(after, what)
            assert wanted in (None, got), f"{what}: {got} run, {wanted} wanted: {after.kinds}"
    assert compared > 1, "the original itself ran at fewer than two of the sizes"

    lint(exact)
    report = fxrep.report(exact)
    if rewrites is not None:
        assert len(report.rewrites) == rewrites, str(report)
    for reason in reasons:
        assert any(reason in skip.reason for skip in report.skipped), f"{reason!r}:\n{report}"
    if again:
        second = fxrep.report(fxrep.optimize(exact, given[torch.float64], **options))
        # A model that keeps its class keeps its layers, from which the second run starts again.
        known = () if isinstance(exact, torch.fx.GraphModule) else report.rewrites
        assert len(second.rewrites) == len(known), f"a second run rewrote again:\n{second}"
    return single


def assert_equal(model: nn.Module, x: Tensor, **options: Any) -> fxrep.Report:
    """Optimize `settled(model)`, assert equal outputs for a float64 `x`, and return the report."""
    model = settled(model)
    optimized = fxrep.optimize(model, **options)
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-10, atol=1e-10)
    return fxrep.report(optimized)


# --- models and inputs --------------------------------------------------------------------------


def randomize(model: Model) -> Model:
    """Statistics and affine parameters of every BatchNorm, variances in 0.5-1.5."""
    generator = torch.Generator().manual_seed(0)
    ranges = {
        "running_var": (0.5, 1.5),
        "running_mean": (-1, 1),
        "weight": (0.5, 1.5),
        "bias": (-1, 1),
    }
    for module in model.modules():
        if getattr(module, "running_var", None) is None:
            continue
        for name, (low, high) in ranges.items():
            value = getattr(module, name, None)
            if value is not None:
                value.data.uniform_(low, high, generator=generator)
    return model


def settled(model: Model) -> Model:
    """The model itself in float64 and eval mode, its BatchNorms randomised."""
    return randomize(model).double().eval()


def doubled(model: Model) -> Model:
    """A float64 copy, tensors held as plain attributes included."""
    result = copy.deepcopy(model).double()
    for module in result.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(module)[name] = value.double()
    return result


def inputs_of(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random inputs of one shape, or of each of several."""
    generator = torch.Generator().manual_seed(sum(tree_leaves(shape)))
    each = shape if isinstance(shape[0], tuple) else (shape,)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in each)


def to_float32(inputs: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, inputs)


def run(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The outputs for a copy of the inputs: a model may write into them."""
    with torch.no_grad():
        return model(*tree_map_only(Tensor, Tensor.clone, inputs))


def outcome(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The outputs, and what the model made of its inputs: writing into them is an effect too."""
    inputs = tree_map_only(Tensor, Tensor.clone, inputs)
    with torch.no_grad():
        return model(*inputs), inputs


def distance(got: Any, expected: Any) -> float:
    """The largest error of any output, relative to the largest magnitude expected there."""
    pairs = list(zip(tree_leaves(got), tree_leaves(expected), strict=True))
    assert pairs, "no output"
    worst = 0.0
    for a, b in pairs:
        if not isinstance(b, Tensor):
            assert a == b, f"{a} instead of {b}"
            continue
        assert a.shape == b.shape, f"shape {tuple(a.shape)} instead of {tuple(b.shape)}"
        if b.numel():
            a, b = a.double(), b.double()
            scale = float(b.abs().max())
            apart = torch.where(a == b, 0.0, (a - b).abs())  # equal infinities are equal
            error = float(apart.max()) / (scale or 1.0)
            worst = max(worst, error if error == error else float("inf"))
    return worst


# --- what runs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ops:
    """What one forward really ran."""

    kinds: Mapping[str, int]
    macs: int

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    @property
    def layers(self) -> int:
        return sum(self.kinds.get(kind, 0) for kind in LAYERS)

    @property
    def convs(self) -> int:
        return self.kinds.get("convolution", 0)

    @property
    def batchnorms(self) -> int:
        return sum(n for kind, n in self.kinds.items() if "batch_norm" in kind)


LAYERS = ("convolution", "addmm", "mm", "bmm", "linear")
ARITHMETIC = ("add", "sub", "rsub", "mul", "div", "neg", "native_batch_norm")


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter()
        self.macs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kind = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        self.kinds[kind] += 1
        if kind == "convolution":
            transposed = args[6]
            positions = args[0] if transposed else result
            self.macs += positions.numel() * args[1][0].numel()
        elif kind in ("addmm", "mm", "bmm"):
            self.macs += result.numel() * args[kind == "addmm"].shape[-1]
        elif kind.rstrip("_") in ARITHMETIC:
            self.macs += tree_leaves(result)[0].numel()
        return result


def count(model: nn.Module, inputs: tuple[Any, ...]) -> Ops:
    """The operations of one forward and their multiply-accumulates (one per element otherwise)."""
    with _Counting() as counting:
        run(model, inputs)
    kinds = counting.kinds
    kinds.subtract(clone=len([x for x in tree_leaves(inputs) if isinstance(x, Tensor)]))
    return Ops({kind: n for kind, n in kinds.items() if n}, counting.macs)


def lint(model: nn.Module) -> None:
    """Every graph in the model is well formed and names modules and tensors that exist."""
    for module in model.modules():
        graph = module.graph if isinstance(module, fx.GraphModule) else None
        graph = graph or getattr(vars(module).get("forward"), "graph", None)
        if not isinstance(graph, fx.Graph):
            continue
        graph.lint()
        for node in graph.nodes:
            if node.op == "call_module":
                module.get_submodule(str(node.target))
            elif node.op == "get_attr":
                owner, _, name = str(node.target).rpartition(".")
                getattr(module.get_submodule(owner), name)


# --- the user's model stays as it is ------------------------------------------------------------


def untouched(model: nn.Module, action: Callable[[], nn.Module]) -> nn.Module:
    """Run `action` and assert that it changed nothing of `model` and shares no tensor with it."""
    before = snapshot(model)
    result = action()
    after = snapshot(model)
    assert before.keys() == after.keys(), f"appeared or vanished: {before.keys() ^ after.keys()}"
    for key, value in before.items():
        assert same(value, after[key]), f"{key} changed: {value} -> {after[key]}"
    own = {t.untyped_storage().data_ptr() for t in tensors(model) if t.numel()}
    shared = [t for t in tensors(result) if t.numel() and t.untyped_storage().data_ptr() in own]
    assert not shared, f"shares tensors of shapes {[tuple(t.shape) for t in shared]}"
    return result


def tensors(model: nn.Module) -> list[Tensor]:
    held = (v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor))
    return [*model.parameters(), *model.buffers(), *held]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a user could find changed, by a name for the message."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"{path}: identity"] = (id(module), type(module))
        for name, value in vars(module).items():
            key = f"{path}.{name}"
            if name in ("_parameters", "_buffers"):
                for each, tensor in value.items():
                    found[f"{path}.{each}"] = _facts(tensor)
            elif name == "_modules":
                found[key] = {each: id(child) for each, child in value.items()}
            elif isinstance(value, Tensor):
                found[key] = _facts(value)
            elif isinstance(value, dict):
                found[key] = {k: id(v) for k, v in value.items()}
            elif isinstance(value, bool | int | float | str | tuple | list | set | None):
                found[key] = copy.deepcopy(value)
            else:
                found[key] = id(value)
    return found


def _facts(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    bits = tensor.detach().clone()
    return (
        id(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr(),
        tensor._version, tensor.requires_grad, tensor.grad is None, bits,
    )  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Equal, tensors bit by bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple | list) and type(a) is type(b):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
