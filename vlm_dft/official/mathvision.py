"""MATH-Vision's official rule: a response and a record in, a Score out; mathllm/MATH-V at a1f5cc3, evaluation/{evaluate,utils}.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_dft.answers import Extracted
from vlm_dft.official.latex_numbers import Number, latex_number
from vlm_dft.verdicts import Score

_MARKS = [
    f"{the} {mark}"
    for mark in ("final answer is", "answer is", "correct answer is", "answer should be")
    for the in ("the", "The")
]
_DROPPED = ("\\left", "\\right", "^{\\circ}", "^\\circ", "{m}^3", "m^3", "{units}", "units", "{km}", "km", "\n", "\\!")


def score_mathvision(response: str, sample: Mapping[str, Any]) -> Score:
    """The answer equal to the gold answer or to the text of the gold option, as their code has it: to two decimals.

    No abstention but an empty answer: a response that says its answer in no known way is compared whole.
    """
    found = mathvision_answer(response)
    if found.answer is None:
        return Score(False, None, found.rule)
    gold = str(sample["gold_answer"])
    choices = [str(choice) for choice in sample.get("choices") or ()]
    place = ord(gold) - ord("A") if len(gold) == 1 else -1
    option = choices[place] if 0 <= place < len(choices) else ""
    return Score(_equal(gold, found.answer) or _equal(option, found.answer), found.answer, found.rule)


def mathvision_answer(response: str) -> Extracted:
    """The official extraction, quirks included: `\\textbf{(D)}` is "bfd", and a response without a mark is its own answer."""
    text, rule = response.strip(), "whole response"
    for letter in "ABCDE":
        ends, starts = (f" {letter}.", f" ({letter})."), (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        if text.endswith(ends) or text.startswith(starts):
            text, rule = letter, "letter at an end"
    last = text.rsplit("is ", 1)[-1].rstrip(".")
    if _is_float(last):
        text, rule = last, "number after is" if "is " in text else rule
    if "oxed{" not in text:
        for mark in _MARKS:
            before, text = text, text.rsplit(mark, 1)[-1].strip()
            if mark in before:
                text, rule = text.split("\n")[0].split(". ")[0], mark.lower()
    else:
        rule = "boxed"
        if text.count("oxed{") > 1:
            text = "\\boxed{" + text.rsplit("oxed{", 1)[-1]
    answer = _tidy(_content(text.lower()))
    for letter in "abcde":
        answer = answer.replace(f"({letter})", letter)
    for letter in "abcde":
        answer = answer.replace(f"{{{letter}}}", letter)
    answer = answer.rstrip(".").lstrip(":").strip()
    return Extracted(answer, rule) if answer else Extracted(None, "empty answer")


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _content(text: str) -> str:
    """From the first "oxed{" to the last "}" (greedy), cut at a brace that closes nothing; then what follows "=" and "\\approx"."""
    text = text.replace("{}", "")
    start, end = text.find("oxed{") + len("oxed{"), text.rfind("}")
    if len("oxed{") <= start <= end:
        text = text[start:end]
    opened, closed = text.find("{"), text.find("}")
    if closed != -1 and (opened == -1 or closed < opened):
        text = text[:closed]
    return text.rsplit("=", 1)[-1].rsplit("\\approx", 1)[-1]


def _tidy(text: str) -> str:
    """An answer as it is compared: no blanks, signs of layout, units; roots and fractions in braces; "a/b" a \\frac."""
    text = text.replace(" ", "").replace("\\,", "").replace("∞", "\\infty")
    text = text.replace("+\\infty", "\\infty").replace("\\\\", "\\").replace("\n", "")
    text = text.replace("\\text", "").replace("\\mbox", "").replace("bmatrix", "pmatrix")
    for dropped in _DROPPED:
        text = text.replace(dropped, "")
    text = text.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    for dropped in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "$"):
        text = text.replace(dropped, "")
    text = text.split("\\text{ ")[0].replace("\\%", "").replace("{.", "{0.")
    if not text:
        return text
    text = "0" + text if text.startswith(".") else text
    for sign in ("=", "\\approx"):
        text = text.rpartition(sign)[2] if text.count(sign) == 1 else text
    if "sqrt" in text:
        text = braced_fractions(braced_roots(text))
    return slash("\\frac{1}{2}" if text == "0.5" else text)


def braced_roots(text: str) -> str:
    """`\\sqrt3` as `\\sqrt{3}`."""
    first, *others = text.split("\\sqrt")
    return first + "".join(
        "\\sqrt" + (f"{{{part[0]}}}{part[1:]}" if part and part[0] != "{" else part) for part in others
    )


def braced_fractions(text: str) -> str:
    """`\\frac12` as `\\frac{1}{2}`, `\\frac1{72}` as `\\frac{1}{72}`; as it was where one has nothing to divide."""
    first, *others = text.split("\\frac")
    parts = [first]
    for part in others:
        if part.startswith("{"):
            parts.append(part)
        elif len(part) < 2:
            return text
        else:
            parts.append(f"{{{part[0]}}}" + (part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"))
    return "\\frac".join(parts)


def slash(text: str) -> str:
    """`3/4` as `\\frac{3}{4}`, when that is all there is."""
    above, slash, below = text.partition("/")
    try:
        whole = bool(slash) and f"{int(above)}/{int(below)}" == text
    except ValueError:  # no integers, or integers of thousands of digits
        return text
    return f"\\frac{{{above}}}{{{below}}}" if whole else text


def _equal(gold: str, answer: str) -> bool:
    """Equal in lower case, as tuples of values to two decimals, or as values to two decimals."""
    gold, answer = gold.lower(), answer.lower()
    if not gold.replace(" ", "") or not answer.replace(" ", ""):
        return False
    if gold.strip() == answer.strip():
        return True
    gold, answer = _tuple(gold), _tuple(answer)
    if gold == answer:
        return True
    value = _rounded(gold)
    return value is not None and value == _rounded(answer)


def _tuple(text: str) -> str:
    """ "(1, 4/2)" as "(1,2.0)": its elements as they print, rounded; the text itself where one of them is no number."""
    parts = text[1:-1].split(",")
    if (text[0], text[-1]) not in (("(", ")"), ("[", "]")) or len(parts) < 2 or len(parts) > 100:
        return text
    values = [part if "infty" in part or part in ("a", "-a") else _rounded(part) for part in parts]
    return text if None in values else f"{text[0]}{','.join(map(str, values))}{text[-1]}"


def _rounded(text: str) -> Number | None:
    value = latex_number(text)
    return None if value is None else round(value, 2)
