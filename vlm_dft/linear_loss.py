"""Fused output head and objective: hidden states, head weight and targets in, scalar loss out; never [N, V] logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from vlm_dft.anchor import Anchor
from vlm_dft.loss_tiles import CHUNK, GPU_CHUNK, Call, Term, run_tiles
from vlm_dft.objectives import IGNORE, OBJECTIVES, Objective, find_objective


@dataclass(frozen=True, slots=True)
class LossStats:
    """What the loss saw of its n targets, in their order, detached: for diagnostics, at no second pass."""

    log_p: Tensor  # [n], fp32
    weight: Tensor  # [n], of the objective; token_weights are not in it
    entropy: Tensor  # [n], of the predicted distribution, in nats
    kl: Tensor | None = None  # [n], to the anchor, where there is one


@overload
def fused_linear_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, objective: str | Objective = ..., num_items: Any = ...,
    bias: Tensor | None = ..., token_weights: Tensor | None = ..., objective_ids: Tensor | None = ...,
    full_weight: Tensor | None = ..., soft_cap: float | None = ..., low_rank: tuple[Tensor, Tensor] | None = ...,
    anchor: Anchor | None = ..., weight_grad: Tensor | None = ..., label_smoothing: float = ..., chunk_size: int | None = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def fused_linear_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, objective: str | Objective = ..., num_items: Any = ...,
    bias: Tensor | None = ..., token_weights: Tensor | None = ..., objective_ids: Tensor | None = ...,
    full_weight: Tensor | None = ..., soft_cap: float | None = ..., low_rank: tuple[Tensor, Tensor] | None = ...,
    anchor: Anchor | None = ..., weight_grad: Tensor | None = ..., label_smoothing: float = ..., chunk_size: int | None = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, LossStats]: ...  # fmt: skip
@torch.compiler.disable  # type: ignore[untyped-decorator]  # shapes depend on the data: it runs between compiled parts
def fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    objective: str | Objective = "dft",
    num_items: Any = None,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    objective_ids: Tensor | None = None,
    full_weight: Tensor | None = None,
    soft_cap: float | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    anchor: Anchor | None = None,
    weight_grad: Tensor | None = None,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """-sum(w * log p) / num_items for logits = hidden @ weight.T + bias, with w = objective(TokenStats), detached.

    hidden: [N, H]; weight: [V, H]; targets: [N] ids already shifted (row i predicts targets[i]); bias: [V] or None.
    Rows with target -100 are dropped before any product. The logits exist only as [chunk_size, V] tiles, in fp32 whatever
    the inputs' dtype (fp64 for fp64), and the gradients of all inputs are formed with them, so the backward pass
    multiplies by the outer gradient and nothing else; it can be run once. What needs no gradient costs no product.
    Without any target the loss is a zero connected to all inputs.

    objective: a name of OBJECTIVES, with parameters as in "floor(minimum=0.2)", or a function.
    num_items: supervised tokens of the whole optimiser step; None means the targets given here.
    token_weights: [N] factors of the tokens' losses, not counted in the normaliser (a turn's `weight`).
    objective_ids: [N] index into sorted OBJECTIVES of tokens with an objective of their own; -1: `objective`.
    full_weight: [N] bool, tokens with w = 1 whatever the objective.
    soft_cap: logits become cap * tanh(logits / cap) (Gemma).
    low_rank: (down [N, r], up [V, r]): logits get + down @ up.T, a LoRA adapter on the head without merging it.
    anchor: adds strength * KL to a reference model (anchor.Anchor).
    weight_grad: [V, H], such as `weight.grad`: the weight's gradient is added to it during this call, and autograd gives
        none to the weight. Saves a [V, H] buffer, and time. Backpropagate the loss as it is: another outer gradient
        than 1 is refused. Not for a head inside activation checkpointing, or whose weight an engine shards or reduces.
    chunk_size: rows of a tile; None: 240 on a CPU (146 MB at V = 151,936), 2048 on a GPU.
    label_smoothing: refused; the smoothed loss of a token is not -log p, to which w belongs.

    Returns the fp32 scalar, and with `return_stats` also the LossStats of the n targets.
    Raises ValueError for shapes that do not fit and for targets outside the vocabulary.
    """
    if label_smoothing:
        raise ValueError(
            f"label_smoothing = {label_smoothing} was asked for, expected 0: an objective weighs -log p of the target, and a "
            "smoothed loss is another quantity. Leave it out; objective='mix' softens DFT."
        )
    _check_shapes(hidden, weight, targets, bias, low_rank, weight_grad)
    _check_numbers(num_items, soft_cap, chunk_size)
    for name, given in (
        ("token_weights", token_weights),
        ("objective_ids", objective_ids),
        ("full_weight", full_weight),
    ):
        if given is not None and given.shape != targets.shape:
            raise ValueError(f"Expected {name} {[*targets.shape]}, one per target, found {[*given.shape]}.")
    rows = targets != IGNORE
    kept = targets[rows]
    _check_range(kept, "Targets", 0, weight.shape[0], "Do the tokenizer and the head belong to the same model?")
    if objective_ids is not None:
        _check_range(objective_ids[rows], "objective_ids", -1, len(OBJECTIVES), "They index sorted(OBJECTIVES).")
    count = kept.numel() if num_items is None else num_items
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    call = Call(
        objective=find_objective(objective),
        scale=1.0 / torch.as_tensor(count, device=hidden.device, dtype=dtype).clamp(min=1.0),
        factors=None if token_weights is None else token_weights[rows].to(dtype),
        objective_ids=None if objective_ids is None else objective_ids[rows],
        full_weight=None if full_weight is None else full_weight[rows].bool(),
        soft_cap=soft_cap,
        anchor=None if anchor is None else anchor.select(rows, weight),
        weight_grad=weight_grad,
        chunk=chunk_size or (CHUNK if hidden.device.type == "cpu" else GPU_CHUNK),
        dtype=dtype,
        with_grad=torch.is_grad_enabled(),
        with_stats=return_stats,
    )
    down, up = (None, None) if low_rank is None else (low_rank[0][rows], low_rank[1])
    loss, *stats = _FusedLinearLoss.apply(hidden[rows], weight, bias, down, up, kept, call)
    if not return_stats:
        return loss  # type: ignore[no-any-return]
    return loss, LossStats(stats[0], stats[1], stats[2], None if anchor is None else stats[3])


def _check_shapes(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, low_rank: tuple[Tensor, Tensor] | None,
    weight_grad: Tensor | None,
) -> None:  # fmt: skip
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"Expected hidden and weight of floating point, found {hidden.dtype} and {weight.dtype}.")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"Expected hidden [N, H] and weight [V, H], found {[*hidden.shape]} and {[*weight.shape]}.")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"Expected targets [{hidden.shape[0]}], one per hidden row, found {[*targets.shape]}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"Expected bias [{weight.shape[0]}], found {[*bias.shape]}.")
    if low_rank is not None:
        down, up = low_rank
        if (
            (len(hidden), len(weight)) != (len(down), len(up))
            or down.ndim != 2
            or up.ndim != 2
            or down.shape[1] != up.shape[1]
        ):
            raise ValueError(
                f"Expected low_rank [{hidden.shape[0]}, r] and [{weight.shape[0]}, r], found {[*down.shape]} and {[*up.shape]}."
            )
    if weight_grad is not None and (
        weight_grad.shape != weight.shape or weight_grad.dtype not in (torch.float32, torch.float64)
    ):
        raise ValueError(
            f"Expected weight_grad {[*weight.shape]} in fp32 (or fp64), found {[*weight_grad.shape]} in {weight_grad.dtype}."
        )


def _check_numbers(num_items: Any, soft_cap: float | None, chunk_size: int | None) -> None:
    if isinstance(num_items, (int, float)) and not 0 <= num_items < math.inf:
        raise ValueError(f"Expected num_items of 0 or more, the supervised tokens of the step, found {num_items}.")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"Expected a soft_cap above 0, or None, found {soft_cap}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"Expected a chunk_size of at least 1, found {chunk_size}.")


def _check_range(values: Tensor, name: str, low: int, stop: int, hint: str) -> None:
    """Raise ValueError unless the values are integers in [low, stop)."""
    if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
        raise ValueError(f"Expected integer {name}, found {values.dtype}.")
    least, most = (int(edge) for edge in values.aminmax()) if values.numel() else (low, low)
    if least < low or most >= stop:
        ignored = "-100 or " if low == 0 else ""
        raise ValueError(f"{name} must be {ignored}in [{low}, {stop}), found {least} to {most}. {hint}")


class _FusedLinearLoss(torch.autograd.Function):
    """Gradients of logits are scale * w * (softmax - onehot): known in the forward pass, since w is detached."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None,
        targets: Tensor, call: Call,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        needs = [call.with_grad and need for need in ctx.needs_input_grad[:5]]
        device = hidden.device.type
        compute = call.dtype
        if device != "cpu" and compute == torch.float32:  # half precision pays there; on a CPU it costs
            compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            pairs = [Term(hidden, weight, compute, needs[0], needs[1], call.weight_grad, call.chunk)]
            if down is not None and up is not None:
                pairs.append(Term(down, up, compute, needs[3], needs[4], None, call.chunk))
            loss, stats, grad_bias = run_tiles(pairs, bias, needs[2], targets, call)
        ctx.in_place = pairs[0].in_place
        adapter = (pairs[1].grad_rows, pairs[1].weight_grad()) if len(pairs) > 1 else (None, None)
        ctx.grads = (
            pairs[0].grad_rows,
            pairs[0].weight_grad(),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            *adapter,
        )
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_linear_loss has no second derivative (create_graph=True). Use dft_loss on full logits for it."
            )
        if ctx.grads is None:
            raise RuntimeError(
                "The gradients of fused_linear_loss are formed in its forward pass and given out once. Expected one backward "
                "pass, found a second (retain_graph=True?). Call fused_linear_loss again for it."
            )
        grads, ctx.grads = ctx.grads, None
        on_host = grad_loss.device.type == "cpu"
        plain = (on_host or ctx.in_place) and float(grad_loss) == 1.0
        if ctx.in_place and not plain:
            raise RuntimeError(
                f"With weight_grad the gradient is added before the outer one is known. Expected the loss to be "
                f"backpropagated as it is (outer gradient 1), found {float(grad_loss)}. Put the factor into num_items or "
                "token_weights, or leave weight_grad out. The sums in weight_grad are to be thrown away."
            )
        if not plain:
            for grad in grads:
                if grad is not None:
                    grad.mul_(grad_loss.to(grad.dtype))
        return (*grads, None, None)
