"""Models: a name or folder in, a processor and a model out, parts frozen, LoRA added."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vlm_dft.adapters import add_lora as add_lora
from vlm_dft.contradictions import FLASH_PACKAGES
from vlm_dft.errors import ModelError
from vlm_dft.locate import base_model, resolve_model
from vlm_dft.parts import freeze_parts as freeze_parts
from vlm_dft.parts import part_table as part_table


@contextmanager
def _found(name: str) -> Iterator[None]:
    """Turn what from_pretrained says of a model that it cannot find or fetch into a ModelError."""
    try:
        yield
    except OSError as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"Cannot load {name!r}: {first} Is the name right, the hub reachable (HF_HUB_OFFLINE is off, HF_TOKEN for gated models), "
            "or the folder whole?"
        ) from error


def device_kind() -> str:
    """'cuda' where a GPU is usable, else 'cpu'."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_precision(precision: str) -> None:
    """Raises ModelError for half precision that is asked for without a GPU."""
    if precision in ("bf16", "pure_bf16") and device_kind() != "cuda":
        raise ModelError(f"precision = {precision} needs a GPU, found none. Use precision auto or fp32.")


def load_processor(name: str, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
    """The processor of a model, its image sizes limited to [min_pixels, max_pixels] (areas) where given."""
    from transformers import AutoProcessor

    folder = resolve_model(name)
    own = any((Path(folder) / file).is_file() for file in ("processor_config.json", "preprocessor_config.json"))
    source = folder if own else base_model(folder)  # a LoRA checkpoint keeps its own
    with _found(name):
        processor = AutoProcessor.from_pretrained(source)
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is not None and (min_pixels or max_pixels):
        size = dict(image_processor.size)
        if not {"shortest_edge", "longest_edge"} <= set(size):
            raise ModelError(
                f"min_pixels and max_pixels fit processors that take pixel areas; this one has size {size}."
            )
        size["shortest_edge"] = min_pixels or size["shortest_edge"]
        size["longest_edge"] = max_pixels or size["longest_edge"]
        if size["shortest_edge"] > size["longest_edge"]:
            raise ModelError(
                f"min_pixels = {size['shortest_edge']} is over max_pixels = {size['longest_edge']} (areas; one not given is the "
                "processor's own). Set both."
            )
        image_processor.size = type(image_processor.size)(**size)
    return processor


def load_model(
    name: str, *, dtype: torch.dtype = torch.float32, attention: str | None = None, quantization: Any = None, merge: bool = True
) -> Any:  # fmt: skip
    """The model of a hub id, a checkpoint folder or a LoRA adapter folder (merged onto its base), in evaluation mode.

    quantization: a BitsAndBytesConfig (adapters.quantization_of). merge: False leaves adapters beside the base's weights.
    """
    from transformers import AutoModelForImageTextToText

    folder = resolve_model(name)
    base = base_model(folder)
    with _found(name):
        more = {} if quantization is None else {"quantization_config": quantization}
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype, attn_implementation=attention, **more)
    if quantization is not None:
        for module in model.modules():  # else a pass in evaluation mode on CPU repacks the weights, and training fails
            if hasattr(module, "support_avx512bf16_for_cpu"):
                setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # for mypy, a module's attribute
    if base != folder:
        from peft import PeftModel

        adapted: Any = PeftModel.from_pretrained(model, folder)
        model = adapted.merge_and_unload() if merge else adapted
    return model.eval()


def choose_attention(requested: str | None, device: str, half: bool, model: str = "tiny") -> tuple[str, str]:
    """(attention implementation, reason): flash-attn where it is installed and fits, else PyTorch's sdpa.

    It fits a GPU of compute capability 8.0 or more, half precision, and a family whose layers take it. FlashAttention 3 is
    taken only when asked for: packing and the fused loss have not been run with it. Raises ModelError for one that is asked
    for and cannot work.
    """
    if requested:
        obstacle = _obstacle(requested, device, half, model) if requested.startswith("flash") else None
        if obstacle:
            raise ModelError(f"attention = {requested} cannot work: {obstacle}. Use attention sdpa, or leave it out.")
        return requested, "asked for"
    obstacle = _obstacle("flash_attention_2", device, half, model)
    return ("sdpa", obstacle) if obstacle else ("flash_attention_2", "flash-attn is installed and fits")


def _obstacle(attention: str, device: str, half: bool, model: str) -> str | None:
    """Why this flash attention cannot be used here, or None."""
    if device != "cuda" or not half:
        return f"flash-attn needs a GPU and half precision, this run is on {device}{'' if half else ' in fp32'}"
    capability, least = torch.cuda.get_device_capability(), (9, 0) if attention == "flash_attention_3" else (8, 0)
    if capability < least or (attention == "flash_attention_3" and capability[0] != 9):
        said = "Hopper GPUs, 9.0" if attention == "flash_attention_3" else "GPUs of compute capability 8.0 or more"
        return f"it is made for {said}, this one has {'.'.join(map(str, capability))}"
    try:  # an installed package may still lack its compiled part
        importlib.import_module(FLASH_PACKAGES[attention]).flash_attn_varlen_func  # noqa: B018
    except (ImportError, AttributeError) as error:
        return f"its package does not import ({error})"
    return None if takes_flash(model) else f"the layers of {model} do not take it"


def takes_flash(name: str) -> bool:
    """Whether a model's family supports flash attention, by its class and config alone."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    with _found(name):
        config = AutoConfig.from_pretrained(base_model(resolve_model(name)))
    return bool(getattr(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)], "_supports_flash_attn", False))
