"""Dimensions: a model's name in; the name and shape of every parameter it has, on paper, out. No torch, no hub, no weights.

The sizes come from the model's own config.json where its folder is here, else from dimensions.json (the shipped families'
common sizes), else they are not known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from vlm_dft.cards import PACKAGE
from vlm_dft.families import PARTS, find_family, part_of
from vlm_dft.locate import base_model, read_mapping, resolve_model

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Dimensions:
    """The sizes of one model, as its config.json states them."""

    model_type: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    tied: bool  # the head's weight is the embeddings'
    source: str  # where they are from

    @property
    def hidden(self) -> int:
        """Width of the language model's residual stream."""
        return int(self.text["hidden_size"])

    @property
    def layers(self) -> int:
        """Layers of the language model."""
        return int(self.text["num_hidden_layers"])

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self.text["vocab_size"])

    @property
    def head_dim(self) -> int:
        """Width of an attention head of the language model."""
        return int(self.text.get("head_dim") or self.hidden // self.text["num_attention_heads"])

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return int(self.text["num_attention_heads"]) * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together; the values' too."""
        return int(self.text.get("num_key_value_heads") or self.text["num_attention_heads"]) * self.head_dim

    @property
    def merge(self) -> int:
        """Patches of an image in one of its tokens."""
        return int(self.vision.get("spatial_merge_size", 2)) ** 2

    @property
    def pixels_per_token(self) -> int:
        """Pixels of an image in one of its tokens."""
        return self.merge * int(self.vision.get("patch_size", 14)) ** 2

    @cached_property
    def shapes(self) -> Shapes:
        """{parameter name, as in memory: shape}; a tied head has none of its own."""
        return {**_vision(self), **_language(self)}

    @cached_property
    def parts(self) -> dict[str, int]:
        """{part of PARTS: parameters}."""
        family, found = find_family(self.model_type), dict.fromkeys(PARTS, 0)
        for name, shape in self.shapes.items():
            found[part_of(name, family)] += prod(shape)
        return found

    @cached_property
    def linears(self) -> dict[str, list[str]]:
        """{part of PARTS: names of its linear layers}, a tied head's too."""
        family = find_family(self.model_type)
        found: dict[str, list[str]] = {part: ["lm_head"] if part == "head" else [] for part in PARTS}
        for name, shape in self.shapes.items():
            part, layer = part_of(name, family), name.removesuffix(".weight")
            if part != "head" and layer != name and len(shape) == 2 and "embed" not in name:
                found[part].append(layer)
        return found


def dimensions_of(model: str) -> Dimensions | None:
    """The sizes of 'tiny', of a model's folder (an adapter's base too), or of a hub id of the table; None: not known."""
    place = base_model(resolve_model(model))
    file = Path(place) / "config.json"
    if file.is_file():
        return read_dimensions(read_mapping(file), str(file))
    table = json.loads((PACKAGE / "dimensions.json").read_text(encoding="utf-8"))["models"]
    found = {**table, **{name.removesuffix("-Instruct"): config for name, config in table.items()}}.get(place)
    return None if found is None else read_dimensions(found, f"the table of {place}")


def read_dimensions(config: Mapping[str, Any], source: str) -> Dimensions | None:
    """The sizes of a config.json of a described family, old (flat) or new (text_config); None for any other."""
    model_type = str(config.get("model_type"))
    if model_type not in BLOCKS or "vision_config" not in config:
        return None
    text = config.get("text_config") or config
    defaults = {"qwen2_5_vl": {"intermediate_size": 3420}, "qwen2_vl": {"embed_dim": 1280}}.get(model_type, {})
    vision = {**defaults, **config["vision_config"]}
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    found = Dimensions(model_type, text, vision, tied, source)
    try:
        return found if found.shapes else None
    except (KeyError, TypeError, ValueError):  # a size is left to transformers' defaults, which we do not guess
        return None


def _linear(name: str, inputs: int, outputs: int, *, bias: bool) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def _layer_norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _language(model: Dimensions) -> Shapes:
    base, width, inner = "model.language_model", model.hidden, int(model.text["intermediate_size"])
    third = model.model_type == "qwen3_vl"  # norms on queries and keys in the place of biases
    found: Shapes = {f"{base}.embed_tokens.weight": (model.vocabulary, width)}
    for k in range(model.layers):
        at = f"{base}.layers.{k}"
        for name, outputs in (("q", model.queries), ("k", model.keys), ("v", model.keys)):
            found |= _linear(f"{at}.self_attn.{name}_proj", width, outputs, bias=not third)
        found |= _linear(f"{at}.self_attn.o_proj", model.queries, width, bias=False)
        if third:
            found |= {f"{at}.self_attn.{name}_norm.weight": (model.head_dim,) for name in "qk"}
        for name in ("gate", "up"):
            found |= _linear(f"{at}.mlp.{name}_proj", width, inner, bias=False)
        found |= _linear(f"{at}.mlp.down_proj", inner, width, bias=False)
        found |= {f"{at}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    found[f"{base}.norm.weight"] = (width,)
    return found if model.tied else {**found, "lm_head.weight": (model.vocabulary, width)}


def vision_width(model: Dimensions) -> tuple[int, int]:
    """(width of the vision tower, width inside its feed-forward parts)."""
    if model.model_type == "qwen2_vl":
        width = int(model.vision["embed_dim"])
        return width, int(width * model.vision.get("mlp_ratio", 4))
    return int(model.vision["hidden_size"]), int(model.vision["intermediate_size"])


def _vision(model: Dimensions) -> Shapes:
    sizes, (width, _) = model.vision, vision_width(model)
    channels = int(sizes.get("in_channels", 3))
    patch = (int(sizes.get("temporal_patch_size", 2)), *[int(sizes.get("patch_size", 14))] * 2)
    found: Shapes = {"model.visual.patch_embed.proj.weight": (width, channels, *patch)}
    for k in range(int(sizes["depth"])):
        at = f"model.visual.blocks.{k}"
        found |= _linear(f"{at}.attn.qkv", width, 3 * width, bias=True) | _linear(
            f"{at}.attn.proj", width, width, bias=True
        )
        found |= BLOCKS[model.model_type](at, *vision_width(model))
    return found | MERGERS[model.model_type](model)


def _block_2(at: str, width: int, inner: int) -> Shapes:
    found = _layer_norm(f"{at}.norm1", width) | _layer_norm(f"{at}.norm2", width)
    return found | _linear(f"{at}.mlp.fc1", width, inner, bias=True) | _linear(f"{at}.mlp.fc2", inner, width, bias=True)


def _block_2_5(at: str, width: int, inner: int) -> Shapes:
    found: Shapes = {f"{at}.norm1.weight": (width,), f"{at}.norm2.weight": (width,)}
    for name in ("gate", "up"):
        found |= _linear(f"{at}.mlp.{name}_proj", width, inner, bias=True)
    return found | _linear(f"{at}.mlp.down_proj", inner, width, bias=True)


def _block_3(at: str, width: int, inner: int) -> Shapes:
    found = _layer_norm(f"{at}.norm1", width) | _layer_norm(f"{at}.norm2", width)
    found |= _linear(f"{at}.mlp.linear_fc1", width, inner, bias=True)
    return found | _linear(f"{at}.mlp.linear_fc2", inner, width, bias=True)


def _merger_2(model: Dimensions) -> Shapes:
    at, (width, _) = "model.visual.merger", vision_width(model)
    joined, out = width * model.merge, int(model.vision.get("out_hidden_size", model.hidden))
    norm = _layer_norm(f"{at}.ln_q", width) if model.model_type == "qwen2_vl" else {f"{at}.ln_q.weight": (width,)}
    return norm | _linear(f"{at}.mlp.0", joined, joined, bias=True) | _linear(f"{at}.mlp.2", joined, out, bias=True)


def _merger_3(model: Dimensions) -> Shapes:
    sizes, (width, _) = model.vision, vision_width(model)
    joined = width * model.merge
    found: Shapes = {
        "model.visual.patch_embed.proj.bias": (width,),
        "model.visual.pos_embed.weight": (int(sizes["num_position_embeddings"]), width),
    }
    stacked = [f"deepstack_merger_list.{k}" for k in range(len(sizes.get("deepstack_visual_indexes", ())))]
    for name in ("merger", *stacked):
        at = f"model.visual.{name}"
        found |= _layer_norm(f"{at}.norm", width if name == "merger" else joined)
        found |= _linear(f"{at}.linear_fc1", joined, joined, bias=True)
        found |= _linear(f"{at}.linear_fc2", joined, int(sizes["out_hidden_size"]), bias=True)
    return found


BLOCKS = {"qwen2_vl": _block_2, "qwen2_5_vl": _block_2_5, "qwen3_vl": _block_3}
MERGERS = {"qwen2_vl": _merger_2, "qwen2_5_vl": _merger_2, "qwen3_vl": _merger_3}
