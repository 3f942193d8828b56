"""Benchmark cards to samples: the shipped cards, and every mistake named before anything slow."""

from __future__ import annotations

import io
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


def test_rows_that_are_wrong_are_counted_by_reason_and_none_is_left_out(tmp_path: Path) -> None:
    name = write_benchmark(tmp_path, [*ROWS, {**ROWS[0], "id": "r9", "a": " "}])
    for gone in ("r1", "r2"):
        (tmp_path / "images" / f"{gone}.png").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "r9.png")
    with pytest.raises(RowError) as told:
        load_benchmark(name, tmp_path)
    assert "3 of 4 rows of mine, split test, are wrong (2 image missing; 1 empty answer). None is left out" in str(
        told.value
    )
    assert "The first: mine, split test, row r1: no image file at" in str(told.value)


def test_a_line_that_is_not_json_or_not_utf8_is_named(tmp_path: Path) -> None:
    name = write_benchmark(tmp_path)
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))  # a byte order mark is no fault
    assert len(load_benchmark(name, tmp_path)["test"]) == 3
    (tmp_path / "rows.jsonl").write_bytes(
        b"\n".join([*lines[:1], lines[1].replace(b"How", "H\xf6w".encode("latin-1"))])
    )
    with pytest.raises(RowError, match=r"rows\.jsonl, line 2: .*UTF-8"):
        load_benchmark(name, tmp_path)
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([*lines[:2], b'{"id": "r2", "q": ']))
    with pytest.raises(RowError, match=r"rows\.jsonl, line 3: not valid JSON"):
        load_benchmark(name, tmp_path)


def test_a_column_without_a_picture_is_refused_unless_the_card_says_that_rows_may_have_none(tmp_path: Path) -> None:
    rows = [{**row, "image": None if row["id"] == "r1" else f"images/{row['id']}.png"} for row in ROWS]
    name = write_benchmark(tmp_path, rows, image=None, images="image")
    with pytest.raises(RowError, match="row r1: no image in column 'image'"):
        load_benchmark(name, tmp_path)
    name = write_benchmark(tmp_path, rows, image=None, images="image", images_optional=True)
    samples = load_benchmark(name, tmp_path)["test"]
    assert [len(sample.images) for sample in samples] == [1, 0, 1]
    assert samples[1].messages == [{"role": "user", "content": "How many in 1?"}]


def test_a_split_with_other_rows_than_the_whole_set_is_read_and_said(tmp_path: Path) -> None:
    name = write_benchmark(tmp_path, splits={"test": {"files": ["rows.jsonl"], "rows": 1200}})
    found = load_benchmark(name, tmp_path)
    assert found.remarks == [
        "mine, split test: 3 rows, the whole set has 1,200. Its scores are not comparable with published ones."
    ]
    assert found.sources["test"] == {"layout": "original", "folder": str(tmp_path), "rows": 3, "expected": 1200}
    assert load_benchmark(name, tmp_path, limit=2).remarks == []


def test_variants_in_files_of_their_own_come_side_by_side_so_that_a_limit_keeps_them_together(tmp_path: Path) -> None:
    for variant in (1, 3):
        folder = tmp_path / f"v{variant}"
        folder.mkdir()
        rows = [{"id": seed, "q": f"{seed} of {variant}", "a": "1"} for seed in "xy"]
        (folder / "rows.json").write_text(json.dumps(rows))
    name = write_benchmark(
        tmp_path, splits={"test": {"rows": 6}}, each={"variant": [1, 2, 3]}, layouts=[{"files": ["v{variant}/rows.json"]}],
        image=None, groups=["variant"], id="{id}/{variant}", cluster="id", record={"seed": "id", "variant": "variant"},
    )  # fmt: skip
    found = load_benchmark(name, tmp_path)
    assert [(s.id, s.cluster, s.groups, s.record["variant"]) for s in found["test"]] == [
        ("x/1", "x", {"variant": "1"}, 1),
        ("x/3", "x", {"variant": "3"}, 3),
        ("y/1", "y", {"variant": "1"}, 1),
        ("y/3", "y", {"variant": "3"}, 3),
    ]
    assert found.remarks[0] == "mine, split test: 1 of 3 parts is not there (variant 2)."


def test_groups_of_nested_columns_lists_and_bands(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "meta": {"skills": ["a", "b"], "task": " t "}, "grade": 7}]
    groups = [
        "meta.skills",
        "meta.task",
        "absent?",
        {"band": [{"when": {"grade": {"max": 6}}, "text": "low"}, {"text": "high"}]},
    ]
    name = write_benchmark(tmp_path, rows, groups=groups)
    assert load_benchmark(name, tmp_path)["test"][0].groups == {"skills": ("a", "b"), "task": "t", "band": "high"}


SETS: list[tuple[str, str, int, str, str]] = [  # (name, folder below the data pack, rows, first id, layout)
    ("mathvista", "mathvista", 62, "9", "original"),
    ("mathvista", "hub_parquet/AI4Math--MathVista", 24, "55", "hub"),
    ("mathverse:testmini_text_only", "mathverse", 60, "text-only-1", "original"),
    ("mathvision", "mathvision", 253, "5", "original"),
    ("mathvision:testmini", "mathvision", 180, "5", "original"),
    ("mathvision:testmini", "hub_parquet", 24, "7", "hub"),
    ("wemath", "wemath", 134, "2steps_6/2steps_1", "original"),
    ("dynamath", "dynamath", 240, "9/1", "original"),
    ("dynamath", "hub_parquet", 16, "21/1", "copy of the hub's"),
    ("logicvista", "logicvista", 55, "v1_2", "original"),
    ("geometry3k:train", "geometry3k", 6, "11", "original"),
    ("geometry3k:train", "hub_parquet/hiyouga--geometry3k", 6, "11", "hub"),
    ("tabmwp", "tabmwp", 180, "418", "original"),
    ("puzzlevqa", "puzzlevqa", 105, "images/color_grid/color_grid_0021.png", "original"),
    ("scienceqa", "scienceqa_llava", 130, "62", "LLaVA's"),
]


@pytest.mark.parametrize(("name", "folder", "rows", "first", "layout"), SETS, ids=lambda value: str(value))
def test_a_real_set_loads_in_each_layout_with_every_picture(
    shared: Path, name: str, folder: str, rows: int, first: str, layout: str
) -> None:
    found = load_benchmark(name, shared / folder)
    ((split, samples),) = found.items()
    assert (len(samples), samples[0].id, found.sources[split]["layout"]) == (rows, first, layout)
    assert len({sample.id for sample in samples}) == rows
    whole = {"scienceqa": (70, 130), "mathverse": (0, 60)}.get(name.partition(":")[0], (rows, rows))
    assert (sum(bool(sample.images) for sample in samples), len(samples)) == whole
    for sample in samples:
        for image in sample.images:
            opened = Image.open(io.BytesIO(image["bytes"]) if isinstance(image, dict) else image)
            if sample in (samples[0], samples[-1]):
                opened.load()
    if "hub_parquet" not in folder:  # the folder above all sets does too
        assert [s.id for s in load_benchmark(name, shared)[split]] == [s.id for s in samples]


def test_records_of_both_layouts_are_the_same(shared: Path) -> None:
    pairs = [
        ("mathvista", "mathvista"),
        ("mathvision:testmini", "mathvision"),
        ("dynamath", "dynamath"),
        ("geometry3k:train", "geometry3k"),
    ]
    for name, folder in pairs:
        ((_, own),) = load_benchmark(name, shared / folder).items()
        ((_, hub),) = load_benchmark(name, shared / "hub_parquet").items()
        by_id = {sample.id: sample for sample in own}
        for sample in hub:
            same = by_id[sample.id]
            record = {**same.record, **({"precise_value": None} if folder == "geometry3k" else {})}
            assert (record, text_of(same.messages[0]["content"])) == (
                sample.record,
                text_of(sample.messages[0]["content"]),
            )
            assert sample.groups.items() <= same.groups.items() and sample.cluster == same.cluster


def test_records_are_those_of_the_gold_cases(shared: Path, tmp_path: Path) -> None:
    with open(shared / "scoring_gold" / "dev.jsonl", encoding="utf-8") as file:
        gold = {(case["benchmark"], case["pid"]): case for case in map(json.loads, file)}
    rows = json.loads((shared / "mathvista/results/bard/output_bard.json").read_text("utf-8"))
    answers = tmp_path / "data"
    (answers / "images").mkdir(parents=True)
    (answers / "testmini.json").write_text(json.dumps(rows))
    for row in rows.values():
        Image.new("RGB", (4, 4)).save(answers / row["image"], format="PNG")
    folders = [
        (tmp_path, "mathvista"),
        *((shared, name) for name in ("mathvista", "mathvision", "tabmwp", "logicvista")),
    ]
    keys = ("question", "choices", "question_type", "answer_type", "precision", "unit", "gold_answer")
    compared = []
    for folder, name in folders:
        ((_, samples),) = load_benchmark(name, folder).items()
        here = [(sample, gold[name, sample.id]) for sample in samples if (name, sample.id) in gold]
        compared.append(len(here))
        for sample, case in here:
            assert {key: sample.record[key] for key in keys} == {key: case[key] for key in keys}
    assert compared == [176, 60, 106, 78, 31]


def test_the_real_data_folder_of_another_split_is_said(shared: Path) -> None:
    with pytest.raises(
        CardError, match=r"split testmini: nothing of it is in .*Its split testmini_text_only is there: mathverse:testm"
    ):
        load_benchmark("mathverse", shared / "mathverse")
    with pytest.raises(
        CardError,
        match=r"Looked for: data/testmini\.json in it: there, but its rows have no 'choices', 'question_type'",
    ):
        load_benchmark("mathvista", shared / "wemath")


def test_real_tabmwp_rows_load_as_the_recipe_asks_them(shared: Path) -> None:
    samples = load_benchmark("tabmwp", shared / "tabmwp")["test"]
    by_id = {sample.id: sample for sample in samples}
    assert by_id["418"].messages[0]["content"][0] == {"type": "image"}
    assert text_of(by_id["418"].messages[0]["content"]).endswith("cost on Wednesday than on Thursday? (Unit: $)")
    assert text_of(by_id["620"].messages[0]["content"]).endswith("a hair tie and a comb?\nOptions: (A) yes (B) no")
    assert by_id["620"].record["gold_answer"] == "yes"
    assert by_id["620"].groups == {"ques_type": "multi_choice", "ans_type": "boolean_text", "grades": "1-6"}
