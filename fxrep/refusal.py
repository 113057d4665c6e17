"""Why something is not done: the answer a user reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why something that looks like a rewrite is not one: the answer a user reads.

    Attributes:
        reason: in words.
    """

    reason: str
