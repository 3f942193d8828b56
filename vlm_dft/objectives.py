"""Token objectives: detached statistics of response tokens in, a weight w per token out; the loss is -sum(w * log p) / n."""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from vlm_dft.cards import nearest

if TYPE_CHECKING:  # tensors bring their methods: the names of the objectives are known without importing torch
    from torch import Tensor

IGNORE = -100  # a label that costs nothing, the convention of PyTorch and transformers
AT_ONCE = 1 << 20  # elements of a temporary on a CPU: some rows of the vocabulary, which stay in its cache


class TokenStats:
    """Detached statistics of n target tokens under the model in training: all that an objective may look at.

    log_p: [n], the log-probability of each target. The others are computed when first asked for, from the logits that are
    in memory at that time, so that an objective that asks for none costs nothing.
    """

    def __init__(self, log_p: Tensor, masses: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """masses: gives unnormalised probabilities [n, V], all >= 0, and their sums [n]."""
        self.log_p = log_p
        self._masses = masses

    @cached_property
    def p(self) -> Tensor:
        """[n], the probability of each target."""
        return self.log_p.exp()

    @cached_property
    def entropy(self) -> Tensor:
        """[n], -sum_v p_v log p_v of each token's distribution, in nats."""
        masses, total = self._masses()

        def surprise(rows: Tensor) -> Tensor:
            return rows.clamp(min=1e-38).log_().mul_(rows).sum(1)

        return total.log() - by_rows(surprise, masses) / total

    @cached_property
    def sum_p2(self) -> Tensor:
        """[n], sum_v p_v^2 of each token's distribution: 1 where it is certain, 1/V where it knows nothing."""
        masses, total = self._masses()
        return by_rows(lambda rows: (rows * rows).sum(1), masses) / total.square()

    def top_entropy(self, k: int) -> Tensor:
        """[n], entropy of the k likeliest tokens, their probabilities made to sum to 1, in nats: at most ln k."""
        masses, _ = self._masses()
        top = masses.topk(min(k, masses.shape[1]), dim=1).values
        top = top / top.sum(1, keepdim=True)
        return -(top * top.clamp(min=1e-38).log()).sum(1)


def by_rows(function: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """A function [r, V] -> [r] of a matrix's rows, on a CPU a few at a time so that temporaries stay small."""
    step = max(1, AT_ONCE // max(1, matrix.shape[1])) if matrix.device.type == "cpu" else max(1, len(matrix))
    found = matrix.new_empty(len(matrix))
    for start in range(0, len(matrix), step):
        found[start : start + step] = function(matrix[start : start + step])
    return found


Objective = Callable[[TokenStats], "Tensor"]
"""Weights of tokens: `TokenStats` of n tokens -> w [n], not negative. A function of one's own goes wherever a name does."""


def nll(stats: TokenStats) -> Tensor:
    """w = 1: plain supervised fine-tuning, the mean negative log-likelihood."""
    return stats.log_p.new_ones(stats.log_p.shape)


def dft(stats: TokenStats) -> Tensor:
    """w = p: Dynamic Fine-Tuning, L = -sum sg(p) log p (Wu et al. 2025, arXiv 2508.05629, eq. 9).

    The gradient is that of -p: on the target's logit -p(1-p), largest at p = 0.5 and near zero where p is near zero.
    """
    return stats.p


def power(stats: TokenStats, *, alpha: float = 0.5) -> Tensor:
    """w = p^alpha, alpha in [0, 2]: from nll (0) over dft (1) to sharper (2). The gradient is that of (1 - p^alpha) / alpha.

    Beyond Log-Likelihood, arXiv 2510.00526 (ICML 2026): large alpha where the prior is strong, small where it is weak.
    """
    return (alpha * stats.log_p).exp() if alpha else nll(stats)


def floor(stats: TokenStats, *, minimum: float = 0.1, alpha: float = 1.0) -> Tensor:
    """w = max(p^alpha, minimum): DFT that starves no token, its author's remedy (minimum 0.1; repository of 2508.05629)."""
    return power(stats, alpha=alpha).clamp(min=minimum)


def threshold(stats: TokenStats, *, tau: float = 0.2) -> Tensor:
    """w = 1 where p >= tau, else 0: tokens that the model does not expect are left out (2510.00526; ProFit, 2601.09195)."""
    return (stats.log_p >= (math.log(tau) if tau else -math.inf)).to(stats.log_p.dtype)


def eaft(stats: TokenStats, *, k: int = 20) -> Tensor:
    """w = H_k / ln k, H_k the entropy of the k likeliest tokens: full where the model is unsure, none where it is certain,
    be it of another token (Entropy-Adaptive Fine-Tuning, arXiv 2601.02151, k = 20)."""
    return stats.top_entropy(k) / math.log(k)


def deft(stats: TokenStats) -> Tensor:
    """w = p^a with a = sum_v p_v^2: near nll where the model knows nothing, near dft where it is certain (2602.11424)."""
    return (stats.sum_p2 * stats.log_p).exp()


def chord(stats: TokenStats) -> Tensor:
    """w = p(1-p): neither what is starved nor what is known already (CHORD, arXiv 2508.11408)."""
    return stats.p * -stats.log_p.expm1()


def focal(stats: TokenStats, *, gamma: float = 2.0) -> Tensor:
    """w = (1-p)^gamma: the opposite end, hard tokens first; a control (Lin et al. 2017, arXiv 1708.02002)."""
    return (-stats.log_p.expm1()).clamp(min=0).pow(gamma)


def mix(stats: TokenStats, *, share: float = 0.5) -> Tensor:
    """w = share + (1 - share) p: share x nll + (1 - share) x dft, so that a starved token keeps `share` of its pull."""
    return share + (1 - share) * stats.p


OBJECTIVES: dict[str, Objective] = {
    "nll": nll, "dft": dft, "power": power, "floor": floor, "threshold": threshold, "eaft": eaft, "deft": deft,
    "chord": chord, "focal": focal, "mix": mix,
}  # fmt: skip
"""Name -> objective. Add one's own before the collators are made: `OBJECTIVES["mine"] = lambda stats: stats.p.sqrt()`."""

BOUNDS: dict[str, tuple[float, float]] = {
    "alpha": (0, 2), "minimum": (0, 1), "tau": (0, 1), "k": (2, 1e9), "gamma": (0, 10), "share": (0, 1),
}  # fmt: skip
"""Smallest and largest value of the parameters."""


def find_objective(objective: str | Objective) -> Objective:
    """An objective by name, with parameters as in "floor(minimum=0.2)"; a function is passed through.

    Raises ValueError with the known names, or the known parameters and what they may be.
    """
    if callable(objective):
        return objective
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", str(objective))
    name = match[1] if match else str(objective)
    if match is None or name not in OBJECTIVES:
        raise ValueError(
            f"Unknown objective {objective!r}.{nearest(name, OBJECTIVES)} Choose one of {', '.join(sorted(OBJECTIVES))} "
            "(parameters in brackets: floor(minimum=0.2)), or pass a function from TokenStats to weights [n]."
        )
    parameters = _parameters(match[2] or "", name)
    return partial(OBJECTIVES[name], **parameters) if parameters else OBJECTIVES[name]


def canonical(objective: str) -> str:
    """An objective's name with its parameters in one spelling: "floor( minimum=.20 )" is "floor(minimum=0.2)"."""
    found = find_objective(objective)
    name = objective.split("(", 1)[0].strip()
    given = found.keywords if isinstance(found, partial) and found is not OBJECTIVES[name] else {}
    return f"{name}({', '.join(f'{key}={value:g}' for key, value in sorted(given.items()))})" if given else name


def _parameters(text: str, name: str) -> dict[str, float]:
    """The keyword arguments in the brackets of an objective, checked against the function's own."""
    known = {
        key: parameter.default
        for key, parameter in inspect.signature(OBJECTIVES[name]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    said = ", ".join(f"{key}={value}" for key, value in known.items()) or "none"
    found: dict[str, float] = {}
    for piece in filter(str.strip, text.split(",")):
        key, equals, word = (part.strip() for part in piece.partition("="))
        if key in found:
            raise ValueError(f"Objective {name}: {key} is given twice.")
        if not equals or key not in known:
            raise ValueError(
                f"Objective {name}: unknown parameter {piece.strip()!r}.{nearest(key, known)} Known: {said}."
            )
        low, high = BOUNDS.get(key, (-math.inf, math.inf))
        try:
            value = ast.literal_eval(word)
            if (
                isinstance(value, bool)
                or not low <= value <= high
                or (isinstance(known[key], int) and int(value) != value)
            ):
                raise ValueError
        except (ValueError, SyntaxError, TypeError):
            kind = "a whole number" if isinstance(known[key], int) else "a number"
            raise ValueError(
                f"Objective {name}: {key} must be {kind} from {low:g} to {high:g}, found {word!r}."
            ) from None
        found[key] = type(known[key])(value)
    return found


def weights_of(
    stats: TokenStats, objective: Objective, *, objective_ids: Tensor | None = None, full_weight: Tensor | None = None
) -> Tensor:
    """The weights [n] of tokens, some of which have an objective of their own, or the full weight of nll.

    objective_ids [n]: index into sorted OBJECTIVES, -1 for `objective`; full_weight [n] bool: w = 1 whatever the objective.
    Raises ValueError where an objective does not return one weight a token, or lets a gradient through.
    """
    weight = _checked(objective, stats)
    if objective_ids is not None:
        for index in objective_ids.unique().tolist():
            if index >= 0:
                named = OBJECTIVES[sorted(OBJECTIVES)[index]]
                weight = _checked(named, stats).where(objective_ids == index, weight)
    return weight if full_weight is None else weight.masked_fill(full_weight, 1.0)


def _checked(objective: Objective, stats: TokenStats) -> Tensor:
    """An objective's weights in the dtype of log p. Raises ValueError where they are not one detached weight >= 0 a token."""
    log_p, name = stats.log_p, getattr(objective, "__name__", repr(objective))
    before = None if log_p.is_inference() else log_p._version
    weight: Any = objective(stats)
    if before is not None and log_p._version != before:
        raise ValueError(
            f"Objective {name} changes the statistics in place, expected a pure function. Write exp(), not exp_()."
        )
    if getattr(weight, "shape", None) != log_p.shape:
        found = [*weight.shape] if hasattr(weight, "shape") else repr(weight)
        raise ValueError(f"Objective {name}: expected weights {[*log_p.shape]}, one a token, found {found}.")
    if weight.requires_grad:
        raise ValueError(
            f"Objective {name}: its weights require a gradient, expected a pure function of TokenStats, which are detached. "
            "Does it compute with a parameter? Detach that."
        )
    if not bool(((weight >= 0) & (weight < math.inf) | log_p.isnan()).all()):
        raise ValueError(
            f"Objective {name}: expected finite weights of 0 or more, found {weight.min().item():g} to {weight.max().item():g}."
        )
    return weight.to(log_p.dtype)  # type: ignore[no-any-return]


def token_loss(
    logits: Tensor,
    labels: Tensor,
    objective: str | Objective,
    num_items_in_batch: Any = None,
    *,
    loss_weights: Tensor | None = None,
    objective_ids: Tensor | None = None,
) -> Tensor:
    """The readable reference: logits [B, L, V] and labels [B, L] in, scalar loss out; full logits in memory.

    Position t's logits predict label t + 1. Labels of -100 cost nothing. The sum over targets is divided by
    `num_items_in_batch` (tokens of the whole optimiser step, over micro-batches and ranks) or, if None, by the
    targets of this batch. No target at all gives a zero that is connected to the logits. `loss_weights` and
    `objective_ids` [B, L]: of ChatCollator, where turns set their own (index into sorted OBJECTIVES; -1: `objective`).
    """
    targets = labels[..., 1:].to(logits.device)
    rows = targets != IGNORE
    kept = logits[..., :-1, :][rows]  # [n, V]
    kept = kept if kept.dtype.itemsize == 8 else kept.float()
    log_p = kept.gather(-1, targets[rows].unsqueeze(-1)).squeeze(-1) - kept.logsumexp(-1)  # [n]
    stats = TokenStats(log_p.detach(), lambda: (kept.detach().softmax(-1), log_p.new_ones(len(log_p)).detach()))
    own = None if objective_ids is None else objective_ids[..., 1:].to(logits.device)[rows]
    weight = weights_of(stats, find_objective(objective), objective_ids=own)
    if loss_weights is not None:
        weight = weight * loss_weights[..., 1:].to(logits.device)[rows]
    total = -(weight * log_p.where(weight != 0, 0.0)).sum()  # p = 0 to rounding: 0 * -inf is meant to be 0
    count = len(log_p) if num_items_in_batch is None else num_items_in_batch
    return total / max(count, 1)


def dft_loss(
    logits: Any,
    labels: Tensor,
    *,
    num_items_in_batch: Any = None,
    loss_weights: Tensor | None = None,
    objective_ids: Tensor | None = None,
) -> Tensor:
    """DFT loss of full logits [B, L, V] (or a model output that has `.logits`) and labels [B, L], -100 ignored.

    Wu et al. 2025, eq. 9: -sum sg(p) log p over the response tokens, divided by their number (`num_items_in_batch`
    when given: tokens of the whole step, not examples). Works in one's own loop and as `compute_loss_func` of a
    transformers Trainer. In one's own loop, take `loss_weights` and `objective_ids` out of the batch, where there are any,
    and give them here (a Trainer of other people passes none: train such rows with ours). Never forms less than the
    logits: for large vocabularies use `fused_linear_loss`, which also keeps the digits of fp32 near p = 1.
    """
    return token_loss(
        getattr(logits, "logits", logits),
        labels,
        dft,
        num_items_in_batch,
        loss_weights=loss_weights,
        objective_ids=objective_ids,
    )
