"""VLMEvalKit files: samples and their predictions in, the .xlsx or .tsv of responses that VLMEvalKit's own evaluation reads out."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_dft.chat import Sample
from vlm_dft.errors import UserError
from vlm_dft.file_records import LETTERS
from vlm_dft.foreign_predictions import Prediction, as_text
from vlm_dft.matching import question_of
from vlm_dft.runs import write_text
from vlm_dft.spreadsheets import write_xlsx

Row = dict[str, Any]


def write_vlmevalkit(path: Path, pairs: Sequence[tuple[Sample, Prediction]]) -> dict[str, int]:
    """Write a row a sample, with the columns of its benchmark's evaluation there. Returns {"rows", "draws left out"}.

    VLMEvalKit keeps one response a sample: of several draws the first is written. Raises UserError for an ending other than
    .xlsx and .tsv, and for a text that a cell cannot hold.
    """
    firsts: dict[str, tuple[Sample, Prediction]] = {}
    for sample, said in pairs:
        firsts.setdefault(sample.id, (sample, said))
    rows = [_row(sample, said, number) for number, (sample, said) in enumerate(firsts.values())]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    suffix = path.suffix.lower()
    if suffix == ".xlsx":
        write_xlsx(path, columns, rows)
    elif suffix == ".tsv":
        write_text(path, _tsv(columns, rows))
    else:
        raise UserError(f"--to vlmevalkit {str(path)!r}: expected a name that ends in .xlsx or .tsv.")
    return {"rows": len(rows), "draws left out": len(pairs) - len(rows)}


def _tsv(columns: Sequence[str], rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([as_text(row.get(column)) for column in columns] for row in rows)
    return text.getvalue()


def _row(sample: Sample, said: Prediction, number: int) -> Row:
    record = sample.record
    index = int(sample.id) if sample.id.isdecimal() and str(int(sample.id)) == sample.id else sample.id
    own = COLUMNS.get(record["scorer"], _lettered)(sample, record)
    return {
        "index": index,
        "question": question_of(sample),
        **{name: value for name, value in own.items() if value is not None},
        "answer": as_text(record["gold_answer"]),
        "prediction": said.response,
    }


def _group(sample: Sample, *names: str) -> str | None:
    """The first of a sample's groups, several labels as Python prints a list."""
    value = next((sample.groups[name] for name in names if name in sample.groups), None)
    return value if value is None or isinstance(value, str) else repr(list(value))


def _mathvista(sample: Sample, record: Mapping[str, Any]) -> Row:
    choices = record.get("choices")
    gold = record["gold_answer"]
    return {
        "choices": repr(list(choices)) if choices else "[]",
        "answer_option": LETTERS[choices.index(gold)] if choices and gold in choices else "",
        "question_type": record.get("question_type"),
        "answer_type": record.get("answer_type"),
        "precision": record.get("precision"),
        "unit": record.get("unit"),
        "task": _group(sample, "task") or "",
        "skills": _group(sample, "skills") or "[]",
        "category": _group(sample, "category"),
        "context": _group(sample, "context"),
        "grade": _group(sample, "grade"),
        "source": _group(sample, "source"),
    }


def _mathvision(sample: Sample, record: Mapping[str, Any]) -> Row:
    choices = record.get("choices")
    return {
        "choices": repr(list(choices)) if choices else "[]",
        "category": _group(sample, "subject", "category") or "",
        "level": _group(sample, "level"),
    }


def _mathverse(sample: Sample, record: Mapping[str, Any]) -> Row:
    labels = {name: _group(sample, name) for name in ("problem_version", "subject", "subfield")}
    return {
        "question_for_eval": question_of(sample),
        "question_type": record.get("question_type"),
        "problem_index": sample.cluster,
        "problem_version": labels["problem_version"],
        "metadata": repr({name: value for name, value in labels.items() if value is not None}),
    }


def _wemath(sample: Sample, record: Mapping[str, Any]) -> Row:
    return {
        "ID": record.get("ID") or sample.cluster,
        "key": record.get("key") or _group(sample, "key"),
        "knowledge concept": _group(sample, "knowledge concept", "knowledge_concept"),
        **_lettered(sample, record),
    }


def _dynamath(sample: Sample, record: Mapping[str, Any]) -> Row:
    return {
        "qid": sample.cluster,
        "varid": record.get("variant") or _group(sample, "variant", "varid"),
        "answer_type": record.get("answer_type"),
        "subject": _group(sample, "subject"),
        "knowledge_level": _group(sample, "level", "knowledge_level"),
    }


def _logicvista(sample: Sample, record: Mapping[str, Any]) -> Row:
    return {"skill": _group(sample, "skill") or ""}


def _lettered(sample: Sample, record: Mapping[str, Any]) -> Row:
    """Choices in columns A, B ..., as VLMEvalKit's multiple-choice sets have them."""
    choices = record.get("choices") or []
    lettered = {LETTERS[k]: as_text(choice) for k, choice in enumerate(choices[: len(LETTERS)])}
    return {**lettered, "category": _group(sample, "category", "subject", "task")}


COLUMNS: dict[str, Callable[[Sample, Mapping[str, Any]], Row]] = {
    "mathvista": _mathvista, "mathvision": _mathvision, "mathverse": _mathverse, "wemath": _wemath, "dynamath": _dynamath,
    "logicvista": _logicvista,
}  # fmt: skip
"""What each benchmark's evaluation there reads, beside index, question, answer and prediction."""
