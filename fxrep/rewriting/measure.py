"""Timing of rewrites on the device and at the shapes of the model: ``cost="measure"``.

MACs and memory traffic do not decide whether some rewrites are faster: a larger kernel in place of
several, pooling as a convolution, one layer for several siblings, a border corrected by one more
channel. Both sides of such a rewrite run, on the model's device, in its dtype, at its shapes and
strides.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.benchmark import Timer

from fxrep.algebra.maps import Diagonal, Map, symmetric
from fxrep.analysis.values import Values
from fxrep.capture.shadows import opaque
from fxrep.planning.cost import MacsCost
from fxrep.planning.plan import Plan
from fxrep.reading.view import View
from fxrep.refusal import Refusal
from fxrep.rewriting.layers import random_layers
from fxrep.rewriting.replacement import pads, replacement

# The two sides run in turns, so that drift of the clock rate affects both alike. Rounds are short:
# other processes interrupt for milliseconds, and the rounds between interruptions give the time.
LEAST_ROUNDS, ROUND_SECONDS, SECONDS = 9, 0.001, 0.15

# Timing ends after CLEAR_ROUNDS if one side takes CLEAR times as long as the other in each.
CLEAR_ROUNDS, CLEAR = 5, 1.2

# A rewrite must be faster by this fraction: timings of one program vary as much.
LEAST_GAIN = 0.03


@dataclass(frozen=True)
class Timing:
    """The seconds that a region and its replacement take."""

    before: float
    after: float

    def __str__(self) -> str:
        return f"{1e3 * self.before:.3g} ms -> {1e3 * self.after:.3g} ms"


# The timings so far, by torch's settings and the descriptions of both sides.
_timings: dict[object, Timing] = {}


def judge(plans: Sequence[Plan], view: View, values: Values) -> Timing | Refusal | None:
    """Time a rewrite whose profit is in doubt.

    Args:
        plans: equal rewrites that are carried out together, for they share their layers.
        view: the graph, not yet changed.
        values: the values of the graph on example inputs.

    Returns:
        The times if the rewrite is faster, a refusal if it is not, None if it needs no timing.
    """
    if not _in_doubt(plans[0], view):
        return None
    before, after = 0.0, 0.0
    for plan in plans:
        try:
            timing = _timed(_excerpt_before(plan, view, values), _excerpt_after(plan, view, values))
        except _NotRunnable as reason:
            if MacsCost().objection(plan.saved, plan.spent) is None:
                return None
            return Refusal(f"it could not be timed: {reason}")
        before, after = before + timing.before, after + timing.after
    timing = Timing(before, after)
    if after > before * (1 - LEAST_GAIN):
        return Refusal(f"not faster: {timing}")
    return timing


class _NotRunnable(Exception):
    """A part of the graph cannot run on its own: a shape it needs is not known."""


# --- rewrites in doubt ---------------------------------------------------------------------------


def _in_doubt(plan: Plan, view: View) -> bool:
    """Whether a plan does more than drop operations and keep layers of the same geometry."""
    if MacsCost().objection(plan.saved, plan.spent) is not None or plan.outputs:
        return True
    readings = [r for n in plan.region if (r := view.affine(n)) is not None and r.is_layer]
    known = [_kernel_key(r.terms[0].map) for r in readings]
    for piece in plan.pieces:
        if isinstance(piece.map, Map) and (pads(piece) or _kernel_key(piece.map) not in known):
            return True
    return False


def _kernel_key(shape: Map | Diagonal) -> object:
    """A key of the kernel that a backend runs for a layer, image sizes aside."""
    if isinstance(shape, Diagonal):
        return None
    shape = symmetric(shape)
    taps = tuple((a.kernel, a.stride, a.dilation) for a in shape.axes)
    groups = shape.band.groups if shape.channelwise is not None else None
    return taps, groups, shape.inputs, shape.outputs, shape.transposed


# --- parts of a graph that run on their own -------------------------------------------------------


@dataclass(eq=False)
class _Excerpt:
    """A copy of a part of a graph that runs on its own.

    Attributes:
        view: the whole graph.
        values: the values of the whole graph on example inputs.
        graph: the graph of the excerpt.
        copies: nodes and constants of the excerpt, by the nodes of the whole graph.
        attributes: the modules and tensors of the excerpt, by name.
        inputs: fake tensors like the inputs of the excerpt.
        description: the calls of the excerpt, without the content of weights. Excerpts of equal
            descriptions take equally long.
    """

    view: View
    values: Values
    graph: fx.Graph = field(default_factory=fx.Graph)
    copies: dict[fx.Node, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)
    description: list[str] = field(default_factory=list)

    def value(self, node: fx.Node) -> Any:
        """The value of the excerpt for a value of the whole graph; a new input if it has none."""
        if node in self.copies:
            return self.copies[node]
        if node.op == "get_attr":
            copy: Any = self.attribute(self.view.tensor(str(node.target)), "get_attr")
        else:
            copy = self._input(self.values.of(node))
        self.copies[node] = copy
        return copy

    def _input(self, known: Any) -> Any:
        if isinstance(known, bool | int | float | torch.Size | torch.dtype | torch.device):
            return known
        if not isinstance(known, Tensor):
            raise _NotRunnable("the shape of a value is not known from example_inputs")
        if not known.is_floating_point():
            raise _NotRunnable(f"it reads a value of {known.dtype}")
        self.inputs.append(known)
        self.description.append(f"input {_layout(known)}")
        return self.graph.placeholder(f"x{len(self.inputs)}")

    def attribute(self, value: Any, op: str) -> Any:
        """Add an attribute; returns the node that reads a tensor, or the name of a module."""
        name = f"attribute_{len(self.attributes)}"
        self.attributes[name] = value
        if op == "get_attr":
            self.description.append(f"tensor {_layout(value)}")
            return self.graph.get_attr(name)
        return name

    def call(self, op: str, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        """Add a call; the target is a function, the name of a method, or a module itself."""
        name = target if isinstance(target, str) else getattr(target, "__name__", repr(target))
        if isinstance(target, nn.Module):
            name, target = repr(target), self.attribute(target, op)
        self.description.append(f"{name} {args} {kwargs}")
        return self.graph.create_node(op, target, args, kwargs)

    def copy(self, node: fx.Node) -> None:
        """Add the same call on the values of the excerpt."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
        target: Any = node.target
        if node.op == "call_module":
            target = self.view.submodule(str(target))
        self.copies[node] = self.call(node.op, target, args, kwargs)

    def copy_readers(self, plan: Plan) -> None:
        """Add the readers of several roots, which may take longer to read views of one result."""
        for root in plan.roots if plan.outputs else ():
            for user in root.users:
                if user in plan.region or user in self.copies:
                    continue
                if not _is_repeatable(self.view, user):
                    continue
                try:
                    self.copy(user)
                except _NotRunnable:
                    continue

    def finish(self, results: Iterable[Any]) -> _Excerpt:
        """Return the results, so that they are alive until the end as they are in the model."""
        last = [node for node in self.graph.nodes if node.op != "placeholder" and not node.users]
        self.graph.output(tuple(dict.fromkeys((*results, *last))))
        return self

    def run(self) -> Callable[[], Any]:
        """A function that runs the excerpt on random values."""
        module = fx.GraphModule(self.attributes, self.graph)
        inputs = [_random(like) for like in self.inputs]
        return lambda: module(*inputs)


def _excerpt_before(plan: Plan, view: View, values: Values) -> _Excerpt:
    """The region of a plan."""
    excerpt = _Excerpt(view, values)
    for source in dict.fromkeys(piece.source for piece in plan.pieces):
        excerpt.value(source)  # first on both sides, so that inputs have the same names
    for node in plan.region:
        excerpt.copy(node)
    roots = [excerpt.copies[root] for root in plan.roots]
    excerpt.copy_readers(plan)
    return excerpt.finish(roots)


def _excerpt_after(plan: Plan, view: View, values: Values) -> _Excerpt:
    """The replacement of a plan's region, with random weights."""
    excerpt = _Excerpt(view, values)
    for source in dict.fromkeys(piece.source for piece in plan.pieces):
        excerpt.value(source)
    layers = random_layers(plan, view)
    if isinstance(layers, Refusal):
        raise _NotRunnable(layers.reason)
    modules = {f"new {i}": module for i, module in enumerate(layers)}

    def make(op: str, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        if op == "call_module":
            target = modules.get(target) or view.submodule(target)
        return excerpt.call(op, target, args, kwargs)

    _, roots = replacement(plan, list(modules), excerpt.value, make)
    excerpt.copies.update(zip(plan.roots, roots, strict=True))
    excerpt.copy_readers(plan)
    return excerpt.finish(roots)


def _is_repeatable(view: View, node: fx.Node) -> bool:
    """Whether a call has no effect but its result."""
    if node.op == "call_module":
        return not opaque(node)
    known = node.op == "call_method" or node.op == "call_function"
    return known and not view.writes(node) and node.target is not operator.setitem


def _layout(tensor: Tensor) -> str:
    """The shape, strides, dtype and device of a tensor."""
    return f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype} {tensor.device}"


def _random(like: Tensor) -> Tensor:
    value = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    memory = value.untyped_storage()  # filled as a whole: elements of an expanded value overlap
    generator = torch.Generator(like.device).manual_seed(0)
    whole = value.as_strided((len(memory) // value.itemsize,), (1,), 0)
    whole.normal_(generator=generator)
    return value


# --- timing --------------------------------------------------------------------------------------


def _timed(old: _Excerpt, new: _Excerpt) -> Timing:
    settings = (
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    )
    key = (settings, tuple(old.description), tuple(new.description))
    if key not in _timings:
        _timings[key] = _measured(old.run(), new.run())
    return _timings[key]


def _measured(old: Callable[[], Any], new: Callable[[], Any]) -> Timing:
    """The lower quartiles of the times; torch's timer waits for the device."""
    timers = [
        Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        for run in (old, new)
    ]
    rounds: list[list[float]] = []
    with torch.no_grad():
        slowest = max(min(timer.timeit(1).mean for _ in range(2)) for timer in timers)
        number = max(1, math.ceil(ROUND_SECONDS / max(slowest, 1e-6)))
        most = max(LEAST_ROUNDS, math.ceil(SECONDS / (2 * number * max(slowest, 1e-6))))
        while len(rounds) < most and not _is_clear(rounds):
            rounds.append([timer.timeit(number).mean for timer in timers])
    before, after = (sorted(times)[len(times) // 4] for times in zip(*rounds, strict=True))
    return Timing(before, after)


def _is_clear(rounds: Sequence[Sequence[float]]) -> bool:
    """Whether one side is faster by far in every round."""
    if len(rounds) < CLEAR_ROUNDS:
        return False
    before, after = zip(*rounds, strict=True)
    return bool(max(before) * CLEAR < min(after) or max(after) * CLEAR < min(before))
