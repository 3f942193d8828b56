"""Token objectives: detached per-token log-probabilities in, per-token weights w out; the loss is -sum(w * log p) / n."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vlm_dft.cards import nearest

if TYPE_CHECKING:  # tensors bring their methods: the names of the objectives are known without importing torch
    from torch import Tensor

IGNORE = -100  # a label that costs nothing, the convention of PyTorch and transformers

Objective = Callable[["Tensor"], "Tensor"]
"""Weights of tokens: `log_p [n]` (fp32, detached, the model's log-probability of each target) -> `w [n]`."""


def nll(log_p: Tensor) -> Tensor:
    """w = 1: plain supervised fine-tuning, the mean negative log-likelihood."""
    return log_p.new_ones(log_p.shape)


def dft(log_p: Tensor) -> Tensor:
    """w = p: Dynamic Fine-Tuning, L = -sum sg(p) log p (Wu et al. 2025, arXiv 2508.05629, eq. 9).

    The gradient is that of -p: on the target's logit -p(1-p), largest at p = 0.5 and near zero where p is near zero.
    """
    return log_p.exp()


OBJECTIVES: dict[str, Objective] = {"nll": nll, "dft": dft}


def find_objective(objective: str | Objective) -> Objective:
    """An objective by name, or a function passed through. Raises ValueError with the known names."""
    if callable(objective):
        return objective
    if objective not in OBJECTIVES:
        raise ValueError(
            f"Unknown objective {objective!r}.{nearest(str(objective), OBJECTIVES)} "
            f"Choose one of {sorted(OBJECTIVES)}, or pass a function from log p [n] to weights [n]."
        )
    return OBJECTIVES[objective]


def token_loss(
    logits: Tensor,
    labels: Tensor,
    objective: Objective,
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
    kept = logits[..., :-1, :][rows].float()  # [n, V]
    log_p = kept.log_softmax(-1).gather(-1, targets[rows].unsqueeze(-1)).squeeze(-1)  # [n]
    weight = objective(log_p.detach())
    if objective_ids is not None:
        own = objective_ids[..., 1:].to(logits.device)[rows]
        for index, name in enumerate(sorted(OBJECTIVES)):
            weight = weight.where(own != index, OBJECTIVES[name](log_p.detach()))
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
    logits: for large vocabularies use `fused_linear_loss`.
    """
    return token_loss(
        getattr(logits, "logits", logits),
        labels,
        dft,
        num_items_in_batch,
        loss_weights=loss_weights,
        objective_ids=objective_ids,
    )
