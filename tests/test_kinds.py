"""Kinds of response tokens: what each target is, from its text, in any tokenizer, at its place in padded and packed rows."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processors import build_processor
from tokenizers import AddedToken

from vlm_dft import OBJECTIVES, ChatCollator
from vlm_dft.kinds import FORMAT_STRINGS, KINDS, TokenKinds, final_answer, kind_bits

COUNTS = "green 4, red 3. red 3. Answer: 3"
RED = Image.new("RGB", (112, 56), "red")
FAMILIES = [
    "llava",
    "llava_next",
    "gemma3",
    "aria",
    "qwen3_vl",
    "mllama",
    "pixtral",
    "smolvlm",
]  # the first four write ▁


@pytest.fixture(params=["embedded", *FAMILIES])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """A tokenizer of each make: byte-level BPE with one, two or three digits a token, SentencePiece with and without ▁ in front."""
    return (
        request.getfixturevalue("processor").tokenizer
        if request.param == "embedded"
        else build_processor(request.param).tokenizer
    )


def turn(role: str, text: str, **extra: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}], **extra}


def kinds_of(kind: str, ids: Any, bits: Any, tokenizer: Any) -> str:
    """The text of the tokens of one kind."""
    return str(
        tokenizer.decode([i for i, b in zip(ids, bits, strict=True) if b & KINDS[kind]], skip_special_tokens=False)
    )


# --- one response ----------------------------------------------------------------------------------------------------


RESPONSES = [  # pieces of a text, each with the kinds of its tokens: d(igit), f(ormat), a(nswer)
    [("green ", ""), ("4", "d"), (", red ", ""), ("3", "d"), (". red ", ""), ("3", "d"), (". ", ""), ("Answer:", "f"),
     (" ", ""), ("3", "da")],
    [("<answer>", "f"), ("12", "da"), ("</answer>", "f")],
    [("<answer>", "f"), ("1", "d"), ("</answer>", "f"), (" no: ", ""), ("<answer>", "f"), ("20", "da"), ("</answer>", "f")],
    [("so ", ""), ("\\boxed", "f"), ("{", ""), ("\\frac{", "a"), ("1", "da"), ("}{", "a"), ("2", "da"), ("}", "a"), ("}", "")],
    [("first ", ""), ("\\boxed", "f"), ("{", ""), ("1", "d"), ("}, then ", ""), ("\\boxed", "f"), ("{", ""), ("25", "da"),
     ("}.", "")],
    [("The ", ""), ("answer is", "f"), (" ", ""), ("17", "da"), (".", "")],
    [("The final ANSWER is ", ""), ("(B) red", "a"), (".", "")],
    [("<think>", "f"), ("3", "d"), (" apples", ""), ("</think>", "f"), (" ", ""), ("Answer:", "f"), (" ", ""),
     ("two\nplums", "a")],
    [("Answer:", "f"), (" no ", ""), ("<answer>", "f"), ("7", "da"), ("</answer>", "f")],
    [("Nothing to see.", "")],
]  # fmt: skip


@pytest.mark.parametrize("pieces", RESPONSES, ids=["".join(text for text, _ in pieces) for pieces in RESPONSES])
def test_tokens_are_of_a_kind_where_they_hold_its_characters(pieces: list[tuple[str, str]], tokenizer: Any) -> None:
    text, marks = "".join(text for text, _ in pieces), [kinds for text, kinds in pieces for _ in text]
    given = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = given["input_ids"], given["offset_mapping"]
    found = TokenKinds(tokenizer)(np.array([*ids, tokenizer.eos_token_id])).tolist()
    assert found.pop() == KINDS["end"]
    for k, ((start, stop), token) in enumerate(zip(spans, tokenizer.convert_ids_to_tokens(ids), strict=True)):
        held = "".join(marks[start:stop])
        if token == "▁" and text[start] != " ":  # a blank put in front of the text, which holds no character of it
            held = ""
        expected = sum(KINDS[kind] for kind in ("digit", "format", "answer") if kind[0] in held)
        assert found[k] == expected + (KINDS["first"] if k == 0 else 0), token


def test_the_embedded_models_counts_have_these_kinds(processor: Any) -> None:
    tokenizer = processor.tokenizer
    ids = [*tokenizer(COUNTS, add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")]
    bits = TokenKinds(tokenizer)(np.array(ids)).tolist()
    found = {kind: kinds_of(kind, ids, bits, tokenizer) for kind in KINDS}
    assert found == {"first": "green", "digit": "4333", "format": " Answer:", "answer": "3", "end": "<|im_end|>"}
    assert bits[-2] == 2 + 8 and bits[-1] == 16 and bits[0] == 1


def test_the_leading_blank_of_a_sentencepiece_token_counts_as_a_character() -> None:
    """Its decoder drops it: without it, all characters after it would be counted one too far to the left."""
    tokenizer = build_processor("llava").tokenizer
    ids = tokenizer("the red one is the answer is 4", add_special_tokens=False)["input_ids"]
    assert sum(piece.startswith("▁") for piece in tokenizer.convert_ids_to_tokens(ids)) == 8
    bits = TokenKinds(tokenizer)(np.array(ids)).tolist()
    assert [kinds_of(kind, ids, bits, tokenizer) for kind in ("format", "answer")] == ["answer is", "4"]


def test_letters_of_several_bytes_do_not_shift_the_kinds(tokenizer: Any) -> None:
    ids = tokenizer("Café 北京 → ½ 🙂 Answer: 5.", add_special_tokens=False)["input_ids"]
    bits = TokenKinds(tokenizer)(np.array(ids))
    texts = tokenizer.convert_ids_to_tokens(ids)
    answer = [text.strip("▁Ġ") for text, b in zip(texts, bits, strict=True) if b & KINDS["answer"]]
    assert answer == ["5"] and kinds_of("format", ids, bits, tokenizer).strip() == "Answer:"


def test_a_response_that_was_cut_has_no_end_and_an_open_answer_runs_to_where_it_stops(processor: Any) -> None:
    tokenizer = processor.tokenizer
    ids = tokenizer("<answer>4 red", add_special_tokens=False)["input_ids"]
    bits = TokenKinds(tokenizer)(np.array(ids))
    assert not (bits & KINDS["end"]).any() and kinds_of("answer", ids, bits, tokenizer) == "4 red"


def test_a_response_of_an_end_alone_is_first_and_end_and_none_at_all_has_no_kinds(processor: Any) -> None:
    kinds = TokenKinds(processor.tokenizer)
    assert kinds(np.array([processor.tokenizer.eos_token_id])).tolist() == [1 + 16]
    assert kinds(np.array([], np.int64)).tolist() == []


def test_a_special_token_ends_a_turn_even_if_the_tokenizer_has_no_name_for_it_and_another_added_one_does_not() -> None:
    tokenizer = copy.deepcopy(build_processor("qwen3_vl").tokenizer)
    tokenizer.add_tokens([AddedToken("<|stop|>", special=True), AddedToken("</part>", special=False)])
    for text, ended in (
        ("a<|stop|>", True),
        ("a<|im_end|>", True),
        ("a</part>", False),
        ("a</think>", False),
        ("a", False),
    ):
        bits = TokenKinds(tokenizer)(np.array(tokenizer(text)["input_ids"]))
        assert bool(bits[-1] & KINDS["end"]) == ended, text


def test_format_strings_of_ones_own_replace_the_usual_ones_and_are_taken_literally(processor: Any) -> None:
    tokenizer = processor.tokenizer
    ids = tokenizer("a.b Answer: [x] aXb", add_special_tokens=False)["input_ids"]
    for strings, expected in ((["[x]"], "[x]"), (["a.b"], "a.b"), ([], ""), (["Answer", "[x]"], "Answer[x]")):
        bits = TokenKinds(tokenizer, strings)(np.array(ids))
        assert kinds_of("format", ids, bits, tokenizer).replace(" ", "") == expected


def test_the_same_tokens_have_the_same_kinds_again(processor: Any) -> None:
    kinds, ids = TokenKinds(processor.tokenizer), np.array(processor.tokenizer(COUNTS)["input_ids"])
    assert kinds(ids).tolist() == kinds(ids).tolist() == TokenKinds(processor.tokenizer)(ids).tolist()


def test_bits_and_names_belong_together() -> None:
    assert KINDS == {"first": 1, "digit": 2, "format": 4, "answer": 8, "end": 16}
    assert "Answer:" in FORMAT_STRINGS and "\\boxed" in FORMAT_STRINGS
    assert kind_bits([]) == 0 and kind_bits(["first", "end"]) == 17 and kind_bits(["end", "digit", "end"]) == 18
    with pytest.raises(ValueError, match="Unknown kind of tokens 'ends'. Known: first, digit, format, answer, end."):
        kind_bits(["first", "ends"])


# --- in a batch ------------------------------------------------------------------------------------------------------


ROWS = [
    {"messages": [turn("user", "How many?"), turn("assistant", COUNTS)], "source": "count"},
    {
        "messages": [
            turn("user", "a"), turn("assistant", "one 1"), turn("user", "b"), turn("assistant", "not 2", train=False),
            turn("user", "c"), turn("assistant", "The answer is red."),
        ],
        "source": "talk",
    },
    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}, turn("assistant", "Red.")],
     "images": [RED], "source": "other"},
]  # fmt: skip


def tagged(processor: Any, batch: Any) -> list[tuple[str, dict[str, str]]]:
    """Of each row: the text of its targets, and that of each kind; that nothing else is tagged is checked on the way."""
    labels, kinds, sources = batch["labels"], batch["token_kinds"], batch["source_ids"]
    assert labels.shape == kinds.shape == sources.shape and kinds.dtype == sources.dtype == torch.int64
    assert not kinds[labels == -100].any() and bool((sources[labels == -100] == -1).all())
    found = []
    for row, bits in zip(labels, kinds, strict=True):
        ids, own = row[row != -100].tolist(), bits[row != -100].tolist()
        names = {kind: kinds_of(kind, ids, own, processor.tokenizer) for kind in KINDS}
        found.append((processor.tokenizer.decode(ids), names))
    return found


def begins(mask: Any) -> Any:
    """Of the targets in a row's mask: whether each begins a run of them."""
    return mask.int().diff(prepend=torch.zeros(1, dtype=torch.int32))[mask] == 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_tags_its_targets_alone_under_either_padding(processor: Any, side: Any) -> None:
    batch = ChatCollator(processor, padding_side=side, tag_sources=["talk", "count"])(ROWS)
    shortest = batch["attention_mask"][2]
    assert shortest[[0, -1]].tolist() == ([1, 0] if side == "right" else [0, 1])
    texts, kinds = zip(*tagged(processor, batch), strict=True)
    end = "<|im_end|>"
    assert texts == (f"{COUNTS}{end}", f"one 1{end}The answer is red.{end}", f"Red.{end}")
    assert [names["digit"] for names in kinds] == ["4333", "1", ""]
    assert [names["format"] for names in kinds] == [" Answer:", " answer is", ""]
    assert [names["answer"] for names in kinds] == ["3", " red", ""]
    assert [names["end"] for names in kinds] == [end, end + end, end]
    for k, index in enumerate((1, 0, -1)):  # place in tag_sources; a source not named there is -1
        mask = batch["labels"][k] != -100
        assert bool((batch["source_ids"][k][mask] == index).all()) and int(mask.sum()) > 1
        assert torch.equal((batch["token_kinds"][k][mask] & KINDS["first"]) != 0, begins(mask))


def test_padding_and_packing_move_the_tags_with_their_tokens(processor: Any) -> None:
    alone = [ChatCollator(processor, tag_sources=["talk", "count", "other"])([row]) for row in ROWS]
    for side in ("left", "right"):
        batch = ChatCollator(processor, padding_side=side, tag_sources=["talk", "count", "other"])(ROWS)  # type: ignore[arg-type]
        for k, one in enumerate(alone):
            kept = batch["attention_mask"][k].bool()
            for key in ("input_ids", "labels", "token_kinds", "source_ids"):
                assert torch.equal(batch[key][k][kept], one[key][0]), key
    packed = ChatCollator(processor, packing=True, tag_sources=["talk", "count", "other"])(ROWS)
    for key in ("input_ids", "labels", "token_kinds", "source_ids"):
        assert torch.equal(packed[key], torch.cat([one[key] for one in alone], 1)), key


def test_tags_come_only_where_they_are_asked_for_and_change_nothing_else(processor: Any) -> None:
    plain, with_tags = (ChatCollator(processor, tag_sources=names)(ROWS) for names in (None, []))
    assert set(with_tags) - set(plain) == {"token_kinds", "source_ids"}
    assert all(torch.equal(plain[key], with_tags[key]) for key in plain)
    assert bool((with_tags["source_ids"] == -1).all()) and with_tags["token_kinds"].any()


def test_an_answer_that_was_shortened_has_no_end_and_keeps_its_kinds(processor: Any) -> None:
    whole = ChatCollator(processor, tag_sources=["count"])(ROWS[:1])
    length = int(whole["attention_mask"].sum())
    cut = ChatCollator(processor, max_length=length - 4, too_long="shorten_answer", tag_sources=["count"])(ROWS[:1])
    ((text, names),) = tagged(processor, cut)
    assert COUNTS.startswith(text) and names["end"] == "" and names["digit"] == "433"
    assert cut["labels"].shape[1] == length - 4


def test_format_strings_of_ones_own_reach_the_batch(processor: Any) -> None:
    batch = ChatCollator(processor, tag_sources=[], format_strings=["red 3."])(ROWS[:1])
    ((_, names),) = tagged(processor, batch)
    assert names["format"] == " red 3. red 3."


@pytest.mark.parametrize(
    "family", ["llava_next", "gemma3", "qwen3_vl", "mllama", "glm4v", "idefics3", "internvl", "llama4"]
)
def test_every_turn_of_every_family_begins_with_a_first_and_ends_with_an_end(family: str) -> None:
    processor = build_processor(family)
    batch = ChatCollator(processor, tag_sources=["talk"])(ROWS[1:2])
    mask = batch["labels"][0] != -100
    bits = batch["token_kinds"][0][mask]
    edges = begins(mask)
    assert int(edges.sum()) == 2
    assert torch.equal((bits & KINDS["first"]) != 0, edges)
    assert torch.equal((bits & KINDS["end"]) != 0, edges.roll(-1))
    ids = batch["labels"][0][mask].tolist()
    assert kinds_of("digit", ids, bits.tolist(), processor.tokenizer).strip() == "1"
    assert kinds_of("answer", ids, bits.tolist(), processor.tokenizer).strip() == "red"
    assert kinds_of("format", ids, bits.tolist(), processor.tokenizer).strip() == "answer is"


# --- an objective per source -----------------------------------------------------------------------------------------


def own_objectives(batch: Any) -> list[set[int]]:
    """The ids of each row's targets; elsewhere -1, which is checked."""
    ids = batch["objective_ids"]
    assert bool((ids[batch["labels"] == -100] == -1).all()) and ids.shape == batch["labels"].shape
    return [set(row[labels != -100].tolist()) for row, labels in zip(ids, batch["labels"], strict=True)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_sources_objective_is_that_of_its_turns_that_set_none(processor: Any, side: Any) -> None:
    names = sorted(OBJECTIVES)
    assert names.index("nll") == 7 and names.index("eaft") == 3 and names.index("mix") == 6
    own = {"messages": [turn("user", "q"), turn("assistant", "one"), turn("user", "r"), turn("assistant", "two", objective="eaft")],
           "source": "talk"}  # fmt: skip
    collator = ChatCollator(
        processor, padding_side=side, source_objectives={"count": "nll", "talk": "mix", "absent": "dft"}
    )
    batch = collator([*ROWS, own])
    assert own_objectives(batch) == [{7}, {6}, {-1}, {6, 3}]
    last = batch["objective_ids"][3][batch["labels"][3] != -100].tolist()
    assert last == sorted(last, reverse=True) and batch["labels"][3][batch["objective_ids"][3] == 3].tolist() == [
        *processor.tokenizer("two")["input_ids"], processor.tokenizer.eos_token_id
    ]  # fmt: skip


def test_a_batch_of_sources_without_an_objective_carries_none(processor: Any) -> None:
    collator = ChatCollator(processor, source_objectives={"count": "nll"})
    assert "objective_ids" not in collator(ROWS[1:]) and "objective_ids" in collator(ROWS)
    assert "objective_ids" not in ChatCollator(processor)(ROWS)


def test_packed_rows_keep_their_sources_objectives(processor: Any) -> None:
    packed = ChatCollator(processor, packing=True, source_objectives={"talk": "floor"})(ROWS)
    alone = [ChatCollator(processor, source_objectives={"talk": "floor"})([row]) for row in ROWS]
    ids = [one.get("objective_ids", torch.full_like(one["labels"], -1)) for one in alone]
    assert torch.equal(packed["objective_ids"], torch.cat(ids, 1)) and 4 in packed["objective_ids"]


def test_an_unknown_objective_of_a_source_is_refused_with_the_nearest(processor: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"source_objectives: source 'ocr' has the unknown objective 'nnl'. Did you mean 'nll'\? Known: nll, dft",
    ):
        ChatCollator(processor, source_objectives={"ocr": "nnl"})


def test_the_loss_weighs_each_source_by_its_own_objective(processor: Any, model: Any) -> None:
    from vlm_dft.loss_head import attach_loss

    model = attach_loss(model)
    batch = ChatCollator(processor, source_objectives={"count": "nll"})(ROWS[:2])
    with torch.no_grad():
        mixed = model(**batch, objective="dft")
        apart = [
            model(**ChatCollator(processor)([row]), objective=name)
            for row, name in zip(ROWS[:2], ("nll", "dft"), strict=True)
        ]
    counts = [len(one["log_p"]) for one in apart]
    expected = sum(one["loss"].item() * n for one, n in zip(apart, counts, strict=True)) / sum(counts)
    assert mixed["loss"].item() == pytest.approx(expected, rel=1e-4)
    assert bool((mixed["weight"][: counts[0]] == 1).all()) and bool((mixed["weight"][counts[0] :] < 1).all())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 17.\nAnswer: 18", "18"),
        ("I will answer step by step. 3 + 4 = 7. Answer: 7", "7"),
        ("answers vary: 3", None),
        ("Answer:", None),
        ("Answer: .", None),
        ("The answer is: 3.5.", "3.5"),
        ("\\boxed{1} or \\boxed{\\frac{\\sqrt{2}}{2}}.", "\\frac{\\sqrt{2}}{2}"),
        ("\\boxed{12", None),
        ("<answer>4</answer> then <answer>5", "5"),
    ],
)
def test_the_last_statement_of_the_answer_counts(text: str, answer: str | None) -> None:
    found = final_answer(text)
    assert (None if found is None else text[slice(*found)]) == answer


def test_a_turn_that_ends_with_two_special_tokens_ends_with_both() -> None:
    tokenizer = build_processor("cohere2_vision").tokenizer
    ids = [*tokenizer("Answer: 3.", add_special_tokens=False)["input_ids"], *tokenizer.convert_tokens_to_ids(
        ["<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"])]  # fmt: skip
    bits = TokenKinds(tokenizer)(np.array(ids)).tolist()
    assert bits[-2:] == [16, 16] and kinds_of("answer", ids, bits, tokenizer).strip() == "3"


def test_format_strings_of_any_script_are_found(tokenizer: Any) -> None:
    ids = tokenizer("好。答案：3", add_special_tokens=False)["input_ids"]
    bits = TokenKinds(tokenizer, ["答案："])(np.array(ids)).tolist()
    unknown = tokenizer.unk_token_id
    if unknown in ids:
        pytest.skip("this small tokenizer has no such letters")
    assert "答案：" in kinds_of("format", ids, bits, tokenizer) and "3" not in kinds_of("format", ids, bits, tokenizer)
