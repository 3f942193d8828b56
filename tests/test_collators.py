"""The collator: labels are the responses' tokens alone, and a proof fails loudly when they would not be."""

import copy
import pickle
from typing import Any

import pytest
import torch
from PIL import Image

from vlm_dft import ChatCollator, Example, MaskError
from vlm_dft.errors import ImageError, RowError
from vlm_dft.explain import mask_report

RED = Image.new("RGB", (112, 56), "red")  # 4 x 2 merged patches: 8 media tokens


def turn(role: str, *parts: Any, **extra: Any) -> dict[str, Any]:
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content, **extra}


def trained(collator: ChatCollator, row: Any) -> str:
    """The text of the targets of a one-row batch."""
    batch = collator([row])
    labels = batch["labels"][0]
    assert torch.equal(labels[labels != -100], batch["input_ids"][0][labels != -100])
    return str(collator.tokenizer.decode(labels[labels != -100], skip_special_tokens=False))


@pytest.fixture
def collator(processor: Any) -> ChatCollator:
    return ChatCollator(processor)


ONE_TURN = {"messages": [turn("user", None, "What is it?"), turn("assistant", "Red.")], "images": [RED]}


def test_targets_are_the_answer_and_its_end_token(collator: ChatCollator) -> None:
    assert trained(collator, ONE_TURN) == "Red.<|im_end|>"


def test_every_key_of_the_processor_is_kept_and_media_are_counted(collator: ChatCollator) -> None:
    batch = collator([ONE_TURN])
    assert set(batch) == {
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        "pixel_values",
        "image_grid_thw",
        "labels",
    }
    assert int(batch["mm_token_type_ids"].sum()) == 8
    assert batch["image_grid_thw"].tolist() == [[1, 4, 8]]


def test_several_turns_are_trained_except_those_marked_not_to_be(collator: ChatCollator) -> None:
    messages = [
        turn("system", "Be brief."),
        turn("user", "first ", None, " then"),
        turn("assistant", "one"),
        turn("user", "again", None),
        turn("assistant", "two", train=False),
        turn("user", "last"),
        turn("assistant", "three é 北京"),
    ]
    row = {"messages": messages, "images": [RED, RED]}
    assert trained(collator, row) == "one<|im_end|>three é 北京<|im_end|>"


def test_words_of_the_template_inside_a_text_do_not_start_a_response(collator: ChatCollator) -> None:
    messages = [turn("user", "assistant\nRed. <image> <b>user</b>"), turn("assistant", "assistant says Red.")]
    assert trained(collator, {"messages": messages}) == "assistant says Red.<|im_end|>"


def test_an_image_inside_an_answer_is_input_and_never_target(collator: ChatCollator) -> None:
    row = {"messages": [turn("user", "draw"), turn("assistant", "here: ", None, "done")], "images": [RED]}
    assert trained(collator, row) == "here: done<|im_end|>"


def test_text_only_and_image_rows_share_a_batch(collator: ChatCollator) -> None:
    text_only = {"messages": [turn("user", "hi"), turn("assistant", "hello there")]}
    batch = collator([text_only, ONE_TURN])
    alone = collator([ONE_TURN])
    length = alone["input_ids"].shape[1]
    assert torch.equal(batch["labels"][1, :length], alone["labels"][0])
    assert torch.equal(batch["pixel_values"], alone["pixel_values"])
    assert "pixel_values" not in collator([text_only])


def test_left_and_right_padding_give_the_same_loss(processor: Any, drawn: list[Example]) -> None:
    from vlm_dft.loss_head import attach_loss
    from vlm_dft.models import load_model

    model = attach_loss(load_model("tiny"))
    losses = [
        model(**ChatCollator(processor, padding_side=side)(drawn[:6]), objective="nll")["loss"].item()
        for side in ("left", "right")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_padding_is_masked_by_attention_even_where_pad_equals_the_end_token(processor: Any) -> None:
    same = copy.deepcopy(processor)
    same.tokenizer.pad_token = "<|im_end|>"
    short = {"messages": [turn("user", "hi"), turn("assistant", "a")]}
    batch = ChatCollator(same)([short, ONE_TURN])
    assert int((batch["labels"][0] != -100).sum()) == 2  # "a" and its own end token


def test_a_sample_gives_the_same_tensors_in_any_batch_and_after_pickling(collator: ChatCollator, drawn: Any) -> None:
    alone, together = collator(drawn[:1]), pickle.loads(pickle.dumps(collator))(drawn[:5])
    length = alone["input_ids"].shape[1]
    for key in ("input_ids", "labels", "attention_mask", "mm_token_type_ids"):
        assert torch.equal(together[key][0, :length], alone[key][0])
    assert torch.equal(together["pixel_values"][: len(alone["pixel_values"])], alone["pixel_values"])


def test_inputs_are_not_mutated(collator: ChatCollator) -> None:
    row = {"messages": [turn("user", None, "a"), turn("assistant", "b", train=True)], "images": [RED]}
    before = copy.deepcopy(row["messages"])
    collator([row])
    assert row["messages"] == before and row["images"] == [RED]


def test_measuring_counts_what_collating_gives(collator: ChatCollator, drawn: list[Example]) -> None:
    for example in [*drawn[:5], Example(ONE_TURN["messages"], [RED])]:
        batch = collator([example])
        height, width = batch["image_grid_thw"][0, 1:].tolist()
        measured = collator.measure(example, [(height * 14, width * 14)])
        assert measured.tokens == batch["input_ids"].shape[1]
        assert measured.media == int(batch["mm_token_type_ids"].sum())
        assert measured.targets == int((batch["labels"] != -100).sum())


def test_markers_in_plain_strings_place_the_images(collator: ChatCollator) -> None:
    row = {
        "messages": [{"role": "user", "content": "a <image> b"}, {"role": "assistant", "content": "c"}],
        "images": [RED],
    }
    text = collator.tokenizer.decode(collator([row])["input_ids"][0])
    assert "a <|vision_start|><|image_pad|>" in text and "<|vision_end|> b" in text


def test_a_marker_in_an_answer_is_a_word_and_takes_no_image(collator: ChatCollator) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the tag <image> is"}]
    assert trained(collator, {"messages": messages, "images": [RED]}) == "the tag <image> is<|im_end|>"


def test_pictures_inside_the_messages_are_taken_from_there(collator: ChatCollator) -> None:
    inline = [{"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "What is it?"}]}]
    batch = collator([{"messages": [*inline, turn("assistant", "Red.")]}])
    assert torch.equal(batch["pixel_values"], collator([ONE_TURN])["pixel_values"])


def test_explaining_a_sample_names_the_reason_of_every_token(collator: ChatCollator) -> None:
    views = collator.explain(ONE_TURN)
    by_reason: dict[str, str] = {}
    for view in views:
        by_reason[view.reason] = by_reason.get(view.reason, "") + view.text
    assert by_reason["response"] == "Red." and by_reason["end of turn"] == "<|im_end|>"
    assert by_reason["media"] == "<|vision_start|>" + "<|image_pad|>" * 8 + "<|vision_end|>"
    assert by_reason["template after the answer"] == "\n"
    assert "".join(v.text for v in views) == collator.tokenizer.decode(collator([ONE_TURN])["input_ids"][0])
    assert views.counts["targets"] == len([v for v in views if v.trained]) and views.images == [(56, 112)]
    report = mask_report([views])
    assert report["samples"][0]["targets"] == views.counts["targets"] and len(report["hash"]) == 64
    assert {"reason": "media", "tokens": 10, "text": "<|vision_start|> <|image_pad|> x8 <|vision_end|>"} in views.runs


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"messages": [turn("user", "a")]}, MaskError, "no assistant message"),
        ({"messages": [turn("user", "a"), turn("assistant", " \n")]}, MaskError, "answer is empty"),
        ({"messages": [turn("user", None, "a"), turn("assistant", "b")]}, RowError, "0 images but 1 places"),
        (
            {"messages": [turn("user", "a"), turn("assistant", "b")], "image": RED},
            RowError,
            "under 'images' and 'videos', found 'image'",
        ),
        (
            {"messages": [turn("user", "a"), turn("assistant", "b")], "images": "a.png"},
            RowError,
            "images = str 'a.png'",
        ),
        (
            {"messages": [turn("user", None), turn("assistant", "b")], "images": [Image.new("RGB", (1, 300))]},
            RowError,
            "aspect ratio",
        ),
        ({"messages": [turn("user", "a"), turn("assistant", "b \U00100000")]}, MaskError, "holds U\\+100000"),
        ({"messages": [{"role": "human", "content": "a"}]}, RowError, "unknown role 'human'"),
        (
            {"messages": [turn("user", None), turn("assistant", "b")], "images": ["nowhere.png"]},
            ImageError,
            "nowhere.png",
        ),
        (
            {"messages": [turn("user", None), turn("assistant", "b")], "images": [b"not an image"]},
            ImageError,
            "readable",
        ),
        ({"images": []}, RowError, "expected a key 'messages'"),
    ],
)
def test_a_row_that_cannot_be_right_is_refused_by_name(
    collator: ChatCollator, row: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        collator([{**row, "id": "row-17"}])
    assert "row-17" in str(caught.value)


def test_a_template_without_an_end_of_turn_gets_the_end_of_sequence_after_the_last_answer(processor: Any) -> None:
    endless = copy.deepcopy(processor)
    endless.chat_template = endless.chat_template.replace("<|im_end|>", "")
    collator = ChatCollator(endless)
    messages = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    assert trained(collator, {"messages": messages}) == "bd<|im_end|>"
    (note,) = [note for _, note in collator.counts]
    assert note.startswith("end of sequence added after the last answer")


def test_a_template_whose_answers_run_on_is_refused(processor: Any) -> None:
    running = copy.deepcopy(processor)
    running.chat_template = running.chat_template.replace("<|im_end|>\\n", " and so on")
    assert running.chat_template != processor.chat_template
    with pytest.raises(MaskError, match="no end-of-turn token follows the answer.*found ' and so on'"):
        ChatCollator(running)([ONE_TURN])


def test_a_template_that_rewrites_the_answer_is_refused(processor: Any) -> None:
    rewriting = copy.deepcopy(processor)
    rewriting.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ (m.content | string)[:9] }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(MaskError, match="changes the assistant's text"):
        ChatCollator(rewriting)(
            [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "123456789012"}]}]
        )


def test_a_training_prompt_that_differs_from_the_inference_prompt_is_refused(processor: Any) -> None:
    odd = copy.deepcopy(processor)
    odd.chat_template = odd.chat_template.replace("<|im_start|>assistant\\n", "<|im_start|>ASSISTANT\\n")
    assert odd.chat_template != processor.chat_template
    with pytest.raises(MaskError, match="not the inference prompt"):
        ChatCollator(odd)([ONE_TURN])


def test_a_sample_over_max_length_is_refused_and_never_cut(processor: Any) -> None:
    with pytest.raises(MaskError, match=r"\d+ tokens, over max_length = 20. Media are never cut"):
        ChatCollator(processor, max_length=20)([ONE_TURN])


def test_something_else_than_a_processor_is_refused(processor: Any) -> None:
    with pytest.raises(TypeError, match="needs a processor with a fast tokenizer"):
        ChatCollator(processor.tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [turn("user", "q"), turn("assistant", "a")], "tools": [{"name": "look"}]}, "leaves out the row's tools"),
        (
            {"messages": [turn("user", "q"), turn("assistant", "a", reasoning_content="because")]},
            "leaves out the assistant's reasoning.*between the model's own thinking tags",
        ),
        (
            {"messages": [
                turn("user", "q"), turn("assistant", "a", train=False, tool_calls=[{"name": "look", "arguments": {}}]),
                turn("user", "r"), turn("assistant", "b"),
            ]},
            "leaves out the call of 'look'",
        ),
    ],
)  # fmt: skip
def test_what_the_template_does_not_render_is_not_lost_in_silence(
    collator: ChatCollator, row: Any, message: str
) -> None:
    with pytest.raises(MaskError, match=f"(?s)row-17.*{message}"):
        collator([{**row, "id": "row-17"}])


def test_a_marker_without_an_image_is_counted(collator: ChatCollator) -> None:
    collator([{"messages": [turn("user", "q"), turn("assistant", "a")], "source": "s"}])
    collator([{"messages": [{"role": "user", "content": "<image>q"}, turn("assistant", "a")], "source": "s"}])
    assert dict(collator.counts) == {("s", "<image> kept as text: the row has no images"): 1}


def test_a_template_that_branches_on_words_gives_the_same_masks_whatever_came_before(processor: Any) -> None:
    """A system text that switches thinking off changes the generation prompt, not the roles or the kinds of parts."""
    switching = copy.deepcopy(processor)
    switching.chat_template = switching.chat_template.replace(
        "{{- '<|im_start|>assistant\\n' -}}",
        "{{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n' if '/no_think' in (messages | string) else '') -}}",
    ).replace(
        "{{- '<|im_start|>' + message.role + '\\n' -}}",
        "{{- '<|im_start|>' + message.role + '\\n' + ('<think>\\n\\n</think>\\n' if message.role == 'assistant' and loop.last "
        "and '/no_think' in (messages | string) else '') -}}",
    )
    assert switching.chat_template.count("no_think") == 2
    row = {"messages": [turn("system", "/no_think"), turn("user", "q"), turn("assistant", "a")]}
    warm = ChatCollator(switching)
    for k in range(6):
        warm([{"messages": [turn("system", f"s{k}"), turn("user", "q"), turn("assistant", "a")]}])
    assert trained(warm, row) == trained(ChatCollator(switching), row) == "a<|im_end|>"


@pytest.mark.parametrize("column", ["image_path", "imgs", "photo"])
def test_a_column_of_pictures_under_another_name_is_refused(collator: ChatCollator, column: str) -> None:
    value = {"image_path": "a.png", "imgs": [RED], "photo": {"bytes": b"x"}}[column]
    with pytest.raises(RowError, match=f"row-17: unknown key '{column}', which holds pictures"):
        collator([{"messages": [turn("user", "q"), turn("assistant", "a")], "id": "row-17", column: value}])


def test_a_prompt_is_the_beginning_of_what_was_trained_and_never_holds_an_answer(collator: ChatCollator) -> None:
    asked = {**ONE_TURN, "messages": ONE_TURN["messages"][:1]}
    prompt, batch = collator.prompts([asked])["input_ids"][0], collator([ONE_TURN])
    assert torch.equal(prompt, batch["input_ids"][0, : len(prompt)]) and int(batch["labels"][0, len(prompt)]) != -100
    with pytest.raises(RowError, match="expected a row that ends before the answer"):
        collator.prompts([ONE_TURN])
