"""Parts of one model: what is frozen stays, what is adapted and trained whole is saved and comes back, rates and table say so."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import config_of

from vlm_dft.errors import ConfigError, ModelError
from vlm_dft.models import load_model
from vlm_dft.parts import draw_parts, prepare_parts
from vlm_dft.progress import TIMING, read_metrics
from vlm_dft.targets import patterns_of
from vlm_dft.training import train_objective

torch.set_num_threads(1)
STEADY = {"warmup": 0, "lr_scheduler_type": "constant", "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0}
TINY = {  # tops of the embedded model's parameter names, by hand
    "model.visual.patch_embed": "vision", "model.visual.blocks": "vision", "model.visual.merger": "merger",
    "model.language_model": "language",
}  # fmt: skip


def untimed(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics without the time that they took."""
    return [{k: v for k, v in row.items() if k != TIMING} for row in read_metrics(run / "metrics.jsonl")]


def part_by_hand(name: str) -> str:
    return next(part for top, part in TINY.items() if name.startswith(top))


def moves(config: Any, drawn: list[Any], folder: Path) -> dict[str, torch.Tensor]:
    """What training added to each parameter."""
    final = train_objective(config, "nll", drawn[:8], folder)
    end, start = (dict(load_model(name).named_parameters()) for name in (str(final), "tiny"))
    return {name: (end[name] - start[name]).detach() for name in start}


def test_each_part_moves_by_its_own_rate_and_decay(drawn: list[Any], tmp_path: Path) -> None:
    """One step of SGD: -rate x (gradient + decay x weight), and no decay of norms and biases."""
    every = {"train_parts": "vision,merger,language", "max_steps": 1, "micro_batch": 8, **STEADY}
    plain = moves(config_of(**every, weight_decay=0), drawn, tmp_path / "plain")
    rates = {"vision": (0.01, 0.0), "merger": (0.1, 0.5), "language": (0.05, 0.2)}
    own = {f"{part}_learning_rate": rate for part, (rate, _) in rates.items()}
    own |= {"vision_weight_decay": 0.0, "merger_weight_decay": 0.5}  # the language model has what holds for all
    found = moves(config_of(**every, **own, weight_decay=0.2), drawn, tmp_path / "own")
    start = dict(load_model("tiny").named_parameters())
    for name, moved in plain.items():
        rate, decay = rates[part_by_hand(name)]
        decays = start[name].dim() > 1
        expected = moved / 0.05 * rate - rate * decay * start[name].detach() * decays
        assert torch.allclose(found[name], expected, rtol=2e-3, atol=2e-7), name
    assert moved.abs().max() > 1e-4
    (row,) = read_metrics(tmp_path / "own" / "metrics.jsonl")
    logged = {key: value for key, value in row.items() if key.startswith("learning_rate")}
    assert logged == {"learning_rate": 0.05, **{f"learning_rate/{part}": rate for part, (rate, _) in rates.items()}}
    assert not [k for k in read_metrics(tmp_path / "plain" / "metrics.jsonl")[0] if k.startswith("learning_rate/")]


def test_the_schedule_keeps_the_ratio_of_the_rates_and_a_run_with_them_resumes_bit_for_bit(
    drawn: list[Any], tmp_path: Path
) -> None:
    words = {"train_parts": "merger,language", "merger_learning_rate": 1e-4, "epochs": 2, "save_steps": 3}
    config = config_of(**words)  # AdamW and a cosine schedule of 1e-3
    whole = train_objective(config, "dft", drawn, tmp_path / "whole")
    cut = train_objective(config, "dft", drawn, tmp_path / "cut")
    shutil.rmtree(cut)  # back to checkpoint-9
    resumed = train_objective(config, "dft", drawn, tmp_path / "cut")
    ends = [load_model(str(end)).state_dict() for end in (whole, resumed)]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    rows = [untimed(tmp_path / name) for name in ("cut", "whole")]
    assert len(rows[0]) == 10 and rows[0] == rows[1]
    for row in rows[0]:
        assert row["learning_rate/merger"] == pytest.approx(row["learning_rate"] / 10)
    assert rows[0][0]["learning_rate"] != rows[0][-1]["learning_rate"]


def test_a_part_trained_whole_beside_lora_is_in_the_adapter_and_comes_back(drawn: list[Any], tmp_path: Path) -> None:
    from peft import PeftModel

    from vlm_dft.training import DFTTrainer

    kept: dict[str, Any] = {}
    original = DFTTrainer.__init__

    def remember(self: Any, *args: Any, **words: Any) -> None:
        original(self, *args, **words)
        kept["model"] = self.model

    DFTTrainer.__init__ = remember  # type: ignore[method-assign]
    try:
        final = train_objective(config_of(lora=4, train_parts="merger", max_steps=3, warmup=0), "nll", drawn, tmp_path)
    finally:
        DFTTrainer.__init__ = original  # type: ignore[method-assign]
    held = json.loads((final / "adapter_config.json").read_text())
    assert held["modules_to_save"] == ["model.visual.merger"] and held["base_model_name_or_path"] == "tiny"
    start, merged = load_model("tiny").state_dict(), load_model(str(final)).state_dict()
    moved = {part_by_hand(k) for k in start if not torch.equal(start[k], merged[k]) and k != "lm_head.weight"}
    assert moved == {"merger", "language"}
    own = dict(kept["model"].named_parameters())
    name = "model.visual.merger.mlp.0.weight"
    assert torch.equal(merged[name], own["base_model.model.model.visual.merger.modules_to_save.default.mlp.0.weight"])
    plain = PeftModel.from_pretrained(load_model("tiny"), final).merge_and_unload().state_dict()  # nothing of ours
    assert all(torch.equal(plain[k], merged[k]) for k in merged)
    row = json.loads((tmp_path / "parts.json").read_text())
    assert row["lora"]["modules_to_save"] == {"merger": ["model.visual.merger"]}
    assert set(row["proved"]) == {"merger", "language"} and row["proved"]["merger"]["step"] == 1


def test_lora_with_a_part_trained_whole_resumes_bit_for_bit(drawn: list[Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = config_of(
        lora=4, lora_dropout=0.1, train_parts="merger", merger_learning_rate=1e-4, max_steps=6, save_steps=3
    )
    ends = [train_objective(config, "dft", drawn, tmp_path / "whole")]
    shutil.rmtree(train_objective(config, "dft", drawn, tmp_path / "cut"))  # back to checkpoint-3
    ends.append(train_objective(config, "dft", drawn, tmp_path / "cut"))
    first, second = (load_file(end / "adapter_model.safetensors") for end in ends)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert len([key for key in first if "merger" in key]) == 5
    logs = [untimed(tmp_path / name) for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_lora_on_the_tower_and_patterns_of_ones_own_adapt_what_they_name(drawn: list[Any], tmp_path: Path) -> None:
    final = train_objective(
        config_of(lora=2, lora_parts="vision,language", lora_targets=["qkv", r"layers\.0\.mlp\.up_proj"], lora_alpha=3,
                  lora_dropout=0.1, max_steps=2, warmup=0), "nll", drawn, tmp_path)  # fmt: skip
    start, merged = load_model("tiny").state_dict(), load_model(str(final)).state_dict()
    assert {k for k in start if not torch.equal(start[k], merged[k])} == {
        "model.visual.blocks.0.attn.qkv.weight", "model.visual.blocks.1.attn.qkv.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
    }  # fmt: skip
    held = json.loads((final / "adapter_config.json").read_text())
    assert (held["r"], held["lora_alpha"], held["lora_dropout"]) == (2, 3, 0.1)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"lora_targets": "q_prj"}, "'q_prj' matches no linear layer of language. Did you mean 'q_proj'"),
        ({"lora_targets": "qkv"}, "It matches 2 of vision, which lora_parts=language,vision would include"),
        ({"lora_targets": "lm_head"}, "LoRA is not put on: train_parts=head trains it whole"),
        ({"lora_targets": "embed_tokens"}, "'embed_tokens' matches no linear layer of language"),
        ({"train_parts": "head"}, "has no parameters there .its head is tied to the embeddings"),
        ({"quantize": "nf4"}, "quantize = nf4 needs bitsandbytes, which is not installed. Run: pip install"),
    ],
)
def test_what_cannot_be_adapted_is_refused_in_words(
    words: dict[str, Any], match: str, drawn: list[Any], tmp_path: Path
) -> None:
    import importlib.util

    if "quantize" in words and importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ModelError, match=match):
        train_objective(config_of(lora=4, **words), "nll", drawn, tmp_path)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"lora_alpha": 8}, "lora_alpha without lora: there is no adapter"),
        ({"quantize": "int8"}, "quantize without lora"),
        (
            {"lora": 4, "train_parts": "language"},
            "language is in train_parts and in lora_parts \\(language unless set\\)",
        ),
        (
            {"lora": 4, "lora_parts": "vision", "train_parts": "merger,vision"},
            "vision is in train_parts and in lora_parts",
        ),
        (
            {"vision_learning_rate": 1e-5},
            r"vision is not trained. Found train_parts = \[\'language\', \'head\'\]. Name it there",
        ),
        (
            {"lora": 4, "head_weight_decay": 0},
            r"head is not trained. Found train_parts = \[\] and lora_parts",
        ),
        (
            {"lora": 4, "train_parts": "merger", "kl": 0.1, "kl_direction": "forward"},
            "train_parts = merger changes that",
        ),
        ({"lora": 4, "quantize": "nf3"}, "quantize must be one of nf4, int8, found 'nf3'"),
    ],
)
def test_contradictions_between_parts_are_refused_before_a_model_is_loaded(words: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        config_of(**words)


def test_patterns_join_what_differs_in_its_number_alone() -> None:
    names = [f"model.text.layers.{k}.attn.{x}_proj" for k in (0, 1, 11) for x in "qk"]
    names += ["model.text.layers.0.mlp.up", "model.bridge.0", "model.bridge.2"]
    assert patterns_of(names) == [r"model\.text\.layers\.\d+\.(attn\.(q_proj|k_proj)|mlp\.up)", r"model\.bridge\.\d+"]


def shown(words: dict[str, Any], width: int) -> list[str]:
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=width).print(draw_parts(prepare_parts(load_model("tiny"), config_of(**words))[1]))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_the_table_says_what_is_trained_how_fast_and_on_what_lora_was_put() -> None:
    words = {"lora": 16, "train_parts": "merger", "merger_learning_rate": 1e-5, "merger_weight_decay": 0}
    lines = shown(words, 80)
    assert lines[0].split() == "part parameters trained LoRA on rate decay weights".split()
    assert [line.split() for line in lines[2:5]] == [
        "vision 183,424 frozen fp32".split(),
        "merger 98,752 98,752 1e-05 0 fp32".split(),
        "language 790,144 116,736 21 0.001 0.01 fp32".split(),
    ]
    pattern = r"  model\.language_model\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.("
    assert pattern in "".join(lines)
    assert max(map(len, lines)) <= 80
    assert "fp32 master weights" in shown({}, 160)[5]


def test_the_table_counts_what_the_model_holds(drawn: list[Any], tmp_path: Path) -> None:
    train_objective(config_of(max_steps=1), "nll", drawn, tmp_path)
    rows = json.loads((tmp_path / "parts.json").read_text())["parts"]
    sizes: dict[str, int] = {}
    for name, parameter in load_model("tiny").named_parameters():
        sizes[part_by_hand(name)] = sizes.get(part_by_hand(name), 0) + parameter.numel()
    assert {part: row["parameters"] for part, row in rows.items()} == sizes
    assert {part: row["trainable"] for part, row in rows.items()} == {
        "vision": 0,
        "merger": 0,
        "language": sizes["language"],
    }
