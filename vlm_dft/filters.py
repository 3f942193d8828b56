"""Filters: a card's `keep:` and a row in, why the row is left out, or nothing, out. Data only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import regex

from vlm_dft.cards import check_keys, nearest
from vlm_dft.columns import is_nan
from vlm_dft.errors import CardError, RowError

LONGEST = 10_000  # characters that a regex looks at
PATIENCE = 1.0  # seconds that it may take for one cell
LONGEST_PATTERN = 500
CONDITIONS = ("min", "max", "not", "empty", "min_chars", "max_chars", "matches")
SCALARS = (str, int, float, bool)


def check_keep(keep: object, *, where: str) -> None:
    """Raise CardError for a filter that is not a value, a list of values or a mapping of known conditions."""
    if not isinstance(keep, Mapping) or not keep:
        raise CardError(f"{where}: keep must map columns to what is kept of them, found {keep!r}.")
    for column, condition in keep.items():
        place = f"{where}, keep: {column}"
        if isinstance(condition, Mapping):
            if not condition:
                raise CardError(f"{place}: expected conditions ({', '.join(CONDITIONS)}), found none.")
            check_keys(condition, CONDITIONS, where=place)
            for key, value in condition.items():
                _check_condition(str(key), value, place)
            if not condition.get("min", -math.inf) <= condition.get("max", math.inf):
                raise CardError(f"{place}: min {condition['min']} is above max {condition['max']}.")
        elif not _is_values(condition):
            raise CardError(
                f"{place}: expected a value, a list of values, or a mapping of {', '.join(CONDITIONS)}, found {condition!r}."
            )


def why_dropped(keep: Mapping[str, Any], row: Mapping[str, Any], *, where: str) -> str:
    """The first condition that a row does not meet, "filtered: grade is not 3 to 8"; "" for a row that is kept.

    Raises RowError for a column that the row lacks (unless the condition is about `empty`; JSON rows may leave out what others
    have), and for a value that cannot be compared: "many" is neither above nor below 3.
    """
    for column, condition in keep.items():
        if column not in row and not (isinstance(condition, Mapping) and "empty" in condition):
            raise RowError(
                f"{where}: keep: no column {column!r} to filter by.{nearest(column, row)} Columns found: {', '.join(map(str, row))}.",
                f"no column {column} to filter by",
            )
        why = _why(column, condition, row.get(column), where)
        if why:
            return f"filtered: {column} {why}"
    return ""


def _why(column: str, condition: Any, value: Any, where: str) -> str:
    if not isinstance(condition, Mapping):
        return "" if _is_one_of(value, condition) else f"is not {_shown(condition)}"
    if "empty" in condition and _is_empty(value) != condition["empty"]:
        return "is empty" if _is_empty(value) else "is not empty"
    for key, test in TESTS.items():
        if key in condition and (why := test(condition, value, f"{where}: keep: {column}")):
            return why
    return ""


def _range(condition: Mapping[str, Any], value: Any, where: str) -> str:
    low, high = condition.get("min", -math.inf), condition.get("max", math.inf)
    said = (
        f"at most {high}" if "min" not in condition else f"{low} to {high}" if "max" in condition else f"at least {low}"
    )
    if _is_empty(value):
        return f"is not {said}"
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise RowError(
            f"{where}: expected a number to compare, found {str(value)[:80]!r}.", "filtered column is not a number"
        )
    return "" if low <= number <= high else f"is not {said}"


def _not(condition: Mapping[str, Any], value: Any, where: str) -> str:
    return f"is {_shown(condition['not'])}" if _is_one_of(value, condition["not"]) else ""


def _chars(condition: Mapping[str, Any], value: Any, where: str) -> str:
    count = 0 if _is_empty(value) else len(str(value).strip())
    if count < condition.get("min_chars", 0):
        return f"is under {condition['min_chars']} characters"
    return f"is over {condition['max_chars']} characters" if count > condition.get("max_chars", math.inf) else ""


def _matches(condition: Mapping[str, Any], value: Any, where: str) -> str:
    pattern, text = condition["matches"], "" if _is_empty(value) else str(value)
    try:
        found = regex.search(pattern, text[:LONGEST], timeout=PATIENCE)
    except TimeoutError as error:
        raise RowError(
            f"{where}: the pattern {pattern!r} took over {PATIENCE} s. Simplify it.", "filter took too long"
        ) from error
    return "" if found else f"does not match {pattern!r}"


TESTS: dict[str, Callable[[Mapping[str, Any], Any, str], str]] = {
    "min": _range, "max": _range, "not": _not, "min_chars": _chars, "max_chars": _chars, "matches": _matches,
}  # fmt: skip
"""A condition by its key -> why a value does not meet it, or ""."""


def _check_condition(key: str, value: Any, where: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if key in ("min", "max") and not number:
        raise CardError(f"{where}: {key} must be a number, found {value!r}.")
    if key in ("min_chars", "max_chars") and not (number and isinstance(value, int) and value > 0):
        raise CardError(f"{where}: {key} must be a whole number above zero, found {value!r}.")
    if key == "empty" and not isinstance(value, bool):
        raise CardError(f"{where}: empty must be true or false, found {value!r}.")
    if key == "not" and not _is_values(value):
        raise CardError(f"{where}: not must be a value or a list of values, found {value!r}.")
    if key == "matches":
        if not isinstance(value, str) or not 0 < len(value) <= LONGEST_PATTERN:
            raise CardError(
                f"{where}: matches must be a regular expression of at most {LONGEST_PATTERN} characters, found {value!r}."
            )
        try:
            regex.compile(value)
        except regex.error as error:
            raise CardError(f"{where}: {value!r} is not a regular expression ({error}).") from error


def _is_values(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(one, SCALARS) for one in values)


def _is_one_of(value: Any, wanted: Any) -> bool:
    """Whether a cell is one of the values; 1 is 1.0 and "1", as tables of text write it, and not true; a cell that is a list is one
    if any of it is."""
    values = wanted if isinstance(wanted, list) else [wanted]
    cells = value if isinstance(value, (list, tuple)) else [value]
    return any(_is(one, cell) for one in values for cell in cells)


def _is(wanted: Any, cell: Any) -> bool:
    if isinstance(wanted, (int, float)) and not isinstance(wanted, bool) and isinstance(cell, str):
        try:
            cell = float(cell)
        except ValueError:
            return False
    return bool(wanted == cell) and isinstance(wanted, bool) == isinstance(cell, bool)


def _is_empty(value: Any) -> bool:
    blank = isinstance(value, str) and not value.strip()
    return (
        value is None or is_nan(value) or blank or (isinstance(value, (list, tuple, Mapping, bytes)) and not len(value))
    )


def _shown(wanted: Any) -> str:
    return f"one of {', '.join(map(str, wanted))}" if isinstance(wanted, list) else repr(wanted)
