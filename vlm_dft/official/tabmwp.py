"""TabMWP's official rule: a response and a record in, a Score out; as PromptPG scores it, but never at random."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_dft.answers import Extracted
from vlm_dft.verdicts import Score

OPTION_LETTERS = "ABCDEF"  # the letters the official scorer knows; others are no choice
LONGEST_NUMBER = 100  # characters; a longer one is compared as text, so that a megabyte of digits costs nothing


def score_tabmwp(response: str, sample: Mapping[str, Any]) -> Score:
    """TabMWP as PromptPG scores it. "letter beyond options" (official: a random option) is an abstention."""
    unit = sample.get("unit")
    found = tabmwp_answer(response, sample.get("choices"))
    if found.answer is None:
        return Score(False, None, found.rule)
    gold = tabmwp_normal(str(sample["gold_answer"]), unit)
    return Score(tabmwp_normal(found.answer, unit).lower() == gold.lower(), found.answer, found.rule)


# TabMWP: lupantech/PromptPG at 7cf61b1, run_gpt3/utilities.py (extraction) and run_t5/eval.py (normal form)

_NUMBER_RUN = r"[-\d$.,/:]+"
_LETTER_RULES = (  # in the official order; the first that holds a letter A to F decides
    ("letter in parentheses", re.compile(r"\A\(([A-Za-z])\)\n?\Z")),
    ("bare letter", re.compile(r"\A([A-Za-z])\n?\Z")),
    ("leading letter", re.compile(r"\A([A-Za-z])[^\n] ")),
    ("the answer is + letter", re.compile(r"[Th]he answer is ([A-Z])")),  # also "The answer is Friday": F
    ("leading letter in parentheses", re.compile(r"\A\(([A-Za-z])\) [\s\S]")),
    ("the answer is + letter in parentheses", re.compile(r"[Th]he answer is \(([A-Za-z])\) [\s\S]")),
)
_NUMBER_RULES = (  # in the official order; the last match of the first rule that matches anything decides
    ("the answer is", re.compile(r"[Th]he answer is ([\s\S]+)\Z"), False),
    ("table shows that", re.compile(r"[Th]he table shows that ([\d$.,/:]+) "), False),
    ("equals sign", re.compile(r" = ([\d$.,/:]+)"), False),
    ("be or is", re.compile(rf"(?<= be| is) ({_NUMBER_RUN})"), True),
    ("are or was", re.compile(rf"(?<= are| was) ({_NUMBER_RUN})"), True),
    ("were", re.compile(rf"(?<= were) ({_NUMBER_RUN})"), True),
    ("time of day", re.compile(r" ([\d$.,/:]+ [AP]\.M\.)"), False),
    ("last number", re.compile(f"({_NUMBER_RUN})"), True),
)


def tabmwp_answer(response: str, choices: Sequence[str] | None) -> Extracted:
    """The official TabMWP extraction, quirks included, except that it never draws at random.

    A letter beyond the options, for which the official code draws an option at random, is an abstention.
    """
    text = _tidy(response.strip())
    return _chosen_option(text, choices) if choices else _free_answer(text)


def _tidy(text: str) -> str:
    text = re.sub(r"\$?\\frac\{([\d.,-]+)\}\{([\d.,]+)\}\$?", r"\1/\2", text)
    text = re.sub(r"(?<![AP]\.M)\.\Z", "", text)
    text = re.sub(r"(?<=\d)=(?=[-$\d])", " = ", text)
    return text.replace("\N{MINUS SIGN}", "-")


def _chosen_option(text: str, choices: Sequence[str]) -> Extracted:
    for rule, pattern in _LETTER_RULES:
        found = pattern.search(text)
        letter = found.group(1).upper() if found else ""
        if not letter or letter not in OPTION_LETTERS:
            continue
        index = OPTION_LETTERS.index(letter)
        return Extracted(choices[index], rule) if index < len(choices) else Extracted(None, "letter beyond options")
    words = text.split(" ")
    overlaps = [_overlap(choice, text, words) for choice in choices]
    return Extracted(choices[overlaps.index(max(overlaps))], "nearest option")  # the first of equals, even of zeros


def _overlap(choice: str, text: str, words: list[str]) -> float:
    """Shared words over the longer of the two counts; 2 for equality. Two single words that differ share nothing."""
    if choice == text:
        return 2.0
    own = choice.split(" ")
    if len(own) == len(words) == 1:
        return 0.0
    return len(set(own) & set(words)) / max(len(own), len(words))


def _free_answer(text: str) -> Extracted:
    for rule, pattern, ends_in_digit in _NUMBER_RULES:
        matches = (match.rstrip("-$.,/:") if ends_in_digit else match for match in reversed(pattern.findall(text)))
        found = next(filter(None, matches), None)  # a run is read up to its last digit; one without a digit is nothing
        if found is not None:
            answer = found.strip()
            return Extracted(answer if ".M." in answer else answer.removesuffix("."), rule)
    return Extracted(text or None, "whole response" if text else "empty response")


def tabmwp_normal(answer: str, unit: str | None) -> str:
    """An answer as it is compared officially: integers bare, fractions and decimals to three places, unit off."""
    answer = re.sub(r"[,./]\Z", "", answer.removeprefix("$"))
    if len(answer) <= LONGEST_NUMBER and re.fullmatch(r"[-+]?[\d,./]+", answer):
        number = answer.replace(",", "")
        try:
            if re.fullmatch(r"[-+]?\d+", number):
                return str(int(number))
            above, _, below = number.partition("/")
            value = float(above) / float(below.split("/")[0]) if below else float(number)
            return re.sub(r"\.0+\Z", "", str(round(value, 3)))
        except (ValueError, ZeroDivisionError):
            return answer  # "1.2.3", "3/0": the official code crashes
    return answer.replace(unit, "").strip() if unit else answer
