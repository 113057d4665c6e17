"""The effect of one node on memory: which operands it may share memory with, or write.

An unknown operation of torch counts as sharing the memory of all its operands. A module or function
that is not torch's own also counts as writing its operands and as keeping its result.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxrep.ops.calls import Called, Calls, is_function_of, is_torch, target_name
from fxrep.ops.op import Memory, Reads
from fxrep.ops.owner import owner
from fxrep.words import words


@dataclass(frozen=True)
class Effect:
    """The effect of a node on the memory of its operands.

    Attributes:
        aliases: operands whose memory the result may share.
        writes: operands whose memory the node may write.
        escapes: code outside the graph has, or may have, the result too.
        reshapes: the node changes the shape of the operands that it writes.
        own_state: the node calls a module that may write the module's own tensors.
    """

    aliases: tuple[fx.Node, ...] = ()
    writes: tuple[fx.Node, ...] = ()
    escapes: bool = False
    reshapes: bool = False
    own_state: bool = False

    @property
    def touched(self) -> tuple[fx.Node, ...]:
        """The operands whose memory the node shares or writes."""
        return self.aliases + self.writes if self is not _FRESH else ()


_FRESH = Effect()
_ESCAPES = Effect(escapes=True)


def effect(calls: Calls, node: fx.Node) -> Effect:
    """The effect of a node on memory, remembered by node."""
    known = calls.known(node)
    if known.effect is None:
        known.effect = _effect(calls, node)
    found: Effect = known.effect
    return found


def _effect(calls: Calls, node: fx.Node) -> Effect:
    if node.op in ("placeholder", "get_attr"):
        return _ESCAPES
    if node.op == "output":
        return _FRESH
    called = calls.of(node)
    if node.op == "call_module":
        found = _module_effect(calls, node, called)
    elif called is not None:
        found = _call_effect(node, called)
    else:
        found = _unknown_effect(node)
    if "out" in node.kwargs:
        out = _nodes(node.kwargs["out"])
        found = Effect((*found.aliases, *out), (*found.writes, *out), found.escapes, True)
    return found


def reads_no_values(calls: Calls, node: fx.Node) -> bool:
    """Whether a node reads at most the shape, strides, dtype or device of its operand."""
    return calls.reads(node) is not Reads.VALUES


def _module_effect(calls: Calls, node: fx.Node, called: Called | None) -> Effect:
    module, inputs = calls.submodule(str(node.target)), tuple(node.all_input_nodes)
    if called is None:
        known = owner(node, module) is not None
        return Effect(inputs) if known else Effect(inputs, inputs, escapes=True, own_state=True)
    source = _first(node)
    memory = called.op.memory
    if memory is Memory.DROPOUT and not module.training:
        return Effect(source)
    if writes_over(calls, node):
        return Effect(source, source)
    if memory is Memory.UPDATES:
        trains = module.training and isinstance(module, nn.modules.batchnorm._NormBase)
        renormalises = getattr(module, "max_norm", None) is not None
        return Effect(own_state=trains or renormalises)
    return _FRESH if memory is Memory.FRESH else Effect(source)


def _call_effect(node: fx.Node, called: Called) -> Effect:
    """The effect of a function, a method or an attribute that the table knows."""
    memory, source = called.op.memory, _first(node)
    if called.op.reads is not Reads.VALUES:
        return _FRESH
    if called.in_place:
        # requires_grad_ writes nothing. Other operators that give views, like squeeze_, reshape
        # their operand in place.
        known = called.op.name == "requires_grad"
        return Effect(source) if known else _written(node, reshapes=memory is Memory.VIEW)
    if memory is Memory.DROPOUT and called.get("training") is False:
        return Effect(source)
    if _inplace(node):
        return Effect(source, source)
    if memory is Memory.UPDATES:
        return Effect(writes=_updated(called))
    if memory is Memory.UNKNOWN:
        return Effect(tuple(node.all_input_nodes))
    return _FRESH if memory is Memory.FRESH else Effect(source)


def _unknown_effect(node: fx.Node) -> Effect:
    """The effect of a function, a method or an attribute that the table does not know."""
    inputs = tuple(node.all_input_nodes)
    target: Any = node.target
    if target is getattr:
        return Effect(_first(node))
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return _operator_effect(node, target)
    if is_function_of(node, "_operator"):
        return _FRESH
    if isinstance(target, type) or is_function_of(node, "builtins", "math"):
        return Effect(inputs)
    name = target_name(target)
    if not isinstance(target, str) and not is_torch(target):
        return Effect(inputs, inputs, escapes=True)
    if name.endswith("_") and not name.endswith("__"):
        return _written(node, reshapes=name in _RESHAPING)
    if _inplace(node):
        return Effect(_first(node), _first(node))
    if isinstance(target, str) and not hasattr(torch.Tensor, name):
        return Effect(inputs, inputs, escapes=True)
    return Effect(inputs)


_RESHAPING = words("resize_ resize_as_ set_ swap_ rename_ share_memory_")


def _written(node: fx.Node, *, reshapes: bool) -> Effect:
    """An operation that writes its first operand and gives it back.

    A few write others as well, as torch's schemas declare: ``_fused_adam_`` writes four lists.
    """
    inputs = tuple(node.all_input_nodes)
    written = tuple(dict.fromkeys((*(_first(node) or inputs), *_declared_writes(node))))
    kept = inputs if node.target in ("set_", "swap_") else written
    return Effect(kept, written, reshapes=reshapes)


def _declared_writes(node: fx.Node) -> tuple[fx.Node, ...]:
    """The operands that some overload of an operator declares that it writes."""
    return _nodes(
        [
            node.args[index] if index < len(node.args) else node.kwargs.get(argument)
            for index, argument in _written_arguments(target_name(node.target))
        ]
    )


@functools.cache
def _written_arguments(name: str) -> tuple[tuple[int, str], ...]:
    """The positions and names of the arguments that torch's operator of this name writes."""
    return tuple(
        sorted(
            (index, argument.name)
            for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}")
            for index, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
    )


def writes_over(calls: Calls, node: fx.Node) -> bool:
    """Whether a call of an operator writes its result over its first operand."""
    called = calls.of(node)
    if called is not None and called.module is not None:
        return getattr(called.module, "inplace", False) is True
    if called is not None:
        return called.in_place or _inplace(node)
    name = target_name(node.target)
    return node.op != "call_module" and name.endswith("_") and not name.endswith("__")


def _inplace(node: fx.Node) -> bool:
    """Whether the argument `inplace` of a function is true, or a value of the graph."""
    value = node.kwargs.get("inplace")
    if node.op == "call_function" and value is None:
        index = _parameter_index(node.target, "inplace")
        value = node.args[index] if index < len(node.args) else None
    return value is not None and value is not False


@functools.cache
def _parameter_index(function: Callable[..., Any], name: str) -> int:
    """The position of a parameter of a function written in Python; past the last if it has none."""
    if inspect.isfunction(function):
        names = list(inspect.signature(function).parameters)
        if name in names:
            return names.index(name)
    return sys.maxsize


def _operator_effect(node: fx.Node, target: torch._ops.OpOverload) -> Effect:
    """The effect that the schema of an ATen operator declares.

    A schema declares all writes, but not all sharing: the result counts as sharing memory with
    every operand.
    """
    names = [a.name for a in target._schema.arguments if a.alias_info and a.alias_info.is_write]
    indices = {argument.name: i for i, argument in enumerate(target._schema.arguments)}
    given = [
        node.kwargs[name] if name in node.kwargs else (node.args[indices[name] : indices[name] + 1])
        for name in names
    ]
    return Effect(tuple(node.all_input_nodes), _nodes(given))


def _updated(called: Called) -> tuple[fx.Node, ...]:
    """The operands that a function updates: running statistics, or a table it renormalises."""
    if called.arguments is None or called.get("max_norm") is not None:
        return tuple(called.node.all_input_nodes)
    return () if called.get("training") is False else statistics(called)


def statistics(called: Called) -> tuple[fx.Node, ...]:
    """The running mean and variance that a call of a normalisation is given."""
    values = (called.get("running_mean"), called.get("running_var"))
    return tuple(value for value in values if isinstance(value, fx.Node))


def _first(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes in the first argument, which a view shares and an in-place operation writes."""
    if node.args:
        return _nodes(node.args[0])
    for name in ("input", "self", "tensor", "tensors"):
        if name in node.kwargs:
            return _nodes(node.kwargs[name])
    return tuple(node.all_input_nodes)


def _nodes(value: Any) -> tuple[fx.Node, ...]:
    if isinstance(value, fx.Node):
        return (value,)
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return tuple(found)
