"""Recipes: constructed sets of 1,000 to 100,000 rows in; rows a second and peak memory, ours against `datasets` alone, out.

    python benchmarks/recipes.py [--rows 1000,10000,100000] [--rounds 1] [--markdown benchmarks/recipes.md]

Rows have a question, an answer and one of 200 small pictures: by path in JSON lines, embedded in parquet. Every figure is of a process
of its own that does nothing else; its peak memory is that of the process and, where it has workers, of these together. The two of a
comparison run one after the other. Read by `datasets`: the same columns, pictures as bytes (decode=False), nothing parsed. About three
minutes with two cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PICTURES, BATCH, MEASURED = 200, 16, 2000
WORDS = {"description": "constructed", "licence": "Apache-2.0", "prompt": "{question}", "response": "{answer}"}


def card_of(kind: str, rows: int) -> dict[str, Any]:
    picture: dict[str, Any] = {"image": "{image}"} if kind == "jsonl" else {"images": "image"}
    return {**WORDS, "name": f"{kind}-{rows}", "source": {"files": [f"{rows}.{kind}"]}, **picture}


def build(folder: Path, sizes: Iterable[int]) -> None:
    """The files of all sizes: few distinct pictures, many rows."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image, ImageDraw

    (folder / "pictures").mkdir()
    generator, raws = np.random.default_rng(0), []
    for k in range(PICTURES):
        picture = Image.fromarray(generator.integers(0, 255, (28, 28, 3), dtype=np.uint8)).resize((56, 56), 0)
        ImageDraw.Draw(picture).text((20, 20), f"{k}", fill="white")
        picture.save(folder / f"pictures/{k}.png")
        raws.append({"bytes": (folder / f"pictures/{k}.png").read_bytes(), "path": f"{k}.png"})
    for rows in sizes:
        with (folder / f"{rows}.jsonl").open("w") as file:
            for k in range(rows):
                row = {"id": str(k), "image": f"pictures/{k % PICTURES}.png", **texts(k)}
                file.write(json.dumps(row) + "\n")
        writer = None
        for start in range(0, rows, 1000):
            part = range(start, min(start + 1000, rows))
            table = pa.table({"id": [str(k) for k in part], "image": [raws[k % PICTURES] for k in part],
                              **{name: [texts(k)[name] for k in part] for name in ("question", "answer")}})  # fmt: skip
            writer = writer or pq.ParquetWriter(folder / f"{rows}.parquet", table.schema)
            writer.write_table(table, row_group_size=100)
        assert writer is not None
        writer.close()


def texts(k: int) -> dict[str, str]:
    return {"question": f"What does the sign in picture {k} say, and how many pieces are there in it altogether?",
            "answer": f"The sign says {k % PICTURES}. " + "It has pieces, which we count one by one. " * (k % 9) + f"So {k}."}  # fmt: skip


def through(rows: Iterable[Any]) -> int:
    """Go through rows; returns their number, and fails for one that is not there."""
    count = 0
    for row in rows:
        assert row is not None
        count += 1
    return count


def stream_ours(folder: Path, rows: int, kind: str) -> Callable[[], int]:
    from vlm_dft.recipes import outcomes

    return lambda: through(o.example for o in outcomes(card_of(kind, rows), str(folder)))


def rows_ours(folder: Path, rows: int, kind: str) -> Callable[[], int]:
    from vlm_dft.rows import read_rows

    return lambda: through(read_rows(card_of(kind, rows)["source"], folder, where="rows"))


def stream_datasets(folder: Path, rows: int, kind: str) -> Callable[[], int]:
    import datasets

    def read() -> int:
        builder = {"jsonl": "json", "parquet": "parquet"}[kind]
        found = datasets.load_dataset(builder, data_files=str(folder / f"{rows}.{kind}"), split="train", streaming=True)
        return through(found)

    return read


def measure_ours(folder: Path, rows: int, workers: int) -> Callable[[], int]:
    from vlm_dft.collators import ChatCollator
    from vlm_dft.examining import examine
    from vlm_dft.models import load_processor

    collator = ChatCollator(load_processor("tiny"))
    return lambda: through(
        e.measured
        for e in examine(card_of("jsonl", rows), str(folder), collator=collator, workers=workers, limit=MEASURED)
    )


def prepare_ours(folder: Path, rows: int, workers: int) -> Callable[[], int]:
    from vlm_dft.preparing import prepare

    output = folder / f"prepared-{rows}" if not workers else folder / f"prepared-{rows}-{workers}"
    return lambda: int(prepare(card_of("jsonl", rows), str(folder), output, workers=workers)["rows"])


def read_ours(folder: Path, rows: int, order: str) -> Callable[[], int]:
    import numpy  # noqa: F401  what opening would import, as datasets does when it is imported
    import pyarrow.parquet  # noqa: F401

    import vlm_dft.recipes  # noqa: F401
    from vlm_dft.prepared import open_prepared

    def read() -> int:
        found = open_prepared(folder / f"prepared-{rows}")
        return through(found if order == "in order" else batches(found.__getitems__, len(found)))

    return read


def read_datasets(folder: Path, rows: int, order: str) -> Callable[[], int]:
    import datasets

    def read() -> int:
        found = datasets.load_from_disk(str(folder / f"disk-{rows}"))
        return through(found if order == "in order" else batches(found.__getitems__, len(found)))

    return read


def batches(fetch: Callable[[list[int]], list[Any]], count: int) -> Iterable[Any]:
    """Rows as a data loader draws them: shuffled, so many at a time."""
    order = list(range(count))
    random.Random(0).shuffle(order)
    for k in range(0, count, BATCH):
        yield from fetch(order[k : k + BATCH])


def to_disk(folder: Path, rows: int) -> Callable[[], int]:
    """The prepared rows as `datasets` keeps them: an Arrow folder of the same columns."""
    import datasets

    def write() -> int:
        found = datasets.load_dataset("parquet", data_files=str(folder / f"prepared-{rows}/shard-*.parquet"), split="train",
                                      cache_dir=str(folder / "cache"))  # fmt: skip
        found.cast_column("images", datasets.List(datasets.Image(decode=False))).save_to_disk(
            str(folder / f"disk-{rows}")
        )
        return len(found)

    return write


def first_batch(folder: Path, rows: int) -> Callable[[], int]:
    from vlm_dft.collators import ChatCollator
    from vlm_dft.models import load_processor
    from vlm_dft.prepared import open_prepared

    def batch() -> int:
        found = open_prepared(folder / f"prepared-{rows}")
        collator = ChatCollator(load_processor("tiny"))
        order = random.Random(0).sample(range(len(found)), BATCH)
        return int(collator(found.__getitems__(order))["input_ids"].shape[0])

    return batch


JOBS: dict[str, Callable[..., Callable[[], int]]] = {
    function.__name__: function
    for function in (
        rows_ours,
        stream_ours,
        stream_datasets,
        measure_ours,
        prepare_ours,
        read_ours,
        read_datasets,
        to_disk,
        first_batch,
    )
}


def child(words: list[str]) -> None:
    """One job in this process: imports first, then the time and the peak."""
    name, folder, rows, *more = words
    began = time.monotonic()
    work = JOBS[name](Path(folder), int(rows), *(int(word) if word.isdigit() else word for word in more))
    imports, idle = time.monotonic() - began, resident()
    peaks, ended = [0.0], threading.Event()
    if name in ("measure_ours", "prepare_ours") and more[-1] != "0":
        threading.Thread(target=watch, args=(peaks, ended), daemon=True).start()
    began = time.monotonic()
    count = work()
    seconds = time.monotonic() - began
    ended.set()
    peak = max(highest(), *peaks)
    print(json.dumps({"rows": count, "seconds": seconds, "imports": imports, "idle": idle, "peak": peak}))


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def highest() -> float:
    """Peak MiB of this program. (getrusage would tell that of the process before it became this program, too.)"""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def watch(peaks: list[float], ended: threading.Event) -> None:
    """Peak MiB of this process and its workers: proportional shares, since a fork shares its pages."""
    import psutil

    while not ended.wait(2):
        total = 0
        for process in (psutil.Process(), *psutil.Process().children()):
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        peaks.append(total / 2**20)


def run(*words: Any) -> dict[str, float]:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, "--child", *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def middle(rounds: int, *words: Any) -> dict[str, float]:
    found = [run(*words) for _ in range(rounds)]
    return {key: statistics.median(one[key] for one in found) for key in found[0]}


def speed(found: dict[str, float]) -> float:
    return found["rows"] / found["seconds"]


def compare(rounds: int, title: str, ours: tuple[Any, ...], theirs: tuple[Any, ...], folder: Path, rows: int) -> str:
    pairs = [(run(ours[0], folder, rows, *ours[1:]), run(theirs[0], folder, rows, *theirs[1:])) for _ in range(rounds)]
    mine, other = (statistics.median(speed(pair[k]) for pair in pairs) for k in (0, 1))
    ratio = statistics.median(pair[0]["seconds"] / pair[1]["seconds"] for pair in pairs)
    peaks = [statistics.median(pair[k]["peak"] for pair in pairs) for k in (0, 1)]
    over = [statistics.median(pair[k]["peak"] - pair[k]["idle"] for pair in pairs) for k in (0, 1)]
    return (
        f"| {title} | {rows:,} | {mine:,.0f} | {other:,.0f} | {ratio:.2f} | {peaks[0]:,.0f} ({over[0]:+,.0f}) | "
        f"{peaks[1]:,.0f} ({over[1]:+,.0f}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1000,10000,100000")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child)
        return
    sizes, rounds, began = [int(size) for size in asked.rows.split(",")], asked.rounds, time.monotonic()
    lines = ["| read | rows | ours, rows/s | datasets, rows/s | our time / theirs | our peak MB (over imports) | theirs |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    more = ["| ours alone | rows | rows/s | peak MB (over imports) |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory(prefix="recipes-") as name:
        folder = Path(name)
        build(folder, sizes)
        for rows in sizes:
            for kind, title in (
                ("jsonl", "JSON lines, pictures by path, streamed"),
                ("parquet", "parquet, pictures embedded, streamed"),
            ):
                for function, what in (("rows_ours", f"{title}, rows alone"), ("stream_ours", f"{title}, as Examples")):
                    lines.append(compare(rounds, what, (function, kind), ("stream_datasets", kind), folder, rows))
            made = run("prepare_ours", folder, rows, 0)
            more.append(row_of("prepare", rows, made))
            run("to_disk", folder, rows)
            for order in ("in order", "shuffled"):
                lines.append(
                    compare(rounds, f"prepared, {order}", ("read_ours", order), ("read_datasets", order), folder, rows)
                )
        for workers in (0, 2):
            found = middle(rounds, "measure_ours", folder, sizes[-1], workers)
            more.append(row_of(f"streamed and measured, {workers} workers", int(found["rows"]), found))
        made = run("prepare_ours", folder, sizes[-1], 2)
        more.append(row_of("prepare, 2 workers", sizes[-1], made))
        first = middle(max(3, rounds), "first_batch", folder, sizes[-1])
    versions = ", ".join(
        f"{package} {importlib.metadata.version(package)}" for package in ("datasets", "pyarrow", "torch")
    )
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    text = "\n".join([
        "# Recipes: rows a second and memory", "", *lines, "", *more, "",
        f"First batch of {BATCH} from the prepared {sizes[-1]:,} rows, in a fresh process: {first['seconds']:.2f} s from opening to tensors, "
        f"the tiny processor loaded within (imports before it: {first['imports']:.1f} s).", "",
        f"`python benchmarks/recipes.py --rounds {rounds}`, {os.cpu_count()} cores, {versions}, commit {commit.stdout.strip()}; "
        f"{time.monotonic() - began:.0f} s. `datasets` gives rows as they are, and so do our rows alone; Examples are checked, their messages "
        "parsed, and pictures by path looked for (the file is there, and inside the data folder), which `datasets` does not.",
    ]) + "\n"  # fmt: skip
    print(text)
    if asked.markdown:
        asked.markdown.write_text(text, encoding="utf-8")


def row_of(title: str, rows: int, found: dict[str, float]) -> str:
    return (
        f"| {title} | {rows:,} | {speed(found):,.0f} | {found['peak']:,.0f} ({found['peak'] - found['idle']:+,.0f}) |"
    )


if __name__ == "__main__":
    main()
