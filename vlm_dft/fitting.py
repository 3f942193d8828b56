"""Fitting: an example over max_length in; the same dropped, its answer cut or its images made smaller, and why, out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlm_dft.chat import IMAGE_SETTINGS, Example, Message, is_trained
from vlm_dft.errors import MaskError
from vlm_dft.media import open_image

if TYPE_CHECKING:
    from vlm_dft.collators import ChatCollator, Measured

SMALLEST = 1 / 64  # of an image's side, below which downscaling gives up
STEPS = 24  # of the bisection


def fit(collator: ChatCollator, example: Example, name: str) -> tuple[Example | None, str]:
    """(the example to use or None, what was done) by the collator's `too_long`. Raises MaskError where that is "raise"."""
    measured = collator.measure(example)
    return POLICIES[collator.too_long](collator, example, name, measured)


def _raise(collator: ChatCollator, example: Example, name: str, measured: Measured) -> tuple[Example | None, str]:
    raise MaskError(
        f"{name}: {measured.tokens} tokens, over max_length = {collator.max_length}. Media are never cut: raise max_length, "
        "lower max_pixels, drop the row, or choose another too_long."
    )


def _drop(collator: ChatCollator, example: Example, name: str, measured: Measured) -> tuple[Example | None, str]:
    return None, f"dropped: over max_length = {collator.max_length} tokens"


def _shorten(collator: ChatCollator, example: Example, name: str, measured: Measured) -> tuple[Example | None, str]:
    limit = collator.max_length
    if limit is None or measured.before >= limit or not is_trained(example.messages[-1]):
        return None, f"dropped: what comes before the last answer is over max_length = {limit} tokens"
    return example, f"answer shortened to max_length = {limit} tokens, its end of turn not trained"


def _downscale(collator: ChatCollator, example: Example, name: str, measured: Measured) -> tuple[Example | None, str]:
    limit = collator.max_length or measured.tokens
    sizes, marked = collator.sizes(example, name), collator.mark(example, name)
    by_settings = collator.processing.fast is not None  # Qwen-VL takes a size for each image

    def at(scale: float) -> list[tuple[int, int]]:
        return [(max(1, round(h * scale)), max(1, round(w * scale))) for h, w in sizes]

    def fits(scale: float) -> bool:
        smaller, seen = (_with_sizes(example, at(scale)), sizes) if by_settings else (example, at(scale))
        counted = collator.count(smaller, marked, seen, name)
        return counted is not None and counted.tokens <= limit

    low, high = SMALLEST, 1.0
    if not sizes or not fits(low):
        return None, f"dropped: over max_length = {limit} tokens, however small its images"
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    smaller = _with_sizes(example, at(low)) if by_settings else _resized(collator, example, at(low), name)
    return smaller, f"images downscaled to max_length = {limit} tokens"


def _with_sizes(example: Example, sizes: Sequence[tuple[int, int]]) -> Example:
    """The example with resized_height and resized_width in every image part."""
    left = iter(sizes)
    messages: list[Message] = []
    for message in example.messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [_sized(part, *next(left)) if part["type"] == "image" else part for part in content]
        messages.append({**message, "content": content})
    return replace(example, messages=messages)


def _sized(part: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    kept = {key: value for key, value in part.items() if key not in IMAGE_SETTINGS}
    return {**kept, "resized_height": height, "resized_width": width}


def _resized(collator: ChatCollator, example: Example, sizes: Sequence[tuple[int, int]], name: str) -> Example:
    """The example with its pictures made smaller, for processors that have no setting for it."""
    from PIL.Image import Resampling

    images = [
        open_image(image, where=f"{name}, image {k}", access=collator.access).resize(
            (width, height), Resampling.BICUBIC
        )
        for k, (image, (height, width)) in enumerate(zip(example.images, sizes, strict=True))
    ]
    return replace(example, images=images)


POLICIES: dict[str, Callable[..., tuple[Example | None, str]]] = {
    "raise": _raise,
    "drop": _drop,
    "shorten_answer": _shorten,
    "downscale": _downscale,
}
