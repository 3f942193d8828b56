"""Batches: rows of tokens in; padded tensors out, of which tokens can be selected and which can be joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vlm_dft.alignment import Ints, Row, take

Side = Literal["right", "left"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How rows are padded: on which side, and with which id."""

    side: Side
    pad_id: int

    def fill(self, key: str) -> int:
        """What a per-token tensor holds at padding."""
        return self.pad_id if key == "input_ids" else 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """A padded batch without labels; the tokens of each row, and the columns of the batch that they stand in."""

    batch: dict[str, Any]
    rows: list[Row]
    columns: list[Ints]


def padded(rows: Sequence[Row], layout: Layout) -> tuple[dict[str, Any], list[Ints]]:
    """input_ids and attention_mask [B, L] of rows, and the columns that each row's tokens stand in."""
    width = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), width), layout.pad_id, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    columns = []
    for k, row in enumerate(rows):
        first = width - len(row.ids) if layout.side == "left" else 0
        column = np.arange(first, first + len(row.ids))
        ids[k, column], mask[k, column] = row.ids, 1
        columns.append(column)
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}, columns


def select(encoded: Encoded, kept: Sequence[Ints], layout: Layout) -> Encoded:
    """The same batch with only the given tokens of each row, padded anew. Media are left as they are."""
    shape = encoded.batch["input_ids"].shape
    rows = [take(row, positions) for row, positions in zip(encoded.rows, kept, strict=True)]
    batch, columns = padded(rows, layout)
    for key, value in encoded.batch.items():
        if isinstance(value, Tensor) and value.shape[:2] == shape:
            moved = value.new_full((len(rows), batch["input_ids"].shape[1], *value.shape[2:]), layout.fill(key))
            for k, (old, new) in enumerate(zip(encoded.columns, columns, strict=True)):
                moved[k, torch.from_numpy(new)] = value[k, torch.from_numpy(old[kept[k]])]
            batch[key] = moved
        else:
            batch[key] = value
    return Encoded(batch, rows, columns)


def join(first: Encoded, second: Encoded, mine: Sequence[bool], layout: Layout) -> Encoded:
    """Two batches as one, row k from the first where mine[k]: per-token tensors padded, per-sample ones filled with zeros."""
    places = {True: [k for k, m in enumerate(mine) if m], False: [k for k, m in enumerate(mine) if not m]}
    halves = {True: first, False: second}
    width = max(half.batch["input_ids"].shape[1] for half in halves.values())
    shift = {m: width - h.batch["input_ids"].shape[1] if layout.side == "left" else 0 for m, h in halves.items()}
    batch: dict[str, Any] = {}
    for key in {**first.batch, **second.batch}:
        own = first if key in first.batch else second
        value = own.batch[key]
        per_token = value.shape[:2] == own.batch["input_ids"].shape
        if not per_token and len(value) != len(own.rows):
            batch[key] = value  # media of all rows in one list: only rows that have any are in it
            continue
        size = (len(mine), width, *value.shape[2:]) if per_token else (len(mine), *value.shape[1:])
        batch[key] = value.new_full(size, layout.fill(key) if per_token else 0)
        if key == "aspect_ratio_mask":
            batch[key][..., 0] = (
                1  # Mllama marks the first tile of an absent image, too; without it attention gives nan
            )
        for m, half in halves.items():
            if key in half.batch and per_token:
                batch[key][places[m], shift[m] : shift[m] + half.batch[key].shape[1]] = half.batch[key]
            elif key in half.batch:
                batch[key][places[m]] = half.batch[key]
    taken = {m: iter(zip(half.rows, half.columns, strict=True)) for m, half in halves.items()}
    pairs = [(*next(taken[m]), shift[m]) for m in mine]
    return Encoded(batch, [row for row, _, _ in pairs], [column + by for _, column, by in pairs])
