"""Boards: names of loggers in, a complaint about one that is not installed out; and what their callbacks of transformers leave out:
histograms, alarms as texts, sample answers with pictures."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_dft.cards import nearest
from vlm_dft.errors import ConfigError
from vlm_dft.settings import words_of

PACKAGES = {  # name in report_to -> what is imported
    "azure_ml": "azureml", "clearml": "clearml", "codecarbon": "codecarbon", "comet_ml": "comet_ml", "dagshub": "dagshub",
    "dvclive": "dvclive", "flyte": "flytekit", "mlflow": "mlflow", "neptune": "neptune", "swanlab": "swanlab",
    "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip
BINS = "p_histogram/"
SHOWN = 8  # sample answers


def check_boards(report_to: Any) -> list[str]:
    """The loggers' names, each installed. Raises ConfigError with what to install; imports none of them."""
    names = ["none"] if report_to in ("none", None) else words_of(report_to)
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in PACKAGES:
            raise ConfigError(
                f"report_to: unknown logger {name!r}.{nearest(name, PACKAGES)} Known: {', '.join(PACKAGES)}, all, none."
            )
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(f"report_to = {name}, but {name} is not installed. Run: pip install {name}")
    return names


def prepare_boards(folder: Path) -> None:
    """Tell TensorBoard this run's folder, and wandb a project unless one is set. (A run that goes on is a new one for wandb.)"""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    os.environ.setdefault("WANDB_PROJECT", "vlm-dft")


def edges_of(logs: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """(edges, shares) of the histogram of p in a row of logs; empty lists where there is none."""
    bins = [(key.removeprefix(BINS), float(share)) for key, share in logs.items() if key.startswith(BINS)]
    if not bins:
        return [], []
    return [*(float(name.split("-")[0]) for name, _ in bins), 1.0], [share for _, share in bins]


class Boards:
    """What goes to TensorBoard, trackio and wandb beyond numbers: through their callbacks' own open runs."""

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self.callbacks = {type(callback).__name__: callback for callback in callbacks}

    @property
    def writer(self) -> Any:
        """TensorBoard's, or None."""
        return getattr(self.callbacks.get("TensorBoardCallback"), "tb_writer", None)

    def clients(self) -> list[tuple[str, Any]]:
        """(name, module) of trackio and wandb where a run is open."""
        found = []
        for name, attribute in (("TrackioCallback", "_trackio"), ("WandbCallback", "_wandb")):
            callback = self.callbacks.get(name)
            if callback is not None and callback._initialized:
                found.append((attribute[1:], getattr(callback, attribute)))
        return found

    def histogram(self, step: int, logs: Mapping[str, Any]) -> None:
        """The histogram of p of a logged step, as one."""
        edges, shares = edges_of(logs)
        count = logs.get("response_tokens", 0)
        if not shares or not count or any(math.isnan(share) for share in shares):
            return
        if self.writer is not None:
            centres = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
            counts = [share * count for share in shares]
            self.writer.add_histogram_raw(
                "train/p", min=0.0, max=1.0, num=count, sum=sum(n * c for n, c in zip(counts, centres, strict=True)),
                sum_squares=sum(n * c * c for n, c in zip(counts, centres, strict=True)),
                bucket_limits=edges[1:], bucket_counts=counts, global_step=step,
            )  # fmt: skip
        for _, client in self.clients():
            picture = client.Histogram(np_histogram=([round(share * count) for share in shares], edges))
            client.log({"train/p": picture, "train/global_step": step})

    def alarm(self, step: int, title: str, message: str) -> None:
        """A starvation alarm in words."""
        if self.writer is not None:
            self.writer.add_text("alarms", message, step)
        for name, client in self.clients():
            if name == "trackio":
                client.alert(title=title, text=message)
            else:
                client.run.alert(title=title, text=message)

    def answers(self, step: int, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """The first sample answers of an evaluation with their pictures (rows of watch/step-<k>.jsonl, in `folder`)."""
        shown = rows[:SHOWN]
        columns = ["picture", "split", "question", "gold", "response", "right"]
        cells = [[r["split"], r["question"], r["gold_answer"], r["response"], str(r["correct"])] for r in shown]
        if self.writer is not None:
            lines = ["| " + " | ".join(columns[1:]) + " |", "|---" * len(cells[0]) + "|"] if cells else []
            lines += ["| " + " | ".join(_cell(text) for text in row) + " |" for row in cells]
            self.writer.add_text("eval/answers", "\n".join(lines), step)
        for _, client in self.clients():
            pictures = [client.Image(str(folder / r["pictures"][0])) if any(r["pictures"][:1]) else None for r in shown]
            data = [[picture, *row] for picture, row in zip(pictures, cells, strict=True)]
            table = client.Table(columns=columns, data=data)
            client.log({"eval/answers": table, "train/global_step": step})

    def close(self) -> None:
        """End wandb's run: the next objective's would be logged into it."""
        for name, client in self.clients():
            if name == "wandb":
                client.finish()


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")[:400]
