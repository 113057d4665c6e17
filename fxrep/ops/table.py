"""What torch's operators are: one entry for each, whatever way it is spelt.

An entry names the functions, methods, operators and classes of torch.nn that are one operator, its
parameters, what it does to shapes and memory, and what it returns. In-place forms (``add_`` and
``+=``) and Python's own methods (``__radd__``) follow. An operator that is not here is one nobody
looks into: `register` adds one from outside.

Given::

    register(elementwise("erfinv"))

Result: the rank and the channels of ``torch.erfinv(x)`` are those of x, its memory is its own, it
moves over chunk and concatenation like relu, and nobody misses it where nobody reads it.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Shape(Enum):
    """What an operator does to shapes. The rules are in `fxrep.analysis`."""

    UNKNOWN = auto()
    KEEPS = auto()  # the shape of the first operand
    KEEPS_RANK = auto()  # its rank only; nothing where `dim` is None
    BROADCASTS = auto()  # the common shape of all operands
    LAYER = auto()  # convolution and linear: channels from the weight
    TRANSPOSED_LAYER = auto()
    POOL = auto()  # the axes before the spatial ones stay
    NORM = auto()  # keeps the shape, and raises unless its vectors fit the channels
    INSTANCE_NORM = auto()
    LAYER_NORM = auto()
    PAD = auto()
    RESIZE = auto()
    PIXEL_SHUFFLE = auto()
    PIXEL_UNSHUFFLE = auto()
    CAT = auto()
    STACK = auto()
    PARTS = auto()  # a tuple of tensors along an axis
    UNBIND = auto()
    ITEM = auto()
    TRANSPOSE = auto()
    PERMUTE = auto()
    FLATTEN = auto()
    UNFLATTEN = auto()
    SIZES = auto()  # one given size for each axis of the result
    LIKE = auto()  # the shape of the second operand
    UNSQUEEZE = auto()
    SELECT = auto()
    REDUCE = auto()
    MATMUL = auto()  # all axes but the last two broadcast
    BATCHED_MATMUL = auto()  # all axes but the last two broadcast
    EINSUM = auto()
    EMBEDDING = auto()


class Memory(Enum):
    """What an operator does to memory."""

    FRESH = auto()  # the result has memory of its own
    VIEW = auto()  # the result may be the first operand, or a view of it
    DROPOUT = auto()  # like a view; out of training `inplace` means nothing
    UPDATES = auto()  # fresh; it may write statistics or tables that it is given
    WRITES = auto()  # it writes its first operand, which is the result
    UNKNOWN = auto()  # the result may share memory with every operand


class Result(Enum):
    """What an operator returns."""

    TENSOR = auto()
    SIZE = auto()  # an int or a torch.Size, taken from a shape
    NUMBER = auto()  # any other number of Python
    PARTS = auto()  # a tuple of tensors
    OTHER = auto()


class Reads(Enum):
    """What an operator reads of its operands."""

    VALUES = auto()
    SIZES = auto()
    KIND = auto()  # rank, dtype, device: the same for every value of a linear region
    LAYOUT = auto()  # strides


REQUIRED = object()


@dataclass(frozen=True)
class Parameter:
    """One parameter: its names, the first of which counts, and its default."""

    names: tuple[str, ...]
    default: Any = REQUIRED


@dataclass(frozen=True, eq=False)
class Op:
    """One operator.

    Attributes:
        names: its spellings. A name with a capital is a class of torch.nn; one with a dot is that
            function only (``F.unfold`` is no method, ``torch.ops.mylib.swish`` one of your own);
            any other is a function of torch, of torch.nn.functional and a method, where there is
            such.
        parameters: as in a `def`. Other names of one stand behind a bar (``dim|axis=0``), those of
            a module are its attributes; ``*size`` takes a sequence or its items; ``...`` at the
            end takes whatever else is given.
        spatial: how many spatial axes it has.
        elementwise: it does the same to each element of one tensor, whatever the others are.
    """

    names: str
    parameters: str = "input, ..."
    shape: Shape = Shape.UNKNOWN
    memory: Memory = Memory.FRESH
    result: Result = Result.TENSOR
    reads: Reads = Reads.VALUES
    spatial: int = 0
    elementwise: bool = False

    @functools.cached_property
    def name(self) -> str:
        """The name that stands for it, without a home."""
        return self.names.split()[0].rpartition(".")[2]

    @functools.cached_property
    def signature(self) -> Signature:
        """Its parameters, read."""
        return Signature.of(self.parameters)


@dataclass(frozen=True, eq=False)
class Signature:
    """The parameters of an operator.

    Attributes:
        parameters: in order.
        variadic: the last of `parameters` takes all positions that are left.
        open: arguments without a parameter are not an error.
    """

    parameters: tuple[Parameter, ...]
    variadic: bool
    open: bool

    @staticmethod
    def of(text: str) -> Signature:
        """Read ``input, dim|axis=0, *size, ...``; no default holds a comma."""
        found, variadic, is_open = [], False, False
        for part in (part.strip() for part in text.split(",")):
            if part == "...":
                is_open = True
                continue
            name, _, default = part.partition("=")
            variadic = variadic or name.startswith("*")
            value = ast.literal_eval(default) if default else () if name[0] == "*" else REQUIRED
            found.append(Parameter(tuple(name.lstrip("*").split("|")), value))
        return Signature(tuple(found), variadic, is_open)

    @functools.cached_property
    def by_name(self) -> dict[str, str]:
        """The name that counts, by each name."""
        return {name: p.names[0] for p in self.parameters for name in p.names}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of a call by name, defaults filled in; None where they do not fit.

        Those are forms of other overloads, and what an operator here does not take: `out=`.
        """
        parameters = self.parameters
        if self.variadic and len(args) >= len(parameters):
            rest = args[len(parameters) - 1 :]
            single = len(rest) == 1 and isinstance(rest[0], (tuple, list))
            args = (*args[: len(parameters) - 1], rest[0] if single else rest)
        if len(args) > len(parameters) and not self.open:
            return None
        found = {p.names[0]: value for p, value in zip(parameters, args, strict=False)}
        for key, value in kwargs.items():
            name = self.by_name.get(key)
            if (name is None and not self.open) or name in found:
                return None
            found[key if name is None else name] = value
        for p in parameters:
            if p.names[0] not in found:
                if p.default is REQUIRED:
                    return None
                found[p.names[0]] = p.default
        return found


@dataclass(frozen=True)
class Spelling:
    """An operator by one of its names."""

    op: Op
    in_place: bool = False


FUNCTIONS: dict[Any, Spelling] = {}
METHODS: dict[str, Spelling] = {}
CLASSES: dict[type[nn.Module], Op] = {}
ATTRIBUTES: dict[str, Op] = {}
OPS: dict[str, Op] = {}  # by the names of functions and methods

_HOMES = {"torch": torch, "F": F, "torch._C._nn": torch._C._nn, "torch.Tensor": torch.Tensor}
_ALL_HOMES = {**_HOMES, "operator": operator}

# Python's operators, by the name of the operator of torch that they call.
_OPERATORS = {
    "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "floordiv": "floor_divide",
    "mod": "remainder", "pow": "pow", "matmul": "matmul", "neg": "neg", "pos": "positive",
    "abs": "abs", "invert": "bitwise_not", "and_": "bitwise_and", "or_": "bitwise_or",
    "xor": "bitwise_xor", "lshift": "bitwise_left_shift", "rshift": "bitwise_right_shift",
    "eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge",
    "getitem": "getitem", "setitem": "setitem", "delitem": "delitem",
}  # fmt: skip


def register(op: Op) -> None:
    """Add an operator to the table; what its names meant before is forgotten.

    Raises:
        ValueError: none of its names is a function or method of torch, or a class of torch.nn.
    """
    if not _enter(op):
        raise ValueError(f"op.names={op.names!r}: torch has no function, method or module of these")


def _enter(op: Op) -> int:
    """Enter an operator under its names; how many things of torch they are."""
    found = 0
    for name in op.names.split():
        kind = getattr(nn, name, None) if name[0].isupper() else None
        if kind is not None:
            CLASSES[kind] = op
            found += 1
        else:
            found += _enter_call(op, name)
    return found


def _enter_call(op: Op, name: str) -> int:
    home, _, last = name.rpartition(".")
    spelling, in_place = Spelling(op), Spelling(op, in_place=True)
    found = 0
    for where in (_home(home),) if home else _HOMES.values():
        for spelt, meaning in ((last, spelling), (f"{last}_", in_place)):
            function = getattr(where, spelt, None)
            if callable(function) and not isinstance(function, type):
                found += 1
                packet = isinstance(function, torch._ops.OpOverloadPacket)
                overloads = [getattr(function, n) for n in function.overloads()] if packet else []
                for each in (function, *overloads):
                    if home or each not in _QUALIFIED:
                        FUNCTIONS[each] = meaning
                    if home:
                        _QUALIFIED.add(each)
    if not home or last not in OPS:
        OPS[last] = op
    if not home:
        for spelt, meaning in ((last, spelling), (f"{last}_", in_place)):
            if hasattr(torch.Tensor, spelt):
                METHODS[spelt] = meaning
    return found


def _home(name: str) -> Any:
    """Where a function lives: ``F``, ``torch.special``, ``torch.ops.mylib``; None if nowhere."""
    found = _ALL_HOMES.get(name)
    if found is not None:
        return found
    for part in name.removeprefix("torch.").split("."):
        found = getattr(torch if found is None else found, part, None)
    return found


# Functions that an entry names with their home: entries without one leave them alone.
_QUALIFIED: set[Any] = set()


def _enter_operators() -> None:
    """Python's operators, their in-place forms, and the methods behind both."""
    for name, meaning in _OPERATORS.items():
        op, plain = OPS[meaning], name.rstrip("_")
        writes = op.memory is Memory.WRITES
        FUNCTIONS[getattr(operator, name)] = Spelling(op, in_place=writes)
        METHODS[f"__{plain}__"] = Spelling(op, in_place=writes)
        if hasattr(operator, f"i{plain}") and not writes:
            FUNCTIONS[getattr(operator, f"i{plain}")] = Spelling(op, in_place=True)
            METHODS[f"__i{plain}__"] = Spelling(op, in_place=True)
    for name in ("add", "mul"):  # of these the order of operands does not matter
        METHODS[f"__r{name}__"] = Spelling(OPS[name])


def elementwise(names: str, parameters: str = "input, ...") -> Op:
    """An operator that does the same to each element of its first operand."""
    return Op(names, parameters, Shape.KEEPS, elementwise=True)


def by_rank(make: Callable[[int], Op]) -> list[Op]:
    """An operator with one, two and three spatial axes."""
    return [make(n) for n in (1, 2, 3)]


def _each(names: str, parameters: str = "input, ...", *how: Any, **more: Any) -> list[Op]:
    """Operators that differ in their names only; other spellings of one stand behind a colon."""
    return [Op(word.replace(":", " "), parameters, *how, **more) for word in names.split()]


# --- the table -----------------------------------------------------------------------------------

_ELEMENTWISE = (
    "abs:absolute neg:negative exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal "
    "sin cos tan asin:arcsin acos:arccos atan:arctan sinh cosh tanh:Tanh asinh:arcsinh "
    "acosh:arccosh atanh:arctanh erf erfc erfinv sigmoid:Sigmoid logit sign sgn round floor ceil "
    "trunc:fix frac deg2rad rad2deg relu:ReLU relu6:ReLU6 leaky_relu:LeakyReLU elu:ELU celu:CELU "
    "selu:SELU gelu:GELU silu:SiLU mish:Mish hardtanh:Hardtanh hardswish:Hardswish "
    "hardsigmoid:Hardsigmoid hardshrink:Hardshrink softshrink:Softshrink tanhshrink:Tanhshrink "
    "softplus:Softplus softsign:Softsign logsigmoid:LogSigmoid threshold:Threshold nan_to_num "
    "logical_not bitwise_not isnan isinf isfinite isneginf isposinf signbit angle sinc "
    "digamma lgamma"
)

_BROADCASTING = (
    "mul:multiply floor_divide remainder fmod pow float_power maximum minimum fmin fmax atan2 "
    "hypot xlogy logaddexp logaddexp2 copysign heaviside ldexp nextafter gcd lcm "
    "eq ne:not_equal lt:less le:less_equal gt:greater ge:greater_equal "
    "logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor "
    "bitwise_left_shift bitwise_right_shift clamp_min clamp_max"
)

_CONV = "input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1"
_CONV_T = "input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1"
_PADDED = "padding_mode='zeros'"
_NORM = (
    "input, running_mean, running_var, weight=None, bias=None, training|use_input_stats=False, "
    "momentum=0.1, eps=1e-5"
)
_TRACKED = "input, running_mean, running_var, weight, bias, training, momentum, eps"
_AVG_POOL = "input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True"
_MAX_POOL = (
    "input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False"
)
_INTERPOLATE = (
    "input, size=None, scale_factor=None, mode='nearest', align_corners=None, "
    "recompute_scale_factor=None, antialias=False"
)
_DROPOUT = "input, p=0.5, training=True, inplace=False"
_REDUCE = "input, dim|axis=None, keepdim|keepdims=False, dtype=None"

_LAYERS = [
    *by_rank(lambda n: Op(f"conv{n}d", _CONV, Shape.LAYER, spatial=n)),
    *by_rank(lambda n: Op(f"Conv{n}d", f"{_CONV}, {_PADDED}", Shape.LAYER, spatial=n)),
    *by_rank(lambda n: Op(f"conv_transpose{n}d ConvTranspose{n}d", _CONV_T,
                          Shape.TRANSPOSED_LAYER, spatial=n)),
    Op("linear Linear", "input, weight, bias=None", Shape.LAYER),
    Op("bilinear Bilinear"),
    Op("F.batch_norm BatchNorm1d SyncBatchNorm", _NORM, Shape.NORM, Memory.UPDATES),
    Op("torch.batch_norm", "input, weight, bias, running_mean, running_var, training, momentum, "
       "eps, cudnn_enabled", Shape.NORM, Memory.UPDATES),
    *(Op(f"BatchNorm{n}d", _TRACKED, Shape.NORM, Memory.UPDATES, spatial=n) for n in (2, 3)),
    Op("F.instance_norm", "input, running_mean=None, running_var=None, weight=None, bias=None, "
       "training|use_input_stats=True, momentum=0.1, eps=1e-5", Shape.KEEPS, Memory.UPDATES),
    Op("torch.instance_norm", "input, weight, bias, running_mean, running_var, "
       "training|use_input_stats, momentum, eps, cudnn_enabled", Shape.KEEPS, Memory.UPDATES),
    *by_rank(lambda n: Op(
        f"InstanceNorm{n}d", f"{_TRACKED}, num_features, affine, track_running_stats",
        Shape.INSTANCE_NORM, Memory.UPDATES, spatial=n)),
    Op("F.group_norm GroupNorm", "input, num_groups, weight=None, bias=None, eps=1e-5", Shape.NORM),
    Op("torch.group_norm", "input, num_groups, weight=None, bias=None, eps=1e-5, "
       "cudnn_enabled=True", Shape.NORM),
    Op("layer_norm LayerNorm rms_norm RMSNorm", "input, normalized_shape, ...", Shape.LAYER_NORM),
    Op("local_response_norm LocalResponseNorm CrossMapLRN2d", shape=Shape.KEEPS),
    Op("torch.embedding"),
    Op("F.embedding Embedding", "input, weight, padding_idx=None, max_norm=None, ...",
       Shape.EMBEDDING, Memory.UPDATES),
    Op("F.embedding_bag EmbeddingBag", "input, weight, offsets=None, max_norm=None, ...",
       memory=Memory.UPDATES),
    Op("prelu PReLU", "input, weight", Shape.KEEPS),
    Op("rrelu RReLU", "input, ...", Shape.KEEPS),
    *_each("dropout:Dropout dropout1d:Dropout1d dropout2d:Dropout2d dropout3d:Dropout3d",
           _DROPOUT, Shape.KEEPS, Memory.DROPOUT),
    *_each("alpha_dropout:AlphaDropout feature_alpha_dropout:FeatureAlphaDropout",
           "input, p=0.5, training=False, inplace=False", Shape.KEEPS, Memory.DROPOUT),
    *_each("torch.dropout torch.feature_dropout torch.alpha_dropout torch.feature_alpha_dropout",
           "input, p, training|train", Shape.KEEPS, Memory.DROPOUT),
]  # fmt: skip

_POOLS = [
    *(Op(f"avg_pool{n}d AvgPool{n}d", f"{_AVG_POOL}, divisor_override=None" if n > 1 else _AVG_POOL,
         Shape.POOL, spatial=n) for n in (1, 2, 3)),
    *by_rank(lambda n: Op(f"max_pool{n}d MaxPool{n}d", _MAX_POOL, Shape.POOL, spatial=n)),
    *by_rank(lambda n: Op(f"lp_pool{n}d LPPool{n}d", "input, norm_type, ...", Shape.POOL,
                          spatial=n)),
    *by_rank(lambda n: Op(f"adaptive_avg_pool{n}d AdaptiveAvgPool{n}d", "input, output_size",
                          Shape.POOL, spatial=n)),
    *by_rank(lambda n: Op(f"adaptive_max_pool{n}d AdaptiveMaxPool{n}d",
                          "input, output_size, return_indices=False", Shape.POOL, spatial=n)),
    *_each("max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
           "adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices",
           result=Result.OTHER),
    *_each("fractional_max_pool2d:FractionalMaxPool2d fractional_max_pool3d:FractionalMaxPool3d",
           result=Result.OTHER),
    *_each("max_unpool1d:MaxUnpool1d max_unpool2d:MaxUnpool2d max_unpool3d:MaxUnpool3d", "input, "
           "...", Shape.KEEPS_RANK),
    Op("pad torch._C._nn.pad", "input, pad, mode='constant', value=None", Shape.PAD),
    Op("constant_pad_nd", "input, pad, value=0", Shape.PAD),
    *(Op(" ".join(f"{kind}Pad{n}d" for n in (1, 2, 3)), f"input, pad|padding, mode='{mode}', "
         "value=None", Shape.PAD) for kind, mode in (
        ("Zero", "constant"), ("Constant", "constant"), ("Reflection", "reflect"),
        ("Replication", "replicate"), ("Circular", "circular"))),
    Op("interpolate upsample Upsample UpsamplingNearest2d UpsamplingBilinear2d", _INTERPOLATE,
       Shape.RESIZE),
    *_each("upsample_nearest upsample_bilinear grid_sample affine_grid"),
    Op("pixel_shuffle PixelShuffle", "input, upscale_factor", Shape.PIXEL_SHUFFLE, Memory.VIEW),
    Op("pixel_unshuffle PixelUnshuffle", "input, downscale_factor", Shape.PIXEL_UNSHUFFLE,
       Memory.VIEW),
    Op("channel_shuffle native_channel_shuffle ChannelShuffle", "input, groups", Shape.KEEPS,
       Memory.VIEW),
]  # fmt: skip

_ARITHMETIC = [
    *map(elementwise, (word.replace(":", " ") for word in _ELEMENTWISE.split())),
    *_each(_BROADCASTING, "input, other", Shape.BROADCASTS),
    Op("add", "input, other, alpha=1", Shape.BROADCASTS),
    Op("sub subtract", "input, other, alpha=1", Shape.BROADCASTS),
    Op("rsub __rsub__", "input, other, alpha=1", Shape.BROADCASTS),
    Op("div divide true_divide", "input, other, rounding_mode=None", Shape.BROADCASTS),
    *_each("__rtruediv__ __rfloordiv__ __rmod__ __rpow__", "input, other", Shape.BROADCASTS),
    Op("where", "condition, input, other", Shape.BROADCASTS),
    Op("clamp clip", "input, min=None, max=None", Shape.BROADCASTS),
    Op("lerp", "input, end, weight", Shape.BROADCASTS),
    *_each("addcmul addcdiv", "input, tensor1, tensor2, value=1", Shape.BROADCASTS),
    Op("masked_fill", "input, mask, value", Shape.BROADCASTS),
    Op("masked_scatter", "input, mask, source", Shape.BROADCASTS),
    *_each("softmax:Softmax:Softmax2d log_softmax:LogSoftmax softmin:Softmin gumbel_softmax "
           "normalize cumsum cumprod roll flip argsort tril triu scatter scatter_add index_add "
           "index_copy index_fill index_put renorm", "input, ...", Shape.KEEPS),
    Op("glu GLU", "input, dim=-1", Shape.KEEPS_RANK),
    Op("index_select", "input, dim, index", Shape.KEEPS_RANK),
    Op("repeat_interleave", "input, repeats, dim=None, output_size=None", Shape.KEEPS_RANK),
    Op("gather", "input, dim, other|index, sparse_grad=False", Shape.LIKE),
    Op("scaled_dot_product_attention", "input|query, key, value, ...", Shape.MATMUL),
    *_each("mean nanmean sum nansum prod argmax argmin all any logsumexp amax amin count_nonzero",
           _REDUCE, Shape.REDUCE),
    *_each("std var", "input, dim|axis=None, unbiased=True, keepdim|keepdims=False, correction=1",
           Shape.REDUCE),
    Op("norm", "input, p='fro', dim=None, keepdim=False, dtype=None", Shape.REDUCE),
    Op("matmul __matmul__ __rmatmul__", "input, other", Shape.MATMUL),
    Op("bmm", "input, mat2", Shape.BATCHED_MATMUL),
    Op("einsum", "equation, *operands", Shape.EINSUM, Memory.UNKNOWN),
    *_each("mm mv dot addmm addbmm baddbmm addmv outer cdist take masked_select one_hot "
           "cosine_similarity:CosineSimilarity pairwise_distance:PairwiseDistance"),
    *_each("max min sort topk median mode kthvalue cummax cummin aminmax std_mean var_mean nonzero "
           "unique unique_consecutive", result=Result.OTHER),
]  # fmt: skip

_STRUCTURE = [
    Op("cat concat concatenate", "tensors, dim|axis=0", Shape.CAT),
    Op("stack", "tensors, dim=0", Shape.STACK),
    *_each("hstack vstack dstack", "tensors"),
    Op("chunk unsafe_chunk", "input, sections|chunks, dim=0", Shape.PARTS, Memory.VIEW,
       Result.PARTS),
    Op("split unsafe_split",
       "input, sections|split_size_or_sections|split_size, dim=0",
       Shape.PARTS, Memory.VIEW, Result.PARTS),
    Op("split_with_sizes unsafe_split_with_sizes", "input, sections|split_sizes, dim=0",
       Shape.PARTS, Memory.VIEW, Result.PARTS),
    Op("tensor_split", "input, sections|indices_or_sections|tensor_indices_or_sections|indices, "
       "dim=0", Shape.PARTS, Memory.VIEW, Result.PARTS),
    *_each("hsplit vsplit dsplit", "input, sections|indices", memory=Memory.VIEW,
           result=Result.PARTS),
    Op("unbind", "input, dim=0", Shape.UNBIND, Memory.VIEW, Result.PARTS),
    Op("operator.getitem", "input, key", Shape.ITEM, Memory.VIEW),
    Op("narrow", "input, dim, start, length", Shape.KEEPS_RANK, Memory.VIEW),
    *_each("slice diagonal unfold as_strided squeeze", memory=Memory.VIEW),
    Op("flatten Flatten", "input, start_dim=0, end_dim=-1", Shape.FLATTEN, Memory.VIEW),
    Op("unflatten Unflatten", "input, dim, sizes|unflattened_size", Shape.UNFLATTEN, Memory.VIEW),
    *_each("view expand", "input, *size", Shape.SIZES, Memory.VIEW),
    Op("reshape", "input, *size|shape", Shape.SIZES, Memory.VIEW),
    Op("broadcast_to", "input, size", Shape.SIZES, Memory.VIEW),
    Op("repeat", "input, *size|repeats", Shape.SIZES),
    Op("permute", "input, *dims", Shape.PERMUTE, Memory.VIEW),
    Op("torch.permute", "input, dims", Shape.PERMUTE, Memory.VIEW),
    *_each("view_as:reshape_as expand_as", "input, other", Shape.LIKE, Memory.VIEW),
    Op("unsqueeze", "input, dim", Shape.UNSQUEEZE, Memory.VIEW),
    Op("select", "input, dim, index", Shape.SELECT, Memory.VIEW),
    Op("transpose swapaxes swapdims", "input, dim0|axis0, dim1|axis1", Shape.TRANSPOSE,
       Memory.VIEW),
    *_each("t adjoint movedim moveaxis", "input, ...", Shape.KEEPS_RANK, Memory.VIEW),
    *_each("ravel numpy_T", memory=Memory.VIEW),
    Op("F.unfold Unfold"),
    Op("fold Fold"),
]  # fmt: skip

_COPIES = [
    Op("contiguous", "input, memory_format=None", Shape.KEEPS, Memory.VIEW),
    Op("Identity", "input", Shape.KEEPS, Memory.VIEW),
    *_each("to type_as float double half bfloat16 int long bool cpu cuda positive conj "
           "resolve_conj resolve_neg detach requires_grad alias", "input, ...", Shape.KEEPS,
           Memory.VIEW),
    *_each("real imag", memory=Memory.VIEW),
    Op("type", "input, dtype, ...", Shape.KEEPS, Memory.VIEW),
    *_each("clone zeros_like ones_like full_like empty_like rand_like randn_like fill zero copy",
           "input, ...", Shape.KEEPS),
    *_each("new_zeros new_ones new_full new_empty new_tensor zeros ones full empty rand randn "
           "arange linspace eye tensor"),
    *_each("item is_tensor", result=Result.NUMBER),
    *_each("tolist _assert", result=Result.OTHER),
    *_each("operator.setitem operator.delitem", memory=Memory.WRITES, result=Result.OTHER),
    *_each("binary_cross_entropy:BCELoss binary_cross_entropy_with_logits:BCEWithLogitsLoss "
           "cosine_embedding_loss:CosineEmbeddingLoss cross_entropy:CrossEntropyLoss "
           "ctc_loss:CTCLoss gaussian_nll_loss:GaussianNLLLoss "
           "hinge_embedding_loss:HingeEmbeddingLoss huber_loss:HuberLoss kl_div:KLDivLoss "
           "l1_loss:L1Loss margin_ranking_loss:MarginRankingLoss mse_loss:MSELoss "
           "multi_margin_loss:MultiMarginLoss multilabel_margin_loss:MultiLabelMarginLoss "
           "multilabel_soft_margin_loss:MultiLabelSoftMarginLoss nll_loss:NLLLoss:NLLLoss2d "
           "poisson_nll_loss:PoissonNLLLoss smooth_l1_loss:SmoothL1Loss "
           "soft_margin_loss:SoftMarginLoss triplet_margin_loss:TripletMarginLoss "
           "triplet_margin_with_distance_loss:TripletMarginWithDistanceLoss"),
    *_each("AdaptiveLogSoftmaxWithLoss RNN LSTM GRU LSTMCell", result=Result.OTHER),
    *_each("RNNCell GRUCell"),
]  # fmt: skip

_METADATA = [
    Op("size", "input, dim=None", result=Result.SIZE, reads=Reads.SIZES),
    *_each("numel:nelement", "input", result=Result.SIZE, reads=Reads.SIZES),
    *_each("dim:ndimension", "input", result=Result.SIZE, reads=Reads.KIND),
    *_each("is_floating_point is_complex is_signed element_size get_device", result=Result.NUMBER,
           reads=Reads.KIND),
    *_each("stride is_contiguous", result=Result.NUMBER, reads=Reads.LAYOUT),
]  # fmt: skip

for _op in (*_LAYERS, *_POOLS, *_ARITHMETIC, *_STRUCTURE, *_COPIES, *_METADATA):
    _enter(_op)

_enter_operators()

ATTRIBUTES.update(
    {
        "shape": Op("shape", result=Result.SIZE, reads=Reads.SIZES),
        "ndim": Op("ndim", result=Result.SIZE, reads=Reads.KIND),
        "nbytes": Op("nbytes", result=Result.NUMBER, reads=Reads.SIZES),
        **{
            name: Op(name, result=Result.OTHER, reads=Reads.KIND)
            for name in (
                "dtype", "device", "layout", "is_cuda", "requires_grad", "is_sparse",
                "is_quantized", "itemsize",
            )
        },
        **{
            name: Op(name, "input, name", Shape.KEEPS, Memory.VIEW)
            for name in ("data", "real", "imag")
        },
        **{
            name: Op(name, "input, name", Shape.KEEPS_RANK, Memory.VIEW)
            for name in ("T", "mT", "H", "mH")
        },
    }
)  # fmt: skip
