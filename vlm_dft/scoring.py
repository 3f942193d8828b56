"""Scoring: a response and a sample's record in, a Score out: right or wrong, what was extracted, which rule said so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_dft.cards import nearest
from vlm_dft.official import OFFICIAL
from vlm_dft.robust import score_robust
from vlm_dft.verdicts import Score, Scorer

__all__ = ["RULES", "SCORERS", "Score", "Scorer", "score_response"]


def score_response(response: str, sample: Mapping[str, Any], *, benchmark: str, rule: str = "official") -> Score:
    """Score one response by a benchmark's rule. Deterministic, no model, bounded time.

    sample: question, choices, question_type, answer_type, precision, unit, gold_answer; what the rule does not need
    may be absent. Raises ValueError for an unknown benchmark or rule, with the nearest name.
    """
    if rule not in RULES:
        raise ValueError(f"Unknown scoring rule {rule!r}.{nearest(rule, RULES)} Known: {', '.join(RULES)}.")
    scorers = RULES[rule]
    if benchmark not in scorers:
        raise ValueError(
            f"No scorer for benchmark {benchmark!r} under rule {rule!r}.{nearest(benchmark, scorers)} "
            f"Known: {', '.join(scorers)}."
        )
    return scorers[benchmark](response, sample)


SCORERS: dict[str, Scorer] = OFFICIAL
"""Benchmark's scorer by name, as its authors score it."""

RULES: dict[str, dict[str, Scorer]] = {"official": OFFICIAL, "robust": dict.fromkeys(OFFICIAL, score_robust)}
