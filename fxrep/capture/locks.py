"""Locks that an interrupt cannot leave locked.

An interrupt, or a debugger, at the last instructions of a ``with lock:`` skips the release, and
every other thread would wait for good. What a capture locks is therefore released again at its end.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

_locks: list[Any] = []  # threading.RLock is no class


def made() -> Any:
    """A new lock, which the thread that holds it may take again."""
    lock = threading.RLock()
    _locks.append(lock)
    return lock


def release_all() -> None:
    """Release what the calling thread still holds, at a point where it needs none of it."""
    for lock in _locks:
        with contextlib.suppress(RuntimeError):  # what it raises for a lock that is not held
            while True:
                lock.release()
