"""Sources: what a row names as an image or video in, an open file or a picture out, if it may be opened; or an error."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from vlm_dft.archives import ZipMember, read_member
from vlm_dft.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_START = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|BM|II\*\0|MM\0\*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class MediaAccess:
    """What may be opened on behalf of a row."""

    root: Path | None = None
    """Relative paths are taken from here, and every path must lie inside, symlinks resolved. None: no confinement."""
    hosts: frozenset[str] = frozenset()
    """Hosts that http(s) URLs may be fetched from: "host" for the usual port, "host:port" for another. None by default."""
    max_image_pixels: int = 89_478_485
    """Width x height that a header may announce, checked before anything is decoded; Pillow warns from this size on."""
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


def content_of(source: Any, where: str, access: MediaAccess, kind: str) -> tuple[Any, str]:
    """(an open binary file or a PIL image, the name that errors call it by)."""
    from PIL import Image as PILImage

    if isinstance(source, Mapping):
        if source.get("bytes") is None and source.get("path") is None:
            raise ImageError(f"{where}: expected 'bytes' or 'path' in the {kind}'s dict, found keys {sorted(source)}.")
        if isinstance(source.get("bytes"), str):
            return _text_bytes(source["bytes"], where, kind)
        source = source["bytes"] if source.get("bytes") is not None else source["path"]
    if isinstance(source, ZipMember):
        if access.root is not None and not source.archive.resolve().is_relative_to(access.root.resolve()):
            raise ImageError(
                f"{where}: {short(str(source))} leaves the data folder {str(access.root)!r}. Move it inside."
            )
        return io.BytesIO(read_member(source, where=where)), short(str(source))
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
        bare = bare_base64(source)
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


def bare_base64(text: str) -> bytes | None:
    """The bytes, where the whole text is base64 (lines and blanks allowed) and they begin as an image does."""
    if len(text) < 64 or not re.match(r"[A-Za-z0-9+/\s]{64}", text):
        return None
    text = re.sub(r"\s+", "", text) if re.search(r"\s", text) else text
    if len(text) < 64 or len(text) % 4 or not re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", text):
        return None
    if not IMAGE_START.match(base64.b64decode(text[:64])):
        return None
    return base64.b64decode(text, validate=True)


def _text_bytes(text: str, where: str, kind: str) -> tuple[IO[bytes], str]:
    """What stands under 'bytes' as a string: base64 or a data URI, never a path."""
    raw = _data_uri(text, where) if text.startswith("data:") else bare_base64(text)
    if raw is None:
        raise ImageError(f"{where}: expected bytes or base64 under 'bytes' of the {kind}, found {short(text)}.")
    return io.BytesIO(raw), f"base64 ({len(raw)} bytes)"


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


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def why(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}" if str(error) else type(error).__name__
