"""A hollow module tree: modules whose tensors and calls are replaced by the tracer's.

Given: the skeleton of a model, which is the tracer's own copy.
Result: ``self.weight`` gives a traced value, ``self.conv(x)`` asks the tracer, and a forward that
writes attributes is refused. No class is changed, so that other threads are not affected.
"""

from __future__ import annotations

import functools
import operator
import types
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from fxrep.capture.proxies import ParameterWrite, Unfaithful
from fxrep.ops.owner import EVERY_MODULE, foreign_hooks

if TYPE_CHECKING:
    from fxrep.capture.tracer import Tracer


class _Registered(dict[str, Any]):
    """A module's `_parameters`, `_buffers` or `_modules` that refuses to be written."""

    __slots__ = ("tracer",)
    error: type[Unfaithful] = Unfaithful

    def __init__(self, values: dict[str, Any], tracer: Tracer) -> None:
        super().__init__(values)
        self.tracer = tracer

    def _refuse(self, name: str = "", *_: object, **__: object) -> NoReturn:
        which = f"the attribute '{name}'" if isinstance(name, str) and name else "attributes"
        raise self.tracer.refuse(self.error(f"forward sets {which} of a module"))

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise self.tracer.refuse(Unfaithful("forward copies a module"))

    __setitem__ = __delitem__ = setdefault = pop = _refuse

    def clear(self) -> NoReturn:
        self._refuse()

    def popitem(self) -> NoReturn:
        self._refuse()

    def update(self, *_: object, **__: object) -> NoReturn:
        self._refuse()


class _Buffers(_Registered):
    """The buffers of a module, which are read as traced values."""

    __slots__ = ()

    def __getitem__(self, name: str) -> Any:
        return self.tracer.attribute(super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401


class _Parameters(_Buffers):
    """The parameters of a module, which are read as traced values."""

    __slots__ = ()
    error = ParameterWrite


class Hollow:
    """The modules of a tree, hollow from `install` to `uninstall`.

    Args:
        root: a module of the skeleton.
        tracer: asked for every tensor that is read, and for every module that is called.
    """

    def __init__(self, root: nn.Module, tracer: Tracer) -> None:
        self.tracer = tracer
        self.modules = list(root.modules())
        self.unregistered = _unregistered(self.modules)
        self.originals = {id(module): dict(module.__dict__) for module in self.modules}
        hooks = {key: _hooks(own) for key, own in self.originals.items()}
        self.hooks = {key: list(map(dict, each)) for key, each in hooks.items() if any(each)}
        self.kinds = {id(module): type(module) for module in self.modules}
        self.installed: dict[int, dict[str, Any]] = {}
        self._below: dict[int, _Below] = {}

    def install(self) -> None:
        """Put the tracer between the modules and their tensors and calls."""
        empty = {kind: kind({}, self.tracer) for kind in (_Parameters, _Buffers, _Registered)}

        def registered(kind: type[_Registered], values: dict[str, Any]) -> _Registered:
            return kind(values, self.tracer) if values else empty[kind]

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.tracer.call(module, args, kwargs)

        for module in self.modules:
            own = module.__dict__
            own["_parameters"] = registered(_Parameters, own["_parameters"])
            own["_buffers"] = registered(_Buffers, own["_buffers"])
            own["_modules"] = registered(_Registered, own["_modules"])
            # `nn.Module.__call__` hands the call to this attribute, which `Module.compile` sets.
            own["_compiled_call_impl"] = types.MethodType(call, module)
            self.installed[id(module)] = dict(own)
        for module in self.unregistered:
            module.__dict__["_compiled_call_impl"] = functools.partial(
                self._call_unregistered, module
            )

    def uninstall(self) -> None:
        """Give every module its own attributes back. A second call changes nothing."""
        for module in self.modules:
            _replace_attributes(module, self.originals[id(module)])
            self._restore_hooks(module)
        for module in self.unregistered:
            module.__dict__.pop("_compiled_call_impl", None)

    def plain(self) -> nn.Module:
        """The tree as it was before `install`, as other modules with the same tensors."""
        copies = {id(module): object.__new__(type(module)) for module in self.modules}
        for key, original in self.originals.items():
            children = {n: copies.get(id(c), c) for n, c in original["_modules"].items()}
            copies[key].__dict__.update(original | {"_modules": children})
        return copies[id(self.modules[0])]

    def _call_unregistered(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if foreign_hooks(module) or any(True for _ in module.state_dict()):
            name = type(module).__name__
            raise self.tracer.refuse(Unfaithful(f"forward calls a {name} that no module registers"))
        return module.forward(*args, **kwargs)

    def below(self, root: nn.Module) -> _Below:
        """A module and all modules below it."""
        found = self._below.get(id(root))
        if found is None:
            found = self._below[id(root)] = _Below(self, list(root.modules()))
        return found

    def written_attribute(self, root: nn.Module) -> str | None:
        """The name of an attribute that was set or deleted at a module or below, if any."""
        if not root._modules:
            return next(iter(self._changes(root)), None)
        below = self.below(root)
        if not below.changed():
            return None
        return next(chain.from_iterable(map(self._changes, below.modules)), None)

    def restore(self, root: nn.Module) -> None:
        """Undo all that was set or deleted at a module and below."""
        for module in self.below(root).modules:
            if self._changes(module):
                _replace_attributes(module, self.installed[id(module)])
                self._restore_hooks(module)

    def _hooks_changed(self, module: nn.Module) -> bool:
        """Whether a hook was registered or removed."""
        now, before = _hooks(self.originals[id(module)]), self.hooks.get(id(module), ())
        return sum(map(len, now)) != sum(map(len, before))

    def _restore_hooks(self, module: nn.Module) -> None:
        """Remove the hooks that were registered, register those that were removed."""
        if self._hooks_changed(module):
            dicts = _hooks(self.originals[id(module)])
            saved: list[dict[Any, Any]] = self.hooks.get(id(module)) or [{} for _ in dicts]
            for each, before in zip(dicts, saved, strict=True):
                each.clear()
                each.update(before)

    def _changes(self, module: nn.Module) -> list[str]:
        """The names of the attributes of one module that were set or deleted."""
        now, before = module.__dict__, self.installed[id(module)]
        found = ["_forward_hooks"] if self._hooks_changed(module) else []
        if type(module) is not self.kinds[id(module)]:
            found.append("__class__")
        if len(now) != len(before) or not all(map(operator.is_, now.values(), before.values())):
            names = dict.fromkeys((*now, *before))
            found += [n for n in names if now.get(n, self) is not before.get(n, self)]
        return found


class _Below:
    """A module and those below it, compared with what they were without a step of Python code each.

    Args:
        hollow: knows what they were.
        modules: the modules.
    """

    def __init__(self, hollow: Hollow, modules: list[nn.Module]) -> None:
        self.modules = modules
        attributes = [hollow.installed[id(module)] for module in modules]
        self.kinds = [hollow.kinds[id(module)] for module in modules]
        self.values = list(chain.from_iterable(map(dict.values, attributes)))
        self.sizes = list(map(len, attributes))
        self.hooks = [value for value in self.values if type(value) is OrderedDict]
        self.hooked = any(id(module) in hollow.hooks for module in modules)

    def changed(self) -> bool:
        """Whether an attribute or a class may have been set, or a hook registered or removed."""
        now = list(map(vars, self.modules))
        values = chain.from_iterable(map(dict.values, now))
        return (
            self.hooked
            or any(self.hooks)
            or list(map(len, now)) != self.sizes
            or any(map(operator.is_not, values, self.values))
            or any(map(operator.is_not, map(type, self.modules), self.kinds))
        )


def _hooks(attributes: dict[str, Any]) -> list[dict[Any, Any]]:
    """The dicts of hooks of a module: registering a hook writes one in place."""
    return [value for value in attributes.values() if type(value) is OrderedDict]


def _unregistered(modules: list[nn.Module]) -> list[nn.Module]:
    """Modules that a tree keeps in plain attributes and containers, and all modules below them."""
    known = {id(module) for module in modules}
    found: dict[int, nn.Module] = {}
    for module in modules:
        for name, value in module.__dict__.items():
            if name not in EVERY_MODULE:
                found.update((id(each), each) for each in _kept_modules(value, 0))
    return [module for key, module in found.items() if key not in known]


def _kept_modules(value: object, depth: int) -> Iterator[nn.Module]:
    """The modules in an attribute, those below them included."""
    if isinstance(value, nn.Module):
        yield from value.modules()
    elif depth < 4 and isinstance(value, dict | list | tuple | set):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _kept_modules(each, depth + 1)


def _replace_attributes(module: nn.Module, values: dict[str, Any]) -> None:
    own = module.__dict__
    own.clear()
    own.update(values)
