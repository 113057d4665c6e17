"""The rewrites that prepare a graph, before any pass sees it.

They compute nothing anew: a value is read where less is in the way of the passes. They are no
passes, for the user asked for none of them, and they count in no report.
"""

from __future__ import annotations

from collections.abc import Callable

from fxrep.analysis.aliasing import written_operand
from fxrep.analysis.values import Values
from fxrep.capture.islands import Program
from fxrep.reading.sizes import operand_of_equal_size
from fxrep.rewriting.part import Part


def rename_written(part: Part) -> None:
    """Let the readers of a value after an operation that wrote it read the operation's result.

    ``y.add_(a); return y`` becomes ``z = y.add_(a); return z``: both are one tensor, and the value
    of y before the write is no longer in the way.
    """
    for node in part.program.graph.nodes:
        source = written_operand(node, part.calls)
        if source is None:
            continue
        for reader in list(source.users):
            if node < reader:
                part.editor.reread(reader, source, node)


def read_early(part: Part) -> None:
    """Let the readers of a size read it of the first value that has it.

    Before attention ``b, c, h, w = norm(x).shape`` becomes ``b, c, h, w = x.shape``, so that only
    the layers of the attention read the normalised value.
    """
    for node in list(part.program.graph.nodes):
        if not part.view.reads_size(node):
            continue
        (value,) = node.all_input_nodes
        source = value
        while (operand := operand_of_equal_size(part.view, source)) is not None:
            source = operand
        if source is not value:
            part.editor.reread(node, value, source)


PREPARATIONS: tuple[Callable[[Part], None], ...] = (
    rename_written,  # first: which values share memory is found out in the renamed graph
    read_early,  # asks what each node computes
)


def prepared(program: Program, values: Values) -> Part:
    """A program ready for the passes.

    Args:
        program: its graph is changed in place.
        values: the values of its graph, as far as example inputs tell.
    """
    part = Part(program, values)
    for prepare in PREPARATIONS:
        prepare(part)
    part.count_weights()
    return part
