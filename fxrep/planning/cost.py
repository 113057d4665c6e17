"""The work that a rewrite costs and saves, and the cost models that decide whether it pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fxrep.errors import OptionError

# Sizes of the result at which works are compared. The inner positions that a result needs grow at
# different rates with its size (padding, stride), so a rewrite must pay at all of them.
SIZES = (1, 2, 4, 7, 16, 56, 224)
TYPICAL = SIZES.index(16)


@dataclass(frozen=True)
class Work:
    """The work of some operations, per sample.

    Attributes:
        macs: multiply-accumulates, at each of `SIZES` output positions per axis.
        traffic: elements read and written, likewise.
        convolutions: number of convolution and linear layers.
        operations: number of operations, layers included.
        parameters: elements of weights, biases and statistics.
        poolings: number of average poolings among the operations.
    """

    macs: tuple[int, ...] = (0,) * len(SIZES)
    traffic: tuple[int, ...] = (0,) * len(SIZES)
    convolutions: int = 0
    operations: int = 0
    parameters: int = 0
    poolings: int = 0


def total(works: Sequence[Work]) -> Work:
    """The sum of works."""
    if not works:
        return Work()
    return Work(
        tuple(map(sum, zip(*(work.macs for work in works), strict=True))),
        tuple(map(sum, zip(*(work.traffic for work in works), strict=True))),
        sum(work.convolutions for work in works),
        sum(work.operations for work in works),
        sum(work.parameters for work in works),
        sum(work.poolings for work in works),
    )


@runtime_checkable
class CostModel(Protocol):
    """Decides whether a legal rewrite is worth it."""

    @property
    def name(self) -> str:
        """The name of the cost model, for reports."""

    def objection(self, before: Work, after: Work) -> str | None:
        """Why not to rewrite, with both figures, or None to go ahead.

        Args:
            before: the work of what is there: a region, some paths of it, or one operation.
            after: the work of what would replace it.
        """


@dataclass(frozen=True)
class MacsCost:
    """Takes a rewrite that has more of nothing, and fewer operations or multiply-accumulates.

    The works compared are multiply-accumulates, memory traffic, convolutions and operations; less
    traffic alone is no reason to rewrite.
    """

    name: str = "macs"

    def objection(self, before: Work, after: Work) -> str | None:
        """See `CostModel`."""
        for what in ("convolutions", "operations"):
            old, new = getattr(before, what), getattr(after, what)
            if new > old:
                return f"{what} {old} -> {new}"
        for what in ("macs", "traffic"):
            old, new = getattr(before, what), getattr(after, what)
            for size, a, b in zip(SIZES, old, new, strict=True):
                # At one position the launch of the operations takes the time, not their traffic.
                if b > a and (what == "macs" or size > 1):
                    label = "MACs" if what == "macs" else "elements moved"
                    return f"{label} {a} -> {b} at output size {size}"
        if after.operations >= before.operations and after.macs[TYPICAL] >= before.macs[TYPICAL]:
            return f"operations {before.operations} -> {after.operations}, no fewer MACs"
        return None


@dataclass(frozen=True)
class AlwaysCost:
    """Takes every rewrite that leaves fewer operations: for accelerators that only convolve."""

    name: str = "always"

    def objection(self, before: Work, after: Work) -> str | None:
        """See `CostModel`."""
        fewer = after.operations < before.operations
        # A convolution may take the place of a pooling alone, and a padding that of a layer.
        other = before.poolings > 0 or after.convolutions < before.convolutions
        if fewer or (other and after.operations == before.operations):
            return None
        return f"operations {before.operations} -> {after.operations}"


@dataclass(frozen=True)
class _Checked:
    """A cost model of the user's, whose answers are looked at."""

    model: CostModel

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name

    def objection(self, before: Work, after: Work) -> str | None:
        """The model's objection.

        Raises:
            OptionError: it is neither a reason nor None.
        """
        answer = self.model.objection(before, after)
        if answer is None or isinstance(answer, str):
            return answer
        raise OptionError(
            f"cost: the objection of {self.name!r} is {answer!r}: it must be a reason (str) not to "
            "rewrite, or None to go ahead"
        )


_MODELS: dict[str, tuple[CostModel, ...]] = {
    "macs": (MacsCost(),),
    "always": (AlwaysCost(),),
    # A rewrite that the first model takes may be timed; one that only the second takes always is.
    "measure": (MacsCost(), AlwaysCost()),
}


def cost_models(cost: str | CostModel) -> tuple[CostModel, ...]:
    """The cost models to ask, in order.

    Args:
        cost: a name of cost models, or a cost model.

    Raises:
        OptionError: `cost` is neither.
    """
    if isinstance(cost, str) and cost in _MODELS:
        return _MODELS[cost]
    if not isinstance(cost, (str, type)) and isinstance(cost, CostModel):
        return (_Checked(cost),)
    names = ", ".join(repr(name) for name in _MODELS)
    raise OptionError(
        f"cost={cost!r} is no cost model: pass one of {names}, or an object with `name` and "
        "`objection(before, after)`"
    )
