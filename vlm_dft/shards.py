"""Shards: examples packed with the bytes of their media in; parquet files, and where in them each value lies, out."""

from __future__ import annotations

import hashlib
import io
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vlm_dft.chat import Example
from vlm_dft.errors import RowError
from vlm_dft.prepared import FRAME, IMAGE, NEXT_FRAME, VIDEO
from vlm_dft.sources import MediaAccess, content_of

GROUP_ROWS, GROUP_BYTES = 64, 8 * 2**20  # of a row group, at most: what others read at once
VIDEO_BYTES, ROW_BYTES = 256 * 2**20, 2**30  # of one video and of a row, at most
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")

Medium = tuple[bytes, str]  # a file as it is, and its name


class Packed(NamedTuple):
    """An example whose media are bytes."""

    id: str
    source: str
    messages: bytes  # JSON
    tools: bytes | None
    images: list[Medium]
    videos: list[Medium | list[Medium]]  # files, or lists of frames

    def likeness(self) -> bytes:
        """16 bytes that examples of the same messages, tools and media have in common, whatever their ids and files' names."""
        digest = hashlib.blake2b(self.messages + b"\0" + (self.tools or b""), digest_size=16)
        for medium in (*self.images, *(frame for v in self.videos for frame in (v if isinstance(v, list) else [v]))):
            digest.update(hashlib.blake2b(medium[0]).digest())
        return digest.digest()

    def size(self) -> int:
        """Bytes, near enough."""
        files = [*self.images, *(f for v in self.videos for f in (v if isinstance(v, list) else [v]))]
        return len(self.messages) + len(self.tools or b"") + sum(len(raw) for raw, _ in files) + 100


@dataclass(frozen=True, slots=True)
class Pack:
    """Packs examples. Called in the workers; media files are read here, as they are, and nowhere decoded."""

    root: Path | None
    access: MediaAccess

    def __call__(self, example: Example) -> Packed:
        where = f"{example.source} row {example.id}"
        videos: list[Medium | list[Medium]] = [
            [self._medium(frame, f"{where}, frame of video {k}", "image") for frame in video]
            if isinstance(video, (list, tuple))
            else self._medium(video, f"{where}, video {k}", "video")
            for k, video in enumerate(example.videos)
        ]
        packed = Packed(
            _text(example.id, where), _text(example.source, where), _json(example.messages, where),
            _json(example.tools, where) if example.tools else None,
            [self._medium(image, f"{where}, image {k}", "image") for k, image in enumerate(example.images)], videos,
        )  # fmt: skip
        if packed.size() > ROW_BYTES:
            raise RowError(
                f"{where}: {packed.size():,} bytes, expected at most {ROW_BYTES:,}. Shrink its media.", "row too large"
            )
        return packed

    def _medium(self, source: Any, where: str, kind: str) -> Medium:
        name = source.get("path") or "" if isinstance(source, Mapping) else source
        if isinstance(source, Mapping) and isinstance(source.get("bytes"), bytes):
            raw = source["bytes"]
        else:
            content, _ = content_of(source, where, self.access, kind)
            raw = _read(content, kind) if isinstance(content, io.IOBase) else _png(content, where)
        if len(raw) > VIDEO_BYTES and kind == "video":
            raise RowError(
                f"{where}: over {VIDEO_BYTES:,} bytes, more than the prepared form embeds of a video. Cut it into "
                "shorter ones, or train on the recipe as it is.",
                "video too large to embed",
            )
        return raw, _text(self._name(name), where)

    def _name(self, name: Any) -> str:
        """A path below the data folder, a URL, or nothing for what has no name."""
        if isinstance(name, Path):
            inside = self.root is not None and name.is_relative_to(self.root.resolve())
            return name.relative_to(self.root.resolve()).as_posix() if inside and self.root else name.name
        return name if isinstance(name, str) and len(name) < 1024 and not name.startswith("data:") else ""


def _read(content: Any, kind: str) -> bytes:
    """A file's bytes; of a video that is too long, as many as show it."""
    with content:
        return bytes(content.read(VIDEO_BYTES + 1 if kind == "video" else -1))


def _png(picture: Any, where: str) -> bytes:
    """A decoded picture, which has no file of its own, without loss."""
    if picture.mode not in PNG_MODES:
        raise RowError(
            f"{where}: a decoded picture of mode {picture.mode}, which PNG does not hold. Give the file itself."
        )
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{where}: not Unicode text ({error}). Mend the row.", "text is not Unicode") from error
    return text


def _json(value: Any, where: str) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise RowError(f"{where}: its messages or tools cannot be written as JSON ({error}).", "not JSON") from error
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a character pair, which only an escape can say
        return json.dumps(value, separators=(",", ":")).encode()


def schema() -> Any:
    """Of a shard. Its metadata let `datasets` open the images as pictures."""
    import pyarrow as pa

    medium = [("bytes", pa.binary()), ("path", pa.string())]
    video = pa.struct([*medium, ("frames", pa.list_(pa.struct(medium)))])
    text, raw = {"dtype": "string", "_type": "Value"}, {"dtype": "binary", "_type": "Value"}
    frames = {"_type": "List", "feature": {"bytes": raw, "path": text}}
    features = {
        "id": text, "source": text, "messages": text, "images": {"_type": "List", "feature": {"_type": "Image"}},
        "videos": {"_type": "List", "feature": {"bytes": raw, "path": text, "frames": frames}}, "tools": text,
    }  # fmt: skip
    return pa.schema(
        [("id", pa.string()), ("source", pa.string()), ("messages", pa.string()), ("images", pa.list_(pa.struct(medium))),
         ("videos", pa.list_(video)), ("tools", pa.string())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )  # fmt: skip


class ShardWriter:
    """Writes one parquet file, a row group at a time, so that every value lies in it as it is: uncompressed and plain."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.path, self.schema, self.rows = path, schema(), 0
        self.bytes = self._held = 0
        self._group: list[Packed] = []
        self._writer = pq.ParquetWriter(
            path, self.schema, compression="none", use_dictionary=["source"], write_statistics=False
        )

    def add(self, row: Packed) -> None:
        """Write a row, sooner or later."""
        size = row.size()
        if self._group and self._held + size > GROUP_BYTES:
            self._flush()
        self._group.append(row)
        self._held += size
        self.bytes += size
        self.rows += 1
        if len(self._group) == GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        """Write what is held."""
        self._flush()
        self._writer.close()

    def abandon(self) -> None:
        """Close the file without the rest: it is not to be used."""
        self._group = []
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._group:
            return
        columns = {
            "id": [row.id for row in self._group],
            "source": [row.source for row in self._group],
            "messages": pa.array([row.messages for row in self._group], pa.binary()).cast(pa.string()),
            "images": [[_column(image) for image in row.images] for row in self._group],
            "videos": [[_column(video) for video in row.videos] for row in self._group],
            "tools": pa.array([row.tools for row in self._group], pa.binary()).cast(pa.string()),
        }
        self._writer.write_table(pa.table(columns, schema=self.schema), row_group_size=len(self._group))
        self._group, self._held = [], 0


def _column(medium: Medium | list[Medium]) -> dict[str, Any]:
    if isinstance(medium, list):
        return {"bytes": None, "path": None, "frames": [_column(frame) for frame in medium]}
    return {"bytes": medium[0], "path": medium[1]}


@dataclass(slots=True)
class _Place:
    """Of a row in its shard: where each value begins, and its bytes."""

    messages: tuple[int, int]
    tools: tuple[int, int]
    parts: list[tuple[int, int, int, str]] = field(default_factory=list)  # (kind, first byte, bytes, name)


def locate(path: Path) -> Iterator[_Place]:
    """Where the values of each row lie in a shard: found by looking for them, so that what is read there is right."""
    import pyarrow.parquet as pq

    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        file = pq.ParquetFile(stream)
        for group in range(file.num_row_groups):
            finder = _Finder(raw, file.metadata.row_group(group))
            rows = file.read_row_group(group, columns=["messages", "images", "videos", "tools"], use_threads=False)
            for messages, images, videos, tools in zip(*(column.to_pylist() for column in rows.columns), strict=True):
                place = _Place(
                    finder("messages", messages.encode()), (0, 0) if tools is None else finder("tools", tools.encode())
                )
                for image in images:
                    place.parts.append((IMAGE, *finder("images.list.element.bytes", image["bytes"]), image["path"]))
                for video in videos:
                    if video["frames"] is None:
                        at = finder("videos.list.element.bytes", video["bytes"])
                        place.parts.append((VIDEO, *at, video["path"]))
                    for k, frame in enumerate(video["frames"] or ()):
                        at = finder("videos.list.element.frames.list.element.bytes", frame["bytes"])
                        place.parts.append((NEXT_FRAME if k else FRAME, *at, frame["path"]))
                yield place


class _Finder:
    """The values of a row group's columns, one after the other, in the file's bytes."""

    def __init__(self, raw: mmap.mmap, group: Any) -> None:
        self.raw, self.cursors = raw, dict[str, tuple[int, int]]()
        for k in range(group.num_columns):
            column = group.column(k)
            start = column.data_page_offset
            self.cursors[column.path_in_schema] = (start, start + column.total_compressed_size)

    def __call__(self, column: str, value: bytes) -> tuple[int, int]:
        start, end = self.cursors[column]
        at = self.raw.find(len(value).to_bytes(4, "little") + value, start, end)  # as PLAIN encoding has it
        assert at >= 0, f"{column}: a value of {len(value)} bytes is not in its pages as it is; which pyarrow is this?"
        self.cursors[column] = (at + 4 + len(value), end)
        return at + 4, len(value)


def index_table(rows: Sequence[Mapping[str, Any]], places: Sequence[_Place]) -> Any:
    """The index of a shard's rows: {id, source, tokens, media, response, changed, shard, row} of each, and where its values lie."""
    import pyarrow as pa

    columns: dict[str, Any] = {name: pa.array([row[name] for row in rows], pa.string()) for name in ("id", "source")}
    for name in ("tokens", "media", "response", "shard", "row"):
        columns[name] = pa.array([row[name] for row in rows], pa.int32())
    columns["changed"] = pa.array([row["changed"] for row in rows], pa.list_(pa.string()))
    columns["likeness"] = pa.array([row["likeness"] for row in rows], pa.binary(16))
    for name in ("messages", "tools"):
        found = [getattr(place, name) for place in places]
        columns[f"{name}_at"] = pa.array([at for at, _ in found], pa.int64())
        columns[f"{name}_length"] = pa.array([length for _, length in found], pa.int32())
    for k, (name, kind) in enumerate(
        (("kind", pa.int8()), ("at", pa.int64()), ("length", pa.int32()), ("name", pa.string()))
    ):
        columns[f"part_{name}"] = pa.array([[part[k] for part in place.parts] for place in places], pa.list_(kind))
    return pa.table(columns)


def sha256_of(path: Path) -> str:
    """A file's checksum."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
