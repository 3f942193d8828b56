"""Files of responses: every harness's form is told by its content, matched to the samples, and nothing odd passes in silence."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from openpyxl import Workbook

from vlm_dft.errors import RowError, UserError
from vlm_dft.file_records import choices_of, read_list, samples_in
from vlm_dft.foreign_predictions import (
    Oddities,
    as_text,
    check_benchmark,
    find_predictions,
    read_predictions,
    said_benchmarks,
)
from vlm_dft.official import OFFICIAL


def lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sheet(path: Path, rows: Iterable[Iterable[Any]]) -> Path:
    book = Workbook()
    for row in rows:
        book.active.append(list(row))  # type: ignore[union-attr]
    book.save(path)
    return path


def table(path: Path, rows: Iterable[Iterable[Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return path


FILES: dict[str, tuple[Callable[[Path], Path], list[tuple[tuple[str, ...], int, str]]]] = {
    "vlm-dft": (
        lambda folder: lines(
            folder / "predictions.jsonl",
            [{"id": "a", "draw": k, "benchmark": "b", "split": "s", "response": f"r{k}", "finish": "stop", "tokens": 2} for k in (0, 1)],
        ),
        [(("a",), 0, "r0"), (("a",), 1, "r1")],
    ),
    "VLMEvalKit": (
        lambda folder: sheet(folder / "Model_MathVista_MINI.xlsx", [["index", "question", "prediction"], [7, "q", "Answer: 7"]]),
        [(("7",), 0, "Answer: 7")],
    ),
    "VLMEvalKit as tsv": (
        lambda folder: table(folder / "Model_MathVista_MINI.tsv", [["index", "prediction"], ["7", 'two\nlines and "quotes"\t.']]),
        [(("7",), 0, 'two\nlines and "quotes"\t.')],
    ),
    "VLMEvalKit as json": (
        lambda folder: lines(folder / "m.jsonl", [{"index": 7.0, "prediction": "p", "answer": "A"}]),
        [(("7",), 0, "p")],
    ),
    "lmms-eval": (
        lambda folder: lines(
            folder / "20250101_000000_samples_mathvista_testmini.jsonl",
            [
                {"doc_id": 0, "target": "A", "filtered_resps": ["as it came"], "doc_hash": "x", "input": "q"},
                {"doc_id": 1, "target": "A", "resps": [["first", "second"]], "filtered_resps": ["cut out"]},
            ],
        ),
        [(("0",), 0, "as it came"), (("1",), 0, "first"), (("1",), 1, "second")],
    ),
    "MathVista": (
        lambda folder: (folder / "output_m.json").write_text(
            json.dumps({"12": {"question": "q", "metadata": {}, "response": "It is 5.", "extraction": "5", "true_false": True}})
        )
        and folder / "output_m.json",
        [(("12",), 0, "It is 5.")],
    ),
    "MATH-V": (
        lambda folder: lines(folder / "m.jsonl", [{"id": "5", "model": "m", "response": "r", "model_answer": "5", "correct": False}]),
        [(("5",), 0, "r")],
    ),
    "We-Math": (
        lambda folder: (folder / "m.json").write_text(json.dumps([{"ID": "2steps_1", "key": "2steps_2", "response": "Answer: A"}]))
        and folder / "m.json",
        [(("2steps_1", "2steps_2"), 0, "Answer: A")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FILES)
def test_a_format_is_told_by_the_content(form: str, tmp_path: Path) -> None:
    write, expected = FILES[form]
    found = read_predictions(write(tmp_path))
    assert found.format.name == form.split(" as ")[0]
    assert [(p.key, p.draw, p.response) for p in found.predictions] == expected
    assert not found.unreadable and not found.oddities.counts


def test_stored_extractions_and_verdicts_are_kept(tmp_path: Path) -> None:
    (said,) = read_predictions(FILES["MathVista"][0](tmp_path)).predictions
    assert (said.extraction, said.verdict) == ("5", True)
    (said,) = read_predictions(FILES["MATH-V"][0](tmp_path)).predictions
    assert (said.extraction, said.verdict) == ("5", False)


ODD: dict[str, tuple[Any, str, str]] = {  # a response in JSON, what it is read as, what is counted
    "nothing": (None, "", "1 null responses"),
    "NaN": (float("nan"), "", "1 null responses"),
    "an empty text": ("", "", "1 empty responses"),
    "spaces": (" \n", " \n", "1 empty responses"),
    "a number": (5, "5", "1 numbers in place of a text"),
    "a share": (0.5, "0.5", "1 numbers in place of a text"),
    "a boolean": (True, "True", "1 numbers in place of a text"),
    "200,000 characters": ("x" * 200_000, "x" * 200_000, "1 responses of over 100,000 characters"),
    "a failed request": ("Failed to obtain answer via API.", "Failed to obtain answer via API.", "1 reports of a failed request"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_an_odd_response_is_read_and_counted(case: str, tmp_path: Path) -> None:
    value, expected, counted = ODD[case]
    found = read_predictions(
        lines(tmp_path / "p.jsonl", [{"index": 1, "prediction": value}, {"index": 2, "prediction": "x"}])
    )
    assert [p.response for p in found.predictions] == [expected, "x"]
    (line,) = found.oddities.lines()
    assert line.startswith(counted) and line.endswith("(first: p.jsonl, row 0, column 'prediction')")


def test_cells_of_a_spreadsheet_are_read_as_they_were_written(tmp_path: Path) -> None:
    """pandas would read the second as a missing value and the first, third and fourth as numbers."""
    path = sheet(tmp_path / "m.xlsx", [["index", "prediction", None], [1, 5], [2, "=4+1"], [3, "007"], [4, "5.0"], [5, None], [None, None],
                                       [6, "a_x000D_b"], [7, "#N/A"]])  # fmt: skip
    found = read_predictions(path)
    assert [p.response for p in found.predictions] == ["5", "=4+1", "007", "5.0", "", "a\rb", ""]
    assert {what.split()[0]: count for what, count in found.oddities.counts.items()} == {
        "numbers": 1,
        "formula": 1,
        "null": 2,
    }


BAD: dict[str, tuple[str, bytes, str]] = {  # name, content, what is said
    "empty": ("p.jsonl", b"", "is empty"),
    "spaces": ("p.json", b" \n", "is empty"),
    "no row": ("p.json", b"[]", "holds no row"),
    "a header alone": ("p.tsv", b"index\tprediction\n", "holds no row"),
    "UTF-16": ("p.tsv", "index\tprediction\n1\ta\n".encode("utf-16"), "expected UTF-8 text, found UTF-16"),
    "latin-1": ("p.jsonl", '{"id": "1", "response": "caf\xe9 is the answer"}\n'.encode("latin-1"), "expected UTF-8 text, found the byte 0xE9"),
    "latin-1 as tsv": ("p.tsv", "index\tprediction\n1\tcaf\xe9 is it\n".encode("latin-1"), "expected UTF-8 text, found the byte 0xE9"),
    "old spreadsheet": ("p.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is an old .xls spreadsheet"),
    "half a spreadsheet": ("p.xlsx", b"PK\x03\x04 and no more", "not a whole .xlsx spreadsheet"),
    "pickle": ("p.pkl", pickle.dumps({"a": 1}), "is a pickle"),
    "a page": ("p.json", b"<!DOCTYPE html><html>", "an HTML page"),
    "other columns": ("p.jsonl", b'{"name": "x", "text": "y"}\n', r"no known format\. Columns found: name, text\. Known are vlm-dft: id"),
    "a list of texts": ("p.json", b'["a", "b"]', "expected an object, found str"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_used_is_refused_by_name(case: str, tmp_path: Path) -> None:
    name, content, message = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read_predictions(tmp_path / name)
    assert name in str(raised.value)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_bytes(b"\xef\xbb\xbfindex\tprediction\n1\ta\n")
    (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "1", "response": "a"}\n')
    for name in ("p.tsv", "p.jsonl"):
        assert [(p.key, p.response) for p in read_predictions(tmp_path / name).predictions] == [(("1",), "a")]


CUT = {
    "lines": ("p.jsonl", '{"id": "1", "response": "a"}\n{"id": "2", "resp', "line 2"),
    "a list": ("p.json", '[{"id": "1", "response": "a"}, {"id": "2", "resp', "row 1"),
    "quotes": ("p.tsv", 'index\tprediction\n"1"\t"a"\n"2"\t"b', "a quote is opened and never closed"),
    "a key twice": ("p.json", '{"1": {"pid": "1", "response": "a", "metadata": {}}, "2": {"pid": "2", "pid": "2", "response": "b"}}', "twice"),
    "no response": ("p.jsonl", '{"id": "1", "response": "a"}\n{"id": "2"}\n', "row 1: no column response"),
    "a list for a response": ("p.jsonl", '{"id": "1", "response": "a"}\n{"id": "2", "response": ["b"]}\n', "expected a text, found list"),
    "no id": ("p.jsonl", '{"id": "1", "response": "a"}\n{"id": null, "response": "b"}\n', "expected a value of id"),
}  # fmt: skip


@pytest.mark.parametrize("case", CUT)
def test_a_row_that_cannot_be_read_is_told_and_the_others_are_kept(case: str, tmp_path: Path) -> None:
    name, text, message = CUT[case]
    (tmp_path / name).write_text(text)
    found = read_predictions(tmp_path / name)
    assert [p.response for p in found.predictions] == ["a"]
    (error,) = found.unreadable
    assert message in str(error)


def test_a_folder_names_its_one_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Name one of what it holds: nothing of the kind"):
        find_predictions(tmp_path, "mathvista")
    (tmp_path / "open/Intern").mkdir(parents=True)
    lines(tmp_path / "open/Intern/CoT.jsonl", [{}])
    with pytest.raises(UserError, match=r"Name one of what it holds: open.Intern.CoT\.jsonl\."):
        find_predictions(tmp_path, "mathvista")
    vista = lines(tmp_path / "Qwen_MathVista_MINI.jsonl", [{}])
    assert find_predictions(tmp_path, "mathvista") == vista == find_predictions(vista, "x")
    lines(tmp_path / "Qwen_MathVision.jsonl", [{}])
    assert find_predictions(tmp_path, "mathvista") == vista
    lines(tmp_path / "Other_MathVista.jsonl", [{}])
    with pytest.raises(
        UserError, match=r"Name one of what it holds: Other_MathVista\.jsonl, Qwen_MathVista_MINI\.jsonl"
    ):
        find_predictions(tmp_path, "mathvista")
    (tmp_path / "mathvista").mkdir()
    ours = lines(tmp_path / "mathvista" / "predictions.jsonl", [{}])
    assert find_predictions(tmp_path, "mathvista") == ours == find_predictions(tmp_path / "mathvista", "mathvista")
    with pytest.raises(UserError, match=r"No predictions at .*Qwen_MathVisio.*Did you mean 'Qwen_MathVision\.jsonl'"):
        find_predictions(tmp_path / "Qwen_MathVisio.jsonl", "mathvista")


@pytest.mark.parametrize(
    ("form", "benchmark", "message"),
    [
        ("MATH-V", "mathvista", "its columns are those of the official outputs of mathvision"),
        ("VLMEvalKit", "mathvision", "its name says mathvista"),
        ("lmms-eval", "wemath", "its name says mathvista"),
        ("vlm-dft", "mathvista", "its rows are of b"),
    ],
)
def test_the_file_of_another_benchmark_is_refused(form: str, benchmark: str, message: str, tmp_path: Path) -> None:
    file = read_predictions(FILES[form][0](tmp_path))
    with pytest.raises(UserError, match=f"is not of {benchmark}: {message}"):
        check_benchmark(file, name=benchmark, scorer=benchmark, known=list(OFFICIAL))
    right = {"MATH-V": "mathvision", "vlm-dft": "b"}.get(form, "mathvista")
    check_benchmark(file, name=right, scorer=right, known=list(OFFICIAL))


def test_a_files_name_may_name_two_benchmarks() -> None:
    assert said_benchmarks("MathVision-tuned_MathVista_MINI", list(OFFICIAL)) == {"mathvision", "mathvista"}


def test_samples_are_made_of_the_rows_where_these_hold_them(tmp_path: Path) -> None:
    row = {"index": 3, "question": "Which?", "choices": "['3/11', '8/11']", "answer": "B", "answer_option": "B", "question_type": "multi_choice",
           "answer_type": "text", "precision": 1.0, "task": "t", "skills": "['x', 'y']", "category": "c", "prediction": "p"}  # fmt: skip
    card = {
        "name": "mathvista",
        "scorer": "mathvista",
        "groups": ["metadata.task", "metadata.skills", "metadata.grade?"],
    }
    (made,) = samples_in(read_predictions(lines(tmp_path / "m.jsonl", [row])).predictions, card, where="m")
    assert (
        made.record["choices"] == ["3/11", "8/11"]
        and made.record["gold_answer"] == "8/11"
        and made.record["precision"] == 1
    )
    assert made.groups == {"task": "t", "skills": ("x", "y")} and (made.id, made.split) == ("3", "test")
    for form in ("MATH-V", "lmms-eval"):  # whose target is no record
        with pytest.raises(RowError, match=r"holds no right answers .* --data DIR"):
            samples_in(read_predictions(FILES[form][0](tmp_path)).predictions, card, where="m")
    path = lines(tmp_path / "m.jsonl", [{**row, "choices": None}])
    with pytest.raises(RowError, match=r"1 rows are of multiple choice and do not say their choices \(first: '3'\)"):
        samples_in(read_predictions(path).predictions, card, where="m")
    path = lines(tmp_path / "l.jsonl", [{"doc_id": 0, "doc": row, "target": "B", "resps": [["p"]]}])
    assert samples_in(read_predictions(path).predictions, card, where="m")[0].record == made.record


def test_choices_are_read_in_every_form_and_nothing_is_run() -> None:
    assert (
        choices_of({"choices": '["a", "b"]'})
        == choices_of({"options": ["a", "b"]})
        == choices_of({"A": "a", "B": "b", "C": None})
        == ["a", "b"]
    )
    assert choices_of({"option": "A. 10 cm;B. 15 cm; C. No correct answer"}) == ["10 cm", "15 cm", "No correct answer"]
    assert choices_of({"choices": "[]"}) is None and choices_of({}) is None
    assert (
        read_list("[__import__('os').getcwd()]") is None
        and read_list("[" * 10_000) is None
        and read_list("[1, 2") is None
    )
    assert [as_text(value) for value in (5.0, 5, "5.0", None, 0.1)] == ["5", "5", "5.0", "", "0.1"]


def test_oddities_keep_the_first_place() -> None:
    odd = Oddities()
    for where in ("row 1", "row 2"):
        odd.add("empty responses", where)
    assert odd.as_dict() == {"empty responses": {"count": 2, "first": "row 1"}}
