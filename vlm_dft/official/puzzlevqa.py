"""PuzzleVQA's official rule: a response and a record in, a Score out; declare-lab/LLM-PuzzleTest, PuzzleVQA/{main,prompting}.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlm_dft.official.letters import gold_letter
from vlm_dft.verdicts import Score

_LETTERS = (("last letter in parentheses", re.compile(r"\(([ABCD])\)")), ("last capital A to D", re.compile(r"[ABCD]")))


def score_puzzlevqa(response: str, sample: Mapping[str, Any]) -> Score:
    """The last "(X)", else the last capital A to D anywhere ("A circle" answers A); a letter beyond the options is the first option.

    A response without any is an abstention: their code then asks the model a second time ("Therefore, among (A) (B) (C) (D), the
    answer is:") and gives up after that.
    """
    choices = [str(choice) for choice in sample.get("choices") or ()]
    for rule, pattern in _LETTERS:
        if found := pattern.findall(response):
            place = "ABCD".index(found[-1])
            if not choices:
                return Score(found[-1] == gold_letter(sample), found[-1], rule)
            answer = choices[place] if place < len(choices) else choices[0]
            return Score(answer == _gold_option(sample, choices), answer, rule)
    return Score(False, None, "no letter")


def _gold_option(sample: Mapping[str, Any], choices: list[str]) -> str:
    """The gold answer as an option's text; it is one in their data, a letter in others' copies."""
    gold = str(sample["gold_answer"])
    place = "ABCD".find(gold) if len(gold) == 1 and gold not in choices else -1
    return choices[place] if 0 <= place < len(choices) else gold
