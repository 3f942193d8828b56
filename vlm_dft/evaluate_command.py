"""Evaluate command: the words of `vlm-dft evaluate` in; responses generated and scored, exit status out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlm_dft.commands import echo, quiet
from vlm_dft.errors import UserError


def add_evaluate(commands: Any) -> None:
    """Add `evaluate` to the parser's commands. Imports nothing heavy."""
    evaluate = commands.add_parser("evaluate", help="evaluate a model on a benchmark")
    evaluate.add_argument("benchmark", help="a card in eval/, or a .yaml of your own")
    evaluate.add_argument("--model", required=True, help="'tiny', a checkpoint folder, or a hub id")
    evaluate.add_argument("--output", required=True, help="folder for predictions.jsonl, scores.jsonl and results.json")
    evaluate.add_argument("--data", help="the folder of the benchmark's files")
    evaluate.add_argument("--limit", type=int, help="only the first samples of each split")
    evaluate.add_argument("--batch-size", type=int, default=32, help="prompts generated at once (default 32)")
    evaluate.add_argument("--json", metavar="FILE", help="write the result here too")
    evaluate.set_defaults(run=evaluate_command)


def evaluate_command(arguments: argparse.Namespace) -> int:
    from vlm_dft.benchmarks import load_benchmark
    from vlm_dft.locate import resolve_model

    resolve_model(arguments.model)
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit must be at least 1, found {arguments.limit}.")
    if Path(arguments.output).is_file():
        raise UserError(f"--output {arguments.output!r} is a file. Expected a folder.")
    load_benchmark(arguments.benchmark, arguments.data, limit=1)  # every check of the card and its files, before torch
    quiet()
    from vlm_dft.pipeline import evaluate

    result = evaluate(
        arguments.benchmark, model=arguments.model, output=Path(arguments.output), data=arguments.data,
        limit=arguments.limit, batch_size=arguments.batch_size, echo=echo,
    )  # fmt: skip
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0
