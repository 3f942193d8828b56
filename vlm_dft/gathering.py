"""Gathering: a recipe and its data folder in; its examples in the order of training, measured, mixed and accounted for, out.

Every row of every source is looked at: read, made an example, measured by the collator. Rows that cannot be used are dropped and
counted where `bad_rows: drop` says so, by the card or for the run; else, after all were looked at, one error counts them.
The result is a function of the recipe, the files, the collator and the seed: not of the number of workers, nor of the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlm_dft.accounting import MOST_IDS, Accounting, Faults, Rows, account_lines, account_table, whole
from vlm_dft.bars import Bar
from vlm_dft.chat import Example
from vlm_dft.collators import ChatCollator
from vlm_dft.errors import RowError
from vlm_dft.examining import Examined, examine
from vlm_dft.measuring import within
from vlm_dft.mixed import Dress, Mixed, Part
from vlm_dft.mixture_cards import Card, Source, sources_in
from vlm_dft.mixture_rows import mixed_places
from vlm_dft.recipes import MAX_SOURCES
from vlm_dft.sameness import Twins, embedded_bytes, fingerprint, likeness
from vlm_dft.stored_parts import stored_part

Echo = Callable[[Any], None]
FEW, MOST_WORKERS = 512, 8  # rows for which no processes are started; processes at most
EMBEDDED = 256 * 2**20  # bytes of pictures inside the rows that may stay in memory; sources with more are prepared


@dataclass(frozen=True, slots=True)
class Gathered:
    """What a run is trained on."""

    examples: Mixed
    accounts: list[Accounting]
    accounting: dict[str, Any]  # as written to accounting.json

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return self.examples.lengths

    @property
    def fingerprint(self) -> str:
        """Of the examples, in order."""
        return self.examples.fingerprint


def gather(
    card: Card,
    data: str | None,
    collator: ChatCollator,
    *,
    limit: int | None = None,
    seed: int = 0,
    bad_rows: str | None = None,
    workers: int | None = None,
    echo: Echo = lambda said: None,
) -> Gathered:
    """Read, measure, mix and account for all of a recipe.

    limit: only the first rows of every source. bad_rows: "refuse" or "drop", for all of its sources; None: as the cards say.
    workers: processes that read and measure; None: as many as the machine has cores to spare (none for few rows).
    Raises RowError for rows that cannot be used, and for a recipe of which nothing is left.
    """
    faults, parts, accounts = Faults(), list[Part](), list[Accounting]()
    for source in sources_in(card, data):
        reading = _Reading(
            source, collator, limit, bad_rows or source.card.get("bad_rows", "refuse"), workers, echo, faults
        )
        part, account = reading.stored() if "prepared" in source.card["source"] else reading.read()
        parts.append(part)
        accounts.append(account)
    faults.refuse()
    for part, account in zip(parts, accounts, strict=True):
        if not len(part.tokens):
            raise RowError(_nothing_left(account))
    examples = Mixed(parts)
    if "mixture" in card:
        drawn = mixed_places(card, [one.response for one in parts], seed, tokens=[one.tokens for one in parts])
        examples = Mixed(parts, drawn.source, drawn.row)
        for k, (part, account) in enumerate(zip(parts, accounts, strict=True)):
            for reason, rows in drawn.left[k].items():
                account.leave_out(reason, [str(part.ids[int(row)]) for row in rows[:MOST_IDS]], len(rows))
    for k, (part, account) in enumerate(zip(parts, accounts, strict=True)):
        rows = examples.row[examples.part == k]
        account.examples = len(rows)
        used = np.unique(rows)
        account.used = len(used)
        account.changed.clear()
        for effect, changed in part.changed.items():
            there = np.intersect1d(np.asarray(changed, np.int64), used)
            if len(there):
                account.changed[effect] = Rows(len(there), [str(part.ids[int(row)]) for row in there[:MOST_IDS]])
        account.tokens.clear()
        account.count(*(int(column[rows].sum()) for column in (part.tokens, part.media, part.response)))
        names = part.names
        account.sources.clear()
        account.sources.update(names[row] for row in rows)
    mixing = (
        {"order": card.get("order", "shuffled"), "share_of": card.get("share_of", "response")}
        if "mixture" in card
        else {}
    )
    return Gathered(examples, accounts, whole(accounts, fingerprint=examples.fingerprint, **mixing))


def say_account(accounting: Mapping[str, Any], echo: Echo) -> None:
    """The account as a table, and what it does not say in lines."""
    echo(account_table(accounting))
    for line in account_lines(accounting):
        echo(f"      {line}")


def _nothing_left(account: Accounting) -> str:
    if not account.read:
        return f"Recipe {account.source!r} has no rows."
    why = "; ".join(f"{found.rows:,} {reason}" for reason, found in account.dropped.items())
    hint = " Raise max_length." if "max_length" in why else ""
    return f"None of the {account.read:,} rows of {account.source} is left: {why}.{hint}"


@dataclass(slots=True)
class _Reading:
    """One source on its way to a Part."""

    source: Source
    collator: ChatCollator
    limit: int | None
    bad_rows: str
    workers: int | None
    echo: Echo
    faults: Faults

    @property
    def dress(self) -> Dress:
        """What the mixture makes of its examples."""
        one = self.source
        return Dress(one.name if one.mixed else None, one.objective, one.loss_weight)

    def account(self) -> Accounting:
        """An empty one."""
        return Accounting(self.source.name, licence=str(self.source.card.get("licence", "")))

    def read(self) -> tuple[Part, Accounting]:
        """Everything of the source in memory; prepared on disk, if it holds too much."""
        account, twins, rows = self.account(), Twins(), _Measured()
        held = 0
        with _counted(self._examined()) as examined:
            for one in examined:
                if self.take(account, one, twins):
                    example = one.outcome.example
                    assert example is not None and one.measured is not None, "what is used was measured"
                    rows.add(example, within(one.measured, self.collator.max_length), one.outcome.changed)
                    held += embedded_bytes(example)
                    if held > EMBEDDED:
                        break
        if held > EMBEDDED:
            del rows
            self.faults.looked_at -= account.read  # they are looked at again
            return self.prepare()
        alike = len(rows.examples) - len({example.id for example in rows.examples})
        if alike:
            account.notes["the same id as an earlier row: an id in this account may mean several"] = alike
        if (
            not self.source.mixed and len(set(rows.sources)) > MAX_SOURCES
        ):  # a column of that name that holds something else
            note = f"{len(set(rows.sources)):,} different sources are too many to tell apart (at most {MAX_SOURCES})"
            account.notes[note] = len(rows.sources)
            rows.call_all(self.source.name)
        return rows.part(self.dress), account

    def _examined(self) -> Iterator[Examined]:
        """The source's rows, in order."""
        words: dict[str, Any] = {"collator": self.collator, "facts": likeness, "limit": self.limit}
        return examine(self.source.card, self.source.data, workers=self._processes(), **words)

    def _processes(self) -> int:
        """How many measure: none where the rows are known to be few, if the run does not say."""
        if self.workers is not None:
            return self.workers
        rows = [count for count in (self.limit, self.source.card.get("rows")) if count]
        return 0 if rows and min(rows) <= FEW else spare_workers()

    def take(self, account: Accounting, one: Examined, twins: Twins | None) -> bool:
        """Account for a row. Returns whether it is used."""
        outcome = one.outcome
        account.read += 1
        self.faults.looked_at += 1
        if outcome.error is not None:
            account.drop(outcome.error.reason, outcome.id)
            self._fault(outcome.error, outcome.id)
            return False
        if outcome.example is None:
            account.drop(outcome.dropped, outcome.id)
            return False
        if twins is not None and twins.is_twin(one.facts, outcome.example):
            account.duplicates.add(outcome.id)
            if self.source.card.get("duplicates") == "drop":
                account.drop("the same as an earlier row", outcome.id)
                return False
        account.notes.update(one.measured.notes if one.measured else ())
        account.used += 1
        return True

    def prepare(self) -> tuple[Part, Accounting]:
        """The source in its prepared form, made in the cache the first time."""
        from vlm_dft.ingredients import cache_folder
        from vlm_dft.preparing import prepare

        card = self.source.card
        folder = cache_folder(card, self.source.data, collator=self.collator, limit=self.limit)
        self.echo(
            f"      {self.source.name} holds over {EMBEDDED // 2**20} MB of pictures itself: prepared in {folder}"
        )
        words: dict[str, Any] = {"collator": self.collator, "limit": self.limit, "bad_rows": self.bad_rows}
        prepare(card, self.source.data, folder, workers=self._processes(), echo=self.echo, **words)
        return self._opened(str(folder), None)

    def stored(self) -> tuple[Part, Accounting]:
        """A source that was prepared before."""
        return self._opened(str(self.source.card["source"]["prepared"]), self.limit)

    def _opened(self, place: str, limit: int | None) -> tuple[Part, Accounting]:
        from vlm_dft.ingredients import collator_settings
        from vlm_dft.prepared import open_prepared

        part, account, said = stored_part(
            open_prepared(place), self.source, self.dress, self.collator, settings=collator_settings(self.collator), limit=limit,
            fault=self._fault,
        )  # fmt: skip
        self.faults.looked_at += account.read
        if said:
            self.echo(f"      {said}")
        return part, account

    def _fault(self, error: RowError, row_id: str) -> None:
        """A row that cannot be used: refused, or dropped as the card or the run says."""
        if self.bad_rows == "refuse":
            self.faults.add(error, f"{self.source.name} {row_id}" if self.source.mixed else row_id)


class _Measured:
    """Examples in memory and what is known of each."""

    def __init__(self) -> None:
        self.examples: list[Example] = []
        self.tokens: list[tuple[int, int, int]] = []
        self.sources: list[str] = []
        self.changed: dict[str, list[int]] = {}

    def add(self, example: Example, tokens: tuple[int, int, int], changed: Sequence[str]) -> None:
        """One more, and what was done to it."""
        for effect in changed:
            self.changed.setdefault(effect, []).append(len(self.examples))
        self.examples.append(example)
        self.tokens.append(tokens)
        self.sources.append(example.source)

    def call_all(self, name: str) -> None:
        """Let all go by one name."""
        self.examples = [replace(example, source=name) for example in self.examples]
        self.sources = [name] * len(self.sources)

    def part(self, dress: Dress) -> Part:
        """The same as a Part."""
        tokens, media, response = np.array(self.tokens, np.int64).reshape(-1, 3).T
        pictured, filmed = (
            np.array([bool(getattr(example, kind)) for example in self.examples], np.bool_)
            for kind in ("images", "videos")
        )
        ids = [example.id for example in self.examples]
        return Part(
            self.examples,
            ids,
            tokens,
            media,
            response,
            self.sources,
            pictured,
            filmed,
            fingerprint(self.examples),
            dress,
            self.changed,
        )


def spare_workers() -> int:
    """Processes that may measure beside this one: cores less one, shared by the training processes of this machine."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MOST_WORKERS, max(0, (os.cpu_count() or 1) - 1) // beside)


class _counted:
    """An iterator with a bar, from the thousandth row on."""

    def __init__(self, rows: Iterator[Examined]) -> None:
        self.rows, self.bar = rows, Bar(None, None)

    def __enter__(self) -> Iterator[Examined]:
        return self._with_bar()

    def __exit__(self, *error: object) -> None:
        self.bar.__exit__(None, None, None)
        close = getattr(self.rows, "close", None)
        if callable(close):
            close()  # its processes end with it

    def _with_bar(self) -> Iterator[Examined]:
        for k, one in enumerate(self.rows, 1):
            if k == 1000:
                self.bar = Bar(None, "measuring", "row")
                self.bar.update(k - 1)
            self.bar.update()
            yield one
