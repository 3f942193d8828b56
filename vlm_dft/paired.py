"""Paired differences: two runs' verdicts on the same samples in; difference, interval, test and samples needed out. Deterministic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtr, stdtrit

from vlm_dft.metrics import mcnemar

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
RESAMPLED = 4000  # benchmarks of a bootstrap
LEVEL, POWER = 0.05, 0.8
DISCORDANT = 6  # pairs that one run alone has right, all of one run: the fewest that a two-sided test at 5 % notices
FREQUENCIES = 4_000_000  # values of the exact permutation test's characteristic function; more: signs are drawn


def paired_difference(first: Floats, second: Floats, clusters: Ints, *, draws: int = 1) -> dict[str, Any]:
    """`second` minus `first`: [seeds, samples] shares of right draws; clusters: [samples] what each sample belongs to.

    draws: a number of which every share is a multiple of one part. Of one seed each, the test asks whether the clusters'
    differences lean to one side: McNemar's exact test where they are -1, 0 or 1 for a sample each, otherwise the
    permutation test that flips the clusters' signs, exact but for very many draws. The interval is a bootstrap's, of
    clusters. Of several seeds test and interval are Student's, of clusters and seeds together (see `with_seeds`).
    stderr has no small-sample factor; only_first, only_second: samples that one run does better on.
    """
    n = first.shape[1]
    each = second.mean(axis=0) - first.mean(axis=0)
    difference = float(each.mean())
    codes = np.unique(clusters, return_inverse=True)[1]
    sums, sizes = _by_cluster(codes, each)
    variance = float(((sums - sizes * difference) ** 2).sum()) / n**2
    of_seeds = [_seed_variance(run, codes, sizes) for run in (first, second) if len(run) > 1]
    seeds = sum(part for part, _ in of_seeds)
    total = variance + seeds
    if of_seeds:
        freedom = _freedom(total, variance, len(sums), of_seeds)
        least = 2.0 ** (1 - np.count_nonzero(sums))  # of any test that does not know the clusters' spread
        p_value, test = max(_student(difference, total, freedom), min(1.0, least)), "t, samples and seeds"
        half = math.sqrt(total) * float(stdtrit(freedom, 0.975))
        low, high = difference - half, difference + half
    else:
        p_value, test = _permuted(sums, draws, len(sums) == n and draws == 1)
    if not total or not of_seeds:
        low, high = _bootstrapped(sums, sizes)
    return {
        "count": n, "clusters": len(sums),
        "first": float(first.mean()), "second": float(second.mean()),
        "difference": difference, "stderr": math.sqrt(total),
        "low": max(-1.0, low), "high": min(1.0, high), "interval": "t" if of_seeds and total else "bootstrap",
        "only_first": int((each < -1e-9).sum()), "only_second": int((each > 1e-9).sum()),
        "p_value": p_value, "test": test, "p_adjusted": None,
        "samples_needed": _needed(difference, float((sums**2).sum()) / n, variance * n, seeds, n / len(sums)),
        "detectable": _detectable(float((sums**2).sum()) / n**2 + seeds, len(sums)),
        "seeds": [len(first), len(second)],
    }  # fmt: skip


def with_seeds(run: Floats, clusters: Ints) -> dict[str, float]:
    """{"accuracy", "stderr", "low", "high"} of a run of several seeds: [seeds, samples] shares of right draws.

    variance = that of the clusters' means over seeds + that of the seeds beyond what the same samples explain: MS(seeds)
    - MS(seeds x clusters) of the two-way layout, at least 0. The interval is Student's with Satterthwaite's degrees of freedom.
    """
    n, mean = run.shape[1], float(run.mean())
    codes = np.unique(clusters, return_inverse=True)[1]
    sums, sizes = _by_cluster(codes, run.mean(axis=0))
    variance = float(((sums - sizes * mean) ** 2).sum()) / n**2
    found = [_seed_variance(run, codes, sizes)]
    total = variance + found[0][0]
    half = math.sqrt(total) * float(stdtrit(_freedom(total, variance, len(sums), found), 0.975)) if total else 1.0
    return {"accuracy": mean, "stderr": math.sqrt(total), "low": max(0.0, mean - half), "high": min(1.0, mean + half)}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the chance of any false alarm among all of them is kept at the level."""
    adjusted, reached = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        reached = max(reached, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = reached
    return adjusted


def sign_flip(units: Sequence[int]) -> float:
    """The exact two-sided p value of whole numbers under random signs: the chance that |sum of ± units| reaches |sum of units|.

    The sum's distribution is the inverse Fourier transform of the product of cosines, so that no sign is drawn and no
    subset enumerated. For units of ±1 that is McNemar's exact test.
    """
    sizes, counts = np.unique(np.abs(np.asarray(units, dtype=np.int64)), return_counts=True)
    reach, total = int((sizes * counts).sum()), abs(int(np.sum(units)))
    if reach == 0 or total == 0:
        return 1.0
    length = 2 * reach + 2
    angles = 2 * np.pi * np.arange(reach + 2) / length
    transform = np.ones(reach + 2)
    for size, count in zip(sizes, counts, strict=True):
        transform *= np.cos(size * angles) ** int(count)
    chances = np.fft.irfft(transform, length)  # of the sums 0, 1 .. reach; beyond, those below 0
    p = 2 * float(chances[total : reach + 1].sum())
    return min(1.0, max(p, 2.0 ** (1 - int(counts[sizes > 0].sum()))))  # not below its least, where rounding would be


def _by_cluster(codes: Ints, values: Floats) -> tuple[Floats, Floats]:
    """(sums of the values, number of them) of each cluster."""
    return np.bincount(codes, values).astype(np.float64), np.bincount(codes).astype(np.float64)


def _permuted(sums: Floats, draws: int, plain: bool) -> tuple[float, str]:
    """(p value, test) of clusters' summed differences, multiples of 1 / draws."""
    if plain:
        return mcnemar(int((sums < -0.5).sum()), int((sums > 0.5).sum())), "mcnemar"
    units = np.rint(sums * draws).astype(np.int64)
    if (np.abs(units).sum() + 2) * len(np.unique(np.abs(units))) <= FREQUENCIES:
        return sign_flip(units.tolist()), "sign-flip"
    random, other = np.random.default_rng(0), np.abs(units[units != 0])
    half, reached = int(other.sum()), abs(int(units.sum()))
    flipped = (random.integers(0, 2, (1000, len(other)), dtype=np.int8) @ other for _ in range(10))
    hits = sum(int((np.abs(2 * sums - half) >= reached).sum()) for sums in flipped)
    return (hits + 1) / 10_001, "sign-flip, 10,000 drawn"


def _bootstrapped(sums: Floats, sizes: Floats) -> tuple[float, float]:
    """A 95 % percentile interval of resampled clusters, among them one won and one lost that nobody saw.

    Without those two (Bonett and Price 2012 add them to a table of pairs) runs that differ in no sample would differ by
    exactly nothing, and a few discordant samples would give too narrow an interval. Clusters alike are drawn together:
    how many of each kind is a multinomial draw.
    """
    size = sizes.mean()
    kinds, counts = np.unique(
        np.stack([np.append(np.round(sums, 9), [size, -size]), np.append(sizes, [size, size])], axis=1),
        axis=0, return_counts=True,
    )  # fmt: skip
    total = int(counts.sum())
    drawn = np.random.default_rng(0).multinomial(total, counts / total, size=RESAMPLED)
    means = (drawn @ kinds[:, 0]) / (drawn @ kinds[:, 1])
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def _seed_variance(run: Floats, codes: Ints, sizes: Floats) -> tuple[float, int]:
    """(variance of the mean of [seeds, samples] that seeds add, seeds - 1)."""
    seeds, n = run.shape
    means = run.mean(axis=1)
    between = float(((means - means.mean()) ** 2).sum()) / (seeds * (seeds - 1))
    cells = np.stack([np.bincount(codes, row) - sizes * mean for row, mean in zip(run, means, strict=True)])
    apart = float(((cells - cells.mean(axis=0)) ** 2).sum()) / (seeds * (seeds - 1) * n**2)
    return max(0.0, between - apart * len(sizes) / max(1, len(sizes) - 1)), seeds - 1


def _freedom(total: float, variance: float, clusters: int, seeds: Sequence[tuple[float, int]]) -> float:
    """Satterthwaite's degrees of freedom of a sum of variances."""
    parts = variance**2 / max(1, clusters - 1) + sum(part**2 / freedom for part, freedom in seeds)
    return total**2 / parts if parts else max(1, clusters - 1)


def _student(difference: float, variance: float, freedom: float) -> float:
    if variance == 0:
        return 1.0 if difference == 0 else 0.0
    return min(1.0, 2 * float(stdtr(freedom, -abs(difference) / math.sqrt(variance))))


def _needed(difference: float, null: float, other: float, seeds: float, size: float) -> int | None:
    """Samples at which a two-sided test at 5 % notices this difference four times in five; None where no number does.

    null, other: variance of a sample's difference around no difference, and around this one (of McNemar's test: Connor
    1987). The seeds' variance does not shrink with samples. size: samples of a cluster, of which the test needs DISCORDANT.
    """
    sure, power = float(ndtri(1 - LEVEL / 2)), float(ndtri(POWER))
    left = difference**2 - (sure + power) ** 2 * seeds
    if left <= 1e-12:
        return None
    return math.ceil(max((sure * math.sqrt(null) + power * math.sqrt(other)) ** 2 / left, DISCORDANT * size))


def _detectable(null: float, clusters: int) -> float:
    """The smallest difference that so many samples and seeds tell from none four times in five."""
    by_error = (float(ndtri(1 - LEVEL / 2)) + float(ndtri(POWER))) * math.sqrt(null)
    return min(1.0, max(by_error, DISCORDANT / clusters))
