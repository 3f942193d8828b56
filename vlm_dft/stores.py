"""Stores: a folder or an fsspec URL in; files put into it whole, listed, and read by range, out."""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from vlm_dft.errors import UserError

OPEN_FILES = 64  # kept open by a process
GAP, FAR_GAP = (
    1 << 12,
    1 << 18,
)  # bytes between two ranges that are rather read along than asked for apart: on a disk, from far
SPAN = 8 * 2**20  # bytes that ranges are joined to at most

Range = tuple[str, int, int]  # (file, first byte, bytes)


class Store:
    """A folder on a disk, or below a URL that fsspec knows (s3://, gs://, memory:// ...).

    Picklable, and safe to use on both sides of a fork: each process opens its own files and connections.
    """

    def __init__(self, url: str | Path) -> None:
        text = str(url)
        if text.startswith("file://"):
            text = unquote(text.removeprefix("file://"))
        self.remote = "://" in text
        self.url = text.rstrip("/") if self.remote else str(Path(text).expanduser().absolute())
        self._process, self._files, self._system = 0, OrderedDict[str, int](), (None, "")

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "remote": self.remote}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"])  # type: ignore[misc]

    def __str__(self) -> str:
        return self.url

    @property
    def folder(self) -> Path:
        """Where it is on the disk."""
        assert not self.remote, f"{self.url} is no folder on a disk"
        return Path(self.url)

    def sizes(self, below: str = "") -> dict[str, int]:
        """name -> bytes of the files that lie in it (or in a folder of it). Nothing there: nothing."""
        if self.remote:
            system, root = self._fs()
            system.invalidate_cache()
            try:
                found = system.ls(f"{root}/{below}".rstrip("/"), detail=True)
            except FileNotFoundError:
                return {}
            return {one["name"].rsplit("/", 1)[-1]: one["size"] for one in found if one["type"] == "file"}
        try:
            with os.scandir(self.folder / below) as entries:
                return {one.name: one.stat().st_size for one in entries if one.is_file()}
        except FileNotFoundError:
            return {}

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        if self.remote:
            system, root = self._fs()
            return bytes(system.cat_file(f"{root}/{name}"))
        return (self.folder / name).read_bytes()

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range; neighbours are read together. Raises UserError naming a file that ends too early."""
        order = sorted(range(len(ranges)), key=ranges.__getitem__)
        gap = FAR_GAP if self.remote else GAP
        spans: list[tuple[str, int, int]] = []  # (file, first byte, end)
        where = [0] * len(ranges)  # the span of each range
        for k in order:
            name, at, length = ranges[k]
            file, first, end = spans[-1] if spans else ("", 0, 0)
            if file == name and at <= end + gap and at + length - first <= SPAN:
                spans[-1] = (name, first, max(end, at + length))
            else:
                spans.append((name, at, at + length))
            where[k] = len(spans) - 1
        read = self._read_spans(spans)
        found = []
        for k, (_, at, length) in enumerate(ranges):
            first, whole = spans[where[k]][1], read[where[k]]
            found.append(whole if len(whole) == length else whole[at - first : at - first + length])
        return found

    def _read_spans(self, spans: Sequence[tuple[str, int, int]]) -> list[bytes]:
        if self.remote:
            system, root = self._fs()
            paths, starts, ends = (
                [f"{root}/{name}" for name, _, _ in spans],
                *zip(*[s[1:] for s in spans], strict=True),
            )
            try:
                read = [bytes(raw) for raw in system.cat_ranges(paths, list(starts), list(ends), on_error="raise")]
            except FileNotFoundError as error:
                raise UserError(f"{self.url}: a file is missing: {error}. Prepare it again.") from error
        else:
            if self._process != os.getpid():
                self._forget()
            read = [os.pread(self._open(name), end - first, first) for name, first, end in spans]
        for (name, first, end), raw in zip(spans, read, strict=True):
            if len(raw) != end - first:
                raise UserError(
                    f"{self.url}/{name} is cut short: no bytes {first} to {end}. Restore it, or prepare again."
                )
        return read

    def put(self, name: str, file: Path) -> None:
        """Move a file of the disk into the store under a name: there whole or not at all, also where power fails."""
        if self.remote:
            system, root = self._fs()
            system.put_file(str(file), f"{root}/{name}")
            file.unlink()
            return
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
        _sync(target.parent)

    def write(self, name: str, content: bytes) -> None:
        """A small file, whole or not at all."""
        if self.remote:
            system, root = self._fs()
            system.pipe_file(f"{root}/{name}", content)
            return
        aside = (self.folder / name).with_name(f".{Path(name).name}.aside")
        aside.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(content)
            self.put(name, aside)
        finally:
            aside.unlink(missing_ok=True)

    def remove(self, names: Iterable[str], folder: str | None = None) -> None:
        """Remove files, and a folder that they leave empty."""
        for name in names:
            with suppress(FileNotFoundError):
                if self.remote:
                    system, root = self._fs()
                    system.rm_file(f"{root}/{name}")
                else:
                    (self.folder / name).unlink()
        if folder is not None:
            with suppress(OSError):
                if self.remote:
                    system, root = self._fs()
                    system.rmdir(f"{root}/{folder}")
                else:
                    (self.folder / folder).rmdir()

    @contextmanager
    def staging(self, folder: str) -> Iterator[Path]:
        """A folder on the disk in which files are written that `put` then takes: one of the store's own, if that is a disk."""
        if not self.remote:
            aside = self.folder / folder
            aside.mkdir(parents=True, exist_ok=True)
            yield aside
            return
        with tempfile.TemporaryDirectory(prefix="vlm-dft-") as aside_name:
            yield Path(aside_name)

    def _fs(self) -> tuple[Any, str]:
        """fsspec's file system and the folder's path in it, of this process."""
        if self._process != os.getpid() or self._system[0] is None:
            import fsspec

            self._forget()
            try:
                self._system = fsspec.core.url_to_fs(self.url)
            except (ValueError, ImportError) as error:
                raise UserError(f"{self.url!r} cannot be opened: {error}") from error
        return self._system

    def _open(self, name: str) -> int:
        """A descriptor of a file, opened by this process."""
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        try:
            found = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise UserError(f"{self.folder / name} is missing. Restore it, or prepare it again.") from error
        self._files[name] = found
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return found

    def _forget(self) -> None:
        """Let go of what another process had opened before this one was forked from it; the descriptors are copies."""
        for descriptor in self._files.values():
            with suppress(OSError):
                os.close(descriptor)
        self._process, self._files, self._system = os.getpid(), OrderedDict(), (None, "")

    def __del__(self) -> None:
        with suppress(Exception):
            if self._process == os.getpid():
                self._forget()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
