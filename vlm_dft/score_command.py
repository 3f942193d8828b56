"""Score command: the words of `vlm-dft score` in; a file of responses scored without a model, exit status out."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_dft.commands import check_folder, check_writable, echo
from vlm_dft.errors import UserError, printable

WRITTEN = ("vlmevalkit",)
SHOWN = 35  # values of a group that the table shows


def add_score(commands: Any) -> None:
    """Add `score` to the parser's commands. Imports nothing heavy."""
    score = commands.add_parser(
        "score",
        help="score a file of responses again, ours or another harness's, without a model",
        description="Score responses without a model: ours (a run's folder or its predictions.jsonl), VLMEvalKit's (.xlsx, .tsv), "
        "lmms-eval's (*_samples_*.jsonl), and the official output files of MathVista, MATH-V and We-Math. The format is told by "
        "content. Without --data the samples are those that the file's rows hold.",
    )
    score.add_argument("predictions", metavar="PREDICTIONS", help="a file of responses, or a folder with one")
    score.add_argument("--benchmark", required=True, help="a card in eval/, or a .yaml of your own")
    score.add_argument("--data", help="the folder of the benchmark's files: its samples are scored, not the file's")
    score.add_argument(
        "--protocol", help="prompt protocol that the responses answer, of those of the card (default official)"
    )
    score.add_argument(
        "--allow-partial", action="store_true", help="score what is there where something is missing or unknown"
    )
    score.add_argument(
        "--output", metavar="DIR", help="write DIR/BENCHMARK/{predictions,scores}.jsonl and results.json, for compare"
    )
    score.add_argument(
        "--to", nargs=2, metavar=("FORMAT", "FILE"), help="write the responses as: vlmevalkit FILE.xlsx or FILE.tsv"
    )
    score.add_argument(
        "--judge", metavar="URL", help="an OpenAI-compatible server that extracts where the official protocol wants one"
    )
    score.add_argument("--judge-model", metavar="MODEL", help="the judge's model")
    score.add_argument("--json", metavar="FILE", help="write the results here too")
    score.set_defaults(run=score_command)


def score_command(arguments: argparse.Namespace) -> int:
    from vlm_dft.evaluation_report import evaluation_tables
    from vlm_dft.rescoring import rescore, write_run

    check_writable(arguments.json, "--json")
    target = _target(arguments.to)
    if target and target.exists() and target.resolve() == Path(arguments.predictions).resolve():
        raise UserError(f"--to vlmevalkit {str(target)!r} is the file that is scored. Choose another name.")
    check_folder(arguments.output, "--output")
    done = rescore(
        arguments.predictions, arguments.benchmark, data=arguments.data, protocol=arguments.protocol,
        allow_partial=arguments.allow_partial, judge=_judge(arguments.judge, arguments.judge_model, arguments.output),
    )  # fmt: skip
    written = [] if target is None else [_convert(target, done)]
    if arguments.output:
        written.append(f"scores: {write_run(Path(arguments.output), done)}")
    if arguments.json:
        from vlm_dft.runs import write_json

        write_json(Path(arguments.json), done.results)
    for line in done.said:
        echo(printable(line))
    for table in evaluation_tables(_report(done.results), rest="--json", most=SHOWN):
        echo(table)
    for line in written:
        echo(line)
    return 0


def _report(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results as a report of one run, as evaluation_tables takes it."""
    label = str(results["model"])
    splits = {name: {"runs": {label: found}, "comparisons": []} for name, found in results["splits"].items()}
    return {"runs": {label: {}}, "benchmarks": {str(results["benchmark"]): splits}}


def _target(words: list[str] | None) -> Path | None:
    """The file to convert to, checked before the work."""
    if words is None:
        return None
    from vlm_dft.cards import nearest

    format, file = words
    if format not in WRITTEN:
        raise UserError(f"--to {format!r}: unknown format.{nearest(format, WRITTEN)} Known: {', '.join(WRITTEN)}.")
    if Path(file).suffix.lower() not in (".xlsx", ".tsv"):
        raise UserError(f"--to {format} {file!r}: expected a name that ends in .xlsx or .tsv.")
    check_writable(file, f"--to {format}")
    return Path(file)


def _convert(target: Path, done: Any) -> str:
    """Write VLMEvalKit's file, and read it back: whether every response is there as it was, in words."""
    from vlm_dft.foreign_predictions import read_predictions
    from vlm_dft.vlmevalkit_files import write_vlmevalkit

    written = write_vlmevalkit(target, done.matched.pairs)
    back = [said.response for said in read_predictions(target).predictions]
    first = {sample.id: said.response for sample, said in reversed(done.matched.pairs)}
    kept = [first[sample_id] for sample_id in dict.fromkeys(sample.id for sample, _ in done.matched.pairs)]
    differ = sum(a != b for a, b in zip(back, kept, strict=True))
    draws = f"; {written['draws left out']:,} further draws left out" if written["draws left out"] else ""
    changed = (
        f"; {differ:,} read back differently: they hold what a text file cannot" if differ else ", read back the same"
    )
    return f"{target}: {written['rows']:,} rows for VLMEvalKit{changed}{draws}"


def _judge(url: str | None, model: str | None, output: str | None) -> Any:
    """The judge, if one is named; its replies are kept in the output folder, else in the cache's."""
    if (url is None) != (model is None):
        raise UserError("A judge needs both --judge URL and --judge-model MODEL.")
    if url is None:
        return None
    from vlm_dft.embedded.drawn import cache_root
    from vlm_dft.judge import Judge

    return Judge(url, str(model), (Path(output) if output else cache_root()) / "judge")
