"""Resolution: limits of a run and of one picture give the pixels that qwen-vl-utils and the processor give, everywhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from processors import build_processor, full_qwen_processor

from vlm_dft import ChatCollator
from vlm_dft.chat import Sample
from vlm_dft.errors import ModelError, RowError
from vlm_dft.models import load_processor

torch.set_num_threads(1)
QWEN = ("tiny", "full")
OTHERS = ("llava", "idefics3", "internvl", "gemma3", "lfm2_vl", "glm4v")

Row = dict[str, Any]


@cache
def qwen(name: str) -> Any:
    if name == "full":
        pytest.importorskip("dashscope")
        return full_qwen_processor()
    return load_processor("tiny")


@cache
def collator_of(name: str, resize: Any = "processor") -> ChatCollator:
    return ChatCollator(qwen(name), resize=resize)


@cache
def drawn_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured noise under lines and letters: every filter shows in it."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height))
    draw = ImageDraw.Draw(image)
    draw.line((0, 0, width, height), "white", 3)
    draw.text((width // 4, height // 3), "12.5 cm", "black")
    return image


def row_of(*images: Any, keys: Row | None = None, answer: str = "Red.", asked: str = "What?") -> Row:
    """One question about the pictures, each with the given settings."""
    parts = [{"type": "image", "image": image, **(keys or {})} for image in images]
    content = [*parts, {"type": "text", "text": asked}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def video_row(source: Any, keys: Row | None = None) -> Row:
    content = [{"type": "video", "video": source, **(keys or {})}, {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Red."}]}


def by_utils(processor: Any, row: Row, **limits: int) -> dict[str, torch.Tensor]:
    """What qwen-vl-utils and then the processor make of a row: the recipe of Qwen's own README."""
    utils = pytest.importorskip("qwen_vl_utils")
    parts = [{**limits, **part} if part["type"] != "text" else part for part in row["messages"][0]["content"]]
    messages = [{**row["messages"][0], "content": parts}, row["messages"][1]]
    images, _ = utils.process_vision_info(messages, image_patch_size=processor.image_processor.patch_size)
    text = processor.apply_chat_template(messages, tokenize=False)
    return dict(processor(text=[text], images=images, do_resize=False, return_tensors="pt"))


def same(found: Row, expected: Row, *keys: str) -> None:
    for key in keys or expected:
        assert torch.equal(found[key], expected[key]), key


def real_pictures(shared: Path) -> list[str]:
    """Some of each set: tables, plots, diagrams, photos; palettes, grey, transparent ones left to test_bad_inputs."""
    found = []
    for folder, count in (
        ("tabmwp/data/tabmwp/tables", 4),
        ("mathvision", 4),
        ("wemath", 3),
        ("puzzlevqa", 2),
        ("scienceqa_llava", 3),
    ):
        files = sorted(f for f in (shared / folder).rglob("*") if f.suffix in (".png", ".jpg", ".jpeg"))
        found += [str(f) for f in files[:: max(1, len(files) // count)][:count]]
    assert len(found) >= 14
    return found


def pictures(request: pytest.FixtureRequest, kind: str) -> list[Any]:
    """Drawn pictures of many shapes, or real ones; skips where there are none."""
    if kind == "real":
        return real_pictures(request.getfixturevalue("shared"))
    sizes = [
        (421, 277),
        (60, 31),
        (1500, 90),
        (20, 31),
        (28, 28),
        (56, 84),
        (90, 700),
        (1000, 800),
        (300, 300),
        (5, 9),
        (640, 480),
    ]
    return [drawn_picture(*size) for size in sizes]


# Per run


@pytest.mark.parametrize(
    ("limits", "grid"),
    [
        ({}, [1, 20, 30]),  # 420 x 280 pixels, within the embedded model's limits
        ({"max_pixels": 112 * 112}, [1, 6, 8]),
        ({"min_pixels": 150_000}, [1, 24, 34]),
        ({"min_pixels": 56 * 56, "max_pixels": 56 * 84}, [1, 4, 6]),
    ],
)
def test_the_limits_of_a_run_are_the_processors(limits: Row, grid: list[int]) -> None:
    processor = load_processor("tiny", **limits)
    collator = ChatCollator(processor)
    image = drawn_picture(420, 280)
    batch = collator([row_of(image)])
    assert batch["image_grid_thw"].tolist() == [grid]
    same(batch, dict(processor.image_processor(images=[image], return_tensors="pt")))
    assert collator.measure(row_of(image)).media == grid[1] * grid[2] // 4


def test_limits_are_refused_where_a_processor_has_no_areas(tmp_path: Path) -> None:
    build_processor("llava").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ModelError, match="fit processors that take pixel areas; this one has size"):
        load_processor(str(tmp_path), max_pixels=100_000)


def test_limits_that_contradict_each_other_are_refused_by_name() -> None:
    with pytest.raises((ModelError, ValueError), match="min_pixels.*max_pixels"):
        ChatCollator(load_processor("tiny", min_pixels=200_000, max_pixels=100_000))([row_of(drawn_picture(420, 280))])


def test_limits_survive_saving_and_loading_the_processor(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    limited = load_processor("tiny", min_pixels=6272, max_pixels=50_176)
    limited.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    rows = [row_of(drawn_picture(420, 280)), row_of(drawn_picture(30, 40))]
    before = ChatCollator(limited)(rows)
    for again in (AutoProcessor.from_pretrained(tmp_path), load_processor(str(tmp_path))):
        same(ChatCollator(again)(rows), before)
        own = again.image_processor
        assert (own.size["shortest_edge"], own.size["longest_edge"]) == (6272, 50_176)


def test_resizing_by_the_processor_gives_the_processors_own_tensors(shared: Path) -> None:
    processor = qwen("tiny")
    rows = [row_of(path) for path in real_pictures(shared)[::2]]
    texts = [
        processor.apply_chat_template(
            [{**r["messages"][0], "content": [{"type": "image"}, r["messages"][0]["content"][1]]}, r["messages"][1]],
            tokenize=False,
        )
        for r in rows
    ]
    images = [[Image.open(r["messages"][0]["content"][0]["image"]).convert("RGB")] for r in rows]
    expected = dict(processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt"))
    same(collator_of("tiny")(rows), expected)


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("kind", ["drawn", "real"])
def test_pillow_gives_the_pixels_of_qwen_vl_utils_for_a_whole_run(request: Any, name: str, kind: str) -> None:
    """With the processor's limits, which qwen-vl-utils has to be told."""
    size = qwen(name).image_processor.size
    limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    for source in pictures(request, kind)[::2]:
        row = row_of(source)
        same(collator_of(name, "pillow")([row]), by_utils(qwen(name), row, **limits))


def test_the_two_ways_to_resize_differ_a_little_and_never_in_size(shared: Path) -> None:
    rows = [row_of(path) for path in real_pictures(shared)[:6]]
    one, other = (collator_of("tiny", resize)(rows) for resize in ("processor", "pillow"))
    same(one, other, "input_ids", "labels", "image_grid_thw")
    assert not torch.equal(one["pixel_values"], other["pixel_values"])
    assert (one["pixel_values"] - other["pixel_values"]).abs().mean() < 0.02


# Per picture

KEYS = [
    {"max_pixels": 100_352}, {"min_pixels": 200_704, "max_pixels": 401_408}, {"resized_height": 280, "resized_width": 420},
    {"resized_height": 123, "resized_width": 77}, {"min_pixels": 50_176},
]  # fmt: skip


@pytest.mark.parametrize("keys", KEYS, ids=str)
@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("kind", ["drawn", "real"])
def test_settings_of_a_picture_give_what_qwen_vl_utils_gives(request: Any, name: str, keys: Row, kind: str) -> None:
    size = qwen(name).image_processor.size
    rest = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}  # what the part leaves open
    if rest["max_pixels"] < keys.get("min_pixels", 0):
        rest.pop("max_pixels")
    for source in pictures(request, kind)[::5]:
        row = row_of(source, keys=keys)
        same(collator_of(name)([row]), by_utils(qwen(name), row, **rest))
        assert collator_of(name).measure(row).tokens == collator_of(name)([row])["input_ids"].shape[1]


def test_pictures_with_and_without_settings_share_a_row_and_a_batch() -> None:
    plain, limited = row_of(drawn_picture(420, 280)), row_of(drawn_picture(420, 280), keys={"max_pixels": 50_176})
    both = {
        "messages": [
            {"role": "user", "content": [*plain["messages"][0]["content"][:1], *limited["messages"][0]["content"]]},
            plain["messages"][1],
        ]
    }
    collator = collator_of("tiny")
    alone = [collator([row])["pixel_values"] for row in (plain, limited)]
    assert alone[0].shape != alone[1].shape
    assert torch.equal(collator([both])["pixel_values"], torch.cat(alone))
    assert torch.equal(collator([limited, plain])["pixel_values"], torch.cat(alone[::-1]))


def test_settings_under_images_and_in_the_messages_are_the_same() -> None:
    image, keys = drawn_picture(420, 280), {"max_pixels": 50_176}
    inline = row_of(image, keys=keys)
    beside = {"messages": [{"role": "user", "content": [{"type": "image", **keys}, {"type": "text", "text": "What?"}]},
                           inline["messages"][1]], "images": [image]}  # fmt: skip
    same(collator_of("tiny")([beside]), collator_of("tiny")([inline]))


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("keys", [{"max_pixels": 50_176}, {"resized_height": 56, "resized_width": 56}])
def test_other_families_refuse_settings_by_name(family: str, keys: Row) -> None:
    if family == "idefics3":
        pytest.importorskip("num2words")
    collator = ChatCollator(build_processor(family))
    row = {**row_of(drawn_picture(112, 56), keys=keys), "id": "row-17"}
    name = type(collator.processor).__name__
    for act in (
        lambda: collator([row]),
        lambda: collator.measure(row),
        lambda: collator.prompts([{**row, "messages": row["messages"][:1]}]),
    ):
        with pytest.raises(
            RowError, match=f"row-17.*asks for {next(iter(keys))}.* Qwen-VL's; {name} has its own sizes"
        ):
            act()


@pytest.mark.parametrize("family", ["internvl", "llava_onevision"])
def test_other_families_refuse_the_size_settings_of_a_video_by_name(family: str) -> None:
    collator = ChatCollator(build_processor(family))
    frames = [drawn_picture(56, 56, seed) for seed in range(4)]
    with pytest.raises(RowError, match="row-17.*max_pixels"):
        collator([{**video_row(frames, {"max_pixels": 4000}), "id": "row-17"}])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"resized_height": 100}, "resized_height and resized_width together"),
        ({"min_pixels": 9000, "max_pixels": 5000}, "min_pixels <= max_pixels"),
        ({"max_pixels": 0}, "max_pixels must be a finite number above 0, found 0"),
        ({"max_pixels": -5}, "max_pixels must be"),
        ({"max_pixels": "50176"}, "max_pixels must be a finite number above 0, found '50176'"),
        ({"max_pixels": True}, "max_pixels must be a finite number above 0, found True"),
        ({"max_pixels": float("nan")}, "max_pixels"),
        ({"min_pixels": float("inf"), "max_pixels": float("inf")}, "pixels"),
        ({"max_pixel": 50_176}, "'max_pixel'"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_with_the_rows_name(keys: Row, message: str) -> None:
    row = {**row_of(drawn_picture(112, 56), keys=keys), "id": "row-17"}
    for act in (collator_of("tiny").measure, lambda one: collator_of("tiny")([one])):
        with pytest.raises(RowError, match=message) as caught:
            act(row)
        assert "row-17" in str(caught.value)


# Images and videos in one batch

FRAMES = [drawn_picture(112, 84, seed) for seed in range(4)]


@pytest.mark.parametrize("resize", ["processor", "pillow"])
@pytest.mark.parametrize("keys", [{}, *KEYS[:4]], ids=str)
def test_a_picture_has_the_same_pixels_in_the_company_of_a_video(resize: Any, keys: Row) -> None:
    picture = row_of(drawn_picture(420, 280), keys=keys)
    video, collator = video_row(FRAMES), collator_of("tiny", resize)
    alone, seen, mixed = collator([picture]), collator([video]), collator([picture, video])
    same(mixed, alone, "pixel_values", "image_grid_thw")
    same(mixed, seen, "pixel_values_videos", "video_grid_thw")
    length = alone["input_ids"].shape[1]
    assert torch.equal(mixed["input_ids"][0, :length], alone["input_ids"][0])


def test_a_picture_and_a_video_in_one_row_have_the_pixels_they_have_alone() -> None:
    collator = collator_of("tiny")
    picture, video = row_of(drawn_picture(420, 280)), video_row(FRAMES)
    both = {"messages": [
        {"role": "user", "content": [picture["messages"][0]["content"][0], *video["messages"][0]["content"]]},
        video["messages"][1],
    ]}  # fmt: skip
    batch = collator([both])
    same(batch, collator([picture]), "pixel_values", "image_grid_thw")
    same(batch, collator([video]), "pixel_values_videos", "video_grid_thw")


# At inference as in training


@pytest.mark.parametrize("resize", ["processor", "pillow"])
@pytest.mark.parametrize("keys", [{}, {"max_pixels": 50_176}, {"resized_height": 280, "resized_width": 420}], ids=str)
def test_the_prompt_of_inference_has_the_pixels_of_training(resize: Any, keys: Row) -> None:
    collator = collator_of("tiny", resize)
    row = row_of(drawn_picture(421, 277), keys=keys)
    trained, asked = collator([row]), collator.prompts([{**row, "messages": row["messages"][:1]}])
    same(asked, trained, "pixel_values", "image_grid_thw")
    length = asked["input_ids"].shape[1]
    assert torch.equal(trained["input_ids"][0, :length], asked["input_ids"][0])
    assert trained["labels"][0, length - 1] == -100 and trained["labels"][0, length] != -100


def test_evaluation_gives_the_model_the_pixels_of_training(tmp_path: Path, model: Any, monkeypatch: Any) -> None:
    from vlm_dft.generation import generate

    processor = load_processor("tiny", max_pixels=50_176)
    collator, image = ChatCollator(processor), drawn_picture(421, 277)
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    sample = Sample("s1", [asked], [image], "own", "test", {"max_new_tokens": 2})
    seen: list[Row] = []
    original = model.generate

    def spy(**words: Any) -> Any:
        seen.append(words)
        return original(**words)

    monkeypatch.setattr(model, "generate", spy)
    generate(model, collator, [sample], tmp_path / "predictions.jsonl", show=False)
    same(seen[0], collator([row_of(image)]), "pixel_values", "image_grid_thw")
    assert seen[0]["image_grid_thw"].tolist() == [[1, 12, 18]]


def test_the_pixels_of_a_trained_checkpoint_are_those_of_its_training(tmp_path: Path) -> None:
    """The checkpoint's own processor, as evaluation from its folder would load it."""
    import json

    from vlm_dft.cli import main

    drawn_picture(421, 277).save(tmp_path / "a.png")
    row = {
        "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Red."}],
        "images": ["a.png"],
    }
    (tmp_path / "chats.jsonl").write_text(json.dumps(row))
    words = ["--max_pixels", "50176", "--batch_size", "1", "--micro_batch", "1", "--output", str(tmp_path / "run")]
    assert main(["train", "--recipe", str(tmp_path / "chats.jsonl"), *words]) == 0
    checkpoint = ChatCollator(load_processor(str(tmp_path / "run" / "checkpoint-1")))
    trained = ChatCollator(load_processor("tiny", max_pixels=50_176))
    same(checkpoint([row_of(drawn_picture(421, 277))]), trained([row_of(drawn_picture(421, 277))]))


# Videos


def patched_reader(monkeypatch: pytest.MonkeyPatch) -> Any:
    """qwen_vl_utils with a reader that decodes in order by PyAV."""
    utils = pytest.importorskip("qwen_vl_utils.vision_process")
    av = pytest.importorskip("av", reason="no video decoder: pip install av")

    def read(element: Row) -> Any:
        with av.open(element["video"].removeprefix("file://")) as container:
            fps = float(container.streams.video[0].average_rate)
            every = torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])
        first, last, total = utils.calculate_video_frame_range(element, len(every), fps)
        count = utils.smart_nframes(element, total_frames=total, video_fps=fps)
        indices = torch.linspace(first, last, count).round().long().tolist()
        metadata = {"fps": fps, "frames_indices": indices, "total_num_frames": total, "video_backend": "pyav"}
        return every[indices].permute(0, 3, 1, 2), metadata, count / max(total, 1e-6) * fps

    monkeypatch.setattr(utils, "get_video_reader_backend", lambda: "pyav")
    monkeypatch.setitem(utils.VIDEO_READER_BACKENDS, "pyav", read)
    return utils


@pytest.mark.parametrize(
    "keys",
    [{"nframes": 4}, {"nframes": 6, "min_pixels": 5_000, "max_pixels": 30_000}, {"fps": 1, "max_frames": 6}],
    ids=str,
)
@pytest.mark.parametrize("family", ["tiny", "qwen3_vl"])
def test_a_video_gives_the_tensors_of_qwen_vl_utils_and_the_processor(
    shared: Path, monkeypatch: pytest.MonkeyPatch, family: str, keys: Row
) -> None:
    utils = patched_reader(monkeypatch)
    processor = qwen("tiny") if family == "tiny" else build_processor(family)
    row = video_row(str(shared / "sharegpt_demo/data/mllm_demo_data/1.mp4"), keys)
    images, videos, words = utils.process_vision_info(
        row["messages"],
        return_video_kwargs=True,
        return_video_metadata=True,
        image_patch_size=processor.image_processor.patch_size,
    )
    assert images is None
    frames, metadata = zip(*videos, strict=True)
    text = processor.apply_chat_template(row["messages"], tokenize=False)
    expected = processor(
        text=[text], videos=list(frames), video_metadata=list(metadata), do_resize=False, return_tensors="pt", **words
    )
    found = ChatCollator(processor)([row])
    assert set(found) - {"labels"} == set(expected)
    same(found, dict(expected))


def test_the_timestamps_of_a_video_are_media_and_no_targets() -> None:
    collator = ChatCollator(build_processor("qwen3_vl"))
    explained = collator.explain(video_row(FRAMES, {"sample_fps": 2.0}))
    runs = [run for run in explained.runs if run["reason"] == "media"]
    inside = "".join(view.text for view in explained if view.reason == "media")
    assert "<0.2 seconds>" in inside and "<1.2 seconds>" in inside  # the middles of two pairs of frames
    assert len(runs) == 1
    assert not any(view.trained for view in explained if view.reason == "media")
    outside = "".join(view.text for view in explained if view.reason != "media")
    assert "seconds>" not in outside and "<|video_pad|>" not in outside
    assert "".join(view.text for view in explained if view.trained) == "Red.<|im_end|>"


def test_a_video_in_an_answer_is_no_target_with_its_timestamps() -> None:
    collator = ChatCollator(build_processor("qwen3_vl"))
    content = [{"type": "text", "text": "See: "}, {"type": "video", "video": FRAMES}, {"type": "text", "text": "done"}]
    row = {"messages": [{"role": "user", "content": "Show."}, {"role": "assistant", "content": content}]}
    try:
        explained = collator.explain(row)
    except RowError as error:
        pytest.skip(f"this template takes no video in an answer: {str(error)[:80]}")
    assert "".join(view.text for view in explained if view.trained) == "See: done<|im_end|>"
    assert "seconds>" in "".join(view.text for view in explained if view.reason == "media")


def test_words_that_look_like_a_timestamp_in_an_answer_are_trained() -> None:
    collator = ChatCollator(build_processor("qwen3_vl"))
    row = video_row(FRAMES)
    row["messages"][1]["content"] = "At <0.2 seconds> it is red."
    batch = collator([row])
    labels = batch["labels"][0]
    assert collator.tokenizer.decode(labels[labels != -100]) == "At <0.2 seconds> it is red.<|im_end|>"


def test_what_explain_shows_is_the_size_that_the_model_sees() -> None:
    explained = collator_of("tiny").explain(row_of(drawn_picture(420, 280), keys={"max_pixels": 50_176}))
    assert explained.images == [(168, 252)]
    assert collator_of("tiny").explain(video_row(FRAMES)).videos[0][0] == 4
