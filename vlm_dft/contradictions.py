"""Contradictions: a config in; nothing out, or a ConfigError for settings that cannot stand together. No torch, nothing loaded."""

from __future__ import annotations

import ast
import importlib.util
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_dft.cards import nearest
from vlm_dft.errors import ConfigError
from vlm_dft.families import PARTS

if TYPE_CHECKING:
    from vlm_dft.config import TrainConfig

FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}  # what each imports
ATTENTIONS = ("sdpa", "eager", *FLASH_PACKAGES)
OF_LORA = ("lora_alpha", "lora_dropout", "lora_parts", "lora_targets", "quantize")
NAMES = {"optim": ("training_args", "OptimizerNames"), "lr_scheduler_type": ("trainer_utils", "SchedulerType")}


def check_together(config: TrainConfig) -> None:
    """Every rule below. Raises ConfigError with what was found and what to do."""
    for rule in (_attention, _lora, _parts, _watching, _numbers, _batch, _names):
        rule(config)


def _attention(config: TrainConfig) -> None:
    if config.attention is None:
        return
    models = sys.modules.get(
        "transformers.modeling_utils"
    )  # where it is imported, a program may have registered its own
    registered = models.ALL_ATTENTION_FUNCTIONS.valid_keys() if models else ()
    if config.attention not in (*ATTENTIONS, *registered):
        raise ConfigError(
            f"attention: unknown {config.attention!r}.{nearest(config.attention, ATTENTIONS)} Expected one of "
            f"{', '.join(ATTENTIONS)}, or null to choose."
        )
    if config.attention.startswith("flash") and config.precision == "fp32":
        raise ConfigError(
            f"attention = {config.attention} with precision = fp32: flash-attn computes in half precision alone. Use precision "
            "auto or bf16, or attention sdpa."
        )


def _lora(config: TrainConfig) -> None:
    given = [name for name in OF_LORA if config.parts.get(name) not in (None, [])]
    if given and not config.lora:
        raise ConfigError(
            f"{', '.join(given)} without lora: there is no adapter to which {'they' if len(given) > 1 else 'it'} could apply. "
            "Set lora to a rank, say 16."
        )
    if config.parts.get("lora_parts") == []:
        raise ConfigError(
            "lora_parts: expected some of vision, merger, language, found none. Leave it out for language."
        )
    both = [part for part in config.train_parts if part in config.lora_parts]
    if both:
        raise ConfigError(
            f"{', '.join(both)} is in train_parts and in lora_parts{'' if 'lora_parts' in config.parts else ' (language unless set)'}: "
            "trained whole, its adapters add nothing. Take it out of one of them."
        )
    if config.loss.get("kl") and config.lora and config.train_parts:
        raise ConfigError(
            f"kl with LoRA holds the model to itself without its adapters, but train_parts = {', '.join(config.train_parts)} changes "
            "that model too. Train LoRA alone, or leave out kl."
        )


def _parts(config: TrainConfig) -> None:
    for part in PARTS:
        for name in (f"{part}_learning_rate", f"{part}_weight_decay"):
            if name in config.parts and part not in (*config.train_parts, *config.lora_parts):
                raise ConfigError(
                    f"{name} = {config.parts[name]:g}, but {part} is not trained. Found train_parts = "
                    f"{config.train_parts}{f' and lora_parts = {config.lora_parts}' if config.lora else ''}. Name it there, or leave {name} out."
                )


def _watching(config: TrainConfig) -> None:
    watching = config.evaluation
    for name in ("patience", "watch_limit", "keep_best"):
        if watching.get(name) and "evaluate_every" not in watching:
            raise ConfigError(
                f"{name} without evaluate_every: nothing is evaluated while training. Set evaluate_every to steps."
            )
    if "evaluate_every" in watching and config.benchmark == "none":
        raise ConfigError(
            "evaluate_every needs a benchmark, found benchmark = none. Name one, or leave evaluate_every out."
        )


def _numbers(config: TrainConfig) -> None:
    whole: dict[str, Callable[[float], bool]] = {
        "max_steps": lambda n: n == -1 or n >= 1,
        "save_total_limit": lambda n: n >= 1,
        "dataloader_num_workers": lambda n: n >= 0,
    }
    for name, right in whole.items():
        found = config.trainer.get(name)
        if found is not None and not (_is_number(found) and int(found) == found and right(found)):
            least = 0 if name == "dataloader_num_workers" else 1
            raise ConfigError(f"{name} must be a whole number of at least {least}, found {found!r}.")
    for name in ("save_steps", "logging_steps"):
        found = config.trainer.get(name)
        if found is not None and not (_is_number(found) and (0 < found < 1 or (found >= 1 and int(found) == found))):
            raise ConfigError(
                f"{name} must be a whole number of steps, 1 or more, or a share of all steps between 0 and 1, found {found!r}."
            )
    for name, low, high in (
        ("adam_beta1", 0, 1),
        ("adam_beta2", 0, 1),
        ("adam_epsilon", 0, 1),
        ("weight_decay", 0, None),
        ("max_grad_norm", 0, None),
    ):
        found = config.trainer.get(name)
        if found is not None and not (_is_number(found) and found >= low and (high is None or found < high)):
            raise ConfigError(
                f"{name} must be a number, {low} or more{f' and below {high}' if high else ''}, found {found!r}."
            )


def _is_number(found: object) -> bool:
    return isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)


def _batch(config: TrainConfig) -> None:
    one_pass = config.micro_batch * config.processes
    if config.batch_size % one_pass:
        below = config.batch_size // one_pass * one_pass
        near = f"{below} or {below + one_pass}" if below else str(one_pass)
        raise ConfigError(
            f"batch_size = {config.batch_size} is not a multiple of micro_batch x processes = {config.micro_batch} x "
            f"{config.processes} = {one_pass}. Nearest: {near}."
        )


def _names(config: TrainConfig) -> None:
    for setting in NAMES:
        found = config.trainer.get(setting)
        known = _known(setting)
        if found is not None and str(found) not in known:
            longer = [name for name in known if name.startswith(f"{found}_")]  # adamw: adamw_torch
            hint = nearest(longer[0] if longer else str(found), known)
            raise ConfigError(f"{setting}: unknown {found!r}.{hint} Known: {', '.join(known)}.")


@cache
def _known(setting: str) -> tuple[str, ...]:
    """The values of one of transformers' enumerations, read from its source: importing transformers would take seconds."""
    module, name = NAMES[setting]
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None  # config.training_arguments has looked
    tree = ast.parse((Path(spec.origin).parent / f"{module}.py").read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    values = [node.value for node in body if isinstance(node, ast.Assign)]
    return tuple(value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str))
