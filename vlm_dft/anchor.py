"""Anchor: the hidden states of a reference model in, KL divergence to it and its gradient out, a tile of logits at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from vlm_dft.objectives import AT_ONCE

Direction = Literal["forward", "reverse"]
DIRECTIONS: tuple[str, ...] = get_args(Direction)


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
        fits = self.weight.ndim == 2 and self.hidden.shape == (len(rows), self.weight.shape[1])
        if (
            not fits
            or len(self.weight) != len(weight)
            or (self.bias is not None and self.bias.shape != weight.shape[:1])
        ):
            found = None if self.bias is None else [*self.bias.shape]
            raise ValueError(
                f"Expected an anchor with hidden [{len(rows)}, H], weight [{len(weight)}, H] and bias [{len(weight)}] or none, found "
                f"{[*self.hidden.shape]}, {[*self.weight.shape]} and {found}. Does the reference have the same vocabulary, and saw it "
                "the same batch?"
            )
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, hidden=self.hidden.detach()[rows], weight=self.weight.detach(), bias=bias)


def check_direction(direction: str | None, strength: float) -> None:
    """Raise ValueError unless the strength is positive and the direction is said."""
    if direction not in DIRECTIONS or not 0 < strength < math.inf:
        raise ValueError(
            f"Expected a KL strength above 0 and a direction, found {strength} and {direction!r}. Directions: 'forward', "
            "KL(reference || model), or 'reverse', KL(model || reference)."
        )


class AnchorTile:
    """The anchor's side of a tile of logits [c, V]: `kl` [c] and its gradient by the logits, `pull` [c, V], once all rows were seen."""

    def __init__(self, anchor: Anchor, part: slice, tile: Tensor) -> None:
        """Form the reference's logits of the rows of a chunk."""
        self.strength, self.direction = anchor.strength, anchor.direction
        rows, weight = anchor.hidden[part].to(tile.dtype), anchor.weight
        self.kl, self.pull = tile.new_empty(len(tile)), torch.empty_like(tile)  # pull: first the logits
        step = len(weight) if weight.dtype == tile.dtype else max(1, AT_ONCE // max(1, weight.shape[1]))
        for start in range(0, len(weight), max(1, step)):
            piece = slice(start, start + step)
            self.pull[:, piece] = rows @ weight[piece].to(tile.dtype).T
        if anchor.bias is not None:
            self.pull += anchor.bias
        if anchor.soft_cap is not None:
            self.pull.div_(anchor.soft_cap).tanh_().mul_(anchor.soft_cap)

    def visit(self, rows: slice, logits: Tensor, exponentials: Tensor) -> None:
        """Take in some rows of the model's logits, their maximum 0, and of their exponentials [r, V]; neither is changed."""
        mass = exponentials.sum(1, keepdim=True)
        log_p, log_q = logits - mass.log(), self.pull[rows].log_softmax(1)
        p = exponentials / mass
        if self.direction == "forward":
            q = log_q.exp()
            self.kl[rows] = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(1)
            self.pull[rows] = p.sub_(q)
        else:
            surprise = torch.where(p > 0, log_p - log_q, 0.0)
            self.kl[rows] = (p * surprise).sum(1)
            self.pull[rows] = p.mul_(surprise.sub_(self.kl[rows].unsqueeze(1)))
