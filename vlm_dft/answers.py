"""Answers: response text in, the extracted answer and the rule that found it out. No torch, no eval, linear time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from vlm_dft.number_reading import numbers_in, stated_number
from vlm_dft.option_reading import leading_letter, letters_named, named_option, option_letters, same_option
from vlm_dft.statements import sentences, settled, statements

Kind = Literal["choice", "number", "list", "text", "expression"]

SHORT = 80
"""Characters of a one-line response that is taken for the answer itself."""


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


def stated_answer(response: str, *, choices: Sequence[str] | None = None, kind: Kind) -> Extracted:
    """What a response says its answer is: the last place that states one and can be read; abstains rather than guesses.

    choices: the options' texts, or None where they are in the picture. kind: "choice" answers with a letter from A,
    "number" with a number as written (without commas and currency; a percent sign stays), "list" with its
    brackets, "text" and "expression" with what is written. Of a response longer than 32,000 characters, the first
    8,000 and the last 24,000 are read.
    """
    text = settled(response)
    if not text:
        return Extracted(None, "empty response")
    read = READERS[kind]
    options = list(choices) if choices else None
    for one in reversed(statements(text)):
        if found := read(one.text, options):
            return Extracted(found, one.rule)
    return UNANNOUNCED[kind](text, options)


def _choice_unannounced(text: str, choices: Sequence[str] | None) -> Extracted:
    letters = option_letters(choices)
    if choices and (same := same_option(text, choices)):
        return Extracted(same, "option's text")
    if letter := leading_letter(text, letters):
        return Extracted(letter, "leading letter")
    parts = sentences(text)
    for part, rule in ((parts[-1], "last sentence"), (parts[0], "first sentence")) if parts else ():
        if found := named_option(part, choices):
            return Extracted(found, rule)
    named = set(letters_named(text, letters))
    return Extracted(named.pop(), "only letter") if len(named) == 1 else Extracted(None, "no option stated")


def _number_unannounced(text: str, choices: Sequence[str] | None) -> Extracted:
    parts = sentences(text)
    last = parts[-1] if parts else ""
    if len(set(numbers_in(text))) == 1 or ("=" in last and numbers_in(last.rsplit("=", 1)[1])):
        return Extracted(stated_number(last if "=" in last else text), "only number")
    numbers = numbers_in(last)
    return Extracted(numbers[-1], "last sentence") if numbers else Extracted(None, "no number stated")


LIST = re.compile(r"\[[^\[\]]{1,400}\]")


def _list(text: str, choices: Sequence[str] | None) -> str | None:
    found = LIST.findall(text)
    return found[-1] if found else None


def _list_unannounced(text: str, choices: Sequence[str] | None) -> Extracted:
    found = _list(text, choices)
    return Extracted(found, "last list") if found else Extracted(None, "no list stated")


def _written(text: str, choices: Sequence[str] | None) -> str | None:
    return text.strip(" *_`\"'").rstrip(".").strip() or None


def _written_unannounced(text: str, choices: Sequence[str] | None) -> Extracted:
    if len(text) <= SHORT and "\n" not in text:
        return Extracted(_written(text, None), "whole response")
    last = text.rsplit("\n", 1)[-1].strip()
    if "\n" in text and len(last) <= SHORT // 2:
        return Extracted(_written(last, None), "last line")
    return Extracted(None, "no answer stated")


def _expression_unannounced(text: str, choices: Sequence[str] | None) -> Extracted:
    last = sentences(text)[-1:]
    if last and "=" in last[0] and len(text) > SHORT:
        return Extracted(_written(last[0].rsplit("=", 1)[1].strip(" $"), None), "last equation")
    return _written_unannounced(text, choices)


def _number(text: str, choices: Sequence[str] | None) -> str | None:
    return stated_number(text)


READERS: dict[str, Callable[[str, Sequence[str] | None], str | None]] = {
    "choice": named_option, "number": _number, "list": _list, "text": _written, "expression": _written,
}  # fmt: skip
"""How the text of a statement is read, by kind."""

UNANNOUNCED: dict[str, Callable[[str, Sequence[str] | None], Extracted]] = {
    "choice": _choice_unannounced, "number": _number_unannounced, "list": _list_unannounced,
    "text": _written_unannounced, "expression": _expression_unannounced,
}  # fmt: skip
"""What is read where nothing is announced, by kind."""
