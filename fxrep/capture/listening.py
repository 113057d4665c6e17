"""What the interpreter tells of each call while a forward is traced (`sys.setprofile`).

Some questions reach no traced value: ``a is b`` looks at objects without asking them, and
``torch.is_grad_enabled()`` asks for the state of the process. The first is found in the code of the
functions that run, the second where the function is called. So is ``Function.apply``, which runs
the forward of a `torch.autograd.Function`, whose gradient is its own. Only the tracing thread is
listened to, and nothing is replaced.
"""

from __future__ import annotations

import enum
import inspect
import sys
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxrep.capture.askers import asks_for_users, is_library, is_users, place
from fxrep.capture.hidden import hidden_question
from fxrep.capture.proxies import Unfaithful
from fxrep.words import words

if TYPE_CHECKING:
    from fxrep.capture.tracer import Tracer


def _states() -> dict[object, str]:
    """Functions of torch and of inspect whose answer is no traced value's; Python code by its code.

    Whether torch compiles, exports or traces is no such question: as in an ordinary call, the
    answer is no.
    """
    found: dict[object, str] = {}
    overridable = torch.overrides.get_overridable_functions().values()
    of_tensors = {id(function) for functions in overridable for function in functions}
    for namespace in (torch, torch._C, torch.overrides):
        for name, value in vars(namespace).items():
            about_state = name.lstrip("_").startswith(_ABOUT_STATE) and "tracing" not in name
            if about_state and callable(value) and id(value) not in of_tensors:
                found[getattr(value, "__code__", value)] = name
    for function in (inspect.getattr_static, inspect.getmembers, torch.initial_seed):
        found[function.__code__] = function.__name__
    return found


_ABOUT_STATE = ("is_", "are_", "get_", "has_", "len_")
_STATES = _states()


class Listener:
    """Listens to the calls of one trace, from `start` to `stop`.

    Args:
        tracer: is told of violations; an error raised here would end the listening.
    """

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.kinds: dict[types.CodeType, _Kind] = {}
        self.before: Any = None
        self.listens = False

    def start(self) -> None:
        """Begin to listen, in the place of another profiler of this thread."""
        self.before, self.listens = sys.getprofile(), True
        sys.setprofile(self._hear)

    def stop(self) -> None:
        """Stop, and let the other profiler go on. A second call changes nothing."""
        if self.listens:
            self.listens = False
            # cProfile's own object, in C, cannot be called.
            restart = getattr(self.before, "enable", None)
            sys.setprofile(None if restart else self.before)
            if restart:
                restart()

    def _hear(self, frame: types.FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            name = _STATES.get(called)
            if name is not None:
                self._refuse_state(name, frame)
        elif event == "call":
            code = frame.f_code
            kind = self.kinds.get(code)
            if kind is None:
                kind = self.kinds[code] = _kind(code)
            if kind is not _Kind.OTHER:
                self._hear_function(frame, kind)

    def _hear_function(self, frame: types.FrameType, kind: _Kind) -> None:
        code = frame.f_code
        if kind is _Kind.STATE:
            if frame.f_back is not None:
                self._refuse_state(_STATES[code], frame.f_back)
            return
        first = _first_argument(frame)
        if isinstance(first, torch.autograd.function.FunctionCtx):
            self._refuse("forward calls an autograd.Function")
        elif kind is _Kind.USERS:
            reason = hidden_question(code, isinstance(first, nn.Module))
            if reason is not None:
                self._refuse(f"{reason} ({place(code)})")

    def _refuse_state(self, name: str, asker: types.FrameType) -> None:
        if asks_for_users(asker):
            self._refuse(f"forward asks for {name}() ({place(asker.f_code)})")

    def _refuse(self, reason: str) -> None:
        self.tracer.refuse(Unfaithful(reason))


class _Kind(enum.Enum):
    """What a function that starts is."""

    USERS = enum.auto()
    STATE = enum.auto()
    OF_TORCH_FUNCTION = enum.auto()
    OTHER = enum.auto()


def _kind(code: types.CodeType) -> _Kind:
    if code in _STATES:
        return _Kind.STATE
    if is_users(code.co_filename) and not is_library(code.co_filename):
        return _Kind.USERS
    return _Kind.OF_TORCH_FUNCTION if code.co_name in _PARTS_OF_FUNCTIONS else _Kind.OTHER


# Methods of a `torch.autograd.Function` that get its context first.
_PARTS_OF_FUNCTIONS = words("forward setup_context")


def _first_argument(frame: types.FrameType) -> Any:
    code = frame.f_code
    if code.co_argcount:
        return frame.f_locals.get(code.co_varnames[0])
    if code.co_flags & inspect.CO_VARARGS:
        return next(iter(frame.f_locals.get(code.co_varnames[code.co_kwonlyargcount], ())), None)
    return None
