"""Every family, every check: ChatCollator on each family's real processor, against literal targets and the processor's own call.

The table of what held for which family is printed at the end of the run (conftest.py).
"""

from __future__ import annotations

import copy
import json
import pickle
import random
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from processors import BUILDERS, NEEDS, STRING_ASSISTANT_ONLY, build_processor, full_qwen_processor
from tokenizers import decoders

from vlm_dft import OBJECTIVES, ChatCollator, MaskError
from vlm_dft.errors import RowError
from vlm_dft.explain import mask_report

FULL = "qwen2_5_vl_full"  # the released vocabulary
FAMILIES = [*BUILDERS, FULL]
CHATS = [family for family in FAMILIES if family != "paligemma"]
QWEN = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_thinking", FULL}
NFC = QWEN | {"llava_onevision", "internvl", "molmo2", "minicpmv4_6"}  # Qwen's tokenizer composes what it is given
OWN_SEAMS = {"llava_onevision", "qwen3_vl_thinking"}  # finished conversations that are tokenised otherwise than asked
ADDS_END = {"llava", "glm4v", "glm4v_moe"}  # templates that end the last answer with nothing
PER_TOKEN = {"input_ids", "attention_mask", "labels", "mm_token_type_ids", "token_type_ids", "cross_attention_mask"}


@dataclass(frozen=True)
class Family:
    """What a family's answer looks like, by reading its template."""

    end: str  # what ends the last answer
    header: str  # what a text would say to open an answer
    media: str  # tokens that stand for pixels or enclose them
    placeholder: str  # what a template writes for an image
    pad: str
    opening: str = ""  # what the model must write between its prompt and its answer
    past_end: str | None = None  # what ends an earlier answer, where that differs
    past_opening: str | None = None
    trim: Callable[[str], str] = str  # what the template takes off a text
    past_trim: Callable[[str], str] | None = None
    loses_first_blank: bool = False  # SentencePiece's decoder drops one blank at the beginning


def _without_first_newlines(text: str) -> str:
    return text.lstrip("\n")


QWEN_MEDIA = "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
QWEN_FAMILY = Family("<|im_end|>", "<|im_start|>assistant\n", QWEN_MEDIA, "<|image_pad|>", "<|endoftext|>")
IDEFICS_MEDIA = "<fake_token_around_image> <image> <global-img> <row_1_col_1> <row_1_col_2> <row_2_col_1>"
MISTRAL = Family("</s>", "[/INST]", "[IMG] [IMG_BREAK] [IMG_END]", "[IMG]", "<pad>")
GLM_MEDIA = "<|begin_of_image|> <|image|> <|end_of_image|> <|begin_of_video|> <|video|> <|end_of_video|>"
GLM = Family(
    "<|endoftext|>", "<|assistant|>\n", GLM_MEDIA, "<|image|>", "<|endoftext|>", past_end="<|user|>",
)  # fmt: skip
TABLE = {
    "qwen2_vl": QWEN_FAMILY,
    "qwen2_5_vl": QWEN_FAMILY,
    FULL: QWEN_FAMILY,
    "qwen3_vl": QWEN_FAMILY,
    "qwen3_vl_thinking": Family(
        "<|im_end|>", "<|im_start|>assistant\n", QWEN_MEDIA, "<|image_pad|>", "<|endoftext|>",
        opening="\n</think>\n\n", past_opening="", trim=_without_first_newlines, past_trim=str,
    ),
    "llava": Family(
        "</s>", "ASSISTANT:", "<image>", "<image>", "<pad>", opening=" ", past_end="",
        loses_first_blank=True,
    ),
    "llava_next": Family("</s>", "[/INST]", "<image>", "<image>", "<pad>", opening=" ", loses_first_blank=True),
    "llava_onevision": Family("<|im_end|>", "<|im_start|>assistant\n", "<image> <video>", "<image>", "<|endoftext|>"),
    "idefics3": Family(
        "<end_of_utterance>", "Assistant:", IDEFICS_MEDIA, "<image>", "<|end_of_text|>", opening=" "
    ),
    "smolvlm": Family("<end_of_utterance>", "Assistant:", IDEFICS_MEDIA, "<image>", "<|im_end|>", opening=" "),
    "internvl": Family(
        "<|im_end|>", "<|im_start|>assistant\n", "<img> </img> <IMG_CONTEXT> <video>", "<IMG_CONTEXT>", "<|endoftext|>"
    ),
    "gemma3": Family(
        "<end_of_turn>", "<start_of_turn>model\n", "<start_of_image> <end_of_image> <image_soft_token>",
        "<start_of_image>", "<pad>", trim=str.strip,
    ),
    "paligemma": Family("<eos>", "\n", "<image>", "<image>", "<pad>"),
    "pixtral": MISTRAL,
    "mistral3": MISTRAL,
    "mllama": Family(
        "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|image|>", "<|image|>",
        "<|finetune_right_pad_id|>",
    ),
    "glm4v": GLM,
    "glm4v_moe": Family(
        "<|endoftext|>", "<|assistant|>\n", GLM_MEDIA, "<|image|>", "<|endoftext|>", opening="<think></think>\n",
        past_end="<|user|>", trim=str.strip,
    ),
    "aria": Family(
        "<|im_end|>", "<|im_start|>assistant\n", "<fim_prefix> <|img|> <fim_suffix>", "<|img|>", "<unk>",
        loses_first_blank=True,
    ),
    "lfm2_vl": Family(
        "<|im_end|>", "<|im_start|>assistant\n",
        "<image> <|image_start|> <|image_end|> <|img_thumbnail|> <|img_row_1_col_1|> <|img_row_1_col_2|>", "<image>",
        "<|pad|>",
    ),
    "molmo2": Family(
        "<|im_end|>", "<|im_start|>assistant\n",
        "<im_start> <im_end> <im_patch> <im_col> <low_res_im_start> <im_low> <|image|>", "<|image|>", "<|endoftext|>",
    ),
    "cohere2_vision": Family(
        "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<|START_OF_IMG|> <|END_OF_IMG|> <|IMG_PATCH|> <|IMG_LINE_BREAK|>", "<|IMG_PATCH|>", "<PAD>",
        opening="<|START_RESPONSE|>", trim=str.strip,
    ),
    "llama4": Family(
        "<|eot|>", "<|header_start|>assistant<|header_end|>\n\n",
        "<|image_start|> <|image_end|> <|image|> <|patch|> <|tile_x_separator|> <|tile_y_separator|>", "<|image|>",
        "<|finetune_right_pad|>", trim=str.strip,
    ),
    "minicpmv4_6": Family(
        "<|im_end|>", "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|image_pad|> <image> </image> <slice> </slice> <image_id> </image_id>", "<|image_pad|>", "<|endoftext|>",
        trim=str.strip,
    ),
}  # fmt: skip

Row = dict[str, Any]
every_family = pytest.mark.parametrize("family", FAMILIES)
every_chat = pytest.mark.parametrize("family", CHATS)


# --- rows, and what is expected of them ------------------------------------------------------------------------------


def build(family: str) -> Any:
    if family in NEEDS:
        pytest.importorskip(NEEDS[family])
    if family == FULL:
        pytest.importorskip("dashscope")
        return full_qwen_processor()
    return build_processor(family)


@cache
def collator_of(family: str) -> ChatCollator:
    return ChatCollator(build(family))


@cache
def picture(color: str = "red", width: int = 112, height: int = 56) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def turn(role: str, *parts: str | None, **extra: Any) -> dict[str, Any]:
    """A message; None stands for an image."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content, **extra}


def row(*messages: dict[str, Any], images: Sequence[Image.Image] = (), **extra: Any) -> Row:
    return {"messages": list(messages), "images": list(images), **extra}


def one_image(answer: str = "A bar.", asked: str = "What is it?") -> Row:
    return row(turn("user", None, asked), turn("assistant", answer), images=[picture()])


def text_only(answer: str = "Hello.", asked: str = "Hi there") -> Row:
    return row(turn("user", asked), turn("assistant", answer))


def conversation() -> Row:
    return row(
        turn("user", None, "One?"), turn("assistant", "First."), turn("user", "Two?"),
        turn("assistant", "Second.", train=False), turn("user", "Three?"), turn("assistant", "Third."),
        images=[picture()],
    )  # fmt: skip


def said(family: str, answer: str, *, past: bool = False) -> str:
    """The decoded targets of an answer: what opens it, itself, what ends it."""
    own = TABLE[family]
    opening = own.past_opening if past and own.past_opening is not None else own.opening
    end = own.past_end if past and own.past_end is not None else own.end
    trim = own.past_trim if past and own.past_trim is not None else own.trim
    text = opening + trim(answer) + end
    text = text[1:] if own.loses_first_blank and text.startswith(" ") else text
    return unicodedata.normalize("NFC", text) if family in NFC else text


def target_runs(batch: dict[str, Any], k: int = 0) -> list[list[int]]:
    """The ids of neighbouring targets of row k."""
    runs: list[list[int]] = [[]]
    for label in batch["labels"][k].tolist():
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def decoded(family: str, batch: dict[str, Any], k: int = 0) -> list[str]:
    """The text of every run of targets of row k."""
    return [build(family).tokenizer.decode(run, skip_special_tokens=False) for run in target_runs(batch, k)]


def to_text(family: str, batch: dict[str, Any], k: int = 0) -> str:
    return build(family).tokenizer.decode(ids_of(batch, k))


def ids_of(batch: dict[str, Any], k: int = 0) -> list[int]:
    return batch["input_ids"][k][batch["attention_mask"][k].bool()].tolist()


def special_ids(family: str, tokens: str) -> set[int]:
    tokenizer = build(family).tokenizer
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens.split()}
    assert all(i is not None and i != tokenizer.unk_token_id for t, i in found.items() if t != "<unk>"), found
    return set(found.values())


def own_call(family: str, one: Row, *, prompt: bool = False) -> dict[str, Any]:
    """The processor's tensors for a row, by its own chat call, without any of our code."""
    processor, images = build(family), iter(one["images"])
    messages = []
    for message in one["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [{**part, "image": next(images)} if part["type"] == "image" else part for part in parts]
        if message["role"] in ("assistant", "system") and family in STRING_ASSISTANT_ONLY:
            parts = "".join(part["text"] for part in parts)
        kept = {key: value for key, value in message.items() if key not in ("train", "weight", "objective")}
        messages.append({**kept, "content": parts})
    found = processor.apply_chat_template(
        messages, tools=one.get("tools"), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=prompt
    )  # fmt: skip
    return dict(found)


def prompt_ids(family: str, one: Row) -> list[int]:
    """The ids that the model is given at inference, before the row's last answer."""
    if family == "paligemma":
        text = "<image>" * len(one["images"]) + one["messages"][0]["content"][-1]["text"]
        return ids_of(build(family)(text=[text], images=[one["images"]], return_tensors="pt"))[:-1]  # but its "\n"
    asked = {**one, "messages": one["messages"][:-1]}
    return ids_of(own_call(family, asked, prompt=True))


def refuses(note: Callable[[str, Any], None], family: str, one: Row | list[Row], error: type, match: str) -> None:
    """The row is refused with a clear error that names it; noted for the table."""
    rows = one if isinstance(one, list) else [one]
    with pytest.raises(error, match=match) as caught:
        ChatCollator(build(family))([{**r, "id": "row-17"} for r in rows])
    assert "row-17" in str(caught.value)
    note("refused", match)


def check(family: str, one: Row, expected: list[str], *, collator: ChatCollator | None = None) -> dict[str, Any]:
    """Targets decode to what is expected, are the input's own ids, hold no media token, and come after the own prompt."""
    batch = (collator or collator_of(family))([one])
    assert decoded(family, batch) == expected
    trained = batch["labels"] != -100
    assert torch.equal(batch["labels"][trained], batch["input_ids"][trained])
    assert not (trained & (batch["attention_mask"] == 0)).any()
    assert not special_ids(family, TABLE[family].media) & set(batch["labels"][0].tolist())
    return batch


def check_prompt(family: str, one: Row, batch: dict[str, Any], k: int = 0) -> None:
    """The ids before the last answer are those of the processor's own inference prompt, and the next is a target."""
    prompt, ids = prompt_ids(family, one), ids_of(batch, k)
    trained = (batch["labels"][k][batch["attention_mask"][k].bool()] != -100).tolist()
    if family == "paligemma":  # whose newline after the prompt the processor writes itself
        prompt = ids[: len(prompt) + 1] if ids[: len(prompt)] == prompt else prompt
    assert ids[: len(prompt)] == prompt
    assert trained[len(prompt)] and not trained[len(prompt) - 1]


def same_but_for_padding(one: dict[str, Any], other: dict[str, Any], k: int = 0) -> None:
    """Row 0 of a batch is row k of another, padding left out."""
    mine, theirs = one["attention_mask"][0].bool(), other["attention_mask"][k].bool()
    for key in PER_TOKEN & set(one):
        left, right = one[key][0][mine], other[key][k][theirs]
        if key == "cross_attention_mask":  # its images are padded, too
            right = right[:, : left.shape[1]]
        assert torch.equal(left, right), key


# --- one row ---------------------------------------------------------------------------------------------------------


@every_family
def test_one_image_and_an_answer(family: str) -> None:
    check(family, one_image(), [said(family, "A bar.")])


@every_family
def test_text_without_an_image(family: str, record_property: Any) -> None:
    if family == "paligemma":
        return refuses(record_property, family, text_only(), MaskError, "needs an image in every row")
    batch = check(family, text_only(), [said(family, "Hello.")])
    assert "pixel_values" not in batch


@every_family
def test_every_turn_is_trained_but_those_marked_not_to_be(family: str, record_property: Any) -> None:
    if family == "paligemma":
        return refuses(record_property, family, conversation(), MaskError, "one user message and one answer")
    check(family, conversation(), [said(family, "First.", past=True), said(family, "Third.")])


@every_family
def test_a_last_turn_that_is_not_trained(family: str, record_property: Any) -> None:
    one = row(
        turn("user", None, "One?"), turn("assistant", "First."), turn("user", "Two?"),
        turn("assistant", "Second.", train=False), images=[picture()],
    )  # fmt: skip
    if family == "paligemma":
        return refuses(record_property, family, one, MaskError, "one user message and one answer")
    check(family, one, [said(family, "First.", past=True)])


@every_family
def test_a_system_turn_before_the_question(family: str, record_property: Any) -> None:
    one = one_image()
    one["messages"].insert(0, turn("system", "Be very brief."))
    if family == "paligemma":
        return refuses(record_property, family, one, MaskError, "one user message and one answer")
    if family == "mllama":
        refuses(record_property, family, one, RowError, "A system turn is not possible beside images")
        one = row(turn("system", "Be very brief."), *text_only("A bar.")["messages"])
    batch = check(family, one, [said(family, "A bar.")])
    assert "Be very brief." in to_text(family, batch)


@every_family
def test_images_between_texts(family: str) -> None:
    one = row(
        turn("user", "From ", None, " to ", None, " what?"), turn("assistant", "Up."),
        images=[picture(), picture("blue")],
    )  # fmt: skip
    batch = check(family, one, [said(family, "Up.")])
    if family != "paligemma":
        theirs = own_call(family, {**one, "messages": one["messages"][:1]}, prompt=True)
        assert ids_of(batch)[: len(ids_of(theirs))] == ids_of(theirs)


@every_family
def test_the_same_image_twice_and_another_between(family: str) -> None:
    one = row(
        turn("user", None, None, None, "Which differs?"), turn("assistant", "The second."),
        images=[picture(), picture("blue"), picture()],
    )  # fmt: skip
    batch = check(family, one, [said(family, "The second.")])
    if family == "paligemma":
        theirs = build(family)(text=["<image>" * 3 + "Which differs?"], images=[one["images"]], return_tensors="pt")
    else:
        theirs = own_call(family, {**one, "messages": one["messages"][:1]}, prompt=True)
    assert torch.equal(batch["pixel_values"], theirs["pixel_values"])


IMAGE_IN_ANSWER = {  # what stands between the runs is the image
    "llava": ["", "\nSee   there.</s>"],  # images first, a blank after each text
    "internvl": ["See ", "\n there.<|im_end|>"],
    "minicpmv4_6": ["See ", "\n there.<|im_end|>"],
    "gemma3": ["See", "there.<end_of_turn>"],
    "llama4": ["See", "there.<|eot|>"],
    "cohere2_vision": ["<|START_RESPONSE|>See", "there.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"],
}
NO_IMAGE_IN_ANSWER = {
    "llava_next": "leaves out the assistant's content",  # it renders the first part alone
    "llava_onevision": "training prompt is not the inference prompt",  # images first
    "molmo2": "training prompt is not the inference prompt",  # images before the first turn
    "mllama": "training prompt is not the inference prompt",  # an image removes the dated system turn
    "paligemma": "image",
}


@every_family
def test_an_image_inside_an_answer_is_input_and_never_target(family: str, record_property: Any) -> None:
    one = row(turn("user", "Draw it"), turn("assistant", "See ", None, " there."), images=[picture()])
    if family in NO_IMAGE_IN_ANSWER:
        return refuses(record_property, family, one, RowError, NO_IMAGE_IN_ANSWER[family])
    default = [TABLE[family].opening + "See ", " there." + TABLE[family].end]
    expected = IMAGE_IN_ANSWER.get(family, default)
    if TABLE[family].loses_first_blank and family == "aria":
        expected = ["See ", "there.<|im_end|>"]
    check(family, one, expected)


@every_family
def test_a_prompt_and_its_completion(family: str, record_property: Any) -> None:
    collator = collator_of(family)
    one = {"prompt": "What is it?", "completion": "A bar.", "images": [picture()]}
    batch = check(family, one, [said(family, "A bar.")])
    same_but_for_padding(batch, collator([one_image()]))
    context = {
        "prompt": conversation()["messages"][:5], "completion": [turn("assistant", "Third.")], "images": [picture()],
    }  # fmt: skip
    if family == "paligemma":
        return refuses(record_property, family, context, MaskError, "one user message and one answer")
    check(family, context, [said(family, "Third.")])


@every_family
def test_markers_in_plain_strings_place_the_images(family: str, record_property: Any) -> None:
    collator = collator_of(family)
    if family == "paligemma":
        asked, parts = "<image><image>Which?", turn("user", None, None, "Which?")
    else:
        asked, parts = "From <image> to <image>?", turn("user", "From ", None, " to ", None, "?")
    images = [picture(), picture("blue")]
    strings = row({"role": "user", "content": asked}, {"role": "assistant", "content": "Up."}, images=images)
    batch = check(family, strings, [said(family, "Up.")])
    theirs = collator([row(parts, turn("assistant", "Up."), images=images)])
    same_but_for_padding(batch, theirs)
    assert torch.equal(batch["pixel_values"], theirs["pixel_values"])


# --- against the processor's own call --------------------------------------------------------------------------------


def own_row(family: str, one: Row) -> tuple[list[int], dict[str, Any]]:
    """(ids, tensors) of a finished row by the processor's own call; where ours differs on purpose, by its parts."""
    tokenizer = build(family).tokenizer
    if family == "paligemma":
        asked, answered = (m["content"][-1]["text"] for m in one["messages"])
        found = dict(
            build(family)(text=["<image>" + asked], images=[one["images"]], suffix=[answered], return_tensors="pt")
        )
        found.pop("labels")
        return ids_of(found), found
    found = own_call(family, one)
    ids = ids_of(found)
    answer = one["messages"][-1]["content"][-1]["text"]
    if family == "llava_onevision":  # blanks before the answer as in the inference prompt
        ids = prompt_ids(family, one) + tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
    if (
        family == "qwen3_vl_thinking"
    ):  # "<think>\n" and "\n</think>" apart, as it writes them, not as one token of two newlines
        said_here = "\n</think>\n\n" + answer + "<|im_end|>\n"
        ids = prompt_ids(family, one) + tokenizer(said_here, add_special_tokens=False)["input_ids"]
    if family == "llava":  # the blank after the answer makes place for the end of sequence
        assert tokenizer.convert_ids_to_tokens(ids[-1:]) == ["▁"]
        ids = ids[:-1]
    return ([*ids, tokenizer.eos_token_id] if family in ADDS_END else ids), found


@every_family
def test_an_image_row_has_the_processors_own_tensors(family: str) -> None:
    batch = collator_of(family)([one_image()])
    ids, theirs = own_row(family, one_image())
    assert ids_of(batch) == ids
    assert set(batch) - {"labels"} == set(theirs)
    for key, value in theirs.items():
        if key not in PER_TOKEN:
            assert batch[key].dtype == value.dtype and torch.equal(batch[key], value), key
        elif family not in ADDS_END | OWN_SEAMS:
            assert torch.equal(batch[key], value), key
        elif key in ("mm_token_type_ids", "token_type_ids"):
            length = len(prompt_ids(family, one_image()))
            assert torch.equal(batch[key][:, :length], value[:, :length]), key
            assert not batch[key][:, length:].any(), key


@every_chat
def test_a_conversation_has_the_processors_own_ids(family: str) -> None:
    if family == "llava_onevision":
        pytest.skip("its finished conversation is not what it asks with: the prompt's own ids are another check")
    ids, _ = own_row(family, conversation())
    assert ids_of(collator_of(family)([conversation()])) == ids


@every_chat
def test_a_text_row_has_the_processors_own_tensors(family: str) -> None:
    batch = collator_of(family)([text_only()])
    ids, theirs = own_row(family, text_only())
    assert ids_of(batch) == ids
    assert set(batch) - {"labels"} == set(theirs)


@every_family
def test_the_ids_before_the_answer_are_the_processors_own_prompt(family: str) -> None:
    rows = [one_image(), conversation(), text_only()] if family != "paligemma" else [one_image()]
    if family not in ("paligemma", "mllama"):
        rows.append(row(turn("system", "Be brief."), *one_image()["messages"], images=[picture()]))
    for one in rows:
        check_prompt(family, one, collator_of(family)([one]))


# --- batches ---------------------------------------------------------------------------------------------------------


def mixed_rows(family: str) -> list[Row]:
    if family == "paligemma":
        return [one_image("B."), one_image("A longer answer, this one.", "Why?"), one_image()]
    return [text_only(), conversation(), one_image("A longer answer, this one."), text_only("Yes.", "No?")]


@every_family
def test_rows_with_and_without_images_share_a_batch(family: str, record_property: Any) -> None:
    rows, collator = mixed_rows(family), collator_of(family)
    together = collator(rows)
    for k, one in enumerate(rows):
        same_but_for_padding(collator([one]), together, k)
    if family == "paligemma":
        return refuses(record_property, family, [one_image(), text_only()], MaskError, "needs an image in every row")
    assert decoded(family, together, 0) == [said(family, "Hello.")]
    assert decoded(family, together, 1) == [said(family, "First.", past=True), said(family, "Third.")]
    assert decoded(family, together, 2) == [said(family, "A longer answer, this one.")]
    assert decoded(family, together, 3) == [said(family, "Yes.")]


@every_family
def test_left_and_right_padding_give_the_same_rows(family: str) -> None:
    rows = mixed_rows(family)
    right, left = collator_of(family)(rows), ChatCollator(build(family), padding_side="left")(rows)
    for batch, column in ((right, 0), (left, -1)):
        assert batch["attention_mask"][:, column].all()
        padding = batch["attention_mask"] == 0
        assert padding.any() and (batch["labels"][padding] == -100).all()
        assert set(batch["input_ids"][padding].tolist()) == {build(family).tokenizer.pad_token_id}
    for k in range(len(rows)):
        mine, theirs = right["attention_mask"][k].bool(), left["attention_mask"][k].bool()
        for key in PER_TOKEN & set(right):
            assert torch.equal(right[key][k][mine], left[key][k][theirs]), key
    assert torch.equal(right["pixel_values"], left["pixel_values"])


@every_family
def test_the_tokenizers_own_padding_side_does_not_matter(family: str) -> None:
    rows, other = mixed_rows(family), copy.deepcopy(build(family))
    other.tokenizer.padding_side = "left" if other.tokenizer.padding_side == "right" else "right"
    batch, theirs = collator_of(family)(rows), ChatCollator(other)(rows)
    assert set(batch) == set(theirs)
    assert all(torch.equal(batch[key], theirs[key]) for key in batch)


@every_family
def test_an_end_token_that_also_pads_is_still_a_target(family: str) -> None:
    rows, other = mixed_rows(family), copy.deepcopy(build(family))
    other.tokenizer.pad_token = other.tokenizer.eos_token
    batch, theirs = collator_of(family)(rows), ChatCollator(other)(rows)
    assert torch.equal(batch["labels"], theirs["labels"])
    assert torch.equal(batch["attention_mask"], theirs["attention_mask"])


@every_family
def test_a_sample_has_the_same_tensors_in_any_order_and_after_pickling(family: str) -> None:
    rows, again = mixed_rows(family), pickle.loads(pickle.dumps(collator_of(family)))
    before = copy.deepcopy([one["messages"] for one in rows])
    forward, backward = collator_of(family)(rows), again(rows[::-1])
    for k, one in enumerate(rows):
        alone = ChatCollator(build(family))([one])
        same_but_for_padding(alone, forward, k)
        same_but_for_padding(alone, backward, len(rows) - 1 - k)
    assert [one["messages"] for one in rows] == before
    assert all(image is picture() for one in rows for image in one["images"])


@every_family
def test_no_media_or_padding_token_is_a_target(family: str) -> None:
    own, batch = TABLE[family], collator_of(family)(mixed_rows(family))
    never = special_ids(family, own.media) | special_ids(family, own.pad)
    if own.pad == own.end:  # GLM
        never -= special_ids(family, own.pad)
    targets = set(batch["labels"].flatten().tolist()) - {-100}
    assert targets and not targets & never


# --- texts that are hard on a tokenizer or a template ----------------------------------------------------------------

HARD = {
    "emoji": "🙂 👩‍👩‍👧 and 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "chinese": "北京和上海。你好，世界",
    "composed": unicodedata.normalize("NFC", "café naïve Ångström"),
    "decomposed": unicodedata.normalize("NFD", "café naïve Ångström"),
    "joiners": "a\u200db\u200cc\u200bd\ufeffe",
    "right to left": "שלום עולם مرحبا",
    "carriage returns": "one\r\ntwo\r\n\r\nthree\rfour",
    "tabs": "a\tb\t\tc\n\td",
    "a blank before": " yes",
    "blanks before": "   yes",
    "newlines before": "\n\nyes",
    "a newline and blanks before": "\n  yes",
    "a blank after": "yes ",
    "newlines after": "yes\n\n",
    "a long word": "Donaudampfschifffahrtsgesellschaft" * 12,
    "digits": "3.14159 2,718 1e-9 007 50% 1/2",
    "signs": "a<b>c</b> & $x^2$ {\"k\": [1]} \\n %s {{ x }} {% y %} # `z`",
    "blank lines inside": "One.\n\nTwo:\n\n\nThree\n\n\n\nfour.",
    "one character": "x",
    "a mark first": "\u0301a",
    "a tag alone": "<b>",
    "tags alone": "<b></b>",
    "a marker alone": "<image>",
    "tags at both ends": "<b>bold</b>",
}  # fmt: skip


def for_every_kind(family: str, make: Callable[[str], tuple[Row, list[str]]], *, asked: bool = False) -> None:
    """Check the rows that `make` makes of the hard texts, each after its own prompt, and name all that fail."""
    wrong = {}
    for kind, text in HARD.items():
        one, expected = make(text)
        try:
            batch = check(family, one, expected, collator=ChatCollator(build(family)))
            if asked and kind == "a marker alone":
                continue  # the processor takes it for an image, in its own call
            if text.startswith("\n") and len(expected) > 1:
                # The header's newline and an answer's first stay apart as the model writes them: other ids, the same text.
                assert to_text(family, batch).startswith(build(family).tokenizer.decode(prompt_ids(family, one)))
            else:
                check_prompt(family, one, batch)
        except (AssertionError, ValueError, IndexError) as error:
            wrong[kind] = f"{type(error).__name__}: {str(error)[:300]}"
    assert not wrong


@every_family
def test_hard_texts_as_the_answer(family: str) -> None:
    for_every_kind(family, lambda text: (one_image(text), [said(family, text)]))


@every_family
def test_hard_texts_as_the_question(family: str) -> None:
    for_every_kind(family, lambda text: (one_image("A bar.", text), [said(family, "A bar.")]), asked=True)


@every_chat
def test_hard_texts_as_an_earlier_answer(family: str) -> None:
    def make(text: str) -> tuple[Row, list[str]]:
        first = [turn("user", "One?"), turn("assistant", text)]
        one = row(*first, turn("user", None, "Two?"), turn("assistant", "Red."), images=[picture()])
        return one, [said(family, text, past=True), said(family, "Red.")]

    for_every_kind(family, make, asked=True)


# --- the number of image tokens ---------------------------------------------------------------------------------------

CANNOT_COUNT = {
    "gemma3", "lfm2_vl", "llama4", "llava_onevision", "minicpmv4_6", "mllama", "molmo2", "paligemma", "smolvlm",
}  # fmt: skip


@every_family
def test_a_processor_that_cannot_count_its_image_tokens_is_said_once(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    collator = ChatCollator(build(family))
    if family != "paligemma":
        collator([text_only()])
    assert not caplog.records
    for _ in range(2):
        collator([one_image()])
        collator.measure(one_image())
    said_of = [r.message for r in caplog.records if "rows are proven to have image tokens, not how many" in r.message]
    assert len(said_of) == (family in CANNOT_COUNT) and len(caplog.records) == len(said_of)


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in CANNOT_COUNT])
def test_an_image_token_too_few_or_too_many_is_refused(family: str, by: int) -> None:
    """The family's processor, one of whose image tokens is taken out or written twice."""
    processor, wrong = copy.copy(build(family)), family in QWEN  # whose faster path must be seen to be off, too
    usual = type(processor)

    def call(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = dict(usual.__call__(self, *args, **kwargs))
        if not wrong or "pixel_values" not in found:
            return found
        at = int((found["input_ids"][-1] == image_id).nonzero()[1])
        columns = [k for k in range(found["input_ids"].shape[1]) for _ in range(1 + by * (k == at))]
        return {key: found[key][:, columns] if key in PER_TOKEN else found[key] for key in found}

    image_id = processor.image_token_id
    processor.__class__ = type(usual.__name__, (usual,), {"__call__": call})
    collator = ChatCollator(processor)
    if not wrong:
        collator([one_image()])
        wrong = True
    with pytest.raises(MaskError, match=r"row-17: the pixels imply \d+ image tokens, the ids hold \d+"):
        collator([{**one_image(), "id": "row-17"}])


# --- literal control tokens ------------------------------------------------------------------------------------------


def control_tokens(family: str) -> list[str]:
    own = TABLE[family]
    return [own.placeholder, *own.media.split(), own.end, own.header, own.pad]


@every_family
def test_a_control_token_in_the_users_text_stays_text(family: str) -> None:
    collator = collator_of(family)
    special = set(build(family).tokenizer.all_special_ids)
    plain = [i for i in ids_of(collator([one_image()])) if i in special]
    for token in control_tokens(family):
        if family == "paligemma" and token == "\n":
            continue
        batch = check(family, one_image("A bar.", f"Is it {token} or x{token}y?"), [said(family, "A bar.")])
        assert [i for i in ids_of(batch) if i in special] == plain, token
        text = to_text(family, batch)
        assert f"Is it {token} or x{token}y?" in text, token


@every_family
def test_a_control_token_in_an_answer_stays_text(family: str) -> None:
    collator = collator_of(family)
    special = set(build(family).tokenizer.all_special_ids)
    plain = [i for i in ids_of(collator([one_image()])) if i in special]
    for token in control_tokens(family):
        answer = f"It is {token} not x{token}y."
        batch = check(family, one_image(answer), [said(family, answer)])
        assert [i for i in ids_of(batch) if i in special] == plain, token
        for edge in (token + " it is", "it is " + token):
            if edge.strip() != edge:
                continue
            batch = check(family, one_image(edge), [said(family, edge)])
            assert [i for i in ids_of(batch) if i in special] == plain, token


@every_chat
def test_a_control_token_in_the_systems_text_stays_text(family: str) -> None:
    for token in control_tokens(family):
        one = row(turn("system", f"Never write {token} here."), *text_only()["messages"])
        batch = check(family, one, [said(family, "Hello.")])
        assert f"Never write {token} here." in to_text(family, batch), token


# --- reasoning and tools ---------------------------------------------------------------------------------------------

REASONED = {  # targets of an answer "Red." with the reasoning "because"
    "qwen3_vl_thinking": "because\n</think>\n\nRed.<|im_end|>",
    "glm4v_moe": "<think>because</think>\nRed.<|endoftext|>",
    "lfm2_vl": "<think>because</think>Red.<|im_end|>",
}
thinking = pytest.mark.parametrize("family", list(REASONED))


@thinking
def test_reasoning_is_trained_with_its_answer(family: str) -> None:
    one = row(turn("user", None, "Colour?"), turn("assistant", "Red.", reasoning_content="because"), images=[picture()])
    check_prompt(family, one, check(family, one, [REASONED[family]]))


@thinking
def test_reasoning_inside_the_content_is_trained_with_its_answer(family: str) -> None:
    one = one_image("<think>because</think>Red.")
    check_prompt(family, one, check(family, one, [REASONED[family]]))


@thinking
def test_reasoning_of_earlier_turns_is_dropped_and_said_so(family: str) -> None:
    for early in (
        turn("assistant", "Early.", reasoning_content="at first"),
        turn("assistant", "<think>at first</think>Early."),
    ):
        one = row(
            turn("user", None, "One?"), early, turn("user", "Colour?"),
            turn("assistant", "Red.", reasoning_content="because"), images=[picture()],
        )  # fmt: skip
        collator = ChatCollator(build(family))
        check(family, one, [said(family, "Early.", past=True), REASONED[family]], collator=collator)
        assert any("earlier turn dropped" in note for _, note in collator.counts)


@thinking
def test_a_control_token_in_the_reasoning_stays_text(family: str) -> None:
    for token in (TABLE[family].end, TABLE[family].placeholder, TABLE[family].header.strip()):
        thought = f"not {token} but"
        one = row(turn("user", "Colour?"), turn("assistant", "Red.", reasoning_content=thought))
        check(family, one, [REASONED[family].replace("because", thought)])


@pytest.mark.parametrize("family", [family for family in CHATS if family not in REASONED])
@pytest.mark.parametrize("answer", ["<think>because</think>Red.", "<think>\nbecause\n</think>\n\nRed.", "Red.<think>"])
def test_thinking_tags_are_words_where_the_template_knows_none(family: str, answer: str) -> None:
    one = row(turn("user", "One?"), turn("assistant", answer), turn("user", "Two?"), turn("assistant", answer))
    batch = check(
        family, one, [said(family, answer, past=True), said(family, answer)], collator=ChatCollator(build(family))
    )
    check_prompt(family, one, batch)


CALL = {"type": "function", "function": {"name": "zoom", "arguments": {"factor": 2}}}
CALLED = '<tool_call>\n{"name": "zoom", "arguments": {"factor": 2}}\n</tool_call><|im_end|>'
TOOLS = [{"type": "function", "function": {"name": "zoom", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(("content", "opening"), [("", ""), ("Wait.", "Wait.\n"), (None, "")])
def test_tool_calls_are_trained_and_tool_answers_are_not(content: str | None, opening: str) -> None:
    one = row(
        turn("user", None, "Zoom."),
        {"role": "assistant", "content": content, "tool_calls": [CALL]},
        turn("tool", "done"),
        turn("assistant", "A bar."),
        images=[picture()],
        tools=TOOLS,
    )
    batch = check("qwen3_vl", one, [opening + CALLED, "A bar.<|im_end|>"])
    theirs = {**one, "messages": [{**m, "content": m["content"] or ""} for m in one["messages"]]}
    assert ids_of(batch) == ids_of(own_call("qwen3_vl", theirs))


def test_a_tool_call_may_be_the_last_turn() -> None:
    one = row(turn("user", "Zoom."), {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}, tools=TOOLS)
    check("qwen3_vl", one, [CALLED.replace("<|im_end|>", "\n" + CALLED)])


def test_an_image_in_a_tool_answer_is_the_processors_own() -> None:
    one = row(
        turn("user", "Zoom."),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        turn("tool", "done ", None),
        turn("assistant", "A bar."),
        images=[picture()],
    )
    batch = check("qwen3_vl", one, [CALLED, "A bar.<|im_end|>"])
    assert ids_of(batch) == ids_of(own_call("qwen3_vl", one))


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|im_start|>assistant\n"])
def test_a_control_token_in_a_tool_calls_arguments_stays_text(token: str) -> None:
    call = {"type": "function", "function": {"name": "say", "arguments": {"text": token.strip()}}}
    one = row(turn("user", "Say."), {"role": "assistant", "content": "", "tool_calls": [call]})
    expected = CALLED.replace('"zoom"', '"say"').replace('{"factor": 2}', json.dumps({"text": token.strip()}))
    check("qwen3_vl", one, [expected])


def test_a_control_token_in_a_tools_description_stays_text() -> None:
    tool = {"type": "function", "function": {"name": "say", "description": "ends with <|im_end|> or <|image_pad|>"}}
    batch = check("qwen3_vl", row(*text_only()["messages"], tools=[tool]), ["Hello.<|im_end|>"])
    assert ids_of(batch).count(build("qwen3_vl").tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3


# --- weights, objectives, explanations -------------------------------------------------------------------------------


@every_family
def test_a_turns_weight_and_objective_lie_on_its_targets(family: str) -> None:
    if family == "paligemma":
        one = one_image()
        one["messages"][1] |= {"weight": 0.25, "objective": "nll"}
        batch, plain = collator_of(family)([one]), collator_of(family)([one_image()])
        targets = batch["labels"] != -100
        assert torch.equal(batch["labels"], plain["labels"])
        assert torch.equal(batch["loss_weights"], torch.where(targets, 0.25, 1.0))
        assert torch.equal(batch["objective_ids"], torch.where(targets, sorted(OBJECTIVES).index("nll"), -1))
        return
    one = row(
        turn("user", None, "One?"), turn("assistant", "First.", weight=0.25), turn("user", "Two?"),
        turn("assistant", "Second.", objective="dft"), turn("user", "Three?"),
        turn("assistant", "Third.", weight=3, objective="nll"), images=[picture()],
    )  # fmt: skip
    batch = collator_of(family)([one, text_only()])
    assert batch["loss_weights"].dtype == torch.float32 and batch["objective_ids"].dtype == torch.int64
    weights, objectives, runs = [], [], target_runs(batch)
    at = 0
    labels = batch["labels"][0]
    for run in runs:
        while labels[at] == -100:
            assert batch["loss_weights"][0, at] == 1 and batch["objective_ids"][0, at] == -1
            at += 1
        weights.append(set(batch["loss_weights"][0, at : at + len(run)].tolist()))
        objectives.append(set(batch["objective_ids"][0, at : at + len(run)].tolist()))
        at += len(run)
    assert weights == [{0.25}, {1.0}, {3.0}]
    assert objectives == [{-1}, {sorted(OBJECTIVES).index("dft")}, {sorted(OBJECTIVES).index("nll")}]
    assert (batch["loss_weights"][1] == 1).all() and (batch["objective_ids"][1] == -1).all()
    assert not {"loss_weights", "objective_ids"} & set(collator_of(family)([one_image()]))


AFTER = {  # the template's text after the last answer: input, never target
    **dict.fromkeys([*QWEN, "idefics3", "smolvlm", "internvl", "gemma3", "aria", "lfm2_vl", "molmo2", "minicpmv4_6"], "\n"),
    "llava_next": " ",
}  # fmt: skip


@every_family
def test_explaining_names_the_reason_of_every_token(family: str) -> None:
    own, tokenizer = TABLE[family], build(family).tokenizer
    one = one_image() if family == "paligemma" else conversation()
    seen, batch = collator_of(family).explain(one), collator_of(family)([one])
    ids, labels = ids_of(batch), batch["labels"][0].tolist()
    assert [view.id for view in seen] == ids and [view.position for view in seen] == list(range(len(ids)))
    by_reason: dict[str, list[int]] = {}
    for view in seen:
        by_reason.setdefault(view.reason, []).append(view.id)
    assert [view.trained for view in seen] == [label != -100 for label in labels]
    assert {v.reason for v in seen if v.trained} <= {"response", "end of turn"}
    assert {v.reason for v in seen if not v.trained} <= {"prompt", "media", "template after the answer"}
    counts = dict(seen.counts)
    targets = counts.pop("targets")
    assert targets == counts["response"] + counts["end of turn"] == sum(label != -100 for label in labels)
    assert sum(counts.values()) == len(seen) == sum(run["tokens"] for run in seen.runs)
    assert sum(t["targets"] for t in seen.turns) == targets
    media = special_ids(family, own.media)
    assert {v.reason for v in seen if v.id in media} == {"media"}
    last = "A bar." if family == "paligemma" else "Third."
    assert [v.reason for v in seen if v.trained][-1] == "end of turn"
    assert seen.runs[-1]["text"] == AFTER[family] if family in AFTER else seen.tokens[-1].reason == "end of turn"
    text = "".join(tokenizer.decode([i]) for i in by_reason["end of turn"])
    assert own.end.endswith(tokenizer.decode(by_reason["end of turn"][-1:])) and last not in text


@every_family
def test_the_hash_of_the_masks_changes_when_a_mask_does(family: str) -> None:
    def fingerprint(one: Row) -> str:
        return mask_report([ChatCollator(build(family)).explain(one)])["hash"]

    assert fingerprint(one_image()) == fingerprint(one_image()) != fingerprint(one_image("A car."))
    if family != "paligemma":
        other = conversation()
        other["messages"][3].pop("train")
        assert fingerprint(conversation()) != fingerprint(other)


# --- workers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_give_the_tensors_of_the_process_itself(start: str) -> None:
    collator, rows = collator_of("smolvlm"), mixed_rows("smolvlm")
    loader = torch.utils.data.DataLoader(
        rows, batch_size=2, num_workers=2, collate_fn=collator, multiprocessing_context=start
    )
    for k, batch in enumerate(loader):
        here = collator(rows[2 * k : 2 * k + 2])
        assert set(batch) == set(here) and all(torch.equal(batch[key], here[key]) for key in here)


# --- proofs that must fail -------------------------------------------------------------------------------------------


def changed(family: str, old: str, new: str) -> Any:
    """A copy of a family's processor with another template."""
    other = copy.deepcopy(build(family))
    assert old in other.chat_template
    other.chat_template = other.chat_template.replace(old, new)
    return other


def with_call(family: str, edit: Callable[[Any, dict[str, Any]], Any]) -> Any:
    """A copy of a family's processor whose call goes through `edit(call, keywords)`."""
    other = copy.deepcopy(build(family))
    kind = type(other)

    class Broken(kind):  # type: ignore[valid-type, misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return edit(lambda **k: kind.__call__(self, *args, **k), kwargs)

    Broken.__name__ = kind.__name__
    other.__class__ = Broken
    return other


def refused(processor: Any, one: Row, match: str) -> None:
    with pytest.raises((MaskError, RowError), match=match) as caught:
        ChatCollator(processor)([{**one, "id": "row-17"}])
    assert "row-17" in str(caught.value)


BROKEN = ["pixtral", "gemma3", "lfm2_vl", "cohere2_vision", "idefics3"]
broken_chats = pytest.mark.parametrize("family", BROKEN)


@broken_chats
def test_a_processor_that_truncates_is_refused(family: str) -> None:
    def cut(call: Any, words: dict[str, Any]) -> Any:
        batch = call(**words)
        for key, value in batch.items():
            if key in PER_TOKEN | {"offset_mapping"}:
                batch[key] = value[:, :-4]
        return batch

    refused(with_call(family, cut), one_image("A rather long answer, is it not?"), "(?i)not decode|left out|end")


@broken_chats
def test_a_processor_that_repeats_the_last_token_is_refused(family: str) -> None:
    def twice(call: Any, words: dict[str, Any]) -> Any:
        batch = call(**words)
        for key, value in batch.items():
            if key in PER_TOKEN | {"offset_mapping"}:
                batch[key] = torch.cat([value, value[:, -1:]], 1)
        return batch

    with pytest.raises((MaskError, RowError), match="row-17"):
        ChatCollator(with_call(family, twice))([{**one_image(), "id": "row-17"}])


@pytest.mark.parametrize("family", ["glm4v", "molmo2", "qwen3_vl"])
def test_a_processor_that_drops_the_types_of_tokens_is_refused(family: str) -> None:
    def dropped(call: Any, words: dict[str, Any]) -> Any:
        batch = call(**words)
        batch.pop("mm_token_type_ids", None)
        return batch

    processor = with_call(family, dropped)
    collator = ChatCollator(processor)
    if collator.processing.fast is not None:
        pytest.fail("the faster path was taken although it differs from the processor")
    refused(processor, one_image(), "mm_token_type_ids")


@broken_chats
def test_a_template_that_rewrites_the_answer_is_refused(family: str) -> None:
    other = copy.deepcopy(build(family))
    other.chat_template = other.chat_template.replace("part.text", "(part.text | replace('bar', 'car'))").replace(
        "{{- content }}", "{{- content | replace('bar', 'car') }}"
    ).replace("message.content | trim", "message.content | replace('bar', 'car')")  # fmt: skip
    assert other.chat_template != build(family).chat_template
    with pytest.raises((MaskError, RowError), match="row-17"):
        ChatCollator(other)([{**one_image("A bar."), "id": "row-17"}])


NEITHER = "renders a user's and an assistant's text neither from strings nor from lists"
TURN3 = "'<|im_start|>assistant\\n' + text"
WRONG = {  # what is wrong: (family, old piece of its template, new piece, error)
    "cuts answers": ("qwen3_vl", TURN3, TURN3 + "[:4]", "changes the assistant's text|not decode"),
    "writes answers in capitals": ("qwen3_vl", TURN3, TURN3.replace("text", "(text | upper)"), NEITHER),
    "writes answers twice": ("qwen3_vl", TURN3, TURN3 + " + text", NEITHER),
    "writes every text twice": (
        "qwen2_5_vl", "{{- parts(message.content) }}", "{{- parts(message.content) * 2 }}", NEITHER,
    ),
    "repeats answers on a line of their own": (
        "pixtral", "parts(message.content) + eos", "parts(message.content) ~ '\\n' ~ parts(message.content) + eos", NEITHER,
    ),
    "asks with another header": (
        "qwen3_vl", "prompt %}{{- '<|im_start|>assistant", "prompt %}{{- '<|im_start|>ASSISTANT",
        "row-17: the training prompt is not the inference prompt",
    ),
    "asks with another role": (
        "mllama", "{{- '<|start_header_id|>assistant", "{{- '<|start_header_id|>model",
        "row-17: the training prompt is not the inference prompt",
    ),
    "adds a word when it asks": (
        "internvl", "<|im_start|>assistant\\n", "<|im_start|>assistant\\nSure: ",
        "row-17: the training prompt is not the inference prompt",
    ),
    "cuts the user's text": (
        "lfm2_vl", "{{- parts(message.content) + '<|im_end|>\\n' }}", "{{- parts(message.content)[:12] + '<|im_end|>\\n' }}",
        "row-17, message 0: the chat template of Lfm2VlProcessor lost or changed the user's text",
    ),
    "drops the user's text of long rows": (
        "internvl", "{%- elif part.type == 'text' %}{{- part.text }}",
        "{%- elif part.type == 'text' and (part.text | length) < 20 %}{{- part.text }}",
        "row-17, message 0: the chat template of InternVLProcessor lost or changed the user's text",
    ),
    "ends answers with a word": (
        "gemma3", "{{- '<end_of_turn>\\n' }}", "{{- 'The end.\\n' }}", "row-17.*no end-of-turn token follows the answer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_template_is_refused(what: str) -> None:
    family, old, new, match = WRONG[what]
    with pytest.raises(MaskError, match=match):
        ChatCollator(changed(family, old, new))(
            [{**one_image("A bar, it is.", "What is it, and what is it not?"), "id": "row-17"}]
        )


def test_an_end_token_that_is_missing_in_the_middle_is_refused() -> None:
    old = "{{- '<|im_end|>\\n' }}\n{%- endfor %}"
    other = changed(
        "internvl",
        old,
        old.replace("'<|im_end|>\\n'", "('<|im_end|>' if loop.last or message.role == 'user' else '') + '\\n'"),
    )
    with pytest.raises(MaskError, match="row-17.*end"):
        ChatCollator(other)([{**conversation(), "id": "row-17"}])


def test_a_tokenizer_that_decodes_otherwise_is_refused() -> None:
    other = copy.deepcopy(build("pixtral"))
    tokenizer = other.tokenizer.backend_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("bar", "car")])
    refused(other, one_image(), "targets do not decode to the answer")


# --- any conversation ------------------------------------------------------------------------------------------------

PIECES = [
    "a", "b", " ", "  ", "\n", "\n\n", "\r\n", "\t", ".", ":", "é", "e\u0301", "🙂", "北", "\u200d", "1", "%", "<", ">", "|",
    "<|", "|>", "<|im_end|>", "<|im_start|>", "im_end", "<image>", "[IMG]", "</s>", "<s>", "[INST]", "<start_of_image>",
    "<end_of_turn>", "<image_soft_token>", "<|image_pad|>", "ASSISTANT:", " USER:", "Assistant:", "User: ", "assistant\n",
    "<end_of_utterance>", "<|user|>", "<|endoftext|>", "<b>", "</b>", "[gMASK]", "<fake_token_around_image>", "{{", "%}",
]  # fmt: skip
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=7).map("".join)
ANSWER = TEXT.filter(lambda text: text.strip() != "")
ANY = ["qwen3_vl_thinking", "llava", "idefics3", "gemma3", "pixtral", "glm4v"]


@st.composite
def conversations(draw: Any) -> Row:
    messages, images = [], []
    for k in range(draw(st.integers(1, 3))):
        count = draw(st.integers(0, 1 if k else 2))
        parts: list[str | None] = [None] * count + [draw(TEXT)]
        images += [picture(draw(st.sampled_from(["red", "blue"])))] * count
        messages.append(turn("user", *parts))
        messages.append(turn("assistant", draw(ANSWER), train=draw(st.booleans())))
    messages[-1]["train"] = draw(st.booleans()) if any(m.get("train") for m in messages[:-1]) else True
    return row(*messages, images=images)


@pytest.mark.parametrize("family", ANY)
@settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)  # fmt: skip
@given(one=conversations())
def test_any_conversation_trains_its_answers_and_nothing_else(family: str, one: Row) -> None:
    expected = []
    last = len(one["messages"]) - 1
    for k, message in enumerate(one["messages"]):
        if message["role"] == "assistant" and message["train"]:
            answer = message["content"][0]["text"]
            expected.append(said(family, answer, past=k < last))
    batch = check(family, one, expected)
    fresh = ChatCollator(build(family))([one])  # what a collator saw before changes nothing
    assert all(torch.equal(batch[key], fresh[key]) for key in fresh)
    if one["messages"][-1]["train"]:
        assert (batch["labels"][0] != -100).any()


@every_family
def test_rows_shuffled_many_ways_keep_their_targets(family: str) -> None:
    shuffled = random.Random(0)
    rows = [one_image("A."), one_image("\n\nB."), one_image(" C."), one_image("D <image>.")]
    expected = [decoded(family, ChatCollator(build(family))([one])) for one in rows]
    for _ in range(3):
        order = shuffled.sample(range(4), 4)
        batch = collator_of(family)([rows[k] for k in order])
        assert [decoded(family, batch, at) for at in range(4)] == [expected[k] for k in order]
