"""Media: hand-made pictures and videos of every kind in; the right pixels, or an error that names the row, out."""

import base64
import http.server
import io
import os
import pickle
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from vlm_dft.errors import ConfigError, ImageError, RowError
from vlm_dft.media import image_size, open_image
from vlm_dft.sources import MediaAccess
from vlm_dft.video import Video, open_video, qwen_video

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, depth: int, colour: int, rows: bytes, *before: tuple[bytes, bytes], after: Any = ()
) -> bytes:
    """A PNG written by hand: each row of `rows` begins with its filter byte."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    first = b"".join(chunk(*b) for b in before)
    last = b"".join(chunk(*a) for a in after)
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + head + first + body + last + chunk(b"IEND", b"")


PICTURE = Image.new("RGB", (6, 4), RED)
PNG = encoded(PICTURE, "PNG")


# The sources


def test_every_way_to_name_a_picture_gives_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a b.png"
    path.write_bytes(PNG)
    text = base64.b64encode(PNG).decode()
    sources: list[Any] = [
        PICTURE,
        path,
        str(path),
        path.as_uri(),
        f"file://localhost{path.as_uri()[7:]}",
        PNG,
        bytearray(PNG),
        {"bytes": PNG, "path": "gone.png"},
        {"bytes": None, "path": str(path)},
        f"data:image/png;base64,{text}",
        f"data:image/jpeg;base64,{text[:40]}\n{text[40:]}",
        text,
        np.array(PICTURE),
        torch.from_numpy(np.array(PICTURE)),
    ]
    for source in sources:
        image = open_image(source)
        assert (type(image), image.mode, image.size, image.getpixel((5, 3))) == (Image.Image, "RGB", (6, 4), RED)
        assert image_size(source) == (4, 6)


def test_a_relative_path_starts_at_the_root(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PNG)
    assert open_image("pictures/a.png", access=MediaAccess(root=tmp_path)).size == (6, 4)
    assert open_image(tmp_path / "pictures" / "a.png", access=MediaAccess(root=tmp_path)).size == (6, 4)


@pytest.mark.parametrize("path", ["../secret.png", "link.png", "folder/../../secret.png", "{outside}"])
def test_a_path_that_leaves_the_root_is_refused(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(PNG)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    path = path.format(outside=tmp_path / "secret.png")
    for source in (path, {"path": path}) + (((tmp_path / "secret.png").as_uri(),) if path[0] == "/" else ()):
        with pytest.raises(ImageError, match="row 3: .* leaves the data folder"):
            open_image(source, where="row 3", access=MediaAccess(root=root))
        with pytest.raises(ImageError, match="row 3: .* leaves the data folder"):
            image_size(source, where="row 3", access=MediaAccess(root=root))


def test_a_symlink_inside_the_root_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").symlink_to("a.png")
    assert open_image("b.png", access=MediaAccess(root=tmp_path)).size == (6, 4)


def test_base64_that_is_also_a_file_name_is_the_file(tmp_path: Path) -> None:
    name = (base64.b64encode(PNG).decode().replace("/", "A"))[:80]
    assert open_image(base64.b64encode(PNG).decode(), access=MediaAccess(root=tmp_path)).size == (6, 4)
    (tmp_path / name).write_bytes(encoded(Image.new("RGB", (1, 2)), "PNG"))
    assert open_image(name, access=MediaAccess(root=tmp_path)).size == (1, 2)


def test_jpeg_base64_which_looks_like_an_absolute_path_is_recognised(tmp_path: Path) -> None:
    text = base64.b64encode(encoded(PICTURE, "JPEG")).decode()
    assert text.startswith("/9j/")
    assert open_image(text, access=MediaAccess(root=tmp_path)).size == (6, 4)


def test_a_callers_picture_is_neither_changed_nor_closed_nor_shared() -> None:
    caller = Image.open(io.BytesIO(encoded(PICTURE, "JPEG", exif=turned_exif(6))))
    opened = open_image(caller)
    opened.putpixel((0, 0), BLACK)
    assert opened.size == (4, 6) and caller.size == (6, 4)
    assert caller.getexif()[0x0112] == 6 and caller.getpixel((0, 0)) == (254, 0, 0)
    plain = PICTURE.copy()
    open_image(plain).putpixel((0, 0), BLACK)
    assert plain.getpixel((0, 0)) == RED


def test_access_and_pictures_travel_to_worker_processes() -> None:
    access = MediaAccess(root=Path("/data"), hosts=frozenset({"Example.ORG"}))
    assert pickle.loads(pickle.dumps(access)) == access and access.hosts == {"example.org"}
    for form in ("PNG", "JPEG", "GIF"):
        assert pickle.loads(pickle.dumps(open_image(encoded(PICTURE, form)))).size == (6, 4)


def test_hosts_written_as_one_string_are_refused() -> None:
    with pytest.raises(ConfigError, match="found the string 'example.org'"):
        MediaAccess(hosts="example.org")  # type: ignore[arg-type]


# The pixels


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa"])
def test_transparent_pixels_become_white(mode: str) -> None:
    assert open_image(Image.new(mode, (4, 4), (0,) * len(mode))).getpixel((0, 0)) == WHITE


def test_half_transparent_black_is_grey_on_white() -> None:
    assert open_image(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "PNG")).getpixel((0, 0)) == (127, 127, 127)


def test_a_palette_with_a_transparent_colour_is_composited_on_white() -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    palette.putpixel((1, 1), 1)
    for raw in (
        encoded(palette, "GIF", transparency=0),
        encoded(palette, "PNG", transparency=0),
        encoded(palette, "PNG", transparency=b"\0\xff"),
    ):
        image = open_image(raw)
        assert (image.getpixel((0, 0)), image.getpixel((1, 1))) == (WHITE, RED)
    with_alpha = palette.convert("PA")
    assert open_image(with_alpha).getpixel((1, 1)) == RED


@pytest.mark.parametrize(
    ("depth", "colour", "rows", "key"),
    [
        (1, 0, b"\0\x80", b"\0\x01"),  # two pixels: the largest value, then 0; the largest is the transparent one
        (2, 0, b"\0\xc0", b"\0\x03"),
        (4, 0, b"\0\xf0", b"\0\x0f"),
        (8, 0, b"\0\xff\0", b"\0\xff"),
        (16, 0, b"\0\xff\xff\0\0", b"\xff\xff"),
        (8, 2, b"\0\xff\xff\xff\0\0\0", b"\0\xff" * 3),
        (16, 2, b"\0" + b"\xff" * 6 + b"\0" * 6, b"\xff" * 6),
    ],
)
def test_a_transparent_colour_of_a_png_is_white_at_every_bit_depth(
    depth: int, colour: int, rows: bytes, key: bytes
) -> None:
    image = open_image(png(2, 1, depth, colour, rows, (b"tRNS", key)))
    assert (image.getpixel((0, 0)), image.getpixel((1, 0))) == (WHITE, BLACK)


@pytest.mark.parametrize(
    ("depth", "rows", "key"),
    [
        (1, b"\0\x40", b"\0\0"),  # two pixels: 0 is transparent, the second is not
        (2, b"\0\x10", b"\0\0"),
        (4, b"\0\x05", b"\0\0"),
        (8, b"\0\0\x55", b"\0\0"),
        (16, b"\0\0\0\x55\xff", b"\0\0"),
    ],
)
def test_a_transparent_black_of_a_grey_png_is_white(depth: int, rows: bytes, key: bytes) -> None:
    image = open_image(png(2, 1, depth, 0, rows, (b"tRNS", key)))
    grey = 255 if depth == 1 else 0x55
    assert (image.getpixel((0, 0)), image.getpixel((1, 0))) == (WHITE, (grey,) * 3)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    rows = b"\0" + struct.pack(">4H", 0, 300, 32768, 65535)
    raw = png(4, 1, 16, 0, rows)
    as_integers = Image.fromarray(np.array([[0, 300, 32768, 65535]], dtype=np.int32))
    tiff = encoded(Image.fromarray(np.array([[0, 300, 32768, 65535]], dtype=np.uint16)), "TIFF")
    for source in (raw, as_integers, tiff, Image.open(io.BytesIO(raw)).convert("I")):
        assert [open_image(source).getpixel((x, 0)) for x in range(4)] == [(v,) * 3 for v in (0, 1, 128, 255)]


def test_integers_that_hold_eight_bits_keep_them_and_others_are_refused() -> None:
    assert open_image(Image.fromarray(np.array([[0, 200]], dtype=np.int32))).getpixel((1, 0)) == (200, 200, 200)
    with pytest.raises(ImageError, match="row 1: expected grey of 0..255 or 0..65535, found -1..3. Rescale"):
        open_image(Image.fromarray(np.array([[-1, 3]], dtype=np.int32)), where="row 1")


def test_floats_of_unit_or_byte_range_are_scaled_and_others_are_refused() -> None:
    def floats(*values: float) -> Image.Image:
        return Image.fromarray(np.array([values], dtype=np.float32))

    assert open_image(floats(0.0, 0.5, 1.0)).getpixel((1, 0)) == (128, 128, 128)
    assert open_image(encoded(floats(0.0, 100.0, 255.0), "TIFF")).getpixel((1, 0)) == (100, 100, 100)
    for bad in (floats(0.0, 256.0), floats(-0.5, 0.5), floats(0.0, float("nan"))):
        with pytest.raises(ImageError, match="row 2: expected floating-point grey of 0..1 or 0..255, found"):
            open_image(bad, where="row 2")


def test_one_bit_and_cmyk_pictures_keep_their_colours() -> None:
    assert open_image(encoded(Image.new("1", (2, 2), 1), "PNG")).getpixel((0, 0)) == WHITE
    jpeg = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = np.array(open_image(jpeg))[4, 4].tolist()
    assert red > 245 and green < 10 and blue < 10


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    raw = encoded(
        frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    assert (open_image(raw).getpixel((0, 0)), image_size(raw)) == (RED, (3, 4))


CORNERS = {
    1: 0,
    2: 1,
    3: 2,
    4: 3,
    5: 0,
    6: 1,
    7: 2,
    8: 3,
}  # where the stored top left corner ends, clockwise from top left


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied_once(form: str, orientation: int) -> None:
    image = Image.new("RGB", (48, 32), "white")
    ImageDraw.Draw(image).rectangle((0, 0, 15, 15), fill="black")
    raw = encoded(image, form, exif=turned_exif(orientation))
    opened = open_image(raw)
    assert opened.size == ((48, 32) if orientation < 5 else (32, 48))
    w, h = opened.size
    corners = [(4, 4), (w - 5, 4), (w - 5, h - 5), (4, h - 5)]
    dark = [k for k, at in enumerate(corners) if sum(opened.getpixel(at)) < 300]  # type: ignore[arg-type]
    assert dark == [CORNERS[orientation]]
    assert image_size(raw) == (h, w) and open_image(opened).tobytes() == opened.tobytes()


def test_an_orientation_behind_the_pixels_of_a_png_counts_for_picture_and_size() -> None:
    exif = (b"eXIf", turned_exif(6).tobytes()[6:])
    rows = (b"\0" + b"\xff\0\0" * 6) * 4
    xmp = (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="8"/>')
    for raw in (png(6, 4, 8, 2, rows, exif), png(6, 4, 8, 2, rows, after=[exif]), png(6, 4, 8, 2, rows, after=[xmp])):
        assert (open_image(raw).size, image_size(raw)) == ((4, 6), (6, 4))


def test_a_turned_sixteen_bit_png_keeps_its_brightness() -> None:
    raw = png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 200, 32768), (b"eXIf", turned_exif(6).tobytes()[6:]))
    image = open_image(raw)
    assert (image.size, image.getpixel((0, 0)), image.getpixel((0, 1))) == ((1, 2), BLACK, (128, 128, 128))


def test_broken_exif_leaves_the_picture_as_it_lies() -> None:
    raw = encoded(PICTURE, "JPEG", exif=b"Exif\0\0nonsense")
    assert (open_image(raw).size, image_size(raw)) == ((6, 4), (4, 6))


def test_the_content_counts_and_not_the_extension(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(encoded(PICTURE, "JPEG"))
    assert open_image(tmp_path / "a.gif").size == (6, 4) and image_size(tmp_path / "a.gif") == (4, 6)


def test_a_png_with_right_checksums_and_too_little_data_is_refused_and_does_not_end_the_process() -> None:
    raw = png(64, 64, 8, 2, b"\0" * 500)
    with pytest.raises(ImageError, match="row 4: bytes .* damaged or cut short"):
        open_image(raw, where="row 4")


# What is refused


def refused(source: Any, match: str, access: MediaAccess | None = None, *, size_too: bool = True) -> None:
    for function in (open_image, *([image_size] if size_too else [])):
        with pytest.raises(ImageError, match=match) as caught:
            function(source, where="row 5", access=access or MediaAccess())
        assert str(caught.value).startswith("row 5") and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a git-LFS pointer.* Run `git lfs pull`"),
        (b"<?xml version='1.0'?>\n<svg xmlns='x'></svg>", "an SVG drawing, not a raster image"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"404: not found", "text that begins '404: not found'"),
        (b"%PDF-1.7", "a PDF document"),
        (b"PK\x03\x04zip", "an archive"),
        (b"\0\0\0\x18ftypheic", "a HEIC picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript drawing"),
        (bytes(range(200)), "no image format that is known here"),
        (b"\x89PNG\r\n\x1a\nbroken", "damaged or cut short"),
        (png(0, 4, 8, 2, b""), "row 5: "),
    ],
)
def test_what_is_not_a_picture_is_named(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    refused(content, match)
    refused(str(tmp_path / "a.png"), f"a.png.*{match}" if match != "row 5: " else match)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_truncated_picture_is_refused(form: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = encoded(noise, form)
    refused(whole[: len(whole) // 2], "is not a readable image: damaged or cut short", size_too=False)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (7, "expected a PIL image, a path, a URI or bytes, found int 7"),
        (None, "found NoneType None"),
        ({"url": "x"}, r"expected 'bytes' or 'path' in the image's dict, found keys \['url'\]"),
        ("data:image/png,raw", "expected data:image/...;base64"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("file://relative.png", "is not absolute"),
        ("a\0b", "cannot be opened as a path"),
        ("x" * 5000, "cannot be opened as a path"),
        ("no/such.png", "no image file at 'no/such.png'. Check the data folder"),
        ("s3://bucket/a.png", "is remote and not a plain http"),
        (np.zeros((4, 4), np.uint8), r"expected an array of uint8 \[H, W, 3\], found uint8 \[4, 4\]"),
        (np.zeros((4, 4, 3), np.float32), r"found float32 \[4, 4, 3\]"),
    ],
)
def test_a_source_that_cannot_be_opened_says_what_was_expected(source: Any, match: str) -> None:
    refused(source, match)


def test_folders_pipes_and_broken_links_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "is a folder. Expected the path of one image file")
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "is not a regular file")
    (tmp_path / "dangling.png").symlink_to("gone.png")
    refused(tmp_path / "dangling.png", "no image file at")
    (tmp_path / "circle.png").symlink_to("circle.png")
    refused(tmp_path / "circle.png", "cannot be opened as a path")
    refused("circle.png", "cannot be opened as a path", MediaAccess(root=tmp_path))


def test_an_unreadable_file_is_refused_for_its_permission(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.png").chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything; nobody may not
    try:
        refused(tmp_path / "a.png", "no permission to read")
    finally:
        os.seteuid(user)


def test_a_decompression_bomb_is_refused_from_its_header(recwarn: pytest.WarningsRecorder) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    refused(png(100_000, 100_000, 8, 2, b""), "announces more pixels than are allowed.*max_image_pixels = 89478485")
    small = png(100, 100, 8, 2, b"")  # no pixels behind the header: decoding would complain of those
    refused(small, "100 x 100 pixels; max_image_pixels = 9999. Shrink", MediaAccess(max_image_pixels=9999))
    refused(Image.new("RGB", (100, 100)), "100 x 100 pixels", MediaAccess(max_image_pixels=9999))
    assert limit == Image.MAX_IMAGE_PIXELS and not recwarn.list


def test_sizes_agree_with_pictures_for_every_format_and_mode() -> None:
    modes = {"PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"], "JPEG": ["L", "RGB", "CMYK"], "GIF": ["P", "RGB"],
             "WEBP": ["RGB", "RGBA"], "BMP": ["1", "L", "RGB"], "TIFF": ["L", "RGB", "CMYK", "F"], "PPM": ["L", "RGB"],
             "ICO": ["RGBA"]}  # fmt: skip
    for form, names in modes.items():
        for mode in names:
            raw = encoded(Image.new(mode, (32, 16)), form)
            opened = open_image(raw)
            assert (form, mode, image_size(raw)) == (form, mode, (opened.height, opened.width))
            assert opened.size == (32, 16) or form == "ICO"


def test_the_real_odd_pictures_open_and_the_rest_is_named(shared: Path) -> None:
    access = MediaAccess(root=shared / "bad_inputs")
    opened = 0
    for path in sorted((shared / "bad_inputs").iterdir()):
        if path.suffix in (".png", ".jpg"):
            image = open_image(path.name, access=access)
            assert image_size(path.name, access=access) == (image.height, image.width)
            assert image.convert("L").getextrema() != (0, 0)  # none turned wholly black
            opened += 1
    assert opened == 12
    refused("images.zip", "images.zip.*git-LFS pointer", access)
    refused("merge-example_trailing_comma.json", "is text that begins", access)


# Remote pictures


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """("127.0.0.1:port", the paths that were asked for) of a server of pictures and redirects."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            port = self.server.server_address[1]
            to = {"/here": "/a.png", "/away": f"http://localhost:{port}/a.png", "/local": "file:///etc/hostname"}
            if self.path in to:
                self.send_response(302)
                self.send_header("Location", to[self.path])
                self.end_headers()
                return
            body = {"/a.png": PNG, "/large": bytes(5000), "/unannounced": bytes(5000), "/short": PNG}.get(self.path)
            self.send_response(200 if body else 404)
            if self.path != "/unannounced":
                self.send_header("Content-Length", str(len(body or b"") + (9 if self.path == "/short" else 0)))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: Any) -> None:
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{running.server_address[1]}", asked
    running.shutdown()
    running.server_close()


def test_an_allowed_host_is_fetched_also_by_redirect_to_itself(server: tuple[str, list[str]]) -> None:
    host, asked = server
    access = MediaAccess(hosts=frozenset({host}))
    assert open_image(f"http://{host}/a.png", access=access).size == (6, 4)
    assert image_size(f"http://{host}/here", access=access) == (4, 6)
    assert asked == ["/a.png", "/here", "/a.png"]


@pytest.mark.parametrize("hosts", [[], ["localhost"], ["127.0.0.1"], ["127.0.0.1:1"], ["7.0.0.1:{port}"]])
def test_a_host_that_is_not_allowed_never_hears_of_it(server: tuple[str, list[str]], hosts: list[str]) -> None:
    host, asked = server
    access = MediaAccess(hosts=frozenset(h.format(port=host.split(":")[1]) for h in hosts))
    refused(f"http://{host}/a.png", "is remote and its host .* is not allowed.*give their folder as --data DIR", access)
    assert asked == []


@pytest.mark.parametrize("disguise", ["http://{host}@other.invalid/a.png", "http://other.invalid\\@{host}/a.png"])
def test_a_url_that_two_parsers_could_read_differently_is_refused(server: tuple[str, list[str]], disguise: str) -> None:
    host, asked = server
    refused(disguise.format(host=host), "not a plain http", MediaAccess(hosts=frozenset({host})))
    assert asked == []


def test_a_redirect_to_a_host_that_is_not_allowed_is_not_followed(server: tuple[str, list[str]]) -> None:
    host, asked = server
    access = MediaAccess(hosts=frozenset({host}))
    refused(f"http://{host}/away", "redirected from .*: 'http://localhost.* not allowed", access)
    assert asked == ["/away"] * 2
    with pytest.raises(ImageError, match="row 6: .*could not be fetched"):
        open_image(f"http://{host}/local", where="row 6", access=access)


@pytest.mark.parametrize("path", ["/large", "/unannounced"])
def test_a_download_over_the_limit_is_refused(server: tuple[str, list[str]], path: str) -> None:
    access = MediaAccess(hosts=frozenset({server[0]}), max_bytes=1000)
    refused(f"http://{server[0]}{path}", "larger than max_bytes = 1000", access)


def test_missing_short_and_silent_servers_are_named(server: tuple[str, list[str]]) -> None:
    host, _ = server
    access = MediaAccess(hosts=frozenset({host, "127.0.0.1:9"}), timeout=2)
    refused(f"http://{host}/none", "could not be fetched .HTTPError: HTTP Error 404", access)
    refused(f"http://{host}/short", "ended after|IncompleteRead", access)
    refused("http://127.0.0.1:9/a.png", "could not be fetched", access)


# Videos


def movie(path: Path, *, count: int = 10, size: tuple[int, int] = (64, 48), rate: int = 10, turn: int = 0) -> Path:
    """A lossless video whose frame k is grey of 20 * k, its top left corner white."""
    av = pytest.importorskip("av", reason="no video decoder: pip install av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4" if path.suffix != ".mkv" else "ffv1", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        if path.suffix != ".mkv":
            stream.bit_rate = 4_000_000
        if turn:
            if not hasattr(type(stream), "set_display_rotation"):
                pytest.skip("this PyAV cannot write a rotation (it can from 18 on); reading it works")
            stream.set_display_rotation(turn)
        for k in range(count):
            picture = np.full((size[1], size[0], 3), 20 * k, np.uint8)
            picture[: size[1] // 3, : size[0] // 3] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def greys(video: Video) -> list[int]:
    """Which frames these are, by their grey in the middle."""
    return [round(float(frame[:, 20:28, 28:36].float().mean()) / 20) for frame in video.frames]


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv"])
@pytest.mark.parametrize(
    ("keys", "indices"),
    [
        ({}, [0, 3, 6, 9]),  # 2 a second of 1 second, but at least 4
        ({"nframes": 2}, [0, 9]),
        ({"fps": 6}, [0, 2, 4, 5, 7, 9]),
        ({"fps": 10, "max_frames": 5}, [0, 3, 6, 9]),
        ({"video_start": 0.25, "video_end": 0.65, "min_frames": 2}, [3, 6]),
    ],
)
def test_frames_are_sampled_as_qwen_does(tmp_path: Path, name: str, keys: dict[str, Any], indices: list[int]) -> None:
    video = open_video(movie(tmp_path / name), keys=keys)
    assert greys(video) == indices == video.metadata["frames_indices"]
    assert (video.frames.dtype, video.frames.shape[1:]) == (torch.uint8, (3, 48, 64))
    total = 4 if "video_start" in keys else 10  # of the range, as qwen-vl-utils counts
    assert video.metadata["total_num_frames"] == total and video.metadata["video_backend"] == "pyav"
    assert video.metadata["fps"] == 10 and video.sample_fps == pytest.approx(len(indices) / total * 10)


def test_video_bytes_and_uris_open_like_files(tmp_path: Path) -> None:
    path = movie(tmp_path / "a.mp4")
    for source in (path.read_bytes(), path.as_uri(), {"path": str(path)}):
        assert greys(open_video(source, keys={"nframes": 2})) == [0, 9]
    assert greys(open_video("a.mp4", access=MediaAccess(root=tmp_path), keys={"nframes": 2})) == [0, 9]
    with pytest.raises(ImageError, match="leaves the data folder"):
        open_video("../a.mp4", access=MediaAccess(root=tmp_path))


def test_a_video_taken_with_the_camera_turned_is_upright(tmp_path: Path) -> None:
    # 90: turned counter-clockwise for display, which takes the white corner from top left to bottom left
    frame = open_video(movie(tmp_path / "a.mp4", turn=90), keys={"nframes": 2}).frames[0].float()
    assert frame.shape == (3, 64, 48)
    assert frame[:, -8:, :8].mean() > 240 and frame[:, :8, :8].mean() < 20 and frame[:, :8, -8:].mean() < 20


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        (b"#EXTM3U\nfile:///etc/hostname\n", "text that begins '#EXTM3U"),
        (PNG, "no video format that is known here"),
        (b"\0\0\0\x18ftypmp42" + bytes(99), "damaged or cut short"),
    ],
)
def test_what_is_not_a_video_is_named(tmp_path: Path, content: bytes, match: str) -> None:
    pytest.importorskip("av", reason="no video decoder: pip install av")
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ImageError, match=f"row 7: .*a.mp4' is not a readable video: .*{match}"):
        open_video(tmp_path / "a.mp4", where="row 7")
    with pytest.raises(ImageError, match="row 7: no video file at"):
        open_video(tmp_path / "b.mp4", where="row 7")


def test_a_truncated_video_is_refused_and_not_sampled_from_what_is_left(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="no video decoder: pip install av")
    whole = movie(tmp_path / "a.mp4", count=12).read_bytes()
    with (
        av.open(io.BytesIO(whole)) as source,
        av.open(str(tmp_path / "b.mp4"), "w", options={"movflags": "faststart"}) as to,
    ):
        stream = to.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                to.mux(packet)
    index_first = (tmp_path / "b.mp4").read_bytes()
    assert greys(open_video(index_first, keys={"nframes": 2})) == [0, 11]
    for raw in (whole[: len(whole) * 2 // 3], index_first[:-200], index_first[: len(index_first) * 2 // 3]):
        with pytest.raises(ImageError, match="row 8: .*not a readable video.*cut short"):
            open_video(raw, where="row 8", keys={"nframes": 2})


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"fps": 1, "nframes": 4}, "either fps or nframes, found both"),
        ({"nframes": 400}, "expected 2 to 10 sampled frames, found 400"),
        ({"num_frames": 4}, r"unknown video keys \['num_frames'\]"),
        ({"fps": -1}, "expected a positive number as the video's fps, found -1"),
        ({"video_start": 5.0}, "holds no two frames of a video of 1.00 seconds"),
    ],
)
def test_keys_that_make_no_sense_are_refused(tmp_path: Path, keys: dict[str, Any], match: str) -> None:
    path = movie(tmp_path / "a.mp4")
    for function in (open_video, qwen_video):
        with pytest.raises(RowError, match=f"row 9: .*{match}"):
            function(path, where="row 9", keys=keys)


def test_a_frame_list_is_padded_to_an_even_number() -> None:
    frames = [Image.new("RGB", (8, 6), (k, k, k)) for k in (10, 20, 30)]
    video = open_video(frames, keys={"sample_fps": 4.0, "raw_fps": 24.0})
    assert video.frames[:, 0, 0, 0].tolist() == [10, 20, 30, 30]
    assert video.metadata == {"fps": 24.0, "frames_indices": [0, 1, 2, 3], "total_num_frames": 24.0}
    assert video.sample_fps == 4.0
    with pytest.raises(RowError, match="row 1: the frames of a video have one size"):
        open_video([*frames, Image.new("RGB", (6, 8))], where="row 1")
    with pytest.raises(RowError, match="row 1: the video's list of frames is empty"):
        open_video([], where="row 1")
    with pytest.raises(ImageError, match="row 1, frame 1: no image file at 'gone.png'"):
        open_video([frames[0], "gone.png"], where="row 1")


GRID: list[dict[str, Any]] = [
    {}, {"fps": 1.0}, {"fps": 0.1}, {"nframes": 6}, {"nframes": 7, "max_pixels": 120_000}, {"fps": 4, "max_frames": 9},
    {"video_start": 1.0, "video_end": 4.5}, {"video_start": 2.3}, {"video_end": 3.0, "min_pixels": 300_000},
    {"resized_height": 100, "resized_width": 200, "nframes": 4}, {"total_pixels": 400_000}, {"max_pixels": 10**9},
]  # fmt: skip


@pytest.mark.parametrize("patch_size", [14, 16])
@pytest.mark.parametrize("name", ["1.mp4", "2.avi", "3.mp4"])
def test_real_videos_are_resized_as_qwen_vl_utils_does(
    shared: Path, name: str, patch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fetch_video itself over all frames, decoded in order: decord and torchcodec give these frames bit for bit."""
    qwen = pytest.importorskip("qwen_vl_utils.vision_process")
    av = pytest.importorskip("av", reason="no video decoder: pip install av")
    path = shared / "sharegpt_demo" / "data" / "mllm_demo_data" / name
    with av.open(str(path)) as container:
        fps = float(container.streams.video[0].average_rate)
        every = torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])

    def read(ele: dict[str, Any]) -> Any:
        first, last, total = qwen.calculate_video_frame_range(ele, len(every), fps)
        count = qwen.smart_nframes(ele, total_frames=total, video_fps=fps)
        indices = torch.linspace(first, last, count).round().long().tolist()
        metadata = {"fps": fps, "frames_indices": indices, "total_num_frames": total, "video_backend": "pyav"}
        return every[indices].permute(0, 3, 1, 2), metadata, count / max(total, 1e-6) * fps

    monkeypatch.setattr(qwen, "get_video_reader_backend", lambda: "pyav")
    monkeypatch.setitem(qwen.VIDEO_READER_BACKENDS, "pyav", read)
    for keys in GRID[:: 1 if patch_size == 14 else 3]:
        element = {"type": "video", "video": str(path), **keys}
        (expected, metadata), rate = qwen.fetch_video(element, patch_size, True, True)
        found = qwen_video(path, keys=keys, patch_size=patch_size)
        assert torch.equal(found.frames, expected) and found.frames.dtype == torch.float32
        assert (found.metadata, found.sample_fps) == (metadata, rate)


@pytest.mark.parametrize("patch_size", [14, 16])
def test_frame_lists_are_resized_as_qwen_vl_utils_does(tmp_path: Path, patch_size: int) -> None:
    qwen = pytest.importorskip("qwen_vl_utils.vision_process")
    noise = np.random.default_rng(0).integers(0, 256, (3, 90, 130, 3), dtype=np.uint8)
    frames = [Image.fromarray(frame) for frame in noise]
    for k, frame in enumerate(frames):
        frame.save(tmp_path / f"{k}.png")
    paths = [str(tmp_path / f"{k}.png") for k in range(3)]
    grid: list[dict[str, Any]] = [
        {"sample_fps": 3.0, "raw_fps": 30.0}, {"resized_height": 100, "resized_width": 200}, {"min_pixels": 200_000},
        {"min_pixels": 5_000, "max_pixels": 40_000},
    ]  # fmt: skip
    for keys in grid:
        (expected, metadata), rate = qwen.fetch_video({"video": paths, **keys}, patch_size, True, True)
        for source in (paths, frames):
            found = qwen_video(source, keys=keys, patch_size=patch_size)
            assert torch.equal(found.frames, expected)
            assert (found.metadata, found.sample_fps) == (metadata, rate)


def test_importing_media_imports_neither_torch_nor_transformers_nor_pillow() -> None:
    code = (
        "import sys, vlm_dft.media; print(sorted({'torch', 'transformers', 'PIL', 'av', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_session_description_in_disguise_opens_no_socket() -> None:
    """FFmpeg would listen on the address that it names; behind the first bytes of an ASF file it got past the look at them."""
    pytest.importorskip("av")
    words = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 45678 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
    with pytest.raises(ImageError, match="row 5: bytes .* not a readable video"):
        open_video(b"\x30\x26\xb2\x75\n" + words.encode(), where="row 5")
