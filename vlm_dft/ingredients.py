"""Ingredients: a recipe, its data and a collator in; all that what is prepared of them depends on, and its hash, out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dft.embedded.drawn import cache_root
from vlm_dft.prepared import VERSION
from vlm_dft.recipes import recipe_root
from vlm_dft.rows import source_fingerprint

if TYPE_CHECKING:
    from vlm_dft.collators import ChatCollator

SAID_ONLY = (  # keys of a card that no example depends on
    "description", "licence", "paper", "rows", "notes", "training", "benchmark", "bad_rows", "data", "source",
)  # fmt: skip


def ingredients(
    card: Mapping[str, Any], data: str | None, collator: ChatCollator | None, limit: int | None
) -> dict[str, Any]:
    """What a recipe's prepared form depends on. Of pictures that rows name by path the paths alone: they are not read."""
    source = {key: value for key, value in card["source"].items() if key not in ("files", "embedded")}
    content = source_fingerprint(card["source"], recipe_root(card, data), where=f"Recipe {card['name']!r}")
    return {
        "version": VERSION,
        "card": json.loads(
            json.dumps({key: value for key, value in card.items() if key not in SAID_ONLY}, default=str)
        ),
        "source": {**source, "content": content},
        "limit": limit,
        "measured_with": None if collator is None else collator_settings(collator),
    }


def fingerprint_of(made_from: Mapping[str, Any]) -> str:
    """The hash of ingredients."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def cache_folder(
    card: Mapping[str, Any], data: str | None, *, collator: ChatCollator | None = None, limit: int | None = None
) -> Path:
    """Where a recipe is prepared when nobody says where: in the cache, by its name and fingerprint."""
    digest = fingerprint_of(ingredients(card, data, collator, limit))
    return cache_root() / "prepared" / f"{card['name']}-{digest[:16]}"


def collator_settings(collator: ChatCollator) -> dict[str, Any]:
    """What decides on an example's tokens and on what becomes of a long one: not on packing, padding or the loss."""
    processor = collator.processor
    tokenizer = json.loads(collator.tokenizer.backend_tokenizer.to_str())  # with what its last call asked for
    parts = {}
    for name in ("image_processor", "video_processor", "feature_extractor"):
        part = getattr(processor, name, None)
        if part is not None:
            parts[name] = _hash(json.dumps(part.to_dict(), sort_keys=True, default=str))
    return {
        "processor": type(processor).__name__,
        **parts,
        "tokenizer": _hash(json.dumps({**tokenizer, "padding": None, "truncation": None}, sort_keys=True)),
        "chat_template": _hash(collator.template.source or ""),
        "template_options": json.loads(json.dumps(dict(collator.template.options or {}), default=str)),
        "max_length": collator.max_length,
        "too_long": collator.too_long,
        "resize": collator.processing.resize,
        "max_image_pixels": collator.access.max_image_pixels,
    }


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What tells two ingredients apart, in words."""
    before, after = dict(_flat(there)), dict(_flat(now))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(f"{name}: {_short(before.get(name))} there, {_short(after.get(name))} now" for name in names)


def _flat(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, f"{above}{key}.")
        else:
            yield above + key, inner


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:24] + "..."


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
