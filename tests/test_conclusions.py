"""Conclusions: a comparison in words; literal sentences."""

from __future__ import annotations

from typing import Any

from vlm_dft.conclusions import also_said, conclusion, needed, said_p


def row(**given: Any) -> dict[str, Any]:
    known = {"run": "DFT", "against": "SFT", "difference": 0.019, "low": -0.004, "high": 0.042, "p_value": 0.11, "count": 1000,
             "samples_needed": 2345, "detectable": 0.03, "benchmark": "quiz", "split": "test", "rule": "official",
             "group": None, "p_adjusted": None}  # fmt: skip
    return {**known, **given}


def test_a_conclusion_says_in_words_what_is_known() -> None:
    start = "DFT − SFT: +1.9 points, 95 % interval [−0.4, 4.2], p = 0.11"
    assert (
        conclusion(row())
        == f"{start}: not settled; about 2,300 samples would be needed to settle a difference of this size (here: 1,000)"
    )
    assert (
        conclusion(row(samples_needed=900)) == f"{start}: not settled; there are too few seeds or problems to test it"
    )
    assert conclusion(row(samples_needed=None)).startswith(f"{start}: not settled, and more samples alone would not do")
    assert conclusion(row(p_value=0.003)).endswith("p = 0.003: settled, DFT is better than SFT")
    assert conclusion(row(p_value=1e-9, difference=-0.02)).endswith("p < 0.0001: settled, SFT is better than DFT")
    assert "no difference seen; with these samples one of under 3.0 points may go unnoticed" in conclusion(
        row(difference=0, p_value=1.0, samples_needed=None)
    )
    assert "about 2,300 problems would" in conclusion(row(group="metric"))
    assert conclusion(row(difference=0.2, p_value=0.03, p_adjusted=0.3)).endswith(
        "(here: 1,000)"
    )  # corrected where it can be
    assert [said_p(p) for p in (0.0499, 0.04996, 0.051, 0.11, 0.003, 1e-9, None)] == [
        "0.0499",
        "0.04996",
        "0.051",
        "0.11",
        "0.003",
        "< 0.0001",
        "",
    ]  # none is said to be the level
    told = [
        row(p_value=0.03, samples_needed=5000),
        row(),
        row(samples_needed=None),
        row(samples_needed=900),
        row(samples_needed=10**7),
    ]
    assert list(map(needed, told)) == ["settled", "2,300", "–", "–", "over 1 M"]


def test_another_rules_other_verdict_and_sure_groups_are_said() -> None:
    first = row(p_value=0.01)
    other = row(rule="robust", p_value=0.4)
    group = {**row(difference=0.2), "group": "level", "p_adjusted": 0.01}
    rows = [first, other, {**group, "value": "1"}, {**group, "value": "2", "p_adjusted": 0.2}]
    report = {"benchmarks": {"quiz": {"test": {"comparisons": rows}}}}
    assert list(also_said(report, first)) == [
        "not so by the robust rule: +1.9 points, 95 % interval [−0.4, 4.2], p = 0.40: not settled; about 2,300 samples would be needed "
        "to settle a difference of this size (here: 1,000)",
        "in 1 of 2 groups, corrected for their number: level 1 (+20.0)",
    ]
