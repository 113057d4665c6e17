"""The report: rewrites with their errors, and the operations left alone, with reasons."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

_PLACES_SHOWN = 12  # in one cell of a printed table; the fields of `Report` hold all


@dataclass(frozen=True)
class Rewrite:
    """One rewrite that was applied.

    Args:
        pass_name: the pass that made the rewrite.
        where: module path of the operations replaced, such as ``stages.0.1.conv``.
        before: names of the operations replaced, one entry per operation.
        after: names of the operations that replace them.
        macs_before: multiply-accumulates per output position before.
        macs_after: the same after.
        parameters_before: elements of weights and biases before.
        parameters_after: the same after.
        error: largest error of the new operations, with their weights rounded, relative to the old
            operations in float64; None without validation.
        seconds_before: time before, on the example inputs; None when it was not measured.
        seconds_after: the same after.
    """

    pass_name: str
    where: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int
    error: float | None
    seconds_before: float | None = None
    seconds_after: float | None = None


@dataclass(frozen=True)
class Skip:
    """An operation, or a module, that looked rewritable and was left alone.

    Args:
        pass_name: the pass that declined.
        where: its module path.
        reason: why, with the value that forbids the rewrite.
    """

    pass_name: str
    where: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The outcome of one :func:`fxrep.optimize`; ``print`` it to read it.

    Args:
        rewrites: in the order they were applied. A later rewrite may replace the result of an
            earlier one, so add up differences (``removed``, ``macs_saved``), not the ``before``
            columns.
        skipped: operations and modules left alone.
        error: largest relative error of the whole optimized model against the original run in
            float64; None without example inputs.
        baseline_error: the same for the original model in the dtype of the inputs: the error of
            rounding alone.
    """

    rewrites: tuple[Rewrite, ...]
    skipped: tuple[Skip, ...]
    error: float | None = None
    baseline_error: float | None = None

    @property
    def removed(self) -> dict[str, int]:
        """Number of operations removed, by name; a negative number counts operations added."""
        count: Counter[str] = Counter()
        for rewrite in self.rewrites:
            count.update(rewrite.before)
            count.subtract(rewrite.after)
        count.pop("constant", None)  # a constant is stored, not run
        return {name: n for name, n in sorted(count.items(), key=lambda item: -item[1]) if n}

    @property
    def macs_saved(self) -> int:
        """Multiply-accumulates saved, per output position of each rewrite, added up."""
        return sum(rewrite.macs_before - rewrite.macs_after for rewrite in self.rewrites)

    @property
    def parameters_saved(self) -> int:
        """Weight and bias elements that need no longer be stored."""
        return sum(r.parameters_before - r.parameters_after for r in self.rewrites)

    @property
    def largest_error(self) -> float:
        """The largest relative error among the rewrites, 0.0 without any."""
        return max((r.error for r in self.rewrites if r.error is not None), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, numbers and strings, ready for ``json.dump``.

        Returns:
            ``rewrites`` and ``skipped`` as lists of dicts with the fields of their dataclasses,
            ``error`` and ``baseline_error`` (None when unknown or not finite), ``totals``.
        """
        return {
            "rewrites": [_plain(asdict(rewrite)) for rewrite in self.rewrites],
            "skipped": [_plain(asdict(skip)) for skip in self.skipped],
            "error": _finite(self.error),
            "baseline_error": _finite(self.baseline_error),
            "totals": {
                "rewrites": len(self.rewrites),
                "skipped": len(self.skipped),
                "removed": self.removed,
                "macs_saved": self.macs_saved,
                "parameters_saved": self.parameters_saved,
                "largest_error": _finite(self.largest_error),
            },
        }

    def __str__(self) -> str:
        """Render one table of rewrites per pass, the skips by reason, and the totals."""
        sections = [
            _rewrite_table(name, [r for r in self.rewrites if r.pass_name == name])
            for name in dict.fromkeys(rewrite.pass_name for rewrite in self.rewrites)
        ]
        if self.skipped:
            sections.append(_skip_table(self.skipped))
        sections.append(self.summary())
        return "\n\n".join(sections)

    def summary(self) -> str:
        """The totals alone: a few lines."""
        rows = [
            ("rewrites", f"{len(self.rewrites):,}"),
            ("skipped", f"{len(self.skipped):,}"),
            ("operations removed", _counts(self.removed) or "none"),
            ("parameters saved", f"{self.parameters_saved:,}"),
            ("largest error of a rewrite", f"{self.largest_error:.1e}"),
        ]
        if self.error is not None:
            rows.append(("error of the whole model", f"{self.error:.1e}"))
        if self.baseline_error is not None:
            rows.append(("error of the original (rounding)", f"{self.baseline_error:.1e}"))
        return tabulate(rows, tablefmt="plain", disable_numparse=True)


def _rewrite_table(name: str, rewrites: Sequence[Rewrite]) -> str:
    timed = any(rewrite.seconds_before is not None for rewrite in rewrites)
    places: dict[tuple[object, ...], list[str]] = {}
    for number, rewrite in enumerate(rewrites):
        # A row for each rewrite, but equal removals share a row: there may be hundreds.
        own_row = number if rewrite.after else None
        cells = (*_cells(rewrite), *([_times(rewrite)] if timed else ()))
        places.setdefault((own_row, *cells), []).append(rewrite.where or "(root)")
    rows = [(_places(where), *cells) for (_, *cells), where in places.items()]
    headers = ["where", "operations", "MACs per position", "parameters", "error"]
    headers += ["time in ms"] if timed else []
    align = ["left", "left", *["right"] * (len(headers) - 2)]
    table = tabulate(rows, headers, tablefmt="simple", disable_numparse=True, colalign=align)
    return f"{name}: {len(rewrites):,} rewritten\n{table}"


def _cells(rewrite: Rewrite) -> tuple[str, ...]:
    return (
        f"{_counts(rewrite.before)} -> {_counts(rewrite.after) or 'nothing'}",
        _change(rewrite.macs_before, rewrite.macs_after),
        _change(rewrite.parameters_before, rewrite.parameters_after),
        "-" if rewrite.error is None else f"{rewrite.error:.1e}",
    )


def _times(rewrite: Rewrite) -> str:
    before, after = rewrite.seconds_before, rewrite.seconds_after
    if before is None or after is None:
        return "-"
    return f"{1e3 * before:.3g} -> {1e3 * after:.3g}"


def _skip_table(skipped: Sequence[Skip]) -> str:
    places: dict[tuple[str, str], list[str]] = {}
    for skip in skipped:
        places.setdefault((skip.pass_name, skip.reason), []).append(skip.where or "(root)")
    rows = []
    for (pass_name, reason), where in places.items():
        rows.append((pass_name, _places(where), reason))
    table = tabulate(
        rows, ("pass", "where", "reason"), tablefmt="simple", disable_numparse=True,
        maxcolwidths=[None, None, 72],
    )  # fmt: skip
    return f"skipped: {len(skipped):,}\n{table}"


def _places(where: Sequence[str]) -> str:
    """All places in one cell, a line for each, as they share the other cells of the row."""
    shown = list(where[:_PLACES_SHOWN])
    if len(where) > _PLACES_SHOWN:
        shown.append(f"... and {len(where) - _PLACES_SHOWN} more")
    return "\n".join(shown)


def _counts(count: Iterable[str] | dict[str, int]) -> str:
    """``{"conv2d": 3, "add": 2}`` as ``3 conv2d + 2 add``."""
    items = count.items() if isinstance(count, dict) else Counter(count).items()
    return " + ".join(f"{n} {name}" for name, n in items)


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Tuples to lists and non-finite numbers to None, for JSON."""
    return {
        key: list(value) if isinstance(value, tuple) else _finite(value)
        for key, value in fields.items()
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
