"""How a fused tensor is computed from a model's own: recorded once, replayed on any weights.

While planning, a fused weight is an expression: nested `Call`s over `Load`s of the model's
tensors. A `Recipe` is the same computation as a list of steps: to replay, copy or pickle a list
takes no recursion, however long the chain of rewrites was. Recipes are pickled with the user's
models, so the functions that they call keep their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Load:
    """A tensor of the model, by its path below the traced module."""

    path: str


@dataclass(frozen=True, eq=False)
class Call:
    """``function(*args, **kwargs)``; arguments may be expressions or nested tuples of them."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The function's name, as the report shows it."""
        return str(getattr(self.function, "__name__", self.function))


Expr = Load | Call


@dataclass(frozen=True)
class Ref:
    """The result of an earlier step."""

    step: int


@dataclass(frozen=True, eq=False)
class Recipe:
    """A list of steps, the last of which is the result."""

    steps: tuple[Expr, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the tensors that the recipe reads."""
        return tuple(step.path for step in self.steps if isinstance(step, Load))

    def run(self, lookup: Callable[[str], Tensor]) -> Any:
        """Compute the result.

        Args:
            lookup: gives the tensor at a path, in the precision to compute in.
        """
        values: list[Any] = []

        def resolve(arg: Any) -> Any:
            return values[arg.step] if isinstance(arg, Ref) else arg

        with torch.no_grad():
            for step in self.steps:
                if isinstance(step, Load):
                    values.append(lookup(step.path))
                else:
                    args = [_mapped(arg, resolve) for arg in step.args]
                    kwargs = {name: _mapped(arg, resolve) for name, arg in step.kwargs.items()}
                    values.append(step.function(*args, **kwargs))
        return values[-1]


def record(expression: Expr) -> Recipe:
    """The recipe of an expression; an expression that stands in it twice is computed once."""
    steps: list[Expr] = []
    refs: dict[int, Ref] = {}
    loads: dict[str, Ref] = {}
    stack: list[tuple[Expr, bool]] = [(expression, False)]
    while stack:
        expr, ready = stack.pop()
        if id(expr) in refs:
            continue
        if isinstance(expr, Load):
            if expr.path not in loads:
                loads[expr.path] = Ref(len(steps))
                steps.append(expr)
            refs[id(expr)] = loads[expr.path]
        elif ready:

            def resolve(arg: Any) -> Any:
                return refs[id(arg)] if isinstance(arg, (Load, Call)) else arg

            args = tuple(_mapped(arg, resolve) for arg in expr.args)
            kwargs = {name: _mapped(arg, resolve) for name, arg in expr.kwargs.items()}
            refs[id(expr)] = Ref(len(steps))
            steps.append(Call(expr.function, args, kwargs))
        else:
            stack.append((expr, True))
            stack.extend((child, False) for child in _children(expr))
    # The expression itself is the last step, as `Recipe.run` requires: all others are operands.
    return Recipe(tuple(steps))


def _children(call: Call) -> Iterator[Expr]:
    yield from _expressions(call.args)
    yield from _expressions(call.kwargs.values())


def _expressions(args: Iterable[Any]) -> Iterator[Expr]:
    for arg in args:
        if isinstance(arg, (Load, Call)):
            yield arg
        elif isinstance(arg, (tuple, list)):
            yield from _expressions(arg)


def _mapped(arg: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(arg, tuple) and not isinstance(arg, torch.Size):
        if hasattr(arg, "_fields"):
            return function(arg)
        return tuple(_mapped(item, function) for item in arg)
    if isinstance(arg, list):
        return [_mapped(item, function) for item in arg]
    if isinstance(arg, slice):
        return slice(*(_mapped(part, function) for part in (arg.start, arg.stop, arg.step)))
    return function(arg)
