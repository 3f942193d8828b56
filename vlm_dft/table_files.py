"""Tables: a CSV, parquet, Arrow or webdataset file in; its rows out one by one, in flat memory, pictures as {bytes, path}."""

from __future__ import annotations

import csv
import gzip
import io
import json
import posixpath
import sys
import tarfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from vlm_dft.errors import RowError
from vlm_dft.json_files import RAW, Decoder, Place, not_utf8

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_BYTES, BATCH_ROWS = 4 << 20, 1024  # of a parquet file, held at once
MEMBER_BYTES = 1 << 30  # of one member of a tar
PICKLES = ("pickle", "pkl", "pyd", "pth", "pt", "npy", "npz", "joblib")  # loading them may run what they hold
NO_PICKLES = "It could run code when it is loaded, so it is not. Ask for the data as JSON or parquet, or convert it where that is safe"


def csv_rows(file: IO[bytes], name: str, delimiter: str) -> Iterator[Place]:
    """The rows of a CSV (RFC 4180) or TSV file: its first line names the columns, every value is a string."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    records = _records(text, delimiter)
    _, columns = next(records)
    if isinstance(columns, str):
        raise RowError(f"{name}, line 1: {columns}.", "not valid CSV")
    if odd := _not_utf8(columns, f"{name}, line 1"):
        raise odd
    if any("\r" in column for column in columns):
        raise RowError(
            f"{name}, line 1: a carriage return within it: lines end in CR alone, as on old Macs, or a name holds a line break. "
            "Convert the file: tr '\\r' '\\n' < OLD > NEW.",
            "not valid CSV",
        )
    _unique(columns, name)
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t,"):
        raise RowError(
            f"{name}: one column found, {columns[0][:80]!r}. Expected values apart by {delimiter!r}: convert the file, or say "
            "`kind: csv` (commas) or `kind: tsv` (tabs) in the card's source.",
            "not valid CSV",
        )
    for number, (line, values) in enumerate(records):
        where = f"{name}, row {number} (line {line})"
        if isinstance(values, str):
            yield number, RowError(f"{where}: {values}.", "not valid CSV")
        elif odd := _not_utf8(values, where):
            yield number, odd
        elif len(values) != len(columns):
            what = f"expected {len(columns)} values, as there are columns, found {len(values)}. Quote values that hold "
            yield number, RowError(f"{where}: {what}{delimiter!r} or a newline.", "wrong number of values")
        else:
            yield number, dict(zip(columns, values, strict=True))


def _records(lines: IO[str], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """(the number of its first line, its values or what is wrong with it) of every record that is not empty."""
    csv.field_size_limit(sys.maxsize)  # pictures as base64; the limit is the process's
    number = 1
    for line in lines:
        begin = number
        if '"' not in line:  # several times as fast
            number += 1
            if text := line.rstrip("\r\n"):
                yield begin, text.split(delimiter)
            continue
        reader = csv.reader(chain([line], lines), delimiter=delimiter, strict=True)
        found: list[str] | str
        try:
            found = next(reader)
        except csv.Error as error:
            never = "unexpected end" in str(error)
            what = "a quote is opened and never closed: the rest of the file is in it" if never else str(error)
            found = f"{what}. Quote values as RFC 4180 says, quotes in them twice"
        number += reader.line_num
        yield begin, found


def _not_utf8(values: list[str], where: str) -> RowError | None:
    """The error of a record that holds bytes which are not UTF-8."""
    if all(value.isascii() for value in values) or not (odd := RAW.search(text := " ".join(values))):
        return None
    raw, before = (part.encode(errors="surrogateescape") for part in (text, text[: odd.start()]))
    return not_utf8(raw, len(before), where)


def parquet_count(path: Path, name: str) -> int:
    """Rows of a parquet file, from its footer."""
    with _parquet(path, name) as file:
        return int(file.metadata.num_rows)


def parquet_rows(path: Path, name: str, start: int = 0) -> Iterator[Place]:
    """The rows of a parquet file from `start` on; row groups before it are not read."""
    with _parquet(path, name) as file:
        _unique(file.schema_arrow.names, name)
        metadata, number = file.metadata, 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if number + rows <= start:
                number += rows
                continue
            size = metadata.row_group(group).total_byte_size // max(rows, 1) + 1
            count = max(1, min(BATCH_ROWS, BATCH_BYTES // size))
            batches = file.iter_batches(batch_size=count, row_groups=[group])
            yield from _batch_rows(batches, number, start, f"{name}, row group {group}")
            number += rows


def _parquet(path: Path, name: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise RowError(f"{name}: not a whole parquet file ({_brief(error)}). Download it again.", "damaged") from error


def arrow_files(folder: Path, name: str, split: str | None) -> list[Path]:
    """The Arrow files of a folder that `datasets.save_to_disk` wrote, of one split where it has several."""
    if (folder / "dataset_dict.json").is_file():
        splits = _described(folder / "dataset_dict.json", name).get("splits", [])
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            found = "no split was named" if split is None else f"found split: {split}"
            raise RowError(
                f"{name} holds the splits {', '.join(splits)}; {found}. Name one of them in the card's source."
            )
        folder = folder / str(split)
    files = [folder / data["filename"] for data in _described(folder / "state.json", name).get("_data_files", [])]
    missing = next((path.name for path in files if not path.is_file()), None)
    if missing:
        raise RowError(f"{name}: its state.json names {missing}, which is not there. Copy the whole folder.")
    return files


def is_arrow_folder(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote a folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def arrow_rows(path: Path, name: str, start: int = 0) -> Iterator[Place]:
    """The rows of an Arrow file, stream or random access, from `start` on."""
    import pyarrow as pa

    with _arrow(path, name) as source:
        try:
            head = source.read(6)
            source.seek(0)
            if head == b"ARROW1":
                reader: Any = pa.ipc.open_file(source)
                batches = (reader.get_batch(k) for k in range(reader.num_record_batches))
            else:
                reader = batches = pa.ipc.open_stream(source)
            _unique(reader.schema.names, name)
        except (pa.ArrowException, OSError) as error:
            raise RowError(f"{name}: not a whole Arrow file ({_brief(error)}). Copy it again.", "damaged") from error
        yield from _batch_rows(batches, 0, start, name)


def arrow_count(path: Path, name: str) -> int:
    """Rows of an Arrow file, from the heads of its batches: nothing of their data is read."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        head = source.read(6)
        source.seek(0)
        try:
            if head == b"ARROW1":
                file = pa.ipc.open_file(source)
                return sum(file.get_batch(k).num_rows for k in range(file.num_record_batches))
            return sum(batch.num_rows for batch in pa.ipc.open_stream(source))
        except (pa.ArrowException, OSError) as error:
            raise RowError(f"{name}: not a whole Arrow file ({_brief(error)}). Copy it again.", "damaged") from error


def _arrow(path: Path, name: str) -> Any:
    import pyarrow as pa

    return pa.OSFile(str(path))  # not mapped: mapped pages would count as memory


def _batch_rows(batches: Iterator[pa.RecordBatch], number: int, start: int, where: str) -> Iterator[Place]:
    """The rows of record batches, of which the first is row `number`; those before `start` are not made."""
    import pyarrow as pa

    batches = iter(batches)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (pa.ArrowException, OSError) as error:
            raise RowError(
                f"{where}: damaged after row {number} ({_brief(error)}). Download it again.", "damaged"
            ) from error
        first = max(0, start - number)
        step = max(1, min(BATCH_ROWS, BATCH_BYTES // (batch.nbytes // max(batch.num_rows, 1) + 1)))
        for at in range(first, batch.num_rows, step):
            yield from enumerate(batch.slice(at, step).to_pylist(), number + at)
        number += batch.num_rows


def tar_rows(file: IO[bytes], name: str) -> Iterator[Place]:
    """The rows of a webdataset tar: members that share a name up to its first dot are one row.

    A .json object gives its columns, a .txt or .cls member its text, any other member {"bytes", "path"}, each under its
    ending. Nothing is unpacked to disk, and no pickle is loaded.
    """
    row: dict[str, Any] | RowError = {}
    key, number = None, 0
    try:
        with tarfile.open(fileobj=file, mode="r|*") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every one
                folder, base = posixpath.split(member.name)
                stem, dot, ending = base.partition(".")
                if member.isdir() or not stem or not dot:
                    continue
                if (folder, stem) != key:
                    if key is not None:
                        yield number, row
                        number += 1
                    key, row = (folder, stem), {"__key__": posixpath.join(folder, stem)}
                if not isinstance(row, RowError):
                    row = _with_member(row, tar, member, ending.lower(), f"{name}, {member.name}")
        if not isinstance(cast(Any, file), gzip.GzipFile):  # which itself knows its end
            file.seek(-tarfile.BLOCKSIZE, 2)
            if file.read().strip(b"\0"):
                raise tarfile.ReadError("it does not end as a tar does")
    except tarfile.TarError as error:
        raise RowError(f"{name}: not a whole tar archive ({_brief(error)}). Download it again.", "damaged") from error
    if key is not None:
        yield number, row


def _with_member(
    row: dict[str, Any], tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str, where: str
) -> dict[str, Any] | RowError:
    """The row with one more member, or why there is none."""
    if ending.rpartition(".")[2] in PICKLES:
        return RowError(f"{where} is a pickle or may hold one. {NO_PICKLES}.", "a pickle")
    content = tar.extractfile(member) if member.isreg() else None
    if content is None:
        return RowError(f"{where} is no plain file but a link or a device, which is not followed.", "not a plain file")
    if member.size > MEMBER_BYTES:
        return RowError(f"{where} announces {member.size:,} bytes; at most {MEMBER_BYTES:,} are read.", "too large")
    data = content.read()
    columns: dict[str, Any]
    try:
        if ending == "json":
            decoder = Decoder()
            found = decoder.checked(decoder.decode(data.decode("utf-8-sig")), where)
            if isinstance(found, RowError):
                return found
            columns = found if isinstance(found, dict) else {"json": found}
        elif ending in ("txt", "text", "cls"):
            columns = {ending: data.decode("utf-8-sig")}
        else:
            columns = {ending: {"bytes": data, "path": member.name}}
    except UnicodeDecodeError as error:
        return not_utf8(data, error.start, where)
    except (ValueError, RecursionError) as error:
        return RowError(f"{where}: not valid JSON ({error}).", "not valid JSON")
    twice = next((column for column in columns if column in row), None)
    if twice is not None:
        return RowError(
            f"{where}: column {twice!r} is there twice in {row['__key__']}. Rename one.", "columns repeated"
        )
    return {**row, **columns}


def _described(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RowError(f"{name}: {path.name} cannot be read ({error}). Copy the whole folder.", "damaged") from error
    return found if isinstance(found, dict) else {}


def _unique(columns: list[str], name: str) -> None:
    repeated = next((column for column in columns if columns.count(column) > 1), None)
    if repeated:
        raise RowError(f"{name}: column {repeated!r} is there twice. Give each its own name.", "columns repeated")


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
