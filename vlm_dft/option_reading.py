"""Options: a piece of text in, the option it names (a letter, or the option's own text) out. Linear time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from vlm_dft.number_reading import numbers_in, stated_number, value_of

SHORT = 40
"""Characters of an option that may be a number with its unit."""

LONG = 400
"""Characters of a text that may still be an option's own."""

LETTERS = "ABCDEFGH"
"""Option letters where the options are in the picture."""

MARKS = " \t\r\n*_`\"'“”‘’$#>.,;:!{}\\"
CALLED = re.compile(
    r"(?<![\w'’\\])([A-Z])[*)\"']{0,3},? (?:is|would be|must be|seems) (?:the )?(?:most )?(?:correct|right|best|answer|likely)\b"
)
BRACKETED = re.compile(r"[(\[]\s?\**([A-Za-z])\**\s?[.:]?\s?[)\]]")
KINDS = "options? choices? answers? letter figure diagram picture image set statement cube box".replace(" ", "|")
NAMED = re.compile(
    rf"(?:\b(?:{KINDS})\s+[*\"'(\[]{{0,3}}|选项?\s?|答案\s?)([A-Z])(?![A-Za-z]|[-'’]\w|\s?(?:,|and|or|&)\s?(?-i:[A-H])\b)",
    re.IGNORECASE,
)
ITEM = re.compile(r"(?<![A-Za-z])([A-Z])\s?(?:选项|選項|项)")
LEADING = re.compile(
    r"[({\[]?\s?([A-Za-z])\s?(?:[)\]}]|[.:,、;](?=\s|$|[^\x00-\x7f])|[:.]?\*\*|$|\s?[-–—]\s|(?=[\u4e00-\u9fff]))"
)
REFUSED = re.compile(r"\b(?:not|nor|neither|never)\s+(?:an?\s+|the\s+|be\s+)?[(\"']?$", re.IGNORECASE)
PREFIX = re.compile(
    r"(?:the\s+)?(?:correct\s+)?(?:option|choice|answer|letter|选项?)\s*:?\s*(?=[(\[*\"'A-Z])", re.IGNORECASE
)
BARE = re.compile(
    r"(?<![\w'’\\/^_+=-])(?<!\b[A-Z] )(?<!angle )(?<!point )(?<!line )(?<!side )"
    r"([A-Z])(?![\w'’^_/+=(]|-\w| [A-Z]\b| ?[=+])"
)
ARTICLE = re.compile(r"A\s+(?!is\b|was\b|has\b|and\b|or\b|because\b|since\b)[a-z]|I\s+[a-z']")
SEVERAL = re.compile(r"[({\[]?\s?[A-H]\s?[)\]}]?\s?(?:,|and|or|&|/|或|和)\s?(?:and |or )?[({\[]?\s?[A-H]\b(?![a-z])")
DENIED = re.compile(
    r"\b(?:not|isn't|aren't|wasn't|cannot|can't|neither|nor|incorrect|wrong|false|invalid|eliminat\w*|rule[sd]? out"
    r"|unlike|except|instead of|rather than)\b|错误|不正确|排除",
    re.IGNORECASE,
)


PREDICATE = re.compile(
    r"(?:(?:\b(?:is|be|are|therefore|thus|hence|so|in|by),?|['’]s)\s+|[是为為]\s?)[*\"'(]{0,3}([A-H])[*\"')]{0,3}\s*\Z",
    re.IGNORECASE,
)
"""A letter that ends its sentence as what something is."""


def option_letters(choices: Sequence[str] | None) -> str:
    """The letters that name an option."""
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)] if choices else LETTERS


@lru_cache(4096)
def squeezed(text: str) -> str:
    """Text for comparison: case folded, LaTeX marks, degree signs and spaces gone."""
    text = re.sub(
        r"\\(?:left|right|mathrm|text|circ|degree|displaystyle)\b|\^?\s?°|[\s${}\\*_`\"'“”‘’]|\^\s*\\circ", "", text
    )
    return text.strip(".,;:!").casefold()


def leading_letter(text: str, letters: str) -> str | None:
    """The letter a text begins with, in any dress: "(B) no", "B. no", "**b**", "B"; several letters are none."""
    text = PREFIX.sub("", text.lstrip(MARKS)).lstrip(MARKS)
    if len(alone := text.strip(MARKS)) == 1 and alone.upper() in letters:
        return alone.upper()
    found = LEADING.match(text)
    if not found or found[1].upper() not in letters or SEVERAL.match(text):
        return None
    dressed = found[0].strip() != found[1] or len(text.strip(MARKS)) == 1
    return found[1].upper() if dressed or found[1].isupper() else None


def letters_named(text: str, letters: str) -> list[str]:
    """The letters a text names, in order: those it calls right, else in brackets, else after "option" and the like."""
    for pattern in (CALLED, BRACKETED, NAMED, ITEM, PREDICATE):
        named = [m[1].upper() for m in pattern.finditer(text) if m[1].upper() in letters]
        if named:
            return named
    return []


def bare_letters(text: str, letters: str) -> list[str]:
    """The letters that stand alone as capitals in a text, in order; no article, no name of a point."""
    return [m[1] for m in BARE.finditer(text) if m[1] in letters and not ARTICLE.match(text, m.start())]


_NOT_LETTER = (
    r"(?<![A-Za-z0-9_])",
    r"(?![A-Za-z0-9_])",
)  # Chinese has no spaces between words; its range is slow to compile


@lru_cache(1024)
def option_pattern(choices: tuple[str, ...]) -> re.Pattern[str] | None:
    """Finds any option's text as whole words, the longest first."""
    texts = sorted({" ".join(c.split()) for c in choices if c.strip()}, key=len, reverse=True)
    if not texts or sum(map(len, texts)) > 5_000:
        return None
    words = "|".join(re.escape(t).replace(r"\ ", r"\s+") for t in texts)
    return re.compile(
        rf"(?<![.,/^√-]){_NOT_LETTER[0]}(?<![a-z^]\{{)(?:{words}){_NOT_LETTER[1]}(?![.,/]\d|\s?(?:√|\\sqrt|\\pi|\^|\\frac))",
        re.IGNORECASE,
    )


def options_quoted(text: str, choices: Sequence[str]) -> list[str]:
    """The letters of the options whose text stands in this text, in order, but right after a "not"."""
    pattern = option_pattern(tuple(choices))
    if pattern is None:
        return []
    exact = {" ".join(c.split()): i for i, c in reversed(list(enumerate(choices)))}
    folded = {c.casefold(): i for c, i in exact.items()}
    found = (
        " ".join(m[0].split())
        for m in pattern.finditer(text)
        if not REFUSED.search(text, max(0, m.start() - 16), m.start())
    )
    indices = (exact.get(one, folded.get(one.casefold())) for one in found)
    return [option_letters(choices)[i] for i in indices if i is not None and i < 26]


def same_option(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the one option a text is, but for dress."""
    plain = squeezed(text) if len(text) <= LONG else ""
    exact = text.strip() if re.fullmatch(r"\W?[a-z]\W?", plain) else None  # an option that is a letter itself: "(c)"
    same = [
        i for i, choice in enumerate(choices) if plain and squeezed(choice) == plain and exact in (None, choice.strip())
    ]
    if not same and plain in JUDGEMENTS:
        same = [i for i, choice in enumerate(choices) if squeezed(choice) == JUDGEMENTS[plain]]
    return option_letters(choices)[same[0]] if len({choices[i] for i in same}) == 1 else None


JUDGEMENTS = {"yes": "true", "true": "yes", "no": "false", "false": "no"}
"""What a yes means where the options are true and false, and the other way round."""


def leading_option(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the option whose text a text begins with, as whole words."""
    pattern = option_pattern(tuple(choices))
    text = text.lstrip(MARKS)[:1_000]
    if pattern is None or not (found := pattern.match(text)):
        word = re.match(r"(?:yes|no|true|false)\b", text, re.IGNORECASE)
        return same_option(word[0], choices) if word else None
    if found[0][-1].isdigit() and re.match(r"\s?[-+*/×÷=<>^]", text[found.end() :]):
        return None  # the start of a calculation
    return same_option(found[0], choices)


def named_option(text: str, choices: Sequence[str] | None, *, bare: bool = True) -> str | None:
    """The one option that a piece of text names; None where it names none or several.

    bare: a capital that stands alone is a letter; else it may be the name of a point.
    """
    letters = option_letters(choices)
    if choices and (same := same_option(text, choices)):
        return same
    if letter := leading_letter(text, letters):
        return letter
    denied = DENIED.search(text)
    quoted = options_quoted(text, choices) if choices else []
    for named in ([] if denied else letters_named(text, letters), quoted):
        if len(set(named)) == 1:
            return named[0]
        if named and (head := main_clause(text)) != text and (found := named_option(head, choices, bare=bare)):
            return found
    if choices and (found := numeric_option(text, choices)):
        return found
    named = bare_letters(text, letters) if bare and not denied and not quoted else []
    if len(set(named)) > 1:
        named = bare_letters(main_clause(text), letters)
    return named[0] if len(set(named)) == 1 else None


ASIDE = re.compile(
    r",? (?:while|whereas|since|because|but not|rather than|instead of|unlike|compared)\b|, (?:which|with|as|where|not|specifically)\b",
    re.IGNORECASE,
)


def main_clause(text: str) -> str:
    """A sentence up to its first aside."""
    found = ASIDE.search(text)
    return text[: found.start()] if found else text


@lru_cache(1024)
def option_values(choices: tuple[str, ...]) -> tuple[float | None, ...]:
    """The number that each option is, but for a unit; None where it is none or has several."""
    numbers = [numbers_in(choice) if len(choice) <= SHORT else [] for choice in choices]
    return tuple(value_of(found[0].text) if len(found) == 1 else None for found in numbers)


def numeric_option(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the one option that is the number a text gives, where every option is a number."""
    values = option_values(tuple(choices))
    if None in values or not (found := stated_number(text)):
        return None
    value = value_of(found)
    same = [i for i, one in enumerate(values) if value is not None and one == value]
    return option_letters(choices)[same[0]] if len(same) == 1 else None


def covered_option(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the one option that has most of its words in a text: more than half, and more than any other."""
    words = set(re.findall(r"\w+", text.casefold()))
    own = [set(re.findall(r"\w+", choice.casefold())) for choice in choices]
    shares = sorted(((len(one & words) / len(one) if one else 0.0, -i) for i, one in enumerate(own)), reverse=True)
    (best, i), (second, _) = (*shares, (0.0, 0))[:2]
    return option_letters(choices)[-i] if best > 0.5 and best > second else None


def judged_option(text: str, letters: str) -> str | None:
    """The letter of the one lettered line that a text calls right, where it goes through the options."""
    lines = [line for line in text.split("\n")[-60:] if LINE.match(line)]
    right = {LINE.match(line)[1] for line in lines if RIGHT.search(line) and not DENIED.search(line)}  # type: ignore[index]
    return right.pop() if len(lines) > 1 and len(right) == 1 and right <= set(letters) else None


LINE = re.compile(r"[\s*_#-]{0,8}(?:option\s)?\(?([A-H])\b[).:*]", re.IGNORECASE)
OPTION = re.compile(r"\(?\b([A-H])[).:、]\s*")
RIGHT = re.compile(r"\b(?:correct|right|true|matches)\b|[✓✔✅]|(?<!不)正确", re.IGNORECASE)


def options_asked(question: str) -> list[str] | None:
    r"""The options' texts where a question ends in a list "(A) ... (B) ...", "A:..\nB:..", "A. ..; B. .."; None where they are in the picture."""
    marks = list(OPTION.finditer(question))
    starts = [i for i, mark in enumerate(marks) if mark[1] == "A"]
    marks = marks[starts[-1] :] if starts else []
    marks = [mark for i, mark in enumerate(marks) if mark[1] == LETTERS[i : i + 1]]
    ends = [mark.start() for mark in marks[1:]] + [len(question)]
    texts = [question[mark.end() : end].strip(" \n,.;") for mark, end in zip(marks, ends, strict=False)]
    return texts if len(texts) > 1 and all(texts) else None
