"""Run folders: files whole or absent, checkpoints whole or passed over, provenance that suffices."""

import json
from pathlib import Path

import pytest

from vlm_dft.config import resolve_config
from vlm_dft.errors import ConfigError
from vlm_dft.runs import claim_folder, default_output, versions, write_json, write_provenance


def test_the_default_folder_names_recipe_model_and_objectives() -> None:
    config = resolve_config(
        ("test", {"model": "Qwen/Qwen2.5-VL-3B-Instruct", "recipe": "my/own.yaml", "objective": "dft,nll"})
    )
    assert default_output(config) == "runs/own-qwen2.5-vl-3b-instruct-dft+nll"


def test_the_same_run_may_continue_with_other_micro_batches_but_not_other_settings(tmp_path: Path) -> None:
    config = resolve_config(("test", {"output": str(tmp_path)}))
    claim_folder(tmp_path, config)
    write_provenance(tmp_path, config)
    claim_folder(tmp_path, resolve_config(("test", {"output": str(tmp_path), "epochs": 2})))  # nothing was saved in it
    (tmp_path / "checkpoint-3").mkdir()
    claim_folder(tmp_path, resolve_config(("test", {"output": str(tmp_path), "micro_batch": 2})))
    with pytest.raises(ConfigError, match=r"epochs: 1.0 there, 2.0 now"):
        claim_folder(tmp_path, resolve_config(("test", {"output": str(tmp_path), "epochs": 2})))


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"new": float("nan")})
    assert (tmp_path / "a.json").read_text() == '{\n  "old": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_versions_name_the_packages_the_commit_and_the_machine() -> None:
    found = versions()
    assert found["packages"]["torch"] and found["packages"]["transformers"]
    assert found["machine"]["cores"] >= 1
    root = Path(__file__).resolve().parent.parent
    assert (found["commit"] is not None) == (root / ".git").exists()


def test_a_run_that_goes_on_elsewhere_keeps_what_it_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve_config(("test", {"output": str(tmp_path)}))
    write_provenance(tmp_path, config)
    first = json.loads((tmp_path / "versions.json").read_text())
    (tmp_path / "checkpoint-3").mkdir()
    write_provenance(tmp_path, config)
    assert json.loads((tmp_path / "versions.json").read_text()) == first
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    write_provenance(tmp_path, config)
    found = json.loads((tmp_path / "versions.json").read_text())
    assert found["environment"] == first["environment"]
    assert [row["environment"]["variables"]["NCCL_DEBUG"] for row in found["continued"]] == ["INFO"]
