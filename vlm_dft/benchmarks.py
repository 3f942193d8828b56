"""Benchmarks: a benchmark card and a data folder in, evaluation Samples out."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from vlm_dft.cards import nearest, read_card
from vlm_dft.chat import Sample
from vlm_dft.columns import fill
from vlm_dft.errors import CardError, RowError
from vlm_dft.markers import place_media, read_numbered
from vlm_dft.prompts import prompt_text
from vlm_dft.rows import locate_images, read_rows, source_root
from vlm_dft.scoring import SCORERS

REQUIRED = ("description", "licence", "splits", "prompt", "answer", "scorer", "max_new_tokens")
OPTIONAL = ("paper", "rows", "image", "images", "system", "unit", "options", "record", "groups", "notes")
RECORD = ("question", "choices", "question_type", "answer_type", "precision", "unit")  # and gold_answer


def read_benchmark(name: str) -> dict[str, Any]:
    """A benchmark card by name or path, everything in it checked. Raises CardError; reads no data."""
    card = read_card("benchmark", name, required=REQUIRED, optional=OPTIONAL)
    where = f"Benchmark {card['name']!r}"
    _expect(card, "splits", dict, where)
    for split, source in card["splits"].items():
        if not isinstance(source, Mapping):
            raise CardError(f"{where}, split {split!r}: expected a source such as {{files: [...]}}, found {source!r}.")
    if card["scorer"] not in SCORERS:
        raise CardError(
            f"{where}: unknown scorer {card['scorer']!r}.{nearest(str(card['scorer']), SCORERS)} "
            f"Known: {', '.join(SCORERS)}."
        )
    if not isinstance(card["max_new_tokens"], int) or card["max_new_tokens"] < 1:
        raise CardError(f"{where}: max_new_tokens must be a whole number above zero, found {card['max_new_tokens']!r}.")
    for key in _expect(card, "record", dict, where):
        if key not in RECORD:
            raise CardError(
                f"{where}, record: unknown key {key!r}.{nearest(str(key), RECORD)} Known: {', '.join(RECORD)}."
            )
    _expect(card, "groups", list, where)
    return card


def load_benchmark(name: str, data: str | Path | None = None, limit: int | None = None) -> dict[str, list[Sample]]:
    """The samples of every split, in file order; with `limit` the first of each split.

    Every file of every split is looked for before any is read. Raises CardError or RowError naming the row.
    """
    card = read_benchmark(name)
    where = f"Benchmark {card['name']!r}"
    roots = {split: source_root(source, data, where=where) for split, source in card["splits"].items()}
    splits, seen = {}, dict[str, str]()
    for split, source in card["splits"].items():
        rows = islice(read_rows(source, roots[split], where=f"{where}, split {split}"), limit)
        splits[split] = [_sample(card, row, split, roots[split]) for row in rows]
        if not splits[split]:
            raise RowError(f"{where}, split {split}: no rows. Expected at least one.")
        for sample in splits[split]:
            if sample.id in seen:
                raise RowError(
                    f"{where}: id {sample.id!r} is in {seen[sample.id]} and again in {split}. Ids must be unique."
                )
            seen[sample.id] = split
    return splits


def _sample(card: Mapping[str, Any], row: Mapping[str, Any], split: str, root: Path | None) -> Sample:
    where = f"{card['name']}, split {split}, row {row['id']}"
    images = locate_images(card, row, root, where=where)
    messages: list[Any] = [{"role": "user", "content": prompt_text(card, row, where=where)}]
    if card.get("system"):
        messages = [{"role": "system", "content": card["system"]}, *messages]
    messages, images, _ = read_numbered(messages, images, where=where)
    columns: Mapping[str, str] = card.get("record") or {}
    record = {key: _value(row, columns[key], where) if key in columns else None for key in RECORD}
    gold = fill("{" + card["answer"] + "}", row, where=where)
    return Sample(
        id=str(row["id"]),
        messages=place_media(messages, len(images), where=where),
        images=images,
        benchmark=str(card["name"]),
        split=split,
        record={**record, "gold_answer": gold, "scorer": card["scorer"], "max_new_tokens": card["max_new_tokens"]},
        groups={column: str(_value(row, column, where)) for column in card.get("groups") or []},
    )


def _value(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise RowError(f"{where}: no column {column!r}.{nearest(column, row)} Columns found: {', '.join(row)}.")
    return row[column]


def _expect(card: Mapping[str, Any], key: str, kind: type[dict[Any, Any]] | type[list[Any]], where: str) -> list[Any]:
    value: Any = card.get(key) or kind()
    if not isinstance(value, kind) or (key in REQUIRED and not value):
        raise CardError(f"{where}: {key} must be a non-empty {kind.__name__}, found {card.get(key)!r}.")
    return list(value)
