"""Changes that prepare a graph for the passes.

They change no operation, only which of several equal values or sizes a node reads, so that the
passes find more. They are no passes: the user did not ask for them, and no report names them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxrep.analysis.aliasing import written_operand
from fxrep.analysis.memory import Write
from fxrep.analysis.values import Values
from fxrep.capture.islands import Program
from fxrep.reading.sizes import operand_of_equal_size
from fxrep.rewriting.part import Part


def read_after_write(part: Part) -> None:
    """Let readers of a value that come after a write to it read the result of the write.

    ``y.add_(a); return y`` becomes ``z = y.add_(a); return z``: y and z are one tensor, but the
    node of y now only has readers before the write.
    """
    for node in part.program.graph.nodes:
        source = written_operand(node, part.calls)
        if source is None:
            continue
        for reader in list(source.users):
            if node < reader:
                part.editor.replace_input(reader, source, node)


def read_sizes_early(part: Part) -> None:
    """Let a node that reads a size read it from the earliest value of that size.

    Before an attention ``b, c, h, w = norm(x).shape`` becomes ``b, c, h, w = x.shape``, so that
    only the layers of the attention read the normalised value.
    """
    for node in list(part.program.graph.nodes):
        if not part.view.reads_size(node):
            continue
        (value,) = node.all_input_nodes
        source = value
        while (operand := operand_of_equal_size(part.view, source)) is not None:
            source = operand
        if source is not value:
            part.editor.replace_input(node, value, source)


PREPARATIONS: tuple[Callable[[Part], None], ...] = (
    read_after_write,  # first: the analysis of memory, which readings need, must see its result
    read_sizes_early,
)


def prepared(program: Program, values: Values, outside: Sequence[Write] = ()) -> Part:
    """A program ready for the passes.

    Args:
        program: the program, whose graph is changed in place.
        values: the values of the graph, as far as example inputs tell.
        outside: the tensors that code outside the graph may write.
    """
    part = Part(program, values, outside)
    for prepare in PREPARATIONS:
        prepare(part)
    part.count_weights()
    return part
