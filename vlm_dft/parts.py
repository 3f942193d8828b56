"""Parts: a model and a config in, the model with its parts frozen, trained or under LoRA out, and the table that says so."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlm_dft.adapters import Adapters, add_lora
from vlm_dft.config import TrainConfig
from vlm_dft.errors import ModelError
from vlm_dft.families import PARTS, Family, find_family, part_of

WEIGHT_DECAY = 0.01  # unless weight_decay is set; norms and biases have none
COPIED = ".original_module."  # peft's: what a module trained whole was before
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "uint8": "nf4", "int8": "int8", "float64": "fp64"}


@dataclass
class Parts:
    """What is trained of each part, how fast, and how it stands in memory: the plan that the first step's gradients prove."""

    family: Family
    trained: tuple[str, ...]  # whole; of those that the model has
    adapters: Adapters | None = None
    learning_rates: dict[str, float] = field(default_factory=dict)
    weight_decays: dict[str, float] = field(default_factory=dict)
    precision: str = ""
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def moving(self) -> list[str]:
        """The parts of which anything is trained."""
        return [part for part in PARTS if part in self.trained or (self.adapters and part in self.adapters.modules)]

    def trains(self, parameter: str) -> bool:
        """Whether a parameter of the model in memory is to be trained, by its name."""
        part = part_of(parameter, self.family)
        if self.adapters is None:
            return part in self.trained
        if ".lora_" in parameter:
            return part in self.adapters.modules
        return ".modules_to_save." in parameter and part in self.trained

    def same_rates(self) -> bool:
        """Whether one learning rate and one weight decay hold for all that is trained."""
        return len({(self.learning_rates[part], self.weight_decays[part]) for part in self.moving}) < 2

    def as_dict(self) -> dict[str, Any]:
        """As written to parts.json."""
        found: dict[str, Any] = {"precision": self.precision, "parts": self.rows}
        if self.adapters is not None:
            own = self.adapters
            found["lora"] = {"rank": own.rank, "alpha": own.alpha, "dropout": own.dropout, "targets": own.patterns}
            if own.whole:
                found["lora"]["modules_to_save"] = own.whole
            if own.left_frozen:
                found["lora"]["left_frozen"] = own.left_frozen
        return found


def prepare_parts(model: Any, config: TrainConfig) -> tuple[Any, Parts]:
    """Freeze or adapt a loaded model's parts as the config says. Raises ModelError where that leaves nothing to train."""
    family = find_family(model)
    words, present = config.parts, parts_of(model, family)
    trained = tuple(part for part in config.train_parts if part in present)
    if config.lora:
        empty = [part for part in config.train_parts if part not in present]
        if empty:
            raise ModelError(
                f"train_parts = {', '.join(empty)}: {type(model).__name__} has no parameters there"
                + (
                    " (its head is tied to the embeddings, which belong to the language model)."
                    if "head" in empty
                    else "."
                )
            )
        model = add_lora(
            model, config.lora, alpha=words.get("lora_alpha"), dropout=words.get("lora_dropout", 0.0),
            parts=config.lora_parts, targets=words.get("lora_targets", ()), whole=trained,
        )  # fmt: skip
        if config.precision != "pure_bf16":  # what is trained is kept in fp32, also where the rest is not
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = parameter.data.float()
    else:
        freeze_parts(model, set(config.train_parts))
    decay = float(config.trainer.get("weight_decay", WEIGHT_DECAY))
    parts = Parts(
        family, trained, getattr(model, "adapters", None) if config.lora else None,
        {part: words.get(f"{part}_learning_rate", config.learning_rate) for part in PARTS},
        {part: words.get(f"{part}_weight_decay", decay) for part in PARTS},
        precision_of(config),
    )  # fmt: skip
    parts.rows = _rows(model, parts)
    return model, parts


def parts_of(model: Any, family: Family | None = None) -> list[str]:
    """The parts that a model has."""
    family = family or find_family(model)
    found = {part_of(name, family) for name, _ in model.named_parameters()}
    return [part for part in PARTS if part in found]


def freeze_parts(model: Any, trained: set[str]) -> None:
    """Train only the named parts of PARTS. A head tied to the embeddings belongs to the language model.

    Raises ModelError when that leaves nothing to train.
    """
    family = find_family(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name, family) in trained)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            f"train_parts = {sorted(trained)} leaves nothing to train in this model. Its parts: {', '.join(parts_of(model, family))}."
        )


def precision_of(config: TrainConfig) -> str:
    """A sentence on the precision of weights and products."""
    half = torch.cuda.is_available() and config.precision != "fp32"
    if config.parts.get("quantize"):
        return f"{config.parts['quantize']} language model, products in {'bf16' if half else 'fp32'}; what is trained is kept in fp32"
    if config.precision == "pure_bf16":
        return "pure bf16: no fp32 master weights"
    return "fp32 master weights, " + ("bf16 autocast" if half else "products in fp32")


def size_of(parameter: Any) -> int:
    """A parameter's number of values: the whole of one that ZeRO-3 has split, or that is packed in 4 bits."""
    if hasattr(parameter, "ds_numel"):
        return int(parameter.ds_numel)
    state = getattr(parameter, "quant_state", None)
    return int(math.prod(state.shape)) if state is not None else int(parameter.numel())


def part_table(model: Any) -> dict[str, dict[str, int]]:
    """{part: {"parameters", "trainable"}} of a model as it stands, LoRA included."""
    family = find_family(model)
    table = {part: {"parameters": 0, "trainable": 0} for part in PARTS}
    for name, parameter in model.named_parameters():
        if COPIED in name:
            continue
        row = table[part_of(name, family)]
        row["parameters"] += size_of(parameter)
        row["trainable"] += size_of(parameter) if parameter.requires_grad else 0
    return table


def split_groups(optimizer: Any, model: nn.Module, parts: Parts, first: float) -> None:
    """Split an optimiser's groups by part, each with the part's learning rate and, where the group has any, weight decay.

    A group of the rate `first` comes first: that is the one that schedulers and logs call the learning rate.
    """
    owner = {id(parameter): part_of(name, parts.family) for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        for part in parts.moving:
            own = [parameter for parameter in group["params"] if owner[id(parameter)] == part]
            if own:
                decay = parts.weight_decays[part] if group["weight_decay"] else 0.0
                groups.append({**group, "params": own, "lr": parts.learning_rates[part], "weight_decay": decay})
    optimizer.param_groups[:] = sorted(groups, key=lambda group: group["lr"] != first)


def part_rates(parts: Parts, learning_rate: float, first: float) -> dict[str, float]:
    """{"learning_rate/PART": rate} at the time when the first group's is `learning_rate`; nothing where all are the same."""
    rates = {part: parts.learning_rates[part] for part in parts.moving}
    if len(set(rates.values())) < 2:
        return {}
    base = first if first in rates.values() else next(iter(rates.values()))
    return {f"learning_rate/{part}": learning_rate / base * rate for part, rate in rates.items()}


def _rows(model: Any, parts: Parts) -> dict[str, dict[str, Any]]:
    adapters, rows = parts.adapters, {}
    kept: dict[str, dict[str, None]] = {part: {} for part in PARTS}
    for name, parameter in model.named_parameters():
        if COPIED not in name and ".lora_" not in name:
            kept[part_of(name, parts.family)][DTYPES.get(str(parameter.dtype)[6:], str(parameter.dtype)[6:])] = None
    for part, counts in part_table(model).items():
        if not counts["parameters"]:
            continue
        row: dict[str, Any] = {**counts, "weights": " + ".join(kept[part])}
        if adapters is not None and part in adapters.modules:
            row |= {"lora_modules": adapters.modules[part], "lora_targets": adapters.patterns[part]}
        if part in parts.moving:
            row |= {"learning_rate": parts.learning_rates[part], "weight_decay": parts.weight_decays[part]}
        rows[part] = row
    return rows


def draw_parts(parts: Parts) -> Any:
    """The table at the start of a run, for a terminal of 80 columns or more; plain text in a log file."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    adapted = parts.adapters is not None
    table.add_column("part", no_wrap=True)
    for name in ("parameters", "trained", *(["LoRA on"] if adapted else []), "rate", "decay"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("weights", no_wrap=True)
    for part, row in parts.rows.items():
        moves = part in parts.moving
        cells = [part, f"{row['parameters']:,}", f"{row['trainable']:,}" if moves else "frozen"]
        cells += [f"{row['lora_modules']}" if "lora_modules" in row else ""] if adapted else []
        cells += [f"{row['learning_rate']:g}", f"{row['weight_decay']:g}"] if moves else ["", ""]
        table.add_row(*cells, row["weights"], style="" if moves else "dim")
    said = [Text(f"{parts.precision}; norms and biases do not decay")]
    if "head" not in parts.rows:
        said.append(Text("the head is tied to the embeddings, which are the language model's"))
    if parts.adapters is not None:
        own = parts.adapters
        said.append(
            Text(f"LoRA of rank {own.rank}, alpha {own.alpha:g}, dropout {own.dropout:g}, on the modules that match")
        )
        said += [Text(f"  {pattern}", overflow="fold") for found in own.patterns.values() for pattern in found]
        if own.left_frozen:
            said.append(Text(f"frozen, as no module holds them alone: {_few(own.left_frozen)}", overflow="fold"))
    return Group(table, *said)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def plain_name(parameter: str) -> str:
    """A parameter's name without what peft and activation checkpointing put into it."""
    return re.sub(r"_checkpoint_wrapped_module\.|^base_model\.model\.", "", parameter)
