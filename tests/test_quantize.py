"""QLoRA: the language model's layers in nf4 or int8, all the rest as it was, trained, resumed and merged into the base as it is.

Needs bitsandbytes, which runs on CPU too: pip install bitsandbytes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import config_of

from vlm_dft.config import TrainConfig
from vlm_dft.export import export
from vlm_dft.models import load_model
from vlm_dft.runs import write_provenance
from vlm_dft.training import prepare_model, train_objective

bitsandbytes = pytest.importorskip("bitsandbytes")
torch.set_num_threads(1)
KINDS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}


def config(kind: str, **words: Any) -> TrainConfig:
    return config_of(lora=4, train_parts="merger", quantize=kind, warmup=0, **words)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_language_models_linear_layers_are_quantised(kind: str) -> None:
    model, parts, _ = prepare_model(config(kind))
    packed = {name for name, module in model.named_modules() if type(module) is getattr(bitsandbytes.nn, KINDS[kind])}
    assert len(packed) == 21 and all(".language_model.layers." in name for name in packed)
    for name, parameter in model.named_parameters():
        if not any(name.startswith(f"{place}.weight") for place in packed):
            assert parameter.dtype == torch.float32, name
    sizes = {part: row["parameters"] for part, row in parts.rows.items()}
    assert sizes == {"vision": 183_424, "merger": 98_752, "language": 673_408 + 29_184}
    assert parts.rows["language"]["weights"] == f"fp32 + {kind}"
    assert parts.precision.startswith(f"{kind} language model, products in")


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_run_trains_resumes_and_merges_into_the_base_that_is_not_quantised(
    kind: str, drawn: list[Any], tmp_path: Path
) -> None:
    words = config(kind, max_steps=4, save_steps=2)
    train_objective(words, "nll", drawn, tmp_path / "whole")
    train_objective(words, "nll", drawn, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    train_objective(words, "nll", drawn, tmp_path / "cut")
    ends = [load_model(str(tmp_path / name / "checkpoint-4")).state_dict() for name in ("whole", "cut")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    proved = json.loads((tmp_path / "cut" / "parts.json").read_text())["proved"]
    assert set(proved) == {"merger", "language"}
    write_provenance(tmp_path / "cut", words)
    found = export(str(tmp_path / "cut"), tmp_path / "out", merge=True)
    assert found["untouched"] == {"identical": 33, "vision": 25}
    out = load_model(str(tmp_path / "out")).state_dict()
    assert all(torch.equal(out[name], ends[1][name]) for name in out)
    assert f"which was trained on in {kind} and is not quantised here" in (tmp_path / "out" / "README.md").read_text()
