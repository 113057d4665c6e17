"""Translation validation: the original nodes and their replacement, run side by side.

A rewrite is checked where it happens and without user input. The old nodes themselves and the new
layers run in float64 on random values, at as many consecutive small sizes as the stride has
residues: a wrong stride, padding or border shows at one of them.
"""

from __future__ import annotations

import contextvars
import copy
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fxrep.algebra.maps import Diagonal, Map, channel_map, pointwise_axes, with_channels
from fxrep.capture.skeleton import call_arguments, does_not_run, skeleton
from fxrep.capture.snapshot import cannot_run, unchanged_state
from fxrep.capture.state import unchanged_random_state
from fxrep.errors import EquivalenceError
from fxrep.ops.owner import weight_hooks
from fxrep.planning.pieces import Piece
from fxrep.planning.plan import Plan
from fxrep.reading.commuting import Commuter
from fxrep.reading.view import View
from fxrep.refusal import Refusal
from fxrep.report import Report, Skip
from fxrep.rewriting.layers import Layer, Lookup
from fxrep.rewriting.replacement import replacement

# Both sides are float64, and only the order of summation differs.
TOLERANCE = 1e-10
# For weights in the dtype of the layer, in epsilons of it: rounding them once stays far below.
ROUNDED_TOLERANCE = 1000


def check(plan: Plan, layers: Sequence[Layer], view: View, exact: Lookup) -> float | Refusal:
    """Run a plan's region and its replacement, and compare the results.

    Args:
        plan: the rewrite, not yet carried out.
        layers: the new layers.
        view: the graph of the plan.
        exact: gives the float64 value of a tensor of the traced module by its path.

    Returns:
        The largest relative error of the layers with rounded weights, or why the plan is wrong.
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
                expected = _original_results(plan, view, dict(values), exact, calls)
            except (RuntimeError, ValueError, IndexError) as error:
                failure = str(error).splitlines()[0]
                continue  # the original raises at this size: nothing to compare
            difference = _difference(plan, layers, view, values, expected)
        if isinstance(difference, Refusal):
            return difference
        compared += 1
        worst = max(worst, difference)
    if not compared:
        reason = f"validation failed: the original could not be run ({failure})"
        return Refusal(plan.apart or reason)
    if not layers:
        return worst
    dtype = next(layers[0].module.parameters()).dtype
    if not worst <= ROUNDED_TOLERANCE * torch.finfo(dtype).eps:
        return Refusal(f"validation failed: relative error {worst:.1e} once rounded to {dtype}")
    return worst


def _difference(
    plan: Plan,
    layers: Sequence[Layer],
    view: View,
    values: dict[fx.Node, Tensor],
    expected: Sequence[Tensor],
) -> float | Refusal:
    """The relative error of the rounded layers on these values of the sources, or a refusal."""
    try:
        exact = _new_results(plan, layers, values, view, rounded=False)
        rounded = _new_results(plan, layers, values, view, rounded=True)
    except RuntimeError as error:
        return Refusal(f"validation failed: the replacement raises {error}")
    worst = 0.0
    for got, got_rounded, wanted in zip(exact, rounded, expected, strict=True):
        if got.shape != wanted.shape:
            return Refusal(
                f"validation failed: shape {tuple(got.shape)} instead of {tuple(wanted.shape)}"
            )
        difference = relative_error(got, wanted)
        if not difference <= TOLERANCE:
            return Refusal(f"validation failed: relative error {difference:.1e} in float64")
        worst = max(worst, relative_error(got_rounded, wanted))
    return worst


def compare(
    model: nn.Module, optimized: nn.Module, example_inputs: object, report: Report
) -> Report:
    """Compare the original and the optimized model with the original in float64.

    Args:
        model: the original.
        optimized: the optimized model.
        example_inputs: as given to `optimize`.
        report: the report so far.

    Returns:
        The report with the relative errors of both models.

    Raises:
        InputError: the original does not run on the inputs.
        EquivalenceError: the optimized model is further from float64 than rounding explains.
    """
    reason = cannot_run(model)
    if reason is not None:
        skip = Skip("capture", "", f"not run on the example inputs: {reason}")
        return replace(report, skipped=(*report.skipped, skip))
    args, kwargs = call_arguments(example_inputs)
    with torch.no_grad():
        try:
            original = _outputs(copy.deepcopy(skeleton(model)), args, kwargs)
        except Exception as error:
            raise does_not_run(model, error) from error
        try:
            double = copy.deepcopy(skeleton(model)).double()
            wide = _outputs(double, _widened(args), _widened(kwargs))
        except (
            RuntimeError,
            TypeError,
        ):  # the model sets a dtype itself: compare with its own results
            wide = original
        # A copy: a forward may count its calls, and the user's first call must be the first.
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
    # Each model draws the same numbers, and finds the same state outside of itself.
    with unchanged_random_state(despite_other_threads=True), unchanged_state(model):
        result = contextvars.copy_context().run(model, *args, **kwargs)
    leaves = tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest magnitude expected; inf if NaN or inf differ."""
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
    """The shapes of the sources, for each run."""
    first: dict[fx.Node, Piece] = {}
    for piece in sorted(plan.pieces, key=lambda p: isinstance(p.map, Diagonal)):
        first.setdefault(piece.source, piece)
    maps = [piece.map for piece in plan.pieces if isinstance(piece.map, Map)]
    if not maps:  # sources that are concatenated or added as they are
        channels = max((p.rows or (0, _channels(p, 0)))[1] for p in plan.pieces)
        maps = [with_channels(channel_map(pointwise_axes(-plan.axis - 1)), channels)]
    rank, outputs = len(maps[0].axes), maps[0].outputs
    if rank == 0:
        known = view.rank(plan.root)[0] or 2
        for lead in ((2,), (3,)):
            yield {s: lead * (known - 1) + (_channels(p, outputs),) for s, p in first.items()}
        return
    for sizes, residues in _sizes(maps, plan.moved):
        for each in plan.moved:
            sizes = list(each.operand_sizes(tuple(sizes)))
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
    """Output sizes and residues per axis: small sizes, and sizes at which every tap reads inputs.

    A residue is the number of positions that the last window leaves unread. One output position
    does not show the stride, so the larger sizes are at least two.
    """
    rank = len(maps[0].axes)
    windows = (*(each.axes for each in moved), *(m.axes for m in maps))
    strides = max(axis.stride for axes in windows for axis in axes)
    large = [2] * rank
    for m in maps:
        for i, axis in enumerate(m.axes):
            padding = max(axis.low, axis.high, 0)
            visible = max(axis.reach + 1 - padding, 1)
            if m.padding_mode != "zeros":  # reflect and circular padding take no shorter input
                visible = max(visible, padding + 1)
            while axis.needed(large[i]) < visible and not m.transposed:
                large[i] += 1
    for sizes in ([1] * rank, large):
        for residue in range(strides):
            different = [size + (i > 0) for i, size in enumerate(sizes)]
            yield different, [residue + i for i in range(rank)]


Modules = dict[str, Callable[..., Any]]


def _original_results(
    plan: Plan, view: View, values: dict[fx.Node, Tensor], exact: Lookup, calls: Modules
) -> list[Tensor]:
    """The values of the roots in float64, computed by the nodes of the graph.

    Args:
        plan: the rewrite.
        view: the graph.
        values: the values of the sources; gets those of the nodes.
        exact: gives tensors of the model in float64.
        calls: the modules called so far, in float64, by path.
    """

    def value(arg: fx.Node) -> Any:
        if arg in values:
            return values[arg]
        if arg.op == "get_attr":
            return exact(str(arg.target))
        target: Any = arg.target
        if target in (getattr, operator.getitem):  # a read of a size
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
            # A clone, since the method may write in place.
            values[node] = getattr(owner.clone(), str(node.target))(*rest, **kwargs)
        elif node.target is operator.setitem:  # on the value itself: later nodes read the write
            operator.setitem(*args)
        else:
            copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
            values[node] = node.target(*copies, **kwargs)  # type: ignore[operator]
    return [values[root] for root in plan.roots]


def _in_float64(module: nn.Module, path: str, exact: Lookup) -> Callable[..., Any]:
    """The call of a module with all its tensors in float64."""
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
            hook(module, None)  # sets the weight that it replaced by one in float64
        return result

    return call


def _new_results(
    plan: Plan, layers: Sequence[Layer], values: dict[fx.Node, Tensor], view: View, *, rounded: bool
) -> list[Tensor]:
    """The values of the roots, computed by the replacement, with exact or rounded weights."""
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
