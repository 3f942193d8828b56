"""Official rules: one module a benchmark, each a response and a record in, the verdict of its authors' code out."""

from __future__ import annotations

from vlm_dft.official.drawn import score_drawn
from vlm_dft.official.dynamath import score_dynamath
from vlm_dft.official.geometry3k import score_geometry3k
from vlm_dft.official.gsm8k import score_gsm8k
from vlm_dft.official.logicvista import score_logicvista
from vlm_dft.official.math500 import score_math500
from vlm_dft.official.mathverse import score_mathverse
from vlm_dft.official.mathvision import score_mathvision
from vlm_dft.official.mathvista import score_mathvista
from vlm_dft.official.puzzlevqa import score_puzzlevqa
from vlm_dft.official.scienceqa import score_scienceqa
from vlm_dft.official.tabmwp import score_tabmwp
from vlm_dft.official.wemath import score_wemath
from vlm_dft.verdicts import Scorer

OFFICIAL: dict[str, Scorer] = {
    "drawn": score_drawn,
    "dynamath": score_dynamath,
    "geometry3k": score_geometry3k,
    "gsm8k": score_gsm8k,
    "logicvista": score_logicvista,
    "math500": score_math500,
    "mathverse": score_mathverse,
    "mathvision": score_mathvision,
    "mathvista": score_mathvista,
    "puzzlevqa": score_puzzlevqa,
    "scienceqa": score_scienceqa,
    "tabmwp": score_tabmwp,
    "wemath": score_wemath,
}
"""The official scorer of each benchmark, by name."""
