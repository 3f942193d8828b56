"""Locate: a model's name in, its folder or hub id out; no torch, nothing loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vlm_dft.cards import PACKAGE
from vlm_dft.errors import ModelError

EMBEDDED = {"tiny": PACKAGE / "embedded" / "tiny-qwen2.5-vl"}


def resolve_model(name: str) -> str:
    """'tiny' -> the embedded folder; a local folder is checked to hold a model; anything else must look like a hub id.

    Reads one small file at most, so it can run before anything slow. Raises ModelError.
    """
    if name in EMBEDDED:
        return str(EMBEDDED[name])
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").is_file() or (path / "config.json").is_file():
            return str(path)
        held = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise ModelError(
            f"{name!r} is not a model folder: expected config.json (or adapter_config.json) in it, found {held}. "
            f"Give the folder of a checkpoint, such as {_newest(path) or 'runs/NAME/checkpoint-100'}."
        )
    if path.exists():
        raise ModelError(
            f"{name!r} is a file. Expected a model folder, a hub id such as Qwen/Qwen2.5-VL-3B-Instruct, or 'tiny'."
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ModelError(
            f"No model at {name!r}. Expected an existing folder, a hub id such as Qwen/Qwen2.5-VL-3B-Instruct, or one of "
            f"{', '.join(EMBEDDED)}."
        )
    return name


def _newest(folder: Path) -> Path | None:
    """The checkpoint of most steps in a run's folder, or in an objective's folder in it."""
    found = [path for pattern in ("checkpoint-*", "*/checkpoint-*") for path in folder.glob(pattern)]
    steps = {path: int(path.name.removeprefix("checkpoint-")) for path in sorted(found) if path.name[11:].isdecimal()}
    return max(steps, key=lambda path: steps[path], default=None)


def base_model(folder: str) -> str:
    """The folder or hub id of the model that a LoRA adapter folder was trained on; any other folder is its own."""
    adapter = Path(folder) / "adapter_config.json"
    if not adapter.is_file():
        return folder
    base = read_mapping(adapter).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ModelError(f"{adapter}: expected the name of a model under base_model_name_or_path, found {base!r}.")
    return resolve_model(base)


def read_mapping(file: Path) -> dict[str, Any]:
    """A JSON file of a model's folder. Raises ModelError, with the file's name, for one that is broken."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: expected JSON, found something else ({error}). Is the folder whole?") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file}: expected a mapping of settings, found {type(found).__name__}. Is the folder whole?")
    return found
