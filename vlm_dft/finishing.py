"""Finishing: an objective's folder in; whether it is trained to its end, why there, and which checkpoint stands for it, out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_dft.checkpoints import damage, newest_whole
from vlm_dft.config import TrainConfig
from vlm_dft.errors import ModelError
from vlm_dft.evaluations import decided, read_evaluations
from vlm_dft.reporting import percent
from vlm_dft.runs import write_json

FINISHED = "finished.json"


def read_finished(folder: Path) -> dict[str, Any] | None:
    """What finished.json says: {"step", "reason", "checkpoint", "evaluations"}; None for a run that is to be trained (on)."""
    path = folder / FINISHED
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if damage(folder / found["checkpoint"], contents=False) is None else None


def finish(config: TrainConfig, folder: Path, steps: int) -> dict[str, Any] | None:
    """Record that a folder's newest checkpoint is the end of its training; None where it is not.

    It is at the last step, and where patience has run out. With keep_best the best checkpoint stands for the run.
    """
    newest, _ = newest_whole(folder, contents=False)
    if newest is None:
        return None
    step, patience = int(newest.name[11:]), config.evaluation.get("patience")
    rows = [row for row in read_evaluations(folder) if row["step"] <= step]
    found = decided(rows, patience)
    if step != steps and not (found.get("stop") and found["last"]["step"] == step):
        return None
    reason = "all steps done"
    if step != steps:
        reason = f"stopped early, {found['since_best']} evaluations without improvement"
    best = config.evaluation.get("keep_best") and found
    chosen = folder / f"checkpoint-{found['best']['step']}" if best else newest
    if wrong := damage(chosen, contents=False):
        raise ModelError(
            f"{chosen} was the best while training, and is not whole: {wrong}. Put it back, or remove the folder to start again."
        )
    said = {"step": step, "steps": steps, "reason": reason, "checkpoint": chosen.name, "evaluations": found or None}
    if int(os.environ.get("RANK", "0")) == 0:
        write_json(folder / FINISHED, said)
    return said


def finished_lines(finished: Mapping[str, Any]) -> list[str]:
    """For a person: why training ended, which checkpoint stands for it, and how far to trust the score that chose it."""
    lines = [f"{finished['reason']}, at step {finished['step']:,} of {finished['steps']:,}"]
    found = finished.get("evaluations")
    if found:
        said = ", ".join(
            f"{name} {percent(row['score'], row['stderr'])} % at step {row['step']:,}"
            for name, row in ((name, found[name]) for name in ("first", "best", "last"))
        )
        lines.append(f"{found['decides']}, {found['best']['count']} samples: {said}")
        best, last = found["best"]["step"], found["last"]["step"]
        if Path(finished["checkpoint"]).name == f"checkpoint-{best}" and best != last:
            lines.append(
                f"checkpoint-{best} stands for the run, not the last one; its score on the samples that chose it is optimistic"
            )
    return lines
