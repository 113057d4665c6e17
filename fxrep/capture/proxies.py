"""Traced values (fx proxies): in-place operators, types and lengths as the model's code sees them.

Given: `b = a; b += x; use(a)`. torch.fx's Proxy has no `__iadd__`, so Python rebinds b to a sum
and the trace uses the old a.
Result: `operator.iadd(a, x)` is a node, and a is written as the model writes it.
"""

from __future__ import annotations

import functools
import operator
import sys
import types
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute

from fxrep.capture.askers import accesses, asker, asks_for_class, asks_for_users
from fxrep.capture.hidden import cache_names, counts, is_message
from fxrep.ops.effects import effect
from fxrep.ops.values import is_size, value_type
from fxrep.words import words

if TYPE_CHECKING:
    from fxrep.capture.tracer import Tracer


class Unfaithful(fx.proxy.TraceError):
    """The graph would not do what the forward does."""


class ParameterWrite(Unfaithful):
    """The forward replaces parameters."""


class _TracedMixin:
    """What a Proxy lacks of a tensor; a question that has no certain answer is refused.

    What the user's code asks goes through `__getattribute__` or a special method; torch's own code
    sees the proxy as it is.
    """

    tracer: Tracer
    node: fx.Node

    def __getattribute__(self, name: str) -> Any:
        frame = sys._getframe(1)
        if name == "__class__":
            frame = asker(frame)
        tracer = _real(self, "tracer")
        if asks_for_users(frame) and not tracer.finished:
            return tracer.listener.without(_asked, self, name, frame)
        return _real(self, name)

    def __getattr__(self, name: str) -> TracedAttribute:
        # Python comes here with every AttributeError, so also with the one that a tensor raises.
        if asks_for_users(sys._getframe(1)) and not _real(self, "tracer").finished:
            raise AttributeError(f"'{_name_of(kind_of(self))}' object has no attribute '{name}'")
        return TracedAttribute(self, name)  # type: ignore[arg-type]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        record = super().__torch_function__  # type: ignore[misc]
        if not args or not is_traced(args[0]):
            return record(function, types, args, kwargs)
        return _real(args[0], "tracer").listener.without(record, function, types, args, kwargs)

    def __hash__(self) -> int:
        own = _real(self, "__dict__")
        if "_hash" in own:  # a table that holds it may be emptied after the trace
            return int(own["_hash"])
        if asks_for_users(sys._getframe(1)) and not _real(self, "tracer").finished:
            number = self.tracer.number(self)  # type: ignore[arg-type]
            if type(number) is int:  # `self.recipes[x.ndim]`
                own["_hash"] = hash(number)
                return hash(number)
        self._refuse_users("looks a traced value up")
        return id(self)

    def __repr__(self) -> str:
        frame = sys._getframe(1)
        if not _is_harmless_text(self, frame):
            text = self.tracer.text(self) if asks_for_users(frame) else None  # type: ignore[arg-type]
            if text is not None:
                return text
            self._refuse_users("makes a text of a traced value")
        return f"Proxy({_real(self, 'node').name})"

    def __index__(self) -> int:
        # Torch's argument parser tries this first, and then records the call.
        frame = sys._getframe(1)
        if asks_for_users(frame):
            number = self.tracer.number(self) if counts(frame.f_code, frame.f_lasti) else None  # type: ignore[arg-type]
            if type(number) is int:
                return number
            self.tracer.suspect(frame, "forward uses a traced value as a number")
        raise TypeError(f"'{type(self).__name__}' object cannot be interpreted as an integer")

    def __dir__(self) -> Iterable[str]:
        self._refuse_users("asks for the attributes of a traced value")
        return super().__dir__()

    def _refuse_users(self, action: str) -> None:
        """Refuse what the user's code does; torch may do so (an error message holds a `repr`)."""
        tracer = _real(self, "tracer")
        if asks_for_users(sys._getframe(2)) and not tracer.finished:
            raise tracer.refuse(Unfaithful(f"forward {action}"))

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("tracer", "node", "root", "attr", "_node"):
            object.__setattr__(self, name, value)
            return
        node = self.node
        raise self.tracer.refuse(
            ParameterWrite(f"forward assigns .{name} of parameter '{node.target}'")
            if node.op == "get_attr"
            else Unfaithful(f"forward assigns .{name} of a tensor")
        )

    def __setitem__(self, key: object, value: object) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __delitem__(self, key: object) -> None:
        raise self.tracer.refuse(Unfaithful("forward deletes an item of a traced value"))

    def __len__(self) -> int:
        count = self.tracer.count(self)  # type: ignore[arg-type]
        if count is None:
            raise self.tracer.refuse(Unfaithful("forward takes len() of a traced value"))
        return count


def _in_place(name: str) -> Callable[[Any, object], Any]:
    changed = getattr(operator, name)
    fresh = getattr(operator, name[1:], None) or getattr(operator, name[1:] + "_")

    def record(self: Any, other: object) -> Any:
        # `n = x.shape[2]; n += 1` rebinds n: an int has no in-place operators.
        target = fresh if is_size(self.tracer.calls, self.node) else changed
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return lambda self, other: _real(self, "tracer").listener.without(record, self, other)


def _refused(name: str) -> Callable[..., Any]:
    def refuse(self: Any, *_: object, **__: object) -> NoReturn:
        raise self.tracer.refuse(Unfaithful(f"forward asks for {name} of a traced value"))

    return refuse


def _number(name: str, kind: type) -> Callable[..., Any]:
    def convert(self: Any) -> Any:
        number = self.tracer.number(self)
        if number is None:
            raise self.tracer.refuse(Unfaithful(f"forward asks for {name} of a traced value"))
        return kind(number)

    return convert


for _kind in (int, float):
    setattr(_TracedMixin, f"__{_kind.__name__}__", _number(f"__{_kind.__name__}__", _kind))

for _name in words(
    "complex round trunc floor ceil bytes divmod rdivmod reversed contains length_hint "
    "enter exit copy deepcopy reduce reduce_ex getstate array dlpack dlpack_device sizeof"
):
    setattr(_TracedMixin, f"__{_name}__", _refused(f"__{_name}__"))

for _name in words("iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift"):
    setattr(_TracedMixin, f"__{_name}__", _in_place(_name))


class TracedAttribute(_TracedMixin, Attribute):  # type: ignore[misc]
    """`x.shape`, `x.data`: an attribute of a traced value."""

    __hash__ = _TracedMixin.__hash__
    __getattr__ = _TracedMixin.__getattr__


class TracedValue(_TracedMixin, fx.Proxy):  # type: ignore[misc]
    """A traced value."""

    __hash__ = _TracedMixin.__hash__
    __getattr__ = _TracedMixin.__getattr__

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuse the call: an argument of the model may be a function."""
        raise self.tracer.refuse(Unfaithful("forward calls a traced value"))


def _real(value: Any, name: str) -> Any:
    """An attribute of the proxy itself."""
    if name == "__dict__":
        return fx.Proxy.__dict__["__dict__"].__get__(value)
    try:
        return object.__getattribute__(value, name)
    except AttributeError:
        return TracedAttribute(value, name)


def _is_harmless_text(value: Any, frame: types.FrameType) -> bool:
    """Whether the text of a traced value is only a message, or the key of a cache that is empty."""
    code, at = frame.f_code, frame.f_lasti
    if not asks_for_users(frame) or is_message(code, at):
        return True
    names = cache_names(code, at)
    owner = frame.f_locals[code.co_varnames[0]] if names else None
    state = _real(value, "tracer").state
    return bool(names) and all(state.began_empty(owner, name) for name in names)


def _name_of(kind: type | None) -> str:
    return kind.__name__ if kind is not None else "object"


# --- what the user's code asks ------------------------------------------------------------------


def _asked(value: Any, name: str, frame: types.FrameType) -> Any:
    """An attribute as the user's code sees it: a traced value, or the error a tensor raises."""
    if name == "__class__":
        return _class_asked(value, frame)
    if name == "__torch_function__":  # torch's C code, called by the user's
        return _real(value, name)
    tracer = _real(value, "tracer")
    kind = kind_of(value)
    if kind is not None and _defines(kind, name):
        return _attribute(value, kind, name, frame)
    if kind is not None and _holds_no_attributes(value):
        raise AttributeError(name)
    special = name.startswith("__")
    if special or not accesses(frame) or tracer.expected_exception(frame):
        raise tracer.refuse(Unfaithful(f"forward asks whether a traced value has .{name}"))
    return TracedAttribute(value, name)


def _defines(kind: type, name: str) -> bool:
    """Whether objects of a class have an attribute; `hasattr` sees those of the metaclass too."""
    return any(name in vars(cls) for cls in kind.__mro__)


def _attribute(value: Any, kind: type, name: str, frame: types.FrameType) -> Any:
    """An attribute that all values of a kind have."""
    tracer = _real(value, "tracer")
    if name in _CHANGING.get(kind, ()):
        raise tracer.refuse(Unfaithful(f"forward asks for .{name} of a traced value"))
    if name.startswith("__"):
        if name in _OWN_TO_PROXIES or not hasattr(type(value), name):
            raise tracer.refuse(Unfaithful(f"forward asks for {name} of a traced value"))
        return object.__getattribute__(value, name)
    if not callable(getattr(kind, name)) and tracer.expected_exception(frame):
        # Python's own functions may raise, because they are given no number or text.
        raise tracer.refuse(Unfaithful(f"forward expects an exception of .{name}"))
    if not accesses(frame):  # hasattr(x, "shape"), which holds for tensors
        _take_for_tensor(value)
    return TracedAttribute(value, name)


def _class_asked(value: Any, frame: types.FrameType) -> type:
    """`value.__class__`: asked by the user's code, or by C code of torch that it calls."""
    if asks_for_class(frame):
        return class_of(value)
    tracer = _real(value, "tracer")
    tracer.suspect(frame, "forward asks for the type of a traced value")
    return type(value)


def class_of(value: Any) -> type:
    """The class that `type(value)` gives in the forward.

    Raises:
        Unfaithful: the class is not certain; an argument of the model may be of a subclass.
    """
    tracer, kind = _real(value, "tracer"), kind_of(value)
    if type(value) is TracedValue:
        node = value.node
        if node.op == "get_attr":
            return type(tracer.tensor(str(node.target)))
        if node.op == "placeholder":
            kind = None
    if kind is None:
        raise tracer.refuse(Unfaithful("forward asks for the type of a traced value"))
    return kind


def kind_of(value: Any) -> type | None:
    """The type of a traced value: `value_type`, for attributes too."""
    if type(value) is TracedAttribute and _real(value, "_node") is None:
        root = _real(value, "root")
        return _ATTRIBUTE_KINDS.get((kind_of(root), _real(value, "attr")))
    tracer = _real(value, "tracer")
    return value_type(tracer.calls, _real(value, "node"))


_ATTRIBUTE_KINDS: dict[tuple[type | None, str], type] = {
    (Tensor, "shape"): torch.Size, (Tensor, "dtype"): torch.dtype,
    (Tensor, "device"): torch.device, (Tensor, "layout"): torch.layout,
    (Tensor, "ndim"): int, (Tensor, "itemsize"): int, (Tensor, "nbytes"): int,
    (Tensor, "data"): Tensor, (Tensor, "T"): Tensor, (Tensor, "mT"): Tensor,
    (torch.dtype, "itemsize"): int, (torch.dtype, "is_floating_point"): bool,
    (torch.dtype, "is_complex"): bool, (torch.dtype, "is_signed"): bool,
    (torch.device, "type"): str,
    **{(Tensor, name): bool for name in dir(Tensor) if name.startswith("is_")
       and not callable(getattr(Tensor, name))},
}  # fmt: skip

# What may differ from call to call of one graph, or is None for some tensors.
_CHANGING = {
    Tensor: words(
        "grad _grad grad_fn _grad_fn grad_dtype requires_grad is_leaf retains_grad _version _base "
        "names output_nr _backward_hooks _post_accumulate_grad_hooks name volatile _cdata"
    ),
    torch.device: words("index"),
}

# Special attributes of the proxy's class, not of the tensor that it stands for.
_OWN_TO_PROXIES = words(
    "__doc__ __module__ __dict__ __weakref__ __slots__ __annotations__ __getattr__ __dir__ "
    "__getattribute__ __setattr__ __delattr__ __init__ __new__ __reduce__ __reduce_ex__ __repr__ "
    "__str__ __format__ __hash__ __getstate__ __setstate__ __subclasshook__ __init_subclass__"
)


def _holds_no_attributes(value: Any) -> bool:
    """Whether a value is certainly an object of its own, on which nobody has set an attribute."""
    if kind_of(value) is not Tensor:
        return True
    if type(value) is TracedAttribute:
        return False
    stack, calls = [value.node], value.tracer.calls
    while stack:
        node = stack.pop()
        does = effect(calls, node)
        if does.escapes or does.writes:
            return False
        stack.extend(does.aliases)
    return True


def _take_for_tensor(value: Any) -> None:
    """Let the optimized forward check that an argument, which was asked for, is a tensor."""
    if type(value) is TracedValue and value.node.op == "placeholder":
        value.tracer.tensor_arguments.add(str(value.node.target))


# --- names that are substituted -----------------------------------------------------------------


def is_instance(value: Any, kinds: Any) -> bool:
    """`isinstance` as the model's code sees it: a traced tensor is a tensor.

    It replaces the builtin by name, in the Python modules that the model is written in. (If the
    proxy's `__class__` were Tensor, torch's C++ argument parser would see it too, and crash.)
    """
    if not is_traced(value):
        return isinstance(value, kinds)
    kinds = _with_tensors(kinds)
    kind = kind_of(value)
    if kind is None:
        raise value.tracer.refuse(Unfaithful("forward asks for the type of a traced value"))
    if type(value) is TracedValue and value.node.op == "get_attr":
        return isinstance(value.tracer.tensor(str(value.node.target)), kinds)
    if kind is Tensor and not issubclass(Tensor, kinds) and _may_be_parameter(value, kinds):
        raise value.tracer.refuse(Unfaithful("forward asks whether a traced value is a parameter"))
    _take_for_tensor(value)
    return issubclass(kind, kinds)


def _with_tensors(kinds: Any) -> Any:
    """The classes, with Tensor in the place of Variable, of which every tensor is an instance."""
    if isinstance(kinds, tuple):
        return tuple(map(_with_tensors, kinds))
    is_variable = isinstance(kinds, type) and issubclass(kinds, _Variable)
    return Tensor if is_variable and not issubclass(kinds, Tensor) else kinds


def _may_be_parameter(value: Any, kinds: Any) -> bool:
    """Whether a value that a model is given, or passes on, may be of a class that only marks it."""
    if type(value) is TracedValue and not _returns_argument(value):
        return False
    flat = kinds if isinstance(kinds, tuple) else getattr(kinds, "__args__", (kinds,))
    return any(isinstance(kind, type) and issubclass(kind, Tensor) for kind in flat) or any(
        kind in (torch.nn.Parameter, torch.nn.Buffer) for kind in flat
    )


def _returns_argument(value: TracedValue) -> bool:
    """Whether a value may be an argument of the model itself, and not a new tensor."""
    stack, seen = [value.node], {value.node}
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            return True
        ahead = set(effect(value.tracer.calls, node).aliases) - seen
        seen |= ahead
        stack.extend(ahead)
    return False


def is_traced(value: Any) -> bool:
    """Whether a value is traced."""
    return issubclass(type(value), _TracedMixin)


def is_tensor(value: Any) -> bool:
    """`torch.is_tensor`, for which a traced tensor is a tensor."""
    return is_instance(value, Tensor)


def as_tensor(*args: Any, **kwargs: Any) -> Any:
    """`torch.as_tensor`, which gives a traced tensor itself, or converted by its method `to`."""
    data: Any = args[0] if args else kwargs.get("data")
    if not is_traced(data):
        return _as_tensor(*args, **kwargs)
    if not is_tensor(data):
        raise data.tracer.refuse(Unfaithful("forward makes a tensor of a traced value"))
    given = {k: v for k, v in kwargs.items() if k != "data" and v is not None}
    return data.to(**given) if given else data


_as_tensor = torch.as_tensor  # the original


_Variable: Any = torch.autograd.Variable  # the original


class _TraceableVariable(type(_Variable)):  # type: ignore[misc]
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        data: Any = args[0] if args else kwargs.get("data")
        return data if is_traced(data) else _Variable(*args, **kwargs)


class Variable(_Variable, metaclass=_TraceableVariable):  # type: ignore[misc]
    """`torch.autograd.Variable`, of old code, which gives a traced tensor itself."""


def factory(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes a tensor of sizes, one by one: `torch.zeros(x.size(0), 4)`.

    Torch looks for traced values in a tuple of sizes, and not where the first size stands alone.
    """

    def make(*args: Any, **kwargs: Any) -> Any:
        alone = len(args) > 1 and any(map(is_traced, args))
        return original(args, **kwargs) if alone else original(*args, **kwargs)

    return functools.wraps(original)(make)


def is_callable(value: Any) -> bool:
    """`callable`, for which a traced tensor cannot be called."""
    if not is_traced(value):
        return callable(value)
    if type(value) is TracedAttribute:
        raise value.tracer.refuse(Unfaithful("forward asks whether an attribute can be called"))
    return _defines(class_of(value), "__call__")


def identity(value: Any) -> int:
    """`id`, which a traced value does not have."""
    if is_traced(value):
        raise value.tracer.refuse(Unfaithful("forward asks for the id of a traced value"))
    return id(value)


def negated(value: Any) -> Any:
    """`operator.not_`, which graphs call: of a traced value it is a traced value, no answer."""
    if not is_traced(value):
        return operator.not_(value)
    return value.tracer.create_proxy("call_function", operator.not_, (value,), {})


def is_same(a: Any, b: Any) -> bool:
    """`operator.is_`, which does not see whether traced values are one object."""
    for value in (a, b):
        if is_traced(value):
            error = Unfaithful("forward compares the identity of values")
            raise value.tracer.refuse(error)
    return a is b


def is_other(a: Any, b: Any) -> bool:
    """`operator.is_not`, which does not see whether traced values are one object."""
    return not is_same(a, b)


class _TypeOfType(type):
    """What makes `traced_type` act as `type` does."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and is_traced(args[0]):
            return class_of(args[0])
        return type(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, type)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, type)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is type

    def __hash__(cls) -> int:
        return hash(type)

    def __getitem__(cls, item: Any) -> types.GenericAlias:
        return types.GenericAlias(type, item)


class traced_type(type, metaclass=_TypeOfType):
    """`type`, for which a traced tensor is a tensor."""
