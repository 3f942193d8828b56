"""Duplicates: prints of pictures and keys of questions in; what recurs exactly, and pictures that look alike, out.

Two pictures are the same if their decoded pixels are. They look alike if three things agree: their perceptual hashes of 64
bits differ in at most 4 (found by banding, exactly), those of 256 bits in at most 10, and their aspect ratios by at most 3 %.
The first alone will not do for flat pictures: on the 1,110 tables of TabMWP 437 of the 458 pairs that it finds show
different tables; of the 25 that all three find (3 of them identical), 7 do. Of the same tables as JPEG of quality 90 all three find 99.8 %, of
quality 50 97 %, at half the size 99.8 %, at half the size and quality 50 86 %. So "look alike" is never certain.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

Ints = NDArray[np.int64]
CLOSE, CLOSE_FINE, CLOSE_ASPECT = 4, 10, 0.03  # bits of 64, bits of 256, share
BITS, AT_ONCE = 64, 1 << 22  # pairs compared at once: memory is bounded
MARKERS = re.compile(r"<\s*(image|video|img|ImageHere)\s*_?\d*\s*/?>|<\|[\w ]{1,40}\|>", re.IGNORECASE)
LABELS = re.compile(r"\s*(question|q|problem)\s*[:：]\s*", re.IGNORECASE)
HINTS = re.compile(r"\s*(hint|context)\s*[:：]", re.IGNORECASE)
OPTIONS = re.compile(r"\s*((options|choices)\s*[:：]|\(?A[).:：]\s*\S)", re.IGNORECASE)
LINES, WORDS = 16, 4  # lines of a text that are looked at, words of one that says something
KEPT = set("%*/-")  # what would change a calculation


class Print(NamedTuple):
    """What is kept of a picture to know it again."""

    exact: bytes  # 16: of sha256 of its pixels in RGB, and of its size
    look: int  # perceptual hash, 64 bits
    fine: bytes  # 32: perceptual hash, 256 bits
    height: int
    width: int


def print_of(picture: Image) -> Print:
    """The print of a picture in mode RGB, as media.open_image gives it."""
    import imagehash

    size = f"{picture.width}x{picture.height}:".encode()
    exact = hashlib.sha256(size + picture.tobytes()).digest()[:16]
    grey = picture.convert("L")
    look, fine = (np.packbits(imagehash.phash(grey, hash_size=side).hash).tobytes() for side in (8, 16))
    return Print(exact, int.from_bytes(look, "big"), fine, picture.height, picture.width)


@dataclass(slots=True)
class Prints:
    """The prints of many pictures, in columns, and the number of the row that each is of."""

    rows: array[int] = field(default_factory=lambda: array("q"))
    exact: list[bytes] = field(default_factory=list)
    look: array[int] = field(default_factory=lambda: array("Q"))
    fine: bytearray = field(default_factory=bytearray)
    aspect: array[float] = field(default_factory=lambda: array("d"))  # width over height

    def add(self, row: int, prints: Iterable[Print]) -> None:
        """Pictures of a row."""
        for found in prints:
            self.rows.append(row)
            self.exact.append(found.exact)
            self.look.append(found.look)
            self.fine += found.fine
            self.aspect.append(found.width / found.height)

    def __len__(self) -> int:
        return len(self.rows)


def same_keys(keys: Sequence[Hashable]) -> list[list[int]]:
    """The places of equal keys, in order: one list for each key that is there more than once."""
    found: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        found.setdefault(key, []).append(place)
    return [places for places in found.values() if len(places) > 1]


def look_alikes(left: Prints, right: Prints | None = None) -> Iterator[tuple[Ints, Ints]]:
    """(places in left, places in right) of pictures that look alike and are not the same; without right, pairs of left once.

    A picture that is there often is compared once, and stands at its first place.
    """
    other = left if right is None else right
    mine = _columns(left)
    theirs = mine if right is None else _columns(right)
    for i, j in near_pairs(mine.look, None if right is None else theirs.look):
        close = np.bitwise_count(mine.fine[i] ^ theirs.fine[j]).sum(axis=1) <= CLOSE_FINE
        close &= np.abs(mine.aspect[i] - theirs.aspect[j]) <= CLOSE_ASPECT * np.maximum(
            mine.aspect[i], theirs.aspect[j]
        )
        found = mine.places[i[close]], theirs.places[j[close]]
        if right is not None:
            apart = [left.exact[a] != other.exact[b] for a, b in zip(*found, strict=True)]
            found = found[0][apart], found[1][apart]
        if len(found[0]):
            yield found


class _Columns(NamedTuple):
    """The pictures that differ, as arrays."""

    places: Ints
    look: NDArray[np.uint64]
    fine: NDArray[np.uint8]  # [pictures, 32]
    aspect: NDArray[np.float64]


def _columns(prints: Prints) -> _Columns:
    places = np.fromiter({exact: place for place, exact in reversed(list(enumerate(prints.exact)))}.values(), np.int64)
    places.sort()
    fine = np.frombuffer(bytes(prints.fine), np.uint8).reshape(-1, 32)
    return _Columns(
        places, np.asarray(prints.look, np.uint64)[places], fine[places], np.asarray(prints.aspect, np.float64)[places]
    )


def near_pairs(
    left: NDArray[np.uint64], right: NDArray[np.uint64] | None = None, distance: int = CLOSE
) -> Iterator[tuple[Ints, Ints]]:
    """Every pair of hashes that differ in at most `distance` bits, each once; without right, pairs i < j of left.

    Of distance + 1 bands at least one must be equal in such a pair, so only pairs that share a band are compared. A pair is
    given by the first band that it shares. A block of pairs at a time.
    """
    other = left if right is None else right
    bands = _bands(distance + 1)
    for number, (shift, mask) in enumerate(bands):
        keys = (other >> shift) & mask
        order = np.argsort(keys, kind="stable")
        mine = (left >> shift) & mask
        first, last = (np.searchsorted(keys[order], mine, side) for side in ("left", "right"))
        for i, j in _expand(first, last, order):
            differ = left[i] ^ other[j]
            near = np.bitwise_count(differ) <= distance
            if right is None:
                near &= i < j
            for earlier_shift, earlier_mask in bands[:number]:
                near &= ((differ >> earlier_shift) & earlier_mask) != 0
            if near.any():
                yield i[near], j[near]


def _bands(count: int) -> list[tuple[np.uint64, np.uint64]]:
    """(shift, mask) of so many bands that cover 64 bits."""
    edges = [BITS * k // count for k in range(count + 1)]
    return [(np.uint64(low), np.uint64((1 << (high - low)) - 1)) for low, high in pairwise(edges)]


def _expand(first: Ints, last: Ints, order: Ints) -> Iterator[tuple[Ints, Ints]]:
    """The pairs (i, order[first[i]:last[i]]) in blocks."""
    counts = last - first
    upto = np.concatenate([[0], np.cumsum(counts)])
    start = 0
    while start < len(counts):
        stop = max(start + 1, int(np.searchsorted(upto, upto[start] + AT_ONCE, "right")) - 1)
        i = np.repeat(np.arange(start, stop), counts[start:stop])
        within = np.arange(len(i)) - (upto[i] - upto[start])
        if len(i):
            yield i, order[first[i] + within]
        start = stop


def normalised(text: str) -> str:
    """A question in small letters, without media markers, and with one blank for whatever is no word, number or operator."""
    text = unicodedata.normalize("NFKC", MARKERS.sub(" ", text)).casefold()
    kept = []
    for k, letter in enumerate(text):
        kind = unicodedata.category(letter)
        if kind == "Pd":
            letter = "-"
        inside = letter in ".," and 0 < k < len(text) - 1 and text[k - 1].isdigit() and text[k + 1].isdigit()
        if kind[0] in "LNMS" or inside or letter in KEPT:
            kept.append(letter)
        elif letter not in "'’":
            kept.append(" ")
    return " ".join("".join(kept).split())


def question_key(text: str) -> int | None:
    """64 bits that stand for a question's normalised text; None where it has none."""
    words = normalised(text)
    return int.from_bytes(hashlib.blake2b(words.encode("utf-8", "replace"), digest_size=8).digest()) if words else None


def question_core(text: str) -> str:
    """A question without a hint before it, the word "Question:" and the options after it."""
    lines = [line for line in text.split("\n") if not HINTS.match(line)]
    stop = next((k for k, line in enumerate(lines) if k and OPTIONS.match(line)), len(lines))
    return LABELS.sub("", "\n".join(lines[:stop]), count=1) if stop else text


def question_keys(texts: Iterable[str]) -> tuple[int, ...]:
    """The keys by which a question is known again: of each text, and of each without hint and options."""
    found = [question_key(form) for text in texts for form in (text, question_core(text))]
    return tuple(dict.fromkeys(key for key in found if key is not None))


def line_keys(texts: Iterable[str]) -> tuple[int, ...]:
    """The keys of single lines with some words: a question is known again between instructions on lines of their own."""
    lines = [line for text in texts for line in text.split("\n", LINES)[:LINES] if line.strip() != text.strip()]
    found = [question_key(LABELS.sub("", line, count=1)) for line in lines if len(line.split(None, WORDS)) >= WORDS]
    return tuple(dict.fromkeys(key for key in found if key is not None))


def as_pairs(blocks: Iterable[tuple[Any, Any]]) -> Iterator[tuple[int, int]]:
    """Blocks of pairs one by one."""
    for i, j in blocks:
        yield from zip(i.tolist(), j.tolist(), strict=True)
