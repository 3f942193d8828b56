"""Workers: a function and numbered rows in; what it makes of each, worked out in several processes, out in the rows' order."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from vlm_dft.errors import UserError

Work = Callable[[int, Any], Any]
Chunk = list[tuple[int, Any]]
ROWS = 32  # of a chunk at most: what a worker gets at once
BYTES = (
    4 * 2**20
)  # of a chunk's rows, and of what is made of them, that a chunk aims at: fewer rows where these are large
FIRST = 4  # rows of the first chunks, when nothing is known of their size
WAITING = 2  # chunks that a worker has: one in work, one to go on with
AHEAD = (
    3  # chunks a worker, made and not asked for yet: memory is bounded by AHEAD * workers * BYTES and the largest row
)
NOTHING = -1  # the place of a worker that waits


@dataclass(slots=True)
class _Worker:
    process: Any
    pipe: Connection
    at: Any  # shared: the place that it works at
    chunks: deque[tuple[int, Chunk]] = field(default_factory=deque)  # (number, rows) that it has


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(work: Work, numbered: Iterator[tuple[int, Any]], workers: int, *, what: str) -> Generator[Any]:
    """work(place, row) of every (place, row), in order, made by so many processes. Raises what `work` raises.

    Processes are forked, as data loaders' are, where the system can: they start at once and share the collator. That is safe
    here because a worker takes no lock that a thread of this process could hold: it parses, tokenises and reads files on
    one thread (torch's own is set so), and Arrow, networks and the terminal stay in this process. A worker that is
    killed raises UserError with the place and id of its row; an interrupt, or leaving the iterator, ends all of them.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool: list[_Worker] = []
    try:
        for _ in range(workers):
            pool.append(_start(context, work))
        yield from _results(pool, numbered, what)
    finally:
        for worker in pool:
            worker.process.terminate()
            worker.pipe.close()
        for worker in pool:
            worker.process.join()


def _start(context: Any, work: Work) -> _Worker:
    ours, theirs = context.Pipe()
    at = context.RawValue(ctypes.c_longlong, NOTHING)
    process = context.Process(target=_serve, args=(work, theirs, ours, at), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, at)


def _results(pool: list[_Worker], numbered: Iterator[tuple[int, Any]], what: str) -> Iterator[Any]:
    ready: dict[int, list[Any]] = {}  # number of a chunk -> what was made of its rows
    given = shown = 0
    size, more = FIRST, True
    while more or shown < given:
        while more and given - shown < AHEAD * len(pool):
            worker = min(pool, key=lambda one: len(one.chunks))
            if len(worker.chunks) == WAITING:
                break
            chunk = _chunk(numbered, size)
            more = bool(chunk)
            if more:
                worker.chunks.append((given, chunk))
                given += 1
                with suppress(BrokenPipeError):  # it is dead: found out below
                    worker.pipe.send_bytes(pickle.dumps(chunk, protocol=5))
        if shown in ready:
            yield from ready.pop(shown)
            shown += 1
            continue
        if shown == given:
            continue
        for worker in _speaking(pool):
            try:
                raw = worker.pipe.recv_bytes()
            except (EOFError, OSError):
                raise _death(worker, what) from None
            number, chunk = worker.chunks.popleft()
            failed, made = pickle.loads(raw)
            if failed:
                raise made
            ready[number] = made
            size = max(1, min(ROWS, BYTES * len(chunk) // max(1, len(raw))))


def _speaking(pool: list[_Worker]) -> list[_Worker]:
    """The workers that have something to say, or are dead; waits for one."""
    found = set(map(id, wait([worker.pipe for worker in pool if worker.chunks])))
    return [worker for worker in pool if id(worker.pipe) in found]


def _chunk(numbered: Iterator[tuple[int, Any]], rows: int) -> Chunk:
    """The next rows, so many at most, and fewer where they hold much."""
    chunk: Chunk = []
    room = BYTES
    for place, row in numbered:
        chunk.append((place, row))
        room -= _bytes_in(row)
        if len(chunk) >= rows or room <= 0:
            break
    return chunk


def _bytes_in(value: Any, depth: int = 3) -> int:
    """Bytes of the texts and embedded files that a row holds, near enough."""
    if isinstance(value, (bytes, str)):
        return len(value)
    if depth and isinstance(value, dict):
        return sum(_bytes_in(part, depth - 1) for part in value.values())
    if depth and isinstance(value, (list, tuple)):
        return sum(_bytes_in(part, depth - 1) for part in value)
    return 0


def _death(worker: _Worker, what: str) -> UserError:
    worker.process.join(5)
    code, place = worker.process.exitcode, int(worker.at.value)
    how = f"ended with status {code}"
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    hint = " The kernel does that where memory runs out: use fewer workers, or look at this row." if code == -9 else ""
    chunk = worker.chunks[0][1] if worker.chunks else []
    where = f"rows {chunk[0][0]} to {chunk[-1][0]}" if chunk else "no row"
    if place != NOTHING:
        row = next((row for at, row in chunk if at == place), None)
        name = row.get("id") if isinstance(row, dict) else getattr(row, "id", None)
        where = f"row {place}" + ("" if name is None else f" (id {name!r})") + f", one of {where}"
    return UserError(f"A worker process on {what} {how} while it was at {where}.{hint}")


def _serve(work: Work, pipe: Connection, parents: Connection, at: Any) -> None:
    """A worker's life: chunks in, what is made of them out, until the pipe is closed. A thread reads ahead, so that the
    process that gives chunks never waits for one that is giving results."""
    parents.close()  # else it would never see the other process end
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # said here, tokenizers need not warn that they were forked
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
    chunks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, chunks), daemon=True).start()
    while (raw := chunks.get()) is not None:
        made: list[Any] = []
        try:
            for at.value, row in pickle.loads(raw):
                made.append(work(at.value, row))
            said = pickle.dumps((False, made), protocol=5)
        except Exception as error:  # noqa: BLE001  told to the other process, which raises it
            said = _told(error)
        at.value = NOTHING
        try:
            pipe.send_bytes(said)
        except OSError:
            return


def _receive(pipe: Connection, chunks: queue.SimpleQueue[bytes | None]) -> None:
    with suppress(EOFError, OSError):
        while True:
            chunks.put(pipe.recv_bytes())
    chunks.put(None)


def _told(error: Exception) -> bytes:
    """An error as it crosses to the other process, with the lines that it came by."""
    lines = "".join(traceback.format_exception(error))
    error.add_note(f"in a worker process:\n{lines}")
    try:
        told = pickle.dumps((True, error), protocol=5)
        pickle.loads(told)
    except Exception:  # noqa: BLE001  an error of any class, which may not come through
        told = pickle.dumps((True, RuntimeError(f"in a worker process:\n{lines}")), protocol=5)
    return told
