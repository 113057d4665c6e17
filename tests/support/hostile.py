"""Forwards with side effects: each member writes something that outlives its call.

A member is a function that makes a module and names what else it can write (classes, functions,
generators). Two calls of a member make two worlds that share nothing: in one the original runs, in
the other the optimized model.
"""

from __future__ import annotations

import array
import collections
import contextvars
import ctypes
import functools
import itertools
import random
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 4


@dataclass
class Made:
    """A module of one member, and what it can write besides."""

    module: nn.Module
    watched: list[object]


Member = Callable[[], Made]
MEMBERS: dict[str, Member] = {}
# Members that `optimize` refuses by name.
REFUSED: set[str] = set()
# Members without an effect: a call of a cached function with constants.
HARMLESS = {"cached_function", "cached_function_used_before"}


def member(make: Member) -> Member:
    MEMBERS[make.__name__] = make
    return make


def habit(forward: Callable[..., Any], *watched: object, **attributes: Any) -> Made:
    """A module with this forward and these attributes; tensors among them are buffers.

    An attribute whose name starts with "Class" is one of the class.
    """
    own = {n: v for n, v in attributes.items() if n.startswith("Class")}
    kind = type("Habit", (nn.Module,), {"forward": forward, "__module__": __name__, **own})
    module = kind()
    for name, value in attributes.items():
        if name in own:
            continue
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            module.register_buffer(name, value)
        else:
            setattr(module, name, value)
    return Made(module, [kind, forward, *watched])


def model(made: Made, place: str) -> nn.Module:
    """A model in eval mode in which the member's module stands at one of the `PLACES`."""
    torch.manual_seed(0)

    def pair() -> list[nn.Module]:
        norm = nn.BatchNorm2d(CHANNELS)
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            tensor.data.uniform_(0.5, 1.5)
        return [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), norm]

    class Twice(nn.Module):
        def __init__(self, *children: nn.Module) -> None:
            super().__init__()
            self.before, self.habit, self.after = children

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.habit(self.before(self.habit(x))))

    if place == "root":
        made.module.layers = nn.Sequential(*pair())
        inner = type(made.module).forward
        kind = type("Root", (type(made.module),), {"forward": _around(inner)})
        made.module.__class__ = kind
        made.watched.append(kind)
        whole = made.module
    elif place == "child":
        whole = nn.Sequential(*pair(), made.module, *pair())
    else:
        whole = Twice(nn.Sequential(*pair()), made.module, nn.Sequential(*pair()))
    return whole.eval()


def _around(inner: Any) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        return inner(self, self.layers(x))

    return forward


PLACES = ("root", "child", "twice")


# --- tensors of the model ---------------------------------------------------------------------


def _buffer() -> Tensor:
    return torch.ones(())


def on_buffer(name: str, act: Callable[[Any], Any], *watched: object) -> None:
    """A member that writes its buffer `n` and scales by it."""

    def make() -> Made:
        def forward(self: Any, x: Tensor) -> Tensor:
            act(self)
            return x * self.n

        return habit(forward, *watched, n=_buffer())

    make.__name__ = name
    member(make)


def _items(self: Any) -> None:
    self._buffers["n"] += 1


def _all_buffers(self: Any) -> None:
    for tensor in self.buffers(recurse=False):
        tensor.mul_(0.5)


def _state(self: Any) -> None:
    self.state_dict()["n"].add_(1)


def _values(self: Any) -> None:
    for tensor in self._buffers.values():
        tensor.add_(1)


def _data_of(self: Any) -> None:
    for tensor in self.buffers(recurse=False):
        tensor.data.mul_(0.5)


def _set_data(self: Any) -> None:
    for tensor in self.buffers(recurse=False):
        tensor.data = tensor + 1


def _numpy(self: Any) -> None:
    for tensor in self.buffers(recurse=False):
        array = tensor.numpy()
        array += 1


def _dlpack(self: Any) -> None:
    for tensor in self.buffers(recurse=False):
        torch.from_dlpack(tensor).add_(1)  # type: ignore[attr-defined]


def _numpy_dlpack(self: Any) -> None:
    for tensor in self.buffers(recurse=False):
        torch.from_numpy(np.asarray(tensor)).add_(1)


def _old_dlpack(self: Any) -> None:
    for tensor in self.buffers(recurse=False):
        capsule = torch.utils.dlpack.to_dlpack(tensor)  # type: ignore[attr-defined]
        torch.utils.dlpack.from_dlpack(capsule).add_(1)


def _apply(self: Any) -> None:
    for tensor in self.buffers(recurse=False):
        tensor.apply_(lambda n: n + 1)


def _map(self: Any) -> None:
    for tensor in self.buffers(recurse=False):
        tensor.map_(torch.full((), 3.0, dtype=tensor.dtype), lambda a, b: a + b)


def _pointer(self: Any) -> None:
    for tensor in self.buffers(recurse=False):
        ctypes.c_float.from_address(tensor.data_ptr()).value += 1


def _storage(self: Any) -> None:
    for tensor in self.buffers(recurse=False):
        tensor.untyped_storage().fill_(0)


def _foreach(self: Any) -> None:
    torch._foreach_add_(list(self.buffers(recurse=False)), 1)


def _out(self: Any) -> None:
    (n,) = self.buffers(recurse=False)
    torch.add(n, 1, out=n)


def _set(self: Any) -> None:
    (n,) = self.buffers(recurse=False)
    n.set_(torch.full((), 3.0))


def _module_apply(self: Any) -> None:
    self._apply(lambda t: t + 1, recurse=False)


def _other_thread(self: Any) -> None:
    thread = threading.Thread(target=lambda: [t.add_(1) for t in self.buffers(recurse=False)])
    thread.start()
    thread.join()


def _load(self: Any) -> None:
    self.load_state_dict({"n": self.state_dict()["n"] + 1}, strict=False)


def _swap(self: Any) -> None:
    for tensor in self.buffers(recurse=False):
        torch.utils.swap_tensors(tensor, torch.full((), 3.0))


def _raises(self: Any) -> None:
    try:
        for tensor in self.buffers(recurse=False):
            tensor.add_(1)
    except BaseException:
        pass


def _setattr(self: Any) -> None:
    setattr(self, "n", self.n + 1)  # noqa: B010


def _super_setattr(self: Any) -> None:
    object.__setattr__(self, "k", getattr(self, "k", 0) + 1)
    self._buffers["n"].fill_(self.k)


for _name, _act in (
    ("buffers_item", _items), ("buffers_iterated", _all_buffers), ("state_dict", _state),
    ("buffers_values", _values), ("data_mul", _data_of), ("data_set", _set_data),
    ("numpy_view", _numpy), ("dlpack", _dlpack), ("asarray", _numpy_dlpack),
    ("to_dlpack", _old_dlpack), ("apply_", _apply), ("map_", _map), ("data_ptr", _pointer),
    ("untyped_storage", _storage), ("foreach", _foreach), ("out", _out), ("set_", _set),
    ("module_apply", _module_apply), ("other_thread", _other_thread), ("load_state_dict", _load),
    ("swap_tensors", _swap), ("swallowed", _raises), ("setattr", _setattr),
    ("object_setattr", _super_setattr),
):  # fmt: skip
    on_buffer(_name, _act)


@member
def batch_norm_training() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        mean, var = self.buffers(recurse=False)
        F.batch_norm(torch.randn(2, CHANNELS, 3, 3) * 3, mean, var, training=True)
        return x + mean.view(1, -1, 1, 1)

    return habit(forward, mean=torch.zeros(CHANNELS), var=torch.ones(CHANNELS))


@member
def batch_norm_training_of_ones() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        mean, var = self.buffers(recurse=False)
        F.batch_norm(torch.ones(2, CHANNELS, 3, 3) * 3, mean, var, training=True)
        return x + self.mean.view(1, -1, 1, 1)

    return habit(forward, mean=torch.zeros(CHANNELS), var=torch.ones(CHANNELS))


@member
def parameter_data() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        for p in self.parameters(recurse=False):
            p.data.mul_(0.5)
        return x * self.w

    return habit(forward, w=nn.Parameter(torch.ones(())))


@member
def fused_adam() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        ps = list(self.parameters(recurse=False))
        for p in ps:
            p.grad = torch.ones_like(p)
        torch.optim.Adam(ps, lr=0.1, fused=True).step()
        return x * self.w

    return habit(forward, w=nn.Parameter(torch.ones(())))


@member
def gradient_set() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        for p in self.parameters(recurse=False):
            p.grad = torch.ones_like(p)
        return x * self.w

    return habit(forward, w=nn.Parameter(torch.ones(())))


@member
def backward() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            sum((p * 2).sum() for p in self.parameters(recurse=False)).backward()
        return x * self.w

    return habit(forward, w=nn.Parameter(torch.ones(())))


@member
def requires_grad() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        for p in self.parameters(recurse=False):
            p.requires_grad_(False)
        return x * self.w

    return habit(forward, w=nn.Parameter(torch.ones(())))


@member
def attribute_of_a_parameter() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        for p in self.parameters(recurse=False):
            p.calls = getattr(p, "calls", 0) + 1
            x = x * p.calls
        return x

    return habit(forward, w=nn.Parameter(torch.ones(())))


# --- other tensors ----------------------------------------------------------------------------


@member
def tensor_in_a_list() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.ts[0].add_(1)
        return x * self.ts[0]

    return habit(forward, ts=[torch.ones(())])


@member
def tensor_in_an_object() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.box.t.add_(1)
        return x * self.box.t

    return habit(forward, box=types.SimpleNamespace(t=torch.ones(())))


@member
def tensor_in_a_closure() -> Made:
    t = torch.ones(())

    def forward(self: Any, x: Tensor) -> Tensor:
        t.add_(1)
        return x * t

    return habit(forward)


@member
def tensor_of_the_class() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.ClassT.add_(1)
        return x * self.ClassT

    return habit(forward, ClassT=torch.ones(()))


@member
def tensor_as_a_default() -> Made:
    def forward(self: Any, x: Tensor, t: Tensor = torch.ones(())) -> Tensor:  # noqa: B008
        t.add_(1)
        return x * t

    # a default is made once: this member has one world only for each function
    copied = types.FunctionType(
        forward.__code__, forward.__globals__, "forward", (torch.ones(()),), forward.__closure__
    )
    return habit(copied)


@member
def plain_tensor_attribute() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.t.add_(1)
        return x * self.t

    made = habit(forward)
    made.module.__dict__["t"] = torch.ones(())
    return made


@member
def plain_tensor_data() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.t.data = self.t.data + 1
        return x * self.t

    made = habit(forward)
    made.module.__dict__["t"] = torch.ones(())
    return made


@member
def plain_tensor_numpy() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        view = self.t.numpy()
        view += 1
        return x * self.t

    made = habit(forward)
    made.module.__dict__["t"] = torch.ones(())
    return made


@member
def numpy_array() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.a[0] += 1
        return x * float(self.a[0])

    return habit(forward, a=np.zeros(2))


@member
def numpy_array_in_a_closure() -> Made:
    a = np.zeros(2)

    def forward(self: Any, x: Tensor) -> Tensor:
        a[0] += 1
        return x * float(a[0])

    return habit(forward)


@member
def numpy_array_made_a_tensor() -> Made:
    a = np.zeros(2)

    def forward(self: Any, x: Tensor) -> Tensor:
        torch.from_numpy(a).add_(1)
        return x * float(a[0])

    return habit(forward)


# --- Python objects that the module owns --------------------------------------------------------


@dataclass
class Count:
    n: int = 0
    inner: Any = None
    log: list[int] = field(default_factory=list)

    def step(self) -> int:
        self.n += 1
        return self.n


class Slots:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


class OwnDict(dict):  # type: ignore[type-arg]
    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)


class Itself:
    """A counter whose copy is itself."""

    def __init__(self) -> None:
        self.n = 0

    def __deepcopy__(self, memo: Any) -> Itself:
        return self


def on_state(
    name: str, make_state: Callable[[], Any], step: Callable[[Any], Any], owners: str = "acdgs"
) -> None:
    """A member for each owner: an attribute, the class, a closure, a default, a global name.

    Args:
        name: of the members.
        make_state: the state.
        step: advances the state, and gives a number.
        owners: initials of the owners: attribute, class, closure ("s" for scope), default, global.
    """

    def attribute() -> Made:
        def forward(self: Any, x: Tensor) -> Tensor:
            return x * float(step(self.s))

        return habit(forward, s=make_state())

    def of_class() -> Made:
        def forward(self: Any, x: Tensor) -> Tensor:
            return x * float(step(self.ClassS))

        return habit(forward, ClassS=make_state())

    def scope() -> Made:
        state = make_state()

        def forward(self: Any, x: Tensor) -> Tensor:
            return x * float(step(state))

        return habit(forward)

    def default() -> Made:
        def forward(self: Any, x: Tensor, s: Any = None) -> Tensor:
            return x * float(step(s))

        forward.__defaults__ = (make_state(),)
        return habit(forward)

    def of_globals() -> Made:
        state = make_state()
        namespace = {"S": state, "step": step, "__name__": __name__}
        exec("def forward(self, x):\n    return x * float(step(S))\n", namespace)
        return habit(namespace["forward"], namespace)

    for initial, make in zip(
        "acsdg", (attribute, of_class, scope, default, of_globals), strict=True
    ):
        if initial in owners:
            make.__name__ = f"{name}-{make.__name__}"
            member(make)


def _draw(generator: Any) -> float:
    return float(torch.rand((), generator=generator))


def _appended(items: Any) -> int:
    items.append(1)
    return len(items)


def _counted(counter: Any) -> int:
    counter["n"] = counter.get("n", 0) + 1
    return counter["n"]


def _attribute(thing: Any) -> int:
    thing.n += 1
    return thing.n


def _own_dict(thing: Any) -> int:
    thing.__dict__["n"] += 1
    return thing.n


def _nested(thing: Any) -> int:
    thing.inner[0]["deep"][0].n += 1
    return thing.inner[0]["deep"][0].n


def _grown(items: Any) -> int:
    items.append(1)
    return len(items)


def _set_and_taken(queue: Any) -> int:
    queue.append(queue.popleft())
    return queue[0]


def _added(items: Any) -> int:
    items.add(len(items))
    return len(items)


def _popped(items: Any) -> int:
    return items.pop()


def _c_int(value: Any) -> int:
    value.value += 1
    return value.value


def _var(value: Any) -> int:
    value.set(value.get(0) + 1)
    return value.get()


def _first(items: Any) -> int:
    items[0] += 1
    return items[0]


def _function(function: Any) -> int:
    function.calls = getattr(function, "calls", 0) + 1
    return function.calls


def _own_function() -> Any:
    def function() -> None: ...

    return function


def _reclassed(thing: Any) -> int:
    thing.__class__ = Count if type(thing) is types.SimpleNamespace else types.SimpleNamespace
    return 1 + (type(thing) is Count)


on_state("dataclass", Count, Count.step)
on_state("namespace", lambda: types.SimpleNamespace(n=0), _attribute)
on_state("instance_dict", lambda: types.SimpleNamespace(n=0), _own_dict)
on_state("slots", Slots, _attribute)
on_state("itself", Itself, _attribute)
on_state("nested", lambda: Count(inner=[{"deep": (Count(),)}]), _nested)
on_state("list", list, _appended)
on_state("list_item", lambda: [0], _first)
on_state("dict", dict, _counted)
on_state("ordered", collections.OrderedDict, _counted)
on_state("counter", collections.Counter, _counted)
on_state("defaultdict", lambda: collections.defaultdict(int), _counted)
on_state("own_dict", OwnDict, _counted)
on_state("chainmap", collections.ChainMap, _counted)
on_state("userdict", collections.UserDict, _counted)
on_state("userlist", collections.UserList, _appended)
on_state("deque", lambda: collections.deque([1, 2, 3]), _set_and_taken)
on_state("bounded_deque", lambda: collections.deque([1, 2], maxlen=4), _appended)
on_state("set", set, _added)
on_state("popped", lambda: [5, 4, 3, 2, 1], _popped)
on_state("bytearray", bytearray, _grown)
on_state("array", lambda: array.array("i"), _grown)
on_state("c_int", lambda: ctypes.c_int(0), _c_int, "acsdg")
on_state("count", itertools.count, next)
on_state("cycle", lambda: itertools.cycle([1, 2, 3]), next)
on_state("list_iterator", lambda: iter([1, 2, 3, 4, 5, 6, 7, 8]), next)
on_state("generator", lambda: (n for n in range(1, 99)), next, "csdg")
on_state("torch_generator", lambda: torch.Generator().manual_seed(1), _draw)
on_state(
    "torch_generator_seeded",
    lambda: torch.Generator().manual_seed(1),
    lambda g: g.manual_seed(g.initial_seed() + 1).initial_seed(),
)
on_state("numpy_generator", lambda: np.random.default_rng(1), lambda g: g.random())
on_state("numpy_state", lambda: np.random.RandomState(1), lambda g: g.rand())
on_state("random", lambda: random.Random(1), lambda g: g.random())
on_state("partial", lambda: functools.partial(Count.step, Count()), lambda f: f())
on_state("bound", lambda: Count().step, lambda f: f())
on_state("context", lambda: contextvars.ContextVar("n"), _var, "csdg")
on_state("local", lambda: _local(), _attribute, "csdg")
on_state("function", _own_function, _function, "asdg")


def _local() -> threading.local:
    local = threading.local()
    local.n = 0
    return local


# --- module and class attributes ---------------------------------------------------------------


@member
def own_dict() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.__dict__["k"] += 1
        return x * self.k

    return habit(forward, k=0)


@member
def vars_of_self() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        vars(self).update(k=self.k + 1)
        return x * self.k

    return habit(forward, k=0)


@member
def class_attribute() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        type(self).ClassN += 1
        return x * self.ClassN

    return habit(forward, ClassN=0)


@member
def class_attribute_by_setattr() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        setattr(self.__class__, "Class" + "N", self.ClassN + 1)
        return x * self.ClassN

    return habit(forward, ClassN=0)


@member
def new_class_attribute() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        type(self).k = getattr(type(self), "k", 0) + 1
        return x * self.k

    return habit(forward)


@member
def attribute_of_a_base() -> Made:
    class Base(nn.Module):
        calls = 0

    class Habit(Base):
        def forward(self, x: Tensor) -> Tensor:
            Base.calls += 1
            return x * self.calls

    return Made(Habit(), [Base, Habit])


@member
def attribute_of_another_class() -> Made:
    class Registry:
        calls = 0
        seen: ClassVar[list[int]] = []

        @classmethod
        def call(cls) -> int:
            cls.calls += 1
            cls.seen.append(cls.calls)
            return cls.calls

    def forward(self: Any, x: Tensor) -> Tensor:
        return x * Registry.call()

    return habit(forward, Registry)


@member
def class_of_the_module() -> Made:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 3

    def forward(self: Any, x: Tensor) -> Tensor:
        self.__class__ = Other
        return x * 2

    return habit(forward, Other)


@member
def property_that_counts() -> Made:
    class Habit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = Count()

        @property
        def scale(self) -> int:
            return self.state.step()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    return Made(Habit(), [Habit])


# --- functions ---------------------------------------------------------------------------------


@member
def nonlocal_cell() -> Made:
    n = 0

    def forward(self: Any, x: Tensor) -> Tensor:
        nonlocal n
        n += 1
        return x * n

    return habit(forward)


@member
def nonlocal_cell_of_a_helper() -> Made:
    n = 0

    def step() -> int:
        nonlocal n
        n += 1
        return n

    def forward(self: Any, x: Tensor) -> Tensor:
        return x * step()

    return habit(forward, step)


def _in_namespace(body: str, **names: Any) -> Made:
    namespace: dict[str, Any] = {"torch": torch, "__name__": __name__, **names}
    exec(body, namespace)
    return habit(namespace["forward"], namespace)


@member
def global_name() -> Made:
    return _in_namespace(
        "n = 0\ndef forward(self, x):\n    global n\n    n += 1\n    return x * n\n"
    )


@member
def global_name_of_a_helper() -> Made:
    return _in_namespace(
        "n = 0\ndef step():\n    global n\n    n += 1\n    return n\n"
        "def forward(self, x):\n    return x * step()\n"
    )


@member
def new_global_name() -> Made:
    return _in_namespace(
        "def forward(self, x):\n    global n\n    try:\n        n += 1\n"
        "    except NameError:\n        n = 1\n    return x * n\n"
    )


@member
def global_name_by_globals() -> Made:
    return _in_namespace(
        "n = 0\ndef forward(self, x):\n    globals()['n'] += 1\n    return x * n\n"
    )


@member
def name_of_another_file() -> Made:
    other = types.ModuleType("other")
    other.n = 0  # type: ignore[attr-defined]
    made = _in_namespace(
        "def forward(self, x):\n    other.n += 1\n    return x * other.n\n", other=other
    )
    made.watched.append(vars(other))
    return made


@member
def function_attribute() -> Made:
    def forward(self: Any, x: Tensor) -> Tensor:
        type(self).forward.calls = getattr(type(self).forward, "calls", 0) + 1
        return x * type(self).forward.calls

    return habit(forward)


@member
def helper_attribute() -> Made:
    def helper() -> int:
        helper.calls += 1  # type: ignore[attr-defined]
        return helper.calls  # type: ignore[attr-defined]

    helper.calls = 0  # type: ignore[attr-defined]

    def forward(self: Any, x: Tensor) -> Tensor:
        return x * helper()

    return habit(forward, helper)


@member
def default_list_of_a_helper() -> Made:
    def helper(seen: Any = None) -> int:
        seen.append(1)
        return len(seen)

    helper.__defaults__ = ([],)

    def forward(self: Any, x: Tensor) -> Tensor:
        return x * helper()

    return habit(forward, helper)


@member
def cached_function() -> Made:
    @functools.lru_cache
    def helper(n: int) -> int:
        return n + 1

    def forward(self: Any, x: Tensor) -> Tensor:
        return x * helper(2)

    return habit(forward, helper)


@member
def cached_function_used_before() -> Made:
    @functools.cache
    def helper(n: int) -> int:
        return n + 1

    helper(1)

    def forward(self: Any, x: Tensor) -> Tensor:
        return x * helper(2)

    return habit(forward, helper)


@member
def cached_function_that_counts() -> Made:
    log: list[int] = []

    @functools.cache
    def helper(n: int) -> int:
        log.append(n)
        return n + len(log)

    def forward(self: Any, x: Tensor) -> Tensor:
        return x * helper(2) * len(log)

    return habit(forward, helper, log)


# --- the process -------------------------------------------------------------------------------


def on_process(name: str, act: Callable[[Any], Any]) -> None:
    """A member whose forward changes the process and puts nothing back."""

    def make() -> Made:
        def forward(self: Any, x: Tensor) -> Tensor:
            return x * float(act(self))

        return habit(forward)

    make.__name__ = name
    member(make)


def _manual_seed(self: Any) -> float:
    torch.manual_seed(7)
    return 1.0


def _set_rng_state(self: Any) -> float:
    torch.set_rng_state(torch.Generator().manual_seed(7).get_state())
    return 1.0


def _default_dtype(self: Any) -> float:
    torch.set_default_dtype(torch.float64)
    return 1.0


def _default_device(self: Any) -> float:
    torch.set_default_device("cpu")
    return 1.0


def _deterministic(self: Any) -> float:
    torch.use_deterministic_algorithms(True)
    return 1.0


def _precision(self: Any) -> float:
    torch.set_float32_matmul_precision("high")
    return 1.0


def _benchmark(self: Any) -> float:
    torch.backends.cudnn.benchmark = True
    return 1.0


def _anomaly(self: Any) -> float:
    torch.autograd.set_detect_anomaly(True)
    return 1.0


def _numpy_errors(self: Any) -> float:
    np.seterr(divide="ignore")
    return 1.0


def _print_options(self: Any) -> float:
    torch.set_printoptions(precision=2)
    return 1.0


def _random_seed(self: Any) -> float:
    random.seed(3)
    return random.random()


on_process("global_random", lambda self: random.random())
on_process("global_numpy", lambda self: np.random.rand())
on_process("global_torch", lambda self: torch.rand(()))
on_process("random_seed", _random_seed)
on_process("manual_seed", _manual_seed)
on_process("set_rng_state", _set_rng_state)
on_process("default_dtype", _default_dtype)
on_process("default_device", _default_device)
on_process("deterministic", _deterministic)
on_process("precision", _precision)
on_process("benchmark", _benchmark)
on_process("anomaly", _anomaly)
on_process("numpy_errors", _numpy_errors)
on_process("print_options", _print_options)


# --- modules whose copy is itself ---------------------------------------------------------------


@member
def module_whose_copy_is_itself() -> Made:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)
            self.norm = nn.BatchNorm2d(CHANNELS)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

        def __deepcopy__(self, memo: Any) -> Shared:
            return self

    return Made(Shared(), [Shared])


REFUSED.add("module_whose_copy_is_itself")


@member
def object_that_shares_a_tensor() -> Made:
    bank = Itself()
    bank.t = torch.ones(())  # type: ignore[attr-defined]

    def forward(self: Any, x: Tensor) -> Tensor:
        self.bank.t.add_(1)
        return x * self.bank.t

    return habit(forward, bank, bank=bank)


REFUSED.add("object_that_shares_a_tensor")
