"""MathVista's official rule: a response and a record in, a Score out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

from vlm_dft.answers import Asking, Extracted, Kind, stated_in
from vlm_dft.option_reading import covered_option, option_values, options_quoted
from vlm_dft.statements import DOLLAR, conclusions, segments, settled, statements
from vlm_dft.verdicts import Score

LISTS: dict[str | None, Kind] = {"list": "list"}
BRACKETED = re.compile(r"\(([a-zA-Z])\)")

MISSING = re.compile(
    r"\b(?:options?|choices?|letter|answer)\b[^.\n]{0,60}\b(?:not|n't) (?:\w+ ){0,2}(?:provided|listed|given|among"
    r"|included|available|one of)\b|\bnone of the (?:given |provided |answer )?(?:options|choices)\b",
    re.IGNORECASE,
)
"""Says that the answer found is no option."""


def score_mathvista(response: str, sample: Mapping[str, Any]) -> Score:
    """Extract (by rules where the official code asks GPT), normalise, compare (evaluation/calculate_score.py)."""
    found = mathvista_extraction(response, sample)
    return score_extraction(found.answer, sample, rule=found.rule)


def score_extraction(extraction: str | None, sample: Mapping[str, Any], *, rule: str = "stored extraction") -> Score:
    """The official verdict on an extraction; "" (or None) still goes to the nearest choice."""
    prediction = mathvista_normal(extraction or "", sample)
    return Score(prediction == str(sample["gold_answer"]), extraction or None, rule)


def mathvista_normal(extraction: str, sample: Mapping[str, Any]) -> str | None:
    """An extraction as the official code compares it; None: it is no number.

    A choice: the first "(X)", a letter, else the choice at the least edit distance (the first of equals). An integer is
    truncated, a float rounded to the precision, neither understands units, commas or percent signs.
    """
    choices = sample.get("choices")
    if choices and sample.get("question_type", "multi_choice") == "multi_choice":
        return _choice(extraction.strip(), choices)
    answer_type = sample.get("answer_type")
    try:
        if answer_type == "integer":
            return str(int(float(extraction)))
        if answer_type == "float":
            return str(round(float(extraction), int(sample["precision"])))
    except (ValueError, OverflowError, TypeError, KeyError):
        return None
    return extraction


def _choice(extraction: str, choices: Sequence[str]) -> str:
    found = BRACKETED.search(extraction)
    letter = found[1].upper() if found else extraction
    index = ord(letter) - ord("A") if len(letter) == 1 else -1
    if 0 <= index < len(choices):
        return choices[index]
    return min(choices, key=lambda choice: Levenshtein.distance(letter, choice))


def mathvista_extraction(response: str, sample: Mapping[str, Any]) -> Extracted:
    """The official short circuits, then what the response says its answer is, as the official extractor (GPT) takes it."""
    if short := short_circuit(response, sample):
        return short
    choices = sample.get("choices")
    return _read(response, list(choices) if choices else None, sample.get("answer_type"), sample.get("question"))


def short_circuit(response: str, sample: Mapping[str, Any]) -> Extracted | None:
    """What the official code extracts without asking GPT; None where it asks."""
    choices, kind = sample.get("choices"), sample.get("answer_type")
    if response == "":
        return Extracted(None, "empty response")
    try:
        if choices and response in choices:
            return Extracted(response, "is a choice")
        if not choices and kind == "integer":
            return Extracted(str(int(response)), "is an integer")
        if not choices and kind == "float":
            return Extracted(str(float(response)), "is a float")
    except ValueError:
        pass
    return None


def _read(response: str, choices: list[str] | None, kind: str | None, question: str | None) -> Extracted:
    """Of a response that runs on into other questions, the extractor takes the last answer."""
    if "(Unit: $)" in (question or ""):
        response = DOLLAR.sub("$", response)
    asking = Asking(choices, question)
    found = Extracted(None, "no answer stated")
    for text in reversed(segments(settled(response), question)):
        found = _read_choice(text, choices, asking) if choices else stated_in(text, LISTS.get(kind, "number"), asking)
        if found.answer:
            return found._replace(answer=found.answer.rstrip("%"))
        if found.rule == "abstains":
            break
    return found


def _read_choice(text: str, choices: list[str], asking: Asking) -> Extracted:
    """The option stated, else what the extractor takes instead, which then goes to the nearest option."""
    found = stated_in(text, "choice", asking)
    if found.answer:
        return found
    last = statements(text)[-1:]
    if last and (beyond := BRACKETED.match(last[0].text)):
        return Extracted(f"({beyond[1]})", "letter beyond the options")
    missing = MISSING.search(text)
    if found.rule == "abstains" and not missing:
        return found
    text = text[: missing.start()] if missing else text
    number = stated_in(text, "number", asking)
    if number.answer and None not in option_values(tuple(choices)):
        return number
    best = conclusions(text, asking.question)[:1]
    if quoted := [letter for part in best for letter in options_quoted(part, choices)]:
        return Extracted(quoted[0], "first option quoted")
    if best and (covered := covered_option(best[0], choices)):
        return Extracted(covered, "option's words")
    return number if number.answer else found
