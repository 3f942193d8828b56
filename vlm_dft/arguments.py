"""Arguments: a config in, transformers' TrainingArguments out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from vlm_dft.config import TrainConfig
from vlm_dft.locate import engine_file
from vlm_dft.models import device_kind


def training_arguments_of(config: TrainConfig, folder: Path, n_examples: int) -> TrainingArguments:
    """transformers' arguments of a run: ours, then the config's pass-through, which wins where it is set."""
    steps, gpu = config.steps(n_examples), device_kind() == "cuda"
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    ours: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        "num_train_epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "weight_decay": 0.01,
        "warmup_steps": config.warmup,
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "bf16": gpu and config.precision in ("auto", "bf16"),
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "dataloader_num_workers": 4 if gpu else 0,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "report_to": ["tensorboard"],
        "logging_steps": max(1, steps // 100),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a diverged run must not look like a finished one
        "save_steps": max(1, -(-steps // 5)),
        "save_total_limit": 2,
        "seed": config.seed,
        "data_seed": config.seed,
        "deepspeed": engine_file(config.engine),
        "disable_tqdm": True,  # progress.py shows a bar
    }
    return TrainingArguments(**{**ours, **config.trainer})
