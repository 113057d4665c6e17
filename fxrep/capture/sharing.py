"""The tensors that an object reaches, without running code of the object.

Given: a module that keeps a deque of tensors, a method whose function closes over a tensor, and a
NumPy array that shares the memory of a buffer.

Result: all these tensors, the array as a tensor over its memory, and for each whether a deepcopy of
the module copies it. What a function, a class or a weak reference reaches is not copied: the copy
reaches the same memory. A buffer and an array over its memory would become two memories.
"""

from __future__ import annotations

import functools
import gc
import sys
import types
import weakref
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxrep.capture.code import global_names
from fxrep.ops.memory import addresses
from fxrep.ops.owner import EVERY_MODULE, foreign_hooks

# How many objects, one inside the other, may lead to a tensor; and how many functions are read.
_DEEPEST = 12
_MOST_FUNCTIONS = 500


class Record:
    """What only records modules and what they read: it holds no memory of its own."""


# Objects by their ids, and whether they are copied: kept, so that no other object gets their ids.
Seen = dict[tuple[int, bool], Any]


@dataclass(frozen=True, eq=False)
class Reached:
    """A tensor that an object reaches.

    Attributes:
        tensor: the tensor, or one over the memory of `holder`.
        holder: the object itself: the tensor, an array, a storage, or a script that has the tensor.
        copied: whether a deepcopy of what reaches it copies it.
    """

    tensor: Tensor
    holder: Any
    copied: bool


def reached(
    values: Iterable[Any], *, whole: bool = True, seen: Seen | None = None
) -> Iterator[Reached]:
    """The tensors that objects reach.

    Args:
        values: the objects.
        whole: of a module that is reached, also what its children reach.
        seen: what was searched already.
    """
    seen = {} if seen is None else seen
    functions = 0
    level = [(value, True) for value in values]
    for _ in range(_DEEPEST):
        ahead: list[tuple[Any, bool]] = []
        for value, copied in level:
            if isinstance(value, _ATOMS) or (id(value), copied) in seen:
                continue
            seen[id(value), copied] = value
            memory = _memory(value)
            if memory is not None:
                yield Reached(memory, value, copied)
                continue
            if isinstance(value, types.FunctionType):
                functions += 1
                if functions > _MOST_FUNCTIONS:
                    continue
            ahead.extend(_references(value, copied, whole))
        level = ahead


def of_module(module: nn.Module, seen: Seen) -> Iterator[Reached]:
    """The tensors that a module and the code of its class reach, without those of its children.

    Args:
        module: the module; its hooks do not count.
        seen: as for `reached`.
    """
    is_script = isinstance(module, torch.jit.ScriptModule)
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None:
                yield Reached(tensor, module if is_script else tensor, True)
    if is_script:
        return
    others = [
        value
        for name, value in module.__dict__.items()
        if type(value) not in _NUMBERS and name not in _NOT_OWN
    ]
    kind = type(module)
    code = [] if (id(kind), True) in seen or is_library(kind) else [kind]
    if others or code:
        yield from reached(others + code, seen=seen)


_NUMBERS = frozenset({int, float, bool, str, type(None)})


def of_tree(tree: nn.Module, idle: Set[int] = frozenset()) -> list[Reached]:
    """The tensors that the modules of a tree, their code and their hooks reach.

    Args:
        tree: the modules.
        idle: ids of modules whose code nobody runs any more.
    """
    seen: Seen = {}
    seen_idle: Seen = {}
    found: list[Reached] = []
    modules = list(tree.modules())
    for module in modules:
        if id(module) in idle:
            found += (each for each in of_module(module, seen_idle) if each.copied)
        else:
            found += of_module(module, seen)
    hooks = [hook for module in modules for hook in foreign_hooks(module)]
    return _copied_together([*found, *reached(hooks, whole=False, seen=seen)])


def _copied_together(found: list[Reached]) -> list[Reached]:
    """The tensors; those that a deepcopy would tear apart count as not copied.

    Two storages with common memory become two memories; arrays and scripts copy theirs themselves.
    """
    fixed: set[int] = set()
    ranges = sorted([(*addresses(each.tensor), i) for i, each in enumerate(found)])
    reaches, last = 0, -1
    for start, stop, i in ranges:
        if start < reaches and last >= 0 and _owner(found[i]) != _owner(found[last]):
            fixed |= {i, last}
        if last < 0 or stop > reaches:
            reaches, last = stop, i
    for i in fixed:
        found[i] = replace(found[i], copied=False)
    return found


def _owner(found: Reached) -> int:
    """What a deepcopy copies as a whole: a storage, an array, a script."""
    if found.holder is not found.tensor:
        return id(found.holder)
    try:
        return int(found.tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return id(found.tensor)


class Contents:
    """The content of the memory of tensors, to be compared and restored.

    Args:
        tensors: the tensors; those without an address do not count.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        found = {addresses(tensor): tensor for tensor in tensors}
        self._versions = [(t, t._version) for t in tensors if not t.is_inference()]
        self._saved = [
            (_bytes(tensor), _bytes(tensor).clone())
            for (start, _), tensor in found.items()
            if start > 0
        ]

    def restore(self) -> bool:
        """Write the saved content back; whether anything had changed.

        The count of writes is taken back, too: autograd compares it with that of a saved tensor.
        """
        changed = [(now, saved) for now, saved in self._saved if not torch.equal(now, saved)]
        for now, saved in changed:
            now.copy_(saved)
        for tensor, version in self._versions:
            if tensor._version != version:
                torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
        return bool(changed)


def outside(found: Iterable[Reached]) -> Contents:
    """The memory that the code of a model reaches and that a run of a copy may write, too."""
    return Contents(each.tensor for each in found if not each.copied)


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a tensor as bytes."""
    with torch.inference_mode(False):
        found = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        return found.set_(tensor.untyped_storage())


# Recurrent layers have weak references to their own weights, too, which they renew in a copy.
_NOT_OWN = EVERY_MODULE | {"_flat_weight_refs"}


def _references(value: Any, copied: bool, whole: bool) -> Iterator[tuple[Any, bool]]:
    """The objects that an object refers to, and whether a deepcopy of it copies them."""
    if isinstance(value, types.FunctionType):
        yield from ((each, False) for each in of_function(value))
    elif isinstance(value, type):
        for kind in value.__mro__:
            if not is_library(kind):
                yield from ((each, False) for each in vars(kind).values())
    elif isinstance(value, types.BuiltinMethodType):
        yield value.__self__, False
    elif isinstance(value, weakref.ref):
        yield value(), False
    elif type(value) in weakref.ProxyTypes:
        yield value.__repr__.__self__, False
    elif isinstance(value, memoryview):
        yield value.obj, False
    elif isinstance(value, nn.Module):
        yield type(value), False
        for name, each in value.__dict__.items():
            if whole or name != "_modules":
                yield each, copied
    else:
        yield from ((each, copied) for each in gc.get_referents(value))


def of_function(function: types.FunctionType) -> Iterator[Any]:
    """What a function carries, and the global variables that its code reads."""
    for cell in function.__closure__ or ():
        yield from gc.get_referents(cell)
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()
    if not is_library(function):
        for name in global_names(function.__code__):
            yield function.__globals__.get(name)


def is_library(thing: Any) -> bool:
    """Whether a class or function is of torch, of Python, or our own."""
    if isinstance(thing, type):
        return _is_library_class(thing)
    return _is_home(thing)


@functools.lru_cache(maxsize=4096)
def _is_library_class(kind: type) -> bool:
    return _is_home(kind)


def _is_home(thing: Any) -> bool:
    home = str(getattr(thing, "__module__", "")).partition(".")[0]
    return home in ("torch", "fxrep", "builtins") or home in sys.stdlib_module_names


def _memory(value: Any) -> Tensor | None:
    """A tensor over the memory of a value; None if the value has none that a tensor may share."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, torch.TypedStorage):
        value = value._untyped_storage
    if isinstance(value, torch.UntypedStorage):
        return torch.empty(0, dtype=torch.uint8, device=value.device).set_(value)
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.ndarray):
        return None
    while isinstance(value.base, numpy.ndarray):
        value = value.base
    if isinstance(value.base, Tensor):
        return value.base
    try:
        return torch.from_numpy(value)
    except (TypeError, ValueError, RuntimeError):  # of objects or strings, or of negative strides
        return None


_ATOMS = (
    Record,
    types.ModuleType,
    types.CodeType,
    types.FrameType,
    fx.Graph,
    fx.Node,
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
)
