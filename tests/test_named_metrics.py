"""Named metrics: against the official numbers, slow independent reimplementations, and enumeration of draws."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from vlm_dft.metrics import summarise
from vlm_dft.named_metrics import METRICS, answer_key, four_dimensional, mean_of_versions, of_draws, pass_at, worst_case

STEPS = {2: ("2steps_1", "2steps_2"), 3: ("3steps_1", "3steps_2", "3steps_3")}
NAMES = {
    "IK": "InsufficientKnowledge",
    "IG": "InadequateGeneralization",
    "CM_strict": "CompleteMastery_strict",
    "CM_loose": "CompleteMastery_loose",
    "RM_strict": "RoteMemorization_strict",
    "RM_loose": "RoteMemorization_loose",
}


def row(k: Any, cluster: str, correct: bool, **groups: str) -> dict[str, Any]:
    return {"id": f"{cluster}/{k}", "cluster": cluster, "split": "testmini", "groups": groups, "correct": correct}


def problem(name: str, verdicts: str) -> list[dict[str, Any]]:
    """A We-Math problem: "10 1" is its first step right, the second wrong, the whole right."""
    steps, whole = verdicts.split()
    keys = [*STEPS[len(steps)], f"{len(steps)}steps_multi"]
    return [row(key, name, v == "1", key=key) for key, v in zip(keys, steps + whole, strict=True)]


def percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def matching(counts: dict[str, int], n: int = 525) -> list[dict[str, Any]]:
    """Two-step problems with the official counts."""
    some = counts["CompleteMastery_loose"] - counts["CompleteMastery_strict"]  # solved, one of the steps right
    kinds = {
        "11 1": counts["CompleteMastery_strict"], "10 1": some, "00 1": counts["RoteMemorization_loose"],
        "11 0": counts["InadequateGeneralization"], "01 0": counts["InsufficientKnowledge"],
    }  # fmt: skip
    assert sum(kinds.values()) == n
    found = [verdicts for verdicts, count in kinds.items() for _ in range(count)]
    return [r for k, verdicts in enumerate(found) for r in problem(f"p{k}", verdicts)]


@pytest.fixture
def gold(shared: Path) -> Path:
    return shared / "scoring_gold"


def test_counts_of_the_official_oracles_give_their_rates_and_scores(gold: Path) -> None:
    oracle = json.loads((gold / "wemath_oracle.json").read_text())
    assert len(oracle) == 7
    for name, official in oracle.items():
        found = four_dimensional(matching(official["counts"]))
        assert {NAMES[k]: v for k, v in found["counts"].items()} == official["counts"], name
        assert round(100 * found["score_strict"]["accuracy"], 2) == official["score"]["strict"]
        assert round(100 * found["score_loose"]["accuracy"], 2) == official["score"]["loose"]
        if isinstance(official["rates"], str):  # the official code divides by zero here
            assert found["rates"]["RM_strict"] is found["rates"]["RM_loose"] is None
        else:
            assert {f"{NAMES[k]}_rate": percent(v) for k, v in found["rates"].items()} == official["rates"], name


def test_four_dimensions_of_random_verdicts_are_those_of_a_slow_reading_of_the_definitions() -> None:
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    want = dict.fromkeys(NAMES, 0)
    score = {"strict": 0.0, "loose": 0.0}
    right: dict[str, list[bool]] = {"S1": [], "S2": [], "S3": []}
    for k in range(400):
        steps = [draw.random() < 0.6 for _ in range(draw.choice([2, 3]))]
        whole = draw.random() < 0.5
        rows += problem(f"p{k}", "".join("01"[s] for s in steps) + " " + "01"[whole])
        right["S1"] += steps
        right[f"S{len(steps)}"].append(whole)
        if False in steps and not whole:
            want["IK"] += 1
        if False not in steps and not whole:
            want["IG"] += 1
        if False not in steps and whole:
            want["CM_strict"] += 1
        if True in steps and whole:
            want["CM_loose"] += 1
        if False in steps and whole:
            want["RM_strict"] += 1
        if True not in steps and whole:
            want["RM_loose"] += 1
    draw.shuffle(rows)
    found = four_dimensional(rows)
    assert found["counts"] == want and found["problems"] == 400
    for kind in score:
        rm, official = want[f"RM_{kind}"], (400 - 0.5 * want["IG"] - want[f"RM_{kind}"] - want["IK"]) / 400
        assert found[f"score_{kind}"]["accuracy"] == pytest.approx(official)
        assert found["rates"][f"RM_{kind}"] == rm / (rm + want[f"CM_{kind}"])
    for name, verdicts in right.items():
        assert found[name]["accuracy"] == pytest.approx(sum(verdicts) / len(verdicts))
        assert found[name]["count"] == len(verdicts)


def test_real_problems_are_found_whole(shared: Path) -> None:
    records = json.loads((shared / "wemath" / "data" / "testmini.json").read_text())
    rows = [row(k, r["ID"], r["answer"] == "A", key=r["key"]) for k, r in enumerate(records)]
    found = four_dimensional(rows)
    assert (found["problems"], found["incomplete"]) == (40, 0)
    assert [found[name]["count"] for name in ("S1", "S2", "S3")] == [26 * 2 + 14 * 3, 26, 14]
    counts = found["counts"]  # of a responder that says A always
    assert counts["IK"] + counts["IG"] + counts["CM_strict"] + counts["RM_strict"] == 40
    assert counts["CM_loose"] + counts["RM_loose"] == sum(
        r["answer"] == "A" for r in records if r["key"].endswith("multi")
    )


def test_a_problem_that_lacks_a_row_is_counted_apart() -> None:
    found = four_dimensional([*problem("a", "11 1"), *problem("b", "110 1")[1:]])
    assert (found["problems"], found["incomplete"], found["S1"]["count"]) == (1, 1, 4)
    alone = four_dimensional(problem("b", "110 1")[1:])
    assert (alone["problems"], alone["incomplete"], "score_strict" in alone) == (0, 1, False)


def test_a_row_without_its_key_is_named() -> None:
    with pytest.raises(ValueError, match=r"needs group 'key' with one label in every row; sample 'a/1' has None"):
        four_dimensional([row(1, "a", True)])


def test_worst_case_gives_the_published_numbers_of_dynamath(gold: Path) -> None:
    """From the published average and worst case of 501 seeds x 10 variants, verdicts that have them, and back."""
    published = json.loads((gold / "official_scores.json").read_text())["dynamath"]
    models = {name: groups for name, groups in published.items() if not name.startswith("_")}
    assert len(models) == 14
    for groups in models.values():
        for official in groups.values():
            n = official["n_seed"]
            always = round(official["worst_case"] * n / 100)
            left = round(official["average"] * n / 10) - 10 * always
            verdicts = [[True] * 10 for _ in range(always)]
            for k in range(n - always):  # the rest is spread out, nine a seed at most
                share = left // (n - always) + (k < left % (n - always))
                verdicts.append([v < share for v in range(10)])
            found = worst_case([row(v, f"s{s}", ok) for s, oks in enumerate(verdicts) for v, ok in enumerate(oks)])
            assert 100 * found["average"]["accuracy"] == pytest.approx(official["average"], abs=0.005001)
            assert 100 * found["worst"]["accuracy"] == pytest.approx(official["worst_case"], abs=0.005001)
            assert (found["seeds"], found["average"]["clusters"]) == (n, n)


def test_robustness_is_worst_by_average_with_an_error_that_resampling_seeds_confirms() -> None:
    draw = random.Random(1)
    chances = [draw.choice([0.5, 0.9, 1.0]) for _ in range(80)]
    rows = [row(v, f"s{s}", draw.random() < c, variant=str(v)) for s, c in enumerate(chances) for v in range(5)]
    found = worst_case(rows)
    seeds = [[r["correct"] for r in rows[5 * s : 5 * s + 5]] for s in range(80)]

    def ratio(some: list[list[bool]]) -> float:
        return sum(map(all, some)) / (sum(map(sum, some)) / 5)

    assert found["robustness"]["value"] == pytest.approx(ratio(seeds))
    again = [ratio(draw.choices(seeds, k=80)) for _ in range(2000)]
    spread = (sum((r - sum(again) / 2000) ** 2 for r in again) / 2000) ** 0.5
    assert found["robustness"]["stderr"] == pytest.approx(spread, rel=0.08)
    assert list(found["variants"]) == ["0", "1", "2", "3", "4"] and found["variants"]["3"]["count"] == 80


def test_a_seed_that_lacks_a_variant_is_not_in_the_worst_case() -> None:
    found = worst_case([row(1, "a", True), row(2, "a", True), row(1, "b", True)])
    assert (found["worst"]["count"], found["incomplete"], found["average"]["count"]) == (1, 1, 3)
    assert worst_case([row(1, "a", False)])["robustness"] is None


def test_the_mean_of_equal_versions_is_the_overall_accuracy_with_its_clustered_error() -> None:
    draw = random.Random(2)
    rows = [
        row(v, f"p{p}", draw.random() < 0.3 + 0.1 * v + 0.3 * (p % 2), problem_version=f"version {v}")
        for p in range(60)
        for v in range(5)
    ]
    found, whole = mean_of_versions(rows), summarise(rows)["testmini"]
    assert found["mean"]["accuracy"] == pytest.approx(whole["accuracy"])
    assert found["mean"]["stderr"] == pytest.approx(whole["stderr"])
    assert found["versions"]["version 2"]["accuracy"] == sum(r["correct"] for r in rows[2::5]) / 60


@pytest.mark.parametrize(("n", "right", "k"), [(5, 2, 3), (6, 0, 2), (6, 6, 1), (7, 1, 7), (8, 3, 6)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_draws_that_hold_a_right_one(n: int, right: int, k: int) -> None:
    choices = list(itertools.combinations([1] * right + [0] * (n - right), k))
    assert pass_at(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def drawn(name: str, answers: list[str | None], gold: str) -> list[dict[str, Any]]:
    return [
        {"id": name, "draw": k, "split": "test", "groups": {}, "extracted": a, "correct": a == gold,
         "robust": {"correct": True, "extracted": a, "rule": "r"}} for k, a in enumerate(answers)
    ]  # fmt: skip


def test_several_draws_have_averages_passes_and_majorities() -> None:
    rows = [*drawn("a", ["1", "1", "2", "1"], "1"), *drawn("b", ["x", "y", "y", None], "x")]
    extra = summarise(rows)["test"]["extra"]
    assert list(extra) == ["avg@4", "pass@2", "pass@4", "maj@4"]
    assert {name: found["accuracy"] for name, found in extra.items()} == {
        "avg@4": 0.5,  # (3 + 1) of 8
        "pass@2": 0.75,  # 1 and 3 of 6
        "pass@4": 1.0,
        "maj@4": 0.5,
    }
    assert extra["maj@4"]["stderr"] == pytest.approx(0.35355339)  # sqrt(.25 / 2)
    assert extra["maj@4"]["robust"]["accuracy"] == 1.0


def test_of_equally_frequent_answers_the_first_given_is_the_majority() -> None:
    rows = drawn("a", ["2", "1", "1", "2"], "2") + drawn("b", ["2", "1", "1", "2"], "1")
    assert of_draws(rows)["maj@4"]["accuracy"] == 0.5
    assert of_draws(rows[::-1])["maj@4"]["accuracy"] == 0.5  # whatever the order of the rows


def test_draws_without_an_answer_have_no_vote() -> None:
    assert of_draws(drawn("a", [None, None, "1"], "1"))["maj@3"]["accuracy"] == 1
    assert of_draws(drawn("a", [None, None, None], "1"))["maj@3"]["accuracy"] == 0


@pytest.mark.parametrize(
    ("one", "other"), [("0.50", "1/2"), ("1,000", "1000.0"), (" $5$.", "5"), ("Yes", "yes."), ("(A)", "(a)")]
)
def test_equal_answers_vote_together(one: str, other: str) -> None:
    assert answer_key(one) == answer_key(other)


@pytest.mark.parametrize("answer", ["1e999999", "9**9**9**9", "9" * 1_000_000, "1/0", "", "1/000", "\ud800"])
def test_odd_answers_are_texts(answer: str) -> None:
    assert isinstance(answer_key(answer), str)


def test_metrics_are_chosen_by_name_and_run_for_both_rules() -> None:
    rows = [{**r, "robust": {"correct": True, "extracted": "x"}} for r in problem("a", "10 1")]
    found = summarise(rows, ["four_dimensional"])["testmini"]["extra"]["four_dimensional"]
    assert found["counts"]["RM_strict"] == 1 and found["robust"]["counts"]["CM_strict"] == 1
    with pytest.raises(ValueError, match="Unknown metric 'four_dimension'. Did you mean 'four_dimensional'"):
        summarise(rows, ["four_dimension"])
    assert set(METRICS) == {"four_dimensional", "worst_case", "mean_of_versions"}
