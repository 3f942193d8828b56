"""Row formats: which one a row is in is told by its columns and said; every one becomes the same messages; doubt is an error."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from vlm_dft.errors import CardError, RowError
from vlm_dft.examining import examine
from vlm_dft.recipes import load_recipe, outcomes, outcomes_of, read_recipe, said_format, said_source
from vlm_dft.row_formats import FORMATS, detect

QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
PATH = "file:///pictures/1.png"
ROWS: list[tuple[str, dict[str, Any]]] = [  # (format, a row of it that asks "q" and answers "a")
    ("messages", {"messages": QA}),
    ("messages", {"conversation": QA}),
    ("conversations", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
    ("conversations", {"conversation": [{"from": "human", "value": "q"}, {"from": "bot", "value": "a"}]}),
    ("conversations", {"messages": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}),
    ("texts", {"texts": [{"user": "q", "assistant": "a"}]}),
    ("texts", {"conversation": [{"human": "q", "assistant": "a"}]}),
    ("message", {"message": json.dumps(QA)}),
    ("message", {"message": json.dumps(QA[:1]), "answer": "a"}),
    ("prompt/completion", {"prompt": "q", "completion": "a"}),
    ("prompt/completion", {"prompt": QA[:1], "completion": QA[1:]}),
    ("query/response", {"query": "q", "response": "a", "history": []}),
    ("instruction/input/output", {"instruction": "q", "input": "", "output": "a"}),
    ("instruction/input/output", {"instruction": "q", "output": "a"}),
    ("question/answer", {"question": "q", "answer": "a"}),
    ("question/solution", {"question": "q", "solution": "a"}),
    ("problem/solution", {"problem": "q", "solution": "a"}),
    ("problem/answer", {"problem": "q", "answer": "a"}),
    ("question/chosen", {"question": "q", "chosen": "a", "rejected": "b"}),
]


def load(folder: Path, rows: list[Any], **changes: Any) -> Any:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    card = {"description": "d", "licence": "l", "source": {"files": ["rows.jsonl"]}, **changes}
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    return load_recipe(read_recipe(str(folder / "card.yaml")), str(folder))


def plain(messages: list[Any]) -> list[tuple[str, str]]:
    return [(m["role"], m["content"] if isinstance(m["content"], str) else
             "".join("<image>" if p["type"] == "image" else p["text"] for p in m["content"])) for m in messages]  # fmt: skip


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_every_format_is_told_by_its_columns_and_asks_and_answers_alike(
    name: str, row: dict[str, Any], tmp_path: Path
) -> None:
    found = detect(row, where="row")
    assert found.name == name and found.why and name in FORMATS
    [example], _ = load(tmp_path, [{"id": 1, **row}])
    assert plain(example.messages) == [("user", "q"), ("assistant", "a")]
    [forced], _ = load(tmp_path, [row], format=name)
    assert forced.messages == example.messages


def test_the_format_and_what_says_it_are_said(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"conversations": [{"from": "human", "value": "q"}], "id": "x"}))
    said = said_format({"name": "mine", "source": {"files": ["rows.jsonl"]}}, str(tmp_path))
    assert said == "conversations: column 'conversations' holds turns of from and value"
    own = {"name": "mine", "source": {"files": ["rows.jsonl"]}, "prompt": "{q}", "response": "{a}"}
    assert said_format(own, str(tmp_path)) == "the card's own: its prompt and response"


def test_a_conversation_goes_before_columns_that_could_be_a_question_and_an_answer() -> None:
    numina = {"source": "olympiads", "problem": "p", "solution": "s", "messages": QA}
    assert detect(numina, where="row").name == "messages"


def test_columns_of_two_formats_are_refused_with_both_and_the_key_that_decides(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "solution": "because"}
    with pytest.raises(RowError, match=r"fit 2 formats: question/answer .*question/solution .*`format:`") as raised:
        load(tmp_path, [row])
    assert raised.value.reason == "columns fit several formats"
    [example], _ = load(tmp_path, [row], format="question/solution")
    assert example.messages[1]["content"] == "because"
    two = {"messages": QA, "conversations": [{"from": "human", "value": "r"}, {"from": "gpt", "value": "b"}]}
    with pytest.raises(RowError, match=r"fit 2 formats: messages .*conversations .*`messages:` with the column"):
        load(tmp_path, [two])
    [example], _ = load(tmp_path, [two], messages="conversations")
    assert example.messages[1]["content"] == "b"


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"frage": "q", "antwort": "a"}, {}, r"no known row format. Columns found: frage, antwort, id. .*`prompt:`"),
        ({"query": "q", "reply": "a"}, {"format": "query/response"}, r"no column 'response'..* Columns found: query, reply, id"),
        ({"qestion": "q", "answer": "a"}, {"format": "question/answer"}, r"no column 'question'. Did you mean 'qestion'\?"),
        ({"conversatons": QA}, {"format": "messages", "messages": "conversations"}, r"Did you mean 'conversatons'\?"),
        ({"conversatons": QA}, {"messages": "conversations"}, r"no conversation. .*Did you mean 'conversatons'\?"),
        ({"conversations": QA}, {"format": "conversations"}, "a column of turns of from and value"),
        ({"message": "[{oops"}, {}, "no conversation.* Column 'message' is str"),
        ({"texts": [{"user": "q"}]}, {"format": "texts"}, "Expected one named"),
        ({"texts": [{"user": "q", "assistant": "a"}, {"user": "q"}]}, {}, "turn 1: expected a pair with assistant or gpt or bot"),
        ({"query": "q", "response": "a", "history": ["x"]}, {}, r"history must be a list of \[question, answer\]"),
        ({"question": "q", "answer": None}, {}, "column 'answer' is null"),
        ({"question": "q", "answer": {"a": 1}}, {}, "column 'answer' holds a dict"),
        ({"question": "q", "answer": " "}, {}, "the response is empty"),
        ({"prompt": "q", "completion": None}, {}, "column 'completion' is None"),
    ],
)  # fmt: skip
def test_a_row_that_is_not_in_the_format_is_refused_by_name(
    row: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RowError, match=message) as raised:
        load(tmp_path, [row], **changes)
    assert "card row 0" in str(raised.value) and raised.value.reason != RowError.reason


def test_a_row_of_another_format_than_the_first_is_refused_naming_both(tmp_path: Path) -> None:
    rows = [{"id": "a", "problem": "p", "answer": "1"}, {"id": "b", "question": "q", "answer": "2"}]
    with pytest.raises(RowError, match=r"row b: its format is question/answer .*row a, the first, is problem/answer"):
        load(tmp_path, rows)
    card = read_recipe(str(tmp_path / "card.yaml"))
    later = list(outcomes(card, str(tmp_path), start=1))  # the first row says the format, wherever reading begins
    assert [o.id for o in later] == ["b"] and later[0].error is not None
    assert later[0].error.reason == "of another format than the first row"
    for workers in (0, 2):
        found = [o.outcome.error is not None for o in examine(card, str(tmp_path), workers=workers)]
        assert found == [False, True]


def test_two_spellings_of_a_conversation_may_stand_in_one_file(tmp_path: Path) -> None:
    examples, _ = load(tmp_path, [dict(row) for name, row in ROWS if name in ("messages", "conversations", "texts")])
    assert {str(plain(e.messages)) for e in examples} == {str([("user", "q"), ("assistant", "a")])}


def test_the_json_text_of_messages_brings_its_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    address = f"file://{tmp_path / '1.png'}"
    text = json.dumps(
        [{"role": "user", "content": [{"type": "image", "image": address}, {"type": "text", "text": "q"}]}]
    )
    [example], _ = load(tmp_path, [{"id": 1, "message": text, "answer": "$$3$$"}], format="message")
    assert plain(example.messages) == [("user", "<image>q"), ("assistant", "$$3$$")]
    assert example.images == [(tmp_path / "1.png").resolve()]


def test_context_turns_of_a_prompt_are_not_trained(tmp_path: Path) -> None:
    [example], _ = load(tmp_path, [{"prompt": [*QA, {"role": "user", "content": "r"}], "completion": "b"}])
    assert [m.get("train", True) for m in example.messages if m["role"] == "assistant"] == [False, True]


SWIFT = "swift_formats/tests/llm/data"
REAL: list[tuple[str, str, str, list[list[tuple[str, str]]], list[int]]] = [
    # (file, data folder, format, the messages of the first rows, images of the rows)
    (f"{SWIFT}/alpaca.jsonl", "", "instruction/input/output", [
        [("system", "system123"), ("user", "aaaaa"), ("assistant", "bbbbb"), ("user", "11111\n22222"), ("assistant", "33333")],
        [("user", "aaaaa"), ("assistant", "ccccc")]], [0, 0, 0]),
    (f"{SWIFT}/chatml.jsonl", "", "messages", [[("system", "00000"), ("user", "11111"), ("assistant", "22222")]], [0, 0, 0]),
    (f"{SWIFT}/conversations.jsonl", "", "conversations", [[("system", "00000"), ("user", "11111"), ("assistant", "22222")]], [0, 0, 0]),
    (f"{SWIFT}/sharegpt.jsonl", "", "texts", [[("system", "00000"), ("user", "11111"), ("assistant", "22222")]], [0, 0, 0]),
    (f"{SWIFT}/multi_modal_1.jsonl", "", "query/response", [
        [("user", "<image>55555"), ("assistant", "66666")],
        [("user", "hello"), ("assistant", "123"), ("user", "<image><image>eeeee"), ("assistant", "fffff")]], [1, 2, 0]),
    (f"{SWIFT}/multi_modal_2.jsonl", "", "query/response", [[("user", "<image>55555"), ("assistant", "66666")]], [1, 1, 3]),
    (f"{SWIFT}/multi_modal_3.jsonl", "", "query/response", [[("user", "<image>55555"), ("assistant", "66666")]], [1, 1, 1]),
    ("sharegpt_demo/data/mllm_demo.json", "sharegpt_demo/data", "messages", [], [2, 1, 1, 2, 1, 1]),
    ("sharegpt_demo/data/mllm_video_demo.json", "sharegpt_demo/data", "messages", [], [0, 0, 0]),
    ("sharegpt_demo/data/v1_multimodal_demo.jsonl", "sharegpt_demo", "messages", [
        [("user", "<image>Who are they?"), ("assistant", "They're Kane and Gretzka from Bayern Munich."),
         ("user", "What are they doing?<image>"), ("assistant", "They are celebrating on the soccer field.")]], [2, 1, 1, 2, 1, 1] * 4),
    ("qwen_vl_finetune_demo/demo/single_images.json", "qwen_vl_finetune_demo", "conversations", [
        [("user", "Is the value of Favorable 38 in 2015?\n<image>"), ("assistant", "Yes")]], [1, 1, 1]),
    ("qwen_messages_demo/train_data/data.json", "qwen_messages_demo", "messages", [], [1]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "data", "name", "messages", "images"), REAL, ids=[entry[0].split("/")[-1] for entry in REAL]
)
def test_files_of_other_projects_are_read_as_they_are(
    file: str, data: str, name: str, messages: list[Any], images: list[int], shared: Path
) -> None:
    card, folder = read_recipe(str(shared / file)), str(shared / data)
    examples, account = load_recipe(card, folder)
    assert said_format(card, folder).startswith(f"{name}: ")
    assert [plain(e.messages) for e in examples[: len(messages)]] == messages
    assert [len(e.images) for e in examples] == images and account.read == len(images)
    assert all(m.get("train", True) for e in examples for m in e.messages)


def test_a_remote_picture_is_refused_by_the_collator_by_name(shared: Path) -> None:
    from vlm_dft import ChatCollator
    from vlm_dft.models import load_processor

    [first, *_], _ = load_recipe(read_recipe(str(shared / SWIFT / "multi_modal_2.jsonl")), None)
    with pytest.raises(RowError, match=r"is remote and its host .* is not allowed"):
        ChatCollator(load_processor("tiny"))([first])


def test_an_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        CardError, match=r"unknown format 'conversation'. Did you mean 'conversations'\? Known: messages"
    ):
        load(tmp_path, [{"messages": QA}], format="conversation")


def test_where_rows_are_read_from_is_said(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "Set/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"question": "q", "answer": "a"}')
    assert said_source({"name": "x", "source": {"files": "*.jsonl"}}, str(tmp_path)) == "2 files: a.jsonl, b.jsonl"
    hub = {"hub": "own/Set", "revision": "abc"}
    assert said_source({"name": "x", "source": hub}, None) == "the hub: own/Set, split train, revision abc"
    copy = {"name": "x", "source": {**hub, "copy": "Set"}}
    assert said_source(copy, str(tmp_path)) == "1 file: Set/train.jsonl (a copy of own/Set)"


def test_a_conversation_stored_as_lists_by_key_is_read(tmp_path: Path) -> None:
    """As `datasets` stores a Sequence of a dict."""
    table = [
        {"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}},
        {"conversations": {"from": ["human"], "value": ["q", "a"]}},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(table))
    good, bad = outcomes({"name": "x", "source": {"files": ["rows.json"]}}, str(tmp_path))
    assert good.example is not None and [m["content"] for m in good.example.messages] == ["q", "a"]
    assert bad.error is not None and bad.error.reason == "no conversation"


def test_a_picture_that_nothing_uses_is_an_error_that_says_how_to_use_it(tmp_path: Path) -> None:
    row = {"id": "0.png", "picture": "pics/0.png", "question": "How high?", "answer": "5"}
    card = {"name": "own", "source": {"files": ["rows.csv"]}}
    for own in (card, {**card, "prompt": "{question}", "response": "{answer}"}):
        (outcome,) = outcomes_of(own, row, tmp_path)
        assert outcome.error is not None and outcome.error.reason == "a column of pictures is not used"
        assert "column 'picture' holds a picture that nothing uses. Say `images: picture`" in str(outcome.error)
    (outcome,) = outcomes_of({**card, "images": None}, row, tmp_path)
    assert outcome.error is None
    (outcome,) = outcomes_of(card, {**row, "picture": "blue", "image": None}, tmp_path)
    assert outcome.error is None
    two = {**row, "image": "images/0.png", "picture": {"bytes": b"x", "path": None}}  # as MathVista's rows
    (outcome,) = outcomes_of(card, two, tmp_path)
    assert "columns 'image' and 'picture' both hold pictures. Say `images: picture` or `images: image`" in str(
        outcome.error
    )
    (outcome,) = outcomes_of({**card, "images": "picture"}, two, tmp_path)
    assert outcome.error is None
