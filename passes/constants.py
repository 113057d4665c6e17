"""Compute once the values that depend on parameters, buffers and attributes alone.

Given::

    a, b (parameters) -> einsum -> * scale -> w ;  x, w -> conv2d -> y

Result::

    w (stored) ;  x, w -> conv2d -> y

At inference a weight expression (OREPA's kernels, standardised or masked weights, the arithmetic
of a frozen BatchNorm) has one value. Only pure functions of torch and operator are evaluated;
no random numbers, no writes, and nothing that depends on the device of the model. A value that the
model returns is computed at each call: the caller may write it, and gradients flow through it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxrep.algebra.recipe import Call, record
from fxrep.planning.cost import CostModel
from fxrep.planning.rule import Fold, Pass
from fxrep.reading.view import View
from fxrep.refusal import Refusal

_PLACE = frozenset({"device", "dtype", "is_cuda", "requires_grad", "grad", "data_ptr"})


def propose(view: View, node: fx.Node, cost: CostModel) -> Fold | Refusal | None:
    """Evaluate `node` if it is the last of a constant expression."""
    if not _is_constant(view, node) or all(_is_constant(view, user) for user in node.users):
        return None
    expr = _expression(view, node)
    generators = [torch.default_generator]
    if torch.cuda.is_available():
        generators += torch.cuda.default_generators
    states = [generator.get_state() for generator in generators]
    try:
        value = record(expr).run(lambda path: view.originals[path])
    except Exception as error:  # the model's own: unrewritten, it raises where it did
        return Refusal(f"its constant value cannot be computed: {error}")
    drawn = False
    for generator, state in zip(generators, states, strict=True):
        drawn = drawn or not torch.equal(generator.get_state(), state)
        generator.set_state(state)
    if drawn:
        return Refusal("it draws random numbers")
    if isinstance(value, Tensor):
        if view.aliasing.returned(node):
            return Refusal("it is returned, a new tensor at each call")
        if type(value) not in (Tensor, nn.Parameter):  # `.contiguous()` may return the parameter
            return Refusal(f"its constant value is a {type(value).__name__}")
    elif not isinstance(value, (int, float, bool, torch.Size)):
        return None
    return Fold(node, value, expr)


def _is_constant(view: View, node: fx.Node) -> bool:
    """Whether a call reads constants only; decided once for every node, its operands first."""
    ahead = [node]
    while ahead:
        each = ahead[-1]
        sources = [] if each in view.constants else each.all_input_nodes
        unknown = [source for source in sources if source not in view.constants]
        if unknown:
            ahead += unknown
            continue
        ahead.pop()
        if each not in view.constants:
            view.constants[each] = _is_pure(view, each) and all(
                _reads_stored(view, source) or view.constants[source] for source in sources
            )
    return view.constants[node]


def _reads_stored(view: View, node: fx.Node) -> bool:
    return node.op == "get_attr" and view.constant(node) is not None


def _is_pure(view: View, node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
        return False
    if node.kwargs.get("out") is not None:
        return False
    if view.aliasing.pinned(node) or view.aliasing.written(node):
        return False  # a stored value would keep the writes of one call
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "_")
    if name.endswith("_") and not name.endswith("__"):
        return False
    if target is getattr:
        moved = all(user.target == "to" for user in node.users)
        return node.args[1] not in _PLACE or (moved and node.args[1] in ("device", "dtype"))
    if target == "to":  # where another constant lives: the stored value moves with the model
        return all(isinstance(arg, fx.Node) for arg in (*node.args, *node.kwargs.values()))
    if target is operator.setitem or name.startswith("_assert") or name in ("numpy", "cuda"):
        return False
    if "empty" in name.split("_"):
        return False  # its value is what the memory held
    if isinstance(target, str):
        return hasattr(Tensor, target)
    module = getattr(target, "__module__", None) or "torch"  # builtins of torch have none
    return module.split(".")[0] in ("torch", "_operator", "math")


def _expression(view: View, node: fx.Node) -> Call:
    """The call and its operands as an expression over the model's tensors."""
    made: dict[fx.Node, Any] = {}
    order = [node]
    for each in order:  # grows while it is read: everything above `node`
        order.extend(source for source in each.all_input_nodes if source not in order)
    for each in sorted(set(order)):
        if each.op == "get_attr":
            made[each] = view.stored(str(each.target)).expr
            continue
        args = fx.map_arg(each.args, made.__getitem__)
        kwargs = fx.map_arg(each.kwargs, made.__getitem__)
        if each.op == "call_method":
            made[each] = Call(getattr(Tensor, str(each.target)), tuple(args), kwargs)
        else:
            made[each] = Call(each.target, tuple(args), kwargs)  # type: ignore[arg-type]
    result = made[node]
    assert isinstance(result, Call)
    return result


CONSTANTS = Pass("constants", propose)
