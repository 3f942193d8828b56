"""The embedding's gradient in place is autograd's, bit for bit, tied or not, over micro-batches; without a dense one."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlm_dft import ChatCollator
from vlm_dft.embedding import InPlaceEmbedding, give_in_place_gradient
from vlm_dft.loss_head import attach_loss
from vlm_dft.models import load_model

torch.set_num_threads(1)


class Largest(TorchDispatchMode):
    """The most numbers in one tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and not any(found is given for given in args):
            self.numbers = max(self.numbers, found.numel())
        return found


@pytest.mark.parametrize("padding", [None, 3])
def test_the_gradient_is_autograds_bit_for_bit(padding: int | None) -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(50, 8, padding_idx=padding)
    ours = nn.Embedding(50, 8, padding_idx=padding, _weight=plain.weight.detach().clone())
    made = give_in_place_gradient(ours)
    assert made is ours and isinstance(ours, InPlaceEmbedding)
    made.in_place = True
    for ids in (torch.tensor([[1, 3, 1, 49], [7, 1, 3, 7]]), torch.tensor([[49, 2, 2]])):  # two micro-batches
        weights = torch.randn(*ids.shape, 8)
        for module in (plain, ours):
            (module(ids) * weights).sum().backward()
        assert plain.weight.grad is not None and ours.weight.grad is not None
        assert torch.equal(plain.weight.grad, ours.weight.grad)


def test_no_tensor_as_large_as_the_vocabulary_is_made_after_the_first_step() -> None:
    module = give_in_place_gradient(nn.Embedding(10_000, 4))
    assert module is not None
    module.in_place = True
    ids = torch.tensor([[5, 9_999]])
    module(ids).sum().backward()
    first = module.weight.grad
    module.weight.grad = None  # as optimisers leave it
    with Largest() as made:
        module(ids).sum().backward()
    assert made.numbers < 100
    assert module.weight.grad is first and int((module.weight.grad != 0).sum()) == 8


def test_where_it_is_off_or_frozen_it_is_a_plain_embedding() -> None:
    module = give_in_place_gradient(nn.Embedding(20, 4))
    assert module is not None
    module(torch.tensor([1])).sum().backward()
    assert module._kept is None and module.weight.grad is not None
    module.requires_grad_(False)
    module.in_place = True
    assert not module(torch.tensor([1])).requires_grad


def test_other_embeddings_are_left_as_they_are() -> None:
    class Scaled(nn.Embedding):
        pass

    others = (
        Scaled(4, 2),
        nn.Embedding(4, 2, max_norm=1.0),
        nn.Embedding(4, 2, sparse=True),
        nn.Embedding(4, 2).bfloat16(),
        nn.Linear(4, 2),
    )
    for other in others:
        before = type(other)
        assert give_in_place_gradient(other) is None and type(other) is before


@pytest.mark.parametrize("tied", [True, False])
def test_all_gradients_of_a_model_stay_the_same(tied: bool, processor: Any, drawn: list[Any]) -> None:
    batches = [ChatCollator(processor)(drawn[:2]), ChatCollator(processor)(drawn[2:5])]
    found = []
    for in_place in (False, True):
        model = load_model("tiny")
        if not tied:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model = attach_loss(model).train()
        embedding: Any = give_in_place_gradient(model.get_input_embeddings())
        embedding.in_place = model.get_output_embeddings().in_place = in_place
        for batch in batches:
            model(**batch, objective="dft", num_items=100)["loss"].backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        difference = (gradient - found[1][name]).norm() / gradient.norm()
        assert difference <= (1e-6 if "embed" in name or "head" in name else 0), name  # tied: summed in another order
