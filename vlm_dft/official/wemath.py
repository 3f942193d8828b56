"""We-Math's official rule: a response and a record in, a Score out; We-Math/We-Math at a57a0e8, evaluation/four_dimensional_metrics.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlm_dft.verdicts import Score

_DRESS = re.compile(r"[><:.]")


def score_wemath(response: str, sample: Mapping[str, Any]) -> Score:
    """The first character after the last "Answer" (of the whole response where there is none), if it is one of A to H.

    So "Based on it" answers B, and "(B)" nothing. What groups of questions make of it is `metrics`' four_dimensional.
    """
    _, mark, after = response.rpartition("Answer")
    letter = _DRESS.sub("", after.strip()).strip()[:1]
    if not letter or letter not in "ABCDEFGH":
        return Score(False, None, "no letter after Answer" if mark else "no leading letter")
    return Score(letter == str(sample["gold_answer"]), letter, "letter after Answer" if mark else "leading letter")
