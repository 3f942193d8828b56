"""LogicVista's official rule: a response and a record in, a Score out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlm_dft.answers import Asking, Extracted, stated_in
from vlm_dft.option_reading import (
    DENIED,
    LETTERS,
    bare_letters,
    leading_letter,
    letters_named,
    main_clause,
    options_asked,
)
from vlm_dft.statements import bare, conclusions, segments, settled, statements, without_listing
from vlm_dft.verdicts import Score

NONE = "zzzzz"
"""What the official extractor answers where a response chooses nothing; never equal to a gold answer."""

_ONE = r"\(?(?<![A-Za-z0-9_])[A-H](?![A-Za-z0-9_])\)?"
SEVERAL = re.compile(rf"{_ONE}(?:(?:\s?[,、]\s?(?:and|or)?|\s?&|\s+and|\s+or|\s?[和与及])\s*{_ONE}(?!['’]))+")
LETTER = re.compile(r"[A-H]")
CLAUSE = re.compile(r"[,;]\s")


def score_logicvista(response: str, sample: Mapping[str, Any]) -> Score:
    """Extract a set of letters (by rules where the official code asks GPT-4) and compare it (eval/extract_accuracy.py)."""
    found = logicvista_extraction(response, sample)
    return score_extraction(found.answer, sample, rule=found.rule)


def score_extraction(extraction: str | None, sample: Mapping[str, Any], *, rule: str = "stored extraction") -> Score:
    """The official verdict on an extraction "b, d": the same letters as the gold answer, whatever the case and order."""
    chosen = extraction or ""
    correct = _letters(chosen) == _letters(str(sample["gold_answer"]))
    return Score(correct, None if chosen.lower() in ("", NONE) else chosen, rule)


def _letters(answer: str) -> list[str]:
    return sorted(answer.lower().split(", "))


def logicvista_extraction(response: str, sample: Mapping[str, Any]) -> Extracted:
    """The official short cuts, then the letters that a response says it chooses, joined by ", "."""
    entry = response.split("ASSISTANT:", 2)[1] if "ASSISTANT:" in response else response
    entry = entry.strip()
    if not entry:
        return Extracted("", "empty response")
    if len(entry) == 1 and not entry.isnumeric() and entry.lower() not in "abcde":
        return Extracted(NONE, "single symbol")
    question = str(sample.get("question") or "")
    found = Extracted(None, "no letter chosen")
    for text in reversed(segments(settled(entry), question)):
        found = _chosen(without_listing(text).strip(), question)
        if found.answer:
            break
    if not found.answer and len(entry) == 1:
        return Extracted(entry, "single digit")
    return found if found.answer else Extracted(NONE, found.rule)


def _chosen(text: str, question: str) -> Extracted:
    choices = options_asked(question)
    text = _after_echo(text, question)
    for one in reversed(statements(text)):
        if letters := _set(one.text, question, announced=True):
            return Extracted(letters, one.rule)
    if letters := _only_letters(text):
        return Extracted(letters, "letters alone")
    letter = leading_letter(text, LETTERS)
    if letter and not re.search(
        rf"\n[\s*_-]{{0,6}}\(?{chr(ord(letter) + 1)}[).:]", text
    ):  # else: one option after the other
        return Extracted(letter, "leading letter")
    ranked = conclusions(text, question)
    for part in ranked[:3]:
        if letters := _set(part, question):
            return Extracted(letters, "concluding sentence")
    named = [letters for part in ranked if (letters := _set(part, question))]
    if len(set(named)) == 1:
        return Extracted(named[0], "only letter")
    return stated_in(text, "choice", Asking(choices, question)) if choices else Extracted(None, "no letter chosen")


def _after_echo(text: str, question: str) -> str:
    """What follows the question where a response begins by repeating it; all of it where nothing follows."""
    own, seen = bare(question), 0
    start = bare(text).find(own[:2_000]) if len(own) >= 20 else -1
    if not 0 <= start <= 60:
        return text
    for i, character in enumerate(text):
        seen += character.isalnum() and len(character.casefold())
        if seen >= start + len(own):
            return text[i + 1 :]
    return text


def _only_letters(text: str) -> str | None:
    """The letters of a text that has nothing but letters and what joins them."""
    rest = re.sub(r"\band\b|[\s,;&]", " ", text[:200]).upper().split()
    return ", ".join(dict.fromkeys(rest)) if rest and all(len(one) == 1 and one in LETTERS for one in rest) else None


def _set(text: str, question: str, *, announced: bool = False) -> str | None:
    """The letters one statement chooses, joined by ", "; none that it denies, offers, or only repeats in brackets."""
    text = text.replace("*", "")
    for several in SEVERAL.finditer(text):
        letters = list(dict.fromkeys(LETTER.findall(several[0])))
        offered = " or " in several[0] or text[: several.start()].rstrip().endswith(("(", "from", "options"))
        if (
            len(letters) > 1
            and not offered
            and not DENIED.search(text, max(0, several.start() - 30), several.end() + 30)
        ):
            return ", ".join(letters)
    if not SEVERAL.match(text) and (letter := leading_letter(text, LETTERS)) and (announced or not DENIED.search(text)):
        return letter
    kept = "; ".join(clause for clause in CLAUSE.split(SEVERAL.sub(" ", text)) if not DENIED.search(clause))
    for part in (kept, main_clause(kept)):
        named = set(letters_named(part, LETTERS) or bare_letters(part, LETTERS))
        if len(named) == 1:
            return named.pop()
    return None
