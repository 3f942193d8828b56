"""Pace: when steps and pauses begin and end in; seconds a step, tokens per second, memory and the time that is left out."""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch

RECENT = 64  # steps that the time left is told from
CUT = 0.1  # of them at each end: a step that waited for a disk is no forecast


class Pace:
    """A stopwatch of training alone: saving and evaluating are pauses, which are timed apart."""

    def __init__(self, every: Mapping[str, int] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """every: steps between pauses of a kind ("saving", "evaluating"), to foretell those that are still to come."""
        self.every, self.clock = dict(every or {}), clock
        self.begin(0, 0)

    def begin(self, step: int, steps: int) -> None:
        """Start at a step: 0, or where a run goes on."""
        self.step, self.steps, self.started = step, steps, self.clock()
        self._trained, self._running_since = 0.0, self.started
        self._pause: str | None = None
        self._last_step = self._last_log = 0.0  # of the seconds trained
        self._first: float | None = None
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._pauses: dict[str, tuple[int, float]] = {}

    def trained(self) -> float:
        """Seconds of training since the start, without the pauses."""
        return self._trained + (0.0 if self._pause else self.clock() - self._running_since)

    def stepped(self, step: int) -> None:
        """A step has ended. The first one of a session is slow (kernels, buffers, workers) and counts only while it is the only one."""
        now = self.trained()
        seconds, self._last_step = now - self._last_step, now
        if self._first is None:
            self._first = seconds
        else:
            self._recent.append(seconds)
        self.step = step

    def now(self, what: str) -> None:
        """What the run does from now on: "training", or a pause of some kind."""
        if what == (self._pause or "training"):
            return
        at = self.clock()
        if self._pause is None:
            self._trained += at - self._running_since
        else:
            count, seconds = self._pauses.get(self._pause, (0, 0.0))
            self._pauses[self._pause] = count + 1, seconds + at - self._running_since
        self._pause, self._running_since = (None if what == "training" else what), at

    def since_log(self) -> float:
        """Seconds of training since the last call."""
        now = self.trained()
        seconds, self._last_log = now - self._last_log, now
        return seconds

    def seconds_per_step(self) -> float | None:
        """The mean of the last steps, without the shortest and the longest tenth; None before the first."""
        if not self._recent:
            return self._first
        cut = int(len(self._recent) * CUT)
        kept = sorted(self._recent)[cut : len(self._recent) - cut]
        return sum(kept) / len(kept)

    def left(self) -> float | None:
        """Seconds that are left: steps, and the pauses that are still to come, as long as those before; None: not known yet."""
        each = self.seconds_per_step()
        if each is None:
            return None
        left = (self.steps - self.step) * each
        for kind, (count, seconds) in self._pauses.items():
            if every := self.every.get(kind):
                left += (self.steps // every - self.step // every) * seconds / count
        return left


def timing(pace: Pace, logs: Mapping[str, Any]) -> dict[str, Any]:
    """What a logged step's speed was: numbers that no second run repeats, for `timing` of metrics.jsonl."""
    seconds = pace.since_log()
    found: dict[str, Any] = {"seconds": round(seconds, 4)}
    for name, count in (("response_tokens_per_second", "response_tokens"), ("tokens_per_second", "input_tokens")):
        if count in logs and seconds > 0:
            found[name] = round(logs[count] / seconds, 1)
    return {**found, "memory_gib": round(peak_memory()[0], 3), "at": round(time.time(), 1)}


def peak_memory() -> tuple[float, str]:
    """Most GiB that this process has held, and of what: a GPU's memory where there is one, else the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30, "GPU"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "RAM"


def clock_text(seconds: float | None) -> str:
    """ "3:20", "1:03:20", "2 d 03:20" (hours and minutes), or "?" for None."""
    if seconds is None:
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02d}:{m:02d}"
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
