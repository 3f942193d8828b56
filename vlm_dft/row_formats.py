"""Row formats: a raw row in; which format its columns are in, and why, and its messages and media in our form out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_dft.cards import nearest
from vlm_dft.chat import brief, prompt_and_completion
from vlm_dft.columns import column_of, is_nan, list_of, text_of
from vlm_dft.errors import CardError, RowError

Row = Mapping[str, Any]
Message = dict[str, Any]
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "bot": "assistant", "assistant": "assistant",
         "system": "system", "tool": "tool", "observation": "tool"}  # fmt: skip
CHAT_COLUMNS = ("messages", "conversations", "conversation", "texts", "message")
ASKED, ANSWERED = ("user", "human"), ("assistant", "gpt", "bot")  # keys of a pair of turns
MEDIA_COLUMNS = {"image": ("images", "image"), "video": ("videos", "video")}
INLINE_IMAGE = re.compile(r"<img>(.*?)</img>", re.DOTALL)  # Qwen-VL's and ms-swift's: the source within the text


@dataclass(frozen=True, slots=True)
class Detected:
    """The format of a row, and what says so."""

    name: str
    why: str
    column: str = ""  # that holds the conversation, in a format of conversations


@dataclass(frozen=True, slots=True)
class Format:
    """A format that is told by its columns."""

    columns: tuple[str, ...]
    read: Callable[[Row, str], list[Message]]


def detect(row: Row, *, where: str, column: str | None = None) -> Detected:
    """The format of a row, by its columns; `column`: the one that holds the conversation. Raises RowError for none and several.

    A conversation says itself who speaks, so one goes before columns that could be a question and an answer.
    """
    if column is not None and (column not in row or not _turns(row[column])):
        raise _no_conversation(row, where, [column])
    chats = [
        found for name in ([column] if column else CHAT_COLUMNS) if name in row and (found := _conversation(row, name))
    ]
    fits = chats or [Detected(name, f"columns {_listed(form.columns)}") for name, form in COLUMN_FORMATS.items()
                     if all(needed in row for needed in form.columns)]  # fmt: skip
    if len(fits) == 1:
        return fits[0]
    if not fits and any(name in row for name in CHAT_COLUMNS):
        raise _no_conversation(row, where, CHAT_COLUMNS)
    if not fits:
        raise RowError(
            f"{where}: no known row format. Columns found: {_listed(row)}. Say in a card which of them are the `prompt:` and the "
            f"`response:`, or rename them to those of a format: {', '.join(FORMATS)}.",
            "no known row format",
        )
    key = "`messages:` with the column" if chats else "`format:` with the name, or `prompt:` and `response:`"
    raise RowError(
        f"{where}: its columns fit {len(fits)} formats: {'; '.join(f'{fit.name} ({fit.why})' for fit in fits)}. Say which in a "
        f"card: {key}. Columns found: {_listed(row)}.",
        "columns fit several formats",
    )


def format_of(card: Mapping[str, Any], row: Row, *, where: str) -> Detected:
    """The format that the card says, checked against the row's columns, or the one detected. Raises RowError."""
    forced, column = card.get("format"), card.get("messages")
    if forced is None:
        return detect(row, where=where, column=column)
    if forced not in COLUMN_FORMATS:
        names = [column] if column else CHAT_COLUMNS
        for name in names:
            found = _conversation(row, name) if name in row else None
            if found is not None and forced in (found.name, _spelling(_turns(row[name]) or [], name)):
                return Detected(forced, f"the card says so; {found.why}", name)
        raise RowError(
            f"{where}: the card says format: {forced}, which is a column of {FORMATS[forced]}. Expected one named {' or '.join(names)}."
            f"{nearest(names[0], row)} Columns found: {_listed(row)}.",
            f"no column for format {forced}",
        )
    for needed in COLUMN_FORMATS[forced].columns:
        if needed not in row:
            raise RowError(
                f"{where}: the card says format: {forced}, but there is no column {needed!r}.{nearest(needed, row)} Columns found: "
                f"{_listed(row)}.",
                f"no column for format {forced}",
            )
    return Detected(forced, "the card says so")


def agree(first: Detected, other: Detected) -> bool:
    """Whether rows of two formats may stand in one source: the same, or two spellings of a conversation."""
    return first.name == other.name or not {first.name, other.name} & set(COLUMN_FORMATS)


def check_format(name: object, *, where: str) -> None:
    """Raise CardError for a name that is no format's."""
    if name not in FORMATS:
        raise CardError(f"{where}: unknown format {name!r}.{nearest(str(name), FORMATS)} Known: {', '.join(FORMATS)}.")


def messages_of(row: Row, form: Detected, *, where: str) -> list[Message]:
    """The messages of a row, in our form; their keys are for as_example to check. Raises RowError."""
    if form.name in COLUMN_FORMATS:
        return COLUMN_FORMATS[form.name].read(row, where)
    turns = _turns(row[form.column]) or []
    if form.name == "texts":
        made = [message for k, pair in enumerate(turns) for message in _pair(pair, f"{where}, turn {k}")]
    else:
        made = [turn_of(turn, f"{where}, turn {k}") for k, turn in enumerate(turns)]
    if form.name == "message" and made[-1]["role"] == "user" and _given(row.get("answer")):  # MM-Eureka's
        made.append({"role": "assistant", "content": text_of(row["answer"], "answer", where)})
    return [*_system(row), *made]


def media_of(card: Mapping[str, Any], row: Row, kind: str, *, where: str) -> list[Any]:
    """The sources in the row's column of images or videos: the card's; in a conversation else the usual ones. Nothing is opened.

    Raises RowError where the two usual columns hold different ones: neither is dropped unsaid.
    """
    own = card.get(f"{kind}s")
    columns: tuple[str, ...] = (own,) if own else () if "prompt" in card else MEDIA_COLUMNS[kind]
    found = {c: list_of(row[c]) for c in columns if _given(row.get(c))}
    if len(found) == 2 and len({repr(sources) for sources in found.values()}) == 2:
        raise RowError(
            f"{where}: columns {_listed(found)} hold different {kind}s. Say in a card which is meant: {kind}s: {next(iter(found))}.",
            f"two columns of {kind}s",
        )
    return next(iter(found.values()), [])


def inline_images(messages: list[Message]) -> tuple[list[Message], list[str]]:
    """`<img>source</img>` in what is asked made into a marker, and the sources in order."""
    sources: list[str] = []
    made = []
    for message in messages:
        content = message.get("content")
        if message["role"] != "assistant" and isinstance(content, str) and "<img>" in content:
            sources += [source.strip() for source in INLINE_IMAGE.findall(content)]
            message = {**message, "content": INLINE_IMAGE.sub("<image>", content)}
        made.append(message)
    return made, sources


def turn_of(turn: Any, where: str) -> Message:
    """One turn in our form: from / value become role and content; the other keys are for as_example to check."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"{where}: unknown role {role!r}. Known: {', '.join(ROLES)}.", "unknown role")
    content = turn.get("content", turn.get("value"))
    if (content is None or is_nan(content)) and not turn.get("tool_calls"):
        raise RowError(
            f"{where}: content must be a string or a list of parts with a type, found {content}.",
            f"a turn's content is {content}",
        )
    kept = {key: value for key, value in turn.items() if key not in ("from", "value", "id")}
    return {**kept, "role": ROLES[role], "content": "" if content is None else content}


def tools_of(tools: Any, where: str) -> list[Any]:
    """Tool schemas, as a list or as its JSON text."""
    try:
        found = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or []
    except json.JSONDecodeError as error:
        raise RowError(
            f"{where}: tools must be a list of schemas or its JSON, found {tools[:80]!r} ({error})."
        ) from error
    if not isinstance(found, (list, tuple)):
        raise RowError(f"{where}: tools must be a list of schemas, found {type(found).__name__}.")
    return list(found)


def _turns(value: Any) -> Sequence[Any] | None:
    """The turns in a column: a list, the JSON text of one, or lists of equal length by key; None for anything else and an empty one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    if (
        isinstance(value, Mapping)
        and len(value) > 1
        and all(isinstance(held, (list, tuple)) for held in value.values())
    ):
        if len({len(held) for held in value.values()}) > 1:
            return None
        value = [
            dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)
        ]  # a Sequence of `datasets`
    return value if isinstance(value, (list, tuple)) and value else None


def _conversation(row: Row, column: str) -> Detected | None:
    """The format of a column's conversation, by its first turn; None where it holds none."""
    turns = _turns(row[column])
    if turns is None:
        return None
    if isinstance(row[column], str):
        return Detected("message", f"column {column!r} is the JSON text of turns", column)
    name = _spelling(turns, column)
    held = {
        "texts": f"pairs of {_listed(turns[0])}",
        "conversations": "turns of from and value",
        "messages": "turns of role and content",
    }
    return None if name is None else Detected(name, f"column {column!r} holds {held[name]}", column)


def _spelling(turns: Sequence[Any], column: str) -> str | None:
    """The format of turns by the keys of the first."""
    keys = set(turns[0]) if turns and isinstance(turns[0], Mapping) else set()
    if keys & set(ASKED) and keys & set(ANSWERED):
        return "texts"
    if "from" in keys and "role" not in keys:
        return "conversations"
    return None if column == "texts" and not keys else "messages"  # a column of that name may hold anything


def _pair(pair: Any, where: str) -> list[Message]:
    """The two turns of {user, assistant}, or {human, assistant}; {user} alone is one."""
    made = []
    for names, role in ((("system",), "system"), (ASKED, "user"), (ANSWERED, "assistant")):
        key = next((name for name in names if isinstance(pair, Mapping) and pair.get(name) is not None), None)
        if key is not None:
            made.append({"role": role, "content": text_of(pair[key], key, where)})
        elif role != "system":
            raise RowError(
                f"{where}: expected a pair with {' or '.join(names)}, found {brief(pair)}.", "half a pair of turns"
            )
    return made


def _system(row: Row) -> list[Message]:
    return [{"role": "system", "content": row["system"]}] if _given(row.get("system")) else []


def _history(row: Row, where: str) -> list[Message]:
    """Earlier turns of ms-swift and Alpaca, [[question, answer], ...]; they are trained on too, as there."""
    made = []
    for k, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError(
                f"{where}: history must be a list of [question, answer], found {brief(pair)} at {k}.",
                "history malformed",
            )
        for role, value in zip(("user", "assistant"), pair, strict=True):
            made.append({"role": role, "content": text_of(value, "history", where)})
    return made


def _question_and_answer(
    asked: str, answered: str, *, more: str = "", chat: bool = False
) -> Callable[[Row, str], list[Message]]:
    """A reader of two columns. more: a third that goes under the question where it is not empty; chat: system and history."""

    def read(row: Row, where: str) -> list[Message]:
        question = text_of(column_of(row, asked, where=where), asked, where)
        if more and _given(row.get(more)):
            question += "\n" + text_of(row[more], more, where)
        answer = text_of(column_of(row, answered, where=where), answered, where)
        before = [*_system(row), *_history(row, where)] if chat else []
        return [*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    return read


def _prompt_and_completion(row: Row, where: str) -> list[Message]:
    for name in ("prompt", "completion"):
        if not _given(row[name]):
            raise RowError(
                f"{where}: column {name!r} is {'empty' if row[name] in ('', []) else row[name]}.", f"{name} is empty"
            )
    turns = prompt_and_completion(row["prompt"], row["completion"], where)
    return [turn_of(turn, f"{where}, turn {k}") for k, turn in enumerate(turns)]


def _given(value: Any) -> bool:
    """Whether a cell holds anything: not null, NaN, an empty text or list, a picture without bytes and path."""
    if isinstance(value, Mapping):
        return any(held is not None for held in value.values())
    return not (value is None or is_nan(value) or (isinstance(value, (str, list, tuple)) and not len(value)))


def _listed(names: Any) -> str:
    return ", ".join(map(str, names))


def _no_conversation(row: Row, where: str, names: Sequence[str]) -> RowError:
    held = next((f" Column {name!r} is {brief(row[name])}." for name in names if name in row), "")
    meant = nearest(names[0], row) if len(names) == 1 and names[0] not in row else ""
    return RowError(
        f"{where}: no conversation. Expected one of the columns {_listed(names)} with a list of turns, found {_listed(row)}.{held}{meant}",
        "no conversation",
    )


COLUMN_FORMATS: dict[str, Format] = {
    "prompt/completion": Format(("prompt", "completion"), _prompt_and_completion),
    "query/response": Format(("query", "response"), _question_and_answer("query", "response", chat=True)),
    "instruction/input/output": Format(
        ("instruction", "output"), _question_and_answer("instruction", "output", more="input", chat=True)
    ),
    **{
        f"{asked}/{answered}": Format((asked, answered), _question_and_answer(asked, answered))
        for asked in ("question", "problem")
        for answered in ("answer", "solution", "chosen", "response")
    },
}
"""Formats of a question and an answer in columns of their own, by name."""

FORMATS: dict[str, str] = {
    "messages": "turns of role and content",
    "conversations": "turns of from and value",
    "texts": "pairs {user, assistant}",
    "message": "turns as JSON text, answered by a column answer where they end in a question",
    **{name: _listed(form.columns) for name, form in COLUMN_FORMATS.items()},
}
"""Every format by the name that a card's `format:` takes -> what its columns hold."""
