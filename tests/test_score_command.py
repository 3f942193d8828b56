"""vlm-dft score: the files of every harness, without a model and without torch; the scores that the authors' code gave."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlm_dft.cli import main
from vlm_dft.foreign_predictions import read_predictions

PROBLEMS = [
    {
        "id": f"p{k}",
        "question": f"How many bars are taller than bar number {k} here?",
        "answer": str(k),
        "kind": ("even", "odd")[k % 2],
    }
    for k in range(8)
]
CARD = {
    "description": "d", "licence": "l", "splits": {"test": {"files": ["problems.jsonl"]}}, "prompt": "{question}", "answer": "answer",
    "record": {"question": "question"}, "groups": ["kind"], "scorer": "drawn", "max_new_tokens": 8,
}  # fmt: skip


def lines(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ours(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"benchmark": "bars", "split": "test", **row} for row in rows]


@pytest.fixture
def bars(tmp_path: Path) -> list[str]:
    """Words that name a benchmark of eight problems and its data."""
    lines(tmp_path / "data" / "problems.jsonl", PROBLEMS)
    (tmp_path / "bars.yaml").write_text(yaml.safe_dump(CARD, sort_keys=False))
    return ["--benchmark", str(tmp_path / "bars.yaml"), "--data", str(tmp_path / "data")]


def score(*words: object) -> int:
    return main(["score", *map(str, words)])


ANSWERS = ours(
    {"id": p["id"], "response": f"Answer: {0 if p['kind'] == 'odd' else p['answer']}", "finish": "stop", "tokens": 2}
    for p in PROBLEMS
)


def test_scores_with_both_rules_groups_and_counts_are_written_and_shown(
    bars: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lines(tmp_path / "predictions.jsonl", ANSWERS)
    assert score(path, *bars, "--json", tmp_path / "r.json", "--output", tmp_path / "out") == 0
    said = json.loads((tmp_path / "r.json").read_text())
    test = said["splits"]["test"]
    assert (test["accuracy"], test["count"], test["robust"]["accuracy"], test["abstained"]) == (0.5, 8, 0.5, 0)
    assert test["stderr"] == pytest.approx((0.25 / 8) ** 0.5)
    assert {value: found["accuracy"] for value, found in test["groups"]["kind"].items()} == {"even": 1.0, "odd": 0.0}
    assert said["source"] | {"samples_from": "", "file": ""} == {
        "file": "", "format": "vlm-dft", "samples_from": "", "matched_by": "id", "responses": 8, "scored": 8, "samples": 8,
        "missing": {"count": 0, "first": None}, "unknown": {"count": 0, "first": None}, "unreadable": {"count": 0, "first": None},
        "oddities": {}, "over_all_samples": None, "remarks": [],
    }  # fmt: skip
    folder = tmp_path / "out" / "bars"
    assert json.loads((folder / "results.json").read_text()) == said
    assert sorted(p.name for p in folder.iterdir()) == ["predictions.jsonl", "results.json", "scores.jsonl"]
    assert [json.loads(line)["correct"] for line in (folder / "scores.jsonl").read_text().splitlines()] == [
        True,
        False,
    ] * 4
    shown = capsys.readouterr().out
    assert "8 responses, format of vlm-dft" in shown and "even" in shown and shown.count("50.0 ± 17.7") == 2


def test_scoring_again_what_was_written_gives_the_same_bytes(bars: list[str], tmp_path: Path) -> None:
    path = lines(tmp_path / "predictions.jsonl", ANSWERS)
    assert score(path, *bars, "--output", tmp_path / "one") == 0
    assert score(tmp_path / "one", *bars, "--output", tmp_path / "two") == 0
    for name in ("scores.jsonl", "predictions.jsonl"):
        assert (tmp_path / "one/bars" / name).read_bytes() == (tmp_path / "two/bars" / name).read_bytes()
    before = (tmp_path / "one/bars/predictions.jsonl").stat().st_mtime_ns
    assert score(tmp_path / "one", *bars, "--output", tmp_path / "one") == 0  # in its place
    assert (tmp_path / "one/bars/predictions.jsonl").stat().st_mtime_ns == before


def test_a_runs_own_results_say_its_data_limit_and_protocol(bars: list[str], tmp_path: Path) -> None:
    folder = lines(tmp_path / "run/bars/predictions.jsonl", ANSWERS[:3]).parent
    (folder / "results.json").write_text(
        json.dumps({"model": "M", "data": bars[3], "limit": 3, "protocol": "official", "engine": "e"})
    )
    assert score(tmp_path / "run", *bars[:2], "--json", tmp_path / "r.json") == 0
    said = json.loads((tmp_path / "r.json").read_text())
    assert (said["model"], said["limit"], said["protocol"], said["engine"], said["splits"]["test"]["count"]) == (
        "M",
        3,
        "official",
        "e",
        3,
    )


def test_a_training_runs_folder_says_its_data_and_limit_too(bars: list[str], tmp_path: Path) -> None:
    lines(tmp_path / "run/dft/predictions.jsonl", ANSWERS[:3])
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({"data": bars[3], "evaluation": {"eval_limit": 3}}))
    assert score(tmp_path / "run/dft", *bars[:2], "--json", tmp_path / "r.json") == 0
    said = json.loads((tmp_path / "r.json").read_text())
    assert (said["model"], said["limit"], said["splits"]["test"]["count"]) == ("dft", 3, 3)


def test_what_is_missing_is_refused_or_scored_in_sight(
    bars: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six of eight samples answered, three of them right, and one response of no sample: 3/6 of those there, 3/8 of all."""
    path = lines(tmp_path / "predictions.jsonl", [*ANSWERS[:6], {**ANSWERS[7], "id": "p99"}])
    with path.open("a") as file:
        file.write('{"id": "p7", "resp')
    assert score(path, *bars) == 2
    assert "line 8: not valid JSON" in capsys.readouterr().err
    assert score(path, *bars, "--allow-partial", "--json", tmp_path / "r.json") == 0
    shown = capsys.readouterr().out.replace("\n", " ")
    for words in ("partial: 1 rows cannot be read", "partial: 1 responses are of no sample, and not scored (first: p99)",
                  "partial: 2 samples have no response, or fewer than others (first: p6)",
                  "of the 6 responses that are there; over all 8 samples, a missing one wrong: official 37.5 %, robust 37.5 %"):  # fmt: skip
        assert words in shown
    said = json.loads((tmp_path / "r.json").read_text())
    assert (said["splits"]["test"]["accuracy"], said["source"]["over_all_samples"]) == (
        0.5,
        {"accuracy": 0.375, "robust": 0.375},
    )


REFUSED = {
    "another benchmark's rows": ([{**ANSWERS[0], "benchmark": "lines"}], "is not of bars: its rows are of lines"),
    "nothing known": ([{**row, "id": f"x{k}"} for k, row in enumerate(ANSWERS)], r"no response is of a sample of bars"),
    "two answers": ([*ANSWERS, {**ANSWERS[3], "response": "Answer: 3"}], "sample 'p3' has another response in row 3"),
    "missing": (ANSWERS[:5], "3 samples without a prediction, first 'p5'.*--allow-partial"),
    "no rows": ([], "is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_predictions_are_refused_and_nothing_is_written(
    case: str, bars: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, message = REFUSED[case]
    path = lines(tmp_path / "predictions.jsonl", rows)
    assert score(path, *bars, "--output", tmp_path / "out", "--json", tmp_path / "r.json") == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists() and not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "lmms-eval", "x.xlsx"], "unknown format"),
        (["--to", "vlmevalkit", "x.csv"], "expected a name that ends in .xlsx or .tsv"),
        (["--to", "vlmevalkit", "again.tsv"], "is the file that is scored. Choose another"),
        (["--to", "vlmevalkit", "nowhere/x.tsv"], "in a folder that can be written to"),
        (["--json", "nowhere/x.json"], "in a folder that can be written to"),
        (["--judge", "http://localhost:1/v1"], "needs both --judge URL and --judge-model"),
        (["--output", "predictions.jsonl"], "is a file. Expected a folder"),
        (["--protocol", "offical"], "Did you mean 'official'"),
    ],
)
def test_mistaken_words_are_said_before_the_work(
    words: list[str],
    message: str,
    bars: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "predictions.jsonl", ANSWERS)
    (tmp_path / "again.tsv").symlink_to("predictions.jsonl")
    assert score("predictions.jsonl", *bars, *words) == 2
    assert message in capsys.readouterr().err


def test_a_reader_that_goes_does_not_stop_the_work_and_a_full_disk_is_said(bars: list[str], tmp_path: Path) -> None:
    file = lines(tmp_path / "predictions.jsonl", ANSWERS)
    words = [sys.executable, "-m", "vlm_dft.cli", "score", str(file), *bars]
    read, write = os.pipe()
    os.close(read)
    gone = subprocess.run([*words, "--output", str(tmp_path / "out")], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (gone.returncode, gone.stderr) == (0, b"") and (tmp_path / "out" / "bars" / "results.json").is_file()
    full = f"ulimit -f 0; exec {shlex.join([*words, '--json', str(tmp_path / 'r.json')])}"
    said = subprocess.run(["bash", "-c", full], capture_output=True, text=True)
    assert said.returncode == 2 and f"error: {tmp_path / 'r.json'}: File too large." in said.stderr
    assert not (tmp_path / "r.json").exists() and not list(tmp_path.glob(".*"))


def test_predictions_of_another_run_are_not_written_over(
    bars: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(lines(tmp_path / "a.jsonl", ANSWERS), *bars, "--output", tmp_path / "out") == 0
    other = lines(tmp_path / "b.jsonl", [{**row, "response": "Answer: 0"} for row in ANSWERS])
    assert score(other, *bars, "--output", tmp_path / "out") == 2
    assert "holds other predictions of bars" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Model_bars.xlsx", "Model_bars.tsv"])
def test_our_predictions_go_to_vlmevalkit_and_back(
    name: str, bars: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lines(tmp_path / "predictions.jsonl", ANSWERS)
    assert score(path, *bars, "--to", "vlmevalkit", tmp_path / name) == 0
    assert "8 rows for VLMEvalKit, read back the same" in capsys.readouterr().out
    assert score(tmp_path / name, *bars, "--json", tmp_path / "data.json") == 0
    assert score(tmp_path / name, *bars[:2], "--json", tmp_path / "rows.json") == 0  # without --data
    with_data, alone = (json.loads((tmp_path / f"{k}.json").read_text()) for k in ("data", "rows"))
    assert with_data["splits"]["test"]["accuracy"] == alone["splits"]["test"]["accuracy"] == 0.5
    assert (
        with_data["source"]["matched_by"] == "id"
        and alone["source"]["samples_from"] == "the file's own rows (no --data)"
    )


def test_lmms_evals_samples_are_found_by_their_place(bars: list[str], tmp_path: Path) -> None:
    rows = [
        {
            "doc_id": k,
            "target": p["answer"],
            "input": f"<image>\n{p['question']}\nSay it.",
            "filtered_resps": [f"Answer: {p['answer']}"],
        }
        for k, p in enumerate(PROBLEMS)
    ]
    path = lines(tmp_path / "20250101_000000_samples_bars.jsonl", reversed(rows))
    assert score(path, *bars, "--json", tmp_path / "r.json") == 0
    said = json.loads((tmp_path / "r.json").read_text())
    assert (
        said["splits"]["test"]["accuracy"] == 1 and said["source"]["matched_by"] == "place in the data, counted from 0"
    )


def test_a_judge_is_asked_where_the_protocol_wants_one_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that always extracts B, and the same again without one: the replies are kept."""
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers["Content-Length"])))
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                     "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "B"}}]}  # fmt: skip
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_: object) -> None: ...

    row = {
        "question": "Which?",
        "choices": ["red", "blue"],
        "answer": "blue",
        "question_type": "multi_choice",
        "answer_type": "text",
        "metadata": {},
    }
    path = lines(
        tmp_path / "output.jsonl",
        [{**row, "pid": k, "response": f"It could be said, by {k} of us, to be like the sea."} for k in range(5)],
    )
    words = ["--benchmark", "mathvista", "--output", tmp_path / "out", "--judge-model", "m"]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert score(path, *words, "--judge", f"http://127.0.0.1:{server.server_port}/v1") == 0
    finally:
        server.shutdown()
        server.server_close()
    assert len(asked) == 5
    rows = [json.loads(line) for line in (tmp_path / "out/mathvista/scores.jsonl").read_text().splitlines()]
    assert [(r["correct"], r["extracted"]) for r in rows] == [(True, "B")] * 5 and {r["decided_by"] for r in rows} == {
        "m"
    }
    assert score(path, *words, "--judge", f"http://127.0.0.1:{server.server_port}/v1") == 0
    assert "judge m: 0 asked, 5 from the cache" in capsys.readouterr().out


def test_scoring_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    """With several processes that share the work, too."""
    row = {
        "question": "q",
        "choices": ["a", "b"],
        "answer": "b",
        "question_type": "multi_choice",
        "answer_type": "text",
        "metadata": {},
        "response": "(B)",
    }
    lines(tmp_path / "m.jsonl", [{**row, "pid": k} for k in range(200)])
    code = (
        "import sys; from vlm_dft import predictions, workers; from vlm_dft.cli import main; predictions.MANY, workers.cores = 100, lambda: 2; "
        f"status = main(['score', {str(tmp_path / 'm.jsonl')!r}, '--benchmark', 'mathvista', '--to', 'vlmevalkit', {str(tmp_path / 'm.xlsx')!r}]); "
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'openai'} & set(sys.modules); assert not heavy, heavy; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "200 rows" in done.stdout and len(read_predictions(tmp_path / "m.xlsx").predictions) == 200


def test_mathvistas_stored_extractions_give_every_stored_verdict(shared: Path, tmp_path: Path) -> None:
    words = ["--benchmark", "mathvista", "--json", tmp_path / "r.json", "--output", tmp_path / "out"]
    assert score(shared / "mathvista/results/bard", *words) == 0
    said = json.loads((tmp_path / "r.json").read_text())
    assert main(["compare", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert (
        "we cannot find the work by simply multiplying" in page and "data were not found" not in page
    )  # the file's rows
    stored = said["stored"]
    assert (
        stored["extractions"],
        stored["extractions_right"],
        stored["verdicts_right"],
        stored["extraction_differs"],
    ) == (182, 55, 55, 0)
    assert stored["official_differs"] <= 3  # end to end, from the response, where GPT extracted
    assert said["source"]["remarks"] == [
        "the whole set has 1,000 samples: this score is not comparable with published ones"
    ]


@pytest.mark.parametrize(
    ("file", "right"),
    [("closed-source/Gemini/Gemini-Pro-CoT", 32), ("open-source/Internlm/InternLM-XComposer2-VL-CoT", 35)],
)
def test_mathvs_stored_verdicts_are_ours_to_the_last(file: str, right: int, shared: Path, tmp_path: Path) -> None:
    words = ["--benchmark", "mathvision", "--data", shared / "mathvision", "--json", tmp_path / "r.json"]
    assert score(shared / f"mathvision/outputs/{file}.jsonl", *words) == 0
    said = json.loads((tmp_path / "r.json").read_text())
    assert (said["stored"]["verdicts"], said["stored"]["verdicts_right"], said["stored"]["official_differs"]) == (
        253,
        right,
        0,
    )
    assert said["splits"]["test"]["count"] == 253 and round(said["splits"]["test"]["accuracy"] * 253) == right


def test_the_output_of_wemaths_own_code_is_scored_with_its_four_metrics(shared: Path, tmp_path: Path) -> None:
    """A responder that always says A: right where the answer is A, by count."""
    rows = json.loads((shared / "wemath/data/testmini.json").read_text())
    (tmp_path / "output.json").write_text(json.dumps([{**row, "response": "Think. Answer: A"} for row in rows]))
    for data in ([], ["--data", str(shared / "wemath")]):
        assert score(tmp_path / "output.json", "--benchmark", "wemath", *data, "--json", tmp_path / "r.json") == 0
        test = json.loads((tmp_path / "r.json").read_text())["splits"]["testmini"]
        assert round(test["accuracy"] * len(rows)) == sum(row["answer"] == "A" for row in rows)
        assert "four_dimensional" in test["extra"]


def test_the_bard_file_is_matched_to_the_benchmarks_own_data_through_vlmevalkits_form(
    shared: Path, tmp_path: Path
) -> None:
    bard = shared / "mathvista/results/bard/output_bard.json"
    assert (
        score(
            bard,
            "--benchmark",
            "mathvista",
            "--to",
            "vlmevalkit",
            tmp_path / "Bard_MathVista_MINI.xlsx",
            "--json",
            tmp_path / "a.json",
        )
        == 0
    )
    assert score(tmp_path / "Bard_MathVista_MINI.xlsx", "--benchmark", "mathvista", "--json", tmp_path / "b.json") == 0
    first, second = (json.loads((tmp_path / f"{k}.json").read_text())["splits"] for k in "ab")
    assert first["testmini"]["accuracy"] == next(iter(second.values()))["accuracy"]
    words = ["--benchmark", "mathvista", "--data", shared / "mathvista"]
    assert score(tmp_path / "Bard_MathVista_MINI.xlsx", *words) == 2  # the data here are 62 of the file's 182 problems
    assert score(tmp_path / "Bard_MathVista_MINI.xlsx", *words, "--allow-partial", "--json", tmp_path / "c.json") == 0
    source = json.loads((tmp_path / "c.json").read_text())["source"]
    assert (source["scored"], source["unknown"]["count"], source["missing"]["count"], source["matched_by"]) == (
        62,
        120,
        0,
        "id",
    )
