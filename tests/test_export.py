"""Export: what is written is the model that was trained, alone with transformers; and what is not is refused and not written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_models import build_model, processor_of
from PIL import Image
from safetensors.torch import load_file, save_file
from test_family_models import part_by_hand, rows
from test_training import config_of

from vlm_dft import ChatCollator
from vlm_dft.cli import main
from vlm_dft.config import TrainConfig
from vlm_dft.errors import ConfigError, ModelError
from vlm_dft.export import check_export, export, find_source
from vlm_dft.models import load_model
from vlm_dft.runs import write_provenance
from vlm_dft.training import train_objective

torch.set_num_threads(1)


def run_of(config: TrainConfig, examples: list[Any], folder: Path) -> Path:
    train_objective(config, "nll", examples, folder)
    write_provenance(folder, config)
    return folder


@pytest.fixture(scope="module")
def adapted(drawn: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LoRA with the merger trained whole."""
    words = {"lora": 4, "train_parts": "merger", "max_steps": 3, "warmup": 0, "save_steps": 1, "save_total_limit": 3}
    return run_of(config_of(**words), drawn, tmp_path_factory.mktemp("adapted"))


@pytest.fixture(scope="module")
def whole(drawn: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(config_of(max_steps=2, warmup=0), drawn, tmp_path_factory.mktemp("whole"))


def plain_logits(model: Any, name: str) -> torch.Tensor:
    """On a picture of noise, by the folder's own processor."""
    from transformers import AutoProcessor

    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (56, 84, 3), dtype=np.uint8))
    example = {
        "messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3 red"}],
        "images": [picture],
    }
    batch = ChatCollator(AutoProcessor.from_pretrained(name))([example])
    with torch.no_grad():
        found: torch.Tensor = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
    return found


def test_a_merged_folder_is_the_adapted_model_for_plain_transformers(adapted: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, GenerationConfig

    found = export(str(adapted), tmp_path / "out", merge=True)
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == torch.float32
    theirs = PeftModel.from_pretrained(load_model("tiny"), adapted / "checkpoint-3").eval()
    expected, own = plain_logits(theirs, str(tmp_path / "out")), plain_logits(model.eval(), str(tmp_path / "out"))
    assert torch.allclose(own, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(own, plain_logits(load_model("tiny"), str(tmp_path / "out")), atol=1e-2)
    start, end = load_model("tiny").state_dict(), model.state_dict()
    vision = [name for name in start if ".visual." in name and "merger" not in name]
    assert len(vision) == 25 and all(torch.equal(start[name], end[name]) for name in vision)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert found["untouched"] == {"identical": 33, "vision": 25}
    assert found["agreement"]["merged"] < 1e-5 and found["agreement"]["reloaded"] == 0.0
    assert not list(tmp_path.glob(".*"))


def test_a_merge_in_bf16_is_the_merge_in_fp32_rounded_once(adapted: Path, tmp_path: Path) -> None:
    export(str(adapted), tmp_path / "half", merge=True, dtype="bf16")
    export(str(adapted), tmp_path / "full", merge=True, dtype="fp32")
    half, full = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "full"))
    assert half.keys() == full.keys()
    assert all(torch.equal(half[key], full[key].bfloat16()) for key in full)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_whole_weights_are_exported_without_merging(whole: Path, tmp_path: Path) -> None:
    found = export(str(whole), tmp_path / "out")
    end, start = (load_model(str(name)).state_dict() for name in (tmp_path / "out", whole / "checkpoint-2"))
    assert all(torch.equal(end[name], start[name]) for name in start)
    assert found["untouched"] == {"identical": 30, "vision": 30}
    assert not [
        path.name for path in (tmp_path / "out").iterdir() if "optimizer" in path.name or "trainer" in path.name
    ]


def test_an_adapter_is_exported_as_it_is_and_names_the_embedded_base_without_a_path(
    adapted: Path, tmp_path: Path
) -> None:
    export(str(adapted), tmp_path / "out")
    held = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert held["base_model_name_or_path"] == "tiny"
    merged, own = (load_model(str(name)).state_dict() for name in (tmp_path / "out", adapted / "checkpoint-3"))
    assert all(torch.equal(merged[name], own[name]) for name in own)


@pytest.mark.parametrize("family", ["llava_next", "idefics3", "gemma3"])
def test_other_families_keep_their_vision_weights_and_hub_names(family: str, tmp_path: Path) -> None:
    if family == "gemma3":  # a tied head, as the released ones have
        model = build_model(family)
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        model.tie_weights()
    else:
        model = build_model(family)
    model.save_pretrained(tmp_path / "model")
    processor_of(family).save_pretrained(tmp_path / "model")
    config = config_of(model=str(tmp_path / "model"), lora=2, lora_parts="vision,language", max_steps=2, warmup=0,
                       batch_size=2, micro_batch=2)  # fmt: skip
    run = run_of(config, rows(4), tmp_path / "run")
    export(str(run), tmp_path / "out", merge=True)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    assert before.keys() == after.keys()
    start, end = (load_model(str(tmp_path / name)).state_dict() for name in ("model", "out"))
    for name in start:
        if part_by_hand(family, name) == "merger":
            assert torch.equal(start[name], end[name]), name
    assert [name for name in start if not torch.equal(start[name], end[name])]


def test_a_head_trained_whole_beside_lora_is_merged_and_saved(drawn: list[Any], tmp_path: Path) -> None:
    model = load_model("tiny")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "untied")
    processor_of_tiny(tmp_path / "untied")
    config = config_of(model=str(tmp_path / "untied"), lora=4, train_parts="head", max_steps=2, warmup=0)
    export(str(run_of(config, drawn, tmp_path / "run")), tmp_path / "out", merge=True)
    start, end = (load_file(tmp_path / name / "model.safetensors") for name in ("untied", "out"))
    assert start.keys() == end.keys() and not torch.equal(start["lm_head.weight"], end["lm_head.weight"])
    embeddings = next(key for key in start if "embed_tokens" in key)
    assert torch.equal(start[embeddings], end[embeddings])


def test_a_run_that_goes_on_from_an_adapter_is_held_against_the_merged_one(
    adapted: Path, drawn: list[Any], tmp_path: Path
) -> None:
    """Trained whole from a LoRA checkpoint: what stays frozen is the base's with that adapter in it."""
    config = config_of(model=str(adapted / "checkpoint-3"), train_parts="vision", max_steps=1, warmup=0)
    found = export(str(run_of(config, drawn, tmp_path / "run")), tmp_path / "out")
    start, end = (load_model(str(name)).state_dict() for name in (adapted / "checkpoint-3", tmp_path / "out"))
    frozen = [name for name in start if "visual" not in name or "merger" in name]
    assert all(torch.equal(start[name], end[name]) for name in frozen)
    assert found["untouched"]["identical"] == len([name for name in frozen if name != "lm_head.weight"])  # tied
    assert any(not torch.equal(load_model("tiny").state_dict()[name], end[name]) for name in frozen)


def processor_of_tiny(folder: Path) -> None:
    from vlm_dft.models import load_processor

    load_processor("tiny").save_pretrained(folder)


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(match: str, run: Path, out: Path, **words: Any) -> None:
    with pytest.raises(ModelError, match=match):
        export(str(run), out, **words)
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))


def test_a_merge_that_loses_a_layer_is_refused(adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraModel

    merge = LoraModel.merge_and_unload

    def lossy(self: Any, *args: Any, **words: Any) -> Any:
        layer = self.model.model.language_model.layers[1].self_attn.v_proj
        torch.nn.init.zeros_(layer.lora_B["default"].weight)
        return merge(self, *args, **words)

    monkeypatch.setattr(LoraModel, "merge_and_unload", lossy)
    refused(
        "logits on 4 pictures of the merged model differ by .* float32 allows 0.0001. Nothing was",
        adapted,
        tmp_path / "out",
        merge=True,
    )


def test_a_folder_that_lost_its_tower_is_refused(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration as Model

    save = Model.save_pretrained

    def lossy(self: Any, folder: Path, **words: Any) -> None:
        save(self, folder, **words)
        held = load_file(folder / "model.safetensors")
        save_file(
            {k: v for k, v in held.items() if "visual.blocks.1" not in k},
            folder / "model.safetensors",
            {"format": "pt"},
        )

    monkeypatch.setattr(Model, "save_pretrained", lossy)
    refused(r"does not load as it should: missing keys \['model.visual.blocks.1", whole, tmp_path / "out")


def test_a_frozen_weight_that_is_not_the_base_s_is_refused(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    file = run / "checkpoint-2" / "model.safetensors"
    held = load_file(file)
    key = next(key for key in held if "visual.blocks.0.attn.proj.weight" in key)
    held[key] = held[key] + 1e-6
    save_file(held, file, {"format": "pt"})
    refused(
        r"changed model.visual.blocks.0.attn.proj.weight, which were not trained .1 parameters", run, tmp_path / "out"
    )


def test_mistakes_are_told_before_a_model_is_loaded(adapted: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    for run, out, words, match in (
        (whole, "out", {"merge": True, "dtype": None}, "holds no LoRA adapter, so there is nothing to merge. Leave out --merge"),
        (whole, "out", {"merge": False, "dtype": "fp8"}, "--dtype must be one of fp32, bf16, found 'fp8'"),
        (adapted, "out", {"merge": False, "dtype": "bf16"}, "--dtype is for whole weights"),
        (adapted, "full", {"merge": True, "dtype": None}, "exists and is not an empty folder. Nothing is overwritten"),
        (adapted, "a/b", {"merge": True, "dtype": None}, "does not exist. Make it first"),
        (tmp_path / "full", "out", {"merge": True, "dtype": None}, "holds no whole checkpoint. Train first"),
        (tmp_path / "none", "out", {"merge": True, "dtype": None}, "No folder at"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            check_export(str(run), tmp_path / out, **words)  # type: ignore[arg-type]
    assert (tmp_path / "full" / "thesis.txt").is_file()


def test_a_run_stands_for_its_best_checkpoint_else_for_its_last(adapted: Path, tmp_path: Path) -> None:
    assert find_source(str(adapted)).checkpoint.name == "checkpoint-3"
    assert find_source(str(adapted / "checkpoint-1")).checkpoint.name == "checkpoint-1"
    run = tmp_path / "run"
    shutil.copytree(adapted, run)
    file = run / "finished.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "checkpoint": "checkpoint-2"}))
    assert find_source(str(run)).checkpoint.name == "checkpoint-2"
    (tmp_path / "both").mkdir()
    shutil.copytree(adapted, tmp_path / "both" / "dft")
    with pytest.raises(ConfigError, match="It holds the objectives dft: name one of those folders"):
        find_source(str(tmp_path / "both"))


def test_the_command_exports_and_writes_what_was_checked(
    adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(adapted), str(tmp_path / "out"), "--merge", "--json", str(tmp_path / "found.json")]
    assert main(words) == 0
    assert (
        "33 parameters that were not trained are the base's bit for bit, 25 of them of vision"
        in capsys.readouterr().out
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["merged"] and found["agreement"]["merged"] < 1e-5
    assert main(words) == 2 and "Nothing is overwritten" in capsys.readouterr().err
