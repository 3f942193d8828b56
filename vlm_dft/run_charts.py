"""Run charts: the rows of metrics.jsonl in; loss.svg and p_histogram.svg in the run folder out, each whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_dft.report_charts import curves_figure, histogram_figure, standalone
from vlm_dft.runs import write_text

Rows = Sequence[Mapping[str, Any]]
BINS = "p_histogram/"


def write_charts(folder: Path, rows: Rows) -> None:
    """Draw what has been logged so far; nothing before the first log."""
    if svg := loss_chart(rows):
        write_text(folder / "loss.svg", standalone(svg))
    if svg := p_chart(rows):
        write_text(folder / "p_histogram.svg", standalone(svg))


def loss_chart(rows: Rows) -> str:
    """The objective's loss, and beside it the NLL of the same tokens, over the steps: DFT's loss is far below it."""
    shown = (("loss", "loss"), ("nll", "NLL of the response tokens"))
    figures = [curves_figure({title: rows}, key, title, {title: "c1"}) for key, title in shown]
    figures = [figure for figure in figures if figure]
    placed = [
        figure.replace("<svg ", f"<svg x={8 + 336 * k} y=8 width=320 height=190 ", 1)
        for k, figure in enumerate(figures)
    ]
    opening = f"<svg class=curve viewBox='0 0 {336 * len(placed)} 206' role=img aria-label='loss and NLL'>"
    return f"{opening}{''.join(placed)}</svg>" if placed else ""


def p_chart(rows: Rows) -> str:
    """The shares of the response tokens in bins of p: at the first logged step and at the last."""
    logged = [row for row in rows if any(key.startswith(BINS) for key in row)]
    ends = logged[:1] + logged[-1:] if len(logged) > 1 else logged
    panels = [
        (
            f"step {row['step']}",
            f"{row.get('response_tokens', 0):,} response tokens, mean p {row.get('mean_p', math.nan):.3f}",
            {key.removeprefix(BINS): float(share) for key, share in row.items() if key.startswith(BINS)},
            None,
        )
        for row in ends
    ]
    return histogram_figure(panels, "p of the response tokens") if panels else ""
