"""MathVista's official rule, against the stored verdicts of real models' responses and literal cases."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_dft.official.mathvista import mathvista_extraction, mathvista_normal, score_extraction, score_mathvista

CHOICE = {"choices": ["Yes", "No"], "question_type": "multi_choice", "answer_type": "text", "gold_answer": "No"}
INTEGER = {"choices": None, "question_type": "free_form", "answer_type": "integer", "gold_answer": "7"}
FLOAT = {"choices": None, "question_type": "free_form", "answer_type": "float", "precision": 1, "gold_answer": "1.2"}
LIST = {"choices": None, "question_type": "free_form", "answer_type": "list", "gold_answer": "[1, 2]"}


@pytest.fixture(scope="module")
def cases(shared: Path) -> list[dict[str, Any]]:
    """The MathVista cases of the gold file."""
    lines = (shared / "scoring_gold/dev.jsonl").read_text("utf-8").splitlines()
    return [case for case in map(json.loads, lines) if case["benchmark"] == "mathvista"]


@pytest.fixture(scope="module")
def agreement(cases: list[dict[str, Any]]) -> dict[str, float]:
    """Percent of tier A verdicts that are the official ones: in all, by answer type and by family of models."""
    same: dict[str, list[bool]] = defaultdict(list)
    for case in cases:
        if case["tier"] == "A":
            right = score_mathvista(case["response"], case).correct == case["official_correct"]
            for group in ("all", case["answer_type"], case["family"]):
                same[group].append(right)
    return {group: 100 * sum(values) / len(values) for group, values in same.items()}


def test_stored_extractions_give_every_stored_verdict(cases: list[dict[str, Any]]) -> None:
    assert len(cases) == 3099
    assert all(score_extraction(c["official_extraction"], c).correct == c["official_correct"] for c in cases)


def test_raw_responses_agree_with_the_official_verdicts_better_than_any_peer(agreement: dict[str, float]) -> None:
    for answer_type, least in (("all", 99.2), ("float", 99.6), ("integer", 99.0), ("list", 99.9), ("text", 99.0)):
        assert agreement[answer_type] >= least, agreement  # the best peer: 96.0, 99.6, 98.7, 100, 94.0


def test_no_family_of_models_is_read_worse(agreement: dict[str, float]) -> None:
    assert min(agreement.values()) >= 98.5, agreement


AROUND = {
    "a courtesy": lambda text: text + "\n\nI hope this helps! Let me know if you have any other questions.",
    "thoughts": lambda text: f"<think>\nIs it (A) or (B)? Maybe 5. The answer is B.\n</think>\n\n{text}",
    "bold letters": lambda text: re.sub(r"\(([A-E])\)", r"**(\1)**", text),
    "Windows lines": lambda text: text.replace("\n", "\r\n"),
    "an end token": lambda text: text + "<|im_end|>",
}


@pytest.mark.parametrize("what", AROUND)
def test_what_stands_around_an_answer_does_not_change_the_verdict(what: str, cases: list[dict[str, Any]]) -> None:
    kept = [case for case in cases if case["tier"] == "A"][::5]
    flipped = [
        c["id"]
        for c in kept
        if score_mathvista(AROUND[what](c["response"]), c).correct != score_mathvista(c["response"], c).correct
    ]
    assert len(kept) == 573 and not flipped


@pytest.mark.parametrize(
    ("extraction", "sample", "normal"),
    [
        ("(B) no", CHOICE, "No"), ("B", CHOICE, "No"), (" A ", CHOICE, "Yes"), ("No", CHOICE, "No"), ("none", CHOICE, "No"),
        ("", CHOICE, "No"),  # nothing goes to the nearest, which is the shortest
        ("(E)", {**CHOICE, "choices": ["a", "E"]}, "E"),  # beyond the options: the letter's nearest
        ("x", {**CHOICE, "choices": ["a", "b"]}, "a"),  # as near: the first
        ("b", {**CHOICE, "choices": ["a", "xyz"]}, "a"),  # a small letter without brackets is a text
        ("(c)", {**CHOICE, "choices": ["(c)", "(a)", "(b)"]}, "(b)"),  # a letter, though it is the first option's text
        ("7.9", INTEGER, "7"), ("7", INTEGER, "7"), ("1,000", INTEGER, None), ("12%", INTEGER, None), ("1e999", INTEGER, None),
        ("1.20", FLOAT, "1.2"), ("1", FLOAT, "1.0"), ("nan", FLOAT, "nan"), ("1/2", FLOAT, None), ("[1,2]", LIST, "[1,2]"),
    ],
)  # fmt: skip
def test_extractions_are_normalised_as_officially(extraction: str, sample: dict[str, Any], normal: str | None) -> None:
    assert mathvista_normal(extraction, sample) == normal


@pytest.mark.parametrize(
    ("response", "sample", "extraction", "rule"),
    [
        ("No", CHOICE, "No", "is a choice"), ("007", INTEGER, "7", "is an integer"), ("1.20", FLOAT, "1.2", "is a float"),
        ("", CHOICE, None, "empty response"), ("It is 25%.", INTEGER, "25", "concluding sentence"),
        ("Needs S24.", {**INTEGER, "question": "How much does it cost? (Unit: $)"}, "24", "concluding sentence"),
        ("The answer is (C) unknown.", CHOICE, "(C)", "letter beyond the options"),
        ("The answer is 3.\n\nQuestion: And then?\n\nThe answer is 5.", INTEGER, "5", "announced"),  # the last, as GPT takes it
        ("So it is 40°.\n\nThe correct option is not provided.", {**CHOICE, "choices": ["50°", "60°"]}, "40", "concluding sentence"),
        ("Herring, krill and cod.", {**CHOICE, "choices": ["cod", "krill"]}, "B", "first option quoted"),
        ("They decrease sharply.", {**CHOICE, "choices": ["They grow.", "They would decrease."]}, "B", "option's words"),
        ("I cannot see the image.", CHOICE, None, "abstains"),
    ],
)  # fmt: skip
def test_a_response_is_extracted(response: str, sample: dict[str, Any], extraction: str | None, rule: str) -> None:
    assert mathvista_extraction(response, sample) == (extraction, rule)


def test_an_abstention_is_marked_though_the_nearest_choice_may_be_right() -> None:
    score = score_mathvista("I cannot see the image.", CHOICE)
    assert (score.correct, score.extracted, score.rule) == (True, None, "abstains")


@pytest.mark.parametrize(
    "response", ["9" * 1_000_000, "9**9**9**9", "1e999", "(A" * 100_000, "\ud800\x00", r"\boxed{" * 30_000]
)
@pytest.mark.parametrize("sample", [CHOICE, INTEGER, FLOAT, LIST])
def test_a_hostile_response_is_answered_within_a_second(response: str, sample: dict[str, Any]) -> None:
    start = time.process_time()
    score_mathvista(response, sample)
    score_extraction(response, sample)
    assert time.process_time() - start < 1


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=80), st.sampled_from([CHOICE, INTEGER, FLOAT, LIST, {"gold_answer": "1"}]))
def test_no_response_raises(response: str, sample: dict[str, Any]) -> None:
    assert score_mathvista(response, sample).rule
