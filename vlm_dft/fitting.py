"""Fitting: an example over max_length in; the same dropped, its answer cut or its images made smaller, and why, out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlm_dft.chat import IMAGE_SETTINGS, Example, Message, is_trained, media_settings
from vlm_dft.errors import MaskError, naming
from vlm_dft.measuring import Measured, count, measure, processed
from vlm_dft.media import open_image

if TYPE_CHECKING:
    from vlm_dft.collators import ChatCollator

SMALLEST = 1 / 64  # of an image's side, below which downscaling gives up
STEPS, STEPS_PROCESSED = 24, 8  # of the bisection, where a step counts and where it has to process the images


def fit(collator: ChatCollator, example: Example, name: str) -> tuple[Example | None, str]:
    """(the example to use or None, what was done) by the collator's `too_long`. Raises MaskError where that is "raise"."""
    return POLICIES[collator.too_long](collator, example, name, measure(collator, example, name))


def _raise(collator: ChatCollator, example: Example, name: str, measured: Measured) -> tuple[Example | None, str]:
    raise MaskError(
        f"{name}: {measured.tokens} tokens, over max_length = {collator.max_length}. Media are never cut: raise max_length, "
        "lower max_pixels, drop the row, or choose another too_long."
    )


def _drop(collator: ChatCollator, example: Example, name: str, measured: Measured) -> tuple[Example | None, str]:
    return None, f"dropped: over max_length = {collator.max_length} tokens"


def _shorten(collator: ChatCollator, example: Example, name: str, measured: Measured) -> tuple[Example | None, str]:
    limit = collator.max_length or measured.tokens
    if measured.before >= limit or not is_trained(example.messages[-1]):
        return None, f"dropped: what comes before the last answer is over max_length = {limit} tokens"
    if measured.media_ends > limit:
        return None, f"dropped: its media end after max_length = {limit} tokens, and are never cut"
    if measured.ends <= limit:
        return example, f"what the template writes after the last answer cut to max_length = {limit} tokens"
    return example, f"answer shortened to max_length = {limit} tokens, its end of turn not trained"


def _downscale(collator: ChatCollator, example: Example, name: str, measured: Measured) -> tuple[Example | None, str]:
    limit = collator.max_length or measured.tokens
    if not example.images:
        return None, f"dropped: over max_length = {limit} tokens, without images to make smaller"
    marked, sizes = collator.mark(example, name), _own_sizes(collator, example, name)
    by_settings = collator.processing.fast is not None  # Qwen-VL takes a size for each image

    def at(scale: float) -> list[tuple[int, int]]:
        return [(max(1, round(h * scale)), max(1, round(w * scale))) for h, w in sizes]

    def smaller(scale: float) -> Example:
        return _with_sizes(example, at(scale)) if by_settings else _resized(collator, example, at(scale), name)

    def fits(scale: float) -> bool:
        seen = (_with_sizes(example, at(scale)), sizes) if by_settings else (example, at(scale))
        counted = count(collator, seen[0], marked, seen[1], name) or processed(collator, smaller(scale), marked, name)
        return counted.tokens <= limit

    low, high = SMALLEST, 1.0
    if not fits(low):
        return None, f"dropped: over max_length = {limit} tokens, however small its images"
    for _ in range(STEPS if collator.processing.counts and not example.videos else STEPS_PROCESSED):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return smaller(low), f"images downscaled to max_length = {limit} tokens"


def _own_sizes(collator: ChatCollator, example: Example, name: str) -> list[tuple[int, int]]:
    """(height, width) of the images as the processor would have them, where it says so; else of the pictures."""
    sizes, rule = collator.sizes(example, name), collator.processing.fast
    if rule is None:
        return sizes
    settings = media_settings(example.messages, "image")
    with naming([name]):
        grids = collator.processing.grids(sizes, settings)
    return [(rows * rule.patch_size, columns * rule.patch_size) for _, rows, columns in grids]


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
