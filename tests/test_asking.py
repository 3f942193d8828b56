"""Protocols: each benchmark's question is, word for word, what its authors' code asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_dft.asking import asked_text, case_of, check_form
from vlm_dft.benchmark_cards import form_of, protocols_of, read_benchmark
from vlm_dft.benchmarks import load_benchmark
from vlm_dft.cards import list_cards
from vlm_dft.chat import text_of
from vlm_dft.errors import CardError, RowError

MATH_V = 'and put your answer in one "\\boxed{}". If it is a multiple choice question, only one letter is allowed in the "\\boxed{}".'


def ask(name: str, row: dict[str, Any], protocol: str = "official") -> str:
    return asked_text(form_of(read_benchmark(name), protocol), {"id": "1", **row}, where="w")


def asked(name: str, data: Path, protocol: str = "official") -> dict[str, str]:
    """The text asked of each sample of a benchmark's one chosen split."""
    ((_, samples),) = load_benchmark(name, data, protocol=protocol).items()
    return {sample.id: text_of(sample.messages[-1]["content"]) for sample in samples}


def test_mathvista_asks_what_its_authors_stored(shared: Path) -> None:
    stored = json.loads((shared / "mathvista/data/query.json").read_text("utf-8"))
    assert asked("mathvista", shared / "mathvista") == stored and len(stored) == 62
    results = json.loads((shared / "mathvista/results/bard/output_bard.json").read_text("utf-8"))
    assert {row["answer_type"] for row in results.values()} == {"text", "integer", "float", "list"}
    form = form_of(read_benchmark("mathvista"), "official")
    found = {pid: asked_text(form, {"id": pid, **row}, where="w") for pid, row in results.items()}
    other = [pid for pid, row in results.items() if found[pid] != row["query"]]
    assert other == ["670", "688", "849"]  # whose options the authors put into another order after this run
    assert protocols_of(read_benchmark("mathvista"))["vlmevalkit"] == form


def test_mathvista_asks_what_the_copy_on_the_hub_holds(shared: Path) -> None:
    import pyarrow.parquet as parquet

    (path,) = (shared / "hub_parquet/AI4Math--MathVista/data").glob("*.parquet")
    table = parquet.read_table(path, columns=["pid", "query"]).to_pylist()
    assert asked("mathvista", shared / "hub_parquet") == {row["pid"]: row["query"] for row in table}


def test_mathvistas_own_script_puts_the_hint_last() -> None:
    row = {
        "question": "How much?", "unit": "$", "choices": None, "precision": 2, "question_type": "free_form", "answer_type": "float",
    }  # fmt: skip
    assert ask("mathvista", row, "build_query") == (
        "Question: How much? (Unit: $)\nHint: Please answer the question requiring a floating-point number with two decimal places "
        "and provide the final value, e.g., 1.23, 1.34, 1.45, at the end.\nSolution:"
    )


def test_mathverse_asks_the_columns_of_its_two_scores(shared: Path) -> None:
    rows = json.loads((shared / "mathverse/data/testmini_text_only.json").read_text("utf-8"))
    for protocol, column in (("official", "query_wo"), ("cot", "query_cot"), ("vlmevalkit", "query_wo")):
        found = asked("mathverse:testmini_text_only", shared / "mathverse", protocol)
        assert list(found.values()) == [row[column] for row in rows]


def test_math_vision_lists_options_unless_they_stand_in_the_picture() -> None:
    free = {"question": "How many?\n<image1>", "options": []}
    assert ask("mathvision", free) == f"Please solve the problem {MATH_V}\nHow many?\n<image1>\n"
    shown = {"question": "Which?\n<image1>", "options": list("ABCDE")}
    assert ask("mathvision", shown) == f"Please solve the problem {MATH_V}\nWhich?\n<image1>\n"
    told = {"question": "Which?\n<image1>", "options": ["1", "$\\frac{1}{2}$", "3", "4", "5"]}
    options = "(A) 1\n(B) $\\frac{1}{2}$\n(C) 3\n(D) 4\n(E) 5\n"
    assert ask("mathvision", told, "step_by_step") == (
        f"Please solve the problem step by step {MATH_V}\nWhich?\n<image1>\n{options}"
    )
    assert ask("mathvision", told, "direct") == (
        f"Which?\n<image1>\n{options}\nAnswer the question using a single word or phrase."
    )


def test_math_vision_gives_its_one_picture_first_and_keeps_the_markers_as_words(shared: Path) -> None:
    samples = load_benchmark("mathvision", shared)["test"]
    with open(shared / "mathvision/data/test.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for sample, row in zip(samples, rows, strict=True):
        picture, text = sample.messages[0]["content"]
        assert picture == {"type": "image"} and f"\n{row['question']}\n" in text["text"]


def test_we_math_asks_the_template_of_the_paper() -> None:
    row = {
        "question": "How long?",
        "option": "A. 1 cm;B. 2 cm; C. No correct answer",
        "choices": ["1 cm", "2 cm", "No correct answer"],
    }
    assert ask("wemath", row) == (
        "Now, we require you to solve a multiple-choice math question. Please briefly describe your thought process and provide "
        "the final answer(option).\nQuestion: How long?\nOption: A. 1 cm;B. 2 cm; C. No correct answer\nRegarding the format, please "
        "answer following the template below, and be sure to include two <> symbols:\n<Thought process>: <<your thought process>> "
        "<Answer>: <<your option>>"
    )
    assert ask("wemath", row, "vlmevalkit").endswith(
        "Question: How long?\nOptions:\nA. 1 cm\nB. 2 cm\nC. No correct answer\n"
    )


def test_dynamath_asks_for_json() -> None:
    guide = (
        "\n## Answer Instruction Please provide an answer to the question outlined above. Your response should adhere \n"
        "to the following JSON format, which includes two keys: 'solution' and 'short answer'. The 'solution' key can contain \n"
        "detailed steps needed to solve the question, and the 'short answer' key should provide a concise response. If the problem "
        "is a multiple choice problem, just provide the corresponing choice option, \nsuch as 'A', 'B', 'C', or 'D'. If the answer "
        "is a numerical value, format it as a three-digit floating-point number.\n\nExample of expected JSON response format:\n\n"
    )
    example = json.dumps(
        {"solution": "[Detailed step-by-step explanation]", "short answer": "[Concise Answer]"}, indent=4
    )
    text = {"question": "What time?", "answer_type": "text"}
    assert ask("dynamath", text) == f"## Question\nWhat time?{guide}{example}"
    number = {"question": "How much?", "answer_type": "float"}
    assert ask("dynamath", number) == f"## Question\nHow much?Please answer in a floating-point number.{guide}{example}"
    theirs = ask("dynamath", number, "vlmevalkit")
    assert theirs.startswith(
        "## Question\n How much?\n## Answer Instruction Please provide an answer to the question outlined"
    )
    assert (
        "Format the answer as a three-digit floating-point number and provide it in the 'short answer' key.\n\n"
        in theirs
    )
    assert theirs.endswith(f"Example of expected JSON response format:\n\n{example}")


def test_tabmwp_asks_in_text_what_promptpg_asks() -> None:
    row = {
        "question": "How much  more?", "unit": "$", "choices": ["yes", "no"], "table_title": "Prices", "table": "ring | $5\npin | $7",
    }  # fmt: skip
    assert ask("tabmwp", row, "text") == (
        "Table: [TITLE]: Prices\nring | $5\npin | $7\nQuestion: How much more? (Unit: $)\nOptions: (A) yes (B) no\nAnswer:"
    )
    bare = {"question": "So?", "unit": None, "choices": None, "table_title": None, "table": "1 | 2"}
    assert ask("tabmwp", bare, "text") == "Table: 1 | 2\nQuestion: So?\nAnswer:"
    assert ask("tabmwp", row) == "How much  more? (Unit: $)\nOptions: (A) yes (B) no"


def test_the_text_protocol_gives_no_picture(shared: Path) -> None:
    samples = load_benchmark("tabmwp", shared, protocol="text")["test"]
    assert all(not sample.images and isinstance(sample.messages[0]["content"], str) for sample in samples)


def test_puzzlevqa_lists_three_options_or_four() -> None:
    row = {"question": "What is the size?", "options": ["small", "medium", "large"]}
    assert ask("puzzlevqa", row) == (
        "Question: What is the size?\nOptions:\n(A) small\n(B) medium\n(C) large\n\nAnswer: Let's describe the image first and think "
        "step by step."
    )
    assert "(D) 4\n\nAnswer" in ask("puzzlevqa", {**row, "options": [1, 2, 3, 4]})


def test_scienceqa_is_asked_alike_from_llavas_file_and_from_the_hubs_columns(shared: Path) -> None:
    rows = json.loads((shared / "scienceqa_llava/llava_test_CQM-A.json").read_text("utf-8"))
    told = {row["id"]: row["conversations"][0]["value"].replace("<image>", "").strip() for row in rows}
    ending = "\nAnswer with the option's letter from the given choices directly."
    assert asked("scienceqa", shared) == {key: text + ending for key, text in told.items()}
    row = {
        "question": "Which property do these three objects have in common?", "hint": "Select the best answer.",
        "choices": ["salty", "scratchy", "sticky"],
    }  # fmt: skip
    assert ask("scienceqa", row) == told["751"] + ending
    assert ask("scienceqa", {**row, "hint": ""}, "vlmevalkit") == (
        "Question: Which property do these three objects have in common?\nOptions:\nA. salty\nB. scratchy\nC. sticky\n"
        "Please select the correct answer from the options above. \n"
    )


def test_the_other_questions_are_these() -> None:
    boxed = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert ask("gsm8k", {"question": "How many?"}) == "How many?" + boxed
    assert ask("math500", {"problem": "What is $x$?"}) == "What is $x$?" + boxed
    assert ask("logicvista", {"question": "Which? "}) == "Which? "
    assert ask("geometry3k", {"question": "Find x.", "choices": ["1", "2"]}) == (
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\nQuestion: Find x.\n"
        "Choices:\n(A) 1\n(B) 2"
    )


def test_every_card_has_an_official_protocol_and_an_unknown_one_is_named_with_the_nearest() -> None:
    for name in list_cards("benchmark"):
        assert next(iter(protocols_of(read_benchmark(name)))) == "official"
    with pytest.raises(
        CardError, match=r"'mathvista': unknown protocol 'vlmevalkt'. Did you mean 'vlmevalkit'\? Known: official, vlme"
    ):
        load_benchmark("mathvista", protocol="vlmevalkt")


def test_the_first_case_that_holds_is_taken_and_none_is_an_error() -> None:
    cases = [
        {"when": {"kind": "float", "precision": 1}, "text": "one"},
        {"when": {"kind": ["int", "float"]}, "text": "two"},
    ]
    assert case_of(cases, {"kind": "float", "precision": 1.0}, where="w")["text"] == "one"
    assert case_of(cases, {"kind": "float", "precision": 2}, where="w")["text"] == "two"
    with pytest.raises(RowError, match=r"row 5: none of its 2 cases holds for kind 'list', precision None"):
        case_of(cases, {"kind": "list", "precision": None}, where="row 5")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("text", "expected a mapping with a prompt, found 'text'"),
        ({"promt": "{q}"}, "unknown key 'promt'. Did you mean 'prompt'"),
        ({"system": "s"}, "missing prompt"),
        ({"prompt": "{q.a}"}, r"prompt: \{q.a\} in .* is not a column"),
        ({"prompt": "{p}", "parts": ["p"]}, "parts: expected names with lists of cases"),
        ({"prompt": "{p}", "parts": {"p": "x"}}, "part 'p': expected a list of cases"),
        ({"prompt": "{p}", "parts": {"p": [{"wen": {}, "text": "x"}]}}, "case 1: unknown key 'wen'. Did you mean 'when'"),
        ({"prompt": "{p}", "parts": {"p": [{"when": {"a": 1}}]}}, r"case 1: expected one of text, found \['when'\]"),
        ({"prompt": "{p}", "parts": {"p": [{"text": "x"}, {"text": "y"}]}}, "case 1: has no `when`, so that the cases after it"),
        ({"prompt": "{p}", "parts": {"p": [{"when": {"a": {"mn": 1}}, "text": ""}]}}, "unknown key 'mn'. Did you mean 'min'"),
        ({"prompt": "{p}", "options": {"column": "c"}}, "options: missing each, join"),
        ({"prompt": "{p}", "options": 3}, "options: expected a column"),
        ({"prompt": "{p}", "squeeze": "yes"}, "squeeze: expected true or false, found 'yes'"),
        ({"prompt": "{p}", "markers": "kept"}, "markers: expected text"),
    ],
)  # fmt: skip
def test_a_mistaken_protocol_is_refused(form: Any, message: str) -> None:
    with pytest.raises(CardError, match=message):
        check_form(form, where="card")
