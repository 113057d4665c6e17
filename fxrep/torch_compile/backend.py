"""`torch.compile(model, backend="fxrep")`: the rewrites of `fxrep.optimize` in dynamo's graphs.

torch finds the backend by the entry point `torch_dynamo_backends`. The rewritten graph goes to an
inner backend, Inductor by default. Graphs that train, and graphs that cannot be rewritten, go there
as they are: every model that the inner backend can run still runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.exc import RestartAnalysis

from fxrep.errors import OptionError
from fxrep.passes import default_passes
from fxrep.pipeline import chosen_passes
from fxrep.planning.cost import CostModel, cost_models
from fxrep.planning.rule import Pass
from fxrep.report import Skip
from fxrep.rewriting.session import Settings
from fxrep.torch_compile.compiled import Folded, Inner, Untouched
from fxrep.torch_compile.dynamo import Unfoldable, log, weight_inputs


@dataclass(frozen=True)
class Options:
    """The `options=` of `torch.compile`.

    Attributes:
        inner: the backend that compiles the rewritten graph: a name known to torch, or a callable.
        freezing: folded weights become constants of the graph, which is compiled anew when they
            change.
        passes: as for `fxrep.optimize`.
        cost: as for `fxrep.optimize`.
        validate: as for `fxrep.optimize`.
        mode: as for `torch.compile`, which takes either a mode or options.
    """

    inner: str | Callable[..., Any] = "inductor"
    freezing: bool = False
    passes: Sequence[Pass | str] = default_passes
    cost: str | CostModel = "macs"
    validate: bool = True
    mode: str | None = None


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one of dynamo's graphs, with folded weights where possible.

    Args:
        gm: dynamo's graph; weights are inputs.
        example_inputs: the values of its inputs.
        mode: for Inductor: "reduce-overhead", "max-autotune".
        options: see `Options`.

    Raises:
        OptionError: an option or its value does not exist.
    """
    chosen = _options(mode, options)
    settings = Settings(chosen_passes(chosen.passes), cost_models(chosen.cost), chosen.validate)
    inner = _inner(chosen)
    weights: list[Tensor] = []
    skipped: tuple[Skip, ...] = ()
    try:
        weights = [example_inputs[i] for i in weight_inputs(gm, example_inputs)]
        if not weights:
            raise Unfoldable("no weights among its inputs")
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            raise Unfoldable("it trains: gradients are enabled, and weights require them")
        return Folded(gm, example_inputs, inner, settings, chosen.freezing)
    except Unfoldable as refusal:
        reason, skipped = str(refusal), refusal.skipped
    except Exception as error:  # the inner compiler may do better with the graph as it is
        for each in (error, error.__cause__):
            if isinstance(each, RestartAnalysis):  # dynamo has to trace again, with a number fixed
                raise each from None
        log.warning("rewriting failed: %s: %s", type(error).__name__, error, exc_info=True)
        reason = f"rewriting failed: {type(error).__name__}: {error}"
    return Untouched(inner(gm, example_inputs), weights, reason, skipped)


def _options(mode: str | None, given: Mapping[str, Any] | None) -> Options:
    known = Options.__dataclass_fields__
    for name in given or {}:
        if name not in known:
            raise OptionError(f"options: there is no {name!r}; there are {', '.join(known)}")
    chosen = Options(**{"mode": mode, **(given or {})})
    for name in ("freezing", "validate"):
        if not isinstance(getattr(chosen, name), bool):
            raise OptionError(f"options: {name}={getattr(chosen, name)!r} must be True or False")
    if chosen.cost == "measure":
        raise OptionError(
            "options: cost='measure' times rewrites as eager runs them; pass it to fxrep.optimize "
            "with example_inputs, or another cost here"
        )
    if chosen.inner == "fxrep" or chosen.inner is compile_graph:
        raise OptionError("options: inner='fxrep' would call itself; name another backend")
    if chosen.mode not in (None, "default") and chosen.inner != "inductor":
        raise OptionError(f"mode={chosen.mode!r} is for Inductor, and inner is {chosen.inner!r}")
    return chosen


def _inner(chosen: Options) -> Inner:
    if chosen.inner == "inductor":
        return _inductor(chosen)
    if callable(chosen.inner):
        return chosen.inner
    try:
        return torch._dynamo.lookup_backend(chosen.inner)  # type: ignore[return-value]
    except Exception as error:
        names = ", ".join(torch._dynamo.list_backends(None))
        raise OptionError(f"options: inner={chosen.inner!r} is none of {names}") from error


def _inductor(chosen: Options) -> Inner:
    import torch._inductor as inductor
    from torch._inductor.compile_fx import compile_fx

    patches: dict[str, Any] = {}
    if chosen.mode is not None:
        try:
            patches |= inductor.list_mode_options(chosen.mode)
        except RuntimeError as error:
            raise OptionError(f"mode={chosen.mode!r}: {error}") from error
    if chosen.freezing:
        patches["freezing"] = True

    def compile_inner(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_fx(gm, list(inputs), config_patches=patches)  # type: ignore[return-value]

    return compile_inner
