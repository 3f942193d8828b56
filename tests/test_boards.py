"""Loggers: what TensorBoard, trackio and wandb hold after a real run, and the refusal of one that is not installed."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_dft.boards import Boards, check_boards, edges_of
from vlm_dft.cli import main
from vlm_dft.config import resolve_config
from vlm_dft.errors import ConfigError
from vlm_dft.progress import read_metrics
from vlm_dft.training import train_objective

torch.set_num_threads(1)
SETTINGS = {
    "recipe": "drawn", "benchmark": "drawn", "batch_size": 8, "micro_batch": 4, "max_steps": 3, "logging_steps": 1,
    "evaluate_every": 3, "watch_limit": 2,
}  # fmt: skip


def needs(name: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


def trained(drawn: list[Any], folder: Path, **changes: Any) -> list[dict[str, Any]]:
    train_objective(resolve_config(("test", {**SETTINGS, **changes})), "dft", drawn, folder)
    return read_metrics(folder / "metrics.jsonl")


def test_tensorboard_gets_numbers_a_histogram_of_p_and_answers_as_a_table(drawn: list[Any], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = trained(drawn, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("train/nll")] == pytest.approx([row["nll"] for row in rows])
    assert len(events.Scalars("train/kind/end/mean_p")) == len(events.Scalars("train/timing/seconds")) == 3
    assert [e.step for e in events.Scalars("eval/test/accuracy")] == [0, 3]
    found = [event.histogram_value for event in events.Histograms("train/p")]
    for histogram, row in zip(found, rows[-len(found) :], strict=True):
        edges, shares = edges_of(row)
        assert (len(edges), edges[0], edges[-1]) == (14, 0.0, 1.0) and sum(shares) == pytest.approx(1)
        assert histogram.bucket == pytest.approx([share * row["response_tokens"] for share in shares])
        assert histogram.bucket_limit == pytest.approx(edges[1:])
    text = events.Tensors("eval/answers/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert text.startswith("| split | question | gold | response | right |") and text.count("\n") == 9  # 2 of 4 splits


class Kept:
    def __init__(self) -> None:
        self.texts: list[tuple[Any, ...]] = []

    def add_text(self, *words: Any) -> None:
        self.texts.append(words)


def test_an_alarm_is_a_text_of_its_step() -> None:
    writer = Kept()
    callback = type("TensorBoardCallback", (), {"tb_writer": writer})()
    Boards([callback]).alarm(7, "short", "digits starve; do this")
    assert writer.texts == [("alarms", "digits starve; do this", 7)]


@needs("trackio")
def test_trackio_gets_the_same_offline(drawn: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trackio

    for module in (trackio.utils, trackio.sqlite_storage, trackio.media.utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    monkeypatch.setattr(trackio.sqlite_storage, "MEDIA_DIR", tmp_path / "trackio/media", raising=False)
    rows = trained(drawn, tmp_path / "run", report_to="trackio")
    (file,) = (tmp_path / "trackio").glob("vlm-dft.db")
    logged = [json.loads(row[0]) for row in sqlite3.connect(file).execute("select metrics from metrics order by id")]
    numbers = [row for row in logged if "train/nll" in row]
    assert [row["train/nll"] for row in numbers] == pytest.approx([row["nll"] for row in rows])
    assert sum("train/p" in row for row in logged) == 3 and sum("eval/answers" in row for row in logged) == 2
    (first, *_) = next(row["eval/answers"] for row in logged if "eval/answers" in row)["_value"]
    assert list(first) == ["picture", "split", "question", "gold", "response", "right"] and first["split"] == "test"


@needs("wandb")
def test_wandb_gets_the_same_offline_and_each_objective_a_run(
    drawn: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in ("a", "b"):
        trained(drawn, tmp_path / name, report_to="wandb")
        assert wandb.run is None  # ended: the next one's steps are its own
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


def test_a_logger_that_is_not_installed_is_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = next(name for name in ("neptune", "comet_ml", "swanlab") if importlib.util.find_spec(name) is None)
    words = ["train", "--report_to", f"tensorboard,{absent}", "--output", str(tmp_path / "run")]
    assert main(words) == 2
    assert f"pip install {absent}" in capsys.readouterr().err and not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="unknown logger 'tensorbord'. Did you mean 'tensorboard'?"):
        check_boards("tensorbord")
    assert check_boards("none") == ["none"] and check_boards(["tensorboard"]) == ["tensorboard"]
