"""Recipes command: the words of `vlm-dft recipes [list | check | prepare]` in; cards listed, rows checked or prepared, exit status out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_dft.commands import add_settings, check_writable, echo, list_kind, model_and_recipe, quiet
from vlm_dft.errors import UserError
from vlm_dft.prepare_command import add_prepare

SAMPLE = 1000  # rows looked at unless told otherwise


def add_recipes(commands: Any) -> None:
    """Add `recipes` and what follows it to the parser's commands. Imports nothing heavy."""
    recipes = commands.add_parser(
        "recipes",
        help="list the recipe cards; check or prepare a recipe's rows",
        description="Without a further word: list the recipe cards.",
    )
    recipes.add_argument("--json", metavar="FILE", help="write the list here too")
    recipes.set_defaults(run=list_kind, kind="recipe")
    more = recipes.add_subparsers(title="commands", metavar="COMMAND")
    listing = more.add_parser("list", help="list the recipe cards")
    listing.add_argument("--json", metavar="FILE", help="write the list here too")
    listing.set_defaults(run=list_kind, kind="recipe")
    _add_check(more)
    add_prepare(more)


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="look at a recipe's rows before training: faults, tokens, duplicates, contamination",
        description="Look at rows of a recipe: what cannot be used and why, tokens, pictures (each decoded once), duplicates, and "
        "what is shared with benchmarks. Nothing is changed. Exit status: 0 every row can be used; 1 some cannot; 2 an error to "
        "put right first.",
    )
    add_settings(check)
    rows = check.add_mutually_exclusive_group()
    rows.add_argument(
        "-n",
        "--limit",
        type=int,
        help=f"rows to look at, spread evenly where their number is cheap to know (default {SAMPLE:,})",
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
        help="the folder of the benchmarks' files (default: --data)",
    )
    check.add_argument("--html", metavar="FILE", help="write a page with plots and pictures")
    check.add_argument("--json", metavar="FILE", help="write everything that was found here")
    check.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    config, card = model_and_recipe(arguments)
    if "mixture" in card:
        raise UserError(
            f"Recipe {card['name']!r} is a mixture. Check its sources one by one: vlm-dft recipes check NAME. Sources: "
            f"{', '.join(str(one.get('recipe', one) if isinstance(one, Mapping) else one) for one in card['mixture'])}."
        )
    for name, least in (("limit", 1), ("workers", 0)):
        given = getattr(arguments, name)
        if given is not None and given < least:
            raise UserError(f"Expected {'-n' if name == 'limit' else '--workers'} of at least {least}, found {given}.")
    for flag in ("html", "json"):
        check_writable(getattr(arguments, flag), f"--{flag}")
    against = _benchmarks(arguments.against)
    quiet()
    from vlm_dft.bars import Bar
    from vlm_dft.check_report import Findings, report
    from vlm_dft.check_tables import tables
    from vlm_dft.checking import check, count_rows, spread
    from vlm_dft.contamination import reachable
    from vlm_dft.models import load_processor
    from vlm_dft.recipes import said_format, said_source
    from vlm_dft.runs import write_json, write_text
    from vlm_dft.training import make_collator

    processor = load_processor(config.model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    collator = make_collator(processor, config, packing=False)
    collator.max_length = None  # what is too long is looked at too
    workers = _workers() if arguments.workers is None else arguments.workers
    compared, unread = reachable(
        against, arguments.benchmark_data or config.data, access=collator.access, workers=workers,
        reading=lambda name: echo(f"reading benchmark {name}"),
    )  # fmt: skip
    place, form = said_source(card, config.data), said_format(card, config.data)
    echo(f"rows of {place}; format {form}")
    total = count_rows(card, config.data)
    limit = None if arguments.all else arguments.limit or SAMPLE
    only = spread(total, limit) if total is not None and limit is not None and total > limit else None
    with Bar(
        total or int(card.get("rows") or 0) if limit is None else min(limit, total or limit), "checking", "row"
    ) as bar:
        checked = check(
            card, config.data, collator=collator, access=collator.access, workers=workers,
            limit=None if only is not None else limit, only=only,
            progress=lambda rows: bar.update(1 if only is not None and rows else rows),
        )  # fmt: skip
    findings = Findings(card, config, checked, _how(total, limit, checked.read), compared, unread, asked=against != [])
    found = {**report(findings), "read_from": place, "format": form}
    for part in tables(found):
        echo(part)
    if arguments.json:
        write_json(Path(arguments.json), found)
    if arguments.html:
        from vlm_dft.check_html import render_page

        write_text(Path(arguments.html), render_page(found, findings, arguments.benchmark_data or config.data))
        echo(f"page: {arguments.html}")
    return int(bool(checked.faulty or checked.stopped))


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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if cores > 1 else 0
