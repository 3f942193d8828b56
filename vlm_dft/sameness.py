"""Sameness: examples in; a fingerprint of all of them in order, and whether one is the same as an earlier one, out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_dft.archives import ZipMember
from vlm_dft.chat import Example

Files = tuple[str, ...]


def fingerprint(examples: Iterable[Example]) -> str:
    """A hash of what is trained on, in order: messages, tools, and media (files by their size in bytes)."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.source, example.messages, example.tools], default=str).encode())
        for source in (*example.images, *example.videos):
            digest.update(identity(source))
    return digest.hexdigest()


def identity(source: Any) -> bytes:
    """What tells a media source from another: a file's size (and checksum, in an archive), a text, bytes, pixels, each frame of a list."""
    if isinstance(source, (list, tuple)):
        return b"".join(map(identity, source))
    if isinstance(source, (str, Path)) and os.path.isfile(source):
        return str(Path(source).stat().st_size).encode()
    if isinstance(source, ZipMember):
        return f"{source.size} {source.crc:08x}".encode()
    if isinstance(source, Mapping):
        return identity(source.get("bytes") or source.get("path"))
    pixels = getattr(source, "tobytes", None)
    return source if isinstance(source, bytes) else pixels() if callable(pixels) else str(source).encode()


def likeness(example: Example) -> bytes:
    """16 bytes that examples of the same messages, tools and media have in common; of files only the size is looked at."""
    digest = hashlib.blake2b(json.dumps([example.messages, example.tools], default=str).encode(), digest_size=16)
    for source in (*example.images, *example.videos):
        digest.update(b"\0" + identity(source))
    return digest.digest()


class Twins:
    """Knows the examples that it was shown: same messages, same tools, same media, whatever their id.

    Files are read only where text and sizes are those of an earlier example under another name: then their content decides.
    """

    def __init__(self) -> None:
        self.seen: dict[bytes, list[Files]] = {}
        self.contents: dict[Files, bytes] = {}  # of those that had to be read

    def is_twin(self, alike: bytes, example: Example) -> bool:
        """Whether an earlier example is the same. alike: likeness(example)."""
        files = tuple(_files((*example.images, *example.videos)))
        earlier = self.seen.setdefault(alike, [])
        if files in earlier or (earlier and self._content(files) in map(self._content, earlier)):
            return True
        earlier.append(files)
        return False

    def _content(self, files: Files) -> bytes:
        if files not in self.contents:
            digest = hashlib.blake2b(digest_size=16)
            for file in files:
                with open(file, "rb") as stream:
                    digest.update(hashlib.file_digest(stream, "blake2b").digest())
            self.contents[files] = digest.digest()
        return self.contents[files]


def _files(sources: Iterable[Any]) -> Iterator[str]:
    """The local files of media sources, in order."""
    for source in sources:
        if isinstance(source, (list, tuple)):
            yield from _files(source)
        elif isinstance(source, Mapping) and not source.get("bytes"):
            yield from _files([source.get("path")])
        elif isinstance(source, (str, Path)) and os.path.isfile(source):
            yield os.fspath(source)


def embedded_bytes(example: Example) -> int:
    """Bytes of the media that an example holds itself."""
    return sum(map(_embedded, (*example.images, *example.videos)))


def _embedded(source: Any) -> int:
    if isinstance(source, (list, tuple)):
        return sum(map(_embedded, source))
    if isinstance(source, Mapping):
        return _embedded(source.get("bytes") or b"")
    if isinstance(source, str):
        return len(source) if source.startswith("data:") or len(source) > 4096 else 0
    return len(source) if isinstance(source, (bytes, bytearray)) else 0
