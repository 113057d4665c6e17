"""The pipeline: capture -> rewrite -> validate -> module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fxrep.capture.assemble import assemble, attach, attached
from fxrep.capture.islands import capture
from fxrep.capture.state import unchanged_random_state
from fxrep.errors import OptionError, ReportError
from fxrep.passes import default_passes
from fxrep.planning.cost import CostModel, cost_models
from fxrep.planning.rule import Pass
from fxrep.registry import compiled_report
from fxrep.report import Report
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
        model: any module in eval mode. It is not changed: not its weights, flags, hooks or state.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs. Optional; with
            them the whole model is also compared before and after, in their dtype, with float64.
        passes: the passes to run, in order, or their names; `fxrep.default_passes` is all of them.
        cost: "macs" (never more multiply-accumulates, memory traffic or convolutions), "always"
            (whenever legal), "measure" (what is faster on `example_inputs`, where the model is: a
            rewrite whose profit is in doubt is timed), or a `fxrep.CostModel`.
        validate: check every rewrite in float64 on the spot and drop one that differs.

    Returns:
        A `torch.fx.GraphModule` when the whole forward traces, otherwise a copy of the model whose
        traceable submodules run their rewritten graphs. It shares nothing with `model`, and
        `fxrep.report` tells what was done, and what was not and why.

    Raises:
        ModelError: `model` is no module in eval mode with real weights.
        InputError: `example_inputs` do not fit the model.
        OptionError: `passes` or `cost` name something that does not exist.
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
    captured = capture(model, example_inputs)
    # Running a model on inputs may draw numbers; nothing that is computed has a gradient.
    with unchanged_random_state(despite_other_threads=example_inputs is not None), torch.no_grad():
        report = rewrite(captured, settings, example_inputs).report()
        result = assemble(captured)
        if example_inputs is not None:
            report = validation.compare(captured.model, result, example_inputs, report)
    attach(result, report)
    return result


def report(optimized: nn.Module | Callable[..., Any]) -> Report:
    """What was done to a module, and what was left alone and why.

    Args:
        optimized: what `fxrep.optimize` returned, or a copy of it; or a module that has run in
            ``torch.compile(..., backend="fxrep")``: then the graphs its weights went through. A
            compiled function stands for the modules in its closure and its globals.

    Raises:
        ReportError: it was neither made by `fxrep.optimize` nor compiled here.
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
    """The passes that `passes` names.

    Raises:
        OptionError: it is no sequence, or names something else.
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
