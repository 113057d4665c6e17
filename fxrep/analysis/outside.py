"""The tensors that code outside a graph may write: other graphs of the capture, and Python code.

Given: an island whose BatchNorm shares its running mean with a buffer of the model above it, whose
forward stays Python code and writes the buffer.

Result: the buffer is among the writes outside the island's graph.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fxrep.analysis.aliasing import written_tensors
from fxrep.analysis.memory import Write, owned, reached_by_hooks
from fxrep.capture.islands import Capture, Program
from fxrep.ops.owner import is_leaf, owner


def writes_outside(captured: Capture) -> dict[str, list[Write]]:
    """By path of each program, the tensors that code outside its graph may write."""
    programs = captured.programs
    python = [
        Write(tensor, f"the forward of {path or 'the model'}")
        for path, module in _python_modules(captured)
        for tensor in owned(module)
    ]
    python += [Write(tensor, "a hook") for tensor in reached_by_hooks(captured.tree)]
    if len(programs) < 2:
        return {program.path: python for program in programs}
    own = {p.path: written_tensors(p.graph, p.calls) for p in programs}
    return {
        program.path: [
            *python,
            *(write for path, writes in own.items() if path != program.path for write in writes),
        ]
        for program in programs
    }


def _python_modules(captured: Capture) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose forward runs as Python code, and BatchNorms in training mode it calls."""
    traced = {id(program.source): program for program in captured.programs}
    ahead, seen = [("", captured.tree)], set()
    while ahead:
        path, module = ahead.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        program = traced.get(id(module))
        if program is not None:
            ahead += [(f"{path}.{below}" if path else below, m) for below, m in _opaque(program)]
            continue
        if is_leaf(module):
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
                yield path, module
            continue
        yield path, module
        ahead += [(f"{path}.{name}" if path else name, m) for name, m in module.named_children()]


def _opaque(program: Program) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a graph calls as they are."""
    for node in program.graph.find_nodes(op="call_module"):
        module = program.calls.submodule(str(node.target))
        if owner(node, module) is None:
            yield str(node.target), module
