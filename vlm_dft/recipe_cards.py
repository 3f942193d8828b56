"""Recipe cards: the mapping of a card in, the same checked out, or an error that says which key is wrong and what it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from vlm_dft.cards import check_keys, nearest
from vlm_dft.columns import columns_of
from vlm_dft.errors import CardError
from vlm_dft.filters import check_keep
from vlm_dft.objectives import OBJECTIVES
from vlm_dft.response_text import check_tags
from vlm_dft.row_formats import check_format

REQUIRED = ("description", "licence", "source")
OPTIONAL = (
    "paper", "rows", "image", "images", "image_root", "prompt", "response", "system", "unit", "options", "correct", "messages",
    "format", "videos", "unroll", "answer", "ending", "tags", "keep", "columns", "objective", "weight", "bad_rows",
    "duplicates", "training", "benchmark", "notes",
)  # fmt: skip
WAYS = ("index", "letter", "text")  # that `correct` says the right option in
TEXTS = (
    "description",
    "licence",
    "paper",
    "images",
    "videos",
    "image_root",
    "system",
    "unit",
    "options",
    "benchmark",
    "notes",
)
TEMPLATES = ("prompt", "response", "image", "ending")
CONTRADICTIONS = (  # (a key, keys that cannot stand beside it, why)
    ("messages", ("prompt", "response"), "give either messages, or prompt and response"),
    (
        "format",
        ("prompt", "response"),
        "a format says itself what is asked and answered: give either format, or prompt and response",
    ),
    ("image", ("images",), "give either image (a path with {columns}) or images (a column)"),
)
NEEDS = (  # (a key, the one that it needs, why)
    ("prompt", "response", "prompt and response go together"),
    ("response", "prompt", "prompt and response go together"),
    ("unit", "prompt", "unit is appended to the card's prompt"),
    ("options", "prompt", "options are appended to the card's prompt"),
    ("correct", "options", "correct says which of the options is right"),
    ("answer", "ending", "answer is what the ending states"),
)


def check_recipe(card: Mapping[str, Any], *, where: str) -> None:
    """Raise CardError for the first thing that a card of one source cannot say."""
    if not isinstance(card["source"], Mapping):
        raise CardError(f"{where}: source must be a mapping, such as {{files: [rows.json]}}, found {card['source']!r}.")
    for key, others, why in CONTRADICTIONS:
        if clash := [other for other in others if key in card and other in card]:
            raise CardError(f"{where}: {why}. Found {key} and {', '.join(clash)}.")
    for key, needed, why in NEEDS:
        if key in card and needed not in card:
            raise CardError(f"{where}: {why}. Found {key} without {needed}.")
    for key, value in card.items():
        if key in TEXTS and not (isinstance(value, str) and value.strip()) and not (key == "images" and value is None):
            raise CardError(f"{where}: {key} must be a text, found {value!r}.")
        if key in TEMPLATES:
            columns_of(value, where=f"{where}, {key}")
        if key in CHECKS:
            CHECKS[key](value, where)


def _rows(value: object, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CardError(f"{where}: rows must be a whole number above zero, found {value!r}.")


def _messages(value: object, where: str) -> None:
    if value is not None and not isinstance(value, str):
        raise CardError(
            f"{where}: messages must be the column of the conversation, or null to find it, found {value!r}."
        )


def _unroll(value: object, where: str) -> None:
    if not isinstance(value, bool):
        raise CardError(f"{where}: unroll must be true or false, found {value!r}.")


def _correct(value: object, where: str) -> None:
    if not isinstance(value, Mapping) or {"column", "by"} - set(value):
        raise CardError(f"{where}: correct must be {{column: ..., by: {' | '.join(WAYS)}}}, found {value!r}.")
    check_keys(value, ("column", "by"), where=f"{where}, correct")
    if value["by"] not in WAYS or not isinstance(value["column"], str):
        raise CardError(f"{where}, correct: by must be one of {', '.join(WAYS)}, found {value['by']!r}.")


def _answer(value: object, where: str) -> None:
    if not isinstance(value, Mapping):
        columns_of(value, where=f"{where}, answer")
        return
    check_keys(value, ("free", "choice"), where=f"{where}, answer")
    if set(value) != {"free", "choice"}:
        raise CardError(
            f"{where}, answer: expected both free (rows without options) and choice (rows with), found {value!r}."
        )
    for template in value.values():
        columns_of(template, where=f"{where}, answer")


def _columns(value: object, where: str) -> None:
    if not isinstance(value, list) or not value or not all(isinstance(column, str) for column in value):
        raise CardError(f"{where}: columns must be a list of columns' names, found {value!r}.")


def _objective(value: object, where: str) -> None:
    if value not in OBJECTIVES:
        raise CardError(
            f"{where}: unknown objective {value!r}.{nearest(str(value), OBJECTIVES)} Known: {', '.join(OBJECTIVES)}."
        )


def _weight(value: object, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CardError(
            f"{where}: weight must be a finite number above 0, found {value!r}. To leave the set out, leave out its card."
        )


def _training(value: object, where: str) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise CardError(f"{where}: training must be a mapping of settings, found {value!r}.")


CHECKS: dict[str, Callable[[object, str], object]] = {
    "rows": _rows, "messages": _messages, "unroll": _unroll, "correct": _correct, "answer": _answer, "columns": _columns,
    "objective": _objective, "weight": _weight, "training": _training,
    "format": lambda value, where: check_format(value, where=where),
    "keep": lambda value, where: check_keep(value, where=where),
    "tags": lambda value, where: check_tags(value, where=where),
}  # fmt: skip
"""What a key's value must be, by key: each raises CardError."""
