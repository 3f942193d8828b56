"""Markers: messages and their media in; `<image>`, `<image_1>`, `<ImageHere>`, `<video>` made into parts, media in their order, out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from vlm_dft.errors import RowError

Message = dict[str, Any]
MARKERS = {"image": "<image>", "video": "<video>"}
SPELLINGS = {"image": ("<image>", "<ImageHere>"), "video": ("<video>",)}
NUMBERED = re.compile(r"<image[_ ]?(\d{1,4})>")  # MV-MATH's, MathVision's, MMMU's
COMPOSITE = "numbered image markers kept as text, the one image first"
LIKE = re.compile(
    r"<\|?/?(?:image|img|video|picture)[^<>\n]{0,20}>|\[(?:image|img|video|picture)[ _]?\d*\]", re.IGNORECASE
)
LIKENESS = "words that look like a marker of a picture kept as text"
REFERENCES = "numbered image markers kept as text beside the unnumbered"
MISMATCH = "markers and media differ in number"


def looks_marked(messages: Iterable[Message]) -> bool:
    """Whether what is asked, its markers made into parts, still holds words that look like one: <IMAGE>, <|image_1|>, [image]."""
    asked = (m["content"] for m in messages if m["role"] != "assistant")
    texts = (
        text
        for content in asked
        for text in ([content] if isinstance(content, str) else [part.get("text", "") for part in content])
    )
    return any(LIKE.search(NUMBERED.sub("", text)) for text in texts)


def media_parts(messages: Iterable[Message], kind: str) -> list[dict[str, Any]]:
    """The parts of one kind ("image" or "video") in the order of their appearance."""
    lists = (m["content"] for m in messages if not isinstance(m["content"], str))
    return [part for parts in lists for part in parts if part.get("type") == kind]


def count_markers(messages: Iterable[Message], kind: str = "image") -> int:
    """How many unnumbered markers the plain strings of the messages hold; those in answers are words, not pictures."""
    return sum(text.count(spelling) for text in _asked(messages) for spelling in SPELLINGS[kind])


def count_numbered(messages: Iterable[Message]) -> int:
    """The same of numbered ones."""
    return sum(len(NUMBERED.findall(text)) for text in _asked(messages))


def joined_texts(message: Message) -> Message:
    """A message asked in text parts alone, with markers among them, as one string: its markers are read there."""
    content = message.get("content")
    if message["role"] == "assistant" or not isinstance(content, list) or not content:
        return message
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return message
    text = "".join(str(part.get("text")) for part in content)
    marked = NUMBERED.search(text) or any(spelling in text for each in SPELLINGS.values() for spelling in each)
    return {**message, "content": text} if marked else message


def read_numbered(messages: list[Message], images: list[Any], *, where: str) -> tuple[list[Message], list[Any], str]:
    """(messages with `<image>` for every `<image_N>`, the images in that order, what is to be said of it).

    A number names the image of that place, as often as it stands there. One file for higher numbers (MathVision draws
    several pictures into one) leaves the text as it is, for the image to go first. Raises RowError for any other mismatch.
    """
    numbers = [int(number) for text in _asked(messages) for number in NUMBERED.findall(text)]
    if not numbers or not images or media_parts(messages, "image"):
        return messages, images, ""
    if (plain := count_markers(messages)) == len(images):
        return messages, images, REFERENCES
    if plain:
        raise RowError(
            f"{where}: {len(images)} images but {plain} unnumbered and {len(numbers)} numbered markers. Use one kind.",
            MISMATCH,
        )
    highest = max(numbers)
    if len(images) == 1 and highest > 1:
        return messages, images, COMPOSITE
    unnamed = sorted(set(range(1, len(images) + 1)) - set(numbers))
    if min(numbers) < 1 or highest > len(images) or unnamed:
        raise RowError(
            f"{where}: {len(images)} images but the numbered markers are {', '.join(map(str, sorted(set(numbers))))}. Expected 1 to "
            f"{len(images)}, each at least once." + (f" No marker for image {unnamed[0]}." if unnamed else ""),
            MISMATCH,
        )
    renamed = [{**m, "content": NUMBERED.sub(MARKERS["image"], m["content"])} if _asks(m) else m for m in messages]
    return renamed, [images[number - 1] for number in numbers], ""


def place_media(messages: list[Message], images: int, videos: int = 0, *, where: str) -> list[Message]:
    """Turn the unnumbered markers of plain-string messages into parts, so that parts and media agree in number.

    Rows that already hold the parts are taken as they are and their text stays literal; so does that of rows without
    media, and of every answer. Rows without a marker get their media before the first user text. Any other mismatch
    raises RowError with both counts.
    """
    split, first = [], []
    for kind, count in (("image", images), ("video", videos)):
        parts, markers = len(media_parts(messages, kind)), count_markers(messages, kind)
        if parts == count:
            continue
        if parts == 0 and markers == count:
            split.append(kind)
        elif parts == 0 and markers == 0 and any(m["role"] == "user" for m in messages):
            first += [{"type": kind}] * count
        else:
            raise RowError(
                f"{where}: {count} {kind}s but {parts or markers} places for them ({parts} {kind} parts, {markers} "
                f"{MARKERS[kind]} markers). Give one marker per {kind}, or none at all to put the {kind}s first.",
                MISMATCH,
            )
    placed = [_split_markers(message, split) for message in messages] if split else messages
    if not first:
        return placed
    k = next(k for k, m in enumerate(placed) if m["role"] == "user")
    text = placed[k]["content"]
    after = [{"type": "text", "text": text}] if isinstance(text, str) else list(text)
    return [*placed[:k], {**placed[k], "content": first + after}, *placed[k + 1 :]]


def _split_markers(message: Message, kinds: Sequence[str]) -> Message:
    if not _asks(message):
        return message
    kind_of = {spelling: kind for kind in kinds for spelling in SPELLINGS[kind]}
    pieces = re.split(f"({'|'.join(map(re.escape, kind_of))})", message["content"])
    if len(pieces) == 1:
        return message
    parts = [{"type": kind_of[p]} if p in kind_of else {"type": "text", "text": p} for p in pieces if p]
    return {**message, "content": parts}


def _asks(message: Message) -> bool:
    return message["role"] != "assistant" and isinstance(message["content"], str)


def _asked(messages: Iterable[Message]) -> list[str]:
    return [m["content"] for m in messages if _asks(m)]
