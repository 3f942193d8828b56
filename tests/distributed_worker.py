"""Run by test_distributed.py under torchrun: train on the drawn set for a few steps, and say which engine really ran.

Words: a folder, and {name: settings} of runs that follow each other in the same processes, each into folder/name.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from group_runs import some_of_words

from vlm_dft import training
from vlm_dft.config import resolve_config
from vlm_dft.recipes import load_recipe, read_recipe

torch.set_num_threads(1)
folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
configs = {name: resolve_config(("worker", settings)) for name, settings in runs.items()}
if any(config.engine for config in configs.values()):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled, for minutes, and not used
drawn = load_recipe(read_recipe("drawn"), None, limit=21)[0]  # a last step of five
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
for name, config in configs.items():
    training.train_objective(config, "dft", some_of_words(drawn) if "words" in name else drawn, folder / name)
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / name / "engine.json").write_text(json.dumps(engines[-1]))
sys.stderr.flush()
os._exit(0)  # as the command does: a thread of gloo may abort while Python is taken down
