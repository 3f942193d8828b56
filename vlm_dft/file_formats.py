"""File formats: a data file of any kind in, told by its content; its rows out in file order, or what it is instead and what to do."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from vlm_dft.errors import RowError
from vlm_dft.json_files import CHUNK, LINES, Place, is_lines, json_lines, json_whole
from vlm_dft.table_files import (
    NO_PICKLES,
    PICKLES,
    arrow_count,
    arrow_rows,
    csv_rows,
    parquet_count,
    parquet_rows,
    tar_rows,
)  # fmt: skip

Reader = Callable[[Path, str, int], Iterator[Place]]
HEAD = 1024  # bytes by which a kind is told
GZIP = b"\x1f\x8b"
INSTEAD = (  # (how a file begins that is none of the kinds, what it is and what to do)
    (rb"version https://git-lfs", "a git-LFS pointer, not the file itself. Run `git lfs pull` in its folder, or download the file"),
    (rb"\s*(<!doctype html|<html|<head)", "an HTML page, often an error page saved in its place. Download it again"),
    (rb"\s*<\?xml", "XML. Convert it to JSON lines"),
    (rb"\x80[\x02-\x05].", f"a pickle. {NO_PICKLES}"),
    (rb"\x93NUMPY", f"a NumPy file, which may hold a pickle. {NO_PICKLES}"),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive (or a spreadsheet or torch file, which are). Unpack it and name the file inside; "
     "a zip of pictures is named as `image_root`"),
    (rb"BZh", "compressed by bzip2. Unpack it: bunzip2 FILE"),
    (rb"\xfd7zXZ", "compressed by xz. Unpack it: unxz FILE"),
    (rb"\x28\xb5\x2f\xfd", "compressed by zstandard. Unpack it: zstd -d FILE"),
    (rb"7z\xbc\xaf", "a 7-Zip archive. Unpack it: 7z x FILE"),
    (rb"Rar!", "a RAR archive. Unpack it: unrar x FILE"),
    (rb"SQLite format 3", "an SQLite database. Export its table as CSV"),
    (rb"\x89HDF", "an HDF5 file. Convert it to parquet"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF", "a picture or a recording. Expected the file of rows"),
    (rb"%PDF", "a PDF document. Expected the file of rows"),
)  # fmt: skip


def file_rows(path: Path, name: str, kind: str | None = None, start: int = 0) -> Iterator[Place]:
    """(number or key, row or RowError) of every row of a file, in order; of COUNTS kinds from row `start` on.

    Raises RowError where the file is no data at all, and where nothing more can be read.
    """
    found = kind_of(path, name, kind)
    yield from READERS[found](path, name, start)


def kind_of(path: Path, name: str, said: str | None = None) -> str:
    """The kind that a card said, or a file's own, by its content, or its suffix where that leaves it open. Raises RowError."""
    with opened(path, name) as file:
        head = file.read(HEAD)
        check_data(head, name)
        if said is not None:
            return said
        if head.startswith(b"PAR1"):
            return "parquet"
        if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
            return "arrow"
        if head[257:262] == b"ustar":
            return "webdataset"
        suffix = _suffix(path)
        text = head.removeprefix(codecs.BOM_UTF8).lstrip()
        if text[:1] in (b"[", b"{"):
            file.seek(0)
            return "jsonl" if is_lines(file, suffix) else "json"
    if suffix in (".csv", ".tsv"):
        first = text.split(b"\n")[0]
        return (
            "tsv"
            if b"\t" in first and b"," not in first
            else "csv"
            if b"," in first and b"\t" not in first
            else suffix[1:]
        )
    if suffix in (".json", *LINES):
        return "json" if suffix == ".json" else "jsonl"
    if suffix in (".parquet", ".arrow", ".tar", ".tgz"):
        raise RowError(f"{name}: not a {suffix[1:]} file; it begins {head[:12]!r}. Download it again.", "damaged")
    raise RowError(
        f"{name}: its content ({head[:20]!r}...) does not tell its kind. Say it in the card's source: kind, one of "
        f"{', '.join(READERS)}.",
        "kind unknown",
    )


def check_data(head: bytes, name: str) -> None:
    """Raise RowError for a file that begins as no data file does, with what it is and what to do."""
    if not head.strip(b"\xef\xbb\xbf \t\r\n"):
        raise RowError(f"{name} is empty. Expected rows. Restore or download the file.", "empty file")
    for start, what in INSTEAD:
        if re.match(start, head.removeprefix(codecs.BOM_UTF8), re.IGNORECASE | re.DOTALL):
            raise RowError(f"{name} is {what}.", "not a data file")
    if _suffix(Path(name))[1:] in PICKLES:
        raise RowError(f"{name} is, by its name, a pickle. {NO_PICKLES}.", "not a data file")
    for mark, encoding in UNICODE:
        if re.match(mark, head, re.DOTALL):
            raise RowError(
                f"{name}: expected UTF-8 text, found {encoding}. Convert the file: iconv -f {encoding} -t UTF-8 OLD > NEW.",
                "not UTF-8",
            )


UNICODE = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16"),
    (rb"([\t\n\r -~]\0){4}", "UTF-16LE"),
    (rb"(\0[\t\n\r -~]){4}", "UTF-16BE"),
)  # (how such a text begins, iconv's name)


def count_in(path: Path, name: str, kind: str | None = None) -> int | None:
    """Rows of a file where its metadata say so, without reading them; else None."""
    counter = COUNTS.get(kind_of(path, name, kind))
    return None if counter is None else counter(path, name)


@contextmanager
def opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    """A file open for reading, unpacked on the way where gzip compressed it. Raises RowError for one that cannot be."""
    if path.is_dir():
        raise RowError(f"{name} is a folder. Expected a file; name those in it by a pattern: {name}/*.parquet.")
    try:
        with open(path, "rb", CHUNK) as file:
            packed = file.read(2) == GZIP
            file.seek(0)
            yield cast(IO[bytes], gzip.GzipFile(fileobj=file)) if packed else file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = f"its compressed data are cut short or damaged ({error})"
        raise RowError(f"{name}: {what}. Download it again.", "damaged") from error
    except OSError as error:
        raise RowError(f"{name} cannot be read ({error.strerror or error}). Check its name and its mode.") from error


def _suffix(path: Path) -> str:
    """Of a file's name, without what says that it is compressed."""
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix.lower()


def _text(read: Callable[..., Iterator[Place]], *settings: Any) -> Reader:
    """A reader of open files as one of paths: what gzip says of a damaged file becomes a RowError."""

    def rows(path: Path, name: str, start: int) -> Iterator[Place]:
        with opened(path, name) as file:
            yield from read(file, name, *settings)

    return rows


READERS: dict[str, Reader] = {
    "json": _text(json_whole),
    "jsonl": _text(json_lines),
    "csv": _text(csv_rows, ","),
    "tsv": _text(csv_rows, "\t"),
    "webdataset": _text(tar_rows),
    "parquet": parquet_rows,
    "arrow": arrow_rows,
}
COUNTS: dict[str, Callable[[Path, str], int]] = {"parquet": parquet_count, "arrow": arrow_count}
"""Kinds whose rows can be counted, and gone over, without being read."""
