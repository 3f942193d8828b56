"""Fitting: an example over max_length is refused, dropped, shortened or downscaled; media are never cut; all is counted."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from processors import NEEDS, build_processor

from vlm_dft import ChatCollator, Example, MaskError
from vlm_dft.chat import unroll
from vlm_dft.cli import main
from vlm_dft.errors import RowError
from vlm_dft.gathering import Gathered, gather
from vlm_dft.models import load_processor
from vlm_dft.recipes import load_recipe, read_recipe

torch.set_num_threads(1)
FAMILIES = ("tiny", "glm4v", "lfm2_vl", "pixtral", "llava", "internvl", "idefics3")
SIZED = ("tiny", "glm4v", "lfm2_vl", "pixtral")  # whose tokens depend on the picture's size
PATCHES = {"glm4v": 14, "tiny": 14}  # pixels along a patch, where the grid is returned
END_COUNTS = {"llava": 1}  # the end of sequence that is added is the last token
POLICIES = ("drop", "shorten_answer", "downscale")
WORDS = "Red, then blue, then green, then red again. The answer is 12."

Row = dict[str, Any]


@cache
def processor_of(family: str) -> Any:
    if family in NEEDS:
        pytest.importorskip(NEEDS[family])
    return load_processor("tiny") if family == "tiny" else build_processor(family)


@cache
def picture(width: int = 224, height: int = 112, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def turn(role: str, *parts: Any, **extra: Any) -> Row:
    """A message; None stands for an image, a dict is a part."""
    content = [
        {"type": "image"} if part is None else part if isinstance(part, dict) else {"type": "text", "text": part}
        for part in parts
    ]
    return {"role": role, "content": content, **extra}


def one_image(answer: str = WORDS, size: tuple[int, int] = (224, 112), **extra: Any) -> Row:
    messages = [turn("user", None, "What is it?"), turn("assistant", answer)]
    return {"messages": messages, "images": [picture(*size)], **extra}


def text_only(answer: str = WORDS, **extra: Any) -> Row:
    return {"messages": [turn("user", "Hi"), turn("assistant", answer)], **extra}


FRAMES = [picture(56, 56, seed) for seed in range(4)]
VIDEO = {"type": "video"}


def one_video(answer: str = WORDS) -> Row:
    return {"messages": [turn("user", VIDEO, "What is it?"), turn("assistant", answer)], "videos": [FRAMES]}


def limited(family: str, limit: int, policy: Any) -> ChatCollator:
    return ChatCollator(processor_of(family), max_length=limit, too_long=policy)


def tokens_of(batch: dict[str, Any], k: int = 0) -> list[int]:
    return batch["input_ids"][k][batch["attention_mask"][k].bool()].tolist()


def targets_of(batch: dict[str, Any], k: int = 0) -> list[int]:
    return [label for label in batch["labels"][k].tolist() if label != -100]


def media_of(collator: ChatCollator, row: Row) -> int:
    """Tokens that stand for pixels or enclose them, as explain says."""
    return collator.explain(row).counts.get("media", 0)


def check_media(family: str, batch: dict[str, Any], images: list[Image.Image] | None = None) -> None:
    """The batch holds as many media tokens as its pixels imply: by the grid, or by the processor's call of the pictures."""
    processor = processor_of(family)
    for kind in ("image", "video"):
        if f"{kind}_grid_thw" in batch:
            merged = batch[f"{kind}_grid_thw"].prod(-1) // processor.image_processor.merge_size**2
            found = (batch["input_ids"] == getattr(processor, f"{kind}_token_id")).sum()
            assert int(found) == int(merged.sum())
    if "image_grid_thw" in batch or images is None:
        return
    token = processor.image_token
    text = " ".join([token] * len(images))
    alone = processor(text=[text], images=[images], return_tensors="pt")
    own = processor.tokenizer.convert_tokens_to_ids(token if family != "internvl" else "<IMG_CONTEXT>")
    assert int((batch["input_ids"] == own).sum()) == int((alone["input_ids"] == own).sum()) > 0
    assert batch["pixel_values"].shape == alone["pixel_values"].shape


# Every policy


@pytest.mark.parametrize("family", FAMILIES)
def test_measuring_counts_what_collating_gives_for_every_mixture(family: str) -> None:
    collator = ChatCollator(processor_of(family))
    tall, wide = ((40, 300), (300, 40)) if family != "lfm2_vl" else ((56, 112), (112, 112))  # it fails on long pictures
    mixed = [
        text_only(), one_image(), one_image(size=tall), one_image(size=wide), one_image(size=(61, 47)),
        {"messages": [turn("user", None, "and", None, "which?"), turn("assistant", "One."), turn("user", "Why?"),
                      turn("assistant", "So.", train=False), turn("user", "Sure?"), turn("assistant", "Yes, sure.")],
         "images": [picture(), picture(112, 112)]},
        {"messages": [turn("user", "<image> and <|image_pad|>"), turn("assistant", "the <image> tag")]},
        {"messages": [turn("user", None), turn("assistant", "\n\nA line above.")], "images": [picture()]},
    ]  # fmt: skip
    together = collator(mixed)
    for k, row in enumerate(mixed):
        measured, batch, explained = collator.measure(row), collator([row]), collator.explain(row)
        assert measured.tokens == len(tokens_of(batch)) == len(tokens_of(together, k)) == len(explained)
        assert measured.targets == len(targets_of(batch)) == len(targets_of(together, k))
        assert 0 <= measured.media <= explained.counts.get("media", 0)
        assert (measured.media > 0) == bool(row.get("images"))
        assert explained.tokens[measured.before].trained
        last = [t.position for t in explained if t.trained and t.position > measured.before]
        assert last == list(range(measured.before + 1, measured.before + 1 + len(last)))  # one run to its end


def test_measuring_counts_videos_as_collating_does() -> None:
    collator = ChatCollator(processor_of("tiny"))
    both = {
        "messages": [turn("user", None, VIDEO, "What?"), turn("assistant", "Red.")],
        "images": [picture()],
        "videos": [FRAMES],
    }
    for row in (one_video(), both):
        measured, batch = collator.measure(row), collator([row])
        assert measured.tokens == len(tokens_of(batch)) and measured.targets == len(targets_of(batch))
        assert measured.media == int((batch["mm_token_type_ids"] > 0).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_raising_names_the_row_the_tokens_and_what_to_do(family: str) -> None:
    tokens = ChatCollator(processor_of(family)).measure(one_image()).tokens
    limited(family, tokens, "raise")([one_image()])
    with pytest.raises(
        MaskError, match=f"row-17: {tokens} tokens, over max_length = {tokens - 1}. Media are never cut"
    ):
        limited(family, tokens - 1, "raise")([text_only("Short."), one_image(id="row-17")])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_row_of_just_max_length_is_left_alone(family: str, policy: str) -> None:
    plain = ChatCollator(processor_of(family))
    tokens = plain.measure(one_image()).tokens
    collator = limited(family, tokens, policy)
    expected, batch = plain([one_image()]), collator([one_image()])
    assert set(batch) == set(expected) and all(torch.equal(batch[key], expected[key]) for key in batch)
    assert not [effect for _, effect in collator.counts if "max_length" in effect]


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_leaves_the_other_rows_as_they_are(family: str) -> None:
    plain = ChatCollator(processor_of(family))
    tokens = plain.measure(one_image()).tokens
    collator = limited(family, tokens - 1, "drop")
    others = [text_only("One."), one_image("A."), text_only("Two.")]
    batch, expected = collator([others[0], one_image(source="pack"), *others[1:]]), plain(others)
    assert set(batch) == set(expected) and all(torch.equal(batch[key], expected[key]) for key in batch)
    assert collator.counts["pack", f"dropped: over max_length = {tokens - 1} tokens"] == 1
    assert sum(count for (source, _), count in collator.counts.items() if source == "pack") == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_cut_exactly_to_max_length_and_its_end_of_turn_is_no_target(family: str) -> None:
    plain = ChatCollator(processor_of(family))
    whole, measured = plain([one_image()]), plain.measure(one_image())
    for limit in (measured.before + 1, measured.before + 4):
        collator = limited(family, limit, "shorten_answer")
        batch = collator([one_image()])
        assert tokens_of(batch) == tokens_of(whole)[:limit]
        assert targets_of(batch) == targets_of(whole)[: limit - measured.before]
        assert not set(targets_of(batch)) & set(
            plain.tokenizer.convert_tokens_to_ids(plain.tokenizer.all_special_tokens)
        )
        assert torch.equal(batch["pixel_values"], whole["pixel_values"])
        check_media(family, batch, [picture()])
        effect = f"answer shortened to max_length = {limit} tokens, its end of turn not trained"
        assert collator.counts["", effect] == 1
        explained = limited(family, limit, "shorten_answer").explain(one_image())
        assert effect in explained.notes and len(explained) == limit and "end of turn" not in explained.counts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_is_too_long_alone_is_dropped_and_counted(family: str) -> None:
    before = ChatCollator(processor_of(family)).measure(one_image()).before
    collator = limited(family, before, "shorten_answer")
    batch = collator([one_image(source="a"), text_only("B.")])
    assert batch["input_ids"].shape[0] == 1 and "pixel_values" not in batch
    assert collator.counts["a", f"dropped: what comes before the last answer is over max_length = {before} tokens"] == 1


@pytest.mark.parametrize("family", ["tiny", "lfm2_vl", "llava"])
def test_a_last_answer_that_is_not_trained_is_not_shortened(family: str) -> None:
    row = {
        "messages": [
            turn("user", "Hi"),
            turn("assistant", "Yes."),
            turn("user", "Why?"),
            turn("assistant", WORDS, train=False),
        ]
    }
    tokens = ChatCollator(processor_of(family)).measure(row).tokens
    collator = limited(family, tokens - 3, "shorten_answer")
    batch = collator([row, text_only("B.")])
    assert batch["input_ids"].shape[0] == 1
    assert sum(n for (_, effect), n in collator.counts.items() if effect.startswith("dropped")) == 1


def test_only_the_last_of_several_answers_is_cut() -> None:
    plain = ChatCollator(processor_of("tiny"))
    row = {"messages": [turn("user", "Hi"), turn("assistant", "Yes."), turn("user", "Why?"), turn("assistant", WORDS)]}
    measured = plain.measure(row)
    batch = limited("tiny", measured.before + 2, "shorten_answer")([row])
    said = plain.tokenizer.decode(targets_of(batch))
    assert said.startswith("Yes.<|im_end|>") and "<|im_end|>" not in said.removeprefix("Yes.<|im_end|>")
    assert len(tokens_of(batch)) == measured.before + 2


def test_when_only_the_line_after_the_end_of_turn_is_cut_every_target_stays() -> None:
    plain = ChatCollator(processor_of("tiny"))
    tokens, whole = plain.measure(text_only()).tokens, plain([text_only()])
    assert plain.tokenizer.decode(tokens_of(whole)[-1:]) == "\n" and whole["labels"][0, -1] == -100
    collator = limited("tiny", tokens - 1, "shorten_answer")
    assert targets_of(collator([text_only()])) == targets_of(whole)
    assert not [effect for _, effect in collator.counts if "end of turn not trained" in effect]


@pytest.mark.parametrize("family", ["tiny", "internvl"])
def test_an_image_inside_the_last_answer_is_never_cut(family: str) -> None:
    row = {"messages": [turn("user", "Draw."), turn("assistant", "Here it is: ", None, WORDS)], "images": [picture()]}
    plain = ChatCollator(processor_of(family))
    measured, views = plain.measure(row), plain.explain(row).tokens
    media = [view.position for view in views if view.reason == "media"]
    for limit in (media[0] + 1, media[-1], media[-1] + 1, media[-1] + 3):
        collator = limited(family, limit, "shorten_answer")
        batch = collator([row, text_only("B.")])
        assert batch["input_ids"].shape[0] == (2 if limit > media[-1] else 1), (limit, media[-1], measured)
        if limit > media[-1]:
            check_media(family, batch, [picture()])
            assert len(tokens_of(batch)) == limit


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_which_every_row_is_dropped_says_what_to_do(family: str, policy: str) -> None:
    collator = limited(family, 3, policy)
    with pytest.raises(
        RowError,
        match="s row-1, s row-2: every row .* max_length = 3 tokens. Drop long rows before batching .*, or raise max_length",
    ):
        collator([one_image(id="row-1", source="s"), text_only(id="row-2", source="s")])
    assert sum(collator.counts.values()) == 2 and {source for source, _ in collator.counts} == {"s"}


# Downscaling


@pytest.mark.parametrize("family", SIZED)
def test_images_are_downscaled_as_little_as_needed(family: str) -> None:
    """The most media tokens that fit: found by trying every size between the smallest and the given one."""
    plain = ChatCollator(processor_of(family))
    measured, views = plain.measure(one_image()), plain.explain(one_image())
    possible = {plain.measure(one_image(size=(2 * side, side))).tokens for side in range(2, 113, 2)}
    assert len(possible) > 1 and max(possible) == measured.tokens
    limit = measured.tokens - 1
    collator = limited(family, limit, "downscale")
    batch = collator([one_image()])
    if family == "lfm2_vl":  # whose tiles make more tokens of some smaller pictures than of larger ones
        assert min(possible) < len(tokens_of(batch)) <= limit
    else:
        assert len(tokens_of(batch)) == max(n for n in possible if n <= limit)
    assert targets_of(batch) == targets_of(plain([one_image()]))  # nothing of the answer is lost
    effect = f"images downscaled to max_length = {limit} tokens"
    assert collator.counts["", effect] == 1
    if "image_grid_thw" in batch:
        check_media(family, batch)
    explained = limited(family, limit, "downscale").explain(one_image())
    assert effect in explained.notes and len(explained) == len(tokens_of(batch)) < len(views)


@pytest.mark.parametrize("family", ["llava", "internvl", "idefics3"])
def test_a_fixed_number_of_tokens_cannot_be_downscaled_and_the_row_is_dropped(family: str) -> None:
    measured = ChatCollator(processor_of(family)).measure(one_image())
    collator = limited(family, measured.tokens - 1, "downscale")
    assert collator([one_image(source="a"), text_only("B.")])["input_ids"].shape[0] == 1
    effect = f"dropped: over max_length = {measured.tokens - 1} tokens, however small its images"
    assert collator.counts["a", effect] == 1


def test_a_small_picture_beside_a_large_one_is_not_shrunk_first() -> None:
    """The processor already limits the large one: scaling starts from what the model would have seen."""
    row = {"messages": [turn("user", None, None, "Hi"), turn("assistant", "Red.")],
           "images": [picture(1120, 1120), picture(112, 112)]}  # fmt: skip
    plain = ChatCollator(processor_of("tiny"))
    assert plain([row])["image_grid_thw"].tolist() == [[1, 32, 32], [1, 8, 8]]
    batch = limited("tiny", plain.measure(row).tokens - 1, "downscale")([row])
    (_, high, wide), small = batch["image_grid_thw"].tolist()
    assert high == wide == 30 and small in ([1, 8, 8], [1, 6, 6])


def test_a_picture_that_the_processor_enlarges_is_downscaled_from_its_enlarged_size() -> None:
    processor = load_processor("tiny", min_pixels=112 * 112)
    row = one_image("Red.", size=(28, 28))
    plain = ChatCollator(processor)
    assert plain([row])["image_grid_thw"].tolist() == [[1, 8, 8]]
    tokens = plain.measure(row).tokens
    batch = ChatCollator(processor, max_length=tokens - 1, too_long="downscale")([row])
    assert batch["image_grid_thw"].tolist() == [[1, 6, 6]]  # 9 tokens in place of 16


def test_settings_of_an_image_give_way_to_downscaling() -> None:
    row = one_image("Red.", size=(224, 224))
    row["messages"][0]["content"][0].update(min_pixels=112 * 112, max_pixels=112 * 112)
    plain = ChatCollator(processor_of("tiny"))
    assert plain([row])["image_grid_thw"].tolist() == [[1, 8, 8]]
    batch = limited("tiny", plain.measure(row).tokens - 1, "downscale")([row])
    assert batch["image_grid_thw"].tolist() == [[1, 6, 6]]
    assert row["messages"][0]["content"][0] == {"type": "image", "min_pixels": 12544, "max_pixels": 12544}


def test_a_downscaled_picture_is_the_given_one_resized_once() -> None:
    row = one_image("Red.")
    plain = ChatCollator(processor_of("tiny"))
    batch = limited("tiny", plain.measure(row).tokens - 1, "downscale")([row])
    (_, high, wide), processor = batch["image_grid_thw"][0].tolist(), processor_of("tiny")
    resized = picture().resize((wide * 14, high * 14))
    expected = processor.image_processor(images=[resized], do_resize=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)


def test_an_image_beside_a_video_is_downscaled_and_the_video_left() -> None:
    row = {"messages": [turn("user", None, VIDEO, "What?"), turn("assistant", "Red.")], "images": [picture()],
           "videos": [FRAMES]}  # fmt: skip
    plain = ChatCollator(processor_of("tiny"))
    whole, tokens = plain([row]), plain.measure(row).tokens
    batch = limited("tiny", tokens - 5, "downscale")([row])
    assert len(tokens_of(batch)) <= tokens - 5
    assert torch.equal(batch["pixel_values_videos"], whole["pixel_values_videos"])
    assert batch["image_grid_thw"].prod() < whole["image_grid_thw"].prod()
    check_media("tiny", batch)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_video_is_never_cut(policy: str) -> None:
    plain = ChatCollator(processor_of("tiny"))
    measured = plain.measure(one_video())
    collator = limited("tiny", measured.before - 10, policy)
    batch = collator([one_video(), text_only("B.")])
    assert batch["input_ids"].shape[0] == 1 and "pixel_values_videos" not in batch
    (effect,) = [effect for _, effect in collator.counts]
    assert effect.startswith("dropped: ")


def test_the_answer_to_a_video_is_shortened() -> None:
    plain = ChatCollator(processor_of("tiny"))
    measured, whole = plain.measure(one_video()), plain([one_video()])
    batch = limited("tiny", measured.before + 3, "shorten_answer")([one_video()])
    assert tokens_of(batch) == tokens_of(whole)[: measured.before + 3]
    assert targets_of(batch) == targets_of(whole)[:3]
    assert torch.equal(batch["pixel_values_videos"], whole["pixel_values_videos"])
    check_media("tiny", batch)


# Counting


def test_effects_are_counted_once_for_each_row_and_source() -> None:
    plain = ChatCollator(processor_of("tiny"))
    limit = plain.measure(text_only()).before + 8
    collator = limited("tiny", limit, "shorten_answer")
    rows = [
        text_only(source="a"),
        text_only("No.", source="a"),
        text_only(source="b"),
        text_only(source="b"),
        one_image(source="b"),
    ]
    for _ in range(2):
        collator(rows)
    shortened = f"answer shortened to max_length = {limit} tokens, its end of turn not trained"
    dropped = f"dropped: what comes before the last answer is over max_length = {limit} tokens"
    assert collator.counts == Counter({("a", shortened): 2, ("b", shortened): 4, ("b", dropped): 2})


def test_looking_at_a_row_counts_nothing() -> None:
    limit = ChatCollator(processor_of("tiny")).measure(text_only()).before + 3
    collator = limited("tiny", limit, "shorten_answer")
    collator.explain(text_only())
    collator.measure(text_only())
    assert collator.counts == Counter()


def test_packed_rows_are_fitted_one_by_one() -> None:
    limit = ChatCollator(processor_of("tiny")).measure(text_only()).before + 3
    collator = ChatCollator(processor_of("tiny"), max_length=limit, too_long="shorten_answer", packing=True)
    batch = collator([text_only(), text_only(), text_only("No.")])
    short = ChatCollator(processor_of("tiny")).measure(text_only("No.")).tokens
    assert batch["input_ids"].shape == (1, 2 * limit + min(short, limit))


@pytest.mark.parametrize("side", ["right", "left"])
def test_shortened_rows_are_padded_on_the_side_that_is_asked_for(side: Any) -> None:
    plain = ChatCollator(processor_of("tiny"), padding_side=side)
    measured, whole = plain.measure(text_only()), plain([text_only()])
    collator = ChatCollator(
        processor_of("tiny"), max_length=measured.before + 3, too_long="shorten_answer", padding_side=side
    )
    batch = collator([text_only("N"), text_only()])
    assert tokens_of(batch, 1) == tokens_of(whole)[: measured.before + 3]
    assert targets_of(batch, 1) == targets_of(whole)[:3]
    trained = batch["labels"] != -100
    assert torch.equal(batch["labels"][trained], batch["input_ids"][trained])
    assert not (trained & (batch["attention_mask"] == 0)).any()


# Through the front door


def gathered(folder: Path, rows: list[Row], collator: ChatCollator) -> Gathered:
    """Rows with pictures of their own, through a file of JSON lines."""
    lines = []
    for k, row in enumerate(rows):
        names = [f"{k}-{i}.png" for i in range(len(row.get("images", [])))]
        for name, image in zip(names, row.get("images", []), strict=True):
            image.save(folder / name)
        lines.append(json.dumps({**row, "images": names, "id": f"id{k}"}) + "\n")
    (folder / "set.jsonl").write_text("".join(lines))
    return gather(read_recipe(str(folder / "set.jsonl")), None, collator)


@pytest.mark.parametrize("family", ["tiny", "lfm2_vl", "llava"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_account_is_what_collating_the_kept_rows_gives(family: str, policy: str, tmp_path: Path) -> None:
    plain = ChatCollator(processor_of(family))
    rows = [text_only("A."), one_image("B."), one_image(), text_only(WORDS * 4), one_image(WORDS * 9)]
    limit = plain.measure(plain_example(rows[2])).tokens - 3
    found = gathered(tmp_path, rows, limited(family, limit, policy))
    (account,), kept = found.accounts, list(found.examples)
    dropped = [i for rows in account.dropped.values() for i in rows.ids]
    assert account.used == len(kept) and account.read == account.used + len(dropped)
    assert sorted([*dropped, *(example.id for example in kept)]) == ["id0", "id1", "id2", "id3", "id4"]
    changed = [i for rows in account.changed.values() for i in rows.ids]
    assert len(set(changed)) == len(changed) and set(changed) <= {example.id for example in kept}
    fresh = limited(family, limit, policy)
    batches = [fresh([example]) for example in kept]
    assert found.lengths == [len(tokens_of(batch)) for batch in batches]
    assert account.tokens["all"] == sum(found.lengths)
    assert account.tokens["response"] == sum(len(targets_of(batch)) for batch in batches)
    assert account.tokens["text"] + account.tokens["media"] == account.tokens["all"]
    assert max(len(tokens_of(batch)) for batch in batches) <= limit


def plain_example(row: Row) -> Example:
    return Example(row["messages"], row.get("images", []))


def test_the_account_names_every_row_that_was_changed_or_dropped(tmp_path: Path) -> None:
    plain = ChatCollator(processor_of("tiny"))
    rows = [text_only("A."), text_only(), one_image("B."), text_only()]
    limit = plain.measure(plain_example(rows[1])).before + 4
    found = gathered(tmp_path, rows, limited("tiny", limit, "shorten_answer"))
    (account,) = found.accounts
    assert [example.id for example in found.examples] == ["id0", "id1", "id3"]
    assert account.as_dict()["changed"] == {
        f"answer shortened to max_length = {limit} tokens, its end of turn not trained": {
            "rows": 2,
            "ids": ["id1", "id3"],
        }
    }
    assert account.as_dict()["dropped"] == {
        f"what comes before the last answer is over max_length = {limit} tokens": {"rows": 1, "ids": ["id2"]}
    }
    assert account.as_dict()["duplicates"] == {"rows": 1, "ids": ["id3"]}


def test_when_every_row_is_dropped_the_front_door_says_so(tmp_path: Path) -> None:
    said = "None of the 2 rows of set is left: 2 over max_length = 5 tokens. Raise max_length."
    with pytest.raises(RowError, match=said):
        gathered(tmp_path, [text_only(), one_image()], limited("tiny", 5, "drop"))


def written(tmp_path: Path, rows: list[Row]) -> Path:
    picture().save(tmp_path / "a.png")
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(*texts: str, images: int = 0) -> Row:
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, texts, strict=False)]
    return {"messages": messages, **({"images": ["a.png"] * images} if images else {})}


@pytest.mark.parametrize(
    ("policy", "used", "effects"),
    [
        ("drop", ["0", "2"], {"dropped": {"over max_length = {} tokens": ["1", "3"]}}),
        (
            "shorten_answer",
            ["0", "1", "2"],
            {
                "changed": {"answer shortened to max_length = {} tokens, its end of turn not trained": ["1"]},
                "dropped": {"what comes before the last answer is over max_length = {} tokens": ["3"]},
            },
        ),
        (
            "downscale",
            ["0", "2", "3"],
            {
                "changed": {"images downscaled to max_length = {} tokens": ["3"]},
                "dropped": {"over max_length = {} tokens, without images to make smaller": ["1"]},
            },
        ),
    ],
)
def test_a_training_run_accounts_for_every_row(
    tmp_path: Path, policy: str, used: list[str], effects: dict[str, dict[str, list[str]]]
) -> None:
    chats = written(tmp_path, [said("q", "a"), said("q", WORDS * 3), said("q", "c"), said("<image>q", "d", images=1)])
    plain = ChatCollator(processor_of("tiny"))
    limit = plain.measure(one_image("d", size=(56, 56))).tokens
    words = ["--max_length", str(limit), "--too_long", policy, "--batch_size", "3", "--micro_batch", "3"]
    output = tmp_path / "run"
    assert main(["train", "--recipe", str(chats), "--output", str(output), *words]) == 0
    (account,) = json.loads((output / "accounting.json").read_text())["sources"]
    assert (account["read"], account["used"]) == (4, len(used))
    for kind in ("dropped", "changed"):
        expected = {
            effect.format(limit): {"rows": len(ids), "ids": ids} for effect, ids in effects.get(kind, {}).items()
        }
        assert account[kind] == expected
    samples = json.loads((output / "mask_report.json").read_text())["samples"]
    assert [sample["sample"] for sample in samples] == [f"chats {k}" for k in used]
    assert account["tokens"]["all"] == sum(sample["tokens"] for sample in samples)
    assert account["tokens"]["response"] == sum(sample["targets"] for sample in samples)


# Unrolling


def test_unrolling_trains_every_answer_once_each_with_what_came_before() -> None:
    plain = ChatCollator(processor_of("tiny"))
    example = Example(
        [turn("user", None, "a"), turn("assistant", "one"), turn("user", "b"), turn("assistant", "two", train=False),
         turn("user", None, "c"), turn("assistant", "three")],
        [picture(), picture(112, 112)], id="x", source="set",
    )  # fmt: skip
    unrolled = unroll(example)
    assert [(one.id, len(one.messages), len(one.images)) for one in unrolled] == [("x#1", 2, 1), ("x#5", 6, 2)]
    said = [plain.tokenizer.decode(targets_of(plain([one]))) for one in unrolled]
    assert said == ["one<|im_end|>", "three<|im_end|>"]
    assert plain.tokenizer.decode(targets_of(plain([example]))) == "".join(said)
    assert tokens_of(plain([unrolled[1]])) == tokens_of(plain([example]))
    assert "train" not in example.messages[1]


def card(tmp_path: Path, **more: Any) -> str:
    path = tmp_path / "mine.yaml"
    own = {
        "description": "d",
        "licence": "mine",
        "source": {"files": ["chats.jsonl"]},
        "messages": None,
        "images": None,
    }
    path.write_text(yaml.safe_dump({**own, **more}))
    return str(path)


def test_a_card_may_ask_for_unrolling(tmp_path: Path) -> None:
    written(tmp_path, [said("<image>q", "one", "r", "two", images=1), said("q", "three")])
    examples, account = load_recipe(read_recipe(card(tmp_path, unroll=True)), str(tmp_path))
    assert [example.id for example in examples] == ["0#1", "0#3", "1#1"] and account.read == 3
    plain = ChatCollator(processor_of("tiny"))
    assert [plain.tokenizer.decode(targets_of(plain([e]))) for e in examples] == [
        "one<|im_end|>", "two<|im_end|>", "three<|im_end|>",
    ]  # fmt: skip
    whole, account = load_recipe(read_recipe(card(tmp_path)), str(tmp_path))
    assert [example.id for example in whole] == ["0", "1"] and account.read == 2


@pytest.mark.parametrize("value", ["yes please", 3, None, [True]])
def test_unroll_is_true_or_false(tmp_path: Path, value: Any) -> None:
    written(tmp_path, [said("q", "one")])
    with pytest.raises(ValueError, match="unroll"):
        load_recipe(read_recipe(card(tmp_path, unroll=value)), str(tmp_path))


def test_a_row_without_a_trained_answer_is_refused_when_it_is_unrolled_too(tmp_path: Path) -> None:
    """It would vanish from the account of rows read."""
    untrained = said("q", "one")
    untrained["messages"][1]["train"] = False
    written(tmp_path, [said("q", "one"), untrained])
    with pytest.raises(RowError, match="mine (row )?1: no assistant message to train on"):
        gather(read_recipe(card(tmp_path, unroll=True)), str(tmp_path), ChatCollator(processor_of("tiny")))
