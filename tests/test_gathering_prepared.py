"""Gathering from what was really prepared: the same examples, lengths and account as from the files, without opening a row."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from vlm_dft import gathering
from vlm_dft.collators import ChatCollator
from vlm_dft.errors import CardError
from vlm_dft.gathering import gather
from vlm_dft.prepared import Prepared
from vlm_dft.preparing import prepare
from vlm_dft.recipes import read_recipe


@pytest.fixture
def collator(processor: Any) -> ChatCollator:
    return ChatCollator(processor, max_length=90, too_long="drop")


@pytest.fixture
def card(tmp_path: Path) -> dict[str, Any]:
    """Thirty rows with pictures inside, of which three are there twice and one is too long."""
    rows = []
    for k in range(30):
        Image.new("RGB", (56 + 28 * (k % 3), 56), (9 * (k % 27), 0, 0)).save(tmp_path / "a.png")
        raw = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
        said = [
            {"role": "user", "content": f"<image>{k % 27}?"},
            {"role": "assistant", "content": "One. " * (90 if k == 8 else k % 4 + 1)},
        ]
        said[1]["content"] = said[1]["content"] if k == 8 else "One. " * ((k % 27) % 4 + 1)
        rows.append(
            {
                "id": f"r{k}",
                "messages": said,
                "images": [f"data:image/png;base64,{raw}"] if k % 5 else [],
            }
        )
        if not k % 5:
            said[0]["content"] = f"{k % 27}?"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {
        "description": "d",
        "licence": "mine",
        "source": {"files": ["rows.jsonl"]},
        "messages": None,
        "images": "images",
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    return read_recipe(str(tmp_path / "own.yaml"))


def comparable(examples: Any) -> list[Any]:
    def raw(image: Any) -> bytes:
        return image["bytes"] if isinstance(image, dict) else base64.b64decode(image.partition(",")[2])

    return [(e.id, e.source, e.messages, [raw(image) for image in e.images]) for e in examples]


def test_a_prepared_set_gives_what_its_files_give(
    tmp_path: Path, collator: ChatCollator, card: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gather(card, str(tmp_path), collator)
    prepare(card, str(tmp_path), tmp_path / "set", collator=collator)
    opened: list[Any] = []
    real = Prepared.__getitems__
    monkeypatch.setattr(Prepared, "__getitems__", lambda self, places: opened.append(places) or real(self, places))
    stored = gather(read_recipe(str(tmp_path / "set")), None, collator)
    assert opened == []
    assert comparable(stored.examples) == comparable(plain.examples) and stored.lengths == plain.lengths
    mine, theirs = stored.accounting["sources"][0], plain.accounting["sources"][0]
    assert mine == theirs and mine["dropped"] and mine["duplicates"]["rows"] == 2
    assert stored.examples.media == plain.examples.media and stored.examples.sources == plain.examples.sources


def test_it_is_measured_again_for_a_collator_of_other_settings(
    tmp_path: Path, collator: ChatCollator, card: dict[str, Any]
) -> None:
    prepare(card, str(tmp_path), tmp_path / "set", collator=collator)
    limit = sorted(gather(card, str(tmp_path), collator).lengths)[15]
    for policy in ("drop", "downscale"):
        other = ChatCollator(collator.processor, max_length=limit, too_long=policy)
        told: list[str] = []
        stored = gather(read_recipe(str(tmp_path / "set")), None, other, echo=told.append)
        plain = gather(card, str(tmp_path), other)
        assert stored.lengths == plain.lengths and [e.id for e in stored.examples] == [e.id for e in plain.examples]
        assert [e.messages for e in stored.examples] == [e.messages for e in plain.examples]
        assert "are measured again" in told[0]


def test_pictures_in_the_rows_that_are_too_many_for_memory_are_prepared_in_the_cache_once(
    tmp_path: Path, collator: ChatCollator, card: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_DFT_CACHE", str(tmp_path / "cache"))
    plain = gather(card, str(tmp_path), collator)
    monkeypatch.setattr(gathering, "EMBEDDED", 1000)
    told: list[str] = []
    for _ in range(2):
        stored = gather(card, str(tmp_path), collator, workers=0, echo=told.append)
        assert comparable(stored.examples) == comparable(plain.examples) and stored.lengths == plain.lengths
    assert len(list((tmp_path / "cache" / "prepared").iterdir())) == 1 and any(
        "prepared already" in line for line in told
    )


def test_rows_that_are_there_twice_are_left_out_of_the_prepared_form_too(
    tmp_path: Path, collator: ChatCollator, card: dict[str, Any]
) -> None:
    once = {**card, "duplicates": "drop"}
    prepare(once, str(tmp_path), tmp_path / "set", collator=collator)
    stored, plain = gather(read_recipe(str(tmp_path / "set")), None, collator), gather(once, str(tmp_path), collator)
    assert [e.id for e in stored.examples] == [e.id for e in plain.examples]
    assert stored.accounting["sources"][0]["dropped"] == plain.accounting["sources"][0]["dropped"]


def test_a_mixture_drops_the_rows_that_its_prepared_source_holds_twice(
    tmp_path: Path, collator: ChatCollator, card: dict[str, Any]
) -> None:
    prepare(card, str(tmp_path), tmp_path / "set", collator=collator)
    once = gather({**card, "duplicates": "drop"}, str(tmp_path), collator)
    mixture = {"description": "d", "licence": "l", "duplicates": "drop", "mixture": [{"recipe": "set"}]}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    read = read_recipe(str(tmp_path / "mixture.yaml"))
    stored = gather(read, None, collator)
    assert sorted(e.id for e in stored.examples) == sorted(e.id for e in once.examples) and len(once.examples) == 27
    (account,) = stored.accounting["sources"]
    assert account["dropped"]["the same as an earlier row"]["rows"] == 2 and account["used"] == 27
    lengths = [collator.measure(example).tokens for example in stored.examples]
    assert stored.lengths == lengths and account["tokens"]["all"] == sum(lengths)
    other = ChatCollator(collator.processor, max_length=80, too_long="shorten_answer")
    again = gather(read, None, other)
    assert again.lengths == [len(other([example])["input_ids"][0]) for example in again.examples]
    assert [e.id for e in again.examples if e.id in ("r28", "r29")] == []


def test_a_set_prepared_again_of_a_picture_that_was_replaced_is_another(tmp_path: Path, collator: ChatCollator) -> None:
    said = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "One."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "r", "messages": said, "images": ["a.bmp"]}))
    card = {
        "description": "d",
        "licence": "l",
        "source": {"files": ["rows.jsonl"]},
        "messages": None,
        "images": "images",
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(card))
    prints = []
    for colour in ("red", "blue"):  # of the same number of bytes
        Image.new("RGB", (56, 56), colour).save(tmp_path / "a.bmp")
        prepare(read_recipe(str(tmp_path / "own.yaml")), str(tmp_path), tmp_path / colour, collator=collator)
        prints.append(gather(read_recipe(str(tmp_path / colour)), None, collator).fingerprint)
    assert prints[0] != prints[1]


@pytest.mark.parametrize("prepared", [False, True])
def test_of_rows_that_a_mixture_leaves_out_nothing_is_said_to_have_been_changed(
    prepared: bool, tmp_path: Path, processor: Any, card: dict[str, Any]
) -> None:
    cutting = ChatCollator(processor, max_length=36, too_long="shorten_answer")
    whole = gather(card, str(tmp_path), cutting)
    before = {row for rows in whole.accounts[0].changed.values() for row in rows.ids}
    prepare(card, str(tmp_path), tmp_path / "set", collator=cutting)
    entry = {"recipe": "set" if prepared else "own.yaml", "cap": 12, "name": "few"}
    mixture = {"description": "d", "licence": "l", "mixture": [entry]}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    found = gather(read_recipe(str(tmp_path / "mixture.yaml")), str(tmp_path), cutting)
    used = {example.id for example in found.examples}
    (account,) = found.accounts
    assert len(used) == account.used == 12 and before - used and before & used
    assert {row for rows in account.changed.values() for row in rows.ids} == before & used
    assert sum(rows.rows for rows in account.changed.values()) == len(before & used)


def test_a_folder_with_pictures_in_an_archive_may_move_during_a_run(tmp_path: Path, collator: ChatCollator) -> None:
    import shutil
    import zipfile

    (tmp_path / "data").mkdir()
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "data/pictures.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    said = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "One."}]
    (tmp_path / "data/rows.jsonl").write_text(json.dumps({"id": "r", "messages": said, "images": ["a.png"]}))
    source = {"source": {"files": ["rows.jsonl"]}, "messages": None, "images": "images", "image_root": "pictures.zip"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"description": "d", "licence": "l", **source}))
    read = read_recipe(str(tmp_path / "own.yaml"))
    first = gather(read, str(tmp_path / "data"), collator).fingerprint
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    assert gather(read, str(tmp_path / "elsewhere"), collator).fingerprint == first


def test_a_card_names_a_prepared_set_from_where_it_lies_and_says_nothing_that_would_be_ignored(
    tmp_path: Path, collator: ChatCollator, card: dict[str, Any]
) -> None:
    prepare(card, str(tmp_path), tmp_path / "set", collator=collator)
    own = {"description": "mine", "licence": "l", "source": {"prepared": "set"}}
    (tmp_path / "stored.yaml").write_text(yaml.safe_dump(own))
    read = read_recipe(str(tmp_path / "stored.yaml"))
    assert read["description"] == "mine" and len(gather(read, None, collator).examples) == 29
    for more in ({"objective": "nll"}, {"keep": {"id": "r1"}}, {"system": "Be brief."}, {"weight": 2}):
        (tmp_path / "stored.yaml").write_text(yaml.safe_dump({**own, **more}))
        with pytest.raises(CardError, match=f"{next(iter(more))} cannot be said of a prepared set"):
            read_recipe(str(tmp_path / "stored.yaml"))
    (tmp_path / "stored.yaml").write_text(yaml.safe_dump({**own, "source": {"prepared": ["set"]}}))
    with pytest.raises(CardError, match="must be a folder or a URL"):
        read_recipe(str(tmp_path / "stored.yaml"))
