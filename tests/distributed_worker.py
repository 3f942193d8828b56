"""Run by test_distributed.py under torchrun: train on the drawn set for a few steps, and say which engine really ran."""

import json
import os
import sys
from pathlib import Path

import torch
import transformers

from vlm_dft import training
from vlm_dft.config import resolve_config
from vlm_dft.recipes import load_recipe, read_recipe

torch.set_num_threads(1)
folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
config = resolve_config(("worker", settings))
if config.deepspeed:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled, for minutes, and not used
examples = load_recipe(read_recipe("drawn"), None, limit=24)[0]
engines = []


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
training.train_objective(config, "dft", examples, folder)
if int(os.environ.get("RANK", "0")) == 0:
    (folder / "engine.json").write_text(json.dumps(engines[-1]))
sys.stderr.flush()
os._exit(0)  # as the command does: a thread of gloo may abort while Python is taken down
