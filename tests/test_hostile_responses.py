"""Hostile responses: every scorer answers each in under a second of its processor's time, runs nothing, and never raises."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hostile import RECORDS, hostile_responses
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_dft.scoring import RULES, Score, score_response

SCORERS = [("official", name) for name in RULES["official"]] + [("robust", "mathvista")]


@pytest.mark.parametrize(("rule", "benchmark"), SCORERS)
def test_hostile_responses_are_scored_in_a_second_each_and_run_nothing(
    rule: str, benchmark: str, tmp_path: Path
) -> None:
    target = tmp_path / "executed"
    slow = {}
    for number, (name, response) in enumerate(hostile_responses(str(target)).items()):
        records = RECORDS if len(response) < 200 else [RECORDS[(number + len(benchmark)) % len(RECORDS)]]
        for record in records:
            begun = time.process_time()
            score = score_response(response, record, benchmark=benchmark, rule=rule)
            if (seconds := time.process_time() - begun) >= 1:
                slow[name, record["gold_answer"]] = seconds
            assert isinstance(score, Score) and score.rule
    assert slow == {}
    assert not target.exists()


PIECES = st.sampled_from(
    ["the answer is ", r"\boxed{", "}", r"\frac{", "(B)", "A.", "3", "**", "=", ",", "$", "\n", "<answer>", '"short answer": "', "Answer: ", "^", "%"]
)  # fmt: skip
RESPONSES = st.text(max_size=80) | st.lists(PIECES, max_size=30).map("".join)


@settings(max_examples=60, deadline=None)
@given(RESPONSES, st.sampled_from(RECORDS), st.sampled_from(SCORERS))
def test_any_response_gets_a_verdict_and_the_same_one_twice(
    response: str, record: dict[str, object], scorer: tuple[str, str]
) -> None:
    rule, benchmark = scorer
    score = score_response(response, record, benchmark=benchmark, rule=rule)
    assert isinstance(score.correct, bool) and (score.extracted is None or isinstance(score.extracted, str))
    assert score_response(response, record, benchmark=benchmark, rule=rule) == score
