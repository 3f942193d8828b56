"""The objectives and the readable reference loss, against float64 formulas written out by hand."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference_loss import NAMES, WEIGHTS, distance, written_out

from vlm_dft import OBJECTIVES, dft_loss, fused_linear_loss
from vlm_dft.objectives import TokenStats, canonical, find_objective, token_loss

FULL = 151_936  # Qwen2.5's vocabulary

LEARNT = torch.ones((), requires_grad=True)


def drawn(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [3, 9, 31] with likely, unlikely and impossible targets, and labels of which some are masked."""
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, 9, 31, generator=draw, dtype=dtype)
    labels = torch.randint(0, 31, (3, 9), generator=draw)
    for at in ((0, 3), (1, 4), (2, 7), (1, 8)):  # p of 0.3 to 0.99
        logits[at[0], at[1] - 1, labels[at]] = 3.0 + at[1]
    labels[0, :3] = labels[1, 2] = labels[2, 5:7] = -100
    return logits, labels


def by_hand(logits: torch.Tensor, labels: torch.Tensor, objective: Any, **options: Any) -> torch.Tensor:
    """The loss of full logits in float64: position t predicts label t + 1, which is a row of hidden states of its own."""
    rows = logits[:, :-1].reshape(-1, logits.shape[-1])
    identity = torch.eye(logits.shape[-1], dtype=torch.float64)
    return written_out(rows, identity, labels[:, 1:].reshape(-1), objective=objective, **options).loss


@pytest.fixture
def own_objectives() -> Iterator[dict[str, Any]]:
    """OBJECTIVES, put back as it was afterwards."""
    before = dict(OBJECTIVES)
    yield OBJECTIVES
    OBJECTIVES.clear()
    OBJECTIVES.update(before)


# --- values and gradients --------------------------------------------------------------------------------------------


def test_the_family_has_ten_members_and_ids_count_them_in_the_order_of_their_names() -> None:
    assert sorted(OBJECTIVES) == NAMES
    assert NAMES == ["chord", "deft", "dft", "eaft", "floor", "focal", "mix", "nll", "power", "threshold"]
    assert {spec.partition("(")[0] for spec in WEIGHTS} == set(OBJECTIVES)  # and each has a formula here


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("objective", WEIGHTS)
def test_loss_and_gradient_equal_the_formula_in_float64(objective: str, dtype: torch.dtype) -> None:
    logits, labels = drawn(dtype=dtype)
    logits.requires_grad_()
    double = logits.detach().double().requires_grad_()
    loss, expected = token_loss(logits, labels, objective), by_hand(double, labels, objective)
    loss.backward()
    expected.backward()
    exact, close = (1e-6, 1e-5) if dtype == torch.float32 else (1e-11, 1e-11)
    assert loss.dtype == dtype and loss.item() == pytest.approx(expected.item(), rel=exact)
    assert logits.grad is not None and double.grad is not None
    assert distance(logits.grad, double.grad) < close
    assert torch.allclose(logits.grad.double(), double.grad, rtol=10 * close, atol=close * 1e-3)


@pytest.mark.parametrize("objective", WEIGHTS)
def test_half_precision_logits_are_weighed_in_single_precision(objective: str) -> None:
    logits, labels = drawn()
    half = logits.bfloat16().requires_grad_()
    double = half.detach().double().requires_grad_()
    loss, expected = token_loss(half, labels, objective), by_hand(double, labels, objective)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert half.grad is not None and double.grad is not None and half.grad.dtype == torch.bfloat16
    assert distance(half.grad, double.grad) < 2.5e-3


BINARY = {  # w of a target of probability p where the other of two tokens has the rest, and the entropy and sum p^2 of both
    "nll": lambda p, h, s: 1.0, "dft": lambda p, h, s: p, "power": lambda p, h, s: math.sqrt(p),
    "power(alpha=1.5)": lambda p, h, s: p * math.sqrt(p), "floor": lambda p, h, s: max(p, 0.1),
    "floor(minimum=0.2)": lambda p, h, s: max(p, 0.2), "threshold": lambda p, h, s: float(p >= 0.2),
    "threshold(tau=0.5)": lambda p, h, s: float(p >= 0.5), "eaft": lambda p, h, s: h / math.log(20),
    "eaft(k=5)": lambda p, h, s: h / math.log(5), "deft": lambda p, h, s: p**s, "chord": lambda p, h, s: p * (1 - p),
    "focal": lambda p, h, s: (1 - p) ** 2, "focal(gamma=1)": lambda p, h, s: 1 - p, "mix": lambda p, h, s: (1 + p) / 2,
    "mix(share=0.3)": lambda p, h, s: 0.3 + 0.7 * p,
}  # fmt: skip


@pytest.mark.parametrize("objective", BINARY)
def test_the_gradient_on_the_target_logit_is_minus_the_weight_times_one_minus_p(objective: str) -> None:
    """Only with the weight detached: for dft it would else be -(p + p log p)(1 - p), of the other sign for p < 1/e."""
    for p in (0.02, 0.07, 0.15, 0.3, 0.45, 0.6, 0.9, 0.999):
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        weight = BINARY[objective](p, entropy, p * p + (1 - p) ** 2)
        logits = torch.tensor([[math.log(p), math.log(1 - p)]], dtype=torch.float64)
        full = torch.stack([logits, torch.zeros_like(logits)], 1).requires_grad_()  # [1, 2, 2]
        loss = token_loss(full, torch.tensor([[-100, 0]]), objective)
        loss.backward()
        rows = logits.clone().requires_grad_()
        fused = fused_linear_loss(rows, torch.eye(2, dtype=torch.float64), torch.tensor([0]), objective=objective)
        fused.backward()
        for value in (loss, fused):
            assert value.item() == pytest.approx(-weight * math.log(p), rel=1e-9)
        assert full.grad is not None and rows.grad is not None
        for pull in (full.grad[0, 0], rows.grad[0]):
            assert pull[0].item() == pytest.approx(-weight * (1 - p), rel=1e-9)
            assert pull[1].item() == pytest.approx(weight * (1 - p), rel=1e-9)


@pytest.mark.parametrize("objective", [spec for spec in WEIGHTS if spec.partition("(")[0] not in ("nll", "threshold")])
def test_a_missing_detach_would_keep_the_value_and_change_the_gradient(objective: str) -> None:
    logits, labels = drawn(dtype=torch.float64)
    leaves = [logits.clone().requires_grad_() for _ in range(3)]
    token_loss(leaves[0], labels, objective).backward()
    right, wrong = (by_hand(leaf, labels, objective, detach=d) for leaf, d in ((leaves[1], True), (leaves[2], False)))
    right.backward()
    wrong.backward()
    ours, expected, mistaken = (leaf.grad for leaf in leaves)
    assert ours is not None and expected is not None and mistaken is not None
    assert wrong.item() == right.item() and distance(mistaken, expected) > 0.02
    assert distance(ours, expected) < 1e-11


def test_dft_pulls_a_target_of_p_below_1_over_e_up_where_a_missing_detach_pushes_it_down() -> None:
    for p in (0.05, 0.2, 0.36):
        logits = torch.tensor([[[math.log(p), math.log(1 - p)], [0.0, 0.0]]], requires_grad=True)
        dft_loss(logits, torch.tensor([[-100, 0]])).backward()
        assert logits.grad is not None
        assert logits.grad[0, 0, 0].item() == pytest.approx(-p * (1 - p), rel=1e-5)
        assert -(p + p * math.log(p)) * (1 - p) > 0  # what the mistake gives


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 2.0])
def test_the_gradient_of_power_is_that_of_one_minus_p_to_the_alpha_over_alpha(alpha: float) -> None:
    logits, labels = drawn(dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    token_loss(ours, labels, f"power(alpha={alpha})").backward()
    kept = labels[:, 1:] != -100
    p = theirs[:, :-1].softmax(-1)[kept].gather(1, labels[:, 1:][kept].unsqueeze(1))
    ((1 - p**alpha) / alpha).mean().backward()
    assert ours.grad is not None and theirs.grad is not None and distance(ours.grad, theirs.grad) < 1e-12


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("power(alpha=1)", "dft"), ("power(alpha=0)", "nll"), ("mix(share=0)", "dft"), ("mix(share=1)", "nll"),
        ("floor(minimum=0)", "dft"), ("floor(minimum=1)", "nll"), ("floor(minimum=0, alpha=0.5)", "power"),
        ("threshold(tau=0)", "nll"), ("focal(gamma=0)", "nll"), ("power()", "power(alpha=0.5)"), ("eaft()", "eaft(k=20)"),
    ],
)  # fmt: skip
def test_two_ways_of_saying_one_objective_agree(one: str, other: str) -> None:
    logits, labels = drawn(dtype=torch.float64)
    found = []
    for objective in (one, other):
        leaf = logits.clone().requires_grad_()
        loss = token_loss(leaf, labels, objective)
        loss.backward()
        found.append((loss.item(), leaf.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-13)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-12, atol=1e-16)  # type: ignore[arg-type]


def test_weights_take_literal_values_at_a_probability_of_one_quarter() -> None:
    even = torch.zeros(1, 2, 4, dtype=torch.float64)  # p = 1/4 each: entropy ln 4, sum p^2 = 1/4
    expected = {
        "nll": 1, "dft": 0.25, "power": 0.5, "power(alpha=2)": 0.0625, "floor": 0.25, "floor(minimum=0.5)": 0.5,
        "threshold": 1, "threshold(tau=0.3)": 0, "eaft": math.log(4) / math.log(20), "eaft(k=2)": 1, "eaft(k=4)": 1,
        "deft": 0.25**0.25, "chord": 0.1875, "focal": 0.5625, "mix": 0.625,
    }  # fmt: skip
    for objective, weight in expected.items():
        loss = token_loss(even, torch.tensor([[-100, 2]]), objective).item()
        assert loss == pytest.approx(weight * math.log(4), rel=1e-12), objective


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_probability_just_at_the_threshold_counts_in_full(dtype: torch.dtype) -> None:
    even = torch.zeros(1, 2, 2, dtype=dtype)  # p = 1/2
    for tau, weight in ((0.5, 1), (0.499, 1), (0.501, 0)):
        loss = token_loss(even, torch.tensor([[-100, 1]]), f"threshold(tau={tau})").item()
        assert loss == pytest.approx(weight * math.log(2), rel=1e-6)


@pytest.mark.parametrize("objective", WEIGHTS)
def test_weights_stay_within_their_range_and_never_turn_negative_or_nan(objective: str) -> None:
    low, high = -60.0, 60.0
    logits = torch.tensor([[low, high, 0.0], [high, low, 0.0], [0.0, 0.0, 0.0], [0.0, float("-inf"), 0.0]])
    for target in (0, 1):
        weights = find_objective(objective)(
            TokenStats(logits.log_softmax(1)[:, target], lambda: (logits.softmax(1), torch.ones(4)))
        )
        assert ((weights >= 0) & (weights <= 1 + 1e-6)).all(), weights


def test_an_objective_that_asks_for_no_entropy_computes_none() -> None:
    def forbidden() -> Any:
        raise AssertionError("masses were asked for")

    for name in ("nll", "dft", "power", "floor", "threshold", "chord", "focal", "mix"):
        assert find_objective(name)(TokenStats(torch.tensor([-1.0, -0.1]), forbidden)).shape == (2,)
    for name in ("eaft", "deft"):
        with pytest.raises(AssertionError, match="masses were asked for"):
            find_objective(name)(TokenStats(torch.tensor([-1.0]), forbidden))


# --- the readable loss -----------------------------------------------------------------------------------------------


def test_a_given_number_of_items_replaces_the_count_of_the_batch() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    assert dft_loss(logits, labels, num_items_in_batch=80).item() == pytest.approx(dft_loss(logits, labels).item() / 10)
    as_tensor = dft_loss(logits, labels, num_items_in_batch=torch.tensor(80))
    assert as_tensor.item() == pytest.approx(dft_loss(logits, labels).item() / 10)


@pytest.mark.parametrize("items", [0, 0.0, torch.tensor(0), torch.tensor(0.0)])
def test_no_items_at_all_count_as_one(items: Any) -> None:
    logits, labels = drawn(dtype=torch.float64)
    assert token_loss(logits, labels, "nll", items).item() == token_loss(logits, labels, "nll", 1).item()
    rows, targets = logits[:, :-1].reshape(-1, 31), labels[:, 1:].reshape(-1)
    eye = torch.eye(31, dtype=torch.float64)
    one, none = (fused_linear_loss(rows, eye, targets, objective="nll", num_items=n).item() for n in (1, items))
    assert one == none == pytest.approx(token_loss(logits, labels, "nll", 1).item(), rel=1e-12)


def test_the_first_label_of_a_row_is_predicted_by_nothing_and_costs_nothing() -> None:
    logits, labels = drawn()
    other = labels.clone()
    other[:, 0] = 5
    assert dft_loss(logits, other).item() == dft_loss(logits, labels).item()


def test_two_half_batches_give_the_gradient_of_the_whole_batch() -> None:
    logits, labels = torch.randn(4, 6, 9, requires_grad=True), torch.randint(0, 9, (4, 6))
    labels[0, 1:5] = -100
    count = int((labels[:, 1:] != -100).sum())
    dft_loss(logits, labels).backward()
    whole = logits.grad.clone()  # type: ignore[union-attr]
    logits.grad = None
    for half in (slice(0, 2), slice(2, 4)):
        dft_loss(logits[half], labels[half], num_items_in_batch=count).backward()
    assert torch.allclose(logits.grad, whole, rtol=1e-6, atol=1e-9)  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", WEIGHTS)
@pytest.mark.parametrize("items", [None, 0, 12])
def test_a_batch_without_targets_backpropagates_zeros(objective: str, items: int | None) -> None:
    logits = torch.full((1, 3, 5), float("inf"), requires_grad=True)
    loss = token_loss(logits, torch.full((1, 3), -100), objective, items)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("objective", ["dft", "power", "threshold", "deft", "chord"])
def test_a_token_of_probability_zero_costs_nothing_where_its_weight_is_zero(objective: str) -> None:
    logits = torch.tensor([[[0.0, float("-inf"), 1.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    loss = token_loss(logits, torch.tensor([[-100, 1]]), objective)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None and not logits.grad.any()


def test_a_model_output_is_accepted_in_place_of_its_logits() -> None:
    class Output:
        logits = torch.randn(1, 4, 6)

    labels = torch.randint(0, 6, (1, 4))
    assert dft_loss(Output(), labels) == dft_loss(Output.logits, labels)


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_a_full_vocabulary_keeps_the_loss_to_a_millionth(spread: float) -> None:
    draw = torch.Generator().manual_seed(1)
    logits = spread * torch.randn(1, 8, FULL, generator=draw)
    labels = torch.tensor([[-100, 17, FULL - 1, 100_000, 0, 5, -100, 7]])
    for t, odds in ((1, 0.5), (2, 0.1), (3, 2.0), (4, 1.0), (6, 0.3)):  # p = odds / (1 + odds); the first is unlikely
        target = int(labels[0, t + 1])
        if target >= 0:
            others = torch.cat([logits[0, t, :target], logits[0, t, target + 1 :]])
            logits[0, t, target] = others.logsumexp(0) + math.log(odds)
    double = logits.double().requires_grad_()
    logits.requires_grad_()
    loss = dft_loss(logits, labels)
    total = torch.zeros((), dtype=torch.float64)
    targets = [(t, target) for t, target in enumerate(labels[0, 1:].tolist()) if target >= 0]
    for t, target in targets:
        row = double[0, t] - double[0, t].detach().max()
        log_p = row[target] - row.exp().sum().log()
        total = total - log_p.detach().exp() * log_p / len(targets)
    loss.backward()
    total.backward()
    assert len(targets) == 6 and loss.item() == pytest.approx(total.item(), rel=1e-6)
    assert distance(logits.grad, double.grad) < 1e-5  # type: ignore[arg-type]


def test_turns_with_their_own_weight_and_objective_count_as_they_say() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 5, 7, dtype=torch.float64), torch.tensor([[-100, 3, 1, 6, 2]])
    weights = torch.tensor([[1.0, 1.0, 0.5, 1.0, 2.0]])
    ids = torch.tensor([[-1, -1, -1, 7, 5]])  # sorted names: nll, focal
    loss = dft_loss(logits, labels, loss_weights=weights, objective_ids=ids)
    p = [logits[0, t - 1].softmax(-1)[int(labels[0, t])].item() for t in range(1, 5)]
    terms = [p[0] * math.log(p[0]), 0.5 * p[1] * math.log(p[1]), math.log(p[2]), 2 * (1 - p[3]) ** 2 * math.log(p[3])]
    assert sorted(OBJECTIVES)[7] == "nll" and sorted(OBJECTIVES)[5] == "focal"
    assert loss.item() == pytest.approx(-sum(terms) / 4, rel=1e-6)


# --- names and parameters --------------------------------------------------------------------------------------------


def test_an_unknown_objective_names_the_nearest_and_all() -> None:
    with pytest.raises(
        ValueError,
        match=r"Unknown objective 'dtf'. Did you mean 'dft'\? Choose one of chord, deft, dft, eaft, floor, focal, mix, nll, "
        r"power, threshold \(parameters in brackets: floor\(minimum=0.2\)\), or pass a function from TokenStats",
    ):
        find_objective("dtf")


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("flor(minimum=0.2)", r"Unknown objective 'flor\(minimum=0.2\)'. Did you mean 'floor'\?"),
        ("power(alpha=1.5", r"Unknown objective 'power\(alpha=1.5'. Did you mean 'power'\?"),
        ("", "Unknown objective ''. Choose one of"),
        (None, "Unknown objective None. Choose one of"),
        (3, "Unknown objective 3. Choose one of"),
        ("power(alfa=1)", r"Objective power: unknown parameter 'alfa=1'. Did you mean 'alpha'\? Known: alpha=0.5."),
        ("power(0.5)", "Objective power: unknown parameter '0.5'. Known: alpha=0.5."),
        ("dft(alpha=1)", "Objective dft: unknown parameter 'alpha=1'. Known: none."),
        ("floor(minimum=0.1, alpa=1)", r"unknown parameter 'alpa=1'. Did you mean 'alpha'\? Known: minimum=0.1, alpha=1.0."),
        ("power(alpha=2.1)", "Objective power: alpha must be a number from 0 to 2, found '2.1'."),
        ("power(alpha=-0.1)", "Objective power: alpha must be a number from 0 to 2, found '-0.1'."),
        ("power(alpha=1e999)", "Objective power: alpha must be a number from 0 to 2, found '1e999'."),
        ("floor(minimum=1.5)", "Objective floor: minimum must be a number from 0 to 1, found '1.5'."),
        ("threshold(tau=2)", "Objective threshold: tau must be a number from 0 to 1, found '2'."),
        ("mix(share=-1)", "Objective mix: share must be a number from 0 to 1, found '-1'."),
        ("focal(gamma=11)", "Objective focal: gamma must be a number from 0 to 10, found '11'."),
        ("eaft(k=1)", r"Objective eaft: k must be a whole number from 2 to 1e\+09, found '1'."),
        ("eaft(k=2.5)", r"Objective eaft: k must be a whole number from 2 to 1e\+09, found '2.5'."),
        ("power(alpha=True)", "alpha must be a number from 0 to 2, found 'True'."),
        ("power(alpha='1')", r"alpha must be a number from 0 to 2, found \"'1'\"."),
        ("power(alpha=[1])", r"alpha must be a number from 0 to 2, found '\[1\]'."),
        ("power(alpha=1j)", "alpha must be a number from 0 to 2, found '1j'."),
        ("power(alpha=nan)", "alpha must be a number from 0 to 2, found 'nan'."),
        ("power(alpha=)", "alpha must be a number from 0 to 2, found ''."),
        ("power(alpha=__import__('os'))", "alpha must be a number from 0 to 2, found"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["find", "token_loss", "fused"])
def test_a_wrong_objective_says_what_was_expected(objective: Any, message: str, where: str) -> None:
    calls = {
        "find": lambda: find_objective(objective),
        "token_loss": lambda: token_loss(torch.zeros(1, 2, 3), torch.tensor([[-100, 1]]), objective),
        "fused": lambda: fused_linear_loss(
            torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([1]), objective=objective
        ),
    }
    with pytest.raises(ValueError, match=message):
        calls[where]()


def test_blanks_and_edges_of_the_bounds_are_taken() -> None:
    stats = TokenStats(torch.tensor([math.log(0.25)]), lambda: None)  # type: ignore[arg-type,return-value]
    for objective, weight in (
        (" power ( alpha = 2 ) ", 0.0625), ("power(alpha=0)", 1), ("floor( minimum=1 )", 1), ("threshold(tau=1)", 0),
        ("mix(share=1)", 1), ("focal(gamma=10)", 0.75**10), ("floor(minimum=0.3,alpha=0.5,)", 0.5),
    ):  # fmt: skip
        assert find_objective(objective)(stats).item() == pytest.approx(weight, rel=1e-5), objective


# --- one's own -------------------------------------------------------------------------------------------------------


OWN = {  # a function of stats, and the same of p [n] and all probabilities P [n, V]
    "root": (lambda s: s.p.sqrt(), lambda p, P: p**0.5),
    "unsure": (lambda s: s.entropy / 4, lambda p, P: -torch.special.xlogy(P, P).sum(1) / 4),
    "spread": (lambda s: 1 - s.sum_p2, lambda p, P: 1 - (P * P).sum(1)),
    "top": (lambda s: s.top_entropy(3), lambda p, P: -torch.special.xlogy(
        P.topk(3).values / P.topk(3).values.sum(1, keepdim=True), P.topk(3).values / P.topk(3).values.sum(1, keepdim=True)
    ).sum(1)),
    "all": (lambda s: s.p * s.entropy + s.sum_p2 - s.log_p / 9, lambda p, P: p * -torch.special.xlogy(P, P).sum(1)
            + (P * P).sum(1) - p.log() / 9),
}  # fmt: skip


@pytest.mark.parametrize("way", ["as a function", "by name", "by id"])
@pytest.mark.parametrize("own", OWN)
def test_a_function_of_ones_own_is_an_objective(own: str, way: str, own_objectives: dict[str, Any]) -> None:
    function, formula = OWN[own]
    given: Any = function
    ids = None
    if way != "as a function":
        own_objectives[f"my_{own}"] = function
        given = f"my_{own}"
    if way == "by id":
        ids, given = torch.full((12,), sorted(own_objectives).index(f"my_{own}")), "chord"
    draw = torch.Generator().manual_seed(3)
    rows = 2 * torch.randn(12, 17, generator=draw, dtype=torch.float64)
    targets = torch.randint(0, 17, (12,), generator=draw)
    leaves = [rows.clone().requires_grad_() for _ in range(3)]
    weight = torch.eye(17, dtype=torch.float64)
    expected = written_out(leaves[0], weight, targets, objective=formula).loss
    fused = fused_linear_loss(leaves[1], weight, targets, objective=given, objective_ids=ids, chunk_size=5)
    shifted = torch.cat([leaves[2], leaves[2][:1].detach()]).unsqueeze(0)
    labels = torch.cat([torch.tensor([-100]), targets]).unsqueeze(0)
    own_ids = None if ids is None else torch.cat([ids[:1], ids]).unsqueeze(0)
    readable = token_loss(shifted, labels, given, objective_ids=own_ids)
    for loss in (expected, fused, readable):
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for leaf in leaves[1:]:
        assert distance(leaf.grad, leaves[0].grad) < 1e-12  # type: ignore[arg-type]


def test_an_objective_of_ones_own_takes_parameters_in_brackets(own_objectives: dict[str, Any]) -> None:
    def capped(stats: TokenStats, *, most: float = 0.5, times: int = 1) -> torch.Tensor:
        return stats.p.clamp(max=most) * times

    own_objectives["capped"] = capped
    stats = TokenStats(torch.tensor([math.log(0.8)]), lambda: None)  # type: ignore[arg-type,return-value]
    assert find_objective("capped(most=0.7, times=3)")(stats).item() == pytest.approx(2.1, rel=1e-6)
    with pytest.raises(
        ValueError, match=r"capped: unknown parameter 'mots=1'. Did you mean 'most'\? Known: most=0.5, times=1."
    ):
        find_objective("capped(mots=1)")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s: s.p.unsqueeze(1), r"expected weights \[4\], one a token, found \[4, 1\]"),
        (lambda s: s.p[:3], r"expected weights \[4\], one a token, found \[3\]"),
        (lambda s: s.p.sum(), r"expected weights \[4\], one a token, found \[\]"),
        (lambda s: 0.5, r"expected weights \[4\], one a token, found 0.5"),
        (lambda s: None, r"expected weights \[4\], one a token, found None"),
        (lambda s: torch.ones(4, requires_grad=True), "its weights require a gradient, expected a pure function of TokenStats"),
        (lambda s: s.p * LEARNT, "its weights require a gradient.* Detach that"),
    ],
    ids=["column", "too few", "sum", "number", "nothing", "requires grad", "computes with a parameter"],
)  # fmt: skip
@pytest.mark.parametrize("fused", [False, True])
def test_a_function_that_does_not_give_one_detached_weight_a_token_is_refused(
    function: Any, message: str, fused: bool
) -> None:
    targets = torch.tensor([0, 1, 2, 3])
    labels = torch.cat([torch.tensor([-100]), targets]).unsqueeze(0)
    calls = {
        True: lambda: fused_linear_loss(torch.randn(4, 3), torch.randn(5, 3), targets, objective=function),
        False: lambda: token_loss(torch.randn(1, 5, 6), labels, function),
    }
    with pytest.raises(ValueError, match=f"Objective <lambda>: {message}"):
        calls[fused]()


def test_statistics_that_an_objective_sees_carry_no_gradient() -> None:
    seen: list[TokenStats] = []

    def look(stats: TokenStats) -> torch.Tensor:
        seen.append(stats)
        assert not any(
            t.requires_grad for t in (stats.log_p, stats.p, stats.entropy, stats.sum_p2, stats.top_entropy(2))
        )
        return stats.p

    logits, labels = drawn()
    token_loss(logits.requires_grad_(), labels, look)
    fused_linear_loss(
        torch.randn(4, 3, requires_grad=True), torch.randn(5, 3), torch.tensor([0, 1, 2, 3]), objective=look
    )
    assert len(seen) == 2


@pytest.mark.parametrize("wrong", [lambda s: s.p[:1], lambda s: torch.tensor(1.0)], ids=["one", "scalar"])
def test_a_tokens_own_objective_is_held_to_the_same_and_named(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong.__name__ = "too_short"
    monkeypatch.setitem(OBJECTIVES, "zzz", wrong)
    ids = torch.tensor([-1, len(OBJECTIVES) - 1, -1, -1])
    with pytest.raises(ValueError, match=r"Objective too_short: expected weights \[4\], one a token, found"):
        fused_linear_loss(torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3]), objective_ids=ids)


def test_a_parameter_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="Objective floor: minimum is given twice"):
        find_objective("floor(minimum=0.1, minimum=0.2)")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s: s.log_p.exp_(), "changes the statistics in place, expected a pure function"),
        (lambda s: s.p - 2, "expected finite weights of 0 or more, found -"),
        (lambda s: s.p / 0, "expected finite weights of 0 or more, found inf"),
        (lambda s: s.p * math.nan, "expected finite weights of 0 or more, found nan"),
    ],
    ids=["in place", "negative", "infinite", "nan"],
)
def test_weights_that_are_no_weights_are_refused(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"Objective <lambda>:? {message}"):
        fused_linear_loss(torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3]), objective=function)


def test_an_objective_has_one_spelling() -> None:
    for said, expected in (
        ("floor( minimum = .20 )", "floor(minimum=0.2)"), ("floor(minimum=0.2,alpha=1)", "floor(alpha=1, minimum=0.2)"),
        (" dft ", "dft"), ("eaft(k=5)", "eaft(k=5)"), ("mix()", "mix"),
    ):  # fmt: skip
        assert canonical(said) == expected
