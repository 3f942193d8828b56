"""Which prediction is of which sample: by id, by place or by question, and never by an id whose question is another."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from vlm_dft.chat import Sample
from vlm_dft.errors import RowError
from vlm_dft.foreign_predictions import read_predictions
from vlm_dft.matching import match

QUESTIONS = (
    "How many red bars are taller than the blue one?",
    "What is the area of the shaded square?",
    "Which of the three lines is the longest?",
)


def lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sample(sample_id: str, question: str = "", gold: str = "1", **record: Any) -> Sample:
    return Sample(
        sample_id, [], [], "gsm8k", "test", {"question": question, "gold_answer": gold, "scorer": "gsm8k", **record}
    )


def matched(
    tmp_path: Path, samples: list[Sample], rows: list[Mapping[str, Any]]
) -> tuple[str, dict[str, list[str]], list[str], list[str]]:
    file = read_predictions(lines(tmp_path / "m.jsonl", rows))
    found = match(samples, file.predictions, file.oddities)
    pairs: dict[str, list[str]] = {}
    for one, said in found.pairs:
        pairs.setdefault(one.id, []).append(said.response)
    return found.by, pairs, ["/".join(p.key) for p in found.unknown], [s.id for s in found.missing]


def test_predictions_are_matched_by_id_place_or_question(tmp_path: Path) -> None:
    asked = [sample(str(k + 1), question) for k, question in enumerate(QUESTIONS)]
    rows = [
        {"index": k, "question": f"Hint: say it.\nQuestion: {q}", "prediction": q[:5]} for k, q in enumerate(QUESTIONS)
    ]
    right = {str(k + 1): [q[:5]] for k, q in enumerate(QUESTIONS)}
    assert matched(tmp_path, asked, [{**row, "index": row["index"] + 1} for row in rows]) == ("id", right, [], [])
    assert matched(tmp_path, asked, rows) == (
        "place in the data, counted from 0",
        right,
        [],
        [],
    )  # ids 1 and 2 are there, and ask else
    shuffled = [{**row, "index": f"x{row['index']}"} for row in reversed(rows)]
    assert matched(tmp_path, asked, shuffled) == ("question", right, [], [])
    assert (
        matched(tmp_path, asked, [{**row, "index": f"x{row['index']}", "pid": row["index"] + 1} for row in rows])[0]
        == "column pid"
    )
    other = [
        {"index": k + 1, "question": f"Quite another thing, number {k}, is asked here.", "prediction": "?"}
        for k in range(3)
    ]
    assert matched(tmp_path, asked, other) == ("nothing", {}, ["1", "2", "3"], ["1", "2", "3"])


def test_a_question_that_a_harness_has_cleaned_is_still_the_samples(tmp_path: Path) -> None:
    asked = [sample("7", "<image1> What is the area of the  shaded square, in cm\u00b2 (to the nearest whole number)?")]
    rows = [
        {
            "index": 7,
            "question": "What is the area of the shaded square in cm^2 (to the nearest whole number)",
            "prediction": "4",
        }
    ]
    assert matched(tmp_path, asked, rows)[:2] == ("id", {"7": ["4"]})


def test_places_without_a_question_are_believed_where_the_answers_agree(tmp_path: Path) -> None:
    asked = [sample(f"s{k}", "?", gold) for k, gold in enumerate("ABCD")]
    rows = [{"doc_id": k, "target": gold, "filtered_resps": [gold]} for k, gold in enumerate("ABCD")]
    assert matched(tmp_path, asked, rows)[0] == "place in the data, counted from 0"
    assert matched(tmp_path, asked, [{**row, "target": "E"} for row in rows])[0] == "nothing"


def test_the_id_in_a_metric_of_lmms_eval_is_the_samples(tmp_path: Path) -> None:
    asked = [sample(str(k + 7), question) for k, question in enumerate(QUESTIONS)]
    metrics = [
        {"question_id": str(k + 7), "query": q, "answer": "what the model said"} for k, q in enumerate(QUESTIONS)
    ]
    rows = [
        {"doc_id": 9 - k, "target": "?", "filtered_resps": "r", "gpt_eval_score": metric}
        for k, metric in enumerate(metrics)
    ]
    assert matched(tmp_path, asked, rows) == ("column question_id", {"7": ["r"], "8": ["r"], "9": ["r"]}, [], [])


def test_equal_questions_are_told_apart_by_their_answers(tmp_path: Path) -> None:
    asked = [sample("a", QUESTIONS[0], "5"), sample("b", QUESTIONS[0], "6")]
    rows = [
        {"index": f"x{k}", "question": QUESTIONS[0], "answer": gold, "prediction": gold} for k, gold in enumerate("65")
    ]
    assert matched(tmp_path, asked, rows)[1] == {"a": ["5"], "b": ["6"]}


def test_a_row_twice_is_kept_once_and_two_answers_are_refused(tmp_path: Path) -> None:
    row = {"id": "a", "benchmark": "b", "split": "s", "response": "x"}
    file = read_predictions(lines(tmp_path / "p.jsonl", [row, row, {**row, "draw": 1}]))
    found = match([sample("a")], file.predictions, file.oddities)
    assert len(found.pairs) == 2 and file.oddities.lines() == [
        "1 rows that are there twice, of which one is kept (first: p.jsonl, row 1)"
    ]
    file = read_predictions(lines(tmp_path / "p.jsonl", [row, {**row, "response": "y"}]))
    with pytest.raises(RowError, match=r"p\.jsonl, row 1: sample 'a' has another response in row 0, of the same draw"):
        match([sample("a")], file.predictions, file.oddities)


def test_a_sample_with_fewer_draws_than_others_is_missing(tmp_path: Path) -> None:
    rows = [
        {"id": i, "draw": k, "benchmark": "b", "split": "s", "response": "x"} for i, k in (("a", 0), ("a", 1), ("b", 1))
    ]
    _, pairs, _, missing = matched(tmp_path, [sample("a"), sample("b"), sample("c")], rows)
    assert pairs == {"a": ["x", "x"], "b": ["x"]} and missing == ["b", "c"]
