"""Evaluation cells: a comparing.compare_runs report in; its rows, and its numbers as words, for the page and the terminal, out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vlm_dft.reporting import percent

Rows = Sequence[Mapping[str, Any]]
Report = Mapping[str, Any]


def splits_of(report: Report) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(benchmark, split, its {"runs", "comparisons"}) of a report, in order."""
    for benchmark, splits in report["benchmarks"].items():
        for split, found in splits.items():
            yield benchmark, split, found


def titled(benchmark: str, split: str) -> tuple[str, str]:
    """The same, with no split where the benchmark is named by it alone: ("mathvision:testmini", "")."""
    return benchmark, "" if benchmark.endswith(f":{split}") else split


def groups_of(found: Mapping[str, Any]) -> list[str]:
    """The groups that tell samples apart: of two values at least."""
    values: dict[str, set[str]] = {}
    for measured in found["runs"].values():
        for name, of_group in measured["groups"].items():
            values.setdefault(name, set()).update(of_group)
    return [name for name, some in values.items() if len(some) > 1]


def group_rows(found: Mapping[str, Any], group: str, title: str) -> list[dict[str, Any]]:
    """A row for the whole and for every value of a group: {"split": title, "group", "value", "count", "cells": {run: measured}}.

    A value that some run has no sample of is left to the runs that have.
    """
    runs = found["runs"]
    rows: list[dict[str, Any]] = [{"split": title, "group": None, "value": None, "cells": dict(runs)}]
    values = dict.fromkeys(value for measured in runs.values() for value in measured["groups"].get(group, {}))
    for value in values:
        cells = {run: m["groups"][group][value] for run, m in runs.items() if value in m["groups"].get(group, {})}
        rows.append({"split": title, "group": group, "value": value, "cells": cells})
    return [{**row, "count": max(cell["count"] for cell in row["cells"].values())} for row in rows]


def number(value: Any) -> str:
    """A count with its thousands, a share as per cent, words as they are; nothing for None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{100 * value:.1f}" if -1 <= value <= 1 else f"{value:,.1f}"
    return "" if value is None else str(value)


def extra_rows(found: Mapping[str, Any]) -> dict[str, dict[str, dict[str, tuple[str, str]]]]:
    """{metric: {name: {run: (official, robust)}}} of the runs' extra metrics, as words: a share with its error, or a number.

    A metric of one value stands under "" by its own name. Where there are rates, their counts are left to report.json.
    """
    rows: dict[str, dict[str, dict[str, tuple[str, str]]]] = {}
    for run, measured in found["runs"].items():
        for key, value in (measured.get("extra") or {}).items():
            metric, robust = key.replace("_", " "), value.get("robust") if isinstance(value, Mapping) else None
            if isinstance(value, Mapping) and "rates" in value:
                value = {name: item for name, item in value.items() if name != "counts"}
            for name, official, other in _leaves("", value, robust):
                cells = rows.setdefault(metric if name else "", {}).setdefault(name or metric, {})
                cells[run] = official, other if other != official else ""
    return rows


def _leaves(name: str, value: Any, robust: Any) -> Iterator[tuple[str, str, str]]:
    """(name, official, robust) of every value in nested dicts; a dict with a standard error is one value."""
    if not isinstance(value, Mapping) or "stderr" in value:
        yield name, _value(value), _value(robust)
        return
    for key, item in value.items():
        if key != "robust":
            other = robust.get(key) if isinstance(robust, Mapping) else None
            said = str(key).replace("_", " ")
            yield from _leaves(f"{name}, {said}" if name else said, item, other)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return percent(value.get("accuracy", value.get("value")), value["stderr"])
    return number(value)


def listed(names: Iterable[str]) -> str:
    """Names as a sentence lists them: "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def decided(rows: Mapping[str, Rows]) -> str:
    """Who decided a run's verdicts: "rule 1,998, gpt-4o 2"."""
    found = Counter(str(row.get("decided_by", "rule")) for some in rows.values() for row in some)
    return ", ".join(f"{who} {count:,}" for who, count in found.most_common())
