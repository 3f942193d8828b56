"""Arguments: a config in, transformers' TrainingArguments out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from vlm_dft.boards import check_boards, prepare_boards
from vlm_dft.config import TrainConfig
from vlm_dft.dimensions import dimensions_of
from vlm_dft.engines import Engine, check_engine, check_installed, filled, layer_classes, trainer_words
from vlm_dft.locate import base_model, resolve_model
from vlm_dft.models import device_kind


def training_arguments_of(config: TrainConfig, folder: Path, n_examples: int) -> TrainingArguments:
    """transformers' arguments of a run: ours, then the config's pass-through, which wins where it is set."""
    steps, gpu = config.steps(n_examples), device_kind() == "cuda"
    prepare_boards(folder)
    engine, half = check_engine(config), gpu and config.precision in ("auto", "bf16")
    check_installed(engine)
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
        "bf16": half,
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "dataloader_num_workers": 4 if gpu else 0,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "report_to": ["tensorboard"],
        "project": "vlm-dft",  # trackio's
        "run_name": "-".join(dict.fromkeys([Path(config.output or folder).name, folder.name])),
        "logging_steps": max(1, steps // 100),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a diverged run must not look like a finished one
        "save_steps": max(1, -(-steps // 5)),
        "save_total_limit": 2,
        "seed": config.seed,
        "data_seed": config.seed,
        "disable_tqdm": True,  # live.py shows the run
        **trainer_words(engine, filled(engine, config, _width(config, engine), half=half)),
    }
    given = dict(config.trainer)
    if "report_to" in given:
        given["report_to"] = check_boards(given["report_to"])
    return TrainingArguments(**{**ours, **given})


def _width(config: TrainConfig, engine: Engine) -> int | None:
    """Width of the model's residual stream, from which DeepSpeed's "auto" sizes follow; its config may be fetched for it."""
    if engine.kind != "deepspeed":
        return None
    model = dimensions_of(config.model)
    if model is not None:
        return model.hidden
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(base_model(resolve_model(config.model))).get_text_config().hidden_size)


def fit_fsdp(arguments: TrainingArguments, model: Any) -> None:
    """Tell FSDP2 which layers of this model to gather one by one, and in which precision; nothing for another engine.

    accelerate alone would sum the gradients of the processes in bf16, and round what the loss is given (the number of
    targets, weights of turns) to bf16 on the way in: DDP does neither.
    """
    plugin = arguments.fsdp_plugin_args
    if plugin is None:
        return
    plugin.setdefault("transformer_cls_names_to_wrap", ",".join(layer_classes(model)))
    if arguments.bf16:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        model.forward = torch.autocast(arguments.device.type, torch.bfloat16)(model.forward)  # casts the pictures
