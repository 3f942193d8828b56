"""Adapters: a model and the parts to adapt in, the same model with LoRA (and whole modules beside it) out, by explicit patterns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_dft.errors import ModelError
from vlm_dft.families import Family, find_family, part_of
from vlm_dft.locate import EMBEDDED
from vlm_dft.targets import match_targets, patterns_of

ROUTERS = ("gate", "router", "shared_expert_gate")  # which expert a token goes to: not a layer to adapt
EXPERTS = (
    "gate_proj",
    "up_proj",
    "down_proj",
)  # fused into one parameter in transformers 5; LoRA then is on attention alone
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # without a forward of their own


@dataclass(frozen=True, slots=True)
class Adapters:
    """What LoRA was put on: per part the patterns and the number of modules that they matched; and what is trained whole beside it."""

    rank: int
    alpha: float
    dropout: float
    patterns: dict[str, list[str]]
    modules: dict[str, int]
    whole: dict[str, list[str]] = field(default_factory=dict)
    left_frozen: list[str] = field(default_factory=list)
    "Parameters of the parts trained whole that no module of theirs holds: an adapter cannot keep them."


def add_lora(
    model: Any,
    rank: int,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    parts: Sequence[str] = ("language",),
    targets: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> Any:
    """The model with LoRA of a rank (alpha 2r unless given) on the linear layers of `parts`; the rest is frozen.

    targets: patterns of module names instead (each matched against a whole name or its end, within `parts`). whole: parts
    that are trained as they are, which the adapter's checkpoint then holds too. The result's `adapters` say what was done.
    """
    family = find_family(model)
    layers = linear_layers(model, family)
    experts = any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters())
    if experts:  # peft takes these names for the experts', and of a pattern the last names of what it matches
        layers = {part: [n for n in names if n.rpartition(".")[2] not in EXPERTS] for part, names in layers.items()}
    patterns = (
        match_targets(layers, parts, targets) if targets else {p: patterns_of(layers[p]) for p in parts if layers[p]}
    )
    matched = {
        part: [name for name in layers[part] if any(re.fullmatch(p, name) for p in found)]
        for part, found in patterns.items()
    }
    empty = [part for part in parts if not matched.get(part)]
    if empty and not targets:
        raise ModelError(
            f"lora_parts: {', '.join(empty)} of {type(model).__name__} has no linear layers to put LoRA on."
        )
    modules, left = modules_of(model, whole, family)
    done = Adapters(
        rank, 2.0 * rank if alpha is None else float(alpha), dropout, patterns, {k: len(v) for k, v in matched.items() if v},
        modules, left,
    )  # fmt: skip
    wanted = [pattern for found in patterns.values() for pattern in found]
    asked = {name for names in matched.values() for name in names}
    one = wanted[0] if len(wanted) == 1 else "|".join(f"(?:{pattern})" for pattern in wanted)
    config = _lora_config()(
        r=rank,
        lora_alpha=int(done.alpha) if done.alpha == int(done.alpha) else done.alpha,
        lora_dropout=dropout,
        target_modules=sorted(asked) if experts else one,
        modules_to_save=[name for names in modules.values() for name in names] or None,
    )
    from peft import get_peft_model

    wrapped = get_peft_model(model, config)
    put = {name for name, module in wrapped.get_base_model().named_modules() if hasattr(module, "lora_A")}
    if put != asked:
        odd = sorted(put ^ asked)
        raise ModelError(
            f"LoRA was put on {len(put)} modules, expected {len(asked)}; they differ in {', '.join(odd[:5])}."
        )
    wrapped.adapters = done
    return wrapped


def linear_layers(model: Any, family: Family) -> dict[str, list[str]]:
    """{part: names of its linear layers}; not routers, nor what a MultiheadAttention reads the weights of by itself."""
    found: dict[str, list[str]] = {part: [] for part in ("vision", "merger", "language", "head")}
    inside = {f"{name}." for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name.rpartition(".")[2] in ROUTERS or any(map(name.startswith, inside)):
            continue
        found["head" if module is head else part_of(f"{name}.weight", family)].append(name)
    return found


def modules_of(model: Any, parts: Sequence[str], family: Family) -> tuple[dict[str, list[str]], list[str]]:
    """({part: the largest modules that hold nothing but its parameters}, the part's parameters that none of them holds)."""
    belongs = {name: part_of(name, family) for name, _ in model.named_parameters(remove_duplicate=False)}
    found: dict[str, list[str]] = {}
    for part in parts:
        names: list[str] = []
        for place, module in model.named_modules():
            if not place or isinstance(module, CONTAINERS) or any(place.startswith(f"{name}.") for name in names):
                continue
            own = {belongs[f"{place}.{name}"] for name, _ in module.named_parameters()}
            if own == {part}:
                names.append(place)
        found[part] = names
    left = [
        name for name, part in belongs.items()
        if part in found and not any(name.startswith(f"{place}.") for place in found[part])
    ]  # fmt: skip
    return {part: names for part, names in found.items() if names}, left


@cache
def _lora_config() -> type:
    """peft's LoraConfig, which writes the embedded model by its name: its folder is another one on every machine."""
    from peft import LoraConfig

    class PortableLoraConfig(LoraConfig):
        def to_dict(self) -> dict[str, Any]:
            found: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
            base = found.get("base_model_name_or_path")
            return {**found, "base_model_name_or_path": portable_name(base)}

    return PortableLoraConfig


def portable_name(base: str | None) -> str | None:
    """A base model's name that means the same on other machines where there is one: 'tiny' for the embedded folder."""
    if not base:
        return base
    same = [name for name, folder in EMBEDDED.items() if Path(base).absolute() == folder]
    return same[0] if same else str(Path(base).absolute()) if Path(base).is_dir() else base


def quantization_of(kind: str, name: str, half: bool) -> Any:
    """The BitsAndBytesConfig of a base model: its language model's linear layers in nf4 or int8, all the rest as it is.

    Raises ModelError where bitsandbytes is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantize = {kind} needs bitsandbytes, which is not installed. Run: pip install 'vlm-dft[qlora]'"
        )
    from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(name))
    family = find_family(model)
    layers = linear_layers(model, family)
    taken = set(layers["language"])
    skipped = [
        rf"{re.escape(name)}$" for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in taken
    ]  # fmt: skip
    compute = torch.bfloat16 if half else torch.float32
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=skipped,
    )  # fmt: skip
