r"""Equivalence: an answer and a gold answer in, whether they say the same out. Bounded: milliseconds for any text, in any thread.

From the cheap to the dear: equal text; quantities (percent, currency, units, commas, fractions, words); lists, sets, tuples,
intervals and equations, part by part; expressions, by their values (`expressions`); and for what those do not read (matrices,
inequalities), math-verify, let near only what is short, shallow and without powers to speak of. Its own time limits are signals,
which work in the main thread alone, and are off.

How close is equal. Exact numbers must be equal. With `precision` (MathVista's, TabMWP's: decimals of the gold), the answer is right
when the gold is what it rounds to. Without, a decimal is right when it is the other side rounded, to two decimals at least or to
three significant digits (MATH-V rounds both sides to two decimals; DynaMath allows 0.001); a gold of fewer, 4.5, is taken for
exact, but for a difference of 0.1 % (1.299 is 1.3 where tenths were asked for). So 12.57 is 4\pi and 0.33 is 1/3; 12.5 and 0.3 are not.

Percent: "50%" is "50%", "50" and "0.5": models and golds leave the sign away and put it back. "50" is never "0.5".
Units: where one side has none, it is not held against the other; units of measure are converted; other words must be the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from vlm_dft.expressions import LONGEST, Value, read_expression
from vlm_dft.latex_text import latex_text
from vlm_dft.quantities import Quantity, in_unit, known_unit, read_quantity, unit_name
from vlm_dft.symbolic import symbolic_equal

LONGEST_ANSWER = 2000  # characters that are read; a longer answer is compared as it stands
MOST_PARTS = 64  # of a list or set
CLOSE = 1e-9  # relative: floating-point values of two ways to write one expression
NEARLY = Fraction(1, 1000)  # relative: what a gold with few digits leaves open
SLACK = Fraction(1, 10**9)  # so that a tie may be rounded either way

_ARTICLES = re.compile(r"\b(?:the|a|an)\s+")
_EDGES = re.compile(r"^[\s\"'`.,;:!?*_]+|[\s\"'`.,;:!?*_]+$")
_EQUALS = re.compile(r"(?<![<>!])=|\\approx(?![a-zA-Z])|\\equiv(?![a-zA-Z])")
_OPENS, _CLOSES = "([{", ")]}"
_ABBREVIATED = re.compile(r"(?<=[a-z])\.")  # a.m.
_SPACE = re.compile(r"(?<!\w) | (?!\w)")  # one that keeps no two words or numbers apart
_RATIO = re.compile(r"(\d{1,9})\s*:\s*(\d{1,9})")
_BOUNDS = re.compile(r"(?:([^<>=]+?)\s*(<|\\le)\s*)?([a-zA-Z])\s*(<|>|\\le|\\ge)\s*([^<>=]+)")
_MEMBER = re.compile(r"[a-zA-Z]\s*\\in(?![a-zA-Z])\s*")
_JOINT = re.compile(r"\s*,?\s+(?:and|or)\s+", re.IGNORECASE)
_UNIT_BEHIND = re.compile(r"(.*(?:[\d)}]|\\pi(?= )))\s*\b([a-zA-Z]+(?:\s*\^\s*\{?[23]\}?)?)", re.DOTALL)
_WORDS_BEHIND = re.compile(r"(.*(?:[\d)}]|\\pi))((?:\s+[a-zA-Z]{2,})+(?:\s*\^\s*\{?[23]\}?)?)", re.DOTALL)
_PROSE = re.compile(r"(?:^|[\s(])(?!(?:sin|cos|tan|log|ln|sqrt|pi)\b)[a-z]{2,}\s+[\d(]")  # "82 is 67", not "2 sin (x)"
_COUNTED = re.compile(r"\d\s+[a-zA-Z]{3,}")
_POINTS = tuple(
    {i: ((i * 0.7548776662466927 + k * 0.5698402909980532) % 1) * 2.2 + 0.35 for i in range(12)} for k in range(1, 4)
)
"""Three points to compare expressions of up to 12 letters at; their coordinates follow an irrational rotation."""


def equivalent(answer: str, gold: str, *, unit: str | None = None, precision: float | None = None) -> bool:
    """Whether an answer says what the gold answer says. Never raises on an answer.

    unit: the gold's unit where the text of the gold does not have it. precision: how many decimals the gold has.
    """
    if len(answer) > LONGEST_ANSWER or len(gold) > LONGEST_ANSWER:
        return answer.strip() == gold.strip()
    read, wanted = latex_text(answer), latex_text(gold)
    if not read or not wanted:
        return False
    try:
        return _same(_as_set(read), _as_set(wanted), unit, _places(precision), 0)
    except OverflowError:  # an exact number too large for floating-point, beside one that is not exact
        return False


def _places(precision: float | None) -> int | None:
    """Decimals as a record gives them, 1.0 as well; bounded, for a card's mistake must not hang."""
    return None if precision is None or not -LONGEST_ANSWER < precision < LONGEST_ANSWER else int(precision)


def is_mathematics(text: str) -> bool:
    """Whether a text is one quantity or expression as a whole, and no prose with a number in it."""
    if len(text) > LONGEST:
        return False
    *names, text = _EQUALS.split(latex_text(text))
    if _PROSE.search(text) or any(_COUNTED.search(name) for name in names):
        return False
    text = _without_unit(text.strip())
    return read_quantity(text) is not None or read_expression(text) is not None


def words(text: str) -> str:
    """Text as it is compared: case, articles, outer punctuation and spacing do not matter."""
    return " ".join(_ARTICLES.sub("", _EDGES.sub("", _ABBREVIATED.sub("", text.casefold()))).split())


def _same(answer: str, gold: str, unit: str | None, precision: int | None, depth: int) -> bool:
    if (
        answer == gold
        or _SPACE.sub("", answer) == _SPACE.sub("", gold)
        or (len(gold) > 1 and words(answer) == words(gold) != "")
    ):
        return True
    wanted, found = read_quantity(gold), read_quantity(answer)
    if wanted is not None and found is not None:
        return same_quantity(found, wanted, unit, precision)
    if depth == 0 and _EQUALS.search(answer + gold):
        return _same_equation(answer, gold, unit, precision)
    if depth < 4 and (lists := (_parts(answer), _parts(gold))) != (None, None):
        return _same_parts(*lists, answer, gold, unit, precision, depth)
    return _same_expression(answer, gold, precision)


def _as_set(text: str) -> str:
    """An inequality of one letter as an interval, "x \\in S" as S, a ratio as a fraction; else the text itself."""
    if (ratio := _RATIO.fullmatch(text)) is not None:
        return f"{ratio[1]}/{ratio[2]}"
    text = _MEMBER.sub("", text, count=1) if _MEMBER.match(text) else text
    bounds = _BOUNDS.fullmatch(text)
    if bounds is None:
        return text
    low, open_low, _, sign, high = bounds.groups()
    if sign in (">", r"\ge"):
        return text if low else f"{'(' if sign == '>' else '['}{high}, \\infty)"
    return f"{'(' if not low or open_low == '<' else '['}{low or '-' + chr(92) + 'infty'}, {high}{')' if sign == '<' else ']'}"


def same_quantity(answer: Quantity, gold: Quantity, unit: str | None = None, precision: int | None = None) -> bool:
    """Whether two quantities are the same, by the module's rules of percent, currency and units."""
    if answer.currency and gold.currency and answer.currency != gold.currency:
        return False
    of = gold.unit or unit_name(unit or "")
    values, wanted = [answer.value], [gold.value]
    if answer.percent and not gold.percent:
        values.append(answer.value / 100)
    if gold.percent and not answer.percent:
        wanted.append(gold.value / 100)
    if (many := in_unit(answer, "one")) is not None and in_unit(gold, "one") is None:  # 5 million, 5000000
        values.append(many)
    if (many := in_unit(gold, "one")) is not None and in_unit(answer, "one") is None:
        wanted.append(many)
    if answer.unit and of and answer.unit != of:
        converted = in_unit(answer, of)
        if converted is None and gold.unit:
            return False
        if converted is not None:
            return _near(converted, None, 0, gold.value, gold.places, gold.digits, precision)
    return any(
        _near(value, answer.places, answer.digits, goal, gold.places, gold.digits, precision)
        for value in values
        for goal in wanted
    )


def _near(
    value: Fraction,
    places: int | None,
    digits: int,
    gold: Fraction,
    gold_places: int | None,
    gold_digits: int,
    precision: int | None,
) -> bool:
    """The module's rule of closeness. places: decimals given, None for what is exact."""
    if value == gold:
        return True
    if precision is not None:
        return _rounds(value, gold, precision)
    if places is not None and (gold_places is None or places < gold_places):  # the answer is the coarser
        return value != 0 and (places >= 2 or digits >= 3 > 0 < places) and _rounds(gold, value, places)
    if gold_places is None or gold_places < 1:
        return False
    enough = gold_places >= 2 or gold_digits >= 3
    return gold != 0 and _rounds(value, gold, gold_places) and (enough or abs(value - gold) <= abs(gold) * NEARLY)


def _rounds(exact: Fraction, rounded: Fraction, places: int) -> bool:
    half = Fraction(10) ** -places / 2
    return abs(exact - rounded) <= half * (1 + SLACK)


def _same_equation(answer: str, gold: str, unit: str | None, precision: int | None) -> bool:
    """x = 3 is 3; y = 2x + 1 is 2x - y + 1 = 0; x = 3 is not y = 3."""
    left, right = _EQUALS.split(answer), _EQUALS.split(gold)
    if len(left) > 8 or len(right) > 8:
        return False
    if len(right) == 1:
        return bool(left[-1].strip()) and _same(left[-1].strip(), gold, unit, precision, 1)
    name = right[0].strip()
    if len(left) == 1:
        return _is_name(name) and bool(right[-1].strip()) and _same(answer, right[-1].strip(), unit, precision, 1)
    if _is_name(name) and _is_name(left[0].strip()):
        return _bare(left[0]) == _bare(name) and _same(left[-1].strip(), right[-1].strip(), unit, precision, 1)
    return len(left) == len(right) == 2 and _same_curve(left, right)


def _is_name(text: str) -> bool:
    """x, \\theta, V_{max}, f(x), \\angle ABC, "the area": what an answer is said to be, and no expression."""
    return (
        re.fullmatch(r"\\?[a-zA-Z][\w\\ {}']*(?:\([a-zA-Z]\))?", text) is not None
        and "frac" not in text
        and "sqrt" not in text
    )


def _bare(name: str) -> str:
    return re.sub(r"[\s{}\\]", "", name)


def _same_curve(answer: Sequence[str], gold: Sequence[str]) -> bool:
    """Whether two equations say that multiples of the same expression are zero."""
    sides = [read_expression(side.strip()) for side in (*answer, *gold)]
    if None in sides:
        return False
    letters = sorted(frozenset().union(*(side.letters for side in sides if side)))
    ratios = []
    for point in _POINTS:
        if len(letters) > len(point):
            return False
        at = dict(zip(letters, point.values(), strict=False))
        a, b, c, d = (side.at(at) if side else None for side in sides)
        if a is None or b is None or c is None or d is None or a == b or c == d:
            return False
        ratios.append((a - b) / (c - d))
    return all(abs(complex(ratio - ratios[0])) <= CLOSE * abs(complex(ratios[0])) for ratio in ratios)


def _parts(text: str) -> tuple[str, list[str]] | None:
    """(brackets, the parts) of a list, tuple, interval or set; brackets "" for parts in a row; None for one thing."""
    text = text.strip()
    brackets, inside = "", text
    if r"\cup" in text:
        return "union", [part.strip() for part in text.split(r"\cup")]
    if r"\pm" in text and text[:1] not in tuple(_OPENS) and (signs := _signs(text)) is not None:
        return "", signs
    if text.startswith(r"\{") and text.endswith(r"\}"):
        brackets, inside = "{}", text[2:-2]
    elif text[:1] in tuple(_OPENS) and text[-1:] in tuple(_CLOSES) and _closes_at_end(text):
        brackets, inside = text[0] + text[-1], text[1:-1]
    parts = _split(inside)
    if brackets in ("[]", "{}") and inside.strip():
        return brackets, parts  # also of one
    return (brackets, parts) if len(parts) > 1 else None


def _closes_at_end(text: str) -> bool:
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in _OPENS) - (letter in _CLOSES)
        if depth == 0:
            return place == len(text) - 1
    return False


def _split(text: str) -> list[str]:
    """At the commas that are outside of all brackets and in no number, and at "and" and "or"."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in _OPENS) - (letter in _CLOSES)
        if depth == 0 and letter in ",;":
            parts.append(text[start:place])
            start = place + 1
    parts.append(text[start:])
    return [piece.strip() for part in parts for piece in _JOINT.split(part.removeprefix(" and ").removeprefix(" or "))]


def _same_parts(
    answer: tuple[str, list[str]] | None, gold: tuple[str, list[str]] | None, answer_text: str, gold_text: str,
    unit: str | None, precision: int | None, depth: int,
) -> bool:  # fmt: skip
    if answer is None or gold is None:  # one thing, and one thing in brackets
        one = answer or gold
        assert one is not None
        if len(one[1]) != 1:
            return False
        single = one[1][0]
        return (
            _same(single, gold_text, unit, precision, depth + 1)
            if gold is None
            else _same(answer_text, single, unit, precision, depth + 1)
        )
    (brackets, found), (wanted_brackets, wanted) = answer, gold
    if (
        len(found) != len(wanted)
        or len(wanted) > MOST_PARTS
        or (brackets and wanted_brackets and brackets != wanted_brackets)
    ):
        return False
    if {brackets, wanted_brackets} <= {"", "{}", "union"}:
        return _same_set(found, wanted, unit, precision, depth)
    return all(_same(a, g, unit, precision, depth + 1) for a, g in zip(found, wanted, strict=True))


def _same_set(found: list[str], wanted: list[str], unit: str | None, precision: int | None, depth: int) -> bool:
    """In any order: each part is given to the first equal one that is left, exact before near."""
    left = [part for part in found if part not in wanted]
    missing = [part for part in wanted if part not in found]
    for part in missing:
        match = next((k for k, one in enumerate(left) if _same(one, part, unit, precision, depth + 1)), None)
        if match is None:
            return False
        left.pop(match)
    return not left


def _same_expression(answer: str, gold: str, precision: int | None) -> bool:
    answer, gold = _without_unit(answer), _without_unit(gold)
    found, wanted = read_expression(answer), read_expression(gold)
    if found is None or wanted is None:
        return symbolic_equal(answer, gold)
    letters = sorted(found.letters | wanted.letters)
    if len(letters) > len(_POINTS[0]):
        return False
    if not letters:
        a, g = found.at({}), wanted.at({})
        return a is not None and g is not None and _near_values(a, answer, g, gold, precision)
    met = 0
    for point in _POINTS:
        at = dict(zip(letters, point.values(), strict=False))
        a, g = found.at(at), wanted.at(at)
        if a is None and g is None:
            continue
        if a is None or g is None or abs(complex(a - g)) > CLOSE * max(1.0, abs(complex(g))):
            return False
        met += 1
    return met > 0


def _near_values(a: Value, answer: str, g: Value, gold: str, precision: int | None) -> bool:
    """Two values, of which one may be a decimal that is the other rounded."""
    exact = isinstance(a, Fraction) and isinstance(g, Fraction)
    if a == g or (not exact and abs(complex(a - g)) <= CLOSE * max(abs(complex(a)), abs(complex(g)))):
        return True
    if any(not isinstance(one, Fraction) and abs(one.imag) > CLOSE * abs(one) for one in (a, g)):
        return False
    one, other = read_quantity(answer), read_quantity(gold)
    value, places, digits = (one.value, one.places, one.digits) if one else (Fraction(a.real), None, 0)
    goal, gold_places, gold_digits = (other.value, other.places, other.digits) if other else (Fraction(g.real), None, 0)
    return _near(value, places, digits, goal, gold_places, gold_digits, precision)


def _without_unit(text: str) -> str:
    """Less the unit behind an expression: "25\\pi cm^2", "5\\sqrt{2} meters"."""
    for pattern, is_unit in ((_UNIT_BEHIND, known_unit), (_WORDS_BEHIND, lambda unit: len(unit.strip()) > 3)):
        found = pattern.fullmatch(text)
        if found is not None and is_unit(found[2]):
            return found[1].strip()
    return text


def _signs(text: str) -> list[str] | None:
    """The two values of one \\pm; None for several of them, or of \\mp with it."""
    if text.count(r"\pm") + text.count(r"\mp") > 1:
        return None
    return [text.replace(r"\pm", sign) for sign in "+-"] if r"\pm" in text else [text]
