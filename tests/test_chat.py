"""Images and messages: opened by content, composited on white, placed where the row says."""

import io
from pathlib import Path

import pytest
from PIL import Image

from vlm_dft.chat import Example, as_example
from vlm_dft.chat import place_media as place_images
from vlm_dft.errors import ImageError, RowError
from vlm_dft.media import open_image


def encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_become_white_and_not_black(mode: str) -> None:
    clear = Image.new(mode, (4, 4), (0,) * len(mode))
    assert open_image(encoded(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_a_palette_with_a_transparent_colour_is_composited_on_white() -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    palette.putpixel((1, 1), 1)
    buffer = io.BytesIO()
    palette.save(buffer, "GIF", transparency=0)
    image = open_image(buffer.getvalue())
    assert (image.getpixel((0, 0)), image.getpixel((1, 1))) == ((255, 255, 255), (255, 0, 0))


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    assert open_image(Image.new("I;16", (2, 2), 32768)).getpixel((0, 0)) == (128, 128, 128)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 2), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (2, 6)


def test_the_content_counts_and_not_the_extension(tmp_path: Path) -> None:
    Image.new("RGB", (3, 5), "blue").save(tmp_path / "a.gif", "JPEG")
    assert open_image(str(tmp_path / "a.gif")).size == (3, 5)
    assert open_image({"bytes": (tmp_path / "a.gif").read_bytes(), "path": None}).size == (3, 5)


@pytest.mark.parametrize("source", [b"", b"\x89PNG\r\n\x1a\nbroken", 7])
def test_what_is_not_an_image_is_refused_by_name(source: object) -> None:
    with pytest.raises(ImageError, match="row 5"):
        open_image(source, where="row 5")


def test_a_truncated_image_is_refused() -> None:
    whole = encoded(Image.effect_noise((64, 64), 50), "PNG")
    with pytest.raises(ImageError, match="not a readable image"):
        open_image(whole[: len(whole) // 2])


def test_real_odd_images_open(shared: Path) -> None:
    opened = [open_image(p) for p in sorted((shared / "bad_inputs").iterdir()) if p.suffix in (".png", ".jpg", ".gif")]
    assert len(opened) >= 10 and all(image.mode == "RGB" for image in opened)
    assert sum(image.convert("L").getextrema() == (0, 0) for image in opened) == 0  # none turned wholly black


def test_images_without_markers_come_before_the_first_user_text() -> None:
    placed = place_images([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], 2, where="row")
    assert placed[1]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "q"}]


def test_a_mismatch_of_markers_and_images_gives_both_numbers() -> None:
    with pytest.raises(RowError, match="row 3: 1 images but 2 places for them"):
        as_example({"messages": [{"role": "user", "content": "<image><image>"}], "images": [b"x"], "id": "row 3"})


def test_a_marker_without_any_image_stays_text() -> None:
    example = as_example(Example([{"role": "user", "content": "an <image> tag"}]))
    assert example.messages[0]["content"] == "an <image> tag"
