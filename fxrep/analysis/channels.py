"""The sizes of channel axes, without running the model.

Given::

    y -> PixelUnshuffle(2) -> x -> relu -> Conv2d(8, 16)

Result: axis -3 of x has size 8, for the convolution raises at anything else and relu changes no
size; that of y has size 2, and that of the convolution's result 16.

Axes are counted from the last, so that (C, H, W) and (N, C, H, W) need not be told apart. What
counts from the first (BatchNorm1d, a positive `dim`) is used where the rank is known.

What makes a value proves its size, and so does what reads it and raises unless it fits; both also
through operations that keep it. Never backwards through arithmetic: that may broadcast. BatchNorm
counts as raising, although it lets a value without elements pass.
"""

from __future__ import annotations

import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxrep.ops.owner import known_class

# The most sizes asked for, and the most readers of one value looked at, to answer one question.
_MOST_ASKED = 128
_MOST_USERS = 32
_MOST_STEPS = 8
_MOST_PARTS = 16
_MOST_AXES = 5

_Size = tuple[fx.Node, int]  # of a value, at an axis
_Convert = Callable[..., int | None]


class _Rule(NamedTuple):
    """A size follows from others; from none, if it is known as it stands."""

    conclude: _Convert
    premises: tuple[_Size, ...] = ()


class _Said(NamedTuple):
    """What an operation says of one axis.

    Attributes:
        rules: each would prove the size of the result.
        source: an operand.
        back: each would prove the size of that operand, at the same axis.
    """

    rules: tuple[_Rule, ...] = ()
    source: fx.Node | None = None
    back: tuple[_Rule, ...] = ()


_NOTHING = _Said()
_Waiting = tuple[_Size, _Rule]


class Channels:
    """Sizes of the values of one graph, which may be rewritten meanwhile.

    Args:
        graph: as traced.
        module: the module its targets refer to.
        rank: the rank of a value if it is known.
    """

    def __init__(
        self, graph: fx.Graph, module: nn.Module, rank: Callable[[fx.Node], int | None]
    ) -> None:
        self.rank = rank
        self._module = module
        self._known: dict[_Size, int] = {}
        self._weights: dict[tuple[nn.Module, str], torch.Size | None] = {}
        # A value whose shape changes in place has no one size.
        self._reshaped = any(_reshapes(node) for node in graph.nodes)

    def of(self, node: fx.Node, axis: int) -> int | None:
        """The size of a value at an axis, counted from the last (-1), if it is certain."""
        goal = node, axis
        if axis >= 0 or self._reshaped or node._erased:
            return None
        asked, queue = {goal}, deque([goal])  # a loop: graphs are deeper than Python's stack
        waiting: dict[_Size, list[_Waiting]] = {}
        while queue and goal not in self._known:
            size = queue.popleft()
            for rule in self._rules(*size):
                self._conclude(size, rule, waiting)
                if size in self._known:
                    break
                for premise in rule.premises:
                    waiting.setdefault(premise, []).append((size, rule))
                    if not (
                        premise in asked or premise in self._known or len(asked) >= _MOST_ASKED
                    ):
                        asked.add(premise)
                        queue.append(premise)
        return self._known.get(goal)

    def same(self, new: fx.Node, old: fx.Node) -> None:
        """Say that `new` has the sizes of `old`, whose place it takes."""
        for axis in range(-_MOST_AXES, 0):
            if (old, axis) in self._known:
                self._known.setdefault((new, axis), self._known[old, axis])

    def _conclude(self, size: _Size, rule: _Rule, waiting: dict[_Size, list[_Waiting]]) -> None:
        """Apply a rule if its premises are known, and then whatever waited for its result."""
        ready: list[_Waiting] = [(size, rule)]
        while ready:
            size, rule = ready.pop()
            found = [self._known.get(premise) for premise in rule.premises]
            result = None if size in self._known or None in found else rule.conclude(*found)
            if result is not None:
                self._known[size] = result
                ready.extend(waiting.pop(size, ()))

    def _rules(self, node: fx.Node, axis: int) -> Iterator[_Rule]:
        """All that could prove a size: what makes the value, then what reads it."""
        shape = self.shape(node)
        if shape is not None:
            if len(shape) >= -axis:
                yield _fact(shape[axis])
            return
        yield from self._said(node, axis).rules
        for user in itertools.islice(node.users, _MOST_USERS):
            said = self._said(user, axis)
            if said.source is node:
                yield from said.back
            parts = _joined(_Call(self, user), axis)
            if parts and len({self._origin(part, axis) for part in parts}) == 1:
                yield _Rule(partial(_divided, len(parts)), ((user, axis),))

    def _said(self, node: fx.Node, axis: int) -> _Said:
        if node.op == "call_module":
            module = self._submodule(str(node.target))
            base = None if module is None else known_class(node, module, _MODULES)
            if base is None:
                return _NOTHING
            return _MODULES[base](_Call(self, node, module), axis)
        if node.op == "call_function":
            reader = _FUNCTIONS.get(node.target)
        else:
            reader = _CALLS.get(str(node.target)) if node.op == "call_method" else None
        return _NOTHING if reader is None else reader(_Call(self, node), axis)

    def _origin(self, node: fx.Node, axis: int) -> fx.Node:
        """The earliest value above that certainly has the same size."""
        for _ in range(_MOST_STEPS):
            said = self._said(node, axis)
            source = said.source
            if source is None or not said.rules or said.rules[0] != _Rule(_same, ((source, axis),)):
                break
            node = source
        return node

    def _submodule(self, path: str) -> nn.Module | None:
        try:
            return self._module.get_submodule(path)
        except AttributeError:
            return None

    def shape(self, node: object) -> torch.Size | None:
        """The shape of a tensor of the model, if that is what the node reads."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        owner, _, name = str(node.target).rpartition(".")
        return _shape(getattr(self._submodule(owner), name, None))

    def weight(self, module: nn.Module, name: str) -> torch.Size | None:
        """The shape of a tensor of a layer, which a parametrization may have to compute."""
        if (module, name) not in self._weights:
            with torch.no_grad():
                self._weights[module, name] = _shape(getattr(module, name, None))
        return self._weights[module, name]

    def negative(self, axis: object, node: fx.Node | None) -> int | None:
        """An axis of a value, counted from the last."""
        if not isinstance(axis, int) or axis < 0:
            return axis if isinstance(axis, int) else None
        rank = None if node is None else self.rank(node)
        return None if rank is None or axis >= rank else axis - rank

    def reaches(self, node: fx.Node, axis: int) -> bool:
        """Whether a value may have the axis."""
        shape = self.shape(node)
        rank = self.rank(node) if shape is None else len(shape)
        return rank is None or rank >= -axis


@dataclass(frozen=True, eq=False)
class _Call:
    """A call and what it is given, be it a layer's attribute or an argument."""

    channels: Channels
    node: fx.Node
    module: nn.Module | None = None

    @property
    def source(self) -> fx.Node | None:
        """The tensor it works on: its first argument, or its only one."""
        value = self.node.args[0] if self.node.args else self.node.kwargs.get("input")
        inputs = self.node.all_input_nodes
        if isinstance(value, fx.Node):
            return value
        return inputs[0] if len(inputs) == 1 else None

    def get(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument by position or name; methods and functions count alike."""
        if self.module is not None:
            return getattr(self.module, names[0], default)
        for name in names:
            if name in self.node.kwargs:
                return self.node.kwargs[name]
        return self.node.args[position] if position < len(self.node.args) else default

    def weight(self) -> torch.Size | None:
        """The shape of a layer's weight."""
        if self.module is not None:
            return self.channels.weight(self.module, "weight")
        return self.channels.shape(self.get(1, "weight"))

    def axis(self, position: int, *names: str, default: object = None) -> int | None:
        """An argument that is an axis of the first one, counted from the last."""
        return self.channels.negative(self.get(position, *names, default=default), self.source)


def _reshapes(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    called = node.op in ("call_method", "call_function")
    return called and (name in _RESHAPING or node.kwargs.get("out") is not None)


def _shape(value: object) -> torch.Size | None:
    plain = type(value) in (Tensor, nn.Parameter, nn.Buffer)
    return value.shape if plain and isinstance(value, Tensor) else None


def _ints(value: object) -> tuple[int, ...]:
    """A sequence of ints; empty if it is none."""
    sequence = isinstance(value, (tuple, list)) and all(isinstance(each, int) for each in value)
    return tuple(value) if sequence else ()  # type: ignore[arg-type]


def _fact(size: int) -> _Rule:
    return _Rule(lambda: size)


def _same(size: int) -> int:
    return size


def _divided(by: int, size: int) -> int | None:
    return None if size % by else size // by


# --- readers: what remains when the spelling is gone ---------------------------------------------


def _keep(call: _Call, axis: int, there: _Convert = _same, back: _Convert | None = _same) -> _Said:
    """The size is that of the first operand, or follows from it."""
    source = call.source
    if source is None:
        return _NOTHING
    proofs = () if back is None else (_Rule(back, ((call.node, axis),)),)
    return _Said((_Rule(there, ((source, axis),)),), source, proofs)


def _keep_before(spatial: int, call: _Call, axis: int) -> _Said:
    return _keep(call, axis) if axis < -spatial else _NOTHING


def _fixed(call: _Call, inputs: int, outputs: int) -> _Said:
    """It raises unless the operand has one size; the result has another."""
    return _Said((_fact(outputs),), call.source, (_fact(inputs),))


def _layer(spatial: int, transposed: bool, call: _Call, axis: int) -> _Said:
    """A convolution; of no spatial axes, a linear layer."""
    if axis != -spatial - 1:
        return _keep_before(spatial + 1, call, axis)
    weight, groups = call.weight(), call.get(6, "groups", default=1) if spatial else 1
    if weight is None or len(weight) != spatial + 2 or not isinstance(groups, int):
        return _NOTHING
    outputs, inputs = weight[0], weight[1] * groups
    if transposed:  # its weight is that of the convolution it transposes
        outputs, inputs = inputs, outputs
    return _fixed(call, inputs, outputs)


def _norm(channel: int | None, call: _Call, axis: int) -> _Said:
    """BatchNorm, GroupNorm: it is their vectors, if any, that ask for as many channels."""
    if axis != (channel or call.channels.negative(1, call.source)):
        return _keep(call, axis)
    if call.module is None:
        shapes = [call.channels.shape(node) for node in call.node.all_input_nodes]
    else:
        tracks = not call.module.training or getattr(call.module, "track_running_stats", False)
        names = ("weight", "bias", "running_mean") if tracks else ("weight", "bias")
        shapes = [call.channels.weight(call.module, name) for name in names]
    count = next((shape[0] for shape in shapes if shape is not None and len(shape) == 1), None)
    return _keep(call, axis) if count is None else _fixed(call, count, count)


def _instance_norm(channel: int, call: _Call, axis: int) -> _Said:
    """Without a weight of its own it only warns of other channels."""
    count = call.get(0, "num_features") if call.get(0, "affine") and axis == channel else None
    return _keep(call, axis) if count is None else _fixed(call, count, count)


def _layer_norm(call: _Call, axis: int) -> _Said:
    sizes = _ints(call.get(1, "normalized_shape"))
    return _fixed(call, sizes[axis], sizes[axis]) if -axis <= len(sizes) else _keep(call, axis)


def _pad(call: _Call, axis: int) -> _Said:
    pads = _ints(call.get(1, "pad" if call.module is None else "padding"))
    if not pads:
        return _NOTHING
    total = sum(pads[-2 * axis - 2 : -2 * axis])
    return _keep(call, axis, partial(operator.add, total), partial(operator.add, -total))


def _resize(call: _Call, axis: int) -> _Said:
    """Axis 1 is the channels' even here: what has no batch axis is not taken."""
    for sizes in (call.get(1, "size"), call.get(2, "scale_factor")):
        if isinstance(sizes, (tuple, list)):
            return _keep_before(len(sizes), call, axis)
    mode = call.get(3, "mode")
    rank = _RESIZES.get(mode) if isinstance(mode, str) else None
    if rank is None and call.source is not None:
        rank = call.channels.rank(call.source)
    return _NOTHING if rank is None else _keep_before(rank - 2, call, axis)


def _pixels(unshuffle: bool, call: _Call, axis: int) -> _Said:
    factor = call.get(1, "downscale_factor" if unshuffle else "upscale_factor")
    if axis != -3 or not isinstance(factor, int) or factor < 1:
        return _keep_before(3, call, axis)
    more, fewer = partial(operator.mul, factor**2), partial(_divided, factor**2)
    return _keep(call, axis, more, fewer) if unshuffle else _keep(call, axis, fewer, more)


def _broadcast(call: _Call, axis: int) -> _Said:
    """An operand without the axis counts as 1."""
    operands = call.node.all_input_nodes
    arguments = (*call.node.args, *call.node.kwargs.values())
    if not all(isinstance(each, _SCALARS) for each in arguments):
        return _NOTHING
    if len(operands) == 1:
        return _keep(call, axis)
    sizes = tuple((each, axis) for each in operands if call.channels.reaches(each, axis))
    return _Said((_Rule(_widest, sizes),)) if sizes else _NOTHING


def _widest(*sizes: int) -> int | None:
    wide = {size for size in sizes if size != 1}
    return None if len(wide) > 1 else max(wide, default=1)


def _into(call: _Call, axis: int) -> _Said:
    """``a += b``: a keeps its shape if it is a tensor, but may be a number."""
    if call.source is None or len(call.node.all_input_nodes) == 1:
        return _broadcast(call, axis)
    return _keep(call, axis, back=None)


def _cat(call: _Call, axis: int) -> _Said:
    parts = call.get(0, "tensors")
    dim = call.channels.negative(call.get(1, "dim", "axis", default=0), call.node)
    if dim is None or not isinstance(parts, (tuple, list)) or len(parts) > _MOST_ASKED:
        return _NOTHING
    sizes = tuple((part, axis) for part in parts if isinstance(part, fx.Node))
    if len(sizes) < len(parts):
        return _NOTHING
    if axis == dim:
        return _Said((_Rule(lambda *found: sum(found), sizes),))
    # Nothing follows from a size of 0: cat takes an empty vector for nothing.
    return _Said(tuple(_Rule(lambda found: found or None, (size,)) for size in sizes))


def _joined(call: _Call, axis: int) -> tuple[fx.Node, ...]:
    """The values that are concatenated along an axis; none for anything else."""
    if call.node.op != "call_function" or _FUNCTIONS.get(call.node.target) is not _cat:
        return ()
    parts = call.get(0, "tensors")
    dim = call.channels.negative(call.get(1, "dim", "axis", default=0), call.node)
    if dim != axis or not isinstance(parts, (tuple, list)) or len(parts) > _MOST_PARTS:
        return ()
    return tuple(parts) if all(isinstance(part, fx.Node) for part in parts) else ()


def _pieces(call: _Call, axis: int) -> _Said:
    """What chunk or split takes apart: its size is the sum of all the parts' sizes."""
    dim, how = call.axis(2, "dim", default=0), call.get(1, *_HOW)
    items = {user.args[1]: user for user in call.node.users if user.target is operator.getitem}
    if dim is None or call.source is None or not items:
        return _NOTHING
    if axis != dim:
        kept = tuple(_Rule(_same, ((item, axis),)) for item in itertools.islice(items.values(), 4))
        return _Said((), call.source, kept)
    name = _SPLITS[call.node.target]
    if name in ("split", "split_with_sizes") and _ints(how):
        return _Said((), call.source, (_fact(sum(_ints(how))),))
    if name == "split" or not isinstance(how, int) or set(items) != set(range(how)):
        return _NOTHING
    parts = tuple((item, axis) for item in items.values())
    return _Said((), call.source, (_Rule(lambda *found: sum(found), parts),))


def _item(call: _Call, axis: int) -> _Said:
    """``x[:, a:b]``, or one of the values that chunk or split gives."""
    key: Any = call.node.args[1]
    if isinstance(key, int) and call.source is not None:
        return _part(_Call(call.channels, call.source), key, axis)
    entries = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(entry, slice) or entry is Ellipsis for entry in entries):
        return _NOTHING
    cuts = {}
    for i, entry in enumerate(entries):
        if entry is not Ellipsis and entry != slice(None):
            place = i - len(entries) if Ellipsis in entries[:i] else i
            cuts[call.channels.negative(place, call.source)] = entry
    if axis not in cuts and None not in cuts:
        return _keep(call, axis)
    cut = cuts.get(axis)
    if cut is None or None in cuts:
        return _NOTHING
    if not all(x is None or isinstance(x, int) for x in (cut.start, cut.stop, cut.step)):
        return _NOTHING
    back = None
    if isinstance(cut.start, int) and cut.start >= 0 and cut.stop is None and cut.step in (None, 1):
        start = cut.start
        back = lambda size: size + start if size else None  # noqa: E731
    return _keep(call, axis, lambda size: len(range(size)[cut]), back)


def _part(call: _Call, index: int, axis: int) -> _Said:
    called = call.node.op in ("call_method", "call_function")
    name = _SPLITS.get(call.node.target) if called else None
    dim, how = call.axis(2, "dim", default=0), call.get(1, *_HOW)
    if name is None or dim is None or not (isinstance(how, int) or _ints(how)):
        return _NOTHING
    return _keep(call, axis, partial(_split, name, how, index) if axis == dim else _same, None)


def _split(name: str, how: Any, index: int, size: int) -> int | None:
    """Torch's own answer: each of these functions rounds in its own way."""
    try:
        return int(getattr(torch.empty(size, device="meta"), name)(how)[index].shape[0])
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None


def _transpose(call: _Call, axis: int) -> _Said:
    a, b = call.axis(1, "dim0", "axis0"), call.axis(2, "dim1", "axis1")
    if a is None or b is None or call.source is None:
        return _NOTHING
    if axis not in (a, b):
        return _keep(call, axis)
    return _Said((_Rule(_same, ((call.source, b if axis == a else a),)),))


def _permute(call: _Call, axis: int) -> _Said:
    dims = _ints(call.node.args[1:]) or _ints(call.get(1, "dims"))
    if call.source is None or -axis > len(dims):
        return _NOTHING
    origin = dims[axis] - len(dims) if dims[axis] >= 0 else dims[axis]  # it raises at another rank
    return _Said((_Rule(_same, ((call.source, origin),)),))


# --- spellings -----------------------------------------------------------------------------------


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_SCALARS = (fx.Node, int, float, complex, str, torch.dtype, type(None))

_RESIZES = {"linear": 3, "bilinear": 4, "bicubic": 4, "trilinear": 5}

_HOW = _words(
    "chunks split_size_or_sections split_size split_sizes indices_or_sections indices sections"
)

_SPLITS: dict[Any, str] = {
    spelling: name
    for name in _words("chunk split split_with_sizes tensor_split")
    for spelling in (name, getattr(torch, name))
}

_RESHAPING = _words(
    "squeeze_ unsqueeze_ transpose_ t_ swapaxes_ swapdims_ resize_ resize_as_ set_ swap_ "
    "as_strided_"
)

# The result has the shape of the first operand.
_KEEPING = (
    "neg negative positive abs exp log sqrt rsqrt square reciprocal sin cos tan tanh sigmoid sign "
    "round floor ceil erf relu relu6 gelu silu mish elu celu selu hardswish hardsigmoid hardtanh "
    "hardshrink softshrink tanhshrink softplus softsign leaky_relu prelu rrelu threshold "
    "logsigmoid softmax log_softmax softmin normalize dropout dropout1d dropout2d dropout3d "
    "alpha_dropout feature_dropout feature_alpha_dropout nan_to_num cumsum roll flip contiguous "
    "clone detach to type_as float double half bfloat16 cpu cuda zeros_like ones_like full_like "
    "instance_norm local_response_norm channel_shuffle native_channel_shuffle "
    "ReLU ReLU6 LeakyReLU PReLU RReLU ELU CELU SELU GELU SiLU Mish Hardswish Hardsigmoid Hardtanh "
    "Hardshrink Softshrink Tanhshrink Sigmoid LogSigmoid Tanh Softplus Softsign Threshold Softmax "
    "Softmax2d LogSoftmax Softmin Identity Dropout Dropout1d Dropout2d Dropout3d AlphaDropout "
    "FeatureAlphaDropout LocalResponseNorm ChannelShuffle"
)

_BROADCASTING = (
    "add sub subtract rsub mul multiply div divide true_divide floor_divide remainder fmod pow "
    "maximum minimum where lerp addcmul addcdiv clamp clip clamp_min clamp_max eq ne lt le gt ge "
    "masked_fill __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__"
)

_POOLING = (
    "max_pool avg_pool lp_pool adaptive_avg_pool adaptive_max_pool "
    "MaxPool AvgPool LPPool AdaptiveAvgPool AdaptiveMaxPool"
)

_Reader = Callable[[_Call, int], _Said]

_BY_DIMENSION: dict[str, Callable[[int], _Reader]] = {
    "conv Conv": lambda n: partial(_layer, n, False),
    "conv_transpose ConvTranspose": lambda n: partial(_layer, n, True),
    "ZeroPad ConstantPad ReflectionPad ReplicationPad CircularPad": lambda n: _pad,
    "InstanceNorm": lambda n: partial(_instance_norm, -n - 1),
    _POOLING: lambda n: partial(_keep_before, n),
}

_BY_NAMES: dict[str, _Reader] = {
    _KEEPING: _keep,
    _BROADCASTING: _broadcast,
    "linear Linear": partial(_layer, 0, False),
    "batch_norm group_norm BatchNorm1d SyncBatchNorm GroupNorm": partial(_norm, None),
    "BatchNorm2d": partial(_norm, -3),
    "BatchNorm3d": partial(_norm, -4),
    "layer_norm rms_norm LayerNorm RMSNorm": _layer_norm,
    "interpolate upsample Upsample UpsamplingNearest2d UpsamplingBilinear2d": _resize,
    "pixel_shuffle PixelShuffle": partial(_pixels, False),
    "pixel_unshuffle PixelUnshuffle": partial(_pixels, True),
    "pad": _pad,
    "cat concat concatenate": _cat,
    "transpose swapaxes swapdims": _transpose,
    "permute": _permute,
    "chunk split split_with_sizes tensor_split": _pieces,
}

# Functions, methods and classes; only classes begin with a capital.
_CALLS: dict[str, _Reader] = {
    **{f"{name}_": _keep for name in _words(f"{_KEEPING} {_BROADCASTING}") if name[-1] != "_"},
    **{name: reader for names, reader in _BY_NAMES.items() for name in _words(names)},
    **{
        f"{name}{n}d": reader(n)
        for names, reader in _BY_DIMENSION.items()
        for name in _words(names)
        for n in (1, 2, 3)
    },
}

_OPERATORS: dict[str, _Reader] = {
    **dict.fromkeys(_words("neg pos abs invert"), _keep),
    **dict.fromkeys(_words("add sub mul truediv floordiv mod pow lt le gt ge"), _broadcast),
    **dict.fromkeys(_words("iadd isub imul itruediv ifloordiv imod ipow"), _into),
    "getitem": _item,
}


_FUNCTIONS: dict[Any, _Reader] = {
    getattr(home, name): reader
    for home, readers in (
        (torch, _CALLS),
        (torch._C._nn, _CALLS),
        (F, _CALLS),
        (operator, _OPERATORS),
    )
    for name, reader in readers.items()
    if hasattr(home, name)
}

_MODULES: dict[Any, _Reader] = {
    getattr(nn, name): reader
    for name, reader in _CALLS.items()
    if name[0].isupper() and name[-1] != "_"
}
