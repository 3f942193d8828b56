"""The capability gauge: summary numbers against literals, thresholds, and batches that do not change it."""

from typing import Any

import pytest
import torch

from vlm_dft.collators import ChatCollator
from vlm_dft.probing import gauge, predict, token_summary
from vlm_dft.loss_head import attach_loss
from vlm_dft.models import load_model


def test_the_summary_of_two_responses_is_what_one_computes_by_hand() -> None:
    found = token_summary(torch.tensor([1.0, 0.5, 0.05, 0.95]).log(), [2, 2])
    assert (found["tokens"], found["responses"]) == (4, 2)
    assert found["mean_p"] == pytest.approx(0.625)
    assert found["stderr_p"] == pytest.approx(0.125)  # means 0.75 and 0.5: half their difference
    assert (found["share_p_below_0.1"], found["share_p_above_0.9"]) == (0.25, 0.5)
    assert found["nll"] == pytest.approx((0.6931 + 2.9957 + 0.0513) / 4, abs=1e-4)


def test_no_token_has_no_summary() -> None:
    with pytest.raises(ValueError, match="at least one token, found 0"):
        token_summary(torch.empty(0), [])


@pytest.mark.parametrize(
    ("mean_p", "starved", "prior"),
    [
        (0.97, 0.02, "strong"),
        (0.5, 0.0, "strong"),
        (0.58, 0.37, "weak"),
        (0.02, 0.9, "weak"),
        (0.3, 0.04, "middle"),
        (0.8, 0.1, "middle"),
    ],
)
def test_a_prior_is_strong_only_if_few_tokens_are_starved(mean_p: float, starved: float, prior: str) -> None:
    found, words = predict(mean_p, starved)
    assert found == prior and words.startswith(f"{prior} prior (mean p {mean_p:.2f}, {starved:.0%} of the tokens below")


def test_the_gauge_does_not_depend_on_the_batches_and_leaves_the_model_alone(processor: Any, drawn: list[Any]) -> None:
    model, collator = attach_loss(load_model("tiny")), ChatCollator(processor)
    before = [p.clone() for p in model.parameters()]
    whole = gauge(model, [collator(drawn[:12])])
    parts = gauge(model, [collator(drawn[k : k + 3]) for k in range(0, 12, 3)])
    assert whole["mean_p"] == pytest.approx(parts["mean_p"], rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
