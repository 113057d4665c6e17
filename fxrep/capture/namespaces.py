"""Global names of Python modules, which captures replace for a while.

All threads share a namespace, and each may capture a model. A name is replaced once, is restored
when the last capture that needs it ends, and is read here as if no capture replaced it: neither
what one capture replaced nor that it was restored is a write of the forward that another one
traces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fxrep.capture import locks

MISSING = object()


@dataclass(eq=False)
class _Replaced:
    """A name that is replaced, its original value, and the captures that need it replaced."""

    namespace: dict[str, Any]
    name: str
    original: object
    replacement: object
    users: set[object] = field(default_factory=set)


_replaced: dict[tuple[int, str], _Replaced] = {}
_lock = locks.made()


def read(namespace: Mapping[str, Any], name: str) -> Any:
    """The value of a name but for what captures do; MISSING if there is none."""
    with _lock:
        value = namespace.get(name, MISSING)
        known = _replaced.get((id(namespace), name))
        return known.original if known is not None and value is known.replacement else value


def is_idle() -> bool:
    """Whether no name is replaced, so that a namespace itself gives what `read` gives."""
    return not _replaced


def has(namespace: dict[str, Any], name: str, value: object) -> bool:
    """Whether `read` gives a value that it gave before."""
    return namespace.get(name, MISSING) is value or read(namespace, name) is value


def items(namespace: dict[str, Any]) -> list[tuple[str, Any]]:
    """The names and their values but for what captures do."""
    with _lock:
        if not _replaced:  # nearly always
            return list(namespace.items())
        found = [(name, read(namespace, name)) for name in list(namespace)]
        return [(name, value) for name, value in found if value is not MISSING]


def write(namespace: dict[str, Any], name: str, value: object) -> None:
    """Give a name a value, or none if it is MISSING, for when no capture replaces it."""
    with _lock:
        known = _replaced.get((id(namespace), name))
        if known is not None:
            known.original, value = value, known.replacement
        if value is not MISSING:
            namespace[name] = value
        else:
            namespace.pop(name, None)


def replace(user: object, namespace: dict[str, Any], name: str, replacement: object) -> None:
    """Let a name have another value until `restore(user)`, or that of another user."""
    with _lock:
        # Recorded before the change, so that an interrupt in between leaves nothing replaced.
        original = namespace.get(name, MISSING)
        known = _replaced.setdefault(
            (id(namespace), name), _Replaced(namespace, name, original, replacement)
        )
        known.users.add(user)
        if len(known.users) == 1:
            namespace[name] = known.replacement


def restore(user: object) -> None:
    """Let the names that no other user needs have their original values. Twice is as once."""
    with _lock:
        for key, known in list(_replaced.items()):
            known.users.discard(user)
            if known.users:
                continue
            if known.original is MISSING:
                known.namespace.pop(known.name, None)
            else:
                known.namespace[known.name] = known.original
            del _replaced[key]
