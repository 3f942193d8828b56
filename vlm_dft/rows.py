"""Rows: a card's `source` in, its raw rows (dicts with an id) out, with their templates filled and images located."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from vlm_dft.archives import ZipMember, find_member, joining, parts_of
from vlm_dft.cards import check_keys, nearest
from vlm_dft.columns import fill
from vlm_dft.errors import CardError, RowError
from vlm_dft.file_formats import COUNTS, READERS, count_in, file_rows, kind_of
from vlm_dft.hub_sets import check_copies, copies_of, hub_rows, local_files
from vlm_dft.renaming import check_renaming, renamed
from vlm_dft.sources import bare_base64
from vlm_dft.table_files import arrow_files, is_arrow_folder

PLACES = ("embedded", "files", "hub", "prepared")
SOURCE_KEYS = {*PLACES, "config", "split", "revision", "kind", "copy", "columns"}
Row = dict[str, Any]


def source_root(source: Mapping[str, Any], data: str | Path | None, *, where: str) -> Path | None:
    """The folder that a source's file and image paths are relative to; None for a hub set without one.

    Raises CardError before anything is read: no `data` folder given, folder absent, or a file of the source absent.
    """
    check_keys(source, SOURCE_KEYS, where=f"{where}, source")
    if len(set(PLACES) & set(source)) != 1:
        raise CardError(f"{where}, source: expected one of {', '.join(PLACES)}, found {sorted(source) or 'nothing'}.")
    if source.get("kind") is not None and source["kind"] not in READERS:
        raise CardError(
            f"{where}, source: unknown kind {source['kind']!r}.{nearest(str(source['kind']), READERS)} Known: "
            f"{', '.join(READERS)}."
        )
    check_copies(source, where=where)
    _check_values(source, where)
    if "prepared" in source:
        return None
    if "embedded" in source:
        from vlm_dft.embedded.drawn import drawn_folder

        return drawn_folder()
    if data is None:
        if "files" in source:
            raise CardError(f"{where} reads local files. Say where they are: --data DIR (or DATA=DIR).")
        return None
    root = Path(data).expanduser()
    if not root.is_dir():
        raise CardError(f"{where}: no data folder at {str(data)!r}.")
    files_of(source, root, where=where)
    return root


def _check_values(source: Mapping[str, Any], where: str) -> None:
    """Raise CardError for a value of a source that is no text (a revision of digits is a number in YAML), or is of no use beside files."""
    if "columns" in source:
        check_renaming(source["columns"], where=f"{where}, source")
    for key, value in source.items():
        if key == "columns":
            continue
        listed = key in ("files", "embedded", "copy") and isinstance(
            value, list
        )  # whose items are looked at one by one
        if not listed and not (isinstance(value, str) and value.strip()):
            raise CardError(f"{where}, source: {key} must be a text, in quotes if it is a number; found {value!r}.")
        if key in ("config", "revision") and "hub" not in source:
            raise CardError(f"{where}, source: {key} is of a set on the hub. Found it without hub: take it out.")


def read_rows(
    source: Mapping[str, Any],
    root: Path | None,
    *,
    where: str,
    start: int = 0,
    broken: Callable[[str, RowError], None] | None = None,
) -> Iterator[Row]:
    """Yield every row of a source in file order, each with an `id`, from place `start` on.

    The id is the row's own `id` or `pid`, else its key, else its number over all files (of JSON lines: of its line). A row
    that cannot be read takes a place too: `broken` is called with its id and the error. Raises RowError where there is no
    `broken`, and where nothing more can be read.
    """
    if "prepared" in source:
        raise CardError(f"{where}: prepared rows are examples already; they are opened as such.")
    files, columns = files_of(source, root, where=where), source.get("columns") or {}
    if "hub" in source and not files:
        for k, found in enumerate(hub_rows(source, where=where, start=start), start):
            named = _named(found, columns, f"{where}, row {k}")
            if isinstance(named, Mapping):
                yield {**named, "id": _id(named, k)}
            else:
                _tell(broken, str(k), named)
        return
    place = numbers = 0  # of the next file's first row
    for path, name in files:
        kind, skip = kind_of(path, name, source.get("kind")), 0
        if kind in COUNTS and start > place:
            count = COUNTS[kind](path, name)
            skip = min(count, start - place)
            place, numbers = place + skip, numbers + (count if skip == count else 0)
            if skip == count:
                continue
        last = -1
        for key, row in file_rows(path, name, kind, skip):
            place += 1
            last = max(last, key) if isinstance(key, int) else last
            if place <= start:
                continue
            own = numbers + key if isinstance(key, int) else key
            row = row if isinstance(row, RowError) else _named(row, columns, f"{name}, row {key}")
            if isinstance(row, RowError):
                _tell(broken, str(own), row)
            else:
                yield {**row, "id": _id(row, own)}
        numbers += last + 1


def _named(row: Row, columns: Mapping[str, Any], where: str) -> Row | RowError:
    """The row with its columns renamed, or why they cannot be."""
    try:
        return renamed(row, columns, where=where) if columns else row
    except RowError as error:
        return error


def _tell(broken: Callable[[str, RowError], None] | None, row_id: str, error: RowError) -> None:
    if broken is None:
        raise error
    broken(row_id, error)


def _id(row: Mapping[str, Any], otherwise: int | str) -> str:
    own = (row[column] for column in ("id", "pid") if str(row.get(column, "")).strip() and row[column] is not None)
    return str(next(own, otherwise))


def count_rows(source: Mapping[str, Any], root: Path | None, *, where: str = "source") -> int | None:
    """The rows of a source where its files' metadata say so (parquet, Arrow); None where they would have to be read."""
    files = files_of(source, root, where=where)
    counts = [count_in(path, name, source.get("kind")) for path, name in files]
    return None if not counts or None in counts else sum(count for count in counts if count is not None)


def source_fingerprint(source: Mapping[str, Any], root: Path | None, *, where: str = "source") -> str:
    """A hash of a source's files (names, sizes, bytes), in order; of a set on the hub, its name, config, split and revision."""
    digest = hashlib.sha256()
    said = {key: source.get(key) for key in ("hub", "config", "split", "revision", "kind")}
    digest.update(json.dumps(said, sort_keys=True).encode())
    for path, name in files_of(source, root, where=where):
        digest.update(json.dumps([name, path.stat().st_size]).encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def files_of(source: Mapping[str, Any], root: Path | None, *, where: str) -> list[tuple[Path, str]]:
    """(path, the name that errors call it by) of a source's data files, in order; none of a set that is on the hub.

    A name may be a pattern, or a folder that `datasets.save_to_disk` wrote. Raises CardError for one that is not there.
    """
    if root is None:
        return []
    if "hub" in source:
        folders = [root / name for name in copies_of(source) if (root / name).is_dir()]
        copies = (local_files(folder, source, where=where) for folder in folders)
        return [(path, str(path.relative_to(root))) for path in next(filter(None, copies), [])]
    names = source.get("embedded", source.get("files"))
    if not names:
        raise CardError(f"{where}, source: files names no file. Expected names below --data, or patterns of them.")
    found: list[tuple[Path, str]] = []
    for name in [names] if isinstance(names, str) else list(names):
        if not isinstance(name, str) or "://" in name:
            raise CardError(
                f"{where}: expected the name of a file below --data, found {name!r}. Download it, or give `hub`."
            )
        path = root / name
        if is_arrow_folder(path):
            try:
                found += [(each, f"{name}/{each.name}") for each in arrow_files(path, name, source.get("split"))]
            except RowError as error:
                raise CardError(f"{where}: {error}") from error
            continue
        paths = [path] if path.exists() else sorted(root.glob(name)) if set(name) & set("*?[") else []
        parts = [] if paths else parts_of(path)
        if not paths:
            what = f"It is in {len(parts)} parts. {joining(path, parts)}" if parts else "it is not there."
            raise CardError(f"{where}: expected {name} in {str(root)!r}; {what}{_seen(root)}")
        folder = next((each for each in paths if each.is_dir()), None)
        if folder is not None:
            raise CardError(
                f"{where}: expected the file {name}, found a folder.{_seen(folder)} Name its files, by a pattern if need be: "
                f"{name.rstrip('/')}/*.parquet."
            )
        found += [(each, str(each.relative_to(root)) if each.is_relative_to(root) else str(each)) for each in paths]
    seen = set[Path]()
    twice = next((name for path, name in found if path in seen or seen.add(path)), None)  # type: ignore[func-returns-value]
    if twice is not None:
        raise CardError(
            f"{where}, source: {twice} is named twice, its rows would be read twice. Name it once; a mixture's `repeat` trains rows twice."
        )
    return found


def locate_images(
    card: Mapping[str, Any], row: Mapping[str, Any], root: Path | None, *, where: str, remote: bool = False
) -> list[Any]:
    """The image sources of a row, by the card's `image` (a path template) or `images` (a column). Paths are checked.

    remote: leave http(s) URLs as they are, for a collator that may have leave to fetch them.
    Raises RowError naming the row and the path when a file is missing or lies outside the data folder.
    """
    if "image" in card:
        found: Any = fill(card["image"], row, where=where)
    else:
        found = row.get(card["images"]) if card.get("images") is not None else None
        if found is None or found == "" or found == [] or _is_null(found):
            return []
    return locate(found if isinstance(found, (list, tuple)) else [found], root, where=where, remote=remote)


def locate(
    sources: Iterable[Any], root: Path | None, *, where: str, remote: bool = False, kind: str = "image"
) -> list[Any]:
    """Media sources whose paths are checked and made absolute; a list of frames stays a list. Raises RowError."""
    return [
        locate(source, root, where=where, remote=remote)
        if isinstance(source, (list, tuple))
        else _local(source, root, where=where, remote=remote, kind=kind)
        for source in sources
    ]


def _local(source: Any, root: Path | None, *, where: str, remote: bool, kind: str) -> Any:
    if isinstance(source, ZipMember) or (isinstance(source, Path) and source.is_absolute()):
        return source  # located before
    if source is None or source == "" or _is_null(source):
        raise RowError(
            f"{where}: one of its {kind}s is null. Take it out of the list, or drop the row.", f"{kind} is null"
        )
    if isinstance(source, Mapping):
        content = source.get("bytes")
        if content is None and source.get("path") is not None:
            return _local(source["path"], root, where=where, remote=remote, kind=kind)
        if isinstance(content, str) and bare_base64(content) is None and not content.startswith("data:"):
            raise RowError(f"{where}: expected bytes or base64 under 'bytes' of the {kind}, found {content[:60]!r}.")
    if not isinstance(source, (str, Path)):
        return source  # embedded bytes or a decoded image
    name = str(source)
    if name.startswith("data:") or (remote and name.startswith(("http://", "https://"))):
        return source
    if name.startswith("file://"):
        name = unquote(name.removeprefix("file://").removeprefix("localhost"))
    if "://" in name:
        raise RowError(
            f"{where}: {name[:120]!r} is remote. Download the {kind}s and give their folder as --data DIR.",
            f"{kind} is remote",
        )
    if len(name) >= 64 and bare_base64(name) is not None and (root is None or not _is_file(root / name)):
        return source
    if root is None:
        raise RowError(f"{where}: {name[:120]!r} is a path. Say where the {kind}s are: --data DIR (or DATA=DIR).")
    folder = _resolved(root)
    path = Path(os.path.realpath(root / name)) if "\0" not in name else folder / "\0"
    if not path.is_relative_to(folder):
        linked = not name.startswith("/") and ".." not in name.split("/")
        raise RowError(
            f"{where}: {name!r} leaves the data folder {str(root)!r}."
            + f" It leads by a link to {str(path)[:200]!r}: copy it, or give as --data a folder that holds both."
            * linked,
            f"{kind} outside the data folder",
        )
    if _is_file(path):
        return path
    archive, member = _in_archive(folder, str(path.relative_to(folder)))
    if archive is not None and not archive.resolve().is_relative_to(folder):
        raise RowError(
            f"{where}: {archive.name} leaves the data folder {str(root)!r}.", f"{kind} outside the data folder"
        )
    found = find_member(archive, member, where=where) if archive is not None else None
    if found is not None:
        return found
    raise RowError(
        f"{where}: no {kind} file at {str(root / name)[:300]!r}{'' if archive is None else f', nor in {archive.name}'}. Check the "
        f"data folder (--data / DATA=).{_packed(folder)}",
        f"{kind} missing",
    )


def _in_archive(folder: Path, name: str) -> tuple[Path | None, str]:
    """(the zip archive that a name may be in, the name in it): the root itself, or images.zip for images/1.png."""
    if _is_file(folder):
        return folder, name
    above, at = folder, name.split("/")
    for k, part in enumerate(at[:-1]):
        if _is_file(above / f"{part}.zip"):
            return above / f"{part}.zip", "/".join(at[k:])
        above = above / part
    return None, name


def _is_null(source: Any) -> bool:
    """Whether an image is not there, as parquet writes it: a structure of nulls, or NaN."""
    if isinstance(source, Mapping):
        return bool(source) and source.keys() <= {"bytes", "path"} and not any(v is not None for v in source.values())
    return isinstance(source, float) and math.isnan(source)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a name
        return False


@lru_cache(64)
def _resolved(root: Path) -> Path:
    return root.resolve()


@lru_cache(64)
def _packed(folder: Path) -> str:
    """What to do with archives that lie in the folder, where a picture is missing."""
    archives = sorted(folder.glob("*.zip*"))[:50] if folder.is_dir() else []
    whole = [path for path in archives if path.suffix == ".zip"]
    if whole:
        return f" The folder holds {whole[0].name}: name it as the card's image_root, or unpack it."
    parts = [path for path in archives if ".zip" in path.name]
    name = parts[0].name.partition(".zip")[0] + ".zip" if parts else ""
    return f" The folder holds {len(parts)} parts of {name}. {joining(folder / name, parts)}" if parts else ""


def _seen(root: Path) -> str:
    names = sorted(p.name for p in root.iterdir())[:8]
    return f" The folder holds: {', '.join(names) or 'nothing'}."
