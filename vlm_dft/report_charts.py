"""Report charts: numbers in, inline SVG out. Colours are CSS classes, so that light and dark pages share them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vlm_dft.reporting import BASE

Rows = Sequence[Mapping[str, Any]]
LABEL, WIDTH, BAR, GAP = 112, 470, 11, 12  # pixels: label column, whole chart, a bar, the space between groups


def legend_entry(runs: Sequence[str], run: str) -> str:
    """A run's colour and name."""
    return f"<span><i class='dot {run_colour(runs, run)}'></i>{escape(run)}</span>"


def run_colour(runs: Sequence[str], run: str) -> str:
    """The CSS class of a run: base is grey; the others take colours in order."""
    return "c0" if run == BASE else f"c{1 + [r for r in runs if r != BASE].index(run) % 5}"


def interval_figure(middle: float, low: float, high: float, reach: float, tone: str) -> str:
    """A difference with its interval on an axis from -reach to reach, zero in the middle."""
    width, height = 170, 22

    def x(value: float) -> float:
        return width / 2 + max(-1.0, min(1.0, value / reach)) * (width / 2 - 6)

    label = f"{100 * middle:+.1f} points, from {100 * low:+.1f} to {100 * high:+.1f}"
    left, right = x(low), x(high)
    parts = [
        f"<title>{label}</title><line class=zero x1={width / 2} x2={width / 2} y1=1 y2={height - 1} />",
        f"<path class='span {tone}' d='M{left:.1f} 11H{right:.1f}M{left:.1f} 7v8M{right:.1f} 7v8' />",
        f"<circle class='mid {tone}' cx={x(middle):.1f} cy=11 r=3.6 />",
    ]
    return _svg(width, height, label, parts, kind="interval")


def bars(rows: Rows, split: str, colours: Mapping[str, str]) -> str:
    """Accuracy of every run on one split: bars for the whole and for each task, whiskers from low to high."""
    rows = [row for row in rows if row["split"] == split]
    step = len(colours) * BAR + GAP
    top, height = 22, 22 + len(rows) * step + 18
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = _x(share)
        parts.append(f"<line class=grid x1={x:.1f} x2={x:.1f} y1={top - 4} y2={height - 16} />")
        parts.append(f"<text class=tick x={x:.1f} y={height - 3} text-anchor=middle>{100 * share:.0f}%</text>")
    for k, row in enumerate(rows):
        y = top + k * step
        name = "all" if row["group"] is None else str(row["value"])
        weight = " class=strong" if row["group"] is None else ""
        parts.append(
            f"<text{weight} x={LABEL - 8} y={y + (step - GAP) / 2 + 4:.1f} text-anchor=end>"
            f"{escape(_short(name))}</text>"
        )
        for j, (run, colour) in enumerate(colours.items()):
            parts.append(_bar(row["cells"][run], run, colour, y + j * BAR))
    title = f"<text class=title x=0 y=12>{escape(split)}</text>"
    return _svg(WIDTH, height, f"accuracy on {split}", [title, *parts])


def _bar(cell: Mapping[str, Any], run: str, colour: str, y: float) -> str:
    left, right = _x(0), _x(cell["accuracy"])
    low, high, middle = _x(cell["low"]), _x(cell["high"]), y + (BAR - 2) / 2
    tip = f"{run}: {100 * cell['accuracy']:.1f}% ± {100 * cell['stderr']:.1f} (n = {cell['count']})"
    return (
        f"<g><title>{escape(tip)}</title>"
        f"<rect class={colour} x={left:.1f} y={y:.1f} width={max(right - left, 1):.1f} height={BAR - 2} rx=1.5 />"
        f"<path class=whisker d='M{low:.1f} {middle:.1f}H{high:.1f}"
        f"M{low:.1f} {middle - 3:.1f}v6M{high:.1f} {middle - 3:.1f}v6' /></g>"
    )


def _x(share: float) -> float:
    return LABEL + share * (WIDTH - LABEL - 16)


def curves_figure(curves: Mapping[str, Rows], key: str, title: str, colours: Mapping[str, str]) -> str:
    """One quantity of metrics.jsonl over the steps, a line per objective. Empty where nothing finite was logged."""
    lines = {name: [(r["step"], r[key]) for r in rows if _finite(r.get(key))] for name, rows in curves.items()}
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    last = max(max(step for step, _ in points), 1)
    figure = frame(title, last, (min(0.0, min(v for _, v in points)), max(v for _, v in points)))
    for name, line in lines.items():
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (figure.place(*point) for point in line))
        if len(line) > 1:
            figure.add(
                f"<polyline class='line {colours[name]}' points='{places}'><title>{escape(name)}</title></polyline>"
            )
        elif line:
            x, y = figure.place(*line[0])
            figure.add(f"<circle class={colours[name]} cx={x:.1f} cy={y:.1f} r=3 />")
    return figure.svg()


class Frame:
    """A figure with axes: steps from 0 to `last`, values between its lowest and highest tick."""

    width, height, left, top, bottom = 320, 190, 46, 24, 26

    def __init__(self, title: str, last: float, ticks: Sequence[float]) -> None:
        self.title, self.last, self.low, self.high = title, last, ticks[0], ticks[-1]
        self.parts = [f"<text class=title x=0 y=12>{escape(title)}</text>"]

    def place(self, step: float, value: float) -> tuple[float, float]:
        """x and y."""
        x = self.left + step / self.last * (self.width - self.left - 10)
        share = (self.high - value) / (self.high - self.low)
        return x, self.top + share * (self.height - self.top - self.bottom)

    def add(self, part: str) -> None:
        """One more element."""
        self.parts.append(part)

    def svg(self) -> str:
        """The whole figure."""
        return _svg(self.width, self.height, self.title, self.parts, kind="curve")


def frame(title: str, last: float, values: tuple[float, float], *, percents: bool = False) -> Frame:
    """Axes for steps up to `last` and values from low to high."""
    ticks = _ticks(*values)
    figure = Frame(title, max(last, 1), ticks)
    right = figure.width - 10
    for tick in ticks:
        _, y = figure.place(0, tick)
        said = f"{tick:.0%}" if percents else f"{tick:g}"
        figure.add(f"<line class=grid x1={figure.left} x2={right} y1={y:.1f} y2={y:.1f} />")
        figure.add(f"<text class=tick x={figure.left - 5} y={y + 4:.1f} text-anchor=end>{said}</text>")
    for step in (0, figure.last):
        x, anchor = figure.place(step, ticks[0])[0], "start" if step == 0 else "end"
        figure.add(f"<text class=tick x={x:.1f} y={figure.height - 8} text-anchor={anchor}>{step}</text>")
    x = (figure.left + right) / 2
    figure.add(f"<text class=tick x={x} y={figure.height - 8} text-anchor=middle>step</text>")
    return figure


def gauge_figure(low: float, high: float) -> str:
    """The response tokens before training as one bar: the shares with p below 0.1 and above 0.9, and the rest between."""
    left, width = 10, 600
    shares = (
        ("weak", "p &lt; 0.1", low),
        ("middle", "between", max(0.0, 1 - low - high)),
        ("strong", "p &gt; 0.9", high),
    )
    parts, start = [], 0.0
    for kind, label, share in shares:
        x, w = left + start * width, share * width
        parts.append(f"<rect class='zone {kind}' x={x:.1f} y=4 width={max(w - 2, 1):.1f} height=24 rx=2 />")
        if share > 0.12:
            parts.append(f"<text class=zonetext x={x + w / 2:.1f} y=20 text-anchor=middle>{label}: {share:.0%}</text>")
        start += share
    return _svg(left + width + 10, 34, "response tokens by their probability before training", parts, kind="gauge")


def moving_histogram(rows: Rows, title: str) -> str:
    """How the p of the response tokens moves: the shares of the bins of p as bands over the steps, dark where p is high."""
    logged = [row for row in rows if any(key.startswith("p_histogram/") for key in row)]
    if len(logged) < 2:
        return ""
    width, height, left, top, bottom = 320, 190, 46, 24, 26
    names = [key for key in logged[0] if key.startswith("p_histogram/")]
    last = max(row["step"] for row in logged)

    def place(step: float, share: float) -> str:
        x = left + step / last * (width - left - 10)
        return f"{x:.1f},{top + (1 - share) * (height - top - bottom):.1f}"

    parts = [f"<text class=title x=0 y=12>{escape(title)}</text>"]
    below = [0.0] * len(logged)
    for k, name in enumerate(names):
        above = [base + row[name] for base, row in zip(below, logged, strict=True)]
        points = [place(r["step"], y) for r, y in zip(logged, above, strict=True)]
        points += [place(r["step"], y) for r, y in reversed(list(zip(logged, below, strict=True)))]
        tip = f"p {name.split('/')[1]}: {logged[0][name]:.1%} at step {logged[0]['step']}, {logged[-1][name]:.1%} at the end"
        opacity = 0.12 + 0.88 * k / max(1, len(names) - 1)
        parts.append(
            f"<polygon class=c1 fill-opacity={opacity:.2f} points='{' '.join(points)}'><title>{escape(tip)}</title></polygon>"
        )
        below = above
    for share in (0, 0.5, 1):
        y = float(place(0, share).split(",")[1])
        parts.append(f"<text class=tick x={left - 5} y={y + 4:.1f} text-anchor=end>{share:.0%}</text>")
    for step in (0, last):
        anchor = "start" if step == 0 else "end"
        x = place(step, 0).split(",")[0]
        parts.append(f"<text class=tick x={x} y={height - 8} text-anchor={anchor}>{step}</text>")
    parts.append(f"<text class=tick x={(left + width - 10) / 2} y={height - 8} text-anchor=middle>step</text>")
    return _svg(width, height, title, parts, kind="curve")


Panel = tuple[
    str, str, Mapping[str, float], Mapping[str, float] | None
]  # title, note, shares by bin, with a blank picture


def histogram_figure(panels: Sequence[Panel], title: str) -> str:
    """Histograms of p one below the other, on one scale: a bar a bin, and a line where a blank picture's share lies."""
    left, step, height, gap = 44, 42, 110, 62
    width = left + step * len(panels[0][2]) + 12
    most = max(max(h.values()) for _, _, bins, blank in panels for h in (bins, blank or bins))
    top = next(edge for edge in (0.1, 0.25, 0.5, 1.0, math.inf) if most <= edge + 1e-9)
    parts = [f"<text class=title x=8 y=14>{escape(title)}</text>"]
    for k, (name, note, bins, blank) in enumerate(panels):
        y0 = 30 + k * (height + gap)
        base = y0 + 22 + height
        parts.append(
            f"<text class=title x=8 y={y0 + 10}>{escape(name)} <tspan class=tick>{escape(note)}</tspan></text>"
        )
        for share in (0.0, top / 2, top):
            y = base - height * share / top
            parts.append(f"<line class=grid x1={left} x2={width - 10} y1={y:.1f} y2={y:.1f} />")
            parts.append(f"<text class=tick x={left - 6} y={y + 4:.1f} text-anchor=end>{share:.0%}</text>")
        for j, (label, share) in enumerate(bins.items()):
            x, tall = left + j * step, height * share / top
            tip = f"p {label}: {share:.1%} of tokens" + (f"; with a blank picture {blank[label]:.1%}" if blank else "")
            parts.append(
                f"<g><title>{escape(tip)}</title><rect class=c1 x={x + 3} y={base - tall:.1f} width={step - 6} "
                f"height={max(tall, 0.5):.1f} rx=1.5 />"
            )
            if blank:
                y = base - height * blank[label] / top
                parts.append(f"<path class='line c2' d='M{x + 1} {y:.1f}H{x + step - 1}' />")
            parts.append(f"</g><text class=tick x={x} y={base + 13} text-anchor=middle>{label.split('-')[0]}</text>")
        parts.append(f"<text class=tick x={left + step * len(bins)} y={base + 13} text-anchor=middle>1</text>")
        parts.append(
            f"<text class=tick x={(left + width) / 2} y={base + 26} text-anchor=middle>p of response tokens</text>"
        )
    if any(blank for *_, blank in panels):
        x = width - 210
        parts.append(
            f"<rect class=c1 x={x} y=5 width=10 height=10 rx=1.5 /><text class=tick x={x + 14} y=14>with its picture</text>"
        )
        parts.append(
            f"<path class='line c2' d='M{x + 104} 10h14' /><text class=tick x={x + 122} y=14>with a blank one</text>"
        )
    return _svg(width, 30 + len(panels) * (height + gap), title, parts, kind="histogram")


def counts_figure(bins: Rows, title: str, unit: str) -> str:
    """A histogram of counts: bars between `from` and `to`, drawn equally wide and named where there is room."""
    width, height, left, top, bottom = 320, 190, 46, 24, 26
    ticks = _ticks(0.0, max(row["count"] for row in bins))
    base, step = height - bottom, (width - left - 10) / len(bins)
    parts = [f"<text class=title x=0 y=12>{escape(title)}</text>"]
    for tick in ticks:
        y = base - tick / ticks[-1] * (base - top)
        parts.append(f"<line class=grid x1={left} x2={width - 10} y1={y:.1f} y2={y:.1f} />")
        parts.append(f"<text class=tick x={left - 5} y={y + 4:.1f} text-anchor=end>{tick:,g}</text>")
    for k, row in enumerate(bins):
        tall = row["count"] / ticks[-1] * (base - top)
        tip = f"{_edge(row['from'])} to {_edge(row['to'])} {unit}: {row['count']:,}"
        parts.append(
            f"<g><title>{escape(tip)}</title><rect class=c1 x={left + k * step + 0.5:.1f} y={base - tall:.1f} "
            f"width={max(step - 1, 1):.1f} height={tall:.1f} /></g>"
        )
    for k in sorted({0, len(bins) // 2, len(bins)}):
        edge, anchor = (bins[k]["from"] if k < len(bins) else bins[-1]["to"]), "start" if k == 0 else "middle"
        anchor = "end" if k == len(bins) else anchor
        parts.append(
            f"<text class=tick x={left + k * step:.1f} y={height - 10} text-anchor={anchor}>{_edge(edge)}</text>"
        )
    return _svg(width, height, title, parts, kind="curve")


def lines_figure(lines: Mapping[str, Sequence[tuple[float, float]]], title: str, x_name: str, y_name: str) -> str:
    """Curves over [0, 1] and their names; y from 0 to the largest value."""
    width, height, left, top, right, bottom = 560, 340, 44, 32, 110, 40
    high = _ticks(0.0, max(y for line in lines.values() for _, y in line))[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x * (width - left - right), top + (high - y) / high * (height - top - bottom)

    parts = [f"<text class=title x=8 y=14>{escape(title)}</text>"]
    for tick in _ticks(0.0, high):
        y = place(0, tick)[1]
        parts.append(f"<line class=grid x1={left} x2={width - right} y1={y:.1f} y2={y:.1f} />")
        parts.append(f"<text class=tick x={left - 6} y={y + 4:.1f} text-anchor=end>{tick:g}</text>")
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f"<text class=tick x={place(share, 0)[0]:.1f} y={height - 20} text-anchor=middle>{share:g}</text>")
    parts.append(f"<text class=tick x={place(0.5, 0)[0]:.1f} y={height - 4} text-anchor=middle>{escape(x_name)}</text>")
    parts.append(f"<text class=tick x={left} y={top + 14} dx=6>{escape(y_name)}</text>")
    for k, (name, line) in enumerate(lines.items()):
        style = f"line c{1 + k % 5}{' dashed' if k >= 5 else ''}"
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(*point) for point in line))
        parts.append(f"<polyline class='{style}' points='{points}'><title>{escape(name)}</title></polyline>")
        x, y = width - right + 18, top + 8 + 18 * k
        parts.append(
            f"<path class='{style}' d='M{x} {y}h24' /><text class=tick x={x + 30} y={y + 4}>{escape(name)}</text>"
        )
    return _svg(width, height, title, parts, kind="lines")


def standalone(svg: str) -> str:
    """An inline SVG as a file of its own: its classes' colours inside it, light and dark."""
    colours = """svg{--bg:#fff;--ink:#1c1d21;--soft:#62656e;--line:#e3e4e8;--c1:#2f6fde;--c2:#d9742b;--c3:#2d9d78;--c4:#9b5fc0;--c5:#c2455e}
@media(prefers-color-scheme:dark){svg{--bg:#15161a;--ink:#e8e9ed;--soft:#9fa3ae;--line:#33363f;--c1:#6ea0f7;--c2:#eb9a5a;--c3:#58c29f;
--c4:#bd8fdc;--c5:#e57a8e}}
.sheet{fill:var(--bg)}text{font:12px system-ui,sans-serif;fill:var(--ink)}.tick{font-size:10.5px;font-weight:400;fill:var(--soft)}
.title{font-weight:600;font-size:13px}.grid{stroke:var(--line)}.line{fill:none;stroke-width:1.8;stroke-linejoin:round}.dashed{stroke-dasharray:5 3}
.c1{fill:var(--c1)}.line.c1{fill:none;stroke:var(--c1)}.line.c2{fill:none;stroke:var(--c2)}.line.c3{fill:none;stroke:var(--c3)}
.line.c4{fill:none;stroke:var(--c4)}.line.c5{fill:none;stroke:var(--c5)}"""
    quoted = re.sub(r"([\w-]+)=([^\s'\"<>]+)", r"\1='\2'", svg)  # XML wants quotes where HTML does not
    opening, body = quoted.split(">", 1)
    width, height = re.search(r"viewBox='0 0 (\d+) (\d+)'", opening).groups()  # type: ignore[union-attr]
    return (
        f"{opening} xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}'><style>{colours}</style>"
        f"<rect class='sheet' width='100%' height='100%' />{body}\n"
    )


def _svg(width: int, height: int, label: str, parts: Sequence[str], kind: str = "bars") -> str:
    opening = f"<svg class={kind} viewBox='0 0 {width} {height}' role=img aria-label='{escape(label, quote=True)}'>"
    return opening + "".join(parts) + "</svg>"


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round values that enclose low and high."""
    span = (high - low) or 1.0
    unit = 10 ** math.floor(math.log10(span))
    step = next(m * unit for m in (0.2, 0.25, 0.5, 1, 2, 2.5, 5, 10) if span / (m * unit) <= 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]


def _edge(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"
