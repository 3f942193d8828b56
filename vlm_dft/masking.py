"""Masking: rendered text, its responses' characters and the aligned tokens in; the target tokens out, and their proof."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vlm_dft.alignment import Bools, Ints, Row
from vlm_dft.errors import MaskError
from vlm_dft.marking import Marked, Span, excerpt
from vlm_dft.objectives import OBJECTIVES
from vlm_dft.templates import BREAK


class StraddleError(MaskError):
    """A token holds characters of the template and of the answer, at the edge `at` of a span: white space merged there."""

    def __init__(self, message: str, at: int) -> None:
        super().__init__(message)
        self.at = at


def cut_at(marked: Marked, straddle: StraddleError) -> Marked:
    """The same text with BREAK at the edge of the response, so that what is before and after it is tokenised apart.

    Raises the error where that has been tried already.
    """
    at = straddle.at
    if BREAK in marked.text[max(0, at - 1) : at + 1]:
        raise straddle
    turns = [replace(t, start=t.start + (t.start >= at), end=t.end + (t.end > at)) for t in marked.turns]
    markup = [(a + (a >= at), b + (b > at)) for a, b in marked.markup]
    return Marked(marked.text[:at] + BREAK + marked.text[at:], turns, marked.notes, markup)


def token_targets(row: Row, spans: Sequence[Span], text: str, *, where: str) -> list[Ints]:
    """The positions of each span's tokens, media left out. Raises StraddleError when a token straddles a span's edge."""
    runs = []
    for start, end in spans:
        first = int(np.searchsorted(row.end, start, side="right"))
        stop = int(np.searchsorted(row.start, end, side="left"))
        inside = np.arange(first, stop)
        inside = inside[~row.media[first:stop] & (row.end[first:stop] > row.start[first:stop])]
        if len(inside) and (row.start[inside[0]] < start or row.end[inside[-1]] > end):
            k = int(inside[0] if row.start[inside[0]] < start else inside[-1])
            a, b = int(row.start[k]), int(row.end[k])
            raise StraddleError(
                f"{where}: token {k} (id {row.ids[k]}, {text[a:b]!r}) straddles the edge of the response "
                f"{excerpt(text[start:end], 40)!r}. An answer should not begin or end with white space that merges with the "
                "template's.",
                start if row.start[k] < start else end,
            )
        runs.append(inside)
    return runs


def prove(
    *, where: str, text: str, spans: Sequence[Span], runs: Sequence[Ints], row: Row, decoded: Sequence[str],
    tokens: Callable[[list[int]], list[str]], media: Bools,
) -> None:  # fmt: skip
    """Prove one sample's targets: each run (`decoded`) is its answer plus end token, and none is a media token.

    media: [vocabulary], which ids stand for pixels or enclose them.
    """
    if not any(map(len, runs)):
        raise MaskError(f"{where}: expected at least one target token, found none.")
    for (start, end), run, found in zip(spans, runs, decoded, strict=True):
        expected = _answer_text(text, start, end, row, run)
        if found not in (expected, expected.removeprefix(" ")):  # SentencePiece's decoder drops a first blank
            expected, found = unicodedata.normalize("NFC", expected), unicodedata.normalize("NFC", found)
            if found not in (expected, expected.removeprefix(" ")):
                raise MaskError(
                    f"{where}: targets do not decode to the answer.\n  expected: {excerpt(expected, len(expected))!r}"
                    f"\n  found:    {excerpt(found, len(found))!r}"
                )
        wrong = row.ids[run][media[row.ids[run]]].tolist()
        if wrong:
            raise MaskError(
                f"{where}: media token {tokens(wrong)[0]!r} is a target. Write media as parts "
                '{"type": "image"}, not as text in an answer.'
            )


def _answer_text(text: str, start: int, end: int, row: Row, run: Ints) -> str:
    """The characters of a span, without BREAK and without what media tokens inside it cover."""
    pieces, at = [], start
    if len(run) and len(run) < run[-1] - run[0] + 1:  # something between the targets is no target
        within = np.arange(run[0], run[-1] + 1)
        for k in within[row.media[within]]:
            a, b = int(row.start[k]), int(row.end[k])
            if a >= at and b <= end:
                pieces.append(text[at:a])
                at = b
    return ("".join(pieces) + text[at:end]).replace(BREAK, "")


def cover(row: Row, markup: Sequence[Span]) -> None:
    """Mark as media what stands at the given characters: placeholders and the template's own tokens around them."""
    for start, end in markup:
        row.media[(row.start >= start) & (row.end <= end) & (row.end > row.start)] = True


def turn_settings(
    marked: Sequence[Marked], runs: Sequence[Sequence[Ints]], columns: Sequence[Ints], labels: Tensor,
    objectives: Sequence[str | None],
) -> dict[str, Tensor]:  # fmt: skip
    """`loss_weights` (1 where not set) and `objective_ids` (-1) [B, L], each only where a turn of the batch sets its own.

    objectives: of each row, for turns that set none; None: the run's.
    """
    found: dict[str, Tensor] = {}
    turns = [turn for one in marked for turn in one.turns]
    names = sorted(OBJECTIVES)
    if any(turn.weight != 1 for turn in turns):
        found["loss_weights"] = torch.ones(labels.shape)
    if any(turn.objective for turn in turns) or any(objectives):
        found["objective_ids"] = torch.full_like(labels, -1)
    for k, one in enumerate(marked if found else []):
        for turn, run in zip(one.turns, runs[k], strict=True):
            column = torch.from_numpy(columns[k][run])
            if "loss_weights" in found:
                found["loss_weights"][k, column] = turn.weight
            own = turn.objective or objectives[k]
            if own:
                found["objective_ids"][k, column] = names.index(own)
    return found
