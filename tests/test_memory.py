"""Memory on paper against what torch really holds: parameters, gradients and states to the byte, activations by saved tensors."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_dft.adapters import linear_layers
from vlm_dft.cards import PACKAGE
from vlm_dft.config import TrainConfig, resolve_config
from vlm_dft.dimensions import Dimensions, dimensions_of, read_dimensions
from vlm_dft.engines import DDP, check_engine, filled
from vlm_dft.families import find_family, part_of
from vlm_dft.memory import (
    Memory,
    Micro,
    activations,
    estimate,
    gpu_bytes,
    language_bytes,
    largest_micro_batch,
    trained_shapes,
    vision_bytes,
)
from vlm_dft.models import add_lora, freeze_parts, load_model

TABLE = json.loads((PACKAGE / "dimensions.json").read_text())["models"]
TOTALS = {  # as the hub counts the published weights
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    "Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
}
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen2_vl")
MODES = ("fp32", "autocast", "bf16")


def known(model: str) -> Dimensions:
    found = dimensions_of(model)
    assert found is not None
    return found


def resolve(**settings: Any) -> TrainConfig:
    return resolve_config(("test", settings))


@pytest.mark.parametrize("name", ["tiny", *TOTALS])
def test_every_parameter_on_paper_is_one_of_the_model_and_none_is_missing(name: str) -> None:
    """Names and shapes, so every part's count too; the published models on the meta device, without their weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    if name == "tiny":
        model: Any = load_model("tiny")
    else:
        sizes = dict(TABLE[name])
        config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        model.tie_weights()
    paper, parts = known(name), Counter[str]()
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == paper.shapes
    for parameter, p in model.named_parameters():
        parts[part_of(parameter, find_family(model.config.model_type))] += p.numel()
    assert parts == Counter({part: count for part, count in paper.parts.items() if count})
    assert name == "tiny" or sum(paper.parts.values()) == TOTALS[name]


def test_a_model_that_is_neither_here_nor_in_the_table_is_not_guessed() -> None:
    assert dimensions_of("someone/a-finetune") is None
    assert read_dimensions({"model_type": "llava", "vision_config": {}}, "x") is None


def test_a_flat_config_of_the_hub_reads_as_the_nested_one() -> None:
    """Qwen2.5-VL's config.json on the hub holds the text sizes at its top, and names the channels otherwise."""
    nested = TABLE["Qwen/Qwen2.5-VL-3B-Instruct"]
    flat = {**nested["text_config"], **{k: v for k, v in nested.items() if k != "text_config"}}
    flat["vision_config"] = {k: v for k, v in nested["vision_config"].items() if k != "in_channels"} | {"in_chans": 3}
    found = read_dimensions(flat, "flat")
    assert found is not None and found.shapes == known("Qwen/Qwen2.5-VL-3B-Instruct").shapes


# --- Parameters, gradients, optimiser states ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"train_parts": "language,head"},
        {"train_parts": "vision,merger,language,head"},
        {"train_parts": "merger"},
        {"lora": 4},
        {"lora": 3, "train_parts": "merger"},
    ],
    ids=lambda s: ",".join(map(str, s.values())),
)
def test_weights_gradients_and_moments_are_what_a_step_of_adamw_holds(settings: dict[str, Any]) -> None:
    config, model = resolve(**settings), load_model("tiny")
    if config.lora:
        model = add_lora(model, config.lora)
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad or any(f"visual.{part}" in name for part in config.train_parts))
    else:
        freeze_parts(model, set(config.train_parts))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    paper = estimate(config, known("tiny"), DDP, {}, Micro(1, 0), gpu=False).items
    assert paper["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert paper["gradients"] == sum(p.grad.numel() * p.grad.element_size() for p in trained if p.grad is not None)
    assert paper["optimiser states"] == sum(t.numel() * t.element_size() for t in moments)


def test_an_adapter_on_paper_has_the_matrices_that_peft_makes() -> None:
    model = add_lora(load_model("tiny"), 5)
    found = sorted(tuple(p.shape) for p in model.parameters() if p.requires_grad)
    assert found == sorted(trained_shapes(resolve(lora=5), known("tiny")).values())


@pytest.mark.parametrize(("kind", "size"), [("nf4", 0.5 + 1 / 64), ("int8", 1.0)])
def test_a_quantised_base_is_small_in_the_language_models_layers_alone(kind: str, size: float) -> None:
    """What bitsandbytes packs is the adapted layers' weights; tower, merger and embeddings stay in bf16, adapters in fp32."""
    model = load_model("tiny")
    packed = sum(
        model.get_submodule(name).weight.numel() for name in linear_layers(model, find_family(model))["language"]
    )
    total, adapter = (
        sum(p.numel() for p in model.parameters()),
        4
        * sum(
            layer.in_features + layer.out_features
            for layer in map(model.get_submodule, linear_layers(model, find_family(model))["language"])
        ),
    )
    config = resolve(lora=4, quantize=kind)
    for gpu, rest in ((True, 2), (False, 4)):
        found = estimate(config, known("tiny"), DDP, {}, Micro(1, 0), gpu=gpu)
        assert found.items["weights"] == int(size * packed + rest * (total - packed) + 4 * adapter)
        assert f"the rest in {'bf16' if gpu else 'fp32'}" in found.notes[-1]


def test_the_linear_layers_on_paper_are_the_models() -> None:
    model = load_model("tiny")
    assert known("tiny").linears == linear_layers(model, find_family(model))


def paper(engine: str | None, model: str = "Qwen/Qwen2.5-VL-7B-Instruct", **settings: Any) -> Memory:
    words = {"engine": engine} if engine else {}
    config, sizes = resolve(model=model, processes=8, max_pixels=1003520, **words, **settings), known(model)
    chosen = check_engine(config)
    micro, _ = largest_micro_batch(config, sizes)
    return estimate(config, sizes, chosen, filled(chosen, config, sizes.hidden, half=True), micro)


def test_each_engine_holds_its_share() -> None:
    """Of 7,615,616,512 trained parameters of 8,292,166,656, in bytes of fp32 (4) and bf16 (2), over eight processes."""
    trained, whole = 7_615_616_512, 8_292_166_656
    ddp, zero2, zero3, fsdp2 = (paper(engine).items for engine in (None, "zero2", "zero3", "fsdp2"))
    assert (ddp["weights"], ddp["gradients"], ddp["optimiser states"]) == (whole * 4, trained * 4, trained * 8)
    assert (zero2["weights"], zero2["master weights"], zero2["optimiser states"]) == (whole * 2, trained // 2, trained)
    assert (zero3["weights"], zero3["gradients"]) == (whole // 4, trained // 2)  # gradients are summed in fp32
    assert (fsdp2["weights"], fsdp2["gradients"]) == (whole // 2, trained // 2)


def test_offload_moves_what_is_held_to_the_host() -> None:
    held = ("weights", "gradients", "master weights", "optimiser states")
    here, away = paper("zero3"), paper("zero3_offload")
    assert not set(held) & set(away.items)
    assert away.host == sum(here.items[name] for name in held)


def test_the_paper_s_model_fits_eight_gpus_under_zero2_and_the_7b_under_ddp_does_not() -> None:
    assert paper("zero2", "Qwen/Qwen2.5-VL-3B-Instruct").total < 80e9 < paper(None).total


def test_qlora_keeps_the_frozen_layers_in_half_a_byte_and_a_scale() -> None:
    plain, small = paper(None, lora=16).items["weights"], paper(None, lora=16, quantize="nf4").items["weights"]
    layers = [shape for name, shape in known("Qwen/Qwen2.5-VL-7B-Instruct").shapes.items() if ".layers." in name]
    assert plain - small > 0.99 * sum(a * b for a, b in (s for s in layers if len(s) == 2)) * (4 - 0.5625)


# --- Activations ----------------------------------------------------------------------------------------------------


def small(family: str, layers: int, depth: int, width: int = 64, inner: int = 192) -> tuple[Any, Dimensions]:
    """A model of random weights, and its sizes as its config states them."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": width // 16,
            "num_key_value_heads": 2, "vocab_size": 500, "head_dim": 16, "rope_parameters": rope}  # fmt: skip
    vision: dict[str, Any] = {"depth": depth, "num_heads": 2, "patch_size": 14, "in_channels": 3, "hidden_size": 32}
    vision |= {
        "qwen2_vl": {"embed_dim": 32, "hidden_size": width, "mlp_ratio": 4},
        "qwen2_5_vl": {"intermediate_size": 80, "out_hidden_size": width, "fullatt_block_indexes": [*range(depth)]},
        "qwen3_vl": {"intermediate_size": 80, "out_hidden_size": width, "deepstack_visual_indexes": [], "num_position_embeddings": 16},
    }[family]  # fmt: skip
    ids = {
        "image_token_id": 499,
        "video_token_id": 498,
        "vision_start_token_id": 497,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    torch.manual_seed(0)
    sizes = read_dimensions({**config.to_dict(), "text_config": text, "vision_config": vision}, "here")
    assert sizes is not None
    return AutoModelForImageTextToText.from_config(config), sizes


def saved(model: Any, mode: str, tokens: int, side: int) -> tuple[int, Micro]:
    """Bytes that autograd keeps of one row with a picture of side x side patches: storages, parameters and inputs left out."""
    ids = torch.arange(tokens).unsqueeze(0) % 400 + 3
    ids[:, 1 : 1 + side * side // 4] = 499
    size = model.config.vision_config.patch_size
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(side * side, 6 * size * size),
        "image_grid_thw": torch.tensor([[1, side, side]]), "mm_token_type_ids": (ids == 499).int(),
    }  # fmt: skip
    if mode == "bf16":
        model.bfloat16()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *batch.values())}
    kept: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        place = t.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = t  # held, so that no other takes its place
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        model.train().model(**batch, use_cache=False)
    return sum(t.untyped_storage().nbytes() for t in kept.values()), Micro(tokens, side * side // 4)


def cast_weights(sizes: Dimensions, mode: str, layer: str) -> int:
    """Bytes of the bf16 copies that autocast keeps of one layer's matrices."""
    matrices = [a * b for name, (a, *rest) in sizes.shapes.items() if layer in name and rest for b in rest]
    return 2 * sum(matrices) if mode == "autocast" else 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_more_keeps_the_bytes_of_the_formula_exactly(family: str, mode: Any) -> None:
    tokens, side = 48, 8
    for width, inner in ((64, 192), (128, 320)):
        one, sizes = small(family, 1, 1, width, inner)
        two, deeper = small(family, 2, 1, width, inner)[0], small(family, 1, 2, width, inner)[0]
        base = saved(one, mode, tokens, side)[0]
        layer = saved(two, mode, tokens, side)[0] - base - cast_weights(sizes, mode, "layers.0.")
        block = saved(deeper, mode, tokens, side)[0] - base - cast_weights(sizes, mode, "blocks.0.")
        assert layer == language_bytes(sizes, mode) * tokens
        assert block == vision_bytes(sizes, mode) * side * side


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_keeps_what_is_estimated(family: str, mode: Any) -> None:
    model, sizes = small(family, 6, 4, 128, 320)
    found, micro = saved(model, mode, 160, 16)
    config = resolve(train_parts="vision,merger,language,head")
    guess = sum(activations(config, sizes, micro, mode, set()).values())
    guess += sum(cast_weights(sizes, mode, layer) for layer in (".layers.", ".blocks.", ".merger."))
    assert 0.98 < guess / found < 1.02  # measured: 0.993 to 1.004


def test_frozen_parts_keep_nothing_and_recomputed_ones_their_inputs() -> None:
    sizes, micro = known("Qwen/Qwen2.5-VL-3B-Instruct"), Micro(4096, 1280)
    plain = activations(resolve(train_parts="language"), sizes, micro, "autocast", set())
    assert {*plain} == {"language", "last norm and rotary tables"}
    again = activations(resolve(train_parts="language"), sizes, micro, "autocast", {"language"})
    layer = language_bytes(sizes, "autocast") * 4096
    assert plain["language"] == 36 * layer and again["language"] == 36 * 4096 * 2048 * 4 + layer


def test_the_memory_of_a_gpu_is_read_from_nvidia_smi_or_assumed_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_bytes() == (80 * 10**9, "no GPU found here: 80 GB assumed")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 81559\necho 40960\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert gpu_bytes() == (40960 * 2**20, "found 2 GPUs")
