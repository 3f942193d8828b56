"""Live view: what is known of a running training in; one screen of it in the terminal, or plain lines in a log file, out."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

from vlm_dft.bars import can_draw
from vlm_dft.pace import clock_text
from vlm_dft.reporting import percent

MOST_OFTEN = 0.25  # seconds between two pictures, at least
SHARE = 0.005  # of the time, at most, goes into drawing
LINES = 40  # plain lines of a whole run, about, and one a minute
TOO_NARROW, WIDEST = 20, 120  # columns
BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class Known:
    """What the view shows. Numbers are those of metrics.jsonl."""

    title: str
    steps: int
    step: int = 0
    now: str = "starting"
    seconds: float = 0.0  # since the start of this session
    left: float | None = None
    step_seconds: float | None = None
    memory: str = ""
    logs: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, Any] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=lambda: {"loss": [], "nll": [], "mean_p": []})
    scores: Sequence[str] = ()  # of the last evaluation; and when that was, and the best one
    alarms: list[str] = field(default_factory=list)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """As many lines as the terminal has room for; what matters least goes first."""
        yield from draw(self, min(options.max_width, WIDEST), console.height)


def draw(known: Known, width: int, height: int = 24) -> list[Text]:
    """The view's lines, none wider than the terminal, and fewer than its height: a picture that scrolls cannot be redrawn."""
    if width < TOO_NARROW or height < 3:
        return [_fitted(Text(f"{known.step}/{known.steps}"), max(width, 1))]
    blocks = [
        (0, [_title(known, width), _bar(known, width)]),
        (2, _numbers(known, width)),
        (4, _histogram(known.logs, width)),
        (3, [_labelled(label, text, width) for label, text in zip(("accuracy", ""), known.scores, strict=False)]),
        (1, [_fitted(Text(f"! {text}", "bold red"), width) for text in known.alarms[-3:]]),
    ]
    room = height - 2  # above it a line between it and what was printed, below it the cursor
    kept: list[int] = []
    for k in sorted(range(len(blocks)), key=lambda k: blocks[k][0]):
        rank, lines = blocks[k]
        lines = lines[: max(0, room)] if rank <= 2 else lines if len(lines) <= room else []
        blocks[k] = rank, lines
        if lines:
            kept.append(k)
            room -= len(lines) + 1
    return [line for k in sorted(kept) for line in [Text(""), *blocks[k][1]]]


def _title(known: Known, width: int) -> Text:
    right = f"{known.now}  {clock_text(known.seconds)} gone, {clock_text(known.left)} left"
    room = width - len(right) - 2
    if room < min(12, len(known.title)):
        return _fitted(Text(f"{known.now}, {clock_text(known.left)} left", "bold"), width)
    left = _fitted(Text(known.title, "bold"), room)
    left.append(right.rjust(width - left.cell_len), "" if known.now == "training" else "yellow")
    return left


def _bar(known: Known, width: int) -> Text:
    share = known.step / max(1, known.steps)
    epoch = known.logs.get("epoch")
    said = f"  step {known.step:,}/{known.steps:,}  {share:.0%}" + (f"  epoch {epoch:.2f}" if epoch is not None else "")
    room = width - len(said)
    if room < 8:
        return _fitted(Text(said.strip()), width)
    done = min(room, int(share * room))
    return Text.assemble(("━" * done, "green"), ("─" * (room - done), "dim"), said)


def _numbers(known: Known, width: int) -> list[Text]:
    """Curves on the left, speed on the right; one below the other where there is no room beside."""
    logs, timing = known.logs, known.timing
    two = width >= 64
    rate = "response_tokens_per_second", "tokens_per_second"
    response, every = (f"{timing[key]:,.0f}" if key in timing else "–" for key in rate)
    right = [
        ("response tok/s", response), ("all tokens/s", every),
        ("seconds a step", "–" if known.step_seconds is None else f"{known.step_seconds:.3g}"),
        ("memory, peak", known.memory or "–"), ("", ""),
    ]  # fmt: skip
    column = 30 if two else 0
    left = []
    for label, key, form in (("loss", "loss", ".4f"), ("NLL", "nll", ".4f"), ("mean p", "mean_p", ".3f")):
        line = Text.assemble((f"{label:<10}", "dim"), (f"{_number(logs.get(key), form):<10}", "bold"))
        line.append(sparkline(known.curves[key], max(0, width - column - 23)), "cyan")
        left.append(line)
    for label, key in (("lr", "learning_rate"), ("grad norm", "grad_norm")):
        left.append(Text.assemble((f"{label:<10}", "dim"), _number(logs.get(key), ".3g")))
    if not two:
        return [_fitted(line, width) for line in [*left, *(_labelled(a, b, width, 16) for a, b in right if a)]]
    lines = []
    for line, (label, value) in zip(left, right, strict=True):
        line.pad_right(max(0, width - column - line.cell_len))
        line.append(f"{label:<16}", "dim")
        line.append(f"{value:>14}")
        lines.append(_fitted(line, width))
    return lines


def _histogram(logs: Mapping[str, Any], width: int, rows: int = 2) -> list[Text]:
    """Bars of the shares of p over the shares themselves and the lower edge of each bin."""
    bins = {key.split("/", 1)[1]: float(share) for key, share in logs.items() if key.startswith("p_histogram/")}
    each = min(6, (width - 2) // len(bins)) if bins else 0
    if each < 2:
        return []
    most = max(bins.values()) or 1.0
    eighths = [max(round(share / most * 8 * rows), int(share > 0)) for share in bins.values()]
    lines = [Text("p of the response tokens, and the share of them in each bin", "dim")]
    for row in reversed(range(rows)):
        bars = (BLOCKS[max(0, min(8, count - 8 * row))] * (each - 1) + " " for count in eighths)
        lines.append(Text("".join(bars).rstrip(), "cyan"))
    if each >= 5:
        edges = [name.split("-")[0].removeprefix("0") or "0" for name in bins]
        edges = [{".0001": "1e-4", ".001": "1e-3"}.get(edge, edge) for edge in edges]
        lines.append(Text("".join(f"{share:<{each}.0%}" for share in bins.values())))
        lines.append(Text("".join(f"{edge:<{each}}" for edge in edges) + "1", "dim"))
    return [_fitted(line, width) for line in lines]


def _labelled(label: str, value: str, width: int, column: int = 10) -> Text:
    return _fitted(Text.assemble((f"{label:<{column}}", "dim"), value), width)


def _fitted(text: Text, width: int) -> Text:
    text.no_wrap = True
    text.truncate(width, overflow="ellipsis")
    return text


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else "–"


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of some numbers in so many characters: means of equal pieces, from the lowest to the highest block."""
    values = [value for value in values if value == value and abs(value) != float("inf")]
    if width < 1 or not values:
        return ""
    pieces = min(width, len(values))
    bounds = [k * len(values) // pieces for k in range(pieces + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, span = min(means), max(means) - min(means)
    return "".join(BLOCKS[1 + (round(7 * (mean - low) / span) if span else 3)] for mean in means)


def plain_line(known: Known) -> str:
    """A logged step in one line: "step 10/256  loss 0.4100  nll ... p ...  120 response tok/s  ETA 3:20"."""
    logs = known.logs
    parts = [f"step {known.step}/{known.steps}"]
    for label, key, form in (("loss", "loss", ".4f"), ("nll", "nll", ".4f"), ("p", "mean_p", ".3f")):
        if key in logs:
            parts.append(f"{label} {logs[key]:{form}}")
    if "response_tokens_per_second" in known.timing:
        parts.append(f"{known.timing['response_tokens_per_second']:,.0f} response tok/s")
    return "  ".join([*parts, f"ETA {clock_text(known.left)}"])


class View:
    """Shows `known` while it is changed: a picture that is redrawn, with printed lines above it, or plain lines."""

    def __init__(self, known: Known, echo: Callable[[str], Any], stream: TextIO | None = None) -> None:
        stream = sys.stdout if stream is None else stream
        self.known, self.echo = known, echo
        self._live: Live | None = None
        if can_draw(stream):
            console = Console(file=stream, force_terminal=True, highlight=False)
            self._live = Live(known, console=console, auto_refresh=False)  # no thread: data loaders fork
        self._process = os.getpid()
        self._next_picture = self._last_line_at = 0.0
        self._next_line = 0

    @contextmanager
    def shown(self) -> Iterator[View]:
        """Draw from here on; the terminal is left as it was found, whatever happens."""
        if self._live is None:
            yield self
            return
        _detach_in_children(self)
        with _handlers_follow():
            self._live.start()
            _point_handlers_at_the_view()
            try:
                yield self
            finally:
                self._live.stop()

    def refresh(self, *, at_once: bool = False) -> None:
        """Draw, if the last picture is old enough for drawing to cost next to nothing."""
        started = time.monotonic()
        if self._live is None or os.getpid() != self._process or not (at_once or started >= self._next_picture):
            return
        self._live.refresh()
        ended = time.monotonic()
        self._next_picture = ended + max(MOST_OFTEN, (ended - started) / SHARE)

    def logged(self) -> None:
        """New numbers are known."""
        self.refresh()
        now, known = time.monotonic(), self.known
        due = known.step >= self._next_line or now - self._last_line_at >= 60 or known.step == known.steps
        if self._live is None and due:
            self.echo(f"      {plain_line(known)}")
            self._next_line = known.step + max(1, known.steps // LINES)
            self._last_line_at = now

    def say(self, text: str) -> None:
        """A line of its own, above the picture."""
        self.echo(f"      {text}")

    def scored(self, step: int, splits: Mapping[str, Mapping[str, Any]], best: str) -> None:
        """An evaluation has ended: {split: metrics}, the first one with its standard error."""
        (first, row), *others = splits.items()
        said = ", ".join(
            [
                f"{first} {percent(row['accuracy'], row['stderr'])} %",
                *(f"{k} {percent(r['accuracy'])}" for k, r in others),
            ]
        )
        when = f"step {step}, {row['count']} samples of each; {best}".removesuffix("; ")
        self.known.scores = said, when
        if self._live is None:
            self.echo(f"      accuracy {said} ({when})")
        self.refresh(at_once=True)

    def _detach(self) -> None:
        """In a forked process: print as if there were no picture."""
        if self._live is not None and self._live.is_started:
            self._live._disable_redirect_io()
            self._live.console.clear_live()
            self._live = None


def _detach_in_children(view: View) -> None:
    found = weakref.ref(view)

    def detach() -> None:
        if (alive := found()) is not None:
            alive._detach()

    os.register_at_fork(after_in_child=detach)


def _stream_handlers() -> list[logging.StreamHandler[Any]]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    found = [h for logger in loggers if isinstance(logger, logging.Logger) for h in logger.handlers]
    return [h for h in dict.fromkeys(found) if type(h) is logging.StreamHandler]


def _point_handlers_at_the_view() -> None:
    """Loggers keep the stderr they began with, and would write through the picture."""
    for handler in _stream_handlers():
        for now in (sys.stdout, sys.stderr):
            if handler.stream is getattr(now, "rich_proxied_file", None):
                handler.setStream(now)


@contextmanager
def _handlers_follow() -> Iterator[None]:
    """Put the loggers' streams back afterwards."""
    before = [(handler, handler.stream) for handler in _stream_handlers()]
    try:
        yield
    finally:
        for handler, stream in before:
            handler.setStream(stream)
