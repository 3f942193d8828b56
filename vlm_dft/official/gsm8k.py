"""GSM8K's rule: a response and a record in, a Score out.

What follows "#### " is scored as openai/grade-school-math does (grade_school_math/dataset.py). A model that was not trained on its
format writes none, which is wrong there: then the last number counts, as in lm-evaluation-harness's "flexible-extract"
(lm_eval/tasks/gsm8k/gsm8k.yaml), a convention.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlm_dft.verdicts import Score

_OFFICIAL = re.compile(r"#### (-?[0-9.,]+)", re.ASCII)
_NUMBER = re.compile(
    r"-?[$0-9.,]{2,}|-?[0-9]+"
)  # of two characters at least it may be any of these signs, such as "..."


def score_gsm8k(response: str, sample: Mapping[str, Any]) -> Score:
    """The number after the first "#### ", else the last number, equal to the gold answer as text without commas."""
    gold = str(sample["gold_answer"])
    gold = (_OFFICIAL.search(gold) or [gold, gold])[1].replace(",", "").strip()
    if official := _OFFICIAL.search(response):
        answer = official[1].replace(",", "")
        return Score(answer == gold, answer, "after ####")
    numbers = _NUMBER.findall(response)
    if not numbers:
        return Score(False, None, "no number")
    answer = _bare(numbers[-1])
    return Score(bool(answer) and answer == _bare(gold), answer or None, "last number")


def _bare(number: str) -> str:
    """A number as it is compared there: without commas, dollar signs and a dot at its end."""
    return number.replace(",", "").replace("$", "").removesuffix(".")
