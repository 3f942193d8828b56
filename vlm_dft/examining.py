"""Examining: a recipe's rows in; what becomes of each, its length and what else is asked about it out, in order, in parallel."""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dft.chat import Example
from vlm_dft.errors import RowError
from vlm_dft.fitting import fit
from vlm_dft.measuring import Measured
from vlm_dft.recipes import Outcome, outcomes_of, places, recipe_root
from vlm_dft.rows import Row
from vlm_dft.workers import in_parallel

if TYPE_CHECKING:
    from vlm_dft.collators import ChatCollator

HERE = 4  # rows examined before there are workers: what a collator finds out once of its processor, they know then
Facts = Callable[[Example], Any]  # may raise RowError; what it gives is pickled


@dataclass(frozen=True, slots=True)
class Examined:
    """What became of a row, and what was found out about it."""

    place: int  # of the raw row in its files
    outcome: Outcome
    measured: Measured | None = None  # of the example as it is trained on, under the collator
    facts: Any = None


def examine(
    card: Mapping[str, Any],
    data: str | None,
    *,
    collator: ChatCollator | None = None,
    facts: Facts | None = None,
    workers: int = 0,
    start: int = 0,
    limit: int | None = None,
    only: Container[int] | None = None,
) -> Generator[Examined]:
    """What becomes of each row, in file order: of `limit` rows from place `start` on; with `only`, of those at these places.

    collator: measures each example and, over its max_length, fits it by its `too_long`. facts: called with each example
    that is used. workers: processes beside this one; 0: this one does it. The result does not depend on their number.
    Nothing that is wrong with a row is raised; a worker that is killed is (UserError).
    """
    root = recipe_root(card, data)
    job = _Job(card, root, collator, facts)
    numbered: Iterator[tuple[int, Row | Outcome]] = enumerate(places(card, root, start=start, limit=limit), start)
    if only is not None:
        numbered = (numbered_row for numbered_row in numbered if numbered_row[0] in only)
    for place, row in islice(numbered, HERE) if workers else numbered:
        yield from job(place, row)
    if (ahead := next(numbered, None)) is None:
        return
    numbered = chain([ahead], numbered)
    with closing(in_parallel(job, numbered, workers, what=f"recipe {card['name']!r}")) as results:
        for found in results:
            yield from found


@dataclass(frozen=True, slots=True)
class _Job:
    """A raw row in, what is found out about it out: done in this process or in a worker."""

    card: Mapping[str, Any]
    root: Path | None
    collator: ChatCollator | None
    facts: Facts | None

    def __call__(self, place: int, row: Row | Outcome) -> list[Examined]:
        made = [row] if isinstance(row, Outcome) else outcomes_of(self.card, row, self.root)
        return [self.look(place, outcome) for outcome in made]

    def look(self, place: int, outcome: Outcome) -> Examined:
        if outcome.example is None:
            return Examined(place, outcome)
        try:
            measured = None
            if self.collator is not None:
                outcome, measured = fitted(self.collator, outcome)
            example, facts = outcome.example, self.facts
            return Examined(
                place, outcome, measured, facts(example) if facts is not None and example is not None else None
            )
        except RowError as error:
            return Examined(place, replace(outcome, example=None, error=error))


def fitted(collator: ChatCollator, outcome: Outcome) -> tuple[Outcome, Measured]:
    """(the outcome as it is trained on, its tokens): over max_length the example is dropped or changed. Raises RowError."""
    example = outcome.example
    assert example is not None, "only what is used is measured"
    measured = collator.measure(example)
    if collator.max_length is None or measured.tokens <= collator.max_length:
        return outcome, measured
    found, effect = fit(collator, example, f"{example.source} row {example.id}")
    if found is None:
        return replace(outcome, example=None, dropped=effect.removeprefix("dropped: ")), measured
    return replace(outcome, example=found, changed=(*outcome.changed, effect)), collator.measure(found)
