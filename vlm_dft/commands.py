"""Commands: what the commands of `vlm-dft` share: settings of a model's view of a recipe, files checked, lines printed."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from vlm_dft.errors import UserError

RECIPE_HELP = "a card in data_recipes/, a .yaml of your own, or a .json / .jsonl of conversations"
DATA_HELP = "the folder of the recipe's files"
MODEL_HELP = "'tiny' (default), a checkpoint folder, or a hub id"
INSPECT_SETTINGS = {  # of TrainConfig and ChatCollator, checked as those of `train` are
    "max_length": "longest sample in tokens (default 4096, or the recipe's)",
    "too_long": "what becomes of longer ones: raise, drop (default), shorten_answer, downscale",
    "resize": "processor (default), or pillow",
    "min_pixels": "smallest image area after resizing",
    "max_pixels": "largest image area after resizing",
    "hosts": "hosts that images may be fetched from, separated by commas",
}


def add_settings(command: argparse.ArgumentParser) -> None:
    """The recipe, the model, the data folder and INSPECT_SETTINGS, spelt with - or as `train` spells them."""
    command.add_argument("recipe", help=RECIPE_HELP)
    command.add_argument("--model", default="tiny", help=MODEL_HELP)
    command.add_argument("--data", help=DATA_HELP)
    for name, text in INSPECT_SETTINGS.items():
        command.add_argument(*dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}")), dest=name, help=text)


def model_and_recipe(arguments: argparse.Namespace, *, places: bool = True) -> tuple[Any, dict[str, Any]]:
    """The resolved config and the recipe's card, every name looked up, and every file with `places`. Raises a UserError; nothing is loaded."""
    from vlm_dft.config import recipe_layer, resolve_config
    from vlm_dft.locate import resolve_model
    from vlm_dft.recipes import check_places, read_recipe

    given = ("recipe", "model", "data", *INSPECT_SETTINGS)
    words = {name: value for name, value in vars(arguments).items() if name in given and value is not None}
    config = resolve_config((f"recipe {arguments.recipe!r}", recipe_layer(arguments.recipe)), ("command line", words))
    card = read_recipe(config.recipe)
    resolve_model(config.model)
    if places:
        check_places(card, config.data)
    return config, card


def check_writable(path: str | None, flag: str) -> None:
    """Whether a file can be made there, before the work is done. Raises UserError."""
    if path is None:
        return
    folder = Path(path).absolute().parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {path!r}: expected the name of a file in a folder that can be written to.")


def check_folder(path: str | None, flag: str) -> None:
    """Whether a folder is there or can be made, before the work is done. Raises UserError."""
    if path is None:
        return
    whole = Path(path).absolute()
    there = next(above for above in (whole, *whole.parents) if above.exists())
    if there.is_file():
        raise UserError(f"{flag} {path!r}: {there} is a file. Expected a folder.")
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UserError(f"{flag} {path!r}: expected a folder that can be written to.")


def list_kind(arguments: argparse.Namespace) -> int:
    """Print the cards of `arguments.kind`, a line each."""
    import yaml

    from vlm_dft.cards import list_cards

    found = [
        {
            "name": name,
            **{key: card[key] for key in ("description", "licence") if key in card},
            **(_splits_of(card) if arguments.kind == "benchmark" else {}),
        }
        for name, path in list_cards(arguments.kind).items()
        for card in [yaml.safe_load(path.read_text("utf-8"))]
    ]
    width = max(len(card["name"]) for card in found)
    for card in found:
        print(f"{card['name']:<{width}} {card['description'].strip()}  [{card['licence']}]")
        if "splits" in card:
            print(f"{'':<{width}} {_splits_line(card)}")
    if arguments.json:
        from vlm_dft.runs import write_json

        write_json(Path(arguments.json), found)
    return 0


def _splits_of(card: dict[str, Any]) -> dict[str, Any]:
    """What a benchmark card says of its splits' rows and its protocols, for the list."""
    return {
        "splits": {split: said.get("rows") for split, said in card["splits"].items()},
        "default": card.get("default", list(card["splits"])),
        "protocols": list(card.get("protocols", ["official"])),
    }


def _splits_line(card: dict[str, Any]) -> str:
    """ "test 3,040 rows (mathvision:testmini 304); protocols official, direct": what a name means, and what else there is."""
    rows = {split: "?" if count is None else f"{count:,}" for split, count in card["splits"].items()}
    meant = ", ".join(f"{split} {rows[split]}" for split in card["default"])
    others = ", ".join(f"{card['name']}:{split} {rows[split]}" for split in rows if split not in card["default"])
    protocols = f"; protocols {', '.join(card['protocols'])}" if len(card["protocols"]) > 1 else ""
    return f"{meant} rows{f' ({others})' if others else ''}{protocols}"


def echo(text: Any) -> None:
    """Print a line or a rich table, on the first process only. A reader that has gone, as `| head` does, ends the printing, not the work."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    try:
        if isinstance(text, str):
            print(text, flush=True)
        else:
            from rich.console import Console

            console = Console(width=None if sys.stdout.isatty() else 160)
            with console.capture() as found:
                console.print(text)
            print(found.get(), end="", flush=True)
    except BrokenPipeError:
        print_no_more()


def print_no_more() -> None:
    """Send what is printed from now on nowhere: nobody reads it."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def quiet() -> None:
    """Keep libraries' progress bars of loading out of the way of ours; their warnings stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated")  # peft asks by the old name
