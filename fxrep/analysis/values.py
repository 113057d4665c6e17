"""Values of a graph on example inputs: the shape, strides, dtype and device of each."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from fxrep.capture.islands import Capture, Program
from fxrep.capture.shadows import UNKNOWN, Shadows, faked, opaque
from fxrep.capture.skeleton import (
    call_arguments,
    does_not_run,
    duplicate,
    named_inputs,
)


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """One call of a module, with fake tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


@dataclass(eq=False)
class Examples:
    """The user's inputs, and calls inside the model in a run on them.

    Attributes:
        inputs: as given to `optimize`; None if there are none.
        calls: the calls of islands (`fxrep.capture.islands`) and of opaque modules, by module path,
            in order; empty unless the model was run.
    """

    inputs: object
    calls: Mapping[str, Sequence[ModuleCall]] = field(default_factory=dict)

    @cached_property
    def mode(self) -> FakeTensorMode:
        """Makes the fake tensors."""
        return FakeTensorMode(allow_non_fake_inputs=True)

    def fake(self, value: Any) -> Any:
        """A value with fake tensors in place of its tensors."""
        return faked(self.mode, value)

    def values(self, program: Program) -> Values:
        """The values of one graph."""
        return Values(program, self)

    def arguments(self, program: Program) -> Mapping[str, Any]:
        """The arguments of the first call of a program, by name; none if they are not known."""
        if not program.path:
            return self.fake(named_inputs(program.module, self.inputs))  # type: ignore[no-any-return]
        for call in self.calls.get(program.path, ()):
            try:
                bound = inspect.signature(program.module.forward).bind(*call.args, **call.kwargs)
            except TypeError:
                return {}
            return bound.arguments
        return {}


def recorded_run(captured: Capture, example_inputs: object) -> Examples:
    """Run a copy of the model on the user's inputs, and record the calls inside it.

    Without a run, `Examples` know the values of a graph only if it is the graph of the whole model.

    Args:
        captured: the model and its graphs.
        example_inputs: as given to `optimize`.

    Raises:
        InputError: the model does not run on the inputs.
    """
    examples = Examples(example_inputs)
    surroundings = captured.surroundings
    if surroundings.unrunnable is not None:
        return examples
    twin = duplicate(captured.model, found=captured.reached)
    examples.calls = _recorded(twin, _paths_called(captured), examples)
    args, kwargs = tree_map_only(Tensor, Tensor.clone, call_arguments(example_inputs))
    with torch.no_grad():
        try:
            surroundings.run(twin, *args, **kwargs)
        except Exception as error:
            raise does_not_run(captured.model, error) from error
        finally:
            surroundings.restore()
    return examples


def _recorded(
    model: nn.Module, paths: Iterable[str], examples: Examples
) -> Mapping[str, Sequence[ModuleCall]]:
    """A record of the calls of the modules at `paths`, filled while the model runs."""
    calls: dict[str, list[ModuleCall]] = {}
    for path in paths:

        def record(_: nn.Module, args: Any, kwargs: Any, result: Any, path: str = path) -> None:
            calls.setdefault(path, []).append(ModuleCall(*examples.fake((args, kwargs, result))))

        model.get_submodule(path).register_forward_hook(record, with_kwargs=True)
    return calls


def _paths_called(captured: Capture) -> set[str]:
    """Paths of the modules whose results no graph of the whole model shows."""
    found = {program.path for program in captured.programs if program.path}
    for program in captured.programs:
        prefix = f"{program.path}." if program.path else ""
        found |= {prefix + str(node.target) for node in program.graph.nodes if opaque(node)}
    return found


class Values(Shadows):
    """The values of a graph on the user's inputs; those of nodes added later come on demand."""

    def __init__(self, program: Program, examples: Examples) -> None:
        super().__init__(program.module, program.graph, lambda: examples.mode, {})
        self.examples = examples
        self.path = program.path
        if examples.inputs is None or (program.path and program.path not in examples.calls):
            return
        given = examples.arguments(program)
        calls: dict[str, int] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                default = node.args[0] if node.args else None
                self.env[node] = given.get(str(node.target), default)
            elif opaque(node):
                self.env[node] = self._recorded(str(node.target), calls)
            else:
                self.of(node)

    def _recorded(self, target: str, calls: dict[str, int]) -> Any:
        """The recorded result of the next call of an opaque module; `calls` counts them."""
        runs = self.examples.calls.get(f"{self.path}.{target}" if self.path else target, ())
        count = calls[target] = calls.get(target, -1) + 1
        return runs[count].result if count < len(runs) else UNKNOWN

    @property
    def ranks(self) -> dict[fx.Node, int]:
        """The rank of each value that is a tensor."""
        return {node: v.dim() for node, v in self.env.items() if isinstance(v, Tensor)}

    @property
    def dtypes(self) -> dict[fx.Node, torch.dtype]:
        """The dtype of each value that is a tensor."""
        return {node: v.dtype for node, v in self.env.items() if isinstance(v, Tensor)}
