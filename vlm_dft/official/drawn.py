"""The embedded set's rule: a response and a record in, a Score out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_dft.answers import answer_line, plain
from vlm_dft.verdicts import Score


def score_drawn(response: str, sample: Mapping[str, Any]) -> Score:
    """What follows the last "Answer:", equal to the gold answer but for case and whitespace."""
    found = answer_line(response)
    correct = found.answer is not None and plain(found.answer) == plain(str(sample["gold_answer"]))
    return Score(correct, found.answer, found.rule)
