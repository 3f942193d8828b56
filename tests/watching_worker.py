"""Run by test_watching.py under torchrun: train with evaluations, and without, under one engine; every row that was logged out.

Words: a folder, {name: settings} of runs that follow each other in the same processes, each into folder/name.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from loss_worker import let_fsdp_run_on_cpu

from vlm_dft import training
from vlm_dft.config import resolve_config
from vlm_dft.recipes import load_recipe, read_recipe

torch.set_num_threads(1)
folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
if any("zero" in settings.get("engine", "") for settings in runs.values()):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled, for minutes, and not used
examples = load_recipe(read_recipe("drawn"), None, limit=48)[0]
engines: list[Any] = []


class Engine(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        engines.append((args.world_size, type(self.trainer.model_wrapped).__name__))


original = training.DFTTrainer.__init__


def remember(self, *args, **kwargs):  # type: ignore[no-untyped-def]
    original(self, *args, **kwargs)
    callback = Engine()
    callback.trainer = self  # type: ignore[attr-defined]
    self.add_callback(callback)


training.DFTTrainer.__init__ = remember  # type: ignore[method-assign]
for name, settings in runs.items():
    if settings.get("engine") == "fsdp2":
        let_fsdp_run_on_cpu()
        training.check_devices = lambda engine, device: None  # since it does run here
    config = resolve_config(("worker", settings))
    training.train_objective(config, "dft", examples, folder / name)
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / name / "engine.json").write_text(json.dumps(engines[-1]))
sys.stderr.flush()
os._exit(0)  # as the command does: a thread of gloo may abort while Python is taken down
