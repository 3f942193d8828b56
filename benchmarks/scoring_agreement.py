"""Scoring agreement: the gold cases in; how often each rule says what the official verdict says, beside other graders, out.

    python benchmarks/scoring_agreement.py --data DIR [--out benchmarks/scoring_agreement.md]

DIR holds scoring_gold/ (real responses of many models with the verdicts of the benchmarks' own code). Tier A: the verdict follows from
the text of the response. Tier B: a language model guessed at what the text does not say. No GPU, under a minute.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_dft.runs import versions
from vlm_dft.scoring import Score, score_response

Case = dict[str, Any]
PEERS = (
    "VLMEvalKit, rules", "lmms-eval, rules", "lmms-eval, reasoning", "math-verify and letters", "MATH-V's code", "Qwen2.5-Math's grader",
)  # fmt: skip
"""VLMEvalKit at e8e78f0 and lmms-eval at 75571cf without their judges, lmms-eval's compute_score of reasoning tasks, math-verify at 5d148cf
with a list of letter patterns, MATH-V's official pipeline at a1f5cc3, the grader of the DFT authors' repository at e153181."""

MEASURED = """
mathvista all 85.6/0.3/43.8 69.9/11.2/69.5 73.2/0.2/82.2 86.4/0.5/40.8 76.7/0.0/71.7 96.0/0.8/10.6
mathvista float 96.0/0.0/100.0 96.0/0.0/100.0 98.8/0.0/30.0 99.6/0.0/10.0 98.0/0.0/50.0 99.6/0.0/10.0
mathvista integer 79.6/0.0/98.3 79.7/0.0/97.4 92.1/0.2/37.0 98.7/0.2/5.2 88.8/0.0/53.9 97.7/0.5/9.1
mathvista list 100.0/0.0/- 100.0/0.0/- 91.7/8.3/- 100.0/0.0/- 100.0/0.0/- 100.0/0.0/-
mathvista text 88.2/0.6/24.8 58.0/26.8/59.7 54.8/0.0/98.0 75.0/1.0/53.0 64.0/0.0/78.0 94.0/1.5/11.2
mathvista tier_B 68.1/8.3/91.0 78.7/17.3/31.3 70.6/1.2/100.0 68.9/8.9/86.6 69.4/4.2/97.0 67.2/14.3/79.1
mathvision all 95.4/0.4/18.0 100.0/0.0/0.0 88.0/0.8/48.2 93.9/1.7/20.0 100.0/0.0/0.0 95.8/1.7/12.4
mathvision choice 91.9/1.0/25.6 100.0/0.0/0.0 76.3/0.5/81.2 87.6/3.9/33.6 100.0/0.0/0.0 91.9/3.7/18.8
mathvision decimal 100.0/0.0/0.0 100.0/0.0/0.0 99.0/1.1/0.0 99.0/1.1/0.0 100.0/0.0/0.0 99.0/1.1/0.0
mathvision expression 93.3/0.0/44.8 100.0/0.0/0.0 89.2/4.2/48.3 97.4/0.0/17.2 100.0/0.0/0.0 95.4/0.0/31.0
mathvision integer 99.5/0.0/2.4 100.0/0.0/0.0 100.0/0.0/0.0 99.9/0.0/0.6 100.0/0.0/0.0 100.0/0.0/0.0
tabmwp all - - 83.5/0.2/58.7 98.0/0.5/6.0 89.2/0.0/38.9 85.0/0.0/53.9
tabmwp boolean_text - - 48.2/0.0/100.0 98.2/0.0/3.4 98.2/0.0/3.4 48.2/0.0/100.0
tabmwp decimal_number - - 93.5/0.0/45.0 100.0/0.0/0.0 97.8/0.0/15.0 95.7/0.0/30.0
tabmwp extractive_text - - 57.0/0.0/100.0 91.0/3.5/16.3 73.0/0.0/62.8 57.0/0.0/100.0
tabmwp integer_number - - 98.5/0.5/5.0 100.0/0.0/0.0 93.0/0.0/31.7 100.0/0.0/0.0
tabmwp other_text - - 61.1/0.0/93.3 94.4/0.0/13.3 58.3/0.0/100.0 66.7/0.0/80.0
logicvista all - - 77.7/0.0/100.0 88.2/1.3/48.2 88.0/0.0/54.1 89.3/10.8/10.6
logicvista letter - - 76.4/0.0/100.0 87.8/1.1/48.2 87.2/0.0/54.1 89.4/10.5/10.6
logicvista letter_multi - - 100.0/0.0/- 95.5/4.5/- 100.0/0.0/- 86.4/13.6/-
logicvista tier_B - - 66.7/0.0/100.0 66.7/0.0/100.0 66.7/0.0/100.0 61.1/8.3/100.0
"""
"""The peers' agreement % / false positives % / false negatives % from the raw response, run on these same cases beforehand in
their own environments (some need Python 3.9 and antlr 4.7); "-": the grader does not know the benchmark, or there is none to miss."""


def read(path: Path) -> list[Case]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def scored(cases: Sequence[Case], rule: str, name: str = "benchmark") -> tuple[list[Score | None], float]:
    """A Score of each case (None where the benchmark's rule is not there), and the seconds of this process's time."""
    scores: list[Score | None] = []
    begun = time.process_time()
    for case in cases:
        try:
            scores.append(score_response(case["response"], case, benchmark=case[name], rule=rule))
        except NotImplementedError:
            scores.append(None)
    return scores, time.process_time() - begun


def rates(pairs: Iterable[tuple[bool | None, bool]]) -> tuple[float, int, int, int, int] | None:
    """(agreement %, false positives, of how many officially wrong, false negatives, of how many officially right)."""
    known = [(ours, official) for ours, official in pairs if ours is not None]
    if not known:
        return None
    positives = sum(ours and not official for ours, official in known)
    negatives = sum(official and not ours for ours, official in known)
    right = sum(official for _, official in known)
    return 100 * (1 - (positives + negatives) / len(known)), positives, len(known) - right, negatives, right


def cell(found: tuple[float, int, int, int, int] | None) -> str:
    if found is None:
        return "not there"
    agreement, positives, wrong, negatives, right = found
    return f"{agreement:.1f} / {share(positives, wrong)} / {share(negatives, right)}"


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"


def kinds(cases: Sequence[Case], tier: str) -> dict[tuple[str, str], list[int]]:
    """{(benchmark, "all" or answer type): places of the cases}."""
    found: dict[tuple[str, str], list[int]] = {}
    for place, case in enumerate(cases):
        if case["tier"] == tier:
            for kind in ("all", case["answer_type"]):
                found.setdefault((case["benchmark"], kind), []).append(place)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][1] != "all", item[0][1])))


def peers_of(benchmark: str, kind: str) -> list[str]:
    for line in MEASURED.split("\n"):
        words = line.split()
        if words[:2] == [benchmark, kind.replace(" ", "_")]:
            return [word.replace("/", " / ") for word in words[2:]]
    return ["-"] * len(PEERS)


def table(cases: Sequence[Case], scores: Mapping[str, Sequence[Score | None]], tier: str) -> list[str]:
    """The agreement of both rules beside the peers'; only the whole benchmark is known of the peers on tier B."""
    lines = [
        "| benchmark, answers | n | official | robust | abstained | " + " | ".join(PEERS) + " | best peer |",
        "|---" * (6 + len(PEERS)) + "|",
    ]
    for (benchmark, kind), places in kinds(cases, tier).items():
        peers = peers_of(benchmark, kind if tier == "A" else "tier B" if kind == "all" else "unknown")
        ours = {
            rule: rates(
                (None if (score := found[place]) is None else score.correct, cases[place]["official_correct"])
                for place in places
            )
            for rule, found in scores.items()
        }
        official = ours["official"]
        known = [(float(peer.split()[0]), name) for peer, name in zip(peers, PEERS, strict=True) if peer != "-"]
        best = "-"
        if known and official is not None:
            most = max(value for value, _ in known)
            order = (
                "beaten"
                if round(official[0], 1) > most
                else "equalled"
                if round(official[0], 1) == most
                else "NOT REACHED"
            )
            best = f"{most:.1f}, {order}"
        abstained = sum((score := scores["robust"][place]) is not None and score.extracted is None for place in places)
        name = f"**{benchmark}**" if kind == "all" else f"{benchmark} {kind}"
        lines.append(
            f"| {name} | {len(places)} | {cell(official)} | {cell(ours['robust'])} | {abstained} | "
            + " | ".join(peers)
            + f" | {best} |"
        )
    return lines


def differences(cases: Sequence[Case], scores: Mapping[str, Sequence[Score | None]]) -> Iterable[str]:
    """The cases that a rule differs on from the official verdict, with what it extracted and why, to read."""
    for rule, found in scores.items():
        for case, score in zip(cases, found, strict=True):
            if score is not None and score.correct != case["official_correct"]:
                row = {"rule": rule, "correct": score.correct, "extracted": score.extracted, "why": score.rule, **case}
                yield json.dumps(row, ensure_ascii=False) + "\n"


def extraction_scorer(benchmark: str) -> Callable[..., Score] | None:
    """What scores a stored extraction, of the benchmarks whose official extraction is a language model's."""
    return getattr(importlib.import_module(f"vlm_dft.official.{benchmark}"), "score_extraction", None)


def from_extractions(cases: Sequence[Case]) -> list[str]:
    lines = [
        "| benchmark | tier | n | official rule on the stored extraction | verdicts that differ |",
        "|---" * 5 + "|",
    ]
    for benchmark in ("mathvista", "logicvista"):
        scorer = extraction_scorer(benchmark)
        for tier in "AB":
            some = [case for case in cases if case["benchmark"] == benchmark and case["tier"] == tier]
            if scorer is None or not some:
                lines.append(f"| {benchmark} | {tier} | {len(some)} | not there | |")
                continue
            pairs = [(scorer(case["official_extraction"], case).correct, case["official_correct"]) for case in some]
            differ = sum(ours != official for ours, official in pairs)
            lines.append(f"| {benchmark} | {tier} | {len(some)} | {cell(rates(pairs))} | {differ} |")
    return lines


def crossed(cases: Sequence[Case]) -> list[str]:
    """Responses to other benchmarks' questions scored by We-Math's and DynaMath's official code."""
    lines = ["| rule of | answers | n | official | differ |", "|---" * 5 + "|"]
    scores, _ = scored(cases, "official", "protocol")
    for protocol, kind in sorted({(case["protocol"], case["answer_type"]) for case in cases}):
        pairs = [
            (None if score is None else score.correct, case["official_correct"])
            for score, case in zip(scores, cases, strict=True)
            if (case["protocol"], case["answer_type"]) == (protocol, kind)
        ]
        found = rates(pairs)
        differ = "" if found is None else str(found[1] + found[3])
        lines.append(f"| {protocol} | {kind} | {len(pairs)} | {cell(found)} | {differ} |")
    return lines


def oracle_rows(official: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of scores.jsonl of 360 two-step and 165 three-step problems that have the official counts, S1, S2 and S3 of a responder.

    Which of a responder's answers were right is not public as a whole; these are one way in which they may have been.
    """
    counts = official["counts"]
    strict, loose = counts["CompleteMastery_strict"], counts["CompleteMastery_loose"]
    solved = ["all"] * strict + ["some"] * (loose - strict) + ["none"] * counts["RoteMemorization_loose"]
    failed = ["all"] * counts["InadequateGeneralization"] + ["not all"] * counts["InsufficientKnowledge"]
    kinds = [
        (steps, number, number < round(official[f"S{steps}"] * size / 100))
        for steps, size in ((2, 360), (3, 165))
        for number in range(size)
    ]
    problems = [(steps, number, ok, (solved if ok else failed).pop()) for steps, number, ok in kinds]
    least = {"all": 3, "some": 1, "none": 0, "not all": 0}
    spare = round(official["S1"] * 1215 / 100) - sum(min(steps, least[kind]) for steps, _, _, kind in problems)
    rows: list[dict[str, Any]] = []
    for steps, number, ok, kind in problems:
        right = min(steps, least[kind])
        if kind in ("some", "not all"):
            more = min(spare, steps - 1 - right)
            right, spare = right + more, spare - more
        keys = [*(f"{steps}steps_{step + 1}" for step in range(steps)), f"{steps}steps_multi"]
        name = f"{steps}steps_{number}"
        for key, correct in zip(keys, [*(step < right for step in range(steps)), ok], strict=True):
            rows.append(
                {"id": f"{name} {key}", "cluster": name, "groups": {"key": key}, "correct": correct, "extracted": "A"}
            )
    return rows


RATES = {
    "IG": "InadequateGeneralization", "IK": "InsufficientKnowledge", "CM_loose": "CompleteMastery_loose",
    "CM_strict": "CompleteMastery_strict", "RM_loose": "RoteMemorization_loose", "RM_strict": "RoteMemorization_strict",
}  # fmt: skip


def oracle(responders: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Our four-dimensional numbers beside the official ones, on problems with the official counts."""
    try:
        from vlm_dft.named_metrics import four_dimensional
    except ImportError:
        return ["The four-dimensional metrics are not there."]
    lines = ["| responder | problems | numbers compared | that differ |", "|---" * 4 + "|"]
    for name, official in responders.items():
        counts, rates_of = official["counts"], official["rates"]
        ours = four_dimensional(oracle_rows(official))
        pairs: list[tuple[object, object]] = [(ours["counts"][short], counts[long]) for short, long in RATES.items()]
        if isinstance(
            rates_of, str
        ):  # nothing solved: the official code divides by zero, ours says that there is no rate
            pairs += [(ours["rates"][f"RM_{kind}"], None) for kind in ("loose", "strict")]
        else:
            pairs += [(percent(ours["rates"][short]), rates_of[f"{long}_rate"]) for short, long in RATES.items()]
        pairs += [
            (round(100 * ours[f"score_{kind}"]["accuracy"], 2), official["score"][kind]) for kind in ("strict", "loose")
        ]
        pairs += [(round(100 * ours[part]["accuracy"], 2), official[part]) for part in ("S1", "S2", "S3")]
        lines.append(
            f"| {name} | {ours['problems']} | {len(pairs)} | {[pair for pair in pairs if pair[0] != pair[1]] or 'none'} |"
        )
    return lines


def percent(rate: float | None) -> str | None:
    return None if rate is None else f"{100 * rate:.2f}%"


def main() -> None:
    """Score the gold cases by both rules, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds scoring_gold/")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument(
        "--differences", type=Path, help="write the cases that a rule and the official verdict differ on, as JSON lines"
    )
    arguments = parser.parse_args()
    gold = arguments.data / "scoring_gold"
    cases = read(gold / "dev.jsonl")
    for rule in ("official", "robust"):
        scored(cases[:200], rule)  # imports and compiled patterns are not what is measured
    scores, seconds = {}, {}
    for rule in ("official", "robust"):
        scores[rule], seconds[rule] = scored(cases, rule)
    speed = {rule: sum(score is not None for score in scores[rule]) / seconds[rule] for rule in scores}
    lines = [
        "# Scoring: agreement with the official verdicts", "",
        f"`python benchmarks/scoring_agreement.py --data DIR`, commit {str(versions()['commit'])[:7]}: "
        f"{len(cases):,} real responses with the verdicts of the benchmarks' own code. "
        f"One process on one core of {os.cpu_count()}: **{speed['official']:,.0f} responses/s** by the official rules, "
        f"**{speed['robust']:,.0f}** by the robust one.", "",
        "A cell is agreement % / false positives % of the officially wrong / false negatives % of the officially right, from the raw "
        "response on. For MathVista and LogicVista the official code has GPT-4 extract the answer; the official column is our rules in its "
        "place. The robust rule is no copy of the official ones: where it differs is read below.", "",
        "## Tier A: the verdict follows from the text", "", *table(cases, scores, "A"), "",
        "## Tier B: a language model guessed, or an abstention won by luck", "", *table(cases, scores, "B"), "",
        "## Given the stored extraction", "", *from_extractions(cases), "",
        "## Rules of We-Math and DynaMath on other benchmarks' responses", "", *crossed(read(gold / "cross_dev.jsonl")), "",
        "## We-Math's four dimensions", "",
        "The official numbers of seven simple responders (always A, .., the gold answers). Their 1,740 answers one by one are not here: rows are "
        "made that have the official counts and S1 to S3, and every rate, score and mean that follows is compared as printed.", "",
        *oracle(json.loads((gold / "wemath_oracle.json").read_text(encoding="utf-8"))), "",
        *NOTES,
    ]  # fmt: skip
    if arguments.differences:
        arguments.differences.write_text("".join(differences(cases, scores)), encoding="utf-8")
    arguments.out.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print("\n".join(lines))


NOTES = (
    "## Where robust and official differ (tier A), as read", "",
    "All 90 cases of tier A on which the robust rule differed at first were read (`--differences FILE` writes them). By kind:", "",
    "- MATH-V, 29 of 37: the robust rule is right and the official code says wrong. The answer has the unit that the options have, or lacks it "
    "(19: a box of `12 cm^2` for the option `$12 \\mathrm{~cm}^{2}$`, `40 degrees` for `$40^{\\circ}$`); the letter with the option's text, or in "
    "`\\text{}` (5: `(D) 5/7`); the option's text in other LaTeX (5: a `\\pi` of Unicode, `\\boxed{Basket 5}`).",
    "- MATH-V, 5 of 37: the robust rule is right and the official code says right by rounding both sides to two decimals: 7/16 is 4/9 there, "
    "1/55 is 1/60, 1/300 is 1/100, and 1/3 is (3^1008-1)/3^1009.",
    "- MathVista, 20 of 30: the model runs on, asks itself further questions and answers those. GPT-4 extracted the last answer; the robust rule "
    "reads the one to the question that was asked (14 times the gold answer, 6 times not).",
    "- MathVista and LogicVista, 8 cases: GPT-4 chose an option where the response refuses or repeats the question; the robust rule abstains.",
    "- TabMWP, 7 of 10: a response that is no option goes officially to the first option with the most words in common. The robust rule "
    "finds the option named in other case, or none.", "",
    "The robust rule's own mistakes among the 90, about 20: lists of all letters or options, answers of two parts, rows of a table, a ratio "
    "read as its first number, and a refusal seen in a question about what cannot be done.",
)  # fmt: skip


if __name__ == "__main__":
    main()
