"""Evaluation while training: it changes no loss, decides by the named number, ends a run early, and goes on after a kill."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlm_dft import watching
from vlm_dft.benchmarks import load_benchmark
from vlm_dft.cli import main
from vlm_dft.collators import ChatCollator
from vlm_dft.config import TrainConfig, resolve_config
from vlm_dft.errors import ConfigError, ModelError
from vlm_dft.evaluations import decided, read_evaluations, read_watched
from vlm_dft.generation import generate
from vlm_dft.metrics import summarise
from vlm_dft.models import load_model
from vlm_dft.predictions import score_predictions
from vlm_dft.progress import TIMING, read_metrics
from vlm_dft.report_watch import choose_changed
from vlm_dft.stopping import Stopped
from vlm_dft.trainer import DFTTrainer
from vlm_dft.training import train_objective
from vlm_dft.watching import Watch

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "recipe": "drawn", "benchmark": "drawn", "batch_size": 8, "micro_batch": 4, "learning_rate": 3e-3, "warmup": 0,
    "max_steps": 6, "logging_steps": 1, "save_steps": 6, "save_total_limit": 1,
}  # fmt: skip
WATCHED = {"evaluate_every": 2, "watch_limit": 3}


def config_of(**changes: Any) -> TrainConfig:
    return resolve_config(("test", {**SETTINGS, **changes}))


def logged(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != TIMING} for row in read_metrics(folder / "metrics.jsonl")]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "timing"} for row in rows]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was evaluated every two steps and kept its best checkpoint; rotation keeps one."""
    from vlm_dft.recipes import load_recipe, read_recipe

    folder = tmp_path_factory.mktemp("watched")
    train_objective(
        config_of(**WATCHED, keep_best=True), "dft", load_recipe(read_recipe("drawn"), None, limit=40)[0], folder
    )
    return folder


def test_evaluating_changes_no_bit_of_what_is_trained(watched: Path, drawn: list[Any], tmp_path: Path) -> None:
    train_objective(config_of(), "dft", drawn, tmp_path)
    assert logged(tmp_path) == logged(watched) and len(logged(watched)) == 6
    ends = [load_model(str(folder / "checkpoint-6")).state_dict() for folder in (watched, tmp_path)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_an_evaluation_scores_what_the_saved_checkpoint_answers(watched: Path, processor: Any, tmp_path: Path) -> None:
    """As `vlm-dft evaluate` would: loaded from its folder, answered into a file, scored from it."""
    splits = load_benchmark("drawn", limit=3)
    samples = [sample for split in splits.values() for sample in split]
    predictions = tmp_path / "predictions.jsonl"
    said = generate(
        load_model(str(watched / "checkpoint-6")), ChatCollator(processor), samples, predictions, show=False
    )
    kept = read_watched(watched)[6]
    assert [row["response"] for row in kept] == [row["response"] for row in said]
    expected = summarise(score_predictions(samples, predictions, tmp_path / "scores.jsonl"))
    row = read_evaluations(watched)[-1]
    assert row["step"] == 6 and list(row["splits"]) == ["test", "ood_large", "ood_colour", "ood_render"]
    for split, found in row["splits"].items():
        for key in ("accuracy", "stderr", "count", "mean_tokens"):
            assert found[key] == expected[split][key], (split, key)
    assert (watched / "watch" / kept[0]["pictures"][0]).is_file() and kept[0]["question"]


def test_the_untrained_model_is_evaluated_too_and_every_step_is_there_once(watched: Path) -> None:
    assert [row["step"] for row in read_evaluations(watched)] == [0, 2, 4, 6]
    assert list(read_watched(watched)) == [0, 2, 4, 6]


def test_the_best_checkpoint_outlives_rotation_and_stands_for_the_run(watched: Path) -> None:
    rows = read_evaluations(watched)
    scores = {row["step"]: row["splits"]["test"]["accuracy"] for row in rows if row["step"]}
    best = max(scores, key=lambda step: (scores[step], -step))
    finished = json.loads((watched / "finished.json").read_text())
    assert finished["checkpoint"] == f"checkpoint-{best}" and finished["reason"] == "all steps done"
    assert finished["evaluations"]["best"]["score"] == scores[best] and finished["evaluations"]["last"]["step"] == 6
    assert sorted(p.name for p in watched.glob("checkpoint-*")) == sorted({f"checkpoint-{best}", "checkpoint-6"})
    state = json.loads((watched / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_global_step"] == best and Path(state["best_model_checkpoint"]) == watched / f"checkpoint-{best}"


@pytest.mark.parametrize("moment", ["in an evaluation", "in the step before one"])
def test_a_signal_does_not_wait_for_an_evaluation_which_is_made_up_for(
    moment: str, watched: Path, drawn: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(**WATCHED, keep_best=True)
    if moment == "in an evaluation":
        answer, calls = watching.answers, []

        def answers(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:  # the first is of the untrained model
                os.kill(os.getpid(), signal.SIGTERM)
            return answer(*args, **kwargs)

        monkeypatch.setattr(watching, "answers", answers)
    else:
        step = DFTTrainer.training_step

        def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, *args, **kwargs)

        monkeypatch.setattr(DFTTrainer, "training_step", training_step)
    with pytest.raises(Stopped, match="Stopped by SIGTERM; .*checkpoint-2 is saved") as stopped:
        train_objective(config, "dft", drawn, tmp_path)
    assert stopped.value.status == 143 and [row["step"] for row in read_evaluations(tmp_path)] == [0]
    monkeypatch.undo()
    train_objective(config, "dft", drawn, tmp_path)
    assert without_times(read_evaluations(tmp_path)) == without_times(read_evaluations(watched))
    assert logged(tmp_path) == logged(watched)
    assert (tmp_path / "finished.json").read_bytes() == (watched / "finished.json").read_bytes()


def test_a_signal_in_the_last_save_ends_the_run_which_is_finished(
    drawn: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = DFTTrainer._save_checkpoint

    def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(self, *args, **kwargs)

    monkeypatch.setattr(DFTTrainer, "_save_checkpoint", save_checkpoint)
    with pytest.raises(Stopped, match="checkpoint-6 is saved"):
        train_objective(config_of(), "dft", drawn, tmp_path)
    assert json.loads((tmp_path / "finished.json").read_text())["step"] == 6
    assert train_objective(config_of(), "dft", drawn, tmp_path).name == "checkpoint-6"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_best_checkpoint_that_is_gone_is_missed(watched: Path, drawn: list[Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(watched, run)
    best = json.loads((run / "finished.json").read_text())["checkpoint"]
    shutil.rmtree(run / best)
    with pytest.raises(ModelError, match=f"{best} was the best while training, and is not whole: it has no manifest"):
        train_objective(config_of(**WATCHED, keep_best=True), "dft", drawn, run)


def test_of_equal_scores_the_earlier_step_is_the_best() -> None:
    def row(step: int, score: float) -> dict[str, Any]:
        found = {"accuracy": score, "stderr": 0.1, "count": 4}
        return {"step": step, "decides": "accuracy on test", "score": score, "splits": {"test": found}}

    rows = [row(0, 0.9), row(2, 0.5), row(4, 0.75), row(6, 0.75), row(8, 0.25)]
    found = decided(rows, patience=2)
    assert found["best"]["step"] == 4 and found["last"]["score"] == 0.25 and found["first"]["score"] == 0.9
    assert found["since_best"] == 2 and found["stop"] and not decided(rows, patience=3)["stop"]
    assert decided(rows[:1]) == {}  # the untrained model is no checkpoint


def test_a_run_without_improvement_ends_early_at_a_checkpoint(drawn: list[Any], tmp_path: Path) -> None:
    """With a learning rate of next to nothing no evaluation is better than the first."""
    config = config_of(**WATCHED, learning_rate=1e-12, patience=1, max_steps=20, save_steps=20)
    said: list[str] = []
    assert train_objective(config, "dft", drawn, tmp_path, echo=said.append) == tmp_path / "checkpoint-4"
    assert [row["step"] for row in read_evaluations(tmp_path)] == [0, 2, 4]
    finished = json.loads((tmp_path / "finished.json").read_text())
    assert (finished["step"], finished["steps"]) == (4, 20) and finished["reason"].startswith("stopped early")
    assert any("stopped early" in str(line) for line in said)
    state = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())
    assert state["best_global_step"] == 2 and state["best_model_checkpoint"] is None  # not asked to keep it
    for mark in ("finished.json", None):  # known from its mark, and without it from the evaluations
        if mark:
            said.clear()
        else:
            (tmp_path / "finished.json").unlink()
        assert train_objective(config, "dft", drawn, tmp_path, echo=said.append) == tmp_path / "checkpoint-4"
        assert any("stopped early" in str(line) for line in said) and len(logged(tmp_path)) == 4


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["in the answers", "before the row", "before the save"])
def test_a_run_that_dies_in_an_evaluation_ends_as_the_uninterrupted_one(
    moment: str, watched: Path, drawn: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_dft import watching

    original = {"answers": watching.answers, "write": Watch._write_answers, "log": Watch.evaluate}

    def die(*args: Any, **kwargs: Any) -> Any:
        raise Killed

    def at_four(name: str) -> Any:
        def called(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = original[name](self, *args, **kwargs)
            step = self.trainer.state.global_step
            return die() if step == 4 else found

        return called

    with monkeypatch.context() as patch:
        if moment == "in the answers":
            calls: list[int] = []

            def third(*args: Any, **kwargs: Any) -> Any:
                calls.append(1)
                return die() if len(calls) == 3 else original["answers"](*args, **kwargs)

            patch.setattr(watching, "answers", third)
        elif moment == "before the row":
            patch.setattr(Watch, "_write_answers", at_four("write"))
        else:
            patch.setattr(Watch, "evaluate", at_four("log"))
        with pytest.raises(Killed):
            train_objective(config_of(**WATCHED, keep_best=True), "dft", drawn, tmp_path)
    assert (tmp_path / "checkpoint-2").is_dir() and not (tmp_path / "checkpoint-4").is_dir()
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 4, "dec')  # and the machine was writing
    train_objective(config_of(**WATCHED, keep_best=True), "dft", drawn, tmp_path)
    assert without_times(read_evaluations(tmp_path)) == without_times(read_evaluations(watched))
    assert logged(tmp_path) == logged(watched) and read_watched(tmp_path) == read_watched(watched)
    assert (tmp_path / "finished.json").read_text() == (watched / "finished.json").read_text()


def test_an_evaluation_leaves_random_numbers_modes_and_memories_as_they_were(model: Any) -> None:
    from vlm_dft.loss_head import attach_loss
    from vlm_dft.watching import _as_it_was

    model = attach_loss(model).train()
    model.model.visual.eval()  # a frozen tower
    model.model.rope_deltas = torch.tensor([[3]])
    forward, modes = model.forward, [m.training for m in model.modules()]
    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    with _as_it_was(model):
        assert "forward" not in vars(model)  # its own, which says that it can leave out logits
        model.eval()
        model.model.rope_deltas = None
        torch.rand(5), random.random(), np.random.rand()
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert [m.training for m in model.modules()] == modes and model.forward == forward
    assert int(model.model.rope_deltas) == 3


def test_the_table_shows_first_what_changed_most() -> None:
    def rows(*verdicts: bool) -> list[dict[str, Any]]:
        return [{"id": f"s{k}", "correct": v} for k, v in enumerate(verdicts)]

    watched = {0: rows(True, False, True), 2: rows(True, True, False), 4: rows(True, True, True)}
    count, chosen = choose_changed(watched, 2)
    assert count == 2 and [row["id"] for row in chosen] == ["s2", "s1"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"patience": 3}, "patience without evaluate_every: nothing is evaluated while training"),
        ({"keep_best": True}, "keep_best without evaluate_every"),
        ({"watch_limit": 8}, "watch_limit without evaluate_every"),
        ({"evaluate_every": 2, "benchmark": "none"}, "evaluate_every needs a benchmark"),
        ({"load_best_model_at_end": True}, "set by keep_best"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_config(("test", settings))


def test_a_recipe_without_a_benchmark_cannot_be_evaluated_while_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(row))
    words = [
        "train",
        "--recipe",
        str(tmp_path / "chats.jsonl"),
        "--evaluate_every",
        "2",
        "--output",
        str(tmp_path / "r"),
    ]
    assert main(words) == 2
    assert "evaluate_every needs a benchmark" in capsys.readouterr().err


def test_the_front_door_reports_the_best_checkpoint_and_says_what_chose_it(tmp_path: Path) -> None:
    words = ["--limit", "40", "--eval_limit", "2", "--output", str(tmp_path / "run")]
    settings = {**SETTINGS, **WATCHED, "keep_best": "true"}
    assert main(["train", *words, *(word for k, v in settings.items() for word in (f"--{k}", str(v)))]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())["training"]["dft"]
    best = report["evaluations"]["best"]["step"]
    assert (
        report["checkpoint"].endswith(f"checkpoint-{best}") and report["evaluations"]["decides"] == "accuracy on test"
    )
    settings_of_answers = json.loads((tmp_path / "run" / "predictions.meta.json").read_text())
    assert settings_of_answers["model"] == report["checkpoint"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Evaluated while training" in page and "samples became right or wrong on the way" in page


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("engine", "held_by"),
    [
        ("ddp", "DistributedDataParallel"),
        ("fsdp2", "FSDP"),
        ("zero3", "DeepSpeedEngine"),
    ],
)
def test_two_processes_share_an_evaluation_and_train_on_as_if_there_were_none(
    engine: str, held_by: str, watched: Path, tmp_path: Path
) -> None:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    sizes = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    file = tmp_path / "zero3.json"  # which splits no parameter as small as these without the threshold of 0
    file.write_text(
        json.dumps({"zero_optimization": zero, "zero_allow_untested_optimizer": True, **dict.fromkeys(sizes, "auto")})
    )
    more = {"ddp": {}, "fsdp2": {"engine": "fsdp2"}, "zero3": {"engine": str(file)}}[engine]
    common = {**SETTINGS, **more, "processes": 2, "max_steps": 4, "save_steps": 2}
    runs = {"with": {**common, **WATCHED, "keep_best": True}, "without": common}
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    words = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        str(ROOT / "tests/watching_worker.py"),
    ]
    running = subprocess.Popen(
        [sys.executable, *words, str(tmp_path), json.dumps(runs)], env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        said = running.communicate(timeout=380)[1]
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 0, said[-4000:]
    world, wrapper = json.loads((tmp_path / "with" / "engine.json").read_text())
    assert world == 2 and wrapper.startswith(held_by)
    assert logged(tmp_path / "with") == logged(tmp_path / "without")
    rows = read_evaluations(tmp_path / "with")
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert all(found["count"] == 3 for row in rows for found in row["splits"].values())
    alone = {row["id"]: row["response"] for row in read_watched(watched)[0]}  # of one process
    together = read_watched(tmp_path / "with")[0]
    assert {row["id"]: row["response"] for row in together} == alone and [r["id"] for r in together] == list(alone)
