"""Report of the evaluations while training: their rows and answers in; curves of accuracy and a table of samples that changed, as
HTML, out."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlm_dft.evaluations import ANSWERS, read_evaluations, read_watched
from vlm_dft.finishing import finished_lines
from vlm_dft.report_charts import frame
from vlm_dft.reporting import percent

SHOWN_SAMPLES, SHOWN_STEPS = 6, 5
Rows = Sequence[Mapping[str, Any]]


def watch_section(
    folders: Mapping[str, Path], training: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]
) -> str:
    """The section of every objective that was evaluated while it trained; folders: {objective: its folder}; training: the report's."""
    rows = {name: found for name, folder in folders.items() if (found := read_evaluations(folder))}
    if not rows:
        return ""
    splits = list(next(iter(rows.values()))[0]["splits"])
    figures = "".join(accuracy_figure(rows, split, colours) for split in splits)
    legend = "".join(f"<span><i class='dot {colours[name]}'></i>{escape(name)}</span>" for name in rows)
    tables = "".join(_table(name, folders[name], len(rows) > 1) for name in rows)
    said = "".join(
        f"<p>{f'<b>{escape(name)}</b> ' if len(rows) > 1 else ''}{escape('. '.join(finished_lines(training[name])))}</p>"
        for name in rows
        if training[name].get("evaluations")
    )
    first = next(iter(rows.values()))[0]
    return (
        "<section><h2>Evaluated while training</h2>"
        f"{said}<div class=legend>{legend if len(rows) > 1 else ''}</div><div class=figures>{figures}</div>"
        f"<p class=note>Accuracy ± standard error on the first {first['splits'][splits[0]]['count']} samples of each split, before the "
        f"first step and at every evaluation; {escape(first['decides'])} decides which step is the best (ringed), ties going to the "
        "earlier one. A best score among several is higher than the same model's on other samples: judge by the accuracies above.</p>"
        f"{tables}</section>"
    )


def accuracy_figure(evaluations: Mapping[str, Rows], split: str, colours: Mapping[str, str]) -> str:
    """Accuracy on one split over the steps, a line with a band of a standard error for each objective; its best step ringed."""
    last = max(row["step"] for rows in evaluations.values() for row in rows)
    figure = frame(split, last, (0.0, 1.0), percents=True)
    for name, rows in evaluations.items():
        points = [(row["step"], row["splits"][split]) for row in rows if split in row["splits"]]
        upper = [figure.place(step, min(1.0, m["accuracy"] + m["stderr"])) for step, m in points]
        lower = [figure.place(step, max(0.0, m["accuracy"] - m["stderr"])) for step, m in points]
        line = [figure.place(step, m["accuracy"]) for step, m in points]
        colour = colours[name]
        figure.add(f"<polygon class={colour} fill-opacity=0.15 points='{_points([*upper, *reversed(lower)])}' />")
        figure.add(f"<polyline class='line {colour}' points='{_points(line)}'><title>{escape(name)}</title></polyline>")
        best = max((row for row in rows if row["step"]), key=lambda row: (row["score"], -row["step"]), default=None)
        for (step, m), (x, y) in zip(points, line, strict=True):
            tip = f"{name}, step {step}: {percent(m['accuracy'], m['stderr'])} % (n = {m['count']})"
            figure.add(f"<circle class={colour} cx={x:.1f} cy={y:.1f} r=2.6><title>{escape(tip)}</title></circle>")
            if best is not None and step == best["step"]:
                figure.add(f"<circle class='line {colour}' cx={x:.1f} cy={y:.1f} r=6 />")
    return figure.svg()


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _table(name: str, folder: Path, named: bool) -> str:
    """A few samples with their answers at successive evaluations: the ones that changed first."""
    watched = read_watched(folder)
    if not watched:
        return ""
    steps = _spread(sorted(watched), SHOWN_STEPS)
    answers = {step: {row["id"]: row for row in rows} for step, rows in watched.items()}
    changed, chosen = choose_changed(watched)
    head = "".join(f"<th>step {step}</th>" for step in steps)
    body = "".join(_row(row, [answers[step][row["id"]] for step in steps], folder / ANSWERS) for row in chosen)
    title = f"<h3>{escape(name)}</h3>" if named else ""
    return (
        f"{title}<p class=note>{changed} of {len(answers[steps[-1]])} samples became right or wrong on the way; "
        f"{len(chosen)} samples, those that changed first.</p><div class=scroll><table class=watch><thead><tr><th>picture</th>"
        f"<th>question</th><th>gold</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def choose_changed(watched: Mapping[int, Rows], count: int = SHOWN_SAMPLES) -> tuple[int, list[Mapping[str, Any]]]:
    """How many samples changed between right and wrong, and `count` rows of the last evaluation: most changes first."""
    verdicts: dict[str, list[bool]] = {}
    for step in sorted(watched):
        for row in watched[step]:
            verdicts.setdefault(row["id"], []).append(bool(row["correct"]))
    changes = {name: sum(a != b for a, b in pairwise(v)) for name, v in verdicts.items()}
    rows = watched[max(watched)]
    order = sorted(range(len(rows)), key=lambda k: (-changes[rows[k]["id"]], k))
    return sum(n > 0 for n in changes.values()), [rows[k] for k in order[:count]]


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """So many of the steps, evenly, the first and the last among them."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(k * (len(steps) - 1) / (count - 1))] for k in range(count)]


def _row(row: Mapping[str, Any], answers: Rows, folder: Path) -> str:
    pictures = "".join(_picture(folder / name) for name in row["pictures"] if name)
    cells = "".join(
        f"<td class={'up' if a['correct'] else 'down'} title='{escape(str(a['response']), quote=True)}'>"
        f"{'✓' if a['correct'] else '✗'} {escape(_short(a['extracted']))}</td>"
        for a in answers
    )
    question = f"<small>{escape(str(row['split']))}</small><br>{escape(_short(row['question'], 240))}"
    return f"<tr><td>{pictures}</td><td>{question}</td><td>{escape(_short(row['gold_answer']))}</td>{cells}</tr>"


def _picture(path: Path) -> str:
    if not path.is_file():
        return ""
    return f"<img alt='' src='data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}'>"


def _short(text: Any, longest: int = 60) -> str:
    text = "(nothing)" if text is None else str(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
