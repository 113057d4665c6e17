"""Values of a graph on given inputs, with fake tensors: shapes, dtypes and devices, no memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map_only

from fxrep.capture.sharing import of_tree, outside
from fxrep.capture.skeleton import duplicate
from fxrep.ops.owner import weight_hooks

UNKNOWN = object()
"""The value of a node whose value could not be computed."""


def faked(mode: FakeTensorMode, value: Any) -> Any:
    """A value with fake tensors in place of its tensors."""
    return tree_map_only(
        Tensor, lambda t: t if isinstance(t, FakeTensor) else mode.from_tensor(t), value
    )


def opaque(node: fx.Node) -> bool:
    """Whether a node calls an opaque module: one that runs other code than torch's.

    Nothing is known of such a call; it may write to anything.
    """
    return node.op == "call_module" and node.meta.get("owner", nn.Module) is None


class Shadows(fx.Interpreter):
    """The values of a graph, computed when they are asked for; the graph may grow meanwhile.

    Args:
        module: the module that the targets of the graph refer to.
        graph: the graph.
        make_mode: gives what makes the fake tensors, once it is needed: torch imports its compiler
            for it, which takes seconds.
        given: values of placeholders, by name.
        tensor: the tensor of a target that is none of the module, if there are such targets.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        make_mode: Callable[[], FakeTensorMode],
        given: Mapping[str, Any],
        tensor: Callable[[str], Tensor | None] | None = None,
    ) -> None:
        super().__init__(module, graph=graph)
        self._make_mode = make_mode
        self.given = given
        self.tensor = tensor
        self.env: dict[fx.Node, Any] = {}

    @cached_property
    def mode(self) -> FakeTensorMode:
        """Makes the fake tensors."""
        return self._make_mode()

    def of(self, node: fx.Node) -> Any:
        """The value of a node with fake tensors, or `UNKNOWN`."""
        ahead = [node]
        while ahead:
            each = ahead[-1]
            missing = [source for source in each.all_input_nodes if source not in self.env]
            if each in self.env or not missing:
                ahead.pop()
                if each not in self.env:
                    self.env[each] = self._evaluated(each)
            else:
                ahead += missing
        return self.env[node]

    def _evaluated(self, node: fx.Node) -> Any:
        known = all(self.env[source] is not UNKNOWN for source in node.all_input_nodes)
        if node.op == "placeholder":
            return self.given.get(str(node.target), UNKNOWN)
        if not known or opaque(node):
            return UNKNOWN
        try:
            with self.mode, torch.no_grad():
                return self.run_node(node)
        except Exception:  # an operation without an implementation for fake tensors
            return UNKNOWN

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module with fake copies of its tensors: BatchNorm in training writes buffers."""
        module = self.fetch_attr(target)
        if not (parametrize.is_parametrized(module) or weight_hooks(module)):
            return torch.func.functional_call(module, self._fakes(module), args, kwargs)
        # Other code computes its weight, and may keep a state.
        with unset_fake_temporarily():
            found = of_tree(module)
            twin, shared = duplicate(module, found=found), outside(found)
        try:
            return torch.func.functional_call(twin, self._fakes(twin), args, kwargs)
        finally:
            with unset_fake_temporarily():
                shared.restore()

    def _fakes(self, module: nn.Module) -> dict[str, Any]:
        tensors = (*module.named_parameters(), *module.named_buffers())
        return {name: faked(self.mode, tensor) for name, tensor in tensors}

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read a fake copy of a tensor, so that a write in the graph does not reach the tensor."""
        own = self.tensor(str(target)) if self.tensor is not None else None
        return faked(self.mode, super().get_attr(target, args, kwargs) if own is None else own)
