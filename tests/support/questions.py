# ruff: noqa: F401 - the questions use what is imported here
"""Questions that Python code can ask a tensor.

Each is an expression over `y`, a traced value, `x`, the model's input, and `s`, the module; or
statements that set `a`. The names in it are those of this file.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import copy
import dataclasses
import functools
import inspect
import io
import math
import numbers
import operator
import pickle
import sys
import textwrap
import types
import typing
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@functools.singledispatch
def dispatched(value: object) -> bool:
    return False


@dispatched.register
def _(value: Tensor) -> bool:
    return True


@functools.lru_cache
def remembered(value: object) -> bool:
    return True


def is_same(a: object, b: object) -> bool:
    return a is b


def is_plain(value: object) -> bool:
    return type(value) is Tensor


def has_default(value: object, kind: Any = type) -> bool:
    return kind(value) is Tensor


def printed(value: object) -> str:
    buffer = io.StringIO()
    print(value, file=buffer)
    return buffer.getvalue()


@dataclasses.dataclass
class Held:
    value: Any


class Named(typing.NamedTuple):
    value: Any


class Checked(typing.Protocol):
    def relu(self) -> Tensor: ...


class Numeric(abc.ABC):  # noqa: B024
    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return issubclass(other, Tensor)


_ATTRIBUTES = sorted(n for n in dir(Tensor) if not callable(getattr(Tensor, n)) and n != "names")
_TENSOR_ATTRIBUTES = [n for n in _ATTRIBUTES if not n.startswith("__")]

CLASSES = """
type(y) is Tensor
type(y) is torch.Tensor
type(y) is not Tensor
type(y) == Tensor
type(y) != Tensor
type(y) in (Tensor, nn.Parameter)
type(y) in {Tensor}
type(y) in {Tensor: 1}
{Tensor: True}.get(type(y), False)
type(y).__name__ == "Tensor"
type(y).__module__.startswith("torch")
str(type(y)) == "<class 'torch.Tensor'>"
issubclass(type(y), Tensor)
issubclass(y.__class__, Tensor)
y.__class__ is Tensor
y.__class__ == Tensor
y.__class__.__name__ == "Tensor"
Tensor in type(y).__mro__
isinstance(y, Tensor)
isinstance(y, (list, tuple))
isinstance(y, Tensor | list)
isinstance(y, nn.Parameter)
isinstance(y, torch.nn.Buffer)
isinstance(y, (int, float))
isinstance(y, numbers.Number)
isinstance(y, collections.abc.Iterable)
isinstance(y, collections.abc.Sequence)
isinstance(y, collections.abc.Hashable)
isinstance(y, collections.abc.Callable)
isinstance(y, Numeric)
isinstance(y, type)
isinstance(y, object)
isinstance(type(y), type)
isinstance(y.shape, tuple)
isinstance(y.shape, torch.Size)
isinstance(y.shape, list)
isinstance(y.shape[1], int)
isinstance(y.shape[1], bool)
isinstance(y.dtype, torch.dtype)
isinstance(y.device, torch.device)
isinstance(y.device.type, str)
isinstance(y.size(), torch.Size)
isinstance(y.size(1), int)
isinstance(y.dim(), int)
isinstance(y.is_cuda, bool)
isinstance(y.item if False else y, Tensor)
isinstance(y.sum().item(), float)
isinstance(y.tolist(), list)
isinstance([y], list)
isinstance(Held(y).value, Tensor)
isinstance(Named(y).value, Tensor)
type(x) is Tensor
x.__class__ is Tensor
isinstance(x, Tensor)
type(s.c.weight) is nn.Parameter
isinstance(s.c.weight, nn.Parameter)
isinstance(s.c.weight, Tensor)
type(s.b.running_mean) is Tensor
isinstance(s.b.running_mean, nn.Parameter)
type(s.c) is nn.Conv2d
isinstance(s.c, nn.Conv2d)
type(y.shape) is torch.Size
type(y.shape) is tuple
type(y.shape[1]) is int
type(y.dtype) is torch.dtype
type(y.device) is torch.device
type(y.device.type) is str
type(y.is_cuda) is bool
type(y.size(0)) is int
type(y.numel()) is int
type(y.tolist()) is list
type(y.sum().item()) is float
type(y + 1) is Tensor
type(y[0]) is Tensor
type(y.chunk(2, 1)) is tuple
type(y.chunk(2, 1)[0]) is Tensor
type(y.max(1)).__name__ == "max"
torch.jit.isinstance(y, Tensor)
torch.jit.isinstance(y, typing.List[Tensor])
torch.jit.isinstance([y], typing.List[Tensor])
torch.is_tensor(y)
torch.is_tensor(y.shape)
torch.as_tensor(y) is y
torch.as_tensor(data=y).sum() > 0
torch.as_tensor(y, dtype=torch.float64).dtype == torch.float64
torch.as_tensor(y, dtype=None, device=y.device).numel() > 3
torch.as_tensor(y.shape).sum() > 9
torch.as_tensor(y.shape[1]) > 2
torch.as_tensor([y.shape[1], 2])[0] > 2
torch.as_tensor([y.mean(), 2.0])[0] > 2
torch.as_tensor(2.0) > 1
torch.asarray(y).sum() > 0
torch.is_storage(y)
torch.is_floating_point(y)
torch.is_complex(y)
torch.is_nonzero(y.sum())
torch.is_conj(y)
torch.is_neg(y)
torch.is_inference(y)
torch.overrides.is_tensor_like(y)
torch.overrides.has_torch_function((y,))
torch.overrides.is_tensor_method_or_property(Tensor.relu)
torch.utils._pytree.tree_all(torch.is_tensor, y)
len(torch.utils._pytree.tree_leaves([y, y])) == 2
inspect.isclass(y)
inspect.isfunction(y)
inspect.isgenerator(y)
inspect.isroutine(y.relu)
dataclasses.is_dataclass(y)
is_plain(y)
has_default(y)
(lambda v: type(v))(y) is Tensor
list(map(type, [y])) == [Tensor]
next(map(type, [y])) is Tensor
functools.partial(type)(y) is Tensor
functools.partial(isinstance, y)(Tensor)
all(isinstance(v, Tensor) for v in [x, y])
[v for v in [1, y] if type(v) is Tensor] != []
__import__("builtins").type(y) is Tensor
__import__("builtins").isinstance(y, Tensor)
__import__("builtins").callable(y)
dispatched(y)
dispatched(y.shape)
dispatched.dispatch(type(y)) is not dispatched.dispatch(object)
getattr(type(y), "relu", None) is not None
hasattr(type(y), "nope")
callable(y)
callable(y.relu)
callable(y.shape)
callable(s.c)
inspect.ismethod(y.relu)
object.__class__.__call__(y.__class__) is Tensor if False else type(y) is Tensor
"""

NAMES = """
hasattr(y, "tensors")
hasattr(y, "mask")
hasattr(y, "shape")
hasattr(y, "node")
hasattr(y, "tracer")
hasattr(y, "keys")
hasattr(y, "root")
hasattr(y, "attr")
hasattr(y, "_node")
hasattr(y, "relu")
hasattr(y, "__len__")
hasattr(y, "__iter__")
hasattr(y, "__call__")
hasattr(y, "__dict__")
hasattr(y, "__index__")
hasattr(y, "__array__")
hasattr(y, "__array_ufunc__")
hasattr(y, "__torch_function__")
hasattr(y, "__next__")
hasattr(y, "__enter__")
hasattr(y, "__fx_create_arg__")
hasattr(y, "__deepcopy__")
hasattr(y, "tracer") or hasattr(y, "nope")
hasattr(y.shape, "numel")
hasattr(y.shape, "keys")
hasattr(y.dtype, "itemsize")
hasattr(y.dtype, "nope")
hasattr(y.device, "index")
hasattr(y.device, "nope")
hasattr(x, "mask")
hasattr(x, "shape")
hasattr(x, "relu")
hasattr(y + 1, "mask")
hasattr(y.view(-1), "mask")
hasattr(s.c.weight, "mask")
hasattr(y[0], "mask")
hasattr(y.chunk(2, 1), "mask")
hasattr(s, "nope")
hasattr(s, "c")
getattr(y, "mask", None) is None
getattr(y, "mask", None) is not None
getattr(y, "mask", 3) == 3
getattr(x, "mask", None) is None
getattr(y, "dtype", None) is None
getattr(y, "grad", None) is None
getattr(y, "grad_fn", None) is not None
getattr(y, "tensors", y) is y
getattr(s, "nope", None) is None
operator.attrgetter("nope")(y) if hasattr(y, "nope") else False
"mask" in dir(y)
"shape" in dir(y)
"mask" in vars(y)
"node" in vars(y)
"node" in y.__dict__
len(vars(y)) > 0
y.__doc__ is None
"traced" in (y.__doc__ or "")
y.__module__ == "torch"
y.__module__.startswith("fxrep")
y.__class__.__module__ == "torch"
y.__sizeof__() > 0
y.__len__() > 2
y.__hash__() == hash(y)
y.__repr__().startswith("tensor")
y.__reduce_ex__(2) is None
inspect.getattr_static(y, "node", None) is None
inspect.getmembers(y, lambda v: v == 3) == []
y.nope if hasattr(y, "nope") else False
"""

IDENTITY = """
type(s).forward is y
type(s).forward is type(s).forward
y is None
y is not None
y is y
y is x
y is not x
y is (y,)[0]
y is y.contiguous()
y is y.add_(0)
y is y.clone()
y is y.to(y.dtype)
y is y.float()
y is y.detach()
y.data is y
y is False
(y.is_cuda is False)
(y.is_cuda is True)
(y.is_contiguous() is True)
y.requires_grad is True
y.dtype is torch.float32
y.dtype is not torch.float32
y.dtype is x.dtype
y.dtype is s.c.weight.dtype
y.layout is torch.strided
y.device is x.device
y.shape is y.shape
y.shape[1] is x.shape[1]
s.c is s.c2
s.c is not s.c2
is_same(x, y)
is_same(y, y)
(lambda a, b: a is b)(y, x)
operator.is_(y, x)
operator.is_(y, y)
operator.is_(y.dtype, torch.float32)
operator.is_not(y, x)
any(v is y for v in [x, y])
any(v is None for v in [x, y])
any(map(functools.partial(operator.is_, y), [x, y]))
id(y) == id(x)
id(y) == id(y)
id(y.dtype) == id(torch.float32)
id(y) in {id(x)}
y in [x]
y in [y]
y in (y,)
y in [1, 2]
[x, y].index(y) == 1
[y].count(y) == 1
y == x
y != x
(y == x).all()
y == None
y.dtype == torch.float32
y.dtype != torch.float32
y.device == torch.device("cpu")
y.device == "cpu"
y.device.type == "cpu"
y.device.index is None
y.device.index == 0
y.layout == torch.strided
y.shape == x.shape
y.shape == (1, 4, 6, 6)
y.shape != (1, 4, 6, 6)
y.shape[2:] == x.shape[2:]
y.shape[1] == 4
y.shape[1] != 4
y.shape[-1] > 3
y.size(1) == 4
y.size()[1] == 4
y.shape.numel() == 3
tuple(y.shape) == (1, 4, 6, 6)
list(y.shape) == [1, 4, 6, 6]
torch.Size(y.shape) == y.shape
torch.equal(y, x)
torch.allclose(y, x)
torch.is_same_size(y, x)
weakref.ref(y)() is y
sys.getrefcount(y) > 2
y.data_ptr() == x.data_ptr()
y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
"""

LOOKUPS = """
y.dtype in (torch.float16, torch.float32)
y.dtype in [torch.float16, torch.float32]
y.dtype in {torch.float16, torch.float32}
y.dtype in {torch.float32: 1}
y.dtype in frozenset({torch.float32})
{torch.float32: True}.get(y.dtype, False)
{torch.float32: True, torch.float64: False}[y.dtype]
{"torch.float32": True}.get(str(y.dtype), False)
collections.defaultdict(bool, {torch.float32: True})[y.dtype]
collections.Counter([y.dtype])[torch.float32] == 1
y.shape[1] in {1, 3}
y.shape[1] in {1, 4}
y.shape[1] in (1, 4)
y.shape[1] in [1, 3]
y.shape[1] in {4: 1}
y.shape[1] in range(3)
y.shape[1] in range(8)
{4: True}.get(y.shape[1], False)
y.shape in {(1, 4, 6, 6)}
y.shape in [(1, 4, 6, 6)]
{(1, 4, 6, 6): True}.get(y.shape, False)
{(1, 4, 6, 6): True}.get(tuple(y.shape), False)
4 in y.shape
7 in y.shape
y.ndim in {4}
y.dim() in {3}
y.device in {torch.device("cpu")}
y.device.type in {"cpu"}
y.device.type in ("cuda", "cpu")
y.device.type in "cpu cuda"
{"cpu": True}.get(y.device.type, False)
{torch.strided: True}.get(y.layout, False)
y in {x}
y in {y}
y in {x: 1}
{y: True}.get(y, False)
{y: True}.get(x, False)
len({x, y}) == 2
len({y.shape[1], 4}) == 1
len({y.dtype, torch.float32}) == 1
set([y]) == {y}
dict([(y, 1)]).get(y) == 1
dict.fromkeys([y.dtype]) == {torch.float32: None}
remembered(y)
remembered(y.dtype) == remembered(torch.float32)
remembered.cache_info().currsize > 99
hash(y) == hash(y)
hash(y) == hash(x)
hash(y.dtype) == hash(torch.float32)
hash(y.shape) == hash((1, 4, 6, 6))
hash(y.shape[1]) == 4
hash((y, 1)) == 0
[10, 20][y.is_cuda] == 10
[0, 1, 0, 0, 1, 0, 1][y.shape[1]]
"ab"[y.is_cuda] == "a"
(0, 1)[y.dim() == 4]
[1, 2, 3, 4, 5][: y.shape[1]] == [1, 2, 3, 4]
weakref.WeakKeyDictionary({y: 1}).get(y) == 1
"""

TEXTS = """
str(y.dtype) == "torch.float32"
str(y.device) == "cpu"
str(y.shape) == "torch.Size([1, 4, 6, 6])"
str(y.shape[1]) == "4"
str(y.layout) == "torch.strided"
str(y).startswith("tensor")
repr(y).startswith("tensor")
repr(y.dtype) == "torch.float32"
repr(y.shape[1]) == "4"
ascii(y.dtype) == "torch.float32"
format(y.dtype) == "torch.float32"
format(y.shape[1], "d") == "4"
format(y.sum(), ".3f") != ""
"float" in str(y.dtype)
"Proxy" in str(y)
"cpu" in str(y.device)
f"{y.shape[1]}" == "4"
f"{y.dtype}" == "torch.float32"
f"{y.device!s}" == "cpu"
f"{y.device!r}".startswith("device")
f"{y.dim()}" == "4"
f"{y.mean():.1f}" == "nan"
"%s" % y.dtype == "torch.float32"
"%d" % y.shape[1] == "4"
"%r" % (y.dtype,) == "torch.float32"
"{}".format(y.dtype) == "torch.float32"
"{:d}".format(y.shape[1]) == "4"
"{0.dtype}".format(y) == "torch.float32"
"{0.shape[1]}".format(y) == "4"
"".join([str(y.shape[1])]) == "4"
y.type() == "torch.FloatTensor"
y.device.type.startswith("c")
y.device.type.upper() == "CPU"
len(y.device.type) == 3
str(y.dtype).split(".")[-1] == "float32"
printed(y).startswith("tensor")
printed(y.shape[1]) == "4\\n"
str([y]).startswith("[tensor")
str((y.dtype,)) == "(torch.float32,)"
str(Held(y.dtype)) == "Held(value=torch.float32)"
repr({"a": y.shape[1]}) == "{'a': 4}"
str(Exception(y.dtype)) == "torch.float32"
int(str(y.shape[1])) == 4
bytes(str(y.dtype), "ascii") == b"torch.float32"
textwrap.shorten(str(y.dtype), 99) == "torch.float32"
np.dtype(str(y.dtype).split(".")[1]) == np.float32
"""

NUMBERS = """
len(y) == 1
len(y) > 1
len(y.shape) == 4
len(y.size()) == 3
len(y.chunk(2, 1)) == 2
len(y.split([1, 3], 1)) == 2
len(y[0]) == 4
len([y, y]) == 2
bool(y.sum())
bool(y.shape)
bool(y.shape[1])
not y.sum()
not y.shape
y.sum() and True
y.shape[1] or False
y.is_cuda
not y.is_cuda
y.sum() > 0
int(y.shape[1]) == 4
int(y.sum()) == 0
int(y.is_cuda) == 0
float(y.sum()) > 0
float(y.shape[1]) == 4.0
complex(y.sum()).real > 0
complex(y.shape[1]).real > 3
round(y.shape[1] / 3) == 1
round(y.sum().item(), 1) > 0
round(y.sum()).dim() == 0
math.floor(y.shape[1] / 3) == 1
math.ceil(y.shape[1] / 3) == 2
math.trunc(y.shape[1] / 3) == 1
math.sqrt(y.shape[1]) == 2
math.isnan(y.sum())
math.gcd(y.shape[1], 6) == 2
math.prod(y.shape) > 99
divmod(y.shape[1], 3) == (1, 1)
divmod(y.shape[1], 3)[1] == 1
pow(y.shape[1], 2) == 16
pow(y.shape[1], 2, 3) == 1
pow(2, y.shape[1]) == 16
abs(y.shape[1]) == 4
abs(y).sum() > 0
-y.shape[1] == -4
~y.shape[1] == -5
y.shape[1] // 3 == 1
y.shape[1] % 2 == 0
y.shape[1] & 1
y.shape[1] << 1 == 8
3 < y.shape[1] < 5
sum(y.shape) == 17
sum([y.sum(), x.sum()]) > 0
max(y.shape[1], 3) == 4
min(y.shape[1], 3) == 3
max(y.shape) == 6
max([y.sum(), x.sum()]) > 0
sorted(y.shape) == [1, 4, 6, 6]
sorted([y.shape[1], 3]) == [3, 4]
list(reversed(y.shape)) == [6, 6, 4, 1]
reversed(y).shape[0] == 1
list(enumerate(y.shape))[1] == (1, 4)
list(zip(y.shape, "abcd"))[1] == (4, "b")
list(map(int, y.shape)) == [1, 4, 6, 6]
list(filter(None, y.shape)) == [1, 4, 6, 6]
any(v == 4 for v in y.shape)
all(y.shape)
any(y.flatten() > 0)
[v for v in y.shape if v == 4] != []
[*y.shape] == [1, 4, 6, 6]
(*y.shape,)[1] == 4
len([*y]) == 1
next(iter(y.shape)) == 1
next(iter(y)).dim() == 3
list(range(y.shape[1])) == [0, 1, 2, 3]
len(range(y.shape[1])) == 4
[0] * y.shape[1] == [0, 0, 0, 0]
"a" * y.shape[1] == "aaaa"
chr(y.shape[1]) == "\\x04"
hex(y.shape[1]) == "0x4"
bin(y.shape[1]) == "0b100"
bytes(y.shape[1]) == b"\\0\\0\\0\\0"
operator.index(y.shape[1]) == 4
operator.length_hint(y) == 1
operator.truth(y.sum())
operator.not_(y.sum())
operator.eq(y.shape[1], 4)
operator.lt(y.shape[1], 4)
operator.contains(y.shape, 4)
operator.contains({4}, y.shape[1])
operator.countOf(y.shape, 6) == 2
operator.indexOf(y.shape, 4) == 1
operator.itemgetter(1)(y.shape) == 4
operator.attrgetter("dtype")(y) == torch.float32
operator.attrgetter("shape")(y)[1] == 4
operator.methodcaller("size", 1)(y) == 4
operator.concat(y.shape, (1,)) == (1, 4, 6, 6, 1)
y.shape + (1,) == (1, 4, 6, 6, 1)
y.shape[1:] == (4, 6, 6)
y.shape.index(4) == 1
y.shape.count(6) == 2
y.item if False else y.sum().item() > 0
y.sum().tolist() > 0
y.tolist()[0][0][0][0] > 0
y.flatten().tolist()[0] > 0
y.numel() > 3
y.nelement() == 144
y.element_size() == 4
y.itemsize == 4
y.stride() == (144, 36, 6, 1)
y.stride(0) == 144
y.storage_offset() == 0
y.get_device() == -1
y.dim() == 4
y.ndim == 4
y.ndimension() == 3
y.is_contiguous()
y.is_contiguous(memory_format=torch.channels_last)
y.is_floating_point()
y.is_complex()
y.is_signed()
y.is_same_size(x)
y.is_set_to(x)
y.is_pinned()
y.is_shared()
y.is_inference()
y.is_coalesced() if y.is_sparse else False
y.has_names()
y.equal(x)
y.allclose(x)
y.any()
y.isnan().any()
torch.numel(y) == 144
torch.argmax(y) == 3
torch.finfo(y.dtype).bits == 32
torch.finfo(y.dtype).eps > 1e-9
torch.iinfo(y.long().dtype).bits == 64
torch.can_cast(y.dtype, torch.float16)
torch.promote_types(y.dtype, torch.float32) == torch.float32
torch.result_type(y, 1.0) == torch.float32
torch.get_device(y) == -1
torch.broadcast_shapes(y.shape, (1,)) == y.shape
y.detach().numpy().dtype == np.float32
np.asarray(y.detach()).ndim == 4
np.ndim(y.detach()) == 4
np.shape(y.detach()) == (1, 4, 6, 6)
np.array(y.shape).sum() == 17
np.prod(y.shape) == 144
np.isscalar(y)
np.issubdtype(y.detach().numpy().dtype, np.floating)
np.float32(y.sum().item()) > 0
y.__bool__() if y.numel() == 1 else False
y.__int__() if y.numel() == 1 else False
y.__eq__(x).all()
y.__contains__(3.0)
3.0 in y
"""

COPIES = """
copy.copy(y) is y
copy.copy(y).shape == y.shape
copy.copy(y.shape) == (1, 4, 6, 6)
copy.deepcopy(y.detach()) is y
copy.deepcopy(y.detach()).dim() == 4
copy.deepcopy(y.dtype) is torch.float32
copy.deepcopy([y.shape[1]]) == [4]
copy.copy([y])[0] is y
dataclasses.asdict(Held(y.shape[1])) == {"value": 4}
dataclasses.replace(Held(y)).value is y
pickle.loads(pickle.dumps(y.detach())).dim() == 4
pickle.loads(pickle.dumps(y.dtype)) == torch.float32
pickle.dumps(y.shape[1]) == pickle.dumps(4)
len(pickle.dumps(y.detach())) > 10
Held(y) == Held(x)
Named(y.shape[1]) == Named(4)
Named(y.dtype) == Named(torch.float32)
(y.shape[1], 3) == (4, 3)
[y.dtype] == [torch.float32]
{"a": y.shape[1]} == {"a": 4}
(y.shape[1], 3) < (4, 4)
"""

MODES = """
torch.is_grad_enabled()
torch.is_inference_mode_enabled()
torch.is_autocast_enabled()
torch.is_autocast_enabled("cpu")
torch.is_autocast_cpu_enabled()
torch.get_autocast_dtype("cpu") == torch.bfloat16
torch.get_autocast_cpu_dtype() == torch.bfloat16
torch.is_autocast_cache_enabled()
torch._C.is_grad_enabled()
getattr(torch, "is_grad_enabled")()
{"mode": [torch.is_grad_enabled]}["mode"][0]()
getattr(torch, "_C".strip()).is_grad_enabled()
__import__("torch").is_grad_enabled()
torch.autograd.grad_mode.torch.is_grad_enabled()
operator.attrgetter("is_grad_enabled")(torch)()
torch.get_default_dtype() == torch.float32
torch.get_default_device().type == "cpu"
torch.are_deterministic_algorithms_enabled()
torch.get_deterministic_debug_mode() == 0
torch.is_anomaly_enabled()
torch.get_float32_matmul_precision() == "highest"
torch.jit.is_scripting()
torch.jit.is_tracing()
torch.compiler.is_compiling()
torch.compiler.is_exporting()
torch.compiler.is_dynamo_compiling()
torch.onnx.is_in_onnx_export()
torch.fx._symbolic_trace.is_fx_tracing()
torch.fx._symbolic_trace.is_fx_symbolic_tracing()
torch.overrides.is_torch_function_mode_enabled() if hasattr(torch.overrides, "x") else False
torch._C._len_torch_function_stack() > 0
torch._C._len_torch_dispatch_stack() > 0
torch._C._is_torch_function_mode_enabled()
torch._C._get_tracing_state() is None
y.requires_grad
y.requires_grad == True
s.c.weight.requires_grad
x.requires_grad
y.is_leaf
y.grad_fn is None
y.grad is None
y.grad_fn
y._version == 0
y._base is None
y.output_nr == 0
y.retains_grad
y.names == (None,) * 4
y.is_inference()
y._is_view()
type(y.grad_fn).__name__ == "ConvolutionBackward0"
s.training
s.c.training
torch.zeros(1).dtype == torch.float32
torch.zeros(1).requires_grad
torch.ones(1, requires_grad=True).grad_fn is None
(s.c.weight * 2).requires_grad
(s.c.weight * 2).grad_fn is None
torch.backends.cudnn.enabled
torch.backends.mkldnn.enabled
torch.backends.cudnn.deterministic
torch.backends.cuda.flash_sdp_enabled()
torch.backends.cuda.math_sdp_enabled()
torch.backends.mha.get_fastpath_enabled()
torch.autograd._profiler_enabled()
torch._C._autograd._profiler_enabled()
functools.partial(torch.is_grad_enabled)()
next(map(lambda ask: ask(), [torch.is_grad_enabled]))
torch.tensor(1.5).dtype == torch.float32
torch.ones(1).dtype.itemsize == 4
(torch.ones(1) * 2).dtype == torch.float32
torch.get_default_dtype() is torch.float32
torch.ones(1).is_inference()
torch.ones(1).requires_grad
isinstance(x, nn.Parameter)
isinstance(x, (nn.Buffer, int))
isinstance(x.contiguous(), nn.Parameter)
type(x) is Tensor
"""

STATEMENTS: dict[str, str] = {
    "match_class": "match y:\n case Tensor(): a = True\n case _: a = False",
    "match_class_of_torch": "match y:\n case torch.Tensor(): a = True\n case _: a = False",
    "match_other_class": "match y:\n case list() | tuple(): a = True\n case _: a = False",
    "match_object": "match y:\n case object(nope=n): a = True\n case _: a = False",
    "match_attribute": "match y:\n case Tensor(ndim=4): a = True\n case _: a = False",
    "match_dtype": "match y:\n case Tensor(dtype=torch.float32): a = True\n case _: a = False",
    "match_value": "match y.dtype:\n case torch.float32: a = True\n case _: a = False",
    "match_literal": "match y.shape[1]:\n case 4: a = True\n case _: a = False",
    "match_text": "match y.device.type:\n case 'cpu': a = True\n case _: a = False",
    "match_int": "match y.shape[1]:\n case int(): a = True\n case _: a = False",
    "match_str": "match y.device.type:\n case str(): a = True\n case _: a = False",
    "match_none": "match y:\n case None: a = True\n case _: a = False",
    "match_true": "match y.is_cuda:\n case False: a = True\n case _: a = False",
    "match_shape": "match y.shape:\n case (n, 4, h, w): a = True\n case _: a = False",
    "match_list": "match y.shape:\n case [n, *rest]: a = True\n case _: a = False",
    "match_any_list": "match y.shape:\n case [*_]: a = True\n case _: a = False",
    "match_sequence": "match y:\n case [p]: a = True\n case _: a = False",
    "match_mapping": "match y:\n case {'a': p}: a = True\n case _: a = False",
    "match_pair": "match (y, x):\n case (Tensor(), None): a = True\n case _: a = False",
    "match_guard": "match y:\n case v if v.dim() == 4: a = True\n case _: a = False",
    "match_kind": "match type(y).__name__:\n case 'Tensor': a = True\n case _: a = False",
    "no_attribute": "try:\n y.nope\n a = False\nexcept AttributeError:\n a = True",
    "no_attribute_of_input": "try:\n x.nope\n a = False\nexcept AttributeError:\n a = True",
    "no_attribute_of_size": "try:\n y.shape.nope\n a = False\nexcept AttributeError:\n a = True",
    "no_attribute_of_dtype": "try:\n y.dtype.nope\n a = False\nexcept AttributeError:\n a = True",
    "no_method": "try:\n y.nope()\n a = False\nexcept AttributeError:\n a = True",
    "attribute": "try:\n y.shape\n a = False\nexcept AttributeError:\n a = True",
    "no_attribute_at_all": "try:\n y.node\n a = False\nexcept:\n a = True",
    "suppressed": "a = True\nwith contextlib.suppress(AttributeError):\n y.nope\n a = False",
    "suppressed_error": "a = True\nwith contextlib.suppress(RuntimeError):\n y.view(7)\n a = False",
    "expected_shape": "try:\n y.view(7)\n a = False\nexcept RuntimeError:\n a = True",
    "expected_shape_fits": "try:\n y.view(-1)\n a = False\nexcept RuntimeError:\n a = True",
    "expected_add": "try:\n y + torch.ones(5)\n a = False\nexcept RuntimeError:\n a = True",
    "expected_layer": "try:\n s.wide(y)\n a = False\nexcept RuntimeError:\n a = True",
    "expected_layer_at_all": "try:\n s.wide(y)\n a = False\nexcept Exception:\n a = True",
    "expected_layer_base": "try:\n s.wide(y)\n a = False\nexcept BaseException:\n a = True",
    "expected_function": "try:\n F.linear(y, y)\n a = 0\nexcept RuntimeError:\n a = 1",
    "expected_argument": "try:\n s.c(y, lengths=3)\n a = False\nexcept TypeError:\n a = True",
    "expected_arguments": "try:\n s.c(y, y, y)\n a = False\nexcept TypeError:\n a = True",
    "expected_no_argument": "try:\n s.c()\n a = False\nexcept TypeError:\n a = True",
    "expected_own_argument": "try:\n s.own(y, 3)\n a = False\nexcept TypeError:\n a = True",
    "expected_opaque_argument": "try:\n s.odd(y, n=3)\n a = 0\nexcept TypeError:\n a = 1",
    "no_expected_argument": "try:\n s.c(y)\n a = False\nexcept TypeError:\n a = True",
    "expected_method": "try:\n y.relu(3)\n a = False\nexcept TypeError:\n a = True",
    "expected_sum": "try:\n y + 'a'\n a = False\nexcept TypeError:\n a = True",
    "expected_none": "try:\n y + None\n a = False\nexcept TypeError:\n a = True",
    "expected_call": "try:\n y()\n a = False\nexcept TypeError:\n a = True",
    "expected_size_call": "try:\n y.shape()\n a = False\nexcept TypeError:\n a = True",
    "expected_range": "try:\n list(range(y.shape[1]))\n a = False\nexcept TypeError:\n a = True",
    "expected_int": "try:\n int(y.shape[1])\n a = 0\nexcept (TypeError, ValueError):\n a = 1",
    "expected_float": "try:\n float(y)\n a = 0\nexcept (TypeError, RuntimeError):\n a = 1",
    "expected_len": "try:\n len(y)\n a = False\nexcept TypeError:\n a = True",
    "expected_iter": "try:\n iter(y)\n a = False\nexcept TypeError:\n a = True",
    "expected_next": "try:\n next(y)\n a = False\nexcept TypeError:\n a = True",
    "expected_hash": "try:\n hash(y)\n a = False\nexcept TypeError:\n a = True",
    "expected_index": "try:\n y[0, 0, 0, 0, 0]\n a = False\nexcept IndexError:\n a = True",
    "expected_size": "try:\n y.shape[9]\n a = False\nexcept IndexError:\n a = True",
    "expected_axis": "try:\n y.size(9)\n a = False\nexcept IndexError:\n a = True",
    "expected_ranks": "try:\n n, c, l = y.shape\n a = False\nexcept ValueError:\n a = True",
    "expected_values": "try:\n p, q = y\n a = False\nexcept ValueError:\n a = True",
    "expected_key": "try:\n {1: 2}[y.shape[1]]\n a = False\nexcept KeyError:\n a = True",
    "expected_dtype": "try:\n {torch.float16: 2}[y.dtype]\n a = False\nexcept KeyError:\n a = True",
    "expected_item": "try:\n y.item()\n a = False\nexcept (ValueError, RuntimeError):\n a = True",
    "expected_numpy": "try:\n y.numpy()\n a = False\nexcept RuntimeError:\n a = True",
    "expected_assert": "try:\n assert y.shape[1] == 4\n a = 0\nexcept AssertionError:\n a = 1",
    "expected_deepcopy": "try:\n copy.deepcopy(y)\n a = False\nexcept RuntimeError:\n a = True",
    "expected_import": "try:\n import nothing_of_this_name\n a = 0\nexcept ImportError:\n a = 1",
    "expected_join": "try:\n ''.join([y.device.type])\n a = False\nexcept TypeError:\n a = True",
    "expected_with": "try:\n with y: pass\n a = 0\nexcept (TypeError, AttributeError):\n a = 1",
    "expected_delete": "try:\n del y.nope\n a = False\nexcept AttributeError:\n a = True",
    "expected_set": "try:\n y.shape = 3\n a = False\nexcept AttributeError:\n a = True",
    "expected_memory": "try:\n memoryview(y)\n a = False\nexcept TypeError:\n a = True",
    "expected_order": "try:\n sorted([y, x])\n a = 0\nexcept RuntimeError:\n a = 1",
    "expected_divmod": "try:\n divmod(y, 2)\n a = False\nexcept TypeError:\n a = True",
    "finally": "a = False\ntry:\n y.view(-1)\nfinally:\n a = True",
    "else": "try:\n pass\nexcept RuntimeError:\n a = True\nelse:\n a = y.dtype is None",
    "variable": "d = y.dtype\na = d is torch.float32",
    "variables": "p = q = y\na = p is q",
    "walrus": "a = (d := y.dtype) is torch.float32",
    "rebound": "p = y\ny = s.c(x)\na = p is y",
    "in_place": "p = y\ny += 1\na = p is y",
    "set_attribute": "y.tag = 1\na = hasattr(y, 'tag')",
    "set_on_input": "x.tag = 1\na = hasattr(x, 'tag')",
    "nested": "def ask():\n return y.dtype is torch.float32\na = ask()",
    "nested_type": "def ask():\n return type(y) is Tensor\na = ask()",
    "local_import": "import builtins\na = builtins.type(y) is Tensor",
    "local_mode": "from torch import is_grad_enabled as asked\na = asked()",
    "kept_builtin": "kind = type\na = kind(y) is Tensor",
    "kept_class": "K = type(y)\na = K is Tensor",
    "loop": "a = False\nfor v in (x, y):\n a = a or v is y",
    "modules": "a = False\nfor m in (s.c, s.c2):\n a = a or m is s.c2",
    "warned": "import warnings\nwith warnings.catch_warnings(record=True) as w:\n"
    " warnings.warn(f'{y.shape[1]}')\na = str(w[0].message) == '4' if w else False",
    "no_grad": "with torch.no_grad():\n z = y * 1\na = z.requires_grad",
    "inference": "with torch.inference_mode():\n z = y * 1\na = z.is_inference()",
    "autocast": "with torch.autocast('cpu'):\n z = s.c2(x)\na = z.dtype == torch.bfloat16",
    "default_dtype": "torch.set_default_dtype(torch.float64)\nz = torch.zeros(1)\n"
    "torch.set_default_dtype(torch.float32)\na = z.dtype == torch.float64",
    "while": "n = 0\nwhile n < y.shape[1]:\n n += 1\na = n == 4",
    "unpack": "n, c, h, w = y.shape\na = c == 4",
    "unpack_some": "n, *rest = y.shape\na = len(rest) == 3",
    "generator": "g = (v for v in y.shape)\na = next(g) == 1",
    "string_io": "b = io.StringIO()\nprint(y.ndim, end='', file=b)\na = b.getvalue() == '4'",
    "raise": "if y.shape[1] != 4:\n raise ValueError(f'{y.shape}')\na = True",
    "assert": "assert y.shape[1] == 4, y.shape\na = True",
    "asserted_type": "assert isinstance(y, Tensor)\na = True",
}


def questions() -> Iterator[tuple[str, str]]:
    for text in (CLASSES, NAMES, IDENTITY, LOOKUPS, TEXTS, NUMBERS, COPIES, MODES):
        for line in text.strip().splitlines():
            yield line, f"a = {line}"
    for name in _TENSOR_ATTRIBUTES:
        yield f"y.{name}", f"a = y.{name}"
        yield f"y.{name} is None", f"a = y.{name} is None"
        yield f"hasattr y.{name}", f"a = hasattr(y, '{name}')"
    yield from STATEMENTS.items()


# --- the places where a question can be asked ---------------------------------------------------

# Each defines `forward(s, x)`; QUESTION is an expression over `y` and `x`.
PLACES: dict[str, str] = {
    "helper": """
def ask(y, x): return QUESTION
def forward(s, x):
    y = s.c(x)
    return s.b(y) if ask(y, x) else s.c2(y)
""",
    "helper_of_helper": """
def first(y, x): return QUESTION
def ask(y, x): return first(y, x)
def forward(s, x):
    y = s.c(x)
    return s.b(y) if ask(y, x) else s.c2(y)
""",
    "lambda": """
ask = lambda y, x: QUESTION
def forward(s, x):
    y = s.c(x)
    return s.b(y) if ask(y, x) else s.c2(y)
""",
    "closure": """
def made():
    def ask(y, x): return QUESTION
    def forward(s, x):
        y = s.c(x)
        return s.b(y) if ask(y, x) else s.c2(y)
    return forward
forward = made()
""",
    "nested": """
def forward(s, x):
    def ask(): return QUESTION
    y = s.c(x)
    return s.b(y) if ask() else s.c2(y)
""",
    "default": """
def forward(s, x, ask=lambda y, x: QUESTION):
    y = s.c(x)
    return s.b(y) if ask(y, x) else s.c2(y)
""",
    "comprehension": """
def forward(s, x):
    y = s.c(x)
    return s.b(y) if [QUESTION for y in [y]][0] else s.c2(y)
""",
    "generator": """
def asked(y, x): yield QUESTION
def forward(s, x):
    y = s.c(x)
    return s.b(y) if next(asked(y, x)) else s.c2(y)
""",
    "attribute": """
def prepare(s): s.ask = lambda y, x: QUESTION
def forward(s, x):
    y = s.c(x)
    return s.b(y) if s.ask(y, x) else s.c2(y)
""",
    "partial": """
def question(flag, y, x): return QUESTION
ask = functools.partial(question, True)
def forward(s, x):
    y = s.c(x)
    return s.b(y) if ask(y, x) else s.c2(y)
""",
    "decorated": """
def decorated(f):
    @functools.wraps(f)
    def ask(y, x): return f(y, x)
    return ask
@decorated
def ask(y, x): return QUESTION
def forward(s, x):
    y = s.c(x)
    return s.b(y) if ask(y, x) else s.c2(y)
""",
    "decorator": """
def decorated(f):
    @functools.wraps(f)
    def ask(y, x): return f(QUESTION)
    return ask
@decorated
def ask(answer): return answer
def forward(s, x):
    y = s.c(x)
    return s.b(y) if ask(y, x) else s.c2(y)
""",
    "object": """
class Asks:
    def __call__(self, y, x): return QUESTION
ask = Asks()
def forward(s, x):
    y = s.c(x)
    return s.b(y) if ask(y, x) else s.c2(y)
""",
    "object_of_module": """
class Asks:
    def ask(self, y, x): return QUESTION
def prepare(s): s.helper = Asks()
def forward(s, x):
    y = s.c(x)
    return s.b(y) if s.helper.ask(y, x) else s.c2(y)
""",
    "class": """
class Asks:
    def __init__(self, y, x): self.answer = QUESTION
def forward(s, x):
    y = s.c(x)
    return s.b(y) if Asks(y, x).answer else s.c2(y)
""",
    "static_method": """
class Asks:
    @staticmethod
    def ask(y, x): return QUESTION
def forward(s, x):
    y = s.c(x)
    return s.b(y) if Asks.ask(y, x) else s.c2(y)
""",
    "class_method": """
class Asks:
    @classmethod
    def ask(cls, y, x): return QUESTION
def forward(s, x):
    y = s.c(x)
    return s.b(y) if Asks.ask(y, x) else s.c2(y)
""",
    "table": """
table = {"ask": lambda y, x: QUESTION}
def forward(s, x):
    y = s.c(x)
    return s.b(y) if table["ask"](y, x) else s.c2(y)
""",
    "list_of_module": """
def prepare(s): s.asks = [lambda y, x: QUESTION]
def forward(s, x):
    y = s.c(x)
    return s.b(y) if any(ask(y, x) for ask in s.asks) else s.c2(y)
""",
    "other_module": """
helpers = types.ModuleType("helpers")
exec("import torch\\nfrom torch import Tensor, nn\\ndef ask(y, x): return QUESTION", vars(helpers))
def forward(s, x):
    y = s.c(x)
    return s.b(y) if helpers.ask(y, x) else s.c2(y)
""",
    "module_of_other_module": """
helpers = types.ModuleType("helpers")
inner = helpers.inner = types.ModuleType("inner")
exec("import torch\\nfrom torch import Tensor, nn\\ndef ask(y, x): return QUESTION", vars(inner))
def forward(s, x):
    y = s.c(x)
    return s.b(y) if helpers.inner.ask(y, x) else s.c2(y)
""",
    "method": """
def prepare(s): type(s).ask = lambda s, y, x: QUESTION
def forward(s, x):
    y = s.c(x)
    return s.b(y) if s.ask(y, x) else s.c2(y)
""",
    "property": """
def prepare(s): type(s).ask = property(lambda s: lambda y, x: QUESTION)
def forward(s, x):
    y = s.c(x)
    return s.b(y) if s.ask(y, x) else s.c2(y)
""",
    "submodule": """
class Asks(nn.Module):
    def forward(self, y, x): return 1.0 if QUESTION else 0.0
def prepare(s): s.asks = Asks()
def forward(s, x):
    y = s.c(x)
    return s.b(y) * s.asks(y, x) + s.c2(y)
""",
    "unregistered": """
class Asks(nn.Module):
    def forward(self, y, x): return 1.0 if QUESTION else 0.0
def prepare(s): s.asks = [Asks()]
def forward(s, x):
    y = s.c(x)
    return s.b(y) * s.asks[0](y, x) + s.c2(y)
""",
    "method_of_submodule": """
class Asks(nn.Module):
    def ask(self, y, x): return QUESTION
def prepare(s): s.asks = Asks()
def forward(s, x):
    y = s.c(x)
    return s.b(y) if s.asks.ask(y, x) else s.c2(y)
""",
    "hook": """
def prepare(s): s.c.register_forward_hook(lambda m, x, y: y * 2 if QUESTION else y)
def forward(s, x):
    return s.b(s.c(x))
""",
    "local_import": """
def forward(s, x):
    import torch
    from torch import Tensor
    y = s.c(x)
    return s.b(y) if QUESTION else s.c2(y)
""",
    "base_class": """
class Base:
    def ask(s, y, x): return QUESTION
def prepare(s): type(s).__bases__ = (Base, *type(s).__bases__)
def forward(s, x):
    y = s.c(x)
    return s.b(y) if super(type(s), s).ask(y, x) else s.c2(y)
""",
    "deep_below": """
helpers = [{"kept": [[{n: (lambda y, x: QUESTION) for n in range(99)}]]}]
def forward(s, x):
    y = s.c(x)
    return s.b(y) if helpers[0]["kept"][0][0][98](y, x) else s.c2(y)
""",
    "computed_name": """
def prepare(s): type(s).ask_it = lambda s, y, x: QUESTION
def forward(s, x):
    y = s.c(x)
    return s.b(y) if getattr(s, "ask" + "_it"[:3])(y, x) else s.c2(y)
""",
    "made_at_run_time": """
def forward(s, x):
    y = s.c(x)
    ask = eval("lambda y, x: " + repr(s.c.bias is None)[:0] + "QUESTION")
    return s.b(y) if ask(y, x) else s.c2(y)
""",
    "map": """
def ask(y): x = y; return QUESTION
def forward(s, x):
    y = s.c(x)
    return s.b(y) if all(map(ask, [y])) else s.c2(y)
""",
    "sorted": """
def ask(y): x = y; return QUESTION
def forward(s, x):
    y = s.c(x)
    largest = max([1, 2], key=lambda n: ask(y) * n)
    return s.b(y) if sorted([y], key=ask) and largest == 2 else s.c2(y)
""",
}

# Where helpers get `y` as `x` too, by an operation that returns its operand.
SAME = {
    place: start + middle + end.replace("ask(y, x)", "ask(y, y.contiguous())")
    for place, code in PLACES.items()
    for start, middle, end in [code.rpartition("def forward")]
    if "ask(y, x)" in end and "QUESTION" not in end
}

# What no class of proxies can hear.
SILENT = [
    "y is x", "y is not x", "y is y.contiguous()", "y.dtype is torch.float32", "type(y) is Tensor",
    "id(y) == id(x)", "callable(y)", "torch.is_grad_enabled()", "hasattr(y, 'mask')",
    "isinstance(y, Tensor)", "y.is_cuda is False", "torch.get_default_dtype() == torch.float32",
    "y.shape[1] in {4}", "str(y.dtype) == 'torch.float32'", "y.__class__ is Tensor",
    "type(y.shape[1]) is int", "torch.jit.isinstance(y, Tensor)", "torch.is_tensor(y)",
]  # fmt: skip
