"""Conversations: chat rows in, checked `Example`s (to train on) and `Sample`s (to evaluate on) out."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from vlm_dft.cards import nearest
from vlm_dft.errors import RowError
from vlm_dft.markers import media_parts, place_media, read_numbered
from vlm_dft.objectives import OBJECTIVES

Message = dict[str, Any]
"""`{"role": str, "content": str | list of parts}`; a part is `{"type": "text", "text": ...}`, `{"type": "image"}` or
`{"type": "video"}`, the last two with any of the settings below. An assistant message may carry `reasoning_content`,
`tool_calls`, `train` (False keeps it out of the loss), `weight` (a factor of its tokens' loss) and `objective` (a name of
OBJECTIVES, in place of the run's)."""

ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = (
    "role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "train", "weight", "objective",
)  # fmt: skip
OURS = ("train", "weight", "objective")  # what a chat template never sees
IMAGE_SETTINGS = (
    "min_pixels",
    "max_pixels",
    "resized_height",
    "resized_width",
)  # areas and sizes in pixels, Qwen's keys
VIDEO_SETTINGS = (
    *IMAGE_SETTINGS, "total_pixels", "fps", "nframes", "min_frames", "max_frames", "video_start", "video_end",
    "sample_fps", "raw_fps",
)  # fmt: skip
SIZE_SETTINGS = (*IMAGE_SETTINGS, "total_pixels")
SETTINGS = {"image": IMAGE_SETTINGS, "video": VIDEO_SETTINGS}
SOURCES = {
    "image": ("image", "image_url", "url", "path", "base64", "value"),
    "video": ("video", "url", "path", "value"),
}
ROW_KEYS = ("messages", "images", "videos", "tools", "prompt", "completion", "id", "source")
REASONING_NAMES = ("reasoning", "thinking")  # other names of reasoning_content


@dataclass(frozen=True, slots=True)
class Example:
    """One training conversation. `images[k]` belongs to the k-th `{"type": "image"}` part, in order of appearance."""

    messages: list[Message]
    images: list[Any] = field(default_factory=list)  # sources that media.open_image takes; opened by the collator
    id: str = ""
    source: str = ""
    videos: list[Any] = field(default_factory=list)  # paths, or lists of frames; `videos[k]` as for images
    tools: list[Any] = field(default_factory=list)  # JSON schemas, for the chat template


@dataclass(frozen=True, slots=True)
class Sample:
    """One evaluation problem: the prompt, its images, and the record that a scorer needs."""

    id: str
    messages: list[Message]
    images: list[Any]
    benchmark: str
    split: str
    record: dict[str, Any] = field(default_factory=dict)  # question, choices, unit, precision, gold_answer ...
    groups: dict[str, str | tuple[str, ...]] = field(
        default_factory=dict
    )  # what the report breaks accuracy down by; several labels: a tuple
    cluster: str | None = None  # samples of one problem (versions, variants) share it; None: the id


def text_of(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    """The text of a message's content, its media parts left out."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def is_trained(message: Mapping[str, Any]) -> bool:
    """Whether a message's tokens are targets: an assistant's, unless it says `"train": False`."""
    return message["role"] == "assistant" and message.get("train", True) is not False


def media_settings(messages: Iterable[Message], kind: str) -> list[dict[str, Any]]:
    """What each part of one kind asks for its medium: all that it holds beside its type."""
    return [{key: value for key, value in part.items() if key != "type"} for part in media_parts(messages, kind)]


def check_messages(messages: Any, *, where: str) -> list[Message]:
    """Return copies of the messages with known keys and roles, absent values taken out; raise RowError naming `where`."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RowError(f"{where}: expected a non-empty list of messages, found {brief(messages)}.")
    return [_check_message(message, f"{where}, message {k}") for k, message in enumerate(messages)]


def _check_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping) or "role" not in message or not {"content", "tool_calls"} & set(message):
        raise RowError(f"{where}: expected keys 'role' and 'content', found {brief(message)}.")
    known = {key: value for key, value in message.items() if value is not None}  # tables fill up absent keys with None
    for name in REASONING_NAMES:
        if name in known:
            known.setdefault("reasoning_content", known.pop(name))
    for key in known:
        if key not in MESSAGE_KEYS:
            raise RowError(
                f"{where}: unknown key {key!r}.{nearest(str(key), MESSAGE_KEYS)} Known: {', '.join(MESSAGE_KEYS)}."
            )
    role, content = known.get("role"), known.get("content", "" if known.get("tool_calls") else None)
    if role not in ROLES:
        raise RowError(f"{where}: unknown role {role!r}. Expected one of {list(ROLES)}.")
    if not isinstance(content, str):
        content = [_check_part(part, where) for part in _parts(content, where)]
    _check_ours(known, where)
    _check_calls(known, where)
    return {**known, "content": content}


def _check_ours(message: Mapping[str, Any], where: str) -> None:
    given = [key for key in (*OURS, "reasoning_content", "tool_calls") if key in message]
    if given and message["role"] != "assistant":
        raise RowError(f"{where}: {given[0]!r} belongs to an assistant's message, found one of the {message['role']}.")
    if not isinstance(message.get("train", True), bool):
        raise RowError(f"{where}: train must be true or false, found {message['train']!r}.")
    weight = message.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise RowError(f"{where}: weight must be a finite number above 0, found {weight!r}. For none: 'train': False.")
    objective = message.get("objective")
    if objective is not None and not (isinstance(objective, str) and objective in OBJECTIVES):
        raise RowError(
            f"{where}: unknown objective {objective!r}.{nearest(str(objective), OBJECTIVES)} Known: {', '.join(OBJECTIVES)}."
        )


def _check_calls(message: Mapping[str, Any], where: str) -> None:
    if not isinstance(message.get("reasoning_content", ""), str):
        raise RowError(f"{where}: reasoning_content must be a string, found {brief(message['reasoning_content'])}.")
    calls = message.get("tool_calls", [])
    if not isinstance(calls, (list, tuple)) or not all(map(_is_call, calls)):
        raise RowError(
            f"{where}: tool_calls must be a list of {{'function': {{'name': ..., 'arguments': ...}}}} (or of name and "
            f"arguments alone), found {brief(calls)}."
        )


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str) and bool(function["name"].strip())


def _parts(content: Any, where: str) -> Sequence[Any]:
    if not isinstance(content, (list, tuple)):
        raise RowError(f"{where}: content must be a string or a list of parts, found {brief(content)}.")
    return content


def _check_part(part: Any, where: str) -> dict[str, Any]:
    """A part in our form: its kind, its source under the kind's own name, its settings."""
    known = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    kind = {"image_url": "image"}.get(str(known.get("type")), str(known.get("type")))
    if kind == "text" and isinstance(words := known.get("text", known.get("value")), str):
        return {"type": "text", "text": words}
    if kind not in SETTINGS:
        raise RowError(
            f"{where}: expected parts {{'type': 'text', 'text': ...}}, {{'type': 'image'}} or {{'type': 'video'}}, found "
            f"{brief(part)}."
        )
    sources = [key for key in SOURCES[kind] if key in known]
    unknown = sorted(set(known) - {"type", *sources, *SETTINGS[kind]})
    if unknown or len(sources) > 1:
        raise RowError(
            f"{where}: expected a part of type {kind!r} with one source at most ({', '.join(SOURCES[kind])}) and the settings "
            f"{', '.join(SETTINGS[kind])}, found {(unknown or sources)[0]!r} in {brief(part)}."
        )
    checked: dict[str, Any] = {"type": kind}
    for key in SETTINGS[kind]:
        value = known.get(key)
        if value is None:
            continue
        number = math.nan if isinstance(value, (bool, str)) else _number(value)
        if not 0 <= number < math.inf or (number == 0 and key != "video_start"):
            raise RowError(f"{where}: {key} must be a finite number above 0, found {value!r}.")
        checked[key] = int(number) if number == int(number) else number
    if sources:
        source = known[sources[0]]
        source = source.get("url") if sources[0] == "image_url" and isinstance(source, Mapping) else source
        checked[kind] = f"data:;base64,{source}" if sources[0] == "base64" else source
    return checked


def _number(value: Any) -> float:
    """A number of any library as a float; nan for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def as_example(row: Example | Mapping[str, Any], *, where: str = "example") -> Example:
    """Check a row and return an Example with its media placed. The input is not mutated.

    A row is an Example, `{"messages": [...], "images": [...], "videos": [...], "tools": [...]}` (all but the first may be
    left out), or `{"prompt": ..., "completion": ..., "images": [...]}` with a string or messages in each, of which only the
    completion is trained. Raises RowError naming the row.
    """
    if not isinstance(row, (Example, Mapping)):
        raise RowError(f"{where}: expected an Example or a dict with 'messages', found {brief(row)}.")
    fields = dict(row) if isinstance(row, Mapping) else {s: getattr(row, s) for s in Example.__slots__}
    fields = {key: value for key, value in fields.items() if value is not None}  # as tables give absent columns
    identity = str(fields.get("id", ""))
    name = identity or where
    if "messages" not in fields and {"prompt", "completion"} <= set(fields):
        fields["messages"] = prompt_and_completion(fields["prompt"], fields["completion"], name)
    if "messages" not in fields:
        removed = not fields or "input_ids" in fields  # by a Trainer, before we saw it
        raise RowError(
            f"{where}: expected a key 'messages' (or 'prompt' and 'completion'), found {sorted(fields)}."
            + (
                " In a Trainer: set remove_unused_columns=False; in TRL's SFTTrainer also "
                "dataset_kwargs={'skip_prepare_dataset': True}."
                if removed
                else ""
            )
        )
    lost = sorted({"image", "video", "audio", "audios"} & set(fields))
    if lost:
        raise RowError(f"{name}: media are given as lists under 'images' and 'videos', found {lost[0]!r}.")
    for key, value in fields.items():
        if key not in ROW_KEYS and (meant := _misspelt(str(key))):
            raise RowError(f"{name}: unknown key {key!r}. Did you mean {meant!r}? Rename it, or take it out.")
        if key not in ROW_KEYS and not fields.get("images") and is_picture(value):
            raise RowError(
                f"{name}: unknown key {key!r}, which holds pictures. Give them as a list under 'images', or take it out."
            )
    messages = check_messages(fields["messages"], where=name)
    media: dict[str, list[Any]] = {}
    for kind in SETTINGS:
        listed = _listed(fields.get(f"{kind}s"), f"{name}: media are given as a list under '{kind}s', found {kind}s =")
        inline = [part[kind] for part in media_parts(messages, kind) if kind in part]
        if inline and listed:
            raise RowError(f"{name}: {kind}s both inside the messages and under '{kind}s'. Give them in one place.")
        if inline and len(inline) < len(media_parts(messages, kind)):
            raise RowError(f"{name}: some {kind} parts name a source and some do not. Give each its own, or none.")
        media[kind] = inline or listed
    messages = [_without_sources(message) for message in messages]
    messages, media["image"], _ = read_numbered(messages, media["image"], where=name)
    messages = place_media(messages, len(media["image"]), len(media["video"]), where=name)
    tools = _listed(fields.get("tools"), f"{name}: tools must be a list of JSON schemas, found")
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(f"{name}: tools must be a list of JSON schemas, found {brief(tools)}.")
    return Example(
        messages, media["image"], id=identity, source=str(fields.get("source", "")), videos=media["video"], tools=tools
    )


def _listed(value: Any, found: str) -> list[Any]:
    """A list, tuple, one-dimensional array or None as a list. Raises RowError beginning with `found`."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)) or getattr(value, "ndim", None) == 1:
        return list(value)
    raise RowError(f"{found} {brief(value)}.")


def is_picture(value: Any) -> bool:
    """Whether a column's value looks like a picture, or a list of some: by its type, or by a file's ending."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(is_picture, value))
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes)
    if isinstance(value, str):
        return len(value) < 1024 and value.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"))
    return hasattr(value, "getpixel")


@lru_cache(maxsize=1024)
def _misspelt(key: str) -> str:
    """The key of a row that another one is meant to be, if it is one letter or so away; other columns are none of ours."""
    return next(
        iter(difflib.get_close_matches(key, ROW_KEYS[:-2], n=1, cutoff=0.82)), ""
    )  # of ours that must not be lost


def _without_sources(message: Message) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return message
    return {**message, "content": [{k: v for k, v in part.items() if k not in ("image", "video")} for part in content]}


def prompt_and_completion(prompt: Any, completion: Any, where: str) -> list[Any]:
    """Messages of a prompt+completion row: what the prompt's assistant said is context, not a target."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answered = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    for name, part in (("prompt", asked), ("completion", answered)):
        if not isinstance(part, (list, tuple)) or not all(isinstance(m, Mapping) for m in part):
            raise RowError(f"{where}: {name} must be a string or a list of messages, found {brief(part)}.")
    context = [{**m, "train": False} if m.get("role") == "assistant" else m for m in asked]
    return [*context, *answered]


def unroll(row: Example | Mapping[str, Any]) -> list[Example]:
    """One example per trained assistant turn of a row (as as_example takes it), each ending with it and training it alone.

    For chat templates that drop the reasoning of earlier turns: unrolled, every turn is trained as it is at inference.
    """
    example, unrolled = as_example(row), []
    for k, message in enumerate(example.messages):
        if is_trained(message):
            before = [{**m, "train": False} if is_trained(m) else m for m in example.messages[:k]]
            messages = [*before, message]
            images, videos = (len(media_parts(messages, kind)) for kind in ("image", "video"))
            unrolled.append(
                replace(example, messages=messages, images=example.images[:images], videos=example.videos[:videos],
                        id=f"{example.id}#{k}")
            )  # fmt: skip
    return unrolled


def brief(value: Any) -> str:
    """A value's type and first characters, for error messages."""
    text = f"{len(value)} bytes" if isinstance(value, (bytes, bytearray)) else repr(value)
    text = text if len(text) <= 120 else text[:117] + "..."
    return f"{type(value).__name__} {text}"
