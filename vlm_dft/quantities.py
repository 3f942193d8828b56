r"""Quantities: a number as answers write it in; its value, the places it gives, its percent, currency and unit out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST_NUMBER = 60  # digits of a number; one with more is compared as text
LARGEST_EXPONENT = 300  # of ten

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|\.(?!\d))?"
_TEN = r"(?:[eE]([-+]?\d{1,4})(?![\d.])|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{?\s*([-+]?\d{1,4})\s*\}?)?"
_NUMBER = re.compile(rf"({_DIGITS}){_TEN}")
_FRACTION = re.compile(
    r"(?:(\d{1,20})(?:\s+|\s*-\s*|\s*(?=\\frac)))?"
    r"(?:\\frac\s*\{\s*(-?\d{1,20})\s*\}\s*\{\s*(-?\d{1,20})\s*\}|(\d{1,20})\s*/\s*(\d{1,20}))"
)
_CURRENCIES = {"US$": "$", "USD": "$"} | {
    sign: sign for sign in "$\u20ac\u00a3\u00a5\u20b9"
}  # dollar, euro, pound, yen, rupee
_HEAD = re.compile(r"\s*([-+]?)\s*(US\$|USD|[$\u20ac\u00a3\u00a5\u20b9])?\s*([-+]?)\s*")
_UNIT = re.compile(
    r"\s*(?:[-\s])?\s*([^\W\d_][^\d=<>()\[\]{},;:\\^]*?(?:\s*\^?\s*\{?\s*[23]\s*\}?)?(?:/[^\W\d_]+(?:\^?[23])?)?)\.?\s*"
)
_PERCENT = re.compile(r"\s*(?:%|percent|per cent|percentage points?)\s*", re.IGNORECASE)
_NO_UNIT = re.compile(r"\b(?:pi|sqrt|sin|cos|tan|log|ln|and|or|to|root|times|plus|minus|over|not)\b|[*+|$%]")
_POWER = re.compile(r"\s*\^?\s*\{?\s*([23])\s*\}?\Z")

_LENGTHS = {
    ("mm", "millimeter", "millimetre"): "0.001", ("cm", "centimeter", "centimetre"): "0.01", ("dm", "decimeter", "decimetre"): "0.1",
    ("m", "meter", "metre"): "1", ("km", "kilometer", "kilometre"): "1000", ("in", "inch", "inche"): "0.0254",
    ("ft", "foot", "feet"): "0.3048", ("yd", "yard"): "0.9144", ("mi", "mile"): "1609.344",
}  # fmt: skip
_OTHERS = {
    ("mg", "milligram"): ("mass", "0.001"), ("g", "gram"): ("mass", "1"), ("kg", "kilogram"): ("mass", "1000"),
    ("t", "ton", "tonne"): ("mass", "1000000"), ("lb", "pound"): ("mass", "453.59237"), ("oz", "ounce"): ("mass", "28.349523125"),
    ("ms", "millisecond"): ("time", "0.001"), ("s", "sec", "second"): ("time", "1"), ("min", "minute"): ("time", "60"),
    ("h", "hr", "hour"): ("time", "3600"), ("day",): ("time", "86400"), ("week",): ("time", "604800"),
    ("ml", "milliliter", "millilitre"): ("volume", "0.001"), ("l", "liter", "litre"): ("volume", "1"),
    ("cent",): ("money", "0.01"), ("dollar",): ("money", "1"), ("degree", "deg"): ("angle", "1"),
    ("one",): ("count", "1"), ("thousand",): ("count", "1000"), ("million",): ("count", "1000000"), ("billion",): ("count", "1000000000"),
}  # fmt: skip
_UNITS: dict[str, tuple[str, Fraction]] = {
    **{name: ("length", Fraction(factor)) for names, factor in _LENGTHS.items() for name in names},
    **{name: (kind, Fraction(factor)) for names, (kind, factor) in _OTHERS.items() for name in names},
}
_WORDS = {
    word: number
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
        "nineteen".split()
    )
}
_TENS = {
    word: 10 * number for number, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)
}


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number and what it is a number of. places: the decimals that it gives (12.50 has 2, 1.5e3 has -2); None for what is exact."""

    value: Fraction
    places: int | None = None
    digits: int = 0  # significant ones, of a decimal
    percent: bool = False
    currency: str = ""
    unit: str = ""


def read_quantity(text: str) -> Quantity | None:
    """The quantity that a text is, as `latex_text` leaves it; None where it is more or less than one number and its unit."""
    head = _HEAD.match(text)
    assert head is not None
    found = _number(text[head.end() :])
    if found is None:
        return _in_words(text)
    value, places, digits, rest = found
    if "-" in (head[1], head[3]):
        value = -value
    currency = _CURRENCIES.get(head[2] or "", "")
    if _PERCENT.fullmatch(rest):
        return Quantity(value, places, digits, percent=True, currency=currency)
    if not currency and rest.strip() in _CURRENCIES:
        return Quantity(value, places, digits, currency=_CURRENCIES[rest.strip()])
    unit = _UNIT.fullmatch(rest)
    if rest.strip() and (unit is None or not _is_unit(unit[1], apart=rest[0] in " -")):
        return None
    return Quantity(value, places, digits, currency=currency, unit=unit_name(unit[1]) if unit else "")


def _is_unit(text: str, *, apart: bool) -> bool:
    """Whether words behind a number are its unit, and not letters it is multiplied by: "2 apples", "2cm"; not "2x", "2 pi"."""
    name = unit_name(text)
    return _known(name) is not None or (apart and len(name) > 1 and _NO_UNIT.search(name) is None)


def unit_name(text: str) -> str:
    """A unit as it is compared: lower case, singular, "square" and "cubic" as powers."""
    text = " ".join(text.split()).strip(" .").lower()
    power = ""
    if (found := _POWER.search(text)) is not None:
        text, power = text[: found.start()].strip(), "^" + found[1]
    for word, of in (("square ", "^2"), ("sq. ", "^2"), ("sq ", "^2"), ("cubic ", "^3"), ("cu ", "^3")):
        if text.startswith(word):
            text, power = text.removeprefix(word), of
    return (
        " ".join(word if len(word) < 4 or word.endswith("ss") else word.removesuffix("s") for word in text.split())
        + power
    )


def in_unit(quantity: Quantity, unit: str) -> Fraction | None:
    """A quantity's value in another unit of its kind; None where the two units say nothing of each other."""
    own, other = _known(quantity.unit), _known(unit)
    if own is None or other is None or own[0] != other[0]:
        return None
    return quantity.value * own[1] / other[1]


def known_unit(text: str) -> bool:
    """Whether a text is a unit of measure that the table has."""
    return _known(unit_name(text)) is not None


def _known(unit: str) -> tuple[str, Fraction] | None:
    name, _, power = unit.partition("^")
    if name not in _UNITS:
        return None
    kind, factor = _UNITS[name]
    return (f"{kind}^{power}", factor ** int(power)) if power else (kind, factor)


def _number(text: str) -> tuple[Fraction, int | None, int, str] | None:
    """(value, places, significant digits, the rest) of the number that a text begins with."""
    fraction = _FRACTION.match(text)
    if fraction is not None:
        whole, above, below = fraction[1], fraction[2] or fraction[4], fraction[3] or fraction[5]
        if int(below) == 0:
            return None
        part = Fraction(int(above), int(below))
        if whole is not None and not 0 < part < 1:
            return None  # "3 5/2" is no mixed number
        return (int(whole) + part if whole else part), None, 0, text[fraction.end() :]
    number = _NUMBER.match(text)
    if number is None or not any(map(str.isdigit, number[1])) or len(number[1]) > LONGEST_NUMBER:
        return None
    exponent = int(number[2] or number[3] or 0)
    if abs(exponent) > LARGEST_EXPONENT:
        return None
    plain = number[1].replace(",", "")
    whole, _, decimals = plain.partition(".")
    value = Fraction(int(whole + decimals or "0"), 10 ** len(decimals)) * Fraction(10) ** exponent
    places = len(decimals) - exponent if decimals else None
    return value, places, len((whole + decimals).lstrip("0")), text[number.end() :]


def _in_words(text: str) -> Quantity | None:
    """Whole numbers below a hundred in words: "twelve", "Twenty-five"."""
    words = text.lower().replace("-", " ").split()
    if not 1 <= len(words) <= 2:
        return None
    if len(words) == 1:
        number = {**_WORDS, **_TENS}.get(words[0])
        return None if number is None else Quantity(Fraction(number))
    tens, ones = _TENS.get(words[0]), _WORDS.get(words[1])
    return Quantity(Fraction(tens + ones)) if tens and ones and ones < 10 else None
