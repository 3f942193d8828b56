"""Scoring: a response and a sample's record in, a Score out: right or wrong, what was extracted, which rule said so.

Importing it brings no torch and no sympy: math-verify is imported by the first answer that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_dft.cards import nearest
from vlm_dft.errors import RowError
from vlm_dft.official import OFFICIAL
from vlm_dft.robust import score_robust
from vlm_dft.verdicts import Score, Scorer

__all__ = ["RULES", "SCORERS", "Score", "Scorer", "score_response"]


def score_response(response: str, sample: Mapping[str, Any], *, benchmark: str, rule: str = "official") -> Score:
    """Score one response by a benchmark's rule. Deterministic, no model, bounded time, and no error for any string.

    sample: question, choices, question_type, answer_type, precision, unit, gold_answer; all but the last may be absent.
    rule: "official", as the benchmark's authors score; "robust", the same sane rule for all benchmarks.
    Raises ValueError for an unknown benchmark or rule, with the nearest name; RowError for a sample without a gold answer or
    with a value that is none of its key (choices that are no list of texts); TypeError for a response that is no text.
    """
    if rule not in RULES:
        raise ValueError(f"Unknown scoring rule {rule!r}.{nearest(rule, RULES)} Known: {', '.join(RULES)}.")
    scorers = RULES[rule]
    if benchmark not in scorers:
        raise ValueError(
            f"No scorer for benchmark {benchmark!r} under rule {rule!r}.{nearest(benchmark, scorers)} "
            f"Known: {', '.join(scorers)}."
        )
    if not isinstance(response, str):
        raise TypeError(
            f"A response must be text (str), found {type(response).__name__}. Pass the decoded text of the model, '' if it said nothing."
        )
    if sample.get("gold_answer") is None:
        raise RowError(
            f"A sample must have a 'gold_answer' to be scored, found the keys {', '.join(map(str, sample)) or '(none)'}. "
            "Give it, as text, or leave the sample out.",
            "no gold answer",
        )
    return scorers[benchmark](response, _checked(sample))


def _checked(sample: Mapping[str, Any]) -> Mapping[str, Any]:
    """The sample with options that are numbers as text. Raises RowError for a value of another kind than its key has."""
    for key in ("question", "unit"):
        if not isinstance(sample.get(key), str | None):
            raise _unfit(sample, key, "text or None")
    precision = sample.get("precision")
    if precision is not None and not (isinstance(precision, int | float) and abs(precision) <= 100):
        raise _unfit(sample, "precision", "a number of decimals or None")
    choices = sample.get("choices")
    if choices is None or (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)):
        return sample
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str | int | float) for choice in choices):
        raise _unfit(sample, "choices", "a list of texts or None")
    return {**sample, "choices": [str(choice) for choice in choices]}


def _unfit(sample: Mapping[str, Any], key: str, expected: str) -> RowError:
    return RowError(
        f"A sample's {key!r} must be {expected}, found {str(sample[key])[:80]!r}. Mend it, or leave the sample out.",
        f"unfit {key}",
    )


SCORERS: dict[str, Scorer] = OFFICIAL
"""Benchmark's scorer by name, as its authors score it."""

RULES: dict[str, dict[str, Scorer]] = {"official": OFFICIAL, "robust": dict.fromkeys(OFFICIAL, score_robust)}
"""Scorers by rule and benchmark: the robust rule is the same for all."""
