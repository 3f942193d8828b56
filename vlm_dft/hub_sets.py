"""Hub sets: a card's `hub` source in; its rows out, streamed through `datasets`, or the files of a local copy."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from vlm_dft.errors import CardError, RowError
from vlm_dft.table_files import arrow_files, is_arrow_folder

DATA = (".parquet", ".arrow", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".tar")
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "state.json", "package.json", "config.json", "meta.json")
SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")
SHARD = re.compile(r"-\d{5}-of-\d{5}")  # what follows the split in a file's name on the hub


def copies_of(source: Mapping[str, Any]) -> list[str]:
    """The folders below --data in which a local copy of a hub set may lie; --data itself unless the source's `copy` says others."""
    names = source.get("copy", ".")
    return [names] if isinstance(names, str) else list(names)


def beside_pictures(source: Mapping[str, Any]) -> dict[str, Any]:
    """The source of a card with an `image_root`: --data holds the pictures, of another set perhaps, with rows of its own. So a
    copy of the rows is taken from a folder below it alone that bears the set's name, unless the card says `copy`."""
    if "hub" not in source or "copy" in source:
        return dict(source)
    name = str(source["hub"]).strip("/")
    return {**source, "copy": [name.replace("/", "--"), name.rpartition("/")[2]]}


def check_copies(source: Mapping[str, Any], *, where: str) -> None:
    """Raise CardError for a `copy` that names no folder below --data, or stands without `hub`."""
    if "copy" not in source:
        return
    names = copies_of(source) if isinstance(source["copy"], (str, list)) else []
    if "hub" not in source or not names or not all(isinstance(n, str) and n.strip() and _below(n) for n in names):
        raise CardError(
            f"{where}, source: copy must name the folder below --data that holds a copy of the hub set (. for --data itself), "
            f"beside hub; found {source['copy']!r}."
        )


def _below(name: str) -> bool:
    return not name.startswith("/") and ".." not in name.split("/")


def local_files(root: Path, source: Mapping[str, Any], *, where: str) -> list[Path]:
    """The data files of one split in a local copy of a hub set; none where the folder holds no data files at all.

    The copy's README says which files are a split, or else their names do, as on the hub. Raises CardError.
    """
    config, split = source.get("config"), str(source.get("split", "train"))
    if is_arrow_folder(root):
        try:
            return arrow_files(root, str(root), split if (root / "dataset_dict.json").is_file() else None)
        except RowError as error:
            raise CardError(f"{where}: {error}") from error
    files = _data_files(root)
    if not files:
        return []
    patterns = _declared(root, config, split)
    if patterns:
        found = sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()})
        if not found:
            raise CardError(
                f"{where}: its README names {', '.join(patterns)} for the split {split!r}, and nothing of it is there."
            )
        return found
    if config is not None and config != "default":
        within = [path for path in files if _named(path.relative_to(root), str(config))]
        files = within or files
    places = [path.relative_to(root) for path in files]
    named = [path for path, place in zip(files, places, strict=True) if _named(place, split)]
    others = any(_named(place, name) for place in places for name in SPLITS) or any(
        SHARD.search(place.name) for place in places
    )
    if not named and split == "train" and not others:
        return files
    if not named:
        shown = ", ".join(str(path.relative_to(root)) for path in files[:8])
        raise CardError(f"{where}: no file of the split {split!r} in {str(root)!r}. Files found: {shown}.")
    return named


def hub_rows(source: Mapping[str, Any], *, where: str, start: int = 0) -> Iterator[dict[str, Any]]:
    """The rows of a set on the hub from `start` on, one by one, pictures left as they are stored. Raises RowError."""
    name, split = source["hub"], source.get("split", "train")
    try:
        rows = _opened(name, source.get("config"), split=split, revision=source.get("revision"), streaming=True)
        if rows.features is not None:
            rows = rows.decode(False)
        yield from rows.skip(start) if start else rows
    except (RowError, MemoryError):
        raise
    except Exception as error:  # datasets, httpx, fsspec and pyarrow each raise their own
        raise RowError(
            f"{where}: the hub set {name!r} (split {split}) cannot be read: {type(error).__name__}: {_first_line(error)}. Without "
            f"network, or to keep a copy: {_keeping(source)}",
            "hub set cannot be read",
        ) from error


def _opened(*words: Any, **more: Any) -> Any:
    """load_dataset; as if HF_HUB_OFFLINE were set where the hub's name cannot be looked up, as it would be tried for half a minute."""
    import datasets
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    try:
        if not getproxies():  # a proxy looks names up by itself
            socket.getaddrinfo(host, 443)
    except OSError:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(*words, **more)
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _keeping(source: Mapping[str, Any]) -> str:
    """How a copy of a hub set is made and given."""
    download, names = f"hf download {source['hub']} --repo-type dataset --local-dir", copies_of(source)
    if "." in names:
        return f"{download} DIR, and give it as --data DIR."
    places = " or ".join(f"DIR/{name}" for name in names)
    return (
        f"{download} DIR/{names[-1]}, where --data DIR is the folder of the pictures. Rows are looked for in {places} alone, "
        "as those in DIR itself may be another set's; `copy: .` in the card's source says that they are this set's."
    )


def _data_files(root: Path) -> list[Path]:
    """Every file of rows below a folder, in order of name; not those of pictures, nor what describes the set."""
    found: list[Path] = []
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith((".", "_")))
        found += [
            Path(folder, name) for name in names
            if name.removesuffix(".gz").endswith(DATA) and not name.startswith((".", "_")) and name not in NOT_ROWS
        ]  # fmt: skip
    return sorted(found)


def _named(path: Path, name: str) -> bool:
    """Whether a name stands in a path with no letter or digit beside it."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", str(path)) is not None


def _declared(root: Path, config: Any, split: str) -> list[str]:
    """The patterns of a split's files that the README of a copy declares, as the hub reads it; none where it says nothing."""
    import yaml

    try:
        head = re.match(r"---\n(.*?)\n---", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        configs = (yaml.safe_load(head[1]) or {}).get("configs") or [] if head else []
        chosen = [c for c in configs if config is None or c.get("config_name") == config]
        chosen = [c for c in chosen if c.get("default") or c.get("config_name") == "default"] or chosen
        data = chosen[0].get("data_files") if chosen else None
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return []
    for entry in data if isinstance(data, list) else [data] if data else []:
        if isinstance(entry, str) and split == "train":
            return [entry]
        if isinstance(entry, dict) and entry.get("split") == split:
            return [entry["path"]] if isinstance(entry["path"], str) else list(entry["path"])
    return []


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
