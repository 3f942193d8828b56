"""DynaMath's official rule: a response and a record in, a Score out; DynaMath/DynaMath at 598c3c3, evaluation/opensource_json_eval.py."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from vlm_dft.answers import Extracted
from vlm_dft.verdicts import Score

TOLERANCE = 0.001  # of a float


def score_dynamath(response: str, sample: Mapping[str, Any]) -> Score:
    """The "short answer" of the response's JSON: a float within 0.001, the gold letter among three characters, or the gold text in it.

    Which of the three is answer_type: "float", "multiple choice", or anything else. As officially, letter case matters.
    """
    found = dynamath_answer(response)
    if found.answer is None and found.rule != "no short answer":
        return Score(False, None, found.rule)
    answer = "None" if found.answer is None else found.answer  # officially so, and "No" is in it
    gold, kind = str(sample["gold_answer"]), sample.get("answer_type")
    if kind == "float":
        value, wanted = _float(answer), _number(gold)
        correct = value is not None and wanted is not None and abs(value - wanted) <= TOLERANCE
    elif kind == "multiple choice":
        correct = answer == gold if len(answer) == 1 else gold in answer[:3]
    else:
        correct = gold in answer
    return Score(correct, found.answer, found.rule)


def dynamath_answer(response: str) -> Extracted:
    """The official extraction: a response that is JSON but no object ("6.8", "true") answers nothing, for their code fails on it.

    One that is no JSON answers with its last line less the last character, whatever that is.
    """
    text = _outermost(response)
    try:
        read = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        answer = text.rsplit("\n", 1)[-1][:-1]
        return Extracted(answer, "last line less a character") if answer else Extracted(None, "empty last line")
    if not isinstance(read, dict):
        return Extracted(None, "JSON that is no object")
    short = read.get("short answer")
    answer = str(short)
    return Extracted(answer or None, "short answer") if short is not None else Extracted(None, "no short answer")


def _outermost(text: str) -> str:
    """From the first "{" to the last "}", all backslashes off; the text itself where there are none, or "{" ends it."""
    start, end = text.find("{"), text.rfind("}")
    if start == -1 or start == len(text) - 1 or end <= start:
        return text
    return text[start : end + 1].replace("\\", "")


def _float(answer: str) -> float | None:
    """A run of digits, else the first word: a number, or what stands before a \N{GREEK SMALL LETTER PI} times pi."""
    if answer.isdigit():
        return _number(answer)
    word = answer.split(" ", 1)[0]
    if "\N{GREEK SMALL LETTER PI}" in word:
        value = _number(word.split("\N{GREEK SMALL LETTER PI}", 1)[0])
        return None if value is None else value * math.pi
    return _number(word)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
