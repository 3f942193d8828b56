"""Families: a model in, the part that each of its parameters belongs to out. What differs between families stands here, as values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from vlm_dft.errors import ModelError

PARTS = ("vision", "merger", "language", "head")
ORDER = ("head", "merger", "vision", "language")  # a merger may lie in the tower, a head in the language model


@dataclass(frozen=True, slots=True)
class Family:
    """Where a family keeps its parts: patterns searched in parameter names, the first of ORDER that matches wins.

    unused: parameters that the model holds and never uses for a loss, which therefore get no gradient, all of them known;
    None: not known.
    """

    vision: str
    merger: str  # between vision tower and language model
    language: str = r"(^|\.)language_model\."
    head: str = r"(^|\.)lm_head\."
    unused: str | None = None


NOTHING = r"(?!)"
QWEN_VL = Family(vision=r"(^|\.)visual\.", merger=r"(^|\.)visual\.(merger|deepstack_merger_list)\.", unused=NOTHING)
GLM_V = Family(vision=r"(^|\.)visual\.", merger=r"(^|\.)visual\.(merger|downsample)\.", unused=NOTHING)
PROJECTOR = Family(
    vision=r"(^|\.)vision_tower\.",
    merger=r"(^|\.)(multi_modal_projector\.|image_newline$)",
    unused=r"vision_tower\.(.*\.)?(post_layernorm|head)\.",
)
IDEFICS = Family(
    vision=r"(^|\.)vision_model\.",
    merger=r"(^|\.)connector\.",
    language=r"(^|\.)text_model\.",
    unused=NOTHING,
)
MLLAMA = Family(vision=r"(^|\.)vision_model\.", merger=r"(^|\.)multi_modal_projector\.", unused=NOTHING)
LLAMA4 = Family(vision=r"(^|\.)vision_model\.", merger=r"(^|\.)(multi_modal_projector|vision_model\.vision_adapter)\.")
MINICPM = Family(vision=r"(^|\.)vision_tower\.", merger=r"(^|model\.)merger\.")
OMNI = Family(  # the tower of sounds goes with that of pictures
    vision=r"(^|\.)(visual|audio_tower)\.", merger=r"(^|\.)visual\.(merger|merger_list)\."
)


def _untried(family: Family) -> Family:
    """Of the same names, but nobody has looked which parameters get a gradient."""
    return replace(family, unused=None)


FAMILIES: dict[str, Family] = {  # by config.model_type
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), QWEN_VL),
    **dict.fromkeys(("glm4v", "glm4v_moe"), GLM_V),
    **dict.fromkeys(("llava", "llava_next", "llava_onevision", "internvl", "gemma3", "paligemma"), PROJECTOR),
    **dict.fromkeys(("mistral3", "lfm2_vl"), PROJECTOR),
    **dict.fromkeys(("idefics3", "smolvlm"), IDEFICS),
    "mllama": MLLAMA,
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), _untried(QWEN_VL)),
    **dict.fromkeys(("glm46v", "glmga", "glm_ocr", "glm5_next"), _untried(GLM_V)),
    **dict.fromkeys(("llava_next_video", "vipllava", "aya_vision", "aria", "cohere2_vision"), _untried(PROJECTOR)),
    **dict.fromkeys(("got_ocr2", "molmo2", "qianfan_ocr", "perception_lm"), _untried(PROJECTOR)),
    "idefics2": _untried(IDEFICS),
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), MINICPM),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), OMNI),
    "llama4": LLAMA4,
}

# The words of module names by which the rule finds the parts of a model of no known family.
TOWERS = r"(\w+_)?(vision|visual|image|video|vit)(_\w+)?"
BETWEEN = (
    r"(\w*(merger|projector|projection|connector|aligner|resampler|perceiver|qformer|adapter|newline|separator|query)\w*|"
    r"\w*_proj|\w*embeddings_table|vision_neck|embed_vision|embed_image)"
)
BETWEEN_IN_TOWER = r"\w*(merger|projector|connector|aligner|resampler|vision_adapter)\w*"
WRAPPED = r"^(?:base_model\.model\.)?"  # peft's prefix


def find_family(model: Any) -> Family:
    """The family of a model: from the table by its config.model_type, or derived from its modules.

    A model type alone (a text) will do for the families of the table. Raises ModelError for a model some of whose
    parameters belong to no part, and for a type that the table does not have.
    """
    if isinstance(model, str):
        if model not in FAMILIES:
            raise ModelError(
                f"No family is described for model type {model!r}, and without the model none is derived. Known: {', '.join(FAMILIES)}."
            )
        return FAMILIES[model]
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = model.config.model_type
    family = FAMILIES.get(kind) or derive_family(model)
    lost = [name for name, _ in model.named_parameters() if _part(name, family) is None]
    if lost:
        tops = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in lost))
        raise ModelError(
            f"{len(lost)} parameters of {type(model).__name__} (model type {kind!r}) belong to no part: {', '.join(lost[:3])} ... (in "
            f"{', '.join(tops[:6])}). Expected each in one of {', '.join(PARTS)}. Describe the family: "
            f"vlm_dft.families.FAMILIES[{kind!r}] = Family(vision=..., merger=..., language=..., head=...), patterns of parameter names."
        )
    return _without_last_blocks(family, model)


def part_of(parameter: str, family: Family) -> str:
    """'vision', 'merger', 'language' or 'head'. Raises ModelError for a name that no pattern matches."""
    part = _part(parameter, family)
    if part is None:
        raise ModelError(
            f"Parameter {parameter!r} belongs to no part of its family. Extend its patterns in families.py."
        )
    return part


def derive_family(model: Any) -> Family:
    """The family of a model that no table knows, by the rule.

    The language model is its decoder (get_decoder), the head its output embeddings, a tower what get_encoder or its name
    says, and between them is what is called a projector, merger, connector, aligner, resampler, adapter and so on.
    """
    places = {id(module): name for name, module in model.named_modules()}
    decoder = places.get(id(model.get_decoder()), "")
    language = _outermost(decoder)
    if any(
        re.fullmatch(TOWERS, _below(name, language)) for name, _ in model.named_parameters() if _inside(name, language)
    ):
        container, language = (
            language,
            "",
        )  # a decoder that holds the tower: what is neither tower nor between is language
    else:
        container = language.rpartition(".")[0]
    above = WRAPPED + (re.escape(container) + r"\." if container else "")
    children = list(
        dict.fromkeys(_below(name, container) for name, _ in model.named_parameters() if _inside(name, container))
    )
    towers = {child for child in children if re.fullmatch(TOWERS, child) and not re.fullmatch(BETWEEN, child)}
    towers |= _encoders(model, places, container) & set(children)
    towers.discard(_below(language, container) if language else "")
    between = {child for child in children if re.fullmatch(BETWEEN, child)} - towers
    if not towers:
        raise ModelError(
            f"No vision tower found in {type(model).__name__} (model type {model.config.model_type!r}; its modules: {', '.join(children)}). "
            "Expected a vision-language model; describe it in vlm_dft/families.py if it is one."
        )
    head = places.get(id(model.get_output_embeddings()), "") if model.get_output_embeddings() is not None else ""
    return Family(
        vision=above + _any_of(towers),
        merger=f"{above}{_any_of(between)}|{above}{_any_of(towers)}(?:.*\\.)?{BETWEEN_IN_TOWER}(?:\\.|$)",
        language=WRAPPED + re.escape(language) + r"\."
        if language
        else above + _any_of(set(children) - towers - between),
        head=WRAPPED + re.escape(head) + r"\." if head else NOTHING,
    )


def _without_last_blocks(family: Family, model: Any) -> Family:
    """The family with the tower's blocks after the one whose features are taken (vision_feature_layer) as unused."""
    layer = getattr(model.config, "vision_feature_layer", None)
    depth = getattr(getattr(model.config, "vision_config", None), "num_hidden_layers", None)
    if family.unused is None or layer is None or depth is None:
        return family
    last = max(k if k >= 0 else depth + 1 + k for k in (layer if isinstance(layer, (list, tuple)) else [layer]))
    late = "|".join(str(k) for k in range(last, depth))
    return replace(family, unused=rf"{family.unused}|vision_tower\..*layers\.({late})\.") if late else family


def _part(parameter: str, family: Family) -> str | None:
    return next((part for part in ORDER if re.search(getattr(family, part), parameter)), None)


def _outermost(decoder: str) -> str:
    """Of a decoder's place the language model it lies in: "language_model" of "language_model.model.decoder"."""
    names = decoder.split(".")
    for k, name in enumerate(names):
        if name in ("language_model", "text_model", "text_decoder"):
            return ".".join(names[: k + 1])
    return decoder


def _inside(name: str, container: str) -> bool:
    return not container or name.startswith(container + ".")


def _below(name: str, container: str) -> str:
    """The first name below a container: "visual" of "model.visual.blocks.0.norm1.weight"."""
    return name[len(container) + 1 if container else 0 :].split(".")[0]


def _encoders(model: Any, places: dict[int, str], container: str) -> set[str]:
    """Modules that the model itself calls its encoder of pictures or videos."""
    found = set()
    for modality in ("image", "video"):
        try:
            encoder = model.get_encoder(modality=modality)
        except (AttributeError, TypeError, ValueError, NotImplementedError):
            continue
        place = places.get(id(encoder), "")
        if any(re.fullmatch(TOWERS, name) for name, _ in encoder.named_children()):
            continue  # it holds the tower, and more
        if place and place != container and _inside(place, container):
            found.add(_below(place, container))
    return found


def _any_of(names: Iterable[str]) -> str:
    listed = "|".join(sorted(map(re.escape, names)))
    return rf"(?:{listed})(?:\.|$)" if listed else NOTHING
