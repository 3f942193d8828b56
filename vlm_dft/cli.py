"""Command line: words in, one of the package's functions called, its result printed."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_dft import __version__
from vlm_dft.cards import nearest
from vlm_dft.commands import (
    DATA_HELP,
    RECIPE_HELP,
    add_settings,
    check_writable,
    echo,
    list_kind,
    model_and_recipe,
    print_no_more,
    quiet,
)
from vlm_dft.compare_command import add_compare
from vlm_dft.errors import RowError, UserError, first_to_say, printable
from vlm_dft.evaluate_command import add_evaluate
from vlm_dft.recipes_command import add_recipes
from vlm_dft.score_command import add_score

ENDED_BY_USER = 130  # the shell's exit status for an interrupt
BROKEN_PIPE = 141  # and for output that nobody reads any more
OF_THE_PLACE = {
    errno.ENOSPC,
    errno.EFBIG,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
}  # faults of a disk or folder, not of ours
TRAIN_FLAGS = {  # the settings that `vlm-dft train --help` names; every other field is a flag too
    "model": "'tiny', a folder, or a hub id",
    "recipe": RECIPE_HELP,
    "data": DATA_HELP,
    "objective": "dft, nll, floor(minimum=0.1) ..., or several: dft,nll",
    "benchmark": "a card in eval/, or none",
    "output": "the run folder",
    "lora": "rank of LoRA; 0 trains the weights themselves",
    "engine": "zero2, zero3, zero3_offload, fsdp2 or a JSON file",
    "nproc": "training processes, one a GPU",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vlm-dft`. Returns the exit status: 0, 2 for an error the user can put right, 130 after an interrupt, 143 after SIGTERM."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        given = words
        words, settings = _take_settings(words) if words[:1] == ["train"] else (words, {})
        arguments = _parser().parse_args(words)
        arguments.settings, arguments.words = settings, given
        status = int(arguments.run(arguments) or 0)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        print_no_more()
        return BROKEN_PIPE
    except UserError as error:
        if hasattr(error, "status"):  # stopped by a signal: not a mistake
            if int(os.environ.get("RANK", "0")) == 0:
                print(str(error), file=sys.stderr)
            return int(error.status)
        message = str(error)
        if "Original Traceback" in message:  # a data loader's worker sends its own along
            message = message.rsplit(f"{type(error).__name__}: ", 1)[-1].rstrip()
        if not first_to_say(message):
            return 2
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        who = "" if rank == "0" else f" (process {rank} of {world})"
        print(f"error{who}: {printable(message)}", file=sys.stderr)
        if isinstance(error, RowError) and words[:1] == ["train"]:
            print(
                "`vlm-dft inspect` shows rows with their tokens or what is wrong with them (-n, --start).",
                file=sys.stderr,
            )
        return 2
    except OSError as error:
        if error.errno not in OF_THE_PLACE:
            raise
        print(
            f"error: {printable(f'{error.filename}: ' if error.filename else '')}{error.strerror}. Free space, or name another place.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        goes_on = {
            "train": " The same command continues from the last checkpoint.",
            "evaluate": " The same command goes on from the last response.",
        }
        print(f"\nInterrupted.{goes_on.get(words[0], '')}", file=sys.stderr)
        return ENDED_BY_USER


class _Parser(argparse.ArgumentParser):
    """A parser, of a command too, that names the nearest flag to one that there is not."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
            known = re.findall(r"(?<!\S)\[?(--[\w-]+)", self.format_usage())
            self.error(f"unrecognized arguments: {' '.join(rest)}.{''.join(nearest(flag, known) for flag in flags)}")
        return found, rest


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vlm-dft", description="Fine-tune vision-language models with Dynamic Fine-Tuning.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"vlm-dft {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train, evaluate before and after, report",
        description="Train, evaluate before and after, and report. Settings come from the recipe, the YAML file and the "
        "command line, the later winning. Any field of TrainConfig (vlm_dft/config.py) and of transformers' "
        "TrainingArguments may follow as --name value. Exit status: 0 done; 2 an error to put right; 143 ended by SIGTERM, 130 by "
        "Ctrl-C (in training: after saving the step), and the same command continues.",
    )
    train.add_argument("config", nargs="?", help="a YAML file of settings")
    for name, text in TRAIN_FLAGS.items():
        train.add_argument(f"--{name}", help=text, dest="processes" if name == "nproc" else name)
    train.add_argument("--dry-run", action="store_true", help="print the resolved run; load and download nothing")
    train.add_argument("--json", metavar="FILE", help="write the report, or the numbers of the dry run, here too")
    train.set_defaults(run=_train)

    add_evaluate(commands)
    add_score(commands)
    add_compare(commands)

    inspect = commands.add_parser(
        "inspect",
        help="show samples as the model sees them, and which tokens are trained",
        description="Show samples as the model sees them: every token by the reason why it is or is not trained. Settings "
        "are the recipe's, then the command line's. Exit status 1 if a row cannot be trained on.",
    )
    add_settings(inspect)
    inspect.add_argument("-n", "--limit", type=int, default=5, help="rows to show (default 5)")
    inspect.add_argument("--start", type=int, default=0, help="the first row to show (default 0)")
    inspect.add_argument("--full", action="store_true", help="do not shorten long prompts")
    inspect.add_argument("--html", metavar="FILE", help="write a page with pictures, every token to be pointed at")
    inspect.add_argument("--json", metavar="FILE", help="write the mask report and the failures here too")
    inspect.set_defaults(run=_inspect)

    probe = commands.add_parser(
        "probe",
        help="gauge a model on a recipe before any training: which objective fits?",
        description="The capability gauge: the model's probability p of the response tokens, per source, with each picture and "
        "with a blank one; recommends an objective per source. Trains nothing.",
    )
    add_settings(probe)
    probe.add_argument(
        "-n", "--count", type=int, default=256, help="responses of each source, spread evenly over it (default 256)"
    )
    probe.add_argument("--json", metavar="FILE", help="write everything that was found here")
    probe.add_argument("--plot", metavar="FILE", help="write the histograms of p as an SVG picture")
    probe.set_defaults(run=_probe)

    export = commands.add_parser(
        "export",
        help="write a checkpoint as a plain Hugging Face folder; --merge merges LoRA, with proof",
        description="Write a run's best or last checkpoint as a folder that transformers loads with nothing of ours: weights, "
        "processor, generation settings, chat template and a model card of facts. Logits on pictures, parameter names and what "
        "was not trained are checked; nothing is written where they differ, and nothing is overwritten.",
    )
    export.add_argument("source", metavar="RUN", help="a run folder, an objective's folder in it, or a checkpoint")
    export.add_argument("output", metavar="OUT", help="a folder that does not exist yet, or is empty")
    export.add_argument("--merge", action="store_true", help="merge a LoRA adapter into its base model")
    export.add_argument("--dtype", help="fp32 or bf16; the checkpoint's or the base's unless given")
    export.add_argument("--json", metavar="FILE", help="write what was checked here")
    export.set_defaults(run=_export)

    add_recipes(commands)

    benchmarks = commands.add_parser("benchmarks", help="list the benchmark cards")
    benchmarks.add_argument("--json", metavar="FILE", help="write the list here too")
    benchmarks.set_defaults(run=list_kind, kind="benchmark")
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from vlm_dft.config import read_config_file, recipe_layer, resolve_config

    words = {k: v for k, v in vars(arguments).items() if v is not None and k in (*TRAIN_FLAGS, "processes")}
    words |= arguments.settings
    file = read_config_file(arguments.config) if arguments.config else {}
    recipe = str(words.get("recipe", file.get("recipe", "drawn")))
    layers: list[tuple[str, Mapping[str, Any]]] = [
        (f"recipe {recipe!r}", recipe_layer(recipe)),
        (arguments.config or "configuration file", file),
        ("command line", words),
    ]
    config = resolve_config(*layers)

    from vlm_dft.preflight import check_run

    check_writable(arguments.json, "--json")
    plan = check_run(config, dry_run=arguments.dry_run)
    if arguments.dry_run:
        from vlm_dft import dry_run

        found = dry_run.look_ahead(plan, arguments.words)
        print(dry_run.describe(plan, found))
        _write_json(arguments.json, found)
        return 0
    quiet()
    from vlm_dft.pipeline import run

    _write_json(arguments.json, run(plan, echo=echo))
    return 0


def _write_json(path: str | None, found: Mapping[str, Any]) -> None:
    if path and found:  # of several processes only the first has a report
        from vlm_dft.runs import write_json

        write_json(Path(path), found)


def _take_settings(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split --name value and --name=value of settings that argparse does not name from the rest of the words.

    A name without a value means true. argparse alone would take the value of an unknown flag for a positional word.
    """
    kept: list[str] = []
    settings: dict[str, str] = {}
    k = 0
    while k < len(words):
        name, equals, value = words[k].removeprefix("--").partition("=")
        if words[k] == "--dry_run":  # as every other setting may be spelt
            kept.append("--dry-run")
        elif not words[k].startswith("--") or name in (*TRAIN_FLAGS, "json", "dry-run", "help"):
            kept.append(words[k])
            if words[k].startswith("--") and name in (*TRAIN_FLAGS, "json") and not equals and k + 1 < len(words):
                k += 1
                kept.append(words[k])
        else:
            if not equals:
                more = k + 1 < len(words) and not words[k + 1].startswith("--")
                value, k = (words[k + 1], k + 1) if more else ("true", k)
            settings[name.replace("-", "_")] = value
        k += 1
    return kept, settings


def _inspect(arguments: argparse.Namespace) -> int:
    config, card = model_and_recipe(arguments)
    if arguments.limit < 1 or arguments.start < 0:
        raise UserError(
            f"Expected -n of at least 1 and --start of at least 0, found {arguments.limit}, {arguments.start}."
        )
    for flag in ("html", "json"):
        check_writable(getattr(arguments, flag), f"--{flag}")
    quiet()
    from rich.console import Console

    from vlm_dft import inspection
    from vlm_dft.models import load_processor
    from vlm_dft.runs import write_json, write_text
    from vlm_dft.training import make_collator

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # where it cannot show a character, its number
    console = Console(highlight=False, soft_wrap=True)
    processor = load_processor(config.model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    rows = []
    console.print(inspection.draw_legend(), end="\n\n")
    collator = make_collator(processor, config, packing=False)
    for row in inspection.inspect_rows(card, config.data, collator, start=arguments.start, count=arguments.limit):
        rows.append(row)
        console.print(inspection.draw_row(row, f"row {arguments.start + len(rows) - 1}", full=arguments.full))
    console.print(inspection.draw_summary(rows))
    if arguments.json:
        write_json(Path(arguments.json), inspection.report_json(rows))
    if arguments.html:
        from vlm_dft.inspect_html import render_page

        write_text(Path(arguments.html), render_page(rows, config, collator, start=arguments.start))
        console.print(f"page: {arguments.html}", markup=False)
    return int(any(row.failed for row in rows))


def _probe(arguments: argparse.Namespace) -> int:
    config, card = model_and_recipe(arguments)
    if arguments.count < 1:
        raise UserError(f"Expected -n of at least 1, found {arguments.count}.")
    for flag in ("json", "plot"):
        check_writable(getattr(arguments, flag), f"--{flag}")
    quiet()
    from vlm_dft import probe_report
    from vlm_dft.pipeline import probe
    from vlm_dft.runs import write_json, write_text

    found = probe(config, card, count=arguments.count, echo=echo)
    echo(probe_report.probe_table(found))
    for line in probe_report.probe_lines(found):
        echo(line)
    if arguments.json:
        write_json(Path(arguments.json), found)
    if arguments.plot:
        title = f"{config.model} on {Path(config.recipe).stem}, before training"
        write_text(Path(arguments.plot), probe_report.probe_plot(found, title))
        echo(f"plot: {arguments.plot}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    check_writable(arguments.json, "--json")
    quiet()
    from vlm_dft.export import export
    from vlm_dft.runs import write_json

    found = export(arguments.source, Path(arguments.output), merge=arguments.merge, dtype=arguments.dtype, echo=echo)
    if arguments.json:
        write_json(Path(arguments.json), found)
    echo(f"{found['output']}: {found['bytes'] / 1e6:,.1f} MB")
    return 0


if __name__ == "__main__":
    status = main()
    if int(os.environ.get("RANK", "0")) > 0:
        # A thread of gloo that still drops a tensor when Python is taken down aborts, and torchrun then kills the first
        # process in its evaluation. These processes have written nothing that is still to be closed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
