"""A batch of text alone with a dummy image: the vision tower takes part, and no real token's logits or gradient change."""

import pickle
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from processors import BUILDERS, build_processor
from test_packing import TOKENS_PER_SECOND, make_model
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from vlm_dft import ChatCollator
from vlm_dft.chat import Example
from vlm_dft.errors import ModelError
from vlm_dft.models import freeze_parts, load_model
from vlm_dft.packing import PACKED_KEYS
from vlm_dft.training import needs_dummy_image

torch.set_num_threads(1)
TEXTS = [("Hi there", "Hello."), ("What would you say, then, if it were longer?", "Nothing at all, I think.")]
REFUSED = {"paligemma": "has a picture in every row", "mllama": "cross-attention"}


def text_rows() -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in TEXTS
    ]


def pictured_row() -> dict[str, Any]:
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    picture = Image.new("RGB", (112, 56), "blue")
    return {"messages": [user, {"role": "assistant", "content": "Blue."}], "images": [picture]}


def run(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Logits before each target, the loss, and the gradients."""
    model.zero_grad()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if "mm_token_type_ids" not in batch:  # else counted by column, and angles of other positions are rounded otherwise
        inputs["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(0)
    logits = model(
        **{k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    ).logits
    kept = batch["labels"][:, 1:] != -100
    loss = torch.nn.functional.cross_entropy(logits[:, :-1][kept], batch["labels"][:, 1:][kept])
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits[:, :-1][kept].detach(), loss.detach(), gradients


def check(model: Any, processor: Any, **words: Any) -> None:
    """The same logits and gradients with the picture as without, and a gradient of zero wherever a real picture has one.

    Without it rows are padded on the right: padded on the left and without any picture Qwen-VL counts positions by column.
    """
    words = {"tokens_per_second": TOKENS_PER_SECOND, **words}
    plain, dummy, pictured = (
        ChatCollator(processor, **own)(rows) for own, rows in (
            ({**words, "padding_side": "right"}, text_rows()), ({**words, "dummy_image": True}, text_rows()),
            (words, [*text_rows(), pictured_row()]),
        )
    )  # fmt: skip
    assert "pixel_values" in dummy and "pixel_values" not in plain
    logits, loss, gradients = run(model, plain)
    own_logits, own_loss, own = run(model, dummy)
    assert logits.shape == own_logits.shape and len(logits) > 8
    assert float((logits - own_logits).abs().max() / logits.abs().max()) < 1e-12
    assert float(own_loss - loss) == pytest.approx(0, abs=1e-12)
    new = own.keys() - gradients.keys()
    assert new and all(not own[name].any() for name in new)
    assert own.keys() == run(model, pictured)[2].keys()  # what a picture goes through takes part
    for name, expected in gradients.items():  # Gemma 3 normalises in float32
        assert float((own[name] - expected).abs().max()) <= 1e-9 * max(1.0, float(expected.abs().max())), name


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_no_logit_or_gradient_of_a_qwen_vl_model_changes(kind: str, layout: str, processor: Any) -> None:
    words: dict[str, Any] = {"packing": True} if layout == "packed" else {"padding_side": layout}
    check(make_model(kind).double(), processor, **words)


@cache
def other_model(family: str) -> tuple[Any, Any]:
    """(processor, a small random model of its family)."""
    import transformers

    processor = build_processor(family)
    tokens = processor.tokenizer
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokens) + 8, "num_key_value_heads": 2, "head_dim": 16,
            "pad_token_id": tokens.pad_token_id, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
    image = tokens.convert_tokens_to_ids(getattr(tokens, "image_token", None) or str(processor.image_token))
    vision = {**small, "image_size": 28, "patch_size": 14}
    configs: dict[str, Any] = {
        "llava": lambda: transformers.LlavaConfig(
            vision_config={**vision, "model_type": "clip_vision_model"}, text_config={**text, "model_type": "llama"},
            image_token_index=image,
        ),
        "smolvlm": lambda: transformers.SmolVLMConfig(
            vision_config={**vision, "image_size": 56}, text_config={**text, "model_type": "llama"}, scale_factor=2,
            image_token_id=image, pad_token_id=tokens.pad_token_id,
        ),
        "idefics3": lambda: transformers.Idefics3Config(
            vision_config={**vision, "image_size": 56}, text_config={**text, "model_type": "llama"}, scale_factor=2,
            image_token_id=image, pad_token_id=tokens.pad_token_id,
        ),
        "gemma3": lambda: transformers.Gemma3Config(
            vision_config={**vision, "image_size": 56, "model_type": "siglip_vision_model"}, mm_tokens_per_image=4,
            text_config={**text, "model_type": "gemma3_text"}, image_token_index=image,
        ),
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return processor, transformers.AutoModelForImageTextToText.from_config(configs[family]()).double().eval()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llava", "smolvlm", "idefics3", "gemma3"])
def test_no_logit_or_gradient_of_another_familys_model_changes(family: str, side: Any) -> None:
    processor, model = other_model(family)
    check(model, processor, padding_side=side)


@pytest.mark.parametrize("family", BUILDERS)
def test_it_is_masked_and_no_target_or_refused_by_name(family: str) -> None:
    processor = build_processor(family)
    if family in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[family]):
            ChatCollator(processor, dummy_image=True)
        return
    plain, dummy = ChatCollator(processor)(text_rows()), ChatCollator(processor, dummy_image=True)(text_rows())
    kept, own = plain["attention_mask"].bool(), dummy["attention_mask"].bool()
    assert torch.equal(kept.sum(1), own.sum(1)) and (dummy["labels"][~own] == -100).all()
    for key in ("input_ids", "labels"):
        assert torch.equal(dummy[key][own], plain[key][kept]), key
    with_picture = ChatCollator(processor)([pictured_row()])
    assert set(dummy) == set(with_picture)
    pad = processor.tokenizer.pad_token_id
    assert ((dummy["input_ids"] != pad) & ~own).any(1).tolist() == [True, False]  # in the shorter row's padding
    assert all(torch.is_tensor(v) and v.dtype == with_picture[k].dtype for k, v in dummy.items())


def test_it_costs_nothing_where_there_is_a_picture_or_room(processor: Any) -> None:
    mixed = [*text_rows(), pictured_row()]
    plain, dummy = ChatCollator(processor)(mixed), ChatCollator(processor, dummy_image=True)(mixed)
    assert plain.keys() == dummy.keys() and all(torch.equal(plain[k], dummy[k]) for k in plain)
    plain, dummy = ChatCollator(processor)(text_rows()), ChatCollator(processor, dummy_image=True)(text_rows())
    assert plain["input_ids"].shape == dummy["input_ids"].shape
    assert dummy["image_grid_thw"].tolist() == [[1, 2, 2]]


def test_every_key_of_a_batch_keeps_its_meaning(processor: Any) -> None:
    rows = text_rows()
    rows[0]["messages"][1] |= {"weight": 0.5, "objective": "nll"}
    for words in ({}, {"padding_side": "left"}):
        collators = [ChatCollator(processor, tag_sources=[""], dummy_image=on, **words) for on in (False, True)]
        plain, dummy = (collator([rows[0]]) for collator in collators)
        kept = dummy["attention_mask"].bool()
        for key in ("loss_weights", "objective_ids", "token_kinds", "source_ids"):
            assert torch.equal(dummy[key][kept], plain[key].flatten()), key
        assert (dummy["loss_weights"][~kept] == 1).all() and (dummy["token_kinds"][~kept] == 0).all()
        assert (dummy["objective_ids"][~kept] == -1).all() and (dummy["source_ids"][~kept] == -1).all()


def test_in_a_packed_row_it_is_a_segment_of_its_own_at_the_end(processor: Any) -> None:
    plain = ChatCollator(processor, packing=True)(text_rows())
    dummy = ChatCollator(processor, packing=True, dummy_image=True)(text_rows())
    bounds, own = plain["cu_seq_lens_q"].tolist(), dummy["cu_seq_lens_q"].tolist()
    assert own[:-1] == bounds and own[-1] > bounds[-1]
    assert (
        torch.equal(dummy["labels"][:, : bounds[-1]], plain["labels"])
        and (dummy["labels"][:, bounds[-1] :] == -100).all()
    )
    assert set(dummy) == set(plain) | {"pixel_values", "image_grid_thw"} and set(PACKED_KEYS) <= set(dummy)


def test_a_collator_with_one_travels_to_workers(processor: Any) -> None:
    collator = ChatCollator(processor, dummy_image=True)
    batch, again = collator(text_rows()), pickle.loads(pickle.dumps(collator))(text_rows())
    assert batch.keys() == again.keys() and all(torch.equal(batch[k], again[k]) for k in batch)


# --- When a run needs one ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def towers() -> dict[str, Any]:
    """The embedded model with its vision tower trained, and with it frozen."""
    found = {name: load_model("tiny") for name in ("trained", "frozen")}
    freeze_parts(found["frozen"], {"language", "head"})
    return found


def arguments_of(folder: Any, engine: str, processes: int) -> Any:
    """TrainingArguments of an engine, in so many processes."""

    class Several(TrainingArguments):
        world_size = processes  # type: ignore[assignment]

    found = Several(str(folder), use_cpu=True, report_to=[], fsdp=engine == "fsdp2")
    if engine.startswith("zero"):
        found.hf_deepspeed_config = HfDeepSpeedConfig({"zero_optimization": {"stage": int(engine[-1])}})
    return found


NEEDED = {  # (engine, vision tower) -> for rows of pictures, of words, of both; as found by leaving it out
    ("ddp", "trained"): (False, True, True), ("ddp", "frozen"): (False, False, False),
    ("zero2", "trained"): (False, True, True), ("zero2", "frozen"): (False, False, False),
    ("zero3", "trained"): (False, True, True), ("zero3", "frozen"): (False, False, True),
    ("fsdp2", "trained"): (False, True, True), ("fsdp2", "frozen"): (False, False, True),
}  # fmt: skip


@pytest.mark.parametrize(("engine", "tower"), NEEDED)
def test_a_run_uses_one_where_its_engine_waits_for_the_tower(
    engine: str, tower: str, towers: dict[str, Any], tmp_path: Any
) -> None:
    pictures, words = Example(pictured_row()["messages"], images=["a.png"]), Example(text_rows()[0]["messages"])
    rows = ([pictures], [words], [pictures, words])
    for processes in (1, 2):
        arguments = arguments_of(tmp_path, engine, processes)
        found = tuple(needs_dummy_image(towers[tower], arguments, kind) for kind in rows)
        assert found == (NEEDED[engine, tower] if processes > 1 else (False,) * 3)


def test_pictures_and_videos_together_are_refused_where_the_tower_is_split(
    towers: dict[str, Any], tmp_path: Any
) -> None:
    rows = [
        Example(text_rows()[0]["messages"], images=["a.png"]),
        Example(text_rows()[0]["messages"], videos=["b.mp4"]),
    ]
    for engine in ("zero3", "fsdp2"):
        with pytest.raises(ModelError, match="Train pictures and videos apart"):
            needs_dummy_image(towers["frozen"], arguments_of(tmp_path, engine, 2), rows)
    assert not needs_dummy_image(towers["trained"], arguments_of(tmp_path, "zero2", 2), rows)
