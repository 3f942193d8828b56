"""Answers: response text in, the extracted answer and the rule that found it out. No torch, no eval, linear time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from vlm_dft.number_reading import asked_numbers, stated_number
from vlm_dft.option_reading import (
    DENIED,
    judged_option,
    leading_letter,
    leading_option,
    letters_named,
    named_option,
    option_letters,
    options_quoted,
    same_option,
)
from vlm_dft.statements import (
    ABSTAINS,
    AIMS,
    Statement,
    bare,
    conclusions,
    finished,
    restates,
    segments,
    sentences,
    settled,
    statements,
    without_listing,
)

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


def stated_answer(
    response: str, *, choices: Sequence[str] | None = None, kind: Kind, question: str | None = None
) -> Extracted:
    """What a response says its answer is: the last place that states one and can be read; abstains rather than guesses.

    choices: the options' texts, or None where they are in the picture. kind: "choice" answers with a letter from A,
    "number" with a number as written (without commas and currency; a percent sign stays), "list" with its
    brackets, "text" and "expression" with what is written. question: helps to tell an answer from what only restates
    the question. Thoughts (<think>...</think>) do not count; a thought that was cut states nothing; nor does what
    follows where the model ran on into a further question. Of a response longer than 32,000 characters, the first
    8,000 and the last 24,000 are read.
    """
    text = settled(finished(response), latex=kind in ("text", "expression"))
    if not text:
        return Extracted(None, "unfinished thought" if response.strip() else "empty response")
    found = Extracted(None, "no answer stated")
    for part in segments(text, question):
        found = stated_in(part, kind, Asking(list(choices) if choices else None, question))
        if found.answer or found.rule == "abstains":
            break
    return found


class Asking(NamedTuple):
    """What was asked: the options' texts and the question, where there are any."""

    choices: list[str] | None
    question: str | None


def stated_in(text: str, kind: Kind, asking: Asking) -> Extracted:
    """What one settled text that answers one question says its answer is."""
    whole = bare((asking.question or "")[:4_000])
    text = without_listing(text) if kind == "choice" else text
    for one in reversed(_strict(statements(text), text) if kind in ("text", "expression") else statements(text)):
        if kind != "choice" and restates(one.text, whole):
            continue  # an option may stand in the question
        if found := READERS[kind](one.text, asking):
            return Extracted(found, one.rule)
        if ABSTAINS.search(one.text):
            return Extracted(None, "abstains")
    return UNANNOUNCED[kind](text, asking)


ANSWER = re.compile(r"(?:final\s+)?answer|####|故?答案", re.IGNORECASE)


def _strict(found: list[Statement], text: str) -> list[Statement]:
    """Where anything may be the answer: boxes and tags, else what follows the word answer."""
    strong = [one for one in found if one.rule != "announced"]
    return strong or [one for one in found if ANSWER.match(text, one.start)]


def _choice(text: str, asking: Asking) -> str | None:
    return named_option(text, asking.choices)


def _choice_unannounced(text: str, asking: Asking) -> Extracted:
    choices, letters = asking.choices, option_letters(asking.choices)
    if choices and (same := same_option(text, choices)):
        return Extracted(same, "option's text")
    if letter := judged_option(text, letters):
        return Extracted(letter, "called right")
    if letter := leading_letter(text, letters) or (_alone_leading(text, choices) if choices else None):
        return Extracted(letter, "leading option")
    for part in conclusions(text, asking.question)[:3]:
        found = named_option(part, choices, bare=not choices)
        if found and not (DENIED.search(part) and leading_letter(part, letters)):
            return Extracted(found, "concluding sentence")
        if ABSTAINS.search(part):
            return Extracted(None, "abstains")
    named = set(letters_named(text, letters)) or set(options_quoted(text, choices) if choices else "")
    return Extracted(named.pop(), "only option") if len(named) == 1 else Extracted(None, "no option stated")


def _alone_leading(text: str, choices: list[str]) -> str | None:
    """The option a text begins with, unless its first sentence goes on to name another in brackets or in words."""
    letter = leading_option(text, choices)
    first = (sentences(text) or [""])[0]
    others = {*letters_named(first, option_letters(choices)), *options_quoted(first, choices)} - {letter}
    return letter if not others else None


def _number(text: str, asking: Asking) -> str | None:
    return stated_number(text)


COUNTED = re.compile(r"\b(?:how many|number of|count|left)\b", re.IGNORECASE)
NONE_LEFT = re.compile(r"\bthere (?:are|is|were|will be|would be) (?:no|none)\b", re.IGNORECASE)
"""A sentence that counts nothing."""


def _number_unannounced(text: str, asking: Asking) -> Extracted:
    asked = asked_numbers(asking.question)
    counted = bool(COUNTED.search(asking.question or ""))
    ranked = conclusions(text, asking.question)
    for part in ranked:
        if refusal := ABSTAINS.search(part):
            later = stated_number(part[refusal.end() :], asked) if re.search(r"\d", part[refusal.end() :]) else None
            return Extracted(later, "concluding sentence") if later else Extracted(None, "abstains")
        found = "0" if counted and NONE_LEFT.search(part) else stated_number(part, asked)
        if found:
            return Extracted(found, "concluding sentence")
    for part in ranked:  # an answer may repeat a number of the question
        if not AIMS.match(part) and (found := stated_number(part)):
            return Extracted(found, "only the question's numbers")
    return Extracted(None, "no number stated")


LIST = re.compile(r"\[[^\[\]]{1,400}\]")
ROW = re.compile(r"-?\d{1,20}(?:\.\d{1,20})?(?:\s?,\s?-?\d{1,20}(?:\.\d{1,20})?)+")


def _list(text: str, asking: Asking) -> str | None:
    """The last list in brackets, else numbers with commas and nothing else."""
    if found := LIST.findall(text):
        return str(found[-1])
    row = ROW.fullmatch(text.strip(" $.*{}()")[:SHORT])
    return f"[{row[0]}]" if row else None


def _list_unannounced(text: str, asking: Asking) -> Extracted:
    found = _list(text, asking)
    return Extracted(found, "last list") if found else Extracted(None, "no list stated")


def _written(text: str, asking: Asking) -> str | None:
    return text.strip(" *_`\"'").rstrip(".。").strip() or None


MATH = re.compile(r"\$\$?([^$]{1,300})\$|\\\(([^$]{1,300}?)\\\)")


def _expression(text: str, asking: Asking) -> str | None:
    """What is written; of a sentence with one formula, the formula."""
    formulas = MATH.findall(text)
    return _written("".join(formulas[0]) if len(formulas) == 1 else text, asking)


def _written_unannounced(text: str, asking: Asking) -> Extracted:
    if len(text) <= SHORT and "\n" not in text:
        return Extracted(_written(text, asking), "whole response")
    last = text.rsplit("\n", 1)[-1].strip()
    if "\n" in text and len(last) <= SHORT // 2:
        return Extracted(_written(last, asking), "last line")
    return Extracted(None, "no answer stated")


def _expression_unannounced(text: str, asking: Asking) -> Extracted:
    last = (sentences(text) or [""])[-1]
    if "=" in last and len(text) > SHORT:
        return Extracted(_written(last.rsplit("=", 1)[1].strip(" $"), asking), "last equation")
    found = _written_unannounced(text, asking)
    said = PREDICATE.split(found.answer or "")
    return Extracted(_expression(said[-1], asking), "what something is") if len(said) > 1 and said[-1] else found


PREDICATE = re.compile(r"(?<=[a-z]{3})(?:\s+(?:is|are|equals)\s+|:\**\s+)|[是为為]\s?")
"""What stands between something and the value that it is said to have."""


READERS: dict[str, Callable[[str, Asking], str | None]] = {
    "choice": _choice, "number": _number, "list": _list, "text": _written, "expression": _expression,
}  # fmt: skip
"""How the text of a statement is read, by kind."""

UNANNOUNCED: dict[str, Callable[[str, Asking], Extracted]] = {
    "choice": _choice_unannounced, "number": _number_unannounced, "list": _list_unannounced,
    "text": _written_unannounced, "expression": _expression_unannounced,
}  # fmt: skip
"""What is read where nothing is announced, by kind."""
