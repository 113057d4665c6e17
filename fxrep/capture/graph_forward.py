"""The forward of an island: a graph of fused layers, beside the layers that it was made from.

Given: a module of the user's model whose forward became a graph, under code that stays Python.

Result: the module with all that it had, its layers unfused. Its `forward` runs the graph, and its
fused layers are kept in an attribute that is no submodule: `parameters()`, `modules()`,
`state_dict()` and printing show the module as it was. Whatever else the graph does not stand for
runs the original forward on the original layers: other arguments than the constants of the graph,
modules that were changed since (`Unchanged`), and training.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fxrep.capture.code import Key
from fxrep.capture.guard import Known, Unchanged
from fxrep.capture.held import FUSED
from fxrep.capture.records import decode, encode
from fxrep.capture.rewritten import compiled
from fxrep.capture.signature import Arguments, same_value
from fxrep.capture.skeleton import private
from fxrep.ops.assume import Unmet


class GraphForward:
    """The forward of an island.

    Args:
        module: the module; its attribute `FUSED` holds the layers that it did not have before.
        graph: the graph.
        arguments: the arguments of the graph.
        original: the forward that was set on the module itself, if any.
        modules: the modules that the graph was made from.
        guarded: the graph stands for the forward only while its assertions hold.
        ran: the code that the graph was made from, by `fxrep.capture.code.key`; None for any.

    Attributes:
        unchanged: the state of the modules; None until `arm`, and the graph always runs.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        arguments: Arguments,
        original: Callable[..., Any] | None,
        modules: list[nn.Module],
        *,
        guarded: bool = False,
        ran: frozenset[Key] | None = None,
    ) -> None:
        self.module = module
        self.original = original
        self.modules = modules
        self.guarded = guarded
        self.ran = ran
        self.unchanged: Unchanged | None = None
        self._install(graph, arguments)

    def _install(self, graph: fx.Graph, arguments: Arguments) -> None:
        self.graph = graph
        self.arguments = arguments
        self.run = compiled(graph, arguments)
        self.__signature__ = arguments.signature
        self.positions = {p.name: index for index, p in enumerate(arguments.parameters)}
        self.names = {p.name for p in arguments.parameters if p.kind is not p.POSITIONAL_ONLY}
        keywords = {p.name for p in arguments.parameters if p.kind is p.KEYWORD_ONLY}
        self.max_positional = len(self.positions) - len(keywords)
        self.constants = [
            (name, None if name in keywords else self.positions[name], value)
            for name, value in arguments.specialized.items()
        ]

    @property
    def __code__(self) -> Any:
        """The code of the function that runs the graph: torch.export reads it of every forward."""
        return self.run.__code__

    def arm(self, known: Known | None = None) -> None:
        """Run the graph from now on only while its modules are what they are now.

        Args:
            known: what classes of modules read outside of them; takes what is found.
        """
        self.unchanged = Unchanged(self.modules, known, self.ran, [self.original])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph or, where it does not stand for it, the original forward."""
        if self._fits(args, kwargs) and self._stands():
            if not self.guarded:
                return self.run(self.module, *args, **kwargs)
            try:
                return self.run(self.module, *args, **kwargs)
            except Unmet:
                pass
        if self.original is not None:
            return self.original(*args, **kwargs)
        return self._of_class()(*args, **kwargs)

    def _of_class(self) -> Callable[..., Any]:
        """The forward of the class, bound as a look-up would: it may be a staticmethod."""
        kind = type(self.module)
        found = inspect.getattr_static(kind, "forward")
        bind = getattr(type(found), "__get__", None)
        bound: Callable[..., Any] = found if bind is None else bind(found, self.module, kind)
        return bound

    def _fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the graph computes what the original forward computes of these arguments."""
        if len(args) > self.max_positional:
            return False
        for name in kwargs:
            if name not in self.names:
                return False
        for name, position, value in self.constants:
            if position is not None and position < len(args):
                if not same_value(args[position], value):
                    return False
            elif name in kwargs and not same_value(kwargs[name], value):
                return False
        for name in self.arguments.required:
            position = self.positions[name]
            if (args[position] if position < len(args) else kwargs.get(name)) is None:
                return False
        for name in self.arguments.tensors:
            position = self.positions[name]
            given = args[position] if position < len(args) else kwargs.get(name)
            if not isinstance(given, torch.Tensor | fx.Proxy):
                return False
        return True

    def _stands(self) -> bool:
        """Whether the graph stands for the modules as they are, and their training is not wanted.

        torch.compile asks once, when it compiles: the compiled code has the weights of that moment.
        A trace or an export is made for deployment, with or without gradients enabled. A strict
        export looks for all tensors in submodules, where the fused layers are not.
        """
        if self.unchanged is None:
            return True
        if torch.compiler.is_exporting():
            return not torch.compiler.is_dynamo_compiling() and self.unchanged.holds(exported=True)
        if torch.is_grad_enabled() and torch._C._get_tracing_state() is None and self._is_trained():
            return False
        return self._holds()

    def _is_trained(self) -> bool:
        assert self.unchanged is not None
        return self.unchanged.is_trained()

    def _holds(self) -> bool:
        assert self.unchanged is not None
        return self.unchanged.holds()

    # What torch.compiler.assume_constant_result does, which takes seconds to import.
    _is_trained._dynamo_marked_constant = True  # type: ignore[attr-defined]
    _holds._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def apply(self, function: Callable[..., Any], recurse: bool = True) -> nn.Module:
        """Move or cast the module (``to``, ``half``, ``cuda``), and its fused layers with it.

        `nn.Module._apply` is this method, set on the module.
        """
        return apply(self.module, function, recurse)

    def replicate(self) -> nn.Module:
        """A replica for `nn.DataParallel`, which has other weights: it runs the original layers."""
        replica: nn.Module = type(self.module)._replicate_for_data_parallel(self.module)  # type: ignore[no-untyped-call]
        for name in self.attributes:
            replica.__dict__.pop(name, None)
        if self.original is not None:
            replica.__dict__["forward"] = self.original
        return replica

    @property
    def attributes(self) -> dict[str, Any]:
        """What the module has in place of methods of its class."""
        return {
            "forward": self,
            "_apply": self.apply,
            "_replicate_for_data_parallel": self.replicate,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphForward:
        made = GraphForward.__new__(GraphForward)
        memo[id(self)] = made
        for name in ("module", "original", "modules", "guarded", "unchanged"):
            setattr(made, name, copy.deepcopy(getattr(self, name), memo))
        made.ran = self.ran
        made._install(copy.deepcopy(self.graph, memo), self.arguments)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "original": self.original,
            "modules": self.modules,
            "guarded": self.guarded,
            "ran": self.ran,
            "unchanged": self.unchanged,
            "nodes": encode(self.graph),
            "arguments": self.arguments,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.module = state["module"]
        self.original = state["original"]
        self.modules = state.get("modules", [])
        self.guarded = state.get("guarded", False)
        self.ran = state.get("ran")
        self.unchanged = state.get("unchanged")
        self._install(decode(state["nodes"]), state["arguments"])


def unfused(model: nn.Module) -> nn.Module:
    """A model as it was before it was optimized, if it has islands; otherwise the model itself.

    Its modules are other ones, and have all tensors in common with the model.
    """
    if not any(isinstance(each.__dict__.get("forward"), GraphForward) for each in model.modules()):
        return model
    found = private(model, set())
    for module in found.modules():
        own = module.__dict__
        forward = own.get("forward")
        if isinstance(getattr(own.get("_apply"), "__self__", None), Moves):
            del own["_apply"]
        if isinstance(forward, GraphForward):
            for name in (*forward.attributes, FUSED):
                own.pop(name, None)
            if forward.original is not None:
                own["forward"] = forward.original
    return found


class Moves:
    """What a model with islands has in place of `nn.Module._apply`.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def apply(self, function: Callable[..., Any], recurse: bool = True) -> nn.Module:
        """Move or cast the model."""
        return apply(self.module, function, recurse)


def apply(module: nn.Module, function: Callable[..., Any], recurse: bool = True) -> nn.Module:
    """Apply a function to all tensors of a module, and to the fused layers of its islands.

    Islands may have layers in common: which of them stand is asked before any tensor is moved.
    """
    forwards = [each.__dict__.get("forward") for each in module.modules() if recurse]
    islands = [each for each in forwards if isinstance(each, GraphForward) and each.unchanged]
    standing = [each for each in islands if each.unchanged is not None and each.unchanged.holds()]
    keeps = _keeps_values(function, module)
    own = [each.module.__dict__.pop("_apply") for each in islands]
    moves = module.__dict__.pop("_apply", None)
    try:
        module._apply(function, recurse)  # type: ignore[no-untyped-call]
    finally:
        for each, method in zip(islands, own, strict=True):
            each.module.__dict__["_apply"] = method
        if moves is not None:
            module.__dict__["_apply"] = moves
    for each in islands:
        each.module.__dict__[FUSED]._apply(function)
    known: Known = {}
    for each in standing if keeps else []:
        each.arm(known)
    return module


_PROBE = (1.0, -2.5, 0.5)


def _keeps_values(function: Callable[..., Any], module: nn.Module) -> bool:
    """Whether a function that is applied to all tensors moves or casts them, and no more."""
    weights = (p for p in module.parameters() if p.is_floating_point())
    like = next(weights, None)
    if like is None:
        return True
    try:
        probe = function(torch.tensor(_PROBE, dtype=like.dtype, device=like.device))
        return tuple(probe.detach().to("cpu", torch.float64).tolist()) == _PROBE
    except Exception:  # the meta device, a function of parameters only
        return False
