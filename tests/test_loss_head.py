"""The loss in a model's head: adapters, anchors, overrides, soft caps, and gradients formed where they belong."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from vlm_dft.collators import ChatCollator
from vlm_dft.errors import ModelError
from vlm_dft.kinds import KINDS
from vlm_dft.loss_head import Compatibility, Kl, LossMixin, attach_loss, sample_indices
from vlm_dft.models import load_model
from vlm_dft.objectives import OBJECTIVES

torch.set_num_threads(1)


@pytest.fixture
def batch(processor: Any, drawn: list[Any]) -> dict[str, Any]:
    return ChatCollator(processor)(drawn[:4])


def logits_and_labels(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of full logits [n, V] in float64 and their targets [n], by the model's own forward."""
    keys = ("labels", "token_kinds", "source_ids", "loss_weights", "objective_ids")
    logits = model(**{k: v for k, v in batch.items() if k not in keys}).logits
    rows = batch["labels"][:, 1:] != -100
    return logits[:, :-1][rows].double(), batch["labels"][:, 1:][rows]


def with_random_lora(model: Any, targets: Any, seed: int = 0) -> Any:
    """A peft model whose adapters do something: B starts at zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return wrapped.eval()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    difference = sum(((found[k] - expected[k]).double() ** 2).sum() for k in expected)
    return float((difference / sum((g.double() ** 2).sum() for g in expected.values())) ** 0.5)


@pytest.mark.parametrize("first", ["loss", "adapter"], ids=["loss then adapter", "adapter then loss"])
def test_an_adapter_on_the_head_is_trained_as_plain_autograd_would(first: str, batch: dict[str, Any]) -> None:
    model = load_model("tiny")
    if first == "loss":
        ours = with_random_lora(attach_loss(model), ["lm_head", "q_proj"])
    else:
        ours = with_random_lora(model, ["lm_head", "q_proj"])
        attach_loss(ours.base_model.model)
    plain = with_random_lora(load_model("tiny"), ["lm_head", "q_proj"])
    out = ours(**batch, objective="dft")
    out["loss"].backward()
    logits, targets = logits_and_labels(plain, batch)
    log_p = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    expected = -(log_p.detach().exp() * log_p).mean()
    expected.backward()
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert any("lm_head.lora_A" in name for name in gradients(ours))
    assert not any("lm_head.base_layer" in name for name in gradients(ours))
    assert apart(gradients(ours), gradients(plain)) < 1e-5


def test_the_model_is_what_it_was_without_an_objective(batch: dict[str, Any]) -> None:
    ours, plain = with_random_lora(attach_loss(load_model("tiny")), ["lm_head"]), None
    with torch.no_grad():
        ours(**batch, objective="dft")
        plain = with_random_lora(load_model("tiny"), ["lm_head"])
        assert torch.equal(ours(**batch).logits, plain(**batch).logits)
        assert torch.equal(ours(**batch).loss, plain(**batch).loss)


def test_a_head_that_is_no_plain_linear_is_refused(batch: dict[str, Any]) -> None:
    model = load_model("tiny")
    model.set_output_embeddings(nn.Sequential(model.get_output_embeddings()))
    with pytest.raises(ModelError, match="Expected the output head to be a plain nn.Linear, .* found Sequential"):
        attach_loss(model)
    from peft import LoraConfig, get_peft_model

    dora = get_peft_model(attach_loss(load_model("tiny")), LoraConfig(r=2, target_modules=["lm_head"], use_dora=True))
    with pytest.raises(ModelError, match="with a variant such as DoRA.* Expected one plain LoRA adapter"):
        dora(**batch, objective="dft")


def test_a_model_that_scales_its_logits_is_refused_and_one_that_caps_them_is_followed(batch: dict[str, Any]) -> None:
    scaled = load_model("tiny")
    scaled.config.get_text_config().logit_scale = 0.25
    with pytest.raises(ModelError, match=r"scales its logits \(logit_scale = 0.25\)"):
        attach_loss(scaled)
    capped = load_model("tiny")
    capped.config.get_text_config().final_logit_softcapping = 5.0
    found = attach_loss(capped)(**batch, objective="nll")["log_p"].double()
    logits, targets = logits_and_labels(load_model("tiny"), batch)
    expected = (5 * (logits / 5).tanh()).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_anchor_under_lora_is_the_model_with_its_adapters_off_on_the_same_pictures(
    direction: Any, batch: dict[str, Any]
) -> None:
    ours = with_random_lora(attach_loss(load_model("tiny")), ["lm_head", "q_proj", "v_proj"])
    out = ours(**batch, objective="dft", kl=Kl(0.3, direction))
    out["loss"].backward()
    plain, start = with_random_lora(load_model("tiny"), ["lm_head", "q_proj", "v_proj"]), load_model("tiny")
    logits, targets = logits_and_labels(plain, batch)
    with torch.no_grad():
        log_q = logits_and_labels(start, batch)[0].log_softmax(-1)
    all_log_p = logits.log_softmax(-1)
    log_p = all_log_p.gather(1, targets[:, None]).squeeze(1)
    forward = (log_q.exp() * (log_q - all_log_p)).sum(1)
    kl = forward if direction == "forward" else (all_log_p.exp() * (all_log_p - log_q)).sum(1)
    expected = -(log_p.detach().exp() * log_p).mean() + 0.3 * kl.mean()
    expected.backward()
    assert kl.mean().item() > 1e-3  # the adapters do something
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(out["kl"].double(), kl.detach(), atol=1e-5)
    assert apart(gradients(ours), gradients(plain)) < 1e-5
    blank = {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}
    assert not torch.allclose(ours(**blank, objective="dft", kl=Kl(0.3, direction))["kl"], out["kl"], atol=1e-4)


def test_the_adapters_are_on_again_after_the_anchor_even_if_it_fails(batch: dict[str, Any]) -> None:
    ours = with_random_lora(attach_loss(load_model("tiny")), ["q_proj"])
    before = ours(**batch, objective="nll")["log_p"]
    with pytest.raises(RuntimeError):
        ours(**{**batch, "input_ids": batch["input_ids"] + 0.5}, objective="nll", kl=Kl(0.3, "forward"))
    ours(**batch, objective="nll", kl=Kl(0.3, "forward"))
    assert torch.equal(ours(**batch, objective="nll")["log_p"], before)
    assert all(p.requires_grad == ("lora_" in name) for name, p in ours.named_parameters())


def test_an_anchor_without_a_reference_or_direction_is_refused(batch: dict[str, Any]) -> None:
    model = attach_loss(load_model("tiny"))
    with pytest.raises(ModelError, match="no adapters to switch off. Train with LoRA, or give"):
        model(**batch, objective="dft", kl=Kl(0.1, "forward"))
    with pytest.raises(ValueError, match="a direction, found 0.1 and 'sideways'. Directions: 'forward', KL"):
        model(**batch, objective="dft", kl=Kl(0.1, "sideways"))  # type: ignore[arg-type]


def test_the_sample_factor_of_cadft_is_the_papers(batch: dict[str, Any]) -> None:
    """exp(-beta max(0, z)) on every token of a sample, z of its mean NLL."""
    model = attach_loss(load_model("tiny"))
    logits, targets = logits_and_labels(load_model("tiny"), batch)
    log_p = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    owner = [k for k in range(4) for _ in range(int((batch["labels"][k, 1:] != -100).sum()))]
    nll = [-(log_p[[o == k for o in owner]]).mean().item() for k in range(4)]
    mean, deviation = sorted(nll)[1], 0.02
    factors = torch.tensor(
        [2.718281828459045 ** (-0.7 * max(0.0, (x - mean) / deviation)) for x in nll], dtype=torch.double
    )
    assert 0 < factors.min() < 0.9 and factors.max() == 1
    expected = -(factors[owner] * log_p.exp() * log_p).sum() / len(owner)
    found = model(**batch, objective="dft", compatibility=Compatibility(0.7, mean, deviation))
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    none = model(**batch, objective="dft", compatibility=Compatibility(0.7, mean, 0.0))
    assert none["loss"].item() == pytest.approx(model(**batch, objective="dft")["loss"].item(), rel=1e-6)


def test_samples_are_told_apart_in_padded_and_packed_rows(processor: Any, drawn: list[Any]) -> None:
    padded, packed = (ChatCollator(processor, packing=packing)(drawn[:3]) for packing in (False, True))
    kept = padded["attention_mask"].bool()
    assert torch.equal(sample_indices(padded["labels"], padded)[kept], sample_indices(packed["labels"], packed)[0])
    assert sample_indices(packed["labels"], packed).unique().tolist() == [0, 1, 2]


def test_kinds_of_full_weight_count_as_in_sft_and_the_others_as_in_dft(processor: Any, drawn: list[Any]) -> None:
    batch = ChatCollator(processor, tag_sources=["drawn"])(drawn[:4])
    kinds = batch.pop("token_kinds")
    batch.pop("source_ids")
    model = attach_loss(load_model("tiny"))
    found = model(**batch, objective="dft", full_weight=(kinds & (KINDS["end"] | KINDS["digit"])) != 0)
    logits, targets = logits_and_labels(load_model("tiny"), batch)
    log_p = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    texts = [processor.tokenizer.decode([token]) for token in targets.tolist()]
    full = torch.tensor([any(c.isdigit() for c in text) or text == "<|im_end|>" for text in texts])
    assert 0 < full.sum() < len(full)
    expected = -(torch.where(full, 1.0, log_p.exp()) * log_p).mean()
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(found["weight"][full], torch.ones(int(full.sum())))


def test_a_gradient_formed_in_place_is_autograds(batch: dict[str, Any]) -> None:
    """Over two accumulated micro-batches and a second step, whose buffer is the first one's; tied to the embeddings too."""
    for tied in (False, True):
        found = {}
        for in_place in (False, True):
            model = attach_loss(load_model("tiny"))
            assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
            if not tied:
                model.get_output_embeddings().weight = nn.Parameter(
                    model.get_input_embeddings().weight.detach().clone()
                )
            head = model.get_output_embeddings()
            assert isinstance(head, LossMixin)
            head.in_place = in_place
            steps = []
            for _ in range(2):
                model.zero_grad(set_to_none=True)
                for objective in ("dft", "nll"):
                    model(**batch, objective=objective)["loss"].backward()
                steps.append(gradients(model))
            found[in_place] = steps
        assert apart(found[True][0], found[False][0]) < 1e-6
        assert apart(found[True][1], found[False][0]) < 1e-6


def test_an_evaluation_leaves_no_trace_in_the_gradient(batch: dict[str, Any]) -> None:
    model = attach_loss(load_model("tiny"))
    model.get_output_embeddings().in_place = True
    with torch.no_grad():
        model(**batch, objective="dft")
    assert model.get_output_embeddings().weight.grad is None


def test_an_objective_of_ones_own_is_a_function(batch: dict[str, Any]) -> None:
    model = attach_loss(load_model("tiny"))
    half = model(**batch, objective=lambda stats: 0.5 * stats.p)
    whole = model(**batch, objective="dft")
    assert half["loss"].item() == pytest.approx(whole["loss"].item() / 2, rel=1e-6)
    assert set(OBJECTIVES) == {
        "nll", "dft", "power", "floor", "threshold", "eaft", "deft", "chord", "focal", "mix"
    }  # fmt: skip


def test_a_model_that_does_more_to_its_logits_is_refused_before_the_first_step(
    drawn: list[Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that scales its logits somewhere else than in its config would be trained on another loss in silence."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from vlm_dft.config import resolve_config
    from vlm_dft.progress import read_metrics
    from vlm_dft.training import train_objective

    config = resolve_config(("test", {"recipe": "drawn", "batch_size": 4, "micro_batch": 4, "max_steps": 1}))
    forward = Qwen2_5_VLForConditionalGeneration.forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    scaled.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "forward", scaled)
    with pytest.raises(
        ModelError, match=r"The attached loss is not that of Qwen2_5_VL.* differs by .* Train it in a stock Tr"
    ):
        train_objective(config, "dft", drawn[:4], tmp_path)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    monkeypatch.undo()
    train_objective(config, "dft", drawn[:4], tmp_path)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_the_loss_is_attached_through_pefts_wrapper_too(processor: Any, drawn: list[Any]) -> None:
    batch = ChatCollator(processor, tag_sources=["drawn"])(drawn[:4])  # its tags are not for the model
    found = attach_loss(with_random_lora(load_model("tiny"), ["q_proj"]))(**batch, objective="dft")
    inside = with_random_lora(load_model("tiny"), ["q_proj"])
    attach_loss(inside.get_base_model())
    assert torch.equal(found["log_p"], inside(**batch, objective="dft")["log_p"])


def test_a_reference_that_is_trained_itself_is_refused(batch: dict[str, Any]) -> None:
    """With more than adapters trained, the model with its adapters off is no longer the one that training began with."""
    ours = with_random_lora(attach_loss(load_model("tiny")), ["q_proj"])
    next(p for name, p in ours.named_parameters() if "merger" in name).requires_grad_(True)
    with pytest.raises(
        ModelError, match=r"not the one that training began with: .*merger.* and 0 more are trained too"
    ):
        ours(**batch, objective="dft", kl=Kl(0.1, "forward"))
