"""Embedding: token ids in, their vectors out; the gradient is added straight to weight.grad, never a fresh [V, H].

Autograd's way makes a gradient of every row of the vocabulary for the few that a batch holds: at 152k rows of 2,048 numbers
1.2 GB a step, filled with zeros and added up.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


class _Lookup(torch.autograd.Function):
    """weight[ids], whose backward pass adds to weight.grad."""

    @staticmethod
    def forward(context: Any, weight: Tensor, ids: Tensor, module: InPlaceEmbedding) -> Tensor:
        context.module = module
        context.save_for_backward(ids)
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[None, None, None]:
        module: InPlaceEmbedding = context.module
        (ids,) = context.saved_tensors
        if module.padding_idx is not None:
            grad = grad.masked_fill((ids == module.padding_idx).unsqueeze(-1), 0)
        used, places = ids.unique(return_inverse=True)
        rows = torch.ops.aten.embedding_dense_backward(grad, places, len(used), -1, False)  # summed in autograd's order
        module.weight_grad().index_add_(
            0, used, rows.to(module.weight.dtype)
        )  # each row once: the same bits on any device
        return None, None, None


class InPlaceEmbedding(nn.Embedding):
    """An embedding whose gradient goes straight into weight.grad where `in_place` is set: one process, no engine."""

    in_place = False
    _kept: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:  # nn.Embedding's name for it
        if not (self.in_place and torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(input)
        return cast(Tensor, _Lookup.apply(self.weight, input, self))

    def weight_grad(self) -> Tensor:
        """weight.grad, made of last step's buffer where an optimiser has taken it away."""
        weight = self.weight
        if weight.grad is None:
            fits = self._kept is not None and self._kept.shape == weight.shape and self._kept.device == weight.device
            weight.grad = self._kept.zero_() if fits and self._kept is not None else torch.zeros_like(weight)
        self._kept = weight.grad
        return weight.grad


def give_in_place_gradient(embedding: Any) -> InPlaceEmbedding | None:
    """Turn a plain embedding into one that can add its gradient in place, its weights and hooks as they are; None for another."""
    if isinstance(embedding, InPlaceEmbedding):
        return embedding
    plain = type(embedding) is nn.Embedding and embedding.max_norm is None
    if not plain or embedding.scale_grad_by_freq or embedding.sparse or embedding.weight.dtype.itemsize < 4:
        return None
    embedding.__class__ = InPlaceEmbedding
    return cast(InPlaceEmbedding, embedding)
