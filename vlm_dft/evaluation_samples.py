"""Samples of an evaluation's page: samples, verdicts and responses in; JSON blocks that the page's script draws from out.

A page stays openable by two budgets: TEXT_BUDGET characters of responses and PICTURE_BUDGET bytes of pictures. What
goes beyond is shortened or left out, and the page says how much.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_dft.chat import Sample, text_of
from vlm_dft.errors import ImageError
from vlm_dft.media import open_image

Rows = Sequence[Mapping[str, Any]]
LONGEST_TEXT = 200_000  # characters of a shown response; the whole is in predictions.jsonl
SHORTENED = (LONGEST_TEXT, 50_000, 20_000, 8_000, 4_000, 2_000, 1_000, 500)  # tried in turn until all fit
TEXT_BUDGET = 40_000_000  # characters of all responses
PICTURE_BUDGET = 40_000_000  # bytes of all pictures, before base64 makes four of three
SIDES = ((1_000, 640), (3_000, 512), (10_000, 448))  # (up to so many pictures, pixels of the longest side)
SMALLEST_SIDE = 320
QUALITY = 60  # WebP's; 5 to 12 kB for a diagram of 512 pixels
BLOCK = 64  # pictures of one JSON block, parsed when one of them is first shown
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Pictures:
    """The pictures of a page: data URIs without repetition, and which of them each sample shows."""

    uris: list[str] = field(default_factory=list)
    shown: dict[tuple[str, str], list[int]] = field(default_factory=dict)  # (benchmark, id) -> places in uris
    side: int = SMALLEST_SIDE  # pixels
    left_out: int = 0  # of the distinct pictures: beyond the budget
    unreadable: int = 0


def sample_blocks(
    runs: Sequence[str],
    samples: Mapping[str, Sequence[Sample]],
    scores: Mapping[str, Mapping[str, Rows]],
    responses: Mapping[str, Mapping[str, Rows]],
) -> tuple[str, list[str]]:
    """(the script elements that hold the data, sentences on what was shortened, left out or is missing).

    samples: {benchmark: [Sample]}, empty where the data are not there; scores and responses: {run: {benchmark: rows}}.
    """
    entries = list(_entries(runs, samples, scores, responses))
    notes = _fit_texts(entries)
    found = make_pictures(samples, [(e["benchmark"], e["id"]) for e in sorted(entries, key=_agree)])
    for entry in entries:
        entry["pictures"] = found.shown.get((entry["benchmark"], entry["id"]), [])
    blocks = [_block("data", {"runs": list(runs), "block": BLOCK, "samples": entries})]
    for k in range(0, len(found.uris), BLOCK):
        blocks.append(_block(f"pictures-{k // BLOCK}", found.uris[k : k + BLOCK]))
    return "\n".join(blocks), notes + _picture_notes(found) + _missing(entries)


def _entries(
    runs: Sequence[str],
    samples: Mapping[str, Sequence[Sample]],
    scores: Mapping[str, Mapping[str, Rows]],
    responses: Mapping[str, Mapping[str, Rows]],
) -> Iterator[dict[str, Any]]:
    """An entry per scored sample: its words, and for every run the answers of its draws, None where it has none."""
    for benchmark in dict.fromkeys(name for run in runs for name in scores.get(run, {})):
        known = {sample.id: sample for sample in samples.get(benchmark, ())}
        judged: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
        for run in runs:
            for row in scores.get(run, {}).get(benchmark, ()):
                judged.setdefault(row["id"], {}).setdefault(run, []).append(row)
        said = {
            run: {(row.get("id"), row.get("draw") or 0): row for row in responses.get(run, {}).get(benchmark, ())}
            for run in runs
        }
        for name, found in judged.items():
            first = next(iter(found.values()))[0]
            answers = [
                [_answer(row, said[run].get((name, row.get("draw") or 0), {})) for row in found[run]]
                if run in found
                else None
                for run in runs
            ]
            yield {
                "id": name, "benchmark": benchmark, "split": first.get("split", ""), **_words(known.get(name)),
                "gold": _said(first.get("gold_answer")), "groups": _groups(first.get("groups") or {}), "answers": answers,
            }  # fmt: skip


def _words(sample: Sample | None) -> dict[str, Any]:
    if sample is None:
        return {"question": None, "choices": []}
    question = sample.record.get("question") or text_of(sample.messages[-1]["content"])
    return {"question": str(question), "choices": [_said(choice) for choice in sample.record.get("choices") or ()]}


def _answer(row: Mapping[str, Any], prediction: Mapping[str, Any]) -> dict[str, Any]:
    """One draw of one run: the response and both verdicts."""
    robust = row.get("robust") or {}
    return {
        "response": _said(prediction["response"]) if "response" in prediction else None,
        "official": [int(bool(row["correct"])), _short(row.get("extracted")), _said(row.get("rule"))],
        "robust": [int(bool(robust["correct"])), _short(robust.get("extracted")), _said(robust.get("rule"))] if robust else None,
        "judge": None if row.get("decided_by", "rule") == "rule" else _said(row["decided_by"]),
        "cut": int(row.get("finish") == "length"), "tokens": row.get("tokens"),
    }  # fmt: skip


def _groups(groups: Mapping[str, Any]) -> dict[str, list[str]]:
    return {name: list(map(_said, value if isinstance(value, (list, tuple)) else [value])) for name, value in groups.items()}  # fmt: skip


def _said(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else str(value)


def _short(value: Any, longest: int = 2_000) -> str | None:
    text = _said(value)
    return None if value is None else text if len(text) <= longest else f"{text[:longest]} … ({len(text):,} characters)"


def _fit_texts(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Shorten the responses in place until they fit TEXT_BUDGET; a shortened one keeps its length as `length`."""
    answers = [a for e in entries for draws in e["answers"] for a in draws or () if a["response"] is not None]
    lengths = [len(answer["response"]) for answer in answers]
    limit = next((n for n in SHORTENED if sum(min(n, length) for length in lengths) <= TEXT_BUDGET), SHORTENED[-1])
    for answer, length in zip(answers, lengths, strict=True):
        if length > limit:
            whole, answer["length"] = answer["response"], length
            answer["response"] = whole[: limit // 2] + "\n\n⋯\n\n" + whole[-(limit // 2) :]  # answers stand at the end
    cut = sum(length > limit for length in lengths)
    if not cut:
        return []
    return [
        f"{cut:,} of {len(answers):,} responses are shortened in this page to their beginning and end, {limit:,} characters together; "
        "predictions.jsonl has them whole."
    ]


def _agree(entry: Mapping[str, Any]) -> bool:
    """Whether all runs and both rules say the same of a sample: such samples lose their pictures first."""
    return len({a[k][0] for draws in entry["answers"] for a in draws or () for k in ("official", "robust") if a[k]}) < 2


def _picture_notes(found: Pictures) -> list[str]:
    notes = []
    if found.uris:
        notes.append(f"Pictures are shown at most {found.side} pixels wide or high.")
    if found.left_out:
        notes.append(
            f"{found.left_out:,} of {found.left_out + len(found.uris):,} pictures are left out: with them the page would "
            f"pass its {PICTURE_BUDGET // 1_000_000} MB of pictures. Samples on which runs or rules differ kept theirs first."
        )
    if found.unreadable:
        notes.append(f"{found.unreadable:,} pictures could not be read.")
    return notes


def _missing(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    wordless = sum(entry["question"] is None for entry in entries)
    if not wordless:
        return []
    return [
        f"The questions and pictures of {wordless:,} samples are not shown: the benchmark's data were not found. Name them with --data."
    ]


def make_pictures(samples: Mapping[str, Sequence[Sample]], order: Sequence[tuple[str, str]]) -> Pictures:
    """The pictures of the named samples (benchmark, id), small, as data URIs; the first in `order` within PICTURE_BUDGET."""
    images = {(name, s.id): list(s.images) for name, found in samples.items() for s in found if s.images}
    images = {key: images[key] for key in order if key in images}
    sources = {_source(image): image for found in images.values() for image in found}
    pictures = Pictures(side=next((side for most, side in SIDES if len(sources) <= most), SMALLEST_SIDE))
    places: dict[Any, int | None] = {}
    by_content: dict[bytes, int] = {}
    total, keys = 0, list(sources)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for k in range(0, len(keys), 4 * BLOCK):
            some = keys[k : k + 4 * BLOCK]
            if total >= PICTURE_BUDGET:
                pictures.left_out += len(some)
                continue
            for key, content in zip(
                some, pool.map(lambda key: _thumbnail(sources[key], pictures.side), some), strict=True
            ):
                if content is None:
                    pictures.unreadable += 1
                    continue
                digest = hashlib.sha256(content).digest()
                if digest not in by_content and total + len(content) > PICTURE_BUDGET:
                    total, pictures.left_out = PICTURE_BUDGET, pictures.left_out + 1
                    continue
                if digest not in by_content:
                    by_content[digest], total = len(pictures.uris), total + len(content)
                    pictures.uris.append("data:image/webp;base64," + base64.b64encode(content).decode())
                places[key] = by_content[digest]
    for name, found in images.items():
        shown = [places.get(_source(image)) for image in found]
        pictures.shown[name] = [-1 if place is None else place for place in shown]
    return pictures


def _source(image: Any) -> Any:
    """What tells one picture from another before it is read: its path, or the object itself."""
    return str(image) if isinstance(image, (str, Path)) else id(image)


def _thumbnail(image: Any, side: int) -> bytes | None:
    """A small WebP of what the model's processor gets; None where it cannot be read."""
    try:
        opened = open_image(image)
    except ImageError:
        return None
    opened.thumbnail((side, side), reducing_gap=2.0)
    buffer = io.BytesIO()
    opened.save(buffer, "WEBP", quality=QUALITY, method=2)
    return buffer.getvalue()


def _block(name: str, value: Any) -> str:
    """A script element that holds JSON: no text in it can end the element, since it holds no '<'."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = _SURROGATE.sub("\ufffd", text) if not text.isascii() else text  # what UTF-8 cannot hold
    return f"<script type=application/json id={name}>{text.replace('<', chr(92) + 'u003c')}</script>"
