"""Report page: a report, training curves and judged samples in, one self-contained HTML page out. Works offline."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vlm_dft.accounting import TITLES, account_cells, account_lines
from vlm_dft.chat import Sample, text_of
from vlm_dft.errors import ImageError
from vlm_dft.media import open_image
from vlm_dft.report_charts import bars, curves_figure, gauge_figure, legend_entry, moving_histogram, run_colour
from vlm_dft.report_style import SCRIPT, STYLE
from vlm_dft.report_watch import watch_section
from vlm_dft.reporting import BASE, find_comparison, percent, table_rows

SHOWN_SAMPLES = 12
LONGEST_SIDE = 448  # pixels of a shown image
LONGEST_TEXT = 4000  # characters of a shown response
Rows = Sequence[Mapping[str, Any]]
CURVES = (
    ("loss", "training loss"), ("nll", "NLL of the response tokens"), ("mean_p", "mean p of the response tokens"),
    ("share_p_below_0.1", "share of tokens with p < 0.1"), ("entropy", "entropy, nats"),
    ("effective_sample_size", "effective sample size"), ("gradient_mass_below_0.1", "gradient mass of p < 0.1"),
    ("kl", "KL to the starting model"),
)  # fmt: skip
"""Of metrics.jsonl: a figure each, where it was logged."""


def render_report(
    report: Mapping[str, Any],
    *,
    curves: Mapping[str, Rows],
    samples: Sequence[Sample],
    scores: Mapping[str, Rows],
    responses: Mapping[str, Rows],
    watched: Mapping[str, Path] | None = None,
) -> str:
    """The whole page; watched: {objective: the folder of its evaluations while training}. Every text from data, models or cards is escaped."""
    sections = [
        _header(report),
        _gauge(report),
        _results(report),
        _curves(curves),
        watch_section(watched or {}, report["training"], {name: run_colour([BASE, *curves], name) for name in curves}),
        _samples(list(report["runs"]), samples, scores, responses),
        _account(report["accounting"]),
        _provenance(report),
    ]
    title = escape(f"{_recipe_name(report)}: {', '.join(report['training']) or 'evaluation'}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, sections))
        + f"\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def _header(report: Mapping[str, Any]) -> str:
    config, recipe = report["config"], report["recipe"]
    facts = [
        ("Model", config.get("model")),
        ("Objective", ", ".join(report["training"]) or None),
        ("With", ", ".join(f"{k} {_said(v)}" for k, v in (config.get("loss") or {}).items() if v)),
        ("By source", _said((config.get("collator") or {}).get("source_objectives"))),
        ("Recipe", _recipe_name(report)),
        ("Benchmark", config.get("benchmark")),
        ("Checkpoint", " / ".join(map(_chosen, report["training"].values())).strip(" /") or None),
        ("Steps", " / ".join(str(row.get("step", row.get("steps"))) for row in report["training"].values()) or None),
        ("Learning rate", config.get("learning_rate")),
        ("Batch size", config.get("batch_size")),
        ("Examples used", report["accounting"].get("total", {}).get("used")),
        ("Seed", config.get("seed")),
    ]
    items = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts if v not in (None, "")
    )
    about = escape(str(recipe.get("description") or "").strip())
    heading = f"{escape(_recipe_name(report))} <span>{escape(' and '.join(report['training']))}</span>"
    return f"<header><h1>{heading}</h1><p>{about}</p><dl class=facts>{items}</dl></header>"


def _chosen(row: Mapping[str, Any]) -> str:
    """Which checkpoint stands for a run, where evaluations while training had a say."""
    found = row.get("evaluations")
    if not found:
        return ""
    best = found["best"]["step"]
    return f"{'best' if str(row['checkpoint']).endswith(f'checkpoint-{best}') else 'last'}, step {str(row['checkpoint']).rpartition('-')[2]}"


def _said(value: Any) -> str:
    """A setting as words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else "" if value is None else str(value)


def _gauge(report: Mapping[str, Any]) -> str:
    gauge = report["gauge"]
    if "mean_p" not in gauge:
        return ""
    se = gauge.get("stderr_p")
    count = f" over {gauge['tokens']:,} response tokens" if "tokens" in gauge else ""
    low = gauge.get("share_p_below_0.1")
    shares = f" {low:.0%} of them had p below 0.1, where DFT hardly looks." if low is not None else ""
    figure = gauge_figure(low, gauge.get("share_p_above_0.9", 0.0)) if low is not None else ""
    blank = gauge.get("blank")
    seen = "" if not blank else (
        f" With blank pictures it is {blank['mean_p']:.3f}: the model "
        f"{'looks at them' if blank['looking'] else 'hardly looks at them'}."
    )  # fmt: skip
    return (
        "<section><h2>Before training: how strong is the prior?</h2>"
        f"{figure}"
        f"<p>Before the first step the model gave the tokens of the training responses a mean probability of "
        f"<b>{gauge['mean_p']:.3f}{f' ± {se:.3f}' if se is not None else ''}</b>{count}.{shares}{seen}</p>"
        f"<p class=verdict>{escape(str(gauge.get('prediction', '')))}</p>"
        "<p class=note>Why the one predicts the other: DFT weighs every token's loss by its own probability p. Where the "
        "model already gives the right continuation a high p, a wrong label has a low one and is nearly ignored; where the "
        "new skill itself has a low p, it is ignored just the same (Wu et al. 2025, "
        "<a href='https://arxiv.org/abs/2508.05629'>arXiv 2508.05629</a>). The mean alone misleads where responses are long "
        "and regular, so the share of tokens below 0.1 counts too. The thresholds (mean p 0.1 and 0.5; shares of 5 % and "
        "20 %) are rough.</p></section>"
    )


def _results(report: Mapping[str, Any]) -> str:
    if not report["runs"]:
        return ""
    runs, rows = list(report["runs"]), table_rows(report)
    pairs = [(run, BASE) for run in runs if run != BASE]
    trained = [run for run in runs if run != BASE]
    pairs += [(b, a) for k, a in enumerate(trained) for b in trained[k + 1 :]]
    pairs = [pair for pair in pairs if find_comparison(report, rows[0], *pair)]
    head = "".join(f"<th><i class='dot {run_colour(runs, run)}'></i>{escape(run)}</th>" for run in runs)
    head += "".join(f"<th>{escape(run)} − {escape(against)}</th>" for run, against in pairs)
    body = "".join(_table_row(report, row, runs, pairs) for row in rows)
    figures = "".join(bars(rows, split, {run: run_colour(runs, run) for run in runs}) for split in _splits(rows))
    return (
        "<section><h2>Accuracy</h2>"
        f"<div class=legend>{''.join(legend_entry(runs, run) for run in runs)}"
        "<span>whiskers: 95 % Wilson interval</span></div>"
        f"<div class=figures>{figures}</div>"
        f"<div class=scroll><table><thead><tr><th>split, task</th><th>n</th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>{_lengths(report, rows, runs)}"
        "<p class=note>Accuracy in % ± standard error √(p(1−p)/n). Differences are paired: the same samples, in "
        "points ± standard error. ● marks p &lt; 0.01 (exact McNemar test, not corrected for the number of rows).</p></section>"
    )


def _lengths(report: Mapping[str, Any], rows: Rows, runs: list[str]) -> str:
    """Response length and stop rate of every run on every split: a model that was starved of its end token runs on."""
    lines = []
    for row in rows:
        cells = [row["cells"][run] for run in runs]
        if row["group"] is None and all(cell.get("mean_tokens") is not None for cell in cells):
            said = "".join(f"<td>{c['mean_tokens']:.1f}; {1 - c['cut'] / c['count']:.1%}</td>" for c in cells)
            lines.append(f"<tr><th>{escape(str(row['split']))}</th>{said}</tr>")
    if not lines:
        return ""
    head = "".join(f"<th>{escape(run)}</th>" for run in runs)
    return (
        "<details><summary>Length of the responses, and how many stopped by themselves</summary><div class=scroll><table>"
        f"<thead><tr><th>split: mean tokens; stopped</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def _table_row(report: Mapping[str, Any], row: Mapping[str, Any], runs: list[str], pairs: list[tuple[str, str]]) -> str:
    whole = row["group"] is None
    cells = [f"<td>{percent(row['cells'][run]['accuracy'], row['cells'][run]['stderr'])}</td>" for run in runs]
    for pair in pairs:
        change = find_comparison(report, row, *pair)
        if change is None:
            cells.append("<td></td>")
            continue
        sure = change["p_value"] < 0.01
        tone = ("up" if change["difference"] > 0 else "down") if sure else "flat"
        tip = f"p = {change['p_value']:.2g}; {change['only_second']} won, {change['only_first']} lost"
        text = percent(change["difference"], change["stderr"], signed=True)
        cells.append(f"<td class={tone} title='{tip}'>{text}{' ●' if sure else ''}</td>")
    name = escape(str(row["split"] if whole else row["value"]))
    return f"<tr class={'whole' if whole else 'part'}><th>{name}</th><td>{row['count']}</td>{''.join(cells)}</tr>"


def _curves(curves: Mapping[str, Rows]) -> str:
    logged = {name: rows for name, rows in curves.items() if rows}
    if not logged:
        return ""
    colours = {name: run_colour([BASE, *curves], name) for name in curves}
    legend = "".join(legend_entry([BASE, *curves], name) for name in logged) if len(logged) > 1 else ""
    figures = "".join(curves_figure(logged, key, title, colours) for key, title in CURVES)
    for name, rows in logged.items():
        figures += moving_histogram(rows, "how p moves" if len(logged) == 1 else f"how p moves: {name}")
    alarms = [
        (name, alarm["message"]) for name, rows in logged.items() for row in rows for alarm in row.get("alarms", [])
    ]
    starved = "".join(
        f"<p class=alarm><b>{escape(name)}</b> {escape(message)}</p>" for name, message in dict.fromkeys(alarms)
    )
    return (
        f"<section><h2>Training</h2>{starved}<div class=legend>{legend}</div><div class=figures>{figures}</div>"
        "<p class=note>Losses of different objectives are not comparable: DFT's is −p·log p, which falls towards 0 when a "
        "token is learnt (p → 1) and also when it is given up (p → 0). NLL and mean p tell the two apart. Effective sample "
        "size: (Σw)² / (nΣw²), 1 where all tokens weigh the same. Gradient mass: the share of Σw(1−p). How p moves: the shares "
        "of response tokens in bins of p (0, 1e-4, 1e-3, .01, .1, .2 … 1), the darkest above 0.9.</p></section>"
    )


def _samples(
    runs: list[str], samples: Sequence[Sample], scores: Mapping[str, Rows], responses: Mapping[str, Rows]
) -> str:
    if not scores or not samples:
        return ""
    judged = {run: {row["id"]: row for row in rows} for run, rows in scores.items()}
    said = {run: {row["id"]: row for row in rows} for run, rows in responses.items()}
    runs = [run for run in runs if run in judged]
    shown = choose_samples([s for s in samples if all(s.id in judged[run] for run in runs)], judged)
    cards = "".join(_card(sample, runs, judged, said) for sample in shown)
    buttons = ["<button aria-pressed=true data-right='' data-wrong=''>all</button>"]
    for a, b in [(a, b) for k, a in enumerate(runs) for b in runs[k + 1 :]]:
        buttons += [_button(b, a), _button(a, b)]
    return (
        f"<section><h2>Samples</h2><p class=note>{len(shown)} of {len(samples):,}, picked evenly over splits, tasks and "
        "outcomes: their shares here are not the shares above.</p>"
        f"<div class=filter>{''.join(buttons)}</div><div class=cards>{cards}</div>"
        "<p class=empty hidden>None among these.</p></section>"
    )


def choose_samples(
    samples: Sequence[Sample], judged: Mapping[str, Mapping[str, Any]], count: int = SHOWN_SAMPLES
) -> list[Sample]:
    """`count` samples, taken in turn from every outcome (which runs are right), in it from every split and task."""
    outcomes: dict[tuple[bool, ...], dict[tuple[str, ...], list[Sample]]] = {}
    for sample in samples:
        outcome = tuple(bool(judged[run][sample.id]["correct"]) for run in judged)
        kind = (*map(str, sample.groups.values()), sample.split)
        outcomes.setdefault(outcome, {}).setdefault(kind, []).append(sample)
    queues = []
    for outcome in sorted(outcomes, key=lambda o: (-len(set(o)), o)):  # where the runs differ first
        kinds = outcomes[outcome]
        mixed = sorted(
            kinds, key=lambda kind: zlib.crc32(repr((outcome, kind)).encode())
        )  # not always the same split first
        queues.append(_in_turn(kinds[kind] for kind in mixed))
    return _in_turn(queues)[:count]


def _in_turn(queues: Iterable[Sequence[Sample]]) -> list[Sample]:
    """The first of every queue, then the second of every queue, and so on."""
    queues = list(queues)
    return [queue[k] for k in range(max(map(len, queues), default=0)) for queue in queues if k < len(queue)]


def _card(sample: Sample, runs: list[str], judged: Mapping[str, Any], said: Mapping[str, Any]) -> str:
    right = " ".join(escape(run, quote=True) for run in runs if judged[run][sample.id]["correct"])
    wrong = " ".join(escape(run, quote=True) for run in runs if not judged[run][sample.id]["correct"])
    images = "".join(
        f"<img alt='image {k + 1} of {escape(sample.id, quote=True)}' src='{_data_uri(image)}'>"
        for k, image in enumerate(sample.images)
    )
    tags = "".join(f"<span>{escape(str(tag))}</span>" for tag in (sample.split, *sample.groups.values()))
    question = escape(text_of(sample.messages[-1]["content"]))
    answers = "".join(_response(run, judged[run][sample.id], said.get(run, {}).get(sample.id, {})) for run in runs)
    return (
        f"<article data-right='{right}' data-wrong='{wrong}'><div class=pictures>{images}</div><div class=words>"
        f"<div class=tags>{tags}<code>{escape(sample.id)}</code></div><p class=question>{question}</p>"
        f"<p>gold answer <b>{escape(str(sample.record.get('gold_answer')))}</b></p>{answers}</div></article>"
    )


def _response(run: str, score: Mapping[str, Any], prediction: Mapping[str, Any]) -> str:
    text = str(prediction.get("response", ""))
    text = text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text):,} characters)"
    verdict, mark = ("right", "✓ right") if score["correct"] else ("wrong", "✗ wrong")
    extracted = "nothing" if score["extracted"] is None else str(score["extracted"])[:LONGEST_TEXT]
    cut = "; cut at the token limit" if prediction.get("finish") == "length" else ""
    return (
        f"<div class='response {verdict}'><div><b>{escape(run)}</b> <span class=mark>{mark}</span></div>"
        f"<pre>{escape(text) or '(empty)'}</pre>"
        f"<small>extracted <b>{escape(extracted)}</b> ({escape(str(score['rule']))}{cut})</small></div>"
    )


def _data_uri(image: Any) -> str:
    """The image as the model's processor gets it, made small enough for a page. An unreadable one shows as nothing."""
    try:
        opened = open_image(image)
    except ImageError:
        return ""
    opened.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    opened.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _button(right: str, wrong: str) -> str:
    a, b = escape(right, quote=True), escape(wrong, quote=True)
    return f"<button aria-pressed=false data-right='{a}' data-wrong='{b}'>{a} right, {b} wrong</button>"


def _account(accounting: Mapping[str, Any]) -> str:
    """What became of every row of every source."""
    if not accounting.get("sources"):
        return ""
    sources, total = accounting["sources"], accounting["total"]
    named = [(source["source"], source) for source in sources] + ([("all", total)] if len(sources) > 1 else [])
    rows = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in account_cells(found))}</tr>"
        for name, found in named
    )
    titles = "".join(f"<th>{escape(title)}</th>" for title in ("source", *TITLES))
    said = "".join(f"<li>{escape(line)}</li>" for line in account_lines(accounting))
    return (
        f"<section><h2>Data</h2><div class=scroll><table><tr>{titles}</tr>{rows}</table></div><ul>{said}</ul>"
        "<p class=note>Tokens are those of an epoch, repeated rows counted each time; the share is that of the response tokens.</p></section>"
    )


def _provenance(report: Mapping[str, Any]) -> str:
    found = report["versions"]
    facts = [(name, version) for name, version in found.get("packages", {}).items() if version]
    facts += [("python", found.get("python")), ("commit", found.get("commit"))]
    facts += [(f"checkpoint ({name})", row.get("checkpoint")) for name, row in report["training"].items()]
    facts += [(key, report["recipe"].get(key)) for key in ("licence", "paper")]
    rows = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in facts if v)
    return (
        f"<section><details><summary>Versions and places</summary><table class=plain>{rows}</table></details></section>"
    )


def _splits(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["split"] for row in rows))


def _recipe_name(report: Mapping[str, Any]) -> str:
    return str(report["recipe"].get("name") or report["config"].get("recipe") or "report")
