"""Benchmark cards: what a card may say, which splits a name means, where the rows may lie, and columns under other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlm_dft.benchmark_cards import read_benchmark
from vlm_dft.benchmarks import load_benchmark
from vlm_dft.cards import list_cards
from vlm_dft.cli import main
from vlm_dft.errors import CardError, RowError
from vlm_dft.renaming import lettered, renamed, value_at

CARD: dict[str, Any] = {
    "description": "d", "licence": "l", "splits": {"mini": {"rows": 2}, "full": {"rows": 5}}, "default": ["full"], "prompt": "{q}",
    "answer": "a", "scorer": "drawn", "max_new_tokens": 8, "record": {"question": "q"},
    "layouts": [
        {"files": ["data/{split}.json"]},
        {"hub": "some/set", "split": "{split}", "columns": {"q": "ask.text", "a": {"from": "said", "after": "#### "}}},
    ],
}  # fmt: skip


def write(folder: Path, **changes: Any) -> str:
    card = folder / "own.yaml"
    card.write_text(yaml.safe_dump({k: v for k, v in {**CARD, **changes}.items() if v is not None}))
    return str(card)


def rows(folder: Path, name: str, *found: dict[str, Any]) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(list(found)))


def test_there_is_a_card_for_every_benchmark_and_each_says_its_rows() -> None:
    assert set(list_cards("benchmark")) == {
        "drawn", "dynamath", "geometry3k", "gsm8k", "logicvista", "math500", "mathverse", "mathvision", "mathvista", "puzzlevqa",
        "scienceqa", "tabmwp", "wemath",
    }  # fmt: skip
    rows = {
        f"{name}:{split}": said["rows"]
        for name in list_cards("benchmark")
        for split, said in read_benchmark(name)["splits"].items()
    }
    assert rows == {
        "drawn:test": 450, "drawn:ood_large": 270, "drawn:ood_colour": 270, "drawn:ood_render": 270, "dynamath:test": 5010,
        "geometry3k:test": 601, "geometry3k:train": 2101, "gsm8k:test": 1319, "logicvista:test": 448, "math500:test": 500,
        "mathverse:testmini": 3940, "mathverse:testmini_text_only": 788, "mathvision:test": 3040, "mathvision:testmini": 304,
        "mathvista:testmini": 1000, "puzzlevqa:test": 2000, "scienceqa:test": 4241, "tabmwp:test": 7686, "tabmwp:test1k": 1000,
        "wemath:testmini": 1740,
    }  # fmt: skip


def test_every_hub_source_says_a_revision_and_its_card_that_it_moves() -> None:
    for name in list_cards("benchmark"):
        card = read_benchmark(name)
        hubs = [layout for layout in card.get("layouts", []) if "hub" in layout]
        assert all(layout["revision"] == "main" for layout in hubs)
        assert not hubs or "`revision: main` moves" in card["notes"]


def test_a_name_may_choose_splits(tmp_path: Path) -> None:
    assert read_benchmark("mathvision")["chosen"] == ["test"]
    assert read_benchmark("mathvision:testmini")["chosen"] == ["testmini"]
    assert read_benchmark("mathvision:testmini")["name"] == "mathvision:testmini"
    assert read_benchmark("mathvision:test")["name"] == "mathvision"
    assert read_benchmark(write(tmp_path) + ":mini,full")["chosen"] == ["mini", "full"]
    with pytest.raises(
        CardError, match=r"'mathvision': unknown split 'testmin'. Did you mean 'testmini'\? Known: test, testmini"
    ):
        read_benchmark("mathvision:testmin")


def test_the_list_shows_splits_rows_protocols_and_licence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["benchmarks", "--json", str(tmp_path / "list.json")]) == 0
    out = capsys.readouterr().out
    assert (
        "test 3,040 rows (mathvision:testmini 304); protocols official, step_by_step, direct" in out
        and "[CC BY-NC 4.0]" in out
    )
    told = {card["name"]: card for card in json.loads((tmp_path / "list.json").read_text())}
    assert (
        told["mathverse"]["splits"] == {"testmini": 3940, "testmini_text_only": 788}
        and told["drawn"]["licence"] == "Apache-2.0"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": {"mini": {"row": 2}}}, r"split 'mini': unknown key 'row'. Did you mean 'rows'"),
        ({"splits": {"mini": {"rows": 0}}}, "rows must be a whole number above zero, found 0"),
        ({"splits": {"mini": {"rows": 1}}, "layouts": None}, "split 'mini': expected one of files, hub, embedded"),
        ({"default": ["ful"]}, "default: unknown split 'ful'. Did you mean 'full'"),
        ({"layouts": []}, "layouts: expected a list of places"),
        ({"layouts": [{"file": ["a.json"]}]}, "layouts, 1: unknown key 'file'. Did you mean 'files'"),
        ({"layouts": [{"files": ["a.json"], "hub": "a/b"}]}, "layouts, 1: expected one of files, hub, embedded"),
        ({"layouts": [{"files": ["a.json"], "given": 3}]}, "given: expected columns with a value"),
        ({"each": {"variant": 3}}, r"each: expected one name with a list of values, such as \{variant: \[1, 2\]\}"),
        ({"prompt": None}, "missing prompt, or protocols"),
        ({"protocols": {"official": {"prompt": "{q}"}}}, "prompt beside protocols. Say it in each protocol"),
        ({"prompt": None, "protocols": {"other": {"prompt": "{q}"}}}, "expected one named official, found other"),
        ({"prompt": None, "protocols": {"official": {"prompt": "{q}"}, "b": "oficial"}}, "unknown protocol 'oficial'. Did you mean 'off"),
        ({"metrics": "worst_case"}, "metrics: expected a list of names, found 'worst_case'"),
        ({"groups": [{"band": "x"}]}, "groups, band: expected a list of cases"),
        ({"record": {"unit": {"value": 1, "column": "u"}}}, "record, unit: expected a value or a column"),
        ({"record": {"unit": [{"txt": "x"}]}}, "record, unit, case 1: unknown key 'txt'"),
        ({"id": "{a.b}"}, r"id: \{a.b\} in .* is not a column"),
        ({"system": 3}, "system: expected a text, found 3"),
        ({"unit": ["x"]}, r"unit: expected a text, found \['x'\]"),
        ({"images": 3}, "images: expected a text, found 3"),
        ({"layouts": [{"files": ["a.json"], "folder": 3}]}, "layouts, 1, folder: expected a text, found 3"),
        ({"record": {"unit": {"column": 3}}}, "record, unit: expected a value or a column"),
        ({"splits": {1: {"rows": 2}}}, "split 1: a split's name is a text without comma, colon or slash"),
        ({"splits": {"a,b": {"rows": 2}}}, "split 'a,b': a split's name is a text without comma"),
        ({"default": []}, "default: names no split"),
        ({"empty_gold": "yes"}, "empty_gold: expected true or false"),
    ],
)  # fmt: skip
def test_a_mistaken_card_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CardError, match=message):
        read_benchmark(write(tmp_path, **changes))


def test_each_layout_is_found_in_the_folder_or_below_it_by_what_it_holds(tmp_path: Path) -> None:
    name = write(tmp_path)
    rows(tmp_path, "flat/data/full.json", {"q": "one?", "a": "1"})
    rows(tmp_path, "many/own/data/full.json", {"q": "two?", "a": "2"})
    rows(
        tmp_path,
        "hubs/some--set/data/full-00000-of-00001.json",
        {"ask": {"text": "three?"}, "said": "so #### 3", "a": "no"},
    )
    rows(tmp_path, "copy/data/full.json", {"ask": {"text": "four?"}, "said": "#### 4"})
    for folder, answer, layout in (
        ("flat", "1", "original"),
        ("many", "2", "original"),
        ("hubs", "3", "hub"),
        ("copy", "4", "hub"),
    ):
        found = load_benchmark(name, tmp_path / folder)
        assert [sample.record["gold_answer"] for sample in found["full"]] == [answer]
        assert found.sources["full"]["layout"] == layout


def test_where_nothing_is_the_error_says_what_was_looked_for(tmp_path: Path) -> None:
    name = write(tmp_path)
    rows(tmp_path, "here/data/mini.json", {"q": "one?", "a": "1"})
    with pytest.raises(CardError) as told:
        load_benchmark(name, tmp_path / "here")
    assert "split full: nothing of it is in" in str(told.value)
    assert "Looked for: data/full.json in it; a copy of some/set (split full) in it." in str(told.value)
    assert "Its split mini is there: own:mini. The folder holds: data." in str(told.value)
    rows(tmp_path, "other/data/full.json", {"question": "one?", "a": "1"})
    with pytest.raises(CardError, match=r"data/full.json in it: there, but its rows have no 'q'; a copy of some/set"):
        load_benchmark(name, tmp_path / "other")
    with pytest.raises(CardError, match="no data folder at"):
        load_benchmark(name, tmp_path / "nowhere")
    with pytest.raises(CardError) as told:  # one folder too deep
        load_benchmark(f"{name}:mini", tmp_path / "here/data")
    assert f"It is in the folder above: --data {tmp_path / 'here'}." in str(told.value)


def test_ids_that_two_rows_share_are_refused(tmp_path: Path) -> None:
    name = write(tmp_path, id="{group}/{part}")
    rows(tmp_path, "data/full.json", *({"q": "?", "a": "1", "group": "g", "part": part} for part in (1, 2, 1)))
    with pytest.raises(RowError, match="id 'g/1' is in full and again in full. Ids must be unique"):
        load_benchmark(name, tmp_path)


def test_text_guards_take_their_gold_from_the_files_of_their_authors(tmp_path: Path) -> None:
    lines = [{"question": "How many?", "answer": "2*700=<<2*700=1400>>1400\n#### 1,400"}]
    (tmp_path / "grade_school_math/data").mkdir(parents=True)
    (tmp_path / "grade_school_math/data/test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (sample,) = load_benchmark("gsm8k", tmp_path)["test"]
    assert (sample.record["gold_answer"], sample.images, sample.record["question"]) == ("1,400", [], "How many?")
    line = {
        "problem": "What is $x$?",
        "solution": "s",
        "answer": "\\frac{1}{2}",
        "subject": "Algebra",
        "level": 2,
        "unique_id": "test/a/1.json",
    }
    (tmp_path / "math").mkdir()
    (tmp_path / "math/test.jsonl").write_text(json.dumps(line) + "\n")
    (sample,) = load_benchmark("math500", tmp_path / "math")["test"]
    assert (sample.id, sample.record["gold_answer"], sample.groups) == (
        "test/a/1.json",
        "\\frac{1}{2}",
        {"subject": "Algebra", "level": "2"},
    )
    with pytest.raises(RowError, match=r"test\.jsonl, row 0, column 'answer': no '#### ' in"):
        load_benchmark("gsm8k", tmp_path / "math")


def test_columns_are_read_by_path_and_by_rule() -> None:
    row = {"a.b": 1, "a": {"b": 2, "c": [{"d": "x"}]}, "n": 2, "text": "so #### 1,200 ", "path": "images/venn/1.png"}
    assert (value_at(row, "a.b"), value_at(row, "a.c.0.d")) == (1, "x")
    columns = {
        "d": "a.c.0.d", "letter": {"from": "n", "letter": True}, "gold": {"from": "text", "after": "#### ", "remove": ","},
        "kind": {"from": "path", "split": "/", "part": 1}, "path": "absent.column",
    }  # fmt: skip
    found = renamed(row, columns, where="w")
    assert {key: found[key] for key in ("d", "letter", "gold", "kind")} == {
        "d": "x",
        "letter": "C",
        "gold": "1200",
        "kind": "venn",
    }
    assert "path" not in found and row["path"] == "images/venn/1.png"
    with pytest.raises(RowError, match=r"row 3, column 'text': expected the number of an option, from 0, found"):
        renamed(row, {"x": {"from": "text", "letter": True}}, where="row 3")


def test_options_in_one_text_are_told_apart_by_their_letters() -> None:
    assert lettered("A. 10 cm;B. 15 cm;C. 62.8 cm.; D. No correct answer", where="w") == [
        "10 cm",
        "15 cm",
        "62.8 cm.",
        "No correct answer",
    ]
    shape = "A. First north to ;C.  ;B. First west to ;C. ;C. South; D. No correct answer"
    assert lettered(shape, where="w") == ["First north to ;C.", "First west to ;C.", "South", "No correct answer"]
    with pytest.raises(RowError, match="w: expected options such as 'A. one; B. two', found 'yes or no'"):
        lettered("yes or no", where="w")


def test_the_options_of_every_real_we_math_question_end_with_no_correct_answer(shared: Path) -> None:
    samples = load_benchmark("wemath", shared)["testmini"]
    assert all("No correct answer" in sample.record["choices"][-1] for sample in samples)
    assert all(ord(sample.record["gold_answer"]) - ord("A") < len(sample.record["choices"]) for sample in samples)
    assert {len(sample.record["choices"]) for sample in samples} == {4, 5}
