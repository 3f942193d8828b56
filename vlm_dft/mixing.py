"""Mixing: the lengths of every entry's rows and what a mixture asks of them in; which rows, how often and in which order, out.

The arithmetic of mixture cards, without cards: entries have rows, and rows have a number of tokens.

- Unless more is said, every row of every entry is used once. `repeat: 2.5` uses every row twice and a seeded half once more
  (of an odd number the smaller half); `repeat: 0.5` a seeded half.
- `cap: N` keeps a seeded choice of N rows, `cap_tokens: N` as many rows of the same seeded order as have N tokens together. Both come
  before everything else: what they leave out is not there for `repeat`, weights and shares. The choice depends on the seed and
  on the entry's name alone, and a smaller cap's rows are among a larger one's.
- `weight` is a proportion of rows, `share` a proportion of tokens; every entry of a mixture has the one, or the other, or neither. The mixture is
  the largest in which no entry is used more than `repeat` times (once unless it says): at least one entry is used up, and of
  the others so many rows that one more would be over their proportion. Rows left out are a seeded choice.
- No row is there more often than another of its entry by more than once, and none more often than `repeat`, rounded up.
- `order: shuffled` draws one seeded order of all; `curriculum` takes entry after entry as listed, each in a seeded order, or with `sort:
  tokens` the shortest first. An entry that is itself a mixture keeps its own order there.

All is a function of the seed, of names and of lengths: of no clock, no process and no worker. Proportions are exact fractions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from vlm_dft.errors import CardError

Places = NDArray[np.int64]
Lengths = Sequence[Sequence[int]] | Sequence[Places]


@dataclass(frozen=True, slots=True)
class Entry:
    """What a mixture asks of one of its entries."""

    name: str
    weight: Fraction | None = None  # of rows
    share: Fraction | None = None  # of tokens
    repeat: Fraction = Fraction(1)
    cap: int | None = None  # rows
    cap_tokens: int | None = None
    sort: bool = False  # in a curriculum: the shortest first
    ordered: bool = False  # its rows have an order of their own, which a curriculum keeps


@dataclass(frozen=True, slots=True)
class Mix:
    """Which rows are trained on: entry[k] and row[k] of the k-th."""

    entry: Places
    row: Places
    capped: list[Places]  # of each entry: rows that its cap leaves out
    left: list[Places]  # of each entry: rows that repeat, weights or shares leave out


def mix(
    entries: Sequence[Entry],
    lengths: Lengths,
    *,
    seed: int,
    order: str = "shuffled",
    within: str = "",
) -> Mix:
    """Draw a mixture. lengths: of each entry's rows, in tokens. within: the mixture's own name in another.

    Raises CardError for an entry without rows, or with so small a proportion that none of its rows is used.
    """
    drawn, capped = [], []
    sizes = [np.asarray(own, np.int64) for own in lengths]
    for entry, size in zip(entries, sizes, strict=True):
        order_of_rows = seeded_order(len(size), f"{seed}/{within}/{entry.name}")
        kept = _within_cap(entry, size, order_of_rows)
        drawn.append(order_of_rows[:kept])
        capped.append(np.sort(order_of_rows[kept:]))
    picks, left = [], []
    for rows, count in zip(drawn, _counts(entries, drawn, sizes), strict=True):
        passes, more = divmod(count, len(rows))
        whole, once_more = np.sort(rows), np.sort(rows[:more])
        picks.append(np.concatenate([*[whole] * passes, once_more]))
        left.append(np.sort(rows[more:]) if not passes else whole[:0])
    if order == "curriculum":
        picks = [
            rows[_inside(entry, size[rows], f"{seed}/{within}/{entry.name}/order")]
            for entry, rows, size in zip(entries, picks, sizes, strict=True)
        ]
    entry_of = np.repeat(np.arange(len(picks)), [len(rows) for rows in picks])
    row_of = np.concatenate(picks)
    if order == "shuffled":
        at = seeded_order(len(row_of), f"{seed}/{within}/order")
        entry_of, row_of = entry_of[at], row_of[at]
    return Mix(entry_of, row_of, capped, left)


def seeded_order(count: int, seed: str) -> Places:
    """A permutation of range(count). Of Python's generator, random() alone is the same in every version."""
    draw = random.Random(seed).random
    return np.argsort(np.fromiter((draw() for _ in range(count)), np.float64, count), kind="stable")


def _within_cap(entry: Entry, size: Places, order: Places) -> int:
    """How many rows of its seeded order an entry has. Raises CardError for none."""
    if not len(order):
        raise CardError(f"{entry.name!r} has no rows to mix. Take it out of the mixture, or mend its source.")
    kept = len(order) if entry.cap is None else min(entry.cap, len(order))
    if entry.cap_tokens is not None:
        kept = min(kept, int(np.searchsorted(np.cumsum(size[order]), entry.cap_tokens, "right")))
    if not kept:
        raise CardError(
            f"{entry.name!r}: cap_tokens = {entry.cap_tokens:,}, but the first row of its seeded order has {int(size[order[0]]):,}. Raise it."
        )
    return kept


def _counts(entries: Sequence[Entry], drawn: Sequence[Places], sizes: Sequence[Places]) -> list[int]:
    """How many rows of each entry are used, repeated ones counted each time. Raises CardError where one gets none."""
    most = [int(len(rows) * entry.repeat) for entry, rows in zip(entries, drawn, strict=True)]
    for entry, rows, count in zip(entries, drawn, most, strict=True):
        if not count:
            raise CardError(f"{entry.name!r}: repeat = {float(entry.repeat):g} of its {len(rows):,} rows is none.")
    if all(entry.weight is None and entry.share is None for entry in entries):
        return most
    if all(entry.weight is not None for entry in entries):
        weights = [Fraction(entry.weight or 0) for entry in entries]
        scale = min(count / weight for count, weight in zip(most, weights, strict=True))
        counts, what, of = [int(scale * weight) for weight in weights], "weight", "rows"
    elif all(entry.share is not None for entry in entries):
        shares = [Fraction(entry.share or 0) for entry in entries]
        sums = [np.cumsum(size[rows]) for size, rows in zip(sizes, drawn, strict=True)]
        for entry, total in zip(entries, sums, strict=True):
            if not total[-1]:
                raise CardError(f"{entry.name!r} has no tokens of the kind that the mixture's shares are of.")
        scale = min(_upto(total, count) / share for total, count, share in zip(sums, most, shares, strict=True))
        counts = [
            min(count, _most_within(total, int(scale * share)))
            for total, count, share in zip(sums, most, shares, strict=True)
        ]
        what, of = "share", "tokens"
    else:
        raise CardError(f"Of {', '.join(entry.name for entry in entries)} some have a weight or share and some not.")
    for entry, found in zip(entries, counts, strict=True):
        if not found:
            raise CardError(
                f"{entry.name!r} gets none of the mixture's {of}: its {what} is too small for what the others have. Raise it, or repeat "
                "the entry that is used up."
            )
    return counts


def _upto(sums: Places, count: int) -> Fraction:
    """Tokens of the first `count` rows, one pass after another. sums: of the rows of a pass, cumulated."""
    passes, more = divmod(count, len(sums))
    return Fraction(passes * int(sums[-1]) + (int(sums[more - 1]) if more else 0))


def _most_within(sums: Places, tokens: int) -> int:
    """The most rows, one pass after another, that have so many tokens together at most."""
    passes, rest = divmod(tokens, int(sums[-1]))
    return passes * len(sums) + int(np.searchsorted(sums, rest, "right"))


def _inside(entry: Entry, size: Places, seed: str) -> Places:
    """The order of an entry's own rows in a curriculum."""
    if entry.sort:
        return np.argsort(size, kind="stable")
    return np.arange(len(size)) if entry.ordered else seeded_order(len(size), seed)
