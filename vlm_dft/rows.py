"""Rows: a card's `source` in, its raw rows (dicts with an id) out, with their templates filled and images located."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from vlm_dft.cards import check_keys
from vlm_dft.columns import fill
from vlm_dft.errors import CardError, RowError

SOURCE_KEYS = {"embedded", "files", "hub", "config", "split", "revision"}
Row = dict[str, Any]


def source_root(source: Mapping[str, Any], data: str | Path | None, *, where: str) -> Path | None:
    """The folder that a source's file and image paths are relative to; None for a hub set without one.

    Raises CardError before anything is read: no `data` folder given, folder absent, or a file of the source absent.
    """
    check_keys(source, SOURCE_KEYS, where=f"{where}, source")
    if len({"embedded", "files", "hub"} & set(source)) != 1:
        raise CardError(
            f"{where}, source: expected one of embedded, files and hub, found {sorted(source) or 'nothing'}."
        )
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
    for name in _files(source):
        if not (root / name).is_file():
            raise CardError(f"{where}: expected {name} in {str(data)!r}; it is not there.{_seen(root)}")
    return root


def read_rows(
    source: Mapping[str, Any],
    root: Path | None,
    *,
    where: str,
    start: int = 0,
    broken: Callable[[str, RowError], None] | None = None,
) -> Iterator[Row]:
    """Yield every row of a source in file order, each with an `id`, from place `start` on.

    A row that cannot be read (a half-written line) takes a place too: `broken` is called with its id and the error.
    Raises RowError naming file and line where there is no `broken`, and where nothing more can be read after it.
    """
    if start:
        yield from islice(read_rows(source, root, where=where, broken=broken), start, None)
        return
    if "hub" in source:
        yield from _hub_rows(source)
        return
    assert root is not None, "source_root() finds the folder of every source that is not on the hub"
    for name in _files(source):
        for k, (key, row) in enumerate(_file_rows(root / name)):
            if not isinstance(row, dict):
                raise RowError(f"{where}, {name}, row {k}: expected an object, found {type(row).__name__}.")
            yield {**row, "id": str(row.get("id", row.get("pid", key)))}


def locate_images(
    card: Mapping[str, Any], row: Mapping[str, Any], root: Path | None, *, where: str, remote: bool = False
) -> list[Any]:
    """The image sources of a row, by the card's `image` (a path template) or `images` (a column). Paths are checked.

    remote: leave http(s) URLs as they are, for a collator that may have leave to fetch them.
    Raises RowError naming the row and the path when a file is missing or lies outside the data folder.
    """
    if "image" in card:
        found: Any = fill(card["image"], row, where=where)
    elif card.get("images") is None or row.get(card["images"]) in (None, "", []):
        return []
    else:
        found = row[card["images"]]
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
    if isinstance(source, Path) and source.is_absolute():
        return source  # located before
    if isinstance(source, Mapping) and source.get("bytes") is None and source.get("path") is not None:
        return _local(source["path"], root, where=where, remote=remote, kind=kind)
    if not isinstance(source, (str, Path)):
        return source  # embedded bytes or a decoded image
    name = str(source)
    if name.startswith("data:") or (remote and name.startswith(("http://", "https://"))):
        return source
    if name.startswith("file://"):
        name = unquote(name.removeprefix("file://"))
    if "://" in name:
        raise RowError(f"{where}: {name!r} is remote. Download the {kind}s and give their folder as --data DIR.")
    if root is None:
        raise RowError(f"{where}: {name!r} is a path. Say where the {kind}s are: --data DIR (or DATA=DIR).")
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise RowError(f"{where}: {name!r} leaves the data folder {str(root)!r}.")
    if not path.is_file():
        raise RowError(f"{where}: no {kind} file at {str(root / name)!r}. Check the data folder (--data / DATA=).")
    return path


def _files(source: Mapping[str, Any]) -> list[str]:
    files = source.get("embedded", source.get("files", []))
    return [files] if isinstance(files, str) else list(files)


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, row) pairs of a JSON list, a JSON object keyed by id, or JSON lines: told apart by content, not by name."""
    if path.suffix == ".parquet":
        from datasets import load_dataset

        yield from ((str(k), dict(row)) for k, row in enumerate(load_dataset("parquet", data_files=str(path))["train"]))
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError(f"{path.name}: expected UTF-8 text ({error}).") from error
    if not text.strip():
        raise RowError(f"{path.name} is empty. Expected a JSON list, an object keyed by id, or JSON lines.")
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        yield from _json_lines(path, text, error)
        return
    if isinstance(whole, list):
        yield from ((str(k), row) for k, row in enumerate(whole))
    elif isinstance(whole, dict) and whole and all(isinstance(v, dict) for v in whole.values()):
        yield from whole.items()
    elif isinstance(whole, dict):
        yield "0", whole
    else:
        raise RowError(f"{path.name}: expected a list, an object keyed by id, or JSON lines.")


def _json_lines(path: Path, text: str, whole_error: json.JSONDecodeError) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield str(number - 1), json.loads(line)
        except json.JSONDecodeError as error:
            if number == 1:
                raise RowError(f"{path.name}: neither JSON ({whole_error}) nor JSON lines ({error}).") from error
            raise RowError(f"{path.name}, line {number}: not valid JSON ({error}).") from error


def _hub_rows(source: Mapping[str, Any]) -> Iterator[Row]:
    from datasets import load_dataset

    rows = load_dataset(
        source["hub"], source.get("config"), split=source.get("split", "train"), revision=source.get("revision")
    )
    for k, row in enumerate(rows):
        yield {**row, "id": str(row.get("id", row.get("pid", k)))}


def _seen(root: Path) -> str:
    names = sorted(p.name for p in root.iterdir())[:8]
    return f" The folder holds: {', '.join(names) or 'nothing'}."
