"""Several processes end in the weights of one, over gloo on CPU, under the engine that was asked for."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_dft.models import load_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
SETTINGS = {
    "recipe": "drawn", "batch_size": 8, "micro_batch": 2, "optim": "sgd", "learning_rate": 0.5, "warmup": 0,
    "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "train_parts": "vision,merger,language,head",
}  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent


def train(folder: Path, processes: int, **changes: Any) -> tuple[dict[str, torch.Tensor], list[Any]]:
    folder.mkdir()
    settings = json.dumps({**SETTINGS, "processes": processes, **changes})
    launch = (
        ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"] if processes > 1 else []
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu",
                   "PYTHONPATH": str(ROOT)}  # fmt: skip
    subprocess.run(
        [sys.executable, *launch, str(ROOT / "tests/distributed_worker.py"), str(folder), settings],
        env=environment, check=True, timeout=380,
    )  # fmt: skip
    return dict(load_model(str(folder / "checkpoint-3")).state_dict()), json.loads((folder / "engine.json").read_text())


def test_two_processes_end_in_the_weights_of_one(tmp_path: Path) -> None:
    one, engine = train(tmp_path / "one", 1)
    assert engine == [1, "Qwen2_5_VLForConditionalGeneration"]
    two, engine = train(tmp_path / "two", 2)
    assert engine == [2, "DistributedDataParallel"]
    start = load_model("tiny").state_dict()
    moved = max((one[k] - start[k]).abs().max().item() for k in one)
    apart = max((one[k] - two[k]).abs().max().item() for k in one)
    assert moved > 1e-4 and apart < 1e-3 * moved


def test_two_processes_with_packed_rows_end_in_the_weights_of_one_with_padded_ones(tmp_path: Path) -> None:
    one, _ = train(tmp_path / "one", 1)
    two, engine = train(tmp_path / "two", 2, collator={"packing": True})
    assert engine == [2, "DistributedDataParallel"]
    start = load_model("tiny").state_dict()
    moved = max((one[k] - start[k]).abs().max().item() for k in one)
    apart = max((one[k] - two[k]).abs().max().item() for k in one)
    assert moved > 1e-4 and apart < 1e-3 * moved


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (extra: deepspeed)"
)
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gathers_the_head_and_ends_in_the_weights_of_one_process(stage: int, tmp_path: Path) -> None:
    """With ZeRO-3 each rank holds half of the head: only a call through the module sees all of it."""
    engine_file = tmp_path / "deepspeed.json"
    sizes = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    auto = dict.fromkeys(sizes, "auto")  # without the last, accelerate clips at 1.0 whatever max_grad_norm says
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    engine_file.write_text(json.dumps({"zero_optimization": zero, "zero_allow_untested_optimizer": True, **auto}))
    one, _ = train(tmp_path / "one", 1)
    two, engine = train(tmp_path / "two", 2, deepspeed=str(engine_file))
    assert engine == [2, "DeepSpeedEngine"]
    start = load_model("tiny").state_dict()
    moved = max((one[k] - start[k]).abs().max().item() for k in one)
    apart = max((one[k] - two[k]).abs().max().item() for k in one)
    assert moved > 1e-4 and apart < 1e-3 * moved
