"""Scoring: verdicts on literal responses, errors that say what to do, and agreement with the official verdicts where the gold cases are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlm_dft import score_response
from vlm_dft.errors import RowError
from vlm_dft.scoring import RULES, Score


def test_a_drawn_answer_must_equal_the_gold_answer_but_for_case_and_space() -> None:
    sample = {"gold_answer": "Light blue"}
    assert score_response("It is. Answer:  light  BLUE", sample, benchmark="drawn") == Score(
        True, "light  BLUE", "answer line"
    )
    assert score_response("Answer: blue", sample, benchmark="drawn") == Score(False, "blue", "answer line")
    assert score_response("light blue", sample, benchmark="drawn") == Score(False, None, "no answer line")


def test_a_tabmwp_answer_is_compared_as_a_number() -> None:
    sample = {"choices": None, "unit": "$", "gold_answer": "1,234.50"}
    assert score_response("The answer is $1234.5.", sample, benchmark="tabmwp") == Score(
        True, "$1234.5", "the answer is"
    )
    assert not score_response("The answer is 1,234.", sample, benchmark="tabmwp").correct


def test_a_letter_beyond_the_options_is_an_abstention_and_never_luck() -> None:
    sample = {"choices": ["yes", "no"], "unit": None, "gold_answer": "yes"}
    scores = {score_response("The answer is (D) maybe", sample, benchmark="tabmwp") for _ in range(20)}
    assert scores == {Score(False, None, "letter beyond options")}


def test_the_recipe_s_own_responses_are_right() -> None:
    sample = {"choices": ["yes", "no"], "unit": None, "gold_answer": "no"}
    assert score_response("1 + 1 = 2\nThe answer is no.", sample, benchmark="tabmwp") == Score(
        True, "no", "nearest option"
    )


def test_the_official_and_the_robust_rule_may_differ_on_one_response() -> None:
    sample = {"choices": None, "question_type": "free_form", "answer_type": "integer", "gold_answer": "7"}
    assert score_response("7.5", sample, benchmark="mathvista").correct  # the official code truncates
    assert score_response("7.5", sample, benchmark="mathvista", rule="robust") == Score(
        False, "7.5", "whole response, equivalent number"
    )


def test_unknown_benchmarks_and_rules_name_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"No scorer for benchmark 'tabmpw'.* Did you mean 'tabmwp'"):
        score_response("", {}, benchmark="tabmpw")
    with pytest.raises(ValueError, match=r"Unknown scoring rule 'offical'. Did you mean 'official'"):
        score_response("", {}, benchmark="drawn", rule="offical")


@pytest.mark.parametrize("rule", ["official", "robust"])
@pytest.mark.parametrize("sample", [{}, {"gold_answer": None, "question": "?"}])
def test_a_sample_without_a_gold_answer_is_an_error_and_not_a_wrong_answer(rule: str, sample: dict[str, Any]) -> None:
    keys = ", ".join(sample) or "(none)"
    with pytest.raises(
        RowError, match=rf"must have a 'gold_answer'.* found the keys {keys.replace('(', '[(]').replace(')', '[)]')}"
    ):
        score_response("Answer: 5", sample, benchmark="drawn", rule=rule)


@pytest.mark.parametrize("rule", ["official", "robust"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("choices", ["1", None]), ("choices", {"A": "1"}), ("choices", "AB"), ("question", ["?"]), ("unit", 3),
     ("precision", float("nan")), ("precision", 10**9)],
)  # fmt: skip
def test_a_value_that_is_none_of_its_key_is_an_error_that_says_so(rule: str, key: str, value: Any) -> None:
    with pytest.raises(RowError, match=f"A sample's '{key}' must be .*, found"):
        score_response("1", {"gold_answer": "1", key: value}, benchmark="mathvista", rule=rule)


@pytest.mark.parametrize("benchmark", list(RULES["official"]))
def test_options_that_are_numbers_are_their_text(benchmark: str) -> None:
    sample = {"question_type": "multi_choice", "answer_type": "multiple choice", "gold_answer": 4}
    found = [
        score_response("(B)", {**sample, "choices": choices}, benchmark=benchmark) for choices in ((3, 4), ["3", "4"])
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(("response", "kind"), [(None, "NoneType"), (5, "int"), (b"5", "bytes"), (["5"], "list")])
def test_a_response_that_is_no_text_is_an_error_that_says_so(response: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=f"must be text .str., found {kind}. Pass the decoded text"):
        score_response(response, {"gold_answer": "5"}, benchmark="drawn")


def test_every_benchmark_has_both_rules() -> None:
    assert set(RULES) == {"official", "robust"} and RULES["official"].keys() == RULES["robust"].keys()


def test_importing_scoring_brings_no_torch_and_no_sympy() -> None:
    code = "import sys, vlm_dft.scoring; print(sorted({'torch', 'sympy', 'math_verify', 'transformers', 'openai'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_tabmwp_agrees_with_every_official_verdict_and_extraction(shared: Path) -> None:
    lines = (shared / "scoring_gold" / "dev.jsonl").read_text(encoding="utf-8").splitlines()
    cases = [case for case in map(json.loads, lines) if case["benchmark"] == "tabmwp"]
    assert len(cases) == 600
    scores = [score_response(case["response"], case, benchmark="tabmwp") for case in cases]
    assert [c["id"] for c, s in zip(cases, scores, strict=True) if s.correct != c["official_correct"]] == []
    assert [c["id"] for c, s in zip(cases, scores, strict=True) if s.extracted != c["official_extraction"]] == []
