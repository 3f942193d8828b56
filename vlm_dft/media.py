"""Media: what a row names as an image in; an RGB picture, or its size, out, or an error that names the row."""

from __future__ import annotations

import codecs
import io
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from vlm_dft.errors import ImageError
from vlm_dft.sources import DEFAULT_ACCESS, IMAGE_START, MediaAccess, content_of, why

if TYPE_CHECKING:
    from PIL.Image import Image


# Formats told by their content and decoded inside Pillow: EPS would start Ghostscript, and TGA has no signature.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
# Formats whose header gives the size of the decoded picture; TIFF is rotated, ICO chosen and AVIF turned while decoding.
_HEADER_TELLS_SIZE = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "DIB", "PPM")
_VIDEO_START = re.compile(
    rb"....(ftyp|moov|mdat|wide|free|skip)|RIFF....AVI |\x1aE\xdf\xa3|\0\0\x01[\xba\xb3]|FLV\x01|OggS|\x30\x26\xb2\x75"
    rb"|GIF8[79]a|G.{187}G",
    re.DOTALL,
)
_KNOWN_STARTS = (  # (what the file begins with, what it is and what to do)
    (rb"version https://git-lfs", "a git-LFS pointer, not the file itself. Run `git lfs pull` in the data set's folder"),
    (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg", "an SVG drawing, not a raster image. Render it to PNG"),
    (rb"\s*(<!doctype html|<html|<head)", "an HTML page, often an error page saved in its place. Download it again"),
    (rb"%PDF", "a PDF document. Render its pages to PNG"),
    (rb"%!PS", "a PostScript drawing, not a raster image. Render it to PNG"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf", "an archive. Unpack it"),
    (rb"....ftyp(hei|hev|mif1)", "a HEIC picture, which is not decoded here. Convert it to JPEG or PNG"),
)  # fmt: skip


def open_image(source: Any, *, where: str = "image", access: MediaAccess = DEFAULT_ACCESS) -> Image:
    """The picture in mode RGB, as a new image without metadata; told by its content, never by its name.

    `source`: a PIL image (neither changed nor closed), a path, a file:// URI, a data: URI, bare base64, bytes,
    `{"bytes": ..., "path": ...}`, an [H, W, 3] uint8 array, or a URL on an allowed host. EXIF rotation is applied and
    transparency composited on white. 16 bits a channel keep their upper 8; floats of 0..1 or 0..255 are scaled. An
    animation gives its first frame (a PIL image the frame it stands at). Raises ImageError naming `where`.
    """
    with _header(source, where, access) as image:
        from_png = image.format == "PNG"  # turned pictures forget it
        key = _transparent_key(image)  # before loading: it depends on the bit depth of the file
        image.load()
        image = _turned(image, _orientation(image))
        picture = _rgb(image, key, where, from_png=from_png)
        picture = picture.copy() if picture is image or picture is source else picture
    picture.info.clear()  # an orientation that stayed behind would be applied twice
    return picture


def image_size(source: Any, *, where: str = "image", access: MediaAccess = DEFAULT_ACCESS) -> tuple[int, int]:
    """(height, width) of what open_image gives, from the header alone for all common formats. Raises ImageError."""
    with _header(source, where, access) as image:
        if image.format not in _HEADER_TELLS_SIZE or (image.format == "PNG" and _png_says_more_later(image)):
            image.load()
        turned = _orientation(image) >= 5  # 5 to 8 swap the sides
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _header(source: Any, where: str, access: MediaAccess) -> Iterator[Image]:
    """The picture with its header read and its size checked. What the body raises becomes an ImageError too."""
    from PIL import Image as PILImage

    content, name = content_of(source, where, access, "image")
    try:
        image = content if isinstance(content, PILImage.Image) else PILImage.open(content, formats=_formats())
        if image.width == 0 or image.height == 0:
            raise ImageError(f"{where}: {name} is {image.width} x {image.height} pixels. Drop the row.")
        if image.width * image.height > access.max_image_pixels:
            raise PILImage.DecompressionBombError(f"{image.width} x {image.height} pixels")
        yield image
    except ImageError:
        raise
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
        raise ImageError(
            f"{where}: {name} announces more pixels than are allowed: {error}; max_image_pixels = "
            f"{access.max_image_pixels}. Shrink the picture, or drop the row."
        ) from error
    except Exception as error:  # Pillow's decoders raise some fifteen classes on broken files
        what = diagnosis(content, "image") if isinstance(content, io.IOBase) else None
        found = f"it is {what}" if what else f"damaged or cut short ({why(error)}). Restore the file, or drop the row"
        raise ImageError(f"{where}: {name} is not a readable image: {found}.") from error
    finally:
        if isinstance(content, io.IOBase):
            content.close()


def _formats() -> list[str]:
    """Those of FORMATS that this Pillow has: it looks up names it does not know and fails (AVIF before 11.3)."""
    from PIL import Image as PILImage

    if not PILImage.OPEN.keys() >= set(FORMATS):
        PILImage.init()
    return [name for name in FORMATS if name in PILImage.OPEN]


def diagnosis(content: IO[bytes] | io.IOBase, kind: str) -> str | None:
    """What a file that could not be read is and what to do; None where it begins as files of its kind do."""
    content.seek(0)
    head = content.read(1024)
    if not head:
        return "empty (0 bytes). Restore the file, or drop the row"
    for start, what in _KNOWN_STARTS:
        if re.match(start, head.removeprefix(codecs.BOM_UTF8), re.IGNORECASE | re.DOTALL):
            return what
    if (IMAGE_START if kind == "image" else _VIDEO_START).match(head):
        return None
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        text = ""
    if text and re.fullmatch(r"[^\x00-\x08\x0e-\x1f\x7f]+", text):
        return f"text that begins {text[:40]!r}. Expected the {kind} itself"
    return f"no {kind} format that is known here (it begins {head[:12]!r}). Convert it, or drop the row"


def _orientation(image: Image) -> int:
    """1 to 8, as EXIF numbers them. Unreadable EXIF says nothing: the picture is taken as it lies."""
    from PIL import Image as PILImage

    try:
        # PngImageFile.getexif would decode the picture; image_size has seen to it where that is needed
        orientation = int(PILImage.Image.getexif(image).get(0x0112, 1))
    except Exception:  # noqa: BLE001  as many classes as decoders
        return 1
    return orientation if 2 <= orientation <= 8 else 1


def _turned(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    ways = [Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE,
            Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90]  # fmt: skip
    return image if orientation == 1 else image.transpose(ways[orientation - 2])


def _transparent_key(image: Image) -> Any:
    """The transparent colour in the scale of the decoded pixels: PNG keeps it in the file's, Pillow leaves it there."""
    key = image.info.get("transparency")
    tile = getattr(image, "tile", None)
    raw = tile[0][3] if tile and len(tile[0]) > 3 else ""
    raw = raw[0] if isinstance(raw, tuple) and raw else raw
    if isinstance(key, int) and image.mode == "L":
        return key * {"L;2": 85, "L;4": 17}.get(str(raw), 1)
    if isinstance(key, tuple) and str(raw).endswith(";16B"):
        return tuple(v >> 8 for v in key)  # the eight bits that Pillow keeps
    return key


def _rgb(image: Image, key: Any, where: str, *, from_png: bool) -> Image:
    import numpy as np
    from PIL import Image as PILImage

    if image.mode == "RGB" and key is None:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        grey = _eight_bits(values, image.mode == "I" and not from_png, where)
        if key is not None:
            grey[values == key] = 255  # the transparent grey, on white
        return PILImage.fromarray(grey).convert("RGB")
    clear = key is not None or image.mode in ("RGBA", "LA", "PA", "La", "RGBa")
    clear = clear or (image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A"))
    if not clear:
        return image.convert("RGB")
    if key is not None and key != image.info.get("transparency"):
        image = image.copy()
        image.info["transparency"] = key
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    white = PILImage.new("RGBA", rgba.size, "white")
    return PILImage.alpha_composite(white, rgba).convert("RGB")


def _eight_bits(values: Any, maybe_eight: bool, where: str) -> Any:
    """Grey of 16 bits, 32 bits or floats, [H, W] -> uint8. Not clipped: a value out of range is refused.

    The upper byte of 16 bits, as Pillow takes of 16-bit colour. `maybe_eight`: 32-bit integers may hold 8-bit grey.
    """
    import numpy as np

    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 255):  # also for NaN
            raise ImageError(
                f"{where}: expected floating-point grey of 0..1 or 0..255, found {low}..{high}. Rescale it."
            )
        return np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ImageError(f"{where}: expected grey of 0..255 or 0..65535, found {low}..{high}. Rescale it.")
    return values.astype(np.uint8) if maybe_eight and high <= 255 else (values >> 8).astype(np.uint8)


def _png_chunks(stream: IO[bytes] | io.IOBase) -> Iterator[tuple[bytes, int, int]]:
    """(kind, offset of its data, length) of a PNG's chunks, hopping over their data."""
    at = 8
    while True:
        stream.seek(at)
        head = stream.read(8)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head)
        yield kind, at + 8, length
        at += length + 12


def _png_says_more_later(image: Image) -> bool:
    """Whether words that may hold an orientation follow the pixels; then only decoding reads them as open_image does."""
    stream = getattr(image, "fp", None)
    if stream is None:
        return False  # a caller's image, already decoded
    here, pixels, found = stream.tell(), False, False
    for kind, _, _ in _png_chunks(stream):
        pixels = pixels or kind == b"IDAT"
        found = found or (pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"))
    stream.seek(here)
    return found
