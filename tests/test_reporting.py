"""Reports: what a run folder ends with, from results whose numbers can be counted by hand."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from vlm_dft.chat import Sample
from vlm_dft.metrics import summarise
from vlm_dft.predictions import score_predictions
from vlm_dft.report_charts import _ticks
from vlm_dft.report_html import choose_samples
from vlm_dft.reporting import percent, report_table, write_report

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)> & Answer: "
VERDICTS = {"base": "1000000000", "dft": "1111111100", "nll": "0111111111"}
VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """Elements and attributes of a page; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    splits: dict[str, list[Sample]] = {"test": [], "ood_colour": []}
    for k in range(10):
        split, task = ("test" if k < 6 else "ood_colour"), ("count" if k % 2 else "<b>bars</b>")
        content = [{"type": "image"}, {"type": "text", "text": f"How <many> in {k}?"}]
        record = {"gold_answer": str(k), "scorer": "drawn"}
        image = Image.new("RGB", (2000, 1000), "red")
        splits[split].append(
            Sample(f"s{k}", [{"role": "user", "content": content}], [image], "drawn", split, record, {"task": task})
        )
    samples = [s for split in splits.values() for s in split]
    runs, folders = {}, {}
    for run, verdicts in VERDICTS.items():
        folder = folders[run] = tmp_path / run
        folder.mkdir()
        said = [EVIL + (s.id[1:] if v == "1" else "wrong") for s, v in zip(samples, verdicts, strict=True)]
        lines = [
            json.dumps({"id": s.id, "split": s.split, "response": r, "finish": "stop"})
            for s, r in zip(samples, said, strict=True)
        ]
        (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
        runs[run] = summarise(score_predictions(samples, folder / "predictions.jsonl", folder / "scores.jsonl"))
    logged = [{"step": k, "loss": 1 / k, "nll": 2 / k, "mean_p": 1 - 1 / k} for k in range(1, 9)]
    return {
        "runs": runs,
        "training": {run: {"checkpoint": f"runs/x/{run}", "steps": 8, "metrics": logged} for run in ("dft", "nll")},
        "gauge": {
            "mean_p": 0.62,
            "tokens": 1000,
            "stderr_p": 0.01,
            "share_p_below_0.1": 0.2,
            "share_p_above_0.9": 0.5,
            "prediction": "strong prior <i>: DFT holds.",
        },
        "recipe": {"name": "drawn_noisy", "description": "noisy & <known>"},
        "config": {"model": "tiny", "benchmark": "drawn"},
        "accounting": {"total": {"used": 300}},
        "samples": splits,
        "folders": folders,
    }


def test_the_report_keeps_accuracy_error_and_count_per_run_split_and_task(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    report = write_report(tmp_path, **arguments)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert list(report["runs"]) == ["base", "dft", "nll"]
    found = report["runs"]["base"]["test"]
    assert (found["accuracy"], found["count"]) == (pytest.approx(1 / 6), 6)
    assert found["stderr"] == pytest.approx(0.1521452)  # sqrt(1/6 * 5/6 / 6)
    assert report["runs"]["dft"]["ood_colour"]["groups"]["task"]["count"]["accuracy"] == 0.5
    assert report["training"]["dft"]["checkpoint"] == "runs/x/dft"
    assert (report["training"]["dft"]["first"]["step"], report["training"]["dft"]["last"]["step"]) == (1, 8)
    assert report["versions"]["packages"]["torch"]


def test_runs_are_compared_pairwise_on_the_same_samples(tmp_path: Path, arguments: dict[str, Any]) -> None:
    report = write_report(tmp_path, **arguments)
    whole = {(c["run"], c["against"]): c for c in report["comparisons"] if c["split"] == "test" and c["group"] is None}
    assert {pair: (c["only_second"], c["only_first"], c["count"]) for pair, c in whole.items()} == {
        ("dft", "base"): (5, 0, 6),
        ("nll", "base"): (5, 1, 6),
        ("nll", "dft"): (0, 1, 6),
    }
    assert whole["dft", "base"]["p_value"] == 0.0625


def test_the_page_is_self_contained_and_well_formed(tmp_path: Path, arguments: dict[str, Any]) -> None:
    write_report(tmp_path, **arguments)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.all("link")
    assert [a for a in page.all("script") if "src" in a] == []
    assert all((a["src"] or "").startswith("data:image/png;base64,") for a in page.all("img"))
    assert re.findall(r"url\(|@import", text) == []
    assert len(page.all("article")) == 10
    assert len(page.all("polyline")) == 6  # three quantities, two objectives
    assert "<b>0.620 ± 0.010</b>" in text and "p &gt; 0.9: 50%" in text and "arXiv 2508.05629" in text
    assert "prefers-color-scheme:dark" in text
    assert len(text) < 300_000  # images are made small


def test_responses_and_data_cannot_write_into_the_page(tmp_path: Path, arguments: dict[str, Any]) -> None:
    write_report(tmp_path, **arguments)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(Page(text).all("script")) == 1
    for raw in ("<script>alert", "onerror=alert(1)>", "<many>", "<b>bars</b>", "<known>", "<i>: DFT"):
        assert raw not in text
    assert "&lt;script&gt;alert" in text and "noisy &amp; &lt;known&gt;" in text


def test_filters_select_by_who_is_right_and_who_is_wrong(tmp_path: Path, arguments: dict[str, Any]) -> None:
    write_report(tmp_path, **arguments)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    filters = [(a["data-right"], a["data-wrong"]) for a in page.all("button")]
    assert filters == [
        ("", ""),
        ("dft", "base"),
        ("base", "dft"),
        ("nll", "base"),
        ("base", "nll"),
        ("nll", "dft"),
        ("dft", "nll"),
    ]
    cards = [(a["data-right"], a["data-wrong"]) for a in page.all("article")]
    assert sorted(set(cards)) == [("base dft", "nll"), ("dft nll", "base"), ("nll", "base dft")]
    assert cards.count(("dft nll", "base")) == 7


def test_shown_samples_cover_every_outcome_and_split(arguments: dict[str, Any]) -> None:
    samples = [s for split in arguments["samples"].values() for s in split]
    judged = {
        run: {s.id: {"correct": v == "1"} for s, v in zip(samples, verdicts, strict=True)}
        for run, verdicts in VERDICTS.items()
    }
    shown = choose_samples(samples, judged, count=4)
    assert "s0" in {s.id for s in shown}  # the only one that base and dft have right and nll wrong
    assert {s.split for s in shown} == {"test", "ood_colour"}


def test_a_run_without_a_benchmark_still_gets_a_page(tmp_path: Path, arguments: dict[str, Any]) -> None:
    report = write_report(tmp_path, runs={}, training=arguments["training"], folders=arguments["folders"])
    assert (report["runs"], report["comparisons"]) == ({}, [])
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.all("polyline") and not page.all("table")[1:]


def test_the_terminal_table_fits_eighty_columns(tmp_path: Path, arguments: dict[str, Any]) -> None:
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    console.print(report_table(write_report(tmp_path, **arguments)))
    text = console.export_text()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "test 6 16.7 ± 15.2 100.0 ± 0.0 +83.3 ± 15.2 83.3 ± 15.2 +66.7 ± 30.4" in lines
    assert "<b>bars</b> 3 33.3 ± 27.2 100.0 ± 0.0 +66.7 ± 27.2 66.7 ± 27.2 +33.3 ± 54.4" in lines


def test_one_model_alone_makes_a_table_without_changes(arguments: dict[str, Any]) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report_table({"runs": {"checkpoint-8": arguments["runs"]["dft"]}}))
    assert "Δ" not in console.export_text()


def test_percentages_carry_their_error_and_sign() -> None:
    assert percent(0.98, 0.007) == "98.0 ± 0.7"
    assert percent(-0.031, 0.008, signed=True) == "-3.1 ± 0.8"


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1), (0, 3.7), (-0.2, 0.013), (0, 1e-7), (0, 12345.6)])
def test_axis_ticks_enclose_the_values_and_are_few(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 7
