"""What only a GPU can show: bf16 products accumulated in fp32, and a step under bf16 autocast with flash-attn or sdpa."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_dft import OBJECTIVES, Anchor, fused_linear_loss
from vlm_dft.config import resolve_config
from vlm_dft.models import choose_attention
from vlm_dft.progress import read_metrics
from vlm_dft.training import train_objective

pytestmark = pytest.mark.gpu


def test_bf16_on_the_gpu_is_as_close_to_float64_as_its_inputs_allow() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 256, generator=draw).cuda().bfloat16().requires_grad_()
    weight = torch.randn(5000, 256, generator=draw).cuda().bfloat16().requires_grad_()
    targets = torch.randint(0, 5000, (512,), generator=draw).cuda()
    fused_linear_loss(hidden, weight, targets, objective="nll").backward()
    double = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    torch.nn.functional.cross_entropy(double[0] @ double[1].T, targets).backward()
    for ours, theirs in ((hidden.grad, double[0].grad), (weight.grad, double[1].grad)):
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() < 1e-2  # type: ignore[union-attr]


def test_training_steps_run_in_bf16_autocast_over_fp32_weights(drawn: list[Any], tmp_path: Path) -> None:
    config = resolve_config(("test", {"recipe": "drawn", "batch_size": 8, "micro_batch": 8, "max_steps": 2}))
    final = train_objective(config, "dft", drawn, tmp_path)
    assert final.name == "checkpoint-2" and len(read_metrics(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_is_on_the_gpu_what_it_is_on_the_cpu(objective: str, dtype: torch.dtype) -> None:
    """fp32 weights, several tiles and pieces of the weight, an anchor; autocast as the Trainer sets it."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(300, 64, generator=draw), torch.randn(5000, 64, generator=draw) / 8
    targets = torch.randint(0, 5000, (300,), generator=draw)
    targets[::3] = -100
    start = torch.randn(300, 64, generator=draw)
    found = []
    for device in ("cpu", "cuda"):
        h, w = (t.detach().clone().to(device).requires_grad_() for t in (hidden, weight))
        anchor = Anchor(start.to(device), weight.to(device), 0.1, "forward")
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda" and dtype == torch.bfloat16):
            loss, stats = fused_linear_loss(
                h, w, targets.to(device), objective=objective, anchor=anchor, chunk_size=64, return_stats=True
            )
        loss.backward()
        found.append([loss.detach().cpu(), stats.log_p.cpu(), stats.entropy.cpu(), h.grad.cpu(), w.grad.cpu()])  # type: ignore[union-attr]
    bound = 1e-3 if dtype == torch.float32 else 3e-2  # fp32 with TF32 off
    for ours, expected in zip(found[1], found[0], strict=True):
        assert ((ours - expected).norm() / expected.norm()).item() < bound


def test_memory_on_the_gpu_does_not_grow_with_the_rows() -> None:
    weight = (torch.randn(50_000, 256) / 16).cuda().requires_grad_()
    peaks = []
    for rows in (4096, 32_768):
        hidden, targets = torch.randn(rows, 256, device="cuda"), torch.randint(0, 50_000, (rows,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fused_linear_loss(hidden, weight, targets).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        weight.grad = None
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "zero3_offload", "fsdp2"])
def test_an_engine_trains_on_gpus_saves_and_resumes(engine: str, tmp_path: Path) -> None:
    """On two GPUs where there are two; ZeRO-3 with offload compiles DeepSpeedCPUAdam at first. Resumed: the losses go on."""
    processes = min(2, torch.cuda.device_count())
    if engine == "fsdp2" and processes < 2:
        pytest.skip("FSDP2 splits a model over two GPUs or more")
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        "-m",
        "vlm_dft.cli",
        "train",
    ]
    words += (
        f"--processes {processes} --recipe drawn --limit 24 --benchmark none --batch_size 8 --micro_batch 2".split()
    )
    words += "--max_steps 4 --save_steps 2 --logging_steps 1 --output run".split() + (
        [] if engine == "ddp" else ["--engine", engine]
    )
    places = filter(None, [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    losses = []
    for _ in range(2):
        subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, check=True, timeout=500)
        rows = read_metrics(tmp_path / "run/metrics.jsonl")
        losses.append([row["loss"] for row in rows if row["step"] > 2])
        shutil.rmtree(tmp_path / "run/checkpoint-4")
        (tmp_path / "run/report.json").unlink()
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(
        losses[0], rel=1e-2
    )  # kernels of a GPU may add in any order


def test_the_attention_chosen_for_this_gpu_is_flash_attn_where_it_imports() -> None:
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError:
        assert choose_attention(None, "cuda", True, "tiny")[0] == "sdpa"
    else:
        new = torch.cuda.get_device_capability() >= (8, 0)
        assert choose_attention(None, "cuda", True, "tiny")[0] == ("flash_attention_2" if new else "sdpa")
