"""Mixture cards: what they may say, what is refused, and what a nested mixture is of."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_dft.cards import list_cards
from vlm_dft.config import recipe_layer
from vlm_dft.errors import CardError
from vlm_dft.mixture_cards import sources_in
from vlm_dft.mixture_rows import mixed_places
from vlm_dft.recipes import read_recipe


def write(folder: Path, name: str, mixture: Any, **more: Any) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"description": "d", "licence": "mine", "mixture": mixture, **more}))
    return str(path)


def single(folder: Path, name: str) -> str:
    card = {
        "description": "d",
        "licence": f"licence of {name}",
        "source": {"files": [f"{name}.jsonl"]},
        "messages": None,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(card))
    return f"{name}.yaml"


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    return [single(tmp_path, "one"), single(tmp_path, "two")]


def test_entries_are_found_by_name_and_by_path_from_their_card_and_below_the_data_folder(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    single(tmp_path / "below", "own")
    inner = [{"recipe": "own.yaml", "data": "deep"}, {"recipe": "drawn", "name": "pictures", "loss_weight": 0.5}]
    write(tmp_path / "below", "inner", inner)
    outer = [
        {"recipe": "below/inner.yaml", "data": "sub", "objective": "nll", "loss_weight": 3},
        {"recipe": "below/own.yaml", "data": str(tmp_path)},
    ]
    found = sources_in(read_recipe(write(tmp_path, "outer", outer, bad_rows="drop")), "/data")
    assert [(s.name, s.data, s.objective, s.loss_weight) for s in found] == [
        ("inner/own", "/data/sub/deep", "nll", 3), ("inner/pictures", "/data/sub", "nll", 1.5), ("own", str(tmp_path), None, 1.0),
    ]  # fmt: skip
    assert [s.card["name"] for s in found] == ["own", "drawn", "own"] and {s.card["bad_rows"] for s in found} == {
        "drop"
    }


def test_a_circle_of_mixtures_is_refused_with_its_path(tmp_path: Path) -> None:
    write(tmp_path, "a", [{"recipe": "b.yaml"}])
    write(tmp_path, "b", [{"recipe": "drawn"}, {"recipe": "c.yaml"}])
    write(tmp_path, "c", [{"recipe": "b.yaml"}])
    with pytest.raises(CardError, match=re.escape("is a mixture of itself: b.yaml -> c.yaml -> b.yaml")):
        read_recipe(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"weight": 0}, {"weight": 1}], "entry 1: weight must be a number above 0, found 0"),
        ([{"share": -0.5}, {}], "entry 1: share must be a number above 0, found -0.5"),
        ([{}, {"repeat": float("nan")}], "entry 2: repeat must be a number above 0, found nan"),
        ([{"repeat": True}, {}], "repeat must be a number above 0, found True"),
        ([{"cap": 2.5}, {}], "cap must be a whole number of at least 1, found 2.5"),
        ([{"cap": 2, "cap_tokens": 9}, {}], "found cap and cap_tokens, expected one of them"),
        ([{"weight": 1, "share": 0.5}, {"weight": 1}], "entry 1: found weight and share, expected one of them"),
        ([{"weight": 1}, {"share": 0.5}], "some entries have a weight and some a share"),
        ([{"weight": 1}, {}], "'two' has no weight, others have. Give all of them a weight, or none"),
        ([{"share": 0.5}, {"share": 0.2}], "must sum to 1, found a sum of 0.7"),
        ([{"wieght": 1}, {}], "unknown key 'wieght'. Did you mean 'weight'?"),
        ([{"objective": "nil"}, {}], "unknown objective 'nil'. Did you mean 'nll'?"),
        ([{"sort": "tokens"}, {}], "sort is for order: curriculum"),
        ([{"name": "two"}, {}], "two entries are called 'two'"),
        ([{"name": 5}, {}], "name must be a text, found 5"),
        ([{"recipe": None}, {}], "expected a mapping with a recipe (a card's name or path)"),
        ([{"recipe": "gone.yaml"}, {}], "No recipe card at"),
        ([{"recipe": "tabmpw"}, {}], "Unknown recipe 'tabmpw'. Did you mean 'tabmwp'?"),
    ],
)  # fmt: skip
def test_what_a_mixture_may_not_say_is_refused(
    tmp_path: Path, two: list[str], changes: list[dict[str, Any]], message: str
) -> None:
    entries = [{"recipe": recipe, **more} for recipe, more in zip(two, changes, strict=True)]
    with pytest.raises(CardError, match=re.escape(message)):
        read_recipe(write(tmp_path, "mixed", entries))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"order": "curiculum"}, "order must be one of shuffled, curriculum, found 'curiculum'. Did you mean 'curriculum'?"),
        ({"share_of": "text"}, "share_of must be one of response, all, found 'text'"),
        ({"bad_rows": "skip"}, "bad_rows must be one of refuse, drop, found 'skip'"),
        ({"duplicates": "remove"}, "duplicates must be one of keep, drop, found 'remove'"),
        ({"prompt": "{question}"}, "unknown key 'prompt'"),
        ({"mixture": []}, "mixture must be a list of entries"),
        ({"mixture": "drawn"}, "mixture must be a list of entries"),
    ],
)  # fmt: skip
def test_the_card_s_own_words_are_checked(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(CardError, match=re.escape(message)):
        read_recipe(write(tmp_path, "mixed", **{"mixture": [{"recipe": "drawn"}], **more}))


def test_a_sub_folder_needs_a_data_folder(tmp_path: Path, two: list[str]) -> None:
    card = read_recipe(write(tmp_path, "mixed", [{"recipe": two[0], "data": "sub"}]))
    with pytest.raises(
        CardError, match="data = 'sub' is a folder below the data folder. Say where that is: --data DIR"
    ):
        sources_in(card, None)


def test_a_curriculum_keeps_the_trainer_from_shuffling(tmp_path: Path) -> None:
    entries = [{"recipe": "drawn"}, {"recipe": "drawn_new", "sort": "tokens"}]
    told = recipe_layer(write(tmp_path, "mixed", entries, order="curriculum", training={"epochs": 3}))
    assert told == {"epochs": 3, "train_sampling_strategy": "sequential"}
    assert recipe_layer(write(tmp_path, "other", [{"recipe": "drawn"}])) == {}


def test_shipped_mixtures_are_read_and_their_cards_hold_only_what_yaml_can_say() -> None:
    mixtures = [card for card in map(read_recipe, list_cards("recipe")) if "mixture" in card]
    assert len(mixtures) >= 2
    for card in mixtures:
        assert yaml.safe_load(yaml.safe_dump(card)) == card  # a run folder keeps it so
        assert len(sources_in(card, "/data")) >= 2


def test_a_nested_mixture_gives_what_it_would_give_alone_to_be_chosen_from(tmp_path: Path, two: list[str]) -> None:
    inner = [{"recipe": two[0], "weight": 1, "repeat": 2}, {"recipe": two[1], "weight": 3}]
    write(tmp_path, "inner", inner)
    card = read_recipe(
        write(tmp_path, "outer", [{"recipe": "inner.yaml", "weight": 1}, {"recipe": "drawn", "weight": 1}])
    )
    lengths = [[5] * 4, [7] * 30, [3] * 20]
    drawn = mixed_places(card, lengths, 0)
    # inner: 4 rows twice are 8, of weight 1; 30 of weight 3: 30 / 3 = 10 > 8, so 8 and 24; of 32 the outer takes 20, as drawn has
    assert Counter(drawn.source.tolist())[2] == 20 and len(drawn.row) == 40
    reasons = [{why: len(rows) for why, rows in left.items()} for left in drawn.left]
    assert reasons[1]["left out by the mixture's weights of inner"] == 6
    assert set(reasons[1]) <= {"left out by the mixture's weights of inner", "left out by the mixture's weights"}
    assert reasons[2] == {} and set(reasons[0]) <= {"left out by the mixture's weights"}
    assert max(Counter(drawn.row[drawn.source == 0].tolist()).values()) <= 2


def test_a_mixture_in_a_mixture_counts_the_tokens_that_its_own_card_says(tmp_path: Path, two: list[str]) -> None:
    halves = [{"recipe": two[0], "share": 0.5}, {"recipe": two[1], "share": 0.5}]
    write(tmp_path, "inner", halves, share_of="all")
    card = read_recipe(write(tmp_path, "outer", [{"recipe": "inner.yaml"}, {"recipe": "drawn"}]))
    response, tokens = [[1] * 40, [1] * 40, [9] * 5], [[10] * 40, [40] * 40, [9] * 5]
    drawn = mixed_places(card, response, 0, tokens=tokens)
    # half of all tokens each: 40 rows of 10 tokens are as many as 10 rows of 40
    assert Counter(drawn.source.tolist()) == {0: 40, 1: 10, 2: 5}


def test_an_entry_that_is_called_as_a_source_of_a_mixture_beside_it_is_refused(tmp_path: Path, two: list[str]) -> None:
    write(tmp_path, "inner", [{"recipe": two[0], "name": "a"}])
    card = read_recipe(write(tmp_path, "outer", [{"recipe": "inner.yaml"}, {"recipe": two[1], "name": "inner/a"}]))
    with pytest.raises(CardError, match="two of its sources are called 'inner/a'"):
        sources_in(card, "/data")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=12), min_size=3, max_size=3),
    st.sampled_from([{}, {"cap": 4}, {"repeat": 0.5}, {"repeat": 1.5}]),
    st.sampled_from([({}, {}), ({"weight": 1}, {"weight": 2}), ({"share": 0.4}, {"share": 0.6})]),
    st.sampled_from(["shuffled", "curriculum"]),
)
def test_every_row_of_a_nested_mixture_is_used_or_left_out_for_one_reason(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], inside: dict[str, Any], outside: Any, order: str
) -> None:
    folder = tmp_path_factory.mktemp("cards")
    own = [single(folder, name) for name in ("a", "b", "c")]
    write(folder, "inner", [{"recipe": own[0], **inside}, {"recipe": own[1], "repeat": 2}], order=order)
    entries = [{"recipe": "inner.yaml", **outside[0]}, {"recipe": own[2], **outside[1]}]
    card = read_recipe(write(folder, "outer", entries, order=order))
    try:
        drawn = mixed_places(card, lengths, 5)
    except CardError:
        return
    for k, rows in enumerate(lengths):
        used = set(drawn.row[drawn.source == k].tolist())
        left = [int(row) for found in drawn.left[k].values() for row in found]
        assert sorted([*used, *left]) == list(range(len(rows)))
    if order == "curriculum":
        assert drawn.source.tolist() == sorted(drawn.source.tolist())
    again = mixed_places(card, [np.array(rows) for rows in lengths], 5)
    assert (again.source == drawn.source).all() and (again.row == drawn.row).all()
