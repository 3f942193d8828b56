"""Training: a config, examples and a model in, a run folder with metrics and whole checkpoints out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from vlm_dft.arguments import training_arguments_of
from vlm_dft.chat import Example
from vlm_dft.collators import ChatCollator
from vlm_dft.config import TrainConfig
from vlm_dft.errors import ModelError
from vlm_dft.loss_head import Kl, attach_loss, check_loss
from vlm_dft.models import (
    add_lora,
    choose_attention,
    device_kind,
    freeze_parts,
    load_model,
    load_processor,
    part_table,
)
from vlm_dft.progress import Metrics
from vlm_dft.recompute import chosen_parts, use_recompute
from vlm_dft.runs import last_checkpoint
from vlm_dft.segment_attention import check_packing, use_segment_attention
from vlm_dft.sources import MediaAccess
from vlm_dft.trainer import DFTTrainer
from vlm_dft.vision_attention import (
    check_window_attention,
    stop_window_attention,
    use_window_attention,
    uses_window_attention,
    window_samples,
)
from vlm_dft.vision_cache import KeyedCollator, VisionCache


class _Rows(Dataset[Example]):
    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, k: int) -> Example:
        return self.examples[k]


class _Loss(TrainerCallback):
    """Refuses to train a model whose own logits are not what the attached loss makes of its hidden states. Raises ModelError."""

    def __init__(self, collator: ChatCollator) -> None:
        asked, said = {"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Two red bars: 12."}
        other = collator.apart()
        other.packing, other.tag_sources = False, None
        self.batch = other([Example([asked, said])])

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_loss(model, self.batch)


class _Packing(TrainerCallback):
    """Refuses to train on packed rows with a model in which one sample sees another. Raises ModelError."""

    def __init__(self, collator: ChatCollator) -> None:
        self.collator = collator

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_packing(model, self.collator)


class _Windows(TrainerCallback):
    """Goes back to stock sdpa, and says so, where vision attention by window length is not what it was."""

    def __init__(self, collator: ChatCollator, say: Callable[[str], Any]) -> None:
        other = collator.apart()
        other.packing, other.tag_sources = False, None
        self.batch, self.say = other(window_samples()), say

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        try:
            check_window_attention(model, self.batch)
        except ModelError as error:
            stop_window_attention(model)
            self.say(f"      vision attention back to window by window: {error}")


def checks_of(model: Any, collator: ChatCollator, say: Callable[[str], Any]) -> list[TrainerCallback]:
    """What is proven of a model before its first step."""
    windows = uses_window_attention(model)
    return [
        _Loss(collator),
        *([_Packing(collator)] if collator.packing else []),
        *([_Windows(collator, say)] if windows else []),
    ]


def make_collator(processor: Any, config: TrainConfig, **changes: Any) -> ChatCollator:
    """The collator of a run: what is too long is dropped unless the config says otherwise."""
    words = {"too_long": "drop", **config.collator, **changes}
    hosts = words.pop("hosts", ())
    for name in ("min_pixels", "max_pixels"):  # of the processor
        words.pop(name, None)
    access = MediaAccess(hosts=frozenset([hosts] if isinstance(hosts, str) else hosts))
    return ChatCollator(processor, max_length=config.max_length, access=access, **words)


def _timing(model: Any) -> dict[str, Any]:
    """What the collator cannot know of a model: Qwen2.5-VL's temporal positions per second of a video."""
    vision = getattr(model.config, "vision_config", None)
    found = getattr(vision, "tokens_per_second", None)
    return {} if found is None else {"tokens_per_second": found}


def prepare_model(config: TrainConfig) -> tuple[Any, str]:
    """The model to train, parts frozen or LoRA added, fused loss attached; and a line on the choices made."""
    if config.precision in ("bf16", "pure_bf16") and device_kind() != "cuda":
        raise ModelError(f"precision = {config.precision} needs a GPU, found none. Use precision auto or fp32.")
    attention, reason = choose_attention(config.attention, device_kind(), half=config.precision != "fp32")
    dtype = torch.bfloat16 if config.precision == "pure_bf16" else torch.float32
    model = load_model(config.model, dtype=dtype, attention=attention)
    attach_loss(model)
    if config.collator.get("packing") and attention == "sdpa":
        use_segment_attention(model)
        reason += ", segment by segment in packed rows"
    if attention == "sdpa":
        why_not = use_window_attention(model)
        reason += f", the vision tower by stock sdpa ({why_not})" if why_not else ", vision windows by length"
    trained = set(config.train_parts)
    if config.lora:
        model = add_lora(model, config.lora)
    else:
        freeze_parts(model, trained)
    recomputed = use_recompute(model, chosen_parts(config.parts.get("recompute"), trained, device_kind()))
    if recomputed:
        reason += f"; recomputed in the backward pass: {', '.join(recomputed)}"
    rows = part_table(model)
    parts = ", ".join(
        f"{part} {r['trainable']:,} of {r['parameters']:,}" for part, r in rows.items() if r["parameters"]
    )
    return model, f"attention {attention} ({reason}); trainable parameters: {parts}; weights {str(dtype)[6:]}"


def loss_terms(config: TrainConfig) -> dict[str, Any]:
    """What DFTTrainer is given of the config's `loss`: KL term and its reference, CADFT's beta, tokens of full weight."""
    loss = config.loss
    terms: dict[str, Any] = {"cadft": float(loss.get("cadft", 0.0)), "full_weight": loss.get("full_weight", ())}
    if loss.get("kl"):
        terms["kl"] = Kl(float(loss["kl"]), loss["kl_direction"])
        if not config.lora:
            terms["reference"] = load_model(
                config.model, dtype=torch.bfloat16 if device_kind() == "cuda" else torch.float32
            )
    return terms


def train_objective(
    config: TrainConfig,
    objective: str,
    examples: list[Example],
    folder: Path,
    *,
    echo: Callable[[str], Any] | None = None,
) -> Path:
    """Train one objective into a folder, continuing from its last whole checkpoint. Returns the final checkpoint's path."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = config.steps(len(examples))
    final = folder / f"checkpoint-{steps}"
    last = last_checkpoint(folder)
    if last == final:
        return final
    arguments = training_arguments_of(config, folder, len(examples))
    if arguments.world_size != config.processes:
        raise ModelError(
            f"processes = {config.processes}, but {arguments.world_size} are running. Start several with NPROC= (torchrun)."
        )
    if arguments.n_gpu > 1:
        raise ModelError(
            "Several GPUs in one process would mean DataParallel. Start one process per GPU: NPROC=<GPUs>."
        )
    if arguments.deepspeed:
        import deepspeed

        deepspeed.init_distributed()  # ZeRO-3 splits the weights while they load, and must know the world by then
    processor = load_processor(config.model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    set_seed(config.seed)  # LoRA draws its start
    model, choices = prepare_model(config)
    sources = list(dict.fromkeys(example.source for example in examples))
    collator = make_collator(processor, config, tag_sources=sources, **_timing(model))
    if echo is not None:
        echo(f"      {choices}")
        if last is not None:
            echo(f"      continuing from {last}")
    room = config.parts.get("vision_cache")
    cache = VisionCache(room * 1e9) if room else None
    metrics = Metrics(folder / "metrics.jsonl", f"      {objective}", echo is not None)
    trainer = DFTTrainer(
        model=model,
        args=arguments,
        train_dataset=_Rows(examples),
        data_collator=collator if cache is None else KeyedCollator(collator),
        vision_cache=cache,
        processing_class=processor,
        objective=objective,
        **loss_terms(config),
        sources=sources,
        on_alarm=metrics.say,
        callbacks=[metrics, *checks_of(model, collator, echo or (lambda line: None))],
    )
    metrics.alarms = trainer.alarms
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if cache is not None and echo is not None:
        echo(f"      {cache.summary()}")
    reached = last_checkpoint(folder)
    if reached != final:
        raise ModelError(
            f"Training ended at {reached}, expected {final.name}. Is max_steps or save_strategy overridden?"
        )
    return final


def leave_engines() -> None:
    """Forget DeepSpeed and the process group, so that models loaded from now on are whole and in this process alone."""
    from accelerate.state import AcceleratorState, PartialState  # type: ignore[import-untyped]
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    PartialState._reset_state()


def repeated_rows(config: TrainConfig, examples: int) -> int:
    """Rows that the data loader trains twice per epoch, to give every process a batch of the last step."""
    return -examples % (config.micro_batch * config.processes) if config.processes > 1 else 0
