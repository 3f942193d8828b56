"""Answers: response text in, the extracted answer and the rule that found it out. No torch, no eval, linear time."""

from __future__ import annotations

import re
from typing import NamedTuple


class Extracted(NamedTuple):
    """What a response answers (None: nothing) and the name of the rule that says so."""

    answer: str | None
    rule: str


def answer_line(response: str) -> Extracted:
    """What follows the last "Answer:" up to the end of its line."""
    marks = list(re.finditer(r"answer:", response, re.IGNORECASE))
    answer = response[marks[-1].end() :].split("\n", 1)[0].strip() if marks else ""
    return Extracted(answer, "answer line") if answer else Extracted(None, "no answer line")


def plain(text: str) -> str:
    """Text with its case folded and its whitespace squeezed, for exact comparison."""
    return " ".join(text.split()).casefold()
