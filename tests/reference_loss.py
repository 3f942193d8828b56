"""Reference loss: inputs of any dtype in, loss, statistics and gradients out, in float64 with full logits and plain autograd.

Every formula is written out here from the papers (facts in Wu et al. 2025 and the others named in objectives.py); nothing
is taken from the package, so that a test against it is a test against something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAMES = [
    "chord",
    "deft",
    "dft",
    "eaft",
    "floor",
    "focal",
    "mix",
    "nll",
    "power",
    "threshold",
]  # objective_ids count these


def top_entropy(probabilities: Tensor, k: int) -> Tensor:
    """Entropy of the k largest probabilities of each row, made to sum to 1, in nats."""
    top = probabilities.sort(dim=1, descending=True).values[:, :k]
    top = top / top.sum(1, keepdim=True)
    return -torch.special.xlogy(top, top).sum(1)


WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nll": lambda p, P: torch.ones_like(p),
    "dft": lambda p, P: p,
    "power": lambda p, P: p**0.5,
    "power(alpha=1.5)": lambda p, P: p**1.5,
    "floor": lambda p, P: p.clamp(min=0.1),
    "floor(minimum=0.2)": lambda p, P: p.clamp(min=0.2),
    "floor(minimum=0.3, alpha=0.5)": lambda p, P: (p**0.5).clamp(min=0.3),
    "threshold": lambda p, P: (p >= 0.2).to(p.dtype),
    "threshold(tau=0.5)": lambda p, P: (p >= 0.5).to(p.dtype),
    "eaft": lambda p, P: top_entropy(P, 20) / math.log(20),
    "eaft(k=5)": lambda p, P: top_entropy(P, 5) / math.log(5),
    "deft": lambda p, P: p ** (P**2).sum(1),
    "chord": lambda p, P: p * (1 - p),
    "focal": lambda p, P: (1 - p) ** 2,
    "focal(gamma=1)": lambda p, P: 1 - p,
    "mix": lambda p, P: 0.5 + 0.5 * p,
    "mix(share=0.3)": lambda p, P: 0.3 + 0.7 * p,
}
"""Objective as it is asked for -> w of the targets' probabilities p [n] and of all probabilities P [n, V]."""

JUMPS = {"threshold": 0.2, "threshold(tau=0.5)": 0.5}  # where a rounding of p decides


@dataclass
class Found:
    """What the formulas give for the n targets."""

    loss: Tensor
    log_p: Tensor
    weight: Tensor
    entropy: Tensor
    kl: Tensor | None


def written_out(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    objective: Any = "dft",
    num_items: Any = None,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    soft_cap: float | None = None,
    token_weights: Tensor | None = None,
    objective_ids: Tensor | None = None,
    full_weight: Tensor | None = None,
    anchor: dict[str, Any] | None = None,
    detach: bool = True,
) -> Found:
    """-sum(w log p) / n + strength * sum(KL) / n of the rows with a target. detach=False: the mistake, to be told apart.

    anchor: hidden, weight, bias, soft_cap, strength and direction of the reference model.
    """
    rows = [k for k, target in enumerate(targets.tolist()) if target != -100]
    gold = targets[rows].long()
    logits = hidden[rows] @ weight.T
    if low_rank is not None:
        logits = logits + low_rank[0][rows] @ low_rank[1].T
    if bias is not None:
        logits = logits + bias
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    log_all = logits.log_softmax(1)
    every = log_all.exp()
    log_p = log_all[range(len(rows)), gold]
    find = objective if callable(objective) else WEIGHTS[objective]
    weights = find(log_p.exp(), every)
    for k, index in enumerate([] if objective_ids is None else objective_ids[rows].tolist()):
        if index >= 0:
            weights = weights.clone()
            weights[k] = WEIGHTS[NAMES[index]](log_p[k : k + 1].exp(), every[k : k + 1])[0]
    if full_weight is not None:
        weights = torch.where(full_weight[rows].bool(), torch.ones_like(weights), weights)
    weights = weights.detach() if detach else weights
    factors = torch.ones_like(log_p) if token_weights is None else token_weights[rows].to(log_p)
    count = max(float(len(rows) if num_items is None else num_items), 1.0)
    loss = -(weights * factors * log_p).sum() / count
    kl = None
    if anchor is not None:
        other = anchor["hidden"][rows] @ anchor["weight"].T
        if anchor.get("bias") is not None:
            other = other + anchor["bias"]
        if anchor.get("soft_cap") is not None:
            other = anchor["soft_cap"] * torch.tanh(other / anchor["soft_cap"])
        log_q = other.log_softmax(1).detach()
        forward, reverse = log_q.exp() * (log_q - log_all), every * (log_all - log_q)
        kl = (forward if anchor["direction"] == "forward" else reverse).sum(1)
        loss = loss + anchor["strength"] * kl.sum() / count
    entropy = -torch.special.xlogy(every, every).sum(1)
    return Found(loss, log_p.detach(), weights.detach(), entropy.detach(), None if kl is None else kl.detach())


def double(value: Any) -> Any:
    """Floating tensors, in any nesting, as float64 copies without history."""
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: double(one) for key, one in value.items()}
    return tuple(map(double, value)) if isinstance(value, tuple) else value


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference of two tensors over the norm of the second; the norm itself where the second is 0."""
    size = theirs.double().norm().item()
    return (ours.double() - theirs.double()).norm().item() / (size or 1.0)
