"""All that a model and what it can reach look like: to be compared before and after.

Written anew for the tests: it shares no code with the library's own snapshots.
"""

from __future__ import annotations

import ctypes
import functools
import random
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Facts = dict[str, Any]


def world(*roots: object) -> Facts:
    """Facts about every object that can be reached from the roots, and about the process, by path.

    Objects that can change are told apart by identity too: a counter that was replaced by an equal
    one has changed.
    """
    found: Facts = dict(_process())
    seen: set[int] = set()
    stack: list[tuple[str, object]] = [(f"<{i}>", root) for i, root in enumerate(roots)]
    while stack:
        path, value = stack.pop()
        found[path] = _fact(value)
        if id(value) in seen or isinstance(value, str | bytes | int | float):
            continue
        seen.add(id(value))
        stack += [(path + step, child) for step, child in _children(value)]
    return found


def differences(before: Facts, after: Facts) -> list[str]:
    """What is not as it was."""
    return [
        f"{path}: {before.get(path)!r} -> {after.get(path)!r}"
        for path in {**before, **after}
        if path not in before or path not in after or not _same(before[path], after[path])
    ]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a != a)).all())
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return bool(np.array_equal(a, b))
    return type(a) is type(b) and bool(a == b)


def _fact(value: Any) -> Any:
    """What is known of one object without what it holds."""
    if value is None or isinstance(value, str | bytes | int | float | complex):
        return value
    if isinstance(value, type):
        return value.__qualname__, id(value)
    kind, own = type(value).__qualname__, id(value)
    if isinstance(value, Tensor):
        # Not its version: a copy of the model may have written a tensor that it shares with the
        # model (one in a closure), which is put back.
        bits = value.detach().clone()
        return (
            own, value.dtype, value.shape, value.stride(), value.data_ptr(),
            value.requires_grad, value.grad is None, bits,
        )  # fmt: skip
    if isinstance(value, torch.Generator):
        return own, value.get_state()
    if isinstance(value, np.random.Generator):
        return own, repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return own, repr(value.get_state())
    if isinstance(value, random.Random):
        return own, value.getstate()
    if isinstance(value, np.ndarray | bytearray):
        return own, np.array(value).copy()
    if isinstance(value, ctypes._SimpleCData):
        return own, value.value
    if isinstance(value, functools._lru_cache_wrapper):
        return own, value.cache_info().currsize
    if isinstance(value, types.MethodType):
        return kind
    if hasattr(value, "__next__") and not isinstance(value, types.GeneratorType):
        return own, repr(value.__reduce__()) if hasattr(value, "__reduce__") else None
    if isinstance(value, types.GeneratorType):
        return own, dict(value.gi_frame.f_locals) if value.gi_frame else None
    if isinstance(value, set | frozenset):
        return own, frozenset(map(repr, value))
    if isinstance(value, Mapping | list | tuple):
        return kind, own, len(value)
    return kind, own


def _children(value: Any) -> Iterator[tuple[str, object]]:
    if isinstance(value, types.ModuleType | Tensor | np.ndarray | types.MethodWrapperType):
        return
    if isinstance(value, type):
        if value.__module__.partition(".")[0] not in ("torch", "builtins", "abc", "typing"):
            data = {k: v for k, v in vars(value).items() if not k.startswith("__")}
            yield from ((f".{name}", each) for name, each in data.items() if name != "_abc_impl")
            yield ".<names>", " ".join(data)
        return
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", value[key]) for key in list(value))
    elif isinstance(value, list | tuple) or hasattr(value, "popleft"):
        yield from ((f"[{i}]", item) for i, item in enumerate(value))
    if isinstance(value, types.FunctionType):
        yield ".__defaults__", value.__defaults__
        yield from ((f".__dict__[{k!r}]", v) for k, v in vars(value).items())
        for i, cell in enumerate(value.__closure__ or ()):
            yield f".cell{i}", _cell(cell)
        return
    for name, each in getattr(value, "__dict__", {}).items():
        yield f".{name}", each
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield f".{name}", getattr(value, name)
    if type(value).__module__ not in ("torch", "builtins"):
        yield ".__class__", type(value)


def _cell(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"


def _process() -> Iterator[tuple[str, Any]]:
    """The state of the process that a forward may reach without a name of its own."""
    yield "random", random.getstate()
    yield "numpy.random", repr(np.random.get_state())
    yield "torch random", torch.get_rng_state()
    yield "gradients", torch.is_grad_enabled()
    yield "inference", torch.is_inference_mode_enabled()
    yield "default dtype", torch.get_default_dtype()
    yield "default device", str(torch.get_default_device())
    yield "autocast", (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
    yield "deterministic", torch.are_deterministic_algorithms_enabled()
    yield "precision", torch.get_float32_matmul_precision()
    yield "threads", torch.get_num_threads()
    yield "benchmark", torch.backends.cudnn.benchmark
    yield "anomaly", torch.is_anomaly_enabled()
    yield "function modes", torch._C._len_torch_function_stack()
    yield "dispatch modes", torch._C._len_torch_dispatch_stack()
    yield "numpy errors", repr(np.geterr())
    yield "print options", repr(vars(torch._tensor_str.PRINT_OPTS))
    yield "recursion", sys.getrecursionlimit()
