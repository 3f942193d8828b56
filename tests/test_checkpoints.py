"""Checkpoints are whole or not there: sealed, damaged in every way and passed over, rotated; a disk that is full; a folder in use."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_dft.checkpoints import CheckpointError, check_room, damage, expected_bytes, newest_whole, rotate, seal
from vlm_dft.config import resolve_config
from vlm_dft.errors import ConfigError, ModelError
from vlm_dft.models import add_lora, load_model
from vlm_dft.runs import hold, sweep
from vlm_dft.training import train_objective

SETTINGS = {"recipe": "drawn", "batch_size": 8, "micro_batch": 8, "learning_rate": 1e-3, "report_to": "none"}


def sealed(run: Path, step: int) -> Path:
    """A small checkpoint with a folder in it."""
    aside = run / ".incomplete" / f"checkpoint-{step}"
    (aside / "shards").mkdir(parents=True)
    (aside / "model.bin").write_bytes(bytes(range(256)) * step)
    (aside / "shards" / "0.bin").write_bytes(b"shard")
    seal(aside, run / aside.name, step=step, processes=2)
    return run / aside.name


def test_a_sealed_checkpoint_is_whole_and_its_manifest_says_what_is_in_it(tmp_path: Path) -> None:
    checkpoint = sealed(tmp_path, 3)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert (manifest["step"], manifest["processes"]) == (3, 2)
    assert {name: row["bytes"] for name, row in manifest["files"].items()} == {"model.bin": 768, "shards/0.bin": 5}
    assert (
        manifest["files"]["shards/0.bin"]["sha256"]
        == "df3598cd66f1bb5bc4e2c17be89b7c7ecf0c81e53939f471a6b72db8d139edae"
    )  # by sha256sum
    assert damage(checkpoint) is None and not (tmp_path / ".incomplete" / "checkpoint-3").exists()


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.bin", 700)


def flip(checkpoint: Path) -> None:
    data = bytearray((checkpoint / "model.bin").read_bytes())
    data[100] ^= 1
    (checkpoint / "model.bin").write_bytes(data)


def remove(checkpoint: Path) -> None:
    (checkpoint / "shards" / "0.bin").unlink()


def unlist(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def garble(checkpoint: Path) -> None:
    os.truncate(checkpoint / "manifest.json", 30)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (truncate, "model.bin has 700 bytes, expected 2,560"),
        (flip, r"the contents of model.bin have changed \(sha256\)"),
        (remove, "shards/0.bin is missing"),
        (unlist, "it has no manifest.json"),
        (garble, "its manifest.json cannot be read"),
    ],
)
def test_a_broken_checkpoint_is_passed_over_and_named(harm: Any, said: str, tmp_path: Path) -> None:
    whole, broken = sealed(tmp_path, 9), sealed(tmp_path, 10)
    (tmp_path / "checkpoint-x").mkdir()
    assert newest_whole(tmp_path) == (broken, [])
    harm(broken)
    found, passed_over = newest_whole(tmp_path)
    assert found == whole and len(passed_over) == 1
    assert re.search(rf"passing over {broken}: {said}", passed_over[0])


def test_rotation_keeps_the_newest_and_the_protected_and_drops_broken_newer_ones(tmp_path: Path) -> None:
    def left() -> list[int]:
        return sorted(int(path.name[11:]) for path in tmp_path.glob("checkpoint-*"))

    made = {step: sealed(tmp_path, step) for step in (1, 2, 3, 4, 8)}
    rotate(made[8], None)
    assert left() == [1, 2, 3, 4, 8]
    rotate(made[8], 4)
    assert left() == [2, 3, 4, 8]
    unlist(made[8])  # the run goes on from 4 and seals 5
    rotate(sealed(tmp_path, 5), 3, protected=["elsewhere/checkpoint-2", None])
    assert left() == [2, 4, 5]
    rotate(tmp_path / "checkpoint-5", 1, protected=["elsewhere/checkpoint-2"])
    assert left() == [2, 5]
    rotate(tmp_path / "checkpoint-5", 1)
    assert left() == [5]
    assert damage(tmp_path / "checkpoint-5") is None


def test_the_room_that_checkpoints_take_is_known_before_training(
    drawn: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model("tiny")
    config = resolve_config(("test", {**SETTINGS, "max_steps": 1, "train_parts": "vision,merger,language,head"}))
    final = train_objective(config, "dft", drawn[:8], tmp_path / "full")
    size = sum(path.stat().st_size for name in ("model.safetensors", "optimizer.pt") for path in [final / name])
    assert expected_bytes(model, adapter=False) == pytest.approx(size, rel=0.02)
    final = train_objective(
        resolve_config(("test", {**SETTINGS, "max_steps": 1, "lora": 4})), "dft", drawn[:8], tmp_path / "lora"
    )
    size = sum(path.stat().st_size for name in ("adapter_model.safetensors", "optimizer.pt") for path in [final / name])
    assert expected_bytes(add_lora(model, 4), adapter=True) == pytest.approx(
        size, rel=0.3
    )  # small tensors, named at length
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=25_000_000))
    with pytest.raises(CheckpointError, match=r"takes about 30.0 MB, and .* has 25.0 MB left: nothing could be saved"):
        check_room(tmp_path, 30_000_000, 2)
    warning = check_room(tmp_path, 10_000_000, 2)
    assert warning and "25.0 MB are left for checkpoints of about 10.0 MB each, 2 kept and one more" in warning
    assert check_room(tmp_path, 8_000_000, 2) is None


def _train_on_a_full_disk(folder: str, examples: list[Any], limit: int, answer: Any) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails with EFBIG, as ENOSPC does
    config = resolve_config(("test", {**SETTINGS, "max_steps": 2, "save_steps": 1}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        train_objective(config, "dft", examples, Path(folder))
        answer.put("trained")
    except CheckpointError as error:
        answer.put(str(error))


@pytest.mark.parametrize("limit", [3_000_000, 5_000_000], ids=["in the weights", "in the optimiser's state"])
def test_a_disk_that_becomes_full_leaves_the_last_checkpoint_and_says_so(
    limit: int, drawn: list[Any], tmp_path: Path
) -> None:
    """For real: the system refuses to write more into a file, of the weights (3.9 MB) or of the optimiser (6.7 MB)."""
    config = resolve_config(("test", {**SETTINGS, "max_steps": 1, "save_steps": 1}))
    first = train_objective(config, "dft", drawn[:16], tmp_path)
    sizes = [(first / name).stat().st_size for name in ("model.safetensors", "optimizer.pt")]
    assert 3_000_000 < sizes[0] < 5_000_000 < sizes[1]
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    child = context.Process(target=_train_on_a_full_disk, args=(str(tmp_path), drawn[:16], limit, answer))
    child.start()
    said = answer.get(timeout=120)
    child.join()
    assert "The checkpoint of step 2 could not be written" in said and "it continues from checkpoint-1" in said
    assert "Nothing half-written stays" in said and "are left" in said
    assert newest_whole(tmp_path) == (first, []) and not (tmp_path / ".incomplete").exists()
    config = resolve_config(("test", {**SETTINGS, "max_steps": 2, "save_steps": 1}))
    assert train_objective(config, "dft", drawn[:16], tmp_path).name == "checkpoint-2"  # with room again


def _hold(folder: str, held: Any, done: Any) -> None:
    with hold(Path(folder)):
        held.set()
        done.wait(60)


def test_a_run_folder_is_held_by_one_process_and_free_when_it_is_killed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    child = context.Process(target=_hold, args=(str(tmp_path), held, done))
    child.start()
    assert held.wait(60)
    with (
        pytest.raises(ConfigError, match=rf"is in use by another run \(process {child.pid} on .*\). Wait for it"),
        hold(tmp_path),
    ):
        pass
    child.kill()
    child.join()
    with hold(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()


def test_a_run_folder_is_still_held_after_a_checkpoint_was_sealed_in_it(tmp_path: Path) -> None:
    """Closing any handle of a file drops a process's POSIX locks on it."""
    (tmp_path / "config.yaml").write_text("{}")
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    with hold(tmp_path):
        sealed(tmp_path, 2)
        child = context.Process(target=_try_to_hold, args=(str(tmp_path), answer))
        child.start()
        assert "is in use by another run" in answer.get(timeout=60)
        child.join()


def _try_to_hold(folder: str, answer: Any) -> None:
    try:
        with hold(Path(folder)):
            answer.put("held")
    except ConfigError as error:
        answer.put(str(error))


def test_what_is_not_a_number_is_not_saved(drawn: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two logs, after which the last checkpoint would be one of a diverged model, and the good ones rotated away."""
    from vlm_dft.trainer import DFTTrainer

    step = DFTTrainer.training_step

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, *args, **kwargs)
        if self.state.global_step == 1:
            next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(DFTTrainer, "training_step", broken)
    settings = {
        **SETTINGS,
        "max_steps": 4,
        "save_steps": 1,
        "logging_steps": 4,
        "save_total_limit": 1,
        "learning_rate": 1e-4,
    }
    with pytest.raises(
        ModelError, match=r"Before a checkpoint: loss .*, gradient norm nan at step 2: the model has diverged"
    ):
        train_objective(resolve_config(("test", settings)), "dft", drawn[:32], tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_checkpoint_without_the_optimisers_state_is_not_continued(drawn: list[Any], tmp_path: Path) -> None:
    config = resolve_config(("test", {**SETTINGS, "max_steps": 2, "save_steps": 1}))
    train_objective(config, "dft", drawn[:16], tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-1" / "optimizer.pt").unlink()
    manifest = json.loads((tmp_path / "checkpoint-1" / "manifest.json").read_text())
    del manifest["files"]["optimizer.pt"]
    (tmp_path / "checkpoint-1" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="holds no optimizer.pt, expected one: it was saved under another engine"):
        train_objective(config, "dft", drawn[:16], tmp_path)


def test_the_window_of_another_number_of_processes_is_taken_up_by_the_first(drawn: list[Any], tmp_path: Path) -> None:
    config = resolve_config(("test", {**SETTINGS, "max_steps": 4, "save_steps": 2, "logging_steps": 4}))
    train_objective(config, "dft", drawn[:32], tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "split")
    checkpoint = tmp_path / "split" / "checkpoint-2"
    for name in ("checkpoint-4", "finished.json"):
        path = tmp_path / "split" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    window = torch.load(checkpoint / "window_0.pt", weights_only=True)
    halves = []
    for share in (
        0.25,
        0.75,
    ):  # what two processes would have gathered: losses that are averaged, counts that are summed
        sums = {name: value * share for name, value in window["diagnostics"].items()}
        count = window["inputs"] // 4 if share < 0.5 else window["inputs"] - window["inputs"] // 4
        halves.append({**window, "loss": window["loss"] * 2 * share, "inputs": count, "diagnostics": sums})
    for k, half in enumerate(halves):
        torch.save(half, checkpoint / f"window_{k}.pt")
    aside = tmp_path / "split" / ".incomplete" / "checkpoint-2"
    aside.parent.mkdir()
    (checkpoint / "manifest.json").unlink()
    checkpoint.rename(aside)
    seal(aside, checkpoint, step=2, processes=2)
    train_objective(config, "dft", drawn[:32], tmp_path / "split")
    ours, expected = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("split", "whole")
    )
    for name in ("loss", "nll", "mean_p", "response_tokens", "input_tokens", "clip_rate"):
        assert ours[name] == pytest.approx(expected[name], rel=1e-5), name


def test_a_start_that_failed_leaves_no_folder_and_a_kill_leaves_no_half_files(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ZeroDivisionError), hold(run):
        raise ZeroDivisionError
    assert not run.exists()
    run.mkdir()
    (run / ".config.yaml.4711").write_text("half")
    (run / ".incomplete" / "checkpoint-3").mkdir(parents=True)
    (run / "kept.json").write_text("{}")
    sweep(run)
    assert [path.name for path in run.iterdir()] == ["kept.json"]
