"""Benchmarks: a benchmark card and a data folder in, evaluation Samples out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from vlm_dft.asking import asked_text, case_of
from vlm_dft.benchmark_cards import OFFICIAL, RECORD, form_of, read_benchmark
from vlm_dft.cards import nearest
from vlm_dft.chat import Sample
from vlm_dft.columns import column_of, fill, is_nan, list_of, text_of
from vlm_dft.errors import RowError
from vlm_dft.layouts import Layout, Part, find_layout
from vlm_dft.markers import place_media, read_numbered
from vlm_dft.renaming import ABSENT, value_at
from vlm_dft.rows import Row, locate_images, read_rows

__all__ = ["Splits", "load_benchmark", "read_benchmark"]


class Splits(dict[str, list[Sample]]):
    """The samples of each split, and what is to be said of them.

    remarks: sentences, of splits that hold another number of rows than the whole set, or lack variants.
    sources: split -> {layout, folder, rows, expected}, for the record.
    """

    def __init__(self, protocol: str) -> None:
        super().__init__()
        self.protocol = protocol
        self.remarks: list[str] = []
        self.sources: dict[str, dict[str, Any]] = {}


def load_benchmark(
    name: str, data: str | Path | None = None, limit: int | None = None, protocol: str = OFFICIAL
) -> Splits:
    """The samples of every split that the name chooses, in file order; with `limit` the first of each split.

    name: a card in eval/ or a .yaml file; `mathvision:testmini` is that split of it. data: a folder with the set in its
    authors' layout or a copy of the hub's, or the folder above it. protocol: one of the card's, whose prompt is asked.
    Variants of a problem in files of their own (DynaMath) come one beside the other, so that `limit` keeps them together.

    Every file of every split is looked for before any is read, and every row is looked at before one is refused: no row is
    left out. Raises CardError, or RowError that says how many rows are wrong and names the first.
    """
    card = read_benchmark(name)
    form = form_of(card, protocol)
    where = f"Benchmark {card['name']!r}"
    layouts = {split: find_layout(card, split, data) for split in card["chosen"]}
    splits, seen = Splits(protocol), dict[str, str]()
    for split, layout in layouts.items():
        splits[split] = _samples_of(card, form, split, layout, limit)
        if not splits[split]:
            raise RowError(f"{where}, split {split}: no rows. Expected at least one.")
        for sample in splits[split]:
            if sample.id in seen:
                raise RowError(
                    f"{where}: id {sample.id!r} is in {seen[sample.id]} and again in {split}. Ids must be unique."
                )
            seen[sample.id] = split
        _account(splits, card, split, layout, whole=limit is None or len(splits[split]) < limit)
    return splits


def _account(splits: Splits, card: Mapping[str, Any], split: str, layout: Layout, *, whole: bool) -> None:
    """Put down where a split was read from, and say where that is not all of it."""
    rows, expected = len(splits[split]), card["splits"][split].get("rows")
    splits.sources[split] = {
        "layout": layout.name, "folder": None if layout.root is None else str(layout.root), "rows": rows, "expected": expected,
    }  # fmt: skip
    where = f"{card['name']}, split {split}"
    if layout.absent:
        parts = len(layout.absent) + len(layout.parts)
        verb = "is" if len(layout.absent) == 1 else "are"
        splits.remarks.append(
            f"{where}: {len(layout.absent)} of {parts} parts {verb} not there ({', '.join(layout.absent)})."
        )
    if whole and expected is not None and rows != expected:
        splits.remarks.append(
            f"{where}: {rows:,} rows, the whole set has {expected:,}. Its scores are not comparable with published ones."
        )


def _samples_of(
    card: Mapping[str, Any], form: Mapping[str, Any], split: str, layout: Layout, limit: int | None
) -> list[Sample]:
    """The samples of one split. Raises RowError with the number of rows that are wrong, by reason, and the first of them."""
    samples, wrong = [], list[RowError]()
    for part, row in islice(_rows_of(layout, f"Benchmark {card['name']!r}, split {split}"), limit):
        try:
            if isinstance(row, RowError):
                raise row
            samples.append(_sample(card, form, {**row, **part.given}, split, part, layout.root))
        except RowError as error:
            wrong.append(error)
    if len(wrong) > 1:
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in Counter(e.reason for e in wrong).most_common())
        raise RowError(
            f"{len(wrong):,} of {len(wrong) + len(samples):,} rows of {card['name']}, split {split}, are wrong ({reasons}). "
            f"None is left out: mend them. The first: {wrong[0]}",
            wrong[0].reason,
        )
    if wrong:
        raise wrong[0]
    return samples


def _rows_of(layout: Layout, where: str) -> Iterator[tuple[Part, Row | RowError]]:
    """The rows of the parts in turn, one of each; an error takes the place of a row that cannot be read."""
    readers = [(part, _read(part, layout.root, where)) for part in layout.parts]
    while readers:
        still = []
        for part, rows in readers:
            if (row := next(rows, None)) is not None:
                yield part, row
                still.append((part, rows))
        readers = still


def _read(part: Part, root: Path | None, where: str) -> Iterator[Row | RowError]:
    wrong: list[RowError] = []
    for row in read_rows(part.source, root, where=where, broken=lambda row_id, error: wrong.append(error)):
        yield from wrong
        wrong.clear()
        yield row
    yield from wrong


def _sample(
    card: Mapping[str, Any], form: Mapping[str, Any], row: Row, split: str, part: Part, root: Path | None
) -> Sample:
    where = f"{card['name']}, split {split}, row {row['id']}"
    own_id = fill(card["splits"][split].get("id", card.get("id", "{id}")), row, where=where)
    images = _images(form, part, row, root, where)
    messages: list[Any] = [{"role": "user", "content": asked_text(form, row, where=where)}]
    if form.get("system"):
        messages = [{"role": "system", "content": form["system"]}, *messages]
    if form.get("markers") != "text":
        messages, images, _ = read_numbered(messages, images, where=where)
    gold = text_of(_value(row, card["answer"], where), card["answer"], where)
    if not gold.strip() and not card.get("empty_gold"):
        raise RowError(f"{where}: the answer in column {card['answer']!r} is empty.", "empty answer")
    return Sample(
        id=own_id,
        messages=place_media(messages, len(images), where=where),
        images=images,
        benchmark=str(card["name"]),
        split=split,
        record={
            **_record(card.get("record") or {}, row, where),
            "gold_answer": gold, "scorer": card["scorer"], "max_new_tokens": card["max_new_tokens"],
        },
        groups=_groups(card.get("groups") or [], row, where),
        cluster=text_of(_value(row, card["cluster"], where), card["cluster"], where) if "cluster" in card else None,
    )  # fmt: skip


def _images(form: Mapping[str, Any], part: Part, row: Row, root: Path | None, where: str) -> list[Any]:
    """The pictures of a row, their files checked. Raises RowError for a row without one, unless the card says that it may be."""
    says = part.pictures
    if not form.get("pictures", True) or not ({"image", "images"} & set(says)):
        return []
    column: Any = says.get("images")
    if column is not None and not says.get("images_optional"):
        column_of(row, column, where=where)
    folder = root / says["image_root"] if root is not None and says.get("image_root") else root
    images = locate_images(says, row, folder, where=where)
    if not images and not says.get("images_optional"):
        raise RowError(f"{where}: no image in column {column!r}.", "image missing")
    return images


def _record(rules: Mapping[str, Any], row: Row, where: str) -> dict[str, Any]:
    """What the scorers need of a row, under the names that they use; RECORD always, None where the card says nothing of it."""
    record: dict[str, Any] = dict.fromkeys(RECORD)
    for key, rule in rules.items():
        if isinstance(rule, list):
            rule = case_of(rule, row, where=f"{where}, record {key}")
        rule = {"column": rule} if isinstance(rule, str) else rule
        value: Any
        if "text" in rule:
            value = fill(rule["text"], row, where=where)
        elif "value" in rule:
            value = rule["value"]
        elif rule.get("optional"):
            value = row.get(rule["column"])
        else:
            value = _value(row, rule["column"], where)
        record[key] = _plain(value)
    if record["choices"] is not None:
        record["choices"] = [str(choice) for choice in list_of(record["choices"])]
    return record


def _plain(value: Any) -> Any:
    """A cell as the scorers know it: nothing is None (an empty list of choices, a table's NaN), a whole number is whole."""
    if is_nan(value) or (isinstance(value, (list, tuple)) and not value):
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _groups(paths: list[Any], row: Row, where: str) -> dict[str, str | tuple[str, ...]]:
    """What accuracy is broken down by, by the last name of each path; several labels of one row are a tuple.

    A path that ends in a question mark is of a column that a layout may lack. {name: cases} is a group of our own.
    """
    groups: dict[str, str | tuple[str, ...]] = {}
    for path in paths:
        if isinstance(path, Mapping):
            for name, cases in path.items():
                case = case_of(cases, row, where=f"{where}, group {name}")
                groups[name] = fill(case["text"], row, where=where)
            continue
        column = path.removesuffix("?")
        try:
            value = value_at(row, column)
        except ABSENT:
            if path != column:
                continue
            raise _no_column(row, column, where) from None
        name = column.rpartition(".")[2]
        groups[name] = tuple(map(str, value)) if isinstance(value, (list, tuple)) else str(value).strip()
    return groups


def _value(row: Row, path: str, where: str) -> Any:
    try:
        return value_at(row, path)
    except ABSENT:
        raise _no_column(row, path, where) from None


def _no_column(row: Row, column: str, where: str) -> RowError:
    return RowError(
        f"{where}: no column {column!r}.{nearest(column, row)} Columns found: {', '.join(row)}.", f"no column {column}"
    )
