"""Models: a family's name in, a tiny one of its real class out, with random weights, that takes what its processor makes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from processors import build_processor

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 16}  # each is chosen by every token


def token(family: str, text: str) -> int:
    return int(build_processor(family).tokenizer.convert_tokens_to_ids(text))


def text_of(family: str, kind: str | None = None, **more: Any) -> dict[str, Any]:
    tokenizer = build_processor(family).tokenizer
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    named = {"model_type": kind} if kind else {}
    return {**TEXT, **named, "vocab_size": len(tokenizer), **ids, "tie_word_embeddings": False, **more}


def _qwen(family: str, patch: int, text: dict[str, Any], tower: dict[str, Any]) -> dict[str, Any]:
    ids = {
        "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
    }  # fmt: skip
    sections = {
        "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1], **({"mrope_interleaved": True} if patch == 16 else {})}
    }
    return {
        **{name: token(family, text_) for name, text_ in ids.items()},
        "text_config": text_of(family, **sections, **text), "tie_word_embeddings": False,
        "vision_config": {"patch_size": patch, "spatial_merge_size": 2, "temporal_patch_size": 2, **tower},
    }  # fmt: skip


QWEN3_TOWER = {**TOWER, "depth": 3, "num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1],
               "num_position_embeddings": 16}  # fmt: skip
GLM_IDS = {"image_token_id": "<|image|>", "video_token_id": "<|video|>", "image_start_token_id": "<|begin_of_image|>",
           "image_end_token_id": "<|end_of_image|>", "video_start_token_id": "<|begin_of_video|>",
           "video_end_token_id": "<|end_of_video|>"}  # fmt: skip


def _glm(family: str, **text: Any) -> dict[str, Any]:
    return {
        **{name: token(family, text_) for name, text_ in GLM_IDS.items()},
        "text_config": text_of(family, rope_parameters={**ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}, **text),
        "tie_word_embeddings": False,
        "vision_config": {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32,
                          "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "image_size": 56},
    }  # fmt: skip


def _projected(family: str, image: str, tower: dict[str, Any], kind: str = "llama", **more: Any) -> dict[str, Any]:
    own = more.pop("text", {})
    return {
        "image_token_id": token(family, image), "vision_config": {**TOWER, **tower},
        "text_config": text_of(family, kind, **own), "tie_word_embeddings": False, **more,
    }  # fmt: skip


CLIP = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14, "vision_use_head": False}
PIXTRAL = {"model_type": "pixtral", "image_size": 112, "patch_size": 14, "head_dim": 16, "rope_parameters": ROPE}

CONFIGS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "qwen2_vl": ("Qwen2VL", lambda: _qwen("qwen2_vl", 14, {}, {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2})),
    "qwen2_5_vl": ("Qwen2_5_VL", lambda: _qwen("qwen2_5_vl", 14, {}, {**TOWER, "depth": 2, "num_heads": 2, "out_hidden_size": 32,
        "window_size": 56, "fullatt_block_indexes": [1]})),
    "qwen3_vl": ("Qwen3VL", lambda: _qwen("qwen3_vl", 16, {"head_dim": 8, "num_hidden_layers": 3}, QWEN3_TOWER)),
    "qwen3_vl_moe": ("Qwen3VLMoe", lambda: _qwen("qwen3_vl", 16, {"head_dim": 8, "num_hidden_layers": 3, **EXPERTS}, QWEN3_TOWER)),
    "llava": ("Llava", lambda: _projected("llava", "<image>", CLIP)),
    "llava_next": ("LlavaNext", lambda: _projected("llava_next", "<image>", CLIP, image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]])),
    "llava_onevision": ("LlavaOnevision", lambda: _projected("llava_onevision", "<image>", {**SIGLIP, "image_size": 28}, "qwen2",
        video_token_id=token("llava_onevision", "<video>"), vision_feature_layer=-1, vision_feature_select_strategy="full",
        image_grid_pinpoints=[[28 * row, 28 * column] for row in (1, 2, 3) for column in (1, 2, 3)])),
    "idefics3": ("Idefics3", lambda: {**_projected("idefics3", "<image>", {"image_size": 56, "patch_size": 14}), "scale_factor": 2}),
    "smolvlm": ("SmolVLM", lambda: {**_projected("smolvlm", "<image>", {"image_size": 56, "patch_size": 14}), "scale_factor": 2}),
    "internvl": ("InternVL", lambda: _projected("internvl", "<IMG_CONTEXT>", {"image_size": [56, 56], "patch_size": [14, 14]}, "qwen2")),
    "gemma3": ("Gemma3", lambda: _projected("gemma3", "<image_soft_token>", SIGLIP, "gemma3_text", mm_tokens_per_image=4,
        text={"head_dim": 8, "sliding_window": 64})),
    "paligemma": ("PaliGemma", lambda: _projected("paligemma", "<image>", {**SIGLIP, "image_size": 28, "projection_dim": 32}, "gemma",
        projection_dim=32, text={"head_dim": 8})),
    "pixtral": ("Llava", lambda: _projected("pixtral", "[IMG]", PIXTRAL, "mistral", vision_feature_layer=-1,
        vision_feature_select_strategy="full", text={"head_dim": 8})),
    "mistral3": ("Mistral3", lambda: _projected("mistral3", "[IMG]", PIXTRAL, "mistral", spatial_merge_size=2, text={"head_dim": 8})),
    "mllama": ("Mllama", lambda: {"image_token_index": token("mllama", "<|image|>"), "tie_word_embeddings": False,
        "text_config": text_of("mllama", cross_attention_layers=[1], num_hidden_layers=3, rope_parameters=ROPE),
        "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
            "image_size": 56, "patch_size": 14, "max_num_tiles": 4, "intermediate_layers_indices": [0], "vision_output_dim": 64,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]}}),
    "glm4v": ("Glm4v", lambda: _glm("glm4v")),
    "glm4v_moe": ("Glm4vMoe", lambda: _glm("glm4v_moe", n_routed_experts=4, num_experts_per_tok=4, moe_intermediate_size=16,
        n_shared_experts=1, first_k_dense_replace=1, head_dim=8)),
    "lfm2_vl": ("Lfm2Vl", lambda: _projected("lfm2_vl", "<image>", {"model_type": "siglip2_vision_model", "patch_size": 8, "num_patches": 16,
        "vision_use_head": False}, "lfm2", downsample_factor=2, projector_hidden_size=32, text={"layer_types": ["conv", "full_attention"]})),
    "cohere2_vision": ("Cohere2Vision", lambda: _projected("cohere2_vision", "<|IMG_PATCH|>", {**SIGLIP, "image_size": 28, "patch_size": 7},
        "cohere2", downsample_factor=2, alignment_intermediate_size=32, text={"sliding_window": 64})),
}  # fmt: skip


@cache
def _config(family: str) -> tuple[Any, Any]:
    import transformers

    name, words = CONFIGS[family]
    return (
        getattr(transformers, f"{name}Config")(**copy.deepcopy(words())),  # Pixtral's writes into what it is given
        getattr(transformers, f"{name}ForConditionalGeneration"),
    )


def build_model(family: str) -> Any:
    """A fresh model of a family, the same weights at every call; zero-initialised gates opened, so that all of it is used."""
    config, kind = _config(family)
    torch.manual_seed(0)
    model = kind(copy.deepcopy(config))  # a test may change it
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.abs().sum() or "gate" in name.rpartition(".")[2]:
                parameter.normal_(0, 0.02)
    return model.float()


PROCESSOR_OF = {"qwen3_vl_moe": "qwen3_vl"}


def processor_of(family: str) -> Any:
    return build_processor(PROCESSOR_OF.get(family, family))
