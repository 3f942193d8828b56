"""Layouts: a benchmark card's split and a data folder in; the layout that is there, file by file and picture by picture, out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from vlm_dft.benchmark_cards import PICTURES, SOURCES
from vlm_dft.errors import CardError, UserError
from vlm_dft.renaming import ABSENT, value_at
from vlm_dft.rows import files_of, read_rows, source_root

Source = Mapping[str, Any]
DEEP = 2  # folders down to a file in a copy of a hub set: data/test.parquet, main/test.parquet


@dataclass(frozen=True, slots=True)
class Part:
    """A source of rows, and the columns that its place gives them: `variant` of a card's `each`."""

    source: dict[str, Any]
    pictures: dict[str, Any]  # of PICTURES, as the card of a recipe says them
    given: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rows of a split are: which layout of the card, in which folder, in one part or one for each variant."""

    name: str
    parts: list[Part]
    root: Path | None  # None: on the hub
    absent: list[str] = field(default_factory=list)  # the parts that are not there


def find_layout(card: Mapping[str, Any], split: str, data: str | Path | None) -> Layout:
    """The first layout of a split that is in the data folder, or in a folder below it that bears the set's name; without a
    folder the embedded one, or the one on the hub.

    Raises CardError that names what was looked for and what the folder holds.
    """
    where = f"Benchmark {card['name']!r}" + (f", split {split}" if len(card["splits"]) > 1 else "")
    layouts = list(_layouts_of(card, split))
    for name, parts, _ in layouts:
        if "embedded" in parts[0].source or (data is None and "hub" in parts[0].source):
            return Layout(name, parts, source_root(parts[0].source, None, where=where))
    if data is None:
        source_root(layouts[0][1][0].source, None, where=where)  # says that it needs --data
    root = Path(str(data)).expanduser()
    if not root.is_dir():
        raise CardError(f"{where}: no data folder at {str(data)!r}.")
    why: list[str] = []
    for (name, parts, names), k in product(layouts, range(3)):
        folder = root / names[k] if k < len(names) else None
        if folder is None or not folder.is_dir():
            continue
        there, errors = _there(parts, folder, where)
        if there and len(layouts) > 1 and (lacking := _lacking(card, there[0], folder)):
            why.append(
                f"{_looked_for(parts)} in {_shown(folder, root)}: there, but its rows have no {', '.join(lacking)}"
            )
            continue
        if there:
            absent = [", ".join(f"{k} {v}" for k, v in part.given.items()) for part in parts if part not in there]
            return Layout(name, there, folder, absent)
        why += [f"{_looked_for(parts)} in {_shown(folder, root)}"]
        first = errors[0]
    if len(layouts) == 1 and len(why) == 1:
        raise first
    if any(_there(parts, root.parent, where)[0] for _, parts, _ in layouts if "hub" not in parts[0].source):
        raise CardError(f"{where}: nothing of it is in {str(root)!r}. It is in the folder above: --data {root.parent}.")
    raise CardError(
        f"{where}: nothing of it is in {str(root)!r}. Looked for: {'; '.join(why)}.{_others(card, split, root)} The folder holds: "
        f"{', '.join(sorted(path.name for path in root.iterdir())[:8]) or 'nothing'}."
    )


def _layouts_of(card: Mapping[str, Any], split: str) -> Iterator[tuple[str, list[Part], list[str]]]:
    """(name, parts, folders below the data folder in which it may lie) of each layout of a split."""
    own = card["splits"][split]
    ((each, values),) = (card.get("each") or {"": [None]}).items()
    for said in card.get("layouts") or [own]:
        hub = str(said.get("hub", "")).strip("/")
        copies = [hub.replace("/", "--"), hub.rpartition("/")[2]] if hub else [str(card["set"])]
        names = [".", *([str(said["folder"])] if "folder" in said else copies)]
        parts = []
        for value in values:
            put = {"{split}": split, **({f"{{{each}}}": str(value)} if each else {})}
            said_here = {
                **{k: card[k] for k in PICTURES if k in card},
                **said,
                **{k: own[k] for k in PICTURES if k in own},
            }
            said_here = {key: _put(text, put) for key, text in said_here.items()}
            source = {
                key: said_here[key]
                for key in said_here
                if key not in (*PICTURES, "name", "folder", "given", "rows", "id")
            }
            pictures = {key: said_here[key] for key in PICTURES if key in said_here}
            parts.append(Part(source, pictures, {**said.get("given", {}), **({each: value} if each else {})}))
        kind = next(key for key in SOURCES if key in said)
        yield str(said.get("name", {"files": "original"}.get(kind, kind))), parts, names


def _put(value: Any, names: Mapping[str, str]) -> Any:
    """A text of a card, or a list of them, with {split} and {variant} filled, and no other brace."""
    if isinstance(value, list):
        return [_put(one, names) for one in value]
    if isinstance(value, str):
        for name, text in names.items():
            value = value.replace(name, text)
    return value


def _there(parts: list[Part], folder: Path, where: str) -> tuple[list[Part], list[CardError]]:
    """The parts whose files are in a folder, and why the others are not."""
    there, errors = [], []
    for part in parts:
        try:
            source_root(part.source, folder, where=where)
            if "hub" in part.source and not _is_copy(part.source, folder, where):
                raise CardError(f"{where}: no copy of {part.source['hub']} in {str(folder)!r}.")
            there.append(part)
        except CardError as error:
            errors.append(error)
    return there, errors


def _is_copy(source: Source, folder: Path, where: str) -> bool:
    """Whether a folder is a copy of a hub set, and not one of many sets."""
    files = files_of(source, folder, where=where)
    return bool(files) and all(len(path.relative_to(folder).parts) <= DEEP for path, _ in files)


def _lacking(card: Mapping[str, Any], part: Part, folder: Path) -> list[str]:
    """The columns that the card needs and the first row has not: the files are another set's, or another layout's."""
    try:
        row = {**next(iter(read_rows(part.source, folder, where="")), {}), **part.given}
    except UserError:  # said when it is read
        return []
    record = (rule for rule in (card.get("record") or {}).values() if isinstance(rule, str))
    groups = (name for name in card.get("groups") or [] if isinstance(name, str) and not name.endswith("?"))
    column = part.pictures.get("images")
    lacking = [repr(name) for name in dict.fromkeys([card["answer"], *record, *groups]) if not _has(row, name)]
    pictured = column is None or part.pictures.get("images_optional") or row.get(column)
    return lacking if pictured else [*lacking, f"picture in {column!r}"]


def _has(row: Mapping[str, Any], path: str) -> bool:
    try:
        value_at(row, path)
    except ABSENT:
        return False
    return True


def _looked_for(parts: list[Part]) -> str:
    source = parts[0].source
    if "hub" in source:
        return f"a copy of {source['hub']} (split {source.get('split', 'train')})"
    names = source["files"]
    return " and ".join([names] if isinstance(names, str) else names) + f" or one of {len(parts) - 1} others" * (
        len(parts) > 1
    )


def _others(card: Mapping[str, Any], split: str, root: Path) -> str:
    """Which other split of the card is there."""
    for other in card["splits"]:
        if other != split and any(
            _there(parts, root / name, "")[0]
            for _, parts, names in _layouts_of(card, other)
            for name in names[:2]
            if (root / name).is_dir()
        ):
            return f" Its split {other} is there: {card['set']}:{other}."
    return ""


def _shown(folder: Path, root: Path) -> str:
    return "it" if folder == root else str(folder.relative_to(root))
