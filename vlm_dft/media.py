"""Media: what a row names as an image in; an RGB picture, or its size, out, or an error that names the row."""

from __future__ import annotations

import base64
import binascii
import codecs
import http.client
import io
import os
import re
import stat
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from vlm_dft.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class MediaAccess:
    """What may be opened on behalf of a row."""

    root: Path | None = None
    """Relative paths are taken from here, and every path must lie inside, symlinks resolved. None: no confinement."""
    hosts: frozenset[str] = frozenset()
    """Hosts that http(s) URLs may be fetched from: "host" for the usual port, "host:port" for another. None by default."""
    max_image_pixels: int = 178_956_970
    """Width x height that a header may announce; checked before anything is decoded. Pillow's own limit also holds."""
    max_bytes: int = 64 * 2**20
    """Of one download."""
    timeout: float = 20.0
    """Seconds, of one download."""

    def __post_init__(self) -> None:
        hosts: object = self.hosts
        if isinstance(hosts, str):  # `in` would search inside the string and allow parts of the name
            raise ConfigError(f"hosts: expected a set of host names, found the string {self.hosts!r}. Write {{...}}.")
        object.__setattr__(self, "hosts", frozenset(host.lower() for host in self.hosts))
        object.__setattr__(self, "root", None if self.root is None else Path(self.root))


DEFAULT_ACCESS = MediaAccess()

# Formats told by their content and decoded inside Pillow: EPS would start Ghostscript, and TGA has no signature.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
# Formats whose header gives the size of the decoded picture; TIFF is rotated, ICO chosen and AVIF turned while decoding.
_HEADER_TELLS_SIZE = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "DIB", "PPM")
_IMAGE_START = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|BM|II\*\0|MM\0\*", re.DOTALL)
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


def content_of(source: Any, where: str, access: MediaAccess, kind: str) -> tuple[Any, str]:
    """(an open binary file or a PIL image, the name that errors call it by)."""
    from PIL import Image as PILImage

    if isinstance(source, Mapping):
        if source.get("bytes") is None and source.get("path") is None:
            raise ImageError(f"{where}: expected 'bytes' or 'path' in the {kind}'s dict, found keys {sorted(source)}.")
        source = source["bytes"] if source.get("bytes") is not None else source["path"]
    if isinstance(source, PILImage.Image):
        return source, f"PIL image of {source.width} x {source.height}"
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source), f"bytes ({len(source)})"
    if isinstance(source, str):
        if source.startswith("data:"):
            raw = _data_uri(source, where)
            return io.BytesIO(raw), f"data URI ({len(raw)} bytes)"
        if source.startswith("file://"):
            path = unquote(source[7:]).removeprefix("localhost")
            if not path.startswith("/"):
                raise ImageError(
                    f"{where}: {short(source)} is not absolute. Expected file:///folder/name, or a plain path."
                )
            return _open_file(Path(path), where, access, kind), repr(path)
        if re.match(r"[A-Za-z][\w+.-]*://", source):
            return io.BytesIO(_fetch(source, where, access, kind)), short(source)
        bare = _bare_base64(source)
        if bare is not None and not _exists(source, access):
            return io.BytesIO(bare), f"base64 ({len(bare)} bytes)"
    if isinstance(source, (str, Path)):
        return _open_file(Path(source), where, access, kind), short(str(source))
    if hasattr(source, "__array__"):
        return _from_array(source, where), "array"
    raise ImageError(
        f"{where}: expected a PIL image, a path, a URI or bytes, found {type(source).__name__} {short(source)}."
    )


def _open_file(path: Path, where: str, access: MediaAccess, kind: str) -> IO[bytes]:
    try:
        full = path
        if access.root is not None:
            full = (access.root / path).resolve()
            if not full.is_relative_to(access.root.resolve()):
                raise ImageError(
                    f"{where}: {short(str(path))} leaves the data folder {str(access.root)!r}. Move it inside."
                )
        mode = os.stat(full).st_mode
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            found = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise ImageError(f"{where}: {str(full)!r} is {found}. Expected the path of one {kind} file.")
        return open(full, "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(
            f"{where}: no {kind} file at {short(str(full))}. Check the data folder (--data / DATA=)."
        ) from error
    except PermissionError as error:
        raise ImageError(f"{where}: no permission to read {short(str(full))}. Change its mode or owner.") from error
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, a circle of symlinks
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{where}: {short(str(path))} cannot be opened as a path ({why(error)}).") from error


def _exists(text: str, access: MediaAccess) -> bool:
    try:
        return ((access.root or Path()) / text).exists()
    except (OSError, ValueError):
        return False


def _data_uri(uri: str, where: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ImageError(f"{where}: expected data:image/...;base64,..., found {short(uri)}.")
    try:
        return base64.b64decode(re.sub(r"\s+", "", unquote(body)), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{where}: the data URI {short(uri)} is not valid base64 ({error}).") from error


def _bare_base64(text: str) -> bytes | None:
    """The bytes, where the whole text is base64 and they begin as an image does."""
    if len(text) < 64 or len(text) % 4 or not re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", text):
        return None
    if not _IMAGE_START.match(base64.b64decode(text[:64])):
        return None
    return base64.b64decode(text, validate=True)


def _from_array(source: Any, where: str) -> Image:
    import numpy as np
    from PIL import Image as PILImage

    found = f"{getattr(source, 'dtype', '?')} {list(getattr(source, 'shape', []))}"
    shape = tuple(getattr(source, "shape", ()))
    if len(shape) != 3 or shape[2] != 3 or 0 in shape or not str(source.dtype).endswith("uint8"):
        raise ImageError(f"{where}: expected an array of uint8 [H, W, 3], found {found}.")
    return PILImage.fromarray(np.ascontiguousarray(source.cpu() if hasattr(source, "cpu") else source))


def _check_host(url: str, where: str, access: MediaAccess, kind: str) -> None:
    try:
        parts = urlsplit(url)
        host, usual = (parts.hostname or "").lower(), {"http": 80, "https": 443}.get(parts.scheme)
        port = parts.port or usual
    except ValueError as error:
        raise ImageError(f"{where}: {short(url)} is not a URL ({error}).") from error
    if usual is None or not host or "@" in parts.netloc or re.search(r"[\s\\]", url):
        raise ImageError(f"{where}: {short(url)} is remote and not a plain http(s) URL. Download it and name the file.")
    if access.hosts.isdisjoint({f"{host}:{port}", *([host] if port == usual else [])}):
        raise ImageError(
            f"{where}: {short(url)} is remote and its host {host}:{port} is not allowed (allowed: "
            f"{sorted(access.hosts) or 'none'}). Download the {kind}s and give their folder as --data DIR, or allow the host."
        )


def _fetch(url: str, where: str, access: MediaAccess, kind: str) -> bytes:
    import urllib.request

    class SameRule(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
            _check_host(newurl, f"{where}, redirected from {short(url)}", access, kind)
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    _check_host(url, where, access, kind)
    request = urllib.request.Request(url, headers={"User-Agent": "vlm-dft"})
    end, got = time.monotonic() + access.timeout, bytearray()
    try:
        with urllib.request.build_opener(SameRule).open(request, timeout=access.timeout) as reply:
            announced = int(reply.headers.get("Content-Length") or 0)
            while max(announced, len(got)) <= access.max_bytes and (chunk := reply.read1(1 << 16)):
                got += chunk
                if time.monotonic() > end:
                    raise TimeoutError(f"more than {access.timeout} s")
    except ImageError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ImageError(
            f"{where}: {short(url)} could not be fetched ({why(error)}). Download it beforehand."
        ) from error
    if max(announced, len(got)) > access.max_bytes:
        raise ImageError(
            f"{where}: {short(url)} is larger than max_bytes = {access.max_bytes}. Raise it, or drop the row."
        )
    if len(got) < announced:
        raise ImageError(f"{where}: {short(url)} ended after {len(got)} of {announced} bytes. Fetch it again.")
    return bytes(got)


# Pictures: an open file in, RGB out.


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
    if (_IMAGE_START if kind == "image" else _VIDEO_START).match(head):
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


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def why(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}" if str(error) else type(error).__name__
