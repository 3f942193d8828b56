"""The robust rule: a response and a record in, a Score out; the same for every benchmark, and an abstention where nothing is answered.

What the response states is read by `answers.stated_answer`, as the kind of answer that the record asks for, and compared by what it
means: options by letter, numbers and expressions by `equivalence`, lists part by part, other text but for case and articles. Nothing
is drawn, and nothing goes to the nearest option. The rule's name says how the answer was found and how it was compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_dft.answers import SHORT, Extracted, Kind, stated_answer
from vlm_dft.equivalence import equivalent, is_mathematics, words
from vlm_dft.latex_text import latex_text
from vlm_dft.option_reading import leading_letter, option_letters, options_asked
from vlm_dft.statements import DOLLAR, settled
from vlm_dft.verdicts import Score

OUTRIGHT = ("boxed", "answer tag")
"""Rules whose statement is the answer and nothing but: one that is no option answers none, whatever stands elsewhere."""
STATED = (*OUTRIGHT, "announced")
_MATHEMATICS = re.compile(r"[\d\\\\=]")
_SHORT_ANSWER = re.compile(r'"(?:short[ _])?answer"\s*:\s*("(?:[^"\\]|\\.){0,2000}"|-?[\d.]{1,40})', re.IGNORECASE)
_COMMAND = re.compile(r"(?<!\\)\\(?=[a-zA-Z]{2})")  # of LaTeX, in JSON that does not escape it
_TEMPLATE = re.compile(r"<answer>\s*:\s*<{0,2}([^<>]{1,400})", re.IGNORECASE)
_LETTER = re.compile(r"\W*([A-Za-z])\W*")
_LETTERS = re.compile(r"\W*([A-Ha-h])(?:\W+(?:and\W+)?([A-Ha-h]))+\W*", re.IGNORECASE)
KINDS: dict[str, Kind] = {
    "integer": "number", "float": "number", "decimal": "number", "integer_number": "number", "decimal_number": "number",
    "number": "number", "list": "list", "text": "text", "expression": "expression", "extractive_text": "text",
    "boolean_text": "text", "other_text": "text",
}  # fmt: skip
"""What is to be read in a free-form response, by the record's answer_type; others go by what the gold answer looks like."""


def score_robust(response: str, sample: Mapping[str, Any]) -> Score:
    """Score a response by what it states and what that means. Never raises on a response."""
    response = _tagged(response)
    choices = [str(choice) for choice in sample.get("choices") or ()]
    gold, question = str(sample["gold_answer"]), sample.get("question")
    if sample.get("question_type") == "multi_choice" or choices:
        return _chosen(response, choices, gold, question)
    kind = KINDS.get(str(sample.get("answer_type"))) or _kind_of(gold)
    if kind == "text" and is_mathematics(gold):
        kind = "expression"  # TabMWP's other_text: a fraction
    return _written(response, gold, kind, sample)


def _tagged(response: str) -> str:
    """A response in the forms that DynaMath and We-Math ask for (JSON with a "short answer"; <Answer>: <<B>>) with its answer in tags."""
    found = _SHORT_ANSWER.findall(response) if "nswer" in response else []
    if found:
        try:
            answer = json.loads(_COMMAND.sub(r"\\\\", found[-1]), strict=False)
        except ValueError:
            answer = found[-1][1:-1] if found[-1].startswith('"') else found[-1]
        return f"<answer>{answer}</answer>"
    return _TEMPLATE.sub(r"<answer>\1</answer>", response)


def _chosen(response: str, choices: Sequence[str], gold: str, question: str | None) -> Score:
    """The letter stated is the gold letter's, or that of an option whose text is the gold answer."""
    right = gold_letters(gold, choices)
    if len(right) > 1 and not choices:
        return _several(response, right, question)
    texts = list(choices) or options_asked(question or "") or []
    if texts == list(option_letters(texts)):
        texts = []  # "A", "B", ..: the options are in the picture
    found = stated_answer(response, choices=texts or None, kind="choice", question=question)
    written = stated_answer(response, kind="expression", question=question) if texts else found
    if texts and written.answer is not None and (written.rule in OUTRIGHT or found.rule not in STATED):
        letter = _option_meant(written.answer, texts)
        if letter is not None:
            return Score(letter in right, letter, f"{written.rule}, value of an option")
        if written.rule in OUTRIGHT and (found.rule not in OUTRIGHT or _MATHEMATICS.search(written.answer)):
            return Score(False, written.answer, f"{written.rule}, no option")
    if found.answer is None:
        return Score(False, None, found.rule)
    return Score(found.answer in right, found.answer, f"{found.rule}, letter")


def _option_meant(written: str, choices: Sequence[str]) -> str | None:
    """The letter that a text is, or of the one option that it equals; None for none and for several."""
    letters = option_letters(choices)
    inside = stated_answer(written, choices=choices, kind="choice")
    if letter := leading_letter(settled(written), letters) or (inside.answer if inside.rule == "announced" else None):
        return letter
    same = [letter for letter, text in zip(letters, choices, strict=False) if equivalent(written, text)]
    return same[0] if len(same) == 1 else None


def gold_letters(gold: str, choices: Sequence[str]) -> frozenset[str]:
    """The letters that are right: of the options that are the gold answer (two may be alike), else the letters that it names.

    MathVista's golds are the options' texts, MATH-V's their letters; LogicVista's may be two letters, "B, D".
    """
    letters = option_letters(choices)
    same = {letter for letter, choice in zip(letters, choices, strict=False) if choice == gold}
    if not same:
        same = {letter for letter, choice in zip(letters, choices, strict=False) if words(choice) == words(gold) != ""}
    one = _LETTER.fullmatch(gold)
    if same or one:
        return frozenset(same) if same else frozenset({one[1].upper()} if one else ())
    return frozenset(re.findall(r"[A-H]", gold.upper())) if _LETTERS.fullmatch(gold) else frozenset()


def _several(response: str, right: frozenset[str], question: str | None) -> Score:
    """All letters of a gold answer that has several."""
    found = stated_answer(response, kind="text", question=question)
    if found.answer is None:
        return Score(False, None, found.rule)
    letters = frozenset(
        re.findall(
            r"(?<![A-Za-z'])[A-H](?![A-Za-z'])", found.answer.upper() if len(found.answer) < 12 else found.answer
        )
    )
    if not letters:
        return Score(False, None, "no option stated")
    return Score(letters == right, ", ".join(sorted(letters)), f"{found.rule}, letters")


def _written(response: str, gold: str, kind: Kind, sample: Mapping[str, Any]) -> Score:
    """What a free-form response states, equal in meaning to the gold answer."""
    question = sample.get("question")
    if kind == "number":
        dollars = sample.get("unit") == "$" or "(Unit: $)" in str(question)
        found = _number(response, question, dollars=dollars)
    else:
        found = stated_answer(response, kind=kind, question=question)
    if found.answer is None:
        return Score(False, None, found.rule)
    if kind == "list":
        correct = equivalent(_bracketed(found.answer), _bracketed(gold), precision=sample.get("precision"))
    else:
        correct = equivalent(found.answer, gold, unit=sample.get("unit"), precision=sample.get("precision"))
    return Score(correct, found.answer, f"{found.rule}, {'equal' if kind == 'text' else 'equivalent'} {kind}")


def _number(response: str, question: str | None, *, dollars: bool) -> Extracted:
    """The number that a response states: a box or a whole response of mathematics is the answer, not one number of it (16-8\\pi is not 8)."""
    response = response.replace(" | ", "\n")  # the cells of a table's row are no one sentence
    if dollars:
        response = DOLLAR.sub("$", response)
    if len(response) <= SHORT and "\n" not in response and is_mathematics(response):
        return Extracted(response.strip(), "whole response")
    written = stated_answer(response, kind="expression", question=question)
    if written.rule in OUTRIGHT and written.answer is not None and is_mathematics(written.answer):
        return written
    return stated_answer(response, kind="number", question=question)


def _bracketed(text: str) -> str:
    """A list in square brackets, whatever brackets it came in: its order matters, its dress does not."""
    return "[" + latex_text(text).strip("()[]{}\\ ") + "]"


def _kind_of(gold: str) -> Kind:
    """What a gold answer of no declared type looks like."""
    text = latex_text(gold)
    if re.fullmatch(r"[-+]?[$]?[\d,]*\.?\d+\s*%?", text):
        return "number"
    if text.startswith("[") and text.endswith("]"):
        return "list"
    return "expression" if re.search(r"[\d\\=^]", text) else "text"
