"""State that a trace must leave as it was: containers, tensors and random number generators."""

from __future__ import annotations

import collections
import contextlib
import copy
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn


class Containers:
    """The Python containers that modules hold, such as caches, with their content before a trace.

    Attributes:
        saved: by id of a module, its containers, each with a copy.
        owners: those modules, by id.
    """

    def __init__(self, root: nn.Module) -> None:
        self.saved: dict[int, list[tuple[Any, Any]]] = {}
        self.owners: dict[int, nn.Module] = {}
        plain = nn.Module().__dict__.keys()
        for module in root.modules():
            found: list[tuple[Any, Any]] = []
            for name, value in module.__dict__.items():
                if name not in plain:
                    self._collect(value, found, 0)
            if found:
                self.saved[id(module)] = found
                self.owners[id(module)] = module

    def _collect(self, value: object, found: list[tuple[Any, Any]], depth: int) -> None:
        if isinstance(value, dict | list | set | collections.deque) and depth < 4:
            found.append((value, copy.copy(value)))
            if not isinstance(value, set):
                for item in value.values() if isinstance(value, dict) else value:
                    self._collect(item, found, depth + 1)

    def began_empty(self, owner: object, name: str) -> bool:
        """Whether an attribute of a module is a dict that was empty before the trace."""
        value = owner.__dict__.get(name) if isinstance(owner, nn.Module) else None
        entries = self.saved.get(id(owner), ())
        return isinstance(value, dict) and any(c is value and not saved for c, saved in entries)

    def restore(self, root: nn.Module | None = None) -> None:
        """Restore the content of the containers of `root` and below; of all without a root."""
        if not self.saved:
            return
        chosen = self.saved if root is None else {id(m) for m in root.modules()} & set(self.saved)
        for key in chosen:
            for container, saved in self.saved[key]:
                if _same_items(container, saved):
                    continue
                container.clear()
                if isinstance(container, dict | set):
                    container.update(saved)
                else:
                    container.extend(saved)

    def written(self) -> tuple[nn.Module, str] | None:
        """The first module whose forward has written into a container, and the reason to report.

        New entries of a dict that do not depend on the forward's inputs are a cache, not a write.
        """
        for key, entries in self.saved.items():
            for container, saved in entries:
                if _same_items(container, saved):
                    continue
                if not isinstance(container, dict) or not _is_cache(container, saved):
                    kind = type(container).__name__
                    return self.owners[key], f"forward writes into a {kind} the module keeps"
        return None


def _same_items(container: Any, saved: Any) -> bool:
    if len(container) != len(saved):
        return False
    if isinstance(container, set):
        return bool(container == saved)
    if isinstance(container, dict):
        return all(k in saved and saved[k] is v for k, v in container.items())
    return all(a is b for a, b in zip(container, saved, strict=True))


def _is_cache(container: dict[Any, Any], saved: dict[Any, Any]) -> bool:
    """Whether a dict has new entries only, and none that depends on the forward's inputs."""
    if any(key not in container or container[key] is not saved[key] for key in saved):
        return False
    values = [container[key] for key in container if key not in saved]
    if not all(isinstance(value, fx.Proxy | torch.Tensor) for value in values):
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


def _on_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


class GeneratorStates:
    """The states of the generators of `random` and NumPy, which the whole process shares.

    Torch's own generators are watched call by call, in `fxrep.capture.modes`.
    """

    def __init__(self) -> None:
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy = None if numpy is None else numpy.random.get_state(legacy=True)

    def changed(self) -> bool:
        """Whether this thread or another has drawn numbers since the states were recorded."""
        now = GeneratorStates()
        if self.python != now.python:
            return True
        if self.numpy is None or now.numpy is None:
            return False
        changed = self.numpy[1].tobytes() != now.numpy[1].tobytes()
        return bool(changed or self.numpy[2] != now.numpy[2])

    def restore(self) -> None:
        """Set the generators to the states that were recorded."""
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def is_only_thread() -> bool:
    """Whether no other thread runs Python code."""
    return len(sys._current_frames()) == 1


@contextlib.contextmanager
def unchanged_random_state(*, despite_other_threads: bool = False) -> Iterator[None]:
    """Restore all random number generators at the end, so that running a model changes none.

    Without `despite_other_threads` nothing is restored while other threads run.

    Args:
        despite_other_threads: restore the generators even if other threads run; the numbers that
            those threads draw meanwhile are then drawn a second time.
    """
    if not despite_other_threads and not is_only_thread():
        yield
        return
    states = GeneratorStates()
    devices = [torch.cuda.current_device()] if _on_cuda() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        states.restore()


def tensor_versions(root: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor, int]]:
    """The plain tensor attributes of a tree, and how often each has been written."""
    return [
        (module, name, value, value._version)
        for module in root.modules()
        for name, value in module.__dict__.items()
        if isinstance(value, torch.Tensor) and not value.is_inference()
    ]


def written_tensor(
    versions: list[tuple[nn.Module, str, torch.Tensor, int]],
) -> tuple[nn.Module, str] | None:
    """The first module that has written into one of its tensors since, and the reason to report."""
    for module, name, tensor, version in versions:
        if tensor._version != version:
            return module, f"forward writes into the tensor attribute '{name}'"
    return None


def restore_tensors(tree: nn.Module, model: nn.Module) -> None:
    """Copy plain tensor attributes from the user's model where a trace has written into them."""
    for mine, theirs in zip(tree.modules(), model.modules(), strict=False):
        for name, value in theirs.__dict__.items():
            own = mine.__dict__.get(name)
            if isinstance(value, torch.Tensor) and isinstance(own, torch.Tensor) and own._version:
                mine.__dict__[name] = value.detach().clone()
