"""Evaluation report: a comparing.compare_runs report in; terminal tables, report.json and report.html out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from vlm_dft.chat import Sample
from vlm_dft.conclusions import needed, said_p
from vlm_dft.errors import printable
from vlm_dft.evaluation_cells import Report, Rows, extra_rows, group_rows, groups_of, number, splits_of, titled
from vlm_dft.evaluation_html import render_evaluation
from vlm_dft.reporting import percent
from vlm_dft.runs import write_json, write_text

MOST_VALUES = 12  # of a group in the terminal; the others are in the page
FIRST = 24  # characters of the first column
RULES = ("official", "robust")
WIDEST_GROUPS = 3  # runs side by side in 80 columns


def write_evaluation(
    output: Path,
    report: Report,
    *,
    samples: Mapping[str, Sequence[Sample]],
    scores: Mapping[str, Mapping[str, Rows]],
    responses: Mapping[str, Mapping[str, Rows]],
) -> None:
    """Write report.html and then report.json into `output`.

    samples: {benchmark: [Sample]}, a benchmark without its data left out: the page then lists verdicts without questions.
    scores and responses: {run: {benchmark: rows of scores.jsonl, of predictions.jsonl}}, of each run's first seed.
    """
    output.mkdir(parents=True, exist_ok=True)
    page = render_evaluation(report, samples=samples, scores=scores, responses=responses)
    write_text(output / "report.html", page)
    write_json(output / "report.json", _finite(report))


def evaluation_tables(report: Report, *, rest: str = "report.html", most: int = MOST_VALUES) -> list[Any]:
    """Rich tables of at most 80 columns, a blank line after each: scores, further metrics, groups, and comparisons where there are any.

    Groups are shown where there is one benchmark, if they have `most` values or fewer; of several they fill pages.
    Of one run everything is by both rules, of several by the official one. rest: where what is not shown is.
    """
    from rich.padding import Padding

    groups = _groups(report, rest, most) if len(report["benchmarks"]) == 1 else ()
    tables = [_scores(report, rest), _extra(report), *groups, _comparisons(report, rest)]
    return [Padding(table, (0, 0, 1, 0), expand=False) for table in tables if table.row_count]


def _finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(first: str, *titles: str, caption: str | None = None, first_width: int = FIRST) -> Any:
    """A narrow table: the first column left and folded where it must be, the others right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    table.add_column(first, overflow="fold", max_width=first_width)
    for title in map(_text, titles):
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _text(value: Any, *, bold: bool = False, indent: int = 0) -> Any:
    """A cell whose words are shown as they are, never as markup."""
    from rich.text import Text

    return Text(" " * indent + printable(str(value)), style="bold" if bold else "")


def _title(benchmark: str, split: str) -> str:
    return ", ".join(filter(None, titled(benchmark, split)))


def _scores(report: Report, rest: str) -> Any:
    table = _table(
        "benchmark, run", "n", "official", "95 %", "robust", "abst.", "cut",
        caption="accuracy in % ± standard error; abst.: no answer found, by the official and by the robust rule; cut: at the token limit"
        + ("" if len(report["benchmarks"]) == 1 else f". By group: in {rest}"),
    )  # fmt: skip
    for benchmark, split, found in splits_of(report):
        table.add_row(_text(_title(benchmark, split), bold=True))
        for run, m in found["runs"].items():
            robust = m.get("robust")
            table.add_row(
                _text(run, indent=2), number(m["count"]), percent(m["accuracy"], m["stderr"]),
                f"{100 * m['low']:.1f}–{100 * m['high']:.1f}", percent(robust["accuracy"], robust["stderr"]) if robust else "",
                ", ".join(number(some.get("abstained")) for some in (m, robust) if some), number(m.get("cut")),
            )  # fmt: skip
    return table


def _extra(report: Report) -> Any:
    found = [(benchmark, split, extra_rows(found)) for benchmark, split, found in splits_of(report)]
    runs = list(report["runs"])
    by = "robust where it differs" if len(runs) == 1 else "by the official rule"
    titles = RULES if len(runs) == 1 else runs
    table = _table("further metrics", *titles, caption=f"{by}; shares in % ± standard error", first_width=31)
    for benchmark, split, metrics in found:
        for metric, rows in metrics.items():
            table.add_row(_text(f"{_title(benchmark, split)}{f': {metric}' if metric else ''}", bold=True))
            for name, cells in rows.items():
                said = (cells.get(run, ("", ""))[: 2 if len(runs) == 1 else 1] for run in runs)
                table.add_row(_text(name, indent=2), *chain(*said))
    return table


def _groups(report: Report, rest: str, most: int) -> Iterator[Any]:
    """A table per few runs: their accuracy by the values of every group that is not too long."""
    names = list(report["runs"])
    long = False
    for k in range(0, len(names), WIDEST_GROUPS):
        runs = names[k : k + WIDEST_GROUPS]
        table = (
            _table("by group", "n", *RULES, first_width=31)
            if len(names) == 1
            else _table("official, by group", "n", *runs, first_width=31)
        )
        for benchmark, split, found in splits_of(report):
            for group in groups_of(found):
                rows = group_rows(found, group, split)[1:]
                long = long or len(rows) > most
                if len(rows) > most or not any(run in found["runs"] for run in runs):
                    continue
                table.add_row(_text(f"{_title(benchmark, split)}: {group}", bold=True))
                for row in rows:
                    cells = [row["cells"].get(run) for run in runs]
                    cells += [cell and cell["robust"] for cell in cells if len(names) == 1]
                    said = (percent(cell["accuracy"], cell["stderr"]) if cell else "" for cell in cells)
                    table.add_row(_text(row["value"], indent=2), number(row["count"]), *said)
        table.caption = f"groups of more than {most} values: in {rest}" if long else None
        yield table


def _comparisons(report: Report, rest: str) -> Any:
    table = _table(
        "run − against", "Δ", "95 %", "won, lost", "p", "needed",
        caption="Δ: points, paired on the same samples; won, lost: samples that the run alone, or the other alone, does better on; needed: "
        f"samples that would settle it. By group: in {rest}",
    )  # fmt: skip
    for benchmark, split, found in splits_of(report):
        rows = [row for row in found["comparisons"] if row["group"] is None]
        rules = {rule: [_compared(row) for row in rows if row["rule"] == rule] for rule in RULES}
        if rules["official"] == rules["robust"]:
            rules = {"both": rules["official"]}
        for rule, cells in rules.items():
            if cells:
                table.add_row(_text(f"{_title(benchmark, split)}, {rule}", bold=True))
            for first, *others in cells:
                table.add_row(_text(first, indent=2), *others)
    return table


def _compared(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['run']} − {row['against']}", percent(row["difference"], signed=True), f"{100 * row['low']:+.1f} {100 * row['high']:+.1f}",
        f"{number(row['only_second'])}, {number(row['only_first'])}", said_p(row["p_value"]), needed(row),
    )  # fmt: skip
