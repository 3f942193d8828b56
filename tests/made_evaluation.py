"""A made evaluation: verdicts drawn at random for several runs in; samples, scores, responses and their report out."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from vlm_dft.chat import Sample
from vlm_dft.metrics import compare, summarise

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


def make_report(scores: ROWS) -> dict[str, Any]:
    """The report of these runs."""
    report: dict[str, Any] = {
        "runs": {run: {"folders": [f"runs/{run}"], "model": "tiny", "protocol": "official", "engine": "transformers", "seeds": 1} for run in scores},
        "benchmarks": {},
        "versions": {"packages": {"transformers": "5.23.0"}, "python": "3.11"},
    }  # fmt: skip
    for benchmark in next(iter(scores.values())):
        rows = {run: found[benchmark] for run, found in scores.items()}
        report["benchmarks"][benchmark] = {
            "testmini": {
                "runs": {run: summarise(found)["testmini"] for run, found in rows.items()},
                "comparisons": [c for a, b in combinations(rows, 2) for c in _compared(b, a, rows, benchmark)],
            }
        }
    return report


def _compared(run: str, against: str, rows: Mapping[str, Any], benchmark: str) -> list[dict[str, Any]]:
    found = []
    groups = [None, *sorted({row["groups"]["subject"] for row in rows[run]})]
    for rule in ("official", "robust"):
        for value in groups:
            some = {name: [r for r in rows[name] if value in (None, r["groups"]["subject"])] for name in (against, run)}
            a, b = ([r if rule == "official" else {**r, **r["robust"]} for r in some[name]] for name in (against, run))
            c = compare(a, b)
            found.append({
                "run": run, "against": against, "benchmark": benchmark, "split": "testmini", "group": value and "subject", "value": value,
                "rule": rule, "clusters": len(a), "first": sum(r["correct"] for r in a) / len(a), "second": sum(r["correct"] for r in b) / len(b),
                **c, "low": c["difference"] - 1.96 * c["stderr"], "high": c["difference"] + 1.96 * c["stderr"], "test": "mcnemar",
                "p_adjusted": min(1.0, 3 * c["p_value"]), "samples_needed": 1234,
            })  # fmt: skip
    return found


def real_pictures(shared: Path) -> list[str]:
    """Every picture of the local data pack."""
    return sorted(str(p) for kind in ("png", "jpg", "jpeg") for p in shared.rglob(f"*.{kind}") if "bad_inputs" not in p.parts)  # fmt: skip
