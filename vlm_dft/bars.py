"""Bars: how many things there are to do in; a progress bar on a terminal, or a plain line now and then in a log file, out."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

SECONDS = 30  # between two plain lines


def can_draw(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a stream is a terminal that takes pictures, and nobody asked for plain text (NO_COLOR, CI, TERM=dumb)."""
    plain = environment.get("NO_COLOR") or environment.get("CI") or environment.get("TERM", "dumb") == "dumb"
    utf = (getattr(stream, "encoding", None) or "").lower().replace("-", "").startswith("utf")
    return bool(utf and not plain and stream.isatty())


class Bar:
    """Counts to `total` (None: nobody knows how many) on stderr. Shown only on the first process, and not at all without a title."""

    def __init__(self, total: int | None, title: str | None, unit: str = "sample") -> None:
        self.total, self.title, self.unit, self.done = total, title, unit, 0
        self._shown = title is not None and os.environ.get("RANK", "0") == "0"
        self._bar = None
        if self._shown and can_draw(sys.stderr):
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=f"      {title}", unit=unit, leave=True)
        self._said = self._began = time.monotonic()

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._shown and (self._at_end() or time.monotonic() - self._said >= SECONDS):
            self._said = time.monotonic()
            took, of = f", {self._said - self._began:.0f} s", "" if self.total is None else f"/{self.total:,}"
            sys.stderr.write(f"      {self.title}: {self.done:,}{of} {self.unit}s{took}\n")
            sys.stderr.flush()

    def _at_end(self) -> bool:
        return self.total is not None and self.done >= self.total

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
