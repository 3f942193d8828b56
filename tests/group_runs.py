"""Cases of loss_worker.py, trained by one program: engines, splits and cases in; what became of each case out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_dft.chat import Example

ROOT = Path(__file__).resolve().parent.parent
Found = dict[str, Any]
Results = Callable[..., Found]
Plan = list[tuple[str, str, tuple[str, ...]]]  # engine, split, cases

SPLITS: dict[str, dict[str, int]] = {  # of eight rows: processes x accumulated micro-batches x rows
    "1x1x8": {},
    "1x2x4": {"micro_batch": 4, "accumulation": 2},
    "1x8x1": {"micro_batch": 1, "accumulation": 8},
    "2x1x4": {"micro_batch": 4},
    "2x2x2": {"micro_batch": 2, "accumulation": 2},
}
CLASSES = {"none": "", "ddp": "DistributedDataParallel", "fsdp2": "FSDP", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine"}  # fmt: skip
SHARDING = ("fsdp2", "zero3")  # half of the parameters in each of two processes


def launch(arguments: list[str], seconds: float) -> str:
    """Run Python and all that it starts, ended after so many seconds. Returns what it wrote to stderr."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    running = subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        return running.communicate(timeout=seconds)[1] + f"\nexit code {running.returncode}"
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGTERM)  # torchrun then ends its own, which are in groups apart
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)


def run_plan(plan: Plan, cases: Mapping[str, dict[str, Any]], folder: Path, seconds: float, **more: Any) -> Results:
    """Train all of a plan's cases. Returns (engine, split, case) -> what became of it, its engine and processes proven.

    more: cases of one process, by what they are called in full. seconds: of each group, which has one engine and one split:
    DeepSpeed keeps the accumulation of the case before.
    """
    groups: list[dict[str, Any]] = [
        {"engine": engine, "processes": int(split[0]), "seconds": seconds,
         "cases": {f"{engine} {split} {case}": {**cases[case], **SPLITS[split]} for case in chosen}}
        for engine, split, chosen in plan
    ]  # fmt: skip
    groups.insert(0, {"engine": "none", "processes": 1, "seconds": seconds, "cases": more})
    said = ""
    for _ in range(2):  # on a machine that is busy with other things a group has failed to start, once in many runs
        for group in groups:
            group["cases"] = {name: c for name, c in group["cases"].items() if not (folder / f"{name}.pt").is_file()}
        groups = [group for group in groups if group["cases"]]
        if groups:
            (folder / "groups.json").write_text(json.dumps(groups), encoding="utf-8")
            said += launch([str(ROOT / "tests/loss_worker.py"), str(folder)], 4 * seconds)
    said = "\n".join(
        line for line in said.replace("\r", "\n").splitlines() if line.strip() and "it/s]" not in line
    )  # no bars

    def result(engine: str, split: str, case: str) -> Found:
        file = folder / f"{engine} {split} {case}.pt"
        if not file.is_file():
            pytest.fail(f"{file.stem} did not end. All cases' stderr:\n{said[-6000:]}")
        found: Found = torch.load(file)
        if engine != "hand":
            assert found["world_size"] == int(split[0]) and found["engine"].startswith(CLASSES[engine])
            assert found["held"] == pytest.approx(0.5 if engine in SHARDING else 1.0, abs=0.01)
            assert bool(found["checkpointed"]) == ("recomputed" in case)
        return found

    return result


def some_of_words(rows: list[Example]) -> list[Example]:
    """Two rows of three without their picture, so that most micro-batches of two have none."""

    def texts(content: Any) -> Any:
        return content if isinstance(content, str) else [part for part in content if part["type"] == "text"]

    alone = [
        replace(row, images=[], messages=[{**m, "content": texts(m["content"])} for m in row.messages]) for row in rows
    ]
    return [row if k % 3 == 0 else alone[k] for k, row in enumerate(rows)]
