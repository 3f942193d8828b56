"""Memory: a config, a model's dimensions and an engine in; the bytes of one GPU that training needs, item by item, out.

On paper: no torch, no hub, no weights. Parameters, gradients and optimiser states are counted exactly. Activations are what
autograd keeps per layer, read off the layers' code and held against torch's saved-tensor hooks (tests/test_memory.py): the
formulas of a layer are exact in fp32, under bf16 autocast and in bf16; over whole small models of three families predicted /
measured is 0.993 to 1.004.
What a GPU alone has (context, NCCL, fragmentation, gathered layers) is an allowance, and said to be one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from vlm_dft.config import TrainConfig, recomputed_parts
from vlm_dft.dimensions import Dimensions, vision_width
from vlm_dft.engines import Engine
from vlm_dft.families import find_family, part_of

GB = 10**9
ASSUMED_GPU = 80 * GB  # where none is found
ALLOWANCE = 1.5 * GB  # CUDA context, cuBLAS and NCCL buffers; not measured
FRAGMENTED = 0.05  # of the rest; not measured
TILE_ROWS = 2048  # loss_tiles.GPU_CHUNK
STATES = {  # bytes of optimiser states per trained parameter of 4 bytes, by `optim`; AdamW keeps two moments in fp32
    "adamw_torch": 8, "adamw_torch_fused": 8, "adamw_apex_fused": 8, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "ademamix": 12,
    "paged_adamw_32bit": 0, "paged_adamw_8bit": 0, "sgd": 0, "adagrad": 4, "rmsprop": 4, "lion_32bit": 4, "lion_8bit": 1,
    "adafactor": 0,
}  # fmt: skip
QUANTISED = {"nf4": 0.5 + 1 / 64, "int8": 1.0}  # bytes a weight: nf4 has a scale for 64 of them, itself in 8 bits

Mode = Literal["fp32", "autocast", "bf16"]


@dataclass(frozen=True, slots=True)
class Memory:
    """What one process needs on its GPU, in bytes by item, and in the host's memory."""

    items: Mapping[str, int]
    host: int
    notes: tuple[str, ...]

    @property
    def total(self) -> int:
        """All items and the allowances."""
        needed = sum(self.items.values())
        return int(needed * (1 + FRAGMENTED) + ALLOWANCE)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"items": dict(self.items), "total": self.total, "host": self.host, "notes": list(self.notes)}


@dataclass(frozen=True, slots=True)
class Micro:
    """The largest micro-batch: its tokens, and how many of them are of images."""

    tokens: int
    media: int


def gpu_bytes() -> tuple[int, str]:
    """(memory of the smallest GPU here, where that is from)."""
    program = shutil.which("nvidia-smi")
    if program:
        done = subprocess.run(
            [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"], capture_output=True, text=True
        )
        sizes = [int(line) for line in done.stdout.split() if line.isdigit()]
        if done.returncode == 0 and sizes:
            return min(sizes) * 2**20, f"found {len(sizes)} GPU{'s' if len(sizes) > 1 else ''}"
    return ASSUMED_GPU, "no GPU found here: 80 GB assumed"


def host_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def precision_of(config: TrainConfig, engine: Engine, *, gpu: bool) -> Mode:
    """fp32; autocast: fp32 weights, products in bf16; bf16: what the passes see is bf16 (DeepSpeed and FSDP2 cast the weights)."""
    if config.precision == "fp32" or (config.precision == "auto" and not gpu):
        return "fp32"
    return "bf16" if config.precision == "pure_bf16" or engine.kind != "ddp" else "autocast"


def trained_shapes(config: TrainConfig, model: Dimensions) -> dict[str, tuple[int, ...]]:
    """{name: shape} of what is trained: the parameters of the parts, and the adapters' two matrices a layer."""
    family, parts = find_family(model.model_type), set(config.train_parts)
    found = {name: shape for name, shape in model.shapes.items() if part_of(name, family) in parts}
    if not config.lora:
        return found
    patterns = config.parts.get("lora_targets") or []
    for layer in (layer for part in config.lora_parts for layer in model.linears[part]):
        shape = model.shapes[f"{layer}.weight"]
        if not patterns or any(re.search(rf"(^|\.)(?:{pattern})$", layer) for pattern in patterns):
            found[f"{layer}.lora_A"], found[f"{layer}.lora_B"] = (config.lora, shape[1]), (shape[0], config.lora)
    return found


def language_bytes(model: Dimensions, mode: Mode) -> int:
    """What one language layer keeps for the backward pass, in bytes a token."""
    width, queries, keys, inner = model.hidden, model.queries, model.keys, int(model.text["intermediate_size"])
    heads = int(model.text["num_attention_heads"])
    found = {
        "fp32": 24 * width + 8 * queries + 8 * keys + 16 * inner,
        "autocast": 26 * width + 4 * queries + 4 * keys + 8 * inner,
        "bf16": 16 * width + 4 * queries + 4 * keys + 8 * inner,
    }[mode]
    found += 4 * heads + 8  # log-sum-exp of the attention, norms' scales
    if model.model_type == "qwen3_vl":  # norms on queries and keys
        found += (8 if mode == "fp32" else 6) * (queries + keys) + 4 * (heads + keys // model.head_dim)
    return found


def vision_bytes(model: Dimensions, mode: Mode) -> int:
    """What one vision block keeps for the backward pass, in bytes a patch."""
    width, inner = vision_width(model)
    a, b = {
        "qwen2_vl": {"fp32": (44, 12), "autocast": (22, 6), "bf16": (22, 6)},
        "qwen2_5_vl": {"fp32": (52, 16), "autocast": (32, 8), "bf16": (30, 8)},
        "qwen3_vl": {"fp32": (44, 8), "autocast": (22, 4), "bf16": (22, 4)},
    }[model.model_type][mode]
    norms = 8 if model.model_type == "qwen2_5_vl" else 8 if mode == "bf16" else 16
    return a * width + b * inner + norms + 4 * int(model.vision["num_heads"])


def activations(
    config: TrainConfig, model: Dimensions, micro: Micro, mode: Mode, recompute: set[str]
) -> dict[str, int]:
    """{item: bytes} kept between forward and backward pass of one micro-batch."""
    family = find_family(model.model_type)
    trained = {part_of(name, family) for name in trained_shapes(config, model)}
    stream = 2 if mode == "bf16" else 4  # bytes of the residual stream
    width, _ = vision_width(model)
    patches, heads = micro.media * model.merge, int(model.vision["num_heads"])
    found: dict[str, int] = {}
    if trained & {"vision", "merger", "language"}:
        layer = language_bytes(model, mode) * micro.tokens
        inputs = model.layers * micro.tokens * model.hidden * stream
        found["language"] = inputs + layer if "language" in recompute else model.layers * layer
        ends = 6 * model.hidden + 4 * model.head_dim if mode == "bf16" else 8 * model.hidden + 8 * model.head_dim
        found["last norm and rotary tables"] = micro.tokens * ends
    if trained & {"vision", "merger"}:
        mergers = 1 + len(model.vision.get("deepstack_visual_indexes", ()))
        found["merger"] = mergers * patches * width * (20 if mode == "fp32" else 14)
    if "vision" in trained:
        block, depth = vision_bytes(model, mode) * patches, int(model.vision["depth"])
        inputs = depth * patches * width * (4 if mode == "fp32" else 2)
        found["vision"] = inputs + block if "vision" in recompute else depth * block
        found["vision"] += patches * (
            8 * width // heads if mode == "fp32" else 4 * width // heads + 2 * patch_values(model)
        )
    return found


def patch_values(model: Dimensions) -> int:
    """Numbers of a picture in one patch."""
    sizes = model.vision
    return (
        int(sizes.get("in_channels", 3))
        * int(sizes.get("temporal_patch_size", 2))
        * int(sizes.get("patch_size", 14)) ** 2
    )


def estimate(
    config: TrainConfig,
    model: Dimensions,
    engine: Engine,
    settings: Mapping[str, Any],
    micro: Micro,
    *,
    gpu: bool = True,
) -> Memory:
    """The bytes that one process needs. settings: the engine's, filled; gpu: as on a GPU (bf16 where precision is auto)."""
    mode, world, notes = precision_of(config, engine, gpu=gpu), config.processes, list[str]()
    family = find_family(model.model_type)
    trained = trained_shapes(config, model)
    n_trained, n_all = sum(map(prod, trained.values())), sum(model.parts.values())
    adapters = sum(prod(shape) for name, shape in trained.items() if ".lora_" in name)
    weight = 4.0 if mode != "bf16" or (engine.kind == "fsdp" and config.precision != "pure_bf16") else 2.0
    states = _states(config, notes) * (weight / 4 if engine.kind != "deepspeed" else 1)
    quantised = config.parts.get("quantize")
    linear = {
        name for name, shape in model.shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and "embed" not in name and part_of(name, family) != "head"
    }  # fmt: skip
    weights = n_all * weight + adapters * max(weight, 2)
    if quantised:
        small = sum(prod(model.shapes[f"{layer}.weight"]) for layer in model.linears["language"])
        rest = 2 if gpu and config.precision != "fp32" else 4
        weights = small * QUANTISED[quantised] + (n_all - small) * rest + n_trained * 4
        notes.append(
            f"{quantised}: the language model's linear layers; the rest in {'bf16' if rest == 2 else 'fp32'}, what is trained in fp32"
        )
    items, host = _shared(engine, settings, world, weights, n_trained, weight, states)
    items |= _gathered(engine, settings, model, mode, n_all)
    if mode == "autocast":
        cast = sum(prod(model.shapes[name]) for name in linear & set(trained))
        items["bf16 copies of the weights (autocast)"] = 2 * cast
    if config.loss.get("kl") and not config.lora:
        items["reference of the KL term"] = n_all * (2 if gpu else 4)
    recompute = recomputed(config, gpu=gpu)
    items |= {f"activations: {name}": size for name, size in activations(config, model, micro, mode, recompute).items()}
    items["pictures of the batch"] = micro.media * model.merge * patch_values(model) * 4
    rows = min(TILE_ROWS, micro.tokens) if gpu else min(240, micro.tokens)
    tile = model.vocabulary * rows * (4 if mode == "fp32" else 6)
    head = (
        model.vocabulary * model.hidden * 4
        if {"lm_head.weight", "model.language_model.embed_tokens.weight"} & set(trained)
        else 0
    )
    items["logits: a tile of the head, and the head's gradient"] = tile + head + 2 * micro.tokens * model.hidden * 4
    return Memory({name: int(size) for name, size in items.items() if size}, int(host), tuple(notes))


def _states(config: TrainConfig, notes: list[str]) -> float:
    optim = str(config.trainer.get("optim", "adamw_torch_fused"))
    if optim not in STATES:
        notes.append(f"optim {optim}: its states are not known, AdamW's 8 bytes assumed")
    if optim == "sgd" and "momentum" in str(config.trainer.get("optim_args", "")):
        return 4
    return STATES.get(optim, 8)


def _shared(
    engine: Engine, settings: Mapping[str, Any], world: int, weights: float, trained: int, weight: float, states: float
) -> tuple[dict[str, float], float]:
    """Weights, gradients and optimiser states of one process: all of them under DDP, its share where the engine splits them."""
    if engine.kind == "ddp":
        found = {"weights": weights, "gradients": trained * weight, "optimiser states": trained * states}
        return found | ({"gradient buckets of DDP": trained * weight} if world > 1 else {}), 0.0
    if engine.kind == "fsdp":
        found = {"weights": weights, "gradients": trained * weight, "optimiser states": trained * states}
        found = {name: size / world for name, size in found.items()}
        return ({}, sum(found.values())) if engine.offloads("param") else (found, 0.0)
    stage = engine.stage
    own = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0}.get(
        str(settings.get("data_types", {}).get("grad_accum_dtype")), weight
    )
    found = {
        "weights": weights / (world if stage == 3 else 1),
        "gradients": trained * own / (world if stage >= 2 else 1),
        "master weights": trained * 4.0 / (world if stage else 1),
        "optimiser states": trained * states / (world if stage else 1),
    }
    host = 0.0
    if engine.offloads("optimizer"):
        host += sum(found.pop(name) for name in ("gradients", "master weights", "optimiser states"))
    if engine.offloads("param"):
        host += found.pop("weights")
    return found, host


def _gathered(
    engine: Engine, settings: Mapping[str, Any], model: Dimensions, mode: Mode, n_all: int
) -> dict[str, float]:
    """Weights and gradients that are whole for a moment, and the buffers they travel in: bounds, not measured."""
    size = 4.0 if mode == "fp32" else 2.0
    if engine.kind == "fsdp":
        layer = sum(prod(shape) for name, shape in model.shapes.items() if "language_model.layers.0." in name)
        ends = model.vocabulary * model.hidden * (1 if model.tied else 2)
        return {"gathered: two layers, embeddings and head": (2 * layer + ends) * size + layer * 4.0}
    if engine.kind != "deepspeed":
        return {}
    zero = settings["zero_optimization"]
    bucket = zero.get("reduce_bucket_size", 5e8)
    buckets = (0 if bucket == "auto" else float(bucket)) * size * (2 if zero.get("overlap_comm") else 1)
    if engine.stage == 3:
        live = min(float(zero.get("stage3_max_live_parameters", 1e9)), n_all)
        return {"gathered weights (at most)": live * size, "communication buckets": buckets}
    return {"communication buckets": buckets + float(zero.get("allgather_bucket_size", 5e8)) * size}


def recomputed(config: TrainConfig, *, gpu: bool) -> set[str]:
    """The parts whose activations are computed again in the backward pass."""
    asked = config.parts.get("recompute")
    return set(recomputed_parts(asked, [*config.train_parts, *config.lora_parts], "cuda" if gpu else "cpu"))


def largest_micro_batch(config: TrainConfig, model: Dimensions, media: int | None = None) -> tuple[Micro, str]:
    """(the largest micro-batch that a run may meet, what was assumed). media: tokens of images in an example, where known."""
    most = config.max_length
    said = "the recipe's largest"
    if media is None and config.max_pixels:
        media, said = config.max_pixels // model.pixels_per_token, f"one image of max_pixels = {config.max_pixels:,}"
    if media is None:
        media, said = 1280, "images of 1 megapixel assumed, set max_pixels to be sure"
    media = min(media, most)
    packed = 1 if config.collator.get("packing") else config.micro_batch
    return Micro(packed * most, packed * media), f"{packed} x {most:,} tokens, {media:,} of each of images ({said})"
