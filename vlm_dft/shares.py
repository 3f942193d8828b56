"""Shares: verdicts and the problems they belong to in; their mean with a clustered standard error and a 95 % interval out."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def share(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """The mean of values between 0 and 1: {"accuracy", "stderr", "low", "high", "count", "clusters"}.

    clusters: what each value belongs to (a problem with versions, a sample with draws); None: each its own.
    stderr: sqrt(sum over clusters of (the cluster's summed residuals)^2) / n, with no small-sample factor (Miller 2024,
    arXiv 2411.00640, eq. 4): for one verdict a cluster it is sqrt(p(1-p)/n). It is 0 where all clusters agree, which
    says nothing; the interval still does. Of a single cluster, where eq. 4 is 0 whatever it holds, it is that of one verdict.
    Raises ValueError for no values: the mean of nothing is not zero.
    """
    n = len(values)
    if n == 0:
        raise ValueError("Expected at least one verdict, found none: there is no accuracy of nothing.")
    mean = math.fsum(values) / n
    sums: dict[Hashable, float] = {}
    for cluster, value in zip(range(n) if clusters is None else clusters, values, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    variance = math.fsum(total * total for total in sums.values()) / n**2 if len(sums) > 1 else mean * (1 - mean)
    low, high = interval(mean, variance, n, len(sums))
    return {
        "accuracy": mean, "stderr": math.sqrt(variance) if 0 < mean < 1 else 0.0,
        "low": low, "high": high, "count": n, "clusters": len(sums),
    }  # fmt: skip


def interval(mean: float, variance: float, n: int, clusters: int) -> tuple[float, float]:
    """A 95 % interval of a share: Wilson's, of as many verdicts as the clusters are worth.

    n / design effect of them, less for few clusters, whose variance is poorly known, by the squared ratio of t quantiles
    of n - 1 and clusters - 1 degrees of freedom, and never more than n (Korn and Graubard 1998). For one verdict a
    cluster that is n. Clusters that all agree are worth one verdict each.
    """
    if clusters == n:
        return wilson(mean, n)
    if clusters == 1:
        return wilson(mean, 1)
    from scipy.special import stdtrit  # not scipy.stats, which takes a second to import

    alone, unsure = mean * (1 - mean), variance * clusters / (clusters - 1)
    worth = alone / unsure if unsure > 1e-15 else clusters
    few = (stdtrit(n - 1, 0.975) / stdtrit(clusters - 1, 0.975)) ** 2
    return wilson(mean, min(float(n), float(worth * few)))


def wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share p of n."""
    shrink = 1 + Z95**2 / n
    centre = (p + Z95**2 / (2 * n)) / shrink
    half = Z95 * math.sqrt(max(0.0, p * (1 - p)) / n + Z95**2 / (4 * n**2)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def ratio(over: Mapping[str, float], under: Mapping[str, float]) -> dict[str, float] | None:
    """Sum of `over` by the sum of `under`, both by cluster, with the delta method's standard error; None where it is 0/0."""
    bottom = math.fsum(under.values())
    if bottom == 0:
        return None
    value = math.fsum(over.values()) / bottom
    residuals = [over[cluster] - value * under[cluster] for cluster in under]
    return {"value": value, "stderr": math.sqrt(math.fsum(r * r for r in residuals)) / bottom}
