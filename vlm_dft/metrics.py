"""Metrics: score rows in; accuracy by both rules with standard error, interval and count, and paired tests out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vlm_dft.cards import nearest
from vlm_dft.errors import UserError
from vlm_dft.named_metrics import METRICS, of_draws
from vlm_dft.shares import Z95, share

__all__ = ["METRICS", "Z95", "accuracy", "by_group", "compare", "labels", "mcnemar", "measured", "summarise"]

Row = Mapping[str, Any]  # of scores.jsonl: id, draw, split, cluster, groups, correct, extracted, robust ...


def accuracy(verdicts: Sequence[bool]) -> dict[str, Any]:
    """Accuracy, its standard error sqrt(p(1-p)/n), a Wilson 95 % interval [low, high] and the count, of unrelated verdicts.

    Raises ValueError for no verdicts: the accuracy of nothing is not zero.
    """
    return share([float(bool(verdict)) for verdict in verdicts])


def measured(rows: Sequence[Row]) -> dict[str, Any]:
    """{"accuracy", "stderr", "low", "high", "count", "clusters", "abstained", "cut", "mean_tokens", "robust": the first five and
    "abstained"} of rows of one split.

    count: responses, so with several draws accuracy is avg@k. clusters: problems; the standard error is of them.
    abstained: responses that answer nothing. cut: responses that reached the token limit. Both count as scored.
    mean_tokens: length of the responses, end token included; None where the rows do not tell it.
    robust: None where the rows have no robust verdict.
    """
    clusters = [cluster_of(row) for row in rows]
    lengths = [row["tokens"] for row in rows if row.get("tokens") is not None]
    robust = [row["robust"] for row in rows if row.get("robust")]
    found = {
        **share([float(bool(row["correct"])) for row in rows], clusters),
        "abstained": sum(row.get("extracted") is None for row in rows),
        "cut": sum(row.get("finish") == "length" for row in rows),
        "mean_tokens": sum(lengths) / len(lengths) if len(lengths) == len(rows) else None,
        "robust": None,
    }
    if len(robust) == len(rows):
        other = share([float(bool(verdict["correct"])) for verdict in robust], clusters)
        other.pop("clusters")
        found["robust"] = {**other, "abstained": sum(verdict.get("extracted") is None for verdict in robust)}
    return found


def summarise(scores: Iterable[Row], metrics: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """{split: {**measured, "groups": {group: {value: measured}}, "extra": {metric: {...}}}}.

    A row with several labels of a group counts for each of them. metrics: names of METRICS. Where rows have several
    draws, extra has avg@k, pass@k and maj@k too. Every dict in extra with an "accuracy" is a share with its error.
    """
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"Unknown metric {name!r}.{nearest(name, METRICS)} Known: {', '.join(METRICS)}.")
    result = {}
    for split, rows in _by(list(scores), lambda row: str(row["split"])).items():
        result[split] = {
            **measured(rows),
            "groups": {
                name: {value: measured(found) for value, found in values.items()}
                for name, values in by_group(rows).items()
            },
            "extra": {**of_draws(rows), **{name: METRICS[name](rows) for name in metrics}},
        }
    return result


def by_group(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """{group: {value: its rows}}; the groups as they first appear, the values sorted."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        for name in row.get("groups") or {}:
            values = found.setdefault(name, {})
            for value in labels(row, name):
                values.setdefault(value, []).append(row)
    return {name: dict(sorted(values.items())) for name, values in found.items()}


def labels(row: Row, group: str) -> tuple[str, ...]:
    """The labels that a row has of a group: one, several, or none."""
    value = (row.get("groups") or {}).get(group)
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(dict.fromkeys(map(str, value)))


def cluster_of(row: Row) -> str:
    """What a row's verdict depends on: its problem, or its own sample."""
    return str(row.get("cluster") or row["id"])


def compare(first: Iterable[Row], second: Iterable[Row]) -> dict[str, Any]:
    """Paired comparison of two runs on the same ids by the official rule: `second` minus `first`.

    difference and its paired standard error; only_first, only_second: samples that one run alone has right;
    p_value: exact two-sided McNemar test on those; of clusters and draws, paired.paired_difference's test and error.
    Raises ValueError when the ids differ.
    """
    a, b = (_by(list(rows), lambda row: str(row["id"])) for rows in (first, second))
    if set(a) != set(b) or not a:
        odd = sorted(set(a) ^ set(b))
        raise ValueError(
            f"A paired comparison needs the same ids in both runs. {len(odd)} are in one only, e.g. {odd[:1]}."
        )
    clusters = [cluster_of(rows[0]) for rows in a.values()]
    if len(set(clusters)) < len(a) or any(len(rows) > 1 for rows in (*a.values(), *b.values())):
        return _compare_clusters([a, {name: b[name] for name in a}], clusters)
    right = [{name: bool(rows[0]["correct"]) for name, rows in run.items()} for run in (a, b)]
    n, lost, won = (len(a), *(sum(x[name] and not y[name] for name in a) for x, y in (right, right[::-1])))
    return {
        "difference": (won - lost) / n,
        "stderr": math.sqrt(max(0.0, (won + lost) - (won - lost) ** 2 / n)) / n,
        "count": n,
        "only_first": lost,
        "only_second": won,
        "p_value": mcnemar(lost, won),
    }


def _compare_clusters(runs: Sequence[Mapping[str, Sequence[Row]]], clusters: Sequence[str]) -> dict[str, Any]:
    import numpy as np

    from vlm_dft.paired import paired_difference

    shares = [
        np.array([[sum(bool(row["correct"]) for row in rows) / len(rows) for rows in run.values()]]) for run in runs
    ]
    draws = math.lcm(*{len(rows) for run in runs for rows in run.values()})
    found = paired_difference(shares[0], shares[1], np.unique(clusters, return_inverse=True)[1], draws=draws)
    return {key: found[key] for key in ("difference", "stderr", "count", "only_first", "only_second", "p_value")}


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided McNemar p value: the binomial test of `won` in `won + lost` discordant pairs at one half."""
    n, k = lost + won, min(lost, won)
    term = total = 1
    for j in range(1, k + 1):
        term = term * (n - j + 1) // j  # n over j, exact
        total += term
    return min(1.0, float(2 * total / 2**n))


def _by(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found
