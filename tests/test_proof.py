"""The proof by gradients, and the parts' own rates, under every engine: what was to be frozen is, what was to be trained moves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import ROOT, apart, launch, torchrun

from vlm_dft.models import load_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
SPLITS: dict[str, dict[str, int]] = {"1x1x8": {}, "2x2x2": {"micro_batch": 2, "accumulation": 2}}
RATES = {"vision": [0.02, 0.5], "merger": [0.1, 0.0], "language": [0.05, 0.1], "head": [0.01, 0.2]}
CASES: dict[str, dict[str, Any]] = {
    "rates": {"rates": RATES, "decay": 0.1, "steps": 3},
    "lora": {"parts": {"lora": ["language", "vision"], "whole": ["merger", "head"]}, "rates": {"merger": [0.01, 0.0]}},
    "late": {"rows": "late"},
    "mute": {"rows": "mute"},
    "unfrozen": {"parts": {"whole": ["language", "head"]}, "mistake": "unfrozen"},
    "unfrozen lora": {"parts": {"lora": ["language"]}, "mistake": "unfrozen"},
    "detached": {"mistake": "detached"},
    "detached lora": {"parts": {"lora": ["vision", "language"]}, "mistake": "detached"},
}
ENGINES = ["none", "ddp", "fsdp2", "zero2", "zero3"]
Results = Callable[[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """(engine, case) -> what became of it; an engine's cases are run at the first call for it."""
    folder, said = tmp_path_factory.mktemp("proof"), {}

    def result(engine: str, case: str) -> dict[str, Any]:
        split = "1x1x8" if engine == "none" else "2x2x2"
        if engine not in said:
            cases = {f"{engine} {name}": {**CASES[name], **SPLITS[split]} for name in CASES}
            group = {"engine": engine, "processes": int(split[0]), "seconds": 180, "cases": cases}
            (folder / "groups.json").write_text(json.dumps([group]))
            said[engine] = launch([str(ROOT / "tests/parts_worker.py"), str(folder)], 200)
        file = folder / f"{engine} {case}.pt"
        if not file.is_file():
            pytest.fail(f"{file.stem} did not end. stderr:\n{said[engine][-6000:]}")
        found: dict[str, Any] = torch.load(file)
        if "refused" not in found:
            assert found["world_size"] == int(split[0])
            assert found["held"] == pytest.approx(0.5 if engine in ("fsdp2", "zero3") else 1.0, abs=0.01)
        return found

    return result


@pytest.mark.parametrize("engine", ENGINES)
def test_parts_with_rates_of_their_own_end_in_the_weights_of_one_process(engine: str, results: Results) -> None:
    found, expected = results(engine, "rates"), results("none", "rates")
    assert apart(found, expected) < 1e-4
    rows = found["logs"]
    assert [row["learning_rate/merger"] for row in rows] == pytest.approx([0.1] * 3)
    assert [row["learning_rate/head"] for row in rows] == pytest.approx([0.01] * 3)
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.05] * 3)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_trained_part_is_proved_with_the_gradient_norm_of_one_process(engine: str, results: Results) -> None:
    for case in ("rates", "lora"):
        found, expected = results(engine, case)["proved"], results("none", case)["proved"]
        assert list(found) == list(expected) and len(found) == 4
        for part, row in expected.items():
            assert row["step"] == 1 and row["gradient_norm"] > 0
            assert found[part] == {**row, "gradient_norm": pytest.approx(row["gradient_norm"], rel=1e-3)}


@pytest.mark.parametrize("engine", ENGINES)
def test_whole_parts_beside_lora_are_trained_as_in_one_process(engine: str, results: Results) -> None:
    found, expected = results(engine, "lora"), results("none", "lora")
    assert apart(found, expected) < 1e-3
    moved = {k for k, start in found["start"].items() if not torch.equal(start, found["end"][k])}
    assert {k for k in found["start"] if "modules_to_save" in k} <= moved
    assert all("lora_" in k or "modules_to_save" in k for k in moved)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_sees_is_proved_at_the_first_step_with_a_picture(engine: str, results: Results) -> None:
    found = results(engine, "late")["proved"]
    assert {part: row["step"] for part, row in found.items()} == {"language": 1, "head": 1, "vision": 2, "merger": 2}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_without_a_target_proves_nothing_and_the_next_does(engine: str, results: Results) -> None:
    assert {row["step"] for row in results(engine, "mute")["proved"].values()} == {2}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", ["unfrozen", "unfrozen lora"])
def test_one_parameter_that_was_unfrozen_by_hand_is_found(case: str, engine: str, results: Results) -> None:
    said = results(engine, case)["refused"]
    assert "step 1, 1 parameters that were to stay frozen have a gradient: model.visual.blocks.1.norm1.weight." in said


def test_under_zero3_a_run_counts_whole_parameters_and_proves_what_it_trains(tmp_path: Path) -> None:
    """By train_objective under torchrun: each process holds half of every parameter. And with a learning rate of a part's own
    an optimiser of DeepSpeed's file, which would not have it, is refused."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"), "auto")
    file = {"zero_optimization": zero, "zero_allow_untested_optimizer": True, "gradient_clipping": "auto", **auto}
    (tmp_path / "engine.json").write_text(json.dumps(file))
    words = {"engine": str(tmp_path / "engine.json"), "vision_learning_rate": 0.1, "merger_weight_decay": 0.0}
    torchrun(
        tmp_path, whole=words, lora={**words, "lora": 4, "train_parts": "vision,merger", "language_learning_rate": 0.3}
    )
    whole, lora = (json.loads((tmp_path / name / "parts.json").read_text()) for name in ("whole", "lora"))
    sizes = {"vision": 183_424, "merger": 98_752, "language": 673_408}
    assert {part: row["parameters"] for part, row in whole["parts"].items()} == sizes
    assert {part: row["trainable"] for part, row in whole["parts"].items()} == sizes
    assert lora["parts"]["language"] == {
        **lora["parts"]["language"], "parameters": 673_408 + 29_184, "trainable": 29_184, "lora_modules": 21, "learning_rate": 0.3,
    }  # fmt: skip
    assert {part: row["trainable"] for part, row in lora["parts"].items() if part != "language"} == {
        part: sizes[part] for part in ("vision", "merger")
    }
    assert set(whole["proved"]) == set(lora["proved"]) == set(sizes)
    start, end = load_model("tiny").state_dict(), load_model(str(tmp_path / "lora" / "checkpoint-3")).state_dict()
    assert all(not torch.equal(start[k], end[k]) for k in start if ".visual." in k)

    (tmp_path / "engine.json").write_text(
        json.dumps({**file, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}})
    )
    with pytest.raises(pytest.fail.Exception, match="leave the block out, and set optim"):
        torchrun(tmp_path, refused=words)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_detached_merger_is_found(engine: str, results: Results) -> None:
    said = results(engine, "detached")["refused"]
    assert "trained parameters of vision have no gradient: model.visual.patch_embed.proj.weight" in said
    assert "of vision have no gradient: model.visual.blocks.0" in results(engine, "detached lora")["refused"]
