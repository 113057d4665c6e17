"""Timing a rewrite where it will run, on the values it will see: ``cost="measure"``.

What MACs and traffic alone do not decide (a wider kernel in place of several, pooling as a
convolution, one layer for several siblings, a border corrected by one more channel) is run before
and after, on the model's device, in its dtype, at its shapes and strides.
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
from fxrep.analysis.values import Values, opaque
from fxrep.planning.cost import MacsCost
from fxrep.planning.plan import Plan
from fxrep.reading.view import Affine, View
from fxrep.refusal import Refusal
from fxrep.rewriting.layers import blank
from fxrep.rewriting.replacement import pads, replacement

# Rounds in turns, so that drift hits both sides alike: short ones, for a busy machine takes the
# processor away for milliseconds, and the rounds that it spares tell how long a side takes.
LEAST_ROUNDS, ROUND_SECONDS, SECONDS = 9, 0.001, 0.15

# So many rounds do where one side always takes so many times as long as the other.
CLEAR_ROUNDS, CLEAR = 5, 1.2

# What is not faster by this much is not worth a change: timings vary as much.
LEAST_GAIN = 0.03


@dataclass(frozen=True)
class Timing:
    """Seconds of what was there and of what replaces it."""

    before: float
    after: float

    def __str__(self) -> str:
        return f"{1e3 * self.before:.3g} ms -> {1e3 * self.after:.3g} ms"


# By what both sides compute, on what, and torch's settings.
_known: dict[object, Timing] = {}


def judge(plans: Sequence[Plan], view: View, values: Values) -> Timing | Refusal | None:
    """Time a rewrite whose profit is in doubt.

    Args:
        plans: equal rewrites that are carried out together, for they share their layers.
        view: the graph, not yet changed.
        values: what the values of the graph are.

    Returns:
        The times if it is faster, why not to rewrite if it is not, and None if there is no doubt.
    """
    if not _in_doubt(plans[0], view):
        return None
    before, after = 0.0, 0.0
    for plan in plans:
        try:
            timing = _timed(_old(plan, view, values), _new(plan, view, values))
        except _Unknown as reason:
            if MacsCost().objection(plan.saved, plan.spent) is None:
                return None
            return Refusal(f"it could not be timed: {reason}")
        before, after = before + timing.before, after + timing.after
    timing = Timing(before, after)
    if after > before * (1 - LEAST_GAIN):
        return Refusal(f"not faster: {timing}")
    return timing


class _Unknown(Exception):
    """Something is not known that is needed to run a part of the graph."""


# --- what is in doubt ----------------------------------------------------------------------------


def _in_doubt(plan: Plan, view: View) -> bool:
    """Whether it does anything but leave some of the layers that are there as they are."""
    if MacsCost().objection(plan.saved, plan.spent) is not None or plan.outputs:
        return True
    readings = [r for n in plan.region if isinstance(r := view.read(n), Affine) and r.is_layer]
    known = [_kernel(r.terms[0].map) for r in readings]
    for piece in plan.pieces:
        if isinstance(piece.map, Map) and (pads(piece) or _kernel(piece.map) not in known):
            return True
    return False


def _kernel(shape: Map | Diagonal) -> object:
    """What decides which kernel runs, sizes aside."""
    if isinstance(shape, Diagonal):
        return None
    shape = symmetric(shape)
    taps = tuple((a.kernel, a.stride, a.dilation) for a in shape.axes)
    groups = shape.band.groups if shape.channelwise is not None else None
    return taps, groups, shape.inputs, shape.outputs, shape.transposed


# --- a part of the graph that runs on its own ---------------------------------------------------


@dataclass(eq=False)
class _Excerpt:
    """A part of a graph in the making.

    Attributes:
        view: where it is taken from.
        values: what the values there are.
        graph: the part.
        made: its values, by the nodes they stand for.
        held: the modules and tensors it uses, by their names in it.
        inputs: what it takes, faked.
        story: what it computes, whatever its weights: equal for parts that take equally long.
    """

    view: View
    values: Values
    graph: fx.Graph = field(default_factory=fx.Graph)
    made: dict[fx.Node, Any] = field(default_factory=dict)
    held: dict[str, Any] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)
    story: list[str] = field(default_factory=list)

    def value(self, node: fx.Node) -> Any:
        """What stands for a value of the graph: it is made here, held, or comes from outside."""
        if node in self.made:
            return self.made[node]
        if node.op == "get_attr":
            made: Any = self.hold(self.view.tensor(str(node.target)), "get_attr")
        else:
            made = self._input(self.values.of(node))
        self.made[node] = made
        return made

    def _input(self, known: Any) -> Any:
        if isinstance(known, bool | int | float | torch.Size | torch.dtype | torch.device):
            return known
        if not isinstance(known, Tensor):
            raise _Unknown("the shape of a value is not known from example_inputs")
        if not known.is_floating_point():
            raise _Unknown(f"it reads a value of {known.dtype}")
        self.inputs.append(known)
        self.story.append(f"input {_look(known)}")
        return self.graph.placeholder(f"x{len(self.inputs)}")

    def hold(self, thing: Any, op: str) -> Any:
        """A tensor's value, or the name of a module."""
        name = f"held_{len(self.held)}"
        self.held[name] = thing
        if op == "get_attr":
            self.story.append(f"tensor {_look(thing)}")
            return self.graph.get_attr(name)
        return name

    def call(self, op: str, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        """A call of something: a module by itself, not by its path."""
        what = target if isinstance(target, str) else getattr(target, "__name__", repr(target))
        if isinstance(target, nn.Module):
            what, target = repr(target), self.hold(target, op)
        self.story.append(f"{what} {args} {kwargs}")
        return self.graph.create_node(op, target, args, kwargs)

    def copy(self, node: fx.Node) -> None:
        """The same call on the values of this part."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
        target: Any = node.target
        if node.op == "call_module":
            target = self.view.submodule(str(target))
        self.made[node] = self.call(node.op, target, args, kwargs)

    def readers(self, plan: Plan) -> None:
        """What reads views of one result, which may take longer than reading values apart."""
        for root in plan.roots if plan.outputs else ():
            for user in root.users:
                if user in plan.region or user in self.made or not _runs_apart(self.view, user):
                    continue
                try:
                    self.copy(user)
                except _Unknown:
                    continue

    def finish(self, results: Iterable[Any]) -> _Excerpt:
        """End it: the results are kept until then, as they are in the model."""
        last = [node for node in self.graph.nodes if node.op != "placeholder" and not node.users]
        self.graph.output(tuple(dict.fromkeys((*results, *last))))
        return self

    def run(self) -> Callable[[], Any]:
        """A call of it, on random values."""
        module = fx.GraphModule(self.held, self.graph)
        inputs = [_random(like) for like in self.inputs]
        return lambda: module(*inputs)


def _old(plan: Plan, view: View, values: Values) -> _Excerpt:
    part = _Excerpt(view, values)
    for source in dict.fromkeys(piece.source for piece in plan.pieces):
        part.value(source)  # both sides take the sources first: their stories then compare
    for node in plan.region:
        part.copy(node)
    roots = [part.made[root] for root in plan.roots]
    part.readers(plan)
    return part.finish(roots)


def _new(plan: Plan, view: View, values: Values) -> _Excerpt:
    part = _Excerpt(view, values)
    for source in dict.fromkeys(piece.source for piece in plan.pieces):
        part.value(source)
    modules = {f"new {i}": module for i, module in enumerate(blank(plan, view))}

    def make(op: str, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        if op == "call_module":
            target = modules.get(target) or view.submodule(target)
        return part.call(op, target, args, kwargs)

    _, roots = replacement(plan, list(modules), part.value, make)
    part.made.update(zip(plan.roots, roots, strict=True))
    part.readers(plan)
    return part.finish(roots)


def _runs_apart(view: View, node: fx.Node) -> bool:
    """Whether a call can be repeated without an effect on anything else."""
    if node.op == "call_module":
        return not opaque(node)
    known = node.op == "call_method" or node.op == "call_function"
    return known and not view.writes(node) and node.target is not operator.setitem


def _look(tensor: Tensor) -> str:
    """What a tensor is, its content aside."""
    return f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype} {tensor.device}"


def _random(like: Tensor) -> Tensor:
    value = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    memory = value.untyped_storage()  # its elements may overlap: it may be expanded
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
    key = (settings, tuple(old.story), tuple(new.story))
    if key not in _known:
        _known[key] = _measured(old.run(), new.run())
    return _known[key]


def _measured(old: Callable[[], Any], new: Callable[[], Any]) -> Timing:
    """Lower quartiles of times, in turns; torch's timer waits for the device."""
    timers = [
        Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        for run in (old, new)
    ]
    rounds: list[list[float]] = []
    with torch.no_grad():
        slowest = max(min(timer.timeit(1).mean for _ in range(2)) for timer in timers)
        number = max(1, math.ceil(ROUND_SECONDS / max(slowest, 1e-6)))
        most = max(LEAST_ROUNDS, math.ceil(SECONDS / (2 * number * max(slowest, 1e-6))))
        while len(rounds) < most and not _clear(rounds):
            rounds.append([timer.timeit(number).mean for timer in timers])
    before, after = (sorted(times)[len(times) // 4] for times in zip(*rounds, strict=True))
    return Timing(before, after)


def _clear(rounds: Sequence[Sequence[float]]) -> bool:
    """Whether one side has won by far, every time."""
    if len(rounds) < CLEAR_ROUNDS:
        return False
    before, after = zip(*rounds, strict=True)
    return bool(max(before) * CLEAR < min(after) or max(after) * CLEAR < min(before))
