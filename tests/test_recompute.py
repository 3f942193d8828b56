"""Recomputing a part's activations: the same loss and gradients, in the parts that were asked for, with less kept in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import config_of

from vlm_dft import ChatCollator
from vlm_dft.config import recomputed_parts, resolve_config
from vlm_dft.errors import ConfigError, ModelError
from vlm_dft.loss_head import attach_loss
from vlm_dft.models import add_lora, load_model
from vlm_dft.recompute import use_recompute
from vlm_dft.segment_attention import use_segment_attention
from vlm_dft.training import prepare_model, train_objective

torch.set_num_threads(1)


def kept_bytes(model: Any, batch: dict[str, Any]) -> tuple[int, float, dict[str, torch.Tensor]]:
    """(bytes of activations that the forward pass keeps for the backward pass, loss, gradients)."""
    kept: dict[int, int] = {}
    own = {p.data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch, objective="dft")["loss"]
    total = sum(kept.values())
    loss.backward()
    return total, loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("lora", [0, 4], ids=["full", "lora"])
def test_loss_and_gradients_are_the_same_and_less_is_kept(
    lora: int, packing: bool, processor: Any, drawn: list[Any]
) -> None:
    batch = ChatCollator(processor, packing=packing)(drawn[:4])
    found = {}
    for parts in ((), ("vision",), ("language",), ("vision", "language")):
        torch.manual_seed(0)  # LoRA draws its start
        model = attach_loss(load_model("tiny"))
        if packing:
            use_segment_attention(model)
        model = add_lora(model, lora) if lora else model
        layers = use_recompute(model, parts)
        assert layers == {part: {"vision": 2, "language": 3}[part] for part in parts}
        found[parts] = kept_bytes(model.train(), batch)
    most, loss, gradients = found[()]
    for parts, (kept, other, own) in found.items():
        assert other == loss and set(own) == set(gradients), parts
        assert all(torch.equal(own[name], gradients[name]) for name in gradients), parts
        if parts != ("vision",) or not lora:  # without gradients a tower keeps nothing anyway
            assert kept < most or parts == ()
    assert found["vision", "language"][0] < 0.6 * most


def test_what_is_recomputed_follows_what_is_trained_on_a_gpu_and_is_nothing_on_a_cpu() -> None:
    assert recomputed_parts(None, ["language", "head"], "cuda") == ["language"]
    assert recomputed_parts(None, ["language", "merger"], "cuda") == ["language", "vision"]
    assert recomputed_parts(None, ["vision"], "cpu") == []
    assert recomputed_parts([], ["vision", "language"], "cuda") == []  # --recompute none
    assert recomputed_parts(["vision"], ["language"], "cpu") == ["vision"]


def test_the_setting_is_read_and_the_flags_of_others_are_refused() -> None:
    assert resolve_config(("test", {"recompute": "language,vision"})).parts["recompute"] == ["language", "vision"]
    assert resolve_config(("test", {"recompute": "none"})).parts["recompute"] == []
    with pytest.raises(ConfigError, match="recompute: expected some of vision, language, found 'merger'"):
        resolve_config(("test", {"recompute": "merger"}))
    for name in ("activation_checkpointing", "gradient_checkpointing", "gradient_checkpointing_kwargs"):
        with pytest.raises(ConfigError, match=f"{name} is set by recompute"):
            resolve_config(("test", {name: True}))


def test_a_part_without_such_layers_is_refused() -> None:
    model = load_model("tiny")
    model.model.visual.blocks = torch.nn.ModuleList()
    with pytest.raises(ModelError, match="the vision of Qwen2_5_VL"):
        use_recompute(model, ["vision"])


def test_the_start_line_says_what_is_recomputed() -> None:
    _, _, line = prepare_model(config_of(recompute="language", train_parts="vision,language,head"))
    assert "recomputed in the backward pass: language" in line
    _, _, line = prepare_model(config_of())
    assert "recomputed" not in line


def test_a_run_that_recomputes_ends_in_the_same_weights(drawn: list[Any], tmp_path: Path) -> None:
    """Bit for bit, through the whole Trainer."""
    ends = []
    for parts in ("none", "vision,language"):
        config = config_of(recompute=parts, train_parts="vision,merger,language,head", max_steps=2)
        final = train_objective(config, "dft", drawn[:16], tmp_path / parts)
        ends.append(load_model(str(final)).state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
