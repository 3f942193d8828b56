"""Fused output head and objective: hidden states, head weight and targets in, scalar loss out; never [N, V] logits."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from vlm_dft.objectives import IGNORE, Objective, find_objective

CHUNK = 256  # rows of logits alive at a time: [256, V] fp32 is 156 MB at V = 151,936


@overload
def fused_linear_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, objective: str | Objective = ..., num_items: Any = ...,
    bias: Tensor | None = ..., token_weights: Tensor | None = ..., chunk_size: int = ..., return_log_p: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def fused_linear_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, objective: str | Objective = ..., num_items: Any = ...,
    bias: Tensor | None = ..., token_weights: Tensor | None = ..., chunk_size: int = ..., return_log_p: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    objective: str | Objective = "dft",
    num_items: Any = None,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    chunk_size: int = CHUNK,
    return_log_p: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """-sum(w * log p) / num_items for logits = hidden @ weight.T + bias, with w = objective(log p) detached.

    hidden: [N, H]; weight: [V, H]; targets: [N] ids already shifted (row i predicts targets[i]); bias: [V] or None.
    Rows with target -100 are dropped before any product. `num_items`: supervised tokens of the whole optimiser step;
    None means the targets given here. The logits exist only as [chunk_size, V] tiles in fp32, and the gradients of
    hidden, weight and bias are formed with them, so the backward pass is one multiplication by the outer gradient.
    `token_weights` [N]: factors of the tokens' losses, not counted in the normaliser (a turn's `weight`).
    Without any target the loss is a zero connected to all inputs. A frozen weight costs no gradient product.

    Returns the fp32 scalar, and with `return_log_p` also the detached log p [n] of the n supervised rows.
    Raises ValueError for shapes that do not fit and for targets outside the vocabulary.
    """
    _check(hidden, weight, targets, bias, token_weights)
    rows = targets != IGNORE
    kept, kept_targets = hidden[rows], targets[rows]
    if kept_targets.numel() and not (int(kept_targets.min()) >= 0 and int(kept_targets.max()) < weight.shape[0]):
        raise ValueError(
            f"Targets must be -100 or in [0, {weight.shape[0]}), found {int(kept_targets.min())} to "
            f"{int(kept_targets.max())}. Do the tokenizer and the head belong to the same model?"
        )
    count = kept_targets.numel() if num_items is None else num_items
    scale = 1.0 / torch.as_tensor(count, device=hidden.device, dtype=torch.float32).clamp(min=1.0)
    factors = (
        torch.ones_like(kept_targets, dtype=torch.float32) if token_weights is None else token_weights[rows].float()
    )
    loss, log_p = _FusedLinearLoss.apply(
        kept, weight, bias, kept_targets, find_objective(objective), scale, factors, chunk_size
    )
    return (loss, log_p) if return_log_p else loss


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, token_weights: Tensor | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"Expected hidden [N, H] and weight [V, H], found {[*hidden.shape]} and {[*weight.shape]}.")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"Expected targets [{hidden.shape[0]}], one per hidden row, found {[*targets.shape]}.")
    if token_weights is not None and token_weights.shape != targets.shape:
        raise ValueError(f"Expected token_weights {[*targets.shape]}, one per target, found {[*token_weights.shape]}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"Expected bias [{weight.shape[0]}], found {[*bias.shape]}.")


class _FusedLinearLoss(torch.autograd.Function):
    """Gradients of logits are scale * w * (softmax - onehot): known in the forward pass, since w is detached."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, objective: Objective,
        scale: Tensor, factors: Tensor, chunk_size: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        device = hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with torch.autocast(device, enabled=False):
            head = _operand(weight, compute)
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
            grad_bias = torch.zeros(weight.shape[:1], device=weight.device) if needs_bias and bias is not None else None
            loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
            log_p = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
            for start in range(0, len(targets), chunk_size):
                part = slice(start, start + chunk_size)
                rows, gold = _operand(hidden[part], compute), targets[part].unsqueeze(1)  # [c, H], [c, 1]
                tile = _matmul(rows, head.T)  # [c, V] fp32, the only tile alive
                if bias is not None:
                    tile += bias
                log_z = tile.logsumexp(1)  # [c]
                chunk_log_p = tile.gather(1, gold).squeeze(1) - log_z
                log_p[part] = chunk_log_p
                row_weight = objective(chunk_log_p).float() * factors[part] * scale  # [c]
                loss -= torch.where(row_weight == 0, 0.0, row_weight * chunk_log_p).sum()  # p = 0: 0 * -inf is 0
                tile.sub_(log_z.unsqueeze(1)).exp_()
                tile.scatter_add_(1, gold, torch.full_like(gold, -1, dtype=tile.dtype))
                tile.mul_(row_weight.unsqueeze(1))  # gradient of the logits
                if grad_hidden is not None:
                    grad_hidden[part] = _matmul(tile.to(head.dtype), head).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight += _matmul(tile.T.to(rows.dtype), rows)
                if grad_bias is not None:
                    grad_bias += tile.sum(0)
        ctx.mark_non_differentiable(log_p)
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return loss, log_p

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_log_p: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors)
        return (*grads, None, None, None, None, None)


def _operand(matrix: Tensor, compute: torch.dtype) -> Tensor:
    """The matrix in the dtype of the product: as autocast says on an accelerator, fp32 on a CPU (bf16 is slow there)."""
    return matrix.to(compute) if matrix.is_cuda else matrix.float()


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, accumulated and returned in fp32 whatever the inputs' dtype."""
    if left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)
