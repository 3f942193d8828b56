"""Paired differences: against enumeration, scipy's tests, resampling by hand, and the errors of many simulated comparisons."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from vlm_dft.metrics import mcnemar
from vlm_dft.paired import holm, paired_difference, sign_flip, with_seeds

Runs = Callable[[], tuple[NDArray[np.float64], NDArray[np.float64]]]


def verdicts(text: str) -> NDArray[np.float64]:
    return np.array([[float(v) for v in text]])


def alone(n: int) -> NDArray[np.intp]:
    return np.arange(n)


def pairs(lost: int, won: int, n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rest = "1" * (n - lost - won)
    return verdicts("1" * lost + "0" * won + rest), verdicts("0" * lost + "1" * won + rest)


def test_a_comparison_is_counted_by_hand() -> None:
    found = paired_difference(verdicts("1100000000"), verdicts("1011111000"), alone(10))
    assert (found["first"], found["second"], found["difference"]) == (0.2, 0.6, pytest.approx(0.4))
    assert (found["only_first"], found["only_second"], found["count"], found["clusters"]) == (1, 5, 10, 10)
    assert found["stderr"] == pytest.approx(0.2097617696)  # sqrt(6/10 - 0.4^2) / sqrt(10)
    assert (found["p_value"], found["test"]) == (pytest.approx(0.21875), "mcnemar")


@pytest.mark.parametrize(("lost", "won"), [(0, 5), (3, 3), (2, 10), (40, 71)])
def test_one_row_a_cluster_is_tested_as_the_binomial_test_of_discordant_pairs(lost: int, won: int) -> None:
    found = paired_difference(*pairs(lost, won, 150), alone(150))
    assert found["p_value"] == pytest.approx(binomtest(won, lost + won).pvalue)


def test_clusters_are_tested_by_all_their_signs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        units = rng.integers(-4, 5, size=rng.integers(1, 11)).tolist()
        flipped = [abs(np.dot(signs, units)) for signs in itertools.product((1, -1), repeat=len(units))]
        assert sign_flip(units) == pytest.approx(np.mean([f >= abs(sum(units)) for f in flipped]), abs=1e-12)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 40), (12, 30), (700, 800)])
def test_flipping_signs_of_single_pairs_is_mcnemars_test(lost: int, won: int) -> None:
    assert sign_flip([-1] * lost + [1] * won) == pytest.approx(mcnemar(lost, won), rel=1e-6, abs=1e-12)


def test_five_copies_of_a_sample_are_not_five_samples() -> None:
    a, b = pairs(3, 9, 40)
    once = paired_difference(a, b, alone(40))
    copied = paired_difference(a.repeat(5, axis=1), b.repeat(5, axis=1), alone(40).repeat(5))
    for key in ("difference", "stderr", "p_value", "low", "high"):
        assert copied[key] == pytest.approx(once[key]), key
    assert (copied["count"], copied["clusters"], copied["test"]) == (200, 40, "sign-flip")
    assert copied["samples_needed"] == pytest.approx(5 * once["samples_needed"], rel=0.01)


def test_draws_are_shares_of_right_responses_and_tested_exactly() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 5, (1, 9)) / 4 for _ in range(2))
    found = paired_difference(a, b, alone(9), draws=4)
    difference = (b - a)[0]
    flipped = [abs(np.dot(signs, difference)) for signs in itertools.product((1, -1), repeat=9)]
    assert found["p_value"] == pytest.approx(np.mean([f >= abs(difference.sum()) - 1e-9 for f in flipped]))
    assert found["test"] == "sign-flip"


def test_very_many_draws_are_tested_by_drawn_signs_that_agree() -> None:
    rng = np.random.default_rng(2)
    a = np.round(rng.random((1, 400)) * 499) / 499
    b = np.clip(np.round((a + rng.normal(0.02, 0.2, (1, 400))) * 499) / 499, 0, 1)
    found = paired_difference(a, b, alone(400), draws=499)
    assert found["test"] == "sign-flip, 10,000 drawn"
    units = np.rint((b - a)[0] * 499).astype(int).tolist()
    assert found["p_value"] == pytest.approx(sign_flip(units), abs=0.01)
    assert found == paired_difference(a, b, alone(400), draws=499)


def test_the_interval_is_that_of_resampled_clusters() -> None:
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(150), rng.integers(1, 5, 150))
    a, b = (rng.random(len(clusters)) < p + 0.3 * (clusters % 2) for p in (0.4, 0.5))
    found = paired_difference(a[None].astype(float), b[None].astype(float), clusters)
    sums, sizes = np.bincount(clusters, b.astype(float) - a), np.bincount(clusters)
    drawn = rng.integers(0, 150, (4000, 150))
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), [0.025, 0.975])
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.01)


def test_runs_that_differ_in_no_sample_may_still_differ_elsewhere() -> None:
    found = paired_difference(verdicts("10" * 25), verdicts("10" * 25), alone(50))
    assert (found["difference"], found["p_value"], found["stderr"]) == (0, 1, 0)
    assert found["low"] < -0.01 and found["high"] > 0.01
    assert found["samples_needed"] is None and found["detectable"] == 6 / 50


def rejected(runs: Runs, clusters: NDArray[np.intp], times: int = 200) -> tuple[float, float]:
    """The shares of comparisons of equal runs that are called different, and whose interval holds 0."""
    found = [paired_difference(*runs(), clusters) for _ in range(times)]
    return float(np.mean([f["p_value"] < 0.05 for f in found])), float(
        np.mean([f["low"] <= 0 <= f["high"] for f in found])
    )


@pytest.mark.parametrize(("problems", "versions"), [(60, 1), (60, 5)])
def test_equal_runs_are_seldom_called_different(problems: int, versions: int) -> None:
    rng = np.random.default_rng(4)

    def runs() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        easy = rng.random(problems)
        chances = [np.clip(easy + rng.normal(0, 0.3, problems), 0, 1).repeat(versions) for _ in range(2)]
        first, second = ((rng.random(problems * versions) < p).astype(float)[None] for p in chances)
        return first, second

    wrong, held = rejected(runs, np.arange(problems).repeat(versions))
    assert wrong <= 0.085 and held >= 0.915  # 5 % and 95 %, with two standard errors of 200


def test_seeds_that_differ_more_than_samples_explain_are_not_taken_for_an_effect() -> None:
    rng = np.random.default_rng(5)
    by_samples_alone = []

    def runs() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        item = rng.normal(0, 1, 300)
        first, second = (
            (item + rng.normal(0, 0.7, (3, 300)) + rng.normal(0, 0.2, (3, 1)) > 0).astype(float) for _ in range(2)
        )
        by_samples_alone.append(sign_flip(np.rint((second - first).sum(axis=0)).astype(int).tolist()) < 0.05)
        return first, second

    wrong, held = rejected(runs, alone(300))
    assert wrong <= 0.085 and held >= 0.915
    assert np.mean(by_samples_alone) > 0.3  # what a test of samples alone would say


def test_the_error_of_several_seeds_is_that_of_seeds_and_samples_drawn_again() -> None:
    rng = np.random.default_rng(6)

    def draw() -> NDArray[np.float64]:
        item = rng.normal(0, 1, 200)
        return (item + rng.normal(0, 0.7, (4, 200)) + rng.normal(0, 0.15, (4, 1)) > 0).astype(float)

    found = [with_seeds(draw(), alone(200)) for _ in range(400)]
    spread = np.std([f["accuracy"] for f in found])
    assert np.sqrt(np.mean([f["stderr"] ** 2 for f in found])) == pytest.approx(spread, rel=0.1)
    assert np.mean([f["low"] <= 0.5 <= f["high"] for f in found]) > 0.92


def test_so_many_samples_as_are_said_settle_a_difference_four_times_in_five() -> None:
    needed = paired_difference(*pairs(8, 20, 100), alone(100))["samples_needed"]
    assert needed == 151  # ((1.95996 sqrt .28 + .84162 sqrt(.28 - .0144)) / .12)^2
    rng, settled = np.random.default_rng(7), 0
    for lost, won, _ in rng.multinomial(needed, [0.08, 0.2, 0.72], size=2000):
        settled += mcnemar(int(lost), int(won)) < 0.05
    assert 0.72 <= settled / 2000 <= 0.84  # the exact test is a little stricter than the formula


def test_the_smallest_difference_to_be_found_is_found_four_times_in_five() -> None:
    found = paired_difference(*pairs(50, 50, 500), alone(500))
    assert found["detectable"] == pytest.approx(2.8015852 * math.sqrt(0.2 / 500), rel=1e-6)
    rng, d = np.random.default_rng(8), found["detectable"]
    many = rng.multinomial(500, [0.1 - d / 2, 0.1 + d / 2, 0.8], size=2000)
    assert np.mean([mcnemar(int(lost), int(won)) < 0.05 for lost, won, _ in many]) == pytest.approx(0.8, abs=0.05)


def test_more_samples_do_not_help_where_seeds_differ_too_much() -> None:
    rng = np.random.default_rng(9)
    first = (rng.random((2, 500)) < np.array([[0.4], [0.6]])).astype(float)
    second = (rng.random((2, 500)) < np.array([[0.45], [0.65]])).astype(float)
    found = paired_difference(first, second, alone(500))
    assert found["p_value"] > 0.05 and found["samples_needed"] is None and found["seeds"] == [2, 2]
    assert found["interval"] == "t" and found["low"] < 0 < found["high"]


def test_holm_is_as_in_the_textbook() -> None:
    """Holm 1979's procedure on p = .01, .04, .03, .005: multiplied by 3, 1, 2, 4 and made monotone."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("n", [1, 2])
def test_very_few_samples_say_nothing(n: int) -> None:
    found = paired_difference(verdicts("0" * n), verdicts("1" * n), alone(n))
    assert found["p_value"] == [1.0, 0.5][n - 1] and found["low"] < 0 and found["detectable"] == 1
    assert found["samples_needed"] == 6  # 2 / 2^5 > 0.05 > 2 / 2^6
    several = paired_difference(
        verdicts("0" * n).repeat(2, 0), verdicts("1" * n).repeat(2, 0), np.zeros(n, dtype=np.intp)
    )
    assert several["p_value"] == 1  # one cluster
