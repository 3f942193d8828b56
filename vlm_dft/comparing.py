"""Comparing: labelled runs in; every run measured, and every two compared sample by sample, as one report out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_dft.cards import nearest
from vlm_dft.errors import UserError
from vlm_dft.metrics import METRICS, cluster_of, labels, summarise
from vlm_dft.named_metrics import by_problem
from vlm_dft.paired import holm, paired_difference, with_seeds
from vlm_dft.run_folders import BASE, Run, read_runs, read_scores

__all__ = ["BASE", "Run", "compare_runs", "read_runs", "read_scores"]

Row = Mapping[str, Any]
Rows = list[dict[str, Any]]
Matrix = NDArray[np.float64]
RULES = ("official", "robust")
FIRST = (BASE, "nll", "sft")  # where there is a base: the table reads base, SFT, DFT, and a difference DFT - SFT
DECIDING = ("protocol", "decoding", "max_new_tokens")  # of two runs that are compared the same
TELLING = ("engine", "dtype", "prompts", "pixels", "pictures")  # said where they differ
WHOLE = {"group": None, "value": None}


def compare_runs(
    runs: Mapping[str, Sequence[Run]], *, baseline: str | None = None, common: bool = False, mixed: bool = False
) -> dict[str, Any]:
    """{"runs", "benchmarks": {benchmark: {split: {"runs": {label: measured}, "comparisons": [...]}}}, "warnings", "notes", "versions"}.

    Every two runs are compared, the baseline (default: "base", else the first) first; a row for the whole split and every
    value of every group, and of group "metric" for a benchmark's own numbers, by both rules. Holm's correction is over the
    groups of one comparison by one rule; the whole split and its metrics need none. common: compare on the samples that all
    have, instead of refusing. mixed: compare although protocol, decoding or length differ, instead of refusing. Raises UserError.
    """
    from vlm_dft.runs import versions

    order = _order(list(runs), baseline)
    warnings: list[str] = []
    names = list(dict.fromkeys(name for label in order for run in runs[label] for name in run.benchmarks))
    benchmarks, seeds = {}, dict.fromkeys(order, 1)
    for name in names:
        here = {label: [run for run in runs[label] if name in run.benchmarks] for label in order}
        here = {label: found for label, found in here.items() if found}
        if len(here) < len(order):
            warnings.append(f"{name}: only in {', '.join(here)}; the other runs have no scores of it.")
        warnings += dict.fromkeys(remark for found in here.values() for run in found for remark in _remarks(run, name))
        _check_settings(name, here, warnings, mixed=mixed)
        scores = {label: _seeds_of(label, name, found, warnings) for label, found in here.items()}
        _check_draws(name, scores, warnings, mixed=mixed)
        seeds |= {label: max(seeds[label], len(found)) for label, found in scores.items()}
        benchmarks[name] = _compare_benchmark(name, here, scores, warnings, common=common)
    if len(order) > 1 and not any(
        len(found["runs"]) > 1 for splits in benchmarks.values() for found in splits.values()
    ):
        raise UserError(
            f"No benchmark is in two of the runs: {'; '.join(f'{label}: {_listed(runs[label])}' for label in order)}. Nothing to compare."
        )
    return {
        "runs": {label: _about(runs[label], seeds[label]) for label in order},
        "benchmarks": benchmarks,
        "warnings": warnings,
        "notes": _notes(seeds, benchmarks) if len(order) > 1 else [],
        "versions": versions(),
    }


def _order(found: list[str], baseline: str | None) -> list[str]:
    if baseline is not None and baseline not in found:
        raise UserError(
            f"--baseline {baseline!r} is none of the runs.{nearest(baseline, found)} Runs: {', '.join(found)}."
        )
    order = found
    if BASE in found:
        order = sorted(found, key=lambda label: FIRST.index(label.lower()) if label.lower() in FIRST else len(FIRST))
    first = baseline or order[0]
    return [first, *(label for label in order if label != first)]


def _seeds_of(label: str, benchmark: str, runs: Sequence[Run], warnings: list[str]) -> list[Rows]:
    """The rows of every seed; of folders with the same verdicts on the same answers only the first."""
    found: dict[str, Rows] = {}
    for run in runs:
        rows = read_scores(run.benchmarks[benchmark], benchmark)
        same = [[r["id"], r.get("draw"), r["correct"], r.get("extracted"), r.get("tokens")] for r in rows]
        found.setdefault(repr(same), rows)
    if len(found) < len(runs):
        warnings.append(
            f"{benchmark}: of {len(runs)} folders of {label} some hold the same answers, which count once: {len(found)} of them."
        )
    return list(found.values())


def _compare_benchmark(
    name: str, runs: Mapping[str, Sequence[Run]], scores: dict[str, list[Rows]], warnings: list[str], *, common: bool
) -> dict[str, Any]:
    scores = _same_samples(name, scores, warnings, common=common)
    first = next(iter(scores.values()))[0]
    metrics = _metrics(name, runs)
    splits = {}
    for split in dict.fromkeys(str(row["split"]) for row in first):
        here = {label: [[r for r in rows if r["split"] == split] for rows in seeds] for label, seeds in scores.items()}
        table = _Table(here, metrics)
        splits[split] = {
            "runs": {label: table.measured(label, [summarise(rows, metrics)[split] for rows in here[label]]) for label in here},
            "comparisons": [
                {"run": run, "against": against, "benchmark": name, "split": split, **row}
                for against, run in combinations(here, 2) for row in table.compared(against, run)
            ],
        }  # fmt: skip
    return splits


class _Table:
    """One split of one benchmark: [seeds, samples] of shares of right draws for every run and rule, in the same samples' order."""

    def __init__(self, runs: Mapping[str, Sequence[Rows]], metrics: Sequence[str]) -> None:
        self.runs, self.metrics = runs, metrics
        first = next(iter(runs.values()))[0]
        samples = {str(row["id"]): row for row in reversed(first)}
        self.place = {name: k for k, name in enumerate(dict.fromkeys(str(row["id"]) for row in first))}
        ordered = [samples[name] for name in self.place]
        self.clusters = np.unique([cluster_of(row) for row in ordered], return_inverse=True)[1]
        members: dict[tuple[str, str], list[int]] = {}
        for k, row in enumerate(ordered):
            for group in row.get("groups") or {}:
                for value in labels(row, group):
                    members.setdefault((group, value), []).append(k)
        self.groups = {key: np.array(found) for key, found in sorted(members.items())}
        self.verdicts = {rule: {label: self._matrix(seeds, rule) for label, seeds in runs.items()} for rule in RULES}
        self.draws = {label: _lcm(seeds) for label, seeds in runs.items()}

    def compared(self, against: str, run: str) -> Iterator[dict[str, Any]]:
        """Comparison rows of two runs: the whole, then every value of every group, by each rule that both have."""
        for rule, verdicts in self.verdicts.items():
            first, second = verdicts[against], verdicts[run]
            if first is None or second is None:
                continue
            draws = math.lcm(self.draws[against], self.draws[run])
            yield {**WHOLE, "rule": rule, **paired_difference(first, second, self.clusters, draws=draws)}
            rows = [
                {"group": group, "value": value, "rule": rule,
                 **paired_difference(first[:, at], second[:, at], self.clusters[at], draws=draws)}
                for (group, value), at in self.groups.items()
            ]  # fmt: skip
            for row, p in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
                yield {**row, "p_adjusted": p}
            for metric in self.metrics:
                yield from self._by_metric(metric, rule, against, run, draws)

    def _by_metric(self, metric: str, rule: str, against: str, run: str, draws: int) -> Iterator[dict[str, Any]]:
        """Rows of group "metric": the numbers of a named metric that are a mean over problems, compared problem by problem."""
        found = [self._problems(metric, rule, label) for label in (against, run)]
        for name in found[0]:
            problems = [key for key in found[0][name][0] if all(key in seed for side in found for seed in side[name])]
            if problems:
                first, second = (np.array([[seed[p] for p in problems] for seed in side[name]]) for side in found)
                halves = 1 if name == "worst" else 2  # We-Math's score has halves
                one = paired_difference(first, second, np.arange(len(problems)), draws=halves * draws)
                yield {"group": "metric", "value": f"{metric}, {name}", "rule": rule, **one}

    def _problems(self, metric: str, rule: str, label: str) -> dict[str, list[dict[str, float]]]:
        """{number: [{problem: its mean over draws} of each seed]}."""
        found: dict[str, list[dict[str, float]]] = {}
        for rows in self.runs[label]:
            draws: dict[int, Rows] = {}
            for row in rows:
                draws.setdefault(int(row.get("draw") or 0), []).append(row)
            each = [by_problem(metric, some, [_right(row, rule) for row in some]) for some in draws.values()]
            for name, values in each[0].items():
                mean = {key: math.fsum(one[name].get(key, 0.0) for one in each) / len(each) for key in values}
                found.setdefault(name, []).append(mean)
        return found

    def measured(self, label: str, seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A run's summary; of several seeds the mean, with the error of samples and seeds together."""
        if len(seeds) == 1:
            return {**seeds[0], "seeds": 1}
        whole = self._over_seeds(label, seeds, None)
        known = {(group, value) for group, values in seeds[0]["groups"].items() for value in values}
        for seed in seeds:
            odd = known ^ {
                (group, value) for group, values in seed["groups"].items() for value in values
            } or known - set(self.groups)
            if odd:
                raise UserError(
                    f"{label}: a seed's samples are in other groups (first: {' '.join(min(odd))!r}). Score all with the same version of the card."
                )
        groups = {
            group: {
                value: self._over_seeds(label, [s["groups"][group][value] for s in seeds], self.groups[group, value])
                for value in values
            }
            for group, values in seeds[0]["groups"].items()
        }
        each = [seed["accuracy"] for seed in seeds]
        return {
            **whole,
            "groups": groups,
            "extra": _mean([s["extra"] for s in seeds]),
            "seeds": len(seeds),
            "by_seed": each,
        }

    def _over_seeds(self, label: str, seeds: Sequence[dict[str, Any]], at: Any) -> dict[str, Any]:
        found: dict[str, Any] = _mean([{k: v for k, v in s.items() if k not in ("groups", "extra")} for s in seeds])
        for rule, into in (("official", found), ("robust", found["robust"])):
            matrix = self.verdicts[rule][label]
            if matrix is not None and into is not None:
                some = slice(None) if at is None else at
                into |= with_seeds(matrix[:, some], self.clusters[some])
        return found

    def _matrix(self, seeds: Sequence[Rows], rule: str) -> Matrix | None:
        if rule == "robust" and not all(row.get("robust") for rows in seeds for row in rows):
            return None
        found = np.zeros((len(seeds), len(self.place)))
        for k, rows in enumerate(seeds):
            count = np.zeros(len(self.place))
            for row in rows:
                at = self.place[str(row["id"])]
                found[k, at] += _right(row, rule)
                count[at] += 1
            found[k] /= count
        return found


def _right(row: Row, rule: str) -> bool:
    return bool(row["correct"] if rule == "official" else row["robust"]["correct"])


def _lcm(seeds: Sequence[Rows]) -> int:
    """A number that every sample's number of draws divides."""
    return math.lcm(*(count for rows in seeds for count in _draws(rows)))


def _draws(rows: Rows) -> set[int]:
    """The numbers of draws that samples have."""
    return set(Counter(str(row["id"]) for row in rows).values())


def _same_samples(
    benchmark: str, scores: dict[str, list[Rows]], warnings: list[str], *, common: bool
) -> dict[str, list[Rows]]:
    """The rows of the samples that every run and seed has. Raises UserError where that is not all of them, unless `common`."""
    golds = [(label, {(str(r["split"]), str(r["id"])): r.get("gold_answer") for r in rows})
             for label, seeds in scores.items() for rows in seeds]  # fmt: skip
    reference, known = golds[0]
    kept = set(known)
    for label, found in golds[1:]:
        kept &= set(found)
        only = [sorted(set(a) - set(b)) for a, b in ((known, found), (found, known))]
        if any(only) and not common:
            said = "; ".join(
                f"{len(ids):,} in {name if name != other else 'one seed'} only, the first {ids[0][1]!r} of split {ids[0][0]!r}"
                for name, other, ids in ((reference, label, only[0]), (label, reference, only[1])) if ids
            )  # fmt: skip
            raise UserError(
                f"{benchmark}: {reference} has {len(known):,} samples and {label} {len(found):,}: {said}. Evaluate both on the same "
                f"samples, or pass --common to compare on the {len(set(known) & set(found)):,} that both have."
            )
        odd = sorted(
            key for key in set(known) & set(found) if None not in (known[key], found[key]) and known[key] != found[key]
        )
        if odd:
            raise UserError(
                f"{benchmark}: {len(odd):,} samples have other gold answers in {reference} than in {label}, the first {odd[0][1]!r}: "
                f"{known[odd[0]]!r} and {found[odd[0]]!r}. Score both with the same version of the data."
            )
    if not kept:
        raise UserError(f"{benchmark}: no sample is in all of {', '.join(scores)}. Nothing to compare.")
    every = {key for _, found in golds for key in found}
    if len(kept) < len(every):
        warnings.append(f"{benchmark}: compared on the {len(kept):,} samples that all runs have, of {len(every):,}.")
        return {label: [[r for r in rows if (str(r["split"]), str(r["id"])) in kept] for rows in seeds]
                for label, seeds in scores.items()}  # fmt: skip
    return scores


def _check_settings(benchmark: str, runs: Mapping[str, Sequence[Run]], warnings: list[str], *, mixed: bool) -> None:
    """Refuse runs whose protocol, decoding or length differ, unless `mixed`; say what else does."""
    for key in (*DECIDING, *TELLING):
        said: dict[str, list[str]] = {}
        for label, found in runs.items():
            for run in found:
                value = _plain(run.settings[benchmark].get(key))
                if value is not None and label not in (labels := said.setdefault(str(value), [])):
                    labels.append(label)
        if len(said) < 2:
            continue
        differ = "; ".join(f"{', '.join(labels)}: {value}" for value, labels in said.items())
        if key in DECIDING and not mixed:
            raise UserError(
                f"{benchmark}: {key} differs ({differ}). A difference would not be the models' alone: evaluate them alike, or "
                "pass --mixed to compare all the same."
            )
        warnings.append(f"{benchmark}: {key} differs ({differ}).")


def _plain(value: Any) -> Any:
    """A setting as runs are compared by it: seeds of drawing may differ, and a length is a setting of its own."""
    if isinstance(value, Mapping):
        return {k: v for k, v in sorted(value.items()) if k not in ("seed", "max_new_tokens")}
    return {"samples": 1, "temperature": 0.0} if value == "greedy" else value


def _check_draws(benchmark: str, scores: Mapping[str, Sequence[Rows]], warnings: list[str], *, mixed: bool) -> None:
    """The same for the number of responses to a sample, which files of others do not say in their settings."""
    draws = {label: sorted({count for rows in seeds for count in _draws(rows)}) for label, seeds in scores.items()}
    if len({tuple(found) for found in draws.values()}) < 2:
        return
    said = "; ".join(f"{label}: {' or '.join(map(str, counts))}" for label, counts in draws.items())
    differ = f"the number of responses to a sample differs ({said})"
    if not mixed:
        raise UserError(f"{benchmark}: {differ}. Evaluate the runs alike, or pass --mixed to compare all the same.")
    warnings.append(f"{benchmark}: {differ}.")


def _remarks(run: Run, benchmark: str) -> Sequence[str]:
    """What was odd about the samples of a run: a set that is not whole, a limit."""
    source = run.settings.get(benchmark, {}).get("source")
    return (source.get("remarks") or []) if isinstance(source, Mapping) else []


def _about(runs: Sequence[Run], seeds: int) -> dict[str, Any]:
    about = {key: runs[0].said(key) for key in ("model", "protocol", "engine", "decoding")}
    return {"folders": [str(run.folder) for run in runs], **about, "seeds": seeds}


def _notes(seeds: Mapping[str, int], benchmarks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    single = [label for label, n in seeds.items() if n == 1 and label != BASE]
    several = [f"{label}: {n} seeds" for label, n in seeds.items() if n > 1]
    notes = [f"{', '.join(several)}: errors and tests cover the choice of samples and of seeds."] if several else []
    if single:
        notes.append(
            f"{', '.join(single)}: one seed each, so errors and tests cover the choice of samples, not how a training run would "
            "come out with another seed."
        )
    if any(1 < n < 4 for n in seeds.values()):
        notes.append(
            "Two or three seeds say little of how seeds vary: runs that are equal come out as settled in up to one of six comparisons "
            "(simulated: base against two seeds), not one of 20."
        )
    rows = [row for splits in benchmarks.values() for found in splits.values() for row in found["comparisons"]]
    if (count := sum(row["group"] is None and row["rule"] == "official" for row in rows)) > 1:
        notes.append(
            f"p values of whole splits are not corrected for the {count} comparisons here, of which about one in 20 would come out as settled "
            "between equal runs; those of groups are, for the groups."
        )
    return notes


def _mean(found: Sequence[Any]) -> Any:
    """The mean of results of the same shape over seeds. A share's error covers samples and seeds."""
    first = found[0]
    if isinstance(first, Mapping):
        mean = {key: _mean([one.get(key) if one else None for one in found]) for key in first}
        key = next((k for k in ("accuracy", "value") if isinstance(first.get(k), (int, float))), None)
        if key and mean.get("stderr") is not None:
            spread = float(np.var([one[key] for one in found], ddof=1)) / len(found)
            mean["stderr"] = math.sqrt(float(np.mean([one["stderr"] ** 2 for one in found])) + spread)
        return mean
    if any(isinstance(one, str) or not isinstance(one, (int, float)) for one in found):
        return first if all(one == first for one in found) else None
    return first if all(one == first for one in found) else math.fsum(found) / len(found)


def _metrics(benchmark: str, runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """The named metrics that results.json has; a training run leaves none: then those of the benchmark's card."""
    from vlm_dft.benchmark_cards import read_benchmark

    kept = [run.settings[benchmark].get("splits") for found in runs.values() for run in found]
    if any(kept):
        return [
            m for m in METRICS if any(m in (s.get("extra") or {}) for splits in kept for s in (splits or {}).values())
        ]
    try:
        return list(read_benchmark(benchmark).get("metrics") or [])
    except UserError:  # a card of one's own, named by its path
        return []


def _listed(runs: Sequence[Run]) -> str:
    return ", ".join(dict.fromkeys(name for run in runs for name in run.benchmarks))
