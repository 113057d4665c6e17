"""A graph of `torch.compile` at run time: folded weights are cached and checked at each call.

Dynamo calls one compiled graph with the weights of any module of equal structure, and with weights
that have changed since. Folded weights are therefore cached by the ids of the weights they were
made from, and each call checks that those have not changed: a weight is watched (same address, same
version) or compared. Compared, by content, are small buffers: they may be running statistics, which
CUDA and C++ kernels write without a new version.
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
from fxrep.torch_compile.dynamo import Unfoldable, lasting_copy, log, statistics, weight_inputs
from fxrep.torch_compile.folding import Bound, Folding, bind, fold

MOST_SETS = 64  # sets of weights that one graph caches folded weights for
MOST_FOLDINGS = 4  # ways to rewrite one graph
MOST_CHANNELS = 1 << 14  # buffers with more elements are no running statistics

Run = Callable[..., Any]
Inner = Callable[[fx.GraphModule, Sequence[Any]], Run]
Take = Callable[[Sequence[Any]], tuple[Any, ...]]

_version = operator.attrgetter("_version")


@dataclass(frozen=True, eq=False)
class _Compiled:
    """A graph after the inner compiler, and how its inputs are taken from dynamo's."""

    run: Run
    take: Take


@dataclass(frozen=True, eq=False)
class _CachedWeights:
    """Folded weights, and the state of the weights they were made from.

    Attributes:
        compiled: the graph that takes the folded weights.
        folded: the folded weights; none if they are constants of the graph.
        storages: weak references to the memory of the original weights.
        versions: of the watched weights.
        addresses: of the watched weights.
        contents: of the compared weights, those that can be joined in one tensor.
    """

    compiled: _Compiled
    folded: tuple[Tensor, ...]
    storages: tuple[weakref.ref[Any], ...]
    versions: list[int]
    addresses: list[int]
    contents: list[Tensor]


@dataclass(frozen=True, eq=False)
class _Entry:
    """A way to rewrite the graph.

    Attributes:
        folding: the rewritten graph.
        compiled: the graph that takes folded weights; None if each set of weights has its own.
        paths: the folded weights that `compiled` takes.
    """

    folding: Folding
    compiled: _Compiled | None
    paths: tuple[str, ...]


class Untouched:
    """A graph that is left to the inner compiler as it is, with the reasons in its report."""

    def __init__(
        self, run: Run, weights: Iterable[Tensor], reason: str, skipped: Sequence[Skip] = ()
    ) -> None:
        self.run = run
        self.weights = set(map(id, weights))  # ids may be those of dead tensors: only reports ask
        where = f"graph {CompileContext.current_compile_id()}"
        self.report = Report((), (Skip("compile", where, reason), *skipped))
        log.info("%s is left as it is: %s", where, reason)
        graphs.add(self)

    def __call__(self, *args: Any) -> Any:
        """Run the graph."""
        return self.run(*args)

    def uses(self, tensors: set[int]) -> bool:
        """Whether it was compiled for one of these tensors."""
        return not tensors.isdisjoint(self.weights)

    def invalidate(self, tensors: set[int] | None) -> None:
        """Do nothing: there are no folded weights."""


class Folded:
    """A graph that runs on folded weights.

    Args:
        gm: dynamo's graph.
        inputs: the values of its inputs that it is compiled for.
        inner: compiles a graph for example values of its inputs.
        settings: the passes, their cost model and whether to validate.
        freezing: folded weights are constants of the graph; it is compiled anew when they change.

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
        self.gm = lasting_copy(gm)
        self.positions = weight_inputs(self.gm, inputs)
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        self.fakes = [node.meta.get("example_value") for node in placeholders]
        self.mode = next((f.fake_mode for f in self.fakes if isinstance(f, FakeTensor)), None)
        (output,) = gm.graph.find_nodes(op="output")
        self.outputs = [_kind(_example(value)) for value in output.args[0]]
        self.at_run_time = False  # dynamo still compiles: its tracing context is active
        self.cache: dict[tuple[int, ...], _CachedWeights] = {}
        self.cached_ids: set[int] = set()
        self.foldings: list[_Entry] = []  # the one used last stands last
        self.unfolded: _Compiled | None = None
        self.sources: set[int] | None = None
        compiled, folded = self._fold(inputs)
        self.written_inputs = self.foldings[-1].folding.written_inputs
        self._store(compiled, folded, inputs)
        self.at_run_time = True
        graphs.add(self)

    @property
    def report(self) -> Report:
        """The report of the rewriting that was used last."""
        return self.foldings[-1].folding.report

    def uses(self, tensors: set[int]) -> bool:
        """Whether cached weights were made from one of these tensors."""
        return not tensors.isdisjoint(self.cached_ids) and any(
            not tensors.isdisjoint(key) for key in self.cache
        )

    def invalidate(self, tensors: set[int] | None) -> None:
        """Drop the cached weights that were made from these tensors, or all."""
        if tensors is not None and tensors.isdisjoint(self.cached_ids):
            return
        for key in list(self.cache):
            if tensors is None or not tensors.isdisjoint(key):
                self.cache.pop(key, None)

    def __call__(self, *args: Any) -> Any:
        """Run the graph on folded weights for the weights among `args`."""
        weights = self.take_weights(args)
        cached = self.cache.get(tuple(map(id, weights)))
        if cached is None or not self._is_valid(cached, weights):
            cached = self._refold(args)
        if self.written_inputs and self._writes_a_weight(args):
            return self.gm(*args)
        compiled = cached.compiled
        return compiled.run(*compiled.take(args), *cached.folded)

    def _is_valid(self, cached: _CachedWeights, weights: tuple[Tensor, ...]) -> bool:
        """Whether these weights are as they were when they were folded."""
        watched = weights[: self.num_watched]
        return (
            list(map(_version, watched)) == cached.versions
            and list(map(Tensor.data_ptr, watched)) == cached.addresses
            and (
                # While a CUDA graph is recorded, no result can be read from the device.
                _is_capturing()
                or all(
                    _equal(_joined(take(weights)), content)
                    for take, content in zip(self.take_compared, cached.contents, strict=True)
                )
            )
        )

    def _writes_a_weight(self, args: Sequence[Any]) -> bool:
        """Whether the graph writes an input that shares its memory with a weight."""
        memory = {args[i].untyped_storage()._cdata for i in self.written_inputs}
        return any(args[i].untyped_storage()._cdata in memory for i in self.positions)

    def _refold(self, args: Sequence[Any]) -> _CachedWeights:
        """Fold other weights, or cache the original graph for them."""
        try:
            compiled, folded = self._fold(args)
        except Exception as error:  # the original graph is right in any case
            log.warning("these weights are not folded: %s: %s", type(error).__name__, error)
            compiled, folded = self._unfolded(args), ()
        return self._store(compiled, folded, args)

    def _choose_checks(self, inputs: Sequence[Any]) -> None:
        """Set which weights each call checks: all those that any of the foldings depends on."""
        foldings = [entry.folding for entry in self.foldings]
        sources = {i for folding in foldings for i in folding.sources}
        if self.freezing:
            sources |= {f.weight_positions[path] for f in foldings for path in f.freezable}
        sources = sources or set(self.positions)
        if sources == self.sources:
            return
        self.sources = sources
        self.cache.clear()
        kernels_write = statistics(self.gm)
        watched: list[int] = []
        compared: list[int] = []
        for i, node in self.positions.items():
            if i in sources:
                has_content = node in kernels_write or _may_be_statistics(inputs[i])
                (compared if has_content else watched).append(i)
        self.num_watched = len(watched)
        self.take_weights = _taker([*watched, *compared])
        self.take_compared = _joinable(self.num_watched, [inputs[i] for i in compared])

    def _store(
        self, compiled: _Compiled, folded: tuple[Tensor, ...], inputs: Sequence[Any]
    ) -> _CachedWeights:
        weights, cache = self.take_weights(inputs), self.cache
        key = tuple(map(id, weights))
        cache.pop(key, None)
        while len(cache) >= MOST_SETS:
            cache.pop(next(iter(cache)))

        def drop(_: object) -> None:
            cache.pop(key, None)

        cache[key] = _CachedWeights(
            compiled,
            folded,
            # An address identifies memory only until the memory is freed: after ``p.data =`` a new
            # storage may have the old address. Weak references to the tensors themselves would make
            # `torch.utils.swap_tensors` refuse them.
            tuple(weakref.ref(weight.untyped_storage(), drop) for weight in weights),
            list(map(_version, weights[: self.num_watched])),
            list(map(Tensor.data_ptr, weights[: self.num_watched])),
            [_joined(take(weights)).clone() for take in self.take_compared],
        )
        self.cached_ids = set().union(*cache)
        return cache[key]

    def _fold(self, inputs: Sequence[Any]) -> tuple[_Compiled, tuple[Tensor, ...]]:
        """The graph and folded weights for these inputs."""
        entry, values = self._known_folding(inputs) or self._new_folding(inputs)
        if entry.compiled is not None:
            return entry.compiled, tuple(values[path] for path in entry.paths)
        folding = entry.folding
        frozen = dict(values)
        for path in folding.freezable:
            value = inputs[folding.weight_positions[path]]
            # Buffers compared by content are copied: the model may replace them, and their memory
            # may be reused.
            frozen[path] = value.clone() if _may_be_statistics(value) else value
        return self._compile(bind(folding, self.gm, frozen), inputs, {}), ()

    def _known_folding(self, inputs: Sequence[Any]) -> tuple[_Entry, dict[str, Tensor]] | None:
        """A folding that fits these inputs, and its folded weights for them, if there is one."""
        for entry in self.foldings:
            if entry.folding.fits(inputs):
                try:
                    values = entry.folding.compute(inputs)
                except Unfoldable:
                    continue
                self.foldings.remove(entry)
                self.foldings.append(entry)  # the last used stays longest
                return entry, values
        return None

    def _new_folding(self, inputs: Sequence[Any]) -> tuple[_Entry, dict[str, Tensor]]:
        folding, values = fold(self.gm, inputs, self.settings)
        if not (folding.report.rewrites or self.freezing):
            raise Unfoldable("nothing to fold", folding.report.skipped)
        bound = bind(folding, self.gm, {})
        self._check_outputs(bound, inputs, values)
        compiled = None if self.freezing else self._compile(bound, inputs, values)
        entry = _Entry(folding, compiled, bound.paths)
        self.foldings = [*self.foldings[1 - MOST_FOLDINGS :], entry]
        self._choose_checks(inputs)
        return entry, values

    def _compile(self, bound: Bound, inputs: Sequence[Any], values: dict[str, Tensor]) -> _Compiled:
        take = _taker(bound.positions)
        folded = [values[path] for path in bound.paths]
        context = TracingContext.try_get()
        if not self.at_run_time and context is not None:
            _fix_shapes(context, folded)
        if not self.at_run_time or self.mode is None:
            return _Compiled(self.inner(bound.module, [*take(inputs), *folded]), take)
        # With dynamo's symbolic sizes: the graph has to run at all sizes that dynamo runs it at.
        fakes = [self.mode.from_tensor(tensor, static_shapes=True) for tensor in folded]
        with tracing(TracingContext(self.mode)):
            return _Compiled(self.inner(bound.module, [*take(self.fakes), *fakes]), take)

    def _unfolded(self, inputs: Sequence[Any]) -> _Compiled:
        """Dynamo's graph as it is, compiled where the inner compiler can."""
        if self.unfolded is None:
            graph = fx.Graph()
            graph.output(graph.graph_copy(self.gm.graph, {}))
            everything = tuple(range(len(self.fakes)))
            bound = Bound(fx.GraphModule(self.gm, graph), everything, ())
            try:
                self.unfolded = self._compile(bound, inputs, {})
            except Exception as error:
                log.warning("runs without the inner compiler: %s", error)
                self.unfolded = _Compiled(self.gm.forward, _taker(everything))
        return self.unfolded

    def _check_outputs(
        self, bound: Bound, inputs: Sequence[Any], values: dict[str, Tensor]
    ) -> None:
        """Refuse a graph whose outputs have other dtypes (autocast), devices or shapes."""
        mode = self.mode or FakeTensorMode()
        given = inputs if self.mode is None else self.fakes
        taken = [given[i] for i in bound.positions] + [values[path] for path in bound.paths]
        fakes = [_faked(mode, value) for value in taken]
        with torch.no_grad(), mode, enable_python_dispatcher():
            got = bound.module(*fakes)
        for expected, actual in zip(self.outputs, map(_kind, got), strict=True):
            if actual != expected:
                raise Unfoldable(f"a result would be {actual} instead of {expected}")


def _faked(mode: FakeTensorMode, value: Any) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return value
    # Detached, because the mode keeps weak references, and `swap_tensors` refuses such tensors.
    return mode.from_tensor(value.detach(), static_shapes=True)


def _example(value: object) -> object:
    return value.meta.get("example_value") if isinstance(value, fx.Node) else value


def _on_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Invalidate at each step: fused optimizers, and writes of ``p.data``, make no new version."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for graph in list(graphs):
        graph.invalidate(stepped)


def _on_registration(_: nn.Module, __: str, tensor: Tensor | None) -> None:
    """Invalidate the id: the new tensor may have the id, address and version of a dead one."""
    for graph in list(graphs):
        graph.invalidate({id(tensor)})


register_optimizer_step_post_hook(_on_step)
register_module_parameter_registration_hook(_on_registration)
register_module_buffer_registration_hook(_on_registration)


def _is_capturing() -> bool:
    """Whether a CUDA graph is being recorded."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


def _taker(positions: Sequence[int]) -> Take:
    """A function that takes the values at these positions, as a tuple."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda values: tuple(values[i] for i in positions)


def _joinable(start: int, values: Iterable[Tensor]) -> list[Take]:
    """Functions that take, from all weights, those that can be joined in one tensor.

    Args:
        start: the position of the first of `values` among all weights.
        values: the weights that are compared.
    """
    groups: dict[object, list[int]] = {}
    for place, value in enumerate(values, start):
        joins = value.shape[1:] if value.dim() else place
        groups.setdefault((value.dtype, value.device, joins), []).append(place)
    return [_taker(places) for places in groups.values()]


def _may_be_statistics(value: Tensor) -> bool:
    """Whether a BatchNorm that trains may write this buffer, in whatever graph it runs."""
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
    """Mark folded weights as static: dynamo may make the sizes of other inputs symbolic."""
    for i, tensor in enumerate(tensors):
        context.tensor_to_context[tensor] = StatefulSymbolicContext(
            dynamic_sizes=[DimDynamic.STATIC] * tensor.dim(),
            constraint_sizes=[None] * tensor.dim(),
            tensor_source=ConstantSource(f"fxrep_{i}"),
        )
