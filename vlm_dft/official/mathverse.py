r"""MathVerse's rule without its judges: a response and a record in, a Score out.

Official is GPT twice (ZrrSkywalker/MathVerse at 937b090, evaluation/{extract_answer_s1,score_answer_s2}.py): one extracts, one judges
whether that and the gold answer say the same; string equality (`--quick_match`) is all that a rule decides there. This stands in for
both, so that scoring needs no model: what the response states, by the letter or the text of the option (the options stand in the
question), or equal in meaning to a free-form answer. It is the robust rule, told where the options are and what the golds mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlm_dft.latex_text import latex_text
from vlm_dft.option_reading import options_asked
from vlm_dft.quantities import read_quantity
from vlm_dft.robust import score_robust
from vlm_dft.verdicts import Score

_NAMED = re.compile(r"\A\s*[A-Z][A-Za-z ]{2,}(?=\$?\s*=)")  # "Circumference $=50.27 \mathrm{~cm}$"
_SEVERAL = re.compile(r"\(?[A-H]\)?(?:\s*[,\n]\s*\(?[A-H]\)?)+")


def score_mathverse(response: str, sample: Mapping[str, Any]) -> Score:
    """What the response states, equal in meaning to the gold answer. Of a gold of several letters ("C\\nD") all are wanted."""
    gold = mathverse_gold(str(sample["gold_answer"]))
    choices = sample.get("choices") or options_asked(str(sample.get("question") or ""))
    asked = {**sample, "gold_answer": gold, "choices": None if _SEVERAL.fullmatch(gold) else choices or None}
    if not choices and read_quantity(latex_text(gold)) is not None:
        asked["answer_type"] = "number"  # so that it is found in a sentence
    return score_robust(response, asked)


def mathverse_gold(gold: str) -> str:
    """A gold answer without what its file added: the degree sign misread as Chinese, a name before "=", "T" after a bearing."""
    gold = gold.strip().replace("\u63b3", "\N{DEGREE SIGN}")
    gold = re.sub(r"(?<=\N{DEGREE SIGN})\s*T\Z", "", gold)
    named = _NAMED.match(gold)
    return gold[named.end() :].strip("$ ").removeprefix("=").strip() if named else gold
