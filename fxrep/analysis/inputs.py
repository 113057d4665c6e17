"""Small inputs on which a traced forward may run, made from what is known of its graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxrep.analysis.channels import Channels
from fxrep.analysis.ranks import Ranks
from fxrep.capture.islands import Program
from fxrep.ops.calls import Calls
from fxrep.ops.op import Shape

# Sizes of images and sequences to try, smallest first, and the batch.
_SIZES = (32, 64, 224)
_BATCH = 2

# What to try for an input whose rank nothing decides.
_RANKS = (2, 3, 4)


@dataclass(frozen=True)
class _Shape:
    """The shape of an input.

    Attributes:
        sizes: from the front; None where any size may fit.
        is_index: whether the input selects rows of an embedding.
    """

    sizes: tuple[int | None, ...]
    is_index: bool


def possible_inputs(program: Program, like: Tensor) -> Iterator[dict[str, Tensor]]:
    """Inputs by name for the arguments that a call must give, from small to large.

    Args:
        program: the graph.
        like: a tensor of the dtype and device of the inputs.
    """
    generator = torch.Generator(like.device).manual_seed(0)
    for size, shapes in _choices(program):
        yield {n: _tensor(shape, size, like, generator) for n, shape in shapes.items()}


def _choices(program: Program) -> Iterator[tuple[int, dict[str, _Shape]]]:
    """Sizes and shapes to try: what the first layers take, then what all operations tell."""
    needed = [node for node in program.graph.find_nodes(op="placeholder") if _needed(program, node)]
    guesses = {str(node.target): _of_first_layer(program, node) for node in needed}
    likely = {name: shape for name, shape in guesses.items() if shape is not None}
    if len(likely) == len(needed):
        yield _SIZES[0], likely
    yield from _from_facts(program, needed)


def _of_first_layer(program: Program, node: fx.Node) -> _Shape | None:
    """The shape that the next convolution or BatchNorm takes, which is quick to find."""
    values = [node]
    for value in values:  # grows while it is read
        for user in value.users:
            layer: Any = None
            if user.op == "call_module":
                layer = program.calls.submodule(str(user.target))
            if isinstance(layer, nn.modules.conv._ConvNd):
                return _Shape(
                    (_BATCH, layer.in_channels, *([None] * len(layer.kernel_size))), False
                )
            if isinstance(layer, nn.BatchNorm2d):
                return _Shape((_BATCH, layer.num_features, None, None), False)
            if len(values) < _FEW and user not in values:
                values.append(user)
    return None


# How many values are looked at on the way to the next layer.
_FEW = 20


def _from_facts(program: Program, needed: list[fx.Node]) -> Iterator[tuple[int, dict[str, _Shape]]]:
    calls = program.calls
    ranks = Ranks(program.graph, calls, known=program.ranks)
    channels = Channels(program.graph, calls, ranks.assumed)
    first = _channels_of_first_convolution(program.module)
    known = [ranks.assumed(node) for node in needed]
    if None not in known:
        attempts = [(size, 0) for size in _SIZES]
    else:
        attempts = [(_SIZES[0], rank) for rank in _RANKS]
    for size, guess in attempts:
        shapes = {}
        for node, rank in zip(needed, known, strict=True):
            sizes = _sizes(channels, node, guess if rank is None else rank, first)
            shapes[str(node.target)] = _Shape(sizes, _is_index(calls, node))
        yield size, shapes


def _tensor(shape: _Shape, size: int, like: Tensor, generator: torch.Generator) -> Tensor:
    sizes = [size if each is None else each for each in shape.sizes]
    if shape.is_index:
        return torch.zeros(sizes, dtype=torch.long, device=like.device)
    made = torch.rand(sizes, generator=generator, device=like.device)
    return made.to(like.dtype)


def _needed(program: Program, node: fx.Node) -> bool:
    """Whether a call must give an argument."""
    name = str(node.target)
    parameter = next((p for p in program.arguments.parameters if p.name == name), None)
    has_default = parameter is not None and parameter.default is not inspect.Parameter.empty
    return not has_default or name in program.arguments.required


def _sizes(
    channels: Channels, node: fx.Node, rank: int, first: int | None
) -> tuple[int | None, ...]:
    sizes = [channels.of(node, axis) for axis in range(-rank, 0)]
    if rank > 1 and sizes[0] is None:
        sizes[0] = _BATCH
    if rank > 2 and sizes[1] is None:
        sizes[1] = first
    return tuple(sizes)


def _is_index(calls: Calls, node: fx.Node) -> bool:
    found = [calls.of(user) for user in node.users]
    return any(called is not None and called.op.shape is Shape.EMBEDDING for called in found)


def _channels_of_first_convolution(module: nn.Module) -> int | None:
    layers = (m for m in module.modules() if isinstance(m, nn.modules.conv._ConvNd))
    layer: Any = next(layers, None)
    return None if layer is None else int(layer.in_channels)
