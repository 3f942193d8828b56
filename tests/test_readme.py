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
