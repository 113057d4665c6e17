"""Arguments of a traced forward: the signature stays, and each call checks constant arguments."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen

from fxrep.errors import SpecializationError

_LITERALS = (
    bool,
    int,
    float,
    complex,
    str,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True, eq=False)
class Arguments:
    """The arguments of a traced forward.

    Attributes:
        parameters: all of them in order, but for `*args` and `**kwargs`.
        specialized: by name, the arguments that are constants of the graph, and their values.
        required: names of arguments that default to None but are inputs of the graph.
        tensors: names of arguments that the forward took for tensors when it asked for their type.
        returns: the return annotation.
        variadic: `*args` and `**kwargs` of the forward, which must be empty: the graph takes none.
    """

    parameters: tuple[inspect.Parameter, ...]
    specialized: Mapping[str, object] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    tensors: frozenset[str] = frozenset()
    returns: Any = inspect.Signature.empty
    variadic: tuple[inspect.Parameter, ...] = ()

    @property
    def values(self) -> tuple[str, ...]:
        """The arguments that are inputs of the graph."""
        return tuple(p.name for p in self.parameters if p.name not in self.specialized)

    @property
    def are_narrowed(self) -> bool:
        """Whether the forward takes arguments that the graph does not take."""
        return bool(self.specialized or self.required or self.tensors or self.variadic)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The arguments that are constants because they default to None."""
        return tuple(
            p.name
            for p in self.parameters
            if p.default is None and self.specialized.get(p.name, ...) is None
        )

    def with_input(self, name: str) -> Arguments:
        """The same with an input for an argument that was left out."""
        left = {key: value for key, value in self.specialized.items() if key != name}
        return replace(self, specialized=left, required=self.required | {name})

    def without_input(self, name: str) -> Arguments:
        """The same without an argument that `with_input` added."""
        specialized = {**self.specialized, name: None}
        return replace(self, specialized=specialized, required=self.required - {name})

    @property
    def signature(self) -> inspect.Signature:
        """The signature without `self`, as `inspect.signature(module.forward)` returns it."""
        return inspect.Signature(self.declared, return_annotation=self.returns)

    @property
    def declared(self) -> list[inspect.Parameter]:
        """All parameters in the order of the declaration."""
        return sorted((*self.parameters, *self.variadic), key=lambda parameter: parameter.kind)

    def default(self, name: str) -> Any:
        """The declared default of an argument."""
        return self.signature.parameters[name].default

    def __deepcopy__(self, memo: dict[int, Any]) -> Arguments:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        others = (dict(self.specialized), self.required, self.tensors, _picklable(self.returns))
        return _arguments, (_records(self.parameters), *others, _records(self.variadic))


def _records(parameters: tuple[inspect.Parameter, ...]) -> tuple[Any, ...]:
    return tuple((p.name, p.kind, p.default, _picklable(p.annotation)) for p in parameters)


def _parameters(records: Any) -> tuple[inspect.Parameter, ...]:
    return tuple(
        inspect.Parameter(name, kind, default=default, annotation=annotation)
        for name, kind, default, annotation in records
    )


def _picklable(annotation: Any) -> Any:
    try:
        pickle.dumps(annotation)
    except Exception:  # an annotation with a local class must not keep a model from being pickled
        return inspect.Parameter.empty
    return annotation


def _arguments(parameters: Any, *others: Any) -> Arguments:
    """Rebuild `Arguments`; pickles name this function."""
    *same, variadic = others
    given: list[Any] = [_parameters(parameters), *same, _parameters(variadic)]
    return Arguments(*given)


def is_literal(value: object) -> bool:
    """Whether generated code can write the value out."""
    if isinstance(value, tuple | list):
        return type(value) in (tuple, list) and all(is_literal(item) for item in value)
    return value is None or value is ... or type(value) in _LITERALS


def is_variadic(parameter: inspect.Parameter) -> bool:
    """Whether the parameter is `*args` or `**kwargs`."""
    return parameter.kind in _VARIADIC


def same_value(given: object, value: object) -> bool:
    """Whether a caller's value is that of the graph; 1, 1.0 and True are three values."""
    if given is value:
        return True
    return type(given) is type(value) and is_literal(given) and given == value


def expect(name: str, given: object, value: object) -> None:
    """Refuse a call whose argument differs from the value that is a constant of the graph.

    Raises:
        SpecializationError: the argument has another value.
    """
    if isinstance(given, fx.Proxy):  # a later symbolic trace keeps the check
        given.tracer.create_proxy("call_function", expect, (name, given, value), {})
        return
    if not same_value(given, value):
        shown = "a tensor" if isinstance(given, torch.Tensor) else repr(given)
        raise SpecializationError(
            f"argument '{name}' is {shown}, but this network was optimized for {name}={value!r}; "
            f"call fxrep.optimize again with example_inputs that contain '{name}'"
        )


def expect_given(name: str, given: object) -> None:
    """Refuse a call that leaves out an input of the graph.

    Raises:
        SpecializationError: the argument is None.
    """
    if given is None:
        raise SpecializationError(
            f"argument '{name}' is missing, but this network was optimized with a value for it; "
            f"pass it, or call fxrep.optimize again with example_inputs without '{name}'"
        )


def expect_tensor(name: str, given: object) -> None:
    """Refuse a call that passes no tensor for an argument that the forward took for a tensor.

    Raises:
        SpecializationError: the argument is no tensor.
    """
    if not isinstance(given, torch.Tensor | fx.Proxy):
        raise SpecializationError(
            f"argument '{name}' is a {type(given).__name__}, but this network was optimized for a "
            f"tensor; call fxrep.optimize again with example_inputs that contain '{name}'"
        )


def expect_no_more(name: str, given: object) -> None:
    """Refuse a call that passes more arguments than the graph takes.

    Raises:
        SpecializationError: `*args` or `**kwargs` are not empty.
    """
    if isinstance(given, fx.Proxy):  # a later symbolic trace keeps the check
        given.tracer.create_proxy("call_function", expect_no_more, (name, given), {})
        return
    if given:
        raise SpecializationError(
            f"argument '{name}' is not empty, but this network was optimized without it; "
            "call the network that it was made from"
        )


class KeepSignature(CodeGen):
    """Code generation that keeps the signature and checks constant arguments."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.arguments = arguments

    def gen_fn_def(  # noqa: D102
        self, free_vars: list[str], maybe_return_annotation: str, **options: Any
    ) -> str:
        if not free_vars or free_vars[0] != "self":
            free_vars.insert(0, "self")
        head = ", ".join(self._head(free_vars[1:]))
        first = f"def {self._func_name}({head}){maybe_return_annotation}:"
        return "\n".join([first, *self._checks()])

    def _head(self, written: list[str]) -> list[str]:
        """The parameters of the generated function, given as fx writes them, with * and /."""
        head = ["self"]
        star = False
        more = {p.kind: p.name for p in self.arguments.variadic}
        rest = more.get(inspect.Parameter.VAR_POSITIONAL, "")
        for parameter, text in zip(self.arguments.parameters, written, strict=True):
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not star:
                head.append(f"*{rest}")
                star = True
            head.append(text)
            if parameter.default is not parameter.empty and not is_literal(parameter.default):
                head[-1] = f"{parameter.name} = _fxrep_arguments.default({parameter.name!r})"
            if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
                head = [entry for entry in head if entry != "/"] + ["/"]
        if rest and not star:
            head.append(f"*{rest}")
        if inspect.Parameter.VAR_KEYWORD in more:
            head.append(f"**{more[inspect.Parameter.VAR_KEYWORD]}")
        return head

    def _checks(self) -> list[str]:
        """The first lines of the generated function."""
        lines = [
            f"    _fxrep_expect_no_more({p.name!r}, {p.name})" for p in self.arguments.variadic
        ]
        for name, value in self.arguments.specialized.items():
            constant = f"_fxrep_arguments.specialized[{name!r}]"
            text = repr(value) if is_literal(value) else constant
            lines.append(f"    _fxrep_expect({name!r}, {name}, {text})")
        for name in sorted(self.arguments.required):
            lines.append(f"    _fxrep_expect_given({name!r}, {name})")
        for name in sorted(self.arguments.tensors):
            lines.append(f"    _fxrep_expect_tensor({name!r}, {name})")
        return lines

    def additional_globals(self) -> list[tuple[str, Any]]:  # noqa: D102
        found: list[tuple[str, Any]] = [("_fxrep_arguments", self.arguments)]
        if self.arguments.variadic:
            found.append(("_fxrep_expect_no_more", expect_no_more))
        if self.arguments.specialized:
            found.append(("_fxrep_expect", expect))
        if self.arguments.required:
            found.append(("_fxrep_expect_given", expect_given))
        if self.arguments.tensors:
            found.append(("_fxrep_expect_tensor", expect_tensor))
        return found
