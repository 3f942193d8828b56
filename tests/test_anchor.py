"""The anchor: KL to a reference model and its gradient, against float64 formulas written out by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_loss import distance, written_out

from vlm_dft import fused_linear_loss
from vlm_dft.anchor import Anchor, check_direction

DIRECTIONS = ("forward", "reverse")


def drawn(seed: int = 0, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    """hidden [20, 5], weight [17, 5], targets [20] of which five are masked, and a reference of another width."""
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(rows, 5, generator=draw, dtype=dtype) for rows in (20, 17))
    targets = torch.randint(0, 17, (20,), generator=draw)
    targets[::4] = -100
    anchor = {
        "hidden": torch.randn(20, 3, generator=draw, dtype=dtype), "weight": torch.randn(17, 3, generator=draw, dtype=dtype),
        "strength": 0.4, "direction": "forward",
    }  # fmt: skip
    return hidden.requires_grad_(), weight.requires_grad_(), targets, anchor | settings


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("objective", ["nll", "dft", "eaft"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_loss_and_gradients_equal_the_formula_in_float64(
    direction: str, objective: str, soft_cap: float | None, with_bias: bool
) -> None:
    hidden, weight, targets, anchor = drawn(direction=direction, soft_cap=soft_cap)
    anchor["bias"] = torch.linspace(-1, 1, 17, dtype=torch.float64) if with_bias else None
    bias = torch.linspace(2, -2, 17, dtype=torch.float64).requires_grad_() if with_bias else None
    common = {"objective": objective, "bias": bias, "soft_cap": soft_cap, "num_items": 7}
    found = []
    for way in ("ours", "theirs"):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in (hidden, weight)]
        own = None if bias is None else bias.detach().clone().requires_grad_()
        if way == "ours":
            call = common | {"bias": own}
            loss = fused_linear_loss(*leaves, targets, anchor=Anchor(**anchor), chunk_size=4, **call)  # type: ignore[call-overload]
        else:
            loss = written_out(*leaves, targets, anchor=anchor, **common | {"bias": own}).loss  # type: ignore[arg-type]
        loss.backward()
        found.append((loss.item(), [leaf.grad for leaf in [*leaves, *([] if own is None else [own])]]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert distance(ours, theirs) < 1e-12


@pytest.mark.parametrize(
    ("direction", "kl", "slope"),
    [
        ("forward", 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2), 0.3),  # p - q
        ("reverse", 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5), 0.8 * 0.2 * math.log(4)),  # p (1-p) d/dp
    ],
)
def test_a_coin_of_eight_tenths_against_a_fair_one_has_the_textbook_divergence(
    direction: Any, kl: float, slope: float
) -> None:
    logits = torch.tensor([[math.log(0.8), math.log(0.2)]], dtype=torch.float64, requires_grad=True)
    anchor = Anchor(torch.zeros(1, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64), 10.0, direction)
    loss, stats = fused_linear_loss(
        logits, torch.eye(2, dtype=torch.float64), torch.tensor([0]), anchor=anchor, return_stats=True
    )
    loss.backward()
    assert stats.kl is not None and stats.kl.item() == pytest.approx(kl, rel=1e-12)
    assert loss.item() == pytest.approx(-0.8 * math.log(0.8) + 10 * kl, rel=1e-12)
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([-0.8 * 0.2 + 10 * slope, 0.8 * 0.2 - 10 * slope], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_identical_reference_costs_nothing_and_pulls_nowhere(
    direction: Any, soft_cap: float | None, dtype: torch.dtype
) -> None:
    hidden, weight, targets, _ = drawn()
    hidden, weight = (leaf.detach().to(dtype).requires_grad_() for leaf in (hidden, weight))
    bias = torch.linspace(-1, 1, 17).to(dtype)
    grads = []
    for anchor in (Anchor(hidden, weight, 5.0, direction, bias, soft_cap), None):
        hidden.grad = weight.grad = None
        loss, stats = fused_linear_loss(
            hidden, weight, targets, anchor=anchor, bias=bias, soft_cap=soft_cap, chunk_size=6, return_stats=True
        )
        loss.backward()
        grads.append((loss.item(), hidden.grad, weight.grad))
        if anchor is not None:
            assert stats.kl is not None and stats.kl.abs().max() < (1e-14 if dtype == torch.float64 else 1e-6)
    (loss, *pulled), (alone, *plain) = grads
    assert loss == pytest.approx(alone, rel=1e-13 if dtype == torch.float64 else 1e-5)
    close = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 4e-3}[dtype]
    for ours, theirs in zip(pulled, plain, strict=True):
        assert distance(ours, theirs) < close  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 999), spread=st.sampled_from([0.1, 1.0, 3.0]), direction=st.sampled_from(DIRECTIONS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), chunk=st.integers(1, 25),
)  # fmt: skip
def test_the_divergence_is_right_in_single_precision_and_never_negative_beyond_rounding(
    seed: int, spread: float, direction: str, dtype: torch.dtype, chunk: int
) -> None:
    hidden, weight, targets, anchor = drawn(seed, torch.float32, direction=direction)
    hidden = (spread * hidden.detach()).to(dtype).requires_grad_()
    weight = weight.detach().to(dtype).requires_grad_()
    anchor |= {"hidden": (spread * anchor["hidden"]).to(dtype), "weight": anchor["weight"].to(dtype)}
    _, stats = fused_linear_loss(hidden, weight, targets, anchor=Anchor(**anchor), chunk_size=chunk, return_stats=True)
    wide = {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in anchor.items()}
    expected = written_out(hidden.detach().double(), weight.detach().double(), targets, anchor=wide).kl
    assert stats.kl is not None and expected is not None and not stats.kl.requires_grad
    assert torch.allclose(stats.kl.double(), expected, rtol=1e-5, atol=1e-5 * spread) and bool((stats.kl > -1e-5).all())


def test_the_reference_gets_no_gradient() -> None:
    hidden, weight, targets, anchor = drawn()
    held = {name: anchor[name].clone().requires_grad_() for name in ("hidden", "weight")}
    bias = torch.zeros(17, dtype=torch.float64, requires_grad=True)
    fused_linear_loss(hidden, weight, targets, anchor=Anchor(**anchor | held, bias=bias)).backward()
    assert held["hidden"].grad is None and held["weight"].grad is None and bias.grad is None
    assert hidden.grad is not None and weight.grad is not None


def test_a_reference_that_shares_the_head_adds_nothing_to_its_gradient_of_its_own() -> None:
    """As under LoRA: the model with the adapter off has the same head, which is trained through the model's logits alone."""
    hidden, weight, targets, _ = drawn()
    other = torch.randn(20, 5, dtype=torch.float64)
    found = []
    for shared in (weight, weight.detach().clone()):
        hidden.grad = weight.grad = None
        fused_linear_loss(hidden, weight, targets, anchor=Anchor(other, shared, 0.3, "forward")).backward()
        found.append((hidden.grad, weight.grad))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_divergence_is_of_target_rows_alone_and_not_weighed_by_token_weights(direction: str) -> None:
    hidden, weight, targets, anchor = drawn(direction=direction)
    nothing = torch.zeros(20, dtype=torch.float64)
    reference = anchor["hidden"].clone()
    reference[targets == -100] = float("nan")
    loss, stats = fused_linear_loss(
        hidden, weight, targets, token_weights=nothing, anchor=Anchor(**anchor | {"hidden": reference}), num_items=30,
        return_stats=True,
    )  # fmt: skip
    loss.backward()
    assert stats.kl is not None and len(stats.kl) == 15
    assert loss.item() == pytest.approx(0.4 * stats.kl.sum().item() / 30, rel=1e-13)
    assert (
        not hidden.grad[targets == -100].any() and hidden.grad[targets != -100].any() and hidden.grad.isfinite().all()
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_strength_scales_the_divergence_and_its_gradient(direction: str) -> None:
    hidden, weight, targets, anchor = drawn(direction=direction)
    found = []
    for strength in (1.0, 3.0):
        hidden.grad = None
        given = Anchor(**anchor | {"strength": strength})
        loss = fused_linear_loss(hidden, weight, targets, anchor=given, token_weights=torch.zeros(20))
        loss.backward()
        found.append((loss.item(), hidden.grad))
    assert found[1][0] == pytest.approx(3 * found[0][0], rel=1e-13)
    assert distance(found[1][1], 3 * found[0][1]) < 1e-13  # type: ignore[operator,arg-type]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_padding_of_both_vocabularies_leaves_the_divergence_as_it_is(direction: str) -> None:
    hidden, weight, targets, anchor = drawn(direction=direction)
    live = [k for k in range(17) if k % 4]
    targets = torch.tensor([-100 if t < 0 else live[t % len(live)] for t in targets.tolist()])
    bias = torch.zeros(17, dtype=torch.float64)
    bias[::4] = float("-inf")
    loss, stats = fused_linear_loss(
        hidden, weight, targets, bias=bias, anchor=Anchor(**anchor, bias=bias), return_stats=True, chunk_size=7
    )
    loss.backward()
    place = {old: new for new, old in enumerate(live)}
    leaves = [hidden.detach().clone().requires_grad_(), weight.detach()[live].clone().requires_grad_()]
    moved = torch.tensor([place.get(t, -100) for t in targets.tolist()])
    expected = written_out(leaves[0], leaves[1], moved, anchor=anchor | {"weight": anchor["weight"][live]})
    expected.loss.backward()
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    assert stats.kl is not None and expected.kl is not None and torch.allclose(stats.kl, expected.kl, rtol=1e-12)
    assert distance(hidden.grad, leaves[0].grad) < 1e-12  # type: ignore[arg-type]
    assert distance(weight.grad[live], leaves[1].grad) < 1e-12 and not weight.grad[::4].any()  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_models_that_are_certain_of_different_tokens_have_a_finite_divergence(direction: Any, sign: float) -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[sign * 40.0], [0.0], [-40.0]], requires_grad=True)
    anchor = Anchor(torch.tensor([[1.0]]), torch.tensor([[-30.0], [0.0], [30.0]]), 0.5, direction)
    loss, stats = fused_linear_loss(hidden, weight, torch.tensor([1]), anchor=anchor, return_stats=True)
    loss.backward()
    leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    wide = {"hidden": anchor.hidden.double(), "weight": anchor.weight.double(), "strength": 0.5, "direction": direction}
    expected = written_out(*leaves, torch.tensor([1]), anchor=wide)
    expected.loss.backward()
    assert stats.kl is not None and expected.kl is not None
    assert stats.kl.item() == pytest.approx(expected.kl.item(), rel=1e-5)
    for ours, theirs in zip((hidden, weight), leaves, strict=True):
        assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_logits_of_ten_thousand_on_both_sides_give_finite_gradients(direction: Any) -> None:
    hidden = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    anchor = Anchor(torch.tensor([[1.0], [1.0]]), torch.tensor([[-1e4], [1e4], [0.0]]), 0.1, direction)
    loss, stats = fused_linear_loss(hidden, weight, torch.tensor([0, 2]), anchor=anchor, return_stats=True)
    loss.backward()
    assert loss.isfinite() and stats.kl is not None and stats.kl.isfinite().all() and stats.kl[0] > 100
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()  # type: ignore[union-attr]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"direction": "both"}, "a KL strength above 0 and a direction, found 0.4 and 'both'. Directions: 'forward', KL"),
        ({"direction": None}, "found 0.4 and None. Directions: 'forward'"),
        ({"strength": 0.0}, "Expected a KL strength above 0 and a direction, found 0.0 and 'forward'"),
        ({"strength": -0.1}, "Expected a KL strength above 0 and a direction, found -0.1"),
        ({"strength": float("nan")}, "Expected a KL strength above 0 and a direction, found nan"),
        ({"hidden": torch.zeros(19, 3)}, r"anchor with hidden \[20, H\], weight \[17, H\] .* found \[19, 3\], \[17, 3\] and None"),
        ({"weight": torch.zeros(16, 3)}, r"anchor with hidden \[20, H\], weight \[17, H\] .* found \[20, 3\], \[16, 3\] and None"),
        ({"hidden": torch.zeros(20, 4)}, r"found \[20, 4\], \[17, 3\] and None"),
        ({"bias": torch.zeros(1)}, r"bias \[17\] or none, found \[20, 3\], \[17, 3\] and \[1\]"),
        ({"strength": float("inf")}, "Expected a KL strength above 0 and a direction, found inf"),
        ({"weight": torch.zeros(18, 3)}, "Does the reference have the same vocabulary, and saw it the same batch"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    hidden, weight, targets, anchor = drawn()
    with pytest.raises(ValueError, match=message):
        fused_linear_loss(hidden, weight, targets, anchor=Anchor(**anchor | wrong))


def test_a_direction_must_be_said_and_a_strength_be_positive() -> None:
    check_direction("forward", 0.03)
    check_direction("reverse", 1)
    for direction, strength in (("Forward", 1.0), ("", 1.0), ("forward", 0)):
        with pytest.raises(ValueError, match="Directions: 'forward', KL.reference .. model., or 'reverse'"):
            check_direction(direction, strength)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cap", [None, 100.0], ids=["plain", "capped"])
def test_tokens_far_from_the_largest_logit_are_pulled_back_too(cap: float | None, dtype: torch.dtype) -> None:
    """exp(-120) is 0 in fp32: neither the divergence nor its gradient may be read off it."""
    hidden, far = torch.ones(1, 1, dtype=dtype), torch.tensor([[60.0], [-60.0], [-30.0]], dtype=dtype)
    even = Anchor(torch.zeros(1, 1, dtype=dtype), torch.zeros(3, 1, dtype=dtype), 1.0, "forward", soft_cap=cap)
    ours = far.clone().requires_grad_()
    loss, stats = fused_linear_loss(
        hidden, ours, torch.tensor([0]), anchor=even, soft_cap=cap, objective=lambda s: 0 * s.p, return_stats=True
    )
    loss.backward()
    plain = far.double().requires_grad_()
    logits = plain.T if cap is None else cap * (plain.T / cap).tanh()
    expected = -(math.log(3) + logits.log_softmax(1).mean())
    expected.backward()
    assert stats.kl is not None and stats.kl.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(ours.grad.double(), plain.grad, rtol=1e-5)  # type: ignore[union-attr,arg-type]
