"""Diagnostics: a training run in; the share of its CPU time that they take out.

    python benchmarks/diagnostics.py [--steps 40] [--markdown benchmarks/diagnostics.md]

What a step of training costs, and of that: telling the kinds of tokens in the collator, keeping what the loss saw, summing it
up and looking for starvation (each timed as it runs, CPU seconds), and the entropy (the loss on rows of the run's shape with
and without statistics, interleaved, the median of the differences). One thread. The embedded model, and a random Qwen2.5-VL
of hidden size 512 with the full vocabulary of 151,936; logs at every tenth step, as a run of 1,000 steps makes them.
About 3 minutes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vlm_dft.arguments import training_arguments_of
from vlm_dft.collators import ChatCollator
from vlm_dft.config import resolve_config
from vlm_dft.diagnostics import StarvationAlarms, TokenDiagnostics
from vlm_dft.linear_loss import fused_linear_loss
from vlm_dft.loss_head import attach_loss
from vlm_dft.models import load_model, load_processor
from vlm_dft.recipes import load_recipe, read_recipe
from vlm_dft.trainer import DFTTrainer

SPENT: Counter[str] = Counter()


def timed(owner: Any, name: str) -> None:
    """Count the CPU time of a method."""
    method: Callable[..., Any] = getattr(owner, name)

    def measured(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return method(*args, **kwargs)
        finally:
            SPENT[f"{owner.__name__}.{name}"] += time.process_time() - start  # type: ignore[assignment]

    setattr(owner, name, measured)


def wide_model() -> Any:
    """A random Qwen2.5-VL of hidden size 512 with the full vocabulary; the ids are the embedded tokenizer's."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = load_model("tiny").config
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 512, 1536, 8
    text.layer_types = ["full_attention"] * 8
    text.num_attention_heads, text.num_key_value_heads, text.vocab_size = 8, 2, 151_936
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [8, 12, 12]}
    config.vision_config.out_hidden_size = 512
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config)


def entropy_share(hidden: int, vocabulary: int, rows: int, rounds: int) -> float:
    """CPU seconds that the statistics add to one call of the loss."""
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(rows, hidden, generator=draw).requires_grad_()
    w = (torch.randn(vocabulary, hidden, generator=draw) / hidden**0.5).requires_grad_()
    targets, grad = torch.randint(0, vocabulary, (rows,), generator=draw), torch.zeros(vocabulary, hidden)
    spent: dict[bool, list[float]] = {False: [], True: []}
    for k in range(2 * rounds + 2):
        start = time.process_time()
        fused_linear_loss(h, w, targets, weight_grad=grad, return_stats=bool(k % 2))
        if k > 1:
            spent[bool(k % 2)].append(time.process_time() - start)
    return statistics.median(b - a for a, b in zip(spent[False], spent[True], strict=True))


def measure(name: str, model: Any, steps: int, micro: int) -> str:
    """A row of the table."""
    config = resolve_config(("benchmark", {"recipe": "drawn", "batch_size": micro, "micro_batch": micro, "max_steps": steps,
        "logging_steps": 10, "save_steps": 10_000, "learning_rate": 1e-4}))  # fmt: skip
    rows = load_recipe(read_recipe("drawn"), None, limit=steps * micro)[0]
    with tempfile.TemporaryDirectory() as folder:
        trainer = DFTTrainer(
            model=attach_loss(model), args=training_arguments_of(config, Path(folder), len(rows)), train_dataset=rows,
            data_collator=ChatCollator(load_processor("tiny"), tag_sources=["drawn"]), objective="dft", sources=["drawn"],
        )  # fmt: skip
        trainer._save_checkpoint = lambda *args: None  # type: ignore[method-assign]
        SPENT.clear()
        start = time.process_time()
        trainer.train()
        total = time.process_time() - start
    tokens = sum(row["response_tokens"] for row in trainer.state.log_history if "response_tokens" in row) // steps
    head = model.get_output_embeddings().weight
    entropy = steps * entropy_share(head.shape[1], head.shape[0], tokens, 9)
    parts = [SPENT["ChatCollator._tags"], SPENT["TokenDiagnostics.add"],
             SPENT["TokenDiagnostics.summary"] + SPENT["StarvationAlarms.check"], entropy]  # fmt: skip
    shares = " | ".join(f"{part / total:.2%}" for part in parts)
    return f"| {name} | {tokens} | {1e3 * total / steps:.0f} | {shares} | **{sum(parts) / total:.2%}** |"


def main() -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for owner, name in (
        (ChatCollator, "_tags"),
        (TokenDiagnostics, "add"),
        (TokenDiagnostics, "summary"),
        (StarvationAlarms, "check"),
    ):
        timed(owner, name)
    lines = [
        "| model | response tokens a step | CPU ms a step | kinds of tokens | keeping | summing, alarms | entropy | all |",
        "|---|---|---|---|---|---|---|---|",
        measure("embedded (1 M parameters, V 640)", load_model("tiny"), arguments.steps, 16),
        measure("random, hidden 512, 8 layers, V 151,936", wide_model(), max(10, arguments.steps // 4), 8),
    ]
    print("\n".join(lines))
    if arguments.markdown:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        text = ["# What the diagnostics cost", "", f"`python benchmarks/diagnostics.py`, torch {torch.__version__}, one thread, commit {commit}. "
                "Share of a training step's CPU time; goal: under 2 %.", "", *lines, ""]  # fmt: skip
        arguments.markdown.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
