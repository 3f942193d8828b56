"""The fused head and objective, against the plain formula in float64 with full logits."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_loss import JUMPS, NAMES, WEIGHTS, Found, distance, double, written_out
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from vlm_dft import dft_loss, fused_linear_loss
from vlm_dft.anchor import Anchor

FULL = 151_936  # Qwen2.5's vocabulary
WAS = 2.0**-10  # in a weight's gradient before the call: exact in every dtype, and little, so that sums round little


@dataclass
class Case:
    """A call of the loss: its differentiable inputs, and the rest."""

    leaves: dict[str, torch.Tensor]
    targets: torch.Tensor
    options: dict[str, Any]
    anchor: dict[str, Any] | None = None
    frozen: set[str] = field(default_factory=set)
    in_place: bool = False
    seen: Any = None  # the statistics of the latest call that asked for them

    def ours(self, chunk: int, **more: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        """Loss and gradients of the fused loss; of what is frozen None."""
        leaves = {name: leaf.detach().requires_grad_(name not in self.frozen) for name, leaf in self.leaves.items()}
        held = None
        if self.in_place:
            held = torch.full(
                leaves["weight"].shape, WAS, dtype=torch.promote_types(leaves["weight"].dtype, torch.float32)
            )
        out = fused_linear_loss(
            leaves["hidden"], leaves["weight"], self.targets, bias=leaves.get("bias"),
            low_rank=(leaves["down"], leaves["up"]) if "up" in leaves else None,
            anchor=None if self.anchor is None else Anchor(**self.anchor),
            weight_grad=held, chunk_size=chunk, **self.options, **more,
        )  # fmt: skip
        loss, self.seen = out if isinstance(out, tuple) else (out, None)
        if loss.requires_grad:
            loss.backward()
        found = {name: leaf.grad for name, leaf in leaves.items()}
        if held is not None:
            assert found["weight"] is None
            found["weight"] = None if "weight" in self.frozen else held - WAS
            assert "weight" not in self.frozen or bool((held == WAS).all())
        return loss.detach(), found

    def theirs(self, detach: bool = True) -> tuple[Found, dict[str, torch.Tensor | None]]:
        """The same in float64 by hand."""
        leaves = {name: double(leaf).requires_grad_(name not in self.frozen) for name, leaf in self.leaves.items()}
        found = written_out(
            leaves["hidden"], leaves["weight"], self.targets, bias=leaves.get("bias"),
            low_rank=(leaves["down"], leaves["up"]) if "up" in leaves else None,
            anchor=double(self.anchor), detach=detach, **double(self.options),
        )  # fmt: skip
        if found.loss.requires_grad:
            found.loss.backward()
        return found, {name: leaf.grad for name, leaf in leaves.items()}


def drawn(dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> Case:
    """Forty rows, of which ten are masked, over thirty tokens, with likely and unlikely targets."""
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(40, 6, generator=draw), torch.randn(30, 6, generator=draw)
    targets = torch.randint(0, 30, (40,), generator=draw)
    targets[::2] = (hidden @ weight.T)[::2].argmax(1)
    targets[1::4] = -100
    return Case({"hidden": hidden.to(dtype), "weight": weight.to(dtype)}, targets, options)


def check(case: Case, chunk: int, exact: float, with_stats: bool) -> None:
    """Loss, gradients and statistics of a case as the formulas give them; bf16 gradients are those, rounded once."""
    loss, found = case.ours(chunk, return_stats=with_stats)
    expected, wanted = case.theirs()
    assert loss.item() == pytest.approx(expected.loss.item(), rel=exact, abs=exact * 1e-2)
    for name in ("log_p", "weight", "entropy", "kl") if with_stats else ():
        ours, theirs = getattr(case.seen, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        assert ours is None or torch.allclose(ours.double(), theirs, rtol=exact, atol=exact), name
    count = max(1, len(expected.log_p))
    for name, leaf in case.leaves.items():
        ours, theirs = found[name], wanted[name]
        if name in case.frozen:
            assert ours is None
            continue
        assert ours is not None and theirs is not None and ours.shape == leaf.shape and ours.isfinite().all(), name
        other = {"hidden": "weight", "weight": "hidden", "down": "up", "up": "down"}.get(name)
        natural = 1.0 if other is None else case.leaves[other].double().norm().item()
        error, noise = (ours.double() - theirs).abs(), exact * 0.1 * natural / count**0.5
        if ours.dtype == torch.bfloat16:
            half_ulp = torch.ldexp(torch.ones_like(theirs), torch.frexp(theirs).exponent - 9)
            assert bool((error <= 1.02 * half_ulp + noise).all()), name
        else:
            assert error.norm().item() <= exact * theirs.norm().item() + noise, name


# --- every objective -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "exact", "close"), [(torch.float32, 1e-6, 1e-5), (torch.float64, 1e-11, 1e-11)])
@pytest.mark.parametrize("objective", WEIGHTS)
def test_every_objective_has_the_value_and_gradients_of_its_formula(
    objective: str, dtype: torch.dtype, exact: float, close: float
) -> None:
    case = drawn(dtype, objective=objective)
    loss, found = case.ours(chunk=7)
    expected, wanted = case.theirs()
    assert loss.dtype == dtype and loss.item() == pytest.approx(expected.loss.item(), rel=exact)
    for name in ("hidden", "weight"):
        assert distance(found[name], wanted[name]) < close  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", [spec for spec in WEIGHTS if spec.partition("(")[0] not in ("nll", "threshold")])
def test_a_missing_detach_would_show_in_every_objectives_gradients(objective: str) -> None:
    case = drawn(torch.float64, objective=objective)
    (right, wanted), (wrong, mistaken) = case.theirs(), case.theirs(detach=False)
    _, found = case.ours(chunk=11)
    assert wrong.loss.item() == right.loss.item()
    for name in ("hidden", "weight"):
        assert distance(mistaken[name], wanted[name]) > 0.02  # type: ignore[arg-type]
        assert distance(found[name], wanted[name]) < 1e-11  # type: ignore[arg-type]


def test_the_gradient_of_dft_is_that_of_minus_the_probability() -> None:
    case = drawn(torch.float64, objective="dft")
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.leaves.items()}
    kept = case.targets != -100
    p = (leaves["hidden"] @ leaves["weight"].T).softmax(1)[kept].gather(1, case.targets[kept].unsqueeze(1))
    (-p.mean()).backward()
    _, found = case.ours(chunk=16)
    for name, leaf in leaves.items():
        assert distance(found[name], leaf.grad) < 1e-12  # type: ignore[arg-type]


def test_finite_differences_agree_with_the_gradients_of_all_inputs() -> None:
    """Of nll and the anchor, whose losses are what their gradients are of (autograd's gradcheck asks one call twice)."""
    draw = torch.Generator().manual_seed(5)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    leaves = {"hidden": new(9, 4), "weight": new(11, 4), "bias": new(11), "down": new(9, 2), "up": new(11, 2)}
    targets = torch.randint(0, 11, (9,), generator=draw)
    targets[4] = -100
    for direction in ("forward", "reverse"):
        anchor = {"hidden": new(9, 3), "weight": new(11, 3), "strength": 0.7, "direction": direction, "bias": new(11)}
        case = Case(leaves, targets, {"objective": "nll", "soft_cap": 3.0, "token_weights": new(9).abs()}, anchor)
        _, found = case.ours(chunk=4)
        for name in leaves:
            step = new(*leaves[name].shape)
            ends = []
            for sign in (1, -1):
                moved = copy.copy(case)
                moved.leaves = {**leaves, name: leaves[name] + sign * 1e-6 * step}
                ends.append(moved.ours(chunk=4)[0].item())
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx((found[name] * step).sum().item(), rel=1e-7, abs=1e-9)


def test_the_fused_loss_and_the_readable_one_are_the_same() -> None:
    case = drawn(torch.float64, objective="dft")
    logits = (case.leaves["hidden"] @ case.leaves["weight"].T).unsqueeze(0)
    labels = torch.cat([torch.tensor([-100]), case.targets]).unsqueeze(0)
    readable = dft_loss(torch.cat([logits, logits[:, :1]], 1), labels)
    assert case.ours(chunk=8)[0].item() == pytest.approx(readable.item(), rel=1e-13)


# --- any shape, any combination --------------------------------------------------------------------------------------


@contextmanager
def in_pieces_of(elements: int | None) -> Iterator[None]:
    """Weights and tiles handled so many elements at a time, as those of real vocabularies are."""
    with ExitStack() as stack:
        for place in ("objectives", "loss_tiles", "anchor"):
            if elements is not None:
                stack.enter_context(patch(f"vlm_dft.{place}.AT_ONCE", elements))
        yield


@st.composite
def cases(draw: Callable[[Any], Any]) -> Case:
    rows, vocabulary, width = draw(st.integers(0, 24)), draw(st.integers(1, 40)), draw(st.integers(1, 12))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    flags = {
        name: draw(st.booleans())
        for name in ("bias", "rank", "cap", "factors", "ids", "full", "anchor", "items", "strided", "in_place")
    }

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    hidden, weight = new(rows, width), new(vocabulary, width)
    if flags["strided"]:
        hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T
    leaves = {"hidden": hidden, "weight": weight}
    if flags["bias"]:
        leaves["bias"] = new(vocabulary)
    if flags["rank"]:
        rank = draw(st.integers(1, 3))
        leaves |= {"down": new(rows, rank), "up": new(vocabulary, rank)}
    targets = torch.randint(0, vocabulary, (rows,), generator=random)
    targets[torch.rand(rows, generator=random) >= draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))] = -100
    options: dict[str, Any] = {"objective": draw(st.sampled_from(list(WEIGHTS)))}
    if flags["cap"]:
        options["soft_cap"] = draw(st.sampled_from([2.0, 30.0]))
    if flags["factors"]:
        factors = torch.rand(rows, generator=random) * 2
        factors[torch.rand(rows, generator=random) < 0.2] = 0.0
        options["token_weights"] = factors
    if flags["ids"]:
        options["objective_ids"] = torch.randint(-1, len(NAMES), (rows,), generator=random)
    if flags["full"]:
        options["full_weight"] = torch.rand(rows, generator=random) < 0.3
    if flags["items"]:
        items = draw(st.integers(0, 90))
        options["num_items"] = draw(st.sampled_from([items, float(items), torch.tensor(items)]))
    anchor = None
    if flags["anchor"]:
        other = draw(st.integers(1, 5))
        anchor = {
            "hidden": new(rows, other), "weight": new(vocabulary, other), "strength": draw(st.sampled_from([0.03, 2.0])),
            "direction": draw(st.sampled_from(["forward", "reverse"])), "bias": new(vocabulary) if flags["bias"] else None,
            "soft_cap": 2.0 if flags["cap"] else None,
        }  # fmt: skip
    frozen = {name for name in leaves if draw(st.integers(0, 4)) == 0}
    return Case(leaves, targets, options, anchor, frozen, flags["in_place"])


def jumps(case: Case) -> bool:
    """Whether a probability is so near to a threshold that rounding decides on which side it is."""
    p = case.theirs()[0].log_p.exp()
    levels = {JUMPS[case.options["objective"]]} if case.options["objective"] in JUMPS else set()
    levels |= {0.2} if "objective_ids" in case.options else set()
    return any(bool(((p - level).abs() < 1e-4).any()) for level in levels)


@settings(max_examples=120, deadline=None)
@given(
    case=cases(), chunk=st.integers(1, 30), elements=st.sampled_from([None, 1, 17, 64]), with_stats=st.booleans()
)  # fmt: skip
def test_any_call_gives_the_loss_gradients_and_statistics_of_float64(
    case: Case, chunk: int, elements: int | None, with_stats: bool
) -> None:
    if jumps(case):
        return
    exact = 1e-11 if case.leaves["hidden"].dtype == torch.float64 else 1e-5
    with in_pieces_of(elements):
        check(case, chunk, exact, with_stats)


@settings(max_examples=60, deadline=None)
@given(case=cases(), chunks=st.tuples(st.integers(1, 30), st.integers(1, 30)), elements=st.sampled_from([None, 1, 40]))
def test_any_two_chunk_sizes_agree(case: Case, chunks: tuple[int, int], elements: int | None) -> None:
    if jumps(case):
        return
    one, first = case.ours(chunks[0])
    with in_pieces_of(elements):
        other, second = case.ours(chunks[1])
    dtype = case.leaves["hidden"].dtype
    close, floor = {torch.float64: (1e-12, 1e-14), torch.float32: (1e-5, 2e-6), torch.bfloat16: (8e-3, 1e-5)}[dtype]
    assert one.item() == pytest.approx(other.item(), rel=1e-12 if dtype == torch.float64 else 1e-5, abs=1e-7)
    for name, ours in first.items():
        theirs = second[name]
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert torch.allclose(ours.double(), theirs.double(), rtol=close, atol=floor)  # bf16: rounded once each


@settings(max_examples=40, deadline=None)
@given(case=cases(), chunk=st.integers(1, 30))
def test_a_call_changes_none_of_its_inputs(case: Case, chunk: int) -> None:
    before = copy.deepcopy(case)
    case.ours(chunk)
    for ours, theirs in (
        (case.leaves, before.leaves), ({"": case.targets}, {"": before.targets}), (case.options, before.options),
        (case.anchor or {}, before.anchor or {}),
    ):  # fmt: skip
        for key, value in ours.items():
            kept = theirs[key]
            assert torch.equal(value, kept) if isinstance(value, torch.Tensor) else value == kept, key


def test_two_half_batches_give_the_loss_and_gradient_of_the_whole_batch() -> None:
    case = drawn(torch.float64, objective="dft")
    whole, expected = case.ours(chunk=256)
    count = int((case.targets != -100).sum())
    halves = [
        Case({"hidden": case.leaves["hidden"][half], "weight": case.leaves["weight"]}, case.targets[half],
             {"objective": "dft", "num_items": torch.tensor(count)}).ours(chunk=256)
        for half in (slice(0, 13), slice(13, 40))
    ]  # fmt: skip
    assert sum(loss.item() for loss, _ in halves) == pytest.approx(whole.item(), rel=1e-13)
    assert distance(halves[0][1]["weight"] + halves[1][1]["weight"], expected["weight"]) < 1e-13  # type: ignore[operator,arg-type]
    rows = torch.cat([halves[0][1]["hidden"], halves[1][1]["hidden"]])  # type: ignore[list-item]
    assert distance(rows, expected["hidden"]) < 1e-13  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_vocabulary_is_exact_in_its_real_pieces(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(2)
    weight = torch.randn(
        FULL, 15, generator=draw
    )  # 2.3 million elements: cast in pieces, and few rows of a tile at a time
    hidden = 0.8 * torch.randn(17, 15, generator=draw)
    targets = torch.randint(0, FULL, (17,), generator=draw)
    targets[:3] = torch.tensor([0, FULL - 1, -100])
    weight[targets[5:9]] = 3 * hidden[5:9]  # some likely targets
    anchor = {
        "hidden": torch.randn(17, 2, generator=draw).to(dtype), "weight": torch.randn(FULL, 2, generator=draw).to(dtype),
        "strength": 0.1, "direction": "forward",
    }  # fmt: skip
    case = Case({"hidden": hidden.to(dtype), "weight": weight.to(dtype)}, targets, {"objective": "deft"}, anchor)
    loss, found = case.ours(chunk=256)
    expected, wanted = case.theirs()
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    for name in ("hidden", "weight"):
        assert distance(found[name], wanted[name]) < (1e-5 if dtype == torch.float32 else 2.5e-3)  # type: ignore[arg-type]


def test_bf16_inputs_are_accumulated_in_fp32() -> None:
    draw = torch.Generator().manual_seed(0)
    leaves = {
        "hidden": torch.randn(64, 32, generator=draw).bfloat16(),
        "weight": torch.randn(200, 32, generator=draw).bfloat16(),
    }
    case = Case(leaves, torch.randint(0, 200, (64,), generator=draw), {"objective": "nll"})
    for chunk in (1, 5, 64):  # a sum of 64 roundings to bf16 would be off by a percent
        loss, found = case.ours(chunk)
        expected, wanted = case.theirs()
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        for name in ("hidden", "weight"):
            assert found[name].dtype == torch.bfloat16  # type: ignore[union-attr]
            assert distance(found[name], wanted[name]) < 2.5e-3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hidden", "weight", "loss"),
    [
        (torch.bfloat16, torch.float32, torch.float32), (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32), (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float64, torch.float64),
    ],
)  # fmt: skip
def test_inputs_of_unequal_dtypes_each_get_a_gradient_of_their_own(
    hidden: torch.dtype, weight: torch.dtype, loss: torch.dtype
) -> None:
    case = drawn(objective="dft")
    case.leaves = {"hidden": case.leaves["hidden"].to(hidden), "weight": case.leaves["weight"].to(weight)}
    value, found = case.ours(chunk=9)
    expected, wanted = case.theirs()
    assert value.dtype == loss and value.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    for name, dtype in (("hidden", hidden), ("weight", weight)):
        ours = found[name]
        assert ours is not None and ours.dtype == dtype
        assert distance(ours, wanted[name]) < (2.5e-3 if dtype.itemsize == 2 else 1e-5)  # type: ignore[arg-type]


# --- what is computed, and what is not -------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Every operation: the largest tensor of each dtype that one returned, and the shapes that were multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}
        self.products: list[tuple[list[int], list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, torch.Tensor):
                self.largest[one.dtype] = max(self.largest.get(one.dtype, 0), one.numel())
        name = func.name()
        if any(word in name for word in ("::mm", "::addmm", "::bmm", "::baddbmm", "::matmul", "::linear")):
            pair = [list(a.shape) for a in args if isinstance(a, torch.Tensor) and a.dim() >= 2][-2:]
            self.products.append((pair[0], pair[1]))
        return out


def test_masked_rows_are_never_multiplied() -> None:
    hidden = torch.randn(6, 4)
    hidden[[0, 3]] = float("nan")
    hidden.requires_grad_()
    weight, down, up = torch.randn(9, 4, requires_grad=True), torch.full((6, 2), float("inf")), torch.randn(9, 2)
    down[[1, 2, 4, 5]] = 1.0
    down.requires_grad_()
    reference = torch.randn(6, 4)
    reference[[0, 3]] = float("nan")
    factors = torch.tensor([float("nan"), 1, 1, float("nan"), 1, 1])
    with Watch() as watch:
        loss = fused_linear_loss(
            hidden, weight, torch.tensor([-100, 1, 2, -100, 3, 4]), low_rank=(down, up), token_weights=factors,
            anchor=Anchor(reference, torch.randn(9, 4), 0.1, "reverse"),
        )  # fmt: skip
        loss.backward()
    assert loss.isfinite() and weight.grad is not None and weight.grad.isfinite().all()
    for leaf in (hidden, down):
        assert (
            leaf.grad is not None and not leaf.grad[[0, 3]].any() and leaf.grad[1].any() and leaf.grad.isfinite().all()
        )
    assert all(6 not in [*left, *right] for left, right in watch.products) and len(watch.products) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", ["dft", "eaft", "deft"])
def test_no_tensor_of_all_rows_by_vocabulary_is_ever_formed(objective: str, dtype: torch.dtype) -> None:
    hidden = torch.randn(64, 8).to(dtype).requires_grad_()
    weight = torch.randn(500, 8).to(dtype).requires_grad_()
    anchor = Anchor(torch.randn(64, 8).to(dtype), torch.randn(500, 8).to(dtype), 0.1, "forward")
    with Watch() as watch:
        loss, _ = fused_linear_loss(
            hidden, weight, torch.randint(0, 500, (64,)), chunk_size=8, objective=objective, soft_cap=30.0, anchor=anchor,
            bias=torch.zeros(500, requires_grad=True), return_stats=True,
        )  # fmt: skip
        loss.backward()
    assert max(watch.largest.values()) == 8 * 500  # one tile, and the weight's gradient which is as large here


def test_a_bf16_head_is_never_copied_whole_to_fp32() -> None:
    """4096 x 1024 is more than is cast at a time; with one chunk its gradient is not summed in fp32 either."""
    hidden = torch.randn(4, 1024).bfloat16().requires_grad_()
    weight = (torch.randn(4096, 1024) / 32).bfloat16().requires_grad_()
    with Watch() as watch:
        fused_linear_loss(hidden, weight, torch.tensor([0, -100, 9, 4095])).backward()
    assert watch.largest[torch.float32] <= 4096 * 1024 // 2
    assert watch.largest[torch.bfloat16] == 4096 * 1024 and torch.float64 in watch.largest
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("frozen", "chunks", "expected"),
    [
        ((), 1, 3), (("weight",), 1, 2), (("hidden",), 1, 2), (("hidden", "weight"), 1, 1), ((), 4, 12), (("weight",), 4, 8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("objective", ["dft", "eaft"])
def test_what_is_frozen_costs_no_product(frozen: tuple[str, ...], chunks: int, expected: int, objective: str) -> None:
    hidden = torch.randn(20, 4, requires_grad="hidden" not in frozen)
    weight = torch.randn(9, 4, requires_grad="weight" not in frozen)
    with Watch() as watch:
        loss = fused_linear_loss(
            hidden, weight, torch.arange(20) % 9, objective=objective, chunk_size=20 // chunks,
        )  # fmt: skip
        if loss.requires_grad:
            loss.backward()
    assert len(watch.products) == expected  # the backward pass multiplies nothing
    assert (hidden.grad is None) == ("hidden" in frozen) and (weight.grad is None) == ("weight" in frozen)


def test_without_gradients_the_logits_are_all_that_is_multiplied() -> None:
    hidden, weight = torch.randn(20, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    held = torch.zeros(9, 4)
    for guard in (torch.no_grad, torch.inference_mode):
        with guard(), Watch() as watch:
            loss, stats = fused_linear_loss(
                hidden, weight, torch.arange(20) % 9, weight_grad=held, bias=torch.zeros(9), return_stats=True
            )
        assert len(watch.products) == 1 and not loss.requires_grad and not held.any() and len(stats.log_p) == 20
    plain = fused_linear_loss(hidden, weight, torch.arange(20) % 9)
    assert loss.item() == plain.item()


def test_a_low_rank_term_is_multiplied_apart_and_never_merged() -> None:
    hidden, weight = torch.randn(20, 16, requires_grad=True), torch.randn(50, 16)
    down, up = torch.randn(20, 2, requires_grad=True), torch.randn(50, 2, requires_grad=True)
    with Watch() as watch:
        fused_linear_loss(hidden, weight, torch.arange(20), low_rank=(down, up)).backward()
    assert len(watch.products) == 2 + 3  # of the frozen head, and of the adapter
    assert not any(left == [50, 2] and right == [2, 16] for left, right in watch.products)


def test_the_weights_gradient_in_place_makes_no_second_buffer() -> None:
    hidden, weight = torch.randn(3, 64, requires_grad=True), torch.randn(50, 64, requires_grad=True)
    held = torch.zeros(50, 64)
    where = held.data_ptr()
    with Watch() as watch:
        fused_linear_loss(hidden, weight, torch.tensor([1, 2, 3]), weight_grad=held).backward()
    assert len(watch.products) == 3 and held.any() and held.data_ptr() == where and weight.grad is None


# --- the ends of the range -------------------------------------------------------------------------------------------


def without_targets(rows: int, objective: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    shapes = {"hidden": (rows, 4), "weight": (5, 4), "bias": (5,), "down": (rows, 2), "up": (5, 2)}
    leaves = [torch.full(shape, 2.0, requires_grad=True) for shape in shapes.values()]
    loss = fused_linear_loss(
        leaves[0], leaves[1], torch.full((rows,), -100), objective=objective, bias=leaves[2], low_rank=(leaves[3], leaves[4]),
        anchor=Anchor(torch.ones(rows, 2), torch.ones(5, 2), 0.1, "reverse"), soft_cap=5.0,
    )  # fmt: skip
    return loss, leaves


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("objective", WEIGHTS)
def test_without_targets_the_loss_is_a_zero_connected_to_all_inputs(objective: str, rows: int) -> None:
    loss, leaves = without_targets(rows, objective)
    loss.backward()
    assert loss.item() == 0.0
    for leaf in leaves:
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape and not leaf.grad.any()


def test_without_targets_the_statistics_are_empty_and_the_held_gradient_stays() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    held = torch.ones(5, 4)
    for items in (None, 0, torch.tensor(0), 17):
        loss, stats = fused_linear_loss(
            hidden, weight, torch.full((3,), -100), num_items=items, weight_grad=held, return_stats=True
        )
        loss.backward()
        assert loss.item() == 0.0 and [len(t) for t in (stats.log_p, stats.weight, stats.entropy)] == [0, 0, 0]
    assert bool((held == 1).all()) and hidden.grad is not None and not hidden.grad.any()


@pytest.mark.parametrize("objective", WEIGHTS)
def test_one_token_of_a_vocabulary_of_one_costs_nothing(objective: str) -> None:
    hidden, weight = torch.tensor([[3.0]], requires_grad=True), torch.tensor([[2.0]], requires_grad=True)
    loss = fused_linear_loss(hidden, weight, torch.tensor([0]), objective=objective)
    loss.backward()
    assert loss.item() == 0.0 and hidden.grad == 0.0 and weight.grad == 0.0


@pytest.mark.parametrize("objective", WEIGHTS)
def test_logits_of_ten_thousand_give_finite_loss_and_gradients(objective: str) -> None:
    hidden = torch.tensor([[1.0], [1.0], [-1.0], [0.0]], requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    targets = torch.tensor([0, 1, 2, 1])  # p = 1, p = 0 (log p = -2e4), p = 0 (log p = -1e4), p = 1/3
    loss, stats = fused_linear_loss(hidden, weight, targets, objective=objective, return_stats=True)
    loss.backward()
    assert stats.log_p.tolist() == pytest.approx([0.0, -2e4, -1e4, -math.log(3)])
    assert stats.entropy.tolist() == pytest.approx([0.0, 0.0, 0.0, math.log(3)], abs=1e-6)
    log_p, p = [0.0, -2e4, -1e4, -math.log(3)], torch.tensor([1.0, 0.0, 0.0, 1 / 3])
    every = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [1 / 3, 1 / 3, 1 / 3]])
    weights = WEIGHTS[objective](p.double(), every.double()).tolist()
    assert loss.item() == pytest.approx(-sum(w * x for w, x in zip(weights, log_p, strict=True)) / 4, rel=1e-5)
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    assert weight.grad is not None and weight.grad.isfinite().all()
    assert hidden.grad[0].item() == 0.0  # p = 1: nothing to learn
    assert hidden.grad[1].item() == pytest.approx(weights[1] * 2e4 / 4, rel=1e-5)  # -w (W_target - W_certain) / n


@pytest.mark.parametrize("soft_cap", [None, 20.0])
@pytest.mark.parametrize("objective", WEIGHTS)
def test_padding_of_the_vocabulary_by_minus_infinity_leaves_the_rest_as_it_is(
    objective: str, soft_cap: float | None
) -> None:
    case = drawn(torch.float64, objective=objective)
    live = [k for k in range(30) if k % 5]
    targets = torch.tensor([-100 if t < 0 else (t if t % 5 else t + 1) for t in case.targets.tolist()])
    bias = torch.zeros(30, dtype=torch.float64)
    bias[::5] = float("-inf")
    hidden, weight = (case.leaves[name].clone().requires_grad_() for name in ("hidden", "weight"))
    bias.requires_grad_()
    loss, stats = fused_linear_loss(
        hidden, weight, targets, objective=objective, bias=bias, chunk_size=8, soft_cap=soft_cap, return_stats=True
    )
    loss.backward()
    assert loss.isfinite() and stats.entropy.isfinite().all() and stats.log_p.isfinite().all()
    for leaf in (hidden, weight, bias):
        assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert not weight.grad[::5].any() and not bias.grad[::5].any()  # type: ignore[index,union-attr]
    if soft_cap is None:
        place = {old: new for new, old in enumerate(live)}
        small = Case(
            {"hidden": case.leaves["hidden"], "weight": case.leaves["weight"][live]},
            torch.tensor([place.get(t, -100) for t in targets.tolist()]), {"objective": objective},
        )  # fmt: skip
        expected, wanted = small.theirs()
        assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
        assert distance(hidden.grad, wanted["hidden"]) < 1e-12  # type: ignore[arg-type]
        assert distance(weight.grad[live], wanted["weight"]) < 1e-12  # type: ignore[arg-type,index]
        assert torch.allclose(stats.entropy, expected.entropy, rtol=1e-12)


@pytest.mark.parametrize("objective", ["dft", "power", "threshold", "deft", "chord"])
def test_a_target_that_is_padding_costs_nothing_where_its_weight_is_zero(objective: str) -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, float("-inf")])
    alone, stats = fused_linear_loss(
        hidden[1:2], weight, torch.tensor([4]), objective=objective, bias=bias, return_stats=True
    )
    alone.backward()
    assert alone.item() == 0.0 and stats.log_p.item() == -math.inf and stats.weight.item() == 0.0
    for leaf in (hidden, weight):
        assert leaf.grad is not None and not leaf.grad.any()


@pytest.mark.parametrize("objective", WEIGHTS)
def test_a_probability_of_zero_or_one_to_rounding_gives_finite_gradients(objective: str) -> None:
    """logits of 200 and 0: p is e^-200, which is 0 in fp32, or 1 - e^-200, which is 1."""
    for target, log_p in ((0, 0.0), (1, -200.0)):
        hidden, weight = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[200.0], [0.0]], requires_grad=True)
        loss, stats = fused_linear_loss(hidden, weight, torch.tensor([target]), objective=objective, return_stats=True)
        loss.backward()
        assert stats.log_p.item() == log_p and stats.entropy.item() == 0.0
        w = stats.weight.item()
        assert 0 <= w <= 1 and loss.item() == pytest.approx(-w * log_p)
        assert hidden.grad is not None and hidden.grad.item() == pytest.approx(200 * w if target else 0.0)
        assert weight.grad is not None and weight.grad.flatten().tolist() == pytest.approx(
            [w, -w] if target else [0, 0]
        )


@pytest.mark.parametrize("lack", [1e-2, 1e-4, 1e-6, 1e-9, 1e-20])
@pytest.mark.parametrize("others", [1, 3000])
def test_log_p_and_gradient_are_exact_where_p_is_near_one(lack: float, others: int) -> None:
    """log p = -log1p(rest / e) in fp32, where log(p) would have lost all digits at 1 - p = 1e-6."""
    gap = torch.tensor(math.log(1 / lack * others), dtype=torch.float32)
    rest = others * math.exp(-float(gap))
    exact, p = -math.log1p(rest), 1 / (1 + rest)
    for objective, weight in (
        ("nll", 1.0), ("dft", p), ("chord", p * (rest * p)), ("focal(gamma=1)", rest * p), ("mix", 0.5 + 0.5 * p),
    ):  # fmt: skip
        hidden = torch.ones(1, 1, requires_grad=True)
        head = torch.zeros(others + 1, 1)
        head[others] = gap
        head.requires_grad_()
        loss, stats = fused_linear_loss(hidden, head, torch.tensor([others]), objective=objective, return_stats=True)
        loss.backward()
        assert stats.log_p.item() == pytest.approx(exact, rel=1e-6)
        assert stats.weight.item() == pytest.approx(weight, rel=2e-6)
        assert loss.item() == pytest.approx(-weight * exact, rel=4e-6)
        slope = -weight * rest * p  # on the target's logit: -w (1 - p)
        assert hidden.grad is not None and hidden.grad.item() == pytest.approx(slope * float(gap), rel=1e-4)
        assert head.grad is not None and head.grad[others].item() == pytest.approx(slope, rel=1e-4)
        assert head.grad[0].item() == pytest.approx(-slope / others, rel=1e-4)


# --- the outer gradient ----------------------------------------------------------------------------------------------


def leaves_of(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return case.leaves["hidden"].clone().requires_grad_(), case.leaves["weight"].clone().requires_grad_()


@pytest.mark.parametrize("factor", [3.0, -0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_factor_on_the_loss_is_a_factor_on_all_gradients(factor: float, dtype: torch.dtype) -> None:
    case = drawn(dtype, objective="dft")
    _, plain = case.ours(chunk=8)
    hidden, weight = leaves_of(case)
    (fused_linear_loss(hidden, weight, case.targets, chunk_size=8) * factor).backward()
    for name, leaf in (("hidden", hidden), ("weight", weight)):
        expected = plain[name].double() * factor  # type: ignore[union-attr]
        assert torch.allclose(leaf.grad.double(), expected, rtol=8e-3 if dtype == torch.bfloat16 else 1e-13)  # type: ignore[union-attr]


def test_the_loss_may_be_part_of_a_larger_one() -> None:
    case = drawn(torch.float64, objective="dft")
    _, plain = case.ours(chunk=8)
    hidden, weight = leaves_of(case)
    first = fused_linear_loss(hidden, weight, case.targets)
    second = fused_linear_loss(hidden, weight, case.targets, objective="nll")
    (2 * first + second**2 + (hidden**2).sum()).backward()
    _, nll = drawn(torch.float64, objective="nll").ours(chunk=8)
    expected = 2 * plain["hidden"] + 2 * second.item() * nll["hidden"] + 2 * hidden.detach()  # type: ignore[operator]
    assert distance(hidden.grad, expected) < 1e-12  # type: ignore[arg-type]


def test_a_second_backward_is_refused() -> None:
    case = drawn(objective="dft")
    hidden, weight = leaves_of(case)
    loss = fused_linear_loss(hidden, weight, case.targets)
    loss.backward(retain_graph=True)
    before = hidden.grad.clone()  # type: ignore[union-attr]
    with pytest.raises(
        RuntimeError, match=r"formed in its forward pass and given out once.*found a second.*Call .* again"
    ):
        loss.backward()
    assert torch.equal(hidden.grad, before)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [4, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_gradient_in_place_is_added_to_what_is_there(dtype: Any, chunk: int, kind: Any) -> None:
    case = drawn(dtype, objective="eaft")
    _, wanted = case.theirs()
    hidden, weight = leaves_of(case)
    held = torch.randn(30, 6, generator=torch.Generator().manual_seed(3), dtype=kind) / 50
    before = held.clone()
    for _ in range(2):
        fused_linear_loss(hidden, weight, case.targets, objective="eaft", weight_grad=held, chunk_size=chunk).backward()
    assert weight.grad is None and distance(held - before, 2 * wanted["weight"]) < 1e-5  # type: ignore[operator]
    assert distance(hidden.grad, 2 * wanted["hidden"]) < (1e-5 if dtype == torch.float32 else 4e-3)  # type: ignore[operator,arg-type]


def test_the_weights_gradient_in_place_may_be_the_weights_own() -> None:
    case = drawn(objective="dft")
    _, plain = case.ours(chunk=8)
    hidden, weight = leaves_of(case)
    weight.grad = torch.ones_like(weight)
    fused_linear_loss(hidden, weight, case.targets, weight_grad=weight.grad).backward()
    assert torch.allclose(weight.grad, 1 + plain["weight"], rtol=1e-6)  # type: ignore[operator]


@pytest.mark.parametrize("factor", [3.0, 0.5, 0.0, -1.0])
def test_another_outer_gradient_than_one_is_refused_where_the_weights_is_in_place(factor: float) -> None:
    case = drawn(objective="dft")
    hidden, weight = leaves_of(case)
    loss = fused_linear_loss(hidden, weight, case.targets, weight_grad=torch.zeros_like(weight))
    with pytest.raises(
        RuntimeError, match=rf"Expected the loss to be backpropagated as it is .*found {factor}.*num_items"
    ):
        (loss * factor).backward()


def test_a_held_gradient_of_a_frozen_weight_is_left_alone_and_any_outer_gradient_is_right() -> None:
    case = drawn(torch.float64, objective="dft")
    _, plain = case.ours(chunk=8)
    hidden, weight = leaves_of(case)
    held = torch.ones(30, 6)
    (fused_linear_loss(hidden, weight.detach(), case.targets, weight_grad=held) * 3).backward()
    assert bool((held == 1).all()) and distance(hidden.grad, 3 * plain["hidden"]) < 1e-13  # type: ignore[operator,arg-type]


def test_a_gradient_of_the_gradient_is_refused() -> None:
    """Not left out in silence: a penalty on the gradient would then add nothing."""
    case = drawn(objective="dft")
    for loss_of in (lambda loss: loss, lambda loss: loss**2):
        hidden, weight = leaves_of(case)
        with pytest.raises(
            RuntimeError, match=r"fused_linear_loss has no second derivative \(create_graph=True\). Use dft_loss"
        ):
            torch.autograd.grad(loss_of(fused_linear_loss(hidden, weight, case.targets)), hidden, create_graph=True)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": torch.randn(5, 3)}, r"Expected hidden \[N, H\] and weight \[V, H\], found \[3, 4\] and \[5, 3\]"),
        ({"hidden": torch.randn(1, 3, 4)}, r"Expected hidden \[N, H\] and weight \[V, H\], found \[1, 3, 4\] and \[5, 4\]"),
        ({"hidden": torch.randn(4)}, r"Expected hidden \[N, H\] and weight \[V, H\], found \[4\] and \[5, 4\]"),
        ({"weight": torch.randn(4)}, r"Expected hidden \[N, H\] and weight \[V, H\], found \[3, 4\] and \[4\]"),
        ({"targets": torch.zeros(4, dtype=torch.long)}, r"Expected targets \[3\], one per hidden row, found \[4\]"),
        ({"targets": torch.zeros(1, 3, dtype=torch.long)}, r"Expected targets \[3\], one per hidden row, found \[1, 3\]"),
        ({"targets": torch.tensor([0, 7, 1])}, r"Targets must be -100 or in \[0, 5\), found 0 to 7. Do the tokenizer"),
        ({"targets": torch.tensor([0, 5, -100])}, r"Targets must be -100 or in \[0, 5\), found 0 to 5"),
        ({"targets": torch.tensor([0, -1, 1])}, r"Targets must be -100 or in \[0, 5\), found -1 to 1"),
        ({"targets": torch.tensor([0, -101, 1])}, r"Targets must be -100 or in \[0, 5\), found -101 to 1"),
        ({"bias": torch.zeros(4)}, r"Expected bias \[5\], found \[4\]"),
        ({"bias": torch.zeros(1)}, r"Expected bias \[5\], found \[1\]"),
        ({"bias": torch.zeros(1, 5)}, r"Expected bias \[5\], found \[1, 5\]"),
        ({"token_weights": torch.ones(2)}, r"Expected token_weights \[3\], one per target, found \[2\]"),
        ({"token_weights": torch.ones(3, 1)}, r"Expected token_weights \[3\], one per target, found \[3, 1\]"),
        ({"objective_ids": torch.zeros(4, dtype=torch.long)}, r"Expected objective_ids \[3\], one per target, found \[4\]"),
        ({"full_weight": torch.ones(1, 3)}, r"Expected full_weight \[3\], one per target, found \[1, 3\]"),
        ({"low_rank": (torch.zeros(3, 2), torch.zeros(5, 3))}, r"low_rank \[3, r\] and \[5, r\], found \[3, 2\] and \[5, 3\]"),
        ({"low_rank": (torch.zeros(2, 2), torch.zeros(5, 2))}, r"low_rank \[3, r\] and \[5, r\], found \[2, 2\] and \[5, 2\]"),
        ({"low_rank": (torch.zeros(3, 2), torch.zeros(4, 2))}, r"low_rank \[3, r\] and \[5, r\], found \[3, 2\] and \[4, 2\]"),
        ({"weight_grad": torch.zeros(4, 5)}, r"Expected weight_grad \[5, 4\] in fp32 \(or fp64\), found \[4, 5\]"),
        ({"weight_grad": torch.zeros(5, 4).bfloat16()}, r"weight_grad \[5, 4\] in fp32 \(or fp64\), found \[5, 4\] in torch.bf"),
        ({"weight_grad": torch.zeros(5, 4).half()}, r"weight_grad \[5, 4\] in fp32 \(or fp64\), found \[5, 4\] in torch.float16"),
        ({"label_smoothing": 0.1}, "label_smoothing = 0.1 was asked for, expected 0: an objective weighs -log p"),
        ({"objective": "dtf"}, r"Unknown objective 'dtf'. Did you mean 'dft'\?"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    call = {"hidden": torch.randn(3, 4), "weight": torch.randn(5, 4), "targets": torch.tensor([0, 1, 4])} | given
    with pytest.raises(ValueError, match=message):
        fused_linear_loss(**call)


def test_targets_of_a_dtype_that_are_no_ids_are_refused_and_narrow_integers_are_taken() -> None:
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, -100, 4])
    with pytest.raises((RuntimeError, TypeError, ValueError), match=r"(?i)int"):
        fused_linear_loss(hidden, weight, targets.float())
    assert fused_linear_loss(hidden, weight, targets.int()) == fused_linear_loss(hidden, weight, targets)


# --- within the rest of PyTorch --------------------------------------------------------------------------------------


def test_under_autocast_the_loss_is_what_the_same_inputs_give_outside() -> None:
    case = drawn(objective="dft")
    body = torch.nn.Linear(6, 6)
    hidden, weight = leaves_of(case)
    with torch.autocast("cpu", torch.bfloat16):
        states = body(hidden)
        loss = fused_linear_loss(states, weight, case.targets)
    loss.backward()
    assert states.dtype == torch.bfloat16 and loss.dtype == torch.float32
    outside = Case({"hidden": states.detach(), "weight": case.leaves["weight"]}, case.targets, {})
    plain, found = outside.ours(chunk=256)
    expected, wanted = outside.theirs()
    assert loss.item() == plain.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert torch.equal(weight.grad, found["weight"]) and distance(weight.grad, wanted["weight"]) < 1e-5  # type: ignore[arg-type]
    assert body.weight.grad is not None and body.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autocast_lowers_the_precision_of_no_product_of_the_loss(dtype: torch.dtype) -> None:
    case = drawn(dtype, objective="eaft")
    draw = torch.Generator().manual_seed(4)
    case.leaves |= {
        "down": torch.randn(40, 2, generator=draw).to(dtype),
        "up": torch.randn(30, 2, generator=draw).to(dtype),
    }
    case.anchor = {
        "hidden": torch.randn(40, 3, generator=draw).to(dtype), "weight": torch.randn(30, 3, generator=draw).to(dtype),
        "strength": 0.5, "direction": "forward",
    }  # fmt: skip
    for chunk in (8, 256):
        plain, expected = case.ours(chunk)
        with torch.autocast("cpu", torch.bfloat16):
            inside, found = case.ours(chunk)
        assert inside.item() == plain.item() and inside.dtype == plain.dtype
        assert all(torch.equal(found[name], expected[name]) for name in expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_under_checkpointing_the_result_is_the_same(reentrant: bool, factor: float) -> None:
    case = drawn(torch.float64, objective="eaft")
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh()).double()

    def run(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fused_linear_loss(body(hidden), weight, case.targets, objective="eaft", chunk_size=8)

    results = []
    for wrapped in (False, True):
        hidden, weight = leaves_of(case)
        body.zero_grad()
        loss = checkpoint(run, hidden, weight, use_reentrant=reentrant) if wrapped else run(hidden, weight)
        (loss * factor).backward()
        results.append([loss.detach(), hidden.grad, weight.grad, *(p.grad.clone() for p in body.parameters())])  # type: ignore[union-attr]
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_under_compilation_the_result_is_the_same(backend: str) -> None:
    case = drawn(objective="eaft")
    bias = torch.randn(30)

    def run(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss, stats = fused_linear_loss(
            torch.tanh(hidden) * 2, weight, targets, objective="eaft", bias=bias, chunk_size=8, return_stats=True
        )
        return loss * 2 + 0 * stats.entropy.sum()

    torch._dynamo.reset()
    try:
        compiled = torch.compile(run, backend=backend)
        for rows in (40, 23, 1):  # the shapes of a second and third call
            results = []
            for function in (run, compiled):
                hidden, weight = (leaf.clone().requires_grad_() for leaf in case.leaves.values())
                loss = function(hidden[:rows], weight, case.targets[:rows])
                loss.backward()
                results.append((loss.item(), hidden.grad, weight.grad))
            assert results[1][0] == pytest.approx(results[0][0], rel=1e-6) and results[0][0] > 0
            for ours, theirs in zip(results[1][1:], results[0][1:], strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-8)  # type: ignore[arg-type]
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("in_place", [False, True])
def test_tied_embeddings_get_the_gradient_of_both_uses(in_place: bool) -> None:
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(30, 6).double()
    ids, targets = torch.randint(0, 30, (12,)), torch.randint(0, 30, (12,))
    targets[3] = -100
    apart = [embedding.weight.detach().clone().requires_grad_() for _ in range(2)]
    written_out(torch.tanh(apart[0][ids]), apart[1], targets, objective="dft").loss.backward()
    if in_place:
        embedding.weight.grad = torch.zeros_like(embedding.weight)
    held = embedding.weight.grad if in_place else None
    fused_linear_loss(torch.tanh(embedding(ids)), embedding.weight, targets, chunk_size=5, weight_grad=held).backward()
    assert apart[0].grad.any() and apart[1].grad.any()  # type: ignore[union-attr]
    assert distance(embedding.weight.grad, apart[0].grad + apart[1].grad) < 1e-12  # type: ignore[arg-type,operator]


def test_gradients_reach_a_body_of_several_layers() -> None:
    torch.manual_seed(1)
    body = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.GELU(), torch.nn.Linear(9, 6)).double()
    head = torch.nn.Linear(6, 30).double()
    inputs, targets = torch.randn(14, 5, dtype=torch.float64), torch.randint(0, 30, (14,))
    found = []
    for fused in (True, False):
        body.zero_grad()
        head.zero_grad()
        if fused:
            loss = fused_linear_loss(body(inputs), head.weight, targets, bias=head.bias, objective="nll")
        else:
            loss = torch.nn.functional.cross_entropy(head(body(inputs)), targets)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in [*body.parameters(), *head.parameters()])])  # type: ignore[union-attr]
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-15)


# --- statistics ------------------------------------------------------------------------------------------------------


def test_the_statistics_come_back_detached_and_in_order() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    targets = torch.tensor([1, -100, 5, 0, -100])
    _, stats = fused_linear_loss(hidden, weight, targets, chunk_size=2, return_stats=True)
    log_all = (hidden @ weight.T).detach().log_softmax(-1)[[0, 2, 3]]
    expected = log_all[[0, 1, 2], [1, 5, 0]]
    assert torch.allclose(stats.log_p, expected, atol=1e-6) and torch.allclose(stats.weight, expected.exp(), atol=1e-6)
    assert torch.allclose(stats.entropy, -(log_all.exp() * log_all).sum(1), atol=1e-6) and stats.kl is None
    assert not any(t.requires_grad for t in (stats.log_p, stats.weight, stats.entropy))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("objective", ["dft", "eaft", "deft", "floor(minimum=0.2)"])
def test_the_statistics_equal_their_formulas_with_everything_switched_on(
    objective: str, direction: str, dtype: torch.dtype
) -> None:
    case = drawn(dtype, objective=objective, soft_cap=4.0, token_weights=torch.linspace(0, 2, 40))
    draw = torch.Generator().manual_seed(8)
    case.leaves["bias"] = torch.randn(30, generator=draw).to(dtype)
    case.options["objective_ids"] = torch.randint(-1, 9, (40,), generator=draw)  # threshold left out
    case.options["full_weight"] = torch.arange(40) % 5 == 0
    case.anchor = {
        "hidden": torch.randn(40, 3, generator=draw).to(dtype), "weight": torch.randn(30, 3, generator=draw).to(dtype),
        "strength": 0.1, "direction": direction,
    }  # fmt: skip
    expected, _ = case.theirs()
    for chunk in (1, 7, 64):
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.leaves.items()}
        loss, stats = fused_linear_loss(
            leaves["hidden"], leaves["weight"], case.targets, bias=leaves["bias"], chunk_size=chunk, return_stats=True,
            anchor=Anchor(**case.anchor), **case.options,
        )  # fmt: skip
        exact = 1e-11 if dtype == torch.float64 else 2e-5
        assert loss.requires_grad and stats.kl is not None and expected.kl is not None
        for ours, theirs in (
            (stats.log_p, expected.log_p), (stats.weight, expected.weight), (stats.entropy, expected.entropy),
            (stats.kl, expected.kl),
        ):  # fmt: skip
            assert not ours.requires_grad and ours.dtype == (dtype if dtype == torch.float64 else torch.float32)
            assert torch.allclose(ours.double(), theirs, rtol=exact, atol=exact / 10)


def test_the_statistics_change_neither_loss_nor_gradients() -> None:
    case = drawn(objective="eaft")
    hidden, weight = leaves_of(case)
    loss, _ = fused_linear_loss(hidden, weight, case.targets, objective="eaft", chunk_size=7, return_stats=True)
    loss.backward()
    plain, found = case.ours(chunk=7)
    assert loss.item() == plain.item() and torch.equal(hidden.grad, found["hidden"])  # type: ignore[arg-type]
