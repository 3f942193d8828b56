"""Files for VLMEvalKit: every response reads back as it was, by us and by its own reader."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from vlm_dft.chat import Sample
from vlm_dft.errors import UserError
from vlm_dft.foreign_predictions import read_predictions
from vlm_dft.vlmevalkit_files import write_vlmevalkit


def lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sample(sample_id: str, question: str = "", gold: str = "1", **record: Any) -> Sample:
    return Sample(
        sample_id, [], [], "gsm8k", "test", {"question": question, "gold_answer": gold, "scorer": "gsm8k", **record}
    )


HARD = ("=1+1", "=", "#N/A", "5", "5.0", " spaces ", "tab\tand\nlines\r\nand\rreturns", 'quotes " and \'', "", "\x00\x01\x0b\x1f", "_x000D_ _x005F_",
        "\u00e9 \u4e2d\u6587 \U0001f600", "<image>&amp;", "\ufeffmark", "x" * 32_000, "1e999", "True", "-", "@now", "\uffff")  # fmt: skip


@pytest.mark.parametrize("suffix", [".xlsx", ".tsv"])
def test_what_is_written_for_vlmevalkit_reads_back_the_same(suffix: str, tmp_path: Path) -> None:
    pairs = []
    for k, text in enumerate(HARD):
        (said,) = read_predictions(lines(tmp_path / "p.jsonl", [{"id": str(k), "response": text}])).predictions
        pairs.append((sample(str(k), f"=Question {k}?", "=1", choices=["=a", "b"]), said))
    path = tmp_path / f"Model_GSM8K{suffix}"
    assert write_vlmevalkit(path, pairs) == {"rows": len(HARD), "draws left out": 0}
    back = read_predictions(path)
    assert [(p.key, p.response) for p in back.predictions] == [((str(k),), text) for k, text in enumerate(HARD)]
    first = back.predictions[0].row
    assert (first["question"], first["answer"], first["A"], first["B"]) == ("=Question 0?", "=1", "=a", "b")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_vlmevalkits_own_reader_finds_every_column_of_its_evaluation(tmp_path: Path) -> None:
    """pandas, as VLMEvalKit loads; the columns are those that its MathVista and MATH-Vision evaluations read."""
    pandas = pytest.importorskip("pandas")
    record = {"question": "Which?", "choices": ["3/11", "8/11"], "question_type": "multi_choice", "answer_type": "text", "precision": None,
              "gold_answer": "8/11", "scorer": "mathvista"}  # fmt: skip
    made = Sample("12", [], [], "mathvista", "testmini", record, {"task": "t", "skills": ("x", "y")})
    (said,) = read_predictions(lines(tmp_path / "p.jsonl", [{"id": "12", "response": "=B"}])).predictions
    write_vlmevalkit(tmp_path / "m.xlsx", [(made, said)])
    write_vlmevalkit(tmp_path / "m.tsv", [(made, said)])
    for found in (pandas.read_excel(tmp_path / "m.xlsx"), pandas.read_csv(tmp_path / "m.tsv", sep="\t")):
        row = dict(found.iloc[0])
        assert (row["index"], row["answer_option"], row["prediction"], row["task"]) == (12, "B", "=B", "t")
        assert (
            row["choices"] == "['3/11', '8/11']"
            and row["skills"] == "['x', 'y']"
            and row["question_type"] == "multi_choice"
        )
    vision = Sample(
        "5",
        [],
        [],
        "mathvision",
        "test",
        {**record, "choices": None, "gold_answer": "4", "scorer": "mathvision"},
        {"subject": "algebra"},
    )
    write_vlmevalkit(tmp_path / "v.tsv", [(vision, said)])
    row = dict(pandas.read_csv(tmp_path / "v.tsv", sep="\t").iloc[0])
    assert (row["index"], row["choices"], row["category"], row["answer"]) == (5, "[]", "algebra", 4)


def test_a_text_too_long_for_a_cell_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (said,) = read_predictions(lines(tmp_path / "p.jsonl", [{"id": "a", "response": "x" * 32_768}])).predictions
    with pytest.raises(
        UserError, match=r"holds 32,767 characters, and column 'prediction' of row 'a' needs 32,768\. Write a \.tsv"
    ):
        write_vlmevalkit(tmp_path / "m.xlsx", [(sample("a"), said)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.jsonl"]
    write_vlmevalkit(tmp_path / "m.tsv", [(sample("a"), said)])
    assert read_predictions(tmp_path / "m.tsv").predictions[0].response == "x" * 32_768


def test_of_several_draws_the_first_is_written(tmp_path: Path) -> None:
    rows = [{"id": "a", "draw": k, "benchmark": "b", "split": "s", "response": f"r{k}"} for k in range(3)]
    said = read_predictions(lines(tmp_path / "p.jsonl", rows)).predictions
    assert write_vlmevalkit(tmp_path / "m.tsv", [(sample("a"), one) for one in said]) == {
        "rows": 1,
        "draws left out": 2,
    }
    assert [p.response for p in read_predictions(tmp_path / "m.tsv").predictions] == ["r0"]
