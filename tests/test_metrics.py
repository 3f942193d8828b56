"""Metrics: against literals worked out by hand, and textbook values."""

from __future__ import annotations

import random
from typing import Any

import pytest

from vlm_dft.metrics import accuracy, compare, mcnemar, measured, summarise


def rows(verdicts: str, split: str = "test", task: str = "count") -> list[dict[str, Any]]:
    return [
        {"id": f"{split}-{task}-{k}", "split": split, "groups": {"task": task}, "correct": v == "1", "extracted": "x"}
        for k, v in enumerate(verdicts)
    ]


def test_accuracy_comes_with_its_standard_error_interval_and_count() -> None:
    found = accuracy([True] * 8 + [False] * 2)
    assert found["accuracy"] == 0.8
    assert found["stderr"] == pytest.approx(0.12649110640673517)  # sqrt(0.8 * 0.2 / 10)
    assert (found["low"], found["high"]) == pytest.approx((0.49016, 0.94332), abs=1e-5)  # Wilson, as in R's prop.test
    assert found["count"] == 10


def test_a_perfect_score_has_no_standard_error_but_an_interval() -> None:
    found = accuracy([True] * 10)
    assert found["stderr"] == 0
    assert (found["low"], found["high"]) == pytest.approx((0.72247, 1.0), abs=1e-5)  # 10 / (10 + 1.96^2)


def test_nothing_has_no_accuracy() -> None:
    with pytest.raises(ValueError, match="no accuracy of nothing"):
        accuracy([])


def test_scores_are_summed_up_per_split_and_per_group() -> None:
    found = summarise([*rows("1100"), *rows("1110", task="bars"), *rows("01", split="ood")])
    assert list(found) == ["test", "ood"]
    assert (found["test"]["accuracy"], found["test"]["count"]) == (0.625, 8)
    tasks = found["test"]["groups"]["task"]
    assert {task: (row["accuracy"], row["count"]) for task, row in tasks.items()} == {
        "bars": (0.75, 4),
        "count": (0.5, 4),
    }
    assert found["ood"]["groups"]["task"]["count"]["accuracy"] == 0.5


def test_abstentions_and_cut_responses_are_counted_apart() -> None:
    scored = [{**rows("1")[0]}, {**rows("00")[1], "extracted": None, "finish": "length"}]
    found = summarise(scored)["test"]
    assert (found["count"], found["abstained"], found["cut"]) == (2, 1, 1)


def test_a_comparison_is_paired() -> None:
    found = compare(rows("1100000000"), rows("1011111000"))
    assert found["difference"] == pytest.approx(0.4)
    assert (found["only_first"], found["only_second"], found["count"]) == (1, 5, 10)
    assert found["stderr"] == pytest.approx(0.2097617696)  # sqrt(6/10 - 0.4^2) / sqrt(10)
    assert found["p_value"] == pytest.approx(0.21875)  # 2 * (1 + 6) / 2^6


def test_a_comparison_of_clusters_and_of_draws_is_not_of_their_rows() -> None:
    rows = clustered("000", "000", "000", "000", "11")
    better = [{**row, "correct": row["cluster"] != "c3"} for row in rows]
    found = compare(rows, better)
    assert (found["difference"], found["only_second"], found["p_value"]) == (
        pytest.approx(9 / 14),
        9,
        pytest.approx(0.25),
    )  # 2 / 2^3
    drawn = [{**row, "draw": d} for row in rows[::3] for d in range(2)]
    one = [{**row, "correct": row["correct"] or row["draw"] == 1} for row in drawn]
    assert compare(drawn, one)["difference"] == pytest.approx(sum(not r["correct"] for r in drawn) / 2 / len(drawn))


def test_equal_runs_differ_by_nothing() -> None:
    found = compare(rows("1010"), rows("1010"))
    assert (found["difference"], found["stderr"], found["p_value"]) == (0, 0, 1)


def test_runs_on_other_samples_are_not_compared() -> None:
    with pytest.raises(
        ValueError, match=r"needs the same ids in both runs. 1 are in one only, e.g. \['test-count-3'\]"
    ):
        compare(rows("1010"), rows("101"))


@pytest.mark.parametrize(
    ("lost", "won", "p"), [(0, 0, 1), (0, 5, 0.0625), (5, 0, 0.0625), (3, 3, 1), (2, 10, 0.03857421875)]
)
def test_mcnemar_is_the_exact_binomial_test(lost: int, won: int, p: float) -> None:
    assert mcnemar(lost, won) == pytest.approx(p)


def test_mcnemar_of_many_pairs_is_quick_and_finite() -> None:
    assert 0 < mcnemar(4900, 5100) < 0.05 < mcnemar(4950, 5050)


def clustered(*verdicts: str) -> list[dict[str, Any]]:
    """A cluster a word."""
    return [
        {**row, "id": f"{c}-{row['id']}", "cluster": f"c{c}"} for c, word in enumerate(verdicts) for row in rows(word)
    ]


def test_the_standard_error_of_clusters_is_that_of_their_summed_residuals() -> None:
    found = summarise(clustered("11", "11", "10", "00"))["test"]
    assert (found["accuracy"], found["count"], found["clusters"]) == (0.625, 8, 4)
    # residual sums .75, .75, -.25, -1.25: sqrt(.5625 + .5625 + .0625 + 1.5625) / 8
    assert found["stderr"] == pytest.approx(0.2072890, abs=1e-6)


def test_the_standard_error_of_clusters_is_that_of_resampled_clusters() -> None:
    draw = random.Random(0)
    words = ["".join("01"[draw.random() < p] for _ in range(draw.choice([1, 3, 5]))) for p in [0.2, 0.5, 0.9] * 40]
    found = summarise(clustered(*words))["test"]
    means = [
        sum(w.count("1") for w in some) / sum(map(len, some))
        for some in (draw.choices(words, k=len(words)) for _ in range(3000))
    ]
    spread = (sum((m - sum(means) / 3000) ** 2 for m in means) / 3000) ** 0.5
    assert found["stderr"] == pytest.approx(spread, rel=0.05)


def test_draws_of_one_problem_alone_are_worth_one_verdict() -> None:
    found = measured(clustered("1100"))
    assert (found["accuracy"], found["stderr"]) == (0.5, 0.5)  # and not 50.0 ± 0.0
    assert (found["low"], found["high"]) == pytest.approx((0.0546, 0.9454), abs=1e-4)  # Wilson's of one half of one


def test_one_verdict_a_cluster_is_as_without_clusters() -> None:
    assert measured(clustered(*"1101001")) == measured(rows("1101001"))


def test_copies_of_a_verdict_add_nothing() -> None:
    once, copied = measured(rows("1101001")), measured(clustered(*[v * 5 for v in "1101001"]))
    assert copied["stderr"] == pytest.approx(once["stderr"])
    assert copied["count"] == 35 and copied["low"] < once["low"] and once["high"] < copied["high"]  # t, not z, quantile


def test_intervals_of_clusters_cover_the_truth() -> None:
    """Of 400 benchmarks of 30 problems x 5 versions that share most of their difficulty."""
    draw, held = random.Random(3), 0
    for _ in range(400):
        words = []
        for _ in range(30):
            p = draw.betavariate(1.4, 0.6)  # mean 0.7, the versions' correlation 1/3
            words.append("".join("01"[draw.random() < p] for _ in range(5)))
        found = measured(clustered(*words))
        held += found["low"] <= 0.7 <= found["high"]
    assert 0.92 <= held / 400 <= 0.99


def test_a_row_counts_for_each_of_its_labels() -> None:
    scored = [{**row, "groups": {"skills": ["algebra", "logic"][: k + 1]}} for k, row in enumerate(rows("01"))]
    found = summarise(scored)["test"]["groups"]["skills"]
    assert {value: (m["accuracy"], m["count"]) for value, m in found.items()} == {"algebra": (0.5, 2), "logic": (1, 1)}


def test_both_rules_are_measured() -> None:
    scored = [
        {**row, "robust": {"correct": k > 0, "extracted": "5" if k else None, "rule": "r"}}
        for k, row in enumerate(rows("1100"))
    ]
    found = measured(scored)["robust"]
    assert (found["accuracy"], found["count"], found["abstained"]) == (0.75, 4, 1)
    assert measured(rows("1100"))["robust"] is None  # as files of an older version are
