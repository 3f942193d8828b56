"""A made evaluation: verdicts drawn at random for several runs in; samples, scores, responses and their report out."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_dft.chat import Sample
from vlm_dft.comparing import compare_runs, read_runs

ROWS = dict[str, dict[str, list[dict[str, Any]]]]


def make_samples(pictures: Sequence[Any], counts: Mapping[str, int]) -> dict[str, list[Sample]]:
    """counts: {benchmark: samples}; the pictures are taken in turn."""
    samples: dict[str, list[Sample]] = {}
    for benchmark, count in counts.items():
        for k in range(count):
            choices = [f"({c}) {10 * k + j}" for j, c in enumerate("ABCD")] if k % 2 else None
            gold = "ABCD"[k % 4] if choices else str(k)
            record = {"question": f"What is the area of figure {k}?", "choices": choices, "gold_answer": gold}
            groups = {"subject": ["algebra", "geometry", "counting"][k % 3], "skills": ["reading"] + ["arithmetic"] * (k % 5 == 0)}  # fmt: skip
            content = [{"type": "image"}, {"type": "text", "text": record["question"]}]
            images = [pictures[k % len(pictures)]] if pictures else []
            samples.setdefault(benchmark, []).append(
                Sample(f"{benchmark}-{k}", [{"role": "user", "content": content}], images, benchmark, "testmini", record, groups)
            )  # fmt: skip
    return samples


def make_rows(
    samples: Mapping[str, Sequence[Sample]], skill: Mapping[str, float], words: Sequence[str], seed: int = 0
) -> tuple[ROWS, ROWS]:
    """(scores, responses) of runs that are right as often as skill says; words: what their responses begin with."""
    scores: ROWS = {}
    responses: ROWS = {}
    for run, share in skill.items():
        draw = random.Random(f"{seed} {run}")
        for benchmark, found in samples.items():
            for k, sample in enumerate(found):
                right, gold = draw.random() < share, sample.record["gold_answer"]
                abstains, slip = draw.random() < 0.05, draw.random() < 0.03
                extracted = None if abstains else gold if right else "7"
                verdict = {"correct": right and not abstains, "extracted": extracted, "rule": "nothing" if abstains else "last_line"}  # fmt: skip
                robust = {**verdict, "correct": verdict["correct"] != slip, "rule": "the_answer_is"}
                row = {"id": sample.id, "draw": 0, "benchmark": benchmark, "split": sample.split}
                text = words[k % len(words)] + ("" if abstains else f"\nThe answer is {extracted}.")
                finish = "length" if abstains else "stop"
                said = {**row, "response": text, "finish": finish, "tokens": len(text) // 4}
                judged = {
                    **row, "groups": sample.groups, "cluster": sample.id, **verdict, "decided_by": "rule", "robust": robust,
                    "gold_answer": gold, "finish": said["finish"], "tokens": said["tokens"],
                }  # fmt: skip
                responses.setdefault(run, {}).setdefault(benchmark, []).append(said)
                scores.setdefault(run, {}).setdefault(benchmark, []).append(judged)
    return scores, responses


def make_report(scores: ROWS, folder: Path) -> dict[str, Any]:
    """The report of these runs, by way of the folders that `evaluate` leaves."""
    for run, found in scores.items():
        for name, rows in found.items():
            place = folder / run / name.replace("/", "_")
            place.mkdir(parents=True)
            (place / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            said = {
                "benchmark": name,
                "model": "tiny",
                "protocol": "official",
                "engine": "transformers",
                "decoding": {"temperature": 0.0},
            }
            (place / "results.json").write_text(json.dumps(said))
    return compare_runs(read_runs([f"{run}={folder / run}" for run in scores]))


def real_pictures(shared: Path) -> list[str]:
    """Every picture of the local data pack."""
    return sorted(str(p) for kind in ("png", "jpg", "jpeg") for p in shared.rglob(f"*.{kind}") if "bad_inputs" not in p.parts)  # fmt: skip
