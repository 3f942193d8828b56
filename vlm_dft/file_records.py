"""File records: predictions whose file holds its problems in; the Samples that they answer out, without the benchmark's data."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from vlm_dft.asking import case_of
from vlm_dft.benchmark_cards import EXTRAS
from vlm_dft.chat import Sample
from vlm_dft.columns import fill
from vlm_dft.errors import RowError
from vlm_dft.foreign_predictions import Prediction, as_text
from vlm_dft.renaming import lettered as lettered_options

LETTERS = "ABCDEFGHIJ"
OTHER_NAMES = {"subject": "category", "level": "knowledge_level", "variant": "varid", "seed": "qid"}  # VLMEvalKit's
CLUSTERS = ("qid", "cluster")  # what variants of one problem share, where a row lacks the card's column
LISTING = ("mathvista", "tabmwp")  # scorers whose rule chooses among the choices' texts
LISTED = 20_000  # characters of a list that is written as a text


def samples_in(predictions: Sequence[Prediction], card: Mapping[str, Any], *, where: str) -> list[Sample]:
    """The samples that the rows hold, one a key, in their order, grouped as the card says. Raises RowError for rows without right answers."""
    found: dict[str, Sample] = {}
    for prediction in predictions:
        sample_id = "/".join(prediction.key)
        if sample_id not in found:
            found[sample_id] = _sample(prediction, sample_id, card)
    unlisted = [sample for sample in found.values() if card["scorer"] in LISTING and _unlisted(sample)]
    if unlisted:
        raise RowError(
            f"{where}: {len(unlisted):,} rows are of multiple choice and do not say their choices (first: {unlisted[0].id!r}), to which "
            "the official rule goes. Give the benchmark's own data: --data DIR."
        )
    without = [sample for sample in found.values() if sample.record["gold_answer"] is None]
    if without:
        what = "no right answers" if len(without) == len(found) else f"no right answer in {len(without):,} rows"
        raise RowError(
            f"{where} holds {what} (column answer, or lmms-eval's doc; first: {without[0].id!r}). Give the benchmark's own data: --data DIR."
        )
    return list(found.values())


def _sample(prediction: Prediction, sample_id: str, card: Mapping[str, Any]) -> Sample:
    row, scorer = prediction.row, str(card["scorer"])
    choices = choices_of(row)
    golds = [str(card.get("answer", "answer")), "answer", "gold_answer", *(["target"] if "doc" in row else [])]
    gold = next((row[name] for name in golds if row.get(name) is not None), None)
    kind = row.get("question_type") or row.get("ques_type") or ("multi_choice" if choices else "free_form")
    record = {
        "question": row.get("question") or row.get("query") or row.get("problem") or row.get("input"),
        "choices": choices,
        "question_type": str(kind).replace("-", "_"),  # MathVerse writes multi-choice
        "answer_type": row.get("answer_type") or row.get("ans_type"),
        "precision": _whole(row.get("precision")),
        "unit": row.get("unit") or None,
        "gold_answer": None if gold is None else _gold(as_text(gold), choices, scorer),
        "scorer": scorer,
        **{name: value for name in EXTRAS if (value := _named(row, name)) is not None},
    }
    shared = (str(card["cluster"]), *CLUSTERS) if "cluster" in card else ()
    cluster = next((as_text(row[name]) for name in shared if row.get(name) not in (None, "")), None)
    groups = groups_of(row, card.get("groups") or ())
    return Sample(sample_id, [], [], str(card["name"]), _split(row), record, groups, cluster)


def _unlisted(sample: Sample) -> bool:
    return sample.record["question_type"] == "multi_choice" and not sample.record["choices"]


def _named(row: Mapping[str, Any], name: str) -> Any:
    """A column, or what VLMEvalKit calls it; None where it is not there or empty."""
    return next((row[n] for n in (name, OTHER_NAMES.get(name, name)) if row.get(n) not in (None, "")), None)


def choices_of(row: Mapping[str, Any]) -> list[str] | None:
    """The choices of a row: a list, a list written as a text, columns A, B ..., or We-Math's one text; None without."""
    for name in ("choices", "options", "option"):
        value = row.get(name)
        listed = read_list(value) if isinstance(value, str) else value
        if isinstance(listed, list):
            return [as_text(item) for item in listed] or None
        if name == "option" and isinstance(value, str):
            with suppress(RowError):
                return lettered_options(value, where="option")
    lettered = [as_text(row[letter]) for letter in LETTERS if row.get(letter) not in (None, "")]
    return lettered or None


def read_list(text: str) -> list[Any] | None:
    """A list that was written as a text, as JSON or as Python prints it; None for any other text. Nothing is run."""
    if not text.lstrip().startswith("[") or len(text) > LISTED:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return found if isinstance(found, list) else None


def groups_of(row: Mapping[str, Any], paths: Sequence[Any]) -> dict[str, str | tuple[str, ...]]:
    """A card's groups of a row, of those that it, or its `metadata`, has; several labels as a tuple."""
    metadata = row.get("metadata")
    if isinstance(metadata, str) and metadata.lstrip().startswith("{") and len(metadata) < LISTED:
        try:
            metadata = ast.literal_eval(metadata)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            metadata = None
    known = {**(metadata if isinstance(metadata, Mapping) else {}), **row}
    groups: dict[str, str | tuple[str, ...]] = {}
    for path in paths:
        if isinstance(path, Mapping):  # {name: cases}
            for name, cases in path.items():
                with suppress(RowError):
                    groups[name] = fill(case_of(cases, known, where=name)["text"], known, where=name)
            continue
        name = str(path).removesuffix("?").rpartition(".")[2]
        value = _named(known, name)
        value = read_list(value) or value if isinstance(value, str) else value
        if isinstance(value, list):
            groups[name] = tuple(as_text(item) for item in value)
        elif value is not None:
            groups[name] = as_text(value).strip()
    return groups


def _gold(gold: str, choices: Sequence[str] | None, scorer: str) -> str:
    """The right answer as the scorer's records have it: MathVista's is the text of a choice."""
    if scorer == "mathvista" and choices and gold not in choices and len(gold) == 1 and gold in LETTERS[: len(choices)]:
        return choices[LETTERS.index(gold)]
    return gold


def _split(row: Mapping[str, Any]) -> str:
    metadata = row.get("metadata")
    inner = metadata.get("split") if isinstance(metadata, Mapping) else None
    split = row.get("split") or inner or "test"
    return split if isinstance(split, str) else "test"


def _whole(value: Any) -> int | None:
    """A precision, which tables may hold as 1.0 or as a text."""
    try:
        return None if value in (None, "") else int(float(value))
    except (ValueError, TypeError, OverflowError):
        return None
