"""Every cache of facts about a graph knows of every change that the editor makes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxrep.analysis.values import Examples
from fxrep.capture.islands import capture
from fxrep.reading.view import Affine
from fxrep.rewriting.part import Part
from fxrep.rewriting.preparing import prepared
from support.models import Body, conv


def part_of(forward: Callable[..., Any], **parts: Any) -> Part:
    """A graph as the passes get it."""
    captured = capture(Body(forward, **parts).eval(), None)
    (program,) = captured.programs
    return prepared(program, Examples(None).values(program))


def node_of(part: Part, target: object) -> fx.Node:
    (node,) = [each for each in part.program.graph.nodes if each.target == target]
    return node


def fill(part: Part) -> None:
    """Ask every question, so that every cache has an answer."""
    for node in part.program.graph.nodes:
        part.view.read(node)
        part.view.rank(node)
        part.view.channels.of(node, -3)
        part.view.constants[node] = False


def again(part: Part, scale: fx.Node) -> fx.Node:
    """The value of `scale`, computed by another node."""
    with part.program.graph.inserting_before(scale):
        return part.editor.make("call_function", torch.mul, scale.args)


def test_readers_are_read_anew_when_a_value_is_replaced() -> None:
    part = part_of(lambda m, x: m.b(m.a(x) * 2), a=conv(), b=conv())
    scale, layer = node_of(part, operator.mul), node_of(part, "b")
    fill(part)
    old = part.view.read(layer)
    new = again(part, scale)
    part.editor.replace(scale, new)
    part.editor.erase(scale)
    reading = part.view.read(layer)
    assert isinstance(old, Affine) and old.terms[0].operand is scale
    assert isinstance(reading, Affine) and reading.terms[0].operand is new
    assert layer not in part.view.constants


def test_facts_go_over_to_the_value_that_takes_the_place_of_another() -> None:
    part = part_of(lambda m, x: m.b(m.norm(x) * 2), b=conv(), norm=nn.BatchNorm2d(8))
    scale = node_of(part, operator.mul)
    fill(part)
    new = again(part, scale)
    assert part.view.rank(new) == (None, True)
    part.editor.replace(scale, new)
    assert part.view.rank(new) == (4, False)
    assert part.view.channels.of(new, -3) == 8


def test_facts_go_over_to_an_earlier_value() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        unknown = torch.special.erfcx(x)
        return unknown, m.b(m.norm(x))

    part = part_of(forward, b=conv(), norm=nn.BatchNorm2d(8))
    value, norm = node_of(part, torch.special.erfcx), node_of(part, "norm")
    fill(part)
    assert part.view.rank(value) == (None, True)
    part.editor.replace(norm, value)
    assert part.view.rank(value) == (4, False) and part.view.channels.of(value, -3) == 8


def test_a_reading_with_a_changed_part_inside_is_read_anew() -> None:
    """``shift(scale(x.flatten(0, -2))).view_as(x)`` is read as a whole."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x)
        return m.b((y.flatten(0, -2) * 2 + 1).view_as(y))

    part = part_of(forward, norm=nn.BatchNorm2d(8), b=nn.Linear(8, 8))
    whole = node_of(part, "view_as")
    scale = node_of(part, operator.mul)
    fill(part)
    old = part.view.read(whole)
    assert isinstance(old, Affine) and scale in old.absorbed
    fresh = again(part, scale)
    part.editor.replace(scale, fresh)
    part.editor.erase(scale)
    new = part.view.read(whole)
    assert isinstance(new, Affine) and fresh in new.absorbed and scale not in new.absorbed


def test_a_constant_is_decided_anew_below_a_change() -> None:
    part = part_of(lambda m, x: x * ((m.scale + 1) * 2).relu(), scale=nn.Parameter(torch.ones(8)))
    fill(part)
    add = node_of(part, operator.add)
    part.editor.inline(add, 3.0)
    assert not [n for n in part.view.constants if n.target == "relu"]


def test_an_installed_module_is_looked_up_anew() -> None:
    part = part_of(lambda m, x: m.a(x), a=conv())
    node = node_of(part, "a")
    assert part.view.submodule("a") is part.program.module.a
    part.view.derived["a.weight"] = part.view.stored("a.weight").expr
    new = conv(kernel=5)
    part.editor.install("a", new)
    assert part.view.submodule("a") is new and "a.weight" not in part.view.derived
    with part.program.graph.inserting_after(node):
        call = part.editor.make("call_module", "a", node.args)
    reading = part.view.read(call)
    assert isinstance(reading, Affine) and reading.weight is new.weight


def test_the_names_in_use_are_counted() -> None:
    part = part_of(lambda m, x: m.a(x), a=conv())
    names = part.editor.names
    node = node_of(part, "a")
    with part.program.graph.inserting_after(node):
        second = part.editor.make("call_module", "a", node.args)
    assert names.uses["a"] == 2
    part.editor.replace(node, second)
    part.editor.erase(node)
    assert names.uses["a"] == 1 and names.retired == {"a"}


def test_every_change_is_announced() -> None:
    """The editor has no way to a node but those that tell the listeners."""
    heard: list[fx.Node] = []

    class Listener:
        def invalidate(self, *nodes: fx.Node) -> None:
            heard.extend(nodes)

        def replacing(self, new: fx.Node, old: fx.Node) -> None: ...

        def installed(self, path: str) -> None: ...

    part = part_of(lambda m, x: m.a(x).relu() + 1, a=conv())
    part.editor.listeners.append(Listener())
    layer, relu = node_of(part, "a"), node_of(part, "relu")
    (add,) = relu.users
    part.editor.inline(relu, 1.0)
    assert {layer, relu, add} <= set(heard)


def test_a_written_value_is_read_after_its_write() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y.add_(1)
        return y.relu()

    part = part_of(forward, a=conv())
    assert node_of(part, "relu").args[0] is node_of(part, "add_")


def test_sizes_are_read_early() -> None:
    part = part_of(lambda m, x: x.view(-1, m.norm(x).size(1)), norm=nn.BatchNorm2d(8))
    (size,) = [n for n in part.program.graph.nodes if n.target == "size"]
    assert size.args[0] is not None and size.args[0].op == "placeholder"


@pytest.mark.parametrize("target", ["relu", "a"])
def test_an_erased_node_has_no_reading(target: str) -> None:
    part = part_of(lambda m, x: m.a(x).relu(), a=conv())
    node = node_of(part, target)
    fill(part)
    part.editor.replace(node, node.all_input_nodes[0])
    part.editor.erase(node)
    assert node not in part.view.readings and node not in part.view.constants
