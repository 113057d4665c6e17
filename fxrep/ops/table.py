"""The operators of torch: one entry for each, however it is spelt.

An entry has the names and the parameters of an operator, what it does to shapes and memory, and
what it returns (`fxrep.ops.op`). In-place forms (``add_`` and ``+=``) and Python's own methods
(``__radd__``) follow from it. Of an operator without an entry nothing is known;
`fxrep.ops.spellings.register` adds an entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxrep.ops.op import Dtype, Memory, Op, Reads, Result, Shape


def elementwise(names: str, parameters: str = "input, ...", *, dtype: Dtype = Dtype.FLOATS) -> Op:
    """An operator that does the same to each element of its first operand.

    Args:
        names: its spellings, separated by spaces; see `Op`.
        parameters: as in a `def`; see `Op`.
        dtype: how the dtype of the result follows from the operand's.
    """
    return Op(names, parameters, Shape.KEEPS, dtype=dtype, elementwise=True)


def by_rank(make: Callable[[int], Op]) -> list[Op]:
    """An operator with one, two and three spatial axes."""
    return [make(n) for n in (1, 2, 3)]


def _each(names: str, parameters: str = "input, ...", *how: Any, **more: Any) -> list[Op]:
    """Operators that differ in their names only; a colon separates the spellings of an operator."""
    return [Op(word.replace(":", " "), parameters, *how, **more) for word in names.split()]


_ELEMENTWISE = (
    "exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal "
    "sin cos tan asin:arcsin acos:arccos atan:arctan sinh cosh tanh:Tanh asinh:arcsinh "
    "acosh:arccosh atanh:arctanh erf erfc erfinv sigmoid:Sigmoid logit "
    "deg2rad rad2deg leaky_relu:LeakyReLU elu:ELU celu:CELU "
    "selu:SELU gelu:GELU silu:SiLU mish:Mish hardswish:Hardswish "
    "hardsigmoid:Hardsigmoid hardshrink:Hardshrink softshrink:Softshrink tanhshrink:Tanhshrink "
    "softplus:Softplus softsign:Softsign logsigmoid:LogSigmoid angle sinc digamma lgamma"
)

# Element by element too, and integers stay integers.
_KEEPING = (
    "abs:absolute neg:negative square sign sgn round floor ceil trunc:fix frac relu:ReLU "
    "relu6:ReLU6 hardtanh:Hardtanh threshold:Threshold nan_to_num bitwise_not"
)

# Element by element too, with an answer for each.
_ASKING = "logical_not isnan isinf isfinite isneginf isposinf isreal signbit"

_BROADCASTING = (
    "mul:multiply floor_divide remainder fmod pow maximum minimum fmin fmax copysign "
    "ldexp gcd lcm bitwise_and bitwise_or bitwise_xor "
    "bitwise_left_shift bitwise_right_shift clamp_min clamp_max heaviside"
)

# Of these the result is floating point, whatever the operands are.
_BROADCASTING_FLOATS = "float_power atan2 hypot xlogy logaddexp logaddexp2 nextafter"

_COMPARING = (
    "eq ne:not_equal lt:less le:less_equal gt:greater ge:greater_equal "
    "logical_and logical_or logical_xor isclose"
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
    *by_rank(lambda n: Op(f"conv{n}d", _CONV, Shape.LAYER, spatial=n, dtype=Dtype.WEIGHT)),
    *by_rank(lambda n: Op(f"Conv{n}d", f"{_CONV}, {_PADDED}", Shape.LAYER, spatial=n,
                          dtype=Dtype.WEIGHT)),
    *by_rank(lambda n: Op(f"conv_transpose{n}d ConvTranspose{n}d", _CONV_T,
                          Shape.TRANSPOSED_LAYER, spatial=n, dtype=Dtype.WEIGHT)),
    Op("linear Linear", "input, weight, bias=None", Shape.LAYER, dtype=Dtype.WEIGHT),
    Op("bilinear Bilinear"),
    Op("F.batch_norm BatchNorm1d SyncBatchNorm", _NORM, Shape.NORM, Memory.UPDATES,
       dtype=Dtype.FLOATS),
    Op("torch.batch_norm", "input, weight, bias, running_mean, running_var, training, momentum, "
       "eps, cudnn_enabled", Shape.NORM, Memory.UPDATES, dtype=Dtype.FLOATS),
    *(Op(f"BatchNorm{n}d", _TRACKED, Shape.NORM, Memory.UPDATES, spatial=n, dtype=Dtype.FLOATS)
      for n in (2, 3)),
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
         Shape.POOL, spatial=n, dtype=Dtype.FLOATS) for n in (1, 2, 3)),
    *by_rank(lambda n: Op(f"max_pool{n}d MaxPool{n}d", _MAX_POOL, Shape.POOL, spatial=n,
                          dtype=Dtype.KEEPS)),
    *by_rank(lambda n: Op(f"lp_pool{n}d LPPool{n}d", "input, norm_type, ...", Shape.POOL,
                          spatial=n)),
    *by_rank(lambda n: Op(f"adaptive_avg_pool{n}d AdaptiveAvgPool{n}d", "input, output_size",
                          Shape.POOL, spatial=n, dtype=Dtype.FLOATS)),
    *by_rank(lambda n: Op(f"adaptive_max_pool{n}d AdaptiveMaxPool{n}d",
                          "input, output_size, return_indices=False", Shape.POOL, spatial=n,
                          dtype=Dtype.KEEPS)),
    *_each("max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
           "adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices",
           result=Result.OTHER, dtype=Dtype.INDICES),
    *_each("fractional_max_pool2d:FractionalMaxPool2d fractional_max_pool3d:FractionalMaxPool3d",
           result=Result.OTHER),
    *_each("max_unpool1d:MaxUnpool1d max_unpool2d:MaxUnpool2d max_unpool3d:MaxUnpool3d", "input, "
           "...", Shape.KEEPS_RANK),
    Op("pad torch._C._nn.pad", "input, pad, mode='constant', value=None", Shape.PAD,
       dtype=Dtype.KEEPS),
    Op("constant_pad_nd", "input, pad, value=0", Shape.PAD, dtype=Dtype.KEEPS),
    *(Op(" ".join(f"{kind}Pad{n}d" for n in (1, 2, 3)), f"input, pad|padding, mode='{mode}', "
         "value=None", Shape.PAD, dtype=Dtype.KEEPS) for kind, mode in (
        ("Zero", "constant"), ("Constant", "constant"), ("Reflection", "reflect"),
        ("Replication", "replicate"), ("Circular", "circular"))),
    Op("interpolate upsample Upsample UpsamplingNearest2d UpsamplingBilinear2d", _INTERPOLATE,
       Shape.RESIZE, dtype=Dtype.KEEPS),
    *_each("upsample_nearest upsample_bilinear grid_sample affine_grid"),
    Op("pixel_shuffle PixelShuffle", "input, upscale_factor", Shape.PIXEL_SHUFFLE, Memory.VIEW),
    Op("pixel_unshuffle PixelUnshuffle", "input, downscale_factor", Shape.PIXEL_UNSHUFFLE,
       Memory.VIEW),
    Op("channel_shuffle native_channel_shuffle ChannelShuffle", "input, groups", Shape.KEEPS,
       Memory.VIEW),
]  # fmt: skip

_ARITHMETIC = [
    *(elementwise(word.replace(":", " "), dtype=dtype)
      for words, dtype in ((_ELEMENTWISE, Dtype.FLOATS), (_KEEPING, Dtype.KEEPS),
                           (_ASKING, Dtype.INTEGRAL))
      for word in words.split()),
    *_each(_BROADCASTING, "input, other", Shape.BROADCASTS, dtype=Dtype.PROMOTES),
    *_each(_BROADCASTING_FLOATS, "input, other", Shape.BROADCASTS),
    *_each(_COMPARING, "input, other, ...", Shape.BROADCASTS, dtype=Dtype.INTEGRAL),
    Op("add", "input, other, alpha=1", Shape.BROADCASTS, dtype=Dtype.PROMOTES),
    Op("sub subtract", "input, other, alpha=1", Shape.BROADCASTS, dtype=Dtype.PROMOTES),
    Op("rsub __rsub__", "input, other, alpha=1", Shape.BROADCASTS, dtype=Dtype.PROMOTES),
    Op("div divide true_divide", "input, other, rounding_mode=None", Shape.BROADCASTS,
       dtype=Dtype.FLOATS),
    Op("__rtruediv__", "input, other", Shape.BROADCASTS),
    *_each("__rfloordiv__ __rmod__ __rpow__", "input, other", Shape.BROADCASTS,
           dtype=Dtype.PROMOTES),
    Op("where", "condition, input, other", Shape.BROADCASTS, dtype=Dtype.PROMOTES),
    Op("clamp clip", "input, min=None, max=None", Shape.BROADCASTS, dtype=Dtype.PROMOTES),
    Op("lerp", "input, end, weight", Shape.BROADCASTS),
    Op("addcmul", "input, tensor1, tensor2, value=1", Shape.BROADCASTS, dtype=Dtype.PROMOTES),
    Op("addcdiv", "input, tensor1, tensor2, value=1", Shape.BROADCASTS),
    Op("masked_fill", "input, mask, value", Shape.BROADCASTS, dtype=Dtype.KEEPS),
    Op("masked_scatter", "input, mask, source", dtype=Dtype.KEEPS),
    *_each("softmax:Softmax:Softmax2d log_softmax:LogSoftmax softmin:Softmin gumbel_softmax "
           "normalize", "input, ...", Shape.KEEPS, dtype=Dtype.FLOATS),
    *_each("cumsum cumprod roll flip tril triu scatter scatter_add index_add "
           "index_copy index_fill index_put renorm", "input, ...", Shape.KEEPS,
           dtype=Dtype.KEEPS),
    *_each("argsort bucketize", "input, ...", Shape.KEEPS, dtype=Dtype.INTEGRAL),
    *_each("isin searchsorted tril_indices triu_indices argwhere multinomial "
           "nonzero_static", dtype=Dtype.INTEGRAL),
    Op("glu GLU", "input, dim=-1", Shape.KEEPS_RANK),
    Op("index_select", "input, dim, index", Shape.KEEPS_RANK, dtype=Dtype.KEEPS),
    Op("repeat_interleave", "input, repeats, dim=None, output_size=None", Shape.KEEPS_RANK,
       dtype=Dtype.KEEPS),
    Op("gather", "input, dim, other|index, sparse_grad=False", Shape.LIKE, dtype=Dtype.KEEPS),
    Op("scaled_dot_product_attention", "input|query, key, value, ...", Shape.ATTENTION),
    *_each("mean nanmean logsumexp", _REDUCE, Shape.REDUCE, dtype=Dtype.FLOATS),
    *_each("sum nansum prod amax amin", _REDUCE, Shape.REDUCE, dtype=Dtype.KEEPS),
    *_each("argmax argmin all any count_nonzero", _REDUCE, Shape.REDUCE, dtype=Dtype.INTEGRAL),
    *_each("std var", "input, dim|axis=None, unbiased=True, keepdim|keepdims=False, correction=1",
           Shape.REDUCE),
    Op("norm", "input, p='fro', dim=None, keepdim=False, dtype=None", Shape.REDUCE),
    Op("matmul __matmul__ __rmatmul__", "input, other", Shape.MATMUL, dtype=Dtype.PROMOTES),
    Op("bmm", "input, mat2", Shape.BATCHED_MATMUL, dtype=Dtype.PROMOTES),
    Op("einsum", "equation, *operands", Shape.EINSUM, Memory.UNKNOWN, dtype=Dtype.PROMOTES),
    *_each("mm mv dot addmm addbmm baddbmm addmv outer", dtype=Dtype.PROMOTES),
    *_each("take masked_select", dtype=Dtype.KEEPS),
    *_each("cdist cosine_similarity:CosineSimilarity pairwise_distance:PairwiseDistance"),
    Op("one_hot", dtype=Dtype.INTEGRAL),
    *_each("max min sort topk median nanmedian mode kthvalue cummax cummin", result=Result.OTHER,
           dtype=Dtype.INDICES),
    *_each("aminmax std_mean var_mean", result=Result.OTHER),
    Op("nonzero", result=Result.OTHER, dtype=Dtype.INTEGRAL),
    *_each("unique unique_consecutive", result=Result.OTHER, dtype=Dtype.KEEPS),
]  # fmt: skip

_STRUCTURE = [
    Op("cat concat concatenate", "tensors, dim|axis=0", Shape.CAT, dtype=Dtype.PROMOTES),
    Op("stack", "tensors, dim=0", Shape.STACK, dtype=Dtype.PROMOTES),
    *_each("hstack vstack dstack", "tensors", dtype=Dtype.PROMOTES),
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
    Op("repeat", "input, *size|repeats", Shape.SIZES, dtype=Dtype.KEEPS),
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
    *_each("to type_as float double half bfloat16 int long short char byte bool cpu cuda positive "
           "conj resolve_conj resolve_neg detach requires_grad alias", "input, ...", Shape.KEEPS,
           Memory.VIEW),
    *_each("real imag", memory=Memory.VIEW),
    Op("type", "input, dtype, ...", Shape.KEEPS, Memory.VIEW),
    *_each("clone zeros_like ones_like full_like empty_like rand_like randn_like fill zero copy",
           "input, ...", Shape.KEEPS, dtype=Dtype.KEEPS),
    *_each("new_zeros new_ones new_full new_empty", dtype=Dtype.KEEPS),
    *_each("full arange", dtype=Dtype.PROMOTES),
    *_each("new_tensor zeros ones empty rand randn linspace eye tensor"),
    *_each("randint randperm", dtype=Dtype.INTEGRAL),
    *_each("item is_tensor", result=Result.NUMBER),
    *_each("tolist _assert", result=Result.OTHER),
    *_each("operator.setitem operator.delitem", memory=Memory.WRITES, result=Result.OTHER),
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

TABLE = (*_LAYERS, *_POOLS, *_ARITHMETIC, *_STRUCTURE, *_COPIES, *_METADATA)

# Attributes of a tensor.
ATTRIBUTES: dict[str, Op] = {
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
}  # fmt: skip
