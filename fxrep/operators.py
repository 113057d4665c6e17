"""What a node computes: one view of every spelling that names a linear operation.

`View.read` says of a node that it is ``sum_i map_i(operand_i) + bias`` (an `Affine`), why it is
not although it looks like it (a `Refusal`), or nothing. Modules, subclasses that keep the
forward, functions, methods, operators and in-place forms all end in the same few readers, so a
rule never sees how a thing was spelt.
"""

from __future__ import annotations

import inspect
import numbers
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxrep import kernels
from fxrep.aliasing import Aliasing
from fxrep.geometry import IDENTITY, Axis, Diagonal, Linear, Refusal, compose, conv_map
from fxrep.ranks import Ranks
from fxrep.recipe import Call, Expr, Load
from fxrep.skeleton import foreign_hooks, weight_hooks


@dataclass(frozen=True, eq=False)
class Term:
    """One summand: a map of the value of `operand`; weight None stands for ones."""

    operand: fx.Node
    map: Linear
    weight: Expr | None = None


@dataclass(frozen=True, eq=False)
class Affine:
    """A node's value as ``sum_i map_i(operand_i) + bias``.

    Attributes:
        kind: the operation in the field's words, as the report shows it.
        relies: values whose batched rank is assumed and must be guarded if this is used.
        promotes: dtypes of constants that would promote the result.
        proves: it raises unless its operand has the channels of its map.
        weight: the weight tensor of a convolution or linear layer.
        owner: what shares the weight if two layers do.
        inside: nodes between it and its operands that are part of this one operation.
    """

    kind: str
    terms: tuple[Term, ...]
    bias: Expr | None = None
    relies: tuple[fx.Node, ...] = ()
    promotes: tuple[torch.dtype, ...] = ()
    proves: bool = True
    weight: Tensor | None = None
    owner: object = None
    inside: tuple[fx.Node, ...] = ()


Reading = Affine | Refusal | None


@dataclass(frozen=True, eq=False)
class Constant:
    """A number or a tensor of the model, and the expression that recomputes it."""

    value: Tensor | float
    expr: Expr
    owner: object = None  # what is shared if it is: the tensor, or the module that computes it

    @property
    def shape(self) -> torch.Size:
        """Its shape; a number has none."""
        return self.value.shape if isinstance(self.value, Tensor) else torch.Size()


@dataclass(eq=False)
class View:
    """One traced graph and what is known of it."""

    graph: fx.Graph
    module: nn.Module
    aliasing: Aliasing
    ranks: Ranks
    derived: dict[str, Expr] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    readings: dict[fx.Node, Reading] = field(default_factory=dict)
    constants: dict[fx.Node, bool] = field(default_factory=dict)
    submodules: dict[str, nn.Module] = field(default_factory=dict)
    trained: set[int] = field(default_factory=set)  # ids of constants made from trained parameters

    def read(self, node: fx.Node) -> Reading:
        """What `node` computes, if it is linear in its operands."""
        if node not in self.readings:
            self.readings[node] = self._read(node)
        return self.readings[node]

    def forget(self, *nodes: fx.Node) -> None:
        """Read these again: what they are computed from has been replaced."""
        for node in nodes:
            self.readings.pop(node, None)

    def _read(self, node: fx.Node) -> Reading:
        reading = _dispatch(self, node)
        if isinstance(reading, Affine) and not self.aliasing.pure(node):
            return Refusal("it writes in place a value that others still read")
        return reading

    def submodule(self, path: str) -> nn.Module:
        """The module at a path below the traced one."""
        if path not in self.submodules:
            self.submodules[path] = self.module.get_submodule(path)
        return self.submodules[path]

    def tensor(self, path: str) -> Tensor:
        """The tensor at a path below the traced module."""
        owner, _, name = path.rpartition(".")
        value = getattr(self.submodule(owner), name)
        assert isinstance(value, Tensor)
        return value

    def constant(self, arg: Any) -> Constant | None:
        """`arg` as a constant: a number, or a parameter, buffer or attribute never written."""
        if isinstance(arg, numbers.Real) and not isinstance(arg, bool):
            try:
                return Constant(float(arg), Call(_number, (float(arg),)))
            except OverflowError:  # an int that no float holds
                return None
        if isinstance(arg, fx.Node) and arg.op == "get_attr":
            path = str(arg.target)
            if self.aliasing.writes_attribute(arg):
                return None
            try:
                return self.stored(path)
            except (AttributeError, AssertionError):
                return None
        return None

    def stored(self, path: str) -> Constant:
        """The tensor at a path as a constant.

        What fxrep made itself is expressed by the tensors it was made from, so that however many
        rewrites follow each other the weight is rounded once.
        """
        tensor = self.tensor(path)
        if path in self.derived:
            return Constant(tensor, self.derived[path], tensor)
        self.originals.setdefault(path, tensor)
        return Constant(tensor, Load(path), tensor)

    def attribute(self, module: nn.Module, path: str, name: str) -> Constant | None:
        """A tensor of a leaf module, which torch's own hooks or parametrizations may compute."""
        if getattr(module, name) is None:
            return None
        if name in module._parameters or name in module._buffers:
            return self.stored(f"{path}.{name}")
        parts = [n for n, _ in (*module.named_parameters(), *module.named_buffers())]
        loads = [self.stored(f"{path}.{part}").expr for part in parts]
        expr = Call(_computed, (module, name, tuple(parts), *loads))
        return Constant(_Computed(module, name)().detach(), expr, module)

    def reads(self, node: fx.Node) -> list[Tensor]:
        """The tensors of the model that this very node reads."""
        if node.op == "call_module":
            module = self.submodule(str(node.target))
            return [*module.parameters(), *module.buffers()]
        found = []
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                constant = self.constant(source)
                if constant is not None and isinstance(constant.value, Tensor):
                    found.append(constant.value)
        return found

    def rank(self, node: fx.Node) -> tuple[int | None, bool]:
        """The rank of a value, and whether that is an assumption to be guarded."""
        proven = self.ranks.rank(node)
        if proven is not None:
            return proven, False
        return self.ranks.assumed(node), True


class _Computed(nn.Module):
    """Gives a tensor that a module computes from its parameters at each call."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module = module
        self.name = name

    def forward(self) -> Tensor:
        """The tensor, recomputed."""
        for hook in weight_hooks(self.module):
            hook(self.module, None)  # torch's own: sets the weight from its parts
        value = getattr(self.module, self.name)
        assert isinstance(value, Tensor)
        return value


def _computed(module: nn.Module, name: str, parts: tuple[str, ...], *tensors: Tensor) -> Tensor:
    """The same from other parameters; the module is left as it was."""
    given = {f"module.{part}": tensor for part, tensor in zip(parts, tensors, strict=True)}
    computed = _Computed(module, name)
    value = torch.func.functional_call(computed, given, ())
    computed()
    assert isinstance(value, Tensor)
    return value


METADATA = frozenset({"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"})
METADATA_METHODS = frozenset({"size", "dim", "ndimension", "is_floating_point"})


def reads_metadata(node: fx.Node) -> bool:
    """Whether a node reads only the shape, dtype or device of its operand."""
    if node.op == "call_function":
        return node.target is getattr and node.args[1] in METADATA
    return node.op == "call_method" and node.target in METADATA_METHODS


_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


def writes(node: fx.Node) -> bool:
    """Whether an operation writes its result over its first operand, and so keeps its dtype."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return node.target in _IN_PLACE


def scope(node: fx.Node) -> str:
    """The path of the module whose forward made the node; '' for the traced module itself."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _flatten(value: Tensor) -> Tensor:
    value = value.double()  # an integer constant too: 1/3 is not a float32
    return value.reshape(()) if value.numel() == 1 else value.reshape(-1)


def _reciprocal(value: Tensor) -> Tensor:
    return value.reciprocal()


def _negative(value: Tensor) -> Tensor:
    return -value


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a * b


# --- readers: what remains when the spelling is gone ---------------------------------------


def _convolution(
    view: View,
    node: fx.Node,
    source: Any,
    weight: Constant | None,
    bias: Constant | None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    output_padding: Any = 0,
    transposed: bool = False,
    padding_mode: str = "zeros",
    rank: int,
) -> Reading:
    """``conv(source)``: weight (O, I/g, *k), or (I, O/g, *k) transposed."""
    if not isinstance(source, fx.Node) or weight is None:
        return None
    value = weight.value
    assert isinstance(value, Tensor)
    if not value.is_floating_point() or type(value) not in _PLAIN_TENSORS:
        return Refusal(f"its weight is a {type(value).__name__} of dtype {value.dtype}")
    spatial, kernel = rank, value.shape[2:]
    axes = []
    strides, dilations = _tuple(stride, spatial), _tuple(dilation, spatial)
    extra = _tuple(output_padding, spatial)
    if strides is None or dilations is None or extra is None or len(kernel) != spatial:
        return None
    for i, k in enumerate(kernel):
        if padding == "same":
            total = dilations[i] * (k - 1)
            low, high = total // 2, total - total // 2
        else:
            sizes = _tuple(0 if padding == "valid" else padding, spatial)
            if sizes is None:
                return None
            low, high = sizes[i], sizes[i] - extra[i]
        axes.append(Axis(k, strides[i], low, high, dilations[i]))
    shape = conv_map(
        outputs=value.shape[1] * groups if transposed else value.shape[0],
        inputs=value.shape[0] if transposed else value.shape[1] * groups,
        groups=groups,
        axes=axes,
        transposed=transposed,
        padding_mode=padding_mode,
    )
    expr = Call(kernels.from_convolution, (weight.expr, groups, transposed))
    kind = f"conv_transpose{rank}d" if transposed else f"conv{rank}d" if rank else "linear"
    term = Term(source, shape, expr)
    return Affine(
        kind, (term,), None if bias is None else bias.expr, weight=value, owner=weight.owner
    )


def _batchnorm(
    view: View,
    node: fx.Node,
    source: Any,
    mean: Constant | None,
    variance: Constant | None,
    weight: Constant | None,
    bias: Constant | None,
    eps: Any,
    axis: int | None = None,
    kind: str = "batch_norm",
) -> Reading:
    """``(source - mean) / sqrt(variance + eps) * weight + bias``, statistics (C,)."""
    if not isinstance(source, fx.Node):
        return None
    if mean is None or variance is None:
        return Refusal("BatchNorm uses batch statistics: it keeps no running ones")
    if not isinstance(eps, (int, float)):
        return None
    relies: tuple[fx.Node, ...] = ()
    if axis is None:
        # It normalises dimension 1, which is the channels' only at the expected rank.
        rank, assumed = view.rank(source)
        if rank is None:
            return Refusal(
                "BatchNorm normalises dimension 1 of a value of unknown rank: pass example_inputs"
            )
        axis, relies = 1 - rank, ((source,) if assumed else ())
    scale = Call(
        kernels.batchnorm_scale,
        (variance.expr, float(eps), None if weight is None else weight.expr),
    )
    shift = Call(kernels.batchnorm_shift, (scale, mean.expr, None if bias is None else bias.expr))
    term = Term(source, Diagonal(mean.shape[0], axis), scale)
    return Affine(kind, (term,), shift, relies)


def _scaled(view: View, node: fx.Node, a: Any, b: Any, *, divide: bool = False) -> Reading:
    """``a * b`` or ``a / b`` where one is a constant."""
    constant = view.constant(b)
    if constant is None and not divide:
        a, b = b, a
        constant = view.constant(b)
    if constant is None or not isinstance(a, fx.Node) or view.constant(a) is not None:
        return None
    met = _broadcast(view, a, constant)
    if not isinstance(met, _Broadcast):
        return met
    weight = Call(_reciprocal, (met.expr,)) if divide else met.expr
    term = Term(a, met.diagonal, weight)
    kind = "div" if divide else "mul"
    return Affine(kind, (term,), None, met.relies, met.promotes, met.diagonal.axis is None)


def _sum(view: View, node: fx.Node, a: Any, b: Any, *, sign: int = 1, alpha: Any = 1) -> Reading:
    """``a + sign * alpha * b``, of values and constants."""
    if not isinstance(alpha, (int, float)):
        return None
    operands = ((a, 1.0), (b, float(sign * alpha)))
    values = [x for x, _ in operands if view.constant(x) is None]
    if not values or not all(isinstance(x, fx.Node) for x in values):
        return None
    met = _Broadcast(IDENTITY)
    bias: Expr | None = None
    for operand, factor in operands:
        constant = view.constant(operand)
        if constant is None or _is_zero(constant):
            continue
        answer = _broadcast(view, values[0], constant)
        if not isinstance(answer, _Broadcast):
            return answer
        met, bias = answer, _times(answer.expr, factor)
    terms = tuple(
        Term(x, met.diagonal, _times(None, factor)) for x, factor in operands if x in values
    )
    kind = "add" if sign > 0 else "sub"
    return Affine(kind, terms, bias, met.relies, met.promotes, met.diagonal.axis is None)


def _is_zero(constant: Constant) -> bool:
    """The int 0 that ``sum([...])`` starts from."""
    return isinstance(constant.value, float) and constant.value == 0


def _times(expr: Expr | None, factor: float) -> Expr | None:
    """``factor * expr``, where None stands for one."""
    if factor == 1:
        return expr
    number = Call(_number, (factor,))
    return number if expr is None else Call(_product, (expr, number))


@dataclass(frozen=True)
class _Broadcast:
    diagonal: Diagonal
    expr: Expr | None = None
    relies: tuple[fx.Node, ...] = ()
    promotes: tuple[torch.dtype, ...] = ()


def _broadcast(view: View, operand: fx.Node, constant: Constant) -> _Broadcast | Refusal | None:
    """How a constant meets a value: on one axis, without growing its rank."""
    shape = constant.shape
    wide = [i for i, size in enumerate(shape) if size != 1]
    if len(wide) > 1:
        return None  # a mask, an embedding: nothing per channel
    relies: tuple[fx.Node, ...] = ()
    if len(shape) > 1:
        rank, assumed = view.rank(operand)
        if rank is None:
            if not isinstance(view.read(operand), Affine):
                return None
            return Refusal(
                f"a constant of shape {tuple(shape)} meets a value of unknown rank: "
                "pass example_inputs"
            )
        if len(shape) > rank:
            return Refusal(f"a constant of shape {tuple(shape)} grows a value of rank {rank}")
        # A Conv2d takes (C, H, W) too: only a constant of full rank tells the two apart.
        if assumed and len(shape) == rank:
            relies = (operand,)
    dtypes: tuple[torch.dtype, ...] = ()
    if isinstance(constant.value, Tensor):
        if constant.value.is_complex():
            return Refusal("a complex constant")
        if len(shape):
            dtypes = (constant.value.dtype,)
    diagonal = Diagonal(shape[wide[0]], wide[0] - len(shape)) if wide else IDENTITY
    return _Broadcast(diagonal, Call(_flatten, (constant.expr,)), relies, dtypes)


def _identity(view: View, node: fx.Node, source: Any) -> Reading:
    if not isinstance(source, fx.Node):
        return None
    return Affine("identity", (Term(source, IDENTITY),))


# --- spellings -------------------------------------------------------------------------------


def _read_module(view: View, node: fx.Node) -> Reading:
    path = str(node.target)
    module = view.submodule(path)
    base: Any = next((c for c in type(module).__mro__ if c in _MODULES), None)
    if base is None:
        return None
    args = [*node.args, *node.kwargs.values()]
    if len(args) != 1:
        return None
    if "forward" in vars(module) or type(module).forward is not base.forward:
        return None
    if foreign_hooks(module):
        return Refusal("hook registered")

    def get(name: str) -> Constant | None:
        return view.attribute(module, path, name)

    if isinstance(module, nn.modules.conv._ConvNd):
        if getattr(type(module), "_conv_forward", None) is not getattr(base, "_conv_forward", None):
            return None
        return _convolution(
            view, node, args[0], get("weight"), get("bias"),
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            output_padding=module.output_padding,
            transposed=module.transposed,
            padding_mode=module.padding_mode,
            rank=len(module.kernel_size),
        )  # fmt: skip
    if isinstance(module, nn.Linear):
        return _convolution(view, node, args[0], get("weight"), get("bias"), rank=0)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        if module.training:
            return Refusal("BatchNorm is in training mode")
        instance = isinstance(module, nn.modules.instancenorm._InstanceNorm)
        if instance and not module.track_running_stats:
            return None
        return _batchnorm(
            view, node, args[0], get("running_mean"), get("running_var"),
            get("weight"), get("bias"), module.eps,
            axis=_NORM_AXES.get(base),
            kind="instance_norm" if instance else "batch_norm",
        )  # fmt: skip
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.training:
        return None
    return _identity(view, node, args[0])


_PLAIN_TENSORS = {Tensor, nn.Parameter, nn.Buffer}

_MODULES = {
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
}  # fmt: skip

# The ranks these accept leave no choice; BatchNorm1d takes (N, C) and (N, C, L).
_NORM_AXES: dict[Any, int] = {
    nn.BatchNorm2d: -3, nn.BatchNorm3d: -4,
    nn.InstanceNorm1d: -2, nn.InstanceNorm2d: -3, nn.InstanceNorm3d: -4,
}  # fmt: skip


def _read_conv(rank: int, transposed: bool = False) -> Callable[..., Reading]:
    """The reader of a convolution of this rank; of rank 0, of a linear layer."""

    def read(view: View, node: fx.Node, input: Any, weight: Any, bias: Any, **how: Any) -> Reading:
        constants = view.constant(weight), view.constant(bias)
        if bias is not None and constants[1] is None:
            return None
        return _convolution(view, node, input, *constants, transposed=transposed, rank=rank, **how)

    return read


def _read_batchnorm(
    view: View, node: fx.Node, input: Any, running_mean: Any, running_var: Any,
    weight: Any, bias: Any, training: Any, eps: Any, **_: Any,
) -> Reading:  # fmt: skip
    if training is not False:
        return Refusal("BatchNorm is in training mode")
    scale, shift = view.constant(weight), view.constant(bias)
    if (weight is not None and scale is None) or (bias is not None and shift is None):
        return Refusal("BatchNorm's weight or bias is computed from the input or written")
    mean, variance = view.constant(running_mean), view.constant(running_var)
    return _batchnorm(view, node, input, mean, variance, scale, shift, eps)


def _read_add(view: View, node: fx.Node, input: Any, other: Any, alpha: Any = 1) -> Reading:
    return _sum(view, node, input, other, alpha=alpha)


def _read_sub(view: View, node: fx.Node, input: Any, other: Any, alpha: Any = 1) -> Reading:
    return _sum(view, node, input, other, alpha=alpha, sign=-1)


def _read_rsub(view: View, node: fx.Node, input: Any, other: Any, alpha: Any = 1) -> Reading:
    return _sum(view, node, other, input, alpha=alpha, sign=-1)


def _read_mul(view: View, node: fx.Node, input: Any, other: Any) -> Reading:
    return _scaled(view, node, input, other)


def _read_div(view: View, node: fx.Node, input: Any, other: Any, rounding_mode: Any) -> Reading:
    return None if rounding_mode else _scaled(view, node, input, other, divide=True)


def _read_neg(view: View, node: fx.Node, input: Any) -> Reading:
    return _scaled(view, node, input, -1)


def _read_dropout(view: View, node: fx.Node, input: Any, training: Any, **_: Any) -> Reading:
    return _identity(view, node, input) if training is False else None


def _read_contiguous(view: View, node: fx.Node, input: Any, **_: Any) -> Reading:
    return _identity(view, node, input)


def _read_reshape_as(view: View, node: fx.Node, input: Any, other: Any) -> Reading:
    """``scale(v.flatten(0, k)).reshape_as(v)``: the leading dimensions never mattered.

    Tokens (N, L, C) meet BatchNorm1d this way; the last dimension is the channels' throughout.
    """
    shape = IDENTITY
    weight: Expr | None = None
    biases: list[Expr] = []
    inside: list[fx.Node] = []
    value = input
    while isinstance(value, fx.Node) and len(inside) < 8:
        if any(user is not node and user not in inside for user in value.users):
            return None
        inside.append(value)
        start = _flattened(view, value)
        if start is not None:
            if start is not other or shape.axis not in (None, -1):
                return None
            bias = Call(kernels.add_biases, tuple(biases)) if biases else None
            return Affine("identity", (Term(start, shape, weight),), bias, inside=tuple(inside))
        reading = view.read(value)
        if not isinstance(reading, Affine) or len(reading.terms) > 1 or reading.relies:
            return reading if isinstance(reading, Refusal) else None
        term = reading.terms[0]
        composed = compose(shape, term.map, biased=reading.bias is not None)
        if not isinstance(composed, Diagonal):
            return None
        if reading.bias is not None:
            biases.append(Call(kernels.compose_bias, (shape, weight, reading.bias)))
        weight = Call(kernels.compose, (composed, shape, term.map, weight, term.weight))
        shape, value = composed, term.operand
    return None


def _flattened(view: View, node: fx.Node) -> fx.Node | None:
    """The value whose leading dimensions, and not its last, `node` flattens."""
    if node.target not in ("flatten", torch.flatten):
        return None
    args = [*node.args, *(node.kwargs[k] for k in ("start_dim", "end_dim") if k in node.kwargs)]
    if len(args) != 3 or args[1] != 0 or not isinstance(args[2], int):
        return None
    source = args[0]
    assert isinstance(source, fx.Node)
    rank = view.ranks.rank(source)
    if rank is None:
        return None
    end = args[2] + rank if args[2] < 0 else args[2]
    return source if 0 <= end <= rank - 2 else None


@dataclass(frozen=True)
class Spelling:
    """A reader and the parameters of a function, in order, with their defaults."""

    read: Callable[..., Reading]
    parameters: inspect.Signature


def _spelling(read: Callable[..., Reading], parameters: str) -> Spelling:
    namespace: dict[str, Any] = {}
    exec(f"def f({parameters}): ...", {}, namespace)
    return Spelling(read, inspect.signature(namespace["f"]))


_CONV = "input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1"
_CONV_T = "input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1"
_BATCH_NORM = (
    "input, running_mean, running_var, weight=None, bias=None, training=False, "
    "momentum=0.1, eps=1e-5"
)
_TORCH_BATCH_NORM = (
    "input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled"
)
_ADD = _spelling(_read_add, "input, other, alpha=1")
_SUB = _spelling(_read_sub, "input, other, alpha=1")
_RSUB = _spelling(_read_rsub, "input, other, alpha=1")
_MUL = _spelling(_read_mul, "input, other")
_DIV = _spelling(_read_div, "input, other, rounding_mode=None")
_NEG = _spelling(_read_neg, "input")
_CONTIGUOUS = _spelling(_read_contiguous, "input, memory_format=None")
_RESHAPE_AS = _spelling(_read_reshape_as, "input, other")

FUNCTIONS: dict[Any, Spelling] = {
    **{
        f: _spelling(_read_conv(rank, False), _CONV)
        for rank, fs in enumerate(
            ((F.conv1d, torch.conv1d), (F.conv2d, torch.conv2d), (F.conv3d, torch.conv3d)), 1
        )
        for f in fs
    },
    **{
        f: _spelling(_read_conv(rank, True), _CONV_T)
        for rank, fs in enumerate(
            (
                (F.conv_transpose1d, torch.conv_transpose1d),
                (F.conv_transpose2d, torch.conv_transpose2d),
                (F.conv_transpose3d, torch.conv_transpose3d),
            ),
            1,
        )
        for f in fs
    },
    F.linear: _spelling(_read_conv(0), "input, weight, bias=None"),
    F.batch_norm: _spelling(_read_batchnorm, _BATCH_NORM),
    torch.batch_norm: _spelling(_read_batchnorm, _TORCH_BATCH_NORM),
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _ADD),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, torch.subtract), _SUB),
    torch.rsub: _RSUB,
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply), _MUL),
    **dict.fromkeys(
        (operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide), _DIV
    ),
    **dict.fromkeys((operator.neg, torch.neg, torch.negative), _NEG),
    **dict.fromkeys(
        (F.dropout, F.dropout2d, F.dropout3d),
        _spelling(_read_dropout, "input, p=0.5, training=True, inplace=False"),
    ),
}

METHODS: dict[str, Spelling] = {
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), _ADD),
    **dict.fromkeys(("sub", "sub_", "subtract", "subtract_", "__sub__"), _SUB),
    "__rsub__": _RSUB,
    **dict.fromkeys(("mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__"), _MUL),
    **dict.fromkeys(("div", "div_", "divide", "divide_", "true_divide", "__truediv__"), _DIV),
    **dict.fromkeys(("neg", "neg_", "negative"), _NEG),
    "contiguous": _CONTIGUOUS,
    **dict.fromkeys(("reshape_as", "view_as"), _RESHAPE_AS),
}


def _dispatch(view: View, node: fx.Node) -> Reading:
    if node.op == "call_module":
        return _read_module(view, node)
    if node.op == "call_function":
        spelling = FUNCTIONS.get(node.target)
    elif node.op == "call_method":
        spelling = METHODS.get(str(node.target))
    else:
        return None
    if spelling is None:
        return None
    try:
        bound = spelling.parameters.bind(*node.args, **node.kwargs)
    except TypeError:  # out=, dtype=, positional forms of other overloads: not read
        return None
    bound.apply_defaults()
    return spelling.read(view, node, **bound.arguments)


def _tuple(value: Any, length: int) -> tuple[int, ...] | None:
    """An int or a sequence of ints as a tuple of `length`; None if it is not known."""
    if isinstance(value, int):
        return (value,) * length
    if isinstance(value, Sequence) and all(isinstance(v, int) for v in value):
        if len(value) == 1:
            return tuple(value) * length
        return tuple(value) if len(value) == length else None
    return None
