"""Last layer: which rows' hidden states are needed in; a forward pass whose last MLP computes these rows alone.

After the last attention no row sees another: what the last MLP would make of prompts, media and padding is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def last_rows_alone(model: Any, rows: Tensor) -> Iterator[None]:
    """Inside, the last hidden states of a forward pass on [B, L] tokens are right where rows [B, L] is true, and nowhere else.

    Where the last layer is no plain gated MLP nothing is left out.
    """
    layer = _last_layer(model)
    if layer is None:
        yield
        return
    places = rows.flatten().nonzero().squeeze(1)

    def take(module: Any, args: tuple[Any, ...]) -> Any:
        (hidden,) = args
        return (hidden.flatten(0, 1).index_select(0, places),)

    def put(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        whole = output.new_zeros(rows.numel(), output.shape[-1])
        return whole.index_copy(0, places, output).view(*rows.shape, -1)

    @contextmanager
    def hooked() -> Iterator[None]:
        hooks = layer.mlp.register_forward_pre_hook(take), layer.mlp.register_forward_hook(put)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    if not (getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()):
        with hooked():
            yield
        return
    recompute = layer._gradient_checkpointing_func  # its second run is in the backward pass, when this context is left

    def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
        return recompute(hooked()(function), *args)

    layer._gradient_checkpointing_func = checkpointed
    try:
        yield
    finally:
        layer._gradient_checkpointing_func = recompute


def _last_layer(model: Any) -> Any:
    """The last layer, where the rows of its MLP can be computed apart; None where not."""
    decoder = getattr(model.model, "language_model", model.model)
    layers: Any = getattr(decoder, "layers", None)
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    plain = isinstance(mlp, nn.Module) and hasattr(mlp, "down_proj") and not hasattr(mlp, "experts")
    return layers[-1] if plain else None
