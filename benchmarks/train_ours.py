"""Our trainer on the job of train_peers.py, measured in the same way; and where its CPU seconds go.

Run by train_step.py, in a process of its own: `ours` (padded), `ours_packed`, `overhead` and `overhead_packed`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_peers import TRAINING, Watch, cpu


class Shares:
    """CPU seconds between the end of step 1 and the end of training, by what they are spent on."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.within = False

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its outermost calls counted under a name."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.within:
                return function(*args, **kwargs)
            self.within, start = True, cpu()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + cpu() - start
                self.within = False

        return call

    def watch(self, trainer: Any, model: Any) -> None:
        """Time the model with its loss, the backward pass, the optimiser with clipping, and the collator."""
        from transformers import TrainerCallback

        model.forward = self.timed("forward and loss", model.forward)
        trainer.accelerator.backward = self.timed("backward", trainer.accelerator.backward)
        trainer.accelerator.clip_grad_norm_ = self.timed("clipping", trainer.accelerator.clip_grad_norm_)
        trainer.data_collator = self.timed("collator", trainer.data_collator)
        shares = self

        class Optimiser(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
                bare = optimizer.optimizer  # of accelerate's wrapper
                bare.step = shares.timed("optimiser", bare.step)
                bare.zero_grad = shares.timed("optimiser", bare.zero_grad)

            def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
                if state.global_step == 1:
                    shares.spent.clear()

        trainer.add_callback(Optimiser())


def ours(job: dict[str, Any], watch: Watch, *, packing: bool, shares: Shares | None = None) -> None:
    """As training.train_objective puts it together, without checkpoints."""
    from step_alone import examples_of
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback

    from vlm_dft.arguments import training_arguments_of
    from vlm_dft.config import resolve_config
    from vlm_dft.models import load_processor
    from vlm_dft.pace import Pace
    from vlm_dft.progress import Metrics
    from vlm_dft.trainer import DFTTrainer
    from vlm_dft.training import checks_of, make_collator, prepare_model

    folder = Path(job["output"])
    config = resolve_config(("benchmark", {
        "model": job["model"], "batch_size": job["batch"], "micro_batch": job["batch"], "max_length": 100_000, "warmup": 0,
        "train_parts": "vision,merger,language,head", "packing": packing, "learning_rate": TRAINING["learning_rate"],
        **{key: TRAINING[key] for key in ("lr_scheduler_type", "logging_steps", "adam_beta2", "weight_decay", "optim")},
    }))  # fmt: skip
    set_seed(0)
    model, _, _ = prepare_model(config)
    processor = load_processor(job["model"])
    watch.ready = cpu()
    examples = examples_of(job["rows"])
    arguments = training_arguments_of(config, folder, len(examples))
    arguments.save_strategy = "no"
    collator = make_collator(processor, config, tag_sources=["tabmwp"])
    metrics = Metrics(folder / "metrics.jsonl", Pace({}), None)
    trainer = DFTTrainer(
        model=model, args=arguments, train_dataset=examples, data_collator=collator, processing_class=processor,
        objective="dft", sources=["tabmwp"], callbacks=[metrics, *checks_of(model, collator, print)],
    )  # fmt: skip
    metrics.alarms = trainer.alarms
    trainer.remove_callback(PrinterCallback)
    if shares is not None:
        shares.watch(trainer, model)
    trainer.train()


def main() -> None:
    import torch

    torch.set_num_threads(1)
    way, path = sys.argv[1:]
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    watch = Watch()
    shares = Shares() if way.startswith("overhead") else None
    with watch.around():
        ours(job, watch, packing=way.endswith("packed"), shares=shares)
    if shares is not None:
        watch.found["shares"] = shares.spent
    Path(job["result"]).write_text(json.dumps(watch.found), encoding="utf-8")


if __name__ == "__main__":
    main()
