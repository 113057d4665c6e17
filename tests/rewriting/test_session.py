"""What a pass may answer, and what happens when it answers wrongly, raises, or breaks a graph."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxrep
from fxrep import Drop, FxrepError, Joint, Pass, PassError, Refusal, Same
from support.check import check
from support.models import Body, conv

SHAPES = ((2, 8, 6, 5), (1, 8, 5, 7))


def model_of(forward: Any) -> nn.Module:
    parts = {"a": conv(), "b": conv(padding=1), "hooked": nn.Tanh(), "over": nn.ReLU(inplace=True)}
    parts["hooked"].register_forward_hook(lambda _m, _args, output: output)
    return Body(forward, **parts).eval()


def at(target: str, answer: Any) -> Pass:
    """A pass that answers for one kind of node."""

    def propose(view: Any, node: fx.Node, cost: Any) -> Any:
        name = getattr(node.target, "__name__", node.target)
        return answer(view, node) if name == target else None

    return Pass("mine", propose)


def relu_of_conv() -> nn.Module:
    return model_of(lambda m, x: m.a(x).relu().tanh())


# --- errors --------------------------------------------------------------------------------------


def _raises(view: Any, node: fx.Node) -> Any:
    raise KeyError("nothing there")


def _raises_own(view: Any, node: fx.Node) -> Any:
    raise fxrep.ModelError("of mine")


def _other_graph(view: Any, node: fx.Node) -> Any:
    return fx.Graph().placeholder("x")


WRONG: dict[str, tuple[str, Any, str]] = {
    "raises": ("relu", _raises, "KeyError: 'nothing there'"),
    "a string": ("relu", lambda v, n: "drop it", "its answer 'drop it' is none of Plan, Fold"),
    "True": ("relu", lambda v, n: True, "its answer True is none of"),
    "a node that is read": ("a", lambda v, n: Drop(n, "conv"), "cannot be dropped: relu reads it"),
    "another": ("relu", lambda v, n: Drop(next(iter(v.graph.nodes)), "x"), "answered for x"),
    "a node of another graph": (
        "relu", lambda v, n: Drop(_other_graph(v, n), "x"), "answered for x",
    ),
    "a later value": (
        "relu", lambda v, n: Same(n, next(iter(n.users))), "tanh that is to be read instead is no",
    ),
    "itself": ("relu", lambda v, n: Same(n, n), "relu that is to be read instead is no earlier"),
    "the output": (
        "output", lambda v, n: Same(n, n.all_input_nodes[0]), "of a graph has no equal",
    ),
    "a value of another graph": (
        "relu", lambda v, n: Same(n, _other_graph(v, n)), "is no earlier node",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_error_names_the_pass_and_the_node(name: str) -> None:
    target, answer, message = WRONG[name]
    with pytest.raises(PassError, match="pass 'mine' failed at node '") as caught:
        fxrep.optimize(relu_of_conv(), passes=[at(target, answer)])
    assert message in str(caught.value)
    assert f"target={target}" in str(caught.value) or "graph" in message or "put" in name
    assert isinstance(caught.value, FxrepError)


def test_the_exception_of_the_pass_is_the_cause() -> None:
    with pytest.raises(PassError) as caught:
        fxrep.optimize(relu_of_conv(), passes=[at("relu", _raises)])
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_module_is_named_by_its_path() -> None:
    model = nn.Sequential(nn.Sequential(conv(), nn.ReLU())).eval()
    with pytest.raises(PassError, match=r"pass 'mine' failed at node '0\.1' \(%\w+ : "):
        fxrep.optimize(model, passes=[at("0.1", _raises)])


def test_errors_of_fxrep_pass_as_they_are() -> None:
    with pytest.raises(fxrep.ModelError, match=r"^of mine$"):
        fxrep.optimize(relu_of_conv(), passes=[at("relu", _raises_own)])


def test_passes_that_undo_each_other_are_named() -> None:
    def propose(view: Any, node: fx.Node, cost: Any) -> Any:
        return Joint(node, ()) if node.op == "output" else None  # carried out, of no effect

    with pytest.raises(PassError, match="the passes endless keep rewriting"):
        fxrep.optimize(relu_of_conv(), passes=[Pass("endless", propose)])


# --- broken graphs -------------------------------------------------------------------------------


def _dangling(view: Any, node: fx.Node) -> None:
    node.args = (fx.Graph().placeholder("nowhere"),)


def _too_early(view: Any, node: fx.Node) -> None:
    node.args = (next(iter(node.users)),)


def _no_module(view: Any, node: fx.Node) -> None:
    with view.graph.inserting_before(node):
        node.args = (view.graph.call_module("missing.part", node.args),)


def _no_tensor(view: Any, node: fx.Node) -> None:
    with view.graph.inserting_before(node):
        node.args = (view.graph.get_attr("a.nothing"),)


@pytest.mark.filterwarnings("ignore:Attempted to insert")
@pytest.mark.parametrize("broken", [_dangling, _too_early, _no_module, _no_tensor])
def test_a_broken_graph_is_not_handed_back(broken: Any) -> None:
    with pytest.raises(PassError, match="the graph of the model is broken"):
        fxrep.optimize(relu_of_conv(), passes=[at("relu", broken)])


def test_torch_compile_says_what_a_pass_did_and_runs_the_model_as_it_is(caplog: Any) -> None:
    model = relu_of_conv()
    compiled = torch.compile(
        model,
        backend="fxrep",
        options={"inner": "eager", "passes": [at("relu", _raises)]},  # type: ignore[dict-item]
    )
    x = torch.randn(2, 8, 6, 5)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="fxrep"):
        assert torch.equal(compiled(x), model(x))
    assert "PassError: pass 'mine' failed at node 'relu'" in caplog.text


def test_dynamo_may_trace_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever size a pass asked for: dynamo's wish passes as it is."""
    backend = importlib.import_module("fxrep.torch_compile.backend")
    exc = importlib.import_module("torch._dynamo.exc")

    def fails(*_: Any) -> None:
        raise PassError("pass 'mine' failed") from exc.RestartAnalysis()

    monkeypatch.setattr(backend, "weight_inputs", lambda gm, inputs: {0: None})
    monkeypatch.setattr(backend, "Folded", fails)
    graph = fx.symbolic_trace(nn.Identity())
    with torch.no_grad(), pytest.raises(exc.RestartAnalysis):
        backend.compile_graph(graph, [torch.ones(1)], options={"inner": "eager"})


# --- Same ----------------------------------------------------------------------------------------


def earlier(target: str, itself: bool = False) -> Pass:
    """Says of a kind of node that it computes its first operand."""
    return at(target, lambda view, node: Same(node, node.args[0], itself=itself))


def twice(m: Any, x: Tensor) -> Tensor:
    return m.a(x).relu().relu()


def test_readers_read_the_earlier_value() -> None:
    second = at("relu", lambda v, n: Same(n, n.args[0]) if n.args[0].target == "relu" else None)
    optimized = check(model_of(twice), SHAPES, passes=[second], operations=2, rewrites=1)
    (rewrite,) = fxrep.report(optimized).rewrites
    assert (rewrite.pass_name, rewrite.before, rewrite.after) == ("mine", ("relu",), ())


@pytest.mark.parametrize("over", [lambda m, y: y.relu_(), lambda m, y: m.over(y)])
def test_a_write_that_changes_nothing_is_removed(over: Any) -> None:
    """``y = relu(a); y.relu_()``: the value was that already, whoever reads it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        z = over(m, y)
        return y.tanh() + z

    def propose(view: Any, node: fx.Node, cost: Any) -> Any:
        called = view.calls.of(node)
        clamps = called is not None and called.op.name == "relu" and called.source.target == "relu"
        return Same(node, called.source) if clamps else None

    check(model_of(forward), SHAPES, passes=[Pass("mine", propose)], rewrites=1, again=False)


REFUSED: dict[str, tuple[Any, str, str]] = {
    "it writes another": (
        lambda m, x: (y := m.a(x), torch.abs(y, out=torch.empty_like(y)).tanh())[1],
        "abs", "in place",
    ),
    "a part was written before": (
        lambda m, x: (y := m.a(x), y[:, :2].add_(1), y.abs())[2], "abs", "written in place before",
    ),
    "a slice": (lambda m, x: m.a(x)[:, :2].abs().tanh(), "abs", "gaps in memory"),
    "a hook": (lambda m, x: m.hooked(m.a(x)).tanh(), "hooked", "hooks that are not torch's"),
    "it is written later": (
        lambda m, x: (y := m.a(x), z := y.abs(), z.add_(1), y + z)[3], "abs", "written in place",
    ),
    "the value is written later": (
        lambda m, x: (y := m.a(x), z := y.abs(), y[:, :2].add_(1), y + z)[3],
        "abs", "written in place",
    ),
    "it is returned": (lambda m, x: (y := m.a(x), y.abs()), "abs", "the caller would get"),
    "the input is returned": (lambda m, x: x.abs(), "abs", "gaps in memory"),
    "a weight is returned": (lambda m, x: (m.a(x), m.a.weight.abs()), "abs", "gaps in memory"),
    "a view of it is returned": (
        lambda m, x: (y := m.a(x), y.abs().view(-1)), "abs", "the caller would get",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_same_is_refused(name: str) -> None:
    """Whatever the pass believes: here it is wrong, and the result right all the same."""
    forward, target, reason = REFUSED[name]
    check(
        model_of(forward), SHAPES, passes=[earlier(target)], rewrites=0,
        reasons=[reason], again=False,
    )  # fmt: skip


def test_the_very_same_tensor_may_be_returned() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return x, x.contiguous()

    optimized = fxrep.optimize(model_of(forward), passes=[earlier("contiguous", itself=True)])
    a, b = optimized(torch.ones(3))
    assert a is b


def test_a_write_behind_the_removed_copy_is_seen() -> None:
    """The copy's memory becomes the value's: who writes the one writes the other from now on."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = y.abs().abs()
        before = z * 2
        z.add_(1)
        return before + z

    second = at("abs", lambda v, n: Same(n, n.args[0]) if n.args[0].target == "abs" else None)
    check(model_of(forward), SHAPES, passes=[second, *fxrep.default_passes])


def test_a_refusal_of_the_driver_is_a_skip_of_the_pass() -> None:
    model = model_of(lambda m, x: (y := m.a(x), y.abs()))
    report = fxrep.report(fxrep.optimize(model, passes=[earlier("abs")]))
    skips = [(s.pass_name, s.where) for s in report.skipped if s.pass_name != "capture"]
    assert skips == [("mine", "abs_1")]


def test_a_refusal_of_a_pass_is_reported() -> None:
    no = at("relu", lambda view, node: Refusal("not today"))
    report = fxrep.report(fxrep.optimize(relu_of_conv(), passes=[no]))
    (skip,) = (s for s in report.skipped if s.pass_name != "capture")
    assert (skip.pass_name, skip.where, skip.reason) == ("mine", "relu", "not today")
