"""Scores of predictions: every sample's, in order, official and robust, whole or refused; the same with one process and several."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from vlm_dft import predictions, workers
from vlm_dft.chat import Sample
from vlm_dft.errors import RowError
from vlm_dft.foreign_predictions import Prediction
from vlm_dft.predictions import read_jsonl, score_pairs, score_predictions
from vlm_dft.verdicts import Score


def sample(sample_id: str, gold: str = "4", **record: Any) -> Sample:
    return Sample(
        sample_id,
        [],
        [],
        "drawn",
        "test",
        {"question": "?", "gold_answer": gold, "scorer": "drawn", **record},
        {"task": "t"},
    )


def said(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text(
        "".join(json.dumps({"benchmark": "drawn", "split": "test", **row}) + "\n" for row in rows), encoding="utf-8"
    )
    return path


SAMPLES = [sample("a"), sample("b"), sample("c")]


def test_every_draw_of_every_sample_is_scored_in_the_samples_order(tmp_path: Path) -> None:
    rows = [
        {"id": i, "draw": k, "response": f"Answer: {4 + k}", "finish": "stop", "tokens": 3}
        for k in (1, 0)
        for i in "cab"
    ]
    scores = score_predictions(SAMPLES, said(tmp_path / "predictions.jsonl", rows), tmp_path / "scores.jsonl")
    assert [(r["id"], r["draw"], r["correct"], r["tokens"]) for r in scores] == [
        (i, k, k == 0, 3) for i in "abc" for k in (0, 1)
    ]
    assert read_jsonl(tmp_path / "scores.jsonl") == scores
    assert scores[0] | {"robust": None, "extracted": None, "rule": None} == {
        "id": "a", "draw": 0, "benchmark": "drawn", "split": "test", "groups": {"task": "t"}, "cluster": "a", "correct": True,
        "extracted": None, "rule": None, "decided_by": "rule", "robust": None, "gold_answer": "4", "finish": "stop", "tokens": 3,
    }  # fmt: skip
    assert scores[0]["robust"]["correct"] and not scores[1]["robust"]["correct"]


def row(sample_id: str, response: Any = "", **more: Any) -> dict[str, Any]:
    return {"id": sample_id, "response": response, **more}


REFUSED = {
    "missing": ([row("a")], "2 samples without a prediction, first 'b'"),
    "unknown": ([row(i) for i in "abcxy"], "2 predictions of unknown samples, first 'x'"),
    "both": ([row(i) for i in "abx"], "1 samples without a prediction, first 'c'; 1 predictions of unknown samples, first 'x'"),
    "a draw short": ([row(i, draw=k) for i, k in (("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1))],
                     "1 samples without a prediction, first 'c'"),
    "two answers": ([row("a"), row("b", "4"), row("c"), row("b", "5")], "sample 'b' has another response in row 1"),
    "no text": ([row("a"), row("b", ["4"]), row("c")], "row 1, column 'response': expected a text, found list"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_whole_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    rows, message = REFUSED[case]
    with pytest.raises(RowError, match=message):
        score_predictions(SAMPLES, said(tmp_path / "predictions.jsonl", rows), tmp_path / "scores.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_a_file_that_a_kill_has_cut_is_refused_by_its_line(tmp_path: Path) -> None:
    path = said(tmp_path / "predictions.jsonl", [{"id": "a", "response": "4"}])
    path.write_text(path.read_text() + '{"id": "b", "resp')
    with pytest.raises(RowError, match=r"predictions\.jsonl, line 2: not valid JSON \(.*cut short"):
        score_predictions(SAMPLES, path, tmp_path / "scores.jsonl")


def test_scores_already_there_stay_where_new_ones_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "scores.jsonl").write_text("before\n")
    with pytest.raises(RowError):
        score_predictions(
            SAMPLES, said(tmp_path / "predictions.jsonl", [{"id": "a", "response": ""}]), tmp_path / "scores.jsonl"
        )
    assert (tmp_path / "scores.jsonl").read_text() == "before\n"


def test_several_processes_give_the_rows_that_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [
        (sample(str(k), str(k % 7)), Prediction((str(k),), f"Answer: {k % 5}", {"big": "x"}, "")) for k in range(60)
    ]
    alone = score_pairs(pairs)
    monkeypatch.setattr(predictions, "MANY", 1)
    monkeypatch.setattr(workers, "cores", lambda: 2)
    assert score_pairs(pairs) == alone
    assert sum(row["correct"] for row in alone) == sum(k % 5 == k % 7 for k in range(60))


class Yes:
    """A judge that finds everything right."""

    def score(self, response: str, record: Mapping[str, Any], benchmark: str) -> Score:
        return Score(True, f"{benchmark}: {response}", "judged", "yes-1")


def test_a_judge_decides_the_official_verdict_alone_and_is_named(tmp_path: Path) -> None:
    path = said(tmp_path / "predictions.jsonl", [{"id": i, "response": f"Answer: {i}"} for i in "abc"])
    scores = score_predictions(SAMPLES, path, tmp_path / "scores.jsonl", judge=Yes())  # type: ignore[arg-type]
    assert [(r["correct"], r["extracted"], r["decided_by"], r["robust"]["correct"]) for r in scores] == [
        (True, f"drawn: Answer: {i}", "yes-1", False) for i in "abc"
    ]
