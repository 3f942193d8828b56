"""Settings that cannot stand together are refused, with the reason and the nearest right ones, before anything is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from vlm_dft.config import resolve_config
from vlm_dft.errors import ConfigError, ModelError
from vlm_dft.preflight import check_run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "flash_atention_2"}, "attention: unknown 'flash_atention_2'. Did you mean 'flash_attention_2'"),
        ({"attention": "flash_attention_2", "precision": "fp32"}, "flash-attn computes in half precision alone"),
        ({"quantize": "nf4"}, "quantize without lora: there is no adapter"),
        ({"lora_alpha": 32, "lora_dropout": 0.1}, "lora_alpha, lora_dropout without lora.*they could apply"),
        ({"lora_parts": "vision"}, "lora_parts without lora"),
        ({"lora_targets": "x"}, "lora_targets without lora"),
        ({"lora": 4, "lora_parts": "none"}, "lora_parts: expected some of vision, merger, language, found none"),
        (
            {"lora": 4, "train_parts": "language"},
            r"language is in train_parts and in lora_parts \(language unless set\)",
        ),
        (
            {"lora": 4, "train_parts": "merger", "lora_parts": "vision,merger"},
            "merger is in train_parts and in lora_parts: trained whole",
        ),
        (
            {"vision_learning_rate": 1e-5},
            r"vision_learning_rate = 1e-05, but vision is not trained. Found train_parts = \['language', 'head'\]",
        ),
        ({"merger_weight_decay": 0.1, "lora": 4}, r"merger is not trained.*lora_parts = \['language'\]"),
        ({"recompute": "none", "activation_checkpointing": True}, "activation_checkpointing is set by recompute"),
        ({"patience": 2}, "patience without evaluate_every"),
        ({"watch_limit": 10}, "watch_limit without evaluate_every"),
        ({"keep_best": True}, "keep_best without evaluate_every"),
        ({"evaluate_every": 10, "benchmark": "none"}, "evaluate_every needs a benchmark, found benchmark = none"),
        ({"save_steps": 0}, "save_steps must be a whole number of steps, 1 or more, or a share.* found 0"),
        ({"save_steps": 2.5}, "save_steps must be a whole number"),
        ({"logging_steps": "often"}, "logging_steps must be a whole number of steps.*found 'often'"),
        ({"logging_steps": -1}, "logging_steps.*found -1"),
        ({"save_total_limit": 0}, "save_total_limit must be a whole number of at least 1, found 0"),
        ({"max_steps": 0}, "max_steps must be a whole number of at least 1, found 0"),
        ({"adam_beta2": 1.5}, "adam_beta2 must be a number, 0 or more and below 1, found 1.5"),
        ({"weight_decay": -0.1}, "weight_decay must be a number, 0 or more, found -0.1"),
        ({"batch_size": 10, "micro_batch": 4}, "Nearest: 8 or 12."),
        ({"batch_size": 3, "micro_batch": 4}, "Nearest: 4."),
        ({"batch_size": 100, "processes": 8}, "micro_batch x processes = 1 x 8 = 8. Nearest: 96 or 104."),
        ({"optim": "adamw_torh"}, "optim: unknown 'adamw_torh'. Did you mean 'adamw_torch'"),
        ({"optim": "adamw"}, "optim: unknown 'adamw'. Did you mean 'adamw_torch'"),
        ({"precision": "bf_16"}, "precision: expected one of auto.*found 'bf_16'. Did you mean 'bf16'"),
        ({"lora": 4, "quantize": "nf3"}, "quantize must be one of nf4, int8, found 'nf3'. Did you mean 'nf4'"),
        ({"too_long": "shorten"}, "found 'shorten'. Did you mean 'shorten_answer'"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type: unknown 'cosin'. Did you mean 'cosine'"),
        ({"deepspeed": "x.json"}, "deepspeed is set by engine"),
        ({"eval_steps": 10}, "eval_steps is set by evaluate_every"),
        ({"greater_is_better": False}, "greater_is_better is set by keep_best"),
        ({"resume_from_checkpoint": "x"}, "set by nothing: the same command continues from the last whole checkpoint"),
        ({"per_device_eval_batch_size": 8}, "per_device_eval_batch_size is set by nothing: an evaluation asks 32"),
        ({"do_train": True}, "do_train is set by nothing"),
        ({"label_names": ["x"]}, "label_names is set by nothing"),
        ({"ignore_data_skip": True}, "ignore_data_skip is set by nothing"),
        (
            {"average_tokens_across_devices": False},
            "average_tokens_across_devices is set by nothing: the targets of all",
        ),
        ({"tokens_per_second": 2}, "unknown setting 'tokens_per_second'"),
        ({"fsdp": "full_shard"}, "fsdp is set by engine"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is set by micro_batch"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_stand_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_config(("command line", settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"attention": "sdpa", "precision": "fp32"},
        {"lora": 8, "lora_alpha": 16, "lora_parts": "vision", "train_parts": "merger", "vision_learning_rate": 1e-5},
        {"lora": 8, "quantize": "int8"},
        {"evaluate_every": 10, "patience": 3, "keep_best": True, "benchmark": "drawn"},
        {"keep_best": False},
        {"save_steps": 0.2, "logging_steps": 1, "save_total_limit": 1, "max_steps": -1},
        {"recompute": "vision,language"},
        {"optim": "adamw_torch_fused", "lr_scheduler_type": "linear"},
    ],
    ids=lambda value: ",".join(map(str, value)),
)
def test_settings_that_can_stand_together_are_taken(settings: dict[str, Any]) -> None:
    resolve_config(("command line", settings))


@pytest.mark.parametrize("settings", [{"lora": 4}, {"lora": 4, "quantize": "nf4"}], ids=["lora", "quantize"])
def test_an_adapter_on_an_adapter_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "tiny"}')
    config = resolve_config(("test", {"model": str(tmp_path), **settings}))
    with pytest.raises(ModelError, match=rf"lora = 4.*Merge it first: vlm-dft export {tmp_path} OUT --merge"):
        check_run(config, dry_run=True)
    check_run(resolve_config(("test", {"model": str(tmp_path)})), dry_run=True)  # trained whole, it is merged


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train_parts": "head"},
            "train_parts = head: tiny has no parameters there. Its head is tied.*vision, merger, language",
        ),
        ({"lora": 4, "train_parts": "head,merger"}, "train_parts = head: tiny has no parameters there"),
        ({"head_learning_rate": 1e-5}, "head_learning_rate = 1e-05, but tiny has no such part. Its head is tied"),
        ({"head_weight_decay": 0}, "head_weight_decay = 0, but tiny has no such part"),
        ({"lora": 4, "lora_targets": "q_prj"}, "'q_prj' matches no linear layer of language. Did you mean 'q_proj'"),
        ({"lora": 4, "lora_targets": "qkv"}, "It matches 2 of vision, which lora_parts=language,vision would include"),
        ({"lora": 4, "lora_targets": "lm_head"}, "train_parts=head trains it whole"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_a_model_of_known_sizes_does_not_have_is_refused_before_it_is_loaded(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        check_run(resolve_config(("test", settings)), dry_run=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": 4, "quantize": "nf4"}, r"quantize = nf4 needs bitsandbytes.*Run: pip install 'vlm-dft\[qlora\]'"),
        ({"optim": "paged_adamw_8bit"}, "optim = paged_adamw_8bit needs bitsandbytes"),
        ({"use_liger_kernel": True}, r"use_liger_kernel needs liger_kernel.*Run: pip install 'vlm-dft\[liger\]'"),
    ],
    ids=["quantize", "optim", "liger"],
)
def test_a_package_that_a_setting_needs_is_looked_up_before_a_run_begins(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if importlib.util.find_spec("liger_kernel" if "use_liger_kernel" in settings else "bitsandbytes"):
        pytest.skip("the package is installed")
    with pytest.raises(ModelError, match=message):
        check_run(resolve_config(("test", {**settings, "output": str(tmp_path / "run")})))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [{"engine": "zero2"}, {"engine": "fsdp2", "processes": 2}], ids=["zero2", "fsdp2"])
def test_an_engine_without_a_launcher_is_refused(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config = resolve_config(("test", {**settings, "output": str(tmp_path / "run")}))
    engine, processes = settings["engine"], settings.get("processes", 1)
    with pytest.raises(
        ConfigError,
        match=rf"engine = {engine} needs a launcher.*ENGINE={engine} NPROC={processes} for.*vlm-dft-launch --nproc_per_node {processes}",
    ):
        check_run(config)
    check_run(config, dry_run=True)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", '{"model_type": ', "config.json: expected JSON, found something else"),
        ("config.json", "[]", "config.json: expected a mapping of settings, found list"),
        ("adapter_config.json", "{", "adapter_config.json: expected JSON"),
        (
            "adapter_config.json",
            "{}",
            "adapter_config.json: expected the name of a model under base_model_name_or_path, found None",
        ),
    ],
)
def test_a_broken_file_of_a_model_is_named(file: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(ModelError, match=message):
        check_run(resolve_config(("test", {"model": str(tmp_path)})), dry_run=True)


def test_a_model_that_leaves_sizes_to_transformers_is_of_unknown_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl", "vision_config": {}}')
    check_run(resolve_config(("test", {"model": str(tmp_path)})), dry_run=True)


def test_the_values_read_from_transformers_source_are_those_it_has() -> None:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    from vlm_dft.contradictions import _known

    assert set(_known("optim")) == {name.value for name in OptimizerNames}
    assert set(_known("lr_scheduler_type")) == {name.value for name in SchedulerType}
