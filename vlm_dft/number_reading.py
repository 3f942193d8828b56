"""Numbers: a piece of text in, the number it gives as its result out. Linear time."""

from __future__ import annotations

import re

NUMBER = re.compile(
    r"(?<![\w.])(?<!\d,)[-+]?\s?\$?\s?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,400})(?:\.\d{1,400})?(?:[eE][-+]?\d{1,4}\b)?(?:\s?/\s?\d{1,40}(?![\d/]))?\s?%?|(?<![\w.])[-+]?\.\d{1,400}"
)
FRACTION = re.compile(
    r"(-?\d{0,40})\s?\\[dt]?frac\s?\{\s?(-?\d{1,40}(?:\.\d{1,40})?)\s?\}\s?\{\s?(\d{1,40}(?:\.\d{1,40})?)\s?\}"
)
WORDS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty".split()
    )
} | {"thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
WORD = re.compile(rf"\b(?:({'|'.join(w for w, v in WORDS.items() if v >= 20)})-)?({'|'.join(WORDS)})\b", re.IGNORECASE)
RESULT = re.compile(
    r"(?:=|≈|\\approx|:|\b(?:is|are|was|were|be|equals?|about|approximately|around|to|has|have|of)\b)(?=[^=]{0,60}$)",
    re.IGNORECASE,
)
POWER = re.compile(r"\^\s?(?:\{[^{}]{0,12}\}|\\circ|\d)|[²³]")


def plain_numbers(text: str) -> str:
    """Text whose LaTeX fractions read a/b and whose thousands in LaTeX read with plain commas."""
    text = FRACTION.sub(lambda m: f"{m[1]} {m[2]}/{m[3]}" if m[1].strip("-") else f"{m[1]}{m[2]}/{m[3]}", text)
    return text.replace("{,}", ",").replace("\\%", "%").replace("\\$", "$").replace("\\!", "")


def tidy(number: str) -> str:
    """A number as written, without spaces, currency, thousands commas and a plus sign."""
    return re.sub(r"[\s$,]", "", number).lstrip("+")


def numbers_in(text: str) -> list[str]:
    """The numbers of a text in order, tidied; number words where it has no digits."""
    found = [tidy(m[0]) for m in NUMBER.finditer(POWER.sub(" ", plain_numbers(text)))]
    if found:
        return found
    return [str((WORDS[m[1].lower()] if m[1] else 0) + WORDS[m[2].lower()]) for m in WORD.finditer(text)]


def stated_number(text: str) -> str | None:
    """The number a piece of text gives: its only one, else the last after "=", else the first."""
    if "=" in text:
        text = text.rsplit("=", 1)[1] if numbers_in(text.rsplit("=", 1)[1]) else text
    numbers = numbers_in(text)
    return numbers[0] if numbers else None
