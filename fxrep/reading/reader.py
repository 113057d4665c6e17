"""The one table of spellings: which reader answers for which node."""

from __future__ import annotations

from torch import fx

from fxrep.ops.owner import foreign_hooks, known_class, torch_class
from fxrep.reading import layers as operators
from fxrep.reading import structure
from fxrep.reading.view import Reading, View, arguments
from fxrep.refusal import Refusal

_MODULES = operators.MODULES | structure.MODULES
_FUNCTIONS = operators.FUNCTIONS | structure.FUNCTIONS
_METHODS = operators.METHODS | structure.METHODS


def read(view: View, node: fx.Node) -> Reading:
    """What a node computes, by whatever name it is called."""
    if node.op == "call_module":
        return _read_module(view, node)
    if node.op == "call_function":
        spelling = _FUNCTIONS.get(node.target)
    else:
        spelling = _METHODS.get(str(node.target)) if node.op == "call_method" else None
    if spelling is None:
        return None
    bound = arguments(spelling.parameters, node)
    return None if bound is None else spelling.read(view, node, **bound)


def _read_module(view: View, node: fx.Node) -> Reading:
    module = view.submodule(str(node.target))
    base = known_class(node, module, _MODULES)
    args = [*node.args, *node.kwargs.values()]
    if base is None:
        hooked = torch_class(module) in _MODULES and foreign_hooks(module)
        return Refusal("hook registered") if hooked else None
    return _MODULES[base](view, node, module, base, args[0]) if len(args) == 1 else None
