"""Compare command: the words of `vlm-dft compare` in; tables, sentences and report files out, exit status returned."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_dft.commands import check_folder, check_writable, echo
from vlm_dft.errors import UserError, printable

DESCRIPTION = """Compare runs sample by sample: an OUTPUT of `evaluate`, a benchmark's folder in it, an objective's folder, or an OUTPUT of `train`,
which stands for its base model and every objective. Name a run with label=FOLDER; the same label again is another seed of it. Nothing is
generated or scored again."""


def add_compare(commands: Any) -> None:
    """Add `compare` to the parser's commands. Imports nothing heavy."""
    compare = commands.add_parser(
        "compare", help="compare evaluated runs: paired tests, intervals, samples needed", description=DESCRIPTION
    )
    compare.add_argument("runs", nargs="+", metavar="RUN", help="a folder, or label=FOLDER")
    compare.add_argument("--baseline", metavar="LABEL", help="the run to compare with (default: base, or the first)")
    compare.add_argument(
        "--rule",
        choices=("official", "robust"),
        default="official",
        help="whose verdicts to conclude from (default official)",
    )
    compare.add_argument(
        "--common", action="store_true", help="compare on the samples that all runs have, if they differ"
    )
    compare.add_argument("--mixed", action="store_true", help="compare although protocol, decoding or length differ")
    compare.add_argument(
        "--data", action="append", default=[], metavar="DIR",
        help="the benchmark's files, for the page's questions (default: as evaluated); NAME=DIR for one benchmark, repeated",
    )  # fmt: skip
    compare.add_argument("--json", metavar="FILE", help="write the report here")
    compare.add_argument("--html", metavar="FILE", help="write the page here")
    compare.add_argument("--output", metavar="DIR", help="write report.json and report.html into this folder")
    compare.set_defaults(run=compare_command)


def compare_command(arguments: argparse.Namespace) -> int:
    from vlm_dft.comparing import compare_runs, read_runs

    for flag in ("json", "html"):
        check_writable(getattr(arguments, flag), f"--{flag}")
    check_folder(arguments.output, "--output")
    runs = read_runs(arguments.runs)
    output = Path(arguments.output) if arguments.output else None
    if output is not None:
        _check_output(output, runs)
    report = compare_runs(runs, baseline=arguments.baseline, common=arguments.common, mixed=arguments.mixed)
    _show(report, arguments.rule)
    if arguments.json:
        from vlm_dft.runs import write_json

        write_json(Path(arguments.json), report)
    if arguments.html or output:
        _write_pages(report, runs, arguments, output)
    return 0


def _show(report: Mapping[str, Any], rule: str) -> None:
    from vlm_dft.conclusions import also_said, conclusion, whole_rows
    from vlm_dft.evaluation_report import evaluation_tables

    for warning in report["warnings"]:
        echo(f"warning: {printable(warning)}")
    for table in evaluation_tables(report, rest="--html"):
        echo(table)
    rows = list(whole_rows(report, rule))
    if rows:
        echo(f"\nBy the {rule} rule:")
    several = len({(benchmark, split) for benchmark, split, _ in rows}) > 1
    for benchmark, split, row in rows:
        echo(f"  {f'{benchmark}, {split}: ' if several else ''}{printable(conclusion(row))}")
        for line in also_said(report, row):
            echo(f"    {printable(line)}")
    for note in report["notes"]:
        echo(f"  {printable(note)}")


def _check_output(output: Path, runs: Mapping[str, Sequence[Any]]) -> None:
    """Raises UserError for a compared run's own folder, whose report it would replace."""
    own = {run.folder.resolve() for found in runs.values() for run in found}
    own |= {folder.parent for folder in own if (folder.parent / "config.yaml").is_file()}
    if output.resolve() in own:
        raise UserError(
            f"--output {str(output)!r} is the folder of a compared run, which has a report of its own. Choose another."
        )


def _write_pages(
    report: Mapping[str, Any], runs: Mapping[str, Sequence[Any]], arguments: Any, output: Path | None
) -> None:
    from vlm_dft.comparing import read_scores
    from vlm_dft.predictions import read_jsonl

    kept: dict[str, Any] = {"samples": _samples(report, runs, arguments.data), "scores": {}, "responses": {}}
    for label in report["runs"]:
        places = runs[label][0].benchmarks
        kept["scores"][label] = {name: read_scores(place, name) for name, place in places.items()}
        said = {name: place / "predictions.jsonl" for name, place in places.items()}
        kept["responses"][label] = {name: read_jsonl(path) for name, path in said.items() if path.is_file()}
    if arguments.html:
        from vlm_dft.evaluation_html import render_evaluation
        from vlm_dft.runs import write_text

        write_text(Path(arguments.html), render_evaluation(report, **kept))
        echo(f"page: {arguments.html}")
    if output is not None:
        from vlm_dft.evaluation_report import write_evaluation

        write_evaluation(output, report, **kept)
        echo(f"report: {output / 'report.html'}, {output / 'report.json'}")


def _samples(report: Mapping[str, Any], runs: Mapping[str, Sequence[Any]], words: list[str]) -> dict[str, Any]:
    """{benchmark: its samples}, where its files are at hand; the page has no questions and pictures of the others, which is said."""
    from vlm_dft.benchmarks import load_benchmark, read_benchmark
    from vlm_dft.evaluate_command import read_data
    from vlm_dft.file_records import samples_in
    from vlm_dft.foreign_predictions import read_predictions
    from vlm_dft.predictions import OWN

    data, found = read_data(words), {}
    for name in report["benchmarks"]:
        settings = next(run.settings[name] for seeds in runs.values() for run in seeds if name in run.settings)
        said = {key: settings[key] for key in ("limit", "protocol") if settings.get(key) is not None}
        where, source = data.get(name, data.get("")) or settings.get("data"), settings.get("source") or {}
        try:
            if where is None and source.get("format", OWN[0]) not in OWN:  # scored by what the file itself holds
                rows = read_predictions(Path(source["file"])).predictions
                found[name] = samples_in(rows, read_benchmark(name), where=source["file"])
                continue
            splits = load_benchmark(name, where, **said)
        except (UserError, OSError) as error:
            echo(f"{name}: the page has no questions and pictures ({printable(str(error))})")
        else:
            found[name] = [sample for samples in splits.values() for sample in samples]
    return found
