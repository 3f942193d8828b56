"""The objectives and the readable reference loss, against float64 formulas written out by hand."""

import math

import pytest
import torch

from vlm_dft import OBJECTIVES, dft_loss
from vlm_dft.objectives import find_objective, token_loss

torch.manual_seed(0)


def written_out(logits: torch.Tensor, labels: torch.Tensor, dft: bool) -> torch.Tensor:
    """sum over targets of -w log p, in float64, token by token."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, row_labels in zip(logits.double(), labels, strict=True):
        for t in range(len(row_labels) - 1):
            if (target := int(row_labels[t + 1])) != -100:
                log_p = row[t, target] - row[t].exp().sum().log()
                total, count = total - (log_p.exp().detach() if dft else 1.0) * log_p, count + 1
    return total / count


@pytest.mark.parametrize(("name", "dft"), [("nll", False), ("dft", True)])
def test_loss_and_gradient_equal_the_formula_in_float64(name: str, dft: bool) -> None:
    logits = torch.randn(3, 7, 11, requires_grad=True)
    labels = torch.randint(0, 11, (3, 7))
    labels[0, :4] = -100
    loss = token_loss(logits, labels, OBJECTIVES[name])
    loss.backward()
    double = logits.detach().double().requires_grad_()
    expected = written_out(double, labels, dft)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert logits.grad is not None and double.grad is not None
    assert torch.allclose(logits.grad.double(), double.grad, rtol=1e-5, atol=1e-8)


def test_the_gradient_of_dft_on_the_target_logit_is_minus_p_times_one_minus_p() -> None:
    # With the detach missing it would be -(p + p log p)(1 - p): of the other sign wherever p < 1/e.
    for p in (0.05, 0.2, 0.5, 0.9):
        logits = torch.tensor([[[math.log(p), math.log(1 - p)], [0.0, 0.0]]], requires_grad=True)
        dft_loss(logits, torch.tensor([[-100, 0]])).backward()
        assert logits.grad is not None
        assert logits.grad[0, 0, 0].item() == pytest.approx(-p * (1 - p), rel=1e-5)


def test_a_given_number_of_items_replaces_the_count_of_the_batch() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    assert dft_loss(logits, labels, num_items_in_batch=80).item() == pytest.approx(dft_loss(logits, labels).item() / 10)
    as_tensor = dft_loss(logits, labels, num_items_in_batch=torch.tensor(80))
    assert as_tensor.item() == pytest.approx(dft_loss(logits, labels).item() / 10)


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


def test_a_batch_without_targets_backpropagates_zeros() -> None:
    logits = torch.full((1, 3, 5), float("inf"), requires_grad=True)
    loss = dft_loss(logits, torch.full((1, 3), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None and not logits.grad.any()


def test_a_token_of_probability_zero_costs_nothing_under_dft() -> None:
    logits = torch.tensor([[[0.0, float("-inf")], [0.0, 0.0]]], requires_grad=True)
    loss = dft_loss(logits, torch.tensor([[-100, 1]]))
    assert loss.item() == 0.0


def test_a_model_output_is_accepted_in_place_of_its_logits() -> None:
    class Output:
        logits = torch.randn(1, 4, 6)

    labels = torch.randint(0, 6, (1, 4))
    assert dft_loss(Output(), labels) == dft_loss(Output.logits, labels)


def test_an_unknown_objective_names_the_nearest_and_all() -> None:
    with pytest.raises(
        ValueError, match=r"Unknown objective 'dtf'. Did you mean 'dft'\? Choose one of \['dft', 'nll'\]"
    ):
        find_objective("dtf")


def test_turns_with_their_own_weight_and_objective_count_as_they_say() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 5, 7, dtype=torch.float64), torch.tensor([[-100, 3, 1, 6, 2]])
    weights = torch.tensor([[1.0, 1.0, 0.5, 1.0, 2.0]])
    ids = torch.tensor([[-1, -1, -1, 1, 1]])  # sorted names: dft, nll
    loss = dft_loss(logits, labels, loss_weights=weights, objective_ids=ids)
    log_p = [logits[0, t - 1].log_softmax(-1)[int(labels[0, t])].item() for t in range(1, 5)]
    expected = -(math.exp(log_p[0]) * log_p[0] + 0.5 * math.exp(log_p[1]) * log_p[1] + log_p[2] + 2 * log_p[3]) / 4
    assert sorted(OBJECTIVES)[1] == "nll" and loss.item() == pytest.approx(expected, rel=1e-6)
