"""Published scores: official output files in; each re-scored by our rules, beside the number that its authors published.

    python benchmarks/published.py [--data ../shared/data] [--gold ../shared/data/scoring_gold] [--markdown benchmarks/published.md]

MathVista: every results/**/output_*.json, from the stored extraction (GPT made it; the rest of the official code is rules), by
today's rule for integers, int(float(x)), and by the one that the published numbers were made with, int(x). MATH-V: every
outputs/**/*.jsonl, from the response. A file is compared with the published number where it holds the whole set, else with the
verdicts that are stored in it. Give the data folder of whole clones (mathvista/, mathvision/) to re-score those. About 10 s.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm_dft.chat import Sample
from vlm_dft.foreign_predictions import Prediction
from vlm_dft.official.mathvista import score_extraction
from vlm_dft.rescoring import rescore
from vlm_dft.runs import versions, write_text
from vlm_dft.scoring import score_response

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--gold", type=Path, default=ROOT.parent / "shared" / "data" / "scoring_gold")
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    published = json.loads((arguments.gold / "official_scores.json").read_text(encoding="utf-8"))
    parts = [
        mathvista_part(arguments.data / "mathvista", published["mathvista"]),
        drift_part(published["mathvista"]),
        mathvision_part(arguments.data / "mathvision", published["mathvision"]),
        cases_part(arguments.gold / "dev.jsonl"),
        others_part(published),
    ]
    text = (
        f"# Published scores, again\n\n`python benchmarks/published.py`, commit {str(versions()['commit'])[:7]}.\n\n"
        + "\n".join(parts)
    )
    print(text)
    if arguments.markdown:
        write_text(arguments.markdown, text)


def mathvista_part(folder: Path, published: Mapping[str, Row]) -> str:
    """MathVista's output files, from their stored extractions."""
    rows = []
    for path in sorted(folder.glob("results/**/output_*.json")):
        name = path.stem.removeprefix("output_")
        told = published.get(name)
        done = rescore(path, "mathvista", allow_partial=True)
        stored = [row["stored"] for row in done.rows]
        old = [correct_by_int(sample, said) for sample, said in done.matched.pairs]
        verdicts = [s["verdict"] for s in stored]
        rows.append([
            name, f"{len(stored):,}", share(verdicts), share([s["correct"] for s in stored]), share(old),
            sum(a != b for a, b in zip(old, verdicts, strict=True)), share([row["correct"] for row in done.rows]),
            against(sum(old), len(stored), told and told["published"]["average"]),
        ])  # fmt: skip
    head = [
        "run",
        "rows here",
        "stored verdicts",
        "ours, today's rule",
        "ours, int(x)",
        "differ from stored",
        "ours, end to end",
        "published",
    ]
    whole = sum(1 for row in published.values() if row["output_file"])
    return (
        "## MathVista\n\n"
        + markdown(head, rows)
        + f"\n{len(published)} scores files are published, {whole} of them with an output file in the authors' "
        f"repository; {len(rows)} of those are here. Differ from stored: by int(x), the rule of the time.\n"
    )


def correct_by_int(sample: Sample, said: Prediction) -> bool:
    """The verdict on a stored extraction by the rule that the published numbers were made with: an integer by int(x)."""
    if sample.record["answer_type"] == "integer" and not sample.record["choices"]:
        try:
            return str(int(said.extraction or "")) == sample.record["gold_answer"]
        except ValueError:
            return False
    return score_extraction(said.extraction, sample.record).correct


def drift_part(published: Mapping[str, Row]) -> str:
    """How far today's rule is from the published numbers, as counted on the whole output files."""
    rows = [
        [name, run["reagg_correct"], run["rescored_current_correct"], run["rescored_current_verdict_flips"]]
        for name, run in published.items()
        if run.get("rescored_current_verdict_flips")
    ]
    flips = sum(row[3] for row in rows)
    same = sum(1 for run in published.values() if run.get("rescored_current_verdict_flips") == 0)
    examples = [
        (text, *(score_extraction(text, {"answer_type": "integer", "gold_answer": gold}).correct, text == gold))
        for text, gold in (("7.5", "7"), ("7.0", "7"), ("7", "7"))
    ]
    shown = ", ".join(
        f"{text!r} for 7: {'right' if now else 'wrong'} now, {'right' if then else 'wrong'} then"
        for text, now, then in examples
    )
    return (
        "### Two rules for integers\n\nThe published numbers were made with `int(x)`; the authors' code has truncated since, `int(float(x))`, "
        f"and our official rule is today's ({shown}).\nOn the whole files that flips {flips} verdicts, all to right, in {len(rows)} of "
        f"{len(rows) + same} runs:\n\n" + markdown(["run", "published", "today's rule", "flips"], rows)
    )


def mathvision_part(folder: Path, published: Mapping[str, Row]) -> str:
    """MATH-V's output files, from their responses."""
    rows = []
    for path in sorted(folder.glob("outputs/**/*.jsonl")):
        done = rescore(path, "mathvision", data=str(folder), allow_partial=True)
        ours = [row["correct"] for row in done.rows]
        stored = [row["stored"]["verdict"] for row in done.rows]
        told = published.get(path.stem)
        rows.append([
            path.stem, f"{len(ours):,}", share(stored), share(ours), sum(a != b for a, b in zip(ours, stored, strict=True)),
            against(sum(ours), len(ours), told and counted(told["published_overall"])),
        ])  # fmt: skip
    sums = [sums_agree(run["published"], run["published_overall"]) for run in published.values()]
    return (
        "## MATH-V\n\n"
        + markdown(["run", "rows here", "stored verdicts", "ours, from the response", "differ", "published"], rows)
        + f"\n{len(published)} "
        f"runs are published. In {sum(sums)} of them the published counts of the five levels and of the 16 subjects add up to the overall.\n"
    )


def counted(text: str) -> Row:
    """{"correct", "total"} of '436/3040=14.34%'."""
    correct, total = text.partition("=")[0].split("/")
    return {"correct": int(correct), "total": int(total)}


def sums_agree(groups: Mapping[str, str], overall: str) -> bool:
    whole = counted(overall)
    levels = [
        counted(text) for name, text in groups.items() if name.startswith("-level") and len(name) == len("-level1")
    ]
    subjects = [counted(text) for name, text in groups.items() if "level" not in name and name != "-all"]
    return all({key: sum(c[key] for c in found) for key in whole} == whole for found in (levels, subjects))


def cases_part(path: Path) -> str:
    """Single responses of many more runs, with the verdicts that the official files store: how many of these are ours."""
    cases: dict[str, list[Row]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        cases.setdefault(case["benchmark"], []).append(case)
    vista, vision = cases["mathvista"], cases["mathvision"]
    rows = [
        ["MathVista, stored extraction", len(vista), len({case["model"] for case in vista}),
         sum(score_extraction(case["official_extraction"], case).correct != case["official_correct"] for case in vista)],
        ["MATH-V, response", len(vision), len({case["model"] for case in vision}),
         sum(score_response(case["response"], case, benchmark="mathvision").correct != case["official_correct"] for case in vision)],
    ]  # fmt: skip
    return (
        "## Responses of other runs\n\nA sample of the official output files that are not here (the gold cases): verdicts, one by one.\n\n"
        + markdown(["from", "responses", "runs", "verdicts that differ"], rows)
    )


def others_part(published: Mapping[str, Any]) -> str:
    """What else is published, and what would be needed to re-score it."""
    geometry = {name: run for name, run in published["geometry3k_intergps"].items() if isinstance(run, Mapping)}
    right = sum(
        math.isclose(
            100 * (run["solved_correct"] + math.ceil(run["unsolved"] / 4)) / 601, run["acc_with_guess"], abs_tol=0.005
        )
        for run in geometry.values()
    )
    tabmwp = [run for run in published["tabmwp"].values() if isinstance(run, Mapping)]
    same = sum(math.isclose(100 * run["correct"] / run["count"], run["published_acc"], abs_tol=6e-5) for run in tabmwp)
    rows = [
        [
            "TabMWP",
            len(tabmwp),
            same,
            "from the published counts; output files and the whole test set's problems are not here",
        ],
        [
            "LogicVista",
            len(published["logicvista"]) - 1,
            "-",
            "no scores are published: counted from the authors' result files, which are not here",
        ],
        ["DynaMath", len(published["dynamath"]), "-", "the authors' result files are not here"],
        [
            "Geometry3K (Inter-GPS)",
            len(geometry),
            right,
            "from the published counts: solved right + a quarter of the unsolved, of 601",
        ],
    ]
    return "## Others\n\n" + markdown(["benchmark", "runs", "the same again", "note"], rows)


def share(verdicts: Iterable[bool | None]) -> str:
    """'55 = 30.2 %'; a missing verdict counts as wrong."""
    listed = list(verdicts)
    return f"{sum(map(bool, listed))} = {100 * sum(map(bool, listed)) / len(listed):.1f} %" if listed else "-"


def against(correct: int, count: int, told: Mapping[str, Any] | None) -> str:
    """The published count, and whether ours is it; of a part of the set it cannot be told."""
    if not told:
        return "-"
    words = f"{told['correct']}/{told['total']} = {100 * told['correct'] / told['total']:.1f} %"
    if count != told["total"]:
        return f"{words}; not comparable: {told['total'] - count:,} rows are not here"
    return f"{words}; {'the same' if correct == told['correct'] else f'ours {correct}'}"


def markdown(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
