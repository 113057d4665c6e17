"""From rewritten graphs back to a module that looks like the user's.

The graph of a whole model becomes a `torch.fx.GraphModule` with the model's class name, attributes
and signature. A module whose graph is an island keeps its class, attributes, methods and layers,
because the code around it reads them; its `forward` runs the graph (`GraphForward`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from fxrep.capture.graph_forward import GraphForward, Moves
from fxrep.capture.guard import Known
from fxrep.capture.held import FUSED
from fxrep.capture.islands import Capture, Program

# Pickles of earlier versions look for these names here.
from fxrep.capture.records import _NodeName as _NodeName
from fxrep.capture.records import _NodeRecord as _NodeRecord
from fxrep.capture.records import _TorchName as _TorchName
from fxrep.capture.rewritten import RewrittenModule
from fxrep.capture.rewritten import _empty as _empty
from fxrep.capture.sharing import of_tree
from fxrep.capture.skeleton import duplicate
from fxrep.capture.trace import called
from fxrep.report import Report

_REPORT = "_fxrep_report"


def assemble(capture: Capture) -> nn.Module:
    """Build the optimized module, which shares nothing with the user's model.

    Args:
        capture: the rewritten programs; `program.module` has the submodules that they call.

    Returns:
        A GraphModule when the whole forward was traced, otherwise the model's own class.
    """
    memo = _copy_memo(capture)
    root = next((program for program in capture.programs if program.is_root), None)
    if root is None:
        result: nn.Module = duplicate(capture.tree, memo)
    else:
        name = type(root.module).__name__
        if isinstance(root.module, fx.GraphModule):  # a copy holds only what its graph reads
            root.module.__dict__["_graph"] = root.graph
        else:  # the class's own way to copy would look for the layers that are gone
            object.__setattr__(root.module, "__class__", nn.Module)
        tree = duplicate(root.module, memo, of_tree(root.module, _idle_modules(root)))
        result = RewrittenModule(tree, root.graph, root.arguments, name)
    for program in capture.programs:
        if program is not root and id(program.source) in memo:
            _set_forward(program, memo)
    return result


def seal(module: nn.Module, report: Report) -> None:
    """Finish an optimized module: its islands stand for their layers as these are now.

    A second call takes another report.

    Args:
        module: the result of `assemble`.
        report: its report, which is stored on the module, and thereby in its copies and pickles.
    """
    module.__dict__[_REPORT] = report
    known: Known = {}
    forwards = [each.__dict__.get("forward") for each in module.modules()]
    islands = [forward for forward in forwards if isinstance(forward, GraphForward)]
    if islands:
        module.__dict__.setdefault("_apply", Moves(module).apply)
    for island in islands:
        island.arm(known)


def attached(module: nn.Module) -> Report | None:
    """The report stored on the module, if any."""
    found = module.__dict__.get(_REPORT)
    return found if isinstance(found, Report) else None


def _set_forward(program: Program, memo: dict[int, Any]) -> None:
    """Let the copy of a program's source run the program's graph."""
    assert program.source is not None
    module: nn.Module = memo[id(program.source)]
    module.__dict__[FUSED] = copy.deepcopy(_fused(program, program.source), memo)
    below = _below(module, {id(memo.get(id(each))) for each in program.opaque})
    original = module.__dict__.get("forward")
    forward = GraphForward(
        module,
        program.graph,
        program.arguments,
        original,
        below,
        guarded=bool(program.guarded),
        ran=program.ran,
    )
    module.__dict__.update(forward.attributes)


def _fused(program: Program, source: nn.Module) -> nn.Module:
    """The layers and tensors of a program that its source does not have; targets refer to it."""
    fused = nn.Module()
    for node in program.graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        path = str(node.target)
        value = _at(program.module, path)
        if _at(source, path) is not value:
            _put(fused, path, value)
            node.target = f"{FUSED}.{path}"
    return fused.eval().requires_grad_(False)


def _at(module: nn.Module, path: str) -> Any:
    """What is at a path below a module, or None."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _put(module: nn.Module, path: str, value: nn.Module | torch.Tensor) -> None:
    *owners, name = path.split(".")
    for owner in owners:
        if owner not in module._modules:
            module.add_module(owner, nn.Module())
        module = module.get_submodule(owner)
    if isinstance(value, nn.Module):
        module.add_module(name, value)
    else:
        module.register_buffer(name, value.detach())


def _below(module: nn.Module, opaque: set[int]) -> list[nn.Module]:
    """A module and those below it, without the opaque ones and those below them."""
    found: dict[int, nn.Module] = {}
    ahead = [module]
    while ahead:
        each = ahead.pop()
        if id(each) not in opaque and id(each) not in found:
            found[id(each)] = each
            ahead += [child for child in each._modules.values() if child is not None]
    return list(found.values())


def _copy_memo(capture: Capture) -> dict[int, Any]:
    """A deepcopy memo with which the user's tensors are copied, those of rewrites are not."""
    users: set[int] = set()
    storages: set[int] = set()
    for tensor in _tensors(capture.model):
        users.add(id(tensor))
        storages.add(_storage(tensor))
    memo: dict[int, Any] = {}
    for root in (capture.tree, *(program.module for program in capture.programs)):
        for tensor in _tensors(root):
            if id(tensor) not in users and tensor.is_leaf and _storage(tensor) not in storages:
                memo[id(tensor)] = tensor
    return memo


def _idle_modules(root: Program) -> set[int]:
    """The modules whose forward the graph of a whole model has replaced, by id."""
    modules = [root.module.get_submodule(path) for path in called(root.graph)]
    running = {id(each) for module in modules for each in module.modules()}
    return {id(module) for module in root.module.modules()} - running


def _tensors(root: nn.Module) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for module in root.modules():
        for values in (module._parameters, module._buffers, module.__dict__):
            found.extend(value for value in values.values() if isinstance(value, torch.Tensor))
    return found


def _storage(tensor: torch.Tensor) -> int:
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return id(tensor)
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a wrapper subclass has no storage of its own
        return id(tensor)
