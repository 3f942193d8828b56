"""Diagnostics: detached statistics of response tokens in, numbers for the loggers and alarms of starvation out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vlm_dft.kinds import KINDS, MEANING

LOW_P, LOW_ENTROPY = 0.1, 0.5  # a token that the model is sure is another one: p below, entropy in nats below

EDGES = (0.0, 1e-4, 1e-3, 0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Edges of the histogram of p; a bin holds its lower edge, the last one both."""
FINE = tuple(sorted({*EDGES, *(k / 200 for k in range(201))}))  # of the histogram that medians are read off

COLUMNS = (
    "tokens", "nll", "p", "below_0.1", "below_0.01", "above_0.9", "weight", "weight2", "error", "pull", "pull_below_0.1",
    "entropy", "confident_other", "kl",
)  # fmt: skip
"""Sums over tokens. error: 1 - p, the size of the gradient of -log p on the target's logit; pull: w x error."""
GROUPS = ("all", *KINDS)

Seen = tuple[dict[str, Tensor], Tensor | None, Tensor | None]  # statistics, token_kinds, source_ids of a micro-batch
FOLD = 1 << 18  # tokens kept until they are summed up: 7 MB

PATIENCE = 3  # times in a row until what starves is called starved
ENOUGH = 8  # tokens of a kind to judge by; logs with fewer are put together
STARVED_SHARE, STARVED_PULL = 0.5, 0.1  # most of a kind's tokens below p = 0.1, with a tenth of SFT's pull or less
CONSEQUENCES = {
    "all": "the model hardly learns this source", "first": "the model does not learn to begin its answers this way",
    "digit": "the model does not learn these numbers", "format": "the model does not learn the format",
    "answer": "the model does not learn the final answers", "end": "the model does not learn to stop",
}  # fmt: skip


class TokenDiagnostics:
    """Collects what the loss saw of its tokens, and sums it up over all processes when it is logged."""

    def __init__(self, sources: Sequence[str] = ()) -> None:
        """sources: names for `source_ids`; tokens of none of them are counted under the total alone."""
        self.sources = list(sources)
        self.seen: list[Seen] = []
        self._tokens = 0  # in seen
        self._folded: tuple[Tensor, Tensor] | None = None  # sums and histogram of what is no longer in seen

    def add(self, stats: Mapping[str, Tensor], kinds: Tensor | None = None, sources: Tensor | None = None) -> None:
        """Keep `log_p`, `weight`, `entropy` [n] (and `kl` [n]); token_kinds and source_ids [n] where there are any."""
        kept = {name: stats[name].detach() for name in ("log_p", "weight", "entropy", "kl") if name in stats}
        self.seen.append((kept, kinds, sources))
        self._tokens += len(kept["log_p"])
        if self._tokens >= FOLD:
            self._fold()

    def _fold(self) -> None:
        """Sum up what was kept, so that memory does not grow between two logs."""
        sums, histogram = self._sums()
        before = self._folded
        self._folded = (sums, histogram) if before is None else (before[0] + sums, before[1] + histogram)
        self.seen.clear()
        self._tokens = 0

    def state(self) -> dict[str, Tensor] | None:
        """What was seen since the last summary, summed up; None: nothing."""
        if self.seen:
            self._fold()
        return None if self._folded is None else {"sums": self._folded[0], "histogram": self._folded[1]}

    def restore(self, state: Mapping[str, Tensor] | None) -> None:
        """Go on from a `state`."""
        self._folded = None if state is None else (state["sums"], state["histogram"])

    def summary(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> tuple[dict[str, float], Tensor]:
        """Numbers since the last call for a logger, and the sums [sources + 1, GROUPS, COLUMNS] behind them.

        reduce: sums a tensor over processes; all of them must call at once. Empty where no process saw a token.
        """
        self._fold()
        sums, histogram = self._folded or self._sums()
        joined = reduce(torch.cat([sums.flatten(), histogram]))
        self._folded = None
        sums, histogram = joined[: sums.numel()].view(sums.shape).cpu(), joined[sums.numel() :].cpu()
        total = sums.sum(0)[0]
        if not total[0] > 0:
            return {}, sums
        found = {**_numbers(total), "median_p": _median(histogram)}
        found |= {f"p_histogram/{name}": share for name, share in _histogram(histogram).items()}
        for k, kind in enumerate(GROUPS[1:], 1):
            row = sums.sum(0)[k]
            if row[0] > 0:
                found |= {f"kind/{kind}/{name}": value for name, value in _numbers(row, few=True).items()}
        named = [(source, sums[k, 0]) for k, source in enumerate(self.sources) if sums[k, 0, 0] > 0]
        for source, row in named if len(self.sources) > 1 else []:
            found |= {f"source/{source}/{name}": value for name, value in _numbers(row, few=True).items()}
        return found, sums

    def _sums(self) -> tuple[Tensor, Tensor]:
        """Sums of COLUMNS for every source (the last: none) and group, and counts in the bins of FINE; double."""
        count = len(self.sources) + 1
        device = self.seen[0][0]["log_p"].device if self.seen else torch.device("cpu")
        sums = torch.zeros(count, len(GROUPS), len(COLUMNS), dtype=torch.float64, device=device)
        histogram = torch.zeros(len(FINE) - 1, dtype=torch.float64, device=device)
        for stats, kinds, sources in _joined(self.seen):
            columns, p = _columns(stats)
            member = columns.new_ones(len(columns), len(GROUPS))
            for k, bit in enumerate(KINDS.values(), 1):
                member[:, k] = 0 if kinds is None else (kinds & bit) != 0
            own = torch.full((len(columns),), count - 1, device=device) if sources is None else sources % count
            for k in range(count):
                rows = own == k
                sums[k] += member[rows].T @ columns[rows]
            histogram += _counts(p)
        return sums, histogram


def _joined(seen: Sequence[Seen]) -> Iterable[Seen]:
    """What was seen, in few large pieces."""
    if not seen:
        return
    alike: dict[tuple[Any, ...], list[Any]] = {}
    for stats, kinds, sources in seen:
        alike.setdefault((tuple(stats), kinds is None, sources is None), []).append((stats, kinds, sources))
    for (names, no_kinds, no_sources), rows in alike.items():
        yield (
            {name: torch.cat([stats[name] for stats, _, _ in rows]) for name in names},
            None if no_kinds else torch.cat([kinds for _, kinds, _ in rows]),
            None if no_sources else torch.cat([sources for _, _, sources in rows]),
        )


def _columns(stats: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """[n, COLUMNS] of n tokens, and their p [n]."""
    log_p, weight, entropy = (stats[name].double() for name in ("log_p", "weight", "entropy"))
    p = log_p.exp()
    error = -log_p.expm1()
    pull, low = weight * error, (p < LOW_P).double()
    kl = stats["kl"].double() if "kl" in stats else torch.zeros_like(p)
    found = [
        torch.ones_like(p), -log_p, p, low, p < 0.01, p > 0.9, weight, weight.square(), error, pull, pull * low, entropy,
        low * (entropy < LOW_ENTROPY), kl,
    ]  # fmt: skip
    return torch.stack([column.double() for column in found], dim=1), p


def _numbers(row: Tensor, *, few: bool = False) -> dict[str, float]:
    """Means and shares from a row of sums; few: the ones that a part of the tokens is told by."""
    s = dict(zip(COLUMNS, row.tolist(), strict=True))
    n = s["tokens"]
    found = {
        "mean_p": s["p"] / n,
        "share_p_below_0.1": s["below_0.1"] / n,
        "mean_weight": s["weight"] / n,
        "nll": s["nll"] / n,
    }
    if few:
        return {"tokens": int(n), **found}
    return {
        "response_tokens": int(n),
        **found,
        "mean_error": s["error"] / n,  # 1 - p
        "share_p_below_0.01": s["below_0.01"] / n,
        "share_p_above_0.9": s["above_0.9"] / n,
        "effective_sample_size": s["weight"] ** 2 / (n * s["weight2"]) if s["weight2"] else 0.0,
        "gradient_mass_below_0.1": s["pull_below_0.1"] / s["pull"] if s["pull"] else 0.0,
        "entropy": s["entropy"] / n,
        "share_low_p_low_entropy": s["confident_other"] / n,
        **({"kl": s["kl"] / n} if s["kl"] else {}),
    }


def _histogram(counts: Tensor) -> dict[str, float]:
    """{"0.1-0.2": share of tokens} in the bins of EDGES, from counts in the bins of FINE."""
    shares = (counts / counts.sum().clamp(min=1)).tolist()
    bins = pairwise(EDGES)
    return {
        f"{_edge(low)}-{_edge(high)}": sum(
            share for share, edge in zip(shares, FINE, strict=False) if low <= edge < high
        )
        for low, high in bins
    }


def _edge(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")


def p_histogram(p: Tensor) -> dict[str, float]:
    """{"0.1-0.2": share of tokens} of probabilities [n], in the bins of EDGES."""
    return _histogram(_counts(p))


def _counts(p: Tensor) -> Tensor:
    """Counts of probabilities [n] in the bins of FINE; what is not a number is in none."""
    p = p[~p.isnan()]
    inner = torch.tensor(FINE[1:-1], dtype=p.dtype, device=p.device)
    return torch.bincount(torch.bucketize(p, inner, right=True), minlength=len(FINE) - 1)


def _median(counts: Tensor) -> float:
    """The median of p, read off counts in the bins of FINE: right to the width of a bin, 0.005 or less."""
    if not counts.sum() > 0:
        return math.nan
    upto = counts.cumsum(0)
    half = float(upto[-1]) / 2
    k = int(torch.searchsorted(upto, half))
    inside = (half - float(upto[k] - counts[k])) / float(counts[k])
    return FINE[k] + inside * (FINE[k + 1] - FINE[k])


@dataclass(frozen=True, slots=True)
class Alarm:
    """Tokens that the objective starves."""

    step: int
    source: str  # "" for all sources together
    kind: str  # one of GROUPS
    tokens: int  # that were judged by
    mean_p: float
    share_p_below_0_1: float
    pull: float  # of what SFT would give them

    @property
    def message(self) -> str:
        """What is happening and what to do."""
        what = "response tokens" if self.kind == "all" else MEANING[self.kind]
        of = f" of source {self.source}" if self.source else ""
        remedies = [
            "OBJECTIVE='floor(minimum=0.1)' or 'mix(share=0.2)' keeps a pull on every token",
            f"--source_objectives {self.source or 'SOURCE'}=nll trains this source by plain SFT",
        ]
        if self.kind != "all":
            remedies.insert(0, f"--full_weight {self.kind} gives these tokens the weight 1")
        return (
            f"starved at step {self.step}: {what}{of} have mean p {self.mean_p:.3f}, {self.share_p_below_0_1:.0%} of "
            f"{self.tokens:,} are below 0.1, and they get {self.pull:.1%} of the pull of SFT; {CONSEQUENCES[self.kind]}. "
            f"{'; '.join(remedies)}."
        )

    def as_dict(self) -> dict[str, Any]:
        """As written to metrics.jsonl."""
        return {**asdict(self), "message": self.message}


class StarvationAlarms:
    """Watches the sums of every log; raises an alarm, once for each source and kind, where tokens starve PATIENCE times in a row.

    Logs are put together until a kind has ENOUGH tokens to judge by. Sources are watched one by one and all together.
    """

    def __init__(self, sources: Sequence[str] = ()) -> None:
        self.sources = list(sources)
        self._waiting: dict[tuple[str, str], list[float]] = {}  # sums of too few tokens to judge by
        self._in_a_row: dict[tuple[str, str], int] = {}
        self._raised: set[tuple[str, str]] = set()

    def state(self) -> list[list[Any]]:
        """What a checkpoint keeps: [source, kind, waiting sums, times in a row, raised]."""
        keys = sorted({*self._waiting, *self._in_a_row, *self._raised})
        return [[*key, self._waiting.get(key), self._in_a_row.get(key, 0), key in self._raised] for key in keys]

    def restore(self, state: Sequence[Sequence[Any]]) -> None:
        """Go on from a checkpoint's state."""
        for source, kind, waiting, count, raised in state:
            self._in_a_row[source, kind] = count
            if waiting is not None:
                self._waiting[source, kind] = waiting
            if raised:
                self._raised.add((source, kind))

    def check(self, step: int, sums: Tensor) -> list[Alarm]:
        """New alarms from the sums [sources + 1, GROUPS, COLUMNS] since the last log."""
        found = []
        watched = {source: sums[k] for k, source in enumerate(self.sources)}
        if len(self.sources) != 1:
            watched[""] = sums.sum(0)
        for source, rows in watched.items():
            for group, row in zip(GROUPS, rows.tolist(), strict=True):
                key = source, group
                before = self._waiting.pop(key, None)
                joined = row if before is None else [a + b for a, b in zip(before, row, strict=True)]
                s = dict(zip(COLUMNS, joined, strict=True))
                if s["tokens"] < ENOUGH:
                    if s["tokens"]:
                        self._waiting[key] = joined
                    continue
                low, pull = s["below_0.1"] / s["tokens"], s["pull"] / s["error"] if s["error"] else 1.0
                starved = low >= STARVED_SHARE and pull < STARVED_PULL
                count = self._in_a_row[key] = self._in_a_row.get(key, 0) + 1 if starved else 0
                if count >= PATIENCE and key not in self._raised:
                    self._raised.add(key)
                    found.append(Alarm(step, source, group, int(s["tokens"]), s["p"] / s["tokens"], low, pull))
        return found
