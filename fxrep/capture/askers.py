"""Who asks a traced value: the user's code, or torch and fxrep at work.

Torch's own Python code (and fxrep's) handles proxies as proxies; the user's code, and what it calls
of Python's library, is to see what it would see of a tensor.
"""

from __future__ import annotations

import abc
import dis
import functools
import os
import types

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_PASSES = os.path.dirname(os.path.realpath(os.path.join(_OWN, "passes", "__init__.py"))) + os.sep

_FX = os.path.dirname(torch.fx.__file__) + os.sep
_MACHINERY = (_TORCH, _OWN, _PASSES)

# Code that asks on behalf of its caller.
_BETWEEN = frozenset({abc.__file__, os.path.join(_TORCH, "nn", "parameter.py")})

# Code of torch that asks only because the user's code does (`torch.jit.isinstance`).
_ASKS_FOR_USERS = frozenset({os.path.join(_TORCH, "_jit_internal.py")})

_PLAIN_ACCESS = frozenset(
    dis.opmap[name] for name in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR") if name in dis.opmap
)
_CERTAIN_QUESTIONS = frozenset({*_PLAIN_ACCESS, dis.opmap["MATCH_CLASS"]})


@functools.cache
def is_users(filename: str) -> bool:
    """Whether code of this file counts as the user's."""
    return filename in _ASKS_FOR_USERS or not filename.startswith(_MACHINERY)


def is_machinery(filename: str) -> bool:
    """Whether code of this file is that of a trace, and asks a traced value for somebody else."""
    return filename.startswith((_FX, _OWN, _PASSES))


def is_own(filename: str) -> bool:
    """Whether code of this file is fxrep's, which calls the forwards that it traces."""
    return filename.startswith((_OWN, _PASSES))


def asks_for_users(frame: types.FrameType) -> bool:
    """Whether a frame runs the user's code."""
    return is_users(frame.f_code.co_filename)


def asker(frame: types.FrameType) -> types.FrameType:
    """The frame that asks for the class of a value: that behind abc's and Parameter's code."""
    while frame.f_code.co_filename in _BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    return frame


def accesses(frame: types.FrameType) -> bool:
    """Whether the instruction that runs is `value.name`, and not a call that may ask for it."""
    return frame.f_code.co_code[frame.f_lasti] in _PLAIN_ACCESS


def asks_for_class(frame: types.FrameType) -> bool:
    """Whether the code certainly asks for a class, and not C code of torch for a tensor."""
    certain = frame.f_code.co_code[frame.f_lasti] in _CERTAIN_QUESTIONS
    return certain or is_library(frame.f_code.co_filename)


_LIBRARY = os.path.dirname(os.__file__) + os.sep


@functools.cache
def is_library(filename: str) -> bool:
    """Whether a file is of Python's own library, or one that asks for users."""
    own = filename.startswith((_LIBRARY, "<frozen")) and "site-packages" not in filename
    return own or filename in _ASKS_FOR_USERS


def place(code: types.CodeType) -> str:
    """Where some code is, for a reason."""
    return f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}"
