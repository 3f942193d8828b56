"""The robust rule: a response and a record in, a Score out; the same for every benchmark, and an abstention where nothing is answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_dft.verdicts import Score


def score_robust(response: str, sample: Mapping[str, Any]) -> Score:
    """To be written."""
    return Score(False, None, "to be written")
