"""Score command: the words of `vlm-dft score` in, exit status out."""

from __future__ import annotations

from typing import Any


def add_score(commands: Any) -> None:
    """Add `score` to the parser's commands. Imports nothing heavy."""
