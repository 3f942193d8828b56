"""Contamination: checked rows and benchmark cards in; which rows share pictures or questions with which items, out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from vlm_dft.benchmark_cards import OFFICIAL, form_of, read_benchmark
from vlm_dft.cards import list_cards
from vlm_dft.checking import Checked, LookAt
from vlm_dft.duplicates import Prints, as_pairs, look_alikes
from vlm_dft.errors import CardError, UserError
from vlm_dft.examining import examine
from vlm_dft.layouts import find_layout
from vlm_dft.sources import MediaAccess

SAME, LOOKS, TEXT = "same picture, same question", "look-alike picture, same question", "same question, no pictures"
CONTAMINATED = (SAME, TEXT)  # certain; LOOKS is to be looked at
PICTURE, LOOK = "same picture, another question", "look-alike picture, another question"
QUESTION = "same question, another picture"  # normal where questions are made from templates
OVERLAPS = (SAME, LOOKS, TEXT, PICTURE, LOOK, QUESTION)  # from strongest to weakest: a row is counted once a benchmark
LISTED = 5  # items named for a row of the weaker overlaps


@dataclass(slots=True)
class Items:
    """The items of a benchmark, as far as they are known again: no pictures, no texts."""

    name: str
    card: str  # the name or path that its card was found by
    data: str | None = None  # the folder that it was read from
    ids: list[tuple[str, str]] = field(default_factory=list)  # (split, id)
    places: list[int] = field(default_factory=list)  # in the split's files
    keys: list[tuple[int, ...]] = field(default_factory=list)
    pictured: list[bool] = field(default_factory=list)
    prints: Prints = field(default_factory=Prints)  # its rows are indices of ids
    unreadable: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Overlap:
    """A row of the recipe, and items of a benchmark that it shares something with."""

    row: int  # index into the checked rows
    items: tuple[int, ...]  # all of them where it is contaminated or suspected, else some
    count: int


def split_cards(card: Mapping[str, Any], data: str | None = None) -> dict[str, dict[str, Any]]:
    """Each split that a benchmark card chooses, as a recipe whose answer is the bare question, where the card says which column it is.

    A split in several files of variants is several recipes: "test, variant 3". `data` is the folder that each is in, None on a hub.
    Raises CardError where the data folder does not hold it.
    """
    form = form_of(card, OFFICIAL)
    column = (card.get("record") or {}).get("question")
    response = f"{{{column}}}" if column else "-"
    plain = "parts" not in form and not isinstance(form.get("options"), Mapping)
    said = ("prompt", "unit", "options") if plain or not column else ()
    asked: dict[str, Any] = {"prompt": response, **{key: form[key] for key in said if key in form}}
    recipes: dict[str, dict[str, Any]] = {}
    for split in card["chosen"]:
        layout = find_layout(card, split, data)
        for part in layout.parts:
            given = "".join(f", {key} {value}" for key, value in part.given.items() if len(layout.parts) > 1)
            pictures = {key: value for key, value in part.pictures.items() if key != "images_optional"}
            if layout.root is not None and not (layout.root / pictures.get("image_root", ".")).exists():
                del pictures["image_root"]  # of a split without pictures
            recipes[split + given] = {
                **pictures, **asked, "name": f"{card['name']}, split {split}{given}", "source": part.source,
                "response": response, "data": None if layout.root is None else str(layout.root),
            }  # fmt: skip
    return recipes


def read_items(name: str, data: str | None, *, access: MediaAccess, workers: int = 0) -> Items:
    """What is needed to know a benchmark's items again. Raises a UserError where the card or its files cannot be read."""
    card = read_benchmark(name)
    items = Items(str(card["name"]), name, data)
    for split, recipe in split_cards(card, data).items():
        for found in examine(recipe, recipe["data"], facts=LookAt(access), workers=workers):
            outcome, facts = found.outcome, found.facts
            if facts is None:
                items.unreadable.append(f"{split}/{outcome.id}: {outcome.error or outcome.dropped}")
                continue
            items.prints.add(len(items.ids), [picture.print for picture in facts.pictures])
            items.ids.append((split, outcome.id))
            items.places.append(found.place)
            bare = () if facts.answer is None or recipe["response"] == "-" else (facts.answer,)
            items.keys.append(tuple({*facts.keys, *bare}))
            items.pictured.append(bool(facts.pictures))
    return items


def reachable(
    names: Sequence[str] | None,
    *folders: str | None,
    access: MediaAccess,
    workers: int = 0,
    reading: Callable[[str], Any] = lambda name: None,
) -> tuple[list[Items], dict[str, str]]:
    """(the benchmarks that can be read, name -> why another cannot). names: those asked for, which must be; None: every card.

    folders: where their files may be; a benchmark is read from the first that holds it.

    One on a hub is downloaded only where it is asked for.
    """
    found, unread = [], {}
    for name in list_cards("benchmark") if names is None else names:
        try:
            reading(name)
            found.append(_read_from(folders, name, access, workers, download=names is not None))
        except UserError as error:
            if names is not None:
                said = _said(error)
                hint = "" if "--benchmark-data" in said else " Say where its files are: --benchmark-data DIR."
                raise UserError(f"--against {name}: {said}{hint}") from error
            unread[name] = _said(error)
    return found, unread


def _said(error: UserError) -> str:
    """What reading says of a recipe, as it is to be said of a benchmark."""
    return re.sub(r"^Recipe '", "Benchmark '", str(error)).replace("--data DIR (or DATA=DIR)", "--benchmark-data DIR")


def _read_from(folders: Sequence[str | None], name: str, access: MediaAccess, workers: int, *, download: bool) -> Items:
    """A benchmark from the first folder that holds it, or from the hub. Raises the first folder's UserError where none does."""
    card = read_benchmark(name)
    on_hub = any("hub" in layout for layout in card.get("layouts") or card["splits"].values())
    first: UserError | None = None
    for folder in [*folders, None] if on_hub else folders or (None,):
        try:
            if on_hub and folder is None and not download:
                raise CardError(f"it is on a hub. --against {name} downloads it.")
            items = read_items(name, folder, access=access, workers=workers)
            if items.ids:
                return items
            raise CardError(f"none of its {len(items.unreadable)} items can be read: {items.unreadable[:1]}")
        except UserError as error:
            first = error if on_hub and folder is None and not download else first or error
    assert first is not None, "a folder was tried"
    raise first


def overlaps(checked: Checked, items: Items) -> dict[str, list[Overlap]]:
    """The rows that share a picture or a question with a benchmark, by the strongest thing that they share."""
    found: dict[str, list[Overlap]] = {what: [] for what in OVERLAPS}
    pictures, alike = _shared_pictures(checked.prints, items.prints)
    by_key: dict[int, set[int]] = {}
    for item, keys in enumerate(items.keys):
        for key in keys:
            by_key.setdefault(key, set()).add(item)
    pictured = set(checked.prints.rows)
    for row, keys in enumerate(checked.keys):
        sets = [by_key[key] for key in keys if key in by_key]
        same, looks = pictures.get(row, set()), alike.get(row, set())
        if not (sets or same or looks):
            continue
        questions = sets[0] if len(sets) == 1 else set[int]().union(*sets)
        bare = {item for item in questions if not items.pictured[item]} if row not in pictured else set()
        by_strength = (same & questions, looks & questions, bare, same, looks, questions)
        what, shared = next((what, s) for what, s in zip(OVERLAPS, by_strength, strict=True) if s)
        listed = (
            sorted(shared) if what in (*CONTAMINATED, LOOKS) else list(islice(shared, LISTED))
        )  # the others may be very many
        found[what].append(Overlap(row, tuple(listed), len(shared)))
    return {what: rows for what, rows in found.items() if rows}


def _shared_pictures(rows: Prints, items: Prints) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
    """row -> items with a picture that is the same; row -> items with one that looks alike."""
    by_exact: dict[bytes, set[int]] = {}
    for item, exact in zip(items.rows, items.exact, strict=True):
        by_exact.setdefault(exact, set()).add(item)
    same: dict[int, set[int]] = {}
    for row, exact in zip(rows.rows, rows.exact, strict=True):
        if exact in by_exact:
            same.setdefault(row, set()).update(by_exact[exact])
    alike: dict[int, set[int]] = {}
    if len(rows) and len(items):
        of_row: dict[bytes, set[int]] = {}
        for row, exact in zip(rows.rows, rows.exact, strict=True):
            of_row.setdefault(exact, set()).add(row)
        for i, j in as_pairs(look_alikes(rows, items)):
            for row in of_row[rows.exact[i]]:
                alike.setdefault(row, set()).update(by_exact[items.exact[j]])
    return same, alike
