"""JSON files: an open file of JSON lines, of a list or of an object keyed by id in; its rows out one by one, in flat memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import IO, Any

from vlm_dft.errors import RowError

Place = tuple[int | str, "dict[str, Any] | RowError"]
"""(the number or the key of a row in its file, the row or why it cannot be read)."""

CHUNK = 1 << 20  # bytes read at once
FIRST_LINE = 4 * CHUNK  # a longer one is not looked at to tell JSON lines from one object
LINES = (".jsonl", ".ndjson")
ENCODINGS = {
    "cp1252": "CP1252", "gb18030": "GB18030", "big5": "BIG5", "shift_jis": "SHIFT_JIS", "euc_kr": "EUC-KR", "cp1251": "CP1251",
}  # fmt: skip
"""What text that is not UTF-8 may be in: Python's names and iconv's."""
_SPACE = re.compile(r"[ \t\n\r]*")
RAW = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as they are decoded here
_EDGE = 16  # characters within which an error may be only the end of what has been read: \ud83d\ude00 is 12 long


def is_lines(file: IO[bytes], suffix: str) -> bool:
    """Whether a JSON file is JSON lines, whatever its name: told by its first lines; by its name where these leave it open."""
    first = _line(file).removeprefix(codecs.BOM_UTF8).strip()
    if first.startswith(b"["):
        return suffix in LINES and _parses(first) and bool(_line(file))
    if not _parses(first):
        return first != b"{" and (suffix in LINES or any(_parses(_line(file)) for _ in range(3)))
    return suffix in LINES or bool(_line(file))


def json_lines(file: IO[bytes], name: str, *, nan: bool = False) -> Iterator[Place]:
    """The rows of JSON lines, by the number of their line; a line that cannot be read takes a place, an empty one none.

    nan: NaN and Infinity, which pandas writes, are read as null; else a row that holds them cannot be read.
    """
    decoder = Decoder(nan)
    for number, line in enumerate(file):
        if line.isspace():
            continue
        where = f"{name}, line {number + 1}"
        try:
            text = line.decode("utf-8-sig" if number == 0 else "utf-8").rstrip("\r\n")
            yield number, _row(decoder.checked(decoder.decode(text), where), f"{name}, row {number}")
        except UnicodeDecodeError as error:
            yield number, not_utf8(line, error.start, where)
        except json.JSONDecodeError as error:
            what = f"column {error.colno}: {_said(error, text)}"
            yield number, RowError(f"{where}: not valid JSON ({what}).", "not valid JSON")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            yield number, RowError(f"{where}: cannot be read ({error}).", "not valid JSON")


def json_whole(file: IO[bytes], name: str, *, nan: bool = False) -> Iterator[Place]:
    """The rows of one JSON list, by number, or of one object keyed by id, by key; an object of anything else is one row.

    nan: as of json_lines. Raises RowError with line and column where it stops being JSON: nothing more can be read then.
    """
    text = _Window(file, name, nan)
    text.opening = text.next()
    if text.opening == "[":
        for number, row in enumerate(text.items()):
            yield number, _row(row, f"{name}, row {number}")
    elif text.opening == "{":
        pairs = text.pairs()
        first = list(islice(pairs, 8))
        kinds = {type(row) for _, row in first}
        if dict in kinds and kinds <= {dict, RowError}:
            for key, row in chain(first, pairs):
                yield key, _row(row, f"{name}, {key!r}")
        else:
            listed = list(chain(first, pairs))
            whole = dict(listed)
            if len(whole) < len(listed):
                yield 0, key_twice(repeated(key for key, _ in listed), f"{name}, row 0")
                return
            yield 0, next((value for value in whole.values() if isinstance(value, RowError)), whole)
    else:
        raise RowError(f"{name}: neither JSON (it begins {text.text[:40]!r}) nor JSON lines.", "not valid JSON")
    if text.next():
        raise text.wrong(
            "more after the end of the JSON. One list, one object or JSON lines are read; for lines, say `kind: jsonl`"
        )


def repeated(keys: Iterable[str]) -> str:
    """The first of some keys that comes again."""
    seen = set[str]()
    return next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]


def key_twice(key: str, where: str) -> RowError:
    """The error of an object with two values for a key, of which JSON's readers would each keep another."""
    return RowError(f"{where}: the key {key!r} is there twice. Keep one of them.", "a key twice")


def not_utf8(raw: bytes, at: int, where: str) -> RowError:
    """The error of bytes that are not UTF-8, with the encoding they probably are in."""
    return RowError(
        f"{where}: expected UTF-8 text, found the byte 0x{raw[at]:02X} at {at}; {probably(raw)}", "not UTF-8"
    )


def probably(raw: bytes) -> str:
    """'probably cp1252. Convert the file: iconv ...', for a text that is not UTF-8. Never acted upon."""
    from charset_normalizer import from_bytes

    few = sum(byte > 127 for byte in raw[: 1 << 16]) < 8  # which say too little
    best = None if few else from_bytes(raw[: 1 << 16], cp_isolation=list(ENCODINGS)).best()
    encoding = ENCODINGS.get(best.encoding if best is not None else "", "CP1252")
    sure = "probably" if best is not None else "damaged, or perhaps"
    return f"it is {sure} {encoding}. Look, and convert the file: iconv -f {encoding} -t UTF-8 OLD > NEW"


class Decoder(json.JSONDecoder):
    """json's decoder, which also remembers that it met NaN or Infinity, or a key twice in one object."""

    def __init__(self, nan: bool = False) -> None:
        self.nan = nan  # whether it is read as null
        self.odd: list[str] = []
        self.twice: list[str] = []
        super().__init__(parse_constant=self._constant, object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            self.twice.append(repeated(key for key, _ in pairs))
        return made

    def _constant(self, name: str) -> float | None:
        if self.nan:
            return None
        self.odd.append(name)
        return float("nan")

    def checked(self, found: Any, where: str) -> Any:
        """What was decoded last; a RowError in its place where it holds NaN or Infinity, or a key twice."""
        if self.twice:
            key = self.twice[0]
            self.forget()
            return key_twice(key, where)
        if not self.odd:
            return found
        column = (
            next((key for key, value in found.items() if _has_nan(value)), None) if isinstance(found, dict) else None
        )
        what = f"column {column!r} holds {self.odd[0]}" if column is not None else f"found {self.odd[0]}"
        self.forget()
        return RowError(f"{where}: {what}, which JSON does not have. Write null, or the number.", "NaN in the row")

    def forget(self) -> None:
        """What was met before."""
        self.odd.clear()
        self.twice.clear()


class _Window:
    """The part of a JSON file that has been read and not yet used."""

    def __init__(self, file: IO[bytes], name: str, nan: bool = False) -> None:
        self.file, self.name = file, name
        self.decoder = Decoder(nan)
        self.utf8 = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self.opening, self.text, self.at, self.ended = "", "", 0, False
        self.line, self.column = 1, 1  # of text[0]
        self.raw = False  # whether bytes that are not UTF-8 are in it
        self.rows = 0

    def more(self) -> bool:
        """Read on, and forget what has been used. False at the end of the file."""
        if self.ended:
            return False
        data = self.file.read(max(CHUNK, len(self.text) - self.at))
        self.line, self.column = self.position(self.at)
        self.text = self.text[self.at :] + self.utf8.decode(data, final=not data)
        self.at, self.ended = 0, not data
        try:
            self.text.encode()
            self.raw = False
        except UnicodeEncodeError:
            self.raw = True
        return True

    def next(self) -> str:
        """The next character that is not space, which is not used up; "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it always matches
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """The value that begins here; a RowError in its place where it holds bytes that are not UTF-8."""
        while True:
            self.decoder.forget()
            try:
                found, end = self.decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or not self.more():  # a number at the edge may go on
                    break
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.text) - _EDGE or error.msg.startswith("Unterminated string")
                if not (cut and self.more()):
                    raise self.wrong(_said(error, self.text), error.pos) from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
                raise self.wrong(str(error)) from error
        begin, self.at = self.at, end
        if self.decoder.odd or self.decoder.twice:
            line, column = self.position(begin)
            return self.decoder.checked(found, f"{self.name}, line {line}, column {column}")
        if self.raw and (odd := RAW.search(self.text, begin, end)):
            line, column = self.position(odd.start())
            raw = self.text[begin:end].encode(errors="surrogateescape")
            at = len(self.text[begin : odd.start()].encode(errors="surrogateescape"))
            return not_utf8(raw, at, f"{self.name}, line {line}, column {column}")
        return found

    def items(self) -> Iterator[Any]:
        """The items of the list that begins here."""
        self.at += 1
        ended = self.next() == "]"
        while not ended:
            yield self.value()
            self.rows += 1
            ended = self.comma("]")
        self.at += 1

    def pairs(self) -> Iterator[tuple[str, Any]]:
        """The pairs of the object that begins here, also those whose key comes again."""
        self.at += 1
        ended = self.next() == "}"
        while not ended:
            if self.next() != '"':
                raise self.wrong(f"expected a key in double quotes, found {self.text[self.at : self.at + 20]!r}")
            key = str(self.value())
            if self.next() != ":":
                raise self.wrong(f"expected : after a key, found {self.text[self.at : self.at + 20]!r}")
            self.at += 1
            self.next()
            yield key, self.value()
            self.rows += 1
            ended = self.comma("}")
        self.at += 1

    def comma(self, closing: str) -> bool:
        """Go over the comma after a row; whether the end stands there instead."""
        found = self.next()
        if found == closing:
            return True
        if found == ",":
            self.at += 1
            if self.next() != closing:
                return False
            raise self.wrong(f"a comma before the closing {closing}. JSON allows none there: take it out")
        if not found:
            raise self.wrong(f"the file ends before its {closing}: it is cut short. Download or write it again")
        raise self.wrong(f"expected , or {closing} after a row, found {self.text[self.at : self.at + 20]!r}")

    def position(self, at: int) -> tuple[int, int]:
        """(line, column) of a place in the text, counted from 1."""
        lines = self.text.count("\n", 0, at)
        return self.line + lines, (at - self.text.rfind("\n", 0, at) if lines else self.column + at)

    def wrong(self, what: str, at: int | None = None) -> RowError:
        line, column = self.position(self.at if at is None else at)
        if self.rows == 0 and self.opening == "{":
            return RowError(
                f"{self.name}: neither JSON (line {line}, column {column}: {what}) nor JSON lines.", "not valid JSON"
            )
        where = f"{self.name}, line {line}, column {column} (row {self.rows})"
        return RowError(f"{where}: not valid JSON: {what}.", "not valid JSON")


def _line(file: IO[bytes]) -> bytes:
    """The next line that is not empty, or what FIRST_LINE holds of it."""
    while line := file.readline(FIRST_LINE):
        if line.strip():
            return line
    return b""


def _parses(line: bytes) -> bool:
    """Whether a line is an object or list by itself."""
    try:
        return isinstance(json.loads(line), (dict, list))
    except (ValueError, RecursionError):
        return False


def _row(found: Any, where: str) -> dict[str, Any] | RowError:
    if isinstance(found, (dict, RowError)):
        return found
    return RowError(f"{where}: expected an object, found {type(found).__name__}.", "not an object")


def _said(error: json.JSONDecodeError, text: str) -> str:
    """A decoder's error in words that say what to do."""
    before, here = text[: error.pos].rstrip(), text[error.pos : error.pos + 1]
    if here == "\0":
        return "null bytes, as a crash while writing leaves them. Write the file again"
    if (here and here in "}]" and before.endswith(",")) or error.msg.startswith("Illegal trailing comma"):
        return f"a comma before the closing {here}. JSON allows none there: take it out"
    if not text[error.pos :].strip() or error.msg.startswith("Unterminated string"):
        return f"half-written or cut short ({error.msg}). Write or download it again"
    return f"{error.msg}, found {text[error.pos : error.pos + 20]!r}"


def _has_nan(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_nan, value.values()))
    if isinstance(value, list):
        return any(map(_has_nan, value))
    return isinstance(value, float) and value != value
