"""Prediction file: settings, and responses as they come, in; a predictions.jsonl that no kill can harm, in its final order, out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from vlm_dft.chat import Sample
from vlm_dft.errors import ConfigError
from vlm_dft.predictions import read_jsonl
from vlm_dft.runs import write_json, write_text

Row = dict[str, Any]
Key = tuple[str, int]  # (id, draw)
HOW = "how"  # of the settings' file: what may change without another response being expected


@dataclass(frozen=True, slots=True)
class Share:
    """This process's place among those that answer together; alone unless said."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], Any] = field(default=lambda: None)  # until all processes are here
    total: Callable[[int], int] = field(default=lambda count: count)  # over all processes


ALONE = Share()


def longest(samples: Sequence[Sample]) -> int:
    """The most tokens of a response that the samples' cards allow."""
    return max(int(sample.record["max_new_tokens"]) for sample in samples)


def row_of(sample: Sample, draw: int, answer: Mapping[str, Any]) -> Row:
    """A row of predictions.jsonl."""
    return {"id": sample.id, "draw": draw, "benchmark": sample.benchmark, "split": sample.split, **answer}


def meta_of(path: Path) -> Path:
    """The file of settings beside a file of predictions."""
    return path.with_name(f"{path.stem}.meta.json")


def key_of(row: Mapping[str, Any]) -> Key:
    """What a row is the response to."""
    return str(row["id"]), int(row.get("draw", 0))


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming each difference, where `path` holds rows that were made with other settings.

    Settings that `settings` does not name are not compared, so that those known early can be checked early.
    """
    if not any(file.stat().st_size for file in (path, *_parts(path)) if file.is_file()):
        return
    meta = meta_of(path)
    if not meta.is_file():
        raise ConfigError(
            f"{path} has no {meta.name} beside it: not ours to continue. Remove it, or choose another folder."
        )
    before = json.loads(meta.read_text(encoding="utf-8"))
    changed = [key for key in settings if before.get(key) != settings[key]]
    if "samples" in changed:  # other samples have other fingerprints, which tell nothing more
        changed = [key for key in changed if key not in ("rows", "pictures", "prompts")]
    if changed:
        differences = "; ".join(f"{key}: {before.get(key)!r} there, {settings[key]!r} now" for key in changed)
        raise ConfigError(
            f"{path} was made with other settings ({differences}). Remove it to start over, or choose another folder."
        )


class PredictionFile:
    """Rows kept as they come, each on the disk before the next batch is asked for; a killed run goes on with what is missing.

    settings: what decides the responses; kept in predictions.meta.json beside `path`, and a change of it is refused.
    order: the keys of all rows, as the finished file has them. how: what is noted beside the settings and may change.
    share: with several processes each appends to a file of its own; the first joins them. Use it as a context.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], order: Sequence[Key], *, model: str = "",
        how: Mapping[str, Any] | None = None, share: Share = ALONE,
    ) -> None:  # fmt: skip
        check_settings(path, settings)
        share.wait()  # none may change a file that another still checks
        self.path, self.order, self.share = path, order, share
        self._meta = {"model": model, **settings}
        meta = meta_of(path)
        before: dict[str, Any] = json.loads(meta.read_text(encoding="utf-8")) if meta.is_file() else {}
        if share.rank == 0:
            self._join()
        share.wait()
        wanted = set(order)
        self.done = {key: row for row in _read_whole_rows(path) if (key := key_of(row)) in wanted}
        self.how = {**before.get(HOW, {}), **((how or {}) if self.missing else {})}
        if share.rank == 0:
            self._write_meta()
        own = path if share.world == 1 else path.with_name(f"{path.stem}.part-{share.rank}.jsonl")
        self._file = own.open("a", encoding="utf-8", errors="backslashreplace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, rows: Iterable[Row]) -> None:
        """Keep rows; when this returns they are on the disk."""
        new = [row for row in rows if key_of(row) not in self.done]
        self.done.update((key_of(row), row) for row in new)
        self._file.write("".join(map(_line, new)))
        self._file.flush()
        os.fsync(self._file.fileno())

    @property
    def missing(self) -> list[Key]:
        """What has no row yet, in order."""
        return [key for key in self.order if key not in self.done]

    def finish(self) -> list[Row]:
        """Join what all processes have, and write the file in its order. Returns the rows; others than the first process, none."""
        self._file.close()
        self.share.wait()
        if self.share.rank:
            self.share.wait()
            return []
        self._join()
        found = {key_of(row): row for row in _read_whole_rows(self.path)}
        rows = [found[key] for key in self.order if key in found]
        write_text(self.path, "".join(map(_line, rows)), sync=True)
        self._write_meta()
        self.share.wait()
        return rows

    def _join(self) -> None:
        """Put the rows of the processes' own files into the one file; a kill in between loses nothing and doubles nothing."""
        parts = _parts(self.path)
        found = {key_of(row): row for file in (self.path, *parts) for row in _read_whole_rows(file)}
        if parts:
            write_text(self.path, "".join(map(_line, found.values())), sync=True)
        for part in parts:
            part.unlink()

    def _write_meta(self) -> None:
        write_json(meta_of(self.path), {**self._meta, HOW: self.how})


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.part-*.jsonl"))


def _read_whole_rows(path: Path) -> list[Row]:
    """The rows of an unfinished file; a last line that was cut off while being written is taken out of it."""
    if not path.is_file():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        write_text(path, whole.decode("utf-8"))
    return read_jsonl(path)


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
