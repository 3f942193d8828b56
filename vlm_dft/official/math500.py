r"""MATH-500's rule: a response and a record in, a Score out.

Found as Qwen2.5-Math's evaluation (and with it the DFT paper's) finds it: the last `\boxed{}`, "he answer is", "final answer is", the
last number. Equal as MATH's authors have it, by normal form (hendrycks/math, modeling/math_equivalence.py), or in meaning by
`equivalence`, which stands where PRM800K's and Qwen's graders ask sympy (no time limit there; "0.33" for 1/3 counts here).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlm_dft.answers import Extracted
from vlm_dft.equivalence import equivalent
from vlm_dft.official.mathvision import braced_fractions, braced_roots, slash
from vlm_dft.verdicts import Score

LONGEST = 2000  # characters of an answer that is brought to normal form
_LAST_NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)", re.ASCII)


def score_math500(response: str, sample: Mapping[str, Any]) -> Score:
    """The boxed or stated answer, or the last number, equal to the gold answer in normal form or in meaning."""
    found = math500_answer(response)
    if found.answer is None:
        return Score(False, None, found.rule)
    gold = str(sample["gold_answer"])
    if normal_form(found.answer) == normal_form(gold):
        return Score(True, found.answer, f"{found.rule}, normal form")
    return Score(equivalent(found.answer, gold), found.answer, f"{found.rule}, meaning")


def math500_answer(response: str) -> Extracted:
    """The answer that Qwen2.5-Math's evaluation finds, before it is tidied."""
    rule, answer = _found(response)
    answer = (
        re.sub(r"\n\s*", "", answer.strip()).removeprefix(":").strip().removesuffix(".").removesuffix("/").strip(" $")
    )
    return (
        Extracted(answer, rule)
        if answer
        else Extracted(None, f"{rule}, empty" if rule != "last number" else "no number")
    )


def _found(response: str) -> tuple[str, str]:
    if "final answer is $" in response and "$. I hope" in response:
        return "final answer is", response.split("final answer is $", 1)[1].split("$. I hope", 1)[0]
    if "boxed" in response:
        return "boxed", _boxed(response.rsplit("boxed", 1)[1])
    for mark in ("he answer is", "final answer is"):
        if mark in response:
            return mark.removeprefix("he "), response.rsplit(mark, 1)[1]
    numbers = _LAST_NUMBER.findall(response.replace(",", ""))
    return "last number", numbers[-1] if numbers else ""


def _boxed(text: str) -> str:
    """The braces' content, to the end where they do not close; without braces, what stands before the next "$"."""
    if not text.startswith("{"):
        return text.split("$")[0]
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return text[1:place]
    return text[1:]


def normal_form(text: str) -> str:
    r"""MATH's normal form: layout, units, percent and degrees off, `x=` off, `\sqrt3`, `\frac12`, `1/2` and 0.5 alike with braces."""
    if len(text) > LONGEST:
        return text
    text = (
        text.replace("\n", "")
        .replace("\\!", "")
        .replace("\\\\", "\\")
        .replace("tfrac", "frac")
        .replace("dfrac", "frac")
    )
    for dropped in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(dropped, "")
    text = text.split("\\text{ ")[0] if text.count("\\text{ ") == 1 else text
    text = text.replace("\\%", "").replace("%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    name, equals, value = text.partition("=")
    text = value if equals and "=" not in value and len(name) <= 2 else text
    text = braced_fractions(braced_roots(text).replace(" ", ""))
    return slash("\\frac{1}{2}" if text == "0.5" else text)
