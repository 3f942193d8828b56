"""Vision cache: pictures that were seen before in, the frozen tower's features of them out, computed once.

Keyed by content: pixel values, grid, and the arithmetic. A picture that is not known goes through the tower by itself, so that its
features do not depend on its neighbours in a batch, on what was cached before, or on where a run was resumed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vlm_dft.families import find_family, part_of

KEYS = "image_keys"  # [pictures, 2] int64 in a batch: 128 bits of a digest of each picture
PIXELS = ("pixel_values", "image_grid_thw")


class KeyedCollator:
    """A collator whose batches also tell what their pictures are; in its workers, where the pixels are on the CPU anyway."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collator(rows)
        if all(key in batch for key in PIXELS):
            batch[KEYS] = picture_keys(batch["pixel_values"], batch["image_grid_thw"])
        return batch

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)


def picture_keys(pixels: Tensor, grids: Tensor) -> Tensor:
    """[pictures, 2] int64: a digest of each picture's patches and their grid."""
    keys = []
    for patches, grid in zip(pixels.split(grids.prod(-1).tolist()), grids.tolist(), strict=True):
        digest = hashlib.blake2b(repr((grid, str(pixels.dtype))).encode(), digest_size=16)
        digest.update(patches.contiguous().view(torch.uint8).numpy())
        keys.append([int.from_bytes(digest.digest()[k : k + 8], "little", signed=True) for k in (0, 8)])
    return torch.tensor(keys, dtype=torch.int64).view(-1, 2)


def why_not_cached(model: Any, *, sharded: bool) -> str:
    """Why a model's vision features cannot be kept; "" where they can."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = find_family(whole)
    if sharded:
        return "an engine shards the tower, whose processes must run it together"
    if not hasattr(whole, "get_image_features"):
        return f"{type(whole).__name__} has no get_image_features"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and part_of(name, family) in ("vision", "merger"):
            return f"{name} is trained"
    for name, module in whole.named_modules():
        rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0)
        if re.search(f"{family.vision}|{family.merger}", f"{name}.") and isinstance(rate, float) and rate > 0:
            return f"{name} drops out"
    return ""


class VisionCache:
    """The features of pictures, by content; what does not fit is computed again, and what is in stays.

    (Over epochs in random order, throwing out what was not used for longest throws out what comes next.)
    """

    def __init__(self, limit: float) -> None:
        """limit: bytes, on the CPU's side whatever the device."""
        self.limit, self.bytes = limit, 0
        self.known: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.hits = self.misses = 0

    @torch.no_grad()
    def features(self, model: Any, keys: Tensor, pixels: Tensor, grids: Tensor) -> SimpleNamespace:
        """The `pooler_output` (and `deepstack_features`) of get_image_features for the pictures of a batch."""
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        kind = pixels.device.type
        arithmetic = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        parts = pixels.split(grids.prod(-1).tolist())
        found = [
            self._of_picture(whole, (*key, arithmetic), patches, grids[k : k + 1])
            for k, (key, patches) in enumerate(zip(keys.tolist(), parts, strict=True))
        ]
        return _joined(found, pixels.device)

    def _of_picture(self, model: Any, key: tuple[Any, ...], patches: Tensor, grid: Tensor) -> dict[str, Any]:
        if key in self.known:
            self.hits += 1
            return self.known[key]
        self.misses += 1
        outputs = model.get_image_features(patches, grid, return_dict=True)
        fields = {
            name: outputs[name] for name in ("pooler_output", "deepstack_features") if outputs.get(name) is not None
        }
        size = sum(tensor.numel() * tensor.itemsize for tensor in _tensors(fields.values()))
        if self.bytes + size <= self.limit:
            self.bytes += size
            self.known[key] = _moved(fields, torch.device("cpu"))
        return fields

    def summary(self) -> str:
        """One line on what it did."""
        seen = self.hits + self.misses
        share = f"{self.hits / seen:.0%} of {seen:,}" if seen else "none"
        full = "" if self.bytes < 0.99 * self.limit else ", full"
        return f"vision cache: {share} pictures were known; {len(self.known):,} kept in {self.bytes / 2**20:,.0f} MiB{full}"


def _tensors(found: Iterable[Any]) -> Iterable[Tensor]:
    for part in found:
        if isinstance(part, Tensor):
            yield part
        else:
            yield from _tensors(part)


def _moved(found: Any, device: torch.device) -> Any:
    if isinstance(found, Tensor):
        return found.to(device)
    if isinstance(found, dict):
        return {key: _moved(part, device) for key, part in found.items()}
    return [_moved(part, device) for part in found]


def _joined(pictures: Sequence[dict[str, Any]], device: torch.device) -> SimpleNamespace:
    """Outputs of single pictures as one of all of them: lists with an entry per picture are put in a row.

    Not a ModelOutput: DDP would take one apart to move its tensors.
    """
    fields = [_moved(found, device) for found in pictures]
    layers = zip(*(found.get("deepstack_features", ()) for found in fields), strict=True)
    return SimpleNamespace(
        pooler_output=[part for found in fields for part in found["pooler_output"]],
        deepstack_features=[[part for picture in layer for part in picture] for layer in layers],
    )
