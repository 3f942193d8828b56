"""Engines' files: what is shipped resolves, every auto is filled, and what contradicts the run is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_dft import engines
from vlm_dft.config import TrainConfig, resolve_config
from vlm_dft.dimensions import dimensions_of
from vlm_dft.engines import check_engine, check_runs, filled, find_engine, layer_classes, trainer_words
from vlm_dft.errors import ConfigError, ModelError, UserError

SHIPPED = ("zero2", "zero3", "zero3_offload", "fsdp2")
ZERO = {"zero_optimization": {"stage": 2}}


def resolve(**settings: Any) -> TrainConfig:
    return resolve_config(("test", settings))


def own(folder: Path, settings: Any) -> str:
    path = folder / "own.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return str(path)


def autos(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in ([key] if inner == "auto" else autos(inner))]
    return []


def test_the_shipped_engines_are_these() -> None:
    folder = Path(__file__).parent.parent / "scripts/engines"
    assert sorted(path.stem for path in folder.glob("*.json")) == sorted(SHIPPED)
    kinds = {name: (find_engine(name).kind, find_engine(name).stage) for name in SHIPPED}
    assert kinds == {
        "zero2": ("deepspeed", 2),
        "zero3": ("deepspeed", 3),
        "zero3_offload": ("deepspeed", 3),
        "fsdp2": ("fsdp", 0),
    }
    assert find_engine("zero3_offload").offloads("optimizer") and find_engine("zero3_offload").offloads("param")
    assert not find_engine("zero3").offloads("optimizer")
    assert find_engine(None).kind == "ddp"


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(("processes", "micro_batch", "batch_size"), [(8, 2, 128), (16, 1, 64), (2, 4, 8)])
def test_a_shipped_engine_resolves_with_the_batch_that_was_asked_for(
    name: str, processes: int, micro_batch: int, batch_size: int
) -> None:
    """Eight GPUs, and two nodes of eight: processes x micro-batch x accumulation is the global batch."""
    config = resolve(
        engine=name,
        processes=processes,
        micro_batch=micro_batch,
        batch_size=batch_size,
        model="Qwen/Qwen2.5-VL-7B-Instruct",
    )
    settings = filled(check_engine(config), config, 3584, half=True)
    assert autos(settings) == []
    assert processes * micro_batch * config.accumulation == batch_size
    if "zero_optimization" in settings:
        found = [
            settings[k] for k in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
        ]
        assert found == [micro_batch, config.accumulation, batch_size]
        assert settings["bf16"]["enabled"] is True and settings["fp16"]["enabled"] is False
        assert settings["data_types"]["grad_accum_dtype"] == "fp32"  # micro-batches add up in fp32


def test_sizes_follow_from_the_language_model_s_width_which_a_vlm_keeps_in_text_config(tmp_path: Path) -> None:
    """Also in a file of one's own. As transformers would: width², 0.9 width² and 10 width."""
    config = resolve(engine=own(tmp_path, json.loads(Path("scripts/engines/zero3.json").read_text())), model="tiny")
    model = dimensions_of("tiny")
    assert model is not None and model.hidden == 128
    zero = filled(check_engine(config), config, model.hidden, half=False)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 16384 and zero["stage3_prefetch_bucket_size"] == 14745
    assert zero["stage3_param_persistence_threshold"] == 1280


def test_the_trainer_s_arguments_hold_the_filled_settings(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from vlm_dft.arguments import training_arguments_of

    config = resolve(engine="zero3", batch_size=8, micro_batch=2, max_grad_norm=0.5)
    settings = training_arguments_of(config, tmp_path, 24).deepspeed
    assert isinstance(settings, dict) and autos(settings) == []
    assert settings["gradient_clipping"] == 0.5 and settings["zero_optimization"]["reduce_bucket_size"] == 16384


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "expected JSON, found something else"),
        ([], "expected a DeepSpeed configuration.*or an FSDP one.*found a list"),
        ({"bf16": {"enabled": "auto"}, "distributed_type": "FSDP"}, "found the keys bf16, distributed_type"),
        ({"fsdp": True}, "with fsdp and fsdp_config.*found the keys fsdp"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage = 4, expected 0, 1, 2 or 3"),
        ({**ZERO, "train_batch_size": 64}, 'train_batch_size = 64, expected "auto", or 128'),
        ({**ZERO, "gradient_accumulation_steps": 4}, 'gradient_accumulation_steps = 4, expected "auto", or 64'),
        ({**ZERO, "gradient_clipping": 0.3}, 'gradient_clipping = 0.3, expected "auto", or 1.0 as max_grad_norm'),
        ({**ZERO, "fp16": {"enabled": True}}, 'fp16.enabled = true, expected "auto"'),
        ({**ZERO, "optimizer": {"type": "Lamb"}}, 'optimizer.type = "Lamb", expected AdamW, which `optim` chooses'),
        (
            {**ZERO, "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}},
            r"optimizer.params.betas = \[0.9, 0.999\], expected \"auto\", or \[0.9, 0.95\] as adam_beta1 and adam_beta2",
        ),
        (
            {**ZERO, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            "optimizer.params.lr = 0.001.*or 5e-05 as learning_rate",
        ),
        (
            {**ZERO, "scheduler": {"type": "WarmupLR"}},
            'scheduler = "WarmupLR", expected no scheduler: lr_scheduler_type',
        ),
        ({**ZERO, "tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.*expected none"),
        (
            {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}},
            "stage3_gather_16bit_weights_on_model_save = false, expected true: a checkpoint would hold no weights",
        ),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "fsdp_config.version = 1, expected 2"),
        (
            {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
            "state_dict_type.*expected .FULL_STATE_DICT.: a checkpoint in shards",
        ),
        (
            {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}},
            "expected none: `recompute` says which parts",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_file_that_contradicts_the_run_is_refused_by_name(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_engine(resolve(engine=own(tmp_path, settings), processes=2))


def test_an_optimizer_block_that_says_what_the_run_says_is_taken_as_said(tmp_path: Path) -> None:
    """And left out of what DeepSpeed is given: the Trainer's AdamW has the parts' learning rates, DeepSpeed's would not."""
    block = {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01}}
    config = resolve(engine=own(tmp_path, {**ZERO, "optimizer": block}))
    settings = filled(check_engine(config), config, 128, half=False)
    assert "optimizer" not in settings and settings["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "ddp"}, "No engine 'ddp'. DDP is what runs without an engine."),
        ({"engine": "zero3_ofload"}, "Did you mean 'zero3_offload'"),
        ({"engine": "fsdp2"}, "fsdp2 splits the model over processes, found 1"),
        ({"engine": "zero2", "precision": "pure_bf16"}, "DeepSpeed keeps fp32 master weights.*or engine fsdp2"),
        ({"engine": "fsdp2", "processes": 2, "precision": "pure_bf16", "lora": 4}, "no layer of two precisions"),
        ({"engine": "zero3", "lora": 4, "quantize": "nf4"}, "quantize with engine zero3.*Leave out engine"),
        ({"engine": "fsdp2", "processes": 2, "lora": 4, "quantize": "nf4"}, "quantize with engine fsdp2"),
        ({"engine": "zero3_offload", "optim": "sgd"}, "optim = sgd with engine zero3_offload.*DeepSpeedCPUAdam"),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_an_engine_that_does_not_fit_the_run_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=message):
        check_engine(resolve(**settings))


def test_deepspeed_that_is_not_installed_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run does without: it may be about another machine."""
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    zero = check_engine(resolve(engine="zero2"))
    with pytest.raises(
        ModelError, match=r"not installed. Run: pip install 'vlm-dft\[deepspeed\]', or use engine fsdp2"
    ):
        engines.check_installed(zero)
    engines.check_installed(check_engine(resolve(engine="fsdp2", processes=2)))


def test_the_layers_that_fsdp_gathers_are_found_in_any_model(model: Any) -> None:
    from torch import nn

    assert layer_classes(model) == ["Qwen2_5_VLVisionBlock", "Qwen2_5_VLDecoderLayer"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2)])  # within a layer: gathered with it

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Sequential(nn.ModuleList([Block(), Block()]))
            self.acts = nn.ModuleList([nn.ReLU()])  # nothing to gather

    assert layer_classes(Odd()) == ["Block"]
    with pytest.raises(ModelError, match="Linear has no list of layers"):
        layer_classes(nn.Linear(2, 2))


def test_fsdp_settings_reach_the_trainer_without_a_class_of_a_family() -> None:
    config = resolve(engine="fsdp2", processes=2)
    engine = check_engine(config)
    words = trainer_words(engine, filled(engine, config, 128, half=False))
    assert words["fsdp"] is True and "transformer_layer_cls_to_wrap" not in words["fsdp_config"]
    assert words["fsdp_config"]["state_dict_type"] == "FULL_STATE_DICT"


def test_an_engine_that_accelerate_did_not_set_up_is_noticed() -> None:
    check_runs(find_engine("zero2"), "DEEPSPEED")
    with pytest.raises(ModelError, match="engine = fsdp2 was asked for, but accelerate runs MULTI_CPU"):
        check_runs(find_engine("fsdp2"), "MULTI_CPU")
