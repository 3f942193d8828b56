"""Configuration: a YAML file, a recipe's own settings and command-line words in, one checked `TrainConfig` out.

Later wins: defaults (the paper's where it states them), the recipe card's `training`, the YAML file, the command line.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from vlm_dft.cards import nearest
from vlm_dft.errors import CardError, ConfigError
from vlm_dft.families import PARTS
from vlm_dft.kinds import KINDS
from vlm_dft.objectives import OBJECTIVES, canonical

TOO_LONG = ("raise", "drop", "shorten_answer", "downscale")
RESIZE = ("processor", "pillow")
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
    "Rank of LoRA on the language model (alpha = 2 x rank); 0 trains the parts themselves."
    train_parts: list[str] = field(default_factory=lambda: ["language", "head"])
    "Which of vision, merger, language, head are trained."
    precision: str = "auto"
    "auto: bf16 autocast over fp32 master weights on a GPU, fp32 elsewhere; fp32; bf16; pure_bf16 (no master weights)."
    attention: str | None = None
    "An attn_implementation of transformers; null chooses flash-attn where it works, else sdpa."
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
    limit: int | None = None
    "Use only the first rows of the recipe."
    eval_limit: int | None = None
    "Evaluate only the first samples of each split."
    processes: int = 1
    "Training processes (GPUs); set by scripts/train_qwenvl.sh from NPROC."
    deepspeed: str | None = None
    "A DeepSpeed configuration file, or zero2 / zero3 for those in scripts/deepspeed/."
    loss: dict[str, Any] = field(default_factory=dict)
    "What is added to the objective: kl and kl_direction (forward, reverse), cadft (beta), full_weight (kinds of tokens)."
    collator: dict[str, Any] = field(default_factory=dict)
    "Anything of ChatCollator's: too_long (drop unless set), packing, resize, source_objectives, format_strings, template_options; "
    "min_pixels and max_pixels (image areas after resizing; the processor's unless set); and hosts to fetch images from."
    trainer: dict[str, Any] = field(default_factory=dict)
    "Anything else of transformers' TrainingArguments, passed through."

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


COLLATOR = (
    "too_long",
    "packing",
    "resize",
    "template_options",
    "tokens_per_second",
    "source_objectives",
    "format_strings",
    "min_pixels",
    "max_pixels",
    "hosts",
)  # what `collator` may hold
LOSS = ("kl", "kl_direction", "cadft", "full_weight")  # what `loss` may hold
DIRECTIONS = {"forward": "KL(start || model)", "reverse": "KL(model || start)"}
OUTSIDE_BRACKETS = re.compile(r",(?![^(]*\))")  # commas between objectives, not between an objective's parameters
FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
OWNED_BY_US = {  # HF name -> ours: two names for one setting would contradict each other
    "per_device_train_batch_size": "batch_size and micro_batch", "gradient_accumulation_steps": "batch_size",
    "num_train_epochs": "epochs", "output_dir": "output", "warmup_steps": "warmup", "bf16": "precision",
    "fp16": "precision", "remove_unused_columns": "nothing: the collator needs every column", "data_seed": "seed",
    "label_smoothing_factor": "nothing: smoothed labels are not DFT",
    "gradient_checkpointing": "activation_checkpointing", "save_strategy": "save_steps",
    "eval_strategy": "nothing: the run is evaluated when it is trained", "load_best_model_at_end": "nothing: the last is kept",
    "dataloader_drop_last": "nothing: every row is used", "use_cpu": "nothing: a GPU is used where there is one",
}  # fmt: skip


def resolve_config(*layers: tuple[str, Mapping[str, Any]]) -> TrainConfig:
    """Merge layers of settings, (where they come from, settings), later ones winning, into a checked TrainConfig.

    Raises ConfigError for unknown names (with the nearest one), wrong kinds and contradictions.
    """
    values: dict[str, Any] = {}
    trainer: dict[str, Any] = {}
    collator: dict[str, Any] = {}
    loss: dict[str, Any] = {}
    for where, layer in layers:
        for key, value in layer.items():
            if key == "trainer":
                if not isinstance(value, Mapping):
                    raise ConfigError(f"{where}: trainer must be a mapping, found {value!r}.")
                trainer.update({name: _passed_through(name, v, where) for name, v in value.items()})
            elif key == "collator":
                if not isinstance(value, Mapping):
                    raise ConfigError(f"{where}: collator must be a mapping, found {value!r}.")
                collator.update({name: _of_collator(name, v, where) for name, v in value.items()})
            elif key == "loss":
                if not isinstance(value, Mapping):
                    raise ConfigError(f"{where}: loss must be a mapping, found {value!r}.")
                loss.update({name: _of_loss(name, v, where) for name, v in value.items()})
            elif key in COLLATOR:
                collator[key] = _of_collator(key, value, where)
            elif key in LOSS:
                loss[key] = _of_loss(key, value, where)
            elif key in FIELDS:
                values[key] = _coerce(key, value, where)
            else:
                trainer[key] = _passed_through(key, value, where)
    if values.get("lora"):
        if any("train_parts" in layer for where, layer in layers if not where.startswith("recipe ")):
            raise ConfigError("lora trains adapters of the language model alone: give either lora or train_parts.")
        values["train_parts"] = ["language"]
    chosen = any("micro_batch" in layer for where, layer in layers if not where.startswith("recipe "))
    processes, batch = values.get("processes", 1), values.get("batch_size", TrainConfig().batch_size)
    if "micro_batch" in values and not chosen and batch % processes == 0:  # a recipe's is the largest that fits
        values["micro_batch"] = math.gcd(values["micro_batch"], batch // processes)
    if loss.get("kl") == 0:  # switched off, whatever a card says
        loss = {name: value for name, value in loss.items() if name not in ("kl", "kl_direction")}
    collator, loss = ({k: v for k, v in found.items() if v is not None} for found in (collator, loss))
    if "objective" in values:
        try:
            values["objective"] = [canonical(name) for name in values["objective"]]
        except ValueError as error:
            raise ConfigError(str(error)) from None
    config = TrainConfig(**values, loss=loss, collator=collator, trainer=trainer)
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
    return loaded


def _check(config: TrainConfig) -> None:
    if not config.objective or len(set(config.objective)) != len(config.objective):
        raise ConfigError(f"objective: expected one or several different names, found {config.objective}.")
    if bool(config.loss.get("kl")) != ("kl_direction" in config.loss):
        raise ConfigError(
            f"kl and kl_direction belong together, found kl = {config.loss.get('kl')} and kl_direction = "
            f"{config.loss.get('kl_direction')}. Directions: {', '.join(f'{k} = {v}' for k, v in DIRECTIONS.items())}."
        )
    if config.loss.get("kl") and not config.lora and config.deepspeed:
        raise ConfigError(
            "kl without LoRA keeps a whole copy of the starting model, which DeepSpeed does not shard. Use LORA=RANK (the "
            "reference is then the model without its adapters), or leave out deepspeed."
        )
    unknown = [p for p in config.train_parts if p not in PARTS]
    if unknown or not config.train_parts:
        raise ConfigError(f"train_parts: expected some of {', '.join(PARTS)}, found {config.train_parts}.")
    if config.precision not in PRECISIONS:
        raise ConfigError(f"precision: expected one of {', '.join(PRECISIONS)}, found {config.precision!r}.")
    for name in ("epochs", "learning_rate", "batch_size", "micro_batch", "max_length", "processes"):
        if not 0 < getattr(config, name) < math.inf:  # not nan either
            raise ConfigError(f"{name} must be positive and finite, found {getattr(config, name)}.")
    for name in ("limit", "eval_limit"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name} must be positive or null, found {value}.")
    if config.lora < 0 or not 0 <= config.warmup < 1:
        raise ConfigError("lora must not be negative, and warmup must lie in [0, 1).")
    one_pass = config.micro_batch * config.processes
    if config.batch_size % one_pass:
        raise ConfigError(
            f"batch_size = {config.batch_size} is not a multiple of micro_batch x processes = {config.micro_batch} x "
            f"{config.processes} = {one_pass}. Nearest: {max(one_pass, config.batch_size // one_pass * one_pass)}."
        )


def _of_collator(name: str, value: Any, where: str) -> Any:
    if name not in COLLATOR:
        raise ConfigError(
            f"{where}: unknown setting {name!r} of collator.{nearest(name, COLLATOR)} Known: {', '.join(COLLATOR)}."
        )
    if name in ("min_pixels", "max_pixels"):
        return _positive(name, value, where)
    if name == "source_objectives":
        return _source_objectives(value, where)
    value = value.split(",") if name in ("hosts", "format_strings") and isinstance(value, str) else _plain(value)
    known = {"too_long": TOO_LONG, "resize": RESIZE, "packing": (True, False)}.get(name)
    if known is not None and value not in known:
        raise ConfigError(f"{where}: {name} must be one of {', '.join(map(str, known))}, found {value!r}.")
    return value


def _positive(name: str, value: Any, where: str) -> int | None:
    """A positive whole number, or None."""
    found = _plain(value)
    if found in (None, "", "null", "none"):
        return None
    if isinstance(found, bool) or not isinstance(found, (int, float)) or int(found) != found or found <= 0:
        raise ConfigError(f"{where}: {name} must be a whole number above 0 or null, found {value!r}.")
    return int(found)


def _source_objectives(value: Any, where: str) -> dict[str, str]:
    """{source: objective}, as a mapping or as source=objective,source=objective."""
    if value in (None, "", "null", "none"):
        return {}
    if isinstance(value, str):
        pairs = [piece.split("=", 1) for piece in OUTSIDE_BRACKETS.split(value) if piece.strip()]
        value = (
            {pair[0].strip(): pair[-1].strip() for pair in pairs} if all(len(pair) == 2 for pair in pairs) else value
        )
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: source_objectives must be source=objective,..., found {value!r}.")
    for source, name in value.items():
        if name not in OBJECTIVES:
            raise ConfigError(
                f"{where}: source_objectives gives {source!r} the unknown objective {name!r}.{nearest(str(name), OBJECTIVES)} "
                f"Known (without parameters): {', '.join(OBJECTIVES)}."
            )
    return dict(value)


def _of_loss(name: str, value: Any, where: str) -> Any:
    if name not in LOSS:
        raise ConfigError(f"{where}: unknown setting {name!r} of loss.{nearest(name, LOSS)} Known: {', '.join(LOSS)}.")
    if name == "full_weight":
        value = "" if value in ("none", "null") else value
        kinds = [kind.strip() for kind in (value.split(",") if isinstance(value, str) else value or ()) if kind.strip()]
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise ConfigError(
                f"{where}: full_weight takes kinds of tokens, found {unknown[0]!r}.{nearest(unknown[0], KINDS)} Known: "
                f"{', '.join(KINDS)}; texts of your own go into format_strings, and `format` into full_weight."
            )
        return kinds
    if value in (None, "", "null", "none"):
        return None
    if name == "kl_direction":
        if value not in DIRECTIONS:
            said = ", ".join(f"{k} = {v}" for k, v in DIRECTIONS.items())
            raise ConfigError(f"{where}: kl_direction must be one of {said}; found {value!r}.")
        return value
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < math.inf:
        raise ConfigError(f"{where}: {name} must be a number, 0 or more, found {value!r}.")
    return float(number)


def _passed_through(name: str, value: Any, where: str) -> Any:
    known = training_arguments()
    if name in OWNED_BY_US:
        raise ConfigError(f"{where}: {name} is set by {OWNED_BY_US[name]}.")
    if name == "max_steps" and not isinstance(_plain(value), int):
        raise ConfigError(f"{where}: max_steps must be a whole number, found {value!r}.")
    if name not in known:
        everything = [*FIELDS, *COLLATOR, *LOSS, *known]
        raise ConfigError(
            f"{where}: unknown setting {name!r}.{nearest(name, everything)} Ours: {', '.join([*FIELDS, *COLLATOR, *LOSS])}; "
            "and every field of transformers' TrainingArguments."
        )
    return _plain(value)


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
    except (TypeError, ValueError) as error:
        wanted = getattr(target, "__name__", str(target))
        raise ConfigError(f"{where}: {name} must be of type {wanted}, found {value!r}.") from error


def _plain(value: Any) -> Any:
    """A pass-through word as a bool, int or float where it reads as one."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def recipe_layer(recipe: str) -> Mapping[str, Any]:
    """The `training` settings of a recipe card; nothing for a bare file of conversations."""
    from vlm_dft.recipes import is_bare_file, read_recipe

    if is_bare_file(recipe):
        return {}
    training = read_recipe(recipe).get("training") or {}
    if not isinstance(training, Mapping):
        raise CardError(f"Recipe {recipe!r}: training must be a mapping, found {training!r}.")
    return training
