"""Every family's real class, tiny and random: its parts by name, each frozen in turn, trained with the family's own processor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_models import CONFIGS, build_model, processor_of
from PIL import Image
from processors import NEEDS
from test_training import config_of

from vlm_dft import ChatCollator, attach_loss
from vlm_dft.chat import Example
from vlm_dft.errors import ModelError
from vlm_dft.families import FAMILIES, PARTS, derive_family, find_family, part_of
from vlm_dft.models import load_model
from vlm_dft.parts import part_table, prepare_parts
from vlm_dft.training import train_objective

torch.set_num_threads(1)
QWEN = {
    "model.visual": "vision",
    "model.visual.merger": "merger",
    "model.language_model": "language",
    "lm_head": "head",
}
QWEN3 = {**QWEN, "model.visual.deepstack_merger_list": "merger"}
GLM = {**QWEN, "model.visual.downsample": "merger"}
TOWER = {
    "model.vision_tower": "vision", "model.multi_modal_projector": "merger", "model.language_model": "language",
    "lm_head": "head",
}  # fmt: skip
NEWLINE = {**TOWER, "model.image_newline": "merger"}
IDEFICS = {
    "model.vision_model": "vision", "model.connector": "merger", "model.text_model": "language", "lm_head": "head"
}  # fmt: skip
MLLAMA = {
    "model.vision_model": "vision", "model.multi_modal_projector": "merger", "model.language_model": "language",
    "lm_head": "head",
}  # fmt: skip
TOPS: dict[str, dict[str, str]] = {  # by hand, the longest that fits wins
    "qwen2_vl": QWEN, "qwen2_5_vl": QWEN, "qwen3_vl": QWEN3, "qwen3_vl_moe": QWEN3, "llava": TOWER, "llava_next": NEWLINE,
    "llava_onevision": NEWLINE, "idefics3": IDEFICS, "smolvlm": IDEFICS, "internvl": TOWER, "gemma3": TOWER,
    "paligemma": TOWER, "pixtral": TOWER, "mistral3": TOWER, "mllama": MLLAMA, "glm4v": GLM, "glm4v_moe": GLM,
    "lfm2_vl": TOWER, "cohere2_vision": TOWER,
}  # fmt: skip
LAST_BLOCK = r"vision_tower\.(encoder\.layers\.2|post_layernorm)\."  # of three: LLaVA takes the features of the second
NEVER_USED = {"llava": LAST_BLOCK, "llava_next": LAST_BLOCK, "llava_onevision": r"vision_tower\.post_layernorm\."}
SCALED_LOGITS = {"cohere2_vision"}
every_family = pytest.mark.parametrize("family", CONFIGS)
trainable = pytest.mark.parametrize("family", [name for name in CONFIGS if name not in SCALED_LOGITS])


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest) -> None:
    family = getattr(request.node, "callspec", None) and request.node.callspec.params.get("family")
    if family in NEEDS:
        pytest.importorskip(NEEDS[family])


def part_by_hand(family: str, name: str) -> str:
    return next(TOPS[family][top] for top in sorted(TOPS[family], key=len, reverse=True) if name.startswith(top))


def rows(count: int = 2) -> list[Example]:
    noise = np.random.default_rng(0)
    answers = ("A red bar.", "Two bars, 12 of them.", "No.", "It is on the left.")
    return [
        Example(
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": answers[k % 4]}]},
            ],
            images=[Image.fromarray(noise.integers(0, 256, (56, 112, 3), dtype=np.uint8))],
        )
        for k in range(count)
    ]


def gradients(family: str, **words: Any) -> tuple[dict[str, bool], Any]:
    """{parameter: whether it has a gradient other than zero} after one backward pass."""
    model, parts = prepare_parts(attach_loss(build_model(family)), config_of(**words))
    model.train()(**ChatCollator(processor_of(family))(rows()), objective="nll")["loss"].backward()
    return {n: p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in model.named_parameters()}, parts


@every_family
def test_every_parameter_belongs_to_the_part_that_its_name_says(family: str) -> None:
    model = build_model(family)
    found = find_family(model)
    assert model.config.model_type in FAMILIES
    for name, _ in model.named_parameters():
        assert part_of(name, found) == part_by_hand(family, name), name
    assert all(row["parameters"] for row in part_table(model).values())


@every_family
def test_the_rule_finds_the_same_parts_as_the_table(family: str) -> None:
    """But for GLM's downsampling convolution, whose name says nothing."""
    model = build_model(family)
    rule = derive_family(model)
    for name, _ in model.named_parameters():
        if "downsample" not in name:
            assert part_of(name, rule) == part_by_hand(family, name), name


@trainable
@pytest.mark.parametrize("frozen", PARTS)
def test_a_frozen_part_has_no_gradient_and_all_the_others_have(family: str, frozen: str) -> None:
    found, parts = gradients(family, train_parts=[part for part in PARTS if part != frozen])
    unused = NEVER_USED.get(family, r"(?!)")
    for name, moved in found.items():
        expected = part_by_hand(family, name) != frozen and not re.search(unused, name)
        assert moved == expected, name
        assert parts.trains(name) == (part_by_hand(family, name) != frozen)


@trainable
def test_a_step_with_lora_and_the_merger_trained_whole_is_proved_saved_and_loaded(family: str, tmp_path: Path) -> None:
    """By train_objective, from folders as the hub would hold them; the loss's self-test and the proof run within it."""
    build_model(family).save_pretrained(tmp_path / "model")
    processor_of(family).save_pretrained(tmp_path / "model")
    start = {name: p.detach() for name, p in load_model(str(tmp_path / "model")).named_parameters()}
    config = config_of(
        model=str(tmp_path / "model"), lora=2, lora_parts="vision,language", train_parts="merger", max_steps=2, warmup=0,
        batch_size=2, micro_batch=1,
    )  # fmt: skip
    final = train_objective(config, "nll", rows(4), tmp_path / "run")
    end = dict(load_model(str(final)).named_parameters())
    assert start.keys() == end.keys()
    moved = {part_by_hand(family, name) for name in start if not torch.equal(start[name], end[name])}
    assert moved == {"vision", "merger", "language"}
    merger = {name for name in start if part_by_hand(family, name) == "merger" and name != "model.image_newline"}
    assert all(not torch.equal(start[name], end[name]) for name in merger)


@pytest.mark.parametrize("family", sorted(SCALED_LOGITS))
def test_a_family_that_scales_its_logits_is_refused_in_words(family: str) -> None:
    with pytest.raises(ModelError, match="scales its logits .* not supported"):
        attach_loss(build_model(family))


def skeleton(kind: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    config = CONFIG_MAPPING[kind]()
    for part in (config, config.get_text_config(), getattr(config, "vision_config", None)):
        for name in ("num_hidden_layers", "depth"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, 2)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize(
    ("kind", "names"),
    [  # families that no table knows
        ("blip-2", {"vision_model.post_layernorm.weight": "vision", "query_tokens": "merger", "language_projection.bias": "merger",
                    "language_model.model.decoder.embed_tokens.weight": "language"}),
        ("idefics", {"model.vision_model.embeddings.class_embedding": "vision", "model.norm.weight": "language",
                     "model.gated_cross_attn_layers.0.alpha_dense": "language", "lm_head.weight": "head"}),
        ("deepseek_vl", {"model.vision_model.head.probe": "vision", "model.aligner.linear1.weight": "merger"}),
        ("video_llava", {"model.video_tower.post_layernorm.bias": "vision", "model.image_tower.post_layernorm.bias": "vision"}),
        ("paddleocr_vl", {"model.visual.vision_model.post_layernorm.weight": "vision", "model.projector.linear_1.weight": "merger"}),
        ("kosmos-2", {"vision_model.model.post_layernorm.bias": "vision", "image_to_text_projection.latent_query": "merger",
                      "text_model.model.layer_norm.bias": "language"}),
    ],
)  # fmt: skip
def test_the_rule_reads_the_parts_of_an_unknown_family_off_its_modules(kind: str, names: dict[str, str]) -> None:
    model = skeleton(kind)
    assert kind not in FAMILIES
    family = find_family(model)
    assert {name: part_of(name, family) for name in names} == names
    assert {part_of(name, family) for name, _ in model.named_parameters()} >= {"vision", "merger", "language"} - (
        {"merger"} if kind == "idefics" else set()
    )


def test_a_model_some_of_whose_parameters_belong_nowhere_is_refused_naming_them() -> None:
    model = skeleton("janus")
    with pytest.raises(
        ModelError,
        match=r"belong to no part: model\.vqmodel.* Describe the family: vlm_dft.families.FAMILIES\['janus'\]",
    ):
        find_family(model)


def test_a_model_without_a_tower_or_with_an_encoder_is_refused() -> None:
    with pytest.raises(ModelError, match="No vision tower found in Mistral4ForCausalLM"):
        find_family(skeleton("mistral4"))
    with pytest.raises(ModelError, match="Florence2.* is not a decoder"):
        attach_loss(skeleton("florence2"))


def test_a_model_type_alone_will_do_for_the_families_of_the_table() -> None:
    assert find_family("qwen3_vl") == find_family(build_model("qwen3_vl"))
    with pytest.raises(
        ModelError, match="No family is described for model type 'blip-2', and without the model none is"
    ):
        find_family("blip-2")
