"""Processors: a family's name in, its real transformers processor out, with a small trained tokenizer and small images.

Every class is the family's own. Vocabularies are trained here in a second, images are 28 to 64 pixels wide, and an image
of 112 x 56 gives several tiles where the family tiles. `full_qwen_tokenizer` is the released vocabulary of Qwen2.5.
"""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import processor_templates as templates
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

SENTENCES = """
system user assistant model User Assistant USER ASSISTANT You are a helpful assistant. Answer the question, then say why.
What is in the picture? How many bars are there in the chart? Which is the largest, the red one or the blue one?
There are 3 apples, 12 pears and 450 plums; the total is 465. The answer is 3.14, not 2.72. Yes. No. It is on the left.
def area(width, height):
    return width * height
Café, naïve, Straße, señor. 你好，世界。北京和上海。这张图片里有什么？ Привет, мир. こんにちは。
{"name": "look", "arguments": {"x": 1, "y": [2, 3]}} <b>bold</b> <think>first</think> \\frac{1}{2} $x^2$

A paragraph.

Another   with spaces.
"""
BLANK_LINES = (
    "One.\n\nTwo:\n\n\nThree\n\nfour.\n"  # so that "\n\n" and ".\n\n" are tokens, as in the released vocabularies
)
PATCH = 14  # pixels; most towers here cut images into patches of this side
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_MEDIA = (
    "<|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> "
    "<|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
QWEN_SPECIAL = ["<|im_start|>", "<|im_end|>", *QWEN_MEDIA]
QWEN_ADDED = "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>".split()
QWEN3_ADDED = [*QWEN_ADDED, "<tool_response>", "</tool_response>", "<think>", "</think>"]
IDEFICS_SPECIAL = [
    "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]  # fmt: skip


# --- tokenizers ------------------------------------------------------------------------------------------------------


@cache
def _byte_bpe(split: str, size: int = 420) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE of `size` tokens: 256 bytes, the rest merges."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = _byte_split(split)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    bpe.train_from_iterator([SENTENCES] * 3 + [BLANK_LINES] * 20, trainer)
    return _vocabulary(bpe)


@cache
def _piece_bpe(
    special: tuple[str, ...], newline: bool, size: int = 560
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE over characters, a space written as ▁, with 256 byte tokens to fall back on.

    As SentencePiece does, digits stay single and a piece never mixes letters with marks or lines. Without `newline`, as
    in Llama's vocabulary, a newline is a byte token. Chinese, Cyrillic and emoji always are.
    """
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", behavior="isolated" if newline else "removed"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True),
        ]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    known = "".join(character for character in SENTENCES if ord(character) < 256)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*special, *fallback], initial_alphabet=["▁"], show_progress=False
    )
    bpe.train_from_iterator([known] * 3, trainer)
    return _vocabulary(bpe)


def _byte_split(split: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _vocabulary(bpe: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _qwen_tokenizer(special: Iterable[str], added: Iterable[str] = (), **kwargs: Any) -> Any:
    """Qwen2Tokenizer: no BOS, `<|im_end|>` ends a turn, `<|endoftext|>` pads; text is normalised to NFC."""
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    vocab, merges = _byte_bpe(PRETOKENIZE_REGEX)
    tokenizer: Any = Qwen2Tokenizer(
        vocab=dict(vocab),
        merges=merges,
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|endoftext|>", *special],
        **kwargs,
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in added])
    return tokenizer


def _fast_tokenizer(split: str, special: Iterable[str], *, bos: str | None, add_bos: bool, **kwargs: Any) -> Any:
    """A byte-level BPE in the generic class, as Llama 3, SmolLM, Tekken and GLM ship theirs. `add_bos`: the tokenizer
    itself puts BOS in front, by its post-processor."""
    from transformers import PreTrainedTokenizerFast

    vocab, merges = _byte_bpe(split)
    bpe = Tokenizer(models.BPE(vocab=dict(vocab), merges=merges))
    bpe.pre_tokenizer = _byte_split(split)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos and add_bos:
        template = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
        bpe.post_processor = processors.Sequence([bpe.post_processor, template])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        extra_special_tokens=list(special),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **kwargs,
    )


def _llama_tokenizer(special: Iterable[str], *, legacy: bool, **kwargs: Any) -> Any:
    """LlamaTokenizer: SentencePiece's ▁, BOS put in front. `legacy` writes a ▁ after every special token, otherwise only
    at the very start."""
    from transformers import LlamaTokenizer

    vocab, merges = _piece_bpe(("<unk>", "<s>", "</s>"), newline=False)
    kwargs = {"pad_token": "<pad>", "add_bos_token": True, "padding_side": "left"} | kwargs
    return LlamaTokenizer(vocab=dict(vocab), merges=merges, legacy=legacy, extra_special_tokens=[*special], **kwargs)


def _gemma_tokenizer(special: Iterable[str], **kwargs: Any) -> Any:
    """GemmaTokenizer: spaces become ▁ and nothing is put in front but BOS; runs of newlines and HTML tags are tokens."""
    from transformers import GemmaTokenizer

    vocab, merges = _piece_bpe(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"), newline=True)
    tokenizer: Any = GemmaTokenizer(
        vocab=dict(vocab), merges=merges, add_bos_token=True, extra_special_tokens=[*special], **kwargs
    )
    whole = [*("\n" * count for count in range(2, 8)), "<b>", "</b>", "<table>", "<td>"]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in whole])
    return tokenizer


def full_qwen_ranks() -> dict[bytes, int]:
    """Qwen's 151,643 byte sequences and their ranks, from the file that dashscope ships; raises without dashscope."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("The full Qwen tokenizer is read from the package dashscope: pip install dashscope")
    lines = (Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def greedy_bpe(ranks: dict[bytes, int], word: bytes, below: int | None = None) -> list[bytes]:
    """Merge the pair of lowest rank again and again, with ranks lower than `below` only: tiktoken's own rule."""
    parts = [word[index : index + 1] for index in range(len(word))]
    while len(parts) > 1:
        found = [(ranks.get(left + right), place) for place, (left, right) in enumerate(pairwise(parts))]
        rank, place = min(((rank, place) for rank, place in found if rank is not None), default=(None, 0))
        if rank is None or (below is not None and rank >= below):
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _bytes_to_unicode() -> dict[int, str]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(hidden)}


@cache
def full_qwen_tokenizer() -> Any:
    """Qwen2.5's own tokenizer, 151,665 tokens. A few seconds the first time in a process."""
    from transformers import Qwen2Tokenizer

    ranks = full_qwen_ranks()
    table = _bytes_to_unicode()
    spell = {token: "".join(table[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = greedy_bpe(ranks, token, below=rank)
            merges.append((spell[left], spell[right]))
    vocab = {spell[token]: rank for token, rank in ranks.items()}
    tokenizer: Any = Qwen2Tokenizer(
        vocab=vocab, merges=merges, unk_token=None, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"extra_special_tokens": list(QWEN_SPECIAL)})
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in QWEN_ADDED])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = templates.QWEN2_VL
    return tokenizer


# --- processors ------------------------------------------------------------------------------------------------------


def _areas(smallest: int, largest: int) -> dict[str, int]:
    """Qwen's and GLM's `size`: areas in pixels."""
    return {"shortest_edge": smallest, "longest_edge": largest}


def _qwen(processor_name: str, tokenizer: Any, template: str, size: dict[str, int], patch: int = PATCH) -> Any:
    import transformers

    video_class = "Qwen3VLVideoProcessor" if "Qwen3" in processor_name else "Qwen2VLVideoProcessor"
    shape = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    return getattr(transformers, processor_name)(
        image_processor=transformers.Qwen2VLImageProcessor(size=dict(size), **shape),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, video_class)(size=dict(size), **shape),
        chat_template=template,
    )


def _small_qwen(processor_name: str, template: str, added: Iterable[str], patch: int = PATCH) -> Any:
    side = 4 * patch
    return _qwen(
        processor_name, _qwen_tokenizer(QWEN_SPECIAL, added), template, _areas(side * side, 4 * side * side), patch
    )


@cache
def full_qwen_processor() -> Any:
    """Qwen2.5-VL's processor with its own vocabulary; images of 56 x 56 to 1,003,520 pixels."""
    return _qwen("Qwen2_5_VLProcessor", full_qwen_tokenizer(), templates.QWEN2_VL, _areas(56 * 56, 1280 * 28 * 28))


def _llava() -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=_llama_tokenizer(["<image>"], legacy=False),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=templates.LLAVA,
    )


def _llava_next() -> Any:
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 28},
            crop_size={"height": 28, "width": 28},
            image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        ),
        tokenizer=_llama_tokenizer(["<image>"], legacy=True),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=templates.LLAVA_NEXT,
    )


def _llava_onevision() -> Any:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    square = {"height": 28, "width": 28}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=dict(square),
            image_grid_pinpoints=[[28 * row, 28 * column] for row in (1, 2, 3) for column in (1, 2, 3)],
        ),
        tokenizer=_qwen_tokenizer(["<|im_start|>", "<|im_end|>", "<image>", "<video>"]),
        video_processor=LlavaOnevisionVideoProcessor(size=dict(square)),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=templates.LLAVA_ONEVISION,
    )


def _idefics3() -> Any:
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    special = ["<|begin_of_text|>", "<|end_of_text|>", *IDEFICS_SPECIAL]
    return Idefics3Processor(
        image_processor=Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}),
        tokenizer=_fast_tokenizer(
            LLAMA3_SPLIT, special, bos="<|begin_of_text|>", add_bos=True, eos_token="<|end_of_text|>",
            pad_token="<|end_of_text|>",
        ),
        image_seq_len=4,
        chat_template=templates.IDEFICS3,
    )  # fmt: skip


def _smolvlm() -> Any:
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *IDEFICS_SPECIAL]
    return SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}),
        tokenizer=_fast_tokenizer(
            GPT2_SPLIT,
            special,
            bos="<|im_start|>",
            add_bos=False,
            eos_token="<end_of_utterance>",
            pad_token="<|im_end|>",
        ),
        video_processor=SmolVLMVideoProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 56}),
        image_seq_len=4,
        chat_template=templates.SMOLVLM,
    )


def _internvl() -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    square = {"height": 56, "width": 56}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=dict(square), crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=_qwen_tokenizer(["<|im_start|>", "<|im_end|>"], model_specific_special_tokens=named),
        video_processor=InternVLVideoProcessor(size=dict(square)),
        image_seq_length=4,
        chat_template=templates.INTERNVL,
    )


def _gemma3() -> Any:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        tokenizer=_gemma_tokenizer(["<start_of_turn>", "<end_of_turn>"], model_specific_special_tokens=named),
        image_seq_length=4,
        chat_template=templates.GEMMA3,
    )


def _paligemma() -> Any:
    from transformers import PaliGemmaProcessor, SiglipImageProcessor

    image_processor: Any = SiglipImageProcessor(size={"height": 28, "width": 28})
    image_processor.image_seq_length = 4
    return PaliGemmaProcessor(image_processor=image_processor, tokenizer=_gemma_tokenizer([]))


def _tekken(template: str, spatial_merge: int, extra: Iterable[str] = ()) -> Any:
    from transformers import PixtralImageProcessor, PixtralProcessor

    special = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", *extra]
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(
            size={"longest_edge": 56 * spatial_merge}, patch_size={"height": PATCH, "width": PATCH}
        ),
        tokenizer=_fast_tokenizer(
            TEKKEN_SPLIT, special, bos="<s>", add_bos=True, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
        ),
        patch_size=PATCH,
        spatial_merge_size=spatial_merge,
        chat_template=template,
    )


def _mllama() -> Any:
    from transformers import MllamaImageProcessor, MllamaProcessor

    special = (
        "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|> "
        "<|finetune_right_pad_id|> <|image|>"
    ).split()
    return MllamaProcessor(
        image_processor=MllamaImageProcessor(size={"height": 56, "width": 56}, max_image_tiles=4),
        tokenizer=_fast_tokenizer(
            LLAMA3_SPLIT, special, bos="<|begin_of_text|>", add_bos=True, eos_token="<|eot_id|>",
            pad_token="<|finetune_right_pad_id|>",
        ),
        chat_template=templates.MLLAMA,
    )  # fmt: skip


def _glm4v(template: str) -> Any:
    from transformers import Glm4vImageProcessor, Glm4vProcessor, Glm4vVideoProcessor

    special = (
        "<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|> "
        "<|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|> <|image|> <|video|>"
    ).split()
    tokenizer = _fast_tokenizer(
        LLAMA3_SPLIT, special, bos=None, add_bos=False, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        padding_side="left",
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in ("<think>", "</think>")])
    size = _areas(56 * 56, 112 * 112)
    return Glm4vProcessor(
        image_processor=Glm4vImageProcessor(size=dict(size)),
        tokenizer=tokenizer,
        video_processor=Glm4vVideoProcessor(size=dict(size)),
        chat_template=template,
    )


def _aria() -> Any:
    from transformers import AriaImageProcessor, AriaProcessor

    tokenizer = _llama_tokenizer(
        ["<|im_start|>", "<|im_end|>", "<fim_prefix>", "<fim_suffix>"],
        legacy=False,
        eos_token="<|im_end|>",
        pad_token="<unk>",
        add_bos_token=False,
        model_specific_special_tokens={"image_token": "<|img|>"},
    )
    # The class takes 490 or 980 pixels only, and the processor's own default of 980 wins over the image processor's.
    return AriaProcessor(
        image_processor=AriaImageProcessor(max_image_size=980, min_image_size=336),
        tokenizer=tokenizer,
        size_conversion={490: 4, 980: 6},
        chat_template=templates.ARIA,
    )


def _lfm2_vl() -> Any:
    from transformers import Lfm2VlImageProcessor, Lfm2VlProcessor

    special = (
        "<|pad|> <|startoftext|> <|endoftext|> <|im_start|> <|im_end|> <image> <|image_start|> <|image_end|> "
        "<|img_thumbnail|>"
    ).split()
    special += [f"<|img_row_{row}_col_{column}|>" for row in range(1, 4) for column in range(1, 4)]
    return Lfm2VlProcessor(
        image_processor=Lfm2VlImageProcessor(
            size={"height": 32, "width": 32}, tile_size=32, encoder_patch_size=8, downsample_factor=2,
            min_tiles=2, max_tiles=4, min_image_tokens=1, max_image_tokens=4,
        ),
        tokenizer=_fast_tokenizer(
            LLAMA3_SPLIT, special, bos="<|startoftext|>", add_bos=True, eos_token="<|im_end|>", pad_token="<|pad|>"
        ),
        chat_template=templates.LFM2_VL,
    )  # fmt: skip


def _molmo2() -> Any:
    from transformers import Molmo2ImageProcessor, Molmo2Processor, Molmo2VideoProcessor

    special = (
        "<|im_start|> <|im_end|> <im_start> <im_end> <im_patch> <im_col> <low_res_im_start> <im_low> <frame_start> "
        "<frame_end> <|image|> <|video|>"
    ).split()
    square = {"height": 56, "width": 56}
    return Molmo2Processor(
        image_processor=Molmo2ImageProcessor(size=dict(square), max_crops=4, overlap_margins=[1, 1]),
        video_processor=Molmo2VideoProcessor(size=dict(square)),
        tokenizer=_qwen_tokenizer(special),
        chat_template=templates.MOLMO2,
    )


def _cohere2_vision() -> Any:
    from transformers import Cohere2VisionImageProcessor, Cohere2VisionProcessor

    named = {
        "boi_token": "<|START_OF_IMG|>",
        "eoi_token": "<|END_OF_IMG|>",
        "image_token": "<|IMG_PATCH|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    }
    special = (
        "<PAD> <BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> "
        "<|SYSTEM_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|>"
    ).split()
    return Cohere2VisionProcessor(
        image_processor=Cohere2VisionImageProcessor(size={"height": 28, "width": 28}, max_patches=4, patch_size=2),
        tokenizer=_fast_tokenizer(
            LLAMA3_SPLIT, special, bos="<BOS_TOKEN>", add_bos=True, eos_token="<|END_OF_TURN_TOKEN|>", pad_token="<PAD>",
            model_specific_special_tokens=named,
        ),
        chat_template=templates.COHERE2_VISION,
    )  # fmt: skip


def _llama4() -> Any:
    from transformers import Llama4ImageProcessor, Llama4Processor

    special = (
        "<|begin_of_text|> <|end_of_text|> <|header_start|> <|header_end|> <|eot|> <|image_start|> <|image_end|> "
        "<|tile_x_separator|> <|tile_y_separator|> <|image|> <|patch|> <|finetune_right_pad|>"
    ).split()
    return Llama4Processor(
        image_processor=Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=4, resize_to_max_canvas=False),
        tokenizer=_fast_tokenizer(
            LLAMA3_SPLIT, special, bos="<|begin_of_text|>", add_bos=True, eos_token="<|eot|>",
            pad_token="<|finetune_right_pad|>",
        ),
        patch_size=PATCH,
        chat_template=templates.LLAMA4,
    )  # fmt: skip


def _minicpmv4_6() -> Any:
    from transformers import MiniCPMV4_6ImageProcessor, MiniCPMV4_6Processor, MiniCPMV4_6VideoProcessor

    named = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }
    return MiniCPMV4_6Processor(
        image_processor=MiniCPMV4_6ImageProcessor(scale_resolution=56, max_slice_nums=4),
        video_processor=MiniCPMV4_6VideoProcessor(scale_resolution=56, max_slice_nums=1),
        tokenizer=_qwen_tokenizer(["<|im_start|>", "<|im_end|>"], QWEN3_ADDED, model_specific_special_tokens=named),
        chat_template=templates.MINICPMV,
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "qwen2_vl": lambda: _small_qwen("Qwen2VLProcessor", templates.QWEN2_VL, QWEN_ADDED),
    "qwen2_5_vl": lambda: _small_qwen("Qwen2_5_VLProcessor", templates.QWEN2_VL, QWEN_ADDED),
    "qwen3_vl": lambda: _small_qwen("Qwen3VLProcessor", templates.QWEN3_VL, QWEN3_ADDED, 16),
    "qwen3_vl_thinking": lambda: _small_qwen("Qwen3VLProcessor", templates.QWEN3_VL_THINKING, QWEN3_ADDED, 16),
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "pixtral": lambda: _tekken(templates.PIXTRAL, 1),
    "mistral3": lambda: _tekken(templates.MISTRAL3, 2, ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]),
    "mllama": _mllama,
    "glm4v": lambda: _glm4v(templates.GLM4V),
    "glm4v_moe": lambda: _glm4v(templates.GLM4V_MOE),
    "aria": _aria,
    "lfm2_vl": _lfm2_vl,
    "molmo2": _molmo2,
    "cohere2_vision": _cohere2_vision,
    "llama4": _llama4,
    "minicpmv4_6": _minicpmv4_6,
}

# What the families' templates refuse or drop, for tests that go through all of them.
WITHOUT_CHAT = {"paligemma"}
LIST_CONTENT_ONLY = {"llava", "llava_next", "llava_onevision", "idefics3", "smolvlm"}  # a string renders as nothing
STRING_ASSISTANT_ONLY = {"glm4v"}  # a list is printed as Python prints it
NO_SYSTEM_WITH_IMAGES = {"mllama"}
NEEDS = {"smolvlm": "num2words"}  # packages that a processor asks for when it is built


@cache
def build_processor(family: str) -> Any:
    """The processor of one family; the same object at every call, so leave it as it is."""
    if family not in BUILDERS:
        raise ValueError(f"Unknown family {family!r}. Choose one of {sorted(BUILDERS)}.")
    return BUILDERS[family]()
