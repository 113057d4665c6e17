"""Refusals: why a rewrite is not made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why a rewrite is not made although the graph looks like one.

    Attributes:
        reason: a sentence for the report, which names the value that forbids the rewrite.
    """

    reason: str
