"""Recipe cards: what a card may say is checked; what it says is done to every row; every card loads its real data end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from vlm_dft import ChatCollator
from vlm_dft.cards import list_cards
from vlm_dft.columns import columns_of, fill
from vlm_dft.errors import CardError, RowError
from vlm_dft.recipes import load_recipe, outcomes, read_recipe

Rows = list[dict[str, Any]]
BASE: dict[str, Any] = {"description": "d", "licence": "l", "source": {"files": ["rows.jsonl"]}}
OWN = {"prompt": "{q}", "response": "{a}"}


def card(folder: Path, given: Rows | None = None, /, **changes: Any) -> dict[str, Any]:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, given or [{"q": "q", "a": "a"}])))
    (folder / "card.yaml").write_text(yaml.safe_dump({**BASE, **changes}))
    return read_recipe(str(folder / "card.yaml"))


def load(folder: Path, rows: Rows, **changes: Any) -> Any:
    return load_recipe(card(folder, rows, **changes), str(folder))


def answers(examples: list[Any]) -> list[Any]:
    return [m["content"] for e in examples for m in e.messages if m["role"] == "assistant"]


def counts(found: Any) -> dict[str, int]:
    return {what: rows.rows for what, rows in found.items()}


def ids(found: Any) -> dict[str, list[str]]:
    return {what: rows.ids for what, rows in found.items()}


# What a card may say


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"respnse": "x"}, r"unknown key 'respnse'. Did you mean 'response'\? Known keys: answer, bad_rows"),
        ({"description": 5}, "description must be a text, found 5"),
        ({"source": ["a"]}, "source must be a mapping"),
        ({**OWN, "messages": None}, "either messages, or prompt and response. Found messages and prompt, response"),
        ({**OWN, "format": "messages"}, "give either format, or prompt and response"),
        ({"prompt": "{q}"}, "prompt and response go together. Found prompt without response"),
        ({"response": "{a}"}, "prompt and response go together. Found response without prompt"),
        ({**OWN, "image": "{i}.png", "images": "i"}, "give either image .* or images"),
        ({"options": "c"}, "options are appended to the card's prompt. Found options without prompt"),
        ({**OWN, "correct": {"column": "a", "by": "index"}}, "Found correct without options"),
        ({**OWN, "options": "c", "correct": {"column": "a", "by": "place"}}, "by must be one of index, letter, text, found 'place'"),
        ({**OWN, "options": "c", "correct": "a"}, r"correct must be \{column: ..., by: index"),
        ({**OWN, "answer": "{a}"}, "answer is what the ending states. Found answer without ending"),
        ({**OWN, "ending": "x", "answer": {"free": "{a}"}}, "expected both free .* and choice"),
        ({"format": "chat"}, "unknown format 'chat'.* Known: messages, conversations"),
        ({"objective": "dtf"}, r"unknown objective 'dtf'. Did you mean 'dft'\?"),
        ({"weight": 0}, "weight must be a finite number above 0, found 0"),
        ({"weight": True}, "weight must be a finite number above 0, found True"),
        ({"bad_rows": "skip"}, "bad_rows must be one of refuse, drop, found 'skip'"),
        ({"columns": "q"}, "columns must be a list of columns' names"),
        ({"rows": "many"}, "rows must be a whole number above zero"),
        ({"keep": {"q": {"mni": 1}}}, r"unknown key 'mni'. Did you mean 'min'\?"),
        ({"tags": {"think": "kepe"}}, r"Did you mean 'keep'\?"),
        ({"unroll": "yes"}, "unroll must be true or false"),
        ({"training": [1]}, "training must be a mapping"),
        ({**OWN, "prompt": "{q.x}"}, r"\{q.x\} in '\{q.x\}' is not a column"),
        ({**OWN, "prompt": "{q[0]}"}, "is not a column"),
        ({**OWN, "response": "{a!r}"}, r"\{a!r\} in .* is not a column.* no attributes, indices, conversions or formats"),
        ({**OWN, "response": "{a:>5}"}, r"\{a:>5\} in .* is not a column"),
        ({**OWN, "response": "{}"}, "is not a column"),
        ({**OWN, "ending": "{a"}, "not a template of"),
    ],
)  # fmt: skip
def test_what_a_card_cannot_say_is_refused_before_any_row_is_read(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CardError, match=message):
        card(tmp_path, **changes)


def test_a_template_is_columns_and_braces_written_twice() -> None:
    assert columns_of("{a} and {{b}} {knowledge points}", where="card") == ["a", "knowledge points"]
    row = {"a": 3, "knowledge points": ["one"], "n": 2.5}
    assert fill("\\boxed{{{a}}} {knowledge points} {n}", row, where="row") == "\\boxed{3} one 2.5"


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "is null"), (float("nan"), r"is null \(NaN\)"), (float("inf"), "is inf"), ([], "holds a list of 0"), (["a", "b"], "holds a list of 2"),
     ({"a": 1}, "holds a dict"), (b"x", "holds a bytes")],
)  # fmt: skip
def test_a_value_that_is_no_text_is_refused_with_a_reason_that_counts(value: Any, message: str) -> None:
    with pytest.raises(RowError, match=f"row 5: column 'a' {message}") as raised:
        fill("{a}", {"a": value}, where="row 5")
    assert raised.value.reason.startswith("column a ")


# What a card says is done


def test_an_ending_states_the_answer_once_and_says_how_often(tmp_path: Path) -> None:
    rows = [
        {"q": "q", "a": "So.", "g": 5},
        {"q": "q", "a": "So. The answer is 6.", "g": "6"},
        {"q": "q", "a": "The answer is 1.", "g": 7},
    ]
    examples, account = load(tmp_path, rows, **OWN, answer="{g}", ending="The answer is {answer}.")
    assert answers(examples) == ["So.\nThe answer is 5.", "So. The answer is 6.", "The answer is 1.\nThe answer is 7."]
    assert ids(account.changed) == {"ending appended": ["0"], "ending appended after another of its kind": ["2"]}
    with pytest.raises(RowError, match="row 0: the answer is empty"):
        load(tmp_path, [{"q": "q", "a": "So.", "answer": " "}], **OWN, ending="The answer is {answer}.")


@pytest.mark.parametrize(
    ("by", "gold", "said"),
    [
        ("index", 1, "(B) 9"),
        ("index", "1", "(B) 9"),
        ("letter", "B", "(B) 9"),
        ("text", "9", "(B) 9"),
        ("text", 9, "(B) 9"),
    ],
)
def test_the_right_option_is_told_by_its_place_its_letter_or_its_text(
    by: str, gold: Any, said: str, tmp_path: Path
) -> None:
    rows = [{"q": "q", "a": "So.", "g": gold, "c": ["1", 9]}, {"q": "q", "a": "So.", "g": "3", "c": None}]
    forms = {"free": "{g}", "choice": "({letter}) {choice}"}
    rules = {"options": "c", "correct": {"column": "g", "by": by}, "answer": forms, "ending": "The answer is {answer}."}
    examples, _ = load(tmp_path, rows, **OWN, **rules)
    assert answers(examples) == [f"So.\nThe answer is {said}.", "So.\nThe answer is 3."]
    assert examples[0].messages[0]["content"] == "q\nOptions: (A) 1 (B) 9"


@pytest.mark.parametrize(
    ("by", "gold", "options", "message"),
    [("index", 2, ["x", "y"], "'2' is none of 0, 1"), ("letter", "c", ["x", "y"], "'c' is none of A, B"),
     ("text", "z", ["x", "y"], "'z' is none of x, y"), ("text", "x", ["x", "x"], "'x' is 2 of x, x"), ("index", 0, ["x", None], "option B is None")],
)  # fmt: skip
def test_a_right_option_that_is_none_or_two_of_them_is_refused(
    by: str, gold: Any, options: list[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RowError, match=f"card row 0: .*{message}"):
        load(
            tmp_path,
            [{"q": "q", "a": "a", "g": gold, "c": options}],
            **OWN,
            options="c",
            correct={"column": "g", "by": by},
        )


def test_objective_and_weight_of_a_source_reach_every_trained_turn_unless_it_has_its_own(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False}, {"role": "user", "content": "r"},
             {"role": "assistant", "content": "b", "weight": 2}, {"role": "user", "content": "s"}, {"role": "assistant", "content": "c"}]  # fmt: skip
    [example], _ = load(tmp_path, [{"messages": turns}], objective="nll", weight=0.5)
    said = [(m.get("objective"), m.get("weight")) for m in example.messages if m["role"] == "assistant"]
    assert said == [(None, None), ("nll", 2), ("nll", 0.5)]


def test_a_declared_reasoning_tag_becomes_the_messages_reasoning(tmp_path: Path) -> None:
    rows = [{"q": "q", "a": "<think>b</think>c"}]
    examples, account = load(tmp_path, rows, **OWN, tags={"think": "reasoning"})
    assert examples[0].messages[1] == {"role": "assistant", "content": "c", "reasoning_content": "b"}
    assert counts(account.changed) == {"tag <think> made reasoning": 1}
    with pytest.raises(RowError, match="card row 0: undeclared tag <think>"):
        load(tmp_path, rows, **OWN)
    with pytest.raises(RowError, match="card row 0: the response is empty"):
        load(tmp_path, [{"q": "q", "a": "<think>b</think>"}], **OWN, tags={"think": "drop"})


def test_tags_and_endings_reach_the_text_parts_of_a_content_list(tmp_path: Path) -> None:
    content = [{"type": "text", "text": "<think>b</think>"}, {"type": "text", "text": "c"}]
    rows = [{"g": 4, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]}]
    [example], _ = load(tmp_path, rows, tags={"think": "strip"}, ending="The answer is {g}.")
    assert example.messages[1]["content"] == [
        {"type": "text", "text": "b"},
        {"type": "text", "text": "c\nThe answer is 4."},
    ]


def test_the_system_text_of_a_card_stands_first_and_a_rows_own_stays(tmp_path: Path) -> None:
    rows = [{"query": "q", "response": "a"}, {"query": "q", "response": "a", "system": "own"}]
    examples, account = load(tmp_path, rows, system="be brief")
    assert [e.messages[0] for e in examples] == [
        {"role": "system", "content": "be brief"},
        {"role": "system", "content": "own"},
    ]
    assert ids(account.changed) == {"the row's own system prompt kept": ["1"]}


def test_filtered_rows_are_dropped_for_their_reason_and_counted(tmp_path: Path) -> None:
    rows = [{"q": "q", "a": "a", "grade": grade} for grade in (2, 3, 5, 9)]
    examples, account = load(tmp_path, rows, **OWN, keep={"grade": {"min": 3, "max": 8}})
    assert [e.id for e in examples] == ["1", "2"] and account.read == 4
    assert ids(account.dropped) == {"filtered: grade is not 3 to 8": ["0", "3"]}
    with pytest.raises(RowError, match=r"none of its 4 rows is used: 4 filtered: grade is not at least 10"):
        load(tmp_path, rows, **OWN, keep={"grade": {"min": 10}})


def test_a_column_that_a_card_names_and_no_row_has_is_the_cards_error(tmp_path: Path) -> None:
    rows = [{"q": "q", "a": "a", "picture": None}]
    with pytest.raises(CardError, match=r"names a column 'pictures', which no row has. Did you mean 'picture'\?"):
        load(tmp_path, rows, **OWN, images="pictures")
    with pytest.raises(
        CardError, match=r"names a column 'grade', which no row has. Columns of the first row: q, a, picture"
    ):
        load(tmp_path, rows, **OWN, keep={"grade": {"empty": True}})
    with pytest.raises(
        CardError,
        match=r"relies on a column 'pictur', which nobody could verify, and row 0 has none. Did you mean 'picture'",
    ):
        load(tmp_path, rows, **OWN, columns=["q", "pictur"])
    assert len(load(tmp_path, rows, **OWN, columns=["q", "a", "picture"])[0]) == 1


# Bad rows


BAD: Rows = [
    {"q": "q", "a": "a"}, {"q": "q", "a": None}, {"q": "q", "a": " "}, {"q": "<image>q", "a": "a"}, {"q": "q", "a": "a", "i": ["x.png"]},
    {"q": "q", "a": ["a", "b"]}, {"q": "q", "a": "a", "i": ["ok.png", None]}, {"a": "a"}, {"q": "q", "a": 7}, {"q": "q", "a": None},
]  # fmt: skip


def test_every_bad_row_is_looked_at_and_refused_in_one_error_by_reason(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "ok.png")
    with pytest.raises(RowError) as raised:
        load(tmp_path, BAD, **OWN, images="i")
    first, second = str(raised.value).split("\n")
    assert first == "card row 1: column 'a' is null."
    assert second.startswith(
        "8 of 10 rows cannot be used: 2 column a is null (1, 9); 1 the response is empty (2); 1 markers and media"
    )
    assert "1 image missing (4)" in second and "1 image is null (6)" in second and "1 no column q (7)" in second
    assert "1 column a holds a list (5)" in second and second.endswith(
        "`bad_rows: drop` in a copy of the card, or --bad_rows drop."
    )


def test_bad_rows_are_dropped_by_reason_where_the_card_says_so(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "ok.png")
    examples, account = load(tmp_path, BAD, **OWN, images="i", bad_rows="drop")
    assert [e.id for e in examples] == ["0", "8"] and answers(examples) == ["a", "7"]
    assert account.read == 10 == len(examples) + sum(counts(account.dropped).values())
    assert account.dropped["column a is null"].ids == ["1", "9"]


def test_nulls_and_nan_of_a_table_are_said_and_a_null_picture_is_none(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"q": ["q"] * 3, "a": [1.5, None, float("nan")], "i": pa.array([None] * 3, pa.string())}),
        tmp_path / "t.parquet",
    )
    changes: dict[str, Any] = {**OWN, "source": {"files": ["t.parquet"]}, "images": "i"}
    found = list(outcomes(card(tmp_path, **changes), str(tmp_path)))
    assert [o.error and o.error.reason for o in found] == [None, "column a is null", "column a is null"]
    assert found[0].example is not None and found[0].example.images == []


def test_fifty_pictures_in_a_row_keep_their_places_and_one_too_few_is_said(tmp_path: Path, processor: Any) -> None:
    for k in range(50):
        Image.new("RGB", (28, 28), (5 * k, 0, 0)).save(tmp_path / f"{k}.png")
    row = {"q": " ".join(f"{k}<image>" for k in range(50)), "a": "a", "i": [f"{k}.png" for k in range(50)]}
    [example], _ = load(tmp_path, [row], **OWN, images="i")
    assert [Path(image).name for image in example.images] == row["i"]
    batch = ChatCollator(processor)([example])
    assert len(batch["image_grid_thw"]) == 50
    with pytest.raises(RowError, match="card row 0: 49 images but 50 places"):
        load(tmp_path, [{**row, "i": row["i"][1:]}], **OWN, images="i")


# Every card


LOADABLE = {  # card: (data folder, rows read, dropped, changed, what the first row is answered)
    "tabmwp": ("tabmwp", 850, {}, {"ending appended": 850}, "\nThe answer is (B) nonlinear."),
    "sharegpt_demo": ("sharegpt_demo", 6, {}, {}, "They're Kane and Gretzka from Bayern Munich."),
    "sharegpt_video_demo": ("sharegpt_demo", 3, {}, {}, "Because a baby is reading, and he is so cute!"),
    "qwen_vl_demo": ("qwen_vl_finetune_demo", 3, {}, {}, "Yes"),
    "qwen_messages_demo": ("qwen_messages_demo", 1, {}, {}, "整体画面充满了快乐和放松的感觉。"),
    "scienceqa_llava": ("scienceqa_llava", 130, {}, {}, "D"),
    "puzzlevqa": ("puzzlevqa", 105, {}, {"ending appended": 105}, "\nThe answer is (D) green."),
    "logicvista": ("logicvista", 55, {"filtered: reasoning is under 15 characters": 5},
                   {"ending appended": 48, "ending appended after another of its kind": 2}, "\nThe answer is B, D."),
    "mvmath": ("mvmath", 2, {}, {"ending appended": 2, "<image_N> in the response kept as text": 2},
               "\nThe answer is $\\frac{\\sqrt{3}}{2^{n-1}}$."),
    "geometry3k": ("hub_parquet/hiyouga--geometry3k", 6, {}, {}, "The answer is 80."),
    "geometry3k_folders": ("geometry3k", 6, {}, {}, "The answer is (D) 80."),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADABLE)
def test_a_card_loads_its_real_data_into_proven_batches(name: str, shared: Path, processor: Any) -> None:
    folder, read, dropped, changed, first = LOADABLE[name]
    if name == "sharegpt_video_demo":
        pytest.importorskip("av")
    examples, account = load_recipe(read_recipe(name), str(shared / folder))
    assert account.read == read == len(examples) + sum(counts(account.dropped).values())
    assert counts(account.dropped) == dropped and counts(account.changed) == changed
    collator, tokenizer = ChatCollator(processor), processor.tokenizer
    some = examples[:: max(1, len(examples) // 24)]
    for example in some:
        batch = collator([example])  # raises where the mask cannot be proved
        taught = tokenizer.decode(batch["labels"][batch["labels"] != -100])
        texts = [
            m["content"] if isinstance(m["content"], str) else m["content"][0]["text"]
            for m in example.messages
            if m["role"] == "assistant"
        ]
        assert taught == "".join(f"{text}<|im_end|>" for text in texts)
        pixels = batch.get("image_grid_thw", [])
        assert len(pixels) == len(example.images)
    answered = answers(examples[:1])[0]
    assert (answered if isinstance(answered, str) else answered[0]["text"]).endswith(first)


def test_one_composite_picture_for_numbered_markers_is_used_and_said(shared: Path) -> None:
    found = {
        "name": "mathvision",
        "source": {"files": ["data/testmini.jsonl"]},
        "image": "{image}",
        "prompt": "{question}",
        "response": "{answer}",
    }
    rows = [json.loads(line) for line in (shared / "mathvision/data/testmini.jsonl").read_text().splitlines()]
    many = [row["id"] for row in rows if "<image2>" in row["question"]]
    examples, account = load_recipe(found, str(shared / "mathvision"))
    assert len(examples) == len(rows) and many
    assert ids(account.changed) == {"numbered image markers kept as text, the one image first": many}
    for example, row in zip(examples, rows, strict=True):
        parts = example.messages[0]["content"]
        assert [p["type"] for p in parts].count("image") == len(example.images) >= 1
        if row["id"] in many:
            assert parts == [{"type": "image"}, {"type": "text", "text": row["question"]}]


@pytest.mark.parametrize(
    ("folder", "answer", "rows"),
    [
        ("AI4Math--MathVista", "{answer}", 24),
        ("MathLLMs--MathVision", "{answer}", 24),
        ("DynaMath--DynaMath_Sample", "{ground_truth}", 16),
    ],
)
def test_tables_of_the_hub_give_their_embedded_pictures(
    folder: str, answer: str, rows: int, shared: Path, processor: Any
) -> None:
    found = {
        "name": "hub",
        "source": {"files": ["data/*.parquet"]},
        "images": "decoded_image",
        "prompt": "{question}",
        "response": answer,
    }
    examples, account = load_recipe(found, str(shared / "hub_parquet" / folder))
    assert len(examples) == account.read == rows and all(len(e.images) >= 1 for e in examples)
    assert len(ChatCollator(processor)(examples[:2])["image_grid_thw"]) == sum(len(e.images) for e in examples[:2])


def test_the_formats_of_hub_sets_are_read_as_their_cards_say(tmp_path: Path) -> None:
    """Constructed rows in the columns that the cards name; the sets themselves are on the hub."""
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    for folder in ("images", "data_images", "annotations"):
        (tmp_path / folder).mkdir()
    for folder in ("images", "data_images"):
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "1.png")
    talk = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    cot = "<SUMMARY>a</SUMMARY><CAPTION>b</CAPTION><REASONING>c</REASONING><CONCLUSION>d</CONCLUSION>"
    rows: dict[str, tuple[dict[str, Any], str]] = {
        "wethink": ({"problem": "q", "refined_cot": "c", "image_path": "1.png", "answer": "a", "category": "x"}, "c"),
        "mathv360k": ({"image": "1.png", "conversations": talk}, "a"),
        "geo170k": ({"image": "1.png", "conversations": talk}, "a"),
        "scienceqa": ({"image": None, "question": "q", "choices": ["x", "y"], "answer": 1, "hint": "", "solution": "s"},
                      "s\nThe answer is (B) y."),
        "chartqa": ({"image": "1.png", "query": "q", "label": ["14"], "human_or_machine": 0}, "14"),
        "clevr_counting": ({"image": "1.png", "problem": "q", "solution": "<answer> 3 </answer>"}, "3"),
        "geoqa_r1v": ({"image": "1.png", "problem": "q", "solution": "<answer> 145° </answer>"}, "145°"),
        "llava_cot_100k": ({"id": "1", "image": "1.png", "conversations": [talk[0], {"from": "gpt", "value": cot}]}, cot),
        "r1_onevision": ({"id": "1", "image": "1.png", "conversations": [talk[0], {"from": "gpt", "value": "<think>b</think>c"}]},
                         "<think>b</think>c"),
        "mm_eureka": ({"id": "1", "message": json.dumps([{"role": "user", "content": "q"}]), "answer": "4"}, "4"),
        "mmk12": ({"id": "1", "question": "<image>q", "answer": "4", "subject": "maths", "image": "1.png"}, "4"),
        "virl39k": ({"question": "<image>q<image>", "answer": "\\boxed{4}", "image": ["1.png", "1.png"], "qid": "1"}, "\\boxed{4}"),
        "mmpr": ({"image": "1.png", "question": "<image>\nq", "chosen": "a", "rejected": "b"}, "a"),
        "gsm8k": ({"question": "q", "answer": "a #### 18"}, "a #### 18"),
        "numinamath_cot": ({"source": "x", "problem": "q", "solution": "s", "messages": []}, "s"),
        "finevision_geometry": ({"images": ["1.png"], "texts": [{"user": "q", "assistant": "a"}], "source": "x"}, "a"),
    }  # fmt: skip
    drawn = {"drawn", "drawn_new", "drawn_noisy", "drawn_mixture", "visual_math_mixture"}  # tests of their own
    assert {*rows, *LOADABLE, *drawn} == set(list_cards("recipe")), "a card without a test"
    for name, (row, answer) in rows.items():
        where = tmp_path / ("annotations" if name == "mmpr" else "") / "rows.jsonl"
        where.write_text(json.dumps(row))
        examples, account = load_recipe(
            {**read_recipe(name), "source": {"files": [str(where.relative_to(tmp_path))]}}, str(tmp_path)
        )
        assert answers(examples) == [answer], name
        assert account.read == len(examples) == 1
        named = row.get("image", row.get("images", row.get("image_path")))
        assert len(examples[0].images) == (len(named) if isinstance(named, list) else int(named is not None)), name
        where.unlink()


def test_a_card_says_so_where_a_column_that_nobody_verified_is_named_otherwise(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "1.png", "problem": "q", "answer": "3"}))
    found = {**read_recipe("clevr_counting"), "source": {"files": ["rows.jsonl"]}}
    with pytest.raises(
        CardError,
        match=r"relies on a column 'solution', which nobody could verify.*Columns found: image, problem, answer",
    ):
        load_recipe(found, str(tmp_path))


# What real rows do


def test_a_question_of_blanks_is_empty(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="card row 0, turn 0: the question is empty"):
        load(tmp_path, [{"q": " \n", "a": "a"}], **OWN)


def test_rows_that_lack_a_column_to_filter_by_are_bad_rows_and_one_that_all_lack_is_the_cards_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: Rows = [{"q": "q", "a": "a", "grade": 3}, {"q": "q", "a": "a"}]
    examples, account = load(tmp_path, rows, **OWN, keep={"grade": 3}, bad_rows="drop")
    assert len(examples) == 1 and ids(account.dropped) == {"no column grade to filter by": ["1"]}
    monkeypatch.setattr("vlm_dft.recipes.SOON", 2)
    with pytest.raises(
        CardError, match="names a column 'garde', which none of the first 2 rows has. Did you mean 'grade'"
    ):
        load(tmp_path, rows * 2, **OWN, keep={"garde": 3}, bad_rows="drop")


def test_lists_in_a_table_of_text_are_read_from_their_json(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    row = {"q": "q", "a": "B", "i": '["a.png", "b.png"]', "c": '["yes", "no"]'}
    ((example,), _) = load(
        tmp_path, [row], **OWN, images="i", options="c", correct={"column": "a", "by": "letter"}, ending="{choice}"
    )
    assert [path.name for path in example.images] == ["a.png", "b.png"]
    assert example.messages[0]["content"][-1]["text"] == "q\nOptions: (A) yes (B) no"
    assert answers([example]) == ["B\nno"]


def test_two_columns_of_different_pictures_are_refused_and_of_the_same_are_one(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    row = {"question": "q", "answer": "a", "images": ["a.png"], "image": "b.png"}
    with pytest.raises(RowError, match="columns images, image hold different images. Say in a card .* images: images"):
        load(tmp_path, [row])
    assert len(load(tmp_path, [row], images="image")[0][0].images) == 1
    assert len(load(tmp_path, [{**row, "image": "a.png"}])[0][0].images) == 1


def test_markers_in_text_parts_hold_places_as_those_in_a_string(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    parts = [{"type": "text", "text": "Look at <image>"}, {"type": "text", "text": ", how many?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "2"}], "images": ["a.png"]}
    ((example,), _) = load(tmp_path, [row])
    assert example.messages[0]["content"] == [
        {"type": "text", "text": "Look at "}, {"type": "image"}, {"type": "text", "text": ", how many?"}
    ]  # fmt: skip
    with pytest.raises(RowError, match="1 <image> markers but no images"):
        load(tmp_path, [{**row, "images": []}])


def test_a_conversation_as_json_text_may_be_called_by_what_it_holds(tmp_path: Path) -> None:
    text = json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])
    assert answers(load(tmp_path, [{"conversations": text}], format="conversations")[0]) == ["a"]
    with pytest.raises(RowError, match="the card says format: messages"):
        load(tmp_path, [{"conversations": text}], format="messages")


def test_an_index_in_a_column_of_floats_is_whole(tmp_path: Path) -> None:
    """As tables hold whole numbers beside nulls."""
    rows: Rows = [{"q": "q", "a": 1.0, "c": ["x", "y"]}, {"q": "q", "a": 0.5, "c": ["x", "y"]}]
    said = {"prompt": "{q}", "response": "{letter}", "options": "c", "correct": {"column": "a", "by": "index"}}
    assert answers(load(tmp_path, rows[:1], **said)[0]) == ["B"]
    with pytest.raises(RowError, match="'0.5' is none of 0, 1"):
        load(tmp_path, rows, **said)


def test_a_row_without_options_says_so_where_the_card_names_the_right_one(tmp_path: Path) -> None:
    said = {**OWN, "options": "c", "correct": {"column": "a", "by": "letter"}, "ending": "The answer is ({letter})."}
    with pytest.raises(
        RowError, match=r"no options in column 'c', and the card's ending names \{letter\}. Leave such rows out"
    ):
        load(tmp_path, [{"q": "q", "a": "B", "c": None}], **said)


@pytest.mark.parametrize("word", ["<IMAGE>", "<|image_1|>", "[image]", "<image/>", "<Image 1>"])
def test_words_that_look_like_a_marker_are_kept_and_said(word: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows: Rows = [
        {"q": f"{word} how many?", "a": "a", "i": "a.png"},
        {"q": "x < image > y [1]", "a": "<IMAGE>", "i": "a.png"},
    ]
    _, account = load(tmp_path, rows, **OWN, images="i")
    assert ids(account.changed) == {"words that look like a marker of a picture kept as text": ["0"]}


def test_a_picture_in_another_column_than_the_cards_is_not_left_out_in_silence(tmp_path: Path) -> None:
    """As in a webdataset of .png and .jpg members."""
    import io
    import tarfile

    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for name, content in (
            ("1.json", b'{"q": "q", "a": "a"}'),
            ("1.jpg", b"x"),
            ("2.json", b'{"q": "q", "a": "a"}'),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    said = card(tmp_path, **{**OWN, "source": {"files": ["x.tar"]}, "images": "png"})
    first, second = outcomes(said, str(tmp_path), limit=2)
    assert first.error is not None and "no column 'png' of images, but a file in 'jpg'" in str(first.error)
    assert second.example is not None  # of text alone
    unsaid = {**OWN, "source": {"files": ["x.tar"]}}
    first = next(outcomes(card(tmp_path, **unsaid), str(tmp_path)))
    assert first.error is not None and "column 'jpg' holds a picture that nothing uses. Say `images: jpg`" in str(
        first.error
    )
    assert next(outcomes(card(tmp_path, **unsaid, images=None), str(tmp_path))).example is not None


@pytest.mark.parametrize("last", ["The answer is 6.", "so the answer is **5**.", "The answer is $5$."])
def test_an_ending_in_another_dress_is_stated_again_and_said(last: str, tmp_path: Path) -> None:
    """It might be another answer, and is not what the benchmark extracts."""
    said = {"prompt": "{q}", "response": "{a}", "ending": "The answer is {n}."}
    examples, account = load(tmp_path, [{"q": "q", "n": 5, "a": f"Two and three. {last}"}], **said)
    assert answers(examples) == [f"Two and three. {last}\nThe answer is 5."]
    assert counts(account.changed) == {"ending appended after another of its kind": 1}


@pytest.mark.parametrize("twice", ['prompt: "{a}"', "keep: {q: x, q: y}"])
def test_a_key_that_stands_twice_in_a_card_is_refused_with_its_line(twice: str, tmp_path: Path) -> None:
    (tmp_path / "card.yaml").write_text(f'{yaml.safe_dump(BASE)}prompt: "{{q}}"\nresponse: "{{a}}"\n{twice}\n')
    with pytest.raises(CardError, match=r"card.yaml, line 8: the key '(prompt|q)' is there twice"):
        read_recipe(str(tmp_path / "card.yaml"))
