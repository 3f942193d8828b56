"""Duplicates: hashes against brute force, pictures that are the same or look alike, questions that are the same but for their form."""

import io
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from vlm_dft.duplicates import (
    Prints,
    as_pairs,
    look_alikes,
    near_pairs,
    normalised,
    print_of,
    question_core,
    question_keys,
    same_keys,
)
from vlm_dft.media import open_image

HASHES = st.integers(0, 2**64 - 1)


@st.composite
def neighbours(draw: st.DrawFn) -> list[int]:
    """Hashes of which many differ in few bits."""
    base = draw(st.lists(HASHES, min_size=1, max_size=4))
    flips = draw(st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 63), max_size=7)), max_size=30))
    return base + [base[k % len(base)] ^ sum(1 << bit for bit in bits) for k, bits in flips]


@settings(max_examples=150, deadline=None)
@given(neighbours(), neighbours(), st.integers(0, 6))
def test_pairs_found_by_bands_are_those_of_brute_force_each_once(left: list[int], right: list[int], most: int) -> None:
    a, b = (np.array(hashes, dtype=np.uint64) for hashes in (left, right))
    within = [
        (i, j) for i in range(len(left)) for j in range(i + 1, len(left)) if (left[i] ^ left[j]).bit_count() <= most
    ]
    across = [(i, j) for i, x in enumerate(left) for j, y in enumerate(right) if (x ^ y).bit_count() <= most]
    assert sorted(as_pairs(near_pairs(a, distance=most))) == within
    assert sorted(as_pairs(near_pairs(a, b, distance=most))) == across


def test_pairs_are_the_same_where_they_are_compared_in_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = np.random.default_rng(0).integers(0, 64, 300).astype(np.uint64)  # all share four of five bands
    whole = sorted(as_pairs(near_pairs(hashes)))
    monkeypatch.setattr("vlm_dft.duplicates.AT_ONCE", 7)
    assert sorted(as_pairs(near_pairs(hashes))) == whole and len(whole) > 10_000


def test_near_pairs_of_100_000_hashes_are_found_in_seconds() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 100_000, dtype=np.uint64)
    hashes[50_000:] = hashes[:50_000] ^ (np.uint64(1) << rng.integers(0, 64, 50_000).astype(np.uint64))
    began = time.monotonic()
    assert sum(len(i) for i, _ in near_pairs(hashes)) == 50_000
    assert time.monotonic() - began < 20  # 0.7 s on one core that is not shared


def drawing(shift: int = 0) -> Image.Image:
    """A picture with some structure."""
    picture = Image.new("RGB", (160, 120), "white")
    pen = ImageDraw.Draw(picture)
    for k in range(6):
        pen.rectangle(
            [10 + 24 * k, 110 - 15 * ((k * 3 + shift) % 6), 26 + 24 * k, 110], fill=(40 * k, 90, 200 - 30 * k)
        )
    return picture


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return open_image(buffer.getvalue())


def prints(*pictures: Image.Image) -> Prints:
    found = Prints()
    for row, picture in enumerate(pictures):
        found.add(row, [print_of(picture)])
    return found


def test_a_picture_is_the_same_by_its_pixels_whatever_its_file(tmp_path: Path) -> None:
    drawing().save(tmp_path / "a.png")
    drawing().save(tmp_path / "b.bmp")
    found = prints(open_image(tmp_path / "a.png"), open_image(tmp_path / "b.bmp"), jpeg(drawing(), 90))
    assert same_keys(found.exact) == [[0, 1]]


def test_pictures_of_the_same_bytes_in_another_shape_are_not_the_same() -> None:
    found = prints(Image.new("RGB", (20, 10), "red"), Image.new("RGB", (10, 20), "red"))
    assert same_keys(found.exact) == []


def test_a_reencoded_or_resized_picture_looks_alike_and_another_one_does_not() -> None:
    found = prints(drawing(), jpeg(drawing(), 60), drawing().resize((80, 60)), drawing(shift=2))
    assert list(as_pairs(look_alikes(found))) and set(as_pairs(look_alikes(found))) == {(0, 1), (0, 2), (1, 2)}


def test_the_same_picture_is_not_also_said_to_look_alike() -> None:
    assert list(as_pairs(look_alikes(prints(drawing(), drawing())))) == []


def test_a_picture_that_is_there_a_thousand_times_is_compared_once() -> None:
    found = prints(drawing(), jpeg(drawing(), 60))
    for row in range(2, 1002):
        found.add(row, [print_of(drawing())])
    assert list(as_pairs(look_alikes(found))) == [(0, 1)]
    assert list(as_pairs(look_alikes(found, prints(drawing(shift=2), jpeg(drawing(), 60))))) == [(0, 1)]


def test_a_stretched_picture_does_not_look_alike() -> None:
    assert list(as_pairs(look_alikes(prints(drawing(), drawing().resize((160, 60)))))) == []


def test_on_real_tables_look_alikes_are_few_and_the_same_tables_are_found_again(shared: Path) -> None:
    """The numbers that the module states: of 615,495 pairs 21 look alike, of which 7 show another table."""
    import json

    folder = shared / "tabmwp" / "data" / "tabmwp"
    problems = {}
    for split in ("train", "dev", "test"):
        problems.update(json.loads((folder / f"problems_{split}.json").read_text()))
    tables = [problems[key]["table"] for key in problems]
    pictures = [open_image(folder / "tables" / f"{key}.png") for key in problems]
    found = prints(*pictures)
    pairs = list(as_pairs(look_alikes(found)))
    wrong = sum(tables[i] != tables[j] for i, j in pairs)
    assert len(pairs) <= 24 and wrong <= 8
    assert all(tables[i] == tables[j] for i, j in same_keys(found.exact))
    some = pictures[::5]
    again = prints(*[jpeg(picture, 50) for picture in some])
    hits = {i for i, j in as_pairs(look_alikes(again, found)) if j == 5 * i}
    assert len(hits) / len(some) > 0.95


def test_questions_are_the_same_whatever_their_case_blanks_punctuation_and_markers() -> None:
    forms = [
        "<image>\nWhat is  the SUM of a, b and c?",
        "what is the sum of a b and c",
        "<image_1> What is the sum of “a”, b and c ?",
    ]
    assert {normalised(form) for form in forms} == {"what is the sum of a b and c"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 3 - 2?", "What is 3 + 2?"),
        ("1.5 m", "15 m"),
        ("6/2", "62"),
        ("x = -3", "x = 3"),
        ("50%", "50"),
        ("is a<b?", "is a>b?"),
    ],
)
def test_questions_that_ask_for_another_calculation_are_not_the_same(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


def test_a_question_is_known_without_its_hint_and_options() -> None:
    asked = "Hint: Please answer with the letter.\nQuestion: Is the red bar longer?\nChoices:\n(A) yes\n(B) no"
    assert question_core(asked) == "Is the red bar longer?"
    assert set(question_keys([asked])) & set(question_keys(["<image>is the red bar longer"]))


def test_texts_without_words_have_no_key() -> None:
    assert question_keys(["<image>", " ?! "]) == ()
