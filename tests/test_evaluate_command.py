"""`vlm-dft evaluate`: several benchmarks in one folder, gone on with, refused when changed, asked as in training."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_judge import Server, server  # noqa: F401
from test_judge import said as replied
from test_serving import Fake, fake  # noqa: F401

from vlm_dft import evaluating
from vlm_dft.as_trained import asking_of
from vlm_dft.cli import main
from vlm_dft.errors import ConfigError
from vlm_dft.locate import EMBEDDED
from vlm_dft.prediction_file import meta_of
from vlm_dft.runs import hold

CARD = {
    "description": "Sums.", "licence": "own", "splits": {"test": {"files": ["sums.jsonl"]}}, "prompt": "{question}",
    "answer": "answer", "record": {"question": "question"}, "scorer": "drawn", "max_new_tokens": 6,
}  # fmt: skip


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """A benchmark of one's own: its card, and the folder of its rows beside it."""
    (tmp_path / "data").mkdir()
    rows = [{"id": f"r{k}", "question": f"What is {k} + {k}?", "answer": str(2 * k)} for k in range(3)]
    (tmp_path / "data" / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("sums", "more"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(CARD))
    return tmp_path / "sums.yaml"


def words(sums: Path, *more: str, also: tuple[str, ...] = ()) -> list[str]:
    out = sums.parent / "out"
    return [
        "evaluate",
        str(sums),
        *also,
        "--model",
        "tiny",
        "--data",
        str(sums.parent / "data"),
        "--output",
        str(out),
        *more,
    ]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_several_benchmarks_are_answered_scored_and_reported_in_one_folder(
    sums: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    out = sums.parent / "out"
    asked = [
        *words(sums, "--limit", "2", "--max-new-tokens", "4", also=(str(sums.with_name("more.yaml")),)),
        "--json",
        str(sums.parent / "all.json"),
    ]
    asked[asked.index("--data") + 1] = f"sums={sums.parent / 'data'}"
    asked += ["--data", str(sums.parent / "data")]
    assert main(asked) == 0
    for name, count in (("sums", 2), ("more", 2)):
        found = {file: (out / name / file).read_text() for file in ("predictions.jsonl", "scores.jsonl")}
        assert [len(text.splitlines()) for text in found.values()] == [count, count]
        result = json.loads((out / name / "results.json").read_text())
        assert (result["benchmark"], result["model"], result["limit"], result["engine"]) == (
            name,
            "tiny",
            2,
            "transformers",
        )
        assert result["decoding"] == {"temperature": 0.0, "samples": 1, "max_new_tokens": 4}
    report = json.loads((out / "report.json").read_text())
    assert set(report["benchmarks"]) == {"sums", "more"}
    assert report["benchmarks"]["sums"]["test"]["runs"]["tiny"]["count"] == 2
    assert "What is 1 + 1?" in (out / "report.html").read_text()
    assert json.loads((sums.parent / "all.json").read_text())["benchmarks"].keys() == report["benchmarks"].keys()
    assert "sums, test" in said(capsys)

    files = {path: path.read_bytes() for path in out.glob("*/predictions.jsonl")}
    assert main(asked) == 0  # there is nothing left to do
    assert all(path.read_bytes() == content for path, content in files.items())

    def never(name: str) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(evaluating, "load_for_answers", never)
    capsys.readouterr()
    assert main([*asked, "--max-new-tokens", "5"]) == 2
    assert "max_new_tokens: 4 there, 5 now" in said(capsys)
    assert main([*asked, "--samples", "2", "--seed", "3"]) == 2
    assert "decoding: {'temperature': 0.0, 'samples': 1} there, {'samples': 2" in said(capsys)
    (sums.parent / "data" / "sums.jsonl").write_text(json.dumps({"id": "new", "question": "?", "answer": "1"}) + "\n")
    assert main(asked) == 2
    assert "(samples: 2 there, 1 now)" in said(capsys)


def test_draws_are_scored_each_and_summed_up(sums: Path) -> None:
    assert main(words(sums, "--samples", "3", "--top-p", "0.9", "--seed", "4", "--batch-size", "2")) == 0
    rows = [json.loads(line) for line in (sums.parent / "out/sums/scores.jsonl").read_text().splitlines()]
    assert [(row["id"], row["draw"]) for row in rows[:4]] == [("r0", 0), ("r0", 1), ("r0", 2), ("r1", 0)]
    result = json.loads((sums.parent / "out/sums/results.json").read_text())
    wanted = {"samples": 3, "temperature": 1.0, "top_p": 0.9, "seed": 4, "max_new_tokens": 6}
    assert result["decoding"] == wanted and result["splits"]["test"]["count"] in (3, 9)


def test_a_server_that_leaves_responses_out_ends_with_status_1_and_the_same_command_asks_for_them(
    sums: Path, fake: Fake, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    fake.reply = lambda text, attempt, asked: (
        (400, {"error": {"message": "no"}}, {}) if "1 + 1" in text else "Answer: 4"
    )
    asked = words(sums, "--engine", "openai", "--base-url", fake.url)
    asked[asked.index("--model") + 1] = "tuned"
    assert main(asked) == 1
    assert "sums: 1 responses are missing, so it is not scored" in said(capsys)
    assert not (sums.parent / "out/sums/results.json").exists()
    fake.reply = lambda text, attempt, asked: "Answer: 2"
    assert main(asked) == 0
    assert len(fake.asked) == 4
    assert json.loads((sums.parent / "out/sums/results.json").read_text())["splits"]["test"][
        "accuracy"
    ] == pytest.approx(2 / 3)


def test_a_full_disk_is_said_and_what_was_answered_is_kept(
    sums: Path, fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    def full(*words: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluating, "score_predictions", full)
    asked = words(sums, "--engine", "openai", "--base-url", fake.url)
    asked[asked.index("--model") + 1] = "tuned"
    assert main(asked) == 2
    assert "No space left on device. What was answered is kept there: free some space" in said(capsys)
    assert len((sums.parent / "out/sums/predictions.jsonl").read_text().splitlines()) == 3


def test_a_named_judge_decides_and_that_is_said_and_kept(
    sums: Path,
    server: Server,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """MathVerse's judge extracts, then says 0 or 1: here that every response is right."""
    sums.write_text(yaml.safe_dump({**CARD, "scorer": "mathverse"}))
    server.answer = lambda number, prompt: replied("1")
    assert main(words(sums, "--judge", server.url, "--judge-model", "sage")) == 0
    assert "sums: judge sage: " in said(capsys) and server.requests
    result = json.loads((sums.parent / "out/sums/results.json").read_text())
    assert result["judge"].startswith("sage: ") and result["splits"]["test"]["accuracy"] == 1
    rows = [json.loads(line) for line in (sums.parent / "out/sums/scores.jsonl").read_text().splitlines()]
    assert {row["decided_by"] for row in rows} == {"sage"} and not all(row["robust"]["correct"] for row in rows)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder that says how its checkpoint was trained."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoint-2").symlink_to(EMBEDDED["tiny"])
    config = {"model": "tiny", "recipe": "own", "collator": {"max_pixels": 50_176, "resize": "pillow"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "own", "source": {}, "system": "Answer in one word."}))
    return folder


def test_a_model_is_asked_as_its_run_trained_it_and_that_is_said(
    run: Path, sums: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = words(sums)
    asked[asked.index("--model") + 1] = str(run / "checkpoint-2")
    assert main(asked) == 0
    text = said(capsys)
    assert "asked as in training" in text
    assert "max_pixels = 50176, resize = pillow, system prompt 'Answer in one word.'" in text
    meta = json.loads(meta_of(sums.parent / "out/sums/predictions.jsonl").read_text())
    assert meta["pixels"]["longest_edge"] == 50_176 and meta["pixels"]["resize"] == "pillow"
    with pytest.raises(ConfigError, match=r"max_pixels = 99999, but .*run trained this model with max_pixels = 50176"):
        asking_of(str(run / "checkpoint-2"), max_pixels=99_999)
    with pytest.raises(
        ConfigError, match="trained this model with min_pixels = the processor's own. Leave --min-pixels out"
    ):
        asking_of(str(run / "checkpoint-2"), min_pixels=99)
    moved = run.parent / "moved"
    moved.mkdir()
    (moved / "manifest.json").write_text("{}")
    assert (
        "was moved out of its run: asked with its processor's own pixels and no system" in asking_of(str(moved)).said()
    )
    base = asking_of("tiny", max_pixels=99_999)
    assert (base.max_pixels, base.system, base.run) == (99_999, None, None)
    capsys.readouterr()
    plain = [*asked[:-2], "--output", str(sums.parent / "plain"), "--as-trained", str(run)]
    plain[plain.index("--model") + 1] = "tiny"  # the base, asked as the run is
    assert main(plain) == 0
    other = json.loads(meta_of(sums.parent / "plain/sums/predictions.jsonl").read_text())
    assert {key: other[key] for key in ("prompts", "pixels")} == {key: meta[key] for key in ("prompts", "pixels")}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--limit", "0"], "limit must be at least 1, found 0"),
        (["--samples", "2", "--temperature", "0"], "2 greedy responses to a sample would be the same"),
        (["--engine", "vllm"], "engine must be one of transformers, openai, found 'vllm'"),
        (["--engine", "openai"], "engine openai needs the server's address"),
        (["--data", "other=/x"], "--data names 'other', which is not evaluated"),
        (["--data", "/x"], "--data says two folders for all"),
        (["--judge", "http://x"], "--judge URL and --judge-model NAME belong together"),
        (["--protocol", "nobodys"], "nobodys"),
        (["--as-trained", "nowhere"], "--as-trained 'nowhere': no run's config.yaml there"),
        (["drawn", "drawn"], "drawn: named twice"),
        (["nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_loaded(
    sums: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any, more: list[str], message: str
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    named = tuple(more) if not more[0].startswith("--") else ()
    assert main(words(sums, *([] if named else more), also=named)) == 2
    assert message in said(capsys)
    assert not (sums.parent / "out").exists()


def test_a_part_of_a_benchmark_is_said_to_be_one_in_the_terminal_and_on_the_page(
    sums: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remark = "sums: the first 2 samples of each split alone (limit), so its scores are not those of the whole set."
    assert main(words(sums, "--limit", "2")) == 0
    assert remark in said(capsys)
    assert remark in (sums.parent / "out/report.html").read_text()
    assert main(words(sums, "--limit", "3")) == 2  # other samples than before
    assert "made with other settings (samples: 2 there, 3 now). Remove it" in said(capsys)


def test_a_run_that_was_interrupted_is_told_how_to_go_on(
    sums: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluating, "evaluate", interrupted)
    assert main(words(sums)) == 130
    assert "Interrupted. The same command goes on from the last response." in said(capsys)


def test_nothing_heavy_is_imported_before_an_error_is_said(sums: Path) -> None:
    code = (
        "import sys; from vlm_dft.cli import main; status = main(sys.argv[1:]);"
        "print(status, {'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    asked = [*words(sums, also=(str(sums.with_name("more.yaml")),)), "--output", "/proc/nothing/here"]
    done = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "2 set()", done.stderr
    assert "cannot be written to" in done.stderr


def test_the_folder_of_a_training_run_and_one_in_use_are_left_alone(
    run: Path, sums: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = words(sums)
    assert main([*asked[:-1], str(run)]) == 2
    assert "is the folder of a training run, whose report would be overwritten" in said(capsys)
    (sums.parent / "run/dft/checkpoint-8").mkdir(parents=True)  # an objective's folder, of a run of several
    assert main([*asked[:-1], str(sums.parent / "run/dft")]) == 2
    assert "is the folder of a training run, whose report would be overwritten" in said(capsys)
    (sums.parent / "out").mkdir()
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with hold(sums.parent / "out"):
            os.write(told, b".")
            signal.pause()
    os.read(ready, 1)
    try:
        assert main(asked) == 2
        assert "is in use by another run (process" in said(capsys)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
