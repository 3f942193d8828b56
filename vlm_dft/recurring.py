"""Recurring rows: checked rows in; rows that are there again, by what they share with another, out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice

from vlm_dft.checking import Checked
from vlm_dft.duplicates import as_pairs, look_alikes, same_keys

LISTED = 1000  # pairs of look-alikes that are kept; all are counted


@dataclass(frozen=True, slots=True)
class Recurring:
    """Indices into the checked rows."""

    rows: list[list[int]]  # the same pictures and the same question (text-only rows: the question)
    answers_differ: int  # of these groups, those whose answers are not the same
    alike: list[tuple[int, int]]  # pairs: the same question with pictures that look alike
    alike_count: int
    pictures: list[
        list[int]
    ]  # rows with a picture of another row, and another question: normal where a picture is asked about often
    looks: list[tuple[int, int]]  # pairs: another question, pictures that look alike
    looks_count: int
    questions: list[
        list[int]
    ]  # rows with the question of another row, and another picture: normal where questions are made from templates

    @property
    def extra(self) -> int:
        """Rows beyond the first of each group."""
        return sum(len(group) - 1 for group in self.rows)


def recurring(checked: Checked) -> Recurring:
    """What recurs among the rows. Rows of one place (an unrolled conversation) are not duplicates of each other."""
    rows = _apart(same_keys(_row_keys(checked)), checked)
    differ = sum(len({checked.answers[row] for row in group}) > 1 for group in rows)
    again = {row for group in rows for row in group[1:]}
    shared = _apart(
        [sorted({checked.prints.rows[k] for k in group}) for group in same_keys(checked.prints.exact)], checked
    )
    shared = [[row for row in group if row not in again] for group in shared]
    asked = [[row for row in group if row not in again] for group in _by_question(checked)]
    alike, looks, seen = list[tuple[int, int]](), list[tuple[int, int]](), Counter[bool]()
    asked_of: dict[bytes, dict[int, int]] = {}  # picture -> question -> first row that asks it
    for row, exact in zip(checked.prints.rows, checked.prints.exact, strict=True):
        question = checked.questions[row]
        asked_of.setdefault(exact, {}).setdefault(-1 - row if question is None else question, row)
    for i, j in as_pairs(look_alikes(checked.prints)):
        left, right = asked_of[checked.prints.exact[i]], asked_of[checked.prints.exact[j]]
        both = next((question for question in left if question in right), None)
        pair = (checked.prints.rows[i], checked.prints.rows[j]) if both is None else (left[both], right[both])
        if checked.places[pair[0]] == checked.places[pair[1]]:
            continue
        seen[both is not None] += 1
        kept = looks if both is None else alike
        if len(kept) < LISTED:
            kept.append(pair)
    return Recurring(
        rows, differ, alike, seen[True], [g for g in shared if len(g) > 1], looks, seen[False],
        [g for g in asked if len(g) > 1],
    )  # fmt: skip


def shared_rows(one: Checked, other: Checked) -> list[tuple[int, int]]:
    """(row of one, row of the other) for each row of the other that asks what a row of one asks, with the same pictures."""
    first: dict[tuple[int | bytes, ...], int] = {}
    for row, key in enumerate(_row_keys(one)):
        if one.questions[row] is not None:
            first.setdefault(key, row)
    pairs = [(first.get(key), row) for row, key in enumerate(_row_keys(other)) if other.questions[row] is not None]
    return [(mine, theirs) for mine, theirs in pairs if mine is not None]


def _row_keys(checked: Checked) -> list[tuple[int | bytes, ...]]:
    """What a row asks: the key of its question and its pictures. A row that says nothing but its number is like no other."""
    pictures: dict[int, list[bytes]] = {}
    for row, exact in zip(checked.prints.rows, checked.prints.exact, strict=True):
        pictures.setdefault(row, []).append(exact)
    return [
        (row if question is None else question, *sorted(pictures.get(row, [])))
        for row, question in enumerate(checked.questions)
    ]


def _by_question(checked: Checked) -> list[list[int]]:
    known = [row for row, question in enumerate(checked.questions) if question is not None]
    groups = same_keys([checked.questions[row] for row in known])
    return _apart([[known[k] for k in group] for group in groups], checked)


def _apart(groups: list[list[int]], checked: Checked) -> list[list[int]]:
    """The groups with the first row of each place alone."""
    firsts = [list({checked.places[row]: row for row in reversed(group)}.values())[::-1] for group in groups]
    return [group for group in firsts if len(group) > 1]


def first_pairs(groups: list[list[int]], count: int) -> list[tuple[int, int]]:
    """The first two rows of the first groups."""
    return [(group[0], group[1]) for group in islice(groups, count)]
