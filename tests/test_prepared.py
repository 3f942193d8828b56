"""The prepared form: the same examples as unprepared, whatever is killed, raced, damaged or far away."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader

from vlm_dft import preparing, shards
from vlm_dft.chat import Example
from vlm_dft.claims import claimed
from vlm_dft.collators import ChatCollator
from vlm_dft.config import resolve_config
from vlm_dft.errors import CardError, ConfigError, RowError, UserError
from vlm_dft.examining import examine
from vlm_dft.ingredients import cache_folder
from vlm_dft.inspection import inspect_rows
from vlm_dft.order import Split, StepSampler, WithSilentPlaces
from vlm_dft.prepared import open_prepared
from vlm_dft.preparing import prepare
from vlm_dft.progress import read_metrics
from vlm_dft.recipes import load_recipe, outcomes, read_recipe
from vlm_dft.stores import Store
from vlm_dft.training import train_objective

torch.set_num_threads(1)
WORKER = Path(__file__).with_name("prepare_worker.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(WORKER.parent.parent), "TOKENIZERS_PARALLELISM": "false"}


def noise(side: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


def make_set(folder: Path, rows: int = 130, broken: tuple[int, ...] = (), **card: Any) -> dict[str, Any]:
    """Rows of a picture by path, in a folder; those in `broken` name one that is not there."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for k in range(7):
        noise(28 * (1 + k % 3), k).save(folder / f"pictures/{k}.{'jpg' if k == 3 else 'png'}")
    lines = []
    for k in range(rows):
        name = "gone.png" if k in broken else f"pictures/{k % 7}.{'jpg' if k % 7 == 3 else 'png'}"
        lines.append(
            json.dumps({"id": f"r{k}", "image": name, "q": f"What is {k} + 1?", "a": f"{k + 1}. " * (1 + k % 5)})
        )
    (folder / "rows.jsonl").write_text("\n".join(lines))
    words = {"description": "d", "licence": "l", "source": {"files": ["rows.jsonl"]}, "image": "{image}"}
    (folder / "card.yaml").write_text(yaml.safe_dump({**words, "prompt": "{q}", "response": "{a}", **card}))
    return read_recipe(str(folder / "card.yaml"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "SHARD_PLACES", 40)
    monkeypatch.setattr(shards, "GROUP_ROWS", 8)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("kind", ["folder", "file://", "memory://"])
def test_what_is_read_back_is_what_the_recipe_gives_and_pictures_are_their_files(kind: str, tmp_path: Path) -> None:
    card = make_set(tmp_path / "data")
    output = {
        "folder": str(tmp_path / "out"),
        "file://": f"file://{tmp_path}/out",
        "memory://": f"memory://{tmp_path}",
    }[kind]
    said = prepare(card, str(tmp_path / "data"), output)
    found, (expected, _) = open_prepared(output, verify=True), load_recipe(card, str(tmp_path / "data"))
    assert len(found) == len(expected) == said["rows"] == 130 and len(found.shards) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.id, ours.source, ours.messages, ours.tools) == (theirs.id, "card", theirs.messages, [])
        assert ours.images == [{"bytes": theirs.images[0].read_bytes(), "path": f"pictures/{theirs.images[0].name}"}]
    order = random.Random(1).choices(range(130), k=200)
    assert [e.id for e in found.__getitems__(order)] == [f"r{k}" for k in order]
    assert found[-1].id == "r129" and [e.id for e in found[3:9:2]] == ["r3", "r5", "r7"] and found[5:5] == []
    with pytest.raises(IndexError, match="130 examples, and none at 130"):
        found[130]


def test_every_form_of_a_picture_and_video_is_embedded_as_it_is(tmp_path: Path) -> None:
    noise(28, 0).save(tmp_path / "a.png")
    raw = (tmp_path / "a.png").read_bytes()
    (tmp_path / "v.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    import base64

    text = base64.b64encode(raw).decode()
    tool = {"type": "function", "function": {"name": "look", "description": "Grüße, 看", "parameters": {}}}
    turns = [
        {"role": "user", "content": "<image><image><image><image>\ud83d? <video><video>"},
        {"role": "assistant", "content": "so"},
    ]
    rows = [{"messages": turns, "images": ["a.png", f"data:image/png;base64,{text}", {"bytes": None, "path": "a.png"}, f"file://{tmp_path}/a.png"],
             "videos": ["v.mp4", ["a.png", "a.png"]], "tools": [tool], "id": 7},
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "weight": 0.5}]}]  # fmt: skip
    (tmp_path / "chats.json").write_text(json.dumps(rows))
    card = read_recipe(str(tmp_path / "chats.json"))
    (expected, _) = load_recipe(card, str(tmp_path))
    prepare(card, str(tmp_path), tmp_path / "out")
    first, second = open_prepared(tmp_path / "out")
    assert [image["bytes"] for image in first.images] == [raw] * 4
    assert [image["path"] for image in first.images] == ["a.png", "", "a.png", "a.png"]
    video, frames = first.videos
    assert video == {"bytes": (tmp_path / "v.mp4").read_bytes(), "path": "v.mp4"}
    assert frames == [{"bytes": raw, "path": "a.png"}] * 2
    assert first.tools == [tool] and first.messages == expected[0].messages and second.messages == expected[1].messages


@pytest.mark.usefixtures("small_shards")
def test_the_files_are_the_same_for_any_number_of_workers(tmp_path: Path, processor: Any) -> None:
    card = make_set(tmp_path / "data", broken=(3, 77)) | {"bad_rows": "drop"}
    collator = ChatCollator(processor, max_length=60, too_long="drop")
    for workers in (0, 1, 3):
        prepare(card, str(tmp_path / "data"), tmp_path / str(workers), collator=collator, workers=workers)
    whole = contents(tmp_path / "0")
    assert whole == contents(tmp_path / "1") == contents(tmp_path / "3")
    assert {"prepared.json", "index.parquet", "shard-00000.parquet", "shard-00003.parquet"} <= set(whole)


@pytest.mark.usefixtures("small_shards")
def test_lengths_and_the_account_are_those_of_measuring_every_row(tmp_path: Path, processor: Any) -> None:
    card = make_set(tmp_path / "data", broken=(3, 77))
    collator = ChatCollator(processor, max_length=60, too_long="drop")
    prepare(card, str(tmp_path / "data"), tmp_path / "out", collator=collator, bad_rows="drop")
    found = open_prepared(tmp_path / "out")
    expected = {}
    for k in set(range(130)) - {3, 77}:
        row = json.loads((tmp_path / "data/rows.jsonl").read_text().splitlines()[k])
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["q"]}]},
                    {"role": "assistant", "content": row["a"].strip()}]  # fmt: skip
        batch = (
            collator([Example(messages, [str(tmp_path / "data" / row["image"])], id=row["id"])]) if k % 5 < 3 else None
        )
        expected[row["id"]] = None if batch is None else batch["input_ids"].shape[1]
    used = dict(zip((e.id for e in found), found.lengths or (), strict=True))
    assert used and all(length == expected[row] for row, length in used.items() if expected[row])
    account = found.accounting
    too_long = account["dropped"]["over max_length = 60 tokens"]
    assert account["read"] == 130 and account["used"] == len(found) == 130 - 2 - too_long["rows"]
    assert too_long["rows"] > 0 and {*used, *too_long["ids"], "r3", "r77"} == {f"r{k}" for k in range(130)}
    (missing,) = set(account["dropped"]) - {"over max_length = 60 tokens"}
    assert account["dropped"][missing] == {"rows": 2, "ids": ["r3", "r77"]}
    assert account["tokens"]["all"] == sum(used.values()) and account["used_by_source"] == {"card": len(found)}
    assert (found.measured_with or {})["max_length"] == 60


def test_an_answer_that_is_cut_counts_as_what_is_left_of_it(tmp_path: Path, processor: Any) -> None:
    card, data = make_set(tmp_path / "data"), str(tmp_path / "data")
    collator = ChatCollator(processor, max_length=60, too_long="shorten_answer")
    prepare(card, data, tmp_path / "out", collator=collator)
    found = open_prepared(tmp_path / "out")
    batches = [collator([example]) for example in found]
    assert found.lengths == [batch["input_ids"].shape[1] for batch in batches] and found.lengths.count(60) > 10
    said = found.accounting
    assert said["tokens"]["response"] == sum(int((batch["labels"] >= 0).sum()) for batch in batches)
    whole = [ChatCollator(processor).measure(example).tokens for example in load_recipe(card, data)[0]]
    assert sum(effect["rows"] for effect in said["changed"].values()) == sum(tokens > 60 for tokens in whole)


def test_rows_that_cannot_be_used_refuse_the_whole_and_leave_nothing(tmp_path: Path) -> None:
    card = make_set(tmp_path / "data", broken=(41, 60))
    with pytest.raises(
        RowError, match=r"card row r41: no image file at .*\n2 of 130 rows of 'card' cannot be used: .*r41, r60.*drop"
    ):
        prepare(card, str(tmp_path / "data"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "data/pictures/gone.png").mkdir()
    make_set(tmp_path / "data", 0)
    with pytest.raises(RowError, match="no rows|is empty"):
        prepare(card, str(tmp_path / "data"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small_shards")
def test_what_was_prepared_without_bad_rows_is_refused_where_they_are_not_to_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, data, out = make_set(tmp_path / "data", broken=(1, 60)), str(tmp_path / "data"), tmp_path / "out"
    put = Store.put

    def full(store: Store, name: str, file: Path) -> None:
        if name == "shard-00002.parquet":
            raise OSError(28, "No space left on device")
        put(store, name, file)

    monkeypatch.setattr(Store, "put", full)
    with pytest.raises(UserError, match="No space left"):
        prepare(card, data, out, bad_rows="drop")
    monkeypatch.setattr(Store, "put", put)
    with pytest.raises(
        RowError, match=r"card row r1: no image .*\n2 of \d+ rows .*\(r1, r60\).* was begun without them"
    ):
        prepare(card, data, out)
    assert prepare(card, data, out, bad_rows="drop")["rows"] == 128
    with pytest.raises(RowError, match=r"card row r1: .*\n2 of 130 rows of 'card' .* was prepared without them: mend"):
        prepare(card, data, out)
    assert open_prepared(out)[1].id == "r2"


@pytest.mark.usefixtures("small_shards")
def test_the_same_again_has_nothing_to_do_and_something_else_is_refused_by_name(tmp_path: Path, processor: Any) -> None:
    card, out, said = make_set(tmp_path / "data"), tmp_path / "out", list[str]()
    first = prepare(card, str(tmp_path / "data"), out, collator=ChatCollator(processor), limit=50)
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    again = prepare(card, str(tmp_path / "data"), out, collator=ChatCollator(processor), limit=50, echo=said.append)
    assert again == first and "prepared already: 50 examples" in said[-1]
    assert before == {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    other = ChatCollator(processor, max_length=99)
    for changes, message in (
        ({"limit": 51}, "limit: 50 there, 51 now"),
        ({"collator": other}, "measured_with.max_length: None there, 99 now"),
        ({"collator": None}, "measured_with"),
        ({"card": {**card, "prompt": "{q}!"}}, r"card.prompt: '\{q\}' there, '\{q\}!' now"),
    ):
        words = {"card": card, "collator": ChatCollator(processor), "limit": 50, **changes}
        with pytest.raises(ConfigError, match=f"is prepared of something else: .*{message}"):
            prepare(words.pop("card"), str(tmp_path / "data"), out, **words)
    (tmp_path / "data/rows.jsonl").write_text((tmp_path / "data/rows.jsonl").read_text() + "\n")
    with pytest.raises(ConfigError, match="source.content"):
        prepare(card, str(tmp_path / "data"), out, collator=ChatCollator(processor), limit=50)


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    card = make_set(tmp_path / "data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty and nothing prepared .it holds thesis.txt"):
        prepare(card, str(tmp_path / "data"), tmp_path / "out")
    assert contents(tmp_path / "out") == {"thesis.txt": b"mine"}
    with pytest.raises(ConfigError, match="Cannot write to"):
        prepare(card, str(tmp_path / "data"), tmp_path / "out/thesis.txt")


def test_a_used_collator_has_the_settings_of_a_fresh_one(tmp_path: Path, processor: Any, drawn: list[Any]) -> None:
    """A call sets padding in the tokenizer, which is part of it."""
    card, data = make_set(tmp_path / "data"), str(tmp_path / "data")
    collator = ChatCollator(processor, max_length=200)
    collator.tokenizer.backend_tokenizer.no_padding()
    before = cache_folder(card, data, collator=collator)
    collator(drawn[:3])
    collator.tokenizer.backend_tokenizer.enable_padding()
    assert cache_folder(card, data, collator=collator) == before
    assert cache_folder(card, data, collator=ChatCollator(processor, max_length=200, packing=True)) == before
    assert cache_folder(card, data, collator=ChatCollator(processor, max_length=201)) != before
    assert before.parent.name == "prepared" and str(before).startswith(os.environ["VLM_DFT_CACHE"])


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "index"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    prepare(make_set(tmp_path / "data"), str(tmp_path / "data"), tmp_path / "out")
    file = tmp_path / "out" / ("index.parquet" if damage == "index" else "shard-00002.parquet")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 255
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(raw[:-9] if damage == "cut" else raw)
    expected = {"missing": "is missing", "cut": "expected .* bytes, found", "flipped": "sha256", "index": "sha256"}[
        damage
    ]
    with pytest.raises(UserError, match=f"{file.name}.*{expected}"):
        open_prepared(tmp_path / "out", verify=damage == "flipped")


@pytest.mark.usefixtures("small_shards")
def test_a_shard_that_goes_while_it_is_read_is_named(tmp_path: Path) -> None:
    prepare(make_set(tmp_path / "data"), str(tmp_path / "data"), tmp_path / "out")
    found = open_prepared(tmp_path / "out")
    (tmp_path / "out/shard-00001.parquet").write_bytes(b"PAR1")
    (tmp_path / "out/shard-00003.parquet").unlink()
    with pytest.raises(UserError, match="shard-00001.parquet is cut short"):
        found[45]
    with pytest.raises(UserError, match="shard-00003.parquet is missing"):
        found[125]
    assert found[0].id == "r0"


def test_nothing_prepared_and_a_preparation_begun_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Nothing is prepared at .*prepared.json.$"):
        open_prepared(tmp_path)
    (tmp_path / ".preparing").mkdir()
    (tmp_path / ".preparing/made_from.json").write_text("{}")
    with pytest.raises(UserError, match="begun and not ended"):
        open_prepared(tmp_path)
    with pytest.raises(CardError, match="Nothing is prepared at 'memory://nowhere'"):
        read_recipe("memory://nowhere")


@pytest.mark.usefixtures("small_shards")
def test_random_reading_takes_little_more_than_the_bytes_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    card = make_set(folder)
    for k in range(7):
        if k != 3:
            noise(150, k).save(folder / f"pictures/{k}.png")
    prepare(card, str(folder), tmp_path / "out")
    found = open_prepared(tmp_path / "out")
    read, pread = Counter[str](), os.pread

    def counted(file: int, size: int, at: int) -> bytes:
        read["bytes"] += size
        return pread(file, size, at)

    monkeypatch.setattr(os, "pread", counted)
    order = random.Random(0).sample([k for k in range(130) if k % 7 != 3], 64)
    examples = [found[k] for k in order]
    asked = sum(len(e.images[0]["bytes"]) + len(json.dumps(e.messages)) for e in examples)
    assert asked > 4e6 and read["bytes"] < 1.5 * asked


def test_datasets_alone_reads_the_shards_pictures_and_all(tmp_path: Path) -> None:
    import datasets

    prepare(make_set(tmp_path / "data"), str(tmp_path / "data"), tmp_path / "out")
    table = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "out/shard-*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(table) == 130 and table[5]["id"] == "r5" and table[5]["tools"] is None and table[5]["videos"] == []
    assert json.loads(table[5]["messages"])[1] == {"role": "assistant", "content": "6."}
    assert table[1]["images"][0].size == (56, 56)
    assert np.array_equal(np.asarray(table[1]["images"][0]), np.asarray(noise(56, 1)))
    streamed = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "out/shard-*.parquet"), split="train", streaming=True
    )
    assert [row["id"] for row in streamed.take(3)] == ["r0", "r1", "r2"]


@pytest.mark.usefixtures("small_shards")
def test_a_prepared_folder_is_a_recipe_for_reading_examining_and_inspecting(tmp_path: Path, processor: Any) -> None:
    card, collator = make_set(tmp_path / "data"), ChatCollator(processor)
    prepare(card, str(tmp_path / "data"), tmp_path / "out", collator=collator)
    own = tmp_path / "own.yaml"
    own.write_text(
        yaml.safe_dump({"description": "mine", "licence": "l", "source": {"prepared": str(tmp_path / "out")}})
    )
    for name in (str(tmp_path / "out"), str(own)):
        found = read_recipe(name)
        assert found["source"] == {"prepared": str(tmp_path / "out")} and found["rows"] == 130
        assert [o.id for o in outcomes(found, None, start=38, limit=4)] == ["r38", "r39", "r40", "r41"]
    looked = [list(examine(found, None, collator=collator, workers=workers, limit=70)) for workers in (0, 2)]
    assert [(e.place, e.outcome.id, e.measured) for e in looked[0]] == [
        (e.place, e.outcome.id, e.measured) for e in looked[1]
    ]
    assert [e.measured and e.measured.tokens for e in looked[0]] == (open_prepared(tmp_path / "out").lengths or [])[:70]
    (shown,) = inspect_rows(found, None, collator, start=12, count=1)
    assert shown.name == "own r12" and shown.explained is not None and not shown.failed
    assert len(load_recipe(found, None)[0]) == 130
    with pytest.raises(CardError, match="is prepared: its source is"):
        prepare(found, None, tmp_path / "again")


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_data_loaders_with_workers_give_each_row_once_an_epoch_over_all_ranks(context: str, tmp_path: Path) -> None:
    prepare(make_set(tmp_path / "data"), str(tmp_path / "data"), tmp_path / "out", collator=None)
    found = open_prepared(tmp_path / "out")
    assert found[0].id == "r0"  # a file is open before the fork
    split = Split(micro_batch=4, processes=2, accumulation=2)
    drawn: list[list[str]] = [[], []]
    for rank in range(2):
        places = list(StepSampler(130, split, seed=5))
        own = [k for at in range(0, len(places), split.micro_batch) for k in places[at : at + split.micro_batch]
               if at // split.micro_batch % 2 == rank]  # fmt: skip
        loader = DataLoader(
            WithSilentPlaces(found),
            batch_size=4,
            sampler=own,
            num_workers=2,
            multiprocessing_context=context,
            collate_fn=list,
        )  # type: ignore[var-annotated]
        drawn[rank] = [row.id for batch in loader for row in batch if isinstance(row, Example)]
    assert Counter(drawn[0] + drawn[1]) == Counter(f"r{k}" for k in range(130))
    assert not set(drawn[0]) & set(drawn[1])


def test_it_is_pickled_without_its_open_files(tmp_path: Path) -> None:
    prepare(make_set(tmp_path / "data"), str(tmp_path / "data"), f"memory://{tmp_path}")
    found = open_prepared(f"memory://{tmp_path}")
    assert found[3].images
    copy = pickle.loads(pickle.dumps(found))
    assert copy[3] == found[3] and copy.store._files is not found.store._files


def test_training_on_it_is_training_on_the_recipe_bit_for_bit(tmp_path: Path, processor: Any) -> None:
    card = make_set(tmp_path / "data", rows=24)
    config = resolve_config(
        (
            "test",
            {
                "recipe": "drawn",
                "batch_size": 8,
                "micro_batch": 4,
                "learning_rate": 1e-3,
                "epochs": 2,
                "dataloader_num_workers": 2,
            },
        )
    )
    prepare(card, str(tmp_path / "data"), tmp_path / "out", collator=ChatCollator(processor))
    found = open_prepared(tmp_path / "out")
    lengths = found.lengths
    plain = load_recipe(card, str(tmp_path / "data"))[0]
    for name, examples in (("plain", plain), ("prepared", found)):
        train_objective(config, "dft", examples, tmp_path / name, lengths=lengths)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "prepared")]
    kept = [[{k: row[k] for k in ("step", "loss", "nll", "mean_p", "grad_norm")} for row in run] for run in rows]
    assert len(kept[0]) == 6 and kept[0] == kept[1]
    assert rows[0][-1]["loss"] != rows[0][0]["loss"]


@pytest.mark.parametrize("number", [28, 27, 122])
def test_a_disk_that_is_full_before_the_first_shard_is_whole_is_said_too(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(preparing.ShardWriter, "add", full)
    card = make_set(tmp_path / "data", rows=20)
    with pytest.raises(
        UserError, match=rf"No space left \({os.strerror(number)}\) .* 0.0 MB are written; .* MB are free"
    ):
        prepare(card, str(tmp_path / "data"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("look", [1, 2])
def test_a_lock_that_goes_while_it_is_looked_at_is_taken_again(
    look: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, looks, stat_of = Store(tmp_path / "out"), list[Path](), Path.stat

    def stat(path: Path, **more: Any) -> os.stat_result:
        if path.name == "lock":
            looks.append(path)
            if len(looks) == look:  # another process opened the same file, and takes it away
                os.unlink(path)
        return stat_of(path, **more)

    monkeypatch.setattr(Path, "stat", stat)
    with claimed(store, ".preparing", lambda line: None):
        assert os.path.isfile(tmp_path / "out/.preparing/lock")


def test_a_full_disk_leaves_whole_shards_and_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "SHARD_PLACES", 40)
    card, put = make_set(tmp_path / "data", rows=130) | {"rows": 130}, Store.put

    def full(store: Store, name: str, file: Path) -> None:
        if name == "shard-00002.parquet":
            raise OSError(28, "No space left on device")
        put(store, name, file)

    monkeypatch.setattr(Store, "put", full)
    with pytest.raises(
        UserError,
        match=r"No space left .* MB are written, for 80 of 130 rows: about .* MB more are needed; .* MB are free",
    ):
        prepare(card, str(tmp_path / "data"), tmp_path / "out")
    assert not (tmp_path / "out/prepared.json").exists() and not (tmp_path / "out/shard-00002.parquet").exists()
    monkeypatch.setattr(Store, "put", put)
    said = list[str]()
    prepare(card, str(tmp_path / "data"), tmp_path / "out", echo=said.append)
    prepare(card, str(tmp_path / "data"), tmp_path / "whole")
    assert said[0] == "going on after row 80: 2 shards are whole"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def start(*words: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, words)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    said, wrong = process.communicate(timeout=120)
    return process.returncode, said, wrong


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} has not come"
        time.sleep(0.02)


@pytest.mark.usefixtures("small_shards")
def test_of_two_processes_the_second_waits_and_finds_it_whole(tmp_path: Path) -> None:
    make_set(tmp_path / "data")
    first = start(tmp_path / "data", tmp_path / "out", 0, 0.02, tmp_path / "begun")
    wait_for(tmp_path / "begun")
    second = start(tmp_path / "data", tmp_path / "out")
    assert finish(second)[1].splitlines()[0].startswith(f"{tmp_path}/out is being prepared by process {first.pid} on ")
    assert finish(first)[0] == second.returncode == 0
    prepare(read_recipe(str(tmp_path / "data/card.yaml")), str(tmp_path / "data"), tmp_path / "alone")
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "alone").keys()
    assert len(open_prepared(tmp_path / "out", verify=True)) == 130


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_any_moment_and_run_again_it_is_the_uninterrupted_one_byte_for_byte(
    workers: int, tmp_path: Path
) -> None:
    make_set(tmp_path / "data", rows=210)
    assert finish(start(tmp_path / "data", tmp_path / "whole"))[0] == 0
    whole, stages = contents(tmp_path / "whole"), Counter[int]()
    draw = random.Random(workers)
    for attempt in range(4):
        out = tmp_path / f"out{attempt}"
        for kill in range(draw.choice((1, 2))):
            process = start(tmp_path / "data", out, workers, 0.004, begun := tmp_path / f"begun{attempt}-{kill}")
            wait_for(begun)
            shards_there = draw.randint(0, 5)  # and then at any moment of the next one
            while process.poll() is None and len(list(out.glob("shard-*.parquet"))) < shards_there:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            stages[len(list(out.glob("shard-*.parquet")))] += 1
        status, said, wrong_lines = finish(start(tmp_path / "data", out, workers))
        assert status == 0, f"{said}\n{wrong_lines}"
        assert contents(out) == whole
    assert len(stages) > 1, "the kills fell at different shards"


def prepare_and_die(card: dict[str, Any], data: str, out: Path, at: str, after: bool) -> int:
    """Prepare in a process that kills itself before or after it puts a file, or `at` "remove" takes the journal away."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    put, remove = Store.put, Store.remove

    def killing(store: Store, name: str, file: Path) -> None:
        if name == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        put(store, name, file)
        if name == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def killing_remove(store: Store, names: Any, folder: str | None = None) -> None:
        if at == "remove" and (store.folder / "prepared.json").is_file():
            remove(store, list(names)[:3] if after else [])
            os.kill(os.getpid(), signal.SIGKILL)
        remove(store, names, folder)

    Store.put, Store.remove = killing, killing_remove  # type: ignore[method-assign]
    try:
        prepare(card, data, out)
    finally:
        os._exit(1)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", ["shard-00000.parquet", ".preparing/part-00001.json", ".preparing/index-00002.parquet", "index.parquet",
                                "prepared.json", "remove"])  # fmt: skip
def test_killed_around_any_file_it_goes_on_to_the_same_bytes(at: str, after: bool, tmp_path: Path) -> None:
    card, data = make_set(tmp_path / "data"), str(tmp_path / "data")
    prepare(card, data, tmp_path / "whole")
    assert prepare_and_die(card, data, tmp_path / "out", at, after) == signal.SIGKILL
    prepare(card, data, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_shard_that_was_lost_before_the_end_is_made_again(damage: str, tmp_path: Path) -> None:
    card, data, out = make_set(tmp_path / "data"), str(tmp_path / "data"), tmp_path / "out"
    prepare(card, data, tmp_path / "whole")
    assert prepare_and_die(card, data, out, "index.parquet", after=False) == signal.SIGKILL
    if damage == "gone":
        (out / "shard-00001.parquet").unlink()
    else:
        (out / "shard-00001.parquet").write_bytes(b"PAR1")
    said = list[str]()
    prepare(card, data, out, echo=said.append)
    assert said == ["going on after row 40: 1 shard is whole"] and contents(out) == contents(tmp_path / "whole")


def die(example: Example) -> None:
    if example.id == "r45":
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_an_error_that_names_its_row(tmp_path: Path) -> None:
    card = make_set(tmp_path / "data")
    with pytest.raises(
        UserError,
        match=r"worker process on recipe 'card' was killed by SIGKILL while it was at row 45 .id 'r45'.*memory",
    ):
        list(examine(card, str(tmp_path / "data"), facts=die, workers=2))


def wrong(example: Example) -> None:
    if example.id == "r45":
        raise ZeroDivisionError("in the facts")


def test_a_mistake_in_a_worker_comes_through_with_where_it_was_made(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="in the facts") as caught:
        list(examine(make_set(tmp_path / "data"), str(tmp_path / "data"), facts=wrong, workers=2))
    assert "test_prepared.py" in caught.value.__notes__[0]


def test_examining_gives_the_same_for_any_number_of_workers_in_file_order(tmp_path: Path, processor: Any) -> None:
    card = make_set(tmp_path / "data", broken=(0, 64, 129))
    collator = ChatCollator(processor, max_length=60, too_long="drop")
    runs = [
        [(e.place, e.outcome.id, e.outcome.dropped, str(e.outcome.error), e.measured, e.facts)
         for e in examine(card, str(tmp_path / "data"), collator=collator, facts=len_of_answer, workers=workers)]
        for workers in (0, 1, 4)
    ]  # fmt: skip
    assert [row[0] for row in runs[0]] == list(range(130)) and runs[0] == runs[1] == runs[2]


def len_of_answer(example: Example) -> int:
    return len(example.messages[-1]["content"])


def big(example: Example) -> bytes:
    return bytes(30 * 2**20 if example.id == "r70" else 2**20)


def test_leaving_early_and_rows_of_many_megabytes_leave_no_process_and_no_heap(tmp_path: Path) -> None:
    import multiprocessing

    import psutil

    card, most = make_set(tmp_path / "data", rows=400), 0
    found = examine(card, str(tmp_path / "data"), facts=big, workers=2)
    before = psutil.Process().memory_info().rss
    for k, one in enumerate(found):
        assert len(one.facts) >= 2**20
        most = max(most, psutil.Process().memory_info().rss - before)
        if k == 200:
            break
    found.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()
    assert most < 140 * 2**20, f"{most / 2**20:.0f} MB for rows of 1 MB and one of 30"


def test_an_interrupt_ends_all_workers_without_a_flood_of_tracebacks(tmp_path: Path) -> None:
    import psutil

    make_set(tmp_path / "data", rows=400)
    process = start(tmp_path / "data", tmp_path / "out", 2, 0.02, tmp_path / "begun")
    wait_for(tmp_path / "begun")
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    for one in (*(child.pid for child in children), process.pid):  # as a terminal sends it: to all of the group
        os.kill(one, signal.SIGINT)
    status, _, wrong_lines = finish(process)
    assert status != 0 and wrong_lines.count("Traceback") == 1
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_workers_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    import psutil

    make_set(tmp_path / "data", rows=400)
    process = start(tmp_path / "data", tmp_path / "out", 3, 0.02, tmp_path / "begun")
    wait_for(tmp_path / "begun")
    children = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert len(children) == 3 and not psutil.wait_procs(children, timeout=10)[1]


def test_the_command_prepares_and_accounts_for_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    from vlm_dft.prepare_command import add_prepare

    make_set(tmp_path / "data", broken=(2,), training={"max_length": 60})
    parser = argparse.ArgumentParser()
    add_prepare(parser.add_subparsers())
    words = f"prepare {tmp_path}/data/card.yaml --data {tmp_path}/data --limit 50 --workers 1 --json {tmp_path}/said.json".split()
    arguments = parser.parse_args(words)
    with pytest.raises(RowError, match="--bad-rows drop"):
        arguments.run(arguments)
    arguments = parser.parse_args([*words, "--bad-rows", "drop", "--output", str(tmp_path / "out")])
    assert arguments.run(arguments) == 0
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["measured_with"]["max_length"] == 60 and said["accounting"]["read"] == 50
    lines = capsys.readouterr().out
    used = said["accounting"]["used"]
    assert re.search(rf"50 rows read, {used} used, in 1 shard of .* MB", lines) and "(r2)" in lines
    assert f"{said['accounting']['tokens']['all']:,} tokens" in lines
    assert len(open_prepared(tmp_path / "out")) == used
    shutil.rmtree(tmp_path / "out")
