"""Gathering: every row looked at, all faults in one error, duplicates counted, sources mixed into one lazy sequence, and accounts that add up."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import re
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from vlm_dft import gathering
from vlm_dft.accounting import MOST_IDS, Accounting, account_lines, account_table, whole
from vlm_dft.chat import Example
from vlm_dft.collators import ChatCollator
from vlm_dft.errors import RowError
from vlm_dft.gathering import Gathered, gather
from vlm_dft.mixed import Mixed, media_of, places_by_source, sources_of
from vlm_dft.recipes import read_recipe

Row = dict[str, Any]


def said(text: str, answer: str = "Two.", **more: Any) -> Row:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], **more}


def rows_file(folder: Path, name: str, rows: Sequence[Row]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def card_of(folder: Path, name: str, rows: Sequence[Row], **more: Any) -> str:
    rows_file(folder, name, rows)
    card = {"description": "d", "licence": "mine", "source": {"files": [f"{name}.jsonl"]}, "messages": None, **more}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(card))
    return f"{name}.yaml"


def mixture_of(folder: Path, entries: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    (folder / "mixture.yaml").write_text(
        yaml.safe_dump({"description": "d", "licence": "all", "mixture": entries, **more})
    )
    return read_recipe(str(folder / "mixture.yaml"))


def picture(folder: Path, name: str, colour: str = "red", side: int = 56) -> str:
    Image.new("RGB", (side, side), colour).save(folder / name)
    return name


@pytest.fixture(scope="module")
def collator() -> ChatCollator:
    from vlm_dft.models import load_processor

    return ChatCollator(load_processor("tiny"), max_length=200, too_long="drop")


def ids(examples: Sequence[Example]) -> list[str]:
    return [example.id for example in examples]


# What is wrong


FAULTY = [
    said("a", id="good"),
    said("<image>b", id="gone", images=["gone.png"]),
    said("c", answer="", id="empty"),
    said("d", id="good too"),
    said("<image>e", id="broken", images=["broken.png"]),
    said("<image>f", id="gone too", images=["gone.png"]),
]


def faulty(folder: Path, **more: Any) -> str:
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more of it")
    return str(folder / card_of(folder, "faulty", FAULTY, images="images", **more))


def test_rows_that_cannot_be_used_are_refused_together_after_all_were_looked_at(
    tmp_path: Path, collator: ChatCollator
) -> None:
    with pytest.raises(RowError) as error:
        gather(read_recipe(faulty(tmp_path)), str(tmp_path), collator)
    first, rest = str(error.value).split("\n")
    assert "faulty row gone: no image file at" in first  # the first of them, in full
    assert (
        rest.startswith("4 of 6 rows cannot be used: ") and "(gone, " in rest and "empty" in rest and "broken" in rest
    )
    assert "`bad_rows: drop` in a copy of the card, or --bad_rows drop" in rest


@pytest.mark.parametrize("place", ["card", "run"])
def test_or_they_are_dropped_and_accounted_for_where_that_is_said(
    tmp_path: Path, collator: ChatCollator, place: str
) -> None:
    card = read_recipe(faulty(tmp_path, **({"bad_rows": "drop"} if place == "card" else {})))
    found = gather(card, str(tmp_path), collator, bad_rows="drop" if place == "run" else None)
    assert ids(found.examples) == ["good", "good too"]
    (account,) = found.accounts
    dropped = sorted(row for rows in account.dropped.values() for row in rows.ids)
    assert dropped == ["broken", "empty", "gone", "gone too"] and (account.read, account.used) == (6, 2)


def test_the_run_s_word_is_over_the_card_s(tmp_path: Path, collator: ChatCollator) -> None:
    with pytest.raises(RowError, match="4 of 6 rows cannot be used"):
        gather(read_recipe(faulty(tmp_path, bad_rows="drop")), str(tmp_path), collator, bad_rows="refuse")


def test_the_faults_of_all_sources_of_a_mixture_are_told_at_once(tmp_path: Path, collator: ChatCollator) -> None:
    faulty(tmp_path)
    one = card_of(tmp_path, "one", [said("x", answer="", id="first"), said("y")])
    card = mixture_of(tmp_path, [{"recipe": one}, {"recipe": "faulty.yaml"}])
    with pytest.raises(RowError, match=r"5 of 8 rows cannot be used: .*one first.*faulty gone"):
        gather(card, str(tmp_path), collator)


@pytest.mark.parametrize("workers", [None, 0, 1, 3])
def test_the_result_does_not_depend_on_the_number_of_workers(
    tmp_path: Path, collator: ChatCollator, workers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "spare_workers", lambda: 2)
    rows = [
        said(f"<image>{k % 90}", id=k, images=[picture(tmp_path, f"{k % 5}.png", side=56 + 28 * (k % 5))])
        for k in range(200)
    ]
    rows += [said("z " * 300, id="long")]
    card = mixture_of(
        tmp_path,
        [{"recipe": card_of(tmp_path, "a", rows, images="images"), "cap": 150}, {"recipe": card_of(tmp_path, "b", FAULTY[:1] * 9), "repeat": 2.5}],
    )  # fmt: skip
    found = gather(card, str(tmp_path), collator, workers=workers, seed=3)
    assert found.fingerprint == gather(card, str(tmp_path), collator, workers=0, seed=3).fingerprint
    assert found.accounting["sources"][0]["dropped"]["over max_length = 200 tokens"] == {"rows": 1, "ids": ["long"]}
    assert (
        found.accounting["sources"][0]["duplicates"]["rows"] == 110
    )  # 200 rows of 90 different questions and pictures
    assert gather(card, str(tmp_path), collator, workers=0, seed=4).fingerprint != found.fingerprint


def test_a_limit_is_of_the_first_rows_of_every_source(tmp_path: Path, collator: ChatCollator) -> None:
    cards = [card_of(tmp_path, name, [said(f"{name}{k}", id=f"{name}{k}") for k in range(9)]) for name in "ab"]
    card = mixture_of(tmp_path, [{"recipe": one} for one in cards])
    assert sorted(ids(gather(card, str(tmp_path), collator, limit=2).examples)) == ["a0", "a1", "b0", "b1"]


# Duplicates


def test_rows_of_the_same_words_and_pictures_are_counted_and_dropped_only_where_the_card_says_so(
    tmp_path: Path, collator: ChatCollator
) -> None:
    for name, colour in (("a.png", "red"), ("copy.png", "red"), ("other.png", "tan")):
        file = tmp_path / picture(tmp_path, name, colour)
        file.write_bytes(file.read_bytes().ljust(400, b"\0"))  # of one size: told apart by content
    raw = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    rows = [
        said("<image>How many?", id=0, images=["a.png"]),
        said("<image>How many?", id="other picture", images=["other.png"]),
        said("<image>How many?", id="other file", images=["copy.png"]),
        said("<image>How many?", id="same file", images=["a.png"]),
        said("<image>How much?", id="other words", images=["a.png"]),
        said("<image>How many?", answer="3.", id="other answer", images=["a.png"]),
        said("<image>How many?", id="inside", images=[f"data:image/png;base64,{raw}"]),
        said("<image>How many?", id="inside again", images=[f"data:image/png;base64,{raw}"]),
    ]
    card = read_recipe(str(tmp_path / card_of(tmp_path, "rows", rows, images="images")))
    found = gather(card, str(tmp_path), collator)
    assert found.accounting["sources"][0]["duplicates"] == {
        "rows": 3,
        "ids": ["other file", "same file", "inside again"],
    }
    assert len(found.examples) == 8 and found.accounting["total"]["duplicates"] == 3
    once = gather({**card, "duplicates": "drop"}, str(tmp_path), collator)
    assert ids(once.examples) == ["0", "other picture", "other words", "other answer", "inside"]
    assert once.accounts[0].dropped["the same as an earlier row"].ids == ["other file", "same file", "inside again"]


# Mixtures


def three(folder: Path, **more: Any) -> dict[str, Any]:
    rows = {
        "pictures": [said(f"<image>{k}", id=f"p{k}", images=[picture(folder, "a.png")]) for k in range(6)],
        "texts": [said(f"t{k}", answer="long words " * 5, id=f"t{k}", source="own") for k in range(20)],
        "few": [said(f"f{k}", id=f"f{k}") for k in range(3)],
    }
    cards = {name: card_of(folder, name, own) for name, own in rows.items()}
    entries = [
        {"recipe": cards["pictures"], "objective": "nll", "loss_weight": 0.5}, {"recipe": cards["texts"], "cap": 7, "name": "words"},
        {"recipe": cards["few"], "repeat": 2},
    ]  # fmt: skip
    return mixture_of(folder, entries, **more)


def test_examples_of_a_mixture_carry_their_entry_s_name_objective_and_factor(
    tmp_path: Path, collator: ChatCollator
) -> None:
    examples = gather(three(tmp_path), str(tmp_path), collator).examples
    assert Counter(example.source for example in examples) == {"pictures": 6, "words": 7, "few": 6}
    for example in examples:
        answer = example.messages[-1]
        wanted = ("nll", 0.5) if example.source == "pictures" else (None, None)
        assert (answer.get("objective"), answer.get("weight")) == wanted and "objective" not in example.messages[0]
    batch = collator([example for example in examples if example.source == "pictures"][:1])
    assert set(batch["loss_weights"][batch["labels"] != -100].tolist()) == {0.5}


def test_a_row_s_own_factor_is_multiplied(tmp_path: Path, collator: ChatCollator) -> None:
    row = said("a")
    row["messages"][1]["weight"] = 3.0
    card = mixture_of(tmp_path, [{"recipe": card_of(tmp_path, "one", [row]), "loss_weight": 0.5}])
    assert gather(card, str(tmp_path), collator).examples[0].messages[1]["weight"] == 1.5


def test_the_sequence_gives_the_same_examples_one_by_one_in_batches_in_slices_and_after_pickling(
    tmp_path: Path, collator: ChatCollator
) -> None:
    found = gather(three(tmp_path), str(tmp_path), collator)
    mixed, all_ids = found.examples, ids(list(found.examples))
    assert len(mixed) == len(all_ids) == 19 == len(found.lengths)
    assert ids(mixed.__getitems__([5, 0, 5, 18])) == [all_ids[k] for k in (5, 0, 5, 18)]
    assert ids(mixed[3:7]) == all_ids[3:7] and mixed[-1].id == all_ids[-1]
    with pytest.raises(IndexError):
        mixed[19]
    again = pickle.loads(pickle.dumps(mixed))
    assert again[4] == mixed[4] and again.fingerprint == mixed.fingerprint
    assert found.lengths == [collator.measure(example).tokens for example in mixed]
    listed = list(mixed)
    assert sources_of(mixed) == sources_of(listed) == list(places_by_source(mixed))
    assert places_by_source(mixed) == places_by_source(listed)
    assert media_of(mixed) == media_of(listed) == {"images": 6, "videos": 0, "text": 13}


def test_the_account_of_a_mixture_adds_up_to_what_its_examples_are(tmp_path: Path, collator: ChatCollator) -> None:
    found = gather(three(tmp_path), str(tmp_path), collator)
    accounting = found.accounting
    measured: dict[str, Counter[str]] = {}
    for example in found.examples:
        one = collator.measure(example)
        measured.setdefault(example.source, Counter()).update(
            all=one.tokens, media=one.media, response=one.targets, text=one.tokens - one.media
        )
    for source in accounting["sources"]:
        assert source["tokens"] == dict(measured[source["source"]])
        assert source["read"] == source["used"] + sum(rows["rows"] for rows in source["dropped"].values())
    pictures, words, few = accounting["sources"]
    assert (words["read"], words["used"], words["examples"]) == (20, 7, 7)
    assert words["dropped"]["over the cap of 7 rows"]["rows"] == 13
    assert (few["used"], few["examples"], few["repeated"]) == (3, 6, 2.0)
    total = accounting["total"]
    assert (total["read"], total["used"], total["examples"]) == (29, 16, 19) and total["order"] == "shuffled"
    responses = sum(own["response"] for own in measured.values())
    assert pictures["response_share"] == pytest.approx(measured["pictures"]["response"] / responses, abs=1e-6)
    assert sum(source["share"] for source in accounting["sources"]) == pytest.approx(1, abs=1e-5)
    lines = account_lines(accounting)
    assert any(line.startswith("words: 13 rows dropped, over the cap of 7 rows (t") for line in lines)


def test_a_curriculum_s_examples_come_entry_after_entry(tmp_path: Path, collator: ChatCollator) -> None:
    examples = gather(three(tmp_path, order="curriculum"), str(tmp_path), collator).examples
    assert [e.source for e in examples] == ["pictures"] * 6 + ["words"] * 7 + ["few"] * 6
    assert ids(examples[:6]) != [f"p{k}" for k in range(6)]


def test_a_single_recipe_keeps_the_order_and_the_sources_of_its_file(tmp_path: Path, collator: ChatCollator) -> None:
    rows = [said(f"{k}", id=k, source="ocr" if k % 2 else "math") for k in range(6)]
    found = gather(read_recipe(rows_file(tmp_path, "set", rows)), None, collator, seed=5)
    assert ids(found.examples) == [str(k) for k in range(6)] and found.examples.sources == ["math", "ocr"]
    assert found.accounting["sources"][0]["used_by_source"] == {"math": 3, "ocr": 3}
    rows = [said(f"{k}", id=k, source=f"address {k}") for k in range(60)]
    found = gather(read_recipe(rows_file(tmp_path, "set", rows)), None, collator)
    assert {example.source for example in found.examples} == {"set"}
    assert found.accounts[0].notes == {"60 different sources are too many to tell apart (at most 50)": 60}


def test_an_empty_source_is_named(tmp_path: Path, collator: ChatCollator) -> None:
    rows_file(tmp_path, "none", [])
    (tmp_path / "none.jsonl").write_text("[]")
    with pytest.raises(RowError, match="Recipe 'none' has no rows"):
        gather(read_recipe(str(tmp_path / "none.jsonl")), None, collator)


def test_another_process_gathers_the_same(tmp_path: Path, collator: ChatCollator) -> None:
    """As every rank does: nothing hangs on Python's hashes, which differ from process to process."""
    three(tmp_path)
    code = (
        "from vlm_dft.gathering import gather; from vlm_dft.recipes import read_recipe; from vlm_dft.collators import ChatCollator\n"
        "from vlm_dft.models import load_processor; import sys\n"
        "collator = ChatCollator(load_processor('tiny'), max_length=200, too_long='drop')\n"
        "print(gather(read_recipe(sys.argv[1]), sys.argv[2], collator).fingerprint)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "mixture.yaml"), str(tmp_path)]
    other = subprocess.run(
        words, env={**os.environ, "PYTHONHASHSEED": "77"}, capture_output=True, text=True, check=True
    )
    card = read_recipe(str(tmp_path / "mixture.yaml"))
    assert other.stdout.strip() == gather(card, str(tmp_path), collator).fingerprint


# Real sets


def test_a_mixture_of_real_sets_has_the_shares_that_its_card_asks_for(
    shared: Path, tmp_path: Path, processor: Any
) -> None:
    """TabMWP, ScienceQA as LLaVA writes it, and PuzzleVQA; half, 0.2 and 0.3 of the response tokens."""
    science = {
        "description": "d", "licence": "CC BY-NC-SA 4.0", "source": {"files": ["llava_test_CQM-A.json"]}, "messages": "conversations",
        "images": "image", "image_root": "images/test",
    }  # fmt: skip
    (tmp_path / "science.yaml").write_text(yaml.safe_dump(science))
    puzzle = {
        "description": "d", "licence": "MIT", "source": {"files": ["PuzzleVQA/data/color_grid.json", "PuzzleVQA/data/size_cycle.json"]},
        "image": "PuzzleVQA/data/{image}", "prompt": "{question}", "response": "{explanation} {deduction}\nThe answer is {answer}.",
    }  # fmt: skip
    (tmp_path / "puzzle.yaml").write_text(yaml.safe_dump(puzzle))
    entries = [
        {"recipe": "tabmwp", "data": "tabmwp", "share": 0.5},
        {"recipe": "science.yaml", "data": "scienceqa_llava", "share": 0.2, "repeat": 8},
        {"recipe": "puzzle.yaml", "data": "puzzlevqa", "share": 0.3, "repeat": 2},
    ]
    own = ChatCollator(processor, max_length=4096, too_long="drop")
    found = gather(mixture_of(tmp_path, entries), str(shared), own)
    sources = {source["source"]: source for source in found.accounting["sources"]}
    assert {name: source["read"] for name, source in sources.items()} == {"tabmwp": 850, "science": 130, "puzzle": 14}
    longest = max(own.measure(example).targets for example in found.examples)
    tokens = {name: source["tokens"]["response"] for name, source in sources.items()}
    scale = max(tokens["tabmwp"] / 0.5, tokens["science"] / 0.2, tokens["puzzle"] / 0.3)
    for name, share in (("tabmwp", 0.5), ("science", 0.2), ("puzzle", 0.3)):
        assert 0 <= scale * share - tokens[name] < longest
    used_up = [s for s in sources.values() if not any("left out" in why for why in s["dropped"])]
    assert used_up and all(rows["rows"] for source in sources.values() for rows in source["dropped"].values())
    batch = own(found.examples[:4])  # with all proofs
    assert (batch["labels"] != -100).any(1).all()


# Pictures in the rows


class FakePrepared(Sequence[Example]):
    """What prepared.Prepared offers, in memory."""

    def __init__(self, examples: list[Example], tokens: list[tuple[int, int, int]], settings: Any) -> None:
        self.examples, self.measured_with, self.opened = examples, settings, 0
        self.fingerprint, self.card, self.store = "f" * 64, {"name": "stored"}, self
        self.shards: list[dict[str, str]] = []
        gone, none = {"image missing": {"rows": 1, "ids": ["x"]}}, {"rows": 0, "ids": []}
        self.accounting = {
            "source": "stored", "read": len(examples) + 1, "used": len(examples), "dropped": gone, "changed": {}, "notes": {}, "tokens": {},
            "used_by_source": {}, "duplicates": none,
        }  # fmt: skip
        self.tokens = tokens

    def read(self, name: str) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        assert name == "index.parquet"
        columns: dict[str, Any] = {"id": [e.id for e in self.examples], "source": [e.source for e in self.examples]}
        for k, column in enumerate(("tokens", "media", "response")):
            columns[column] = pa.array([row[k] for row in self.tokens], pa.int32())
        kinds = [[0] * len(e.images) + [1] * len(e.videos) for e in self.examples]
        columns["part_kind"] = pa.array(kinds, pa.list_(pa.int8()))
        columns["changed"] = pa.array([[] for _ in self.examples], pa.list_(pa.string()))
        columns["likeness"] = pa.array([bytes(16)] * len(self.examples), pa.binary(16))
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file)
        return file.getvalue()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, k: Any) -> Any:
        self.opened += 1
        return self.examples[k]

    def __getitems__(self, places: Sequence[int]) -> list[Example]:
        return [self[place] for place in places]


def embedded(count: int) -> list[Example]:
    found = []
    for k in range(count):
        file = io.BytesIO()
        Image.new("RGB", (56 + 112 * (k % 3), 112), (k % 255, 0, 0)).save(file, "PNG")
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{k}?"}]}
        answer = {"role": "assistant", "content": "One. " * (1 + k % 2)}
        found.append(Example([asked, answer], [{"bytes": file.getvalue(), "path": None}], id=f"e{k}", source="stored"))
    return found


@pytest.fixture
def prepared_modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins of the modules that prepare and open: {"opened": set, "asked": words of prepare}."""
    found: dict[str, Any] = {}
    for name, functions in (
        ("ingredients", {"collator_settings": lambda collator: {"max_length": collator.max_length},
                         "cache_folder": lambda card, data, collator, limit: Path("/cache") / card["name"]}),
        ("preparing", {"prepare": lambda *words, **more: found.update(asked=(words, more))}),
        ("prepared", {"open_prepared": lambda place: found.update(place=place) or found["set"]}),
    ):  # fmt: skip
        module = types.ModuleType(f"vlm_dft.{name}")
        for key, function in functions.items():
            setattr(module, key, function)
        monkeypatch.setitem(sys.modules, f"vlm_dft.{name}", module)
        monkeypatch.setattr(f"vlm_dft.{name}", module, raising=False)
    return found


STORED = {"name": "stored", "description": "d", "licence": "mine", "source": {"prepared": "sets/stored"}}


def measured_by(collator: ChatCollator, examples: list[Example]) -> list[tuple[int, int, int]]:
    found = map(collator.measure, examples)
    return [(one.tokens, one.media, one.targets) for one in found]


def test_a_prepared_source_is_taken_as_it_was_measured_and_not_opened(
    collator: ChatCollator, prepared_modules: dict[str, Any]
) -> None:
    examples = embedded(12)
    rows = FakePrepared(examples, measured_by(collator, examples), {"max_length": 200})
    prepared_modules["set"] = rows
    told: list[Any] = []
    found = gather(STORED, "/data", collator, echo=told.append)
    assert prepared_modules["place"] == "sets/stored" and rows.opened == 0 and told == []
    assert found.lengths == [collator.measure(example).tokens for example in examples]
    (account,) = found.accounts
    assert (account.read, account.used, account.dropped["image missing"].rows) == (13, 12, 1)
    assert account.tokens["response"] == sum(collator.measure(example).targets for example in examples)
    assert found.examples.media == {"images": 12, "videos": 0, "text": 0}
    assert ids(found.examples[2:4]) == ["e2", "e3"] and rows.opened == 2


def test_one_that_was_measured_otherwise_is_measured_again_and_says_so(
    collator: ChatCollator, prepared_modules: dict[str, Any]
) -> None:
    examples = embedded(12)
    lengths = [collator.measure(example).tokens for example in examples]
    limit = sorted(lengths)[6]
    other = ChatCollator(collator.processor, max_length=limit, too_long="drop")
    prepared_modules["set"] = FakePrepared(examples, measured_by(collator, examples), {"max_length": 200})
    told: list[str] = []
    found = gather(STORED, "/data", other, echo=told.append)
    fitting = [example.id for example, length in zip(examples, lengths, strict=True) if length <= limit]
    assert 0 < len(fitting) < 12 and ids(found.examples) == fitting
    assert "12 examples are measured again; what was over max_length = 200 then stays dropped" in told[0]
    (account,) = found.accounts
    assert account.dropped[f"over max_length = {limit} tokens"].rows == 12 - len(fitting)
    smaller = ChatCollator(collator.processor, max_length=limit, too_long="downscale")
    found = gather(STORED, "/data", smaller)
    changed = {row for rows in found.accounts[0].changed.values() for row in rows.ids}
    assert changed and all(smaller.measure(example).tokens <= limit for example in found.examples)
    assert found.lengths == [smaller.measure(example).tokens for example in found.examples]


def test_a_prepared_source_is_mixed_with_others(
    tmp_path: Path, collator: ChatCollator, prepared_modules: dict[str, Any]
) -> None:
    examples = embedded(12)
    rows = FakePrepared(examples, measured_by(collator, examples), {"max_length": 200})
    prepared_modules["set"] = rows
    few, other = (card_of(tmp_path, name, [said(f"f{k}") for k in range(3)]) for name in ("few", "stored"))
    card = mixture_of(tmp_path, [{"recipe": other, "weight": 2}, {"recipe": few, "weight": 1}])
    card["mixture"][0]["card"] = STORED
    found = gather(card, str(tmp_path), collator)
    assert rows.opened == 0 and Counter(found.accounts[0].sources) == {"stored": 6}
    assert Counter(example.source for example in found.examples) == {"stored": 6, "few": 3}


def test_pictures_in_the_rows_stay_in_memory_while_they_are_small_and_are_prepared_where_they_are_not(
    tmp_path: Path, collator: ChatCollator, prepared_modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = base64.b64encode((tmp_path / picture(tmp_path, "a.png")).read_bytes()).decode()
    rows = [said(f"<image>{k}", id=k, images=[f"data:image/png;base64,{raw}"]) for k in range(20)]
    card = read_recipe(str(tmp_path / card_of(tmp_path, "own", rows, images="images")))
    found = gather(card, str(tmp_path), collator)
    assert len(found.examples) == 20 and "asked" not in prepared_modules
    examples = embedded(4)
    prepared_modules["set"] = FakePrepared(examples, measured_by(collator, examples), {"max_length": 200})
    monkeypatch.setattr(gathering, "EMBEDDED", 10 * len(raw))
    told: list[str] = []
    found = gather(card, str(tmp_path), collator, bad_rows="drop", limit=18, workers=0, echo=told.append)
    (words, more) = prepared_modules["asked"]
    assert words[0]["name"] == "own" and words[2] == Path("/cache/own") and prepared_modules["place"] == "/cache/own"
    assert (more["bad_rows"], more["limit"], more["workers"]) == ("drop", 18, 0)
    assert "prepared in" in told[0] and len(found.examples) == 4


# The account


def test_ids_are_kept_up_to_a_bound_and_the_count_is_exact() -> None:
    account = Accounting("set", read=3_000)
    for k in range(3_000):
        account.drop("too long", str(k))
    assert account.as_dict()["dropped"]["too long"]["rows"] == 3_000
    assert account.as_dict()["dropped"]["too long"]["ids"] == [str(k) for k in range(MOST_IDS)]
    account.check()
    more = Accounting.from_dict(json.loads(json.dumps(account.as_dict())))
    assert more == Accounting.from_dict(more.as_dict()) and more.dropped["too long"].rows == 3_000
    account.merge(more)
    assert account.read == 6_000 and len(account.dropped["too long"].ids) == MOST_IDS
    account.check()


def test_a_row_that_is_lost_is_a_bug_of_ours() -> None:
    lost = Accounting("set", read=3, used=1)
    lost.drop("too long", "1")
    with pytest.raises(AssertionError, match="set: 3 rows read, 1 used, .*: 1 are not accounted for"):
        whole([lost], fingerprint="")


def test_the_table_has_a_row_for_each_source_and_one_for_all(tmp_path: Path, collator: ChatCollator) -> None:
    from rich.console import Console

    found = gather(three(tmp_path), str(tmp_path), collator)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(account_table(found.accounting))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines[0] == [
        "source",
        "read",
        "used",
        "dropped",
        "duplicates",
        "examples",
        "tokens",
        "text",
        "media",
        "response",
        "share",
    ]
    named = {line[0]: line[1:] for line in lines[2:]}
    assert named["few"][:6] == ["3", "3", "0", "0", "6", "(2.00x)"] and named["all"][:4] == ["29", "16", "13", "0"]


def test_numbers_of_an_account_are_plain(tmp_path: Path, collator: ChatCollator) -> None:
    found: Gathered = gather(three(tmp_path), str(tmp_path), collator)
    json.dumps(found.accounting)
    assert not re.search("int64|array", repr(found.accounting)) and isinstance(found.lengths[0], int)
    assert isinstance(found.examples, Mixed) and found.examples.part.dtype == np.int64


def test_an_id_that_stands_for_several_rows_is_said(tmp_path: Path, collator: ChatCollator) -> None:
    card = card_of(tmp_path, "own", [said("a", id=1), said("b", id=1), said("c", id=2)])
    found = gather(read_recipe(str(tmp_path / card)), str(tmp_path), collator)
    assert found.accounts[0].notes == {"the same id as an earlier row: an id in this account may mean several": 1}
    assert found.accounts[0].used == 3


def test_a_run_says_of_every_source_where_it_is_read_from_and_in_which_format(tmp_path: Path, processor: Any) -> None:
    from vlm_dft.config import TrainConfig
    from vlm_dft.pipeline import gather_for

    for name in ("one", "two"):
        card_of(tmp_path, name, [said("a")])
    card = mixture_of(tmp_path, [{"recipe": "one.yaml"}, {"recipe": "two.yaml"}])
    lines: list[Any] = []
    gather_for(TrainConfig(data=str(tmp_path)), card, processor, lines.append)
    form = "format messages: column 'messages' holds turns of role and content"
    assert lines[:2] == [f"      one: 1 file: one.jsonl; {form}", f"      two: 1 file: two.jsonl; {form}"]
