"""Saving: transformers' Trainer with checkpoints that are whole or absent, and resumed to the last bit, in any number of processes."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from vlm_dft.checkpoints import STAGING, CheckpointError, expected_bytes, failed, newest_whole, rotate, seal
from vlm_dft.errors import ModelError
from vlm_dft.runs import write_json

WINDOW = "window_{}.pt"  # in a checkpoint, one a process: what it has gathered since the last log
STATE = "loss_state.json"  # in a checkpoint: what the loss knows of the steps before
LOGGER = logging.getLogger("vlm_dft")


class SealedTrainer(Trainer):
    """transformers' Trainer whose checkpoints are sealed (checkpoints.py) and hold what a subclass gathers between them.

    A subclass says what that is: `window` of every process and `run_state` of all, and how to go on with them; `before_save`
    may refuse to save. `watch`: what evaluates while training; it says whether the best checkpoint is spared by rotation.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watch: Any = None
        self._staging = False
        self._resumed: str | None = None  # the checkpoint that `train` goes on from
        self.add_callback(_Resumed(self))

    def before_save(self) -> None:
        """Called on every process. Raises where the model is not to be saved."""
        raise NotImplementedError

    def window(self) -> dict[str, Any]:
        """What this process has gathered since the last log, for torch.save."""
        raise NotImplementedError

    def restore_window(self, found: Sequence[dict[str, Any]]) -> None:
        """Go on with this process's window; with all of them where their number was another."""
        raise NotImplementedError

    def run_state(self) -> dict[str, Any]:
        """What all processes know alike, for JSON."""
        raise NotImplementedError

    def restore_run_state(self, state: dict[str, Any]) -> None:
        """Go on with it."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """resume_from_checkpoint: a checkpoint's folder, or True for the newest whole one of output_dir."""
        if resume_from_checkpoint is True:
            found, passed_over = newest_whole(Path(str(self.args.output_dir)))
            for line in passed_over:
                LOGGER.warning(line)
            if found is None:
                raise CheckpointError(f"No whole checkpoint to resume from in {self.args.output_dir!r}.")
            resume_from_checkpoint = str(found)
        self._resumed = str(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save aside, seal, rename: a checkpoint is whole or not there. Raises CheckpointError in every process if one fails."""
        run, step = Path(str(self.args.output_dir)), self.state.global_step
        aside = run / STAGING / f"checkpoint-{step}"
        self.before_save()
        if self.args.should_save:
            shutil.rmtree(run / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        wrong: Exception | None = None
        self._staging = True
        try:
            aside.mkdir(parents=True, exist_ok=True)
            super()._save_checkpoint(model, trial)
            torch.save(self.window(), aside / WINDOW.format(self.args.process_index))
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, by each of the libraries' names
            wrong = error
        finally:
            self._staging = False
        self._all_saved(wrong, run)  # and everyone's files are there
        self._name_best(run, aside.name)
        if self.args.should_save:
            try:
                write_json(aside / STATE, self.run_state())
                if self.state.best_global_step:
                    self.state.save_to_json(str(aside / TRAINER_STATE_NAME))
                seal(aside, run / aside.name, step=step, processes=self.args.world_size)
            except (OSError, ValueError) as error:
                wrong = error
        self._all_saved(wrong, run)
        if self.args.should_save:
            rotate(run / aside.name, self.args.save_total_limit, protected=[self.state.best_model_checkpoint])
        self.accelerator.wait_for_everyone()

    def _all_saved(self, wrong: Exception | None, run: Path) -> None:
        """Wait until every process has saved its share. Raises CheckpointError where one could not."""
        count = torch.tensor(float(wrong is not None), device=self.args.device)
        if not self.accelerator.reduce(count, "sum"):
            return
        if self.args.should_save:
            shutil.rmtree(run / STAGING, ignore_errors=True)
        size = expected_bytes(self.model, adapter=hasattr(self.model, "peft_config"), optimiser=str(self.args.optim))
        raise failed(run, self.state.global_step, wrong or OSError("another process failed"), size) from wrong

    def _name_best(self, folder: Path, name: str) -> None:
        """The best checkpoint, which rotation spares, by its place: the stock Trainer names the folder it was written to."""
        best = folder / f"checkpoint-{self.state.best_global_step}"
        kept = (self.watch is None or self.watch.keep_best) and (best.name == name or best.is_dir())
        self.state.best_model_checkpoint = str(best) if kept else None

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._staging else folder

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the last checkpoint, which says that the run is finished: with save_total_limit = 1 the best would be left alone."""
        best, self.state.best_model_checkpoint = self.state.best_model_checkpoint, None
        try:
            return super()._finalize_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            self.state.best_model_checkpoint = best

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As it is, but for a checkpoint without the optimiser's state, which the stock Trainer takes for a fresh start."""
        alone = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        if checkpoint is not None and alone and not (Path(checkpoint) / "optimizer.pt").is_file():
            raise ModelError(
                f"{checkpoint} holds no optimizer.pt, expected one: it was saved under another engine, or with save_only_model. Continue "
                "with the engine that it was begun with."
            )
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights by the model's own from_pretrained: on disk Qwen2.5-VL has other key names than in memory."""
        model = model or self.model
        if self.is_fsdp_enabled or hasattr(model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype="auto")
        model.load_state_dict(saved.state_dict(), strict=True)

    def go_on(self, checkpoint: Path) -> None:
        """Take up what is not weights, optimiser, schedule or random numbers: those the stock Trainer loads."""
        state = checkpoint / STATE
        if state.is_file():
            self.restore_run_state(json.loads(state.read_text(encoding="utf-8")))
        saved = len(list(checkpoint.glob(WINDOW.format("*"))))
        ranks = [self.args.process_index] if saved == self.args.world_size else range(saved)
        if saved:
            files = (checkpoint / WINDOW.format(rank) for rank in ranks)
            self.restore_window([torch.load(file, map_location="cpu", weights_only=True) for file in files])


class _Resumed(TrainerCallback):
    """Under every engine, when the stock Trainer has set its own counters: DeepSpeed loads weights by a way of its own."""

    def __init__(self, trainer: SealedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._resumed is not None:
            self.trainer.go_on(Path(self.trainer._resumed))
