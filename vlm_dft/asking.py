"""Asking: a benchmark's protocol and a row in, the text of the question exactly as that protocol asks it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm_dft.cards import check_keys
from vlm_dft.columns import columns_of, fill
from vlm_dft.errors import CardError, RowError
from vlm_dft.filters import check_keep, why_dropped
from vlm_dft.prompts import LETTERS, option_texts, prompt_text

FORM_KEYS = ("prompt", "parts", "options", "unit", "system", "strip", "squeeze", "pictures", "markers")
STYLE_KEYS = ("column", "each", "join")
Case = Mapping[str, Any]


def asked_text(form: Mapping[str, Any], row: Mapping[str, Any], *, where: str) -> str:
    """The text that a protocol asks.

    prompt: a text with {columns}, {options} and {parts} in it
    parts: name -> cases [{when: {column: value}, text: ...}, {text: ...}]; the first case whose `when` holds is the part
    options: a column, or {column: ..., each: "({letter}) {option}", join: "\\n"}; nothing for a row without options
    pictures: false  the row's pictures are not given
    markers: text    numbered markers of pictures, <image1>, stay words, and the picture goes before them all
    strip: true      without blanks at the ends
    squeeze: true    the same, and each two blanks become one, as PromptPG does
    Raises RowError for a column that the row lacks, and for a part none of whose cases holds.
    """
    style = form.get("options")
    if "parts" not in form and not isinstance(style, Mapping):
        text = prompt_text(form, row, where=where)
    else:
        values = {**row, "options": _listed(style, row, where)} if style is not None else dict(row)
        for name, cases in (form.get("parts") or {}).items():
            values[name] = fill(case_of(cases, row, where=f"{where}, part {name!r}")["text"], values, where=where)
        text = fill(form["prompt"], values, where=where)
    text = text.replace("  ", " ") if form.get("squeeze") else text
    return text.strip() if form.get("squeeze") or form.get("strip") else text


def case_of(cases: Sequence[Case], row: Mapping[str, Any], *, where: str) -> Case:
    """The first case whose `when` holds; a case without one always does. Raises RowError where none does."""
    for case in cases:
        if "when" not in case or not why_dropped(case["when"], row, where=where):
            return case
    asked = dict.fromkeys(column for case in cases for column in case.get("when", {}))
    found = ", ".join(f"{column} {row.get(column)!r}"[:60] for column in asked)
    raise RowError(f"{where}: none of its {len(cases)} cases holds for {found}.", "no case holds")


def check_form(form: object, *, where: str) -> None:
    """Raise CardError for a protocol that is no mapping of known keys, or whose prompt or parts cannot be filled."""
    if not isinstance(form, Mapping):
        raise CardError(f"{where}: expected a mapping with a prompt, found {form!r}.")
    check_keys(form, FORM_KEYS, where=where)
    if "prompt" not in form:
        raise CardError(f"{where}: missing prompt.")
    columns_of(form["prompt"], where=f"{where}, prompt")
    parts = form.get("parts", {})
    if not isinstance(parts, Mapping):
        raise CardError(f"{where}, parts: expected names with lists of cases, found {parts!r}.")
    for name, cases in parts.items():
        check_cases(cases, ("text",), where=f"{where}, part {name!r}")
    style = form.get("options")
    if isinstance(style, Mapping):
        check_keys(style, STYLE_KEYS, where=f"{where}, options")
        if missing := sorted(set(STYLE_KEYS) - set(style)):
            raise CardError(f"{where}, options: missing {', '.join(missing)}. Expected {', '.join(STYLE_KEYS)}.")
        columns_of(style["each"], where=f"{where}, options")
    elif style is not None and not isinstance(style, str):
        raise CardError(f"{where}, options: expected a column, or {{column, each, join}}, found {style!r}.")
    if form.get("markers", "text") != "text":
        raise CardError(
            f"{where}, markers: expected text (<image1> stays a word, the picture goes first), found {form['markers']!r}."
        )
    for key in ("system", "unit"):
        if key in form and (not isinstance(form[key], str) or not form[key].strip()):
            raise CardError(f"{where}, {key}: expected a text, found {form[key]!r}.")
    for key in ("strip", "squeeze", "pictures"):
        if not isinstance(form.get(key, True), bool):
            raise CardError(f"{where}, {key}: expected true or false, found {form[key]!r}.")


def check_cases(cases: object, says: Sequence[str], *, where: str) -> None:
    """Raise CardError for anything but a list of cases, each with one of `says` and all but the last with a `when`."""
    if not isinstance(cases, list) or not cases:
        raise CardError(
            f"{where}: expected a list of cases such as {{when: {{...}}, {says[0]}: ...}}, found {cases!r}."
        )
    for k, case in enumerate(cases):
        place = f"{where}, case {k + 1}"
        if not isinstance(case, Mapping):
            raise CardError(f"{place}: expected a mapping, found {case!r}.")
        check_keys(case, ("when", *says), where=place)
        if len(set(says) & set(case)) != 1:
            raise CardError(f"{place}: expected one of {', '.join(says)}, found {sorted(case)}.")
        if "text" in case:
            columns_of(case["text"], where=place)
        if "when" in case:
            check_keep(case["when"], where=place)
        elif k < len(cases) - 1:
            raise CardError(f"{place}: has no `when`, so that the cases after it are never looked at. Put it last.")


def _listed(style: Any, row: Mapping[str, Any], where: str) -> str:
    style = style if isinstance(style, Mapping) else {"column": style, "each": "({letter}) {option}", "join": " "}
    options = zip(LETTERS, option_texts({"options": style["column"]}, row, where=where), strict=False)
    return str(style["join"]).join(
        fill(style["each"], {**row, "letter": letter, "option": option}, where=where) for letter, option in options
    )
