"""The official rules of the other benchmarks: stored verdicts where there are any, literal quirks, and responses made to break them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from vlm_dft.official import OFFICIAL
from vlm_dft.official.dynamath import dynamath_answer
from vlm_dft.official.math500 import math500_answer, normal_form
from vlm_dft.official.mathverse import mathverse_gold
from vlm_dft.option_reading import options_asked

RULES = ("wemath", "dynamath", "mathverse", "geometry3k", "puzzlevqa", "scienceqa", "gsm8k", "math500", "tabmwp")


def _gold(shared: Path, name: str, key: str, benchmark: str) -> list[dict[str, Any]]:
    path = shared / "scoring_gold" / name
    if not path.is_file():
        pytest.skip(f"{name} is not in ../shared/data/scoring_gold")
    return [row for row in map(json.loads, path.read_text().splitlines()) if row[key] == benchmark]


@pytest.mark.parametrize("protocol", ["wemath", "dynamath"])
def test_every_case_scored_by_another_benchmarks_code_has_its_verdict(shared: Path, protocol: str) -> None:
    rows = _gold(shared, "cross_dev.jsonl", "protocol", protocol)
    wrong = [row["id"] for row in rows if OFFICIAL[protocol](row["response"], row).correct != row["official_correct"]]
    assert (len(rows), wrong) == (400, [])


def test_every_tabmwp_case_has_the_verdict_and_the_extraction_of_its_authors(shared: Path) -> None:
    rows = _gold(shared, "dev.jsonl", "benchmark", "tabmwp")
    scores = [OFFICIAL["tabmwp"](row["response"], row) for row in rows]
    wrong = [row["id"] for row, score in zip(rows, scores, strict=True) if score.correct != row["official_correct"]]
    other = [
        row["id"] for row, score in zip(rows, scores, strict=True) if score.extracted != row["official_extraction"]
    ]
    drawn = [
        score for score in scores if score.rule == "letter beyond options"
    ]  # where the official code draws at random
    assert (len(rows), wrong, other, drawn) == (600, [], [], [])


@pytest.mark.parametrize(
    ("response", "letter", "rule"),
    [
        ("<Thought process>: <<so>> <Answer>: <<C>>", "C", "letter after Answer"),
        ("Answer: A. No: Answer: B. because", "B", "letter after Answer"),
        ("Based on the picture", "B", "leading letter"),
        ("Answer: (B)", None, "no letter after Answer"),
        ("answer: b", None, "no leading letter"),
        ("H", "H", "leading letter"),
        ("", None, "no leading letter"),
    ],
)
def test_wemath_reads_one_character_after_the_last_answer(response: str, letter: str | None, rule: str) -> None:
    score = OFFICIAL["wemath"](response, {"gold_answer": "B"})
    assert (score.extracted, score.rule, score.correct) == (letter, rule, letter == "B")


@pytest.mark.parametrize(
    ("response", "answer", "rule"),
    [
        ('```json\n{"solution": "\\(x\\)", "short answer": "1.5"}\n```', "1.5", "short answer"),
        ('{"short answer": 1.5}', "1.5", "short answer"),
        ('{"answer": "1.5"}', None, "no short answer"),
        ("6.8", None, "JSON that is no object"),  # their code fails on it
        ("thus\n1.50.", "1.50", "last line less a character"),
        ("The answer is 1.5", "The answer is 1.", "last line less a character"),
        ("B", None, "empty last line"),
        ('{"short answer": "cut', '{"short answer": "cu', "last line less a character"),
        ("", None, "empty last line"),
        ('{"a":' * 100_000, ('{"a":' * 100_000)[:-1], "last line less a character"),
    ],
)
def test_dynamath_reads_the_short_answer_of_the_json(response: str, answer: str | None, rule: str) -> None:
    assert dynamath_answer(response) == (answer, rule)


@pytest.mark.parametrize(
    ("short", "gold", "kind", "correct"),
    [
        ("6.8009", "6.8", "float", True),
        ("6.8011", "6.8", "float", False),
        ("2π", "6.2832", "float", True),
        ("7 cm", "7", "float", True),
        ("7cm", "7", "float", False),
        ("12", "12.0", "float", True),
        ("π", "3.1416", "float", False),
        ("B", "B", "multiple choice", True),
        ("b", "B", "multiple choice", False),
        ("(B) two", "B", "multiple choice", True),
        ("A or B", "B", "multiple choice", False),
        ("Between", "B", "multiple choice", True),  # among the first three characters
        ("it is 4:45 pm", "4:45", "text", True),
        ("Yes", "yes", "text", False),
    ],
)
def test_dynamath_compares_by_type(short: str, gold: str, kind: str, correct: bool) -> None:
    response = json.dumps({"solution": "so", "short answer": short}, ensure_ascii=False)
    assert OFFICIAL["dynamath"](response, {"gold_answer": gold, "answer_type": kind}).correct is correct


def test_dynamath_without_a_short_answer_answers_none_which_holds_a_no() -> None:
    score = OFFICIAL["dynamath"]('{"answer": "1"}', {"gold_answer": "No", "answer_type": "text"})
    assert (score.correct, score.extracted) == (True, None)


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"), ("B\n", "B"), (" B\n", None), ("B. itch", "B"), ("So. The answer is B.", "B"), ("The answer is Bern", "B"),
        ("b", None), ("(B)", None), ("The answer is E.", None), ("I pick\nB", None),
    ],
)  # fmt: skip
def test_scienceqa_reads_letters_as_llava_does(response: str, letter: str | None) -> None:
    for gold in ("B", "inherit"):
        score = OFFICIAL["scienceqa"](response, {"gold_answer": gold, "choices": ["itch", "inherit"]})
        assert (score.extracted, score.correct) == (letter, letter == "B")


@pytest.mark.parametrize(
    ("response", "answer", "rule"),
    [
        ("(A) is wrong, so (B) large.", "large", "last letter in parentheses"),
        ("A circle of small size", "small", "last capital A to D"),
        ("(D)", "small", "last letter in parentheses"),  # beyond the options: the first
        ("medium", None, "no letter"),
    ],
)
def test_puzzlevqa_reads_the_last_letter(response: str, answer: str | None, rule: str) -> None:
    score = OFFICIAL["puzzlevqa"](response, {"gold_answer": "small", "choices": ["small", "large", "medium"]})
    assert (score.extracted, score.rule, score.correct) == (answer, rule, answer == "small")
    assert OFFICIAL["puzzlevqa"]("(C)", {"gold_answer": 8, "choices": [7, 9, 8]}).correct


@pytest.mark.parametrize(
    ("response", "answer", "rule", "correct"),
    [
        ("so 7\n#### 1,234", "1234", "after ####", True),
        ("#### 1234 and #### 5", "1234", "after ####", True),
        ("#### 1234.", "1234.", "after ####", False),
        ("It is $1,234.", "1234", "last number", True),
        ("\\boxed{1234}", "1234", "last number", True),
        ("1234 of the 5", "5", "last number", False),
        ("none", None, "no number", False),
    ],
)
def test_gsm8k_reads_the_number_after_the_marks_else_the_last(
    response: str, answer: str | None, rule: str, correct: bool
) -> None:
    for gold in ("1234", "12 + 1 = 13 #### 1,234"):
        score = OFFICIAL["gsm8k"](response, {"gold_answer": gold})
        assert (score.extracted, score.rule, score.correct) == (answer, rule, correct)


@pytest.mark.parametrize(
    ("response", "answer", "rule"),
    [
        ("\\boxed{1} then $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}", "boxed"),
        ("\\boxed 5$ so", "5", "boxed"),
        ("\\boxed{5", "5", "boxed"),
        ("The final answer is $5$. I hope it is correct.", "5", "final answer is"),
        ("The answer is: 5.", "5", "answer is"),
        ("We get 1,234 and .5", ".5", "last number"),
        ("We get nothing", None, "no number"),
        ("\\boxed{}", None, "boxed, empty"),
    ],
)
def test_math500_finds_answers_as_its_graders_do(response: str, answer: str | None, rule: str) -> None:
    assert math500_answer(response) == (answer, rule)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\\dfrac12", "\\frac{1}{2}"), ("1/2", "\\frac{1}{2}"), ("0.5", "\\frac{1}{2}"), (".25", "0.25"), ("x=5", "5"),
        ("\\sqrt3", "\\sqrt{3}"), ("30^\\circ", "30"), ("10\\%", "10"), ("12\\text{ cm}", "12"), ("\\left(1, 2\\right)", "(1,2)"),
    ],
)  # fmt: skip
def test_math500_has_the_normal_form_of_maths_authors(one: str, other: str) -> None:
    assert normal_form(one) == normal_form(other)


def test_math500_tells_by_which_equality_an_answer_was_right() -> None:
    sample = {"gold_answer": "\\frac{\\sqrt{3}}{2}"}
    assert OFFICIAL["math500"]("\\boxed{\\dfrac{\\sqrt3}{2}}", sample).rule == "boxed, normal form"
    same = OFFICIAL["math500"]("\\boxed{\\sqrt{\\frac{3}{4}}}", sample)
    assert (same.correct, same.rule) == (True, "boxed, meaning")
    assert not OFFICIAL["math500"]("\\boxed{\\frac{\\sqrt{2}}{2}}", sample).correct


@pytest.mark.parametrize(
    ("response", "correct", "rule"),
    [
        ("The answer is C.", True, "letter"),
        ("The answer is B.", False, "letter"),
        ("So x = 8.7", True, "nearest option"),
        ("So x = 7.2", False, "nearest option"),
        ("I cannot tell.", False, "abstains"),
    ],
)
def test_geometry3k_takes_a_letter_or_the_option_nearest_to_a_number(response: str, correct: bool, rule: str) -> None:
    sample = {"question": "Find x.", "gold_answer": "C", "choices": ["5", "5 \\sqrt { 2 }", "5 \\sqrt { 3 }", "10"]}
    for record in (sample, {**sample, "precise_value": [5.0, 7.0711, 8.6603, 10.0]}):
        score = OFFICIAL["geometry3k"](response, record)
        assert score.correct is correct and score.rule.startswith(rule)


def test_geometry3k_needs_the_values_of_all_options_and_counts_equal_distances() -> None:
    sample = {"question": "Find x.", "gold_answer": "B", "choices": ["4", "6", "AB", "20"]}
    assert not OFFICIAL["geometry3k"]("So x = 6.2", sample).correct
    assert OFFICIAL["geometry3k"]("So x = 5", {**sample, "choices": ["4", "6", "10", "20"], "gold_answer": "A"}).correct


@pytest.mark.parametrize(
    ("gold", "response", "correct"),
    [
        ("Circumference $=50.27 \\mathrm{~cm}$", "The circumference is 50.27 cm.", True),
        ("Circumference $=50.27 \\mathrm{~cm}$", "The circumference is 52.27 cm.", False),
        ("118\u63b3T", "118°", True),  # the degree sign as the file has it
        ("$C=40.84 \\mathrm{~cm}$", "The answer is 40.84", True),
        ("S 23.5 ^\\circ W", "S 23.5° W", True),
        ("y=-2 x+5", "The answer is y = -2x + 5.", True),
        ("y=-2 x+5", "The answer is y = 2x + 5.", False),
        ("(-1.8,10)", "(-1.8, 10)", True),
        ("4\\sqrt{3}", "\\boxed{4\\sqrt{3}}", True),
    ],
)
def test_mathverse_compares_free_answers_with_messy_golds_by_meaning(gold: str, response: str, correct: bool) -> None:
    assert (
        OFFICIAL["mathverse"](
            response, {"question": "Find it.", "question_type": "free_form", "gold_answer": gold}
        ).correct
        is correct
    )


@pytest.mark.parametrize(
    ("gold", "response", "correct"),
    [
        ("(C)", "The answer is C", True), ("(C)", "The answer is 120°.", True), ("B", "C", False), ("C\nD", "C and D", True),
        ("C\nD", "C", False), ("B", "I do not know.", False),
    ],
)  # fmt: skip
def test_mathverse_finds_the_options_in_the_question(gold: str, response: str, correct: bool) -> None:
    question = "Then angle CED is ()\nChoices:\nA:40°\nB:60°\nC:120°\nD:140°"
    sample = {"question": question, "question_type": "multi_choice", "gold_answer": gold}
    assert options_asked(question) == ["40°", "60°", "120°", "140°"]
    assert OFFICIAL["mathverse"](response, sample).correct is correct


def test_mathverse_real_questions_have_options_and_golds_are_right_answers_to_themselves(shared: Path) -> None:
    path = shared / "mathverse/data/testmini_text_only.json"
    if not path.is_file():
        pytest.skip("no MathVerse in ../shared/data")
    for row in json.loads(path.read_text()):
        chosen = row["question_type"] == "multi-choice"
        sample = {
            "question": row["question"],
            "question_type": "multi_choice" if chosen else "free_form",
            "gold_answer": row["answer"],
        }
        assert (options_asked(row["question"]) is not None) is chosen
        assert OFFICIAL["mathverse"](f"The answer is {mathverse_gold(row['answer'])}.", sample).correct, row["answer"]


HOSTILE = {
    "power": "9**9**9**9",
    "digits": "9" * 1_000_000,
    "tuple": "(" + "1," * 20_000,
    "deep": '{"short answer":' + "[" * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_any_response_is_answered_in_less_than_a_second_by_every_rule(name: str) -> None:
    text = HOSTILE[name]
    samples = (
        {
            "question": "How many?\nChoices:\nA:1\nB:2",
            "choices": ["1", "2"],
            "gold_answer": "B",
            "question_type": "multi_choice",
        },
        {
            "question": "How many?",
            "choices": None,
            "gold_answer": "12",
            "question_type": "free_form",
            "answer_type": "float",
        },
    )
    for rule in RULES:
        for sample in samples:
            started = time.process_time()
            OFFICIAL[rule](text, sample)
            assert time.process_time() - started < 1, rule
