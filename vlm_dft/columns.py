"""Columns: a card's `{column}` template and a row in, its text out; or an error that names the row and the column."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from vlm_dft.cards import nearest
from vlm_dft.errors import CardError, RowError


def columns_of(template: object, *, where: str) -> list[str]:
    """The columns that a template names. Raises CardError for anything in braces that is not a column's plain name."""
    if not isinstance(template, str):
        quoted = (
            f' A text that begins with a brace needs quotes: "{{{next(iter(template))}}}".'
            if isinstance(template, dict) and template
            else ""
        )
        raise CardError(f"{where}: expected a text with {{columns}} in it, found {template!r}.{quoted}")
    return [column for _, column in _pieces(template, where) if column is not None]


def fill(template: str, row: Mapping[str, Any], *, where: str) -> str:
    """Replace every `{column}` of a template by the row's value, as text_of gives it; `{{` is a brace.

    Raises RowError for a column that is absent, null, NaN or not a text, CardError for a malformed template.
    """
    filled = []
    for literal, column in _pieces(str(template), where):
        filled.append(
            literal if column is None else literal + text_of(column_of(row, column, where=where), column, where)
        )
    return "".join(filled)


def column_of(row: Mapping[str, Any], column: str, *, where: str) -> Any:
    """The value of a column. Raises RowError with the columns found and the nearest name."""
    if column not in row:
        raise RowError(
            f"{where}: no column {column!r}.{nearest(column, row)} Columns found: {', '.join(map(str, row))}.",
            f"no column {column}",
        )
    return row[column]


def text_of(value: Any, column: str, where: str) -> str:
    """A value as text; a list of one is that one (ChartQA's label). Raises RowError for null, NaN, longer lists and objects."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if value is None or value != value:  # NaN, as tables write nothing
        raise RowError(
            f"{where}: column {column!r} is null{' (NaN)' * (value is not None)}.", f"column {column} is null"
        )
    if is_nan(value):
        raise RowError(
            f"{where}: column {column!r} is {value}, not a number or a text. Mend the row, or leave it out.",
            f"column {column} is {value}",
        )
    if isinstance(value, (list, tuple, Mapping, bytes, bytearray)):
        count = f" of {len(value)}" if isinstance(value, (list, tuple)) else ""
        raise RowError(
            f"{where}: column {column!r} holds a {type(value).__name__}{count}, {str(value)[:80]!r}. Expected a text or number.",
            f"column {column} holds a {type(value).__name__}",
        )
    return str(value)


def list_of(value: Any) -> list[Any]:
    """A cell as a list: one value is a list of it, and the JSON text of a list is that list, as tables without lists hold it."""
    if isinstance(value, str) and value[:1] == "[" and value.rstrip()[-1:] == "]":
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def is_nan(value: Any) -> bool:
    """Whether a value is what tables write for nothing, NaN, or an infinite number."""
    return isinstance(value, float) and not math.isfinite(value)


def _pieces(template: str, where: str) -> list[tuple[str, str | None]]:
    try:
        parsed = _parsed(template)
    except ValueError as error:
        raise CardError(f"{where}: not a template of {{columns}}: {template!r} ({error}). A brace is {{{{.") from error
    for _, column, spec, conversion in parsed:
        if column is not None and (not column.strip() or spec or conversion or set(column) & set(".[]{}")):
            shown = column + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise CardError(
                f"{where}: {{{shown}}} in {template!r} is not a column. Expected a column's plain name in braces: no "
                "attributes, indices, conversions or formats (rename a column whose own name has a dot, a colon or a bracket). "
                "A brace that is meant is written twice."
            )
    return [(literal, column) for literal, column, _, _ in parsed]


@lru_cache(maxsize=256)
def _parsed(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    return list(string.Formatter().parse(template))
