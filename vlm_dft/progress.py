"""Progress: a Trainer's logs in; metrics.jsonl, the curves as pictures and a live view of the run out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vlm_dft.boards import Boards
from vlm_dft.diagnostics import Alarm
from vlm_dft.evaluations import ANSWERS
from vlm_dft.live import View
from vlm_dft.pace import Pace, peak_memory, timing
from vlm_dft.run_charts import write_charts
from vlm_dft.runs import write_text
from vlm_dft.watching import Watch

TIMING = "timing"  # of a row: what no second run repeats, to be left out of comparisons


class Metrics(TrainerCallback):
    """One JSON object a logged step in metrics.jsonl, loss.svg and p_histogram.svg, and the same numbers in a view.

    Speed and memory stand under `timing`; loggers get them as timing/..., and the checkpoint's own history does not.
    """

    def __init__(self, path: Path, pace: Pace, view: View | None) -> None:
        self.path, self.pace, self.view = path, pace, view
        self.alarms: list[Alarm] = []  # the trainer's
        self.boards = Boards([])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept = [row for row in read_metrics(self.path) if row["step"] <= state.global_step]  # of a run that is resumed
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.pace.begin(state.global_step, state.max_steps)
        if self.view is not None:
            self.view.known.step, self.view.known.steps = state.global_step, state.max_steps
            for row in kept:
                self._take_in(row)
            self.now("training")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.view is not None:
            self.view.refresh()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.pace.stepped(state.global_step)
        if self.view is not None:
            self.view.known.step = state.global_step
            self._refresh()

    def now(self, what: str, detail: str = "") -> None:
        """What the run does from now on: training, saving, evaluating."""
        self.pace.now(what)
        if self.view is not None:
            self.view.known.now = f"{what} {detail}".strip()
            self._refresh(at_once=what != "training")

    def _refresh(self, *, at_once: bool = False) -> None:
        if self.view is not None:
            known, pace = self.view.known, self.pace
            known.seconds, known.left, known.step_seconds = (
                pace.clock() - pace.started,
                pace.left(),
                pace.seconds_per_step(),
            )
            held, where = peak_memory()
            known.memory = f"{held:.1f} GiB {where}"
            self.view.refresh(at_once=at_once)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        alarms = [alarm.as_dict() for alarm in self.alarms if alarm.step == state.global_step]
        measured = timing(self.pace, logs)
        row = {"step": state.global_step, **logs, **({"alarms": alarms} if alarms else {}), TIMING: measured}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.boards.histogram(state.global_step, logs)
        for alarm in alarms:
            self.boards.alarm(state.global_step, short(alarm), alarm["message"])
        logs.update({f"{TIMING}/{name}": value for name, value in measured.items() if name != "at"})
        if self.view is not None:
            self.view.known.step = state.global_step
            self._take_in(row)
            self._refresh()
            self.view.logged()

    def watches(self, watch: Watch) -> None:
        """Show a watch's progress and what it finds."""

        def scored(
            step: int, splits: Mapping[str, Mapping[str, Any]], best: str, rows: Sequence[Mapping[str, Any]]
        ) -> None:
            if self.view is not None:
                self.view.scored(step, splits, best)
            self.boards.answers(step, rows, watch.folder / ANSWERS)

        watch.on_scored = scored
        watch.on_progress = lambda detail: self.now("evaluating", detail)

    def _take_in(self, row: dict[str, Any]) -> None:
        known = self.view.known if self.view is not None else None
        if known is None:
            return
        known.logs, known.timing = row, row.get(TIMING, {})
        for name, values in known.curves.items():
            if name in row:
                values.append(row[name])
        known.alarms += [short(alarm) for alarm in row.get("alarms", [])]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._draw(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._draw(state)
        self.now("done")

    def _draw(self, state: Any) -> None:
        if state.is_world_process_zero:
            write_charts(self.path.parent, read_metrics(self.path))

    def say(self, alarm: Alarm) -> None:
        """Print an alarm above the view."""
        if self.view is not None:
            self.view.say(alarm.message)


def short(alarm: dict[str, Any]) -> str:
    """An alarm in one line of the view."""
    what = "response tokens" if alarm["kind"] == "all" else f"{alarm['kind']} tokens"
    of = f" of {alarm['source']}" if alarm["source"] else ""
    return (
        f"{what}{of} starve since step {alarm['step']}: mean p {alarm['mean_p']:.3f}, pull {alarm['pull']:.1%} of SFT's"
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a half-written last line (a killed run) is left out."""
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    lines = path.read_text(encoding="utf-8").splitlines()
    for k, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if k != len(lines) - 1:
                raise
    return rows
