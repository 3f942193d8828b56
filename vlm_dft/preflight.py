"""Preflight: a config in, a plan with every name looked up out; all the mistakes that can be found without loading a model."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_dft.benchmarks import read_benchmark
from vlm_dft.boards import check_boards
from vlm_dft.config import TrainConfig
from vlm_dft.errors import CardError, ConfigError
from vlm_dft.locate import engine_file, resolve_model
from vlm_dft.recipes import read_recipe, recipe_root
from vlm_dft.runs import claim_folder, default_output, path_name


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
    resolve_model(config.model)
    engine_file(config.engine)
    recipe = read_recipe(config.recipe)
    name = config.benchmark if config.benchmark is not None else recipe.get("benchmark")
    benchmark = None if name in (None, "none") else read_benchmark(str(name))
    if benchmark is None and config.evaluation.get("evaluate_every"):
        raise ConfigError(
            f"evaluate_every needs a benchmark, and recipe {config.recipe!r} names none. Add benchmark = NAME, or leave it out."
        )
    check_boards(config.trainer.get("report_to", "tensorboard"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = replace(config, output=config.output or default_output(config), benchmark=str(name) if name else "none")
    if dry_run:
        return Plan(config, recipe, benchmark)
    if world != config.processes:
        raise ConfigError(
            f"nproc is {config.processes}, but {world} processes run. Start with NPROC={config.processes} "
            f"bash scripts/train_qwenvl.sh, or with torchrun and --processes {config.processes}."
        )
    recipe_root(recipe, config.data)
    if benchmark is not None:
        _check_benchmark_files(benchmark, config)
    if int(os.environ.get("RANK", "0")) == 0:
        claim_folder(Path(str(config.output)), config)
    return Plan(config, recipe, benchmark)


def _check_benchmark_files(benchmark: dict[str, Any], config: TrainConfig) -> None:
    from vlm_dft.benchmarks import load_benchmark

    try:
        load_benchmark(str(config.benchmark), config.data, limit=config.eval_limit)  # every row and image file
    except CardError as error:
        raise CardError(f"{error} To train without an evaluation: BENCHMARK=none.") from error


def describe_run(plan: Plan) -> str:
    """The resolved run as text: settings, batch arithmetic, steps, files; for --dry-run."""
    import yaml

    config, rows = plan.config, plan.recipe.get("rows")
    rows = min(int(rows), config.limit) if rows and config.limit else rows
    lines = [
        f"# {plan.recipe['name']}: {str(plan.recipe['description']).strip()}",
        yaml.safe_dump(config.as_dict(), sort_keys=False).rstrip(),
        "",
        f"# global batch: {config.processes} processes x {config.micro_batch} examples x {config.accumulation} accumulated "
        f"= {config.batch_size}",
        f"# source: {yaml.safe_dump(dict(plan.recipe['source']), default_flow_style=True).strip()}",
    ]
    if rows:
        lines.append(f"# steps: about {config.steps(int(rows)):,} for {int(rows):,} rows and {config.epochs:g} epochs")
    if plan.benchmark is None:
        lines.append("# evaluation: none, the recipe names no benchmark; BENCHMARK= chooses one")
    if plan.recipe.get("image_root") and "hub" in plan.recipe["source"] and config.data is None:
        lines.append("# still to say: DATA=, the folder with the images (see the notes)")
    if plan.recipe.get("notes"):
        lines.append(f"# notes: {str(plan.recipe['notes']).strip()}")
    deepspeed = engine_file(config.engine)
    if deepspeed:
        lines += [f"# DeepSpeed: {config.engine}", Path(deepspeed).read_text(encoding="utf-8").rstrip()]
    if config.processes > 1 or deepspeed:
        lines.append(
            f"# launched by: torchrun --standalone --nproc_per_node {config.processes} -m vlm_dft.cli train ..."
        )
    lines += [
        "# AdamW, betas 0.9 and 0.95, weight decay 0.01, cosine schedule, gradient norm clipped to 1.0 (unless set above)",
        "# dry run: nothing was loaded or downloaded",
    ]
    return "\n".join(lines)
