"""Recipes: a recipe card and a data folder in, training Examples and an exact account of every row out."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_dft.accounting import Accounting, Faults
from vlm_dft.archives import image_folder
from vlm_dft.cards import find_card, list_cards, nearest, read_card
from vlm_dft.chat import Example, unroll
from vlm_dft.errors import CardError, RowError
from vlm_dft.hub_sets import DATA, beside_pictures
from vlm_dft.mixture_cards import check_row_rules, is_mixture_file, read_mixture, sources_in
from vlm_dft.prepared import is_prepared, open_prepared, prepared_card
from vlm_dft.recipe_cards import OPTIONAL, REQUIRED, check_recipe
from vlm_dft.response_text import ALL_KEPT
from vlm_dft.row_examples import filtered, made_of, where_of
from vlm_dft.row_formats import Detected, agree, detect, format_of
from vlm_dft.rows import Row, files_of, read_rows, source_root

SOON = 1000  # rows after which a column to filter by that none of them has is the card's error
STORED_KEYS = (  # of a card of a prepared set
    "name", "description", "licence", "source", "paper", "rows", "notes", "benchmark", "training", "bad_rows", "duplicates",
)  # fmt: skip
MAX_SOURCES = 50  # that are logged, gauged and watched one by one


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
            "data": str(path.parent),
            "tags": ALL_KEPT,  # nobody can declare them, and the file is taken as it is
        }
    if is_prepared(name):
        return prepared_card(name)
    _check_is_card(name)
    if is_mixture_file(find_card("recipe", name)):
        return read_mixture(name, read_recipe, within)
    card = read_card("recipe", name, required=REQUIRED, optional=OPTIONAL)
    if isinstance(card["source"], Mapping) and "prepared" in card["source"]:
        return _stored_card(card, find_card("recipe", name).parent)
    check_recipe(card, where=f"Recipe {name!r}")
    check_row_rules(card)
    return {**card, "source": beside_pictures(card["source"])} if card.get("image_root") else card


def _stored_card(card: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A card of a prepared set, whose rows are examples already. folder: of the card's file, from which a path may start."""
    place = card["source"]["prepared"]
    if not isinstance(place, str) or not place:
        raise CardError(
            f"Recipe {card['name']!r}: source.prepared must be a folder or a URL that was prepared, found {place!r}."
        )
    if late := [key for key in card if key not in STORED_KEYS]:
        raise CardError(
            f"Recipe {card['name']!r}: {', '.join(late)} cannot be said of a prepared set, whose rows are examples already. Say it in the card "
            "that is prepared, or (objective, loss_weight) in a mixture's entry."
        )
    if "://" not in place and is_prepared(folder / place):
        place = str(folder / place)
    return {**prepared_card(place), **card, "source": {"prepared": place}}


def _check_is_card(name: str) -> None:
    """Refuse a folder or a file of data where a card is expected, and say the card that would do. Raises CardError."""
    path = Path(name).expanduser()
    if any(path.glob(".preparing*")):
        open_prepared(name)  # says that it was begun and not ended
    if path.is_dir() and name not in list_cards("recipe"):
        inside = (Path(folder) / file for folder, _, files in os.walk(path) for file in sorted(files))
        first = next((file for file in inside if file.suffix in DATA), None)
        files = "..." if first is None else str(first.relative_to(path).with_name(f"*{first.suffix}"))
        what = "a folder"
    elif path.is_file() and path.suffix not in (".yaml", ".yml"):
        what, files, path = "a file of data", path.name, path.parent
    else:
        return
    raise CardError(
        f"{name!r} is {what}, not a recipe. Write a card, a file such as own.yaml, with three lines:\n  description: ...\n  licence: ...\n"
        f'  source: {{files: ["{files}"]}}\nand give own.yaml as the recipe, with --data {path} (or DATA={path}). '
        "data_recipes/README.md says what else a card can say."
    )


def recipe_root(card: Mapping[str, Any], data: str | None) -> Path | None:
    """The folder of the recipe's files, checked to hold them. Raises CardError."""
    where = f"Recipe {card['name']!r}"
    if "prepared" in card["source"]:
        return None
    root = source_root(card["source"], data or card.get("data"), where=where)
    if root is None and card.get("image_root"):
        raise CardError(f"{where} takes its images from local files. Say where they are: --data DIR (or DATA=DIR).")
    if root is not None and card.get("image_root"):
        image_folder(root, card["image_root"], where=where)
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
    """Every place of a recipe's files in order: its raw row, or the Outcome of one that cannot be read or is in another format.

    Raises CardError where the rows lack a column that the card relies on.
    """
    if "prepared" in card["source"]:
        end = None if limit is None else start + limit
        for example in open_prepared(card["source"]["prepared"]).between(start, end):
            yield Outcome(example.id, example)
        return
    first = None
    if start:  # the first row says the format, wherever reading goes on
        first = next((found for row in _read(card, root, 0) if (found := _look_at(card, row))), None)
    needed = {*(card.get("keep") or {}), *(card[key] for key in ("images", "videos") if card.get(key))}
    unseen = needed if not start and limit is None else set()  # some rows may lack them, not all
    left = math.inf if limit is None else limit
    for k, place in enumerate(_read(card, root, start)):
        if k >= left:
            return
        if k == SOON and first is not None and (lacking := unseen & set(card.get("keep") or {})):
            raise _no_such_column(card, sorted(lacking)[0], first, f"none of the first {SOON:,} rows")
        if not isinstance(place, Outcome):
            unseen -= set(place)
            if first is None:
                first = _look_at(card, place)
            elif (error := _disagrees(card, first, place)) is not None:
                place = Outcome(str(place["id"]), error=error)
        yield place
    if unseen and first is not None:
        raise _no_such_column(card, sorted(unseen)[0], first, "no row")


def _no_such_column(card: Mapping[str, Any], name: str, first: _First, rows: str) -> CardError:
    return CardError(
        f"Recipe {card['name']!r} names a column {name!r}, which {rows} has.{nearest(name, first.row)} Columns of the first row: "
        f"{', '.join(map(str, first.row))}."
    )


def _read(card: Mapping[str, Any], root: Path | None, start: int) -> Iterator[Row | Outcome]:
    """The rows from place `start` on; an Outcome for each that cannot be read."""
    wrong: list[Outcome] = []
    rows = read_rows(
        card["source"], root, where=f"Recipe {card['name']!r}", start=start,
        broken=lambda row_id, error: wrong.append(Outcome(row_id, error=error)),
    )  # fmt: skip
    ended = False
    while not ended:
        row = next(rows, None)
        ended = row is None
        yield from wrong
        wrong.clear()
        if row is not None:
            yield row


@dataclass(frozen=True, slots=True)
class _First:
    """What the first row of a recipe says of the others."""

    row: Row
    format: Detected | None  # None: the card's own prompt and response


def _look_at(card: Mapping[str, Any], row: Row | Outcome) -> _First | None:
    """The first row, if it can be told what it is. Raises CardError where it lacks a column that the card names as unverified."""
    if isinstance(row, Outcome):
        return None
    for column in card.get("columns") or []:
        if column not in row:
            raise CardError(
                f"Recipe {card['name']!r} relies on a column {column!r}, which nobody could verify, and row {row['id']} has none."
                f"{nearest(column, row)} Columns found: {', '.join(map(str, row))}. Copy the card and name the right one."
            )
    try:
        return _First(row, None if "prompt" in card else format_of(card, row, where=where_of(card, row)))
    except RowError:
        return None  # said of this row; the next one may tell


def _disagrees(card: Mapping[str, Any], first: _First, row: Row) -> RowError | None:
    if first.format is None or "format" in card:
        return None
    try:
        found = detect(row, where=where_of(card, row), column=card.get("messages"))
    except RowError:
        return None  # example_of says so
    if agree(first.format, found):
        return None
    return RowError(
        f"{where_of(card, row)}: its format is {found.name} ({found.why}), but that of row {first.row['id']}, the first, is "
        f"{first.format.name} ({first.format.why}). Expected one format in a source: divide it, or force one by `format:` in a card.",
        "of another format than the first row",
    )


def said_source(card: Mapping[str, Any], data: str | None) -> str:
    """Where a recipe's rows are read from: "2 files: a.jsonl, b.jsonl", "the hub: owner/name, split train"."""
    source, root = card["source"], recipe_root(card, data)
    if "prepared" in source:
        return f"prepared before: {source['prepared']}"
    files = [name for _, name in files_of(source, root, where=f"Recipe {card['name']!r}")]
    if not files:
        return (
            f"the hub: {source['hub']}, split {source.get('split', 'train')}, revision {source.get('revision', 'main')}"
        )
    shown = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    return f"{len(files)} file{'s' * (len(files) > 1)}: {shown}" + (
        f" (a copy of {source['hub']})" if "hub" in source else ""
    )


def said_format(card: Mapping[str, Any], data: str | None) -> str:
    """How a recipe's rows are read, and why, by its first row: "conversations: column 'conversations' holds turns of ..."."""
    if "prepared" in card["source"]:
        return "examples"
    if "prompt" in card:
        return "the card's own: its prompt and response"
    root = recipe_root(card, data)
    for row in _read(card, root, 0):
        if (first := _look_at(card, row)) and first.format:
            return f"{first.format.name}: {first.format.why}"
    return "unknown: no row says it"


def outcomes_of(card: Mapping[str, Any], row: Row, root: Path | None) -> list[Outcome]:
    """What becomes of a raw row: one outcome, or one for each answer where the card unrolls. Raises nothing of the row's."""
    try:
        if why := filtered(card, row):
            return [Outcome(str(row["id"]), dropped=why)]
        found, changed = made_of(card, row, root)
        made = (card.get("unroll") and unroll(found)) or [found]  # one without an answer is refused when it is measured
    except RowError as error:
        return [Outcome(str(row["id"]), error=error)]
    return [Outcome(example.id, example, changed=changed) for example in made]


def load_recipe(
    card: Mapping[str, Any], data: str | None, *, limit: int | None = None
) -> tuple[list[Example], Accounting]:
    """Read a recipe's rows into Examples in file order, every row accounted for.

    Raises RowError for rows that cannot be used, once all were looked at, unless the card says `bad_rows: drop`.
    """
    root = recipe_root(card, data)
    account = Accounting(str(card["name"]))
    examples: list[Example] = []
    faults = Faults()
    for place in places(card, root, limit=limit):
        for outcome in [place] if isinstance(place, Outcome) else outcomes_of(card, place, root):
            account.read += 1
            for effect in outcome.changed:
                account.change(effect, outcome.id)
            if outcome.example is not None:
                examples.append(outcome.example)
            elif outcome.error is None:
                account.drop(outcome.dropped, outcome.id)
            elif card.get("bad_rows", "refuse") == "drop":
                account.drop(outcome.error.reason, outcome.id)
            else:
                faults.add(outcome.error, outcome.id)
    faults.looked_at = account.read
    faults.refuse()
    if not account.read:
        raise RowError(f"Recipe {card['name']!r} has no rows.")
    if not examples:
        why = "; ".join(f"{found.rows:,} {reason}" for reason, found in account.dropped.items())
        raise RowError(f"Recipe {card['name']!r}: none of its {account.read:,} rows is used: {why}.")
    sources = {example.source for example in examples}
    if len(sources) > MAX_SOURCES:  # a column of that name that holds something else, an address say
        examples = [replace(example, source=str(card["name"])) for example in examples]
        account.notes[f"{len(sources):,} different sources are too many to tell apart (at most {MAX_SOURCES})"] = len(
            examples
        )
    return examples, account


def example_of(card: Mapping[str, Any], row: Mapping[str, Any], root: Path | None) -> Example:
    """The Example of a raw row, its media located; filters are not asked. Raises RowError naming the row."""
    return made_of(card, row, root)[0]
