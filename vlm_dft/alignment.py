"""Alignment: a processor's ids and what it reports of its work in; the characters of the rendered text each came from out."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vlm_dft.errors import MaskError
from vlm_dft.templates import BREAK

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens of one sample, padding left out: ids [n], the characters [start, end) of the rendered text that each
    comes from (monotone; a media token has its placeholder's), and which are media."""

    ids: Ints
    start: Ints
    end: Ints
    media: Bools


def align(ids: Ints, text: Row, media: Bools, *, where: str) -> Row:
    """The row of a processor's ids [n], from the rendered text tokenised alone, whose placeholders `text.media` marks.

    media: [vocabulary], which ids stand for pixels or enclose them. Tokens that stand only in the processor's ids are what
    a placeholder grew into, and are media, whatever their ids. Raises MaskError if the two do not belong together.
    """
    row = _grown(ids, text) or _walked(ids, text, media, where)
    np.logical_or(row.media, media[ids], out=row.media)
    return row


def _grown(ids: Ints, text: Row) -> Row | None:
    """The row if each placeholder became a run of tokens, all else being as it was, and in one way only; else None."""
    bounds = [-1, *np.flatnonzero(text.media).tolist(), len(text.ids)]
    pieces = [text.ids[a + 1 : b] for a, b in pairwise(bounds)]  # of the text between placeholders
    if len(pieces) == 1:
        return Row(ids, text.start, text.end, text.media.copy()) if _same(ids, text.ids) else None
    starts, last, at = [0], len(ids) - len(pieces[-1]), len(pieces[0])
    for piece in pieces[1:-1]:
        found = [] if len(piece) == 0 else [
            c for c in (np.flatnonzero(ids[at + 1 : last] == piece[0]) + at + 1).tolist()
            if _same(ids[c : c + len(piece)], piece)
        ]  # fmt: skip
        if not found or (len(found) > 1 and len(pieces) == 3):
            return None
        starts.append(found[0])
        at = found[0] + len(piece)
    starts.append(last)
    if len(pieces) > 3 and starts != _from_behind(ids, pieces, last):
        return None
    repeats = np.ones(len(text.ids), np.int64)
    for k in range(1, len(pieces)):
        repeats[bounds[k]] = starts[k] - starts[k - 1] - len(pieces[k - 1])
    same = all(_same(ids[s : s + len(p)], p) for s, p in zip(starts, pieces, strict=True))
    if not same or repeats.min() < 1 or repeats.sum() != len(ids):
        return None
    return Row(ids, text.start.repeat(repeats), text.end.repeat(repeats), text.media.repeat(repeats))


def _same(one: Ints, other: Ints) -> bool:
    return len(one) == len(other) and bool((one == other).all())


def _from_behind(ids: Ints, pieces: list[Ints], last: int) -> list[int]:
    """Where the pieces begin if each but the first is looked for from the end; not found: at 0."""
    starts, stop = [last], last
    for piece in reversed(pieces[1:-1]):
        found = np.flatnonzero(ids[: stop - len(piece)] == piece[0]).tolist()
        at = next((c for c in reversed(found) if _same(ids[c : c + len(piece)], piece)), 0)
        starts.append(at)
        stop = at
    return [0, *reversed(starts)]


def _walked(ids: Ints, text: Row, media: Bools, where: str) -> Row:
    """The row by walking both at once; where they differ, up to where both agree again, it is what a placeholder grew into."""
    mine, alone = ids.tolist(), text.ids.tolist()
    start, end = np.zeros(len(mine), np.int64), np.zeros(len(mine), np.int64)
    grown = np.zeros(len(mine), np.bool_)
    i = j = 0
    while i < len(mine):
        if j < len(alone) and mine[i] == alone[j]:
            start[i], end[i], grown[i] = text.start[j], text.end[j], text.media[j]
            i, j = i + 1, j + 1
            continue
        di, dj = _agree_again(mine, alone, i, j, where)
        at = int(text.end[j - 1]) if j else 0
        start[i : i + di], end[i : i + di] = at, int(text.end[j + dj - 1]) if dj else at
        grown[i : i + di] = media[ids[max(0, i - 1) : i + di]].any() or bool(text.media[max(0, j - 1) : j + dj].any())
        i, j = i + di, j + dj
    if not text.media[j:].all():
        raise MaskError(f"{where}: the processor left out {len(alone) - j} tokens at the end of the rendered text.")
    return Row(ids, start, end, grown)


def _agree_again(mine: list[int], alone: list[int], i: int, j: int, where: str, run: int = 4) -> tuple[int, int]:
    """How many of `mine` from i and of `alone` from j to pass over until `run` tokens (or all that are left) agree."""
    for dj in range(min(9, len(alone) - j + 1)):
        rest = alone[j + dj : j + dj + run]
        for di in range(len(mine) - i - len(rest) + 1):
            if mine[i + di : i + di + len(rest)] == rest and (rest or di == len(mine) - i):
                return di, dj
    raise MaskError(
        f"{where}: the processor's ids cannot be aligned with the rendered text from token {i} on. Does it rewrite the text?"
    )


def without_breaks(row: Row, text: str, *, where: str) -> NDArray[np.int64]:
    """Positions of the tokens that are left when those of BREAK, which kept literal control tokens apart, are taken out."""
    broken = np.array([match.start() for match in re.finditer(BREAK, text)], np.int64)
    covered = np.searchsorted(broken, row.end, "left") - np.searchsorted(
        broken, row.start, "left"
    )  # BREAKs in each token
    merged = np.flatnonzero((covered > 0) & (row.end - row.start > 1))
    if len(merged):
        at = int(row.start[merged[0]])
        raise MaskError(
            f"{where}: a literal control token in the text cannot be kept apart from the template's: the tokenizer merges a "
            f"private-use character with its neighbours. Change {text[at : at + 16].replace(BREAK, '')!r}."
        )
    return np.flatnonzero(covered == 0)


def take(row: Row, kept: NDArray[np.int64]) -> Row:
    """The row's tokens at the given positions."""
    return replace(row, ids=row.ids[kept], start=row.start[kept], end=row.end[kept], media=row.media[kept])
