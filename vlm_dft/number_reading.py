"""Numbers: a piece of text in, the number it gives as its result out. Linear time."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

TEENS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
TENS = "thirty forty fifty sixty seventy eighty ninety"
WORDS = {word: i for i, word in enumerate(TEENS.split())} | {w: 30 + 10 * i for i, w in enumerate(TENS.split())}
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,400})(?:\.\d{1,400})?|\.\d{1,400}"
NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])(?P<sign>[-+](?=[\d.$€£¥])|(?<![\w)] )[-+]\s?)?(?:(?:US|USD|EUR)?\s?[$€£¥]\s?)?"
    rf"(?P<digits>{DIGITS})(?P<power>[eE][-+]?\d{{1,4}}\b)?"
    r"(?:\s?(?:[x×*]|\\times|\\cdot)\s?10\s?\^\s?[{(]?\s?(?P<ten>[-+]?\d{1,4})\s?[})]?)?"
    r"(?P<root>\s?(?:√|\\?sqrt|π|\\?pi\b)(?:\s?[{(]?\s?\d{1,20}\s?[})]?)?)?"
    r"(?P<mixed>(?<=\d) {1,2}\d{1,20}/\d{1,20}(?![\d/]))?(?P<over>\s?/\s?\d{1,40}(?![\d/]))?(?P<percent>\s?%)?"
    rf"|(?<!the )(?<!these )(?<!those )(?<!-)\b(?:(?P<tens>twenty|{TENS.replace(' ', '|')})-)?"
    rf"(?P<word>{'|'.join(WORDS)})\b(?!\s+of\s+the\b|-)",
    re.IGNORECASE,
)
FRACTION = re.compile(
    r"(-?\d{0,40})\s?\\[dt]?frac\s?\{\s?(-?\d{1,40}(?:\.\d{1,40})?)\s?\}\s?\{\s?(\d{1,40}(?:\.\d{1,40})?)\s?\}"
)
POWER = re.compile(r"(?<!10)(?<!10\s)\^\s?(?:\{[^{}]{0,12}\}|\\circ|\d)|[²³]")
RESULT = re.compile(
    r"(?:=|≈|\\approx|(?<!\d):|\b(?:is|are|was|were|be|equals?|equal to|about|approximately|around|exactly|only|total of"
    r"|has|have|had|contains?|shows?|gets?|got|sees?|counts?|finds?|found|left with"
    r"|leaving|so|thus|hence|gives?|yields?|makes?|leaves?)\b|[是为為约約共有余餘得剩下到于於])[\s*_$\\(\[\"'{]{0,12}(?:USD?\s?)?[-+$€£¥\s]{0,4}$",
    re.IGNORECASE,
)

RADICAL = re.compile(r"(?:√|sqrt)\s?[{(]?\s?$")
OPERATOR = re.compile(r"[^\W\d_]{0,3}[\s)]{0,3}(?:[+*/×÷−=]|\\(?:times|cdot|div)|-\s)\s?[(\d$]")
"""What shows that a number before it is not yet the result."""

ASIDE = re.compile(
    r",? and (?:the|its|his|her|their|in)\b|,? (?:while|whereas|since|because)\b|, (?:which|with|as|where|compared)\b|:[ \t]",
    re.IGNORECASE,
)
"""Where a sentence goes on after its result."""


OTHER = re.compile(r"(?:\b(?:out of|not|than)|n't|不是)\s?[\s*_$]{0,4}$", re.IGNORECASE)
"""Before a number that is another than the result."""

SUBJECT = re.compile(r"[\s*_$]{0,6}(?:[^\W\d_]+\s+)?(?:is|are|was|were)\s+(?:the|your|what|how|in|on)\b", re.IGNORECASE)
"""After a number that begins a sentence about it: "9 apples is the ..."."""


class Number(NamedTuple):
    """A number as written, tidied; whether a word that gives a result stands right before it; whether it is a word; where it stands."""

    text: str
    result: bool
    word: bool
    start: int
    end: int


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
    digits = found["digits"].replace(",", "")
    if found["mixed"] and digits.isdecimal():
        above, below = map(int, found["mixed"].split("/"))
        digits, over = str(int(digits) * below + above), f"/{below}"
    sign = "-" if (found["sign"] or "").startswith("-") else ""
    root = re.sub(r"[\s(){}]", "", found["root"] or "").replace("\\sqrt", "√").replace("sqrt", "√")
    sign += "√" if RADICAL.search(found.string, max(0, found.start("digits") - 8), found.start("digits")) else ""
    return sign + digits + power + root + over + ("%" if found["percent"] else "")


def numbers_in(text: str) -> list[Number]:
    """The numbers of a text in order, digits or words: without commas, currency and plus sign; "%" and "/" stay."""
    text = plain_numbers(text)
    return [Number(_tidy(m), _is_result(text, m), bool(m["word"]), m.start(), m.end()) for m in NUMBER.finditer(text)]


def _is_subject(text: str, number: Number) -> bool:
    return not any(map(str.isalnum, text[: number.start])) and SUBJECT.match(text, number.end) is not None


def _is_result(text: str, found: re.Match[str]) -> bool:
    start = found.start("word" if found["word"] else "digits")
    return bool(RESULT.search(text, max(0, start - 40), start)) and not OPERATOR.match(text, found.end())


def asked_numbers(question: str | None) -> frozenset[str]:
    """The numbers that stand in a question: an answer that restates it repeats them."""
    return frozenset(number.text for number in numbers_in((question or "")[:4_000]))


def stated_number(text: str, asked: Collection[str] = ()) -> str | None:
    """The number a piece of text gives as its result; None: it has none, or only those of the question.

    Preferred: right after "=", "is", "are" and the like (the last such before an aside), then digits before words;
    numbers that the question has come last, and only where such a word stands before them.
    """
    text = plain_numbers(text)
    numbers = numbers_in(text)
    numbers = [n for n in numbers if not OTHER.search(text, max(0, n.start - 12), n.start)] or numbers
    if numbers and (
        (len(numbers) == 1 and not asked) or (numbers[0].text not in asked and _is_subject(text, numbers[0]))
    ):
        return numbers[0].text
    for results, new, word in PREFERENCES:
        fit = [n for n in numbers if n.word == word and (n.result or not results) and (n.text not in asked or not new)]
        if fit:
            return _upper_end(text, _before_aside(text, fit) if results else fit[0])
    return None if asked else next((n.text for n in numbers), None)


PREFERENCES = [(True, True, False), (True, False, False), (False, True, False), (True, True, True), (False, True, True)]
"""Which numbers are tried in turn: only after a word that gives a result, only if new, words or digits."""


def _before_aside(text: str, results: Sequence[Number]) -> Number:
    """The last of the results before the first aside that follows one."""
    aside = ASIDE.search(text, results[0].end)
    return [n for n in results if not aside or n.end <= aside.start()][-1]


def _upper_end(text: str, number: Number) -> str:
    """The upper end where a number begins a range ("from 1 to 7")."""
    found = re.compile(r"[\s$]{0,3}(?:to|-)[\s$]{0,3}(\d{1,20}(?:\.\d{1,20})?)\b(?!\s?=)").match(text, number.end)
    return found[1] if found else number.text


def value_of(number: str) -> float | None:
    """The value of a number as `numbers_in` writes it; a percent sign does not count. None: none, or too large."""
    whole, _, below = number.rstrip("%").partition("/")
    try:
        value = float(whole) / float(below or 1)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return value if abs(value) < 1e300 else None
