"""Configuration: a YAML file, a recipe's own settings and command-line words in, one checked `TrainConfig` out.

Later wins: defaults (the paper's where it states them), the recipe card's `training`, the YAML file, the command line.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from vlm_dft.cards import nearest
from vlm_dft.contradictions import check_together
from vlm_dft.errors import CardError, ConfigError
from vlm_dft.families import PARTS
from vlm_dft.objectives import canonical
from vlm_dft.settings import DIRECTIONS, GROUPS, OUTSIDE_BRACKETS, plain

OWN_STRATEGIES = ("random", "sequential")  # of train_sampling_strategy
PRECISIONS = ("auto", "fp32", "bf16", "pure_bf16")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One training run. Anything else that transformers' TrainingArguments knows may be set too and lands in `trainer`."""

    model: str = "tiny"
    "'tiny' (embedded), a checkpoint folder, or a hub id such as Qwen/Qwen2.5-VL-3B-Instruct."
    recipe: str = "drawn"
    "A card in data_recipes/, the path of one's own .yaml card, or a .json / .jsonl file of conversations."
    data: str | None = None
    "The folder that the recipe's and the benchmark's files are relative to."
    objective: list[str] = field(default_factory=lambda: ["dft"])
    "One or several of OBJECTIVES; several start from the same weights and see the same order of data."
    benchmark: str | None = None
    "A card in eval/, 'none', or null for the recipe's own."
    output: str | None = None
    "The run folder; null means runs/RECIPE-MODEL-OBJECTIVE."
    lora: int = 0
    "Rank of LoRA adapters (on the language model unless lora_parts says otherwise); 0 trains the parts themselves."
    precision: str = "auto"
    "auto: bf16 autocast over fp32 master weights on a GPU, fp32 elsewhere; fp32; bf16; pure_bf16 (no master weights)."
    attention: str | None = None
    "sdpa, eager, flash_attention_2 or flash_attention_3; null chooses flash-attn where it is installed and fits, else sdpa."
    seed: int = 0
    "Of the data order and of everything random."
    epochs: float = 1.0
    "Passes over the training set."
    learning_rate: float = 5e-5
    "Peak of a cosine schedule; the paper's."
    warmup: float = 0.1
    "Share of the steps over which the learning rate rises."
    batch_size: int = 128
    "Examples per optimiser step, over all processes and accumulated micro-batches."
    micro_batch: int = 1
    "Examples per forward pass of one process."
    max_length: int = 4096
    "Longest example in tokens; longer ones are dropped and counted, media are never cut."
    rows: dict[str, Any] = field(default_factory=dict)
    "limit (use only the first rows of the recipe, of every source of a mixture); bad_rows (refuse or drop what cannot be used, in place of "
    "what the cards say); workers (processes that read and measure; chosen by the number of rows unless set)."
    processes: int = 1
    "Training processes (GPUs); set by scripts/train_qwenvl.sh from NPROC."
    engine: str | None = None
    "What several processes share: null (DDP), zero2, zero3, zero3_offload, fsdp2 (scripts/engines/), or a .json of one's own."
    parts: dict[str, Any] = field(default_factory=dict)
    "train_parts (vision, merger, language, head), their PART_learning_rate and PART_weight_decay; lora_alpha, lora_dropout, lora_parts, "
    "lora_targets, quantize; recompute (the parts whose activations are computed again in the backward pass); vision_cache (GB per process "
    "for a frozen tower's features of pictures that come again; 0 unless set)."
    loss: dict[str, Any] = field(default_factory=dict)
    "What is added to the objective: kl and kl_direction (forward, reverse), cadft (beta), full_weight (kinds of tokens)."
    collator: dict[str, Any] = field(default_factory=dict)
    "Anything of ChatCollator's: too_long (drop unless set), packing, resize, source_objectives, format_strings, template_options; "
    "min_pixels and max_pixels (image areas after resizing; the processor's unless set); and hosts to fetch images from."
    evaluation: dict[str, Any] = field(default_factory=dict)
    "eval_limit (samples of each split after training); evaluate_every (steps), watch_limit, keep_best and patience while training."
    trainer: dict[str, Any] = field(default_factory=dict)
    "Anything else of transformers' TrainingArguments, passed through."

    @property
    def train_parts(self) -> list[str]:
        """The parts that are trained as they are; under LoRA none, unless named."""
        return list(self.parts.get("train_parts", () if self.lora else ("language", "head")))

    @property
    def lora_parts(self) -> list[str]:
        """The parts under LoRA: the language model unless others are named; none without LoRA."""
        return list(self.parts.get("lora_parts", ("language",))) if self.lora else []

    @property
    def limit(self) -> int | None:
        """Use only the first rows of every source; None: all."""
        return self.rows.get("limit")

    @property
    def eval_limit(self) -> int | None:
        """Evaluate only the first samples of each split; None: all."""
        return self.evaluation.get("eval_limit")

    @property
    def min_pixels(self) -> int | None:
        """Smallest image area after resizing; None: the processor's."""
        return self.collator.get("min_pixels")

    @property
    def max_pixels(self) -> int | None:
        """Largest image area after resizing; None: the processor's."""
        return self.collator.get("max_pixels")

    @property
    def accumulation(self) -> int:
        """Micro-batches per process and optimiser step."""
        return self.batch_size // (self.micro_batch * self.processes)

    def steps(self, examples: int) -> int:
        """Optimiser steps of the whole run over so many examples."""
        limit = int(self.trainer.get("max_steps", -1))
        return limit if limit > 0 else max(1, math.ceil(math.ceil(examples / self.batch_size) * self.epochs))

    def as_dict(self) -> dict[str, Any]:
        """Every field, as written to config.yaml."""
        return dataclasses.asdict(self)


def recomputed_parts(asked: list[str] | None, trained: Collection[str], device: str) -> list[str]:
    """The parts to recompute: those asked for; else on a GPU the language model, and the tower where it is trained."""
    if asked is not None:
        return asked
    if device != "cuda":
        return []
    return ["language", *(["vision"] if {"vision", "merger"} & set(trained) else [])]


FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
OWNED_BY_US = {  # HF name -> ours: two names for one setting would contradict each other
    "per_device_train_batch_size": "batch_size and micro_batch", "gradient_accumulation_steps": "batch_size",
    "num_train_epochs": "epochs", "output_dir": "output", "warmup_steps": "warmup", "bf16": "precision",
    "fp16": "precision", "remove_unused_columns": "nothing: the collator needs every column", "data_seed": "seed",
    "label_smoothing_factor": "nothing: smoothed labels are not DFT",
    "gradient_checkpointing": "recompute", "activation_checkpointing": "recompute", "gradient_checkpointing_kwargs": "recompute",
    "activation_checkpointing_kwargs": "recompute", "save_strategy": "save_steps",
    "save_only_model": "nothing: a checkpoint without the optimiser's state cannot be continued",
    "eval_strategy": "evaluate_every", "eval_steps": "evaluate_every", "greater_is_better": "keep_best",
    "per_device_eval_batch_size": "nothing: an evaluation asks 32 samples at once", "do_train": "nothing: `vlm-dft train` does",
    "resume_from_checkpoint": "nothing: the same command continues from the last whole checkpoint",
    "ignore_data_skip": "nothing: a continued run goes on with the rows that it had not seen",
    "label_names": "nothing: the collator's are labels",
    "average_tokens_across_devices": "nothing: the targets of all processes are counted together",
    "load_best_model_at_end": "keep_best", "metric_for_best_model": "keep_best",
    "dataloader_drop_last": "nothing: every row is used", "deepspeed": "engine", "fsdp": "engine", "fsdp_config": "engine",
    "auto_find_batch_size": "micro_batch", "use_cpu": "nothing: a GPU is used where there is one",
}  # fmt: skip


def resolve_config(*layers: tuple[str, Mapping[str, Any]]) -> TrainConfig:
    """Merge layers of settings, (where they come from, settings), later ones winning, into a checked TrainConfig.

    Raises ConfigError for unknown names (with the nearest one), wrong kinds and contradictions.
    """
    values: dict[str, Any] = {}
    trainer: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    owner = {name: group for group, settings in GROUPS.items() for name in settings}
    for where, layer in layers:
        for key, value in layer.items():
            key = "processes" if key == "nproc" else key  # as the command line calls it
            if key in (*GROUPS, "trainer") and not isinstance(value, Mapping):
                raise ConfigError(f"{where}: {key} must be a mapping, found {value!r}.")
            if key == "trainer":
                trainer.update({name: _passed_through(name, v, where) for name, v in value.items()})
            elif key in GROUPS:
                groups[key].update({name: _of_group(key, name, v, where) for name, v in value.items()})
            elif key in owner:
                groups[owner[key]][key] = _of_group(owner[key], key, value, where)
            elif key in FIELDS:
                values[key] = _coerce(key, value, where)
            else:
                trainer[key] = _passed_through(key, value, where)
    said = [layer for where, layer in layers if not where.startswith("recipe ")]
    if values.get("lora") and not any("train_parts" in {**layer, **layer.get("parts", {})} for layer in said):
        groups["parts"].pop("train_parts", None)  # a recipe's, which are for training without adapters
    chosen = any("micro_batch" in layer for where, layer in layers if not where.startswith("recipe "))
    processes, batch = values.get("processes", 1), values.get("batch_size", TrainConfig().batch_size)
    if "micro_batch" in values and not chosen and batch % processes == 0:  # a recipe's is the largest that fits
        values["micro_batch"] = math.gcd(values["micro_batch"], batch // processes)
    if groups["loss"].get("kl") == 0:  # switched off, whatever a card says
        groups["loss"] = {k: v for k, v in groups["loss"].items() if k not in ("kl", "kl_direction")}
    groups = {group: {k: v for k, v in found.items() if v is not None} for group, found in groups.items()}
    if "objective" in values:
        try:
            values["objective"] = [canonical(name) for name in values["objective"]]
        except ValueError as error:
            raise ConfigError(str(error)) from None
    config = TrainConfig(**{**values, **groups, "trainer": trainer})
    _check(config)
    return config


def read_config_file(path: str) -> dict[str, Any]:
    """The mapping in a YAML configuration file. Raises ConfigError."""
    import yaml

    if Path(path).suffix in (".json", ".jsonl"):
        raise ConfigError(
            f"{path} is a file of rows, expected a YAML file of settings. Train on it with --recipe {path}."
        )
    if not Path(path).is_file():
        raise ConfigError(f"No configuration file at {path!r}. Expected a YAML file of TrainConfig fields.")
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({error}).") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(loaded).__name__}.")
    if "licence" in loaded and ("source" in loaded or "mixture" in loaded):
        raise ConfigError(
            f"{path} is a recipe card, expected a YAML file of settings. Train on it with --recipe {path}."
        )
    return loaded


def _check(config: TrainConfig) -> None:
    if not config.objective or len(set(config.objective)) != len(config.objective):
        raise ConfigError(f"objective: expected one or several different names, found {config.objective}.")
    if bool(config.loss.get("kl")) != ("kl_direction" in config.loss):
        raise ConfigError(
            f"kl and kl_direction belong together, found kl = {config.loss.get('kl')} and kl_direction = "
            f"{config.loss.get('kl_direction')}. Directions: {', '.join(f'{k} = {v}' for k, v in DIRECTIONS.items())}."
        )
    if config.loss.get("kl") and not config.lora and config.engine:
        raise ConfigError(
            "kl without LoRA keeps a whole copy of the starting model, which no engine shards. Use LORA=RANK (the "
            "reference is then the model without its adapters), or leave out engine."
        )
    if not config.lora and not config.train_parts:
        raise ConfigError(f"train_parts: expected some of {', '.join(PARTS)}, found none.")
    if config.parts.get("vision_cache") and {"vision", "merger"} & {
        *config.train_parts,
        *config.lora_parts,
    }:
        raise ConfigError(
            "vision_cache keeps what a frozen vision tower makes of a picture, but vision or merger is trained. Leave one of them out."
        )
    if config.parts.get("vision_cache") and config.engine:
        raise ConfigError(
            "vision_cache needs the tower whole in every process, but engine shards it. Leave one of them out."
        )
    if config.precision not in PRECISIONS:
        raise ConfigError(
            f"precision: expected one of {', '.join(PRECISIONS)}, found {config.precision!r}.{nearest(config.precision, PRECISIONS)}"
        )
    for name in ("epochs", "learning_rate", "batch_size", "micro_batch", "max_length", "processes"):
        if not 0 < getattr(config, name) < math.inf:  # not nan either
            raise ConfigError(f"{name} must be positive and finite, found {getattr(config, name)}.")
    if config.lora < 0 or not 0 <= config.warmup < 1:
        raise ConfigError("lora must not be negative, and warmup must lie in [0, 1).")
    check_together(config)


def _of_group(group: str, name: str, value: Any, where: str) -> Any:
    known = GROUPS[group]
    if name not in known:
        raise ConfigError(
            f"{where}: unknown setting {name!r} of {group}.{nearest(name, known)} Known: {', '.join(known)}."
        )
    return known[name](name, value, where)


def _passed_through(name: str, value: Any, where: str) -> Any:
    known = training_arguments()
    if name in OWNED_BY_US:
        raise ConfigError(f"{where}: {name} is set by {OWNED_BY_US[name]}.")
    if name == "train_sampling_strategy" and value not in OWN_STRATEGIES:
        raise ConfigError(
            f"{where}: train_sampling_strategy must be one of {', '.join(OWN_STRATEGIES)}, found {value!r}: with others the rows "
            "of a step would depend on the number of processes. Its rows are dealt by length anyway."
        )
    if name == "max_steps" and not isinstance(plain(value), int):
        raise ConfigError(f"{where}: max_steps must be a whole number, found {value!r}.")
    if name not in known:
        ours = [*FIELDS, *(name for settings in GROUPS.values() for name in settings)]
        raise ConfigError(
            f"{where}: unknown setting {name!r}.{nearest(name, [*ours, *known])} Ours: {', '.join(ours)}; "
            "and every field of transformers' TrainingArguments."
        )
    return plain(value)


@cache
def training_arguments() -> tuple[str, ...]:
    """Names of TrainingArguments' fields, read from its source: importing transformers would take seconds."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ConfigError("transformers is not installed. Run: pip install vlm-dft")
    tree = ast.parse((Path(spec.origin).parent / "training_args.py").read_text(encoding="utf-8"))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments")
    return tuple(n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name))


def _coerce(name: str, value: Any, where: str) -> Any:
    """A field's value in the field's type; strings are read as the command line would give them."""
    kind = get_type_hints(TrainConfig)[name]
    options = get_args(kind) if get_origin(kind) not in (list, dict) else ()
    if value is None or (value in ("", "null", "none") and type(None) in options and name != "benchmark"):
        if type(None) in options:
            return None
        raise ConfigError(f"{where}: {name} must not be empty.")
    target = next((k for k in options if k is not type(None)), kind)
    try:
        if get_origin(target) is list:
            items = OUTSIDE_BRACKETS.split(value) if isinstance(value, str) else list(value)
            return [str(item).strip() for item in items if str(item).strip()]
        if target is int:
            if isinstance(value, bool) or (not isinstance(value, str) and int(value) != value):
                raise ValueError("not a whole number")
            return int(value)
        if isinstance(value, (bool, list, dict)):
            raise ValueError("not a single value")
        return target(value)
    except (TypeError, ValueError, OverflowError) as error:
        wanted = getattr(target, "__name__", str(target))
        raise ConfigError(f"{where}: {name} must be of type {wanted}, found {value!r}.") from error


def recipe_layer(recipe: str) -> Mapping[str, Any]:
    """The `training` settings of a recipe card, and the order that a curriculum needs; nothing for a bare file of conversations."""
    from vlm_dft.recipes import is_bare_file, read_recipe

    if is_bare_file(recipe):
        return {}
    card = read_recipe(recipe)
    training = card.get("training") or {}
    if not isinstance(training, Mapping):
        raise CardError(f"Recipe {recipe!r}: training must be a mapping, found {training!r}.")
    return {**training, "train_sampling_strategy": "sequential"} if card.get("order") == "curriculum" else training
