"""The facts that each operator gives about the size of one axis, of its result and of an operand.

Axes are counted from the last. A rule is given a call whose arguments are known by name, an axis,
and the `Channels` that it may ask; it changes nothing.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx

from fxrep.analysis.rank_rules import RANK_OF_MODE
from fxrep.ops.calls import Called
from fxrep.ops.op import Shape

if TYPE_CHECKING:
    from fxrep.analysis.channels import Channels

# The most operands of a concatenation that the size of the result, or of an operand, is asked of.
_MOST_ASKED = 128
_MOST_PARTS = 16

Size = tuple[fx.Node, int]  # the size of a value at an axis
Convert = Callable[..., int | None]


class Proof(NamedTuple):
    """A size follows from other sizes, the premises; without premises it is known."""

    conclude: Convert
    premises: tuple[Size, ...] = ()


class AxisFacts(NamedTuple):
    """The facts that an operator gives about one axis.

    Attributes:
        proofs: proofs of the size of the result.
        source: an operand.
        backward: proofs of the size of that operand, at the same axis.
    """

    proofs: tuple[Proof, ...] = ()
    source: fx.Node | None = None
    backward: tuple[Proof, ...] = ()


NO_FACTS = AxisFacts()


Rule = Callable[[Called, int, "Channels"], AxisFacts]


def _ints(value: object) -> tuple[int, ...]:
    """A sequence of ints as a tuple; empty for any other value."""
    sequence = isinstance(value, (tuple, list)) and all(isinstance(each, int) for each in value)
    return tuple(value) if sequence else ()  # type: ignore[arg-type]


def known(size: int) -> Proof:
    """The proof of a known size."""
    return Proof(lambda: size)


def unchanged(size: int) -> int:
    """The size itself, where an operation keeps it."""
    return size


def divided(by: int, size: int) -> int | None:
    """The size of each of `by` equal parts."""
    return None if size % by else size // by


def _from_source(
    call: Called, axis: int, forward: Convert = unchanged, backward: Convert | None = unchanged
) -> AxisFacts:
    """The size follows from that of the first operand.

    Args:
        call: the call.
        axis: the axis, of the result and of the operand.
        forward: gives the size of the result from that of the operand.
        backward: gives the size of the operand from that of the result; None if none follows.
    """
    source = call.source
    if source is None:
        return NO_FACTS
    proofs = () if backward is None else (Proof(backward, ((call.node, axis),)),)
    return AxisFacts((Proof(forward, ((source, axis),)),), source, proofs)


def _keeps(call: Called, axis: int, channels: Channels) -> AxisFacts:
    return _from_source(call, axis)


def _unchanged_before(spatial: int, call: Called, axis: int) -> AxisFacts:
    return _from_source(call, axis) if axis < -spatial else NO_FACTS


def _fixed(call: Called, inputs: int, outputs: int) -> AxisFacts:
    """The call raises unless the operand has `inputs` channels; the result has `outputs`."""
    return AxisFacts((known(outputs),), call.source, (known(inputs),))


def _layer(call: Called, axis: int, channels: Channels) -> AxisFacts:
    """A convolution, or a linear layer, which has no spatial axes."""
    spatial, weight = call.op.spatial, channels.shape(call.get("weight"))
    groups = call.get("groups") if spatial else 1
    if (weight is None and not spatial) or (weight is not None and len(weight) != spatial + 2):
        return NO_FACTS  # the weight of a linear function may be a vector
    if axis != -spatial - 1:
        return _unchanged_before(spatial + 1, call, axis)
    if weight is None or not isinstance(groups, int):
        return NO_FACTS
    outputs, inputs = weight[0], weight[1] * groups
    if call.op.shape is Shape.TRANSPOSED_LAYER:  # weight (I, O/g, *k)
        outputs, inputs = inputs, outputs
    return _fixed(call, inputs, outputs)


def _norm(call: Called, axis: int, channels: Channels) -> AxisFacts:
    """BatchNorm, GroupNorm: they raise unless their vectors, if any, fit the channels."""
    channel = -call.op.spatial - 1 if call.op.spatial else channels.from_last(1, call.source)
    if axis != channel:
        return _from_source(call, axis)
    vectors = [call.get("weight"), call.get("bias")]
    if call.module is None or call.get("training") is False or _tracks(call):
        vectors.append(call.get("running_mean"))
    shapes = map(channels.shape, vectors)
    count = next((shape[0] for shape in shapes if shape is not None and len(shape) == 1), None)
    return _from_source(call, axis) if count is None else _fixed(call, count, count)


def _tracks(call: Called) -> bool:
    """Whether a BatchNorm in training updates running statistics."""
    return bool(getattr(call.module, "track_running_stats", False))


def _instance_norm(call: Called, axis: int, channels: Channels) -> AxisFacts:
    """Without a weight it only warns of other numbers of channels."""
    affine = call.get("affine") and axis == -call.op.spatial - 1
    count = call.get("num_features") if affine else None
    return _from_source(call, axis) if count is None else _fixed(call, count, count)


def _layer_norm(call: Called, axis: int, channels: Channels) -> AxisFacts:
    sizes = _ints(call.get("normalized_shape"))
    return (
        _fixed(call, sizes[axis], sizes[axis]) if -axis <= len(sizes) else _from_source(call, axis)
    )


def _pad(call: Called, axis: int, channels: Channels) -> AxisFacts:
    pads = _ints(call.get("pad"))
    if not pads:
        return NO_FACTS
    total = sum(pads[-2 * axis - 2 : -2 * axis])
    return _from_source(call, axis, partial(operator.add, total), partial(operator.add, -total))


def _pool(call: Called, axis: int, channels: Channels) -> AxisFacts:
    return _unchanged_before(call.op.spatial, call, axis)


def _resize(call: Called, axis: int, channels: Channels) -> AxisFacts:
    """Channels are at axis 1: torch takes no value without a batch axis here."""
    for sizes in (call.get("size"), call.get("scale_factor")):
        if isinstance(sizes, (tuple, list)):
            return _unchanged_before(len(sizes), call, axis)
    mode = call.get("mode")
    rank = RANK_OF_MODE.get(mode) if isinstance(mode, str) else None
    if rank is None and call.source is not None:
        rank = channels.rank(call.source)
    return NO_FACTS if rank is None else _unchanged_before(rank - 2, call, axis)


def _pixels(call: Called, axis: int, channels: Channels) -> AxisFacts:
    unshuffle = call.op.shape is Shape.PIXEL_UNSHUFFLE
    factor = call.get("downscale_factor" if unshuffle else "upscale_factor")
    if axis != -3 or not isinstance(factor, int) or factor < 1:
        return _unchanged_before(3, call, axis)
    more, fewer = partial(operator.mul, factor**2), partial(divided, factor**2)
    return (
        _from_source(call, axis, more, fewer)
        if unshuffle
        else _from_source(call, axis, fewer, more)
    )


def _broadcast(call: Called, axis: int, channels: Channels) -> AxisFacts:
    """Arithmetic; an operand without the axis has size 1."""
    operands = call.node.all_input_nodes
    arguments = (*call.node.args, *call.node.kwargs.values())
    if not all(isinstance(each, _SCALARS) for each in arguments):
        return NO_FACTS
    if call.in_place and call.source is not None and len(operands) > 1:
        # ``a += b`` keeps the shape of a tensor a; if a is a number, it makes a new value.
        certain = call.node.op == "call_method" or channels.is_tensor(call.source)
        return _from_source(call, axis, backward=unchanged if certain else None)
    if len(operands) == 1:
        (only,) = operands
        backward = Proof(unchanged, ((call.node, axis),))
        return AxisFacts((Proof(unchanged, ((only, axis),)),), only, (backward,))
    sizes = tuple((each, axis) for each in operands if channels.may_have_axis(each, axis))
    return AxisFacts((Proof(_widest, sizes),)) if sizes else NO_FACTS


_SCALARS = (fx.Node, int, float, complex, str, torch.dtype, type(None))


def _widest(*sizes: int) -> int | None:
    wide = {size for size in sizes if size != 1}
    return None if len(wide) > 1 else max(wide, default=1)


def _cat(call: Called, axis: int, channels: Channels) -> AxisFacts:
    parts = call.get("tensors")
    dim = channels.from_last(call.get("dim"), call.node)
    if dim is None or not isinstance(parts, (tuple, list)) or len(parts) > _MOST_ASKED:
        return NO_FACTS
    sizes = tuple((part, axis) for part in parts if isinstance(part, fx.Node))
    if len(sizes) < len(parts):
        return NO_FACTS
    if axis == dim:
        return AxisFacts((Proof(lambda *found: sum(found), sizes),))
    # Nothing follows from a size of 0: cat skips an operand of shape (0,).
    return AxisFacts(tuple(Proof(lambda found: found or None, (size,)) for size in sizes))


def concatenated(call: Called | None, axis: int, channels: Channels) -> tuple[fx.Node, ...]:
    """The values that a call concatenates along an axis; none for other calls."""
    if call is None or call.op.shape is not Shape.CAT:
        return ()
    parts = call.get("tensors")
    dim = channels.from_last(call.get("dim"), call.node)
    if dim != axis or not isinstance(parts, (tuple, list)) or len(parts) > _MOST_PARTS:
        return ()
    return tuple(parts) if all(isinstance(part, fx.Node) for part in parts) else ()


def _parts(call: Called, axis: int, channels: Channels) -> AxisFacts:
    """The operand of a chunk or split: its size is the sum of the sizes of all parts."""
    dim, how = channels.from_last(call.get("dim"), call.source), call.get("sections")
    items = {user.args[1]: user for user in call.node.users if user.target is operator.getitem}
    if dim is None or call.source is None or not items:
        return NO_FACTS
    if axis != dim:
        kept = tuple(
            Proof(unchanged, ((item, axis),)) for item in itertools.islice(items.values(), 4)
        )
        return AxisFacts((), call.source, kept)
    name = call.op.name
    if name in ("split", "split_with_sizes") and _ints(how):
        return AxisFacts((), call.source, (known(sum(_ints(how))),))
    if name == "split" or not isinstance(how, int) or set(items) != set(range(how)):
        return NO_FACTS
    parts = tuple((item, axis) for item in items.values())
    return AxisFacts((), call.source, (Proof(lambda *found: sum(found), parts),))


def part(call: Called | None, index: int, axis: int, channels: Channels) -> AxisFacts:
    """One of the values that a chunk or split returns."""
    if call is None or call.op.shape is not Shape.PARTS:
        return NO_FACTS
    dim, how = channels.from_last(call.get("dim"), call.source), call.get("sections")
    if dim is None or not (isinstance(how, int) or _ints(how)):
        return NO_FACTS
    forward = partial(_part_size, call, index) if axis == dim else unchanged
    return _from_source(call, axis, forward, None)


def _part_size(call: Called, index: int, size: int) -> int | None:
    sizes = part_sizes(call, size)
    return sizes[index] if -len(sizes) <= index < len(sizes) else None


def part_sizes(call: Called, size: int) -> list[int]:
    """The sizes of the parts into which a chunk or split divides an axis; none if it raises.

    Torch computes them, for each of these functions rounds in its own way.
    """
    try:
        parts = getattr(torch.empty(size, device="meta"), call.op.name)(call.get("sections"))
    except (RuntimeError, IndexError, TypeError, ValueError):
        return []
    return [int(each.shape[0]) for each in parts]


def _item(call: Called, axis: int, channels: Channels) -> AxisFacts:
    """``x[:, a:b]``, or one of the values that a chunk or split returns."""
    key: Any = call.get("key")
    if isinstance(key, int) and call.source is not None:
        return channels.part_facts(call.source, key, axis)
    entries = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(entry, slice) or entry is Ellipsis for entry in entries):
        return NO_FACTS
    cuts = {}
    for i, entry in enumerate(entries):
        if entry is not Ellipsis and entry != slice(None):
            place = i - len(entries) if Ellipsis in entries[:i] else i
            cuts[channels.from_last(place, call.source)] = entry
    if axis not in cuts and None not in cuts:
        return _from_source(call, axis)
    cut = cuts.get(axis)
    if cut is None or None in cuts:
        return NO_FACTS
    if not all(x is None or isinstance(x, int) for x in (cut.start, cut.stop, cut.step)):
        return NO_FACTS
    backward = None
    if isinstance(cut.start, int) and cut.start >= 0 and cut.stop is None and cut.step in (None, 1):
        start = cut.start
        backward = lambda size: size + start if size else None  # noqa: E731
    return _from_source(call, axis, lambda size: len(range(size)[cut]), backward)


def _transpose(call: Called, axis: int, channels: Channels) -> AxisFacts:
    a, b = (channels.from_last(call.get(name), call.source) for name in ("dim0", "dim1"))
    if a is None or b is None or call.source is None:
        return NO_FACTS
    if axis not in (a, b):
        return _from_source(call, axis)
    return AxisFacts((Proof(unchanged, ((call.source, b if axis == a else a),)),))


def _permute(call: Called, axis: int, channels: Channels) -> AxisFacts:
    dims = _ints(call.get("dims"))
    if call.source is None or -axis > len(dims):
        return NO_FACTS
    origin = dims[axis] - len(dims) if dims[axis] >= 0 else dims[axis]  # it raises at another rank
    return AxisFacts((Proof(unchanged, ((call.source, origin),)),))


RULES: dict[Shape, Rule] = {
    Shape.KEEPS: _keeps,
    Shape.BROADCASTS: _broadcast,
    **dict.fromkeys((Shape.LAYER, Shape.TRANSPOSED_LAYER), _layer),
    Shape.NORM: _norm,
    Shape.INSTANCE_NORM: _instance_norm,
    Shape.LAYER_NORM: _layer_norm,
    Shape.PAD: _pad,
    Shape.POOL: _pool,
    Shape.RESIZE: _resize,
    **dict.fromkeys((Shape.PIXEL_SHUFFLE, Shape.PIXEL_UNSHUFFLE), _pixels),
    Shape.CAT: _cat,
    Shape.PARTS: _parts,
    Shape.ITEM: _item,
    Shape.TRANSPOSE: _transpose,
    Shape.PERMUTE: _permute,
}  # fmt: skip
