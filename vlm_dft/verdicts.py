"""Verdicts: what a scorer says of one response."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Score:
    """One verdict. `extracted` is None for an abstention: the response answers nothing.

    An abstention counts as wrong, but where an official rule gives it to the nearest option by luck (MathVista).
    decided_by: "rule", or the name of the judge that extracted or judged.
    """

    correct: bool
    extracted: str | None
    rule: str
    decided_by: str = "rule"


Scorer = Callable[[str, Mapping[str, Any]], Score]
"""A response and a sample's record in, its Score out."""
