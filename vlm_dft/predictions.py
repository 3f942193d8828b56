"""Predictions: a file of responses and its Samples in, rows of scores.jsonl out; nothing is generated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dft.chat import Sample
from vlm_dft.errors import RowError
from vlm_dft.foreign_predictions import ForeignFile, Prediction, read_predictions
from vlm_dft.matching import Matched, match
from vlm_dft.runs import write_text
from vlm_dft.scoring import score_response

if TYPE_CHECKING:
    from vlm_dft.judge import Judge

OWN = ("vlm-dft", "plain")  # formats whose ids are the samples'
MANY = 2_000  # responses from which several processes score
MOST = 8  # processes
ASKED = 16  # responses that a judge has at once


def score_predictions(
    samples: Sequence[Sample], predictions: Path, scores: Path, *, judge: Judge | None = None
) -> list[dict[str, Any]]:
    """Score a predictions.jsonl and write scores.jsonl, in the samples' order, then by draw. Returns its rows.

    Raises RowError when a sample has no prediction, or a prediction no sample, or one has two.
    """
    file = read_predictions(predictions)
    matched = match(samples, file.predictions, file.oddities, ids_only=file.format.name in OWN)
    refuse_partial(file, matched)
    rows = score_pairs(matched.pairs, judge=judge)
    write_scores(scores, rows)
    return rows


def refuse_partial(file: ForeignFile, matched: Matched, hint: str = "") -> None:
    """Raise RowError for rows that cannot be read, samples without a prediction and predictions without a sample."""
    if len(file.unreadable) == 1:
        raise RowError(f"{file.unreadable[0]}{hint}", file.unreadable[0].reason)
    missing, unknown = [s.id for s in matched.missing], ["/".join(p.key) for p in matched.unknown]
    found = [
        f"{len(ids):,} {what}, first {ids[0]!r}"
        for ids, what in ((missing, "samples without a prediction"), (unknown, "predictions of unknown samples"))
        if ids
    ]
    if file.unreadable:
        found.append(f"{len(file.unreadable):,} rows that cannot be read, first: {file.unreadable[0]}")
    if found:
        raise RowError(f"{file.path}: {'; '.join(found)}. Is it another benchmark's, or unfinished?{hint}")


def score_pairs(pairs: Sequence[tuple[Sample, Prediction]], *, judge: Judge | None = None) -> list[dict[str, Any]]:
    """Rows of scores.jsonl, in the pairs' order; of many, worked out in several processes (a judge is asked on threads)."""
    if judge is not None:
        with ThreadPoolExecutor(ASKED) as pool:
            return list(pool.map(partial(_scored, judge=judge), range(len(pairs)), pairs))
    from vlm_dft.workers import cores, in_parallel

    workers = min(MOST, cores())
    if workers < 2 or len(pairs) < MANY:
        return [_scored(k, pair) for k, pair in enumerate(pairs)]
    lean = ((replace(sample, messages=[], images=[]), replace(said, row={})) for sample, said in pairs)
    return list(in_parallel(_scored, enumerate(lean), workers, what="scoring"))


def _scored(_: int, pair: tuple[Sample, Prediction], judge: Judge | None = None) -> dict[str, Any]:
    sample, said = pair
    row = {"response": said.response, "draw": said.draw, "finish": said.finish, "tokens": said.tokens}
    scored = score_row(sample, row, judge=judge)
    if said.extraction is None and said.verdict is None:
        return scored
    return {**scored, "stored": stored_verdict(sample, said)}


def stored_verdict(sample: Sample, said: Prediction) -> dict[str, Any]:
    """What the official code extracted and said, as the file stores it; `correct`: what today's rule says of that extraction."""
    found: dict[str, Any] = {"extracted": said.extraction, "verdict": said.verdict}
    if sample.record["scorer"] == "mathvista":
        from vlm_dft.official.mathvista import score_extraction

        found["correct"] = score_extraction(said.extraction, sample.record).correct
    return found


def score_row(sample: Sample, prediction: Mapping[str, Any], *, judge: Judge | None = None) -> dict[str, Any]:
    """A row of scores.jsonl, from a sample and its row of predictions.jsonl: the official verdict, and the robust one in it."""
    response, scorer = prediction["response"], sample.record["scorer"]
    official = judge.score if judge is not None else score_response
    score = official(response, sample.record, benchmark=scorer)
    robust = score_response(response, sample.record, benchmark=scorer, rule="robust")
    return {
        "id": sample.id, "draw": prediction.get("draw", 0), "benchmark": sample.benchmark, "split": sample.split,
        "groups": sample.groups, "cluster": sample.cluster or sample.id,
        "correct": score.correct, "extracted": score.extracted, "rule": score.rule, "decided_by": score.decided_by,
        "robust": {"correct": robust.correct, "extracted": robust.extracted, "rule": robust.rule},
        "gold_answer": sample.record["gold_answer"], "finish": prediction.get("finish"), "tokens": prediction.get("tokens"),
    }  # fmt: skip


def write_scores(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write scores.jsonl, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, NaN read as null. Raises RowError naming the line that holds none, or the byte that is no UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}). Make it again.") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=lambda name: None)
        except (json.JSONDecodeError, RecursionError) as error:
            raise RowError(f"{path}, line {number}: not valid JSON ({error}).") from error
        if not isinstance(row, dict):
            raise RowError(f"{path}, line {number}: expected an object, found {type(row).__name__}.")
        rows.append(row)
    return rows
