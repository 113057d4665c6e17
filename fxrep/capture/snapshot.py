"""The state that the forwards of a model can write, as it was before they were traced.

Given: `self.counter.n += 1` in a forward, or `type(self).calls += 1`, `CACHE.append(x)`,
`rng.random()`. A trace runs the forward, on a copy of the module tree that shares classes, global
names and closures with the user's model.

Result: all of it is found changed and put back. The module whose forward wrote it is left as
Python, and so is every other module that can read it: what it read would be a constant of a graph.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

from fxrep.capture.code import nested
from fxrep.capture.kept import (
    Cached,
    Cell,
    Drawing,
    Items,
    Kept,
    Names,
    Setting,
    TensorContent,
    kept,
)
from fxrep.capture.reach import Reach, Tree, is_atom
from fxrep.capture.settings import process
from fxrep.errors import ModelError
from fxrep.ops.memory import Memory
from fxrep.ops.owner import EVERY_MODULE, foreign_hooks

_NOTHING = Reach((), (), Tree(()))

# The id of an object or cell, or that of a namespace and one of its names.
Key = int | tuple[int, str]


class _Owned:
    """What a module can reach: what many modules of a class can, which keep nothing of their own.

    Args:
        attributes: the names of its own attributes.
        held: what its attributes hold.
        code: what the code of its forward reaches besides.
        hooks: what its hooks reach, which always run as Python.
    """

    def __init__(
        self, attributes: frozenset[str], held: Reach, code: Reach, hooks: Reach = _NOTHING
    ) -> None:
        self.attributes = attributes
        self.reaches = (held, code)
        self.hooks = hooks
        self.names = code.names
        self.barred = next((why for reach in self.reaches for why in reach.barred), None)

    def reaches_key(self, key: Key) -> bool:
        """Whether a piece of state can be reached."""
        if isinstance(key, tuple):
            spaces = (reach.namespaces.get(key[0]) for reach in self.reaches)
            return any(space is not None and key[1] in space[1] for space in spaces)
        return any(key in reach.objects or key in reach.cells for reach in self.reaches)


class _OnTensors:
    """The attributes of some tensors; hardly any tensor has one."""

    what = "forward sets an attribute of a tensor"

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        found = [tensor.__dict__ for tensor in tensors]
        self.empty = [each for each in found if not each]
        self.filled = [Items(each) for each in found if each]

    def changed(self) -> bool:
        """Whether an attribute was set or deleted."""
        return any(self.empty) or any(each.changed() for each in self.filled)

    def restore(self) -> None:
        """Set what was set or deleted, delete what was added."""
        for each in self.empty:
            each.clear()
        for items in self.filled:
            items.restore()


class Snapshot:
    """The state that a tree of modules can reach.

    Args:
        root: the tree.

    Attributes:
        tensors: the tensors that can be reached, those of the modules included.
        written: by key, the state that forwards were found to write, as reasons for the report.
        traced: ids of the modules whose forwards are parts of graphs.
        refused: ids of the tensors that a forward tried to write.
        thorough: the content of tensors is looked at whenever state is.
        strays: what code reaches that ran though no name leads to it.
        careful: some forward was found to write or to draw numbers: which one is to be found.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules = list(root.modules())
        self.kinds = [type(module) for module in self.modules]
        self.written: dict[Key, str] = {}
        self.traced: set[int] = set()
        self.refused: set[int] = set()
        self.careful = self.thorough = False
        self._tree = Tree(self.modules)
        self._code: dict[Any, Reach] = {}
        self._alike: dict[tuple[type, frozenset[str]], _Owned] = {}
        self._owned = {id(module): self._reached(module) for module in self.modules}
        owned = self._owned.values()
        reaches = {id(r): r for each in owned for r in (*each.reaches, each.hooks)}.values()
        registered = (*root.parameters(), *root.buffers())
        held = (t for reach in reaches for t in reach.tensors.values())
        self.tensors = list({id(t): t for t in (*registered, *held)}.values())
        self._kept = _kept(reaches)
        functions = (function for reach in reaches for function in reach.functions.values())
        # By id: the hash of code itself costs more.
        codes = (code for each in functions for code in nested(each.__code__))
        self._code_in_reach = {id(code): code for code in codes}
        self.strays: dict[types.CodeType, Reach] = {}
        threads = any(reach.starts_threads for reach in reaches)  # whose writes no mode sees
        self._contents = {id(t): TensorContent(t) for t in self.tensors if threads}
        self._generators = [each for each in self._kept.values() if isinstance(each, Drawing)]
        self._on_tensors = _OnTensors(self.tensors)
        self._barred = self._all_barred()

    def _reached(self, module: nn.Module) -> _Owned:
        kind, attributes = type(module), frozenset(vars(module)) - EVERY_MODULE
        values = [
            (f"self.{name}", value)
            for name, value in vars(module).items()
            if name in attributes and not is_atom(value)
        ]
        hooks = foreign_hooks(module)
        if not values and not hooks and (kind, attributes) in self._alike:
            return self._alike[kind, attributes]
        held = Reach(values, (), self._tree) if values else _NOTHING
        key = (kind, *held.code)
        if key not in self._code:
            self._code[key] = Reach(values if held.code else (), (kind,), self._tree)
        owned = _Owned(attributes, held, self._code[key], self._reached_by(hooks))
        if not values and not hooks:
            self._alike[kind, attributes] = owned
        return owned

    def _reached_by(self, hooks: list[Any]) -> Reach:
        if not hooks:
            return _NOTHING
        key = tuple(map(id, hooks))
        if key not in self._code:
            values = [("a hook", hook) for hook in hooks]
            self._code[key] = Reach(values, map(type, hooks), self._tree)
        return self._code[key]

    def _all_barred(self) -> dict[int, str]:
        found = {key: owned.barred for key, owned in self._owned.items() if owned.barred}
        for barred in [self._owned[key] for key in found]:
            for key, owned in self._owned.items():
                if barred.attributes & owned.names:
                    found.setdefault(key, str(barred.barred))
        return found

    def barred(self, module: nn.Module) -> str | None:
        """Why the forward of a module must not be run; None if it may.

        It reaches state that could not be put back, or state that a forward was found to write.
        """
        return self._barred.get(id(module))

    def bar(self, module: nn.Module, reason: str) -> None:
        """Let the forward of a module not be run, for another reason."""
        self._barred[id(module)] = reason

    @property
    def unrunnable(self) -> str | None:
        """Why not even a copy may be run: state outside of it could not be put back. None if so."""
        owned = self._owned.values()
        reaches = (reach for each in owned for reach in (each.reaches[1], each.hooks))
        return next((why for reach in reaches for why in reach.barred), None)

    def bars_traced(self, modules: Iterable[int]) -> bool:
        """Whether one of some modules, by id, turned out to be barred after it was traced."""
        return any(key in self._barred for key in modules)

    def knows(self, code: types.CodeType) -> bool:
        """Whether some code is that of a function to which names lead."""
        return id(code) in self._code_in_reach

    def meet(self, frame: types.FrameType) -> Reach:
        """Keep the state that a function reaches which starts, and to which no name has led.

        ``getattr(self, f"run_{self.mode}")(x)`` and objects of ``operator`` lead to such.
        """
        code = frame.f_code
        if code not in self.strays:
            self.strays[code] = found = self._tree.reached_by(frame)
            self.keep([found])
        return self.strays[code]

    def keep(self, reaches: Iterable[Reach]) -> None:
        """Keep the state that code reaches, as it is now, if it is not kept yet."""
        for key, state in _kept(reaches).items():
            if not isinstance(state, Setting):
                self._kept.setdefault(key, state)

    def why_written(self, found: Reach) -> str | None:
        """Why a graph must not do without code that reaches so much; None if it may.

        It can read what a forward was found to write.
        """
        keys: set[Key] = {*found.objects, *found.cells}
        keys |= {(key, name) for key, (_, names) in found.namespaces.items() for name in names}
        return next((why for key, why in self.written.items() if key in keys), None)

    def disturb(self) -> None:
        """Let every seed be found, also one that leads to the state that a generator has."""
        for each in self._generators:
            each.disturb()

    def calm(self) -> None:
        """Give the generators back their states. A second call changes nothing."""
        for each in self._generators:
            each.calm()

    def is_written(self, whole: bool = False) -> bool:
        """Whether any state was written since the snapshot; `whole` as for `restore`."""
        written = any(True for _ in _described(self._changed(whole)))
        return written or self._on_tensors.changed() or self.class_set() is not None

    def find_written(self) -> str | None:
        """Note what was written since the snapshot; why a graph cannot do the same, or None."""
        return self._note(self._changed())

    def _changed(self, whole: bool = False) -> list[tuple[int, Kept]]:
        """What has changed; of tensors, without `whole`, what torch has counted."""
        found = [(key, each) for key, each in self._kept.items() if each.changed()]
        for key, content in self._contents.items():
            if content.changed() if whole or self.thorough else content.counted():
                found.append((key, content))
        return found

    def _note(self, changed: Iterable[tuple[int, Kept]]) -> str | None:
        reason = None
        for key, what in _described(changed):
            reason = reason or f"forward writes {what}"
            if key not in self.written:
                self.written[key] = f"forward can read what another one writes: {what}"
                self._bar_users(key)
        return reason

    def _bar_users(self, key: Key) -> None:
        """Bar every module that can reach a piece of state, or the attribute that holds it."""
        users = {k: owned for k, owned in self._owned.items() if owned.reaches_key(key)}
        names = {
            name
            for owned in users.values()
            if isinstance(key, int) and key in owned.reaches[0].objects
            for name in owned.attributes
        }
        for module, owned in self._owned.items():
            if module in users or names & owned.names:
                self._barred.setdefault(module, self.written[key])

    def began_empty(self, owner: object, name: str) -> bool:
        """Whether an attribute of a module is a dict that was empty before the trace."""
        value = owner.__dict__.get(name) if isinstance(owner, nn.Module) else None
        items = self._kept.get(id(value)) if isinstance(value, dict) else None
        return isinstance(items, Items) and items.began_empty

    def tensor_attribute(self) -> str | None:
        """Why a graph cannot do what a forward did: set an attribute of a tensor. None if not."""
        return self._on_tensors.what if self._on_tensors.changed() else None

    def class_set(self) -> str | None:
        """Why a graph cannot do what a forward did: set the class of a module. None if not."""
        changed = any(map(operator.is_not, map(type, self.modules), self.kinds))
        return "forward sets the class of a module" if changed else None

    def restore(self, whole: bool = True) -> None:
        """Note what was written, and put everything back. A second call changes nothing.

        Args:
            whole: look at the content of tensors, too, where no mode sees all writes. To look at
                each tensor after each of many runs takes time that grows with their product.
        """
        changed = self._changed(whole)
        self._note(changed)
        for each in (*dict(changed).values(), self._on_tensors):
            if each.changed():  # what was put back before may have been part of it
                each.restore()
        for module, kind in zip(self.modules, self.kinds, strict=True):
            if type(module) is not kind:
                object.__setattr__(module, "__class__", kind)


def check_shared_tensors(model: nn.Module, refused: Container[int]) -> None:
    """Refuse a model if its copy writes tensors that it shares with the model itself.

    Args:
        model: the user's model.
        refused: ids of the tensors that forwards of its copy tried to write.

    Raises:
        ModelError: an attribute holds such a tensor, because its copy is itself.
    """
    tree = Tree(model.modules())
    copied = Memory((*model.parameters(), *model.buffers()))  # with all that shares its memory
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in EVERY_MODULE or is_atom(value):
                continue
            held = Reach([(name, value)], (), tree)
            if any(key in refused and t not in copied for key, t in held.tensors.items()):
                where = ".".join(filter(None, ("model", path, name)))
                raise ModelError(
                    f"{where} ({type(value).__name__}) holds a tensor that the forward writes, and "
                    "its copy holds the same tensor, so that the optimized model would write that "
                    "of the original; give its __deepcopy__ a copy to return"
                )


def _kept(reaches: Iterable[Reach]) -> dict[int, Kept]:
    found: dict[int, Kept] = {id(setting): setting for setting in process()}
    spaces: dict[int, tuple[dict[str, Any], set[str]]] = {}
    for reach in reaches:
        for key, value in reach.objects.items():
            if key not in found:
                state = kept(value)
                if state is not None:
                    found[key] = state
        for key, cell in reach.cells.items():
            found.setdefault(key, Cell(cell))
        for key, (namespace, names) in reach.namespaces.items():
            spaces.setdefault(key, (namespace, set()))[1].update(names)
    found.update((key, Names(namespace, names)) for key, (namespace, names) in spaces.items())
    return found


def _described(changed: Iterable[tuple[int, Kept]]) -> Iterator[tuple[Key, str]]:
    for key, each in changed:
        if isinstance(each, Names):
            yield from (((key, name), f"the global name '{name}'") for name in each.written())
        elif isinstance(each, Cached) and _holds_constants(each):
            continue
        elif not (isinstance(each, Items) and _is_cache(each)):
            yield key, each.what


def _holds_constants(cache: Cached) -> bool:
    """Whether all new results are results of constants, as they would be at any other call."""
    values = cache.new_values()
    return values is not None and not any(
        isinstance(value, fx.Proxy | torch.Tensor) for value in values
    )


def _is_cache(items: Items) -> bool:
    """Whether a dict has new entries only, and none that depends on the forward's inputs."""
    values = items.new_values()
    if values is None or not all(isinstance(value, fx.Proxy | torch.Tensor) for value in values):
        return False
    stack = [value.node for value in values if isinstance(value, fx.Proxy)]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node._erased or node.op == "placeholder":
            return False
        stack.extend(node.all_input_nodes)
    return True
