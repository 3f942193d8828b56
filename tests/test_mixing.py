"""The arithmetic of mixtures against a slow count of its own: rows, repeats, caps, weights, shares and orders."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_dft.errors import CardError
from vlm_dft.mixing import Entry, Mix, mix, seeded_order

COMMON = settings(max_examples=150, deadline=None)
lengths = st.lists(st.integers(1, 60), min_size=1, max_size=25)
repeats = st.sampled_from([Fraction(1), Fraction(5, 2), Fraction(2), Fraction(3, 2), Fraction(7, 3)])
proportions = st.fractions(Fraction(1, 5), Fraction(4), max_denominator=20)
entries = st.lists(st.tuples(lengths, repeats, proportions), min_size=1, max_size=4)


def uses(found: Mix, entry: int) -> Counter[int]:
    """How often each row of an entry is used."""
    return Counter(int(row) for row in found.row[found.entry == entry])


def drawn(asked: list[Any], seed: int = 0, **more: Any) -> tuple[list[Entry], Mix]:
    made = [Entry(f"e{k}", **{**more, **own}) for k, (_, own) in enumerate(asked)]
    return made, mix(made, [rows for rows, _ in asked], seed=seed)


@COMMON
@given(entries, st.integers(0, 3))
def test_without_more_words_every_row_is_used_and_repeats_are_whole_passes_and_a_part(
    asked: list[Any], seed: int
) -> None:
    _, found = drawn([(rows, {"repeat": repeat}) for rows, repeat, _ in asked], seed)
    for k, (rows, repeat, _) in enumerate(asked):
        own = uses(found, k)
        assert sum(own.values()) == len(rows) * repeat.numerator // repeat.denominator
        assert set(own) == set(range(len(rows))) and max(own.values()) - min(own.values()) <= 1


@COMMON
@given(entries, st.integers(0, 3))
def test_weights_give_the_largest_mixture_of_rows_in_which_nothing_is_used_more_than_it_may(
    asked: list[Any], seed: int
) -> None:
    most = [len(rows) * repeat.numerator // repeat.denominator for rows, repeat, _ in asked]
    wanted = [(rows, {"repeat": repeat, "weight": weight}) for rows, repeat, weight in asked]
    scale = min(Fraction(top) / weight for top, (_, _, weight) in zip(most, asked, strict=True))
    if any(scale * weight < 1 for _, _, weight in asked):
        with pytest.raises(CardError, match="gets none of the mixture's rows"):
            drawn(wanted, seed)
        return
    _, found = drawn(wanted, seed)
    counts = [sum(uses(found, k).values()) for k in range(len(asked))]
    assert all(count <= top for count, top in zip(counts, most, strict=True))
    assert any(count == top for count, top in zip(counts, most, strict=True))  # else it were not the largest
    for count, (_, _, weight) in zip(counts, asked, strict=True):
        assert count <= scale * weight < count + 1


@COMMON
@given(entries, st.integers(0, 3))
def test_shares_of_tokens_are_reached_to_within_one_row(asked: list[Any], seed: int) -> None:
    total = sum(share for _, _, share in asked)
    shares = [share / total for _, _, share in asked]
    most = []
    for k, (rows, repeat, _) in enumerate(asked):  # a slow count: row after row of the seeded order, pass after pass
        order = seeded_order(len(rows), f"{seed}//e{k}").tolist()
        most.append(sum(rows[order[j % len(rows)]] for j in range(len(rows) * repeat.numerator // repeat.denominator)))
    scale = min(Fraction(top) / share for top, share in zip(most, shares, strict=True))
    wanted = [(rows, {"repeat": repeat, "share": s}) for (rows, repeat, _), s in zip(asked, shares, strict=True)]
    firsts = [rows[int(seeded_order(len(rows), f"{seed}//e{k}")[0])] for k, (rows, _, _) in enumerate(asked)]
    if any(first > scale * share for first, share in zip(firsts, shares, strict=True)):
        with pytest.raises(CardError, match="gets none of the mixture's tokens"):
            drawn(wanted, seed)
        return
    _, found = drawn(wanted, seed)
    tokens = [sum(asked[k][0][row] * n for row, n in uses(found, k).items()) for k in range(len(asked))]
    for k, (rows, _, _) in enumerate(asked):
        order = seeded_order(len(rows), f"{seed}//e{k}").tolist()
        count = spent = 0
        while spent + rows[order[count % len(rows)]] <= scale * shares[k]:
            spent += rows[order[count % len(rows)]]
            count += 1
        assert (sum(uses(found, k).values()), tokens[k]) == (count, spent)
        assert scale * shares[k] - tokens[k] < max(rows)
    assert any(spent == top for spent, top in zip(tokens, most, strict=True))


@COMMON
@given(lengths, st.integers(1, 30), st.integers(0, 3))
def test_a_cap_is_a_seeded_choice_in_file_order_and_a_smaller_one_is_part_of_a_larger(
    rows: list[int], cap: int, seed: int
) -> None:
    (found, larger) = (drawn([(rows, {"cap": n})], seed)[1] for n in (cap, cap + 1))
    own = mix([Entry("e0", cap=cap, ordered=True)], [rows], seed=seed, order="curriculum").row.tolist()
    assert own == sorted(own) and len(own) == min(cap, len(rows)) == len(set(own))
    assert set(own) == set(found.row.tolist()) <= set(larger.row.tolist())
    assert sorted([*own, *found.capped[0].tolist()]) == list(range(len(rows)))


@COMMON
@given(lengths, st.integers(1, 400), st.integers(0, 3))
def test_a_cap_of_tokens_takes_rows_of_the_seeded_order_as_long_as_they_fit(
    rows: list[int], cap: int, seed: int
) -> None:
    order = seeded_order(len(rows), f"{seed}//e0").tolist()
    kept: list[int] = []
    while len(kept) < len(rows) and sum(rows[k] for k in kept) + rows[order[len(kept)]] <= cap:
        kept.append(order[len(kept)])
    if not kept:
        with pytest.raises(
            CardError, match=f"cap_tokens = {cap}, but the first row of its seeded order has {rows[order[0]]}."
        ):
            drawn([(rows, {"cap_tokens": cap})], seed)
        return
    assert sorted(drawn([(rows, {"cap_tokens": cap})], seed)[1].row.tolist()) == sorted(kept)


def test_the_arithmetic_by_hand() -> None:
    """10 rows of weight 1 and 15 of weight 2: 15 / 2 = 7.5 bounds it, so 7 and 15. By shares: 4 x 10 tokens at 0.2 allow 200 in all."""
    _, found = drawn([([1] * 10, {"weight": Fraction(1)}), ([1] * 15, {"weight": Fraction(2)})])
    assert Counter(found.entry.tolist()) == {0: 7, 1: 15}
    _, found = drawn([([10] * 4, {"share": Fraction(1, 5)}), ([7] * 100, {"share": Fraction(4, 5)})])
    assert Counter(found.entry.tolist()) == {0: 4, 1: 22}  # 22 x 7 = 154, and 23 would be over 160
    assert len(found.left[0]) == 0 and len(found.left[1]) == 78
    _, found = drawn([([1] * 4, {"weight": Fraction(1), "repeat": Fraction(2)}), ([1] * 30, {"weight": Fraction(1)})])
    assert uses(found, 0) == {0: 2, 1: 2, 2: 2, 3: 2} and sum(uses(found, 1).values()) == 8


def test_half_a_repeat_is_a_seeded_half() -> None:
    _, found = drawn([([1] * 9, {"repeat": Fraction(1, 2)})])
    assert len(set(found.row.tolist())) == len(found.row) == 4 and len(found.left[0]) == 5
    _, other = drawn([([1] * 9, {"repeat": Fraction(1, 2)})], seed=1)
    assert set(found.row.tolist()) != set(other.row.tolist())


def test_the_same_seed_gives_the_same_rows_and_order_and_they_are_these() -> None:
    """Literal, so that no version of Python or numpy changes the rows of a run in silence."""
    _, found = drawn([([3] * 6, {}), ([3] * 4, {"repeat": Fraction(3, 2)})], seed=7)
    _, again = drawn([([3] * 6, {}), ([3] * 4, {"repeat": Fraction(3, 2)})], seed=7)
    assert (found.entry == again.entry).all() and (found.row == again.row).all()
    assert list(zip(found.entry.tolist(), found.row.tolist(), strict=True)) == LITERAL


LITERAL = [(0, 4), (1, 1), (0, 1), (1, 1), (1, 0), (1, 3), (1, 2), (0, 5), (0, 3), (0, 0), (0, 2), (1, 3)]


def test_an_entry_s_choice_does_not_depend_on_its_neighbours() -> None:
    alone = mix([Entry("a", cap=5)], [[1] * 50], seed=3)
    beside = mix([Entry("b"), Entry("a", cap=5)], [[1] * 9, [1] * 50], seed=3)
    assert set(alone.row.tolist()) == set(beside.row[beside.entry == 1].tolist())


def test_a_curriculum_keeps_the_listed_order_and_shuffles_or_sorts_inside() -> None:
    sizes = [[5, 1, 4, 2, 3], [9, 8, 7, 6], [1, 1, 1]]
    asked = [Entry("long"), Entry("sorted", sort=True), Entry("own", ordered=True)]
    found = mix(asked, sizes, seed=0, order="curriculum")
    assert found.entry.tolist() == [0] * 5 + [1] * 4 + [2] * 3
    first, second, third = (found.row[found.entry == k].tolist() for k in range(3))
    assert sorted(first) == [0, 1, 2, 3, 4] != first
    assert second == [3, 2, 1, 0] and third == [0, 1, 2]
    mixed = mix(asked, sizes, seed=0)
    assert mixed.entry.tolist() != sorted(mixed.entry.tolist())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([([], {})], "'e0' has no rows to mix"),
        ([([1] * 3, {"weight": Fraction(1, 100)}), ([1] * 3, {"weight": Fraction(1)})], "'e0' gets none of the mixture's rows"),
        ([([0, 0], {"share": Fraction(1)})], "'e0' has no tokens of the kind"),
        ([([1], {"repeat": Fraction(1, 2)})], "repeat = 0.5 of its 1 rows is none"),
        ([([1], {"weight": Fraction(1)}), ([1], {})], "some have a weight or share and some not"),
    ],
)  # fmt: skip
def test_a_mixture_that_would_leave_an_entry_out_is_refused(asked: list[Any], message: str) -> None:
    with pytest.raises(CardError, match=re.escape(message)):
        drawn(asked)


def test_a_million_rows_are_mixed_in_seconds() -> None:
    rows = np.full(1_000_000, 7)
    found = mix([Entry("a", share=Fraction(1, 2)), Entry("b", share=Fraction(1, 2))], [rows, rows[:500_000]], seed=0)
    assert len(found.row) == 1_000_000
