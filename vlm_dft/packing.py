"""Pack: a padded batch in, one row of isolated segments with each sample's own positions out; lengths in, packs out."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlm_dft.errors import MaskError, ModelError
from vlm_dft.objectives import IGNORE

T = TypeVar("T")

PACKED_KEYS = ("position_ids", "use_cache", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""What pack_batch adds. The last four are transformers' FlashAttentionKwargs: no model names them in its signature, every
model of the Qwen-VL families hands them to its language model's attention, and (5.23 and later) not to its vision tower."""

TEXT, IMAGE, VIDEO = 0, 1, 2  # values of mm_token_type_ids

PER_MEDIUM = {
    "pixel_values": (2, 4),  # [patches, values], [images, C, H, W]
    "pixel_values_videos": (2,),
    "image_grid_thw": (2,),
    "video_grid_thw": (2,),
    "second_per_grid_ts": (1,),
    "image_sizes": (2,),
}
"""Numbers of dimensions in which a key runs over images or patches and never over rows, so that samples need no padding:
pixel_values of Idefics3 [B, n, C, H, W] and Mllama [B, n, tiles, C, H, W] are none of these."""


@dataclass(frozen=True, slots=True)
class MRope:
    """How a family counts its multimodal rotary positions (temporal, height, width)."""

    merge_size: int = 2  # patches along each side of one token
    timed: bool = False  # a video's temporal position counts seconds x tokens_per_second, not grid frames
    split_frames: bool = False  # each grid frame of a video is a run of tokens of its own, timestamps between them


MROPE = {
    "Qwen2VLProcessor": MRope(),
    "Qwen2_5_VLProcessor": MRope(timed=True),
    "Qwen3VLProcessor": MRope(split_frames=True),
}


def find_mrope(processor: Any) -> MRope | None:
    """The M-RoPE rule of a processor's class; None: positions are 1-D. `check_packing` finds out if that is wrong."""
    known = next((MROPE[kind.__name__] for kind in type(processor).__mro__ if kind.__name__ in MROPE), None)
    return known and replace(known, merge_size=int(processor.image_processor.merge_size))


def mrope_positions(
    types: Tensor,
    lengths: Sequence[int],
    mrope: MRope,
    *,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: Any = None,
    tokens_per_second: float | None = None,
) -> Tensor:
    """M-RoPE positions [3, N] of a row of samples, each counted from 0: what the models' `get_rope_index` gives alone.

    types: [N], the samples' `mm_token_type_ids` one after the other; lengths: tokens of each sample, summing to N.
    second_per_grid_ts, tokens_per_second: needed with videos where `mrope.timed`; the second is the model's
    `config.vision_config.tokens_per_second`. Raises MaskError where runs of media tokens and grids do not agree.
    """
    types, device = types.reshape(-1), types.device
    ends = torch.tensor(lengths, device=device).cumsum(0)
    firsts = ends - torch.tensor(lengths, device=device)  # [S] first token of each sample
    begins = torch.ones(len(types), dtype=torch.bool, device=device)
    begins[1:] = types[1:] != types[:-1]
    begins[firsts] = True
    starts = begins.nonzero().squeeze(1)  # [R] first token of each run of one type
    run_types = types[starts]
    run_lengths = starts.diff(append=ends[-1:])
    advance = run_lengths.clone()  # by how much a run moves the next one's position
    grids = torch.ones(len(starts), 3, dtype=torch.long, device=device)  # [R, (t, h, w)] in tokens
    for kind, name, grid in ((IMAGE, "image", image_grid_thw), (VIDEO, "video", video_grid_thw)):
        runs = (run_types == kind).nonzero().squeeze(1)
        merged = _merged(grid, mrope, split=kind == VIDEO and mrope.split_frames).to(device)
        if not torch.equal(run_lengths[runs], merged.prod(-1)):
            raise MaskError(
                f"The grids imply {name} tokens in runs of {_few(merged.prod(-1))}, mm_token_type_ids holds runs of "
                f"{_few(run_lengths[runs])}. Was a sample cut, or are two {name}s not separated by a token?"
            )
        grids[runs] = merged
        advance[runs] = merged[:, 1:].amax(-1) if len(merged) else advance[runs]
    if bool((run_types > VIDEO).any()):
        raise ModelError("mm_token_type_ids above 2 (audio): no M-RoPE rule is described for it in vlm_dft/packing.py.")
    before = advance.cumsum(0) - advance
    sample_of_run = torch.searchsorted(firsts, starts, right=True) - 1
    base = before - before[torch.searchsorted(starts, firsts)][sample_of_run]  # [R] position of each run's start
    run = begins.cumsum(0) - 1  # [N]
    local = torch.arange(len(types), device=device) - starts[run]
    _, height, width = grids[run].unbind(-1)
    frame, place = local // (height * width), local % (height * width)
    if mrope.timed and video_grid_thw is not None and len(video_grid_thw):
        frame = (frame * _intervals(run_types, second_per_grid_ts, tokens_per_second)[run]).long()
    grid_positions = torch.stack([frame, place // width, place % width])
    return base[run] + torch.where(types == TEXT, local, grid_positions)


def pack_batch(
    batch: Mapping[str, Any], *, mrope: MRope | None, tokens_per_second: float | None = None
) -> dict[str, Any]:
    """A padded batch (ChatCollator's, either padding side) as one row [1, N], N the sum of lengths, padding removed.

    mrope: `find_mrope(processor)`. Per-token keys [B, L] are laid end to end, keys per image or video stay as they are,
    attention_mask goes, and PACKED_KEYS come: `position_ids` ([4, 1, N] with M-RoPE: a text row that restarts, then
    three M-RoPE rows of each sample alone; else [1, N]), `use_cache` False and the segments' bounds. The three together
    are what isolates the samples (see `segment_attention.check_packing`). The batch is not mutated.
    Raises MaskError where a sample's first token is a target (the sample before would predict it), ModelError for a key
    that cannot be laid end to end.
    """
    if "attention_mask" not in batch or batch["attention_mask"].dim() != 2:
        raise ValueError(f"Expected a padded batch with attention_mask [B, L], found keys {sorted(batch)}.")
    grids = [key for key in ("image_grid_thw", "video_grid_thw") if key in batch]
    if mrope is None and grids:
        raise ModelError(
            f"The batch has {grids[0]}, so its model has positions in three dimensions, and no rule of theirs is known for this "
            "processor. Train without packing, or add it to MROPE in packing.py."
        )
    kept = batch["attention_mask"].bool()  # [B, L]
    lengths = kept.sum(1)  # [B]
    sizes = lengths.tolist()
    if 0 in sizes:
        raise MaskError(f"Row {sizes.index(0)} of the batch has no token that is attended to.")
    packed: dict[str, Any] = {}
    for key, value in batch.items():
        if key == "attention_mask":
            continue
        if key in PER_MEDIUM and torch.as_tensor(value).dim() in PER_MEDIUM[key]:
            packed[key] = value
        elif key in ("position_ids", "token_type_ids") or not _per_token(value, kept):
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(
                f"Packing cannot lay {key} ({shape}) of several samples end to end: it belongs to rows of a batch "
                f"{list(kept.shape)}, not to tokens or images. Train this family without packing."
            )
        else:
            packed[key] = value[kept].unsqueeze(0)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    firsts = bounds[:-1]
    if "labels" in packed and bool((packed["labels"][0, firsts] != IGNORE).any()):
        row = int((packed["labels"][0, firsts] != IGNORE).nonzero()[0])
        raise MaskError(
            f"Sample {row} of the pack: its first token is a target, which the sample before it would predict. "
            "Expected a prompt, or at least one token of the template, before the first response."
        )
    total = int(bounds[-1])
    text = torch.arange(total, device=kept.device) - firsts.repeat_interleave(lengths)  # restarts at 0
    positions = text.unsqueeze(0)  # [1, N]
    if mrope is not None:
        if "mm_token_type_ids" not in packed:
            raise MaskError(f"No mm_token_type_ids in the batch ({', '.join(batch)}): without them M-RoPE is lost.")
        media = {k: packed[k] for k in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if k in packed}
        three = mrope_positions(
            packed["mm_token_type_ids"][0], sizes, mrope, tokens_per_second=tokens_per_second, **media
        )
        positions = torch.cat([text.unsqueeze(0), three]).unsqueeze(1)  # [4, 1, N]
    bounds = bounds.int()
    return {
        **packed,
        "position_ids": positions,
        "use_cache": False,  # left out, the models' default of True makes a cache, and a cache undoes the isolation
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(sizes),
        "max_length_k": max(sizes),
    }


def plan_packs(
    lengths: Sequence[int], capacity: int, *, window: int = 1024, seed: int | None = None
) -> list[list[int]]:
    """Which examples share a row: best-fit decreasing within consecutive windows. A pure function of its arguments.

    lengths: tokens of each example; capacity: tokens of a row. seed: shuffle the examples before the windows are cut;
    None keeps the data's order. Every index comes once; within a pack, and over the first members of a window's packs,
    the (shuffled) order is kept. Longest first, ties by order; a pack with least room wins, ties by age.
    Raises ValueError naming the first example that is longer than a row.
    """
    if capacity < 1 or window < 1:
        raise ValueError(f"capacity and window must be at least 1, found {capacity} and {window}.")
    order = list(range(len(lengths)))
    for k in order:
        if not 1 <= lengths[k] <= capacity:
            raise ValueError(
                f"Example {k} has {lengths[k]} tokens; a pack takes 1 to {capacity}. Raise the capacity, or drop the row."
            )
    if seed is not None:
        Random(seed).shuffle(order)
    plan: list[list[int]] = []
    for start in range(0, len(order), window):
        places = range(start, min(start + window, len(order)))
        packs: list[list[int]] = []  # of places in the order
        rooms: list[tuple[int, int]] = []  # (room left, pack), ascending
        for place in sorted(places, key=lambda p: (-lengths[order[p]], p)):
            length = lengths[order[place]]
            found = bisect_left(rooms, (length, -1))
            room, pack = rooms.pop(found) if found < len(rooms) else (capacity, len(packs))
            if pack == len(packs):
                packs.append([])
            packs[pack].append(place)
            if room > length:
                insort(rooms, (room - length, pack))
        plan += [[order[place] for place in pack] for pack in sorted(map(sorted, packs))]
    return plan


def packing_report(lengths: Sequence[int], packs: Sequence[Sequence[int]], capacity: int) -> dict[str, int | float]:
    """What a plan makes of its rows: counts, the share of the rows' room that is filled, and the emptiest pack's share."""
    sums = [sum(lengths[k] for k in pack) for pack in packs]
    rows = sum(map(len, packs))
    room = capacity * len(packs)
    return {
        "rows": rows,
        "packs": len(packs),
        "tokens": sum(sums),
        "capacity": capacity,
        "fill": sum(sums) / room if room else 0.0,
        "lowest_fill": min(sums) / capacity if sums else 0.0,
        "rows_per_pack": rows / len(packs) if packs else 0.0,
    }


class PackedDataset(Dataset[list[T]], Generic[T]):
    """Packs as items: item k is the list of examples that share row k, for `ChatCollator(processor, packing=True)`.

    The plan is `plan_packs(lengths, capacity, window=window, seed=seed)` and never changes, so that the number of steps
    is known; for new company every epoch, make a new one with another seed.
    """

    def __init__(
        self,
        examples: Sequence[T],
        lengths: Sequence[int],
        capacity: int,
        *,
        window: int = 1024,
        seed: int | None = None,
    ) -> None:
        if len(examples) != len(lengths):
            raise ValueError(f"Expected one length for each of {len(examples)} examples, found {len(lengths)}.")
        self.examples = examples
        self.packs = plan_packs(lengths, capacity, window=window, seed=seed)
        self.report = packing_report(lengths, self.packs, capacity)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, k: int) -> list[T]:
        return [self.examples[i] for i in self.packs[k]]


def flatten_packs(rows: Iterable[Any]) -> list[Any]:
    """A list of examples, of lists of examples, or of both, as one list of examples."""
    return [row for item in rows for row in (item if isinstance(item, (list, tuple)) else [item])]


def _per_token(value: Any, kept: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == kept.shape


def _merged(grid: Tensor | None, mrope: MRope, *, split: bool) -> Tensor:
    """Grids of patches [n, 3] as grids of tokens, one a run."""
    if grid is None:
        return torch.zeros(0, 3, dtype=torch.long)
    merged = torch.stack([grid[:, 0], grid[:, 1] // mrope.merge_size, grid[:, 2] // mrope.merge_size], -1)
    if split:
        merged = merged.repeat_interleave(merged[:, 0], 0)
        merged[:, 0] = 1
    return merged


def _intervals(run_types: Tensor, seconds: Any, tokens_per_second: float | None) -> Tensor:
    """By how much a grid frame of each run moves the temporal position: [R], 1 for runs that are no videos."""
    videos = (run_types == VIDEO).nonzero().squeeze(1).tolist()
    if tokens_per_second is None or seconds is None:
        raise MaskError(
            "This family times the frames of videos: second_per_grid_ts must be in the batch and tokens_per_second "
            "given (the model's config.vision_config.tokens_per_second)."
        )
    intervals = torch.ones(len(run_types), device=run_types.device)
    for run, second in zip(videos, seconds, strict=True):
        intervals[run] = tokens_per_second * second  # float32 from here on, as in the models
    return intervals


def _few(values: Tensor) -> str:
    return f"{values[:6].tolist()}{' ...' if len(values) > 6 else ''}"
