"""What example inputs tell of a graph: the rank each value had."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from fxrep.capture import Program
from fxrep.skeleton import named_inputs


class _Watch(fx.Interpreter):
    """Runs a graph and keeps the rank of every tensor."""

    def __init__(self, program: Program, mode: FakeTensorMode) -> None:
        super().__init__(program.module, graph=program.graph)
        self.mode = mode
        self.ranks: dict[fx.Node, int] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module on fake copies of its tensors: a BatchNorm in training counts its calls."""
        module = self.fetch_attr(target)
        tensors = (*module.named_parameters(), *module.named_buffers())
        fakes: dict[str, Tensor] = {name: self.mode.from_tensor(tensor) for name, tensor in tensors}
        return torch.func.functional_call(module, fakes, args, kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read a fake copy: a write to a small real tensor would be carried out."""
        value = super().get_attr(target, args, kwargs)
        return self.mode.from_tensor(value) if isinstance(value, Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and look at its value."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.ranks[n] = value.dim()
        return value


def ranks_seen(program: Program, example_inputs: object) -> dict[fx.Node, int]:
    """The rank of each value when the whole model runs on `example_inputs`.

    The graph runs on fake tensors, so that it costs nothing and writes nothing. Where it holds
    modules that were not traced, whose code could write what it likes, it does not run at all.
    """
    opaque = any(n.op == "call_module" and not n.meta.get("leaf_type") for n in program.graph.nodes)
    if example_inputs is None or program.path or opaque:
        return {}
    given = named_inputs(program.module, example_inputs)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    watch = _Watch(program, mode)
    arguments = [
        given.get(str(node.target), node.args[0] if node.args else None)
        for node in program.graph.find_nodes(op="placeholder")
    ]
    try:
        with mode, torch.no_grad():
            watch.run(*tree_map_only(Tensor, mode.from_tensor, arguments))
    except Exception:  # an operator without a fake form: what was seen until then still counts
        pass
    return watch.ranks
