"""The plan that runs several layers of one value as one, and splits the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fxrep.algebra import weights
from fxrep.algebra.maps import IDENTITY, Map, stacked
from fxrep.algebra.recipe import Call, Expr
from fxrep.planning import work
from fxrep.planning.cost import Work, total
from fxrep.planning.pieces import Piece
from fxrep.planning.plan import Plan, promotion
from fxrep.reading.commuting import Commuter
from fxrep.reading.tolerance import is_copied, is_written_over
from fxrep.reading.view import Affine, View
from fxrep.refusal import Refusal


@dataclass(frozen=True, eq=False)
class Branch:
    """A layer, and the operations that follow it alone.

    Attributes:
        layer: a convolution or linear layer.
        tail: identities, then one element-wise operation; or nothing.
    """

    layer: fx.Node
    tail: tuple[fx.Node, ...] = ()

    @property
    def root(self) -> fx.Node:
        """The node whose value is replaced by a part of the result."""
        return self.tail[-1] if self.tail else self.layer


def stack(view: View, source: fx.Node, branches: Sequence[Branch]) -> Plan | Refusal:
    """The plan in which the layers of all branches are one layer.

    Args:
        view: the graph.
        source: the value that the layers read.
        branches: their layers agree in all but weights and channels, have no groups, and are
            followed by equal operations, which run once, too.
    """
    layers = [branch.layer for branch in branches]
    roots = [branch.root for branch in branches]
    region = tuple(sorted({node for b in branches for node in (b.layer, *b.tail)}))
    refusal = _unsafe(view, source, layers, roots, region)
    if refusal is not None:
        return refusal
    readings = [reading for node in layers if (reading := view.affine(node)) is not None]
    maps = [shape for r in readings if isinstance(shape := r.terms[0].map, Map)]
    widths = tuple(shape.outputs for shape in maps)
    whole, bias = stacked(maps), _stacked_bias(readings, widths)
    rank = len(whole.axes)
    weight = Call(weights.stack, tuple(reading.terms[0].weight for reading in readings))
    tail = branches[0].tail[-1:]  # the element-wise operation, if there is one
    saved = [work.of_root(r, width) for r, width in zip(readings, widths, strict=True)]
    spent = [work.layer(whole, IDENTITY, rank, bias is not None), Work(operations=1)]  # and a split
    if tail:
        saved += [work.elementwise(1, width, IDENTITY, rank) for width in widths]
        spent.append(work.elementwise(1, whole.outputs, IDENTITY, rank))
    outputs = tuple(zip(roots, widths, strict=True))
    spent += [work.copied(width, rank) for root, width in outputs if is_copied(view, root)]
    return Plan(
        root=region[-1],
        region=region,
        expanded=region,
        pieces=(Piece(source, whole, weight, frozenset(layers), bias),),
        axis=whole.channel_axis,
        assumes_batched=(),
        saved=total(saved),
        spent=total(spent),
        after=tuple(Commuter(node, node.all_input_nodes[0], rank) for node in tail),
        outputs=outputs,
    )


def _unsafe(
    view: View, source: fx.Node, layers: Sequence[fx.Node], roots: Sequence[fx.Node],
    region: Sequence[fx.Node],
) -> Refusal | None:  # fmt: skip
    if any(is_written_over(view, root) for root in roots):
        return Refusal("some of its layers' results are written in place")
    if view.aliasing.writes_between(region[0], region[-1], [source], dying=set(region)):
        return Refusal("its operand is written in place between its readers")
    return promotion(view, layers)


def _stacked_bias(readings: Sequence[Affine], widths: tuple[int, ...]) -> Expr | None:
    """The biases one after the other, zeros for layers without; None if no layer has a bias."""
    biases = [reading.bias for reading in readings]
    if all(bias is None for bias in biases):
        return None
    return Call(weights.stack_biases, (widths, *biases))
