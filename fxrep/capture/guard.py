"""Whether the modules that a graph was made from are what they were.

A graph of fused layers stands for a module's forward only as long as nobody changes the module:
loads or trains its weights, calls ``train()``, sets a stride, registers a hook. Python code has
many ways to do so and no way to tell of it; so the state of the modules is compared at each call,
in about a microsecond for each module.

What the comparison does not see: writes that leave a tensor's version as it is (through `numpy()`,
DLPack, a storage, or ``tensor.data.mul_``), and changes inside libraries other than the one that
the modules are written in.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence, Set
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule

from fxrep.capture.code import Key
from fxrep.capture.held import Held
from fxrep.capture.outside import Outside
from fxrep.capture.same import Attributes, all_alike
from fxrep.capture.sharing import Record
from fxrep.capture.versions import Versions
from fxrep.ops.owner import global_hooks, weight_hooks

_requires_grad = attrgetter("requires_grad")

# By classes, the ids of functions that objects hold, and the code that ran.
Known = dict[tuple[frozenset[type], frozenset[int], frozenset[Key] | None], Outside]


class Unchanged(Record):
    """The state of some modules and of what they read, recorded once and compared at each call.

    A copy or a pickle of a record that holds is a record of the copied modules.

    Args:
        modules: the modules, each once.
        known: what classes of modules read outside of them, if another record has found it.
        ran: the code that ran, by `fxrep.capture.code.key`; None if any may have run.
        also: other objects that they use.
    """

    also: Sequence[Any] = ()  # pickles of earlier versions have none

    def __init__(
        self,
        modules: Iterable[nn.Module],
        known: Known | None = None,
        ran: frozenset[Key] | None = None,
        also: Iterable[Any] = (),
    ) -> None:
        self.modules = list(modules)
        self.ran = ran
        self.also = list(also)
        self._record(known if known is not None else {})

    def _record(self, known: Known) -> None:
        self._find(known)
        self.types = list(map(type, self.modules))
        # The hook of a weight_norm sets the weight at each call.
        self.hooked = [m for m in self.modules if weight_hooks(m)]
        self.hooked_attributes = self._hooked_attributes()
        plain = [m for m in self.modules if not weight_hooks(m)]
        # Whoever replaced the forward of the first, and calls the one before, may do so.
        own = frozenset({"forward", "_compiled_call_impl"} if plain[:1] == self.modules[:1] else ())
        self.attributes = Attributes(plain, self.outside.names, own)
        self.held.watch(self.outside.names)
        tensors = [t for m in self.modules for t in _tensors(m)]
        self.versions = Versions([*tensors, *self.held.tensors])
        self._read()

    def _hooked_attributes(self) -> list[Any]:
        return [each for m in self.hooked for item in _without_weights(m).items() for each in item]

    def _find(self, known: Known) -> None:
        """Find what the modules hold and read, and the modules among that, in turn."""
        while True:
            self.held = Held(self.modules, self.also)
            kinds = [*map(type, self.modules), *self.held.kinds]
            key = frozenset(kinds), frozenset(map(id, self.held.code)), self.ran
            if key not in known:
                known[key] = Outside(kinds, self.held.code, self.ran)
            self.outside = known[key]
            found = _with_children([*self.held.modules, *self.outside.modules], self.outside.names)
            own = set(map(id, self.modules))
            others = [module for module in found if id(module) not in own]
            if not others:
                return
            self.modules += others

    def _read(self) -> None:
        """Read what no copy or pickle holds."""
        kinds = dict.fromkeys(each for kind in self.types for each in _own_mro(kind))
        self.classes = Attributes(kinds, self.outside.names)
        self.global_hooks = global_hooks()

    def holds(self, *, exported: bool = False) -> bool:
        """Whether the modules, what they read and the content of their tensors are the same.

        Args:
            exported: torch.export runs the modules, with fake tensors in place of their own.
        """
        try:
            holds = self._is_same(exported)
            if holds and (self.attributes.renewed or self.held.attributes.renewed):
                self._record({})
        except Exception:  # a value that cannot be compared is another value than before
            return False
        return holds

    def _is_same(self, exported: bool) -> bool:
        return (
            self.versions.same()
            and list(map(type, self.modules)) == self.types
            and self.classes.same()
            # An export sets hooks of its own.
            and (exported or global_hooks() == self.global_hooks)
            and self.attributes.same()
            and all_alike(self._hooked_attributes(), self.hooked_attributes)
            and self.held.same(faked=exported)
            and self.outside.same(exported=exported)
        )

    def is_trained(self) -> bool:
        """Whether a tensor takes gradients."""
        return any(map(_requires_grad, self.versions.tensors))

    def __deepcopy__(self, memo: dict[int, Any]) -> Unchanged:
        made = Unchanged.__new__(Unchanged)
        memo[id(self)] = made
        try:
            made.__setstate__(copy.deepcopy(self._state(), memo))
        except Exception:  # the modules' own way to copy leaves out what cannot be copied
            made.__setstate__(Unchanged([])._state(holds=False))
        return made

    def _state(self, *, holds: bool | None = None) -> dict[str, Any]:
        read_again = ("classes", "global_hooks")
        state = {name: v for name, v in self.__dict__.items() if name not in read_again}
        holds = self.holds() if holds is None else holds
        return {**state, "types": self.types if holds else [Unchanged]}

    def __getstate__(self) -> dict[str, Any]:
        # A module's own way to pickle may leave out what cannot be pickled.
        if any(type(module).__getstate__ is not _GETSTATE for module in self.modules):
            return Unchanged([])._state(holds=False)
        return self._state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._read()


_GETSTATE = nn.Module.__getstate__


def _own_mro(kind: type) -> list[type]:
    """The classes of modules, less nn.Module, whose attributes a symbolic trace changes."""
    if issubclass(kind, ScriptModule):  # its code is no attribute of the class
        return []
    return [each for each in kind.__mro__ if issubclass(each, nn.Module) and each is not nn.Module]


def _without_weights(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module without those that torch's hooks set at each call."""
    hooks = weight_hooks(module)
    computed = {getattr(each, key, None) for each in hooks for key in ("name", "_tensor_name")}
    return {name: value for name, value in module.__dict__.items() if name not in computed}


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for kind in (module._parameters, module._buffers):
        yield from (tensor for tensor in kind.values() if tensor is not None)
    yield from (value for value in _without_weights(module).values() if isinstance(value, Tensor))


def _with_children(modules: Iterable[nn.Module], names: Set[str] | None) -> list[nn.Module]:
    """Modules and those of the modules below them to which names lead."""
    found: dict[int, nn.Module] = {}
    ahead = list(modules)
    while ahead:
        module = ahead.pop()
        if id(module) not in found:
            found[id(module)] = module
            ahead += [
                c
                for n, c in module._modules.items()
                if c is not None and (names is None or n in names)
            ]
    return list(found.values())
