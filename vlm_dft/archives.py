"""Archives: a zip of pictures and a name in it in; the picture's bytes out. Nothing is unpacked, nothing outside is opened."""

from __future__ import annotations

import io
import os
import posixpath
import re
import stat
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlm_dft.errors import CardError, ImageError, RowError

MEMBER_BYTES = 256 << 20  # of one picture, unpacked
BOMB, SMALL = 100, 1 << 20  # a member over SMALL bytes may be at most so many times what it takes in the archive
OPEN = 16  # archives that a process holds open


@dataclass(frozen=True, slots=True)
class ZipMember:
    """A file in a zip archive, found and checked: small, picklable, opened by the process that needs it."""

    archive: Path
    name: str
    size: int = 0  # bytes, unpacked
    crc: int = 0

    def __str__(self) -> str:
        return f"{self.archive}!/{self.name}"


def image_folder(root: Path, name: str, *, where: str) -> Path:
    """The folder or zip archive that a card names as `image_root`. Raises CardError, before a row is read."""
    path = root / name
    if path.is_dir():
        return path
    parts = parts_of(path)
    if not path.is_file() and parts:
        raise CardError(f"{where}, image_root: {name} is in {len(parts)} parts. {joining(path, parts)}")
    if not path.is_file():
        raise CardError(
            f"{where}, image_root: expected a folder or a zip archive {name} in {str(root)!r}; it is not there."
        )
    try:
        _opened(path, where)
    except ImageError as error:
        raise CardError(str(error)) from error
    return path


def parts_of(path: Path) -> list[Path]:
    """The parts into which an archive of that name was cut: images.zip.part-aa, images.zip_aa, images.zip.001, images.z01."""
    found = [part for pattern in (".part*", "_*", "-*", ".0*", ".a?") for part in path.parent.glob(path.name + pattern)]
    return sorted(found) or sorted(path.parent.glob(path.stem + ".z[0-9]*"))


def joining(path: Path, parts: list[Path]) -> str:
    """What to do with the parts of an archive."""
    if re.fullmatch(r"\.z\d+", parts[0].suffix):
        return f"Join them: zip -s 0 {path.name} --out whole.zip, and name whole.zip."
    return f"Join them: cat {re.sub('[A-Za-z0-9]+$', '', parts[0].name)}* > {path.name}."


def find_member(archive: Path, name: str, *, where: str) -> ZipMember | None:
    """The member of an archive that a row names: as it stands, or below the one folder that the archive holds, or without a
    first folder that is named as the archive is. None where there is none; ImageError for one that is not to be opened."""
    found = _opened(archive, where)
    name = posixpath.normpath(name)
    stem, _, rest = name.partition("/")
    for candidate in (name, f"{found.folder}/{name}", rest if stem == archive.stem else ""):
        if (info := found.members.get(candidate)) is not None:
            _check(info, archive, where)
            return ZipMember(archive, candidate, info.file_size, info.CRC)
    return None


def read_member(member: ZipMember, *, where: str) -> bytes:
    """The bytes of a member, their checksum tested."""
    found = _opened(member.archive, where)
    info = found.members.get(member.name)
    if info is None:
        raise ImageError(
            f"{where}: {member.archive.name} holds no {member.name!r}. Has it been replaced? Prepare again."
        )
    _check(info, member.archive, where)
    try:
        return found.zip.read(info)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ImageError(
            f"{where}: {str(member)!r} is damaged or cut short ({what}). Download the archive again."
        ) from error


class _Archive:
    """An open archive and its members by name."""

    def __init__(self, path: Path) -> None:
        self.zip = zipfile.ZipFile(_Shared(path))
        infos = [info for info in self.zip.infolist() if not info.is_dir()]
        self.outside = next((i.filename for i in infos if _leaves(i.filename)), None)
        self.members = {posixpath.normpath(info.filename): info for info in infos}
        tops = {name.partition("/")[0] for name in self.members} - {"__MACOSX", ".DS_Store"}
        self.folder = tops.pop() if len(tops) == 1 else ""


class _Shared(io.FileIO):
    """A file whose place each process keeps for itself: forked workers share a descriptor, and with it its own place."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self.at, self.end = 0, os.fstat(self.fileno()).st_size

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.end)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, size: int | None = -1) -> bytes:
        left = self.end - self.at if size is None or size < 0 else size
        parts = []
        while left > 0 and (part := os.pread(self.fileno(), left, self.at)):
            parts.append(part)
            self.at += len(part)
            left -= len(part)
        return b"".join(parts)


def _opened(path: Path, where: str) -> _Archive:
    """The archive, opened once in a process and its children, and again when the file has changed. Raises ImageError."""
    from vlm_dft.file_formats import check_data

    try:
        state = os.stat(path)
        found = _cached(path, state.st_mtime_ns, state.st_size)
    except FileNotFoundError as error:
        raise ImageError(f"{where}: no archive at {str(path)!r}. Check the data folder (--data / DATA=).") from error
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        with open(path, "rb") as file:
            head = file.read(1024)
        if not head.startswith(b"PK"):
            try:
                check_data(head, f"{where}: {path.name}")
            except RowError as instead:
                raise ImageError(str(instead)) from error
            raise ImageError(
                f"{where}: {path.name} is no zip archive (it begins {head[:12]!r}). Unpack it, and name the folder."
            ) from error
        raise ImageError(
            f"{where}: {path.name} is a damaged or cut zip archive ({error}). Download it again; if it is one of several "
            f"parts, join them first: cat {path.name}* > whole.zip."
        ) from error
    if found.outside is not None:
        raise ImageError(
            f"{where}: {path.name} holds {found.outside!r}, a name that leaves the archive's folder. None of it is used: get it "
            "from who made it, or pack the pictures anew."
        )
    return found


@lru_cache(OPEN)
def _cached(path: Path, changed: int, size: int) -> _Archive:
    return _Archive(path)


def _leaves(name: str) -> bool:
    return name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or name[1:3] in (":/", ":\\")


def _check(info: Any, archive: Path, where: str) -> None:
    """Raise ImageError for a member that is not to be opened."""
    name = f"{where}: {info.filename!r} in {archive.name}"
    if info.flag_bits & 1:
        raise ImageError(f"{name} is encrypted. Unpack the archive with its password, and name the folder.")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise ImageError(f"{name} is a link or a device, which is not followed. Pack the file itself.")
    if info.file_size > MEMBER_BYTES or (info.file_size > SMALL and info.file_size > BOMB * max(info.compress_size, 1)):
        raise ImageError(
            f"{name} announces {info.file_size:,} bytes in {info.compress_size:,}: more than a picture has. Not unpacked. Drop "
            "the row, or unpack the archive where that is safe."
        )
