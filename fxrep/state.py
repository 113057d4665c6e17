"""What a trial trace must not leave behind, or must not lose: state, random numbers, contexts."""

from __future__ import annotations

import collections
import contextlib
import copy
import random
import sys
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxrep.proxies import ParameterWrite, Unfaithful, is_instance, is_tensor

if TYPE_CHECKING:
    from fxrep.tracer import Tracer


class Containers:
    """The Python containers (caches) modules hold, so that tracing leaves nothing in them."""

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

    def restore(self, root: nn.Module | None = None) -> None:
        """Put back what `root` and the modules below it held; everything without a root."""
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
        """A module whose containers now hold state of a call, not just a cache of constants."""
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
    """Only new entries, none of which depends on the forward's inputs."""
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


class RandomState:
    """The generators' states; compared, they tell whether a forward drew random numbers."""

    def __init__(self) -> None:
        self.tensors = [torch.get_rng_state()]
        if _on_cuda():
            self.tensors.append(torch.cuda.get_rng_state())
        self.values: list[object] = [random.getstate()]
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            drawn = numpy.random.get_state(legacy=True)
            self.values.append((drawn[1].tobytes(), drawn[2]))

    def moved(self) -> bool:
        """Whether numbers were drawn since."""
        now = RandomState()
        if self.values != now.values[: len(self.values)]:
            return True
        return not all(torch.equal(a, b) for a, b in zip(self.tensors, now.tensors, strict=False))


@contextlib.contextmanager
def unchanged_random_state() -> Iterator[None]:
    """What a trial trace draws is given back to the user's generators."""
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state() if numpy is not None else None
    devices = [torch.cuda.current_device()] if _on_cuda() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(drawn)


def tensor_versions(root: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor, int]]:
    """The plain tensor attributes of a tree and how often each was written."""
    return [
        (module, name, value, value._version)
        for module in root.modules()
        for name, value in module.__dict__.items()
        if isinstance(value, torch.Tensor) and not value.is_inference()
    ]


def written_tensor(
    versions: list[tuple[nn.Module, str, torch.Tensor, int]],
) -> tuple[nn.Module, str] | None:
    """A module that wrote into one of them, and why that matters."""
    for module, name, tensor, version in versions:
        if tensor._version != version:
            return module, f"forward writes into the tensor attribute '{name}'"
    return None


def restore_tensors(tree: nn.Module, model: nn.Module) -> None:
    """A trial that wrote plain tensor attributes for real: take the values from the user's."""
    for mine, theirs in zip(tree.modules(), model.modules(), strict=False):
        for name, value in theirs.__dict__.items():
            own = mine.__dict__.get(name)
            if isinstance(value, torch.Tensor) and isinstance(own, torch.Tensor) and own._version:
                mine.__dict__[name] = value.detach().clone()


def _homes(root: nn.Module) -> list[dict[str, Any]]:
    """The global names of the packages a model is written in."""
    files = {kind.__module__ for module in root.modules() for kind in type(module).__mro__}
    own = __package__ or "fxrep"
    packages = {file.partition(".")[0] for file in files} - {"torch", "builtins", own}
    return [
        vars(module)
        for file, module in list(sys.modules.items())
        if isinstance(module, types.ModuleType)
        and (file.partition(".")[0] in packages or (file in files and file.startswith(own)))
    ]


@contextlib.contextmanager
def watched(tracer: Tracer) -> Iterator[None]:
    """Refuse what a trace loses: attributes set on modules, and contexts around operations."""
    set_attribute, delete_attribute = nn.Module.__setattr__, nn.Module.__delattr__
    members = tracer.members

    def setattr_refused(module: nn.Module, name: str, value: Any) -> None:
        if id(module) in members:
            is_weight = isinstance(value, nn.Parameter) or name in module._parameters
            kind = ParameterWrite if is_weight else Unfaithful
            raise tracer.refuse(kind(f"forward sets the attribute '{name}' of a module"))
        set_attribute(module, name, value)

    def delattr_refused(module: nn.Module, name: str) -> None:
        if id(module) in members:
            raise tracer.refuse(Unfaithful(f"forward deletes the attribute '{name}' of a module"))
        delete_attribute(module, name)

    contexts: list[tuple[Any, Any]] = []
    for context in (
        torch.autocast,
        torch.no_grad,
        torch.enable_grad,
        torch.inference_mode,
        torch.set_grad_enabled,
    ):
        contexts.append((context, context.__enter__))

        def refused(self: Any, *args: Any, name: str = context.__name__) -> Any:
            raise tracer.refuse(Unfaithful(f"forward uses 'with torch.{name}'"))

        context.__enter__ = refused  # type: ignore[method-assign]
    nn.Module.__setattr__ = setattr_refused  # type: ignore[method-assign, assignment]
    nn.Module.__delattr__ = delattr_refused  # type: ignore[method-assign]
    plain_is_tensor = torch.is_tensor
    torch.is_tensor = is_tensor  # type: ignore[assignment]
    homes = [home for home in _homes(tracer.root_module) if "isinstance" not in home]
    for home in homes:
        home["isinstance"] = is_instance
    try:
        yield
    finally:
        torch.is_tensor = plain_is_tensor
        for home in homes:
            del home["isinstance"]
        nn.Module.__setattr__ = set_attribute  # type: ignore[method-assign]
        nn.Module.__delattr__ = delete_attribute  # type: ignore[method-assign]
        for context, enter in contexts:
            context.__enter__ = enter
