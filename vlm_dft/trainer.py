"""Trainer: transformers' Trainer with a token objective: micro-batches in, exactly normalised steps and diagnostics out."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from vlm_dft.diagnostics import Alarm, StarvationAlarms, TokenDiagnostics
from vlm_dft.embedding import give_in_place_gradient
from vlm_dft.errors import ModelError
from vlm_dft.kinds import kind_bits
from vlm_dft.loss_head import Compatibility, Kl, LossMixin, response_hidden, sample_indices, sample_means
from vlm_dft.objectives import IGNORE, Objective, find_objective
from vlm_dft.runs import write_json
from vlm_dft.vision_cache import KEYS, VisionCache, why_not_cached

STAGING = ".incomplete"  # a checkpoint is written here and renamed into place when it is whole
STATE = "loss_state.json"  # in a checkpoint: what CADFT knows of the samples before, and what starves
KEPT = 0.95  # of those moments, from one optimiser step to the next
LOGGER = logging.getLogger("vlm_dft")


class DFTTrainer(Trainer):
    """transformers' Trainer with a token objective on response rows alone, normalised over the whole optimiser step.

    model: with the fused loss attached (loss_head.attach_loss). objective: a name of OBJECTIVES, with parameters or
    without, or a function. kl: adds a KL term to the starting model: with LoRA that model is this one with its adapters
    off, else `reference` is a frozen copy. cadft: beta of the sample-level factor (0: none); a sample's mean NLL is held
    against those of earlier steps, so that the result does not depend on how a step is split. full_weight: kinds of
    tokens (kinds.KINDS) with w = 1 whatever the objective. sources: ChatCollator's `tag_sources`, for the diagnostics.
    vision_cache: keeps the features of pictures that come again; the collator is then a KeyedCollator.
    on_alarm: called on the first process with what starves (diagnostics.Alarm), also collected in `alarms`.

    The stock Trainer counts no targets for models with `accepts_loss_kwargs = False` (all Qwen-VL), so that its loss
    depends on how a batch is split; and it resumes Qwen2.5-VL from its initial weights (transformers 5.23, issue 43701).
    """

    loss_is_scaled_for_ga = True  # by num_items_in_batch

    def __init__(
        self,
        *args: Any,
        objective: str | Objective,
        kl: Kl | None = None,
        reference: Any = None,
        cadft: float = 0.0,
        full_weight: Sequence[str] = (),
        sources: Sequence[str] = (),
        vision_cache: VisionCache | None = None,
        on_alarm: Callable[[Alarm], Any] = lambda alarm: LOGGER.warning(alarm.message),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor = {self.args.label_smoothing_factor}, expected 0: a smoothed loss is not -log p, which "
                "an objective weighs. Leave it out; objective='mix' softens DFT."
            )
        find_objective(objective)  # raises for an unknown one
        if not getattr(self.model, "gives_token_loss", False):
            raise ModelError("The model has no token loss. Attach it first: vlm_dft.attach_loss(model).")
        if self.compute_loss_func is not None:
            raise ValueError("DFTTrainer computes its own loss, expected no compute_loss_func. Give it the objective.")
        if reference is not None and kl is None:
            raise ValueError("A reference was given without kl. Say how strongly it holds: kl=Kl(strength, direction).")
        if reference is not None and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ModelError(
                "reference = a frozen copy is not sharded by DeepSpeed or FSDP. Train with LoRA, and leave it out: the reference is "
                "then the model with its adapters off."
            )
        if vision_cache is not None:
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            reason = (
                "a reference copy sees the pictures too"
                if reference is not None
                else why_not_cached(self.model, sharded=sharded)
            )
            if reason:
                raise ModelError(f"Vision features cannot be kept: {reason}. Leave vision_cache out.")
        self.vision_cache = vision_cache
        self.objective: str | Objective = objective
        self.kl, self.cadft = kl, cadft
        self.reference = None if reference is None else reference.eval().requires_grad_(False)
        self._full_bits = kind_bits(full_weight)
        self.model_accepts_loss_kwargs = True  # so that the supervised tokens of the step are counted
        self.diagnostics, self.alarms = TokenDiagnostics(sources), list[Alarm]()
        self._starvation, self._on_alarm = StarvationAlarms(sources), on_alarm
        self._staging = False
        self._norms: list[Any] = []  # gradient norms since the last log
        self._media: Tensor | None = None  # supervised media tokens since the last log; None: not counted
        self._samples: list[Tensor] = []  # mean NLLs of this step's samples
        self._moments, self._moments_step = [0.0, 0.0, 0.0], -1  # count, sum, sum of squares, before which step
        trained: Any = self.model
        head = trained.get_output_embeddings()
        alone = self.args.world_size == 1 and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        alone = alone and self.accelerator.scaler is None
        embedding = give_in_place_gradient(trained.get_input_embeddings()) if alone else None
        self._in_place = [
            layer for layer in (head if alone and isinstance(head, LossMixin) else None, embedding) if layer is not None
        ]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; on one process the gradients of head and embeddings are formed in place, since nobody reduces or scales them."""
        for layer in self._in_place:
            layer.in_place = True
        try:
            return super().train(*args, **kwargs)
        finally:
            for layer in self._in_place:
                layer.in_place, layer._kept = False, None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """sum(w * -log p) over this micro-batch / targets of the step, times the ranks that will be averaged over."""
        inputs = dict(inputs)
        labels, kinds, sources = inputs["labels"], inputs.pop("token_kinds", None), inputs.pop("source_ids", None)
        keys = inputs.pop(KEYS, None)
        if self.vision_cache is not None and keys is not None and "pixel_values_videos" not in inputs:
            with self.accelerator.autocast():
                features = self.vision_cache.features(
                    self.model, keys, inputs.pop("pixel_values"), inputs["image_grid_thw"]
                )
            inputs["mm_encoder_outputs"] = {"image": features}
        settings: dict[str, Any] = {"objective": self.objective, "num_items": num_items_in_batch}
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            settings["num_items"] = num_items_in_batch / self.accelerator.num_processes
        if self._full_bits:
            if kinds is None:
                raise ModelError("full_weight needs to know what each token is. Give ChatCollator tag_sources=[...].")
            settings["full_weight"] = (kinds & self._full_bits) != 0
        if self.kl is not None:
            settings["kl"] = self._with_reference(labels, inputs)
        if self.cadft:
            self._update_moments()
            settings["compatibility"] = Compatibility(self.cadft, *self._mean_and_deviation())
        outputs = model(**inputs, **settings)
        rows = labels[:, 1:] != IGNORE
        if model.training:
            own = (None if tags is None else tags[:, 1:][rows] for tags in (kinds, sources))
            self.diagnostics.add(outputs, *own)
            types = inputs.get("mm_token_type_ids")
            if types is not None:
                count = ((types > 0) & (labels != IGNORE)).sum()
                self._media = count if self._media is None else self._media + count
        if self.cadft and model.training:
            samples = sample_indices(labels, inputs)[:, 1:][rows]
            self._samples.append(sample_means(-outputs["log_p"], samples)[torch.bincount(samples) > 0])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _with_reference(self, labels: Tensor, inputs: dict[str, Any]) -> Kl | None:
        """The KL term with the frozen copy's hidden states on the same inputs; as it is where adapters are switched off."""
        if self.kl is None or self.reference is None:
            return self.kl
        kept = {key: value for key, value in inputs.items() if key not in ("labels", "loss_weights", "objective_ids")}
        reference = self.reference.to(labels.device)
        head = reference.get_output_embeddings()
        with torch.no_grad(), self.compute_loss_context_manager():
            hidden = response_hidden(reference, labels, kept)
        return replace(self.kl, hidden=hidden, weight=head.weight, bias=head.bias)

    def _update_moments(self) -> None:
        """At the first micro-batch of a step: take in the samples of the step before, of all processes."""
        if self._moments_step == self.state.global_step:
            return
        means = torch.cat(self._samples).double() if self._samples else torch.zeros(0, dtype=torch.float64)
        sums = torch.stack([torch.ones_like(means).sum(), means.sum(), means.square().sum()]).to(self.args.device)
        sums = self.accelerator.reduce(sums, "sum").tolist()
        if sums[0]:
            self._moments = [KEPT * old + new for old, new in zip(self._moments, sums, strict=True)]
        self._samples.clear()
        self._moments_step = self.state.global_step

    def _mean_and_deviation(self) -> tuple[float, float]:
        count, total, squares = self._moments
        if count < 2:
            return 0.0, 0.0
        mean = total / count
        return mean, max(0.0, squares / count - mean**2) ** 0.5

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the loss saw of its tokens since the last log to every training log, and raise alarms."""
        if "loss" in logs:
            found, sums = self.diagnostics.summary(lambda sums: self.accelerator.reduce(sums, "sum"))
            if found:
                limit = self.args.max_grad_norm
                clipped = [float(norm) > limit for norm in self._norms] if limit else []
                found |= {"clip_rate": sum(clipped) / len(clipped)} if clipped else {}
                if self._media is not None:
                    found["supervised_media_tokens"] = int(self.accelerator.reduce(self._media, "sum"))
                logs = {**logs, **found}
                for alarm in self._starvation.check(self.state.global_step, sums):
                    self.alarms.append(alarm)
                    if self.accelerator.is_main_process:
                        self._on_alarm(alarm)
            self._norms.clear()
            self._media = None
            if not math.isfinite(logs["loss"]) or math.isnan(logs.get("nll", 0.0)):
                raise ModelError(
                    f"The loss is {logs['loss']} (NLL {logs.get('nll', math.nan)}) at step {self.state.global_step}: the model has "
                    "diverged, or a picture or weight is not a number. Lower learning_rate, and start again from the last checkpoint."
                )
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if grad_norm is not None:
            self._norms.append(grad_norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._staging else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save aside, then rename: a checkpoint is whole or not there."""
        folder, name = Path(str(self.args.output_dir)), f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        if self.cadft:
            self._update_moments()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            state = {"moments": self._moments, "starvation": self._starvation.state()}
            write_json(folder / STAGING / name / STATE, state)
            _sync(folder / STAGING / name)
            shutil.rmtree(folder / name, ignore_errors=True)
            os.rename(folder / STAGING / name, folder / name)
            shutil.rmtree(folder / STAGING, ignore_errors=True)
            rotate_checkpoints(output_dir=str(folder), save_total_limit=self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights by the model's own from_pretrained: on disk Qwen2.5-VL has other key names than in memory."""
        model = model or self.model
        kept = Path(resume_from_checkpoint) / STATE
        if kept.is_file():
            state = json.loads(kept.read_text(encoding="utf-8"))
            self._moments = state["moments"]
            self._starvation.restore(state["starvation"])
        if self.is_fsdp_enabled or hasattr(model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype="auto")
        model.load_state_dict(saved.state_dict(), strict=True)


def _sync(folder: Path) -> None:
    """Force a folder's files to the disk before it is renamed."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
