"""Whether objects hold what they held: the same objects, or numbers and texts of the same type.

A comparison is a few calls of C functions while nothing has changed. What has changed is looked at
name by name; what no code reads may be another, and is then part of what is compared with.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterable, Mapping, Set
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

from fxrep.capture.namespaces import MISSING
from fxrep.capture.reach import is_atom
from fxrep.ops.owner import EVERY_MODULE

_attributes_of = attrgetter("__dict__")
_values_of: Callable[[Any], Iterable[Any]] = operator.methodcaller("values")


def identical(now: list[Any], saved: list[Any]) -> bool:
    """Whether two lists have the same objects."""
    return len(now) == len(saved) and all(map(operator.is_, now, saved))


def alike(now: Any, saved: Any) -> bool:
    """Whether two values are one object, or equal constants of one type: 1, 1.0, True are three."""
    if now is saved:
        return True
    if type(now) is not type(saved):
        return False
    if type(now) in (tuple, list):
        return len(now) == len(saved) and all(map(alike, now, saved))
    if type(now) is dict:
        return alike([*now], [*saved]) and alike([*now.values()], [*saved.values()])
    if type(now) is types.MethodType:
        return now.__self__ is saved.__self__ and now.__func__ is saved.__func__
    return is_atom(now) and repr(now) == repr(saved)


def all_alike(now: list[Any], saved: list[Any]) -> bool:
    """Whether two lists have values that are alike; then `saved` has those of `now`."""
    if identical(now, saved):
        return True
    if len(now) != len(saved) or not all(map(alike, now, saved)):
        return False
    saved[:] = now  # copies of constants: the next comparison is one of objects again
    return True


class Attributes:
    """The attributes of some objects, modules or classes.

    Args:
        owners: the objects.
        names: those that code reads; None for all.
        but: names that do not count, for the first owner.

    Attributes:
        renewed: a container was replaced by another one with the same content.
    """

    def __init__(
        self, owners: Iterable[Any], names: Set[str] | None = None, but: Set[str] = frozenset()
    ) -> None:
        self.owners = list(owners)
        self.names = names
        self.but = but
        self.renewed = False
        self._record()

    def _record(self) -> None:
        self.saved = [dict(vars(owner)) for owner in self.owners]
        own = [(owner, vars(owner).keys() - EVERY_MODULE) for owner in self.owners]
        # Of one name a getter gives no tuple.
        self.getters = [
            itemgetter(*names, *(names if len(names) == 1 else ())) for _, names in own if names
        ]
        self.holders = [owner for owner, names in own if names]
        self.values = self._own_values()

    def _own_values(self) -> list[Any]:
        """The values that not every module has."""
        attributes = map(_attributes_of, self.holders)
        return list(chain.from_iterable(map(operator.call, self.getters, attributes)))

    def _are_identical(self, now: list[Mapping[str, Any]]) -> bool:
        # Dicts compare their values by identity first, but then by equality.
        try:
            return now == self.saved and identical(self._own_values(), self.values)
        except Exception:  # values that cannot be compared, or a missing one
            return False

    def same(self) -> bool:
        """Whether all that code reads is what it was."""
        now = list(map(_attributes_of, self.owners))
        if self._are_identical(now):
            return True
        first = self.but
        for attributes, saved in zip(now, self.saved, strict=True):
            if not self._same_of_one(attributes, saved, first):
                return False
            first = frozenset()
        self._record()
        return True

    def _same_of_one(self, now: Mapping[str, Any], saved: dict[str, Any], but: Set[str]) -> bool:
        for name in now.keys() | saved.keys():
            value, before = now.get(name, MISSING), saved.get(name, MISSING)
            if value is before or name in but:
                continue
            if alike(value, before):
                self.renewed |= isinstance(value, list | dict)
            elif self.names is None or name in self.names:
                return False
        return True


class Items:
    """The items of some dicts, lists, sets and deques, in their order.

    Args:
        containers: the containers.
    """

    def __init__(self, containers: Iterable[Any]) -> None:
        found = list(containers)
        self.empty = [each for each in found if not each]
        self.containers = [each for each in found if each]
        self.mappings = [each for each in self.containers if isinstance(each, dict)]
        self.sizes = list(map(len, self.containers))
        self.items = list(chain.from_iterable(self.containers))
        self.values = list(chain.from_iterable(map(_values_of, self.mappings)))

    def same(self) -> bool:
        """Whether all items are what they were."""
        if any(self.empty) or list(map(len, self.containers)) != self.sizes:
            return False
        if not all_alike(list(chain.from_iterable(self.containers)), self.items):
            return False
        values = list(chain.from_iterable(map(_values_of, self.mappings)))
        return all_alike(values, self.values)


class Tables:
    """Some dicts whose order means nothing: those of the parameters and buffers of modules.

    Args:
        tables: the dicts.
    """

    def __init__(self, tables: Iterable[dict[str, Any]]) -> None:
        found = list(tables)
        self.empty = [each for each in found if not each]
        self.tables = [each for each in found if each]
        self._record()

    def _record(self) -> None:
        self.saved = list(map(dict, self.tables))
        self.keys = list(chain.from_iterable(self.saved))
        self.values = list(chain.from_iterable(map(_values_of, self.saved)))

    def same(self, allowed: Callable[[Any], bool] | None = None) -> bool:
        """Whether all values are what they were.

        Args:
            allowed: whether a value may be another now.
        """
        if any(self.empty):
            return False
        values = list(chain.from_iterable(map(_values_of, self.tables)))
        if identical(values, self.values) and list(chain.from_iterable(self.tables)) == self.keys:
            return True
        for now, saved in zip(self.tables, self.saved, strict=True):
            if now.keys() != saved.keys():
                return False
            for name, value in now.items():
                if value is not saved[name] and not (allowed is not None and allowed(value)):
                    return False
        if allowed is None:
            self._record()
        return True
