"""Answers to what a forward asks traced values: assumed, and checked whenever the graph runs.

Given: ``if x.shape[1] != self.channels: raise ...``, ``if height % self.stride == 0``,
``for i in range(x.shape[0])``.

Result: the graph asserts the answer and goes on with it. An answer without which the forward only
raises holds in every call that returns (`torch._assert`). Any other is that of the inputs given and
makes the graph a guarded one: where it does not hold, the original forward runs (`assume`).
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from fxrep.capture.askers import place
from fxrep.capture.branches import only_answer
from fxrep.capture.shadows import UNKNOWN, Shadows, faked, opaque
from fxrep.ops.assume import assume
from fxrep.ops.calls import Calls
from fxrep.ops.effects import effect

if TYPE_CHECKING:
    from fxrep.capture.tracer import Tracer


_WITH_TEXT = (bool, int, float, torch.Size, torch.dtype, torch.device)


Prove = Callable[[fx.Graph, Calls, fx.Node], Any]
"""Gives the value of a node of a graph if it is the same in every call, and else `UNKNOWN`."""


def unproven(*_: object) -> Any:
    """Prove nothing."""
    return UNKNOWN


@dataclass(frozen=True)
class Given:
    """What a trace may answer questions by.

    Attributes:
        values: inputs, by argument, whose answers may be assumed; empty if there are none.
        mode: made the fake tensors among the values, if there are any.
        prove: proves the answers that need no inputs.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    mode: FakeTensorMode | None = None
    prove: Prove = unproven


class Answers:
    """The answers in one trace.

    Args:
        tracer: the trace.
        given: what questions may be answered by.

    Attributes:
        guarded: where the answers of the inputs were assumed.
        lacking: a question had no answer for want of inputs.
    """

    def __init__(self, tracer: Tracer, given: Given) -> None:
        self.tracer = tracer
        self.given = given
        self.guarded: list[str] = []
        self.lacking = False
        self._shadows: Shadows | None = None
        self._settled: fx.Node | None = None

    def truth(self, node: fx.Node, asker: types.FrameType | None) -> bool | None:
        """Whether a value is true; None if that is not known."""
        proven = self._proven(node)
        if isinstance(proven, int | float | tuple):
            return bool(proven)
        only = only_answer(asker.f_code, asker.f_lasti) if asker is not None else None
        value = self._value(node)
        known = value is not UNKNOWN and not isinstance(value, Tensor)
        answer = bool(value) if known else only
        if answer is None or (only is not None and answer is not only):
            return None
        if only is None and not self._guard(asker):
            return None
        condition = node if answer else self._call(operator.not_, node)
        self._assert(condition, asker, always=only is not None)
        return answer

    def number(self, node: fx.Node, asker: types.FrameType | None) -> Any:
        """The number that a value is; None if that is not known."""
        proven = self._proven(node)
        if isinstance(proven, int | float):
            return proven
        value = self._value(node)
        if type(value) not in (int, float):
            return None
        if not self._guard(asker):
            return None
        self._assert(self._call(operator.eq, node, value), asker)
        return value

    def text(self, node: fx.Node, asker: types.FrameType | None) -> str | None:
        """The text of a number, a dtype or a device; None if that is not known."""
        proven = self._proven(node)
        if isinstance(proven, int | float):
            return str(proven)
        value = self._value(node)
        if not isinstance(value, _WITH_TEXT):
            return None
        if not self._guard(asker):
            return None
        self._assert(self._call(operator.eq, node, value), asker)
        return str(value)

    def count(self, node: fx.Node, asker: types.FrameType | None) -> int | None:
        """How many items a value has; None if that is not known."""
        proven = self._proven(node)
        if isinstance(proven, tuple):
            return len(proven)
        value = self._value(node)
        if isinstance(value, Tensor) and not value.dim():
            return None
        if not isinstance(value, tuple | list | Tensor):
            return None
        if not self._guard(asker):
            return None
        self._assert(self._call(operator.eq, self._call(len, node), len(value)), asker)
        return len(value)

    @cached_property
    def _plain(self) -> nn.Module:
        """The model with its own tensors, and not traced ones."""
        return self.tracer.hollow.plain()

    @cached_property
    def _calls(self) -> Calls:
        return Calls(self._plain)

    def _proven(self, node: fx.Node) -> Any:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return self.given.prove(self.tracer.graph, self._calls, node)

    def _value(self, node: fx.Node) -> Any:
        if not self.given.values:
            self.lacking = True
            return UNKNOWN
        # The trace's own modes would see, and refuse, what happens here.
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            if self._shadows is None:
                mode = self.given.mode or FakeTensorMode(allow_non_fake_inputs=True)
                self._shadows = Shadows(
                    self._plain,
                    self.tracer.graph,
                    lambda: mode,
                    faked(mode, dict(self.given.values)),
                    self._constant,
                )
            return self._shadows.of(node)

    def _constant(self, name: str) -> Tensor | None:
        """A tensor that the forward makes itself."""
        return self.tracer.constants[name][0] if name in self.tracer.constants else None

    def _guard(self, asker: types.FrameType | None) -> bool:
        """Note a guard; whether a call may begin again with the original forward at this point."""
        node = next(iter(self.tracer.graph.nodes))
        if self._settled is not None and not self._settled._erased:
            node = self._settled.next
        while node.op != "root":
            if opaque(node) or not self._is_repeatable(node):
                return False
            self._settled = node
            node = node.next
        self.guarded.append(place(asker.f_code) if asker is not None else "")
        return True

    def _is_repeatable(self, node: fx.Node) -> bool:
        """Whether a second run of a node finds what the first has found."""
        does = effect(self.tracer.calls, node)
        if does.own_state:
            return False
        stack, seen = list(does.writes), set(does.writes)
        while stack:
            written = stack.pop()
            if written.op in ("placeholder", "get_attr"):
                return False
            ahead = set(effect(self.tracer.calls, written).aliases) - seen
            seen |= ahead
            stack.extend(ahead)
        return True

    def _call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.tracer.create_node("call_function", function, args, {})

    def _assert(
        self, condition: fx.Node, asker: types.FrameType | None, *, always: bool = False
    ) -> None:
        """Assert a condition; that the forward raises where it does not hold, if `always`."""
        where = f" ({place(asker.f_code)})" if asker is not None else ""
        message = f"the model was optimized for other inputs{where}"
        if always:
            message = f"the model does not take this input{where}"
        self._call(torch._assert if always else assume, condition, message)
