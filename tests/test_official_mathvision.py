"""MATH-Vision's official rule: the verdicts that its authors stored, its quirks one by one, and responses made to break it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from vlm_dft.official.mathvision import mathvision_answer, score_mathvision


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        pytest.skip(f"{path.name} is not in ../shared/data")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_gold_case_has_the_verdict_and_the_extraction_of_the_authors(shared: Path) -> None:
    rows = [row for row in _rows(shared / "scoring_gold/dev.jsonl") if row["benchmark"] == "mathvision"]
    scores = [score_mathvision(row["response"], row) for row in rows]
    wrong = [row["id"] for row, score in zip(rows, scores, strict=True) if score.correct != row["official_correct"]]
    other = [
        row["id"]
        for row, score in zip(rows, scores, strict=True)
        if (score.extracted or "") != row["official_extraction"]
    ]
    assert (len(rows), wrong, other) == (1898, [], [])


@pytest.mark.parametrize(
    "name", ["open-source/Internlm/InternLM-XComposer2-VL-CoT", "closed-source/Gemini/Gemini-Pro-CoT"]
)
def test_stored_outputs_have_their_stored_verdicts(shared: Path, name: str) -> None:
    asked = {row["id"]: row for row in _rows(shared / "mathvision/data/test.jsonl")}
    rows = [row for row in _rows(shared / f"mathvision/outputs/{name}.jsonl") if row["id"] in asked]
    for row in rows:
        sample = {"gold_answer": asked[row["id"]]["answer"], "choices": asked[row["id"]]["options"]}
        score = score_mathvision(row["response"], sample)
        assert (score.correct, score.extracted or "") == (row["correct"], row["model_answer"]), row["id"]
    assert len(rows) == 253


@pytest.mark.parametrize(
    ("response", "answer", "rule"),
    [
        ("So it is option B.", "b", "letter at an end"),
        ("So it is (B).", "b", "letter at an end"),
        ("(C) C\nbecause", "c", "letter at an end"),
        ("So it is \\boxed{D}", "d", "boxed"),
        ("first \\boxed{1}, then \\boxed{2}", "2", "boxed"),
        ("\\boxed{A}. text }", "a", "boxed"),  # greedy to the last brace, then cut at the one that closes nothing
        ("\\fboxed{x = 5^{\\circ}}", "5", "boxed"),
        ("\\boxed{\\textbf{(D)}}", "bfd", "boxed"),
        ("\\boxed{12\\text{ cm}}", "12{cm}", "boxed"),
        ("\\boxed{\\text{(D)}}", "d", "boxed"),
        ("\\boxed{\\sqrt[3]{27}}", "\\sqrt{[}3]{27}", "boxed"),  # a root that no longer is one
        ("\\boxed{\\sqrt3+\\frac12}", "\\sqrt{3}+\\frac{1}{2}", "boxed"),  # fractions are braced only beside a root
        ("\\boxed{\\dfrac12}", "\\frac12", "boxed"),
        ("\\boxed{3/4}", "\\frac{3}{4}", "boxed"),
        ("\\boxed{0.5}", "\\frac{1}{2}", "boxed"),
        ("\\boxed{}", "\\boxed", "boxed"),
        ("The area is 12.5.", "12.5", "number after is"),
        ("Thus the answer is 7. Indeed", "7", "the answer is"),
        ("The answer is x = 7\nas said", "7", "the answer is"),
        ("12 km", "12", "whole response"),
        ("It is a long way.", "itisalongway", "whole response"),
        ("", None, "empty answer"),
        ("}", None, "empty answer"),
    ],
)
def test_the_official_extraction_quirks_included(response: str, answer: str | None, rule: str) -> None:
    assert mathvision_answer(response) == (answer, rule)


@pytest.mark.parametrize(
    ("answer", "gold", "correct"),
    [
        ("12", "12.0", True),
        ("0.333", "1/3", True),  # to two decimals
        ("0.34", "1/3", False),
        ("1.5", "\\frac{3}{2}", True),
        ("12. the side", "12", True),
        ("5 trees", "5", True),
        ("5 cm", "5", False),
        ("1,234", "1234", True),
        ("50\\%", "50", True),  # the sign is taken off the answer
        ("50", "50\\%", False),  # and not off the gold answer, which is 0.5
        ("12°", "12", False),
        ("12^\\circ", "12", True),
        ("x=3", "3", True),  # cut at the last "="
        ("3", "x=3", False),
        ("2x+1", "1+2x", False),  # algebra is compared as text
        ("2x+1", "2X + 1", False),
        ("(1, 2)", "(1,2.0)", True),
        ("(1, 4/2)", "(1,2)", False),  # "2.0" is not "2"
        ("(0.5, 3)", "(\\frac{1}{2},3)", True),
        ("(1,2]", "(1,2)", False),
        ("3, 5", "3,5", True),  # as text
        ("5, 3", "3, 5", False),
        ("1\\frac{1}{2}", "1.5", False),  # juxtaposed: 0.5
        ("1\\frac{1}{2}", "0.5", True),
        ("6.28", "2\\pi", True),
        ("\\ln 2", "0.69", False),
        ("e", "2.72", False),
        ("2^10", "1024", True),
        ("\\sqrt[3]{27}", "3", False),
        ("3", "\\sqrt[3]{27}", True),
        ("\\infty", "∞", False),
    ],
)
def test_equality_is_that_of_the_authors(answer: str, gold: str, correct: bool) -> None:
    assert score_mathvision(f"\\boxed{{{answer}}}", {"gold_answer": gold, "choices": []}).correct is correct


def test_an_option_is_right_by_its_letter_or_by_its_text() -> None:
    sample = {"gold_answer": "B", "choices": ["$3$", "$\\frac{9}{2}$", "7"]}
    assert [score_mathvision(f"\\boxed{{{answer}}}", sample).correct for answer in ("B", "b", "4.5", "3", "A")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert not score_mathvision("\\boxed{12}", {"gold_answer": "B", "choices": None}).correct


@pytest.mark.parametrize(
    "text",
    ["9**9**9**9", "9^{9^{9^{9}}}", "\\frac{" * 50_000, "1e999", "9" * 1_000_000, "\\BOXED{" * 30_000, "}" * 200_000, "\ud800is \x00",
     "(" + "1," * 50_000 + "1)", "the answer is " * 15_000, "\\sqrt\\frac" * 20_000, "is " * 70_000],
)  # fmt: skip
def test_any_response_is_answered_in_less_than_a_second(text: str) -> None:
    for response in (text, f"\\boxed{{{text}}}"):
        for gold in ("12", "(1,2)", "B"):
            started = time.process_time()
            score = score_mathvision(response, {"gold_answer": gold, "choices": ["1", "2"] if gold == "B" else []})
            assert not score.correct and time.process_time() - started < 1
