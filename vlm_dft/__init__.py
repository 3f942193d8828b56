"""Fine-tune vision-language models with Dynamic Fine-Tuning (DFT). Light public names; nothing heavy is imported here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vlm_dft.anchor import Anchor
    from vlm_dft.chat import Example, Sample, unroll
    from vlm_dft.collators import ChatCollator
    from vlm_dft.errors import MaskError
    from vlm_dft.linear_loss import fused_linear_loss
    from vlm_dft.loss_head import attach_loss
    from vlm_dft.objectives import OBJECTIVES, dft_loss
    from vlm_dft.packing import PackedDataset
    from vlm_dft.scoring import score_response
    from vlm_dft.segment_attention import check_packing, use_segment_attention
    from vlm_dft.sources import MediaAccess

_HOME = {
    "ChatCollator": "collators",
    "Example": "chat",
    "MaskError": "errors",
    "MediaAccess": "sources",
    "OBJECTIVES": "objectives",
    "Anchor": "anchor",
    "PackedDataset": "packing",
    "Sample": "chat",
    "attach_loss": "loss_head",
    "check_packing": "segment_attention",
    "dft_loss": "objectives",
    "fused_linear_loss": "linear_loss",
    "score_response": "scoring",
    "unroll": "chat",
    "use_segment_attention": "segment_attention",
}
__all__ = [
    "OBJECTIVES",
    "Anchor",
    "ChatCollator",
    "Example",
    "MaskError",
    "MediaAccess",
    "PackedDataset",
    "Sample",
    "attach_loss",
    "check_packing",
    "dft_loss",
    "fused_linear_loss",
    "score_response",
    "unroll",
    "use_segment_attention",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'vlm_dft' has no attribute {name!r}. Public names: {', '.join(sorted(_HOME))}.")
    return getattr(importlib.import_module(f"vlm_dft.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
