"""What the interpreter tells of the calls that run while a forward is traced.

Some questions reach no traced value: ``a is b`` looks at objects without asking them, and
``torch.is_grad_enabled()`` asks for the state of the process. The first is found in the code of the
functions that run, the second where the function is called. So is the forward of a
`torch.autograd.Function`, whose gradient is another than that of the operators it calls. Only the
tracing thread is listened to, and nothing is replaced.
"""

from __future__ import annotations

import enum
import inspect
import os
import sys
import threading
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.autograd.function import FunctionCtx

from fxrep.capture import locks
from fxrep.capture.askers import asks_for_users, is_library, is_own, is_users, place
from fxrep.capture.hidden import hidden_question
from fxrep.capture.proxies import Unfaithful
from fxrep.words import words

if TYPE_CHECKING:
    from fxrep.capture.tracer import Tracer

_Result = TypeVar("_Result")


class Listener:
    """Hears the calls of one trace, from `start` to `stop`.

    A violation is recorded, not raised: an error raised here would end the listening.

    Args:
        tracer: is told of violations.

    Attributes:
        ran: the code of the user's functions that started.
        strays: of these, those to which no name led, and that read what may change.
    """

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.ran: set[types.CodeType] = set()
        self.strays: set[types.CodeType] = set()

    def start(self) -> None:
        """Begin."""
        raise NotImplementedError

    def stop(self) -> None:
        """End. A second call changes nothing."""
        raise NotImplementedError

    def without(self, run: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """Call the tracer's own function `run`; its calls need not be heard."""
        return run(*args, **kwargs)

    def within(self, run: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """Call the forward `run` of the user's code."""
        return run(*args, **kwargs)

    def _starts(self, frame: types.FrameType, kind: _Kind) -> None:
        """Hear that a function of Python starts."""
        code = frame.f_code
        if kind is _Kind.STATE and frame.f_back is not None:
            self._uses_process(_OF_PROCESS[code], frame.f_back)
            return
        first = _first_argument(frame)
        if isinstance(first, FunctionCtx):
            self._refuse("forward calls an autograd.Function")
        elif kind is _Kind.USERS:
            self.ran.add(code)
            if not self.tracer.state.knows(code) and not _is_imported(frame):
                self._meet(frame)
            reason = hidden_question(code, isinstance(first, nn.Module))
            if reason is not None and not _is_imported(frame):
                self._refuse(f"{reason} ({place(code)})")

    def _meet(self, frame: types.FrameType) -> None:
        """Hear of a function to which no name led."""
        found = self.tracer.state.meet(frame)
        if found.reads_state:
            self.strays.add(frame.f_code)
            reason = self.tracer.state.why_written(found)
            if reason is not None:
                self._refuse(reason)

    def _uses_process(self, what: str, caller: types.FrameType) -> None:
        if asks_for_users(caller) and not _is_imported(caller):
            self._refuse(f"forward {what} ({place(caller.f_code)})")

    def _refuse(self, reason: str) -> None:
        self.tracer.refuse(Unfaithful(reason))


class _Profile(Listener):
    """Listens in the place of a profiler, which hears its own thread only.

    Each event costs, so that it does not listen to the tracer.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__(tracer)
        self.kinds: dict[int, tuple[_Kind, types.CodeType]] = {}
        self.before: Any = None
        self.started = self.listens = False

    def start(self) -> None:
        self.before, self.started = sys.getprofile(), True

    def stop(self) -> None:
        if not self.started:
            return
        self.listens = False
        restart = getattr(self.before, "enable", None)  # that of cProfile, which cannot be called
        sys.setprofile(None if restart else self.before)
        if restart:
            restart()
        self.started = False

    def without(self, run: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        if not self.listens:
            return run(*args, **kwargs)
        return self._listening(False, run, *args, **kwargs)

    def within(self, run: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        return self._listening(True, run, *args, **kwargs)

    def _listening(
        self, listens: bool, run: Callable[..., _Result], *args: Any, **kwargs: Any
    ) -> _Result:
        before = self.listens
        self._set(listens)
        try:
            return run(*args, **kwargs)
        finally:
            if self.started:
                self._set(before)

    def _set(self, listens: bool) -> None:
        self.listens = listens
        sys.setprofile(self._hear if listens else None)

    def _hear(self, frame: types.FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            if called in _OF_PROCESS:
                self._uses_process(_OF_PROCESS[called], frame)
        elif event == "call":
            code = frame.f_code
            known = self.kinds.get(id(code))  # the hash of the code itself costs more
            if known is None:
                known = self.kinds[id(code)] = _kind(code), code
            if known[0] is not _Kind.OTHER:
                self._starts(frame, known[0])


class _Monitor(Listener):
    """Listens by `sys.monitoring`, new in Python 3.12, which hears all threads.

    It tells only once of code that is of no interest, so that the tracer may be heard too.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__(tracer)
        self.thread = threading.get_ident()

    def start(self) -> None:
        with _lock:
            _monitors[self.thread] = self
            if len(_monitors) == 1:
                _monitoring.use_tool_id(_TOOL, _NAME)
                _monitoring.register_callback(_TOOL, _monitoring.events.PY_START, _python_starts)
                _monitoring.register_callback(_TOOL, _monitoring.events.CALL, _something_is_called)
                events = _monitoring.events.PY_START | _monitoring.events.CALL
                _monitoring.set_events(_TOOL, events)

    def stop(self) -> None:
        with _lock:
            _monitors.pop(self.thread, None)
            if not _monitors and _monitoring.get_tool(_TOOL) == _NAME:
                _monitoring.set_events(_TOOL, 0)
                _monitoring.free_tool_id(_TOOL)


_monitoring: Any = getattr(sys, "monitoring", None)
_NAME, _TOOL = "fxrep", 4  # a number that is kept for no kind of tool
_lock = locks.made()
_monitors: dict[int, Listener] = {}


def _python_starts(code: types.CodeType, _: int) -> Any:
    kind = _kind(code)
    if kind is _Kind.OTHER:
        return _monitoring.DISABLE
    listener = _monitors.get(threading.get_ident())
    if listener is not None:
        listener._starts(sys._getframe(1), kind)
    return None


def _something_is_called(code: types.CodeType, _: int, called: Any, __: Any) -> Any:
    if not is_users(code.co_filename):
        return _monitoring.DISABLE
    listener = _monitors.get(threading.get_ident())
    builtin = isinstance(called, types.BuiltinFunctionType)
    if builtin and called in _OF_PROCESS and listener is not None:
        listener._uses_process(_OF_PROCESS[called], sys._getframe(1))
    return None


def listener(tracer: Tracer) -> Listener:
    """The listener of a trace."""
    if _monitoring is None or _monitoring.get_tool(_TOOL) not in (None, _NAME):
        return _Profile(tracer)
    return _Monitor(tracer)


# --- which functions matter ---------------------------------------------------------------------


def _of_process() -> dict[object, str]:
    """What a forward does that calls a function; Python code by its code.

    Functions of torch, inspect and os that ask for the state of the process, whose answer is no
    traced value's, and functions that set it, which are heard because they may set what is set.

    Whether torch compiles, exports or traces is no such question: as in an ordinary call, the
    answer is no.
    """
    found: dict[object, str] = {}
    overridable = torch.overrides.get_overridable_functions().values()
    of_tensors = {id(function) for functions in overridable for function in functions}
    for namespace in (*_homes_of_state(), torch.random, torch.cuda):
        asking = namespace not in (torch.random, torch.cuda)  # those give what the machine has
        for name, value in vars(namespace).items():
            verb = "calls" if _sets_state(name) else "asks for"
            if not (_sets_state(name) or (asking and _asks_for_state(name))):
                continue
            if not callable(value) or id(value) in of_tensors:
                continue
            unwrapped = inspect.unwrap(value)  # of a context manager
            function = getattr(unwrapped, "__code__", unwrapped)
            if isinstance(function, types.CodeType) and is_users(function.co_filename):
                continue  # imported from elsewhere
            found[function] = f"{verb} {name}()"
    for question in (inspect.getattr_static, inspect.getmembers, torch.initial_seed):
        found[question.__code__] = f"asks for {question.__name__}()"
    # `torch.backends.cudnn.enabled`: an attribute that calls a function.
    flag, environ = torch.backends.ContextProp, type(os.environ)
    found[flag.__get__.__code__] = "asks for a flag of torch.backends"
    found[flag.__set__.__code__] = "sets a flag of torch.backends"
    for setting in (environ.__setitem__, environ.__delitem__):
        found[setting.__code__] = "sets a variable of the environment"
    found[sys.setrecursionlimit] = "calls setrecursionlimit()"
    return found


def _homes_of_state() -> list[Any]:
    """The modules of torch that have functions which ask for the state of the process."""
    backends = [m for n, m in sys.modules.items() if n.startswith("torch.backends.")]
    return [torch, torch._C, torch._C._autograd, *backends]


def _asks_for_state(name: str) -> bool:
    plain = name.lstrip("_")
    if "tracing" in name or _sets_state(name):
        return False
    return plain.startswith(_ABOUT_STATE) or plain.endswith(("_enabled", "_allowed"))


def _sets_state(name: str) -> bool:
    plain = name.lstrip("_")
    return plain.startswith(_SETTING) or plain in _SEEDING


_ABOUT_STATE = ("is_", "are_", "get_", "has_", "len_")
_SETTING = ("set_", "enable_", "use_deterministic_")
_SEEDING = words("seed seed_all manual_seed manual_seed_all fork_rng")
_OF_PROCESS = _of_process()


# Methods of a `torch.autograd.Function` that get its context first.
_PARTS_OF_FUNCTIONS = words("forward setup_context")


class _Kind(enum.Enum):
    """What a function that starts is."""

    USERS = enum.auto()
    STATE = enum.auto()
    OF_TORCH_FUNCTION = enum.auto()
    OTHER = enum.auto()


def _kind(code: types.CodeType) -> _Kind:
    if code in _OF_PROCESS:
        return _Kind.STATE
    if is_users(code.co_filename) and not is_library(code.co_filename):
        return _Kind.USERS
    return _Kind.OF_TORCH_FUNCTION if code.co_name in _PARTS_OF_FUNCTIONS else _Kind.OTHER


def _is_imported(frame: types.FrameType | None) -> bool:
    """Whether the code runs because a Python module is imported, and so sees no traced value."""
    while frame is not None and not is_own(frame.f_code.co_filename):
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _first_argument(frame: types.FrameType) -> Any:
    code = frame.f_code
    if code.co_argcount:
        return frame.f_locals.get(code.co_varnames[0])
    if code.co_flags & inspect.CO_VARARGS:
        return next(iter(frame.f_locals.get(code.co_varnames[code.co_kwonlyargcount], ())), None)
    return None
