"""ScienceQA's rule: a response and a record in, a Score out; as LLaVA scores it, haotian-liu/LLaVA, llava/eval/eval_science_qa.py.

ScienceQA's own code (lupantech/ScienceQA, models/run_gpt3.py) asks text models, knows "The answer is X." alone and draws an option at
random where there is none or two; for models that see, the field scores as LLaVA does, which draws nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlm_dft.answers import Extracted
from vlm_dft.official.letters import gold_letter
from vlm_dft.verdicts import Score

LETTERS = "ABCDE"
_STATED = (
    re.compile(r"The answer is ([A-E])\."),
    re.compile(r"The answer is ([A-E])"),
)  # the second also finds "an Antelope"


def score_scienceqa(response: str, sample: Mapping[str, Any]) -> Score:
    """A bare letter, a letter and ". " at the beginning, or "The answer is X": the gold letter. Beyond the options: wrong."""
    found = scienceqa_answer(response)
    letters = LETTERS[: len(sample.get("choices") or LETTERS)]
    if found.answer is None or found.answer not in letters:
        return Score(False, None, found.rule if found.answer is None else "letter beyond options")
    return Score(found.answer == gold_letter(sample), found.answer, found.rule)


def scienceqa_answer(response: str) -> Extracted:
    """The letter that LLaVA's code reads in a response."""
    text = response.replace("\n", ". ")
    bare = text.strip()
    if len(bare) == 1 and bare in LETTERS:
        return Extracted(bare, "bare letter")
    if text[:1] in tuple(LETTERS) and text[1:3] == ". ":
        return Extracted(text[0], "leading letter")
    for pattern in _STATED:
        if stated := pattern.search(text):
            return Extracted(stated[1], "the answer is + letter")
    return Extracted(None, "no letter")
