"""DFT against SFT, or more of the family, on the embedded model: recipes and seeds in, a table of accuracies over seeds out.

    python benchmarks/dft_against_sft.py --recipes drawn_noisy drawn_new drawn --seeds 0 1 2 --output runs/dft_against_sft
    python benchmarks/dft_against_sft.py --recipes drawn_noisy drawn_new --objectives nll dft floor deft --output runs/family

Each run is the front door itself with OBJECTIVE=dft,nll (or those named): the same start, the same order of data, the same benchmark. A
cell is the mean over seeds ± its standard error over seeds; `base` is one model, so its error is that of its samples.
Finished runs are not repeated. About 5 minutes a recipe and seed on 2 cores. Writes results.json and results.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Run what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["drawn_noisy", "drawn_new", "drawn"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", default=["dft", "nll"])
    parser.add_argument("--output", type=Path, default=Path("runs/dft_against_sft"))
    arguments, more = parser.parse_known_args()
    results: dict[str, Any] = {}
    for recipe in arguments.recipes:
        reports = [
            run(recipe, seed, arguments.output / f"{recipe}-{seed}", arguments.objectives, more)
            for seed in arguments.seeds
        ]
        results[recipe] = aggregate(reports, arguments.objectives)
    text = table(results, arguments.objectives)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (arguments.output / "results.md").write_text(text)
    print(text)


def run(recipe: str, seed: int, folder: Path, objectives: list[str], more: list[str]) -> dict[str, Any]:
    """One front-door run of all objectives; its report."""
    if not (folder / "report.json").is_file():
        words = [
            "train",
            "--recipe",
            recipe,
            "--objective",
            ",".join(objectives),
            "--seed",
            str(seed),
            "--output",
            str(folder),
            *more,
        ]
        subprocess.run([sys.executable, "-m", "vlm_dft.cli", *words], check=True)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def aggregate(reports: list[dict[str, Any]], objectives: list[str]) -> dict[str, Any]:
    """Per split and task: base, and mean and standard error over the seeds of each objective."""
    first = reports[0]
    cells: dict[str, Any] = {}
    for split, base in first["runs"]["base"].items():
        tasks = {"all": base, **base["groups"].get("task", {})}
        for task in tasks:
            row: dict[str, Any] = {
                "count": tasks[task]["count"],
                "base": [tasks[task]["accuracy"], tasks[task]["stderr"]],
            }
            for objective in objectives:
                found = [pick(report["runs"][objective][split], task) for report in reports]
                spread = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else float("nan")
                row[objective] = [statistics.mean(found), spread]
            cells[f"{split}/{task}"] = row
    return {
        "seeds": len(reports),
        "mean_p": first["gauge"]["mean_p"],
        "stderr_p": first["gauge"]["stderr_p"],
        "commit": first["versions"]["commit"],
        "steps": first["training"][objectives[0]]["steps"],
        "cells": cells,
    }


def pick(split: dict[str, Any], task: str) -> float:
    """The accuracy of a split, or of one of its tasks."""
    return float((split if task == "all" else split["groups"]["task"][task])["accuracy"])


def table(results: dict[str, Any], objectives: list[str]) -> str:
    """A Markdown table per recipe."""
    names = {"nll": "SFT (nll)", "dft": "DFT"}
    shown = ["nll", "dft"] if set(objectives) == {"nll", "dft"} else objectives
    gap = shown == ["nll", "dft"]
    lines = []
    for recipe, result in results.items():
        lines += [
            f"## {recipe}: {result['seeds']} seeds, {result['steps']} steps, mean p before training "
            f"{result['mean_p']:.3f} ± {result['stderr_p']:.3f}, commit {str(result['commit'])[:12]}",
            "",
            f"| split / task | n | base | {' | '.join(names.get(o, o) for o in shown)} |{' DFT - SFT |' if gap else ''}",
            f"|---|---|---|{'---|' * (len(shown) + gap)}",
        ]
        for name, row in result["cells"].items():
            cells = [f"{100 * row[key][0]:.1f} ± {100 * row[key][1]:.1f}" for key in ("base", *shown)]
            if gap:
                error = math.hypot(row["dft"][1], row["nll"][1])
                cells.append(f"{100 * (row['dft'][0] - row['nll'][0]):+.1f} ± {100 * error:.1f}")
            lines.append(f"| {name} | {row['count']} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
