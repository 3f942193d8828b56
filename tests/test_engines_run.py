"""Engines as they really run, two processes on CPU: saved, resumed bit for bit, loaded by plain from_pretrained; two nodes; a failure."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_dft.config import resolve_config
from vlm_dft.dimensions import dimensions_of
from vlm_dft.engines import check_engine, filled
from vlm_dft.memory import Micro, estimate
from vlm_dft.models import load_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ROOT = Path(__file__).resolve().parent.parent

CLASSES = {"ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine", "fsdp2": "FSDP"}
ENGINES = list(CLASSES)
WHOLE = {"train_parts": "vision,merger,language,head"}
SETTINGS = {
    "recipe": "drawn", "batch_size": 8, "micro_batch": 2, "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3,
    "cadft": 1.0,
}  # fmt: skip
Found = dict[str, Any]


def start(*words: str, folder: Path | None = None, **variables: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT), **variables,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *words], env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def ended(running: subprocess.Popen[str], seconds: float = 180) -> str:
    """What a program wrote, and its exit code; it and all it started are ended after so many seconds."""
    try:
        return running.communicate(timeout=seconds)[0] + f"\nexit code {running.returncode}"
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


# --- Saved and resumed ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of every engine: four steps, and four of which the last two are resumed in new processes."""
    folder = tmp_path_factory.mktemp("engines")
    engines = [e for e in CLASSES if importlib.util.find_spec("deepspeed") or not e.startswith("zero")]
    groups = []
    for engine in engines:
        named = {} if engine == "ddp" else {"engine": engine}
        if engine == "zero3":  # at its 1,280 no matrix is so small that it stays whole, but every norm is
            named = {"engine": str(folder / "zero3.json")}
            settings = json.loads((ROOT / "scripts/engines/zero3.json").read_text())
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            (folder / "zero3.json").write_text(json.dumps(settings))
        runs = {engine: {**SETTINGS, **WHOLE, **named}}
        if engine in ("zero3", "fsdp2"):
            runs[f"{engine} lora"] = {**SETTINGS, "lora": 4, **named}
        again = {f"{name} resumed": settings for name, settings in runs.items()}
        half = {"fsdp2 bf16": {**SETTINGS, **WHOLE, **named, "max_steps": 2, "bf16": True}} if engine == "fsdp2" else {}
        groups.append({"engine": engine, "processes": 2, "runs": {**runs, **half}})
        groups.append(
            {
                "engine": engine,
                "processes": 2,
                "runs": again,
                "resume": {f"{name} resumed": f"{name}/checkpoint-2" for name in runs},
            }
        )
    said = ended(start(str(ROOT / "tests/engine_worker.py"), str(folder), json.dumps(groups)), 350)
    if not said.endswith("exit code 0"):
        pytest.fail(said[-6000:])
    return folder


def found_in(folder: Path, name: str) -> Found:
    found: Found = torch.load(folder / f"{name}.pt")
    return found


def losses(folder: Path, name: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_that_was_asked_for_runs_with_its_share_of_the_weights(engine: str, folder: Path) -> None:
    """ZeRO-3's weights are split while they are loaded: no process ever holds a whole model."""
    found = found_in(folder, engine)
    assert found["world_size"] == 2 and found["engine"].startswith(CLASSES[engine])
    assert found["held"] == pytest.approx(0.5 if engine in ("zero3", "fsdp2") else 1.0, abs=0.01)
    assert found["held_when_loaded"] == pytest.approx(0.5 if engine == "zero3" else 1.0, abs=0.01)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(engine: str, folder: Path) -> None:
    for name in (engine, f"{engine} lora") if engine in ("zero3", "fsdp2") else (engine,):
        whole, resumed = found_in(folder, name)["weights"], found_in(folder, f"{name} resumed")["weights"]
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole), name
        before, after = losses(folder, name), losses(folder, f"{name} resumed")
        assert [*before] == [1, 2, 3, 4] and after == {step: before[step] for step in (3, 4)}, name


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_is_the_gathered_weights_and_loads_with_nothing_of_ours(engine: str, folder: Path) -> None:
    from transformers import AutoModelForImageTextToText

    loaded = AutoModelForImageTextToText.from_pretrained(folder / engine / "checkpoint-4", dtype=torch.float32)
    weights = found_in(folder, engine)["weights"]
    own = dict(loaded.named_parameters())
    assert own.keys() == weights.keys() and all(torch.equal(own[k], weights[k]) for k in own)
    start = dict(load_model("tiny").named_parameters())
    assert all(not torch.equal(own[k], start[k]) for k in own if k.endswith("proj.weight"))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engines_end_where_ddp_ends(engine: str, folder: Path) -> None:
    start = {k: p.detach() for k, p in load_model("tiny").named_parameters()}
    ends = [found_in(folder, name)["weights"] for name in ("ddp", engine)]
    moved = sum(((ends[0][k] - start[k]) ** 2).sum() for k in start)
    assert (
        sum(((ends[0][k] - ends[1][k]) ** 2).sum() for k in start) < (0.03**2) * moved
    )  # AdamW doubles rounding's sign


def test_fsdp_in_bf16_stays_near_fp32_and_keeps_fp32_weights(folder: Path) -> None:
    """Its layers are gathered in bf16; what the loss is given (numbers of targets, weights) and the sums stay fp32."""
    half, full = losses(folder, "fsdp2 bf16"), losses(folder, "ddp")
    assert half[1] != full[1] and [half[k] for k in (1, 2)] == pytest.approx([full[k] for k in (1, 2)], rel=0.02)
    assert {p.dtype for p in found_in(folder, "fsdp2 bf16")["weights"].values()} == {torch.float32}


@pytest.mark.parametrize("engine", ENGINES)
def test_moments_take_the_bytes_that_the_estimate_says(engine: str, folder: Path) -> None:
    config = resolve_config(
        ("test", {**SETTINGS, **WHOLE, "processes": 2, **({} if engine == "ddp" else {"engine": engine})})
    )
    model = dimensions_of("tiny")
    assert model is not None
    chosen = check_engine(config)
    guess = estimate(config, model, chosen, filled(chosen, config, model.hidden, half=False), Micro(1, 0), gpu=False)
    assert found_in(folder, engine)["optimiser_bytes"] == guess.items["optimiser states"]


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed_was_given_the_batch_and_the_filled_sizes(engine: str, folder: Path) -> None:
    settings = found_in(folder, engine)["deepspeed"]
    assert (
        settings["train_batch_size"],
        settings["train_micro_batch_size_per_gpu"],
        settings["gradient_accumulation_steps"],
    ) == (8, 2, 2)
    assert "auto" not in json.dumps(settings)
    if engine == "zero3":
        assert settings["zero_optimization"]["reduce_bucket_size"] == 128 * 128


# --- Several nodes, and a process that fails ------------------------------------------------------------------------


def test_two_nodes_train_one_model(tmp_path: Path) -> None:
    """Two agents of torchrun on one machine, as scripts/train_qwenvl.sh starts them: NNODES=2 NODE_RANK=0 and 1."""
    port = free_port()
    words = [
        "-m",
        "vlm_dft.cli",
        "train",
        "--processes",
        "2",
        "--recipe",
        "drawn",
        "--benchmark",
        "none",
        "--output",
        "run",
    ]
    words += "--limit 16 --batch_size 8 --micro_batch 2 --max_steps 2".split()
    agents = [
        start(
            *f"-m torch.distributed.run --nnodes 2 --node_rank {rank} --master_addr 127.0.0.1 --master_port {port}".split(),
            "--nproc_per_node", "1", *words, folder=tmp_path,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    said = [ended(agent) for agent in agents]
    assert all(text.endswith("exit code 0") for text in said), said
    assert "checkpoint (dft): run/checkpoint-2" in said[0] and "checkpoint (dft)" not in said[1]
    state = torch.load(tmp_path / "run/checkpoint-2/rng_state_1.pth", weights_only=False)
    assert state and (tmp_path / "run/checkpoint-2/model.safetensors").is_file()
    assert json.loads((tmp_path / "run/report.json").read_text())["config"]["processes"] == 2


@pytest.mark.parametrize("everyone", ["", "1"], ids=["one process", "all processes"])
def test_an_error_in_one_process_ends_all_and_is_shown_once(everyone: str, tmp_path: Path) -> None:
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(ROOT / "tests/failing_worker.py"),
    ]
    said = ended(
        start(*words, str(tmp_path / "run"), ALL=everyone), 120
    )  # the other process would sleep for ten minutes
    assert said.count("row 7 holds a picture of nothing") == 1
    assert everyone or "error (process 1 of 2): row 7" in said
    assert not said.endswith("exit code 0")


def test_fsdp_without_a_gpu_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "vlm_dft.cli", "train"]
    said = ended(start(*words, "--processes", "2", "--engine", "fsdp2", "--output", str(tmp_path / "run")))
    assert said.count("engine = fsdp2 needs GPUs, found none") == 1
    assert not (tmp_path / "run").exists()


def test_each_shipped_engine_dry_runs_at_the_paper_s_size(tmp_path: Path) -> None:
    from vlm_dft.cli import main

    for engine, processes in (("zero2", 8), ("zero3", 8), ("zero3_offload", 1), ("fsdp2", 8), ("zero3", 16)):
        file = tmp_path / f"{engine}{processes}.json"
        words = [
            "--model",
            "Qwen/Qwen2.5-VL-7B-Instruct",
            "--recipe",
            "wethink",
            "--engine",
            engine,
            "--nproc",
            str(processes),
        ]
        assert main(["train", *words, "--dry-run", "--json", str(file)]) == 0
        found = json.loads(file.read_text())
        batch = found["batch"]
        assert batch["processes"] * batch["micro_batch"] * batch["accumulation"] == batch["batch_size"] == 128
        assert '"auto"' not in json.dumps(found["engine"]["settings"]).replace('"auto_wrap', "")
