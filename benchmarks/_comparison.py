"""A model beside its optimized form and those of peers: values, counts, cells of a table."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from _counting import count, relative_error
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

EXACT32, EXACT64 = 1e-5, 1e-10

Row = dict[str, Any]
Run = Callable[..., Any]  # run(model, *inputs) or run(model, **inputs)
Inputs = tuple[Any, ...] | dict[str, Any]


def plain_run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a model as its user does."""
    return model(*args, **kwargs)


def values(run: Run, model: nn.Module, inputs: Inputs) -> Any:
    """The results of a model, without gradients, on inputs of its own."""
    with torch.no_grad():
        return called(run, model, tree_map_only(Tensor, torch.clone, inputs))


def counts(run: Run, model: nn.Module, inputs: Inputs) -> Row:
    """What one forward dispatches. A first one may fill caches (LeViT): have one run before."""
    own = tree_map_only(Tensor, torch.clone, inputs)
    return asdict(count(lambda: called(run, model, own)))


def called(run: Run, model: nn.Module, inputs: Inputs) -> Any:
    """Run a model on positional inputs, or on a dict of keyword inputs."""
    return run(model, **inputs) if isinstance(inputs, dict) else run(model, *inputs)


def double(inputs: Inputs) -> Any:
    """The inputs in float64; integers and masks stay."""
    return tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)


def shapes(inputs: Inputs) -> list[list[int]]:
    """The shapes of all tensors among the inputs."""
    return [list(x.shape) for x in tree_leaves(inputs) if isinstance(x, Tensor)]


def steady_reference(
    model: nn.Module, run: Run, inputs: Inputs, row: Row
) -> tuple[Any, nn.Module | None]:
    """The results in float64, and the float64 model, of a model that does not drown in rounding.

    Where the model's own float32 result is off by more than `EXACT32` / 2, the scales of its
    BatchNorms are halved, in place.

    Args:
        model: in float32.
        run: how it runs.
        inputs: for it.
        row: gets ``rounding``, the error of the model's own float32, and ``scales`` if halved.

    Raises:
        ValueError: the result holds no tensor.
    """
    reference, exact = _reference(model, run, inputs)
    if not any(isinstance(x, Tensor) for x in tree_leaves(reference)):
        raise ValueError(f"its result, {type(reference).__name__}, holds no tensor to compare")
    rounding = relative_error(values(run, model, inputs), reference)
    if not rounding < EXACT32 / 2:
        # Attention logits in the hundreds (halonet): every comparison drowns in rounding.
        _halve_scales(model)
        row["scales"] = "halved"
        reference, exact = _reference(model, run, inputs)
        rounding = relative_error(values(run, model, inputs), reference)
    row["rounding"] = rounding
    return reference, exact


def _reference(model: nn.Module, run: Run, inputs: Inputs) -> tuple[Any, nn.Module | None]:
    """Results in float64 and the model that gave them; float32 where float64 does not run."""
    exact = copy.deepcopy(model).double()
    try:
        return values(run, exact, double(inputs)), exact
    except RuntimeError:
        return values(run, copy.deepcopy(model), inputs), None


def _halve_scales(model: nn.Module) -> None:
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if hasattr(module, "running_var") and isinstance(weight, Tensor):
                weight.mul_(0.5)


def peer(
    convert: Callable[[nn.Module], nn.Module],
    run: Run,
    model: nn.Module,
    inputs: Inputs,
    reference: Any,
) -> Row:
    """Error and counts of another converter's result, or what it raises."""
    try:
        converted = convert(copy.deepcopy(model)).eval()
        return {
            "error": relative_error(values(run, converted, inputs), reference),
            "counts": counts(run, converted, inputs),
        }
    except Exception as error:
        return {"raises": short(error)}


def short(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:140]}"


def peer_cell(found: Row | None, keys: tuple[str, ...]) -> str:
    """Counts of a peer's result, for a cell."""
    if found is None:
        return "none"
    if "raises" in found:
        return "raises"
    wrong = "" if found["error"] < 1e-3 else f" (off by {found['error']:.0e})"
    if found["error"] == float("inf"):
        wrong = " (other outputs)"
    return ", ".join(str(found["counts"][key]) for key in keys) + wrong
