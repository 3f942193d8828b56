"""Evaluate command: the words of `vlm-dft evaluate` in; responses generated, scored and reported, exit status out."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from vlm_dft.commands import check_writable, echo, quiet
from vlm_dft.errors import ConfigError, UserError

UNANSWERED = 1  # exit status where a server left responses out


def add_evaluate(commands: Any) -> None:
    """Add `evaluate` to the parser's commands. Imports nothing heavy."""
    evaluate = commands.add_parser(
        "evaluate",
        help="evaluate a model on benchmarks",
        description="Answer, score and report benchmarks: OUT/BENCHMARK/{predictions,scores}.jsonl and results.json, OUT/report.json and "
        "report.html. A killed run goes on where it stopped; changed settings are refused. A model of a training run is asked as in "
        "training. Several processes: vlm-dft-launch --nproc_per_node N -m vlm_dft.cli evaluate ... Exit status: 0 done; 1 a server "
        "left responses out; 2 an error to put right.",
    )
    add = evaluate.add_argument
    add("benchmarks", nargs="+", metavar="BENCHMARK", help="cards in eval/, or .yaml files of your own")
    add("--model", required=True, help="'tiny', a checkpoint folder (LoRA too), or a hub id; the server's name of it")
    add("--output", required=True, help="folder of the results, one in it a benchmark")
    add("--data", action="append", default=[], help="the folder of the files; NAME=FOLDER for one benchmark, repeated")
    add("--limit", type=int, help="only the first samples of each split")
    add("--protocol", default="official", help="whose prompts: official (default), or another of the card's")
    add("--engine", default="transformers", help="transformers (default), or openai: any compatible server")
    add("--base-url", help="the server's address, such as http://localhost:8000/v1; its key is OPENAI_API_KEY")
    add("--concurrency", type=int, default=32, help="requests to the server at once (default 32)")
    add(
        "--samples", type=int, default=1, metavar="N", help="responses to each sample: avg@N, pass@N, maj@N (default 1)"
    )
    add("--temperature", type=float, help="0: greedy; default 0, and 1 with several samples")
    add("--top-p", type=float, default=1.0, help="draw from the most likely tokens of this probability (default 1)")
    add("--seed", type=int, default=0, help="of the draws (default 0)")
    add("--batch-size", type=int, default=32, help="prompts generated at once (default 32)")
    add("--max-new-tokens", type=int, help="most tokens of a response (default: the card's)")
    add("--min-pixels", type=int, help="smallest image area after resizing (default: the run's or processor's)")
    add("--max-pixels", type=int, help="largest image area after resizing (default: the run's or processor's)")
    add("--as-trained", metavar="RUN", help="ask as this run was trained (default: the model's own run)")
    add("--judge", metavar="URL", help="a server that judges where the official protocol asks a model")
    add("--judge-model", metavar="NAME", help="the judge's name on that server")
    add("--json", metavar="FILE", help="write the report here too")
    evaluate.set_defaults(run=evaluate_command)


def evaluate_command(arguments: argparse.Namespace) -> int:
    """Check everything, then load torch, answer, score and report."""
    from vlm_dft import evaluating
    from vlm_dft.checkpoints import FULL
    from vlm_dft.decoding import Decoding
    from vlm_dft.runs import write_json

    check_writable(arguments.json, "--json")
    draws = arguments.temperature is None and arguments.samples > 1
    temperature = 1.0 if draws else arguments.temperature or 0.0
    config = evaluating.EvalConfig(
        benchmarks=arguments.benchmarks, model=arguments.model, output=Path(arguments.output), data=read_data(arguments.data),
        protocol=arguments.protocol, limit=arguments.limit, engine=arguments.engine, base_url=arguments.base_url,
        concurrency=arguments.concurrency, batch_size=arguments.batch_size, max_new_tokens=arguments.max_new_tokens,
        decoding=Decoding(arguments.samples, temperature, arguments.top_p, arguments.seed), as_trained=arguments.as_trained,
        min_pixels=arguments.min_pixels, max_pixels=arguments.max_pixels, judge=_judge(arguments),
    )  # fmt: skip
    prepared = evaluating.prepare(config)
    if config.engine == "transformers":
        quiet()
    try:
        report, failed = evaluating.evaluate(prepared, echo=echo)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ConfigError(
            f"--output {arguments.output!r}: {os.strerror(error.errno)}. What was answered is kept there: free some space, and the same "
            "command goes on."
        ) from error
    if arguments.json and report:
        write_json(Path(arguments.json), report)
    return UNANSWERED if failed else 0


def read_data(words: list[str]) -> dict[str, str]:
    """--data's words as {benchmark, or '' for all others: folder}. Raises UserError for two that say the same."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        name, folder = (name, folder) if equals and "/" not in name else ("", word)
        if name in found:
            raise UserError(
                f"--data says two folders {'for ' + name if name else 'for all'}: {found[name]!r}, {folder!r}."
            )
        found[name] = folder
    return found


def _judge(arguments: argparse.Namespace) -> Any:
    if not (arguments.judge or arguments.judge_model):
        return None
    if not (arguments.judge and arguments.judge_model):
        raise UserError("--judge URL and --judge-model NAME belong together: give both, or neither.")
    from vlm_dft.judge import Judge

    return Judge(arguments.judge, arguments.judge_model, Path(arguments.output) / "judge")
