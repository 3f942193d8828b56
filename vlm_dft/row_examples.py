"""Row examples: a recipe card and a raw row in; the Example it is, its answers finished and its media located, out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_dft.chat import Example, Message, as_example, is_picture, is_trained
from vlm_dft.columns import columns_of, fill, is_nan
from vlm_dft.errors import RowError
from vlm_dft.filters import why_dropped
from vlm_dft.markers import (
    LIKENESS,
    MARKERS,
    MISMATCH,
    NUMBERED,
    count_markers,
    count_numbered,
    joined_texts,
    looks_marked,
    read_numbered,
)
from vlm_dft.prompts import prompt_text, right_option
from vlm_dft.response_text import finish, with_ending
from vlm_dft.row_formats import MEDIA_COLUMNS, format_of, inline_images, media_of, messages_of, tools_of
from vlm_dft.rows import locate


def made_of(card: Mapping[str, Any], row: Mapping[str, Any], root: Path | None) -> tuple[Example, tuple[str, ...]]:
    """(the Example of a raw row, what was done to it)."""
    where = where_of(card, row)
    folder = root / card["image_root"] if root is not None and card.get("image_root") else root
    tools: list[Any] = []
    own = None
    if "prompt" in card:
        option = right_option(card, row, where=where)
        if "correct" in card and not option:
            _check_free(card, row, where)
        messages: list[Any] = [
            {"role": "user", "content": prompt_text(card, row, where=where)},
            {"role": "assistant", "content": fill(card["response"], {**row, **option}, where=where).strip()},
        ]
    else:
        form = format_of(card, row, where=where)
        messages = messages_of(row, form, where=where)
        own = row.get("source") if form.column else None  # a mixture of conversations tells its sources apart itself
        tools, option = tools_of(row.get("tools"), where), {}
    images = [fill(card["image"], row, where=where)] if "image" in card else media_of(card, row, "image", where=where)
    videos = media_of(card, row, "video", where=where)
    _check_pictures_used(card, row, where)
    if not images and not videos:
        _check_unread(card, row, where)
    messages = [joined_texts(message) for message in messages]
    messages, inline = inline_images(messages)
    if inline and images:
        raise RowError(f"{where}: images both as <img> in the text and in a column. Give them in one place.", MISMATCH)
    images = images or inline
    _check_media(card, row, messages, {"image": images, "video": videos}, where)
    for k, message in enumerate(messages):
        content = message["content"]
        blank = not (content.strip() if isinstance(content, str) else content)
        if message["role"] == "user" and blank and not (images or videos):
            raise RowError(f"{where}, turn {k}: the question is empty.", "a question is empty")
    changed = []
    if card.get("system") and messages[0]["role"] == "system":
        changed.append("the row's own system prompt kept")
    elif card.get("system"):
        messages = [{"role": "system", "content": card["system"]}, *messages]
    said = [read_numbered(messages, images, where=where)[2]] if images else []
    try:
        made = as_example(
            {"messages": messages, "images": images, "videos": videos, "tools": tools, "id": where}, where=where
        )
    except RowError as error:
        if error.reason == RowError.reason:
            error.reason = "conversation malformed"
        raise
    said += [LIKENESS] if (made.images or made.videos) and looks_marked(made.messages) else []
    messages, finished = _finish_answers(card, row, option, made.messages, where)
    changed += finished
    example = replace(
        made, messages=messages, id=str(row["id"]), source=own if isinstance(own, str) and own.strip() else str(card["name"]),
        images=locate(made.images, folder, where=where, remote=True),
        videos=locate(made.videos, folder, where=where, kind="video"),
    )  # fmt: skip
    return example, tuple(filter(None, [*said, *changed]))


def _check_unread(card: Mapping[str, Any], row: Mapping[str, Any], where: str) -> None:
    """Refuse a row whose one file is in another column than the card's `images`: a webdataset's .jpg among .png."""
    if "image" in card or not card.get("images") or card["images"] in row:
        return
    read = {card.get("videos"), *(column for columns in MEDIA_COLUMNS.values() for column in columns)}
    held = [c for c, value in row.items() if c not in read and isinstance(value, Mapping) and value.get("bytes")]
    if not held:
        return
    column = card["images"]
    raise RowError(
        f"{where}: no column {column!r} of images, but a file in {held[0]!r}. For rows of either kind mix two copies of the card, each with its "
        f"`images` and keep: {{{column}: {{empty: false}}}}.",
        "a file in a column that the card does not read",
    )


def _check_free(card: Mapping[str, Any], row: Mapping[str, Any], where: str) -> None:
    """Refuse a row without options where the card's response or ending names the right one."""
    for key in ("response", "ending"):
        named = {"letter", "choice"} & set(columns_of(card.get(key, ""), where=where)) - set(row)
        if named:
            raise RowError(
                f"{where}: no options in column {card['options']!r}, and the card's {key} names {{{sorted(named)[0]}}}. Leave such rows out "
                f"(keep: {{{card['options']}: {{empty: false}}}}), or say answer: {{free: ..., choice: ...}}.",
                "no options",
            )


def _check_pictures_used(card: Mapping[str, Any], row: Mapping[str, Any], where: str) -> None:
    """Refuse a row with a column that looks like a picture which nothing uses, where the card says nothing of pictures.

    Beside a column of ours, such as MathVista's `image` (a path) beside `decoded_image`, only embedded ones count.
    """
    if {"image", "images", "videos"} & set(card):
        return
    ours = [name for names in MEDIA_COLUMNS.values() for name in names if name in row]
    for name, value in row.items():
        if name == "id" or name in ours or not is_picture(value) or (ours and not isinstance(value, Mapping)):
            continue
        if ours:
            raise RowError(
                f"{where}: columns {ours[0]!r} and {name!r} both hold pictures. Say `images: {name}` or `images: {ours[0]}` in a card.",
                "two columns of pictures",
            )
        raise RowError(
            f"{where}: column {name!r} holds a picture that nothing uses. Say `images: {name}` in a card, or `images: null` if it is "
            "not to be shown.",
            "a column of pictures is not used",
        )


def filtered(card: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Why the card's `keep` leaves a row out, or ""."""
    return why_dropped(card["keep"], row, where=where_of(card, row)) if card.get("keep") else ""


def _finish_answers(
    card: Mapping[str, Any], row: Mapping[str, Any], option: Mapping[str, str], messages: list[Message], where: str
) -> tuple[list[Message], list[str]]:
    """(the messages, their answers as the card declares: tags, ending, objective, weight; what was done)."""
    tags = {str(name).lower(): str(action) for name, action in (card.get("tags") or {}).items()}
    last = max((k for k, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    done, changed = list[Message](), dict[str, None]()
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            done.append(message)
            continue
        place = where if "prompt" in card else f"{where}, turn {k}"
        found = [finish(text, tags, where=place) for text in _texts(message["content"])]
        texts = [finished.text for finished in found]
        thoughts = [finished.reasoning for finished in found if finished.reasoning]
        changed |= dict.fromkeys(effect for finished in found for effect in finished.changed)
        if thoughts and message.get("reasoning_content"):
            raise RowError(f"{place}: reasoning both in its own key and in a tag.", "reasoning twice")
        if is_trained(message) and not "".join(texts).strip() and not message.get("tool_calls"):
            raise RowError(f"{place}: the response is empty.", "the response is empty")
        if NUMBERED.search("".join(texts)):
            changed["<image_N> in the response kept as text"] = None
        if k == last and texts and "ending" in card:
            whole, appended = with_ending("".join(texts), _ending(card, row, option, where))
            if appended:
                changed[_how(card["ending"], "".join(texts))] = None
                texts[-1] = texts[-1].rstrip() + whole[len("".join(texts).rstrip()) :]
        own = {key: card[key] for key in ("objective", "weight") if key in card and is_trained(message)}
        thought = {"reasoning_content": "\n\n".join(thoughts)} if thoughts else {}
        done.append({**own, **message, **thought, "content": _with_texts(message["content"], texts)})
    return done, list(changed)


def _texts(content: Any) -> list[str]:
    """The texts of a message's content, one where it is a string."""
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _with_texts(content: Any, texts: list[str]) -> Any:
    """The content with these in place of its texts."""
    if isinstance(content, str):
        return texts[0]
    left = iter(texts)
    return [{**part, "text": next(left)} if part["type"] == "text" else part for part in content]


def _how(ending: str, text: str) -> str:
    """What is said of a response that an ending was appended to: that it ended in another one is worth knowing."""
    begins = ending.split("{")[0].strip().lower()
    another = begins and begins in text.strip().split("\n")[-1].lower()
    return "ending appended after another of its kind" if another else "ending appended"


def _ending(card: Mapping[str, Any], row: Mapping[str, Any], option: Mapping[str, str], where: str) -> str:
    """The card's ending, with {answer} as its `answer` says: one form, or one for rows with options and one for the others."""
    answer, values = card.get("answer"), {**row, **option}
    if isinstance(answer, Mapping):
        answer = answer["choice" if option else "free"]
    if answer is not None:
        values["answer"] = fill(answer, values, where=where).strip()
    said = fill(card["ending"], values, where=where)
    if "answer" in values and not str(values["answer"]).strip():
        raise RowError(f"{where}: the answer is empty.", "the answer is empty")
    return said


def _check_media(
    card: Mapping[str, Any], row: Mapping[str, Any], messages: list[Any], media: Mapping[str, list[Any]], where: str
) -> None:
    """Refuse markers without media, and places in a list of media that hold nothing."""
    for kind, sources in media.items():
        for k, source in enumerate(sources):
            if source is None or is_nan(source) or source == "":
                raise RowError(f"{where}: {kind} {k + 1} of {len(sources)} is {source!r}.", f"{kind} is null")
        markers = count_markers(messages, kind) + (count_numbered(messages) if kind == "image" else 0)
        if markers and not sources and not _parts(messages, kind):
            own = card.get(f"{kind}s") or card.get(kind)
            raise RowError(
                f"{where}: {markers} {MARKERS[kind]} markers but no {kind}s. Expected them in the column "
                f"{own or f'{kind}s or {kind}'!r}; the row has {', '.join(map(str, row))}.",
                MISMATCH,
            )


def _parts(messages: list[Any], kind: str) -> bool:
    """Whether messages that nobody has checked yet hold parts of a kind."""
    return any(
        isinstance(part, Mapping) and part.get("type") in (kind, f"{kind}_url")
        for message in messages if isinstance(message["content"], list) for part in message["content"]
    )  # fmt: skip


def where_of(card: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """How errors call a row."""
    return f"{card['name']} row {row['id']}"
