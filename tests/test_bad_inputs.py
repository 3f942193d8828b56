"""Bad inputs through the collator and the front door: the right pixels, or an error that names the row and what to do."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
import sys
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vlm_dft import ChatCollator
from vlm_dft.cli import main
from vlm_dft.errors import ImageError, RowError, UserError
from vlm_dft.models import load_processor
from vlm_dft.recipes import load_recipe, read_recipe
from vlm_dft.sources import MediaAccess

torch.set_num_threads(1)
Row = dict[str, Any]


@cache
def collator() -> ChatCollator:
    return ChatCollator(load_processor("tiny"))


def user(content: Any, **extra: Any) -> Row:
    return {"role": "user", "content": content, **extra}


def assistant(content: Any, **extra: Any) -> Row:
    return {"role": "assistant", "content": content, **extra}


def talk(**extra: Any) -> Row:
    return {"messages": [user("q"), assistant("b")], **extra}


def about(picture: Any, **extra: Any) -> Row:
    return {"messages": [user("<image>What is it?"), assistant("Red.")], "images": [picture], **extra}


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds nothing."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def pixels(image: Image.Image) -> torch.Tensor:
    """What the processor makes of a picture that is already RGB."""
    assert image.mode == "RGB"
    return collator().processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]


def on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


NOISE = np.random.default_rng(0).integers(0, 256, (84, 112, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)
PNG = encoded(PICTURE, "PNG")


# Pictures that are right, whatever their form


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(PICTURE, "PNG", exif=exif)


def half_clear(mode: str) -> Image.Image:
    image = PICTURE.convert(mode)
    image.putalpha(Image.fromarray(np.where(np.arange(112) < 56, 0, 255).astype(np.uint8)[None].repeat(84, 0)))
    return image


def white_left(image: Image.Image) -> Image.Image:
    shown = image.copy()
    shown.paste("white", (0, 0, 56, 84))
    return shown


def palette() -> Image.Image:
    image = Image.fromarray((np.arange(84 * 112).reshape(84, 112) // 56 % 2).astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    return image


def stripes(one: str, two: str) -> Image.Image:
    image = Image.new("RGB", (112, 84), one)
    image.paste(two, (56, 0, 112, 84))
    return image


def animated() -> bytes:
    frames = [Image.new("RGB", (112, 84), color) for color in ("red", "blue", "lime")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


GREY = np.arange(84 * 112, dtype=np.uint16).reshape(84, 112) * 6  # 0 .. 56442
CMYK = Image.new("CMYK", (112, 84), (0, 255, 255, 0))
RIGHT: dict[str, tuple[Any, Callable[[], Image.Image]]] = {
    "rgb": (PNG, lambda: PICTURE),
    "jpeg named png": (encoded(PICTURE, "JPEG"), lambda: Image.open(io.BytesIO(encoded(PICTURE, "JPEG")))),
    "bmp": (encoded(PICTURE, "BMP"), lambda: PICTURE),
    "lossless webp": (encoded(PICTURE, "WEBP", lossless=True), lambda: PICTURE),
    "tiff": (encoded(PICTURE, "TIFF"), lambda: PICTURE),
    "turned by exif": (turned(6), lambda: PICTURE.transpose(Image.Transpose.ROTATE_270)),
    "mirrored by exif": (turned(2), lambda: PICTURE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "rgba": (encoded(half_clear("RGB"), "PNG"), lambda: white_left(PICTURE)),
    "grey with alpha": (encoded(half_clear("L"), "PNG"), lambda: white_left(PICTURE.convert("L").convert("RGB"))),
    "clear palette": (encoded(palette(), "PNG", transparency=0), lambda: stripes("white", "red")),
    "clear gif": (encoded(palette(), "GIF", transparency=0), lambda: stripes("white", "red")),
    "opaque palette": (encoded(palette(), "PNG"), lambda: stripes("black", "red")),
    "animated": (animated(), lambda: Image.new("RGB", (112, 84), "red")),
    "cmyk": (encoded(CMYK, "TIFF"), lambda: Image.new("RGB", (112, 84), "red")),
    "16 bits of grey": (
        encoded(Image.fromarray(GREY), "PNG"),
        lambda: Image.fromarray((GREY >> 8).astype(np.uint8)).convert("RGB"),
    ),
    "one bit": (encoded(stripes("black", "white").convert("1"), "PNG"), lambda: stripes("black", "white")),
    "one pixel": (encoded(Image.new("RGB", (1, 1), "red"), "PNG"), lambda: Image.new("RGB", (1, 1), "red")),
    "1 x 200": (encoded(Image.new("RGB", (1, 200), "red"), "PNG"), lambda: Image.new("RGB", (1, 200), "red")),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_picture_of_any_form_gives_its_pixels_on_white(name: str, tmp_path: Path) -> None:
    content, expected = RIGHT[name]
    path = tmp_path / "a.jpg"  # whatever it is, the name says JPEG
    path.write_bytes(content)
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    for source in (str(path), path, content, {"bytes": content, "path": None}, {"bytes": None, "path": str(path)}, uri):
        batch = collator()([about(source)])
        assert torch.equal(batch["pixel_values"], pixels(expected()))
        measured = collator().measure(about(source))
        assert measured.tokens == batch["input_ids"].shape[1]  # counted from the header, without decoding


def test_every_real_odd_picture_has_the_pixels_it_has_on_white(shared: Path) -> None:
    known = json.loads((shared / "bad_inputs" / "bad_inputs.json").read_text())
    pictures = [entry for entry in known if "format" in entry]
    assert len(pictures) == 12
    for entry in pictures:
        path = shared / "bad_inputs" / entry["file"]
        shown = on_white(Image.open(path))
        assert list(shown.size) == entry["size"]
        batch = collator()([about(str(path))])
        assert torch.equal(batch["pixel_values"], pixels(shown)), entry["file"]
        assert collator().measure(about(str(path))).tokens == batch["input_ids"].shape[1]
        assert batch["pixel_values"].std() > 0.01, f"{entry['file']} is one colour"


def test_a_row_of_every_odd_picture_is_trained_through_a_recipe(shared: Path, tmp_path: Path) -> None:
    known = json.loads((shared / "bad_inputs" / "bad_inputs.json").read_text())
    names = [entry["file"] for entry in known if "format" in entry]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(about(name)) + "\n" for name in names))
    examples, account = load_recipe(read_recipe(str(tmp_path / "chats.jsonl")), str(shared / "bad_inputs"))
    assert account.read == 12 and [Path(e.images[0]).name for e in examples] == names
    batch = collator()(examples)
    assert batch["image_grid_thw"].shape == (12, 3)


def test_the_real_files_that_are_no_pictures_are_named_for_what_they_are(shared: Path) -> None:
    for name, what in (
        ("images.zip", "a git-LFS pointer.*git lfs pull"),
        ("merge-example_trailing_comma.json", "text that begins"),
    ):
        with pytest.raises(ImageError, match=f"row-17, image 0: .*{name}.* is not a readable image: it is {what}"):
            collator()([about(str(shared / "bad_inputs" / name), id="row-17")])


def test_the_real_json_with_trailing_commas_is_refused_by_line(shared: Path) -> None:
    with pytest.raises(UserError, match="merge-example_trailing_comma.json"):
        load_recipe(read_recipe(str(shared / "bad_inputs" / "merge-example_trailing_comma.json")), None)


# Pictures that are wrong

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
WRONG: dict[str, tuple[bytes, str]] = {
    "cut in its pixels": (PNG[: len(PNG) // 2], "damaged or cut short .* Restore the file, or drop the row"),
    "cut in its header": (PNG[:20], "damaged or cut short .* Restore the file, or drop the row"),
    "a cut jpeg": (encoded(PICTURE, "JPEG")[:900], "damaged or cut short .* Restore the file, or drop the row"),
    "empty": (b"", r"it is empty \(0 bytes\). Restore the file, or drop the row"),
    "zeros": (bytes(500), "no image format that is known here .* Convert it, or drop the row"),
    "a bomb": (
        header(60_000, 60_000),
        "announces more pixels than are allowed: .* Shrink the picture, or drop the row",
    ),
    "no pixels": (header(0, 5), "damaged or cut short|is 0 x 5 pixels"),
    "svg": (SVG, "it is an SVG drawing, not a raster image. Render it to PNG"),
    "lfs": (LFS, "it is a git-LFS pointer, .* Run `git lfs pull`"),
    "html": (b"<!DOCTYPE html><html>404</html>", "it is an HTML page, .* Download it again"),
    "json": (b'{"error": "denied"}', "it is text that begins .*error.* Expected the image itself"),
    "zip": (b"PK\x03\x04" + bytes(50), "it is an archive. Unpack it"),
    "1 x 300": (encoded(Image.new("RGB", (1, 300)), "PNG"), "aspect ratio must be smaller than 200, got 300"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_picture_is_refused_with_row_finding_and_remedy(name: str, tmp_path: Path) -> None:
    content, message = WRONG[name]
    (tmp_path / "a.png").write_bytes(content)
    for source in (str(tmp_path / "a.png"), content, {"bytes": content}):
        with pytest.raises(RowError, match=message) as caught:
            collator()([talk(), about(source, id="row-17", source="set")])
        assert "set row-17" in str(caught.value) and "example 0" not in str(caught.value)  # the first row is fine


def test_the_other_rows_of_a_batch_with_a_wrong_picture_are_not_blamed(tmp_path: Path) -> None:
    """Where the processor refuses one of several pictures, the message names the one."""
    thin = Image.new("RGB", (1, 300))
    with pytest.raises(RowError, match="aspect ratio") as caught:
        collator()([about(PNG, id="fine"), about(thin, id="thin"), about(PNG, id="good")])
    assert "thin" in str(caught.value)
    assert "fine" not in str(caught.value) and "good" not in str(caught.value)


def test_pictures_that_are_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    for source, message in (
        (tmp_path / "gone.png", "no image file at .*gone.png.* Check the data folder"),
        (tmp_path / "folder.png", "is a folder. Expected the path of one image file"),
        (tmp_path / "circle.png", "cannot be opened as a path"),
        ("/dev/zero", "not a regular file"),
        ("a" * 5000, "cannot be opened as a path"),
        ("a\0.png", "cannot be opened as a path"),
        ("\ud800.png", "cannot be opened as a path"),
        ("http://example.invalid/a.png", r"is remote and its host example.invalid:80 is not allowed \(allowed: none\)"),
        ("s3://bucket/a.png", "is remote and not a plain http"),
        ("data:image/png;base64,@@@", "is not valid base64"),
        (None, "expected a PIL image, a path, a URI or bytes, found NoneType"),
        (7, "expected a PIL image, a path, a URI or bytes, found int"),
        ({}, "expected 'bytes' or 'path' in the image's dict"),
        ({"bytes": None, "path": None}, "expected 'bytes' or 'path' in the image's dict"),
        (np.zeros((4, 4)), r"expected an array of uint8 \[H, W, 3\], found float64 \[4, 4\]"),
    ):
        with pytest.raises(ImageError, match=message) as caught:
            collator()([about(source, id="row-17")])
        assert "row-17, image 0" in str(caught.value)


def test_a_collator_with_a_root_opens_nothing_outside_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(PNG)
    (root / "inside.png").write_bytes(PNG)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "again.png").symlink_to("inside.png")
    confined = ChatCollator(load_processor("tiny"), access=MediaAccess(root=root))
    for name in ("inside.png", "again.png"):
        assert torch.equal(confined([about(name)])["pixel_values"], pixels(PICTURE))
    for name in ("../secret.png", "link.png", str(tmp_path / "secret.png"), (tmp_path / "secret.png").as_uri()):
        for act in (lambda row: confined([row]), confined.measure):
            with pytest.raises(ImageError, match="row-17, image 0: .* leaves the data folder"):
                act(about(name, id="row-17"))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_row_in_a_worker_reaches_the_user_with_its_message(workers: int, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG[: len(PNG) // 2])
    rows = [talk(), talk(), about(str(tmp_path / "a.png"), id="row-17"), talk()]
    loader = DataLoader(rows, batch_size=2, collate_fn=collator(), num_workers=workers)
    with pytest.raises(
        ImageError, match="row-17, image 0: .* damaged or cut short .* Restore the file, or drop the row"
    ):
        list(loader)


# Through the front door


def train(chats: Path, output: Path, *words: str) -> int:
    return main(["train", "--recipe", str(chats), "--output", str(output), "--batch_size", "2", *words])


def written(folder: Path, *rows: Any) -> Path:
    (folder / "good.png").write_bytes(PNG)
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", WRONG)
def test_training_refuses_a_wrong_picture_and_leaves_nothing_behind(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = WRONG[name]
    (tmp_path / "a.png").write_bytes(content)
    chats, output = written(tmp_path, about("good.png"), about("a.png")), tmp_path / "run"
    assert train(chats, output) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and re.search(r"chats (row )?1\b", said) and "Traceback" not in said
    assert not [path for path in output.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone.png", "chats row 1: no image file at .*gone.png.* Check the data folder"),
        ("folder.png", "chats row 1: no image file at .*folder.png"),
        ("../outside.png", "chats row 1: '../outside.png' leaves the data folder"),
        ("link.png", "chats row 1: 'link.png' leaves the data folder"),
        ("/etc/hostname", "chats row 1: '/etc/hostname' leaves the data folder"),
        ("http://example.invalid/a.png", "chats 1, image 0: .* is remote and its host .* is not allowed"),
        ("s3://bucket/a.png", "chats row 1: 's3://bucket/a.png' is remote. Download the images"),
        (None, "chats row 1|chats 1"),
        (7, "chats row 1|chats 1"),
        ({"a": 1}, "chats row 1|chats 1"),
    ],
)
def test_training_refuses_a_picture_that_is_nowhere(
    source: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "folder.png").mkdir()
    (tmp_path / "outside.png").write_bytes(PNG)
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    chats, output = written(folder, about("good.png"), about(source)), tmp_path / "run"
    assert train(chats, output) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and "Traceback" not in said
    assert not [path for path in output.rglob("*") if path.is_file()]


def test_a_repaired_picture_is_trained_into_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG[: len(PNG) // 2])
    chats, output = written(tmp_path, about("good.png"), about("a.png")), tmp_path / "run"
    assert train(chats, output) == 2
    (tmp_path / "a.png").write_bytes(PNG)
    assert train(chats, output) == 0
    assert (output / "checkpoint-1").is_dir()


def test_a_late_broken_picture_is_reported_from_the_loaders_worker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The header is right, so measuring passes; it lies behind the masks that are shown and the rows that are gauged."""
    (tmp_path / "a.png").write_bytes(PNG[: len(PNG) // 2])
    rows = [talk() for _ in range(600)]
    rows[301] = about("a.png")
    words = ("--micro_batch", "2", "--dataloader_num_workers", "1", "--batch_size", "60")
    assert train(written(tmp_path, *rows), tmp_path / "run", *words) == 2
    said = capsys.readouterr().err
    assert "chats 301, image 0" in said and "Restore the file, or drop the row" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "chats.jsonl, line 2: not valid JSON"),
        ("[1, 2]", "chats.jsonl, row 1: expected an object, found list"),
        ("5", "chats.jsonl, row 1: expected an object, found int"),
        ('{"messages": "hi"}', "chats row 1"),
        ('{"messages": null}', "chats row 1: no conversation"),
        ('{"messages": []}', "chats row 1"),
        ('{"messages": ["hi"]}', "chats row 1, turn 0"),
        ('{"messages": [{"role": "user", "content": 5}]}', "chats row 1, message 0: content must be a string"),
        ('{"messages": [{"role": "user", "content": null}]}', "chats row 1, turn 0: content must be a string"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "chats row 1, turn 0: unknown role"),
        ('{"messages": [{"from": {"a": 1}, "value": "a"}]}', "chats row 1, turn 0: unknown role"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "chats 1: no assistant message to train on"),
        ('{"messages": {"role": "user", "content": "a"}}', "chats row 1"),
        ('{"id": {"a": 1}, "messages": [{"role": "user", "content": 5}]}', "chats row"),
        ('{"messages": [{"role": "user", "content": "a \\ud800"}, {"role": "assistant", "content": "b"}]}', "chats 1: .*U.D800"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "wieght": 2}]}',
         "chats row 1, message 1: unknown key 'wieght'. Did you mean 'weight'"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": "x"}',
         "chats row 1: tools must be a list of schemas"),
        ('{"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "b"}]}',
         "chats row 1: 1 <image> markers but no images"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "images": {"a": 1}}',
         "chats row 1|chats 1"),
    ],
)  # fmt: skip
def test_training_refuses_an_odd_line_by_name(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = written(tmp_path, talk())
    with chats.open("a") as file:
        file.write(line + "\n")
    assert train(chats, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and "Traceback" not in said, said
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_a_file_that_is_not_utf_8_or_empty_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, message in (
        (b"", "chats.jsonl is empty"), (b"\n\n", "chats.jsonl is empty"), (b'{"a": "\xff"}', "chats.jsonl, line 1: expected UTF-8 text"),
        (json.dumps(talk()).encode("utf-16"), "expected UTF-8 text"), (b"\0\0", "null bytes"), (b"[]", "has no rows"),
    ):  # fmt: skip
        (tmp_path / "chats.jsonl").write_bytes(content)
        assert train(tmp_path / "chats.jsonl", tmp_path / "run") == 2
        assert message in capsys.readouterr().err


def test_line_separators_and_a_byte_order_mark_do_not_end_a_line(tmp_path: Path) -> None:
    """U+2028 and U+0085 are line ends to str.splitlines, and not to JSON lines."""
    row = {"messages": [user("a\u2028b\u0085c"), assistant("d\u2029e")]}
    text = json.dumps(row, ensure_ascii=False) + "\r\n\r\n" + json.dumps(talk()) + "\r\n"
    (tmp_path / "chats.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    examples, account = load_recipe(read_recipe(str(tmp_path / "chats.jsonl")), None)
    assert account.read == 2 and examples[0].messages[0]["content"] == "a\u2028b\u0085c"
    batch = collator()(examples)
    assert trained(batch) == ["d\u2029e<|im_end|>", "b<|im_end|>"]


# Odd rows


def trained(batch: Row) -> list[str]:
    """The text of every row's targets."""
    tokenizer = collator().tokenizer
    return [
        tokenizer.decode([i for i in row if i != -100], skip_special_tokens=False) for row in batch["labels"].tolist()
    ]


CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
ODD: list[tuple[Any, str]] = [
    ("abc", "expected an Example or a dict with 'messages', found str 'abc'"),
    (None, "expected an Example or a dict with 'messages', found NoneType"),
    (3, "expected an Example or a dict with 'messages', found int 3"),
    ([user("q"), assistant("b")], "expected (an Example or a dict with 'messages', found list|a key 'messages')"),
    ({}, r"expected a key 'messages' \(or 'prompt' and 'completion'\), found "),
    ({"messages": "hi"}, "expected a non-empty list of messages, found str 'hi'"),
    ({"messages": user("q")}, "expected a non-empty list of messages, found dict"),
    ({"messages": 5}, "expected a non-empty list of messages, found int 5"),
    ({"messages": []}, r"expected a non-empty list of messages, found list \[\]"),
    ({"messages": ["q", "b"]}, "message 0: expected keys 'role' and 'content', found str 'q'"),
    ({"messages": [None]}, "message 0: expected keys 'role' and 'content', found NoneType"),
    ({"messages": [[user("q"), assistant("b")]]}, "message 0: expected keys 'role' and 'content', found list"),
    ({"messages": [{"content": "q"}]}, "message 0: expected keys 'role' and 'content'"),
    ({"messages": [user(5), assistant("b")]}, "message 0: content must be a string or a list of parts, found int 5"),
    ({"messages": [user(None), assistant("b")]}, "message 0: content must be .*found NoneType"),
    ({"messages": [user({"type": "text", "text": "x"}), assistant("b")]}, "message 0: content must be .* found dict"),
    ({"messages": [user(b"x"), assistant("b")]}, "message 0: content must be .* found bytes 1 bytes"),
    ({"messages": [user([[{"type": "text", "text": "x"}]]), assistant("b")]}, "message 0: expected parts .* found list"),
    ({"messages": [user(["x"]), assistant("b")]}, "message 0: expected parts .* found str 'x'"),
    ({"messages": [user([None]), assistant("b")]}, "message 0: expected parts .* found NoneType"),
    ({"messages": [user([{"text": "x"}]), assistant("b")]}, "message 0: expected parts .* found dict"),
    ({"messages": [user([{"type": ["text"], "text": "x"}]), assistant("b")]}, "message 0: expected parts .* found dict"),
    ({"messages": [user([{"type": "text", "text": 5}]), assistant("b")]}, "message 0: expected parts .* found dict"),
    ({"messages": [user([{"type": "audio", "audio": "x"}]), assistant("b")]}, "message 0: expected parts .* found dict"),
    ({"messages": [user("q"), assistant(5)]}, "message 1: content must be a string"),
    ({"messages": [user("q"), assistant("")]}, "message 1: the assistant's answer is empty. Drop the row"),
    ({"messages": [{"role": 1, "content": "x"}]}, "message 0: unknown role 1. Expected one of"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "message 0: unknown role"),
    ({"messages": [{"role": "usr", "content": "x"}]}, "message 0: unknown role 'usr'. Expected one of"),
    ({"messages": [user("q"), assistant("b", wieght=2)]}, "unknown key 'wieght'. Did you mean 'weight'"),
    ({"messages": [user("q"), assistant("b", reasoning_contents="x")]}, "Did you mean 'reasoning_content'"),
    ({"messages": [user("q"), {**assistant("b"), 5: 3}]}, "unknown key 5"),
    ({"messages": [user("q"), assistant("b", train="no")]}, "train must be true or false, found 'no'"),
    ({"messages": [user("q"), assistant("b", weight="2")]}, "weight must be a finite number above 0, found '2'"),
    ({"messages": [user("q"), assistant("b", weight=float("nan"))]}, "weight must be a finite number above 0, found nan"),
    ({"messages": [user("q"), assistant("b", objective="dtf")]}, "unknown objective 'dtf'. Did you mean 'dft'"),
    ({"messages": [user("q"), assistant("b", objective=["dft"])]}, "unknown objective"),
    ({"messages": [user("q", weight=2), assistant("b")]}, "'weight' belongs to an assistant's message, found one of the user"),
    ({"messages": [user("q"), assistant("b", reasoning_content=5)]}, "reasoning_content must be a string, found int 5"),
    ({"messages": [user("q"), assistant("b", tool_calls="x")]}, "tool_calls must be a list"),
    ({"messages": [user("q"), assistant("b", tool_calls={"a": 1})]}, "tool_calls must be a list"),
    ({"messages": [user("q"), assistant("b", tool_calls=[5])]}, "tool_calls must be a list"),
    ({"messages": [user("q"), assistant("b", tool_calls=[CALL])]}, "the chat template leaves out the assistant's tool_calls"),
    (talk(images={"bytes": PNG}), "media are given as a list under 'images', found images = dict"),
    (talk(images="a.png"), "media are given as a list under 'images', found images = str 'a.png'"),
    (talk(images=3), "media are given as a list under 'images', found images = int 3"),
    (talk(images=PICTURE), "media are given as a list under 'images', found images = "),
    (talk(image=PICTURE), "media are given as lists under 'images' and 'videos', found 'image'"),
    (talk(images=[[PICTURE]]), "image 0: expected a PIL image, a path, a URI or bytes, found list"),
    (talk(images=[None]), "image 0: expected a PIL image, a path, a URI or bytes, found NoneType"),
    (talk(videos="a.mp4"), "media are given as a list under 'videos', found videos = str"),
    (talk(videos=[[]]), "video 0: the video's list of frames is empty"),
    (talk(videos=[[None]]), "video 0, frame 0: expected a PIL image"),
    (talk(imagse=[PICTURE]), "'imagse'.* Did you mean 'images'"),
    (talk(tools="[]"), "tools must be a list"),
    (talk(tools=5), "tools must be a list"),
    (talk(tools={"a": 1}), "tools must be a list"),
    (talk(tools=[5]), "tools must be a list"),
    ({"prompt": 5, "completion": "x"}, "prompt must be a string or a list of messages, found int 5"),
    ({"prompt": "x", "completion": None}, "completion must be a string or a list of messages|expected a key 'messages'"),
    ({"prompt": "x", "completion": ["a"]}, r"completion must be a string or a list of messages, found list \['a'\]"),
    ({"prompt": "x", "completion": ""}, "the assistant's answer is empty"),
    ({"messages": [user([{"type": "image", "image": PICTURE, "max_pixel": 9}]), assistant("b")]}, "found 'max_pixel'"),
    ({"messages": [user([{"type": "image", "image": PICTURE, "path": "a"}]), assistant("b")]}, "one source at most"),
    ({"messages": [user([{"type": "image_url", "image_url": {}}]), assistant("b")]}, "image 0: expected .* found NoneType"),
    ({"messages": [user([{"type": "image"}, {"type": "image", "image": PICTURE}]), assistant("b")]}, "some image parts name a source"),
    ({"messages": [user([{"type": "image", "image": PICTURE}]), assistant("b")], "images": [PICTURE]}, "Give them in one place"),
    ({"messages": [user("<image><image>"), assistant("b")], "images": [PICTURE]}, "1 images but 2 places"),
    ({"messages": [user("a \ud800 b"), assistant("b")]}, r"U\+D800"),
    ({"messages": [user("a"), assistant("b \udfff")]}, r"U\+DFFF"),
    ({"messages": [user("a"), assistant("b \U0010fff0")]}, r"U\+10FFF0"),
    ({"messages": [user("a \U0010fff0"), assistant("b")]}, r"U\+10FFF0"),
]  # fmt: skip


@pytest.mark.parametrize("k", range(len(ODD)), ids=lambda k: ODD[k][1][:40])
def test_an_odd_row_is_refused_by_name(k: int) -> None:
    row, message = ODD[k]
    named = {**row, "id": "row-17"} if isinstance(row, dict) else row
    for act in (lambda: collator()([named]), lambda: collator().measure(named)):
        with pytest.raises(RowError, match=message) as caught:
            act()
        assert "row-17" in str(caught.value) or not isinstance(row, dict) or not row
        assert len(str(caught.value)) < 1500


WORKS: dict[str, tuple[Row, str]] = {
    "columns that arrow fills with None": (
        {
            "messages": [
                user([{"type": "image", "image": None, "text": None, "max_pixels": None},
                      {"type": "text", "text": "q", "image": None, "max_pixels": None}],
                     train=None, weight=None, objective=None, tool_calls=None, reasoning_content=None, name=None),
                assistant([{"type": "text", "text": "b", "image": None, "max_pixels": None}], train=None, weight=None,
                          objective=None, tool_calls=None, reasoning_content=None, name=None),
            ],
            "images": [{"bytes": PNG, "path": None}], "videos": None, "tools": None, "prompt": None, "completion": None,
            "image": None, "id": None, "source": None,
        },
        "b",
    ),
    "prompt and completion, with messages of None": ({"prompt": "q", "completion": "b", "messages": None}, "b"),
    "tuples": ({"messages": (user(({"type": "text", "text": "q"},)), assistant("b")), "images": ()}, "b"),
    "other columns": (talk(score=3, meta={"a": [1]}, difficulty=None, split="train", text="unused"), "b"),
    "an array of pixels": (about(NOISE), "Red."),
    "numbers of numpy": (
        {"messages": [user([{"type": "image", "image": PICTURE, "max_pixels": np.int64(50_176)}]),
                      assistant("b", weight=float(np.float32(2)))]},
        "b",
    ),
    "an id of another type": (talk(id=17), "b"),
    "an empty question": ({"messages": [user(""), assistant("b")]}, "b"),
    "an empty list as the question": ({"messages": [user([]), assistant("b")]}, "b"),
    "no question": ({"messages": [assistant("b")]}, "b"),
    "two questions": ({"messages": [user("x"), user("y"), assistant("b")]}, "b"),
    "NUL and other controls": ({"messages": [user("a\0\x07b"), assistant("c\0\x1bd")]}, "c\0\x1bd"),
    "line and paragraph separators": ({"messages": [user("a\u2028b"), assistant("c\u2028d\u2029e\u0085f")]}, "c\u2028d\u2029e\u0085f"),
    "a replacement character and a noncharacter": ({"messages": [user("\ufffd"), assistant("\ufffd \uffff x")]}, "\ufffd \uffff x"),
    "emoji, right to left, combining": ({"messages": [user("👩‍👩‍👧"), assistant("שלום 👩‍👩‍👧 q̃")]}, "שלום 👩‍👩‍👧 q̃"),
    "carriage returns": ({"messages": [user("a\r\nb"), assistant("c\r\nd\re")]}, "c\r\nd\re"),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKS)
def test_an_unusual_row_that_is_clear_is_trained(name: str) -> None:
    row, answer = WORKS[name]
    assert trained(collator()([row])) == [f"{answer}<|im_end|>"]
    assert collator().measure(row).targets > 1


@pytest.mark.parametrize("key", ["messages", "content", "images", "tools"])
def test_object_arrays_as_parquet_readers_give_them_work_or_are_refused_by_name(key: str) -> None:
    def array(*items: Any) -> Any:
        found = np.empty(len(items), dtype=object)
        found[:] = items
        return found

    row = {
        "messages": {"messages": array(user("q"), assistant("b")), "images": []},
        "content": {"messages": [user(array({"type": "text", "text": "q"})), assistant("b")]},
        "images": {**talk(), "images": array(PNG)},
        "tools": talk(tools=array()),
    }[key]
    try:
        batch = collator()([{**row, "id": "row-17"}])
    except RowError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert re.search("row-17.* found .*ndarray", refusal)
    else:
        assert trained(batch) == ["b<|im_end|>"] and ("pixel_values" in batch) == (key == "images")


def test_a_batch_is_refused_whole_and_the_next_one_is_right() -> None:
    """Nothing of a refused batch stays behind in the collator."""
    fresh = ChatCollator(load_processor("tiny"))
    expected = collator()([about(PNG), talk()])
    for bad in (about(b"no picture"), {"messages": "hi"}, {"messages": [user("a"), assistant("\ud800")]}):
        with pytest.raises(RowError):
            fresh([about(PNG), bad])
    batch = fresh([about(PNG), talk()])
    assert set(batch) == set(expected) and all(torch.equal(batch[key], expected[key]) for key in batch)
    assert not fresh.counts


# Long rows, by the work that they make


def work(act: Callable[[], Any]) -> int:
    """Bytecodes that act runs inside vlm_dft: what a quadratic loop in Python would square."""
    count = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if event == "call":
            if "/vlm_dft/" not in frame.f_code.co_filename:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


def turns(n: int, answer: str = "answer {}") -> Row:
    return {"messages": [m for k in range(n) for m in (user(f"question {k}"), assistant(answer.format(k)))]}


@pytest.mark.parametrize(
    "make",
    [
        turns,
        lambda n: turns(n, "\n\nanswer {}"),
        lambda n: {"messages": [user("<|image_pad|> and <|im_end|> " * n), assistant("b")]},
        lambda n: {"messages": [user("q"), assistant("<|im_end|> said " * n)]},
        lambda n: {"messages": [user("a <image> b " * n), assistant("b")]},
        lambda n: {"messages": [user([{"type": "text", "text": "word "}] * n), assistant("b")]},
        lambda n: {"messages": [user("word " * n), assistant("more " * n)]},
    ],
    ids=[
        "turns",
        "turns of blank beginnings",
        "tokens in a question",
        "tokens in an answer",
        "markers",
        "parts",
        "words",
    ],
)
@pytest.mark.parametrize("kind", ["collate", "measure", "explain"])
def test_four_times_the_row_makes_at_most_five_times_the_work(make: Callable[[int], Row], kind: str) -> None:
    own = ChatCollator(load_processor("tiny"))
    act = {"collate": lambda row: own([row]), "measure": own.measure, "explain": own.explain}[kind]
    act(make(3))  # what is found out once
    small, large = (work(lambda n=n: act(make(n))) for n in (100, 400))
    assert large < 5 * small


def test_ten_thousand_messages_are_trained_each_answer_once() -> None:
    batch = collator()([turns(5_000)])
    (said,) = trained(batch)
    assert said == "".join(f"answer {k}<|im_end|>" for k in range(5_000))


def test_a_text_of_a_million_characters_is_trained_whole() -> None:
    text = "Yes, it is so. " * 67_000
    assert len(text) > 1_000_000
    asked, answered = {"messages": [user(text), assistant("b")]}, {"messages": [user("q"), assistant(text + "No.")]}
    assert trained(collator()([asked])) == ["b<|im_end|>"]
    assert trained(collator()([answered])) == [f"{text}No.<|im_end|>"]


def test_a_million_characters_of_an_error_are_not_printed() -> None:
    for row in (
        {"messages": [user({"a": "x" * 1_000_000}), assistant("b")]},
        about("x" * 1_000_000),
        talk(tools="x" * 1_000_000),
    ):
        with pytest.raises(RowError) as caught:
            collator()([row])
        assert len(str(caught.value)) < 2_000
