"""Response text: tags go where the card says, endings are appended once, and what nobody declared is refused."""

from __future__ import annotations

import pytest

from vlm_dft.errors import CardError, RowError
from vlm_dft.response_text import check_tags, finish, with_ending

COT = "<think>two and two</think>\n<answer>4</answer>"


@pytest.mark.parametrize(
    ("tags", "text", "reasoning", "changed"),
    [
        ({"think": "keep", "answer": "keep"}, COT, "", ()),
        ({"think": "strip", "answer": "strip"}, "two and two\n4", "", ("tag <think> stripped", "tag <answer> stripped")),
        ({"think": "drop", "answer": "keep"}, "<answer>4</answer>", "", ("tag <think> dropped with its text",)),
        ({"think": "reasoning", "answer": "strip"}, "4", "two and two", ("tag <think> made reasoning", "tag <answer> stripped")),
        ({"think": "thinking", "answer": "keep"}, "<thinking>two and two</thinking>\n<answer>4</answer>", "",
         ("tag <think> renamed to <thinking>",)),
        ({"think": "drop", "answer": "\\boxed{}"}, "\\boxed{4}", "", ("tag <think> dropped with its text", "tag <answer> made \\boxed{}")),
    ],
)  # fmt: skip
def test_a_tag_becomes_what_the_card_declares(
    tags: dict[str, str], text: str, reasoning: str, changed: tuple[str, ...]
) -> None:
    found = finish(COT, check_tags(tags, where="card"), where="row")
    assert (found.text, found.reasoning, found.changed) == (text, reasoning, changed)


def test_tags_are_known_in_any_case_and_nested() -> None:
    tags = check_tags({"CONCLUSION": "keep", "summary": "strip", "step": "strip"}, where="card")
    text = "<SUMMARY>a <Step>b</Step></SUMMARY> <CONCLUSION>c</CONCLUSION>"
    assert finish(text, tags, where="row").text == "a b <CONCLUSION>c</CONCLUSION>"


def test_several_thoughts_are_one_reasoning() -> None:
    found = finish("<think>a</think>b<think>c</think>d", {"think": "reasoning"}, where="row")
    assert (found.text, found.reasoning) == ("bd", "a\n\nc")


@pytest.mark.parametrize(
    ("text", "tags", "message", "reason"),
    [
        (COT, {}, r"row: undeclared tag <think>. Say in the card .* tags: \{think: keep\}", "undeclared tag <think>"),
        (COT, {"think": "keep"}, "undeclared tag <answer>", "undeclared tag <answer>"),
        ("<REASONING>x</REASONING>", {}, "undeclared tag <REASONING>", "undeclared tag <reasoning>"),
        ("x</think>y", {"think": "drop"}, "expected no closing tag, found </think>", "unbalanced tag <think>"),
        ("<think>x", {"think": "drop"}, "expected </think>, found the end of the response", "unbalanced tag <think>"),
        ("<think><answer>x</think></answer>", {"think": "keep", "answer": "keep"}, "expected </answer>, found </think>",
         "unbalanced tag <answer>"),
    ],
)  # fmt: skip
def test_an_undeclared_or_unbalanced_tag_is_refused(text: str, tags: dict[str, str], message: str, reason: str) -> None:
    with pytest.raises(RowError, match=message) as raised:
        finish(text, tags, where="row")
    assert raised.value.reason == reason


def test_what_is_no_known_tag_is_text() -> None:
    text = "a < b, <b>bold</b>, <div> and x<y>z"
    assert finish(text, {}, where="row").text == text


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([], "tags must map names"),
        ({"<think>": "keep"}, "is not a tag's name"),
        ({"think": "kepe"}, r"'kepe' is neither keep, strip, drop, reasoning.* Did you mean 'keep'\?"),
        ({"think": True}, "must be one of keep, strip, drop, reasoning"),
        ({"answer": "\\boxed{}{}"}, "wrapper with one {}"),
    ],
)
def test_what_a_card_says_of_tags_is_checked(tags: object, message: str) -> None:
    with pytest.raises(CardError, match=message):
        check_tags(tags, where="card")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So.", "So.\nThe answer is 5."),
        ("So.\n", "So.\nThe answer is 5."),
        ("The answer is 5.", None),
        ("So.\nThe answer is 5", None),
        ("So. The  answer is 5. \n", None),
        ("So the answer is 5.", "So the answer is 5.\nThe answer is 5."),
        ("So.\nThe answer is 15.", "So.\nThe answer is 15.\nThe answer is 5."),
        ("Sum: 5 + 0\nThe answer is 5.", None),
        ("The answer is 5. Or not.", "The answer is 5. Or not.\nThe answer is 5."),
    ],
)
def test_an_ending_is_appended_unless_the_last_sentence_is_it(text: str, expected: str | None) -> None:
    assert with_ending(text, "The answer is 5.") == ((text, False) if expected is None else (expected, True))


def test_where_all_tags_are_kept_none_is_looked_for() -> None:
    text = "a <answer> b </think>"
    assert (
        check_tags({"*": "keep"}, where="card") == {"*": "keep"}
        and finish(text, {"*": "keep"}, where="row").text == text
    )
    with pytest.raises(CardError, match=r"'\*' is not a tag's name.*alone"):
        check_tags({"*": "keep", "think": "drop"}, where="card")
