"""Probe report: what probing.gauge found in, a terminal table and a plot (one SVG file) of the histograms out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_dft.kinds import MEANING
from vlm_dft.report_charts import histogram_figure, standalone

ALL = "all sources"
BLOCKS = " ▁▂▃▄▅▆▇█"


def named_rows(found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """{source: summary}; with several sources, the total last."""
    sources: Mapping[str, Any] = found["sources"]
    return dict(sources) if len(sources) == 1 else {**sources, ALL: found}


def probe_table(found: Mapping[str, Any]) -> Any:
    """A rich table: per source the counts, and p with the picture and with a blank one."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), caption_justify="left",
        caption="p: the model's probability of a response token, ± standard error over\nresponses; bins from 0, 1e-4, 1e-3, .01, .1, .2 to 1; "
        "blank: change of\nmean p when the pictures are blank",
    )  # fmt: skip
    for title, side in (
        ("source", "left"), ("tokens", "right"), ("mean p", "right"), ("median", "right"), ("< 0.1", "right"),
        ("p 0 to 1", "left"), ("blank", "right"),
    ):  # fmt: skip
        table.add_column(title, justify=side, no_wrap=title != "source", overflow="fold")  # type: ignore[arg-type]
    for source, row in named_rows(found).items():
        blank = row["blank"]
        table.add_row(
            Text(source), f"{row['tokens']:,}", f"{row['mean_p']:.3f}±{row['stderr_p']:.3f}", f"{row['median_p']:.3f}",
            f"{row['share_p_below_0.1']:.0%}", _sparkline(row["histogram"]),
            "no pictures" if blank is None else f"{-blank['gain']:+.3f}±{blank['stderr_gain']:.3f}",
        )  # fmt: skip
    return table


def probe_lines(found: Mapping[str, Any]) -> list[str]:
    """What the numbers mean and what to do, in words: a few lines for each source."""
    lines = []
    for source, row in named_rows(found).items():
        if source == ALL:
            continue
        lines.append(f"{source}: {row['prediction']}")
        blank = row["blank"]
        if blank is not None:
            change = f"mean p {row['mean_p']:.3f} with its picture, {blank['mean_p']:.3f} with a blank one"
            seen = "the model looks at the pictures" if blank["looking"] else (
                "the model hardly looks: the answers follow from the text, or it cannot read these pictures"
            )  # fmt: skip
            lines.append(f"  {change}: {seen}.")
        starved = [kind for kind, kinds in row["kinds"].items() if kinds["share_p_below_0.1"] > 0.5]
        for kind in starved:
            kinds = row["kinds"][kind]
            lines.append(
                f"  {MEANING[kind]}: mean p {kinds['mean_p']:.3f}, {kinds['share_p_below_0.1']:.0%} of {kinds['tokens']:,} below "
                f"0.1: DFT starves them" + (f"; --full_weight {kind}" if kind in row["full_weight"] else "") + "."
            )
        command = f"OBJECTIVE='{row['objective']}'" + "".join(
            f" --full_weight {','.join(row['full_weight'])}" for _ in row["full_weight"][:1]
        )
        lines.append(f"  recommended: {command}")
    sources: Mapping[str, Any] = found["sources"]
    if len({row["objective"] for row in sources.values()}) > 1:
        pairs = ",".join(f"{name}={row['objective'].split('(')[0]}" for name, row in sources.items())
        lines.append(f"in one run: --source_objectives {pairs}")
    return lines


def probe_plot(found: Mapping[str, Any], title: str) -> str:
    """An SVG file: the histogram of p of each source, with the picture and with a blank one."""
    panels = [
        (source, f"mean p {row['mean_p']:.3f}, {row['tokens']:,} tokens" + ("" if source == ALL else f": {row['objective']}"), row["histogram"],
         row["blank"] and row["blank"]["histogram"])
        for source, row in named_rows(found).items()
    ]  # fmt: skip
    return standalone(histogram_figure(panels, title))


def _sparkline(histogram: Mapping[str, float]) -> str:
    """Thirteen blocks, one a bin; a share above zero is seen."""
    top = max(histogram.values()) or 1.0
    return "".join(BLOCKS[0 if not share else max(1, round(8 * share / top))] for share in histogram.values())
