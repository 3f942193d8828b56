"""The Trainer: the loss does not depend on how a step is split, parts freeze, a run resumes bit for bit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from vlm_dft.arguments import training_arguments_of
from vlm_dft.chat import Example
from vlm_dft.collators import ChatCollator
from vlm_dft.config import TrainConfig, resolve_config
from vlm_dft.errors import ModelError
from vlm_dft.loss_head import attach_loss
from vlm_dft.models import load_model
from vlm_dft.objectives import OBJECTIVES, token_loss
from vlm_dft.packing import PackedDataset, find_mrope, pack_batch
from vlm_dft.progress import read_metrics
from vlm_dft.segment_attention import SEGMENTS, check_packing, use_segment_attention
from vlm_dft.trainer import DFTTrainer
from vlm_dft.training import train_objective

torch.set_num_threads(1)
SETTINGS = {
    "recipe": "drawn",
    "batch_size": 8,
    "micro_batch": 4,
    "learning_rate": 1e-3,
    "max_grad_norm": 1e9,
    "adam_epsilon": 1e-6,
}


def config_of(**changes: Any) -> TrainConfig:
    return resolve_config(("test", {**SETTINGS, **changes}))


def weights_after(config: TrainConfig, objective: str, examples: list[Any], folder: Path) -> dict[str, torch.Tensor]:
    final = train_objective(config, objective, examples, folder)
    return dict(load_model(str(final)).state_dict())


def test_the_attached_loss_equals_the_reference_on_full_logits(processor: Any, drawn: list[Any]) -> None:
    batch = ChatCollator(processor)(drawn[:5])
    for objective in ("dft", "nll"):
        ours, plain = attach_loss(load_model("tiny")), load_model("tiny")
        out = ours(**batch, objective=objective)
        out["loss"].backward()
        logits = plain(**{k: v for k, v in batch.items() if k != "labels"}).logits
        expected = token_loss(logits, batch["labels"], OBJECTIVES[objective])
        expected.backward()
        assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
        theirs = dict(plain.named_parameters())
        for name, parameter in ours.named_parameters():
            assert torch.allclose(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-6), name  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", ["dft", "nll"])
def test_one_batch_of_eight_is_four_accumulated_batches_of_two(
    objective: str, drawn: list[Any], tmp_path: Path
) -> None:
    """With responses of unequal length; SGD, so that the update is the gradient."""
    lengths = {len(e.messages[-1]["content"]) for e in drawn[:8]}
    assert len(lengths) > 3
    ends = [
        weights_after(
            config_of(optim="sgd", lr_scheduler_type="constant", warmup=0, learning_rate=1.0, micro_batch=micro, seed=1),
            objective, drawn[:16], tmp_path / f"{objective}{micro}",
        )
        for micro in (8, 2)
    ]  # fmt: skip
    start = load_model("tiny").state_dict()
    moved = max((ends[0][k] - start[k]).abs().max().item() for k in start)
    apart = max((ends[0][k] - ends[1][k]).abs().max().item() for k in start)
    assert moved > 1e-4
    assert apart < 1e-3 * moved  # the stock Trainer's mean of means is off by 0.18 of the update


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_interrupted_and_resumed_training_is_the_uninterrupted_one_bit_for_bit(
    packing: bool, drawn: list[Any], tmp_path: Path
) -> None:
    config = config_of(epochs=2, save_steps=3, packing=packing)  # 10 steps over an epoch's boundary
    whole = weights_after(config, "dft", drawn, tmp_path / "whole")
    folder = tmp_path / "cut"
    train_objective(config, "dft", drawn, folder)
    shutil.rmtree(folder / "checkpoint-10")  # back to checkpoint-9, as after a kill in step 10
    (folder / ".incomplete" / "checkpoint-10").mkdir(parents=True)  # and in the middle of a save
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    resumed = weights_after(config, "dft", drawn, folder)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")]
    assert [r["step"] for r in rows[1]] == list(range(1, 11))
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]
    assert not (folder / ".incomplete").exists()


def test_a_finished_objective_is_not_trained_again(drawn: list[Any], tmp_path: Path) -> None:
    config = config_of(max_steps=1)
    final = train_objective(config, "dft", drawn, tmp_path)
    before = (final / "model.safetensors").stat().st_mtime_ns
    assert train_objective(config, "dft", drawn, tmp_path) == final
    assert (final / "model.safetensors").stat().st_mtime_ns == before


def test_frozen_parts_stay_and_trained_parts_move(drawn: list[Any], tmp_path: Path) -> None:
    end = weights_after(config_of(max_steps=2, train_parts="language,head", warmup=0), "nll", drawn, tmp_path)
    start = load_model("tiny").state_dict()
    moved = {k for k in start if not torch.equal(start[k], end[k])}
    assert moved and not [k for k in moved if ".visual." in k]
    assert [k for k in moved if "language_model.layers" in k]


def test_lora_trains_the_language_model_alone_and_loads_again(drawn: list[Any], tmp_path: Path) -> None:
    final = train_objective(config_of(max_steps=2, lora=4, warmup=0), "nll", drawn, tmp_path)
    adapter = json.loads((final / "adapter_config.json").read_text())
    assert adapter["r"] == 4 and adapter["lora_alpha"] == 8
    merged, start = load_model(str(final)).state_dict(), load_model("tiny").state_dict()
    moved = {k for k in start if not torch.equal(start[k], merged[k])}
    assert moved and all("language_model.layers" in k for k in moved)


def test_lora_starts_alike_for_every_objective_and_keeps_its_picture_size(drawn: list[Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from vlm_dft.models import load_processor

    config = config_of(max_steps=1, lora=4, max_pixels=6272)  # one step at learning rate zero: the warm-up's first
    ends = [train_objective(config, objective, drawn[:8], tmp_path / objective) for objective in ("dft", "nll")]
    first, second = (load_file(end / "adapter_model.safetensors") for end in ends)
    assert all(torch.equal(first[k], second[k]) for k in first if "lora_A" in k)
    assert load_processor(str(ends[0])).image_processor.size["longest_edge"] == 6272


def test_a_choice_of_parts_that_leaves_nothing_to_train_is_refused(drawn: list[Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="leaves nothing to train in this model. Its parts: vision, merger, language"):
        train_objective(config_of(train_parts="head"), "dft", drawn, tmp_path)


def test_a_tower_is_not_trained_on_rows_of_text_alone(tmp_path: Path) -> None:
    rows = [
        Example([{"role": "user", "content": "Well?"}, {"role": "assistant", "content": f"{k} bars"}]) for k in range(8)
    ]
    with pytest.raises(
        ModelError, match="vision and merger would be trained, but no row has a picture: nothing could move"
    ):
        train_objective(config_of(train_parts="vision,merger,language", max_steps=1), "dft", rows, tmp_path)


def test_half_precision_without_a_gpu_is_refused(drawn: list[Any], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ModelError, match="precision = bf16 needs a GPU"):
        train_objective(config_of(precision="bf16"), "dft", drawn, tmp_path)


def test_metrics_carry_nll_and_mean_p_beside_the_loss(processor: Any, drawn: list[Any], tmp_path: Path) -> None:
    config = config_of(max_steps=1, micro_batch=8, seed=3)
    train_objective(config, "dft", drawn[:8], tmp_path)
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    log_p = attach_loss(load_model("tiny"))(**ChatCollator(processor)(drawn[:8]), objective="dft")["log_p"].double()
    assert row["response_tokens"] == len(log_p)
    assert row["nll"] == pytest.approx(-log_p.mean().item(), rel=1e-4)
    assert row["mean_p"] == pytest.approx(log_p.exp().mean().item(), rel=1e-4)
    assert row["loss"] == pytest.approx(-(log_p.exp() * log_p).mean().item(), rel=1e-3)
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_checkpoint_holds_model_and_processor_for_plain_transformers(drawn: list[Any], tmp_path: Path) -> None:
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    final = train_objective(config_of(max_steps=1), "dft", drawn, tmp_path)
    _, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoProcessor.from_pretrained(final).chat_template


def test_a_number_of_processes_that_does_not_run_is_refused(drawn: list[Any], tmp_path: Path) -> None:
    config = replace(config_of(max_steps=1), processes=2)
    with pytest.raises(ModelError, match="processes = 2, but 1 are running"):
        train_objective(config, "dft", drawn, tmp_path)


def test_the_last_partial_step_is_normalised_by_its_own_tokens(
    drawn: list[Any], tmp_path: Path, processor: Any
) -> None:
    config = config_of(micro_batch=2, batch_size=8, optim="sgd", learning_rate=1e-9)  # the weights do not move
    arguments = training_arguments_of(config, tmp_path, 11)
    trainer = DFTTrainer(
        model=attach_loss(load_model("tiny")), args=arguments, train_dataset=drawn[:11], data_collator=ChatCollator(processor),
        objective="nll",
    )  # fmt: skip
    trainer.train()
    rows = [r for r in trainer.state.log_history if "loss" in r]
    assert [r["loss"] for r in rows] == pytest.approx([r["nll"] for r in rows], rel=1e-4)
    assert len(rows) == 2 and rows[0]["response_tokens"] > rows[1]["response_tokens"]


# --- packed rows ------------------------------------------------------------------------------------------------------

EVERY_PART = "vision,merger,language,head"
STEADY = {"lr_scheduler_type": "constant", "warmup": 0, "seed": 1, "train_parts": EVERY_PART}
SGD = {**STEADY, "optim": "sgd", "learning_rate": 0.05}
ADAMW = {**STEADY, "optim": "adamw_torch", "learning_rate": 2e-4}


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Size of the difference of all weights over the size of what training moved."""
    start = load_model("tiny").state_dict()
    difference = sum(((found[k] - expected[k]).double() ** 2).sum() for k in start)
    moved = sum(((expected[k] - start[k]).double() ** 2).sum() for k in start)
    return float((difference / moved) ** 0.5)


def turns(*answers: tuple[str, dict[str, Any]]) -> Example:
    """A conversation of text whose answers set fields of their own."""
    messages: list[dict[str, Any]] = []
    for answer, fields in answers:
        messages += [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": answer, **fields}]
    return Example(messages)


OWN = [
    turns(("a red bar", {"weight": 0.25}), ("two of them", {"objective": "nll"}), ("no", {})),
    turns(("it is larger than the others", {"objective": "dft", "weight": 3.0})),
    turns(("grey", {}), ("there are 4", {"train": False}), ("yes, it is", {"weight": 0.5, "objective": "nll"})),
]


@pytest.mark.parametrize("objective", ["dft", "nll"])
@pytest.mark.parametrize("optimiser", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_packed_training_ends_in_the_weights_of_padded_training(
    optimiser: dict[str, Any], objective: str, drawn: list[Any], tmp_path: Path
) -> None:
    """Four steps in fp32, all parts trained. Measured apart: at most 7e-5, and padded 4 against padded 2 x 2 6e-5."""
    ends, rows = {}, {}
    for packing, micro in ((False, 4), (True, 4), (True, 2)):
        folder = tmp_path / f"{packing}{micro}"
        config = config_of(collator={"packing": packing}, micro_batch=micro, **optimiser)
        ends[packing, micro] = weights_after(config, objective, drawn[:32], folder)
        rows[packing, micro] = read_metrics(folder / "metrics.jsonl")
    padded = rows.pop((False, 4))
    assert len(padded) == 4 and padded[-1]["loss"] != padded[0]["loss"]
    for key, packed in rows.items():
        assert apart(ends[key], ends[False, 4]) < 3e-4
        assert [r["response_tokens"] for r in packed] == [r["response_tokens"] for r in padded]
        for name, bound in (("loss", 3e-5), ("nll", 3e-5), ("mean_p", 2e-6), ("grad_norm", 1e-4)):  # measured: a fourth
            assert [r[name] for r in packed] == pytest.approx([r[name] for r in padded], rel=bound), name


def test_lora_is_trained_on_packed_rows_as_on_padded_ones(drawn: list[Any], tmp_path: Path) -> None:
    ends = []
    for packing in (False, True):
        config = config_of(packing=packing, lora=4, **{k: v for k, v in SGD.items() if k != "train_parts"})
        ends.append(weights_after(config, "nll", drawn[:16], tmp_path / str(packing)))
    assert apart(ends[1], ends[0]) < 1e-3


def test_turns_with_a_weight_and_an_objective_of_their_own_count_the_same_in_a_packed_row(
    processor: Any, drawn: list[Any]
) -> None:
    rows = [OWN[0], drawn[0], OWN[1], drawn[1], OWN[2]]
    padded, packed = (ChatCollator(processor, packing=packing)(rows) for packing in (False, True))
    kept = padded["attention_mask"].bool()
    for key in ("loss_weights", "objective_ids"):
        assert torch.equal(packed[key][0], padded[key][kept])
    outs, gradients = [], []
    for batch, model in ((padded, load_model("tiny")), (packed, use_segment_attention(load_model("tiny")))):
        outs.append(attach_loss(model)(**batch, objective="dft"))
        outs[-1]["loss"].backward()
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert outs[1]["loss"].item() == pytest.approx(outs[0]["loss"].item(), rel=1e-6)
    assert torch.allclose(outs[1]["log_p"], outs[0]["log_p"], rtol=1e-4, atol=1e-5)
    difference = sum(((gradients[1][k] - g).double() ** 2).sum() for k, g in gradients[0].items())
    assert (difference / sum((g.double() ** 2).sum() for g in gradients[0].values())) ** 0.5 < 1e-5
    labels, weights, own = (packed[key][0, 1:] for key in ("labels", "loss_weights", "objective_ids"))
    names = [*sorted(OBJECTIVES), "dft"]
    logits = load_model("tiny").requires_grad_(False)(**{k: v for k, v in packed.items() if k in ("input_ids", "position_ids", "use_cache",
        "pixel_values", "image_grid_thw", "mm_token_type_ids")}).logits[0, :-1].double()  # fmt: skip
    log_p = logits.log_softmax(-1).gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    total = 0.0
    for k in (labels != -100).nonzero().squeeze(1).tolist():  # token by token
        factor = log_p[k].exp() if names[own[k]] == "dft" else 1.0
        total -= float(weights[k] * factor * log_p[k])
    assert outs[1]["loss"].item() == pytest.approx(total / int((labels != -100).sum()), rel=1e-5)


def test_training_on_such_turns_is_the_same_packed_and_padded(drawn: list[Any], tmp_path: Path) -> None:
    rows = [*OWN, *drawn[:5]] * 2
    ends = [
        weights_after(config_of(packing=packing, **SGD), "dft", rows, tmp_path / str(packing))
        for packing in (False, True)
    ]
    assert apart(ends[1], ends[0]) < 3e-4


def causal_without_a_mask(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """What a fast kernel of one's own often is: causal, deaf to masks and segments; right for rows padded on the right."""
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=getattr(module, "is_causal", False), scale=kwargs.get("scaling"), enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def test_an_attention_that_ignores_segments_is_refused_before_the_first_step(drawn: list[Any], tmp_path: Path) -> None:
    """transformers makes no mask for an attention that is registered without one: padded rows are right, packed ones leak."""
    AttentionInterface.register("causal_without_a_mask", causal_without_a_mask)
    words = {"attention": "causal_without_a_mask", "max_steps": 2}
    padded = weights_after(config_of(**words, **SGD), "nll", drawn[:16], tmp_path / "padded")
    stock = weights_after(config_of(max_steps=2, **SGD), "nll", drawn[:16], tmp_path / "stock")
    assert apart(padded, stock) < 3e-4
    with pytest.raises(ModelError, match="Packing leaks in Qwen2_5_VL.* with causal_without_a_mask attention"):
        train_objective(config_of(packing=True, **words, **SGD), "nll", drawn[:16], tmp_path / "packed")
    assert read_metrics(tmp_path / "packed" / "metrics.jsonl") == []
    assert not list((tmp_path / "packed").glob("checkpoint-*"))


def test_a_model_with_sliding_windows_is_refused_before_its_first_step(drawn: list[Any], tmp_path: Path) -> None:
    from vlm_dft.locate import resolve_model

    folder = tmp_path / "sliding"
    shutil.copytree(resolve_model("tiny"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].update(
        use_sliding_window=True,
        sliding_window=16,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has sliding_attention; .* Train it without packing"):
        train_objective(config_of(model=str(folder), packing=True), "nll", drawn[:8], tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_self_test_does_not_fail_on_the_runs_own_limit(processor: Any, drawn: list[Any], tmp_path: Path) -> None:
    """Its samples have 43 and 51 tokens here; with min_pixels of a real run, hundreds."""
    model = use_segment_attention(load_model("tiny"))
    for words in ({}, {"too_long": "drop"}, {"too_long": "shorten_answer"}):
        collator = ChatCollator(processor, packing=True, max_length=40, **words)  # type: ignore[arg-type]
        assert check_packing(model, collator)["tokens"] == [43, 51]
        assert collator.max_length == 40 and not collator.counts


def test_a_pass_over_packs_of_a_token_budget_is_the_pass_over_padded_rows(
    drawn: list[Any], tmp_path: Path, processor: Any
) -> None:
    """One optimiser step over all rows, so that SGD's update is the gradient of the pass, whatever the order."""
    rows, collator = [*drawn[:19], *[turns((f"{k} bars", {})) for k in range(5)]], ChatCollator(processor, packing=True)
    packs = PackedDataset(rows, [collator.measure(row).tokens for row in rows], 256, seed=0)
    assert len(packs) > 3 and len({len(pack) for pack in packs}) > 1  # so that a mean of means would be off
    ends, logs = {}, {}
    for name, data, collate, micro in (
        ("padded", rows, ChatCollator(processor), 4),
        ("packed", packs, collator, 1),
        ("packs in twos", packs, collator, 2),
    ):
        steps = -(-len(data) // micro)
        config = config_of(batch_size=micro * steps, micro_batch=micro, epochs=1, **SGD)
        model = attach_loss(load_model("tiny"))
        if name != "padded":
            use_segment_attention(model)
        arguments = training_arguments_of(config, tmp_path / name, len(data))
        trainer = DFTTrainer(model=model, args=arguments, train_dataset=data, data_collator=collate, objective="dft")
        trainer.train()
        ends[name] = dict(model.state_dict())
        (logs[name],) = [r for r in trainer.state.log_history if "loss" in r]
    for name in ("packed", "packs in twos"):
        assert apart(ends[name], ends["padded"]) < 1e-4
        for key in ("loss", "nll", "mean_p", "response_tokens"):
            assert logs[name][key] == pytest.approx(logs["padded"][key], rel=1e-5), key


def test_steps_of_packs_are_normalised_by_their_own_tokens(drawn: list[Any], tmp_path: Path, processor: Any) -> None:
    """Two packs a step and an odd one at the end, over two passes: every row is trained in each, steps are as planned."""
    collator = ChatCollator(processor, packing=True)
    packs = PackedDataset(drawn[:20], [collator.measure(row).tokens for row in drawn[:20]], 256)
    assert len(packs) % 2 == 1
    config = config_of(batch_size=2, micro_batch=1, epochs=2, optim="sgd", learning_rate=1e-9)
    model = use_segment_attention(attach_loss(load_model("tiny")))
    trainer = DFTTrainer(
        model=model, args=training_arguments_of(config, tmp_path, len(packs)), train_dataset=packs,
        data_collator=collator, objective="nll",
    )  # fmt: skip
    trainer.train()
    logs = [r for r in trainer.state.log_history if "loss" in r]
    assert len(logs) == config.steps(len(packs)) == 2 * (len(packs) // 2 + 1)
    assert [r["loss"] for r in logs] == pytest.approx([r["nll"] for r in logs], rel=1e-5)
    targets = int((ChatCollator(processor)(drawn[:20])["labels"] != -100).sum())
    assert sum(r["response_tokens"] for r in logs) == 2 * targets


def test_a_packed_row_is_trained_the_same_by_any_attention_that_isolates(processor: Any, drawn: list[Any]) -> None:
    """Through the attached loss, as the Trainer calls it."""
    packed = pack_batch(ChatCollator(processor)(drawn[:6]), mrope=find_mrope(processor))
    losses = {}
    for attention in ("sdpa", "eager", SEGMENTS):
        model = attach_loss(load_model("tiny"))
        model.set_attn_implementation({"text_config": attention})
        losses[attention] = model(**packed, objective="dft", num_items=100)["loss"].item()
    assert list(losses.values()) == pytest.approx([losses["sdpa"]] * 3, rel=1e-6)
