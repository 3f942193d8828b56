"""Reporting: results, training logs and a gauge in; a terminal table, report.json and one report.html out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from vlm_dft.chat import Sample
from vlm_dft.metrics import compare, labels
from vlm_dft.predictions import read_jsonl
from vlm_dft.runs import versions, write_json, write_text

BASE = "base"
ALL = {"group": None, "value": None}


def write_report(
    output: Path,
    *,
    runs: Mapping[str, Mapping[str, Any]],
    training: Mapping[str, Mapping[str, Any]],
    gauge: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    accounting: Mapping[str, Any] | None = None,
    samples: Mapping[str, Sequence[Sample]] | None = None,
    folders: Mapping[str, Path] | None = None,
    watched: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Write report.html and then report.json into `output`; return the latter.

    runs: {run: metrics.summarise(...)}, the untrained model under "base".
    training: {objective: {"checkpoint", "steps", "metrics": rows of metrics.jsonl}}. gauge: diagnostics.gauge(...).
    samples: {split: [...]}. folders: {run: the folder of its predictions.jsonl and scores.jsonl}; without them there
    are no comparisons, and no samples in the page. watched: {objective: the folder of its evaluations while training}.
    """
    from vlm_dft.report_html import render_report

    folders = folders if runs and folders else {}
    scores = {run: read_jsonl(folder / "scores.jsonl") for run, folder in folders.items()}
    responses = {run: read_jsonl(folder / "predictions.jsonl") for run, folder in folders.items()}
    report = {
        "runs": {run: dict(splits) for run, splits in runs.items()},
        "comparisons": comparisons(scores),
        "training": {name: _training(row) for name, row in training.items()},
        "gauge": dict(gauge or {}),
        "recipe": dict(recipe or {}),
        "config": dict(config or {}),
        "accounting": dict(accounting or {}),
        "versions": versions(),
    }
    curves = {name: list(row.get("metrics") or []) for name, row in training.items()}
    flat = [sample for split in (samples or {}).values() for sample in split]
    write_text(
        output / "report.html",
        render_report(report, curves=curves, samples=flat, scores=scores, responses=responses, watched=watched),
    )
    write_json(output / "report.json", report)
    return report


def comparisons(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Paired comparisons of every two runs, per split and per value of each group: {"run", "against", "split", "group",
    "value", difference, stderr, count, ...}; difference is run minus against."""
    found = []
    for against, run in combinations(scores, 2):
        for split in dict.fromkeys(row["split"] for row in scores[against]):
            rows = {name: [row for row in scores[name] if row["split"] == split] for name in (against, run)}
            values = sorted(
                {(group, v) for row in rows[against] for group in row["groups"] for v in labels(row, group)}
            )
            for group, value in [(None, None), *values]:
                a, b = ([r for r in rows[n] if group is None or value in labels(r, group)] for n in (against, run))
                found.append(
                    {"run": run, "against": against, "split": split, "group": group, "value": value, **compare(a, b)}
                )
    return found


def table_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per split and per value of each group: {"split", "group", "value", "count", "cells": {run: metrics}}."""
    runs: Mapping[str, Any] = report["runs"]
    rows = []
    for split, first in next(iter(runs.values()), {}).items():
        rows.append({"split": split, **ALL, "count": first["count"], "cells": {run: runs[run][split] for run in runs}})
        for group, values in first["groups"].items():
            for value, measured in values.items():
                cells = {run: runs[run][split]["groups"][group][value] for run in runs}
                rows.append(
                    {"split": split, "group": group, "value": value, "count": measured["count"], "cells": cells}
                )
    return rows


def find_comparison(
    report: Mapping[str, Any], row: Mapping[str, Any], run: str, against: str = BASE
) -> dict[str, Any] | None:
    """The comparison of a run with another on a row of table_rows, or None."""
    wanted = {"run": run, "against": against, **{key: row[key] for key in ("split", "group", "value")}}
    return next((c for c in report.get("comparisons", []) if wanted.items() <= c.items()), None)


def report_table(report: Mapping[str, Any]) -> Any:
    """A rich table: per split and task the count, every run's accuracy ± standard error, and its change from base."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    runs = list(report["runs"])
    caption = "accuracy in % ± standard error"
    caption += "; Δ: points gained on base, same samples" if report.get("comparisons") else ""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption=caption, caption_justify="left")
    table.add_column("split, task", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    with_change = [
        run for run in runs if any(c["run"] == run and c["against"] == BASE for c in report.get("comparisons", []))
    ]
    for run in runs:
        table.add_column(run, justify="right", no_wrap=True)
        if run in with_change:
            table.add_column("Δ", justify="right", no_wrap=True)
    for row in table_rows(report):
        whole = row["group"] is None
        cells: list[Text | str] = [Text(row["split"] if whole else f"  {row['value']}"), str(row["count"])]
        for run in runs:
            cells.append(percent(row["cells"][run]["accuracy"], row["cells"][run]["stderr"]))
            if run in with_change:
                change = find_comparison(report, row, run)
                cells.append(percent(change["difference"], change["stderr"], signed=True) if change else "")
        table.add_row(*cells, style="bold" if whole else "")
    return table


def percent(value: float, stderr: float | None = None, *, signed: bool = False) -> str:
    """A share in per cent with its standard error: "98.0 ± 0.7"; a difference with its sign: "+3.1 ± 0.8"."""
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return text if stderr is None else f"{text} ± {100 * stderr:.1f}"


def _training(row: Mapping[str, Any]) -> dict[str, Any]:
    """What report.json keeps of a training run: everything but the curve, of which the first and last row."""
    kept = {key: value for key, value in row.items() if key != "metrics"}
    logged = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}  # JSON has no nan
        for entry in row.get("metrics") or []
    ]
    return {**kept, **({"first": logged[0], "last": logged[-1]} if logged else {})}
