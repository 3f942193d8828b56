"""Explain: a collated sample in, its tokens with the reason why each is or is not trained out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

from vlm_dft.errors import printable
from vlm_dft.objectives import IGNORE

if TYPE_CHECKING:
    from vlm_dft.alignment import Row
    from vlm_dft.marking import Marked

REASONS = ("prompt", "media", "response", "end of turn", "template after the answer", "padding")
LONGEST_CHARACTER = 4  # tokens, one a byte


@dataclass(frozen=True, slots=True)
class TokenView:
    """One input token as the model sees it."""

    position: int
    id: int
    text: str  # "" where the token before holds the whole of a character that takes several
    trained: bool
    reason: str  # one of REASONS


@dataclass(frozen=True, slots=True)
class Explained:
    """A sample as the model sees it."""

    name: str
    tokens: list[TokenView]
    turns: list[dict[str, Any]]  # of each trained turn: message, method that found it, targets, weight, objective
    notes: list[str] = field(default_factory=list)
    images: list[tuple[int, int]] = field(
        default_factory=list
    )  # (height, width) of each in pixels, as the processor has it
    videos: list[tuple[int, int, int]] = field(default_factory=list)  # (frames, height, width)

    def __iter__(self) -> Iterator[TokenView]:
        return iter(self.tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def __str__(self) -> str:
        """The text with what is trained between ⟦ and ⟧, media and padding collapsed; then the turns and the notes."""
        said = ""
        for run in self.runs:
            trained = run["reason"] in ("response", "end of turn")
            said += f"⟦{run['text']}⟧" if trained else run["text"]
        said = said.replace("⟧⟦", "")
        turns = [f"message {t['message']}: {t['targets']} targets, found by {t['method']}" for t in self.turns]
        figures = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        return printable(
            "\n".join([f"{self.name}: {len(self)} tokens ({figures})", said.rstrip(), *turns, *self.notes])
        )

    @property
    def counts(self) -> dict[str, int]:
        """{reason: tokens}, and "targets", the tokens that are trained."""
        found = Counter(view.reason for view in self.tokens)
        return {**{r: found[r] for r in REASONS if found[r]}, "targets": sum(view.trained for view in self.tokens)}

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Neighbours of one reason together: reason, tokens, text (media and padding as "<token> xN")."""
        rows = []
        for reason, group in groupby(self.tokens, key=lambda view: view.reason):
            tokens = list(group)
            text = "".join(t.text for t in tokens)
            if reason in ("media", "padding"):
                text = " ".join(f"{t} x{n}" if n > 1 else t for t, n in _counted(t.text for t in tokens))
            rows.append({"reason": reason, "tokens": len(tokens), "text": text})
        return rows


def explain_row(
    name: str, row: Row, labels: Sequence[int], marked: Marked, decode: Callable[[list[int]], str], **seen: Any
) -> Explained:
    """Name the reason for every token of one sample. `labels`: the id where trained, -100 elsewhere."""
    ids = row.ids.tolist()
    last = max((k for k, label in enumerate(labels) if label != IGNORE), default=-1)
    views, turns = [], []
    ends = {turn.end for turn in marked.turns}
    for k, (token, text) in enumerate(zip(ids, token_texts(ids, decode), strict=True)):
        trained = int(labels[k]) == token
        closes = trained and int(row.end[k]) in ends and decode([token]) == marked.text[row.start[k] : row.end[k]]
        if row.media[k]:
            reason = "media"
        elif trained:
            reason = "end of turn" if closes and (k + 1 == len(ids) or int(labels[k + 1]) == IGNORE) else "response"
        else:
            reason = "prompt" if k < last else "template after the answer"
        views.append(TokenView(k, token, text, trained, reason))
    for turn in marked.turns:
        inside = (row.start >= turn.start) & (row.end <= turn.end)
        targets = sum(views[k].trained for k in inside.nonzero()[0])
        turns.append({"message": turn.message, "method": turn.method, "targets": targets, "weight": turn.weight,
                      "objective": turn.objective})  # fmt: skip
    return Explained(name, views, turns, list(marked.notes), **seen)


def token_texts(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The text that each token adds, which decoding one at a time mangles: they join to what the whole decodes to.

    Of a character spread over several tokens (bytes) the first holds it and the others nothing.
    """
    texts = [""] * len(ids)
    before, at = (
        0,
        0,
    )  # ids[before:at] is the context (SentencePiece drops a space at the start), ids[at:] not yet shown
    seen = cache(lambda *window: decode(list(window)))  # an image repeats its token thousands of times
    for k in range(len(ids)):
        context, text = seen(*ids[before:at]), seen(*ids[before : k + 1])
        if k + 1 == len(ids) or k + 1 - at >= LONGEST_CHARACTER or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            texts[at] = text[len(context) :]
            before, at = at, k + 1
    return texts


def mask_report(samples: Sequence[Explained]) -> dict[str, Any]:
    """What the first samples of a run train on, for mask_report.json: runs of equal reason, collapsed, and a hash."""
    rows = [
        {
            "sample": s.name,
            "targets": s.counts["targets"],
            "tokens": len(s),
            "turns": s.turns,
            "notes": s.notes,
            "runs": s.runs,
        }
        for s in samples
    ]
    masks = "".join(f"{v.id}{'+' if v.trained else '-'}" for sample in samples for v in sample)
    return {"hash": hashlib.sha256(masks.encode()).hexdigest(), "samples": rows}


def _counted(items: Iterator[str] | Any) -> list[tuple[str, int]]:
    return [(item, len(list(group))) for item, group in groupby(items)]
