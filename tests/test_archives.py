"""Archives: pictures inside a zip are found by every spelling of their name, in every process, and nothing odd is opened."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import stat
import struct
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_dft import archives
from vlm_dft.archives import ZipMember, find_member, image_folder, read_member
from vlm_dft.errors import CardError, ImageError, RowError
from vlm_dft.media import image_size, open_image
from vlm_dft.recipes import load_recipe, read_recipe, recipe_root
from vlm_dft.rows import locate
from vlm_dft.sources import MediaAccess


def png(width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


def packed(path: Path, *names: str, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """An archive whose k-th picture is 5 + k wide."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for k, name in enumerate(names):
            archive.writestr(name, png(5 + k))
    return path


def width(source: Any) -> int:
    assert open_image(source).size[::-1] == image_size(source)
    return image_size(source)[1]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_picture_in_an_archive_has_its_pixels_by_any_compression(compression: int, tmp_path: Path) -> None:
    archive = packed(tmp_path / "images.zip", "a/1.png", "a/2.png", compression=compression)
    first, second = locate(["a/1.png", "a/2.png"], archive, where="row 7")
    assert (width(first), width(second)) == (5, 6)
    assert first == ZipMember(archive.resolve(), "a/1.png", len(png(5)), first.crc) and first.crc
    assert pickle.loads(pickle.dumps(first)) == first and len(pickle.dumps(first)) < 300


@pytest.mark.parametrize(
    ("members", "root", "name"),
    [
        (["1.png", "x/2.png"], "images.zip", "1.png"),
        (["images/1.png", "images/2.png"], "images.zip", "images/1.png"),
        (["images/1.png", "images/2.png"], "images.zip", "1.png"),  # below the one folder of the archive
        (["all/1.png", "__MACOSX/all/._1.png"], "images.zip", "1.png"),
        (["1.png", "x/2.png"], "images.zip", "images/1.png"),  # zipped from inside the folder
        (["./1.png", "x/2.png"], "images.zip", "./x/../1.png"),
        (["images/1.png", "x/2.png"], ".", "images/1.png"),  # beside the rows, not named in the card
        (["1.png", "x/2.png"], ".", "images/1.png"),
        (["geo/1.png"], ".", "images/geo/1.png"),
    ],
)
def test_a_name_is_found_however_the_archive_was_packed(
    members: list[str], root: str, name: str, tmp_path: Path
) -> None:
    packed(tmp_path / "images.zip", *members)
    assert width(locate([name], tmp_path / root, where="row 7")[0]) == 5


def test_an_archive_below_a_folder_is_found_and_a_file_goes_before_it(tmp_path: Path) -> None:
    packed(tmp_path / "data" / "images.zip", "1.png", "x/2.png")
    (tmp_path / "data" / "images" / "x").mkdir(parents=True)
    (tmp_path / "data" / "images" / "x" / "2.png").write_bytes(png(30))
    found = locate(["data/images/1.png", "data/images/x/2.png"], tmp_path, where="row 7")
    assert [width(source) for source in found] == [5, 30]


def test_a_card_takes_its_pictures_from_an_archive(tmp_path: Path) -> None:
    packed(tmp_path / "images.zip", "images/1.png", "images/2.png")
    (tmp_path / "rows.jsonl").write_text(
        '{"q": "q", "a": "a", "i": "images/2.png"}\n{"q": "q", "a": "a", "i": "gone.png"}\n'
    )
    (tmp_path / "card.yaml").write_text(
        'description: d\nlicence: l\nsource: {files: rows.jsonl}\nprompt: "{q}"\nresponse: "{a}"\nimages: i\nimage_root: images.zip\n'
    )
    card = read_recipe(str(tmp_path / "card.yaml"))
    example = load_recipe(card, str(tmp_path), limit=1)[0][0]
    assert width(example.images[0]) == 6
    with pytest.raises(
        RowError, match="card row 1: no image file at .*gone.png.*, nor in images.zip. Check the data folder"
    ):
        load_recipe(card, str(tmp_path))


def _width(source: Any) -> int:
    return image_size(source)[1]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_an_archive_at_once(method: str, tmp_path: Path) -> None:
    names = [f"{k:03}.png" for k in range(60)]
    found = locate(names, packed(tmp_path / "images.zip", *names), where="row")
    assert width(found[9]) == 14  # opened here first: forked workers share the descriptor
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context(method)) as pool:
        assert list(pool.map(_width, found * 5)) == [5 + k for k in range(60)] * 5


def test_an_archive_is_opened_once_and_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    real = zipfile.ZipFile
    monkeypatch.setattr(archives.zipfile, "ZipFile", lambda *a: opened.append(a) or real(*a))
    path = packed(tmp_path / "images.zip", "1.png")
    opened.clear()
    members = [find_member(path, "1.png", where="w") for _ in range(5)]
    assert members[0] is not None and read_member(members[0], where="w") == png(5) and len(opened) == 1
    packed(path, "2.png", "1.png")
    again = find_member(path, "1.png", where="w")
    assert again is not None and read_member(again, where="w") == png(6)


def test_a_root_of_the_collator_confines_archives_too(tmp_path: Path) -> None:
    inside, outside = packed(tmp_path / "root" / "a.zip", "1.png"), packed(tmp_path / "b.zip", "1.png")
    access = MediaAccess(root=tmp_path / "root")
    assert open_image(ZipMember(inside, "1.png"), access=access).size == (5, 4)
    with pytest.raises(ImageError, match="leaves the data folder"):
        open_image(ZipMember(outside, "1.png"), access=access)


@pytest.mark.parametrize("name", ["../1.png", "/1.png", "x/../../1.png", "file:///1.png"])
def test_no_name_leaves_an_archive(name: str, tmp_path: Path) -> None:
    archive = packed(tmp_path / "root" / "images.zip", "1.png")
    packed(tmp_path / "root" / "1.zip", "1.png")
    with pytest.raises(RowError, match="leaves the data folder"):
        locate([name], archive, where="row 7")


def test_a_link_to_an_archive_outside_is_not_followed(tmp_path: Path) -> None:
    packed(tmp_path / "secret.zip", "1.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "images.zip").symlink_to(tmp_path / "secret.zip")
    with pytest.raises(RowError, match="images.zip leaves the data folder"):
        locate(["images/1.png"], tmp_path / "root", where="row 7")


# Archives that are wrong


def odd(folder: Path, name: str, **changes: Any) -> Path:
    """An archive with one member that has something odd about it."""
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        info = zipfile.ZipInfo(name)
        info.compress_type = zipfile.ZIP_DEFLATED
        for key, value in changes.items():
            setattr(info, key, value)
        archive.writestr(info, png(5))
    return folder / "images.zip"


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/etc/evil.png", "..\\evil.png", "C:\\evil.png"])
def test_an_archive_with_names_that_leave_it_is_refused_whole(name: str, tmp_path: Path) -> None:
    archive = odd(tmp_path, "good.png")
    with zipfile.ZipFile(archive, "a") as more:
        more.writestr(name, b"x")
    for act in (
        lambda: locate(["good.png"], archive, where="row 7"),
        lambda: open_image(ZipMember(archive, "good.png")),
    ):
        with pytest.raises(
            ImageError, match="images.zip holds .*evil.png', a name that leaves the archive's folder. None of it"
        ):
            act()
    with pytest.raises(CardError, match="Recipe 'x': images.zip holds .*evil.png"):
        image_folder(tmp_path, "images.zip", where="Recipe 'x'")
    assert os.listdir(tmp_path) == ["images.zip"]  # nothing was unpacked


def test_links_and_encrypted_members_are_refused(tmp_path: Path) -> None:
    link = odd(tmp_path, "1.png", external_attr=(stat.S_IFLNK | 0o777) << 16)
    with pytest.raises(ImageError, match="row 7: '1.png' in images.zip is a link or a device, which is not followed"):
        locate(["1.png"], link, where="row 7")
    content = bytearray(odd(tmp_path, "1.png").read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 8] |= 1
    link.write_bytes(content)
    with pytest.raises(ImageError, match="'1.png' in images.zip is encrypted. Unpack the archive with its password"):
        locate(["1.png"], link, where="row 7")


def test_a_member_that_announces_a_hundred_times_its_size_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(50_000_000))
        archive.writestr("flat.png", bytes(900_000))  # a plain picture may be as flat
    for act in (
        lambda: locate(["bomb.png"], path, where="row 7"),
        lambda: open_image(ZipMember(path, "bomb.png"), where="row 7"),
    ):
        with pytest.raises(
            ImageError, match="row 7: 'bomb.png' in images.zip announces 50,000,000 bytes in 4.,.*Not unpacked"
        ):
            act()
    assert locate(["flat.png"], path, where="row 7")[0].size == 900_000


def test_a_member_that_says_less_than_it_holds_is_found_damaged(tmp_path: Path) -> None:
    content = bytearray(odd(tmp_path, "1.png").read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 30)  # bytes announced
    (tmp_path / "images.zip").write_bytes(content)
    with pytest.raises(ImageError, match="images.zip!/1.png' is damaged or cut short .BadZipFile: Bad CRC-32"):
        open_image(locate(["1.png"], tmp_path / "images.zip", where="row 7")[0])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "images.zip is a git-LFS pointer, not the file itself. Run `git lfs pull`"),
        (b"<html>404</html>", "images.zip is an HTML page"),
        (b"", "images.zip is empty"),
        (b"ustar" * 200, "images.zip is no zip archive .it begins b'ustarustarus'.. Unpack it, and name the folder"),
        (
            None,
            "images.zip is a damaged or cut zip archive .*Download it again; if it is one of several parts, join them first",
        ),
    ],
)
def test_a_file_that_is_no_archive_is_named_for_what_it_is(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = packed(tmp_path / "images.zip", "1.png")
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    with pytest.raises(CardError, match=f"Recipe 'x': {message}"):
        image_folder(tmp_path, "images.zip", where="Recipe 'x'")
    with pytest.raises(ImageError, match=f"row 7: {message}"):
        locate(["images/1.png"], tmp_path, where="row 7")


@pytest.mark.parametrize(
    ("parts", "command"),
    [
        (["image.zip.part-aa", "image.zip.part-ab"], "is in 2 parts. Join them: cat image.zip.part-\\* > image.zip."),
        (["image.zip.part-aa"], "is in 1 parts. Join them: cat image.zip.part-\\* > image.zip."),
        (["image.zip_aa", "image.zip_ab", "image.zip_ac"], "is in 3 parts. Join them: cat image.zip_\\* > image.zip."),
        (["image.zip.001", "image.zip.002"], "is in 2 parts. Join them: cat image.zip.\\* > image.zip."),
        (["image.z01"], "is in 1 parts. Join them: zip -s 0 image.zip --out whole.zip"),
        ([], "expected a folder or a zip archive image.zip in .*; it is not there"),
    ],
)
def test_an_archive_in_parts_is_to_be_joined_first(parts: list[str], command: str, tmp_path: Path) -> None:
    for part in parts:
        (tmp_path / part).write_bytes(b"PK")
    card = {"name": "x", "source": {"files": "rows.json"}, "image_root": "image.zip"}
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(CardError, match=f"Recipe 'x', image_root: .*{command}"):
        recipe_root(card, str(tmp_path))
    if parts and not parts[0].startswith("image.z0"):
        with pytest.raises(RowError, match=f"no image file at .*1.png.*The folder holds .*{command.split('. ')[1]}"):
            locate(["image/1.png"], tmp_path, where="row 7")


def test_a_missing_picture_names_the_archive_that_lies_there(tmp_path: Path) -> None:
    packed(tmp_path / "pictures.zip", "1.png")
    with pytest.raises(
        RowError, match="no image file at .*The folder holds pictures.zip: name it as the card's image_root"
    ):
        locate(["1.png"], tmp_path, where="row 7")


def test_the_real_pointer_named_as_an_archive_is_said_to_be_one(shared: Path) -> None:
    with pytest.raises(CardError, match="images.zip is a git-LFS pointer, not the file itself. Run `git lfs pull`"):
        image_folder(shared / "bad_inputs", "images.zip", where="Recipe 'x'")
