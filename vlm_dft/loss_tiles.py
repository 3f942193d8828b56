"""Loss tiles: hidden rows and a head's weight in, loss, statistics and gradients out, one [c, V] tile of logits at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_dft.anchor import Anchor, AnchorTile
from vlm_dft.objectives import AT_ONCE, Objective, TokenStats, weights_of

CHUNK = 240  # rows of logits alive at a time: with what is beside them 156 MB at V = 151,936, a tile of 256 rows
GPU_CHUNK = (
    2048  # there, with few rows a product waits for the weight's bytes: 1.2 GB, as the gradient of a 3B model's head
)
GPU_AT_ONCE = 1 << 26  # elements of a cast piece of the weight on a GPU, where small products are slow


@dataclass(frozen=True, slots=True)
class Call:
    """What a call of the loss was given beside its differentiable inputs, rows selected."""

    objective: Objective
    scale: Tensor  # 1 / num_items
    factors: Tensor | None
    objective_ids: Tensor | None
    full_weight: Tensor | None
    soft_cap: float | None
    anchor: Anchor | None
    weight_grad: Tensor | None
    chunk: int
    dtype: torch.dtype  # of the tiles
    with_grad: bool
    with_stats: bool

    def weigh(self, stats: TokenStats, part: slice) -> Tensor:
        """The objective's weights of the tokens of a chunk."""
        ids = None if self.objective_ids is None else self.objective_ids[part]
        full = None if self.full_weight is None else self.full_weight[part]
        with torch.enable_grad():  # so that an objective with parameters of its own is seen, and refused
            return weights_of(stats, self.objective, objective_ids=ids, full_weight=full)


class Term:
    """A term rows @ weight.T of the logits, [n, H] and [V, H]: its products, and the gradients as they grow.

    The weight is cast to the dtype of the products piece by piece, so that no second copy of it is made.
    """

    def __init__(
        self, rows: Tensor, weight: Tensor, compute: torch.dtype, needs_rows: bool, needs_weight: bool,
        weight_grad: Tensor | None, chunk: int,
    ) -> None:  # fmt: skip
        self.rows, self.weight, self.compute = rows, weight, compute
        self.grad_rows = torch.empty_like(rows) if needs_rows else None
        self.in_place = needs_weight and weight_grad is not None
        self._grad, self._filled = weight_grad if self.in_place else None, self.in_place
        if needs_weight and not self.in_place:
            single = len(rows) <= chunk  # then nothing is summed, and the gradient is rounded once
            self._grad = torch.empty(
                weight.shape, dtype=weight.dtype if single else _wide(weight.dtype), device=weight.device
            )
        self._scratch = None
        if weight.dtype != compute:
            self._scratch = torch.empty(self._step(), weight.shape[1], dtype=compute, device=weight.device)

    def _step(self) -> int:
        """Rows of the weight in a piece: all of them where nothing is to be cast."""
        size = AT_ONCE if self.weight.device.type == "cpu" else GPU_AT_ONCE
        whole = self.weight.dtype == self.compute and self.weight.device.type == "cpu"
        return len(self.weight) if whole else min(len(self.weight), max(1, size // max(1, self.weight.shape[1])))

    def _pieces(self) -> Iterator[slice]:
        step = max(1, self._step())
        return (slice(start, min(start + step, len(self.weight))) for start in range(0, len(self.weight), step))

    def _cast(self, piece: slice) -> Tensor:
        if self._scratch is None:
            return self.weight[piece]
        return self._scratch[: piece.stop - piece.start].copy_(self.weight[piece])

    def add_logits(self, part: slice, tile: Tensor, first: bool) -> None:
        """tile [c, V] = (or +=) rows @ weight.T."""
        rows = self.rows[part].to(self.compute)
        for piece in self._pieces():
            _product(rows, self._cast(piece).T, tile[:, piece], add=not first)

    def add_gradients(self, part: slice, tile: Tensor, row_scale: Tensor) -> None:
        """From the gradient of the logits, row_scale [c] x tile [c, V]: that of the rows, and the weight's summand."""
        small = tile if tile.dtype == self.compute else tile.to(self.compute)
        if self.grad_rows is not None:
            total = tile.new_empty(len(tile), self.weight.shape[1])
            for k, piece in enumerate(self._pieces()):
                _product(small[:, piece], self._cast(piece), total, add=k > 0)
            self.grad_rows[part] = total.mul_(row_scale.unsqueeze(1))
        if self._grad is not None:
            rows = (self.rows[part].to(tile.dtype) * row_scale.unsqueeze(1)).to(self.compute)
            for piece in self._pieces():
                _product(small[:, piece].T, rows, self._grad[piece], add=self._filled)
            self._filled = True

    def weight_grad(self) -> Tensor | None:
        """The weight's gradient in its dtype; None where it needs none, or has it already."""
        if self._grad is None or self.in_place:
            return None
        return self._grad.to(self.weight.dtype) if self._filled else self._grad.zero_().to(self.weight.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype to sum in."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def _product(left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
    """out = (or +=) left @ right, accumulated in fp32 (fp64 for fp64) and rounded once."""
    if out.dtype == left.dtype:
        if add:
            out.addmm_(left, right)
        else:
            torch.mm(left, right, out=out)  # into what is there: a fresh result would cost as much as the product
    elif left.dtype == torch.float32 or not left.is_cuda:
        found = torch.mm(left, right)
        out.add_(found) if add else out.copy_(found)
    else:
        found = torch.mm(left, right, out_dtype=torch.float32)
        out.add_(found) if add else out.copy_(found)


def run_tiles(
    pairs: list[Term], bias: Tensor | None, needs_bias: bool, targets: Tensor, call: Call
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Loss, statistics and the bias's gradient; the pairs' gradients grow in them."""
    count, device = len(targets), targets.device
    vocabulary = len(pairs[0].weight)
    tiles = torch.empty(min(count, call.chunk), vocabulary, dtype=call.dtype, device=device)  # the only one alive
    grad_bias = torch.zeros(vocabulary, dtype=call.dtype, device=device) if needs_bias else None
    total = torch.zeros((), dtype=torch.float64, device=device)
    columns = 1 + 2 * call.with_stats + (call.anchor is not None)
    stats = [torch.empty(count, dtype=call.dtype, device=device) for _ in range(columns)]
    wants_gradients = grad_bias is not None or any(p.grad_rows is not None or p._grad is not None for p in pairs)
    for start in range(0, count, call.chunk):
        part = slice(start, min(start + call.chunk, count))
        tile, gold = tiles[: part.stop - start], targets[part].unsqueeze(1)  # [c, V], [c, 1]
        for k, pair in enumerate(pairs):
            pair.add_logits(part, tile, first=k == 0)
        if bias is not None:
            tile += bias
        anchored = None if call.anchor is None else AnchorTile(call.anchor, part, tile)
        log_p, rest, mass, entropy, slope = _exponentials(tile, gold, call, anchored, wants_gradients)
        seen = TokenStats(log_p, lambda tile=tile, mass=mass: (tile, mass))  # type: ignore[misc]
        if entropy is not None:
            seen.entropy = entropy
        weight = call.weigh(seen, part)
        row = weight * call.scale if call.factors is None else weight * call.factors[part] * call.scale
        total -= torch.where(row == 0, 0.0, row * log_p).double().sum()  # p = 0: 0 * -inf is meant to be 0
        found = [log_p, weight, seen.entropy] if call.with_stats else [log_p]
        if anchored is not None:
            total += anchored.strength * (anchored.kl * call.scale).double().sum()
            found.append(anchored.kl)
        for column, values in zip(stats, found, strict=True):
            column[part] = values
        if not wants_gradients:
            continue
        tile.scatter_(1, gold, -rest.unsqueeze(1))  # softmax - onehot, times mass: without cancellation near p = 1
        row_scale = row / mass
        if anchored is not None:
            tile.mul_(row_scale.unsqueeze(1)).add_(anchored.pull.mul_(anchored.strength * call.scale))
            row_scale = torch.ones_like(row_scale)
        if slope is not None:
            tile.mul_(slope)
        for pair in pairs:
            pair.add_gradients(part, tile, row_scale)
        if grad_bias is not None:
            grad_bias.addmv_(tile.T, row_scale)
    return total.to(call.dtype), stats, grad_bias


def _exponentials(
    tile: Tensor, gold: Tensor, call: Call, anchored: AnchorTile | None, wants_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Turn logits into exp(logits - their maximum), in place, a few rows at a time so that they stay in a CPU's cache.

    Returns, each [c]: log p of gold, the sum of all others' exponentials, the sum of all, and the entropy if wanted; and the
    derivative [c, V] of soft-capped logits. The anchor sees the rows while the logits are at hand.
    log p = -log1p(rest / e_gold) is exact near p = 1, where log(e_gold / mass) has lost all digits.
    """
    step = max(1, AT_ONCE // max(1, tile.shape[1])) if tile.device.type == "cpu" else max(1, len(tile))
    rest, logit, e_gold, cross = tile.new_empty(4, len(tile)).unbind()
    keeps = call.with_stats or anchored is not None
    scratch = tile.new_empty(min(step, len(tile)), tile.shape[1]) if keeps else None
    slope = torch.empty_like(tile) if call.soft_cap is not None and wants_gradients else None
    for start in range(0, len(tile), step):
        rows = slice(start, start + step)
        block, own = tile[rows], gold[rows]
        if call.soft_cap is not None:
            block.div_(call.soft_cap).tanh_()
            if slope is not None:
                slope[rows] = 1 - block.square()
            block.mul_(call.soft_cap)
        block.sub_(block.amax(1, keepdim=True))
        logit[rows] = block.gather(1, own).squeeze(1)
        if scratch is None:
            block.exp_()
        else:
            e = torch.exp(block, out=scratch[: len(block)])
            if anchored is not None:
                anchored.visit(rows, block, e)
            cross[rows] = block.clamp_(min=-1e4).mul_(e).sum(1)  # of e^x x; -inf * 0 is meant to be 0
            block.copy_(e)
        e_gold[rows] = block.gather(1, own).squeeze(1)
        rest[rows] = block.scatter_(1, own, 0.0).sum(1)
        block.scatter_(1, own, e_gold[rows].unsqueeze(1))
    mass = rest + e_gold
    log_p = torch.where(e_gold > rest, -(rest / e_gold).log1p(), logit - mass.log())
    return log_p, rest, mass, mass.log() - cross / mass if call.with_stats else None, slope
