"""Watching: a model in training and a benchmark's first samples in; its answers and scores every so many steps, the best checkpoint
and an early end out."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from vlm_dft.chat import Sample, text_of
from vlm_dft.collators import ChatCollator
from vlm_dft.errors import ImageError, ModelError
from vlm_dft.evaluations import ANSWERS, EVALUATIONS, decided, read_evaluations
from vlm_dft.generation import answers
from vlm_dft.media import open_image
from vlm_dft.metrics import summarise
from vlm_dft.predictions import score_row
from vlm_dft.reporting import percent
from vlm_dft.runs import write_text
from vlm_dft.stopping import StopOnSignal

DEFAULT_LIMIT = 32  # samples of each split
PICTURES = "pictures"  # in the folder of the answers
LONGEST_SIDE = 448  # pixels of a kept picture
Splits = Mapping[str, Sequence[Sample]]
Rows = Sequence[Mapping[str, Any]]
Scored = Callable[
    [int, Mapping[str, Mapping[str, Any]], str, Rows], Any
]  # step, metrics by split, the best so far, answers


class _Left(Exception):  # not an error
    """An evaluation is left for a signal."""


class Watch(TrainerCallback):
    """Evaluates every `every` steps, before the first and after the last. Set it as the trainer's `watch` and as a callback.

    The accuracy on the benchmark's first split decides; ties go to the earlier step. keep_best: a checkpoint is saved with
    every evaluation, and the best one outlives rotation. patience: training ends, with a checkpoint, after so many
    evaluations that were no better. Nothing of the training changes: not its random numbers, not a bit of its losses.
    """

    def __init__(
        self, splits: Splits, collator: ChatCollator, folder: Path, *, every: int, keep_best: bool = False,
        patience: int | None = None, batch_size: int = 16, on_scored: Scored = lambda step, splits, best, rows: None,
    ) -> None:  # fmt: skip
        self.samples = [sample for split in splits.values() for sample in split]
        self.collator, self.folder, self.every = collator, folder, every
        self.keep_best, self.patience, self.batch_size = keep_best, patience, batch_size
        self.on_scored = on_scored
        self.decides = next(iter(splits))  # the split whose accuracy does
        self.on_progress: Callable[[str], Any] = lambda detail: None
        self.trainer: Any = None
        self.stop: StopOnSignal | None = None  # what hears of signals

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 0:
            self._forget_after(state.global_step)
        known = _of_first(read_evaluations(self.folder) if args.process_index == 0 else None, args.world_size)
        self._recall(state, known)
        self._check_best(state)
        if state.global_step % self.every == 0 and state.global_step not in {row["step"] for row in known}:
            self.trainer.on_activity(
                "evaluating"
            )  # the untrained model; or a step that was saved without its evaluation
            self.evaluate(self.trainer)
            self.trainer.on_activity("training")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stop is not None and self.stop.received:
            return  # there is time to save, not to answer; that is made up for when the run goes on
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            control.should_evaluate = True
            control.should_save |= self.keep_best

    def evaluate(self, trainer: Any) -> dict[str, float]:
        """Answer and score the samples, write evaluations.jsonl and watch/step-<k>.jsonl; decide. Returns numbers to log."""
        state, started = trainer.state, monotonic()
        found = self._scores(trainer)
        if found is None:
            trainer.control.should_training_stop = trainer.control.should_save = True
            return {}
        scores, said = found
        splits = {split: _kept(found) for split, found in summarise(scores).items()}
        score = splits[self.decides]["accuracy"]
        better = state.global_step > 0 and (state.best_metric is None or score > state.best_metric)
        if better:
            state.best_metric, state.best_global_step = score, state.global_step
        if self._worse_for(state) >= (self.patience or float("inf")) and state.global_step < state.max_steps:
            trainer.control.should_training_stop = trainer.control.should_save = True
        if trainer.is_world_process_zero():
            rows = self._write_answers(state.global_step, scores, said)
            row = {"step": state.global_step, "decides": f"accuracy on {self.decides}", "score": score, "better": better, "splits": splits,
                   "timing": {"seconds": round(monotonic() - started, 3)}}  # fmt: skip
            with (self.folder / EVALUATIONS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.on_scored(state.global_step, splits, self._said_best(state), rows)
        numbers = {f"eval_{split}/{key}": float(found[key]) for split, found in splits.items()
                   for key in ("accuracy", "mean_tokens", "stopped") if found[key] is not None}  # fmt: skip
        trainer.log(dict(numbers))
        return numbers

    def _scores(self, trainer: Any) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]] | None:
        """Rows of scores in the samples' order, and rows of predictions by id; the same on every process. None: a signal came."""
        together = (trainer.is_deepspeed_enabled and _stage(trainer) == 3) or trainer.is_fsdp_enabled
        world, rank = (1, 0) if together else (trainer.args.world_size, trainer.args.process_index)
        mine = self.samples[rank::world]
        of = f"{len(mine)}{f' x {world}' if world > 1 else ''}"

        def on_batch(done: int) -> None:
            self.on_progress(f"{done}/{of}")
            if self.stop is not None and (self.stop.agree() if together else self.stop.received):
                raise _Left

        rows: list[dict[str, Any]] | None = None
        with suppress(_Left), _as_it_was(trainer.model), trainer.accelerator.autocast():
            rows = answers(
                trainer.model, self.collator, mine, batch_size=self.batch_size, together=together, on_batch=on_batch
            )
        if world > 1:
            shares: list[Any] = [None] * world
            torch.distributed.all_gather_object(shares, rows)
            rows = None if any(share is None for share in shares) else [row for share in shares for row in share]
            if rows is None and self.stop is not None:
                self.stop.agree()
        if rows is None:
            return None
        said = {row["id"]: row for row in rows}
        return [score_row(sample, said[sample.id]) for sample in self.samples], said

    def _worse_for(self, state: Any) -> int:
        """Evaluations since the best one."""
        return 0 if not state.best_global_step else -(-(state.global_step - state.best_global_step) // self.every)

    def _said_best(self, state: Any) -> str:
        if not state.best_global_step:
            return ""
        since = self._worse_for(state)
        held = f", {since} of {self.patience} without improvement" if self.patience and since else ""
        return f"best {percent(state.best_metric)} at step {state.best_global_step}{held}"

    def _recall(self, state: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        """The best so far is what the evaluations say; a checkpoint may have been saved before the last of them."""
        found = decided(rows)
        if found:
            state.best_metric, state.best_global_step = found["best"]["score"], found["best"]["step"]

    def _check_best(self, state: Any) -> None:
        step = state.best_global_step
        if self.keep_best and step and not (self.folder / f"checkpoint-{step}").is_dir():
            raise ModelError(
                f"{self.folder} has lost checkpoint-{step}, the best so far. Put it back, or remove the folder to start again."
            )

    def _forget_after(self, step: int) -> None:
        """Take out evaluations of steps that are trained again, and one that was cut off while being written."""
        kept = [row for row in read_evaluations(self.folder) if row["step"] <= step] if step else []
        write_text(self.folder / EVALUATIONS, "".join(json.dumps(row) + "\n" for row in kept))
        steps = {row["step"] for row in kept}
        for path in (self.folder / ANSWERS).glob("step-*.jsonl"):
            if int(path.stem[5:]) not in steps:
                path.unlink()

    def _write_answers(
        self, step: int, scores: Sequence[Mapping[str, Any]], said: Mapping[str, Mapping[str, Any]]
    ) -> Rows:
        folder = self.folder / ANSWERS
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        rows = []
        for k, (sample, score) in enumerate(zip(self.samples, scores, strict=True)):
            row = {
                **{key: score[key] for key in ("id", "split", "groups", "gold_answer", "extracted", "correct", "rule")},
                "question": text_of(sample.messages[-1]["content"]),
                **{key: said[sample.id][key] for key in ("response", "finish", "tokens")},
                "pictures": [_picture(image, folder, f"{PICTURES}/{k:04d}-{j}.png") for j, image in enumerate(sample.images)],
            }  # fmt: skip
            rows.append(row)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_text(folder / f"step-{step}.jsonl", "".join(lines))
        return rows


def _kept(found: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: found[key] for key in ("accuracy", "stderr", "count", "low", "high", "mean_tokens")}
    return {**kept, "stopped": 1 - found["cut"] / found["count"]}


def _picture(image: Any, folder: Path, name: str) -> str | None:
    """Keep a small copy of a picture, once."""
    if not (folder / name).is_file():
        try:
            opened = open_image(image)
        except ImageError:
            return None
        opened.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        aside = folder / f"{name}.part"
        opened.save(aside, "PNG")
        aside.replace(folder / name)
    return name


def _stage(trainer: Any) -> int:
    plugin = trainer.accelerator.state.deepspeed_plugin
    return int(plugin.zero_stage) if plugin is not None else 0


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """The model with its own forward, in which a prompt's last position alone reaches the head; afterwards everything is as it was:
    random numbers, modes, what it remembers of a prompt."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = base.__dict__.pop("forward", None)
    modes = [(module, module.training) for module in model.modules()]
    deltas = [(module, module.rope_deltas) for module in model.modules() if "rope_deltas" in vars(module)]
    numbers = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        if forward is not None:
            base.forward = forward
        for module, mode in modes:
            module.training = mode
        for module, delta in deltas:
            module.rope_deltas = delta
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        torch.set_rng_state(numbers[2])
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)


def _of_first(rows: Any, processes: int) -> list[dict[str, Any]]:
    """The first process's rows, in all of them."""
    held = [rows]
    if processes > 1:
        torch.distributed.broadcast_object_list(held)
    found: list[dict[str, Any]] = held[0]
    return found
