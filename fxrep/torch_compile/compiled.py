"""A graph of `torch.compile` at run time: which folded weights belong to the weights it is given.

Dynamo calls one compiled graph with the weights of any module of equal structure, and with weights
that have changed since. Folded weights are therefore kept by the identity of the weights they were
made from, and each call first makes sure that these are still what they were: at the same address,
of the same version; small buffers, which may be running statistics that kernels write without a
trace, of the same content instead.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._guards import CompileContext, TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxrep.registry import graphs
from fxrep.report import Report, Skip
from fxrep.rewriting.session import Settings
from fxrep.torch_compile.dynamo import Unfoldable, lasting, log, static_inputs, statistics
from fxrep.torch_compile.folding import Bound, Folding, bind, fold

# Sets of weights that one graph keeps folded weights for, and ways to rewrite it.
MOST_SETS = 64
MOST_FOLDINGS = 4

# Buffers of more elements are no running statistics.
MOST_CHANNELS = 1 << 14

Run = Callable[..., Any]
Inner = Callable[[fx.GraphModule, Sequence[Any]], Run]
Take = Callable[[Sequence[Any]], tuple[Any, ...]]

_version = operator.attrgetter("_version")


@dataclass(frozen=True, eq=False)
class _Compiled:
    """What the inner compiler made of a graph, and which of dynamo's inputs that takes."""

    run: Run
    take: Take


@dataclass(frozen=True, eq=False)
class _Kept:
    """Folded weights, and what tells that they are still right.

    Attributes:
        compiled: the graph that takes them.
        folded: the weights; none if they are constants of the graph.
        storages: the memory they were made from, weakly.
        versions: of those that are watched.
        addresses: of the same.
        contents: of those that are compared, joined.
    """

    compiled: _Compiled
    folded: tuple[Tensor, ...]
    storages: tuple[weakref.ref[Any], ...]
    versions: list[int]
    addresses: list[int]
    contents: list[Tensor]


class Untouched:
    """A graph that is left to the inner compiler, and why."""

    def __init__(self, run: Run, weights: Iterable[Tensor], reason: str) -> None:
        self.run = run
        self.weights = set(map(id, weights))  # no weak references: nothing depends on it
        where = f"graph {CompileContext.current_compile_id()}"
        self.report = Report((), (Skip("compile", where, reason),))
        log.info("%s is left as it is: %s", where, reason)
        graphs.add(self)

    def __call__(self, *args: Any) -> Any:
        """Run the graph."""
        return self.run(*args)

    def uses(self, tensors: set[int]) -> bool:
        """Whether it was compiled for one of these tensors."""
        return not tensors.isdisjoint(self.weights)

    def forget(self, tensors: set[int] | None) -> None:
        """Nothing was made from them."""


class Folded:
    """A graph that runs on folded weights.

    Args:
        gm: dynamo's graph.
        inputs: the values of its inputs it is compiled for.
        inner: compiles a graph for given values of its inputs.
        settings: the passes and how to judge them.
        freezing: folded weights are constants of the graph, compiled anew when they change.

    Raises:
        Unfoldable: there is nothing to fold, or the graph has to stay as it is.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        inner: Inner,
        settings: Settings,
        freezing: bool,
    ) -> None:
        self.inner, self.settings, self.freezing = inner, settings, freezing
        self.gm = lasting(gm)
        self.positions = static_inputs(self.gm, inputs)
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        self.fakes = [node.meta.get("example_value") for node in placeholders]
        self.mode = next((f.fake_mode for f in self.fakes if isinstance(f, FakeTensor)), None)
        (output,) = gm.graph.find_nodes(op="output")
        self.outputs = [_kind(_example(value)) for value in output.args[0]]
        self.late = False
        self.kept: dict[tuple[int, ...], _Kept] = {}
        self.known: set[int] = set()
        self.foldings: list[tuple[Folding, _Compiled | None, tuple[str, ...]]] = []
        self.plain: _Compiled | None = None
        self.sources: set[int] | None = None
        compiled, folded = self._folded(inputs)
        self.overwritten = self.foldings[-1][0].overwritten
        self._keep(compiled, folded, inputs)
        self.late = True
        graphs.add(self)

    @property
    def report(self) -> Report:
        """What was done last."""
        return self.foldings[-1][0].report

    def uses(self, tensors: set[int]) -> bool:
        """Whether it has folded one of these tensors."""
        return not tensors.isdisjoint(self.known) and any(
            not tensors.isdisjoint(key) for key in self.kept
        )

    def forget(self, tensors: set[int] | None) -> None:
        """Compute anew what was made from these tensors, or everything."""
        if tensors is not None and tensors.isdisjoint(self.known):
            return
        for key in list(self.kept):
            if tensors is None or not tensors.isdisjoint(key):
                self.kept.pop(key, None)

    def __call__(self, *args: Any) -> Any:
        """Run the graph on what was folded from the weights among `args`."""
        weights = self.weights(args)
        kept = self.kept.get(tuple(map(id, weights)))
        if kept is None or not self._stands(kept, weights):
            kept = self._renewed(args)
        if self.overwritten and self._overwrites(args):
            return self.gm(*args)
        compiled = kept.compiled
        return compiled.run(*compiled.take(args), *kept.folded)

    def _stands(self, kept: _Kept, weights: tuple[Tensor, ...]) -> bool:
        watched = weights[: self.watched]
        return (
            list(map(_version, watched)) == kept.versions
            and list(map(Tensor.data_ptr, watched)) == kept.addresses
            and (
                # What the device knows cannot be asked for while its work is only recorded.
                _is_capturing()
                or all(
                    _equal(_joined(take(weights)), content)
                    for take, content in zip(self.compared, kept.contents, strict=True)
                )
            )
        )

    def _overwrites(self, args: Sequence[Any]) -> bool:
        """Whether the graph writes an input that is a weight, seen from elsewhere."""
        memory = {args[i].untyped_storage()._cdata for i in self.overwritten}
        return any(args[i].untyped_storage()._cdata in memory for i in self.positions)

    def _renewed(self, args: Sequence[Any]) -> _Kept:
        try:
            compiled, folded = self._folded(args)
        except Exception as error:  # the original graph is right whatever happened
            log.warning("these weights are not folded: %s: %s", type(error).__name__, error)
            compiled, folded = self._original(args), ()
        return self._keep(compiled, folded, args)

    def _watch(self, inputs: Sequence[Any]) -> None:
        """Settle what each call checks: what anything was made from, in any of the foldings."""
        foldings = [folding for folding, *_ in self.foldings]
        sources = {i for folding in foldings for i in folding.sources}
        if self.freezing:
            sources |= {f.statics[path] for f in foldings for path in f.freezable}
        sources = sources or set(self.positions)
        if sources == self.sources:
            return
        self.sources = sources
        self.kept.clear()
        kernels_write = statistics(self.gm)
        watched: list[int] = []
        compared: list[int] = []
        for i, node in self.positions.items():
            if i in sources:
                has_content = node in kernels_write or _may_be_statistics(inputs[i])
                (compared if has_content else watched).append(i)
        self.watched = len(watched)
        self.weights = _taking([*watched, *compared])
        self.compared = _groups(self.watched, [inputs[i] for i in compared])

    def _keep(
        self, compiled: _Compiled, folded: tuple[Tensor, ...], inputs: Sequence[Any]
    ) -> _Kept:
        weights, kept = self.weights(inputs), self.kept
        key = tuple(map(id, weights))
        kept.pop(key, None)
        while len(kept) >= MOST_SETS:
            kept.pop(next(iter(kept)))

        def gone(_: object) -> None:
            kept.pop(key, None)

        kept[key] = _Kept(
            compiled,
            folded,
            # An address says nothing once its memory was freed: ``p.data =`` may get it again. Not
            # the tensors: `torch.utils.swap_tensors` refuses those that are watched.
            tuple(weakref.ref(weight.untyped_storage(), gone) for weight in weights),
            list(map(_version, weights[: self.watched])),
            list(map(Tensor.data_ptr, weights[: self.watched])),
            [_joined(take(weights)).clone() for take in self.compared],
        )
        self.known = set().union(*kept)
        return kept[key]

    def _folded(self, inputs: Sequence[Any]) -> tuple[_Compiled, tuple[Tensor, ...]]:
        """The graph and folded weights for these inputs."""
        for entry in self.foldings:
            folding, compiled, paths = entry
            if folding.fits(inputs):
                try:
                    values = folding.compute(inputs)
                except Unfoldable:
                    continue
                self.foldings.remove(entry)
                self.foldings.append(entry)  # the last used stays longest
                break
        else:
            folding, values = fold(self.gm, inputs, self.settings)
            if not (folding.report.rewrites or self.freezing):
                raise Unfoldable("nothing to fold")
            bound = bind(folding, self.gm, {})
            self._check(bound, inputs, values)
            paths = bound.paths
            compiled = None if self.freezing else self._compile(bound, inputs, values)
            self.foldings = [*self.foldings[1 - MOST_FOLDINGS :], (folding, compiled, paths)]
            self._watch(inputs)
        if compiled is not None:
            return compiled, tuple(values[path] for path in paths)
        frozen = dict(values)
        for path in folding.freezable:
            value = inputs[folding.statics[path]]
            # Who is known by content only may go on elsewhere, and its memory to someone else.
            frozen[path] = value.clone() if _may_be_statistics(value) else value
        return self._compile(bind(folding, self.gm, frozen), inputs, {}), ()

    def _compile(self, bound: Bound, inputs: Sequence[Any], values: dict[str, Tensor]) -> _Compiled:
        take = _taking(bound.positions)
        folded = [values[path] for path in bound.paths]
        context = TracingContext.try_get()
        if not self.late and context is not None:
            _fix_shapes(context, folded)
        if not self.late or self.mode is None:
            return _Compiled(self.inner(bound.module, [*take(inputs), *folded]), take)
        # Dynamo's sizes: the graph has to run at all that dynamo runs it at.
        fakes = [self.mode.from_tensor(tensor, static_shapes=True) for tensor in folded]
        with tracing(TracingContext(self.mode)):
            return _Compiled(self.inner(bound.module, [*take(self.fakes), *fakes]), take)

    def _original(self, inputs: Sequence[Any]) -> _Compiled:
        """Dynamo's graph as it is, compiled if that goes well."""
        if self.plain is None:
            graph = fx.Graph()
            graph.output(graph.graph_copy(self.gm.graph, {}))
            everything = tuple(range(len(self.fakes)))
            bound = Bound(fx.GraphModule(self.gm, graph), everything, ())
            try:
                self.plain = self._compile(bound, inputs, {})
            except Exception as error:
                log.warning("runs without the inner compiler: %s", error)
                self.plain = _Compiled(self.gm.forward, _taking(everything))
        return self.plain

    def _check(self, bound: Bound, inputs: Sequence[Any], values: dict[str, Tensor]) -> None:
        """Make sure that the outputs are of the same kind: autocast shows in their dtypes."""
        mode = self.mode or FakeTensorMode()
        given = inputs if self.mode is None else self.fakes
        taken = [given[i] for i in bound.positions] + [values[path] for path in bound.paths]
        fakes = [_faked(mode, value) for value in taken]
        with torch.no_grad(), mode, enable_python_dispatcher():
            got = bound.module(*fakes)
        for expected, mine in zip(self.outputs, map(_kind, got), strict=True):
            if mine != expected:
                raise Unfoldable(f"a result would be {mine} instead of {expected}")


def _faked(mode: FakeTensorMode, value: Any) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return value
    # Detached: who is watched by a mode cannot be swapped until it is collected.
    return mode.from_tensor(value.detach(), static_shapes=True)


def _example(value: object) -> object:
    return value.meta.get("example_value") if isinstance(value, fx.Node) else value


def _after_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Some optimizers leave no trace: fused ones, and those that write ``p.data``."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for graph in list(graphs):
        graph.forget(stepped)


def _registered(_: nn.Module, __: str, tensor: Tensor | None) -> None:
    """One that died may have been where a new one is now, in the same memory, as often written."""
    for graph in list(graphs):
        graph.forget({id(tensor)})


register_optimizer_step_post_hook(_after_step)
register_module_parameter_registration_hook(_registered)
register_module_buffer_registration_hook(_registered)


def _is_capturing() -> bool:
    """Whether a CUDA graph is being recorded."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


def _taking(positions: Sequence[int]) -> Take:
    """What stands at some positions, as a tuple."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda values: tuple(values[i] for i in positions)


def _groups(start: int, values: Iterable[Tensor]) -> list[Take]:
    """What can be joined, by its places among the weights; these values start at `start`."""
    groups: dict[object, list[int]] = {}
    for place, value in enumerate(values, start):
        joins = value.shape[1:] if value.dim() else place
        groups.setdefault((value.dtype, value.device, joins), []).append(place)
    return [_taking(places) for places in groups.values()]


def _may_be_statistics(value: Tensor) -> bool:
    """Whether a BatchNorm may have it: in training, elsewhere, in whatever form evaluation does."""
    is_buffer = not isinstance(value, nn.Parameter) and value.is_floating_point()
    return is_buffer and value.numel() <= MOST_CHANNELS


def _joined(vectors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(vectors) if len(vectors) > 1 else vectors[0]


def _equal(value: Tensor, content: Tensor) -> bool:
    """Whether two vectors are the same, NaN in the same places included."""
    if torch.equal(value, content):
        return True
    same = (value == content) | (value.isnan() & content.isnan())
    return bool(same.all())


def _kind(value: object) -> object:
    """The dtype, device and rank of a result, and its sizes as far as they are fixed."""
    if not isinstance(value, Tensor):
        return type(value)
    sizes = tuple(size if isinstance(size, int) else None for size in value.shape)
    return value.dtype, value.device, sizes


def _fix_shapes(context: TracingContext, tensors: Iterable[Tensor]) -> None:
    """Folded weights never change their shapes, whatever dynamo does about other inputs."""
    for i, tensor in enumerate(tensors):
        context.tensor_to_context[tensor] = StatefulSymbolicContext(
            dynamic_sizes=[DimDynamic.STATIC] * tensor.dim(),
            constraint_sizes=[None] * tensor.dim(),
            tensor_source=ConstantSource(f"fxrep_{i}"),
        )
