"""Drawn answers: the same whatever they are drawn beside, as likely as the model says, and refused where they cannot be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_generation import sample

from vlm_dft.collators import ChatCollator
from vlm_dft.decoding import Decoding
from vlm_dft.drawing import SeededDraws
from vlm_dft.errors import ConfigError
from vlm_dft.generation import answers, generate

DRAWN = Decoding(samples=3, temperature=1.5, seed=7)


@pytest.fixture(scope="module")
def model() -> Any:
    from vlm_dft.models import load_model

    return load_model("tiny")


@pytest.fixture
def samples() -> list[Any]:
    texts = ["How tall is the red bar?", "?", "What is the total?", "How many blue circles are in the picture?", "Go"]
    return [sample(k, text) for k, text in enumerate(texts)]


def drawn(model: Any, processor: Any, samples: list[Any], path: Path, **words: Any) -> bytes:
    path.parent.mkdir(exist_ok=True)
    generate(model, ChatCollator(processor), samples, path, show=False, decoding=DRAWN, **words)
    return path.read_bytes()


def test_draws_do_not_depend_on_the_batch_that_they_are_drawn_in(
    model: Any, processor: Any, samples: list[Any], tmp_path: Path
) -> None:
    by_size = {n: drawn(model, processor, samples, tmp_path / f"{n}.jsonl", batch_size=n) for n in (1, 3, 8)}
    assert by_size[1] == by_size[3] == by_size[8]
    rows = answers(model, ChatCollator(processor), samples, decoding=DRAWN)
    assert [(row["id"], row["draw"]) for row in rows] == [(f"s{k}", draw) for k in range(5) for draw in range(3)]
    assert len({row["response"] for row in rows if row["id"] == "s0"}) == 3
    alone = answers(model, ChatCollator(processor), samples[3:4], decoding=DRAWN)
    assert alone == [row for row in rows if row["id"] == "s3"]
    other = answers(model, ChatCollator(processor), samples[3:4], decoding=Decoding(3, 1.5, seed=8))
    assert [row["response"] for row in other] != [row["response"] for row in alone]


def test_draws_are_the_same_after_a_kill(model: Any, processor: Any, samples: list[Any], tmp_path: Path) -> None:
    whole = drawn(model, processor, samples, tmp_path / "whole.jsonl", batch_size=4)
    lines = whole.splitlines(keepends=True)
    for kept in (0, 1, 7, 14):
        path = tmp_path / str(kept) / "predictions.jsonl"
        drawn(model, processor, samples, path, batch_size=4)
        path.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])  # as an unfinished run leaves it
        assert drawn(model, processor, samples, path, batch_size=4) == whole


def test_a_token_is_drawn_as_often_as_the_model_says(model: Any) -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    scores, count = probabilities.log().repeat(4000, 1), 4000
    numbers = torch.from_numpy(Decoding(1, 1.0, seed=3).uniforms(((f"id{k}", 0) for k in range(count)), 1))
    ids = torch.zeros(count, 5, dtype=torch.long)
    chosen = SeededDraws(numbers, 5, temperature=1.0)(ids, scores).argmax(-1)
    shares = torch.bincount(chosen, minlength=4) / count
    for share, p in zip(shares.tolist(), probabilities.tolist(), strict=True):
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / count)
    half = SeededDraws(numbers, 5, temperature=1.0, top_p=0.7)(ids, scores).argmax(-1)
    shares = torch.bincount(half, minlength=4) / count
    assert shares[2] == shares[3] == 0 and abs(shares[0] - 2 / 3) < 4 * math.sqrt(2 / 9 / count)
    cold = SeededDraws(numbers, 5, temperature=0.5)(ids, scores).argmax(-1)  # p^2, normalised: 0.25 of 0.34375
    assert abs((cold == 0).float().mean() - 0.25 / 0.34375) < 4 * math.sqrt(0.2 / count)


def test_only_tokens_with_probability_are_drawn_at_the_very_ends() -> None:
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(2, 1)
    numbers = torch.tensor([[0.0], [math.nextafter(1.0, 0.0)]], dtype=torch.float64)
    chosen = SeededDraws(numbers, 1, temperature=1.0)(torch.zeros(2, 1, dtype=torch.long), scores).argmax(-1)
    assert chosen.tolist() == [1, 3]


def test_the_numbers_of_a_draw_are_its_own() -> None:
    decoding = Decoding(2, 1.0, seed=1)
    both = decoding.uniforms([("a", 0), ("b", 1)], 6)
    assert np.array_equal(both[1], decoding.uniforms([("b", 1)], 9)[0, :6])  # neither the rows beside it nor the length
    assert len({tuple(Decoding(2, 1.0, seed=s).uniforms([(i, d)], 2)[0]) for s in (1, 2) for i in "ab" for d in (0, 1)}) == 8  # fmt: skip
    assert 0 <= decoding.server_seed("a", 0) < 2**31 and decoding.server_seed("a", 0) != decoding.server_seed("a", 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"samples": 4}, "4 greedy responses to a sample would be the same. Set a temperature above 0"),
        ({"samples": 0}, "samples must be at least 1, found 0"),
        ({"temperature": -1.0}, r"temperature must lie in \[0, 100\], found -1"),
        ({"temperature": math.nan}, "temperature must lie in"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p must lie in \(0, 1\], found 0"),
        ({"top_p": 0.9}, "top_p = 0.9 belongs to draws"),
        ({"seed": -1}, "seed must lie in"),
    ],
)
def test_decoding_that_cannot_be_is_refused(words: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Decoding(**words)


def test_another_seed_is_refused_and_not_mixed(model: Any, processor: Any, samples: list[Any], tmp_path: Path) -> None:
    before = drawn(model, processor, samples[:1], tmp_path / "p.jsonl")
    with pytest.raises(ConfigError, match=r"decoding: \{.*'seed': 7\} there, \{.*'seed': 8\} now"):
        generate(model, ChatCollator(processor), samples[:1], tmp_path / "p.jsonl", decoding=Decoding(3, 1.5, seed=8))
    assert (tmp_path / "p.jsonl").read_bytes() == before
