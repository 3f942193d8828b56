"""File formats: every kind of data file is told by its content and read row by row; what is none is named with what to do."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import pickle
import random
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm_dft import json_files
from vlm_dft.errors import RowError
from vlm_dft.file_formats import count_in, file_rows, kind_of
from vlm_dft.json_files import json_whole

ROWS: list[dict[str, Any]] = [
    {"q": "How far is é?", "a": "3,5", "c": ["x", "y"], "n": None},
    {"q": 'Two "quoted"\nlines\t\u2028', "a": "", "c": [], "n": 1.5},
    {"q": "三角形", "a": "<image>", "c": ["z"], "n": -2.0},
]
TEXT = [{key: str(row[key]) for key in ("q", "a")} for row in ROWS]
EMBEDDED: list[dict[str, Any]] = [
    {"q": str(k), "image": {"bytes": bytes([k]) * 9, "path": f"{k}.png"}} for k in range(7)
]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["q", "a"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(TEXT)
    return text.getvalue().encode("utf-8-sig")


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


def arrow(rows: list[dict[str, Any]], new: Any) -> bytes:
    sink = io.BytesIO()
    found = pa.Table.from_pylist(rows)
    with new(sink, found.schema) as writer:
        writer.write_table(found, max_chunksize=2)
    return sink.getvalue()


def tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def read(path: Path, kind: str | None = None, start: int = 0) -> list[Any]:
    return list(file_rows(path, path.name, kind, start))


def written(folder: Path, content: bytes, name: str = "data.bin") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def reasons(places: list[Any]) -> list[str | None]:
    return [row.reason if isinstance(row, RowError) else None for _, row in places]


ALIKE: dict[str, tuple[bytes, str, list[dict[str, Any]]]] = {
    "json list": (json.dumps(ROWS).encode(), "json", ROWS),
    "indented list": (json.dumps(ROWS, indent=2).encode(), "json", ROWS),
    "list with a mark of order": (b"\xef\xbb\xbf" + json.dumps(ROWS, ensure_ascii=False).encode(), "json", ROWS),
    "json lines": (jsonl(ROWS), "jsonl", ROWS),
    "lines with a mark of order and blanks": (b"\xef\xbb\xbf" + jsonl(ROWS).replace(b"\n", b"\r\n\n"), "jsonl", ROWS),
    "lines of gzip": (gzip.compress(jsonl(ROWS)), "jsonl", ROWS),
    "parquet": (parquet(EMBEDDED), "parquet", EMBEDDED),
    "arrow stream": (arrow(EMBEDDED, pa.ipc.new_stream), "arrow", EMBEDDED),
    "arrow file": (arrow(EMBEDDED, pa.ipc.new_file), "arrow", EMBEDDED),
}


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("file", ["data.bin", "data.json", "data.csv", "data.parquet"])
def test_a_file_is_read_by_its_content_whatever_its_name(name: str, file: str, tmp_path: Path) -> None:
    content, kind, expected = ALIKE[name]
    path = written(tmp_path, content, file)
    assert kind_of(path, "x") == kind
    assert [row for _, row in read(path)] == expected


def test_an_object_keyed_by_id_gives_its_keys_also_those_that_come_twice(tmp_path: Path) -> None:
    path = written(tmp_path, b'{"7": {"q": 1}, "8": {"q": 2}, "7": {"q": 3}}')
    assert read(path) == [("7", {"q": 1}), ("8", {"q": 2}), ("7", {"q": 3})]
    indented = written(tmp_path, json.dumps({str(k): {"q": k} for k in range(30)}, indent=1).encode())
    assert read(indented) == [(str(k), {"q": k}) for k in range(30)]


def test_an_object_of_other_things_is_one_row(tmp_path: Path) -> None:
    row = {"meta": {"a": 1}, "messages": [{"role": "user"}]}
    assert read(written(tmp_path, json.dumps(row, indent=2).encode())) == [(0, row)]
    assert read(written(tmp_path, json.dumps(row).encode())) == [(0, row)]


def test_json_lines_with_one_line_are_told_by_their_name(tmp_path: Path) -> None:
    line = b'{"a": {"q": 1}}\n'
    assert read(written(tmp_path, line, "a.jsonl")) == [(0, {"a": {"q": 1}})]
    assert read(written(tmp_path, line, "a.json")) == [("a", {"q": 1})]


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables_keep_quotes_newlines_and_separators_inside_values(suffix: str, delimiter: str, tmp_path: Path) -> None:
    assert [row for _, row in read(written(tmp_path, table(delimiter), f"a.{suffix}"))] == TEXT
    assert [row for _, row in read(written(tmp_path, table(delimiter)), suffix)] == TEXT
    assert [row for _, row in read(written(tmp_path, table(delimiter), "other.csv"))] == TEXT  # told by its first line
    assert [row for _, row in read(written(tmp_path, table(delimiter), "other.tsv"))] == TEXT
    assert [row for _, row in read(written(tmp_path, gzip.compress(table(delimiter)), f"a.{suffix}.gz"))] == TEXT


def test_a_table_with_a_picture_of_many_megabytes_in_one_value_is_read(tmp_path: Path) -> None:
    picture = "iVBORw0K" * 1_000_000
    content = f'index\tquestion\timage\n0\t"a\tb"\t{picture}\n1\tc\t{picture}\n'.encode()
    rows = [row for _, row in read(written(tmp_path, content, "a.tsv"))]
    assert [row["question"] for row in rows] == ["a\tb", "c"]
    assert all(row["image"] == picture for row in rows)


def test_rows_of_a_table_with_too_many_or_too_few_values_say_how_many(tmp_path: Path) -> None:
    path = written(tmp_path, b'q,a\n1,2\n\n3\n4,5,6\n"x\ny",7\n8,"open\n9,10\n', "a.csv")
    places = read(path)
    assert reasons(places) == [None, "wrong number of values", "wrong number of values", None, "not valid CSV"]
    assert "a.csv, row 1 (line 4): expected 2 values, as there are columns, found 1" in str(places[1][1])
    assert "row 2 (line 5): expected 2 values, as there are columns, found 3" in str(places[2][1])
    assert places[3] == (3, {"q": "x\ny", "a": "7"})
    assert "row 4 (line 8): a quote is opened and never closed" in str(places[4][1])


def test_a_row_of_a_table_in_another_encoding_is_one_row_that_cannot_be_read(tmp_path: Path) -> None:
    lines = ["q,a", "1,é", '"a ""b""","café\nau lait"', "3,三"]
    content = "\n".join(lines[:1]).encode() + b"\n" + lines[1].encode("cp1252") + b"\n" + lines[2].encode("cp1252")
    places = read(written(tmp_path, content + b"\n" + lines[3].encode() + b"\n", "a.csv"))
    assert reasons(places) == ["not UTF-8", "not UTF-8", None] and places[2][1]["a"] == "三"
    assert "a.csv, row 0 (line 2): expected UTF-8 text, found the byte 0xE9" in str(places[0][1])
    whole = "Grüße aus Köln: schön, größer, süß, Öl, Äpfel, Übung\n".encode("cp1252") * 9
    with pytest.raises(
        RowError, match="it is probably CP1252. Look, and convert the file: iconv -f CP1252 -t UTF-8 OLD > NEW"
    ):
        read(written(tmp_path, whole, "b.csv"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a,b,a\n1,2,3\n", "column 'a' is there twice"), (b"a;b\n1;2\n", "one column found, 'a;b'.*convert the file"),
     (b'"a\n', "line 1: a quote is opened and never closed")],
)  # fmt: skip
def test_a_table_without_good_column_names_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=message):
        read(written(tmp_path, content, "a.csv"))


def test_parquet_of_many_row_groups_is_read_from_any_row(tmp_path: Path) -> None:
    rows = [{"k": k, "image": {"bytes": bytes(k), "path": None}} for k in range(50)]
    path = written(tmp_path, parquet(rows, row_group_size=7))
    assert pq.ParquetFile(path).num_row_groups == 8
    for start in (0, 1, 6, 7, 8, 20, 49, 50, 60):
        assert read(path, start=start) == list(enumerate(rows))[start:]
    assert count_in(path, "x") == 50


def test_row_groups_before_the_start_are_not_read(tmp_path: Path) -> None:
    noise = random.Random(0)
    rows = [{"k": noise.randbytes(1000)} for _ in range(40)]
    content = bytearray(parquet(rows, row_group_size=10, compression="gzip", use_dictionary=False))
    content[200:3000] = bytes(2800)  # the first group is spoilt
    path = written(tmp_path, bytes(content))
    with pytest.raises(RowError, match="row group 0: damaged after row 0"):
        read(path)
    assert read(path, start=10) == list(enumerate(rows))[10:]


def test_arrow_files_are_read_from_any_row_and_counted(tmp_path: Path) -> None:
    for new in (pa.ipc.new_stream, pa.ipc.new_file):
        path = written(tmp_path, arrow(EMBEDDED, new))
        for start in (0, 1, 2, 5, 7):
            assert read(path, start=start) == list(enumerate(EMBEDDED))[start:]
        assert count_in(path, "x") == 7


def test_a_webdataset_gives_the_columns_of_its_json_and_pictures_as_bytes(tmp_path: Path) -> None:
    members = {
        "a/0001.jpg": b"\xff\xd8\xff one", "a/0001.json": b'{"q": "one", "id": 7}', "a/0001.txt": "é".encode(),
        "a/0002.left.png": b"png", "a/0002.json": b"[1]", "0002.cls": b"3",
    }  # fmt: skip
    expected = [
        {
            "__key__": "a/0001",
            "jpg": {"bytes": b"\xff\xd8\xff one", "path": "a/0001.jpg"},
            "q": "one",
            "id": 7,
            "txt": "é",
        },
        {"__key__": "a/0002", "left.png": {"bytes": b"png", "path": "a/0002.left.png"}, "json": [1]},
        {"__key__": "0002", "cls": "3"},
    ]
    for mode in ("w", "w:gz"):
        path = written(tmp_path, tar(members, mode), "a.json")
        assert kind_of(path, "x") == "webdataset"
        assert read(path) == list(enumerate(expected))


def test_our_webdataset_rows_are_those_of_datasets(tmp_path: Path) -> None:
    path = written(tmp_path, tar({f"{k:03}.{ending}": content for k in range(5) for ending, content in
                                  (("png", b"\x89PNG%d" % k), ("json", b'{"q": %d}' % k), ("txt", b"t%d" % k))}), "a.tar")  # fmt: skip
    theirs = datasets.load_dataset("webdataset", data_files=str(path), split="train", streaming=True).decode(False)
    for (_, ours), other in zip(read(path), theirs, strict=True):
        assert (ours["png"], ours["q"], ours["txt"]) == (other["png"], other["json"]["q"], other["txt"])
        assert ours["__key__"] == other["__key__"]


def test_members_of_a_webdataset_that_are_not_to_be_opened_make_their_row_unreadable(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, content in (("1.json", b"{}"), ("2.pickle", pickle.dumps(1)), ("2.json", b"{}"), ("3.json", b"{oops"),
                              ("5.json", b'{"txt": 1}'), ("5.txt", b"x"), ("6.pth", b"x"), ("7.txt", b"\xff")):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("8.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    places = read(written(tmp_path, sink.getvalue()))
    assert reasons(places) == [
        None, "a pickle", "not valid JSON", "columns repeated", "a pickle", "not UTF-8", "not a plain file",
    ]  # fmt: skip
    assert "2.pickle is a pickle or may hold one. It could run code when it is loaded" in str(places[1][1])


def test_memory_is_flat_while_a_long_tar_is_read(tmp_path: Path) -> None:
    peaks = []
    for count in (300, 6_000):
        path = written(tmp_path, tar({f"{k}.txt": b"x" for k in range(count)}))
        tracemalloc.start()
        assert sum(1 for _ in file_rows(path, "x")) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_a_cut_tar_ends_in_an_error_that_says_so(tmp_path: Path) -> None:
    whole = tar({f"{k}.txt": b"x" * 2000 for k in range(9)})
    for kept in (512 * 15, 512 * 15 + 100, 512 * 16 + 100, 512 * 17):  # between members, in a head, in what follows it
        places = file_rows(written(tmp_path, whole[:kept]), "a.tar")
        assert [next(places)[1]["__key__"] for _ in range(2)] == ["0", "1"]
        with pytest.raises(RowError, match="a.tar: not a whole tar archive.*Download it again"):
            list(places)
    assert len(read(written(tmp_path, whole))) == 9


# Rows that cannot be read among rows that can


def test_lines_that_cannot_be_read_take_a_place_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [
        b'{"q": 1}', b"", b'{"q": "half', b'{"q": "caf\xe9"}', b"[1]", b'{"q": NaN, "b": [1, Infinity]}', b"\0\0\0", b'{"q": 2,}',
        b'{"q": 1} {"q": 2}', b"[" * 100_000, b'{"q": ' + b"9" * 5000 + b"}", b'{"q": 3}',
    ]  # fmt: skip
    places = read(written(tmp_path, b"\n".join(lines), "a.jsonl"))
    assert [key for key, _ in places] == [0, *range(2, 12)]
    assert reasons(places) == [
        None, "not valid JSON", "not UTF-8", "not an object", "NaN in the row", *["not valid JSON"] * 5, None
    ]  # fmt: skip
    said = [str(row) for _, row in places]
    assert "a.jsonl, line 3: not valid JSON (column 7: half-written or cut short" in said[1]
    assert (
        "a.jsonl, line 4: expected UTF-8 text, found the byte 0xE9 at 10" in said[2]
        and "iconv -f CP1252 -t UTF-8" in said[2]
    )
    assert "a.jsonl, row 4: expected an object, found list" in said[3]
    assert "a.jsonl, line 6: column 'q' holds NaN, which JSON does not have. Write null" in said[4]
    assert "null bytes, as a crash while writing leaves them" in said[5]
    assert "column 9: a comma before the closing }. JSON allows none there: take it out" in said[6]
    assert "Extra data" in said[7]


def test_a_first_line_that_is_half_written_does_not_hide_json_lines(tmp_path: Path) -> None:
    places = read(written(tmp_path, b'{"q": "ha\n{"q": 1}\n{"q": 2}\n', "a.json"))
    assert reasons(places) == ["not valid JSON", None, None]


def test_rows_of_a_list_that_are_wrong_take_a_place_and_the_rest_is_read(tmp_path: Path) -> None:
    text = b'[{"q": 1},\n 5, {"q": {"r": -Infinity}},\n {"q": "caf\xe9"},\n {"q": 2}]'
    places = read(written(tmp_path, text))
    assert reasons(places) == [None, "not an object", "NaN in the row", "not UTF-8", None]
    assert "data.bin, row 1: expected an object, found int" in str(places[1][1])
    assert "data.bin, line 2, column 5: column 'q' holds -Infinity" in str(places[2][1])
    assert "data.bin, line 3, column 12: expected UTF-8 text, found the byte 0xE9 at 10" in str(places[3][1])
    keyed = b'{"a": {"q": 1}, "b": {"q": NaN}, "c": 3, "d": {"q": 4}}'
    assert reasons(read(written(tmp_path, keyed.replace(b'"c": 3, ', b'"c": {}, ')))) == [
        None,
        "NaN in the row",
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("text", "read_before", "message"),
    [
        ('[{"q": 1},\n{"q": 2},\n]', 2, r"line 3, column 1 \(row 2\): not valid JSON: a comma before the closing \]"),
        ('[{"q": 1},\n {"q": 2,}]', 1, r"line 2, column 10 \(row 1\): not valid JSON: a comma before the closing }"),
        ('[{"q": 1},\n {"q": "ha', 1, r"line 2, column 8 \(row 1\): .*half-written or cut short"),
        ('[{"q": 1},\n {"q": 2}', 2, r"line 2, column 10 \(row 2\): .*the file ends before its \]: it is cut short"),
        ('[{"q": 1}\n {"q": 2}]', 1, r"line 2, column 2 \(row 1\): .*expected , or \] after a row, found '{"),
        ("[{\"q\": 1},\n {'q': 2}]", 1, r"line 2, column 3 \(row 1\): .*Expecting property name enclosed in double quotes"),
        ('[{"q": 1}] [', 1, r"line 1, column 12 \(row 1\): .*more after the end of the JSON"),
        ('{"a": {"q": 1},\n "b" {"q": 2}}', 0, r"line 2, column 6 .*expected : after a key"),
        ('{"a": {"q": 1},\n b: {"q": 2}}', 0, r"line 2, column 2 .*expected a key in double quotes, found 'b: "),
        ("{oops", 0, "neither JSON .line 1, column 2: expected a key in double quotes, found 'oops'. nor JSON lines"),
        ("[" + "[" * 100_000, 0, "recursion"),
    ],
)  # fmt: skip
def test_where_a_whole_json_stops_being_json_is_said_by_line_and_column(
    text: str, read_before: int, message: str, tmp_path: Path
) -> None:
    path, found = written(tmp_path, text.encode()), []
    with pytest.raises(RowError, match=message):
        found.extend(place for place in file_rows(path, "data.bin"))
    found.clear()
    places = file_rows(path, "data.bin")
    for _ in range(read_before):
        found.append(next(places))
    assert len(found) == read_before


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_json_is_the_same_however_it_is_cut_into_pieces(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "CHUNK", chunk)
    draw = random.Random(chunk)
    values: list[Any] = ['é\n"\\ 😀 ' * 3, 12345, -1.5e-7, True, None, [], {"a": [{"b": "三"}]}, "", "😀"]
    rows = [{str(k): draw.choice(values) for k in range(draw.randrange(6))} for _ in range(20)]
    for ascii_only in (True, False):
        text = json.dumps(rows, ensure_ascii=ascii_only, indent=draw.choice([None, 1])).encode()
        assert [row for _, row in json_whole(io.BytesIO(text), "x")] == rows
        one = {"n": 1234567890, "deep": {"m": -1.25e-30}, "s": "é😀" * 9, "t": True}
        text = json.dumps(one, ensure_ascii=ascii_only).encode()
        assert list(json_whole(io.BytesIO(text), "x")) == [(0, one)]
        keyed = {f"é{k}": row for k, row in enumerate(rows)} | {"last": {}}
        text = json.dumps(keyed, ensure_ascii=ascii_only, indent=2).encode()
        assert dict(json_whole(io.BytesIO(b"\xef\xbb\xbf" + text), "x")) == keyed


def test_memory_is_flat_while_a_long_list_is_read(tmp_path: Path) -> None:
    peaks = []
    for count in (3_000, 30_000):
        row = json.dumps({"q": "x" * 900, "a": [1, 2, 3]})
        for content in (f"[{','.join([row] * count)}]", "\n".join([row] * count)):
            path = written(tmp_path, content.encode())
            del content
            tracemalloc.start()
            assert sum(1 for _ in file_rows(path, "x")) == count
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert max(peaks) < 16 << 20  # the long one has 28 MB
    assert peaks[2] < 1.5 * peaks[0] and peaks[3] < 1.5 * peaks[1]


# Files that are no data

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.json", "[]")
    return sink.getvalue()


NO_DATA: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty. Expected rows"),
    "blank": (b"\xef\xbb\xbf \n\n", "is empty. Expected rows"),
    "pointer": (POINTER, "is a git-LFS pointer, not the file itself. Run `git lfs pull`"),
    "page": (b"\n<!DOCTYPE html><html>404</html>", "is an HTML page, often an error page saved in its place. Download it again"),
    "pickle": (pickle.dumps([{"q": 1}]), "is a pickle. It could run code when it is loaded, so it is not"),
    "numpy": (b"\x93NUMPY\x01\0v\0", "is a NumPy file, which may hold a pickle"),
    "zip": (zipped(), "is a zip archive .*Unpack it and name the file inside; a zip of pictures is named as `image_root`"),
    "bzip2": (bz2.compress(jsonl(ROWS)), "is compressed by bzip2. Unpack it: bunzip2"),
    "zstd": (b"\x28\xb5\x2f\xfd....", "is compressed by zstandard. Unpack it: zstd -d"),
    "picture": (b"\x89PNG\r\n\x1a\n....", "is a picture or a recording. Expected the file of rows"),
    "utf-16": ('[{"q": "é"}]'.encode("utf-16"), "expected UTF-8 text, found UTF-16. Convert the file: iconv -f UTF-16 -t UTF-8"),
    "utf-16 without a mark": ('[{"q": 1}]'.encode("utf-16-le"), "found UTF-16LE. Convert the file: iconv -f UTF-16LE"),
    "utf-32": ('[{"q": 1}]'.encode("utf-32"), "found UTF-32. Convert"),
    "cut gzip": (gzip.compress(jsonl(ROWS * 5000))[:-500], "compressed data are cut short or damaged .* Download it again"),
    "spoilt gzip": (gzip.compress(jsonl(ROWS))[:20] + bytes(80), "compressed data are cut short or damaged"),
    "cut parquet": (parquet(EMBEDDED)[:-9], "not a whole parquet file .* Download it again"),
    "cut arrow": (arrow(EMBEDDED, pa.ipc.new_file)[:-9], "not a whole Arrow file"),
    "something": (bytes(range(9, 99)) * 3, "does not tell its kind. Say it in the card's source: kind, one of json, jsonl, csv"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_DATA)
def test_a_file_that_is_no_data_is_named_with_what_to_do(name: str, tmp_path: Path) -> None:
    content, message = NO_DATA[name]
    with pytest.raises(RowError, match=f"data.bin.*{message}"):
        read(written(tmp_path, content))


@pytest.mark.parametrize("name", ["empty", "pointer", "page", "pickle", "bzip2", "utf-16"])
def test_a_kind_that_is_forced_does_not_hide_what_a_file_is(name: str, tmp_path: Path) -> None:
    content, message = NO_DATA[name]
    for kind in ("parquet", "jsonl", "tsv", "webdataset"):
        with pytest.raises(RowError, match=message):
            read(written(tmp_path, content), kind)


@pytest.mark.parametrize("name", ["a.pkl", "a.pt", "a.npy", "a.pickle"])
def test_a_name_of_a_pickle_is_enough_to_refuse_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(RowError, match="is, by its name, a pickle. It could run code"):
        read(written(tmp_path, pickle.dumps([1], protocol=0), name))
    array = io.BytesIO()
    np.save(array, np.array([{}]), allow_pickle=True)
    with pytest.raises(RowError, match="pickle"):
        read(written(tmp_path, array.getvalue(), "a.json"))


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    for name in ("a.json", "a.parquet", "a.tar", "a.pkl"):
        for protocol in range(6):
            with pytest.raises(RowError):
                read(written(tmp_path, pickle.dumps(Bomb(), protocol=protocol), name))
    read(written(tmp_path, tar({"1.pkl": pickle.dumps(Bomb()), "2.pth": pickle.dumps(Bomb())})))
    assert not (tmp_path / "ran").exists()


def test_a_folder_and_a_file_that_is_not_there_are_said(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="is a folder. Expected a file"):
        read(tmp_path)
    with pytest.raises(RowError, match="cannot be read .No such file"):
        read(tmp_path / "gone.json")


def test_the_real_bad_files_are_named_for_what_they_are(shared: Path) -> None:
    with pytest.raises(RowError, match="images.zip is a git-LFS pointer"):
        read(shared / "bad_inputs" / "images.zip")
    with pytest.raises(RowError, match=r"line 16, column 5 \(row 0\): not valid JSON: a comma before the closing }"):
        read(shared / "bad_inputs" / "merge-example_trailing_comma.json")
    lines = (shared / "bad_inputs" / "merge-example_trailing_comma.json").read_text().split("\n")
    assert lines[15][4] == "}" and "".join(lines[:15]).rstrip().endswith(",")


def test_a_real_file_named_json_that_is_json_lines_is_read(shared: Path) -> None:
    path = shared / "puzzlevqa" / "PuzzleVQA" / "data" / "venn.json"
    assert kind_of(path, "x") == "jsonl" and len(read(path)) == 7


def test_a_table_whose_lines_end_in_carriage_returns_alone_is_not_read_as_empty(tmp_path: Path) -> None:
    path = written(tmp_path, b"q,a\rx,1\ry,2\r", "old.csv")
    with pytest.raises(RowError, match=r"old.csv, line 1: .* lines end in CR alone.* tr '\\r' '\\n' < OLD > NEW"):
        read(path)


@pytest.mark.parametrize(
    "content",
    [b'{"q": "x", "n": {"a": 1, "a": 2}}\n{"q": "y"}\n', b'[{"q": "x", "n": {"a": 1, "a": 2}}, {"q": "y"}]',
     b'{"1": {"q": "x", "a": 1, "a": 2}, "2": {"q": "y"}}'],
)  # fmt: skip
def test_a_key_that_comes_twice_in_a_row_is_refused_since_one_value_would_be_lost(
    content: bytes, tmp_path: Path
) -> None:
    (_, first), (_, second) = read(written(tmp_path, content, "rows.json"))
    assert isinstance(first, RowError) and "the key 'a' is there twice" in str(first) and first.reason == "a key twice"
    assert second == {"q": "y"}


def test_a_key_that_comes_twice_in_a_file_of_one_row_is_refused(tmp_path: Path) -> None:
    ((_, found),) = read(written(tmp_path, b'{"q": "x",\n"a": "y",\n"a": "z"}', "rows.json"))
    assert isinstance(found, RowError) and "row 0: the key 'a' is there twice" in str(found)


def test_the_json_of_a_webdataset_is_read_as_strictly_as_a_file(tmp_path: Path) -> None:
    content = tar({"1.json": b'{"q": 1, "q": 2}', "2.json": b'{"q": [NaN]}', "3.json": b'\xef\xbb\xbf{"q": 3}'})
    (_, first), (_, second), (_, third) = read(written(tmp_path, content, "x.tar"))
    assert (first.reason, second.reason) == ("a key twice", "NaN in the row") and third["q"] == 3
