"""LogicVista's official rule, against the stored verdicts of real models' responses and literal cases."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_dft.official.logicvista import logicvista_extraction, score_extraction, score_logicvista
from vlm_dft.option_reading import options_asked

QUESTION = "Which one cools first? Select from A, B, C and D. (A) Wood in water, (B) Steel (C) True (D) 7.3%"


@pytest.fixture(scope="module")
def cases(shared: Path) -> list[dict[str, Any]]:
    """The LogicVista cases of the gold file."""
    lines = (shared / "scoring_gold/dev.jsonl").read_text("utf-8").splitlines()
    return [case for case in map(json.loads, lines) if case["benchmark"] == "logicvista"]


@pytest.fixture(scope="module")
def same(cases: list[dict[str, Any]]) -> list[tuple[dict[str, Any], bool]]:
    """Each tier A case and whether our verdict is the official one."""
    return [(c, score_logicvista(c["response"], c).correct == c["official_correct"]) for c in cases if c["tier"] == "A"]


def agreement(same: list[tuple[dict[str, Any], bool]], **of: str) -> float:
    """Percent of the verdicts that are the official ones."""
    kept = [right for case, right in same if all(case[key] == value for key, value in of.items())]
    return 100 * sum(kept) / len(kept)


def test_stored_extractions_give_every_stored_verdict(cases: list[dict[str, Any]]) -> None:
    assert len(cases) == 400
    assert all(score_extraction(c["official_extraction"], c).correct == c["official_correct"] for c in cases)


def test_raw_responses_agree_with_the_official_verdicts_better_than_any_peer(
    same: list[tuple[dict[str, Any], bool]],
) -> None:
    assert agreement(same) >= 97.5  # the best peer: 89.3
    assert agreement(same, answer_type="letter") >= 97.4  # 89.4
    assert agreement(same, answer_type="letter_multi") == 100  # 100


def test_no_family_of_models_is_read_worse(same: list[tuple[dict[str, Any], bool]]) -> None:
    assert min(agreement(same, family=family) for family in {case["family"] for case, _ in same}) >= 96


@pytest.mark.parametrize(
    ("response", "extraction", "rule"),
    [
        ("", "", "empty response"), ("T", "zzzzz", "single symbol"), ("g", "zzzzz", "single symbol"), ("<", "zzzzz", "single symbol"),
        ("b", "B", "letters alone"), ("3", "3", "single digit"), ("USER: hi ASSISTANT: D", "D", "last line"),
        ("B and D", "B, D", "letters alone"), ("1. A\n2. B\n3. C", "A, B, C", "letters alone"),
        ("The correct answer is B.", "B", "announced"), ("The answer is D, C.", "D, C", "announced"),
        ("Only two of them (B and D) turn.", "B, D", "concluding sentence"), ("A is correct. The rest is not.", "A", "concluding sentence"),
        ("B and C complete the pattern.", "B, C", "concluding sentence"), ("The door closes slower (A)", "A", "concluding sentence"),
        ("1. Set A: It belongs to Set A.\n2. Set B: It does not belong to Set B.", "A", "concluding sentence"),
        ("The answers are **B** and **D**.", "B, D", "announced"), ("答案是B和D", "B, D", "announced"),
        ("It could be A or B.", "zzzzz", "no option stated"), ("7.3%\n\nThis is a rise.", "D", "leading option"), ("answer : yes", "C", "announced"),
        ("A) 1\nB) 2\nC) 3", "zzzzz", "no option stated"), ("Based on the image, " + QUESTION.lower() + " answer: steel", "B", "announced"),
    ],
)  # fmt: skip
def test_a_response_chooses_letters(response: str, extraction: str, rule: str) -> None:
    assert logicvista_extraction(response, {"question": QUESTION}) == (extraction, rule)


@pytest.mark.parametrize(
    ("extraction", "gold", "correct"),
    [
        ("d, b", "B, D", True),
        ("b", "B, D", False),
        ("zzzzz", "A", False),
        ("", "", True),
        ("b,d", "B, D", False),
        ("3", "3", True),
    ],
)
def test_the_same_letters_in_any_order_are_right(extraction: str, gold: str, correct: bool) -> None:
    assert score_extraction(extraction, {"gold_answer": gold}).correct is correct


def test_choosing_nothing_is_an_abstention() -> None:
    score = score_logicvista("T", {"gold_answer": "T", "question": QUESTION})
    assert (score.correct, score.extracted, score.rule) == (False, None, "single symbol")


def test_the_options_of_a_question_are_read() -> None:
    assert options_asked(QUESTION) == ["Wood in water", "Steel", "True", "7.3%"]
    assert options_asked("Area?\nChoices:\nA:3\nB:4 cm") == ["3", "4 cm"]  # MathVerse
    assert options_asked("Area? A. 4; B. 6; C. 8") == ["4", "6", "8"]  # We-Math
    assert options_asked("Which? Select from A, B and C. (A) (B) (C)") is None


@pytest.mark.parametrize(
    "piece", ["A, ", "A and ", "(A) ", "1. A\n", "9", "the answer is ", "ASSISTANT:", "A", "is not "]
)
def test_a_hostile_response_is_answered_within_a_second(piece: str) -> None:
    start = time.process_time()
    score_logicvista(piece * (1_000_000 // len(piece)), {"gold_answer": "A", "question": QUESTION})
    assert time.process_time() - start < 1


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80), st.text(max_size=80))
def test_no_response_raises(response: str, question: str) -> None:
    assert score_logicvista(response, {"gold_answer": "A", "question": question}).rule
