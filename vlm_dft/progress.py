"""Progress: a Trainer's logs in, metrics.jsonl and a live view of the run out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vlm_dft.diagnostics import Alarm
from vlm_dft.runs import write_text


class Metrics(TrainerCallback):
    """One JSON object a logged step in metrics.jsonl, and a progress bar with the same numbers."""

    def __init__(self, path: Path, title: str, show: bool) -> None:
        self.path, self.title, self.show = path, title, show
        self.alarms: list[Alarm] = []  # the trainer's
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept = [row for row in read_metrics(self.path) if row["step"] <= state.global_step]  # of a run that is resumed
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        if self.show:
            from tqdm import tqdm

            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        with self.path.open("a", encoding="utf-8") as file:
            alarms = [alarm.as_dict() for alarm in self.alarms if alarm.step == state.global_step]
            file.write(json.dumps({"step": state.global_step, **logs, **({"alarms": alarms} if alarms else {})}) + "\n")
        if self.bar is not None:
            shown = {"loss": ".4f", "nll": ".4f", "mean_p": ".3f", "entropy": ".3f"}
            self.bar.set_postfix_str(
                " ".join(f"{k.replace('_', ' ')} {logs[k]:{f}}" for k, f in shown.items() if k in logs)
            )

    def say(self, alarm: Alarm) -> None:
        """Print an alarm above the bar."""
        if self.bar is not None:
            self.bar.write(f"      {alarm.message}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


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
