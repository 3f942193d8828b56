"""Recipes: a recipe card and a data folder in, training Examples and an exact account of every row out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_dft.accounting import Accounting
from vlm_dft.cards import find_card, read_card
from vlm_dft.chat import MARKERS, Example, as_example, count_markers, unroll
from vlm_dft.errors import CardError, RowError
from vlm_dft.mixture_cards import check_row_rules, is_mixture_file, read_mixture, sources_in
from vlm_dft.prepared import is_prepared, open_prepared, prepared_card
from vlm_dft.prompts import prompt_text
from vlm_dft.rows import Row, fill, locate, locate_images, read_rows, source_root

REQUIRED = ("description", "licence", "source")
OPTIONAL = (
    "paper", "rows", "image", "images", "image_root", "prompt", "response", "system", "unit", "options", "messages",
    "videos", "unroll", "bad_rows", "duplicates", "training", "benchmark", "notes",
)  # fmt: skip
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "bot": "assistant", "assistant": "assistant",
         "system": "system", "tool": "tool", "observation": "tool"}  # fmt: skip
MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
MAX_SOURCES = 50  # that are logged, gauged and watched one by one
IMAGE_COLUMNS, VIDEO_COLUMNS = ("images", "image"), ("videos", "video")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a row, or of one of the examples it is unrolled into: an example, or why it is none."""

    id: str
    example: Example | None = None
    dropped: str = ""  # why a row that is right is not used: a filter of the card, its length
    error: RowError | None = None  # what is wrong with it
    changed: tuple[str, ...] = ()  # what was done to it: "answer appended"


def is_bare_file(name: str) -> bool:
    """Whether a recipe's name is the path of a JSON file of conversations rather than a card."""
    return Path(name).suffix in (".json", ".jsonl")


def read_recipe(name: str, within: Sequence[Path] = ()) -> dict[str, Any]:
    """A recipe card by name or path, or the card that a bare .json / .jsonl file of conversations implies.

    A mixture's holds those of its entries (mixture_cards.py). within: the mixtures' files that led here.
    """
    if is_bare_file(name):
        path = Path(name)
        if not path.is_file():
            raise CardError(f"No file of conversations at {name!r}.")
        return {
            "name": path.stem,
            "description": f"Conversations in {path.name}",
            "licence": "not stated",
            "source": {"files": [str(path.resolve())]},  # the images alone are relative to --data
            "messages": None,
            "images": None,
            "data": str(path.parent),
        }
    if is_prepared(name):
        return prepared_card(name)
    if is_mixture_file(find_card("recipe", name)):
        return read_mixture(name, read_recipe, within)
    card = read_card("recipe", name, required=REQUIRED, optional=OPTIONAL)
    if isinstance(card["source"], Mapping) and "prepared" in card["source"]:
        return {**prepared_card(card["source"]["prepared"]), **card}  # whose rows are examples already
    if ("messages" in card) == ("prompt" in card and "response" in card):
        raise CardError(f"Recipe {name!r}: give either messages, or prompt and response.")
    if not isinstance(card.get("unroll", False), bool):
        raise CardError(f"Recipe {name!r}: unroll must be true or false, found {card['unroll']!r}.")
    check_row_rules(card)
    if not isinstance(card["source"], Mapping):
        raise CardError(f"Recipe {name!r}: source must be a mapping, found {card['source']!r}.")
    return card


def recipe_root(card: Mapping[str, Any], data: str | None) -> Path | None:
    """The folder of the recipe's files, checked to hold them. Raises CardError."""
    where = f"Recipe {card['name']!r}"
    if "prepared" in card["source"]:
        return None
    root = source_root(card["source"], data or card.get("data"), where=where)
    if root is None and card.get("image_root"):
        raise CardError(f"{where} takes its images from local files. Say where they are: --data DIR (or DATA=DIR).")
    return root


def check_places(card: Mapping[str, Any], data: str | None) -> None:
    """Check that the files of a recipe, or of every source of a mixture, are there. Raises CardError."""
    for one in sources_in(card, data):
        recipe_root(one.card, one.data)


def outcomes(
    card: Mapping[str, Any], data: str | None, *, start: int = 0, limit: int | None = None
) -> Iterator[Outcome]:
    """What becomes of each row from place `start` on, in file order; of `limit` rows at most. Nothing of them is raised."""
    root = recipe_root(card, data)
    for row in places(card, root, start=start, limit=limit):
        yield from [row] if isinstance(row, Outcome) else outcomes_of(card, row, root)


def places(
    card: Mapping[str, Any], root: Path | None, *, start: int = 0, limit: int | None = None
) -> Iterator[Row | Outcome]:
    """Every place of a recipe's files in order: its raw row, or the Outcome of one that cannot be read."""
    if "prepared" in card["source"]:
        for example in open_prepared(card["source"]["prepared"]).between(
            start, None if limit is None else start + limit
        ):
            yield Outcome(example.id, example)
        return
    wrong: list[Outcome] = []
    rows = read_rows(
        card["source"], root, where=f"Recipe {card['name']!r}", start=start,
        broken=lambda row_id, error: wrong.append(Outcome(row_id, error=error)),
    )  # fmt: skip
    left = math.inf if limit is None else limit
    ended = False
    while left > 0 and not ended:
        row = next(rows, None)
        ended = row is None
        for place in [*wrong, *([] if row is None else [row])][: None if left == math.inf else int(left)]:
            yield place
            left -= 1
        wrong.clear()


def outcomes_of(card: Mapping[str, Any], row: Row, root: Path | None) -> list[Outcome]:
    """What becomes of a raw row: one outcome, or one for each answer where the card unrolls. Raises nothing of the row's."""
    try:
        found = example_of(card, row, root)
        made = (card.get("unroll") and unroll(found)) or [found]  # one without an answer is refused when it is measured
    except RowError as error:
        return [Outcome(str(row["id"]), error=error)]
    return [Outcome(example.id, example) for example in made]


def load_recipe(
    card: Mapping[str, Any], data: str | None, *, limit: int | None = None
) -> tuple[list[Example], Accounting]:
    """Read a recipe's rows into Examples in file order. Raises RowError naming the first row that cannot be one."""
    root = recipe_root(card, data)
    account = Accounting(str(card["name"]))
    examples: list[Example] = []
    if "prepared" in card["source"]:
        examples = [found.example for found in outcomes(card, data, limit=limit) if found.example is not None]
        account.read = len(examples)
        return examples, account
    for k, row in enumerate(read_rows(card["source"], root, where=f"Recipe {card['name']!r}")):
        if limit is not None and k >= limit:
            break
        found = example_of(card, row, root)
        made = (card.get("unroll") and unroll(found)) or [found]  # one without an answer is refused when it is measured
        account.read += len(made)
        examples += made
    if not examples:
        raise RowError(f"Recipe {card['name']!r} has no rows.")
    sources = {example.source for example in examples}
    if len(sources) > MAX_SOURCES:  # a column of that name that holds something else, an address say
        examples = [replace(example, source=str(card["name"])) for example in examples]
        account.notes[f"{len(sources):,} different sources are too many to tell apart (at most {MAX_SOURCES})"] = len(
            examples
        )
    return examples, account


def example_of(card: Mapping[str, Any], row: Mapping[str, Any], root: Path | None) -> Example:
    """The Example of a raw row, its media located. Raises RowError naming the row."""
    where = f"{card['name']} row {row['id']}"
    folder = root / card["image_root"] if root is not None and card.get("image_root") else root
    if "messages" in card:
        fields = _conversation(card, row, where)
    else:
        answer = fill(card["response"], row, where=where).strip()
        if not answer:
            raise RowError(f"{where}: the response is empty.")
        asked = {"role": "user", "content": prompt_text(card, row, where=where)}
        messages = [asked, {"role": "assistant", "content": answer}]
        fields = {"messages": messages, "images": locate_images(card, row, folder, where=where, remote=True)}
    if card.get("system"):
        fields["messages"] = [{"role": "system", "content": card["system"]}, *fields["messages"]]
    found = as_example({**fields, "id": where}, where=where)
    own = row.get("source") if "messages" in card else None  # a mixture in one file tells its sources apart itself
    return replace(
        found, id=str(row["id"]), source=own if isinstance(own, str) and own.strip() else str(card["name"]),
        images=locate(found.images, folder, where=where, remote=True),
        videos=locate(found.videos, folder, where=where, kind="video"),
    )  # fmt: skip


def _conversation(card: Mapping[str, Any], row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Messages, images, videos and tools of a row of role/content or from/value turns, for as_example to check."""
    column = card["messages"] or next((c for c in MESSAGE_COLUMNS if c in row), None)
    if column is None or not isinstance(row.get(column), Sequence):
        raise RowError(
            f"{where}: no conversation. Expected one of the columns {', '.join(MESSAGE_COLUMNS)}, found {', '.join(row)}."
        )
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    messages += [_turn(turn, f"{where}, turn {k}") for k, turn in enumerate(row[column])]
    fields: dict[str, Any] = {"messages": messages, "tools": _tools(row.get("tools"), where)}
    for kind, columns in (("image", IMAGE_COLUMNS), ("video", VIDEO_COLUMNS)):
        own = card.get(f"{kind}s") or next((c for c in columns if row.get(c)), None)
        named = row.get(own) if own else None
        fields[f"{kind}s"] = list(named) if isinstance(named, (list, tuple)) else [named] if named else []
        inline = any(part.get("type") in (kind, f"{kind}_url") for m in messages if isinstance(m["content"], list)
                     for part in m["content"] if isinstance(part, Mapping))  # fmt: skip
        if not fields[f"{kind}s"] and not inline and count_markers(messages, kind):
            raise RowError(
                f"{where}: {count_markers(messages, kind)} {MARKERS[kind]} markers but no {kind}s. Expected them in the column "
                f"{own or ' or '.join(columns)!r}; the row has {', '.join(row)}."
            )
    return fields


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """One turn in our form: from / value become role and content; the other keys are for as_example to check."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"{where}: unknown role {role!r}. Known: {', '.join(ROLES)}.")
    content = turn.get("content", turn.get("value"))
    if content is None and not turn.get("tool_calls"):
        raise RowError(f"{where}: content must be a string or a list of parts with a type, found None.")
    kept = {key: value for key, value in turn.items() if key not in ("from", "value", "id")}
    return {**kept, "role": ROLES[role], "content": "" if content is None else content}


def _tools(tools: Any, where: str) -> list[Any]:
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
