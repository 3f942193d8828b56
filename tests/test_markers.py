"""Markers: where a picture stands in a text is kept, whatever the marker's spelling; a mismatch is said with both counts."""

from typing import Any

import pytest

from vlm_dft.chat import as_example
from vlm_dft.errors import RowError
from vlm_dft.markers import COMPOSITE, MISMATCH, read_numbered


def example(text: str, images: list[Any], videos: list[Any] | None = None, answer: str = "a") -> Any:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return as_example({"messages": messages, "images": images, "videos": videos or [], "id": "row 7"})


def shown(found: Any) -> str:
    content = found.messages[0]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "".join(part.get("text", f"[{part['type']}]") for part in parts)


@pytest.mark.parametrize(
    ("text", "images", "expected", "order"),
    [
        ("<image>q", ["a"], "[image]q", "a"),
        ("q<image>", ["a"], "q[image]", "a"),
        ("q<image>r<image>", ["a", "b"], "q[image]r[image]", "ab"),
        ("q", ["a", "b"], "[image][image]q", "ab"),
        ("q", [], "q", ""),
        ("<ImageHere>q", ["a"], "[image]q", "a"),
        ("q<ImageHere>r<image>", ["a", "b"], "q[image]r[image]", "ab"),
        ("<image_1>q<image_2>", ["a", "b"], "[image]q[image]", "ab"),
        ("q<image_2>r<image_1>", ["a", "b"], "q[image]r[image]", "ba"),
        ("<image1>q<image1>r<image2>", ["a", "b"], "[image]q[image]r[image]", "aab"),
        ("<image 1>q", ["a"], "[image]q", "a"),
        ("in <image1>, not <image3>", ["a"], "[image]in <image1>, not <image3>", "a"),
        ("<image>in <image1> and <image2>", ["a"], "[image]in <image1> and <image2>", "a"),
    ],
)
def test_a_picture_stands_where_its_marker_stood_and_numbers_say_which(
    text: str, images: list[str], expected: str, order: str
) -> None:
    found = example(text, images)
    assert shown(found) == expected and "".join(found.images) == order


def test_videos_and_numbered_pictures_stand_in_one_text() -> None:
    found = example("<video>then <image_2> and <image_1>", ["a", "b"], ["v"])
    assert shown(found) == "[video]then [image] and [image]" and found.images == ["b", "a"] and found.videos == ["v"]


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image><image>q", ["a"], "1 images but 2 places for them"),
        ("<image>q", ["a", "b"], "2 images but 1 places for them"),
        ("<ImageHere>q<image>", ["a"], "1 images but 2 places"),
        ("<image_1>q", ["a", "b"], r"2 images but the numbered markers are 1. .*No marker for image 2."),
        ("<image_1><image_2><image_3>q", ["a", "b"], r"2 images but the numbered markers are 1, 2, 3. Expected 1 to 2"),
        ("<image_0><image_1>", ["a", "b"], "the numbered markers are 0, 1"),
        ("<image><image_1>", ["a", "b"], "2 images but 1 unnumbered and 1 numbered markers"),
    ],
)
def test_a_mismatch_names_the_row_and_both_counts(text: str, images: list[str], message: str) -> None:
    with pytest.raises(RowError, match=message) as raised:
        example(text, images)
    assert "row 7" in str(raised.value) and raised.value.reason == MISMATCH


def test_markers_in_an_answer_are_words() -> None:
    found = example("q<image>", ["a"], answer="as in <image_5> and <image>")
    assert found.images == ["a"] and found.messages[1]["content"] == "as in <image_5> and <image>"


def test_one_picture_for_higher_numbers_is_said_to_be_kept_as_text() -> None:
    messages = [{"role": "user", "content": "<image1> <image2>"}]
    assert read_numbered(messages, ["a"], where="row") == (messages, ["a"], COMPOSITE)


def test_what_is_read_once_reads_the_same_again() -> None:
    once = example("<image_2>r<image_1>", ["a", "b"])
    assert as_example(once) == once
