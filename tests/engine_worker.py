"""Run by test_engines_run.py: runs of train_objective in; their run folders and, beside each, what really ran in engine.json out.

Words: a folder, and a list of {engine, processes, runs: {name: settings}, resume: {name: a checkpoint to begin with}}. Everything
is imported once and the processes of a group are forked.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from loss_worker import let_fsdp_run_on_cpu, share_held, whole
from torch.multiprocessing import start_processes
from transformers import TrainerCallback

from vlm_dft import training
from vlm_dft.config import resolve_config
from vlm_dft.models import load_model
from vlm_dft.recipes import load_recipe, read_recipe


class Seen(TrainerCallback):
    """Writes down the engine at the first step, and the gathered weights at the last."""

    def __init__(self, trainer: Any, loaded: dict[str, Any]) -> None:
        self.trainer, self.found = trainer, loaded

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        self.found |= {
            "world_size": args.world_size, "engine": type(trainer.model_wrapped).__name__, "held": share_held(trainer.model),
            "optimiser_bytes": optimiser_bytes(trainer.optimizer),
        }  # fmt: skip
        if getattr(trainer, "deepspeed", None) is not None:
            self.found["deepspeed"] = trainer.deepspeed.config

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found["weights"] = whole(self.trainer.accelerator.unwrap_model(self.trainer.model))


def optimiser_bytes(optimizer: Any) -> int:
    """Bytes of the moments that this process holds."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    local = lambda t: t.to_local() if hasattr(t, "to_local") else t  # noqa: E731
    states = [local(v) for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in states if t.dim())


def work(rank: int, group: dict[str, Any], port: int, out: str) -> None:
    engine, processes, folder = group["engine"], group["processes"], Path(out)
    if processes > 1:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in here.items()}, MASTER_PORT=str(port))
    if engine == "fsdp2":
        let_fsdp_run_on_cpu()
        training.check_devices = lambda engine, device: None  # since it does run here
    if engine.startswith("zero"):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled, for minutes, and not used
    examples = load_recipe(read_recipe("drawn"), None, limit=24)[0]
    original, prepare = training.DFTTrainer.__init__, training.prepare_model
    loaded: dict[str, Any] = {}
    seen: list[Seen] = []

    def prepared(config: Any) -> Any:
        model, *more = prepare(config)
        loaded["held_when_loaded"] = share_held(model)
        return model, *more

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        seen.append(Seen(self, dict(loaded)))
        self.add_callback(seen[-1])

    training.DFTTrainer.__init__, training.prepare_model = remember, prepared  # type: ignore[method-assign]
    for name, settings in group["runs"].items():
        half = settings.pop("bf16", False)
        config = resolve_config(("test", {"processes": processes, **settings}))
        config = replace(config, trainer={**config.trainer, "bf16": half})  # as precision auto has it on a GPU
        training.train_objective(config, "dft", examples, folder / name)
        if rank == 0:
            torch.save(seen[-1].found, folder / f"{name}.pt")
    sys.stderr.flush()
    os._exit(0)  # a thread of gloo may abort while Python is taken down


def run_group(group: dict[str, Any], out: str) -> None:
    """Fork a group's processes and wait. Raises if one fails, or hangs, with the others ended."""
    for name, source in group.get("resume", {}).items():
        shutil.copytree(Path(out, source), Path(out, name, Path(source).name))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = start_processes(work, (group, port, out), group["processes"], join=False, start_method="fork")
    deadline = time.monotonic() + 120
    while not running.join(1.0):
        if time.monotonic() > deadline:
            for process in running.processes:
                process.kill()
            raise TimeoutError(f"no end of {[*group['runs']]}")


def main() -> None:
    torch.set_num_threads(1)
    load_model("tiny")  # imports its modules before the processes are forked
    gc.freeze()
    failed = False
    for group in json.loads(sys.argv[2]):
        try:
            run_group(group, sys.argv[1])
        except Exception:  # noqa: BLE001  # another engine's runs can still be told
            traceback.print_exc()
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
