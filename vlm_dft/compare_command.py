"""Compare command: the words of `vlm-dft compare` in, exit status out."""

from __future__ import annotations

from typing import Any


def add_compare(commands: Any) -> None:
    """Add `compare` to the parser's commands. Imports nothing heavy."""
