"""Benchmark cards to samples: the shipped cards, and every mistake named before anything slow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from vlm_dft.benchmarks import load_benchmark, read_benchmark
from vlm_dft.cards import list_cards
from vlm_dft.chat import text_of
from vlm_dft.errors import CardError, RowError
from vlm_dft.predictions import score_predictions
from vlm_dft.prompts import prompt_text

CARD: dict[str, Any] = {
    "description": "d", "licence": "l", "splits": {"test": {"files": ["rows.jsonl"]}}, "prompt": "{q}", "answer": "a",
    "scorer": "drawn", "max_new_tokens": 8, "image": "images/{id}.png", "groups": ["task"], "record": {"question": "q"},
}  # fmt: skip
ROWS = [{"id": f"r{k}", "q": f"How many in {k}?", "a": str(k), "task": "count"} for k in range(3)]


def write_benchmark(folder: Path, rows: list[dict[str, Any]] = ROWS, **changes: Any) -> str:
    (folder / "images").mkdir(exist_ok=True)
    for row in ROWS:
        Image.new("RGB", (8, 8), "red").save(folder / "images" / f"{row['id']}.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = folder / "mine.yaml"
    card.write_text(yaml.safe_dump({k: v for k, v in {**CARD, **changes}.items() if v is not None}))
    return str(card)


def test_every_shipped_card_can_be_read() -> None:
    assert {"drawn", "tabmwp"} <= set(list_cards("benchmark"))
    for name in list_cards("benchmark"):
        assert read_benchmark(name)["name"] == name


def test_a_row_becomes_a_sample_with_image_prompt_record_and_groups(tmp_path: Path) -> None:
    splits = load_benchmark(write_benchmark(tmp_path), tmp_path)
    assert {split: [s.id for s in samples] for split, samples in splits.items()} == {"test": ["r0", "r1", "r2"]}
    sample = splits["test"][1]
    content = [{"type": "image"}, {"type": "text", "text": "How many in 1?"}]
    assert sample.messages == [{"role": "user", "content": content}]
    assert sample.images == [tmp_path / "images" / "r1.png"]
    assert (sample.benchmark, sample.split, sample.groups) == ("mine", "test", {"task": "count"})
    assert (sample.record["question"], sample.record["gold_answer"], sample.record["choices"]) == (
        "How many in 1?",
        "1",
        None,
    )


def test_limit_takes_the_first_of_each_split(tmp_path: Path) -> None:
    sources = {"a": {"files": ["rows.jsonl"]}}
    assert [s.id for s in load_benchmark(write_benchmark(tmp_path, splits=sources), tmp_path, limit=2)["a"]] == [
        "r0",
        "r1",
    ]


def test_unit_and_options_are_appended_where_a_row_has_them() -> None:
    card = {"prompt": "{q}", "unit": "u", "options": "c"}
    assert prompt_text(card, {"q": "Cost?", "u": "$", "c": None}, where="w") == "Cost? (Unit: $)"
    assert prompt_text(card, {"q": "So?", "u": "", "c": ["yes", "no"]}, where="w") == "So?\nOptions: (A) yes (B) no"
    placed = {"prompt": "{options} {q}", "options": "c"}
    assert prompt_text(placed, {"q": "So?", "c": ["yes", "no"]}, where="w") == "(A) yes (B) no So?"
    with pytest.raises(RowError, match=r"row 7: expected a list of at most 26 choices, or its JSON text, found 'yes'"):
        prompt_text(card, {"q": "So?", "u": "", "c": "yes"}, where="row 7")
    with pytest.raises(RowError, match=r"row 7: no column 'c' \(options\)"):
        prompt_text(card, {"q": "So?", "u": ""}, where="row 7")


def test_a_missing_image_names_its_row(tmp_path: Path) -> None:
    name = write_benchmark(tmp_path)
    (tmp_path / "images" / "r1.png").unlink()
    with pytest.raises(RowError, match=r"mine, split test, row r1: no image file at .*r1\.png"):
        load_benchmark(name, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": "drwan"}, "unknown scorer 'drwan'. Did you mean 'drawn'"),
        ({"scorer": None}, "missing scorer"),
        ({"promt": "{q}"}, "unknown key 'promt'. Did you mean 'prompt'"),
        ({"splits": {}}, "splits must be a non-empty dict"),
        ({"splits": {"test": "rows.jsonl"}}, r"split 'test': expected a source such as \{files: \[...\]\}"),
        ({"splits": {"test": {"files": ["absent.json"]}}}, "expected absent.json in .*it is not there"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number above zero, found 0"),
        ({"record": {"units": "q"}}, "record: unknown key 'units'. Did you mean 'unit'"),
    ],
)
def test_a_mistaken_card_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CardError, match=message):
        load_benchmark(write_benchmark(tmp_path, **changes), tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], ROWS[0]], "id 'r0' is in test and again in test"),
        ([{"id": "r0", "q": "?", "task": "t"}], "row r0: no column 'a'"),
        ([{"id": "r0", "q": "?", "a": "1"}], "row r0: no column 'task'"),
        ([], "no rows|is empty"),
    ],
)
def test_mistaken_rows_are_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RowError, match=message):
        load_benchmark(write_benchmark(tmp_path, rows), tmp_path)


def test_an_unknown_benchmark_and_missing_data_are_said_at_once() -> None:
    with pytest.raises(CardError, match=r"Unknown benchmark 'tabmpw'. Did you mean 'tabmwp'"):
        load_benchmark("tabmpw")
    with pytest.raises(CardError, match=r"reads local files. Say where they are: --data DIR"):
        load_benchmark("tabmwp")


def test_scores_are_made_from_predictions_in_the_samples_order(tmp_path: Path) -> None:
    samples = load_benchmark(write_benchmark(tmp_path), tmp_path)["test"]
    said = {"r2": "Answer: 2", "r0": "Answer: 9", "r1": "none"}
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text(
        "".join(json.dumps({"id": i, "response": r, "finish": "stop"}) + "\n" for i, r in said.items())
    )
    rows = score_predictions(samples, predictions, tmp_path / "scores.jsonl")
    assert [(r["id"], r["correct"], r["extracted"], r["rule"]) for r in rows] == [
        ("r0", False, "9", "answer line"),
        ("r1", False, None, "no answer line"),
        ("r2", True, "2", "answer line"),
    ]
    assert [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()] == rows


def test_predictions_of_other_samples_are_refused(tmp_path: Path) -> None:
    samples = load_benchmark(write_benchmark(tmp_path), tmp_path)["test"]
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"id": "r0", "response": ""}\n')
    with pytest.raises(RowError, match=r"2 samples without a prediction, first 'r1'"):
        score_predictions(samples, path, tmp_path / "scores.jsonl")
    path.write_text("".join(json.dumps({"id": i, "response": ""}) + "\n" for i in ("r0", "r1", "r2", "x")))
    with pytest.raises(RowError, match=r"1 predictions of unknown samples, first 'x'"):
        score_predictions(samples, path, tmp_path / "scores.jsonl")
    path.write_text('{"id": "r0"\n')
    with pytest.raises(RowError, match=r"predictions\.jsonl, line 1: not valid JSON"):
        score_predictions(samples, path, tmp_path / "scores.jsonl")


def test_the_drawn_benchmark_has_four_splits_whose_own_responses_are_right(tmp_path: Path) -> None:
    from vlm_dft.rows import read_rows, source_root
    from vlm_dft.scoring import score_response

    splits = load_benchmark("drawn", limit=20)
    assert list(splits) == ["test", "ood_large", "ood_colour", "ood_render"]
    source = {"embedded": "test.jsonl"}
    told = {row["id"]: row["response"] for row in read_rows(source, source_root(source, None, where="t"), where="t")}
    assert all(score_response(told[s.id], s.record, benchmark="drawn").correct for s in splits["test"])


def test_real_tabmwp_rows_load_as_the_recipe_asks_them(shared: Path) -> None:
    samples = load_benchmark("tabmwp", shared / "tabmwp")["test"]
    assert len(samples) == 180
    by_id = {sample.id: sample for sample in samples}
    assert by_id["418"].messages[0]["content"][0] == {"type": "image"}
    assert text_of(by_id["418"].messages[0]["content"]).endswith("cost on Wednesday than on Thursday? (Unit: $)")
    assert text_of(by_id["620"].messages[0]["content"]).endswith("a hair tie and a comb?\nOptions: (A) yes (B) no")
    assert by_id["620"].record["gold_answer"] == "yes"
    assert by_id["620"].groups == {"ques_type": "multi_choice", "ans_type": "boolean_text"}
