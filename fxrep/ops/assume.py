"""A condition that a graph asserts because its nodes rely on it."""

from __future__ import annotations

from torch import fx


class Unmet(AssertionError):
    """A condition does not hold for the inputs of a call."""


@fx.node.has_side_effect
def assume(condition: object, message: str) -> None:
    """Go on only where a condition holds.

    `torch._assert` for conditions that are Python values: torch.compile sees a plain branch.

    Raises:
        Unmet: the condition is false.
    """
    if isinstance(condition, fx.Proxy):  # a later symbolic trace keeps the condition
        condition.tracer.create_proxy("call_function", assume, (condition, message), {})
    elif not condition:
        raise Unmet(message)
