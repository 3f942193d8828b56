"""Examining: a recipe's rows in; what becomes of each, its length and what else is asked about it out, in order, in parallel."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dft.chat import Example
from vlm_dft.errors import RowError
from vlm_dft.fitting import fit
from vlm_dft.measuring import Measured
from vlm_dft.recipes import Outcome, outcomes_of, places, recipe_root
from vlm_dft.rows import Row

if TYPE_CHECKING:
    from vlm_dft.collators import ChatCollator

Facts = Callable[[Example], Any]  # may raise RowError; what it gives is pickled
CHUNK, AHEAD = 32, 4  # places a worker gets at once; chunks of each worker that are on the way: memory is bounded


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
) -> Iterator[Examined]:
    """What becomes of each row, in file order: of `limit` rows from place `start` on; with `only`, of those at these places.

    collator: measures each example and, over its max_length, fits it by its `too_long`. facts: called with each example
    that is used. workers: processes beside this one; 0: this one does it. Nothing that is wrong with a row is raised.
    """
    root = recipe_root(card, data)
    job = (card, root, collator, facts)
    numbered: Iterator[tuple[int, Row | Outcome]] = enumerate(places(card, root, start=start, limit=limit), start)
    if only is not None:
        numbered = (numbered_row for numbered_row in numbered if numbered_row[0] in only)
    if not workers:
        for place, row in numbered:
            yield from _examine_one(job, place, row)
        return
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(job,)) as pool:
        running: deque[Future[list[Examined]]] = deque()
        while chunk := tuple(islice(numbered, CHUNK)):
            running.append(pool.submit(_examine_chunk, chunk))
            if len(running) >= workers * AHEAD:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()


Job = tuple[Mapping[str, Any], Path | None, "ChatCollator | None", Facts | None]
_JOB: list[Job] = []  # of a worker


def _begin(job: Job) -> None:
    _JOB[:] = [job]


def _examine_chunk(chunk: tuple[tuple[int, Row | Outcome], ...]) -> list[Examined]:
    return [found for place, row in chunk for found in _examine_one(_JOB[0], place, row)]


def _examine_one(job: Job, place: int, row: Row | Outcome) -> list[Examined]:
    card, root, collator, facts = job
    made = [row] if isinstance(row, Outcome) else outcomes_of(card, row, root)
    return [_look(place, outcome, collator, facts) for outcome in made]


def _look(place: int, outcome: Outcome, collator: ChatCollator | None, facts: Facts | None) -> Examined:
    if outcome.example is None:
        return Examined(place, outcome)
    try:
        measured = None
        if collator is not None:
            outcome, measured = fitted(collator, outcome)
            if outcome.example is None:
                return Examined(place, outcome, measured)
        return Examined(place, outcome, measured, None if facts is None else facts(outcome.example))
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
