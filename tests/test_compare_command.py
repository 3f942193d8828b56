"""Compare command: on folders that the program's own scorers made, as a user types it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlm_dft.benchmarks import load_benchmark
from vlm_dft.cli import main
from vlm_dft.metrics import summarise
from vlm_dft.predictions import score_predictions


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, nll and dft on twelve samples a split of the embedded benchmark: 3, 6 and 9 right of each twelve."""
    folder = tmp_path_factory.mktemp("runs")
    samples = [sample for split in load_benchmark("drawn", limit=12).values() for sample in split]
    for name, right in (("base", 3), ("nll", 6), ("dft", 9)):
        place = folder / name / "drawn"
        place.mkdir(parents=True)
        rows: list[dict[str, Any]] = []
        for k, sample in enumerate(samples):
            answer = sample.record["gold_answer"] if k % 12 < right else "nobody knows"
            rows.append({"id": sample.id, "benchmark": "drawn", "split": sample.split, "response": f"Answer: {answer}",
                         "finish": "stop", "tokens": 4})  # fmt: skip
        (place / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        splits = summarise(score_predictions(samples, place / "predictions.jsonl", place / "scores.jsonl"))
        found = {"benchmark": "drawn", "model": name, "limit": 12, "splits": splits}
        (place / "results.json").write_text(json.dumps(found))
    return folder


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_base_sft_and_dft_stand_in_one_table_with_a_conclusion_in_words(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(runs / "base"), f"SFT={runs / 'nll'}", f"DFT={runs / 'dft'}"]
    assert main(["compare", *words, "--json", str(tmp_path / "found.json"), "--output", str(tmp_path / "out")]) == 0
    text = said(capsys)
    assert "base 12 25.0 ± 12.5" in text and "SFT 12 50.0 ± 14.4" in text and "DFT 12 75.0 ± 12.5" in text
    assert "By the official rule:" in text and "DFT − base: +50.0 points, 95 % interval [" in text
    assert "p = 0.03: settled, DFT is better than base" in text  # 6 of 6 discordant: 2 / 2^6 = 0.03125
    assert "DFT − SFT: +25.0 points" in text and "p = 0.25: not settled; about" in text  # 2 / 2^3
    report = json.loads((tmp_path / "found.json").read_text())
    assert list(report["runs"]) == ["base", "SFT", "DFT"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "SFT" in page and "nobody knows" in page and "data:image" in page  # the embedded set is at hand


def test_the_robust_rule_may_decide(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs / "nll"), str(runs / "dft"), "--rule", "robust", "--baseline", "dft"]) == 0
    assert "By the robust rule: drawn, test: nll − dft: " in said(capsys)


def test_a_page_alone_is_written_where_it_is_asked_for(runs: Path, tmp_path: Path) -> None:
    assert main(["compare", str(runs / "nll"), str(runs / "dft"), "--html", str(tmp_path / "page.html")]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{runs}/nll", "{runs}/gone"], "'.*gone' does not exist"),
        (["{runs}/nll", "{runs}/dft", "--output", "{runs}/dft"], "is the folder of a compared run"),
        (["{runs}/nll", "--output", "{runs}/nll/drawn/scores.jsonl"], "is a file. Expected a folder"),
        (["{runs}/nll", "--json", "{runs}/gone/x.json"], "--json .*expected the name of a file"),
        (["{runs}/nll", "--baseline", "base"], "--baseline 'base' is none of the runs"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(
    runs: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    import re

    assert main(["compare", *(word.format(runs=runs) for word in words)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_control_characters_in_labels_do_not_reach_the_terminal(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", f"\x1b[31mred={runs / 'nll'}", f"[/b]={runs / 'dft'}"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and re.search(r"by group .* n .*\[/b\]", said)  # nor are they markup


def test_the_help_is_quick_and_comparing_loads_no_torch(runs: Path) -> None:
    code = (
        "import sys; from vlm_dft.comparing import compare_runs, read_runs; "
        f"compare_runs(read_runs([{str(runs / 'nll')!r}, {str(runs / 'dft')!r}])); "
        "print([m for m in ('torch', 'transformers', 'scipy.stats') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
