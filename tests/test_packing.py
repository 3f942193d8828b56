"""Packed equals unpacked, in logits, loss and every gradient; what would leak is refused; packs are full and complete."""

import copy
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vlm_dft import ChatCollator, MaskError
from vlm_dft.errors import ModelError
from vlm_dft.models import load_model, load_processor
from vlm_dft.objectives import OBJECTIVES, token_loss
from vlm_dft.packing import (
    MROPE,
    PackedDataset,
    find_mrope,
    flatten_packs,
    mrope_positions,
    pack_batch,
    packing_report,
    plan_packs,
)
from vlm_dft.segment_attention import SEGMENTS, check_packing, use_segment_attention

CLASSES = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
MODELS = ("embedded", *CLASSES)
ATTENTIONS = ("sdpa", "eager", SEGMENTS)
TOKENS_PER_SECOND = 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def make_model(kind: str) -> Any:
    """The embedded model, or a small random one of a real class that takes the embedded processor's batches."""
    if kind == "embedded":
        return load_model("tiny")
    import transformers

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {
        "vocab_size": 640, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.15, "rope_parameters": rope,
        "bos_token_id": None, "eos_token_id": 626, "pad_token_id": 627,
    }  # fmt: skip
    vision = {"depth": 2, "num_heads": 2, "patch_size": 14, "initializer_range": 0.15}
    own = {
        "Qwen2VL": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        "Qwen2_5_VL": {
            "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "fullatt_block_indexes": [1],
            "window_size": 56, "tokens_per_second": TOKENS_PER_SECOND,
        },
        "Qwen3VL": {
            "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 64,
        },
    }[kind]  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config={**vision, **own}, image_token_id=638, video_token_id=639,
        vision_start_token_id=635, vision_end_token_id=636, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()


def with_attention(kind: str, attention: str) -> Any:
    """The cached model, its language model's attention chosen; the vision tower's stays sdpa."""
    model = make_model(kind)
    model.set_attn_implementation({"text_config": attention})
    return model


def row(images: int, words: str, answer: str) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(len(words))
    pictures = [
        Image.fromarray(torch.randint(0, 256, (56 + 28 * k, 112, 3), generator=draw, dtype=torch.uint8).numpy())
        for k in range(images)
    ]
    user = {"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": words}]}
    return {"messages": [user, {"role": "assistant", "content": answer}], "images": pictures}


ROWS = [
    row(1, "What is it here?", "a thing"),
    row(0, "Say hello to me, please.", "hello, you there!"),
    row(2, "Compare the two of them", "they differ a lot"),
    row(1, "And this?", "no"),
]
ORDERS = ([0, 1, 2, 3], [2, 0, 3, 1])


@cache
def padded_batch(order: tuple[int, ...], side: Any = "right") -> dict[str, Any]:
    return ChatCollator(load_processor("tiny"), padding_side=side)([ROWS[k] for k in order])


def pack(batch: dict[str, Any], kind: str = "Qwen2_5_VL") -> dict[str, Any]:
    rule = MROPE["Qwen2_5_VLProcessor" if kind == "embedded" else f"{kind}Processor"]
    return pack_batch(batch, mrope=rule, tokens_per_second=TOKENS_PER_SECOND)


def run(model: Any, batch: dict[str, Any], objective: str) -> tuple[Any, float, dict[str, Any]]:
    """(logits, loss, gradients of all parameters that have one)."""
    model.zero_grad()
    floats = {
        k: v.to(model.dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()
    }
    logits = model(**{k: v for k, v in floats.items() if k != "labels"}).logits
    loss = token_loss(logits, batch["labels"], OBJECTIVES[objective])
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), loss.item(), gradients


@cache
def unpacked(kind: str, order: tuple[int, ...], objective: str) -> tuple[Any, float, dict[str, Any]]:
    """The same of the padded batch with stock sdpa, the logits of padding left out."""
    batch = padded_batch(order)
    logits, loss, gradients = run(with_attention(kind, "sdpa"), batch, objective)
    return logits[batch["attention_mask"].bool()], loss, gradients


def relative(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Size of the difference of all gradients over the size of all gradients."""
    assert set(found) == set(expected)
    difference = sum(((found[k] - expected[k]).double() ** 2).sum() for k in expected)
    return float((difference / sum((g.double() ** 2).sum() for g in expected.values())) ** 0.5)


@pytest.mark.parametrize("objective", ["nll", "dft"])
@pytest.mark.parametrize("order", ORDERS, ids=["as drawn", "another order"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_packed_equals_unpacked_in_logits_loss_and_gradients(
    kind: str, attention: str, order: list[int], objective: str, record_property: Callable[[str, object], None]
) -> None:
    expected_logits, expected_loss, expected_gradients = unpacked(kind, tuple(order), objective)
    logits, loss, gradients = run(with_attention(kind, attention), pack(padded_batch(tuple(order)), kind), objective)
    worst = max(float((gradients[k] - g).norm() / g.norm().clamp_min(1e-30)) for k, g in expected_gradients.items())
    figures = {
        "logits": float((logits[0] - expected_logits).abs().max()),
        "loss": abs(loss - expected_loss),
        "gradients": relative(gradients, expected_gradients),
        "worst gradient": worst,
    }
    record_property("figures", figures)
    print(f"FIGURES {kind} {attention} {objective} " + " ".join(f"{k} {v:.2g}" for k, v in figures.items()))  # noqa: T201
    assert figures["logits"] < 1e-4
    assert figures["loss"] < 1e-5
    assert figures["gradients"] < 1e-5
    assert figures["worst gradient"] < 1e-3  # of the key bias, whose gradient is rounding but for the rotation


@pytest.mark.parametrize("attention", ["sdpa", SEGMENTS])  # eager's softmax is fp32 whatever the model is
@pytest.mark.parametrize("kind", MODELS)
def test_in_double_precision_nothing_is_left_of_the_difference(kind: str, attention: str) -> None:
    model = copy.deepcopy(with_attention(kind, "sdpa")).double()
    batch = padded_batch((2, 0, 3, 1))
    logits, loss, gradients = run(model, batch, "nll")
    model.set_attn_implementation({"text_config": attention})
    packed_logits, packed_loss, packed_gradients = run(model, pack(batch, kind), "nll")
    assert (packed_logits[0] - logits[batch["attention_mask"].bool()]).abs().max() < 1e-12
    assert packed_loss == pytest.approx(loss, abs=1e-6)  # token_loss is in fp32
    assert relative(packed_gradients, gradients) < 1e-7


def test_gradients_are_the_same_when_activations_are_recomputed() -> None:
    model = copy.deepcopy(with_attention("Qwen2_5_VL", SEGMENTS)).train()
    packed = pack(padded_batch((0, 1, 2, 3)))
    plain = run(model, packed, "dft")[2]
    model.activation_checkpointing_enable()
    assert relative(run(model, packed, "dft")[2], plain) < 1e-6


def test_a_family_without_mrope_is_packed_with_positions_that_restart() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    batch = {"input_ids": torch.randint(1, 50, mask.shape) * mask, "attention_mask": mask}
    packed = pack_batch(batch, mrope=None)
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1]]
    with torch.no_grad():
        ids = batch["input_ids"]
        alone = torch.cat([model(input_ids=ids[k : k + 1, m.bool()]).logits[0] for k, m in enumerate(mask)])
        for attention in ATTENTIONS:
            model.set_attn_implementation(attention)
            assert (model(**packed).logits[0] - alone).abs().max() < 1e-5


def test_the_row_has_no_padding_and_the_kwargs_that_transformers_takes() -> None:
    batch = padded_batch((0, 1, 2))
    before = {k: v.clone() for k, v in batch.items()}
    weights = torch.arange(batch["labels"].numel()).view_as(batch["labels"]).float()
    packed = pack({**batch, "loss_weights": weights})
    lengths = batch["attention_mask"].sum(1).tolist()
    total = sum(lengths)
    for key in ("input_ids", "labels", "mm_token_type_ids", "loss_weights"):
        assert packed[key].shape == (1, total)
    assert packed["position_ids"].shape == (4, 1, total)
    assert packed["cu_seq_lens_q"].tolist() == packed["cu_seq_lens_k"].tolist() == [0, *itertools.accumulate(lengths)]
    assert packed["cu_seq_lens_q"].dtype == torch.int32
    assert packed["max_length_q"] == packed["max_length_k"] == max(lengths)
    assert packed["use_cache"] is False
    assert "attention_mask" not in packed
    kept = batch["attention_mask"].bool()
    assert torch.equal(packed["loss_weights"][0], weights[kept])
    assert torch.equal(packed["pixel_values"], batch["pixel_values"])
    assert all(torch.equal(batch[k], before[k]) for k in before)


def test_left_and_right_padding_give_the_same_row() -> None:
    left, right = (pack(padded_batch((0, 1, 2, 3), side)) for side in ("left", "right"))
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]


# --- M-RoPE positions -------------------------------------------------------------------------------------------------

TEXTS = st.integers(1, 4).map(lambda n: ("text", n))
IMAGES = st.tuples(st.integers(1, 4), st.integers(1, 4)).map(lambda hw: ("image", 1, *hw))
VIDEOS = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)).map(lambda thw: ("video", *thw))
SAMPLES = st.lists(st.lists(st.one_of(TEXTS, IMAGES, VIDEOS), min_size=1, max_size=6), min_size=1, max_size=4)


def batch_of(samples: list[list[Any]], kind: str, side: str = "right") -> dict[str, Any]:
    """A padded batch of samples given as ("text", n), ("image", 1, h, w), ("video", t, h, w) in tokens; random contents."""
    rows, grids = [], {1: [], 2: []}  # type: ignore[var-annotated]
    for sample in samples:
        types = [0]
        for name, *size in sample:
            if name == "text":
                types += [0] * size[0]
                continue
            t, h, w = size
            value = 1 if name == "image" else 2
            grids[value].append([t, 2 * h, 2 * w])
            runs = [h * w] * t if kind == "Qwen3VL" else [t * h * w]  # Qwen3-VL: a timestamp before each frame
            for tokens in runs:
                types += [0, *[value] * tokens, 0]
        rows.append(types)
    longest = max(map(len, rows))
    draw = torch.Generator().manual_seed(longest)
    shape = (len(rows), longest)
    mask, types = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for k, values in enumerate(rows):
        at = slice(0, len(values)) if side == "right" else slice(longest - len(values), longest)
        mask[k, at], types[k, at] = 1, torch.tensor(values)
    ids = torch.randint(1, 600, shape, generator=draw) * mask
    ids[types == 1], ids[types == 2] = 638, 639
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
    for value, pixels, grid in ((1, "pixel_values", "image_grid_thw"), (2, "pixel_values_videos", "video_grid_thw")):
        if grids[value]:
            batch[grid] = torch.tensor(grids[value])
            batch[pixels] = torch.randn(int(batch[grid].prod(-1).sum()), 3 * 2 * 14 * 14, generator=draw)
    if grids[2] and kind == "Qwen2_5_VL":
        batch["second_per_grid_ts"] = (torch.rand(len(grids[2]), generator=draw) * 3).tolist()
    return batch


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", CLASSES)
@settings(max_examples=40, deadline=None)
@given(samples=SAMPLES, as_tensor=st.booleans())
def test_positions_are_those_of_the_real_models(kind: str, side: str, samples: list[Any], as_tensor: bool) -> None:
    batch = batch_of(samples, kind, side)
    media = {k: batch[k] for k in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if k in batch}
    if as_tensor and "second_per_grid_ts" in media:
        media["second_per_grid_ts"] = torch.tensor(media["second_per_grid_ts"])
    kept = batch["attention_mask"].bool()
    expected, _ = make_model(kind).model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        attention_mask=batch["attention_mask"],
        **media,
    )
    found = mrope_positions(
        batch["mm_token_type_ids"][kept], kept.sum(1).tolist(), MROPE[f"{kind}Processor"],
        tokens_per_second=TOKENS_PER_SECOND, **media,
    )  # fmt: skip
    assert torch.equal(found, expected[:, kept])


@pytest.mark.parametrize("attention", ["sdpa", SEGMENTS])
@pytest.mark.parametrize("kind", CLASSES)
def test_videos_and_images_of_packed_samples_stay_with_their_samples(kind: str, attention: str) -> None:
    samples = [
        [("video", 3, 2, 2)],
        [("image", 1, 2, 3), ("text", 3), ("video", 2, 1, 2)],
        [("text", 5)],
        [("image", 1, 1, 2)],
    ]
    batch = batch_of(samples, kind)
    model = with_attention(kind, attention)
    with torch.no_grad():
        expected = model(**batch).logits[batch["attention_mask"].bool()]
        assert (model(**pack(batch, kind)).logits[0] - expected).abs().max() < 1e-4


def test_the_rule_is_found_from_the_processors_class(processor: Any) -> None:
    from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

    parts = (processor.image_processor, processor.tokenizer, Qwen3VLVideoProcessor())
    assert find_mrope(processor) == MROPE["Qwen2_5_VLProcessor"]
    assert find_mrope(Qwen3VLProcessor(*parts)) == MROPE["Qwen3VLProcessor"]
    assert find_mrope(processor.tokenizer) is None


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_sample_whose_first_token_is_a_target_is_refused() -> None:
    batch = copy.deepcopy(padded_batch((0, 1)))
    batch["labels"][1, 0] = batch["input_ids"][1, 0]
    with pytest.raises(MaskError, match="Sample 1 of the pack: its first token is a target"):
        pack(batch)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pixel_values", torch.zeros(2, 1, 3, 8, 8)),  # Idefics3, SmolVLM
        ("pixel_values", torch.zeros(2, 1, 4, 3, 8, 8)),  # Mllama
        ("pixel_attention_mask", torch.ones(2, 1, 8, 8)),
        ("aspect_ratio_ids", torch.ones(2, 1)),
        ("cross_attention_mask", torch.ones(2, 60, 1, 4)),
        ("token_type_ids", None),  # Gemma 3, PaliGemma: which tokens see each other both ways
        ("position_ids", None),
        ("sources", ["a", "b"]),
    ],
)
def test_a_key_that_belongs_to_rows_is_refused_by_name(key: str, value: Any) -> None:
    batch = padded_batch((0, 1))
    value = torch.zeros_like(batch["input_ids"]) if value is None else value
    with pytest.raises(ModelError, match=f"Packing cannot lay {key} "):
        pack({**batch, key: value})


def test_what_would_lose_or_shift_mrope_is_refused() -> None:
    batch = padded_batch((0, 2))
    with pytest.raises(MaskError, match="without them M-RoPE is lost"):
        pack({k: v for k, v in batch.items() if k != "mm_token_type_ids"})
    with pytest.raises(MaskError, match="The grids imply image tokens in runs of"):
        pack({**batch, "image_grid_thw": batch["image_grid_thw"].flip(0)})
    timed = batch_of([[("video", 2, 1, 1)]], "Qwen2_5_VL")
    with pytest.raises(MaskError, match="tokens_per_second given"):
        pack_batch(timed, mrope=MROPE["Qwen2_5_VLProcessor"])
    with pytest.raises(ValueError, match="Expected a padded batch with attention_mask"):
        pack(pack(batch))
    batch = {**batch, "attention_mask": batch["attention_mask"] * torch.tensor([[1], [0]])}
    with pytest.raises(MaskError, match="Row 1 of the batch has no token"):
        pack(batch)


# --- the self-test ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def collator() -> ChatCollator:
    return ChatCollator(load_processor("tiny"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_self_test_passes_where_samples_are_isolated(
    kind: str, attention: str, dtype: torch.dtype, collator: ChatCollator
) -> None:
    report = check_packing(copy.deepcopy(with_attention(kind, attention)).to(dtype), collator)
    assert report["attention"] == attention
    assert report["neighbour"] == 0.0  # the same shapes, so to the last bit
    assert report["alone"] < (1e-5 if dtype == torch.float32 else 0.05)


def test_the_self_test_takes_a_collator_that_packs_by_itself() -> None:
    report = check_packing(with_attention("embedded", SEGMENTS), ChatCollator(load_processor("tiny"), packing=True))
    assert report["neighbour"] == 0.0 and report["alone"] < 1e-5


LEAKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "an all-ones mask": lambda p: {**p, "attention_mask": torch.ones_like(p["input_ids"])},
    "2-D ids": lambda p: {**p, "position_ids": p["position_ids"][0]},
    "three rows of ids": lambda p: {**p, "position_ids": p["position_ids"][1:]},
    "no ids": lambda p: {k: v for k, v in p.items() if k != "position_ids"},
    "use_cache left at its default": lambda p: {k: v for k, v in p.items() if k != "use_cache"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_self_test_catches_what_leaks(
    kind: str, leak: str, attention: str, dtype: torch.dtype, collator: ChatCollator
) -> None:
    model = copy.deepcopy(with_attention(kind, attention)).to(dtype)
    leaking: Any = lambda rows: LEAKS[leak](pack(collator(rows)))  # noqa: E731
    with pytest.raises(ModelError, match="Packing leaks in .* differ by [0-9.]+"):
        check_packing(model, leaking)


def test_the_self_test_catches_positions_that_are_not_mrope(collator: ChatCollator) -> None:
    def wrong(rows: Any) -> dict[str, Any]:
        packed = pack_batch(collator(rows), mrope=MROPE["Qwen2_5_VLProcessor"])
        return {**packed, "position_ids": packed["position_ids"][0]}

    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(with_attention("embedded", SEGMENTS)).to(dtype)
        with pytest.raises(ModelError, match="between alone and packed"):
            check_packing(model, wrong)


def test_a_family_of_unknown_three_dimensional_positions_is_not_packed(collator: ChatCollator) -> None:
    with pytest.raises(ModelError, match="image_grid_thw, so its model has positions in three dimensions"):
        pack_batch(collator(list(ROWS)), mrope=None)


def test_the_self_test_notices_that_segments_do_not_reach_the_attention(collator: ChatCollator) -> None:
    from vlm_dft import segment_attention

    model = copy.deepcopy(with_attention("embedded", SEGMENTS))
    for layer in model.model.language_model.layers:
        forward = layer.forward
        layer.forward = lambda *a, _f=forward, **k: _f(*a, **{n: v for n, v in k.items() if n != "cu_seq_lens_q"})
    with pytest.raises(ModelError, match="cu_seq_lens_q did not reach"):
        check_packing(model, collator)
    assert segment_attention._dense_allowed


def test_the_self_test_leaves_the_model_as_it_was(collator: ChatCollator) -> None:
    model = copy.deepcopy(with_attention("embedded", SEGMENTS)).train()
    model.model.visual.eval()
    run(model, padded_batch((0, 1)), "nll")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.model.rope_deltas = "kept"
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    check_packing(model, collator)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert model.model.rope_deltas == "kept"


def test_the_self_test_leaves_nothing_in_the_collator() -> None:
    collator = ChatCollator(load_processor("tiny"), packing=True, max_length=20)
    check_packing(with_attention("embedded", SEGMENTS), collator)
    assert not collator.counts and not collator._prompts_proved and collator.max_length == 20


def test_a_model_with_lora_is_switched_and_checked(collator: ChatCollator) -> None:
    from vlm_dft.models import add_lora

    model = add_lora(copy.deepcopy(with_attention("embedded", "sdpa")), 2)
    use_segment_attention(model)
    assert check_packing(model, collator)["attention"] == SEGMENTS


# --- attention by segment ---------------------------------------------------------------------------------------------


def test_only_the_language_models_attention_is_switched_and_twice_is_once() -> None:
    model = copy.deepcopy(with_attention("Qwen2_5_VL", "sdpa"))
    for _ in range(2):
        assert use_segment_attention(model) is model
        assert model.config.text_config._attn_implementation == SEGMENTS
        assert model.config.vision_config._attn_implementation == "sdpa"
        assert model.model.language_model.config._attn_implementation == SEGMENTS
        assert model.model.visual.config._attn_implementation == "sdpa"


def test_a_model_that_cannot_be_switched_is_refused() -> None:
    with pytest.raises(ModelError, match="replaces sdpa, but .* has 'eager'"):
        use_segment_attention(with_attention("Qwen2_5_VL", "eager"))
    sliding = copy.deepcopy(with_attention("Qwen2_5_VL", "sdpa"))
    sliding.config.text_config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ModelError, match="has sliding_attention; attention by segment"):
        use_segment_attention(sliding)


@pytest.mark.parametrize("kind", MODELS)
def test_padded_batches_and_generation_are_stock_sdpa_to_the_bit(kind: str) -> None:
    batch = padded_batch((0, 1, 2), "left")
    prompt = {k: v for k, v in batch.items() if k != "labels"}
    unsegmented = {k: v for k, v in pack(batch, kind).items() if not k.startswith(("cu_", "max_", "labels"))}
    results = []
    for attention in ("sdpa", SEGMENTS):
        model = with_attention(kind, attention)
        with torch.no_grad():
            logits = [model(**inputs).logits for inputs in (prompt, unsegmented)]
        results.append([*logits, model.generate(**prompt, max_new_tokens=6, do_sample=False)])
    assert all(torch.equal(ours, stock) for ours, stock in zip(*results, strict=True))


def test_a_packed_row_with_a_mask_of_its_own_is_refused() -> None:
    packed = pack(padded_batch((0, 1)))
    dense = torch.ones(1, 1, packed["input_ids"].shape[1], packed["input_ids"].shape[1]).tril().bool()
    with pytest.raises(ModelError, match="came with a mask of shape"):
        with_attention("Qwen2_5_VL", SEGMENTS)(
            **{k: v for k, v in packed.items() if k != "labels"}, attention_mask=dense
        )


def equal_segments(k: int) -> dict[str, Any]:
    ids = torch.arange(k * 24).view(k, 24) % 600 + 1
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.zeros_like(ids)}
    return pack(batch)


def attention_flops(kind: str, attention: str, k: int) -> int:
    """FLOPs of the language model's attention products over a row of k segments of 24 tokens, counted as they run."""
    cpu_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def product(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        batch, heads, n, d = query
        return int(2 * batch * heads * n * key[2] * (d + value[3]))

    counter = FlopCounterMode(display=False, custom_mapping={cpu_kernel: product})
    with counter, torch.no_grad():
        with_attention(kind, attention)(**equal_segments(k))
    return int(counter.get_flop_counts()["Global"][cpu_kernel])


@pytest.mark.parametrize("kind", MODELS)
def test_the_cost_of_attention_grows_with_the_segments_and_not_with_the_square_of_the_row(kind: str) -> None:
    one = attention_flops(kind, SEGMENTS, 1)
    assert one == attention_flops(kind, "sdpa", 1) > 0
    assert [attention_flops(kind, SEGMENTS, k) / one for k in (2, 5, 8)] == [2, 5, 8]
    assert [attention_flops(kind, "sdpa", k) / one for k in (2, 5, 8)] == [4, 25, 64]


class _Largest(TorchDispatchMode):
    """The most elements of any boolean tensor that was made: the size of the masks."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.bool:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("kind", MODELS)
def test_no_square_mask_is_made_for_a_packed_row(kind: str) -> None:
    made = {}
    for attention in ("sdpa", SEGMENTS):
        with _Largest() as largest, torch.no_grad():
            with_attention(kind, attention).model(**equal_segments(10))
        made[attention] = largest.elements
    assert made["sdpa"] >= 240 * 240
    assert made[SEGMENTS] <= 240


def test_packing_and_planning_import_torch_alone() -> None:
    code = "import sys, vlm_dft.packing; print(sorted({'transformers', 'datasets', 'peft', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- plans ------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=120),
    room=st.integers(0, 60),
    window=st.integers(1, 50),
    seed=st.none() | st.integers(0, 9),
)
def test_every_example_is_in_one_pack_and_no_pack_is_over_its_capacity(
    lengths: list[int], room: int, window: int, seed: int | None
) -> None:
    capacity = max(lengths, default=1) + room
    packs = plan_packs(lengths, capacity, window=window, seed=seed)
    assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[k] for k in pack) <= capacity for pack in packs)
    assert packs == plan_packs(tuple(lengths), capacity, window=window, seed=seed)
    if seed is None:
        assert all(pack == sorted(pack) and pack[0] // window == pack[-1] // window for pack in packs)
        assert [pack[0] for pack in packs] == sorted(pack[0] for pack in packs)
    report = packing_report(lengths, packs, capacity)
    assert report["rows"] == len(lengths) and report["packs"] == len(packs)
    windows = -(-len(lengths) // window)
    assert len(packs) <= 2 * sum(lengths) / capacity + windows  # two packs of a window are never both at most half full


def test_the_best_fit_is_taken_and_ties_go_to_the_first() -> None:
    assert plan_packs([5, 3, 6, 4, 2, 5], 10) == [[0, 5], [1, 4], [2, 3]]
    assert plan_packs([5, 3, 6, 4, 2, 5], 10, window=3) == [[0], [1, 2], [3, 5], [4]]
    assert plan_packs([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]
    assert plan_packs([], 8) == []


def test_a_seed_draws_other_company_and_the_same_each_time() -> None:
    lengths = [1 + k * 7 % 50 for k in range(300)]
    plans = [plan_packs(lengths, 100, window=64, seed=seed) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


def test_an_example_longer_than_a_pack_is_named() -> None:
    with pytest.raises(ValueError, match="Example 2 has 11 tokens; a pack takes 1 to 10"):
        plan_packs([10, 1, 11], 10)
    with pytest.raises(ValueError, match="Example 1 has 0 tokens"):
        plan_packs([10, 0], 10)


def test_the_items_of_a_packed_dataset_are_lists_of_examples() -> None:
    dataset = PackedDataset("abcdef", [5, 3, 6, 4, 2, 5], 10)
    assert [dataset[k] for k in range(len(dataset))] == [["a", "f"], ["b", "e"], ["c", "d"]]
    assert dataset.report["fill"] == pytest.approx(25 / 30)
    assert flatten_packs([dataset[0], "x", dataset[2]]) == ["a", "f", "x", "c", "d"]
    with pytest.raises(ValueError, match="one length for each of 3 examples, found 1"):
        PackedDataset("abc", [1], 10)


def test_tabmwp_fills_its_packs(shared: Path, collator: ChatCollator) -> None:
    from vlm_dft.recipes import load_recipe, read_recipe

    examples, _ = load_recipe(read_recipe("tabmwp"), str(shared / "tabmwp"))
    sizes = [[Image.open(image).size[::-1] for image in example.images] for example in examples]  # headers alone
    lengths = [collator.measure(e, s).tokens for e, s in zip(examples, sizes, strict=True)]
    packs = plan_packs(lengths, 4096)
    report = packing_report(lengths, packs, 4096)
    print("FIGURES tabmwp", report)  # noqa: T201
    assert report["rows"] == 850
    assert report["fill"] >= 0.95
    batch = collator([examples[k] for k in packs[0]])
    assert pack_batch(batch, mrope=find_mrope(collator.processor))["input_ids"].shape[1] == sum(
        lengths[k] for k in packs[0]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["flash_attention_2", SEGMENTS])
@pytest.mark.parametrize("kind", MODELS)
def test_packed_samples_are_isolated_in_bf16_on_the_gpu(kind: str, attention: str, collator: ChatCollator) -> None:
    if attention != SEGMENTS:
        pytest.importorskip("flash_attn")
    model = copy.deepcopy(with_attention(kind, "sdpa")).bfloat16().cuda()
    batch = padded_batch((0, 1, 2, 3))
    packed = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in pack(batch, kind).items() if k != "labels"}
    with torch.no_grad():
        stock = model(**{k: v.cuda() for k, v in batch.items() if k != "labels"}).logits
        expected = stock[batch["attention_mask"].bool()].float()
        model.set_attn_implementation(attention if attention != SEGMENTS else {"text_config": SEGMENTS})
        found = model(**packed).logits[0].float()
    assert ((found - expected).norm() / expected.norm()).item() < 0.05
    assert check_packing(model, collator)["attention"] == attention
    assert check_packing(model.float(), collator)["dtype"] == ("float32" if attention == SEGMENTS else "bfloat16")
