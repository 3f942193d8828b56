"""Mixture rows: a mixture card and the lengths of its sources' rows in; which of them, in which order, and why others are not there, out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from vlm_dft.mixing import Entry, Lengths, Places, mix
from vlm_dft.mixture_cards import Card


@dataclass(frozen=True, slots=True)
class Drawn:
    """A mixture's rows in order, by the places of its sources."""

    source: Places
    row: Places
    left: list[dict[str, Places]]  # of each source, in order: why rows of it are not there at all


def mixed_places(card: Card, lengths: Lengths, seed: int, *, tokens: Lengths | None = None) -> Drawn:
    """Draw a mixture and the mixtures in it, from within; shares of each are of the tokens that its own card counts.

    lengths: of each source's rows, in response tokens; tokens: in all of their tokens (None: the same).
    """
    gone: list[tuple[str, int, Places]] = []  # reason, source, rows: from within to without
    kinds = {"response": lengths, "all": lengths if tokens is None else tokens}
    source, row, end = _draw(card, kinds, seed, "", 0, gone)
    assert end == len(lengths), "one list of lengths for each source"
    left = []
    for k, rows_of in enumerate(map(len, lengths)):
        out = np.ones(rows_of, np.bool_)
        out[row[source == k]] = False
        reasons: dict[str, Places] = {}
        for reason, of, rows in gone:
            if of == k and (found := np.unique(rows[out[rows]])).size:
                reasons[reason] = np.sort(np.concatenate([reasons.get(reason, found[:0]), found]))
                out[found] = False
        assert not out.any(), f"rows of source {k} are lost: {np.flatnonzero(out)}"
        left.append(reasons)
    return Drawn(source, row, left)


def _draw(
    card: Card, kinds: Mapping[str, Lengths], seed: int, way: str, first: int, gone: list[tuple[str, int, Places]]
) -> tuple[Places, Places, int]:
    """(source, row) of a mixture's examples in order, and the number of the source after its own."""
    lengths = kinds[card.get("share_of", "response")]
    items: list[tuple[Places, Places]] = []  # of each entry: source and row of what it has to give
    for entry in card["mixture"]:
        if "mixture" in entry["card"]:
            inner, rows, first = _draw(entry["card"], kinds, seed, f"{way}{entry['name']}/", first, gone)
            items.append((inner, rows))
        else:
            rows = np.arange(len(lengths[first]))
            items.append((np.full(len(rows), first), rows))
            first += 1
    flat = [np.asarray(own, np.int64) for own in lengths]
    sizes = [_lengths_of(flat, source, row) for source, row in items]
    entries = asked(card)
    drawn = mix(entries, sizes, seed=seed, order=card.get("order", "shuffled"), within=way)
    for entry, item, capped, left in zip(entries, items, drawn.capped, drawn.left, strict=True):
        cap = f"{entry.cap:,} rows" if entry.cap else f"{entry.cap_tokens or 0:,} tokens"
        for reason, places in ((f"over the cap of {cap}", capped), (_why_left(entry, way), left)):
            for k in np.unique(item[0][places]):
                gone.append((reason, int(k), item[1][places][item[0][places] == k]))
    starts = np.cumsum([0, *(len(source) for source, _ in items)])
    at = starts[drawn.entry] + drawn.row
    return np.concatenate([item[0] for item in items])[at], np.concatenate([item[1] for item in items])[at], first


def _lengths_of(lengths: Sequence[Places], source: Places, row: Places) -> Places:
    found = np.zeros(len(source), np.int64)
    for k in np.unique(source):
        own = source == k
        found[own] = lengths[int(k)][row[own]]
    return found


def _why_left(entry: Entry, way: str) -> str:
    what = "weights" if entry.weight is not None else "shares" if entry.share is not None else ""
    of = f" of {way.rstrip('/')}" if way else ""
    return f"left out by the mixture's {what}{of}" if what else f"left out by repeat: {float(entry.repeat):g}{of}"


def asked(card: Card) -> list[Entry]:
    """What a mixture card asks of its entries, for mixing.mix."""
    return [
        Entry(
            entry["name"], weight=_exact(entry.get("weight")), share=_exact(entry.get("share")), repeat=_exact(entry.get("repeat", 1)) or Fraction(1),
            cap=entry.get("cap"), cap_tokens=entry.get("cap_tokens"), sort="sort" in entry, ordered="mixture" in entry["card"],
        )
        for entry in card["mixture"]
    ]  # fmt: skip


def _exact(number: float | None) -> Fraction | None:
    """A number of a card as it is written there: 0.1 is a tenth."""
    return None if number is None else Fraction(str(number))
