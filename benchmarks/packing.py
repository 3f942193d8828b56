"""Packing: table pictures in; equality, fill of rows, cost of attention and of a training step out.

    python benchmarks/packing.py --data path/to/PromptPG [--rounds 7] [--markdown benchmarks/packing.md]

Four questions. Is a packed row the padded batch (logits, loss, gradients; fp32, real classes of transformers)? How full are
rows of a token budget? What does attention cost in FLOPs, counted as it runs? What does a training step (forward and
backward, all parameters) cost in CPU seconds per response token, on the same rows, one thread, ways interleaved?
The full-size Qwen tokenizer is used for the fill where dashscope is installed. About 5 minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from processors import full_qwen_processor  # noqa: E402
from test_packing import (  # noqa: E402
    ATTENTIONS,
    MODELS,
    attention_flops,
    pack,
    padded_batch,
    relative,
    run,
    unpacked,
    with_attention,
)

from vlm_dft.chat import Example  # noqa: E402
from vlm_dft.collators import ChatCollator  # noqa: E402
from vlm_dft.loss_head import attach_loss  # noqa: E402
from vlm_dft.models import load_model, load_processor  # noqa: E402
from vlm_dft.objectives import IGNORE  # noqa: E402
from vlm_dft.packing import packing_report, plan_packs  # noqa: E402
from vlm_dft.recipes import load_recipe, read_recipe  # noqa: E402
from vlm_dft.segment_attention import SEGMENTS, use_segment_attention  # noqa: E402

ORDER = (2, 0, 3, 1)  # of the four samples of tests/test_packing.py
NAMES = {"embedded": "Qwen2.5-VL, embedded", "Qwen2VL": "Qwen2-VL, random", "Qwen2_5_VL": "Qwen2.5-VL, random",
         "Qwen3VL": "Qwen3-VL, random"}  # fmt: skip
BATCH = 4  # rows of a padded batch: the recipe's micro_batch
CAPACITIES, WINDOWS = (1024, 2048, 4096), (256, 1024)


def equality() -> list[str]:
    """A markdown row per model and attention: the largest differences over both objectives."""
    lines = ["| model | attention of the packed row | max abs d logits | abs d loss | rel d gradients |", "|---|---|---|---|---|"]  # fmt: skip
    for kind in MODELS:
        for attention in ATTENTIONS:
            worst = [0.0, 0.0, 0.0]
            for objective in ("nll", "dft"):
                logits, loss, gradients = unpacked(kind, ORDER, objective)
                ours = run(with_attention(kind, attention), pack(padded_batch(ORDER), kind), objective)
                found = [float((ours[0][0] - logits).abs().max()), abs(ours[1] - loss), relative(ours[2], gradients)]
                worst = [max(pair) for pair in zip(worst, found, strict=True)]
            name = NAMES[kind]
            lines.append(f"| {name} | {attention} | {worst[0]:.1e} | {worst[1]:.1e} | {worst[2]:.1e} |")
    return lines


def padding(lengths: Sequence[int], shuffles: int = 20) -> float:
    """Share of padding in shuffled batches of BATCH rows, over so many shuffles."""
    room = 0
    for seed in range(shuffles):
        order = list(lengths)
        random.Random(seed).shuffle(order)
        batches = [order[k : k + BATCH] for k in range(0, len(order), BATCH)]
        room += sum(max(batch) * len(batch) for batch in batches)
    return 1 - shuffles * sum(lengths) / room


def fill(tokenizer: str, lengths: Sequence[int]) -> list[str]:
    """A markdown row per capacity and window."""
    lines = []
    for capacity in CAPACITIES:
        fitting = [length for length in lengths if length <= capacity]
        bound = math.ceil(sum(fitting) / capacity)
        for window in WINDOWS:
            packs = plan_packs(fitting, capacity, window=window, seed=0)
            report = packing_report(fitting, packs, capacity)
            lines.append(
                f"| {tokenizer} | {capacity:,} | {window:,} | {len(fitting)} | {report['rows_per_pack']:.1f} | {len(packs)} | "
                f"{bound} | {100 * report['fill']:.1f} % | {100 * padding(fitting):.1f} % |"
            )
    return lines


def flops(segments: Sequence[int] = (1, 2, 4, 8, 16)) -> list[str]:
    """A markdown row per number of segments: attention FLOPs over those of one segment."""
    lines = ["| segments of 24 tokens | stock sdpa | segments |", "|---|---|---|"]
    one = attention_flops("embedded", "sdpa", 1)
    for k in segments:
        stock, ours = (attention_flops("embedded", attention, k) / one for attention in ("sdpa", SEGMENTS))
        lines.append(f"| {k} | {stock:g} | {ours:g} |")
    return lines


def step(model: Any, batches: Sequence[dict[str, Any]], count: int) -> tuple[float, float]:
    """(CPU seconds of forward and backward, loss) of one optimiser step over the batches; count: its targets."""
    model.zero_grad()
    total, start = 0.0, time.process_time()
    for batch in batches:
        loss = model(**batch, objective="dft", num_items=count)["loss"]
        loss.backward()
        total += loss.item()
    return time.process_time() - start, total


def steps(rows: list[Example], lengths: Sequence[int], rounds: int) -> list[str]:
    """A markdown row per way: CPU time per response token, and relative to padded batches."""
    padded, packing = (ChatCollator(load_processor("tiny"), packing=packed) for packed in (False, True))
    fours = [rows[k : k + BATCH] for k in range(0, len(rows), BATCH)]
    stock, segments = attach_loss(load_model("tiny")), use_segment_attention(attach_loss(load_model("tiny")))
    sets = {f"the same {BATCH} rows": [packing(four) for four in fours]}
    for capacity in CAPACITIES[1:]:
        packs = plan_packs(lengths, capacity, seed=0)
        sets[f"rows of up to {capacity:,} tokens"] = [packing([rows[k] for k in members]) for members in packs]
    ways: dict[str, tuple[Any, list[dict[str, Any]]]] = {
        f"padded, {BATCH} rows, stock sdpa": (stock, [padded(four) for four in fours])
    }
    for name, batches in sets.items():
        ways[f"packed, {name}, dense mask (stock sdpa)"] = (stock, batches)
        ways[f"packed, {name}, by segment"] = (segments, batches)
    targets = {name: sum(int((b["labels"] != IGNORE).sum()) for b in batches) for name, (_, batches) in ways.items()}
    (count,) = set(targets.values())  # the same rows, however they are laid out
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses = [step(model, batches, count)[1] for model, batches in ways.values()]  # and caches are warm
    for k in range(rounds):
        for name, (model, batches) in list(ways.items())[:: 1 if k % 2 else -1]:
            seconds[name].append(step(model, batches, count)[0])
    base = next(iter(ways))
    lines = [
        "| way | forward passes | µs CPU per response token | time, padded = 1 (lowest to highest round) |",
        "|---|---|---|---|",
    ]
    for name, (_, batches) in ways.items():
        ratios = [ours / theirs for ours, theirs in zip(seconds[name], seconds[base], strict=True)]
        lines.append(
            f"| {name} | {len(batches)} | {1e6 * statistics.median(seconds[name]) / count:.0f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    share = 1 - sum(lengths) / sum(b["input_ids"].numel() for b in ways[base][1])
    furthest = max(abs(loss - losses[0]) for loss in losses)
    lines += ["", f"n = {len(rows)} rows, {sum(lengths):,} tokens, {count:,} of responses; {100 * share:.1f} % of the padded batches is padding; "
              f"medians over {rounds} interleaved rounds; one thread.",
              f"The loss of the step is {losses[0]:.6f} padded; the others differ by at most {furthest:.0e}."]  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder that holds data/tabmwp")
    parser.add_argument("--rows", type=int, default=64, help="rows of the timed steps")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--markdown", type=Path, help="write the tables here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, _ = load_recipe(read_recipe("tabmwp"), options.data)
    tokenizers = {"embedded, 640 tokens": load_processor("tiny")}
    if importlib.util.find_spec("dashscope"):
        tokenizers["Qwen2.5-VL's own"] = full_qwen_processor()
    lengths = {name: [ChatCollator(p).measure(row).tokens for row in rows] for name, p in tokenizers.items()}
    embedded = next(iter(lengths.values()))
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    chosen = list(range(len(rows)))
    random.Random(0).shuffle(chosen)
    chosen = [k for k in chosen if embedded[k] <= CAPACITIES[1]][: options.rows]
    lines = [
        "# Packed rows",
        "",
        f"Made by `python benchmarks/packing.py` on a CPU, commit {commit.stdout.strip()}; {versions}.",
        "",
        "## (a) Packed is unpacked",
        "",
        "Four samples (0, 1 and 2 pictures) in one row against the padded batch with stock sdpa, fp32; the larger of nll and dft.",
        "Gradients: size of the difference over size, all parameters.",
        "",
        *equality(),
        "",
        "## (b) Fill of rows",
        "",
        f"TabMWP, {len(rows)} rows, shuffled (seed 0); rows over the capacity are left out. The lower bound is tokens / capacity, "
        f"rounded up. Padding: mean share in shuffled batches of {BATCH}, 20 shuffles.",
        "",
        *(
            f"- {name}: {min(n)} to {max(n):,} tokens a row, median {statistics.median(n):g}, {sum(n):,} in all"
            for name, n in lengths.items()
        ),
        "",
        f"| tokenizer | capacity | window | rows | rows per pack | packs | lower bound | fill | padding, batches of {BATCH} |",
        "|---|---|---|---|---|---|---|---|---|",
        *(line for name, n in lengths.items() for line in fill(name, n)),
        "",
        "## (c) FLOPs of attention, one segment = 1",
        "",
        *flops(),
        "",
        "## (d) A training step on TabMWP, embedded model",
        "",
        *steps([rows[k] for k in chosen], [embedded[k] for k in chosen], options.rounds),
    ]
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
