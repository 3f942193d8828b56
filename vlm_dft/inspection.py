"""Inspect: rows of a recipe in; what the model sees of each, or why it cannot be trained on, out, and drawn for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from vlm_dft.chat import Example
from vlm_dft.errors import RowError, printable
from vlm_dft.explain import Explained, TokenView, mask_report
from vlm_dft.fitting import fit
from vlm_dft.mixture_cards import sources_in
from vlm_dft.recipes import Outcome, places, recipe_root
from vlm_dft.row_examples import filtered, made_of

if TYPE_CHECKING:
    from vlm_dft.collators import ChatCollator

HEAD, TAIL = 400, 200  # characters shown of a long prompt's beginning and end
STYLES = {  # text and ground are both set where a colour is, so that they are read on a dark and on a light terminal
    "prompt": "",
    "media": "color(16) on color(153)",
    "response": "color(16) on color(157)",
    "end of turn": "bold color(16) on color(222)",
    "template after the answer": "dim",
    "padding": "dim",
}
OPEN, CLOSE, ERROR, DROPPED = "⟦", "⟧", "bold red", "bold magenta"
# What a terminal obeys, a browser reorders or nobody sees: shown by its number. \n and \t are handled apart.


@dataclass(slots=True)
class Piece:
    """Neighbouring tokens shown as one: those of a character that takes several, or of a picture."""

    tokens: list[TokenView]
    medium: tuple[str, int] | None = None  # ("image", 0): the picture that they stand for, where that is sure
    size: str = ""  # of that picture, as the processor has it

    @property
    def reason(self) -> str:
        """One of explain.REASONS."""
        return self.tokens[0].reason

    @property
    def text(self) -> str:
        """What the tokens say; a repeated one is said once."""
        repeated = self.reason in ("media", "padding")
        return self.tokens[0].text if repeated else "".join(view.text for view in self.tokens)


@dataclass(frozen=True, slots=True)
class Inspected:
    """One row: what the model sees of it, or why it is not trained on."""

    name: str
    example: Example | None = None
    explained: Explained | None = None
    pieces: list[Piece] = field(default_factory=list)
    failed: str = ""  # the error, for a row that cannot be trained on
    dropped: str = ""  # why too_long leaves it out


def inspect_rows(
    card: Mapping[str, Any], data: str | None, collator: ChatCollator, *, start: int = 0, count: int = 5
) -> Iterator[Inspected]:
    """Rows [start, start + count) of a recipe, of each source of a mixture, one after the other. Raises RowError if there is none."""
    for source in sources_in(card, data):
        yield from _of_source(source.card, source.data, collator, start, count)


def _of_source(
    card: Mapping[str, Any], data: str | None, collator: ChatCollator, start: int, count: int
) -> Iterator[Inspected]:
    root, where = recipe_root(card, data), f"Recipe {card['name']!r}"
    k, shown = 0, 0
    for k, row in enumerate(places(card, root), 1):
        if k > start:
            yield _inspect(card, row, root, collator)
            shown += 1
        if shown == count:
            return
    if not shown:
        raise RowError(f"{where} has {k} rows, so none at --start {start} (the first is 0).")


def _inspect(
    card: Mapping[str, Any], row: Mapping[str, Any] | Outcome, root: Path | None, collator: ChatCollator
) -> Inspected:
    name = f"{card['name']} {row.id if isinstance(row, Outcome) else row['id']}"
    if isinstance(row, Outcome) and row.error is not None:
        return Inspected(name, failed=str(row.error))
    try:
        if not isinstance(row, Outcome) and (why := filtered(card, row)):
            return Inspected(name, dropped=why)
        example, changed = (row.example, row.changed) if isinstance(row, Outcome) else made_of(card, row, root)
        assert example is not None, "the outcome of a place is an error or an example"
        measured, effect = collator.measure(example), ""
        if collator.max_length is not None and measured.tokens > collator.max_length:
            fitted, effect = fit(collator, example, name)
            if fitted is None:
                return Inspected(
                    name, example, dropped=f"{effect.removeprefix('dropped: ')} ({measured.tokens:,} found)"
                )
            example = fitted
        explained = collator.explain(example)
    except RowError as error:
        return Inspected(name, failed=str(error))
    explained.notes.extend(note for note in changed if note not in explained.notes)
    explained.notes.extend([effect] if effect and effect not in explained.notes else [])
    return Inspected(name, example, explained, _pieces(explained, example, collator.processor))


def _pieces(explained: Explained, example: Example, processor: Any) -> list[Piece]:
    """The tokens in order, joined where they are shown as one, and the media they stand for."""
    found: list[Piece] = []
    for view in explained:
        last = found[-1].tokens[-1] if found else None
        repeats = last is not None and view.reason in ("media", "padding") and view.id == last.id
        if last is not None and view.reason == last.reason and (repeats or not view.text):
            found[-1].tokens.append(view)
        else:
            found.append(Piece([view]))
    for kind, sizes, media in (
        ("image", [f"{w}×{h} px" for h, w in explained.images], example.images),
        ("video", [f"{n} frames of {w}×{h} px" for n, h, w in explained.videos], example.videos),
    ):
        own = getattr(processor, f"{kind}_token_id", None)
        places = _places(found, len(media), own, alone=not (example.images and example.videos))
        sizes = sizes * len(media) if len(sizes) == 1 else sizes
        for k, piece in enumerate(places):
            piece.medium, piece.size = (kind, k), sizes[k] if len(sizes) == len(media) else ""
    return found


def _places(pieces: Sequence[Piece], count: int, own: int | None, *, alone: bool) -> list[Piece]:
    """The pieces that stand for the media of a kind, one each; none where media are cut into tiles or frames.

    own: the kind's token by the processor's account, which may be that of the beginning (Gemma 3). Where the row has no
    media of another kind, it is the token that takes the most places.
    """
    by_token: dict[int, list[Piece]] = {}
    for piece in pieces:
        if piece.reason == "media" and (alone or piece.tokens[0].id == own):
            by_token.setdefault(piece.tokens[0].id, []).append(piece)
    most = max(by_token, key=lambda token: (sum(len(p.tokens) for p in by_token[token]), token == own), default=None)
    found = by_token[most] if most is not None else []
    return found if len(found) == count else []


def report_json(rows: Sequence[Inspected]) -> dict[str, Any]:
    """What --json writes: the mask report of the rows that can be trained on, and what is wrong with the others."""
    return {
        **mask_report([row.explained for row in rows if row.explained is not None]),
        "failed": [{"sample": row.name, "error": row.failed} for row in rows if row.failed],
        "dropped": [{"sample": row.name, "reason": row.dropped} for row in rows if row.dropped],
    }


def visible(text: str) -> str:
    """A text with line breaks as ↵ and a real one, and what would be obeyed or unseen by its number: <U+001B>."""
    return printable(text).replace("\n", "↵\n")


# Drawing: an Inspected in, rich Text out. Nothing here prints.


def draw_legend() -> Text:
    """What the colours and the marks mean."""
    text = Text("legend: ")
    for k, (reason, style) in enumerate(STYLES.items()):
        if reason != "padding":  # a sample alone has none
            text.append("  " if k else "")
            text.append(f"{OPEN}response" if reason == "response" else reason, style=style)
            text.append(CLOSE if reason == "end of turn" else "")
    return text.append(f"\n{OPEN}between these{CLOSE} is trained, all else is only read; ↵ is a line break.")


def draw_row(row: Inspected, place: str, *, full: bool = False) -> Text:
    """One row: its counts, its tokens, its turns. `full`: long prompts are not shortened."""
    text = Text().append(f"── {place}: {visible(row.name)} ", style="bold").append("─" * 8 + "\n", style="bold")
    if row.explained is None:
        word, style = ("cannot be trained on", ERROR) if row.failed else ("dropped", DROPPED)
        return text.append(f"{'✗' if row.failed else '–'} {word}: ", style=style).append(
            visible(row.failed or row.dropped).replace("↵\n", "\n") + "\n", style=style
        )
    text.append(f"{counts_line(row.explained)}\n")
    _draw_tokens(text, row.pieces, full)
    for line in turn_lines(row.explained):
        text.append(f"{line}\n")
    for note in row.explained.notes:
        text.append("note: ", style="bold").append(f"{visible(note)}\n")
    return text


def counts_line(explained: Explained) -> str:
    """The tokens of a sample by reason, and the sizes of its media."""
    counts = explained.counts
    targets = counts.pop("targets")
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in counts.items())
    media = [f"{w}×{h}" for h, w in explained.images] + [f"{n}×{w}×{h}" for n, h, w in explained.videos]
    sizes = f"; media: {', '.join(f'{size} px' for size in media)}" if media else ""
    return f"{len(explained):,} tokens, {targets:,} trained ({targets / len(explained):.1%}): {reasons}{sizes}"


def turn_lines(explained: Explained) -> Iterator[str]:
    """Each trained turn in a line: its targets, what found it, and what is special about it."""
    for turn in explained.turns:
        own = [f"weight {turn['weight']:g}"] if turn["weight"] != 1 else []
        own += [f"objective {turn['objective']}"] if turn["objective"] else []
        yield ", ".join([f"message {turn['message']}: {turn['targets']:,} targets", f"found by {turn['method']}", *own])


def draw_summary(rows: Sequence[Inspected]) -> Text:
    """The totals of what was shown, and how many rows are wrong."""
    fine = [row.explained for row in rows if row.explained is not None]
    totals = Counter[str]()
    for explained in fine:
        totals.update({"tokens": len(explained), **explained.counts})
    text = Text(
        f"{len(fine)} sample{'s' * (len(fine) != 1)}: {totals['tokens']:,} tokens, {totals['media']:,} of media, "
        f"{totals['targets']:,} trained ({totals['targets'] / max(1, totals['tokens']):.1%})"
    )
    failed, dropped = sum(bool(row.failed) for row in rows), sum(bool(row.dropped) for row in rows)
    if dropped:
        text.append(f"\n{dropped} of {len(rows)} rows dropped", style=DROPPED)
    if failed:
        text.append(f"\n{failed} of {len(rows)} rows cannot be trained on", style=ERROR)
    return text


def _draw_tokens(text: Text, pieces: Sequence[Piece], full: bool) -> None:
    """The tokens by runs of one reason; trained ones between marks."""
    inside = False
    for reason, group in groupby(pieces, key=lambda piece: piece.reason):
        run, style = list(group), STYLES[reason]
        trained = run[0].tokens[0].trained
        if trained != inside:
            text.append(OPEN if trained else CLOSE)
        inside = trained
        if reason in ("media", "padding"):
            for piece in run:
                text.append(visible(piece.text) + times(piece), style=style)
        elif reason == "prompt" and not full:
            _shortened(text, run)
        else:
            text.append("".join(visible(piece.text) for piece in run), style=style)
    text.append(CLOSE if inside else "")
    text.append("" if text.plain.endswith("\n") else "\n")


def times(piece: Piece) -> str:
    """How often a piece's one token is there, and the size of the picture that it stands for: " ×16 (112×112 px)"."""
    many = f" ×{len(piece.tokens)}" if len(piece.tokens) > 1 or piece.medium else ""
    return f"{many}{f' ({piece.size})' if piece.size else ''}"


def _shortened(text: Text, run: Sequence[Piece]) -> None:
    """A prompt's beginning and end, with the count of what is left out between them."""
    head = _reaching(run, HEAD)
    tail = _reaching(run[::-1], TAIL)
    left_out = run[head : len(run) - tail]
    if len(left_out) * 4 < head + tail:  # hardly shorter
        text.append("".join(visible(piece.text) for piece in run))
        return
    tokens = sum(len(piece.tokens) for piece in left_out)
    text.append("".join(visible(piece.text) for piece in run[:head]))
    text.append(f" […{tokens:,} tokens of the prompt not shown, see --full…] ", style="italic magenta")
    text.append("".join(visible(piece.text) for piece in run[len(run) - tail :]))


def _reaching(run: Sequence[Piece], characters: int) -> int:
    """How many pieces from the start hold so many characters."""
    seen = 0
    for k, piece in enumerate(run):
        seen += len(piece.text)
        if seen > characters:
            return k
    return len(run)
