"""Extraction: literal responses and what the rules make of them."""

from __future__ import annotations

import time

import pytest

from vlm_dft.answers import answer_line, plain
from vlm_dft.official.tabmwp import tabmwp_answer, tabmwp_normal


def test_the_last_answer_line_counts() -> None:
    assert answer_line("Answer: 3\nNo, wait. Answer:  12 \nThat is all.") == ("12", "answer line")


@pytest.mark.parametrize("response", ["", "12", "The answer is 12.", "Answer:", "Answer:  \n12"])
def test_without_an_answer_line_nothing_is_extracted(response: str) -> None:
    assert answer_line(response) == (None, "no answer line")


def test_case_and_whitespace_do_not_matter_in_plain_text() -> None:
    assert plain("  Light\t Blue\n") == "light blue"


@pytest.mark.parametrize(
    ("response", "answer", "rule"),
    [
        ("(b)", "no", "letter in parentheses"),
        ("A", "yes", "bare letter"),
        ("b. because it is so", "no", "leading letter"),
        ("So The answer is B.", "no", "the answer is + letter"),
        ("(B) no", "no", "leading letter in parentheses"),
        ("The answer is (B) no.", "no", "the answer is + letter in parentheses"),
        ("no", "no", "nearest option"),
        ("nothing of the kind", "yes", "nearest option"),  # no overlap at all: the first option, as officially
        ("the answer is B", "yes", "nearest option"),  # a small t is not "[Th]he": no letter rule fires
        ("The answer is Friday.", None, "letter beyond options"),  # F; officially a random draw
        ("The answer is Monday.", "yes", "nearest option"),  # M is no option letter at all
    ],
)
def test_a_choice_is_found_by_the_official_rules(response: str, answer: str | None, rule: str) -> None:
    assert tabmwp_answer(response, ["yes", "no"]) == (answer, rule)


def test_the_option_with_most_words_in_common_is_chosen() -> None:
    assert tabmwp_answer("in pattern B", ["pattern A grows", "pattern B grows"]).answer == "pattern B grows"


@pytest.mark.parametrize(
    ("response", "answer", "rule"),
    [
        ("It costs $4. The answer is $1,234.50.", "$1,234.50", "the answer is"),
        ("The answer is 3. The answer is 4.", "3. The answer is 4", "the answer is"),
        (r"The answer is $\frac{3}{4}$.", "3/4", "the answer is"),
        ("The table shows that 7 people came.", "7", "table shows that"),
        ("3+4=7 and 8 = 9.", "9", "equals sign"),
        ("The cost will be $1.40. Yes", "$1.40", "be or is"),
        ("There are 5 and 6", "5", "are or was"),
        ("They were 12, 13", "12", "were"),
        ("They left at 7:25 P.M.", "7:25 P.M.", "time of day"),
        ("5 or \N{MINUS SIGN}6.", "-6", "last number"),
        ("$ 3 $", "3", "last number"),
        ("no idea", "no idea", "whole response"),
        ("  ", None, "empty response"),
    ],
)
def test_a_free_answer_is_found_by_the_official_rules(response: str, answer: str | None, rule: str) -> None:
    assert tabmwp_answer(response, None) == (answer, rule)


@pytest.mark.parametrize(
    ("answer", "unit", "normal"),
    [
        ("$1,234.50", "$", "1234.5"),
        ("8,899", None, "8899"),
        ("-007", None, "-7"),
        ("2/11", None, "0.182"),
        ("3.00", None, "3"),
        ("12.", None, "12"),
        ("7:25 P.M.", None, "7:25 P.M"),
        ("5 km", "km", "5"),
        ("3/0", None, "3/0"),  # these two crash the official code
        ("1.2.3", None, "1.2.3"),
        ("9" * 5000, None, "9" * 5000),
    ],
)
def test_answers_are_normalised_as_officially(answer: str, unit: str | None, normal: str) -> None:
    assert tabmwp_normal(answer, unit) == normal


@pytest.mark.parametrize(
    "piece", ["9", "$", "-", " is", " = ", "The answer is ", r"\frac{1", "1=", ". ", "Answer:", "(A) ", "\n"]
)
@pytest.mark.parametrize("choices", [None, ["a", "b c"]])
def test_a_megabyte_of_anything_is_read_in_bounded_processor_time(piece: str, choices: list[str] | None) -> None:
    response = piece * (1_000_000 // len(piece))
    start = time.process_time()
    tabmwp_answer(response, choices)
    answer_line(response)
    assert time.process_time() - start < 3
