"""Processors of the tests: each family builds, renders and processes rows in transformers' own class, and spells any text."""

from __future__ import annotations

import re
from typing import Any

import pytest
from PIL import Image
from processors import (
    BUILDERS,
    LIST_CONTENT_ONLY,
    NEEDS,
    NO_SYSTEM_WITH_IMAGES,
    STRING_ASSISTANT_ONLY,
    WITHOUT_CHAT,
    build_processor,
    full_qwen_processor,
    full_qwen_ranks,
    full_qwen_tokenizer,
    greedy_bpe,
)

ODD = "naïve 北京 🙂 <b>x</b>  two spaces\n\n3.14"
FAMILIES = sorted(BUILDERS)
CHATS = sorted(set(BUILDERS) - WITHOUT_CHAT)
IMAGE = {"type": "image"}


def build(family: str) -> Any:
    if family in NEEDS:
        pytest.importorskip(NEEDS[family])
    return build_processor(family)


def picture(width: int = 112, height: int = 56) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def turn(family: str, role: str, *parts: str | dict[str, str]) -> dict[str, Any]:
    """A turn of text and image parts, in the form that the family's template reads."""
    if role == "assistant" and family in STRING_ASSISTANT_ONLY:
        return {"role": role, "content": "".join(str(part) for part in parts)}
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    if role == "system" and family in STRING_ASSISTANT_ONLY:
        return {"role": role, "content": content[0]["text"]}
    return {"role": role, "content": content}


def one_image_row(family: str) -> list[dict[str, Any]]:
    return [turn(family, "user", IMAGE, "What is it?"), turn(family, "assistant", "A bar.")]


def text_row(family: str) -> list[dict[str, Any]]:
    return [turn(family, "user", "Hi, 北京."), turn(family, "assistant", "Hello.")]


def render(processor: Any, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    return processor.apply_chat_template(messages, tokenize=False, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_gives_back_an_odd_text(family: str) -> None:
    tokenizer = build(family).tokenizer
    assert tokenizer.decode(tokenizer(ODD, add_special_tokens=False)["input_ids"]) == ODD


@pytest.mark.parametrize("family", CHATS)
def test_a_template_renders_every_answer_once_and_every_image_in_its_row(family: str) -> None:
    processor = build(family)
    rows = {
        "one image": (one_image_row(family), 1, ["A bar."]),
        "two turns": (
            [*one_image_row(family), turn(family, "user", "And?"), turn(family, "assistant", "Red.")], 1, ["A bar.", "Red."]
        ),
        "text only": (text_row(family), 0, ["Hello."]),
        "images between texts": (
            [turn(family, "user", "From ", IMAGE, " to ", IMAGE, "?"), turn(family, "assistant", "Up.")], 2, ["Up."]
        ),
    }  # fmt: skip
    for name, (messages, images, answers) in rows.items():
        text = render(processor, messages)
        assert text.count(processor.image_token) == images, name
        assert [text.count(answer) for answer in answers] == [1] * len(answers), name


@pytest.mark.parametrize("family", CHATS)
def test_a_system_turn_is_rendered_before_the_question(family: str) -> None:
    processor = build(family)
    row = text_row(family) if family in NO_SYSTEM_WITH_IMAGES else one_image_row(family)
    # Pixtral's template puts the system text into the last turn and only if that is the user's.
    messages = [turn(family, "system", "Be brief."), *(row[:1] if family == "pixtral" else row)]
    text = render(processor, messages)
    assert text.count("Be brief.") == 1 and text.index("Be brief.") < text.index(row[0]["content"][-1]["text"])


@pytest.mark.parametrize("family", CHATS)
def test_string_content_is_rendered_like_one_text_part_or_not_at_all(family: str) -> None:
    processor = build(family)
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    if family == "llava_next":
        with pytest.raises(Exception, match="has no attribute 'text'"):
            render(processor, messages)
    elif family in LIST_CONTENT_ONLY:
        assert "Hi." not in render(processor, messages) and "Hello." not in render(processor, messages)
    else:
        parts = [turn(family, "user", "Hi."), turn(family, "assistant", "Hello.")]
        assert render(processor, messages) == render(processor, parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_row_becomes_ids_and_pixels(family: str) -> None:
    processor = build(family)
    text = "<image>What is it?" if family in WITHOUT_CHAT else render(processor, one_image_row(family))
    batch = processor(text=[text], images=[[picture()]], return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape and "pixel_values" in batch
    if family != "mllama":  # one token an image: the pixels are attended from outside the row
        before = processor.tokenizer(text)["input_ids"]
        assert batch["input_ids"].shape[1] > len(before)


@pytest.mark.parametrize("family", CHATS)
def test_a_text_row_becomes_the_ids_of_its_text(family: str) -> None:
    processor = build(family)
    text = render(processor, text_row(family))
    batch = processor(text=[text], return_tensors="pt", add_special_tokens=False)
    assert "pixel_values" not in batch
    assert processor.tokenizer.decode(batch["input_ids"][0]).endswith(text)


@pytest.mark.parametrize(
    ("family", "tiles"),
    [
        ("idefics3", 3),
        ("smolvlm", 3),
        ("internvl", 3),
        ("llava_next", 3),
        ("llava_onevision", 7),
        ("cohere2_vision", 3),
    ],
)
def test_a_wide_image_is_cut_into_tiles(family: str, tiles: int) -> None:
    processor = build(family)
    batch = processor(text=[render(processor, one_image_row(family))], images=[[picture()]], return_tensors="pt")
    pixels = batch["pixel_values"]
    assert (pixels.shape[1] if pixels.ndim == 5 else pixels.shape[0]) == tiles


def test_qwen3_vl_renders_tools_calls_and_tool_answers() -> None:
    processor = build("qwen3_vl")
    call = {"type": "function", "function": {"name": "zoom", "arguments": {"factor": 2}}}
    messages = [
        {"role": "user", "content": "Zoom."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "done "}, IMAGE]},
        {"role": "assistant", "content": "A bar."},
    ]
    text = render(processor, messages, tools=[{"type": "function", "function": {"name": "zoom"}}])
    assert text.startswith("<|im_start|>system\n# Tools\n\n")
    assert '<tools>\n{"type": "function", "function": {"name": "zoom"}}\n</tools>' in text
    assert text.endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "zoom", "arguments": {"factor": 2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\ndone <|vision_start|><|image_pad|><|vision_end|>\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nA bar.<|im_end|>\n"
    )


@pytest.mark.parametrize("family", ["qwen3_vl_thinking", "glm4v_moe", "lfm2_vl"])
def test_thinking_survives_in_the_last_turn_only(family: str) -> None:
    processor = build(family)
    thought = "<think>\nfirst\n</think>\n\n" if family == "qwen3_vl_thinking" else "<think>first</think>"
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>early</think>1."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2.", "reasoning_content": "first"},
    ]
    text = render(processor, messages)
    assert "early" not in text and text.count(thought) == 1


def test_paligemma_learns_from_a_suffix() -> None:
    processor = build("paligemma")
    batch = processor(text=["<image>What is it?"], images=[[picture()]], suffix=["A bar."], return_tensors="pt")
    learned = batch["labels"][0][batch["labels"][0] != -100]
    assert processor.tokenizer.decode(learned) == "A bar.<eos>"


def test_an_unknown_family_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="Choose one of .*'aria'.*'qwen3_vl'"):
        build_processor("qwen9_vl")


def test_the_full_qwen_tokenizer_has_the_released_ids() -> None:
    pytest.importorskip("dashscope")
    tokenizer = full_qwen_tokenizer()
    assert len(tokenizer) == 151_665
    released = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652}
    released |= {"<|image_pad|>": 151655, "<|video_pad|>": 151656, "<tool_call>": 151657, "<|file_sep|>": 151664}
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in released} == released
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (151645, 151643, None)
    assert tokenizer("<|im_start|>assistant\n")["input_ids"] == [151644, 77091, 198]


def test_the_full_qwen_tokenizer_merges_as_the_ranks_say() -> None:
    pytest.importorskip("dashscope")
    tokenizer, ranks = full_qwen_tokenizer(), full_qwen_ranks()
    # Split by hand as Qwen's pattern does: letters and marks take one space along, digits stand alone.
    words = "naïve| 北京| 🙂| <|b|>x|</|b|>| | two| spaces|\n\n|3|.|1|4".split("|")
    assert "".join(words) == ODD
    expected = [ranks[part] for word in words for part in greedy_bpe(ranks, word.encode())]
    assert tokenizer(ODD)["input_ids"] == expected
    assert tokenizer.decode(expected) == ODD


def test_the_full_qwen_processor_counts_an_images_tokens_by_its_area() -> None:
    pytest.importorskip("dashscope")
    processor = full_qwen_processor()
    text = render(processor, one_image_row("qwen2_5_vl"))
    batch = processor(text=[text], images=[[picture(280, 140)]], return_tensors="pt")
    assert (batch["input_ids"] == 151655).sum() == 10 * 5  # 28 x 28 pixels a token
    assert re.fullmatch(
        r"(?s)<\|im_start\|>system\nYou are a helpful assistant\.<\|im_end\|>\n.*A bar\.<\|im_end\|>\n", text
    )
