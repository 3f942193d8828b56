"""Geometry3K's rule: a response and a record in, a Score out.

Official is the scoring of a solver's number (lupantech/InterGPS at 99e6b52, symbolic_solver/test.py): right when no option's value is
nearer to it than the gold option's (so equals count), if the values of all options are known. How a model's words are read is not
official, there being no official protocol for models: a stated letter or option counts as it is, else a stated number as a solver's.
An abstention is wrong; the authors' code adds a quarter of the unsolved problems to the right ones.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_dft.answers import stated_answer
from vlm_dft.official.latex_numbers import LONGEST, latex_number
from vlm_dft.official.letters import gold_letter
from vlm_dft.robust import score_robust
from vlm_dft.verdicts import Score

LETTERS = "ABCDEFGH"
TAIL = 8000  # characters at the end of a response in which a number is looked for
_DRESS = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|[°$%]|\\text\s*\{[^{}]*\}|(?<=[\d}])\s*[a-zA-Z][a-zA-Z .^23]*\Z")


def score_geometry3k(response: str, sample: Mapping[str, Any]) -> Score:
    """The letter or option stated; else the option nearest to the number stated. precise_value: the options' values, where known."""
    choices, question = [str(choice) for choice in sample.get("choices") or ()], sample.get("question")
    gold = gold_letter(sample)
    stated = score_robust(response, {**sample, "question_type": "multi_choice"})
    if stated.extracted is not None and stated.extracted in tuple(LETTERS):
        return Score(stated.extracted == gold, stated.extracted, f"letter: {stated.rule}")
    values = option_values(choices, sample.get("precise_value"))
    number = stated_answer(response[-TAIL:], kind="number", question=question)
    value = None if number.answer is None else _value(number.answer)
    if value is None or not values or gold is None or LETTERS.find(gold) not in range(len(values)):
        return Score(False, None, stated.rule)
    distances = [abs(option - value) for option in values]
    nearest = min(distances)
    return Score(distances[LETTERS.index(gold)] == nearest, number.answer, f"nearest option: {number.rule}")


def option_values(choices: Sequence[str], known: Sequence[float | None] | None) -> list[float]:
    """The options' values as given, else as they can be read; empty where one of them is not known."""
    values = list(known) if known else [_value(choice) for choice in choices]
    return [float(value) for value in values if value is not None] if None not in values else []


def _value(text: str) -> float | None:
    """A number without degrees, units and currency; None where there is none that a float can hold."""
    value = latex_number(_DRESS.sub("", text)) if len(text) <= LONGEST else None
    return float(value) if value is not None and abs(value) < sys.float_info.max else None
