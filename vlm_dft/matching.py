"""Matching: samples and the predictions of a file in; which prediction is of which sample, by what that is told, and what is left over out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from vlm_dft.chat import Sample, text_of
from vlm_dft.errors import RowError
from vlm_dft.foreign_predictions import Oddities, Prediction, as_text

ALIKE = 90.0  # of 100: two questions that differ in a few characters, as harnesses clean them
TEXTS = ("question", "question_for_eval", "query", "query_wo", "query_cot", "input", "problem", "prompt")
IDS = ("id", "pid", "sample_id", "sample_index", "question_id", "problem_id", "qid")
SHORT = 20  # characters: a shorter text is in many
SURE = 0.9  # of the answers that must agree where no question can be compared
_SPACE = re.compile(r"<image\s*\d*>|<image_\d+>|[\W_]+")


@dataclass(slots=True)
class Matched:
    """Which prediction is of which sample."""

    pairs: list[tuple[Sample, Prediction]]  # in the samples' order, then by draw
    by: str  # what they were matched by
    unknown: list[Prediction] = field(default_factory=list)  # of no sample
    missing: list[Sample] = field(default_factory=list)  # samples with fewer draws than others, or none


def match(
    samples: Sequence[Sample], predictions: Sequence[Prediction], oddities: Oddities, *, ids_only: bool = False
) -> Matched:
    """Pair predictions with samples: by their ids, else by their place in the data, else by their question.

    An id counts where the question, if the file has one, is the sample's too. Raises RowError for one sample with two
    different responses of the same draw.
    """
    best: dict[int, Sample] = {}
    by = "nothing"
    ways = _by_id(samples)
    ways = ways[:1] if ids_only else [*ways, *_by_place(samples), ("question", _by_question(samples))]
    for name, find in ways:
        found = {k: sample for k, p in enumerate(predictions) if (sample := find(p)) is not None}
        if name.startswith("place") and not _answers_agree(found, predictions):
            continue
        if len(found) > len(best):
            best, by = found, name
        if len(best) == len(predictions):
            break
    unknown = [p for k, p in enumerate(predictions) if k not in best]
    drawn: dict[str, dict[int, Prediction]] = {}
    for k, sample in best.items():
        _keep(drawn.setdefault(sample.id, {}), predictions[k], sample, oddities)
    draws = max(map(len, drawn.values()), default=1)
    missing = [sample for sample in samples if len(drawn.get(sample.id, ())) < draws]
    pairs = [(sample, row) for sample in samples for _, row in sorted(drawn.get(sample.id, {}).items())]
    return Matched(pairs, by, unknown, missing)


def _keep(draws: dict[int, Prediction], new: Prediction, sample: Sample, oddities: Oddities) -> None:
    """Keep a prediction; of two that are the same, the first."""
    old = draws.get(new.draw)
    if old is None:
        draws[new.draw] = new
    elif old.response == new.response:
        oddities.add("rows that are there twice, of which one is kept", new.where)
    else:
        raise RowError(
            f"{new.where}: sample {sample.id!r} has another response in {old.where.rpartition(', ')[2]}, of the same draw. Which is "
            "meant? Remove one; several responses a sample are told apart by a column draw: 0, 1 ...",
            "two responses of one sample",
        )


Find = Callable[[Prediction], Sample | None]


def _by_id(samples: Sequence[Sample]) -> list[tuple[str, Find]]:
    """Ways to find a sample by a column that names it, where the row's question does not contradict."""
    known = {sample.id: sample for sample in samples}
    compared = _compared(samples)

    def finder(values: Callable[[Prediction], Sequence[str]]) -> Find:
        def find(prediction: Prediction) -> Sample | None:
            for value in values(prediction):
                sample = known.get(value)
                if sample is not None and compared(prediction, sample) is not False:
                    return sample
            return None

        return find

    def joined(prediction: Prediction) -> Sequence[str]:
        return ["/".join(prediction.key)]

    def column(name: str) -> Callable[[Prediction], Sequence[str]]:
        return lambda prediction: [as_text(prediction.row[name])] if name in prediction.row else []

    def pair(first: str, second: str) -> tuple[str, Find]:
        def values(prediction: Prediction) -> Sequence[str]:
            return [f"{as_text(prediction.row.get(first))}/{as_text(prediction.row.get(second))}"]

        return f"columns {first} and {second}", finder(values)

    pairs = [pair("ID", "key"), pair("qid", "varid"), pair("id", "variant")]
    return [("id", finder(joined)), *pairs, *((f"column {name}", finder(column(name))) for name in IDS)]


def _by_place(samples: Sequence[Sample]) -> list[tuple[str, Find]]:
    """Ways to find a sample by a number that is its place in the data, counted from 0 or from 1."""
    compared = _compared(samples)

    def finder(first: int) -> Find:
        def find(prediction: Prediction) -> Sample | None:
            with suppress(ValueError):
                at = int(prediction.key[0]) - first
                if 0 <= at < len(samples) and compared(prediction, samples[at]) is not False:
                    return samples[at]
            return None

        return find

    return [(f"place in the data, counted from {first}", finder(first)) for first in (0, 1)]


def _by_question(samples: Sequence[Sample]) -> Find:
    """Find a sample by the text of its question, and its answer where several have that question."""
    asked: dict[str, list[Sample]] = {}
    for sample in samples:
        asked.setdefault(_plain(question_of(sample)), []).append(sample)
    asked.pop("", None)

    def find(prediction: Prediction) -> Sample | None:
        texts = [_plain(text) for text in _texts(prediction)]
        found = next((asked[text] for text in texts if text in asked), None)
        if found is None:  # a harness's prompt with the question in it: the longest that is
            inside = [text for text in asked if len(text) > SHORT and any(text in whole for whole in texts)]
            found = asked[max(inside, key=len)] if inside else []
        if len(found) > 1:
            found = [sample for sample in found if _same_answer(prediction, sample)]
        return found[0] if len(found) == 1 else None

    return find


def _compared(samples: Sequence[Sample]) -> Callable[[Prediction, Sample], bool | None]:
    """Whether a row asks a sample's question; None where it does not say what it asks."""
    plain = {sample.id: _plain(question_of(sample)) for sample in samples}
    memory: dict[tuple[int, str], bool | None] = {}

    def compared(prediction: Prediction, sample: Sample) -> bool | None:
        key = (id(prediction), sample.id)
        if key not in memory:
            memory[key] = _asks(prediction, plain[sample.id])
        return memory[key]

    return compared


def _asks(prediction: Prediction, question: str) -> bool | None:
    texts = [plain for text in _texts(prediction) if (plain := _plain(text))]
    if not texts or not question:
        return None
    if any(question in text or (text in question and len(text) > SHORT) for text in texts):
        return True
    from rapidfuzz import fuzz

    return any(fuzz.partial_ratio(question, text, score_cutoff=ALIKE) >= ALIKE for text in texts)


def _answers_agree(found: Mapping[int, Sample], predictions: Sequence[Prediction]) -> bool:
    """Whether places are to be believed: the rows have questions, which were compared, or their answers are the samples'."""
    told = [_same_answer(predictions[k], sample) for k, sample in found.items() if not any(_texts(predictions[k]))]
    known = [same for same in told if same is not None]
    return not told or (bool(known) and sum(known) >= SURE * len(told))


def _same_answer(prediction: Prediction, sample: Sample) -> bool | None:
    """Whether a row's right answer is the sample's, by its letter or its text; None where it has none."""
    given = next(
        (as_text(prediction.row[name]) for name in ("answer", "target") if prediction.row.get(name) is not None), ""
    )
    if not given:
        return None
    gold, choices = as_text(sample.record.get("gold_answer")), sample.record.get("choices") or []
    same = {gold.strip().lower()}
    same |= {chr(97 + k) for k, choice in enumerate(choices) if as_text(choice) == gold}
    same |= {as_text(choice).strip().lower() for k, choice in enumerate(choices) if chr(65 + k) == gold}
    return given.strip().lower() in same


def question_of(sample: Sample) -> str:
    """What a sample asks: of its record, else of its last message."""
    return str(sample.record.get("question") or (text_of(sample.messages[-1]["content"]) if sample.messages else ""))


def _texts(prediction: Prediction) -> list[str]:
    return [value for name in TEXTS if isinstance(value := prediction.row.get(name), str) and value.strip()]


def _plain(text: str) -> str:
    """Letters and digits alone, in lower case: what harnesses leave of a question."""
    return _SPACE.sub("", text).lower()
