"""Targets: names of linear layers and a user's patterns in, the patterns of whole names that LoRA is put on out. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from vlm_dft.cards import nearest
from vlm_dft.errors import ModelError


def patterns_of(names: Iterable[str]) -> list[str]:
    """Module names as few patterns: those that differ in numbers are one, those in the same blocks are joined by |."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        pieces = [r"\d+" if piece.isdigit() else re.escape(piece) for piece in name.split(".")]
        last = max((k for k, piece in enumerate(pieces) if piece == r"\d+"), default=-1)
        ends = blocks.setdefault(r"\.".join(pieces[: last + 1]), [])
        end = r"\.".join(pieces[last + 1 :])
        if end not in ends:
            ends.append(end)
    return [r"\.".join(piece for piece in (start, _joined(ends)) if piece) for start, ends in blocks.items()]


def _joined(ends: Sequence[str]) -> str:
    """The patterns a\\.x, a\\.y and b\\.z as (a\\.(x|y)|b\\.z)."""
    groups: dict[str, list[str]] = {}
    for end in ends:
        start, _, last = end.rpartition(r"\.")
        groups.setdefault(start, []).append(last)
    found = []
    for start, lasts in groups.items():
        last = lasts[0] if len(lasts) == 1 else f"({'|'.join(lasts)})"
        found.append(rf"{start}\.{last}" if start else last)
    return found[0] if len(found) == 1 else f"({'|'.join(found)})"


def match_targets(
    layers: Mapping[str, list[str]], parts: Sequence[str], targets: Sequence[str]
) -> dict[str, list[str]]:
    """A user's patterns, each made to match whole names, under every part in which it matches. Raises ModelError."""
    patterns: dict[str, list[str]] = {}
    for target in targets:
        whole = rf"(?:.*\.)?(?:{target})"
        hits = {part: [name for name in names if re.fullmatch(whole, name)] for part, names in layers.items()}
        if not any(hits[part] for part in parts):
            elsewhere = [part for part, names in hits.items() if names]
            ends = sorted({end for part in parts for name in layers[part] for end in (name, name.rpartition(".")[2])})
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for part in parts for name in layers[part]))
            raise ModelError(
                f"lora_targets: {target!r} matches no linear layer of {', '.join(parts)}."
                + (f" It matches {len(hits[elsewhere[0]])} of {elsewhere[0]}, " if elsewhere else nearest(target, ends))
                + ("which LoRA is not put on: train_parts=head trains it whole." if elsewhere == ["head"] else "")
                + (f"which lora_parts={','.join([*parts, elsewhere[0]])} would include." if elsewhere and elsewhere != ["head"] else "")
                + f" Linear layers there: {known}."
            )  # fmt: skip
        for part in parts:
            if hits[part]:
                joined = patterns_of(hits[part])
                wider = {
                    name for names in layers.values() for name in names if any(re.fullmatch(p, name) for p in joined)
                }
                patterns.setdefault(part, []).extend(joined if wider == set(hits[part]) else map(re.escape, hits[part]))
    return {part: list(dict.fromkeys(found)) for part, found in patterns.items()}
