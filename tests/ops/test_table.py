"""The table of operators against torch's own word: schemas, tags, signatures, and what it does.

`torch.testing` knows a few thousand calls of nearly all operators and modules. Each is made as a
node of a graph, and run: what the table says of its result, shape and memory must be so.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import fxrep
from fxrep.analysis.channels import Channels
from fxrep.analysis.dtypes import Dtypes
from fxrep.analysis.ranks import Ranks
from fxrep.ops.calls import Calls
from fxrep.ops.effects import effect
from fxrep.ops.op import REQUIRED, Memory, Op, Reads, Shape
from fxrep.ops.spellings import CLASSES, FUNCTIONS, METHODS, OPS, register
from fxrep.ops.table import elementwise
from fxrep.ops.values import value_type
from fxrep.words import words

# --- schemas and tags ----------------------------------------------------------------------------


def overloads(name: str) -> list[Any]:
    """What torch declares of an operator that takes a tensor first and writes nothing."""
    packet = getattr(torch.ops.aten, name, None)
    found = [getattr(packet, each) for each in getattr(packet, "overloads", list)()]
    return [
        each
        for each in found
        if each._schema.arguments
        and not each._schema.is_mutable
        and each._schema.arguments[0].type.kind() == "TensorType"
    ]


DECLARED = sorted(name for name in OPS if overloads(name))

# Second names of an operator, and two whose parts only are tagged.
UNTAGGED = words(
    "absolute arccos arccosh arcsin arcsinh arctan arctanh divide fix floor_divide greater "
    "greater_equal hardswish less less_equal multiply negative not_equal subtract "
    "isclose isreal leaky_relu"  # the last in torch 2.11
)
# Copies, of which nothing is to be gained; random numbers; `max(x, y)`, but not `max(x)`.
NOT_ONLY_POINTWISE = {"clone", "positive", "rrelu", "max", "min", "conj", "masked_scatter"}


@pytest.mark.parametrize("name", DECLARED)
def test_what_torch_tags_as_pointwise_works_on_each_element(name: str) -> None:
    op = OPS[name]
    tagged = any(torch.Tag.pointwise in each.tags for each in overloads(name))
    here = op.elementwise or op.shape is Shape.BROADCASTS
    assert tagged == here or (name in UNTAGGED and here) or (name in NOT_ONLY_POINTWISE and tagged)


@pytest.mark.parametrize("name", DECLARED)
def test_what_torch_declares_to_be_a_view_is_none_of_fresh_memory(name: str) -> None:
    aliases = [r.alias_info for each in overloads(name) for r in each._schema.returns]
    assert not any(aliases) or OPS[name].memory is not Memory.FRESH


@pytest.mark.parametrize("name", DECLARED)
def test_parameters_stand_in_the_order_of_some_declaration(name: str) -> None:
    parameters = OPS[name].signature.parameters
    if len(parameters) == 1 or name == "einsum":
        return
    names = [{"self" if n == "input" else n for n in p.names} for p in parameters]
    declared = [[a.name for a in each._schema.arguments] for each in overloads(name)]
    written = inspect.signature(OPS_IN_PYTHON[name]).parameters if name in OPS_IN_PYTHON else {}
    declared.append(["self" if n in ("input", "query") else n for n in written])
    assert any(
        all(here in there for here, there in zip(order, names, strict=False)) for order in declared
    ), (names, declared)


OPS_IN_PYTHON = {
    function.__name__: function for function in FUNCTIONS if inspect.isfunction(function)
}


@pytest.mark.parametrize("name", sorted(OPS_IN_PYTHON))
def test_parameters_are_those_of_the_function_in_python(name: str) -> None:
    function = OPS_IN_PYTHON[name]
    given = inspect.signature(function).parameters
    for parameter in FUNCTIONS[function].op.signature.parameters:
        known = [given[each] for each in parameter.names if each in given]
        if known and parameter.default is not REQUIRED and parameter.default != ():
            default = known[0].default
            assert default is inspect.Parameter.empty or default == parameter.default


# --- what it does --------------------------------------------------------------------------------


def judge(
    target: Any, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], root: nn.Module
) -> list[str]:
    """What is said of a call that is not so; its tensors become buffers, whose shapes are known."""
    graph = fx.Graph()
    tensors: list[Tensor] = []

    def stored(tensor: Tensor) -> fx.Node:
        name = f"tensor_{len(tensors)}"
        tensors.append(tensor.detach())
        root.register_buffer(name, tensors[-1])
        return graph.get_attr(name)

    given, named = tree_map_only(Tensor, stored, (args, kwargs))
    node = graph.create_node(op, target, tuple(given), named)
    before = [tensor.clone() for tensor in tensors]
    with torch.no_grad():
        again, by_name = fx.map_arg(
            (node.args, node.kwargs), lambda n: getattr(root, str(n.target))
        )
        if op == "call_method":
            result = getattr(again[0], target)(*again[1:], **by_name)
        else:
            call = root.get_submodule(target) if op == "call_module" else target
            result = call(*again, **by_name)
    written = [
        not torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(before, tensors, strict=True)
    ]
    return list(contradictions(Calls(root), graph, node, tensors, result, any(written)))


def is_integral(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex


def contradictions(
    calls: Calls, graph: fx.Graph, node: fx.Node, tensors: list[Tensor], result: Any, written: bool
) -> Iterator[str]:
    called = calls.of(node)
    assert called is not None
    if called.arguments is None:
        yield "its arguments do not fit"
    kind = value_type(calls, node)
    if kind is not None and not isinstance(result, kind):
        yield f"a {kind.__name__}, not a {type(result).__name__}"
    does = effect(calls, node)
    memory = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
    results = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.numel()]
    if not does.touched and any(t.untyped_storage().data_ptr() in memory for t in results):
        yield "memory of its own"
    if written and not does.writes:
        yield "it writes nothing"
    if isinstance(result, Tensor):
        dtype, integral = Dtypes(graph, calls).of(node), is_integral(result.dtype)
        if dtype is not None and (is_integral(dtype) != integral):
            yield f"{dtype}, not {result.dtype}"
        if dtype is None and integral:
            yield f"no dtype, though it is {result.dtype}"
        if dtype is not None and not integral and dtype != result.dtype:
            yield f"{dtype}, not {result.dtype}"
    ranks = Ranks(graph, calls)
    channels = Channels(graph, calls, ranks.rank)
    for value, real in zip((node, *node.all_input_nodes), (result, *tensors), strict=False):
        if not isinstance(real, Tensor):
            continue
        if ranks.rank(value) not in (None, real.dim()):
            yield f"rank {ranks.rank(value)}, not {real.dim()}"
        for axis in range(-real.dim(), 0):
            size = channels.of(value, axis)
            if size not in (None, real.shape[axis]):
                yield f"size {size} at {axis} of {tuple(real.shape)}"
    if called.op.elementwise and isinstance(result, Tensor) and result.shape != tensors[0].shape:
        yield "element by element"


pytest.importorskip("expecttest")  # torch.testing needs it
# They would forbid every other test of this process to set torch.backends' flags.
with mock.patch.object(torch.backends, "disable_global_flags"):
    internal = importlib.import_module("torch.testing._internal.common_methods_invocations")
    modules = importlib.import_module("torch.testing._internal.common_modules")
MOST_SAMPLES = 25


def spellings(name: str) -> list[tuple[str, Any]]:
    """A function of torch, one of torch.nn.functional and a method of this name, if known."""
    functions = {getattr(home, name, None) for home in (torch, F)}
    found: list[tuple[str, Any]] = [("call_function", f) for f in functions if f in FUNCTIONS]
    return found + ([("call_method", name)] if name in METHODS else [])


INFOS = [
    info
    for info in internal.op_db
    if info.name.partition(".")[0]
    not in ("linalg", "fft", "special", "_refs", "masked", "sparse", "einsum")
    and spellings(info.name.rpartition(".")[2])
    and info.dtypes
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "info", INFOS, ids=lambda info: f"{info.name} {info.variant_test_name}".strip()
)
def test_what_a_call_does(info: Any) -> None:
    dtype = torch.float32 if torch.float32 in info.dtypes else min(info.dtypes, key=str)
    samples = list(itertools.islice(info.sample_inputs("cpu", dtype), MOST_SAMPLES))
    ran, found = 0, []
    for sample, (op, target) in itertools.product(samples, spellings(info.name.rpartition(".")[2])):
        try:
            args = (sample.input, *sample.args)
            answer = judge(target, op, args, dict(sample.kwargs), nn.Module())
        except (RuntimeError, TypeError, NotImplementedError, AssertionError, IndexError):
            continue  # a sample for another spelling
        ran += 1
        found += [f"{target}{args} {sample.kwargs}: {each}" for each in answer]
    assert not found, found[:3]
    assert ran or info.name in NOT_RUN


# Their samples are for functions that take more than a tensor first, or that torch.testing wraps.
NOT_RUN: set[str] = set()

# The random samples of some have a dtype of their own.
KINDS = [
    info
    for info in modules.module_db
    if info.module_cls in CLASSES and "Fractional" not in info.name
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("info", KINDS, ids=lambda info: info.name)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_what_a_module_does(info: Any, training: bool) -> None:
    found = []
    for sample in info.module_inputs_func(info, "cpu", torch.float32, False, training)[
        :MOST_SAMPLES
    ]:
        root = nn.Module()
        made, given = sample.constructor_input, sample.forward_input
        root.layer = info.module_cls(*made.args, **made.kwargs).train(training)
        if not all(isinstance(arg, Tensor) for arg in (*given.args, *given.kwargs.values())):
            continue
        answer = judge("layer", "call_module", given.args, given.kwargs, root)
        several = len(given.args) + len(given.kwargs) > 1
        found += [
            f"{root.layer} {[t.shape for t in given.args]}: {each}"
            for each in answer
            if not (several and each == "its arguments do not fit")
        ]
    assert not found, found[:3]


# --- one entry is all it takes -------------------------------------------------------------------


@pytest.fixture
def added() -> Iterator[Callable[[Op], None]]:
    """Adds operators for one test."""
    tables: tuple[dict[Any, Any], ...] = (
        FUNCTIONS,
        METHODS,
        CLASSES,
        OPS,
    )
    before = [dict(each) for each in tables]
    yield register
    for each, old in zip(tables, before, strict=True):
        each.clear()
        each.update(old)


class Inception(nn.Module):
    """Two convolutions of one value, each followed by a function that torch calls pointwise."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(64, 4, 1), nn.Conv2d(64, 4, 1)
        self.c, self.d = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 1)
        self.function = function

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.function(x)  # thrown away
        y, z = self.function(self.a(x)), self.function(self.b(x))
        return self.c(y), self.d(z)


def calls_of(model: nn.Module, function: Any) -> int:
    return sum(node.target is function for node in model.graph.nodes)


def test_an_operator_added_from_outside(added: Callable[[Op], None]) -> None:
    """One word: nobody misses it where nobody reads it, and it is run once for both siblings."""
    model, x = Inception(torch.i0).eval(), torch.rand(2, 64, 6, 6)
    expected = model(x)
    assert calls_of(fxrep.optimize(model), torch.i0) == 3
    added(elementwise("i0"))
    optimized = fxrep.optimize(model)
    assert calls_of(optimized, torch.i0) == 1
    for a, b in zip(optimized(x), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_an_operator_of_ones_own_library(added: Callable[[Op], None]) -> None:
    with torch.library._scoped_library("fxrep_test", "DEF") as library:
        library.define("swish(Tensor x) -> Tensor")
        library.impl("swish", lambda x: x * torch.sigmoid(x), "CompositeImplicitAutograd")
        swish = torch.ops.fxrep_test.swish
        model, x = Inception(swish).eval(), torch.rand(2, 64, 6, 6)
        expected = model(x)
        added(elementwise("torch.ops.fxrep_test.swish"))
        optimized = fxrep.optimize(model)
        assert calls_of(optimized, swish) == 1
        for a, b in zip(optimized(x), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_an_operator_that_torch_does_not_have() -> None:
    with pytest.raises(fxrep.OptionError, match=r"op\.names='swish'.*torch\.ops\.library\.name"):
        register(Op("swish"))
    with pytest.raises(fxrep.OptionError, match=r"op\.parameters='input, x y z=,'"):
        register(elementwise("i0", "input, x y z=,"))


def test_reads_of_metadata() -> None:
    """The size is that of all values of one shape; rank and dtype are those of a region."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    calls = Calls(nn.Module())
    read = {
        "size": Reads.SIZES, "numel": Reads.SIZES, "dim": Reads.KIND, "element_size": Reads.KIND,
        "stride": Reads.LAYOUT, "sum": Reads.VALUES,
    }  # fmt: skip
    assert {name: calls.reads(graph.call_method(name, (x,))) for name in read} == read
    shape = graph.call_function(getattr, (x, "shape"))
    assert calls.reads(shape) is Reads.SIZES
    assert calls.reads(graph.call_function(getattr, (x, "grad"))) is Reads.VALUES
