"""Prepared: a folder or URL that `preparing` wrote in; its examples, read when they are asked for, and its accounting out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_dft.chat import Example
from vlm_dft.errors import CardError, UserError
from vlm_dft.lazy import Lazy
from vlm_dft.stores import Range, Store

WHOLE, INDEX = "prepared.json", "index.parquet"  # the first is written last: where it is, all is there
VERSION = 2  # of the form of these files; 2: what was changed of each row
BLOCK = 64  # examples read at once where all are read in order
IMAGE, VIDEO, FRAME, NEXT_FRAME = range(
    4
)  # kinds of parts: a picture, a video file, a list's first frame and the others
WHERE = ("shard", "messages_at", "messages_length", "tools_at", "tools_length")  # columns of the index


def shard_name(number: int) -> str:
    """The file of a shard. Numbers may be left out: a stretch of rows of which none is used has no file."""
    return f"shard-{number:05d}.parquet"


def is_prepared(name: str | Path) -> bool:
    """Whether a name is that of a prepared folder, or a URL, which can be nothing else."""
    text = str(name)
    return ("://" in text and not text.startswith("file://")) or (Store(text).folder / WHOLE).is_file()


def open_prepared(url: str | Path, *, verify: bool = False) -> Prepared:
    """Open a prepared folder or URL. verify: read all of it, and hold it against the checksums it was written with.

    Raises UserError where nothing is prepared, or naming the first shard that is missing, cut short or damaged.
    """
    return Prepared(url, verify=verify)


def read_whole(store: Store) -> dict[str, Any] | None:
    """What prepared.json says; None where there is none. Raises UserError for one that is not ours."""
    try:
        raw = store.read(WHOLE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        found: dict[str, Any] = json.loads(raw)
        version = found["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{store}/{WHOLE} is damaged ({error}). Remove the folder, and prepare it again.") from error
    if version != VERSION:
        raise UserError(f"{store}/{WHOLE}: expected version {VERSION}, found {version}. Prepare it again.")
    return found


def prepared_card(url: str | Path) -> dict[str, Any]:
    """The recipe card that a prepared folder or URL stands for: that which it was made from, its source the folder."""
    store = Store(url)
    found = read_whole(store)
    if found is None:
        raise CardError(f"Nothing is prepared at {str(url)!r}: there is no {WHOLE}.")
    kept = {key: value for key, value in found["card"].items() if key not in ("source", "rows")}
    return {**kept, "source": {"prepared": store.url}, "rows": found["rows"]}


class Prepared(Lazy):
    """Examples in the order of their recipe, read when they are asked for: exactly the bytes of each, by range.

    In memory are an index of some 100 bytes a row, and nothing else. It can be pickled and used on both sides of a fork,
    so that data loaders take it as it is. Pictures and videos come as `{"bytes", "path"}`, which the collator opens.
    """

    def __init__(self, url: str | Path, *, verify: bool = False) -> None:
        self.store = Store(url)
        found = read_whole(self.store)
        if found is None:
            unfinished = ", where a preparation was begun and not ended: run it again" * bool(
                self.store.sizes(".preparing")
            )
            raise UserError(f"Nothing is prepared at {str(url)!r}: there is no {WHOLE}{unfinished}.")
        self.about = found
        self.shards: list[dict[str, Any]] = found["shards"]
        self._check(verify)
        self._read_index()

    @property
    def card(self) -> dict[str, Any]:
        """The recipe card that it was made from."""
        return dict(self.about["card"])

    @property
    def accounting(self) -> dict[str, Any]:
        """What became of every row of the recipe, as in accounting.json."""
        return dict(self.about["accounting"])

    @property
    def fingerprint(self) -> str:
        """A hash of all that it was made from: card, content of the source, limit, what it was measured with."""
        return str(self.about["fingerprint"])

    @property
    def measured_with(self) -> dict[str, Any] | None:
        """The collator's settings that decide on lengths, and on what is too long; None if it was not measured."""
        found: dict[str, Any] | None = self.about["measured_with"]
        return found

    @property
    def lengths(self) -> list[int] | None:
        """Tokens of each example as it is trained on; None if it was not measured."""
        return None if self._tokens is None else self._tokens.tolist()

    @property
    def measures(self) -> dict[str, Any] | None:
        """Of how many examples, mean tokens in all, of media and of responses, and the most of one; None if it was not measured."""
        if self._tokens is None:
            return None
        total, count = self.accounting["tokens"], len(self)
        means = {
            name: total[kind] / count
            for name, kind in (("tokens", "all"), ("media", "media"), ("response", "response"))
        }
        return {
            "sample": count,
            "looked_at": count,
            **means,
            "longest": int(self._tokens.max()),
            "most_media": self._most_media,
        }

    @property
    def sources(self) -> list[str]:
        """The sources of the examples, in the order of their first appearance, without reading the examples."""
        return self._known_sources

    @property
    def media(self) -> dict[str, int]:
        """How many examples have images, how many videos, and how many are text alone."""
        return dict(self.about["media"])

    def __len__(self) -> int:
        return len(self._where)

    def __getitems__(self, places: Sequence[int]) -> list[Example]:
        """The examples at these places: what lies together is read together, and nothing twice."""
        if not len(places):
            return []
        rows = self._where[list(places)].tolist()
        media = [self._parts[first:end].tolist() for *_, first, end in rows]
        ranges: list[Range] = []
        for (shard, at, length, tools_at, tools_length, _, _), parts in zip(rows, media, strict=True):
            name = self._names[shard]
            ranges.append((name, at, length))
            if tools_length:
                ranges.append((name, tools_at, tools_length))
            ranges += [(name, begin, size) for _, begin, size in parts]
        read = iter(self.store.read_ranges(ranges))
        return [self._example(*one, read) for one in zip(places, rows, media, strict=True)]

    def __iter__(self) -> Iterator[Example]:
        return self.between(0, None)

    def between(self, start: int, end: int | None) -> Iterator[Example]:
        """The examples from one place to before another, in order, a block read at a time."""
        places = range(len(self))[start:end]
        for k in range(0, len(places), BLOCK):
            yield from self.__getitems__(places[k : k + BLOCK])

    def _example(self, place: int, row: list[int], parts: list[list[int]], read: Iterator[bytes]) -> Example:
        """An example, from what the index says of it and the bytes of its values."""
        messages = self._parsed(next(read), place, row[0])
        tools = self._parsed(next(read), place, row[0]) if row[4] else []
        images: list[Any] = []
        videos: list[Any] = []
        for k, (kind, _, _) in enumerate(parts, row[5]):
            medium = {"bytes": next(read), "path": self._paths[k].as_py()}
            if kind == IMAGE:
                images.append(medium)
            elif kind == NEXT_FRAME:
                videos[-1].append(medium)
            else:
                videos.append([medium] if kind == FRAME else medium)
        own, source = self._ids[place].as_py(), self._sources[place].as_py()
        return Example(messages, images, id=own, source=source, videos=videos, tools=tools)

    def _parsed(self, raw: bytes, place: int, shard: int) -> list[Any]:
        try:
            found: list[Any] = json.loads(raw.decode())
        except ValueError as error:
            raise UserError(
                f"{self.store}/{self._names[shard]} is damaged: what it holds of row {self._ids[place]} is no JSON ({error}). Restore it, or prepare "
                "again."
            ) from error
        return found

    def _check(self, verify: bool) -> None:
        """Every file is there in its size, and (verify) with its content."""
        sizes = self.store.sizes()
        for file in (*self.shards, self.about["index"]):
            name, size = file["name"], sizes.get(file["name"])
            if size is None:
                raise UserError(f"{self.store}/{name} is missing. Restore it, or prepare again.")
            if size != file["bytes"]:
                raise UserError(
                    f"{self.store}/{name} is damaged: expected {file['bytes']:,} bytes, found {size:,}. Restore it, or prepare again."
                )
        for file in self.shards if verify else ():
            self._check_content(file)

    def _check_content(self, file: Mapping[str, Any]) -> None:
        digest, step = hashlib.sha256(), 2**24
        for at in range(0, file["bytes"], step):
            digest.update(self.store.read_ranges([(file["name"], at, min(step, file["bytes"] - at))])[0])
        if digest.hexdigest() != file["sha256"]:
            raise UserError(
                f"{self.store}/{file['name']} is damaged: its sha256 is not the one it was written with. Restore it, or prepare again."
            )

    def _read_index(self) -> None:
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        raw = self.store.read(INDEX)
        if hashlib.sha256(raw).hexdigest() != self.about["index"]["sha256"]:
            raise UserError(f"{self.store}/{INDEX} is damaged: its sha256 is wrong. Restore it, or prepare again.")
        table = (
            pq.ParquetFile(pa.BufferReader(raw)).read(use_threads=False).combine_chunks()
        )  # no threads: forks follow
        column = {name: table.column(name).combine_chunks() for name in table.column_names}
        part = {name: column[f"part_{name}"] for name in ("kind", "at", "length", "name")}
        ends = np.from_dlpack(part["kind"].offsets)
        numbers = [np.from_dlpack(column[name]) for name in WHERE]  # to_numpy would import pandas
        self._where = np.stack([*numbers, ends[:-1], ends[1:]], axis=1, dtype=np.int64)  # WHERE, its parts from, to
        self._parts = np.stack(
            [np.from_dlpack(part[name].values) for name in ("kind", "at", "length")], axis=1, dtype=np.int64
        )
        self._paths, self._ids = part["name"].values, column["id"]
        self._tokens = None if self.measured_with is None else np.from_dlpack(column["tokens"])
        self._most_media = 0 if self.measured_with is None else int(np.from_dlpack(column["media"]).max())
        self._names = [shard_name(number) for number in range(int(self._where[:, 0].max()) + 1)]
        source = column["source"]
        self._known_sources = list(self.about["accounting"]["used_by_source"])
        from vlm_dft.recipes import MAX_SOURCES

        if len(self._known_sources) > MAX_SOURCES:  # as load_recipe does: too many to tell apart
            self._known_sources = [str(self.about["card"]["name"])]
            source = pa.DictionaryArray.from_arrays(np.zeros(len(table), np.int32), pa.array(self._known_sources))
        self._sources = source
