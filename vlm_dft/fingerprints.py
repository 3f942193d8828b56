"""Fingerprints: samples, pictures and a model in; short hashes and settings that tell whether responses are to the same thing out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlm_dft.chat import Sample
from vlm_dft.decoding import Decoding

EDGES = 65_536  # bytes at each end of a picture file that are hashed, with its size: all of most


def settings_of(samples: Sequence[Sample], decoding: Decoding, limit: int) -> dict[str, Any]:
    """What decides responses and is known before any model is loaded."""
    return {
        "benchmark": ", ".join(dict.fromkeys(sample.benchmark for sample in samples)),
        "samples": len(samples),
        "rows": digest([sample.id, sample.split] for sample in samples),
        "pictures": digest([*map(_picture, sample.images)] for sample in samples),
        "max_new_tokens": limit,
        "decoding": decoding.as_dict(),
    }


def digest(values: Iterable[Any]) -> str:
    """A short hash of values that JSON can hold."""
    found = hashlib.sha256()
    for value in values:
        found.update(json.dumps(value, sort_keys=True).encode())
    return found.hexdigest()[:16]


def fingerprint(model: Any, per_tensor: int = 64) -> str:
    """A hash of some values of every parameter: tells two checkpoints apart without reading them whole."""
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // per_tensor)][:per_tensor].float().cpu()
        found.update(f"{name} {tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return found.hexdigest()[:16]


def _picture(image: Any) -> Any:
    """A picture's size in bytes and its ends, or its pixels; nothing of one that cannot be read, which is said when it is opened."""
    if isinstance(image, (str, Path)) and len(str(image)) < 4096 and Path(image).is_file():
        with Path(image).open("rb") as file:
            size = Path(image).stat().st_size
            head = file.read(EDGES)
            file.seek(max(size - EDGES, len(head)))
            return [size, hashlib.sha256(head + file.read(EDGES)).hexdigest()[:16]]
    if hasattr(image, "tobytes"):
        return hashlib.sha256(image.tobytes()).hexdigest()[:16]
    return hashlib.sha256(repr(image).encode()).hexdigest()[:16]
