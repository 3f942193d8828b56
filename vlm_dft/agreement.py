"""Agreement: what each of the processes of a run found by itself in; what holds for all of them, or an error in all, out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vlm_dft.errors import ConfigError


def agreed(last: Path | None, arguments: Any) -> Path | None:
    """The first process's checkpoint, in all of them."""
    if arguments.world_size == 1:
        return last
    from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]

    name = [None if last is None else str(last)]
    broadcast_object_list(name)
    return None if name[0] is None else Path(name[0])


def check_same_examples(examples: Any, arguments: Any) -> None:
    """Raise ConfigError in every process where they gathered different rows: a step would train some twice, and others never.

    Each process reads the data itself, on its own machine; indices are dealt among them. Examples without a fingerprint are not compared.
    """
    if arguments.world_size == 1:
        return
    import torch.distributed as dist

    own = (getattr(examples, "fingerprint", None), len(examples), os.uname().nodename)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    other = next((k for k, one in enumerate(found) if one[:2] != found[0][:2]), None)
    if other is not None:
        said = [f"{found[k][1]:,} examples (fingerprint {str(found[k][0])[:12]}) on {found[k][2]}" for k in (0, other)]
        raise ConfigError(
            f"The processes of this run have gathered different rows: process 0 {said[0]}, process {other} {said[1]}. "
            "The files below --data must be the same on all machines, and may not change while a run starts."
        )
