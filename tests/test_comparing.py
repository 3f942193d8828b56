"""Comparing: folders as the program leaves them; what is compared, what is refused, and what the report says."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest

from vlm_dft.comparing import compare_runs, read_runs
from vlm_dft.conclusions import also_said
from vlm_dft.errors import RowError, UserError


def score(k: int, correct: bool, **given: Any) -> dict[str, Any]:
    return {
        "id": f"s{k}", "draw": 0, "benchmark": "quiz", "split": "test", "cluster": f"s{k}",
        "groups": {"level": f"level {k % 2}", "skills": ["all", "first" if k < 10 else "rest"]},
        "correct": correct, "extracted": str(correct), "rule": "r", "decided_by": "rule",
        "robust": {"correct": True, "extracted": "x", "rule": "r"}, "gold_answer": "g", "finish": "stop", "tokens": 5, **given,
    }  # fmt: skip


def write(folder: Path, verdicts: str | list[dict[str, Any]], **settings: Any) -> Path:
    """A benchmark's folder: "1101" is right, right, wrong, right."""
    rows = [score(k, v == "1") for k, v in enumerate(verdicts)] if isinstance(verdicts, str) else verdicts
    folder.mkdir(parents=True)
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = {"benchmark": rows[0]["benchmark"], "model": folder.parent.name, "protocol": "official", **settings}
    (folder / "results.json").write_text(json.dumps(said))
    return folder


def compare(*words: Any, **how: Any) -> dict[str, Any]:
    return compare_runs(read_runs(list(map(str, words))), **how)


def whole(report: dict[str, Any], rule: str = "official") -> dict[tuple[str, str], dict[str, Any]]:
    rows = report["benchmarks"]["quiz"]["test"]["comparisons"]
    return {(r["run"], r["against"]): r for r in rows if r["group"] is None and r["rule"] == rule}


def test_runs_are_compared_sample_by_sample_by_both_rules(tmp_path: Path) -> None:
    write(tmp_path / "sft" / "quiz", "1100000000")
    write(tmp_path / "dft" / "quiz", "1011111000")
    report = compare(tmp_path / "sft", tmp_path / "dft")
    row = whole(report)["dft", "sft"]
    assert (row["difference"], row["only_first"], row["only_second"]) == (pytest.approx(0.4), 1, 5)
    assert (row["p_value"], row["p_adjusted"], row["test"]) == (pytest.approx(0.21875), None, "mcnemar")
    assert whole(report, "robust")["dft", "sft"]["difference"] == 0
    assert report["runs"]["dft"] == {
        "folders": [str(tmp_path / "dft")], "model": "dft", "protocol": "official", "engine": None, "decoding": None, "seeds": 1
    }  # fmt: skip
    measured = report["benchmarks"]["quiz"]["test"]["runs"]["dft"]
    assert (measured["accuracy"], measured["count"], measured["robust"]["accuracy"]) == (0.6, 10, 1)
    assert "one seed each" in report["notes"][0]


def test_groups_are_compared_with_holms_correction_over_all_of_them(tmp_path: Path) -> None:
    first = "01" * 10
    write(tmp_path / "a" / "quiz", first)
    write(tmp_path / "b" / "quiz", "11" * 10)
    rows = compare(tmp_path / "a", tmp_path / "b")["benchmarks"]["quiz"]["test"]["comparisons"]
    groups = {(r["group"], r["value"]): r for r in rows if r["group"] and r["rule"] == "official"}
    raw = {key: (r["count"], r["p_value"]) for key, r in groups.items()}
    assert raw == {
        ("level", "level 0"): (10, pytest.approx(2 / 2**10)),
        ("level", "level 1"): (10, 1.0),
        ("skills", "all"): (20, pytest.approx(2 / 2**10)),
        ("skills", "first"): (10, 0.0625),
        ("skills", "rest"): (10, 0.0625),
    }
    assert groups["level", "level 0"]["p_adjusted"] == pytest.approx(5 * 2 / 2**10)
    assert groups["skills", "first"]["p_adjusted"] == pytest.approx(3 * 0.0625)


def test_the_baseline_comes_first_and_every_two_runs_are_compared(tmp_path: Path) -> None:
    for name in ("dft", "nll", "base"):
        write(tmp_path / name / "quiz", "10" * 5)
    words = [tmp_path / name for name in ("dft", "nll", "base")]
    assert list(whole(compare(*words))) == [("nll", "base"), ("dft", "base"), ("dft", "nll")]
    assert list(whole(compare(*words, baseline="nll"))) == [("base", "nll"), ("dft", "nll"), ("dft", "base")]
    assert list(whole(compare(*words[:2]))) == [("nll", "dft")]  # without a base: as they were named
    with pytest.raises(
        UserError, match=r"--baseline 'nl' is none of the runs. Did you mean 'nll'\? Runs: dft, nll, base"
    ):
        compare(*words, baseline="nl")


def test_the_same_label_again_is_another_seed(tmp_path: Path) -> None:
    draw = random.Random(0)
    seeds = []
    for k in range(6):
        verdicts = "".join("01"[draw.random() < (0.5 if k < 3 else 0.6)] for _ in range(100))
        seeds.append(write(tmp_path / f"seed{k}", verdicts))
    report = compare(*(f"{'nll' if k < 3 else 'dft'}={path}" for k, path in enumerate(seeds)))
    assert {label: about["seeds"] for label, about in report["runs"].items()} == {"nll": 3, "dft": 3}
    row, runs = whole(report)["dft", "nll"], report["benchmarks"]["quiz"]["test"]["runs"]
    assert (row["test"], row["interval"], row["seeds"]) == ("t, samples and seeds", "t", [3, 3])
    assert runs["dft"]["accuracy"] == pytest.approx(sum(runs["dft"]["by_seed"]) / 3)
    assert row["difference"] == pytest.approx(runs["dft"]["accuracy"] - runs["nll"]["accuracy"])
    value = runs["dft"]["groups"]["level"]["level 1"]
    assert value["count"] == 50 and value["low"] < value["accuracy"] < value["high"]
    assert "errors and tests cover the choice of samples and of seeds" in report["notes"][0]
    assert report["notes"][1].startswith("Two or three seeds say little")


def training(folder: Path, seed: int, objectives: list[str], verdicts: list[str], rate: float = 1e-5) -> Path:
    """An OUTPUT of train: base and the objectives; of one objective alone in the folder itself."""
    for name, text in zip(["base", *objectives], verdicts, strict=True):
        place = folder if objectives == [name] else folder / name
        place.mkdir(parents=True, exist_ok=True)
        rows = [score(k, v == "1") for k, v in enumerate(text)]
        (place / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"objective": objectives, "seed": seed, "learning_rate": rate, "output": str(folder)}
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


def test_a_training_run_stands_for_its_base_model_and_every_objective(tmp_path: Path) -> None:
    several = training(tmp_path / "several", 0, ["dft", "nll"], ["0011", "1111", "0111"])
    assert list(read_runs([str(several)])) == ["base", "dft", "nll"]
    single = training(tmp_path / "single", 0, ["dft"], ["0011", "1111"])
    assert list(read_runs([str(single)])) == ["base", "dft"]
    assert list(read_runs([f"mine={single}"])) == ["mine"]
    assert list(read_runs([str(several / "nll")])) == ["nll"]
    with pytest.raises(UserError, match=r"mine=.*several: several models \(dft, nll\). Name one's folder"):
        read_runs([f"mine={several}"])


def test_training_runs_that_differ_in_their_seed_alone_are_seeds(tmp_path: Path) -> None:
    runs = [training(tmp_path / f"run{k}", k, ["dft", "nll"], ["0011", f"111{k}", f"01{k}1"]) for k in range(2)]
    report = compare(*runs)
    assert {label: about["seeds"] for label, about in report["runs"].items()} == {"base": 1, "dft": 2, "nll": 2}
    assert "of 2 folders of base some hold the same answers, which count once: 1 of them" in report["warnings"][0]
    other = training(tmp_path / "other", 0, ["dft", "nll"], ["0011", "1111", "0111"], rate=1e-4)
    assert list(read_runs([str(runs[0]), str(other)])) == [
        "run0/base", "run0/dft", "run0/nll", "other/base", "other/dft", "other/nll"
    ]  # fmt: skip


def test_folders_of_one_name_are_told_apart_and_not_taken_for_seeds(tmp_path: Path) -> None:
    folders = [write(tmp_path / name / "quiz", "10") for name in ("small", "large")]
    assert list(read_runs(list(map(str, folders)))) == ["small/quiz", "large/quiz"]


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "floor-minimum=0.2", "10")
    assert list(read_runs([str(folder)])) == ["floor-minimum=0.2"]
    assert list(read_runs([f"mine={folder}"])) == ["mine"]


def test_several_benchmarks_are_compared_and_one_that_is_missing_is_said(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name / "quiz", "1010")
    write(tmp_path / "a" / "exam", [score(k, True, benchmark="exam") for k in range(3)])
    report = compare(tmp_path / "a", tmp_path / "b")
    assert list(report["benchmarks"]) == ["exam", "quiz"]
    assert (
        list(report["benchmarks"]["exam"]["test"]["runs"]),
        report["benchmarks"]["exam"]["test"]["comparisons"],
    ) == (["a"], [])
    assert report["warnings"] == ["exam: only in a; the other runs have no scores of it."]
    with pytest.raises(UserError, match="No benchmark is in two of the runs: exam: exam; b: quiz. Nothing to compare"):
        compare(tmp_path / "a" / "exam", tmp_path / "b")


def test_one_run_alone_is_measured(tmp_path: Path) -> None:
    report = compare(write(tmp_path / "a" / "quiz", "1010"))
    assert report["benchmarks"]["quiz"]["test"]["comparisons"] == report["notes"] == []


def test_other_samples_are_refused_unless_the_common_ones_are_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "a" / "quiz", "10101")
    write(tmp_path / "b" / "quiz", [score(k, True) for k in range(2, 9)])
    with pytest.raises(
        UserError,
        match="quiz: a has 5 samples and b 7: 2 in a only, the first 's0' of split 'test'; 4 in b only, the first 's5'.*--common to "
        "compare on the 3 that both have",
    ):
        compare(tmp_path / "a", tmp_path / "b")
    report = compare(tmp_path / "a", tmp_path / "b", common=True)
    assert report["warnings"] == ["quiz: compared on the 3 samples that all runs have, of 9."]
    assert report["benchmarks"]["quiz"]["test"]["runs"]["b"]["count"] == whole(report)["b", "a"]["count"] == 3
    write(tmp_path / "c" / "quiz", [score(99, True)])
    with pytest.raises(UserError, match="no sample is in all of a, c"):
        compare(tmp_path / "a", tmp_path / "c", common=True)


def test_another_version_of_the_data_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a" / "quiz", "10")
    write(tmp_path / "b" / "quiz", [score(0, True), score(1, True, gold_answer="h")])
    with pytest.raises(
        UserError, match="1 samples have other gold answers in a than in b, the first 's1': 'g' and 'h'"
    ):
        compare(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("key", "one", "other"),
    [("protocol", "official", "vlmevalkit"), ("decoding", {"temperature": 0}, {"temperature": 1}), ("max_new_tokens", 16, 32)],
)  # fmt: skip
def test_runs_that_were_asked_differently_are_refused_unless_that_is_wanted(
    tmp_path: Path, key: str, one: Any, other: Any
) -> None:
    write(tmp_path / "a" / "quiz", "10", **{key: one})
    write(tmp_path / "b" / "quiz", "11", **{key: other})
    with pytest.raises(UserError, match=f"quiz: {key} differs .*a: .*; b: .*--mixed"):
        compare(tmp_path / "a", tmp_path / "b")
    assert f"quiz: {key} differs" in compare(tmp_path / "a", tmp_path / "b", mixed=True)["warnings"][0]


def test_what_may_differ_is_said_and_seeds_of_drawing_may(tmp_path: Path) -> None:
    write(tmp_path / "a" / "quiz", "10", engine="transformers", decoding={"temperature": 1, "seed": 0})
    write(tmp_path / "b" / "quiz", "11", engine="openai", decoding={"temperature": 1, "seed": 1})
    assert compare(tmp_path / "a", tmp_path / "b")["warnings"] == ["quiz: engine differs (a: transformers; b: openai)."]


def test_draws_are_averaged_and_have_to_be_equally_many(tmp_path: Path) -> None:
    draws = [score(k, (k + d) % 3 > 0, draw=d) for k in range(12) for d in range(3)]
    write(tmp_path / "a" / "quiz", draws)
    write(tmp_path / "b" / "quiz", [{**row, "correct": row["draw"] < 2 or row["correct"]} for row in draws])
    report = compare(tmp_path / "a", tmp_path / "b")
    row = whole(report)["b", "a"]
    assert (row["first"], row["second"], row["count"], row["test"]) == (
        pytest.approx(2 / 3),
        pytest.approx(8 / 9),
        12,
        "sign-flip",
    )
    assert row["p_value"] == pytest.approx(2 / 2**8)  # eight samples gain a third
    extra = report["benchmarks"]["quiz"]["test"]["runs"]["a"]["extra"]
    assert list(extra) == ["avg@3", "pass@2", "pass@3", "maj@3"]
    write(tmp_path / "c" / "quiz", "1" * 12)
    with pytest.raises(UserError, match="the number of responses to a sample differs .a: 3; c: 1."):
        compare(tmp_path / "a", tmp_path / "c")
    write(tmp_path / "d" / "quiz", draws[:-1])
    with pytest.raises(UserError, match="a: 3; d: 2 or 3"):
        compare(tmp_path / "a", tmp_path / "d")


def test_metrics_of_the_benchmark_are_measured_again_and_averaged_over_seeds(tmp_path: Path) -> None:
    said = {"splits": {"test": {"extra": {"worst_case": {}}}}}
    for name, right in (("one", "111011"), ("two", "110011"), ("three", "111111")):
        rows = [score(k, v == "1", cluster=f"c{k // 2}") for k, v in enumerate(right)]
        write(tmp_path / name, rows, **said)
    runs = compare(tmp_path / "three", f"dft={tmp_path / 'one'}", f"dft={tmp_path / 'two'}")["benchmarks"]["quiz"][
        "test"
    ]["runs"]
    assert runs["three"]["extra"]["worst_case"]["worst"]["accuracy"] == 1
    found = runs["dft"]["extra"]["worst_case"]
    assert found["worst"]["accuracy"] == pytest.approx(2 / 3) and found["average"]["accuracy"] == pytest.approx(4.5 / 6)


def test_a_benchmarks_own_numbers_are_compared_problem_by_problem(tmp_path: Path) -> None:
    said = {"splits": {"test": {"extra": {"worst_case": {}, "four_dimensional": {}}}}}
    keys = ("2steps_1", "2steps_2", "2steps_multi")
    for name, problems in (("a", ["111", "110", "001", "000"]), ("b", ["111", "111", "101", "110"])):
        rows = [score(3 * c + k, v == "1", cluster=f"c{c}", groups={"key": keys[k]}) for c, word in enumerate(problems)
                for k, v in enumerate(word)]  # fmt: skip
        write(tmp_path / name, rows, **said)
    report = compare(tmp_path / "a", tmp_path / "b")
    rows = report["benchmarks"]["quiz"]["test"]["comparisons"]
    own = {r["value"]: r for r in rows if r["group"] == "metric" and r["rule"] == "official"}
    worst = own["worst_case, worst"]
    assert (worst["first"], worst["second"], worst["count"], worst["test"]) == (0.25, 0.5, 4, "mcnemar")
    strict, loose = own["four_dimensional, score_strict"], own["four_dimensional, score_loose"]
    assert (strict["first"], strict["second"]) == (1.5 / 4, 2.5 / 4)  # 1, 1/2, 0, 0 and 1, 1, 0, 1/2
    assert (loose["first"], loose["second"]) == (1.5 / 4, 3.5 / 4)
    assert loose["p_value"] == pytest.approx(0.25) and loose["p_adjusted"] is None  # +1/2, +1, +1/2: 2 / 2^3
    lines = list(also_said(report, whole(report)["b", "a"]))
    assert any(line.startswith("worst_case, worst: +25.0 points, 95 % interval [") for line in lines)


def test_scores_of_an_older_version_have_no_robust_comparison(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = [{k: v for k, v in score(n, True).items() if k not in ("robust", "draw", "cluster")} for n in range(4)]
        write(tmp_path / name / "quiz", rows)
    report = compare(tmp_path / "a", tmp_path / "b")
    assert {r["rule"] for r in report["benchmarks"]["quiz"]["test"]["comparisons"]} == {"official"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "gone", "'.*gone' does not exist. Expected a folder that `vlm-dft evaluate` or `vlm-dft train` wrote"),
        (lambda p: write(p / "run", "10") / "scores.jsonl", "'.*scores.jsonl' is a file. Expected a folder"),
        (lambda p: p, "has no scores.jsonl, nor has a folder in it. Expected an OUTPUT"),
        (lambda p: ((p / "predictions.jsonl").write_text("") and "") or p, "Score it first: vlm-dft score .*predictions.jsonl"),
        (lambda p: f"={write(p / 'run', '10')}", "expected label=folder, found no label"),
    ],
)  # fmt: skip
def test_a_word_that_is_no_run_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_runs([str(make(tmp_path))])


def test_a_folder_named_twice_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", "10")
    with pytest.raises(UserError, match="a: a folder is named twice"):
        read_runs([f"a={folder}", f"a={folder}/../run"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty. Score the predictions again"),
        ('{"id": "a"}\n', "row 1: no 'split'"),
        ('[1]\n', "line 1: expected an object, found list"),
        (json.dumps(score(0, "no")), "row 1: verdict 'no', neither true nor false"),  # type: ignore[arg-type]
        (json.dumps(score(0, True, draw="a")), "row 1: draw 'a'"),
        (json.dumps(score(0, True, groups={"level": 1})), "row 1: groups {'level': 1}"),
        (json.dumps(score(0, True)) + "\n" + json.dumps(score(0, False)), "row 2: sample 's0', draw 0 is there twice"),
        (json.dumps(score(0, True)) + "\n" + json.dumps(score(1, False, benchmark="exam")), "has rows of exam beside those of quiz"),
        ('{"id": \n', "line 1: not valid JSON"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_with_its_row(tmp_path: Path, text: str, message: str) -> None:
    folder = write(tmp_path / "run", "10")
    (folder / "scores.jsonl").write_text(text)
    with pytest.raises(RowError, match=message):
        compare(folder)


def test_seeds_in_other_groups_and_a_broken_config_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "0", [score(k, True, groups={"level": "0"}) for k in range(4)])
    write(tmp_path / "1", [score(k, k > 0, groups={"level": str(k % 2)}) for k in range(4)])
    with pytest.raises(UserError, match="a: a seed's samples are in other groups .first: 'level 1'"):
        compare(f"a={tmp_path / '0'}", f"a={tmp_path / '1'}")
    write(tmp_path / "run" / "base", "10")
    (tmp_path / "run" / "config.yaml").write_text("[1]")
    with pytest.raises(UserError, match="config.yaml is no mapping of settings"):
        compare(tmp_path / "run")


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", "10")
    (folder / "scores.jsonl").write_bytes(json.dumps(score(0, True)).encode("utf-16"))
    with pytest.raises(RowError, match="scores.jsonl: not UTF-8"):
        compare(folder)


def test_five_thousand_samples_three_runs_and_forty_groups_are_compared_in_seconds(tmp_path: Path) -> None:
    draw = random.Random(0)
    for name in ("base", "nll", "dft"):
        write(tmp_path / name, [
            score(k, draw.random() < 0.5, cluster=f"p{k // 5}", groups={"subject": f"s{k % 20}", "skills": [f"k{k % 10}", f"l{k % 9}"]})
            for k in range(5000)
        ])  # fmt: skip
    started = time.process_time()
    report = compare(*(tmp_path / name for name in ("base", "nll", "dft")))
    assert time.process_time() - started < 5
    rows = report["benchmarks"]["quiz"]["test"]["comparisons"]
    assert len(rows) == 3 * 2 * (1 + 20 + 10 + 9)
    assert all(math.isfinite(r["low"]) and r["low"] <= r["difference"] <= r["high"] for r in rows)
