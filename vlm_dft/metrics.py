"""Metrics: score rows in; accuracy with standard error, interval and count, and paired tests out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
Row = Mapping[str, Any]  # of scores.jsonl: id, split, groups, correct, extracted ...


def accuracy(verdicts: Sequence[bool]) -> dict[str, float | int]:
    """Accuracy, its standard error sqrt(p(1-p)/n), a Wilson 95 % interval [low, high] and the count.

    The standard error is 0 at p = 0 and p = 1, where it says nothing; the interval still does.
    Raises ValueError for no verdicts: the accuracy of nothing is not zero.
    """
    n = len(verdicts)
    if n == 0:
        raise ValueError("Expected at least one verdict, found none: there is no accuracy of nothing.")
    p = sum(verdicts) / n
    shrink = 1 + Z95**2 / n
    centre = (p + Z95**2 / (2 * n)) / shrink
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2)) / shrink
    return {
        "accuracy": p,
        "stderr": math.sqrt(p * (1 - p) / n),
        "count": n,
        "low": max(0.0, centre - half),
        "high": min(1.0, centre + half),
    }


def summarise(scores: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """{split: {accuracy, stderr, count, low, high, abstained, cut, mean_tokens, "groups": {group: {value: the same}}}}.

    abstained: responses that answer nothing. cut: responses that reached the token limit. Both count as scored.
    mean_tokens: length of the responses, end token included; None where the rows do not tell it.
    """
    result = {}
    for split, rows in _by(list(scores), lambda row: row["split"]).items():
        names = dict.fromkeys(name for row in rows for name in row.get("groups") or {})
        groups = {
            name: _by([r for r in rows if name in r["groups"]], lambda r, n=name: r["groups"][n]) for name in names
        }
        result[split] = {
            **_measured(rows),
            "groups": {
                name: {value: _measured(found[value]) for value in sorted(found)} for name, found in groups.items()
            },
        }
    return result


def compare(first: Iterable[Row], second: Iterable[Row]) -> dict[str, float | int]:
    """Paired comparison of two runs on the same ids: `second` minus `first`.

    difference and its paired standard error; only_first, only_second: samples that one run alone has right;
    p_value: exact two-sided McNemar test on those. Raises ValueError when the ids differ.
    """
    a, b = ({row["id"]: bool(row["correct"]) for row in rows} for rows in (first, second))
    if set(a) != set(b) or not a:
        odd = sorted(set(a) ^ set(b))
        raise ValueError(
            f"A paired comparison needs the same ids in both runs. {len(odd)} are in one only, e.g. {odd[:1]}."
        )
    n = len(a)
    lost, won = sum(a[i] and not b[i] for i in a), sum(b[i] and not a[i] for i in a)
    return {
        "difference": (won - lost) / n,
        "stderr": math.sqrt(max(0.0, (won + lost) - (won - lost) ** 2 / n)) / n,
        "count": n,
        "only_first": lost,
        "only_second": won,
        "p_value": mcnemar(lost, won),
    }


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided McNemar p value: the binomial test of `won` in `won + lost` discordant pairs at one half."""
    n, k = lost + won, min(lost, won)
    term = total = 1
    for j in range(1, k + 1):
        term = term * (n - j + 1) // j  # n over j, exact
        total += term
    return min(1.0, float(2 * total / 2**n))


def _measured(rows: Sequence[Row]) -> dict[str, Any]:
    lengths = [row["tokens"] for row in rows if row.get("tokens") is not None]
    return {
        **accuracy([bool(row["correct"]) for row in rows]),
        "abstained": sum(row.get("extracted") is None for row in rows),
        "cut": sum(row.get("finish") == "length" for row in rows),
        "mean_tokens": sum(lengths) / len(lengths) if len(lengths) == len(rows) else None,
    }


def _by(rows: Sequence[Row], key: Any) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found
