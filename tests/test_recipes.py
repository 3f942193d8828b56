"""Recipes and rows: cards found and checked, rows of every accepted form turned into examples, bad ones named."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from vlm_dft.cards import list_cards, read_card
from vlm_dft.errors import CardError, RowError, UserError
from vlm_dft.media import image_size
from vlm_dft.recipes import load_recipe, read_recipe
from vlm_dft.rows import read_rows
from vlm_dft.scoring import score_response


def write_card(folder: Path, **changes: Any) -> str:
    card = {
        "description": "d", "licence": "l", "source": {"files": "rows.json"}, "prompt": "{q}", "response": "{a}", **changes
    }  # fmt: skip
    path = folder / "card.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in card.items() if v is not None}))
    return str(path)


def load(folder: Path, rows: Any, **changes: Any) -> list[Any]:
    (folder / "rows.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return load_recipe(read_recipe(write_card(folder, **changes)), str(folder))[0]


def test_every_shipped_recipe_is_whole() -> None:
    names = list_cards("recipe")
    assert {"drawn", "drawn_noisy", "drawn_new", "tabmwp", "sharegpt_demo", "wethink"} <= set(names)
    for name in names:
        card = read_recipe(name)
        assert card["name"] == name and card["description"] and card["licence"]


@pytest.mark.parametrize(
    "text",
    ['[{"q": "1+1", "a": "2"}, {"q": "x", "a": "y"}]', '{"7": {"q": "1+1", "a": "2"}, "8": {"q": "x", "a": "y"}}',
     '{"q": "1+1", "a": "2"}\n\n{"q": "x", "a": "y"}\n'],
)  # fmt: skip
def test_a_list_an_object_by_id_and_json_lines_are_read_alike(tmp_path: Path, text: str) -> None:
    examples = load(tmp_path, text)
    assert [e.messages[1]["content"] for e in examples] == ["2", "y"]
    assert [e.id for e in examples] in (["0", "1"], ["7", "8"], ["0", "2"])


def test_images_come_from_a_template_or_a_column_and_go_first(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4)).save(tmp_path / "5.png")
    by_template = load(tmp_path, [{"id": 5, "q": "q", "a": "a"}], image="{id}.png")[0]
    by_column = load(tmp_path, [{"id": 5, "q": "q", "a": "a", "pics": ["5.png"]}], images="pics")[0]
    for example in (by_template, by_column):
        assert example.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "q"}]
        assert image_size(example.images[0], where="row") == (4, 8)


def test_optional_parts_of_a_question_appear_where_the_row_has_them(tmp_path: Path) -> None:
    rows = [{"q": "How far?", "a": "3", "u": "km", "c": ["2", "3"]}, {"q": "What?", "a": "3", "u": None, "c": None}]
    examples = load(tmp_path, rows, unit="u", options="c")
    texts = [e.messages[0]["content"] for e in examples]
    assert "How far?" in texts[0] and "km" in texts[0] and "(A) 2" in texts[0] and "(B) 3" in texts[0]
    assert texts[1].strip() == "What?"


def test_conversations_of_either_spelling_become_messages(tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    examples, account = load_recipe(read_recipe(str(path)), None)
    assert [e.messages for e in examples] == [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    ] * 2
    assert account.read == 2


@pytest.mark.parametrize(
    ("rows", "changes", "error", "message"),
    [
        ([{"q": "q"}], {}, RowError, "no column 'a'"),
        ([{"q": "q", "a": None}], {}, RowError, "row 0: column 'a' is null"),
        ([{"q": "q", "a": "  "}], {}, RowError, "row 0: the response is empty"),
        ([{"q": "q", "a": "a"}], {"image": "{q}.png"}, RowError, "row 0: no image file at .*q.png"),
        ([{"q": "../x", "a": "a"}], {"image": "{q}.png"}, RowError, "leaves the data folder"),
        ([{"q": "q", "a": "a", "i": "ftp://x/y.png"}], {"images": "i"}, RowError, "is remote"),
        ([], {}, RowError, "no rows"),
        ("{oops", {}, RowError, "neither JSON"),
        ('{"q": 1, "a": 2}\n{half', {}, RowError, "line 2: not valid JSON"),
        ([1], {}, RowError, "row 0: expected an object, found int"),
        ([{"q": "q", "a": "a"}], {"promt": "x"}, CardError, r"unknown key 'promt'. Did you mean 'prompt'\?"),
        ([{"q": "q", "a": "a"}], {"licence": None}, CardError, "missing licence"),
        ([{"q": "q", "a": "a"}], {"messages": "m"}, CardError, "either messages, or prompt and response"),
        ([{"q": "q", "a": "a"}], {"source": {"file": "x"}}, CardError, r"unknown key 'file'. Did you mean 'files'\?"),
    ],
)
def test_what_is_wrong_with_a_card_or_row_is_said(
    tmp_path: Path, rows: Any, changes: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        load(tmp_path, rows, **changes)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(CardError, match=r"Unknown recipe 'tabwmp'. Did you mean 'tabmwp'\?"):
        read_card("recipe", "tabwmp", required=())


def test_a_missing_data_folder_or_file_is_said_before_reading(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="Say where they are: --data DIR"):
        load_recipe(read_recipe("tabmwp"), None)
    with pytest.raises(CardError, match="no data folder at"):
        load_recipe(read_recipe("tabmwp"), str(tmp_path / "nowhere"))
    with pytest.raises(CardError, match=r"expected data/tabmwp/problems_train.json in .*The folder holds: nothing"):
        load_recipe(read_recipe("tabmwp"), str(tmp_path))


def test_tabmwp_rows_end_in_the_answer_as_its_benchmark_extracts_it(shared: Path) -> None:
    examples, account = load_recipe(read_recipe("tabmwp"), str(shared / "tabmwp"))
    assert account.read == len(examples) == 850
    assert {effect: found.rows for effect, found in account.changed.items()} == {"ending appended": 850}
    raw = {r["id"]: r for r in read_rows({"files": "data/tabmwp/problems_train.json"}, shared / "tabmwp", where="t")}
    for example in examples:
        row, response = raw[example.id], example.messages[1]["content"]
        question, choices = example.messages[0]["content"][-1]["text"], row["choices"] or []
        letter = f"({'ABCDEF'[choices.index(row['answer'])]}) " if choices else ""
        assert response.endswith(f"\nThe answer is {letter}{row['answer']}.") and row["solution"].strip() in response
        assert row["question"] in question
        assert all(choice in question for choice in choices)
        assert (row["unit"] or "") in question
        gold = {"choices": row["choices"], "unit": row["unit"], "gold_answer": row["answer"]}
        assert score_response(response, gold, benchmark="tabmwp").correct, response


def test_sharegpt_conversations_keep_their_turns_and_repeated_images(shared: Path) -> None:
    examples, _ = load_recipe(read_recipe("sharegpt_demo"), str(shared / "sharegpt_demo"))
    assert len(examples) == 6
    assert [m["role"] for m in examples[0].messages] == ["user", "assistant"] * 2
    assert len(examples[0].images) == 2 and examples[0].images[0] == examples[0].images[1]


def conversation(folder: Path, row: dict[str, Any]) -> Any:
    (folder / "chats.json").write_text(json.dumps([row]))
    return load_recipe(read_recipe(str(folder / "chats.json")), None)[0][0]


def test_a_turn_not_to_be_trained_and_a_system_string_survive_the_reading(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a", "train": False},
        {"from": "gpt", "value": "b"},
    ]
    example = conversation(tmp_path, {"system": "be brief", "conversations": turns})
    assert [m["role"] for m in example.messages] == ["system", "user", "assistant", "assistant"]
    assert example.messages[2]["train"] is False and "train" not in example.messages[3]


def test_weights_objectives_tools_and_videos_of_a_row_reach_the_example(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"not opened here")
    turns = [
        {"role": "user", "content": "<video>q"},
        {"role": "assistant", "content": "a", "weight": 0.5, "objective": "nll", "reasoning": "because"},
    ]
    example = conversation(tmp_path, {"messages": turns, "videos": ["a.mp4"], "tools": '[{"name": "look"}]'})
    assert example.messages[1] == {
        "role": "assistant", "content": "a", "weight": 0.5, "objective": "nll", "reasoning_content": "because"
    }  # fmt: skip
    assert example.videos == [tmp_path / "a.mp4"] and example.tools == [{"name": "look"}]
    assert example.messages[0]["content"] == [{"type": "video"}, {"type": "text", "text": "q"}]


def test_a_card_can_unroll_its_conversations_into_one_example_per_answer(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    turns += [{"from": "human", "value": "r"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "7", "conversations": turns}))
    card = {"name": "mine", "source": {"files": ["rows.jsonl"]}, "messages": None, "unroll": True}
    examples, account = load_recipe(card, str(tmp_path))
    assert [e.id for e in examples] == ["7#1", "7#3"] and account.read == 2
    assert [[m.get("train") for m in e.messages] for e in examples] == [[None, None], [None, False, None, None]]


def test_a_line_separator_inside_a_json_line_does_not_end_it(tmp_path: Path) -> None:
    examples = load(
        tmp_path, json.dumps({"q": "a\u2028b", "a": "c"}, ensure_ascii=False) + "\n" + '{"q": "d", "a": "e"}'
    )
    assert [e.messages[0]["content"] for e in examples] == ["a\u2028b", "d"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {
                "messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}],
                "img": "x.png",
            },
            "column 'img' holds a picture that nothing uses. Say `images: img`",
        ),
        (
            {"messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]},
            "1 <image> markers but no images",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "wieght": 2}]},
            "unknown key 'wieght'. Did you mean 'weight'",
        ),
        ({"messages": [{"role": "user", "content": "q", "train": True}]}, "'train' belongs to an assistant's message"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "expected parts"),
        (
            {"messages": [{"role": "user", "content": "q"}], "tools": "{oops"},
            "tools must be a list of schemas or its JSON",
        ),
    ],
)
def test_what_a_row_says_and_we_cannot_train_is_refused_and_not_lost(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(RowError, match=message):
        conversation(tmp_path, row)


def test_conversations_of_three_other_projects_are_read_as_they_are(shared: Path, tmp_path: Path) -> None:
    expected = {  # file, data folder -> conversations, images
        ("qwen_vl_finetune_demo/demo/single_images.json", "qwen_vl_finetune_demo"): (3, 3),
        ("qwen_messages_demo/train_data/data.json", "qwen_messages_demo"): (1, 1),
    }
    for (file, data), counts in expected.items():
        examples, _ = load_recipe(read_recipe(str(shared / file)), str(shared / data))
        assert (len(examples), sum(len(e.images) for e in examples)) == counts
        assert all(image_size(i, where=e.id) > (100, 100) for e in examples for i in e.images)


@pytest.mark.parametrize("form", ["string", "path", "part", "frame"])
def test_no_form_of_a_source_leaves_the_data_folder(tmp_path: Path, form: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    source: Any = "../secret.png" if form == "string" else {"path": "../secret.png"}
    user: Any = {"role": "user", "content": "q"}
    row: dict[str, Any] = {"id": "1", "messages": [user, {"role": "assistant", "content": "a"}]}
    if form == "part":
        user["content"] = [{"type": "image", "image": source}]
    else:
        row |= {"videos": [[source, source]]} if form == "frame" else {"images": [source]}
    (tmp_path / "data" / "rows.jsonl").write_text(json.dumps(row))
    card = {"name": "mine", "source": {"files": ["rows.jsonl"]}, "messages": None}
    with pytest.raises(RowError, match="leaves the data folder"):
        load_recipe(card, str(tmp_path / "data"))


def test_a_folder_or_a_table_in_place_of_a_card_is_met_with_the_card_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000.parquet").touch()
    (tmp_path / "rows.csv").write_text("question,answer\nHow many?,5\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CardError, match=r"'data' is a folder, not a recipe"):
        read_recipe("data")
    with pytest.raises(CardError, match=r"is a folder, not a recipe") as error:
        read_recipe(str(tmp_path / "data"))
    assert 'source: {files: ["*.parquet"]}' in str(error.value) and f"--data {tmp_path / 'data'}" in str(error.value)
    with pytest.raises(CardError, match="is a file of data, not a recipe") as error:
        read_recipe(str(tmp_path / "rows.csv"))
    lines = str(error.value).splitlines()[1:4]
    card = tmp_path / "own.yaml"
    card.write_text("\n".join(lines))
    assert [example.messages[-1]["content"] for example in load_recipe(read_recipe(str(card)), str(tmp_path))[0]] == [
        "5"
    ]


def test_a_template_without_quotes_says_that_they_are_missing(tmp_path: Path) -> None:
    card = tmp_path / "own.yaml"
    card.write_text("description: x\nlicence: y\nsource: {files: [rows.csv]}\nprompt: {question}\nresponse: {answer}\n")
    with pytest.raises(CardError, match='needs quotes: "{question}"'):
        read_recipe(str(card))


def test_a_folder_whose_preparation_was_killed_is_not_taken_for_a_set(tmp_path: Path) -> None:
    (tmp_path / ".preparing").mkdir()
    (tmp_path / ".preparing" / "made_from.json").write_text("{}")
    (tmp_path / "shard-00000.parquet").touch()
    with pytest.raises(UserError, match="begun and not ended: run it again"):
        read_recipe(str(tmp_path))
