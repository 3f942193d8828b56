"""Decomposition: objectives x splits x engines x layouts x optimisers in; how far the weights end from one process's out.

    python benchmarks/decomposition.py [--folder runs/decomposition] [--data path/to/tabmwp] [--markdown benchmarks/decomposition.md]

Every run is held against one process that takes each step's eight rows in one padded batch, in the same precision. About 650
short runs in one or two processes over gloo on CPU: 20 minutes on two cores, 8 GB in the folder. Runs that are there are kept.
With --data, also what dealing the rows of a step by length saves.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from group_runs import CLASSES, run_plan  # noqa: E402
from loss_worker import ADAMW, CASE, EPSILON, differences  # noqa: E402
from test_decomposition import MATRIX, SHORT, name_of  # noqa: E402

from vlm_dft.collators import ChatCollator  # noqa: E402
from vlm_dft.models import load_processor  # noqa: E402
from vlm_dft.objectives import OBJECTIVES  # noqa: E402
from vlm_dft.order import Split, StepSampler  # noqa: E402
from vlm_dft.recipes import load_recipe, read_recipe  # noqa: E402

PAIRS = [("none", "1x1x8"), ("none", "1x2x4"), *product(("ddp", "fsdp2", "zero2", "zero3"), ("2x1x4", "2x2x2"))]
NAMES = {"none": "one process", "ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
COLUMNS = [(packed, adamw) for adamw in (False, True) for packed in (False, True)]
SMALL = {f"{dtype} eps {eps:g}": {**SHORT, "optim": "adamw", "epsilon": eps, "dtype": dtype}
         for dtype in ("float64", "float32") for eps in (1e-8, 1e-6, EPSILON)}  # fmt: skip


def dtypes(engine: str) -> tuple[str, ...]:
    """DeepSpeed keeps its weights in fp32."""
    return ("float32",) if engine.startswith("zero") else ("float64", "float32")


def measured(results: Any, pair: tuple[str, str], cases: Iterable[str]) -> list[dict[str, float]]:
    return [
        differences(results(*pair, case), results("none", "1x1x8", case.replace("packed", "padded"))) for case in cases
    ]


def table(results: Any, dtype: str) -> list[str]:
    lines = [
        "| against 1 x 8 padded | runs | " + " | ".join(f"{'packed' if p else 'padded'} {'AdamW' if a else 'SGD'}" for p, a in COLUMNS) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]  # fmt: skip
    for engine, split in PAIRS:
        if dtype not in dtypes(engine):
            continue
        cells, runs = [], 0
        for packed, adamw in COLUMNS:
            if (engine, split, packed) == ("none", "1x1x8", False):
                cells.append("-")
                continue
            found = measured(results, (engine, split), [name_of(o, packed, adamw, dtype) for o in OBJECTIVES])
            runs += len(found)
            cells.append(" / ".join(f"{max(one[k] for one in found):.1e}" for k in ("of_weights", "of_update", "norm")))
        lines.append(f"| {NAMES[engine]}, {described(split)} | {runs} | {' | '.join(cells)} |")
    return lines


def described(split: str) -> str:
    """2x2x2 -> 2 x (2 x 2): processes, rows, accumulated."""
    processes, accumulation, rows = split.split("x")
    return f"{processes} x {rows}" if accumulation == "1" else f"{processes} x ({rows} x {accumulation})"


def by_objective(results: Any) -> list[str]:
    lines = [
        "| objective | float64: of the movement | runs | fp32 SGD: of the weights | fp32 AdamW: of the weights | runs |",
        "|---|---|---|---|---|---|",
    ]
    for objective in OBJECTIVES:
        worst: dict[tuple[str, bool], list[float]] = {}
        for (engine, split), (packed, adamw) in product(PAIRS, COLUMNS):
            for dtype in dtypes(engine) if (engine, split, packed) != ("none", "1x1x8", False) else ():
                (one,) = measured(results, (engine, split), [name_of(objective, packed, adamw, dtype)])
                key = (dtype, adamw and dtype == "float32")
                worst.setdefault(key, []).append(one["of_update" if dtype == "float64" else "of_weights"])
        exact, sgd, adam = (worst[key] for key in (("float64", False), ("float32", False), ("float32", True)))
        lines.append(
            f"| {objective} | {max(exact):.1e} | {len(exact)} | {max(sgd):.1e} | {max(adam):.1e} | {len(sgd) + len(adam)} |"
        )
    return lines


def by_epsilon(results: Any) -> list[str]:
    lines = [
        "| eps | float64, 1 x (4 x 2) | float64, DDP 2 x 4 | fp32, 1 x (4 x 2) | fp32, DDP 2 x 4 |",
        "|---|---|---|---|---|",
    ]
    for eps in (1e-8, 1e-6, EPSILON):
        cells = []
        for dtype, pair in product(("float64", "float32"), (("none", "1x2x4"), ("ddp", "2x1x4"))):
            (one,) = measured(results, pair, [f"{dtype} eps {eps:g}"])
            cells.append(" / ".join(f"{one[k]:.1e}" for k in ("of_weights", "of_update", "norm")))
        lines.append(f"| {eps:g} | {' | '.join(cells)} |")
    return lines


def runs_of(engine: str, split: str) -> list[str]:
    small = list(SMALL) if (engine, split) in (PAIRS[0], PAIRS[1], PAIRS[2]) else []
    return [case for case in MATRIX if case.split()[-1] in dtypes(engine)] + small


def dealing(data: str) -> list[str]:
    """Padding and waiting with and without lengths, over the rows of an epoch (seed 0)."""
    collator = ChatCollator(load_processor("tiny"))
    lengths = [collator.measure(row).tokens for row in load_recipe(read_recipe("tabmwp"), data)[0]]
    lines = [
        "",
        "## What dealing by length saves",
        "",
        f"TabMWP, {len(lengths)} rows of {min(lengths)} to {max(lengths)} tokens, shuffled (seed 0), in steps of 128: the share of padding in padded",
        "micro-batches, and the share of a step that processes wait for the one with the most tokens.",
        "",
        "| processes x (micro-batch x accumulated) | padding, as drawn | by length | waiting, packed, as drawn | by length |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for split in (Split(4, 1, 32), Split(4, 8, 4), Split(8, 8, 2)):
        shares = []
        for packed, known in product((False, True), (None, lengths)):
            places = list(StepSampler(len(lengths), split, seed=0, lengths=known, packed=packed))
            batches = [
                [lengths[k] for k in places[at : at + split.micro_batch] if k < len(lengths)]
                for at in range(0, len(places), split.micro_batch)
            ]
            worst = sum(max(batch) * len(batch) for batch in batches if batch)
            if packed:
                steps = [batches[at : at + split.step_size // split.micro_batch]
                         for at in range(0, len(batches), split.step_size // split.micro_batch)]  # fmt: skip
                worst = split.processes * sum(
                    max(sum(map(sum, step[k :: split.processes])) for k in range(split.processes)) for step in steps
                )
            shares.append(f"{1 - sum(lengths) / worst:.1%}")
        lines.append(f"| {split.processes} x ({split.micro_batch} x {split.accumulation}) | {' | '.join(shares)} |")
    return [*lines, ""]


def report(results: Any, data: str | None) -> str:
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    versions = ", ".join(
        f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", "accelerate", "deepspeed")
    )
    return "\n".join([
        "# The same weights however a step is split",
        "",
        f"Made by `python benchmarks/decomposition.py` on a CPU (gloo), commit {commit}; {versions}.",
        "",
        f"The embedded Qwen2.5-VL with a head of its own, all parts trained; {len(OBJECTIVES)} objectives with their default parameters;",
        f"21 rows of unequal numbers of response tokens, shuffled, in steps of eight, {SHORT['steps']} steps: the third has five rows, the",
        f"fourth is of a second epoch. SGD with learning rate {CASE['learning_rate']:g}; AdamW with {ADAMW['learning_rate']:g}, weight decay "
        f"{ADAMW['weight_decay']:g}, eps {EPSILON:g}.",
        "",
        "A cell: largest difference of a weight over the largest weight / over the largest movement of a weight / norm of the whole",
        "difference over the norm of the whole movement; the worst of the objectives. Sizes of processes and classes of engines were asserted",
        f"in every run ({', '.join(c for c in dict.fromkeys(CLASSES.values()) if c)}).",
        "",
        "## float64: the mathematics",
        "",
        *table(results, "float64"),
        "",
        "## fp32: the same, rounded",
        "",
        "What one process makes of another order of sums (the first two rows) is what the engines make too.",
        "",
        *table(results, "float32"),
        "",
        "## By objective",
        "",
        "The worst of all pairs, layouts and optimisers (float64), of all pairs and layouts (fp32).",
        "",
        *by_objective(results),
        "",
        "## What AdamW's eps does",
        "",
        "AdamW divides a gradient by its size: where the gradient is zero but for rounding, as that of the bias of the keys, eps decides",
        "how much of the rounding becomes a step. dft, padded; cells as above. In float64 nothing depends on it.",
        "",
        *by_epsilon(results),
        *(dealing(data) if data else [""]),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/decomposition"))
    parser.add_argument("--data")
    parser.add_argument("--markdown", type=Path)
    words = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    words.folder.mkdir(parents=True, exist_ok=True)
    plan = [(engine, split, tuple(runs_of(engine, split))) for engine, split in PAIRS]
    written = report(run_plan(plan, {**MATRIX, **SMALL}, words.folder, 3600), words.data)
    print(written)
    if words.markdown:
        words.markdown.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
