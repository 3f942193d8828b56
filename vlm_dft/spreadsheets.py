"""Spreadsheets: an .xlsx file in, its rows out, texts as they were written; rows in, a file out that reads back the same."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_dft.errors import RowError, UserError
from vlm_dft.json_files import Place

CELL = 32_767  # characters that a cell holds at most: writers cut a longer text, or drop it
ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")  # a character that XML cannot hold, as OOXML spells it
TO_ESCAPE = re.compile("[\x00-\x08\x0b-\x1f\ud800-\udfff\ufffe\uffff]|_(?=x[0-9A-Fa-f]{4}_)")
Odd = Callable[[str, str], None]
"""Told (what is odd, where), to count."""


def xlsx_rows(path: Path, name: str, odd: Odd) -> Iterator[Place]:
    """The rows of the first sheet, whose first row names the columns. An empty cell is None; an empty row has no place.

    A text that begins with = and was saved as a formula is read as that text, not as its value.
    Raises RowError for a file that is no whole spreadsheet.
    """
    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of styles that are not kept
            with path.open("rb") as file:
                sheet = load_workbook(file, read_only=True).worksheets[0]
                sheet.reset_dimensions()  # some writers state them wrongly
                yield from _rows(sheet, name, odd)
    except (zipfile.BadZipFile, InvalidFileException, KeyError, IndexError, EOFError, SyntaxError) as error:
        what = f"{type(error).__name__}: {str(error)[:100]}"
        raise RowError(
            f"{name}: not a whole .xlsx spreadsheet ({what}). Copy or export it again.", "damaged"
        ) from error


def _rows(sheet: Any, name: str, odd: Odd) -> Iterator[Place]:
    columns: list[str] | None = None
    for number, cells in enumerate(sheet.iter_rows()):
        where = f"{name}, sheet row {number + 1}"
        values = [_value(cell, where, odd) for cell in cells]
        if all(value is None for value in values):
            continue
        if columns is None:
            columns = ["" if value is None else str(value) for value in values]
            twice = next((column for column in columns if column and columns.count(column) > 1), None)
            if twice:
                raise RowError(f"{name}: column {twice!r} is there twice. Give each its own name.", "columns repeated")
            continue
        values += [None] * (len(columns) - len(values))
        yield number, {column: value for column, value in zip(columns, values, strict=False) if column}


def _value(cell: Any, where: str, odd: Odd) -> Any:
    """A cell's value: text, number, bool or None."""
    value, kind = cell.value, cell.data_type
    if value is None:
        return None
    if kind == "f":
        odd("formula cells, read as the text they were written from", where)
        return str(getattr(value, "text", value))
    if kind == "e":
        if value != "#N/A":
            odd("cells that hold a spreadsheet's error, read as its text", where)
        return None if value == "#N/A" else str(value)
    if kind == "d":
        odd("cells that a spreadsheet turned into a date, read as it writes one", where)
        return str(value)
    if not isinstance(value, str):
        return value
    if len(value) >= CELL:
        odd(f"cells of {CELL:,} characters, which a spreadsheet may have cut there", where)
    return ESCAPED.sub(lambda found: chr(int(found[1], 16)), value) if "_x" in value else value


def write_xlsx(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as one sheet, whole or not at all; every text as a text, also one that begins with =.

    Raises UserError for a text longer than a cell holds, before anything is written.
    """
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell

    for row in rows:
        for column in columns:
            value = row.get(column)
            if isinstance(value, str) and len(TO_ESCAPE.sub("_x0000_", value)) > CELL:
                raise UserError(
                    f"{path}: a cell of .xlsx holds {CELL:,} characters, and column {column!r} of row {row.get('index')!r} needs "
                    f"{len(value):,}. Write a .tsv instead: it holds any length."
                )
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")

    def cell(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        made = WriteOnlyCell(sheet, TO_ESCAPE.sub(lambda found: f"_x{ord(found[0]):04X}_", value))
        made.data_type = "s"  # not a formula, not an error
        return made

    sheet.append([cell(column) for column in columns])
    for row in rows:
        sheet.append([cell(row.get(column)) for column in columns])
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        book.save(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
