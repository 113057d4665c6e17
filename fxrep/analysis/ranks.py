"""The rank (number of dimensions) of each value, without running the model.

Given::

    x -> Conv2d -> BatchNorm2d -> flatten(1) -> Linear

Result: x, and all up to the flatten, has rank 4 because BatchNorm2d refuses anything else; what
follows has rank 2.

Values whose ranks differ by a known constant form one class (union-find with offsets). A class is
known once one of its members is: by a module or function that accepts one rank only, an explicit
shape, an assertion in the model. What broadcasts takes the largest rank of its operands. Where
nothing proves a rank, convolutions are assumed to see batches; a rewrite that uses the assumption
says so (`rely`), and the rewritten graph asserts it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxrep.ops.owner import owner
from fxrep.words import words

# Passes over what broadcasts; each settles chains of any length in graph order.
_MOST_PASSES = 6

_Known = tuple[int, frozenset[int]]  # a rank, and the classes whose assumption it rests on


class Ranks:
    """Ranks of the values of one graph.

    Args:
        graph: as traced.
        module: the module its targets refer to.
        example_ranks: ranks seen when the model ran on an example: assumed where none is proven.
        known: ranks that are certain, of tensors.
    """

    def __init__(
        self,
        graph: fx.Graph,
        module: nn.Module,
        example_ranks: Mapping[fx.Node, int] | None = None,
        known: Mapping[fx.Node, int] | None = None,
    ) -> None:
        self._graph = graph
        self._modules = dict(module.named_modules(remove_duplicate=False))
        self._nodes = list(graph.nodes)
        self._index = {node: i for i, node in enumerate(self._nodes)}
        self._parent = list(range(len(self._nodes)))
        self._offset = [0] * len(self._nodes)  # rank of a node minus that of its parent
        self._least = [0] * len(self._nodes)  # of a root: the rank is at least this
        self._proven: dict[int, int | None] = {}  # of a root; None: contradictory
        self._batched: dict[int, set[int]] = {}  # of a root: what convolutions suggest
        self._broadcasts: list[tuple[fx.Node, list[fx.Node], int]] = []
        self._tensors: set[fx.Node] = set(known or ())
        self._numbers: set[fx.Node] = set()
        self._masks: dict[fx.Node, bool] = {}
        self._lists: dict[fx.Node, tuple[fx.Node, int]] = {}
        self._relied: set[int] = set()
        self._leaned: set[int] = set()
        for node in self._nodes:
            self._read(node)
        for node, rank in (known or {}).items():
            self._set(node, rank)
        self._settle()
        self._values: dict[int, _Known] = {
            root: (rank, frozenset()) for root, rank in self._proven.items() if rank is not None
        }
        self._assume(example_ranks or {})

    def rank(self, node: fx.Node) -> int | None:
        """The rank of a value if it is certain."""
        known = self._known(node)
        return known[0] if known is not None and not known[1] else None

    def assumed(self, node: fx.Node) -> int | None:
        """The rank of a value, certain or if convolutions see batches."""
        known = self._known(node)
        return None if known is None else known[0]

    def rely(self, node: fx.Node) -> None:
        """Note that a rewrite is right only if `assumed(node)` is."""
        known = self._known(node)
        if known is not None:
            self._relied |= known[1]

    def lean(self, node: fx.Node) -> int | None:
        """`assumed(node)`, for a conclusion that a rewrite may use later: see `rely_leaned`."""
        known = self._known(node)
        if known is not None:
            self._leaned |= known[1]
        return None if known is None else known[0]

    def rely_leaned(self) -> None:
        """Note that a rewrite may rest on what was concluded by leaning on an assumption."""
        self._relied |= self._leaned

    def guards(self) -> list[tuple[fx.Node, int]]:
        """The earliest value of each class relied on, with the rank to assert."""
        first: dict[int, tuple[fx.Node, int]] = {}
        for node in self._graph.nodes if self._relied else ():
            if node in self._index and node.op != "get_attr":
                root, offset = self._find(self._index[node])
                if root in self._relied:
                    first.setdefault(root, (node, self._values[root][0] + offset))
        return list(first.values())

    def same(self, new: fx.Node, old: fx.Node) -> None:
        """Say that `new`, which may not have been analysed, has the rank of `old`."""
        if old not in self._index:
            return
        if new in self._index:
            known = self._known(old)
            root, offset = self._find(self._index[new])
            if known is not None:
                self._values.setdefault(root, (known[0] - offset, known[1]))
            return
        root, offset = self._find(self._index[old])
        self._index[new] = len(self._parent)
        self._parent.append(root)
        self._offset.append(offset)

    # classes

    def _find(self, i: int) -> tuple[int, int]:
        """The root of a class, and the rank of `i` minus that of the root."""
        path = []
        while self._parent[i] != i:
            path.append(i)
            i = self._parent[i]
        total = 0
        for each in reversed(path):
            total += self._offset[each]
            self._parent[each], self._offset[each] = i, total
        return i, total

    def _join(self, a: fx.Node, b: fx.Node, difference: int = 0) -> None:
        """rank(a) = rank(b) + difference."""
        (root, low), (other, high) = self._find(self._index[a]), self._find(self._index[b])
        shift = high + difference - low  # rank(root) - rank(other)
        if root == other:
            if shift != 0:
                self._proven[root] = None
            return
        self._parent[root], self._offset[root] = other, shift
        self._least[other] = max(self._least[other], self._least[root] - shift)
        if root in self._proven:
            rank = self._proven.pop(root)
            self._prove(other, None if rank is None else rank - shift)
        if root in self._batched:
            suggested = {rank - shift for rank in self._batched.pop(root)}
            self._batched.setdefault(other, set()).update(suggested)

    def _prove(self, root: int, rank: int | None) -> None:
        if self._proven.setdefault(root, rank) != rank or (rank is not None and rank < 0):
            self._proven[root] = None

    def _set(self, node: fx.Node, rank: int) -> None:
        root, offset = self._find(self._index[node])
        self._prove(root, rank - offset)

    def _at_least(self, node: fx.Node, rank: int) -> None:
        root, offset = self._find(self._index[node])
        self._least[root] = max(self._least[root], rank - offset)

    def _known(self, node: fx.Node) -> _Known | None:
        i = self._index.get(node)
        if i is None:
            return None
        root, offset = self._find(i)
        known = self._values.get(root)
        return None if known is None else (known[0] + offset, known[1])

    # broadcasting

    def _settle(self) -> None:
        """Prove the ranks of what broadcasts, until nothing new follows."""
        waiting = self._broadcasts
        for _ in range(_MOST_PASSES):
            left = [entry for entry in waiting if not self._decide(*entry)]
            if len(left) == len(waiting):
                break
            waiting = left
        self._broadcasts = waiting

    def _decide(self, node: fx.Node, operands: list[fx.Node], least: int) -> bool:
        """Whether one operand certainly has the largest rank, and so the result's."""
        bounds = [self._bounds(operand) for operand in operands]
        if any(low < least for low, _ in bounds):
            return False
        for operand, (low, _) in zip(operands, bounds, strict=True):
            here = self._find(self._index[operand])
            if all(
                (high is not None and high <= low) or self._below(other, here)
                for other, (_, high) in zip(operands, bounds, strict=True)
            ):
                self._join(node, operand)
                return True
        return False

    def _below(self, node: fx.Node, other: tuple[int, int]) -> bool:
        root, offset = self._find(self._index[node])
        return root == other[0] and offset <= other[1]

    def _bounds(self, node: fx.Node) -> tuple[int, int | None]:
        root, offset = self._find(self._index[node])
        rank = self._proven.get(root)
        if rank is not None:
            return rank + offset, rank + offset
        return self._least[root] + offset, None

    def _assume(self, examples: Mapping[fx.Node, int]) -> None:
        """Give the classes without proof the rank of an example, or that of a batch."""
        suggested: dict[int, set[int]] = {}
        for node, rank in examples.items():
            if node in self._index:
                root, offset = self._find(self._index[node])
                suggested.setdefault(root, set()).add(rank - offset)
        for root, ranks in {**self._batched, **suggested}.items():
            if len(ranks) == 1 and root not in self._proven:
                (rank,) = ranks
                if rank >= self._least[root]:
                    self._values[root] = rank, frozenset({root})
        for _ in range(_MOST_PASSES):
            changed = False
            for node, operands, least in self._broadcasts:
                root, offset = self._find(self._index[node])
                known = [self._known(operand) for operand in operands]
                if root in self._values or root in self._proven or None in known:
                    continue
                found = [each[0] for each in known if each is not None]
                if min(found) < least:
                    continue
                rests = frozenset[int]().union(*(each[1] for each in known if each is not None))
                self._values[root] = max(found) - offset, rests
                changed = True
            if not changed:
                break

    # reading the graph

    def _read(self, node: fx.Node) -> None:
        if node.op == "call_module":
            self._read_module(node, self._modules[str(node.target)])
        elif node.op == "get_attr":
            self._read_attribute(node)
        elif node.op == "call_method":
            self._read_call(node, str(node.target))
        elif node.op == "call_function":
            self._read_function(node)

    def _read_attribute(self, node: fx.Node) -> None:
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(self._modules.get(owner), name, None)
        if isinstance(value, torch.Tensor):
            self._tensors.add(node)
            self._set(node, value.dim())
            self._masks[node] = value.dtype in (torch.bool, torch.uint8)

    def _read_module(self, node: fx.Node, module: nn.Module) -> None:
        source = _operand(node)
        base = owner(node, module)
        if source is None or base is None or not base.__module__.startswith(_MODULES):
            return
        name, family = base.__name__, base.__module__.rpartition(".")[2]
        if family == "conv" or family in _KEEP_FAMILIES:
            if getattr(module, "return_indices", False) or name == "MultiheadAttention":
                return
            self._keep(node, source)
        if family == "conv":
            self._convolution(source, len(module.kernel_size))  # type: ignore[arg-type]
        elif family == "batchnorm":
            self._at_least(source, 2)
            for kind, rank in ((nn.BatchNorm2d, 4), (nn.BatchNorm3d, 5)):
                if issubclass(base, kind):
                    self._set(source, rank)
        elif family in ("pooling", "padding", "instancenorm") and name[-2].isdigit():
            self._at_least(source, int(name[-2]) + 1)
        elif family == "upsampling":
            self._resize(source, getattr(module, "mode", None))
        elif family == "pixelshuffle":
            self._at_least(source, 3)
        elif family == "linear" and name == "Linear":
            self._at_least(source, 1)
        elif isinstance(module, nn.Flatten):
            self._flatten(node, source, module.start_dim, module.end_dim)
        elif isinstance(module, nn.Unflatten):
            self._unflatten(node, source, module.unflattened_size)
        elif isinstance(module, nn.Embedding):
            self._shift(node, source, 1)

    def _read_function(self, node: fx.Node) -> None:
        target: Any = node.target
        name = getattr(target, "__name__", "")
        home = getattr(target, "__module__", None) or "torch"
        if target is getattr:
            self._read_getattr(node)
        elif target is operator.getitem:
            self._read_item(node)
        elif target is torch._assert:
            self._read_assert(node)
        elif home in ("_operator", "math"):
            if home == "_operator" and not self._only_numbers(node):
                if name in _IN_PLACE_OPERATORS:
                    self._keep_first(node)
                elif name in ("matmul", "imatmul"):
                    self._broadcast(node, node.all_input_nodes, least=2)
                elif name in _BINARY_OPERATORS:
                    self._broadcast(node, node.all_input_nodes)
            else:
                self._numbers.add(node)
        elif home.partition(".")[0] == "torch":
            self._read_call(node, name)

    def _only_numbers(self, node: fx.Node) -> bool:
        return all(source in self._numbers for source in node.all_input_nodes)

    def _read_getattr(self, node: fx.Node) -> None:
        source, name = node.args
        assert isinstance(source, fx.Node)
        if name in ("data", "real", "imag", "mT", "T", "H", "mH"):
            self._keep(node, source)
        elif name in ("shape", "ndim"):
            self._numbers.add(node)

    def _read_assert(self, node: fx.Node) -> None:
        """`torch._assert(x.ndim == 4, ...)`: what asks for another rank raises anyway."""
        equal = node.args[0] if node.args else None
        if not isinstance(equal, fx.Node) or equal.target not in (operator.eq, torch.eq):
            return
        for rank, read in (equal.args, tuple(reversed(equal.args))):
            if isinstance(rank, int) and isinstance(read, fx.Node) and read.args:
                by_name = read.target is getattr and read.args[1] == "ndim"
                if by_name or read.target in ("dim", "ndimension"):
                    source = read.args[0]
                    if isinstance(source, fx.Node):
                        self._set(source, rank)

    def _read_item(self, node: fx.Node) -> None:
        source, key = node.args
        assert isinstance(source, fx.Node)
        if source in self._numbers:
            self._numbers.add(node)
        elif source in self._lists:
            if isinstance(key, int):
                self._shift(node, *self._lists[source])
            elif isinstance(key, slice):
                self._lists[node] = self._lists[source]
        elif isinstance(key, tuple) or source in self._tensors:
            change = self._indexed(key if isinstance(key, tuple) else (key,))
            if change is not None:
                self._shift(node, source, change)

    def _indexed(self, key: tuple[Any, ...]) -> int | None:
        """How an index changes the rank; None where it cannot be told."""
        change, arrays = 0, 0
        for entry in key:
            if entry is None:
                change += 1
            elif isinstance(entry, bool):
                return None
            elif isinstance(entry, int) or (isinstance(entry, fx.Node) and entry in self._numbers):
                change -= 1
            elif isinstance(entry, fx.Node) and entry.op == "get_attr":
                # one index tensor of integers puts its own dimensions in place of one
                rank, mask = self._bounds(entry)[1], self._masks.get(entry, True)
                arrays += 1
                if rank is None or mask or arrays > 1:
                    return None
                change += rank - 1
            elif entry is not Ellipsis and not isinstance(entry, slice):
                return None
        if arrays and any(isinstance(entry, int) for entry in key):
            return None
        return change

    def _read_call(self, node: fx.Node, name: str) -> None:
        """A method or function of torch, by its name; what is not listed has no known rank."""
        call = _Arguments(node)
        if name in ("size", "dim", "numel", "ndimension", "nelement", "stride", "item"):
            self._numbers.add(node)
            return
        reader = _READERS.get(name)
        if reader is not None:
            reader(self, node, call)
            return
        in_place = name.endswith("_") and not name.endswith("__")
        plain = name[:-1] if in_place else name
        if in_place and (plain in _BROADCASTING or plain in _KEEPING):
            self._keep_first(node)
        elif plain in _BROADCASTING:
            self._broadcast(node, node.all_input_nodes)
        elif plain in _KEEPING and not in_place:
            self._keep_first(node)
        elif plain in _REDUCING and not in_place:
            self._reduce(node, call)

    # what operations do to ranks

    def _keep(self, node: fx.Node, source: fx.Node) -> None:
        self._shift(node, source, 0)

    def _keep_first(self, node: fx.Node) -> None:
        source = _operand(node)
        if source is not None:
            self._keep(node, source)

    def _shift(self, node: fx.Node, source: fx.Node, change: int) -> None:
        self._tensors.update((node, source) if source not in self._lists else (node,))
        self._join(node, source, change)

    def _convolution(self, source: fx.Node, spatial: int) -> None:
        self._at_least(source, spatial + 1)
        root, offset = self._find(self._index[source])
        self._batched.setdefault(root, set()).add(spatial + 2 - offset)

    def _resize(self, source: fx.Node, mode: object) -> None:
        rank = _RESIZES.get(str(mode))
        if rank is None:
            self._at_least(source, 3)
        else:
            self._set(source, rank)

    def _broadcast(self, node: fx.Node, operands: Iterable[fx.Node], least: int = 0) -> None:
        tensors = [operand for operand in operands if operand not in self._numbers]
        if not tensors:
            return
        self._tensors.add(node)
        if len(tensors) == 1 and not least:
            self._keep(node, tensors[0])
            return
        self._broadcasts.append((node, tensors, least))

    def _flatten(self, node: fx.Node, source: fx.Node, start: object, end: object) -> None:
        self._tensors.update((node, source))
        if not isinstance(start, int) or not isinstance(end, int):
            return
        if start >= 0 and end < 0:
            # axes up to start stay, those from start to end become one
            self._set(node, start + 1 - (end + 1))
            self._at_least(source, max(start + 1, -end) if start or end != -1 else 0)
        elif (start >= 0) == (end >= 0) and end > start:
            self._at_least(source, end + 1 if end >= 0 else -start)
            self._shift(node, source, start - end)

    def _unflatten(self, node: fx.Node, source: fx.Node, sizes: object) -> None:
        if isinstance(sizes, (tuple, list)):
            self._shift(node, source, len(sizes) - 1)

    def _reduce(self, node: fx.Node, call: _Arguments) -> None:
        source = _operand(node)
        dims = call.get(1, "dim", "axis")
        keep = call.get(_KEEPDIM_AT.get(str(_name(node)), 2), "keepdim", "keepdims")
        if source is None:
            return
        if keep is True and dims is not None:
            self._keep(node, source)
        elif keep in (None, False):
            if dims is None:
                if not any(name in node.kwargs for name in ("axis", "dim")) and len(node.args) < 2:
                    self._set(node, 0)
            elif isinstance(dims, int) and not isinstance(dims, bool):
                self._shift(node, source, -1)
            elif isinstance(dims, (tuple, list)) and dims:
                self._shift(node, source, -len(dims))


class _Arguments:
    """Arguments of a call by position or name; methods and functions count alike."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    def get(self, position: int, *names: str, default: Any = None) -> Any:
        for name in names:
            if name in self.node.kwargs:
                return self.node.kwargs[name]
        args = self.node.args
        return args[position] if position < len(args) else default

    def rest(self, *names: str) -> Any:
        """Sizes given as one sequence or as arguments of their own."""
        for name in names:
            if name in self.node.kwargs:
                return self.node.kwargs[name]
        sizes = self.node.args[1:]
        return sizes[0] if len(sizes) == 1 else sizes


def _name(node: fx.Node) -> object:
    return node.target if node.op == "call_method" else getattr(node.target, "__name__", "")


def _operand(node: fx.Node) -> fx.Node | None:
    """The tensor an operation works on: its first argument."""
    if node.args:
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    for name in ("input", "self", "x"):
        value = node.kwargs.get(name)
        if isinstance(value, fx.Node):
            return value
    return None


# --- readers by name: what a call says about the rank of its result and operands -----------------

_Reader = Callable[[Ranks, fx.Node, _Arguments], None]


def _read_conv(spatial: int) -> _Reader:
    def read(ranks: Ranks, node: fx.Node, call: _Arguments) -> None:
        source = _operand(node)
        if source is not None:
            ranks._keep(node, source)
            ranks._convolution(source, spatial)

    return read


def _read_linear(ranks: Ranks, node: fx.Node, call: _Arguments) -> None:
    source, weight = _operand(node), call.get(1, "weight")
    if source is not None and isinstance(weight, fx.Node) and ranks._bounds(weight) == (2, 2):
        ranks._keep(node, source)


def _read_pool(spatial: int) -> _Reader:
    def read(ranks: Ranks, node: fx.Node, call: _Arguments) -> None:
        source = _operand(node)
        if source is not None and not node.kwargs.get("return_indices"):
            ranks._keep(node, source)
            ranks._at_least(source, spatial + 1)

    return read


def _read_resize(ranks: Ranks, node: fx.Node, call: _Arguments) -> None:
    source = _operand(node)
    if source is not None:
        ranks._keep(node, source)
        ranks._resize(source, call.get(3, "mode", default="nearest"))


def _read_batchnorm(ranks: Ranks, node: fx.Node, call: _Arguments) -> None:
    source = _operand(node)
    if source is not None:
        ranks._keep(node, source)
        ranks._at_least(source, 2)


def _read_flatten(ranks: Ranks, node: fx.Node, call: _Arguments) -> None:
    source = _operand(node)
    if source is not None:
        start = call.get(1, "start_dim", default=0)
        ranks._flatten(node, source, start, call.get(2, "end_dim", default=-1))


def _read_unflatten(ranks: Ranks, node: fx.Node, call: _Arguments) -> None:
    source = _operand(node)
    if source is not None:
        ranks._unflatten(node, source, call.get(2, "sizes"))


def _read_sizes(*names: str, keeps_order: bool = False) -> _Reader:
    """Sizes or dimensions, one per dimension of the result."""

    def read(ranks: Ranks, node: fx.Node, call: _Arguments) -> None:
        source = _operand(node)
        sizes = call.rest(*names)
        if isinstance(sizes, fx.Node):
            if sizes not in ranks._numbers:
                return
            if _is_shape(sizes):  # x.view(y.shape)
                like = sizes.args[0]
                assert isinstance(like, fx.Node)
                ranks._shift(node, like, 0)
                return
            count = 1 if _is_one_number(sizes) else 0
        elif isinstance(sizes, int):
            count = 1
        elif isinstance(sizes, (tuple, list)):
            count = len(sizes)
        else:
            return
        ranks._tensors.add(node)
        if count and not any(isinstance(size, slice) for size in _sequence(sizes)):
            ranks._set(node, count)
            if keeps_order and source is not None:
                ranks._set(source, count)

    return read


def _sequence(sizes: object) -> Iterable[object]:
    return sizes if isinstance(sizes, (tuple, list)) else (sizes,)


def _is_shape(node: fx.Node) -> bool:
    if node.target is getattr:
        return str(node.args[1]) == "shape"
    return node.target == "size" and len(node.args) == 1 and not node.kwargs


def _is_one_number(node: fx.Node) -> bool:
    """Whether a value is one int, not a tuple of them."""
    if node.target is operator.getitem:
        return isinstance(node.args[1], int)
    if node.op == "call_method":
        return node.target != "size" or len(node.args) > 1 or bool(node.kwargs)
    return False


def _read_like(ranks: Ranks, node: fx.Node, call: _Arguments) -> None:
    other = call.get(1, "other")
    if isinstance(other, fx.Node):
        ranks._shift(node, other, 0)


def _read_unsqueeze(ranks: Ranks, node: fx.Node, call: _Arguments) -> None:
    source = _operand(node)
    if source is not None:
        ranks._shift(node, source, 1)


def _read_select(ranks: Ranks, node: fx.Node, call: _Arguments) -> None:
    source = _operand(node)
    if source is not None:
        ranks._shift(node, source, -1)


def _read_cat(change: int) -> _Reader:
    def read(ranks: Ranks, node: fx.Node, call: _Arguments) -> None:
        tensors = call.get(0, "tensors")
        if isinstance(tensors, fx.Node):
            if tensors in ranks._lists:
                source, difference = ranks._lists[tensors]
                ranks._shift(node, source, difference + change)
            return
        for tensor in tensors or ():
            if isinstance(tensor, fx.Node):
                ranks._shift(node, tensor, change)

    return read


def _read_parts(change: int) -> _Reader:
    """chunk, split: a list of values of the rank of the source; unbind: one less."""

    def read(ranks: Ranks, node: fx.Node, call: _Arguments) -> None:
        source = _operand(node)
        if source is not None:
            ranks._tensors.add(source)
            ranks._lists[node] = source, change

    return read


def _read_matmul(ranks: Ranks, node: fx.Node, call: _Arguments) -> None:
    ranks._broadcast(node, node.all_input_nodes, least=2)


def _read_bmm(ranks: Ranks, node: fx.Node, call: _Arguments) -> None:
    for each in (node, *node.all_input_nodes):
        ranks._set(each, 3)


def _read_transpose(ranks: Ranks, node: fx.Node, call: _Arguments) -> None:
    source = _operand(node)
    if source is None:
        return
    ranks._keep(node, source)
    for dim in (call.get(1, "dim0"), call.get(2, "dim1")):
        if isinstance(dim, int):
            ranks._at_least(source, dim + 1 if dim >= 0 else -dim)


def _read_einsum(ranks: Ranks, node: fx.Node, call: _Arguments) -> None:
    equation, *operands = node.args
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        return
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    inputs, output = equation.replace(" ", "").split("->")
    ranks._set(node, len(output))
    for letters, operand in zip(inputs.split(","), operands, strict=False):
        if isinstance(operand, fx.Node):
            ranks._set(operand, len(letters))


_MODULES = "torch.nn.modules."

# Files of torch.nn.modules whose classes return the rank they are given.
_KEEP_FAMILIES = words(
    "batchnorm instancenorm normalization pooling activation dropout upsampling padding linear "
    "pixelshuffle channelshuffle"
)

_RESIZES = {"linear": 3, "bilinear": 4, "bicubic": 4, "trilinear": 5}

_IN_PLACE_OPERATORS = words("iadd isub imul itruediv ifloordiv imod ipow iand ior ixor")

_BINARY_OPERATORS = words(
    "add sub mul truediv floordiv mod pow and_ or_ xor eq ne lt le gt ge neg pos abs invert"
)

_BROADCASTING = words(
    "add sub subtract rsub mul multiply div divide true_divide floor_divide remainder fmod pow "
    "maximum minimum fmin fmax where lerp addcmul addcdiv clamp clip clamp_min clamp_max eq ne lt "
    "le gt ge masked_fill logical_and logical_or logical_xor bitwise_and bitwise_or atan2 "
    "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __pow__"
)

# The result has the rank of the first operand.
_KEEPING = words(
    "neg negative abs absolute exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal "
    "sin cos tan tanh sigmoid sign round floor ceil trunc frac erf relu relu6 gelu silu mish elu "
    "celu selu hardswish hardsigmoid hardtanh hardshrink softshrink tanhshrink softplus softsign "
    "leaky_relu prelu rrelu threshold logsigmoid glu softmax log_softmax softmin normalize dropout "
    "dropout1d dropout2d dropout3d alpha_dropout feature_dropout nan_to_num logical_not isnan "
    "isinf isfinite cumsum cumprod roll flip index_select repeat_interleave gather scatter "
    "scatter_add index_add index_fill index_copy sort argsort contiguous clone detach to type "
    "type_as float double half bfloat16 int long bool cpu cuda requires_grad_ zeros_like ones_like "
    "full_like empty_like rand_like randn_like pad narrow t adjoint movedim moveaxis swapaxes "
    "swapdims layer_norm group_norm local_response_norm rms_norm pixel_shuffle pixel_unshuffle "
    "channel_shuffle native_channel_shuffle scaled_dot_product_attention tril triu masked_scatter "
    "fill zero copy __iadd__ __isub__ __imul__ __itruediv__"
) - {"sort"}

_REDUCING = words("mean sum amax amin prod std var norm logsumexp argmax argmin all any")
_KEEPDIM_AT = {"std": 3, "var": 3, "norm": 3}

_READERS: dict[str, _Reader] = {
    **{f"conv{n}d": _read_conv(n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _read_conv(n) for n in (1, 2, 3)},
    **{
        f"{kind}{n}d": _read_pool(n)
        for kind in ("max_pool", "avg_pool", "lp_pool", "adaptive_avg_pool", "adaptive_max_pool")
        for n in (1, 2, 3)
    },
    "linear": _read_linear,
    "batch_norm": _read_batchnorm,
    "instance_norm": _read_batchnorm,
    "interpolate": _read_resize,
    "upsample": _read_resize,
    "flatten": _read_flatten,
    "unflatten": _read_unflatten,
    "view": _read_sizes("size", "shape"),
    "reshape": _read_sizes("shape"),
    "expand": _read_sizes("size"),
    "repeat": _read_sizes("repeats"),
    "permute": _read_sizes("dims", keeps_order=True),
    "view_as": _read_like,
    "reshape_as": _read_like,
    "expand_as": _read_like,
    "unsqueeze": _read_unsqueeze,
    "select": _read_select,
    "cat": _read_cat(0),
    "concat": _read_cat(0),
    "concatenate": _read_cat(0),
    "stack": _read_cat(1),
    "chunk": _read_parts(0),
    "split": _read_parts(0),
    "split_with_sizes": _read_parts(0),
    "tensor_split": _read_parts(0),
    "unbind": _read_parts(-1),
    "matmul": _read_matmul,
    "__matmul__": _read_matmul,
    "bmm": _read_bmm,
    "transpose": _read_transpose,
    "einsum": _read_einsum,
}
