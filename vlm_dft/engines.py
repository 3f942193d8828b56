"""Engines: a name or a JSON file in; its settings, checked against the run's and with every "auto" filled, out. No torch.

Two kinds of files, as transformers takes them: DeepSpeed's own ({"zero_optimization": ...}), and {"fsdp": true,
"fsdp_config": {...}} for FSDP2.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlm_dft.cards import PACKAGE, nearest
from vlm_dft.config import TrainConfig
from vlm_dft.errors import ConfigError, ModelError

Kind = Literal["ddp", "deepspeed", "fsdp"]

FOLDERS = (PACKAGE / "_cards/engines", PACKAGE.parent / "scripts/engines")
DEEPSPEED_KEYS = (
    "zero_optimization",
    "bf16",
    "fp16",
    "gradient_clipping",
    "train_batch_size",
    "zero_allow_untested_optimizer",
)
SIZES: dict[
    str, Callable[[int], int]
] = {  # DeepSpeed's names for what follows from the width of the residual stream, as transformers fills them
    "reduce_bucket_size": lambda width: width * width,
    "stage3_prefetch_bucket_size": lambda width: int(0.9 * width * width),
    "stage3_param_persistence_threshold": lambda width: 10 * width,
}
CLASSES = {
    "ddp": ("NO", "MULTI_CPU", "MULTI_GPU"),
    "deepspeed": ("DEEPSPEED",),
    "fsdp": ("FSDP",),
}  # accelerate's names


@dataclass(frozen=True, slots=True)
class Engine:
    """What several processes share, and how: DDP, DeepSpeed or FSDP2."""

    name: str
    kind: Kind
    settings: Mapping[str, Any]  # the file's
    path: Path | None

    @property
    def zero(self) -> Mapping[str, Any]:
        """DeepSpeed's zero_optimization."""
        found: Mapping[str, Any] = self.settings.get("zero_optimization", {})
        return found

    @property
    def stage(self) -> int:
        """Of ZeRO: 1 shards optimiser states, 2 gradients too, 3 parameters too; 0 without DeepSpeed."""
        return int(self.zero.get("stage", 0))

    def offloads(self, what: Literal["optimizer", "param"]) -> bool:
        """Whether optimiser states or parameters are kept in the host's memory."""
        if self.kind == "fsdp":
            return bool(self.settings["fsdp_config"].get("cpu_offload", False))
        return str(self.zero.get(f"offload_{what}", {}).get("device", "none")) != "none"


DDP = Engine("ddp", "ddp", {}, None)


def find_engine(name: str | None) -> Engine:
    """The engine of a name or of a JSON file's path; None: DDP. Raises ModelError for one that is neither kind."""
    if name is None:
        return DDP
    known = {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.json"))}
    path = known.get(name, Path(name))
    if not path.is_file():
        hint = " DDP is what runs without an engine." if name.lower() == "ddp" else nearest(name, known)
        raise ModelError(f"No engine {name!r}.{hint} Expected one of {', '.join(known)}, or the path of a .json file.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"Engine {path}: expected JSON, found something else ({error}).") from error
    kind = _kind(settings)
    if kind is None:
        said = (
            f"the keys {', '.join(list(settings)[:6]) or 'none'}"
            if isinstance(settings, dict)
            else f"a {type(settings).__name__}"
        )
        raise ModelError(
            f"Engine {path}: expected a DeepSpeed configuration (with zero_optimization) or an FSDP one (with fsdp and "
            f"fsdp_config), found {said}."
        )
    return Engine(name if name in known else path.stem, kind, settings, path)


def _kind(settings: Any) -> Kind | None:
    if not isinstance(settings, dict):
        return None
    if settings.get("fsdp") and isinstance(settings.get("fsdp_config"), dict):
        return "fsdp"
    return "deepspeed" if isinstance(settings.get("zero_optimization"), dict) else None


def check_engine(config: TrainConfig) -> Engine:
    """The engine of a run, nothing in it contradicting the run's settings. Raises ModelError or ConfigError."""
    engine = find_engine(config.engine)
    if engine.kind == "ddp":
        return engine
    if config.parts.get("quantize"):
        raise ConfigError(
            f"quantize with engine {engine.name}: a quantised base is not split over processes. Leave out engine: adapters are "
            "small, and DDP trains them."
        )
    (_check_deepspeed if engine.kind == "deepspeed" else _check_fsdp)(engine, config)
    return engine


def _refuse(engine: Engine, key: str, found: Any, expected: str) -> ConfigError:
    return ConfigError(f"Engine {engine.path}: {key} = {json.dumps(found)}, expected {expected}.")


def _check_deepspeed(engine: Engine, config: TrainConfig) -> None:
    settings = engine.settings
    if engine.stage not in (0, 1, 2, 3):
        raise _refuse(engine, "zero_optimization.stage", engine.zero.get("stage"), "0, 1, 2 or 3")
    if config.precision == "pure_bf16":
        raise ConfigError(
            f"precision = pure_bf16 with engine {engine.name}: DeepSpeed keeps fp32 master weights, split over the processes. "
            "Use precision auto, or engine fsdp2."
        )
    if settings.get("tensor_parallel"):
        raise _refuse(
            engine, "tensor_parallel", settings["tensor_parallel"], "none: every process takes examples of its own"
        )
    for key, expected in _batch(config).items():
        if settings.get(key, "auto") not in ("auto", expected):
            raise _refuse(
                engine, key, settings[key], f'"auto", or {expected} as batch_size, micro_batch and processes have it'
            )
    clipping, ours = settings.get("gradient_clipping", "auto"), float(config.trainer.get("max_grad_norm", 1.0))
    if clipping not in ("auto", ours):
        raise _refuse(engine, "gradient_clipping", clipping, f'"auto", or {ours} as max_grad_norm')
    half = {"auto": (True, False), "fp32": (False,), "bf16": (True,)}[config.precision]
    for key, allowed in (("bf16", half), ("fp16", (False,))):
        found = settings.get(key, {}).get("enabled", "auto")
        if found != "auto" and found not in allowed:
            raise _refuse(engine, f"{key}.enabled", found, f'"auto": precision = {config.precision} decides')
    if engine.stage == 3 and engine.zero.get("stage3_gather_16bit_weights_on_model_save", True) is not True:
        raise _refuse(
            engine,
            "stage3_gather_16bit_weights_on_model_save",
            False,
            "true: a checkpoint would hold no weights to load",
        )
    _check_blocks(engine, config)
    optim = str(config.trainer.get("optim", "adamw_torch"))
    if engine.offloads("optimizer") and not optim.startswith("adamw"):
        raise ConfigError(
            f"optim = {optim} with engine {engine.name}: an optimiser in the host's memory is DeepSpeedCPUAdam. Leave out optim, "
            "or take an engine without offload_optimizer."
        )


def _check_blocks(engine: Engine, config: TrainConfig) -> None:
    """An optimizer or scheduler block of a DeepSpeed file: taken where it says what the run says, else refused."""
    block = engine.settings.get("optimizer")
    if block is not None:
        if block.get("type") not in ("Adam", "AdamW") or not str(config.trainer.get("optim", "adamw_torch")).startswith(
            "adamw"
        ):
            raise _refuse(
                engine,
                "optimizer.type",
                block.get("type"),
                "AdamW, which `optim` chooses; leave the block out, and set optim",
            )
        ours = {
            "lr": config.learning_rate, "eps": float(config.trainer.get("adam_epsilon", 1e-8)),
            "betas": [float(config.trainer.get("adam_beta1", 0.9)), float(config.trainer.get("adam_beta2", 0.95))],
            "weight_decay": float(config.trainer.get("weight_decay", 0.01)),
        }  # fmt: skip
        names = {
            "lr": "learning_rate",
            "eps": "adam_epsilon",
            "betas": "adam_beta1 and adam_beta2",
            "weight_decay": "weight_decay",
        }
        for key, found in block.get("params", {}).items():
            if (
                key in ours
                and found not in ("auto", ours[key])
                and list(found if key == "betas" else [found]) != ours[key]
            ):
                raise _refuse(engine, f"optimizer.params.{key}", found, f'"auto", or {ours[key]} as {names[key]}')
    schedule = engine.settings.get("scheduler")
    if schedule is not None:
        raise _refuse(
            engine,
            "scheduler",
            schedule.get("type"),
            "no scheduler: lr_scheduler_type, learning_rate and warmup say it",
        )


def _check_fsdp(engine: Engine, config: TrainConfig) -> None:
    settings = engine.settings["fsdp_config"]
    for key, expected, why in (
        ("version", 2, "FSDP1 is on its way out of transformers"),
        ("state_dict_type", "FULL_STATE_DICT", "a checkpoint in shards is nothing that from_pretrained loads"),
    ):
        if settings.get(key, expected) != expected:
            raise _refuse(engine, f"fsdp_config.{key}", settings[key], f"{json.dumps(expected)}: {why}")
    if settings.get("activation_checkpointing"):
        raise _refuse(engine, "fsdp_config.activation_checkpointing", True, "none: `recompute` says which parts")
    if config.processes < 2:
        raise ConfigError(
            f"engine = {engine.name} splits the model over processes, found 1. Set NPROC=, or leave out engine."
        )
    if config.precision == "pure_bf16" and config.lora:
        raise ConfigError(
            f"precision = pure_bf16 with lora and engine {engine.name}: adapters are fp32, and FSDP2 splits no layer of two "
            "precisions. Use precision auto."
        )


def _batch(config: TrainConfig) -> dict[str, int]:
    """DeepSpeed's names for the batch arithmetic: processes x micro_batch x accumulation = batch_size."""
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        "train_batch_size": config.batch_size,
    }


def filled(engine: Engine, config: TrainConfig, width: int | None, *, half: bool) -> dict[str, Any]:
    """The engine's settings with every "auto" replaced, by width [of the residual stream] and by the run's settings.

    half: bf16 is on. With width None (a model that is not here yet) what follows from it stays "auto".
    """
    settings: dict[str, Any] = json.loads(json.dumps(engine.settings))
    if engine.kind == "fsdp":
        options = settings["fsdp_config"] = {
            "version": 2,
            "state_dict_type": "FULL_STATE_DICT",
            **settings["fsdp_config"],
        }
        if options.get("transformer_layer_cls_to_wrap") in (None, "auto", []):
            options.pop("transformer_layer_cls_to_wrap", None)  # layer_classes finds them in the model
    if engine.kind != "deepspeed":
        return settings
    zero = settings["zero_optimization"]
    for key, size in SIZES.items():
        if zero.get(key) == "auto" and width is not None:
            zero[key] = size(width)
    if engine.stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    settings |= _batch(config)
    settings["gradient_clipping"] = float(config.trainer.get("max_grad_norm", 1.0))  # left out, accelerate clips at 1.0
    for key, on in (("bf16", half), ("fp16", False)):
        if settings.get(key, {}).get("enabled", "auto") == "auto":
            settings[key] = {**settings.get(key, {}), "enabled": on}
    settings.pop("optimizer", None)  # says what the run says (_check_blocks), and would undo the parts' learning rates
    return settings


def trainer_words(engine: Engine, settings: dict[str, Any]) -> dict[str, Any]:
    """The filled settings as transformers' TrainingArguments take them."""
    if engine.kind == "fsdp":
        return {"fsdp": True, "fsdp_config": dict(settings["fsdp_config"])}
    return {"deepspeed": settings} if engine.kind == "deepspeed" else {}


def layer_classes(model: Any) -> list[str]:
    """The classes of a model's repeated layers, of any family: what stands in its lists of modules, outermost.

    FSDP gathers one such layer at a time. (A family's own `_no_split_modules` may name a class that this model lacks.)
    """
    found: dict[str, None] = {}

    def walk(module: Any) -> None:
        for child in module.children():
            if type(child).__name__ == "ModuleList":
                layers = [layer for layer in child if any(True for _ in layer.parameters())]
                found.update(dict.fromkeys(type(layer).__name__ for layer in layers))
            else:
                walk(child)

    walk(model)
    if not found:
        raise ModelError(
            f"FSDP2 splits a model layer by layer, but {type(model).__name__} has no list of layers. Name their classes in "
            "fsdp_config.transformer_layer_cls_to_wrap."
        )
    return list(found)


def check_installed(engine: Engine) -> None:
    """Whether what the engine needs is installed; not asked by a dry run, which may be on another machine. Raises ModelError."""
    if engine.kind == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ModelError(
            f"engine = {engine.name} needs DeepSpeed, which is not installed. Run: pip install 'vlm-dft[deepspeed]', or use "
            "engine fsdp2, which needs nothing more."
        )


def check_devices(engine: Engine, device: str) -> None:
    """Whether the engine can run on this kind of device, before a model is loaded for it. Raises ModelError."""
    if engine.kind == "fsdp" and device != "cuda":
        raise ModelError(
            f"engine = {engine.name} needs GPUs, found none: accelerate takes FSDP on GPUs alone. Use DDP or zero3."
        )


def check_runs(engine: Engine, found: str) -> None:
    """Whether the engine that accelerate set up is the one asked for: it stays with DDP in silence where it takes no other."""
    if found not in CLASSES[engine.kind]:
        raise ModelError(
            f"engine = {engine.name} was asked for, but accelerate runs {found}. FSDP2 needs GPUs, one for each process."
        )
