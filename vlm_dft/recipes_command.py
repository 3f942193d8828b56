"""Recipes command: the words of `vlm-dft recipes [list | check | prepare]` in; cards listed, rows checked or prepared, exit status out."""

from __future__ import annotations

from typing import Any

from vlm_dft.check_command import add_check
from vlm_dft.commands import list_kind
from vlm_dft.prepare_command import add_prepare


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
    add_check(more)
    add_prepare(more)
