"""Preflight: a config in, a plan with every name looked up out; all the mistakes that can be found without loading a model."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_dft.benchmarks import read_benchmark
from vlm_dft.boards import check_boards
from vlm_dft.config import TrainConfig
from vlm_dft.contradictions import FLASH_PACKAGES
from vlm_dft.dimensions import dimensions_of
from vlm_dft.engines import Engine, check_devices, check_engine, check_installed
from vlm_dft.errors import CardError, ConfigError, ModelError
from vlm_dft.locate import resolve_model
from vlm_dft.recipes import check_places, read_recipe
from vlm_dft.runs import claim_folder, default_output, path_name
from vlm_dft.targets import match_targets


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that can start: the resolved config and the cards it names."""

    config: TrainConfig
    recipe: dict[str, Any]
    benchmark: dict[str, Any] | None

    @property
    def output(self) -> Path:
        """The run folder."""
        return Path(str(self.config.output))

    def folder(self, objective: str) -> Path:
        """Where an objective is trained: the run folder itself, or one below it when there are several."""
        return self.output / path_name(objective) if len(self.config.objective) > 1 else self.output


def check_run(config: TrainConfig, *, dry_run: bool = False) -> Plan:
    """Look up everything a run names and claim its folder. Raises a UserError; loads, downloads and trains nothing."""
    _check_model(config)
    _check_parts(config)
    engine = check_engine(config)
    recipe = read_recipe(config.recipe)
    name = config.benchmark if config.benchmark is not None else recipe.get("benchmark")
    benchmark = None if name in (None, "none") else read_benchmark(str(name))
    _check_order(recipe, config)
    check_boards(config.trainer.get("report_to", "tensorboard"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = replace(config, output=config.output or default_output(config), benchmark=str(name) if name else "none")
    if benchmark is None and "evaluate_every" in config.evaluation:
        raise ConfigError(
            "evaluate_every needs a benchmark, and the recipe names none. Set BENCHMARK=, or leave it out."
        )
    if dry_run:
        return Plan(config, recipe, benchmark)
    check_installed(engine)
    _check_installed(config)
    if engine.kind != "ddp" and "RANK" not in os.environ:
        raise ConfigError(
            f"engine = {engine.name} needs a launcher, for one process too, and none has started this one (RANK is not set). Set "
            f"ENGINE={config.engine} NPROC={config.processes} for scripts/train_qwenvl.sh, or start with {_launcher(config)}."
        )
    if world != config.processes:
        raise ConfigError(
            f"nproc is {config.processes}, but {world} processes run. Start with NPROC={config.processes} "
            f"bash scripts/train_qwenvl.sh (on several nodes NNODES= too), or with {_launcher(config)}."
        )
    _check_devices(config, engine)
    check_places(recipe, config.data)
    if benchmark is not None:
        _check_benchmark_files(benchmark, config)
    if int(os.environ.get("RANK", "0")) == 0:
        claim_folder(Path(str(config.output)), config)
    return Plan(config, recipe, benchmark)


def _check_order(recipe: dict[str, Any], config: TrainConfig) -> None:
    found = config.trainer.get("train_sampling_strategy", "random")
    if recipe.get("order") == "curriculum" and found != "sequential":
        raise ConfigError(
            f"Recipe {recipe['name']!r} is a curriculum, but train_sampling_strategy = {found} shuffles it. Leave that out, or use a copy of the "
            "card with order: shuffled."
        )


def _launcher(config: TrainConfig) -> str:
    return f"vlm-dft-launch --nproc_per_node {config.processes} -m vlm_dft.cli train ... --processes {config.processes}"


def _check_model(config: TrainConfig) -> None:
    """Whether the model's name says one, and whether what is asked for can be put on it."""
    folder = resolve_model(config.model)
    asked = f"lora = {config.lora}" if config.lora else f"quantize = {config.parts.get('quantize')}"
    if (config.lora or config.parts.get("quantize")) and (Path(folder) / "adapter_config.json").is_file():
        raise ModelError(
            f"{asked}, but {config.model!r} is itself a LoRA adapter: the new one would be saved for the base without the old one. "
            f"Merge it first: vlm-dft export {config.model} OUT --merge, then train on OUT."
        )


def _check_parts(config: TrainConfig) -> None:
    """Whether a model of known sizes has the parts and layers that are asked for."""
    model = dimensions_of(config.model)
    if model is None:
        return
    present = [part for part, count in model.parts.items() if count]
    missing = [part for part in config.train_parts if part not in present]
    why = " Its head is tied to the embeddings, which belong to the language model." if model.tied else ""
    if missing and (config.lora or missing == config.train_parts):
        raise ModelError(
            f"train_parts = {', '.join(missing)}: {config.model} has no parameters there.{why} Its parts: {', '.join(present)}."
        )
    for name in (f"{part}_{rate}" for part in missing for rate in ("learning_rate", "weight_decay")):
        if name in config.parts:
            raise ModelError(
                f"{name} = {config.parts[name]:g}, but {config.model} has no such part.{why} Its parts: {', '.join(present)}. Leave "
                f"{name} out."
            )
    if config.lora and config.parts.get("lora_targets"):
        match_targets(model.linears, config.lora_parts, config.parts["lora_targets"])


def _check_installed(config: TrainConfig) -> None:
    """What a setting needs installed, looked up without importing it."""
    needed = FLASH_PACKAGES.get(str(config.attention))
    if needed and importlib.util.find_spec(needed) is None:
        raise ModelError(
            f"attention = {config.attention} needs the package {needed}, which is not installed. Install it (see the extra "
            "flash-attn in pyproject.toml), or use attention sdpa."
        )
    for setting, package, extra in (
        (f"quantize = {config.parts.get('quantize')}" if config.parts.get("quantize") else "", "bitsandbytes", "qlora"),
        (f"optim = {config.trainer.get('optim')}" if _is_of_bitsandbytes(config) else "", "bitsandbytes", "qlora"),
        ("use_liger_kernel" if config.trainer.get("use_liger_kernel") else "", "liger_kernel", "liger"),
    ):
        if setting and importlib.util.find_spec(package) is None:
            raise ModelError(f"{setting} needs {package}, which is not installed. Run: pip install 'vlm-dft[{extra}]'")


def _is_of_bitsandbytes(config: TrainConfig) -> bool:
    optim = str(config.trainer.get("optim", ""))
    return "torch" not in optim and re.search("8bit|bnb|paged|lion|ademamix", optim) is not None


def _check_devices(config: TrainConfig, engine: Engine) -> None:
    """What a setting needs of the machine. Imports torch only where a setting asks for a GPU."""
    flash, half = str(config.attention).startswith("flash"), config.precision in ("bf16", "pure_bf16")
    if not (flash or half or engine.kind == "fsdp"):
        return
    from vlm_dft.models import check_precision, choose_attention, device_kind

    check_precision(config.precision)
    check_devices(engine, device_kind())
    if flash:
        choose_attention(config.attention, device_kind(), config.precision != "fp32", config.model)


def _check_benchmark_files(benchmark: dict[str, Any], config: TrainConfig) -> None:
    from vlm_dft.benchmarks import load_benchmark

    try:
        load_benchmark(str(config.benchmark), config.data, limit=config.eval_limit)  # every row and image file
    except CardError as error:
        raise CardError(f"{error} To train without an evaluation: BENCHMARK=none.") from error
