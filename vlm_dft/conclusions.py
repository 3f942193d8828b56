"""Conclusions: comparison rows of a report in; sentences in plain words out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Row = Mapping[str, Any]
LEVEL = 0.05
SHOWN = 5  # values of groups that a sentence names


def conclusion(row: Row) -> str:
    """A comparison row in a sentence: "dft − nll: +1.9 points, 95 % interval [−0.4, 4.2], p = 0.11: not settled; ..."."""
    start = (
        f"{row['run']} − {row['against']}: {_points(row['difference'])} points, 95 % interval "
        f"[{_points(row['low'], sign=False)}, {_points(row['high'], sign=False)}], {said_p(row['p_value'])}"
    )
    if settled(row):
        better, worse = (row["run"], row["against"]) if row["difference"] > 0 else (row["against"], row["run"])
        return f"{start}: settled, {better} is better than {worse}"
    if row["difference"] == 0:
        return f"{start}: no difference seen; one of {_points(row['detectable'], sign=False)} points could be with these samples"
    if row["samples_needed"] is None:
        return f"{start}: not settled, and more samples alone would not do: the seeds differ too much. More seeds are needed"
    if row["samples_needed"] <= row["count"]:
        return f"{start}: not settled; there are too few seeds or problems to test it"
    return (
        f"{start}: not settled; about {_rounded(row['samples_needed'])} samples would be needed to settle a difference of this size "
        f"(here: {row['count']:,})"
    )


def also_said(report: Mapping[str, Any], row: Row) -> Iterator[str]:
    """What belongs beside the conclusion of a whole split: another rule's other verdict, the benchmark's own
    numbers, and the groups that differ for sure."""
    rows = [r for r in report["benchmarks"][row["benchmark"]][row["split"]]["comparisons"]
            if (r["run"], r["against"]) == (row["run"], row["against"])]  # fmt: skip
    for other in rows:
        if other["rule"] != row["rule"] and other["group"] is None and _verdict(other) != _verdict(row):
            yield f"not so by the {other['rule']} rule: {conclusion(other).partition(': ')[2]}"
    for own in rows:
        if own["rule"] == row["rule"] and own["group"] == "metric":
            yield f"{own['value']}: {conclusion(own).partition(': ')[2]}"
    groups = [r for r in rows if r["rule"] == row["rule"] and r["p_adjusted"] is not None]
    sure = sorted((r for r in groups if r["p_adjusted"] < LEVEL), key=lambda r: r["p_adjusted"])
    if sure:
        named = ", ".join(f"{r['group']} {r['value']} ({_points(r['difference'])})" for r in sure[:SHOWN])
        more = f" and {len(sure) - SHOWN} more" if len(sure) > SHOWN else ""
        yield f"in {len(sure)} of {len(groups)} groups, corrected for their number: {named}{more}"


def settled(row: Row) -> bool:
    """Whether a difference is told from none at 5 %, uncorrected."""
    return bool(row["p_value"] < LEVEL and row["difference"])


def _verdict(row: Row) -> int:
    return 0 if not settled(row) else 1 if row["difference"] > 0 else -1


def said_p(p: float) -> str:
    """p = 0.11, p = 0.003, p < 0.0001."""
    if p < 0.01:
        return "p < 0.0001" if p < 1e-4 else f"p = {p:.1g}"
    return f"p = {p:.3f}" if abs(p - LEVEL) < 0.01 else f"p = {p:.2f}"


def whole_rows(report: Mapping[str, Any], rule: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(benchmark, split, comparison) of the whole splits by one rule."""
    for benchmark, splits in report["benchmarks"].items():
        for split, found in splits.items():
            for row in found["comparisons"]:
                if row["group"] is None and row["rule"] == rule:
                    yield benchmark, split, row


def _points(value: float, *, sign: bool = True) -> str:
    text = f"{100 * value:{'+' if sign else ''}.1f}"
    text = text.replace("-", "−")
    return {"−0.0": "0.0", "+0.0": "0.0"}.get(text, text)


def _rounded(count: int) -> str:
    """A count to two figures: 2345 is 2,300."""
    digits = max(0, len(str(count)) - 2)
    return f"{round(count, -digits):,}" if count < 10**6 else "over a million"
