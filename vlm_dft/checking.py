"""Check: a recipe's rows in; what is wrong with each, its tokens, pictures and texts, counted, out. No row stops it."""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dft.chat import Example, is_trained, text_of
from vlm_dft.duplicates import Print, Prints, line_keys, print_of, question_key, question_keys
from vlm_dft.errors import HIDDEN, CardError, RowError, UserError
from vlm_dft.examining import Examined, examine
from vlm_dft.media import open_image
from vlm_dft.prepared import open_prepared
from vlm_dft.recipes import Outcome, outcomes_of, places, recipe_root
from vlm_dft.rows import count_rows as rows_in
from vlm_dft.rows import files_of
from vlm_dft.sources import MediaAccess, content_of

if TYPE_CHECKING:
    from vlm_dft.collators import ChatCollator

CHEAP = 256 * 2**20  # bytes of files whose rows are counted by reading them
SHOWN = 5  # messages kept of each kind of fault
SMALL_SIDE, LONG_ASPECT = 28, 10  # pixels: one merged patch of Qwen-VL; long side over short side
NAMED = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".gif": "GIF", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}  # fmt: skip
KINDS = (  # (what a message says, the fault in plain words), for errors that give no reason of their own
    (r"no (image|video) file at", r"\1 missing"),
    (r"damaged or cut short", "image damaged or cut short"),
    (r"git-LFS pointer", "git-LFS pointer in place of the file"),
    (r"more pixels than are allowed|x 0 pixels|is 0 x", "image of an impossible size"),
    (r"is not a readable image", "not an image"),
    (r"leaves the data folder", "image outside the data folder"),
    (r"is remote", "image is remote"),
    (r"but \d+ places for them|markers but no", "markers and media differ in number"),
    (r"(response|answer) is empty|empty answer|no trained|nothing to train", "the response is empty"),
    (r"not valid JSON|expected an object, found", "line is not a JSON object"),
    (r"no column|no conversation", "column missing"),
    (r"column '.*' is null|found None", "value is null"),
    (r"unknown role", "unknown role"),
    (r"the processor refuses it", "refused by the processor"),
)


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """What is found out about a picture by decoding it once."""

    print: Print
    format: str
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What is found out about an example, for counting: no pictures, no texts."""

    pictures: tuple[PictureFacts, ...]
    question: int | None  # key of all that the user says
    keys: tuple[int, ...]  # of each question, with and without its options
    answer: int | None  # key of all that is trained
    characters: int
    non_ascii: int
    scripts: tuple[str, ...]  # of the letters, by their Unicode names
    remarks: tuple[str, ...]
    lines: tuple[int, ...] = ()  # of each line of the questions: an item of a benchmark may stand between instructions


@dataclass(frozen=True, slots=True)
class LookAt:
    """Called with an example: its RowFacts. Raises RowError for a picture that cannot be decoded whole."""

    access: MediaAccess

    def __call__(self, example: Example) -> RowFacts:
        """Decode every picture once, count the text's letters."""
        where = f"{example.source} row {example.id}"
        pictures = tuple(
            _look_at_picture(source, f"{where}, image {k}", self.access) for k, source in enumerate(example.images)
        )
        asked = [text_of(m["content"]) for m in example.messages if m["role"] == "user"]
        answers = [m.get("reasoning_content", "") + text_of(m["content"]) for m in example.messages if is_trained(m)]
        text = "\n".join([*asked, *answers])
        remarks = list(dict.fromkeys(remark for picture in pictures for remark in picture.remarks))
        remarks += ["text with U+FFFD: it was decoded wrongly somewhere"] if "\ufffd" in text else []
        remarks += ["text with invisible or control characters"] if HIDDEN.search(text) else []
        remarks += ["no question beside the picture"] if not any(map(question_key, asked)) else []
        non_ascii = 0 if text.isascii() else sum(letter > "\x7f" for letter in text)
        scripts = tuple(sorted({_script(letter) for letter in set(text)} - {""}))
        return RowFacts(
            pictures, question_key("\n".join(asked)), question_keys(asked), question_key("\n".join(answers)),
            len(text), non_ascii, scripts, tuple(remarks), line_keys(asked),
        )  # fmt: skip


def _look_at_picture(source: Any, where: str, access: MediaAccess) -> PictureFacts:
    from PIL import Image as PILImage

    remote = isinstance(source, str) and source.startswith(("http://", "https://"))
    content, _ = content_of(source, where, access, "image")
    if remote:
        source = content.read()  # fetched once
        content.seek(0)
    picture = open_image(source, where=where, access=access)
    name = source.get("path") if isinstance(source, Mapping) else source if isinstance(source, (str, Path)) else ""
    if isinstance(content, PILImage.Image):
        remarks, kind = [], "decoded"
    else:
        with content, PILImage.open(content) as opened:
            remarks, kind = _as_stored(opened, Path(str(name or "")[-255:]).suffix.lower()), str(opened.format)
    low, high = sorted(picture.size)
    remarks += [f"picture under {SMALL_SIDE} pixels a side"] if low < SMALL_SIDE else []
    remarks += [f"picture over {LONG_ASPECT} times as long as wide"] if high > LONG_ASPECT * low else []
    return PictureFacts(print_of(picture), kind, tuple(remarks))


def _as_stored(opened: Any, suffix: str) -> list[str]:
    """What is to be said of a picture's file."""
    kind = {"MPO": "JPEG", "DIB": "BMP"}.get(opened.format, opened.format)
    remarks = [f"picture named {suffix} is {kind}"] if NAMED.get(suffix, kind) != kind else []
    remarks += ["animation: its first frame is used"] if getattr(opened, "n_frames", 1) > 1 else []
    alpha = "A" in opened.getbands()
    clear = opened.getchannel("A").getextrema()[0] < 255 if alpha else "transparency" in opened.info
    return remarks + (["picture with transparency, laid on white"] if clear else [])


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    """The first word of a letter's Unicode name: LATIN, CJK, CYRILLIC. Not a language."""
    return unicodedata.name(letter, "UNNAMED").split()[0] if unicodedata.category(letter) in ("Lu", "Ll", "Lo") else ""


@dataclass(slots=True)
class Fault:
    """Rows that cannot be used for one reason."""

    ids: list[str] = field(default_factory=list)
    shown: list[tuple[int, str, str]] = field(default_factory=list)  # (place, id, message) of the first few


@dataclass(slots=True)
class Checked:
    """All that a check has found out. Numbers and hashes of every row, no pictures and no texts."""

    read: int = 0
    stopped: str = ""  # why nothing more could be read
    faults: dict[str, Fault] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason -> ids: by the card's own filters
    changed: dict[str, list[str]] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)  # of the collator
    ids: list[str] = field(default_factory=list)  # of usable rows; the columns below have the same order
    places: array[int] = field(default_factory=lambda: array("q"))
    tokens: array[int] = field(default_factory=lambda: array("q"))
    media: array[int] = field(default_factory=lambda: array("q"))
    response: array[int] = field(default_factory=lambda: array("q"))
    questions: list[int | None] = field(default_factory=list)
    answers: list[int | None] = field(default_factory=list)
    keys: list[tuple[int, ...]] = field(default_factory=list)
    prints: Prints = field(default_factory=Prints)  # its rows are indices of these columns
    heights: array[int] = field(default_factory=lambda: array("q"))  # of each picture, as prints
    widths: array[int] = field(default_factory=lambda: array("q"))
    formats: Counter[str] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)  # rows that hold letters of it
    characters: int = 0
    non_ascii: int = 0

    def add(self, found: Examined) -> None:
        """Count what became of one row."""
        self.read += 1
        outcome = found.outcome
        if outcome.error is not None:
            fault = self.faults.setdefault(kind_of(outcome.error), Fault())
            fault.ids.append(outcome.id)
            if len(fault.shown) < SHOWN:
                fault.shown.append((found.place, outcome.id, str(outcome.error)))
            return
        if outcome.example is None:
            self.dropped.setdefault(outcome.dropped, []).append(outcome.id)
            return
        facts = found.facts
        for counted, whats in (
            (self.changed, outcome.changed), (self.remarks, facts.remarks), (self.notes, found.measured.notes if found.measured else ()),
        ):  # fmt: skip
            for what in whats:
                counted.setdefault(what, []).append(outcome.id)
        self.prints.add(len(self.ids), [picture.print for picture in facts.pictures])
        self.heights.extend(picture.print.height for picture in facts.pictures)
        self.widths.extend(picture.print.width for picture in facts.pictures)
        self.formats.update(picture.format for picture in facts.pictures)
        self.scripts.update(facts.scripts)
        self.characters += facts.characters
        self.non_ascii += facts.non_ascii
        self.ids.append(outcome.id)
        self.places.append(found.place)
        self.questions.append(facts.question)
        self.answers.append(facts.answer)
        self.keys.append(tuple(dict.fromkeys((*facts.keys, *facts.lines))))
        if found.measured is not None:
            self.tokens.append(found.measured.tokens)
            self.media.append(found.measured.media)
            self.response.append(found.measured.targets)

    @property
    def faulty(self) -> int:
        """Rows that cannot be used."""
        return sum(len(fault.ids) for fault in self.faults.values())


def check(
    card: Mapping[str, Any],
    data: str | None,
    *,
    collator: ChatCollator | None = None,
    access: MediaAccess,
    workers: int = 0,
    limit: int | None = None,
    only: Container[int] | None = None,
    progress: Callable[[int], Any] = lambda rows: None,
) -> Checked:
    """Look at every row of a recipe, or at those at the places `only`, or at the first `limit`. Raises CardError before the first row.

    collator: measures each; give it no max_length, so that long rows are looked at too.
    """
    checked, last = Checked(), -1
    for attempt in (workers, 0):  # what the workers held when the files broke off is looked at by this process
        start = last + 1
        try:
            left = None if limit is None else limit - start
            for found in examine(
                card, data, collator=collator, facts=LookAt(access), workers=attempt, start=start, limit=left, only=only
            ):
                checked.add(found)
                progress(found.place - last)
                last = found.place
            break
        except (RowError, CardError) as error:
            if last < 0 and isinstance(error, CardError):
                raise
            checked.stopped = str(error)
            if not attempt:
                break
    seen = set[str]()
    alike = [row_id for row_id in checked.ids if row_id in seen or seen.add(row_id)]  # type: ignore[func-returns-value]
    if alike:
        checked.remarks["the same id as an earlier row"] = alike
    return checked


def kind_of(error: RowError) -> str:
    """A fault in a few plain words: the reason that the error gives, or what its message says."""
    kinds: list[type[RowError]] = [RowError, *RowError.__subclasses__()]
    if error.reason not in {kind.reason for kind in kinds}:
        return error.reason
    for said, kind in KINDS:
        if found := re.search(said, str(error)):
            return found.expand(kind)
    return error.reason


def count_rows(card: Mapping[str, Any], data: str | None) -> int | None:
    """How many rows a recipe's files hold, where that is cheap to know: small files, read once without their pictures."""
    source, root, where = card["source"], recipe_root(card, data), f"Recipe {card['name']!r}"
    if "prepared" in source:
        return len(open_prepared(source["prepared"]))
    if (known := rows_in(source, root, where=where)) is not None:
        return known
    files = files_of(source, root, where=where)
    if not files or sum(path.stat().st_size for path, _ in files) > CHEAP:
        return None
    count = 0
    try:
        for _ in places(card, root):
            count += 1
    except UserError:  # the check says so
        pass
    return count


def spread(count: int, sample: int) -> set[int]:
    """`sample` of the places 0 to count - 1, evenly."""
    return {k * count // sample for k in range(min(sample, count))} if sample < count else set(range(count))


def rows_at(card: Mapping[str, Any], data: str | None, wanted: Sequence[int]) -> Iterator[tuple[int, Any, Outcome]]:
    """(place, raw row or None, outcome) of rows at some places, read again."""
    left, root = set(wanted), recipe_root(card, data)
    if not left:
        return
    try:
        for place, row in enumerate(places(card, root)):
            if place in left:
                if isinstance(row, Outcome):
                    yield place, None, row
                else:
                    yield from ((place, row, outcome) for outcome in outcomes_of(card, row, root))
                left.discard(place)
                if not left:
                    return
    except UserError:  # the check has said so
        return
