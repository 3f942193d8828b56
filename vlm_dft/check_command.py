"""The words of `vlm-dft recipes check` in; a recipe's rows, or those of each source of a mixture, looked at, and the exit status, out."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dft.commands import add_settings, check_writable, echo, model_and_recipe, quiet
from vlm_dft.errors import UserError

if TYPE_CHECKING:
    from vlm_dft.check_report import Findings
    from vlm_dft.collators import ChatCollator
    from vlm_dft.config import TrainConfig
    from vlm_dft.contamination import Items
    from vlm_dft.mixture_cards import Source

SAMPLE = 1000  # rows looked at unless told otherwise


def add_check(commands: Any) -> None:
    """Add `check` to the sub-commands of `recipes`."""
    check = commands.add_parser(
        "check",
        help="look at a recipe's rows before training: faults, tokens, duplicates, contamination",
        description="Look at rows of a recipe, or of each source of a mixture: what cannot be used and why, tokens, pictures (each "
        "decoded once), duplicates, and what is shared with benchmarks. Nothing is changed. Exit status: 0 every row can be used; "
        "1 some cannot; 2 an error to put right first.",
    )
    add_settings(check)
    rows = check.add_mutually_exclusive_group()
    rows.add_argument(
        "-n",
        "--limit",
        type=int,
        help=f"rows to look at of each source, spread evenly where their number is cheap to know (default {SAMPLE:,})",
    )
    rows.add_argument("--all", action="store_true", help="look at every row")
    check.add_argument(
        "--workers", type=int, help="processes beside this one (default: one a core, if there are several)"
    )
    check.add_argument(
        "--against",
        nargs="+",
        metavar="BENCHMARK",
        help="benchmark cards to compare with, or none (default: all that can be read)",
    )
    check.add_argument(
        "--benchmark-data",
        "--benchmark_data",
        metavar="DIR",
        help="the folder of the benchmarks' files (default: the folders of the recipe's)",
    )
    check.add_argument("--html", metavar="FILE", help="write a page with plots and pictures")
    check.add_argument("--json", metavar="FILE", help="write everything that was found here")
    check.set_defaults(run=run_check)


def run_check(arguments: argparse.Namespace) -> int:
    """Run the command. Returns the exit status."""
    config, card = model_and_recipe(arguments, places=False)
    for name, least in (("limit", 1), ("workers", 0)):
        given = getattr(arguments, name)
        if given is not None and given < least:
            raise UserError(f"Expected {'-n' if name == 'limit' else '--workers'} of at least {least}, found {given}.")
    for flag in ("html", "json"):
        check_writable(getattr(arguments, flag), f"--{flag}")
    against = _benchmarks(arguments.against)
    from vlm_dft.mixture_cards import sources_in
    from vlm_dft.recipes import recipe_root, said_format, said_source

    sources, not_checked = sources_in(card, config.data), dict[str, str]()
    for source in sources:
        try:
            recipe_root(source.card, source.data)
        except UserError as error:
            not_checked[source.name] = str(error)
    if len(not_checked) == len(sources):
        raise UserError(next(iter(not_checked.values())))
    quiet()
    from vlm_dft.check_report import mixture_report, report
    from vlm_dft.check_tables import mixture_tables, tables
    from vlm_dft.contamination import reachable
    from vlm_dft.models import load_processor
    from vlm_dft.runs import write_json, write_text
    from vlm_dft.training import make_collator

    processor = load_processor(config.model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    collator = make_collator(processor, config, packing=False)
    collator.max_length = None  # what is too long is looked at too
    workers = _workers() if arguments.workers is None else arguments.workers
    folders = dict.fromkeys([arguments.benchmark_data or source.data for source in sources])
    compared, unread = reachable(
        against, *folders, access=collator.access, workers=workers,
        reading=lambda name: echo(f"reading benchmark {name}"),
    )  # fmt: skip
    every, origins = list[Any](), list[dict[str, str]]()
    for source in sources:
        if source.name in not_checked:
            continue
        try:
            said = {
                "read_from": said_source(source.card, source.data),
                "format": said_format(source.card, source.data),
            }
            echo(f"{source.name}: rows of {said['read_from']}; format {said['format']}")
            every.append(_look_at(source, config, collator, arguments, workers, compared, unread))
            origins.append(said)
        except UserError as error:
            not_checked[source.name] = str(error)
            if "mixture" not in card:
                raise
    reports = [{**report(findings), **said} for findings, said in zip(every, origins, strict=True)]
    mixture = mixture_report(card, every, reports, not_checked) if "mixture" in card else None
    if arguments.json:
        write_json(Path(arguments.json), mixture or reports[0])
    if arguments.html:
        from vlm_dft.check_html import render_page

        write_text(Path(arguments.html), render_page(list(zip(reports, every, strict=True)), mixture))
    for found in reports:
        for part in tables(found, titled=mixture is not None):
            echo(part)
    for part in mixture_tables(mixture) if mixture else ():
        echo(part)
    if arguments.html:
        echo(f"page: {arguments.html}")
    faulty = any(findings.checked.faulty or findings.checked.stopped for findings in every)
    return 2 if not_checked else int(faulty)


def _look_at(
    source: Source, config: TrainConfig, collator: ChatCollator, arguments: argparse.Namespace, workers: int,
    compared: list[Items], unread: dict[str, str],
) -> Findings:  # fmt: skip
    """Look at the rows of one source."""
    from vlm_dft.bars import Bar
    from vlm_dft.check_report import Findings
    from vlm_dft.checking import check, count_rows, spread

    card, data = {**source.card, "name": source.name}, source.data
    total = count_rows(card, data)
    limit = None if arguments.all else arguments.limit or SAMPLE
    only = spread(total, limit) if total is not None and limit is not None and total > limit else None
    expected = total or int(card.get("rows") or 0) or None
    title = f"checking {source.name}" if source.mixed else "checking"
    with Bar(expected if limit is None else min(limit, total or limit), title, "row") as bar:
        checked = check(
            card, data, collator=collator, access=collator.access, workers=workers,
            limit=None if only is not None else limit, only=only,
            progress=lambda rows: bar.update(1 if only is not None and rows else rows),
        )  # fmt: skip
    if checked.stopped and not checked.read:  # a hub out of reach: no report of nothing
        raise UserError(checked.stopped)
    return Findings(
        card, replace(config, data=data), checked, _how(total, limit, checked.read), compared, unread,
        asked=_benchmarks(arguments.against) != [],
    )  # fmt: skip


def _benchmarks(against: list[str] | None) -> list[str] | None:
    """The benchmarks asked for: None for all that can be read, an empty list for none. Each card is read. Raises UserError."""
    if against is None or against == ["none"]:
        return None if against is None else []
    from vlm_dft.benchmarks import read_benchmark

    for name in against:
        read_benchmark(name)
    return list(dict.fromkeys(against))


def _how(total: int | None, limit: int | None, read: int) -> str:
    """Which rows were looked at, in words."""
    if limit is None or (total is not None and total <= limit) or (total is None and read < limit):
        return "all"
    return (
        f"a sample spread evenly over {total:,}"
        if total is not None
        else f"the first {limit:,}; their number is not known"
    )


def _workers() -> int:
    from vlm_dft.workers import cores

    return found if (found := cores()) > 1 else 0
