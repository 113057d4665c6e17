"""The state of a walk back from a root: the values that the root is an affine convolution map of.

A walk keeps a frontier of values and the paths from each of them to the root. How it goes on is in
`fxrep.planning.steps`.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from torch import fx

from fxrep.algebra.maps import IDENTITY, Diagonal, Linear, Map
from fxrep.algebra.recipe import Expr
from fxrep.planning.cost import Work
from fxrep.planning.paths import Path
from fxrep.reading.commuting import Commuter
from fxrep.reading.view import Affine, View, scope
from fxrep.refusal import Refusal


@dataclass(frozen=True)
class Shared(Refusal):
    """A walk stops at a value that operations outside the walk read, too."""


@dataclass(frozen=True, eq=False)
class Bias:
    """A constant added to the root: (O,) or (), on some rows only if `rows` says so."""

    expr: Expr
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class BorderBias:
    """A bias before a padding: the padded border lacks it.

    The root then is corrected by a map of an image of ones.

    Attributes:
        node: a value of the size of that image.
        map: from the image to the root.
        weight: the weight of that map.
        reason: why the bias cannot be added to the root.
    """

    node: fx.Node
    map: Map
    weight: Expr
    reason: str


@dataclass(frozen=True, eq=False)
class Passed:
    """A value that a walk has passed.

    Attributes:
        map: from the value to the root.
        crossed: the operations that had been moved out of the way before.
        operand_map: from the first operand of the value to the root.
    """

    map: Linear
    crossed: tuple[Commuter, ...]
    operand_map: Linear = IDENTITY


@dataclass(eq=False)
class Walk:
    """The state of one walk.

    Attributes:
        view: the graph.
        root: the node that the walk starts from.
        moves: operations that commute may be moved: from the root to the sources, or to the root.
        maps: how many operations other than scales and shifts a plan must replace.
        frontier: the paths to the root from each value that the root is a map of.
        expanded: the nodes that the walk has passed.
        frozen: the values that the walk cannot pass, and why, where there is a reason to report.
        biases: the constants that are added to the root.
        borders: the biases that would be missing from a padded border.
        before: an operation at the root that is applied to the sources instead.
        after: operations on the way that are applied to the result instead, outermost first.
        needs_one_source: a spatial map was moved over an addition, which may broadcast.
        joins: how many sums and concatenations of several values the walk has passed.
        has_structure: the walk has passed a pooling, a padding, a slice or the like.
        works: the work of the nodes passed, as far as a plan has asked for it.
    """

    view: View
    root: fx.Node
    moves: bool = False
    maps: int = 0
    frontier: dict[fx.Node, list[Path]] = field(default_factory=dict)
    expanded: dict[fx.Node, Passed] = field(default_factory=dict)
    frozen: dict[fx.Node, Refusal | None] = field(default_factory=dict)
    biases: list[Bias] = field(default_factory=list)
    borders: list[BorderBias] = field(default_factory=list)
    before: Commuter | None = None
    after: list[Commuter] = field(default_factory=list)
    needs_one_source: bool = False
    joins: int = 0
    has_structure: bool = False
    works: dict[fx.Node, Work] = field(default_factory=dict)

    @property
    def crossed(self) -> tuple[Commuter, ...]:
        """The operations moved so far, outermost first."""
        return (*self.after, *((self.before,) if self.before is not None else ()))

    @property
    def met_shared(self) -> bool:
        """Whether the walk has stopped at a value that other operations read, too."""
        return any(isinstance(why, Shared) for why in self.frozen.values())


# --- readers --------------------------------------------------------------------------------------


def unread(view: View, node: fx.Node, passed: Passed, gone: Container[fx.Node]) -> bool:
    """Whether no operation outside `gone` needs the value of `node` itself.

    A read of the dtype can read the result's instead; so can a read of the shape if the result has
    the same.
    """
    outer = passed.map
    same_shape = not passed.crossed and (
        isinstance(outer, Diagonal)
        or (outer.channelwise is not None and outer.pointwise and outer.inputs == outer.outputs)
    )
    return all(
        user in gone or (view.reads_metadata(user) and (same_shape or not view.reads_size(user)))
        for user in node.users
    )


def is_structure(reading: Affine) -> bool:
    """Whether an operation is a map of one value and no layer: a pooling, a padding, a slice."""
    return len(reading.terms) == 1 and reading.is_map and not reading.is_layer


def where(node: fx.Node) -> str:
    """The module path that a node comes from, for people."""
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    return scope(node) or node.name
