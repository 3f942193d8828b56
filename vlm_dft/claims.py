"""Claims: a store in; while this process works in it, other processes wait."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlm_dft.embedded.drawn import cache_root
from vlm_dft.errors import ConfigError
from vlm_dft.stores import Store

SECONDS = 0.2  # between two looks at whether the other process has ended


@contextmanager
def claimed(store: Store, journal: str, say: Callable[[str], Any]) -> Iterator[None]:
    """Hold a store against other processes; the kernel lets go of it with this one. Waits, and says for whom.

    A POSIX lock, which forked workers do not inherit. Of a URL the processes of this machine alone are held off; those
    of another write the same bytes, since what is prepared depends on its fingerprint alone. On leaving, the journal
    goes if the work is whole, or if there is none.
    """
    path = _lock_of(store, journal)
    said = False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except (FileNotFoundError, FileExistsError):
            if path.parent.exists() and not path.parent.is_dir():
                raise ConfigError(f"{path.parent} is no folder. Choose another one than {store}.") from None
            time.sleep(SECONDS / 20)
            continue  # the other process has just ended, and taken the folder away, or made it
        except OSError as error:
            raise ConfigError(f"Cannot write to {store}: {error.strerror}. Choose another folder.") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file.fileno(), path):
                break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                file.close()
                raise ConfigError(f"Cannot lock {str(path)!r}: {error.strerror}. Choose another folder.") from error
            if not said:
                file.seek(0)
                say(f"{store} is being prepared by {file.read().strip() or 'another process'}; waiting for it")
                said = True
            time.sleep(SECONDS)
        file.close()
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            sweep(store, journal)
            path.unlink(missing_ok=True)
            if not store.remote:
                for folder in (path.parent, store.folder):
                    with suppress(OSError):  # it holds something
                        folder.rmdir()


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still lies where it was opened: the process that held it before takes it away."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def sweep(store: Store, journal: str) -> None:
    """Take the journal out of a store that is whole; of any other what a killed process was writing aside."""
    from vlm_dft.prepared import WHOLE

    whole = WHOLE in store.sizes()
    found = [name for name in store.sizes(journal) if name != "lock"]
    begun = any(name.startswith("part-") for name in found)
    gone = [name for name in found if whole or not begun or name.startswith(".") or not name.startswith(("part-", "index-", "made_from"))
            or name.endswith(".new")]  # fmt: skip
    store.remove([f"{journal}/{name}" for name in gone], journal if store.remote else None)


def _lock_of(store: Store, journal: str) -> Path:
    if not store.remote:
        return store.folder / journal / "lock"
    return cache_root() / "locks" / hashlib.sha256(store.url.encode()).hexdigest()[:16]
