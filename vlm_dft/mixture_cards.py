"""Mixture cards: a card with `mixture:` in; the same with every card it names read and checked, and its sources one by one, out.

An entry names a `recipe` (a card's name, or a path relative to this card's file; another mixture too) and may say: `name` (what its
rows are called in accounts, logs and source_objectives), `data` (a folder below --data, or an absolute path), `weight` or `share`,
`repeat`, `cap` or `cap_tokens` (mixing.py says exactly what these are), `sort: tokens` (in a curriculum), `objective` (of its
responses, whatever its card or rows say) and `loss_weight` (a factor of its responses' loss). In a mixture in a mixture the outer
objective wins, and factors are multiplied. The mixture says `order: shuffled | curriculum`, and with `share_of: response | all`
which tokens its own shares and cap_tokens count: those of the responses unless it says otherwise, since these carry the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_dft.cards import check_keys, find_card, nearest, read_card
from vlm_dft.errors import CardError
from vlm_dft.objectives import OBJECTIVES

REQUIRED = ("description", "licence", "mixture")
OPTIONAL = ("order", "share_of", "paper", "rows", "bad_rows", "duplicates", "training", "benchmark", "notes")
ENTRY = ("recipe", "name", "data", "weight", "share", "repeat", "cap", "cap_tokens", "sort", "objective", "loss_weight")
ROW_RULES = {"bad_rows": ("refuse", "drop"), "duplicates": ("keep", "drop")}  # the first is what holds unless said
ORDERS = ("shuffled", "curriculum")
SHARE_OF = ("response", "all")
SUM_WITHIN = 0.01  # shares are fractions: 0.33 three times will do
Card = Mapping[str, Any]
Reader = Callable[..., dict[str, Any]]  # (name, within=the files that led here) -> card


@dataclass(frozen=True, slots=True)
class Source:
    """A single source of a recipe: its card, where its files are, and what a mixture makes of its rows."""

    name: str
    card: Card
    data: str | None
    mixed: bool = False  # its examples go by this name, whatever their rows say
    objective: str | None = None
    loss_weight: float = 1.0


def check_row_rules(card: Card) -> None:
    """Refuse words that a card may not have for rows that cannot be used, or are there twice. Raises CardError."""
    for key, known in ROW_RULES.items():
        if (found := card.get(key, known[0])) not in known:
            raise CardError(
                f"Recipe {card['name']!r}: {key} must be one of {', '.join(known)}, found {found!r}.{nearest(str(found), known)}"
            )


def is_mixture_file(path: Path) -> bool:
    """Whether a card's file holds a mixture."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return False  # read_card says what is wrong
    return isinstance(found, dict) and "mixture" in found


def read_mixture(name: str, read: Reader, within: Sequence[Path] = ()) -> dict[str, Any]:
    """A mixture card whose entries hold their own cards under `card`, all checked. Raises CardError."""
    path = find_card("recipe", name).resolve()
    if path in within:
        circle = " -> ".join(file.name for file in (*within[within.index(path) :], path))
        raise CardError(f"Recipe {name!r} is a mixture of itself: {circle}. Take one of them out.")
    card = read_card("recipe", name, required=REQUIRED, optional=OPTIONAL)
    where = f"Recipe {card['name']!r}"
    check_row_rules(card)
    for key, known in (("order", ORDERS), ("share_of", SHARE_OF)):
        if (found := card.get(key, known[0])) not in known:
            raise CardError(
                f"{where}: {key} must be one of {', '.join(known)}, found {found!r}.{nearest(str(found), known)}"
            )
    listed = card["mixture"]
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise CardError(f"{where}: mixture must be a list of entries, each with a recipe, found {listed!r}.")
    entries = [
        _entry(entry, card, path, read, (*within, path), f"{where}, entry {k + 1}") for k, entry in enumerate(listed)
    ]
    _check_together(entries, where)
    return {**card, "mixture": entries}


def _entry(
    entry: Any, card: Card, path: Path, read: Reader, within: Sequence[Path], where: str
) -> dict[str, Any]:  # fmt: skip
    if not isinstance(entry, Mapping) or not isinstance(entry.get("recipe"), str):
        raise CardError(f"{where}: expected a mapping with a recipe (a card's name or path), found {entry!r}.")
    check_keys(entry, ENTRY, where=where)
    for key in ("weight", "share", "repeat", "loss_weight"):
        number = entry.get(key, 1)
        right = (
            isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number) and number > 0
        )
        if not right:
            raise CardError(f"{where}: {key} must be a number above 0, found {number!r}.")
    for key in ("cap", "cap_tokens"):
        whole = entry.get(key, 1)
        if not isinstance(whole, int) or isinstance(whole, bool) or whole < 1:
            raise CardError(f"{where}: {key} must be a whole number of at least 1, found {whole!r}.")
    for key in ("name", "data"):
        if not isinstance(entry.get(key, "x"), str) or not entry.get(key, "x"):
            raise CardError(f"{where}: {key} must be a text, found {entry[key]!r}.")
    for one, other in (("weight", "share"), ("cap", "cap_tokens")):
        if one in entry and other in entry:
            raise CardError(f"{where}: found {one} and {other}, expected one of them.")
    if entry.get("sort", "tokens") != "tokens":
        raise CardError(f"{where}: sort must be tokens, found {entry['sort']!r}.")
    if "sort" in entry and card.get("order") != "curriculum":
        raise CardError(f"{where}: sort is for order: curriculum; this mixture is shuffled. Leave one of them out.")
    objective = entry.get("objective")
    if objective is not None and objective not in OBJECTIVES:
        raise CardError(
            f"{where}: unknown objective {objective!r}.{nearest(str(objective), OBJECTIVES)} Known: {', '.join(OBJECTIVES)}."
        )
    recipe = entry["recipe"]
    if Path(recipe).suffix in (".yaml", ".yml", ".json", ".jsonl"):
        recipe = str(path.parent / Path(recipe).expanduser())
    elif (path.parent / recipe / "prepared.json").is_file():
        recipe = str(path.parent / recipe)
    own = read(recipe, within=within)
    return {**entry, "name": entry.get("name", own["name"]), "card": own}


def _check_together(entries: Sequence[Card], where: str) -> None:
    names = [entry["name"] for entry in entries]
    if twice := [name for k, name in enumerate(names) if name in names[:k]]:
        raise CardError(
            f"{where}: two entries are called {twice[0]!r}. Give one of them a name of its own (name: ...)."
        )
    for key in ("weight", "share"):
        without = [entry["name"] for entry in entries if key not in entry]
        if without and len(without) < len(entries):
            other = next((k for k in ("weight", "share") if k != key and any(k in entry for entry in entries)), None)
            said = (
                f"some entries have a {key} and some a {other}"
                if other
                else f"{without[0]!r} has no {key}, others have"
            )
            raise CardError(f"{where}: {said}. Give all of them a {key}, or none.")
    shares = [float(entry["share"]) for entry in entries if "share" in entry]
    if shares and abs(sum(shares) - 1) > SUM_WITHIN:
        raise CardError(
            f"{where}: shares are fractions of the tokens and must sum to 1, found a sum of {sum(shares):g}."
        )


def sources_in(card: Card, data: str | None) -> list[Source]:
    """The single sources of a recipe in the order listed: itself, or those of a mixture, named by their way down to them."""
    if "mixture" not in card:
        return [Source(str(card["name"]), card, data)]
    found = list(_below(card, data, "", None, 1.0))
    names = [one.name for one in found]
    if twice := [name for k, name in enumerate(names) if name in names[:k]]:
        raise CardError(
            f"Recipe {card['name']!r}: two of its sources are called {twice[0]!r}, an entry and one of a mixture in it. Give the "
            "entry a name of its own (name: ...)."
        )
    return found


def _below(card: Card, data: str | None, way: str, objective: str | None, factor: float) -> Iterator[Source]:
    for entry in card["mixture"]:
        name, own = f"{way}{entry['name']}", entry["card"]
        place = _place(data, entry.get("data"), f"Recipe {card['name']!r}, {name}")
        wanted, times = objective or entry.get("objective"), factor * entry.get("loss_weight", 1)
        inherited = {key: card[key] for key in ("bad_rows", "duplicates") if key in card}
        if "mixture" in own:
            yield from _below({**own, **inherited}, place, f"{name}/", wanted, times)
        else:
            yield Source(name, {**own, **inherited}, place, True, wanted, times)


def _place(data: str | None, below: str | None, where: str) -> str | None:
    """The folder of an entry."""
    if below is None:
        return data
    folder = Path(below).expanduser()
    if folder.is_absolute():
        return str(folder)
    if data is None:
        raise CardError(
            f"{where}: data = {below!r} is a folder below the data folder. Say where that is: --data DIR (or DATA=DIR)."
        )
    return str(Path(data) / folder)


def entry_objectives(card: Card) -> dict[str, str]:
    """{source: objective} that a mixture's entries ask for."""
    if "mixture" not in card:
        return {}
    return {one.name: one.objective for one in _below(card, "", "", None, 1.0) if one.objective}
