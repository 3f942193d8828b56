"""Order: numbers of examples, processes and micro-batches in, the places of an epoch in which every step has its examples out.

The examples of a step are those of plain seeded shuffling, however the step is split. Which process takes which of them, and
with which others in a micro-batch, is chosen by length, and changes a sum's order alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from vlm_dft.objectives import IGNORE

SILENT = "silent"  # in a batch that a process got because it takes part in every pass: no part of the data


@dataclass(frozen=True, slots=True)
class Split:
    """How the examples of a step are split: processes x accumulated micro-batches x examples."""

    micro_batch: int
    processes: int = 1
    accumulation: int = 1

    @property
    def pass_size(self) -> int:
        """Examples of one micro-batch of every process."""
        return self.micro_batch * self.processes

    @property
    def step_size(self) -> int:
        """Examples of an optimiser step."""
        return self.pass_size * self.accumulation


def shuffled(examples: int, seed: int, epoch: int) -> list[int]:
    """The order in which accelerate's SeedableRandomSampler draws so many examples."""
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(examples, generator=generator).tolist()


def deal(
    order: Sequence[int], split: Split, lengths: Sequence[int] | None = None, *, packed: bool = False
) -> list[int]:
    """Places of an epoch, which a data loader cuts into micro-batches and deals to the processes in turn.

    order: indices of the examples, each once. Of every step's examples those of like length come into one micro-batch (the
    least padding), or with `packed` long and short ones (the same number of tokens in each). The last step's are dealt
    evenly, and len(order) fills what is left of its micro-batches: a silent place.
    """
    silent, places = len(order), list[int]()
    weights = [1] * len(order) if lengths is None else lengths
    if len(weights) != len(order):
        raise ValueError(f"Expected one length for each of {len(order)} examples, found {len(weights)}.")
    for start in range(0, len(order), split.step_size):
        rows = sorted(order[start : start + split.step_size], key=lambda k: -weights[k])  # stable: ties as drawn
        count = -(-len(rows) // split.pass_size) * split.processes
        batches = (_alike if not packed else _of_one_size)(rows, count, weights)
        for k in range(0, count, split.processes):  # by turns: the longest of a pass is not always the same process's
            turn = batches[k : k + split.processes]
            for batch in reversed(turn) if k // split.processes % 2 else turn:
                places += [*batch, *[silent] * (split.micro_batch - len(batch))]
    return places


def _alike(rows: Sequence[int], count: int, weights: Sequence[int]) -> list[list[int]]:
    """Rows, longest first, in so many batches: neighbours together, one more in those of shorter rows."""
    size, more = divmod(len(rows), count)
    sizes = [size + (k >= count - more) for k in range(count)]
    ends = [sum(sizes[: k + 1]) for k in range(count)]
    return [list(rows[end - own : end]) for own, end in zip(sizes, ends, strict=True)]


def _of_one_size(rows: Sequence[int], count: int, weights: Sequence[int]) -> list[list[int]]:
    """Rows, longest first, in so many batches of like totals: each row into the lightest that has room."""
    batches: list[list[int]] = [[] for _ in range(count)]
    totals, most = [0] * count, -(-len(rows) // count)
    for row in rows:
        k = min((k for k in range(count) if len(batches[k]) < most), key=lambda k: (totals[k], len(batches[k]), k))
        batches[k].append(row)
        totals[k] += weights[row]
    return [batches[k] for k in sorted(range(count), key=lambda k: -totals[k])]


class StepSampler(Sampler[int]):
    """An epoch's places after another's: pure functions of the seed and the epoch, so that a resumed run draws the same."""

    def __init__(
        self,
        examples: int,
        split: Split,
        *,
        seed: int,
        lengths: Sequence[int] | None = None,
        packed: bool = False,
        shuffle: bool = True,
    ) -> None:
        """shuffle: if not, the examples come in the data's own order, and silent places last."""
        self.examples, self.split, self.seed, self.epoch = examples, split, seed, 0
        self.lengths, self.packed, self.shuffle = lengths, packed, shuffle

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before it draws."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.examples // self.split.pass_size) * self.split.pass_size

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter([*range(self.examples), *[self.examples] * (len(self) - self.examples)])
        order = shuffled(self.examples, self.seed, self.epoch)
        return iter(deal(order, self.split, self.lengths, packed=self.packed))


@dataclass(frozen=True, slots=True)
class Silent:
    """What is drawn for a silent place: a row to be collated without a target, where its batch has no other."""

    row: Any


class WithSilentPlaces(Dataset[Any]):
    """A map-style data set with one more place behind its end, which is silent."""

    def __init__(self, rows: Any, lengths: Sequence[int] | None = None) -> None:
        self.rows = rows
        self.shortest = 0 if lengths is None else min(range(len(lengths)), key=lengths.__getitem__)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        return Silent(self.rows[self.shortest]) if place == len(self.rows) else self.rows[place]

    def __getitems__(self, places: list[int]) -> list[Any]:
        """A micro-batch at a time, where the data set reads faster so."""
        own = getattr(self.rows, "__getitems__", None)
        if not callable(own):
            return [self[place] for place in places]
        drawn = iter(own([place for place in places if place < len(self.rows)]))
        return [self[place] if place == len(self.rows) else next(drawn) for place in places]


class SilentCollator:
    """Any collator, given batches with silent places: they are left out, but one, marked SILENT, where a batch would be empty."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate
        self.packing = bool(getattr(collate, "packing", False))

    def __call__(self, rows: Sequence[Any]) -> Any:
        spoken = [row for row in rows if not isinstance(row, Silent)]
        if spoken:
            return self.collate(spoken)
        batch = dict(self.collate([rows[0].row]))  # every process takes part in every pass
        none = {"labels": IGNORE, "shift_labels": IGNORE, "token_kinds": 0, "source_ids": -1, "objective_ids": -1}
        masked = {key: torch.full_like(batch[key], value) for key, value in none.items() if key in batch}
        return {**batch, **masked, SILENT: True}
