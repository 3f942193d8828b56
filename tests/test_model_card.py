"""The model card: what the run's files say stands in it, and what they do not say does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlm_dft.config import TrainConfig
from vlm_dft.model_card import model_card, read_facts, write_card
from vlm_dft.runs import environment

MEASURED = {
    "accuracy": 0.625,
    "stderr": 0.0524,
    "count": 80,
    "groups": {"task": {"bars": {"accuracy": 0.5, "stderr": 0.1, "count": 24}}},
}
BASE = {
    "accuracy": 0.5,
    "stderr": 0.0556,
    "count": 80,
    "groups": {"task": {"bars": {"accuracy": 0.25, "stderr": 0.09, "count": 24}}},
}
PARTS = {
    "precision": "fp32 master weights, bf16 autocast",
    "parts": {
        "vision": {"parameters": 668_000_000, "trainable": 0, "weights": "fp32"},
        "language": {"parameters": 3_085_000_000, "trainable": 30_000_000, "weights": "fp32", "lora_modules": 252, "lora_targets": ["q_proj"],
                     "learning_rate": 2e-4, "weight_decay": 0.01},
    },
    "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.05, "targets": {"language": [r"layers\.\d+\.(q_proj|v_proj)"]}},
    "proved": {"language": {"step": 1, "gradient_norm": 0.5, "parameters": 504}},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder of two objectives, as the front door leaves it."""
    config = TrainConfig(
        model="Qwen/Qwen2.5-VL-3B-Instruct",
        objective=["dft", "nll"],
        lora=16,
        batch_size=64,
        micro_batch=2,
        processes=8,
    )
    files: dict[str, Any] = {
        "config.yaml": config.as_dict(),
        "recipe.yaml": {"name": "tabmwp", "description": "Tables.", "licence": "CC BY-NC-SA 4.0", "source": {"files": "x"}},
        "benchmark.yaml": {"name": "tabmwp"},
        "accounting.json": {"sources": [], "total": {"read": 23_059, "used": 23_000, "examples": 23_000, "duplicates": 3,
                            "dropped": {"over max_length = 4096 tokens": 59}, "changed": {}, "tokens": {"all": 9_000_000}, "fingerprint": "ab" * 32}},
        "versions.json": {"packages": {"torch": "2.14.1", "flash-attn": None}, "python": "3.11.7", "commit": "c0ffee",
                          "environment": {"gpus": ["NVIDIA H100", "NVIDIA H100"]}},
        "report.json": {"runs": {"base": {"test": BASE}, "dft": {"test": MEASURED}, "nll": {"test": BASE}},
                        "training": {"dft": {"steps": 360, "last": {"loss": 0.125, "nll": 0.75}}, "nll": {"steps": 360}}},
    }  # fmt: skip
    for name, found in files.items():
        text = yaml.safe_dump(found) if name.endswith("yaml") else json.dumps(found)
        (tmp_path / name).write_text(text)
    for objective in ("dft", "nll"):
        (tmp_path / objective).mkdir()
        (tmp_path / objective / "parts.json").write_text(json.dumps(PARTS))
    return tmp_path


def front_of(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_a_card_states_base_data_batch_parts_versions_and_scores_with_their_errors(run: Path) -> None:
    write_card(run / "dft", run / "dft")
    card = (run / "dft" / "README.md").read_text()
    assert front_of(card) == {
        "base_model": "Qwen/Qwen2.5-VL-3B-Instruct", "base_model_relation": "adapter", "library_name": "peft",
        "pipeline_tag": "image-text-to-text", "tags": ["vlm-dft", "vision-language", "lora"],
    }  # fmt: skip
    for line in (
        "`Qwen/Qwen2.5-VL-3B-Instruct`, fine-tuned with vlm-dft, objective `dft` (a LoRA adapter).",
        "| recipe | tabmwp: Tables. |", "| licence of the data | CC BY-NC-SA 4.0 |", "| rows | 23,059 read, 23,000 used |",
        "| dropped | 59: over max_length = 4096 tokens |", "| the same as an earlier row | 3 |", "| tokens | 9,000,000 all |",
        "| optimiser steps | 360 |",
        "| batch | 64 examples = 8 processes x 2 x 4 accumulated |", "| nll of the last logged steps | 0.7500 |",
        "| vision | 668,000,000 | frozen |  |  |  | fp32 |  |",
        "| language | 3,085,000,000 | 30,000,000 | 252 | 0.0002 | 0.01 | fp32 | step 1 |",
        "Precision: fp32 master weights, bf16 autocast.",
        r"LoRA: rank 16, alpha 32, dropout 0.05, on `layers\.\d+\.(q_proj|v_proj)`.",
        "| torch | 2.14.1 |", "| commit of vlm-dft | `c0ffee` |", "| GPUs | NVIDIA H100, NVIDIA H100 |",
        "| tabmwp | n | base | dft |", "| test | 80 | 50.0 ± 5.6 | 62.5 ± 5.2 |", "| test, bars | 24 | 25.0 ± 9.0 | 50.0 ± 10.0 |",
        'base = AutoModelForImageTextToText.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct", dtype="auto")',
    ):  # fmt: skip
        assert line in card.splitlines(), line
    assert "flash-attn" not in card and "license" not in front_of(card)


def test_epochs_are_left_out_where_max_steps_ends_the_run(run: Path) -> None:
    facts = read_facts(run / "dft")
    assert "| epochs | 1 |" in model_card(facts)
    facts["config"]["trainer"] = {"max_steps": 7}
    card = model_card(facts)
    assert "| epochs |" not in card and "| max_steps | 7 |" in card


def test_what_a_folder_does_not_say_is_left_out(tmp_path: Path) -> None:
    card = model_card(read_facts(tmp_path))
    assert front_of(card).keys() == {"library_name", "pipeline_tag", "tags"}
    titles = [line for line in card.splitlines() if line.startswith("#")]
    assert titles == [f"# {tmp_path.name}", "## Use"]
    assert "None" not in card and "nan" not in card


def test_a_merged_folder_says_what_was_checked_and_is_loaded_by_transformers_alone(run: Path) -> None:
    exported = {"base": "Qwen/Qwen2.5-VL-3B-Instruct", "adapter": False, "merged": True, "dtype": "bfloat16",
                "agreement": {"merged": 8e-7, "reloaded": 6.8e-3}, "untouched": {"identical": 33, "vision": 25}}  # fmt: skip
    facts = read_facts(run / "nll")
    facts["config"]["parts"] = {"quantize": "nf4"}
    card = model_card(facts, exported)
    assert front_of(card)["library_name"] == "transformers" and front_of(card)["base_model_relation"] == "finetune"
    assert "| logits on pictures, reloaded | differ by 6.8e-03 of their size |" in card
    assert "merged into the base, which was trained on in nf4 and is not quantised here" in card
    assert "objective `nll`" in card and "PeftModel" not in card


def test_the_licence_is_the_base_models_own_and_only_where_it_is_known(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for front, expected in (("license: mit\n", "mit"), ("tags: [x]\n", None)):
        (base / "README.md").write_text(f"---\n{front}---\n\n# Base\n")
        found = front_of(model_card({"name": "x", "config": {}}, {"base": str(base), "adapter": True}))
        assert found.get("license") == expected
        assert "base_model" not in found  # a folder of this machine means nothing elsewhere


def test_the_environment_names_what_matters_and_no_secret_or_host(monkeypatch: pytest.MonkeyPatch) -> None:
    import platform

    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HF_HUB_TOKEN", "hf_secret")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    found = environment()
    assert found["variables"]["NCCL_DEBUG"] == "INFO" and found["variables"]["TOKENIZERS_PARALLELISM"] == "false"
    assert found["launcher"] == "torchrun"
    assert "hf_secret" not in json.dumps(found) and f'"{platform.node()}"' not in json.dumps(found)
