"""Lazy: places among examples that lie somewhere else in; those examples, read several at a time, out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, overload

from vlm_dft.chat import Example


class Lazy(Sequence[Example]):
    """A sequence that reads its examples when they are asked for."""

    @abstractmethod
    def __getitems__(self, places: Sequence[int]) -> list[Example]:
        """The examples at some places, each from 0 to len - 1: as data loaders ask for a micro-batch."""

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return self.__getitems__(range(len(self))[place])
        if not -len(self) <= place < len(self):
            raise IndexError(f"There are {len(self):,} examples, and none at {place}.")
        return self.__getitems__([place % len(self)])[0]


def at_places(rows: Any, places: Sequence[int]) -> list[Any]:
    """rows[place] of each place, read together where the sequence can."""
    own = getattr(rows, "__getitems__", None)
    return list(own(places)) if callable(own) else [rows[place] for place in places]
