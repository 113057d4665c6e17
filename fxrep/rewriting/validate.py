"""Translation validation: what was there and what replaces it, run side by side.

A rewrite is checked where it happens and without user input: the old nodes themselves and the new
layers run in float64 on random values, at as many consecutive small sizes as the stride has
residues, so that a wrong stride, padding or border has nowhere to hide.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fxrep.algebra.maps import Diagonal, Map, channel_map, lifted, points
from fxrep.capture.skeleton import call_arguments, does_not_run, skeleton
from fxrep.capture.state import unchanged_random_state
from fxrep.errors import EquivalenceError
from fxrep.ops.owner import weight_hooks
from fxrep.planning.pieces import Piece
from fxrep.planning.plan import Plan
from fxrep.reading.commuting import Commuter
from fxrep.reading.view import View
from fxrep.refusal import Refusal
from fxrep.report import Report
from fxrep.rewriting.layers import Layer, Lookup
from fxrep.rewriting.replacement import replacement

# Both sides are float64 and only the order of summation differs.
TOLERANCE = 1e-10
# The new layer in its own dtype, in epsilons of it: rounding a weight once stays far below.
ROUNDED_TOLERANCE = 1000


def check(plan: Plan, layers: Sequence[Layer], view: View, exact: Lookup) -> float | Refusal:
    """The largest relative error of the rounded layers, or why the plan is wrong.

    Args:
        plan: the rewrite, not yet carried out.
        layers: its layers.
        view: the graph it belongs to.
        exact: gives the float64 value of a tensor of the traced module by its path.
    """
    device = layers[0].exact[0].device if layers else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    worst, compared, failure = 0.0, 0, "no size"
    calls: Modules = {}
    for shapes in _shapes(plan, view):
        values = {
            source: torch.randn(shape, dtype=torch.float64, generator=generator).to(device)
            for source, shape in shapes.items()
        }
        with torch.no_grad():
            try:
                expected = _run(plan, view, dict(values), exact, calls)
            except (RuntimeError, ValueError, IndexError) as error:
                failure = str(error).splitlines()[0]
                continue  # the original refuses this size: nothing to keep
            try:
                got = _replacement(plan, layers, values, view, rounded=False)
                rounded = _replacement(plan, layers, values, view, rounded=True)
            except RuntimeError as error:
                return Refusal(f"validation failed: the replacement raises {error}")
        compared += 1
        for mine, own, wanted in zip(got, rounded, expected, strict=True):
            if mine.shape != wanted.shape:
                return Refusal(
                    f"validation failed: shape {tuple(mine.shape)} instead of {tuple(wanted.shape)}"
                )
            difference = relative_error(mine, wanted)
            if not difference <= TOLERANCE:
                return Refusal(f"validation failed: relative error {difference:.1e} in float64")
            worst = max(worst, relative_error(own, wanted))
    if not compared:
        reason = f"validation failed: the original could not be run ({failure})"
        return Refusal(plan.apart or reason)
    if not layers:
        return worst
    dtype = next(layers[0].module.parameters()).dtype
    if not worst <= ROUNDED_TOLERANCE * torch.finfo(dtype).eps:
        return Refusal(f"validation failed: relative error {worst:.1e} once rounded to {dtype}")
    return worst


def compare(
    model: nn.Module, optimized: nn.Module, example_inputs: object, report: Report
) -> Report:
    """Compare whole models on the user's inputs, each with the original in float64.

    Raises:
        InputError: the original does not run on them.
        EquivalenceError: the optimized model is further from float64 than rounding explains.
    """
    args, kwargs = call_arguments(example_inputs)
    with torch.no_grad():
        try:
            original = _outputs(copy.deepcopy(skeleton(model)), args, kwargs)
        except Exception as error:
            raise does_not_run(model, error) from error
        try:
            double = copy.deepcopy(skeleton(model)).double()
            wide = _outputs(double, _widened(args), _widened(kwargs))
        except RuntimeError:  # it fixes a dtype itself: the original in its own dtype must do
            wide = original
        # A copy: a forward may count its calls, and the result starts where the original does.
        try:
            got = _outputs(copy.deepcopy(optimized), args, kwargs)
        except Exception as error:
            raise EquivalenceError(
                f"the optimized model does not run on example_inputs, as the original does "
                f"({type(error).__name__}: {error}); integer inputs that the model normalises "
                "itself must be converted before it"
            ) from error
    if len(got) != len(wide) or any(a.shape != b.shape for a, b in zip(got, wide, strict=True)):
        raise EquivalenceError("the optimized model returns other outputs than the original")
    baseline = max((relative_error(a, b) for a, b in zip(original, wide, strict=True)), default=0.0)
    largest = max((relative_error(a, b) for a, b in zip(got, wide, strict=True)), default=0.0)
    eps = max((torch.finfo(t.dtype).eps for t in got if t.is_floating_point()), default=0.0)
    if not largest <= max(10 * baseline, 1000 * eps):
        raise EquivalenceError(
            f"on example_inputs the optimized model has relative error {largest:.1e} against "
            f"float64, the original {baseline:.1e}: please report it; passes= finds which one"
        )
    return replace(report, error=largest, baseline_error=baseline)


def _widened(value: Any) -> Any:
    return tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t.clone(), value
    )


def _outputs(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    with unchanged_random_state(despite_other_threads=True):  # each model draws the same numbers
        leaves = tree_leaves(model(*args, **kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude expected; NaN and inf must be the same."""
    got, expected = got.to(torch.float64), expected.to(torch.float64)
    finite = expected.isfinite()
    if not torch.equal(got[~finite].nan_to_num(), expected[~finite].nan_to_num()):
        return math.inf
    got, expected = got[finite], expected[finite]
    if expected.numel() == 0:
        return 0.0
    difference, scale = (got - expected).abs().max(), expected.abs().max()
    return float(difference / scale) if scale > 0 else float(difference)


def _shapes(plan: Plan, view: View) -> Iterator[dict[fx.Node, tuple[int, ...]]]:
    """Shapes of the sources, one set for each pair of sizes to run at."""
    first: dict[fx.Node, Piece] = {}
    for piece in sorted(plan.pieces, key=lambda p: isinstance(p.map, Diagonal)):
        first.setdefault(piece.source, piece)
    maps = [piece.map for piece in plan.pieces if isinstance(piece.map, Map)]
    if not maps:  # values put together again
        channels = max((p.rows or (0, _channels(p, 0)))[1] for p in plan.pieces)
        maps = [lifted(channel_map(points(-plan.axis - 1)), channels)]
    rank, outputs = len(maps[0].axes), maps[0].outputs
    if rank == 0:
        known = view.rank(plan.root)[0] or 2
        for lead in ((2,), (3,)):
            yield {s: lead * (known - 1) + (_channels(p, outputs),) for s, p in first.items()}
        return
    for sizes, residues in _sizes(maps, plan.moved):
        for each in plan.moved:
            sizes = list(each.below(tuple(sizes)))
        yield {
            source: (
                1,
                _channels(piece, outputs),
                *(_size(piece, axis, sizes[axis], residues[axis]) for axis in range(rank)),
            )
            for source, piece in first.items()
        }


def _channels(piece: Piece, outputs: int) -> int:
    if isinstance(piece.map, Map):
        return piece.map.inputs - piece.ones
    return piece.map.channels or outputs


def _size(piece: Piece, axis: int, outputs: int, residue: int) -> int:
    if not isinstance(piece.map, Map):
        return outputs
    shape = piece.map.axes[axis]
    if piece.map.transposed:
        return max(1, -(-(outputs - 1 + shape.excess) // shape.stride) + 1)
    return shape.needed(outputs) + residue % (shape.slack + 1)


def _sizes(maps: Sequence[Map], moved: Sequence[Commuter]) -> Iterator[tuple[list[int], list[int]]]:
    """Output sizes and residues per axis: the smallest, and one at which every tap is read.

    One position alone never shows the stride, so the larger has two at the least.
    """
    rank = len(maps[0].axes)
    windows = (*(each.axes for each in moved), *(m.axes for m in maps))
    strides = max(axis.stride for axes in windows for axis in axes)
    large = [2] * rank
    for m in maps:
        for i, axis in enumerate(m.axes):
            padding = max(axis.low, axis.high, 0)
            visible = max(axis.reach + 1 - padding, 1)
            if m.padding_mode != "zeros":  # reflected and circular values need an input this long
                visible = max(visible, padding + 1)
            while axis.needed(large[i]) < visible and not m.transposed:
                large[i] += 1
    for sizes in ([1] * rank, large):
        for residue in range(strides):
            different = [size + (i > 0) for i, size in enumerate(sizes)]
            yield different, [residue + i for i in range(rank)]


Modules = dict[str, Callable[..., Any]]


def _run(
    plan: Plan, view: View, values: dict[fx.Node, Tensor], exact: Lookup, calls: Modules
) -> list[Tensor]:
    """The values that the old nodes give the roots, as they stand in the graph, in float64."""

    def value(arg: fx.Node) -> Any:
        if arg in values:
            return values[arg]
        if arg.op == "get_attr":
            return exact(str(arg.target))
        target: Any = arg.target
        if target in (getattr, operator.getitem):  # a size that is read on the way
            return target(*fx.map_arg(arg.args, value))
        if arg.op == "call_method" and view.reads_metadata(arg):
            owner, *rest = fx.map_arg(arg.args, value)
            return getattr(owner, str(arg.target))(*rest)
        raise ValueError(f"{arg.name} is not part of the region")

    for node in plan.expanded:
        args: Any = fx.map_arg(node.args, value)
        kwargs: Any = fx.map_arg(node.kwargs, value)
        if node.op == "call_module":
            path = str(node.target)
            if path not in calls:
                calls[path] = _in_float64(view.submodule(path), path, exact)
            values[node] = calls[path](*args, **kwargs)
        elif node.op == "call_method":
            owner, *rest = args
            # A clone, since the method may write in place what is compared later.
            values[node] = getattr(owner.clone(), str(node.target))(*rest, **kwargs)
        elif node.target is operator.setitem:  # its very purpose
            operator.setitem(*args)
        else:
            copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
            values[node] = node.target(*copies, **kwargs)  # type: ignore[operator]
    return [values[root] for root in plan.roots]


def _in_float64(module: nn.Module, path: str, exact: Lookup) -> Callable[..., Any]:
    """A module's call with all its tensors in float64."""
    tensors = {
        name: exact(f"{path}.{name}")
        for name, _ in (*module.named_parameters(), *module.named_buffers())
    }
    if not module._modules and not weight_hooks(module):
        twin = copy.copy(module)
        for kind in ("_parameters", "_buffers"):
            own: dict[str, Tensor | None] = vars(module)[kind]
            setattr(twin, kind, {name: tensors.get(name, value) for name, value in own.items()})
        return twin.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        result = torch.func.functional_call(module, tensors, args, kwargs)
        for hook in weight_hooks(module):
            hook(module, None)  # it left the float64 weight on the module
        return result

    return call


def _replacement(
    plan: Plan, layers: Sequence[Layer], values: dict[fx.Node, Tensor], view: View, *, rounded: bool
) -> list[Tensor]:
    """The values that the new layers give the roots, with their weights exact or rounded."""
    targets = [f"new {i}" for i in range(len(layers))]
    new = dict(zip(targets, layers, strict=True))

    def make(op: str, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> Any:
        if op == "call_method":
            return getattr(args[0], target)(*args[1:], **(kwargs or {}))
        if op == "call_function":
            return target(*args, **(kwargs or {}))
        if target not in new:
            return view.submodule(target)(*args, **(kwargs or {}))
        module, (weight, bias) = new[target].module, new[target].exact
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        if rounded:
            tensors = {name: p.detach().double() for name, p in module.named_parameters()}
        return torch.func.functional_call(module, tensors, args)

    return replacement(plan, targets, values.__getitem__, make)[1]
