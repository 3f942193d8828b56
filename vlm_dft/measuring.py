"""Measuring: an example in; its tokens out, counted from text and image headers where the processor can, else by processing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from vlm_dft.alignment import Ints, Row
from vlm_dft.chat import Example, media_settings
from vlm_dft.errors import naming
from vlm_dft.marking import Marked
from vlm_dft.masking import StraddleError, cut_at, token_targets

if TYPE_CHECKING:
    from vlm_dft.collators import ChatCollator

Sizes = Sequence[tuple[int, int]]  # (height, width) of an example's images, in pixels


@dataclass(frozen=True, slots=True)
class Measured:
    """What an example costs, in tokens."""

    tokens: int  # all input tokens, media included
    media: int  # of its images and videos
    targets: int  # response tokens, end of turn included
    before: int  # before the last trained answer
    ends: int  # up to and including the last target
    media_ends: int  # up to and including the last media token, and the template's own around it
    notes: tuple[str, ...] = ()  # what is to be said about it


def measure(collator: ChatCollator, example: Example, name: str, sizes: Sizes | None = None) -> Measured:
    """Measure an example; `sizes`: of its images where they are known, else their headers are read."""
    marked = collator.mark(example, name)
    counted = count(collator, example, marked, sizes, name)
    return replace(counted or processed(collator, example, marked, name), notes=tuple(marked.notes))


def count(collator: ChatCollator, example: Example, marked: Marked, sizes: Sizes | None, name: str) -> Measured | None:
    """Measure from the text and image sizes alone; None where the processor cannot count its media's tokens rightly."""
    processing = collator.processing
    settings = media_settings(example.messages, "image")
    processing.check_settings(settings, name)
    if example.videos or processing.takes_suffix or (example.images and not processing.counts):
        return None
    with naming([name]):
        media = processing.media_tokens(collator.sizes(example, name) if sizes is None else sizes, settings)
    (row,) = processing.text_rows([marked.text], [name])
    try:
        runs = token_targets(row, marked.spans, marked.text, where=name)
    except StraddleError as error:
        return count(collator, example, cut_at(marked, error), sizes, name)
    repeats = np.ones(len(row.ids), np.int64)
    repeats[np.flatnonzero(row.media)] = media
    return _summary(row, runs, repeats, sum(media), marked)


def processed(collator: ChatCollator, example: Example, marked: Marked, name: str) -> Measured:
    """Measure by processing the example as it is collated."""
    encoded = collator.processing([collator.rendered(example, marked, name)])
    (row,) = encoded.rows
    try:
        runs = token_targets(row, marked.spans, marked.text, where=name)
    except StraddleError as error:
        return processed(collator, example, cut_at(marked, error), name)
    kinds = encoded.batch.get("mm_token_type_ids")
    media = int(row.media.sum()) if kinds is None else int((kinds > 0).sum())
    return _summary(row, runs, np.ones(len(row.ids), np.int64), media, marked)


def _summary(row: Row, runs: Sequence[Ints], repeats: Ints, media: int, marked: Marked) -> Measured:
    """The figures of a row of which token k stands for repeats[k] tokens."""
    upto = np.concatenate([[0], repeats.cumsum()])
    last_media = int(np.searchsorted(row.start, marked.markup[-1][1], "left")) if marked.markup else 0
    targets, ends = [int(k) for run in runs for k in run], int(runs[-1][-1]) + 1 if len(runs[-1]) else 0
    return Measured(
        int(upto[-1]), media, len(targets), int(upto[runs[-1][0]]) if ends else int(upto[-1]), int(upto[ends]),
        int(upto[last_media]),
    )  # fmt: skip


def within(measured: Measured, max_length: int | None) -> tuple[int, int, int]:
    """(all, media, response) tokens that are trained on: what is over max_length, after the media, is cut."""
    over = max(0, measured.tokens - max_length) if max_length else 0
    unlearnt = max(0, measured.ends - max_length) if max_length else 0
    return measured.tokens - over, measured.media, measured.targets - unlearnt
