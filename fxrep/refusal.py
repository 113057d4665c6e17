"""Why something is not done: the answer a user reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why something that looks like a rewrite is not one: the answer a user reads.

    Attributes:
        reason: in words.
        kind: "shared" if others need a value, or the operation that could not be read where it
            is no layer or BatchNorm.
    """

    reason: str
    kind: str = ""
