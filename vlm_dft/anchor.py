"""Anchor: the hidden states of a reference model in, KL divergence to it and its gradient out, a tile of logits at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from vlm_dft.objectives import AT_ONCE

Direction = Literal["forward", "reverse"]
DIRECTIONS: tuple[str, ...] = get_args(Direction)
TINY = 1e-45  # the smallest fp32: a logit more than 103 below the largest counts as that


@dataclass(frozen=True, slots=True)
class Anchor:
    """strength * KL between the model in training and a reference, on every target token (ASFT, arXiv 2509.23753: dft and 0.03).

    direction: "forward" is KL(reference || model), which keeps all that the reference does; "reverse" is KL(model ||
    reference), which keeps the model from what the reference does not do. Papers and code disagree on it, so it is said.
    hidden: [N, H'], the reference's last hidden states of the same rows; weight: [V, H'], its head; bias: [V] or None.
    A tile of the reference's logits is in memory beside the model's.
    """

    hidden: Tensor
    weight: Tensor
    strength: float
    direction: Direction
    bias: Tensor | None = None
    soft_cap: float | None = None

    def select(self, rows: Tensor, weight: Tensor) -> Anchor:
        """The anchor of the given rows, detached. Raises ValueError where it does not fit the head's weight [V, H]."""
        check_direction(self.direction, self.strength)
        if self.hidden.shape[:1] != rows.shape or len(self.weight) != len(weight):
            raise ValueError(
                f"Expected an anchor with hidden [{len(rows)}, H] and weight [{len(weight)}, H], found {[*self.hidden.shape]} "
                f"and {[*self.weight.shape]}. Does the reference have the same vocabulary, and saw it the same batch?"
            )
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, hidden=self.hidden.detach()[rows], weight=self.weight.detach(), bias=bias)


def check_direction(direction: str | None, strength: float) -> None:
    """Raise ValueError unless the strength is positive and the direction is said."""
    if direction not in DIRECTIONS or not strength > 0:
        raise ValueError(
            f"Expected a KL strength above 0 and a direction, found {strength} and {direction!r}. Directions: 'forward', "
            "KL(reference || model), or 'reverse', KL(model || reference)."
        )


def anchor_tile(
    anchor: Anchor, part: slice, tile: Tensor, mass: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """KL [c] of a tile of unnormalised probabilities [c, V] with sums mass [c], and its gradient by the logits [c, V]."""
    rows, weight = anchor.hidden[part].to(tile.dtype), anchor.weight
    pull = torch.empty_like(tile)  # holds the reference's logits, then the gradient
    step = len(weight) if weight.dtype == tile.dtype else max(1, AT_ONCE // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        piece = slice(start, start + step)
        pull[:, piece] = rows @ weight[piece].to(tile.dtype).T
    if anchor.bias is not None:
        pull += anchor.bias
    if anchor.soft_cap is not None:
        pull.div_(anchor.soft_cap).tanh_().mul_(anchor.soft_cap)
    kl = torch.empty_like(mass)
    height = max(1, AT_ONCE // max(1, tile.shape[1]))
    for start in range(0, len(tile), height):
        few = slice(start, start + height)
        total = mass[few].unsqueeze(1)
        p = tile[few] / total
        log_p = tile[few].clamp(min=TINY).log_().sub_(total.log())
        log_q = pull[few].log_softmax(1)
        if anchor.direction == "forward":
            q = log_q.exp()
            kl[few] = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(1)
            pull[few] = p.sub_(q)
        else:
            surprise = torch.where(p > 0, log_p - log_q, 0.0)
            kl[few] = (p * surprise).sum(1)
            pull[few] = p.mul_(surprise.sub_(kl[few].unsqueeze(1)))
    return kl, pull if with_gradient else None
