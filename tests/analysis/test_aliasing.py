"""In-place operations: which values may be rewritten, and which must be left alone."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxrep.analysis import aliasing
from fxrep.analysis.aliasing import Aliasing
from fxrep.capture.islands import capture
from fxrep.ops.calls import Calls

_Forward = Callable[[Any, Any], Any]


class Writes(nn.Module):
    """A module that traces cannot look into: it writes its input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x.add_(1)
        return x * 2


class Net(nn.Module):
    def __init__(self, forward: _Forward) -> None:
        super().__init__()
        self.written = forward
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(inplace=True)
        self.act = nn.ReLU()
        self.opaque = Writes()
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x: Any) -> Any:
        return self.written(self, x)


def known(forward: _Forward) -> tuple[Aliasing, dict[str, fx.Node]]:
    program = capture(Net(forward).eval()).programs[0]
    nodes = {node.name: node for node in program.graph.nodes}
    return aliasing.analyse(program.graph, Calls(program.module)), nodes


def add_to_alias(s: Any, x: Any) -> Any:
    a = s.conv(x)
    b = a
    b += x
    return a * 1


def later_write(s: Any, x: Any) -> Any:
    y = s.conv(x)
    z = y * 2
    y += x
    return y + z


def write_through_other_name(s: Any, x: Any) -> Any:
    y = s.conv(x)
    z = y
    z += x
    return y * 2


def view_before_write(s: Any, x: Any) -> Any:
    y = s.conv(x)
    v = y.flatten(2)
    y.add_(1)
    return v * 1


def view_of_result(s: Any, x: Any) -> Any:
    y = s.conv(x)
    y = y.add_(1)
    return y.flatten(2)


def write_through_view(s: Any, x: Any) -> Any:
    y = s.conv(x)
    y.view(-1).mul_(2)
    return y


def write_input(s: Any, x: Any) -> Any:
    x += 1
    return s.conv(x)


def write_view_of_input(s: Any, x: Any) -> Any:
    return s.conv(x.transpose(2, 3).relu_())


def write_parameter(s: Any, x: Any) -> Any:
    s.scale.mul_(2)
    return x * s.scale


def write_buffer_view(s: Any, x: Any) -> Any:
    s.count[:2].add_(1)
    return x * s.count.view(1, 4, 1, 1)


def dropout_is_an_alias(s: Any, x: Any) -> Any:
    y = s.bn(s.conv(x))
    z = s.drop(y)
    z.mul_(2)
    return y + z


def dropout_inplace_is_no_write(s: Any, x: Any) -> Any:
    y = s.bn(s.conv(x))
    z = s.drop(y)
    return y + z


def partial_write(s: Any, x: Any) -> Any:
    y = s.conv(x)
    y[:, 0] = 1
    return s.bn(y)


def unused_statement(s: Any, x: Any) -> Any:
    y = s.conv(x)
    F.relu_(y)
    return s.bn(y)


def inplace_argument(s: Any, x: Any) -> Any:
    y = s.conv(x)
    F.relu(y, True)
    return s.bn(y)


def one_module_two_sites(s: Any, x: Any) -> Any:
    safe = s.relu(s.bn(s.conv(x)))
    y = s.conv(safe)
    unsafe = s.relu(y)
    return y * 2 + unsafe


def write_one_chunk(s: Any, x: Any) -> Any:
    y = s.conv(x)
    a, b = y.chunk(2, 1)
    a.add_(1)
    return b + y.sum()


def out_argument(s: Any, x: Any) -> Any:
    y = s.conv(x)
    torch.mul(x, 2, out=y)
    return y


def old_value_is_an_output(s: Any, x: Any) -> Any:
    y = s.conv(x)
    return s.relu(y), y


def old_view_is_an_output(s: Any, x: Any) -> Any:
    y = s.conv(x)
    v = y[:, :2]
    return s.relu(y), {"view": v}


def written_by_a_module(s: Any, x: Any) -> Any:
    y = s.bn(s.conv(x))
    z = s.opaque(y)
    return y + z


def shape_read_after_write(s: Any, x: Any) -> Any:
    y = s.bn(s.conv(x))
    z = s.relu(y)
    return z.view(y.shape[0], y.size(1), -1)


def chain_of_writes(s: Any, x: Any) -> Any:
    y = s.bn(s.conv(x))
    y += x
    y *= 2
    return s.relu(y) + 1


def einsum_is_a_view(s: Any, x: Any) -> Any:
    y = s.conv(x)
    v = torch.einsum("abcd->abdc", y)
    y.add_(1)
    return v * 1


def other_operand_is_kept(s: Any, x: Any) -> Any:
    y, z = s.conv(x), s.bn(x)
    y += z
    return y * z


# forward, pinned values, those of them that may still be replaced, other replaceable writes
TABLE = [
    (add_to_alias, "conv iadd", "conv", ""),
    (later_write, "", "", "iadd"),
    (write_through_other_name, "conv iadd", "conv", ""),
    (view_before_write, "flatten add_", "", ""),
    (view_of_result, "", "", "add_"),
    (write_through_view, "conv view mul_", "conv", ""),
    (write_input, "x iadd", "", ""),
    (write_view_of_input, "x transpose relu_", "", ""),
    (write_parameter, "scale mul_", "", ""),
    (dropout_is_an_alias, "bn drop mul_", "bn", ""),
    (dropout_inplace_is_no_write, "", "", "drop"),
    (partial_write, "conv setitem", "conv", ""),
    (unused_statement, "conv relu_", "conv", ""),
    (inplace_argument, "conv relu", "conv", ""),
    (one_module_two_sites, "conv_1 relu_1", "conv_1", "relu"),
    (write_one_chunk, "conv chunk getitem getitem_1 add_", "conv", ""),
    (out_argument, "conv mul", "conv", ""),
    (old_value_is_an_output, "conv relu", "conv", ""),
    (old_view_is_an_output, "getitem relu", "", ""),
    (written_by_a_module, "bn opaque", "bn", ""),
    (shape_read_after_write, "", "", "relu"),
    (chain_of_writes, "", "", "iadd imul relu"),
    (einsum_is_a_view, "einsum add_", "", ""),
    (other_operand_is_kept, "", "", "iadd"),
]


@pytest.mark.parametrize(
    ("forward", "pinned", "replaceable", "writes"), TABLE, ids=[row[0].__name__ for row in TABLE]
)
def test_writes(forward: _Forward, pinned: str, replaceable: str, writes: str) -> None:
    found, nodes = known(forward)
    expected = set(pinned.split())
    values = {name: node for name, node in nodes.items() if node.op != "output"}
    calls = {n for n in expected if n not in ("x", "scale") and n != "opaque"}
    assert {name for name, node in values.items() if found.pinned(node)} - {"opaque"} == (
        expected - {"opaque"}
    )
    kept = {name for name in calls if not found.replaceable(nodes[name])}
    assert kept == calls - set(replaceable.split())
    assert all(found.replaceable(nodes[name]) for name in writes.split())


def test_attributes_written_through_views_and_under_other_names() -> None:
    found, nodes = known(write_buffer_view)
    assert found.writes_attribute(nodes["count"])
    found, nodes = known(write_parameter)
    assert found.writes_attribute(nodes["scale"])
    found, nodes = known(lambda s, x: x * s.scale)
    assert not found.writes_attribute(nodes["scale"])


def test_tied_tensors_are_one() -> None:
    model = nn.Module()
    model.a = nn.Parameter(torch.ones(3))
    model.register_buffer("b", model.a.detach()[:1])
    graph = fx.Graph()
    x, a, b = graph.placeholder("x"), graph.get_attr("a"), graph.get_attr("b")
    graph.call_method("add_", (b, 1))
    graph.output(graph.call_function(torch.mul, (x, a)))
    found = aliasing.analyse(graph, Calls(model))
    assert found.writes_attribute(a)
    assert not found.replaceable(b)


def test_statistics_updated_by_batch_norm_are_written() -> None:
    model = nn.BatchNorm2d(4)
    graph = fx.Graph()
    x, mean, var = (
        graph.placeholder("x"), graph.get_attr("running_mean"), graph.get_attr("running_var")
    )  # fmt: skip
    y = graph.call_function(F.batch_norm, (x, mean, var), {"training": True})
    z = graph.call_function(F.batch_norm, (y, mean, var), {"training": False})
    graph.output(z)
    found = aliasing.analyse(graph, Calls(model))
    assert found.writes_attribute(mean)
    assert not found.replaceable(y)
    assert not found.pinned(z)


def test_statistics_updated_by_batch_norm_in_cpp_are_written_and_nothing_else() -> None:
    model = nn.BatchNorm2d(4)
    graph = fx.Graph()
    names = ("weight", "bias", "running_mean", "running_var")
    x = graph.placeholder("x")
    weight, bias, mean, var = map(graph.get_attr, names)
    args = (x, weight, bias, mean, var, True, 0.1, 1e-5, False)
    graph.output(graph.call_function(torch.batch_norm, args))
    found = aliasing.analyse(graph, Calls(model))
    written = [found.writes_attribute(node) for node in (weight, bias, mean, var)]
    assert written == [False, False, True, True]


def test_a_module_in_training_mode_writes_its_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    graph = fx.Graph()
    x = graph.placeholder("x")
    mean, weight = graph.get_attr("0.running_mean"), graph.get_attr("1.weight")
    y = graph.call_module("0", (x,))
    graph.output((y, mean, graph.call_module("1", (y,)), weight))
    found = aliasing.analyse(graph, Calls(model))
    assert found.writes_attribute(mean)
    assert not found.writes_attribute(weight)
    found = aliasing.analyse(graph, Calls(model.eval()))
    assert not found.writes_attribute(mean)


def test_two_arguments_may_be_one_tensor() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    double = graph.call_function(torch.mul, (y, 2))
    graph.call_method("add_", (x, 1))
    root = graph.call_function(torch.mul, (double, 3))
    graph.output(root)
    found = aliasing.analyse(graph, Calls(nn.Module()))
    assert found.writes_between(double, root, [y])


def test_a_module_may_keep_what_it_returns() -> None:
    found, nodes = known(lambda s, x: s.relu(s.opaque(s.conv(x))))
    assert not found.replaceable(nodes["relu"])
    assert not found.pinned(nodes["conv"])


def test_writes_between() -> None:
    found, nodes = known(later_write)
    conv, mul, iadd, add = (nodes[name] for name in ("conv", "mul", "iadd", "add"))
    assert found.writes_between(conv, add, [conv])
    assert found.writes_between(mul, add, [nodes["x"], conv])
    assert not found.writes_between(conv, iadd, [conv])
    assert not found.writes_between(conv, add, [nodes["x"], mul])
    assert not found.writes_between(conv, add, [conv], dying={iadd})
    assert not found.writes_between(iadd, add, [conv])
    assert found.writes_between(iadd, add, [conv], dying=set())


def test_written() -> None:
    """Stored in place of a constant expression, the value would change with every call."""
    found, nodes = known(lambda s, x: (s.scale * 2).add_(x))
    assert found.written(nodes["mul"])
    assert not found.pinned(nodes["mul"])
    assert not found.written(nodes["add_"])


def test_a_new_node_is_written_by_what_writes_it_now() -> None:
    program = capture(Net(unused_statement).eval()).programs[0]
    graph = program.graph
    found = aliasing.analyse(graph, Calls(program.module))
    conv = next(node for node in graph.nodes if node.name == "conv")
    with graph.inserting_before(conv):
        fresh = graph.call_module("conv", conv.args)
        other = graph.call_module("conv", conv.args)
    conv.replace_all_uses_with(fresh)
    graph.erase_node(conv)
    assert found.stale(fresh) and found.written(fresh) and found.pinned(fresh)
    assert found.replaceable(fresh)
    assert not found.pinned(other) and not found.written(other)
    bn = next(node for node in graph.nodes if node.name == "bn")
    assert found.writes_between(fresh, bn, [fresh])
    writer = next(node for node in graph.nodes if node.name == "relu_")
    graph.erase_node(writer)
    assert not found.pinned(fresh)


# --- the property ----------------------------------------------------------------------------
# A random little program with views and writes is edited as a rewrite would edit it, wherever the
# analysis allows it, and must still compute the same and leave its input and tensors the same.


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), requires_grad=False)
        self.drop = nn.Dropout()
        self.opaque = Mutates()


class Mutates(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(3)
        return x.view(-1, 4)


_PURE = {
    "add": lambda g, a, b: g.call_function(torch.add, (a, b)),
    "double": lambda g, a, b: g.call_function(operator.mul, (a, 2)),
}
_WRITES = {
    "iadd": lambda g, a, b: g.call_function(operator.iadd, (a, b)),
    "add_": lambda g, a, b: g.call_method("add_", (a, b)),
    "mul_": lambda g, a, b: g.call_method("mul_", (a, 2)),
    "out": lambda g, a, b: g.call_function(torch.mul, (a, 2), {"out": a}),
}
_ALIASES = {
    "drop": lambda g, a, b: g.call_module("drop", (a,)),
    "contiguous": lambda g, a, b: g.call_method("contiguous", (a,)),
    "view": lambda g, a, b: g.call_method("view", (a, -1, 4)),
}
_OTHER = {
    "row": lambda g, a, b: g.call_function(operator.getitem, (a, slice(0, 1))),
    "chunk": lambda g, a, b: g.call_function(operator.getitem, (g.call_method("chunk", (a, 1)), 0)),
    "setitem": lambda g, a, b: g.call_function(operator.setitem, (a, slice(0, 1), 9.0)),
    "opaque": lambda g, a, b: g.call_module("opaque", (a,)),
}
_ALL = {**_PURE, **_WRITES, **_ALIASES, **_OTHER}


@st.composite
def programs(draw: st.DrawFn) -> fx.Graph:
    graph = fx.Graph()
    values = [graph.placeholder("x"), graph.placeholder("y"), graph.get_attr("p")]
    rows = {value: 2 for value in values}
    for _ in range(draw(st.integers(2, 9))):
        kind = draw(st.sampled_from(sorted(_ALL)))
        a, b = draw(st.sampled_from(values[-3:])), draw(st.sampled_from(values))
        if kind in ("iadd", "add_") and rows[b] > rows[a]:
            a, b = b, a
        node = _ALL[kind](graph, a, b)
        if kind != "setitem":
            rows[node] = 1 if kind == "row" else max(rows[a], rows[b] if kind == "add" else 0)
            values.append(node)
    graph.output(tuple(values[-3:]))
    return graph


def _fresh(graph: fx.Graph, node: fx.Node, operands: dict[fx.Node, fx.Node]) -> fx.Node:
    """The out-of-place operation that a node may be read as."""
    a, *rest = [operands.get(n, n) if isinstance(n, fx.Node) else n for n in node.args]
    name = str(getattr(node.target, "__name__", node.target))
    if name in ("add", "iadd", "add_"):
        return graph.call_function(torch.add, (a, rest[0]))
    if name in ("mul", "mul_"):
        return graph.call_function(torch.mul, (a, rest[0]))
    return graph.call_function(torch.mul, (a, 1))


def _linear(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    return name in ("add", "iadd", "add_", "mul", "mul_", "drop", "contiguous", "view")


def rewrite(graph: fx.Graph, found: Aliasing, root: fx.Node, deep: Callable[[], bool]) -> bool:
    """Compute `root` anew from earlier values, as a collapse does, if that is allowed."""
    if not _linear(root) or not found.replaceable(root):
        return False
    expanded = {root}
    while True:
        sources = {s for n in expanded for s in n.all_input_nodes} - expanded
        more = [s for s in sorted(sources) if _linear(s) and not found.pinned(s)]
        if not more or not deep():
            break
        expanded.add(more[-1])
    order = sorted(expanded)
    dying = {root}
    for node in reversed(order[:-1]):
        if all(user in dying for user in node.users):
            dying.add(node)
    if found.writes_between(order[0], root, sources, dying):
        return False
    made: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(root):
        for node in order:
            made[node] = _fresh(graph, node, made)
    root.replace_all_uses_with(made[root])
    for node in reversed(order):
        if node in dying:
            graph.erase_node(node)
    return True


def run(graph: fx.Graph, same: bool) -> list[Tensor]:
    module = Stage().eval()
    x = torch.arange(8.0).view(2, 4)
    y = x if same else x + 10
    try:
        outputs = fx.GraphModule(module, graph)(x, y)
    except RuntimeError as error:
        return [torch.tensor(hash(str(error))).view(1)]
    return [*outputs, x, y, module.p]


@given(
    programs(),
    st.randoms(use_true_random=False),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(),
)
def test_rewriting_what_is_allowed_changes_nothing(
    program: fx.Graph, random: Random, depth: float, same: bool
) -> None:
    expected = run(copy.deepcopy(program), same)
    found = aliasing.analyse(program, Calls(Stage().eval()))
    roots = [n for n in program.nodes if n.op not in ("placeholder", "get_attr", "output")]
    for root in reversed(roots) if random.random() < 0.5 else roots:
        if not root._erased and random.random() < 0.8:
            rewrite(program, found, root, lambda: random.random() < depth)
    program.lint()
    got = run(copy.deepcopy(program), same)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b), program
