"""What the Trainer adds to the objective and logs of it: against formulas by hand, other decompositions, and itself resumed."""

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_dft.arguments import training_arguments_of
from vlm_dft.chat import Example
from vlm_dft.collators import ChatCollator
from vlm_dft.config import TrainConfig, resolve_config
from vlm_dft.errors import ModelError
from vlm_dft.loss_head import attach_loss
from vlm_dft.models import load_model
from vlm_dft.progress import read_metrics
from vlm_dft.trainer import DFTTrainer
from vlm_dft.training import train_objective

torch.set_num_threads(1)
STEADY = {
    "recipe": "drawn", "batch_size": 8, "micro_batch": 4, "max_grad_norm": 1e9, "lr_scheduler_type": "constant",
    "warmup": 0, "optim": "sgd", "learning_rate": 0.05, "logging_steps": 1,
}  # fmt: skip


def config_of(**changes: Any) -> TrainConfig:
    return resolve_config(("test", {**STEADY, **changes}))


def trained(config: TrainConfig, objective: str, examples: list[Any], folder: Path) -> tuple[dict[str, Any], list[Any]]:
    final = train_objective(config, objective, examples, folder)
    return dict(load_model(str(final)).state_dict()), read_metrics(folder / "metrics.jsonl")


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Size of the difference of all weights over the size of what training moved."""
    start = load_model("tiny").state_dict()
    difference = sum(((found[k] - expected[k]).double() ** 2).sum() for k in start)
    moved = sum(((expected[k] - start[k]).double() ** 2).sum() for k in start)
    return float((difference / moved) ** 0.5)


def seen_by_hand(processor: Any, rows: list[Any]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """log p and entropy [n] of the response tokens in float64 from full logits, and each token's text."""
    batch = ChatCollator(processor)(rows)
    logits = load_model("tiny")(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1].double()
    kept = batch["labels"][:, 1:] != -100
    log_p = logits[kept].log_softmax(-1)
    targets = batch["labels"][:, 1:][kept]
    own = log_p.gather(1, targets[:, None]).squeeze(1)
    return own, -(log_p.exp() * log_p).sum(1), [processor.tokenizer.decode([t]) for t in targets.tolist()]


def test_every_logged_number_is_what_its_formula_says(processor: Any, drawn: list[Any], tmp_path: Path) -> None:
    _, (row,) = trained(config_of(max_steps=1), "floor(minimum=0.3)", drawn[:8], tmp_path)
    log_p, entropy, texts = seen_by_hand(processor, drawn[:8])
    p = log_p.exp()
    w = p.clamp(min=0.3)
    expected = {
        "response_tokens": len(p), "nll": -log_p.mean(), "mean_p": p.mean(), "mean_error": 1 - p.mean(),
        "mean_weight": w.mean(), "share_p_below_0.1": (p < 0.1).double().mean(), "entropy": entropy.mean(),
        "share_p_below_0.01": (p < 0.01).double().mean(), "share_p_above_0.9": (p > 0.9).double().mean(),
        "effective_sample_size": w.sum() ** 2 / (len(w) * (w**2).sum()), "loss": (-w * log_p).mean(),
        "gradient_mass_below_0.1": (w * (1 - p))[p < 0.1].sum() / (w * (1 - p)).sum(),
        "share_low_p_low_entropy": ((p < 0.1) & (entropy < 0.5)).double().mean(), "supervised_media_tokens": 0,
        "clip_rate": 0.0,
    }  # fmt: skip
    for name, value in expected.items():
        assert row[name] == pytest.approx(float(value), rel=1e-4, abs=1e-9), name
    assert row["median_p"] == pytest.approx(p.median().item(), abs=0.005)
    edges = [0, 1e-4, 1e-3, 0.01, *(k / 10 for k in range(1, 11))]
    bins = {k: v for k, v in row.items() if k.startswith("p_histogram/")}
    assert list(bins)[:5] == [
        f"p_histogram/{b}" for b in ("0-0.0001", "0.0001-0.001", "0.001-0.01", "0.01-0.1", "0.1-0.2")
    ]
    for low, high, share in zip(edges, edges[1:], bins.values(), strict=False):
        assert share == pytest.approx(((p >= low) & ((p < high) | (high == 1))).double().mean().item(), abs=1e-9)
    assert sum(bins.values()) == pytest.approx(1)
    digits = torch.tensor([any(c.isdigit() for c in text) for text in texts])
    ends = torch.tensor([text == "<|im_end|>" for text in texts])
    for kind, members in (("digit", digits), ("end", ends)):
        assert row[f"kind/{kind}/tokens"] == int(members.sum())
        assert row[f"kind/{kind}/mean_p"] == pytest.approx(p[members].mean().item(), rel=1e-4)
        assert row[f"kind/{kind}/mean_weight"] == pytest.approx(w[members].mean().item(), rel=1e-4)
    assert not [name for name in row if name.startswith("source/")]  # there is one source


def test_sources_are_logged_apart_and_may_have_their_own_objective(
    processor: Any, drawn: list[Any], tmp_path: Path
) -> None:
    rows = [replace(row, source="ocr" if k % 2 else "reasoning") for k, row in enumerate(drawn[:8])]
    _, (row,) = trained(config_of(max_steps=1, source_objectives="ocr=nll"), "dft", rows, tmp_path)
    total = 0.0
    for source, weighs in (("ocr", lambda p: torch.ones_like(p)), ("reasoning", lambda p: p)):
        log_p, _, _ = seen_by_hand(processor, [r for r in rows if r.source == source])
        assert row[f"source/{source}/tokens"] == len(log_p)
        assert row[f"source/{source}/nll"] == pytest.approx(-log_p.mean().item(), rel=1e-4)
        assert row[f"source/{source}/mean_weight"] == pytest.approx(weighs(log_p.exp()).mean().item(), rel=1e-4)
        total -= float((weighs(log_p.exp()) * log_p).sum())
    assert row["loss"] == pytest.approx(total / row["response_tokens"], rel=1e-4)


def unheard_of(count: int) -> list[Example]:
    """Conversations whose answers the embedded model finds all but impossible."""
    return [
        Example(
            [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": f"<answer>{k}{k} zebra</answer>"}],
            source="strange",
        )
        for k in range(10, 10 + count)
    ]


def test_starved_tokens_raise_an_alarm_that_says_what_to_do(tmp_path: Path) -> None:
    _, rows = trained(config_of(max_steps=6, learning_rate=1e-4), "dft", unheard_of(8), tmp_path / "dft")
    alarms = [alarm for row in rows for alarm in row.get("alarms", [])]
    assert {(a["kind"], a["step"]) for a in alarms} >= {("format", 3), ("first", 3), ("all", 3)}
    message = next(a["message"] for a in alarms if a["kind"] == "format")
    assert "starved at step 3: format tokens of source strange have mean p 0.00" in message
    assert "of the pull of SFT; the model does not learn the format. --full_weight format gives" in message
    assert "OBJECTIVE='floor(minimum=0.1)'" in message and "--source_objectives strange=nll" in message
    assert len(alarms) == len({a["kind"] for a in alarms})  # each is raised once
    for objective, changes in (("nll", {}), ("floor(minimum=0.2)", {}), ("dft", {"source_objectives": "strange=nll"})):
        folder = tmp_path / f"{objective}{len(changes)}"
        _, rows = trained(config_of(max_steps=6, learning_rate=1e-4, **changes), objective, unheard_of(8), folder)
        assert not [row for row in rows if "alarms" in row], objective


def test_what_the_alarm_advises_helps(tmp_path: Path) -> None:
    ends = {}
    for name, changes in (("dft", {}), ("advice", {"full_weight": "format,first"})):
        _, rows = trained(config_of(max_steps=12, learning_rate=0.3, **changes), "dft", unheard_of(8), tmp_path / name)
        ends[name] = rows[-1]["kind/format/mean_p"]
    assert ends["dft"] < 1e-3 and ends["advice"] > 0.1


def test_an_alarm_is_a_warning_where_nobody_else_takes_it(
    processor: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = DFTTrainer(
        model=attach_loss(load_model("tiny")), args=training_arguments_of(config_of(max_steps=3), tmp_path, 8),
        train_dataset=unheard_of(8), data_collator=ChatCollator(processor, tag_sources=["strange"]), objective="dft",
        sources=["strange"],
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="vlm_dft"):
        trainer.train()
    assert "starved at step 3" in caplog.text and len(trainer.alarms) >= 2


@pytest.mark.parametrize("lora", [0, 4], ids=["frozen copy", "adapters off"])
def test_the_anchor_starts_at_zero_holds_the_model_back_and_is_logged(
    lora: int, drawn: list[Any], tmp_path: Path
) -> None:
    words = {"max_steps": 6, "lora": lora, "learning_rate": 0.5 if lora else 0.01}
    free = trained(config_of(**words), "nll", drawn[:16], tmp_path / "free")
    held = trained(config_of(**words, kl=1.0, kl_direction="forward"), "nll", drawn[:16], tmp_path / "held")
    assert "kl" not in free[1][-1]
    first, last = held[1][0], held[1][-1]
    assert first["loss"] == pytest.approx(free[1][0]["loss"], rel=1e-6)  # of itself it is no divergence
    assert last["kl"] > 0 and last["loss"] == pytest.approx(last["nll"] + last["kl"], rel=1e-4)
    start = load_model("tiny").state_dict()
    moved = [sum(((end[0][k] - start[k]) ** 2).sum().item() for k in start) for end in (free, held)]
    assert moved[1] < moved[0]


def test_an_anchored_step_does_not_depend_on_how_it_is_split(drawn: list[Any], tmp_path: Path) -> None:
    words = {"max_steps": 3, "kl": 0.5, "kl_direction": "reverse", "seed": 1}
    ends = [
        trained(
            config_of(micro_batch=micro, packing=packing, **words), "dft", drawn[:24], tmp_path / f"{micro}{packing}"
        )
        for micro, packing in ((8, False), (2, False), (4, True))
    ]
    assert ends[0][1][-1]["kl"] > 1e-7
    assert apart(ends[1][0], ends[0][0]) < 3e-4 and apart(ends[2][0], ends[0][0]) < 3e-4


def test_cadft_does_not_depend_on_how_a_step_is_split_and_resumes_bit_for_bit(drawn: list[Any], tmp_path: Path) -> None:
    words = {"cadft": 1.0, "seed": 1, "max_steps": 5, "save_steps": 2, "save_total_limit": 9}
    plain, _ = trained(config_of(**{**words, "cadft": 0}), "dft", drawn, tmp_path / "plain")
    whole, rows = trained(config_of(micro_batch=8, **words), "dft", drawn, tmp_path / "whole")
    split, split_rows = trained(config_of(micro_batch=2, **words), "dft", drawn, tmp_path / "split")
    packed, _ = trained(config_of(micro_batch=4, packing=True, **words), "dft", drawn, tmp_path / "packed")
    assert apart(whole, plain) > 0.01  # it does something
    assert apart(split, whole) < 3e-4 and apart(packed, whole) < 3e-4
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in split_rows], rel=1e-4)
    folder = tmp_path / "cut"
    trained(config_of(micro_batch=8, **words), "dft", drawn, folder)
    shutil.rmtree(folder / "checkpoint-5")
    moments = json.loads((folder / "checkpoint-4" / "loss_state.json").read_text())["moments"]
    assert moments[0] == pytest.approx(8 * (1 + 0.95 + 0.95**2 + 0.95**3))
    resumed, _ = trained(config_of(micro_batch=8, **words), "dft", drawn, folder)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_full_weight_without_kinds_and_smoothed_labels_are_refused(
    processor: Any, drawn: list[Any], tmp_path: Path
) -> None:
    arguments = training_arguments_of(config_of(max_steps=1), tmp_path, 8)
    common: dict[str, Any] = {"args": arguments, "train_dataset": drawn[:8], "data_collator": ChatCollator(processor)}
    trainer = DFTTrainer(model=attach_loss(load_model("tiny")), objective="dft", full_weight=["end"], **common)
    with pytest.raises(
        ModelError, match=r"full_weight needs to know what each token is. Give ChatCollator tag_sources"
    ):
        trainer.train()
    with pytest.raises(ValueError, match=r"Unknown kind of tokens 'stop'. Known: first, digit, format, answer, end"):
        DFTTrainer(model=attach_loss(load_model("tiny")), objective="dft", full_weight=["stop"], **common)
    with pytest.raises(ValueError, match="Unknown objective 'dftt'. Did you mean 'dft'"):
        DFTTrainer(model=attach_loss(load_model("tiny")), objective="dftt", **common)
    arguments.label_smoothing_factor = 0.1
    with pytest.raises(ValueError, match="label_smoothing_factor = 0.1, expected 0"):
        DFTTrainer(model=attach_loss(load_model("tiny")), objective="dft", **common)


def test_gradients_of_head_and_embeddings_are_formed_in_place_on_one_process_and_change_nothing(
    processor: Any, drawn: list[Any], tmp_path: Path
) -> None:
    ends = []
    for in_place in (True, False):
        model = attach_loss(load_model("tiny"))
        trainer = DFTTrainer(
            model=model, args=training_arguments_of(config_of(micro_batch=2, max_steps=3), tmp_path / str(in_place), 24),
            train_dataset=drawn[:24], data_collator=ChatCollator(processor), objective="dft",
        )  # fmt: skip
        layers = [model.get_output_embeddings(), model.get_input_embeddings()]
        assert [id(layer) for layer in trainer._in_place] == [id(layer) for layer in layers]
        seen: list[bool] = []
        for layer in layers:
            layer.register_forward_hook(lambda module, *_, seen=seen: seen.append(module.in_place))
        if not in_place:
            trainer._in_place = []
        trainer.train()
        assert set(seen) == {in_place}
        assert not any(layer.in_place or layer._kept is not None for layer in layers)  # they were the Trainer's
        ends.append(dict(model.state_dict()))
    assert apart(ends[0], ends[1]) < 1e-4


def test_several_objectives_with_parameters_have_folders_of_their_own(drawn: list[Any]) -> None:
    from vlm_dft.preflight import Plan

    config = config_of(objective="dft,floor(minimum=0.2, alpha=0.5),nll", output="runs/x")
    assert config.objective == ["dft", "floor(alpha=0.5, minimum=0.2)", "nll"]
    assert Plan(config, {}, None).folder(config.objective[1]) == Path("runs/x/floor-alpha=0.5-minimum=0.2")
    assert math.isclose(config_of(kl="0.03", kl_direction="forward").loss["kl"], 0.03)


def test_an_evaluation_does_not_touch_what_cadft_knows(processor: Any, drawn: list[Any], tmp_path: Path) -> None:
    losses = []
    for evaluates in (False, True):
        arguments = training_arguments_of(config_of(max_steps=3), tmp_path / str(evaluates), 24)
        if evaluates:
            arguments.eval_strategy, arguments.eval_steps = "steps", 1  # type: ignore[assignment]
        trainer = DFTTrainer(
            model=attach_loss(load_model("tiny")), args=arguments, train_dataset=drawn[:24], eval_dataset=drawn[24:32],
            data_collator=ChatCollator(processor), objective="dft", cadft=2.0,
        )  # fmt: skip
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1]


def test_a_diverged_run_stops_and_says_so(drawn: list[Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nan.* at step \d+: the model has diverged.* Lower learning_rate"):
        train_objective(config_of(learning_rate=1e9, max_steps=5), "nll", drawn[:16], tmp_path)


def test_what_a_trainer_would_ignore_is_refused(processor: Any, drawn: list[Any], tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "args": training_arguments_of(config_of(max_steps=1), tmp_path, 8), "train_dataset": drawn[:8],
        "data_collator": ChatCollator(processor), "objective": "dft",
    }  # fmt: skip
    with pytest.raises(ModelError, match=r"no token loss. Attach it first: vlm_dft.attach_loss\(model\)"):
        DFTTrainer(model=load_model("tiny"), **common)
    with pytest.raises(ValueError, match="expected no compute_loss_func"):
        DFTTrainer(model=attach_loss(load_model("tiny")), compute_loss_func=lambda *_: 0, **common)
    with pytest.raises(ValueError, match="A reference was given without kl"):
        DFTTrainer(model=attach_loss(load_model("tiny")), reference=load_model("tiny"), **common)


def test_an_alarm_is_raised_once_also_when_the_run_is_resumed(tmp_path: Path) -> None:
    words = {"learning_rate": 1e-4, "save_steps": 2, "save_total_limit": 9}
    _, whole = trained(config_of(max_steps=6, **words), "dft", unheard_of(8), tmp_path / "whole")
    folder = tmp_path / "cut"
    trained(config_of(max_steps=6, **words), "dft", unheard_of(8), folder)
    for step in (4, 6):
        shutil.rmtree(folder / f"checkpoint-{step}")  # back to step 2, before the alarms of step 3
    _, rows = trained(config_of(max_steps=6, **words), "dft", unheard_of(8), folder)
    alarms = [[(a["step"], a["kind"]) for row in found for a in row.get("alarms", [])] for found in (whole, rows)]
    assert alarms[0] == alarms[1] and {step for step, _ in alarms[0]} == {3}
