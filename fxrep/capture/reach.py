"""What a forward can reach without its arguments: objects, names and tensors.

A walk over values and code. From an object it goes to what the object holds, and to the methods of
its class that the code names; from a function to the global names, the variables of enclosing
scopes and the defaults that it mentions. Code of torch, NumPy, Python's own library and installed
packages other than the model's own is not walked through: what it writes is seen by torch's modes,
or not at all.
"""

from __future__ import annotations

import contextvars
import enum
import functools
import gc
import os
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import fx, nn

from fxrep.capture import namespaces
from fxrep.capture.askers import is_library
from fxrep.capture.code import Key, global_names, key, mentioned, nested
from fxrep.capture.kept import cell_content, is_container, values_of
from fxrep.words import words

_ATOMS = frozenset(
    {
        str, int, float, bool, complex, bytes, type(None), type(Ellipsis), type(NotImplemented),
        torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, range,
    }
)  # fmt: skip

_FOREIGN = frozenset({"torch", "numpy", "fxrep"}) | (
    frozenset(sys.stdlib_module_names) - {"__main__"}
)
# Parts of Python's own library whose objects are plain state. Locks and events are not: threads
# wait for them.
_PLAIN = frozenset(words("types collections functools _thread weakref array ctypes argparse"))
_QUEUES = frozenset(words("queue _queue multiprocessing asyncio"))
_TORCH = os.path.dirname(torch.__file__)

_STATES = (random.Random, torch.Generator, contextvars.ContextVar, bytearray)

# How many objects are visited, the nearest first: what a forward writes is near, and what leads
# far (a library, a data set) is long.
_MOST = 2000

# What shows something else: ``vars(x)`` of a class, ``{}.values()``, slices.
_VIEWS: tuple[type, ...] = (
    weakref.ref, types.MappingProxyType, type({}.keys()), type({}.values()), type({}.items()),
    slice, types.CellType, BaseException,
)  # fmt: skip

# Methods that run without being named, but for those that make or describe an object.
_NOT_CALLED = frozenset(
    words(
        "__init__ __new__ __post_init__ __init_subclass__ __class_getitem__ __repr__ __str__ "
        "__getstate__ __setstate__ __reduce__ __reduce_ex__ __deepcopy__ __copy__ __del__ "
        "__instancecheck__ __subclasscheck__ __prepare__ __doc__ __module__ __dict__ __weakref__"
    )
)
_MAKERS = ("__init__", "__new__", "__post_init__")

# What none of torch's modes sees: memory handed to others by plain functions.
_UNSEEN = frozenset(words("to_dlpack _to_dlpack swap_tensors _swap_tensor_impl"))

_THREADS = frozenset(words("Thread Timer ThreadPool ThreadPoolExecutor start_new_thread"))

# Names of functions that set the state of torch's own generator of random numbers.
_SEEDING = frozenset(words("manual_seed seed set_rng_state fork_rng set_state"))

# Where NumPy keeps the functions that set the state of its own generator.
_NUMPY_RANDOM = ("numpy.random", "numpy.random.mtrand")

_ENVIRONMENT = frozenset(words("environ getenv"))


def _package(thing: Any) -> str:
    return str(thing.__module__ or "builtins").partition(".")[0]


class Tree:
    """The modules of a tree.

    Attributes:
        packages: in which their classes, and those they inherit from, are written.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._ids = frozenset(map(id, modules))
        self.packages = _packages(map(type, modules))

    def __contains__(self, value: object) -> bool:
        return id(value) in self._ids

    def reached_by(self, frame: types.FrameType) -> Reach:
        """What a function that starts reaches, without its arguments; nothing for a library's."""
        home = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if home in _FOREIGN or (home not in self.packages and _is_installed(home)):
            return Reach((), (), self)
        code = frame.f_code
        cells = [
            types.CellType(frame.f_locals[name]) if name in frame.f_locals else types.CellType()
            for name in code.co_freevars
        ]
        function = types.FunctionType(code, frame.f_globals, code.co_name, None, tuple(cells))
        found = Reach([(code.co_name, function)], (), self)
        for cell in cells:  # not those of the function itself
            found.cells.pop(id(cell), None)
        found.objects.pop(id(vars(function)), None)
        return found


class AnyTree(Tree):
    """All modules that there are.

    Args:
        kinds: the classes whose packages count.
    """

    def __init__(self, kinds: Iterable[type]) -> None:
        self.packages = _packages(kinds)

    def __contains__(self, value: object) -> bool:
        return isinstance(value, nn.Module)


class NoTree(Tree):
    """No module: each that is reached is walked into.

    Args:
        kinds: the classes whose packages count.
    """

    def __init__(self, kinds: Iterable[type]) -> None:
        self.packages = _packages(kinds)

    def __contains__(self, value: object) -> bool:
        return False


def _packages(kinds: Iterable[type]) -> set[str]:
    return {_package(base) for kind in set(kinds) for base in kind.__mro__}


class Reach:
    """Everything that can be reached from some values and classes.

    Args:
        values: to start from, each with the words that describe where it is.
        kinds: classes whose methods are called `forward` and `__call__`.
        tree: the modules around: none is walked into, for each has a reach of its own.
        most: how many objects are visited.
        ran: the code of the functions that are walked into; None for all.

    Attributes:
        objects: by id, the objects whose state may be written.
        cells: by id, the variables of enclosing scopes.
        namespaces: by id, the global names of Python modules that are mentioned.
        functions: by id, the user's functions.
        modules: by id, the modules of the tree.
        tensors: by id, the tensors.
        names: the names that the code mentions.
        is_complete: whether all was looked at.
        barred: why no code may run that reaches this: its effects could not be undone.
    """

    def __init__(
        self,
        values: Iterable[tuple[str, object]],
        kinds: Iterable[type],
        tree: Tree,
        most: int = _MOST,
        ran: Container[Key] | None = None,
    ) -> None:
        self.tree = tree
        self.objects: dict[int, object] = {}
        self.cells: dict[int, types.CellType] = {}
        self.namespaces: dict[int, tuple[dict[str, Any], set[str]]] = {}
        self.functions: dict[int, types.FunctionType] = {}
        self.modules: dict[int, nn.Module] = {}
        self.tensors: dict[int, torch.Tensor] = {}
        self.names: set[str] = set()
        self.is_complete = True
        self._most = most
        self._ran = ran
        self.barred: list[str] = []
        self._seen: dict[int, object] = {}
        self._open: dict[int, tuple[Any, set[str]]] = {}
        self._ahead = deque(values)
        kinds = list(kinds)
        for kind in kinds:
            self.names |= {"forward", "__call__"}
            self._class(kind)
        self._walk()
        self._note_names()

    @property
    def code(self) -> tuple[int, ...]:
        """Ids of the classes, functions and modules of the user's that were reached."""
        return (*self._open, *self.namespaces, *self.cells)

    def _walk(self) -> None:
        while True:
            while self._ahead:
                if len(self._seen) > self._most:
                    self.is_complete = False
                    return
                self._visit(*self._ahead.popleft())
            for thing, known in list(self._open.values()):
                found = (self.names & vars(thing).keys()) - known
                known |= found
                self._ahead += [(f"{thing.__name__}.{n}", vars(thing)[n]) for n in found]
            if not self._ahead:
                return

    @property
    def reads_state(self) -> bool:
        """Whether there is anything that may change: an object, or a name with a plain value."""
        names = (
            namespaces.read(space, name)
            for space, names in self.namespaces.values()
            for name in names
        )
        return (
            bool(self.cells or self.tensors)
            or any(not isinstance(value, type) for value in self.objects.values())
            or any(is_atom(value) or is_container(value) for value in names)
        )

    @property
    def starts_threads(self) -> bool:
        """Whether the code may start threads, which none of torch's modes watches."""
        return bool(_THREADS & self.names)

    def _note_names(self) -> None:
        """What is known by its name alone."""
        self.barred += [f"forward uses '{name}'" for name in sorted(_UNSEEN & self.names)]
        if _SEEDING & self.names:
            self.objects[id(torch.default_generator)] = torch.default_generator
        if _ENVIRONMENT & self.names:
            self.objects[id(os.environ)] = os.environ

    def _visit(self, where: str, value: Any) -> None:
        kind = type(value)
        if kind in _ATOMS or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if value in self.tree:
            self.modules[id(value)] = value
            return
        visit = _VISITS.get(kind)
        if visit is not None:
            visit(self, where, value)
        elif isinstance(value, torch.Tensor):
            self.tensors[id(value)] = value
        elif isinstance(value, type):
            self._visit_class(where, value)
        elif is_container(value) or isinstance(value, tuple | frozenset):
            self._container(where, value)
        elif isinstance(value, _VIEWS):
            self._ahead += [(where, each) for each in _shown(value)]
        elif hasattr(kind, "__next__"):
            self.barred.append(
                f"forward can read {where}, which reading advances ({kind.__name__})"
            )
        elif isinstance(value, functools._lru_cache_wrapper):
            self._cached(where, value)
        else:
            self._instance(where, value)

    def _visit_class(self, where: str, value: type) -> None:
        if self._is_foreign(value):
            return
        self._class(value)
        if isinstance(value, enum.EnumMeta):
            members: dict[str, Any] = dict(value.__members__)
            self._ahead += [(where, member) for member in members.values()]
        self._ahead += [(where, vars(value)[n]) for n in _MAKERS if n in vars(value)]

    def _container(self, where: str, value: Any) -> None:
        if not isinstance(value, tuple | frozenset):
            self.objects[id(value)] = value
        if isinstance(value, dict):
            self._ahead += [(f"{where}[{key!r:.20}]", v) for key, v in dict.items(value)]
            self._ahead += [(where, key) for key in dict.keys(value) if not is_atom(key)]
        elif isinstance(value, set | frozenset):
            self._ahead += [(where, v) for v in value]
        else:
            self._ahead += [(f"{where}[{i}]", v) for i, v in enumerate(value)]
        if not self._is_foreign(type(value)) or hasattr(value, "__dict__"):
            self._class(type(value))
            self._ahead += [(where, vars(value))] if hasattr(value, "__dict__") else []

    def _instance(self, where: str, value: Any) -> None:
        kind = type(value)
        home = _package(kind)
        if getattr(value, "__module__", None) in _NUMPY_RANDOM:  # `numpy.random.seed`
            self._ahead.append((where, sys.modules["numpy"].random.mtrand._rand))
        if isinstance(value, _STATES):
            self.objects[id(value)] = value
            return
        if home in _QUEUES:
            self.barred.append(f"forward can put into {where} ({kind.__name__})")
        if home != "numpy" and not (is_plain(value) or isinstance(value, nn.Module)):
            return
        self.objects[id(value)] = value
        if home == "numpy":
            if getattr(getattr(value, "dtype", None), "hasobject", False):
                self._ahead += [(where, each) for each in getattr(value, "flat", ())]
            return
        self._ahead += [(f"{where} of a {kind.__name__}", each) for each in values_of(value)]
        if kind.__module__ == "functools" and hasattr(value, "func"):  # partial, cached_property
            held = (value.func, getattr(value, "args", ()), getattr(value, "keywords", None))
            self._ahead += [(where, each) for each in held]
        self._class(kind)

    def _class(self, kind: type) -> None:
        for each in kind.__mro__:
            if self._is_foreign(each) or id(each) in self._open:
                continue
            self.objects[id(each)] = each
            special = {n for n in vars(each) if n.startswith("__") and n not in _NOT_CALLED}
            self._open[id(each)] = (
                each,
                {n for n in vars(each) if n.startswith("__")} - {"__call__"},
            )
            self._ahead += [(f"{each.__name__}.{name}", vars(each)[name]) for name in special]

    def _function(self, where: str, function: types.FunctionType) -> None:
        if self._is_foreign(function) or function.__code__.co_filename.startswith(_TORCH):
            self.names |= _SEEDING & {function.__name__}
            inner = getattr(function, "__wrapped__", None)
            if inner is not None and function.__code__.co_filename != fx._symbolic_trace.__file__:
                self._ahead.append((where, inner))
            return
        if self._ran is not None and key(function.__code__) not in self._ran:
            if is_library(function.__code__.co_filename):  # whose calls are not heard: a decorator
                cells = function.__closure__ or ()
                self._ahead += [(where, cell_content(each)) for each in cells]
            return
        self.functions[id(function)] = function
        namespace = function.__globals__
        _, mentioned = self.namespaces.setdefault(id(namespace), (namespace, set()))
        self.names |= _names(function.__code__)
        names = global_names(function.__code__)
        for name in names - mentioned:
            value = namespaces.read(namespace, name)
            if value is not namespaces.MISSING:
                self._ahead.append((f"the global '{name}'", value))
            elif name in sys.modules:
                self._ahead.append((name, sys.modules[name]))
        mentioned |= names
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            self.cells[id(cell)] = cell
            try:
                self._ahead.append((f"the variable '{name}'", cell.cell_contents))
            except ValueError:
                continue
        self._ahead.append((f"a default of {function.__name__}()", function.__defaults__))
        self._ahead.append((f"a default of {function.__name__}()", function.__kwdefaults__))
        self._ahead.append((f"{function.__name__}()", vars(function)))

    def _method(self, where: str, method: Any) -> None:
        self._ahead += [(where, method.__self__), (where, getattr(method, "__func__", None))]

    def _property(self, where: str, found: property) -> None:
        self._ahead += [(where, each) for each in (found.fget, found.fset, found.fdel)]

    def _wrapper(self, where: str, found: Any) -> None:
        self._ahead.append((where, found.__func__))

    def _is_foreign(self, thing: Any) -> bool:
        """Whether a class or function is torch's, NumPy's, Python's own or another library's."""
        package = _package(thing)
        return package in _FOREIGN or (package not in self.tree.packages and _is_installed(package))

    def _module(self, where: str, module: types.ModuleType) -> None:
        home = module.__name__
        if home == "random":
            self._ahead.append((where, random._inst))
        elif home == "numpy.random":
            self._ahead.append((where, module.mtrand._rand))
        elif home == "numpy":
            self._open.setdefault(id(module), (module, set(vars(module)) - {"random"}))
        elif not self._is_foreign(types.SimpleNamespace(__module__=home)):
            self._open.setdefault(id(module), (module, set()))
            _, mentioned = self.namespaces.setdefault(id(vars(module)), (vars(module), set()))
            mentioned |= self.names & vars(module).keys()

    def _cached(self, where: str, function: Any) -> None:
        if self._is_foreign(function):
            return
        self.objects[id(function)] = function
        self._ahead.append((where, function.__wrapped__))


_VISITS: dict[type, Any] = {
    types.FunctionType: Reach._function,
    types.MethodType: Reach._method,
    types.BuiltinFunctionType: Reach._method,
    types.ModuleType: Reach._module,
    property: Reach._property,
    staticmethod: Reach._wrapper,
    classmethod: Reach._wrapper,
}


def _shown(value: Any) -> list[Any]:
    """What a view, or the like, shows."""
    return [value()] if isinstance(value, weakref.ref) else gc.get_referents(value)


@functools.cache
def _is_installed(package: str) -> bool:
    """Whether a package is a library: neither the user's own files nor a file that runs."""
    module = sys.modules.get(package)
    files = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(name in str(file) for file in files for name in ("site-packages", "dist-packages"))


def is_atom(value: object) -> bool:
    """Whether a value can neither change nor lead to anything that can."""
    return type(value) in _ATOMS


def is_plain(value: object) -> bool:
    """Whether the attributes of an object are plain state, and not a library's own."""
    return _package(type(value)) not in _FOREIGN - _PLAIN


@functools.cache
def _names(code: types.CodeType) -> frozenset[str]:
    """The names that code mentions, as names or as strings, nested functions included."""
    found = (name for each in nested(code) for name in mentioned(each))
    return frozenset(name for name in found if name.isidentifier())  # no "@pytest_ar"
