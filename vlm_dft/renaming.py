"""Renaming: a raw row and a source's `columns` in; the row with those columns under the names that a card uses out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlm_dft.cards import check_keys
from vlm_dft.errors import CardError, RowError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
KEYS = ("from", "after", "remove", "split", "part", "letter", "lettered")
ABSENT = (KeyError, IndexError, ValueError)  # what value_at raises


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """The value at a column, or at a dotted path in it: metadata.task, conversations.0.value. Raises one of ABSENT."""
    if path in row:
        return row[path]
    value: Any = row
    for step in path.split("."):
        if isinstance(value, Mapping):
            value = value[step]
        elif isinstance(value, (list, tuple)):
            value = value[int(step)]
        else:
            raise KeyError(path)
    return value


def check_renaming(columns: object, *, where: str) -> None:
    """Raise CardError for `columns` that are not a mapping of names to paths, or to {from: path, ...}."""
    if not isinstance(columns, Mapping) or not columns:
        raise CardError(f"{where}, columns: expected a mapping such as {{level: knowledge_level}}, found {columns!r}.")
    for name, rule in columns.items():
        place = f"{where}, columns: {name}"
        if not isinstance(rule, Mapping):
            rule = {"from": rule}
        check_keys(rule, KEYS, where=place)
        if not isinstance(rule.get("from"), str):
            raise CardError(f"{place}: expected the column that it is from, found {rule.get('from')!r}.")
        if ("split" in rule) != ("part" in rule):
            raise CardError(f"{place}: split (a text) and part (a number from 0) go together.")


def renamed(row: Mapping[str, Any], columns: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The row with its columns renamed; the other columns stay. One whose path leads nowhere is left out.

    {from: path}             the value there
    after: "#### "           what follows the last of these
    remove: ","              without these
    split: /, part: 1        the second of its parts
    letter: true             a whole number from 0 as the letter of an option: 2 is C
    lettered: true           "A. one; B. two" as a list of its options
    Raises RowError for a value that the rule does not fit.
    """
    found = dict(row)
    for name, rule in columns.items():
        rule = rule if isinstance(rule, Mapping) else {"from": rule}
        try:
            value = value_at(row, rule["from"])
        except ABSENT:
            found.pop(name, None)
            continue
        found[name] = _made(value, rule, f"{where}, column {rule['from']!r}") if len(rule) > 1 else value
    return found


def _made(value: Any, rule: Mapping[str, Any], where: str) -> Any:
    if value is None:
        return None
    if rule.get("letter"):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not 0 <= value < len(LETTERS):
            raise RowError(f"{where}: expected the number of an option, from 0, found {value!r}.")
        return LETTERS[int(value)]
    text = str(value)
    if "after" in rule:
        _, mark, text = text.rpartition(rule["after"])
        if not mark:
            raise RowError(f"{where}: no {rule['after']!r} in {text[-80:]!r}.")
    if "remove" in rule:
        text = text.replace(rule["remove"], "")
    if "split" in rule:
        parts = text.split(rule["split"])
        if not 0 <= rule["part"] < len(parts):
            raise RowError(f"{where}: no part {rule['part']} between {rule['split']!r} in {text[:80]!r}.")
        text = parts[rule["part"]]
    return lettered(text, where=where) if rule.get("lettered") else text.strip()


def lettered(text: str, *, where: str) -> list[str]:
    """The options of a text such as "A. 10 cm;B. 15 cm; C. No correct answer". Raises RowError for fewer than two."""
    spans: list[tuple[int, int]] = []
    for letter in LETTERS:
        # a letter before a semicolon or the end is the end of an option: "... to get shape ;C.; B. ..."
        start = re.compile(rf"(?:^|[;\s]){letter}[.:](?!\s*(?:;|$))\s*")
        found = start.search(text, spans[-1][1] if spans else 0)
        if found is None:
            break
        spans.append(found.span())
    if len(spans) < 2:
        raise RowError(f"{where}: expected options such as 'A. one; B. two', found {text[:80]!r}.")
    ends = [start for start, _ in spans[1:]] + [len(text)]
    return [text[start:end].strip(" ;\t\n") for (_, start), end in zip(spans, ends, strict=True)]
