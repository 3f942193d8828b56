"""Evaluations while training: a run's evaluations.jsonl and watch/step-<k>.jsonl in; their rows, the best step, and whether to stop, out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EVALUATIONS = "evaluations.jsonl"  # in an objective's folder: a row an evaluation
ANSWERS = "watch"  # and there step-<k>.jsonl, a row a sample


def decided(rows: Sequence[Mapping[str, Any]], patience: int | None = None) -> dict[str, Any]:
    """What evaluations say: {"decides", "first", "best", "last": {step, score, stderr, count}, "since_best", "stop"}.

    stop: whether patience is at its end.

    The untrained model is no candidate, and of equals the earlier one is the best. Empty before the first candidate.
    """
    candidates = [row for row in rows if row["step"] > 0]
    if not candidates:
        return {}
    best = max(candidates, key=lambda row: (row["score"], -row["step"]))
    since = sum(row["step"] > best["step"] for row in candidates)

    def told(row: Mapping[str, Any]) -> dict[str, Any]:
        found = row["splits"][row["decides"].removeprefix("accuracy on ")]
        return {"step": row["step"], "score": row["score"], "stderr": found["stderr"], "count": found["count"]}

    return {"decides": best["decides"], "first": told(rows[0]), "best": told(best), "last": told(candidates[-1]), "since_best": since,
            "stop": patience is not None and since >= patience}  # fmt: skip


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's evaluations.jsonl; a last line that was cut off is left out."""
    path = folder / EVALUATIONS
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_watched(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """{step: rows of watch/step-<k>.jsonl}, in the order of the steps."""
    found = {int(path.stem[5:]): path for path in (folder / ANSWERS).glob("step-*.jsonl")}
    return {
        step: [json.loads(line) for line in found[step].read_text(encoding="utf-8").splitlines()]
        for step in sorted(found)
    }
