"""Where an operation that writes in place may be read as the pure operation of the same name.

Given::

    y = conv(x) ;  z = y * 2 ;  y += a ;  use(y, z)

The second y is not the first. Values that may share memory form one alias set (union-find over
views, in-place results, containers, and everything unknown). A write is harmless when no value of
its set made before it is read after it, except for its shape, and none is an argument or tensor of
the model: then every later reader goes through the result of the write, and nobody can tell that
memory was reused.

What is not known is taken to alias all its inputs; a module or function that is not torch's own is
also taken to write them and to keep what it returns. That costs little: a value that somebody
writes later can still be replaced by an equal one, it only is not looked through.
"""

from __future__ import annotations

import functools
import inspect
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxrep.ops.owner import owner
from fxrep.ops.values import value_type
from fxrep.words import words

_Key = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Aliasing:
    """What in-place operations mean for the values of one graph.

    Stays valid while nodes are erased and fresh values are put in their place: a node that was not
    analysed counts as fresh, and as written by whatever writes it today.
    """

    _module: nn.Module = field(repr=False)
    _group: Mapping[fx.Node, int]
    _writes: Mapping[int, tuple[tuple[_Key, fx.Node], ...]]
    _irreplaceable: frozenset[fx.Node]
    _stale: frozenset[fx.Node]
    _written_attributes: frozenset[fx.Node]
    _joined: dict[fx.Node, list[int]] = field(default_factory=dict)

    def pure(self, node: fx.Node) -> bool:
        """Whether `node` may be read as an out-of-place operation."""
        return node not in self._irreplaceable

    def replaceable(self, node: fx.Node) -> bool:
        """Whether a fresh, equal value may take the place of `node`.

        True for a fresh value even if somebody writes it later: they then write the new one.
        """
        return node not in self._irreplaceable

    def stale(self, node: fx.Node) -> bool:
        """Whether some reader may find in `node` another value than `node` computed."""
        if node in self._group:
            return node in self._stale
        last = max((user._sort_key for user in node.users if not _only_looks(user)), default=())
        return self._any_write(node, node._sort_key, last)

    def pinned(self, node: fx.Node) -> bool:
        """Whether `node` must be neither replaced nor looked through."""
        return not self.replaceable(node) or self.stale(node)

    def written(self, node: fx.Node) -> bool:
        """Whether `node`, or what may share its memory, is written after it was computed.

        Such a value must not become a stored tensor: the write would change it for good.
        """
        return self.written_since(node, node)

    def written_since(self, node: fx.Node, since: fx.Node) -> bool:
        """Whether `node`, or what may share its memory, is written after the node `since`."""
        return self._any_write(node, since._sort_key, None)

    def acts(self, node: fx.Node) -> bool:
        """Whether a node may write memory, or run code that is not torch's."""
        effect = _effect(node, self._module.get_submodule)
        return bool(effect.writes) or effect.outside

    def owns_memory(self, node: fx.Node) -> bool:
        """Whether a value has memory of its own when it is made, which nobody else knows."""
        effect = _effect(node, self._module.get_submodule)
        return not effect.touched and not effect.outside

    def returned(self, node: fx.Node) -> bool:
        """Whether the graph returns a value, or another one that may share its memory."""
        ahead = [node]
        for each in ahead:  # grows while it is read
            for user in each.users:
                if user.op == "output":
                    return True
                if each in _effect(user, self._module.get_submodule).aliases and user not in ahead:
                    ahead.append(user)
        return False

    def writes_attribute(self, node: fx.Node) -> bool:
        """Whether the model writes the parameter or buffer that a `get_attr` node reads."""
        return node in self._written_attributes or self._any_write(node, (), None)

    def writes_between(
        self,
        first: fx.Node,
        last: fx.Node,
        nodes: Iterable[fx.Node],
        dying: Container[fx.Node] | None = None,
    ) -> bool:
        """Whether any of `nodes` may be written strictly between `first` and `last`.

        Args:
            first: the earliest node of a region.
            last: its root.
            nodes: the values that will be read at `last` only.
            dying: when given, writes by these nodes do not count, but one by `first` does.
        """
        low = first._sort_key
        return any(self._any_write(n, low, last._sort_key, dying, first) for n in nodes)

    def _any_write(
        self,
        node: fx.Node,
        after: _Key,
        before: _Key | None,
        dying: Container[fx.Node] | None = None,
        first: fx.Node | None = None,
    ) -> bool:
        for group in self._groups(node):
            writes = self._writes.get(group)
            if not writes:
                continue
            cut = bisect_left if dying is not None else bisect_right
            start = cut(writes, after, key=lambda entry: entry[0])
            for position, write in writes[start:]:
                if before is not None and position >= before:
                    break
                if not write._erased and (dying is None or write not in dying):
                    return True
        return False

    def same(self, new: fx.Node, old: fx.Node) -> None:
        """Say that `new` takes the place of `old`: a write to one of them writes the other."""
        if new in self._group:  # a node that was not analysed counts as its readers do
            self._joined.setdefault(new, []).extend(self._groups(old))

    def _groups(self, node: fx.Node) -> list[int]:
        known = self._group.get(node)
        if known is not None:
            return [known, *self._joined.get(node, ())]
        found = []
        for user in node.users:
            group = self._group.get(user)
            if group is not None and node in _effect(user, self._module.get_submodule).touched:
                found.append(group)
        return found


def written_operand(node: fx.Node, module: nn.Module) -> fx.Node | None:
    """The tensor that a node writes and then gives back as its result, if that is all it does."""
    effect = _effect(node, module.get_submodule)
    written = effect.writes
    if len(written) != 1 or effect.aliases != written or effect.reshapes or effect.outside:
        return None
    return written[0] if _returns_it(node) and _is_tensor(written[0]) else None


def _returns_it(node: fx.Node) -> bool:
    """Whether an operation that writes its operand gives that very tensor back."""
    if node.op == "call_module":
        return True
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return (
        name not in ("setitem", "delitem", "__setitem__", "__delitem__")
        and "out" not in node.kwargs
    )


def _is_tensor(node: fx.Node) -> bool:
    """Whether a value is certainly a tensor: ``n += 1`` of a number makes a new one."""
    return node.op not in ("placeholder", "get_attr") and value_type(node) is torch.Tensor


def analyse(graph: fx.Graph, module: nn.Module) -> Aliasing:
    """Find the alias sets of a graph and the writes that somebody can observe.

    Args:
        graph: as traced: in-place operators are nodes, with their results.
        module: the module that the targets of the graph refer to, in eval mode.

    Returns:
        Answers about single nodes, each in constant or logarithmic time.
    """
    nodes = list(graph.nodes)
    index = {node: i for i, node in enumerate(nodes)}
    modules = dict(module.named_modules(remove_duplicate=False))
    effects = [_effect(node, modules.__getitem__) for node in nodes]
    parent = list(range(len(nodes)))
    outside = False
    for i, effect in enumerate(effects):
        for other in effect.touched:
            _union(parent, i, index[other])
            outside = outside or other.op in ("placeholder", "get_attr")
    if outside and any(effect.writes for effect in effects):
        _join_memory(nodes, parent, module)
    roots = [_find(parent, i) for i in range(len(nodes))]
    writes: dict[int, list[int]] = {}
    for i, effect in enumerate(effects):
        if effect.writes:
            writes.setdefault(roots[i], []).append(i)
    members: dict[int, list[int]] = {root: [] for root in writes}
    for i, root in enumerate(roots):
        if root in members:
            members[root].append(i)
    irreplaceable: set[fx.Node] = set()
    stale: set[fx.Node] = set()
    for root, group in members.items():
        _judge(nodes, index, effects, group, writes[root], irreplaceable, stale)
    return Aliasing(
        module,
        {node: roots[i] for i, node in enumerate(nodes)},
        {root: tuple((nodes[i]._sort_key, nodes[i]) for i in w) for root, w in writes.items()},
        frozenset(irreplaceable),
        frozenset(stale),
        _written_attributes(nodes, effects, module),
    )


def may_share(node: fx.Node, module: nn.Module) -> set[fx.Node]:
    """The tensors of the model whose memory a value may share: what it reads, or is a view of."""
    seen, ahead = {node}, [node]
    for each in ahead:
        sources = _effect(each, module.get_submodule).aliases
        ahead.extend(source for source in sources if source not in seen)
        seen.update(sources)
    return {each for each in seen if each.op == "get_attr"}


def _judge(
    nodes: list[fx.Node],
    index: dict[fx.Node, int],
    effects: list[_Effect],
    group: list[int],
    writes: list[int],
    irreplaceable: set[fx.Node],
    stale: set[fx.Node],
) -> None:
    """Sort out one alias set; `group` and `writes` are positions, ascending."""
    is_write = set(writes)
    older = -1.0  # the last read of any member before the current one
    observed: list[int] = []
    doubtful: list[int] = []
    for i in group:
        node, effect = nodes[i], effects[i]
        reads = [index[user] for user in node.users if not _only_looks(user)]
        last: float = max(reads, default=-1)
        if i in is_write and (older > i or effect.reshapes):
            observed.append(i)
        if effect.touched and older > i:
            doubtful.append(i)
        following = bisect_right(writes, i)
        if following < len(writes) and writes[following] < last:
            stale.add(node)
        if effect.outside:
            last = math.inf
            if node.op in ("placeholder", "get_attr"):
                irreplaceable.add(node)
        older = max(older, last)
    latest = observed[-1] if observed else -1
    # Older names are still in use: giving this one its own memory shows if a write follows.
    irreplaceable.update(nodes[i] for i in doubtful if i <= latest)
    irreplaceable.update(nodes[i] for i in observed)


def _join_memory(nodes: list[fx.Node], parent: list[int], module: nn.Module) -> None:
    """One memory under several names: tied tensors, and a tensor passed as two arguments."""
    first: dict[object, int] = {}
    for i, node in enumerate(nodes):
        if node.op == "get_attr":
            _union(parent, i, first.setdefault(_memory(module, str(node.target)), i))
        elif node.op == "placeholder":
            _union(parent, i, first.setdefault(None, i))


def _union(parent: list[int], a: int, b: int) -> None:
    parent[_find(parent, a)] = _find(parent, b)


def _find(parent: list[int], i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


def _memory(module: nn.Module, path: str) -> object:
    """The storage behind a parameter or buffer: tied tensors and views of one are one."""
    value: Any = module
    try:
        for name in path.split("."):
            value = getattr(value, name)
        return value.untyped_storage()._cdata
    except Exception:  # no tensor, or one without a storage
        return path if isinstance(value, nn.Module) else id(value)


def _written_attributes(
    nodes: list[fx.Node], effects: list[_Effect], module: nn.Module
) -> frozenset[fx.Node]:
    """Reads of tensors that a module called in the graph may write by itself."""
    owners = [
        module.get_submodule(str(node.target))
        for node, effect in zip(nodes, effects, strict=True)
        if node.op == "call_module" and effect.own_state
    ]
    if not owners:
        return frozenset()
    held = nn.ModuleList(owners)
    tensors = {
        _memory(held, name)
        for name, _ in (
            *held.named_parameters(remove_duplicate=False),
            *held.named_buffers(remove_duplicate=False),
        )
    }
    return frozenset(
        node
        for node in nodes
        if node.op == "get_attr" and _memory(module, str(node.target)) in tensors
    )


# --- what one node does to memory -----------------------------------------------------------


@dataclass(frozen=True)
class _Effect:
    """What a node does to the memory of its operands.

    Attributes:
        aliases: operands whose memory the result may share.
        writes: operands whose memory it may write.
        outside: the result is, or may be, known to code outside the graph.
        reshapes: it changes the shape of what it writes.
        own_state: a module that may write its own tensors.
    """

    aliases: tuple[fx.Node, ...] = ()
    writes: tuple[fx.Node, ...] = ()
    outside: bool = False
    reshapes: bool = False
    own_state: bool = False

    @property
    def touched(self) -> tuple[fx.Node, ...]:
        return self.aliases + self.writes if self is not _FRESH else ()


_FRESH = _Effect()
_OUTSIDE = _Effect(outside=True)


def _effect(node: fx.Node, module: Callable[[str], nn.Module]) -> _Effect:
    if node.op in ("placeholder", "get_attr"):
        return _OUTSIDE
    if node.op == "output":
        return _FRESH
    if node.op == "call_module":
        effect = _module_effect(node, module(str(node.target)))
    elif node.op == "call_method":
        effect = _call_effect(node, str(node.target), known=True)
    else:
        effect = _function_effect(node)
    if "out" in node.kwargs:
        out = _nodes(node.kwargs["out"])
        effect = _Effect((*effect.aliases, *out), (*effect.writes, *out), effect.outside, True)
    return effect


def _module_effect(node: fx.Node, module: nn.Module) -> _Effect:
    inputs = tuple(node.all_input_nodes)
    base = owner(node, module)
    if base is None:
        return _Effect(inputs, inputs, outside=True, own_state=True)
    home, _, family = base.__module__.rpartition(".")
    if home != "torch.nn.modules" or family in ("container", "transformer"):
        return _Effect(inputs)
    source = _first(node)
    if family == "dropout" and not module.training:
        return _Effect(source)
    if getattr(module, "inplace", False) is True:
        return _Effect(source, source)
    own_state = module.training and family in ("batchnorm", "instancenorm")
    if base is nn.Identity or family not in _FRESH_FAMILIES:
        return _Effect(source)
    return _Effect(own_state=own_state)


def _function_effect(node: fx.Node) -> _Effect:
    target: Any = node.target
    name = getattr(target, "__name__", "")
    home = getattr(target, "__module__", None) or "torch"
    if target is getattr:
        return _FRESH if node.args[1] in _METADATA else _Effect(_first(node))
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return _operator_effect(node, target)
    if home == "_operator":
        if name == "setitem" or name in _IN_PLACE_OPERATORS:
            return _Effect(_first(node), _first(node))
        return _Effect(_first(node)) if name in ("getitem", "pos") else _FRESH
    if isinstance(target, type) or home in ("builtins", "math"):
        return _Effect(tuple(node.all_input_nodes))
    return _call_effect(node, name, known=_is_torch(home))


def _operator_effect(node: fx.Node, target: torch._ops.OpOverload) -> _Effect:
    """What an ATen operator's schema says it writes; whether it shares memory it need not say."""
    names = [a.name for a in target._schema.arguments if a.alias_info and a.alias_info.is_write]
    places = {argument.name: i for i, argument in enumerate(target._schema.arguments)}
    given = [
        node.kwargs[name] if name in node.kwargs else (node.args[places[name] : places[name] + 1])
        for name in names
    ]
    return _Effect(tuple(node.all_input_nodes), _nodes(given))


def _is_torch(home: str) -> bool:
    return home.partition(".")[0] == "torch" and not home.startswith(("torch._ops", "torch.ops"))


def _call_effect(node: fx.Node, name: str, *, known: bool) -> _Effect:
    """The effect of a tensor method or function by its name."""
    if name in _FRESH_NAMES and known:
        inplace = argument(node, "inplace")
        if inplace is False or inplace is None:
            return _FRESH
    inputs = tuple(node.all_input_nodes)
    if not known:
        return _Effect(inputs, inputs, outside=True)
    source = _first(node)
    if name in _IN_PLACE_METHODS:
        return _Effect(source, source)
    if name.endswith("_") and not name.endswith("__"):
        if name == "requires_grad_":
            return _Effect(source)
        written = source or inputs
        kept = inputs if name in ("set_", "swap_") else written
        return _Effect(kept, written, reshapes=name in _RESHAPING)
    training = argument(node, "training")
    if name in _DROPOUTS and training is False:
        return _Effect(source)
    inplace = argument(node, "inplace")
    if inplace is not False and inplace is not None:
        return _Effect(source, source)
    if name in ("batch_norm", "instance_norm", "embedding", "embedding_bag"):
        return _Effect(writes=_updated(node, name))
    if name in _METADATA_METHODS:
        return _FRESH
    if name in _VIEWS:
        return _Effect(source)
    if node.op == "call_method" and not hasattr(torch.Tensor, name):
        return _Effect(inputs, inputs, outside=True)
    return _Effect(inputs)


def _updated(node: fx.Node, name: str) -> tuple[fx.Node, ...]:
    """Running statistics and renormalised tables: operands that some functions write."""
    if name == "batch_norm":
        return () if argument(node, "training") is False else statistics(node)
    if name == "instance_norm":
        return () if argument(node, "use_input_stats") is False else statistics(node)
    return () if argument(node, "max_norm") is None else tuple(node.all_input_nodes)


def statistics(node: fx.Node) -> tuple[fx.Node, ...]:
    """The running mean and variance that a call of a normalisation is given."""
    values = (argument(node, "running_mean"), argument(node, "running_var"))
    return tuple(value for value in values if isinstance(value, fx.Node))


def argument(node: fx.Node, name: str) -> Any:
    """An argument by name, where the function has one; else its default, else None."""
    if name in node.kwargs:
        return node.kwargs[name]
    if node.op != "call_function":
        return None
    position, default = _parameter(node.target, name)
    return node.args[position] if 0 <= position < len(node.args) else default


@functools.cache
def _parameter(function: Callable[..., Any], name: str) -> tuple[int, Any]:
    if function is torch.batch_norm and name == "training":
        return 5, True
    norms = (torch.batch_norm, torch.instance_norm)
    if function in norms and name in ("running_mean", "running_var"):
        return (3 if name == "running_mean" else 4), None
    if function is torch.instance_norm and name == "use_input_stats":
        return 5, True
    if function in (torch.dropout, torch.feature_dropout, torch.alpha_dropout):
        return (2, True) if name in ("training", "train") else (-1, None)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return -1, None
    for position, parameter in enumerate(parameters):
        if parameter.name == name:
            return position, parameter.default
    return -1, None


def _first(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes in the first argument: the tensor that a view or an in-place operation takes."""
    if node.args:
        return _nodes(node.args[0])
    for name in ("input", "self", "tensor", "tensors"):
        if name in node.kwargs:
            return _nodes(node.kwargs[name])
    return tuple(node.all_input_nodes)


def _nodes(value: Any) -> tuple[fx.Node, ...]:
    if isinstance(value, fx.Node):
        return (value,)
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return tuple(found)


def _only_looks(node: fx.Node) -> bool:
    """Whether a node reads the shape, dtype or device of its operand, not its values."""
    if node.op == "call_function":
        return node.target is getattr and node.args[1] in _METADATA
    return node.op == "call_method" and node.target in _METADATA_METHODS


_METADATA = words(
    "shape ndim dtype device layout is_cuda requires_grad is_sparse is_quantized nbytes itemsize"
)

_METADATA_METHODS = words(
    "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex "
    "element_size get_device is_signed"
)

_IN_PLACE_OPERATORS = words(
    "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift iconcat "
    "delitem"
)

_IN_PLACE_METHODS = frozenset(
    {"__setitem__", "__delitem__", *(f"__{name}__" for name in _IN_PLACE_OPERATORS)}
)

_RESHAPING = words(
    "squeeze_ unsqueeze_ transpose_ t_ swapaxes_ swapdims_ resize_ resize_as_ set_ swap_ "
    "as_strided_ rename_ share_memory_ detach_"
)

_DROPOUTS = words(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout"
)

# Files of torch.nn.modules whose classes always return memory of their own.
_FRESH_FAMILIES = words(
    "conv linear batchnorm instancenorm normalization pooling activation upsampling padding fold "
    "sparse rnn distance loss adaptive"
)

# Methods and functions whose result may be their first operand or a view of it.
_VIEWS = words(
    "view view_as reshape reshape_as flatten unflatten ravel transpose permute movedim moveaxis "
    "swapaxes swapdims t numpy_T adjoint squeeze unsqueeze expand expand_as broadcast_to narrow "
    "select slice diagonal unfold unbind chunk split split_with_sizes tensor_split hsplit vsplit "
    "dsplit unsafe_chunk unsafe_split contiguous to type type_as float double half bfloat16 int "
    "long bool cpu cuda detach real imag positive conj resolve_conj resolve_neg as_strided "
    "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle alias __getitem__"
)

# Methods and functions that always return memory of their own.
_FRESH_NAMES = words(
    "add sub subtract rsub mul multiply div divide true_divide floor_divide remainder fmod pow neg "
    "negative abs absolute exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin "
    "cos tan tanh sinh cosh atan atan2 erf erfc sigmoid logit sign sgn round floor ceil trunc frac "
    "relu relu6 gelu silu mish elu celu selu hardswish hardsigmoid hardtanh hardshrink softshrink "
    "tanhshrink softplus softsign leaky_relu prelu rrelu threshold logsigmoid glu softmax "
    "log_softmax softmin gumbel_softmax normalize clamp clip clamp_min clamp_max minimum maximum "
    "fmin fmax lerp addcmul addcdiv where masked_fill masked_scatter eq ne lt le gt ge not_equal "
    "logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor "
    "isnan isinf isfinite nan_to_num sum mean prod max min amax amin argmax argmin std var "
    "std_mean var_mean norm logsumexp cumsum cumprod topk sort argsort median any all "
    "count_nonzero matmul mm bmm mv dot addmm addbmm baddbmm addmv outer linear bilinear conv1d "
    "conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d "
    "scaled_dot_product_attention cdist cat concat concatenate stack hstack vstack dstack repeat "
    "repeat_interleave roll flip index_select gather scatter scatter_add index_add index_copy "
    "index_fill index_put masked_select take nonzero one_hot tril triu clone zeros_like ones_like "
    "full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty new_tensor "
    "zeros ones full empty rand randn arange linspace eye tensor max_pool1d max_pool2d max_pool3d "
    "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d "
    "avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
    "adaptive_max_pool2d adaptive_max_pool3d adaptive_max_pool1d_with_indices "
    "adaptive_max_pool2d_with_indices lp_pool1d lp_pool2d max_unpool2d layer_norm group_norm "
    "local_response_norm rms_norm interpolate upsample upsample_nearest upsample_bilinear "
    "grid_sample affine_grid pad constant_pad_nd _assert is_tensor tolist item __add__ __radd__ "
    "__sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __pow__ __rpow__ __neg__ __abs__ "
    "__matmul__ __rmatmul__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __floordiv__ __mod__"
)
