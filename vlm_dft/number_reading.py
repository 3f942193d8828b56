"""Numbers: a piece of text in, the number it gives as its result out. Linear time."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

TEENS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
TENS = "thirty forty fifty sixty seventy eighty ninety"
WORDS = {word: i for i, word in enumerate(TEENS.split())} | {w: 30 + 10 * i for i, w in enumerate(TENS.split())}
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,400})(?:\.\d{1,400})?|\.\d{1,400}"
NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>(?<![\w)] )[-+]\s?)?(?:(?:US|USD|EUR)?\s?[$€£¥]\s?)?(?P<digits>{DIGITS})(?P<power>[eE][-+]?\d{{1,4}}\b)?"
    r"(?:\s?(?:[x×*]|\\times|\\cdot)\s?10\s?\^\s?[{(]?\s?(?P<ten>[-+]?\d{1,4})\s?[})]?)?"
    r"(?P<over>\s?/\s?\d{1,40}(?![\d/]))?(?P<percent>\s?%)?"
    rf"|(?<!the )(?<!these )(?<!those )(?<!-)\b(?:(?P<tens>twenty|{TENS.replace(' ', '|')})-)?(?P<word>{'|'.join(WORDS)})\b(?!\s+of\s+the\b|-)",
    re.IGNORECASE,
)
FRACTION = re.compile(
    r"(-?\d{0,40})\s?\\[dt]?frac\s?\{\s?(-?\d{1,40}(?:\.\d{1,40})?)\s?\}\s?\{\s?(\d{1,40}(?:\.\d{1,40})?)\s?\}"
)
POWER = re.compile(r"(?<!10)(?<!10\s)\^\s?(?:\{[^{}]{0,12}\}|\\circ|\d)|[²³]")
RESULT = re.compile(
    r"(?:=|≈|\\approx|(?<!\d):|\b(?:is|are|was|were|be|equals?|equal to|about|approximately|around|exactly|only|total of"
    r"|has|have|had|contains?|shows?|gets?|gives?|yields?|makes?|leaves?)\b)[\s*_$\\(\[\"'{]{0,12}(?:USD?\s?)?[-+$€£¥\s]{0,4}$",
    re.IGNORECASE,
)


class Number(NamedTuple):
    """A number as written, tidied; whether a word that gives a result stands right before it; whether it is a word."""

    text: str
    result: bool
    word: bool


def plain_numbers(text: str) -> str:
    """Text whose LaTeX fractions read a/b, and whose commas, percent and dollar signs are plain."""
    if "\\" in text or "{" in text:
        text = FRACTION.sub(lambda m: f"{m[1]} {m[2]}/{m[3]}" if m[1].strip("-") else f"{m[1]}{m[2]}/{m[3]}", text)
        text = text.replace("{,}", ",").replace("\\%", "%").replace("\\$", "$").replace("\\!", "")
    return POWER.sub(" ", text)


def _tidy(found: re.Match[str]) -> str:
    if found["word"]:
        return str(WORDS[(found["tens"] or "zero").lower()] + WORDS[found["word"].lower()])
    power = f"e{int(found['ten'])}" if found["ten"] else found["power"] or ""
    over = (found["over"] or "").replace(" ", "")
    sign = "-" if (found["sign"] or "").startswith("-") else ""
    return sign + found["digits"].replace(",", "") + power + over + ("%" if found["percent"] else "")


def numbers_in(text: str) -> list[Number]:
    """The numbers of a text in order, digits or words: without commas, currency and plus sign; "%" and "/" stay."""
    text = plain_numbers(text)
    return [
        Number(
            _tidy(m),
            bool(RESULT.search(text, max(0, m.start() - 40), m.start("digits" if m["digits"] else "word"))),
            bool(m["word"]),
        )
        for m in NUMBER.finditer(text)
    ]


def asked_numbers(question: str | None) -> frozenset[str]:
    """The numbers that stand in a question: an answer that restates it repeats them."""
    return frozenset(number.text for number in numbers_in((question or "")[:4_000]))


def stated_number(text: str, asked: Collection[str] = ()) -> str | None:
    """The number a piece of text gives as its result; None: it has none, or only those of the question.

    Preferred: right after "=", "is", "are" and the like (the last such), then digits before words; numbers that
    the question has come last, and only where such a word stands before them.
    """
    numbers = numbers_in(text)
    if len(numbers) == 1 and not asked:
        return numbers[0].text
    for results, new, words in (
        (True, True, False),
        (True, False, False),
        (False, True, False),
        (True, True, True),
        (False, True, True),
    ):
        fit = [
            n.text
            for n in numbers
            if n.word == words and (n.result or not results) and (n.text not in asked or not new)
        ]
        if fit:
            return _upper_end(text, fit[-1]) if results else fit[0]
    return None if asked else next((n.text for n in numbers), None)


def _upper_end(text: str, number: str) -> str:
    """The upper end where a number begins a range ("from 1 to 7")."""
    found = re.search(rf"(?<![\d.]){re.escape(number)}\s?(?:to|-)\s?(\d{{1,20}}(?:\.\d{{1,20}})?)\b(?!\s?=)", text)
    return found[1] if found else number


def value_of(number: str) -> float | None:
    """The value of a number as `numbers_in` writes it; a percent sign does not count. None: none, or too large."""
    whole, _, below = number.rstrip("%").partition("/")
    try:
        value = float(whole) / float(below or 1)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return value if abs(value) < 1e300 else None
