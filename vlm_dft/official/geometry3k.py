"""Geometry3K's official rule: a response and a record in, a Score out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_dft.verdicts import Score


def score_geometry3k(response: str, sample: Mapping[str, Any]) -> Score:
    """To be written."""
    raise NotImplementedError
