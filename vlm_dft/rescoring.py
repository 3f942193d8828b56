"""Re-scoring: a file of responses and a benchmark's name in; its results, scored without a model, out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vlm_dft.benchmarks import load_benchmark, read_benchmark
from vlm_dft.chat import Sample
from vlm_dft.errors import UserError
from vlm_dft.file_records import samples_in
from vlm_dft.foreign_predictions import ForeignFile, Prediction, check_benchmark, find_predictions, read_predictions
from vlm_dft.matching import Matched, match
from vlm_dft.metrics import summarise
from vlm_dft.official import OFFICIAL
from vlm_dft.predictions import OWN, refuse_partial, score_pairs, write_scores
from vlm_dft.runs import write_json, write_text

if TYPE_CHECKING:
    from vlm_dft.judge import Judge

ABOUT = (
    "model",
    "protocol",
    "data",
    "limit",
    "engine",
    "decoding",
)  # of results.json, kept where the file has one beside
PARTIAL = " --allow-partial scores what is there, and says what is not."


@dataclass(slots=True)
class Rescored:
    """What re-scoring a file found."""

    file: ForeignFile
    matched: Matched
    rows: list[dict[str, Any]]  # of scores.jsonl
    results: dict[str, Any]  # results.json's form, and "source", "stored"
    said: list[str]  # what was read and how, a line each


def rescore(
    words: str | Path, benchmark: str, *, data: str | None = None, protocol: str | None = None,
    allow_partial: bool = False, judge: Judge | None = None,
) -> Rescored:  # fmt: skip
    """Read a file, find the sample of each response, and score. Loads no model and no torch.

    Without `data` the samples are those that the file's rows hold, or that the run's results.json beside it was of. Raises
    UserError for another benchmark's file, and unless allow_partial for anything missing, unknown or unreadable.
    """
    card = read_benchmark(benchmark)
    name, scorer = str(card["name"]), str(card["scorer"])
    file = read_predictions(find_predictions(words, name))
    check_benchmark(file, name=name, scorer=scorer, known=list(OFFICIAL))
    about = _about(file)
    data = data or about.get("data")
    samples, whence, remarks = _samples(
        file, card, benchmark, data, protocol or about.get("protocol"), about.get("limit")
    )
    own = file.format.name in OWN or not data
    matched = match(samples, file.predictions, file.oddities, ids_only=own)
    if not matched.pairs:
        first = "/".join(file.predictions[0].key) if file.predictions else "none"
        raise UserError(
            f"{file.path}: no response is of a sample of {name}, neither by id (first: {first!r}) nor by question. Is it another "
            "benchmark's file, or another split's?"
        )
    if not allow_partial:
        refuse_partial(file, matched, PARTIAL)
    rows = score_pairs(matched.pairs, judge=judge)
    results = {
        "benchmark": name,
        "model": about.get("model") or _model(file),
        "protocol": protocol or about.get("protocol"),
        "data": data,
        **{key: about.get(key) for key in ("limit", "engine", "decoding")},
        "judge": None if judge is None else judge.summary(),
        "splits": summarise(rows, card.get("metrics") or ()),
        "source": {**_source(file, matched, samples, rows, whence), "remarks": remarks},
        **_stored(rows),
    }
    return Rescored(file, matched, rows, results, _lines(results))


def write_run(folder: Path, done: Rescored) -> Path:
    """Write folder/BENCHMARK/{predictions.jsonl, scores.jsonl, results.json}, as `vlm-dft evaluate` leaves them for compare.

    Returns folder/BENCHMARK. Raises UserError where another file's predictions are there already.
    """
    target = folder / str(done.results["benchmark"])
    target.mkdir(parents=True, exist_ok=True)
    predictions = target / "predictions.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _own_rows(done.matched.pairs))
    if not (predictions.exists() and predictions.samefile(done.file.path)):
        if predictions.exists() and predictions.read_text(encoding="utf-8") != text:
            raise UserError(
                f"--output {str(folder)!r} holds other predictions of {target.name}. Choose another folder, or remove {predictions}."
            )
        write_text(predictions, text)
    write_scores(target / "scores.jsonl", done.rows)
    write_json(target / "results.json", done.results)
    return target


def _own_rows(pairs: Iterable[tuple[Sample, Prediction]]) -> Iterable[dict[str, Any]]:
    for sample, said in pairs:
        yield {
            "id": sample.id, "draw": said.draw, "benchmark": sample.benchmark, "split": sample.split,
            "response": said.response, "finish": said.finish, "tokens": said.tokens,
        }  # fmt: skip


def _about(file: ForeignFile) -> dict[str, Any]:
    """What is said beside our own predictions of how they were made: results.json of an evaluation, else config.yaml of a training run."""
    if file.format.name != "vlm-dft":
        return {}
    folder = file.path.absolute().parent
    beside = folder / "results.json"
    configs = [path for path in (folder / "config.yaml", folder.parent / "config.yaml") if path.is_file()]
    try:
        if beside.is_file():
            found = json.loads(beside.read_text(encoding="utf-8"))
        elif configs:
            config = yaml.safe_load(configs[0].read_text(encoding="utf-8"))
            evaluation = config.get("evaluation") or {}
            found = {"model": folder.name, "data": config.get("data"), "limit": evaluation.get("eval_limit")}
        else:
            return {}
        return {key: found[key] for key in ABOUT if found.get(key) is not None}
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(
            f"What is beside {file.path} cannot be read ({error}). Remove it, and give --data where the benchmark needs it."
        ) from error


def _samples(
    file: ForeignFile,
    card: Mapping[str, Any],
    benchmark: str,
    data: str | None,
    protocol: str | None,
    limit: int | None,
) -> tuple[list[Sample], str, list[str]]:
    """The samples, in words where they are from, and what is to be said of them."""
    if data is None and file.format.name not in OWN:
        made = samples_in(file.predictions, card, where=str(file.path))
        whole = sum(card["splits"][split].get("rows") or 0 for split in card["chosen"])
        few = (
            [f"the whole set has {whole:,} samples: this score is not comparable with published ones"]
            if len(made) < whole
            else []
        )
        return made, "the file's own rows (no --data)", few
    splits = load_benchmark(benchmark, data, limit=limit, **({} if protocol is None else {"protocol": protocol}))
    listed = [sample for split in splits.values() for sample in split]
    held = {str(p.row["split"]) for p in file.predictions} if file.format.name == "vlm-dft" else set()
    if held and held < set(splits):  # a run of some splits
        listed = [sample for sample in listed if sample.split in held]
    where = str(data) if data else "the card's own source"
    return listed, where + (f", the first {limit:,} of each split" if limit else ""), splits.remarks


def _model(file: ForeignFile) -> str:
    """The model that a file names: in its rows, or in its own name."""
    named = {str(p.row["model"]) for p in file.predictions if isinstance(p.row.get("model"), str)}
    return named.pop() if len(named) == 1 else file.path.stem


def _source(
    file: ForeignFile, matched: Matched, samples: Sequence[Sample], rows: Sequence[Mapping[str, Any]], whence: str
) -> dict[str, Any]:
    missing = {sample.id for sample in matched.missing}
    return {
        "file": str(file.path), "format": file.format.name, "samples_from": whence, "matched_by": matched.by,
        "responses": len(file.predictions), "scored": len(rows), "samples": len(samples),
        "missing": {"count": len(missing), "first": matched.missing[0].id if missing else None},
        "unknown": {"count": len(matched.unknown), "first": "/".join(matched.unknown[0].key) if matched.unknown else None},
        "unreadable": {"count": len(file.unreadable), "first": str(file.unreadable[0]) if file.unreadable else None},
        "oddities": file.oddities.as_dict(),
        "over_all_samples": _over_all(rows, len(samples)) if missing else None,
    }  # fmt: skip


def _over_all(rows: Sequence[Mapping[str, Any]], samples: int) -> dict[str, float]:
    """Accuracy with a missing response counted as wrong: each sample's share of right draws, over all samples."""
    draws: dict[str, list[tuple[bool, bool]]] = {}
    for row in rows:
        draws.setdefault(row["id"], []).append((row["correct"], row["robust"]["correct"]))
    most = max(map(len, draws.values()))
    official, robust = (sum(verdict[k] for found in draws.values() for verdict in found) for k in (0, 1))
    return {"accuracy": official / (samples * most), "robust": robust / (samples * most)}


def _stored(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"stored": ...} where the file stores official extractions or verdicts: how these compare with ours."""
    stored = [(row, row["stored"]) for row in rows if "stored" in row]
    if not stored:
        return {}
    told = [(row, s) for row, s in stored if s["verdict"] is not None]
    again = [(row, s) for row, s in stored if "correct" in s]
    found: dict[str, Any] = {
        "verdicts": len(told), "verdicts_right": sum(s["verdict"] for _, s in told),
        "official_differs": sum(row["correct"] != s["verdict"] for row, s in told),
    }  # fmt: skip
    if again:
        found |= {
            "extractions": len(again), "extractions_right": sum(s["correct"] for _, s in again),
            "extraction_differs": sum(s["correct"] != s["verdict"] for _, s in again if s["verdict"] is not None),
        }  # fmt: skip
    return {"stored": found}


def _lines(results: Mapping[str, Any]) -> list[str]:
    """What was read and how, a line each."""
    source, stored = results["source"], results.get("stored")
    lines = [
        f"{source['file']}: {source['responses']:,} responses, format of {source['format']}; samples: {source['samples']:,} from "
        f"{source['samples_from']}, matched by {source['matched_by']}"
    ]
    lines += source["remarks"]
    lines += [f"judge {results['judge']}"] if results["judge"] else []
    lines += [f"odd: {found['count']:,} {what} (first: {found['first']})" for what, found in source["oddities"].items()]
    for what, name in (("unreadable", "rows cannot be read"), ("unknown", "responses are of no sample, and not scored"),
                       ("missing", "samples have no response, or fewer than others")):  # fmt: skip
        if source[what]["count"]:
            lines.append(f"partial: {source[what]['count']:,} {name} (first: {source[what]['first']})")
    if (over := source["over_all_samples"]) is not None:
        lines.append(
            f"partial: the table is of the {source['scored']:,} responses that are there; over all {source['samples']:,} samples, a missing one "
            f"wrong: official {100 * over['accuracy']:.1f} %, robust {100 * over['robust']:.1f} %"
        )
    if stored and "extractions" in stored:
        lines.append(
            f"stored extractions, by the official rule: {stored['extractions_right']:,} of {stored['extractions']:,} right = "
            f"{100 * stored['extractions_right'] / stored['extractions']:.1f} %; {stored['extraction_differs']:,} verdicts differ from the file's"
        )
    if stored and stored["verdicts"]:
        lines.append(
            f"stored verdicts: {stored['verdicts_right']:,} of {stored['verdicts']:,} right = "
            f"{100 * stored['verdicts_right'] / stored['verdicts']:.1f} %; ours from the responses differs in {stored['official_differs']:,}"
        )
    return lines
