"""A module tree that is being traced: tensors read are traced values, and calls are the tracer's.

Given: the skeleton of a model, which is the tracer's own copy. Result: ``self.weight`` gives a
traced value, ``self.conv(x)`` asks the tracer, and what a forward writes is noticed; all that
without a change to any class, so that no other thread ever meets it.
"""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from fxrep.capture.proxies import ParameterWrite, Unfaithful
from fxrep.ops.owner import foreign_hooks

if TYPE_CHECKING:
    from fxrep.capture.tracer import Tracer


class _Registered(dict[str, Any]):
    """What a module registers under one of `_parameters`, `_buffers`, `_modules`: not written."""

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
    """Buffers by name: each read is a node of the graph."""

    def __getitem__(self, name: str) -> Any:
        return self.tracer.attribute(super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401


class _Parameters(_Buffers):
    """Parameters by name."""

    error = ParameterWrite


class Hollow:
    """The modules of a tree while they are traced.

    Args:
        root: of a skeleton.
        tracer: asked for every tensor that is read, and for every module that is called.
    """

    def __init__(self, root: nn.Module, tracer: Tracer) -> None:
        self.tracer = tracer
        self.modules = list(root.modules())
        self.hidden = _hidden(self.modules)
        self.originals = [dict(module.__dict__) for module in self.modules]
        self.hooks = {id(module): _Hooks(module) for module in self.modules}
        self.filled: dict[int, dict[str, Any]] = {}
        self._below: dict[int, list[nn.Module]] = {}

    def fill(self) -> None:
        """Put the tracer between the modules and their tensors and calls."""
        for module in self.modules:
            own = module.__dict__
            own["_parameters"] = _Parameters(own["_parameters"], self.tracer)
            own["_buffers"] = _Buffers(own["_buffers"], self.tracer)
            own["_modules"] = _Registered(own["_modules"], self.tracer)
            # what torch.compile's in-place form uses: a call that is not the class's own
            own["_compiled_call_impl"] = functools.partial(self._call, module)
            self.filled[id(module)] = dict(own)
        for module in self.hidden:
            module.__dict__["_compiled_call_impl"] = functools.partial(self._call_hidden, module)

    def empty(self) -> None:
        """Give every module back all that it had. Calling it again changes nothing."""
        for module, original in zip(self.modules, self.originals, strict=True):
            _assign(module, original)
            self.hooks[id(module)].restore()
        for module in self.hidden:
            module.__dict__.pop("_compiled_call_impl", None)

    def _call_hidden(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if foreign_hooks(module) or any(True for _ in module.state_dict()):
            name = type(module).__name__
            raise self.tracer.refuse(Unfaithful(f"forward calls a {name} that no module registers"))
        return module.forward(*args, **kwargs)

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.call(module, args, kwargs)

    def below(self, root: nn.Module) -> list[nn.Module]:
        """A module and all below it."""
        if id(root) not in self._below:
            self._below[id(root)] = list(root.modules())
        return self._below[id(root)]

    def written(self, root: nn.Module) -> str | None:
        """An attribute that was set or deleted, at a module or one below it, if there is one."""
        return next((name for m in self.below(root) for name in self._changes(m)), None)

    def restore(self, root: nn.Module) -> None:
        """Undo what was set or deleted at a module and below."""
        for module in self.below(root):
            if any(True for _ in self._changes(module)):
                _assign(module, self.filled[id(module)])
                self.hooks[id(module)].restore()

    def _changes(self, module: nn.Module) -> Iterator[str]:
        now, before = module.__dict__, self.filled[id(module)]
        same: Callable[..., bool] = operator.is_
        if self.hooks[id(module)].changed():
            yield "_forward_hooks"
        if len(now) == len(before) and all(map(same, now.values(), before.values())):
            return
        for name in (*now, *before):
            if name not in now or name not in before or now[name] is not before[name]:
                yield name


class _Hooks:
    """The hooks of a module, which a forward may register: dicts that are written in place."""

    def __init__(self, module: nn.Module) -> None:
        self.dicts = [v for v in module.__dict__.values() if type(v) is OrderedDict]
        self.saved = [(each, dict(each)) for each in self.dicts if each]
        self.count = sum(map(len, self.dicts))

    def changed(self) -> bool:
        """Whether a hook was registered or removed."""
        return sum(map(len, self.dicts)) != self.count

    def restore(self) -> None:
        """Remove what was registered, register what was removed."""
        if self.changed():
            for each in self.dicts:
                each.clear()
            for each, saved in self.saved:
                each.update(saved)


def _hidden(modules: list[nn.Module]) -> list[nn.Module]:
    """Modules that those of a tree keep in lists and other plain containers, and all below them."""
    known = {id(module) for module in modules}
    found: list[nn.Module] = []
    plain = nn.Module().__dict__.keys()

    def collect(value: object, depth: int) -> None:
        if isinstance(value, nn.Module):
            for module in value.modules():
                if id(module) not in known:
                    known.add(id(module))
                    found.append(module)
        elif depth < 4 and isinstance(value, dict | list | tuple | set):
            for each in value.values() if isinstance(value, dict) else value:
                collect(each, depth + 1)

    for module in modules:
        for name, value in module.__dict__.items():
            if name not in plain:
                collect(value, 0)
    return found


def _assign(module: nn.Module, values: dict[str, Any]) -> None:
    own = module.__dict__
    own.clear()
    own.update(values)
