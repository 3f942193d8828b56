"""Named metrics: score rows of one split in; We-Math's four dimensions, DynaMath's worst case, MathVerse's versions, and pass@k out."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from vlm_dft.errors import UserError
from vlm_dft.shares import interval, ratio, share

Rows = Sequence[Mapping[str, Any]]
Found = dict[str, Any]
STEPS = {"2steps_multi": ("2steps_1", "2steps_2"), "3steps_multi": ("3steps_1", "3steps_2", "3steps_3")}
NUMBER = re.compile(r"[-+]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})(/0*[1-9]\d{0,40})?")


def four_dimensional(rows: Rows) -> Found:
    """We-Math's (arXiv 2407.01284): how a problem of several steps fares when its steps are asked alone too.

    A problem is a cluster; group "key" says which of its rows is which (2steps_1, 2steps_2, 2steps_multi, 3steps_1 ...).
    IK: insufficient knowledge, some step and the problem wrong. IG: inadequate generalisation, all steps right and the
    problem wrong. CM: complete mastery, the problem right and all steps (strict) or one at least (loose). RM: rote
    memorisation, the problem right otherwise. Rates are of the problems, that of RM of those solved (CM + RM): None
    where none is solved, where the official code divides by zero. score: (CM + IG / 2) / problems. S1, S2, S3: accuracy
    on steps, on problems of two and of three. incomplete: problems that lack a row, in none of these but S1 to S3.
    """
    return _both_rules(rows, _four_dimensions)


def worst_case(rows: Rows) -> Found:
    """DynaMath's (arXiv 2411.00836): a seed is a cluster of variants.

    average: over seeds and variants. worst: seeds with all variants right. robustness: worst / average (None for 0/0).
    variants: accuracy on each, where rows have group "variant". incomplete: seeds that lack a variant; not in worst or
    robustness. All standard errors are over seeds.
    """
    return _both_rules(rows, _worst)


def mean_of_versions(rows: Rows) -> Found:
    """MathVerse's (arXiv 2403.14624): accuracy on each version (group "problem_version") and the unweighted mean of them.

    The versions of a problem are a cluster. For versions of equal size the mean is the accuracy over all rows.
    """
    return _both_rules(rows, _versions)


METRICS: dict[str, Callable[[Rows], Found]] = {
    "four_dimensional": four_dimensional,
    "worst_case": worst_case,
    "mean_of_versions": mean_of_versions,
}
"""What a benchmark card's `metrics` may name, beside accuracy."""


def of_draws(rows: Rows) -> Found:
    """{"avg@k", "pass@j", "maj@k"} of rows with k draws a sample, j = 2, 4, 8 .. k; nothing for one draw.

    pass@j: the chance that one of j draws is right, by the unbiased estimator 1 - C(k-c, j)/C(k, j) for c right of k
    (Chen et al. 2021, arXiv 2107.03374). maj@k: the verdict of the answer given most often; of equally frequent ones the
    first given; responses without an answer have no vote. k: the fewest draws of a sample; further ones count in avg and pass.
    """
    draws: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        draws.setdefault(str(row["id"]), []).append(row)
    k = min(map(len, draws.values()), default=0)
    if k < 2:
        return {}
    samples = [sorted(found, key=lambda row: row.get("draw") or 0) for found in draws.values()]
    clusters = [str(found[0].get("cluster") or found[0]["id"]) for found in samples]
    sizes = sorted({2**p for p in range(1, k.bit_length()) if 2**p <= k} | {k})

    def of_rule(verdict: Callable[[Mapping[str, Any]], Any]) -> dict[str, Found]:
        right = [sum(bool(verdict(row)["correct"]) for row in found) for found in samples]
        means = [c / len(found) for c, found in zip(right, samples, strict=True)]
        voted = [float(_vote([verdict(row) for row in found[:k]])) for found in samples]
        passed = {
            f"pass@{j}": [pass_at(len(found), c, j) for c, found in zip(right, samples, strict=True)] for j in sizes
        }
        return {
            name: share(values, clusters) for name, values in {f"avg@{k}": means, **passed, f"maj@{k}": voted}.items()
        }

    found = of_rule(lambda row: row)
    if _has_robust(rows):
        robust = of_rule(lambda row: row["robust"])
        return {name: {**values, "robust": robust[name]} for name, values in found.items()}
    return found


def pass_at(n: int, right: int, k: int) -> float:
    """The chance that k of n draws, `right` of them right, hold a right one: 1 - C(n - right, k) / C(n, k)."""
    return float(1 - Fraction(math.comb(n - right, k), math.comb(n, k)))


def answer_key(answer: str) -> Hashable:
    """What equal answers share: the value of a number or a fraction, otherwise the text without case, blanks, $ and last full stop."""
    text = re.sub(r"[\s$]+", "", answer[:1000]).casefold().rstrip(".")
    plain = text.replace(",", "") if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", text) else text
    if NUMBER.fullmatch(plain):
        over, _, under = plain.partition("/")
        return Fraction(over) / int(under or 1)
    return text


def _vote(verdicts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the answer given most often is right."""
    keys = [answer_key(str(v["extracted"])) for v in verdicts if v.get("extracted") is not None]
    if not keys:
        return bool(verdicts[0]["correct"])
    winner = Counter(keys).most_common(1)[0][0]  # of equally frequent ones the first counted
    return next(
        bool(v["correct"])
        for v in verdicts
        if v.get("extracted") is not None and answer_key(str(v["extracted"])) == winner
    )


def by_problem(metric: str, rows: Rows, right: Sequence[bool]) -> dict[str, dict[str, float]]:
    """{number of a metric: {cluster: its value}} of the numbers that are a mean over clusters, of rows of one draw: what two
    runs are compared by. Empty for a metric that has none but what accuracy has."""
    if metric == "four_dimensional":
        return {f"score_{kind}": values for kind, values in _mastered(rows, right)[1].items()}
    return {"worst": _whole_seeds(rows, right)[0]} if metric == "worst_case" else {}


def _mastered(rows: Rows, right: Sequence[bool]) -> tuple[Counter[str], dict[str, dict[str, float]], int]:
    """(counts of the dimensions, {strict, loose: {problem: its score}}, problems that lack a row)."""
    keys, problems = _labels(rows, "key", "four_dimensional"), dict[str, dict[str, bool]]()
    for row, key, ok in zip(rows, keys, right, strict=True):
        problems.setdefault(_cluster(row), {})[key] = ok
    counts = Counter[str]()
    scores: dict[str, dict[str, float]] = {"strict": {}, "loose": {}}
    for problem, answered in problems.items():
        whole = next((key for key, steps in STEPS.items() if {key, *steps} <= set(answered)), None)
        if whole is None:
            continue
        steps = [answered[step] for step in STEPS[whole]]
        for kind, mastered in (("strict", all(steps)), ("loose", any(steps))):
            if answered[whole]:
                name = f"{'CM' if mastered else 'RM'}_{kind}"
                scores[kind][problem] = float(mastered)
            else:
                name = "IG" if all(steps) else "IK"
                scores[kind][problem] = 0.5 * all(steps)
            counts[name] += kind == "strict" or "_" in name
    return counts, scores, len(problems) - len(scores["strict"])


def _four_dimensions(rows: Rows, right: Sequence[bool]) -> Found:
    counts, scores, incomplete = _mastered(rows, right)
    keys, n = _labels(rows, "key", "four_dimensional"), len(scores["strict"])
    single = {step for steps in STEPS.values() for step in steps}
    parts = {"S1": single, **{f"S{key[0]}": {key} for key in STEPS}}
    found: Found = {"problems": n, "incomplete": incomplete}
    if n:
        names = ("IK", "IG", "CM_strict", "CM_loose", "RM_strict", "RM_loose")
        solved = counts["CM_strict"] + counts["RM_strict"]  # = loose
        found["counts"] = {name: counts[name] for name in names}
        found["rates"] = {
            name: counts[name] / n if name[:2] != "RM" else counts[name] / solved if solved else None for name in names
        }
        found |= {f"score_{kind}": share(list(values.values())) for kind, values in scores.items()}
    for name, some in parts.items():
        at = [k for k, key in enumerate(keys) if key in some]
        if at:
            found[name] = share([float(right[k]) for k in at], [_cluster(rows[k]) for k in at])
    return found


def _whole_seeds(rows: Rows, right: Sequence[bool]) -> tuple[dict[str, float], dict[str, float], int]:
    """({seed: whether all its variants are right}, {seed: share of them}, seeds that lack a variant)."""
    seeds: dict[str, list[bool]] = {}
    for row, ok in zip(rows, right, strict=True):
        seeds.setdefault(_cluster(row), []).append(ok)
    size = max(map(len, seeds.values()))
    whole = {seed: oks for seed, oks in seeds.items() if len(oks) == size}
    worst = {seed: float(all(oks)) for seed, oks in whole.items()}
    return worst, {seed: sum(oks) / size for seed, oks in whole.items()}, len(seeds) - len(whole)


def _worst(rows: Rows, right: Sequence[bool]) -> Found:
    worst, average, incomplete = _whole_seeds(rows, right)
    found: Found = {
        "average": share([float(ok) for ok in right], [_cluster(row) for row in rows]),
        "worst": share(list(worst.values())),
        "robustness": ratio(worst, average),
        "seeds": len(worst),
        "incomplete": incomplete,
    }
    if all((row.get("groups") or {}).get("variant") is not None for row in rows):
        found["variants"] = _shares(_labels(rows, "variant", "worst_case"), right)
    return found


def _versions(rows: Rows, right: Sequence[bool]) -> Found:
    names = _labels(rows, "problem_version", "mean_of_versions")
    versions = _shares(names, right)
    mean = math.fsum(found["accuracy"] for found in versions.values()) / len(versions)
    residuals: dict[str, float] = {}
    for row, name, ok in zip(rows, names, right, strict=True):
        found = versions[name]
        residual = (ok - found["accuracy"]) / (found["count"] * len(versions))
        residuals[_cluster(row)] = residuals.get(_cluster(row), 0.0) + residual
    variance = math.fsum(r * r for r in residuals.values())
    low, high = interval(mean, variance, len(rows), len(residuals))
    whole = {"accuracy": mean, "stderr": math.sqrt(variance), "low": low, "high": high}
    return {"mean": {**whole, "count": len(rows), "clusters": len(residuals)}, "versions": versions}


def _shares(names: Sequence[str], right: Sequence[bool]) -> dict[str, Found]:
    found: dict[str, list[float]] = {}
    for name, ok in zip(names, right, strict=True):
        found.setdefault(name, []).append(float(ok))
    return {name: share(values) for name, values in sorted(found.items(), key=lambda item: _natural(item[0]))}


def _natural(name: str) -> tuple[int, str]:
    return (int(name) if name.isdecimal() and name.isascii() else 0, name)


def _both_rules(rows: Rows, metric: Callable[[Rows, Sequence[bool]], Found]) -> Found:
    """The metric by the official rule and, under "robust", by the robust one; of several draws their mean."""
    found = _over_draws(rows, metric, lambda row: bool(row["correct"]))
    if _has_robust(rows):
        found["robust"] = _over_draws(rows, metric, lambda row: bool(row["robust"]["correct"]))
    return found


def _over_draws(
    rows: Rows, metric: Callable[[Rows, Sequence[bool]], Found], verdict: Callable[[Mapping[str, Any]], bool]
) -> Found:
    draws: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        draws.setdefault(row.get("draw") or 0, []).append(row)
    found: Found = mean_tree([metric(some, [verdict(row) for row in some]) for some in draws.values()])
    return found


def mean_tree(found: Sequence[Any]) -> Any:
    """The mean of results of the same shape, number by number; None where one of them has none."""
    first = found[0]
    if len(found) == 1:
        return first
    if isinstance(first, Mapping):
        return {key: mean_tree([one.get(key) if one else None for one in found]) for key in first}
    if any(not isinstance(one, (int, float)) for one in found):
        return None
    return first if all(one == first for one in found) else math.fsum(found) / len(found)


def _has_robust(rows: Rows) -> bool:
    return all(row.get("robust") for row in rows)


def _cluster(row: Mapping[str, Any]) -> str:
    return str(row.get("cluster") or row["id"])


def _labels(rows: Rows, group: str, metric: str) -> list[str]:
    """Each row's one label of a group. Raises UserError for a row that has none, or several."""
    found = [(row.get("groups") or {}).get(group) for row in rows]
    for row, label in zip(rows, found, strict=True):
        if not isinstance(label, str):
            raise UserError(
                f"Metric {metric!r} needs group {group!r} with one label in every row; sample {row['id']!r} has {label!r}. "
                f"Name it in the card's groups."
            )
    return [str(label) for label in found]
