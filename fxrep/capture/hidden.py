"""Questions that a traced value does not hear: found in the bytecode that would ask them.

``a is b`` and the patterns ``case [a, b]`` and ``case {"key": a}`` look at an object without
calling it. The state of the process (``torch.is_grad_enabled()``) is no value. And an exception
that the forward expects (``try: ... except RuntimeError``) comes when the graph runs, not when the
forward is traced.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fxrep.capture.code import mentioned
from fxrep.words import words

# Names by which the builtins that are substituted (`isinstance`, `type`) are found as they were.
_ORIGINALS = words("builtins __builtins__")

_PATTERNS = frozenset({"MATCH_SEQUENCE", "MATCH_MAPPING"})

# Exceptions that no traced operation raises when the graph runs.
_NEVER_RAISED = words(
    "ImportError ModuleNotFoundError KeyError LookupError StopIteration StopAsyncIteration "
    "GeneratorExit KeyboardInterrupt SystemExit OSError FileNotFoundError IOError EOFError "
    "PermissionError TimeoutError UnicodeError UnicodeDecodeError NameError RecursionError"
) - {"LookupError"}

# Exceptions that a layer raises only where its arguments do not fit, which is found while tracing.
_RAISED_BY_ARGUMENTS = words("TypeError AttributeError")


@functools.cache
def hidden_question(code: types.CodeType, is_method: bool) -> str | None:
    """The first question in some code that a traced value would not hear.

    Args:
        code: code of a function; that of functions inside it is not looked at.
        is_method: the first argument is a module, no traced value.
    """
    originals = mentioned(code) & _ORIGINALS
    if originals:
        return f"forward uses {min(originals)}"
    steps = list(dis.get_instructions(code))
    names = {step.opname for step in steps}
    if names & _PATTERNS:
        return "forward matches a pattern"
    if "IS_OP" in names and _compares_identity(code, is_method):
        return "forward compares the identity of values"
    return None


@functools.cache
def may_return_none(code: types.CodeType) -> bool:
    """Whether a function says that it returns None, for its caller to ask ``is None``."""
    steps = [s for s in dis.get_instructions(code) if s.opname not in NO_OPERATION]
    places = {step.offset: index for index, step in enumerate(steps)}
    for step, after in itertools.pairwise(steps):
        if step.opname == "LOAD_CONST" and step.argval is None:
            if after.opname == "JUMP_FORWARD":  # `return None if .. else x`
                after = steps[places.get(after.argval, 0)]
            if after.opname == "RETURN_VALUE":
                return True
    return any(step.opname == "RETURN_CONST" and step.argval is None for step in steps)


# --- identity -----------------------------------------------------------------------------------


def _compares_identity(code: types.CodeType, is_method: bool) -> bool:
    """Whether an `is` compares what may be a traced value with anything but None."""
    steps = [s for s in dis.get_instructions(code) if s.opname not in NO_OPERATION]
    plain = _plain_variables(code, steps, is_method)
    for index, step in enumerate(steps):
        if step.opname != "IS_OP":
            continue
        right = _operand(steps, index)
        left = _operand(steps, index - len(right)) if right else []
        if not right or not left:
            return True
        if any(_is_none(side) or _is_of_class(side) for side in (left, right)):
            continue
        if not (_is_plain(left, plain) and _is_plain(right, plain)):
            return True
    return False


NO_OPERATION = frozenset(
    {"NOP", "CACHE", "RESUME", "EXTENDED_ARG", "PRECALL", "PUSH_NULL", "KW_NAMES"}
)


def _operand(steps: Sequence[dis.Instruction], end: int) -> list[dis.Instruction]:
    """The instructions that compute the value on the stack before `end`; [] if not certain."""
    wanted, start = 1, end
    while wanted > 0:
        start -= 1
        if start < 0:
            return []
        step = steps[start]
        if step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
            return []
        pushed, popped = _stack_use(step)
        if pushed is None:
            return []
        wanted += popped - pushed
    return list(steps[start:end]) if wanted == 0 else []


def _stack_use(step: dis.Instruction) -> tuple[int | None, int]:
    """How many values an instruction puts on the stack, and takes; the callee's null left out."""
    name, arg = step.opname, step.arg or 0
    if name.startswith("LOAD_FAST") or name in _LOADS:
        return 1, 0
    if name in ("LOAD_ATTR", "LOAD_METHOD"):
        return 1, 1
    if name in ("CALL", "CALL_FUNCTION"):
        return 1, arg + 1
    if name == "BUILD_STRING":
        return 1, arg
    if name in _FORMATS:
        with_format = name == "FORMAT_WITH_SPEC" or (name == "FORMAT_VALUE" and arg & 4)
        return 1, 2 if with_format else 1
    if name in ("BINARY_SUBSCR", "BINARY_OP", "COMPARE_OP", "IS_OP", "CONTAINS_OP"):
        return 1, 2
    return None, 0


# Functions whose text argument is a message, read when they raise.
_TAKING_MESSAGES = words("_assert")


@functools.cache
def is_message(code: types.CodeType, offset: int) -> bool:
    """Whether the text that is made of a value here is only the message of `torch._assert`.

    Args:
        code: code of a function.
        offset: an instruction of an f-string.
    """
    steps = [s for s in dis.get_instructions(code) if s.opname not in NO_OPERATION]
    start = next((i for i, step in enumerate(steps) if step.offset == offset), None)
    if start is None or steps[start].opname not in _FORMATS:
        return False
    above = 0  # values on the stack above the text
    for index in range(start + 1, len(steps)):
        step = steps[index]
        pushed, popped = _stack_use(step)
        if pushed is None:
            return False
        if popped <= above:
            above += pushed - popped
        elif step.opname == "BUILD_STRING" and pushed == 1:
            above = 0
        else:
            return step.opname == "CALL" and _callee(steps, index) in _TAKING_MESSAGES
    return False


@functools.cache
def counts(code: types.CodeType, offset: int) -> bool:
    """Whether the instruction takes a number itself: `range(n)`, `items[n]`, `[x] * n`.

    A function of torch that is given a traced number records the call instead.
    """
    steps = [s for s in dis.get_instructions(code) if s.opname not in NO_OPERATION]
    at = next((i for i, step in enumerate(steps) if step.offset >= offset), None)
    if at is None:
        return False
    return steps[at].opname in _TAKING_NUMBERS or (
        steps[at].opname == "CALL" and _callee(steps, at) == "range"
    )


_TAKING_NUMBERS = words("BINARY_SUBSCR BINARY_OP BINARY_SLICE")


def _callee(steps: Sequence[dis.Instruction], call: int) -> str:
    """The name of what is called."""
    end = call
    for _ in range(steps[call].arg or 0):
        argument = _operand(steps, end)
        if not argument:
            return ""
        end -= len(argument)
    return str(steps[end - 1].argval)


@functools.cache
def cache_names(code: types.CodeType, offset: int) -> frozenset[str]:
    """The attributes of self that are caches, if a text is only the key of entries in these.

    Given: ``key = str(x.device)``, and then ``key in self.cache`` and ``self.cache[key]`` only.

    Args:
        code: code of a method.
        offset: the call of `str`, or the PRECALL before it.
    """
    steps = [s for s in dis.get_instructions(code) if s.opname not in NO_OPERATION]
    at = next((i for i, step in enumerate(steps) if step.offset >= offset), None)
    is_text = at is not None and steps[at].opname == "CALL" and _callee(steps, at) == "str"
    if at is None or not is_text or steps[at + 1].opname != "STORE_FAST":
        return frozenset()
    found: set[str] = set()
    for index, step in enumerate(steps):
        if step.argval == steps[at + 1].argval and step.opname.startswith("LOAD_FAST"):
            after = steps[index + 1].opname in ("BINARY_SUBSCR", "STORE_SUBSCR")
            cache = steps[index - 2 : index] if after else steps[index + 1 : index + 3]
            if not (after or steps[index + 3].opname == "CONTAINS_OP"):
                return frozenset()
            if [s.opname for s in cache] != ["LOAD_FAST", "LOAD_ATTR"]:
                return frozenset()
            if cache[0].argval != code.co_varnames[0]:
                return frozenset()
            found.add(str(cache[1].argval))
    return frozenset(found)


_FORMATS = words("FORMAT_VALUE FORMAT_SIMPLE FORMAT_WITH_SPEC CONVERT_VALUE")

_LOADS = words("LOAD_CONST LOAD_GLOBAL LOAD_NAME LOAD_DEREF LOAD_CLOSURE LOAD_SMALL_INT")


def _is_none(operand: Sequence[dis.Instruction]) -> bool:
    only = operand[0]
    return len(operand) == 1 and only.opname == "LOAD_CONST" and only.argval in (None, ...)


def _is_of_class(operand: Sequence[dis.Instruction]) -> bool:
    """Whether an operand is an attribute of a class (``type(self).forward``), and so no tensor."""
    start = ["LOAD_GLOBAL", "LOAD_FAST", "CALL", "LOAD_ATTR"]
    return (
        [step.opname for step in operand[:4]] == start
        and operand[0].argval == "type"
        and all(step.opname == "LOAD_ATTR" for step in operand[3:])
    )


def _is_plain(operand: Sequence[dis.Instruction], plain: frozenset[str]) -> bool:
    """Whether an expression is certainly no traced value.

    A constant, a global name, an attribute of a module, ``type(x)`` and ``x.__class__``: the last
    two are asked of the traced value, which answers or refuses.
    """
    first, last = operand[0], operand[-1]
    if last.opname == "LOAD_ATTR" and last.argval == "__class__":
        return True
    if last.opname == "CALL" and first.opname == "LOAD_GLOBAL" and first.argval == "type":
        return True
    if last.opname == "CALL" and not last.arg and operand[-2].argval in _OF_MODULES:
        operand = operand[:-2]  # `for layer in self.layers.children()`
    if any(step.opname not in ("LOAD_ATTR", "LOAD_METHOD") for step in operand[1:]):
        return False
    if first.opname.startswith("LOAD_FAST"):
        return first.argval in plain
    return first.opname in ("LOAD_CONST", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_SMALL_INT")


_OF_MODULES = words("children modules values")


def _plain_variables(
    code: types.CodeType, steps: Sequence[dis.Instruction], is_method: bool
) -> frozenset[str]:
    """The local variables that never hold a traced value."""
    starred = bool(code.co_flags & inspect.CO_VARARGS) + bool(
        code.co_flags & inspect.CO_VARKEYWORDS
    )
    arguments = code.co_argcount + code.co_kwonlyargcount + starred
    plain = set(code.co_varnames[:1]) if is_method and code.co_argcount else set()
    for _ in range(3):  # a variable may be plain because another is
        stored: dict[str, bool] = {}
        for index, step in enumerate(steps):
            if step.opname != "STORE_FAST":
                continue
            value = _operand(steps, index)
            if steps[index - 1].opname == "FOR_ITER" and steps[index - 2].opname == "GET_ITER":
                value = _operand(steps, index - 2)  # `for block in self.blocks`
            fine = bool(value) and _is_plain(value, frozenset(plain))
            stored[step.argval] = stored.get(step.argval, True) and fine
        plain = {name for name in plain if stored.get(name, True)}
        given = set(code.co_varnames[:arguments])
        plain |= {name for name, fine in stored.items() if fine and name not in given}
    return frozenset(plain)


# --- expected exceptions ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Handler:
    """Instructions whose exceptions are caught, and the names of those exceptions; () for all."""

    start: int
    end: int
    names: tuple[str, ...]


def expected_exceptions(code: types.CodeType, offset: int, layer: bool) -> str | None:
    """Which exceptions of a traced operation the code would catch, for a reason; None for none.

    Args:
        code: code of a function.
        offset: the instruction that runs.
        layer: the operation is a call of a layer whose arguments fit.
    """
    for handler in _handlers(code):
        if not handler.start <= offset < handler.end:
            continue
        names = [name for name in handler.names if name not in _NEVER_RAISED]
        if layer:
            names = [name for name in names if name not in _RAISED_BY_ARGUMENTS]
        if names or not handler.names:
            return f"forward expects an exception (except {', '.join(handler.names)})"
    return None


@functools.cache
def _handlers(code: types.CodeType) -> tuple[_Handler, ...]:
    if not code.co_exceptiontable:
        return ()
    steps = [s for s in dis.get_instructions(code) if s.opname not in NO_OPERATION]
    places = {step.offset: index for index, step in enumerate(steps)}
    found: list[_Handler] = []
    table: Any = dis.Bytecode(code)
    for entry in table.exception_entries:
        if entry.target in places:
            names = _caught(code, steps[places[entry.target] :])
            if names is not None:
                found.append(_Handler(entry.start, entry.end, names))
    return tuple(found)


def _caught(code: types.CodeType, steps: Sequence[dis.Instruction]) -> tuple[str, ...] | None:
    """The exceptions that a handler catches; None for `finally`, `with` and what cleans up."""
    if steps[0].opname != "PUSH_EXC_INFO":
        return None
    if steps[1].opname == "POP_TOP":
        return ()
    if steps[1].opname == "WITH_EXCEPT_START":
        return ("those of a with",) if _SWALLOWING & set(code.co_names) else None
    return tuple(_names_of(steps[1:])) or None


_SWALLOWING = words("suppress assertRaises raises")


def _names_of(steps: Sequence[dis.Instruction]) -> Iterator[str]:
    """The names in all `except` clauses of one `try`."""
    pending: list[str] = []
    for step in steps:
        if step.opname in ("CHECK_EXC_MATCH", "CHECK_EG_MATCH"):
            yield from pending
        if step.opname == "PUSH_EXC_INFO" or (step.opname == "RERAISE" and not step.arg):
            return
        if step.opname == "LOAD_ATTR" and pending:
            pending[-1] = str(step.argval)
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_FAST"):
            pending.append(str(step.argval))
        elif step.opname != "BUILD_TUPLE":
            pending = []
