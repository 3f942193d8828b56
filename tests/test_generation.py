"""Generation with the embedded model: batches equal single rows, and nothing is lost or mixed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlm_dft import generation
from vlm_dft.chat import Sample
from vlm_dft.collators import ChatCollator
from vlm_dft.errors import ConfigError, ImageError
from vlm_dft.fingerprints import fingerprint
from vlm_dft.generation import end_ids, generate

NEW_TOKENS = 12


def sample(k: int, text: str, colour: str = "red", size: tuple[int, int] = (112, 112)) -> Sample:
    image = Image.new("RGB", size, "white")
    image.paste(colour, (10 * k, 30, 10 * k + 20, 90))
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return Sample(
        f"s{k}", [{"role": "user", "content": content}], [image], "drawn", "test", {"max_new_tokens": NEW_TOKENS}
    )


@pytest.fixture
def samples() -> list[Sample]:
    questions = [
        "How tall is the red bar?",
        "?",
        "What is the total of the bars?",
        "How many blue circles are there in the picture?",
        "Go",
    ]
    return [
        sample(k, text, colour)
        for (k, text), colour in zip(enumerate(questions), ["red", "blue", "green", "black", "red"], strict=True)
    ]


@pytest.fixture(scope="module")
def model() -> Any:
    from vlm_dft.models import load_model

    return load_model("tiny")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


def test_batched_answers_equal_answers_one_by_one(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    batched = generate(model, ChatCollator(processor), samples, tmp_path / "batched.jsonl", batch_size=3)
    single = generate(model, ChatCollator(processor), samples, tmp_path / "single.jsonl", batch_size=1)
    assert batched == single
    assert [row["id"] for row in batched] == ["s0", "s1", "s2", "s3", "s4"]
    assert len({row["response"] for row in batched}) > 1
    assert (tmp_path / "batched.jsonl").read_bytes() == (tmp_path / "single.jsonl").read_bytes()


def test_the_answers_are_the_most_likely_tokens(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    row = generate(model, ChatCollator(processor), samples[:1], tmp_path / "p.jsonl", max_new_tokens=4)[0]
    inputs = dict(
        processor(
            text=[processor.apply_chat_template(samples[0].messages, add_generation_prompt=True, tokenize=False)],
            images=samples[0].images,
            return_tensors="pt",
        )
    )
    ids: list[int] = []
    with torch.no_grad():
        for _ in range(row["tokens"]):
            ids.append(int(model(**inputs).logits[0, -1].argmax()))
            one = torch.tensor([[ids[-1]]])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], one], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(one)], 1)
    assert row["response"] == processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_model_s_own_sampling_settings_do_not_reach_greedy_answers(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = generate(model, ChatCollator(processor), samples[:2], tmp_path / "a.jsonl")
    for name, value in {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert generate(model, ChatCollator(processor), samples[:2], tmp_path / "b.jsonl") == plain


def test_finish_tells_an_ended_answer_from_a_cut_one(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    cut = generate(model, ChatCollator(processor), samples[:1], tmp_path / "cut.jsonl", max_new_tokens=1)[0]
    assert (cut["finish"], cut["tokens"]) == ("length", 1)
    ends = end_ids(model, processor)
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") in ends
    word = processor.tokenizer("red", add_special_tokens=False)["input_ids"]
    found = generation._read_answer([*word, ends[0], *word], ends, processor)
    assert found == {"response": "red", "finish": "stop", "tokens": len(word) + 1}


def test_a_killed_run_goes_on_and_ends_in_the_same_file(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole" / "predictions.jsonl"
    killed = tmp_path / "killed" / "predictions.jsonl"
    for path in (whole, killed):
        path.parent.mkdir()
    generate(model, ChatCollator(processor), samples, whole, batch_size=2)
    answer, calls = generation._answer, []

    def die_at_the_third(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(*args)

    monkeypatch.setattr(generation, "_answer", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        generate(model, ChatCollator(processor), samples, killed, batch_size=2)
    lines = killed.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    killed.write_bytes(b"".join(lines[:3]) + lines[3][:-9])  # and the fourth was half-written
    generate(model, ChatCollator(processor), samples, killed, batch_size=2)
    assert len(calls) == 5  # the second batch again, for the lost row, and the third
    assert killed.read_bytes() == whole.read_bytes()
    generate(model, ChatCollator(processor), samples, killed, batch_size=2)
    assert len(calls) == 5


def test_changed_settings_are_refused_and_not_mixed(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    path = tmp_path / "predictions.jsonl"
    generate(model, ChatCollator(processor), samples[:2], path, model_name="tiny", max_new_tokens=2)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"other settings .*max_new_tokens: 2 there, 3 now.* Remove it to start over"):
        generate(model, ChatCollator(processor), samples[:2], path, model_name="tiny", max_new_tokens=3)
    with pytest.raises(ConfigError, match=r"other settings .*prompts: "):
        generate(
            model,
            ChatCollator(processor),
            [samples[0], replace(samples[1], messages=samples[2].messages)],
            path,
            max_new_tokens=2,
        )
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[:, 0] += 1
    try:
        with pytest.raises(ConfigError, match=r"other settings .*weights: "):
            generate(model, ChatCollator(processor), samples[:2], path, model_name="tiny", max_new_tokens=2)
    finally:
        with torch.no_grad():
            head[:, 0] -= 1
    assert path.read_bytes() == before
    (tmp_path / "predictions.meta.json").unlink()
    with pytest.raises(ConfigError, match=r"has no predictions\.meta\.json beside it"):
        generate(model, ChatCollator(processor), samples[:2], path, max_new_tokens=2)


def test_the_settings_lie_beside_the_predictions(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    generate(model, ChatCollator(processor), samples[:1], tmp_path / "predictions.jsonl", model_name="tiny")
    meta = json.loads((tmp_path / "predictions.meta.json").read_text())
    assert (meta["model"], meta["benchmark"], meta["samples"], meta["max_new_tokens"]) == (
        "tiny",
        "drawn",
        1,
        NEW_TOKENS,
    )
    assert meta["weights"] == fingerprint(model)


def test_text_only_samples_and_samples_of_two_images_share_a_batch(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    text = Sample("t", [{"role": "user", "content": "2 + 2?"}], [], "drawn", "test", {"max_new_tokens": 4})
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]
    two = Sample(
        "two",
        [{"role": "user", "content": content}],
        [s.images[0] for s in samples[:2]],
        "drawn",
        "test",
        {"max_new_tokens": 4},
    )
    mixed = generate(model, ChatCollator(processor), [text, two], tmp_path / "mixed.jsonl")
    alone = generate(model, ChatCollator(processor), [text, two], tmp_path / "alone.jsonl", batch_size=1)
    assert mixed == alone


def test_a_broken_image_names_its_sample(model: Any, processor: Any, samples: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"drawn test s1, image 0: .*not a readable image"):
        generate(
            model,
            ChatCollator(processor),
            [replace(samples[1], images=[tmp_path / "broken.png"])],
            tmp_path / "p.jsonl",
        )
