"""Run by test_crash.py and benchmarks/crash.py: runs that are killed at random and continued; what became of each out, as JSON.

Words: a folder, and {"kills": N, "seed": S} or {"saves": N}. Everything is imported once; every attempt at a run is a forked process,
which is killed with SIGKILL. The last line that is printed is a JSON object.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vlm_dft.benchmarks import load_benchmark
from vlm_dft.checkpoints import STAGING, damage, newest_whole
from vlm_dft.collators import ChatCollator
from vlm_dft.config import resolve_config
from vlm_dft.generation import generate
from vlm_dft.models import load_model, load_processor
from vlm_dft.recipes import load_recipe, read_recipe
from vlm_dft.training import train_objective

STEPS = 20
COMMON = {
    "recipe": "drawn",
    "batch_size": 8,
    "micro_batch": 4,
    "epochs": 4,
    "learning_rate": 1e-3,
    "save_steps": 3,
    "report_to": "none",
}  # of 40 rows: five steps an epoch, two micro-batches a step; AdamW, cosine schedule, clipping, shuffling
VARIANTS: dict[str, dict[str, Any]] = {
    "full, padded, logged every step": {"logging_steps": 1, "train_parts": "vision,merger,language,head"},
    "LoRA, packed, CADFT, logged every 4 steps": {"logging_steps": 4, "lora": 4, "packing": True, "cadft": 1.0, "dataloader_num_workers": 1},
}  # fmt: skip


def save_model(folder: Path) -> None:
    """The embedded model with dropout in its attention: training draws random numbers in every layer."""
    load_model("tiny").save_pretrained(folder)
    load_processor("tiny").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.1
    (folder / "config.json").write_text(json.dumps(config))


def job(folder: Path, model: Path, settings: dict[str, Any], examples: list[Any], samples: list[Any]) -> None:
    """Train, then answer a few samples: what a run does from its first step to its last prediction."""
    config = resolve_config(("test", {**COMMON, **settings, "model": str(model)}))
    final = train_objective(config, "dft", examples, folder)
    assert final.name == f"checkpoint-{STEPS}"
    collator = ChatCollator(load_processor("tiny"))
    generate(load_model(str(final)), collator, samples, folder / "predictions.jsonl", batch_size=4, show=False)


def attempt(arguments: tuple[Any, ...], due: float | Path | None) -> tuple[bool, float]:
    """Run the job in a process of its own, and kill it after so many seconds or when a file is there. Returns (it ended by
    itself, seconds it took)."""
    start, child = time.monotonic(), os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(arguments[0].parent / "said.txt", "a")  # noqa: SIM115
        try:
            job(*arguments)
        except BaseException:  # noqa: BLE001  # told by the parent
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        sys.stderr.flush()
        os._exit(0)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if status:
                raise RuntimeError((arguments[0].parent / "said.txt").read_text()[-4000:])
            return True, time.monotonic() - start
        if due is not None and (due.exists() if isinstance(due, Path) else time.monotonic() - start > due):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False, time.monotonic() - start
        time.sleep(0.002)


def place(folder: Path) -> str:
    """What a run was doing when it was killed, as far as its files tell."""
    if (folder / "predictions.jsonl").exists():
        return f"evaluating, {len((folder / 'predictions.jsonl').read_bytes().splitlines())} answers"
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_bytes().splitlines(True) if line.endswith(b"\n")] if (
        folder / "metrics.jsonl").is_file() else []  # fmt: skip
    saving = next((path.name for path in (folder / ".incomplete").glob("*")), None) if folder.is_dir() else None
    if saving and saving.startswith("old-"):
        return f"deleting {saving.removeprefix('old-')}"
    return f"saving {saving}" if saving else f"after the log of step {steps[-1]}" if steps else "starting"


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the time that things took."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "timing"} for row in found]


def differences(folder: Path, whole: Path) -> list[str]:
    """What is not byte for byte that of the uninterrupted run."""
    final = f"checkpoint-{STEPS}"
    wrong = []
    if rows(folder) != rows(whole):
        wrong.append("metrics.jsonl")
    weights = sorted(path.name for path in (whole / final).glob("*.safetensors"))
    for name in (*(f"{final}/{name}" for name in weights), "predictions.jsonl"):
        if (folder / name).read_bytes() != (whole / name).read_bytes():
            wrong.append(name)
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return [*wrong, *(f"left behind: {name}" for name in left)]


def main() -> None:
    torch.set_num_threads(1)
    folder, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
    if "saves" in asked:
        save_model(folder / "model")  # imports what the forked processes need
        kill_in_saves(folder, asked["saves"])
        return
    draw = random.Random(asked["seed"])
    save_model(folder / "model")
    examples = load_recipe(read_recipe("drawn"), None, limit=40)[0]
    samples = load_benchmark("drawn", None, limit=12)["test"]
    gc.freeze()
    found: list[dict[str, Any]] = []
    for number, (variant, settings) in enumerate(VARIANTS.items()):
        whole = folder / f"whole{number}"
        attempt((whole, folder / "model", settings, examples, samples), None)  # warms the disk's cache
        again = folder / f"again{number}"
        _, seconds = attempt((again, folder / "model", settings, examples, samples), None)
        same = differences(again, whole)
        for k in range(number, asked["kills"], len(VARIANTS)):
            run, kills = folder / f"run{k}", list[str]()
            arguments = (run, folder / "model", settings, examples, samples)
            share = (draw.random() + k // len(VARIANTS)) / -(-asked["kills"] // len(VARIANTS))
            moment: float | Path | None = seconds * share  # in a slice of the run of its own
            if k >= asked["kills"] - len(VARIANTS):  # the last slice, whatever the machine does besides
                moment = run / "predictions.jsonl"
            while True:
                ended, took = attempt(arguments, moment)
                if ended and kills:
                    break
                if ended:  # before the moment came: a quicker run than the one that was timed
                    shutil.rmtree(run)
                    moment = took * draw.random()
                    continue
                kills.append(place(run))
                moment = draw.random() * seconds if draw.random() < 0.4 else None  # and sometimes again
            found.append({"variant": variant, "killed": kills, "wrong": same + differences(run, whole)})
    sys.stdout.write(json.dumps({"seed": asked["seed"], "runs": found}) + "\n")


def kill_in_saves(folder: Path, count: int) -> None:
    """Kill a run at `count` places of one save, spread over all that it does to files, and look what is left each time."""
    examples = load_recipe(read_recipe("drawn"), None, limit=8)[0]
    settings = {**COMMON, "micro_batch": 8, "max_steps": 2, "save_steps": 1}

    def train(run: Path, steps: int, stop_at: int | None) -> int:
        """Train in a process of its own, which kills itself at that file event. Returns the events that it counted."""
        counted, written = os.pipe()
        child = os.fork()
        if child == 0:
            sys.stdout = sys.stderr = open(folder / "said.txt", "a")  # noqa: SIM115
            events, synced = [0], os.fsync

            def count_one() -> None:
                events[0] += 1
                if events[0] == stop_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            def hook(event: str, arguments: tuple[Any, ...]) -> None:
                written_to = (
                    event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
                )
                if (written_to or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")) and str(run) in str(
                    arguments[0]
                ):
                    count_one()

            def fsync(file: int) -> None:
                count_one()
                synced(file)

            config = resolve_config(("test", {**settings, "max_steps": steps}))
            sys.addaudithook(hook)
            os.fsync = fsync
            train_objective(config, "dft", examples, run)
            os.write(written, str(events[0]).encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(written)
        said = os.read(counted, 16)
        os.close(counted)
        return int(said or 0)

    train(folder / "one", 1, None)
    first = {"one": damage(folder / "one" / "checkpoint-1")}
    shutil.copytree(folder / "one", folder / "whole")
    total = train(folder / "whole", 2, None)
    found = []
    for k in range(count):
        run = folder / f"save{k}"
        shutil.copytree(folder / "one", run)
        event = total - (total - 1) * k // count  # the last, then backwards
        train(run, 2, event)
        left = {path.name: damage(path) for path in run.glob("checkpoint-*")}
        newest, passed_over = newest_whole(run)
        aside = (run / STAGING).is_dir()
        train(run, 2, None)  # and goes on
        final = "checkpoint-2/model.safetensors"
        same = (run / final).read_bytes() == (folder / "whole" / final).read_bytes() and rows(run) == rows(
            folder / "whole"
        )
        found.append({"event": event, "left": left, "newest": newest and newest.name, "passed_over": passed_over, "aside": aside,
                      "same": same, "hidden": [p.name for p in run.iterdir() if p.name.startswith(".")]})  # fmt: skip
    sys.stdout.write(json.dumps({"first": first, "events": total, "saves": found}) + "\n")


if __name__ == "__main__":
    main()
