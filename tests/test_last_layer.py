"""The last MLP runs on response rows alone: the same hidden states and gradients, fewer rows multiplied."""

import copy
from typing import Any

import pytest
import torch
from test_packing import CLASSES, make_model

from vlm_dft import ChatCollator
from vlm_dft.last_layer import last_rows_alone
from vlm_dft.loss_head import attach_loss, response_hidden
from vlm_dft.models import load_model
from vlm_dft.objectives import IGNORE, OBJECTIVES, token_loss
from vlm_dft.recompute import use_recompute

torch.set_num_threads(1)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["embedded", *CLASSES])
def test_hidden_states_and_gradients_are_the_whole_forward_passs(
    kind: str, packing: bool, processor: Any, drawn: list[Any]
) -> None:
    model = load_model("tiny", dtype=torch.float64) if kind == "embedded" else copy.deepcopy(make_model(kind)).double()
    model.requires_grad_(True)  # whatever another test has frozen of the shared one
    batch = ChatCollator(processor, packing=packing)(drawn[:3])
    batch = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    labels = batch.pop("labels")
    ours = response_hidden(model, labels, batch)
    whole = model.model(**{**batch, "use_cache": False}).last_hidden_state[:, :-1][labels[:, 1:] != IGNORE]
    assert torch.allclose(ours, whole, rtol=1e-12, atol=1e-12)
    slope = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(0))
    parameters = list(model.model.parameters())
    expected = torch.autograd.grad((whole * slope).sum(), parameters, allow_unused=True)
    found = torch.autograd.grad((ours * slope).sum(), parameters, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 1e-10 * b.norm() + 1e-14


def test_only_response_rows_reach_the_last_mlp_and_all_rows_the_others(processor: Any, drawn: list[Any]) -> None:
    model = attach_loss(load_model("tiny"))
    batch = ChatCollator(processor)(drawn[:3])
    targets = int((batch["labels"][:, 1:] != IGNORE).sum())
    seen: list[int] = []
    for layer in model.model.language_model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()))
    model(**batch, objective="dft")
    every = batch["input_ids"].numel()
    assert seen == [every, every, targets]
    seen.clear()
    model(**{k: v for k, v in batch.items() if k != "labels"})  # its own logits
    assert seen == [every] * 3


def test_a_batch_without_targets_gives_zero_gradients_to_every_weight_of_the_layer(
    processor: Any, drawn: list[Any]
) -> None:
    model = attach_loss(load_model("tiny"))
    batch = ChatCollator(processor)(drawn[:2])
    batch["labels"] = torch.full_like(batch["labels"], IGNORE)
    loss = model(**batch, objective="dft", num_items=5)["loss"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.model.language_model.layers[-1].mlp.parameters())


def test_a_layer_that_is_recomputed_leaves_out_the_same_rows_both_times(processor: Any, drawn: list[Any]) -> None:
    model = attach_loss(load_model("tiny")).train()
    batch = ChatCollator(processor)(drawn[:3])
    use_recompute(model, ["language"])
    seen: list[int] = []
    model.model.language_model.layers[-1].mlp.gate_proj.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[:-1].numel())
    )
    model(**batch, objective="dft")["loss"].backward()
    targets = int((batch["labels"][:, 1:] != IGNORE).sum())
    assert seen == [targets, targets]


def test_a_model_of_other_layers_is_left_as_it_is() -> None:
    model = torch.nn.Module()
    model.model = torch.nn.Linear(2, 2)
    with last_rows_alone(model, torch.ones(1, 2, dtype=torch.bool)):
        assert model.model(torch.ones(1, 2)).shape == (1, 2)


def test_the_loss_is_that_of_the_models_own_logits(processor: Any, drawn: list[Any]) -> None:
    model = attach_loss(load_model("tiny"))
    batch = ChatCollator(processor)(drawn[:4])
    ours = model(**batch, objective="nll")["loss"]
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert ours.item() == pytest.approx(token_loss(logits, batch["labels"], OBJECTIVES["nll"]).item(), rel=1e-5)
