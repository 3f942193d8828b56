"""Check report: what a check found in; one mapping of numbers and ids for JSON, and advice with the numbers behind it, out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlm_dft.checking import Checked
from vlm_dft.contamination import CONTAMINATED, LOOKS, Items, Overlap, overlaps
from vlm_dft.recurring import Recurring, recurring, shared_rows

if TYPE_CHECKING:
    from vlm_dft.config import TrainConfig

BINS = 24
SHORT = 8  # response tokens, end of turn included: no room for reasoning
SKEWED = 8  # maximum over median, above which bins grow
TOO_LONG = {  # what becomes of rows over max_length
    "drop": "dropped: raise it, or choose --too_long downscale or shorten_answer",
    "raise": "refused: raise it, or choose another --too_long",
    "shorten_answer": "shortened, their end not trained (or dropped, where the question alone is too long)",
    "downscale": "given smaller pictures (or dropped, where that is not enough)",
}
SHOWN_PAIRS = 1000  # rows of a benchmark's weaker overlaps that are listed; all are counted


@dataclass(slots=True)
class Findings:
    """A check and what it was compared with, for a report."""

    card: Mapping[str, Any]
    config: TrainConfig
    checked: Checked
    how: str  # which rows were looked at
    compared: list[Items] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)  # benchmark -> why it was not compared
    asked: bool = True  # whether benchmarks were to be compared at all

    recurring: Recurring = field(init=False)
    overlaps: dict[str, dict[str, list[Overlap]]] = field(init=False)  # benchmark -> what -> rows

    def __post_init__(self) -> None:
        self.recurring = recurring(self.checked)
        self.overlaps = {items.name: overlaps(self.checked, items) for items in self.compared}


def report(found: Findings) -> dict[str, Any]:
    """Everything, as --json writes it."""
    checked, config = found.checked, found.config
    usable = len(checked.ids)
    result = {
        "recipe": str(found.card["name"]),
        "licence": found.card.get("licence"),
        "data": config.data,
        "model": config.model,
        "max_length": config.max_length,
        "too_long": config.collator.get("too_long", "drop"),
        "looked_at": found.how,
        "rows": {
            "read": checked.read,
            "usable": usable,
            "faulty": checked.faulty,
            "dropped": sum(map(len, checked.dropped.values())),
        },
        "stopped": checked.stopped or None,
        "faults": {
            kind: {
                "rows": len(fault.ids),
                "ids": fault.ids,
                "first": [{"id": row, "place": place, "message": message} for place, row, message in fault.shown],
            }
            for kind, fault in _by_size(checked.faults, lambda fault: len(fault.ids))
        },
        **{
            name: {what: {"rows": len(ids), "ids": ids} for what, ids in _by_size(counted, len)}
            for name, counted in (
                ("dropped", checked.dropped), ("changed", checked.changed), ("remarks", checked.remarks), ("notes", checked.notes),
            )
        },
        "tokens": _tokens(checked),
        "over_max_length": _over(checked, config.max_length),
        "pictures": _pictures(checked),
        "text": {
            "characters": checked.characters,
            "non_ascii": checked.non_ascii,
            "rows_with_letters_of": dict(checked.scripts.most_common()),
        },
        "duplicates": _duplicates(checked, found.recurring),
        "contamination": {
            "asked": found.asked,
            "benchmarks": {items.name: _overlap(found, items) for items in found.compared},
            "not_compared": found.unread,
        },
    }  # fmt: skip
    return {**result, "advice": advice(result)}


def mixture_report(
    card: Mapping[str, Any], every: Sequence[Findings], reports: Sequence[Mapping[str, Any]], not_checked: Mapping[str, str]
) -> dict[str, Any]:  # fmt: skip
    """The reports of a mixture's sources together, as --json writes them."""
    shared = []
    for one, other in combinations(every, 2):
        if pairs := shared_rows(one.checked, other.checked):
            ids = [[one.checked.ids[a], other.checked.ids[b]] for a, b in pairs]
            shared.append({"sources": [one.card["name"], other.card["name"]], "rows": len(pairs), "ids": ids})
    return {
        "recipe": str(card["name"]),
        "licence": card.get("licence"),
        "sources": list(reports),
        "not_checked": dict(not_checked),
        "shared_between_sources": shared,
    }


def statistics(values: NDArray[Any]) -> dict[str, Any]:
    """Least, median, mean, 95 %, most, sum and a histogram of some numbers."""
    found = values
    if not len(found):
        return {"count": 0}
    low, middle, high = (float(np.percentile(found, share)) for share in (0, 50, 100))
    whole = found.dtype.kind == "i"
    edges = (
        np.geomspace(low, high, BINS + 1) if low > 0 and high > SKEWED * middle else np.linspace(low, high, BINS + 1)
    )
    edges = np.unique(np.rint(edges)) if whole else np.unique(edges)
    counts, _ = np.histogram(found, edges) if len(edges) > 1 else (np.array([len(found)]), None)
    bounds = list(pairwise(edges)) or [(low, high)]
    return {
        "count": len(found), "min": _plain(low), "median": _plain(middle), "mean": round(float(found.mean()), 3),
        "p95": _plain(float(np.percentile(found, 95))), "max": _plain(high), "sum": _plain(float(found.sum())),
        "histogram": [
            {"from": _plain(float(a)), "to": _plain(float(b)), "count": int(n)} for (a, b), n in zip(bounds, counts, strict=True)
        ],
    }  # fmt: skip


def advice(found: Mapping[str, Any]) -> list[str]:
    """What to do, each with the number that says so."""
    return [line for lines in (_of_rows(found), _of_tokens(found), _of_recurring(found)) for line in lines]


def _of_rows(found: Mapping[str, Any]) -> list[str]:
    rows, lines = found["rows"], list[str]()
    if found["stopped"]:
        lines.append(
            f"Reading stopped after {rows['read']:,} rows: nothing is known of what follows. Put that right first."
        )
    if rows["faulty"]:
        lines.append(
            f"{rows['faulty']:,} of {rows['read']:,} rows cannot be used. Training refuses them: mend them, or leave them out (`bad_rows: drop`)."
        )
    overlap = found["contamination"]["benchmarks"]
    for name, one in overlap.items():
        if one["contaminated_rows"]:
            lines.append(
                f"{_rows(one['contaminated_rows'])} in {name} too ({one['contaminated_items']:,} of its {one['items']:,} items): "
                f"once trained on, they are remembered, and accuracy on {name} says little. Take them out."
            )
        if one["suspected_rows"]:
            lines.append(
                f"{_rows(one['suspected_rows'])} perhaps in {name} too, by the question and by the look of the picture: see --html."
            )
    return lines


def _of_tokens(found: Mapping[str, Any]) -> list[str]:
    tokens, over, lines = found["tokens"], found["over_max_length"], list[str]()
    if not tokens["all"]["count"]:
        return lines
    count, longest, limit = tokens["all"]["count"], tokens["all"]["max"], found["max_length"]
    if over["rows"]:
        lines.append(
            f"{over['rows']:,} of {count:,} rows: more than max_length = {limit:,} tokens (the longest has {longest:,}). They are "
            f"{TOO_LONG[found['too_long']]}."
        )
    elif longest * 4 <= limit:
        lines.append(
            f"The longest row has {longest:,} tokens: max_length {limit:,} drops nothing, and {longest:,} would not either."
        )
    response, short = tokens["response"], tokens["short_responses"]
    share = short["tokens"] / max(1, response["sum"])
    if short["rows"] == count:
        lines.append(
            f"Every response has at most {SHORT} tokens, its end included: there is no reasoning to learn from. `vlm-dft probe` says "
            "whether the model finds such answers probable, which DFT's weights rest on."
        )
    elif short["rows"] and response["median"] > 4 * SHORT:
        lines.append(
            f"{short['rows'] / count:.1%} of the rows ({short['rows']:,}) answer in at most {SHORT} tokens, where the median has "
            f"{response['median']:,}: they hold {share:.2%} of the response tokens, and a loss over tokens hardly hears them."
        )
    elif short["rows"] * 2 > count and share < 0.5:
        lines.append(
            f"{short['rows'] / count:.1%} of the rows ({short['rows']:,}) answer in at most {SHORT} tokens, but the others hold "
            f"{1 - share:.1%} of the response tokens: they rule the loss."
        )
    pictured = tokens["media"]["sum"] / max(1, tokens["all"]["sum"])
    if pictured > 0.75:
        lines.append(f"Pictures take {pictured:.0%} of all tokens: --max_pixels makes them, and a step, smaller.")
    return lines


def _of_recurring(found: Mapping[str, Any]) -> list[str]:
    duplicates, lines = found["duplicates"], list[str]()
    rows = duplicates["rows"]
    if rows["extra"]:
        lines.append(
            f"{rows['extra'] / max(1, found['rows']['usable']):.1%} of the usable rows ({rows['extra']:,}) ask again what another row asks, "
            f"with the same pictures: {rows['extra'] + rows['groups']:,} rows for {rows['groups']:,} problem{'s' * (rows['groups'] != 1)}."
        )
    if rows["answers_differ"]:
        lines.append(
            f"The answers differ in {rows['answers_differ']:,} of {rows['groups']:,} such group{'s' * (rows['groups'] != 1)}: look at them."
        )
    return lines


def _rows(count: int) -> str:
    return "1 row of the set is" if count == 1 else f"{count:,} rows of the set are"


def _tokens(checked: Checked) -> dict[str, Any]:
    every, media, response = (
        np.asarray(column, np.int64) for column in (checked.tokens, checked.media, checked.response)
    )
    short = response <= SHORT
    return {
        "all": statistics(every),
        "media": statistics(media),
        "text": statistics(every - media - response),  # the question and the chat template
        "response": statistics(response),
        "short_responses": {
            "at_most": SHORT, "rows": int(short.sum()), "tokens": int(response[short].sum()),
            "ids": [checked.ids[k] for k in np.flatnonzero(short)] if len(response) else [],
        },
    }  # fmt: skip


def _over(checked: Checked, limit: int) -> dict[str, Any]:
    over = [k for k, tokens in enumerate(checked.tokens) if tokens > limit]
    return {"rows": len(over), "ids": [checked.ids[k] for k in over]}


def _pictures(checked: Checked) -> dict[str, Any]:
    heights, widths = (np.asarray(column, np.int64) for column in (checked.heights, checked.widths))
    aspects = np.maximum(heights, widths) / np.maximum(1, np.minimum(heights, widths))
    return {
        "count": len(heights),
        "rows_with": len(set(checked.prints.rows)),
        "formats": dict(checked.formats.most_common()),
        "width": statistics(widths),
        "height": statistics(heights),
        "megapixels": statistics(heights * widths / 1e6),
        "aspect": statistics(aspects),  # long side over short side
    }


def _duplicates(checked: Checked, found: Recurring) -> dict[str, Any]:
    def named(groups: Sequence[Sequence[int]]) -> list[list[str]]:
        return [[checked.ids[row] for row in group] for group in groups]

    return {
        "rows": {
            "groups": len(found.rows), "extra": found.extra, "answers_differ": found.answers_differ, "ids": named(found.rows),
        },
        "look_alike_same_question": {"pairs": found.alike_count, "ids": named(found.alike)},
        "picture_of_another_row": {
            "groups": len(found.pictures), "rows": sum(map(len, found.pictures)), "ids": named(found.pictures),
        },
        "look_alike_other_question": {"pairs": found.looks_count, "ids": named(found.looks)},
        "question_of_another_row": {
            "groups": len(found.questions), "rows": sum(map(len, found.questions)), "ids": named(found.questions),
        },
    }  # fmt: skip


def _overlap(found: Findings, items: Items) -> dict[str, Any]:
    by_what = found.overlaps[items.name]
    certain = [row for what in CONTAMINATED for row in by_what.get(what, [])]
    return {
        "items": len(items.ids),
        "unreadable": items.unreadable,
        "contaminated_rows": len(certain),
        "contaminated_items": len({item for row in certain for item in row.items}),
        "suspected_rows": len(by_what.get(LOOKS, [])),
        "overlaps": {
            what: {
                "rows": len(rows),
                "pairs": [
                    {"row": found.checked.ids[row.row], "items": ["/".join(items.ids[k]) for k in row.items], "of": row.count}
                    for row in (rows if what in (*CONTAMINATED, LOOKS) else rows[:SHOWN_PAIRS])
                ],
            }
            for what, rows in by_what.items()
        },
    }  # fmt: skip


def _by_size(counted: Mapping[str, Any], size: Any) -> list[tuple[str, Any]]:
    return sorted(counted.items(), key=lambda item: -size(item[1]))


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else round(value, 3)
