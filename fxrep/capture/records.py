"""Graphs in pickles: records of their nodes, which rebuild the same graph.

fx pickles the generated source and traces it again. That loses constant arguments and in-place
operators, which a Proxy cannot express.
"""

from __future__ import annotations

import collections
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class _NodeName:
    name: str


@dataclass(frozen=True)
class _TorchName:
    name: str


@dataclass(frozen=True)
class _NodeRecord:
    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    stack: Any
    wrapped: bool


def _name_of(node: fx.Node) -> Any:
    return _NodeName(node.name)


def encode(graph: fx.Graph) -> list[_NodeRecord]:
    """The graph as plain records."""
    records = []
    for node in graph.nodes:
        target = node.target
        if node.op == "call_function":
            target = _torch_name(target) or target
        args, kwargs = (_plain(fx.map_arg(entry, _name_of)) for entry in (node.args, node.kwargs))
        stack = [
            (key, (path, _type_name(kind)))
            for key, (path, kind) in node.meta.get("nn_module_stack", {}).items()
        ]
        wrapped = bool(node.meta.get("is_wrapped"))
        records.append(_NodeRecord(node.op, node.name, target, args, kwargs, stack, wrapped))
    return records


def decode(records: list[_NodeRecord]) -> fx.Graph:
    """The graph of the records that `encode` made."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def value(entry: Any) -> Any:
        if isinstance(entry, _NodeName):
            return made[entry.name]
        if type(entry) in (tuple, list):
            return type(entry)(value(item) for item in entry)
        if type(entry) is dict:
            return {key: value(item) for key, item in entry.items()}
        if type(entry) is slice:
            return slice(value(entry.start), value(entry.stop), value(entry.step))
        return entry

    for record in records:
        target = record.target
        if isinstance(target, _TorchName):
            target = operator.attrgetter(target.name)(torch)
        node = graph.create_node(
            record.op, target, value(record.args), value(record.kwargs), name=record.name
        )
        node.meta["nn_module_stack"] = collections.OrderedDict(record.stack)
        if record.wrapped:
            node.meta["is_wrapped"] = True
        made[record.name] = node
    return graph


def _plain(value: Any) -> Any:
    """The immutable containers of fx as ordinary ones."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) is tuple:
        return tuple(_plain(item) for item in value)
    if isinstance(value, slice):
        return slice(_plain(value.start), _plain(value.stop), _plain(value.step))
    return value


def _torch_name(target: Any) -> _TorchName | None:
    """The name of a function of torch, for builtins that pickle cannot find by itself."""
    home = getattr(target, "__module__", None) or "torch"
    name = getattr(target, "__name__", "")
    if home != "torch" and not home.startswith("torch."):
        return None
    for path in (name, f"{home[6:]}.{name}" if home != "torch" else name, f"nn.functional.{name}"):
        try:
            if operator.attrgetter(path)(torch) is target:
                return _TorchName(path)
        except AttributeError:
            continue
    return None


def _type_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
