"""What each operator says of the size of one axis: its result's, and that of an operand.

Axes are counted from the last. A rule is given a call whose arguments are known by name, an axis,
and who may be asked; it changes nothing.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx

from fxrep.analysis.rank_rules import RESIZES
from fxrep.ops.calls import Called
from fxrep.ops.op import Shape

if TYPE_CHECKING:
    from fxrep.analysis.channels import Channels

# The most operands of a concatenation looked at for its own size, and for that of a part.
_MOST_ASKED = 128
_MOST_PARTS = 16

Size = tuple[fx.Node, int]  # of a value, at an axis
Convert = Callable[..., int | None]


class Proof(NamedTuple):
    """A size follows from others; from none, if it is known as it stands."""

    conclude: Convert
    premises: tuple[Size, ...] = ()


class Said(NamedTuple):
    """What an operator says of one axis.

    Attributes:
        proofs: each would prove the size of the result.
        source: an operand.
        back: each would prove the size of that operand, at the same axis.
    """

    proofs: tuple[Proof, ...] = ()
    source: fx.Node | None = None
    back: tuple[Proof, ...] = ()


NOTHING = Said()


Rule = Callable[[Called, int, "Channels"], Said]


def _ints(value: object) -> tuple[int, ...]:
    """A sequence of ints; empty if it is none."""
    sequence = isinstance(value, (tuple, list)) and all(isinstance(each, int) for each in value)
    return tuple(value) if sequence else ()  # type: ignore[arg-type]


def fact(size: int) -> Proof:
    """A size that is known as it stands."""
    return Proof(lambda: size)


def same(size: int) -> int:
    """The size of an axis that nothing changes."""
    return size


def divided(by: int, size: int) -> int | None:
    """One of equal parts."""
    return None if size % by else size // by


def _keep(call: Called, axis: int, there: Convert = same, back: Convert | None = same) -> Said:
    """The size is that of the first operand, or follows from it."""
    source = call.source
    if source is None:
        return NOTHING
    proofs = () if back is None else (Proof(back, ((call.node, axis),)),)
    return Said((Proof(there, ((source, axis),)),), source, proofs)


def _keeps(call: Called, axis: int, channels: Channels) -> Said:
    return _keep(call, axis)


def _keep_before(spatial: int, call: Called, axis: int) -> Said:
    return _keep(call, axis) if axis < -spatial else NOTHING


def _fixed(call: Called, inputs: int, outputs: int) -> Said:
    """It raises unless the operand has one size; the result has another."""
    return Said((fact(outputs),), call.source, (fact(inputs),))


def _layer(call: Called, axis: int, channels: Channels) -> Said:
    """A convolution; of no spatial axes, a linear layer."""
    spatial = call.op.spatial
    if axis != -spatial - 1:
        return _keep_before(spatial + 1, call, axis)
    weight, groups = channels.shape(call.get("weight")), call.get("groups") if spatial else 1
    if weight is None or len(weight) != spatial + 2 or not isinstance(groups, int):
        return NOTHING
    outputs, inputs = weight[0], weight[1] * groups
    if call.op.shape is Shape.TRANSPOSED_LAYER:  # its weight is the convolution's it transposes
        outputs, inputs = inputs, outputs
    return _fixed(call, inputs, outputs)


def _norm(call: Called, axis: int, channels: Channels) -> Said:
    """BatchNorm, GroupNorm: it is their vectors, if any, that ask for as many channels."""
    channel = -call.op.spatial - 1 if call.op.spatial else channels.negative(1, call.source)
    if axis != channel:
        return _keep(call, axis)
    vectors = [call.get("weight"), call.get("bias")]
    if call.module is None or call.get("training") is False or _tracks(call):
        vectors.append(call.get("running_mean"))
    shapes = map(channels.shape, vectors)
    count = next((shape[0] for shape in shapes if shape is not None and len(shape) == 1), None)
    return _keep(call, axis) if count is None else _fixed(call, count, count)


def _tracks(call: Called) -> bool:
    """Whether a BatchNorm in training updates its statistics, or only looks at the batch."""
    return bool(getattr(call.module, "track_running_stats", False))


def _instance_norm(call: Called, axis: int, channels: Channels) -> Said:
    """Without a weight of its own it only warns of other channels."""
    affine = call.get("affine") and axis == -call.op.spatial - 1
    count = call.get("num_features") if affine else None
    return _keep(call, axis) if count is None else _fixed(call, count, count)


def _layer_norm(call: Called, axis: int, channels: Channels) -> Said:
    sizes = _ints(call.get("normalized_shape"))
    return _fixed(call, sizes[axis], sizes[axis]) if -axis <= len(sizes) else _keep(call, axis)


def _pad(call: Called, axis: int, channels: Channels) -> Said:
    pads = _ints(call.get("pad"))
    if not pads:
        return NOTHING
    total = sum(pads[-2 * axis - 2 : -2 * axis])
    return _keep(call, axis, partial(operator.add, total), partial(operator.add, -total))


def _pool(call: Called, axis: int, channels: Channels) -> Said:
    return _keep_before(call.op.spatial, call, axis)


def _resize(call: Called, axis: int, channels: Channels) -> Said:
    """Axis 1 is the channels' even here: what has no batch axis is not taken."""
    for sizes in (call.get("size"), call.get("scale_factor")):
        if isinstance(sizes, (tuple, list)):
            return _keep_before(len(sizes), call, axis)
    mode = call.get("mode")
    rank = RESIZES.get(mode) if isinstance(mode, str) else None
    if rank is None and call.source is not None:
        rank = channels.rank(call.source)
    return NOTHING if rank is None else _keep_before(rank - 2, call, axis)


def _pixels(call: Called, axis: int, channels: Channels) -> Said:
    unshuffle = call.op.shape is Shape.PIXEL_UNSHUFFLE
    factor = call.get("downscale_factor" if unshuffle else "upscale_factor")
    if axis != -3 or not isinstance(factor, int) or factor < 1:
        return _keep_before(3, call, axis)
    more, fewer = partial(operator.mul, factor**2), partial(divided, factor**2)
    return _keep(call, axis, more, fewer) if unshuffle else _keep(call, axis, fewer, more)


def _broadcast(call: Called, axis: int, channels: Channels) -> Said:
    """An operand without the axis counts as 1."""
    operands = call.node.all_input_nodes
    arguments = (*call.node.args, *call.node.kwargs.values())
    if not all(isinstance(each, _SCALARS) for each in arguments):
        return NOTHING
    if call.in_place and call.source is not None and len(operands) > 1:
        # ``a += b``: a keeps its shape if it is a tensor, but may be a number.
        certain = call.node.op == "call_method" or channels.is_tensor(call.source)
        return _keep(call, axis, back=same if certain else None)
    if len(operands) == 1:
        (only,) = operands
        back = Proof(same, ((call.node, axis),))
        return Said((Proof(same, ((only, axis),)),), only, (back,))
    sizes = tuple((each, axis) for each in operands if channels.reaches(each, axis))
    return Said((Proof(_widest, sizes),)) if sizes else NOTHING


_SCALARS = (fx.Node, int, float, complex, str, torch.dtype, type(None))


def _widest(*sizes: int) -> int | None:
    wide = {size for size in sizes if size != 1}
    return None if len(wide) > 1 else max(wide, default=1)


def _cat(call: Called, axis: int, channels: Channels) -> Said:
    parts = call.get("tensors")
    dim = channels.negative(call.get("dim"), call.node)
    if dim is None or not isinstance(parts, (tuple, list)) or len(parts) > _MOST_ASKED:
        return NOTHING
    sizes = tuple((part, axis) for part in parts if isinstance(part, fx.Node))
    if len(sizes) < len(parts):
        return NOTHING
    if axis == dim:
        return Said((Proof(lambda *found: sum(found), sizes),))
    # Nothing follows from a size of 0: cat takes an empty vector for nothing.
    return Said(tuple(Proof(lambda found: found or None, (size,)) for size in sizes))


def joined(call: Called | None, axis: int, channels: Channels) -> tuple[fx.Node, ...]:
    """The values that are concatenated along an axis; none for anything else."""
    if call is None or call.op.shape is not Shape.CAT:
        return ()
    parts = call.get("tensors")
    dim = channels.negative(call.get("dim"), call.node)
    if dim != axis or not isinstance(parts, (tuple, list)) or len(parts) > _MOST_PARTS:
        return ()
    return tuple(parts) if all(isinstance(part, fx.Node) for part in parts) else ()


def _parts(call: Called, axis: int, channels: Channels) -> Said:
    """What chunk or split takes apart: its size is the sum of all the parts' sizes."""
    dim, how = channels.negative(call.get("dim"), call.source), call.get("sections")
    items = {user.args[1]: user for user in call.node.users if user.target is operator.getitem}
    if dim is None or call.source is None or not items:
        return NOTHING
    if axis != dim:
        kept = tuple(Proof(same, ((item, axis),)) for item in itertools.islice(items.values(), 4))
        return Said((), call.source, kept)
    name = call.op.name
    if name in ("split", "split_with_sizes") and _ints(how):
        return Said((), call.source, (fact(sum(_ints(how))),))
    if name == "split" or not isinstance(how, int) or set(items) != set(range(how)):
        return NOTHING
    parts = tuple((item, axis) for item in items.values())
    return Said((), call.source, (Proof(lambda *found: sum(found), parts),))


def part(call: Called | None, index: int, axis: int, channels: Channels) -> Said:
    """One of the values that a chunk or split gives."""
    if call is None or call.op.shape is not Shape.PARTS:
        return NOTHING
    dim, how = channels.negative(call.get("dim"), call.source), call.get("sections")
    if dim is None or not (isinstance(how, int) or _ints(how)):
        return NOTHING
    cut = partial(_split, call.op.name, how, index)
    return _keep(call, axis, cut if axis == dim else same, None)


def _split(name: str, how: Any, index: int, size: int) -> int | None:
    """Torch's own answer: each of these functions rounds in its own way."""
    try:
        return int(getattr(torch.empty(size, device="meta"), name)(how)[index].shape[0])
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None


def _item(call: Called, axis: int, channels: Channels) -> Said:
    """``x[:, a:b]``, or one of the values that chunk or split gives."""
    key: Any = call.get("key")
    if isinstance(key, int) and call.source is not None:
        return channels.of_item(call.source, key, axis)
    entries = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(entry, slice) or entry is Ellipsis for entry in entries):
        return NOTHING
    cuts = {}
    for i, entry in enumerate(entries):
        if entry is not Ellipsis and entry != slice(None):
            place = i - len(entries) if Ellipsis in entries[:i] else i
            cuts[channels.negative(place, call.source)] = entry
    if axis not in cuts and None not in cuts:
        return _keep(call, axis)
    cut = cuts.get(axis)
    if cut is None or None in cuts:
        return NOTHING
    if not all(x is None or isinstance(x, int) for x in (cut.start, cut.stop, cut.step)):
        return NOTHING
    back = None
    if isinstance(cut.start, int) and cut.start >= 0 and cut.stop is None and cut.step in (None, 1):
        start = cut.start
        back = lambda size: size + start if size else None  # noqa: E731
    return _keep(call, axis, lambda size: len(range(size)[cut]), back)


def _transpose(call: Called, axis: int, channels: Channels) -> Said:
    a, b = (channels.negative(call.get(name), call.source) for name in ("dim0", "dim1"))
    if a is None or b is None or call.source is None:
        return NOTHING
    if axis not in (a, b):
        return _keep(call, axis)
    return Said((Proof(same, ((call.source, b if axis == a else a),)),))


def _permute(call: Called, axis: int, channels: Channels) -> Said:
    dims = _ints(call.get("dims"))
    if call.source is None or -axis > len(dims):
        return NOTHING
    origin = dims[axis] - len(dims) if dims[axis] >= 0 else dims[axis]  # it raises at another rank
    return Said((Proof(same, ((call.source, origin),)),))


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
