"""The reader of each node, by its operator."""

from __future__ import annotations

from torch import fx

from fxrep.ops.owner import foreign_hooks, torch_class
from fxrep.ops.spellings import CLASSES
from fxrep.reading import layers, structure
from fxrep.reading.view import Reading, View
from fxrep.refusal import Refusal

_READERS = layers.READERS | structure.READERS


def read(view: View, node: fx.Node) -> Reading:
    """The reading of a node, however its operator is spelt."""
    called = view.calls.of(node)
    reader = None if called is None else _READERS.get(called.op.name)
    if called is None or reader is None:
        return _hooked(view, node) if node.op == "call_module" else None
    return None if called.arguments is None else reader(view, node, **called.arguments)


def _hooked(view: View, node: fx.Node) -> Reading:
    """The refusal of a layer that would have a reading without its hooks."""
    module = view.submodule(str(node.target))
    kind = torch_class(module)
    known = kind in CLASSES and CLASSES[kind].name in _READERS
    return Refusal("hook registered") if known and foreign_hooks(module) else None
