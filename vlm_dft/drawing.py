"""Drawing: numbers in [0, 1) that belong to each row in; tokens drawn from the model's probabilities, in the library's own generate, out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


class SeededDraws(LogitsProcessor):
    """Leaves of each row's scores the one token that the row's own number chooses; greedy decoding then takes it.

    So a draw depends on the row's probabilities and its numbers alone: not on the rows beside it, the size of the batch,
    the process, or what was drawn before. The token is the first one, in the vocabulary's order, at which the summed
    probabilities pass the number: float differences between batches move it only where the number lies on a border.

    uniforms: [rows, steps] in [0, 1), float64. width: ids of a prompt, padding included.
    """

    def __init__(self, uniforms: Tensor, width: int, *, temperature: float, top_p: float = 1.0) -> None:
        self.uniforms, self.width, self.temperature, self.top_p = uniforms, width, temperature, top_p

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """scores [rows, vocabulary] with 0 at the drawn ids and -inf elsewhere."""
        probabilities = torch.softmax(scores.double() / self.temperature, -1)
        if self.top_p < 1:
            largest, order = probabilities.sort(dim=-1, descending=True, stable=True)
            beyond = largest.cumsum(-1) - largest >= self.top_p
            probabilities = probabilities.scatter(-1, order, largest.masked_fill(beyond, 0.0))
        summed = probabilities.cumsum(-1)
        step = input_ids.shape[1] - self.width
        wanted = self.uniforms[:, step : step + 1].to(summed.device) * summed[:, -1:]
        chosen = torch.searchsorted(summed, wanted, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)
