"""Filters: a row is kept or left out for a reason that is the same for all; doubt about a filter is the card's error."""

from __future__ import annotations

import time
from typing import Any

import pytest

from vlm_dft.errors import CardError, RowError
from vlm_dft.filters import check_keep, why_dropped

ROW = {"grade": 5, "split": "train", "text": "solve x", "none": None, "nan": float("nan"), "blank": " ", "skills": ["a", "b"],
       "number": "7", "yes": True, "long": "a" * 20_000 + "z"}  # fmt: skip


@pytest.mark.parametrize(
    ("keep", "why"),
    [
        ({"split": "train"}, ""),
        ({"split": "dev"}, "filtered: split is not 'dev'"),
        ({"split": ["dev", "test"]}, "filtered: split is not one of dev, test"),
        ({"grade": 5.0}, ""),
        ({"yes": 1}, "filtered: yes is not 1"),
        ({"number": 7}, ""),  # a table of text writes numbers so
        ({"number": [6, 7.0]}, ""),
        ({"number": {"not": 7}}, "filtered: number is 7"),
        ({"text": 7}, "filtered: text is not 7"),
        ({"grade": "5"}, "filtered: grade is not '5'"),
        ({"skills": "b"}, ""),
        ({"grade": {"min": 3, "max": 8}}, ""),
        ({"grade": {"min": 6, "max": 8}}, "filtered: grade is not 6 to 8"),
        ({"grade": {"max": 4}}, "filtered: grade is not at most 4"),
        ({"none": {"min": 6}}, "filtered: none is not at least 6"),
        ({"number": {"min": 7, "max": 7}}, ""),
        ({"split": {"not": "train"}}, "filtered: split is 'train'"),
        ({"split": {"not": ["dev", "train"]}}, "filtered: split is one of dev, train"),
        ({"none": {"empty": False}}, "filtered: none is empty"),
        ({"nan": {"empty": False}}, "filtered: nan is empty"),
        ({"blank": {"empty": False}}, "filtered: blank is empty"),
        ({"absent": {"empty": False}}, "filtered: absent is empty"),
        ({"absent": {"empty": True}}, ""),
        ({"text": {"empty": True}}, "filtered: text is not empty"),
        ({"text": {"max_chars": 7, "min_chars": 7}}, ""),
        ({"text": {"max_chars": 6}}, "filtered: text is over 6 characters"),
        ({"blank": {"min_chars": 1}}, "filtered: blank is under 1 characters"),
        ({"text": {"matches": "^solve"}}, ""),
        ({"text": {"matches": "^x"}}, "filtered: text does not match '^x'"),
        ({"long": {"matches": "z"}}, "filtered: long does not match 'z'"),  # beyond the 10,000 characters looked at
        ({"split": "train", "grade": {"max": 4}}, "filtered: grade is not at most 4"),
    ],
)
def test_a_row_is_kept_where_every_condition_holds(keep: dict[str, Any], why: str) -> None:
    check_keep(keep, where="card")
    assert why_dropped(keep, ROW, where="row") == why


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({}, "keep must map columns"),
        ({"grade": {"mni": 3}}, r"keep: grade: unknown key 'mni'. Did you mean 'min'\?"),
        ({"grade": {"min": "3"}}, "min must be a number, found '3'"),
        ({"grade": {"min": 9, "max": 3}}, "min 9 is above max 3"),
        ({"grade": {"empty": "no"}}, "empty must be true or false"),
        ({"grade": None}, "expected a value, a list of values"),
        ({"grade": []}, "expected a value, a list of values"),
        ({"grade": {"matches": "("}}, "is not a regular expression"),
        ({"grade": {"matches": "a" * 501}}, "at most 500 characters"),
        ({"grade": {"max_chars": 0}}, "max_chars must be a whole number above zero"),
    ],
)
def test_what_a_card_says_of_filters_is_checked(keep: Any, message: str) -> None:
    with pytest.raises(CardError, match=message):
        check_keep(keep, where="card")


def test_an_absent_column_and_a_word_where_a_number_was_expected_are_the_rows_error() -> None:
    with pytest.raises(
        RowError, match=r"no column 'garde' to filter by. Did you mean 'grade'\? Columns found: grade, split"
    ):
        why_dropped({"garde": {"min": 3}}, ROW, where="row 1")
    with pytest.raises(RowError, match="row 1: keep: text: expected a number to compare, found 'solve x'"):
        why_dropped({"text": {"min": 3}}, ROW, where="row 1")


def test_a_pattern_that_would_take_for_ever_is_given_up_and_said() -> None:
    begun = time.monotonic()
    with pytest.raises(RowError, match="took over 1.0 s. Simplify it"):
        why_dropped({"t": {"matches": "^(?:a|aa)+$"}}, {"t": "a" * 60 + "b"}, where="row")
    assert time.monotonic() - begun < 10
