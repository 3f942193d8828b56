"""Runs that are killed end as the uninterrupted one, byte for byte; a run that is asked to stop saves, and says how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_dft.checkpoints import newest_whole

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
}  # fmt: skip
SMALL = ["--batch_size", "8", "--micro_batch", "4", "--limit", "40", "--eval_limit", "8", "--epochs", "2"]


def crash_worker(folder: Path, **asked: int) -> dict[str, Any]:
    words = [sys.executable, str(ROOT / "tests/crash_worker.py"), str(folder), json.dumps(asked)]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_twenty_runs_that_are_killed_at_random_end_as_the_uninterrupted_one(tmp_path: Path) -> None:
    """Weights, every row of metrics, predictions; full and LoRA, padded and packed, with dropout; some are killed again."""
    found = crash_worker(tmp_path, kills=20, seed=20251125)
    assert len(found["runs"]) == 20 and all(run["killed"] for run in found["runs"])
    assert [run for run in found["runs"] if run["wrong"]] == []
    places = " ".join(place for run in found["runs"] for place in run["killed"])
    assert "after the log of step" in places and "evaluating" in places


def test_a_kill_anywhere_in_a_save_leaves_the_checkpoint_before_or_the_new_one_whole(tmp_path: Path) -> None:
    found = crash_worker(tmp_path, saves=12)
    assert found["first"] == {"one": None} and found["events"] > 20
    asides = 0
    for save in found["saves"]:
        assert save["newest"] in ("checkpoint-1", "checkpoint-2") and save["passed_over"] == []
        assert set(save["left"].values()) == {None}  # not one that is there is broken
        assert save["same"] and save["hidden"] == []  # and it went on to the end of the uninterrupted run
        asides += save["aside"]
    assert asides > 4 and {save["newest"] for save in found["saves"]} == {"checkpoint-1", "checkpoint-2"}


def train(output: Path, *words: str, module: tuple[str, ...] = ("vlm_dft.cli",)) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *module, "train", *SMALL, "--output", str(output), *words],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(ready: Callable[[], bool], running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()[1][-3000:]
        time.sleep(0.01)


def logged(output: Path) -> list[dict[str, Any]]:
    if not (output / "metrics.jsonl").is_file():
        return []
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if key != "timing"} for row in found]


def ended(running: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = running.communicate(timeout=150)
    return running.returncode, said


def test_a_run_that_is_told_to_stop_saves_its_step_and_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """SIGTERM to all its processes, loaders too: 143. SIGINT: 130. SIGTERM in the evaluation: ended, at once. Then to the end."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    workers = ("--dataloader_num_workers", "2")
    assert ended(train(whole, *workers))[0] == 0
    for number, rows, status in ((signal.SIGTERM, 2, 143), (signal.SIGINT, 5, 130)):
        running = train(run, *workers)
        wait_for(lambda rows=rows: len(logged(run)) >= rows, running)  # type: ignore[misc]
        if number == signal.SIGTERM:
            running.send_signal(signal.SIGSTOP)  # so that it does not end meanwhile
            refusal, refused = ended(train(run, *workers))
            running.send_signal(signal.SIGCONT)
            assert refusal == 2 and f"in use by another run (process {running.pid} on" in refused
        os.killpg(running.pid, number)  # as launchers, schedulers and terminals do
        found, said = ended(running)
        last, _ = newest_whole(run)
        assert (found, last and last.name) == (status, f"checkpoint-{logged(run)[-1]['step']}"), said
        assert f"Stopped by {number.name}; {last} is saved. The same command continues from it." in said
    running = train(run, *workers)
    wait_for((run / "base" / "predictions.jsonl").is_file, running)
    running.terminate()
    assert ended(running)[0] == -signal.SIGTERM  # a shell says 143
    assert ended(train(run, *workers))[0] == 0
    assert logged(run) == logged(whole)
    for name in ("checkpoint-10/model.safetensors", "predictions.jsonl", "scores.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def test_two_processes_that_are_told_to_stop_save_the_same_step(tmp_path: Path) -> None:
    launched = ("vlm_dft.launch", "--standalone", "--nproc_per_node", "2", "-m", "vlm_dft.cli")
    words = ("--processes", "2", "--micro_batch", "2", "--benchmark", "none", "--dataloader_num_workers", "1")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert ended(train(whole, *words, module=launched))[0] == 0
    running = train(run, *words, module=launched)
    wait_for(lambda: len(logged(run)) >= 2, running)
    running.terminate()  # the launcher, which passes it on
    status, said = ended(running)
    last, _ = newest_whole(run)
    assert (status, last and last.name) == (143, f"checkpoint-{logged(run)[-1]['step']}"), said[-3000:]
    assert said.count("Stopped by SIGTERM") == 1 and "Traceback" not in said
    assert {path.name for path in (last or run).glob("*_[01].p*")} == {f"{name}_{k}.{end}" for k in (0, 1) for name, end in
                                                                      (("window", "pt"), ("rng_state", "pth"))}  # fmt: skip
    assert ended(train(run, *words, module=launched))[0] == 0
    assert logged(run) == logged(whole)
    final = "checkpoint-10/model.safetensors"
    assert (run / final).read_bytes() == (whole / final).read_bytes()


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
def test_a_mixture_that_was_killed_goes_on_with_the_rows_that_it_had_not_seen_and_a_changed_one_is_refused(
    tmp_path: Path, order: str
) -> None:
    card, whole, run = tmp_path / "mixed.yaml", tmp_path / "whole", tmp_path / "run"
    text = f"{{description: d, licence: mine, order: {order}, mixture: [{{recipe: drawn, cap: 24}}, {{recipe: drawn_new, repeat: 0.5}}]}}"
    card.write_text(text)
    words = (
        "--recipe",
        str(card),
        "--benchmark",
        "none",
        "--save_steps",
        "1",
        "--logging_steps",
        "1",
        "--workers",
        "1",
    )
    assert ended(train(whole, *words))[0] == 0
    running = train(run, *words)
    wait_for(lambda: len(logged(run)) >= 3, running)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    last, _ = newest_whole(run)
    assert last is not None and 2 <= int(last.name.rpartition("-")[2]) < 12
    card.write_text(text.replace("cap: 24", "cap: 23"))
    status, said = ended(train(run, *words))
    assert status == 2 and "was begun on other rows (fingerprint" in said
    card.write_text(text)
    assert ended(train(run, *words, "--workers", "0"))[0] == 0
    assert logged(run) == logged(whole)
    final = sorted(whole.glob("checkpoint-*"))[-1].name + "/model.safetensors"
    assert (run / final).read_bytes() == (whole / final).read_bytes()
    if order == "curriculum":
        epochs = [row for row in logged(run) if "source/drawn/tokens" in row or "source/drawn/mean_p" in row]
        assert epochs and len(epochs) < len(logged(run))  # its rows come first, and then no more in the epoch
