"""The entries of the report: the operations replaced, and why other nodes stayed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxrep.algebra.maps import Map
from fxrep.algebra.recipe import Call, record
from fxrep.ops.owner import known_class
from fxrep.planning.cost import SIZES
from fxrep.planning.plan import Plan
from fxrep.planning.rule import Fold, Pass
from fxrep.reading.view import Affine, View
from fxrep.refusal import Refusal
from fxrep.report import Rewrite, Skip
from fxrep.rewriting.layers import Layer
from fxrep.rewriting.measure import Timing
from fxrep.rewriting.part import Part
from fxrep.rewriting.replacement import pads

# --- rewrites ------------------------------------------------------------------------------------


def planned(
    rule: Pass,
    location: str,
    plan: Plan,
    before: tuple[str, ...],
    layers: Sequence[Layer],
    error: float | None,
    timing: Timing | None,
) -> Rewrite:
    """The report's entry for equal plans that were carried out with these layers."""
    positions = SIZES[-1] ** (-plan.axis - 1)
    return Rewrite(
        rule.name,
        location,
        before,
        new_kinds(plan, layers),
        round(plan.saved.macs[-1] / positions),
        round(plan.spent.macs[-1] / positions),
        plan.saved.parameters,
        plan.spent.parameters,
        error,
        *((timing.before, timing.after) if timing is not None else ()),
    )


def folded(rule: Pass, location: str, fold: Fold) -> Rewrite:
    """The report's entry for a constant expression whose value is stored."""
    steps = tuple(step.name for step in record(fold.expr).steps if isinstance(step, Call))
    return Rewrite(rule.name, location, steps, ("constant",), 0, 0, 0, 0, 0.0)


def removed(rule: Pass, location: str, kind: str) -> Rewrite:
    """The report's entry for an operation that was erased without a replacement.

    The entry has no error: such a rewrite is not compared with anything.
    """
    return Rewrite(rule.name, location, (kind,), (), 0, 0, 0, 0, None)


def kinds(plan: Plan, view: View) -> tuple[str, ...]:
    """The names of the operations that a plan replaces."""
    moved = {each.node: each.name for each in plan.moved}
    found = []
    for node in plan.region:
        reading = view.read(node)
        if node in moved:
            found.append(moved[node])
        elif isinstance(reading, Affine) and not reading.is_identity:
            found.append(reading.kind)
        elif reading is None and plan.outputs:  # the same operation after each of several siblings
            found += moved.values()
    return tuple(found)


def kind_of(part: Part, node: fx.Node) -> str:
    """The name of a node's operation: that of its reading, or else that of torch."""
    reading = part.view.affine(node)
    if reading is not None and not reading.is_identity:
        return reading.kind
    target = node.meta.get("owner") or node.target
    return str(getattr(target, "__name__", target))


def new_kinds(plan: Plan, layers: Sequence[Layer]) -> tuple[str, ...]:
    """The names of the operations that replace a plan's region."""
    found = ["pad" for layer in layers for _ in pads(layer.piece)]
    found += [_kind(layer) for layer in layers]
    joins = len(plan.pieces) - 1
    found += ["cat"] * plan.concatenates or ["add"] * joins
    found += [each.name for each in plan.moved]
    return tuple(found) + ("split",) * bool(plan.outputs)


def _kind(layer: Layer) -> str:
    shape = layer.piece.map
    assert isinstance(shape, Map)
    if not shape.axes:
        return "linear"
    return f"conv_transpose{len(shape.axes)}d" if shape.transposed else f"conv{len(shape.axes)}d"


# --- nodes that stayed ---------------------------------------------------------------------------


def skips(part: Part, passes: Sequence[Pass]) -> Iterator[Skip]:
    """Why nodes of a graph stayed: every refusal, and every BatchNorm that is left."""
    elsewhere = frozenset(rule.name for rule in passes if not rule.reports_layers)
    for node in part.program.graph.nodes:
        if node.op == "call_module" and node.meta.get("owner"):
            yield from _inner_batchnorms(part, node)
        note = _note(part, node, elsewhere)
        if note is None and _is_batchnorm(part, node):
            note = _batchnorm_note(part, node)
        if note is not None:
            yield note


def _note(part: Part, node: fx.Node, elsewhere: frozenset[str]) -> Skip | None:
    """The note of the pass that declined a node last.

    Args:
        part: the graph.
        node: a node that stayed.
        elsewhere: names of the passes whose notes about a layer are reported at other nodes.
    """
    notes = part.notes.get(node, {})
    if part.is_layer(node):
        notes = {name: note for name, note in notes.items() if name not in elsewhere}
    return list(notes.values())[-1] if notes else None


def _inner_batchnorms(part: Part, node: fx.Node) -> Iterator[Skip]:
    """BatchNorms inside a module of torch.nn that runs as one operation."""
    module = part.view.submodule(str(node.target))
    reason = f"inside a torch.nn.{type(module).__name__}, which is called as it is"
    for name, inner in module.named_modules():
        if name and isinstance(inner, nn.modules.batchnorm._BatchNorm):
            yield Skip("capture", f"{part.where(node)}.{name}", reason)


def _batchnorm_note(part: Part, node: fx.Node) -> Skip:
    """Why a BatchNorm stayed that no pass declined.

    If a pass declined a layer that reads the BatchNorm, the reason is the layer's.
    """
    place = part.where(node)
    readers = _readers(part, node)
    for reader in readers:
        if part.is_layer(reader) and part.notes.get(reader):
            return Skip("batchnorm", place, list(part.notes[reader].values())[-1].reason)
    feeds = ", ".join(sorted({_name(part, reader) for reader in readers})) or "nothing"
    source = node.all_input_nodes[0]
    while part.is_identity(source):
        source = source.all_input_nodes[0]
    for neighbour in (source, *readers):
        unread = _unread_layer(part, neighbour)
        if unread is not None:
            return Skip("batchnorm", place, unread)
    return Skip(
        "batchnorm",
        place,
        f"no convolution or linear layer next to it: it reads {_name(part, source)} "
        f"and feeds {feeds}",
    )


def _unread_layer(part: Part, node: fx.Node) -> str | None:
    """Why a convolution or linear layer next to a BatchNorm is none for the passes."""
    if node.op != "call_module" or part.is_layer(node):
        return None
    module = part.view.submodule(str(node.target))
    if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        return None
    reading = part.view.read(node)
    reason = reading.reason if isinstance(reading, Refusal) else "what it computes is not known"
    return f"{part.where(node)}, the {type(module).__name__} next to it: {reason}"


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _is_batchnorm(part: Part, node: fx.Node) -> bool:
    """Whether a node is a BatchNorm that has a reading or a refusal."""
    if part.view.read(node) is None:
        return False
    if node.op == "call_module":
        module = part.view.submodule(str(node.target))
        return known_class(node, module, _BATCH_NORMS) is not None
    return node.target in (F.batch_norm, torch.batch_norm)


def _readers(part: Part, node: fx.Node) -> list[fx.Node]:
    """The nodes that read a value, directly or through identities."""
    found: list[fx.Node] = []
    ahead = list(node.users)
    for user in ahead:
        if part.is_identity(user):
            ahead.extend(user.users)
        else:
            found.append(user)
    return found


def _name(part: Part, node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the input {node.name}"
    if node.op == "call_module":
        return type(part.program.module.get_submodule(str(node.target))).__name__
    return getattr(node.target, "__name__", str(node.target))
