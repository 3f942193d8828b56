"""Run folders to compare: words of a command line in; labelled runs with the folders of their benchmarks out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm_dft.cards import nearest
from vlm_dft.errors import RowError, UserError, printable

BASE = "base"
SCORES = "scores.jsonl"
MAY_DIFFER = {"seed", "output", "processes", "micro_batch", "data"}  # in configs of seeds of one training run


@dataclass(frozen=True)
class Run:
    """One model's scores: a seed of a label."""

    folder: Path
    benchmarks: Mapping[str, Path]
    "Benchmark to the folder of its scores.jsonl."
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    "Benchmark to what results.json and predictions.meta.json say: model, protocol, engine, decoding, limit, data ..."

    def said(self, key: str) -> Any:
        """What its benchmarks say of `key`, the first that does."""
        return next((found[key] for found in self.settings.values() if found.get(key) is not None), None)


@dataclass(frozen=True)
class _Found:
    label: str
    run: Run
    given: bool  # the label, by the user
    family: str | None = None  # of a training run: what its seeds share


def read_runs(words: Sequence[str]) -> dict[str, list[Run]]:
    """{label: [run, ...]} of words, each a folder or label=folder. Raises UserError for a folder without scores.

    A folder is an OUTPUT of `evaluate` (a folder a benchmark), the folder of one benchmark, an objective's folder, or an
    OUTPUT of `train`, which stands for its base model and every objective. The same label again is another seed of it;
    so are the models of training runs that differ in their seed alone. Other folders of the same name are told apart by
    the folders above them.
    """
    found = [replace(one, label=printable(one.label)) for word in words for one in _expand(*_split(word))]
    labels: dict[str, list[_Found]] = {}
    for one in found:
        labels.setdefault(one.label, []).append(one)
    runs: dict[str, list[Run]] = {}
    for one in found:
        others = labels[one.label]
        label = one.label if _belong(others) or one.given else _longer(one, others)
        runs.setdefault(label, []).append(one.run)
    for label, seeds in runs.items():
        twice = {run.folder.resolve() for run in seeds}
        if len(twice) < len(seeds):
            raise UserError(f"{label}: a folder is named twice ({seeds[0].folder}). Name each seed's own folder.")
    return runs


def read_scores(folder: Path, benchmark: str) -> list[dict[str, Any]]:
    """A benchmark's rows of scores.jsonl. Raises RowError for a row that is not one, or stands there twice."""
    from vlm_dft.predictions import read_jsonl

    path = folder / SCORES
    rows, seen = read_jsonl(path), set[tuple[str, int]]()
    if not rows:
        raise RowError(f"{path} is empty. Score the predictions again.")
    for number, row in enumerate(rows, 1):
        if odd := _odd(row):
            raise RowError(f"{path}, row {number}: {odd}. Expected the rows that `vlm-dft evaluate` or `score` writes.")
        key = str(row["id"]), int(row.get("draw") or 0)
        if key in seen:
            raise RowError(f"{path}, row {number}: sample {key[0]!r}, draw {key[1]} is there twice.")
        seen.add(key)
    others = {str(row["benchmark"]) for row in rows if row.get("benchmark", benchmark) != benchmark}
    if others:
        raise RowError(f"{path} has rows of {', '.join(sorted(others))} beside those of {benchmark}.")
    return rows


def _odd(row: Mapping[str, Any]) -> str | None:
    """What of a row is not as scores.jsonl has it, in words."""
    missing = next((key for key in ("id", "split", "correct") if key not in row), None)
    if missing:
        return f"no {missing!r}"
    groups, robust = row.get("groups") or {}, row.get("robust") or {"correct": True}
    if not isinstance(groups, dict) or not all(isinstance(value, (str, list)) for value in groups.values()):
        return f"groups {groups!r}"
    if not isinstance(row.get("draw") or 0, int):
        return f"draw {row['draw']!r}"
    verdicts = row["correct"], robust.get("correct") if isinstance(robust, dict) else robust
    return next(
        (f"verdict {verdict!r}, neither true nor false" for verdict in verdicts if not isinstance(verdict, bool)), None
    )


def _split(word: str) -> tuple[str | None, Path]:
    """(label or None, folder) of folder, or label=folder; a folder's own name may hold a =."""
    label, equals, path = word.partition("=")
    if Path(word).exists() or not equals:
        label, path = "", word
    elif not label.strip():
        raise UserError(f"{word!r}: expected label=folder, found no label before the =.")
    folder = Path(path)
    if not folder.is_dir():
        there = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        what = "is a file" if folder.is_file() else "does not exist"
        raise UserError(
            f"{path!r} {what}. Expected a folder that `vlm-dft evaluate` or `vlm-dft train` wrote.{nearest(folder.name, there)}"
        )
    return label.strip() or None, folder


def _expand(label: str | None, folder: Path) -> list[_Found]:
    inside = sorted(path.parent for path in folder.glob(f"*/{SCORES}"))
    trained = (folder / "config.yaml").is_file() and (folder / BASE / SCORES).is_file()
    if trained:
        return _training(label, folder, inside)
    if (folder / SCORES).is_file():
        return [_Found(label or folder.resolve().name, _run(folder, [folder]), label is not None)]
    if inside:
        return [_Found(label or folder.resolve().name, _run(folder, inside), label is not None)]
    unscored = next(iter([*folder.glob("predictions.jsonl"), *folder.glob("*/predictions.jsonl")]), None)
    raise UserError(
        f"{str(folder)!r} has no {SCORES}, nor has a folder in it. "
        + (f"Score it first: vlm-dft score {unscored} --benchmark NAME" if unscored else "Expected an OUTPUT of `vlm-dft evaluate` or `train`.")
    )  # fmt: skip


def _training(label: str | None, folder: Path, inside: Sequence[Path]) -> list[_Found]:
    """The base model and the objectives of an OUTPUT of train; a label of one's own is of its one objective."""
    import yaml

    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise UserError(
            f"{folder / 'config.yaml'} is no mapping of settings. Restore it, or name the folders in {folder} one by one."
        )
    family = json.dumps({k: v for k, v in sorted(config.items()) if k not in MAY_DIFFER}, default=str)
    objectives = config.get("objective") or []
    if (folder / SCORES).is_file():  # one objective, in the run folder itself
        places = {str(objectives[0] if isinstance(objectives, list) and objectives else folder.name): folder}
    else:
        places = {path.name: path for path in inside if path.name != BASE}
    if label is not None:
        if len(places) != 1:
            raise UserError(
                f"{label}={folder}: several models ({', '.join(places)}). Name one's folder, as {label}={folder / next(iter(places), 'dft')}."
            )
        return [_Found(label, _run(path, [path]), True) for path in places.values()]
    places = {BASE: folder / BASE, **places}
    return [_Found(name, _run(path, [path]), False, family) for name, path in places.items()]


def _belong(others: Sequence[_Found]) -> bool:
    """Whether folders of one label are seeds of it."""
    given = {one.given for one in others}
    family = {one.family for one in others}
    return len(others) == 1 or given == {True} or (given == {False} and len(family) == 1 and None not in family)


def _longer(one: _Found, others: Sequence[_Found]) -> str:
    """A label with as much of the path above as tells it from the others of the same name."""

    def tail(found: _Found, length: int) -> str:
        parts = found.run.folder.resolve().parts
        name = "/".join(parts[-length:])
        return name if parts[-1] == found.label else f"{name}:{found.label}"

    apart = [other for other in others if other is not one and other.run.folder.resolve() != one.run.folder.resolve()]
    depth = len(one.run.folder.resolve().parts)
    for length in range(2 if one.run.folder.resolve().name == one.label else 1, depth):
        if tail(one, length) not in {tail(other, length) for other in apart}:
            return tail(one, length)
    return tail(one, depth)


def _run(folder: Path, places: Sequence[Path]) -> Run:
    benchmarks: dict[str, Path] = {}
    settings: dict[str, Mapping[str, Any]] = {}
    for place in places:
        found = {**_object(place / "predictions.meta.json"), **_object(place / "results.json")}
        name = str(found.get("benchmark") or _first_benchmark(place / SCORES) or place.name)
        if name in benchmarks:
            raise UserError(f"{folder}: both {benchmarks[name].name} and {place.name} are of {name}. Name one of them.")
        benchmarks[name], settings[name] = place, found
    return Run(folder, benchmarks, settings)


def _first_benchmark(path: Path) -> str | None:
    with path.open(encoding="utf-8", errors="replace") as file:
        line = file.readline()
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row.get("benchmark") if isinstance(row, dict) else None


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}). Evaluate or score again.") from error
    return found if isinstance(found, dict) else {}
