"""The words of `vlm-dft recipes prepare` in; a recipe prepared, and its account in the terminal, out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_dft.commands import add_settings, check_writable, echo, model_and_recipe, quiet
from vlm_dft.errors import ConfigError, UserError


def add_prepare(commands: Any) -> None:
    """Add `prepare` to the sub-commands of `recipes`."""
    prepare = commands.add_parser(
        "prepare",
        help="write a recipe as shards that train without its files, once and for all processes",
        description="Read every row of a recipe, measure it, and write the examples with their pictures into parquet shards, with the account of "
        "every row. Killed, the same command goes on; done, it has nothing to do; of two at once the second waits. Train on the folder or URL as "
        "on any recipe: vlm-dft train --recipe DIR.",
    )
    add_settings(prepare)
    prepare.add_argument(
        "--output",
        metavar="DIR|URL",
        help="a folder, or a URL that fsspec knows (s3://, gs:// ...); default: in the cache",
    )
    prepare.add_argument("--workers", type=int, help="processes beside this one (default: one for each core but one)")
    prepare.add_argument("--limit", type=int, help="only the first rows")
    prepare.add_argument(
        "--bad-rows",
        choices=("refuse", "drop"),
        help="rows that cannot be used: refuse (default, or the recipe's) or drop",
    )
    prepare.add_argument("--json", metavar="FILE", help="write what was made, and the account, here too")
    prepare.set_defaults(run=run_prepare)


def run_prepare(arguments: argparse.Namespace) -> int:
    """Run the command. Returns the exit status."""
    config, card = model_and_recipe(arguments)
    if "mixture" in card:
        raise UserError(
            f"Recipe {card['name']!r} is a mixture, which is drawn when it is trained on. Prepare its sources one by one, and name the "
            f"folders as `recipe:` in a copy of the card. Sources: {', '.join(entry['name'] for entry in card['mixture'])}."
        )
    for flag, least in (("limit", 1), ("workers", 0)):
        value = getattr(arguments, flag)
        if value is not None and value < least:
            raise ConfigError(f"--{flag} must be at least {least}, found {value}.")
    check_writable(arguments.json, "--json")
    quiet()
    from vlm_dft.ingredients import cache_folder
    from vlm_dft.models import load_processor
    from vlm_dft.preparing import prepare
    from vlm_dft.runs import write_json
    from vlm_dft.training import make_collator

    processor = load_processor(config.model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    collator = make_collator(processor, config, packing=False)
    output = arguments.output or str(cache_folder(card, config.data, collator=collator, limit=arguments.limit))
    workers = max(1, (os.cpu_count() or 2) - 1) if arguments.workers is None else arguments.workers
    echo(f"{config.recipe}, measured with the processor of {config.model}, into {output}")
    found = prepare(
        card, config.data, output, collator=collator, workers=workers, limit=arguments.limit,
        bad_rows=arguments.bad_rows, echo=echo,
    )  # fmt: skip
    for line in account_lines(found):
        echo(line)
    if arguments.json:
        write_json(Path(arguments.json), {"output": output, **found})
    return 0


def account_lines(found: Mapping[str, Any]) -> list[str]:
    """What prepared.json says, for a person: every row of the recipe is in one of these lines."""
    account = found["accounting"]
    size = sum(shard["bytes"] for shard in found["shards"])
    shards = f"{len(found['shards'])} shard{'s' * (len(found['shards']) != 1)}"
    lines = [f"{account['read']:,} rows read, {account['used']:,} used, in {shards} of {size / 1e6:,.1f} MB in all"]
    for title, found_rows in (("dropped", account["dropped"]), ("changed", account["changed"])):
        for reason, rows in found_rows.items():
            ids = ", ".join(rows["ids"][:5]) + " ..." * (rows["rows"] > 5)
            lines.append(f"  {title}: {rows['rows']:,} {reason} ({ids})")
    lines += [f"  noted: {rows:,} {note}" for note, rows in account["notes"].items()]
    if tokens := account["tokens"]:
        lines.append(
            f"  {tokens['all']:,} tokens, of them {tokens.get('media', 0):,} of media and {tokens.get('response', 0):,} of responses"
        )
    return [*lines, f"  fingerprint {found['fingerprint'][:12]}"]
