"""Trainer: micro-batches in, exactly normalised steps of a token objective and diagnostics out (checkpoints: saving.py)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.data import IterableDataset

from vlm_dft.config import OWN_STRATEGIES
from vlm_dft.diagnostics import Alarm, StarvationAlarms, TokenDiagnostics
from vlm_dft.embedding import give_in_place_gradient
from vlm_dft.errors import ModelError
from vlm_dft.kinds import kind_bits
from vlm_dft.loss_head import Compatibility, Kl, LossMixin, response_hidden, sample_indices, sample_means
from vlm_dft.objectives import IGNORE, Objective, find_objective
from vlm_dft.order import SILENT, SilentCollator, Split, StepSampler, WithSilentPlaces
from vlm_dft.parts import Parts, part_rates, split_groups
from vlm_dft.proof import GradientProof
from vlm_dft.saving import SealedTrainer
from vlm_dft.stopping import PatientWorker
from vlm_dft.vision_cache import KEYS, VisionCache, why_not_cached

KEPT = 0.95  # of those moments, from one optimiser step to the next
LOGGER = logging.getLogger("vlm_dft")


class DFTTrainer(SealedTrainer):
    """transformers' Trainer with a token objective on response rows alone, normalised over the whole optimiser step.

    model: with the fused loss attached (loss_head.attach_loss). objective: a name of OBJECTIVES, with parameters or
    without, or a function. kl: adds a KL term to the starting model: with LoRA that model is this one with its adapters
    off, else `reference` is a frozen copy. cadft: beta of the sample-level factor (0: none); a sample's mean NLL is held
    against those of earlier steps, so that the result does not depend on how a step is split. full_weight: kinds of
    tokens (kinds.KINDS) with w = 1 whatever the objective. sources: ChatCollator's `tag_sources`, for the diagnostics.
    parts: gives each part its learning rate and weight decay. proof: looks at the gradients of the first steps.
    lengths: tokens of each example, if they are known: the examples of a step are then dealt to micro-batches and processes
    by length. on_alarm: called on the first process with what starves (diagnostics.Alarm), also collected in `alarms`.
    vision_cache: keeps the features of pictures that come again; the collator is then a KeyedCollator.
    on_activity: called with "training", "evaluating" and "saving" when one of them begins.
    `watch`: what evaluates while training (watching.Watch), in place of the stock evaluation of a loss.

    A step has the examples of plain seeded shuffling whatever the split, the last of an epoch too: no example is drawn twice
    or left out, by any map-style data set and collator (order.py). An IterableDataset is for one process.

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
        lengths: Sequence[int] | None = None,
        parts: Parts | None = None,
        proof: GradientProof | None = None,
        vision_cache: VisionCache | None = None,
        on_alarm: Callable[[Alarm], Any] = lambda alarm: LOGGER.warning(alarm.message),
        on_activity: Callable[[str], Any] = lambda what: None,
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
        self._check_order()
        self.lengths = lengths
        plan = getattr(self.args.hf_deepspeed_config, "config", {}) if self.is_deepspeed_enabled else {}
        if parts is not None and not parts.same_rates() and "optimizer" in plan:
            raise ModelError(
                "Parts have rates of their own, which a DeepSpeed engine does not have whose file has an optimizer of its own. Leave "
                "`optimizer` out of that file: the optimiser is then that of `optim`."
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
        self.parts, self.proof = parts, proof
        self.reference = None if reference is None else reference.eval().requires_grad_(False)
        self._full_bits = kind_bits(full_weight)
        self.model_accepts_loss_kwargs = True  # so that the supervised tokens of the step are counted
        self.diagnostics, self.alarms = TokenDiagnostics(sources), list[Alarm]()
        self._starvation, self._on_alarm = StarvationAlarms(sources), on_alarm
        self.on_activity = on_activity
        self._norms: list[Any] = []  # gradient norms since the last log
        self._last_norm: Any = 0.0
        self._normed_at = -1  # its step
        self._media: Tensor | None = None  # supervised media tokens since the last log; None: not counted
        self._inputs: Tensor | None = None  # all tokens since the last log, padding left out
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

    def _check_order(self) -> None:
        """Refuse what would make a step depend on how it is split, or leave examples out."""
        args, own = self.args, cast(Any, self.args.accelerator_config)
        if args.train_sampling_strategy not in OWN_STRATEGIES:
            raise ValueError(
                f"train_sampling_strategy = {args.train_sampling_strategy!r} makes steps that depend on the number of processes, "
                f"expected one of {', '.join(map(repr, OWN_STRATEGIES))}. Give DFTTrainer the lengths: it deals the rows of a "
                "step by them."
            )
        if args.dataloader_drop_last:
            raise ValueError(
                "dataloader_drop_last leaves examples out, expected False: the last step is exact. Leave it out."
            )
        if own.split_batches or own.dispatch_batches:
            raise ValueError(
                "accelerator_config: split_batches and dispatch_batches cut the tensors of a batch apart by rows, which patches "
                "of pictures are not. Leave them out."
            )
        if isinstance(self.train_dataset, IterableDataset) and args.world_size > 1:
            raise ValueError(
                f"An IterableDataset in {args.world_size} processes: they would end after different numbers of batches, or "
                "repeat rows. Give a data set with __len__ and __getitem__."
            )

    def get_train_dataloader(self) -> Any:
        """The stock one, with silent places in the data set, the order and the collator."""
        own, collator = self.train_dataset, self.data_collator
        if own is None or isinstance(own, IterableDataset):
            self.accelerator.dataloader_config.dispatch_batches = False  # its default cuts the patches of pictures, too
            return super().get_train_dataloader()
        self.train_dataset, self.data_collator = WithSilentPlaces(own, self.lengths), SilentCollator(collator)
        try:
            loader: Any = super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = own, collator
        if loader.num_workers:
            start = PatientWorker(loader.worker_init_fn)
            for one in (loader, getattr(loader, "base_dataloader", loader)):  # accelerate's, and the one that it reads
                one.worker_init_fn = start
        loader.set_sampler(
            self._order
        )  # so that accelerate's samplers around it tell it the epoch, in a resumed run too
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        accumulation = self.args.gradient_accumulation_steps
        processes = self.get_total_train_batch_size(self.args) // (self._train_batch_size * accumulation)
        self._order = StepSampler(
            len(rows),
            Split(self._train_batch_size, processes, accumulation),
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            lengths=self.lengths,
            packed=bool(getattr(self.data_collator, "packing", False)),
            shuffle=self.args.train_sampling_strategy == "random",
        )
        return self._order

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; on one process the gradients of head and embeddings are formed in place, since nobody reduces or scales them."""
        for layer in self._in_place:
            layer.in_place = True
        try:
            return super().train(*args, **kwargs)
        finally:
            for layer in self._in_place:
                layer.in_place, layer._kept = False, None

    def create_optimizer(self, model: Any = None) -> Any:
        """The stock optimiser, its groups split by part where parts have rates of their own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made and self.parts is not None and not self.parts.same_rates():
            named: Any = self.model if model is None else model
            split_groups(optimizer, named, self.parts, self.args.learning_rate)
        return optimizer

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Without what the stock names miss: norms of other names than "norm", such as `ln_q` of Qwen2.5-VL's merger."""
        norms = [f"{name}." for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
        return [name for name in super().get_decay_parameter_names(model) if not name.startswith(tuple(norms))]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A micro-batch's passes; until every trained part is proved, the gradients are looked at."""
        if self.proof is None or self.proof.done:
            return super().training_step(model, inputs, num_items_in_batch)
        with self.proof.watching(self, inputs):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """sum(w * -log p) over this micro-batch / targets of the step, times the ranks that will be averaged over."""
        inputs = dict(inputs)
        labels, kinds, sources = inputs["labels"], inputs.pop("token_kinds", None), inputs.pop("source_ids", None)
        keys, silent = inputs.pop(KEYS, None), inputs.pop(SILENT, False)
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
            mask = inputs.get("attention_mask")
            count = torch.tensor(labels.numel(), device=labels.device) if mask is None else mask.sum()
            count = count * (not silent)  # a silent batch's tokens are nobody's
            self._inputs = count if self._inputs is None else self._inputs + count
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
                if self._inputs is not None:
                    found["input_tokens"] = int(self.accelerator.reduce(self._inputs, "sum"))
                if self._media is not None:
                    found["supervised_media_tokens"] = int(self.accelerator.reduce(self._media, "sum"))
                if self.parts is not None and "learning_rate" in logs:
                    found |= part_rates(self.parts, logs["learning_rate"], self.args.learning_rate)
                logs = {**logs, **found}
                for alarm in self._starvation.check(self.state.global_step, sums):
                    self.alarms.append(alarm)
                    if self.accelerator.is_main_process:
                        self._on_alarm(alarm)
            self._norms.clear()
            self._media = self._inputs = None
            if not math.isfinite(logs["loss"]) or math.isnan(logs.get("nll", 0.0)):
                raise self._diverged(f"The loss is {logs['loss']} (NLL {logs.get('nll', math.nan)})")
        super().log(logs, start_time)

    def _diverged(self, found: str) -> ModelError:
        return ModelError(
            f"{found} at step {self.state.global_step}: the model has diverged, or a picture or weight is not a number. Lower "
            "learning_rate, and start again from the last checkpoint."
        )

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if (
            grad_norm is not None and self._normed_at != self.state.global_step
        ):  # an epoch's end tells its last step's again
            self._norms.append(grad_norm)
            self._last_norm, self._normed_at = grad_norm, self.state.global_step
        pause = "evaluating" if self.control.should_evaluate else "saving" if self.control.should_save else None
        if pause:
            self.on_activity(pause)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        if pause:
            self.on_activity("training")

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        if self.watch is None:
            found: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
            return found
        found = self.watch.evaluate(self)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        if self.control.should_save:
            self.on_activity("saving")
        return found

    def before_save(self) -> None:
        """A diverged model is not saved: rotation would leave no other."""
        finite = torch.isfinite(self._tr_loss) and math.isfinite(float(self._last_norm))
        if self.accelerator.reduce(torch.tensor(float(not finite), device=self.args.device), "sum"):
            raise self._diverged(
                f"Before a checkpoint: loss {float(self._tr_loss)}, gradient norm {float(self._last_norm)}"
            )
        if self.cadft:
            self._update_moments()

    def run_state(self) -> dict[str, Any]:
        """What CADFT knows of the samples before, and what starves."""
        return {"moments": self._moments, "starvation": self._starvation.state()}

    def restore_run_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `run_state`."""
        self._moments = state["moments"]
        self._starvation.restore(state["starvation"])

    def window(self) -> dict[str, Any]:
        """What this process has gathered since the last log, which a log after a resume goes on from."""
        norms = [float(norm) for norm in self._norms]
        return {
            "loss": self._tr_loss,
            "logged_at": self._globalstep_last_logged,
            "norms": norms,
            "media": self._media,
            "inputs": self._inputs,
            "diagnostics": self.diagnostics.state(),
        }

    def restore_window(self, found: Sequence[dict[str, Any]]) -> None:
        """Go on with this process's window; of another number of processes, with all of theirs in the first."""
        mine = len(found) == 1 or self.args.process_index == 0
        kept: dict[str, Any] = {**found[0], "loss": torch.stack([one["loss"] for one in found]).mean()}
        for name in ("media", "inputs"):
            counts = [one[name] for one in found if one[name] is not None]
            kept[name] = torch.stack(counts).sum() * mine if counts else None
        sums = [one["diagnostics"] for one in found if one["diagnostics"] is not None]
        kept["diagnostics"] = {name: sum(one[name] for one in sums) for name in sums[0]} if sums and mine else None
        kept = send_to_device(kept, self.args.device)
        self._tr_loss, self._globalstep_last_logged = kept["loss"], kept["logged_at"]
        self._norms, self._media, self._inputs = kept["norms"], kept["media"], kept["inputs"]
        self.diagnostics.restore(kept["diagnostics"])
