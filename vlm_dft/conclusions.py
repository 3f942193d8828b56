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
        f"[{_points(row['low'], sign=False)}, {_points(row['high'], sign=False)}], p {said_p(row['p_value'], equals='= ')}"
    )
    if settled(row):
        better, worse = (row["run"], row["against"]) if row["difference"] > 0 else (row["against"], row["run"])
        return f"{start}: settled, {better} is better than {worse}"
    if row["difference"] == 0:
        return f"{start}: no difference seen; with these samples one of under {_points(row['detectable'], sign=False)} points may go unnoticed"
    if row["samples_needed"] is None:
        return f"{start}: not settled, and more samples alone would not do: the seeds differ too much. More seeds are needed"
    if row["samples_needed"] <= row["count"]:
        return f"{start}: not settled; there are too few seeds or problems to test it"
    what = "problems" if row["group"] == "metric" else "samples"
    return (
        f"{start}: not settled; {_rounded(row['samples_needed'], 'about ')} {what} would be needed to settle a difference of this size "
        f"(here: {row['count']:,})"
    )


def needed(row: Row) -> str:
    """The same in a word of a table: how many would settle it, or that it is; a dash where no number would."""
    if settled(row):
        return "settled"
    count = row["samples_needed"]
    return "–" if count is None or count <= row["count"] else _rounded(count)


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
    sure = sorted(filter(settled, groups), key=lambda r: r["p_adjusted"])
    if sure:
        named = ", ".join(f"{r['group']} {r['value']} ({_points(r['difference'])})" for r in sure[:SHOWN])
        more = f" and {len(sure) - SHOWN} more" if len(sure) > SHOWN else ""
        yield f"in {len(sure)} of {len(groups)} groups, corrected for their number: {named}{more}"


def settled(row: Row) -> bool:
    """Whether a difference is told from none at 5 %, by the corrected p value where there is one."""
    p = row["p_value"] if row["p_adjusted"] is None else row["p_adjusted"]
    return bool(p < LEVEL and row["difference"])


def _verdict(row: Row) -> int:
    return 0 if not settled(row) else 1 if row["difference"] > 0 else -1


def said_p(p: float | None, equals: str = "") -> str:
    """0.11, 0.003, < 0.0001: as many digits as tell it from the level; nothing for None."""
    if p is None:
        return ""
    if p < 0.01:
        return "< 0.0001" if p < 1e-4 else f"{equals}{p:.1g}"
    digits = next((n for n in (3, 4, 5) if round(p, n) != LEVEL), 6) if abs(p - LEVEL) < 0.01 else 2
    return f"{equals}{p:.{digits}f}"


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


def _rounded(count: int, about: str = "") -> str:
    """A count to two figures: 2345 is 2,300."""
    digits = max(0, len(str(count)) - 2)
    return f"{about}{round(count, -digits):,}" if count < 10**6 else "over 1 M"
