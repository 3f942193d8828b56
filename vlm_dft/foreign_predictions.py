"""Foreign predictions: a file of responses in, ours, a harness's or a benchmark's own; one Prediction a response out, told by content."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_dft.cards import nearest
from vlm_dft.errors import RowError, UserError
from vlm_dft.file_formats import READERS, kind_of, opened
from vlm_dft.json_files import Place, json_lines, json_whole
from vlm_dft.spreadsheets import xlsx_rows

LONG = 100_000  # characters of a response that are worth a word
FAILED = re.compile(r"Failed to obtain answer")  # what VLMEvalKit stores where no response came
IN_METRICS = ("pid", "question_id", "sample_index", "question", "query")  # of a sample, in lmms-eval's metrics
LOOKED_AT = 50  # rows that a format is told by


@dataclass(frozen=True, slots=True)
class Prediction:
    """One response, as its file has it."""

    key: tuple[str, ...]  # what the file names its sample by
    response: str
    row: Mapping[str, Any]  # the file's row, a record of lmms-eval's `doc` among its columns
    where: str
    draw: int = 0
    finish: str | None = None
    tokens: int | None = None
    extraction: str | None = None  # the official one, where the file stores it
    verdict: bool | None = None  # the official one, where the file stores it


@dataclass(slots=True)
class Oddities:
    """What is odd in a file, counted; each with the first place where it was met."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, where: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        self.first.setdefault(what, where)

    def lines(self) -> list[str]:
        """'3 empty responses (first: FILE, row 7)' of each."""
        return [f"{count:,} {what} (first: {self.first[what]})" for what, count in self.counts.items()]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        return {what: {"count": count, "first": self.first[what]} for what, count in self.counts.items()}


@dataclass(frozen=True, slots=True)
class Format:
    """A way to store responses: the columns it is told by, and which of them say what."""

    name: str
    told_by: tuple[str, ...]  # columns; "a|b": one of these
    key: tuple[str, ...]
    response: tuple[str, ...]  # the first that a row has
    benchmark: str | None = None  # whose own format it is
    extraction: str = ""
    verdict: str = ""

    def fits(self, columns: set[str]) -> bool:
        return all(columns.intersection(names.split("|")) for names in self.told_by)


FORMATS = (
    Format("vlm-dft", ("id", "response", "benchmark", "split"), ("id",), ("response",)),
    Format("lmms-eval", ("doc_id", "resps|filtered_resps"), ("doc_id",), ("resps", "filtered_resps")),
    Format("VLMEvalKit", ("index", "prediction"), ("index",), ("prediction",)),
    Format("MathVista", ("pid", "response", "question_type|extraction|metadata"), ("pid",), ("response",), "mathvista",
           "extraction", "true_false"),
    Format("We-Math", ("ID", "key", "response"), ("ID", "key"), ("response",), "wemath"),
    Format("MATH-V", ("id", "response|model_answer", "model|model_answer|options"), ("id",), ("response", "model_answer"),
           "mathvision", "model_answer", "correct"),
    Format("plain", ("id", "response"), ("id",), ("response",)),
)  # fmt: skip
"""Known formats; of several that fit, the first."""


@dataclass(slots=True)
class ForeignFile:
    """What a file of responses holds."""

    path: Path
    format: Format
    predictions: list[Prediction]
    unreadable: list[RowError]  # a row that cannot be read; of a file that is cut short, its rest
    oddities: Oddities


def read_predictions(path: Path) -> ForeignFile:
    """Every response of a file. Raises RowError for a file that is no data, holds no row, or is in no known format."""
    oddities = Oddities()
    rows: list[tuple[str, Mapping[str, Any]]] = []
    unreadable = []
    for place, row in _places(path, oddities):
        if isinstance(row, RowError):
            unreadable.append(row)
        else:
            keyed = isinstance(place, str)  # by pid, as MathVista's
            rows.append(
                (
                    f"{path.name}, {place!r}" if keyed else f"{path.name}, row {place}",
                    {"pid": place, **row} if keyed else row,
                )
            )
    if not rows:
        raise unreadable[0] if unreadable else RowError(f"{path} holds no row. Expected one a response.", "empty file")
    format = _format(path, [row for _, row in rows[:LOOKED_AT]])
    predictions: list[Prediction] = []
    for where, columns in rows:
        try:
            predictions += _responses(format, columns, where, oddities)
        except RowError as error:
            unreadable.append(error)
    return ForeignFile(path, format, predictions, unreadable, oddities)


KINDS = (".xlsx", ".tsv", ".csv", ".json", ".jsonl")


def find_predictions(words: str | Path, benchmark: str) -> Path:
    """The file of responses that a path names: itself, or the one of a folder. Raises UserError naming what is there."""
    path = Path(words).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        raise UserError(f"No predictions at {str(words)!r}.{nearest(path.name, beside)} Expected a file or a folder.")
    for own in (path / "predictions.jsonl", path / benchmark / "predictions.jsonl"):
        if own.is_file():
            return own
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in KINDS)
    named = [p for p in files if benchmark in said_benchmarks(p.stem, [benchmark])]
    if len(named or files) == 1:
        return (named or files)[0]
    below = sorted(f"{p.parent.name}/" for p in path.glob("*/predictions.jsonl"))
    found = [p.name for p in named or files] + below
    found = found or sorted(
        str(p.relative_to(path)) for deep in ("*/*", "*/*/*") for p in path.glob(deep) if p.suffix.lower() in KINDS
    )
    raise UserError(
        f"{str(words)!r} is a folder without a predictions.jsonl, and without one file alone that is named after {benchmark}. Name one of "
        f"what it holds: {', '.join(found[:20]) or 'nothing of the kind'}."
    )


def said_benchmarks(stem: str, known: Sequence[str]) -> set[str]:
    """The known benchmarks that a file's name names: Model_MathVista_MINI names mathvista."""
    plain = re.sub(r"[^a-z0-9]", "", stem.lower())
    return {name for name in known if name in plain}


def check_benchmark(file: ForeignFile, *, name: str, scorer: str, known: Sequence[str]) -> None:
    """Raise UserError for a file that says it is another benchmark's: by its format, its rows or its name."""
    said: dict[str, set[str]] = {}
    if file.format.benchmark:
        said["its columns are those of the official outputs of"] = {file.format.benchmark}
    if file.format.name == "vlm-dft":
        said["its rows are of"] = {str(p.row["benchmark"]) for p in file.predictions}
    elif named := said_benchmarks(file.path.stem, [name for name in known if name != "drawn"]):
        said["its name says"] = named
    for how, benchmarks in said.items():
        own = benchmarks & {name, scorer}
        if not own or (how == "its rows are of" and len(benchmarks) > 1):
            raise UserError(
                f"{file.path.name} is not of {name}: {how} {', '.join(sorted(benchmarks))}. Name another --benchmark, or another "
                "file (or rename it)."
            )


def _places(path: Path, oddities: Oddities) -> Iterator[Place]:
    """The rows of a file of any kind; where it is cut short, the error in place of its rest. NaN is read as null."""
    name = path.name
    with opened(path, str(path)) as file:
        head = file.read(8)
    if head.startswith(b"\xd0\xcf\x11\xe0"):
        raise RowError(f"{path} is an old .xls spreadsheet. Save it as .xlsx.", "not a data file")
    begun = False
    try:
        if head.startswith(b"PK\x03\x04"):
            yield from xlsx_rows(path, name, oddities.add)
            return
        kind = _kind(path)
        if kind in ("json", "jsonl"):
            with opened(path, name) as file:
                for place in (json_lines if kind == "jsonl" else json_whole)(file, name, nan=True):
                    begun = True
                    yield place
            return
        for place in READERS[kind](path, name, 0):
            begun = True
            yield place
    except RowError as error:
        if not begun:
            raise
        yield -1, error


def _kind(path: Path) -> str:
    try:
        return kind_of(path, str(path))
    except RowError as error:
        if error.reason == "kind unknown":
            message = f"{path}: its content tells no kind of responses. Expected .jsonl, .json, .xlsx, .tsv or .csv."
            raise RowError(message, error.reason) from None
        raise


def _format(path: Path, rows: list[Mapping[str, Any]]) -> Format:
    columns = {column for row in rows for column in row}
    for format in FORMATS:
        if format.fits(columns):
            return format
    known = "; ".join(f"{f.name}: {', '.join(f.told_by).replace('|', ' or ')}" for f in FORMATS)
    raise RowError(
        f"{path}: predictions in no known format. Columns found: {', '.join(sorted(columns)[:30])}. Known are {known}.",
        "format unknown",
    )


def _responses(format: Format, row: Mapping[str, Any], where: str, oddities: Oddities) -> Iterator[Prediction]:
    """The responses of a row, in the order of their draws. Raises RowError for a row without a key or a response."""
    record = _record(row) if format.name == "lmms-eval" else row
    key = tuple(as_text(row.get(column)) for column in format.key)
    if not all(key):
        raise RowError(f"{where}: expected a value of {' and '.join(format.key)}, found {row.get(format.key[0])!r}.")
    column = next((column for column in format.response if column in row), None)
    if column is None:
        raise RowError(f"{where}: no column {' or '.join(format.response)}. Columns found: {', '.join(row)}.")
    values = list(_flat(row[column])) if format.name == "lmms-eval" else [row[column]]
    drawn = row.get("draw")
    first = drawn if isinstance(drawn, int) else 0
    for draw, value in enumerate(values or [None], first):
        response = _response(value, f"{where}, column {column!r}", oddities)
        extraction, verdict = row.get(format.extraction), row.get(format.verdict)
        yield Prediction(
            key, response, record, where, draw,
            finish=row.get("finish") if format.name == "vlm-dft" else None,
            tokens=row.get("tokens") if format.name == "vlm-dft" else None,
            extraction=None if extraction is None else as_text(extraction),
            verdict=verdict if isinstance(verdict, bool) else None,
        )  # fmt: skip


def _record(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of lmms-eval with what it says of its sample: its `doc`, where it was kept, and the ids that its metrics repeat."""
    doc = row["doc"] if isinstance(row.get("doc"), Mapping) else {}
    metrics = [value for name, value in row.items() if name != "doc" and isinstance(value, Mapping)]
    named = {name: metric[name] for metric in metrics for name in IN_METRICS if name in metric}
    return {**named, **row, **doc}


def _response(value: Any, where: str, oddities: Oddities) -> str:
    """A response as a text; what is odd about it counted. Raises RowError for a list or an object."""
    if isinstance(value, Mapping):  # newer harnesses keep a response with its timing
        texts = [value[name] for name in ("text", "content", "text_gen_output") if isinstance(value.get(name), str)]
        value = texts[0] if texts else value
    if value is None:
        oddities.add("null responses (None, NaN or an empty cell), scored as empty", where)
        return ""
    if isinstance(value, bool | int | float):
        oddities.add("numbers in place of a text, read as that text", where)
        return str(value)
    if not isinstance(value, str):
        raise RowError(f"{where}: expected a text, found {type(value).__name__}.", "response is no text")
    if not value.strip():
        oddities.add("empty responses", where)
    elif len(value) > LONG:
        oddities.add(f"responses of over {LONG:,} characters", where)
    elif FAILED.match(value):
        oddities.add("reports of a failed request ('Failed to obtain answer') in place of a response", where)
    return value


def as_text(value: Any) -> str:
    """A value as a person would write it: a whole number without .0 (tables make 5.0 of 5); None is the empty text."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return value if isinstance(value, str) else str(value)


def _flat(value: Any) -> Iterator[Any]:
    """The responses in lmms-eval's nested lists."""
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    else:
        yield value
