"""Predictions: a predictions.jsonl and its Samples in, rows of scores.jsonl out; nothing is generated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_dft.chat import Sample
from vlm_dft.errors import RowError
from vlm_dft.runs import write_text
from vlm_dft.scoring import score_response


def score_predictions(samples: Sequence[Sample], predictions: Path, scores: Path) -> list[dict[str, Any]]:
    """Score a predictions.jsonl and write scores.jsonl, in the samples' order. Returns its rows. Nothing is generated.

    Raises RowError when a sample has no prediction, or a prediction no sample.
    """
    found = {row["id"]: row for row in read_jsonl(predictions)}
    missing = [sample.id for sample in samples if sample.id not in found]
    unknown = sorted(set(found) - {sample.id for sample in samples})
    for ids, what in ((missing, "samples without a prediction"), (unknown, "predictions of unknown samples")):
        if ids:
            raise RowError(
                f"{predictions}: {len(ids)} {what}, first {ids[0]!r}. Is it another benchmark's, or unfinished?"
            )
    rows = [score_row(sample, found[sample.id]) for sample in samples]
    write_text(scores, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def score_row(sample: Sample, prediction: Mapping[str, Any]) -> dict[str, Any]:
    """A row of scores.jsonl, from a sample and its row of predictions.jsonl: the official verdict, and the robust one in it."""
    response, scorer = prediction["response"], sample.record["scorer"]
    score = score_response(response, sample.record, benchmark=scorer)
    robust = score_response(response, sample.record, benchmark=scorer, rule="robust")
    return {
        "id": sample.id, "draw": prediction.get("draw", 0), "benchmark": sample.benchmark, "split": sample.split,
        "groups": sample.groups, "cluster": sample.cluster or sample.id,
        "correct": score.correct, "extracted": score.extracted, "rule": score.rule, "decided_by": score.decided_by,
        "robust": {"correct": robust.correct, "extracted": robust.extracted, "rule": robust.rule},
        "gold_answer": sample.record["gold_answer"], "finish": prediction.get("finish"), "tokens": prediction.get("tokens"),
    }  # fmt: skip


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. Raises RowError naming the line that is not JSON."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise RowError(f"{path}, line {number}: not valid JSON ({error}).") from error
    return rows
