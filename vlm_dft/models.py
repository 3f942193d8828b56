"""Models: a name or folder in, a processor and a model out, parts frozen, LoRA added."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vlm_dft.adapters import add_lora as add_lora
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
    name: str, *, dtype: torch.dtype = torch.float32, attention: str | None = None, quantization: Any = None
) -> Any:
    """The model of a hub id, a checkpoint folder or a LoRA adapter folder (merged onto its base), in evaluation mode.

    quantization: a BitsAndBytesConfig (adapters.quantization_of).
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

        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return model.eval()


def choose_attention(requested: str | None, device: str, half: bool) -> tuple[str, str]:
    """(attention implementation, reason): flash-attn where it imports, on a GPU in half precision; else PyTorch's sdpa."""
    if requested:
        return requested, "asked for"
    if device != "cuda" or not half:
        return "sdpa", f"flash-attn needs a GPU and half precision, this run is on {device}{'' if half else ' in fp32'}"
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError as error:
        return "sdpa", f"flash-attn does not import ({error})"
    return "flash_attention_2", "flash-attn is installed"
