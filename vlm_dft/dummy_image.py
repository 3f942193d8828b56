"""A dummy image: a batch without media in; the same batch with one tiny picture that none of its tokens sees out.

Engines that split or reduce the vision tower's parameters wait for every process to use them: a batch of text alone would
make the others wait for ever. With the picture the tower takes part, and its gradient is zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vlm_dft.batches import select
from vlm_dft.errors import ModelError
from vlm_dft.objectives import IGNORE
from vlm_dft.processing import Processing, Rendered

FILL = {"labels": IGNORE, "objective_ids": -1, "source_ids": -1, "loss_weights": 1.0}  # of its tokens; others: 0
SIDE = 28  # pixels; processors make of it what is least to them


class DummyImage:
    """The picture as a processor gives it, and where its tokens go. Raises ModelError for processors that cannot have one."""

    def __init__(self, processing: Processing) -> None:
        self.layout = processing.layout
        name = type(processing.processor).__name__
        if processing.takes_suffix:
            raise ModelError(f"{name} has a picture in every row: leave dummy_image out.")
        try:
            alone = processing([_pictured(processing, 1)])
            several = processing([_pictured(processing, 1), _pictured(processing, 2)])
        except Exception as error:  # processors refuse in their own ways
            raise ModelError(
                f"{name} cannot have a dummy image ({error}). Train batches that all have pictures, or none."
            ) from error
        if "cross_attention_mask" in alone.batch:
            raise ModelError(
                f"{name}'s model looks at pictures by cross-attention, in which every token sees something: a dummy image would "
                "change its logits. Train batches that all have pictures, or none."
            )
        media = np.flatnonzero(alone.rows[0].media)
        self.batch = select(alone, [media], self.layout).batch
        tensors = {key: value for key, value in several.batch.items() if isinstance(value, Tensor)}
        ids = several.batch["input_ids"]  # two rows with three pictures tell what runs over tokens, rows and pictures
        self._per_token = {key for key, value in tensors.items() if value.shape[:2] == ids.shape}
        self._per_row = {key for key, value in tensors.items() if len(value) == 2} - self._per_token

    def __call__(self, batch: dict[str, Any], *, own_row: bool) -> dict[str, Any]:
        """A padded batch that has media as it is, else with the picture: masked in the padding, or as a row of its own.

        own_row: for a batch that is then packed, in which a row becomes a segment.
        """
        if any(key.startswith("pixel_values") for key in batch):
            return batch
        kept = batch["attention_mask"]
        (rows, width), (_, size) = kept.shape, self.batch["input_ids"].shape
        row = rows if own_row else int(kept.sum(1).argmin())  # where the most room is
        total, wide = rows + own_row, max(width, size if own_row else int(kept[row].sum()) + size)
        left = self.layout.side == "left"
        old, new = (slice(wide - width, None), slice(size)) if left else (slice(width), slice(wide - size, None))
        found: dict[str, Any] = {}
        for key, value in batch.items():
            if isinstance(value, Tensor) and value.shape[:2] == kept.shape:
                fill = FILL.get(key, self.layout.fill(key))
                found[key] = value.new_full((total, wide, *value.shape[2:]), fill)
                found[key][:rows, old] = value
            else:
                found[key] = value
        for key, own in self.batch.items():
            if key in self._per_token:
                found.setdefault(key, own.new_zeros((total, wide, *own.shape[2:])))
                if own_row or key != "attention_mask":
                    found[key][row, new] = own[0]
            elif key in self._per_row:
                found[key] = own.new_zeros((total, *own.shape[1:]))  # of what text rows have, it is 0 there too
                found[key][row] = own[0]
            else:
                found[key] = own
        return found


def _pictured(processing: Processing, count: int) -> Rendered:
    """A prompt with so many of the pictures, each as small as may be."""
    images = [Image.new("RGB", (SIDE, SIDE), "red") for _ in range(count)]  # not black: some take zeros for no picture
    sample = processing.pictured(*images)
    if processing.fast is None:
        return sample
    side = processing.fast.patch_size * processing.fast.merge_size
    return replace(sample, settings=[{"min_pixels": side * side, "max_pixels": side * side}] * count)
