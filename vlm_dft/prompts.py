"""Prompts: a card and a row in, the text that the model is asked out; the same for training and for evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm_dft.cards import nearest
from vlm_dft.columns import column_of, fill, is_nan, list_of, text_of
from vlm_dft.errors import RowError
from vlm_dft.renaming import LETTERS

__all__ = ["LETTERS", "option_texts", "prompt_text", "right_option"]


def prompt_text(card: Mapping[str, Any], row: Mapping[str, Any], *, where: str) -> str:
    """The card's `prompt` with its `{columns}` filled, then the optional parts that the card declares.

    unit: column      a unit that is not null or empty is appended as " (Unit: m)"
    options: column   a list of choices is appended as a line "Options: (A) yes (B) no", or replaces the placeholder
                      {options} of the prompt where there is one (by nothing for a row without choices)
    Raises RowError naming `where` for a column that the row lacks, or choices that are not a list.
    """
    prompt, row = str(card["prompt"]), dict(row)
    unit = _column(card, "unit", row, where=where)
    options = " ".join(
        f"({letter}) {text}" for letter, text in zip(LETTERS, option_texts(card, row, where=where), strict=False)
    )
    placed = "options" in card and "{options}" in prompt
    text = fill(prompt, {**row, "options": options} if placed else row, where=where)
    if unit not in (None, ""):
        text += f" (Unit: {unit})"
    return f"{text}\nOptions: {options}" if options and not placed else text


def right_option(card: Mapping[str, Any], row: Mapping[str, Any], *, where: str) -> dict[str, str]:
    """{"letter": "B", "choice": its text} of the option that the card's `correct` says is right; {} for a row without options.

    correct: {column: ..., by: index | letter | text}; an index counts from 0. Raises RowError where it is none of the options.
    """
    texts = [option.strip() for option in option_texts(card, row, where=where)]
    if "correct" not in card or not texts:
        return {}
    column, by = card["correct"]["column"], card["correct"]["by"]
    found = column_of(row, column, where=where)
    whole = isinstance(found, float) and found.is_integer()  # an index in a column that has nulls
    value = text_of(int(found) if whole else found, column, where).strip()
    known = {"index": list(map(str, range(len(texts)))), "letter": list(LETTERS[: len(texts)]), "text": texts}[by]
    if known.count(value) != 1:
        times = "none" if value not in known else f"{known.count(value)}"
        raise RowError(
            f"{where}: column {column!r} says the right option by its {by}, and {value[:80]!r} is {times} of {', '.join(known)[:200]}.",
            "right option is not one of the options",
        )
    place = known.index(value)
    return {"letter": LETTERS[place], "choice": texts[place]}


def _column(card: Mapping[str, Any], key: str, row: Mapping[str, Any], *, where: str) -> Any:
    column = card.get(key)
    if column is None:
        return None
    if column not in row:
        raise RowError(
            f"{where}: no column {column!r} ({key}).{nearest(column, row)} Columns found: {', '.join(map(str, row))}.",
            f"no column {column}",
        )
    value = None if is_nan(row[column]) else row[column]
    return list_of(value) if key == "options" and isinstance(value, str) and value.startswith("[") else value


def option_texts(card: Mapping[str, Any], row: Mapping[str, Any], *, where: str) -> list[str]:
    """The options of a row, of the column that the card's `options` names; none where it has none. Raises RowError."""
    choices = _column(card, "options", row, where=where)
    if choices is None:
        return []
    if isinstance(choices, str) or not isinstance(choices, Sequence) or len(choices) > len(LETTERS):
        raise RowError(
            f"{where}: expected a list of at most {len(LETTERS)} choices, or its JSON text, found {str(choices)[:80]!r}.",
            "options are no list",
        )
    for k, choice in enumerate(choices):
        if choice is None or is_nan(choice) or not str(choice).strip():
            raise RowError(f"{where}: option {LETTERS[k]} is {choice!r}.", "an option is empty")
    return [str(choice) for choice in choices]
