"""Evaluation page: a comparing.compare_runs report, samples and verdicts in, one self-contained HTML page out. Works offline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vlm_dft.chat import Sample
from vlm_dft.conclusions import LEVEL, also_said, conclusion, needed, said_p, settled
from vlm_dft.evaluation_cells import (
    Report,
    Rows,
    decided,
    extra_rows,
    group_rows,
    groups_of,
    listed,
    number,
    splits_of,
    titled,
)
from vlm_dft.evaluation_samples import sample_blocks
from vlm_dft.evaluation_script import SCRIPT, STYLE
from vlm_dft.report_charts import bars, interval_figure, legend_entry, run_colour
from vlm_dft.report_style import STYLE as REPORT_STYLE
from vlm_dft.reporting import percent

MOST_BARS = 12  # values of a group that are drawn as bars; larger groups are a table only
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # nothing is fetched
)


def render_evaluation(
    report: Report,
    *,
    samples: Mapping[str, Sequence[Sample]],
    scores: Mapping[str, Mapping[str, Rows]],
    responses: Mapping[str, Mapping[str, Rows]],
) -> str:
    """The whole page. Every text from data, models or cards is escaped or set as text by the script.

    samples: {benchmark: [Sample]}; scores and responses: {run: {benchmark: rows of scores.jsonl, predictions.jsonl}}.
    """
    runs = list(report["runs"])
    sections = [_header(report, scores), _scores(report, runs), _comparison(report), _versions(report)]
    scored = [run for run in runs if scores.get(run)]
    if scored:
        blocks, notes = sample_blocks(scored, samples, scores, responses)
        seeds = [run for run in scored if report["runs"][run].get("seeds", 1) > 1]
        notes += [f"Of the seeds of {listed(seeds)}, the first one's responses are listed."] if seeds else []
        sections.insert(3, _samples(runs, scored, notes))
    script = f"{blocks}\n<script>{SCRIPT}</script>" if scored else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(_title(report))}</title><style>{REPORT_STYLE}{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, sections))
        + f"\n</main>\n{script}</body></html>\n"
    )


def _title(report: Report) -> str:
    return f"{listed(report['runs'])} on {', '.join(report['benchmarks'])}"


def _header(report: Report, scores: Mapping[str, Mapping[str, Rows]]) -> str:
    runs = list(report["runs"])
    facts: dict[str, list[str]] = {
        name: [_fact(report["runs"][run].get(name)) for run in runs] for name in ("model", "protocol", "engine", "decoding", "seeds")
    }  # fmt: skip
    facts["decided by"] = [decided(scores.get(run, {})) for run in runs]
    facts["folders"] = [_fact(report["runs"][run].get("folders")) for run in runs]
    named = {name: values for name, values in facts.items() if any(values)}
    head = "".join(f"<th>{escape(name)}</th>" for name in named)
    body = "".join(
        f"<tr><th scope=row><i class='dot {run_colour(runs, run)}'></i>{escape(run)}</th>"
        + "".join(f"<td>{escape(values[k])}</td>" for values in named.values())
        + "</tr>"
        for k, run in enumerate(runs)
    )
    warnings = "".join(f"<p class=alarm>{escape(text)}</p>" for text in report.get("warnings") or ())
    counts = Counter(benchmark for benchmark, _, _ in splits_of(report))
    count = sum(max(m["count"] for m in found["runs"].values()) for _, _, found in splits_of(report))
    return (
        f"<header><h1>{escape(listed(runs))} <span>on {escape(', '.join(counts))}</span></h1>"
        f"<p>{len(runs)} run{'s' * (len(runs) > 1)}, {count:,} responses of each.</p>{warnings}"
        f"<div class=scroll><table class='plain runs'><thead><tr><th>run</th>{head}</tr></thead><tbody>{body}</tbody></table></div></header>"
    )


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_fact(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_fact, value))
    return "" if value is None else str(value)


def _scores(report: Report, runs: list[str]) -> str:
    parts = []
    alone = sum(1 for _ in splits_of(report)) == 1
    if not alone:
        parts.append(_overview(report, runs))
    for benchmark, split, found in splits_of(report):
        parts.append(_title_of(benchmark, split) + _measures(found, runs))
        parts.append(_extra(found, runs))
        parts += [_group(found, group, f"{benchmark} {split}, by {group}", runs, alone) for group in groups_of(found)]
    legend = "".join(legend_entry(runs, run) for run in runs)
    return (
        f"<section><h2>Scores</h2><div class=legend>{legend}</div>{''.join(parts)}"
        "<p class=note>Accuracy in % ± standard error, and the 95 % interval. Official: the benchmark's own rule, quirks included. "
        "Robust: one stricter rule for all benchmarks. Abstained: nothing was found in the response; such answers count as wrong, "
        "unless the official rule picks one all the same. Cut: the response reached the token limit. Where samples are versions of "
        "one problem, or drawn several times, the standard error is clustered by problem.</p></section>"
    )


def _title_of(benchmark: str, split: str) -> str:
    name, part = map(escape, titled(benchmark, split))
    return f"<h3>{name} <span class=soft>{part}</span></h3>"


def _overview(report: Report, runs: list[str]) -> str:
    head = "".join(f"<th><i class='dot {run_colour(runs, run)}'></i>{escape(run)}</th>" for run in runs)
    body = ""
    for benchmark, split, found in splits_of(report):
        cells = "".join(f"<td>{_cell(found['runs'].get(run))}</td>" for run in runs)
        count = max(m["count"] for m in found["runs"].values())
        body += f"<tr><th scope=row>{escape(benchmark)} <small>{escape(titled(benchmark, split)[1])}</small></th><td>{count:,}</td>{cells}</tr>"
    several = len(report["benchmarks"]) > 1
    drawn = [
        {
            "split": "official accuracy",
            "group": "benchmark",
            "value": name if several else split,
            "cells": found["runs"],
        }
        for name, split, found in splits_of(report)
        if set(found["runs"]) == set(runs)
    ]
    figure = bars(drawn, "official accuracy", {run: run_colour(runs, run) for run in runs}) if drawn else ""
    table = _scrolled(f"<th>benchmark</th><th>n</th>{head}", body, "overview")
    return f"<div class=pair><div class=figures>{figure}</div>{table}</div>"


def _cell(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return ""
    robust = measured.get("robust")
    return _both(
        percent(measured["accuracy"], measured["stderr"]),
        percent(robust["accuracy"], robust["stderr"]) if robust else "",
    )


def _both(official: str, robust: str) -> str:
    return escape(official) + (f"<small>robust {escape(robust)}</small>" if robust else "")


def _measures(found: Mapping[str, Any], runs: list[str]) -> str:
    columns: dict[str, list[str]] = {}
    for m in found["runs"].values():
        robust = m.get("robust") or {}
        length = "" if m.get("mean_tokens") is None else f"{m['mean_tokens']:,.1f}"
        for title, said in (
            ("official", _interval(m)), ("robust", _interval(robust)), ("n", number(m["count"])), ("problems", number(m.get("clusters"))),
            ("abstained", number(m.get("abstained"))), ("abstained, robust", number(robust.get("abstained"))),
            ("cut", number(m.get("cut"))), ("mean tokens", length),
        ):  # fmt: skip
            columns.setdefault(title, []).append(said)
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    rows = (
        f"<tr><th scope=row><i class='dot {run_colour(runs, run)}'></i>{escape(run)}</th>"
        + "".join(f"<td>{cells[k]}</td>" for cells in columns.values())
        + "</tr>"
        for k, run in enumerate(found["runs"])
    )
    return _scrolled("".join(f"<th>{title}</th>" for title in ("run", *columns)), "".join(rows))


def _scrolled(head: str, body: str, kind: str = "") -> str:
    """A table that scrolls sideways where it does not fit; its first column stays."""
    opening = f"<table class={kind}>" if kind else "<table>"
    return f"<div class=scroll>{opening}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _interval(m: Mapping[str, Any]) -> str:
    if not m:
        return ""
    return f"{percent(m['accuracy'], m['stderr'])}<small>{100 * m['low']:.1f} to {100 * m['high']:.1f}</small>"


def _extra(found: Mapping[str, Any], runs: list[str]) -> str:
    metrics, here, none = extra_rows(found), list(found["runs"]), ("", "")
    if not metrics:
        return ""
    head = "".join(f"<th><i class='dot {run_colour(runs, run)}'></i>{escape(run)}</th>" for run in here)
    body = ""
    for metric, rows in metrics.items():
        body += f"<tr class=name><th colspan={1 + len(here)}>{escape(metric)}</th></tr>" if metric else ""
        for name, cells in rows.items():
            said = "".join(f"<td>{_both(*cells.get(run, none))}</td>" for run in here)
            body += f"<tr><th scope=row>{escape(name)}</th>{said}</tr>"
    return _scrolled(f"<th>further metrics (shares in %; robust where it differs)</th>{head}", body, "extra")


def _group(found: Mapping[str, Any], group: str, title: str, runs: list[str], alone: bool) -> str:
    rows = group_rows(found, group, title)
    here = list(found["runs"])
    head = "".join(f"<th><i class='dot {run_colour(runs, run)}'></i>{escape(run)}</th>" for run in here)
    body = "".join(
        f"<tr class={'whole' if row['group'] is None else 'part'}><th scope=row>"
        f"{'all' if row['group'] is None else escape(str(row['value']))}</th><td>{row['count']:,}</td>"
        + "".join(f"<td>{_cell(row['cells'].get(run))}</td>" for run in here)
        + "</tr>"
        for row in rows
    )
    drawn = [row for row in rows if set(row["cells"]) == set(here)]
    figure = bars(drawn, title, {run: run_colour(runs, run) for run in here}) if len(drawn) <= MOST_BARS + 1 else ""
    opened, table = " open" if alone and figure else "", _scrolled(f"<th>{escape(group)}</th><th>n</th>{head}", body)
    body = f"<div class=pair><div class=figures>{figure}</div>{table}</div>" if figure else table
    return f"<details{opened}><summary>by {escape(group)}: {len(rows) - 1} values</summary>{body}</details>"


def _comparison(report: Report) -> str:
    parts = []
    for benchmark, split, found in splits_of(report):
        rows = found.get("comparisons") or []
        if not rows:
            continue
        whole = [row for row in rows if row.get("group") is None]
        said = "".join(_concluded(report, row) for row in whole if row["rule"] == "official")
        title = _title_of(benchmark, split)
        parts.append(f"{title}<ul class=said>{said}</ul>{_comparison_table(whole)}")
        if own := [row for row in rows if row.get("group") == "metric"]:
            parts.append(
                f"<details open><summary>by the benchmark's own numbers, of problems</summary>{_comparison_table(own)}</details>"
            )
        for group in groups_of(found):
            some = [row for row in rows if row.get("group") == group]
            parts.append(f"<details><summary>by {escape(group)}</summary>{_comparison_table(some)}</details>")
    if not parts:
        return ""
    parts += [f"<p class=note>{escape(note)}</p>" for note in report.get("notes") or ()]
    return (
        f"<section id=comparison><h2>Comparison</h2>{''.join(parts)}"
        "<p class=note>Differences are paired: the same samples, in points ± standard error, with a 95 % interval; every plot's axis is "
        "symmetric about no difference. Won, lost: samples that the run alone, or the other alone, does better on. Corrected p: Holm's, for "
        f"the number of groups compared. Coloured: p below {LEVEL}, the corrected one where there is one. Needed: about so many samples would "
        "settle a difference of this size.</p></section>"
    )


def _concluded(report: Report, row: Mapping[str, Any]) -> str:
    more = "".join(f"<li>{escape(line)}</li>" for line in also_said(report, row))
    return f"<li>{escape(conclusion(row))}{f'<ul>{more}</ul>' if more else ''}</li>"


def _comparison_table(rows: Rows) -> str:
    reach = max([abs(row[key]) for row in rows for key in ("low", "high")] + [0.01])
    by_value = any(row.get("value") is not None for row in rows)
    corrected = any(row.get("p_adjusted") is not None for row in rows)
    plot = f"−{100 * reach:.0f} to +{100 * reach:.0f}"
    titles = [
        *(["value"] if by_value else []), "run − against", "rule", "difference", plot, "p", *(["corrected p"] if corrected else []),
        "needed", "accuracies", "won, lost", "n",
    ]  # fmt: skip
    kinds = {"rule": " class=left", plot: " class=plot", **({"run − against": " class=left"} if by_value else {})}
    head = "".join(f"<th{kinds.get(title, '')}>{title}</th>" for title in titles)
    body = "".join(_comparison_row(row, reach, by_value=by_value, corrected=corrected) for row in rows)
    return _scrolled(head, body, "compared")


def _comparison_row(row: Mapping[str, Any], reach: float, *, by_value: bool, corrected: bool) -> str:
    tone = "flat" if not settled(row) else "up" if row["difference"] > 0 else "down"
    pair = escape(f"{row['run']} − {row['against']}")
    named = f"<th scope=row>{escape(str(row['value']))}</th><td class=left>{pair}</td>"
    difference = percent(row["difference"], row["stderr"], signed=True)
    cells = [
        named if by_value else f"<th scope=row>{pair}</th>", f"<td class=left>{escape(str(row['rule']))}</td>",
        f"<td class={tone}>{difference}<small>{100 * row['low']:+.1f} to {100 * row['high']:+.1f}</small></td>",
        f"<td class=plot>{interval_figure(row['difference'], row['low'], row['high'], reach, tone)}</td>",
        f"<td>{said_p(row['p_value'])}<small>{escape(str(row.get('test') or ''))}</small></td>",
        f"<td>{said_p(row.get('p_adjusted'))}</td>" if corrected else "", f"<td>{needed(row)}</td>",
        f"<td>{number(row['second'])} − {number(row['first'])}</td>", f"<td>{number(row['only_second'])}, {number(row['only_first'])}</td>",
        f"<td>{number(row['count'])}</td>",
    ]  # fmt: skip
    return f"<tr>{''.join(cells)}</tr>"


def _samples(runs: list[str], scored: list[str], notes: Sequence[str]) -> str:
    """The frame of the list; the script fills it."""
    said = "".join(f"<li>{escape(note)}</li>" for note in notes)
    colours = "".join(f"<i class='dot {run_colour(runs, run)}'></i>" for run in scored)
    pager = (
        "<nav class=pager aria-label='pages of samples'><span></span><div><button class=back>‹ previous</button>"
        "<button class=on>next ›</button></div></nav>"
    )
    return (
        f"<section id=samples aria-label=samples><h2>Samples</h2>{f'<ul class=notes>{said}</ul>' if said else ''}"
        "<noscript><p class=alarm>The list of samples needs JavaScript.</p></noscript>"
        f"<div id=colours hidden>{colours}</div>"
        "<div class=tools><label>search questions, answers, responses<input id=q type=search autocomplete=off></label>"
        "<label>benchmark / split<select id=split></select></label><label>group<select id=group></select></label>"
        "<label>right and wrong by the rule<select id=rule><option>official</option><option>robust</option></select></label></div>"
        "<div class=chips id=chips role=group aria-label='which samples'></div>"
        f"<p class=sr id=said role=status></p>{pager}<div id=list></div>"
        f"<p class=empty id=none hidden>No sample matches.</p>{pager}"
        "<p class='note keys'><kbd>j</kbd> <kbd>k</kbd> next and previous sample, <kbd>←</kbd> <kbd>→</kbd> pages, <kbd>/</kbd> search. "
        "The address holds the filters: send it with the file. With several draws, a run is right where more than half of them are.</p></section>"
    )


def _versions(report: Report) -> str:
    found = report.get("versions") or {}
    facts = [(name, version) for name, version in (found.get("packages") or {}).items() if version]
    facts += [(name, found.get(name)) for name in ("python", "commit") if found.get(name)]
    if not facts:
        return ""
    rows = "".join(f"<tr><th scope=row>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in facts)
    return f"<section><details><summary>Versions</summary><table class=plain>{rows}</table></details></section>"
