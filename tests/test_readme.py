"""The README's code runs as printed, and its first screen holds the two commands."""

import re
from pathlib import Path

import pytest
from PIL import Image

from vlm_dft.locate import resolve_model

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_are_on_the_first_screen() -> None:
    first_screen = "\n".join(README.splitlines()[:25])
    assert "bash scripts/train_qwenvl.sh" in first_screen and "bash scripts/test.sh" in first_screen


def test_the_library_example_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the embedded model in place of the hub's, and a drawn chart.png."""
    code, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)  # the other: test_other_trainers.py
    hub = '"Qwen/Qwen2.5-VL-3B-Instruct"'
    assert code.count(hub) == 1
    Image.new("RGB", (112, 112), "white").save(tmp_path / "chart.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code.replace(hub, repr(resolve_model("tiny"))), "README.md", "exec"), names)
    loss = names["loss"]
    assert 0 < loss.item() < 1 and all(p.grad is not None for p in names["model"].lm_head.parameters())  # type: ignore[attr-defined]


def test_every_path_the_readme_names_is_there() -> None:
    root = Path(__file__).resolve().parent.parent
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (root / path).exists(), path


def test_no_placeholder_is_left() -> None:
    assert "@@" not in README


def test_the_cards_of_the_recipes_readme_read_the_files_that_they_are_for(tmp_path: Path) -> None:
    import csv
    import io
    import json
    import zipfile

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from vlm_dft.cli import main

    buffer = io.BytesIO()
    Image.new("RGB", (80, 60), "teal").save(buffer, "PNG")
    picture = buffer.getvalue()
    for folder in ("images", "data"):
        (tmp_path / folder).mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture)
    turns = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A colour."}]
    (tmp_path / "chats.json").write_text(json.dumps([{"conversations": turns, "image": "a.png"}]))
    row = {"problem": ["Which?"], "answer": ["Teal."], "images": [[{"bytes": picture, "path": None}]]}
    pq.write_table(pa.table(row), tmp_path / "data" / "train-00000.parquet")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["nr", "picture", "question", "answer"], ["1", "bars/1.png", "How high?", "5"]])
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("bars/1.png", picture)
    text = (Path(__file__).resolve().parent.parent / "data_recipes" / "README.md").read_text(encoding="utf-8")
    cards = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(cards) == 4  # the last is the mixture
    for k, card in enumerate(cards[:3]):
        own, told = tmp_path / f"own{k}.yaml", tmp_path / "told.json"
        own.write_text(card)
        words = ["--data", str(tmp_path), "--against", "none", "--workers", "0", "--json", str(told)]
        assert main(["recipes", "check", str(own), *words]) == 0
        found = json.loads(told.read_text())
        assert (found["rows"]["usable"], found["pictures"]["count"]) == (1, 1)
