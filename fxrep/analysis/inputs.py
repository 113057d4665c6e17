"""Small inputs on which a model may run, made from what is known of its graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxrep.analysis.channels import Channels
from fxrep.analysis.ranks import Ranks
from fxrep.capture.islands import Capture, Program
from fxrep.ops.calls import Calls
from fxrep.ops.op import Shape

# Sizes of images and sequences to try, smallest first, and the batch.
_SIZES = (32, 64, 224)
_BATCH = 2


def possible_inputs(captured: Capture) -> Iterator[tuple[Tensor, ...]]:
    """Inputs in the model's dtype and on its device, from small to large.

    Ranks and channels are those of the whole model's graph; a model without one is taken to read
    what its first convolution reads. Nothing is made for an input of unknown rank.
    """
    like = next((p for p in captured.model.parameters() if p.is_floating_point()), torch.ones(()))
    program = next((each for each in captured.programs if not each.path), None)
    shapes = _first_convolution(captured.model) if program is None else _placeholders(program)
    if shapes is None:
        return
    generator = torch.Generator(like.device).manual_seed(0)
    for size in _SIZES:
        yield tuple(_tensor(sizes, size, is_index, like, generator) for sizes, is_index in shapes)


_Shapes = list[tuple[tuple[int | None, ...], bool]]  # sizes, None if free; whether it is an index


def _tensor(
    sizes: tuple[int | None, ...], size: int, is_index: bool, like: Tensor, generator: Any
) -> Tensor:
    shape = [size if each is None else each for each in sizes]
    if is_index:
        return torch.zeros(shape, dtype=torch.long, device=like.device)
    made = torch.rand(shape, generator=generator, device=like.device)
    return made.to(like.dtype)


def _placeholders(program: Program) -> _Shapes | None:
    """The shapes of the inputs that a call must give."""
    calls = Calls(program.module)
    ranks = Ranks(program.graph, calls, known=program.ranks)
    channels = Channels(program.graph, calls, ranks.assumed)
    found: _Shapes = []
    for node in program.graph.find_nodes(op="placeholder"):
        parameter = program.arguments.signature.parameters.get(str(node.target))
        name = str(node.target)
        if name in program.arguments.specialized:
            continue
        has_default = parameter is not None and parameter.default is not inspect.Parameter.empty
        if has_default and name not in program.arguments.required:
            continue
        rank = ranks.assumed(node)
        if rank is None:
            return None
        found.append((_sizes(channels, node, rank), _is_index(calls, node)))
    return found or None


def _sizes(channels: Channels, node: fx.Node, rank: int) -> tuple[int | None, ...]:
    sizes = [channels.of(node, axis) for axis in range(-rank, 0)]
    if rank > 1 and sizes[0] is None:
        sizes[0] = _BATCH
    return tuple(sizes)


def _is_index(calls: Calls, node: fx.Node) -> bool:
    found = [calls.of(user) for user in node.users]
    return any(called is not None and called.op.shape is Shape.EMBEDDING for called in found)


def _first_convolution(model: nn.Module) -> _Shapes | None:
    """The shape that the first convolution reads, for a forward with one argument."""
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    layers = (m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd))
    layer = next(layers, None)
    if layer is None or len(needed) != 1:
        return None
    free = (None,) * len(layer.kernel_size)
    return [((_BATCH, layer.in_channels, *free), False)]
