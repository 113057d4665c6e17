"""Merge layers that follow each other.

Given::

    x -> conv k1 x k1 (W1, b1) -> conv k2 x k2 (W2, b2) -> y

Result::

    x -> conv (k1 + k2 - 1) (W2 * W1, ΣW2 b1 + b2) -> y

and the same with average pooling, padding, crops, strided slices, channel slices and concatenations
of these in place of a convolution: all are affine convolution maps, and so is what they compose to.
Strides multiply, paddings and taps of the second are spread by the stride of the first.

Exact at the borders where the padding of the second sees only zeros: it does not pad, or the
first has no bias and reads nothing there. The usual formula for a biased 1x1 before a padded 3x3
is wrong there; the border then is corrected by one more input channel, of ones, or the pair stays.
Where the model itself pads with what the first layer gives for zeros (DBB, ECBSR, RRRB), that is
zero padding of the merged convolution.

Source: Ding et al., "Diverse Branch Block", 2021; Bhardwaj et al., "Collapsible Linear Blocks for
Super-Efficient Super Resolution", 2022; Zhang et al., "Edge-oriented Convolution Block", 2021.
"""

from __future__ import annotations

from torch import fx

from fxrep.algebra.maps import IDENTITY, Map, with_channels
from fxrep.planning import work
from fxrep.planning.cost import CostModel
from fxrep.planning.plan import Plan
from fxrep.planning.rule import Pass, tail
from fxrep.planning.search import search
from fxrep.reading.view import Affine, Operation, Unread, View
from fxrep.refusal import Refusal


def propose(view: View, node: fx.Node, cost: CostModel) -> Plan | Refusal | None:
    """Merge the maps that follow each other and end at `node`."""
    unread = view.read(node)
    if isinstance(unread, Unread) and unread.operation in (Operation.POOLING, Operation.PADDING):
        return unread if _has_neighbour(view, node) else None
    last = tail(view, node)
    if last is None or len(last.terms) > 1 or not isinstance(last.terms[0].map, Map):
        return None
    convolves = _convolves_alone(last, cost)
    if not convolves and tail(view, last.terms[0].operand) is None:
        return None
    return search(view, node, lambda _: True, cost, maps=1 if convolves else 2)


def _has_neighbour(view: View, node: fx.Node) -> bool:
    """Whether an affine operation is next to a node, and could have been merged with it."""
    around = [*node.all_input_nodes, *node.users]
    return any(view.affine(each) is not None for each in around)


def _convolves_alone(reading: Affine, cost: CostModel) -> bool:
    """Whether the cost model takes a convolution in place of a pooling and nothing else."""
    if reading.operation is not Operation.POOLING:
        return False
    shape = reading.terms[0].map
    assert isinstance(shape, Map)
    convolution = work.layer(with_channels(shape, 1), IDENTITY, len(shape.axes), biased=False)
    return cost.objection(work.of_root(reading, 1), convolution) is None


CHAINS = Pass("chains", propose)
