"""Rows: a source's files found, read in order from any place, and the images of a row located by each of their six forms."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import time
import zlib
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm_dft import ChatCollator
from vlm_dft.errors import CardError, ImageError, RowError
from vlm_dft.media import image_size, open_image
from vlm_dft.recipes import read_recipe
from vlm_dft.rows import count_rows, fill, locate, locate_images, read_rows, source_fingerprint, source_root

Row = dict[str, Any]


def written(folder: Path, **files: Any) -> Path:
    """A folder of files by name: rows as JSON, text as it is, bytes as they are; lists named *.parquet as parquet."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(content), path, row_group_size=4)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def read(source: Row, data: Path | None, start: int = 0) -> list[Row]:
    return list(read_rows(source, source_root(source, data, where="Recipe 'x'"), where="Recipe 'x'", start=start))


def qs(rows: list[Row]) -> list[Any]:
    return [row["q"] for row in rows]


def numbered(first: int, count: int) -> list[Row]:
    return [{"q": k} for k in range(first, first + count)]


# Files and ids


def test_ids_are_the_rows_own_or_their_key_or_their_number_over_all_files(tmp_path: Path) -> None:
    written(tmp_path, **{
        "a.json": [{"q": 0, "id": 7}, {"q": 1, "pid": "p"}, {"q": 2, "id": None, "pid": 0}, {"q": 3}],
        "b.json": {"k": {"q": 4}, "l": {"q": 5, "id": "own"}}, "c.jsonl": '{"q": 6}\n\n{"q": 7}\n',
        "d.parquet": numbered(8, 2), "e.json": [{"q": 10}, {"q": 11, "id": "7"}],
    })  # fmt: skip
    rows = read({"files": ["a.json", "b.json", "c.jsonl", "d.parquet", "e.json"]}, tmp_path)
    assert qs(rows) == list(range(12))
    assert [row["id"] for row in rows] == ["7", "p", "0", "3", "k", "own", "4", "6", "7", "8", "9", "7"]


def test_a_pattern_names_its_files_in_order_and_one_without_any_is_an_error(tmp_path: Path) -> None:
    written(tmp_path, **{f"data/train-{k:05}-of-00003.parquet": numbered(10 * k, 10) for k in (2, 0, 1)})
    written(tmp_path, **{"data/test-00000-of-00001.parquet": numbered(99, 1), "data/a[1].json": [{"q": 5}]})
    assert qs(read({"files": ["data/train-*.parquet"]}, tmp_path)) == list(range(30))
    assert qs(read({"files": "data/a[1].json"}, tmp_path)) == [5]
    for files, message in (
        (["data/dev-*.parquet"], "expected data/dev-.* it is not there.* The folder holds: data"),
        (["data"], "expected the file data, found a folder. The folder holds: a\\[1\\].json, test.* Name its files"),
        (["s3://b/a.json"], "expected the name of a file below --data, found 's3://b/a.json'"),
        ([7], "expected the name of a file below --data, found 7"),
    ):
        with pytest.raises(CardError, match=message):
            source_root({"files": files}, tmp_path, where="Recipe 'x'")


def test_a_file_in_parts_is_to_be_joined(tmp_path: Path) -> None:
    written(tmp_path, **{"data.json.part-aa": "[", "data.json.part-ab": "]"})
    with pytest.raises(CardError, match=r"It is in 2 parts. Join them: cat data.json.part-\* > data.json"):
        source_root({"files": ["data.json"]}, tmp_path, where="Recipe 'x'")


@pytest.mark.parametrize("kind", ["parquet", "json", "jsonl", "mixed"])
def test_reading_from_any_place_gives_the_same_rows_with_the_same_ids(kind: str, tmp_path: Path) -> None:
    kinds = ["parquet", "json", "jsonl"] if kind == "mixed" else [kind] * 3
    names = []
    for k, ending in enumerate(kinds):
        rows = numbered(9 * k, 9)
        written(tmp_path, **{f"{k}.{ending}": "\n".join(map(json.dumps, rows)) if ending == "jsonl" else rows})
        names.append(f"{k}.{ending}")
    whole = read({"files": names}, tmp_path)
    assert qs(whole) == list(range(27)) and [row["id"] for row in whole] == [str(k) for k in range(27)]
    for start in range(29):
        assert read({"files": names}, tmp_path, start) == whole[start:]


def test_rows_that_cannot_be_read_take_a_place_with_an_id_and_only_those_after_the_start_are_told(
    tmp_path: Path,
) -> None:
    written(tmp_path, **{"a.jsonl": '{"q": 0}\n{half\n{"q": 2}\n[]\n{"q": 4}', "b.json": [{"q": 5}, 6, {"q": 7}]})
    source = {"files": ["a.jsonl", "b.json"]}
    for start in range(9):
        told: list[tuple[str, str]] = []
        rows = read_rows(source, tmp_path, where="x", start=start, broken=lambda i, e: told.append((i, e.reason)))  # noqa: B023
        assert [row["id"] for row in rows] == [str(k) for k in (0, 2, 4, 5, 7) if k >= start]
        expected = [("1", "not valid JSON"), ("3", "not an object"), ("6", "not an object")]
        assert told == [pair for pair in expected if int(pair[0]) >= start]
    with pytest.raises(RowError, match="a.jsonl, line 2: not valid JSON") as caught:
        read(source, tmp_path)
    assert caught.value.reason == "not valid JSON"


def test_values_of_mixed_types_in_one_column_are_read_as_they_are(tmp_path: Path) -> None:
    values = [1, "1", None, [1], {"a": 1}, True, 1.5, ""]
    written(tmp_path, **{"a.jsonl": "\n".join(json.dumps({"q": value}) for value in values)})
    assert qs(read({"files": "a.jsonl"}, tmp_path)) == values


def test_a_kind_can_be_forced_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    written(tmp_path, **{"rows.txt": "q\ta\n1\t2\n"})
    assert read({"files": "rows.txt", "kind": "tsv"}, tmp_path) == [{"q": "1", "a": "2", "id": "0"}]
    with pytest.raises(RowError, match="rows.txt: its content .* does not tell its kind"):
        read({"files": "rows.txt"}, tmp_path)
    with pytest.raises(CardError, match="unknown kind 'jsonlines'. Did you mean 'jsonl'"):
        read({"files": "rows.txt", "kind": "jsonlines"}, tmp_path)


def test_rows_are_counted_where_the_files_say_how_many(tmp_path: Path) -> None:
    written(tmp_path, **{"a.parquet": numbered(0, 9), "b.parquet": numbered(9, 2), "c.json": numbered(0, 3)})
    assert count_rows({"files": ["*.parquet"]}, tmp_path) == 11
    assert count_rows({"files": ["a.parquet", "c.json"]}, tmp_path) is None
    assert count_rows({"hub": "a/b"}, None) is None


def test_a_fingerprint_is_of_names_sizes_and_bytes_in_order(tmp_path: Path) -> None:
    written(tmp_path, **{"a.json": [{"q": 1}], "b.json": [{"q": 2}]})
    source = {"files": ["a.json", "b.json"]}
    first = source_fingerprint(source, tmp_path)
    assert first == source_fingerprint(source, shutil.copytree(tmp_path, tmp_path / "copy")) and len(first) == 64
    assert first != source_fingerprint({"files": ["b.json", "a.json"]}, tmp_path)
    written(tmp_path, **{"b.json": [{"q": 3}]})
    assert first != source_fingerprint(source, tmp_path)
    hub = {"hub": "a/b", "revision": "c"}
    assert source_fingerprint(hub, None) != source_fingerprint({**hub, "revision": "d"}, None)


# Sets of the hub and of datasets


PICTURES = [{"q": str(k), "images": [{"bytes": bytes([k]) * 20, "path": f"{k}.png"}] * (k % 3)} for k in range(10)]


def saved() -> datasets.Dataset:
    features = datasets.Features({"q": datasets.Value("string"), "images": datasets.List(datasets.Image())})
    return datasets.Dataset.from_list(PICTURES, features=features)


def test_a_folder_of_save_to_disk_is_read_without_decoding(tmp_path: Path) -> None:
    saved().save_to_disk(str(tmp_path / "set"), num_shards=3)
    datasets.DatasetDict({"train": saved(), "dev": saved().select([2, 1])}).save_to_disk(str(tmp_path / "sets"))
    expected = [{**row, "id": str(k)} for k, row in enumerate(PICTURES)]
    for start in (0, 3, 7, 10):  # nothing here is a picture: decoding one would raise
        assert read({"files": ["set"]}, tmp_path, start) == expected[start:]
        assert read({"hub": "a/b"}, tmp_path / "set", start) == expected[start:]
        assert read({"files": ["sets"], "split": "train"}, tmp_path, start) == expected[start:]
    assert qs(read({"hub": "a/b", "split": "dev"}, tmp_path / "sets")) == ["2", "1"]
    assert count_rows({"files": ["set"]}, tmp_path) == 10
    for source in ({"files": ["sets"]}, {"files": ["sets"], "split": "test"}):
        with pytest.raises(
            CardError, match="sets holds the splits train, dev; .*Name one of them in the card's source"
        ):
            source_root(source, tmp_path, where="x")
    next((tmp_path / "set").glob("*.arrow")).unlink()
    with pytest.raises(CardError, match="its state.json names data-0.* which is not there. Copy the whole folder"):
        source_root({"files": ["set"]}, tmp_path, where="x")


def test_a_set_is_streamed_as_it_is_stored_and_as_its_local_copy_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for k in range(2):
        saved().select(range(5 * k, 5 * k + 5)).to_parquet(str(tmp_path / "data" / f"train-{k:05}-of-00002.parquet"))
    expected = [{**row, "id": str(k)} for k, row in enumerate(PICTURES)]
    for start in (0, 4, 5, 9, 10):
        assert read({"hub": str(tmp_path)}, None, start) == expected[start:]
        assert read({"hub": "a/b"}, tmp_path, start) == expected[start:]


def test_a_set_that_cannot_be_reached_is_named_with_the_way_to_a_copy() -> None:
    with pytest.raises(RowError) as caught:  # the tests are offline
        read({"hub": "some/set", "revision": "abc"}, None)
    for words in ("hub set 'some/set' (split train)", "hf download some/set --repo-type dataset", "--data DIR"):
        assert words in str(caught.value)


def test_a_hub_that_cannot_be_looked_up_is_not_tried_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*words: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    start = time.monotonic()
    with pytest.raises(RowError, match="hub set 'some/set' .split train. cannot be read: .*Offline"):
        read({"hub": "some/set", "revision": "abc"}, None)
    assert time.monotonic() - start < 4  # 23 s of waits between tries without it
    assert not datasets.config.HF_HUB_OFFLINE and not huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("files", "source", "expected"),
    [
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], {}, [0]),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], {"split": "test"}, [1]),
        (["data/testmini-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], {"split": "test"}, [1]),
        (["qa/train-0.parquet", "qa/val-0.parquet", "align/train-0.parquet"], {"config": "qa"}, [0]),
        (["qa/train-0.parquet", "qa/val-0.parquet", "align/train-0.parquet"], {"config": "align"}, [2]),
        (["train.jsonl", "validation.jsonl", "meta.json", "dataset_infos.json"], {}, [0]),
        (["qa_tuning.json"], {}, [0]),
        (["train/a.parquet", "test/a.parquet", ".cache/train/x.parquet"], {}, [0]),
    ],
)
def test_a_split_of_a_local_copy_is_told_by_names(
    files: list[str], source: Row, expected: list[int], tmp_path: Path
) -> None:
    written(tmp_path, **{name: [{"q": k}] for k, name in enumerate(files)})
    assert qs(read({"hub": "a/b", **source}, tmp_path)) == expected


def test_the_readme_of_a_local_copy_says_which_files_are_a_split(tmp_path: Path) -> None:
    head = {"configs": [{"config_name": "one", "data_files": [{"split": "train", "path": "x/*.parquet"}]},
                        {"config_name": "two", "data_files": "y.json"}]}  # fmt: skip
    written(
        tmp_path,
        **{"x/test.parquet": [{"q": 1}], "y.json": [{"q": 2}], "README.md": f"---\n{json.dumps(head)}\n---\n# Set"},
    )
    assert qs(read({"hub": "a/b", "config": "one"}, tmp_path)) == [1]
    assert qs(read({"hub": "a/b", "config": "two"}, tmp_path)) == [2]
    (tmp_path / "x" / "test.parquet").unlink()
    with pytest.raises(
        CardError, match=r"its README names x/\*.parquet for the split 'train', and nothing of it is there"
    ):
        source_root({"hub": "a/b", "config": "one"}, tmp_path, where="x")


def test_a_test_split_is_not_taken_for_training(tmp_path: Path, shared: Path) -> None:
    written(tmp_path, **{"test.jsonl": '{"q": 1}'})
    for folder in (tmp_path, shared / "hub_parquet" / "AI4Math--MathVista"):
        with pytest.raises(CardError, match="no file of the split 'train' in .* Files found: .*test"):
            source_root({"hub": "a/b"}, folder, where="x")


def test_a_folder_of_pictures_alone_leaves_the_rows_on_the_hub(tmp_path: Path) -> None:
    written(tmp_path, **{"images/1.png": b"x", "README.md": "hello", "config.json": "{}"})
    with pytest.raises(RowError, match="the hub set 'a/b' .* cannot be read"):
        read({"hub": "a/b"}, tmp_path)


def test_rows_that_lie_with_another_sets_pictures_are_not_taken_for_a_copy(tmp_path: Path) -> None:
    """WeThink's pictures are in LLaVA-CoT-100k, whose train.jsonl lies beside them."""
    written(tmp_path, **{"train.jsonl": [{"q": "llava-cot's"}], "image/1.png": b"x"})
    (tmp_path / "card.yaml").write_text(
        'description: d\nlicence: l\nsource: {hub: own/Think}\nimage_root: "."\nimages: i\nprompt: "{q}"\nresponse: "{q}"\n'
    )
    source = read_recipe(str(tmp_path / "card.yaml"))["source"]
    with pytest.raises(
        RowError, match=r"--local-dir DIR/Think, where .* Rows are looked for in DIR/own--Think or DIR/Think alone"
    ):
        read(source, tmp_path)
    assert count_rows(source, tmp_path) is None
    for name in ("Think", "own--Think"):  # the longer name goes first
        written(tmp_path, **{f"{name}/train.jsonl": json.dumps({"q": name})})
        assert qs(read(source, tmp_path)) == [name]
    assert qs(read({**source, "copy": "Think"}, tmp_path)) == ["Think"]


def test_a_card_says_that_rows_and_pictures_are_of_one_repository(tmp_path: Path) -> None:
    written(tmp_path, **{"data/qa_tuning-0.parquet": [{"q": 1}], "images/1.png": b"x"})
    source = read_recipe("geo170k")["source"]
    assert qs(read(source, tmp_path)) == [1]
    for wrong in ("../x", "/x", "", [], 5):
        with pytest.raises(CardError, match="copy must name the folder below --data"):
            read({"hub": "a/b", "copy": wrong}, tmp_path)
    with pytest.raises(CardError, match="copy must name .* beside hub"):
        read({"files": ["a"], "copy": "."}, tmp_path)


def test_real_copies_of_hub_sets_are_read_as_datasets_reads_them(shared: Path) -> None:
    for name, split, column, count in (
        ("hiyouga--geometry3k", "train", "images", 6), ("MathLLMs--MathVision", "testmini", "decoded_image", 24),
        ("DynaMath--DynaMath_Sample", "sample2", "decoded_image", 8), ("AI4Math--MathVista", "testmini", "decoded_image", 24),
    ):  # fmt: skip
        folder = shared / "hub_parquet" / name
        source = {"hub": name.replace("--", "/"), "split": split}
        rows = read(source, folder)
        assert len(rows) == count == count_rows(source, folder)
        assert rows == read({"hub": str(folder), "split": split}, None)
        for row in rows:
            for image in locate_images({"images": column}, row, folder, where="row"):
                assert min(image_size(image)) > 10


# Templates


@pytest.mark.parametrize("value", [None, float("nan")])
def test_what_is_not_there_is_not_written_into_a_text(value: Any) -> None:
    with pytest.raises(RowError, match="row 7: column 'a' is null") as caught:
        fill("{a} km", {"a": value}, where="row 7")
    assert caught.value.reason == "column a is null"
    with pytest.raises(RowError) as caught:
        fill("{b} km", {"a": value}, where="row 7")
    assert caught.value.reason == "no column b"


# Images


def png(width: int = 6, height: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 50).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
BARE = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ("a b.png", 1), (["a b.png", "x/c.png"], 2), ("x/../a b.png", 1),
        ({"bytes": PNG, "path": "gone.png"}, 1), ([{"bytes": PNG, "path": None}] * 3, 3), ({"bytes": None, "path": "x/c.png"}, 1),
        ({"bytes": BARE, "path": None}, 1), ({"bytes": f"data:image/png;base64,{BARE}"}, 1),
        (BARE, 1), ([BARE, "a b.png"], 2), ("\n".join(BARE[k : k + 76] for k in range(0, len(BARE), 76)), 1),
        (f"data:image/png;base64,{BARE}", 1), ("file://{root}/a%20b.png", 1), ("file://localhost{root}/x/c.png", 1),
        ("{root}/a b.png", 1),
        (None, 0), ("", 0), ([], 0), ({"bytes": None, "path": None}, 0), (float("nan"), 0),
    ],
)  # fmt: skip
def test_an_image_of_each_form_is_located_and_opened(value: Any, count: int, tmp_path: Path) -> None:
    written(tmp_path, **{"a b.png": PNG, "x/c.png": PNG})
    value = value.replace("{root}", str(tmp_path)) if isinstance(value, str) else value
    found = locate_images({"images": "i"}, {"i": value}, tmp_path, where="row 7")
    assert len(found) == count
    assert [open_image(image).size for image in found] == [(6, 4)] * count
    assert locate(found, tmp_path, where="row 7") == found  # located again


@pytest.mark.parametrize(
    ("value", "message", "reason"),
    [
        ("gone.png", "no image file at .*gone.png.* Check the data folder", "image missing"),
        ("../secret.png", "'../secret.png' leaves the data folder", "image outside the data folder"),
        ("file:///etc/passwd", "'/etc/passwd' leaves the data folder", "image outside the data folder"),
        ("http://h/a.png", "'http://h/a.png' is remote. Download the images and give their folder", "image is remote"),
        ("s3://b/a.png", "is remote", "image is remote"),
        (["a.png", None], "one of its images is null", "image is null"),
        (["a.png", ""], "one of its images is null", "image is null"),
        ([{"bytes": None, "path": None}, "a.png"], "one of its images is null", "image is null"),
        ({"bytes": "/etc/passwd", "path": None}, "expected bytes or base64 under 'bytes' of the image, found '/etc", "cannot be used"),
        ("a" * 5000, "no image file at ", "image missing"),
        ("a\0.png", "no image file at ", "image missing"),
        ("zip:///x.zip!/a.png", "is remote", "image is remote"),
    ],
)  # fmt: skip
def test_an_image_that_is_nowhere_is_said_with_a_reason_to_count(
    value: Any, message: str, reason: str, tmp_path: Path
) -> None:
    written(tmp_path, **{"data/a.png": PNG, "secret.png": PNG})
    with pytest.raises(RowError, match=f"row 7: .*{message}") as caught:
        locate_images({"images": "i"}, {"i": value}, tmp_path / "data", where="row 7")
    assert caught.value.reason == reason and len(str(caught.value)) < 700


def test_urls_are_left_to_a_collator_that_may_fetch_them(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/a.png"
    assert locate([url], tmp_path, where="row 7", remote=True) == [url]
    with pytest.raises(ImageError, match=r"its host 127.0.0.1:9 is not allowed \(allowed: none\)"):
        open_image(url, where="row 7")


def test_base64_needs_no_folder_and_a_path_does() -> None:
    assert open_image(locate([BARE], None, where="row 7")[0]).size == (6, 4)
    with pytest.raises(RowError, match="'a.png' is a path. Say where the images are: --data DIR"):
        locate(["a.png"], None, where="row 7")


def test_text_under_bytes_is_never_opened_as_a_path(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    with pytest.raises(ImageError, match="expected bytes or base64 under 'bytes' of the image, found '.*a.png'"):
        open_image({"bytes": str(tmp_path / "a.png")})


@pytest.mark.filterwarnings("ignore:Image size")  # Pillow's, which comes before our refusal
def test_a_picture_of_a_hundred_megapixels_is_refused_by_its_header(processor: Any) -> None:
    bomb = png(1, 1).replace(
        b"\0\0\0\x01\0\0\0\x01\x08\0\0\0\0", b"\0\0\x27\x10\0\0\x27\x10\x08\0\0\0\0"
    )  # 10,000 x 10,000
    bomb = bomb[:29] + zlib.crc32(bomb[12:29]).to_bytes(4, "big") + bomb[33:]
    messages = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]
    collator = ChatCollator(processor)
    for act in (collator.measure, lambda row: collator([row])):
        with pytest.raises(
            ImageError, match="row-17, image 0: .* 10000 x 10000 pixels; max_image_pixels = 89478485. Shrink"
        ):
            act({"messages": messages, "images": [bomb], "id": "row-17"})


def test_fifty_pictures_in_a_row_are_trained_counted_or_said_to_be_too_many(processor: Any) -> None:
    picture = png(112, 84)
    row = {"messages": [{"role": "user", "content": "<image>" * 50 + "q"}, {"role": "assistant", "content": "a"}],
           "images": [picture] * 50, "id": "row-17"}  # fmt: skip
    collator = ChatCollator(processor)
    assert collator([row])["image_grid_thw"].shape == (50, 3)
    assert collator.measure(row).tokens == collator([row])["input_ids"].shape[1]
    with pytest.raises(
        RowError, match="row-17: .* tokens, over max_length = 256. Media are never cut: raise max_length"
    ):
        ChatCollator(processor, max_length=256)([row])
    with pytest.raises(RowError, match="row-17: 50 images but 49 places for them"):
        collator([{**row, "messages": [{"role": "user", "content": "<image>" * 49}, row["messages"][1]]}])


def test_files_that_name_nothing_or_one_file_twice_are_refused(tmp_path: Path) -> None:
    written(tmp_path, **{"a.json": [{"q": 1}]})
    with pytest.raises(CardError, match="files names no file"):
        read({"files": []}, tmp_path)
    with pytest.raises(CardError, match="a.json is named twice, its rows would be read twice"):
        read({"files": ["a.json", "*.json"]}, tmp_path)


def test_a_blank_id_is_none(tmp_path: Path) -> None:
    written(tmp_path, **{"a.json": [{"id": " "}, {"id": 0}, {"id": "", "pid": "p"}]})
    assert [row["id"] for row in read({"files": ["a.json"]}, tmp_path)] == ["0", "0", "p"]


def test_a_link_that_leads_out_of_the_data_folder_is_called_one(tmp_path: Path) -> None:
    written(tmp_path, **{"elsewhere/1.png": png(), "data/2.png": png()})
    (tmp_path / "data" / "pictures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        RowError, match=r"'pictures/1.png' leaves the data folder .*leads by a link to .*elsewhere/1.png"
    ):
        locate(["pictures/1.png"], tmp_path / "data", where="row")
    with pytest.raises(RowError, match="leaves the data folder '[^']*'.$"):
        locate(["../elsewhere/1.png"], tmp_path / "data", where="row")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"files": 5}, "files must be a text, in quotes if it is a number; found 5"),
        ({"files": ["a.json", None]}, "expected the name of a file below --data, found None"),
        ({"hub": "a/b", "revision": 1234567}, "revision must be a text, in quotes if it is a number; found 1234567"),
        ({"hub": "a/b", "split": None}, "split must be a text"),
        ({"files": ["a.json"], "revision": "main"}, "revision is of a set on the hub. Found it without hub"),
    ],
)
def test_what_a_source_cannot_say_is_refused(source: Row, message: str, tmp_path: Path) -> None:
    written(tmp_path, **{"a.json": []})
    with pytest.raises(CardError, match=message):
        read(source, tmp_path)
