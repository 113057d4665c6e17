"""The public calls `optimize` and `report`: capture, rewrite, assemble, compare."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxrep.analysis.proofs import proven
from fxrep.analysis.trial import Trial, run_beside
from fxrep.capture import locks
from fxrep.capture.assemble import assemble, attached, seal
from fxrep.capture.islands import Capture, capture
from fxrep.capture.state import unchanged_random_state
from fxrep.capture.substitution import run_and_undo
from fxrep.errors import OptionError, ReportError
from fxrep.passes import default_passes
from fxrep.planning.cost import CostModel, cost_models
from fxrep.planning.rule import Pass
from fxrep.registry import compiled_report
from fxrep.report import Report, Skip
from fxrep.rewriting import validate as validation
from fxrep.rewriting.session import Settings, rewrite


def optimize(
    model: nn.Module,
    example_inputs: object = None,
    *,
    passes: Sequence[Pass | str] = default_passes,
    cost: str | CostModel = "macs",
    validate: bool = True,
) -> nn.Module:
    """Re-parameterize a trained model: one convolution for each linear block.

    Args:
        model: any module in eval mode. Nothing in it is changed: weights, flags, hooks, state.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. With them,
            the optimized model and the original, both in the dtype of the inputs, are also compared
            with the original in float64.
        passes: the passes to run, in order, or their names; `fxrep.default_passes` is all of them.
        cost: "macs" (never more multiply-accumulates, memory traffic or convolutions), "always"
            (whenever legal), "measure" (rewrites whose profit is in doubt are timed on
            `example_inputs`, on the device of the model), or a `fxrep.CostModel`.
        validate: run what was traced beside the model's own code, on copies, and leave a part that
            differs as it is; compare every rewrite with the original in float64, and drop it if
            they differ.

    Returns:
        A `torch.fx.GraphModule` when the whole forward traces, otherwise a copy of the model whose
        traceable submodules run their rewritten graphs. It shares nothing with `model`, but for
        memory that code which stays reaches through functions, classes, weak references or arrays.
        `fxrep.report` returns its report.

    Raises:
        ModelError: `model` is no module in eval mode with real weights.
        InputError: `example_inputs` do not fit the model.
        OptionError: `passes` or `cost` name something that does not exist.
        PassError: a pass raised, or gave an answer that cannot be carried out.
        EquivalenceError: the result differs on `example_inputs`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> len([m for m in fxrep.optimize(model).modules() if isinstance(m, torch.nn.BatchNorm2d)])
        0

    Source: Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", 2021, and the papers each
    pass names.
    """
    settings = Settings(chosen_passes(passes), cost_models(cost), validate, cost == "measure")
    if settings.measures and example_inputs is None:
        raise OptionError(
            "cost='measure' times rewrites on example_inputs, and there are none: pass inputs of "
            "the shapes the model will see, or cost='macs'"
        )
    state = torch._C._get_torch_function_state()  # type: ignore[attr-defined]

    def undo() -> None:  # an interrupt at the end of a `with` leaves the context on
        torch._C._set_torch_function_state(state)  # type: ignore[attr-defined]
        locks.release_all()

    with torch.inference_mode(False):  # what is made there could be neither trained nor loaded
        return run_and_undo(lambda: _optimized(model, example_inputs, settings), undo)


def _optimized(model: nn.Module, example_inputs: object, settings: Settings) -> nn.Module:
    # The forward of a GraphModule is no other code than its graph's.
    checks = settings.validate and not isinstance(model, fx.GraphModule)
    run = faithful if checks else functools.partial(capture, prove=proven)
    captured = run(model, example_inputs)
    # The model may draw random numbers when it runs on the inputs; no result needs a gradient.
    with unchanged_random_state(despite_other_threads=example_inputs is not None), torch.no_grad():
        report = rewrite(captured, settings, example_inputs).report()
        result = assemble(captured)
        seal(result, report)
        if example_inputs is not None:  # as it is: an island that does not stand runs its original
            report = validation.compare(
                captured.model, result, example_inputs, report, captured.surroundings
            )
            seal(result, report)
    return result


def faithful(model: nn.Module, example_inputs: object) -> Capture:
    """Capture a model such that every graph gives what its forward gives, as far as a run shows."""
    refused: dict[str, str] = {}
    captured, trial = _tried(model, example_inputs, refused)
    while trial.differing:  # each turn leaves at least one module more as it is
        refused |= trial.differing
        captured, trial = _tried(model, example_inputs, refused)
    # A module that differs made all modules above it differ: those may trace around it.
    inner = {path: why for path, why in refused.items() if not _any_below(refused, path)}
    if inner != refused:
        around, trial_around = _tried(model, example_inputs, inner)
        if not trial_around.differing:
            captured, trial = around, trial_around
    for path, why in trial.not_run.items():
        captured.skipped.append(Skip("capture", path, f"its graph was not run: {why}"))
    return captured


def _tried(
    model: nn.Module, example_inputs: object, refused: dict[str, str]
) -> tuple[Capture, Trial]:
    captured = capture(model, example_inputs, refused, proven)
    with unchanged_random_state(), torch.no_grad():
        return captured, run_beside(captured, example_inputs)


def _any_below(paths: Iterable[str], path: str) -> bool:
    return any(other != path and (not path or other.startswith(f"{path}.")) for other in paths)


def report(optimized: nn.Module | Callable[..., Any]) -> Report:
    """What was rewritten in a module, what was left alone and why.

    Args:
        optimized: the result of `fxrep.optimize`, or a copy of it; or a module that has run in
            ``torch.compile(..., backend="fxrep")``, whose report covers all graphs that have run on
            its weights. A compiled function stands for the modules in its closure and globals.

    Raises:
        ReportError: `optimized` was neither made by `fxrep.optimize` nor compiled here.
    """
    found = attached(optimized) if isinstance(optimized, nn.Module) else None
    found = found or compiled_report(optimized)
    if found is None:
        raise ReportError(
            f"optimized ({type(optimized).__name__}) carries no report: pass what fxrep.optimize "
            "returned, or a copy of it, or a module that has run in torch.compile(backend='fxrep')"
        )
    return found


def chosen_passes(passes: Sequence[Pass | str]) -> tuple[Pass, ...]:
    """The passes, looked up where they are given by name.

    Raises:
        OptionError: `passes` is no sequence, or an entry is neither a pass nor the name of one.
    """
    known = {p.name: p for p in default_passes}
    if isinstance(passes, (str, Pass)) or not isinstance(passes, Iterable):
        raise OptionError(
            f"passes={passes!r} must be a sequence of passes or their names: "
            f"write passes=[{passes!r}], or leave it out for all of them"
        )
    chosen = []
    for each in passes:
        found = known.get(each) if isinstance(each, str) else each
        if not isinstance(found, Pass):
            raise OptionError(
                f"passes: {each!r} is no pass; there are {', '.join(known)}, or pass a fxrep.Pass"
            )
        chosen.append(found)
    return tuple(chosen)
