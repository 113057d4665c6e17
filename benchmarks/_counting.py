"""What a model does at run time: operators dispatched, convolutions, BatchNorms, MACs, traffic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

_CONVOLUTIONS = {"convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution"}


@dataclass(frozen=True)
class Counts:
    """One forward pass.

    Args:
        convs: convolutions, transposed ones included.
        batch_norms: normalisations by BatchNorm.
        directly_after_conv: those among them whose input is the output of a convolution.
        ops: all operators dispatched, views included.
        macs: multiply-accumulates of convolutions, matrix products and attention.
        traffic: bytes these read and write, each operand and result once.
    """

    convs: int
    batch_norms: int
    directly_after_conv: int
    ops: int
    macs: int
    traffic: int


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.macs = 0
        self.traffic = 0
        self.after_conv = 0
        self.from_conv = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.ops[name] += 1
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.macs += formula(*args, **kwargs, out_val=out) // 2
            self.traffic += sum(x.nbytes for x in _tensors((args, kwargs, out)))
        if name in _CONVOLUTIONS:
            self.from_conv[out] = True
        elif "batch_norm" in name and args[0] in self.from_conv:
            self.after_conv += 1
        return out


def count(run: Callable[[], Any]) -> Counts:
    """Count what ``run()``, one forward pass, dispatches (no gradients)."""
    with torch.no_grad(), _Counter() as counter:
        run()
    ops = counter.ops
    return Counts(
        convs=sum(n for name, n in ops.items() if name in _CONVOLUTIONS),
        batch_norms=sum(n for name, n in ops.items() if "batch_norm" in name),
        directly_after_conv=counter.after_conv,
        ops=ops.total(),
        macs=counter.macs,
        traffic=counter.traffic,
    )


def bytes_of(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model."""
    return sum(
        x.nbytes for x in {id(x): x for x in (*model.parameters(), *model.buffers())}.values()
    )


def _tensors(nest: Any) -> list[Tensor]:
    return [x for x in tree_leaves(nest) if isinstance(x, Tensor)]


def relative_error(out: Any, reference: Any) -> float:
    """Largest difference of two results over the largest value of the reference, per tensor.

    Args:
        out: a tensor or any nest of them.
        reference: the same nest, in float64.

    Returns:
        The largest ratio over all tensors; NaN when either holds one; infinite when the nests or
        shapes differ.
    """
    ours, theirs = _tensors(out), _tensors(reference)
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if b.numel() == 0:
            continue
        scale = b.double().abs().max().clamp_min(1e-30)
        error = ((a.double() - b.double()).abs().max() / scale).item()
        if error != error:
            return error
        worst = max(worst, error)
    return worst
