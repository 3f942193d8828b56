"""Mixed: examples of several sources and places among them in; one lazy sequence of Examples in the order of training out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_dft.chat import Example, Message, is_trained
from vlm_dft.lazy import Lazy, at_places

Ints = NDArray[np.int64]
MEDIA = ("images", "videos", "text")


@dataclass(frozen=True, slots=True)
class Dress:
    """What a mixture makes of a source's examples."""

    source: str | None = None  # what they go by; None: what they say
    objective: str | None = None  # of their responses
    loss_weight: float = 1.0  # a factor of their responses' own

    def __call__(self, example: Example) -> Example:
        if self.objective is None and self.loss_weight == 1:
            return example if self.source is None else replace(example, source=self.source)
        messages = [self._message(message) if is_trained(message) else message for message in example.messages]
        return replace(example, messages=messages, source=self.source or example.source)

    def _message(self, message: Message) -> Message:
        own = {} if self.objective is None else {"objective": self.objective}
        weight = {} if self.loss_weight == 1 else {"weight": self.loss_weight * message.get("weight", 1.0)}
        return {**message, **own, **weight}


@dataclass(slots=True)
class Part:
    """The examples of one source, which may lie on disk, and what is known of each without opening it."""

    examples: Sequence[Example]
    ids: Any  # of each, as str() gives it
    tokens: Ints  # of each, in all
    media: Ints
    response: Ints
    sources: list[str]  # what each says it is of
    pictured: NDArray[np.bool_]  # whether it has a picture
    filmed: NDArray[np.bool_]  # whether it has a video
    fingerprint: str
    dress: Dress = Dress()
    changed: Mapping[str, Sequence[int]] = field(default_factory=dict)  # what was done -> to which

    @property
    def names(self) -> list[str]:
        """What each goes by."""
        return self.sources if self.dress.source is None else [self.dress.source] * len(self.sources)


class Mixed(Lazy):
    """Example k is row[k] of part[k]. Nothing is opened before it is asked for; it can be pickled if its parts can.

    sources: what the examples go by, in the order of their first appearance; owners: of each, the index into sources.
    media: how many have images, how many videos, and how many are text alone. lengths: tokens of each.
    """

    def __init__(self, parts: Sequence[Part], part: Ints | None = None, row: Ints | None = None) -> None:
        """part and row: None for all examples, part after part."""
        counts = [len(one.tokens) for one in parts]
        self.part = np.repeat(np.arange(len(parts)), counts) if part is None else part
        self.row = np.concatenate([np.arange(n) for n in counts]) if row is None else row
        self.rows = [one.examples for one in parts]
        self.dresses = [one.dress for one in parts]
        numbers: dict[str, int] = {}
        owners = [np.array([numbers.setdefault(n, len(numbers)) for n in one.names], np.int64) for one in parts]
        found, first, self.owners = np.unique(self._of(owners), return_index=True, return_inverse=True)
        names, by_place = list(numbers), np.argsort(first)
        self.sources = [names[found[k]] for k in by_place]
        self.owners = np.argsort(by_place)[self.owners]
        pictures, videos = (self._of([getattr(one, kind) for one in parts]) for kind in ("pictured", "filmed"))
        text = ~(pictures | videos)
        self.media = {kind: int(has.sum()) for kind, has in zip(MEDIA, (pictures, videos, text), strict=True)}
        self.lengths: list[int] = self._of([one.tokens for one in parts]).tolist()
        digest = hashlib.sha256()
        for one in parts:
            digest.update(f"{one.fingerprint} {one.dress}\n".encode())
        digest.update(self.part.astype("<i8").tobytes() + self.row.astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()

    def _of(self, columns: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """A column of every part as one of the mixture's."""
        starts = np.cumsum([0, *map(len, columns)])
        found: NDArray[Any] = np.concatenate(columns)[starts[self.part] + self.row]
        return found

    def __len__(self) -> int:
        return len(self.part)

    def __getitems__(self, places: Sequence[int]) -> list[Example]:
        """A micro-batch at a time: each part is asked once for all that is its own."""
        found: list[Example | None] = [None] * len(places)
        for part in dict.fromkeys(int(self.part[place]) for place in places):
            at = [k for k, place in enumerate(places) if self.part[place] == part]
            rows = [int(self.row[places[k]]) for k in at]
            for k, example in zip(at, at_places(self.rows[part], rows), strict=True):
                found[k] = self.dresses[part](example)
        return [example for example in found if example is not None]

    def __iter__(self) -> Iterator[Example]:
        return (self[k] for k in range(len(self)))


def places_by_source(examples: Sequence[Example]) -> dict[str, list[int]]:
    """{source: places of its examples}, sources in the order of their first appearance."""
    if isinstance(examples, Mixed):
        return {name: np.flatnonzero(examples.owners == k).tolist() for k, name in enumerate(examples.sources)}
    places: dict[str, list[int]] = {}
    for k, example in enumerate(examples):
        places.setdefault(example.source, []).append(k)
    return places


def sources_of(examples: Sequence[Example]) -> list[str]:
    """The sources of examples in the order of their first appearance: as they say themselves, or looked up."""
    own: Sequence[str] | None = getattr(examples, "sources", None)
    return list(dict.fromkeys(example.source for example in examples) if own is None else own)


def media_of(examples: Sequence[Example]) -> Mapping[str, int]:
    """How many examples have images, how many videos, and how many are text alone: as they say themselves, or counted."""
    own: Mapping[str, int] | None = getattr(examples, "media", None)
    if own is not None:
        return own
    return {
        "images": sum(bool(e.images) for e in examples),
        "videos": sum(bool(e.videos) for e in examples),
        "text": sum(not (e.images or e.videos) for e in examples),
    }
