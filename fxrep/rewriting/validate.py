"""Translation validation: the original nodes and their replacement, run side by side.

A rewrite is checked where it happens and without user input. The old nodes themselves and the new
layers run in float64 on random values, at as many consecutive small sizes as the stride has
residues: a wrong stride, padding or border shows at one of them.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fxrep.algebra.maps import Diagonal, Map, channel_map, pointwise_axes, with_channels
from fxrep.algebra.recipe import Load
from fxrep.capture.skeleton import call_arguments, does_not_run, duplicate
from fxrep.capture.state import unchanged_random_state
from fxrep.capture.surroundings import Surroundings
from fxrep.errors import EquivalenceError
from fxrep.planning.pieces import Piece
from fxrep.planning.plan import Plan
from fxrep.reading.commuting import Commuter
from fxrep.reading.view import View
from fxrep.refusal import Refusal
from fxrep.report import Report, Skip
from fxrep.rewriting.layers import Layer, Lookup
from fxrep.rewriting.replacement import replacement
from fxrep.rewriting.twins import in_float64, twin

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
    model: nn.Module,
    optimized: nn.Module,
    example_inputs: object,
    report: Report,
    surroundings: Surroundings | None = None,
) -> Report:
    """Compare the original and the optimized model with the original in float64.

    Where the original is far from float64 itself, the optimized model is compared with the original
    in its own dtype.

    Args:
        model: the original.
        optimized: the optimized model.
        example_inputs: as given to `optimize`.
        report: the report so far.
        surroundings: what copies of the models share with the original, if that is known.

    Returns:
        The report with the relative errors of both models.

    Raises:
        InputError: the original does not run on the inputs.
        EquivalenceError: the optimized model is further from float64, or from the original, than
            rounding explains.
    """
    shared = Surroundings(model) if surroundings is None else surroundings
    if shared.unrunnable is not None:
        skip = Skip("capture", "", f"not run on the example inputs: {shared.unrunnable}")
        return replace(report, skipped=(*report.skipped, skip))
    args, kwargs = call_arguments(example_inputs)
    with torch.no_grad():
        try:
            original = _outputs(duplicate(model), args, kwargs, shared)
        except Exception as error:
            raise does_not_run(model, error) from error
        try:
            wide = _outputs(_double(model), _widened(args), _widened(kwargs), shared)
        except Exception:  # the model sets or asks for a dtype: compare with its own results
            wide = original
        # A copy: a forward may count its calls, and the user's first call must be the first.
        try:
            got = _outputs(duplicate(optimized), args, kwargs, shared)
        except Exception as error:
            raise EquivalenceError(
                f"the optimized model does not run on example_inputs, as the original does "
                f"({type(error).__name__}: {error}); integer inputs that the model normalises "
                "itself must be converted before it"
            ) from error
    if len(got) != len(wide) or any(a.shape != b.shape for a, b in zip(got, wide, strict=True)):
        raise EquivalenceError("the optimized model returns other outputs than the original")
    baseline, largest = _apart(original, wide), _apart(got, wide)
    # A model may compute in another dtype than that of its result.
    computed = [t for t in (*got, *model.parameters(), *model.buffers()) if _is_inexact(t)]
    eps = max((torch.finfo(t.dtype).eps for t in computed), default=0.0)
    limit = max(1000 * eps, 16 * _lowered(got))
    if baseline > limit and not _apart(got, original) <= limit:
        # Rounding errors may grow in the model; or float64 takes another step at a floor, and is
        # no measure. Inputs that differ by a few roundings tell the two apart.
        noise = _noise(model, args, kwargs, original, shared)
        if not _apart(got, original) <= max(limit, 10 * noise):
            raise EquivalenceError(
                f"on example_inputs the optimized model differs by {_apart(got, original):.1e} "
                f"from the original, which changes by {noise:.1e} where its inputs change by a few "
                "roundings: please report it; passes= finds which one"
            )
    if not largest <= max(10 * baseline, limit):
        raise EquivalenceError(
            f"on example_inputs the optimized model has relative error {largest:.1e} against "
            f"float64, the original {baseline:.1e}: please report it; passes= finds which one"
        )
    return replace(report, error=largest, baseline_error=baseline)


# The settings by which products of float32 are computed in a shorter format, of a type of device.
_backends: Any = torch.backends
_PRECISIONS = {
    "cuda": (_backends.cudnn.conv, _backends.cudnn.rnn, _backends.cuda.matmul),
    "cpu": (_backends.mkldnn.conv, _backends.mkldnn.rnn, _backends.mkldnn.matmul),
}
_SHORTER = {"tf32": 2.0**-10, "bf16": 2.0**-7}


def _lowered(outputs: Sequence[Tensor]) -> float:
    """The epsilon of the shortest format that float32 is multiplied in; 0 if that is float32."""
    devices = {t.device.type for t in outputs if t.dtype is torch.float32}
    settings = [each for device in devices for each in _PRECISIONS.get(device, ())]
    return max((_SHORTER.get(each.fp32_precision, 0.0) for each in settings), default=0.0)


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _double(model: nn.Module) -> nn.Module:
    """A copy of a model in float64.

    Raises:
        RuntimeError: the copy has a part of the model itself, which must not be converted.
    """
    twin, own = duplicate(model), {id(module) for module in model.modules()}
    if any(id(module) in own for module in twin.modules()):
        raise RuntimeError("a part of the model is not copied")
    return twin.double()


def _apart(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of any output."""
    return max((relative_error(a, b) for a, b in zip(got, expected, strict=True)), default=0.0)


# By how many epsilons inputs are scaled, to see how far rounding errors grow in a model.
_NUDGES = (-16, -4, 4, 16)


def _noise(
    model: nn.Module, args: Any, kwargs: Any, original: Sequence[Tensor], shared: Surroundings
) -> float:
    """How far the outputs of a model move when its inputs change by a few roundings."""
    worst = 0.0
    for nudge in _NUDGES:

        def scaled(t: Tensor, nudge: int = nudge) -> Tensor:
            return t * (1 + nudge * torch.finfo(t.dtype).eps) if t.is_floating_point() else t

        nudged, named = tree_map_only(Tensor, scaled, (args, kwargs))
        with torch.no_grad():
            moved = _outputs(duplicate(model), nudged, named, shared)
        if [t.shape for t in moved] != [t.shape for t in original]:
            return math.inf
        worst = max(worst, _apart(moved, original))
    return worst


def _widened(value: Any) -> Any:
    return tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t.clone(), value
    )


def _outputs(model: nn.Module, args: Any, kwargs: Any, shared: Surroundings) -> list[Tensor]:
    args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    # Each model draws the same numbers, and finds the same state outside of itself.
    try:
        with unchanged_random_state(despite_other_threads=True):
            result = shared.run(model, *args, **kwargs)
        return [leaf.clone() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    finally:
        shared.restore()


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest magnitude expected; inf if NaN or inf differ."""
    if expected.is_complex():
        got, expected = torch.view_as_real(got + 0j), torch.view_as_real(expected)
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
    value = functools.partial(_value, view, values, exact)
    for node in plan.expanded:
        args: Any = fx.map_arg(node.args, value)
        kwargs: Any = fx.map_arg(node.kwargs, value)
        if node.op == "call_module":
            path = str(node.target)
            if path not in calls:
                calls[path] = in_float64(view, node, exact)
            values[node] = calls[path](*args, **kwargs)
        elif node.op == "call_method":
            owner, *rest = args
            # A clone, since the method may write in place.
            values[node] = getattr(owner.clone(), str(node.target))(*rest, **kwargs)
        elif node.target is operator.setitem:  # on the value itself: later nodes read the write
            operator.setitem(*args[:2], _assigned(view, node, args[2]))
        else:
            copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
            values[node] = node.target(*copies, **kwargs)  # type: ignore[operator]
    return [values[root] for root in plan.roots]


def _value(view: View, values: dict[fx.Node, Tensor], exact: Lookup, node: fx.Node) -> Any:
    """The value of an operand: of a node that ran, of a tensor of the model, or a size."""
    if node in values:
        return values[node]
    if node.op == "get_attr":
        return exact(str(node.target))
    target: Any = node.target
    sized = target in (getattr, operator.getitem)
    if not sized and not (node.op == "call_method" and view.reads_metadata(node)):
        raise ValueError(f"{node.name} is not part of the region")
    owner, *rest = fx.map_arg(node.args, functools.partial(_value, view, values, exact))
    return target(owner, *rest) if sized else getattr(owner, str(target))(*rest)


def _assigned(view: View, node: fx.Node, value: Any) -> Any:
    """The value that an assignment gives a border: a constant as in real arithmetic, as planned."""
    path = str(getattr(node.args[2], "target", None))
    return view.unrounded(Load(path)) if path in view.computed else value


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
        return twin(module, tensors).forward(*args)

    return replacement(plan, targets, values.__getitem__, make)[1]
