"""Checkpoints: a folder that was written aside in, a sealed checkpoint out; a run folder in, its newest whole checkpoint out.

A checkpoint is whole or not there: it is written aside, forced to the disk, given a manifest of sizes and hashes, renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vlm_dft.errors import UserError

STAGING = ".incomplete"  # in the run folder: what is being written
MANIFEST = "manifest.json"  # in a checkpoint, written last: {"step", "processes", "files": {name: {"bytes", "sha256"}}}
BLOCK = 1 << 22
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(UserError):
    """A checkpoint that could not be written, or none that could be read."""


def seal(aside: Path, place: Path, *, step: int, processes: int) -> None:
    """Force a folder to the disk, write its manifest and rename it to its place. The run's own files beside it come first."""
    for file in sorted(path for path in place.parent.iterdir() if path.is_file() and not path.name.startswith(".")):
        _sync(file)  # metrics of the steps before must not be younger; not .lock, which closing would unlock
    manifest = {"step": step, "processes": processes, "files": _described(aside, sync=True)}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _sync(aside / MANIFEST)
    for folder in sorted((path for path in aside.rglob("*") if path.is_dir()), reverse=True):
        _sync(folder)
    _sync(aside)
    if place.exists():  # a broken one, or this step's from before a resume
        shutil.rmtree(place)
    os.rename(aside, place)
    _sync(place.parent)


def damage(checkpoint: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, in words; None: it is whole, every file of the size and hash that was written.

    contents: read every file for its hash; sizes alone are told at once.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes, expected {expected['bytes']:,}"
    for name, found in _described(checkpoint).items() if contents else ():
        if name in files and found["sha256"] != files[name]["sha256"]:
            return f"the contents of {name} have changed (sha256)"
    return None


def newest_whole(run: Path, *, contents: bool = True) -> tuple[Path | None, list[str]]:
    """(newest whole checkpoint-<step> of a run folder or None, a line on each newer one that is passed over)."""
    passed_over: list[str] = []
    for checkpoint in reversed(_by_step(run)):
        wrong = damage(checkpoint, contents=contents)
        if wrong is None:
            return checkpoint, passed_over
        passed_over.append(f"passing over {checkpoint}: {wrong}")
    return None, passed_over


def rotate(sealed: Path, keep: int | None, protected: Iterable[str | Path | None] = ()) -> None:
    """Delete what a newly sealed checkpoint makes superfluous: the oldest but for `keep` and the protected ones, and broken newer ones.

    keep: how many stay, the sealed one counted, which always does; None or below 1 keeps all.
    """
    run, step = sealed.parent, int(sealed.name[11:])
    safe = {sealed.name, *(Path(path).name for path in protected if path is not None)}
    found = _by_step(run)
    later = [
        checkpoint for checkpoint in found if int(checkpoint.name[11:]) > step
    ]  # were passed over when this run began
    old = [checkpoint for checkpoint in found if checkpoint.name not in safe and checkpoint not in later]
    if keep is None or keep < 1:
        old = []
    surplus = len(found) - len(later) - max(keep or 0, len(safe))
    for checkpoint in [*later, *old[: max(0, surplus)]]:
        aside = run / STAGING
        aside.mkdir(exist_ok=True)
        os.rename(checkpoint, aside / f"old-{checkpoint.name}")  # never half-deleted under its own name
    shutil.rmtree(run / STAGING, ignore_errors=True)


def expected_bytes(model: Any, *, adapter: bool, optimiser: str = "adamw_torch") -> int:
    """Size of a checkpoint to come, at least: the weights (of an adapter: the trained ones), and AdamW's two moments in fp32."""
    state_bytes = 8 if "adamw" in optimiser and "bit" not in optimiser and "bnb" not in optimiser else 0
    total = 0
    for parameter in {id(p): p for p in model.parameters()}.values():
        count = getattr(parameter, "ds_numel", parameter.numel())
        if parameter.requires_grad or not adapter:
            total += count * parameter.element_size()
        total += count * state_bytes if parameter.requires_grad else 0
    return total


def check_room(run: Path, size: int, keep: int | None) -> str | None:
    """Whether the disk holds what a run will save: a warning if not all, None if so. Raises CheckpointError if not even one."""
    free = shutil.disk_usage(run).free
    if free < size:
        raise CheckpointError(
            f"A checkpoint of this run takes about {_gb(size)}, and {str(run)!r} has {_gb(free)} left: nothing could be saved. "
            "Free some, or choose another OUTPUT=."
        )
    wanted = size * ((keep or 1) + 1)  # the newest is written before the oldest goes
    if free >= wanted:
        return None
    return (
        f"{_gb(free)} are left for checkpoints of about {_gb(size)} each, {keep or 'all of them'} kept and one more while it is "
        "written: the disk may become full. --save_total_limit 1 keeps fewer"
    )


def failed(run: Path, step: int, error: BaseException, size: int) -> CheckpointError:
    """The error of a save that did not succeed, which has left nothing behind."""
    last = next((path.name for path in reversed(_by_step(run))), None)
    free = shutil.disk_usage(run).free
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    full = free < size or getattr(error, "errno", None) in FULL or "No space" in reason or "File too large" in reason
    remedy = "Make room (--save_total_limit 1 keeps fewer)" if full else "Mend that"
    return CheckpointError(
        f"The checkpoint of step {step} could not be written into {str(run)!r} ({reason}). It takes about {_gb(size)}; {_gb(free)} "
        f"are left. Nothing half-written stays. {remedy}, and run the same command again: it continues from {last or 'the beginning'}."
    )


def _by_step(run: Path) -> list[Path]:
    found = [path for path in run.glob("checkpoint-*") if path.name[11:].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def _described(folder: Path, *, sync: bool = False) -> dict[str, dict[str, Any]]:
    """{file: {"bytes", "sha256"}} of everything below a folder but its manifest; several files at once (hashing frees Python)."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)

    def describe(path: Path) -> tuple[str, dict[str, Any]]:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            if sync:
                os.fsync(file.fileno())
            while block := file.read(BLOCK):
                digest.update(block)
            size = file.tell()
        return path.relative_to(folder).as_posix(), {"bytes": size, "sha256": digest.hexdigest()}

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(pool.map(describe, paths))


def _sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
