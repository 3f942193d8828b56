"""Vision attention by window length is sdpa window by window: values and gradients, in every family; else it is not used."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from test_packing import CLASSES, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from vlm_dft import ChatCollator
from vlm_dft.errors import ModelError
from vlm_dft.loss_head import attach_loss
from vlm_dft.models import add_lora, load_model
from vlm_dft.recompute import use_recompute
from vlm_dft.vision_attention import (
    WINDOWS,
    check_window_attention,
    stop_window_attention,
    use_window_attention,
    uses_window_attention,
    window_samples,
)

GRIDS = torch.tensor([[1, 10, 18], [1, 4, 6], [1, 18, 10], [1, 8, 8], [2, 6, 4]])  # the last: a video's
UNIFORM = torch.tensor([[1, 8, 8], [1, 8, 8]])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pixels(grids: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(int(grids.prod(-1).sum()), 1176, generator=generator, dtype=torch.float64)


def features_and_gradients(model: Any, grids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    found = model.get_image_features(pixels(grids), grids, return_dict=True)
    deeper = [part for layer in getattr(found, "deepstack_features", None) or [] for part in layer]
    states = torch.cat([part.reshape(-1) for part in (*found.pooler_output, *deeper)])
    (states * torch.linspace(-1, 1, len(states), dtype=states.dtype)).sum().backward()
    tower = model.model.visual
    return states.detach(), {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None}


class Calls(TorchDispatchMode):
    """Counts calls of attention kernels."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        self.count += "scaled_dot_product" in name and "backward" not in name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("grids", [GRIDS, UNIFORM], ids=["mixed", "uniform"])
@pytest.mark.parametrize("kind", [*CLASSES, "embedded"])
def test_features_and_gradients_are_those_of_sdpa_window_by_window(kind: str, grids: torch.Tensor) -> None:
    model = load_model("tiny", dtype=torch.float64) if kind == "embedded" else make_model(kind).double()
    expected, expected_gradients = features_and_gradients(model, grids)
    assert use_window_attention(model) == ""
    try:
        found, gradients = features_and_gradients(model, grids)
    finally:
        stop_window_attention(model)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert set(gradients) == set(expected_gradients) and len(gradients) > 8
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() <= 1e-12 * expected_gradients[name].norm() + 1e-300, name
    assert torch.equal(features_and_gradients(model, grids)[0], expected)  # and stopped it is stock again


def test_one_call_per_length_of_window_instead_of_one_per_window() -> None:
    """A [1, 10, 18] picture has windows of 4 x 4 patches at window_size 56: 8 whole ones, 2 + 2 halves and so on."""
    model = make_model("Qwen2_5_VL").double()
    counts = []
    for ours in (False, True):
        if ours:
            use_window_attention(model)
        with Calls() as calls, torch.no_grad():
            model.get_image_features(pixels(GRIDS[:1]), GRIDS[:1], return_dict=True)
        counts.append(calls.count)
    stop_window_attention(model)
    windows, whole_picture = 3 * 5, 1  # of layer 0, of layer 1
    lengths = len({16, 8, 4})
    assert counts == [windows + whole_picture, lengths + whole_picture]


def test_a_tower_of_another_maker_is_found_by_its_cu_seqlens() -> None:
    from transformers.models.glm4v.configuration_glm4v import Glm4vVisionConfig
    from transformers.models.glm4v.modeling_glm4v import Glm4vVisionModel

    from vlm_dft.vision_attention import find_window_attentions

    config = Glm4vVisionConfig(
        depth=2, hidden_size=32, num_heads=2, out_hidden_size=32, intermediate_size=48, image_size=112
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = Glm4vVisionModel._from_config(config, attn_implementation="sdpa", dtype=torch.float64)
    assert len(find_window_attentions(tower)) == 2


def test_a_model_without_windows_is_left_alone_and_says_why() -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    assert "cu_seqlens" in use_window_attention(transformers.LlamaForCausalLM(config))


def test_another_attention_than_sdpa_stays() -> None:
    model = load_model("tiny", attention="eager")
    assert "eager, not sdpa" in use_window_attention(model)
    assert not uses_window_attention(model) and model.config.vision_config._attn_implementation == "eager"


def test_the_check_passes_where_it_is_right_and_leaves_the_model_as_it_was(processor: Any) -> None:
    model = attach_loss(load_model("tiny")).train()
    batch = ChatCollator(processor)(window_samples())
    use_window_attention(model)
    assert 0 <= check_window_attention(model, batch) < 1e-5
    assert model.training and uses_window_attention(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_check_knows_the_arithmetic_of_a_forward_in_autocast(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As accelerate wraps a model: fp32 weights and bf16 products, whose roundings are no alarm."""
    import vlm_dft.vision_attention as ours

    model = attach_loss(load_model("tiny"))
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    use_window_attention(model)
    monkeypatch.setitem(ours.TOLERANCES, torch.float32, -1.0)
    assert check_window_attention(model, ChatCollator(processor)(window_samples())) < ours.TOLERANCES[torch.bfloat16]


def test_the_check_finds_attention_that_looks_beyond_its_window(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the row taken as one window, every picture would see the others."""
    import vlm_dft.vision_attention as ours

    model = load_model("tiny")
    batch = ChatCollator(processor)(window_samples())
    use_window_attention(model)
    monkeypatch.setattr(ours, "_plan", lambda bounds: ours._Plan([(int(bounds[-1]), 1)], None, None))
    with pytest.raises(ModelError, match="changes what Qwen2_5_VL"):
        check_window_attention(model, batch)


def test_the_check_finds_windows_that_do_not_arrive(processor: Any) -> None:
    model = load_model("tiny")
    batch = ChatCollator(processor)(window_samples())
    use_window_attention(model)
    first = model.model.visual.blocks[0].attn
    first.window_hook.remove()
    with pytest.raises(ModelError, match="reached 1 of the 2 attentions"):
        check_window_attention(model, batch)


def test_without_its_hook_it_is_stock_attention_and_not_a_wrong_one() -> None:
    """A copy of a model, or a family that stops giving windows by name, must not attend over the whole row."""
    model = load_model("tiny", dtype=torch.float64)
    expected = features_and_gradients(model, GRIDS)[0]
    use_window_attention(model)
    for block in model.model.visual.blocks:
        block.attn.window_hook.remove()
    assert torch.equal(features_and_gradients(model, GRIDS)[0], expected)


def test_it_holds_under_lora_on_the_tower_and_under_recomputing(drawn: list[Any], processor: Any) -> None:
    batch = ChatCollator(processor)(drawn[:3])
    losses, gradients = [], []
    for ours in (False, True):
        torch.manual_seed(0)
        model = attach_loss(load_model("tiny", dtype=torch.float64))
        if ours:
            use_window_attention(model)
            use_recompute(model, ["vision"])
        model.train()
        loss = model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()}, objective="dft")[
            "loss"
        ]
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    worst = max(
        ((gradients[0][n] - g).norm() / gradients[0][n].norm().clamp_min(1e-30)).item() for n, g in gradients[1].items()
    )
    assert worst < 1e-9  # parameters whose gradient is rounding alone are in it
    lora = add_lora(load_model("tiny"), 2)
    assert use_window_attention(lora) == "" and uses_window_attention(lora)


def test_transformers_knows_the_attention_by_its_name() -> None:
    assert WINDOWS in AttentionInterface().valid_keys() and "flash" not in WINDOWS
